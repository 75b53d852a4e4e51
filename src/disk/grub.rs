//! GRUB for BIOS without `grub-install`: boot code into the protective record, the core image
//! into its partition, and the environment block with the try counts.
//!
//! `boot.img` and `core.img` come ready-made; what `grub-bios-setup` would write into them is
//! written here (GRUB's `include/grub/i386/pc/boot.h` and `include/grub/offsets.h`):
//!
//! ```text
//! boot.img  0x05c  8  sector of core.img
//!           0x064  1  boot drive, 0xff: the one the BIOS names
//!           0x066  2  two NOPs: the BIOS is believed
//! core.img  0x1f4  8  sector of the rest of it, which follows its first
//!           0x1fc  2  number of sectors of the rest
//!           0x1fe  2  segment the rest is loaded to, as it is
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::table::SECTOR;
use crate::error::Problem;

/// The configuration of every host, for `/grub/grub.cfg` of the ESP.
pub const CONFIGURATION: &str = include_str!("../../templates/host/grub.cfg");

/// Arguments of `grub-mkimage` for the core image [`CONFIGURATION`] needs, the output file (`-o`) aside.
/// The prefix without a disk is the disk the BIOS has started from, so no other disk with the
/// same files can come between.
pub const CORE_ARGUMENTS: [&str; 20] = [
    "-O",
    "i386-pc",
    "-p",
    "(,gpt2)/grub",
    "biosdisk",
    "part_gpt",
    "fat",
    "configfile",
    "linux",
    "loadenv",
    "test",
    "echo",
    "serial",
    "terminal",
    "reboot",
    "halt",
    "normal",
    "minicmd",
    "sleep",
    "eval",
];

/// Bytes of the protective record that are boot code; what follows is the disk's signature and table.
const BOOT_CODE: usize = 440;
/// Bytes of an environment block.
pub const ENVIRONMENT_BYTES: usize = 1024;
/// First line of an environment block.
const ENVIRONMENT_HEADER: &str = "# GRUB Environment Block\n";

/// Boot code for the first sector, with the core image at sector `core`.
///
/// # Errors
/// When `boot_image` is not GRUB's boot.img.
pub fn boot_code(boot_image: &[u8], core: u64) -> Result<[u8; BOOT_CODE], Problem> {
    if boot_image.len() != SECTOR as usize || boot_image[510..] != [0x55, 0xaa] || boot_image[0x66..0x68] != [0xeb, 0x05] {
        return Err(Problem::failed("GRUB's boot.img is not one of GRUB 2").hint("take it from the package grub-pc-bin"));
    }
    let mut code = [0; BOOT_CODE];
    code.copy_from_slice(&boot_image[..BOOT_CODE]);
    code[0x5c..0x64].copy_from_slice(&core.to_le_bytes());
    code[0x64] = 0xff;
    code[0x66..0x68].copy_from_slice(&[0x90, 0x90]);
    Ok(code)
}

/// The core image as it is at sector `start` of a partition of `sectors` sectors.
///
/// # Errors
/// When it is larger than the partition, or is not one for i386-pc.
pub fn core(core_image: &[u8], start: u64, sectors: u64) -> Result<Vec<u8>, Problem> {
    let used = (core_image.len() as u64).div_ceil(SECTOR);
    if used > sectors {
        let (needed, room) = (core_image.len(), sectors * SECTOR);
        return Err(Problem::failed(format!("GRUB's core.img is {needed} bytes large and its partition {room}"))
            .hint("build it with fewer modules"));
    }
    let rest = u16::try_from(used.saturating_sub(1)).unwrap_or(u16::MAX);
    // The last block list of a core image made for a disk: one run, loaded to segment 0x820.
    if rest == 0 || rest == u16::MAX || core_image[0x1fe..0x200] != [0x20, 0x08] {
        return Err(Problem::failed("GRUB's core.img is not one for BIOS").hint("make it with `grub-mkimage -O i386-pc`"));
    }
    let mut bytes = core_image.to_vec();
    bytes.resize(used as usize * SECTOR as usize, 0);
    bytes[0x1f4..0x1fc].copy_from_slice(&(start + 1).to_le_bytes());
    bytes[0x1fc..0x1fe].copy_from_slice(&rest.to_le_bytes());
    Ok(bytes)
}

/// Puts both onto a disk whose partition for GRUB is `sectors` sectors from `start` on.
///
/// # Errors
/// As [`boot_code`] and [`core`]; when the disk cannot be written.
pub fn install(disk: &File, boot_image: &[u8], core_image: &[u8], start: u64, sectors: u64) -> anyhow::Result<()> {
    let (code, core) = (boot_code(boot_image, start)?, core(core_image, start, sectors)?);
    disk.write_all_at(&core, start * SECTOR)?;
    disk.write_all_at(&code, 0)?;
    Ok(())
}

/// GRUB's variables that outlive a boot (`/grub/grubenv`), in the order they are written in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment(Vec<(String, String)>);

impl Environment {
    /// As a disk is shipped: slot A is good, slot B is empty.
    pub fn shipped() -> Self {
        let mut environment = Self::default();
        for (name, value) in [("order", "a"), ("good_a", "1"), ("tries_a", "0"), ("good_b", "0"), ("tries_b", "0")] {
            environment.set(name, value);
        }
        environment
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn set(&mut self, name: &str, value: &str) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value.into(),
            None => self.0.push((name.into(), value.into())),
        }
    }

    /// # Errors
    /// `InvalidData` when it is not an environment block of 1024 bytes.
    pub fn parse(bytes: &[u8]) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("GRUB's environment block: {what}"));
        if bytes.len() != ENVIRONMENT_BYTES {
            return Err(invalid("it is not 1024 bytes long"));
        }
        let text = std::str::from_utf8(bytes).map_err(|_| invalid("it is not text"))?;
        let mut rest = text.strip_prefix(ENVIRONMENT_HEADER).ok_or_else(|| invalid("its first line is not GRUB's"))?;
        let mut environment = Self::default();
        while !rest.is_empty() {
            let (line, behind) = unescaped_line(rest);
            rest = behind;
            if let Some((name, value)) = line.split_once('=').filter(|(name, _)| !name.starts_with('#')) {
                environment.set(name, value);
            }
        }
        Ok(environment)
    }

    /// Exactly 1024 bytes, which GRUB overwrites in place.
    ///
    /// # Errors
    /// `InvalidInput` when the variables are too long together.
    pub fn render(&self) -> io::Result<Vec<u8>> {
        let mut text = ENVIRONMENT_HEADER.to_string();
        for (name, value) in &self.0 {
            let value = value.replace('\\', "\\\\").replace('\n', "\\\n");
            text.push_str(&format!("{name}={value}\n"));
        }
        if text.len() > ENVIRONMENT_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "GRUB's environment block: the variables need more than 1024 bytes",
            ));
        }
        let mut bytes = text.into_bytes();
        bytes.resize(ENVIRONMENT_BYTES, b'#');
        Ok(bytes)
    }
}

/// The first line without its escapes, and what follows it: a backslash takes the next character
/// as it is, also the end of the line.
fn unescaped_line(text: &str) -> (String, &str) {
    let mut line = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\n' => return (line, &text[at + 1..]),
            '\\' => line.extend(characters.next().map(|(_, next)| next)),
            other => line.push(other),
        }
    }
    (line, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boot_image() -> Vec<u8> {
        let mut image = vec![1; 512];
        image[0x66..0x68].copy_from_slice(&[0xeb, 0x05]);
        image[510..].copy_from_slice(&[0x55, 0xaa]);
        image
    }

    fn core_image(bytes: usize) -> Vec<u8> {
        let mut image = vec![2; bytes];
        image[0x1fc..0x200].copy_from_slice(&[0, 0, 0x20, 0x08]);
        image
    }

    #[test]
    fn images_are_patched() {
        let code = boot_code(&boot_image(), 2048).unwrap();
        assert_eq!((&code[0x5c..0x64], code[0x64], &code[0x66..0x68]), (&[0, 8, 0, 0, 0, 0, 0, 0][..], 0xff, &[0x90, 0x90][..]));
        let core = core(&core_image(160_413), 2048, 2048).unwrap();
        assert_eq!(core.len(), 314 * 512);
        assert_eq!(core[0x1f4..0x200], [1, 8, 0, 0, 0, 0, 0, 0, 0x39, 1, 0x20, 8]);
        assert_eq!(core[160_412..160_415], [2, 0, 0]);
    }

    #[test]
    fn wrong_images_are_refused() {
        assert_eq!(boot_code(&[0; 512], 1).unwrap_err().message, "GRUB's boot.img is not one of GRUB 2");
        let large = core(&core_image((1 << 20) + 1), 2048, 2048).unwrap_err().message;
        assert_eq!(large, "GRUB's core.img is 1048577 bytes large and its partition 1048576");
        for wrong in [vec![0; 4096], vec![], core_image(512)] {
            assert_eq!(core(&wrong, 2048, 2048).unwrap_err().message, "GRUB's core.img is not one for BIOS");
        }
    }

    #[test]
    fn the_boot_code_leaves_the_table_alone() {
        let disk = tempfile::tempfile().unwrap();
        disk.write_all_at(&[7; 512], 0).unwrap();
        install(&disk, &boot_image(), &core_image(2000), 10, 4).unwrap();
        let mut sector = [0; 512];
        disk.read_exact_at(&mut sector, 0).unwrap();
        assert_eq!((sector[0], sector[439], sector[440], sector[511]), (1, 1, 7, 7));
    }

    #[test]
    fn environments_read_back() {
        let mut environment = Environment::shipped();
        environment.set("order", "b a");
        environment.set("odd", "back\\slash and\nline");
        let bytes = environment.render().unwrap();
        assert!(bytes.starts_with(
            b"# GRUB Environment Block\norder=b a\ngood_a=1\ntries_a=0\ngood_b=0\ntries_b=0\nodd=back\\\\slash and\\\nline\n##"
        ));
        assert_eq!((bytes.len(), Environment::parse(&bytes).unwrap()), (1024, environment.clone()));
        environment.set("long", &"x".repeat(1024));
        assert!(environment.render().is_err());
        for (wrong, expected) in [(vec![b'#'; 1024], "its first line is not GRUB's"), (vec![], "it is not 1024 bytes long")] {
            assert_eq!(Environment::parse(&wrong).unwrap_err().to_string(), format!("GRUB's environment block: {expected}"));
        }
    }
}
