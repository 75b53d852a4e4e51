//! Tests of [`super`].

use std::os::unix::fs::{PermissionsExt as _, symlink};

use super::super::scan::{ScanOptions, scan};
use super::*;

struct Source {
    dir: tempfile::TempDir,
}

impl Source {
    fn new() -> Self {
        let source = Self { dir: tempfile::tempdir().unwrap() };
        for path in ["run", "a", "d/b", "d/e/f", "gone/x"] {
            source.write(path, path);
        }
        fs::set_permissions(source.root().join("run"), std::fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(source.root().join("a"), std::fs::Permissions::from_mode(0o666)).unwrap();
        symlink("../outside", source.root().join("link")).unwrap();
        fs::create_dir(source.root().join("empty")).unwrap();
        xattr::set(source.root().join("a"), "user.k", b"v").unwrap();
        xattr::set(source.root().join("d"), "user.k", b"v").unwrap();
        source
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("src")
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Takes a snapshot and checks it against its listing.
    fn take(&self) -> Snapshot {
        let listing = scan(&self.root(), &ScanOptions::default()).unwrap().listing;
        let taken = snapshot(&listing, &self.root(), &self.store()).unwrap();
        check(&taken.path, &listing);
        taken
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(self.store()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The tree is what the listing says, with normal modes and times.
fn check(path: &Path, listing: &Listing) {
    let found = scan(path, &ScanOptions { gitignore: false, cache: None }).unwrap().listing;
    assert_eq!(super::super::listing::changes(listing, &found), []);
    let mut all: Vec<PathBuf> =
        listing.entries.iter().map(|entry| path.join(super::super::listing::as_path(&entry.path))).collect();
    all.push(path.to_owned());
    for path in all {
        let stat = fs::symlink_metadata(&path).unwrap();
        assert_eq!((stat.mtime(), stat.mtime_nsec()), (MTIME, 0), "{}", path.display());
        let mode = stat.mode() & 0o7777;
        assert!(
            matches!((stat.is_symlink(), stat.is_dir(), mode), (true, ..) | (_, true, 0o755) | (_, false, 0o755 | 0o644)),
            "{mode:o}"
        );
    }
}

fn edit(source: &Source) {
    source.write("a", "changed");
    source.write("new/n", "new");
    source.write("gone", "a folder became a file");
}

#[test]
fn an_unused_snapshot_is_turned_into_the_next() {
    let source = Source::new();
    let first = source.take();
    let inode = fs::metadata(first.path.join("d/b")).unwrap().ino();
    let hex = first.path.file_name().unwrap().to_str().unwrap().to_owned();
    drop(first);
    fs::remove_dir_all(source.root().join("gone")).unwrap();
    edit(&source);
    xattr::set(source.root().join("d"), "user.k", b"other").unwrap();
    fs::remove_file(source.root().join("link")).unwrap();
    let second = source.take();
    assert_eq!(fs::metadata(second.path.join("d/b")).unwrap().ino(), inode);
    assert!(!source.files().iter().any(|name| name.starts_with(&hex)), "{:?}", source.files());
    assert_eq!(source.files().len(), 4);
}

#[test]
fn a_snapshot_in_use_is_linked_from_and_stays_as_it_is() {
    let source = Source::new();
    let first = source.take();
    let listing = scan(&source.root(), &ScanOptions::default()).unwrap().listing;
    fs::remove_dir_all(source.root().join("gone")).unwrap();
    edit(&source);
    fs::set_permissions(source.root().join("run"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let second = source.take();
    let inode = |path: PathBuf| fs::metadata(path).unwrap().ino();
    assert_eq!(inode(second.path.join("d/b")), inode(first.path.join("d/b")));
    assert_ne!(inode(second.path.join("run")), inode(first.path.join("run")), "another mode is another file");
    // Turning the second into a third must not reach the files it shares with the first.
    drop(second);
    source.write("d/b", "again");
    fs::set_permissions(source.root().join("d/e/f"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let third = source.take();
    check(&first.path, &listing);
    drop(third);
}

#[test]
fn the_same_listing_is_not_made_twice() {
    let source = Source::new();
    let first = source.take();
    let inode = fs::metadata(&first.path).unwrap().ino();
    let second = source.take();
    assert_eq!((second.path.clone(), fs::metadata(&second.path).unwrap().ino()), (first.path.clone(), inode));
}

#[test]
fn no_more_than_the_last_three_and_those_in_use_are_kept() {
    let source = Source::new();
    let mut held = Vec::new();
    for round in 0..6 {
        source.write("a", &format!("{round}"));
        held.push(source.take());
    }
    assert_eq!(source.files().len(), 6 * 3 + 1);
    let last = held.pop().unwrap().path;
    held.clear();
    source.take();
    assert_eq!(source.files().len(), 3 * 3 + 1);
    assert!(fs::metadata(last).is_ok());
}

#[test]
fn what_changed_since_the_scan_is_named() {
    type Edit = fn(&Path);
    let cases: [(&str, Edit); 5] = [
        ("content", |path| fs::write(path, "X").unwrap()),
        ("longer", |path| fs::write(path, "longer").unwrap()),
        ("gone", |path| fs::remove_file(path).unwrap()),
        ("a link", |path| {
            fs::remove_file(path).unwrap();
            symlink("run", path).unwrap();
        }),
        ("a folder", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
    ];
    for (name, edit) in cases {
        let source = Source::new();
        let listing = scan(&source.root(), &ScanOptions::default()).unwrap().listing;
        edit(&source.root().join("a"));
        let error = snapshot(&listing, &source.root(), &source.store()).unwrap_err();
        let root = source.root();
        let expected = format!("`a` of the source `{}` changed while it was read", root.display());
        assert_eq!(error.root_cause().to_string(), expected, "{name}");
        // The next one finds and removes what this one left.
        source.take();
        assert_eq!(source.files().len(), 4, "{name}: {:?}", source.files());
    }
}

#[test]
fn what_a_killed_process_or_another_boot_left_does_not_count() {
    let source = Source::new();
    let taken = source.take().path;
    let listing = taken.with_extension("listing");
    let whole = fs::read(&listing).unwrap();
    let other_boot = [b"00000000-0000-0000-0000-000000000000", &whole[36..]].concat();
    let cases: [(&str, &dyn Fn()); 4] = [
        ("before the listing was written", &|| fs::remove_file(&listing).unwrap()),
        ("while the tree was made", &|| {
            fs::remove_file(&listing).unwrap();
            fs::rename(&taken, source.store().join("making-tree")).unwrap();
        }),
        ("another boot", &|| fs::write(&listing, &other_boot).unwrap()),
        ("a broken listing", &|| fs::write(&listing, &whole[..whole.len() - 1]).unwrap()),
    ];
    for (name, breaks) in cases {
        fs::write(taken.join("a"), "spoiled").unwrap();
        breaks();
        assert_eq!(source.take().path, taken, "{name}");
        assert_eq!(source.files().len(), 4, "{name}: {:?}", source.files());
    }
}

#[test]
fn holes_stay_holes() {
    use std::os::unix::fs::FileExt as _;
    let source = Source::new();
    let file = fs::File::create(source.root().join("sparse")).unwrap();
    file.set_len(64 << 20).unwrap();
    file.file().write_at(b"x", 20 << 20).unwrap();
    let taken = source.take();
    let copy = fs::metadata(taken.path.join("sparse")).unwrap();
    assert!(copy.len() == 64 << 20 && copy.blocks() * 512 <= 1 << 20, "{} blocks", copy.blocks());
}

#[test]
fn many_files_are_copied_by_several_threads() {
    let source = Source::new();
    for number in 0..200 {
        source.write(&format!("many/{number}"), &format!("{number}"));
    }
    source.take();
}
