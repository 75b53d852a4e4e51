//! Writing to the repository so that a kill or a power cut leaves the old or the new, never half of one.
//!
//! ```text
//! REPOSITORY.lock               one writer of this machine at a time (flock)
//! REPOSITORY/pipeline/          what is being written; swept by the next writer
//! REPOSITORY/pipeline/tip       the new tip; while it is also `main.lock`, that lock is ours
//! REPOSITORY/pipeline/made.json which commit made each file: a cache
//! ```
//! The order: objects synced, renamed, their folders synced; then the tip synced, renamed, its folder synced.
//! Objects are written here and not by libgit2, which does not sync the folders it makes.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use fs_err as fs;
use fs_err::os::unix::fs::OpenOptionsExt as _;
use git2::{ErrorCode, ObjectType, Oid, Repository};
use rustix::fs::FlockOperation;

use super::BRANCH;
use crate::error::Problem;
use crate::fault;

/// Below the repository: ours, and of no interest to Git.
const SCRATCH: &str = "pipeline";
/// The only file there that outlives a writer.
pub(super) const MADE: &str = "made.json";
/// Another Git program holds its lock of the branch for milliseconds; one that was killed, for ever.
const LOCK_TRIES: u32 = 40;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Where the repository keeps things being written.
pub(super) fn scratch(repository: &Path) -> PathBuf {
    repository.join(SCRATCH)
}

/// The only writer of this machine, until it is dropped. What killed ones left is gone.
#[derive(Debug)]
pub(super) struct Writer {
    _lock: fs::File,
}

impl Writer {
    /// Waits for the others. `repository` need not exist.
    pub fn wait(repository: &Path) -> Result<Self> {
        let mut name = repository.as_os_str().to_owned();
        name.push(".lock");
        let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(PathBuf::from(name))?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot lock `{}`", file.path().display())),
            }
        }
        sweep(repository)?;
        Ok(Self { _lock: file })
    }
}

/// Removes what a killed writer left.
fn sweep(repository: &Path) -> Result<()> {
    let scratch = scratch(repository);
    let entries = match fs::read_dir(&scratch) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let lock = branch_lock(repository);
    if let (Ok(tip), Ok(lock_file)) = (fs::symlink_metadata(scratch.join("tip")), fs::symlink_metadata(&lock))
        && (tip.dev(), tip.ino()) == (lock_file.dev(), lock_file.ino())
    {
        fs::remove_file(&lock)?;
    }
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else if entry.file_name() != MADE {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn branch_lock(repository: &Path) -> PathBuf {
    repository.join(format!("{BRANCH}.lock"))
}

/// Syncs a folder, so that the names in it last.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    Ok(fs::File::open(folder)?.sync_all()?)
}

/// Writes a new file, not synced; nothing is left of one that fails.
fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<fs::File> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    if let Err(error) = file.write_all(bytes) {
        let _ = fs::remove_file(path);
        return Err(error.into());
    }
    Ok(file)
}

/// Beside a file, what [`replace`] writes first.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// Replaces a file that only the one writer writes: temporary name, sync, rename. After a power cut it is the old or the
/// new one.
pub(super) fn replace(_writer: &Writer, path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(path);
    fault::point("write a file");
    let mut file = fs::File::create(&temporary)?;
    if let Err(error) = file.write_all(bytes).and_then(|()| file.sync_all()) {
        let _ = fs::remove_file(&temporary);
        return Err(error.into());
    }
    fault::point("rename a file");
    Ok(fs::rename(&temporary, path)?)
}

/// Objects on their way into the repository. They are synced at the same time, for which a file system needs hardly longer
/// than for one.
pub(super) struct Objects<'a> {
    repository: &'a Repository,
    /// Written and not yet synced: the file, and where it belongs. What others name comes before them, so that a kill between
    /// two of them leaves nothing that names what is not there.
    written: Vec<(Oid, fs::File, PathBuf)>,
    /// Folders to sync.
    touched: BTreeSet<PathBuf>,
}

impl<'a> Objects<'a> {
    pub fn new(repository: &'a Repository) -> Self {
        Self { repository, written: Vec::new(), touched: BTreeSet::new() }
    }

    /// Writes an object, which can be read after [`Objects::finish`].
    pub fn put(&mut self, kind: ObjectType, bytes: &[u8]) -> Result<Oid> {
        let id = Oid::hash_object(kind, bytes)?;
        let hex = id.to_string();
        let folder = self.repository.path().join("objects").join(&hex[..2]);
        let place = folder.join(&hex[2..]);
        if fs::symlink_metadata(&place).is_ok() {
            // Who wrote it may have been killed before it synced the folder.
            self.touched.insert(folder);
        } else if !self.written.iter().any(|(known, ..)| *known == id) && !self.repository.odb()?.exists(id) {
            let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
            write!(packed, "{} {}\0", kind.str(), bytes.len())?;
            packed.write_all(bytes)?;
            fault::point("write an object");
            let file = write_new(&scratch(self.repository.path()).join(&hex), 0o444, &packed.finish()?)?;
            self.written.push((id, file, place));
        }
        Ok(id)
    }

    /// After this the objects are there, also after a power cut.
    pub fn finish(mut self) -> Result<()> {
        fault::point("sync the objects");
        sync_all(self.written.iter().map(|(_, file, _)| file))?;
        for (_, file, place) in &self.written {
            let folder = place.parent().context("an object has a folder")?;
            match fs::create_dir(folder) {
                Ok(()) => drop(self.touched.insert(self.repository.path().join("objects"))),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error.into()),
            }
            fault::point("rename an object");
            fs::rename(file.path(), place)?;
            self.touched.insert(folder.to_path_buf());
        }
        fault::point("sync the folders of objects");
        let folders = self.touched.iter().map(fs::File::open).collect::<std::io::Result<Vec<_>>>()?;
        sync_all(&folders)
    }
}

impl Drop for Objects<'_> {
    fn drop(&mut self) {
        // Of a decision that was not written; nothing when they are in their places. A kill leaves them to the next writer.
        for (_, file, _) in &self.written {
            let _ = fs::remove_file(file.path());
        }
    }
}

fn sync_all<'a>(files: impl IntoIterator<Item = &'a fs::File>) -> Result<()> {
    std::thread::scope(|scope| {
        let syncs: Vec<_> = files.into_iter().map(|file| scope.spawn(|| file.sync_all())).collect();
        for sync in syncs {
            sync.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    })
}

/// The tip of the branch as the repository has it.
///
/// # Errors
/// A branch that is no commit's name.
pub(super) fn read_tip(repository: &Repository) -> Result<Option<Oid>> {
    match repository.find_reference(BRANCH) {
        Ok(reference) => Ok(Some(reference.target().with_context(|| format!("`{BRANCH}` names another branch"))?)),
        Err(error) if error.code() == ErrorCode::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read `{BRANCH}` of `{}`", repository.path().display())),
    }
}

/// Moves the tip from `expected` to `new`, unless it is another one by now, which is returned.
///
/// Takes the branch's lock file as Git does, so that Git's own programs are kept out. The lock file is a second name of a
/// file of ours: one that a killed writer left is known by that.
pub(super) fn move_tip(
    _writer: &Writer,
    repository: &Repository,
    expected: Option<Oid>,
    new: Oid,
) -> Result<Result<(), Option<Oid>>> {
    let folder = repository.path();
    let (ours, lock) = (scratch(folder).join("tip"), branch_lock(folder));
    fault::point("write the tip");
    let file = write_new(&ours, 0o644, format!("{new}\n").as_bytes())?;
    fault::point("lock the branch");
    if let Err(error) = file.sync_all().map_err(Into::into).and_then(|()| take_lock(&ours, &lock)) {
        let _ = fs::remove_file(&ours);
        return Err(error);
    }
    let tip = read_tip(repository);
    if !matches!(&tip, Ok(tip) if *tip == expected) {
        let _ = fs::remove_file(&lock);
        let _ = fs::remove_file(&ours);
        return tip.map(Err);
    }
    fault::point("rename the tip");
    let place = folder.join(BRANCH);
    if let Err(error) = fs::rename(&lock, &place) {
        let _ = fs::remove_file(&lock);
        let _ = fs::remove_file(&ours);
        return Err(error.into());
    }
    fault::point("sync the tip");
    sync_folder(place.parent().context("a branch has a folder")?)?;
    fault::point("remove the second name of the tip");
    fs::remove_file(&ours)?;
    Ok(Ok(()))
}

fn take_lock(ours: &Path, lock: &Path) -> Result<()> {
    for _ in 0..LOCK_TRIES {
        match fs::hard_link(ours, lock) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => std::thread::sleep(LOCK_PAUSE),
            Err(error) => return Err(error.into()),
        }
    }
    bail!(
        Problem::transient(format!("another program holds `{}`", lock.display()))
            .hint("when no Git program is at work there, one was killed: remove that file")
    )
}
