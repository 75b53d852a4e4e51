//! Artifacts on their way between the store and registries.
//!
//! A push takes what a name of the store leads to, all it names, and what is attached to any of it
//! (the store's tags `sha256-HEX.KIND`). A pull brings the same back and gives it the same names:
//!
//! ```text
//! NAME:TAG                       an image's manifest; of an index the one for linux/amd64
//! NAME:TAG.host, .disk           the other artifacts of a release
//! NAME:TAG.release, .index       an index: a release, any other
//! sha256-HEX.sig                 what cosign wrote beside the manifest HEX
//! sha256-HEX.KIND[.N]            what has HEX for its subject
//! ```
//! While a blob comes it lies in the store's folder for temporary files under its own name, locked,
//! so that a pull that was killed goes on from there; the next sweep removes what nobody went on with.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::image::CONFIG_TYPE;
use super::release::RELEASE_TYPE;
use super::store::{Descriptor, INDEX_TYPE, REF_NAME, Store};
use super::{referrer, sign};
use crate::error::Problem;
use crate::fault;
use crate::oci::digest::{Digest, Hasher};
use crate::oci::registry::{
    self, Attached, Begun, BlobSink, BlobSource, Content, Fetched, PushOptions, Pushed, Reference, Registry, WouldBeLost,
};
use crate::progress::Progress;

/// How often signatures are put together with those of a registry where others sign in the same moment.
const MERGES: usize = 3;

/// A manifest or index, as far as this file reads it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    artifact_type: Option<String>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    subject: Option<Descriptor>,
}

fn document(store: &Store, digest: &Digest) -> Result<Document> {
    serde_json::from_slice(&store.read(digest)?)
        .map_err(|error| Problem::failed(format!("{digest} is neither a manifest nor an index: {error}")).into())
}

/// What a manifest or index in the store leads to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reached {
    /// Itself and what it names, by digest.
    pub documents: BTreeSet<Digest>,
    /// Configurations and layers with their sizes.
    pub blobs: BTreeMap<Digest, u64>,
}

/// Everything `root` leads to, by its names; whether the blobs are there is not looked at.
///
/// # Errors
/// A document that is missing or corrupt.
pub fn reach(store: &Store, root: &Digest) -> Result<Reached> {
    let mut reached = Reached::default();
    let mut next = vec![*root];
    while let Some(digest) = next.pop() {
        if reached.documents.insert(digest) {
            let document = document(store, &digest)?;
            next.extend(document.manifests.iter().map(|entry| entry.digest));
            reached.blobs.extend(document.config.iter().chain(&document.layers).map(|blob| (blob.digest, blob.size)));
        }
    }
    Ok(reached)
}

/// The same, without the documents that are not there or broken, and what only they lead to.
pub fn reach_what_is_there(store: &Store, root: &Digest) -> Reached {
    let mut reached = Reached::default();
    let mut next = vec![*root];
    while let Some(digest) = next.pop() {
        if reached.documents.insert(digest)
            && let Ok(document) = document(store, &digest)
        {
            next.extend(document.manifests.iter().map(|entry| entry.digest));
            reached.blobs.extend(document.config.iter().chain(&document.layers).map(|blob| (blob.digest, blob.size)));
        }
    }
    reached
}

/// What the store's tags attach to any of `documents`: the digest, and a registry's tag for it when
/// it names no subject itself.
fn attached(store: &Store, documents: &BTreeSet<Digest>, progress: &dyn Progress) -> Result<Vec<(Digest, Option<String>)>> {
    let mut broken = BTreeSet::new();
    let mut about = documents.clone();
    let mut found: Vec<(Digest, Option<String>)> = Vec::new();
    let tags = store.index()?.manifests;
    loop {
        let before = found.len();
        for descriptor in &tags {
            let Some(tag) = descriptor.annotations.get(REF_NAME) else { continue };
            let Some(subject) = subject_of(tag).filter(|subject| about.contains(subject)) else { continue };
            let is_known = |digest: &Digest| found.iter().any(|(known, _)| known == digest) || about.contains(digest);
            if broken.contains(&descriptor.digest) || is_known(&descriptor.digest) {
                continue;
            }
            let named = match document(store, &descriptor.digest) {
                Ok(document) => document.subject,
                Err(error) => {
                    progress.warn(format!("`{tag}` stays here: {error:#}"));
                    broken.insert(descriptor.digest);
                    continue;
                }
            };
            if let Some(other) = named.as_ref().filter(|named| named.digest != subject) {
                let problem = Problem::failed(format!("`{tag}` is about another artifact: {}", other.digest));
                return Err(problem.hint(format!("remove the tag: `pipeline artifact untag {tag}`")).into());
            }
            found.push((descriptor.digest, named.is_none().then(|| tag.clone())));
        }
        // Something may be attached to what is attached.
        about.extend(found.iter().map(|(digest, _)| *digest));
        if found.len() == before {
            return Ok(found);
        }
    }
}

/// The subject of a tag `sha256-HEX.KIND`.
pub fn subject_of(tag: &str) -> Option<Digest> {
    let (hex, _) = tag.strip_prefix("sha256-")?.split_once('.')?;
    hex.parse().ok()
}

/// Pushes what `digest` leads to, and what is attached to it. See [`Registry::push`].
pub fn push(
    store: &Store,
    registry: &Registry,
    digest: &Digest,
    to: &Reference,
    mount_from: Option<String>,
    progress: &dyn Progress,
) -> Result<Pushed> {
    let reached = reach(store, digest)?;
    for (blob, size) in &reached.blobs {
        if !store.has(blob, *size) {
            return Err(Problem::failed(format!("blob {blob} of {digest} is not in the store, so it cannot be pushed"))
                .hint("build or pull it again")
                .into());
        }
    }
    let mut tries = 0;
    loop {
        let options = PushOptions { mount_from: mount_from.clone(), attached: attached(store, &reached.documents, progress)? };
        match registry.push(&Source(store), digest, to, &options, progress) {
            Err(error) if tries < MERGES && error.downcast_ref::<WouldBeLost>().is_some() => {
                for tag in options.attached.iter().filter_map(|(_, tag)| tag.as_deref()).filter(|tag| tag.ends_with(".sig")) {
                    merge(store, registry, &to.with_tag(tag)?, tag, progress)?;
                }
                tries += 1;
            }
            result => return result,
        }
    }
}

/// Puts the signatures that a registry has under cosign's tag to those of the store.
fn merge(store: &Store, registry: &Registry, there: &Reference, tag: &str, progress: &dyn Progress) -> Result<()> {
    let Some(subject) = subject_of(tag) else { return Ok(()) };
    if registry.digest(there)?.is_none() {
        return Ok(());
    }
    let fetched = registry.fetch(there, registry::Reach::All, &Sink(store), progress)?;
    let root = &fetched.root;
    sign::adopt(store, &subject, &Descriptor::new(root.media_type.clone(), root.digest, root.size))
}

/// What a pull brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pulled {
    /// Names in the store, the application image's first.
    pub names: Vec<(String, Digest)>,
    pub fetched: Fetched,
}

/// Pulls everything behind `reference` and names it `name` (`NAME:TAG`), or by its repository's
/// last part and its tag. See [`Registry::fetch`].
pub fn pull(
    store: &Store,
    registry: &Registry,
    reference: &Reference,
    name: Option<&str>,
    reach: registry::Reach,
    progress: &dyn Progress,
) -> Result<Pulled> {
    let fetched = registry.fetch(reference, reach, &Sink(store), progress)?;
    let last = reference.repository().rsplit('/').next().unwrap_or("image");
    let name = name.map_or_else(|| format!("{last}:{}", reference.tag().unwrap_or("pulled")), str::to_owned);
    let names = names(store, &fetched.root.digest, &name)?;
    for attached in &fetched.attached {
        tag_attached(store, attached, progress)?;
    }
    for (name, descriptor) in &names {
        store.tag(name, descriptor)?;
    }
    Ok(Pulled { names: names.into_iter().map(|(name, descriptor)| (name, descriptor.digest)).collect(), fetched })
}

/// The names of what was pulled, by what it is.
fn names(store: &Store, root: &Digest, name: &str) -> Result<Vec<(String, Descriptor)>> {
    let found = document(store, root)?;
    if found.config.is_some() {
        return Ok(vec![(name.into(), described(store, root)?)]);
    }
    let mut names = Vec::new();
    let is_release = found.artifact_type.as_deref() == Some(RELEASE_TYPE);
    let machine = || found.manifests.iter().find(|entry| !entry_name(entry).1.is_empty());
    let own = found.manifests.iter().find(|entry| is_ours(entry)).or_else(machine).map(|entry| entry_name(entry).0);
    for entry in &found.manifests {
        if is_release {
            if let Some(name) = release_name(name, own, entry) {
                names.push((name, described(store, &entry.digest)?));
            }
        } else if names.is_empty() && is_ours(entry) {
            names.push((name.into(), described(store, &entry.digest)?));
        }
    }
    names.sort_by(|a, b| a.0.cmp(&b.0));
    names.push((format!("{name}.{}", if is_release { "release" } else { "index" }), described(store, root)?));
    Ok(names)
}

/// The tag of a release's entry: `NAME.host` in the release is `NAME:TAG.host` here (DESIGN, section 7, contract 1). Only what
/// bears the release's own name gets one, that is the name of the image for linux/amd64, else of the host or disk; other
/// applications' images would take each other's, and are found and kept through the release.
fn release_name(name: &str, own: Option<&str>, entry: &Descriptor) -> Option<String> {
    let (written, suffix) = entry_name(entry);
    (own == Some(written)).then(|| format!("{name}{suffix}"))
}

/// The name of a release's entry, and what follows it by its kind.
fn entry_name(entry: &Descriptor) -> (&str, &'static str) {
    let written = entry.annotations.get(REF_NAME).map_or("", String::as_str);
    let suffixes = [".host", ".disk"].into_iter();
    let found = suffixes.filter_map(|suffix| Some((written.strip_suffix(suffix)?, suffix))).next();
    found.unwrap_or((written, ""))
}

fn is_ours(entry: &Descriptor) -> bool {
    entry.platform.as_ref().is_some_and(|platform| platform["os"] == "linux" && platform["architecture"] == "amd64")
}

/// The descriptor of a manifest or index in the store, as its tag holds it.
pub fn described(store: &Store, digest: &Digest) -> Result<Descriptor> {
    let bytes = store.read(digest)?;
    let found = document(store, digest)?;
    let value: serde_json::Value = serde_json::from_slice(&bytes)?;
    let default = if found.config.is_some() { super::store::MANIFEST_TYPE } else { INDEX_TYPE };
    let mut descriptor = Descriptor::new(value["mediaType"].as_str().unwrap_or(default), *digest, bytes.len() as u64);
    if let Some(config) = &found.config {
        // No client takes what is no image for one it could run.
        let (os, architecture) = if found.artifact_type.is_none() && is_image_config(&config.media_type) {
            let config: serde_json::Value = serde_json::from_slice(&store.read(&config.digest)?).unwrap_or_default();
            let text = |key: &str| config[key].as_str().unwrap_or("unknown").to_owned();
            (text("os"), text("architecture"))
        } else {
            ("unknown".to_owned(), "unknown".to_owned())
        };
        descriptor.platform = Some(json!({"architecture": architecture, "os": os}));
    }
    descriptor.artifact_type = found.artifact_type;
    Ok(descriptor)
}

fn is_image_config(media_type: &str) -> bool {
    [CONFIG_TYPE, "application/vnd.docker.container.image.v1+json"].contains(&media_type)
}

/// Tags what refers to a manifest by its digest, so that it is found and stays.
fn tag_attached(store: &Store, attached: &Attached, progress: &dyn Progress) -> Result<()> {
    let digest = attached.manifest.digest;
    let mut descriptor = Descriptor::new(attached.manifest.media_type.clone(), digest, attached.manifest.size);
    descriptor.artifact_type.clone_from(&attached.artifact_type);
    let is_known = |tag: &str| -> Result<bool> { Ok(store.tagged(tag)?.is_some_and(|there| there.digest == digest)) };
    if let Some(tag) = &attached.tag {
        return match store.tagged(tag)? {
            // Cosign keeps all signatures in one manifest: theirs are added to those that only we have.
            Some(ours) if tag.ends_with(".sig") && !holds_all(&document(store, &digest)?, &document(store, &ours.digest)?) => {
                sign::adopt(store, &attached.subject, &descriptor)
            }
            Some(ours) if !holds_all(&document(store, &digest)?, &document(store, &ours.digest)?) => {
                progress.warn(format!("`{tag}` of the store holds what the registry's does not, and stays as it is"));
                Ok(())
            }
            _ => store.tag(tag, &descriptor),
        };
    }
    let subject = document(store, &digest)?.subject;
    if subject.is_none_or(|named| named.digest != attached.subject) {
        progress.warn(format!("`{digest}` was passed over: it is not about {}", attached.subject));
        return Ok(());
    }
    // By its kind, such as `.sbom.spdx` or `.report.NAME`; what nobody here knows is told apart by number only.
    if referrer::adopt(store, &attached.subject, &descriptor)?.is_some() {
        return Ok(());
    }
    for number in 1.. {
        let number = if number > 1 { format!(".{number}") } else { String::new() };
        let tag = format!("sha256-{}.other{number}", attached.subject.hex());
        if is_known(&tag)? {
            break;
        }
        if store.tagged(&tag)?.is_none() {
            store.tag(&tag, &descriptor)?;
            break;
        }
    }
    Ok(())
}

fn holds_all(theirs: &Document, ours: &Document) -> bool {
    // Two keys over one reference sign the same bytes: what differs is the signature beside them.
    let is = |one: &Descriptor, other: &Descriptor| {
        one.digest == other.digest && one.annotations.get(sign::SIGNATURE) == other.annotations.get(sign::SIGNATURE)
    };
    ours.layers.iter().all(|layer| theirs.layers.iter().any(|other| is(other, layer)))
}

/// The store as a place to push from.
#[derive(Debug)]
pub struct Source<'a>(pub &'a Store);

impl BlobSource for Source<'_> {
    fn document(&self, digest: &Digest) -> Result<Vec<u8>> {
        self.0.read(digest)
    }

    fn open(&self, blob: &registry::Descriptor, offset: u64) -> Result<Content> {
        let mut file = fs_err::File::open(self.0.blob(&blob.digest))?;
        file.seek(SeekFrom::Start(offset))?;
        Ok(Content::File(Box::new(file)))
    }
}

/// The store as a place to pull into.
#[derive(Debug)]
pub struct Sink<'a>(pub &'a Store);

impl BlobSink for Sink<'_> {
    fn has(&self, digest: &Digest, size: u64) -> bool {
        self.0.has(digest, size)
    }

    fn write(&self, digest: &Digest, _size: u64, reader: &mut dyn Read) -> Result<()> {
        self.0.put_reader(digest, reader)
    }

    fn document(&self, digest: &Digest) -> Option<Vec<u8>> {
        self.0.read(digest).ok()
    }

    fn begun(&self, digest: &Digest, size: u64) -> Result<Option<Box<dyn Begun + '_>>> {
        let path = self.0.temp_dir().join(format!("pull-{}", digest.hex()));
        fault::point("create a blob that is pulled");
        let mut file = fs_err::OpenOptions::new().read(true).append(true).create(true).open(&path)?;
        // Another process at the same blob: each its own way. Gone or replaced: it has just ended.
        let alone = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok();
        let inode = |meta: std::io::Result<std::fs::Metadata>| meta.ok().map(|meta| meta.ino());
        if !alone || inode(file.metadata()) != inode(fs_err::metadata(&path)) {
            return Ok(None);
        }
        if file.metadata()?.len() >= size {
            file.set_len(0)?;
        }
        let mut hasher = Hasher::new();
        let have = std::io::copy(&mut file, &mut hasher).with_context(|| format!("cannot read `{}`", path.display()))?;
        Ok(Some(Box::new(Partial { store: self.0, digest: *digest, file, path, have, hasher })))
    }
}

/// A blob that is on its way, in a file of its own.
struct Partial<'a> {
    store: &'a Store,
    digest: Digest,
    /// Held exclusively by `flock`.
    file: fs_err::File,
    path: PathBuf,
    have: u64,
    hasher: Hasher,
}

impl Begun for Partial<'_> {
    fn have(&self) -> (u64, Hasher) {
        (self.have, self.hasher.clone())
    }

    fn go_on(mut self: Box<Self>, reader: &mut dyn Read) -> Result<()> {
        let mut buffer = vec![0; 128 << 10];
        loop {
            let read = match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) => {
                    if error.kind() == std::io::ErrorKind::InvalidData {
                        fs_err::remove_file(&self.path)?;
                    }
                    return Err(error).context("cannot read the blob");
                }
            };
            self.hasher.update(&buffer[..read]);
            self.file.write_all(&buffer[..read])?;
        }
        let found = self.hasher.clone().finish();
        if found != self.digest {
            fs_err::remove_file(&self.path)?;
            return Err(Problem::failed(format!("blob {} came with other bytes, of digest {found}", self.digest)).into());
        }
        let (file, _) = self.file.into_parts();
        let path = tempfile::TempPath::try_from_path(self.path).context("cannot keep the blob")?;
        self.store.adopt(tempfile::NamedTempFile::from_parts(file, path), &self.digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    /// Gives some bytes, then an error of this kind.
    struct Breaking<'a>(&'a [u8], std::io::ErrorKind);

    impl Read for Breaking<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(std::io::Error::new(self.1, "broken")),
                read => Ok(read),
            }
        }
    }

    #[test]
    fn a_blob_goes_on_where_it_broke() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of("hello, world");
        let sink = Sink(&store);
        let begun = || sink.begun(&digest, 12).unwrap().unwrap();
        assert!(begun().go_on(&mut Breaking(b"hello", std::io::ErrorKind::Other)).is_err());
        let (have, hasher) = begun().have();
        assert_eq!((have, hasher.finish()), (5, Digest::of("hello")));
        let held = begun();
        assert!(sink.begun(&digest, 12).unwrap().is_none(), "two at the same file");
        held.go_on(&mut &b", world"[..]).unwrap();
        assert_eq!(store.read(&digest).unwrap(), b"hello, world");
        assert_eq!(fs_err::read_dir(store.temp_dir()).unwrap().count(), 0);

        // What was wrong does not stay, nor does what is too long to be right.
        let digest = Digest::of("other");
        let begun = || sink.begun(&digest, 5).unwrap().unwrap();
        assert!(begun().go_on(&mut Breaking(b"oth", std::io::ErrorKind::InvalidData)).is_err());
        assert_eq!(fs_err::read_dir(store.temp_dir()).unwrap().count(), 0);
        assert!(begun().go_on(&mut &b"wrong"[..]).is_err());
        fs_err::write(store.temp_dir().join(format!("pull-{}", digest.hex())), "too long").unwrap();
        assert_eq!(begun().have().0, 0);
    }

    fn put(store: &Store, value: &serde_json::Value) -> Descriptor {
        let bytes = serde_json::to_vec(value).unwrap();
        let digest = store.put(&bytes).unwrap();
        Descriptor::new(value["mediaType"].as_str().unwrap(), digest, bytes.len() as u64)
    }

    fn manifest(store: &Store, content: &str, subject: Option<&Descriptor>) -> Descriptor {
        let config = Descriptor::new("application/vnd.oci.empty.v1+json", store.put(b"{}").unwrap(), 2);
        let layer = Descriptor::new("text/plain", store.put(content.as_bytes()).unwrap(), content.len() as u64);
        let mut value =
            json!({"schemaVersion": 2, "mediaType": super::super::store::MANIFEST_TYPE, "config": config, "layers": [layer]});
        if let Some(subject) = subject {
            value["subject"] = serde_json::to_value(subject).unwrap();
        }
        put(store, &value)
    }

    #[test]
    fn what_is_attached_goes_along() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (app, other) = (manifest(&store, "app", None), manifest(&store, "other", None));
        let index = put(&store, &json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [app]}));
        let sbom = manifest(&store, "sbom", Some(&app));
        let signature = manifest(&store, "signature", None);
        let about_sbom = manifest(&store, "about", Some(&sbom));
        let stranger = manifest(&store, "stranger", Some(&other));
        for (subject, kind, attached) in
            [(&app, "sbom.spdx", &sbom), (&index, "sig", &signature), (&sbom, "other", &about_sbom), (&other, "other", &stranger)]
        {
            store.tag(&format!("sha256-{}.{kind}", subject.digest.hex()), attached).unwrap();
        }
        let reached = reach(&store, &index.digest).unwrap();
        assert_eq!(reached.documents, BTreeSet::from([app.digest, index.digest]));
        assert_eq!(reached.blobs.into_keys().collect::<BTreeSet<_>>(), BTreeSet::from([Digest::of("{}"), Digest::of("app")]));
        let mut found = attached(&store, &reached.documents, &Silent).unwrap();
        found.sort();
        let mut expected = vec![
            (sbom.digest, None),
            (signature.digest, Some(format!("sha256-{}.sig", index.digest.hex()))),
            (about_sbom.digest, None),
        ];
        expected.sort();
        assert_eq!(found, expected);

        store.tag(&format!("sha256-{}.other.2", app.digest.hex()), &stranger).unwrap();
        let error = attached(&store, &reached.documents, &Silent).unwrap_err();
        assert!(error.to_string().ends_with(&format!("is about another artifact: {}", other.digest)), "{error}");
    }
}
