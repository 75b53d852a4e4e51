//! Packing: thousands of small files become one, whole and synced before the first of them is removed.
//!
//! A pack is merged with those that are not twice as large as what is packed, so that there are few and none is written
//! often (the idea of `git repack --geometric`). Objects that no decision leads to are packed as well: nothing is ever lost.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use fs_err as fs;
use git2::{Oid, Repository};

use super::disk::{self, Writer};
use super::{Ledger, snapshot};
use crate::fault;

/// Loose objects above which it is time to pack; a decision makes four.
const LOOSE_MAX: usize = 2000;
/// Packs above which it is time to merge them; each fetch makes one.
const PACKS_MAX: usize = 30;
/// Of the folders of loose objects, those looked at to estimate how many there are; ids are evenly spread.
const SAMPLE: std::ops::Range<usize> = 0x10..0x20;

/// A pack and the objects in it.
struct Pack {
    /// `pack-HEX`, without ending.
    stem: String,
    objects: Vec<Oid>,
}

impl Ledger {
    /// Packs when there are many loose objects or packs; otherwise this costs a look at a few folders.
    ///
    /// # Errors
    /// A full disk, for one. The ledger is as it was then, or better packed.
    pub fn pack_if_needed(&self) -> Result<()> {
        let mut sample = 0;
        for number in SAMPLE {
            sample += names(&self.dir.join(format!("objects/{number:02x}")))?.len();
        }
        let packs = names(&self.dir.join("objects/pack"))?.iter().filter(|name| name.ends_with(".idx")).count();
        if sample * (256 / SAMPLE.len()) <= LOOSE_MAX && packs <= PACKS_MAX {
            return Ok(());
        }
        self.pack()
    }

    /// Packs all loose objects, and the packs that are small beside them.
    ///
    /// # Errors
    /// As [`Ledger::pack_if_needed`].
    pub fn pack(&self) -> Result<()> {
        let writer = self.writer()?;
        let repository = self.repository.get();
        sweep(&self.dir)?;
        let loose = loose(&self.dir)?;
        let mut packs = packs(&self.dir)?;
        packs.sort_by_key(|pack| pack.objects.len());
        let mut objects: BTreeSet<Oid> = loose.iter().map(|(id, _)| *id).collect();
        let mut merged = Vec::new();
        let many = packs.len() > PACKS_MAX;
        for pack in packs {
            if pack.objects.len() >= 2 * objects.len() && !(many && merged.len() < PACKS_MAX) {
                break;
            }
            objects.extend(&pack.objects);
            merged.push(pack.stem);
        }
        if objects.is_empty() || (loose.is_empty() && merged.len() < 2) {
            return Ok(());
        }
        let stem = write(&writer, &repository, &objects)?;
        for (_, path) in loose {
            fault::point("remove a packed object");
            fs::remove_file(path)?;
        }
        for old in merged.iter().filter(|old| **old != stem) {
            // The index first: a pack without one is no pack.
            for ending in ["idx", "rev", "pack"] {
                let path = self.dir.join(format!("objects/pack/{old}.{ending}"));
                if fs::symlink_metadata(&path).is_ok() {
                    fault::point("remove a merged pack");
                    fs::remove_file(path)?;
                }
            }
        }
        Ok(())
    }
}

/// Writes a pack of `objects` into the repository; returns its name without ending.
fn write(writer: &Writer, repository: &Repository, objects: &BTreeSet<Oid>) -> Result<String> {
    let making = disk::scratch(repository.path()).join("packing");
    fs::create_dir(&making)?;
    let written = build(repository, objects, &making).and_then(|()| install(writer, repository.path(), &making));
    if written.is_err() {
        // What stays is swept by the next writer.
        let _ = fs::remove_dir_all(&making);
    }
    let mut stems = written?;
    ensure!(stems.len() == 1, "{} packs were written instead of one", stems.len());
    stems.pop().context("one pack was written")
}

fn build(repository: &Repository, objects: &BTreeSet<Oid>, making: &Path) -> Result<()> {
    let mut builder = repository.packbuilder()?;
    for id in objects {
        builder.insert_object(*id, None).with_context(|| format!("cannot pack the object {id}"))?;
    }
    ensure!(builder.object_count() == objects.len(), "the pack has {} objects, not {}", builder.object_count(), objects.len());
    fault::point("write a pack");
    builder.write(making, 0o444).context("cannot write a pack")
}

/// Moves the packs in the folder `making` into the repository, synced, and removes the folder; returns their names without
/// ending.
pub(super) fn install(_writer: &Writer, repository: &Path, making: &Path) -> Result<Vec<String>> {
    let place = repository.join("objects/pack");
    let mut files = names(making)?;
    for file in &files {
        fs::File::open(making.join(file))?.sync_all()?;
    }
    // The index last: it makes the pack one.
    files.sort_by_key(|file| file.ends_with(".idx"));
    for file in &files {
        fault::point("rename a pack");
        fs::rename(making.join(file), place.join(file))?;
    }
    fault::point("sync the folder of packs");
    disk::sync_folder(&place)?;
    fs::remove_dir(making)?;
    Ok(files.iter().filter_map(|file| file.strip_suffix(".idx").map(str::to_owned)).collect())
}

/// Syncs packs that libgit2 wrote into the repository itself, all but those `known`.
pub(super) fn sync_new(_writer: &Writer, repository: &Path, known: &[String]) -> Result<()> {
    let place = repository.join("objects/pack");
    for file in names(&place)?.iter().filter(|file| !known.contains(file)) {
        fault::point("sync a fetched pack");
        fs::File::open(place.join(file))?.sync_all()?;
    }
    disk::sync_folder(&place)
}

/// Removes packs that libgit2 was writing when it was killed (`pack_git2_…`); only for the one writer.
pub(super) fn sweep(repository: &Path) -> Result<()> {
    let place = repository.join("objects/pack");
    for name in names(&place)?.iter().filter(|name| name.starts_with("pack_git2_")) {
        fs::remove_file(place.join(name))?;
    }
    Ok(())
}

/// The names in a folder, sorted; none when it is not there.
pub(super) fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// The loose objects and their files.
fn loose(repository: &Path) -> Result<Vec<(Oid, PathBuf)>> {
    let mut found = Vec::new();
    for number in 0..=0xff_u8 {
        let folder = repository.join(format!("objects/{number:02x}"));
        for name in names(&folder)? {
            if let Ok(id) = Oid::from_str(&format!("{number:02x}{name}"))
                && name.len() == 38
            {
                found.push((id, folder.join(name)));
            }
        }
    }
    Ok(found)
}

/// The packs that may be merged; one beside a `.keep` may not.
fn packs(repository: &Path) -> Result<Vec<Pack>> {
    let place = repository.join("objects/pack");
    let all = names(&place)?;
    let mut packs = Vec::new();
    for stem in all.iter().filter_map(|name| name.strip_suffix(".idx")) {
        if !all.contains(&format!("{stem}.keep")) && all.contains(&format!("{stem}.pack")) {
            let index = place.join(format!("{stem}.idx"));
            let objects = parse_index(&fs::read(&index)?).with_context(|| format!("cannot read `{}`", index.display()))?;
            packs.push(Pack { stem: stem.into(), objects });
        }
    }
    Ok(packs)
}

/// The objects a pack index lists (gitformat-pack(5), "Version 2 pack-*.idx files").
fn parse_index(bytes: &[u8]) -> Result<Vec<Oid>> {
    ensure!(bytes.starts_with(b"\xfftOc\0\0\0\x02"), "it is no pack index of version 2");
    let last = bytes.get(8 + 255 * 4..8 + 256 * 4).and_then(|count| count.try_into().ok()).context("it is cut off")?;
    let count = usize::try_from(u32::from_be_bytes(last))?;
    let start = 8 + 256 * 4;
    let names = bytes.get(start..start + count * 20).context("it is cut off")?;
    names.chunks_exact(20).map(|name| Ok(Oid::from_bytes(name)?)).collect()
}

/// Packs what leads from `tip` back to `have` in another repository into the folder `making`, which exists.
pub(super) fn build_from(theirs: &Repository, tip: Oid, have: Option<Oid>, making: &Path) -> Result<()> {
    let mut builder = theirs.packbuilder()?;
    let mut walk = theirs.revwalk()?;
    walk.push(tip)?;
    if let Some(have) = have.filter(|have| snapshot::commit_exists(theirs, *have).unwrap_or(false)) {
        walk.hide(have)?;
    }
    builder.insert_walk(&mut walk)?;
    builder.write(making, 0o444).context("cannot write a pack")
}

/// The bytes of a pack of what leads from `tip` back to `have`.
pub(super) fn build_for(ours: &Repository, tip: Oid, have: Option<Oid>) -> Result<Vec<u8>> {
    let mut builder = ours.packbuilder()?;
    let mut walk = ours.revwalk()?;
    walk.push(tip)?;
    if let Some(have) = have {
        walk.hide(have)?;
    }
    builder.insert_walk(&mut walk)?;
    let mut bytes = git2::Buf::new();
    builder.write_buf(&mut bytes).context("cannot make a pack")?;
    Ok(bytes.to_vec())
}
