//! The trees of layers, unpacked and kept: what builds, `run` and instances stand on.
//!
//! ```text
//! cache/trees/HEX/root       a layer unpacked, named by its diffID
//! cache/trees/HEX/boot-id    the boot it was written in
//! cache/trees/HEX.lock       shared by who uses it; exclusive to make or prune it
//! ```
//! A tree is not synced, since its blob is: one that was written before the last boot is unpacked
//! again. Owners and marks of a tree read right in the user namespace only, so unpacking, removing and filling a
//! volume are functions of the unshare process, which [`call`] knows by name.

use std::io::BufReader;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::image::Layer;
use super::store::{Hold, Lock, Store, write_cache};
use crate::cmd::Cmd;
use crate::error::Problem;
use crate::fault;
use crate::oci::compress::Compression;
use crate::oci::digest::{Digest, Hasher};
use crate::oci::unpack::{Unpacked, unpack};
use crate::sandbox::Session;

/// Between two looks whether a tree is made.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(20);

/// A tree that stays while this lives.
#[derive(Debug)]
pub struct Tree {
    /// The layer's root.
    pub root: PathBuf,
    _lease: Lock,
}

/// The tree of a layer: from the cache, or unpacked from its blob.
///
/// # Errors
/// A corrupt blob, by its digest.
pub fn tree(store: &Store, session: &Session, layer: &Layer) -> Result<Tree> {
    let trees = store.cache("trees");
    let dir = trees.join(layer.diff_id.hex());
    let lock_path = trees.join(format!("{}.lock", layer.diff_id.hex()));
    let boot = boot_id()?;
    loop {
        let lease = Lock::wait(&lock_path, Hold::Shared)?;
        if is_current(&dir, &boot) {
            return Ok(Tree { root: dir.join("root"), _lease: lease });
        }
        drop(lease);
        let Some(_making) = making(&lock_path, &dir, &boot)? else { continue };
        session.call::<_, ()>("remove", &dir)?;
        let new = trees.join(format!(".new-{}", layer.diff_id.hex()));
        session.call::<_, ()>("remove", &new)?;
        fs_err::create_dir(&new)?;
        let compression = Compression::of_media_type(&layer.descriptor.media_type).ok_or_else(|| {
            Problem::failed(format!(
                "layer {} has the unknown media type `{}`",
                layer.descriptor.digest, layer.descriptor.media_type
            ))
        })?;
        let args = Unpack {
            blob: store.blob(&layer.descriptor.digest),
            digest: Some(layer.descriptor.digest),
            diff_id: Some(layer.diff_id),
            compression: Some(compression),
            to: new.join("root"),
        };
        let unpacked: Result<Unpacked> = session.call("unpack", &args);
        let made = unpacked
            .with_context(|| format!("cannot unpack layer {}", layer.descriptor.digest.short()))
            .and_then(|_| finish(&new, &dir, &boot));
        if let Err(error) = made {
            session.call::<_, ()>("remove", &new)?;
            return Err(error);
        }
    }
}

/// Makes the upper directory of a finished step the tree of its layer, so that the next step and
/// the next build need not unpack it.
pub fn adopt(store: &Store, session: &Session, diff_id: &Digest, upper: &Path) -> Result<()> {
    let trees = store.cache("trees");
    let dir = trees.join(diff_id.hex());
    let boot = boot_id()?;
    let lock_path = trees.join(format!("{}.lock", diff_id.hex()));
    let Some(_making) = making(&lock_path, &dir, &boot)? else { return Ok(()) };
    session.call::<_, ()>("remove", &dir)?;
    let new = trees.join(format!(".new-{}", diff_id.hex()));
    session.call::<_, ()>("remove", &new)?;
    fs_err::create_dir(&new)?;
    fault::point("rename an upper directory");
    let adopted = match fs_err::rename(upper, new.join("root")) {
        Ok(()) => finish(&new, &dir, &boot),
        // The work folder is on another file system: the tree is unpacked when it is needed.
        Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => return session.call("remove", &new),
        Err(error) => Err(error.into()),
    };
    adopted.or_else(|error| {
        session.call::<_, ()>("remove", &new)?;
        Err(error)
    })
}

/// The lock to make a tree, or nothing when somebody has made it: a program that uses one keeps its lock for as long as it
/// runs, and is not waited for.
fn making(lock_path: &Path, dir: &Path, boot: &str) -> Result<Option<Lock>> {
    loop {
        if let Some(lock) = Lock::try_now(lock_path, Hold::Exclusive)? {
            return Ok(Some(lock).filter(|_| !is_current(dir, boot)));
        }
        if is_current(dir, boot) {
            return Ok(None);
        }
        std::thread::sleep(PAUSE);
    }
}

fn finish(new: &Path, dir: &Path, boot: &str) -> Result<()> {
    write_cache(&new.join("boot-id"), boot.as_bytes())?;
    fault::point("rename a tree");
    Ok(fs_err::rename(new, dir)?)
}

fn is_current(dir: &Path, boot: &str) -> bool {
    fs_err::read(dir.join("boot-id")).is_ok_and(|id| id == boot.as_bytes())
}

/// The kernel's name for this boot (random(4)).
pub fn boot_id() -> Result<String> {
    Ok(fs_err::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_string())
}

/// Unpack a layer blob into an empty folder.
#[derive(Debug, Serialize, Deserialize)]
pub struct Unpack {
    pub blob: PathBuf,
    /// Expected digest of the blob, when it has one.
    pub digest: Option<Digest>,
    /// Expected digest of the plain tar, when it has one.
    pub diff_id: Option<Digest>,
    /// `None`: by the first bytes.
    pub compression: Option<Compression>,
    pub to: PathBuf,
}

/// A fresh volume, with what the image has at its path.
#[derive(Debug, Serialize, Deserialize)]
pub struct Volume {
    /// Made by this.
    pub dir: PathBuf,
    /// Layers, bottom first.
    pub lowers: Vec<PathBuf>,
    /// Absolute path in the image.
    pub path: PathBuf,
    /// As in the image's configuration; the volume is theirs when the image has nothing there.
    pub user: String,
    /// It is theirs whoever owns what the image has there, so that they may write to it.
    pub give: bool,
}

/// Dispatches a call in the unshare process.
///
/// # Errors
/// What the function says; a name that is none of these.
pub fn call(name: &str, args: Value) -> Result<Value> {
    fn parse<T: serde::de::DeserializeOwned>(args: Value) -> Result<T> {
        serde_json::from_value(args).context("arguments that are not understood")
    }
    match name {
        "unpack" => Ok(serde_json::to_value(unpack_blob(&parse(args)?)?)?),
        "volume" => Ok(serde_json::to_value(volume(&parse(args)?)?)?),
        "remove" => Ok(serde_json::to_value(remove(&parse::<PathBuf>(args)?)?)?),
        other => Err(Problem::bug(format!("the unshare process has no function `{other}`")).into()),
    }
}

fn unpack_blob(args: &Unpack) -> Result<Unpacked> {
    let file = fs_err::File::open(&args.blob)?;
    let mut blob = Digesting { inner: BufReader::with_capacity(256 << 10, file), hasher: Hasher::new() };
    let compression = match args.compression {
        Some(compression) => compression,
        None => Compression::of_magic(std::io::BufRead::fill_buf(&mut blob.inner)?),
    };
    fs_err::create_dir_all(&args.to)?;
    fs_err::set_permissions(&args.to, std::fs::Permissions::from_mode(0o755))?;
    fault::point("unpack a layer");
    let result = {
        let mut plain =
            Digesting { inner: compression.reader(BufReader::with_capacity(256 << 10, &mut blob))?, hasher: Hasher::new() };
        let result = unpack(&mut plain, &args.to);
        // What follows the end of the archive belongs to the digests too.
        if result.is_ok() {
            std::io::copy(&mut plain, &mut std::io::sink()).context("cannot read the rest of the archive")?;
        }
        result.map(|unpacked| (unpacked, plain.hasher.finish()))
    };
    // A corrupt blob shows in all kinds of ways: name it as what it is.
    std::io::copy(&mut blob, &mut std::io::sink()).with_context(|| format!("cannot read `{}`", args.blob.display()))?;
    let found = blob.hasher.finish();
    if let Some(expected) = args.digest.filter(|expected| *expected != found) {
        return Err(Problem::failed(format!("blob {expected} is corrupt: its bytes have the digest {found}"))
            .hint("build or pull it again; it is replaced then")
            .into());
    }
    let (unpacked, plain) = result?;
    if let Some(expected) = args.diff_id.filter(|expected| *expected != plain) {
        return Err(
            Problem::failed(format!("layer {} unpacks to {plain}, and its image says {expected}", args.blob.display())).into()
        );
    }
    Ok(unpacked)
}

struct Digesting<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: std::io::Read> std::io::Read for Digesting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Removes a folder whatever the owners and modes in it; one that is not there is fine.
fn remove(path: &Path) -> Result<()> {
    fault::point("remove a folder");
    // overlayfs leaves its work folder with mode 000, which root of the namespace may enter.
    match fs_err::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => Ok(result?),
    }
}

fn volume(args: &Volume) -> Result<()> {
    let relative = args.path.strip_prefix("/").unwrap_or(&args.path);
    fs_err::create_dir(&args.dir)?;
    fs_err::set_permissions(&args.dir, std::fs::Permissions::from_mode(0o755))?;
    let in_image: Vec<PathBuf> = args
        .lowers
        .iter()
        .map(|lower| lower.join(relative))
        .filter(|path| path.symlink_metadata().is_ok_and(|meta| meta.is_dir()))
        .collect();
    let Some(top) = in_image.last() else {
        let (uid, gid) = crate::sandbox::launch::ids(&args.user, &args.lowers)?;
        return Ok(fs_err::os::unix::fs::chown(&args.dir, Some(uid), Some(gid))?);
    };
    let meta = fs_err::metadata(top)?;
    fs_err::os::unix::fs::chown(&args.dir, Some(meta.uid()), Some(meta.gid()))?;
    fs_err::set_permissions(&args.dir, meta.permissions())?;
    for lower in &in_image {
        for entry in fs_err::read_dir(lower)? {
            let entry = entry?;
            let from = entry.path();
            if from.symlink_metadata()?.file_type().is_char_device() {
                continue;
            }
            let status = Cmd::new("cp").args(["-a", "--"]).arg(&from).arg(&args.dir).output()?;
            anyhow::ensure!(
                status.status.success(),
                "cannot copy `{}` into a volume: {}",
                from.display(),
                String::from_utf8_lossy(&status.stderr)
            );
        }
    }
    if args.give {
        let (uid, gid) = crate::sandbox::launch::ids(&args.user, &args.lowers)?;
        fs_err::os::unix::fs::chown(&args.dir, Some(uid), Some(gid))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After a restart of the machine many start what is made of the same tree.
    #[test]
    fn who_uses_a_tree_for_long_keeps_nobody_waiting() {
        let place = tempfile::tempdir().unwrap();
        let (lock, dir) = (place.path().join("tree.lock"), place.path().join("tree"));
        fs_err::create_dir(&dir).unwrap();
        fs_err::write(dir.join("boot-id"), "before").unwrap();
        let first = making(&lock, &dir, "now").unwrap().expect("a tree of an earlier boot is made anew");
        let other = std::thread::spawn({
            let (lock, dir) = (lock.clone(), dir.clone());
            move || making(&lock, &dir, "now").unwrap().is_none()
        });
        fs_err::write(dir.join("boot-id"), "now").unwrap();
        drop(first);
        let _user = Lock::wait(&lock, Hold::Shared).unwrap();
        assert!(other.join().unwrap());
        assert!(making(&lock, &dir, "now").unwrap().is_none());
    }
}
