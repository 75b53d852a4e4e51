//! The static program of a host (`init/`), embedded.

/// The program, an ELF executable without shared libraries.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pipeline-init"));
/// The modules of the initrd: one name a line, `#` starts a comment.
pub const MODULES: &str = include_str!("../../init/modules.txt");
