//! Writes a merged [`Tree`] as a layer: the other way round of [`super::flatten`].
//!
//! In: a tree, where it goes, what becomes of its owners. Out: a tar stream in OCI form, entries
//! in the order of [`Tree::walk`], so that the same tree gives the same bytes. Owners beyond what
//! a ustar header holds, times before 1970 and parts of seconds are PAX records (POSIX, "pax
//! Extended Header Keyword"). Device nodes and sockets are left out and told.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context as _, Result};

use super::layer::{is_kept, record};
use crate::disk::tree::{File, Kind, Meta, Node, NodeId, Tree};
use crate::error::Problem;

/// Largest owner a ustar header holds: seven octal digits.
const USTAR_ID_MAX: u32 = 0o7_777_777;
/// Largest size a ustar header holds: eleven octal digits.
const USTAR_SIZE_MAX: u64 = 0o77_777_777_777;
/// Bytes copied at once.
const BUFFER: usize = 256 << 10;
/// Extended attribute that holds an access control list, and the one of new files in a folder.
const ACLS: [&[u8]; 2] = [b"system.posix_acl_access", b"system.posix_acl_default"];

/// Where a tree goes and whose it becomes.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Folder of the layer, like `usr/lib/pipeline/apps/notes/root`; the tree's root gets this name.
    pub prefix: &'a str,
    /// Added to every owner.
    pub id_base: u32,
    /// Ids the tree may use, from 0.
    pub id_count: u32,
}

/// A tar stream of several trees.
#[derive(Debug)]
pub struct Writer<W: Write> {
    out: W,
    buffer: Vec<u8>,
}

impl<W: Write> Writer<W> {
    pub fn new(out: W) -> Self {
        Self { out, buffer: vec![0; BUFFER] }
    }

    /// Writes all of `tree`; answers the device nodes and sockets that were left out.
    ///
    /// # Errors
    /// An owner the place has no id for, and whatever I/O says.
    pub fn tree(&mut self, tree: &Tree, place: &Place<'_>) -> Result<Vec<String>> {
        let mut dropped = Vec::new();
        // Files with several names: where the first is.
        let mut first: BTreeMap<NodeId, Vec<u8>> = BTreeMap::new();
        for (path, id) in tree.walk() {
            let node = tree.node(id);
            let name = join(place.prefix.as_bytes(), &path);
            if matches!(node.kind, Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Socket) {
                dropped.push(String::from_utf8_lossy(&path).into_owned());
                continue;
            }
            let meta = moved(&node.meta, place).with_context(|| format!("`/{}`", String::from_utf8_lossy(&path)))?;
            if !matches!(node.kind, Kind::Directory(_)) {
                if let Some(there) = first.get(&id) {
                    self.header(&name, &meta, tar::EntryType::Link, 0, Some(there))?;
                    continue;
                }
                first.insert(id, name.clone());
            }
            self.node(tree, node, name, &meta)?;
        }
        Ok(dropped)
    }

    /// Writes a folder of root's.
    pub fn folder(&mut self, path: &str, mode: u16, mtime: i64) -> Result<()> {
        let meta = Meta { mode, mtime, ..Meta::default() };
        self.header(format!("{path}/").as_bytes(), &meta, tar::EntryType::Directory, 0, None)
    }

    /// Writes a file of root's.
    pub fn file(&mut self, path: &str, mode: u16, mtime: i64, bytes: &[u8]) -> Result<()> {
        let meta = Meta { mode, mtime, ..Meta::default() };
        self.header(path.as_bytes(), &meta, tar::EntryType::Regular, bytes.len() as u64, None)?;
        self.out.write_all(bytes)?;
        self.pad(bytes.len() as u64)
    }

    /// Writes a symbolic link of root's.
    pub fn symlink(&mut self, path: &str, target: &str, mtime: i64) -> Result<()> {
        let meta = Meta { mode: 0o777, mtime, ..Meta::default() };
        self.header(path.as_bytes(), &meta, tar::EntryType::Symlink, 0, Some(target.as_bytes()))
    }

    /// Ends the archive (two zero blocks, POSIX ustar) and gives the stream back.
    pub fn finish(mut self) -> Result<W> {
        self.out.write_all(&[0; 1024])?;
        Ok(self.out)
    }

    fn node(&mut self, tree: &Tree, node: &Node, mut name: Vec<u8>, meta: &Meta) -> Result<()> {
        match &node.kind {
            Kind::Directory(_) => {
                name.push(b'/');
                self.header(&name, meta, tar::EntryType::Directory, 0, None)
            }
            Kind::Symlink(target) => self.header(&name, meta, tar::EntryType::Symlink, 0, Some(target)),
            Kind::Fifo => self.header(&name, meta, tar::EntryType::Fifo, 0, None),
            Kind::File(file) => {
                self.header(&name, meta, tar::EntryType::Regular, file.size, None)?;
                self.content(tree, file)
            }
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } | Kind::Socket => Ok(()),
        }
    }

    fn content(&mut self, tree: &Tree, file: &File) -> Result<()> {
        let mut at = 0;
        for extent in &file.extents {
            self.zeros(extent.offset - at)?;
            let mut done = 0;
            while done < extent.length {
                let length = usize::try_from(extent.length - done).unwrap_or(usize::MAX).min(BUFFER);
                tree.sources[extent.source as usize]
                    .read_exact_at(&mut self.buffer[..length], extent.source_offset + done)
                    .context("cannot read a merged layer")?;
                self.out.write_all(&self.buffer[..length])?;
                done += length as u64;
            }
            at = extent.offset + extent.length;
        }
        self.zeros(file.size - at)?;
        self.pad(file.size)
    }

    fn zeros(&mut self, mut count: u64) -> Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while count > 0 {
            let length = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROS.len());
            self.out.write_all(&ZEROS[..length])?;
            count -= length as u64;
        }
        Ok(())
    }

    fn pad(&mut self, size: u64) -> Result<()> {
        self.zeros((512 - size % 512) % 512)
    }

    fn header(&mut self, name: &[u8], meta: &Meta, kind: tar::EntryType, size: u64, link: Option<&[u8]>) -> Result<()> {
        let mut records = Vec::new();
        if name.len() > 100 {
            record(&mut records, b"path", name);
        }
        if let Some(link) = link.filter(|link| link.len() > 100) {
            record(&mut records, b"linkpath", link);
        }
        if size > USTAR_SIZE_MAX {
            record(&mut records, b"size", size.to_string().as_bytes());
        }
        for (key, id) in [(&b"uid"[..], meta.uid), (b"gid", meta.gid)] {
            if id > USTAR_ID_MAX {
                record(&mut records, key, id.to_string().as_bytes());
            }
        }
        if meta.mtime < 0 || meta.mtime_nsec > 0 {
            record(&mut records, b"mtime", time(meta.mtime, meta.mtime_nsec).as_bytes());
        }
        if kind != tar::EntryType::Link {
            for (key, value) in &meta.xattrs {
                record(&mut records, &[b"SCHILY.xattr.", key.as_slice()].concat(), value);
            }
        }
        if !records.is_empty() {
            let root = Meta { mode: 0o644, ..Meta::default() };
            self.raw_header(b"PaxHeaders/entry", tar::EntryType::XHeader, &root, records.len() as u64, None)?;
            self.out.write_all(&records)?;
            self.pad(records.len() as u64)?;
        }
        self.raw_header(name, kind, meta, size, link)
    }

    fn raw_header(&mut self, name: &[u8], kind: tar::EntryType, meta: &Meta, size: u64, link: Option<&[u8]>) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        let fields = header.as_ustar_mut().context("a ustar header")?;
        copy_truncated(&mut fields.name, name);
        if let Some(link) = link {
            copy_truncated(&mut fields.linkname, link);
        }
        header.set_entry_type(kind);
        header.set_mode(if kind == tar::EntryType::Symlink { 0o777 } else { meta.mode.into() });
        let fitting = |id: u32| u64::from(if id > USTAR_ID_MAX { 0 } else { id });
        header.set_uid(fitting(meta.uid));
        header.set_gid(fitting(meta.gid));
        header.set_size(if size > USTAR_SIZE_MAX { 0 } else { size });
        header.set_mtime(u64::try_from(meta.mtime).unwrap_or(0));
        header.set_device_major(0)?;
        header.set_device_minor(0)?;
        header.set_cksum();
        self.out.write_all(header.as_bytes())?;
        Ok(())
    }
}

/// `meta` with its owners moved, and only the attributes a layer carries.
fn moved(meta: &Meta, place: &Place<'_>) -> Result<Meta> {
    let id = |id: u32| -> Result<u32> {
        if id >= place.id_count {
            return Err(Problem::failed(format!("owner {id} is outside the {} ids an app has", place.id_count))
                .hint("chown it to a lower id where the image is built")
                .into());
        }
        Ok(place.id_base + id)
    };
    let mut xattrs = BTreeMap::new();
    for (name, value) in meta.xattrs.iter().filter(|(name, _)| is_kept(name)) {
        let value = if ACLS.contains(&name.as_slice()) { moved_acl(value, &id)? } else { value.clone() };
        xattrs.insert(name.clone(), value);
    }
    Ok(Meta { uid: id(meta.uid)?, gid: id(meta.gid)?, xattrs, ..meta.clone() })
}

/// An access control list in the kernel's form (`linux/posix_acl_xattr.h`: version, then tag,
/// permissions and id of each entry) with the ids of named users and groups moved.
fn moved_acl(value: &[u8], id: &impl Fn(u32) -> Result<u32>) -> Result<Vec<u8>> {
    /// `ACL_USER` and `ACL_GROUP` of `linux/posix_acl.h`.
    const NAMED: [u16; 2] = [0x02, 0x08];
    let mut moved = value.to_vec();
    for entry in moved.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        if NAMED.contains(&tag) {
            let old = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            entry[4..].copy_from_slice(&id(old)?.to_le_bytes());
        }
    }
    Ok(moved)
}

/// Seconds with nine digits behind the point, which count forward, as PAX writes them.
fn time(seconds: i64, nanoseconds: u32) -> String {
    match (seconds, nanoseconds) {
        (_, 0) => seconds.to_string(),
        (0.., _) => format!("{seconds}.{nanoseconds:09}"),
        // -0.5 is stored as -1 and half a second.
        _ => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds),
    }
}

fn join(prefix: &[u8], path: &[u8]) -> Vec<u8> {
    match (prefix, path) {
        (prefix, b"") => prefix.to_vec(),
        (b"", path) => path.to_vec(),
        (prefix, path) => [prefix, b"/", path].concat(),
    }
}

fn copy_truncated(field: &mut [u8], bytes: &[u8]) {
    let length = bytes.len().min(field.len());
    field[..length].copy_from_slice(&bytes[..length]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::tree::{Extent, Source};
    use crate::oci::compress::Compression;
    use crate::oci::digest::Digest;
    use crate::oci::flatten::{Blob, flatten};

    fn meta(mode: u16, uid: u32) -> Meta {
        Meta { mode, uid, gid: uid, mtime: 1_700_000_000, ..Meta::default() }
    }

    /// A tree with one of each kind.
    fn sample() -> Tree {
        let mut tree = Tree::default();
        let bytes: &[u8] = b"#!/bin/sh\n";
        let source = tree.add_source(Source::Memory(bytes.into()));
        let extents = vec![Extent { offset: 70_000, length: bytes.len() as u64, source, source_offset: 0 }];
        let file = Kind::File(File { size: 140_000, extents });
        let mut special = meta(0o4755, 7);
        special.mtime = -2;
        special.mtime_nsec = 500_000_000;
        special.xattrs.insert(b"user.note".to_vec(), b"x".to_vec());
        special.xattrs.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
        let acl = [&2u32.to_le_bytes()[..], &[2, 0, 7, 0], &33u32.to_le_bytes(), &[4, 0, 5, 0], &u32::MAX.to_le_bytes()].concat();
        special.xattrs.insert(ACLS[0].to_vec(), acl);
        let folder = meta(0o755, 0);
        let id = tree.put(b"usr/bin/run", Node { meta: special, kind: file }, &folder);
        tree.link(b"usr/bin/also", id, &folder);
        let long = [b"d".repeat(60), b"e".repeat(60)].join(&b'/');
        tree.put(&long, Node { meta: meta(0o777, 3), kind: Kind::Symlink(b"f".repeat(130)) }, &folder);
        tree.put(b"pipe", Node { meta: meta(0o600, 65_535), kind: Kind::Fifo }, &folder);
        tree.put(b"null", Node { meta: meta(0o666, 0), kind: Kind::CharDevice { major: 1, minor: 3 } }, &folder);
        tree
    }

    fn written(tree: &Tree, place: &Place<'_>) -> (Vec<u8>, Vec<String>) {
        let mut writer = Writer::new(Vec::new());
        let dropped = writer.tree(tree, place).unwrap();
        (writer.finish().unwrap(), dropped)
    }

    const PLACE: Place<'_> = Place { prefix: "usr/lib/apps/a/root", id_base: 1_000_013_824, id_count: 65_536 };

    #[test]
    fn what_was_written_reads_back_moved() {
        let (bytes, dropped) = written(&sample(), &PLACE);
        assert_eq!(dropped, ["null"]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.tar");
        fs_err::write(&path, &bytes).unwrap();
        let blob = Blob { path, digest: Digest::of(&bytes), compression: Compression::None };
        let back = flatten(&[blob], dir.path(), 1).unwrap();
        let at = |path: &str| back.node(back.find(format!("{}/{path}", PLACE.prefix).as_bytes()).unwrap()).clone();
        let run = at("usr/bin/run");
        assert_eq!((run.meta.uid, run.meta.gid, run.meta.mode), (1_000_013_831, 1_000_013_831, 0o4755));
        assert_eq!((run.meta.mtime, run.meta.mtime_nsec), (-2, 500_000_000));
        let names: Vec<&[u8]> = run.meta.xattrs.keys().map(Vec::as_slice).collect();
        assert_eq!(names, [ACLS[0], b"user.note"]);
        assert_eq!(run.meta.xattrs[ACLS[0]][8..12], 1_000_013_857_u32.to_le_bytes());
        assert_eq!(run.meta.xattrs[ACLS[0]][16..20], u32::MAX.to_le_bytes());
        let Kind::File(file) = &run.kind else { panic!("{run:?}") };
        let content = back.read_file(file).unwrap();
        assert_eq!((content.len(), &content[70_000..70_010]), (140_000, &b"#!/bin/sh\n"[..]));
        assert!(content[..70_000].iter().all(|byte| *byte == 0));
        let prefix = PLACE.prefix.as_bytes();
        let find = |path: &str| back.find(&[prefix, b"/", path.as_bytes()].concat());
        assert_eq!(find("usr/bin/also"), find("usr/bin/run"));
        assert_eq!(find("null"), None);
        assert_eq!(at("pipe").meta.uid, 1_000_079_359);
        let long = format!("{}/{}", "d".repeat(60), "e".repeat(60));
        assert_eq!(at(&long).kind, Kind::Symlink(b"f".repeat(130)));
    }

    /// GNU tar reads the same, and a second time gives the same bytes.
    #[test]
    fn tar_agrees() {
        let (bytes, _) = written(&sample(), &PLACE);
        assert!(bytes == written(&sample(), &PLACE).0);
        let file = tempfile::NamedTempFile::new().unwrap();
        fs_err::write(file.path(), &bytes).unwrap();
        let text = crate::cmd::Cmd::new("tar").args(["--numeric-owner", "--utc", "-tvf"]).arg(file.path()).text().unwrap();
        assert!(text.contains("-rwsr-xr-x 1000013831/1000013831 140000 1969-12-31 23:59"), "{text}");
        assert!(
            text.contains("hrwsr-xr-x 1000013831/1000013831      0") || text.contains("link to usr/lib/apps/a/root/usr/bin/"),
            "{text}"
        );
    }

    #[test]
    fn an_owner_outside_the_range_is_refused() {
        let error = Writer::new(Vec::new()).tree(&sample(), &Place { id_count: 100, ..PLACE }).unwrap_err();
        assert_eq!(format!("{error:#}"), "`/pipe`: owner 65535 is outside the 100 ids an app has");
    }
}
