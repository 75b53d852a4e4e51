//! Writing to the repository so that a kill or a power cut leaves the old or the new, never half of one.
//!
//! ```text
//! REPOSITORY.lock               one writer of this machine at a time (flock)
//! REPOSITORY/pipeline/          what is being written; swept by the next writer
//! REPOSITORY/pipeline/tip       the new tip; while it is also `main.lock`, that lock is ours
//! REPOSITORY/pipeline/made.json which commit made each file: a cache
//! ```
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

/// Writes a new file and syncs it; nothing is left of one that fails.
fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if let Err(error) = written {
        let _ = fs::remove_file(path);
        return Err(error.into());
    }
    Ok(())
}

/// Replaces a file: temporary name, sync, rename, sync of the folder.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file has a folder")?;
    let mut file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(folder).with_context(|| format!("cannot write to `{}`", folder.display()))?;
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).with_context(|| format!("cannot write `{}`", path.display()))?;
    fault::point("rename a file");
    file.persist(path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
    sync_folder(folder)
}

/// Objects on their way into the repository.
pub(super) struct Objects<'a> {
    repository: &'a Repository,
    /// Folders to sync.
    touched: BTreeSet<PathBuf>,
}

impl<'a> Objects<'a> {
    pub fn new(repository: &'a Repository) -> Self {
        Self { repository, touched: BTreeSet::new() }
    }

    /// Writes a loose object; its bytes are on the disk then, its name after [`Objects::sync`].
    pub fn put(&mut self, kind: ObjectType, bytes: &[u8]) -> Result<Oid> {
        let id = Oid::hash_object(kind, bytes)?;
        let hex = id.to_string();
        let objects = self.repository.path().join("objects");
        let folder = objects.join(&hex[..2]);
        let place = folder.join(&hex[2..]);
        if fs::symlink_metadata(&place).is_err() {
            if self.repository.odb()?.exists(id) {
                return Ok(id);
            }
            let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
            write!(packed, "{} {}\0", kind.str(), bytes.len())?;
            packed.write_all(bytes)?;
            let temporary = scratch(self.repository.path()).join(&hex);
            fault::point("write an object");
            write_new(&temporary, 0o444, &packed.finish()?)?;
            match fs::create_dir(&folder) {
                Ok(()) => drop(self.touched.insert(objects)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error.into()),
            }
            fault::point("rename an object");
            fs::rename(&temporary, &place)?;
        }
        // Also of one that was there: who wrote it may have been killed before this.
        self.touched.insert(folder);
        Ok(id)
    }

    /// After this the objects outlive a power cut.
    pub fn sync(self) -> Result<()> {
        fault::point("sync the folders of objects");
        self.touched.iter().try_for_each(|folder| sync_folder(folder))
    }
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
pub(super) fn move_tip(_writer: &Writer, repository: &Repository, expected: Option<Oid>, new: Oid) -> Result<Result<(), Option<Oid>>> {
    let folder = repository.path();
    let (ours, lock) = (scratch(folder).join("tip"), branch_lock(folder));
    fault::point("write the tip");
    write_new(&ours, 0o644, format!("{new}\n").as_bytes())?;
    fault::point("lock the branch");
    if let Err(error) = take_lock(&ours, &lock) {
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
