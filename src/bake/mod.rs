//! From a host tree to a bootable disk.

pub mod host;
pub mod plan;
