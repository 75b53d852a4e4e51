//! An apt root of our own: archives, lists and status apart from this machine's packages.
//!
//! The root is a folder below the cache, named by the archives it knows, so that a second resolve
//! finds the lists of the first. Signatures are always verified. What this machine's apt says about
//! *how* to fetch (proxy, certificates, retries, whether dates are checked, `auth.conf`) is carried
//! over; what it says about *what* to accept is not.
//!
//! ```text
//! CACHE/apt/DIGEST/
//!   lock                            flock: one user at a time
//!   apt.conf                        the whole configuration, read through APT_CONFIG
//!   etc/{sources.list,preferences}  etc/preferences: pins of `update_missing`
//!   lists/  cache/  status          status: what counts as installed
//! ```

use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context as _, Result};

use super::mirrors::Archives;
use crate::cmd::{self, Cmd};
use crate::error::{self, Problem};
use crate::oci::digest::Digest;

/// Settings of this machine's apt below `Acquire::` that say what to accept, which lists to keep or what a
/// downloaded file is; they are ours to decide.
const NOT_CARRIED: [&str; 11] = [
    "Acquire::AllowInsecureRepositories",
    "Acquire::AllowWeakRepositories",
    "Acquire::AllowDowngradeToInsecureRepositories",
    "Acquire::AllowReleaseInfoChange",
    "Acquire::IndexTargets",
    "Acquire::Changelogs",
    "Acquire::Languages",
    "Acquire::GzipIndexes",
    "Acquire::CompressionTypes",
    "Acquire::cdrom",
    "Acquire::Source-Symlinks",
];

/// apt's own retries of a failed transfer; more is left to the caller, who says exit code 75.
const RETRIES: u32 = 2;

/// Seconds without an answer after which a mirror counts as unreachable.
const TIMEOUT_SECONDS: u32 = 30;

/// An apt root, held alone while this value lives.
#[derive(Debug)]
pub struct Apt {
    pub(super) archives: Archives,
    dir: PathBuf,
    /// Whether the lists were brought up to date by this value.
    fresh: bool,
    _lock: fs_err::File,
}

impl Apt {
    /// Opens the root of `archives` below `cache`; waits while another process uses it. No network.
    pub fn open(archives: &Archives, cache: &Path) -> Result<Self> {
        // apt does not take relative paths in its configuration for what they are.
        let cache = std::path::absolute(cache).context("cannot find the cache folder")?;
        if cache.to_str().is_none_or(|path| path.contains(['"', '\\', ';', '\n'])) {
            return Err(Problem::usage(format!("the cache folder `{}` has a name apt cannot use", cache.display())).into());
        }
        let dir = cache.join("apt").join(Digest::of(archives.sources_list()).short());
        for part in ["etc", "lists/partial", "cache/archives/partial"] {
            fs_err::create_dir_all(dir.join(part))?;
        }
        let lock = fs_err::File::create(dir.join("lock"))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("cannot lock the apt folder")?;
        let host = Cmd::new("apt-config")
            .env("LC_ALL", "C.UTF-8")
            .arg("dump")
            .text()
            .context("cannot read this machine's apt settings")?;
        fs_err::write(dir.join("apt.conf"), configuration(&dir, &host))?;
        fs_err::write(dir.join("etc/sources.list"), archives.sources_list())?;
        let apt = Self { archives: archives.clone(), dir, fresh: false, _lock: lock };
        apt.set_status("")?;
        apt.set_preferences("")?;
        Ok(apt)
    }

    /// Brings the lists up to date, once per value.
    ///
    /// # Errors
    /// Transient for an archive that does not answer, failed for one whose signature is wrong.
    pub fn refresh(&mut self) -> Result<()> {
        if !self.fresh {
            self.update()?;
            self.fresh = true;
        }
        Ok(())
    }

    /// `apt-get update`, whether or not it was done.
    pub(super) fn update(&self) -> Result<()> {
        let (line, output) = self.run(self.cmd("apt-get").args(["-q", "update"]))?;
        if output.status.success() {
            return Ok(());
        }
        Err(explain(&line, &output).into())
    }

    /// The text of the dpkg status file: what counts as installed.
    pub(super) fn set_status(&self, text: &str) -> Result<()> {
        Ok(fs_err::write(self.dir.join("status"), text)?)
    }

    /// The text of the preferences file; empty for none.
    pub(super) fn set_preferences(&self, text: &str) -> Result<()> {
        Ok(fs_err::write(self.dir.join("etc/preferences"), text)?)
    }

    /// Adds `lines` to the archives' own; empty takes them away again.
    pub(super) fn set_sources(&self, lines: &str) -> Result<()> {
        Ok(fs_err::write(self.dir.join("etc/sources.list"), self.archives.sources_list() + lines)?)
    }

    /// A program of apt's with this root's configuration.
    pub(super) fn cmd(&self, program: &str) -> Cmd {
        Cmd::new(program).env("APT_CONFIG", self.dir.join("apt.conf")).env("LC_ALL", "C.UTF-8").env_remove("LANGUAGE")
    }

    /// Runs to the end, whatever the status; the command line for messages.
    pub(super) fn run(&self, command: Cmd) -> Result<(String, Output)> {
        let line = command.line();
        Ok((line, command.output()?))
    }

    /// All package names the lists know.
    pub(super) fn names(&self) -> Result<Vec<String>> {
        Ok(self.cmd("apt-cache").arg("pkgnames").text()?.lines().map(str::to_owned).collect())
    }
}

/// The configuration of a root at `dir`: ours, and the carried part of this machine's
/// (`apt-config dump`).
fn configuration(dir: &Path, host: &str) -> String {
    let dir = dir.display();
    let arch = super::ARCHITECTURE;
    let carried: Vec<&str> = host.lines().filter(|line| is_carried(line)).collect();
    let has = |key: &str| carried.iter().any(|line| line.split_once(' ').is_some_and(|(name, _)| name.eq_ignore_ascii_case(key)));
    let mut text = format!(
        r#"Dir::Etc "{dir}/etc";
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "{dir}/etc/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "{dir}/etc/preferences";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::trusted "/dev/null";
Dir::Etc::trustedparts "/dev/null";
Dir::Etc::netrc "{netrc}";
Dir::Etc::netrcparts "{netrcparts}";
Dir::State "{dir}";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/status";
Dir::State::extended_states "{dir}/extended_states";
Dir::Cache "{dir}/cache";
Dir::Log "{dir}/cache";
APT::Architecture "{arch}";
APT::Architectures {{ "{arch}"; }};
APT::Sandbox::User "root";
APT::Install-Recommends "false";
APT::Install-Suggests "false";
APT::Get::AllowUnauthenticated "false";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::ForceHash "SHA256";
Acquire::Source-Symlinks "false";
"#,
        netrc = host_path(host, "Dir::Etc::netrc"),
        netrcparts = host_path(host, "Dir::Etc::netrcparts"),
    );
    let defaults = [
        ("Acquire::Retries", RETRIES),
        ("Acquire::http::Timeout", TIMEOUT_SECONDS),
        ("Acquire::https::Timeout", TIMEOUT_SECONDS),
    ];
    for (key, value) in defaults {
        if !has(key) {
            text += &format!("{key} \"{value}\";\n");
        }
    }
    for line in carried {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Whether a line of `apt-config dump` is about how to fetch.
fn is_carried(line: &str) -> bool {
    const PREFIX: &str = "Acquire::";
    let Some(key) = line.split(' ').next() else { return false };
    key.get(..PREFIX.len()).is_some_and(|prefix| prefix.eq_ignore_ascii_case(PREFIX))
        && !NOT_CARRIED.iter().any(|name| {
            key.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name))
                && (key.len() == name.len() || key[name.len()..].starts_with(':'))
        })
}

/// A file of this machine's apt, absolute: `Dir`, `Dir::Etc` and the setting itself put together.
/// Credentials stay where they are; only the place is passed on.
fn host_path(dump: &str, key: &str) -> String {
    let value = |key: &str| {
        dump.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" \"")?.strip_suffix("\";")).unwrap_or_default()
    };
    Path::new("/").join(value("Dir")).join(value("Dir::Etc")).join(value(key)).display().to_string()
}

/// Why apt could not get something, from its own words; the most telling line wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// A wrong or missing signature.
    Signature,
    /// The Release file is too old, or from the future.
    Date,
    /// The archive answered that it has no such file.
    NotThere,
    /// Bytes that do not match their digest.
    Mismatch,
    /// Everything else about fetching: names, connections, time.
    Network,
    Other,
}

/// Phrases of apt 2.x and 3.x and the methods it uses, and what they mean; the first that is found counts.
const PHRASES: [(&str, Cause); 29] = [
    ("NO_PUBKEY", Cause::Signature),
    ("BADSIG", Cause::Signature),
    ("EXPKEYSIG", Cause::Signature),
    ("REVKEYSIG", Cause::Signature),
    ("Missing key", Cause::Signature),
    ("is not signed", Cause::Signature),
    ("public key is not available", Cause::Signature),
    ("signatures were invalid", Cause::Signature),
    ("signatures couldn't be verified", Cause::Signature),
    ("Sub-process /usr/bin/sqv returned an error", Cause::Signature),
    ("OpenPGP signature verification failed", Cause::Signature),
    ("is not valid yet", Cause::Date),
    ("is expired", Cause::Date),
    ("Hash Sum mismatch", Cause::Mismatch),
    ("File has unexpected size", Cause::Mismatch),
    ("Could not resolve", Cause::Network),
    ("Temporary failure resolving", Cause::Network),
    ("Could not connect", Cause::Network),
    ("Unable to connect", Cause::Network),
    ("Cannot initiate the connection", Cause::Network),
    ("Connection failed", Cause::Network),
    ("onnection timed out", Cause::Network),
    ("ertificate", Cause::Network),
    ("404  Not Found", Cause::NotThere),
    ("410  Gone", Cause::NotThere),
    ("does not have a Release file", Cause::NotThere),
    ("no longer has a Release file", Cause::NotThere),
    ("File not found", Cause::NotThere),
    ("Failed to fetch", Cause::Network),
];

pub(super) fn cause(text: &str) -> Cause {
    PHRASES.iter().find(|(phrase, _)| text.contains(phrase)).map_or(Cause::Other, |(_, cause)| *cause)
}

/// The lines of apt's that matter, without its marks.
pub(super) fn words(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let mut lines: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("E: ").or_else(|| line.strip_prefix("W: "))).collect();
    lines.dedup();
    lines.join("\n  ")
}

/// The problem behind a failed `apt-get update` or transfer.
pub(super) fn explain(line: &str, output: &Output) -> Problem {
    let text = words(&output.stderr);
    match cause(&text) {
        Cause::Signature => Problem::failed(format!("the signature of an archive cannot be verified:\n  {text}"))
            .hint("a newer `debian-archive-keyring` has the keys of newer suites; `signed_by` of a repository must be that archive's key"),
        Cause::Date => Problem::failed(format!("the index of an archive is out of date:\n  {text}"))
            .hint("check this machine's clock; for an archive that stands still on purpose, set `Acquire::Check-Valid-Until \"false\";` in this machine's apt configuration"),
        Cause::NotThere => Problem::usage(format!("an archive does not have what was asked for:\n  {text}"))
            .hint("check `base.mirror`, `base.security_mirror` and `base.repositories`, or the mirror in this machine's apt configuration"),
        Cause::Mismatch => Problem::transient(format!("an archive gave other bytes than its index says:\n  {text}"))
            .hint("mirrors do that while they are updated, and broken proxies; try again later"),
        Cause::Network => Problem::transient(format!("an archive cannot be reached:\n  {text}"))
            .hint("the mirror is `base.mirror` of the pipeline file, or else that of this machine's apt; proxy settings are apt's"),
        Cause::Other => cmd::failure(line, output.status, &output.stderr),
    }
}

/// The problem behind a failed `apt-get install --print-uris`.
pub(super) fn explain_install(
    line: &str,
    output: &Output,
    wanted: &[String],
    names: impl FnOnce() -> Result<Vec<String>>,
) -> Result<Problem> {
    let text = words(&output.stderr);
    let unknown = unknown_packages(&text, wanted);
    if unknown.is_empty() {
        return Ok(match cause(&text) {
            Cause::Other => Problem::failed(format!("the packages cannot be installed together:\n  {}", unmet(output, &text)))
                .hint("`pipeline update` resolves everything anew; check `packages` and `repositories` of the pipeline file"),
            _ => explain(line, output),
        });
    }
    let names = names()?;
    let many = if unknown.len() == 1 { "package" } else { "packages" };
    let list = unknown.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let mut problem = Problem::usage(format!("unknown {many} {list}"));
    for name in &unknown {
        if let Some(nearest) = error::nearest(name, names.iter().map(String::as_str).filter(|known| known != name)) {
            problem = problem.hint(format!("the nearest name to `{name}` is `{nearest}`"));
        } else {
            problem = problem.hint(format!("`apt-cache search {name}` on a machine with the same suite looks for it"));
        }
    }
    Ok(problem)
}

/// The wanted packages apt says it does not know.
fn unknown_packages(text: &str, wanted: &[String]) -> Vec<String> {
    const PHRASES: [(&str, &str); 4] = [
        ("Unable to locate package ", ""),
        ("Package '", "' has no installation candidate"),
        ("Couldn't find any package by glob '", "'"),
        ("Couldn't find any package by regex '", "'"),
    ];
    let mut found: Vec<String> = text
        .lines()
        .filter_map(|line| {
            let line = line.trim();
            PHRASES.iter().find_map(|(start, end)| line.strip_prefix(start)?.strip_suffix(end))
        })
        // apt repeats `x` for `x=1`; what was written in the pipeline file is what counts.
        .filter(|name| wanted.iter().any(|want| want == name || want.split('=').next() == Some(name)))
        .map(str::to_owned)
        .collect();
    found.sort();
    found.dedup();
    found
}

/// apt tells what is unmet on standard output, after a heading.
fn unmet(output: &Output, text: &str) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<&str> = stdout
        .lines()
        .skip_while(|line| !line.contains("unmet dependencies"))
        .skip(1)
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .collect();
    if lines.is_empty() { text.to_owned() } else { lines.join("\n  ") }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;
    use crate::error::Kind;

    fn output(stderr: &str) -> Output {
        Output { status: std::process::ExitStatus::from_raw(100 << 8), stdout: Vec::new(), stderr: stderr.into() }
    }

    #[test]
    fn the_way_to_fetch_is_carried_over_and_what_to_accept_is_not() {
        let host = r#"Dir "/";
Dir::Etc "etc/apt";
Dir::Etc::netrc "auth.conf";
Dir::Etc::netrcparts "auth.conf.d";
Acquire "";
Acquire::AllowInsecureRepositories "1";
Acquire::http "";
Acquire::http::Proxy "http://proxy.test:3142";
Acquire::http::Timeout "5";
Acquire::Check-Valid-Until "false";
Acquire::IndexTargets::deb::DEP-11 "";
Acquire::Languages:: "en";
APT::Get::AllowUnauthenticated "1";
"#;
        let text = configuration(Path::new("/c/apt/x"), host);
        let tail: Vec<&str> = text.lines().skip_while(|line| !line.starts_with("Acquire::Retries")).collect();
        assert_eq!(
            tail,
            [
                r#"Acquire::Retries "2";"#,
                r#"Acquire::https::Timeout "30";"#,
                r#"Acquire::http "";"#,
                r#"Acquire::http::Proxy "http://proxy.test:3142";"#,
                r#"Acquire::http::Timeout "5";"#,
                r#"Acquire::Check-Valid-Until "false";"#,
            ]
        );
        assert!(
            text.contains("Dir::Etc::netrc \"/etc/apt/auth.conf\";\nDir::Etc::netrcparts \"/etc/apt/auth.conf.d\";\n"),
            "{text}"
        );
        assert!(text.contains("APT::Get::AllowUnauthenticated \"false\";\n"), "{text}");
    }

    #[test]
    fn failures_are_told_apart() {
        let cases = [
            (
                "E: Failed to fetch http://m.test/dists/trixie/InRelease  Could not connect to m.test:80 (192.0.2.1).",
                Kind::Transient,
                "an archive cannot be reached",
            ),
            (
                "E: Failed to fetch http://m.test/dists/trixie/InRelease  Temporary failure resolving 'm.test'",
                Kind::Transient,
                "an archive cannot be reached",
            ),
            (
                "E: The repository 'http://m.test trixy Release' does not have a Release file.",
                Kind::Usage,
                "an archive does not have",
            ),
            (
                "W: GPG error: http://m.test trixie InRelease: The following signatures couldn't be verified because the public key is not available: NO_PUBKEY 0\nE: The repository 'http://m.test trixie InRelease' is not signed.",
                Kind::Failed,
                "the signature of an archive",
            ),
            (
                "E: Release file for http://m.test/InRelease is expired (invalid since 1d).",
                Kind::Failed,
                "the index of an archive is out of date",
            ),
            ("E: Failed to fetch http://m.test/Packages  Hash Sum mismatch", Kind::Transient, "an archive gave other bytes"),
            ("E: something new", Kind::Failed, "`apt-get update` ended with status 100"),
        ];
        for (stderr, kind, start) in cases {
            let problem = explain("apt-get update", &output(stderr));
            assert_eq!((problem.kind, problem.message.starts_with(start)), (kind, true), "{problem}");
        }
    }

    #[test]
    fn an_unknown_package_names_the_nearest() {
        let wanted = ["curll".to_owned(), "ok".to_owned()];
        let names = || Ok(vec!["curl".to_owned(), "zsh".to_owned()]);
        let problem = explain_install("apt-get install", &output("E: Unable to locate package curll"), &wanted, names).unwrap();
        assert_eq!((problem.kind, problem.message.as_str()), (Kind::Usage, "unknown package `curll`"));
        assert_eq!(problem.hints, ["the nearest name to `curll` is `curl`"]);
        let problem = explain_install("x", &output("E: Package 'ok' has no installation candidate"), &wanted, names).unwrap();
        assert_eq!(problem.message, "unknown package `ok`");
        let mut conflict = output("E: Unable to correct problems, you have held broken packages.");
        conflict.stdout = b"The following packages have unmet dependencies:\n a : Conflicts: b\n".to_vec();
        let problem = explain_install("x", &conflict, &wanted, names).unwrap();
        assert_eq!(problem.message, "the packages cannot be installed together:\n   a : Conflicts: b");
    }
}
