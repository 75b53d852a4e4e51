//! An OCI image: its configuration and manifest, made and read.
//!
//! Made with sorted keys and nothing of the moment in them, so that the same layers and settings
//! give the same digest (OCI image specification, "Image Configuration", "Image Manifest").

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::store::{Descriptor, MANIFEST_TYPE, Store};
use crate::error::Problem;
use crate::oci::compress::Compression;
use crate::oci::digest::Digest;
use crate::oci::flatten::Blob;

/// Label with the health check, for `run` and targets: `{"check": {"http": "/healthz"}, "deadline": …}`.
pub const HEALTH_LABEL: &str = "io.pipeline.health";
/// `PATH` of a program whose image names none.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub descriptor: Descriptor,
    pub diff_id: Digest,
    /// Shown in the image's history.
    pub created_by: String,
}

/// What an image says about how it runs (`config` of the configuration).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user: String,
    #[serde(default, skip_serializing_if = "nothing")]
    pub exposed_ports: Option<BTreeMap<String, Value>>,
    #[serde(default, skip_serializing_if = "nothing")]
    pub env: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "nothing")]
    pub entrypoint: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "nothing")]
    pub cmd: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "nothing")]
    pub volumes: Option<BTreeMap<String, Value>>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    #[serde(default, skip_serializing_if = "nothing")]
    pub labels: Option<BTreeMap<String, String>>,
    #[serde(default, skip_serializing_if = "nothing")]
    pub stop_signal: Option<String>,
    /// Docker's extension to the OCI configuration, which Docker reads back.
    #[serde(default, skip_serializing_if = "nothing")]
    pub healthcheck: Option<Value>,
}

#[expect(clippy::ref_option, reason = "serde hands the field over by reference")]
fn nothing<T>(value: &Option<T>) -> bool {
    value.is_none()
}

impl RunConfig {
    /// The variables as pairs.
    pub fn variables(&self) -> Vec<(String, String)> {
        self.env
            .iter()
            .flatten()
            .map(|pair| pair.split_once('=').map_or((pair.clone(), String::new()), |(key, value)| (key.into(), value.into())))
            .collect()
    }

    /// What is started: the image's command or `command` in its place, with `more` variables.
    ///
    /// # Errors
    /// Neither the image nor the caller says a command.
    pub fn program(&self, command: &[String], more: &[(String, String)]) -> Result<Program> {
        let mut argv = self.entrypoint.clone().unwrap_or_default();
        argv.extend(if command.is_empty() { self.cmd.clone().unwrap_or_default() } else { command.to_vec() });
        if argv.is_empty() {
            return Err(Problem::failed("the image says no command").hint("give one after `--`, or set `image.command`").into());
        }
        let mut env = self.variables();
        if !env.iter().any(|(name, _)| name == "PATH") {
            env.push(("PATH".into(), PATH.into()));
        }
        for (name, value) in more {
            env.retain(|(known, _)| known != name);
            env.push((name.clone(), value.clone()));
        }
        let cwd = if self.working_dir.is_empty() { "/".into() } else { self.working_dir.clone() };
        Ok(Program { argv, env, cwd, user: self.user.clone() })
    }

    /// Absolute paths of the folders that are no part of the image's tree.
    pub fn volume_paths(&self) -> impl Iterator<Item = &str> {
        self.volumes.iter().flat_map(|volumes| volumes.keys()).map(String::as_str)
    }
}

/// What is started of an image, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Never empty.
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Absolute.
    pub cwd: String,
    /// As in the image's configuration; empty: root.
    pub user: String,
}

/// An image configuration, as far as this program reads it.
#[derive(Debug, Clone, Deserialize)]
pub struct Config {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub config: RunConfig,
    pub rootfs: RootFs,
}

#[derive(Debug, Clone, Deserialize)]
pub struct RootFs {
    pub diff_ids: Vec<Digest>,
}

/// A manifest of an image or of another artifact, as far as this program reads it.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// What it is when it is no image.
    #[serde(default)]
    pub artifact_type: Option<String>,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// What [`write`] is given.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recipe {
    pub config: RunConfig,
    pub layers: Vec<Layer>,
    pub annotations: BTreeMap<String, String>,
    /// Seconds since 1970.
    pub created: i64,
}

/// The bytes of configuration and manifest.
pub fn encode(recipe: &Recipe) -> Result<(Vec<u8>, Vec<u8>)> {
    let created = timestamp(recipe.created)?;
    let history: Vec<Value> =
        recipe.layers.iter().map(|layer| json!({"created": created, "created_by": layer.created_by})).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": created,
        "config": recipe.config,
        "rootfs": {"type": "layers", "diff_ids": recipe.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>()},
        "history": history,
    });
    let config = serde_json::to_vec(&sorted(config))?;
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": Descriptor::new(CONFIG_TYPE, Digest::of(&config), config.len() as u64),
        "layers": recipe.layers.iter().map(|layer| &layer.descriptor).collect::<Vec<_>>(),
    });
    if !recipe.annotations.is_empty() {
        manifest["annotations"] = serde_json::to_value(&recipe.annotations)?;
    }
    Ok((config, serde_json::to_vec(&sorted(manifest))?))
}

/// The descriptor `write` would give, without writing.
pub fn descriptor(recipe: &Recipe) -> Result<Descriptor> {
    let (_, manifest) = encode(recipe)?;
    Ok(image_descriptor(&manifest))
}

/// Puts configuration and manifest into the store; the layers are there already.
pub fn write(store: &Store, recipe: &Recipe) -> Result<Descriptor> {
    let (config, manifest) = encode(recipe)?;
    store.put(&config)?;
    store.put(&manifest)?;
    Ok(image_descriptor(&manifest))
}

fn image_descriptor(manifest: &[u8]) -> Descriptor {
    let mut descriptor = Descriptor::new(MANIFEST_TYPE, Digest::of(manifest), manifest.len() as u64);
    descriptor.platform = Some(json!({"architecture": "amd64", "os": "linux"}));
    descriptor
}

/// The manifest of an image or of another artifact in the store.
pub fn manifest(store: &Store, digest: &Digest) -> Result<Manifest> {
    let bytes = store.read(digest)?;
    serde_json::from_slice(&bytes).map_err(|error| Problem::failed(format!("{digest} is not a manifest: {error}")).into())
}

/// The manifest and configuration of an image in the store.
pub fn read(store: &Store, digest: &Digest) -> Result<(Manifest, Config)> {
    let manifest = manifest(store, digest)?;
    if let Some(other) = &manifest.artifact_type {
        return Err(Problem::usage(format!("{} is no image: it is of type `{other}`", digest.short())).into());
    }
    let config = serde_json::from_slice(&store.read(&manifest.config.digest)?).context("the image's configuration is broken")?;
    Ok((manifest, config))
}

/// The blobs of an image's layers, for [`crate::oci::flatten::flatten`].
pub fn blobs(store: &Store, digest: &Digest) -> Result<Vec<Blob>> {
    let blob = |layer: &Layer| {
        let media_type = &layer.descriptor.media_type;
        let compression =
            Compression::of_media_type(media_type).with_context(|| format!("a layer of the unknown type `{media_type}`"))?;
        Ok(Blob { path: store.blob(&layer.descriptor.digest), digest: layer.descriptor.digest, compression })
    };
    layers(store, digest)?.iter().map(blob).collect()
}

/// The layers of an image in the store, bottom first.
pub fn layers(store: &Store, digest: &Digest) -> Result<Vec<Layer>> {
    let (manifest, config) = read(store, digest)?;
    if manifest.layers.len() != config.rootfs.diff_ids.len() {
        return Err(Problem::failed(format!(
            "image {digest} names {} layers and {} diff ids",
            manifest.layers.len(),
            config.rootfs.diff_ids.len()
        ))
        .into());
    }
    let pairs = manifest.layers.into_iter().zip(config.rootfs.diff_ids);
    Ok(pairs.map(|(descriptor, diff_id)| Layer { descriptor, diff_id, created_by: "base image".into() }).collect())
}

/// RFC 3339 in UTC.
pub fn timestamp(seconds: i64) -> Result<String> {
    Ok(jiff::Timestamp::from_second(seconds)
        .with_context(|| format!("{seconds} is no time"))?
        .strftime("%Y-%m-%dT%H:%M:%SZ")
        .to_string())
}

/// The value with every object's keys sorted, whatever features serde_json was built with.
pub(super) fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let ordered: BTreeMap<String, Value> = map.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            Value::Object(ordered.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sorted).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_pinned() {
        let digest = Digest::of(b"layer");
        let layer = Layer {
            descriptor: Descriptor::new("application/vnd.oci.image.layer.v1.tar+zstd", digest, 5),
            diff_id: digest,
            created_by: "base".into(),
        };
        let config = RunConfig { user: "1001:0".into(), env: Some(vec!["A=b".into()]), ..RunConfig::default() };
        let recipe = Recipe { config, layers: vec![layer], annotations: BTreeMap::from([("a".into(), "b".into())]), created: 0 };
        let (config, manifest) = encode(&recipe).unwrap();
        assert_eq!(
            String::from_utf8(config).unwrap(),
            format!(
                r#"{{"architecture":"amd64","config":{{"Env":["A=b"],"User":"1001:0"}},"created":"1970-01-01T00:00:00Z","history":[{{"created":"1970-01-01T00:00:00Z","created_by":"base"}}],"os":"linux","rootfs":{{"diff_ids":["{digest}"],"type":"layers"}}}}"#
            )
        );
        assert!(String::from_utf8(manifest).unwrap().starts_with(r#"{"annotations":{"a":"b"},"config":{"digest":"sha256:"#));
    }
}
