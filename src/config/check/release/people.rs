//! Checks of `people`, and of gates that ask for them.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;

use super::Checker;
use crate::config::diagnostic::{quoted, suggestion};
use crate::config::file;
use crate::config::syntax::Wrong;
use crate::config::types::{Check, Environment, Person, role};
use crate::config::yaml::Place;
use crate::error::nearest;

/// The kinds of key a signature can be checked with.
const KEY_KINDS: [&str; 5] = ["ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa"];

impl Checker<'_> {
    /// Roles of their own that `approve` gates ask for.
    pub(super) fn roles_asked(&self, environments: &BTreeMap<String, file::Environment>) -> BTreeSet<String> {
        let gates = environments.values().flat_map(|environment| &environment.gates);
        let asked = gates.filter_map(|gate| match &gate.approve {
            Some(file::Approve::Rule(rule)) => rule.role.clone(),
            _ => None,
        });
        asked.collect()
    }

    pub(super) fn people(
        &mut self,
        written: BTreeMap<String, file::Person>,
        place: &Place<'_>,
        asked: &BTreeSet<String>,
    ) -> BTreeMap<String, Person> {
        let mut people: BTreeMap<String, Person> = BTreeMap::new();
        let mut bodies: BTreeMap<String, String> = BTreeMap::new();
        for (name, person) in written {
            let here = place.key(&name);
            if name.trim() != name || name.is_empty() || name.contains(|c: char| c.is_control() || "<>".contains(c)) {
                let hint = Some("the name Git knows somebody by".into());
                self.findings.add(&place.label(&name), format!("`{name}` is not the name of a person"), hint);
            }
            match &person.key {
                None => {
                    let hint = Some("one line from a file like `~/.ssh/id_ed25519.pub`".into());
                    self.findings.add_missing(&here, format!("`{name}` has no `key`, so nothing they decide can count"), hint);
                }
                Some(key) => {
                    let body = self.note(&here.key("key"), public_key(key));
                    if let Some(other) = body.and_then(|body| bodies.insert(body, name.clone())) {
                        self.findings.add(&here.key("key"), format!("`{other}` has the same key"), None);
                    }
                }
            }
            self.roles(&person.roles, &here.key("roles"), asked);
            people.insert(name, Person { key: person.key, roles: person.roles.into_iter().collect() });
        }
        if !people.is_empty() {
            for (role, what) in [(role::ADMIN, "change environments, gates and people"), (role::PROMOTE, "promote")] {
                if !people.values().any(|person| person.roles.contains(role)) {
                    let hint = Some(format!("give somebody the role: `roles: [{role}]`"));
                    self.findings.add_missing(place, format!("nobody could {what}: no person has the role `{role}`"), hint);
                }
            }
        }
        people
    }

    fn roles(&mut self, roles: &[String], place: &Place<'_>, asked: &BTreeSet<String>) {
        for (index, role) in roles.iter().enumerate() {
            let known: Vec<&str> = role::ALL.iter().copied().chain(asked.iter().map(String::as_str)).collect();
            if roles[..index].contains(role) {
                self.findings.add(&place.item(index), format!("the role `{role}` is here twice"), None);
            } else if let Some(near) = nearest(role, known.iter().copied()).filter(|near| near != role) {
                // Roles of one's own may be there before a gate asks for them; one that is nearly another is a slip.
                let hint = Some(format!("did you mean `{near}`?"));
                self.findings.add(&place.item(index), format!("no gate asks for the role `{role}`"), hint);
            } else if role.is_empty() || role.contains(|c: char| c.is_whitespace() || c.is_control()) {
                self.findings.add(&place.item(index), format!("`{role}` is not the name of a role"), None);
            }
        }
    }

    /// Whether the `approve` gates of an environment can be passed at all; `place` is that of its gates.
    pub(super) fn approvals(&mut self, environment: &Environment, people: &BTreeMap<String, Person>, place: &Place<'_>) {
        for gate in &environment.gates {
            let Check::Approve(approve) = &gate.check else { continue };
            let index = (0..).find(|index| {
                let item = place.item(*index);
                item.node().is_none()
                    || (item.key("approve").is_there()
                        && item.key("name").node().map_or(gate.name == "approve", |node| node.text() == Some(gate.name.as_str())))
            });
            let here = place.item(index.unwrap_or_default()).key("approve");
            let here = if here.key("role").is_there() { here.key("role") } else { here };
            let role = &approve.role;
            if people.is_empty() {
                if role != role::APPROVE {
                    let hint = Some("say who has it: `people: { alice: { key: …, roles: [ … ] } }`".into());
                    self.findings.add(&here, format!("nobody has the role `{role}`: there are no `people`"), hint);
                }
                continue;
            }
            let able: Vec<&String> =
                people.iter().filter(|(_, person)| person.roles.contains(role)).map(|(name, _)| name).collect();
            if able.is_empty() {
                let roles: BTreeSet<&str> = people.values().flat_map(|person| &person.roles).map(String::as_str).collect();
                let roles: Vec<&str> = roles.into_iter().collect();
                self.findings.add(&here, format!("nobody has the role `{role}`"), suggestion(role, &roles, "people have"));
            } else if able.len() < approve.count as usize {
                let message = format!("{} approvals are needed, and only {} can give one", approve.count, quoted(&able));
                self.findings.add(&here, message, Some(format!("give the role `{role}` to more people, or ask for fewer")));
            }
        }
    }
}

/// A public key as a line of OpenSSH: `KIND BASE64 [COMMENT]`, without options. Returns the part in the middle.
fn public_key(text: &str) -> Result<String, Wrong> {
    let wrong = |message: String, hint: &str| Err(Wrong { message, hint: Some(hint.into()) });
    if text.contains("PRIVATE KEY") {
        return wrong("this is a private key".into(), "write the public one, from the file that ends with `.pub`");
    }
    let mut words = text.split_whitespace();
    let (kind, body) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if kind.starts_with("sk-") {
        return wrong(format!("keys of the kind `{kind}` cannot be checked here"), "take an `ssh-ed25519` key");
    }
    let shown: String = text.chars().take(24).collect();
    let blob = base64::engine::general_purpose::STANDARD.decode(body).unwrap_or_default();
    // RFC 4253, section 6.6: the blob begins with the length of its kind, and the kind.
    let named = blob.get(..4).map(|length| u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize);
    let same = named.and_then(|length| blob.get(4..length.checked_add(4)?)).is_some_and(|named| named == kind.as_bytes());
    if text.contains(['\n', '\r']) || !KEY_KINDS.contains(&kind) || !same || blob.len() < 36 {
        return wrong(format!("`{shown}` is not a public ssh key"), "one line, like `ssh-ed25519 AAAA… name`");
    }
    Ok(body.to_owned())
}
