//! The initrd of a disk: our static program with the modules of usual machines, or dracut's.
//!
//! Ours is a plain cpio archive, so that the kernel does not spend time on unpacking it:
//!
//! ```text
//! /init                 the static program
//! /modules/NAME.ko…     those every machine loads are inflated, others as the kernel's package has them
//! /modules.list         `NAME FILE DEPENDENCIES` of each
//! /modules.alias        which hardware asks for which
//! ```

use std::io::Read as _;

use anyhow::{Context as _, Result};

use super::host::Host;
use super::modules::modules;
use crate::disk::cpio;
use crate::disk::init::{self, INIT};
use crate::disk::tree::Tree;

/// The bytes of an initrd.
#[derive(Debug, Clone)]
pub struct Made {
    pub bytes: Vec<u8>,
    /// Modules of the list that this kernel does not have.
    pub missing: Vec<String>,
}

/// The initrd that `host` asks for.
pub fn initrd(tree: &Tree, host: &Host) -> Result<Made> {
    if let Some(bytes) = &host.initramfs {
        return Ok(Made { bytes: bytes.clone(), missing: Vec::new() });
    }
    let folder = format!("usr/lib/modules/{}", host.kernel);
    let text = |name: &str| -> Result<String> {
        let bytes = tree.read(format!("{folder}/{name}").as_bytes())?;
        Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
    };
    let (dependencies, aliases, built_in) = (text("modules.dep")?, text("modules.alias")?, text("modules.builtin")?);
    // Wishes of the pipeline file must be there; of our list, what this kernel has.
    let mut wanted: Vec<&str> = init::modules().collect();
    wanted.extend(host.file.modules.iter().map(String::as_str));
    let found = modules(wanted, &dependencies, &aliases, &built_in);
    let wished = |name: &&String| host.file.modules.iter().any(|wish| wish.replace('-', "_") == **name);
    let missing = found.missing.iter().filter(wished).cloned().collect();
    let mut archive = cpio::Archive::new(Vec::new(), 0);
    for folder in [&b"dev"[..], b"modules", b"proc", b"run", b"sys", b"sysroot"] {
        archive.folder(folder, 0o755)?;
    }
    archive.character_device(b"dev/console", 0o600, 5, 1)?;
    archive.file(b"init", 0o755, INIT)?;
    archive.file(b"modules.alias", 0o644, found.aliases.as_bytes())?;
    archive.file(b"modules.list", 0o644, found.list.as_bytes())?;
    for module in &found.files {
        let path = format!("{folder}/{}", module.path);
        let bytes = tree.read(path.as_bytes())?.with_context(|| format!("the tree has no `/{path}`, which modules.dep names"))?;
        let bytes = if module.inflated { inflate(&path, bytes)? } else { bytes };
        archive.file(format!("modules/{}", module.name).as_bytes(), 0o644, &bytes)?;
    }
    Ok(Made { bytes: archive.finish()?, missing })
}

/// The plain bytes of a module, by the ending of its name (kmod: xz, zstd, gzip).
fn inflate(path: &str, bytes: Vec<u8>) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    let read = match path.rsplit('.').next() {
        Some("xz") => liblzma::read::XzDecoder::new(&bytes[..]).read_to_end(&mut plain),
        Some("zst") => zstd::stream::copy_decode(&bytes[..], &mut plain).map(|()| 0),
        Some("gz") => flate2::read::MultiGzDecoder::new(&bytes[..]).read_to_end(&mut plain),
        _ => return Ok(bytes),
    };
    read.with_context(|| format!("cannot inflate `/{path}` of the tree"))?;
    Ok(plain)
}
