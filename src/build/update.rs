//! Moves `pipeline.lock` to today's packages and images.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::debian::apt::Apt;
use super::debian::repository;
use super::lock::{self, Lock, PackageChange, Set};
use super::{Build, Prepared, base, prepare_unresolved};
use crate::config::types::Pipeline;
use crate::oci::digest::Digest;

/// The answer of `update`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Updated {
    pub schema: u32,
    /// Whether the lock was written.
    pub written: bool,
    pub sets: Vec<UpdatedSet>,
    pub images: Vec<UpdatedImage>,
}

/// A package set that was resolved anew.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UpdatedSet {
    /// The step it is for.
    pub step: String,
    /// When the lock had it resolved; `None`: it was not in there.
    pub before: Option<String>,
    pub changes: Vec<PackageChange>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UpdatedImage {
    pub reference: String,
    pub old: Option<Digest>,
    pub new: Digest,
}

impl Updated {
    pub fn is_current(&self) -> bool {
        self.sets.iter().all(|set| set.changes.is_empty()) && self.images.iter().all(|image| image.old == Some(image.new))
    }
}

/// Resolves everything `pipeline` stands on anew. With `check` nothing is written and no package
/// is downloaded.
pub fn update(build: &Build<'_>, pipeline: &Pipeline, check: bool) -> Result<Updated> {
    let before = lock::load(&pipeline.dir)?.unwrap_or_default();
    let mut lock = before.clone();
    let image = base::image_of(build, pipeline, &mut lock, false, true)?;
    let images = image.iter().filter(|image| lock.images.contains_key(&image.name)).map(|image| UpdatedImage {
        reference: image.name.clone(),
        old: before.images.get(&image.name).copied(),
        new: image.pinned,
    });
    let images: Vec<UpdatedImage> = images.collect();
    let mut prepared: Prepared = prepare_unresolved(pipeline, lock.clone(), image)?;
    let installed = super::read_requests(build, &mut prepared)?;
    let mut sets = Vec::new();
    // Key of a set → the dpkg status of it and everything below it.
    let mut stands: BTreeMap<String, String> = BTreeMap::new();
    let mut apt: Option<Apt> = None;
    for wanted in prepared.requests.clone() {
        let key = wanted.request.key();
        let old = before.sets.get(&key);
        let mut status = wanted.request.on.as_ref().and_then(|on| stands.get(on)).unwrap_or(&installed).clone();
        let (new, text) = resolve(build, pipeline, &wanted, &status, check, &mut apt)?;
        status.push_str(&text);
        stands.insert(key.clone(), status);
        let empty = Set { packages: Vec::new(), ..new.clone() };
        let changes = lock::diff(old.unwrap_or(&empty), &new);
        sets.push(UpdatedSet { step: wanted.step.into(), before: old.map(|set| set.resolved.clone()), changes: changes.clone() });
        // The same packages keep their date: an update that finds nothing new writes nothing.
        if !changes.is_empty() || old.is_none() {
            lock.sets.insert(key, new);
        }
    }
    let written = !check && lock != before;
    if written {
        lock::save(&pipeline.dir, &lock)?;
    }
    Ok(Updated { schema: 1, written, sets, images })
}

/// One set, and the dpkg status text of its packages.
fn resolve(
    build: &Build<'_>,
    pipeline: &Pipeline,
    wanted: &base::SetRequest,
    status: &str,
    check: bool,
    apt: &mut Option<Apt>,
) -> Result<(Set, String)> {
    let debs = build.debs();
    let now = crate::artifact::image::timestamp(build.host.now)?;
    if apt.is_none() {
        fs_err::create_dir_all(&debs)?;
        *apt = Some(Apt::open(&base::archives(pipeline, &wanted.request.suite)?, &debs)?);
    }
    let apt = apt.as_mut().context("an apt root")?;
    if check {
        let resolution = apt.resolve(&wanted.request, status, &now)?;
        let text = resolution.status();
        return Ok((resolution.set, text));
    }
    let set = apt.lock(&wanted.request, status, &now, &debs)?;
    let text = repository::status(&[&set], &debs)?;
    Ok((set, text))
}

/// Which other pipelines of the folder share a set with this one.
pub fn shared_with(pipeline: &Pipeline, lock: &Lock, others: &[Pipeline]) -> Vec<String> {
    let base = |pipeline: &Pipeline| base::requests(pipeline, None, None).into_iter().map(|wanted| wanted.request.key()).next();
    let own = base(pipeline).filter(|key| lock.sets.contains_key(key));
    others
        .iter()
        .filter(|other| other.name != pipeline.name && own.is_some() && base(other) == own)
        .map(|other| other.name.to_string())
        .collect()
}
