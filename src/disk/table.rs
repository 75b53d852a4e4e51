//! The partitions of a disk of ours: which there are, in which order, and what each holds.
//!
//! Order and numbers never change, because machines in the field find their slots by them. Sizes
//! are decided in `bake::plan`; the bytes of a GUID partition table are written by [`super::gpt`].

use serde::{Deserialize, Serialize};

/// Bytes of a sector (UEFI specification 2.10, section 5.3.1: logical block size).
pub const SECTOR: u64 = 512;

/// What a partition holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Bios,
    Esp,
    RootA,
    VerityA,
    RootB,
    VerityB,
    Var,
}

/// A partition of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// From 1.
    pub number: u32,
    pub role: Role,
    /// Name in the table.
    pub name: String,
    /// First sector.
    pub start: u64,
    /// Sectors.
    pub sectors: u64,
    /// Bytes the image fills of it.
    pub used: u64,
}

impl Partition {
    /// Bytes.
    pub const fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    /// Byte of the disk it starts at.
    pub const fn offset(&self) -> u64 {
        self.start * SECTOR
    }
}

/// Everything about the disk that its sizes decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Sectors of the whole disk.
    pub sectors: u64,
    /// In the order of their numbers, which is the order on the disk.
    pub partitions: Vec<Partition>,
}

impl Table {
    /// Bytes of the whole disk.
    pub const fn bytes(&self) -> u64 {
        self.sectors * SECTOR
    }

    pub fn partition(&self, role: Role) -> &Partition {
        self.partitions.iter().find(|partition| partition.role == role).expect("a table has every role")
    }
}
