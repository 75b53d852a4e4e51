//! The nouns of a bootable disk, one file each: every one writes one format.

pub mod init;
pub mod tree;
