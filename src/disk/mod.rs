//! The nouns of a bootable disk, one file each: every one writes one format.

pub mod cpio;
pub mod erofs;
pub mod export;
pub mod fat;
pub mod gpt;
pub mod grub;
pub mod index;
pub mod init;
pub mod table;
pub mod tree;
pub mod uki;
pub mod verity;
