//! `/var`: made at the first boot, checked when it must be, grown when its partition has, filled with what the image
//! brings.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{copy, ext4, log, sys};

/// A file system smaller than this has no room for a journal, a log and the image's own files.
const LEAST_MIB: u64 = 16;
/// Where the root hash is noted whose `/var` was copied.
const STAMP: &str = "lib/pipeline/var-from";

/// Mounts `/var` of the root at `root` from a device of `sectors` sectors.
///
/// # Errors
/// What stands in the way, in one line.
pub fn mount(root: &Path, device: &Path, sectors: u64) -> Result<(), String> {
    if sectors < LEAST_MIB * 2048 {
        let has = sectors / 2048;
        return Err(format!("the disk is too small: {has} MiB are left for /var and {LEAST_MIB} MiB are the least"));
    }
    let start = read(device, 0, 68 << 10)?;
    let state = start.get(1024..2048).and_then(ext4::parse);
    match &state {
        Some(state) if state.clean => {}
        Some(_) => check(root, device, &[])?,
        None => make_or_rescue(root, device, sectors, &start)?,
    }
    let target = root.join("var");
    let mounted = sys::mount_at(device, &target, "ext4", sys::MS_NOSUID | sys::MS_NODEV | sys::MS_NOATIME, "");
    mounted.map_err(|error| format!("/var cannot be mounted from {}: {error}", device.display()))?;
    if let Err(error) = grow(&target, device, sectors) {
        log::warn(&error);
    }
    Ok(())
}

fn read(device: &Path, offset: u64, length: usize) -> Result<Vec<u8>, String> {
    let mut bytes = vec![0; length];
    let done = File::open(device).and_then(|file| file.read_exact_at(&mut bytes, offset));
    done.map_err(|error| format!("{} cannot be read: {error}", device.display())).map(|()| bytes)
}

/// There is no superblock where it should be: a new disk, or a damaged one.
fn make_or_rescue(root: &Path, device: &Path, sectors: u64, start: &[u8]) -> Result<(), String> {
    if let Some(name) = ext4::foreign(start) {
        return Err(format!("the partition of /var, {}, holds {name} and is left alone", device.display()));
    }
    // Without a second superblock to look at, only what is plainly empty is made anew.
    let is_small = sectors * 512 < ext4::BACKUP_OFFSET + ext4::LENGTH as u64;
    if is_small && start.iter().any(|byte| *byte != 0) {
        let device = device.display();
        return Err(format!("the partition of /var, {device}, holds something that is no file system, and is left alone"));
    }
    let backup = read(device, ext4::BACKUP_OFFSET, ext4::LENGTH).ok().and_then(|bytes| ext4::parse(&bytes));
    if backup.is_some() {
        log::warn("the superblock of /var is damaged, using the second one");
        return check(root, device, &["-b", "32768", "-B", "4096"]);
    }
    log::note(&format!("making /var on {}", device.display()));
    // Blocks and inodes as on a large disk, since a small one may grow. Nothing is discarded or zeroed now:
    // the kernel does it later, in the background.
    let options = [
        "-q",
        "-F",
        "-L",
        "var",
        "-m",
        "1",
        "-b",
        "4096",
        "-i",
        "16384",
        "-E",
        "nodiscard,lazy_itable_init=1,lazy_journal_init=1",
    ];
    let (code, words) = run(root, &["/sbin/mkfs.ext4", "/usr/sbin/mkfs.ext4"], &options, device)?;
    if code == 0 { Ok(()) } else { Err(format!("mkfs.ext4 of /var failed with status {code}: {words}")) }
}

/// Repairs what can be repaired without asking; a machine without `/var` is no use, so the rest after that as well.
fn check(root: &Path, device: &Path, options: &[&str]) -> Result<(), String> {
    let tools = ["/sbin/e2fsck", "/usr/sbin/e2fsck"];
    for mode in ["-p", "-y"] {
        log::note(&format!("checking /var with e2fsck {mode}"));
        let (code, words) = run(root, &tools, &[&[mode], options].concat(), device)?;
        // 0 in order, 1 repaired, 2 repaired and to be started anew (not so before it is mounted).
        if code < 4 {
            if code > 0 {
                log::warn(&format!("/var was repaired: {words}"));
            }
            return Ok(());
        }
        log::warn(&format!("e2fsck {mode} of /var ended with status {code}: {words}"));
    }
    Err("/var is damaged and e2fsck could not repair it".into())
}

/// `/dev` and `/proc` inside the root, for as long as this lives.
struct Inside<'a>(&'a Path);

impl<'a> Inside<'a> {
    const NAMES: [&'static str; 2] = ["dev", "proc"];

    fn bind(root: &'a Path) -> Self {
        for name in Self::NAMES {
            // A tool that misses one of them says so itself.
            let _ = sys::mount_at(&Path::new("/").join(name), &root.join(name), "", sys::MS_BIND, "");
        }
        Self(root)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        for name in Self::NAMES {
            let _ = sys::unmount(&self.0.join(name), sys::MNT_DETACH);
        }
    }
}

/// Runs a program of the root, in it; its status and the last lines of what it said.
fn run(root: &Path, programs: &[&str], options: &[&str], device: &Path) -> Result<(i32, String), String> {
    let inside = |program: &&&str| root.join(program.trim_start_matches('/')).exists();
    let program = programs
        .iter()
        .find(inside)
        .ok_or_else(|| format!("/var needs {} and the image has none: add the package e2fsprogs to the host", programs[0]))?;
    let _mounts = Inside::bind(root);
    let mut command = Command::new("/proc/self/exe");
    command.arg("chroot").arg(root).arg(program).args(options).arg(device);
    let output = command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{program} cannot be started: {error}"))?;
    let words = [output.stdout, output.stderr].concat();
    let words = String::from_utf8_lossy(&words);
    let lines = words.lines().filter(|line| !line.trim().is_empty()).collect::<Vec<_>>();
    let words = lines[lines.len().saturating_sub(4)..].join("; ");
    let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
    Ok((code, words))
}

/// Grows the mounted file system to its partition.
fn grow(target: &Path, device: &Path, sectors: u64) -> Result<(), String> {
    // Read again: it may have been made just now.
    let Some(state) = ext4::parse(&read(device, ext4::OFFSET, ext4::LENGTH)?) else { return Ok(()) };
    let wanted = sectors * 512 / state.block_size;
    // Less than this at the end may be too little for a new group of blocks.
    let least = (1 << 20) / state.block_size;
    if wanted < state.blocks + least {
        return Ok(());
    }
    const EXT4_IOC_RESIZE_FS: u64 = 0x4008_6610;
    log::note(&format!("growing /var from {} to {wanted} blocks", state.blocks));
    let done = File::open(target).and_then(|file| sys::ioctl_buffer(&file, EXT4_IOC_RESIZE_FS, &mut wanted.to_le_bytes()));
    done.map_err(|error| format!("/var cannot be grown: {error}"))
}

/// Copies what the image has in its own `/var` and the machine does not, once for each image.
///
/// # Errors
/// The first entry that could not be copied.
pub fn fill(root: &Path, root_hash: &str) -> Result<(), String> {
    let var = root.join("var");
    let stamp = var.join(STAMP);
    if fs::read_to_string(&stamp).is_ok_and(|text| text.trim_end() == root_hash) {
        return Ok(());
    }
    // The root once more, without what is mounted in it.
    let bare = Path::new("/run/pipeline/image");
    let bound = copy::folder(bare).and_then(|()| sys::mount_at(root, bare, "", sys::MS_BIND, ""));
    let done = bound.and_then(|()| {
        let copied = copy::missing(&bare.join("var"), &var);
        sys::unmount(bare, sys::MNT_DETACH).and(copied)?;
        fs::remove_dir(bare)?;
        sys::sync_file_system(&File::open(&var)?)?;
        copy::folder(&var.join("lib/pipeline"))?;
        copy::replace(&stamp, format!("{root_hash}\n").as_bytes(), 0o644)
    });
    done.map_err(|error| format!("/var cannot be filled: {error}"))
}
