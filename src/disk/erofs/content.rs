//! The bytes of the parts of an image, whatever their place.

use std::collections::BTreeMap;
use std::io;

use sha2::{Digest as _, Sha256};

use super::Digest;
use super::format::{self, BLOCK, DataLayout, Inode, NULL_BLOCK};
use super::layout::Places;
use super::shape::{Data, Item, Shape, with_dots};
use crate::disk::tree::{File, Kind, NodeId, Tree};

/// Data is digested in segments of so many blocks, 1 MiB, so that several threads share a file.
pub const SEGMENT: u64 = 256;

/// The digest of data from those of its segments, in order.
pub fn combine(segments: &[[u8; 32]]) -> Digest {
    match segments {
        [only] => Digest::cut(only),
        _ => Digest::cut(&Sha256::digest(segments.concat()).into()),
    }
}

/// A tree with its shape.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    pub tree: &'a Tree,
    pub shape: &'a Shape,
}

impl Content<'_> {
    /// Whether an item is a regular file with data outside its inode.
    pub fn is_file(&self, item: &Item) -> bool {
        item.data.blocks() > 0 && matches!(self.tree.node(item.node).kind, Kind::File(_))
    }

    /// Fills `buffer`, whole blocks, with an item's data from the stored block `first` on.
    /// Directories name nids, so they need `places`.
    pub fn data(&self, item: &Item, places: Option<&Places>, first: u64, buffer: &mut [u8]) -> io::Result<()> {
        match (&self.tree.node(item.node).kind, &item.data) {
            (Kind::File(file), Data::Flat { .. }) => read(self.tree, file, first * BLOCK, buffer),
            (Kind::File(file), Data::Chunked { runs, .. }) => {
                let end = first + buffer.len() as u64 / BLOCK;
                for run in runs.iter().filter(|run| run.stored < end && first < run.stored + run.blocks) {
                    let (from, to) = (run.stored.max(first), (run.stored + run.blocks).min(end));
                    let part = &mut buffer[((from - first) * BLOCK) as usize..((to - first) * BLOCK) as usize];
                    read(self.tree, file, (run.block + from - run.stored) * BLOCK, part)?;
                }
                Ok(())
            }
            (Kind::Directory(names), _) => {
                buffer.fill(0);
                self.directory(item, names, places.expect("directories are written with places"), first, buffer);
                Ok(())
            }
            (Kind::Symlink(target), _) => {
                buffer.fill(0);
                buffer[..target.len()].copy_from_slice(target);
                Ok(())
            }
            _ => unreachable!("devices and the like have no data"),
        }
    }

    /// Fills `buffer`, zeroed, with a directory's bytes from its block `first` on; the last block
    /// may be cut where it is used no more.
    fn directory(&self, item: &Item, names: &BTreeMap<Vec<u8>, NodeId>, places: &Places, first: u64, buffer: &mut [u8]) {
        let own = self.shape.by_node[item.node.0 as usize] as usize;
        let end = first + (buffer.len() as u64).div_ceil(BLOCK);
        let lengths = with_dots(names.keys().map(Vec::as_slice)).map(|(name, _)| name.len());
        let (mut block, mut wanted) = (0, Vec::new());
        format::directory_blocks(lengths, |from, count, _| {
            if (first..end).contains(&block) {
                wanted.push((from, count));
            }
            block += 1;
        });
        let Some((skip, _)) = wanted.first().copied() else { return };
        let mut ids = names.values();
        let mut entries = with_dots(names.keys().map(Vec::as_slice))
            .map(|(name, dots)| {
                let index = match dots {
                    true if name == b"." => own,
                    true => item.parent as usize,
                    false => self.shape.by_node[ids.next().expect("one for each name").0 as usize] as usize,
                };
                let file_type = file_type(&self.tree.node(self.shape.items[index].node).kind);
                format::Entry { name, nid: places.nids[index], file_type }
            })
            .skip(skip);
        for ((_, count), block) in wanted.into_iter().zip(buffer.chunks_mut(BLOCK as usize)) {
            let entries: Vec<format::Entry<'_>> = entries.by_ref().take(count).collect();
            format::directory_block(&entries, block);
        }
    }

    /// An item's inode and all that is right behind it.
    pub fn inode(&self, index: usize, places: &Places) -> io::Result<Vec<u8>> {
        let item = &self.shape.items[index];
        let node = self.tree.node(item.node);
        let (start, blocks) = (places.starts[index] as u32, item.data.blocks());
        let layout = match &item.data {
            Data::Flat { tail: 0, .. } => DataLayout::FlatPlain,
            Data::Flat { .. } => DataLayout::FlatInline,
            Data::Chunked { .. } => DataLayout::ChunkBased,
        };
        let union = match (&node.kind, &item.data) {
            (Kind::CharDevice { major, minor } | Kind::BlockDevice { major, minor }, _) => {
                format::device(*major, *minor).expect("checked in the shape")
            }
            (Kind::Fifo | Kind::Socket, _) => 0,
            (_, Data::Chunked { bits, .. }) => u32::from(*bits),
            _ if blocks == 0 => NULL_BLOCK,
            _ => start,
        };
        let body = self.shape.pool.body(&node.meta, &places.shared);
        let inode = Inode {
            layout,
            xattr_bytes: body.len() as u32,
            mode: mode(&node.kind) | node.meta.mode & 0o7777,
            size: item.size,
            union,
            ino: places.nids[index] as u32,
            uid: node.meta.uid,
            gid: node.meta.gid,
            mtime: node.meta.mtime,
            mtime_nsec: node.meta.mtime_nsec,
            nlink: item.nlink,
        };
        let mut bytes = inode.bytes().to_vec();
        bytes.extend(body);
        match &item.data {
            Data::Flat { tail: 0, .. } => {}
            Data::Flat { tail, .. } => {
                let head = bytes.len();
                bytes.resize(head + *tail as usize, 0);
                self.tail(item, places, &mut bytes[head..])?;
            }
            Data::Chunked { bits, runs, chunks } => {
                let head = bytes.len();
                bytes.resize(head + 4 * *chunks as usize, 0xff); // EROFS_NULL_ADDR: holes
                for run in runs {
                    let (first, end) = (run.block >> bits, (run.block + run.blocks).div_ceil(1 << bits));
                    for chunk in first..end {
                        let block = start + (run.stored + (chunk << bits) - run.block) as u32;
                        bytes[head + 4 * chunk as usize..][..4].copy_from_slice(&block.to_le_bytes());
                    }
                }
            }
        }
        Ok(bytes)
    }

    /// The bytes behind an item's last whole block; `buffer` is zeroed.
    fn tail(&self, item: &Item, places: &Places, buffer: &mut [u8]) -> io::Result<()> {
        match &self.tree.node(item.node).kind {
            Kind::File(file) => read(self.tree, file, item.data.blocks() * BLOCK, buffer)?,
            Kind::Directory(names) => self.directory(item, names, places, item.data.blocks(), buffer),
            Kind::Symlink(target) => buffer.copy_from_slice(target),
            _ => {}
        }
        Ok(())
    }
}

/// Fills `buffer` with a file's bytes from `offset` on, zeros where there is nothing.
fn read(tree: &Tree, file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let end = offset + buffer.len() as u64;
    let first = file.extents.partition_point(|extent| extent.offset + extent.length <= offset);
    let mut filled = 0;
    for extent in file.extents[first..].iter().take_while(|extent| extent.offset < end) {
        let (from, to) = (extent.offset.max(offset), (extent.offset + extent.length).min(end));
        let part = (from - offset) as usize..(to - offset) as usize;
        buffer[filled..part.start].fill(0);
        filled = part.end;
        tree.sources[extent.source as usize].read_exact_at(&mut buffer[part], extent.source_offset + (from - extent.offset))?;
    }
    buffer[filled..].fill(0);
    Ok(())
}

/// `S_IF*`.
fn mode(kind: &Kind) -> u16 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice { .. } => 0o020_000,
        Kind::Directory(_) => 0o040_000,
        Kind::BlockDevice { .. } => 0o060_000,
        Kind::File(_) => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Socket => 0o140_000,
    }
}

/// `FT_*` of `include/linux/fs_types.h`, as directories name it.
fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Directory(_) => 2,
        Kind::CharDevice { .. } => 3,
        Kind::BlockDevice { .. } => 4,
        Kind::Fifo => 5,
        Kind::Socket => 6,
        Kind::Symlink(_) => 7,
    }
}
