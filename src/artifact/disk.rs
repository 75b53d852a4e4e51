//! A disk artifact: a bootable disk described by its parts.
//!
//! An OCI manifest (image specification 1.1, "Guidelines for Artifact Usage") with our
//! `artifactType`; its configuration is a [`Config`], its layers are the parts a machine needs to
//! install or to upgrade: root image, hash tree, unified kernel image, boot loaders, block index.
//! Partition table, ESP and GRUB area follow from these, and so does every export.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::store::{Descriptor, MANIFEST_TYPE, Store};
use crate::disk::table::Table;
use crate::error::Problem;
use crate::oci::digest::Digest;

/// `artifactType` of a disk's manifest.
pub const DISK_TYPE: &str = "application/vnd.pipeline.disk.v1";
/// Media type of its configuration.
pub const CONFIG_TYPE: &str = "application/vnd.pipeline.disk.config.v1+json";
/// Format of the configuration: a newer one is refused.
pub const FORMAT: u32 = 1;
/// Annotation with a part's name, as other tools name the file.
const TITLE: &str = "org.opencontainers.image.title";

/// A part of a disk; its name is the file name other tools see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// EROFS image of the root file system.
    Root,
    /// dm-verity superblock and hash tree of the root image.
    Verity,
    /// Digests of the root image's blocks.
    Index,
    /// Where each file lies in the root image.
    Layout,
    /// Unified kernel image.
    Uki,
    Kernel,
    Initrd,
    /// systemd-boot.
    Loader,
    /// GRUB's boot sector, as GRUB brings it.
    GrubBoot,
    /// GRUB's core image, as `grub-mkimage` made it.
    GrubCore,
}

impl Part {
    pub const ALL: [Part; 10] = [
        Part::Root,
        Part::Verity,
        Part::Index,
        Part::Layout,
        Part::Uki,
        Part::Kernel,
        Part::Initrd,
        Part::Loader,
        Part::GrubBoot,
        Part::GrubCore,
    ];

    /// File name.
    pub const fn name(self) -> &'static str {
        match self {
            Part::Root => "root.erofs",
            Part::Verity => "root.verity",
            Part::Index => "root.index",
            Part::Layout => "layout.json.zst",
            Part::Uki => "uki.efi",
            Part::Kernel => "vmlinuz",
            Part::Initrd => "initrd",
            Part::Loader => "systemd-boot.efi",
            Part::GrubBoot => "grub-boot.img",
            Part::GrubCore => "grub-core.img",
        }
    }

    /// Media type of the part's blob.
    pub fn media_type(self) -> String {
        let kind = match self {
            Part::Root => "root.v1.erofs",
            Part::Verity => "verity.v1",
            Part::Index => "index.v1",
            Part::Layout => "layout.v1+json+zstd",
            Part::Uki => "uki.v1.efi",
            Part::Kernel => "kernel.v1",
            Part::Initrd => "initrd.v1",
            Part::Loader => "loader.v1.efi",
            Part::GrubBoot => "grub-boot.v1",
            Part::GrubCore => "grub-core.v1",
        };
        format!("application/vnd.pipeline.disk.{kind}")
    }
}

/// A package of the root file system.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    pub name: String,
    pub version: String,
    pub architecture: String,
    /// KiB on disk, as the package says.
    #[serde(default)]
    pub size: u64,
}

/// An application on the host, from its `app.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct App {
    pub name: String,
    /// Digest of the image it was made from.
    #[serde(default)]
    pub image: String,
    #[serde(default)]
    pub port: Option<u16>,
    /// In the form of the label `io.pipeline.health`.
    #[serde(default)]
    pub health: Option<Value>,
    #[serde(default)]
    pub uid_base: u32,
}

/// What a disk says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub format: u32,
    /// Of the pipeline, or of the image it was baked from.
    pub name: String,
    /// Manifest of the host image.
    pub host: Digest,
    /// Text of the disk's GUID.
    pub disk_guid: String,
    pub table: Table,
    /// Hex of the root hash of dm-verity.
    pub root_hash: String,
    /// Hex of the salt.
    pub salt: String,
    /// Bytes of the root image.
    pub root_bytes: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// Kernel command line.
    pub cmdline: String,
    /// `static` or `dracut`.
    pub initrd: String,
    /// Digest of the static program.
    pub init: Digest,
    /// `uefi`, `bios`.
    pub firmware: Vec<String>,
    /// Serial number of the ESP.
    pub esp_serial: u32,
    /// Settings of the boot loaders: path on the ESP and content.
    pub esp_texts: BTreeMap<String, String>,
    /// Seconds since 1970: the date of everything on the disk.
    pub epoch: i64,
    /// `PRETTY_NAME` of os-release.
    pub os: String,
    /// Formats the pipeline file asks for.
    #[serde(default)]
    pub formats: Vec<String>,
    /// Sorted by name.
    pub apps: Vec<App>,
    /// Sorted by name.
    pub packages: Vec<Package>,
}

/// A disk in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Of the manifest.
    pub digest: Digest,
    pub config: Config,
    pub parts: BTreeMap<Part, Descriptor>,
}

impl Disk {
    pub fn part(&self, part: Part) -> Result<&Descriptor> {
        self.parts.get(&part).with_context(|| format!("disk {} has no part `{}`", self.digest, part.name()))
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> u64 {
        self.parts.values().map(|part| part.size).sum()
    }
}

/// A manifest as far as it tells what an artifact is.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// Puts configuration and manifest into the store; the parts are there already.
pub fn write(store: &Store, config: &Config, parts: &BTreeMap<Part, (Digest, u64)>) -> Result<Descriptor> {
    let bytes = serde_json::to_vec(&super::image::sorted(serde_json::to_value(config)?))?;
    let config = Descriptor::new(CONFIG_TYPE, store.put(&bytes)?, bytes.len() as u64);
    let layers: Vec<Descriptor> = parts
        .iter()
        .map(|(part, (digest, size))| Descriptor {
            annotations: BTreeMap::from([(TITLE.to_string(), part.name().to_string())]),
            ..Descriptor::new(part.media_type(), *digest, *size)
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": DISK_TYPE,
        "config": config,
        "layers": layers,
    });
    let manifest = serde_json::to_vec(&super::image::sorted(manifest))?;
    store.put(&manifest)?;
    Ok(descriptor(&manifest))
}

/// The descriptor of a disk's manifest.
pub fn descriptor(manifest: &[u8]) -> Descriptor {
    // No client takes it for an image it could run (DESIGN, section 7, contract 1).
    Descriptor {
        artifact_type: Some(DISK_TYPE.into()),
        platform: Some(json!({"architecture": "unknown", "os": "unknown"})),
        ..Descriptor::new(MANIFEST_TYPE, Digest::of(manifest), manifest.len() as u64)
    }
}

/// The disk with this manifest; `None` when the manifest is of something else.
pub fn read(store: &Store, digest: &Digest) -> Result<Option<Disk>> {
    let manifest = store.read(digest)?;
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&manifest) else { return Ok(None) };
    if manifest.artifact_type.as_deref() != Some(DISK_TYPE) {
        return Ok(None);
    }
    let bytes = store.read(&manifest.config.digest)?;
    let format: Value = serde_json::from_slice(&bytes).context("the disk's configuration is broken")?;
    if format["format"].as_u64() != Some(u64::from(FORMAT)) {
        return Err(Problem::failed(format!("disk {digest} has format {}, and this program knows {FORMAT}", format["format"]))
            .hint("use the version of pipeline that baked it, or a newer one")
            .into());
    }
    let config = serde_json::from_slice(&bytes).context("the disk's configuration is broken")?;
    let mut parts = BTreeMap::new();
    for layer in manifest.layers {
        if let Some(part) =
            Part::ALL.into_iter().find(|part| layer.annotations.get(TITLE).is_some_and(|name| name == part.name()))
        {
            parts.insert(part, layer);
        }
    }
    Ok(Some(Disk { digest: *digest, config, parts }))
}
