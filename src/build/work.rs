//! The work folder of a build: `cache/work/PID-N/` with upper directories, overlay folders, scratch.
//!
//! What a killed build left is swept by the next one. The trees that steps stand on are
//! [`crate::artifact::tree`]'s.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::artifact::store::Store;
pub use crate::artifact::tree::{Tree, adopt, tree};
use crate::error::Problem;
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
