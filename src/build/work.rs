//! The work folder of a build, and the trees that steps stand on.
//!
//! ```text
//! cache/work/PID-N/          one build's work: upper directories, overlay folders, scratch
//! cache/trees/HEX/root       a layer unpacked, named by its diffID
//! cache/trees/HEX/boot-id    the boot it was written in
//! cache/trees/HEX.lock       shared by who uses it; exclusive to make or prune it
//! ```
//! A tree is not synced, since its blob is: one that was written before the last boot is unpacked
//! again. What a killed build left is swept by the next one.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::inside;
use crate::artifact::image::Layer;
use crate::artifact::store::{Hold, Lock, Store, write_cache};
use crate::error::Problem;
use crate::fault;
use crate::oci::compress::Compression;
use crate::oci::unpack::Unpacked;
use crate::sandbox::Session;

/// A build's place, kept while its guard lives.
#[derive(Debug)]
pub struct Work {
    dir: PathBuf,
}

impl Work {
    /// Takes a work folder below `base` (default: the store's own). Leftovers of builds that were
    /// killed are removed first, by `remover` where they belong to mapped ids.
    pub fn take(store: &Store, base: Option<&Path>, remover: &dyn Fn(&Path) -> Result<()>) -> Result<Self> {
        let base = base.map_or_else(|| store.cache("work"), Path::to_path_buf);
        fs_err::create_dir_all(&base)?;
        if let Some(alone) = store.alone()? {
            alone.sweep()?;
            sweep(store, &base, remover)?;
        }
        let dir = tempfile::Builder::new()
            .prefix(&format!("{}-", std::process::id()))
            .tempdir_in(&base)
            .with_context(|| Problem::failed(format!("cannot make a work folder in `{}`", base.display())))?
            .keep();
        Ok(Self { dir })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Removes the work folder; the last thing a build does with its session.
    pub fn remove(self, session: Option<&Session>) -> Result<()> {
        match session {
            Some(session) => session.call("remove", &self.dir),
            None => Ok(fs_err::remove_dir_all(&self.dir)?),
        }
    }
}

/// Whether an earlier build left anything behind: cheap enough for every command.
pub fn leftovers(store: &Store) -> Result<bool> {
    for dir in [store.cache("work"), store.temp_dir()] {
        if fs_err::read_dir(&dir)?.next().is_some() {
            return Ok(true);
        }
    }
    for dir in temporary_places(store) {
        for entry in fs_err::read_dir(&dir)? {
            let name = entry?.file_name();
            if TEMPORARY.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// How names start that are there only while something is written.
const TEMPORARY: [&str; 3] = [".tmp-", ".new-", "making-"];

/// Folders in which such names are made.
fn temporary_places(store: &Store) -> Vec<PathBuf> {
    let cache = ["steps", "trees", "stat", "listings", "snapshots"].map(|name| store.cache(name));
    [store.root().to_path_buf(), store.layout(), store.state(""), store.state("builds")].into_iter().chain(cache).collect()
}

/// Removes what killed builds left; the caller holds the work lock exclusively.
fn sweep(store: &Store, base: &Path, remover: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
    for entry in fs_err::read_dir(base)? {
        remover(&entry?.path())?;
    }
    for dir in temporary_places(store) {
        for entry in fs_err::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default();
            if !TEMPORARY.iter().any(|prefix| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
                continue;
            }
            if path.symlink_metadata()?.is_dir() { remover(&path)? } else { fs_err::remove_file(&path)? }
        }
    }
    Ok(())
}

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
        let _making = Lock::wait(&lock_path, Hold::Exclusive)?;
        if is_current(&dir, &boot) {
            continue;
        }
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
        let args = inside::Unpack {
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
pub fn adopt(store: &Store, session: &Session, diff_id: &crate::oci::digest::Digest, upper: &Path) -> Result<()> {
    let trees = store.cache("trees");
    let dir = trees.join(diff_id.hex());
    let boot = boot_id()?;
    let _making = Lock::wait(&trees.join(format!("{}.lock", diff_id.hex())), Hold::Exclusive)?;
    if is_current(&dir, &boot) {
        return Ok(());
    }
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

fn finish(new: &Path, dir: &Path, boot: &str) -> Result<()> {
    write_cache(&new.join("boot-id"), boot.as_bytes())?;
    fault::point("rename a tree");
    Ok(fs_err::rename(new, dir)?)
}

fn is_current(dir: &Path, boot: &str) -> bool {
    fs_err::read(dir.join("boot-id")).is_ok_and(|id| id == boot.as_bytes())
}

/// The kernel's name for this boot (random(4)).
fn boot_id() -> Result<String> {
    Ok(fs_err::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_string())
}
