//! What separates two releases with their configurations: artifacts, commit, packages, size, values.
//!
//! The one place that compares: the gate `budget`, `pipeline diff` and the dry run of a decision ask here.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde::Serialize;

use super::decision::Configuration;
use super::promotion::Pair;
use crate::artifact::release::{self, Kind};
use crate::artifact::sbom;
use crate::artifact::store::Store;
use crate::oci::digest::Digest;

/// What it was and what it is; `None`: it is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Moved<T> {
    pub from: Option<T>,
    pub to: Option<T>,
}

impl<T: PartialEq> Moved<T> {
    pub fn stays(&self) -> bool {
        self.from == self.to
    }
}

/// An artifact of either release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Artifact {
    pub kind: Kind,
    pub name: String,
    #[serde(flatten)]
    pub digest: Moved<Digest>,
}

/// A package that is new, gone or of other versions. Several versions of one name are usual with npm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Package {
    pub kind: sbom::Kind,
    pub name: String,
    /// Versions, sorted; empty: it was not there.
    pub from: BTreeSet<String>,
    /// Versions, sorted; empty: it is gone.
    pub to: BTreeSet<String>,
}

/// A value of a configuration that is new, gone or another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Setting {
    pub name: String,
    #[serde(flatten)]
    pub value: Moved<String>,
}

/// What separates two pairs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    pub release: Moved<Digest>,
    /// All of both releases, those that stay too, by kind and name.
    pub artifacts: Vec<Artifact>,
    /// The commit of the source.
    pub commit: Moved<String>,
    /// By kind and name; `None`: not known, see `unknown`.
    pub packages: Option<Vec<Package>>,
    /// Bytes of blobs of the new release that the old one does not have; `None`: not known.
    pub bytes: Option<u64>,
    /// By name.
    pub values: Vec<Setting>,
    /// Names of secrets that are new, gone or have been given another value.
    pub secrets: Vec<String>,
    /// What could not be looked at, and why.
    pub unknown: Vec<String>,
}

/// What is different in `to`; `from`: `None` where there is nothing yet. What this store does not have is in
/// [`Change::unknown`].
pub fn between(store: &Store, from: Option<&Pair>, to: &Pair, threads: usize) -> Change {
    let (values, secrets) = configured(from.map(|from| &from.config), &to.config);
    let mut unknown: Vec<String> = Vec::new();
    let before = from.map(|from| &from.release);
    let one = before.and_then(|digest| known(release::read(store, digest), &mut unknown));
    let other = known(release::read(store, &to.release), &mut unknown);
    // Of what is not here any more the attached list tells at least something.
    let listed = |digest: &Digest| {
        let computed = sbom::computed_of_release(store, digest, threads);
        computed.or_else(|error| sbom::of_release(store, digest).ok().flatten().ok_or(error))
    };
    let packages = known(packages(&listed, before, &to.release), &mut unknown);
    let bytes = known(bytes(store, before, &to.release), &mut unknown);
    let mut artifacts: BTreeMap<(Kind, String), Moved<Digest>> = BTreeMap::new();
    let entries = |release: &Option<release::Release>| release.iter().flat_map(|it| it.entries.clone()).collect::<Vec<_>>();
    for entry in entries(&one) {
        artifacts.insert((entry.kind, entry.name), Moved { from: Some(entry.digest), to: None });
    }
    for entry in entries(&other) {
        artifacts.entry((entry.kind, entry.name)).or_insert(Moved { from: None, to: None }).to = Some(entry.digest);
    }
    Change {
        release: Moved { from: before.copied(), to: Some(to.release) },
        artifacts: artifacts.into_iter().map(|((kind, name), digest)| Artifact { kind, name, digest }).collect(),
        commit: Moved { from: one.and_then(|release| release.revision), to: other.and_then(|release| release.revision) },
        packages,
        bytes,
        values,
        secrets,
        unknown,
    }
}

/// What was found; why not, once, is noted.
fn known<T>(found: Result<T>, unknown: &mut Vec<String>) -> Option<T> {
    let why = match found {
        Ok(found) => return Some(found),
        Err(error) => format!("{error:#}"),
    };
    if !unknown.contains(&why) {
        unknown.push(why);
    }
    None
}

/// The packages that are new, gone or of other versions in `to`, by kind and name; `list` gives those of a release.
///
/// # Errors
/// As `list`.
pub fn packages(list: &dyn Fn(&Digest) -> Result<sbom::Inventory>, from: Option<&Digest>, to: &Digest) -> Result<Vec<Package>> {
    if from == Some(to) {
        return Ok(Vec::new());
    }
    let listed = |digest: &Digest| -> Result<BTreeMap<(sbom::Kind, String), BTreeSet<String>>> {
        let mut versions: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
        for package in list(digest)?.packages {
            versions.entry((package.kind, package.name)).or_default().insert(package.version);
        }
        Ok(versions)
    };
    let (mut before, after) = (from.map(listed).transpose()?.unwrap_or_default(), listed(to)?);
    let mut changed: Vec<Package> = Vec::new();
    for ((kind, name), to) in after {
        let key = (kind, name);
        let from = before.remove(&key).unwrap_or_default();
        if from != to {
            changed.push(Package { kind, name: key.1, from, to });
        }
    }
    changed.extend(before.into_iter().map(|((kind, name), from)| Package { kind, name, from, to: BTreeSet::new() }));
    changed.sort_by(|a, b| (a.kind, &a.name).cmp(&(b.kind, &b.name)));
    Ok(changed)
}

/// Bytes of blobs of `to` that `from` does not have.
///
/// # Errors
/// A release is not in the store.
pub fn bytes(store: &Store, from: Option<&Digest>, to: &Digest) -> Result<u64> {
    let there = from.map(|from| release::blobs(store, from)).transpose()?.unwrap_or_default();
    let there: BTreeSet<Digest> = there.into_iter().map(|blob| blob.digest).collect();
    let new = release::blobs(store, to)?;
    Ok(new.iter().filter(|blob| !there.contains(&blob.digest)).map(|blob| blob.size).sum())
}

/// The values that differ, by name, and the names of the secrets that do.
pub fn configured(from: Option<&Configuration>, to: &Configuration) -> (Vec<Setting>, Vec<String>) {
    let nothing = Configuration::default();
    let from = from.unwrap_or(&nothing);
    fn names<'c, V: PartialEq>(from: &'c BTreeMap<String, V>, to: &'c BTreeMap<String, V>) -> BTreeSet<&'c String> {
        from.keys().chain(to.keys()).filter(|name| from.get(*name) != to.get(*name)).collect()
    }
    let value = |name: &String| Moved { from: from.values.get(name).cloned(), to: to.values.get(name).cloned() };
    let values = names(&from.values, &to.values).into_iter();
    let values = values.map(|name| Setting { name: name.clone(), value: value(name) }).collect();
    (values, names(&from.secrets, &to.secrets).into_iter().cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::types::SecretRef;

    #[test]
    fn configurations() {
        let configuration = |values: &[(&str, &str)], secrets: &[(&str, &str)]| Configuration {
            values: values.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
            secrets: secrets.iter().map(|(name, id)| ((*name).into(), SecretRef::Stored((*id).into()))).collect(),
        };
        let from = configuration(&[("A", "1"), ("B", "1"), ("D", "1")], &[("S", "x"), ("T", "x")]);
        let to = configuration(&[("A", "1"), ("B", "2"), ("C", "1")], &[("S", "y"), ("T", "x")]);
        let setting = |name: &str, from: Option<&str>, to: Option<&str>| Setting {
            name: name.into(),
            value: Moved { from: from.map(str::to_owned), to: to.map(str::to_owned) },
        };
        let values = vec![setting("B", Some("1"), Some("2")), setting("C", None, Some("1")), setting("D", Some("1"), None)];
        assert_eq!(configured(Some(&from), &to), (values, vec!["S".to_owned()]));
        assert_eq!(configured(None, &configuration(&[("A", "1")], &[])), (vec![setting("A", None, Some("1"))], vec![]));
    }
}
