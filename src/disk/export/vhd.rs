//! The footer that makes a raw image a fixed VHD (Microsoft, "Virtual Hard Disk Image Format
//! Specification" 1.0, section "Hard Disk Footer Format"); numbers big-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// Azure takes multiples of this only.
const STEP: u64 = 1 << 20;

/// Puts the footer behind the `length` bytes of an image.
pub(super) fn finish(out: &File, length: u64, digest: &[u8; 32]) -> io::Result<()> {
    let length = length.next_multiple_of(STEP);
    out.write_all_at(&footer(length, digest), length)
}

fn footer(length: u64, digest: &[u8; 32]) -> [u8; 512] {
    let mut bytes = [0; 512];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"conectix");
    // Features (a reserved bit that is always 1), version, no further header, time.
    put(8, &2_u32.to_be_bytes());
    put(12, &0x0001_0000_u32.to_be_bytes());
    put(16, &u64::MAX.to_be_bytes());
    put(24, &0_u32.to_be_bytes());
    // The program: with this name readers go by the length, with an unknown one by the geometry.
    put(28, b"win ");
    put(32, &0x000A_0000_u32.to_be_bytes());
    put(36, b"Wi2k");
    put(40, &length.to_be_bytes());
    put(48, &length.to_be_bytes());
    // Cylinders, heads and sectors: the most, so that no reader cuts the disk to them; as qemu-img.
    put(56, &u16::MAX.to_be_bytes());
    put(58, &[16, 255]);
    // A fixed disk.
    put(60, &2_u32.to_be_bytes());
    put(68, &digest[..16]);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[64..68].copy_from_slice(&(!sum).to_be_bytes());
    bytes
}
