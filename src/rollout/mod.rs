//! Brings targets to their release.

pub mod dial;
pub mod shim;
pub mod target;
