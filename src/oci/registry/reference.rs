//! The name of an image in a registry: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::error::Problem;
use crate::oci::digest::Digest;

/// Characters of a tag (distribution specification, "Pulling manifests").
const TAG_LENGTH: usize = 128;
/// Characters of registry and repository, which clients take together (same section).
const NAME_LENGTH: usize = 255;
/// The registry of names without one.
const DOCKER: &str = "docker.io";

/// A reference, in its normal form: `debian:13` is `docker.io/library/debian:13`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// The registry as people write it: `docker.io`, `127.0.0.1:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// `latest` when neither tag nor digest was written.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same repository, by digest.
    #[must_use]
    pub fn at(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// The same repository, by tag.
    ///
    /// # Errors
    /// What is no tag (distribution specification, "Pulling manifests").
    pub fn with_tag(&self, tag: &str) -> Result<Self, Problem> {
        if !is_tag(tag) {
            return Err(Problem::usage(format!("`{tag}` is not a tag"))
                .hint("a tag has up to 128 letters, digits, `.`, `_`, `-`, and begins with none of `.` and `-`"));
        }
        Ok(Self { tag: Some(tag.into()), digest: None, ..self.clone() })
    }

    /// Whether the registry is on this machine, where plain HTTP is no risk.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.registry)
    }

    /// What stands behind the repository in a request: the digest, else the tag.
    pub(super) fn within(&self) -> String {
        self.digest.map_or_else(|| self.tag.clone().unwrap_or_default(), |digest| digest.to_string())
    }
}

/// A registry without its port.
pub(super) fn host_of(registry: &str) -> &str {
    match registry.split_once(']') {
        // `[::1]:5000`
        Some((address, _)) => address.trim_start_matches('['),
        None => registry.rsplit_once(':').map_or(registry, |(host, _)| host),
    }
}

pub(super) fn is_loopback(registry: &str) -> bool {
    let host = host_of(registry);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// What is wrong with a name that is no reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotAReference {
    /// Why, to stand behind the name and a colon.
    Because(&'static str),
    /// It has a user name and perhaps a password in it, and is not to be repeated.
    Login,
}

/// A registry, by the rule of Docker's clients: what stands before the first slash, when it has a dot, a port or an upper-case
/// letter, or is `localhost`.
fn split_registry(name: &str) -> Option<(&str, &str)> {
    let (host, rest) = name.split_once('/')?;
    let is_host = host.contains(['.', ':', '[']) || host == "localhost" || host.chars().any(|c| c.is_ascii_uppercase());
    is_host.then_some((host, rest))
}

fn is_registry(host: &str) -> bool {
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit()) && port.parse::<u16>().is_ok();
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        return address.parse::<std::net::Ipv6Addr>().is_ok() && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port));
    }
    let (name, port) = host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port)));
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    name.split('.').all(is_label) && port.is_none_or(is_port)
}

/// One component of a repository's name: letters and digits with `.`, `_`, `__` or dashes between them.
fn is_component(component: &str) -> bool {
    let mut between = String::new();
    for c in component.chars() {
        match c {
            'a'..='z' | '0'..='9' => {
                let separates = matches!(between.as_str(), "" | "." | "_" | "__") || between.bytes().all(|c| c == b'-');
                if !separates {
                    return false;
                }
                between.clear();
            }
            '.' | '_' | '-' if between.is_empty() && component.starts_with(c) => return false,
            '.' | '_' | '-' => between.push(c),
            _ => return false,
        }
    }
    between.is_empty() && !component.is_empty()
}

fn is_tag(tag: &str) -> bool {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    let good = |(index, c): (usize, u8)| word(c) || (index > 0 && b".-".contains(&c));
    (1..=TAG_LENGTH).contains(&tag.len()) && tag.bytes().enumerate().all(good)
}

impl Reference {
    /// Reads `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]` (the grammar of the distribution project's `reference` package, which the
    /// distribution specification's names are a part of).
    ///
    /// # Errors
    /// Why it is none.
    pub fn parse(text: &str) -> Result<Self, NotAReference> {
        let because = |why| Err(NotAReference::Because(why));
        let name = text.strip_prefix("docker://").unwrap_or(text);
        if name.contains("://") {
            return because("it is a URL");
        }
        let (name, digest) = name.split_once('@').map_or((name, None), |(name, digest)| (name, Some(digest)));
        // `user:password@host/name`
        if digest.is_some_and(|rest| rest.contains('/')) {
            return Err(NotAReference::Login);
        }
        let digest = match digest {
            None => None,
            Some(digest) => match digest.parse().ok().filter(|_| digest.starts_with("sha256:")) {
                Some(digest) => Some(digest),
                None if digest.starts_with("sha256:") => return because("a digest is `sha256:` and 64 hexadecimal digits"),
                None => return because("only `sha256` digests are known"),
            },
        };
        let (registry, rest) = split_registry(name).map_or((DOCKER, name), |(host, rest)| (host, rest));
        let (repository, tag) = rest.rsplit_once(':').map_or((rest, None), |(repository, tag)| (repository, Some(tag)));
        if repository.is_empty() {
            return because("it names no repository");
        }
        if repository.chars().any(|c| c.is_ascii_uppercase()) {
            return because("the repository must be in lower case");
        }
        if !repository.split('/').all(is_component) {
            return because("a repository has a-z and 0-9, with `.`, `_`, `-` or `/` between them");
        }
        if !is_registry(registry) {
            return because("what stands before the first `/` is no host name");
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return because("a tag has up to 128 letters, digits, `.`, `_`, `-`, and begins with none of `.` and `-`");
        }
        let registry = if registry == "index.docker.io" { DOCKER } else { registry };
        let is_official = registry == DOCKER && !repository.contains('/');
        let repository = if is_official { format!("library/{repository}") } else { repository.into() };
        if registry.len() + 1 + repository.len() > NAME_LENGTH {
            return because("it is longer than 255 characters");
        }
        let tag = tag.or_else(|| digest.is_none().then_some("latest"));
        Ok(Self { registry: registry.into(), repository, tag: tag.map(str::to_owned), digest })
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        self.digest.map_or(Ok(()), |digest| write!(f, "@{digest}"))
    }
}

impl FromStr for Reference {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        Self::parse(text).map_err(|wrong| match wrong {
            NotAReference::Because(why) => Problem::usage(format!("`{text}` is not an image reference: {why}"))
                .hint("write `[HOST[:PORT]/]NAME[:TAG][@sha256:…]`, for example `docker.io/library/debian:13`"),
            NotAReference::Login => Problem::usage("an image reference holds no user name or password")
                .hint("log in with `docker login` or `podman login`; their files are read"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_have_one_normal_form() {
        for (text, normal, loopback) in [
            ("debian", "docker.io/library/debian:latest".to_owned(), false),
            ("debian:13", "docker.io/library/debian:13".to_owned(), false),
            ("team/app:1", "docker.io/team/app:1".to_owned(), false),
            ("index.docker.io/library/debian:13", "docker.io/library/debian:13".to_owned(), false),
            ("docker://quay.io/a/b:c", "quay.io/a/b:c".to_owned(), false),
            ("localhost/x", "localhost/x:latest".to_owned(), true),
            ("localhost:5000/a__b/c--d/e.f_g", "localhost:5000/a__b/c--d/e.f_g:latest".to_owned(), true),
            ("MACHINE/x", "MACHINE/x:latest".to_owned(), false),
            ("127.8.0.1:5000/x/y", "127.8.0.1:5000/x/y:latest".to_owned(), true),
            ("[::1]:5000/x/y:1", "[::1]:5000/x/y:1".to_owned(), true),
            ("[::1]/x", "[::1]/x:latest".to_owned(), true),
            ("[2001:db8::1]:5000/x", "[2001:db8::1]:5000/x:latest".to_owned(), false),
            ("128.0.0.1:5000/x/y", "128.0.0.1:5000/x/y:latest".to_owned(), false),
            (&format!("127.0.0.1:5000/x/y@{DIGEST}"), format!("127.0.0.1:5000/x/y@{DIGEST}"), true),
            (&format!("quay.io/x:1@{DIGEST}"), format!("quay.io/x:1@{DIGEST}"), false),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!((reference.to_string(), reference.is_loopback()), (normal.clone(), loopback), "{text}");
            assert_eq!(normal.parse::<Reference>().unwrap(), reference, "{text}");
        }
        let reference: Reference = format!("quay.io/x:1@{DIGEST}").parse().unwrap();
        assert_eq!((reference.tag(), reference.digest()), (Some("1"), Some(DIGEST.parse().unwrap())));
        assert_eq!(
            "debian".parse::<Reference>().unwrap().at(DIGEST.parse().unwrap()).to_string(),
            format!("docker.io/library/debian@{DIGEST}")
        );
    }

    #[test]
    fn tags_are_checked() {
        let reference: Reference = format!("quay.io/x@{DIGEST}").parse().unwrap();
        for tag in ["1.4", "_x", "a", "sha256-0.sig", &"x".repeat(128)] {
            assert_eq!(reference.with_tag(tag).unwrap().to_string(), format!("quay.io/x:{tag}"));
        }
        for tag in ["", ".a", "-a", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(reference.with_tag(tag).is_err(), "{tag}");
        }
    }

    #[test]
    fn what_is_no_reference_is_told() {
        for (text, message) in [
            ("", "`` is not an image reference: it names no repository"),
            ("quay.io/", "`quay.io/` is not an image reference: it names no repository"),
            ("Debian:13", "`Debian:13` is not an image reference: the repository must be in lower case"),
            ("quay.io/Team/app", "`quay.io/Team/app` is not an image reference: the repository must be in lower case"),
            ("https://quay.io/a", "`https://quay.io/a` is not an image reference: it is a URL"),
            ("[::1]:http/a", "`[::1]:http/a` is not an image reference: what stands before the first `/` is no host name"),
            ("a..b/c", "`a..b/c` is not an image reference: what stands before the first `/` is no host name"),
            ("x.y:99999/c", "`x.y:99999/c` is not an image reference: what stands before the first `/` is no host name"),
            ("a b", "`a b` is not an image reference: a repository has a-z and 0-9, with `.`, `_`, `-` or `/` between them"),
            (
                "a/../b",
                "`a/../b` is not an image reference: a repository has a-z and 0-9, with `.`, `_`, `-` or `/` between them",
            ),
            ("a//b", "`a//b` is not an image reference: a repository has a-z and 0-9, with `.`, `_`, `-` or `/` between them"),
            ("a/b-", "`a/b-` is not an image reference: a repository has a-z and 0-9, with `.`, `_`, `-` or `/` between them"),
            ("a/-b", "`a/-b` is not an image reference: a repository has a-z and 0-9, with `.`, `_`, `-` or `/` between them"),
            (
                "a/b___c",
                "`a/b___c` is not an image reference: a repository has a-z and 0-9, with `.`, `_`, `-` or `/` between them",
            ),
            (
                "a:",
                "`a:` is not an image reference: a tag has up to 128 letters, digits, `.`, `_`, `-`, and begins with none of `.` and `-`",
            ),
            (
                "debian@sha256:abc",
                "`debian@sha256:abc` is not an image reference: a digest is `sha256:` and 64 hexadecimal digits",
            ),
            ("debian@sha512:abc", "`debian@sha512:abc` is not an image reference: only `sha256` digests are known"),
            ("me:s3cret@quay.io/a", "an image reference holds no user name or password"),
        ] {
            let problem = text.parse::<Reference>().unwrap_err();
            assert_eq!((problem.message.as_str(), problem.kind as u8), (message, 2), "{text}");
            assert_eq!(problem.hints.len(), 1, "{text}");
        }
    }
}
