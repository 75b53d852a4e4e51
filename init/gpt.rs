//! Reads a GPT, and makes its last partition reach the end of a disk that has grown.
//!
//! Layout: UEFI specification 2.10, section 5.3. Sectors of 512 bytes only.

use super::guid::Guid;

/// Bytes of a sector.
pub const SECTOR: u64 = 512;
/// Partitions end before a multiple of this many sectors (1 MiB).
const ALIGNMENT: u64 = 2048;
/// An entry array longer than this is not read: 128 entries take 16 KiB.
const MAX_ENTRY_BYTES: usize = 1 << 20;

/// The partition types of our disks.
pub const ESP: Guid =
    Guid::from_text_order([0xc1, 0x2a, 0x73, 0x28, 0xf8, 0x1f, 0x11, 0xd2, 0xba, 0x4b, 0, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b]);
pub const VAR: Guid =
    Guid::from_text_order([0x4d, 0x21, 0xb0, 0x16, 0xb5, 0x34, 0x45, 0xc2, 0xa9, 0xfb, 0x5c, 0x16, 0xe0, 0x91, 0xfd, 0x2d]);

/// One partition in use. Sectors, the last one inclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    pub number: u32,
    pub kind: Guid,
    pub unique: Guid,
    pub first: u64,
    pub last: u64,
}

impl Partition {
    pub fn sectors(&self) -> u64 {
        self.last - self.first + 1
    }
}

/// A partition table as read from a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    header: Vec<u8>,
    entries: Vec<u8>,
    entry_size: usize,
    /// The first copy was damaged and this is the second.
    pub from_backup: bool,
    pub partitions: Vec<Partition>,
}

/// Bytes to write at an offset of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub offset: u64,
    pub bytes: Vec<u8>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// CRC-32 as GPT uses it (reflected, polynomial 0xEDB88320).
pub fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _: u32| if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0_u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// Reads the first copy, or when it is damaged the second one from the disk's end.
///
/// `read` gives bytes at an offset of the disk, which has `sectors` sectors.
///
/// # Errors
/// When there is no GPT, or both copies are damaged.
pub fn parse(read: &mut dyn FnMut(u64, usize) -> Result<Vec<u8>, String>, sectors: u64) -> Result<Table, String> {
    let first = parse_copy(read, 1);
    if first.is_ok() || sectors < 3 {
        return first;
    }
    match parse_copy(read, sectors - 1) {
        Ok(table) => Ok(Table { from_backup: true, ..table }),
        Err(_) => first,
    }
}

fn parse_copy(read: &mut dyn FnMut(u64, usize) -> Result<Vec<u8>, String>, at: u64) -> Result<Table, String> {
    let header = read(at * SECTOR, 512)?;
    if &header[..8] != b"EFI PART" {
        return Err("has no GPT".into());
    }
    let size = u32_at(&header, 12) as usize;
    if !(92..=512).contains(&size) {
        return Err("has a GPT header of a wrong size".into());
    }
    let mut checked = header[..size].to_vec();
    checked[16..20].fill(0);
    if crc32(&checked) != u32_at(&header, 16) || u64_at(&header, 24) != at {
        return Err("has a damaged GPT header".into());
    }
    let (count, entry_size) = (u32_at(&header, 80) as usize, u32_at(&header, 84) as usize);
    let length = count.saturating_mul(entry_size);
    if !(128..=4096).contains(&entry_size) || length > MAX_ENTRY_BYTES {
        return Err("has a GPT of a strange size".into());
    }
    let entries = read(u64_at(&header, 72).saturating_mul(SECTOR), length)?;
    if crc32(&entries) != u32_at(&header, 88) {
        return Err("has damaged GPT entries".into());
    }
    let partitions = entries.chunks_exact(entry_size).zip(1..).filter_map(|(entry, number)| partition(entry, number)).collect();
    Ok(Table { header, entries, entry_size, from_backup: false, partitions })
}

fn partition(entry: &[u8], number: u32) -> Option<Partition> {
    let kind = Guid(entry[..16].try_into().expect("16 bytes"));
    let unique = Guid(entry[16..32].try_into().expect("16 bytes"));
    let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
    (!kind.is_zero() && first <= last).then_some(Partition { number, kind, unique, first, last })
}

impl Table {
    /// The partition with a PARTUUID.
    pub fn find(&self, unique: Guid) -> Option<&Partition> {
        self.partitions.iter().find(|partition| partition.unique == unique)
    }

    /// The lowest partition of a type.
    pub fn of_kind(&self, kind: Guid) -> Option<&Partition> {
        self.partitions.iter().find(|partition| partition.kind == kind)
    }

    /// The smallest disk that holds all partitions, in sectors: behind the last one there is the second copy.
    pub fn least_sectors(&self) -> u64 {
        let end = self.partitions.iter().map(|partition| partition.last + 1).max().unwrap_or(0);
        end + self.entry_sectors() + 1
    }

    fn entry_sectors(&self) -> u64 {
        (self.entries.len() as u64).div_ceil(SECTOR)
    }

    /// What to write, in this order, so that the table fits a disk of `sectors` sectors: the second
    /// copy stands at the end, and the partition of type `grow`, when nothing lies behind it, reaches
    /// up to it. Empty when nothing is to be done.
    ///
    /// The new second copy is written first, into space that was free; then the first one. Whenever
    /// the power fails one complete copy is there, and [`parse`] finds it.
    pub fn fitted(&self, sectors: u64, grow: Guid) -> Vec<Write> {
        let array = self.entry_sectors();
        let Some(last_usable) = sectors.checked_sub(array + 2) else { return Vec::new() };
        let mut entries = self.entries.clone();
        let end = self.partitions.iter().map(|partition| partition.last).max().unwrap_or(0);
        let new_end = ((last_usable + 1) / ALIGNMENT * ALIGNMENT).saturating_sub(1);
        if let Some(partition) = self.partitions.iter().find(|partition| partition.kind == grow && partition.last == end)
            && new_end > end
        {
            let at = (partition.number as usize - 1) * self.entry_size + 40;
            entries[at..at + 8].copy_from_slice(&new_end.to_le_bytes());
        }
        let backup_at = if self.from_backup { u64_at(&self.header, 24) } else { u64_at(&self.header, 32) };
        if entries == self.entries && backup_at == sectors - 1 && !self.from_backup {
            return Vec::new();
        }
        if last_usable < end {
            return Vec::new();
        }
        let first_array = if self.from_backup { 2 } else { u64_at(&self.header, 72) };
        let header = |own: u64, other: u64, array_at: u64| {
            let mut header = self.header.clone();
            header[24..32].copy_from_slice(&own.to_le_bytes());
            header[32..40].copy_from_slice(&other.to_le_bytes());
            header[48..56].copy_from_slice(&last_usable.to_le_bytes());
            header[72..80].copy_from_slice(&array_at.to_le_bytes());
            header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
            header[16..20].fill(0);
            let crc = crc32(&header[..u32_at(&header, 12) as usize]);
            header[16..20].copy_from_slice(&crc.to_le_bytes());
            header
        };
        let second_array = sectors - 1 - array;
        vec![
            Write { offset: second_array * SECTOR, bytes: entries.clone() },
            Write { offset: (sectors - 1) * SECTOR, bytes: header(sectors - 1, 1, second_array) },
            Write { offset: first_array * SECTOR, bytes: entries.clone() },
            Write { offset: SECTOR, bytes: header(1, sectors - 1, first_array) },
            // The protective entry of the MBR: its size (UEFI 5.2.3), at most 32 bits.
            Write { offset: 0x1ca, bytes: u32::try_from(sectors - 1).unwrap_or(u32::MAX).to_le_bytes().to_vec() },
        ]
    }
}
