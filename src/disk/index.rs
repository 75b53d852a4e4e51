//! The block index of a root image: the digest of every block, so that an update moves only what
//! a machine has not got.
//!
//! On the disk, numbers little-endian:
//!
//! ```text
//!  0  8  magic "PLBLOCKS"
//!  8  4  version, 1
//! 12  4  bytes of a block, 4096
//! 16  8  number of blocks
//! 24  8  zeros
//! 32 32  SHA-256 of everything behind the header
//! 64     SHA-256 of each block, in order
//! ```

use std::collections::HashSet;
use std::fs::File;
use std::io;

use sha2::{Digest as _, Sha256};

use super::verity::{BLOCK, Salted, each_block};

const MAGIC: &[u8; 8] = b"PLBLOCKS";
const VERSION: u32 = 1;
/// Bytes before the digests.
const HEADER: usize = 64;

/// Digest of every block of an image, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Index {
    pub blocks: Vec<[u8; 32]>,
}

/// How an image differs from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Changed {
    /// Blocks of the new image.
    pub blocks: u64,
    /// Those of them that the old image has not got at the same place.
    pub moved_or_new: u64,
    /// Those of them that the old image has got nowhere: what an update has to move.
    pub new: u64,
}

/// Digest of one block.
pub fn digest(block: &[u8]) -> [u8; 32] {
    Sha256::digest(block).into()
}

impl Index {
    /// Reads `blocks` blocks of `file` from byte `offset` on, with `threads` threads.
    pub fn of_file(file: &File, offset: u64, blocks: u64, threads: usize) -> io::Result<Self> {
        let mut found = each_block(file, offset, blocks, threads, |block| [digest(block)])?;
        Ok(Self { blocks: found.swap_remove(0) })
    }

    pub fn render(&self) -> Vec<u8> {
        let body = self.blocks.as_flattened();
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(BLOCK as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.blocks.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&digest(body));
        bytes.extend_from_slice(body);
        bytes
    }

    /// # Errors
    /// `InvalidData` for another format or version, a wrong length, a wrong digest.
    pub fn parse(bytes: &[u8]) -> io::Result<Self> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("block index: {what}"));
        let (header, body) = bytes.split_at_checked(HEADER).ok_or_else(|| invalid("it is cut short".into()))?;
        let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if &header[..8] != MAGIC {
            return Err(invalid("it does not begin like one".into()));
        }
        if (u32_at(8), u32_at(12)) != (VERSION, BLOCK as u32) {
            return Err(invalid(format!("version {} with blocks of {} bytes is not known", u32_at(8), u32_at(12))));
        }
        let count = u64::from_le_bytes(*header[16..].first_chunk().expect("the header is 64 bytes long"));
        let (blocks, rest) = body.as_chunks::<32>();
        if blocks.len() as u64 != count || !rest.is_empty() {
            return Err(invalid(format!("it has {} digests and says {count}", blocks.len())));
        }
        if digest(body) != header[32..64] {
            return Err(invalid("its digest is wrong".into()));
        }
        Ok(Self { blocks: blocks.to_vec() })
    }
}

/// What of `new` is not in `old`.
pub fn changed(old: &Index, new: &Index) -> Changed {
    let known: HashSet<&[u8; 32]> = old.blocks.iter().collect();
    let moved_or_new = new.blocks.iter().enumerate().filter(|(at, block)| old.blocks.get(*at) != Some(block));
    let (mut elsewhere, mut absent) = (0, 0);
    for (_, block) in moved_or_new {
        *if known.contains(block) { &mut elsewhere } else { &mut absent } += 1;
    }
    Changed { blocks: new.blocks.len() as u64, moved_or_new: elsewhere + absent, new: absent }
}

/// Leaves of the hash tree and the block index in one pass over `file`: the digests are two, the
/// reading and the misses of the cache are one.
pub fn leaves_and_index(
    file: &File,
    offset: u64,
    blocks: u64,
    salt: &[u8],
    threads: usize,
) -> io::Result<(Vec<[u8; 32]>, Index)> {
    let salted = Salted::new(salt);
    let mut found = each_block(file, offset, blocks, threads, |block| [salted.block(block), digest(block)])?;
    let index = Index { blocks: found.swap_remove(1) };
    Ok((found.swap_remove(0), index))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(blocks: &[u8]) -> Index {
        Index { blocks: blocks.iter().map(|block| [*block; 32]).collect() }
    }

    #[test]
    fn changes_are_counted() {
        let cases = [
            ("", "", (0, 0, 0)),
            ("abc", "abc", (3, 0, 0)),
            ("abc", "ab", (2, 0, 0)),
            ("abc", "xabc", (4, 4, 1)),
            ("abc", "acb", (3, 2, 0)),
            ("abc", "axcx", (4, 2, 2)),
        ];
        for (old, new, (blocks, moved_or_new, absent)) in cases {
            let found = changed(&index(old.as_bytes()), &index(new.as_bytes()));
            assert_eq!(found, Changed { blocks, moved_or_new, new: absent }, "{old} → {new}");
        }
    }

    #[test]
    fn a_broken_index_is_refused() {
        let whole = index(b"abc").render();
        assert_eq!(Index::parse(&whole).unwrap(), index(b"abc"));
        let cases: [(usize, u8, &str); 4] = [
            (0, b'X', "it does not begin like one"),
            (8, 2, "version 2 with blocks of 4096 bytes is not known"),
            (16, 4, "it has 3 digests and says 4"),
            (70, 0, "its digest is wrong"),
        ];
        for (at, byte, expected) in cases {
            let mut broken = whole.clone();
            broken[at] = byte;
            assert_eq!(Index::parse(&broken).unwrap_err().to_string(), format!("block index: {expected}"));
        }
        assert_eq!(Index::parse(&whole[..60]).unwrap_err().to_string(), "block index: it is cut short");
        assert_eq!(Index::parse(&whole[..100]).unwrap_err().to_string(), "block index: it has 1 digests and says 3");
    }
}
