//! Tests of [`super`]: what is in, what is out, what is refused, and what the cache may skip.

use std::fs::Permissions;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::PathBuf;

use super::super::listing::{What, changes};
use super::super::testing::git;
use super::*;
use crate::cmd::Cmd;

/// A folder `src` with files, and a cache beside it.
struct Source {
    dir: tempfile::TempDir,
}

impl Source {
    fn new(files: &[(&str, &str)]) -> Self {
        let source = Self { dir: tempfile::tempdir().unwrap() };
        fs_err::create_dir(source.root()).unwrap();
        for (path, text) in files {
            source.write(path, text);
        }
        source
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("src")
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache/stat")
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root().join(path);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, text).unwrap();
    }

    fn git(&self, folder: &str, args: &[&str]) {
        git(&self.root().join(folder), args);
    }

    /// Scans the folder `below` the root, with the cache.
    fn scan(&self) -> Scan {
        scan(&self.root(), &ScanOptions { cache: Some(&self.cache()), ..ScanOptions::default() }).unwrap()
    }

    /// Scans until nothing is racy any more.
    fn settle(&self) -> Scan {
        for _ in 0..200 {
            let scan = self.scan();
            if scan.stats.read == 0 {
                return scan;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("the cache does not settle");
    }

    fn paths(&self) -> Vec<String> {
        paths(&self.scan().listing)
    }

    fn error(&self) -> String {
        let error = scan(&self.root(), &ScanOptions::default()).unwrap_err();
        assert_eq!(error.downcast_ref::<Problem>().map(|problem| problem.hints.len()), Some(1), "{error:#}");
        format!("{error:#}")
    }
}

fn paths(listing: &Listing) -> Vec<String> {
    listing.entries.iter().map(Entry::name).collect()
}

#[test]
fn a_listing_holds_kinds_modes_and_contents() {
    let source = Source::new(&[("b/run", "#!/bin/sh\n"), ("b/data", ""), ("b-c", "x")]);
    fs_err::set_permissions(source.root().join("b/run"), Permissions::from_mode(0o711)).unwrap();
    fs_err::set_permissions(source.root().join("b/data"), Permissions::from_mode(0o677)).unwrap();
    fs_err::create_dir(source.root().join("empty")).unwrap();
    symlink("../../outside", source.root().join("up")).unwrap();
    symlink("loop", source.root().join("loop")).unwrap();
    let file = |executable, text: &str| Kind::File { executable, size: text.len() as u64, digest: Digest::of(text) };
    let expected: Vec<(&str, Kind)> = vec![
        ("b", Kind::Directory),
        ("b-c", file(false, "x")),
        ("b/data", file(false, "")),
        ("b/run", file(true, "#!/bin/sh\n")),
        ("empty", Kind::Directory),
        ("loop", Kind::Symlink { target: "loop".into() }),
        ("up", Kind::Symlink { target: "../../outside".into() }),
    ];
    let found = source.scan();
    let entries = |(path, kind): (&str, Kind)| Entry { path: path.into(), kind, xattrs: Vec::new() };
    assert_eq!(found.listing.entries, expected.into_iter().map(entries).collect::<Vec<_>>());
    assert_eq!(found.stats, Stats { read: 3, cached: 0 });
}

#[test]
fn names_need_not_be_utf8() {
    let source = Source::new(&[]);
    let name = std::ffi::OsStr::from_bytes(b"caf\xe9 \n\"");
    fs_err::write(source.root().join(name), "x").unwrap();
    assert_eq!(source.settle().listing.entries[0].path, b"caf\xe9 \n\"");
}

#[test]
fn what_a_source_cannot_hold_is_named() {
    type Prepare = fn(&Path);
    let cases: [(&str, Prepare); 5] = [
        ("source holds a FIFO `sub/x`", |path| {
            Cmd::new("mkfifo").arg(path).run().unwrap();
        }),
        ("source holds a socket `sub/x`", |path| drop(std::os::unix::net::UnixListener::bind(path).unwrap())),
        ("`sub/x` of the source is a Git LFS pointer, not the file itself", |path| {
            fs_err::write(path, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n").unwrap();
        }),
        ("sub/x` of the source", |path| {
            fs_err::write(path, "").unwrap();
            fs_err::set_permissions(path, Permissions::from_mode(0o0)).unwrap();
        }),
        ("sub/x` of the source", |path| {
            fs_err::create_dir(path).unwrap();
            fs_err::set_permissions(path, Permissions::from_mode(0o0)).unwrap();
        }),
    ];
    for (expected, prepare) in cases {
        let source = Source::new(&[("sub/ok", "")]);
        prepare(&source.root().join("sub/x"));
        // Root may read everything.
        if expected.starts_with("sub") && rustix::process::geteuid().is_root() {
            assert_eq!(source.paths(), ["sub", "sub/ok", "sub/x"]);
        } else {
            let error = source.error();
            assert!(error.contains(expected), "{error}");
        }
        source.write(".s2iignore", "sub/x\n");
        assert_eq!(source.paths(), [".s2iignore", "sub", "sub/ok"]);
        // So that the folder of the test can be removed.
        fs_err::set_permissions(source.root().join("sub/x"), Permissions::from_mode(0o700)).unwrap();
    }
}

#[test]
fn an_unreadable_file_is_named() {
    let denied = io::Error::from(Errno::ACCESS);
    let error = unreadable(Path::new("/src"), b"a/b", &denied);
    assert_eq!(error.to_string(), "cannot read `a/b` of the source `/src`: Permission denied");
    let gone = io::Error::from(Errno::NOENT);
    assert_eq!(unreadable(Path::new("/src"), b"a/b", &gone).to_string(), "`a/b` of the source changed while it was read");
    let error = scan(Path::new("/no/such/source"), &ScanOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the source `/no/such/source`: No such file or directory");
}

#[test]
fn gitignore_without_a_repository_and_nested() {
    let source = Source::new(&[
        (".gitignore", "*.log\nbuild/\n/top\n"),
        ("a.log", ""),
        ("build/out", ""),
        ("top", ""),
        ("sub/top", ""),
        ("sub/.gitignore", "!keep.log\nonly\n"),
        ("sub/keep.log", ""),
        ("sub/other.log", ""),
        ("sub/deep/only", ""),
        ("only", ""),
    ]);
    let expected = [".gitignore", "only", "sub", "sub/.gitignore", "sub/deep", "sub/keep.log", "sub/top"];
    assert_eq!(source.paths(), expected);
    assert_eq!(paths(&source.settle().listing), expected);
    let all = scan(&source.root(), &ScanOptions { gitignore: false, cache: None }).unwrap();
    assert_eq!(all.listing.entries.len(), 13);
    // Rules that change are seen, and the cache does not remember the old ones.
    source.write(".gitignore", "only\n");
    let expected = [
        ".gitignore",
        "a.log",
        "build",
        "build/out",
        "sub",
        "sub/.gitignore",
        "sub/deep",
        "sub/keep.log",
        "sub/other.log",
        "sub/top",
        "top",
    ];
    assert_eq!(source.paths(), expected);
    assert_eq!(paths(&source.settle().listing), expected);
}

#[test]
fn gitignore_as_git_has_it() {
    // The outside witness: what Git lists as tracked or as untracked and not ignored.
    let source = Source::new(&[
        (".gitignore", "*.o\n!keep.o\n/dist\ndoc/**/*.txt\nx[0-9]\n\\#hash\nspace\\ \ncr\r\ntrail/  \na/*/c\n!/a/b/c\n**/gen/\n"),
        (".git-not", ""),
        ("1.o", ""),
        ("keep.o", ""),
        ("forced.o", ""),
        ("dist/a", ""),
        ("dist/tracked/b", ""),
        ("sub/dist/a", ""),
        ("doc/a.txt", ""),
        ("doc/b/c/d.txt", ""),
        ("doc/b/c/d.md", ""),
        ("x1", ""),
        ("xy", ""),
        ("#hash", ""),
        ("space ", ""),
        ("cr", ""),
        ("trail/t", ""),
        ("a/b/c", ""),
        ("a/d/c", ""),
        ("p/q/gen/g", ""),
        ("gen", ""),
        ("excluded", ""),
        ("sub/.gitignore", "*\n!.gitignore\n!*.rs\n"),
        ("sub/main.rs", ""),
        ("sub/other", ""),
        ("sub/more/lib.rs", ""),
    ]);
    source.git("", &["init", "-q"]);
    source.write(".git/info/exclude", "excluded\n");
    source.git("", &["add", "-f", "forced.o", "dist/tracked/b"]);
    let output = Cmd::new("git").args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).dir(source.root());
    let output = output.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").output().unwrap().stdout;
    let mut expected: Vec<&[u8]> = output.split(|byte| *byte == 0).filter(|path| !path.is_empty()).collect();
    expected.sort_unstable();
    for listing in [source.scan().listing, source.settle().listing] {
        let files = listing.entries.iter().filter(|entry| matches!(entry.kind, Kind::File { .. }));
        assert_eq!(files.map(|entry| entry.path.as_slice()).collect::<Vec<_>>(), expected);
    }
    // The index changes and nothing else does: another ignored file is tracked, a tracked one is not.
    source.git("", &["add", "-f", "1.o"]);
    source.git("", &["rm", "-q", "--cached", "forced.o"]);
    let paths = source.paths();
    assert!(paths.contains(&"1.o".to_owned()) && !paths.contains(&"forced.o".to_owned()), "{paths:?}");
}

#[test]
fn rules_of_the_folders_above_the_source_count() {
    let source = Source::new(&[
        (".gitignore", "*.log\n/apps/notes/local\n/out\n"),
        ("apps/.gitignore", "tmp\n"),
        ("apps/notes/a.log", ""),
        ("apps/notes/local", ""),
        ("apps/notes/tmp", ""),
        ("apps/notes/tracked.log", ""),
        ("apps/notes/main", ""),
        ("out/generated", ""),
    ]);
    source.git("", &["init", "-q"]);
    source.git("", &["add", "-f", "apps/notes/tracked.log"]);
    let below = |path: &str| paths(&scan(&source.root().join(path), &ScanOptions::default()).unwrap().listing);
    assert_eq!(below("apps/notes"), ["main", "tracked.log"]);
    // Who names an ignored folder as the source wants what is in it.
    assert_eq!(below("out"), ["generated"]);
}

#[test]
fn a_submodule_has_rules_of_its_own() {
    let source = Source::new(&[
        (".gitignore", "*.log\n"),
        ("lib/.gitignore", "*.tmp\n"),
        ("lib/a.log", ""),
        ("lib/a.tmp", ""),
        ("a.log", ""),
    ]);
    source.git("", &["init", "-q"]);
    source.git("lib", &["init", "-q"]);
    let expected = [".gitignore", "lib", "lib/.gitignore", "lib/a.log"];
    assert_eq!(source.paths(), expected);
    assert_eq!(paths(&source.settle().listing), expected);
}

#[test]
fn s2iignore_goes_beside_gitignore() {
    let source = Source::new(&[
        (".s2iignore", "# no docs\ndocs\n*.md\n!README.md\nkeep.log\n"),
        (".gitignore", "*.log\n"),
        ("docs/a", ""),
        ("README.md", ""),
        ("NEWS.md", ""),
        ("sub/NEWS.md", ""),
        ("keep.log", ""),
        ("main", ""),
    ]);
    source.git("", &["init", "-q"]);
    source.git("", &["add", "-f", "keep.log", "docs/a"]);
    let expected = [".gitignore", ".s2iignore", "README.md", "main", "sub", "sub/NEWS.md"];
    assert_eq!(source.paths(), expected);
    // The index says otherwise, but who lists a file in .s2iignore does not want it.
    source.git("", &["rm", "-q", "--cached", "docs/a"]);
    assert_eq!(paths(&source.settle().listing), expected);
    source.write(".s2iignore", "sub\n");
    let paths = source.paths();
    assert!(paths.contains(&"docs/a".to_owned()) && !paths.contains(&"sub".to_owned()), "{paths:?}");
}

#[test]
fn every_kind_of_change_is_seen_by_a_settled_cache() {
    type Case = (&'static str, fn(&Source), &'static [(&'static str, What)]);
    let cases: [Case; 9] = [
        ("one byte, size and mtime restored", |source| same_size_same_mtime(&source.root().join("a")), &[("a", What::Content)]),
        (
            "mode",
            |source| fs_err::set_permissions(source.root().join("a"), Permissions::from_mode(0o755)).unwrap(),
            &[("a", What::Mode)],
        ),
        (
            "a mode that does not count",
            |source| fs_err::set_permissions(source.root().join("a"), Permissions::from_mode(0o604)).unwrap(),
            &[],
        ),
        (
            "link",
            |source| {
                fs_err::remove_file(source.root().join("link")).unwrap();
                symlink("b", source.root().join("link")).unwrap();
            },
            &[("link", What::Link)],
        ),
        ("xattr of a file", |source| xattr::set(source.root().join("a"), "user.k", b"v").unwrap(), &[("a", What::Xattr)]),
        ("xattr of a folder", |source| xattr::set(source.root().join("d"), "user.k", b"v").unwrap(), &[("d", What::Xattr)]),
        ("an xattr that does not count", |source| xattr::set(source.root().join("a"), "user.overlay.opaque", b"y").unwrap(), &[]),
        (
            "a file becomes a folder",
            |source| {
                fs_err::remove_file(source.root().join("a")).unwrap();
                fs_err::create_dir(source.root().join("a")).unwrap();
            },
            &[("a", What::Kind)],
        ),
        (
            "a file is renamed over another",
            |source| fs_err::rename(source.root().join("a"), source.root().join("d/b")).unwrap(),
            &[("a", What::Removed), ("d/b", What::Content)],
        ),
    ];
    for (name, edit, expected) in cases {
        let source = Source::new(&[("a", "one"), ("d/b", "two")]);
        symlink("a", source.root().join("link")).unwrap();
        let before = source.settle();
        let written = fs_err::metadata(source.cache()).unwrap().ino();
        source.scan();
        assert_eq!(fs_err::metadata(source.cache()).unwrap().ino(), written, "{name}: the cache is not written again");
        edit(&source);
        let after = source.scan();
        let found: Vec<(String, What)> =
            changes(&before.listing, &after.listing).into_iter().map(|change| (change.path, change.what)).collect();
        assert_eq!(found, expected.iter().map(|(path, what)| ((*path).to_owned(), *what)).collect::<Vec<_>>(), "{name}");
        assert_eq!(after.listing.digest() == before.listing.digest(), expected.is_empty(), "{name}");
        assert_eq!(source.settle().listing, after.listing, "{name}");
        assert_eq!(scan(&source.root(), &ScanOptions::default()).unwrap().listing, after.listing, "{name}");
    }
}

/// Changes one byte; size and mtime stay.
fn same_size_same_mtime(path: &Path) {
    let before = fs_err::metadata(path).unwrap();
    let file = fs_err::OpenOptions::new().write(true).open(path).unwrap();
    file.file().write_at(b"X", 0).unwrap();
    file.file().set_modified(before.modified().unwrap()).unwrap();
    let after = fs_err::metadata(path).unwrap();
    assert_eq!((before.len(), before.mtime(), before.mtime_nsec()), (after.len(), after.mtime(), after.mtime_nsec()));
}

#[test]
fn a_file_changed_again_in_the_tick_it_was_read_in_is_seen() {
    let source = Source::new(&[("a", "0")]);
    source.settle();
    for round in 1..60 {
        let text = (round % 10).to_string();
        source.write("a", &text);
        source.scan();
        // Same size, and as the clock has not moved in most rounds, the same times.
        let text = ((round + 5) % 10).to_string();
        source.write("a", &text);
        let entry = source.scan().listing.entries[0].clone();
        assert_eq!(entry.kind, Kind::File { executable: false, size: 1, digest: Digest::of(&text) }, "round {round}");
    }
    assert_eq!(source.settle().stats, Stats { read: 0, cached: 1 });
}

#[test]
fn a_cache_that_is_broken_is_written_anew() {
    let source = Source::new(&[("a", "1"), ("b", "2")]);
    let expected = source.settle().listing;
    for broken in [&b""[..], b"pipeline stat cache 0\n", b"\0\0\0\0", &[7; 5000]] {
        fs_err::write(source.cache(), broken).unwrap();
        let scan = source.scan();
        assert_eq!((scan.listing, scan.stats), (expected.clone(), Stats { read: 2, cached: 0 }));
        assert_eq!(source.settle().stats, Stats { read: 0, cached: 2 });
    }
    assert_eq!(fs_err::read_dir(source.dir.path().join("cache")).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn umask_user_and_place_do_not_matter() {
    let make = |mode: u32| {
        let source = Source::new(&[("a", "1"), ("d/b", "2")]);
        for path in ["a", "d/b"] {
            fs_err::set_permissions(source.root().join(path), Permissions::from_mode(mode)).unwrap();
        }
        fs_err::set_permissions(source.root().join("d"), Permissions::from_mode(mode | 0o300)).unwrap();
        source.scan().listing.digest()
    };
    assert_eq!(make(0o600), make(0o666));
}

#[test]
fn many_files_are_hashed_by_several_threads_in_order() {
    let source = Source::new(&[]);
    for number in 0..300 {
        source.write(&format!("f{number:03}"), &format!("{number}"));
    }
    let scan = source.scan();
    for (number, entry) in scan.listing.entries.iter().enumerate() {
        let text = format!("{number}");
        assert_eq!(entry.kind, Kind::File { executable: false, size: text.len() as u64, digest: Digest::of(&text) });
    }
    assert_eq!(scan.stats, Stats { read: 300, cached: 0 });
}
