//! Writes a [`Tree`] as an EROFS image: uncompressed, blocks of 4 KiB, for Linux 5.16 and newer.
//!
//! ```text
//! block 0        superblock at byte 1024; behind it the root directory's inode
//! blocks …       inodes, each with its extended attributes, and behind them what does not fill a
//!                block: the tail of a file, of a directory, a link's target, or a map of chunks
//! blocks         shared extended attributes
//! blocks …       directories, then files
//! ```
//!
//! [`plan`] decides where everything lies; [`write()`] writes it, in several threads, reading each
//! file once. The image is a pure function of the tree, the previous [`Layout`] and the
//! [`Header`]. With a previous layout the above order holds for a first image only: what is
//! unchanged stays where it was, see [`layout`](self::layout). Files with holes, and those above
//! 1 GiB, are written in chunks.
//!
//! Source of the layouts: the kernel's `fs/erofs/erofs_fs.h`. Not written: compression,
//! deduplicated data, several devices, and what needs Linux 6.15 (48-bit addresses).

use std::fmt;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::disk::tree::{Kind, NodeId, Tree};

mod content;
mod format;
pub mod layout;
mod shape;
mod space;
mod write;
mod xattr;

pub use layout::Layout;
pub use write::{Written, write};

/// Identifies data: the first half of the SHA-256 of it, or, above 1 MiB, of the SHA-256 of its
/// MiBs. Data is what is in whole blocks, filled with zeros. Two different data with the same
/// digest would only get a place that is no use to an update.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 16]);

impl Digest {
    fn of(bytes: &[u8]) -> Self {
        Self::cut(&Sha256::digest(bytes).into())
    }

    fn cut(digest: &[u8; 32]) -> Self {
        let mut half = [0; 16];
        half.copy_from_slice(&digest[..16]);
        Self(half)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        hex::encode(digest.0)
    }
}

impl TryFrom<String> for Digest {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

/// Where everything of an image lies.
#[derive(Debug, Clone)]
pub struct Plan {
    shape: shape::Shape,
    places: layout::Places,
    /// Of each item's data; `None` when there was no previous layout and so no need to read.
    digests: Option<Vec<Option<Digest>>>,
}

/// What of an image is not decided by the tree.
#[derive(Debug, Clone)]
pub struct Header<'a> {
    pub uuid: [u8; 16],
    /// When the image was made, seconds since 1970; shown only.
    pub epoch: i64,
    /// At most 15 bytes.
    pub volume_name: &'a str,
}

/// Where an image is written to.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// Written at positions from `offset` on; it reads as zeros there before.
    pub out: &'a std::fs::File,
    /// Bytes.
    pub offset: u64,
    /// At least one; each holds 2 MiB.
    pub threads: usize,
    /// Sees each block of the image once, in runs of whole blocks up to 2 MiB: number of the
    /// first, bytes. Called in all threads; the runs one thread sees ascend.
    pub on_blocks: &'a (dyn Fn(u64, &[u8]) + Sync),
}

impl fmt::Debug for Target<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target").field("out", self.out).field("offset", &self.offset).finish_non_exhaustive()
    }
}

/// Decides where everything of `tree` goes.
///
/// Only with `previous` are files' contents read, in `threads` threads, to know what is unchanged.
/// Errors name the path of what EROFS cannot hold: names above 255 bytes, empty or with a slash;
/// extended attributes of a kind or size it has no room for; targets of symbolic links above 4095
/// bytes; device numbers above 12 and 20 bits; and a tree above 16 TiB.
pub fn plan(tree: &Tree, previous: Option<&Layout>, threads: usize) -> Result<Plan> {
    let shape = shape::shape(tree)?;
    let digests = match previous {
        Some(_) => Some(write::digest_files(content::Content { tree, shape: &shape }, threads)?),
        None => None,
    };
    let places = layout::place(&shape, previous, digests.as_deref().unwrap_or_default())?;
    Ok(Plan { shape, places, digests })
}

impl Plan {
    /// Blocks of 4096 bytes the image has.
    pub fn blocks(&self) -> u64 {
        self.places.blocks
    }

    /// Inodes the image has: hard links count once.
    pub fn inodes(&self) -> u64 {
        self.shape.items.len() as u64
    }

    /// Digest of all but the contents of files: names, owners, modes, times, attributes, sizes and
    /// places, of the tree the plan was made of. The same with and without a previous layout, if
    /// the places are.
    pub fn digest(&self, tree: &Tree) -> [u8; 32] {
        let mut sum = Sha256::new();
        let mut number = |value: u64| sum.update(value.to_le_bytes());
        number(self.places.blocks);
        number(self.places.area);
        self.places.shared.iter().for_each(|id| number((*id).into()));
        for (index, item) in self.shape.items.iter().enumerate() {
            let node = tree.node(item.node);
            let meta = &node.meta;
            let mut sum_bytes = |bytes: &[u8]| {
                sum.update((bytes.len() as u64).to_le_bytes());
                sum.update(bytes);
            };
            sum_bytes(&item.path);
            sum_bytes(&self.kind_bytes(&node.kind));
            meta.xattrs.iter().for_each(|(name, value)| {
                sum_bytes(name);
                sum_bytes(value);
            });
            let numbers = [
                u64::from(meta.mode) << 32 | u64::from(meta.mtime_nsec),
                u64::from(meta.uid) << 32 | u64::from(meta.gid),
                meta.mtime as u64,
                meta.xattrs.len() as u64,
                item.size,
                item.nlink.into(),
                self.places.nids[index],
                self.places.starts[index],
            ];
            numbers.iter().for_each(|value| sum.update(value.to_le_bytes()));
        }
        sum.finalize().into()
    }

    /// A letter for the kind, and what of it is not a size. Of a directory which name is which
    /// inode, because a second name of a file is no item of its own.
    fn kind_bytes(&self, kind: &Kind) -> Vec<u8> {
        match kind {
            Kind::File(_) => b"f".to_vec(),
            Kind::Directory(names) => {
                let index = |id: &NodeId| self.shape.by_node[id.0 as usize].to_le_bytes();
                let names = names.iter().flat_map(|(name, id)| [&name[..], b"\0", &index(id)].concat());
                b"d".iter().copied().chain(names).collect()
            }
            Kind::Symlink(target) => [b"l", &target[..]].concat(),
            Kind::CharDevice { major, minor } => format!("c{major}:{minor}").into_bytes(),
            Kind::BlockDevice { major, minor } => format!("b{major}:{minor}").into_bytes(),
            Kind::Fifo => b"p".to_vec(),
            Kind::Socket => b"s".to_vec(),
        }
    }
}
