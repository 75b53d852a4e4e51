//! Free space: runs of blocks, and slots of inodes inside blocks.
//!
//! Nothing is ever given back: a layout starts empty, what stays claims its old place, and the
//! rest takes what is free.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::format::{FIRST_SLOT, ROOT_LIMIT, SLOTS};

/// Free runs of units.
#[derive(Debug, Clone, Default)]
struct Gaps {
    /// Start and length.
    by_start: BTreeMap<u64, u64>,
    /// Length and start.
    by_size: BTreeSet<(u64, u64)>,
}

impl Gaps {
    fn add(&mut self, start: u64, length: u64) {
        if length > 0 {
            self.by_start.insert(start, length);
            self.by_size.insert((length, start));
        }
    }

    fn remove(&mut self, start: u64, length: u64) {
        self.by_start.remove(&start);
        self.by_size.remove(&(length, start));
    }

    /// Takes `start..start + length`; whether it was free.
    fn claim(&mut self, start: u64, length: u64) -> bool {
        let gap = self.by_start.range(..=start).next_back().map(|(gap, size)| (*gap, *size));
        let Some((gap, size)) = gap.filter(|(gap, size)| start + length <= gap + size) else { return false };
        self.remove(gap, size);
        self.add(gap, start - gap);
        self.add(start + length, gap + size - start - length);
        true
    }

    /// Takes the beginning of the smallest run that is large enough and starts below `limit`, the
    /// first of equal ones.
    fn take(&mut self, length: u64, limit: u64) -> Option<u64> {
        let start = self.by_size.range((length, 0)..).map(|(_, start)| *start).find(|start| *start < limit)?;
        self.claim(start, length);
        Some(start)
    }
}

/// Units of which those from `end` on are free without end.
#[derive(Debug, Clone, Default)]
pub struct Space {
    gaps: Gaps,
    end: u64,
}

impl Space {
    /// The first unit behind everything taken.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Takes `start..start + length`; whether it was free.
    pub fn claim(&mut self, start: u64, length: u64) -> bool {
        if start < self.end {
            return self.gaps.claim(start, length);
        }
        self.gaps.add(self.end, start - self.end);
        self.end = start + length;
        true
    }

    /// Takes the smallest gap that is large enough, the first of equal ones, or the end.
    pub fn take(&mut self, length: u64) -> u64 {
        self.gaps.take(length, u64::MAX).unwrap_or_else(|| {
            self.end += length;
            self.end - length
        })
    }
}

/// How many blocks of fresh inodes stay open for smaller ones that come later: small inodes fill
/// holes, and yet what is near in the tree is near on the disk. 1 MiB.
const OPEN_BLOCKS: usize = 256;

/// Free inode slots. An inode with what is behind it lies inside one block, or starts one.
#[derive(Debug, Clone)]
pub struct Slots {
    /// None across blocks.
    gaps: Gaps,
    /// Blocks that hold inodes.
    blocks: BTreeSet<u64>,
    /// Blocks begun by [`Slots::take`], oldest first.
    fresh: VecDeque<u64>,
}

impl Slots {
    /// Block 0 holds inodes behind the superblock.
    pub fn new(space: &mut Space) -> Self {
        let mut slots = Self { gaps: Gaps::default(), blocks: BTreeSet::from([0]), fresh: VecDeque::new() };
        space.claim(0, 1);
        slots.gaps.add(FIRST_SLOT, SLOTS - FIRST_SLOT);
        slots
    }

    /// Takes `length` slots at `nid`; whether they were free.
    pub fn claim(&mut self, space: &mut Space, nid: u64, length: u64) -> bool {
        let (block, inside) = (nid / SLOTS, nid % SLOTS);
        if length > SLOTS {
            let free = inside == 0 && space.claim(block, length.div_ceil(SLOTS));
            if free {
                self.add_blocks(block, length);
            }
            return free;
        }
        if inside + length > SLOTS {
            return false;
        }
        if !self.blocks.contains(&block) && space.claim(block, 1) {
            self.add_blocks(block, 0);
        }
        self.gaps.claim(nid, length)
    }

    /// Takes `length` slots where they fit best, in a new block when nowhere.
    pub fn take(&mut self, space: &mut Space, length: u64) -> u64 {
        if length <= SLOTS
            && let Some(nid) = self.gaps.take(length, u64::MAX)
        {
            return nid;
        }
        let block = space.take(length.div_ceil(SLOTS));
        self.add_blocks(block, length);
        self.fresh.push_back(block + length.div_ceil(SLOTS) - 1);
        if self.fresh.len() > OPEN_BLOCKS {
            let old = self.fresh.pop_front().expect("just counted");
            let gaps: Vec<_> = self.gaps.by_start.range(old * SLOTS..(old + 1) * SLOTS).map(|(s, l)| (*s, *l)).collect();
            gaps.into_iter().for_each(|(start, length)| self.gaps.remove(start, length));
        }
        block * SLOTS
    }

    /// Like [`Slots::take`] for the root directory, whose nid must fit into sixteen bits; `None`
    /// when there is no such place.
    pub fn take_root(&mut self, space: &mut Space, length: u64) -> Option<u64> {
        if length <= SLOTS
            && let Some(nid) = self.gaps.take(length, ROOT_LIMIT)
        {
            return Some(nid);
        }
        let blocks = length.div_ceil(SLOTS);
        let block = (0..ROOT_LIMIT / SLOTS).find(|block| space.claim(*block, blocks))?;
        self.add_blocks(block, length);
        Some(block * SLOTS)
    }

    /// Makes claimed blocks from `block` on, at least one, inode blocks of which the first
    /// `length` slots are taken.
    fn add_blocks(&mut self, block: u64, length: u64) {
        let blocks = length.div_ceil(SLOTS).max(1);
        self.blocks.extend(block..block + blocks);
        self.gaps.add(block * SLOTS + length, blocks * SLOTS - length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_gap_is_taken() {
        let mut space = Space::default();
        assert!(space.claim(10, 5) && space.claim(20, 5) && space.claim(30, 1));
        assert!(!space.claim(12, 1) && !space.claim(18, 3) && !space.claim(28, 5));
        // Gaps: 0..10, 15..20, 25..30.
        assert_eq!([space.take(4), space.take(5), space.take(7), space.take(4), space.take(3)], [15, 25, 0, 31, 7]);
        assert_eq!(space.end(), 35);
    }

    #[test]
    fn small_inodes_stay_inside_a_block() {
        let mut space = Space::default();
        let mut slots = Slots::new(&mut space);
        // 92 slots are left in block 0; 100 need a block, 300 need three, of which the last has 84 left.
        assert_eq!([90, 100, 300, 84, 28, 3, 2].map(|length| slots.take(&mut space, length)), [36, 128, 256, 556, 228, 640, 126]);
        assert!(!slots.claim(&mut space, 640, 1) && slots.claim(&mut space, 700, 2));
        assert!(!slots.claim(&mut space, 1000, 100) && slots.claim(&mut space, 1024, 129) && slots.claim(&mut space, 1153, 127));
        assert_eq!(space.end(), 10);
    }
}
