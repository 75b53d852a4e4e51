//! The name of an image in a registry: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::error::Problem;
use crate::oci::digest::Digest;

/// Characters of a tag (distribution specification, "Pulling manifests").
const TAG_LENGTH: usize = 128;

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
        let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
        let good = tag.len() <= TAG_LENGTH
            && tag.bytes().enumerate().all(|(index, c)| word(c) || (index > 0 && b".-".contains(&c)))
            && !tag.is_empty();
        if !good {
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

/// Takes `[ADDRESS][:PORT]` off a name, which the reference library does not know.
fn address(name: &str) -> Option<(&str, &str)> {
    let (host, rest) = name.split_once('/')?;
    let (address, port) = host.strip_prefix('[')?.split_once(']')?;
    let good_port = port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok());
    (good_port && address.parse::<std::net::Ipv6Addr>().is_ok()).then_some((host, rest))
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
        let name = text.strip_prefix("docker://").unwrap_or(text);
        let wrong = |why: &str| Problem::usage(format!("`{text}` is not an image reference: {why}"));
        let shape = "write `[HOST[:PORT]/]NAME[:TAG][@sha256:…]`, for example `docker.io/library/debian:13`";
        if name.contains("://") {
            return Err(wrong("it is a URL").hint(shape));
        }
        // `user:password@host/name`: not repeated, it may be real.
        if name.split_once('/').is_some_and(|(host, _)| host.contains('@') && !host.contains("@sha256:")) {
            return Err(Problem::usage("an image reference holds no user name or password")
                .hint("log in with `docker login` or `podman login`; their files are read"));
        }
        let repository = name.split(['@']).next().unwrap_or(name);
        let path = repository.split_once('/').map_or(repository, |(_, path)| path);
        let path = path.rsplit_once(':').map_or(path, |(path, _)| path);
        if path.chars().any(|c| c.is_ascii_uppercase()) {
            return Err(wrong("the repository must be in lower case").hint(shape));
        }
        let (host, known) = match address(name) {
            Some((host, rest)) => (Some(host), format!("localhost/{rest}")),
            None => (None, name.to_owned()),
        };
        let reference: oci_client::Reference =
            known.parse().map_err(|error: oci_client::ParseError| wrong(&error.to_string()).hint(shape))?;
        let digest = match reference.digest() {
            None => None,
            Some(digest) => match digest.parse().ok().filter(|_| digest.starts_with("sha256:")) {
                Some(digest) => Some(digest),
                None => return Err(wrong("only `sha256` digests are known").hint(shape)),
            },
        };
        Ok(Self {
            registry: host.unwrap_or(reference.registry()).into(),
            repository: reference.repository().into(),
            tag: reference.tag().map(str::to_owned),
            digest,
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
            ("", "`` is not an image reference: repository name must have at least one component"),
            ("Debian:13", "`Debian:13` is not an image reference: the repository must be in lower case"),
            ("quay.io/Team/app", "`quay.io/Team/app` is not an image reference: the repository must be in lower case"),
            ("https://quay.io/a", "`https://quay.io/a` is not an image reference: it is a URL"),
            ("[::1]:http/a", "`[::1]:http/a` is not an image reference: invalid reference format"),
            ("a b", "`a b` is not an image reference: invalid reference format"),
            ("debian@sha256:abc", "`debian@sha256:abc` is not an image reference: invalid reference format"),
            ("me:s3cret@quay.io/a", "an image reference holds no user name or password"),
        ] {
            let problem = text.parse::<Reference>().unwrap_err();
            assert_eq!((problem.message.as_str(), problem.kind as u8), (message, 2), "{text}");
            assert_eq!(problem.hints.len(), 1, "{text}");
        }
    }
}
