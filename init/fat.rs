//! Reads FAT32 and changes it in place: file names and the bytes of files, never the allocation.
//!
//! The kernel's own rename writes the new entry and then removes the old one; a power cut between
//! the two leaves both, sharing their clusters. Here a name of the same number of entries is
//! written over the old one, in one sector as a rule, and nothing else changes: no second entry, no
//! dirty mark, no allocation table. The short name stays, so the checksum in the long one stays true.
//! Layout: Microsoft's FAT specification (2005), sections 3, 6 and 7.

/// Where the file system lies.
pub trait Device {
    /// # Errors
    /// The words of the system.
    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, String>;
    /// # Errors
    /// The words of the system.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String>;
}

const RECORD: usize = 32;
const LONG_NAME: u8 = 0x0f;
const DIRECTORY: u8 = 0x10;
const VOLUME: u8 = 0x08;
/// Characters of a long name in one record, and where they are.
const NAME_PARTS: [(usize, usize); 3] = [(1, 5), (14, 6), (28, 2)];
const NAME_CHARACTERS: usize = 13;
/// A directory longer than this is a loop: 65536 records of 32 bytes are the most there can be.
const MAX_DIRECTORY: usize = 2 << 20;

/// A file or folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The long name, or the short one when there is none.
    pub name: String,
    pub folder: bool,
    pub size: u32,
    cluster: u32,
    /// Offsets of its records on the device: the parts of the long name as they stand, then the short one.
    records: Vec<u64>,
}

/// A FAT32 file system.
#[derive(Debug)]
pub struct Fat<D> {
    device: D,
    fat_at: u64,
    data_at: u64,
    cluster_size: usize,
    clusters: u32,
    root: u32,
}

impl<D: Device> Fat<D> {
    /// # Errors
    /// When it is not FAT32.
    pub fn open(device: D) -> Result<Self, String> {
        let boot = device.read(0, 512)?;
        let u16_at = |at: usize| u64::from(u16::from_le_bytes([boot[at], boot[at + 1]]));
        let u32_at = |at: usize| u32::from_le_bytes(boot[at..at + 4].try_into().expect("four bytes"));
        let (sector, per_cluster, reserved, fats) = (u16_at(11), u64::from(boot[13]), u16_at(14), u64::from(boot[16]));
        let (fat_size, total) = (u64::from(u32_at(36)), u64::from(u32_at(32)));
        let power = |value: u64| value.is_power_of_two();
        if boot[510..512] != [0x55, 0xaa] || !power(sector) || !power(per_cluster) || u16_at(17) != 0 || u16_at(22) != 0 {
            return Err("is not FAT32".into());
        }
        let data = reserved + fats * fat_size;
        let clusters = total.checked_sub(data).ok_or("is not FAT32")? / per_cluster;
        Ok(Self {
            fat_at: reserved * sector,
            data_at: data * sector,
            cluster_size: usize::try_from(per_cluster * sector).map_err(|_| "is not FAT32")?,
            clusters: u32::try_from(clusters).map_err(|_| "is not FAT32")?,
            root: u32_at(44),
            device,
        })
    }

    pub fn device(&self) -> &D {
        &self.device
    }

    fn cluster_at(&self, cluster: u32) -> Result<u64, String> {
        match cluster.checked_sub(2) {
            Some(index) if index < self.clusters => Ok(self.data_at + u64::from(index) * self.cluster_size as u64),
            _ => Err(format!("has a file with the impossible cluster {cluster}")),
        }
    }

    /// The clusters of a file, from its first one; at most `limit` of them.
    fn chain(&self, first: u32, limit: usize) -> Result<Vec<u32>, String> {
        let (mut out, mut cluster) = (Vec::new(), first);
        while (2..0x0fff_fff7).contains(&cluster) {
            if out.len() >= limit {
                return Err("has a file longer than it says".into());
            }
            self.cluster_at(cluster)?;
            out.push(cluster);
            let next = self.device.read(self.fat_at + u64::from(cluster) * 4, 4)?;
            cluster = u32::from_le_bytes(next.try_into().expect("four bytes")) & 0x0fff_ffff;
        }
        Ok(out)
    }

    fn list_at(&self, cluster: u32) -> Result<Vec<Entry>, String> {
        let mut found = Vec::new();
        // The parts of a long name, last part first.
        let mut long: Vec<(u64, Vec<u8>)> = Vec::new();
        for cluster in self.chain(cluster, MAX_DIRECTORY / self.cluster_size + 1)? {
            let start = self.cluster_at(cluster)?;
            let bytes = self.device.read(start, self.cluster_size)?;
            for (record, at) in bytes.chunks_exact(RECORD).zip((start..).step_by(RECORD)) {
                match (record[0], record[11]) {
                    (0, _) => return Ok(found),
                    (0xe5, _) => long.clear(),
                    (first, LONG_NAME) => {
                        if first & 0x40 != 0 {
                            long.clear();
                        }
                        long.push((at, record.to_vec()));
                    }
                    (_, kind) if kind & VOLUME != 0 => long.clear(),
                    (_, kind) => {
                        let name = long_name(&long, record).unwrap_or_else(|| {
                            long.clear();
                            short_name(record)
                        });
                        let u16_at = |at: usize| u32::from(u16::from_le_bytes([record[at], record[at + 1]]));
                        let records = long.drain(..).map(|(at, _)| at).chain([at]).collect();
                        found.push(Entry {
                            name,
                            folder: kind & DIRECTORY != 0,
                            size: u16_at(28) | u16_at(30) << 16,
                            cluster: u16_at(26) | u16_at(20) << 16,
                            records,
                        });
                    }
                }
            }
        }
        Ok(found)
    }

    /// The entries of the folder `path`, as `/EFI/Linux`.
    ///
    /// # Errors
    /// When a folder on the way is missing or the device cannot be read.
    pub fn list(&self, path: &str) -> Result<Vec<Entry>, String> {
        let mut cluster = self.root;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let entries = self.list_at(cluster)?;
            let folder = entries.into_iter().find(|entry| entry.folder && entry.name.eq_ignore_ascii_case(part));
            cluster = folder.ok_or_else(|| format!("has no folder {path}"))?.cluster;
        }
        self.list_at(cluster)
    }

    /// The entry of one file.
    ///
    /// # Errors
    /// When it is missing.
    pub fn file(&self, path: &str) -> Result<Entry, String> {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let entries = self.list(folder)?;
        entries.into_iter().find(|entry| !entry.folder && entry.name.eq_ignore_ascii_case(name)).ok_or(format!("has no {path}"))
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// When the chain of clusters ends too early or the device cannot be read.
    pub fn read(&self, file: &Entry) -> Result<Vec<u8>, String> {
        let size = file.size as usize;
        let mut out = Vec::new();
        for cluster in self.chain(file.cluster, size.div_ceil(self.cluster_size) + 1)? {
            out.extend(self.device.read(self.cluster_at(cluster)?, self.cluster_size)?);
        }
        if out.len() < size {
            return Err(format!("has only a part of {}", file.name));
        }
        out.truncate(size);
        Ok(out)
    }

    /// Writes the sectors of a file that differ from `bytes`, which must be as long as the file.
    ///
    /// # Errors
    /// When the length differs or the device refuses.
    pub fn overwrite(&mut self, file: &Entry, bytes: &[u8]) -> Result<(), String> {
        let old = self.read(file)?;
        if old.len() != bytes.len() {
            return Err(format!("cannot change the length of {}", file.name));
        }
        let clusters = self.chain(file.cluster, bytes.len().div_ceil(self.cluster_size) + 1)?;
        for (index, (new, old)) in bytes.chunks(512).zip(old.chunks(512)).enumerate() {
            if new != old {
                let (cluster, inside) = (index * 512 / self.cluster_size, index * 512 % self.cluster_size);
                let at = self.cluster_at(clusters[cluster])? + inside as u64;
                self.device.write(at, new)?;
            }
        }
        Ok(())
    }

    /// Gives a file another long name that needs as many records as the old one.
    ///
    /// # Errors
    /// When the file has no long name, the new one needs another number of records, or the device refuses.
    pub fn rename(&mut self, file: &Entry, name: &str) -> Result<(), String> {
        let parts = file.records.len() - 1;
        let units = name.encode_utf16().collect::<Vec<_>>();
        if parts == 0 || units.len().div_ceil(NAME_CHARACTERS) != parts {
            return Err(format!("cannot rename {} to {name} in place", file.name));
        }
        // All records at once, so that those in one sector are one write.
        let mut records = Vec::new();
        for (place, at) in file.records[..parts].iter().enumerate() {
            let mut record = self.device.read(*at, RECORD)?;
            let start = (parts - 1 - place) * NAME_CHARACTERS;
            let offsets = NAME_PARTS.iter().flat_map(|(at, count)| (0..*count).map(move |index| at + index * 2));
            for (index, offset) in offsets.enumerate() {
                // After the end there is one zero, then all ones.
                let unit = match (start + index).cmp(&units.len()) {
                    std::cmp::Ordering::Less => units[start + index],
                    std::cmp::Ordering::Equal => 0,
                    std::cmp::Ordering::Greater => 0xffff,
                };
                record[offset..offset + 2].copy_from_slice(&unit.to_le_bytes());
            }
            records.push((*at, record));
        }
        let mut at = 0;
        while at < records.len() {
            let (start, mut bytes) = records[at].clone();
            at += 1;
            while at < records.len() && records[at].0 == start + bytes.len() as u64 {
                bytes.extend(&records[at].1);
                at += 1;
            }
            self.device.write(start, &bytes)?;
        }
        Ok(())
    }
}

/// `None` when the parts do not belong to this short name or are not complete.
fn long_name(parts: &[(u64, Vec<u8>)], short: &[u8]) -> Option<String> {
    let sum = short[..11].iter().fold(0_u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte));
    let count = parts.len();
    if count == 0 || usize::from(parts[0].1[0] & 0x3f) != count {
        return None;
    }
    let mut units = Vec::new();
    for (place, (_, record)) in parts.iter().rev().enumerate() {
        if usize::from(record[0] & 0x3f) != place + 1 || record[13] != sum {
            return None;
        }
        for (at, count) in NAME_PARTS {
            units.extend((0..count).map(|index| u16::from_le_bytes([record[at + index * 2], record[at + index * 2 + 1]])));
        }
    }
    let end = units.iter().position(|unit| *unit == 0).unwrap_or(units.len());
    String::from_utf16(&units[..end]).ok()
}

fn short_name(record: &[u8]) -> String {
    // Bits 3 and 4 of byte 12: the base or the extension is in lower case (as Windows NT writes it).
    let part = |bytes: &[u8], lower: bool| {
        let text = String::from_utf8_lossy(bytes).trim_end().to_string();
        if lower { text.to_ascii_lowercase() } else { text }
    };
    let (base, extension) = (part(&record[..8], record[12] & 8 != 0), part(&record[8..11], record[12] & 16 != 0));
    if extension.is_empty() { base } else { format!("{base}.{extension}") }
}
