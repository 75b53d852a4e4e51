//! Why a step runs again: the difference between the ingredients it had and those it has.

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use super::Prepared;
use super::plan::{Ingredient, Step};
use super::record::{self, BuildRecord, BuiltStep, StepRecord};
use super::source::listing::{Listing, changes};
use crate::artifact::store::Store;
use crate::oci::digest::Digest;

/// Differences named in one line.
const NAMED: usize = 3;

/// Kinds of ingredients whose names stand in backticks.
const KINDS: [&str; 12] = [
    "package",
    "variable",
    "builder variable",
    "s2i variable",
    "builder script",
    "secret",
    "playbook",
    "image",
    "app",
    "file",
    "script",
    "template",
];

/// One step of [`explain`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explained {
    pub step: String,
    pub state: State,
    /// What changed, one thing each, in words.
    pub changes: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Nothing to do.
    Cached,
    /// The next build runs it.
    WillRun,
    /// The last build ran it.
    Ran,
}

/// The answer of `pipeline explain`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    pub schema: u32,
    pub pipeline: String,
    /// `true`: about the next build. `false`: nothing would run, so it is about the last one.
    pub next: bool,
    pub steps: Vec<Explained>,
}

/// Compares the plan with the last build; when nothing would run, the last build with the one
/// before it.
pub fn explain(store: &Store, prepared: &Prepared, steps: &[Step], found: &[Option<StepRecord>]) -> Result<Explanation> {
    let pipeline = prepared.pipeline.name.as_str();
    let current = prepared.listings();
    let builds = record::builds(store, pipeline)?;
    let next = found.iter().any(Option::is_none);
    let mut explained = Vec::new();
    if next || builds.is_empty() {
        for (step, found) in steps.iter().zip(found) {
            let state = if found.is_some() { State::Cached } else { State::WillRun };
            let changes = if found.is_some() {
                vec![]
            } else {
                differences(store, &current, builds.last(), &step.name, &step.ingredients)?
            };
            explained.push(Explained { step: step.name.clone(), state, changes });
        }
    } else if let Some(last) = builds.last() {
        // Builds that only moved HEAD ran nothing: the last one that ran something is the one to explain.
        let at = builds.iter().rposition(|build| build.steps.iter().any(|step| step.ran)).unwrap_or(builds.len() - 1);
        let (told, before) = (builds.get(at).unwrap_or(last), at.checked_sub(1).and_then(|at| builds.get(at)));
        for step in &told.steps {
            let state = if step.ran { State::Ran } else { State::Cached };
            let changes = if step.ran { differences(store, &current, before, &step.step, &step.ingredients)? } else { vec![] };
            explained.push(Explained { step: step.step.clone(), state, changes });
        }
    }
    Ok(Explanation { schema: 1, pipeline: pipeline.into(), next, steps: explained })
}

/// Why `step` runs, in one line.
pub fn because(store: &Store, prepared: &Prepared, step: &Step) -> Result<String> {
    let builds = record::builds(store, prepared.pipeline.name.as_str())?;
    let changes = differences(store, &prepared.listings(), builds.last(), &step.name, &step.ingredients)?;
    let more = changes.len().saturating_sub(NAMED);
    let named = changes.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    Ok(if more > 0 { format!("{named} and {more} more") } else { named })
}

/// What is different from the step of that name in an earlier build.
fn differences(
    store: &Store,
    current: &[(Digest, &Listing)],
    before: Option<&BuildRecord>,
    name: &str,
    now: &[Ingredient],
) -> Result<Vec<String>> {
    let Some(before) = before else { return Ok(vec!["it was never built".into()]) };
    let Some(before): Option<&BuiltStep> = before.steps.iter().find(|step| step.step == name) else {
        return Ok(vec!["the step is new".into()]);
    };
    let old: BTreeMap<&str, &Ingredient> =
        before.ingredients.iter().map(|ingredient| (ingredient.name.as_str(), ingredient)).collect();
    let new: BTreeMap<&str, &Ingredient> = now.iter().map(|ingredient| (ingredient.name.as_str(), ingredient)).collect();
    let mut told = Vec::new();
    let names: std::collections::BTreeSet<&str> = old.keys().chain(new.keys()).copied().collect();
    for name in names {
        match (old.get(name), new.get(name)) {
            (Some(old), Some(new)) if old.value == new.value => {}
            (Some(old), Some(new)) if new.listing => told.extend(files(store, current, name, old, new)),
            (Some(old), Some(new)) => told.push(changed(name, &old.value, &new.value)),
            (None, Some(_)) => told.push(format!("{} is new", quoted(name))),
            (Some(_), None) => told.push(format!("{} is gone", quoted(name))),
            (None, None) => {}
        }
    }
    // What changed in the step itself comes before what changed below it.
    told.sort_by_key(|change| change.starts_with("step ") || change.starts_with("date"));
    Ok(if told.is_empty() { vec!["its result is no longer in the store".into()] } else { told })
}

fn changed(name: &str, old: &str, new: &str) -> String {
    if let Some(step) = name.strip_prefix("step ") {
        return format!("step `{step}` below it changed");
    }
    if name.starts_with("package ") {
        let version = |value: &str| value.split(' ').next().unwrap_or_default().to_string();
        let (old, new) = (version(old), version(new));
        return if old == new {
            format!("{} has other bytes", quoted(name))
        } else {
            format!("{} {old} → {new}", quoted(name))
        };
    }
    if name.starts_with("variable ")
        || name.starts_with("builder variable ")
        || name.starts_with("s2i variable ")
        || name == "network"
        || name == "compression"
        || name == "limits"
        || name == "suite"
    {
        let shown = |value: &str| {
            value.split_once(':').filter(|_| name.contains("variable")).map_or(value, |(_, value)| value).to_string()
        };
        return format!("{} changed from `{}` to `{}`", quoted(name), shown(old), shown(new));
    }
    if name == "date" {
        let date = |value: &str| {
            value.parse().ok().and_then(|seconds| crate::artifact::image::timestamp(seconds).ok()).unwrap_or_default()
        };
        return format!("date changed from {} to {}", date(old), date(new));
    }
    format!("{} changed", quoted(name))
}

/// ``package `python3` ``: the kind in words, the name in backticks.
fn quoted(name: &str) -> String {
    match name.rsplit_once(' ') {
        Some((kind, name)) if KINDS.contains(&kind) => {
            format!("{kind} `{name}`")
        }
        _ => name.to_string(),
    }
}

fn files(store: &Store, current: &[(Digest, &Listing)], name: &str, old: &Ingredient, new: &Ingredient) -> Vec<String> {
    let load = |ingredient: &Ingredient| -> Option<Listing> {
        let digest: Digest = ingredient.value.parse().ok()?;
        if let Some((_, listing)) = current.iter().find(|(known, _)| *known == digest) {
            return Some((*listing).clone());
        }
        Listing::decode(&fs_err::read(store.cache("listings").join(digest.hex())).ok()?).ok()
    };
    match (load(old), load(new)) {
        (Some(old), Some(new)) => changes(&old, &new).into_iter().map(|change| change.to_string()).collect(),
        _ => vec![format!("{name} changed")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::store::Store;

    fn ingredient(name: &str, value: &str) -> Ingredient {
        Ingredient { name: name.into(), value: value.into(), listing: false }
    }

    #[test]
    fn differences_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let old = vec![
            ingredient("variable MODE", "1:a"),
            ingredient("package python3", "3.13.1 aa"),
            ingredient("builder script assemble", "x"),
            ingredient("step base", "1"),
            ingredient("variable OLD", "0:"),
        ];
        let step =
            BuiltStep { step: "application".into(), key: Digest::of(b""), ingredients: old.clone(), ran: true, seconds: 0.0 };
        let before = BuildRecord {
            version: 1,
            pipeline: "p".into(),
            number: 1,
            digest: Digest::of(b""),
            time: 0,
            head: None,
            changed: 0,
            steps: vec![step],
        };
        let new = vec![
            ingredient("variable MODE", "2:bc"),
            ingredient("package python3", "3.13.2 bb"),
            ingredient("builder script assemble", "y"),
            ingredient("step base", "2"),
            ingredient("variable NEW", "0:"),
        ];
        let told = differences(&store, &[], Some(&before), "application", &new).unwrap();
        assert_eq!(
            told,
            [
                "builder script `assemble` changed",
                "package `python3` 3.13.1 → 3.13.2",
                "variable `MODE` changed from `a` to `bc`",
                "variable `NEW` is new",
                "variable `OLD` is gone",
                "step `base` below it changed",
            ]
        );
        assert_eq!(
            differences(&store, &[], Some(&before), "application", &old).unwrap(),
            ["its result is no longer in the store"]
        );
        assert_eq!(differences(&store, &[], Some(&before), "other", &old).unwrap(), ["the step is new"]);
        assert_eq!(differences(&store, &[], None, "application", &old).unwrap(), ["it was never built"]);
    }
}
