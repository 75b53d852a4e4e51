//! What stays out of a source: `.gitignore` by Git's rules and `.s2iignore` by source-to-image's.
//!
//! Git (gitignore(5)): the nearest `.gitignore` decides, then the ones above it up to the top of the work tree, then
//! `.git/info/exclude`; files in the index are never ignored. The user's `core.excludesFile` has no say, because a digest
//! must not depend on who builds. A folder with a `.git` of its own (a submodule) is a work tree of its own.
//!
//! S2I: one Go `filepath.Match` glob per line of the source root's `.s2iignore`, relative to that root and not recursive;
//! `#` comments; `!glob` takes back what earlier lines listed; a folder that is listed goes with all it holds.

use std::cell::OnceCell;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result};
use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};

use super::listing::as_path;
use crate::error::Problem;
use crate::oci::digest::{Digest, Hasher};

/// Patterns of one file, on top of those of the folders above. Compiled when the first path is matched.
#[derive(Debug)]
pub(super) struct Rules {
    above: Option<Rc<Rules>>,
    /// Bytes to leave out at the front of a path to make it relative to the file's folder.
    skip: usize,
    text: Vec<u8>,
    compiled: OnceCell<Gitignore>,
    digest: Digest,
}

impl Rules {
    /// `above` with the patterns of `text`; just `above` where there are none.
    pub fn with(above: Option<Rc<Rules>>, skip: usize, text: Vec<u8>) -> Option<Rc<Rules>> {
        let blank = |line: &[u8]| line.trim_ascii().is_empty() || line.starts_with(b"#");
        if text.split(|byte| *byte == b'\n').all(blank) {
            return above;
        }
        let mut hasher = Hasher::new();
        hasher
            .field(above.as_ref().map_or([0; 32], |above| *above.digest.bytes()))
            .field((skip as u64).to_le_bytes())
            .field(&text);
        Some(Rc::new(Rules { above, skip, text, compiled: OnceCell::new(), digest: hasher.finish() }))
    }

    /// Stands for all patterns in force: equal digests give equal verdicts.
    pub fn digest(rules: Option<&Rc<Rules>>) -> Digest {
        rules.map_or(Digest::from_bytes([0; 32]), |rules| rules.digest)
    }

    /// Whether the patterns ignore `path`, which is relative to the top of the work tree.
    pub fn ignore(rules: Option<&Rc<Rules>>, path: &[u8], directory: bool) -> bool {
        let mut next = rules;
        while let Some(rules) = next {
            match rules.compiled().matched(as_path(&path[rules.skip..]), directory) {
                Match::Ignore(_) => return true,
                Match::Whitelist(_) => return false,
                Match::None => next = rules.above.as_ref(),
            }
        }
        false
    }

    fn compiled(&self) -> &Gitignore {
        self.compiled.get_or_init(|| {
            let mut builder = GitignoreBuilder::new("");
            let text = String::from_utf8_lossy(&self.text);
            for line in text.trim_start_matches('\u{feff}').split('\n') {
                // A line Git cannot make sense of matches nothing there either.
                let _ = builder.add_line(None, line.strip_suffix('\r').unwrap_or(line));
            }
            builder.build().unwrap_or_else(|_| Gitignore::empty())
        })
    }
}

/// A Git work tree, as far as ignoring needs it.
pub(super) struct WorkTree {
    /// What to put before a path of the source to make it relative to the work tree: empty or `apps/notes/`.
    prefix: Vec<u8>,
    /// Bytes to leave out at the front of a path of the source: of a work tree inside it.
    skip: usize,
    git_dir: PathBuf,
    index: OnceCell<Option<git2::Index>>,
}

impl std::fmt::Debug for WorkTree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkTree").field("git_dir", &self.git_dir).field("skip", &self.skip).finish_non_exhaustive()
    }
}

/// Tells one version of a file from the next: inode, size, mtime and ctime in nanoseconds.
pub(super) type Identity = [i64; 4];

impl WorkTree {
    /// The work tree `root` (an absolute path without links) lies in, found as Git does: upwards, on one file system.
    pub fn around(root: &Path) -> Option<(WorkTree, PathBuf)> {
        let device = fs_err::symlink_metadata(root).ok()?.dev();
        for dir in root.ancestors() {
            if fs_err::symlink_metadata(dir).ok()?.dev() != device {
                return None;
            }
            if let Some(git_dir) = git_dir(dir) {
                let mut prefix = bytes(root.strip_prefix(dir).ok()?).to_vec();
                if !prefix.is_empty() {
                    prefix.push(b'/');
                }
                return Some((WorkTree { prefix, skip: 0, git_dir, index: OnceCell::new() }, dir.to_owned()));
            }
        }
        None
    }

    /// The work tree whose top is the folder `path` of the source at `root`.
    pub fn inside(root: &Path, path: &[u8]) -> Option<WorkTree> {
        let git_dir = git_dir(&root.join(as_path(path)))?;
        Some(WorkTree { prefix: Vec::new(), skip: path.len() + 1, git_dir, index: OnceCell::new() })
    }

    /// The rules of a work tree inside the source before any `.gitignore` is read.
    pub fn rules(&self) -> Option<Rc<Rules>> {
        Rules::with(None, 0, self.exclude())
    }

    /// The rules in force in the source's root before its own `.gitignore`; `None` where they ignore the root
    /// itself: who names an ignored folder as source wants what is in it.
    pub fn rules_above(&self, top: &Path) -> Option<Rc<Rules>> {
        let mut rules = self.rules();
        let parts: Vec<&[u8]> = self.prefix.split(|byte| *byte == b'/').filter(|part| !part.is_empty()).collect();
        let mut path = Vec::new();
        for part in parts {
            let folder = top.join(as_path(&path));
            if let Some(text) = read_regular(&folder.join(".gitignore")) {
                rules = Rules::with(rules, if path.is_empty() { 0 } else { path.len() + 1 }, text);
            }
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(part);
            if Rules::ignore(rules.as_ref(), &path, true) {
                return None;
            }
        }
        rules
    }

    /// `path` of the source as a path of the work tree.
    pub fn full(&self, path: &[u8]) -> Vec<u8> {
        [&self.prefix, &path[self.skip.min(path.len())..]].concat()
    }

    /// Length of [`WorkTree::full`] of a folder and the `/` behind it: what [`Rules`] inside it leave out.
    pub fn skip(&self, folder: &[u8]) -> usize {
        let full = self.prefix.len() + folder.len().saturating_sub(self.skip);
        let inner = folder.len() > self.skip;
        full + usize::from(inner)
    }

    /// Whether Git tracks the file `full`, or anything in the folder `full`.
    pub fn tracks(&self, full: &[u8], directory: bool) -> bool {
        let index = self.index.get_or_init(|| git2::Index::open(&self.git_dir.join("index")).ok());
        let Some(index) = index else { return false };
        index.get_path(as_path(full), 0).is_some() || (directory && index.find_prefix(as_path(&[full, b"/"].concat())).is_ok())
    }

    /// Which version of the index [`WorkTree::tracks`] reads; zeros when there is none.
    pub fn identity(&self) -> Identity {
        let Ok(stat) = fs_err::metadata(self.git_dir.join("index")) else { return [0; 4] };
        let nanoseconds = |seconds: i64, rest: i64| seconds.wrapping_mul(1_000_000_000).wrapping_add(rest);
        [
            stat.ino().cast_signed(),
            stat.size().cast_signed(),
            nanoseconds(stat.mtime(), stat.mtime_nsec()),
            nanoseconds(stat.ctime(), stat.ctime_nsec()),
        ]
    }

    /// The text of `info/exclude`, which work trees of one repository share.
    fn exclude(&self) -> Vec<u8> {
        fs_err::read(self.common_dir().join("info/exclude")).unwrap_or_default()
    }

    /// What this work tree has for itself: `HEAD`, `index`.
    pub fn git_dir(&self) -> &Path {
        &self.git_dir
    }

    /// What the work trees of a repository share: objects, references, configuration.
    pub fn common_dir(&self) -> PathBuf {
        match fs_err::read(self.git_dir.join("commondir")) {
            Ok(text) => self.git_dir.join(as_path(text.trim_ascii())),
            Err(_) => self.git_dir.clone(),
        }
    }
}

/// The Git folder of the work tree with the top `dir`: `.git`, or where a `.git` file points (gitrepository-layout(5)).
fn git_dir(dir: &Path) -> Option<PathBuf> {
    let git = dir.join(".git");
    let kind = fs_err::metadata(&git).ok()?;
    let found = if kind.is_dir() {
        git
    } else {
        let text = fs_err::read(&git).ok()?;
        dir.join(as_path(text.strip_prefix(b"gitdir:")?.trim_ascii()))
    };
    fs_err::metadata(found.join("HEAD")).is_ok().then_some(found)
}

/// The bytes of a regular file; as in Git, a link called `.gitignore` is not read.
fn read_regular(path: &Path) -> Option<Vec<u8>> {
    fs_err::symlink_metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    let mut text = Vec::new();
    fs_err::File::open(path).ok()?.read_to_end(&mut text).ok()?;
    Some(text)
}

fn bytes(path: &Path) -> &[u8] {
    use std::os::unix::ffi::OsStrExt as _;
    path.as_os_str().as_bytes()
}

/// The lines of a `.s2iignore`.
#[derive(Debug, Default)]
pub(super) struct S2iIgnore {
    lines: Vec<S2iLine>,
}

#[derive(Debug)]
struct S2iLine {
    /// `!`: takes back.
    back: bool,
    /// The glob of each path component.
    parts: Vec<Vec<u8>>,
}

impl S2iIgnore {
    /// The `.s2iignore` of `root`, and its bytes.
    pub fn load(root: &Path) -> Result<(Self, Vec<u8>)> {
        let path = root.join(".s2iignore");
        match fs_err::read(&path) {
            Ok(text) => Ok((Self::parse(&text)?, text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok((Self::default(), Vec::new())),
            Err(error) => Err(error).context("cannot read the source's `.s2iignore`"),
        }
    }

    /// # Errors
    /// A glob that Go calls a bad pattern: an open `[` or a `\` at the end.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let mut lines = Vec::new();
        for (number, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let (back, glob) = line.strip_prefix(b"!").map_or((false, line), |glob| (true, glob));
            let parts = clean(glob);
            if parts.iter().any(|part| glob_match(part, b"").is_none()) {
                let glob = String::from_utf8_lossy(glob);
                return Err(Problem::usage(format!(".s2iignore:{}: `{glob}` is not a glob", number + 1))
                    .hint("close the `[`, or write `\\[` for the character itself")
                    .into());
            }
            // A line for the root itself, or for something outside of it, names nothing that could be left out.
            if !parts.is_empty() && parts[0] != b".." {
                lines.push(S2iLine { back, parts });
            }
        }
        Ok(Self { lines })
    }

    /// Whether `path`, relative to the source's root, is listed: the last line that matches decides.
    pub fn lists(&self, path: &[u8]) -> bool {
        let hit = |line: &&S2iLine| {
            let mut parts = path.split(|byte| *byte == b'/');
            line.parts.iter().all(|glob| parts.next().is_some_and(|part| glob_match(glob, part) == Some(true)))
                && parts.next().is_none()
        };
        self.lines.iter().rev().find(hit).is_some_and(|line| !line.back)
    }

    /// Whether `path` or a folder above it is listed.
    pub fn removes(&self, path: &[u8]) -> bool {
        !self.lines.is_empty()
            && (self.lists(path) || path.iter().enumerate().any(|(at, byte)| *byte == b'/' && self.lists(&path[..at])))
    }
}

/// The components of a path as Go's `filepath.Clean` leaves them.
fn clean(glob: &[u8]) -> Vec<Vec<u8>> {
    let mut parts: Vec<Vec<u8>> = Vec::new();
    for part in glob.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if parts.last().is_some_and(|last| last != b"..") => drop(parts.pop()),
            part => parts.push(part.to_vec()),
        }
    }
    parts
}

/// Go's `filepath.Match` for one path component: `*`, `?`, `[a-z]`, `[^a-z]`, `\c`. `None`: a bad pattern.
fn glob_match(glob: &[u8], name: &[u8]) -> Option<bool> {
    let Some((&first, rest)) = glob.split_first() else { return Some(name.is_empty()) };
    match first {
        b'*' => {
            for at in 0..=name.len() {
                if glob_match(rest, &name[at..])? {
                    return Some(true);
                }
            }
            Some(false)
        }
        b'?' => {
            let tail = name.get(character(name).len()..).unwrap_or_default();
            Some(glob_match(rest, tail)? && !name.is_empty())
        }
        b'[' => {
            let wanted = character(name);
            let (hit, rest) = class(rest, wanted)?;
            Some(glob_match(rest, &name[wanted.len()..])? && hit && !name.is_empty())
        }
        b'\\' => {
            let (&literal, rest) = rest.split_first()?;
            Some(glob_match(rest, name.get(1..).unwrap_or_default())? && name.first() == Some(&literal))
        }
        literal => Some(glob_match(rest, name.get(1..).unwrap_or_default())? && name.first() == Some(&literal)),
    }
}

/// A class after its `[`: whether `wanted` is in it, and what follows the `]`.
fn class<'a>(mut glob: &'a [u8], wanted: &[u8]) -> Option<(bool, &'a [u8])> {
    let negated = glob.first() == Some(&b'^');
    if negated {
        glob = &glob[1..];
    }
    let mut hit = false;
    let mut ranges = 0;
    loop {
        if glob.first() == Some(&b']') && ranges > 0 {
            return Some((hit != negated, &glob[1..]));
        }
        let low = class_character(&mut glob)?;
        let mut high = low;
        if glob.first() == Some(&b'-') {
            glob = &glob[1..];
            high = class_character(&mut glob)?;
        }
        // UTF-8 sorts like its code points.
        hit |= low <= wanted && wanted <= high;
        ranges += 1;
    }
}

fn class_character<'a>(glob: &mut &'a [u8]) -> Option<&'a [u8]> {
    match glob.first()? {
        b'-' | b']' => return None,
        b'\\' => *glob = &glob[1..],
        _ => {}
    }
    let found = character(glob);
    *glob = &glob[found.len()..];
    (!found.is_empty() && !glob.is_empty()).then_some(found)
}

/// The first UTF-8 character, or the first byte where there is none.
fn character(text: &[u8]) -> &[u8] {
    let length = (1..=text.len().min(4)).find(|length| std::str::from_utf8(&text[..*length]).is_ok());
    &text[..length.unwrap_or(1).min(text.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_globs() {
        // From the table of Go's path/filepath/match_test.go, for one component.
        let cases: [(&str, &str, Option<bool>); 38] = [
            ("abc", "abc", Some(true)),
            ("*", "abc", Some(true)),
            ("*c", "abc", Some(true)),
            ("a*", "a", Some(true)),
            ("a*", "abc", Some(true)),
            ("a*b*c*d*e*", "axbxcxdxe", Some(true)),
            ("a*b*c*d*e*", "axbxcxdxexxx", Some(true)),
            ("a*b?c*x", "abxbbxdbxebxczzx", Some(true)),
            ("a*b?c*x", "abxbbxdbxebxczzy", Some(false)),
            ("ab[c]", "abc", Some(true)),
            ("ab[b-d]", "abc", Some(true)),
            ("ab[e-g]", "abc", Some(false)),
            ("ab[^c]", "abc", Some(false)),
            ("ab[^b-d]", "abc", Some(false)),
            ("ab[^e-g]", "abc", Some(true)),
            ("a\\*b", "a*b", Some(true)),
            ("a\\*b", "ab", Some(false)),
            ("a?b", "a☺b", Some(true)),
            ("a[^a]b", "a☺b", Some(true)),
            ("a???b", "a☺b", Some(false)),
            ("a[^a][^a][^a]b", "a☺b", Some(false)),
            ("[a-ζ]*", "α", Some(true)),
            ("*[a-ζ]", "A", Some(false)),
            ("[\\]a]", "]", Some(true)),
            ("[\\-]", "-", Some(true)),
            ("[x\\-]", "x", Some(true)),
            ("[x\\-]", "-", Some(true)),
            ("[x\\-]", "z", Some(false)),
            ("[\\-x]", "a", Some(false)),
            ("[]a]", "]", None),
            ("[-]", "-", None),
            ("[x-]", "x", None),
            ("[-x]", "x", None),
            ("\\", "a", None),
            ("[a-b-c]", "a", None),
            ("[", "a", None),
            ("[^bc", "a", None),
            ("*x", "xxx", Some(true)),
        ];
        for (glob, name, expected) in cases {
            assert_eq!(glob_match(glob.as_bytes(), name.as_bytes()), expected, "{glob} on {name}");
        }
    }

    #[test]
    fn s2iignore_lines() {
        let text = "# comment\n*.log\n!keep.log\n docs/*/ \n/build\r\n./a/../tmp\nsecret.log\n../outside\n/\nx/**\n!x/y\n";
        let rules = S2iIgnore::parse(text.as_bytes()).unwrap();
        let cases = [
            ("a.log", true),
            ("keep.log", false),
            ("secret.log", true),
            ("sub/a.log", false),
            ("docs", false),
            ("docs/en", true),
            ("docs/en/page", true),
            ("build", true),
            ("build/x/y", true),
            ("sub/build", false),
            ("tmp", true),
            ("outside", false),
            ("x/z", true),
            ("x/y", false),
            ("# comment", false),
        ];
        for (path, expected) in cases {
            assert_eq!(rules.removes(path.as_bytes()), expected, "{path}");
        }
        let error = S2iIgnore::parse(b"ok\na[b\n").unwrap_err();
        assert_eq!(error.to_string(), ".s2iignore:2: `a[b` is not a glob");
    }

    #[test]
    fn the_nearest_rules_decide() {
        let top = Rules::with(None, 0, b"*.log\n/only-here\nbuild/\n".to_vec());
        let inner = Rules::with(top.clone(), 4, b"# comment\r\n!keep.log\r\n/only-there\n".to_vec());
        let cases: [(&str, bool, bool); 10] = [
            ("a.log", false, true),
            ("sub/a.log", false, true),
            ("sub/keep.log", false, false),
            ("only-here", false, true),
            ("sub/only-here", false, false),
            ("sub/only-there", false, true),
            ("sub/deep/only-there", false, false),
            ("sub/build", true, true),
            ("sub/build", false, false),
            ("sub/x", false, false),
        ];
        for (path, directory, expected) in cases {
            let rules = if path.starts_with("sub/") { &inner } else { &top };
            assert_eq!(Rules::ignore(rules.as_ref(), path.as_bytes(), directory), expected, "{path}");
        }
        assert!(Rules::with(None, 0, b"\n# nothing\n  \n".to_vec()).is_none());
        assert_ne!(Rules::digest(top.as_ref()), Rules::digest(inner.as_ref()));
    }
}
