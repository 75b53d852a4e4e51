//! Reads a source folder into a [`Listing`].
//!
//! The walk never follows a link. What `.git`, `.gitignore` and `.s2iignore` keep out is told in [`super::ignored`]; all
//! else must be a file, a folder or a link. Files whose stamp the cache knows are not opened (see [`super::cache`]); the
//! rest is hashed, by [`THREADS`] threads when there is much of it. On an unchanged source no pattern is compiled either:
//! the cache knows which names the same rules let in.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir};
use rustix::io::Errno;

use super::cache::{Ahead, Cache, Known, Lookup, Record, Writer};
use super::file::{self, Content, Stamp};
use super::ignored::{Identity, Rules, S2iIgnore, WorkTree};
use super::listing::{Entry, Kind, Listing};
use crate::error::Problem;
use crate::oci::digest::{Digest, Hasher};

/// Threads that hash, where there is enough to do.
const THREADS: usize = 2;

/// Below this many files, and this many bytes, one thread hashes.
const MANY_FILES: usize = 32;
const MANY_BYTES: u64 = 4 << 20;

/// From this many cached paths on a second thread helps with their stamps.
const MANY_RECORDS: usize = 500;

/// How a folder is read.
#[derive(Debug, Clone, Copy)]
pub struct ScanOptions<'a> {
    /// Whether `.gitignore` counts. Not for the checkout of a commit: all in it is tracked.
    pub gitignore: bool,
    /// The stat cache of this root; a file that is made when missing.
    pub cache: Option<&'a Path>,
}

impl Default for ScanOptions<'_> {
    fn default() -> Self {
        Self { gitignore: true, cache: None }
    }
}

/// A source, as it was.
#[derive(Debug)]
pub struct Scan {
    pub listing: Listing,
    pub stats: Stats,
}

/// Where the digests of the files came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Stats {
    /// Files whose bytes were read.
    pub read: usize,
    /// Files the stat cache vouched for.
    pub cached: usize,
}

/// Reads the folder `root`.
///
/// # Errors
/// A [`Problem`] naming the file for what a source cannot hold (FIFO, socket, device, a Git LFS pointer), what cannot be
/// read, and a `.s2iignore` that is not understood.
pub fn scan(root: &Path, options: &ScanOptions<'_>) -> Result<Scan> {
    let root = fs_err::canonicalize(root).map_err(|error| {
        Problem::failed(format!("cannot read the source `{}`: {}", root.display(), words(&error)))
            .hint("check `source.path` of the pipeline")
    })?;
    let fd = open_folder(rustix::fs::CWD, root.as_os_str().as_encoded_bytes())
        .map_err(|error| Problem::failed(format!("cannot read the source `{}`: {}", root.display(), words(&error))))?;
    let (s2i, text) = S2iIgnore::load(&root)?;
    let cache = options.cache.map(Cache::load).unwrap_or_default();
    let around = if options.gitignore { WorkTree::around(&root) } else { None };
    let rules = around.as_ref().and_then(|(tree, top)| tree.rules_above(top));
    let index = around.as_ref().map_or([0; 4], |(tree, _)| tree.identity());
    let place = Place {
        rules,
        same_index: cache.index == index,
        tree: around.map(|(tree, _)| Rc::new(tree)),
        all_ignored: false,
        same_rules: false,
    };
    let ahead = Ahead::new(&cache);
    let mut walk = Walk {
        root: &root,
        gitignore: options.gitignore,
        s2i,
        s2i_digest: Digest::of(text),
        cache: Lookup::new(&ahead),
        writer: Writer::new(options.cache),
        entries: Vec::with_capacity(cache.len()),
        jobs: Vec::new(),
        names: vec![0; 64 * 1024],
        stats: Stats::default(),
    };
    std::thread::scope(|scope| {
        if cache.len() >= MANY_RECORDS {
            scope.spawn(|| ahead.run(fd.as_fd()));
        }
        let known = walk.cache.get(b"").map(|(record, _)| record);
        let done = walk.folder(fd.as_fd(), &mut Vec::new(), place, false, known);
        ahead.stop();
        done
    })?;
    let same = walk.writer.records.len() == cache.len() && cache.index == index;
    walk.finish(fd.as_fd(), index, same)
}

/// Where the walk is: what decides about the names of a folder.
#[derive(Debug, Clone)]
struct Place {
    rules: Option<Rc<Rules>>,
    tree: Option<Rc<WorkTree>>,
    /// Inside an ignored folder that holds tracked files: only those are in.
    all_ignored: bool,
    /// The cache was filled under the same rules.
    same_rules: bool,
    /// The cache was filled with the same version of the Git index.
    same_index: bool,
}

/// A file to hash: where its entry and its record are.
#[derive(Debug)]
struct Job {
    entry: usize,
    record: usize,
    size: u64,
}

struct Walk<'a> {
    root: &'a Path,
    gitignore: bool,
    s2i: S2iIgnore,
    s2i_digest: Digest,
    cache: Lookup<'a>,
    writer: Writer<'a>,
    entries: Vec<Entry>,
    jobs: Vec<Job>,
    /// Room for one reading of a folder.
    names: Vec<u8>,
    stats: Stats,
}

/// What is decided about a name.
#[derive(Debug, Clone, Copy)]
enum Verdict {
    In { ignored: bool },
    Out { listed: bool },
}

impl Walk<'_> {
    /// One folder and all below it. `path` is empty for the root, and the same again on return.
    fn folder(
        &mut self,
        fd: BorrowedFd<'_>,
        path: &mut Vec<u8>,
        place: Place,
        ignored: bool,
        known: Option<&Record>,
    ) -> Result<()> {
        let mut names = self.read_names(fd, path)?;
        names.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let place = self.enter(path, &names, place)?;
        let record = Record { ignored, known: Known::Directory { rules: self.rules_digest(&place) } };
        let place = Place { same_rules: known == Some(&record), ..place };
        self.remember(path, record, known);
        let parent = path.len();
        for (name, kind) in names {
            if name == b".git" {
                continue;
            }
            if parent > 0 {
                path.push(b'/');
            }
            path.extend(&name);
            self.entry(fd, &name, kind, path, &place)?;
            path.truncate(parent);
        }
        Ok(())
    }

    /// The place inside the folder: with its own `.gitignore`, or as a work tree of its own.
    fn enter(&self, path: &[u8], names: &[(Vec<u8>, FileType)], mut place: Place) -> Result<Place> {
        if !self.gitignore || place.all_ignored {
            return Ok(place);
        }
        let has = |wanted: &[u8]| names.binary_search_by(|(name, _)| name.as_slice().cmp(wanted)).is_ok();
        if !path.is_empty()
            && has(b".git")
            && let Some(tree) = WorkTree::inside(self.root, path)
        {
            place = Place { rules: tree.rules(), tree: Some(Rc::new(tree)), same_index: false, ..place };
        }
        if has(b".gitignore") {
            let file = self.root.join(super::listing::as_path(path)).join(".gitignore");
            let stat = fs_err::symlink_metadata(&file)?;
            if stat.is_file() {
                let text = fs_err::read(&file).map_err(|error| self.unreadable(&[path, b"/.gitignore"].concat(), &error))?;
                let skip = match &place.tree {
                    Some(tree) => tree.skip(path),
                    None if path.is_empty() => 0,
                    None => path.len() + 1,
                };
                place.rules = Rules::with(place.rules, skip, text);
            }
        }
        Ok(place)
    }

    fn entry(&mut self, folder: BorrowedFd<'_>, name: &[u8], kind: FileType, path: &mut Vec<u8>, place: &Place) -> Result<()> {
        let (known, mut stamp) = self.cache.get(path).map_or((None, None), |(record, stamp)| (Some(record), stamp));
        let mut kind = kind;
        if stamp.is_none() && matches!(kind, FileType::Unknown | FileType::RegularFile) {
            match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(found) => stamp = Some(Stamp::of(&found)),
                // Gone since the folder was read.
                Err(Errno::NOENT) => return Ok(()),
                Err(error) => return Err(self.unreadable(path, &error.into())),
            }
        }
        if let Some(stamp) = stamp {
            kind = FileType::from_raw_mode(stamp.mode);
        }
        let directory = kind == FileType::Directory;
        let ignored = match self.verdict(path, directory, place, known) {
            Verdict::In { ignored } => ignored,
            Verdict::Out { listed } => {
                self.remember(path, Record { ignored: !listed, known: Known::Out { directory, listed } }, known);
                return Ok(());
            }
        };
        match (kind, stamp) {
            (FileType::Directory, _) => {
                let fd = match open_folder(folder, name) {
                    Ok(fd) => fd,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                    Err(error) => return Err(self.unreadable(path, &error)),
                };
                let xattrs = file::xattrs(&fd).map_err(|error| self.unreadable(path, &error))?;
                self.entries.push(Entry { path: path.clone(), kind: Kind::Directory, xattrs });
                let place = Place { all_ignored: place.all_ignored || ignored, ..place.clone() };
                self.folder(fd.as_fd(), path, place, ignored, known)?;
            }
            (FileType::Symlink, _) => {
                let target = match rustix::fs::readlinkat(folder, name, Vec::new()) {
                    Ok(target) => target.into_bytes(),
                    Err(Errno::NOENT) => return Ok(()),
                    Err(error) => return Err(self.unreadable(path, &error.into())),
                };
                self.entries.push(Entry { path: path.clone(), kind: Kind::Symlink { target }, xattrs: Vec::new() });
                self.remember(path, Record { ignored, known: Known::Symlink }, known);
            }
            (FileType::RegularFile, Some(stamp)) => self.file(path, stamp, ignored, known),
            (kind, _) => return Err(special(path, kind).into()),
        }
        Ok(())
    }

    /// A file: from the cache, or put down to be hashed.
    fn file(&mut self, path: &[u8], stamp: Stamp, ignored: bool, known: Option<&Record>) {
        let entry = self.entries.len();
        let kind = |digest| Kind::File { executable: stamp.executable(), size: stamp.size, digest };
        match known {
            Some(known @ Record { known: Known::File { stamp: before, racy: false, digest, xattrs }, .. })
                if *before == stamp =>
            {
                self.stats.cached += 1;
                self.entries.push(Entry { path: path.to_vec(), kind: kind(*digest), xattrs: xattrs.clone() });
                self.remember(path, Record { ignored, ..known.clone() }, Some(known));
            }
            _ => {
                self.stats.read += 1;
                self.jobs.push(Job { entry, record: self.writer.records.len(), size: stamp.size });
                let digest = Digest::from_bytes([0; 32]);
                self.entries.push(Entry { path: path.to_vec(), kind: kind(digest), xattrs: Vec::new() });
                let known = Known::File { stamp, racy: true, digest, xattrs: Vec::new() };
                self.writer.records.push((path.to_vec(), Record { ignored, known }));
            }
        }
    }

    fn verdict(&self, path: &[u8], directory: bool, place: &Place, known: Option<&Record>) -> Verdict {
        let known = known.filter(|known| place.same_rules && known.directory() == directory);
        let full = || place.tree.as_ref().map_or_else(|| path.to_vec(), |tree| tree.full(path));
        let ignored = match known {
            Some(Record { known: Known::Out { listed: true, .. }, .. }) => return Verdict::Out { listed: true },
            Some(record) => record.ignored,
            None if self.s2i.lists(path) => return Verdict::Out { listed: true },
            None => place.all_ignored || (place.rules.is_some() && Rules::ignore(place.rules.as_ref(), &full(), directory)),
        };
        let tracked = || match known {
            Some(record) if place.same_index => !matches!(record.known, Known::Out { .. }),
            _ => place.tree.as_ref().is_some_and(|tree| tree.tracks(&full(), directory)),
        };
        if ignored && !tracked() { Verdict::Out { listed: false } } else { Verdict::In { ignored } }
    }

    fn remember(&mut self, path: &[u8], record: Record, known: Option<&Record>) {
        self.writer.changed |= known != Some(&record);
        self.writer.records.push((path.to_vec(), record));
    }

    /// Stands for everything that decides about the names of a folder, but the Git index.
    fn rules_digest(&self, place: &Place) -> Digest {
        let mut hasher = Hasher::new();
        hasher
            .field([u8::from(place.all_ignored)])
            .field(Rules::digest(place.rules.as_ref()).bytes())
            .field(self.s2i_digest.bytes());
        hasher.finish()
    }

    fn read_names(&mut self, fd: BorrowedFd<'_>, path: &[u8]) -> Result<Vec<(Vec<u8>, FileType)>> {
        let mut buffer = std::mem::take(&mut self.names);
        buffer.clear();
        let mut names = Vec::new();
        let mut reader = RawDir::new(fd, buffer.spare_capacity_mut());
        while let Some(entry) = reader.next() {
            let entry = entry.map_err(|error| self.unreadable(path, &error.into()))?;
            let name = CStr::to_bytes(entry.file_name());
            if name != b"." && name != b".." {
                names.push((name.to_vec(), entry.file_type()));
            }
        }
        self.names = buffer;
        Ok(names)
    }

    /// Hashes what has to be, writes the cache, sorts.
    fn finish(mut self, root: BorrowedFd<'_>, index: Identity, same: bool) -> Result<Scan> {
        if !self.jobs.is_empty() {
            self.writer.begin()?;
        }
        for (job, content) in self.jobs.iter().zip(hash(root, &self.jobs, &self.entries)) {
            let entry = &mut self.entries[job.entry];
            let content = content.map_err(|error| unreadable(self.root, &entry.path, &error))?;
            if content.lfs_pointer {
                return Err(Problem::failed(format!(
                    "`{}` of the source is a Git LFS pointer, not the file itself",
                    entry.name()
                ))
                .hint("run `git lfs pull` in the source, then build again")
                .into());
            }
            let Content { identity: stamp, size, digest, xattrs, stable, .. } = content;
            entry.kind = Kind::File { executable: stamp.executable(), size, digest };
            entry.xattrs.clone_from(&xattrs);
            let racy = !stable || self.writer.racy(&stamp);
            self.writer.records[job.record].1.known = Known::File { stamp, racy, digest, xattrs };
        }
        self.writer.changed |= !same;
        self.writer.finish(index)?;
        self.entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Scan { listing: Listing { entries: self.entries }, stats: self.stats })
    }

    fn unreadable(&self, path: &[u8], error: &io::Error) -> anyhow::Error {
        unreadable(self.root, path, error)
    }
}

/// The contents of the jobs' files, in order.
fn hash(root: BorrowedFd<'_>, jobs: &[Job], entries: &[Entry]) -> Vec<io::Result<Content>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut buffer = Vec::new();
        let mut done = Vec::new();
        while let Some((at, job)) = Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, jobs.get(at)?))) {
            done.push((at, file::read(root, &entries[job.entry].path, &mut buffer)));
        }
        done
    };
    let many = jobs.len() >= MANY_FILES || (jobs.len() > 1 && jobs.iter().map(|job| job.size).sum::<u64>() >= MANY_BYTES);
    let mut done: Vec<(usize, io::Result<Content>)> = if many {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("hashing does not panic")).collect()
        })
    } else {
        work()
    };
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, content)| content).collect()
}

fn open_folder<'a>(folder: impl Into<BorrowedFd<'a>>, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(folder.into(), name, flags, Mode::empty())?)
}

fn special(path: &[u8], kind: FileType) -> Problem {
    let kind = match kind {
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "something that is no file, folder or link,",
    };
    let path = String::from_utf8_lossy(path);
    Problem::failed(format!("source holds {kind} `{path}`")).hint(format!("remove it or list `{path}` in .s2iignore"))
}

fn unreadable(root: &Path, path: &[u8], error: &io::Error) -> anyhow::Error {
    let name = String::from_utf8_lossy(if path.is_empty() { b"." } else { path });
    let problem = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::LOOP | Errno::INVAL | Errno::NOTDIR) => {
            Problem::failed(format!("`{name}` of the source changed while it was read")).hint("run the command again")
        }
        _ if error.kind() == io::ErrorKind::PermissionDenied => {
            Problem::failed(format!("cannot read `{name}` of the source `{}`: {}", root.display(), words(error)))
                .hint(format!("make it readable, or list `{name}` in .s2iignore"))
        }
        _ => Problem::failed(format!("cannot read `{name}` of the source `{}`: {}", root.display(), words(error))),
    };
    problem.into()
}

/// The system's words for an error, without the path before and the number behind.
pub(super) fn words(error: &io::Error) -> String {
    let text = error.to_string();
    let text = if error.raw_os_error().is_some() { &text } else { text.rsplit(": ").next().unwrap_or(&text) };
    text.split(" (os error").next().unwrap_or(text).to_owned()
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
