//! GUID partition tables: protective record, primary and backup copy.
//!
//! Layout from the UEFI specification 2.10, section 5 (tables 5-3 to 5-7): sector 0 the protective
//! record, sector 1 the header, sectors 2 to 33 the 128 entries; at the end the entries again and
//! the header in the last sector. Types from the Discoverable Partitions Specification. What is
//! written follows from the value alone: no ids are invented here (the crate `gpt` makes them up,
//! and would be more to teach than to write).

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::str::FromStr;

use super::table::{Role, SECTOR};

/// Entries of a table; the least the specification allows.
const ENTRIES: usize = 128;
/// Bytes of an entry.
const ENTRY: usize = 128;
/// Sectors of the entries.
const ENTRY_SECTORS: u64 = (ENTRIES * ENTRY) as u64 / SECTOR;
/// Bytes of a header that its checksum covers.
const HEADER: usize = 92;
const SECTOR_BYTES: usize = SECTOR as usize;
/// Sectors of protective record, header and entries.
pub const PRIMARY_SECTORS: u64 = 2 + ENTRY_SECTORS;
/// Sectors of entries and header at the end.
pub const BACKUP_SECTORS: u64 = 1 + ENTRY_SECTORS;

/// A GUID as it is on the disk: the first three fields little-endian (UEFI specification, appendix A).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// From bytes in the order of the text, as a digest or a UUID has them; and back.
    pub const fn swapped(bytes: [u8; 16]) -> Self {
        let b = bytes;
        Self([b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6], b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]])
    }

    /// Bytes in the order of the text.
    pub const fn text_order(self) -> [u8; 16] {
        Self::swapped(self.0).0
    }

    /// From bytes in the order of the text, made a random UUID of RFC 9562 by its version and variant bits.
    #[must_use]
    pub const fn version_4(mut bytes: [u8; 16]) -> Self {
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        Self::swapped(bytes)
    }

    const fn from_number(text: u128) -> Self {
        Self::swapped(text.to_be_bytes())
    }
}

impl fmt::Display for Guid {
    /// `4f68bce3-e8cd-4db1-96e7-fbcaf984b709`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.text_order().into_iter().enumerate() {
            let dash = if matches!(at, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Guid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let dashes = text.len() == 36 && [8, 13, 18, 23].iter().all(|at| text.as_bytes()[*at] == b'-');
        let digits: String = text.chars().filter(|character| *character != '-').collect();
        match u128::from_str_radix(&digits, 16) {
            Ok(number) if dashes && digits.len() == 32 && !digits.starts_with('+') => Ok(Self::from_number(number)),
            _ => Err(format!("`{text}` is not a GUID")),
        }
    }
}

/// GRUB's core image ("BIOS boot partition").
pub const BIOS: Guid = Guid::from_number(0x2168_6148_6449_6E6F_744E_6565_6445_4649);
/// EFI system partition.
pub const ESP: Guid = Guid::from_number(0xC12A_7328_F81F_11D2_BA4B_00A0_C93E_C93B);
/// Root, x86-64.
pub const ROOT: Guid = Guid::from_number(0x4F68_BCE3_E8CD_4DB1_96E7_FBCA_F984_B709);
/// Hash tree of a root, x86-64.
pub const ROOT_VERITY: Guid = Guid::from_number(0x2C73_57ED_EBD2_46D9_AEC1_23D4_37EC_2BF5);
/// `/var`.
pub const VAR: Guid = Guid::from_number(0x4D21_B016_B534_45C2_A9FB_5C16_E091_FD2D);

/// The type of a partition of ours.
pub const fn kind(role: Role) -> Guid {
    match role {
        Role::Bios => BIOS,
        Role::Esp => ESP,
        Role::RootA | Role::RootB => ROOT,
        Role::VerityA | Role::VerityB => ROOT_VERITY,
        Role::Var => VAR,
    }
}

/// Ids of a root partition and of its hash tree: the halves of the root hash.
pub const fn halves(root_hash: &[u8; 32]) -> (Guid, Guid) {
    let (mut first, mut last) = ([0; 16], [0; 16]);
    first.copy_from_slice(root_hash.split_at(16).0);
    last.copy_from_slice(root_hash.split_at(16).1);
    (Guid::swapped(first), Guid::swapped(last))
}

/// One partition of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// From 1.
    pub number: u32,
    pub kind: Guid,
    pub id: Guid,
    /// First sector.
    pub first: u64,
    /// Last sector, which belongs to it.
    pub last: u64,
    /// At most 36 UTF-16 units.
    pub name: String,
    pub attributes: u64,
}

/// A table of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpt {
    pub disk: Guid,
    /// Sectors of the disk the table is made for: the backup header is in the last one.
    pub sectors: u64,
    /// Sorted by number, which need not be consecutive.
    pub partitions: Vec<Partition>,
}

impl Gpt {
    /// What is wrong with the value: numbers, names, overlaps, bounds.
    pub fn problem(&self) -> Option<String> {
        let usable = PRIMARY_SECTORS..=self.sectors.saturating_sub(BACKUP_SECTORS + 1);
        let mut sorted: Vec<&Partition> = self.partitions.iter().collect();
        sorted.sort_unstable_by_key(|partition| partition.first);
        for partition in &sorted {
            let number = partition.number;
            if number == 0 || number as usize > ENTRIES {
                return Some(format!("a partition has the number {number}"));
            }
            if self.partitions.iter().filter(|other| other.number == number).count() > 1 {
                return Some(format!("there are two partitions {number}"));
            }
            if partition.name.encode_utf16().count() > 36 {
                return Some(format!("the name of partition {number} is longer than 36 characters"));
            }
            if partition.first > partition.last || !usable.contains(&partition.first) || !usable.contains(&partition.last) {
                let (first, last) = (partition.first, partition.last);
                return Some(format!(
                    "partition {number} is in sectors {first} to {last}, outside of {} to {}",
                    usable.start(),
                    usable.end()
                ));
            }
            if partition.kind == Guid::default() {
                return Some(format!("partition {number} has no type"));
            }
        }
        let overlap = sorted.windows(2).find(|pair| pair[0].last >= pair[1].first);
        overlap.map(|pair| format!("partitions {} and {} overlap", pair[0].number, pair[1].number))
    }

    fn entries(&self) -> Vec<u8> {
        let mut bytes = vec![0; ENTRIES * ENTRY];
        for partition in &self.partitions {
            let entry = &mut bytes[(partition.number as usize - 1) * ENTRY..][..ENTRY];
            entry[..16].copy_from_slice(&partition.kind.0);
            entry[16..32].copy_from_slice(&partition.id.0);
            entry[32..40].copy_from_slice(&partition.first.to_le_bytes());
            entry[40..48].copy_from_slice(&partition.last.to_le_bytes());
            entry[48..56].copy_from_slice(&partition.attributes.to_le_bytes());
            for (unit, place) in partition.name.encode_utf16().zip(entry[56..].as_chunks_mut::<2>().0) {
                *place = unit.to_le_bytes();
            }
        }
        bytes
    }

    /// A header for sector `own` whose entries begin at sector `entries_at`.
    fn header(&self, entries: &[u8], own: u64, other: u64, entries_at: u64) -> [u8; SECTOR_BYTES] {
        let mut bytes = [0; SECTOR_BYTES];
        bytes[..8].copy_from_slice(b"EFI PART");
        bytes[8..12].copy_from_slice(&0x0001_0000_u32.to_le_bytes());
        bytes[12..16].copy_from_slice(&(HEADER as u32).to_le_bytes());
        bytes[24..32].copy_from_slice(&own.to_le_bytes());
        bytes[32..40].copy_from_slice(&other.to_le_bytes());
        bytes[40..48].copy_from_slice(&PRIMARY_SECTORS.to_le_bytes());
        bytes[48..56].copy_from_slice(&(self.sectors - BACKUP_SECTORS - 1).to_le_bytes());
        bytes[56..72].copy_from_slice(&self.disk.0);
        bytes[72..80].copy_from_slice(&entries_at.to_le_bytes());
        bytes[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
        bytes[84..88].copy_from_slice(&(ENTRY as u32).to_le_bytes());
        bytes[88..92].copy_from_slice(&crc32(entries).to_le_bytes());
        let sum = crc32(&bytes[..HEADER]);
        bytes[16..20].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// The first [`PRIMARY_SECTORS`] sectors of the disk; the boot code of the protective record
    /// (bytes 0 to 439) is zeros.
    ///
    /// # Errors
    /// `InvalidInput` with what [`Gpt::problem`] says.
    pub fn primary(&self) -> io::Result<Vec<u8>> {
        self.refuse_problem()?;
        let entries = self.entries();
        let mut bytes = protective_record(self.sectors).to_vec();
        bytes.extend_from_slice(&self.header(&entries, 1, self.sectors - 1, 2));
        bytes.extend_from_slice(&entries);
        Ok(bytes)
    }

    /// The last [`BACKUP_SECTORS`] sectors of the disk.
    ///
    /// # Errors
    /// As [`Gpt::primary`].
    pub fn backup(&self) -> io::Result<Vec<u8>> {
        self.refuse_problem()?;
        let mut bytes = self.entries();
        let header = self.header(&bytes, self.sectors - 1, 1, self.sectors - BACKUP_SECTORS);
        bytes.extend_from_slice(&header);
        Ok(bytes)
    }

    fn refuse_problem(&self) -> io::Result<()> {
        self.problem()
            .map_or(Ok(()), |problem| Err(io::Error::new(io::ErrorKind::InvalidInput, format!("partition table: {problem}"))))
    }

    /// Writes both copies, keeping the boot code that is in sector 0. The file is made as long as the disk.
    ///
    /// # Errors
    /// As [`Gpt::primary`], or when the file cannot be written.
    pub fn write(&self, disk: &File) -> io::Result<()> {
        let (primary, backup) = (self.primary()?, self.backup()?);
        if disk.metadata()?.len() < self.sectors * SECTOR {
            disk.set_len(self.sectors * SECTOR)?;
        }
        // The copy at the end first: a table that is cut off in the middle still has a good one.
        disk.write_all_at(&backup, (self.sectors - BACKUP_SECTORS) * SECTOR)?;
        disk.write_all_at(&primary[440..], 440)
    }

    /// Reads the table of a disk of `sectors` sectors.
    ///
    /// # Errors
    /// `InvalidData` unless both copies are whole, agree, and are where they belong.
    pub fn read(disk: &File, sectors: u64) -> io::Result<Self> {
        let (table, problems) = Self::read_any(disk, sectors)?;
        match problems.first() {
            None => Ok(table),
            Some(problem) => Err(io::Error::new(io::ErrorKind::InvalidData, format!("partition table: {problem}"))),
        }
    }

    /// The primary copy in `start`, the first [`PRIMARY_SECTORS`] of a disk.
    ///
    /// # Errors
    /// `InvalidData` when it is not whole.
    pub fn of_start(start: &[u8]) -> io::Result<Self> {
        let read = |bytes: &mut [u8], at: u64| {
            let from = usize::try_from(at).ok().and_then(|at| start.get(at..at + bytes.len()));
            bytes.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        };
        let (table, _) = read_copy(&read, 1)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("partition table: {error}")))?;
        Ok(table)
    }

    /// Reads the better copy, and everything that is wrong with either.
    ///
    /// # Errors
    /// `InvalidData` when no copy is whole.
    pub fn read_any(disk: &File, sectors: u64) -> io::Result<(Self, Vec<String>)> {
        let mut problems = Vec::new();
        let mut record = [0; SECTOR_BYTES];
        disk.read_exact_at(&mut record, 0)?;
        // Not its size: programs that make a table larger leave that as it was.
        if record[450] != 0xee || record[454..458] != [1, 0, 0, 0] || record[510..] != [0x55, 0xaa] {
            problems.push("there is no protective record".into());
        }
        let read = |bytes: &mut [u8], at: u64| disk.read_exact_at(bytes, at);
        let primary = read_copy(&read, 1).map_err(|error| format!("primary copy: {error}"));
        let last = match &primary {
            Ok((table, _)) => table.sectors - 1,
            Err(_) => sectors.saturating_sub(1),
        };
        let backup = read_copy(&read, last).map_err(|error| format!("backup copy: {error}"));
        match (primary, backup) {
            (Ok((table, _)), Ok((other, _))) => {
                if table.sectors != sectors {
                    problems.push(format!("it is for {} sectors, and the disk has {sectors}", table.sectors));
                }
                if table != other {
                    problems.push("the copies differ".into());
                }
                problems.extend(table.problem());
                Ok((table, problems))
            }
            (Ok((table, _)), Err(error)) | (Err(error), Ok((table, _))) => {
                problems.push(error);
                problems.extend(table.problem());
                Ok((table, problems))
            }
            (Err(primary), Err(backup)) => {
                Err(io::Error::new(io::ErrorKind::InvalidData, format!("partition table: {primary}; {backup}")))
            }
        }
    }
}

/// Fills a buffer with what is at an offset of a disk.
type ReadAt<'a> = &'a dyn Fn(&mut [u8], u64) -> io::Result<()>;

/// One copy, whose header is in sector `own`, and that sector.
fn read_copy(read: ReadAt<'_>, own: u64) -> Result<(Gpt, u64), String> {
    let mut header = [0; SECTOR_BYTES];
    read(&mut header, own.saturating_mul(SECTOR)).map_err(|error| error.to_string())?;
    let u32_at = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
    if &header[..8] != b"EFI PART" {
        return Err("there is none".into());
    }
    let mut summed = header;
    summed[16..20].fill(0);
    if u32_at(12) as usize != HEADER || crc32(&summed[..HEADER]) != u32_at(16) {
        return Err("the checksum of the header is wrong".into());
    }
    if u64_at(24) != own || (u32_at(80) as usize, u32_at(84) as usize) != (ENTRIES, ENTRY) {
        return Err("the header is not this sector's, or the table has not 128 entries of 128 bytes".into());
    }
    let mut entries = vec![0; ENTRIES * ENTRY];
    read(&mut entries, u64_at(72).saturating_mul(SECTOR)).map_err(|error| error.to_string())?;
    if crc32(&entries) != u32_at(88) {
        return Err("the checksum of the entries is wrong".into());
    }
    let guid = |bytes: &[u8]| Guid(*bytes.first_chunk().expect("every caller gives 16 bytes"));
    let mut partitions = Vec::new();
    for (index, entry) in entries.chunks_exact(ENTRY).enumerate() {
        if entry[..16] == [0; 16] {
            continue;
        }
        let number_at = |at: usize| u64::from_le_bytes(*entry[at..].first_chunk().expect("an entry is 128 bytes long"));
        let units = entry[56..].as_chunks::<2>().0.iter().map(|unit| u16::from_le_bytes(*unit)).take_while(|unit| *unit != 0);
        partitions.push(Partition {
            number: index as u32 + 1,
            kind: guid(entry),
            id: guid(&entry[16..]),
            first: number_at(32),
            last: number_at(40),
            name: char::decode_utf16(units).map(|character| character.unwrap_or(char::REPLACEMENT_CHARACTER)).collect(),
            attributes: number_at(48),
        });
    }
    let sectors = own.max(u64_at(32)).saturating_add(1);
    Ok((Gpt { disk: guid(&header[56..]), sectors, partitions }, own))
}

/// Sector 0: one partition of type EE over the whole disk (UEFI specification, section 5.2.3).
fn protective_record(sectors: u64) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    let entry = &mut bytes[446..462];
    entry[1..4].copy_from_slice(&[0, 2, 0]);
    entry[4] = 0xee;
    entry[5..8].copy_from_slice(&[0xff; 3]);
    entry[8..12].copy_from_slice(&1_u32.to_le_bytes());
    entry[12..16].copy_from_slice(&u32::try_from(sectors.saturating_sub(1)).unwrap_or(u32::MAX).to_le_bytes());
    bytes[510..].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

/// CRC-32 of ISO 3309 (reflected 0x04C11DB7), as the specification wants it.
pub(super) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |mut sum, byte| {
        sum ^= u32::from(*byte);
        (0..8).for_each(|_| sum = sum >> 1 ^ if sum & 1 == 1 { 0xEDB8_8320 } else { 0 });
        sum
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Gpt {
        let partition = |number, first, last, name: &str| Partition {
            number,
            kind: ROOT,
            id: Guid([number as u8; 16]),
            first,
            last,
            name: name.into(),
            attributes: 0,
        };
        Gpt {
            disk: Guid([7; 16]),
            sectors: 8192,
            partitions: vec![partition(1, 2048, 4095, "root-ä"), partition(4, 4096, 6143, "b")],
        }
    }

    #[test]
    fn the_start_of_a_disk_is_enough() {
        let start = table().primary().unwrap();
        assert_eq!(Gpt::of_start(&start).unwrap(), table());
        for cut in [0, 600, start.len() - 1] {
            let error = Gpt::of_start(&start[..cut]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{cut}");
        }
    }

    #[test]
    fn guids_read_back() {
        let text = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709";
        assert_eq!(text.to_uppercase().parse::<Guid>().unwrap(), ROOT);
        assert_eq!(ROOT.to_string(), text);
        assert_eq!(ROOT.0[..8], [0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d]);
        for wrong in ["", "4f68bce3", "4f68bce3e8cd4db196e7fbcaf984b709----", "+f68bce3-e8cd-4db1-96e7-fbcaf984b709"] {
            assert_eq!(wrong.parse::<Guid>().unwrap_err(), format!("`{wrong}` is not a GUID"));
        }
        let mut hash = [0; 32];
        (0..32).for_each(|at| hash[at] = at as u8);
        let (first, last) = halves(&hash);
        assert_eq!(first.to_string(), "00010203-0405-0607-0809-0a0b0c0d0e0f");
        assert_eq!(last.to_string(), "10111213-1415-1617-1819-1a1b1c1d1e1f");
        assert_eq!(Guid::version_4([0xff; 16]).to_string(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }

    #[test]
    fn a_damaged_copy_is_named_and_the_other_is_read() {
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(8192 * SECTOR).unwrap();
        table().write(&disk).unwrap();
        assert_eq!(Gpt::read(&disk, 8192).unwrap(), table());
        let cases = [
            (512 + 56, "primary copy: the checksum of the header is wrong"),
            (1024, "primary copy: the checksum of the entries is wrong"),
            (512, "primary copy: there is none"),
            (8191 * 512 + 56, "backup copy: the checksum of the header is wrong"),
            (450, "there is no protective record"),
        ];
        for (at, expected) in cases {
            disk.write_all_at(b"!", at).unwrap();
            assert_eq!(Gpt::read_any(&disk, 8192).unwrap(), (table(), vec![expected.to_string()]));
            table().write(&disk).unwrap();
        }
        disk.set_len(9000 * SECTOR).unwrap();
        let problems = Gpt::read_any(&disk, 9000).unwrap().1;
        assert_eq!(problems, ["it is for 8192 sectors, and the disk has 9000"]);
    }

    #[test]
    fn an_impossible_table_is_not_written() {
        type Change = fn(&mut Gpt);
        let cases: [(Change, &str); 5] = [
            (|gpt| gpt.partitions[1].first = 4095, "partitions 1 and 4 overlap"),
            (|gpt| gpt.partitions[1].last = 8191, "partition 4 is in sectors 4096 to 8191, outside of 34 to 8158"),
            (|gpt| gpt.partitions[1].number = 1, "there are two partitions 1"),
            (|gpt| gpt.partitions[1].number = 129, "a partition has the number 129"),
            (|gpt| gpt.partitions[0].name = "x".repeat(37), "the name of partition 1 is longer than 36 characters"),
        ];
        for (change, expected) in cases {
            let mut broken = table();
            change(&mut broken);
            assert_eq!(broken.primary().unwrap_err().to_string(), format!("partition table: {expected}"));
        }
    }
}
