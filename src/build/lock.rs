//! `pipeline.lock`: what the pipelines of one folder are built from, pinned by digest.
//!
//! It lies beside the pipeline files, is committed with them, and names no host: a package is an
//! archive (origin, suite, component), a path in that archive and a digest; an image is the
//! reference as written and the digest seen. `build` only reads it; `update` moves it.
//!
//! The file is JSON with one package per line and everything sorted, so that `git diff` shows one
//! line for each package that changed:
//!
//! ```text
//! {
//! "format": 1,
//! "images": {
//! "docker.io/library/debian:13": "sha256:…"
//! },
//! "sets": {
//! "trixie-4be19fd04a2c": {
//! "request": {"suite":"trixie","packages":["ca-certificates"],"repositories":[],"on":null},
//! "resolved": "2026-11-20T19:40:00Z",
//! "archives": [
//! {"origin":"Debian","suite":"trixie","component":"main","kind":"main"}
//! ],
//! "packages": [
//! {"name":"adduser","version":"3.152","arch":"all","archive":0,"path":"pool/main/a/adduser/…","sha256":"…","size":…,"date":…},
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::error::Problem;
use crate::oci::digest::Digest;

/// Name of the file, beside the pipeline files.
pub const FILE_NAME: &str = "pipeline.lock";

/// The format this program writes; newer ones are refused.
pub const FORMAT: u32 = 1;

/// Everything pinned for the pipelines of one folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lock {
    /// Reference as written in the pipeline file → digest of the manifest (or index) seen.
    pub images: BTreeMap<String, Digest>,
    /// [`Request::key`] → what it was resolved to.
    pub sets: BTreeMap<String, Set>,
}

/// What was asked of the archives. Its digest is the key of the answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Suite of the archive: `bookworm`, `trixie`, `sid`.
    pub suite: String,
    /// Package names, sorted, without doubles.
    pub packages: Vec<String>,
    /// Extra archives as `DIGEST/SUITE/COMPONENTS`: the digest stands for the address.
    pub repositories: Vec<String>,
    /// What the packages go on top of: the key of another set, or the digest of an image.
    /// `None`: nothing, so the set holds a whole base system.
    pub on: Option<String>,
}

impl Request {
    /// The key in [`Lock::sets`]: the suite and the start of the digest of everything in here.
    pub fn key(&self) -> String {
        let mut hasher = crate::oci::digest::Hasher::new();
        hasher.field(&self.suite).field(self.on.as_deref().unwrap_or_default());
        for list in [&self.packages, &self.repositories] {
            hasher.field((list.len() as u64).to_le_bytes());
            for entry in list {
                hasher.field(entry);
            }
        }
        format!("{}-{}", self.suite, hasher.finish().short())
    }
}

/// The packages a request was resolved to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Set {
    pub request: Request,
    /// RFC 3339, when the archives were asked.
    pub resolved: String,
    pub archives: Vec<Archive>,
    /// Sorted by name.
    pub packages: Vec<Package>,
}

/// A part of an archive, without saying where it lies.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Archive {
    /// The `Origin` of its Release file.
    pub origin: String,
    pub suite: String,
    pub component: String,
    pub kind: ArchiveKind,
    /// Which of the request's extra archives it is (the `DIGEST` there); empty for Debian's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub repository: String,
}

/// Which address an archive is fetched from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ArchiveKind {
    /// The Debian archive: the suite and its updates.
    Main,
    /// The Debian security archive.
    Security,
    /// One of the pipeline file's `repositories`.
    Extra,
}

/// One binary package, pinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    pub name: String,
    pub version: String,
    pub arch: String,
    /// Index in [`Set::archives`].
    pub archive: usize,
    /// From the archive's root, not percent-encoded.
    pub path: String,
    #[serde(with = "hex_digest")]
    pub sha256: Digest,
    /// Bytes.
    pub size: u64,
    /// When the package was built, in seconds since 1970: the date of the first member of the `.deb`.
    pub date: i64,
}

/// A package that differs between two sets; `None` where it is not in that set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PackageChange {
    pub name: String,
    pub old: Option<String>,
    pub new: Option<String>,
}

impl Set {
    /// `SOURCE_DATE_EPOCH` of the layer: the date of the newest package, 0 for an empty set.
    pub fn epoch(&self) -> i64 {
        self.packages.iter().map(|package| package.date).max().unwrap_or(0)
    }

    /// The digest of the packages alone: the same packages give the same layer, whenever and for
    /// whatever request they were resolved.
    pub fn digest(&self) -> Digest {
        let mut hasher = crate::oci::digest::Hasher::new();
        for package in &self.packages {
            hasher.field(&package.name).field(package.sha256.bytes()).field(package.date.to_le_bytes());
        }
        hasher.finish()
    }
}

/// What changed from `old` to `new`, sorted by name. The same version with other bytes counts.
pub fn diff(old: &Set, new: &Set) -> Vec<PackageChange> {
    fn by_name(set: &Set) -> BTreeMap<(&str, &str), &Package> {
        set.packages.iter().map(|package| ((package.name.as_str(), package.arch.as_str()), package)).collect()
    }
    // `all` may become `amd64` between versions: the architecture is no part of the identity
    // unless one set holds the same name twice.
    let (old, new) = (by_name(old), by_name(new));
    let mut names: Vec<&str> = old.keys().chain(new.keys()).map(|(name, _)| *name).collect();
    names.sort_unstable();
    names.dedup();
    let versions = |set: &BTreeMap<(&str, &str), &Package>, name: &str| -> Option<(String, Vec<Digest>)> {
        let found: Vec<&&Package> = set.iter().filter(|((n, _), _)| *n == name).map(|(_, package)| package).collect();
        (!found.is_empty()).then(|| {
            let text = found.iter().map(|package| package.version.as_str()).collect::<Vec<_>>().join(", ");
            (text, found.iter().map(|package| package.sha256).collect())
        })
    };
    names
        .into_iter()
        .filter_map(|name| {
            let (before, after) = (versions(&old, name), versions(&new, name));
            (before.as_ref().map(|b| &b.1) != after.as_ref().map(|a| &a.1)).then(|| PackageChange {
                name: name.into(),
                old: before.map(|b| b.0),
                new: after.map(|a| a.0),
            })
        })
        .collect()
}

#[derive(Deserialize)]
struct Header {
    format: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LockFile {
    format: u32,
    images: BTreeMap<String, Digest>,
    sets: BTreeMap<String, Set>,
}

/// Reads the text of a lock file.
///
/// # Errors
/// A [`Problem`] of kind usage for another format, text that is not ours, a set whose key is not
/// its request's, and a package that names an archive that is not there.
pub fn parse(text: &str) -> Result<Lock> {
    let broken = |error: String| {
        Problem::usage(format!("`{FILE_NAME}` cannot be read: {error}")).hint(format!(
            "take the committed `{FILE_NAME}` back (`git checkout {FILE_NAME}`), or make a new one with `pipeline update`"
        ))
    };
    let file: LockFile = match serde_json::from_str(text) {
        Ok(file) => file,
        Err(error) => {
            // A newer format may have any shape; say that first.
            return Err(match serde_json::from_str::<Header>(text) {
                Ok(header) if header.format != FORMAT => other_format(header.format).into(),
                _ => broken(error.to_string()).into(),
            });
        }
    };
    if file.format != FORMAT {
        return Err(other_format(file.format).into());
    }
    for (key, set) in &file.sets {
        if *key != set.request.key() {
            return Err(broken(format!("the request of set `{key}` was changed by hand")).into());
        }
        if let Some(package) = set.packages.iter().find(|package| package.archive >= set.archives.len()) {
            return Err(broken(format!(
                "package `{}` of set `{key}` names archive {}, which is not there",
                package.name, package.archive
            ))
            .into());
        }
        if let Some(package) = set.packages.iter().find(|package| !is_inside(&package.path)) {
            return Err(broken(format!("package `{}` of set `{key}` has the path `{}`", package.name, package.path)).into());
        }
    }
    Ok(Lock { images: file.images, sets: file.sets })
}

fn other_format(format: u32) -> Problem {
    Problem::usage(format!("`{FILE_NAME}` has format {format}; this program reads format {FORMAT}"))
        .hint("use the version of pipeline that wrote it, or a newer one")
}

/// Whether a path stays below where it starts and holds nothing a URI or a command line would trip over.
fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with('/')
        && !path.split('/').any(|part| part == "..")
        && path.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'\'' | b'"' | b'\\'))
}

/// Reads `DIR/pipeline.lock`; `None` when there is none.
pub fn load(dir: &Path) -> Result<Option<Lock>> {
    let path = dir.join(FILE_NAME);
    let text = match fs_err::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    parse(&text).map(Some).with_context(|| format!("cannot use `{}`", path.display()))
}

/// The text of a lock: one package per line, everything in a fixed order.
pub fn format(lock: &Lock) -> String {
    let mut out = String::new();
    let _ = write!(out, "{{\n\"format\": {FORMAT},\n\"images\": {{\n");
    let images = lock.images.iter().map(|(reference, digest)| format!("{}: {}", json(reference), json(digest)));
    lines(&mut out, images);
    out.push_str("},\n\"sets\": {\n");
    lines(&mut out, lock.sets.iter().map(|(key, set)| format!("{}: {}", json(key), format_set(set))));
    out.push_str("}\n}\n");
    out
}

fn format_set(set: &Set) -> String {
    let mut out = String::new();
    let _ = write!(out, "{{\n\"request\": {},\n\"resolved\": {},\n\"archives\": [\n", json(&set.request), json(&set.resolved));
    lines(&mut out, set.archives.iter().map(json));
    out.push_str("],\n\"packages\": [\n");
    lines(&mut out, set.packages.iter().map(json));
    out.push_str("]\n}");
    out
}

/// One entry per line, with commas between.
fn lines(out: &mut String, entries: impl Iterator<Item = String>) {
    let mut first = true;
    for entry in entries {
        if !std::mem::take(&mut first) {
            out.push_str(",\n");
        }
        out.push_str(&entry);
    }
    if !first {
        out.push('\n');
    }
}

fn json<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("these types have string keys and no failing serializer")
}

/// Writes `DIR/pipeline.lock` (temporary name, fsync, rename, fsync of the folder) and returns its
/// path. A lock that says the same already is left alone.
pub fn save(dir: &Path, lock: &Lock) -> Result<PathBuf> {
    let path = dir.join(FILE_NAME);
    let text = format(lock);
    if fs_err::read(&path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(path);
    }
    let mut file = tempfile::Builder::new()
        .prefix(".pipeline.lock.")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(dir)
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.as_file().sync_all())
        .with_context(|| format!("cannot write `{}`", path.display()))?;
    file.persist(&path).map_err(|error| error.error).with_context(|| format!("cannot write `{}`", path.display()))?;
    fs_err::File::open(dir)?.sync_all()?;
    Ok(path)
}

/// A digest as its 64 digits alone: shorter lines, and what `sha256sum` prints.
mod hex_digest {
    use serde::{Deserialize as _, Deserializer, Serializer};

    use crate::oci::digest::Digest;

    pub fn serialize<S: Serializer>(digest: &Digest, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&digest.hex())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn package(name: &str, version: &str, date: i64) -> Package {
        Package {
            name: name.into(),
            version: version.into(),
            arch: "amd64".into(),
            archive: 0,
            path: format!("pool/main/{name}_{version}_amd64.deb"),
            sha256: Digest::of(format!("{name} {version}")),
            size: 1000,
            date,
        }
    }

    pub(crate) fn set(packages: Vec<Package>) -> Set {
        Set {
            request: Request { suite: "trixie".into(), packages: vec!["b".into()], repositories: vec![], on: None },
            resolved: "2026-11-20T19:40:00Z".into(),
            archives: vec![Archive {
                origin: "Debian".into(),
                suite: "trixie".into(),
                component: "main".into(),
                kind: ArchiveKind::Main,
                repository: String::new(),
            }],
            packages,
        }
    }

    fn lock(packages: Vec<Package>) -> Lock {
        let set = set(packages);
        Lock {
            images: BTreeMap::from([("docker.io/library/debian:13".to_owned(), Digest::of("image"))]),
            sets: BTreeMap::from([(set.request.key(), set)]),
        }
    }

    #[test]
    fn text_is_one_package_per_line_and_reads_back() {
        let lock = lock(vec![package("a", "1.0", 10), package("b", "2:1~rc1", 20)]);
        let text = format(&lock);
        let a = Digest::of("a 1.0").hex();
        let b = Digest::of("b 2:1~rc1").hex();
        let image = Digest::of("image");
        assert_eq!(
            text,
            format!(
                r#"{{
"format": 1,
"images": {{
"docker.io/library/debian:13": "{image}"
}},
"sets": {{
"trixie-a914a2a6ea2d": {{
"request": {{"suite":"trixie","packages":["b"],"repositories":[],"on":null}},
"resolved": "2026-11-20T19:40:00Z",
"archives": [
{{"origin":"Debian","suite":"trixie","component":"main","kind":"main"}}
],
"packages": [
{{"name":"a","version":"1.0","arch":"amd64","archive":0,"path":"pool/main/a_1.0_amd64.deb","sha256":"{a}","size":1000,"date":10}},
{{"name":"b","version":"2:1~rc1","arch":"amd64","archive":0,"path":"pool/main/b_2:1~rc1_amd64.deb","sha256":"{b}","size":1000,"date":20}}
]
}}
}}
}}
"#
            )
        );
        assert_eq!(parse(&text).unwrap(), lock);
        assert_eq!(parse(&format(&Lock::default())).unwrap(), Lock::default());
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let good = format(&lock(vec![package("a", "1.0", 10)]));
        let cases = [
            ("{", "`pipeline.lock` cannot be read: EOF while parsing an object at line 1 column 1"),
            (r#"{"format": 2, "new": true}"#, "`pipeline.lock` has format 2; this program reads format 1"),
            (r#"{"format": 2, "images": {}, "sets": {}}"#, "`pipeline.lock` has format 2; this program reads format 1"),
        ];
        for (text, message) in cases {
            let error = parse(text).unwrap_err();
            assert_eq!((error.to_string().as_str(), crate::error::exit_code(&error)), (message, 2), "{text}");
        }
        let cases = [
            (r#""packages":["b"]"#, r#""packages":["c"]"#, "was changed by hand"),
            (r#""archive":0"#, r#""archive":1"#, "names archive 1, which is not there"),
            ("pool/main/a_", "../a_", "has the path `../a_1.0_amd64.deb`"),
        ];
        for (from, to, message) in cases {
            let text = good.replace(from, to);
            assert_ne!(text, good, "{from}");
            let error = parse(&text).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn differences_and_epoch() {
        let old = set(vec![package("a", "1", 5), package("b", "1", 9), package("c", "1", 2)]);
        let new = set(vec![package("a", "2", 11), package("c", "1", 2), package("d", "1", 3)]);
        let change = |name: &str, old: Option<&str>, new: Option<&str>| PackageChange {
            name: name.into(),
            old: old.map(Into::into),
            new: new.map(Into::into),
        };
        assert_eq!(
            diff(&old, &new),
            [change("a", Some("1"), Some("2")), change("b", Some("1"), None), change("d", None, Some("1"))]
        );
        assert_eq!(diff(&new, &new), []);
        assert_eq!((old.epoch(), new.epoch(), set(vec![]).epoch()), (9, 11, 0));
        assert_ne!(old.digest(), new.digest());
    }

    #[test]
    fn keys_tell_requests_apart() {
        let request = |packages: &[&str], on: Option<&str>| {
            let packages = packages.iter().map(|&p| p.to_owned()).collect();
            Request { suite: "sid".into(), packages, repositories: vec![], on: on.map(Into::into) }.key()
        };
        let keys =
            [request(&["ab", "c"], None), request(&["a", "bc"], None), request(&["ab", "c"], Some("x")), request(&[], None)];
        let unique: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(unique.len(), keys.len());
        assert!(keys.iter().all(|key| key.starts_with("sid-") && key.len() == 16), "{keys:?}");
    }

    #[test]
    fn saving_replaces_atomically_and_leaves_the_same_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(load(dir.path()).unwrap(), None);
        let first = lock(vec![package("a", "1.0", 10)]);
        let path = save(dir.path(), &first).unwrap();
        let before = fs_err::metadata(&path).unwrap();
        save(dir.path(), &first).unwrap();
        let same = fs_err::metadata(&path).unwrap();
        use std::os::unix::fs::MetadataExt as _;
        assert_eq!((before.ino(), before.mode() & 0o777), (same.ino(), 0o644));
        let second = lock(vec![package("a", "1.1", 12)]);
        save(dir.path(), &second).unwrap();
        assert_eq!(load(dir.path()).unwrap(), Some(second));
        assert_eq!(fs_err::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn four_hundred_packages_are_read_quickly() {
        let text = format(&lock((0..400).map(|i| package(&format!("package-{i:03}"), "1.0-1", i)).collect()));
        let best = (0..5)
            .map(|_| {
                let start = std::time::Instant::now();
                parse(&text).unwrap();
                start.elapsed()
            })
            .min()
            .unwrap();
        assert!(best < std::time::Duration::from_millis(3), "{best:?}");
    }
}
