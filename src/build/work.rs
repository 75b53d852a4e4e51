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
use crate::artifact::store::{Hold, Lock, Store, write_atomic};
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
        if let Some(_alone) = store.alone()? {
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
    for dir in [store.cache("work"), store.layout().join(".tmp")] {
        if fs_err::read_dir(&dir)?.next().is_some() {
            return Ok(true);
        }
    }
    for dir in [store.layout(), store.cache("steps"), store.cache("trees"), store.state("builds"), store.cache("stat"), store.cache("listings")] {
        for entry in fs_err::read_dir(&dir)? {
            let name = entry?.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(".tmp-") || name.starts_with(".new-") {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Removes what killed builds left; the caller holds the work lock exclusively.
fn sweep(store: &Store, base: &Path, remover: &dyn Fn(&Path) -> Result<()>) -> Result<()> {
    for entry in fs_err::read_dir(base)? {
        remover(&entry?.path())?;
    }
    for entry in fs_err::read_dir(store.layout().join(".tmp"))? {
        fs_err::remove_file(entry?.path())?;
    }
    for dir in [store.layout(), store.cache("steps"), store.cache("trees"), store.state("builds"), store.cache("stat"), store.cache("listings")] {
        for entry in fs_err::read_dir(&dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(".new-") {
                remover(&path)?;
            } else if name.starts_with(".tmp-") {
                fs_err::remove_file(&path)?;
            }
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
        let compression = Compression::of_media_type(&layer.descriptor.media_type)
            .ok_or_else(|| Problem::failed(format!("layer {} has the unknown media type `{}`", layer.descriptor.digest, layer.descriptor.media_type)))?;
        let args = inside::Unpack {
            blob: store.blob(&layer.descriptor.digest),
            digest: Some(layer.descriptor.digest),
            diff_id: Some(layer.diff_id),
            compression: Some(compression),
            to: new.join("root"),
        };
        let unpacked: Result<Unpacked> = session.call("unpack", &args);
        if let Err(error) = unpacked {
            session.call::<_, ()>("remove", &new)?;
            return Err(error.context(format!("cannot unpack layer {}", layer.descriptor.digest.short())));
        }
        finish(&new, &dir, &boot)?;
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
    match fs_err::rename(upper, new.join("root")) {
        Ok(()) => finish(&new, &dir, &boot),
        // The work folder is on another file system: the tree is unpacked when it is needed.
        Err(error) if error.raw_os_error() == Some(libc::EXDEV) => session.call("remove", &new),
        Err(error) => Err(error.into()),
    }
}

fn finish(new: &Path, dir: &Path, boot: &str) -> Result<()> {
    write_atomic(&new.join("boot-id"), boot.as_bytes())?;
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
