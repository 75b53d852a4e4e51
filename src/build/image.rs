//! What the finished image says about itself: configuration, labels, annotations.
//!
//! Pure. Everything here is part of the image's digest, so nothing of the moment or the machine
//! is in it: dates are the commit's, the revision is the last commit that touched the source.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::{Value, json};

use super::Prepared;
use super::plan::{Action, Part, Step};
use super::record::StepRecord;
use super::steps::PATH;
pub use crate::artifact::image::HEALTH_LABEL;
use crate::artifact::image::{Layer, Recipe, RunConfig, timestamp};
use crate::config::types::{HealthCheck, Source};

/// Label and annotation that tell a host image from an application's: `host`.
pub const KIND: &str = "io.pipeline.kind";
/// Characters of a commit message in a label, as source-to-image cuts it.
const MESSAGE_LENGTH: usize = 80;

/// The image made of the layers that ship.
pub fn recipe(prepared: &Prepared, steps: &[Step], records: &[StepRecord]) -> Result<Recipe> {
    let base = records.first().and_then(|record| record.config.clone()).unwrap_or_default();
    let (layers, created) = layers(steps, records, Part::Image);
    Ok(Recipe { config: config(prepared, &base)?, layers, annotations: annotations(prepared, created)?, created })
}

/// The host image: a tree that boots, in the same form as an application's.
pub fn host_recipe(prepared: &Prepared, steps: &[Step], records: &[StepRecord]) -> Result<Recipe> {
    let (layers, _) = layers(steps, records, Part::Host);
    let name = prepared.pipeline.name.to_string();
    // What dates the tree is the step of the host, not the apps with their fixed date.
    let created = steps.iter().find(|step| step.action == Action::Host).map_or(super::plan::FIXED_EPOCH, |step| step.epoch);
    let config = RunConfig {
        env: Some(vec![format!("PATH={PATH}")]),
        cmd: Some(vec!["/sbin/init".into()]),
        labels: Some(BTreeMap::from([(KIND.into(), "host".into())])),
        ..RunConfig::default()
    };
    let annotations = BTreeMap::from([
        ("org.opencontainers.image.created".to_string(), timestamp(created)?),
        ("org.opencontainers.image.title".to_string(), name),
        (KIND.to_string(), "host".to_string()),
    ]);
    Ok(Recipe { config, layers, annotations, created })
}

/// The layers that ship in `part`, and the date of its last step.
fn layers(steps: &[Step], records: &[StepRecord], part: Part) -> (Vec<Layer>, i64) {
    let own: Vec<_> = steps.iter().zip(records).filter(|(step, _)| part.stands_on(step.part)).collect();
    let created = own.last().map_or(super::plan::FIXED_EPOCH, |(step, _)| step.epoch);
    (own.into_iter().filter(|(step, _)| step.ships).flat_map(|(_, record)| record.layers.clone()).collect(), created)
}

fn config(prepared: &Prepared, base: &RunConfig) -> Result<RunConfig> {
    let image = &prepared.pipeline.image;
    let builder = prepared.builder.as_ref().map(|builder| &builder.meta);
    let mut env: Vec<(String, String)> = base.variables();
    if !env.iter().any(|(key, _)| key == "PATH") {
        env.insert(0, ("PATH".into(), PATH.into()));
    }
    let more = builder.map(|meta| meta.env.clone()).unwrap_or_default();
    for (key, value) in more.into_iter().chain(prepared.s2i_environment.clone()).chain(image.env.clone()) {
        match env.iter_mut().find(|(name, _)| *name == key) {
            Some(pair) => pair.1 = value,
            None => env.push((key, value)),
        }
    }
    let run_script = match (&builder, prepared.image_builder) {
        (Some(meta), _) => Some(format!("{}/run", meta.scripts)),
        (None, true) => Some(format!("{}/run", super::steps::S2iImage::of(base)?.scripts)),
        (None, false) => None,
    };
    let (entrypoint, cmd) = if image.command.is_empty() {
        // S2I keeps the builder image's entrypoint and replaces its command.
        (base.entrypoint.clone(), run_script.map(|script| vec![script]).or_else(|| base.cmd.clone()))
    } else {
        (None, Some(image.command.clone()))
    };
    let port = image.port.or_else(|| builder.and_then(|meta| meta.port));
    let mut ports = base.exposed_ports.clone().unwrap_or_default();
    ports.extend(port.map(|port| (format!("{port}/tcp"), json!({}))));
    let mut volumes = base.volumes.clone().unwrap_or_default();
    volumes.extend(image.volumes.iter().map(|path| (path.clone(), json!({}))));
    let first = |options: [Option<String>; 3]| options.into_iter().flatten().find(|text| !text.is_empty()).unwrap_or_default();
    Ok(RunConfig {
        user: first([image.user.clone(), builder.map(|meta| meta.user.clone()), Some(base.user.clone())]),
        exposed_ports: some(ports),
        env: Some(env.into_iter().map(|(key, value)| format!("{key}={value}")).collect()),
        entrypoint,
        cmd,
        volumes: some(volumes),
        working_dir: first([image.workdir.clone(), builder.map(|meta| meta.workdir.clone()), Some(base.working_dir.clone())]),
        labels: some(labels(prepared, base)?),
        stop_signal: base.stop_signal.clone(),
        healthcheck: healthcheck(prepared, base),
    })
}

fn some<V>(map: BTreeMap<String, V>) -> Option<BTreeMap<String, V>> {
    (!map.is_empty()).then_some(map)
}

/// Docker's own health check can only run a command of the image.
fn healthcheck(prepared: &Prepared, base: &RunConfig) -> Option<Value> {
    match prepared.pipeline.image.health.as_ref().map(|health| &health.check) {
        Some(HealthCheck::Command(command)) => {
            let mut test = vec!["CMD".to_string()];
            test.extend(command.clone());
            Some(json!({"Test": test}))
        }
        Some(_) => None,
        None => base.healthcheck.clone(),
    }
}

fn labels(prepared: &Prepared, base: &RunConfig) -> Result<BTreeMap<String, String>> {
    let mut labels = base.labels.clone().unwrap_or_default();
    let mut set = |key: &str, value: String| labels.insert(key.into(), value);
    set("io.k8s.display-name", prepared.pipeline.name.to_string());
    if let Some(commit) = last_commit(prepared) {
        set("io.openshift.s2i.build.commit.id", commit.id.clone());
        set("io.openshift.s2i.build.commit.author", commit.author.clone());
        set("io.openshift.s2i.build.commit.date", timestamp(commit.time)?);
        set("io.openshift.s2i.build.commit.message", commit.message.chars().take(MESSAGE_LENGTH).collect());
    }
    if let Source::Git { url, dir, .. } = &prepared.pipeline.source {
        set("io.openshift.s2i.build.source-location", super::source::git::without_credentials(url));
        if let Some(dir) = dir {
            set("io.openshift.s2i.build.source-context-dir", dir.display().to_string());
        }
    }
    if let Some(image) = &prepared.base_image
        && prepared.image_builder
    {
        set("io.openshift.s2i.build.image", image.name.clone());
    }
    if let Some(health) = &prepared.pipeline.image.health {
        set(HEALTH_LABEL, serde_json::to_string(health)?);
    }
    labels.extend(prepared.pipeline.image.labels.clone());
    Ok(labels)
}

/// The last commit that touched the source.
fn last_commit(prepared: &Prepared) -> Option<&super::source::git::Commit> {
    prepared.git.as_ref()?.last_commit.as_ref()
}

/// `org.opencontainers.image.*` (image specification, "Annotations").
fn annotations(prepared: &Prepared, created: i64) -> Result<BTreeMap<String, String>> {
    let mut annotations = BTreeMap::from([
        ("org.opencontainers.image.created".to_string(), timestamp(created)?),
        ("org.opencontainers.image.title".to_string(), prepared.pipeline.name.to_string()),
    ]);
    if let Some(commit) = last_commit(prepared) {
        annotations.insert("org.opencontainers.image.revision".into(), commit.id.clone());
    }
    if let Source::Git { url, .. } = &prepared.pipeline.source {
        annotations.insert("org.opencontainers.image.source".into(), super::source::git::without_credentials(url));
    }
    if let Some(image) = &prepared.base_image {
        annotations.insert("org.opencontainers.image.base.name".into(), image.name.clone());
        annotations.insert("org.opencontainers.image.base.digest".into(), image.pinned.to_string());
    }
    Ok(annotations)
}
