//! Entries of a tree and of a folder on disk, in a form in which they can be compared.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fmt::{Debug, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use pipeline::disk::tree::{File, Kind, Tree};
use sha2::{Digest as _, Sha256};

/// Whose entries are compared how far.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// All that `stat` and the extended attributes say.
    All,
    /// What `fsck.erofs --extract` of Debian 12 does for an ordinary user: names, kinds and contents; not
    /// devices, and not the contents of files with holes, which it writes without the holes.
    Contents,
}

/// Entries by path, each as text: a difference is then readable.
pub type Entries = BTreeMap<Vec<u8>, String>;

struct Fields {
    kind: char,
    size: u64,
    content: String,
    device: (u32, u32),
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    links: u64,
    /// The first name of the same inode.
    first: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Fields {
    fn text(&self, depth: Depth) -> String {
        let Self { kind, size, content, device, mode, owner, mtime, links, first, xattrs } = self;
        let mut text = format!("{kind} {content}");
        if depth == Depth::All {
            let first = String::from_utf8_lossy(first);
            write!(text, " {size} {device:?} {mode:o} {owner:?} {mtime:?} links {links} as {first}").unwrap();
            for (name, value) in xattrs {
                let value = if value.len() > 64 { hex::encode(Sha256::digest(value)) } else { hex::encode(value) };
                write!(text, " {}={value}", String::from_utf8_lossy(name)).unwrap();
            }
        }
        text
    }
}

/// The entries a tree says there are.
pub fn expected(tree: &Tree, depth: Depth) -> Entries {
    let mut paths = tree.walk();
    paths.sort();
    let mut firsts: HashMap<u32, (Vec<u8>, u64)> = HashMap::new();
    for (path, id) in &paths {
        firsts.entry(id.0).or_insert_with(|| (path.clone(), 0)).1 += 1;
    }
    let mut entries = Entries::new();
    for (path, id) in &paths {
        let node = tree.node(*id);
        let (kind, size, content, device) = match &node.kind {
            Kind::Directory(_) => ('d', 0, String::new(), (0, 0)),
            Kind::File(file) if depth == Depth::Contents && has_hole(file) => ('f', file.size, UNKNOWN.into(), (0, 0)),
            Kind::File(file) => ('f', file.size, digest_of_file(tree, file), (0, 0)),
            Kind::CharDevice { .. } | Kind::BlockDevice { .. } if depth == Depth::Contents => continue,
            Kind::Symlink(target) => ('l', target.len() as u64, hex::encode(Sha256::digest(target)), (0, 0)),
            Kind::CharDevice { major, minor } => ('c', 0, String::new(), (*major, *minor)),
            Kind::BlockDevice { major, minor } => ('b', 0, String::new(), (*major, *minor)),
            Kind::Fifo => ('p', 0, String::new(), (0, 0)),
            Kind::Socket => ('s', 0, String::new(), (0, 0)),
        };
        let folders = tree.children(*id).filter(|(_, child)| matches!(tree.node(*child).kind, Kind::Directory(_))).count();
        let (first, names) = firsts[&id.0].clone();
        let meta = &node.meta;
        let fields = Fields {
            kind,
            size,
            content,
            device,
            mode: meta.mode.into(),
            owner: (meta.uid, meta.gid),
            mtime: (meta.mtime, meta.mtime_nsec.into()),
            links: if kind == 'd' { 2 + folders as u64 } else { names },
            first,
            xattrs: meta.xattrs.clone(),
        };
        entries.insert(path.clone(), fields.text(depth));
    }
    entries
}

/// In the place of a content that is not compared.
pub const UNKNOWN: &str = "?";

fn has_hole(file: &File) -> bool {
    file.extents.iter().map(|extent| extent.length).sum::<u64>() < file.size
}

/// Files are looked at in windows of so many bytes.
const WINDOW: u64 = 1 << 20;

/// SHA-256 of a file's blocks of 4 KiB that are not zero, with their positions: the same for a hole
/// and for zeros, so that a hole of many GiB need not be read.
#[derive(Default)]
struct Blocks(Sha256);

impl Blocks {
    /// Takes the bytes from `offset`, a multiple of 4096, on.
    fn feed(&mut self, offset: u64, bytes: &[u8]) {
        for (block, position) in bytes.chunks(4096).zip((offset..).step_by(4096)) {
            if block.iter().any(|byte| *byte != 0) {
                self.0.update(position.to_le_bytes());
                self.0.update(block);
            }
        }
    }

    fn text(self) -> String {
        hex::encode(self.0.finalize())
    }
}

/// The digest of a file as the tree says it is.
fn digest_of_file(tree: &Tree, file: &File) -> String {
    let mut blocks = Blocks::default();
    let mut extents = file.extents.as_slice();
    let mut at = 0;
    while let Some(first) = extents.first() {
        at = at.max(first.offset / WINDOW * WINDOW);
        let end = (at + WINDOW).min(file.size);
        let mut window = vec![0; (end - at) as usize];
        for extent in extents.iter().take_while(|extent| extent.offset < end) {
            let (from, to) = (extent.offset.max(at), (extent.offset + extent.length).min(end));
            let part = &mut window[(from - at) as usize..(to - at) as usize];
            tree.sources[extent.source as usize].read_exact_at(part, extent.source_offset + from - extent.offset).unwrap();
        }
        blocks.feed(at, &window);
        at = end;
        extents = &extents[extents.partition_point(|extent| extent.offset + extent.length <= end)..];
    }
    blocks.text()
}

/// The digest of a file as the kernel shows it. Of what it calls a hole a MiB in each GiB is read.
fn digest_of_found(path: &Path) -> String {
    let file = fs_err::File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let mut blocks = Blocks::default();
    let mut at = 0;
    while at < size {
        let mut window = vec![0; (size - at).min(WINDOW) as usize];
        file.file().read_exact_at(&mut window, at).unwrap();
        blocks.feed(at, &window);
        let next_gib = (at + 1).next_multiple_of(1 << 30).min(size);
        let data = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at + window.len() as u64)).unwrap_or(size);
        at = data.min(next_gib) / WINDOW * WINDOW;
        if data >= size && next_gib == size {
            break;
        }
    }
    blocks.text()
}

/// The entries below `root`, as the kernel shows them.
pub fn found(root: &Path, depth: Depth) -> Entries {
    let mut paths = vec![Vec::new()];
    let mut at = 0;
    while at < paths.len() {
        let dir = root.join(OsStr::from_bytes(&paths[at]));
        if fs_err::symlink_metadata(&dir).unwrap().is_dir() {
            for entry in fs_err::read_dir(&dir).unwrap() {
                let name = entry.unwrap().file_name();
                let slash = if paths[at].is_empty() { &b""[..] } else { b"/" };
                paths.push([&paths[at], slash, name.as_bytes()].concat());
            }
        }
        at += 1;
    }
    paths.sort();
    let mut firsts: HashMap<u64, (Vec<u8>, String)> = HashMap::new();
    let mut entries = Entries::new();
    for path in paths {
        let full = root.join(OsStr::from_bytes(&path));
        let stat = fs_err::symlink_metadata(&full).unwrap();
        let (first, content) = match firsts.get(&stat.ino()) {
            Some((first, content)) if stat.nlink() > 1 && !stat.is_dir() => (first.clone(), content.clone()),
            _ => (path.clone(), content_of(&full)),
        };
        firsts.entry(stat.ino()).or_insert_with(|| (first.clone(), content.clone()));
        let kind = kind_of(&stat);
        if depth == Depth::Contents && matches!(kind, 'c' | 'b') {
            continue;
        }
        let device =
            if matches!(kind, 'c' | 'b') { (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev())) } else { (0, 0) };
        let fields = Fields {
            kind,
            size: if matches!(kind, 'f' | 'l') { stat.size() } else { 0 },
            content,
            device,
            mode: stat.mode() & 0o7777,
            owner: (stat.uid(), stat.gid()),
            mtime: (stat.mtime(), stat.mtime_nsec()),
            links: stat.nlink(),
            first,
            xattrs: if depth == Depth::All { xattrs_of(&full) } else { BTreeMap::new() },
        };
        entries.insert(path, fields.text(depth));
    }
    entries
}

fn kind_of(stat: &std::fs::Metadata) -> char {
    let kind = stat.file_type();
    let table = [
        ('d', kind.is_dir()),
        ('f', kind.is_file()),
        ('l', kind.is_symlink()),
        ('c', kind.is_char_device()),
        ('b', kind.is_block_device()),
        ('p', kind.is_fifo()),
        ('s', kind.is_socket()),
    ];
    table.into_iter().find(|(_, is)| *is).map(|(letter, _)| letter).unwrap()
}

fn content_of(path: &Path) -> String {
    let stat = fs_err::symlink_metadata(path).unwrap();
    if stat.is_symlink() {
        return hex::encode(Sha256::digest(fs_err::read_link(path).unwrap().as_os_str().as_bytes()));
    }
    if !stat.is_file() {
        return String::new();
    }
    digest_of_found(path)
}

fn xattrs_of(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let names = xattr::list(path).unwrap();
    names.map(|name| (name.as_bytes().to_vec(), xattr::get(path, &name).unwrap().unwrap())).collect()
}

/// Fails with the first differences, each entry on a line.
#[track_caller]
pub fn assert_same(found: &Entries, expected: &Entries) {
    let keys = found.keys().chain(expected.keys().filter(|path| !found.contains_key(*path)));
    let unknown = |path| found.contains_key(path) && expected.get(path).is_some_and(|entry: &String| entry.ends_with(UNKNOWN));
    let different: Vec<_> = keys.filter(|path| found.get(*path) != expected.get(*path) && !unknown(*path)).collect();
    let cut = |entry: &dyn Debug| format!("{entry:?}").chars().take(600).collect::<String>();
    let show = |path: &&Vec<u8>| {
        let path = *path;
        let shown = cut(&String::from_utf8_lossy(path));
        format!("{shown}\n    found    {}\n    expected {}\n", cut(&found.get(path)), cut(&expected.get(path)))
    };
    let first: String = different.iter().take(8).map(show).collect();
    assert!(different.is_empty(), "{} of {} entries differ:\n{first}", different.len(), expected.len());
}
