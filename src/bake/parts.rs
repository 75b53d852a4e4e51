//! The parts of a disk while it is made: files that are written and not yet in the store.
//!
//! Digests that take long and waiting for the disk happen beside the exports, which read the same
//! files: [`Parts::settle`] starts it, [`Settling::finish`] puts everything into the store.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use tempfile::NamedTempFile;

use crate::artifact::disk::{Disk, Part};
use crate::artifact::store::Store;
use crate::oci::digest::Digest;

/// Where the bytes of each part are, and how many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files(BTreeMap<Part, (PathBuf, u64)>);

impl Files {
    /// Those of a disk in the store.
    pub fn of(store: &Store, disk: &Disk) -> Self {
        Self(disk.parts.iter().map(|(part, descriptor)| (*part, (store.blob(&descriptor.digest), descriptor.size))).collect())
    }

    pub fn has(&self, part: Part) -> bool {
        self.0.contains_key(&part)
    }

    /// # Errors
    /// There is no such part.
    pub fn path(&self, part: Part) -> Result<&Path> {
        Ok(&self.get(part)?.0)
    }

    /// # Errors
    /// There is no such part.
    pub fn size(&self, part: Part) -> Result<u64> {
        Ok(self.get(part)?.1)
    }

    /// # Errors
    /// There is no such part, or it cannot be read.
    pub fn read(&self, part: Part) -> Result<Vec<u8>> {
        Ok(fs_err::read(self.path(part)?)?)
    }

    fn get(&self, part: Part) -> Result<&(PathBuf, u64)> {
        self.0.get(&part).with_context(|| format!("the disk has no part `{}`", part.name()))
    }
}

/// Parts that are written.
#[derive(Debug, Default)]
pub struct Parts(BTreeMap<Part, NamedTempFile>);

impl Parts {
    /// Writes a small part.
    pub fn put(&mut self, store: &Store, part: Part, bytes: &[u8]) -> Result<()> {
        let mut temp = store.temp()?;
        temp.write_all(bytes).with_context(|| format!("cannot write `{}`", temp.path().display()))?;
        self.add(part, temp);
        Ok(())
    }

    /// Takes a part that was written already.
    pub fn add(&mut self, part: Part, temp: NamedTempFile) {
        self.0.insert(part, temp);
    }

    /// Starts to digest the parts and to bring them to the disk.
    pub fn settle(self) -> Result<Settling> {
        let mut files = Files::default();
        let mut work = Vec::new();
        for (part, temp) in &self.0 {
            let file = temp.as_file().try_clone()?;
            files.0.insert(*part, (temp.path().to_path_buf(), file.metadata()?.len()));
            work.push((*part, temp.path().to_path_buf(), file));
        }
        let digests = std::thread::spawn(move || -> Result<_> {
            let mut digests = BTreeMap::new();
            for (part, path, _) in &work {
                digests.insert(*part, Digest::of_reader(fs_err::File::open(path)?)?);
            }
            for (_, path, file) in &work {
                crate::fault::point("sync a part");
                file.sync_all().with_context(|| format!("cannot sync `{}`", path.display()))?;
            }
            Ok(digests)
        });
        Ok(Settling { parts: self, files, digests })
    }
}

/// Parts that are on their way into the store.
#[derive(Debug)]
pub struct Settling {
    parts: Parts,
    files: Files,
    digests: JoinHandle<Result<BTreeMap<Part, (Digest, u64)>>>,
}

impl Settling {
    pub const fn files(&self) -> &Files {
        &self.files
    }

    /// Puts the parts into the store; digest and size of each.
    pub fn finish(self, store: &Store) -> Result<BTreeMap<Part, (Digest, u64)>> {
        let digests = self.digests.join().map_err(|_| anyhow::anyhow!("the thread that digests the parts has ended early"))??;
        for (part, temp) in self.parts.0 {
            store.adopt_synced(temp, &digests[&part].0)?;
        }
        Ok(digests)
    }
}
