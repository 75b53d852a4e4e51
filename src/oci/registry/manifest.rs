//! What a registry holds under a name: an image index or an image manifest, in OCI's or Docker's
//! dialect. Reads and checks them; nothing here is asynchronous or talks to anybody.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::reference::Reference;
use crate::error::Problem;
use crate::oci::digest::Digest;

pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// What we ask a registry for.
pub(super) const ACCEPTED: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];

const CONFIGS: [&str; 2] = ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// Layers that can be unpacked: tar, plain or with gzip or zstd.
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];

/// A piece of content by its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
}

impl Descriptor {
    /// Whether registries do not hold such blobs (image specification, "Non-Distributable Layers").
    pub(super) fn is_foreign(&self) -> bool {
        self.media_type.contains("nondistributable") || self.media_type.contains("foreign")
    }
}

/// An entry of an index, or of a list of referrers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    #[serde(flatten)]
    pub descriptor: Descriptor,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What an image runs on (image specification, "Image Index", `platform`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// `os.version` and what else there is.
    #[serde(flatten)]
    pub rest: BTreeMap<String, serde_json::Value>,
}

impl Platform {
    pub(super) fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == "amd64"
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    schema_version: u32,
    media_type: Option<String>,
    artifact_type: Option<String>,
    manifests: Option<Vec<Entry>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    subject: Option<Descriptor>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// A manifest or index that was read.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub media_type: String,
    /// Its own, else (of a manifest) its configuration's type (distribution specification, "Listing Referrers").
    pub artifact_type: Option<String>,
    pub subject: Option<Descriptor>,
    pub annotations: BTreeMap<String, String>,
    pub names: Names,
    is_index: bool,
}

/// What a document names: an index has manifests, a manifest has blobs, the configuration first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Names {
    pub manifests: Vec<Entry>,
    pub blobs: Vec<Descriptor>,
}

/// A manifest whose parts can all be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub manifest: Descriptor,
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

impl Document {
    /// `Err` says in words what is wrong with it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let raw: Raw = serde_json::from_slice(bytes).map_err(|error| format!("its manifest cannot be read: {error}"))?;
        if raw.schema_version != 2 {
            return Err(format!(
                "its manifest has schema version {}; only 2 is known, push the image again with a current tool",
                raw.schema_version
            ));
        }
        let media_type = raw.media_type.as_deref();
        // A document that could be read as either is refused (CVE-2021-41190).
        let (is_index, default, names) = match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) if media_type.is_none_or(|kind| [OCI_INDEX, DOCKER_LIST].contains(&kind)) => {
                (true, OCI_INDEX, Names { manifests, blobs: Vec::new() })
            }
            (None, Some(config), Some(layers))
                if media_type.is_none_or(|kind| [OCI_MANIFEST, DOCKER_MANIFEST].contains(&kind)) =>
            {
                let blobs = std::iter::once(config).chain(layers).collect();
                (false, OCI_MANIFEST, Names { manifests: Vec::new(), blobs })
            }
            _ => {
                return Err(match media_type {
                    Some(media_type) => format!("its manifest says `{media_type}` and does not look like one"),
                    None => "its manifest is neither an image manifest nor an index".into(),
                });
            }
        };
        let config_type = names.blobs.first().map(|config| config.media_type.clone());
        Ok(Self {
            artifact_type: raw.artifact_type.filter(|kind| !kind.is_empty()).or(config_type),
            media_type: raw.media_type.unwrap_or_else(|| default.into()),
            subject: raw.subject,
            annotations: raw.annotations.unwrap_or_default(),
            names,
            is_index,
        })
    }

    pub(super) fn is_index(&self) -> bool {
        self.is_index
    }

    /// Whether this is one image for several platforms: then those of other machines are of no use here.
    pub(super) fn is_multi_platform(&self) -> bool {
        let platforms = || self.names.manifests.iter().filter_map(|entry| entry.platform.as_ref());
        let is_known = |platform: &Platform| !platform.os.is_empty() && platform.os != "unknown";
        self.is_index && self.artifact_type.is_none() && platforms().any(is_known)
    }

    /// The entry of an index to go on with; nothing when this is a manifest.
    pub(super) fn for_platform(&self, reference: &Reference) -> Result<Option<Entry>, Problem> {
        if !self.is_index {
            return Ok(None);
        }
        let manifests = &self.names.manifests;
        let fits = |entry: &&Entry| entry.platform.as_ref().is_some_and(Platform::is_ours);
        // Where there are several, the one every x86-64 machine can run.
        let plain = |entry: &&Entry| {
            entry.platform.as_ref().is_some_and(|platform| platform.variant.as_deref().is_none_or(|v| v == "v1"))
        };
        let fitting: Vec<&Entry> = manifests.iter().filter(fits).collect();
        if let Some(entry) = fitting.iter().copied().find(plain).or_else(|| fitting.first().copied()) {
            return Ok(Some(entry.clone()));
        }
        let platforms: Vec<String> = manifests
            .iter()
            .filter_map(|entry| entry.platform.as_ref())
            // Attestations are entries without a platform of their own.
            .filter(|platform| platform.os != "unknown")
            .map(|platform| format!("`{platform}`"))
            .collect();
        let has = if platforms.is_empty() { "no platform at all".into() } else { platforms.join(", ") };
        Err(Problem::failed(format!("`{reference}` has no image for `linux/amd64`; it has {has}")))
    }

    /// The parts of an image manifest, each of a kind that can be used.
    pub(super) fn image(self, reference: &Reference, digest: Digest, size: u64) -> Result<Image, Problem> {
        if self.is_index {
            return Err(Problem::failed(format!("`{reference}` is an index inside an index, which is not supported")));
        }
        let Document { media_type, artifact_type, names, .. } = self;
        let mut blobs = names.blobs.into_iter();
        let Some(config) = blobs.next() else {
            return Err(Problem::failed(format!("`{reference}` has no configuration")));
        };
        let layers: Vec<Descriptor> = blobs.collect();
        if !CONFIGS.contains(&config.media_type.as_str()) {
            let kind = artifact_type.unwrap_or(config.media_type);
            return Err(Problem::failed(format!("`{reference}` is not an image but an artifact of type `{kind}`")));
        }
        for layer in &layers {
            let Descriptor { media_type, digest, .. } = layer;
            if layer.is_foreign() {
                return Err(Problem::failed(format!(
                    "layer `{digest}` of `{reference}` is a foreign one (`{media_type}`), which registries do not hold"
                ))
                .hint("such layers belong to Windows images; choose another base"));
            }
            if !LAYERS.contains(&media_type.as_str()) {
                return Err(Problem::failed(format!(
                    "layer `{digest}` of `{reference}` has the type `{media_type}`, which cannot be unpacked"
                ))
                .hint("tar layers are supported: plain, with gzip, with zstd"));
            }
        }
        Ok(Image { manifest: Descriptor { media_type, digest, size }, config, layers })
    }
}

/// Checks that a configuration is for linux/amd64: a name may lead straight to another platform's manifest.
pub(super) fn check_platform(reference: &Reference, config: &[u8]) -> Result<(), Problem> {
    let platform: Platform = serde_json::from_slice(config)
        .map_err(|error| Problem::failed(format!("the configuration of `{reference}` cannot be read: {error}")))?;
    if platform.is_ours() {
        return Ok(());
    }
    Err(Problem::failed(format!("`{reference}` has no image for `linux/amd64`; it has `{platform}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference() -> Reference {
        "example.org/a:1".parse().unwrap()
    }

    fn digest(text: &str) -> Digest {
        Digest::of(text)
    }

    fn entry(name: &str, platform: &str) -> String {
        format!(r#"{{"mediaType":"{OCI_MANIFEST}","digest":"{}","size":1,"platform":{platform}}}"#, digest(name))
    }

    fn index(entries: &[String]) -> Document {
        Document::parse(format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(",")).as_bytes()).unwrap()
    }

    fn manifest(config: &str, layer: &str) -> Vec<u8> {
        let digest = digest("x");
        format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{config}","digest":"{digest}","size":3}},"layers":[{{"mediaType":"{layer}","digest":"{digest}","size":4}}]}}"#
        )
        .into_bytes()
    }

    #[test]
    fn an_index_gives_linux_amd64() {
        let arm = entry("arm", r#"{"os":"linux","architecture":"arm64","variant":"v8"}"#);
        let v3 = entry("v3", r#"{"os":"linux","architecture":"amd64","variant":"v3"}"#);
        let amd = entry("amd", r#"{"os":"linux","architecture":"amd64"}"#);
        let windows = entry("windows", r#"{"os":"windows","architecture":"amd64"}"#);
        let attestation = entry("attestation", r#"{"os":"unknown","architecture":"unknown"}"#);
        for (entries, expected) in [
            (vec![arm.clone(), v3.clone(), amd, attestation.clone()], Ok("amd")),
            (vec![arm.clone(), v3], Ok("v3")),
            (
                vec![arm, windows, attestation],
                Err("`example.org/a:1` has no image for `linux/amd64`; it has `linux/arm64/v8`, `windows/amd64`"),
            ),
            (vec![], Err("`example.org/a:1` has no image for `linux/amd64`; it has no platform at all")),
        ] {
            let chosen = index(&entries).for_platform(&reference());
            assert_eq!(
                chosen.map(|entry| entry.unwrap().descriptor.digest).map_err(|problem| problem.message),
                expected.map(digest).map_err(str::to_owned)
            );
        }
    }

    #[test]
    fn documents_that_are_odd_are_refused() {
        for (text, expected) in [
            ("{", "its manifest cannot be read: EOF while parsing an object at line 1 column 1"),
            (
                r#"{"schemaVersion":1}"#,
                "its manifest has schema version 1; only 2 is known, push the image again with a current tool",
            ),
            (r#"{"schemaVersion":2}"#, "its manifest is neither an image manifest nor an index"),
            (r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, "its manifest is neither an image manifest nor an index"),
            (
                &format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","manifests":[]}}"#),
                &format!("its manifest says `{OCI_MANIFEST}` and does not look like one"),
            ),
        ] {
            assert_eq!(Document::parse(text.as_bytes()).unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn only_layers_that_can_be_unpacked_pass() {
        let x = digest("x");
        for layer in LAYERS {
            for config in CONFIGS {
                let image = Document::parse(&manifest(config, layer)).unwrap().image(&reference(), digest("m"), 9).unwrap();
                assert_eq!(
                    image,
                    Image {
                        manifest: Descriptor { media_type: OCI_MANIFEST.into(), digest: digest("m"), size: 9 },
                        config: Descriptor { media_type: config.into(), digest: x, size: 3 },
                        layers: vec![Descriptor { media_type: layer.into(), digest: x, size: 4 }],
                    }
                );
            }
        }
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
        let nondistributable = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";
        for (config, layer, expected) in [
            (
                CONFIGS[0],
                foreign,
                format!("layer `{x}` of `example.org/a:1` is a foreign one (`{foreign}`), which registries do not hold"),
            ),
            (
                CONFIGS[0],
                nondistributable,
                format!("layer `{x}` of `example.org/a:1` is a foreign one (`{nondistributable}`), which registries do not hold"),
            ),
            (
                CONFIGS[0],
                "text/plain",
                format!("layer `{x}` of `example.org/a:1` has the type `text/plain`, which cannot be unpacked"),
            ),
            (
                "application/vnd.x",
                LAYERS[0],
                "`example.org/a:1` is not an image but an artifact of type `application/vnd.x`".into(),
            ),
        ] {
            let problem = Document::parse(&manifest(config, layer)).unwrap().image(&reference(), digest("m"), 9).unwrap_err();
            assert_eq!(problem.message, expected);
        }
    }

    #[test]
    fn a_configuration_for_another_platform_is_refused() {
        assert!(check_platform(&reference(), br#"{"os":"linux","architecture":"amd64","config":{}}"#).is_ok());
        let problem = check_platform(&reference(), br#"{"os":"linux","architecture":"arm64","variant":"v8"}"#).unwrap_err();
        assert_eq!(problem.message, "`example.org/a:1` has no image for `linux/amd64`; it has `linux/arm64/v8`");
    }
}
