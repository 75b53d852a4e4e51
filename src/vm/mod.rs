//! Virtual machines: disks are booted in QEMU, by people (`boot`) and by tests (`test`).
//!
//! ```text
//! settings ─▶ accelerator (probe) + firmware ─▶ work folder (overlay, variables, credentials)
//!          ─▶ command line (pure) ─▶ Machine: console, QMP, guest commands ─▶ boot | test
//! ```
//! Every machine is *bound* (DESIGN section 7, contract 4): it dies with the thread that started it,
//! also by SIGKILL. QEMU is reached through socket pairs it inherits: no path, no name in a folder,
//! nobody else can connect, and its end is seen at once.

pub mod accelerator;
pub mod agent;
pub mod bell;
pub mod boot;
pub mod command;
pub mod console;
pub mod disk;
pub mod firmware;
pub mod http;
pub mod machine;
pub mod qmp;
pub mod settings;
pub mod test;
pub mod work;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use anyhow::Result;

use crate::cmd;
use crate::error::Problem;

/// Asked often by everything that waits: whether to stop (a signal came).
pub type Stop<'a> = &'a (dyn Fn() -> bool + Sync);

/// The programs of QEMU.
#[derive(Debug, Clone)]
pub struct Tools {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    path: OsString,
}

impl Tools {
    /// Looks on `path`, the value of `PATH`.
    ///
    /// # Errors
    /// There is no `qemu-system-x86_64`.
    pub fn find(path: &OsStr) -> Result<Self> {
        let qemu = cmd::find("qemu-system-x86_64", path).ok_or_else(|| {
            Problem::failed("`qemu-system-x86_64` is not installed").hint(
                "install QEMU: Debian and Ubuntu `apt install qemu-system-x86`, Fedora `dnf install qemu-system-x86-core`, \
                 Arch `pacman -S qemu-system-x86`, openSUSE `zypper install qemu-x86`",
            )
        })?;
        Ok(Self { qemu, path: path.into() })
    }

    /// `qemu-img` or `qemu-io`.
    ///
    /// # Errors
    /// It is not installed.
    pub fn utility(&self, name: &str) -> Result<PathBuf> {
        cmd::find(name, &self.path).ok_or_else(|| {
            Problem::failed(format!("`{name}` is not installed"))
                .hint(
                    "install QEMU's disk tools: Debian and Ubuntu `apt install qemu-utils`, Fedora `dnf install qemu-img`, \
                     Arch `pacman -S qemu-img`, openSUSE `zypper install qemu-tools`",
                )
                .into()
        })
    }

    /// Any other program, `None` when it is not installed.
    pub fn other(&self, name: &str) -> Option<PathBuf> {
        cmd::find(name, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error;

    #[test]
    fn missing_programs_are_named_with_their_package() {
        let empty = tempfile::tempdir().unwrap();
        // The system folders are always searched, and these programs are not in them.
        let error = Tools::find(empty.path().as_os_str()).unwrap_err();
        assert_eq!(error.to_string(), "`qemu-system-x86_64` is not installed");
        assert!(error::hints(&error)[0].contains("apt install qemu-system-x86"));
        let tools = Tools { qemu: PathBuf::new(), path: empty.path().into() };
        let error = tools.utility("qemu-img").unwrap_err();
        assert_eq!(error.to_string(), "`qemu-img` is not installed");
        assert!(error::hints(&error)[0].contains("apt install qemu-utils"));
    }
}
