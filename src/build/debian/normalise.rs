//! Takes out of a tree what is different every time it is made: a written list, one line and one
//! reason each, found by making trees on different days, machines, users and clocks and comparing
//! every byte.
//!
//! Works on a whole tree or on the upper directory of an overlay, in the namespace that owns it.
//! There, whiteouts (character devices 0/0) are never touched, and removing a file that a lower
//! layer has too lets that one show, which went through the same list. Symbolic links are never
//! followed.

use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::Result;

/// What made the tree; each includes the ones before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Origin {
    /// Somebody's script: only what no image may carry.
    Step,
    /// Packages installed by [`super::bootstrap::install_script`].
    Packages,
    /// A tree made by [`super::bootstrap::bootstrap`].
    Bootstrap,
}

/// Bytes [`Action::RemoveWhen`] looks at.
const HEAD: u64 = 16;

/// One line of the list.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// From the tree's root; `*` is anything within a name, `**` any number of folders. The first
    /// rule that fits counts.
    pub pattern: &'static str,
    pub action: Action,
    /// The least [`Origin`] it is for.
    pub from: Origin,
    pub reason: &'static str,
}

/// What is done with what a pattern fits.
#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// Left as it is, with everything below.
    Keep,
    /// Removed, a folder with everything below.
    Remove,
    /// Removed when it is a regular file.
    RemoveFile,
    /// Removed when it is a symbolic link whose target ends like this.
    RemoveLinkTo(&'static str),
    /// A regular file is made empty; its mode and owner stay.
    Empty,
    /// Removed when it is a regular file whose first [`HEAD`] bytes are such.
    RemoveWhen(fn(&[u8]) -> bool),
}

const fn rule(from: Origin, pattern: &'static str, action: Action, reason: &'static str) -> Rule {
    Rule { pattern, action, from, reason }
}

use Action::{Empty, Keep, Remove, RemoveFile, RemoveLinkTo, RemoveWhen};
use Origin::{Bootstrap, Packages, Step};

/// The list.
pub const RULES: &[Rule] = &[
    // Of the machine that builds.
    rule(Bootstrap, "etc/resolv.conf", Remove, "mmdebstrap copies the building machine's"),
    rule(Bootstrap, "etc/hostname", Remove, "mmdebstrap copies the building machine's"),
    rule(Bootstrap, "etc/apt/sources.list", Remove, "names the throw-away repository"),
    rule(Bootstrap, "etc/apt/sources.list.d/0000*", Remove, "names the throw-away repository"),
    rule(Bootstrap, "etc/apt/apt.conf.d/*mmdebstrap", Remove, "options of the bootstrap only"),
    rule(Bootstrap, "etc/dpkg/dpkg.cfg.d/*mmdebstrap", Remove, "options of the bootstrap only: dpkg must sync again"),
    // There only while something runs.
    rule(Step, "run/lock", Keep, "base-files makes it, and /var/lock points at it"),
    rule(Step, "run/*", Remove, "a tmpfs when the tree runs"),
    rule(Step, "tmp/*", Remove, "temporary"),
    rule(Step, "var/tmp/*", Remove, "temporary"),
    rule(Step, "dev/*", Remove, "made by whoever runs the tree"),
    rule(Packages, "proc/*", Remove, "mount point"),
    rule(Packages, "sys/*", Remove, "mount point"),
    // Identities, keys and randomness: one for each machine, made when it first starts.
    rule(Step, "etc/machine-id", Empty, "random; empty means it is made at first boot (machine-id(5))"),
    rule(Step, "var/lib/dbus/machine-id", RemoveFile, "random; a link to /etc/machine-id stays"),
    rule(Packages, "etc/ssh/ssh_host_*", Remove, "random keys, made by openssh-server's postinst"),
    rule(Packages, "etc/ssl/private/ssl-cert-snakeoil.key", Remove, "random key, made by ssl-cert's postinst"),
    rule(Packages, "etc/ssl/certs/ssl-cert-snakeoil.pem", Remove, "certificate of that key"),
    rule(Packages, "etc/ssl/certs/*", RemoveLinkTo("ssl-cert-snakeoil.pem"), "its subject hash, of the host name"),
    rule(Step, "var/lib/systemd/random-seed", Remove, "random"),
    rule(Step, "var/lib/systemd/credential.secret", Remove, "random key"),
    rule(Step, "var/lib/urandom/random-seed", Remove, "random"),
    rule(Step, "boot/**/random-seed", Remove, "random, made by bootctl"),
    rule(Packages, "etc/iscsi/initiatorname.iscsi", Remove, "random, made by open-iscsi's postinst"),
    rule(Packages, "etc/hostid", Remove, "random, made by zfsutils"),
    rule(Packages, "var/lib/NetworkManager/secret_key", Remove, "random key"),
    // Logs of the installation: dates in every line.
    rule(Packages, "var/log/apt/*", Remove, "log with dates"),
    rule(Packages, "var/log/dpkg.log", Remove, "log with dates"),
    rule(Packages, "var/log/alternatives.log", Remove, "log with dates"),
    rule(Packages, "var/log/bootstrap.log", Remove, "log with dates"),
    rule(Packages, "var/log/fontconfig.log", Remove, "log with dates"),
    rule(Packages, "var/log/journal/*", Remove, "log, and named by the machine-id"),
    rule(Packages, "var/log/**", Empty, "log; the file itself, its owner and mode may be wanted"),
    // Caches that are made anew when they are missed, and hold dates, inodes or an order of the day.
    rule(Packages, "var/lib/apt/lists/*", Remove, "apt's lists of the throw-away repository"),
    rule(Packages, "var/cache/apt/archives/*", Remove, "downloaded packages, lock, and partial/ with the owner of the day"),
    rule(Packages, "var/cache/apt/*.bin", Remove, "apt's cache: addresses and dates"),
    rule(Packages, "var/cache/apt/*.bin.*", Remove, "apt's cache, half written"),
    rule(Step, "var/cache/ldconfig/aux-cache", Remove, "inodes and dates of libraries"),
    rule(Packages, "var/cache/man/*", Remove, "mandb's index: dates"),
    rule(Packages, "var/cache/fontconfig/*", Remove, "named and filled by dates of folders"),
    rule(Packages, "var/cache/debconf/*-old", Remove, "state before the last package, by order of installation"),
    rule(Packages, "var/cache/debconf/tmp.ci", Remove, "made by the debconf of the building machine"),
    rule(Packages, "var/cache/dictionaries-common/*.db-old", Remove, "state before the last package"),
    rule(
        Packages,
        "**/*.pyc",
        RemoveWhen(is_dated),
        "byte code tied to dates of sources; tied to their hash it is the same each time",
    ),
    rule(Packages, "**/*.pyo", RemoveFile, "byte code of Python 2, always tied to dates"),
    // Backups and locks of what wrote the real file.
    rule(Packages, "var/lib/dpkg/*-old", Remove, "state before the last package, by order of installation"),
    rule(Packages, "var/lib/dpkg/lock*", Remove, "lock"),
    rule(Packages, "var/lib/dpkg/triggers/Lock", Remove, "lock"),
    rule(Packages, "var/backups/*", Remove, "backups, by day"),
    rule(Packages, "etc/passwd-", Remove, "state before the last user"),
    rule(Packages, "etc/group-", Remove, "state before the last group"),
    rule(Packages, "etc/shadow-", Remove, "state before the last user"),
    rule(Packages, "etc/gshadow-", Remove, "state before the last group"),
    rule(Packages, "etc/subuid-", Remove, "state before the last user"),
    rule(Packages, "etc/subgid-", Remove, "state before the last user"),
    rule(Packages, "etc/.pwd.lock", Remove, "lock"),
    // Of kernels.
    rule(Packages, "boot/initrd.img-*", Remove, "dates, and the building machine's modules; a host brings its own"),
    rule(Packages, "initrd.img", RemoveLinkTo(""), "points at the above"),
    rule(Packages, "initrd.img.old", RemoveLinkTo(""), "points at the above"),
];

/// What was done to one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// From the tree's root.
    pub path: String,
    pub reason: &'static str,
}

/// Applies the list to the tree or upper directory at `root`, made by `origin`. Returns what was
/// changed, sorted by path; a second time changes nothing.
pub fn apply(root: &Path, origin: Origin) -> Result<Vec<Change>> {
    let rules: Vec<(Vec<&[u8]>, &Rule)> = RULES
        .iter()
        .filter(|rule| rule.from <= origin)
        .map(|rule| (rule.pattern.split('/').map(str::as_bytes).collect(), rule))
        .collect();
    let mut changes = Vec::new();
    walk(root, &mut Vec::new(), &rules, &mut changes)?;
    changes.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(changes)
}

fn walk(dir: &Path, parents: &mut Vec<Vec<u8>>, rules: &[(Vec<&[u8]>, &Rule)], changes: &mut Vec<Change>) -> Result<()> {
    use std::os::unix::ffi::OsStringExt as _;
    let mut entries = fs_err::read_dir(dir)?.collect::<std::io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs_err::DirEntry::file_name);
    for entry in entries {
        parents.push(entry.file_name().into_vec());
        let path = entry.path();
        let kind = entry.file_type()?;
        let rule = rules.iter().find(|(pattern, _)| fits(pattern, parents)).map(|(_, rule)| *rule);
        let is_whiteout = kind.is_char_device() && fs_err::symlink_metadata(&path)?.rdev() == 0;
        let mut descend = kind.is_dir();
        if let Some(rule) = rule.filter(|_| !is_whiteout) {
            if act(&path, kind, rule.action)? {
                let name = String::from_utf8_lossy(&parents.join(&b'/')).into_owned();
                changes.push(Change { path: name, reason: rule.reason });
            }
            descend &= !matches!(rule.action, Keep | Remove);
        }
        if descend {
            walk(&path, parents, rules, changes)?;
        }
        parents.pop();
    }
    Ok(())
}

/// Does one action; whether it changed anything.
fn act(path: &Path, kind: std::fs::FileType, action: Action) -> Result<bool> {
    match action {
        Keep => Ok(false),
        Remove if kind.is_dir() => Ok(fs_err::remove_dir_all(path).map(|()| true)?),
        Remove => Ok(fs_err::remove_file(path).map(|()| true)?),
        RemoveFile if kind.is_file() => Ok(fs_err::remove_file(path).map(|()| true)?),
        RemoveLinkTo(end) if kind.is_symlink() => {
            let target = fs_err::read_link(path)?;
            let fits = target.to_string_lossy().ends_with(end);
            if fits {
                fs_err::remove_file(path)?;
            }
            Ok(fits)
        }
        Empty if kind.is_file() => {
            let empty = fs_err::symlink_metadata(path)?.len() == 0;
            if !empty {
                truncate(path)?;
            }
            Ok(!empty)
        }
        RemoveWhen(is_such) if kind.is_file() => {
            let mut head = Vec::new();
            fs_err::File::open(path)?.take(HEAD).read_to_end(&mut head)?;
            let fits = is_such(&head);
            if fits {
                fs_err::remove_file(path)?;
            }
            Ok(fits)
        }
        RemoveFile | RemoveLinkTo(_) | RemoveWhen(_) | Empty => Ok(false),
    }
}

/// Makes a file empty; owner, mode and xattrs stay. The namespace's root may write a file without
/// write permission (machine-id is 0444); for another user the mode is lent.
fn truncate(path: &Path) -> Result<()> {
    let permissions = fs_err::symlink_metadata(path)?.permissions();
    if permissions.readonly() {
        fs_err::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    }
    fs_err::File::options().write(true).truncate(true).open(path)?;
    // Also when it was writable: writing takes setuid and setgid away.
    fs_err::set_permissions(path, permissions)?;
    Ok(())
}

/// Whether byte code is tied to the date of its source: bit 0 of the flags after the magic number
/// is clear (PEP 552). Under `SOURCE_DATE_EPOCH` Python ties it to the source's hash instead.
fn is_dated(head: &[u8]) -> bool {
    head.get(4..8).is_none_or(|flags| flags[0] & 1 == 0)
}

/// Whether a pattern's parts fit a path's.
fn fits(pattern: &[&[u8]], path: &[Vec<u8>]) -> bool {
    match (pattern, path) {
        ([], []) => true,
        ([b"**"], _) => !path.is_empty(),
        ([b"**", rest @ ..], _) => fits(rest, path) || path.split_first().is_some_and(|(_, below)| fits(pattern, below)),
        ([part, rest @ ..], [name, below @ ..]) => fits_name(part, name) && fits(rest, below),
        _ => false,
    }
}

/// Whether a name fits a part of a pattern, in which `*` is anything.
fn fits_name(part: &[u8], name: &[u8]) -> bool {
    match part.iter().position(|&byte| byte == b'*') {
        None => part == name,
        Some(star) => {
            let (start, end) = (&part[..star], &part[star + 1..]);
            name.starts_with(start) && (0..=name.len() - start.len()).any(|skip| fits_name(end, &name[start.len() + skip..]))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn make(root: &Path, files: &[(&str, &str)]) {
        for (path, text) in files {
            let path = root.join(path);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            fs_err::write(path, text).unwrap();
        }
    }

    /// Path → text of the files, target of the links.
    fn read(root: &Path) -> BTreeMap<String, String> {
        fn walk(root: &Path, dir: &Path, out: &mut BTreeMap<String, String>) {
            for entry in fs_err::read_dir(dir).unwrap().map(Result::unwrap) {
                let (path, kind) = (entry.path(), entry.file_type().unwrap());
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                if kind.is_dir() {
                    walk(root, &path, out);
                } else if kind.is_symlink() {
                    out.insert(name, format!("-> {}", fs_err::read_link(&path).unwrap().display()));
                } else {
                    out.insert(name, fs_err::read_to_string(&path).unwrap());
                }
            }
        }
        let mut out = BTreeMap::new();
        walk(root, root, &mut out);
        out
    }

    const FILES: [(&str, &str); 14] = [
        ("etc/hostname", "build"),
        ("etc/machine-id", "0123"),
        ("etc/passwd", "root"),
        ("etc/passwd-", "old"),
        ("etc/ssh/ssh_host_rsa_key", "key"),
        ("etc/ssh/sshd_config", "Port 22"),
        ("run/lock/keep", "x"),
        ("run/x/y", "x"),
        ("usr/lib/python3/__pycache__/a.pyc", "\u{3}\r\r\n\0\0\0\0dated"),
        ("usr/lib/python3/__pycache__/b.pyc", "\u{3}\r\r\n\u{3}\0\0\0hashed"),
        ("usr/lib/python3/a.py", "pass"),
        ("var/cache/apt/pkgcache.bin", "x"),
        ("var/log/apt/history.log", "x"),
        ("var/log/nginx/error.log", "x"),
    ];

    #[test]
    fn what_moves_is_taken_out_by_origin() {
        let stays = [
            ("etc/passwd", "root"),
            ("etc/ssh/sshd_config", "Port 22"),
            ("run/lock/keep", "x"),
            ("usr/lib/python3/a.py", "pass"),
            ("etc/machine-id", ""),
            ("usr/lib/python3/__pycache__/b.pyc", "\u{3}\r\r\n\u{3}\0\0\0hashed"),
            ("var/log/nginx/error.log", ""),
        ];
        let packages: Vec<_> = stays.iter().chain(&[("etc/hostname", "build")]).copied().collect();
        let mut step = FILES.to_vec();
        step.retain(|(path, _)| *path != "run/x/y");
        step.iter_mut().find(|(path, _)| *path == "etc/machine-id").unwrap().1 = "";
        for (origin, expected) in [(Step, step), (Packages, packages), (Bootstrap, stays.to_vec())] {
            let dir = tempfile::tempdir().unwrap();
            make(dir.path(), &FILES);
            fs_err::set_permissions(dir.path().join("etc/machine-id"), std::fs::Permissions::from_mode(0o444)).unwrap();
            let changes = apply(dir.path(), origin).unwrap();
            let expected: BTreeMap<String, String> =
                expected.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
            assert_eq!(read(dir.path()), expected, "{origin:?}");
            assert_eq!(fs_err::metadata(dir.path().join("etc/machine-id")).unwrap().mode() & 0o7777, 0o444);
            assert!(changes.iter().any(|change| change.path == "run/x"), "{changes:?}");
            assert_eq!(apply(dir.path(), origin).unwrap(), [], "{origin:?}");
        }
    }

    #[test]
    fn links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        make(outside.path(), &[("machine-id", "0123"), ("lock/x", "x")]);
        make(dir.path(), &[("etc/ssl/certs/real.pem", "x"), ("var/lib/x", "")]);
        let link = |target: &Path, path: &str| {
            fs_err::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
            symlink(target, dir.path().join(path)).unwrap();
        };
        link(&outside.path().join("machine-id"), "etc/machine-id");
        link(Path::new("/etc/machine-id"), "var/lib/dbus/machine-id");
        link(outside.path(), "tmp");
        link(Path::new("ssl-cert-snakeoil.pem"), "etc/ssl/certs/0a1b2c3d.0");
        link(Path::new("real.pem"), "etc/ssl/certs/9a1b2c3d.0");
        link(Path::new("boot/initrd.img-6"), "initrd.img");
        let changes: Vec<String> = apply(dir.path(), Packages).unwrap().into_iter().map(|change| change.path).collect();
        assert_eq!(changes, ["etc/ssl/certs/0a1b2c3d.0", "initrd.img"]);
        assert_eq!(read(outside.path()), BTreeMap::from([("machine-id".into(), "0123".into()), ("lock/x".into(), "x".into())]));
    }

    #[test]
    fn patterns() {
        let cases = [
            ("a/b", "a/b", true),
            ("a/b", "a/b/c", false),
            ("a/*", "a/b", true),
            ("a/*", "a/b/c", false),
            ("a/**", "a/b/c", true),
            ("a/**", "a", false),
            ("**/x", "x", true),
            ("**/x", "a/b/x", true),
            ("**/*.pyc", "a/b.pyc", true),
            ("a/**/x", "a/x", true),
            ("boot/initrd.img-*", "boot/initrd.img-6.1", true),
            ("x*y*z", "x1y2z", true),
            ("x*y*z", "x1y2", false),
            ("xx*", "x", false),
        ];
        for (pattern, path, expected) in cases {
            let parts: Vec<&[u8]> = pattern.split('/').map(str::as_bytes).collect();
            let path_parts: Vec<Vec<u8>> = path.split('/').map(|part| part.as_bytes().to_vec()).collect();
            assert_eq!(fits(&parts, &path_parts), expected, "{pattern} {path}");
        }
        for rule in RULES {
            assert!(!rule.pattern.starts_with('/') && !rule.reason.is_empty(), "{rule:?}");
        }
    }
}
