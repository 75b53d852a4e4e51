//! What is on the EFI system partition: paths and contents, for both firmwares.
//!
//! ```text
//! /EFI/BOOT/BOOTX64.EFI, /EFI/systemd/systemd-bootx64.efi   systemd-boot
//! /loader/loader.conf
//! /EFI/Linux/pipeline_000001_a.efi     unified kernel image of slot A, already good: no counter
//! /grub/grub.cfg, /grub/grubenv        BIOS: which slot, and its tries
//! /pipeline/a/{vmlinuz,initrd,cmdline.cfg}
//! ```
//! The number in a UKI's name is the generation: systemd-boot starts the highest that is not bad.

use std::collections::BTreeMap;

use crate::disk::grub;

/// A system slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slot {
    A,
    B,
}

impl Slot {
    pub const fn name(self) -> &'static str {
        match self {
            Slot::A => "a",
            Slot::B => "b",
        }
    }
}

/// systemd-boot's own settings: start at once, and nobody edits the command line at the console.
const LOADER_CONF: &str = "timeout 0\neditor no\n";

/// Settings of the loaders: path and content.
pub fn texts(bios: bool) -> BTreeMap<String, String> {
    let mut texts = BTreeMap::from([("/loader/loader.conf".to_string(), LOADER_CONF.to_string())]);
    if bios {
        texts.insert("/grub/grub.cfg".into(), grub::CONFIGURATION.into());
    }
    texts
}

/// Path of the UKI of `slot`; `tries`: `None` when it is good already (systemd, "Automatic Boot
/// Assessment": tries left behind a plus sign).
pub fn uki_path(generation: u32, slot: Slot, tries: Option<u32>) -> String {
    let tries = tries.map(|tries| format!("+{tries}")).unwrap_or_default();
    format!("/EFI/Linux/pipeline_{generation:06}_{}{tries}.efi", slot.name())
}

/// Folder of a slot's files for BIOS.
pub fn slot_folder(slot: Slot) -> String {
    format!("/pipeline/{}", slot.name())
}

/// `cmdline.cfg` of a slot, which GRUB sources.
pub fn cmdline_cfg(cmdline: &str) -> String {
    // In single quotes GRUB takes everything as it is.
    format!("set cmdline='{}'\n", cmdline.replace('\'', r"'\''"))
}

/// The kernel command line of a disk with this root hash.
pub fn cmdline(root_hash: &str, arguments: &[String]) -> String {
    // A panic starts the machine again, so that a slot uses up its tries.
    let mut words = vec![format!("pipeline.roothash={root_hash}"), "panic=5".into()];
    words.extend(["console=tty0", "console=ttyS0,115200", "quiet", "loglevel=4"].map(String::from));
    words.extend(arguments.iter().cloned());
    words.join(" ")
}

/// os-release of the UKI: without versions, so that the generation alone decides the order
/// (UAPI boot loader specification, "Sorting").
pub fn os_release(text: &str) -> String {
    let dropped = ["VERSION", "VERSION_ID", "IMAGE_VERSION", "BUILD_ID", "VERSION_CODENAME"];
    let kept = text.lines().filter(|line| line.split_once('=').is_some_and(|(key, _)| !dropped.contains(&key)));
    let mut text: String = kept.map(|line| format!("{line}\n")).collect();
    for (key, line) in [("ID=", "ID=linux\n"), ("PRETTY_NAME=", "PRETTY_NAME=\"Linux\"\n")] {
        if !text.lines().any(|line| line.starts_with(key)) {
            text.push_str(line);
        }
    }
    text
}

/// `PRETTY_NAME` of os-release.
pub fn pretty_name(text: &str) -> String {
    let value = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    value.map_or_else(|| "Linux".into(), |value| value.trim_matches('"').to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_esp() {
        assert_eq!(uki_path(1, Slot::A, None), "/EFI/Linux/pipeline_000001_a.efi");
        assert_eq!(uki_path(27, Slot::B, Some(3)), "/EFI/Linux/pipeline_000027_b+3.efi");
        assert_eq!(cmdline_cfg("a=b c='d'"), "set cmdline='a=b c='\\''d'\\'''\n");
        let expected = "pipeline.roothash=00 panic=5 console=tty0 console=ttyS0,115200 quiet loglevel=4 x=y";
        assert_eq!(cmdline("00", &["x=y".into()]), expected);
    }

    #[test]
    fn versions_do_not_decide_the_order() {
        let text = "PRETTY_NAME=\"Debian 13\"\nVERSION_ID=13\nVERSION=\"13 (t)\"\nID=debian\nIMAGE_ID=x\n";
        assert_eq!(os_release(text), "PRETTY_NAME=\"Debian 13\"\nID=debian\nIMAGE_ID=x\n");
        assert_eq!(os_release(""), "ID=linux\nPRETTY_NAME=\"Linux\"\n");
        assert_eq!((pretty_name(text), pretty_name("")), ("Debian 13".to_string(), "Linux".to_string()));
    }
}
