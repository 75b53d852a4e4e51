//! Where UEFI firmware (OVMF, the x86-64 build of EDK II) lies on this machine.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::error::Problem;

/// Pairs of code and variables in the places of the distributions, best first: 4 MiB before 2 MiB builds,
/// never one that enforces Secure Boot with the vendor's keys.
const SPLIT: [(&str, &str); 11] = [
    // Debian, Ubuntu: ovmf
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    // Fedora, RHEL: edk2-ovmf
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf-4m/OVMF_CODE.fd", "/usr/share/edk2/ovmf-4m/OVMF_VARS.fd"),
    // Arch: edk2-ovmf
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/edk2-ovmf/x64/OVMF_CODE.fd", "/usr/share/edk2-ovmf/x64/OVMF_VARS.fd"),
    // openSUSE: qemu-ovmf-x86_64
    ("/usr/share/qemu/ovmf-x86_64-4m-code.bin", "/usr/share/qemu/ovmf-x86_64-4m-vars.bin"),
    ("/usr/share/qemu/ovmf-x86_64-code.bin", "/usr/share/qemu/ovmf-x86_64-vars.bin"),
    // Gentoo, Alpine
    ("/usr/share/edk2/OvmfX64/OVMF_CODE.fd", "/usr/share/edk2/OvmfX64/OVMF_VARS.fd"),
    // QEMU's own copy
    ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
    ("/usr/local/share/qemu/edk2-x86_64-code.fd", "/usr/local/share/qemu/edk2-i386-vars.fd"),
];
/// QEMU's own copy beside a QEMU outside `/usr` (NixOS, Homebrew), relative to the folder that holds `bin`.
const BESIDE: (&str, &str) = ("share/qemu/edk2-x86_64-code.fd", "share/qemu/edk2-i386-vars.fd");
/// Code and variables in one file.
const WHOLE: [&str; 3] = ["/usr/share/ovmf/OVMF.fd", "/usr/share/qemu/OVMF.fd", "/usr/share/ovmf/x64/OVMF.fd"];

/// UEFI firmware.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Files {
    /// Code, never written, and a template of the variables, of which each machine has a copy.
    Split { code: PathBuf, variables: PathBuf },
    /// One file; variables are forgotten when the machine is switched off.
    Whole(PathBuf),
}

impl Files {
    /// The file that names the firmware in messages.
    pub fn path(&self) -> &Path {
        match self {
            Files::Split { code, .. } => code,
            Files::Whole(path) => path,
        }
    }
}

/// Finds OVMF for the QEMU program `qemu`.
///
/// # Errors
/// None of the usual places has it; the hint names the package.
pub fn find(qemu: &Path) -> Result<Files> {
    let qemu = fs_err::canonicalize(qemu).unwrap_or_else(|_| qemu.into());
    choose(&qemu, &|path| path.is_file()).ok_or_else(|| {
        Problem::failed("there is no UEFI firmware (OVMF) for QEMU on this machine")
            .hint(
                "install it: Debian and Ubuntu `apt install ovmf`, Fedora `dnf install edk2-ovmf`, Arch `pacman -S edk2-ovmf`, \
                 openSUSE `zypper install qemu-ovmf-x86_64`",
            )
            .hint("with `--bios` the disk is started by SeaBIOS, which is part of QEMU")
            .into()
    })
}

fn choose(qemu: &Path, exists: &dyn Fn(&Path) -> bool) -> Option<Files> {
    let pair =
        |code: PathBuf, variables: PathBuf| (exists(&code) && exists(&variables)).then_some(Files::Split { code, variables });
    let prefix = qemu.parent().and_then(Path::parent).unwrap_or(Path::new("/usr"));
    SPLIT
        .iter()
        .find_map(|(code, variables)| pair(code.into(), variables.into()))
        .or_else(|| pair(prefix.join(BESIDE.0), prefix.join(BESIDE.1)))
        .or_else(|| WHOLE.iter().map(PathBuf::from).find(|path| exists(path)).map(Files::Whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_places() {
        let cases: [(&[&str], Option<&str>); 6] = [
            (
                &["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/ovmf/OVMF.fd"],
                Some("/usr/share/OVMF/OVMF_CODE_4M.fd"),
            ),
            // Code without variables is no firmware.
            (&["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/ovmf/OVMF.fd"], Some("/usr/share/ovmf/OVMF.fd")),
            (
                &["/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"],
                Some("/usr/share/edk2/x64/OVMF_CODE.4m.fd"),
            ),
            (
                &["/nix/store/q/share/qemu/edk2-x86_64-code.fd", "/nix/store/q/share/qemu/edk2-i386-vars.fd"],
                Some("/nix/store/q/share/qemu/edk2-x86_64-code.fd"),
            ),
            (&["/usr/share/OVMF/OVMF_CODE.secboot.fd"], None),
            (&[], None),
        ];
        for (there, expected) in cases {
            let found = choose(Path::new("/nix/store/q/bin/qemu-system-x86_64"), &|path| {
                there.iter().any(|name| path == Path::new(name))
            });
            assert_eq!(found.as_ref().map(Files::path), expected.map(Path::new), "{there:?}");
        }
    }
}
