//! Small jobs on files: copies of trees, safe replacement, private folders.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use super::sys;

/// What a copy is called until it is whole and on the disk.
const UNFINISHED: &str = ".pipeline-unfinished.";

/// Copies every entry of the folder `from` that `to` does not have; never overwrites, never goes
/// through a symbolic link, leaves out devices and sockets. Owner, mode, times and extended attributes are kept.
///
/// After a power cut each entry is there as a whole or not at all, and a second run brings the rest: copies are made under
/// another name, brought to the disk together, and then renamed.
///
/// # Errors
/// The first failure, with its path.
pub fn missing(from: &Path, to: &Path) -> io::Result<()> {
    let mut made = Vec::new();
    collect(from, to, &mut made)?;
    sys::sync_file_system(&File::open(to)?)?;
    for (temporary, target) in made {
        fs::rename(&temporary, &target).map_err(|error| say(&target, error))?;
    }
    Ok(())
}

fn say(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Copies what is missing in `to` under names that say so; those and the right ones go to `made`.
fn collect(from: &Path, to: &Path, made: &mut Vec<(PathBuf, PathBuf)>) -> io::Result<()> {
    for entry in fs::read_dir(from).map_err(|error| say(from, error))? {
        let source = entry.map_err(|error| say(from, error))?.path();
        let Some(name) = source.file_name() else { continue };
        let target = to.join(name);
        let kind = fs::symlink_metadata(&source).map_err(|error| say(&source, error))?.file_type();
        match fs::symlink_metadata(&target) {
            Ok(there) if there.is_dir() && kind.is_dir() => collect(&source, &target, made)?,
            Ok(_) => {}
            Err(_) => {
                let mut unfinished = std::ffi::OsString::from(UNFINISHED);
                unfinished.push(name);
                let temporary = to.join(unfinished);
                remove(&temporary).and_then(|()| whole(&source, &temporary)).map_err(|error| say(&source, error))?;
                if fs::symlink_metadata(&temporary).is_ok() {
                    made.push((temporary, target));
                }
            }
        }
    }
    Ok(())
}

/// What an earlier attempt has left.
fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => Ok(()),
    }
}

/// Copies `source` with everything below it to `target`, which is not there.
fn whole(source: &Path, target: &Path) -> io::Result<()> {
    let meta = fs::symlink_metadata(source)?;
    if meta.is_dir() {
        DirBuilder::new().mode(0o700).create(target)?;
        for entry in fs::read_dir(source)? {
            let entry = entry?;
            whole(&entry.path(), &target.join(entry.file_name())).map_err(|error| say(&entry.path(), error))?;
        }
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
