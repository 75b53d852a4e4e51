//! Writes a version into a slot of a disk that no machine runs.
//!
//! The order is that of an upgrade, so that a power cut leaves a disk that boots: the slot is not
//! bootable while it is written (no UKI, bad in grubenv), root and hash tree go first, then the
//! names of the partitions, then kernel and initrd, and what makes the loaders start it comes last.

use std::fs::File;

use anyhow::{Context as _, Result};

use super::disk;
use super::esp::{self, Slot};
use super::parts::Files;
use crate::artifact::disk::{Disk, Part};
use crate::artifact::store::Store;
use crate::disk::fat::Volume;
use crate::disk::gpt::{self, Gpt};
use crate::disk::grub::Environment;
use crate::disk::table::{Role, SECTOR};
use crate::error::Problem;

const GRUB_ENVIRONMENT: &str = "grub/grubenv";

/// Roles of a slot's partitions: root and hash tree.
const fn roles(slot: Slot) -> (Role, Role) {
    match slot {
        Slot::A => (Role::RootA, Role::VerityA),
        Slot::B => (Role::RootB, Role::VerityB),
    }
}

/// Writes `disk` into `slot` of the raw disk `raw` and gives it `tries` tries before the other slot.
///
/// # Errors
/// A raw disk with another partition table; a version larger than the slot; no room on the ESP.
pub fn install(store: &Store, disk: &Disk, raw: &File, slot: Slot, tries: u32) -> Result<()> {
    let table = &disk.config.table;
    let mut gpt = Gpt::read(raw, raw.metadata()?.len() / SECTOR).context("cannot read the partition table")?;
    let (root, verity) = roles(slot);
    for (role, part) in [(root, Part::Root), (verity, Part::Verity)] {
        let number = table.partition(role).number;
        let found = gpt.partitions.iter().find(|partition| partition.number == number && partition.kind == gpt::kind(role));
        let room = found.map_or(0, |partition| (partition.last + 1 - partition.first) * SECTOR);
        let needed = disk.part(part)?.size;
        if needed > room {
            return Err(
                Problem::failed(format!("`{}` needs {needed} bytes and partition {number} has {room}", part.name())).into()
            );
        }
    }
    let esp = gpt.partitions.iter().find(|partition| partition.kind == gpt::ESP).context("the disk has no ESP")?.clone();
    let mut volume = Volume::open(raw, esp.first * SECTOR, disk.config.epoch)?;
    let generation = forget(&mut volume, slot)? + 1;
    let other = if slot == Slot::A { Slot::B } else { Slot::A };
    let bios = disk.parts.contains_key(&Part::GrubCore);
    if bios {
        let variables = ["good", "tries", "damaged"].map(|name| format!("{name}_{}", slot.name()));
        mark(&mut volume, &variables.each_ref().map(|name| (name.as_str(), "0")))?;
    }
    let mut root_hash = [0; 32];
    hex::decode_to_slice(&disk.config.root_hash, &mut root_hash).context("the disk's root hash")?;
    let halves = gpt::halves(&root_hash);
    let names = [format!("root-{}", slot.name()), format!("root-{}-verity", slot.name())];
    for ((role, part), (id, name)) in
        [(root, Part::Root), (verity, Part::Verity)].into_iter().zip([halves.0, halves.1].into_iter().zip(names))
    {
        let number = table.partition(role).number;
        let partition = gpt.partitions.iter_mut().find(|partition| partition.number == number).context("a slot's partition")?;
        disk::copy(&Files::of(store, disk), part, raw, partition.first * SECTOR)?;
        (partition.id, partition.name) = (id, name);
    }
    gpt.write(raw).context("cannot write the partition table")?;
    if bios {
        let folder = esp::slot_folder(slot);
        volume.write(&format!("{folder}/vmlinuz"), &store.read(&disk.part(Part::Kernel)?.digest)?)?;
        volume.write(&format!("{folder}/initrd"), &store.read(&disk.part(Part::Initrd)?.digest)?)?;
        volume.write(&format!("{folder}/cmdline.cfg"), esp::cmdline_cfg(&disk.config.cmdline).as_bytes())?;
    }
    let uki = store.read(&disk.part(Part::Uki)?.digest)?;
    volume.write(&esp::uki_path(generation, slot, Some(tries)), &uki)?;
    if bios {
        let order = format!("{} {}", slot.name(), other.name());
        mark(&mut volume, &[(&format!("tries_{}", slot.name()), &tries.to_string()), ("order", &order)])?;
    }
    Ok(())
}

/// Removes the slot's UKI and answers the highest generation there is.
fn forget(volume: &mut Volume<'_>, slot: Slot) -> Result<u32> {
    let mut highest = 0;
    for found in volume.list()? {
        let Some(name) = found.path.strip_prefix("EFI/Linux/pipeline_") else { continue };
        let generation: u32 = name.get(..6).and_then(|digits| digits.parse().ok()).unwrap_or(0);
        highest = highest.max(generation);
        if name.get(7..8) == Some(slot.name()) {
            volume.remove(&found.path)?;
        }
    }
    Ok(highest)
}

/// Sets variables of GRUB's environment block, which keeps its place on the disk.
fn mark(volume: &mut Volume<'_>, variables: &[(&str, &str)]) -> Result<()> {
    let mut environment = Environment::parse(&volume.read(GRUB_ENVIRONMENT)?)?;
    for (name, value) in variables {
        environment.set(name, value);
    }
    volume.write(GRUB_ENVIRONMENT, &environment.render()?)?;
    Ok(())
}
