//! From a request to a set of exact packages, by apt.
//!
//! A request on nothing holds a whole base system: what is `Essential: yes` in the suite, apt,
//! and the packages named. A request on top of something holds what is missing there. Nothing is
//! recommended into a set, and nothing that is installed is taken away.

use std::collections::{BTreeMap, HashMap};
use std::io::BufRead as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::apt::{Apt, explain_install};
use super::bootstrap::uri_path;
use super::fetch::{date, missing};
use super::repository::{as_installed, deb_path, field, repository};
use crate::build::lock::{self, Archive, Package, PackageChange, Request, Set};
use crate::error::{self, Problem};
use crate::oci::digest::Digest;

/// Packages of a base beside the essential ones: apt itself, and the one that tells the merged
/// `/usr` (its alternative would bring perl and convert a running system).
const BASE: [&str; 2] = ["apt", "usr-is-merged"];

/// Above every other priority, downgrades included (apt_preferences(5)).
const PIN: u32 = 1001;

/// The answer of the archives, before anything is downloaded.
#[derive(Debug, Clone)]
pub struct Resolution {
    /// As it goes into the lock, but for the packages' dates, which are in the packages: they are 0 here.
    pub set: Set,
    /// Control stanzas from the archives' indexes, in the order of the packages.
    stanzas: Vec<String>,
}

impl Resolution {
    /// The dpkg status text in which these packages are installed, for resolving what goes on top.
    pub fn status(&self) -> String {
        self.stanzas.iter().map(|stanza| as_installed(stanza)).collect()
    }
}

/// What [`Apt::update_missing`] came to.
#[derive(Debug, Clone)]
pub struct Update {
    pub set: Set,
    pub changes: Vec<PackageChange>,
    /// Whether the packages that are still there could not be kept as they were, so that everything
    /// was resolved anew.
    pub everything: bool,
}

impl Apt {
    /// Asks the archives for `request` on top of what the dpkg status text `installed` says; only
    /// the indexes are downloaded. `resolved` is the date that goes into the set.
    ///
    /// # Errors
    /// Usage for an unknown package, naming the nearest; transient for an archive that does not
    /// answer; failed for a wrong signature or packages that exclude each other.
    pub fn resolve(&mut self, request: &Request, installed: &str, resolved: &str) -> Result<Resolution> {
        self.check(request)?;
        self.refresh()?;
        self.set_status(installed)?;
        self.set_preferences("")?;
        self.set_sources("")?;
        self.solve(request, resolved, &HashMap::new())
    }

    /// [`Apt::resolve`], with the packages in `cache`: the set as it goes into the lock.
    pub fn lock(&mut self, request: &Request, installed: &str, resolved: &str, cache: &Path) -> Result<Set> {
        let mut set = self.resolve(request, installed, resolved)?.set;
        self.complete(&mut set, cache)?;
        Ok(set)
    }

    /// Downloads what is missing of a set and fills in the packages' dates.
    pub fn complete(&self, set: &mut Set, cache: &Path) -> Result<()> {
        self.fetch(set, cache)?;
        for package in &mut set.packages {
            package.date = date(&deb_path(cache, &package.sha256))?;
        }
        Ok(())
    }

    /// Resolves the packages `gone` of `set` anew and keeps the others at their versions. When
    /// that does not fit together, everything is resolved anew, and said.
    pub fn update_missing(
        &mut self,
        set: &Set,
        gone: &[Package],
        installed: &str,
        resolved: &str,
        cache: &Path,
    ) -> Result<Update> {
        self.check(&set.request)?;
        self.refresh()?;
        let kept =
            Set { packages: set.packages.iter().filter(|package| !gone.contains(package)).cloned().collect(), ..set.clone() };
        self.fetch(&kept, cache)?;
        // The indexes may have moved on from versions that are still in the pool: offer the kept
        // packages from a repository of our own, and pin them.
        let repo = tempfile::Builder::new().prefix(".kept.").tempdir_in(cache)?;
        let dir = std::path::absolute(repo.path()).context("cannot find the cache folder")?;
        repository(&dir, &kept, cache)?;
        let by_digest: HashMap<Digest, (Package, Archive)> = kept
            .packages
            .iter()
            .map(|package| (package.sha256, (package.clone(), kept.archives[package.archive].clone())))
            .collect();
        self.set_status(installed)?;
        self.set_preferences(&pins(&kept.packages))?;
        self.set_sources(&format!(
            "deb [trusted=yes arch={}] copy:{} ./\n",
            super::ARCHITECTURE,
            uri_path(&dir.to_string_lossy())
        ))?;
        let pinned = self.update().and_then(|()| self.solve(&set.request, resolved, &by_digest));
        self.set_preferences("")?;
        self.set_sources("")?;
        let (resolution, everything) = match pinned {
            Ok(resolution) => (resolution, false),
            Err(error) if error::exit_code(&error) == error::Kind::Transient as u8 => return Err(error),
            Err(_) => {
                self.update()?;
                (self.solve(&set.request, resolved, &HashMap::new())?, true)
            }
        };
        let mut new = resolution.set;
        self.complete(&mut new, cache)?;
        Ok(Update { changes: lock::diff(set, &new), set: new, everything })
    }

    /// Refuses names that mean something else than a package to apt.
    fn check(&self, request: &Request) -> Result<()> {
        match request.packages.iter().find(|name| !is_package(name)) {
            Some(name) => Err(Problem::usage(format!("`{name}` is not a package name"))
                .hint("write `NAME`, or `NAME=VERSION`, with lower case letters, digits, `+`, `-` and `.` in the name")
                .into()),
            None => Ok(()),
        }
    }

    /// Runs the resolver; `kept` are packages that may come from a repository of our own.
    fn solve(&self, request: &Request, resolved: &str, kept: &HashMap<Digest, (Package, Archive)>) -> Result<Resolution> {
        let mut wanted = request.packages.clone();
        let mut command =
            self.cmd("apt-get").args(["-qq", "-y", "--no-install-recommends", "--no-remove", "--print-uris", "install"]);
        if request.on.is_none() {
            command = command.arg(format!("?narrow(?codename(^{}$),?essential)", request.suite)).args(BASE);
            wanted.extend(BASE.map(str::to_owned));
        }
        let (line, output) = self.run(command.args(&request.packages))?;
        if !output.status.success() {
            return Err(explain_install(&line, &output, &wanted, || self.names())?.into());
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut found = self.look_up(parse_uris(&text)?, kept)?;
        found.sort_by(|a, b| (&a.package.name, &a.package.arch).cmp(&(&b.package.name, &b.package.arch)));
        let mut archives: Vec<Archive> = found.iter().map(|found| found.archive.clone()).collect();
        archives.sort();
        archives.dedup();
        let (mut packages, mut stanzas) = (Vec::new(), Vec::new());
        for Found { package, archive, stanza } in found {
            let archive = archives.binary_search(&archive).expect("made of these");
            packages.push(Package { archive, date: 0, ..package });
            stanzas.push(stanza);
        }
        let set = Set { request: request.clone(), resolved: resolved.to_owned(), archives, packages };
        Ok(Resolution { set, stanzas })
    }

    /// Finds the archive and the stanza of each download in the indexes.
    fn look_up(&self, uris: Vec<Uri>, kept: &HashMap<Digest, (Package, Archive)>) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        // Address of the archive → path → what is wanted.
        let mut wanted: BTreeMap<&str, HashMap<String, Uri>> = BTreeMap::new();
        for uri in uris {
            if let Some((package, archive)) = kept.get(&uri.sha256) {
                found.push(Found { package: package.clone(), archive: archive.clone(), stanza: String::new() });
                continue;
            }
            let bases = self.archives.sources.iter().map(|source| source.uri.as_str());
            let base = bases.filter(|base| uri.uri.starts_with(base)).max_by_key(|base| base.len());
            let base = base.with_context(|| format!("apt answered with `{}`, which is in none of the archives", uri.uri))?;
            let path = decode(&uri.uri[base.len()..]);
            let path = path.strip_prefix("./").unwrap_or(&path).to_owned();
            wanted.entry(base).or_default().insert(path, uri);
        }
        for index in self.indexes()? {
            let Some(source) = self.archives.sources.get(index.source) else { continue };
            let Some(wanted) = wanted.get_mut(source.uri.as_str()).filter(|wanted| !wanted.is_empty()) else { continue };
            for (path, stanza) in pick(&index.file, wanted)? {
                let Some(uri) = wanted.remove(&path) else { continue };
                let part = |name: &str| {
                    field(&stanza, name).map(str::to_owned).with_context(|| format!("the index has no `{name}` for `{path}`"))
                };
                let package = Package {
                    name: part("Package")?,
                    version: part("Version")?,
                    arch: part("Architecture")?,
                    archive: 0,
                    sha256: uri.sha256,
                    size: uri.size,
                    date: 0,
                    path,
                };
                let archive = Archive {
                    origin: index.origin.clone(),
                    suite: source.suite.clone(),
                    component: index.component.clone(),
                    kind: source.kind,
                    repository: source.repository(),
                };
                found.push(Found { package, archive, stanza });
            }
        }
        if let Some(path) = wanted.values().find_map(|wanted| wanted.keys().next()) {
            anyhow::bail!("`{path}` is in none of the indexes");
        }
        Ok(found)
    }

    /// The package indexes, in the order of the sources.
    fn indexes(&self) -> Result<Vec<Index>> {
        let format = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)|$(FILENAME)";
        let text = self.cmd("apt-get").args(["indextargets", "--format", format, "Identifier: Packages"]).text()?;
        let mut indexes: Vec<Index> = text
            .lines()
            .filter_map(|line| {
                let mut fields = line.split('|');
                let (uri, suite, component) = (fields.next()?, fields.next()?, fields.next()?);
                let (origin, file) = (fields.next()?, fields.next()?);
                let source = self.archives.sources.iter().position(|source| {
                    source.uri == uri
                        && (source.suite == suite || source.suite.trim_matches(['.', '/']) == suite.trim_matches(['.', '/']))
                })?;
                let known = |value: &str| if value.starts_with("$(") { String::new() } else { value.to_owned() };
                Some(Index { source, component: known(component), origin: known(origin), file: file.into() })
            })
            .collect();
        indexes.sort_by_key(|index| index.source);
        Ok(indexes)
    }
}

/// The names of packages of `set` that `cache` does not hold, for [`Apt::update_missing`] without a try to fetch.
pub fn not_cached(set: &Set, cache: &Path) -> Vec<Package> {
    missing(set, cache).into_iter().cloned().collect()
}

/// One line of `apt-get --print-uris`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Uri {
    uri: String,
    size: u64,
    sha256: Digest,
}

#[derive(Debug)]
struct Found {
    package: Package,
    archive: Archive,
    stanza: String,
}

/// A `Packages` file apt holds.
#[derive(Debug)]
struct Index {
    /// Index in the sources.
    source: usize,
    component: String,
    origin: String,
    file: PathBuf,
}

/// Parses `'URI' NAME SIZE SHA256:HEX` lines.
fn parse_uris(text: &str) -> Result<Vec<Uri>> {
    text.lines()
        .filter(|line| line.starts_with('\''))
        .map(|line| {
            let parsed = || {
                let (uri, rest) = line.strip_prefix('\'')?.split_once("' ")?;
                let mut words = rest.split(' ').skip(1);
                let size = words.next()?.parse().ok()?;
                let sha256 = words.next()?.strip_prefix("SHA256:")?.parse().ok()?;
                Some(Uri { uri: uri.to_owned(), size, sha256 })
            };
            parsed().with_context(|| format!("apt answered with a line that is not understood: `{line}`"))
        })
        .collect()
}

/// The stanzas of an index whose `Filename` is wanted, in the index's order. Read as a stream:
/// an index is tens of megabytes.
fn pick(file: &Path, wanted: &HashMap<String, Uri>) -> Result<Vec<(String, String)>> {
    let mut reader = std::io::BufReader::with_capacity(256 * 1024, fs_err::File::open(file)?);
    let mut picked = Vec::new();
    let mut stanza: Vec<u8> = Vec::with_capacity(8 * 1024);
    let mut path: Option<String> = None;
    loop {
        let start = stanza.len();
        let read = reader.read_until(b'\n', &mut stanza)?;
        let line = &stanza[start..];
        if let Some(value) = line.strip_prefix(b"Filename: ") {
            let value = String::from_utf8_lossy(value.trim_ascii_end());
            let value = value.strip_prefix("./").unwrap_or(&value);
            path = wanted.contains_key(value).then(|| value.to_owned());
        }
        if read <= 1 {
            if let Some(path) = path.take() {
                picked.push((path, String::from_utf8_lossy(stanza.trim_ascii_end()).into_owned() + "\n"));
            }
            stanza.clear();
            if read == 0 {
                return Ok(picked);
            }
        }
    }
}

/// Preferences that hold packages at their versions.
fn pins(packages: &[Package]) -> String {
    packages
        .iter()
        .map(|package| format!("Package: {}\nPin: version {}\nPin-Priority: {PIN}\n\n", package.name, package.version))
        .collect()
}

/// Undoes percent-encoding; what is none stays.
fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code =
            (bytes[at] == b'%').then(|| text.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok())).flatten();
        out.push(code.unwrap_or(bytes[at]));
        at += if code.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// `NAME` or `NAME=VERSION`: apt takes patterns, `NAME-` (remove) and `NAME/SUITE` too, and more.
fn is_package(text: &str) -> bool {
    let (name, version) = text.split_once('=').map_or((text, None), |(name, version)| (name, Some(version)));
    let name_ok = name.len() >= 2
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && !name.ends_with('-')
        && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'+' | b'-' | b'.'));
    let version_ok = version.is_none_or(|version| {
        !version.is_empty() && version.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'-' | b'.' | b':' | b'~'))
    });
    name_ok && version_ok
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_parsed() {
        let hex = "5b6825de4263824b78c4c51f6476414f3b4e89c2ab63e81dc8b9b5501e867cf6";
        let text = format!(
            "some words\n'http://m.test/debian/pool/main/g/glibc/libc6_2.41-12%2bdeb13u4_amd64.deb' libc6_2.41-12+deb13u4_amd64.deb 2846580 SHA256:{hex}\n"
        );
        let uri = Uri {
            uri: "http://m.test/debian/pool/main/g/glibc/libc6_2.41-12%2bdeb13u4_amd64.deb".into(),
            size: 2_846_580,
            sha256: hex.parse().unwrap(),
        };
        assert_eq!(parse_uris(&text).unwrap(), [uri]);
        assert!(parse_uris("'http://m.test/x' x 1 MD5Sum:00").is_err());
        assert_eq!(decode("libc6_2.41-12%2bdeb%zz%"), "libc6_2.41-12+deb%zz%");
    }

    #[test]
    fn wanted_stanzas_are_picked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("Packages");
        fs_err::write(
            &file,
            "Package: a\nFilename: pool/a.deb\nSize: 1\n\nPackage: b\nFilename: ./b.deb\n\nPackage: c\nFilename: c.deb\n",
        )
        .unwrap();
        let uri = Uri { uri: String::new(), size: 0, sha256: Digest::of("") };
        let wanted = HashMap::from(["pool/a.deb", "b.deb", "c.deb"].map(|path| (path.to_owned(), uri.clone())));
        let expected = [
            ("pool/a.deb", "Package: a\nFilename: pool/a.deb\nSize: 1\n"),
            ("b.deb", "Package: b\nFilename: ./b.deb\n"),
            ("c.deb", "Package: c\nFilename: c.deb\n"),
        ];
        assert_eq!(pick(&file, &wanted).unwrap(), expected.map(|(path, stanza)| (path.to_owned(), stanza.to_owned())));
        assert_eq!(pick(&file, &HashMap::new()).unwrap(), []);
    }

    #[test]
    fn names_that_mean_more_to_apt_are_refused() {
        for name in ["curl", "g++", "libstdc++6", "python3.13", "7zip", "curl=8.1-1+b2~rc1", "x2=1:2"] {
            assert!(is_package(name), "{name}");
        }
        for name in
            ["curl-", "curl/sid", "?essential", "~nfoo", "-oX=1", "curl:i386", "Curl", "c", "", "curl=", "curl=1 2", "./x.deb"]
        {
            assert!(!is_package(name), "{name}");
        }
    }

    #[test]
    fn kept_packages_are_pinned() {
        let package = crate::build::lock::tests::package("a", "1:2", 0);
        assert_eq!(pins(&[package]), "Package: a\nPin: version 1:2\nPin-Priority: 1001\n\n");
    }
}
