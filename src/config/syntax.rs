//! The syntax of single values: each function says whether a text is one, or what it should look like.
//!
//! Pure; positions and file names are for [`super::check`]. The error is a clause for a message,
//! the text itself included, and the second part a hint.

use std::path::{Component, Path};
use std::time::Duration;

use crate::oci::registry::{NotAReference, Reference};

/// What is wrong with a text, and how to write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    pub message: String,
    pub hint: Option<String>,
}

impl Wrong {
    fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: Some(hint.into()) }
    }
}

/// Largest uid and gid: beyond it lies outside what a user namespace of one subuid range maps.
const ID_MAX: u32 = 65535;

/// A Debian binary package name (Debian Policy 5.6.1).
pub fn package(text: &str) -> Result<(), Wrong> {
    let valid = text.len() >= 2
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c));
    if valid {
        return Ok(());
    }
    let hint = if text.contains(['=', '/']) {
        "write the name alone; `pipeline.lock` holds the version"
    } else if text.contains(':') {
        "write the name alone; packages are those of this machine's architecture"
    } else if text.contains([' ', ',']) {
        "one package per item"
    } else {
        "lower case letters, digits, `+`, `-` and `.`, at least two characters"
    };
    Err(Wrong::new(format!("`{text}` is not the name of a Debian package"), hint))
}

/// The name of an environment variable (POSIX, "Name").
pub fn variable(text: &str) -> Result<(), Wrong> {
    let valid = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let wrong = || Wrong::new(format!("`{text}` is not the name of a variable"), "letters, digits and `_`, no digit first");
    valid.then_some(()).ok_or_else(wrong)
}

/// A file name of `[A-Za-z0-9._-]+`.
pub fn file_name(text: &str) -> Result<(), Wrong> {
    let valid = !text.is_empty()
        && !matches!(text, "." | "..")
        && text.len() <= 128
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    let wrong = || Wrong::new(format!("`{text}` is not a file name"), "letters, digits, `.`, `_` and `-`");
    valid.then_some(()).ok_or_else(wrong)
}

/// An absolute path in the image, below `/`, without `..`.
pub fn image_path(text: &str) -> Result<(), Wrong> {
    let wrong = |hint: &str| Err(Wrong::new(format!("`{text}` is not an absolute path in the image"), hint));
    if !text.starts_with('/') {
        wrong("it begins with `/`")
    } else if text.chars().any(char::is_control) {
        wrong("write it in one line, without control characters")
    } else if Path::new(text).components().any(|part| part == Component::ParentDir) {
        wrong("write it without `..`")
    } else {
        Ok(())
    }
}

/// A path that stays below the folder it starts in.
pub fn inner_path(text: &str) -> Result<(), Wrong> {
    let inside =
        !text.is_empty() && Path::new(text).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    let wrong = || Wrong::new(format!("`{text}` is not a path below the source"), "relative, without `..`");
    (inside && !text.contains('\0')).then_some(()).ok_or_else(wrong)
}

/// `USER`, `UID` or `UID:GID`.
pub fn user(text: &str) -> Result<(), Wrong> {
    let id = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && text.parse().is_ok_and(|id: u32| id <= ID_MAX)
    };
    let name = text.len() <= 32
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c));
    let valid = name || id(text) || text.split_once(':').is_some_and(|(uid, gid)| id(uid) && id(gid));
    let wrong = || Wrong::new(format!("`{text}` is not a user"), format!("`USER`, `UID` or `UID:GID`, numbers up to {ID_MAX}"));
    valid.then_some(()).ok_or_else(wrong)
}

/// A duration above zero: numbers with `s`, `m` or `h`, like `90s` or `1h30m`.
pub fn duration(text: &str) -> Result<Duration, Wrong> {
    let hint = if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) {
        format!("for seconds write `{text}s`")
    } else {
        "a number with `s`, `m` or `h`, like `90s`, `30m` or `2h`".into()
    };
    let wrong = || Wrong::new(format!("`{text}` is not a duration"), hint.clone());
    let mut rest = text;
    let mut seconds = 0_u64;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let factor = match rest.as_bytes().get(digits) {
            Some(b's') => 1,
            Some(b'm') => 60,
            Some(b'h') => 3600,
            _ => return Err(wrong()),
        };
        let amount: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        seconds = amount.checked_mul(factor).and_then(|part| seconds.checked_add(part)).ok_or_else(wrong)?;
        rest = &rest[digits + 1..];
    }
    // A year is beyond every step and deadline, and far from overflowing a clock.
    if (1..=366 * 24 * 3600).contains(&seconds) { Ok(Duration::from_secs(seconds)) } else { Err(wrong()) }
}

/// A number of bytes above zero: digits, then `K`, `M`, `G` or `T` (powers of 1024), or nothing.
pub fn size(text: &str) -> Result<u64, Wrong> {
    let wrong = || Wrong::new(format!("`{text}` is not a size"), "a number with `K`, `M`, `G` or `T`, like `512M` or `2G`");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let shift = match &text[digits..] {
        "" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        "T" | "TiB" => 40,
        _ => return Err(wrong()),
    };
    let amount: u64 = text[..digits].parse().map_err(|_| wrong())?;
    amount.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(wrong)
}

/// A reference to an image in a registry.
pub fn image_reference(text: &str) -> Result<(), Wrong> {
    let why = match Reference::parse(text) {
        Ok(_) => return Ok(()),
        Err(NotAReference::Because(why)) => why,
        Err(NotAReference::Login) => {
            let hint = "log in with `docker login` or `podman login`; their files are read";
            return Err(Wrong::new("an image reference holds no user name or password", hint));
        }
    };
    Err(Wrong::new(format!("`{text}` is not an image in a registry: {why}"), "like `docker.io/library/debian:13`"))
}

/// Where a Git repository is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GitAddress {
    /// A URL, or `HOST:PATH` as ssh has it.
    Remote,
    /// A folder of this machine.
    Folder,
}

/// A Git address; passwords in it are refused because addresses end up in records.
pub fn git_address(text: &str) -> Result<GitAddress, Wrong> {
    let wrong = |hint: &str| Err(Wrong::new(format!("`{text}` is not the address of a Git repository"), hint));
    if text.is_empty() || text.starts_with('-') || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return wrong("like `https://…/shop.git` or `git@…:shop.git`");
    }
    if let Some((scheme, rest)) = text.split_once("://") {
        if !["https", "http", "ssh", "git", "file"].contains(&scheme) {
            return wrong("known are `https://`, `http://`, `ssh://`, `git://` and `file://`");
        }
        let host = rest.split('/').next().unwrap_or_default();
        if host.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')) {
            let message = "an address with a password in it would end up in records";
            return Err(Wrong::new(message, "remove it; Git's credential helpers are asked for the password"));
        }
        return Ok(GitAddress::Remote);
    }
    let is_ssh = text.split_once(':').is_some_and(|(host, _)| !host.is_empty() && !host.contains('/'));
    Ok(if is_ssh { GitAddress::Remote } else { GitAddress::Folder })
}

/// A branch, tag or commit.
pub fn git_reference(text: &str) -> Result<(), Wrong> {
    let valid = git2::Reference::is_valid_name(&format!("refs/heads/{text}")) && !text.starts_with('-');
    let wrong = || Wrong::new(format!("`{text}` is not a branch, tag or commit"), "like `main`, `v1.2` or a commit's digits");
    valid.then_some(()).ok_or_else(wrong)
}

/// The nearest text that is a [`super::types::Name`]: lower case, everything else one `-`; `app` when nothing is left.
pub fn to_name(text: &str) -> String {
    let mut name = String::new();
    for c in text.chars().flat_map(char::to_lowercase) {
        let kept = c.is_ascii_lowercase() || c.is_ascii_digit() || (matches!(c, '.' | '_') && !name.ends_with(['.', '_', '-']));
        if kept {
            name.push(c);
        } else if !name.ends_with(['.', '_', '-']) {
            name.push('-');
        }
        if name.len() == 128 {
            break;
        }
    }
    let name = name.trim_matches(['.', '_', '-']);
    if name.is_empty() { "app".into() } else { name.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::types::Name;

    #[test]
    fn what_is_and_what_is_not() {
        type Check = fn(&str) -> Result<(), Wrong>;
        let cases: [(&str, Check, &[&str], &[&str]); 8] = [
            (
                "package",
                package,
                &["g++", "libc6", "python3.13", "7z"],
                &["", "a", "Curl", "curl=8", "curl:amd64", "-x", "a b", "é2"],
            ),
            ("variable", variable, &["A", "_x9", "PIP_TOKEN"], &["", "9A", "A-B", "A B", "Ä"]),
            ("file name", file_name, &["a", "pip-token", ".netrc"], &["", ".", "..", "a/b", "a b", "ü"]),
            ("image path", image_path, &["/", "/opt/app"], &["", "opt", "/a/../b", "/a\0"]),
            ("inner path", inner_path, &["a", "a/b", "./a"], &["", "/a", "../a", "a/../../b"]),
            ("user", user, &["app", "1001", "1001:0", "_apt"], &["", "70000", "1:x", "a:b", "A", "1:", ":1", "+1"]),
            (
                "image",
                image_reference,
                &["debian:13", "quay.io/a/b@sha256:0123456789012345678901234567890123456789012345678901234567890123"],
                &["", "A b", "x:y:z/"],
            ),
            ("ref", git_reference, &["main", "feature/x", "v1.0", "0123abc"], &["", "-x", "a b", "a..b", "x~1"]),
        ];
        for (what, check, good, bad) in cases {
            let accepted: Vec<&&str> = good.iter().chain(bad).filter(|text| check(text).is_ok()).collect();
            assert_eq!(accepted, good.iter().collect::<Vec<_>>(), "{what}");
        }
    }

    #[test]
    fn durations() {
        let cases = [("90s", Some(90)), ("30m", Some(1800)), ("2h", Some(7200)), ("1h30m", Some(5400)), ("0s", None), ("", None)];
        let more = [
            ("90", None),
            ("s", None),
            ("1d", None),
            ("-1s", None),
            ("99999999999999999999s", None),
            ("9999999999999999h", None),
            ("1 s", None),
        ];
        for (text, seconds) in cases.into_iter().chain(more) {
            assert_eq!(duration(text).ok(), seconds.map(Duration::from_secs), "{text}");
        }
        assert_eq!(duration("90").unwrap_err().hint.as_deref(), Some("for seconds write `90s`"));
    }

    #[test]
    fn sizes() {
        let cases =
            [("1", Some(1)), ("512M", Some(512 << 20)), ("2G", Some(2 << 30)), ("1KiB", Some(1024)), ("1T", Some(1 << 40))];
        let wrong = ["", "0", "M", "2g", "1.5G", "-1", "99999999999T", "ü"];
        for (text, bytes) in cases.into_iter().chain(wrong.map(|text| (text, None))) {
            assert_eq!(size(text).ok(), bytes, "{text}");
        }
    }

    #[test]
    fn git_addresses() {
        let cases = [
            ("https://git.example/shop.git", Some(GitAddress::Remote)),
            ("https://me@git.example/shop.git", Some(GitAddress::Remote)),
            ("git@git.example:shop.git", Some(GitAddress::Remote)),
            ("../shop", Some(GitAddress::Folder)),
            ("/srv/git/a:b", Some(GitAddress::Folder)),
            ("https://me:secret@git.example/shop.git", None),
            ("ftp://git.example/shop", None),
            ("--upload-pack=x", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(git_address(text).ok(), expected, "{text}");
        }
        assert!(!git_address("https://me:secret@git.example/x").unwrap_err().message.contains("secret"));
    }

    #[test]
    fn names_from_anything() {
        let cases = [
            ("Notes App", "notes-app"),
            ("my_app.v2", "my_app.v2"),
            ("..x--y..", "x-y"),
            ("Ünï", "n"),
            ("日本", "app"),
            ("a..b", "a.b"),
        ];
        for (text, name) in cases {
            assert_eq!((to_name(text).as_str(), to_name(text).parse::<Name>().is_ok()), (name, true), "{text}");
        }
        assert!(to_name(&"x-".repeat(200)).parse::<Name>().is_ok());
    }
}
