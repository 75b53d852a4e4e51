//! What a tree becomes before anything has a place: the inodes in their order, how each keeps its
//! data, and what EROFS cannot hold.

use anyhow::Result;

use super::format::{self, BLOCK, INODE, SLOT};
use super::xattr::{BODY_MAX, Pool};
use crate::disk::tree::{Extent, File, Kind, NodeId, Tree};
use crate::error::Problem;

/// The largest chunk of a chunk-based inode: a GiB. The format allows 8 TiB, but `fsck.erofs`
/// counts a chunk's bytes in 32 bits and reads it into memory.
const CHUNK_BITS_MAX: u8 = 18;
/// A flat file with more blocks is written chunk-based, for the same reason; 1 GiB.
const FLAT_BLOCKS_MAX: u64 = 1 << CHUNK_BITS_MAX;
/// `PATH_MAX` of Linux without the ending zero.
const TARGET_MAX: usize = 4095;

/// A run of consecutive blocks of a chunk-based file that are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// First block among those stored.
    pub stored: u64,
    /// First block in the file.
    pub block: u64,
    pub blocks: u64,
}

/// How an inode keeps its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// All in one run of whole blocks, except `tail` bytes right behind the inode.
    Flat { blocks: u64, tail: u32 },
    /// In chunks of `1 << bits` blocks, of which only those in `runs` are stored, one after the
    /// other; behind the inode comes a map of the chunks.
    Chunked { bits: u8, runs: Vec<Run>, chunks: u64 },
}

impl Data {
    /// Blocks outside the inode.
    pub fn blocks(&self) -> u64 {
        match self {
            Self::Flat { blocks, .. } => *blocks,
            Self::Chunked { runs, .. } => runs.last().map_or(0, |run| run.stored + run.blocks),
        }
    }
}

/// An inode to be written.
#[derive(Debug, Clone)]
pub struct Item {
    pub node: NodeId,
    /// Without a leading slash; the first one of a node with several names.
    pub path: Vec<u8>,
    /// Of a directory: the index of the one it is in.
    pub parent: u32,
    pub nlink: u32,
    /// `i_size` in bytes.
    pub size: u64,
    /// Bytes of the inode and its extended attributes.
    pub head: u64,
    pub data: Data,
}

impl Item {
    /// Slots the inode takes with all that is right behind it.
    pub fn slots(&self) -> u64 {
        let behind = match &self.data {
            Data::Flat { tail, .. } => u64::from(*tail),
            Data::Chunked { chunks, .. } => 4 * chunks,
        };
        (self.head + behind).div_ceil(SLOT)
    }
}

/// The inodes of a tree and the attributes they share.
#[derive(Debug, Clone)]
pub struct Shape {
    /// First directories, symbolic links, devices and the like, folder by folder: all that a path
    /// is looked up with, near together. Then regular files, folder by folder.
    pub items: Vec<Item>,
    /// Index in `items` by node; `u32::MAX` for nodes without a name.
    pub by_node: Vec<u32>,
    pub pool: Pool,
}

/// A path for a person, with a leading slash.
pub fn shown(path: &[u8]) -> String {
    format!("/{}", String::from_utf8_lossy(path))
}

fn refused(path: &[u8], message: &str) -> anyhow::Error {
    Problem::failed(format!("`{}`: {message}", shown(path))).into()
}

/// Finds the inodes of `tree` and checks that EROFS can hold each.
pub fn shape(tree: &Tree) -> Result<Shape> {
    let (mut items, by_node) = walk(tree)?;
    let metas = items.iter().map(|item| (item.path.as_slice(), &tree.node(item.node).meta));
    let pool = Pool::collect(metas).map_err(|(path, message)| refused(&path, &message))?;
    for item in &mut items {
        measure(tree, &pool, item).map_err(|message| refused(&item.path, &message))?;
    }
    Ok(Shape { items, by_node, pool })
}

/// The named nodes in their order, with names and links counted.
fn walk(tree: &Tree) -> Result<(Vec<Item>, Vec<u32>)> {
    let item = |node, path, parent, nlink| {
        let data = Data::Flat { blocks: 0, tail: 0 };
        Item { node, path, parent, nlink, size: 0, head: 0, data }
    };
    let (mut items, mut files) = (Vec::new(), Vec::new());
    // Links of each node; 0 is not met yet.
    let mut links = vec![0u32; tree.nodes.len()];
    let mut open = vec![(Tree::ROOT, Vec::new(), 0)];
    while let Some((id, path, parent)) = open.pop() {
        let index = items.len() as u32;
        links[id.0 as usize] = 2;
        items.push(item(id, path.clone(), parent, 0));
        let first = open.len();
        for (name, child) in tree.children(id) {
            let mut below = path.clone();
            if !below.is_empty() {
                below.push(b'/');
            }
            below.extend(name);
            check_name(name).map_err(|message| refused(&below, message))?;
            let met = links[child.0 as usize];
            match &tree.node(child).kind {
                Kind::Directory(_) if met > 0 || child == Tree::ROOT => {
                    return Err(refused(&below, "a directory cannot have two names"));
                }
                Kind::Directory(_) => {
                    links[id.0 as usize] += 1;
                    links[child.0 as usize] = 2;
                    open.push((child, below, index));
                    continue;
                }
                Kind::File(_) if met == 0 => files.push(item(child, below, index, 0)),
                _ if met == 0 => items.push(item(child, below, index, 0)),
                _ => {}
            }
            links[child.0 as usize] += 1;
        }
        open[first..].reverse();
    }
    items.append(&mut files);
    let mut by_node = vec![u32::MAX; tree.nodes.len()];
    for (item, index) in items.iter_mut().zip(0..) {
        item.nlink = links[item.node.0 as usize];
        by_node[item.node.0 as usize] = index;
    }
    Ok((items, by_node))
}

fn check_name(name: &[u8]) -> Result<(), &'static str> {
    match name {
        b"" => Err("a name is empty"),
        b"." | b".." => Err("`.` and `..` cannot be names"),
        _ if name.len() > format::NAME_MAX => Err("the name is longer than 255 bytes, the most EROFS holds"),
        _ if name.contains(&b'/') => Err("a name contains a slash"),
        _ if name.contains(&0) => Err("a name contains a zero byte"),
        _ => Ok(()),
    }
}

/// Fills in sizes and how the data is kept; the error is what cannot be held.
fn measure(tree: &Tree, pool: &Pool, item: &mut Item) -> Result<(), String> {
    let node = tree.node(item.node);
    let body = pool.body_size(&node.meta);
    if body > BODY_MAX {
        return Err(format!("its extended attributes take {body} bytes, and EROFS holds at most {BODY_MAX} in an inode"));
    }
    if node.meta.mtime_nsec >= 1_000_000_000 {
        return Err("its time has a second or more of nanoseconds".into());
    }
    item.head = u64::from(INODE) + body;
    match &node.kind {
        Kind::Directory(names) => {
            let mut size = 0;
            let lengths = with_dots(names.keys().map(Vec::as_slice)).map(|(name, _)| name.len());
            format::directory_blocks(lengths, |_, _, used| size = u64::next_multiple_of(size, BLOCK) + used);
            (item.size, item.data) = (size, flat(item.head, size));
        }
        Kind::File(file) => {
            check_extents(tree, file)?;
            item.size = file.size;
            let flat = flat(item.head, file.size);
            item.data = match chunked(file, &flat) {
                Some(chunked) => chunked,
                None => flat,
            };
        }
        Kind::Symlink(target) if target.is_empty() => return Err("the symbolic link has no target".into()),
        Kind::Symlink(target) if target.len() > TARGET_MAX || target.contains(&0) => {
            return Err(format!("the symbolic link's target is longer than {TARGET_MAX} bytes or contains a zero byte"));
        }
        Kind::Symlink(target) => {
            item.size = target.len() as u64;
            item.data = flat(item.head, item.size);
        }
        Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor } => {
            format::device(*major, *minor).ok_or_else(|| format!("device number {major}:{minor} is too large for Linux"))?;
        }
        Kind::Fifo | Kind::Socket => {}
    }
    Ok(())
}

/// Names of a directory with `.` and `..` at their place; `true` marks these two.
pub fn with_dots<'a>(names: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = (&'a [u8], bool)> {
    let mut dots = [&b"."[..], b".."].into_iter().peekable();
    let mut names = names.peekable();
    std::iter::from_fn(move || match (dots.peek(), names.peek()) {
        (Some(dot), Some(name)) if name < dot => names.next().map(|name| (name, false)),
        (Some(_), _) => dots.next().map(|dot| (dot, true)),
        (None, _) => names.next().map(|name| (name, false)),
    })
}

/// Whole blocks, and the rest behind the inode when it does not cross a block's end there. An
/// inode starts a block or lies inside one, see [`super::space::Slots`].
fn flat(head: u64, size: u64) -> Data {
    let (blocks, tail) = (size / BLOCK, size % BLOCK);
    if head % BLOCK + tail <= BLOCK {
        Data::Flat { blocks, tail: tail as u32 }
    } else {
        Data::Flat { blocks: blocks + 1, tail: 0 }
    }
}

fn check_extents(tree: &Tree, file: &File) -> Result<(), String> {
    let mut end = 0;
    for extent in &file.extents {
        let next = extent.offset.checked_add(extent.length).filter(|next| *next <= file.size);
        end = next.filter(|_| extent.offset >= end).ok_or("the parts of its content are not in order")?;
        if extent.source as usize >= tree.sources.len() {
            return Err("its content is in a source that is not there".into());
        }
    }
    if file.size > i64::MAX as u64 { Err("the file is larger than 8 EiB".into()) } else { Ok(()) }
}

/// The chunks that take the least space, when that is less than `flat` takes or `flat` is too large.
fn chunked(file: &File, flat: &Data) -> Option<Data> {
    let Data::Flat { blocks, tail } = flat else { return None };
    let total = file.size.div_ceil(BLOCK);
    let touched = touched(&file.extents);
    if touched.iter().map(|(first, end)| end - first).sum::<u64>() == total && *blocks <= FLAT_BLOCKS_MAX {
        return None;
    }
    let (cost, bits, runs) = (0..=CHUNK_BITS_MAX)
        .map(|bits| {
            let runs = runs(&touched, total, bits);
            let stored: u64 = runs.iter().map(|run| run.blocks).sum();
            (stored * BLOCK + 4 * total.div_ceil(1 << bits), bits, runs)
        })
        .min_by_key(|(cost, ..)| *cost)?;
    let needed = *blocks > FLAT_BLOCKS_MAX || cost < blocks * BLOCK + u64::from(*tail);
    needed.then(|| Data::Chunked { bits, runs, chunks: total.div_ceil(1 << bits) })
}

/// First block and end of the runs of blocks that hold something.
fn touched(extents: &[Extent]) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for extent in extents.iter().filter(|extent| extent.length > 0) {
        let (first, end) = (extent.offset / BLOCK, (extent.offset + extent.length).div_ceil(BLOCK));
        match runs.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            _ => runs.push((first, end)),
        }
    }
    runs
}

/// The runs of stored blocks when whole chunks of `1 << bits` blocks are stored.
fn runs(touched: &[(u64, u64)], total: u64, bits: u8) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (first, end) in touched {
        let (first, end) = (first >> bits << bits, end.next_multiple_of(1 << bits).min(total));
        match runs.last_mut() {
            Some(last) if first <= last.block + last.blocks => last.blocks = last.blocks.max(end - last.block),
            last => {
                let stored = last.map_or(0, |last| last.stored + last.blocks);
                runs.push(Run { stored, block: first, blocks: end - first });
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_go_behind_the_inode_where_they_fit() {
        // Head and size; blocks and tail.
        let table = [
            ((64, 0), (0, 0)),
            ((64, 4032), (0, 4032)),
            ((64, 4033), (1, 0)),
            ((64, 4096), (1, 0)),
            ((64, 4097), (1, 1)),
            ((4096, 8191), (1, 4095)),
            // The head ends four bytes into a block, where 4095 do not fit.
            ((4100, 8191), (2, 0)),
        ];
        for ((head, size), (blocks, tail)) in table {
            assert_eq!(flat(head, size), Data::Flat { blocks, tail }, "{head} {size}");
        }
    }

    #[test]
    fn holes_make_chunks() {
        let extent = |offset, length| Extent { offset, length, source: 0, source_offset: 0 };
        let of = |size, extents: Vec<Extent>| {
            let file = File { size, extents };
            let flat = flat(64, size);
            chunked(&file, &flat).unwrap_or(flat)
        };
        const GIB: u64 = 1 << 30;
        // No hole; a hole smaller than a block; all hole; two ends of five GiB.
        assert_eq!(of(8192, vec![extent(0, 8192)]), Data::Flat { blocks: 2, tail: 0 });
        assert_eq!(of(8192, vec![extent(1, 4096)]), Data::Flat { blocks: 2, tail: 0 });
        assert_eq!(of(5 * GIB, vec![]), Data::Chunked { bits: 18, runs: vec![], chunks: 5 });
        let Data::Chunked { bits, runs, chunks } = of(5 * GIB, vec![extent(0, 1), extent(5 * GIB - 1, 1)]) else { panic!() };
        assert!(runs.iter().map(|run| run.blocks).sum::<u64>() <= 64 && chunks == (5 * GIB) >> (12 + bits));
        assert_eq!(runs[0].block, 0);
        assert_eq!(runs[1].block + runs[1].blocks, 5 * GIB / BLOCK);
        // Without a hole, but above a GiB.
        let all = Run { stored: 0, block: 0, blocks: GIB / BLOCK + 1 };
        assert_eq!(of(GIB + 1, vec![extent(0, GIB + 1)]), Data::Flat { blocks: GIB / BLOCK, tail: 1 });
        assert_eq!(
            of(GIB + 4097, vec![extent(0, GIB + 4097)]),
            Data::Chunked { bits: 18, runs: vec![Run { blocks: GIB / BLOCK + 2, ..all }], chunks: 2 }
        );
    }

    #[test]
    fn dots_are_sorted_among_the_names() {
        let names = [&b"!"[..], b".", b"..", b"..a", b".a", b"a"];
        let without = names.iter().copied().filter(|name| *name != b"." && *name != b"..");
        assert_eq!(with_dots(without).map(|(name, _)| name).collect::<Vec<_>>(), names);
        assert_eq!(with_dots([].into_iter()).collect::<Vec<_>>(), [(&b"."[..], true), (b"..", true)]);
    }
}
