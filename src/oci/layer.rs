//! Packs the upper directory of an overlay, or a whole tree, as an OCI layer.
//!
//! In: a directory as overlayfs left it (whiteouts are character devices 0/0, opaque folders
//! carry an xattr). Out: a tar stream in OCI form (image specification, "Layer"): entries sorted
//! by path, every mtime the layer's epoch, numeric owners, `.wh.` files, PAX records for long
//! names and xattrs. The same tree gives the same bytes whatever the order, holes, access times
//! or link counts on disk. Device nodes and sockets are dropped and told.
//!
//! Runs inside the user namespace: only there owners and file capabilities read as they are meant.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::error::Problem;

/// Bytes of a file given to [`Inspect::first`].
pub const HEAD: usize = 16 << 10;
/// Largest owner id that a full map of 65,536 ids can hold.
const MAX_ID: u32 = 65_535;

/// Looks at what goes into a layer and may refuse it.
pub trait Inspect {
    /// A path (relative), its mode and the first [`HEAD`] bytes of a file; an answer refuses the layer.
    fn first(&mut self, _path: &Path, _mode: u32, _bytes: &[u8]) -> Option<Problem> {
        None
    }

    /// Every entry's path, and what else is no content: the target of a link, an xattr with its name.
    fn text(&mut self, _path: &Path, _text: &[u8]) -> Option<Problem> {
        None
    }

    /// Every chunk of every file, in order; `start` marks a file's first chunk.
    fn chunk(&mut self, _path: &Path, _start: bool, _bytes: &[u8]) -> Option<Problem> {
        None
    }
}

/// An [`Inspect`] that lets everything pass.
#[derive(Debug, Clone, Copy)]
pub struct Anything;

impl Inspect for Anything {}

/// What to pack.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PackOptions {
    /// The upper directory, or the root of a whole tree.
    pub dir: PathBuf,
    /// The layers below, for telling a replaced folder from a new one. Empty: a first layer.
    pub lowers: Vec<PathBuf>,
    /// Seconds since 1970 given to every entry.
    pub epoch: i64,
    /// Relative paths left out, with everything below: mount points and what they hold.
    pub skip: Vec<PathBuf>,
    /// Relative folders that are kept themselves, but nothing in them.
    pub skip_content: Vec<PathBuf>,
    /// Relative paths left out when they are empty files or folders: targets of bind mounts.
    pub skip_empty: Vec<PathBuf>,
}

/// What was packed.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Packed {
    pub entries: u64,
    /// Device nodes and sockets that were left out.
    pub dropped: Vec<String>,
}

/// Writes the layer as a plain tar into `out`, then sets every mtime in the directory to the
/// epoch, so that later steps see what the layer says.
///
/// # Errors
/// A file owned by an id over 65,535, one that [`Inspect`] refuses, and whatever I/O says.
pub fn pack(options: &PackOptions, out: &mut impl Write, inspect: &mut dyn Inspect) -> Result<Packed> {
    let mut packer =
        Packer { options, out, inspect, links: HashMap::new(), packed: Packed::default(), buffer: vec![0; 256 << 10] };
    packer.folder(Path::new(""))?;
    // Two zero blocks end an archive (POSIX ustar).
    packer.out.write_all(&[0; 1024])?;
    Ok(packer.packed)
}

struct Packer<'a, W: Write> {
    options: &'a PackOptions,
    out: &'a mut W,
    inspect: &'a mut dyn Inspect,
    /// Device and inode of a file with several links → the first path it was packed under.
    links: HashMap<(u64, u64), PathBuf>,
    packed: Packed,
    buffer: Vec<u8>,
}

impl<W: Write> Packer<'_, W> {
    fn folder(&mut self, relative: &Path) -> Result<()> {
        let dir = self.options.dir.join(relative);
        let mut names: Vec<OsString> =
            fs_err::read_dir(&dir)?.map(|entry| entry.map(|entry| entry.file_name())).collect::<Result<_, _>>()?;
        names.sort();
        for name in names {
            self.entry(&relative.join(&name), &name)?;
        }
        Ok(())
    }

    fn entry(&mut self, relative: &Path, name: &OsStr) -> Result<()> {
        if self.options.skip.iter().any(|skip| skip == relative) {
            return Ok(());
        }
        let path = self.options.dir.join(relative);
        let meta = fs_err::symlink_metadata(&path)?;
        let kind = meta.file_type();
        if kind.is_char_device() && meta.rdev() == 0 {
            return self.whiteout(relative, name);
        }
        if kind.is_block_device() || kind.is_char_device() || kind.is_socket() {
            self.packed.dropped.push(relative.display().to_string());
            return Ok(());
        }
        if self.options.skip_empty.iter().any(|skip| skip == relative) && self.is_empty(&path, &meta)? && !self.is_below(relative)
        {
            return Ok(());
        }
        if meta.uid() > MAX_ID || meta.gid() > MAX_ID {
            let id = meta.uid().max(meta.gid());
            return Err(Problem::failed(format!(
                "`/{}` belongs to id {id}; a layer holds owners up to {MAX_ID}",
                relative.display()
            ))
            .hint("chown it to a lower id in the script")
            .into());
        }
        if kind.is_dir() {
            let mut entry = relative.as_os_str().to_os_string();
            entry.push("/");
            self.header(Path::new(&entry), &meta, tar::EntryType::Directory, 0, None)?;
            if self.is_opaque(&path)? && self.is_folder_below(relative) {
                self.marker(&relative.join(".wh..wh..opq"))?;
            }
            if !self.options.skip_content.iter().any(|skip| skip == relative) {
                self.folder(relative)?;
            }
        } else if kind.is_symlink() {
            let target = fs_err::read_link(&path)?;
            self.header(relative, &meta, tar::EntryType::Symlink, 0, Some(target.as_os_str()))?;
        } else if kind.is_fifo() {
            self.header(relative, &meta, tar::EntryType::Fifo, 0, None)?;
        } else {
            self.file(relative, &path, &meta)?;
        }
        set_mtime(&path, self.options.epoch)
    }

    fn file(&mut self, relative: &Path, path: &Path, meta: &std::fs::Metadata) -> Result<()> {
        if meta.nlink() > 1 {
            if let Some(first) = self.links.get(&(meta.dev(), meta.ino())) {
                let first = first.clone();
                return self.header(relative, meta, tar::EntryType::Link, 0, Some(first.as_os_str()));
            }
            self.links.insert((meta.dev(), meta.ino()), relative.to_path_buf());
        }
        let size = meta.len();
        self.header(relative, meta, tar::EntryType::Regular, size, None)?;
        let mut file = fs_err::File::open(path)?;
        let mut left = size;
        let mut start = true;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let read = file.read(&mut self.buffer[..want])?;
            if read == 0 {
                anyhow::bail!("`{}` became shorter while it was packed", path.display());
            }
            let chunk = &self.buffer[..read];
            let refused = if start { self.inspect.first(relative, meta.mode(), &chunk[..read.min(HEAD)]) } else { None };
            if let Some(problem) = refused.or_else(|| self.inspect.chunk(relative, start, chunk)) {
                return Err(problem.into());
            }
            self.out.write_all(chunk)?;
            start = false;
            left -= read as u64;
        }
        self.pad(size)
    }

    fn whiteout(&mut self, relative: &Path, name: &OsStr) -> Result<()> {
        let mut marker = OsString::from(".wh.");
        marker.push(name);
        self.marker(&relative.with_file_name(marker))
    }

    /// An empty file of root's: how OCI layers spell removals ("Whiteouts").
    fn marker(&mut self, relative: &Path) -> Result<()> {
        self.write_header(relative, tar::EntryType::Regular, &Owner { mode: 0o644, uid: 0, gid: 0 }, 0, None, &[])
    }

    fn header(
        &mut self,
        relative: &Path,
        meta: &std::fs::Metadata,
        kind: tar::EntryType,
        size: u64,
        link: Option<&OsStr>,
    ) -> Result<()> {
        let xattrs = match kind {
            tar::EntryType::Regular | tar::EntryType::Directory => read_xattrs(&self.options.dir.join(relative))?,
            _ => Vec::new(),
        };
        let mode = if kind == tar::EntryType::Symlink { 0o777 } else { meta.mode() & 0o7777 };
        self.write_header(relative, kind, &Owner { mode, uid: meta.uid(), gid: meta.gid() }, size, link, &xattrs)
    }

    fn write_header(
        &mut self,
        relative: &Path,
        kind: tar::EntryType,
        owner: &Owner,
        size: u64,
        link: Option<&OsStr>,
        xattrs: &[(OsString, Vec<u8>)],
    ) -> Result<()> {
        self.packed.entries += 1;
        let name = relative.as_os_str().as_bytes();
        let link = link.map(OsStr::as_bytes);
        let texts = xattrs.iter().flat_map(|(key, value)| [key.as_bytes(), value]);
        for text in [Some(name), link].into_iter().flatten().chain(texts) {
            if let Some(problem) = self.inspect.text(relative, text) {
                return Err(problem.into());
            }
        }
        let mut records = Vec::new();
        if name.len() > 100 {
            record(&mut records, b"path", name);
        }
        if let Some(link) = link.filter(|link| link.len() > 100) {
            record(&mut records, b"linkpath", link);
        }
        for (key, value) in xattrs {
            record(&mut records, &[b"SCHILY.xattr.", key.as_bytes()].concat(), value);
        }
        if !records.is_empty() {
            let length = records.len() as u64;
            let root = Owner { mode: 0o644, uid: 0, gid: 0 };
            self.raw_header(b"PaxHeaders/entry", tar::EntryType::XHeader, &root, length, None)?;
            self.out.write_all(&records)?;
            self.pad(length)?;
        }
        self.raw_header(name, kind, owner, size, link)
    }

    fn raw_header(&mut self, name: &[u8], kind: tar::EntryType, owner: &Owner, size: u64, link: Option<&[u8]>) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        let fields = header.as_ustar_mut().context("a ustar header")?;
        copy_truncated(&mut fields.name, name);
        if let Some(link) = link {
            copy_truncated(&mut fields.linkname, link);
        }
        header.set_entry_type(kind);
        header.set_mode(owner.mode);
        header.set_uid(owner.uid.into());
        header.set_gid(owner.gid.into());
        header.set_size(size);
        header.set_mtime(u64::try_from(self.options.epoch).unwrap_or(0));
        header.set_device_major(0)?;
        header.set_device_minor(0)?;
        header.set_cksum();
        self.out.write_all(header.as_bytes())?;
        Ok(())
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        let padding = (512 - size % 512) % 512;
        self.out.write_all(&[0; 512][..usize::try_from(padding).unwrap_or(0)])?;
        Ok(())
    }

    fn is_empty(&self, path: &Path, meta: &std::fs::Metadata) -> Result<bool> {
        Ok(if meta.is_dir() { fs_err::read_dir(path)?.next().is_none() } else { meta.is_file() && meta.len() == 0 })
    }

    fn is_opaque(&self, path: &Path) -> Result<bool> {
        if self.options.lowers.is_empty() {
            return Ok(false);
        }
        for name in ["user.overlay.opaque", "trusted.overlay.opaque"] {
            match xattr::get(path, name) {
                Ok(Some(value)) if value == b"y" => return Ok(true),
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::EPERM) || error.raw_os_error() == Some(libc::ENOTSUP) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot read xattrs of `{}`", path.display())),
            }
        }
        Ok(false)
    }

    fn is_below(&self, relative: &Path) -> bool {
        self.options.lowers.iter().any(|lower| lower.join(relative).symlink_metadata().is_ok())
    }

    fn is_folder_below(&self, relative: &Path) -> bool {
        self.options.lowers.iter().any(|lower| lower.join(relative).symlink_metadata().is_ok_and(|meta| meta.is_dir()))
    }
}

struct Owner {
    mode: u32,
    uid: u32,
    gid: u32,
}

fn copy_truncated(field: &mut [u8], bytes: &[u8]) {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

/// One PAX record: `LENGTH KEY=VALUE\n`, where LENGTH counts itself (POSIX pax, "Extended Header").
pub(super) fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// The xattrs a layer carries, sorted: capabilities, ACLs and the user's own; never overlayfs's.
fn read_xattrs(path: &Path) -> Result<Vec<(OsString, Vec<u8>)>> {
    let mut kept = Vec::new();
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(error) if error.raw_os_error() == Some(libc::ENOTSUP) => return Ok(kept),
        Err(error) => return Err(error).with_context(|| format!("cannot list xattrs of `{}`", path.display())),
    };
    for name in names {
        if is_kept(name.as_bytes())
            && let Some(value) = xattr::get(path, &name).with_context(|| format!("cannot read xattr of `{}`", path.display()))?
        {
            kept.push((name, value));
        }
    }
    kept.sort();
    Ok(kept)
}

/// Whether an xattr belongs in a layer.
pub fn is_kept(name: &[u8]) -> bool {
    (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
        || name == b"security.capability"
        || name.starts_with(b"system.posix_acl_")
}

/// Sets a file's mtime (and atime) without following a link.
pub fn set_mtime(path: &Path, epoch: i64) -> Result<()> {
    let time = rustix::fs::Timespec { tv_sec: epoch, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
        .with_context(|| format!("cannot set the time of `{}`", path.display()))
}

/// The name a whiteout entry removes, and whether it makes its folder opaque.
pub fn whiteout(name: &OsStr) -> Option<Whiteout> {
    let bytes = name.as_bytes();
    if bytes == b".wh..wh..opq" {
        return Some(Whiteout::Opaque);
    }
    bytes.strip_prefix(b".wh.").map(|name| Whiteout::Remove(OsString::from_vec(name.to_vec())))
}

/// What a `.wh.` entry means.
#[derive(Debug, PartialEq, Eq)]
pub enum Whiteout {
    Remove(OsString),
    Opaque,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn options(dir: &Path) -> PackOptions {
        PackOptions {
            dir: dir.into(),
            lowers: vec![],
            epoch: 1_700_000_000,
            skip: vec![],
            skip_content: vec![],
            skip_empty: vec![],
        }
    }

    fn packed(dir: &Path) -> Vec<u8> {
        let mut out = Vec::new();
        pack(&options(dir), &mut out, &mut Anything).unwrap();
        out
    }

    /// GNU tar's view of the archive.
    fn witness(tar: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), tar).unwrap();
        crate::cmd::Cmd::new("tar").args(["--numeric-owner", "--utc", "--full-time", "-tvf"]).arg(file.path()).text().unwrap()
    }

    #[test]
    fn tar_reads_what_was_packed() {
        let dir = tempfile::tempdir().unwrap();
        let long = "d".repeat(90) + "/" + &"f".repeat(90);
        fs_err::create_dir_all(dir.path().join("d".repeat(90))).unwrap();
        fs_err::write(dir.path().join(&long), b"long").unwrap();
        fs_err::write(dir.path().join("b"), b"bee").unwrap();
        fs_err::set_permissions(dir.path().join("b"), std::fs::Permissions::from_mode(0o4755)).unwrap();
        fs_err::hard_link(dir.path().join("b"), dir.path().join("c")).unwrap();
        fs_err::os::unix::fs::symlink("../x/./y", dir.path().join("a")).unwrap();
        let text = witness(&packed(dir.path()));
        let rows: Vec<String> = text
            .lines()
            .map(|line| {
                line.split_whitespace().filter(|word| !word.contains(['/']) || word.contains("..")).collect::<Vec<_>>().join(" ")
            })
            .collect();
        assert_eq!(rows[0], "lrwxrwxrwx 0 2023-11-14 22:13:20 a -> ../x/./y");
        assert_eq!(rows[1], "-rwsr-xr-x 3 2023-11-14 22:13:20 b");
        assert_eq!(rows[2], "hrwsr-xr-x 0 2023-11-14 22:13:20 c link to b");
        assert!(text.contains(&long));
    }

    #[test]
    fn holes_times_and_creation_order_do_not_matter() {
        let one = tempfile::tempdir().unwrap();
        let two = tempfile::tempdir().unwrap();
        fs_err::write(one.path().join("x"), vec![0; 1 << 20]).unwrap();
        fs_err::write(one.path().join("y"), b"y").unwrap();
        fs_err::write(two.path().join("y"), b"y").unwrap();
        fs_err::File::create(two.path().join("x")).unwrap().set_len(1 << 20).unwrap();
        assert!(packed(one.path()) == packed(two.path()));
        assert_eq!(fs_err::metadata(one.path().join("x")).unwrap().mtime(), 1_700_000_000);
    }

    #[test]
    fn pax_records_count_themselves() {
        let mut records = Vec::new();
        for (value, length) in [(90, 99), (91, 101)] {
            records.clear();
            record(&mut records, b"path", &vec![b'x'; value]);
            assert!(records.starts_with(format!("{length} path=").as_bytes()), "{:?}", String::from_utf8_lossy(&records[..12]));
            assert_eq!(records.len(), length);
        }
    }

    #[test]
    fn sockets_are_dropped_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        let mut out = Vec::new();
        assert_eq!(pack(&options(dir.path()), &mut out, &mut Anything).unwrap().dropped, ["s"]);
    }
}
