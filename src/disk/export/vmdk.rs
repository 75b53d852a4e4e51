//! Stream-optimized VMDK ("Virtual Disk Format 5.0", VMware 2011): compressed grains one after the
//! other, tables behind what they describe, so that a reader can take the file as a stream.
//!
//! ```text
//! sector 0     header, which says that the directory is at the end
//! sector 1     descriptor, text
//! sector 128   for each 32 MiB that is not all zeros: its grains, each with a marker, and its table
//! then         directory, footer (the header again, with the directory's place), end marker
//! ```

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt as _;

use flate2::{Compress, Compression, FlushCompress};

use super::chunks;

const SECTOR: u64 = 512;
/// Sectors of a grain.
const GRAIN: u64 = chunks::CHUNK / SECTOR;
/// Grains of a table.
const TABLE: u64 = 512;
/// Sectors before the first grain.
const OVERHEAD: u64 = 128;
/// Sectors of the descriptor.
const DESCRIPTOR: u64 = 20;
/// The directory's place in a header that does not know it.
const AT_END: u64 = u64::MAX;
/// Kinds of markers.
const GRAIN_TABLE: u32 = 1;
const GRAIN_DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;
/// For a Debian root level 6 makes the file 2 % smaller in 1.6 times the time, level 1 18 % larger in
/// two thirds of it.
const LEVEL: Compression = Compression::new(3);

/// Writes the image.
pub(super) fn write(source: &File, out: &File, digest: &[u8; 32], threads: usize) -> io::Result<()> {
    let length = source.metadata()?.len();
    let sectors = length.div_ceil(SECTOR);
    let mut out = Out { file: BufWriter::with_capacity(1 << 20, out), sector: 0 };
    out.put(&header(sectors, AT_END))?;
    let mut text = descriptor(sectors, digest).into_bytes();
    text.resize(((OVERHEAD - 1) * SECTOR) as usize, 0);
    out.put(&text)?;
    let grains: Vec<u64> = chunks::runs(source, threads)?
        .into_iter()
        .flat_map(|run| run.start / chunks::CHUNK..run.end.div_ceil(chunks::CHUNK))
        .collect();
    let tables = sectors.div_ceil(GRAIN * TABLE);
    let mut directory = vec![0_u32; tables as usize];
    let mut open: Option<(u64, Vec<u32>)> = None;
    let compress = |grain: &u64| Ok((*grain, compressed(source, *grain, length)?));
    chunks::in_order(&grains, threads, compress, |(grain, bytes)| {
        let number = grain / TABLE;
        if let Some((other, table)) = open.take_if(|(other, _)| *other != number) {
            directory[other as usize] = out.table(GRAIN_TABLE, &table)?;
        }
        let (_, table) = open.get_or_insert_with(|| (number, vec![0; TABLE as usize]));
        table[(grain % TABLE) as usize] = out.sector()?;
        let mut marker = Vec::with_capacity(12 + bytes.len());
        marker.extend_from_slice(&(grain * GRAIN).to_le_bytes());
        marker.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        marker.extend_from_slice(&bytes);
        out.put(&marker)
    })?;
    if let Some((number, table)) = open {
        directory[number as usize] = out.table(GRAIN_TABLE, &table)?;
    }
    let at = out.table(GRAIN_DIRECTORY, &directory)?;
    out.put(&marker(1, FOOTER))?;
    out.put(&header(sectors, u64::from(at)))?;
    out.put(&[0; SECTOR as usize])?;
    out.file.flush()
}

/// A file that is written in whole sectors.
#[derive(Debug)]
struct Out<W> {
    file: W,
    sector: u64,
}

impl<W: Write> Out<W> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        let padding = bytes.len().next_multiple_of(SECTOR as usize) - bytes.len();
        self.file.write_all(&[0; SECTOR as usize][..padding])?;
        self.sector += (bytes.len() + padding) as u64 / SECTOR;
        Ok(())
    }

    fn sector(&self) -> io::Result<u32> {
        u32::try_from(self.sector)
            .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "a VMDK file cannot be larger than 2 TiB"))
    }

    /// Writes a table or directory with its marker; the sector of its first entry.
    fn table(&mut self, kind: u32, entries: &[u32]) -> io::Result<u32> {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        self.put(&marker((bytes.len() as u64).div_ceil(SECTOR), kind))?;
        let at = self.sector()?;
        self.put(&bytes)?;
        Ok(at)
    }
}

/// A marker for `sectors` sectors of something that is not a grain.
fn marker(sectors: u64, kind: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&kind.to_le_bytes());
    bytes
}

fn compressed(source: &File, grain: u64, length: u64) -> io::Result<Vec<u8>> {
    let start = grain * chunks::CHUNK;
    let mut bytes = vec![0; chunks::CHUNK as usize];
    let kept = (length - start).min(chunks::CHUNK) as usize;
    source.read_exact_at(&mut bytes[..kept], start)?;
    let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 8 + 64);
    Compress::new(LEVEL, true).compress_vec(&bytes, &mut out, FlushCompress::Finish).map_err(io::Error::other)?;
    Ok(out)
}

fn header(sectors: u64, directory: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"KDMV");
    put(4, &3_u32.to_le_bytes());
    // The line ends below are valid; grains are compressed; there are markers.
    put(8, &0x0003_0001_u32.to_le_bytes());
    put(12, &sectors.to_le_bytes());
    put(20, &GRAIN.to_le_bytes());
    put(28, &1_u64.to_le_bytes());
    put(36, &DESCRIPTOR.to_le_bytes());
    put(44, &(TABLE as u32).to_le_bytes());
    put(56, &directory.to_le_bytes());
    put(64, &OVERHEAD.to_le_bytes());
    put(73, b"\n \r\n");
    // Deflate.
    put(77, &1_u16.to_le_bytes());
    bytes
}

/// The text that describes the disk; its content id is derived from the digest.
fn descriptor(sectors: u64, digest: &[u8; 32]) -> String {
    // All ones would mean that there is no parent.
    let id = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]).min(u32::MAX - 1);
    let cylinders = (sectors / (255 * 63)).min(65_535);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID={id:08x}\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n\
         # Extent description\nRW {sectors} SPARSE \"disk.vmdk\"\n\n\
         # The Disk Data Base\n#DDB\n\nddb.adapterType = \"lsilogic\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\nddb.virtualHWVersion = \"10\"\n"
    )
}
