//! What the store remembers: the result of each step by its key, and the last builds of each pipeline.
//!
//! A step record is written after its layer is in the store, so that a record always leads to a
//! blob. A blob that changed since (by its stat data) is read again and, when it is corrupt,
//! counts as not there.

use std::path::PathBuf;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::plan::Ingredient;
use crate::artifact::image::{Layer, RunConfig};
use crate::artifact::store::{Stamp, Store, write_cache};
use crate::oci::digest::Digest;

/// Format of both kinds of record: others are not read.
const VERSION: u32 = 1;
/// Builds of one pipeline that are remembered, for `explain` and as roots of `prune`.
pub const KEPT_BUILDS: usize = 10;

/// The result of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepRecord {
    pub version: u32,
    pub step: String,
    pub key: Digest,
    pub ingredients: Vec<Ingredient>,
    /// Bottom first; more than one only for an imported image.
    pub layers: Vec<Layer>,
    /// What an imported image says about how it runs.
    pub config: Option<RunConfig>,
    /// Device nodes and sockets that did not go into the layer.
    pub dropped: Vec<String>,
    pub seconds: f64,
    /// How much of `seconds` was the script's own.
    #[serde(default)]
    pub script_seconds: f64,
    pub log: Option<PathBuf>,
    /// Stat data of each layer's blob when it was last known to be good.
    stamps: Vec<Stamp>,
}

/// What [`find`] says.
#[derive(Debug)]
pub enum Found {
    Record(Box<StepRecord>),
    Nothing,
    /// The blob with this digest is not what it was.
    Corrupt(Digest),
}

impl StepRecord {
    pub fn new(step: &str, key: Digest, ingredients: Vec<Ingredient>, layers: Vec<Layer>) -> Self {
        Self {
            version: VERSION,
            step: step.into(),
            key,
            ingredients,
            layers,
            config: None,
            dropped: Vec::new(),
            seconds: 0.0,
            script_seconds: 0.0,
            log: None,
            stamps: Vec::new(),
        }
    }

    pub fn save(&mut self, store: &Store) -> Result<()> {
        self.stamps = self.layers.iter().filter_map(|layer| store.stamp(&layer.descriptor.digest)).collect();
        write_cache(&path(store, &self.key), &serde_json::to_vec(self)?)
    }

    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.descriptor.size).sum()
    }
}

fn path(store: &Store, key: &Digest) -> PathBuf {
    store.cache("steps").join(format!("{}.json", key.hex()))
}

/// The record of `key`, with its blobs known to be there and good.
pub fn find(store: &Store, key: &Digest) -> Result<Found> {
    let Ok(bytes) = fs_err::read(path(store, key)) else { return Ok(Found::Nothing) };
    let Ok(mut record) = serde_json::from_slice::<StepRecord>(&bytes) else { return Ok(Found::Nothing) };
    if record.version != VERSION {
        return Ok(Found::Nothing);
    }
    let now: Vec<Stamp> = record.layers.iter().filter_map(|layer| store.stamp(&layer.descriptor.digest)).collect();
    if now.len() != record.layers.len() {
        return Ok(Found::Nothing);
    }
    if now != record.stamps {
        for layer in &record.layers {
            if store.verify(&layer.descriptor.digest).is_err() {
                return Ok(Found::Corrupt(layer.descriptor.digest));
            }
        }
        record.save(store)?;
    }
    Ok(Found::Record(Box::new(record)))
}

/// Every step record, for `prune`.
pub fn all(store: &Store) -> Result<Vec<StepRecord>> {
    let mut records = Vec::new();
    for entry in fs_err::read_dir(store.cache("steps"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json")
            && let Ok(record) = serde_json::from_slice(&fs_err::read(&path)?)
        {
            records.push(record);
        }
    }
    Ok(records)
}

/// One build of a pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BuildRecord {
    pub version: u32,
    pub pipeline: String,
    /// Counts up per pipeline.
    pub number: u64,
    pub digest: Digest,
    /// Seconds since 1970.
    pub time: i64,
    /// HEAD of the source's repository.
    pub head: Option<String>,
    /// Files of the source that differ from HEAD.
    pub changed: usize,
    pub steps: Vec<BuiltStep>,
}

/// A step as one build saw it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BuiltStep {
    pub step: String,
    pub key: Digest,
    pub ingredients: Vec<Ingredient>,
    pub ran: bool,
    pub seconds: f64,
}

/// The remembered builds of a pipeline, oldest first.
pub fn builds(store: &Store, pipeline: &str) -> Result<Vec<BuildRecord>> {
    let path = store.state("builds").join(format!("{pipeline}.json"));
    match fs_err::read(&path) {
        Ok(bytes) => {
            let builds: Vec<BuildRecord> = serde_json::from_slice(&bytes).unwrap_or_default();
            Ok(builds.into_iter().filter(|build| build.version == VERSION).collect())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// Remembers a build unless it is the last one again.
pub fn remember(store: &Store, mut build: BuildRecord) -> Result<()> {
    let mut builds = builds(store, &build.pipeline)?;
    if let Some(last) = builds.last()
        && last.digest == build.digest
        && last.head == build.head
        && last.changed == build.changed
        && last.steps.iter().map(|step| step.key).eq(build.steps.iter().map(|step| step.key))
    {
        return Ok(());
    }
    build.version = VERSION;
    build.number = builds.last().map_or(1, |last| last.number + 1);
    let path = store.state("builds").join(format!("{}.json", build.pipeline));
    builds.push(build);
    let excess = builds.len().saturating_sub(KEPT_BUILDS);
    builds.drain(..excess);
    write_cache(&path, &serde_json::to_vec(&builds)?)
}
