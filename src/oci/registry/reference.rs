//! The name of an image in a registry: `[HOST[:PORT]/]REPOSITORY[:TAG][@DIGEST]`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::error::Problem;
use crate::oci::digest::Digest;

/// A reference, in its normal form: `debian:13` is `docker.io/library/debian:13`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference(oci_client::Reference);

impl Reference {
    /// The registry as people write it: `docker.io`, `127.0.0.1:5000`.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// `latest` when neither tag nor digest was written.
    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }

    pub fn digest(&self) -> Option<Digest> {
        self.0.digest().and_then(|digest| digest.parse().ok())
    }

    /// The same repository, by digest.
    #[must_use]
    pub fn at(&self, digest: Digest) -> Self {
        Self(self.0.clone_with_digest(digest.to_string()))
    }

    /// Whether the registry is on this machine, where plain HTTP is no risk.
    pub fn is_loopback(&self) -> bool {
        let host = host_of(self.registry());
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// The host that is spoken to; Docker Hub's is another than its name.
    pub(super) fn address(&self) -> &str {
        self.0.resolve_registry()
    }

    pub(super) fn inner(&self) -> &oci_client::Reference {
        &self.0
    }
}

/// A registry without its port.
pub(super) fn host_of(registry: &str) -> &str {
    registry.rsplit_once(':').map_or(registry, |(host, _)| host)
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
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
        let reference: oci_client::Reference =
            name.parse().map_err(|error: oci_client::ParseError| wrong(&error.to_string()).hint(shape))?;
        if reference.digest().is_some_and(|digest| !digest.starts_with("sha256:") || digest.parse::<Digest>().is_err()) {
            return Err(wrong("only `sha256` digests are known").hint(shape));
        }
        Ok(Self(reference))
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
    fn what_is_no_reference_is_told() {
        for (text, message) in [
            ("", "`` is not an image reference: repository name must have at least one component"),
            ("Debian:13", "`Debian:13` is not an image reference: the repository must be in lower case"),
            ("quay.io/Team/app", "`quay.io/Team/app` is not an image reference: the repository must be in lower case"),
            ("https://quay.io/a", "`https://quay.io/a` is not an image reference: it is a URL"),
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
