//! Where everything of an image lies, and how the next image keeps it.
//!
//! A [`Layout`] is stored beside a disk. [`place`] is a pure function of the inodes, the previous
//! layout and, with one, the digests of the data: what is unchanged keeps its place, so that an
//! update moves little. In this order
//!
//! 1. inodes of the same path and size, and data of the same path and digest, keep their place;
//! 2. data of the same digest under another path keeps its place;
//! 3. what changed takes its path's old place when that is free and large enough;
//! 4. the rest takes the smallest gap that is large enough, else the end.
//!
//! Placing the same tree again with the result finds everything in step 1, so it changes nothing.
//! An image that would be too much larger than one made without a previous layout is placed
//! without; that, too, is its own result.

use std::collections::HashMap;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::Digest;
use super::format::{BLOCK, ROOT_LIMIT, SLOTS};
use super::shape::Shape;
use super::space::{Slots, Space};
use crate::error::Problem;

/// The version of the stored form.
const FORMAT: u32 = 1;
/// Gaps may make an image a quarter larger than needed, and a MiB more so that small ones, where a
/// few blocks are a quarter, keep their layout.
const SLACK_BLOCKS: u64 = 256;

/// Where an inode and its data lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Without a leading slash; of several names the first in the tree's order.
    pub path: Vec<u8>,
    /// Position of the inode, in slots of 32 bytes.
    pub nid: u64,
    /// Its size with all right behind it, in slots.
    pub slots: u32,
    /// First block of the data; 0 when there is none outside the inode.
    pub start: u32,
    pub blocks: u32,
    /// Digest of these blocks; `None` for directories and symbolic links, which are kept by path.
    pub digest: Option<Digest>,
}

/// The area of shared extended attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    pub start: u32,
    pub blocks: u32,
    /// Digest of each entry and its number: its position in the area divided by four.
    pub entries: Vec<(Digest, u32)>,
}

/// The layout of an image, stored as JSON of about 60 bytes a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Layout {
    /// Blocks of the image.
    pub blocks: u32,
    pub shared: Area,
    /// Sorted by path as bytes.
    pub entries: Vec<Entry>,
}

/// What is to be placed, and where, in units of [`Shape::items`] and of the pool's ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    pub blocks: u64,
    pub nids: Vec<u64>,
    /// First blocks; 0 for items without blocks.
    pub starts: Vec<u64>,
    pub area: u64,
    pub area_blocks: u64,
    /// Numbers of the shared entries by rank.
    pub shared: Vec<u32>,
}

/// Places everything; `digests` by item, needed with `previous` only. An error when the image
/// would be too large for block addresses of 32 bits.
pub fn place(shape: &Shape, previous: Option<&Layout>, digests: &[Option<Digest>]) -> Result<Places> {
    let canonical = Placing::new(shape, None).finish()?.expect("without a previous layout the root directory comes first");
    let Some(previous) = previous else { return Ok(canonical) };
    let mut placing = Placing::new(shape, Some(&previous.shared));
    placing.keep(previous, digests);
    match placing.finish()? {
        Some(kept) if kept.blocks <= canonical.blocks + canonical.blocks / 4 + SLACK_BLOCKS => Ok(kept),
        _ => Ok(canonical),
    }
}

/// Marks what has no place yet.
const NOWHERE: u64 = u64::MAX;

/// A placing under way.
struct Placing<'a> {
    shape: &'a Shape,
    space: Space,
    slots: Slots,
    nids: Vec<u64>,
    starts: Vec<u64>,
    area: u64,
    area_blocks: u64,
    shared: Vec<u32>,
}

impl<'a> Placing<'a> {
    /// Only the shared attributes have numbers: their old ones where they were in `area`.
    fn new(shape: &'a Shape, area: Option<&Area>) -> Self {
        let mut space = Space::default();
        let slots = Slots::new(&mut space);
        let nids = vec![NOWHERE; shape.items.len()];
        let starts = shape.items.iter().map(|item| if item.data.blocks() == 0 { 0 } else { NOWHERE }).collect();
        let (shared, units) = number_shared(shape, area);
        let area_blocks = (units * 4).div_ceil(BLOCK);
        let area = if area_blocks == 0 { 0 } else { NOWHERE };
        Self { shape, space, slots, nids, starts, area, area_blocks, shared }
    }

    /// Gives what is in `previous` its old place: steps 1 to 3. A place that is taken, as only a
    /// damaged layout says, is not given again.
    fn keep(&mut self, previous: &Layout, digests: &[Option<Digest>]) {
        let by_path: HashMap<&[u8], usize> = previous.entries.iter().zip(0..).map(|(entry, at)| (&entry.path[..], at)).collect();
        let old: Vec<Option<usize>> = self.shape.items.iter().map(|item| by_path.get(&item.path[..]).copied()).collect();
        let entries: Vec<Option<&Entry>> = old.iter().map(|at| at.map(|at| &previous.entries[at])).collect();
        self.keep_inodes(&entries);
        let mut kept = vec![false; previous.entries.len()];
        for (index, at) in old.iter().enumerate() {
            let Some(at) = at.filter(|at| self.is_same(index, &previous.entries[*at], digests[index])) else { continue };
            kept[at] = self.keep_data(index, &previous.entries[at]);
        }
        self.keep_area(&previous.shared, true);
        self.keep_moved(previous, &kept, digests);
        self.change_in_place(&entries);
        self.keep_area(&previous.shared, false);
    }

    /// Inodes of the same path and size; those above a block first, because small ones may share
    /// their last block.
    fn keep_inodes(&mut self, old: &[Option<&Entry>]) {
        for large in [true, false] {
            for (index, item) in self.shape.items.iter().enumerate() {
                let Some(old) = old[index] else { continue };
                if u64::from(old.slots) == item.slots() && (item.slots() > SLOTS) == large {
                    self.keep_inode(index, old.nid);
                }
            }
        }
    }

    fn keep_inode(&mut self, index: usize, nid: u64) {
        let item = &self.shape.items[index];
        let possible = !item.path.is_empty() || nid < ROOT_LIMIT;
        if self.nids[index] == NOWHERE && possible && self.slots.claim(&mut self.space, nid, item.slots()) {
            self.nids[index] = nid;
        }
    }

    /// Whether an item without a place for its data has the data of `old`.
    fn is_same(&self, index: usize, old: &Entry, digest: Option<Digest>) -> bool {
        self.starts[index] == NOWHERE && u64::from(old.blocks) == self.shape.items[index].data.blocks() && old.digest == digest
    }

    /// Gives an item's data the place where that of `old` starts, when it is free.
    fn keep_data(&mut self, index: usize, old: &Entry) -> bool {
        let blocks = self.shape.items[index].data.blocks();
        let free = self.starts[index] == NOWHERE && old.blocks > 0 && self.space.claim(old.start.into(), blocks);
        if free {
            self.starts[index] = old.start.into();
        }
        free
    }

    fn keep_area(&mut self, old: &Area, same: bool) {
        if self.area == NOWHERE
            && old.blocks > 0
            && (!same || u64::from(old.blocks) == self.area_blocks)
            && self.space.claim(old.start.into(), self.area_blocks)
        {
            self.area = old.start.into();
        }
    }

    /// Data that is now under another path; `kept` marks what its own path still has.
    fn keep_moved(&mut self, previous: &Layout, kept: &[bool], digests: &[Option<Digest>]) {
        let mut by_digest: HashMap<(Digest, u64), Vec<usize>> = HashMap::new();
        for (at, entry) in previous.entries.iter().enumerate().rev() {
            if let Some(digest) = entry.digest.filter(|_| !kept[at]) {
                by_digest.entry((digest, entry.blocks.into())).or_default().push(at);
            }
        }
        for (index, item) in self.shape.items.iter().enumerate() {
            let Some(digest) = digests[index].filter(|_| self.starts[index] == NOWHERE) else { continue };
            if let Some(at) = by_digest.get_mut(&(digest, item.data.blocks())).and_then(Vec::pop) {
                self.keep_data(index, &previous.entries[at]);
            }
        }
    }

    /// What has another size or content than before.
    fn change_in_place(&mut self, old: &[Option<&Entry>]) {
        for (index, old) in old.iter().enumerate() {
            if let Some(old) = old {
                self.keep_inode(index, old.nid);
                self.keep_data(index, old);
            }
        }
    }

    /// Gives the rest its place: step 4. `None` when the root directory finds none.
    fn finish(self) -> Result<Option<Places>> {
        let Self { shape, mut space, mut slots, mut nids, mut starts, mut area, area_blocks, shared } = self;
        for (index, item) in shape.items.iter().enumerate() {
            nids[index] = match index {
                _ if nids[index] != NOWHERE => continue,
                0 => match slots.take_root(&mut space, item.slots()) {
                    Some(nid) => nid,
                    None => return Ok(None),
                },
                _ => slots.take(&mut space, item.slots()),
            };
        }
        if area == NOWHERE {
            area = space.take(area_blocks);
        }
        for (start, item) in starts.iter_mut().zip(&shape.items).filter(|(start, _)| **start == NOWHERE) {
            *start = space.take(item.data.blocks());
        }
        let blocks = space.end();
        if blocks >= u32::MAX.into() {
            return Err(Problem::failed("the tree does not fit into an EROFS file system, which holds at most 16 TiB").into());
        }
        Ok(Some(Places { blocks, nids, starts, area, area_blocks, shared }))
    }
}

/// Numbers the shared attributes: the old number where there is one, else the first gap.
/// Also returns how many units of four bytes the area has.
fn number_shared(shape: &Shape, area: Option<&Area>) -> (Vec<u32>, u64) {
    let old: HashMap<Digest, u32> = area.iter().flat_map(|area| area.entries.iter().copied()).collect();
    let mut space = Space::default();
    let units = |entry: &[u8]| entry.len() as u64 / 4;
    let mut numbers: Vec<u64> = shape
        .pool
        .entries()
        .map(|entry| {
            let number = old.get(&Digest::of(entry)).map(|number| u64::from(*number));
            number.filter(|number| space.claim(*number, units(entry))).unwrap_or(NOWHERE)
        })
        .collect();
    for (number, entry) in numbers.iter_mut().zip(shape.pool.entries()) {
        if *number == NOWHERE {
            *number = space.take(units(entry));
        }
    }
    (numbers.into_iter().map(|number| number as u32).collect(), space.end())
}

impl Layout {
    /// Puts a layout together; `digests` by item.
    pub fn new(shape: &Shape, places: &Places, digests: &[Option<Digest>]) -> Self {
        let mut entries: Vec<Entry> = shape
            .items
            .iter()
            .enumerate()
            .map(|(index, item)| Entry {
                path: item.path.clone(),
                nid: places.nids[index],
                // Below 2^32, as all of the image's blocks are.
                slots: item.slots() as u32,
                start: places.starts[index] as u32,
                blocks: item.data.blocks() as u32,
                digest: digests[index],
            })
            .collect();
        entries.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        let digests = shape.pool.entries().map(Digest::of);
        let shared = Area {
            start: places.area as u32,
            blocks: places.area_blocks as u32,
            entries: digests.zip(places.shared.iter().copied()).collect(),
        };
        Self { blocks: places.blocks as u32, shared, entries }
    }
}

/// The stored form: paths share their beginning with the path before.
#[derive(Clone, Serialize, Deserialize)]
struct Stored {
    format: u32,
    blocks: u32,
    shared: Area,
    files: Vec<Row>,
}

/// Bytes shared with the path before, the rest (bytes that are not UTF-8 and `%` as `%xx`), nid,
/// slots; first block and number of blocks; digest.
#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Row {
    Inode(usize, String, u64, u32),
    Blocks(usize, String, u64, u32, u32, u32),
    Data(usize, String, u64, u32, u32, u32, Digest),
}

impl From<Layout> for Stored {
    fn from(layout: Layout) -> Self {
        let mut before: &[u8] = &[];
        let files = layout.entries.iter().map(|entry| {
            let same = before.iter().zip(&entry.path).take_while(|(a, b)| a == b).count();
            before = &entry.path;
            let rest = escape(&entry.path[same..]);
            let Entry { nid, slots, start, blocks, .. } = *entry;
            match entry.digest {
                Some(digest) => Row::Data(same, rest, nid, slots, start, blocks, digest),
                None if blocks > 0 => Row::Blocks(same, rest, nid, slots, start, blocks),
                None => Row::Inode(same, rest, nid, slots),
            }
        });
        Self { format: FORMAT, blocks: layout.blocks, files: files.collect(), shared: layout.shared.clone() }
    }
}

impl TryFrom<Stored> for Layout {
    type Error = String;

    fn try_from(stored: Stored) -> Result<Self, String> {
        if stored.format != FORMAT {
            let format = stored.format;
            return Err(format!("the layout has format {format}, and this version of pipeline reads format {FORMAT} only"));
        }
        let mut entries: Vec<Entry> = Vec::with_capacity(stored.files.len());
        for row in stored.files {
            let (same, rest, nid, slots, start, blocks, digest) = match row {
                Row::Inode(same, rest, nid, slots) => (same, rest, nid, slots, 0, 0, None),
                Row::Blocks(same, rest, nid, slots, start, blocks) => (same, rest, nid, slots, start, blocks, None),
                Row::Data(same, rest, nid, slots, start, blocks, digest) => (same, rest, nid, slots, start, blocks, Some(digest)),
            };
            let before = entries.last().map_or(&[][..], |entry| &entry.path);
            let mut path = before.get(..same).ok_or("a path of the layout is damaged")?.to_vec();
            path.extend(unescape(&rest).ok_or("a path of the layout is damaged")?);
            entries.push(Entry { path, nid, slots, start, blocks, digest });
        }
        Ok(Self { blocks: stored.blocks, shared: stored.shared, entries })
    }
}

fn escape(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(&chunk.valid().replace('%', "%25"));
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("%{byte:02x}")));
    }
    text
}

fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        bytes.push(u8::from_str_radix(part.get(..2)?, 16).ok()?);
        bytes.extend(&part.as_bytes()[2..]);
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_stored_and_read_again() {
        let entry = |path: &[u8], nid, start, blocks, digest| Entry { path: path.to_vec(), nid, slots: 3, start, blocks, digest };
        let layout = Layout {
            blocks: 77,
            shared: Area { start: 3, blocks: 1, entries: vec![(Digest([7; 16]), 12)] },
            entries: vec![
                entry(b"", 36, 0, 0, None),
                entry(b"100%", 40, 5, 1, None),
                entry("caf\u{e8}".as_bytes(), 50, 6, 2, Some(Digest([0xab; 16]))),
                entry("caf\u{e9}".as_bytes(), 60, 0, 0, None),
                entry(b"caf\xff\"\n", 70, 0, 0, None),
            ],
        };
        let text = serde_json::to_string(&layout).unwrap();
        assert!(
            text.contains(r#"[0,"100%25",40,3,5,1],[0,"cafè",50,3,6,2,"abababababababababababababababab"],[4,"%a9",60,3]"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<Layout>(&text).unwrap(), layout);
        let newer = text.replace(r#""format":1"#, r#""format":2"#);
        let message = serde_json::from_str::<Layout>(&newer).unwrap_err().to_string();
        assert!(message.contains("format 2"), "{message}");
        for damaged in
            [text.replace("[4,", "[9,"), text.replace("%a9", "%a"), text.replace("%a9", "%zz"), text.replace("abab", "xbab")]
        {
            assert!(serde_json::from_str::<Layout>(&damaged).is_err());
        }
    }
}
