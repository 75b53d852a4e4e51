//! A release: one OCI index that pins every artifact of one build by digest.
//!
//! Its digest is its identity. It holds descriptors only, sorted by digest, and nothing of the
//! moment, so that the same artifacts give the same release; signatures, SBOMs and reports refer
//! to it and are never inside (image specification 1.1, "OCI Image Index"; DESIGN, section 7, contract 1).
//!
//! ```text
//! NAME:TAG.release → index, artifactType application/vnd.pipeline.release.v1
//!   manifests        one descriptor each: artifactType, annotation `org.opencontainers.image.ref.name` = NAME, NAME.host, NAME.disk
//!   annotations      org.opencontainers.image.version, org.opencontainers.image.revision
//! ```

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::store::{Descriptor, INDEX_TYPE, MANIFEST_TYPE, REF_NAME, Store};
use super::{disk, image};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// `artifactType` of a release's index.
pub const RELEASE_TYPE: &str = "application/vnd.pipeline.release.v1";
const IMAGE_TYPE: &str = "application/vnd.pipeline.image.v1";
const HOST_TYPE: &str = "application/vnd.pipeline.host.v1";
const VERSION: &str = "org.opencontainers.image.version";
const REVISION: &str = "org.opencontainers.image.revision";
/// Letters of a version; a tag may have 128 (distribution specification, "tag"), of which some are for the artifact's kind.
const VERSION_MAX: usize = 100;

/// What an artifact of a release is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Image,
    Host,
    Disk,
}

impl Kind {
    pub const ALL: [Kind; 3] = [Kind::Image, Kind::Host, Kind::Disk];

    /// `artifactType` of its descriptor.
    pub const fn artifact_type(self) -> &'static str {
        match self {
            Kind::Image => IMAGE_TYPE,
            Kind::Host => HOST_TYPE,
            Kind::Disk => disk::DISK_TYPE,
        }
    }

    /// What follows the pipeline's name in the entry's name.
    const fn suffix(self) -> &'static str {
        match self {
            Kind::Image => "",
            Kind::Host => ".host",
            Kind::Disk => ".disk",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Image => "image",
            Kind::Host => "host",
            Kind::Disk => "disk",
        })
    }
}

/// One artifact of a release.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Entry {
    /// Of the manifest.
    pub digest: Digest,
    /// Bytes of the manifest.
    pub size: u64,
    pub kind: Kind,
    /// The pipeline's name, or an app's on the host.
    pub name: String,
}

impl Entry {
    /// The manifest's descriptor as the store and the registry name it.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(MANIFEST_TYPE, self.digest, self.size)
    }
}

/// What a release is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recipe {
    /// The pipeline's name: the image of this name is the one that clients take from the index.
    pub name: String,
    /// Readable version, for example of `git describe`.
    pub version: String,
    /// Commit of the source, when there is one.
    pub revision: Option<String>,
    /// In any order.
    pub entries: Vec<Entry>,
}

/// A release in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Release {
    /// Of the index: the release's identity.
    pub digest: Digest,
    /// Bytes of the index.
    pub size: u64,
    pub version: String,
    pub revision: Option<String>,
    /// Sorted by digest.
    pub entries: Vec<Entry>,
}

impl Release {
    pub fn descriptor(&self) -> Descriptor {
        Descriptor { artifact_type: Some(RELEASE_TYPE.into()), ..Descriptor::new(INDEX_TYPE, self.digest, self.size) }
    }

    /// The artifact of this kind that bears the pipeline's name.
    pub fn entry(&self, kind: Kind, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.kind == kind && entry.name == name)
    }
}

/// A version is a tag too, and is shown to people: so it has no other letters.
///
/// # Errors
/// Other letters, no letter at all, too many, or the word that stands for the newest.
pub fn check_version(version: &str) -> Result<()> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let starts = version.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if starts && version.len() <= VERSION_MAX && version.bytes().all(good) && version != "latest" {
        return Ok(());
    }
    Err(Problem::usage(format!("`{}` is no version", version.escape_debug()))
        .hint(format!("letters, digits, `.`, `_` and `-`, at most {VERSION_MAX}, not `latest`"))
        .into())
}

/// The tag a release has in the store: `NAME:TAG.release`.
pub fn tag(name: &str, tag: &str) -> String {
    format!("{name}:{tag}.release")
}

/// The bytes of the index. The order of the entries plays no part.
///
/// # Errors
/// A release without artifacts, without a version, or with two entries of the same kind and name.
pub fn encode(recipe: &Recipe) -> Result<Vec<u8>> {
    let mut entries = recipe.entries.clone();
    entries.sort();
    entries.dedup();
    if entries.is_empty() || recipe.version.is_empty() {
        anyhow::bail!(Problem::bug("a release needs an artifact and a version"));
    }
    let mut names = BTreeMap::new();
    let mut manifests = Vec::new();
    for entry in &entries {
        let name = format!("{}{}", entry.name, entry.kind.suffix());
        if let Some(other) = names.insert(name.clone(), entry.digest) {
            anyhow::bail!(Problem::bug(format!("the release names `{name}` twice: {other} and {}", entry.digest)));
        }
        // Clients choose by platform: only the application's own image is theirs to run.
        let own = entry.kind == Kind::Image && entry.name == recipe.name;
        let (architecture, os) = if own { ("amd64", "linux") } else { ("unknown", "unknown") };
        manifests.push(Descriptor {
            artifact_type: Some(entry.kind.artifact_type().into()),
            platform: Some(json!({"architecture": architecture, "os": os})),
            annotations: BTreeMap::from([(REF_NAME.to_string(), name)]),
            ..entry.descriptor()
        });
    }
    let mut annotations = BTreeMap::from([(VERSION, recipe.version.as_str())]);
    annotations.extend(recipe.revision.as_deref().map(|revision| (REVISION, revision)));
    let index = json!({
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "artifactType": RELEASE_TYPE,
        "manifests": manifests,
        "annotations": annotations,
    });
    Ok(serde_json::to_vec(&image::sorted(index))?)
}

/// Puts the index into the store; its artifacts are there already. Tag it with [`tag`].
pub fn write(store: &Store, recipe: &Recipe) -> Result<Descriptor> {
    for entry in &recipe.entries {
        if !store.has(&entry.digest, entry.size) {
            return Err(missing(entry).into());
        }
    }
    let bytes = encode(recipe)?;
    let digest = store.put(&bytes)?;
    Ok(Descriptor { artifact_type: Some(RELEASE_TYPE.into()), ..Descriptor::new(INDEX_TYPE, digest, bytes.len() as u64) })
}

fn missing(entry: &Entry) -> Problem {
    Problem::failed(format!("the {} {} of `{}` is not in the store", entry.kind, entry.digest, entry.name))
        .hint("build or pull it again")
}

/// An index as far as it tells whether it is a release.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    #[serde(default)]
    artifact_type: Option<String>,
    manifests: Vec<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

/// The release with this digest.
///
/// # Errors
/// It is not in the store, its bytes are not what the digest says, or it is something else.
pub fn read(store: &Store, digest: &Digest) -> Result<Release> {
    parse(digest, &store.read(digest)?)
}

/// A release from its bytes; `digest` is theirs.
pub fn parse(digest: &Digest, bytes: &[u8]) -> Result<Release> {
    let no_release = |what: &str| {
        Problem::usage(format!("{} is no release: it is {what}", digest.short()))
            .hint("`pipeline build --release` makes one and tags it `NAME:TAG.release`")
    };
    let index: Index = serde_json::from_slice(bytes).map_err(|_| no_release("no index"))?;
    match index.artifact_type.as_deref() {
        Some(RELEASE_TYPE) => {}
        Some(newer) if newer.starts_with("application/vnd.pipeline.release.") => {
            return Err(Problem::usage(format!("{} is a release of the kind `{newer}`", digest.short()))
                .hint("it was made by a newer pipeline: use that one")
                .into());
        }
        other => return Err(no_release(&format!("an index of type `{}`", other.unwrap_or("none"))).into()),
    }
    let mut annotations = index.annotations;
    let version = annotations.remove(VERSION).with_context(|| format!("release {digest} has no version"))?;
    check_version(&version).with_context(|| format!("release {digest} cannot be used"))?;
    let entries: Result<Vec<Entry>> = index.manifests.iter().map(|descriptor| entry(digest, descriptor)).collect();
    Ok(Release { digest: *digest, size: bytes.len() as u64, version, revision: annotations.remove(REVISION), entries: entries? })
}

fn entry(release: &Digest, descriptor: &Descriptor) -> Result<Entry> {
    let named = || format!("release {release} names {} without its kind or name", descriptor.digest);
    let artifact_type = descriptor.artifact_type.as_deref().with_context(named)?;
    let kind = Kind::ALL.into_iter().find(|kind| kind.artifact_type() == artifact_type).with_context(named)?;
    let name = descriptor.annotations.get(REF_NAME).with_context(named)?;
    let name = name.strip_suffix(kind.suffix()).with_context(named)?;
    Ok(Entry { digest: descriptor.digest, size: descriptor.size, kind, name: name.to_owned() })
}

/// Every blob the release needs, itself first, each once: what `push` sends and `prune` keeps.
/// What is attached to it is not among them; see [`super::referrer::attached`].
pub fn blobs(store: &Store, digest: &Digest) -> Result<Vec<Descriptor>> {
    let release = read(store, digest)?;
    let mut found = vec![release.descriptor()];
    for entry in &release.entries {
        let manifest = image::manifest(store, &entry.digest)?;
        found.push(entry.descriptor());
        found.push(manifest.config);
        found.extend(manifest.layers);
    }
    let mut seen = std::collections::BTreeSet::new();
    found.retain(|descriptor| seen.insert(descriptor.digest));
    Ok(found)
}

/// Reads every blob of the release and compares digests and sizes. What is wrong, all of it; empty when all is well.
///
/// # Errors
/// The release itself cannot be read: then nothing is known of the rest.
pub fn check(store: &Store, digest: &Digest) -> Result<Vec<String>> {
    check_with(store, digest, &mut |blob| store.verify(blob))
}

/// The same, with `read` for a blob of a manifest that is there and has its size.
pub(super) fn check_with(store: &Store, digest: &Digest, read: &mut dyn FnMut(&Digest) -> Result<()>) -> Result<Vec<String>> {
    let release = self::read(store, digest)?;
    let mut wrong = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for entry in &release.entries {
        let manifest = match image::manifest(store, &entry.digest) {
            Ok(manifest) => manifest,
            Err(error) => {
                wrong.push(format!("the {} `{}`: {error}", entry.kind, entry.name));
                continue;
            }
        };
        for blob in std::iter::once(&manifest.config).chain(&manifest.layers) {
            if !seen.insert(blob.digest) {
                continue;
            }
            let size = fs_err::metadata(store.blob(&blob.digest)).ok().map(|meta| meta.len());
            let problem = match size {
                None => Some(format!("blob {} is not in the store", blob.digest)),
                Some(size) if size != blob.size => Some(format!("blob {} has {size} bytes and not {}", blob.digest, blob.size)),
                Some(_) => read(&blob.digest).err().map(|error| error.to_string()),
            };
            wrong.extend(problem.map(|problem| format!("the {} `{}`: {problem}", entry.kind, entry.name)));
        }
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(store: &Store) -> Recipe {
        let put = |kind, name: &str, text: &str| {
            let layer = store.put(text.as_bytes()).unwrap();
            let manifest = json!({"config": Descriptor::new("x", store.put(b"{}").unwrap(), 2), "layers": [Descriptor::new("x", layer, text.len() as u64)]});
            let bytes = serde_json::to_vec(&manifest).unwrap();
            Entry { digest: store.put(&bytes).unwrap(), size: bytes.len() as u64, kind, name: name.into() }
        };
        let entries = vec![
            put(Kind::Disk, "shop", "disk"),
            put(Kind::Image, "shop", "image"),
            put(Kind::Host, "shop", "host"),
            put(Kind::Image, "notes", "app"),
        ];
        Recipe { name: "shop".into(), version: "1.4".into(), revision: Some("abc".into()), entries }
    }

    #[test]
    fn the_same_artifacts_give_the_same_release() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut recipe = recipe(&store);
        let first = write(&store, &recipe).unwrap();
        recipe.entries.reverse();
        assert_eq!(write(&store, &recipe).unwrap(), first);
        let release = read(&store, &first.digest).unwrap();
        let mut sorted = recipe.entries.clone();
        sorted.sort();
        assert_eq!((&release.entries, release.version.as_str(), release.revision.as_deref()), (&sorted, "1.4", Some("abc")));
        assert!(release.entries.is_sorted_by_key(|entry| entry.digest));
        let index: serde_json::Value = serde_json::from_slice(&store.read(&first.digest).unwrap()).unwrap();
        let shown: BTreeMap<&str, (&str, &str)> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|entry| {
                (
                    entry["annotations"][REF_NAME].as_str().unwrap(),
                    (entry["artifactType"].as_str().unwrap(), entry["platform"]["os"].as_str().unwrap()),
                )
            })
            .collect();
        assert_eq!(
            shown,
            BTreeMap::from([
                ("notes", (IMAGE_TYPE, "unknown")),
                ("shop", (IMAGE_TYPE, "linux")),
                ("shop.disk", (disk::DISK_TYPE, "unknown")),
                ("shop.host", (HOST_TYPE, "unknown")),
            ])
        );
        assert_eq!(index["annotations"], json!({VERSION: "1.4", REVISION: "abc"}));
        // Itself, four manifests, one shared configuration, four layers.
        assert_eq!(blobs(&store, &first.digest).unwrap().len(), 10);
        assert_eq!(check(&store, &first.digest).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn every_blob_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let recipe = recipe(&store);
        let digest = write(&store, &recipe).unwrap().digest;
        fs_err::write(store.blob(&Digest::of("disk")), "dusk").unwrap();
        fs_err::write(store.blob(&Digest::of("host")), "longer").unwrap();
        fs_err::remove_file(store.blob(&Digest::of("app"))).unwrap();
        let mut wrong = check(&store, &digest).unwrap();
        wrong.sort();
        let expected = [
            format!("the disk `shop`: blob {} is corrupt: its bytes have the digest {}", Digest::of("disk"), Digest::of("dusk")),
            format!("the host `shop`: blob {} has 6 bytes and not 4", Digest::of("host")),
            format!("the image `notes`: blob {} is not in the store", Digest::of("app")),
        ];
        assert_eq!(wrong, expected);
        fs_err::write(store.blob(&digest), "{}").unwrap();
        assert!(check(&store, &digest).unwrap_err().to_string().contains("is corrupt"));
    }

    #[test]
    fn what_is_no_release_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let cases = [
            (json!({"config": {}}), "is no release: it is no index"),
            (json!({"manifests": []}), "is no release: it is an index of type `none`"),
            (json!({"artifactType": "application/vnd.pipeline.release.v2", "manifests": []}), "a release of the kind"),
            (json!({"artifactType": RELEASE_TYPE, "manifests": []}), "has no version"),
        ];
        for (value, expected) in cases {
            let digest = store.put(value.to_string().as_bytes()).unwrap();
            let error = read(&store, &digest).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let mut twice = recipe(&store);
        twice.entries.push(Entry { digest: Digest::of("other"), ..twice.entries[0].clone() });
        assert!(encode(&twice).unwrap_err().to_string().contains("names `shop.disk` twice"));
        assert!(write(&store, &twice).unwrap_err().to_string().contains("is not in the store"));
    }
}
