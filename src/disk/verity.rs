//! The hash tree of dm-verity, as `veritysetup format` writes it to a device of its own.
//!
//! Format: the kernel's `Documentation/admin-guide/device-mapper/verity.rst` and cryptsetup's
//! "DM-Verity on-disk specification": superblock version 1, hash type 1 (salt before the block),
//! SHA-256, blocks of 4096 bytes for data and hashes. On the disk:
//!
//! ```text
//! block 0    superblock (512 bytes used)
//! block 1    level n: one block, the digests of the blocks of level n-1
//!            …
//!            level 0: digests of the data blocks, 128 to a block, zeros behind the last
//! ```
//!
//! Leaf digests come from whoever writes the data ([`Salted::block`]), or from a file that is
//! there already ([`leaves`]); [`tree`] puts the levels above them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use sha2::{Digest as _, Sha256};

/// Bytes of a data block and of a hash block.
pub const BLOCK: usize = 4096;
/// Digests in a hash block.
const PER_BLOCK: usize = BLOCK / 32;
/// Blocks a thread takes at a time: 1 MiB stays in the second-level cache of most processors.
const RUN: usize = 256;
/// First bytes of a superblock.
const MAGIC: &[u8; 8] = b"verity\0\0";

/// SHA-256 with the salt already taken in.
#[derive(Debug, Clone)]
pub struct Salted(Sha256);

impl Salted {
    pub fn new(salt: &[u8]) -> Self {
        Self(Sha256::new().chain_update(salt))
    }

    /// Digest of one block, which is [`BLOCK`] bytes long.
    pub fn block(&self, block: &[u8]) -> [u8; 32] {
        self.0.clone().chain_update(block).finalize().into()
    }
}

/// Digest of one block under `salt`. For many blocks keep a [`Salted`].
pub fn leaf(salt: &[u8], block: &[u8]) -> [u8; 32] {
    Salted::new(salt).block(block)
}

/// What the superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// In the order of the UUID's text.
    pub uuid: [u8; 16],
    pub data_blocks: u64,
    /// At most 256 bytes.
    pub salt: Vec<u8>,
}

impl Superblock {
    /// Block 0 of the hash area.
    fn render(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..8].copy_from_slice(MAGIC);
        block[8..12].copy_from_slice(&1_u32.to_le_bytes());
        block[12..16].copy_from_slice(&1_u32.to_le_bytes());
        block[16..32].copy_from_slice(&self.uuid);
        block[32..38].copy_from_slice(b"sha256");
        block[64..68].copy_from_slice(&(BLOCK as u32).to_le_bytes());
        block[68..72].copy_from_slice(&(BLOCK as u32).to_le_bytes());
        block[72..80].copy_from_slice(&self.data_blocks.to_le_bytes());
        block[80..82].copy_from_slice(&(self.salt.len() as u16).to_le_bytes());
        block[88..88 + self.salt.len()].copy_from_slice(&self.salt);
        block
    }

    /// Reads the first 512 bytes of a hash area.
    ///
    /// # Errors
    /// `InvalidData` for anything but what [`tree`] writes.
    pub fn parse(bytes: &[u8]) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("verity superblock: {what}"));
        let bytes: &[u8; 512] = bytes.first_chunk().ok_or_else(|| invalid("it is cut short"))?;
        if &bytes[..8] != MAGIC {
            return Err(invalid("there is none"));
        }
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let algorithm = bytes[32..64].split(|byte| *byte == 0).next().unwrap_or_default();
        if (u32_at(8), u32_at(12), algorithm, u32_at(64), u32_at(68)) != (1, 1, b"sha256", BLOCK as u32, BLOCK as u32) {
            return Err(invalid("not version 1, hash type 1, sha256 and blocks of 4096 bytes"));
        }
        let salt = usize::from(u16::from_le_bytes([bytes[80], bytes[81]]));
        let salt = bytes[88..344].get(..salt).ok_or_else(|| invalid("the salt is longer than 256 bytes"))?.to_vec();
        let data_blocks = u64::from_le_bytes(*bytes[72..].first_chunk().expect("the array is 512 bytes long"));
        Ok(Self { uuid: *bytes[16..].first_chunk().expect("the array is 512 bytes long"), data_blocks, salt })
    }
}

/// Bytes of the hash area of `data_blocks`, superblock included.
pub const fn area_bytes(data_blocks: u64) -> u64 {
    let mut blocks = 1;
    let mut level = data_blocks;
    while level > 1 {
        level = level.div_ceil(PER_BLOCK as u64);
        blocks += level;
    }
    blocks * BLOCK as u64
}

/// The hash area (superblock, then the levels from the top) and the root hash.
///
/// `leaves` holds the salted digest of every data block in order, at least one; `salt` is at most
/// 256 bytes long; `uuid` is in the order of its text.
pub fn tree(leaves: &[[u8; 32]], salt: &[u8], uuid: [u8; 16]) -> (Vec<u8>, [u8; 32]) {
    assert!(!leaves.is_empty() && salt.len() <= 256, "a hash tree has a leaf and a salt of at most 256 bytes");
    let salted = Salted::new(salt);
    // From the leaves up; each a whole number of blocks.
    let mut levels: Vec<Vec<u8>> = Vec::new();
    let mut digests = leaves.to_vec();
    while digests.len() > 1 {
        let mut level = digests.concat();
        level.resize(level.len().next_multiple_of(BLOCK), 0);
        digests = level.chunks_exact(BLOCK).map(|block| salted.block(block)).collect();
        levels.push(level);
    }
    let superblock = Superblock { uuid, data_blocks: leaves.len() as u64, salt: salt.to_vec() };
    let mut area = superblock.render().to_vec();
    area.extend(levels.into_iter().rev().flatten());
    (area, digests[0])
}

/// Salted digests of `blocks` blocks of `file` from byte `offset` on, with `threads` threads.
///
/// # Errors
/// When the file cannot be read or is shorter.
pub fn leaves(file: &File, offset: u64, blocks: u64, salt: &[u8], threads: usize) -> io::Result<Vec<[u8; 32]>> {
    let salted = Salted::new(salt);
    let mut leaves = each_block(file, offset, blocks, threads, |block| [salted.block(block)])?;
    Ok(leaves.swap_remove(0))
}

/// `N` digests of every block of a file, the blocks shared out among threads: item `n` of the
/// answer holds digest `n` of every block in order. Blocks of zeros are hashed once.
pub(super) fn each_block<const N: usize>(
    file: &File,
    offset: u64,
    blocks: u64,
    threads: usize,
    digest: impl Fn(&[u8]) -> [[u8; 32]; N] + Sync,
) -> io::Result<Vec<Vec<[u8; 32]>>> {
    let count = usize::try_from(blocks).map_err(io::Error::other)?;
    let runs = count.div_ceil(RUN);
    let zeros = [0; BLOCK];
    let of_zeros = digest(&zeros);
    let (next, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let work = || -> io::Result<Vec<(usize, Vec<[[u8; 32]; N]>)>> {
        let mut found = Vec::new();
        let mut buffer = vec![0; RUN * BLOCK];
        loop {
            // Cannot be cut short: it is below `runs` or the loop ends.
            let run = next.fetch_add(1, Ordering::Relaxed) as usize;
            if run >= runs || stop.load(Ordering::Relaxed) {
                return Ok(found);
            }
            let first = run * RUN;
            let buffer = &mut buffer[..(count - first).min(RUN) * BLOCK];
            if let Err(error) = file.read_exact_at(buffer, offset + (first * BLOCK) as u64) {
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
            let digests = buffer.chunks_exact(BLOCK).map(|block| if block == zeros { of_zeros } else { digest(block) });
            found.push((run, digests.collect()));
        }
    };
    let parts = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads.min(runs)).map(|_| scope.spawn(work)).collect();
        let own = work();
        let joined = others.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        std::iter::once(own).chain(joined).collect::<io::Result<Vec<_>>>()
    })?;
    let mut parts: Vec<_> = parts.into_iter().flatten().collect();
    parts.sort_unstable_by_key(|(run, _)| *run);
    Ok((0..N).map(|n| parts.iter().flat_map(|(_, digests)| digests.iter().map(move |digest| digest[n])).collect()).collect())
}

/// Compares data with a hash area: the first data block whose digest differs, `None` when all agree.
///
/// # Errors
/// When the area is not the tree of `root_hash`, is cut short, or either file cannot be read.
pub fn check(data: &File, offset: u64, area: &[u8], root_hash: &[u8; 32], threads: usize) -> io::Result<Option<u64>> {
    let superblock = Superblock::parse(area)?;
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("verity tree: {what}"));
    if superblock.data_blocks == 0 {
        return Err(invalid("it is of no blocks"));
    }
    let found = leaves(data, offset, superblock.data_blocks, &superblock.salt, threads)?;
    let (expected, root) = tree(&found, &superblock.salt, superblock.uuid);
    if root == *root_hash && area.starts_with(&expected) {
        return Ok(None);
    }
    // Which of the two is wrong: is the stored tree the root hash's?
    let start = expected.len() - found.len().next_multiple_of(PER_BLOCK) * 32;
    let stored = area.get(start..expected.len()).ok_or_else(|| invalid("it is cut short"))?;
    let stored: Vec<[u8; 32]> = stored.as_chunks::<32>().0[..found.len()].to_vec();
    let (whole, root) = tree(&stored, &superblock.salt, superblock.uuid);
    if found.len() > 1 && (root != *root_hash || !area.starts_with(&whole)) {
        return Err(invalid("it is not the tree of the root hash"));
    }
    Ok(found.iter().zip(&stored).position(|(found, stored)| found != stored).or(Some(0)).map(|block| block as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_superblock_reads_back() {
        let (area, _) = tree(&[[1; 32]; 200], &[7; 32], [9; 16]);
        assert_eq!(area.len() as u64, area_bytes(200));
        let superblock = Superblock { uuid: [9; 16], data_blocks: 200, salt: vec![7; 32] };
        assert_eq!(Superblock::parse(&area).unwrap(), superblock);
        let mut broken = area;
        broken[12] = 0;
        assert_eq!(
            Superblock::parse(&broken).unwrap_err().to_string(),
            "verity superblock: not version 1, hash type 1, sha256 and blocks of 4096 bytes"
        );
    }

    #[test]
    fn the_changed_block_is_found() {
        let data = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..700 * BLOCK).map(|at| (at / 9) as u8).collect();
        data.write_all_at(&bytes, 0).unwrap();
        let found = leaves(&data, 0, 700, &[1; 32], 3).unwrap();
        let (mut area, root) = tree(&found, &[1; 32], [2; 16]);
        assert_eq!(check(&data, 0, &area, &root, 2).unwrap(), None);
        data.write_all_at(b"x", 300 * BLOCK as u64 + 5).unwrap();
        assert_eq!(check(&data, 0, &area, &root, 2).unwrap(), Some(300));
        area[BLOCK + 40] ^= 1;
        assert_eq!(check(&data, 0, &area, &root, 2).unwrap_err().to_string(), "verity tree: it is not the tree of the root hash");
        assert!(leaves(&data, 0, 701, &[], 2).is_err());
    }
}
