//! From a host tree to a bootable disk.

pub mod contents;
pub mod esp;
pub mod host;
pub mod identity;
pub mod modules;
pub mod plan;
