//! Archives in cpio's "new ASCII" format, as the kernel unpacks them for an initrd
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Entries are written in the order they are given, owned by root, with one time and numbered from
//! 1, so that the same entries give the same bytes. Folders have to come before what is in them.

use std::io::{self, Read, Write};

/// Bytes the archive's length is a multiple of; what every cpio does.
const RECORD: u64 = 512;

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Writes an archive to `out`; without [`Archive::finish`] it has no end.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    /// Seconds since 1970: the time of every entry.
    time: u32,
    /// Entries so far.
    count: u32,
    /// Bytes so far.
    written: u64,
}

impl<W: Write> Archive<W> {
    pub const fn new(out: W, time: u32) -> Self {
        Self { out, time, count: 0, written: 0 }
    }

    /// A folder; `path` is without a leading slash, `mode` are the twelve permission bits.
    pub fn folder(&mut self, path: &[u8], mode: u16) -> io::Result<()> {
        self.head(path, FOLDER | u32::from(mode), 2, 0, (0, 0))
    }

    /// A file.
    ///
    /// # Errors
    /// When `out` cannot be written; `FileTooLarge` from 4 GiB on, which the format cannot hold.
    pub fn file(&mut self, path: &[u8], mode: u16, bytes: &[u8]) -> io::Result<()> {
        self.file_from(path, mode, bytes, bytes.len() as u64)
    }

    /// A file whose `length` bytes are read from `content`.
    ///
    /// # Errors
    /// As [`Archive::file`]; `UnexpectedEof` when there are fewer bytes.
    pub fn file_from(&mut self, path: &[u8], mode: u16, content: impl Read, length: u64) -> io::Result<()> {
        let size = u32::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        self.head(path, FILE | u32::from(mode), 1, size, (0, 0))?;
        let copied = io::copy(&mut content.take(length), &mut self.out)?;
        if copied < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.written += length;
        self.pad(4)
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> io::Result<()> {
        let size = u32::try_from(target.len()).map_err(io::Error::other)?;
        self.head(path, LINK | 0o777, 1, size, (0, 0))?;
        self.put(target)?;
        self.pad(4)
    }

    /// A character device such as `dev/console`, which is 5, 1.
    pub fn character_device(&mut self, path: &[u8], mode: u16, major: u32, minor: u32) -> io::Result<()> {
        self.head(path, CHARACTER_DEVICE | u32::from(mode), 1, 0, (major, minor))
    }

    /// The end of the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.put(header([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 11, 0]).as_bytes())?;
        self.put(b"TRAILER!!!\0")?;
        self.pad(RECORD)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn head(&mut self, path: &[u8], mode: u32, links: u32, size: u32, device: (u32, u32)) -> io::Result<()> {
        self.count += 1;
        let length = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        // Number, mode, owner, group, links, time, size, device it is on, device it is, name, checksum.
        let fields = [self.count, mode, 0, 0, links, self.time, size, 0, 0, device.0, device.1, length, 0];
        self.put(header(fields).as_bytes())?;
        self.put(path)?;
        self.put(&[0])?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad(&mut self, step: u64) -> io::Result<()> {
        let missing = self.written.next_multiple_of(step) - self.written;
        self.put(&[0; RECORD as usize][..missing as usize])
    }
}

fn header(fields: [u32; 13]) -> String {
    std::iter::once("070701".to_string()).chain(fields.map(|field| format!("{field:08X}"))).collect()
}
