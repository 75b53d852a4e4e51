//! The partition table of a disk: what goes where, and how full it is.
//!
//! Pure: sizes go in, a [`Table`] comes out; `bake --plan`, the writer and the tests look at the
//! same value. The order and the numbers of the partitions never change, because machines in the
//! field find their slots by them.

use crate::disk::table::{Partition, Role, SECTOR, Table};
use crate::error::Problem;

pub const MIB: u64 = 1 << 20;
/// Partitions start at multiples of this: the erase block of most flash, and what every tool uses.
const ALIGN: u64 = MIB;
/// Holds GRUB's core image, which is about 160 KiB.
const BIOS_BYTES: u64 = MIB;
/// UKI, kernel and initrd of one system are about 40 MiB with our initrd and 100 MiB with
/// dracut's; room for three of each and slack. Kernels have doubled in ten years.
pub const ESP_BYTES: u64 = 1024 * MIB;
/// Systems whose boot files the ESP has to hold: two slots, and the one being written.
const ESP_SYSTEMS: u64 = 3;
/// What FAT itself needs of the ESP.
const FAT_BYTES: u64 = 8 * MIB;
/// The least slot: a small system of today grows to that in ten years.
const SLOT_LEAST: u64 = 1024 * MIB;
/// A slot is at least this many times the image it is made for, in halves.
const SLOT_HALVES: u64 = 5;
/// Slots are a multiple of this.
const SLOT_STEP: u64 = 256 * MIB;
/// The hash tree of dm-verity is 1/127 of the data and a bit; 1/64 leaves room for 64-byte hashes.
const VERITY_SHARE: u64 = 64;
/// `/var` as baked; it grows with the disk.
pub const VAR_BYTES: u64 = 1024 * MIB;
/// The least `/var`: a file system and a journal.
pub const VAR_LEAST: u64 = 64 * MIB;
/// Sectors of a GUID partition table at each end, the protective record included.
const TABLE_SECTORS: u64 = 34;

/// Bytes of what goes onto the disk, and the wishes of the pipeline file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sizes {
    /// The root image.
    pub root: u64,
    /// Its hash tree with superblock.
    pub verity: u64,
    /// UKI + kernel + initrd.
    pub boot: u64,
    /// The boot loaders.
    pub loaders: u64,
    /// `host.disk.slot`.
    pub slot: Option<u64>,
    /// `host.disk.size`.
    pub disk: Option<u64>,
    /// Slot of the previous disk: machines that run it cannot make theirs larger.
    pub previous_slot: Option<u64>,
}

/// The table for `sizes`, and warnings for the user.
///
/// # Errors
/// A root image larger than the slot, boot files larger than the ESP, a disk too small for all.
pub fn table(sizes: &Sizes) -> Result<(Table, Vec<String>), Problem> {
    let slot = slot(sizes)?;
    let verity = round_up(slot / VERITY_SHARE, ALIGN);
    if sizes.verity > verity {
        return Err(Problem::failed(format!("the hash tree of {} does not fit into {}", human(sizes.verity), human(verity))));
    }
    let esp_room = ESP_BYTES - FAT_BYTES - sizes.loaders;
    if sizes.boot * ESP_SYSTEMS > esp_room {
        return Err(Problem::failed(format!(
            "kernel, initrd and their unified image need {} and the ESP has {} for {ESP_SYSTEMS} of them",
            human(sizes.boot),
            human(esp_room)
        ))
        .hint("leave out modules of the initrd (`host.modules`), or use `initrd: static`"));
    }
    let before_var = ALIGN + BIOS_BYTES + ESP_BYTES + 2 * (slot + verity);
    let after = round_up(TABLE_SECTORS * SECTOR, ALIGN);
    let disk = match sizes.disk {
        None => before_var + VAR_BYTES + after,
        Some(disk) if disk / SECTOR * SECTOR >= before_var + VAR_LEAST + after => disk / ALIGN * ALIGN,
        Some(disk) => {
            return Err(Problem::usage(format!(
                "`host.disk.size` is {}, and this disk needs {} at least",
                human(disk),
                human(before_var + VAR_LEAST + after)
            ))
            .hint("leave `size` out, make it larger, or set `host.disk.slot`"));
        }
    };
    let roles = [
        (Role::Bios, "bios", BIOS_BYTES, 0),
        (Role::Esp, "esp", ESP_BYTES, sizes.boot + sizes.loaders),
        (Role::RootA, "root-a", slot, sizes.root),
        (Role::VerityA, "root-a-verity", verity, sizes.verity),
        // The name systemd's tools know for a slot that is free.
        (Role::RootB, "_empty", slot, 0),
        (Role::VerityB, "_empty", verity, 0),
        (Role::Var, "var", disk - before_var - after, 0),
    ];
    let mut start = ALIGN / SECTOR;
    let mut partitions = Vec::new();
    for (index, (role, name, bytes, used)) in roles.into_iter().enumerate() {
        let number = u32::try_from(index + 1).unwrap_or_default();
        partitions.push(Partition { number, role, name: name.into(), start, sectors: bytes / SECTOR, used });
        start += bytes / SECTOR;
    }
    let table = Table { sectors: disk / SECTOR, partitions };
    let mut warnings = Vec::new();
    if sizes.root * 2 > slot {
        warnings.push(format!(
            "the root image of {} fills {} % of its slot of {}; a later version may not fit, and slots cannot grow",
            human(sizes.root),
            sizes.root * 100 / slot,
            human(slot)
        ));
    }
    Ok((table, warnings))
}

fn slot(sizes: &Sizes) -> Result<u64, Problem> {
    let auto = round_up((sizes.root * SLOT_HALVES / 2).max(SLOT_LEAST), SLOT_STEP);
    let (slot, from) = match (sizes.slot, sizes.previous_slot) {
        (Some(slot), _) => (round_up(slot, ALIGN), "`host.disk.slot`"),
        (None, Some(previous)) => (previous, "the slot of the previous disk"),
        (None, None) => (auto, "the slot"),
    };
    if sizes.root > slot {
        return Err(Problem::failed(format!("the root image is {} and {from} is {}", human(sizes.root), human(slot))).hint(
            "`pipeline artifact show` lists the largest packages; a larger slot (`host.disk.slot`) needs machines installed anew",
        ));
    }
    Ok(slot)
}

const fn round_up(value: u64, step: u64) -> u64 {
    value.div_ceil(step) * step
}

/// `3 GiB`, `3108 MiB`, `300.2 MiB`: exact, or rounded up to a tenth of a MiB.
fn human(bytes: u64) -> String {
    if bytes > 0 && bytes.is_multiple_of(1024 * MIB) {
        return format!("{} GiB", bytes / (1024 * MIB));
    }
    let tenths = (bytes * 10).div_ceil(MIB);
    if tenths.is_multiple_of(10) { format!("{} MiB", tenths / 10) } else { format!("{}.{} MiB", tenths / 10, tenths % 10) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(root: u64) -> Sizes {
        Sizes { root: root * MIB, verity: root * MIB / 127 + 8192, boot: 40 * MIB, loaders: MIB, ..Sizes::default() }
    }

    #[test]
    fn partitions_follow_each_other() {
        let (table, warnings) = table(&sizes(300)).unwrap();
        let rows: Vec<_> = table.partitions.iter().map(|p| (p.number, p.name.as_str(), p.start, p.bytes() / MIB)).collect();
        let expected = [
            (1, "bios", 2048, 1),
            (2, "esp", 4096, 1024),
            (3, "root-a", 2_101_248, 1024),
            (4, "root-a-verity", 4_198_400, 16),
            (5, "_empty", 4_231_168, 1024),
            (6, "_empty", 6_328_320, 16),
            (7, "var", 6_361_088, 1024),
        ];
        assert_eq!(rows, expected);
        assert_eq!((table.bytes() / MIB, warnings), (4131, vec![]));
        assert_eq!(table.partition(Role::Var).start + table.partition(Role::Var).sectors + 2048, table.sectors);
    }

    #[test]
    fn slots_follow_the_content() {
        let slot = |sizes: &Sizes| table(sizes).map(|(table, _)| table.partition(Role::RootA).bytes() / MIB);
        assert_eq!(slot(&sizes(500)).unwrap(), 1280);
        assert_eq!(slot(&sizes(2000)).unwrap(), 5120);
        assert_eq!(slot(&Sizes { slot: Some(700 * MIB), ..sizes(500) }).unwrap(), 700);
        // Machines in the field keep their slots.
        assert_eq!(slot(&Sizes { previous_slot: Some(1024 * MIB), ..sizes(500) }).unwrap(), 1024);
        assert_eq!(table(&Sizes { slot: Some(900 * MIB), ..sizes(500) }).unwrap().1.len(), 1);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let cases = [
            (Sizes { slot: Some(400 * MIB), ..sizes(500) }, "the root image is 500 MiB and `host.disk.slot` is 400 MiB"),
            (
                Sizes { previous_slot: Some(400 * MIB), ..sizes(500) },
                "the root image is 500 MiB and the slot of the previous disk is 400 MiB",
            ),
            (Sizes { disk: Some(2048 * MIB), ..sizes(300) }, "`host.disk.size` is 2 GiB, and this disk needs 3171 MiB at least"),
            (
                Sizes { boot: 400 * MIB, ..sizes(300) },
                "kernel, initrd and their unified image need 400 MiB and the ESP has 1015 MiB for 3 of them",
            ),
        ];
        for (sizes, expected) in cases {
            assert_eq!(table(&sizes).unwrap_err().message, expected);
        }
    }
}
