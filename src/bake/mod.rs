//! From a host tree to a bootable disk.

pub mod contents;
pub mod host;
pub mod plan;
