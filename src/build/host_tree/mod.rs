//! The steps that make a machine: what goes into each, as values.
//!
//! ```text
//! base             shared with the application image
//! host-packages    systemd, kernel, `host.packages`; modules and files of the written lists removed
//! host-tools       GRUB's and dracut's tools; never in the image
//! host             users, files, units, boot files: templates/host
//! app-NAME         one layer per app: its image, merged, below /usr/lib/pipeline/apps/NAME
//! ```
//! [`packages`] and [`configuration`] give the folder a step sees at [`FOLDER`], [`apps`] the layer
//! of an app, [`resolve`] reads what they need. Nothing here runs a step; [`super::steps`] does.

pub mod apps;
pub mod configuration;
pub mod packages;
pub mod resolve;

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::plan::FileInput;
use crate::oci::digest::Digest;

/// Where a step of a host finds its lists and scripts.
pub const FOLDER: &str = "/run/pipeline/host";

/// What a step of a host is given: files in one folder, and folders of this machine mounted there.
#[derive(Debug, Clone, Default)]
pub struct Folder {
    /// Sorted by name when it is finished.
    pub files: Vec<FolderFile>,
    /// Name below the folder, folder of this machine, digest of its content.
    pub mounts: Vec<(String, PathBuf, Digest)>,
}

/// A file of a [`Folder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderFile {
    /// From the folder.
    pub name: String,
    pub bytes: Vec<u8>,
    /// How it is called in a key, and to people: `file /etc/motd`.
    pub label: String,
}

impl Folder {
    /// Adds a file; `label` names it for people.
    pub fn add(&mut self, name: impl Into<String>, label: impl Into<String>, bytes: impl Into<Vec<u8>>) {
        self.files.push(FolderFile { name: name.into(), label: label.into(), bytes: bytes.into() });
    }

    /// What of it goes into a key.
    pub fn inputs(&self) -> Vec<FileInput> {
        let files = self.files.iter().map(|file| FileInput { name: file.label.clone(), digest: Digest::of(&file.bytes) });
        let mounts = self.mounts.iter().map(|(name, _, digest)| FileInput { name: format!("folder {name}"), digest: *digest });
        files.chain(mounts).collect()
    }

    /// Writes it to `dir`, which is made. Everything may be executed.
    pub fn write(&self, dir: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        fs_err::create_dir_all(dir)?;
        for file in &self.files {
            let path = dir.join(&file.name);
            if let Some(parent) = path.parent() {
                fs_err::create_dir_all(parent)?;
            }
            fs_err::write(&path, &file.bytes)?;
            fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
        }
        for (name, ..) in &self.mounts {
            fs_err::create_dir_all(dir.join(name))?;
        }
        // Whatever the umask: root of the namespace is not the owner everywhere.
        open_folders(dir)
    }
}

fn open_folders(dir: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            open_folders(&entry.path())?;
        }
    }
    Ok(())
}

/// Everything that was read for the machine of a pipeline.
#[derive(Debug)]
pub struct Machine {
    /// Of the step `host-packages`.
    pub packages: Folder,
    /// Of the step `host`.
    pub configuration: Folder,
    /// In the order of their names.
    pub apps: Vec<apps::AppInput>,
}
