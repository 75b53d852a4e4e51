//! Unpacks a layer into a folder of its own, in the form overlayfs stacks.
//!
//! In: a tar stream, ours or a stranger's. Out: the tree, with `.wh.` entries turned into
//! character devices 0/0 and opaque marks (`user.overlay.*`, as overlays in a user namespace
//! need). Nothing is ever written outside the folder: every name is resolved with the folder as
//! the root (openat2, `RESOLVE_IN_ROOT`), `..` in a name and hard links to nowhere are refused,
//! device nodes are dropped and told. Runs of zeros become holes.

use std::ffi::OsStr;
use std::io::{Read, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, Uid};
use serde::{Deserialize, Serialize};
use tar::EntryType;

use super::layer::{Whiteout, is_kept, whiteout};
use crate::error::Problem;

/// Zeros of at least this length become a hole when they are aligned to it.
const HOLE: usize = 64 << 10;

/// The next step after an archive that cannot be a root file system.
const REMAKE: &str = "make the archive of a whole root file system: `tar --numeric-owner -C ROOT -cf FILE .`";

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpacked {
    pub entries: u64,
    /// Device nodes that were left out.
    pub dropped: Vec<String>,
}

/// Unpacks the plain tar `reader` below `root`, an existing folder.
///
/// # Errors
/// An entry whose name holds `..`, a hard link to something that is not in the archive, an owner
/// that the user namespace does not map, each naming the entry; a broken archive; I/O.
pub fn unpack(reader: impl Read, root: &Path) -> Result<Unpacked> {
    let root_fd = rustix::fs::open(root, OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open `{}`", root.display()))?;
    let mut unpacker =
        Unpacker { root: root_fd, parent: None, folders: Vec::new(), result: Unpacked::default(), buffer: vec![0; 256 << 10] };
    let mut archive = tar::Archive::new(Zeros { inner: reader, run: 0 });
    for entry in archive.entries()? {
        let mut entry = entry.map_err(|error| broken(&error))?;
        let name = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&name).into_owned();
        unpacker.entry(&mut entry, &name).with_context(|| format!("cannot unpack `{shown}`"))?;
    }
    let zeros = archive.into_inner().run;
    if zeros < BLOCK {
        return Err(broken(&std::io::Error::other(if unpacker.result.entries == 0 {
            "it is empty"
        } else {
            "its end is missing"
        }))
        .into());
    }
    unpacker.finish()
}

/// Length of a header, and least length of the zeros that end an archive (POSIX ustar asks for two
/// of them; some writers leave the second one out).
const BLOCK: usize = 512;

/// Counts the zeros that were read last: an archive cut off between two entries has no other mark.
struct Zeros<R> {
    inner: R,
    run: usize,
}

impl<R: Read> Read for Zeros<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let zeros = buffer[..read].iter().rev().take_while(|byte| **byte == 0).count();
        self.run = if zeros == read { (self.run + read).min(BLOCK) } else { zeros };
        Ok(read)
    }
}

fn broken(error: &std::io::Error) -> Problem {
    // The reader's words may quote the archive: one line without control characters is told.
    let text: String =
        error.to_string().chars().map_while(|c| (!c.is_control() && c != char::REPLACEMENT_CHARACTER).then_some(c)).collect();
    let text = text.trim_end_matches(|c: char| !c.is_alphanumeric());
    Problem::failed(format!("the archive is broken: {text}"))
        .hint("is it a whole tar file, plain or compressed with gzip or zstd? `tar -tf FILE` tells")
}

struct Unpacker {
    root: OwnedFd,
    /// The folder of the last entry, since entries of one folder follow each other.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Folders and their times, set at the end: writing into a folder changes its time.
    folders: Vec<(PathBuf, i64)>,
    result: Unpacked,
    buffer: Vec<u8>,
}

/// A name made safe: relative, without `.`; `..` is an error.
fn safe(name: &[u8]) -> Result<PathBuf> {
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(name)).components() {
        match component {
            Component::Normal(part) => path.push(part),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let name = String::from_utf8_lossy(name);
                return Err(Problem::failed(format!("the archive names `{name}`, which leads out of its tree"))
                    .hint(REMAKE)
                    .into());
            }
        }
    }
    Ok(path)
}

impl Unpacker {
    fn entry(&mut self, entry: &mut tar::Entry<'_, impl Read>, name: &[u8]) -> Result<()> {
        let path = safe(name)?;
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            return Ok(());
        }
        self.result.entries += 1;
        let Some(file_name) = path.file_name() else {
            // The root itself: only its mode and owner matter.
            return if kind.is_dir() { self.folder(entry, &path) } else { Ok(()) };
        };
        let file_name = file_name.to_os_string();
        self.open_parent(path.parent().unwrap_or(Path::new("")))?;
        match whiteout(&file_name) {
            Some(Whiteout::Opaque) => {
                let parent = self.parent()?;
                return set_xattr(parent, OsStr::new("user.overlay.opaque"), b"y");
            }
            Some(Whiteout::Remove(name)) => {
                let parent = self.parent()?;
                remove(parent, &name)?;
                return rustix::fs::mknodat(parent, name.as_os_str(), rustix::fs::FileType::CharacterDevice, Mode::empty(), 0)
                    .context("cannot make a whiteout");
            }
            None => {}
        }
        match kind {
            EntryType::Directory => self.folder(entry, &path),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => self.file(entry, &file_name),
            EntryType::Symlink => {
                let target = entry.link_name_bytes().context("a symbolic link without a target")?.into_owned();
                let parent = self.parent()?;
                remove(parent, &file_name)?;
                rustix::fs::symlinkat(OsStr::from_bytes(&target), parent, file_name.as_os_str())?;
                own(parent, &file_name, entry.header())?;
                set_time(parent, &file_name, mtime(entry.header()))
            }
            EntryType::Link => {
                let target = entry.link_name_bytes().context("a hard link without a target")?.into_owned();
                self.hard_link(&target, &file_name)
            }
            EntryType::Fifo => {
                let parent = self.parent()?;
                remove(parent, &file_name)?;
                rustix::fs::mknodat(parent, file_name.as_os_str(), rustix::fs::FileType::Fifo, mode(entry.header())?, 0)?;
                own(parent, &file_name, entry.header())?;
                set_time(parent, &file_name, mtime(entry.header()))
            }
            EntryType::Block | EntryType::Char => {
                self.result.dropped.push(path.display().to_string());
                Ok(())
            }
            other => Err(Problem::failed(format!("entry `{}` is of the unknown kind {other:?}", path.display())).into()),
        }
    }

    fn parent(&self) -> Result<BorrowedFd<'_>> {
        self.parent.as_ref().map(|(_, fd)| fd.as_fd()).context("a parent folder")
    }

    /// Opens, and makes where it is missing, the folder `path` below the root.
    fn open_parent(&mut self, path: &Path) -> Result<()> {
        if self.parent.as_ref().is_some_and(|(open, _)| open == path) {
            return Ok(());
        }
        let fd = match self.open_in_root(path) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOENT) => {
                let mut made = PathBuf::new();
                for component in path.components() {
                    let Ok(above) = self.open_in_root(&made) else { break };
                    made.push(component);
                    match rustix::fs::mkdirat(&above, component.as_os_str(), Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                        Err(error) => return Err(error).with_context(|| format!("cannot make folder `{}`", made.display())),
                    }
                }
                self.open_in_root(path).map_err(|error| match error {
                    rustix::io::Errno::NOENT | rustix::io::Errno::LOOP => {
                        Problem::failed(format!("`{}` is a symbolic link to nothing in the archive", path.display()))
                            .hint(REMAKE)
                            .into()
                    }
                    error => anyhow::Error::new(error).context(format!("cannot make folder `{}`", path.display())),
                })?
            }
            Err(error) => return Err(error).with_context(|| format!("cannot open folder `{}`", path.display())),
        };
        self.parent = Some((path.to_path_buf(), fd));
        Ok(())
    }

    fn open_in_root(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        rustix::fs::openat2(
            &self.root,
            path,
            OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    }

    fn folder(&mut self, entry: &mut tar::Entry<'_, impl Read>, path: &Path) -> Result<()> {
        let name = path.file_name().unwrap_or(OsStr::new("."));
        if path.file_name().is_none() {
            self.open_parent(Path::new(""))?;
        }
        let parent = self.parent()?;
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => {
                let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
                if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
                    remove(parent, name)?;
                    rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        own(parent, name, entry.header())?;
        let folder = rustix::fs::openat(parent, name, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        rustix::fs::fchmod(&folder, mode(entry.header())?)?;
        set_xattrs(folder.as_fd(), entry)?;
        self.folders.push((path.to_path_buf(), mtime(entry.header())));
        Ok(())
    }

    fn file(&mut self, entry: &mut tar::Entry<'_, impl Read>, name: &OsStr) -> Result<()> {
        let parent = self.parent.as_ref().map(|(_, fd)| fd.as_fd()).context("a parent folder")?;
        remove(parent, name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))?;
        let mut file = std::fs::File::from(fd);
        let mut position = 0u64;
        loop {
            let mut filled = 0;
            while filled < self.buffer.len() {
                match entry.read(&mut self.buffer[filled..]).map_err(|error| broken(&error))? {
                    0 => break,
                    read => filled += read,
                }
            }
            if filled == 0 {
                break;
            }
            for piece in self.buffer[..filled].chunks(HOLE) {
                if piece.len() == HOLE && piece.iter().all(|&byte| byte == 0) {
                    file.seek(SeekFrom::Current(HOLE as i64))?;
                } else {
                    file.write_all(piece)?;
                }
                position += piece.len() as u64;
            }
        }
        file.set_len(position)?;
        own(parent, name, entry.header())?;
        rustix::fs::fchmod(&file, mode(entry.header())?)?;
        set_xattrs(file.as_fd(), entry)?;
        let time = timespec(mtime(entry.header()));
        rustix::fs::futimens(&file, &time)?;
        Ok(())
    }

    fn hard_link(&mut self, target: &[u8], name: &OsStr) -> Result<()> {
        let target = safe(target)?;
        let missing =
            || Problem::failed(format!("hard link to `{}`, which is not in the archive", target.display())).hint(REMAKE);
        let target_name = target.file_name().ok_or_else(missing)?;
        let folder = self.open_in_root(target.parent().unwrap_or(Path::new(""))).map_err(|_| missing())?;
        let parent = self.parent()?;
        let stat = rustix::fs::statat(&folder, target_name, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| missing())?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(missing().into());
        }
        if let Ok(own) = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
            && (own.st_dev, own.st_ino) == (stat.st_dev, stat.st_ino)
        {
            return Ok(());
        }
        remove(parent, name)?;
        rustix::fs::linkat(&folder, target_name, parent, name, AtFlags::empty())?;
        Ok(())
    }

    fn finish(mut self) -> Result<Unpacked> {
        for (path, time) in std::mem::take(&mut self.folders).into_iter().rev() {
            // A later entry may have replaced the folder.
            if let Ok(folder) = self.open_in_root(&path) {
                rustix::fs::futimens(&folder, &timespec(time))?;
            }
        }
        Ok(self.result)
    }
}

fn mode(header: &tar::Header) -> Result<Mode> {
    Ok(Mode::from_raw_mode(header.mode().map_err(|error| broken(&error))? & 0o7777))
}

fn mtime(header: &tar::Header) -> i64 {
    header.mtime().ok().and_then(|time| i64::try_from(time).ok()).unwrap_or(0)
}

fn timespec(seconds: i64) -> rustix::fs::Timestamps {
    let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 0 };
    rustix::fs::Timestamps { last_access: time, last_modification: time }
}

fn set_time(parent: BorrowedFd<'_>, name: &OsStr, seconds: i64) -> Result<()> {
    Ok(rustix::fs::utimensat(parent, name, &timespec(seconds), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn own(parent: BorrowedFd<'_>, name: &OsStr, header: &tar::Header) -> Result<()> {
    let id = |id: std::io::Result<u64>| -> Result<u32> {
        let id = id.map_err(|error| broken(&error))?;
        u32::try_from(id).ok().filter(|id| *id <= 65_535).ok_or_else(|| {
            Problem::failed(format!("owner {id} is over 65535, more than the range of subordinate ids holds"))
                .hint("give it to a lower id, or make the archive with `--owner=0 --group=0`")
                .into()
        })
    };
    let (uid, gid) = (id(header.uid())?, id(header.gid())?);
    rustix::fs::chownat(parent, name, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)), AtFlags::SYMLINK_NOFOLLOW)
        .with_context(|| format!("cannot set owner {uid}:{gid}"))
}

/// Removes what lies at `name`, whatever it is; nothing there is fine.
fn remove(parent: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(rustix::io::Errno::ISDIR | rustix::io::Errno::PERM) => {
            let path = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(name);
            Ok(fs_err::remove_dir_all(path)?)
        }
        Err(error) => Err(error.into()),
    }
}

fn set_xattr(fd: BorrowedFd<'_>, name: &OsStr, value: &[u8]) -> Result<()> {
    rustix::fs::fsetxattr(fd, name, value, rustix::fs::XattrFlags::empty())
        .with_context(|| format!("cannot set xattr `{}`", name.display()))
}

fn set_xattrs(fd: BorrowedFd<'_>, entry: &mut tar::Entry<'_, impl Read>) -> Result<()> {
    let Some(records) = entry.pax_extensions().map_err(|error| broken(&error))? else { return Ok(()) };
    for record in records {
        let record = record.map_err(|error| broken(&error))?;
        if let Some(name) = record.key_bytes().strip_prefix(b"SCHILY.xattr.")
            && is_kept(name)
        {
            set_xattr(fd, OsStr::from_bytes(name), record.value_bytes())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::layer::{Anything, PackOptions, pack};

    fn header(kind: EntryType, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        let uid = rustix::process::getuid().as_raw();
        header.set_uid(uid.into());
        header.set_gid(rustix::process::getgid().as_raw().into());
        header.set_mtime(7);
        header
    }

    /// An archive with names as given, however bad.
    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (name, kind, data) in entries {
            let link = matches!(kind, EntryType::Symlink | EntryType::Link);
            let mut header = header(*kind, if link { 0 } else { data.len() as u64 });
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            if link {
                header.as_old_mut().linkname[..data.len()].copy_from_slice(data.as_bytes());
            }
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
            if !link {
                bytes.extend_from_slice(data.as_bytes());
                bytes.resize(bytes.len().next_multiple_of(512), 0);
            }
        }
        bytes.resize(bytes.len() + 1024, 0);
        bytes
    }

    /// Every path below `dir`, for seeing that nothing else was written.
    fn listing(dir: &Path) -> Vec<String> {
        let mut found = Vec::new();
        for entry in ignore::WalkBuilder::new(dir).standard_filters(false).sort_by_file_name(Ord::cmp).build().skip(1) {
            found.push(entry.unwrap().path().strip_prefix(dir).unwrap().display().to_string());
        }
        found
    }

    #[test]
    fn nothing_is_written_outside() {
        let file = EntryType::Regular;
        let cases: Vec<(Vec<(&str, EntryType, &str)>, Result<Vec<&str>, &str>)> = vec![
            (vec![("/etc/x", file, "1")], Ok(vec!["etc", "etc/x"])),
            (vec![("../x", file, "1")], Err("leads out of its tree")),
            (vec![("a/../../x", file, "1")], Err("leads out of its tree")),
            (
                vec![("up", EntryType::Symlink, "../../outside"), ("up/x", file, "1")],
                Err("`up` is a symbolic link to nothing in the archive"),
            ),
            (vec![("abs", EntryType::Symlink, "/"), ("abs/x", file, "1")], Ok(vec!["abs", "x"])),
            (vec![("h", EntryType::Link, "../../etc/passwd")], Err("leads out of its tree")),
            (vec![("h", EntryType::Link, "/etc/passwd")], Err("hard link to `etc/passwd`, which is not in the archive")),
            (vec![("dev/null", EntryType::Char, "")], Ok(vec!["dev"])),
            (vec![("x", file, "1"), ("x", EntryType::Directory, ""), ("x/y", file, "2")], Ok(vec!["x", "x/y"])),
        ];
        for (entries, expected) in cases {
            let outer = tempfile::tempdir().unwrap();
            let root = outer.path().join("in/root");
            fs_err::create_dir_all(&root).unwrap();
            let result = unpack(&archive(&entries)[..], &root);
            match expected {
                Ok(paths) => {
                    result.unwrap();
                    assert_eq!(listing(&root), paths, "{entries:?}");
                }
                Err(message) => assert!(format!("{:#}", result.unwrap_err()).contains(message), "{entries:?}"),
            }
            let outside: Vec<String> = listing(outer.path()).into_iter().filter(|path| !path.starts_with("in")).collect();
            assert_eq!(outside, Vec::<String>::new(), "{entries:?}");
        }
    }

    #[test]
    fn a_truncated_archive_is_an_error() {
        let bytes = archive(&[("x", EntryType::Regular, "hello")]);
        let dir = tempfile::tempdir().unwrap();
        for (length, message) in
            [(514, "unexpected EOF"), (300, "failed to read entire block"), (1024, "its end is missing"), (0, "it is empty")]
        {
            let error = unpack(&bytes[..length], dir.path()).unwrap_err();
            assert!(format!("{error:#}").contains(&format!("the archive is broken: {message}")), "{length}: {error:#}");
        }
    }

    #[test]
    fn what_was_packed_comes_back() {
        let from = tempfile::tempdir().unwrap();
        fs_err::create_dir_all(from.path().join("a/b")).unwrap();
        fs_err::write(from.path().join("a/b/c"), b"content").unwrap();
        fs_err::hard_link(from.path().join("a/b/c"), from.path().join("a/d")).unwrap();
        fs_err::os::unix::fs::symlink("b/c", from.path().join("a/e")).unwrap();
        fs_err::File::create(from.path().join("sparse")).unwrap().set_len(4 << 20).unwrap();
        let options = |dir: &Path| PackOptions {
            dir: dir.into(),
            lowers: vec![],
            epoch: 9,
            skip: vec![],
            skip_content: vec![],
            skip_empty: vec![],
        };
        let mut first = Vec::new();
        pack(&options(from.path()), &mut first, &mut Anything).unwrap();
        let to = tempfile::tempdir().unwrap();
        unpack(&first[..], to.path()).unwrap();
        let mut second = Vec::new();
        pack(&options(to.path()), &mut second, &mut Anything).unwrap();
        assert!(first == second);
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!(fs_err::metadata(to.path().join("sparse")).unwrap().blocks(), 0);
    }
}
