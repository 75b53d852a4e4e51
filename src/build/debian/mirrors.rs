//! Where the archives of a suite lie: from the pipeline file, or from this machine's apt.
//!
//! No address is a constant of ours. Without `base.mirror` the sources of this machine's apt are
//! read through `apt-get indextargets`, so that one-line and deb822 files, and whatever else this
//! apt understands, count alike.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

use crate::build::lock::{ArchiveKind, Request};
use crate::cmd::Cmd;
use crate::config::types::{Repository, Suite};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// The keys of Debian's archives, from the package `debian-archive-keyring`.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Names a Debian source may go by, beside its code names.
const SUITES: [&str; 10] =
    ["bullseye", "bookworm", "trixie", "forky", "sid", "unstable", "testing", "stable", "oldstable", "oldoldstable"];

/// The archives a set is resolved and fetched from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archives {
    pub suite: Suite,
    /// In order of preference where the same package is in several: suite, updates, security, extra.
    pub sources: Vec<Source>,
}

/// One archive: one line of a `sources.list`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub kind: ArchiveKind,
    /// Ends in `/`.
    pub uri: String,
    pub suite: String,
    pub components: Vec<String>,
    /// Keyring file.
    pub signed_by: PathBuf,
}

impl Source {
    /// What stands for the address of an extra archive in the lock: the start of its digest.
    pub fn repository(&self) -> String {
        match self.kind {
            ArchiveKind::Extra => stand_in(&self.uri),
            ArchiveKind::Main | ArchiveKind::Security => String::new(),
        }
    }

    /// The line for apt.
    pub fn line(&self) -> String {
        let Self { uri, suite, components, signed_by, .. } = self;
        let arch = super::ARCHITECTURE;
        format!("deb [arch={arch} signed-by={}] {uri} {suite} {}", signed_by.display(), components.join(" "))
            .trim_end()
            .to_owned()
    }
}

impl Archives {
    /// The archives of `suite`: `mirror` and `security_mirror` where given, else this machine's.
    ///
    /// # Errors
    /// Usage, when there is no address for an archive or a keyring is missing.
    pub fn new(suite: Suite, mirror: Option<&str>, security_mirror: Option<&str>, repositories: &[Repository]) -> Result<Self> {
        let asks_host = mirror.is_none() || (suite.has_updates() && security_mirror.is_none());
        let mut host = if asks_host { read_host(true)? } else { Vec::new() };
        let mut archives = Self::from(suite, mirror, security_mirror, repositories, &host);
        if asks_host && archives.is_err() {
            host.extend(read_host(false)?);
            archives = Self::from(suite, mirror, security_mirror, repositories, &host);
        }
        let archives = archives?;
        for source in &archives.sources {
            if !source.signed_by.exists() {
                let problem = Problem::usage(format!("the keyring `{}` does not exist", source.signed_by.display()));
                return Err(match source.kind {
                    ArchiveKind::Extra => {
                        problem.hint("`signed_by` of a repository names a keyring file, relative to the pipeline file")
                    }
                    _ => problem.hint("install it with `apt-get install debian-archive-keyring`"),
                }
                .into());
            }
        }
        Ok(archives)
    }

    fn from(
        suite: Suite,
        mirror: Option<&str>,
        security_mirror: Option<&str>,
        repositories: &[Repository],
        host: &[HostSource],
    ) -> Result<Self> {
        let main = address(mirror, host, false)?;
        let source = |kind, uri: &str, suite: String| Source {
            kind,
            uri: uri.to_owned(),
            suite,
            components: vec!["main".into()],
            signed_by: KEYRING.into(),
        };
        let mut sources = vec![source(ArchiveKind::Main, &main, suite.to_string())];
        if suite.has_updates() {
            sources.push(source(ArchiveKind::Main, &main, format!("{suite}-updates")));
            let security = address(security_mirror, host, true)?;
            sources.push(source(ArchiveKind::Security, &security, format!("{suite}-security")));
        }
        for repository in repositories {
            sources.push(Source {
                kind: ArchiveKind::Extra,
                uri: with_slash(&repository.uri),
                suite: repository.suite.clone(),
                components: repository.components.clone(),
                signed_by: repository.signed_by.clone(),
            });
        }
        if let Some(bad) = sources.iter().find(|source| !is_plain(source)) {
            return Err(Problem::usage(format!("the archive `{} {}` cannot be used: spaces, quotes and brackets are not possible in addresses, suites and keyring paths", bad.uri, bad.suite)).into());
        }
        Ok(Self { suite, sources })
    }

    /// The text of a `sources.list` for apt.
    pub fn sources_list(&self) -> String {
        self.sources.iter().map(|source| source.line() + "\n").collect()
    }
}

/// What stands for an address in the lock.
fn stand_in(uri: &str) -> String {
    Digest::of(with_slash(uri)).short()
}

/// The request for `packages` of `suite` and the extra `repositories` on top of `on`. Asks nothing
/// of this machine: it is on the path of a build in which nothing changed.
pub fn request(suite: &str, packages: &[String], repositories: &[Repository], on: Option<String>) -> Request {
    let mut packages = packages.to_vec();
    packages.sort();
    packages.dedup();
    let repositories = repositories
        .iter()
        .map(|extra| format!("{}/{}/{}", stand_in(&extra.uri), extra.suite, extra.components.join("+")))
        .collect();
    Request { suite: suite.into(), packages, repositories, on }
}

/// The suite of a tree, from the text of its `os-release`; `None` for what is not Debian or not known.
pub fn suite_of(os_release: &str) -> Option<Suite> {
    let value = |key: &str| {
        os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(|value| value.trim_matches(['"', '\'']))
    };
    if value("ID") != Some("debian") {
        return None;
    }
    match (value("VERSION_CODENAME"), value("VERSION_ID")) {
        // sid carries the code name of the next release and no number.
        (_, None) => Some(Suite::Sid),
        (Some(name), _) => Suite::ALL.into_iter().find(|suite| suite.as_str() == name),
        (None, Some("12")) => Some(Suite::Bookworm),
        (None, Some("13")) => Some(Suite::Trixie),
        (None, Some(_)) => None,
    }
}

/// One source of this machine's apt.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HostSource {
    uri: String,
    suite: String,
    component: String,
    /// `Origin` of its Release file; empty before the first `apt-get update`.
    origin: String,
}

/// What [`read_host`] asks apt for.
const FORMAT: &str = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)";

/// The sources of this machine's apt: with their origins, those whose lists are there; without,
/// all, also before the first `apt-get update`.
fn read_host(with_origin: bool) -> Result<Vec<HostSource>> {
    let text = Cmd::new("apt-get")
        .env("LC_ALL", "C.UTF-8")
        .args(["indextargets", "--format", FORMAT])
        .args((!with_origin).then_some("--no-release-info"))
        .arg("Identifier: Packages")
        .text()
        .context("cannot read the sources of this machine's apt")?;
    Ok(parse_host(&text))
}

fn parse_host(text: &str) -> Vec<HostSource> {
    let field = |value: &str| if value.starts_with("$(") { String::new() } else { value.to_owned() };
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split('|').map(field);
            let (uri, suite, component, origin) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            Some(HostSource { uri, suite, component, origin })
        })
        .collect()
}

/// The address of an archive: as given, or the machine's first source that is Debian's (`security`
/// or not), preferring one whose Release file says so.
fn address(given: Option<&str>, host: &[HostSource], security: bool) -> Result<String> {
    if let Some(given) = given {
        return Ok(with_slash(given));
    }
    let candidates = || host.iter().filter(|source| is_debian(source, security));
    let known = candidates().find(|source| source.origin == "Debian");
    // A third party's archive may use Debian's suite names; an archive with updates beside the suite is Debian's.
    let with_updates = || {
        candidates()
            .find(|source| host.iter().any(|other| other.uri == source.uri && other.suite == format!("{}-updates", source.suite)))
    };
    let found = known.or_else(with_updates).or_else(|| candidates().find(|source| source.origin.is_empty()));
    match found {
        Some(source) => mirror_of(&source.uri),
        None if security => {
            Err(Problem::usage("no mirror of the Debian security archive is known: this machine's apt names none")
                .hint("name one in the pipeline file: `base.security_mirror`")
                .into())
        }
        None => Err(Problem::usage("no mirror of the Debian archive is known: this machine's apt names none")
            .hint("name one in the pipeline file: `base.mirror`, and `base.security_mirror`")
            .into()),
    }
}

fn is_debian(source: &HostSource, security: bool) -> bool {
    if source.component != "main" || !(source.origin.is_empty() || source.origin == "Debian") {
        return false;
    }
    let (suite, is_security) = match source.suite.split_once(['-', '/']) {
        None => (source.suite.as_str(), false),
        Some((suite, "updates" | "backports" | "proposed-updates")) => (suite, false),
        Some((suite, "security")) => (suite, true),
        Some(_) => return false,
    };
    is_security == security && SUITES.contains(&suite) && !source.uri.starts_with("cdrom:")
}

/// A `mirror+file:` list (cloud images have them) stands for its first entry.
fn mirror_of(uri: &str) -> Result<String> {
    let Some(list) = uri.strip_prefix("mirror+file:") else { return Ok(with_slash(uri)) };
    let path = format!("/{}", list.trim_matches('/'));
    let text = fs_err::read_to_string(&path)?;
    let first = first_mirror(&text).ok_or_else(|| {
        Problem::usage(format!("the mirror list `{path}` of this machine's apt is empty"))
            .hint("name a mirror in the pipeline file: `base.mirror`")
    })?;
    Ok(with_slash(first))
}

fn first_mirror(text: &str) -> Option<&str> {
    text.lines().filter(|line| !line.trim_start().starts_with('#')).find_map(|line| line.split_whitespace().next())
}

/// An address as apt gives it back: it writes `file:/x` for `file:///x`.
fn with_slash(uri: &str) -> String {
    let (scheme, rest) = uri.strip_prefix("file://").map_or(("", uri), |path| ("file:", path));
    format!("{scheme}{}/", rest.trim_end_matches('/'))
}

/// Whether a source can be written as one line of a `sources.list` that means what it says.
fn is_plain(source: &Source) -> bool {
    let plain = |text: &str| {
        text.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'[' | b']' | b'"' | b'\'' | b'#' | b'|'))
    };
    let words = [source.uri.as_str(), source.suite.as_str()];
    words.into_iter().chain(source.components.iter().map(String::as_str)).all(|word| plain(word) && !word.is_empty())
        && source.signed_by.to_str().is_some_and(plain)
        && source.uri.contains(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(lines: &[&str]) -> Vec<HostSource> {
        parse_host(&lines.join("\n"))
    }

    #[test]
    fn mirrors_come_from_the_file_or_from_apt() {
        let fresh = "$(ORIGIN)";
        let debian = &[
            "https://third.test/debian/|bookworm|main|Third",
            "http://mirror.test/debian/|bookworm|main|Debian",
            "http://mirror.test/debian/|bookworm-updates|main|Debian",
            "http://mirror.test/security/|bookworm-security|main|Debian",
        ][..];
        // Before the first update no origin is known: the one with updates beside it is Debian's.
        let fresh_third_first: &[&str] = &[
            &format!("https://third.test/debian/|bookworm|main|{fresh}"),
            &format!("http://mirror.test/debian/|bookworm|main|{fresh}"),
            &format!("http://mirror.test/debian/|bookworm-updates|main|{fresh}"),
            &format!("http://mirror.test/security/|stable-security|main|{fresh}"),
        ];
        let ubuntu = &["http://ubuntu.test/ubuntu/|noble|main|Ubuntu"][..];
        let other = &["http://a.test/|bookworm-pgdg|main|", "http://b.test/|bookworm|stable|", "cdrom:[x]/|bookworm|main|"][..];
        let found = Ok(("http://mirror.test/debian/".to_owned(), "http://mirror.test/security/".to_owned()));
        let none = Err("no mirror of the Debian archive is known: this machine's apt names none".to_owned());
        let given = Ok(("http://given.test/d/".to_owned(), "http://mirror.test/security/".to_owned()));
        let cases = [
            (debian, None, found.clone()),
            (fresh_third_first, None, found),
            (ubuntu, None, none.clone()),
            (other, None, none),
            (debian, Some("http://given.test/d"), given),
            (
                ubuntu,
                Some("http://given.test/d"),
                Err("no mirror of the Debian security archive is known: this machine's apt names none".to_owned()),
            ),
        ];
        for (lines, mirror, expected) in cases {
            let got = Archives::from(Suite::Trixie, mirror, None, &[], &host(lines))
                .map(|archives| (archives.sources[0].uri.clone(), archives.sources[2].uri.clone()))
                .map_err(|error| error.to_string());
            assert_eq!(got, expected, "{lines:?}");
        }
    }

    #[test]
    fn sources_and_request() {
        let repository = |uri: &str| Repository {
            uri: uri.into(),
            suite: "stable".into(),
            components: vec!["main".into(), "extra".into()],
            signed_by: "/keys/a.gpg".into(),
        };
        let with = |suite, repositories: &[Repository]| {
            Archives::from(suite, Some("http://m.test/d/"), Some("http://m.test/s"), repositories, &[])
        };
        let archives = with(Suite::Trixie, &[repository("https://x.test/apt")]).unwrap();
        assert_eq!(
            archives.sources_list(),
            format!(
                "deb [arch=amd64 signed-by={KEYRING}] http://m.test/d/ trixie main\n\
                 deb [arch=amd64 signed-by={KEYRING}] http://m.test/d/ trixie-updates main\n\
                 deb [arch=amd64 signed-by={KEYRING}] http://m.test/s/ trixie-security main\n\
                 deb [arch=amd64 signed-by=/keys/a.gpg] https://x.test/apt/ stable main extra\n"
            )
        );
        let request = request(
            "trixie",
            &["b", "a", "b"].map(String::from),
            &[repository("https://x.test/apt")],
            Some("trixie-012345678901".into()),
        );
        assert_eq!((request.suite.as_str(), request.packages.as_slice()), ("trixie", &["a".to_owned(), "b".to_owned()][..]));
        assert_eq!(request.repositories, [format!("{}/stable/main+extra", archives.sources[3].repository())]);
        assert!(!request.repositories[0].contains("x.test"), "the lock names no host");
        assert_eq!(with(Suite::Sid, &[]).unwrap().sources_list().lines().count(), 1);
        let error = with(Suite::Sid, &[repository("http://x.test/a b")]).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 2);
    }

    #[test]
    fn suites_of_trees() {
        let cases = [
            ("ID=debian\nVERSION_ID=\"13\"\nVERSION_CODENAME=trixie\n", Some(Suite::Trixie)),
            ("ID=debian\nVERSION_ID=\"12\"\n", Some(Suite::Bookworm)),
            ("ID=debian\nVERSION_CODENAME=forky\n", Some(Suite::Sid)),
            ("ID=debian\nVERSION_ID=\"11\"\nVERSION_CODENAME=bullseye\n", None),
            ("ID=ubuntu\nVERSION_ID=\"24.04\"\nVERSION_CODENAME=noble\n", None),
        ];
        for (text, expected) in cases {
            assert_eq!(suite_of(text), expected, "{text}");
        }
    }

    #[test]
    fn a_folder_is_named_as_apt_names_it() {
        for (written, expected) in
            [("file:///srv/apt", "file:/srv/apt/"), ("file:/srv/apt/", "file:/srv/apt/"), ("http://m.test/d", "http://m.test/d/")]
        {
            assert_eq!(with_slash(written), expected);
        }
    }

    #[test]
    fn mirror_lists() {
        assert_eq!(first_mirror("# two\nhttp://a.test/debian\tpriority:1\nhttp://b.test/debian\n"), Some("http://a.test/debian"));
        assert_eq!(first_mirror("# none\n\n"), None);
    }
}
