//! The packages of a host, its kernel, and what is removed from both.

use anyhow::{Context as _, Result};

use super::Folder;
use crate::build::source::scan::{ScanOptions, scan};
use crate::config::types::{Firmware, Host, Initrd, Kernel};
use crate::error::Problem;
use crate::template;

/// What every host has: an init, devices, the network with names, numbers and time, a place to log in,
/// file systems for /var, the boot loader of UEFI.
const ALWAYS: [&str; 15] = [
    "dbus",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "libpam-systemd",
    "linux-sysctl-defaults",
    "netbase",
    "passwd",
    "procps",
    "systemd",
    "systemd-boot-efi",
    "systemd-resolved",
    "systemd-sysv",
    "systemd-timesyncd",
    "udev",
];
/// GRUB's image for BIOS and what puts it together.
const BIOS_TOOLS: [&str; 2] = ["grub-common", "grub-pc-bin"];
const DRACUT_TOOLS: [&str; 3] = ["cpio", "dracut-core", "zstd"];
/// Where the version text of a kernel image is pointed at (Linux boot protocol, `kernel_version`),
/// and what is added to the pointer.
const VERSION_POINTER: (usize, usize) = (0x20e, 0x200);
/// `HdrS` of the boot protocol, at 0x202.
const MAGIC: (usize, &[u8]) = (0x202, b"HdrS");

/// What is installed on the base.
pub fn packages(host: &Host) -> Vec<String> {
    let mut names: Vec<String> = ALWAYS.map(String::from).into();
    names.extend(host.packages.iter().cloned());
    if let Kernel::Package(kernel) = &host.kernel {
        names.push(kernel.clone());
    }
    if host.firewall.is_some() {
        names.push("nftables".into());
    }
    if host.timezone.is_some() {
        names.push("tzdata".into());
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// Whether the disk boots by BIOS.
pub fn is_for_bios(host: &Host) -> bool {
    host.disk.firmware.is_empty() || host.disk.firmware.contains(&Firmware::Bios)
}

/// What the step `host` needs beside that; none: no step for it.
pub fn tools(host: &Host) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    if is_for_bios(host) {
        names.extend(BIOS_TOOLS.map(String::from));
    }
    if host.initrd == Initrd::Dracut {
        names.extend(DRACUT_TOOLS.map(String::from));
    }
    names
}

/// What the step `host-packages` is given.
pub fn folder(host: &Host) -> Result<Folder> {
    let mut folder = Folder::default();
    folder.add("prepare.sh", "script prepare.sh", template::text("host/prepare.sh")?);
    folder.add("finish.sh", "script finish.sh", template::text("host/finish.sh")?);
    folder.add("modules.txt", "list of modules", template::text("host/modules.txt")?);
    folder.add("removed.txt", "list of removals", template::text("host/removed.txt")?);
    let mut names = host.modules.clone();
    if host.all_modules {
        names.insert(0, "all".into());
    }
    folder.add("modules", "host modules", names.iter().map(|name| format!("{name}\n")).collect::<String>());
    if let Kernel::Files { image, modules } = &host.kernel {
        let bytes = fs_err::read(image)?;
        let release = release(&bytes).with_context(|| {
            Problem::usage(format!("`{}` is not a kernel image", image.display()))
                .hint("`host.kernel.path` is a bzImage for x86-64")
        })?;
        folder.add("kernel/release", "kernel release", release);
        folder.add("kernel/vmlinuz", "kernel image", bytes);
        if let Some(modules) = modules {
            let digest = scan(modules, &ScanOptions { gitignore: false, cache: None })?.listing.digest();
            folder.mounts.push(("kernel/modules".into(), modules.clone(), digest));
        }
    }
    Ok(folder)
}

/// The release of a kernel image: the first word of the version text its header points at.
fn release(bytes: &[u8]) -> Result<String> {
    let (at, magic) = MAGIC;
    anyhow::ensure!(bytes.get(at..at + magic.len()) == Some(magic), "it has no header of the Linux boot protocol");
    let (at, offset) = VERSION_POINTER;
    let pointer = bytes.get(at..at + 2).map(|bytes| usize::from(u16::from_le_bytes([bytes[0], bytes[1]])));
    let text = pointer.filter(|pointer| *pointer > 0).and_then(|pointer| bytes.get(pointer + offset..));
    let word = text.and_then(|text| text.split(|byte| *byte == 0 || *byte == b' ').next()).unwrap_or_default();
    let word = std::str::from_utf8(word).unwrap_or_default();
    let plain = |c: char| c.is_ascii_alphanumeric() || "+-._~".contains(c);
    anyhow::ensure!(!word.is_empty() && word.len() < 65 && word.chars().all(plain), "its header names no release");
    Ok(word.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_of_a_kernel_image() {
        let mut image = vec![0; 0x1000];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x20e..0x210].copy_from_slice(&0x600u16.to_le_bytes());
        image[0x800..0x81b].copy_from_slice(b"6.12.1-test (me@here) #1 x\0");
        assert_eq!(release(&image).unwrap(), "6.12.1-test");
        image[0x800] = b'/';
        assert!(release(&image).is_err());
        image[0x202] = 0;
        assert!(release(&image).is_err());
        assert!(release(b"short").is_err());
    }

    /// Every line of the lists says what is lost, and no line is there twice.
    #[test]
    fn lists_are_whole() {
        for name in ["host/removed.txt", "host/masked.txt"] {
            let lines: Vec<&str> =
                template::text(name).unwrap().lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
            for line in &lines {
                let (what, lost) = line.split_once(" | ").unwrap_or_else(|| panic!("{name}: {line}"));
                assert!(!what.contains(' ') && !lost.is_empty(), "{name}: {line}");
            }
            let unique: std::collections::BTreeSet<_> = lines.iter().collect();
            assert_eq!(unique.len(), lines.len(), "{name}");
        }
    }
}
