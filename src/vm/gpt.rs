//! Where the partitions of a disk lie: enough of GPT to find one by number or name (UEFI 2.10, 5.3).

use anyhow::Result;

use crate::error::Problem;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Bytes from the start that hold header and table: 2 sectors and 128 entries of 128 bytes.
pub const BYTES: u64 = 34 * SECTOR;

/// A partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// From 1.
    pub number: u32,
    pub name: String,
    /// Bytes from the start of the disk.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// The partitions in the first [`BYTES`] of a disk.
///
/// # Errors
/// There is no GPT.
pub fn parse(bytes: &[u8]) -> Result<Vec<Partition>> {
    let header = bytes.get(512..1024).filter(|header| header.starts_with(b"EFI PART"));
    let Some(header) = header else { return Err(Problem::failed("the disk has no GPT").into()) };
    let number = |bytes: &[u8], at: usize, length: usize| {
        bytes[at..at + length].iter().rev().fold(0_u64, |sum, byte| (sum << 8) | u64::from(*byte))
    };
    let (first, count, size) = (number(header, 72, 8), number(header, 80, 4), number(header, 84, 4));
    let mut partitions = Vec::new();
    for index in 0..count.min(128) {
        let at = first.saturating_mul(SECTOR).saturating_add(index.saturating_mul(size));
        let entry = usize::try_from(at).ok().and_then(|at| bytes.get(at..at + 128));
        let Some(entry) = entry.filter(|entry| entry[..16] != [0; 16]) else { continue };
        let (start, end) = (number(entry, 32, 8), number(entry, 40, 8));
        let name: Vec<u16> =
            entry[56..].chunks(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).take_while(|c| *c != 0).collect();
        partitions.push(Partition {
            number: index as u32 + 1,
            name: String::from_utf16_lossy(&name),
            start: start.saturating_mul(SECTOR),
            size: (end + 1).saturating_sub(start).saturating_mul(SECTOR),
        });
    }
    Ok(partitions)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The witness is sfdisk (package fdisk).
    #[test]
    fn partitions_as_sfdisk_writes_them() {
        use crate::cmd::Cmd;
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(64 << 20).unwrap();
        let script = "label: gpt\n1 : start=2048, size=2048, name=bios\n3 : start=8192, size=16384, name=\"root-a\"\n";
        Cmd::new("sfdisk").arg("--quiet").arg(disk.path()).input(script).run().expect("package fdisk");
        let bytes = fs_err::read(disk.path()).unwrap();
        let partition = |number, name: &str, start, size| Partition { number, name: name.into(), start, size };
        let expected = [partition(1, "bios", 1 << 20, 1 << 20), partition(3, "root-a", 4 << 20, 8 << 20)];
        assert_eq!(parse(&bytes[..usize::try_from(BYTES).unwrap()]).unwrap(), expected);
        assert_eq!(parse(&[0; 1024]).unwrap_err().to_string(), "the disk has no GPT");
    }
}
