//! The bytes of a disk: what lies before, between and behind its large parts.
//!
//! A disk is put together only to be exported: root image and hash tree are blobs of the store,
//! and partition table, GRUB area and ESP follow from the artifact. [`head`] is everything up to
//! slot A, [`tail`] everything behind it; a raw disk is both with the blobs between them.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};

use super::Bake;
use super::esp::{self, Slot};
use super::identity::Identity;
use crate::artifact::disk::{Disk, Part};
use crate::artifact::store::Store;
use crate::disk::export::{self, Export, Format};
use crate::disk::fat::{self, Content, Entry};
use crate::disk::gpt::{self, Gpt, Guid, Partition};
use crate::disk::grub;
use crate::disk::table::{Role, SECTOR};

/// Label of the ESP.
const ESP_LABEL: &str = "ESP";
/// Generation of a disk as it is shipped.
const FIRST: u32 = 1;

/// A disk's ends, for exports: temporary files that go with this value.
#[derive(Debug)]
struct Ends {
    /// Up to slot A.
    head: tempfile::NamedTempFile,
    /// From the end of the root image to the hash tree: zeros.
    gap: tempfile::NamedTempFile,
    /// From the end of the hash tree to the end of the disk.
    tail: tempfile::NamedTempFile,
}

/// Writes `disk` to `path` in `format`; the file appears under its name when it is whole.
pub fn export(bake: &Bake<'_>, disk: &Disk, format: Format, path: &Path) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let how = |pieces: &[&Path]| {
        let request = Export { pieces, digest: disk.digest.bytes(), threads: bake.threads, path: bake.path };
        export::export(&request, format, path)
    };
    if format == Format::Qcow2 {
        // The large parts are read where they are.
        let ends = ends(bake.store, disk, dir)?;
        let (root, verity) = (bake.store.blob(&disk.part(Part::Root)?.digest), bake.store.blob(&disk.part(Part::Verity)?.digest));
        return how(&[ends.head.path(), &root, ends.gap.path(), &verity, ends.tail.path()]);
    }
    let raw = export::temporary(dir)?;
    write(bake.store, disk, raw.as_file())?;
    if format == Format::Raw {
        crate::fault::point("rename an export");
        raw.persist(path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
        return Ok(());
    }
    how(&[raw.path()])
}

fn ends(store: &Store, disk: &Disk, dir: &Path) -> Result<Ends> {
    let layout = &disk.config.table;
    let (root, verity) = (layout.partition(Role::RootA), layout.partition(Role::VerityA));
    let gpt = table(disk)?;
    let ends = Ends { head: export::temporary(dir)?, gap: export::temporary(dir)?, tail: export::temporary(dir)? };
    let head = ends.head.as_file();
    head.set_len(root.offset())?;
    head.write_all_at(&gpt.primary()?, 0).context("cannot write the partition table")?;
    boot_files(store, disk, head)?;
    let root_end = root.offset() + disk.part(Part::Root)?.size;
    ends.gap.as_file().set_len(verity.offset() - root_end)?;
    let verity_end = verity.offset() + disk.part(Part::Verity)?.size;
    let tail = layout.bytes() - verity_end;
    ends.tail.as_file().set_len(tail)?;
    let backup = gpt.backup()?;
    ends.tail.as_file().write_all_at(&backup, tail - backup.len() as u64).context("cannot write the partition table")?;
    Ok(ends)
}

/// The raw disk as a file of the cache, to boot it or to write overlays over it; nobody changes it.
pub fn raw(store: &Store, disk: &Disk) -> Result<PathBuf> {
    let dir = store.cache("disks");
    fs_err::create_dir_all(&dir)?;
    let path = dir.join(format!("{}.raw", disk.digest.hex()));
    if fs_err::metadata(&path).is_ok_and(|meta| meta.len() == disk.config.table.bytes()) {
        return Ok(path);
    }
    let temp = export::temporary(&dir)?;
    write(store, disk, temp.as_file())?;
    crate::fault::point("rename a raw disk");
    temp.persist(&path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(path)
}

/// Writes the whole raw disk into `out`, an empty file; it is sparse.
pub fn write(store: &Store, disk: &Disk, out: &File) -> Result<()> {
    out.set_len(disk.config.table.bytes())?;
    table(disk)?.write(out).context("cannot write the partition table")?;
    boot_files(store, disk, out)?;
    for (part, role) in [(Part::Root, Role::RootA), (Part::Verity, Role::VerityA)] {
        copy(store, disk, part, out, disk.config.table.partition(role).offset())?;
    }
    Ok(())
}

/// Writes the GRUB area and the ESP.
fn boot_files(store: &Store, disk: &Disk, out: &File) -> Result<()> {
    let bios = disk.config.table.partition(Role::Bios);
    if let (Some(boot), Some(core)) = (disk.parts.get(&Part::GrubBoot), disk.parts.get(&Part::GrubCore)) {
        grub::install(out, &store.read(&boot.digest)?, &store.read(&core.digest)?, bios.start, bios.sectors)?;
    }
    let partition = disk.config.table.partition(Role::Esp);
    let entries = esp_entries(store, disk)?;
    let format = fat::Format {
        bytes: partition.bytes(),
        label: ESP_LABEL.into(),
        serial: disk.config.esp_serial,
        time: disk.config.epoch,
        hidden: u32::try_from(partition.start).unwrap_or(0),
    };
    fat::plan(&format, &entries)?.write(out, partition.offset()).context("cannot write the ESP")
}

/// Copies a part into `out`, in the kernel.
pub(super) fn copy(store: &Store, disk: &Disk, part: Part, out: &File, offset: u64) -> Result<()> {
    let descriptor = disk.part(part)?;
    let file = fs_err::File::open(store.blob(&descriptor.digest))?;
    let (mut from, mut to, end) = (0, offset, descriptor.size);
    while from < end {
        let length = usize::try_from(end - from).unwrap_or(usize::MAX);
        let copied = match rustix::fs::copy_file_range(&file, Some(&mut from), out, Some(&mut to), length) {
            Ok(copied) => copied,
            // Two file systems, or one that cannot: by hand.
            Err(rustix::io::Errno::XDEV | rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                let mut buffer = vec![0; length.min(1 << 20)];
                let file: &File = file.file();
                let read = file.read_at(&mut buffer, from)?;
                out.write_all_at(&buffer[..read], to)?;
                (from, to) = (from + read as u64, to + read as u64);
                read
            }
            Err(error) => return Err(error).with_context(|| format!("cannot copy `{}`", part.name())),
        };
        anyhow::ensure!(copied > 0, "`{}` of the store ends early", part.name());
    }
    Ok(())
}

/// The partition table in UEFI's form.
pub fn table(disk: &Disk) -> Result<Gpt> {
    let config = &disk.config;
    let mut root_hash = [0; 32];
    hex::decode_to_slice(&config.root_hash, &mut root_hash).context("the disk's root hash")?;
    let disk_guid: Guid = config.disk_guid.parse().map_err(anyhow::Error::msg)?;
    let (data, hash) = gpt::halves(&root_hash);
    let others = Identity::of(&[&config.disk_guid]);
    let partitions = config
        .table
        .partitions
        .iter()
        .map(|partition| Partition {
            number: partition.number,
            kind: gpt::kind(partition.role),
            id: match partition.role {
                Role::RootA => data,
                Role::VerityA => hash,
                _ => Guid::swapped(others.uuid(&format!("partition {}", partition.number))),
            },
            first: partition.start,
            last: partition.start + partition.sectors - 1,
            name: partition.name.clone(),
            attributes: 0,
        })
        .collect();
    Ok(Gpt { disk: disk_guid, sectors: config.table.bytes() / SECTOR, partitions })
}

/// Files of the ESP as it is shipped: slot A, already good.
fn esp_entries(store: &Store, disk: &Disk) -> Result<Vec<Entry>> {
    let from_store = |path: String, part: Part| -> Result<Entry> {
        let descriptor = disk.part(part)?;
        let file = fs_err::File::open(store.blob(&descriptor.digest))?.into_file();
        Ok(Entry { path, content: Some(Content::Range { file: Arc::new(file), offset: 0, length: descriptor.size }) })
    };
    let mut entries = vec![
        from_store("/EFI/BOOT/BOOTX64.EFI".into(), Part::Loader)?,
        from_store("/EFI/systemd/systemd-bootx64.efi".into(), Part::Loader)?,
        from_store(esp::uki_path(FIRST, Slot::A, None), Part::Uki)?,
        Entry::bytes("/loader/loader.conf", esp::LOADER_CONF.as_bytes()),
    ];
    if disk.parts.contains_key(&Part::GrubCore) {
        let folder = esp::slot_folder(Slot::A);
        entries.extend([
            Entry::bytes("/grub/grub.cfg", grub::CONFIGURATION.as_bytes()),
            Entry::bytes("/grub/grubenv", grub::Environment::shipped().render()?),
            from_store(format!("{folder}/vmlinuz"), Part::Kernel)?,
            from_store(format!("{folder}/initrd"), Part::Initrd)?,
            Entry::bytes(format!("{folder}/cmdline.cfg"), esp::cmdline_cfg(&disk.config.cmdline).into_bytes()),
        ]);
    }
    Ok(entries)
}
