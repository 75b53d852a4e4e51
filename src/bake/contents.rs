//! What is in an artifact, and what changed between two: packages, kernel, files, sizes.
//!
//! Works on images, host images and disks alike; a disk is looked at through the host image it
//! was made from, which has to be in the store too.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use serde::Serialize;

use super::host;
use crate::artifact::disk::{self, Package};
use crate::artifact::image;
use crate::artifact::store::Store;
use crate::artifact::version::compare as compare_versions;
use crate::disk::tree::{Kind, Tree};
use crate::oci::digest::{Digest, Hasher};
use crate::oci::flatten::flatten;

/// What two artifacts are compared by.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Sorted by name.
    pub packages: Vec<Package>,
    /// Releases of its kernels.
    pub kernels: Vec<String>,
    /// Digest over kind, owner, mode, attributes and bytes of everything, by path.
    pub files: BTreeMap<String, Digest>,
    /// Bytes of all files.
    pub bytes: u64,
}

/// What is in the artifact with this manifest.
pub fn contents(store: &Store, digest: &Digest, threads: usize) -> Result<Contents> {
    let image = match disk::read(store, digest)? {
        Some(disk) => disk.config.host,
        None => *digest,
    };
    let tree = flatten(&image::blobs(store, &image)?, &store.temp_dir(), threads)?;
    of_tree(&tree)
}

fn of_tree(tree: &Tree) -> Result<Contents> {
    let mut contents = Contents { packages: host::packages(tree)?, ..Contents::default() };
    let mut seen = BTreeSet::new();
    for (path, id) in tree.walk() {
        let node = tree.node(id);
        let mut hasher = Hasher::new();
        let meta = &node.meta;
        hasher.field(format!("{} {} {}", meta.mode, meta.uid, meta.gid));
        for (name, value) in &meta.xattrs {
            hasher.field(name).field(value);
        }
        match &node.kind {
            Kind::Directory(_) => hasher.field("folder"),
            Kind::File(file) => {
                if seen.insert(id) {
                    contents.bytes += file.size;
                }
                hasher.field("file").field(tree.read_file(file)?)
            }
            Kind::Symlink(target) => hasher.field("link").field(target),
            Kind::CharDevice { major, minor } => hasher.field(format!("character {major} {minor}")),
            Kind::BlockDevice { major, minor } => hasher.field(format!("block {major} {minor}")),
            Kind::Fifo => hasher.field("fifo"),
            Kind::Socket => hasher.field("socket"),
        };
        contents.files.insert(String::from_utf8_lossy(&path).into_owned(), hasher.finish());
    }
    contents.kernels = tree
        .resolve(b"usr/lib/modules")
        .map(|id| tree.children(id).map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect())
        .unwrap_or_default();
    Ok(contents)
}

/// A package whose version changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Moved {
    pub name: String,
    pub from: String,
    pub to: String,
}

/// What changed; every list sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Difference {
    pub upgraded: Vec<Moved>,
    pub downgraded: Vec<Moved>,
    /// Name and version.
    pub removed: Vec<(String, String)>,
    pub added: Vec<(String, String)>,
    pub kernel_from: Vec<String>,
    pub kernel_to: Vec<String>,
    pub files_added: Vec<String>,
    pub files_removed: Vec<String>,
    pub files_changed: Vec<String>,
    pub bytes_from: u64,
    pub bytes_to: u64,
}

/// What leads from `one` to `two`.
pub fn difference(one: &Contents, two: &Contents) -> Difference {
    let mut difference = Difference {
        kernel_from: one.kernels.clone(),
        kernel_to: two.kernels.clone(),
        bytes_from: one.bytes,
        bytes_to: two.bytes,
        ..Difference::default()
    };
    // The same name in two architectures is two packages.
    let by_name = |contents: &Contents| -> BTreeMap<(String, String), String> {
        contents.packages.iter().map(|p| ((p.name.clone(), p.architecture.clone()), p.version.clone())).collect()
    };
    let (from, to) = (by_name(one), by_name(two));
    for (key, version) in &from {
        match to.get(key) {
            None => difference.removed.push((key.0.clone(), version.clone())),
            Some(new) if new == version => {}
            Some(new) => {
                let moved = Moved { name: key.0.clone(), from: version.clone(), to: new.clone() };
                let list = match compare_versions(version, new) {
                    Ordering::Greater => &mut difference.downgraded,
                    _ => &mut difference.upgraded,
                };
                list.push(moved);
            }
        }
    }
    difference.added =
        to.iter().filter(|(key, _)| !from.contains_key(*key)).map(|(key, version)| (key.0.clone(), version.clone())).collect();
    for (path, digest) in &one.files {
        match two.files.get(path) {
            None => difference.files_removed.push(path.clone()),
            Some(new) if new != digest => difference.files_changed.push(path.clone()),
            Some(_) => {}
        }
    }
    difference.files_added = two.files.keys().filter(|path| !one.files.contains_key(*path)).cloned().collect();
    difference
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed() {
        let package = |name: &str, version: &str| Package {
            name: name.into(),
            version: version.into(),
            architecture: "amd64".into(),
            size: 1,
        };
        let one = Contents {
            packages: vec![package("a", "1"), package("b", "2"), package("c", "1")],
            kernels: vec!["6.1".into()],
            files: BTreeMap::from([("x".into(), Digest::of(b"1")), ("y".into(), Digest::of(b"1"))]),
            bytes: 10,
        };
        let two = Contents {
            packages: vec![package("a", "2"), package("b", "1"), package("d", "1")],
            kernels: vec!["6.2".into()],
            files: BTreeMap::from([("x".into(), Digest::of(b"2")), ("z".into(), Digest::of(b"1"))]),
            bytes: 11,
        };
        let moved = |name: &str, from: &str, to: &str| Moved { name: name.into(), from: from.into(), to: to.into() };
        let expected = Difference {
            upgraded: vec![moved("a", "1", "2")],
            downgraded: vec![moved("b", "2", "1")],
            removed: vec![("c".into(), "1".into())],
            added: vec![("d".into(), "1".into())],
            kernel_from: vec!["6.1".into()],
            kernel_to: vec!["6.2".into()],
            files_added: vec!["z".into()],
            files_removed: vec!["y".into()],
            files_changed: vec!["x".into()],
            bytes_from: 10,
            bytes_to: 11,
        };
        assert_eq!(difference(&one, &two), expected);
        assert_eq!(difference(&one, &one).upgraded, vec![]);
    }
}
