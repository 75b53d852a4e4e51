//! The policy of a pipeline: environments, gates and people as `environment apply` committed them (`PIPELINE.json`).
//!
//! Made of a checked pipeline file with the texts of the files its gates name inside, so that a decision needs the ledger
//! only. Pure: files are read by a function that comes in.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::decision::{Decision, Kind, Refused, Why};
use crate::config::types::{Check, Command, Environment, Person, Pipeline, role};
use crate::error::{Problem, nearest};

/// Version of the files of a ledger that are written here.
pub const FORMAT: u32 = 1;
/// Bytes of a program that a gate runs: it is in each version of the policy.
const SCRIPT_MAX: usize = 1 << 20;
/// What a public key in PEM begins with.
const PEM: &str = "-----BEGIN PUBLIC KEY-----";

/// What decisions about a pipeline are measured against.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    pub format: u32,
    pub pipeline: String,
    /// The commit of the pipeline file it was made from, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    pub environments: BTreeMap<String, Environment>,
    /// Empty: everybody may decide, and who did is what Git says.
    #[serde(default)]
    pub people: BTreeMap<String, Person>,
    /// Repository for pushes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry: Option<String>,
    /// The decision that made it.
    pub decision: Option<Decision>,
}

impl Policy {
    /// The policy `pipeline` describes; `read` gives the text of a file.
    ///
    /// # Errors
    /// A file cannot be read, or is not the public key it should be.
    pub fn of(pipeline: &Pipeline, revision: Option<String>, read: &dyn Fn(&Path) -> Result<String>) -> Result<Self> {
        let mut environments = pipeline.releases.environments.clone();
        for (name, environment) in &mut environments {
            for gate in &mut environment.gates {
                embed(&mut gate.check, read).with_context(|| format!("cannot take the gate `{}` of `{name}`", gate.name))?;
            }
        }
        Ok(Self {
            format: FORMAT,
            pipeline: pipeline.name.to_string(),
            revision,
            environments,
            people: pipeline.releases.people.clone(),
            registry: pipeline.releases.registry.clone(),
            decision: None,
        })
    }

    /// Reads `PIPELINE.json`.
    ///
    /// # Errors
    /// Not JSON of this shape, or written by a newer pipeline.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        parse(bytes, "policy")
    }

    /// The bytes of `PIPELINE.json`: the same value gives the same bytes.
    pub fn bytes(&self) -> Vec<u8> {
        bytes(self)
    }

    /// The environment `name`.
    ///
    /// # Errors
    /// There is none; the hint names the nearest.
    pub fn environment(&self, name: &str) -> Result<&Environment, Refused> {
        self.environments.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.environments.keys().map(String::as_str).collect();
            let hint = match nearest(name, names.iter().copied()) {
                Some(near) => format!("did you mean `{}/{near}`?", self.pipeline),
                None => {
                    format!("there are `{}`; `pipeline environment apply` adds those of the pipeline file", names.join("`, `"))
                }
            };
            Refused::new(Why::NoEnvironment, format!("`{}` has no environment `{name}`", self.pipeline)).hint(hint)
        })
    }

    /// The environments that promote from `name`, sorted.
    pub fn downstream(&self, name: &str) -> Vec<&str> {
        let is_below = |environment: &Environment| environment.from.names().iter().any(|upstream| upstream == name);
        self.environments.iter().filter(|(_, environment)| is_below(environment)).map(|(name, _)| name.as_str()).collect()
    }

    /// Whether `decision` may be made by who made it; `signed`: by the key this policy has for the actor.
    ///
    /// # Errors
    /// Where there are people: somebody else, not signed by their key, or without the role. An override needs a reason anywhere.
    pub fn authorize(&self, decision: &Decision, signed: bool) -> Result<(), Refused> {
        if !decision.overrides.is_empty() && decision.reason.trim().is_empty() {
            let message = "going past a gate needs a reason".to_owned();
            return Err(Refused::new(Why::NoReason, message).hint("write it with `--reason`: it stays in the ledger"));
        }
        if self.people.is_empty() {
            return Ok(());
        }
        let actor = &decision.actor;
        let Some(person) = self.people.get(actor) else {
            let names: Vec<&str> = self.people.keys().map(String::as_str).collect();
            return Err(Refused::new(Why::NotAPerson, format!("`{actor}` is not one of the people of `{}`", self.pipeline))
                .hint(format!("people are `{}`; the name is that of Git's `user.name`", names.join("`, `"))));
        };
        if !signed || person.key.is_none() {
            return Err(Refused::new(Why::NotSigned, format!("the decision is not signed by the key of `{actor}`"))
                .hint(format!("`people` of `{}` names the key; sign with it", self.pipeline)));
        }
        let mut needed: Vec<Vec<&str>> = vec![self.roles_for(decision.kind)];
        if !decision.overrides.is_empty() {
            needed.push(vec![role::OVERRIDE]);
        }
        for roles in needed {
            if !roles.iter().any(|role| person.roles.contains(*role)) {
                let able: Vec<&str> = self
                    .people
                    .iter()
                    .filter(|(_, person)| roles.iter().any(|role| person.roles.contains(*role)))
                    .map(|(name, _)| name.as_str())
                    .collect();
                let hint = if able.is_empty() { "nobody has it".into() } else { format!("ask `{}`", able.join("`, `")) };
                let message = format!("`{actor}` does not have the role `{}`", roles.join("` or `"));
                return Err(Refused::new(Why::NoRole, message).hint(hint));
            }
        }
        Ok(())
    }

    /// Roles one of which a decision needs.
    fn roles_for(&self, kind: Kind) -> Vec<&str> {
        match kind {
            Kind::Apply => vec![role::ADMIN],
            Kind::Enter | Kind::Promote | Kind::Rollback | Kind::Configure | Kind::Clear => vec![role::PROMOTE],
            Kind::Hold | Kind::Lift | Kind::Freeze | Kind::Thaw => vec![role::PROMOTE, role::ADMIN, role::OVERRIDE],
            Kind::Report => vec![role::REPORT, role::PROMOTE],
            Kind::Approve => {
                let gates = self.environments.values().flat_map(|environment| &environment.gates);
                let mut roles: Vec<&str> = gates.filter_map(|gate| approver(&gate.check)).collect();
                roles.push(role::APPROVE);
                roles.sort_unstable();
                roles.dedup();
                roles
            }
        }
    }

    /// This policy as the one after `before`, made by `decision`: the first is trusted, later ones are for those whom the
    /// one before gives the role `admin`. What changes is committed together with the states of new environments
    /// ([`super::state::State::created`]) and without those of removed ones.
    ///
    /// # Errors
    /// [`Policy::authorize`] of the policy before; another pipeline's; nothing changes.
    pub fn after(mut self, before: Option<&Policy>, decision: &Decision, signed: bool) -> Result<Self, Refused> {
        if decision.kind != Kind::Apply {
            return Err(Refused::new(Why::Stale, format!("`{}` does not change a policy", decision.kind)));
        }
        if let Some(before) = before {
            before.authorize(decision, signed)?;
            if before.pipeline != self.pipeline {
                let message = format!("this is the policy of `{}`, not of `{}`", self.pipeline, before.pipeline);
                return Err(Refused::new(Why::Stale, message));
            }
            if difference(before, &self).is_empty() {
                return Err(Refused::new(Why::Nothing, format!("the policy of `{}` is that already", self.pipeline)));
            }
        }
        self.format = FORMAT;
        let by_key = before.is_some_and(|before| !before.people.is_empty() && signed);
        self.decision = Some(Decision { signed: by_key, ..decision.clone() });
        Ok(self)
    }
}

/// The role whose approvals a gate counts.
pub(super) fn approver(check: &Check) -> Option<&str> {
    match check {
        Check::Approve(approve) => Some(&approve.role),
        _ => None,
    }
}

/// Puts the texts of the files `check` names in their place.
fn embed(check: &mut Check, read: &dyn Fn(&Path) -> Result<String>) -> Result<()> {
    let key = |key: &mut String| -> Result<()> {
        if !key.contains(PEM) {
            let text = read(Path::new(key.as_str()))?;
            if !text.contains(PEM) || text.contains("PRIVATE KEY") {
                return Err(Problem::usage(format!("`{key}` is not a public key"))
                    .hint(format!("it begins with `{PEM}`, as `pipeline keys generate` and `cosign public-key` write it"))
                    .into());
            }
            *key = text;
        }
        *key = key.trim().to_owned() + "\n";
        Ok(())
    };
    match check {
        Check::Signed(signed) => signed.keys.iter_mut().try_for_each(key),
        Check::Provenance(provenance) => provenance.keys.iter_mut().try_for_each(key),
        Check::VmTest(test) => {
            let path = Path::new(&test.file);
            test.text = read(path)?;
            test.file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok(())
        }
        Check::Command(Command { script: Some(script), .. }) => {
            let path = PathBuf::from(&script.file);
            script.text = program(&path, read(&path))?;
            script.file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The text of a program that a gate runs: a script that says what runs it, small enough for the ledger.
fn program(path: &Path, text: Result<String>) -> Result<String> {
    let problem = |what: &str| {
        Problem::usage(format!("`{}` {what}, and the ledger keeps the programs that gates run", path.display()))
            .hint("a program of the machine that asks is named by its absolute path")
    };
    let text = text.map_err(|error| {
        let is_binary = error.chain().any(|cause| {
            cause.downcast_ref::<std::io::Error>().is_some_and(|error| error.kind() == std::io::ErrorKind::InvalidData)
        });
        if is_binary { problem("is no text").into() } else { error }
    })?;
    if text.contains('\0') {
        return Err(problem("is no text").into());
    }
    if text.len() > SCRIPT_MAX {
        return Err(problem(&format!("has more than {} MiB", SCRIPT_MAX >> 20)).into());
    }
    if !text.starts_with("#!") {
        let problem = Problem::usage(format!("`{}` does not say what runs it", path.display()));
        return Err(problem.hint("its first line names that, like `#!/bin/sh`").into());
    }
    Ok(text)
}

/// Something that differs between two policies.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Like `environments.prod.gates.approve.count`; things with a name are found by it.
    pub path: String,
    /// `None`: it is new.
    pub before: Option<Value>,
    /// `None`: it is gone.
    pub after: Option<Value>,
}

/// What differs, in order of path; the decisions that made them and the revision do not count.
pub fn difference(before: &Policy, after: &Policy) -> Vec<Difference> {
    let flat = |policy: &Policy| {
        let mut leaves = BTreeMap::new();
        let parts = Policy { decision: None, revision: None, format: 0, ..policy.clone() };
        flatten(&serde_json::to_value(parts).unwrap_or_default(), String::new(), &mut leaves);
        leaves
    };
    let (before, after) = (flat(before), flat(after));
    let paths: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let changed = paths.into_iter().filter(|path| before.get(*path) != after.get(*path));
    changed
        .map(|path| Difference { path: path.clone(), before: before.get(path).cloned(), after: after.get(path).cloned() })
        .collect()
}

fn flatten(value: &Value, path: String, leaves: &mut BTreeMap<String, Value>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(map) if !map.is_empty() => map.iter().for_each(|(key, value)| flatten(value, below(key), leaves)),
        Value::Array(list) if list.iter().any(Value::is_object) => {
            for (index, value) in list.iter().enumerate() {
                let name = value.get("name").and_then(Value::as_str).map_or_else(|| index.to_string(), str::to_owned);
                flatten(value, below(&name), leaves);
            }
            // The order gates are asked in is part of the policy.
            let names: Vec<&Value> = list.iter().filter_map(|value| value.get("name")).collect();
            leaves.insert(below("order"), Value::from_iter(names.into_iter().cloned()));
        }
        other => {
            leaves.insert(path, other.clone());
        }
    }
}

/// The bytes of a file of the ledger.
pub(super) fn bytes<T: Serialize>(value: &T) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("maps with text keys and plain values");
    bytes.push(b'\n');
    bytes
}

/// Reads a file of the ledger.
pub(super) fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u32,
    }
    let versioned: Versioned =
        serde_json::from_slice(bytes).with_context(|| format!("the {what} in the ledger is not readable"))?;
    if versioned.format > FORMAT {
        return Err(Problem::failed(format!("the {what} in the ledger was written by a newer pipeline"))
            .hint(format!("it has format {}, and this one knows {FORMAT}", versioned.format))
            .into());
    }
    serde_json::from_slice(bytes).with_context(|| format!("the {what} in the ledger is not readable"))
}

#[cfg(test)]
mod tests;
