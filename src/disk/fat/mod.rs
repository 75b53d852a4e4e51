//! FAT32 file systems: [`plan`] and write a whole one, and change files in one that is there.
//!
//! From Microsoft's "FAT32 File System Specification" 1.03 (2000). Only what an EFI system
//! partition needs: sectors of 512 bytes, two tables, long names, no code pages (short names are
//! ASCII). On the disk:
//!
//! ```text
//! sector 0       boot sector (6: its copy)
//! sector 1       FSInfo      (7: its copy)
//! sector 32      table, then the same once more, one 32-bit number per cluster
//! then           clusters: folders first, then the files in the order they were given
//! ```
//!
//! [`plan`] decides everything and writes nothing; the same entries give the same bytes. The crate
//! `fatfs` would format and fill a volume step by step, as a driver does: every sector of both
//! tables is written, and where files lie is its decision.

mod name;
mod volume;
mod write;

use std::io;

pub use volume::{Found, Volume};
pub use write::{Content, Entry, Format, Plan, plan};

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Sectors before the first table.
const RESERVED: u64 = 32;
/// Sector of the copy of the boot sector.
const BACKUP: u64 = 6;
/// Copies of the table.
const TABLES: u64 = 2;
/// The first cluster; the root folder is in it.
const FIRST: u32 = 2;
/// Clusters below which a volume would be FAT16 (specification, "FAT Type Determination").
const LEAST_CLUSTERS: u64 = 65_525;
/// The most clusters: numbers from 0x0FFFFFF7 on are marks.
const MOST_CLUSTERS: u64 = 0x0FFF_FFF5;
/// The bits of a table entry that are the number.
const NUMBER: u32 = 0x0FFF_FFFF;
/// Marks the last cluster of a file.
const END: u32 = 0x0FFF_FFFF;
/// Bytes of an entry of a folder.
const ENTRY: usize = 32;
/// The most entries a folder may have (65,536 of them, less the two dots and the end).
const FOLDER_ENTRIES: usize = 65_536;

const ATTRIBUTE_LABEL: u8 = 0x08;
const ATTRIBUTE_FOLDER: u8 = 0x10;
const ATTRIBUTE_FILE: u8 = 0x20;
const ATTRIBUTE_LONG: u8 = 0x0f;

/// Where the parts of a volume are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    /// Sectors of the volume.
    sectors: u64,
    /// Sectors of a cluster.
    per_cluster: u64,
    /// Sectors before the first table.
    reserved: u64,
    /// Sectors of a table.
    table: u64,
    /// Number of tables.
    tables: u64,
    /// First cluster of the root folder.
    root: u32,
}

impl Geometry {
    /// The geometry of a new volume of `bytes` bytes; `None` when that is too small or too large for FAT32.
    fn of_size(bytes: u64) -> Option<Self> {
        let sectors = bytes / SECTOR;
        u32::try_from(sectors).ok()?;
        // The sizes of the specification's table, as every formatting program has them.
        let per_cluster = match sectors {
            0..=532_480 => 1,
            532_481..=16_777_216 => 8,
            16_777_217..=33_554_432 => 16,
            33_554_433..=67_108_864 => 32,
            _ => 64,
        };
        // Clusters begin at a multiple of their size: every table is a multiple of half a cluster.
        let step = (per_cluster / 2).max(1);
        let reserved = RESERVED.next_multiple_of(per_cluster);
        // The least table with 4 * (clusters + 2) <= 512 * table, clusters being what the tables leave.
        let left = sectors.checked_sub(reserved)?;
        let table =
            (4 * (left + u64::from(FIRST) * per_cluster)).div_ceil(SECTOR * per_cluster + 4 * TABLES).next_multiple_of(step);
        let clusters = left.checked_sub(TABLES * table)? / per_cluster;
        let geometry = Self { sectors, per_cluster, reserved, table, tables: TABLES, root: FIRST };
        (LEAST_CLUSTERS..=MOST_CLUSTERS).contains(&clusters).then_some(geometry)
    }

    const fn clusters(&self) -> u64 {
        (self.sectors - self.reserved - self.tables * self.table) / self.per_cluster
    }

    const fn cluster_bytes(&self) -> u64 {
        self.per_cluster * SECTOR
    }

    /// Byte of the volume at which a cluster begins.
    const fn cluster_at(&self, cluster: u32) -> u64 {
        (self.reserved + self.tables * self.table + (cluster as u64 - FIRST as u64) * self.per_cluster) * SECTOR
    }

    /// Byte of the volume at which table `copy` begins.
    const fn table_at(&self, copy: u64) -> u64 {
        (self.reserved + copy * self.table) * SECTOR
    }

    /// Reads the boot sector of a volume.
    fn parse(boot: &[u8; 512]) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("FAT32: {what}"));
        let u16_at = |at: usize| u64::from(u16::from_le_bytes([boot[at], boot[at + 1]]));
        let u32_at = |at: usize| u32::from_le_bytes([boot[at], boot[at + 1], boot[at + 2], boot[at + 3]]);
        if boot[510..] != [0x55, 0xaa] || u16_at(11) != SECTOR || boot[13] == 0 {
            return Err(invalid("no boot sector with sectors of 512 bytes"));
        }
        let (sectors, table) = (u64::from(u32_at(32)), u64::from(u32_at(36)));
        let geometry = Self {
            sectors,
            per_cluster: u64::from(boot[13]),
            reserved: u16_at(14),
            table,
            tables: u64::from(boot[16]),
            root: u32_at(44),
        };
        let before = geometry.reserved + geometry.tables * table;
        if table == 0
            || geometry.tables == 0
            || before >= sectors
            || !(LEAST_CLUSTERS..=MOST_CLUSTERS).contains(&geometry.clusters())
        {
            return Err(invalid("the boot sector is not a FAT32 volume's"));
        }
        if (geometry.clusters() + u64::from(FIRST)) * 4 > table * SECTOR {
            return Err(invalid("the table is too small for the volume"));
        }
        Ok(geometry)
    }
}

/// A moment as FAT writes it: local time without a zone, of which we say that it is UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    date: u16,
    /// In steps of two seconds.
    time: u16,
}

impl Stamp {
    /// From seconds since 1970; before 1980 and after 2107 the nearest that can be written.
    fn new(seconds: i64) -> Self {
        let days = seconds.div_euclid(86_400);
        let second = seconds.rem_euclid(86_400);
        // Days to a date in the Gregorian calendar, with years that begin in March.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let of_era = shifted.rem_euclid(146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        let pack = |high: i64, middle: i64, low: i64, bits: (u32, u32)| (high << bits.0 | middle << bits.1 | low) as u16;
        match year {
            ..1980 => Self { date: pack(0, 1, 1, (9, 5)), time: 0 },
            2108.. => Self { date: pack(127, 12, 31, (9, 5)), time: pack(23, 59, 29, (11, 5)) },
            _ => Self {
                date: pack(year - 1980, month, day, (9, 5)),
                time: pack(second / 3600, second / 60 % 60, second % 60 / 2, (11, 5)),
            },
        }
    }
}

/// The 32-byte entry of a file or folder (specification, "FAT Directory Structure").
fn short_entry(short: [u8; 11], attributes: u8, stamp: Stamp, cluster: u32, size: u32) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    bytes[..11].copy_from_slice(&short);
    bytes[11] = attributes;
    // Made, used, changed.
    for (at, value) in [(14, stamp.time), (16, stamp.date), (18, stamp.date), (22, stamp.time), (24, stamp.date)] {
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    bytes[20..22].copy_from_slice(&((cluster >> 16) as u16).to_le_bytes());
    bytes[26..28].copy_from_slice(&(cluster as u16).to_le_bytes());
    bytes[28..32].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// The FSInfo sector.
fn info_sector(free: u32, next: u32) -> [u8; 512] {
    let mut bytes = [0; 512];
    bytes[..4].copy_from_slice(b"RRaA");
    bytes[484..488].copy_from_slice(b"rrAa");
    bytes[488..492].copy_from_slice(&free.to_le_bytes());
    bytes[492..496].copy_from_slice(&next.to_le_bytes());
    bytes[510..].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometries() {
        const MIB: u64 = 1 << 20;
        assert_eq!((Geometry::of_size(32 * MIB), Geometry::of_size(0), Geometry::of_size(3 << 40)), (None, None, None));
        for (bytes, cluster) in [(34 * MIB, 512), (260 * MIB, 512), (261 * MIB, 4096), (1024 * MIB, 4096), (9000 * MIB, 8192)] {
            let geometry = Geometry::of_size(bytes).unwrap();
            assert_eq!(geometry.cluster_bytes(), cluster, "{bytes}");
            assert_eq!(geometry.cluster_at(FIRST) % cluster, 0, "{bytes}");
            assert!((geometry.clusters() + 2) * 4 <= geometry.table * SECTOR, "{bytes}");
            assert!(geometry.table * SECTOR - (geometry.clusters() + 2) * 4 < cluster.max(1024), "{bytes}: table too large");
        }
    }

    #[test]
    fn moments() {
        let text = |seconds| {
            let Stamp { date, time } = Stamp::new(seconds);
            let day = format!("{}-{:02}-{:02}", (date >> 9) + 1980, date >> 5 & 15, date & 31);
            format!("{day} {:02}:{:02}:{:02}", time >> 11, time >> 5 & 63, (time & 31) * 2)
        };
        let cases = [
            (0, "1980-01-01 00:00:00"),
            (-86_400 * 365 * 900, "1980-01-01 00:00:00"),
            (315_532_800, "1980-01-01 00:00:00"),
            (951_782_399, "2000-02-28 23:59:58"),
            (951_782_400, "2000-02-29 00:00:00"),
            (1_767_225_599, "2025-12-31 23:59:58"),
            (4_354_819_199, "2107-12-31 23:59:58"),
            (9_999_999_999, "2107-12-31 23:59:58"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(text(seconds), expected);
        }
    }
}
