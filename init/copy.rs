//! Small jobs on files: copies of trees, safe replacement, private folders.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use super::sys;

/// Copies every entry of the folder `from` that `to` does not have; never overwrites, never goes
/// through a symbolic link, leaves out devices and sockets. Owner, mode, times and extended attributes are kept.
///
/// # Errors
/// The first failure, with its path.
pub fn missing(from: &Path, to: &Path) -> io::Result<()> {
    let say = |path: &Path, error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    for entry in fs::read_dir(from).map_err(|error| say(from, error))? {
        let source = entry.map_err(|error| say(from, error))?.path();
        let Some(name) = source.file_name() else { continue };
        let target = to.join(name);
        one(&source, &target).map_err(|error| say(&source, error))?;
    }
    Ok(())
}

fn one(source: &Path, target: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(source)?;
    let there = fs::symlink_metadata(target).ok();
    if let Some(there) = there {
        if there.is_dir() && meta.is_dir() {
            missing(source, target)?;
        }
        return Ok(());
    }
    if meta.is_dir() {
        DirBuilder::new().mode(0o700).create(target)?;
        missing(source, target)?;
    } else if meta.is_symlink() {
        std::os::unix::fs::symlink(fs::read_link(source)?, target)?;
    } else if meta.is_file() {
        let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
        io::copy(&mut File::open(source)?, &mut out)?;
    } else {
        return Ok(());
    }
    std::os::unix::fs::lchown(target, Some(meta.uid()), Some(meta.gid()))?;
    if !meta.is_symlink() {
        fs::set_permissions(target, Permissions::from_mode(meta.mode() & 0o7777))?;
    }
    sys::copy_xattrs(source, target)?;
    sys::set_time(target, meta.mtime(), meta.mtime_nsec())
}

/// Makes a folder and those above it, mode 0755; fine when it is there.
///
/// # Errors
/// The system's.
pub fn folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Makes one folder with an exact mode and owner; one that is there is set to them.
///
/// # Errors
/// The system's.
pub fn folder_of(path: &Path, mode: u32, owner: (u32, u32)) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    std::os::unix::fs::chown(path, Some(owner.0), Some(owner.1))
}

/// Writes a file that did not exist or is replaced, with an exact mode and owner from its first byte on.
///
/// # Errors
/// The system's.
pub fn file(path: &Path, bytes: &[u8], mode: u32, owner: (u32, u32)) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    out.write_all(bytes)?;
    std::os::unix::fs::fchown(&out, Some(owner.0), Some(owner.1))?;
    out.set_permissions(Permissions::from_mode(mode))
}

/// Replaces a file so that after a power cut either the old or the new one is there.
///
/// # Errors
/// The system's.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = path.with_extension("new");
    file(&temporary, bytes, mode, (0, 0))?;
    File::open(&temporary)?.sync_all()?;
    fs::rename(&temporary, path)?;
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    File::open(parent)?.sync_all()
}
