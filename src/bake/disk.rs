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
use super::parts::Files;
use crate::artifact::disk::{Config, Disk, Part};
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

/// A disk as far as its bytes follow from it.
#[derive(Debug, Clone, Copy)]
pub struct Described<'a> {
    pub config: &'a Config,
    pub files: &'a Files,
}

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
pub fn export(bake: &Bake<'_>, disk: &Described<'_>, format: Format, path: &Path) -> Result<()> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let how = |pieces: &[&Path]| {
        let digest = Identity::of(&[&disk.config.disk_guid]).bytes("export");
        let request = Export { pieces, digest: &digest, threads: bake.threads, path: bake.path };
        export::export(&request, format, path)
    };
    if format == Format::Qcow2 {
        // The large parts are read where they are.
        let ends = ends(disk, dir)?;
        let (root, verity) = (disk.files.path(Part::Root)?, disk.files.path(Part::Verity)?);
        return how(&[ends.head.path(), root, ends.gap.path(), verity, ends.tail.path()]);
    }
    let raw = export::temporary(dir)?;
    write(disk, raw.as_file())?;
    if format == Format::Raw {
        crate::fault::point("rename an export");
        raw.persist(path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
        return Ok(());
    }
    how(&[raw.path()])
}

fn ends(disk: &Described<'_>, dir: &Path) -> Result<Ends> {
    let layout = &disk.config.table;
    let (root, verity) = (layout.partition(Role::RootA), layout.partition(Role::VerityA));
    let gpt = table(disk.config)?;
    let ends = Ends { head: export::temporary(dir)?, gap: export::temporary(dir)?, tail: export::temporary(dir)? };
    let head = ends.head.as_file();
    head.set_len(root.offset())?;
    head.write_all_at(&gpt.primary()?, 0).context("cannot write the partition table")?;
    boot_files(disk, head)?;
    let root_end = root.offset() + disk.files.size(Part::Root)?;
    ends.gap.as_file().set_len(verity.offset() - root_end)?;
    let verity_end = verity.offset() + disk.files.size(Part::Verity)?;
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
    write(&Described { config: &disk.config, files: &Files::of(store, disk) }, temp.as_file())?;
    // A length is all that is looked at next time, and nobody writes here.
    temp.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o444))?;
    temp.as_file().sync_all()?;
    crate::fault::point("rename a raw disk");
    temp.persist(&path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(path)
}

/// A disk of its own for a machine that keeps what it writes, `path`: made when it is not there, with folder.
pub fn kept(store: &Store, disk: &Disk, path: &Path) -> Result<()> {
    let dir = path.parent().context("a folder")?;
    if path.exists() {
        return Ok(());
    }
    fs_err::create_dir_all(dir)?;
    let temp = export::temporary(dir)?;
    write(&Described { config: &disk.config, files: &Files::of(store, disk) }, temp.as_file())?;
    temp.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    temp.as_file().sync_all()?;
    crate::fault::point("rename a disk that is kept");
    temp.persist(path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
    Ok(())
}

/// Writes the whole raw disk into `out`, an empty file; it is sparse.
pub fn write(disk: &Described<'_>, out: &File) -> Result<()> {
    out.set_len(disk.config.table.bytes())?;
    table(disk.config)?.write(out).context("cannot write the partition table")?;
    boot_files(disk, out)?;
    for (part, role) in [(Part::Root, Role::RootA), (Part::Verity, Role::VerityA)] {
        copy(disk.files, part, out, disk.config.table.partition(role).offset())?;
    }
    Ok(())
}

/// Writes the GRUB area and the ESP.
fn boot_files(disk: &Described<'_>, out: &File) -> Result<()> {
    let bios = disk.config.table.partition(Role::Bios);
    if disk.files.has(Part::GrubCore) {
        grub::install(out, &disk.files.read(Part::GrubBoot)?, &disk.files.read(Part::GrubCore)?, bios.start, bios.sectors)?;
    }
    let partition = disk.config.table.partition(Role::Esp);
    let entries = esp_entries(disk)?;
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
pub(super) fn copy(files: &Files, part: Part, out: &File, offset: u64) -> Result<()> {
    let file = fs_err::File::open(files.path(part)?)?;
    let (mut from, mut to, end) = (0, offset, files.size(part)?);
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
        anyhow::ensure!(copied > 0, "`{}` ends early", part.name());
    }
    Ok(())
}

/// The partition table in UEFI's form.
pub fn table(config: &Config) -> Result<Gpt> {
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
fn esp_entries(disk: &Described<'_>) -> Result<Vec<Entry>> {
    let whole = |path: String, part: Part| -> Result<Entry> {
        let file = fs_err::File::open(disk.files.path(part)?)?.into_file();
        Ok(Entry { path, content: Some(Content::Range { file: Arc::new(file), offset: 0, length: disk.files.size(part)? }) })
    };
    let mut entries = vec![
        whole("/EFI/BOOT/BOOTX64.EFI".into(), Part::Loader)?,
        whole("/EFI/systemd/systemd-bootx64.efi".into(), Part::Loader)?,
        whole(esp::uki_path(FIRST, Slot::A, None), Part::Uki)?,
    ];
    entries.extend(disk.config.esp_texts.iter().map(|(path, text)| Entry::bytes(path.as_str(), text.as_bytes())));
    if disk.files.has(Part::GrubCore) {
        let folder = esp::slot_folder(Slot::A);
        entries.extend([
            Entry::bytes("/grub/grubenv", grub::Environment::shipped().render()?),
            whole(format!("{folder}/vmlinuz"), Part::Kernel)?,
            whole(format!("{folder}/initrd"), Part::Initrd)?,
            Entry::bytes(format!("{folder}/cmdline.cfg"), esp::cmdline_cfg(&disk.config.cmdline).into_bytes()),
        ]);
    }
    Ok(entries)
}
