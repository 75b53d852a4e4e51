//! The superblock of ext4: is there one, is it clean, how large is it.
//!
//! Layout: kernel documentation, ext4, "Super Block".

/// Where the first superblock starts.
pub const OFFSET: u64 = 1024;
/// Where the second one starts with blocks of 4 KiB: in the first block of the second group of 32768.
pub const BACKUP_OFFSET: u64 = 32768 * 4096;
pub const LENGTH: usize = 1024;

/// What the superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub block_size: u64,
    pub blocks: u64,
    /// It was left in order, or its journal tells how to put it in order.
    pub clean: bool,
}

/// `None` when it is no superblock.
pub fn parse(bytes: &[u8]) -> Option<Superblock> {
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if bytes.len() < LENGTH || u16_at(56) != 0xef53 || u32_at(24) > 6 {
        return None;
    }
    const HAS_JOURNAL: u32 = 4;
    const NEEDS_RECOVERY: u32 = 4;
    const SIXTY_FOUR_BIT: u32 = 0x80;
    let (state, errors) = (u16_at(58), u32_at(0x194));
    let high = if u32_at(96) & SIXTY_FOUR_BIT != 0 { u64::from(u32_at(0x150)) << 32 } else { 0 };
    let replayable = u32_at(92) & HAS_JOURNAL != 0 && u32_at(96) & NEEDS_RECOVERY != 0;
    // State: 1 unmounted in order, 2 errors seen, 4 orphans being recovered.
    let clean = state & 2 == 0 && errors == 0 && (state & 1 != 0 || replayable);
    Some(Superblock { block_size: 1024 << u32_at(24), blocks: u64::from(u32_at(4)) | high, clean })
}

/// The name of what lies at the start of a partition and is not ours to overwrite.
/// `start` are the first bytes, 68 KiB or what there is.
pub fn foreign(start: &[u8]) -> Option<&'static str> {
    let signatures: [(usize, &[u8], &str); 10] = [
        (0, b"LUKS\xba\xbe", "LUKS"),
        (0, b"XFSB", "XFS"),
        (0, b"hsqs", "squashfs"),
        (3, b"NTFS    ", "NTFS"),
        (82, b"FAT32   ", "FAT"),
        (54, b"FAT16   ", "FAT"),
        (512, b"LABELONE", "LVM"),
        (1024, b"\xe2\xe1\xf5\xe0", "EROFS"),
        (4086, b"SWAPSPACE2", "swap space"),
        (65600, b"_BHRfS_M", "btrfs"),
    ];
    signatures.into_iter().find(|(at, magic, _)| start.get(*at..at + magic.len()) == Some(*magic)).map(|(_, _, name)| name)
}
