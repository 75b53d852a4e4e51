//! The store: a standard OCI image layout, and a cache beside it.
//!
//! ```text
//! ROOT/version                          format of everything below
//! ROOT/store.lock                       shared by every process that has the store open; exclusive to sweep or prune
//! ROOT/store/oci-layout, index.json     tags: one descriptor each, `org.opencontainers.image.ref.name`
//! ROOT/store/blobs/sha256/HEX
//! ROOT/store/.tmp/                      blobs being written
//! ROOT/cache/...                        trees, step records, packages: may be thrown away
//! STATE/...                             build records and logs; ROOT/state unless said otherwise
//! ```
//! Every write goes to a temporary name and is renamed. Blobs and the index are synced first, and
//! the blobs' folder before a tag leads to them; the cache is not. The index is changed under an
//! exclusive `flock`; readers need no lock, since it is replaced whole.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::error::Problem;
use crate::fault;
use crate::oci::digest::{Digest, Hasher};

/// Format of the store and its cache: a newer one is refused.
const VERSION: u32 = 1;
/// Annotation that names a tag in an OCI layout (image layout specification, "index.json").
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
pub const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// An OCI content descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.into(), digest, size, platform: None, artifact_type: None, annotations: BTreeMap::new() }
    }
}

/// `index.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    pub schema_version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    #[serde(default)]
    pub manifests: Vec<Descriptor>,
}

impl Default for Index {
    fn default() -> Self {
        Self { schema_version: 2, media_type: Some(INDEX_TYPE.into()), manifests: Vec::new() }
    }
}

/// What tells that a file is as it was: any write changes ctime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    /// Seconds and nanoseconds.
    pub(super) ctime: (i64, i64),
}

/// A held lock; the kernel releases it when this is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: std::fs::File,
}

/// How to take a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    Shared,
    Exclusive,
}

impl Lock {
    /// Waits for the lock on `path`, which is made when missing.
    pub fn wait(path: &Path, hold: Hold) -> Result<Self> {
        let file = open_lock(path)?;
        let operation =
            if hold == Hold::Shared { rustix::fs::FlockOperation::LockShared } else { rustix::fs::FlockOperation::LockExclusive };
        loop {
            match rustix::fs::flock(&file, operation) {
                Ok(()) => return Ok(Self { _file: file }),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot lock `{}`", path.display())),
            }
        }
    }

    /// The lock, or `None` when somebody else holds it.
    pub fn try_now(path: &Path, hold: Hold) -> Result<Option<Self>> {
        let file = open_lock(path)?;
        let operation = if hold == Hold::Shared {
            rustix::fs::FlockOperation::NonBlockingLockShared
        } else {
            rustix::fs::FlockOperation::NonBlockingLockExclusive
        };
        match rustix::fs::flock(&file, operation) {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot lock `{}`", path.display())),
        }
    }
}

fn open_lock(path: &Path) -> Result<std::fs::File> {
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CREATE | rustix::fs::OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, rustix::fs::Mode::from_raw_mode(0o600))
        .with_context(|| format!("cannot open lock `{}`", path.display()))?;
    Ok(fd.into())
}

/// The store of one user. While it is open nobody sweeps or prunes it.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    state: PathBuf,
    /// `store.lock`, held shared.
    open: std::fs::File,
}

/// Nobody else has the store open while this lives.
#[derive(Debug)]
pub struct Alone<'a>(&'a Store);

impl Alone<'_> {
    /// Removes the blobs and records of bakes that killed processes were writing.
    pub fn sweep(&self) -> Result<()> {
        for entry in fs_err::read_dir(self.0.temp_dir())? {
            fs_err::remove_file(entry?.path())?;
        }
        for entry in fs_err::read_dir(self.0.cache("bakes")).into_iter().flatten() {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b".tmp-") {
                fs_err::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(&self.0.open, rustix::fs::FlockOperation::LockShared);
    }
}

impl Store {
    /// Opens the store below `root`, making it when it is not there.
    ///
    /// # Errors
    /// A store of another user, or of a newer format.
    pub fn open(root: &Path) -> Result<Self> {
        Self::open_with_state(root, &root.join("state"))
    }

    /// [`Store::open`], with records and logs in another place.
    pub fn open_with_state(root: &Path, state: &Path) -> Result<Self> {
        let version = match fs_err::read_to_string(root.join("version")) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(error).with_context(|| format!("cannot read the store `{}`", root.display())),
        };
        if let Some(text) = &version {
            check_format(root, text)?;
        } else {
            fs_err::create_dir_all(root)?;
        }
        let open = open_lock(&root.join("store.lock"))?;
        let store = Self { root: root.to_path_buf(), state: state.to_path_buf(), open };
        store.hold_shared()?;
        if version.is_none() {
            store.create()?;
        }
        Ok(store)
    }

    fn hold_shared(&self) -> Result<()> {
        loop {
            match rustix::fs::flock(&self.open, rustix::fs::FlockOperation::LockShared) {
                Ok(()) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot lock the store `{}`", self.root.display())),
            }
        }
    }

    /// The store for oneself, without waiting; `None` while another process has it open.
    pub fn alone(&self) -> Result<Option<Alone<'_>>> {
        match rustix::fs::flock(&self.open, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Alone(self))),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                // A conversion that fails loses the lock it converts (flock(2)).
                self.hold_shared()?;
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| format!("cannot lock the store `{}`", self.root.display())),
        }
    }

    fn create(&self) -> Result<()> {
        for dir in [
            "store/blobs/sha256",
            "store/.tmp",
            "cache/steps",
            "cache/trees",
            "cache/work",
            "cache/listings",
            "cache/stat",
            "cache/debs",
            "cache/git",
            "cache/snapshots",
        ] {
            fs_err::create_dir_all(self.root.join(dir))?;
        }
        for dir in ["builds", "logs"] {
            fs_err::create_dir_all(self.state(dir))?;
        }
        fs_err::set_permissions(&self.root, std::fs::Permissions::from_mode(0o755))?;
        self.write_atomic(&self.layout().join("oci-layout"), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let _lock = self.lock_index()?;
        if !self.layout().join("index.json").exists() {
            self.write_index(&Index::default())?;
        }
        self.write_atomic(&self.root.join("version"), format!("{VERSION}\n").as_bytes())
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The OCI image layout.
    pub fn layout(&self) -> PathBuf {
        self.root.join("store")
    }

    /// A folder of the cache.
    pub fn cache(&self, name: &str) -> PathBuf {
        self.root.join("cache").join(name)
    }

    /// A folder of the state.
    pub fn state(&self, name: &str) -> PathBuf {
        self.state.join(name)
    }

    pub fn blob(&self, digest: &Digest) -> PathBuf {
        self.layout().join("blobs/sha256").join(digest.hex())
    }

    /// What tells that a blob is as it was; `None`: it is not there.
    pub fn stamp(&self, digest: &Digest) -> Option<Stamp> {
        let meta = self.blob(digest).symlink_metadata().ok()?;
        Some(Stamp {
            ino: meta.ino(),
            size: meta.len(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
        })
    }

    /// Whether a blob of this size is there. Its bytes are not read; see [`Store::verify`].
    pub fn has(&self, digest: &Digest, size: u64) -> bool {
        self.blob(digest).metadata().is_ok_and(|meta| meta.is_file() && meta.len() == size)
    }

    /// Reads a blob's bytes and compares its digest.
    pub fn verify(&self, digest: &Digest) -> Result<()> {
        let (found, _) = Digest::of_reader(fs_err::File::open(self.blob(digest))?)?;
        if found == *digest { Ok(()) } else { Err(corrupt(digest, &found).into()) }
    }

    /// A small blob, with its digest checked.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>> {
        let bytes = fs_err::read(self.blob(digest)).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                anyhow::Error::from(Problem::failed(format!("blob {digest} is not in the store")).hint("build or pull it again"))
            }
            _ => error.into(),
        })?;
        let found = Digest::of(&bytes);
        if found == *digest { Ok(bytes) } else { Err(corrupt(digest, &found).into()) }
    }

    /// Puts a small blob.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        // Small enough to compare: a corrupt one of the same size is replaced.
        if !fs_err::read(self.blob(&digest)).is_ok_and(|there| there == bytes) {
            let mut temp = self.temp()?;
            temp.write_all(bytes).with_context(|| format!("cannot write `{}`", temp.path().display()))?;
            self.adopt(temp, &digest)?;
        }
        Ok(digest)
    }

    /// Streams a blob in, checking its digest.
    pub fn put_reader(&self, expected: &Digest, reader: &mut dyn Read) -> Result<()> {
        let mut temp = self.temp()?;
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; 128 << 10];
        loop {
            let read = reader.read(&mut buffer).context("cannot read the blob")?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            temp.write_all(&buffer[..read]).with_context(|| format!("cannot write `{}`", temp.path().display()))?;
        }
        let found = hasher.finish();
        if found != *expected {
            return Err(corrupt(expected, &found).into());
        }
        self.adopt(temp, expected)
    }

    /// Where files that are being written lie; what is left there is swept.
    pub fn temp_dir(&self) -> PathBuf {
        self.layout().join(".tmp")
    }

    /// Removes the blobs that killed processes were writing; nothing while somebody else has the store open.
    pub fn sweep(&self) -> Result<()> {
        self.alone()?.map_or(Ok(()), |alone| alone.sweep())
    }

    /// A file in the store that is gone again unless it is adopted.
    pub fn temp(&self) -> Result<tempfile::NamedTempFile> {
        fault::point("create a temporary blob");
        let dir = self.temp_dir();
        tempfile::Builder::new()
            .prefix("blob-")
            .tempfile_in(&dir)
            .with_context(|| format!("cannot make a file in `{}`", dir.display()))
    }

    /// Makes a written temporary file the blob `digest`.
    pub fn adopt(&self, temp: tempfile::NamedTempFile, digest: &Digest) -> Result<()> {
        fault::point("sync a blob");
        temp.as_file().sync_all().with_context(|| format!("cannot sync `{}`", temp.path().display()))?;
        self.adopt_synced(temp, digest)
    }

    /// The same for a file that is on the disk already.
    pub fn adopt_synced(&self, temp: tempfile::NamedTempFile, digest: &Digest) -> Result<()> {
        temp.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
        let path = self.blob(digest);
        fault::point("rename a blob");
        temp.persist(&path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
        Ok(())
    }

    /// Writes a file whole: temporary name, fsync, rename, fsync of the folder.
    pub fn write_atomic(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        write_atomic(path, bytes)
    }

    /// Takes the index's lock; short and exclusive.
    pub fn lock_index(&self) -> Result<Lock> {
        Lock::wait(&self.root.join("index.lock"), Hold::Exclusive)
    }

    /// # Errors
    /// A broken index: it is never overwritten, since that would lose tags.
    pub fn index(&self) -> Result<Index> {
        let path = self.layout().join("index.json");
        let bytes = match fs_err::read(&path) {
            Ok(bytes) => bytes,
            // Moved away since it was broken, as the hint below says.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Index::default()),
            Err(error) => return Err(error.into()),
        };
        serde_json::from_slice(&bytes).map_err(|error| {
            Problem::failed(format!("`{}` is broken: {error}", path.display()))
                .hint("the blobs are intact: move the file away and build again, which tags them anew")
                .into()
        })
    }

    fn write_index(&self, index: &Index) -> Result<()> {
        self.write_atomic(&self.layout().join("index.json"), &serde_json::to_vec_pretty(index)?)
    }

    /// What a tag points at.
    pub fn tagged(&self, tag: &str) -> Result<Option<Descriptor>> {
        Ok(self
            .index()?
            .manifests
            .into_iter()
            .find(|descriptor| descriptor.annotations.get(REF_NAME).is_some_and(|name| name == tag)))
    }

    /// Points `tag` at a manifest that is in the store.
    pub fn tag(&self, tag: &str, descriptor: &Descriptor) -> Result<()> {
        if self.tagged(tag)?.is_some_and(|now| now.digest == descriptor.digest) {
            return Ok(());
        }
        let _lock = self.lock_index()?;
        let mut index = self.index()?;
        index.manifests.retain(|descriptor| descriptor.annotations.get(REF_NAME).is_none_or(|name| name != tag));
        let mut descriptor = descriptor.clone();
        descriptor.annotations.insert(REF_NAME.into(), tag.into());
        index.manifests.push(descriptor);
        index.manifests.sort_by(|a, b| a.annotations.get(REF_NAME).cmp(&b.annotations.get(REF_NAME)));
        // What the tag leads to is on the disk before the tag is.
        sync_dir(&self.layout().join("blobs/sha256"))?;
        self.write_index(&index)
    }

    /// Removes a tag; the blobs stay until they are pruned.
    pub fn untag(&self, tag: &str) -> Result<bool> {
        let _lock = self.lock_index()?;
        let mut index = self.index()?;
        let before = index.manifests.len();
        index.manifests.retain(|descriptor| descriptor.annotations.get(REF_NAME).is_none_or(|name| name != tag));
        let removed = index.manifests.len() != before;
        if removed {
            self.write_index(&index)?;
        }
        Ok(removed)
    }

    /// Removes many tags in one write; how many there were.
    pub fn untag_all(&self, tags: &BTreeSet<String>) -> Result<usize> {
        let _lock = self.lock_index()?;
        let mut index = self.index()?;
        let before = index.manifests.len();
        index.manifests.retain(|descriptor| descriptor.annotations.get(REF_NAME).is_none_or(|name| !tags.contains(name)));
        let removed = before - index.manifests.len();
        if removed > 0 {
            self.write_index(&index)?;
        }
        Ok(removed)
    }

    /// The key of secrets' HMACs: random per store, readable by its owner only.
    pub fn hmac_key(&self) -> Result<Vec<u8>> {
        let path = self.state("hmac.key");
        match fs_err::read(&path) {
            Ok(key) if key.len() == 32 => return Ok(key),
            Ok(_) => anyhow::bail!(
                Problem::failed(format!("`{}` is broken", path.display())).hint("remove it; steps with secrets run again")
            ),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        let key: [u8; 32] = rand::random();
        fault::point("write the key");
        let mut temp = tempfile::Builder::new().prefix(".tmp-").tempfile_in(&self.state)?;
        temp.write_all(&key)?;
        temp.as_file().sync_all()?;
        // Another build may have been first; then its key is the one.
        match temp.persist_noclobber(&path) {
            Ok(_) => Ok(key.to_vec()),
            Err(_) => Ok(fs_err::read(&path)?),
        }
    }
}

/// A store of another user, or of a newer format, is refused.
fn check_format(root: &Path, text: &str) -> Result<()> {
    let owner = fs_err::metadata(root)?.uid();
    let uid = rustix::process::geteuid().as_raw();
    if owner != uid {
        return Err(Problem::usage(format!("the store `{}` belongs to uid {owner}, and this is uid {uid}", root.display()))
            .hint("a store belongs to one user: use that user, or another store with `--root DIR`; images cross by `artifact export` and `artifact load`")
            .into());
    }
    let version: u32 = text.trim().parse().unwrap_or(u32::MAX);
    if version > VERSION {
        return Err(Problem::usage(format!(
            "the store `{}` has format {}, newer than this program's {VERSION}",
            root.display(),
            text.trim()
        ))
        .hint("use the newer pipeline, or another store with `--root DIR`")
        .into());
    }
    Ok(())
}

fn corrupt(expected: &Digest, found: &Digest) -> Problem {
    Problem::failed(format!("blob {expected} is corrupt: its bytes have the digest {found}"))
        .hint("build or pull it again; it is replaced then")
}

/// Writes a file whole: temporary name, fsync, rename, fsync of the folder.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().context("a file in a folder")?;
    fault::point("create a temporary file");
    let mut temp = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempfile_in(dir)
        .with_context(|| format!("cannot make a file in `{}`", dir.display()))?;
    temp.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    temp.write_all(bytes)
        .and_then(|()| temp.as_file().sync_all())
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    fault::point("rename a file");
    temp.persist(path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
    sync_dir(dir)
}

/// Writes a file of the cache whole, without waiting for the disk: after a power cut it may be
/// missing or broken, and then counts as not there.
pub fn write_cache(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().context("a file in a folder")?;
    fault::point("create a temporary cache file");
    let mut temp = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempfile_in(dir)
        .with_context(|| format!("cannot make a file in `{}`", dir.display()))?;
    temp.write_all(bytes).with_context(|| format!("cannot write `{}`", path.display()))?;
    fault::point("rename a cache file");
    temp.persist(path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(())
}

/// Makes renames in `dir` durable.
pub fn sync_dir(dir: &Path) -> Result<()> {
    fault::point("sync a folder");
    fs_err::File::open(dir)?.sync_all().with_context(|| format!("cannot sync `{}`", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_and_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("root")).unwrap();
        let digest = store.put(b"{}").unwrap();
        assert_eq!(store.read(&digest).unwrap(), b"{}");
        let descriptor = Descriptor::new(MANIFEST_TYPE, digest, 2);
        store.tag("b:1", &descriptor).unwrap();
        store.tag("a:1", &descriptor).unwrap();
        store.tag("b:1", &descriptor).unwrap();
        let names: Vec<_> = store.index().unwrap().manifests.iter().map(|d| d.annotations[REF_NAME].clone()).collect();
        assert_eq!(names, ["a:1", "b:1"]);
        assert!(store.untag("a:1").unwrap() && !store.untag("a:1").unwrap());
        assert_eq!(store.tagged("b:1").unwrap().unwrap().digest, digest);
        assert_eq!(store.hmac_key().unwrap(), store.hmac_key().unwrap());
        assert_eq!(fs_err::metadata(store.state("hmac.key")).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_corrupt_blob_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = store.put(b"good").unwrap();
        fs_err::write(store.blob(&digest), b"evil").unwrap();
        assert!(store.verify(&digest).unwrap_err().to_string().contains("is corrupt"));
        assert!(store.put_reader(&Digest::of(b"other"), &mut &b"good"[..]).is_err());
        assert_eq!(fs_err::read_dir(store.layout().join(".tmp")).unwrap().count(), 0);
    }

    #[test]
    fn a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path()).unwrap();
        fs_err::write(dir.path().join("version"), "99\n").unwrap();
        assert!(Store::open(dir.path()).unwrap_err().to_string().contains("has format 99, newer"));
    }
}
