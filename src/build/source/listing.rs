//! A listing: every file, folder and link of a source as a value with a digest.
//!
//! Only what a build may depend on is in it: path, kind, the executable bit, size and content digest of files, link
//! targets, and the extended attributes `user.*` (without `user.overlay.*`) and `security.capability`. No times, owners,
//! inode numbers or umask: modes are 0755 for a folder or a file its owner may execute, else 0644, as Git has them.
//! A folder with nothing listed in it is an entry too, so an empty folder of a work tree reaches the build.
//!
//! The binary form of [`Listing::encode`] is canonical: the same listing has the same bytes, and its digest is theirs.
//! Integers are little endian, every string has its length (u32) before it:
//! `"pipeline listing 1\n"`, number of entries, then per entry: path, tag (0 folder, 1 file, 2 executable file, 3 link),
//! for files size (u64) and digest (32 bytes), for links the target, number of attributes and name and value of each.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use crate::error::Problem;
use crate::oci::digest::Digest;

const MAGIC: &[u8] = b"pipeline listing 1\n";

/// What a source holds; sorted by the bytes of the paths, each path once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    pub entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the source's root, without a leading `./`; any bytes but NUL.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Names and values, sorted by name.
    pub xattrs: Xattrs,
}

/// Extended attributes: names and values, sorted by name.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File {
        executable: bool,
        /// Bytes.
        size: u64,
        digest: Digest,
    },
    Symlink {
        target: Vec<u8>,
    },
}

/// A difference between two listings.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Change {
    /// Bytes that are not UTF-8 are replaced.
    pub path: String,
    pub what: What,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.what {
            What::Added => "is new",
            What::Removed => "is gone",
            What::Content => "changed",
            What::Mode => "changed its mode",
            What::Link => "points elsewhere",
            What::Xattr => "changed its xattrs",
            What::Kind => "is of another kind",
        };
        write!(f, "file `{}` {what}", self.path)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    Added,
    Removed,
    /// The bytes of a file.
    Content,
    /// The executable bit.
    Mode,
    /// The target of a symbolic link.
    Link,
    Xattr,
    /// A file became a link, a folder a file, …
    Kind,
}

impl Entry {
    /// The path for people.
    pub fn name(&self) -> String {
        String::from_utf8_lossy(&self.path).into_owned()
    }
}

impl Listing {
    /// The digest of [`Listing::encode`].
    pub fn digest(&self) -> Digest {
        Digest::of(self.encode())
    }

    /// The entry of a path.
    pub fn get(&self, path: &[u8]) -> Option<&Entry> {
        self.entries.binary_search_by(|entry| entry.path.as_slice().cmp(path)).ok().map(|at| &self.entries[at])
    }

    /// The canonical bytes; see the module.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(MAGIC.len() + self.entries.len() * 96);
        out.extend(MAGIC);
        put_length(&mut out, self.entries.len());
        for entry in &self.entries {
            put(&mut out, &entry.path);
            match &entry.kind {
                Kind::Directory => out.push(0),
                Kind::File { executable, size, digest } => {
                    out.push(if *executable { 2 } else { 1 });
                    out.extend(size.to_le_bytes());
                    out.extend(digest.bytes());
                }
                Kind::Symlink { target } => {
                    out.push(3);
                    put(&mut out, target);
                }
            }
            put_xattrs(&mut out, &entry.xattrs);
        }
        out
    }

    /// What [`Listing::encode`] made; anything else is an error.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = Reader(bytes);
        if reader.take(MAGIC.len())? != MAGIC {
            bail!("not a listing of this version");
        }
        let count = reader.length()?;
        let mut entries: Vec<Entry> = Vec::with_capacity(count.min(bytes.len() / 8));
        for _ in 0..count {
            let path = reader.string()?.to_vec();
            let kind = match reader.u8()? {
                0 => Kind::Directory,
                tag @ (1 | 2) => Kind::File { executable: tag == 2, size: reader.u64()?, digest: reader.digest()? },
                3 => Kind::Symlink { target: reader.string()?.to_vec() },
                tag => bail!("listing holds the unknown kind {tag}"),
            };
            let xattrs = reader.xattrs()?;
            if entries.last().is_some_and(|last| last.path >= path) {
                bail!("listing is not sorted");
            }
            entries.push(Entry { path, kind, xattrs });
        }
        if !reader.0.is_empty() {
            bail!("listing has bytes after its end");
        }
        Ok(Self { entries })
    }

    /// The part of the listing that `globs` name, with the folders it lies in.
    ///
    /// Globs start at the root (`requirements.txt`, `requirements/*.txt`, `**/package.json`); `*` does not cross `/`.
    /// A folder that matches brings everything below it; `!glob` takes out what earlier globs took in.
    ///
    /// # Errors
    /// A glob that cannot be parsed.
    pub fn filter(&self, globs: &[String]) -> Result<Listing> {
        let globs = anchored(globs)?;
        let mut taken: BTreeSet<&[u8]> = BTreeSet::new();
        let mut verdicts: std::collections::HashMap<&[u8], bool> = std::collections::HashMap::new();
        for entry in &self.entries {
            let directory = matches!(entry.kind, Kind::Directory);
            let inherited = parent(&entry.path).is_some_and(|parent| verdicts.get(parent).copied().unwrap_or(false));
            let verdict = match globs.matched(as_path(&entry.path), directory) {
                Match::Ignore(_) => true,
                Match::Whitelist(_) => false,
                Match::None => inherited,
            };
            if directory {
                verdicts.insert(&entry.path, verdict);
            }
            let mut path = Some(entry.path.as_slice()).filter(|_| verdict);
            while let Some(name) = path {
                taken.insert(name);
                path = parent(name);
            }
        }
        Ok(Listing { entries: self.entries.iter().filter(|entry| taken.contains(entry.path.as_slice())).cloned().collect() })
    }
}

/// What is different in `new`, sorted by path. An entry with several differences is there once for each.
pub fn changes(old: &Listing, new: &Listing) -> Vec<Change> {
    let mut changes = Vec::new();
    let (mut olds, mut news) = (old.entries.iter().peekable(), new.entries.iter().peekable());
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => return changes,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(old), Some(new)) => old.path.cmp(&new.path),
        };
        let before = if order.is_le() { olds.next() } else { None };
        let after = if order.is_ge() { news.next() } else { None };
        for what in differences(before, after) {
            let entry = before.or(after).expect("one of the two was peeked");
            changes.push(Change { path: entry.name(), what });
        }
    }
}

fn differences(old: Option<&Entry>, new: Option<&Entry>) -> Vec<What> {
    let (old, new) = match (old, new) {
        (Some(old), Some(new)) => (old, new),
        (Some(_), None) => return vec![What::Removed],
        _ => return vec![What::Added],
    };
    let mut all = Vec::new();
    match (&old.kind, &new.kind) {
        (Kind::Directory, Kind::Directory) => {}
        (Kind::Symlink { target: before }, Kind::Symlink { target: after }) => {
            all.extend((before != after).then_some(What::Link))
        }
        (
            Kind::File { executable: mode_before, digest: before, .. },
            Kind::File { executable: mode_after, digest: after, .. },
        ) => {
            all.extend((before != after).then_some(What::Content));
            all.extend((mode_before != mode_after).then_some(What::Mode));
        }
        _ => all.push(What::Kind),
    }
    all.extend((old.xattrs != new.xattrs).then_some(What::Xattr));
    all
}

/// A matcher in which every glob starts at the root.
fn anchored(globs: &[String]) -> Result<Gitignore> {
    let mut builder = GitignoreBuilder::new("");
    builder.allow_unclosed_class(false);
    for glob in globs {
        let (bang, rest) = glob.strip_prefix('!').map_or(("", glob.as_str()), |rest| ("!", rest));
        let rest = rest.trim_start_matches("./").trim_start_matches('/');
        builder
            .add_line(None, &format!("{bang}/{rest}"))
            .map_err(|error| Problem::usage(format!("`{glob}` is not a glob: {error}")))?;
    }
    builder.build().context("cannot compile the globs")
}

/// The folder a relative path lies in; `None` at the root.
pub(super) fn parent(path: &[u8]) -> Option<&[u8]> {
    path.iter().rposition(|byte| *byte == b'/').map(|at| &path[..at])
}

pub(super) fn as_path(bytes: &[u8]) -> &Path {
    use std::os::unix::ffi::OsStrExt as _;
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}

pub(super) fn put_length(out: &mut Vec<u8>, length: usize) {
    out.extend(u32::try_from(length).expect("paths, attributes and counts are far below 4 GiB").to_le_bytes());
}

pub(super) fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    put_length(out, bytes.len());
    out.extend(bytes);
}

pub(super) fn put_xattrs(out: &mut Vec<u8>, xattrs: &Xattrs) {
    put_length(out, xattrs.len());
    for (name, value) in xattrs {
        put(out, name);
        put(out, value);
    }
}

/// Takes fields from bytes; every method fails where the bytes end early.
#[derive(Debug)]
pub(super) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length).context("the file ends early")?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many bytes as asked for"))
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn i64(&mut self) -> Result<i64> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    pub fn length(&mut self) -> Result<usize> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    pub fn string(&mut self) -> Result<&'a [u8]> {
        let length = self.length()?;
        self.take(length)
    }

    pub fn digest(&mut self) -> Result<Digest> {
        Ok(Digest::from_bytes(self.array()?))
    }

    pub fn xattrs(&mut self) -> Result<Xattrs> {
        let count = self.length()?;
        (0..count).map(|_| Ok((self.string()?.to_vec(), self.string()?.to_vec()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, content: &str) -> Entry {
        let kind = Kind::File { executable: false, size: content.len() as u64, digest: Digest::of(content) };
        Entry { path: path.into(), kind, xattrs: Vec::new() }
    }

    fn directory(path: &str) -> Entry {
        Entry { path: path.into(), kind: Kind::Directory, xattrs: Vec::new() }
    }

    fn link(path: &str, target: &str) -> Entry {
        Entry { path: path.into(), kind: Kind::Symlink { target: target.into() }, xattrs: Vec::new() }
    }

    fn listing(entries: Vec<Entry>) -> Listing {
        let mut entries = entries;
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Listing { entries }
    }

    fn paths(listing: &Listing) -> Vec<String> {
        listing.entries.iter().map(Entry::name).collect()
    }

    #[test]
    fn decode_gives_back_what_was_encoded() {
        let mut with_xattr = file("b", "x");
        with_xattr.xattrs = vec![(b"user.a".to_vec(), b"1".to_vec()), (b"user.b".to_vec(), Vec::new())];
        let mut strange = link("l", "../else\u{0}where");
        strange.path = b"\xff\xfe".to_vec();
        let all = listing(vec![directory("a"), file("a/c", ""), with_xattr, strange]);
        let bytes = all.encode();
        assert_eq!(Listing::decode(&bytes).unwrap(), all);
        for cut in 0..bytes.len() {
            assert!(Listing::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(Listing::decode(&[&bytes[..], b"x"].concat()).is_err());
    }

    #[test]
    fn the_canonical_bytes_are_pinned() {
        let all = listing(vec![directory("d"), file("d/f", "hello\n")]);
        let hello = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"; // echo hello | sha256sum
        let expected = [
            hex::encode(b"pipeline listing 1\n").as_str(),
            "02000000",
            "0100000064",
            "00",
            "00000000",
            "03000000642f66",
            "01",
            "0600000000000000",
            hello,
            "00000000",
        ]
        .concat();
        assert_eq!(hex::encode(all.encode()), expected);
        assert_eq!(all.digest(), Digest::of(hex::decode(expected).unwrap()));
    }

    #[test]
    fn changes_name_what_is_different() {
        let mut executable = file("mode", "x");
        executable.kind = Kind::File { executable: true, size: 1, digest: Digest::of("x") };
        let mut attribute = file("xattr", "x");
        attribute.xattrs = vec![(b"user.a".to_vec(), b"1".to_vec())];
        let old = listing(vec![
            file("content", "a"),
            file("gone", ""),
            file("kind", ""),
            link("link", "a"),
            file("mode", "x"),
            file("same", "s"),
            file("xattr", "x"),
        ]);
        let new = listing(vec![
            file("content", "b"),
            directory("kind"),
            link("link", "b"),
            executable,
            file("new", ""),
            file("same", "s"),
            attribute,
        ]);
        let found: Vec<(String, What)> = changes(&old, &new).into_iter().map(|change| (change.path, change.what)).collect();
        let expected = [
            ("content", What::Content),
            ("gone", What::Removed),
            ("kind", What::Kind),
            ("link", What::Link),
            ("mode", What::Mode),
            ("new", What::Added),
            ("xattr", What::Xattr),
        ];
        assert_eq!(found, expected.map(|(path, what)| (path.to_owned(), what)));
        assert_eq!(changes(&new, &new), []);
    }

    #[test]
    fn filter_takes_what_the_globs_name_and_the_folders_it_lies_in() {
        let all = listing(vec![
            directory("app"),
            file("app/requirements.txt", ""),
            file("requirements.txt", ""),
            file("requirements-dev.txt", ""),
            directory("requirements"),
            file("requirements/base.txt", ""),
            file("requirements/notes.md", ""),
            directory("requirements/old"),
            file("requirements/old/a.txt", ""),
            directory("vendor"),
            directory("vendor/tests"),
            file("vendor/tests/t", ""),
            file("vendor/x", ""),
        ]);
        let cases: [(&[&str], &[&str]); 8] = [
            (&["requirements.txt"], &["requirements.txt"]),
            (&["./requirements.txt", "/requirements-dev.txt"], &["requirements-dev.txt", "requirements.txt"]),
            (&["requirements/*.txt"], &["requirements", "requirements/base.txt"]),
            (
                &["**/*.txt", "!requirements*"],
                &[
                    "app",
                    "app/requirements.txt",
                    "requirements",
                    "requirements/base.txt",
                    "requirements/old",
                    "requirements/old/a.txt",
                ],
            ),
            (&["vendor"], &["vendor", "vendor/tests", "vendor/tests/t", "vendor/x"]),
            (&["vendor", "!vendor/tests"], &["vendor", "vendor/x"]),
            (&["{app,none}/*"], &["app", "app/requirements.txt"]),
            (&[], &[]),
        ];
        for (globs, expected) in cases {
            let globs: Vec<String> = globs.iter().map(|glob| (*glob).to_owned()).collect();
            assert_eq!(paths(&all.filter(&globs).unwrap()), expected, "{globs:?}");
        }
        let error = all.filter(&["a[".into()]).unwrap_err();
        assert!(error.to_string().starts_with("`a[` is not a glob"), "{error}");
    }
}
