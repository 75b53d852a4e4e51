//! The nouns of a bootable disk, one file each: every one writes one format.

pub mod fat;
pub mod gpt;
pub mod index;
pub mod table;
pub mod tree;
pub mod verity;
