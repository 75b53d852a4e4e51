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
        assert_same(&found(&place, Depth::Contents), &expected(tree, Depth::Contents));
        Cmd::new("chmod").args(["-R", "u+rwX"]).arg(&place).run().unwrap();
        fs_err::remove_dir_all(&place).unwrap();
    }
    let _ = fs_err::remove_dir(&place);
}

#[test]
fn everything_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let tree = everything();
    let layout = write(&tree, None, 2, &image);
    compare(&tree, &image, dir.path());
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
