//! The folder of one machine: overlays, firmware variables, credentials, keys.
//!
//! ```text
//! BASE/.lock          held while a folder is made and while leftovers are swept
//! BASE/PID-XXXXXX/    0700
//!   lock              held (flock) as long as the machine's owner lives
//! ```
//! The kernel releases the locks of a killed process, so a folder whose lock is free belongs to nobody and
//! the next machine's start removes it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::artifact::store::{Hold, Lock};
use crate::error::Problem;

/// A folder, removed when this is dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    _lock: Lock,
}

impl Folder {
    /// Makes a folder below `base` and removes what killed processes left there.
    pub fn take(base: &Path) -> Result<Self> {
        fs_err::create_dir_all(base)?;
        let _alone = Lock::wait(&base.join(".lock"), Hold::Exclusive)?;
        sweep(base)?;
        let path = tempfile::Builder::new()
            .prefix(&format!("{}-", std::process::id()))
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir_in(base)
            .with_context(|| Problem::failed(format!("cannot make a folder for the machine in `{}`", base.display())))?
            .keep();
        let lock = Lock::wait(&path.join("lock"), Hold::Exclusive)?;
        Ok(Self { path, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file only its owner can read.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let path = self.path.join(name);
        let mut options = fs_err::OpenOptions::new();
        options.options_mut().mode(0o600);
        options.write(true).create(true).truncate(true).open(&path)?.write_all(bytes)?;
        Ok(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left is swept by the next machine.
        let _ = fs_err::remove_dir_all(&self.path);
    }
}

/// Removes the folders of processes that are gone; the caller holds `.lock`.
fn sweep(base: &Path) -> Result<()> {
    for entry in fs_err::read_dir(base)? {
        let path = entry?.path();
        if !path.is_dir() {
            continue;
        }
        // Gone in the meantime: its owner removed it.
        let Ok(Some(_free)) = Lock::try_now(&path.join("lock"), Hold::Exclusive) else { continue };
        match fs_err::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_lives_as_long_as_its_owner_and_a_dead_ones_is_swept() {
        use std::os::unix::fs::PermissionsExt as _;
        let base = tempfile::tempdir().unwrap();
        let left = base.path().join("1-killed");
        fs_err::create_dir_all(left.join("deep")).unwrap();
        fs_err::write(left.join("lock"), "").unwrap();
        let first = Folder::take(base.path()).unwrap();
        assert!(!left.exists());
        assert_eq!(first.path().metadata().unwrap().permissions().mode() & 0o777, 0o700);
        let secret = first.write("secret", b"s").unwrap();
        assert_eq!(secret.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let second = Folder::take(base.path()).unwrap();
        assert!(secret.exists(), "a folder in use was swept");
        let gone = first.path().to_owned();
        drop(first);
        assert!(!gone.exists() && second.path().exists());
    }
}
