//! A tree with everything a file system must hold, made through the tree's own functions.

use std::collections::BTreeMap;

use pipeline::disk::tree::{Extent, File, Kind, Meta, Node, NodeId, Source, Tree};

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Bytes that look random and are the same in each run.
pub fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes: Vec<u8> = (0..size.div_ceil(8))
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    bytes.truncate(size);
    bytes
}

pub fn meta(mode: u16) -> Meta {
    Meta { mode, uid: 0, gid: 0, mtime: 1_700_000_000, mtime_nsec: 0, xattrs: BTreeMap::new() }
}

pub fn put(tree: &mut Tree, path: impl AsRef<[u8]>, meta: Meta, kind: Kind) -> NodeId {
    tree.put(path.as_ref(), Node { meta, kind }, &self::meta(0o755))
}

/// A file of `size` bytes with the given parts: offset and content.
pub fn sparse(tree: &mut Tree, size: u64, parts: &[(u64, Vec<u8>)]) -> Kind {
    let extents = parts.iter().map(|(offset, bytes)| {
        let source = tree.add_source(Source::Memory(bytes.as_slice().into()));
        Extent { offset: *offset, length: bytes.len() as u64, source, source_offset: 0 }
    });
    let extents = extents.collect();
    Kind::File(File { size, extents })
}

pub fn file(tree: &mut Tree, path: impl AsRef<[u8]>, bytes: Vec<u8>) -> NodeId {
    let kind = sparse(tree, bytes.len() as u64, &[(0, bytes)]);
    put(tree, path, meta(0o644), kind)
}

/// The kernel's form of a POSIX ACL (`include/uapi/linux/posix_acl_xattr.h`): version 2, then tag,
/// permissions and id of each entry.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// Owner rwx, user 1000 rw, group r-x, group 100000 r, mask rwx, others r.
fn example_acl() -> Vec<u8> {
    acl(&[(1, 7, u32::MAX), (2, 6, 1000), (4, 5, u32::MAX), (8, 4, 100_000), (16, 7, u32::MAX), (32, 4, u32::MAX)])
}

/// cap_net_bind_service, permitted and effective (`VFS_CAP_REVISION_2`).
fn capability() -> Vec<u8> {
    [0x0200_0001u32, 1 << 10, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Everything at once; about 30 MiB of image. `entries` names are in one folder, and one file has `links`.
pub fn everything(entries: u32, links: u32) -> Tree {
    let mut tree = Tree::default();
    tree.node_mut(Tree::ROOT).meta = meta(0o755);
    sizes(&mut tree);
    holes(&mut tree);
    names(&mut tree, entries, links);
    attributes(&mut tree);
    kinds(&mut tree);
    dates(&mut tree);
    tree
}

/// Files around each border of blocks, tails and segments.
fn sizes(tree: &mut Tree) {
    const M: usize = MIB as usize;
    for size in [0, 1, 31, 4031, 4032, 4033, 4095, 4096, 4097, 8128, 8191, 8192, 65_536, M - 1, M, M + 1, 3 * M + 4033] {
        file(tree, format!("sizes/{size}"), noise(size, size as u64));
    }
    for (index, size) in (0..300).zip(noise(600, 9).chunks(2).map(|two| usize::from(two[0]) << 5 | usize::from(two[1]))) {
        file(tree, format!("sizes/many/{index}"), noise(size, index));
    }
}

fn holes(tree: &mut Tree) {
    let part = |offset, size| (offset, noise(size, offset ^ size as u64));
    let table = [
        ("all", 5 * GIB, vec![]),
        ("ends", 5 * GIB, vec![part(0, 10), part(5 * GIB - 7, 7)]),
        ("beyond-4-gib", 5 * GIB + 123, vec![part(4 * GIB - 3, 8000), part(4 * GIB + 5 * MIB + 1, 3 * MIB as usize)]),
        ("beginning", 3 * MIB, vec![part(2 * MIB, MIB as usize)]),
        ("end", 3 * MIB, vec![part(0, 5000)]),
        ("middle", 40_000, vec![part(0, 4096), part(36_000, 4000)]),
        ("small", 9000, vec![part(10, 100), part(5000, 1), part(8999, 1)]),
        ("one-byte", 1, vec![]),
        ("block", 4096, vec![]),
    ];
    for (name, size, parts) in table {
        let kind = sparse(tree, size, &parts);
        put(tree, format!("holes/{name}"), meta(0o600), kind);
    }
}

fn names(tree: &mut Tree, entries: u32, links: u32) {
    let empty = |tree: &mut Tree, path: &[u8]| put(tree, path, meta(0o644), Kind::File(File::default()));
    for index in 0..entries {
        // Of very different lengths, and none sorted as it is counted.
        let name = format!("{:x}-{}", index.wrapping_mul(0x9E37_79B9), "n".repeat(index as usize % 40));
        empty(tree, format!("names/many/{name}").as_bytes());
    }
    for name in [
        &b"\xff\xfe\x80"[..],
        b"caf\xe9",
        "caf\u{e9} \u{1f4be}".as_bytes(),
        b"a\nb\t\x01",
        b"-",
        b"!",
        b"...",
        b"..x",
        b".a",
        b"%41",
    ] {
        empty(tree, &[b"names/odd/", name].concat());
    }
    for length in [244, 245, 254, 255] {
        for first in b'a'..=b't' {
            empty(tree, &[b"names/long/", &vec![first; length][..]].concat());
            put(tree, [b"names/long-folders/", &vec![first; length][..]].concat(), meta(0o755), Kind::Directory(BTreeMap::new()));
        }
    }
    let deep: String = (0..60).map(|level| format!("/{level}")).collect();
    file(tree, format!("names/deep{deep}/file"), b"deep".to_vec());
    let linked = file(tree, "links/0", noise(5000, 1));
    (1..links).for_each(|index| tree.link(format!("links/{index}").as_bytes(), linked, &meta(0o755)));
}

fn attributes(tree: &mut Tree) {
    let with = |mode, xattrs: &[(&str, Vec<u8>)]| Meta {
        xattrs: xattrs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.clone())).collect(),
        ..meta(mode)
    };
    let name = format!("user.{}", "x".repeat(250));
    let table = [
        ("capability", with(0o755, &[("security.capability", capability())])),
        ("acl", with(0o774, &[("system.posix_acl_access", example_acl())])),
        (
            "all",
            with(0o644, &[("user.a", b"1".to_vec()), ("trusted.b", b"2".to_vec()), ("security.c", vec![]), (&name, vec![0; 3])]),
        ),
        ("large", with(0o644, &[("user.large", noise(65_535, 1)), ("trusted.large", noise(65_534, 2))])),
        ("twice", with(0o644, &[("user.large", noise(65_535, 1))])),
        ("medium", with(0o644, &[("user.1", noise(900, 3)), ("user.2", noise(1000, 4)), ("user.3", noise(1010, 5))])),
        ("empty", with(0o644, &[("user.empty", vec![])])),
    ];
    for (name, meta) in table {
        for size in [0, 100, 3000, 4096, 10_000] {
            let kind = sparse(tree, size as u64, &[(0, noise(size, 3))]);
            put(tree, format!("attributes/{name}-{size}"), meta.clone(), kind);
        }
    }
    let many: Vec<(String, Vec<u8>)> =
        (0..300u32).map(|index| (format!("user.n{index}"), noise(1 + index as usize, 8))).collect();
    let many: Vec<(&str, Vec<u8>)> = many.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    for index in 0..4 {
        put(tree, format!("attributes/many/{index}"), with(0o644, &many[..300 - index]), Kind::File(File::default()));
    }
    for index in 0..50u32 {
        let label = [("security.label", format!("system_u:object_r:t{}_t:s0\0", index % 7).into_bytes())];
        let kind = sparse(tree, 10, &[(0, noise(10, index.into()))]);
        put(tree, format!("attributes/labels/{index}"), with(0o644, &label), kind);
    }
    let folder = [("system.posix_acl_access", example_acl()), ("system.posix_acl_default", example_acl())];
    put(tree, "attributes/folder", with(0o1774, &folder), Kind::Directory(BTreeMap::new()));
    // So large that its entries and targets do not fit behind it.
    let trusted: Vec<(String, Vec<u8>)> = (0..20).map(|index| (format!("trusted.{index}"), noise(201, index))).collect();
    let trusted: Vec<(&str, Vec<u8>)> = trusted.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
    put(tree, "attributes/full", with(0o755, &trusted), Kind::Directory(BTreeMap::new()));
    (0..30).for_each(|index| _ = file(tree, format!("attributes/full/{index}"), vec![index]));
    put(tree, "attributes/full-link", with(0o777, &trusted[..19]), Kind::Symlink(vec![b'z'; 4000]));
}

fn kinds(tree: &mut Tree) {
    for (name, size) in [("short", 1), ("long", 4031), ("block", 4033), ("longest", 4095)] {
        put(tree, format!("kinds/link-{name}"), meta(0o777), Kind::Symlink(vec![b'/'; size]));
    }
    put(tree, "kinds/link-bytes", meta(0o777), Kind::Symlink(b"../\xff\n".to_vec()));
    for (major, minor) in [(1, 3), (259, 70_000), (4095, (1 << 20) - 1), (0, 0)] {
        put(tree, format!("kinds/char-{major}-{minor}"), meta(0o666), Kind::CharDevice { major, minor });
        put(tree, format!("kinds/block-{major}-{minor}"), meta(0o660), Kind::BlockDevice { major, minor });
    }
    let fifo = put(tree, "kinds/fifo", meta(0o622), Kind::Fifo);
    tree.link(b"kinds/fifo-again", fifo, &meta(0o755));
    put(tree, "kinds/socket", meta(0o755), Kind::Socket);
    for mode in [0, 0o7777, 0o4755, 0o2755, 0o1777] {
        put(tree, format!("kinds/folder-{mode:o}"), meta(mode), Kind::Directory(BTreeMap::new()));
        put(tree, format!("kinds/file-{mode:o}"), meta(mode), Kind::File(File::default()));
    }
    for (uid, gid) in [(65_534, 65_535), (65_536, 100_000), (u32::MAX - 1, 1 << 31)] {
        put(tree, format!("kinds/owner-{uid}-{gid}"), Meta { uid, gid, ..meta(0o640) }, Kind::File(File::default()));
    }
}

fn dates(tree: &mut Tree) {
    let table = [
        ("1970", 0, 0),
        ("before-1970", -1, 999_999_999),
        ("1901", -2_147_483_649, 1),
        ("2038", 2_147_483_648, 123_456_789),
        ("2106", 4_294_967_296, 5),
        ("2446", 15_032_385_536, 0),
        ("year-10000", 253_402_300_800, 999_999_999),
    ];
    for (name, mtime, mtime_nsec) in table {
        let kind = Kind::Symlink(b"x".to_vec());
        put(tree, format!("dates/{name}-link"), Meta { mtime, mtime_nsec, ..meta(0o777) }, kind);
        put(tree, format!("dates/{name}"), Meta { mtime, mtime_nsec, ..meta(0o755) }, Kind::Directory(BTreeMap::new()));
    }
}
