//! What of the store nothing needs any more.
//!
//! Kept: everything reachable from tags and from the releases that the ledger needs, what is attached to it, the images of
//! each pipeline's last builds, the step records that lead to a kept layer or were part of a remembered build, and with them
//! trees, packages and listings. The tag `NAME:VERSION.release` of a pipeline in the ledger keeps its release only while an
//! environment needs it, it is the newest, or it holds what one of the last builds made; then the tag goes too, and so does
//! `sha256-HEX.KIND` with its subject. [`plan`] is pure of side effects; [`prune`] removes what it names, tags first, except
//! what somebody holds at that moment.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::record;
use super::{Build, lock};
use crate::artifact::store::{Hold, Lock, REF_NAME, Store};
use crate::artifact::{image, release, remote};
use crate::error::Problem;
use crate::fault;
use crate::oci::digest::Digest;

/// One thing that can go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unneeded {
    /// `blob`, `tree`, `step`, `package`, `source`, `disk`, `bake`.
    pub kind: &'static str,
    pub path: PathBuf,
    /// Bytes on disk, as far as they can be read.
    pub bytes: u64,
}

/// What the ledger needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needed {
    /// Pipelines whose releases it decides about.
    pub pipelines: BTreeSet<String>,
    /// Releases that an environment has, may go back to, or somebody approved.
    pub releases: BTreeSet<Digest>,
}

/// What can go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Tags of releases, and of what is attached.
    pub tags: BTreeSet<String>,
    pub unneeded: Vec<Unneeded>,
}

/// The answer of `artifact prune`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pruned {
    pub schema: u32,
    pub dry_run: bool,
    /// Tags that go, in order of name.
    pub tags: BTreeSet<String>,
    pub unneeded: Vec<Unneeded>,
    pub bytes: u64,
    /// Trees that a build or a program holds right now.
    pub in_use: Vec<PathBuf>,
}

/// The tags of a store and what they keep.
struct Tags {
    /// Those that go.
    gone: BTreeSet<String>,
    /// Everything that what stays leads to.
    documents: BTreeSet<Digest>,
}

impl Tags {
    /// `built`: what the last builds made.
    fn of(store: &Store, built: &BTreeSet<Digest>, needed: &Needed) -> Result<Self> {
        let index = store.index()?;
        let tags: Vec<(&str, Digest)> = index
            .manifests
            .iter()
            .map(|descriptor| (descriptor.annotations.get(REF_NAME).map_or("", String::as_str), descriptor.digest))
            .collect();
        let newest = |name: &str| {
            let tag = release::tag(name, "latest");
            tags.iter().find(|(other, _)| *other == tag).map(|(_, digest)| *digest)
        };
        let stays = |tag: &str, digest: &Digest| {
            let Some((name, _)) = tag.strip_suffix(".release").and_then(|tag| tag.split_once(':')) else { return true };
            let holds_built = || remote::reach_what_is_there(store, digest).documents.iter().any(|it| built.contains(it));
            !needed.pipelines.contains(name) || needed.releases.contains(digest) || newest(name) == Some(*digest) || holds_built()
        };
        let mut gone = BTreeSet::new();
        let mut documents = BTreeSet::new();
        let mut keep = |digest: &Digest| documents.extend(remote::reach_what_is_there(store, digest).documents);
        built.iter().chain(&needed.releases).for_each(&mut keep);
        let mut attached = Vec::new();
        for (tag, digest) in &tags {
            match remote::subject_of(tag) {
                Some(subject) => attached.push((*tag, *digest, subject)),
                None if stays(tag, digest) => keep(digest),
                None => drop(gone.insert((*tag).to_owned())),
            }
        }
        // Something may be attached to what is attached.
        loop {
            let (kept, left): (Vec<_>, Vec<_>) = attached.into_iter().partition(|(_, _, subject)| documents.contains(subject));
            for (_, digest, _) in &kept {
                documents.extend(remote::reach_what_is_there(store, digest).documents);
            }
            attached = left;
            if kept.is_empty() {
                break;
            }
        }
        gone.extend(attached.into_iter().map(|(tag, ..)| tag.to_owned()));
        Ok(Self { gone, documents })
    }
}

/// What can go when the last `keep` builds of each pipeline and what is `needed` stay.
pub fn plan(store: &Store, keep: usize, locks: &[lock::Lock], needed: &Needed) -> Result<Plan> {
    let mut blobs: BTreeSet<Digest> = BTreeSet::new();
    let mut diff_ids: BTreeSet<Digest> = BTreeSet::new();
    let mut built: BTreeSet<Digest> = BTreeSet::new();
    let mut keys: BTreeSet<Digest> = BTreeSet::new();
    let mut listings: BTreeSet<String> = BTreeSet::new();
    for entry in fs_err::read_dir(store.state("builds"))? {
        let path = entry?.path();
        let Some(name) = path.file_stem().map(|name| name.to_string_lossy().into_owned()) else { continue };
        for build in record::builds(store, &name)?.iter().rev().take(keep.max(1)) {
            built.insert(build.digest);
            keys.extend(build.steps.iter().map(|step| step.key));
            listings.extend(
                build
                    .steps
                    .iter()
                    .flat_map(|step| &step.ingredients)
                    .filter(|i| i.listing)
                    .filter_map(|i| Some(i.value.parse::<Digest>().ok()?.hex())),
            );
        }
    }
    let tags = Tags::of(store, &built, needed)?;
    for root in &tags.documents {
        // A root that was never pulled whole keeps what is there of it.
        blobs.insert(*root);
        if let Ok(manifest) = image::manifest(store, root) {
            blobs.insert(manifest.config.digest);
            blobs.extend(manifest.layers.iter().map(|layer| layer.digest));
        }
        if let Ok((_, config)) = image::read(store, root) {
            diff_ids.extend(config.rootfs.diff_ids);
        }
    }
    let mut kept_records = BTreeSet::new();
    for record in record::all(store)? {
        let reachable = !record.layers.is_empty() && record.layers.iter().all(|layer| blobs.contains(&layer.descriptor.digest));
        if keys.contains(&record.key) || reachable {
            blobs.extend(record.layers.iter().map(|layer| layer.descriptor.digest));
            diff_ids.extend(record.layers.iter().map(|layer| layer.diff_id));
            kept_records.insert(record.key.hex());
        }
    }
    let packages: BTreeSet<String> = locks
        .iter()
        .flat_map(|lock| lock.sets.values())
        .flat_map(|set| &set.packages)
        .map(|package| package.sha256.hex())
        .collect();
    let hexes = |digests: &BTreeSet<Digest>| -> BTreeSet<String> { digests.iter().map(Digest::hex).collect() };
    let (blobs, trees) = (hexes(&blobs), hexes(&diff_ids));
    let mut unneeded = Vec::new();
    collect(&mut unneeded, "blob", &store.layout().join("blobs/sha256"), &|name| blobs.contains(name))?;
    collect(&mut unneeded, "tree", &store.cache("trees"), &|name| {
        name.starts_with('.') || trees.contains(name.trim_end_matches(".lock"))
    })?;
    collect(&mut unneeded, "step", &store.cache("steps"), &|name| {
        name.starts_with('.') || kept_records.contains(name.split('.').next().unwrap_or(name))
    })?;
    collect(&mut unneeded, "source", &store.cache("listings"), &|name| name.starts_with("pulled-") || listings.contains(name))?;
    // A raw disk can be written again from its artifact.
    collect(&mut unneeded, "disk", &store.cache("disks"), &|name| {
        name.starts_with('.') || blobs.contains(name.split('.').next().unwrap_or(name))
    })?;
    collect(&mut unneeded, "bake", &store.cache("bakes"), &|name| {
        let bytes = fs_err::read(store.cache("bakes").join(name)).unwrap_or_default();
        let record: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
        let disk = record.as_ref().and_then(|record| record["disk"].as_str()?.parse::<Digest>().ok());
        name.starts_with('.') || disk.is_some_and(|disk| blobs.contains(&disk.hex()))
    })?;
    for (kind, folder) in [("list of packages", "inventories"), ("list of blobs", "whole")] {
        collect(&mut unneeded, kind, &store.cache(folder), &|name| {
            name.starts_with('.') || blobs.contains(name.split('.').next().unwrap_or(name))
        })?;
    }
    collect(&mut unneeded, "package", &store.cache("debs"), &|name| {
        !is_package(name) || packages.contains(name.split('.').next().unwrap_or(name))
    })?;
    Ok(Plan { tags: tags.gone, unneeded })
}

/// `HEX.deb` and what was read out of it; not apt's own folders.
fn is_package(name: &str) -> bool {
    name.split_once('.').is_some_and(|(hex, _)| hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn collect(unneeded: &mut Vec<Unneeded>, kind: &'static str, dir: &Path, is_kept: &dyn Fn(&str) -> bool) -> Result<()> {
    let mut rows = BTreeMap::new();
    if !dir.exists() {
        return Ok(());
    }
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !is_kept(&name) {
            rows.insert(
                name,
                Unneeded {
                    kind,
                    path: entry.path(),
                    // A sparse file takes less room than it is long.
                    bytes: entry
                        .metadata()
                        .map(|meta| if meta.is_file() { meta.len().min(meta.blocks() * 512) } else { 0 })
                        .unwrap_or(0),
                },
            );
        }
    }
    unneeded.extend(rows.into_values());
    Ok(())
}

/// Removes what nothing needs. With `dry_run` it is only told. `needed` is asked once nobody else is at work on the store, so
/// that a decision which is just being made counts.
///
/// # Errors
/// Another process has the store open; the ledger cannot be read: then nothing is removed.
pub fn prune(
    build: &Build<'_>,
    keep: usize,
    locks: &[lock::Lock],
    needed: &dyn Fn() -> Result<Needed>,
    dry_run: bool,
) -> Result<Pruned> {
    // A build that runs may be about to use what looks unneeded.
    let alone = if dry_run { None } else { build.store.alone()? };
    if alone.is_none() && !dry_run {
        return Err(Problem::transient("another pipeline is at work on this store")
            .hint("try again when it has ended; `--dry-run` works any time")
            .into());
    }
    let Plan { tags, mut unneeded } = plan(build.store, keep, locks, &needed()?)?;
    let trees = unneeded.iter().any(|item| item.kind == "tree" && item.path.is_dir());
    let session = if trees { Some(build.session(false)?) } else { None };
    for item in unneeded.iter_mut().filter(|item| item.kind == "tree" && item.path.is_dir()) {
        if let Some(session) = &session {
            item.bytes = session.call("size", &item.path)?;
        }
    }
    let bytes = unneeded.iter().map(|item| item.bytes).sum();
    let mut pruned = Pruned { schema: 1, dry_run, tags, bytes, unneeded, in_use: Vec::new() };
    if dry_run {
        return Ok(pruned);
    }
    // A tag never leads to what is gone.
    build.store.untag_all(&pruned.tags)?;
    let _index = build.store.lock_index()?;
    for item in pruned.unneeded.clone() {
        let is_lock = item.path.extension().is_some_and(|extension| extension == "lock");
        if item.kind == "tree" && !is_lock {
            let lock = item.path.with_extension("lock");
            let Some(_lease) = Lock::try_now(&lock, Hold::Exclusive)? else {
                pruned.in_use.push(item.path.clone());
                pruned.bytes -= item.bytes;
                continue;
            };
            if let Some(session) = &session {
                session.call::<_, ()>("remove", &item.path)?;
            }
        } else if !is_lock || Lock::try_now(&item.path, Hold::Exclusive)?.is_some() {
            remove(&item.path)?;
        }
    }
    drop(alone);
    Ok(pruned)
}

fn remove(path: &Path) -> Result<()> {
    fault::point("remove what nothing needs");
    match fs_err::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
