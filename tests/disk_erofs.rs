//! EROFS images against outside witnesses: `fsck.erofs`, `dump.erofs` and the kernel's own mount.
//!
//! The tree the image is made of says what must be found; see `everything` for what is in it. As
//! root the kernel mounts the image and every entry is compared in all it has. As an ordinary user
//! `fsck.erofs` extracts it and names and contents are compared.

#[path = "disk_erofs/entries.rs"]
mod entries;
#[path = "disk_erofs/fixture.rs"]
mod fixture;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use pipeline::cmd::{Cmd, find};
use pipeline::disk::erofs::{self, Header, Layout, Target};
use pipeline::disk::tree::{File, Kind, Meta, Node, Tree};
use rand::rngs::StdRng;
use rand::seq::IteratorRandom as _;
use rand::{Rng as _, SeedableRng as _};

use entries::{Depth, assert_same, expected, found};
use fixture::{everything, file, meta, noise, put, sparse};

const UUID: [u8; 16] = *b"0123456789abcdef";

/// Fails with the Debian package when `program` is not there.
fn tool(program: &str, package: &str) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    assert!(find(program, &path).is_some(), "`{program}` is missing: apt-get install {package}");
}

/// Writes an image and checks what [`erofs::write`] promises of `on_blocks`: each block once, as written.
fn write(tree: &Tree, previous: Option<&Layout>, threads: usize, path: &Path) -> Layout {
    let plan = erofs::plan(tree, previous, threads).unwrap();
    let out = fs_err::File::create(path).unwrap();
    let header = Header { uuid: UUID, epoch: 1_700_000_000, volume_name: "test" };
    let runs = Mutex::new(Vec::new());
    let on_blocks = |first: u64, bytes: &[u8]| runs.lock().unwrap().push((first, crc(bytes), bytes.len()));
    let target = Target { out: out.file(), offset: 0, threads, on_blocks: &on_blocks };
    let written = erofs::write(tree, &plan, &header, &target).unwrap();
    assert_eq!((written.size, written.size), (plan.blocks() * 4096, fs_err::metadata(path).unwrap().len()));
    let mut runs = runs.into_inner().unwrap();
    runs.sort_unstable();
    let image = fs_err::read(path).unwrap();
    let mut at = 0;
    for (first, sum, size) in runs {
        assert_eq!((first * 4096, sum), (at, crc(&image[at as usize..][..size])));
        at += size as u64;
    }
    assert_eq!(at, written.size);
    written.layout
}

/// A sum that is quick to make.
fn crc(bytes: &[u8]) -> u64 {
    bytes.chunks_exact(8).fold(0, |sum: u64, eight| {
        (sum ^ u64::from_le_bytes(eight.try_into().unwrap())).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29)
    })
}

fn fsck(image: &Path) {
    tool("fsck.erofs", "erofs-utils");
    let output = Cmd::new("fsck.erofs").arg(image).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && !text.contains("<W>") && !text.contains("<E>"), "{text}");
}

/// A mount that goes with its value.
struct Mount(PathBuf);

impl Mount {
    fn new(image: &Path, place: &Path) -> Self {
        let known = fs_err::read_to_string("/proc/filesystems").unwrap();
        if !known.contains("\terofs\n") {
            Cmd::new("modprobe").arg("erofs").run().expect("the kernel can mount EROFS");
        }
        fs_err::create_dir(place).unwrap();
        Cmd::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).arg(image).arg(place).run().unwrap();
        Self(place.into())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        Cmd::new("umount").arg(&self.0).run().unwrap();
    }
}

/// Compares the image with the tree as far as this user can.
fn compare(tree: &Tree, image: &Path, dir: &Path) {
    fsck(image);
    let place = dir.join("found");
    if rustix::process::geteuid().is_root() {
        let mount = Mount::new(image, &place);
        assert_same(&found(&mount.0, Depth::All), &expected(tree, Depth::All));
    } else {
        let extract = format!("--extract={}", place.display());
        Cmd::new("fsck.erofs").args(["--no-preserve", &extract]).arg(image).run().unwrap();
        Cmd::new("chmod").args(["-R", "u+rwX"]).arg(&place).run().unwrap();
        assert_same(&found(&place, Depth::Contents), &expected(tree, Depth::Contents));
        fs_err::remove_dir_all(&place).unwrap();
    }
    let _ = fs_err::remove_dir(&place);
}

#[test]
fn everything_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    if !rustix::process::geteuid().is_root() {
        // Extracting makes a file of each hard link, and takes minutes for the full tree.
        let small = everything(2000, 1000);
        write(&small, None, 2, &image);
        compare(&small, &image, dir.path());
    }
    let tree = everything(100_000, 65_000);
    let layout = write(&tree, None, 2, &image);
    if rustix::process::geteuid().is_root() {
        compare(&tree, &image, dir.path());
    }
    fsck(&image);
    let size = fs_err::metadata(&image).unwrap().len();
    assert!(size < 60 << 20, "holes take space: {size} bytes");

    tool("dump.erofs", "erofs-utils");
    let text = Cmd::new("dump.erofs").arg("-s").arg(&image).text().unwrap();
    let lines = [
        format!("Filesystem blocks:                            {}", layout.blocks),
        format!("Filesystem inode count:                       {}", layout.entries.len()),
        "Filesystem features:                          sb_csum mtime chunked_file".into(),
        "30313233-3435-3637-3839-616263646566".into(),
    ];
    for line in lines {
        assert!(text.contains(&line), "`{line}` is missing:\n{text}");
    }

    // One thread or three, once more or with its own layout: the same bytes.
    let bytes = fs_err::read(&image).unwrap();
    for (previous, threads) in [(None, 1), (None, 3), (Some(&layout), 2)] {
        assert!(write(&tree, previous, threads, &image) == layout);
        assert!(fs_err::read(&image).unwrap() == bytes, "{threads} threads");
    }
    let stored = serde_json::to_vec(&layout).unwrap();
    assert!(serde_json::from_slice::<Layout>(&stored).unwrap() == layout);
}

#[test]
fn an_image_starts_where_it_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let tree = random_tree(&mut StdRng::seed_from_u64(1), 50);
    write(&tree, None, 2, &dir.path().join("image"));
    let plan = erofs::plan(&tree, None, 2).unwrap();
    let out = fs_err::File::create(dir.path().join("disk")).unwrap();
    let header = Header { uuid: UUID, epoch: 1_700_000_000, volume_name: "test" };
    erofs::write(&tree, &plan, &header, &Target { out: out.file(), offset: 12_288, threads: 2, on_blocks: &|_, _| {} }).unwrap();
    let disk = fs_err::read(dir.path().join("disk")).unwrap();
    assert!(disk[..12_288].iter().all(|byte| *byte == 0) && disk[12_288..] == fs_err::read(dir.path().join("image")).unwrap());
}

/// A folder tree with about `count` files of all sizes up to a few hundred KiB.
fn random_tree(random: &mut StdRng, count: u32) -> Tree {
    let mut tree = Tree::default();
    tree.node_mut(Tree::ROOT).meta = meta(0o755);
    (0..count).for_each(|_| add(&mut tree, random));
    tree
}

fn random_path(random: &mut StdRng) -> String {
    let folders: String = (0..random.random_range(0..3)).map(|_| format!("folder-{}/", random.random_range(0..8))).collect();
    format!("{folders}{}", random.random_range(0..100_000))
}

/// A number below two to the `bits`, small ones more often.
fn up_to(random: &mut StdRng, bits: u32) -> u64 {
    let bits = random.random_range(1..bits);
    random.random_range(0..1 << bits)
}

fn add(tree: &mut Tree, random: &mut StdRng) {
    let path = random_path(random);
    let size = up_to(random, 20);
    let parts = match random.random_range(0..5) {
        0 => vec![(size / 2, noise((size / 4) as usize, random.random()))],
        _ => vec![(0, noise(size as usize, random.random()))],
    };
    let kind = match random.random_range(0..10) {
        0 => Kind::Symlink(noise(random.random_range(1..200), 1).iter().map(|byte| byte | 1).collect()),
        1 => Kind::Directory(Default::default()),
        2 => Kind::Fifo,
        _ => sparse(tree, size, &parts),
    };
    let mut meta = meta(0o644);
    for _ in 0..random.random_range(0..8u32).saturating_sub(4) {
        let name = format!("trusted.{}", random.random_range(0..5));
        meta.xattrs.insert(name.into_bytes(), noise(up_to(random, 14) as usize, random.random_range(0..9)));
    }
    let id = put(tree, &path, meta, kind);
    if random.random_bool(0.05) && !matches!(tree.node(id).kind, Kind::Directory(_)) {
        tree.link(random_path(random).as_bytes(), id, &fixture::meta(0o755));
    }
}

/// Changes, adds, moves and takes away.
fn change(tree: &mut Tree, random: &mut StdRng) {
    let files: Vec<_> = tree.walk().into_iter().filter(|(_, id)| !matches!(tree.node(*id).kind, Kind::Directory(_))).collect();
    for (path, id) in files.iter().choose_multiple(random, files.len() / 8) {
        match random.random_range(0..6) {
            0 => _ = tree.remove(path),
            1 => {
                tree.remove(path);
                tree.link(random_path(random).as_bytes(), *id, &meta(0o755));
            }
            2 => tree.node_mut(*id).meta.mtime += 1,
            3 => _ = tree.node_mut(*id).meta.xattrs.insert(b"trusted.new".to_vec(), noise(random.random_range(0..2000), 1)),
            _ => {
                if let Kind::File(File { size, .. }) = tree.node(*id).kind {
                    let size = if random.random_bool(0.5) { size } else { random.random_range(0..1 << 18) };
                    tree.node_mut(*id).kind = sparse(tree, size, &[(0, noise(size as usize, random.random()))]);
                }
            }
        }
    }
    (0..random.random_range(0..10)).for_each(|_| add(tree, random));
    if random.random_bool(0.1) {
        tree.remove(format!("folder-{}", random.random_range(0..8)).as_bytes());
    }
}

/// Which blocks a layout uses; no slot of an inode and no block twice.
fn used(layout: &Layout) -> Vec<bool> {
    let mut slots = vec![false; layout.blocks as usize * 128];
    let mut take = |first: u64, count: u64| {
        for slot in &mut slots[first as usize..(first + count) as usize] {
            assert!(!*slot, "slot used twice");
            *slot = true;
        }
    };
    take(0, 36);
    take(u64::from(layout.shared.start) * 128, u64::from(layout.shared.blocks) * 128);
    for entry in &layout.entries {
        take(entry.nid, entry.slots.into());
        take(u64::from(entry.start) * 128, u64::from(entry.blocks) * 128);
    }
    slots.chunks(128).map(|block| block.iter().any(|slot| *slot)).collect()
}

#[test]
fn what_is_unchanged_stays_where_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (image, again) = (dir.path().join("image"), dir.path().join("again"));
    for seed in 0..30 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut tree = random_tree(&mut random, 150);
        let mut before = write(&tree, None, 2, &image);
        for step in 0..6 {
            change(&mut tree, &mut random);
            let layout = write(&tree, Some(&before), 2, &image);
            let canonical = write(&tree, None, 2, &again);
            // A second time nothing moves.
            assert!(write(&tree, Some(&layout), 3, &again) == layout, "seed {seed} step {step}");
            assert!(fs_err::read(&again).unwrap() == fs_err::read(&image).unwrap(), "seed {seed} step {step}");
            assert!(layout.blocks <= canonical.blocks + canonical.blocks / 4 + 256);
            let bytes = fs_err::read(&image).unwrap();
            for (block, used) in bytes.chunks(4096).zip(used(&layout)) {
                assert!(used || block.iter().all(|byte| *byte == 0), "a gap is not zero");
            }
            assert!(layout != canonical, "seed {seed} step {step}");
            assert_kept(&before, &layout);
            before = layout;
        }
        if seed % 5 == 0 {
            compare(&tree, &image, dir.path());
        }
    }
}

#[test]
fn an_image_of_mostly_gaps_is_placed_anew() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut tree = random_tree(&mut StdRng::seed_from_u64(5), 400);
    let mut layout = write(&tree, None, 2, &image);
    let mut anew = Vec::new();
    for _ in 0..6 {
        // Every second file but the last, which keeps the image long.
        let files: Vec<_> = tree.walk().into_iter().filter(|(_, id)| matches!(tree.node(*id).kind, Kind::File(_))).collect();
        files[..files.len() - 1].iter().step_by(2).for_each(|(path, _)| _ = tree.remove(path));
        layout = write(&tree, Some(&layout), 2, &image);
        let canonical = write(&tree, None, 2, &image);
        assert!(layout.blocks <= canonical.blocks + canonical.blocks / 4 + 256);
        anew.push(layout == canonical);
        assert!(write(&tree, Some(&layout), 2, &image) == layout);
    }
    assert!(anew.contains(&true) && anew.contains(&false), "{anew:?}");
    compare(&tree, &image, dir.path());
}

/// What has the same path and size in both layouts, or the same data, has the same place.
fn assert_kept(before: &Layout, after: &Layout) {
    for entry in &after.entries {
        let Some(old) = before.entries.iter().find(|old| old.path == entry.path) else { continue };
        if old.slots == entry.slots {
            assert_eq!(old.nid, entry.nid, "inode of {}", String::from_utf8_lossy(&entry.path));
        }
        if old.blocks == entry.blocks && old.digest == entry.digest {
            assert_eq!(old.start, entry.start, "data of {}", String::from_utf8_lossy(&entry.path));
        }
    }
    // Data of one file only, then and now, and so in one place.
    let only = |layout: &Layout, digest| layout.entries.iter().filter(|entry| entry.digest == digest).count() == 1;
    for entry in after.entries.iter().filter(|entry| entry.digest.is_some()) {
        let old = before.entries.iter().find(|old| old.digest == entry.digest && old.blocks == entry.blocks);
        if let Some(old) = old.filter(|_| only(before, entry.digest) && only(after, entry.digest)) {
            assert_eq!(old.start, entry.start, "data of {}", String::from_utf8_lossy(&entry.path));
        }
    }
}

#[test]
fn a_small_change_changes_few_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = random_tree(&mut StdRng::seed_from_u64(7), 1500);
    file(&mut tree, "folder-1/changed", noise(50_000, 1));
    let (old, new, fresh) = (dir.path().join("old"), dir.path().join("new"), dir.path().join("fresh"));
    let before = write(&tree, None, 2, &old);
    // Longer by more than a block, under the same name; and a new file in another folder.
    file(&mut tree, "folder-1/changed", noise(70_000, 2));
    file(&mut tree, "folder-2/new", noise(10_000, 3));
    write(&tree, Some(&before), 2, &new);
    write(&tree, None, 2, &fresh);
    let old = fs_err::read(old).unwrap();
    let differing = |path: &Path| {
        let bytes = fs_err::read(path).unwrap();
        bytes.chunks(4096).zip(old.chunks(4096)).filter(|(a, b)| a != b).count() + bytes.len().abs_diff(old.len()) / 4096
    };
    // The data in 17 and 2 blocks, 12 given up, the inodes of both files and of two folders where they were and
    // are, the superblock; a folder with a block of names more.
    let (with, without) = (differing(&new), differing(&fresh));
    assert!((20..=45).contains(&with) && without > 10 * with, "{with} and {without} blocks of {}", before.blocks);
}

#[test]
fn a_damaged_layout_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut random = StdRng::seed_from_u64(3);
    let tree = random_tree(&mut random, 200);
    let good = write(&tree, None, 2, &image);
    for (round, limit) in [500, 5_000, 100_000, u32::MAX].into_iter().enumerate() {
        let mut bad = good.clone();
        for entry in &mut bad.entries {
            match random.random_range(0..4) {
                0 => entry.nid = random.random_range(0..limit.into()),
                1 => entry.start = random.random_range(0..limit),
                2 => entry.blocks = random.random_range(0..40),
                _ => {}
            }
        }
        bad.shared.entries.iter_mut().for_each(|(_, id)| *id = random.random_range(0..limit));
        let layout = write(&tree, Some(&bad), 2, &image);
        used(&layout);
        assert!(write(&tree, Some(&layout), 2, &image) == layout, "round {round}");
        compare(&tree, &image, dir.path());
    }
}

#[test]
fn what_erofs_cannot_hold_is_named() {
    let attribute = |name: &str, size| Meta { xattrs: [(name.as_bytes().to_vec(), vec![1; size])].into(), ..meta(0o644) };
    let many =
        Meta { xattrs: (0..300).map(|index| (format!("user.{index}").into_bytes(), vec![1; 1000])).collect(), ..meta(0o644) };
    let empty = || Kind::File(File::default());
    let node = |meta, kind| Node { meta, kind };
    let table: [(&[u8], Node, &str); 13] = [
        (&[b'n'; 256], node(meta(0), empty()), "the name is longer than 255 bytes"),
        (b"", node(meta(0), empty()), "`/folder/`: a name is empty"),
        (b"a/b", node(meta(0), empty()), "`/folder/a/b`: a name contains a slash"),
        (b"a\0b", node(meta(0), empty()), "a name contains a zero byte"),
        (b"..", node(meta(0), empty()), "`/folder/..`: `.` and `..` cannot be names"),
        (b"x", node(attribute("user.big", 65_536), empty()), "`/folder/x`: extended attribute `user.big` has 65536 bytes"),
        (b"x", node(attribute("system.nfs4_acl", 1), empty()), "`/folder/x`: extended attribute `system.nfs4_acl`"),
        (b"x", node(many, empty()), "`/folder/x`: its extended attributes take"),
        (b"x", node(meta(0), Kind::Symlink(vec![])), "`/folder/x`: the symbolic link has no target"),
        (b"x", node(meta(0), Kind::Symlink(vec![b'x'; 4096])), "target is longer than 4095 bytes"),
        (b"x", node(meta(0), Kind::CharDevice { major: 4096, minor: 0 }), "device number 4096:0 is too large"),
        (b"x", node(Meta { mtime_nsec: 1_000_000_000, ..meta(0) }, empty()), "nanoseconds"),
        (b"x", node(meta(0), Kind::File(File { size: 1 << 63, extents: vec![] })), "larger than 8 EiB"),
    ];
    for (name, node, expected) in table {
        let mut tree = Tree::default();
        let folder = put(&mut tree, "folder", meta(0o755), Kind::Directory(Default::default()));
        let id = tree.add(node);
        if let Kind::Directory(names) = &mut tree.node_mut(folder).kind {
            names.insert(name.to_vec(), id);
        }
        let message = format!("{:#}", erofs::plan(&tree, None, 1).unwrap_err());
        assert!(message.contains(expected) && message.contains("`/folder/"), "{message}");
    }
    let mut tree = Tree::default();
    let folder = put(&mut tree, "folder", meta(0o755), Kind::Directory(Default::default()));
    tree.link(b"folder/again", folder, &meta(0o755));
    let message = erofs::plan(&tree, None, 1).unwrap_err().to_string();
    assert_eq!(message, "`/folder/again`: a directory cannot have two names");
    let plan = erofs::plan(&Tree::default(), None, 1).unwrap();
    let out = tempfile::tempfile().unwrap();
    let header = Header { uuid: UUID, epoch: 0, volume_name: "sixteen-letters-" };
    let target = Target { out: &out, offset: 0, threads: 1, on_blocks: &|_, _| {} };
    let message = erofs::write(&Tree::default(), &plan, &header, &target).unwrap_err().to_string();
    assert!(message.contains("`sixteen-letters-` is longer than the 15 bytes"), "{message}");
}

#[test]
fn a_source_that_shrank_is_named() {
    let mut tree = Tree::default();
    let id = file(&mut tree, "usr/lib/short", noise(10_000, 1));
    let Kind::File(content) = &mut tree.node_mut(id).kind else { panic!("just put") };
    content.extents[0].source_offset = 1;
    let plan = erofs::plan(&tree, None, 2).unwrap();
    let out = tempfile::tempfile().unwrap();
    let header = Header { uuid: UUID, epoch: 0, volume_name: "" };
    let target = Target { out: &out, offset: 0, threads: 2, on_blocks: &|_, _| {} };
    let error = erofs::write(&tree, &plan, &header, &target).unwrap_err();
    assert!(format!("{error:#}").contains("cannot read the content of `/usr/lib/short` from its layer"), "{error:#}");
}

#[test]
fn the_digest_of_a_plan_is_that_of_the_tree_and_the_places() {
    let plan = |tree: &Tree, previous: Option<&Layout>| erofs::plan(tree, previous, 2).unwrap().digest(tree);
    let build = |first: &[&str]| {
        let mut tree = Tree::default();
        for name in first.iter().chain(&["usr/a", "usr/b", "etc/c", "etc/d"]) {
            file(&mut tree, name, name.bytes().cycle().take(20_000).collect());
        }
        let id = tree.find(b"usr/a").unwrap();
        tree.link(b"etc/linked", id, &meta(0o755));
        tree
    };
    // Not of the order in which nodes were made, nor of whether there was a previous layout.
    let tree = build(&[]);
    let digest = plan(&tree, None);
    assert_eq!(digest, plan(&build(&["etc/d", "usr/b"]), None));
    let image = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(digest, plan(&tree, Some(&write(&tree, None, 2, image.path()))));
    let changes: [(&str, fn(&mut Tree)); 6] = [
        ("mode", |tree| tree.nodes[2].meta.mode ^= 1),
        ("time", |tree| tree.nodes[2].meta.mtime_nsec += 1),
        ("attribute", |tree| _ = tree.nodes[2].meta.xattrs.insert(b"user.a".to_vec(), vec![1])),
        ("size", |tree| _ = file(tree, "usr/b", vec![1; 20_001])),
        ("a link to another file", |tree| tree.link(b"etc/linked", tree.find(b"usr/b").unwrap(), &meta(0o755))),
        ("a name", |tree| tree.link(b"etc/other", tree.find(b"usr/a").unwrap(), &meta(0o755))),
    ];
    for (name, change) in changes {
        let mut tree = build(&[]);
        change(&mut tree);
        assert_ne!(digest, plan(&tree, None), "{name}");
    }
}
