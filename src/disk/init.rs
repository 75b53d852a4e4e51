//! The static program of a host: process 1 of the initrd, watcher, blesser and guest agent in one file.
//!
//! Its sources are in `init/`; `build.rs` compiles them into a static binary whose bytes do not depend on
//! where it was compiled, so that its digest can stand in the key of a disk.

use std::sync::LazyLock;

use crate::oci::digest::Digest;

/// The program (ELF, x86-64, static). Bake puts it into the initrd as `/init`, the host step into the tree as
/// `/usr/lib/pipeline/init`.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pipeline-init"));

/// The names of the kernel modules the initrd needs, in the order of loading by name, with comments; see [`modules`].
const MODULES: &str = include_str!("../../init/modules.txt");

/// Digest of [`INIT`].
pub fn digest() -> Digest {
    static DIGEST: LazyLock<Digest> = LazyLock::new(|| Digest::of(INIT));
    *DIGEST
}

/// The kernel modules of the initrd, with `_` in their names; what they depend on is not among them.
pub fn modules() -> impl Iterator<Item = &'static str> {
    MODULES.lines().map(|line| line.split('#').next().unwrap_or_default().trim()).filter(|name| !name.is_empty())
}
