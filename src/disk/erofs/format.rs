//! The bytes of EROFS: superblock, inode, directory blocks, and their checksum.
//!
//! Layouts are those of the kernel's `fs/erofs/erofs_fs.h` and
//! `Documentation/filesystems/erofs.rst`; all numbers are little-endian. Every inode is an
//! *extended* one of 64 bytes, never the compact one of 32: the compact form takes its time from
//! the superblock, so that a new build date would change the size, and so the place, of inodes
//! that did not change.

/// Bytes in a block; the only size every kernel with 4 KiB pages mounts.
pub const BLOCK: u64 = 4096;
/// Bytes in an inode slot: an inode's number (nid) is its byte position divided by this.
pub const SLOT: u64 = 32;
/// Slots in a block.
pub const SLOTS: u64 = BLOCK / SLOT;
/// Bytes of an extended inode, `struct erofs_inode_extended`.
pub const INODE: u32 = 64;
/// Where the superblock lies, `EROFS_SUPER_OFFSET`, to leave room for boot sectors.
pub const SUPER_OFFSET: usize = 1024;
/// The first slot after the superblock's 128 bytes.
pub const FIRST_SLOT: u64 = (SUPER_OFFSET as u64 + 128) / SLOT;
/// The superblock keeps the root directory's nid in sixteen bits (`root_nid`).
pub const ROOT_LIMIT: u64 = 1 << 16;
/// `EROFS_NULL_ADDR`: in a chunk map a hole, in an inode no blocks.
pub const NULL_BLOCK: u32 = u32::MAX;
/// `EROFS_NAME_LEN`.
pub const NAME_MAX: usize = 255;
/// Bytes of a directory entry before the names, `struct erofs_dirent`.
pub const DIRENT: u64 = 12;

/// What of the superblock is not fixed.
#[derive(Debug, Clone)]
pub struct Superblock {
    pub root_nid: u16,
    /// Number of inodes.
    pub inodes: u64,
    /// Seconds since 1970; only shown, as no compact inode takes its time from it.
    pub build_time: i64,
    pub blocks: u32,
    /// First block of the shared extended attributes; 0 when there are none.
    pub xattr_block: u32,
    pub uuid: [u8; 16],
    /// Ended by a zero byte.
    pub volume_name: [u8; 16],
    /// Whether an inode is chunk-based (Linux 5.15 and newer).
    pub chunked: bool,
}

/// `EROFS_FEATURE_COMPAT_SB_CHKSUM` and `…_MTIME`: the checksum counts, times are modification times.
const COMPATIBLE: u32 = 1 | 2;
/// `EROFS_FEATURE_INCOMPAT_CHUNKED_FILE`.
const CHUNKED: u32 = 4;

impl Superblock {
    /// Writes `struct erofs_super_block` into the image's first block and then its checksum, which
    /// covers the block from the superblock on; so everything else in `block` must be there.
    pub fn write(&self, block: &mut [u8]) {
        let block = &mut block[SUPER_OFFSET..BLOCK as usize];
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(0xE0F5_E1E2u32.to_le_bytes());
        bytes.extend([0; 4]); // checksum
        bytes.extend(COMPATIBLE.to_le_bytes());
        bytes.extend([12, 0]); // log2 of the block size; no extra slots
        bytes.extend(self.root_nid.to_le_bytes());
        bytes.extend(self.inodes.to_le_bytes());
        bytes.extend(self.build_time.to_le_bytes());
        bytes.extend(0u32.to_le_bytes()); // its nanoseconds
        bytes.extend(self.blocks.to_le_bytes());
        bytes.extend(0u32.to_le_bytes()); // meta_blkaddr: nids count from the image's start
        bytes.extend(self.xattr_block.to_le_bytes());
        bytes.extend(self.uuid);
        bytes.extend(self.volume_name);
        bytes.extend((if self.chunked { CHUNKED } else { 0 }).to_le_bytes());
        bytes.resize(128, 0); // no compression, devices, long xattr prefixes, packed inode
        block[..128].copy_from_slice(&bytes);
        let checksum = crc32c(block);
        block[4..8].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// CRC-32C (Castagnoli) as the kernel's `crc32c(~0, …)`: without the final inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0x82F6_3B78 & (sum & 1).wrapping_neg()))
    })
}

/// How an inode's data is found, `i_format` bits 1 to 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataLayout {
    FlatPlain = 0,
    FlatInline = 2,
    ChunkBased = 4,
}

/// The fields of `struct erofs_inode_extended`.
#[derive(Debug, Clone)]
pub struct Inode {
    pub layout: DataLayout,
    /// Bytes of the extended attributes behind the inode, a multiple of four, 0 or at least 12.
    pub xattr_bytes: u32,
    /// With the bits of the file type.
    pub mode: u16,
    pub size: u64,
    /// First block, device number, or chunk format.
    pub union: u32,
    /// Seen by 32-bit stat only.
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub mtime_nsec: u32,
    pub nlink: u32,
}

impl Inode {
    pub fn bytes(&self) -> [u8; INODE as usize] {
        // One for the header of twelve bytes, one for each further four.
        let xattrs = if self.xattr_bytes == 0 { 0 } else { (self.xattr_bytes - 12) / 4 + 1 };
        let mut bytes = [0; INODE as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(1 | (self.layout as u16) << 1).to_le_bytes()); // bit 0: extended
        put(2, &(xattrs as u16).to_le_bytes());
        put(4, &self.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.union.to_le_bytes());
        put(20, &self.ino.to_le_bytes());
        put(24, &self.uid.to_le_bytes());
        put(28, &self.gid.to_le_bytes());
        put(32, &self.mtime.to_le_bytes());
        put(40, &self.mtime_nsec.to_le_bytes());
        put(44, &self.nlink.to_le_bytes());
        bytes
    }
}

/// `new_encode_dev` of `include/linux/kdev_t.h`; `None` when the numbers do not fit (12 and 20 bits).
pub fn device(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20).then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    pub name: &'a [u8],
    pub nid: u64,
    /// `FT_*` of `include/linux/fs_types.h`.
    pub file_type: u8,
}

/// Cuts entries, given by the lengths of their names, into directory blocks: each holds as many as
/// fit. Calls `block(first, count, bytes used)` for each.
pub fn directory_blocks(names: impl Iterator<Item = usize>, mut block: impl FnMut(usize, usize, u64)) {
    let (mut first, mut count, mut used) = (0, 0, 0);
    for name in names {
        let more = DIRENT + name as u64;
        if used + more > BLOCK {
            block(first, count, used);
            (first, count, used) = (first + count, 0, 0);
        }
        count += 1;
        used += more;
    }
    if count > 0 {
        block(first, count, used);
    }
}

/// One directory block: the entries, then their names without separators. `entries` sorted by
/// name as bytes and fitting into a block; `block` is zeroed.
pub fn directory_block(entries: &[Entry<'_>], block: &mut [u8]) {
    let mut at = entries.len() * DIRENT as usize;
    for (entry, head) in entries.iter().zip(0..) {
        let head = head * DIRENT as usize;
        block[head..head + 8].copy_from_slice(&entry.nid.to_le_bytes());
        block[head + 8..head + 10].copy_from_slice(&(at as u16).to_le_bytes());
        block[head + 10] = entry.file_type;
        block[at..at + entry.name.len()].copy_from_slice(entry.name);
        at += entry.name.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_the_known_one() {
        // The check value of CRC-32C (RFC 3720, appendix B.4 uses the same polynomial) is E3069283 inverted.
        assert_eq!(crc32c(b"123456789"), !0xE306_9283);
    }

    #[test]
    fn device_numbers_are_those_of_the_kernel() {
        let table = [((1, 3), Some(0x103)), ((8, 256), Some(0x10_0800)), ((4095, (1 << 20) - 1), Some(u32::MAX))];
        for ((major, minor), expected) in table {
            assert_eq!(device(major, minor), expected);
        }
        assert_eq!((device(4096, 0), device(0, 1 << 20)), (None, None));
    }

    #[test]
    fn directory_blocks_are_filled_to_the_last_byte() {
        // 4096 = 16 × (12 + 244), so sixteen such names fill a block and the next starts another.
        let mut blocks = Vec::new();
        directory_blocks([244; 17].into_iter(), |first, count, used| blocks.push((first, count, used)));
        assert_eq!(blocks, [(0, 16, 4096), (16, 1, 256)]);
    }
}
