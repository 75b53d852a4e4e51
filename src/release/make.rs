//! Makes a release of what was built: the index, bills of materials, provenance, signatures.
//!
//! In: the image, host and disk that `build` and `bake` left in the store. Out: `NAME:latest.release` and `NAME:VERSION.release`, and beside the
//! index and each artifact what refers to them. Nothing of it changes an artifact, and doing it again changes nothing.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use crate::artifact::keys::PrivateKey;
use crate::artifact::provenance::{self, Builder, Facts, Material, Source};
use crate::artifact::release::{self, Entry, Kind, Recipe, Release};
use crate::artifact::store::Store;
use crate::artifact::{image, sbom, sign};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// What a release is made of and what is said about it.
#[expect(missing_debug_implementations, reason = "keys have none")]
pub struct Wish<'a> {
    /// The pipeline's name.
    pub name: &'a str,
    /// Readable version.
    pub version: &'a str,
    /// Where the source's repository is; of the image, where that says it.
    pub source: Option<Source>,
    pub builder: Builder,
    /// Packages and images of the lock.
    pub materials: Vec<Material>,
    /// Digest of the pipeline file and what was asked for.
    pub parameters: BTreeMap<String, Value>,
    /// The repository signatures name.
    pub reference: &'a str,
    pub key: Option<&'a PrivateKey>,
    pub threads: usize,
}

/// The answer of `build --release`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Made {
    /// `NAME:VERSION.release`.
    pub name: String,
    pub release: Release,
    pub signed: bool,
    /// Packages in all artifacts together.
    pub packages: usize,
}

/// Makes the release of `NAME:latest`.
///
/// # Errors
/// Nothing of that name was built; what refers to it cannot be written.
pub fn make(store: &Store, wish: &Wish<'_>) -> Result<Made> {
    let name = wish.name;
    release::check_version(wish.version)?;
    let mut entries = Vec::new();
    for (kind, tag) in [
        (Kind::Image, format!("{name}:latest")),
        (Kind::Host, format!("{name}:latest.host")),
        (Kind::Disk, format!("{name}:latest.disk")),
    ] {
        if let Some(found) = store.tagged(&tag)? {
            entries.push(Entry { digest: found.digest, size: found.size, kind, name: name.to_owned() });
        }
    }
    if entries.is_empty() {
        return Err(Problem::usage(format!("nothing of `{name}` was built"))
            .hint(format!("`pipeline build {name} --release` builds it first"))
            .into());
    }
    let revision = wish.source.as_ref().and_then(|source| source.commit.clone());
    let recipe = Recipe { name: name.to_owned(), version: wish.version.to_owned(), revision, entries };
    let descriptor = release::write(store, &recipe)?;
    let made = release::read(store, &descriptor.digest)?;
    let mut listed = sbom::Inventory::default();
    for entry in &made.entries {
        let shown = entry_name(entry);
        listed.add(
            sbom::attach(store, &entry.descriptor(), &shown, &wish.builder.version, wish.threads)
                .with_context(|| format!("cannot list the packages of `{shown}`"))?,
        );
    }
    let subjects = [(format!("{name}.release"), made.digest)];
    let entries = made.entries.iter().map(|entry| (entry_name(entry), entry.digest));
    let facts = Facts {
        subjects: subjects.into_iter().chain(entries).collect(),
        source: wish.source.clone(),
        builder: wish.builder.clone(),
        materials: wish.materials.clone(),
        parameters: wish.parameters.clone(),
        internal: BTreeMap::new(),
        started: None,
        finished: None,
        invocation: None,
    };
    provenance::attach(store, &made.descriptor(), &facts, wish.key)?;
    if let Some(key) = wish.key {
        sign::sign_release(store, &made.digest, wish.reference, key)?;
    }
    // Last: whoever finds the name finds everything that refers to it.
    for tag in [wish.version, "latest"] {
        store.tag(&release::tag(name, tag), &made.descriptor())?;
    }
    let packages = listed.packages.len();
    Ok(Made { name: release::tag(name, wish.version), signed: wish.key.is_some(), packages, release: made })
}

fn entry_name(entry: &Entry) -> String {
    match entry.kind {
        Kind::Image => entry.name.clone(),
        kind => format!("{}.{kind}", entry.name),
    }
}

/// What the image in the store says of its source: the annotations that the build wrote.
pub fn source_of(store: &Store, digest: &Digest, dirty: bool) -> Result<Option<Source>> {
    let annotations = image::manifest(store, digest)?.annotations;
    let get = |key: &str| annotations.get(&format!("org.opencontainers.image.{key}")).cloned();
    let commit = get("revision");
    let repository = get("source");
    if commit.is_none() && repository.is_none() {
        return Ok(None);
    }
    Ok(Some(Source { repository: repository.unwrap_or_default(), commit, dirty, path: String::new() }))
}

/// Base image that the image in the store names.
pub fn base_of(store: &Store, digest: &Digest) -> Result<Option<Material>> {
    let annotations = image::manifest(store, digest)?.annotations;
    let name = annotations.get("org.opencontainers.image.base.name");
    let digest = annotations.get("org.opencontainers.image.base.digest").and_then(|text| text.parse().ok());
    Ok(name.zip(digest).map(|(name, digest)| Material { name: "base".into(), uri: format!("pkg:docker/{name}"), digest }))
}

/// What was asked for, as the provenance has it.
pub fn parameters(name: &str, file: &Digest, version: &str) -> BTreeMap<String, Value> {
    BTreeMap::from([
        ("pipeline".into(), json!(name)),
        ("file".into(), json!({"digest": file})),
        ("version".into(), json!(version)),
    ])
}
