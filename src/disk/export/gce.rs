//! What Google Compute Engine imports: `disk.raw`, a multiple of 1 GiB, in a gzipped tar archive
//! of the old GNU format with a sparse map (tar manual, "Old GNU Format").
//!
//! The gzip stream is one member, made of parts that are compressed in parallel and end at a byte
//! (RFC 1951, section 3.2.4: an empty stored block), as pigz does.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use flate2::{Compress, Compression, Crc, FlushCompress, Status};

use super::chunks;

/// The image's length is a multiple of this.
const STEP: u64 = 1 << 30;
/// Bytes of a block of tar.
const BLOCK: usize = 512;
/// Bytes tar archives are a multiple of.
const RECORD: u64 = 10_240;
/// Bytes compressed as one part.
const PART: u64 = 1 << 20;
/// Entries of the sparse map in the header, and in each block behind it.
const IN_HEADER: usize = 4;
const IN_BLOCK: usize = 21;
/// As for VMDK.
const LEVEL: Compression = Compression::new(3);

/// A part of the archive.
#[derive(Debug, Clone)]
enum Part {
    Bytes(Vec<u8>),
    /// Of the image.
    Range(Range<u64>),
}

/// Writes the archive.
pub(super) fn write(source: &File, out: &File, threads: usize) -> io::Result<()> {
    let length = source.metadata()?.len();
    let runs = chunks::runs(source, threads)?;
    let mut out = BufWriter::with_capacity(1 << 20, out);
    // Deflate, no name, no time, fastest-or-best not said, system unknown.
    out.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff])?;
    let mut sum = Crc::new();
    let compress = |part: &Part| {
        let bytes = match part {
            Part::Bytes(bytes) => bytes.clone(),
            Part::Range(range) => {
                let mut bytes = vec![0; (range.end - range.start) as usize];
                source.read_exact_at(&mut bytes, range.start)?;
                bytes
            }
        };
        let mut sum = Crc::new();
        sum.update(&bytes);
        Ok((deflated(&bytes)?, sum))
    };
    chunks::in_order(&parts(&runs, length), threads, compress, |(bytes, part)| {
        sum.combine(&part);
        out.write_all(&bytes)
    })?;
    // An empty last block; checksum and length, both modulo 2^32.
    out.write_all(&[3, 0])?;
    out.write_all(&sum.sum().to_le_bytes())?;
    out.write_all(&sum.amount().to_le_bytes())?;
    out.flush()
}

/// The archive's bytes in order.
fn parts(runs: &[Range<u64>], length: u64) -> Vec<Part> {
    let stored: u64 = runs.iter().map(|run| run.end - run.start).sum();
    let head = head(runs, length.next_multiple_of(STEP), stored);
    let written = head.len() as u64 + stored;
    let end = (written.next_multiple_of(BLOCK as u64) + 2 * BLOCK as u64).next_multiple_of(RECORD);
    let mut parts = vec![Part::Bytes(head)];
    for run in runs {
        let starts = (run.start..run.end).step_by(PART as usize);
        parts.extend(starts.map(|start| Part::Range(start..(start + PART).min(run.end))));
    }
    parts.push(Part::Bytes(vec![0; (end - written) as usize]));
    parts
}

/// The header block and the blocks of the sparse map behind it.
fn head(runs: &[Range<u64>], length: u64, stored: u64) -> Vec<u8> {
    let mut map: Vec<(u64, u64)> = runs.iter().map(|run| (run.start, run.end - run.start)).collect();
    // Where the file ends, when it does not end with data.
    if runs.last().is_none_or(|run| run.end < length) {
        map.push((length, 0));
    }
    let first = map.len().min(IN_HEADER);
    let (first, rest) = map.split_at(first);
    let mut bytes = vec![0; BLOCK];
    bytes[..8].copy_from_slice(b"disk.raw");
    for (at, width, value) in [(100, 8, 0o644), (108, 8, 0), (116, 8, 0), (124, 12, stored), (136, 12, 0)] {
        put_number(&mut bytes[at..at + width], value);
    }
    bytes[156] = b'S';
    bytes[257..265].copy_from_slice(b"ustar  \0");
    put_map(&mut bytes[386..482], first);
    bytes[482] = u8::from(!rest.is_empty());
    put_number(&mut bytes[483..495], length);
    bytes[148..156].fill(b' ');
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let blocks = rest.chunks(IN_BLOCK).count();
    for (index, entries) in rest.chunks(IN_BLOCK).enumerate() {
        let mut block = [0; BLOCK];
        put_map(&mut block[..504], entries);
        block[504] = u8::from(index + 1 < blocks);
        bytes.extend_from_slice(&block);
    }
    bytes
}

fn put_map(field: &mut [u8], entries: &[(u64, u64)]) {
    for ((offset, length), place) in entries.iter().zip(field.chunks_exact_mut(24)) {
        put_number(&mut place[..12], *offset);
        put_number(&mut place[12..], *length);
    }
}

/// Octal digits and a zero; from 8 GiB on binary, big-endian, with the top bit set.
fn put_number(field: &mut [u8], value: u64) {
    let digits = field.len() - 1;
    if value < 1 << (3 * digits) {
        field.copy_from_slice(format!("{value:0digits$o}\0").as_bytes());
    } else {
        field[0] = 0x80;
        field[digits - 7..].copy_from_slice(&value.to_be_bytes());
    }
}

/// Deflated, up to the end of a byte and without a last block.
fn deflated(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 8 + 64);
    let mut state = Compress::new(LEVEL, false);
    loop {
        let rest = &bytes[state.total_in() as usize..];
        let status = state.compress_vec(rest, &mut out, FlushCompress::Sync).map_err(io::Error::other)?;
        // Room left over means that everything has come out.
        if status != Status::Ok || (out.len() < out.capacity() && state.total_in() as usize == bytes.len()) {
            return Ok(out);
        }
        out.reserve(bytes.len() / 8 + 64);
    }
}
