//! One file of a source: its bytes' digest and its attributes, read through descriptors.
//!
//! Memory is one buffer per thread whatever the size; the holes of a sparse file are not read, their zeros go straight
//! into the hash.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, OFlags, Stat};
use rustix::io::Errno;

use super::listing::Xattrs;
use crate::oci::digest::{Digest, Hasher};

/// Files up to this are read whole without looking for holes.
const WHOLE: u64 = 128 * 1024;

/// How every Git LFS pointer begins (the LFS specification, "The Pointer").
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// An LFS pointer is smaller than this.
const LFS_POINTER_SIZE: u64 = 1024;

/// What was read of a file.
#[derive(Debug, PartialEq)]
pub(super) struct Content {
    /// As it was before reading.
    pub identity: Stamp,
    /// Bytes read.
    pub size: u64,
    pub digest: Digest,
    pub xattrs: Xattrs,
    pub lfs_pointer: bool,
    /// The file was the same after reading.
    pub stable: bool,
}

/// What tells whether a file may have changed; times in nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub inode: u64,
    pub size: u64,
    pub mtime: i64,
    pub ctime: i64,
    pub mode: u32,
}

impl Stamp {
    pub fn of(stat: &Stat) -> Self {
        let nanoseconds = |seconds: i64, rest: u64| seconds.wrapping_mul(1_000_000_000).wrapping_add(rest.cast_signed());
        Self {
            inode: stat.st_ino,
            size: stat.st_size.cast_unsigned(),
            mtime: nanoseconds(stat.st_mtime, stat.st_mtime_nsec),
            ctime: nanoseconds(stat.st_ctime, stat.st_ctime_nsec),
            mode: stat.st_mode,
        }
    }

    /// Whether its owner may execute it.
    pub fn executable(&self) -> bool {
        self.mode & 0o100 != 0
    }
}

/// Reads the regular file `path` below `folder`; a link or anything else is `ELOOP` or `EINVAL`.
pub(super) fn read(folder: BorrowedFd<'_>, path: &[u8], buffer: &mut Vec<u8>) -> io::Result<Content> {
    let mut content = read_once(folder, path, buffer)?;
    if !content.stable {
        content = read_once(folder, path, buffer)?;
    }
    Ok(content)
}

fn read_once(folder: BorrowedFd<'_>, path: &[u8], buffer: &mut Vec<u8>) -> io::Result<Content> {
    let mut file = open(folder, path)?;
    let before = rustix::fs::fstat(&file)?;
    if !rustix::fs::FileType::from_raw_mode(before.st_mode).is_file() {
        return Err(Errno::INVAL.into());
    }
    let identity = Stamp::of(&before);
    let (digest, size) = digest(&mut file, buffer)?;
    // What was hashed last is still in the buffer: all of a small file.
    let lfs_pointer = size < LFS_POINTER_SIZE && buffer.starts_with(LFS_POINTER);
    let xattrs = xattrs(&file)?;
    let stable = Stamp::of(&rustix::fs::fstat(&file)?) == identity && size == identity.size;
    Ok(Content { identity, size, digest, xattrs, lfs_pointer, stable })
}

/// Opens without following a link at the end and without waiting for the other end of a FIFO.
pub(super) fn open(folder: BorrowedFd<'_>, path: &[u8]) -> io::Result<std::fs::File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(folder, path, flags, Mode::empty())?.into())
}

fn digest(file: &mut std::fs::File, buffer: &mut Vec<u8>) -> io::Result<(Digest, u64)> {
    let stat = rustix::fs::fstat(&*file)?;
    let size = stat.st_size.cast_unsigned();
    let mut hasher = Hasher::new();
    buffer.resize(usize::try_from(WHOLE).expect("128 KiB"), 0);
    let mut position = 0;
    if size > WHOLE && stat.st_blocks.cast_unsigned() * 512 < size {
        while let Some((start, end)) = next_data(&*file, position)? {
            zeros(&mut hasher, start - position);
            file.seek(SeekFrom::Start(start))?;
            position = start + hash(&mut (&*file).take(end - start), &mut hasher, buffer)?;
            if position < end {
                break;
            }
        }
        if size > position {
            zeros(&mut hasher, size - position);
            position = size;
        }
        return Ok((hasher.finish(), position));
    }
    position += hash(file, &mut hasher, buffer)?;
    if position < WHOLE {
        buffer.truncate(usize::try_from(position).expect("below 128 KiB"));
    }
    Ok((hasher.finish(), position))
}

fn hash(reader: &mut impl io::Read, hasher: &mut Hasher, buffer: &mut [u8]) -> io::Result<u64> {
    let mut length = 0;
    loop {
        // Small files come with one read; the second finds the end and leaves the buffer as it is.
        match reader.read(buffer) {
            Ok(0) => return Ok(length),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                length += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

pub(super) fn zeros(hasher: &mut Hasher, mut length: u64) {
    static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
    while length > 0 {
        let step = length.min(ZEROS.len() as u64);
        hasher.update(&ZEROS[..usize::try_from(step).expect("64 KiB")]);
        length -= step;
    }
}

/// The next stretch of a file that is not a hole, from `position` on; `None` when there is only a hole left.
/// On a file system without holes that is everything to the end (lseek(2)).
pub(super) fn next_data(file: impl AsFd, position: u64) -> io::Result<Option<(u64, u64)>> {
    use rustix::fs::SeekFrom::{Data, Hole};
    let start = match rustix::fs::seek(&file, Data(position)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match rustix::fs::seek(&file, Hole(start)) {
        Ok(end) => Ok(Some((start, end))),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The attributes that count: `user.*` without `user.overlay.*`, and `security.capability`; sorted.
pub(super) fn xattrs(file: impl AsFd) -> io::Result<Xattrs> {
    let names = match grow(|| rustix::fs::flistxattr_query(&file), |list| rustix::fs::flistxattr(&file, list)) {
        Ok(names) => names,
        Err(Errno::NOTSUP | Errno::NOSYS) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for name in names.split(|byte| *byte == 0).filter(|name| counts(name)) {
        match grow(|| rustix::fs::fgetxattr_query(&file, name), |value| rustix::fs::fgetxattr(&file, name, value)) {
            Ok(value) => found.push((name.to_vec(), value)),
            // Gone since it was listed.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    found.sort();
    Ok(found)
}

fn counts(name: &[u8]) -> bool {
    name == b"security.capability" || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
}

/// Asks for the size, then for the bytes; again when they grew in between.
fn grow(size: impl Fn() -> Result<usize, Errno>, get: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    loop {
        let size = size()?;
        if size == 0 {
            return Ok(Vec::new());
        }
        let mut bytes = vec![0; size];
        match get(&mut bytes) {
            Ok(length) => {
                bytes.truncate(length);
                return Ok(bytes);
            }
            Err(Errno::RANGE) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(path: &std::path::Path) -> Content {
        let folder = fs_err::File::open(path.parent().unwrap()).unwrap();
        let name = path.file_name().unwrap();
        read(folder.as_fd(), std::os::unix::ffi::OsStrExt::as_bytes(name), &mut Vec::new()).unwrap()
    }

    #[test]
    fn sparse_files_have_the_digest_of_their_bytes() {
        use std::os::unix::fs::FileExt as _;
        let dir = tempfile::tempdir().unwrap();
        let cases: [(&str, u64, &[u64]); 4] = [
            ("hole-in-the-middle", 3 << 20, &[0, (3 << 20) - 1]),
            ("hole-at-the-ends", 2 << 20, &[1 << 20]),
            ("only-a-hole", 1 << 20, &[]),
            ("no-hole", 100, &[0, 99]),
        ];
        for (name, size, marks) in cases {
            let path = dir.path().join(name);
            let file = fs_err::File::create(&path).unwrap();
            file.set_len(size).unwrap();
            for mark in marks {
                file.file().write_at(b"x", *mark).unwrap();
            }
            let read = content(&path);
            assert_eq!((read.digest, read.size, read.stable), (Digest::of(fs_err::read(&path).unwrap()), size, true), "{name}");
        }
    }

    #[test]
    fn five_gigabytes_of_hole_are_hashed_in_bounded_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sparse");
        fs_err::File::create(&path).unwrap().set_len(5 << 30).unwrap();
        let mut buffer = Vec::new();
        let folder = fs_err::File::open(dir.path()).unwrap();
        let read = read(folder.as_fd(), b"sparse", &mut buffer).unwrap();
        // head -c 5G /dev/zero | sha256sum
        assert_eq!(read.digest.hex(), "7f06c62352aebd8125b2a1841e2b9e1ffcbed602f381c3dcb3200200e383d1d5");
        assert_eq!((read.size, buffer.capacity() as u64 <= WHOLE), (5 << 30, true));
    }

    #[test]
    fn pointers_of_git_lfs() {
        let dir = tempfile::tempdir().unwrap();
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n";
        let large = format!("{pointer}{}", "x".repeat(1000));
        for (name, text, expected) in
            [("pointer", pointer, true), ("large", &large, false), ("other", "version 1", false), ("empty", "", false)]
        {
            fs_err::write(dir.path().join(name), text).unwrap();
            assert_eq!(content(&dir.path().join(name)).lfs_pointer, expected, "{name}");
        }
    }
}
