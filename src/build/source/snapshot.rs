//! Snapshots: a listing's files as a folder of their own, the read-only lower layer of a build step.
//!
//! All in it is normalised: folders and executables 0755, other files 0644, every mtime [`MTIME`]. On disk, below `store`:
//!
//! ```text
//! .lock           held while a snapshot is made or removed
//! <hex>/          the tree of the listing with this digest
//! <hex>.listing   the boot it was made in, and its listing; without it the tree does not count
//! <hex>.lock      held (shared) by everyone who uses the tree
//! making-…        unfinished, or on its way out; removed by the next one who holds `.lock`
//! ```
//!
//! Making one costs what changed: the nearest earlier snapshot that nobody uses is turned into the new one; where all are
//! in use, unchanged files are hard links to the nearest. Files are therefore never written in place, only replaced.
//! Nothing is synced; instead a snapshot made in another boot of this machine does not count, so a power cut cannot leave
//! one with holes in it.

use std::collections::BTreeSet;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result};
use fs_err as fs;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use super::file;
use super::listing::{Entry, Kind, Listing, Xattrs, parent};
use super::scan::words;
use crate::artifact::tree;
use crate::error::Problem;
use crate::fault;
use crate::oci::digest::{Digest, Hasher};

/// Seconds since 1970: 2 January 1980, which no format (zip, FAT) is too young for in any time zone.
pub const MTIME: i64 = 315_619_200;

/// Snapshots kept beside those in use.
const KEEP: usize = 3;

/// So many differences are never too many to start from an earlier snapshot.
const FEW: usize = 50;

/// Threads that copy, and from how many files on.
const THREADS: usize = 2;
const MANY_FILES: usize = 32;

/// Bytes copied at a time.
const BUFFER: usize = 128 * 1024;

/// A snapshot in use: it stays as long as this value lives.
#[derive(Debug)]
pub struct Snapshot {
    pub path: PathBuf,
    _lease: fs::File,
}

/// The tree of `listing`, which was scanned from `root`, below `store`.
///
/// # Errors
/// A [`Problem`] when a file is not any more what the listing says.
pub fn snapshot(listing: &Listing, root: &Path, store: &Path) -> Result<Snapshot> {
    let digest = listing.digest();
    fs::create_dir_all(store)?;
    let store = Store { dir: store.to_owned(), boot: boot_id() };
    let _making = store.lock(".lock", FlockOperation::LockExclusive)?.context("a lock that waits is got")?;
    store.clear()?;
    if store.read(&digest.hex()).is_none() {
        let made = store.make(listing, root, &digest);
        if made.is_err() {
            // The reason is what is told, be it that the rest cannot be removed either.
            let _ = store.clear();
        }
        made.with_context(|| format!("cannot take a snapshot of the source `{}`", root.display()))?;
    }
    let lease = store.lock(&format!("{}.lock", digest.hex()), FlockOperation::LockShared)?.context("a lock that waits is got")?;
    // The newest is the one used last.
    lease.file().set_modified(fs::metadata(store.dir.join(".lock"))?.modified()?)?;
    store.prune(KEEP)?;
    Ok(Snapshot { path: store.dir.join(digest.hex()), _lease: lease })
}

/// Names this boot of the machine; empty where that is not told.
pub(super) fn boot_id() -> String {
    tree::boot_id().unwrap_or_default()
}

struct Store {
    dir: PathBuf,
    boot: String,
}

/// An earlier snapshot to start from.
struct Base {
    hex: String,
    listing: Listing,
    /// Exclusive: it may be turned into the new one. Without, it is only linked from.
    lease: Option<fs::File>,
}

impl Store {
    /// Locks a file of the store; `None` when it does not wait and somebody holds it.
    fn lock(&self, name: &str, how: FlockOperation) -> Result<Option<fs::File>> {
        let path = self.dir.join(name);
        let file = fs::OpenOptions::new().create(true).truncate(true).write(true).open(&path)?;
        if name == ".lock" {
            // Truncating an empty file does not touch its time; writing does.
            file.file().set_len(1)?;
        }
        match rustix::fs::flock(&file, how) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(io::Error::from(error)).with_context(|| format!("cannot lock `{}`", path.display())),
        }
    }

    /// The listing of a finished snapshot of this boot.
    fn read(&self, hex: &str) -> Option<Listing> {
        let bytes = fs::read(self.dir.join(format!("{hex}.listing"))).ok()?;
        let listing = bytes.strip_prefix(self.boot.as_bytes())?.strip_prefix(b"\n")?;
        fs::symlink_metadata(self.dir.join(hex)).ok()?;
        (Digest::of(listing).hex() == hex).then(|| Listing::decode(listing).ok())?
    }

    /// The snapshots' names, the one used last first.
    fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.len() == 64 {
                let lock = fs::metadata(self.dir.join(format!("{name}.lock")));
                names.push((lock.map(|lock| (lock.mtime(), lock.mtime_nsec())).unwrap_or_default(), name));
            }
        }
        names.sort();
        Ok(names.into_iter().rev().map(|(_, name)| name).collect())
    }

    /// Removes what a killed process left, and what another boot made.
    fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b"making-") {
                remove(&entry.path())?;
            }
        }
        for name in self.names()? {
            if self.read(&name).is_none() {
                self.remove_unused(&name)?;
            }
        }
        Ok(())
    }

    /// Removes all but the last `keep` and those in use.
    fn prune(&self, keep: usize) -> Result<()> {
        for name in self.names()?.iter().skip(keep) {
            self.remove_unused(name)?;
        }
        Ok(())
    }

    fn remove_unused(&self, hex: &str) -> Result<()> {
        let lock = format!("{hex}.lock");
        if self.lock(&lock, FlockOperation::NonBlockingLockExclusive)?.is_none() {
            return Ok(());
        }
        let gone = self.take_out(hex, "making-removed")?;
        remove(&gone)?;
        remove(&self.dir.join(lock))
    }

    /// Takes a snapshot's listing and name away, in this order, so that a half of it never counts.
    fn take_out(&self, hex: &str, name: &str) -> Result<PathBuf> {
        remove(&self.dir.join(format!("{hex}.listing")))?;
        let out = self.dir.join(name);
        fault::point("rename a snapshot away");
        fs::rename(self.dir.join(hex), &out)?;
        Ok(out)
    }

    fn make(&self, listing: &Listing, root: &Path, digest: &Digest) -> Result<()> {
        let hex = digest.hex();
        if fs::symlink_metadata(self.dir.join(&hex)).is_ok() {
            return Err(Problem::transient(format!(
                "`{}` is from before this machine was started, and in use",
                self.dir.join(&hex).display()
            ))
            .hint("wait for the other build, then run the command again")
            .into());
        }
        let work = self.dir.join("making-tree");
        let base = self.nearest(listing)?;
        match base {
            Some(Base { hex, listing: old, lease: Some(_lease) }) => {
                self.take_out(&hex, "making-tree")?;
                remove(&self.dir.join(format!("{hex}.lock")))?;
                Tree::open(&work, root)?.turn(&old, listing)?;
            }
            Some(Base { hex, listing: old, lease: None }) => {
                fs::create_dir(&work)?;
                Tree::open(&work, root)?.fill(listing, Some((&old, open_dir(&self.dir.join(hex))?)))?;
            }
            None => {
                fs::create_dir(&work)?;
                Tree::open(&work, root)?.fill(listing, None)?;
            }
        }
        fault::point("rename a snapshot");
        fs::rename(&work, self.dir.join(&hex))?;
        let beside = self.dir.join("making-listing");
        fault::point("write a snapshot's listing");
        fs::write(&beside, [self.boot.as_bytes(), b"\n", &listing.encode()].concat())?;
        fault::point("rename a snapshot's listing");
        fs::rename(&beside, self.dir.join(format!("{hex}.listing")))?;
        Ok(())
    }

    /// The snapshot with the fewest differences, one that nobody uses before one in use; `None` when
    /// half is different: that is another source.
    fn nearest(&self, listing: &Listing) -> Result<Option<Base>> {
        let mut best: Option<(bool, usize, Base)> = None;
        for hex in self.names()? {
            let Some(old) = self.read(&hex) else { continue };
            let different = super::listing::changes(&old, listing).len();
            if different > (listing.entries.len() / 2).max(FEW) {
                continue;
            }
            let lease = self.lock(&format!("{hex}.lock"), FlockOperation::NonBlockingLockExclusive)?;
            let order = (lease.is_none(), different);
            if best.as_ref().is_none_or(|(used, best, _)| order < (*used, *best)) {
                best = Some((order.0, order.1, Base { hex, listing: old, lease }));
            }
        }
        Ok(best.map(|(_, _, base)| base))
    }
}

/// A tree being made from a source.
struct Tree<'a> {
    fd: OwnedFd,
    source: OwnedFd,
    root: &'a Path,
}

impl<'a> Tree<'a> {
    fn open(work: &Path, root: &'a Path) -> Result<Self> {
        Ok(Self { fd: open_dir(work)?, source: open_dir(root)?, root })
    }

    /// Fills the empty tree; what `base` has too becomes a link to it.
    fn fill(&self, listing: &Listing, base: Option<(&Listing, OwnedFd)>) -> Result<()> {
        let same = |entry: &&Entry| {
            let old = base.as_ref().and_then(|(old, _)| old.get(&entry.path));
            matches!(entry.kind, Kind::File { .. }) && old == Some(*entry)
        };
        // The umask had a say when it was made.
        rustix::fs::fchmod(&self.fd, Mode::from_raw_mode(0o755))
            .map_err(io::Error::from)
            .context("cannot set the mode of the tree")?;
        let (kept, missing): (Vec<&Entry>, Vec<&Entry>) = listing.entries.iter().partition(same);
        self.add(&missing)?;
        if let Some((_, fd)) = &base {
            in_threads(&kept, |entry| {
                let path = entry.path.as_slice();
                rustix::fs::linkat(fd, path, &self.fd, path, AtFlags::empty()).map_err(|error| self.failed(entry, &error.into()))
            })?;
        }
        let folders = listing.entries.iter().filter(|entry| entry.kind == Kind::Directory).map(|entry| entry.path.as_slice());
        self.age(folders.chain([&b""[..]]))
    }

    /// Turns the tree of `old` into that of `new`.
    fn turn(&self, old: &Listing, new: &Listing) -> Result<()> {
        let mut touched: BTreeSet<&[u8]> = BTreeSet::new();
        let folder = |entry: &Entry| entry.kind == Kind::Directory;
        for entry in old.entries.iter().rev() {
            let same = new.get(&entry.path).is_some_and(|new| new == entry || (folder(new) && folder(entry)));
            if !same {
                let flags = if folder(entry) { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                rustix::fs::unlinkat(&self.fd, entry.path.as_slice(), flags)
                    .map_err(|error| self.failed(entry, &error.into()))?;
                touched.insert(parent(&entry.path).unwrap_or_default());
            }
        }
        let mut missing = Vec::new();
        for entry in &new.entries {
            match old.get(&entry.path) {
                Some(old) if old == entry => continue,
                Some(old) if folder(old) && folder(entry) => self.replace_xattrs(entry, &old.xattrs)?,
                _ => {
                    missing.push(entry);
                    touched.insert(parent(&entry.path).unwrap_or_default());
                }
            }
            if folder(entry) {
                touched.insert(&entry.path);
            }
        }
        self.add(&missing)?;
        // A folder that lost an entry may be gone itself.
        self.age(touched.into_iter().filter(|path| path.is_empty() || new.get(path).is_some()))
    }

    fn add(&self, missing: &[&Entry]) -> Result<()> {
        let mut files = Vec::new();
        for entry in missing {
            let path = entry.path.as_slice();
            match &entry.kind {
                Kind::Directory => {
                    rustix::fs::mkdirat(&self.fd, path, Mode::from_raw_mode(0o755))
                        .map_err(|error| self.failed(entry, &error.into()))?;
                    let fd = self.open_folder(path).map_err(|error| self.failed(entry, &error))?;
                    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o755)).map_err(|error| self.failed(entry, &error.into()))?;
                    set_xattrs(fd.as_fd(), &entry.xattrs).map_err(|error| self.failed(entry, &error))?;
                }
                Kind::Symlink { target } => {
                    rustix::fs::symlinkat(target.as_slice(), &self.fd, path)
                        .and_then(|()| rustix::fs::utimensat(&self.fd, path, &times(), AtFlags::SYMLINK_NOFOLLOW))
                        .map_err(|error| self.failed(entry, &error.into()))?;
                }
                Kind::File { .. } => files.push(*entry),
            }
        }
        in_threads(&files, |entry| self.copy(entry))
    }

    /// Copies a file's bytes without its holes, and checks that they are those of the listing.
    fn copy(&self, entry: &Entry) -> Result<()> {
        let Kind::File { executable, size, digest } = &entry.kind else { return Ok(()) };
        let path = entry.path.as_slice();
        let changed = || {
            Problem::failed(format!("`{}` of the source `{}` changed while it was read", entry.name(), self.root.display()))
                .hint("run the command again")
        };
        let mut from =
            file::open(self.source.as_fd(), path).map_err(|error| match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO) => changed().into(),
                _ => self.failed(entry, &error),
            })?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let to = rustix::fs::openat(&self.fd, path, flags, Mode::from_raw_mode(0o600))
            .map_err(|error| self.failed(entry, &error.into()))?;
        let mut to = std::fs::File::from(to);
        let copied = copy_bytes(&mut from, &mut to, *size).map_err(|error| self.failed(entry, &error))?;
        if copied != Some(*digest) {
            return Err(changed().into());
        }
        let mode = Mode::from_raw_mode(if *executable { 0o755 } else { 0o644 });
        rustix::fs::fchmod(&to, mode).map_err(|error| self.failed(entry, &error.into()))?;
        set_xattrs(to.as_fd(), &entry.xattrs).map_err(|error| self.failed(entry, &error))?;
        rustix::fs::futimens(&to, &times()).map_err(|error| self.failed(entry, &error.into()))
    }

    fn replace_xattrs(&self, entry: &Entry, old: &Xattrs) -> Result<()> {
        let fd = self.open_folder(&entry.path).map_err(|error| self.failed(entry, &error))?;
        for (name, _) in old {
            // It may not have been possible to set it.
            let _ = rustix::fs::fremovexattr(&fd, name.as_slice());
        }
        set_xattrs(fd.as_fd(), &entry.xattrs).map_err(|error| self.failed(entry, &error))
    }

    /// Gives folders their mtime back.
    fn age<'p>(&self, folders: impl IntoIterator<Item = &'p [u8]>) -> Result<()> {
        for path in folders {
            let path = if path.is_empty() { b"." } else { path };
            rustix::fs::utimensat(&self.fd, path, &times(), AtFlags::SYMLINK_NOFOLLOW).map_err(|error| {
                anyhow::Error::new(io::Error::from(error))
                    .context(format!("cannot set the time of `{}`", String::from_utf8_lossy(path)))
            })?;
        }
        Ok(())
    }

    fn open_folder(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.fd, path, flags, Mode::empty())?)
    }

    fn failed(&self, entry: &Entry, error: &io::Error) -> anyhow::Error {
        // The kind is kept: a full disk is told from the rest by it.
        let what = format!("cannot copy `{}` of the source: {}", entry.name(), words(error));
        anyhow::Error::new(io::Error::new(error.kind(), what))
    }
}

/// Does `work` for each entry, in several threads where there are many; the first error ends it.
fn in_threads(entries: &[&Entry], work: impl Fn(&Entry) -> Result<()> + Sync) -> Result<()> {
    if entries.len() < MANY_FILES {
        return entries.iter().try_for_each(|entry| work(entry));
    }
    let next = AtomicUsize::new(0);
    // Neighbours lie in one folder; who takes them together does not wait for the other's lock on it.
    let chunks: Vec<&[&Entry]> = entries.chunks(MANY_FILES).collect();
    let run = || {
        while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = chunk.iter().try_for_each(|entry| work(entry)) {
                next.store(chunks.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().expect("copying does not panic")).fold(Ok(()), Result::and)
    })
}

/// Copies up to the end, holes as holes; the digest of it all, `None` when it is not `size` bytes long.
fn copy_bytes(from: &mut std::fs::File, to: &mut std::fs::File, size: u64) -> io::Result<Option<Digest>> {
    let mut buffer = vec![0; usize::try_from(size.saturating_add(1)).map_or(BUFFER, |size| size.min(BUFFER))];
    let mut hasher = Hasher::new();
    let mut position = 0;
    let stat = rustix::fs::fstat(&*from)?;
    if stat.st_size.cast_unsigned() != size {
        return Ok(None);
    }
    if stat.st_blocks.cast_unsigned() * 512 < size {
        to.set_len(size)?;
        while let Some((start, end)) = file::next_data(&*from, position)? {
            file::zeros(&mut hasher, start - position);
            from.seek(SeekFrom::Start(start))?;
            to.seek(SeekFrom::Start(start))?;
            position = start + pump(&mut (&*from).take(end - start), to, &mut hasher, &mut buffer)?;
            if position < end {
                return Ok(None);
            }
        }
        file::zeros(&mut hasher, size.saturating_sub(position));
        return Ok(Some(hasher.finish()));
    }
    position += pump(&mut (&*from).take(size + 1), to, &mut hasher, &mut buffer)?;
    Ok((position == size).then(|| hasher.finish()))
}

fn pump(from: &mut impl io::Read, to: &mut std::fs::File, hasher: &mut Hasher, buffer: &mut [u8]) -> io::Result<u64> {
    let mut length = 0;
    loop {
        match from.read(buffer) {
            Ok(0) => return Ok(length),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                to.write_all(&buffer[..read])?;
                length += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Sets what the file system and the process' rights allow.
fn set_xattrs(fd: BorrowedFd<'_>, xattrs: &Xattrs) -> io::Result<()> {
    for (name, value) in xattrs {
        match rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) | Err(Errno::NOTSUP | Errno::PERM | Errno::ACCESS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn times() -> Timestamps {
    let time = Timespec { tv_sec: MTIME, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| anyhow::Error::new(io::Error::from(error)).context(format!("cannot open `{}`", path.display())))
}

/// Removes a file or a tree; that it is gone already is fine.
fn remove(path: &Path) -> Result<()> {
    let done = match fs::symlink_metadata(path) {
        Ok(stat) if stat.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match done {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
