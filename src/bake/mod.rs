//! From a host tree to a bootable disk.
//!
//! In: a host image in the store, ours or a stranger's. Out: a disk artifact, in parts, and
//! exports of it. Steps: merge the layers into a tree → read what it says of the machine → decide
//! where every file goes → write the root image and hash it on the way → hash tree → initrd →
//! unified kernel image → record. No root, loop device, mount or process but `qemu-img`.

pub mod contents;
pub mod disk;
pub mod esp;
pub mod host;
pub mod identity;
pub mod initrd;
pub mod modules;
pub mod parts;
pub mod plan;
pub mod slot;

use std::ffi::OsStr;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::artifact::disk::{self as artifact, Config, Disk, Part};
use crate::artifact::image;
use crate::artifact::store::{Descriptor, Store, write_cache};
use crate::disk::erofs::{self, Header, Layout, Target};
use crate::disk::gpt::Guid;
use crate::disk::index::{self, Index};
use crate::disk::init;
use crate::disk::table::{Role, Table};
use crate::disk::tree::Tree;
use crate::disk::uki;
use crate::disk::verity::{self, Salted};
use crate::oci::digest::{Digest, Hasher};
use crate::oci::flatten::flatten;
use crate::progress::Progress;
pub use disk::{Described, export};
use host::{Host, Initrd};
use identity::Identity;
use parts::{Files, Parts, Settling};

/// Goes up when the same host would give other bytes.
const VERSION: &str = "bake 1";
/// Name of the root file system, shown by tools.
const VOLUME: &str = "root";
/// zstd level of the layout: read by no machine, written at each bake.
const LAYOUT_LEVEL: i32 = 3;

/// What every flow of a bake is given.
#[derive(Clone, Copy)]
pub struct Bake<'a> {
    pub store: &'a Store,
    pub progress: &'a dyn Progress,
    pub threads: usize,
    /// The value of `PATH`, for `qemu-img`.
    pub path: &'a OsStr,
}

impl std::fmt::Debug for Bake<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bake").field("store", &self.store).finish_non_exhaustive()
    }
}

/// What is to be baked.
#[derive(Debug, Clone)]
pub struct Wish {
    /// `NAME:TAG`: the disk is tagged `NAME:TAG.disk`.
    pub name: String,
    /// Manifest of the host image.
    pub host: Digest,
    /// Unchanged files keep their places on this disk, and slots their size.
    pub previous: Option<Disk>,
}

/// A disk whose parts are all written, or were there before.
#[derive(Debug)]
pub struct Baking {
    /// `NAME:TAG.disk`.
    pub name: String,
    pub config: Config,
    state: State,
    key: Digest,
    /// Said already; kept with the record.
    warnings: Vec<String>,
    started: Instant,
    phases: Vec<(&'static str, f64)>,
}

#[derive(Debug)]
enum State {
    There(Box<Disk>, Files),
    Made(Settling),
}

/// The answer of a bake.
#[derive(Debug, Clone)]
pub struct Baked {
    /// `NAME:TAG.disk`.
    pub name: String,
    pub disk: Disk,
    /// Whether it was in the store already.
    pub cached: bool,
    /// From the start to the end, exports included.
    pub seconds: f64,
    /// Seconds of each phase.
    pub phases: Vec<(&'static str, f64)>,
}

impl Baking {
    /// What exports are made from.
    pub fn described(&self) -> Described<'_> {
        let files = match &self.state {
            State::There(_, files) => files,
            State::Made(settling) => settling.files(),
        };
        Described { config: &self.config, files }
    }

    /// Waits until everything is on the disk, records and tags it.
    pub fn finish(mut self, store: &Store) -> Result<Baked> {
        let exported = Instant::now();
        let (disk, cached) = match self.state {
            State::There(disk, _) => (*disk, true),
            State::Made(settling) => {
                let parts = settling.finish(store)?;
                let descriptor = artifact::write(store, &self.config, &parts)?;
                remember(store, &self.key, &Record { disk: descriptor.digest, warnings: self.warnings })?;
                (artifact::read(store, &descriptor.digest)?.context("a disk")?, false)
            }
        };
        tag_disk(store, &self.name, &disk.digest)?;
        self.phases.push(("record", exported.elapsed().as_secs_f64()));
        Ok(Baked { name: self.name, disk, cached, seconds: self.started.elapsed().as_secs_f64(), phases: self.phases })
    }
}

/// The partition table a bake would make, and warnings.
pub fn plan_of(bake: &Bake<'_>, wish: &Wish) -> Result<(Table, Vec<String>)> {
    let planned = Planned::new(bake, wish, &mut Clock::start())?;
    Ok((planned.table, planned.warnings))
}

/// Everything that is decided before anything is written.
struct Planned {
    tree: Tree,
    host: Host,
    initrd: Vec<u8>,
    plan: erofs::Plan,
    table: Table,
    warnings: Vec<String>,
}

impl Planned {
    fn new(bake: &Bake<'_>, wish: &Wish, clock: &mut Clock) -> Result<Self> {
        let (tree, host) = read_tree(bake, wish)?;
        clock.phase("read layers");
        let previous = previous_layout(bake.store, wish)?;
        let plan = erofs::plan(&tree, previous.as_ref(), bake.threads)?;
        let initrd = initrd::initrd(&tree, &host)?;
        let (table, mut warnings) = plan::table(&sizes(wish, &host, plan.blocks(), &initrd.bytes)?)?;
        warnings.extend(missing(&host, &initrd));
        clock.phase("plan");
        Ok(Self { tree, host, initrd: initrd.bytes, plan, table, warnings })
    }
}

/// Makes the parts of a disk, or finds them; [`Baking::finish`] puts them into the store.
pub fn bake(bake: &Bake<'_>, wish: &Wish) -> Result<Baking> {
    let started = Instant::now();
    let name = format!("{}.disk", wish.name);
    let key = key(wish);
    if let Some((disk, warnings)) = remembered(bake.store, &key)? {
        warnings.into_iter().for_each(|warning| bake.progress.warn(warning));
        let (config, files) = (disk.config.clone(), Files::of(bake.store, &disk));
        return Ok(Baking {
            name,
            config,
            state: State::There(Box::new(disk), files),
            key,
            warnings: Vec::new(),
            started,
            phases: Vec::new(),
        });
    }
    bake.store.sweep()?;
    let mut clock = Clock::start();
    let Planned { tree, host, initrd, plan, table, warnings } = Planned::new(bake, wish, &mut clock)?;
    warnings.iter().for_each(|warning| bake.progress.warn(warning.clone()));
    let mut parts = Parts::default();
    let root = write_root(bake, wish, &tree, &plan, &mut parts)?;
    clock.phase("write root");
    let root_hash = hex::encode(root.hash);
    let cmdline = esp::cmdline(&root_hash, &host.file.arguments);
    let uki = unified(&host, &initrd, &cmdline)?;
    for (part, bytes) in [(Part::Uki, &uki), (Part::Kernel, &host.vmlinuz), (Part::Initrd, &initrd), (Part::Loader, &host.loader)]
    {
        parts.put(bake.store, part, bytes)?;
    }
    if let Some((boot, core)) = &host.grub {
        parts.put(bake.store, Part::GrubBoot, boot)?;
        parts.put(bake.store, Part::GrubCore, core)?;
    }
    let identity = Identity::of(&[&root_hash, &Digest::of(&uki).to_string(), &serde_json::to_string(&table)?]);
    let config = config(wish, &host, &root, table, cmdline, &identity);
    let state = State::Made(parts.settle()?);
    clock.phase("boot files");
    Ok(Baking { name, config, state, key, warnings, started, phases: clock.phases })
}

/// What the disk will lack, in words.
fn missing(host: &Host, initrd: &initrd::Made) -> Vec<String> {
    let modules = initrd.missing.iter();
    let mut words: Vec<String> =
        modules.map(|name| format!("the kernel {} has no module `{name}`, which the initrd was to hold", host.kernel)).collect();
    if host.grub.is_none() && host.file.disk.wants("bios") {
        words.push("the tree has no GRUB in /usr/lib/pipeline/boot/grub, so the disk boots by UEFI only".into());
    }
    words
}

/// How long each phase took.
struct Clock {
    last: Instant,
    phases: Vec<(&'static str, f64)>,
}

impl Clock {
    fn start() -> Self {
        Self { last: Instant::now(), phases: Vec::new() }
    }

    fn phase(&mut self, name: &'static str) {
        let now = Instant::now();
        self.phases.push((name, now.duration_since(self.last).as_secs_f64()));
        self.last = now;
    }
}

/// Merges the layers and reads what they say.
fn read_tree(bake: &Bake<'_>, wish: &Wish) -> Result<(Tree, Host)> {
    let blobs = image::blobs(bake.store, &wish.host)?;
    let mut tree = flatten(&blobs, &bake.store.temp_dir(), bake.threads)?;
    let mut host = host::host(&tree)?;
    if !host.file.disk.wants("bios") {
        host.grub = None;
    }
    host::complete(&mut tree, epoch(bake.store, &wish.host)?);
    Ok((tree, host))
}

fn previous_layout(store: &Store, wish: &Wish) -> Result<Option<Layout>> {
    let Some(previous) = &wish.previous else { return Ok(None) };
    let bytes = store.read(&previous.part(Part::Layout)?.digest)?;
    let text = zstd::decode_all(&bytes[..]).context("the previous disk's layout is broken")?;
    Ok(Some(serde_json::from_slice(&text).context("the previous disk's layout is broken")?))
}

fn unified(host: &Host, initrd: &[u8], cmdline: &str) -> Result<Vec<u8>> {
    let os_release = esp::os_release(&host.os_release);
    let parts = uki::Parts { stub: &host.stub, kernel: &host.vmlinuz, initrd, cmdline, osrel: &os_release, uname: &host.kernel };
    uki::assemble(&parts).context("cannot make the unified kernel image")
}

fn sizes(wish: &Wish, host: &Host, blocks: u64, initrd: &[u8]) -> Result<plan::Sizes> {
    // The length of the command line does not depend on the hash.
    let uki = unified(host, initrd, &esp::cmdline(&"0".repeat(64), &host.file.arguments))?.len();
    let loaders = host.loader.len() * 2 + host.grub.as_ref().map_or(0, |(boot, core)| boot.len() + core.len());
    Ok(plan::Sizes {
        root: blocks * verity::BLOCK as u64,
        verity: verity::area_bytes(blocks),
        boot: (uki + host.vmlinuz.len() + initrd.len()) as u64,
        loaders: loaders as u64,
        slot: host.file.disk.slot,
        disk: host.file.disk.size,
        previous_slot: wish.previous.as_ref().map(|disk| disk.config.table.partition(Role::RootA).bytes()),
    })
}

/// A root image that was written.
struct Root {
    hash: [u8; 32],
    salt: [u8; 32],
    bytes: u64,
    epoch: i64,
}

/// Writes root image, hash tree, block index and layout into the store.
fn write_root(bake: &Bake<'_>, wish: &Wish, tree: &Tree, plan: &erofs::Plan, parts: &mut Parts) -> Result<Root> {
    let layers = image::layers(bake.store, &wish.host)?;
    let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
    // From content and places, not from what was there before: the same disk twice has the same salt.
    let identity = Identity::of(&[VERSION, &diff_ids.join(" "), &hex::encode(plan.digest(tree))]);
    let (salt, epoch) = (identity.bytes("salt"), epoch(bake.store, &wish.host)?);
    let salted = Salted::new(&salt);
    let count = usize::try_from(plan.blocks())?;
    let digests = Mutex::new((vec![[0; 32]; count], vec![[0; 32]; count]));
    let on_blocks = |first: u64, bytes: &[u8]| {
        let blocks = || bytes.chunks_exact(verity::BLOCK);
        let leaves: Vec<[u8; 32]> = blocks().map(|block| salted.block(block)).collect();
        let plain: Vec<[u8; 32]> = blocks().map(index::digest).collect();
        let range = first as usize..first as usize + leaves.len();
        let mut digests = digests.lock().unwrap_or_else(PoisonError::into_inner);
        digests.0[range.clone()].copy_from_slice(&leaves);
        digests.1[range].copy_from_slice(&plain);
    };
    let temp = bake.store.temp()?;
    let header = Header { uuid: identity.uuid("root"), epoch, volume_name: VOLUME };
    let target = Target { out: temp.as_file(), offset: 0, threads: bake.threads, on_blocks: &on_blocks };
    let written = erofs::write(tree, plan, &header, &target).context("cannot write the root image")?;
    let (leaves, blocks) = digests.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (area, hash) = verity::tree(&leaves, &salt, identity.uuid("verity"));
    parts.add(Part::Root, temp);
    parts.put(bake.store, Part::Verity, &area)?;
    parts.put(bake.store, Part::Index, &Index { blocks }.render())?;
    let layout = zstd::encode_all(&serde_json::to_vec(&written.layout)?[..], LAYOUT_LEVEL)?;
    parts.put(bake.store, Part::Layout, &layout)?;
    Ok(Root { hash, salt, bytes: written.size, epoch })
}

/// When the host image was made, seconds since 1970, as its manifest says.
fn epoch(store: &Store, host: &Digest) -> Result<i64> {
    let manifest = image::manifest(store, host)?;
    let created = manifest.annotations.get("org.opencontainers.image.created");
    let time = created.and_then(|text| text.parse::<jiff::Timestamp>().ok());
    Ok(time.map_or(crate::build::plan::FIXED_EPOCH, jiff::Timestamp::as_second))
}

fn config(wish: &Wish, host: &Host, root: &Root, table: Table, cmdline: String, identity: &Identity) -> Config {
    let firmware = if host.grub.is_some() { vec!["uefi", "bios"] } else { vec!["uefi"] };
    Config {
        format: artifact::FORMAT,
        name: wish.name.split(':').next().unwrap_or(&wish.name).to_string(),
        host: wish.host,
        disk_guid: Guid::swapped(identity.uuid("disk")).to_string(),
        table,
        root_hash: hex::encode(root.hash),
        salt: hex::encode(root.salt),
        root_bytes: root.bytes,
        kernel: host.kernel.clone(),
        cmdline,
        initrd: if host.file.initrd == Initrd::Dracut { "dracut".into() } else { "static".into() },
        init: init::digest(),
        firmware: firmware.into_iter().map(String::from).collect(),
        esp_serial: identity.serial("esp"),
        esp_texts: esp::texts(host.grub.is_some()),
        epoch: root.epoch,
        os: esp::pretty_name(&host.os_release),
        formats: host.file.disk.formats.clone(),
        apps: host.apps.clone(),
        packages: host.packages.clone(),
    }
}

/// What a bake's result depends on.
fn key(wish: &Wish) -> Digest {
    let mut hasher = Hasher::new();
    hasher.field(VERSION).field(wish.name.split(':').next().unwrap_or_default()).field(wish.host.to_string());
    // What this program adds to the host's own.
    hasher.field(init::digest().to_string());
    for name in init::modules() {
        hasher.field(name);
    }
    for (path, text) in esp::texts(true) {
        hasher.field(path).field(text);
    }
    hasher.field(wish.previous.as_ref().map_or(String::new(), |disk| disk.digest.to_string()));
    hasher.finish()
}

/// A bake that was done: in the cache, because it can be done again.
#[derive(Serialize, Deserialize)]
struct Record {
    disk: Digest,
    #[serde(default)]
    warnings: Vec<String>,
}

/// The disk of an earlier bake and what was said about it, when all of it is still there.
fn remembered(store: &Store, key: &Digest) -> Result<Option<(Disk, Vec<String>)>> {
    let Ok(bytes) = fs_err::read(store.cache("bakes").join(format!("{}.json", key.hex()))) else { return Ok(None) };
    let Ok(record) = serde_json::from_slice::<Record>(&bytes) else { return Ok(None) };
    if !store.blob(&record.disk).exists() {
        return Ok(None);
    }
    let disk = artifact::read(store, &record.disk)?;
    let disk = disk.filter(|disk| disk.parts.values().all(|part| store.has(&part.digest, part.size)));
    Ok(disk.map(|disk| (disk, record.warnings)))
}

fn remember(store: &Store, key: &Digest, record: &Record) -> Result<()> {
    let dir = store.cache("bakes");
    fs_err::create_dir_all(&dir)?;
    write_cache(&dir.join(format!("{}.json", key.hex())), &serde_json::to_vec(record)?)
}

fn tag_disk(store: &Store, tag: &str, digest: &Digest) -> Result<()> {
    if store.tagged(tag)?.is_some_and(|there| there.digest == *digest) {
        return Ok(());
    }
    let manifest = store.read(digest)?;
    let descriptor: Descriptor = artifact::descriptor(&manifest);
    store.tag(tag, &descriptor)
}
