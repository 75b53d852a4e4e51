//! A volume that is there: its files read, written, renamed.
//!
//! For disks that are not in use: nobody else may write meanwhile. A change writes the data
//! first, then the table, then the folder, so that a break in between loses clusters at most.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::{
    ATTRIBUTE_FILE, ATTRIBUTE_FOLDER, ATTRIBUTE_LABEL, ATTRIBUTE_LONG, END, ENTRY, FIRST, FOLDER_ENTRIES, Geometry, NUMBER,
    SECTOR, Stamp, info_sector, name, short_entry,
};

/// A file or folder of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// From the root, without a leading slash.
    pub path: String,
    /// Bytes; `None` for a folder.
    pub size: Option<u64>,
}

/// An open volume.
#[derive(Debug)]
pub struct Volume<'a> {
    file: &'a File,
    /// Byte of the file at which the volume begins.
    offset: u64,
    geometry: Geometry,
    /// The whole table, four bits at the top of each number masked.
    table: Vec<u32>,
    /// Sectors of the table that have to be written.
    changed: BTreeSet<usize>,
    /// Time for what is written.
    stamp: Stamp,
}

/// An entry of a folder as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    name: String,
    short: [u8; ENTRY],
    /// First of its 32-byte places in the folder, long entries included, and how many.
    first: usize,
    places: usize,
}

impl Slot {
    const fn is_folder(&self) -> bool {
        self.short[11] & ATTRIBUTE_FOLDER != 0
    }

    const fn cluster(&self) -> u32 {
        let b = &self.short;
        (b[20] as u32) << 16 | (b[21] as u32) << 24 | b[26] as u32 | (b[27] as u32) << 8
    }

    const fn size(&self) -> u32 {
        u32::from_le_bytes([self.short[28], self.short[29], self.short[30], self.short[31]])
    }
}

fn error(kind: io::ErrorKind, what: String) -> io::Error {
    io::Error::new(kind, format!("FAT32: {what}"))
}

fn not_found(path: &str) -> io::Error {
    error(io::ErrorKind::NotFound, format!("there is no `{path}`"))
}

impl<'a> Volume<'a> {
    /// Opens the volume that begins at byte `offset` of `file`; what is written gets `time`,
    /// seconds since 1970.
    ///
    /// # Errors
    /// `InvalidData` when there is no FAT32 volume.
    pub fn open(file: &'a File, offset: u64, time: i64) -> io::Result<Self> {
        let mut boot = [0; 512];
        file.read_exact_at(&mut boot, offset)?;
        let geometry = Geometry::parse(&boot)?;
        let mut bytes = vec![0; (geometry.clusters() + u64::from(FIRST)) as usize * 4];
        file.read_exact_at(&mut bytes, offset + geometry.table_at(0))?;
        let table = bytes.as_chunks::<4>().0.iter().map(|number| u32::from_le_bytes(*number) & NUMBER).collect();
        Ok(Self { file, offset, geometry, table, changed: BTreeSet::new(), stamp: Stamp::new(time) })
    }

    /// Everything in the volume, folders before what is in them, in the order of the folders.
    pub fn list(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        let mut open = vec![(String::new(), self.geometry.root)];
        let mut seen = BTreeSet::from([self.geometry.root]);
        while let Some((path, cluster)) = open.pop() {
            for slot in self.folder(cluster)?.1 {
                let path = if path.is_empty() { slot.name.clone() } else { format!("{path}/{}", slot.name) };
                if slot.is_folder() {
                    if !seen.insert(slot.cluster()) {
                        return Err(error(io::ErrorKind::InvalidData, format!("the folder `{path}` is another one too")));
                    }
                    open.push((path.clone(), slot.cluster()));
                }
                found.push(Found { path, size: (!slot.is_folder()).then(|| u64::from(slot.size())) });
            }
        }
        found.sort_by(|a, b| a.path.split('/').cmp(b.path.split('/')));
        Ok(found)
    }

    /// The bytes of a file.
    ///
    /// # Errors
    /// `NotFound`; `InvalidData` when the file's clusters do not fit its size.
    pub fn read(&self, path: &str) -> io::Result<Vec<u8>> {
        let slot = self.find(path)?.1;
        if slot.is_folder() {
            return Err(error(io::ErrorKind::IsADirectory, format!("`{path}` is a folder")));
        }
        let mut bytes = if slot.size() == 0 { Vec::new() } else { self.read_chain(slot.cluster())? };
        if bytes.len() < slot.size() as usize {
            return Err(error(io::ErrorKind::InvalidData, format!("`{path}` has fewer clusters than its size needs")));
        }
        bytes.truncate(slot.size() as usize);
        Ok(bytes)
    }

    /// Gives a file or folder another name in the folder it is in.
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`, `InvalidInput` for a name that cannot be, `StorageFull`.
    pub fn rename(&mut self, path: &str, name: &str) -> io::Result<()> {
        let (folder, slot) = self.find(path)?;
        let others = self.folder(folder)?.1;
        if others.iter().any(|other| other.first != slot.first && name::folded(&other.name) == name::folded(name)) {
            return Err(error(io::ErrorKind::AlreadyExists, format!("there is a `{name}` beside `{path}`")));
        }
        if let Some(problem) = name::problem(name) {
            return Err(error(io::ErrorKind::InvalidInput, format!("`{name}` {problem}")));
        }
        self.insert(folder, name, slot.short, Some(&slot))
    }

    /// Writes a file, in place of one of that name; missing folders are made.
    ///
    /// # Errors
    /// `InvalidInput` for a name that cannot be, `IsADirectory`, `FileTooLarge`, `StorageFull`.
    pub fn write(&mut self, path: &str, bytes: &[u8]) -> io::Result<()> {
        let size = u32::try_from(bytes.len())
            .map_err(|_| error(io::ErrorKind::FileTooLarge, format!("`{path}` is larger than 4 GiB")))?;
        let (folders, name) = split(path)?;
        let folder = self.make_folders(&folders)?;
        let old = self.folder(folder)?.1.into_iter().find(|slot| name::folded(&slot.name) == name::folded(name));
        if old.as_ref().is_some_and(Slot::is_folder) {
            return Err(error(io::ErrorKind::IsADirectory, format!("`{path}` is a folder")));
        }
        let cluster = self.store(bytes)?;
        match old {
            None => self.insert(folder, name, short_entry([0; 11], ATTRIBUTE_FILE, self.stamp, cluster, size), None)?,
            Some(slot) => {
                let mut short = short_entry([0; 11], ATTRIBUTE_FILE, self.stamp, cluster, size);
                short[..11].copy_from_slice(&slot.short[..11]);
                short[12] = slot.short[12];
                let mut bytes = self.folder(folder)?.0;
                bytes[(slot.first + slot.places - 1) * ENTRY..][..ENTRY].copy_from_slice(&short);
                self.flush()?;
                self.write_chain(folder, &bytes)?;
                self.free(slot.cluster())?;
            }
        }
        self.flush()
    }

    /// Takes a file away, or a folder that is empty.
    ///
    /// # Errors
    /// `NotFound`, `DirectoryNotEmpty`.
    pub fn remove(&mut self, path: &str) -> io::Result<()> {
        let (folder, slot) = self.find(path)?;
        if slot.is_folder() && !self.folder(slot.cluster())?.1.is_empty() {
            return Err(error(io::ErrorKind::DirectoryNotEmpty, format!("the folder `{path}` is not empty")));
        }
        let mut bytes = self.folder(folder)?.0;
        erase(&mut bytes, &slot);
        self.write_chain(folder, &bytes)?;
        self.free(slot.cluster())?;
        self.flush()
    }

    /// Bytes of the clusters that are free.
    pub fn free_bytes(&self) -> u64 {
        let free = self.table[FIRST as usize..].iter().filter(|number| **number == 0).count();
        free as u64 * self.geometry.cluster_bytes()
    }

    /// The folder something is in, and its entry.
    fn find(&self, path: &str) -> io::Result<(u32, Slot)> {
        let (folders, name) = split(path)?;
        let mut at = self.geometry.root;
        for (depth, wanted) in folders.iter().chain([&name]).enumerate() {
            let wanted = name::folded(wanted);
            let slot =
                self.folder(at)?.1.into_iter().find(|slot| name::folded(&slot.name) == wanted).ok_or_else(|| not_found(path))?;
            if depth == folders.len() {
                return Ok((at, slot));
            }
            if !slot.is_folder() {
                break;
            }
            at = slot.cluster();
        }
        Err(not_found(path))
    }

    /// The bytes of a folder and its entries, without label and dots.
    fn folder(&self, cluster: u32) -> io::Result<(Vec<u8>, Vec<Slot>)> {
        let bytes = self.read_chain(cluster)?;
        let mut slots = Vec::new();
        let mut long = name::LongName::default();
        let mut first = 0;
        for (place, entry) in bytes.as_chunks::<ENTRY>().0.iter().enumerate() {
            match (entry[0], entry[11]) {
                (0, _) => break,
                (0xe5, _) => first = place + 1,
                (_, ATTRIBUTE_LONG) => {
                    if entry[0] & 0x40 != 0 {
                        first = place;
                    }
                    long.push(entry);
                    continue;
                }
                (b'.', _) => first = place + 1,
                (_, attributes) if attributes & ATTRIBUTE_LABEL != 0 => first = place + 1,
                _ => {
                    let short = entry.first_chunk().expect("an entry is 32 bytes long");
                    let name = long.take(short, entry[12]);
                    slots.push(Slot { name, short: *entry, first, places: place + 1 - first });
                    first = place + 1;
                }
            }
            long = name::LongName::default();
        }
        Ok((bytes, slots))
    }

    /// The clusters that begin with `cluster`.
    fn chain(&self, mut cluster: u32) -> io::Result<Vec<u32>> {
        let mut clusters = Vec::new();
        while cluster < 0x0FFF_FFF8 {
            // A loop is longer than the volume.
            if cluster < FIRST || cluster as usize >= self.table.len() || clusters.len() > self.table.len() {
                return Err(error(io::ErrorKind::InvalidData, format!("a file goes on in cluster {cluster}, which cannot be")));
            }
            clusters.push(cluster);
            cluster = self.table[cluster as usize];
        }
        Ok(clusters)
    }

    fn read_chain(&self, cluster: u32) -> io::Result<Vec<u8>> {
        let size = self.geometry.cluster_bytes() as usize;
        let clusters = self.chain(cluster)?;
        let mut bytes = vec![0; clusters.len() * size];
        for (cluster, part) in clusters.iter().zip(bytes.chunks_exact_mut(size)) {
            self.file.read_exact_at(part, self.offset + self.geometry.cluster_at(*cluster))?;
        }
        Ok(bytes)
    }

    /// Writes what a chain holds; the last part may be shorter than a cluster and is padded.
    fn write_chain(&self, cluster: u32, bytes: &[u8]) -> io::Result<()> {
        let size = self.geometry.cluster_bytes() as usize;
        for (cluster, part) in self.chain(cluster)?.iter().zip(bytes.chunks(size)) {
            let at = self.offset + self.geometry.cluster_at(*cluster);
            self.file.write_all_at(part, at)?;
            self.file.write_all_at(&vec![0; size - part.len()], at + part.len() as u64)?;
        }
        Ok(())
    }

    fn set(&mut self, cluster: u32, number: u32) {
        self.table[cluster as usize] = number;
        self.changed.insert(cluster as usize * 4 / SECTOR as usize);
    }

    /// Takes free clusters, lowest first, and chains them; nothing is taken when there are too few.
    fn allocate(&mut self, count: usize) -> io::Result<u32> {
        let free = (FIRST..self.table.len() as u32).filter(|cluster| self.table[*cluster as usize] == 0);
        let clusters: Vec<u32> = free.take(count).collect();
        if clusters.len() < count {
            return Err(error(io::ErrorKind::StorageFull, "no space is left on the volume".into()));
        }
        for pair in clusters.windows(2) {
            self.set(pair[0], pair[1]);
        }
        clusters.last().into_iter().for_each(|last| self.set(*last, END));
        Ok(clusters.first().copied().unwrap_or_default())
    }

    /// Writes bytes into new clusters; 0 for none.
    fn store(&mut self, bytes: &[u8]) -> io::Result<u32> {
        let cluster = self.allocate(bytes.len().div_ceil(self.geometry.cluster_bytes() as usize))?;
        if cluster != 0 {
            self.write_chain(cluster, bytes)?;
        }
        Ok(cluster)
    }

    fn free(&mut self, cluster: u32) -> io::Result<()> {
        if cluster != 0 {
            self.chain(cluster)?.into_iter().for_each(|cluster| self.set(cluster, 0));
        }
        Ok(())
    }

    /// The folder at the end of a path, made where it is missing.
    fn make_folders(&mut self, folders: &[&str]) -> io::Result<u32> {
        let mut at = self.geometry.root;
        for name in folders {
            let there = self.folder(at)?.1.into_iter().find(|slot| name::folded(&slot.name) == name::folded(name));
            at = match there {
                Some(slot) if slot.is_folder() => slot.cluster(),
                Some(_) => return Err(error(io::ErrorKind::NotADirectory, format!("`{name}` is not a folder"))),
                None => {
                    let cluster = self.allocate(1)?;
                    let parent = if at == self.geometry.root { 0 } else { at };
                    let own = short_entry(*b".          ", ATTRIBUTE_FOLDER, self.stamp, cluster, 0);
                    let dots = short_entry(*b"..         ", ATTRIBUTE_FOLDER, self.stamp, parent, 0);
                    self.write_chain(cluster, &[own, dots].concat())?;
                    self.insert(at, name, short_entry([0; 11], ATTRIBUTE_FOLDER, self.stamp, cluster, 0), None)?;
                    cluster
                }
            };
        }
        Ok(at)
    }

    /// Puts an entry into a folder under `name`, in place of `old`; the folder grows as needed.
    fn insert(&mut self, folder: u32, name: &str, mut short: [u8; ENTRY], old: Option<&Slot>) -> io::Result<()> {
        let (mut bytes, slots) = self.folder(folder)?;
        old.into_iter().for_each(|old| erase(&mut bytes, old));
        let others = slots.iter().filter(|slot| old.is_none_or(|old| old.first != slot.first));
        let taken: Vec<&[u8]> = others.map(|slot| &slot.short[..11]).collect();
        let (plain, whole) = name::short(name, |short| taken.contains(&short.as_slice()));
        short[..11].copy_from_slice(&plain);
        short[12] = 0;
        let long = if whole { Vec::new() } else { name::long_entries(name, &plain) };
        let new = [long.concat(), short.to_vec()].concat();
        let at = gap(&bytes, new.len() / ENTRY) * ENTRY;
        if (at + new.len()) / ENTRY > FOLDER_ENTRIES {
            return Err(error(io::ErrorKind::StorageFull, "the folder is full".into()));
        }
        if at + new.len() > bytes.len() {
            let last = *self.chain(folder)?.last().expect("a chain has a cluster");
            let grown = self.allocate(1)?;
            self.set(last, grown);
            bytes.resize(bytes.len() + self.geometry.cluster_bytes() as usize, 0);
        }
        bytes[at..at + new.len()].copy_from_slice(&new);
        self.flush()?;
        self.write_chain(folder, &bytes)
    }

    /// Writes the changed sectors of the table, all copies, and the count of free clusters.
    fn flush(&mut self) -> io::Result<()> {
        if self.changed.is_empty() {
            return Ok(());
        }
        let per_sector = SECTOR as usize / 4;
        for sector in std::mem::take(&mut self.changed) {
            let numbers = &self.table[sector * per_sector..self.table.len().min((sector + 1) * per_sector)];
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            for copy in 0..self.geometry.tables {
                self.file.write_all_at(&bytes, self.offset + self.geometry.table_at(copy) + sector as u64 * SECTOR)?;
            }
        }
        let free = (self.free_bytes() / self.geometry.cluster_bytes()) as u32;
        let next = self.table[FIRST as usize..].iter().position(|number| *number == 0).map_or(FIRST, |at| at as u32 + FIRST);
        let mut boot = [0; 512];
        self.file.read_exact_at(&mut boot, self.offset)?;
        let info = u64::from(u16::from_le_bytes([boot[48], boot[49]]));
        let backup = u64::from(u16::from_le_bytes([boot[50], boot[51]]));
        // 0 and 0xFFFF mean that there is none.
        for sector in [info, backup + info].into_iter().filter(|sector| (1..self.geometry.reserved).contains(sector)) {
            self.file.write_all_at(&info_sector(free, next), self.offset + sector * SECTOR)?;
        }
        Ok(())
    }
}

/// The folders of a path and the name at its end, all of which FAT can hold.
fn split(path: &str) -> io::Result<(Vec<&str>, &str)> {
    let mut names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
    let last = names.pop().unwrap_or_default();
    for name in names.iter().chain([&last]) {
        if let Some(problem) = name::problem(name) {
            return Err(error(io::ErrorKind::InvalidInput, format!("`{path}`: `{name}` {problem}")));
        }
    }
    Ok((names, last))
}

/// Marks the places of an entry as free.
fn erase(bytes: &mut [u8], slot: &Slot) {
    for place in slot.first..slot.first + slot.places {
        bytes[place * ENTRY] = 0xe5;
    }
}

/// The first of `count` places one after the other that are free, or the end of what is used.
fn gap(bytes: &[u8], count: usize) -> usize {
    let mut free = 0;
    for (place, entry) in bytes.as_chunks::<ENTRY>().0.iter().enumerate() {
        match entry[0] {
            0 => return place - free,
            0xe5 if free + 1 == count => return place - free,
            0xe5 => free += 1,
            _ => free = 0,
        }
    }
    bytes.len() / ENTRY - free
}
