//! Control stanzas, and throw-away repositories made of exactly the locked packages.
//!
//! A `.deb` lies in the cache as `HEX.deb`; what its control file says is kept beside it as
//! `HEX.control`, because reading it takes a process. From the stanzas come the `Packages` file
//! of a flat repository and the dpkg status text that tells apt what is installed already.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result};

use super::bootstrap::{REPOSITORY, SCRIPT, install_script};
use crate::build::lock::{Package, Set};
use crate::cmd::Cmd;
use crate::error::Problem;
use crate::oci::digest::Digest;

/// A control file is some kilobytes; more than this is not one.
const CONTROL_MAX: u64 = 1024 * 1024;

/// Where the package with this digest lies in `cache`.
pub fn deb_path(cache: &Path, sha256: &Digest) -> PathBuf {
    cache.join(format!("{}.deb", sha256.hex()))
}

/// Makes `dir` a flat repository of the packages of `set`, which [`super::fetch::fetch`] put into
/// `cache`: one hard link (a copy on another file system) for each, and a `Packages` file,
/// and the script that installs them all ([`SCRIPT`]). `dir` is made; nothing in it points outside, so that it can be bound into a sandbox. No signature:
/// apt reads it as `deb [trusted=yes] file:DIR ./`, and checks the digests in `Packages`.
pub fn repository(dir: &Path, set: &Set, cache: &Path) -> Result<()> {
    fs_err::create_dir_all(dir)?;
    let stanzas = stanzas(&set.packages, cache)?;
    let mut index = String::with_capacity(stanzas.iter().map(|stanza| stanza.len() + 200).sum());
    for (package, stanza) in set.packages.iter().zip(&stanzas) {
        let name = format!("{}_{}.deb", package.name, package.arch);
        link(&deb_path(cache, &package.sha256), &dir.join(&name))?;
        index.push_str(stanza);
        index.push_str(&format!("Filename: ./{name}\nSize: {}\nSHA256: {}\n\n", package.size, package.sha256.hex()));
    }
    fs_err::write(dir.join("Packages"), index)?;
    fs_err::write(dir.join(SCRIPT), install_script(set, REPOSITORY)?)?;
    Ok(())
}

fn link(from: &Path, to: &Path) -> Result<()> {
    match fs_err::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            fs_err::remove_file(to)?;
            link(from, to)
        }
        // Another file system, too many links, or a file of another user: a copy does as well.
        Err(_) => {
            fs_err::copy(from, to)?;
            Ok(())
        }
    }
}

/// The dpkg status text in which the packages of `sets`, which lie in `cache`, are installed; a
/// later set's package takes the place of an earlier one's.
pub fn status(sets: &[&Set], cache: &Path) -> Result<String> {
    let mut by_name = std::collections::BTreeMap::new();
    for set in sets {
        for (package, stanza) in set.packages.iter().zip(stanzas(&set.packages, cache)?) {
            by_name.insert(package.name.as_str(), stanza);
        }
    }
    Ok(by_name.values().map(|stanza| as_installed(stanza)).collect())
}

/// A control stanza as an entry of the status file.
pub(super) fn as_installed(stanza: &str) -> String {
    format!("{}\nStatus: install ok installed\n\n", stanza.trim_end())
}

/// Name and version of the packages a dpkg status text has as installed, in its order.
pub fn installed(status: &str) -> Vec<(String, String)> {
    status
        .split("\n\n")
        .filter_map(|stanza| {
            let is_installed = field(stanza, "Status").is_some_and(|status| status.split(' ').next_back() == Some("installed"));
            is_installed.then(|| Some((field(stanza, "Package")?.to_owned(), field(stanza, "Version")?.to_owned())))?
        })
        .collect()
}

/// The first line of a field of a stanza.
pub(super) fn field<'a>(stanza: &'a str, name: &str) -> Option<&'a str> {
    stanza.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// The control stanzas of packages in `cache`, in their order, each ending in one newline. Those
/// that are not beside their `.deb` yet are read in parallel and put there.
pub(super) fn stanzas(packages: &[Package], cache: &Path) -> Result<Vec<String>> {
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(packages.len());
    let work = || -> Result<Vec<(usize, String)>> {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(package) = packages.get(index) else { return Ok(done) };
            done.push((index, stanza(package, cache).with_context(|| format!("cannot read package `{}`", package.name))?));
        }
    };
    let mut all = std::thread::scope(|scope| -> Result<Vec<(usize, String)>> {
        let handles: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
        let mut all = work()?;
        for handle in handles {
            all.extend(handle.join().expect("workers do not panic")?);
        }
        Ok(all)
    })?;
    all.sort_unstable_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, stanza)| stanza).collect())
}

fn stanza(package: &Package, cache: &Path) -> Result<String> {
    let kept = cache.join(format!("{}.control", package.sha256.hex()));
    if let Ok(text) = fs_err::read_to_string(&kept)
        && is_of(&text, package)
    {
        return Ok(text);
    }
    let deb = deb_path(cache, &package.sha256);
    let output = Cmd::new("dpkg-deb").arg("--ctrl-tarfile").arg(&deb);
    let line = output.line();
    let output = output.output()?;
    if !output.status.success() {
        return Err(crate::cmd::failure(&line, output.status, &output.stderr).into());
    }
    let text = control_of(&output.stdout)?.context("there is no control file in it")?;
    if !is_of(&text, package) {
        return Err(
            Problem::failed(format!("`{}` is not version {} of `{}`", deb.display(), package.version, package.name)).into()
        );
    }
    let mut file = tempfile::Builder::new().prefix(".control.").tempfile_in(cache)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.persist(&kept)?;
    Ok(text)
}

/// A torn or foreign file beside the `.deb` is read anew: it ends in a newline and is of this version.
fn is_of(text: &str, package: &Package) -> bool {
    text.ends_with('\n') && field(text, "Package") == Some(&package.name) && field(text, "Version") == Some(&package.version)
}

/// The text of `control` in a control tar, with one newline at its end and no empty line.
fn control_of(tar: &[u8]) -> Result<Option<String>> {
    for entry in tar::Archive::new(tar).entries()? {
        let entry = entry?;
        if entry.path()?.components().next_back().is_some_and(|name| name.as_os_str() == "control") {
            let mut text = String::new();
            entry.take(CONTROL_MAX).read_to_string(&mut text)?;
            return Ok(Some(text.trim_end().to_owned() + "\n"));
        }
    }
    Ok(None)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::build::lock::tests as sample;

    /// Builds a package with `dpkg-deb`; the `.deb` goes into `cache` by its digest.
    pub(in crate::build::debian) fn build_deb(cache: &Path, name: &str, version: &str, extra: &str) -> Package {
        let tree = tempfile::tempdir().unwrap();
        fs_err::create_dir(tree.path().join("DEBIAN")).unwrap();
        let control = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: A <a@b.test>\n{extra}Description: test\n more\n"
        );
        fs_err::write(tree.path().join("DEBIAN/control"), control).unwrap();
        let deb = tree.path().join("out.deb");
        Cmd::new("dpkg-deb")
            .env("SOURCE_DATE_EPOCH", "1700000000")
            .args(["--root-owner-group", "--nocheck", "-Zgzip", "--build"])
            .arg(tree.path())
            .arg(&deb)
            .run()
            .unwrap();
        let bytes = fs_err::read(&deb).unwrap();
        let sha256 = Digest::of(&bytes);
        fs_err::create_dir_all(cache).unwrap();
        fs_err::write(deb_path(cache, &sha256), &bytes).unwrap();
        Package {
            name: name.into(),
            version: version.into(),
            arch: "all".into(),
            archive: 0,
            path: format!("pool/{name}_{version}_all.deb"),
            sha256,
            size: bytes.len() as u64,
            date: 1_700_000_000,
        }
    }

    #[test]
    fn a_repository_is_what_apt_reads() {
        let dir = tempfile::tempdir().unwrap();
        let (cache, repo) = (dir.path().join("cache"), dir.path().join("repo"));
        let set = sample::set(vec![build_deb(&cache, "aa", "1:1.0", "Depends: bb\n"), build_deb(&cache, "bb", "2", "")]);
        for _ in 0..2 {
            // The second time the stanzas come from beside the .debs, and the links are there.
            repository(&repo, &set, &cache).unwrap();
        }
        let (aa, bb) = (&set.packages[0], &set.packages[1]);
        let expected = format!(
            "Package: aa\nVersion: 1:1.0\nArchitecture: all\nMaintainer: A <a@b.test>\nDepends: bb\nDescription: test\n more\n\
             Filename: ./aa_all.deb\nSize: {}\nSHA256: {}\n\n\
             Package: bb\nVersion: 2\nArchitecture: all\nMaintainer: A <a@b.test>\nDescription: test\n more\n\
             Filename: ./bb_all.deb\nSize: {}\nSHA256: {}\n\n",
            aa.size,
            aa.sha256.hex(),
            bb.size,
            bb.sha256.hex()
        );
        assert_eq!(fs_err::read_to_string(repo.join("Packages")).unwrap(), expected);
        assert_eq!(Digest::of(fs_err::read(repo.join("aa_all.deb")).unwrap()), aa.sha256);
        let script = fs_err::read_to_string(repo.join(SCRIPT)).unwrap();
        assert!(script.ends_with("\n  aa=1:1.0 \\\n  bb=2\n"), "{script}");
        let newer = sample::set(vec![build_deb(&cache, "bb", "3", "")]);
        let status = status(&[&set, &newer], &cache).unwrap();
        assert_eq!(installed(&status), [("aa".into(), "1:1.0".into()), ("bb".into(), "3".into())]);
        // A wrong file beside a .deb is not believed.
        fs_err::write(cache.join(format!("{}.control", bb.sha256.hex())), "Package: bb\nVersi").unwrap();
        assert_eq!(field(&stanzas(&set.packages, &cache).unwrap()[1], "Version"), Some("2"));
    }

    #[test]
    fn only_installed_packages_count() {
        let status = "Package: a\nStatus: install ok installed\nVersion: 1\n\nPackage: b\nStatus: deinstall ok config-files\nVersion: 2\n\n\
                      Package: c\nStatus: install ok not-installed\nVersion: 3\n\nPackage: d\nVersion: 4-1\nStatus: hold ok installed\n";
        assert_eq!(installed(status), [("a".into(), "1".into()), ("d".into(), "4-1".into())]);
    }
}
