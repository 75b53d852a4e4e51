//! The disks of the machine and the partitions on them.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::gpt::{self, Partition, SECTOR, Table};
use super::guid::Hash;
use super::slots::Slot;
use super::{log, sys};

/// A whole disk.
#[derive(Debug)]
pub struct Disk {
    /// The kernel's name, as `vda`.
    pub name: String,
    /// Sectors of 512 bytes, also where the device's own are larger.
    pub sectors: u64,
    pub table: Result<Table, String>,
}

/// The partitions a root hash names, and those beside them on the same disk.
#[derive(Debug)]
pub struct Found {
    pub disk: Disk,
    pub slot: Slot,
    pub data: Partition,
    pub hash: Partition,
    pub esp: Option<Partition>,
    pub var: Option<Partition>,
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The device node of a kernel name; `!` in it stands for `/`.
pub fn node(name: &str) -> PathBuf {
    Path::new("/dev").join(name.replace('!', "/"))
}

/// All disks that have a size, except those made of others, in the order of their names.
pub fn names() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let other = ["dm-", "loop", "ram", "zram", "fd", "md"];
    let mut names = names.filter(|name| !other.iter().any(|prefix| name.starts_with(prefix))).collect::<Vec<_>>();
    names.sort();
    names
}

impl Disk {
    /// Reads the table of a disk; `None` when it has no medium.
    pub fn read(name: &str) -> Option<Self> {
        let folder = Path::new("/sys/block").join(name);
        let sectors = number(&folder.join("size")).filter(|sectors| *sectors > 0)?;
        let table = match number(&folder.join("queue/logical_block_size")) {
            Some(size) if size != SECTOR => Err(format!("has sectors of {size} bytes, not 512")),
            _ => read_table(&node(name), sectors),
        };
        Some(Self { name: name.to_string(), sectors, table })
    }

    /// The kernel's name of one of its partitions.
    pub fn partition_name(&self, number_wanted: u32) -> Option<String> {
        let entries = fs::read_dir(Path::new("/sys/block").join(&self.name)).ok()?;
        let mut paths = entries.flatten().map(|entry| entry.path());
        let path = paths.find(|path| number(&path.join("partition")) == Some(u64::from(number_wanted)))?;
        Some(path.file_name()?.to_string_lossy().into_owned())
    }

    /// `major:minor` of one of its partitions.
    pub fn device_number(&self, number: u32) -> Option<String> {
        let name = self.partition_name(number)?;
        let text = fs::read_to_string(Path::new("/sys/block").join(&self.name).join(name).join("dev")).ok()?;
        Some(text.trim().to_string())
    }

    fn describe(&self) -> String {
        let size = self.sectors / 2048;
        match &self.table {
            Err(error) => format!("{} ({size} MiB, {error})", self.name),
            Ok(table) => format!("{} ({size} MiB, {} partitions)", self.name, table.partitions.len()),
        }
    }
}

fn read_table(node: &Path, sectors: u64) -> Result<Table, String> {
    let file = File::open(node).map_err(|error| format!("cannot be opened: {error}"))?;
    let mut read = |offset: u64, length: usize| {
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, offset).map_err(|error| format!("cannot be read: {error}"))?;
        Ok(bytes)
    };
    gpt::parse(&mut read, sectors)
}

/// Looks once through all disks for the partitions of a root hash.
///
/// # Errors
/// What was looked for and what is there, in one line.
pub fn find(root: &Hash) -> Result<Found, String> {
    let [data_id, hash_id] = root.partitions();
    let mut seen = String::new();
    for disk in names().iter().filter_map(|name| Disk::read(name)) {
        let _ = write!(seen, "{}{}", if seen.is_empty() { "" } else { ", " }, disk.describe());
        let Ok(table) = &disk.table else { continue };
        let (Some(data), Some(hash)) = (table.find(data_id).cloned(), table.find(hash_id).cloned()) else { continue };
        let Some(slot) = Slot::of_partition(data.number) else {
            let _ = write!(seen, " with the root as partition {}, which is no slot", data.number);
            continue;
        };
        let (esp, var) = (table.of_kind(gpt::ESP).cloned(), table.of_kind(gpt::VAR).cloned());
        return Ok(Found { slot, data, hash, esp, var, disk });
    }
    let seen = if seen.is_empty() { "none".to_string() } else { seen };
    Err(format!("no disk has the partitions with PARTUUID {data_id} and {hash_id}; disks seen: {seen}"))
}

/// Brings the partition table to the size of the disk, before anything on it is opened.
/// Returns whether partitions changed.
///
/// # Errors
/// When the disk is smaller than its partitions, cannot be written, or the kernel does not take the new table.
pub fn fit(found: &Found) -> Result<bool, String> {
    let Ok(table) = &found.disk.table else { return Ok(false) };
    let (has, needs) = (found.disk.sectors, table.least_sectors());
    if has < needs {
        let mib = |sectors: u64| sectors.div_ceil(2048);
        return Err(format!(
            "the disk {} is smaller than the image on it: it has {} MiB and needs {} MiB",
            found.disk.name,
            has / 2048,
            mib(needs)
        ));
    }
    let writes = table.fitted(has, gpt::VAR);
    if writes.is_empty() {
        return Ok(false);
    }
    log::note(&format!("partition table of {} fitted to {} MiB", found.disk.name, has / 2048));
    let path = node(&found.disk.name);
    let say = |error: std::io::Error| format!("the partition table of {} cannot be written: {error}", path.display());
    let file = OpenOptions::new().read(true).write(true).open(&path).map_err(say)?;
    for write in writes {
        file.write_all_at(&write.bytes, write.offset).map_err(say)?;
        file.sync_all().map_err(say)?;
    }
    const BLKRRPART: u64 = 0x125f;
    sys::ioctl_plain(&file, BLKRRPART).map_err(|error| format!("{} cannot be read again: {error}", path.display()))?;
    Ok(true)
}
