//! Merges the layers of an image into one tree, without unpacking anything.
//!
//! In: layer blobs, bottom first. Out: a [`Tree`] whose file contents lie in one temporary file per
//! layer (the *spool*), already without a name: it goes when the tree goes. Layers are decoded in
//! parallel; owners, modes, times and extended attributes come from the tar headers, so nobody
//! needs to be root. Runs of zeros become holes, in the spool and in the tree.
//!
//! Rules: image specification, "Changesets". Whiteouts of a layer act on the layers below it only,
//! wherever they stand in the archive. A folder that an archive implies but does not name hides
//! what is below it when that is no folder, as an overlay does.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use tar::EntryType;

use super::compress::Compression;
use super::digest::{Digest, Hasher};
use super::layer::{Whiteout, whiteout};
use crate::disk::tree::{Extent, File as Content, Kind, Meta, Node, NodeId, Source, Tree};
use crate::error::Problem;

/// Zeros of at least this length become a hole when they are aligned to it.
const HOLE: usize = 64 << 10;
/// Bytes of a path, as the kernel has it: a longer one would only be there to use up memory.
const PATH_MAX: usize = 4096;
/// Bytes read at once.
const BUFFER: usize = 1 << 20;

/// A layer blob on disk.
#[derive(Debug, Clone)]
pub struct Blob {
    pub path: PathBuf,
    /// Checked while the blob is read.
    pub digest: Digest,
    pub compression: Compression,
}

/// The merged tree of `blobs`, bottom first; spools are made in `scratch`.
///
/// # Errors
/// A blob that is not what its digest says, a broken archive, a name that leads out of the tree, a
/// hard link to nothing; each names the layer and the entry.
pub fn flatten(blobs: &[Blob], scratch: &Path, threads: usize) -> Result<Tree> {
    let decoded = decode_all(blobs, scratch, threads)?;
    let mut tree = Tree::default();
    for (blob, layer) in blobs.iter().zip(decoded) {
        apply(&mut tree, layer).with_context(|| format!("cannot merge layer {}", blob.digest))?;
    }
    Ok(tree)
}

/// One archive, decoded.
struct Decoded {
    entries: Vec<Entry>,
    /// `None`: the layer holds no bytes of files.
    spool: Option<File>,
}

struct Entry {
    /// Components.
    path: Vec<Vec<u8>>,
    what: What,
}

enum What {
    Node(Node),
    Link(Vec<Vec<u8>>),
    /// Remove this name from the layers below.
    Remove,
    /// The folder of this path hides what the layers below have in it.
    Opaque,
}

fn decode_all(blobs: &[Blob], scratch: &Path, threads: usize) -> Result<Vec<Decoded>> {
    // The largest first: it decides when all are done.
    let mut order: Vec<usize> = (0..blobs.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(fs_err::metadata(&blobs[index].path).map_or(0, |meta| meta.len())));
    let next = AtomicUsize::new(0);
    let results: Mutex<BTreeMap<usize, Result<Decoded>>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, blobs.len().max(1)) {
            scope.spawn(|| {
                while let Some(&index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let blob = &blobs[index];
                    let result = decode(blob, scratch).with_context(|| format!("cannot read layer {}", blob.digest));
                    results.lock().unwrap_or_else(PoisonError::into_inner).insert(index, result);
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

/// Hashes what it reads.
struct Digesting<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Digesting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

fn decode(blob: &Blob, scratch: &Path) -> Result<Decoded> {
    let mut reader = Digesting { inner: fs_err::File::open(&blob.path)?, hasher: Hasher::new() };
    let decoded = {
        let plain = blob.compression.reader(BufReader::with_capacity(BUFFER, &mut reader))?;
        let mut spooler = Spooler { scratch, file: None, position: 0, buffer: vec![0; BUFFER] };
        let mut entries = Vec::new();
        let mut archive = tar::Archive::new(plain);
        for entry in archive.entries()? {
            let mut entry = entry.context("the archive is broken")?;
            let name = entry.path_bytes().into_owned();
            let read = read_entry(&mut entry, &name, &mut spooler)
                .with_context(|| format!("entry `{}`", String::from_utf8_lossy(&name)))?;
            entries.extend(read);
        }
        // What follows the archive's end belongs to the blob.
        std::io::copy(&mut archive.into_inner(), &mut std::io::sink())?;
        if let Some(file) = &spooler.file {
            file.set_len(spooler.position)?;
        }
        Decoded { entries, spool: spooler.file }
    };
    std::io::copy(&mut reader, &mut std::io::sink())?;
    let digest = reader.hasher.finish();
    if digest != blob.digest {
        return Err(Problem::failed(format!("`{}` holds {digest}", blob.path.display()))
            .hint("the store is damaged; `pipeline artifact verify` lists what is")
            .into());
    }
    Ok(decoded)
}

/// Writes the contents of files one behind the other.
struct Spooler<'a> {
    scratch: &'a Path,
    file: Option<File>,
    position: u64,
    buffer: Vec<u8>,
}

impl Spooler<'_> {
    /// Takes all of `reader`. The extents name source 0; [`apply`] puts the tree's number in.
    fn take(&mut self, reader: &mut impl Read) -> Result<Content> {
        let mut content = Content::default();
        loop {
            let mut filled = 0;
            while filled < self.buffer.len() {
                match reader.read(&mut self.buffer[filled..]).context("the archive is broken")? {
                    0 => break,
                    read => filled += read,
                }
            }
            if filled == 0 {
                return Ok(content);
            }
            // Pieces between holes are written at once.
            let mut start = 0;
            for at in (0..filled).step_by(HOLE) {
                let end = (at + HOLE).min(filled);
                if end - at == HOLE && is_zero(&self.buffer[at..end]) {
                    self.write(start, at, &mut content)?;
                    start = end;
                }
            }
            self.write(start, filled, &mut content)?;
            content.size += filled as u64;
        }
    }

    /// Appends `buffer[start..end]`, which lies at `content.size + start` of the file.
    fn write(&mut self, start: usize, end: usize, content: &mut Content) -> Result<()> {
        if start == end {
            return Ok(());
        }
        let file = match &mut self.file {
            Some(file) => file,
            none => none.insert(
                tempfile::tempfile_in(self.scratch)
                    .with_context(|| format!("cannot make a file in `{}`", self.scratch.display()))?,
            ),
        };
        file.write_all_at(&self.buffer[start..end], self.position)?;
        let (offset, length) = (content.size + start as u64, (end - start) as u64);
        match content.extents.last_mut() {
            Some(last) if last.offset + last.length == offset && last.source_offset + last.length == self.position => {
                last.length += length;
            }
            _ => content.extents.push(Extent { offset, length, source: 0, source_offset: self.position }),
        }
        self.position += length;
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // In words: zeros go at memory speed.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// The components of an entry's name.
fn components(name: &[u8]) -> Result<Vec<Vec<u8>>> {
    if name.len() > PATH_MAX {
        let start = String::from_utf8_lossy(&name[..64]);
        return Err(Problem::failed(format!("the archive has a name of {} bytes, `{start}…`", name.len()))
            .hint(format!("a path has at most {PATH_MAX} bytes"))
            .into());
    }
    let parts = name.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    let parts: Vec<Vec<u8>> = parts.map(<[u8]>::to_vec).collect();
    if parts.iter().any(|part| part == b"..") {
        let name = String::from_utf8_lossy(name);
        return Err(Problem::failed(format!("the archive names `{name}`, which leads out of its tree")).into());
    }
    Ok(parts)
}

fn read_entry<R: Read>(entry: &mut tar::Entry<'_, R>, name: &[u8], spooler: &mut Spooler<'_>) -> Result<Option<Entry>> {
    let kind = entry.header().entry_type();
    if matches!(kind, EntryType::XGlobalHeader) {
        return Ok(None);
    }
    let mut path = components(name)?;
    match path.last().and_then(|last| whiteout(OsStr::from_bytes(last))) {
        Some(Whiteout::Opaque) => {
            path.pop();
            return Ok(Some(Entry { path, what: What::Opaque }));
        }
        Some(Whiteout::Remove(removed)) => {
            path.pop();
            path.push(removed.as_bytes().to_vec());
            return Ok(Some(Entry { path, what: What::Remove }));
        }
        None => {}
    }
    if kind == EntryType::Link {
        let target = entry.link_name_bytes().context("a hard link without a target")?;
        let target = components(&target)?;
        return Ok(Some(Entry { path, what: What::Link(target) }));
    }
    let meta = read_meta(entry)?;
    let device = |header: &tar::Header| -> Result<(u32, u32)> {
        Ok((header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)))
    };
    let kind = match kind {
        EntryType::Directory => Kind::Directory(BTreeMap::new()),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File(spooler.take(entry)?),
        EntryType::Symlink => Kind::Symlink(entry.link_name_bytes().context("a symbolic link without a target")?.into_owned()),
        EntryType::Fifo => Kind::Fifo,
        EntryType::Char => {
            let (major, minor) = device(entry.header())?;
            Kind::CharDevice { major, minor }
        }
        EntryType::Block => {
            let (major, minor) = device(entry.header())?;
            Kind::BlockDevice { major, minor }
        }
        other => return Err(Problem::failed(format!("an entry of the unknown kind {other:?}")).into()),
    };
    Ok(Some(Entry { path, what: What::Node(Node { meta, kind }) }))
}

/// Owner, mode, time and attributes; PAX records go before the header (POSIX, "pax Extended Header").
fn read_meta<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Meta> {
    let header = entry.header();
    let id = |id: u64| u32::try_from(id).map_err(|_| Problem::failed(format!("owner {id} is beyond 32 bits")));
    let mut meta = Meta {
        mode: (header.mode()? & 0o7777) as u16,
        uid: id(header.uid()?)?,
        gid: id(header.gid()?)?,
        mtime: header.mtime()? as i64,
        ..Meta::default()
    };
    let Some(records) = entry.pax_extensions()? else { return Ok(meta) };
    for record in records {
        let record = record?;
        let (key, value) = (record.key_bytes(), record.value_bytes());
        match key {
            b"uid" => meta.uid = number(value)?,
            b"gid" => meta.gid = number(value)?,
            b"mtime" => (meta.mtime, meta.mtime_nsec) = time(value)?,
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    meta.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
    }
    Ok(meta)
}

fn number<N: std::str::FromStr>(value: &[u8]) -> Result<N> {
    let text = String::from_utf8_lossy(value);
    text.parse().map_err(|_| Problem::failed(format!("`{text}` is no number")).into())
}

/// Seconds and nanoseconds of `-1.25` or `1700000000`: the nanoseconds count forward.
fn time(value: &[u8]) -> Result<(i64, u32)> {
    let text = String::from_utf8_lossy(value);
    let (whole, fraction) = text.split_once('.').unwrap_or((&text, ""));
    let seconds: i64 = number(whole.as_bytes())?;
    let nanoseconds: u32 = number(format!("{fraction:0<9.9}").as_bytes())?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Ok((seconds - 1, 1_000_000_000 - nanoseconds));
    }
    Ok((seconds, nanoseconds))
}

/// Puts a layer on the tree below.
fn apply(tree: &mut Tree, layer: Decoded) -> Result<()> {
    let source = layer.spool.map(|file| tree.add_source(Source::Disk(Arc::new(file))));
    for entry in &layer.entries {
        let joined = entry.path.join(&b'/');
        match entry.what {
            What::Remove => {
                tree.remove(&joined);
            }
            What::Opaque => {
                if let Some(Kind::Directory(names)) = tree.find(&joined).map(|id| &mut tree.node_mut(id).kind) {
                    names.clear();
                }
            }
            What::Node(_) | What::Link(_) => {}
        }
    }
    let folder = Meta { mode: 0o755, ..Meta::default() };
    for entry in layer.entries {
        let joined = entry.path.join(&b'/');
        match entry.what {
            What::Node(node) => put(tree, &joined, node, source, &folder),
            What::Link(target) => {
                let target = target.join(&b'/');
                let found: Option<NodeId> = tree.find(&target).filter(|id| !matches!(tree.node(*id).kind, Kind::Directory(_)));
                let id = found.ok_or_else(|| {
                    let (name, target) = (String::from_utf8_lossy(&joined), String::from_utf8_lossy(&target));
                    Problem::failed(format!("`{name}` is a hard link to `{target}`, which is not in the archive"))
                })?;
                tree.link(&joined, id, &folder);
            }
            What::Remove | What::Opaque => {}
        }
    }
    Ok(())
}

fn put(tree: &mut Tree, path: &[u8], mut node: Node, source: Option<u32>, folder: &Meta) {
    match &mut node.kind {
        Kind::File(content) => {
            for extent in &mut content.extents {
                extent.source = source.unwrap_or_default();
            }
        }
        // A folder keeps what the layers below have in it.
        Kind::Directory(_) => {
            let below = tree.find(path);
            if let Some(below) = below.filter(|id| matches!(tree.node(*id).kind, Kind::Directory(_))) {
                tree.node_mut(below).meta = node.meta;
                return;
            }
        }
        _ => {}
    }
    tree.put(path, node, folder);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive as GNU tar would write it, from a table.
    fn archive(entries: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, content) in entries {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.set_uid(7);
            header.set_gid(8);
            header.set_mtime(9);
            match kind {
                EntryType::Symlink | EntryType::Link => {
                    header.set_size(0);
                    builder.append_link(&mut header, path, OsStr::from_bytes(content)).unwrap();
                }
                _ => {
                    header.set_size(content.len() as u64);
                    builder.append_data(&mut header, path, *content).unwrap();
                }
            }
        }
        builder.into_inner().unwrap()
    }

    /// An archive with one path of ten thousand folders.
    fn deep() -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_pax_extensions([("path", "a/".repeat(10_000).as_bytes())]).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(EntryType::Directory);
        header.set_size(0);
        builder.append_data(&mut header, "a", &b""[..]).unwrap();
        builder.into_inner().unwrap()
    }

    fn merged(layers: &[Vec<u8>]) -> Result<Tree> {
        let dir = tempfile::tempdir().unwrap();
        let mut blobs = Vec::new();
        for (index, bytes) in layers.iter().enumerate() {
            let path = dir.path().join(index.to_string());
            fs_err::write(&path, bytes).unwrap();
            blobs.push(Blob { path, digest: Digest::of(bytes), compression: Compression::None });
        }
        flatten(&blobs, dir.path(), 2)
    }

    fn names(tree: &Tree) -> Vec<String> {
        tree.walk().into_iter().skip(1).map(|(path, _)| String::from_utf8(path).unwrap()).collect()
    }

    #[test]
    fn layers_merge_as_the_specification_says() {
        use EntryType::{Directory, Link, Regular, Symlink};
        let lower = archive(&[
            ("a/", Directory, b""),
            ("a/one", Regular, b"1"),
            ("a/two", Regular, b"2"),
            ("b/", Directory, b""),
            ("b/three", Regular, b"3"),
            ("lib", Symlink, b"usr/lib"),
            ("usr/lib/x", Regular, b"x"),
            ("hard", Link, b"a/one"),
        ]);
        let upper = archive(&[
            ("b/four", Regular, b"4"),
            ("b/.wh..wh..opq", Regular, b""),
            ("a/.wh.two", Regular, b""),
            ("a/one", Regular, b"new"),
            ("lib/y", Regular, b"y"),
        ]);
        let tree = merged(&[lower, upper]).unwrap();
        let expected = ["a", "a/one", "b", "b/four", "hard", "lib", "lib/y", "usr", "usr/lib", "usr/lib/x"];
        assert_eq!(names(&tree), expected);
        let read = |path: &str| String::from_utf8(tree.read(path.as_bytes()).unwrap().unwrap()).unwrap();
        assert_eq!((read("a/one"), read("hard"), read("b/four")), ("new".into(), "1".into(), "4".into()));
        let meta = &tree.node(tree.find(b"a/one").unwrap()).meta;
        assert_eq!((meta.uid, meta.gid, meta.mode, meta.mtime), (7, 8, 0o644, 9));
    }

    #[test]
    fn zeros_become_holes() {
        let mut content = vec![1; HOLE];
        content.extend(vec![0; 3 * HOLE]);
        content.extend(b"end");
        let tree = merged(&[archive(&[("f", EntryType::Regular, &content)])]).unwrap();
        let Kind::File(file) = &tree.node(tree.find(b"f").unwrap()).kind else { panic!("a file") };
        let extents: Vec<(u64, u64, u64)> = file.extents.iter().map(|e| (e.offset, e.length, e.source_offset)).collect();
        assert_eq!(extents, [(0, HOLE as u64, 0), (4 * HOLE as u64, 3, HOLE as u64)]);
        assert_eq!(tree.read_file(file).unwrap(), content);
    }

    #[test]
    fn bad_archives_are_named() {
        let good = archive(&[("f", EntryType::Regular, b"x")]);
        let cases = [
            (archive(&[("f", EntryType::Link, b"none")]), "`f` is a hard link to `none`, which is not in the archive"),
            (good[..700].to_vec(), "the archive is broken"),
            (deep(), "the archive has a name of 20000 bytes"),
        ];
        for (bytes, expected) in cases {
            let error = format!("{:#}", merged(&[bytes]).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        fs_err::write(dir.path().join("blob"), &good).unwrap();
        let blob = Blob { path: dir.path().join("blob"), digest: Digest::of(b"other"), compression: Compression::None };
        let error = format!("{:#}", flatten(&[blob], dir.path(), 1).unwrap_err());
        assert!(error.contains(&format!("holds {}", Digest::of(&good))), "{error}");
    }

    #[test]
    fn times() {
        let cases =
            [("0", (0, 0)), ("1.5", (1, 500_000_000)), ("-1.25", (-2, 750_000_000)), ("-3", (-3, 0)), ("7.0000000019", (7, 1))];
        for (text, expected) in cases {
            assert_eq!(time(text.as_bytes()).unwrap(), expected, "{text}");
        }
        assert!(time(b"x").is_err());
    }
}
