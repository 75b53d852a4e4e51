//! The locked packages in the cache, by digest.
//!
//! apt's own helper downloads, with its proxies, credentials and many transfers over one
//! connection; the digest is checked by it and again here before a file gets its name. A package
//! that the archive no longer has is looked for where archives move theirs: from security to the
//! suite at a point release, or in another archive under the same path.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::apt::{Apt, Cause, cause, explain, words};
use super::mirrors::{Archives, Source};
use super::repository::deb_path;
use crate::build::lock::{Archive, ArchiveKind, Package, Set};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// Downloads in one call of the helper: enough to keep a connection busy, little enough for a command line.
const CHUNK: usize = 200;

/// Locked packages that no archive has any more; the reason and the way out are its source.
#[derive(Debug, Clone, thiserror::Error)]
#[error("cannot fetch the locked packages")]
pub struct Gone {
    pub packages: Vec<Package>,
    #[source]
    problem: Problem,
}

impl Gone {
    fn new(packages: Vec<Package>) -> Self {
        let names: Vec<String> = packages.iter().map(|package| format!("`{} {}`", package.name, package.version)).collect();
        let message = match names.as_slice() {
            [name] => format!("locked package {name} is no longer in the archive"),
            _ => format!("{} locked packages are no longer in the archive: {}", names.len(), names.join(", ")),
        };
        let problem = Problem::failed(message)
            .hint("`pipeline update` moves the lock to today's packages")
            .hint("`pipeline build --update-missing` resolves just these anew");
        Self { packages, problem }
    }
}

/// Makes sure that the packages of `set` lie in `cache` and returns their paths, in the set's
/// order. `archives` is asked for only when something is missing.
///
/// # Errors
/// [`Gone`] for packages no archive has (find it with `downcast_ref`); transient for an archive
/// that does not answer.
pub fn fetch(set: &Set, cache: &Path, archives: impl FnOnce() -> Result<Archives>) -> Result<Vec<PathBuf>> {
    if !missing(set, cache).is_empty() {
        Apt::open(&archives()?, cache)?.fetch(set, cache)?;
    }
    Ok(set.packages.iter().map(|package| deb_path(cache, &package.sha256)).collect())
}

/// The packages of `set` that are not in `cache`.
pub fn missing<'a>(set: &'a Set, cache: &Path) -> Vec<&'a Package> {
    let is_there =
        |package: &Package| fs_err::metadata(deb_path(cache, &package.sha256)).is_ok_and(|file| file.len() == package.size);
    set.packages.iter().filter(|package| !is_there(package)).collect()
}

impl Apt {
    /// Downloads what is missing of `set` into `cache`.
    pub(super) fn fetch(&self, set: &Set, cache: &Path) -> Result<()> {
        fs_err::create_dir_all(cache)?;
        // Gone when this ends, also when the process is killed and the cache is cleaned.
        let partial = tempfile::Builder::new().prefix(".partial.").tempdir_in(cache)?;
        let mut wanted: Vec<(&Package, Vec<String>)> = missing(set, cache)
            .into_iter()
            .map(|package| {
                let archive = set.archives.get(package.archive).context("the lock names an archive that is not there")?;
                let mut places = places(&self.archives.sources, archive, &package.path);
                places.reverse();
                Ok((package, places))
            })
            .collect::<Result<_>>()?;
        let mut gone = Vec::new();
        while !wanted.is_empty() {
            let mut next = Vec::new();
            let mut round = Vec::new();
            for (package, mut places) in wanted {
                match places.pop() {
                    Some(uri) => round.push((package, uri, places)),
                    None => gone.push(package.clone()),
                }
            }
            for chunk in round.chunks(CHUNK) {
                let uris: Vec<(&Package, &str)> = chunk.iter().map(|(package, uri, _)| (*package, uri.as_str())).collect();
                let absent = self.download(&uris, partial.path(), cache)?;
                let again = chunk.iter().filter(|(package, ..)| absent.contains(&package.sha256));
                next.extend(again.map(|(package, _, places)| (*package, places.clone())));
            }
            wanted = next;
        }
        if gone.is_empty() { Ok(()) } else { Err(Gone::new(gone).into()) }
    }

    /// Downloads each package from its address; returns those that are not there.
    fn download(&self, uris: &[(&Package, &str)], partial: &Path, cache: &Path) -> Result<Vec<Digest>> {
        let mut command = self.cmd("/usr/lib/apt/apt-helper").arg("download-file");
        let part = |package: &Package| partial.join(format!("{}.deb", package.sha256.hex()));
        for (package, uri) in uris {
            command = command.arg(uri).arg(part(package)).arg(format!("SHA256:{}", package.sha256.hex()));
        }
        let (line, output) = self.run(command)?;
        let words = words(&output.stderr);
        let mut absent = Vec::new();
        for (package, uri) in uris {
            let part = part(package);
            if !part.exists() {
                // apt names the address in the line that says why.
                let why = words.lines().find(|line| line.contains(uri)).unwrap_or(&words);
                match cause(why) {
                    Cause::NotThere => absent.push(package.sha256),
                    _ => {
                        return Err(anyhow::Error::from(explain(&short(&line), &output))
                            .context(format!("cannot fetch package `{}`", package.name)));
                    }
                }
                continue;
            }
            let (digest, _) = Digest::of_reader(fs_err::File::open(&part)?)?;
            if digest != package.sha256 {
                let problem =
                    Problem::transient(format!("the archive gave other bytes for package `{}` than are locked", package.name));
                return Err(problem.hint("mirrors do that while they are updated, and broken proxies; try again later").into());
            }
            // On disk before it has its name: a name in the cache is a promise.
            fs_err::File::open(&part)?.sync_data()?;
            fs_err::rename(&part, deb_path(cache, &package.sha256))?;
        }
        Ok(absent)
    }
}

/// A command line with hundreds of addresses helps nobody.
fn short(line: &str) -> String {
    line.split(' ').take(3).collect::<Vec<_>>().join(" ") + " …"
}

/// The addresses a package may be at, the likeliest first, each once.
fn places(sources: &[Source], archive: &Archive, path: &str) -> Vec<String> {
    let own = |source: &&Source| source.kind == archive.kind && source.repository() == archive.repository;
    let mut places: Vec<String> = Vec::new();
    let mut add = |source: &Source, path: &str| {
        let uri = source.uri.clone() + &encode(path);
        if !places.contains(&uri) {
            places.push(uri);
        }
    };
    for source in sources.iter().filter(own) {
        add(source, path);
    }
    // A point release moves security's packages into the suite, where the pool has no `updates`.
    if let (ArchiveKind::Security, Some(rest)) = (archive.kind, path.strip_prefix("pool/updates/")) {
        for source in sources.iter().filter(|source| source.kind == ArchiveKind::Main) {
            add(source, &format!("pool/{rest}"));
        }
    }
    for source in sources {
        add(source, path);
    }
    places
}

/// A path as part of an address, the way apt writes it.
fn encode(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'-' | b'_' | b'~' | b':' | b'=' | b',' | b'@') {
            out.push(byte as char);
        } else {
            out.push_str(&format!("%{byte:02x}"));
        }
    }
    out
}

/// When a package was built: the date of the first member of the `.deb` (an ar archive: 8 bytes
/// of magic, then the member's name in 16 bytes and its date in 12, decimal).
pub(super) fn date(deb: &Path) -> Result<i64> {
    let mut head = [0; 36];
    fs_err::File::open(deb)?.read_exact(&mut head).with_context(|| format!("cannot read `{}`", deb.display()))?;
    parse_date(&head).with_context(|| format!("`{}` is not a Debian package", deb.display()))
}

fn parse_date(head: &[u8; 36]) -> Option<i64> {
    if &head[..8] != b"!<arch>\n" {
        return None;
    }
    std::str::from_utf8(&head[24..36]).ok()?.trim().parse().ok()
}

/// The digests of everything in the cache that `sets` need, for keeping them while it is cleaned.
pub fn needed<'a>(sets: impl IntoIterator<Item = &'a Set>) -> BTreeMap<Digest, u64> {
    sets.into_iter().flat_map(|set| &set.packages).map(|package| (package.sha256, package.size)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::lock::tests as sample;
    use crate::config::types::Suite;

    #[test]
    fn moved_packages_are_looked_for() {
        let archives = Archives::new(Suite::Trixie, Some("http://m.test/debian"), Some("http://s.test/security"), &[]).unwrap();
        let archive = |kind| Archive { kind, ..sample::set(vec![]).archives[0].clone() };
        assert_eq!(
            places(&archives.sources, &archive(ArchiveKind::Security), "pool/updates/main/x/x_1+b%20~_all.deb"),
            [
                "http://s.test/security/pool/updates/main/x/x_1%2bb%2520~_all.deb",
                "http://m.test/debian/pool/main/x/x_1%2bb%2520~_all.deb",
                "http://m.test/debian/pool/updates/main/x/x_1%2bb%2520~_all.deb",
            ]
        );
        assert_eq!(
            places(&archives.sources, &archive(ArchiveKind::Main), "pool/main/x/x.deb"),
            ["http://m.test/debian/pool/main/x/x.deb", "http://s.test/security/pool/main/x/x.deb"]
        );
    }

    #[test]
    fn the_date_is_the_first_members() {
        let cases: [(&[u8; 36], Option<i64>); 3] = [
            (b"!<arch>\ndebian-binary   1700000000  ", Some(1_700_000_000)),
            (b"!<arch>\ndebian-binary   x           ", None),
            (b"!<oops>\ndebian-binary   1700000000  ", None),
        ];
        for (head, expected) in cases {
            assert_eq!(parse_date(head), expected);
        }
    }

    #[test]
    fn what_is_in_the_cache_is_not_fetched() {
        let cache = tempfile::tempdir().unwrap();
        let package = super::super::repository::tests::build_deb(cache.path(), "aa", "1", "");
        let set = sample::set(vec![package.clone()]);
        let paths = fetch(&set, cache.path(), || panic!("not needed")).unwrap();
        assert_eq!(paths, [deb_path(cache.path(), &package.sha256)]);
        assert_eq!(date(&paths[0]).unwrap(), 1_700_000_000);
        // A cut file does not count.
        fs_err::write(&paths[0], "x").unwrap();
        assert_eq!(missing(&set, cache.path()), [&package]);
    }

    #[test]
    fn gone_packages_say_what_to_do() {
        let error = anyhow::Error::from(Gone::new(vec![sample::package("x", "1.2", 0)]));
        let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
        assert_eq!(chain, ["cannot fetch the locked packages", "locked package `x 1.2` is no longer in the archive"]);
        assert_eq!((crate::error::exit_code(&error), crate::error::hints(&error).len()), (1, 2));
        assert_eq!(error.downcast_ref::<Gone>().map(|gone| gone.packages.len()), Some(1));
    }
}
