//! Writes a planned image: threads fill stripes of it in memory and write each with one call.
//!
//! A stripe is one or two MiB of the image and begins where data or a segment of it begins, so
//! that each segment is in one stripe and its digest is made while it is in memory.

use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use sha2::{Digest as _, Sha256};

use super::content::{Content, SEGMENT, combine};
use super::format::{BLOCK, SLOTS, Superblock};
use super::layout::{Layout, Places};
use super::shape::{Data, shown};
use super::{Digest, Header, Plan, Target};
use crate::disk::tree::Tree;
use crate::error::Problem;

/// Blocks of the largest stripe, 2 MiB: a few calls of the system for each, and small enough for
/// the processor's cache when the caller looks at it once more.
const STRIPE: u64 = 2 * SEGMENT;
/// Where nothing else says where to cut, a stripe may end at each of so many blocks.
const GRAIN: u64 = 64;

/// An image that was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// Bytes, a multiple of 4096.
    pub size: u64,
    /// For the next image of this tree.
    pub layout: Layout,
}

/// Writes the image of `tree`, which is the one `plan` was made of.
///
/// The file is written in whole stripes at [`Target::offset`]; where the image has nothing it is
/// left as it is, so it must be new or a hole there. Nothing is synced. Errors: what reading a
/// source or writing says; what was written then is incomplete.
pub fn write(tree: &Tree, plan: &Plan, header: &Header<'_>, target: &Target<'_>) -> Result<Written> {
    let superblock = superblock(plan, header)?;
    let image = Image::new(Content { tree, shape: &plan.shape }, &plan.places, superblock);
    let stripes = image.stripes();
    let next = AtomicUsize::new(0);
    let segments = Mutex::new(Vec::new());
    let work = || -> Result<()> {
        let mut buffer = vec![0; (STRIPE * BLOCK) as usize];
        let mut found = Vec::new();
        while let Some((first, end)) = stripes.get(next.fetch_add(1, Ordering::Relaxed)) {
            let buffer = &mut buffer[..((end - first) * BLOCK) as usize];
            if image.fill(*first, buffer)? {
                target.out.write_all_at(buffer, target.offset + first * BLOCK).context("cannot write the root file system")?;
            }
            if plan.digests.is_none() {
                image.digest(*first, buffer, &mut found);
            }
            (target.on_blocks)(*first, buffer);
        }
        segments.lock().expect("no thread panics holding it").append(&mut found);
        Ok(())
    };
    in_threads(target.threads, &next, &work)?;
    let digests = match &plan.digests {
        Some(digests) => digests.clone(),
        None => gather(segments.into_inner().expect("no thread panics holding it"), plan.shape.items.len()),
    };
    Ok(Written { size: plan.blocks() * BLOCK, layout: Layout::new(&plan.shape, &plan.places, &digests) })
}

/// Runs `work` in some threads until each returns; the first error, after which the others find
/// no more work because `next` is beyond the end.
fn in_threads(threads: usize, next: &AtomicUsize, work: &(dyn Fn() -> Result<()> + Sync)) -> Result<()> {
    let run = || work().inspect_err(|_| next.store(usize::MAX / 2, Ordering::Relaxed));
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let own = run();
        others.into_iter().fold(own, |result, other| result.and(other.join().expect("a writer does not panic")))
    })
}

/// The digest of one segment: the item, the segment's place in its data, the digest.
type Segment = (usize, u64, [u8; 32]);

/// Digests by item from those of all segments.
fn gather(mut segments: Vec<Segment>, items: usize) -> Vec<Option<Digest>> {
    segments.sort_unstable();
    let mut digests = vec![None; items];
    for of_item in segments.chunk_by(|a, b| a.0 == b.0) {
        let parts: Vec<[u8; 32]> = of_item.iter().map(|(.., digest)| *digest).collect();
        digests[of_item[0].0] = Some(combine(&parts));
    }
    digests
}

/// The digests of all files' data, by item, read once in `threads` threads.
pub fn digest_files(content: Content<'_>, threads: usize) -> Result<Vec<Option<Digest>>> {
    let items = &content.shape.items;
    let tasks: Vec<(usize, u64)> = items
        .iter()
        .enumerate()
        .filter(|(_, item)| content.is_file(item))
        .flat_map(|(index, item)| (0..item.data.blocks().div_ceil(SEGMENT)).map(move |segment| (index, segment)))
        .collect();
    let next = AtomicUsize::new(0);
    let segments = Mutex::new(Vec::new());
    let work = || -> Result<()> {
        let mut buffer = vec![0; (SEGMENT * BLOCK) as usize];
        let mut found = Vec::new();
        while let Some((index, segment)) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            let first = segment * SEGMENT;
            let blocks = (items[*index].data.blocks() - first).min(SEGMENT);
            let part = &mut buffer[..(blocks * BLOCK) as usize];
            content.data(&items[*index], None, first, part).with_context(|| unreadable(&items[*index].path))?;
            found.push((*index, *segment, Sha256::digest(part).into()));
        }
        segments.lock().expect("no thread panics holding it").append(&mut found);
        Ok(())
    };
    in_threads(threads, &next, &work)?;
    Ok(gather(segments.into_inner().expect("no thread panics holding it"), items.len()))
}

fn unreadable(path: &[u8]) -> String {
    format!("cannot read the content of `{}` from its layer", shown(path))
}

fn superblock(plan: &Plan, header: &Header<'_>) -> Result<Superblock> {
    let name = header.volume_name.as_bytes();
    if name.len() > 15 || name.contains(&0) {
        let name = header.volume_name;
        return Err(Problem::failed(format!("volume name `{name}` is longer than the 15 bytes EROFS holds")).into());
    }
    let mut volume_name = [0; 16];
    volume_name[..name.len()].copy_from_slice(name);
    let items = &plan.shape.items;
    Ok(Superblock {
        root_nid: plan.places.nids[0] as u16,
        inodes: items.len() as u64,
        build_time: header.epoch,
        blocks: plan.places.blocks as u32,
        xattr_block: plan.places.area as u32,
        uuid: header.uuid,
        volume_name,
        chunked: items.iter().any(|item| matches!(item.data, Data::Chunked { .. })),
    })
}

/// A run of blocks with data: first block, number, item; the shared attributes have no item.
#[derive(Debug, Clone, Copy)]
struct Extent {
    start: u64,
    blocks: u64,
    item: Option<usize>,
}

/// What is where, sorted for the question what is in a stripe.
struct Image<'a> {
    content: Content<'a>,
    places: &'a Places,
    superblock: Superblock,
    /// By first block.
    extents: Vec<Extent>,
    /// Items by nid.
    inodes: Vec<usize>,
}

impl<'a> Image<'a> {
    fn new(content: Content<'a>, places: &'a Places, superblock: Superblock) -> Self {
        let items = &content.shape.items;
        let area = Extent { start: places.area, blocks: places.area_blocks, item: None };
        let data = items.iter().enumerate().map(|(index, item)| Extent {
            start: places.starts[index],
            blocks: item.data.blocks(),
            item: Some(index),
        });
        let mut extents: Vec<Extent> = data.chain([area]).filter(|extent| extent.blocks > 0).collect();
        extents.sort_unstable_by_key(|extent| extent.start);
        let mut inodes: Vec<usize> = (0..items.len()).collect();
        inodes.sort_unstable_by_key(|index| places.nids[*index]);
        Self { content, places, superblock, extents, inodes }
    }

    /// First blocks and ends of the stripes; together they are the image.
    fn stripes(&self) -> Vec<(u64, u64)> {
        let mut cuts = Vec::new();
        let mut at = 0;
        for extent in &self.extents {
            cuts.extend((at..extent.start).step_by(GRAIN as usize));
            at = extent.start + extent.blocks;
            cuts.extend((extent.start..at).step_by(SEGMENT as usize));
        }
        cuts.extend((at..self.places.blocks).step_by(GRAIN as usize));
        cuts.push(self.places.blocks);
        let (mut stripes, mut first, mut before) = (Vec::new(), 0, 0);
        for cut in cuts {
            if cut - first > STRIPE {
                stripes.push((first, before));
                first = before;
            }
            before = cut;
        }
        stripes.push((first, before));
        stripes
    }

    /// The extents with blocks in `first..end`.
    fn extents_in(&self, first: u64, end: u64) -> impl Iterator<Item = &Extent> {
        let from = self.extents.partition_point(|extent| extent.start + extent.blocks <= first);
        self.extents[from..].iter().take_while(move |extent| extent.start < end)
    }

    /// Fills `buffer` with the image from block `first` on; whether there is anything.
    fn fill(&self, first: u64, buffer: &mut [u8]) -> Result<bool> {
        let end = first + buffer.len() as u64 / BLOCK;
        let at = |block: u64| ((block - first) * BLOCK) as usize;
        let mut cursor = first;
        for extent in self.extents_in(first, end) {
            let (from, to) = (extent.start.max(first), (extent.start + extent.blocks).min(end));
            buffer[at(cursor)..at(from)].fill(0);
            self.fill_extent(extent, from - extent.start, &mut buffer[at(from)..at(to)])?;
            cursor = to;
        }
        buffer[at(cursor)..].fill(0);
        let inodes = self.fill_inodes(first, buffer)?;
        if first == 0 {
            self.superblock.write(&mut buffer[..BLOCK as usize]);
        }
        Ok(inodes || cursor > first)
    }

    fn fill_extent(&self, extent: &Extent, first: u64, buffer: &mut [u8]) -> Result<()> {
        if let Some(index) = extent.item {
            let item = &self.content.shape.items[index];
            return self.content.data(item, Some(self.places), first, buffer).with_context(|| unreadable(&item.path));
        }
        buffer.fill(0);
        for (entry, id) in self.content.shape.pool.entries().zip(&self.places.shared) {
            overlay(buffer, first * BLOCK, entry, u64::from(*id) * 4);
        }
        Ok(())
    }

    /// Puts the inodes that are at least partly in `buffer` there; whether there are any.
    fn fill_inodes(&self, first: u64, buffer: &mut [u8]) -> Result<bool> {
        let items = &self.content.shape.items;
        let end = first * SLOTS + buffer.len() as u64 / BLOCK * SLOTS;
        let from = self.inodes.partition_point(|index| self.places.nids[*index] + items[*index].slots() <= first * SLOTS);
        let inside = self.inodes[from..].iter().take_while(|index| self.places.nids[**index] < end);
        let mut any = false;
        for index in inside {
            let bytes = self.content.inode(*index, self.places).with_context(|| unreadable(&items[*index].path))?;
            overlay(buffer, first * BLOCK, &bytes, self.places.nids[*index] * super::format::SLOT);
            any = true;
        }
        Ok(any)
    }

    /// Adds the digests of the files' segments in a filled stripe.
    fn digest(&self, first: u64, buffer: &[u8], found: &mut Vec<Segment>) {
        let end = first + buffer.len() as u64 / BLOCK;
        for extent in self.extents_in(first, end) {
            let Some(index) = extent.item.filter(|index| self.content.is_file(&self.content.shape.items[*index])) else {
                continue;
            };
            let (from, to) = (extent.start.max(first), (extent.start + extent.blocks).min(end));
            let bytes = &buffer[((from - first) * BLOCK) as usize..((to - first) * BLOCK) as usize];
            for (segment, number) in bytes.chunks((SEGMENT * BLOCK) as usize).zip((from - extent.start) / SEGMENT..) {
                found.push((index, number, Sha256::digest(segment).into()));
            }
        }
    }
}

/// Copies the part of `bytes`, which begin at `position`, that lies in `buffer`, which begins at `start`.
fn overlay(buffer: &mut [u8], start: u64, bytes: &[u8], position: u64) {
    let from = position.max(start);
    let to = (position + bytes.len() as u64).min(start + buffer.len() as u64);
    if from < to {
        let part = &bytes[(from - position) as usize..(to - position) as usize];
        buffer[(from - start) as usize..(to - start) as usize].copy_from_slice(part);
    }
}
