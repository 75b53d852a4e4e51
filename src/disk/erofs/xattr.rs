//! Extended attributes: those many inodes have alike, and large ones, are written once.
//!
//! An inode's own body is a header of twelve bytes (`struct erofs_xattr_ibody_header`), the
//! numbers of shared entries, then its own entries (`struct erofs_xattr_entry`: length of the
//! name, number of the prefix, size of the value, name, value, filled to four bytes). A shared
//! entry's number is its position in the shared area divided by four. Name filters (Linux 6.6) and
//! long prefixes (6.4) are not written, as older kernels would not find the attributes.

use std::collections::BTreeMap;

use crate::disk::tree::Meta;

/// An entry is shared when more inodes than this have it, as `mkfs.erofs` does by default.
const SHARED_ABOVE: u32 = 2;
/// … or when it is larger: inode bodies stay small, and more fits than 256 KiB an inode.
const SHARED_FROM_BYTES: usize = 1024;
/// `h_shared_count` has eight bits.
const SHARED_MAX: usize = 255;
/// `i_xattr_icount` has sixteen bits and counts the header and each four bytes after it.
pub const BODY_MAX: u64 = 12 + 4 * (u16::MAX as u64 - 1);
/// `e_value_size` has sixteen bits.
pub const VALUE_MAX: usize = u16::MAX as usize;

/// Prefixes and their `e_name_index`. Those without a final dot are whole names.
const PREFIXES: [(&[u8], u8); 5] =
    [(b"user.", 1), (b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"trusted.", 4), (b"security.", 6)];

/// Encodes one attribute as an entry. The error says what EROFS or the kernel cannot hold.
fn encode(name: &[u8], value: &[u8]) -> Result<Vec<u8>, String> {
    let shown = String::from_utf8_lossy(name);
    let (prefix, index) = PREFIXES
        .iter()
        .find(|(prefix, _)| if prefix.ends_with(b".") { name.starts_with(prefix) } else { name == *prefix })
        .ok_or_else(|| format!("extended attribute `{shown}` is of a kind EROFS cannot hold"))?;
    let rest = &name[prefix.len()..];
    if name.len() > 255 || name.contains(&0) || (rest.is_empty() && prefix.ends_with(b".")) {
        return Err(format!("extended attribute `{shown}` has a name that Linux does not allow"));
    }
    if value.len() > VALUE_MAX {
        let size = value.len();
        return Err(format!("extended attribute `{shown}` has {size} bytes, and EROFS holds at most {VALUE_MAX}"));
    }
    let mut entry = Vec::with_capacity(4 + rest.len() + value.len() + 3);
    entry.extend([rest.len() as u8, *index]);
    entry.extend((value.len() as u16).to_le_bytes());
    entry.extend(rest);
    entry.extend(value);
    entry.resize(entry.len().next_multiple_of(4), 0);
    Ok(entry)
}

/// The shared entries of a tree.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    /// Entries as written, with their place in this order.
    ranks: BTreeMap<Vec<u8>, usize>,
}

impl Pool {
    /// Finds the shared entries among those of all inodes; the names go with the errors.
    pub fn collect<'a>(inodes: impl Iterator<Item = (&'a [u8], &'a Meta)>) -> Result<Self, (Vec<u8>, String)> {
        let mut counts: BTreeMap<Vec<u8>, u32> = BTreeMap::new();
        for (path, meta) in inodes {
            for (name, value) in &meta.xattrs {
                let entry = encode(name, value).map_err(|message| (path.to_vec(), message))?;
                *counts.entry(entry).or_default() += 1;
            }
        }
        let shared = counts.into_iter().filter(|(entry, count)| *count > SHARED_ABOVE || entry.len() > SHARED_FROM_BYTES);
        Ok(Self { ranks: shared.zip(0..).map(|((entry, _), rank)| (entry, rank)).collect() })
    }

    /// The entries in the order of their ranks.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.ranks.keys().map(Vec::as_slice)
    }

    /// The shared entries' ranks and the own entries of one inode, whose attributes
    /// [`Pool::collect`] has seen.
    fn split(&self, meta: &Meta) -> (Vec<usize>, Vec<Vec<u8>>) {
        let (mut shared, mut own) = (Vec::new(), Vec::new());
        for (name, value) in &meta.xattrs {
            let entry = encode(name, value).expect("checked by collect");
            match self.ranks.get(&entry) {
                Some(rank) if shared.len() < SHARED_MAX => shared.push(*rank),
                _ => own.push(entry),
            }
        }
        (shared, own)
    }

    /// Bytes of an inode's body: 0 without attributes, else at least 16, a multiple of four.
    pub fn body_size(&self, meta: &Meta) -> u64 {
        if meta.xattrs.is_empty() {
            return 0;
        }
        let (shared, own) = self.split(meta);
        12 + 4 * shared.len() as u64 + own.iter().map(|entry| entry.len() as u64).sum::<u64>()
    }

    /// An inode's body; `ids` are the shared entries' numbers by rank.
    pub fn body(&self, meta: &Meta, ids: &[u32]) -> Vec<u8> {
        if meta.xattrs.is_empty() {
            return Vec::new();
        }
        let (shared, own) = self.split(meta);
        let mut body = vec![0, 0, 0, 0, shared.len() as u8, 0, 0, 0, 0, 0, 0, 0];
        for rank in shared {
            body.extend(ids[rank].to_le_bytes());
        }
        own.iter().for_each(|entry| body.extend(entry));
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_that_do_not_fit_are_named() {
        let long = [b"user.".as_slice(), &[b'x'; 251]].concat();
        let table: [(&[u8], usize, &str); 7] = [
            (b"user.", 0, "does not allow"),
            (b"user.a\0b", 0, "does not allow"),
            (&long, 0, "does not allow"),
            (b"user.big", 65_536, "`user.big` has 65536 bytes, and EROFS holds at most 65535"),
            (b"system.nfs4_acl", 1, "`system.nfs4_acl` is of a kind EROFS cannot hold"),
            (b"system.posix_acl_accessory", 1, "cannot hold"),
            (b"lustre.lov", 1, "cannot hold"),
        ];
        for (name, size, expected) in table {
            let message = encode(name, &vec![1; size]).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
        assert_eq!(encode(b"security.selinux", b"abc").unwrap(), b"\x07\x06\x03\x00selinuxabc\0\0");
        assert_eq!(encode(b"system.posix_acl_access", b"1234").unwrap(), b"\x00\x02\x04\x001234");
        assert_eq!(encode(&long[..255], &[]).unwrap().len(), 256);
    }

    #[test]
    fn shared_are_the_frequent_and_the_large() {
        let meta = |names: &[(&[u8], usize)]| Meta {
            xattrs: names.iter().map(|(name, size)| (name.to_vec(), vec![7; *size])).collect(),
            ..Meta::default()
        };
        let inodes = [
            meta(&[(b"user.all", 1), (b"user.big", 5000)]),
            meta(&[(b"user.all", 1), (b"user.two", 1)]),
            meta(&[(b"user.all", 1), (b"user.two", 1)]),
            meta(&[]),
        ];
        let pool = Pool::collect(inodes.iter().map(|meta| (&b"x"[..], meta))).unwrap();
        assert_eq!(pool.entries().map(<[u8]>::len).collect::<Vec<_>>(), [8, 5008]);
        assert_eq!(inodes.each_ref().map(|meta| pool.body_size(meta)), [20, 24, 24, 0]);
        assert_eq!(pool.body(&inodes[1], &[9, 11]), b"\0\0\0\0\x01\0\0\0\0\0\0\0\x09\0\0\0\x03\x01\x01\0two\x07");
    }
}
