//! Checks of `gates`.

use std::path::Path;

use super::{Checker, RESERVED, kinds, named_twice};
use crate::config::diagnostic::suggestion;
use crate::config::file;
use crate::config::recurrence::Rule;
use crate::config::syntax::{self, Wrong};
use crate::config::types::{
    Approve, Budget, Check, Command, Gate, Http, Provenance, Report, Sbom, SbomDeny, Script, Seconds, Signed, Upstream,
    VmTestFile, Window, Yes, role,
};
use crate::config::yaml::Place;

/// Seconds a command may take when nothing is written.
const COMMAND_TIMEOUT: Seconds = Seconds(60);
/// Seconds an HTTP answer may take when nothing is written.
const HTTP_TIMEOUT: Seconds = Seconds(10);
/// The public key `signed: true` means, beside the pipeline file.
const OWN_KEY: &str = "cosign.pub";

impl Checker<'_> {
    pub(super) fn gates(&mut self, written: Vec<file::Gate>, place: &Place<'_>, from: &Upstream, has_disk: bool) -> Vec<Gate> {
        let mut checked: Vec<Gate> = Vec::new();
        for (index, gate) in written.into_iter().enumerate() {
            let place = place.item(index);
            let Some(kind) = self.exactly_one(&place, "a gate", &kinds()) else { continue };
            let name = gate.name.clone().unwrap_or_else(|| kind.to_owned());
            let name_place = if place.key("name").is_there() { place.key("name") } else { place.label(kind) };
            self.gate_name(&name, &name_place, &checked);
            if *from == Upstream::None && matches!(kind, "healthy" | "soak") {
                let hint = Some("name an environment the release comes from: `from: …`".into());
                self.findings.add(
                    &place.label(kind),
                    format!("`{kind}` looks at where a release was before, and here it enters"),
                    hint,
                );
            }
            let description = gate.description.clone();
            if let Some(check) = self.gate_check(kind, gate, &place, has_disk) {
                checked.push(Gate { name, description, check });
            }
        }
        checked
    }

    fn gate_name(&mut self, name: &str, place: &Place<'_>, others: &[Gate]) {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        if name.is_empty() || !name.chars().all(plain) || name.len() > 63 {
            let hint = Some("lower case letters, digits, `.`, `_` and `-`".into());
            self.findings.add(place, format!("`{name}` is not a name for a gate"), hint);
        } else if RESERVED.contains(&name) {
            let hint = Some("freezes and holds are always checked".into());
            self.findings.add(place, format!("a gate cannot be called `{name}`"), hint);
        } else if named_twice(others, name) {
            let hint = Some("give one of them another name: `- name: …`".into());
            self.findings.add(place, format!("there is another gate `{name}`"), hint);
        }
    }

    fn gate_check(&mut self, kind: &str, gate: file::Gate, place: &Place<'_>, has_disk: bool) -> Option<Check> {
        let here = place.key(kind);
        match kind {
            "healthy" => {
                self.must_be_true(place, "healthy", gate.healthy);
                Some(Check::Healthy(Yes))
            }
            "soak" => self.note(&here, syntax::duration(&gate.soak?)).map(|time| Check::Soak(Seconds(time.as_secs()))),
            "approve" => self.approve(gate.approve?, &here),
            "window" => self.window(gate.window?, &here),
            "signed" => self.signed(gate.signed?, &here),
            "provenance" => Some(self.provenance(gate.provenance?, &here)),
            "sbom" => Some(self.sbom(gate.sbom?, &here)),
            "command" => self.gate_command(gate.command?, &here),
            "http" => self.gate_http(gate.http?, &here),
            "vm-test" => self.vm_test(&gate.vm_test?, &here, has_disk),
            "budget" => self.budget(gate.budget?, &here),
            _ => self.report(gate.report?, &here),
        }
    }

    fn approve(&mut self, approve: file::Approve, place: &Place<'_>) -> Option<Check> {
        let (count, name) = match approve {
            file::Approve::Count(count) => (count, None),
            file::Approve::Rule(rule) => (rule.count, rule.role),
        };
        if count == 0 {
            self.findings.add(place, "nobody has to approve", Some("leave the gate away, or write at least 1".into()));
        }
        Some(Check::Approve(Approve { count, role: name.unwrap_or_else(|| role::APPROVE.into()) }))
    }

    fn window(&mut self, window: file::Window, place: &Place<'_>) -> Option<Check> {
        let before = self.findings.len();
        let allow = self.rules(window.allow, &place.key("allow"), window.start.is_some());
        let deny = self.rules(window.deny, &place.key("deny"), window.start.is_some());
        if allow.is_empty() && deny.is_empty() {
            self.findings.add_missing(place, "`window` needs `allow` or `deny`", None);
        }
        let duration = self.note(&place.key("duration"), syntax::duration(&window.duration));
        let zone = window.timezone.unwrap_or_else(|| "UTC".into());
        self.note(&place.key("timezone"), crate::config::recurrence::timezone(&zone));
        for (index, except) in window.except.iter().enumerate() {
            self.note(&place.key("except").item(index), except.parse::<crate::config::recurrence::Except>());
        }
        let duration = Seconds(duration.map_or(0, |duration| duration.as_secs()));
        let checked = Window { allow, deny, start: window.start, duration, timezone: zone, except: window.except };
        if self.findings.len() == before
            && duration.0 > 0
            && let Some(schedule) = self.note(&place.key("start"), checked.schedule())
            && schedule.next_open(schedule.zone.to_timestamp(schedule.start).unwrap_or_default()).is_none()
        {
            self.findings.add(
                place,
                "this window never opens",
                Some("look at `COUNT`, `UNTIL` and days that do not exist".into()),
            );
        }
        Some(Check::Window(checked))
    }

    fn rules(&mut self, written: Option<file::OneOrMany>, place: &Place<'_>, has_start: bool) -> Vec<String> {
        let (rules, is_list) = match written {
            None => return Vec::new(),
            Some(file::OneOrMany::One(rule)) => (vec![rule], false),
            Some(file::OneOrMany::Many(rules)) => (rules, true),
        };
        for (index, text) in rules.iter().enumerate() {
            let place = if is_list { place.item(index) } else { place.clone() };
            let Some(rule) = self.note(&place, text.parse::<Rule>()) else { continue };
            if let Some(reason) = rule.needs_start().filter(|_| !has_start) {
                let hint = Some("write a first day and time: `start: 2026-01-05T09:00`".into());
                self.findings.add(&place, format!("the rule `{text}` needs `start`: {reason}"), hint);
            }
        }
        rules
    }

    fn signed(&mut self, signed: file::Signed, place: &Place<'_>) -> Option<Check> {
        let keys = match signed {
            file::Signed::Keys(keys) => {
                if keys.keys.is_empty() {
                    self.findings.add(place, "no key is named", Some("like `signed: { keys: [cosign.pub] }`".into()));
                }
                self.public_keys(keys.keys, &place.key("keys"))
            }
            file::Signed::Own(false) => {
                self.findings.add(place, "`signed` is `true` or not there", None);
                return None;
            }
            file::Signed::Own(true) => {
                let own = self.dir.join(OWN_KEY);
                if !own.is_file() {
                    let hint = "`pipeline keys generate cosign` makes a key pair; other keys are `signed: { keys: [FILE] }`";
                    self.findings.add(place, format!("there is no `{OWN_KEY}` beside the pipeline file"), Some(hint.into()));
                }
                vec![own.to_string_lossy().into_owned()]
            }
        };
        Some(Check::Signed(Signed { keys }))
    }

    /// PEM texts as they are, files as absolute paths.
    fn public_keys(&mut self, keys: Vec<String>, place: &Place<'_>) -> Vec<String> {
        let mut checked = Vec::new();
        for (index, key) in keys.into_iter().enumerate() {
            let place = place.item(index);
            if key.contains("PRIVATE KEY") {
                let hint = Some("write the public one, from the file that ends with `.pub`".into());
                self.findings.add(&place, "this is a private key", hint);
            } else if key.contains("-----BEGIN") {
                if !key.contains("-----BEGIN PUBLIC KEY-----") || !key.contains("-----END PUBLIC KEY-----") {
                    let hint = Some("it lies between `-----BEGIN PUBLIC KEY-----` and `-----END PUBLIC KEY-----`".into());
                    self.findings.add(&place, "this is not a public key in PEM", hint);
                }
                checked.push(key);
            } else if key.ends_with(".key") {
                let hint = Some("name the file that ends with `.pub`".into());
                self.findings.add(&place, format!("`{key}` is the name of a private key"), hint);
            } else {
                checked.push(self.existing(&key, &place, "file", Path::is_file).to_string_lossy().into_owned());
            }
        }
        checked
    }

    fn provenance(&mut self, written: file::Provenance, place: &Place<'_>) -> Check {
        for (key, list) in [("builders", &written.builders), ("sources", &written.sources)] {
            self.patterns(list, &place.key(key));
        }
        let unsigned = written.unsigned.unwrap_or(false);
        if written.keys.is_empty() && !unsigned {
            let hint = "like `keys: [cosign.pub]`; `unsigned: true` takes what anybody who may push to the registry wrote";
            self.findings.add_missing(place, "`provenance` needs `keys`", Some(hint.into()));
        } else if unsigned && !written.keys.is_empty() {
            let hint = Some("keep one of `keys` and `unsigned`".into());
            self.findings.add(&place.key("unsigned"), "a provenance that keys must have signed is not `unsigned`", hint);
        }
        let keys = self.public_keys(written.keys, &place.key("keys"));
        let clean = written.clean.unwrap_or(false);
        Check::Provenance(Provenance { builders: written.builders, sources: written.sources, clean, keys, unsigned })
    }

    /// Texts that may end with `*`.
    fn patterns(&mut self, list: &[String], place: &Place<'_>) {
        for (index, text) in list.iter().enumerate() {
            if text.is_empty() || text.trim_end_matches('*').contains('*') || text.ends_with("**") {
                let hint = Some("`*` stands for anything, at the end only".into());
                self.findings.add(&place.item(index), format!("`{text}` is not a pattern"), hint);
            }
        }
    }

    fn sbom(&mut self, written: file::Sbom, place: &Place<'_>) -> Check {
        let deny = written.deny.unwrap_or_default();
        for (key, list) in [("packages", &deny.packages), ("licences", &deny.licences)] {
            self.patterns(list, &place.key("deny").key(key));
        }
        for (name, version) in &written.minimum {
            if !version.starts_with(|c: char| c.is_ascii_digit()) || version.contains(char::is_whitespace) {
                let hint = Some("it begins with a digit, like `3.0.17-1`".into());
                self.findings.add(&place.key("minimum").key(name), format!("`{version}` is not a version"), hint);
            }
        }
        if deny.packages.is_empty() && deny.licences.is_empty() && written.minimum.is_empty() {
            let hint = Some("like `sbom: { deny: { packages: [telnetd] } }`".into());
            self.findings.add_missing(place, "`sbom` asks nothing", hint);
        }
        let deny = SbomDeny { packages: deny.packages, licences: deny.licences };
        Check::Sbom(Sbom { deny, minimum: written.minimum })
    }

    fn gate_command(&mut self, written: file::Command, place: &Place<'_>) -> Option<Check> {
        let run = match written.run {
            file::OneOrMany::Many(words) => words,
            file::OneOrMany::One(text) if text.trim().is_empty() => Vec::new(),
            file::OneOrMany::One(text) => ["sh", "-c", &text].map(str::to_owned).to_vec(),
        };
        if run.is_empty() {
            self.findings.add(&place.key("run"), "the command is empty", None);
        }
        self.command(&run, &place.key("run"));
        let timeout = self.seconds(written.timeout, &place.key("timeout"), COMMAND_TIMEOUT);
        let mut command = Command { run, timeout, script: None };
        if command.names_a_file() {
            let path = self.existing(&command.run[0], &place.key("run"), "file", Path::is_file);
            command.script = Some(Script { file: path.to_string_lossy().into_owned(), text: String::new() });
        }
        Some(Check::Command(command))
    }

    fn seconds(&mut self, text: Option<String>, place: &Place<'_>, default: Seconds) -> Seconds {
        Seconds(self.duration(text, place, default.duration()).as_secs())
    }

    fn gate_http(&mut self, written: file::Http, place: &Place<'_>) -> Option<Check> {
        self.note(&place.key("url"), url(&written.url));
        let timeout = self.seconds(written.timeout, &place.key("timeout"), HTTP_TIMEOUT);
        Some(Check::Http(Http { url: written.url, status: written.status, timeout }))
    }

    fn vm_test(&mut self, file: &str, place: &Place<'_>, has_disk: bool) -> Option<Check> {
        if !has_disk {
            let hint = Some("a pipeline with `host` makes one".into());
            self.findings.add(place, "a vm-test boots the release's disk, and this pipeline makes none", hint);
        }
        let path = self.existing(file, place, "file", Path::is_file);
        Some(Check::VmTest(VmTestFile { file: path.to_string_lossy().into_owned(), text: String::new() }))
    }

    fn budget(&mut self, written: file::Budget, place: &Place<'_>) -> Option<Check> {
        if written.size.is_none() && written.packages.is_none() {
            self.findings.add_missing(place, "`budget` needs `size` or `packages`", None);
        }
        let size = written.size.and_then(|text| self.note(&place.key("size"), syntax::size(&text)));
        Some(Check::Budget(Budget { size, packages: written.packages.map(u64::from) }))
    }

    fn report(&mut self, written: file::Report, place: &Place<'_>) -> Option<Check> {
        self.note(&place.key("name"), syntax::file_name(&written.name));
        let result = written.result.unwrap_or_else(|| "pass".into());
        let results = ["pass", "fail"];
        if !results.contains(&result.as_str()) {
            let hint = suggestion(&result, &results, "possible are");
            self.findings.add(&place.key("result"), format!("`{result}` is not the result of a report"), hint);
        }
        Some(Check::Report(Report { name: written.name, result }))
    }
}

/// An address a gate can ask.
fn url(text: &str) -> Result<(), Wrong> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let host = rest.map(|rest| rest.split(['/', '?', '#']).next().unwrap_or_default());
    if host.is_some_and(|host| host.contains('@')) {
        let message = "an address with a user or password in it would end up in the ledger";
        return Err(Wrong { message: message.into(), hint: Some("ask it with `command`, which can read a file".into()) });
    }
    if host.is_none_or(str::is_empty) || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(Wrong {
            message: format!("`{text}` is not an address"),
            hint: Some("like `https://status.example/ready`".into()),
        });
    }
    Ok(())
}
