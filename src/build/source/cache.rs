//! The stat cache: what a scan need not read again, by Git's rules.
//!
//! One file per source root. It keeps, in the order of the walk, for every file its [`Stamp`] (inode, size, mtime, ctime,
//! mode) with the digest and attributes read then; for every folder the digest of the ignore rules that were in force;
//! and which names those rules ignored. A file is not read again when its stamp is the same and not *racy*: a file
//! changed in the same tick of the clock in which it was read has the stamp of before, so a stamp that is not older than
//! the beginning of the reading (minus [`GRANULARITY`]) is written with a mark and read again next time.
//!
//! The beginning of the reading is the file system's own time: the mtime of the cache's temporary file, made before the
//! first read. The cache is replaced by rename; one that is broken or of another version counts as empty.

use std::collections::HashMap;
use std::io::Write as _;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result, bail};
use rustix::fs::AtFlags;
use tempfile::NamedTempFile;

use super::file::Stamp;
use super::ignored::Identity;
use super::listing::{Reader, Xattrs, put, put_length, put_xattrs};
use crate::fault;
use crate::oci::digest::Digest;

const MAGIC: &[u8] = b"pipeline stat cache 1\n";

/// The bit of [`Record::ignored`] in a record's tag.
const IGNORED: u8 = 0x80;

/// Nanoseconds. The kernel stamps files with a clock that ticks 100 to 1000 times a second; twice the coarsest tick.
const GRANULARITY: i64 = 20_000_000;

/// Nanoseconds. File systems that keep whole seconds (ext4 with small inodes) or pairs of them (FAT).
const COARSE_GRANULARITY: i64 = 2_000_000_000;

/// What is known of a path.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    /// The rules of `.gitignore` ignore it; it is out unless Git tracks it.
    pub ignored: bool,
    pub known: Known,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Known {
    File {
        stamp: Stamp,
        /// Changed when it was read, or may have: read it again.
        racy: bool,
        digest: Digest,
        xattrs: Xattrs,
    },
    /// The rules its entries were matched with.
    Directory {
        rules: Digest,
    },
    Symlink,
    /// Not in the source; `listed` in `.s2iignore`, or ignored and not tracked.
    Out {
        directory: bool,
        listed: bool,
    },
}

impl Record {
    pub fn directory(&self) -> bool {
        matches!(self.known, Known::Directory { .. } | Known::Out { directory: true, .. })
    }
}

/// The cache of one source root, as the last scan left it.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// The version of the Git index that told which ignored files are tracked.
    pub index: Identity,
    /// In the order of the walk.
    records: Vec<(Vec<u8>, Record)>,
}

impl Cache {
    /// The cache in `file`; empty when there is none that can be used.
    pub fn load(file: &Path) -> Self {
        fs_err::read(file).ok().and_then(|bytes| Self::decode(&bytes).ok()).unwrap_or_default()
    }

    pub fn len(&self) -> usize {
        self.records.len()
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let (body, sum) = bytes.split_at_checked(bytes.len().saturating_sub(32)).context("no checksum")?;
        if Digest::of(body).bytes() != sum {
            bail!("wrong checksum");
        }
        let mut reader = Reader(body);
        if reader.take(MAGIC.len())? != MAGIC {
            bail!("another version");
        }
        let index = [reader.i64()?, reader.i64()?, reader.i64()?, reader.i64()?];
        let count = reader.length()?;
        let mut records = Vec::with_capacity(count.min(body.len() / 5));
        for _ in 0..count {
            let path = reader.string()?.to_vec();
            let tag = reader.u8()?;
            let known = match tag & !IGNORED {
                tag @ (0 | 1) => Known::File {
                    stamp: Stamp {
                        inode: reader.u64()?,
                        size: reader.u64()?,
                        mtime: reader.i64()?,
                        ctime: reader.i64()?,
                        mode: u32::try_from(reader.length()?)?,
                    },
                    racy: tag == 1,
                    digest: reader.digest()?,
                    xattrs: reader.xattrs()?,
                },
                2 => Known::Directory { rules: reader.digest()? },
                3 => Known::Symlink,
                tag @ 4..=7 => Known::Out { directory: tag & 1 != 0, listed: tag & 2 != 0 },
                _ => bail!("unknown record"),
            };
            let record = Record { ignored: tag & IGNORED != 0, known };
            records.push((path, record));
        }
        Ok(Self { index, records })
    }
}

/// Finds records by path, fast when asked in their own order.
#[derive(Debug)]
pub(super) struct Lookup<'a> {
    ahead: &'a Ahead<'a>,
    /// Where the next record is expected.
    next: usize,
    by_path: Option<HashMap<&'a [u8], usize>>,
}

impl<'a> Lookup<'a> {
    pub fn new(ahead: &'a Ahead<'a>) -> Self {
        Self { ahead, next: 0, by_path: None }
    }

    /// What is known of `path`, and its stamp of just now where the other thread has it already.
    pub fn get(&mut self, path: &[u8]) -> Option<(&'a Record, Option<Stamp>)> {
        let records = &self.ahead.cache.records;
        let mut at = self.next;
        if records.get(at).is_none_or(|(known, _)| known != path) {
            let number = |(at, (path, _)): (usize, &'a (Vec<u8>, Record))| (path.as_slice(), at);
            at = *self.by_path.get_or_insert_with(|| records.iter().enumerate().map(number).collect()).get(path)?;
        }
        self.next = at + 1;
        self.ahead.reached.store(self.next, Ordering::Relaxed);
        Some((&records[at].1, self.ahead.stamps[at].get().copied()))
    }
}

/// Takes the stamps of the files in a cache from its end towards the walk, which comes from its beginning.
#[derive(Debug)]
pub(super) struct Ahead<'a> {
    cache: &'a Cache,
    stamps: Vec<OnceLock<Stamp>>,
    reached: AtomicUsize,
}

impl<'a> Ahead<'a> {
    pub fn new(cache: &'a Cache) -> Self {
        Self { cache, stamps: std::iter::repeat_with(OnceLock::new).take(cache.len()).collect(), reached: AtomicUsize::new(0) }
    }

    /// Works until it meets the walk; what it cannot look at is left to that.
    pub fn run(&self, root: BorrowedFd<'_>) {
        for (at, (path, record)) in self.cache.records.iter().enumerate().rev() {
            if self.reached.load(Ordering::Relaxed) >= at {
                return;
            }
            if matches!(record.known, Known::File { .. })
                && let Ok(stat) = rustix::fs::statat(root, path.as_slice(), AtFlags::SYMLINK_NOFOLLOW)
            {
                // Set by nobody else.
                let _ = self.stamps[at].set(Stamp::of(&stat));
            }
        }
    }

    /// The walk is over.
    pub fn stop(&self) {
        self.reached.store(usize::MAX, Ordering::Relaxed);
    }
}

/// The next cache, while a scan fills it. With no file to write it only counts.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    file: Option<&'a Path>,
    temporary: Option<NamedTempFile>,
    /// The file system's time before the first read; nanoseconds.
    began: i64,
    pub records: Vec<(Vec<u8>, Record)>,
    /// Something is not as the last cache says.
    pub changed: bool,
}

impl<'a> Writer<'a> {
    pub fn new(file: Option<&'a Path>) -> Self {
        Self { file, temporary: None, began: i64::MIN, records: Vec::new(), changed: false }
    }

    /// To be called before the first file is read.
    pub fn begin(&mut self) -> Result<()> {
        self.changed = true;
        if let Some(file) = self.file.filter(|_| self.temporary.is_none()) {
            let folder = file.parent().context("the stat cache has no folder")?;
            fs_err::create_dir_all(folder)?;
            let temporary = tempfile::Builder::new()
                .prefix(".tmp-")
                .tempfile_in(folder)
                .with_context(|| format!("cannot write the stat cache in `{}`", folder.display()))?;
            let stat = temporary.as_file().metadata()?;
            self.began = stat.mtime().wrapping_mul(1_000_000_000).wrapping_add(stat.mtime_nsec());
            self.temporary = Some(temporary);
        }
        Ok(())
    }

    /// Whether a file with this stamp could change without getting another.
    pub fn racy(&self, stamp: &Stamp) -> bool {
        let coarse = stamp.ctime % 1_000_000_000 == 0;
        let limit = self.began.saturating_sub(if coarse { COARSE_GRANULARITY } else { GRANULARITY });
        // An mtime of the future was set by hand, and the ctime says when.
        stamp.ctime >= limit || (limit..=self.began).contains(&stamp.mtime)
    }

    /// Replaces the cache when something changed. The file may be lost when power fails, never half written.
    pub fn finish(mut self, index: Identity) -> Result<()> {
        let Some(file) = self.file.filter(|_| self.changed) else { return Ok(()) };
        self.begin()?;
        let Some(mut temporary) = self.temporary.take() else { return Ok(()) };
        temporary.write_all(&encode(&index, &self.records)).context("cannot write the stat cache")?;
        fault::point("rename the stat cache");
        temporary.persist(file).with_context(|| format!("cannot write the stat cache `{}`", file.display()))?;
        Ok(())
    }
}

fn encode(index: &Identity, records: &[(Vec<u8>, Record)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(records.len() * 128);
    out.extend(MAGIC);
    for number in index {
        out.extend(number.to_le_bytes());
    }
    put_length(&mut out, records.len());
    for (path, record) in records {
        put(&mut out, path);
        let flag = if record.ignored { IGNORED } else { 0 };
        match &record.known {
            Known::File { stamp, racy, digest, xattrs } => {
                out.push(flag + u8::from(*racy));
                out.extend(stamp.inode.to_le_bytes());
                out.extend(stamp.size.to_le_bytes());
                out.extend(stamp.mtime.to_le_bytes());
                out.extend(stamp.ctime.to_le_bytes());
                out.extend(stamp.mode.to_le_bytes());
                out.extend(digest.bytes());
                put_xattrs(&mut out, xattrs);
            }
            Known::Directory { rules } => {
                out.push(flag + 2);
                out.extend(rules.bytes());
            }
            Known::Symlink => out.push(flag + 3),
            Known::Out { directory, listed } => out.push(flag + 4 + u8::from(*directory) + 2 * u8::from(*listed)),
        }
    }
    out.extend(Digest::of(&out).bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { inode: 1, size: 2, mtime: 3, ctime: 4, mode: 0o100_644 };

    fn records() -> Vec<(Vec<u8>, Record)> {
        let xattrs = vec![(b"user.a".to_vec(), b"b".to_vec())];
        let all = [
            Known::Directory { rules: Digest::of("rules") },
            Known::File { stamp: STAMP, racy: false, digest: Digest::of("a"), xattrs },
            Known::File { stamp: STAMP, racy: true, digest: Digest::of("b"), xattrs: Vec::new() },
            Known::Symlink,
            Known::Out { directory: true, listed: false },
            Known::Out { directory: false, listed: true },
        ];
        all.into_iter()
            .enumerate()
            .map(|(at, known)| (format!("path-{at}").into_bytes(), Record { ignored: at % 2 == 1, known }))
            .collect()
    }

    #[test]
    fn decode_gives_back_what_was_encoded() {
        let bytes = encode(&[1, 2, 3, -4], &records());
        let cache = Cache::decode(&bytes).unwrap();
        assert_eq!((cache.index, cache.records), ([1, 2, 3, -4], records()));
        for at in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[at] ^= 1;
            assert!(Cache::decode(&broken).is_err(), "byte {at}");
            assert!(Cache::decode(&bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn records_are_found_in_and_out_of_order() {
        let cache = Cache { records: records(), ..Cache::default() };
        let ahead = Ahead::new(&cache);
        let mut lookup = Lookup::new(&ahead);
        for at in [0, 1, 2, 5, 0, 3, 4] {
            let (path, record) = &records()[at];
            assert_eq!(lookup.get(path), Some((record, None)), "{at}");
        }
        assert_eq!(lookup.get(b"none"), None);
    }

    #[test]
    fn racy_stamps() {
        let writer = Writer { began: 1_000_000_000_000_000_001, ..Writer::new(None) };
        let began = writer.began;
        let cases = [
            ("changed after the reading began", began + 1, began + 1, true),
            ("in the same tick", began - GRANULARITY + 1, began - GRANULARITY + 1, true),
            ("before it", began - GRANULARITY - 1, began - GRANULARITY - 1, false),
            ("mtime set back", began - 1, 5, true),
            ("mtime set into the future long ago", began - 2 * GRANULARITY, began + 1_000_000_000, false),
            ("mtime of now, ctime of a clock behind", began - 2 * GRANULARITY, began - 1, true),
            ("whole seconds, one ago", began - 1_000_000_001, began - 1_000_000_001, true),
            ("whole seconds, three ago", began - 3_000_000_001, began - 3_000_000_001, false),
        ];
        for (name, ctime, mtime, expected) in cases {
            assert_eq!(writer.racy(&Stamp { ctime, mtime, ..STAMP }), expected, "{name}");
        }
    }
}
