//! From the kernel's start to the root's init: the steps in their order, and the ends when one fails.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use super::disks::{self, Found};
use super::esp::{Esp, Mark};
use super::guid::Hash;
use super::modules::Modules;
use super::sys::{self, Reset};
use super::{cmdline, copy, credentials, dm, log, machine_id, provision, smbios, var, verity};

/// How long disks may take to appear: slow controllers and network disks need seconds.
const DISK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a message stands on the console before the machine restarts.
const READING_TIME: Duration = Duration::from_secs(5);
/// How often a device that gives an I/O error is read, and how long is waited between.
const READ_TRIES: u32 = 5;
const READ_PAUSE: Duration = Duration::from_millis(500);
/// Where the root is put together.
const NEW_ROOT: &str = "/sysroot";
/// Facts about this boot for the running system.
const FACTS: &str = "/run/pipeline/boot";

/// Why the machine cannot go on.
#[derive(Debug)]
enum Failure {
    /// Nothing says that the slot is to blame.
    Plain(String),
    /// What is on the disk is not what the root hash says.
    Corrupt(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::Plain(message)
    }
}

/// Process 1 of the initrd; hands over to `/sbin/init` of the root with the arguments it got.
pub fn initrd(arguments: &[String]) -> ! {
    std::panic::set_hook(Box::new(|info| log::warn(&format!("a bug in the static init: {info}"))));
    sys::clear_umask();
    let base = base_mounts();
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    log::set_debug(cmdline::value(&cmdline, "pipeline.debug").is_some());
    // The log must not be thinned out while we are the only ones who write.
    let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "on\n");
    let root = Path::new(NEW_ROOT);
    let mut found = None;
    let done = base.map_err(Failure::Plain).and_then(|()| {
        let mut modules = Modules::of_initrd();
        assemble(root, &cmdline, &mut modules, &mut found)
    });
    let failure = match done.and_then(|()| hand_over(root, arguments)) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    end(failure, found.as_ref())
}

/// The same for dracut, which has loaded the drivers and will hand over itself.
///
/// # Errors
/// Never: when it fails the machine ends as it does in our own initrd.
pub fn mount_root(root: &Path) -> Result<(), String> {
    sys::clear_umask();
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    log::set_debug(cmdline::value(&cmdline, "pipeline.debug").is_some());
    let mut found = None;
    match assemble(root, &cmdline, &mut Modules::default(), &mut found) {
        Ok(()) => Ok(()),
        Err(failure) => end(failure, found.as_ref()),
    }
}

fn base_mounts() -> Result<(), String> {
    let flags = sys::MS_NOSUID | sys::MS_NODEV | sys::MS_NOEXEC;
    let mounts = [
        ("devtmpfs", "/dev", sys::MS_NOSUID, "mode=0755"),
        ("proc", "/proc", flags, ""),
        ("sysfs", "/sys", flags, ""),
        ("tmpfs", "/run", sys::MS_NOSUID | sys::MS_NODEV, "mode=0755,size=20%,nr_inodes=800k"),
    ];
    for (kind, target, flags, data) in mounts {
        let target = Path::new(target);
        let done = copy::folder(target).and_then(|()| sys::mount_at(Path::new(kind), target, kind, flags, data));
        done.map_err(|error| format!("{} cannot be mounted: {error}", target.display()))?;
    }
    Ok(())
}

/// Puts the whole root together at `root`. `found` is set as soon as the slot is known.
fn assemble(root: &Path, cmdline: &str, modules: &mut Modules, found: &mut Option<Found>) -> Result<(), Failure> {
    let hash = cmdline::root_hash(cmdline)?;
    // By name, as no device asks for them. The checksum is in two modules, and EROFS and ext4 ask for it by a program that
    // is not here, so it goes first.
    modules.load_for_processor(&["crc32c_intel", "sha256_ssse3"]);
    modules.load_with_hardware(&["crc32c_generic", "dm_verity", "erofs", "ext4", "overlay"]);
    let place = found.insert(find_slot(&hash, modules)?);
    log::note(&format!("slot {} on {}", place.slot.letter(), place.disk.name));
    if disks::fit(place)? {
        *place = wait_for_nodes(&hash)?;
    }
    let place = &*place;
    open_root(root, place, &hash)?;
    let judged = |message: String| if is_corrupt() { Failure::Corrupt(message) } else { Failure::Plain(message) };
    furnish(root, place, &hash, modules).map_err(judged)?;
    if is_corrupt() {
        return Err(Failure::Corrupt("the root does not fit its root hash".into()));
    }
    Ok(())
}

fn is_corrupt() -> bool {
    dm::is_corrupt().unwrap_or(false)
}

/// Loads drivers and looks at disks until the partitions of the root hash are there.
fn find_slot(hash: &Hash, modules: &mut Modules) -> Result<Found, String> {
    let uevents = sys::Uevents::open().ok();
    let start = Instant::now();
    let mut said = false;
    loop {
        modules.load_for_hardware();
        let error = match ready(hash) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let waited = start.elapsed();
        if waited > DISK_TIMEOUT {
            return Err(error);
        }
        if !said && waited > Duration::from_secs(3) {
            log::warn(&format!("waiting for the disk: {error}"));
            said = true;
        }
        let pause = Duration::from_millis(50);
        uevents.as_ref().map_or_else(|| std::thread::sleep(pause), |uevents| uevents.wait(pause));
    }
}

/// The partitions are in the table, and the kernel has made devices of them.
fn ready(hash: &Hash) -> Result<Found, String> {
    let found = disks::find(hash)?;
    let disk = &found.disk;
    let needed = [Some(&found.data), Some(&found.hash), found.esp.as_ref(), found.var.as_ref()];
    for partition in needed.into_iter().flatten() {
        let node = disk.partition_name(partition.number).map(|name| disks::node(&name));
        if !node.is_some_and(|node| node.exists()) {
            // The kernel leaves out what lies behind the end of the disk.
            disks::fit(&found)?;
            return Err(format!("partition {} of {} has no device", partition.number, disk.name));
        }
    }
    Ok(found)
}

fn wait_for_nodes(hash: &Hash) -> Result<Found, String> {
    let start = Instant::now();
    loop {
        match ready(hash) {
            Err(_) if start.elapsed() < Duration::from_secs(10) => std::thread::sleep(Duration::from_millis(5)),
            other => return other,
        }
    }
}

fn node_of(found: &Found, number: u32) -> Result<std::path::PathBuf, String> {
    let name = found.disk.partition_name(number);
    name.map(|name| disks::node(&name)).ok_or_else(|| format!("{} has no partition {number}", found.disk.name))
}

/// The ESP on the disk of the slot.
pub fn esp_of(found: &Found) -> Result<Esp, String> {
    let partition = found.esp.as_ref().ok_or_else(|| format!("{} has no ESP", found.disk.name))?;
    node_of(found, partition.number).map(Esp::new)
}

/// Again a few times when the device does not answer: a controller that is just coming up is no damage.
fn patiently<T>(mut attempt: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    let mut tries = READ_TRIES;
    loop {
        match attempt() {
            Err(error) if error.raw_os_error() == Some(sys::EIO) && tries > 1 => {
                tries -= 1;
                std::thread::sleep(READ_PAUSE);
            }
            result => return result,
        }
    }
}

/// Whose fault an error is: the disk's when it cannot be read for good, or gives the kernel a table that it does not take
/// (a damaged superblock) or that fits nothing; else nobody's.
fn blamed(error: &std::io::Error, message: String) -> Failure {
    let damaged = matches!(error.raw_os_error(), Some(sys::EIO | sys::EUCLEAN | sys::EINVAL))
        || error.kind() == std::io::ErrorKind::UnexpectedEof;
    if damaged { Failure::Corrupt(message) } else { Failure::Plain(message) }
}

/// The verified device and the file system on it.
fn open_root(root: &Path, place: &Found, hash: &Hash) -> Result<(), Failure> {
    use std::io::Read as _;
    let hash_node = node_of(place, place.hash.number)?;
    let mut first = [0; 512];
    let read = patiently(|| fs::File::open(&hash_node).and_then(|mut file| file.read_exact(&mut first)));
    read.map_err(|error| blamed(&error, format!("{} cannot be read: {error}", hash_node.display())))?;
    let superblock = verity::Superblock::parse(&first);
    let superblock = superblock.map_err(|error| Failure::Corrupt(format!("{} {error}", hash_node.display())))?;
    let numbers = [place.data.number, place.hash.number].map(|number| place.disk.device_number(number).unwrap_or_default());
    let table = superblock.table(&numbers[0], &numbers[1], hash);
    let device = patiently(|| dm::create(&superblock.uuid, superblock.sectors(), &table));
    let device = device.map_err(|error| blamed(&error, format!("the verified root cannot be set up: {error}")))?;
    let made = copy::folder(root).map_err(|error| format!("{} cannot be made: {error}", root.display()));
    made?;
    sys::mount_at(&device, root, "erofs", sys::MS_RDONLY, "").map_err(|error| {
        let message = format!("the root cannot be mounted: {error}");
        let damaged = matches!(error.raw_os_error(), Some(sys::EIO | sys::EUCLEAN));
        if damaged || is_corrupt() { Failure::Corrupt(message) } else { Failure::Plain(message) }
    })
}

/// `/var`, `/etc`, the identity and the configuration of the machine.
fn furnish(root: &Path, place: &Found, hash: &Hash, modules: &mut Modules) -> Result<(), String> {
    let partition = place.var.as_ref().ok_or_else(|| format!("{} has no partition for /var", place.disk.name))?;
    var::mount(root, &node_of(place, partition.number)?, partition.sectors())?;
    var::fill(root, &hash.to_string())?;
    overlay_etc(root)?;
    let firmware = smbios::parse(&fs::read("/sys/firmware/dmi/tables/DMI").unwrap_or_default());
    let id = machine_id::stable(&root.join("var"), firmware.uuid.as_ref())?;
    let written = copy::file(&root.join("etc/machine-id"), format!("{id}\n").as_bytes(), 0o444, (0, 0));
    written.map_err(|error| format!("/etc/machine-id cannot be written: {error}"))?;
    let brought = credentials::collect(&firmware, &place.disk.name, modules);
    provision::apply(root, &brought)?;
    let facts = format!("slot={}\ndisk={}\nroothash={hash}\n", place.slot.letter(), place.disk.name);
    copy::file(Path::new(FACTS), facts.as_bytes(), 0o444, (0, 0)).map_err(|error| format!("{FACTS} cannot be written: {error}"))
}

/// Changes in `/etc` go to memory and are gone at the next boot.
fn overlay_etc(root: &Path) -> Result<(), String> {
    let (base, target) = (Path::new("/run/pipeline"), root.join("etc"));
    let etc = base.join("etc");
    let made = copy::folder(base).and_then(|()| {
        copy::folder_of(&etc, 0o700, (0, 0))?;
        copy::folder_of(&etc.join("upper"), 0o755, (0, 0))?;
        copy::folder_of(&etc.join("work"), 0o700, (0, 0))
    });
    made.map_err(|error| format!("{} cannot be made: {error}", etc.display()))?;
    let data = format!("lowerdir={0},upperdir={1}/upper,workdir={1}/work", target.display(), etc.display());
    let mounted = sys::mount_at(Path::new("overlay"), &target, "overlay", 0, &data);
    mounted.map_err(|error| format!("/etc cannot be made writable: {error}"))
}

/// Moves the mounts below the root, makes it the root, and becomes its init.
fn hand_over(root: &Path, arguments: &[String]) -> Result<std::convert::Infallible, Failure> {
    let _ = fs::write("/proc/sys/kernel/printk_devkmsg", "ratelimit\n");
    // What the initrd holds stays in memory for ever otherwise.
    let _ = fs::remove_dir_all("/modules");
    for file in ["/modules.list", "/modules.alias", "/init"] {
        let _ = fs::remove_file(file);
    }
    log::note("handing over to the init of the root");
    let moved = || -> std::io::Result<()> {
        for name in ["dev", "proc", "sys", "run"] {
            sys::mount_at(&Path::new("/").join(name), &root.join(name), "", sys::MS_MOVE, "")?;
        }
        std::env::set_current_dir(root)?;
        sys::mount_at(Path::new("."), Path::new("/"), "", sys::MS_MOVE, "")?;
        std::os::unix::fs::chroot(".")?;
        std::env::set_current_dir("/")
    };
    moved().map_err(|error| Failure::Plain(format!("the root cannot be entered: {error}")))?;
    let error = Command::new("/sbin/init").args(arguments).exec();
    let message = format!("/sbin/init of the root cannot be started: {error}");
    let damaged = matches!(error.raw_os_error(), Some(sys::EIO | sys::EUCLEAN)) || is_corrupt();
    Err(if damaged { Failure::Corrupt(message) } else { Failure::Plain(message) })
}

/// Says why and restarts; or stands still when the disk is damaged and there is nothing else to start.
fn end(failure: Failure, found: Option<&Found>) -> ! {
    match failure {
        Failure::Plain(message) => log::alarm(&["THE MACHINE CANNOT START", &message, "restarting in 5 seconds"]),
        Failure::Corrupt(message) => {
            let marked = found.ok_or_else(|| "no slot is known".to_string()).and_then(mark_bad);
            let error = marked.as_ref().err().cloned().unwrap_or_default();
            let letter = found.map_or("?", |found| found.slot.letter()).to_uppercase();
            let title = format!("SLOT {letter} IS DAMAGED");
            if marked != Ok(false) {
                let lines = [title.as_str(), &message, &error, "restarting in 5 seconds"];
                log::alarm(&lines.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>());
            } else {
                log::alarm(&[&title, &message, "NO OTHER GOOD SLOT EXISTS. THE MACHINE STOPS HERE.", "write the disk anew"]);
                sys::sync_all();
                loop {
                    std::thread::sleep(Duration::from_secs(3600));
                }
            }
        }
    }
    sys::sync_all();
    std::thread::sleep(READING_TIME);
    let error = sys::reset(Reset::Restart);
    panic!("the kernel does not restart: {error}");
}

/// Marks the slot bad; whether the boot loader has another one to start.
fn mark_bad(found: &Found) -> Result<bool, String> {
    let esp = esp_of(found)?;
    let states = esp.states();
    esp.mark(found.slot, Mark::Damaged)?;
    Ok(states?[found.slot.other() as usize].bootable())
}
