//! Checks of the keys `environments`, `people`, `ledger` and `registry`: what their types cannot say.

mod gate;
mod people;

use std::collections::{BTreeMap, BTreeSet};

use super::rollout::Makes;
use super::{Checker, variables};
use crate::config::diagnostic::{quoted, suggestion};
use crate::config::file;
use crate::config::syntax::{self, GitAddress};
use crate::config::types::{Check, Environment, Gate, Ledger, Name, Releases, SecretRef, Upstream};
use crate::config::yaml::{Content, Place};

/// Releases of an environment that `prune` keeps when nothing is written.
pub const KEEP: u32 = 10;
/// Names of files at the top of a ledger, which a pipeline's policy would have too.
const LEDGER_FILES: [&str; 2] = ["ledger", "frozen"];
/// What gates cannot be called: a freeze and a hold are checked before all gates.
const RESERVED: [&str; 2] = ["freeze", "hold"];

/// The keys of the document, as written.
pub(super) struct Written {
    pub environments: BTreeMap<String, file::Environment>,
    pub people: BTreeMap<String, file::Person>,
    pub ledger: Option<file::Ledger>,
    pub registry: Option<String>,
}

/// What the rest of the file says that environments are measured against.
pub(super) struct Around<'a> {
    /// The pipeline's name.
    pub name: Option<&'a Name>,
    pub makes: Makes,
    /// The image's volumes.
    pub volumes: &'a [String],
}

impl Checker<'_> {
    /// `root` is the place of the document.
    pub(super) fn releases(&mut self, mut written: Written, root: &Place<'_>, around: &Around<'_>) -> Releases {
        let place = root.key("environments");
        for key in empty_keys(&place) {
            // A mapping without a value is an environment with nothing said about it.
            written.environments.entry(key).or_default();
        }
        if let Some(name) = around.name.filter(|name| LEDGER_FILES.contains(&name.as_str()) && !written.environments.is_empty()) {
            let hint = Some(format!("like `{name}-app`"));
            self.findings.add(&root.key("name"), format!("a pipeline with environments cannot be called `{name}`"), hint);
        }
        let asked = self.roles_asked(&written.environments);
        let people = self.people(written.people, &root.key("people"), &asked);
        let names: Vec<String> = written.environments.keys().cloned().collect();
        let mut environments = BTreeMap::new();
        for (name, environment) in written.environments {
            self.environment_name(&name, &place);
            let checked = self.environment(&name, environment, &place.key(&name), &names, around);
            self.approvals(&checked, &people, &place.key(&name).key("gates"));
            environments.insert(name, checked);
        }
        self.cycles(&environments, &place);
        self.clashes(&environments, &place);
        let ledger = written.ledger.map(|ledger| self.ledger(ledger, &root.key("ledger"))).unwrap_or_default();
        if let Some(registry) = &written.registry {
            self.registry(registry, &root.key("registry"));
        }
        Releases { environments, people, ledger, registry: written.registry }
    }

    pub(super) fn environment_name(&mut self, name: &str, place: &Place<'_>) {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        let valid = name.chars().all(plain) && edge(name.chars().next()) && edge(name.chars().last()) && name.len() <= 63;
        if !valid {
            let hint = Some("lower case letters, digits and inner `-`".into());
            self.findings.add(&place.label(name), format!("`{name}` is not the name of an environment"), hint);
        }
    }

    fn environment(
        &mut self,
        name: &str,
        written: file::Environment,
        place: &Place<'_>,
        names: &[String],
        around: &Around<'_>,
    ) -> Environment {
        let from = self.upstream(name, written.from, &place.key("from"), names);
        let gates = self.gates(written.gates, &place.key("gates"), &from, around.makes.disk);
        variables(self.findings, &written.config, &place.key("config"));
        for (key, value) in &written.config {
            if value.contains("PRIVATE KEY-----") {
                let hint = Some("move it to `secrets`, which say where a value is".into());
                self.findings.add(&place.key("config").label(key), format!("`{key}` holds a private key"), hint);
            }
        }
        let secrets = self.references(written.secrets, &place.key("secrets"), &written.config);
        let targets = self.targets(written.target, written.targets, place, around.makes);
        let volumes = self.environment_volumes(written.volumes, place, &targets, around.volumes);
        let routes = self.routes(written.routes, name, place, targets.is_empty());
        let rollout = self.rollout(written.rollout, place, targets.is_empty());
        let together = written.together;
        self.together(together.as_ref(), place, targets.is_empty());
        let (automatic, keep) = (written.automatic.unwrap_or(false), written.keep.unwrap_or(KEEP));
        let config = written.config;
        Environment { from, automatic, gates, config, secrets, targets, routes, volumes, rollout, together, keep }
    }

    fn upstream(&mut self, name: &str, from: Option<file::Upstream>, place: &Place<'_>, names: &[String]) -> Upstream {
        let (list, all, items): (Vec<String>, bool, Place<'_>) = match from {
            None => return Upstream::None,
            Some(file::Upstream::One(one)) => (vec![one], false, place.clone()),
            Some(file::Upstream::Any(list)) => (list, false, place.clone()),
            // serde takes an empty list for a mapping with nothing in it.
            Some(file::Upstream::Rule(_)) if is_list(place) => (Vec::new(), false, place.clone()),
            Some(file::Upstream::Rule(rule)) => match self.exactly_one(place, "`from`", &["any", "all"]) {
                Some("all") => (rule.all, true, place.key("all")),
                _ => (rule.any, false, place.key("any")),
            },
        };
        if list.is_empty() && items.is_there() {
            let hint = Some("leave `from` away where releases enter".into());
            self.findings.add(place, format!("environment `{name}` promotes from nothing"), hint);
        }
        let others: Vec<&str> = names.iter().map(String::as_str).filter(|other| *other != name).collect();
        for (index, upstream) in list.iter().enumerate() {
            let item = items.item(index);
            let item = if item.is_there() { item } else { items.clone() };
            if upstream == name {
                let hint = suggestion("", &others, "defined environments are");
                self.findings.add(&item, format!("environment `{name}` promotes from itself"), hint);
            } else if !names.contains(upstream) {
                let message = format!("environment `{name}` promotes from `{upstream}`, which is not defined");
                self.findings.add(&item, message, suggestion(upstream, &others, "defined environments are"));
            } else if list[..index].contains(upstream) {
                self.findings.add(&item, format!("`{upstream}` is here twice"), None);
            }
        }
        let sorted: BTreeSet<String> = list.into_iter().collect();
        let sorted = sorted.into_iter().collect();
        if all { Upstream::All(sorted) } else { Upstream::Any(sorted) }
    }

    /// Notes each ring of environments that promote from one another, once.
    fn cycles(&mut self, environments: &BTreeMap<String, Environment>, place: &Place<'_>) {
        let mut known: BTreeSet<BTreeSet<&str>> = BTreeSet::new();
        for name in environments.keys() {
            let mut path = vec![name.as_str()];
            if let Some(ring) = ring(environments, &mut path, &mut BTreeSet::new())
                && known.insert(ring.iter().copied().collect())
            {
                let first = ring[0];
                let shown: Vec<&str> = ring.iter().rev().copied().collect();
                let message = format!("the environments {} promote from one another in a ring", quoted(&shown));
                let hint = Some("releases enter where an environment has no `from`".into());
                self.findings.add(&place.key(first).label("from"), message, hint);
            }
        }
    }

    fn references(
        &mut self,
        written: BTreeMap<String, file::SecretRef>,
        place: &Place<'_>,
        config: &BTreeMap<String, String>,
    ) -> BTreeMap<String, SecretRef> {
        let mut checked = BTreeMap::new();
        for (name, reference) in written {
            self.note(&place.label(&name), syntax::variable(&name));
            if config.contains_key(&name) {
                self.findings.add(&place.label(&name), format!("`{name}` is in `config` too"), None);
            }
            let here = place.key(&name);
            let file::SecretRef::Reference(reference) = reference else {
                let hint =
                    "write where it is: `{ file: /PATH }`, `{ env: VARIABLE }`, or `{ stored: true }` and `pipeline secret set`";
                let message = format!("the secret `{name}` is written as a value, and this file is committed");
                self.findings.add(&place.label(&name), message, Some(hint.into()));
                continue;
            };
            let kind = self.exactly_one(&here, &format!("the secret `{name}`"), &["file", "env", "stored"]);
            self.must_be_true(&here, "stored", reference.stored);
            let found = match kind {
                Some("file") => {
                    let path = reference.file.unwrap_or_default();
                    self.note(&here.key("file"), syntax::image_path(&path));
                    SecretRef::File(path)
                }
                Some("env") => {
                    let variable = reference.env.unwrap_or_default();
                    self.note(&here.key("env"), syntax::variable(&variable));
                    SecretRef::Env(variable)
                }
                _ => SecretRef::Stored(String::new()),
            };
            checked.insert(name, found);
        }
        checked
    }

    fn ledger(&mut self, written: file::Ledger, place: &Place<'_>) -> Ledger {
        let (remote, sign, at) = match written {
            file::Ledger::Remote(remote) => (Some(remote), None, place.clone()),
            file::Ledger::Settings(settings) => (settings.remote, settings.sign, place.key("remote")),
        };
        let remote = remote.map(|address| match self.note(&at, syntax::git_address(&address)) {
            Some(GitAddress::Folder) => super::join(self.dir, address).to_string_lossy().into_owned(),
            _ => address,
        });
        Ledger { remote, sign: sign.unwrap_or(false) }
    }

    fn registry(&mut self, text: &str, place: &Place<'_>) {
        if self.note(place, syntax::image_reference(text)).is_none() {
            return;
        }
        let last = text.rsplit('/').next().unwrap_or_default();
        let host = text.split('/').next().unwrap_or_default();
        if last.contains([':', '@']) {
            let hint = Some("tags and digests are the releases'".into());
            self.findings.add(place, format!("`{text}` is one image, and `registry` names a repository"), hint);
        } else if !text.contains('/') || !(host.contains(['.', ':']) || host == "localhost") {
            let hint = Some("like `registry.example/team/shop`".into());
            self.findings.add(place, format!("`{text}` does not name a registry"), hint);
        }
    }
}

fn is_list(place: &Place<'_>) -> bool {
    matches!(place.node().map(|node| &node.content), Some(Content::Sequence(_)))
}

/// Keys of a mapping that have no value.
pub(super) fn empty_keys(place: &Place<'_>) -> Vec<String> {
    match place.node().map(|node| &node.content) {
        Some(Content::Mapping(entries)) => {
            entries.iter().filter(|(_, value)| value.is_null()).filter_map(|(key, _)| key.text().map(str::to_owned)).collect()
        }
        _ => Vec::new(),
    }
}

/// The ring that walking upstream along `path` ends in, if it does: each promotes from the next, the last from the first.
fn ring<'e>(
    environments: &'e BTreeMap<String, Environment>,
    path: &mut Vec<&'e str>,
    dead: &mut BTreeSet<&'e str>,
) -> Option<Vec<&'e str>> {
    let here = *path.last()?;
    for next in environments.get(here)?.from.names().iter().map(String::as_str) {
        if next == here || dead.contains(next) {
            continue;
        }
        if let Some(index) = path.iter().position(|seen| *seen == next) {
            return Some(path[index..].to_vec());
        }
        path.push(next);
        let found = ring(environments, path, dead);
        if found.is_some() {
            return found;
        }
        path.pop();
    }
    dead.insert(here);
    None
}

/// Whether two gates of an environment have one name.
fn named_twice(gates: &[Gate], name: &str) -> bool {
    gates.iter().any(|gate| gate.name == name)
}

/// The kinds of check, for messages.
fn kinds() -> [&'static str; 12] {
    Check::NAMES
}

#[cfg(test)]
mod tests;
