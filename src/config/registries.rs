//! `registries.yaml`: what this machine has to know of registries that they do not tell themselves.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use schemars::JsonSchema;
use serde::Deserialize;

use super::diagnostic::{self, Diagnostic, Findings};
use super::{read, shape, syntax, yaml};
use crate::error::Problem;

/// The file as it is written.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegistriesFile {
    /// `HOST` or `HOST:PORT` that may speak plain HTTP or show any certificate.
    #[serde(default)]
    pub insecure: Vec<String>,
    /// By `HOST[:PORT]`: `HOST[:PORT][/PREFIX]` of registries that hold the same, asked before it in this order.
    #[serde(default)]
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Most bytes of a blob in one request, like `8M`, where a proxy limits them.
    #[serde(default)]
    pub part: Option<String>,
}

/// What a `registries.yaml` says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Registries {
    pub insecure: Vec<String>,
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Bytes.
    pub part_limit: Option<u64>,
}

/// Reads and checks a `registries.yaml`; messages show it relative to `cwd`.
///
/// # Errors
/// A usage problem: the file cannot be read, or the rendered diagnostics.
pub fn load(file: &Path, cwd: &Path) -> Result<Registries> {
    let text = read(file, cwd)?;
    parse(file, &text).map_err(|diagnostics| Problem::usage(diagnostic::render(&diagnostics, cwd)).into())
}

/// Checks the text of a `registries.yaml`.
///
/// # Errors
/// Everything that is wrong, in order of position.
pub fn parse(file: &Path, text: &str) -> Result<Registries, Vec<Diagnostic>> {
    let tree = yaml::parse(file, text)?;
    if tree.root.is_null() {
        return Ok(Registries::default());
    }
    let mut findings = Findings::new(tree.source.clone());
    let written = shape::read::<RegistriesFile>(&tree, &mut findings);
    findings.seal();
    let written = written.unwrap_or_default();
    let place = tree.place();
    let hint = || Some("write HOST or HOST:PORT, like `registry.example:5000`".to_owned());
    for (index, host) in written.insecure.iter().enumerate() {
        if !is_host(host) {
            findings.add(&place.key("insecure").item(index), format!("`{host}` is not a registry"), hint());
        }
    }
    for (host, mirrors) in &written.mirrors {
        let below = place.key("mirrors");
        if !is_host(host) {
            findings.add(&below.label(host), format!("`{host}` is not a registry"), hint());
        }
        for (index, mirror) in mirrors.iter().enumerate() {
            if !is_host(mirror.split('/').next().unwrap_or_default()) {
                let hint = "write HOST[:PORT][/PREFIX], like `mirror.example/hub`".to_owned();
                findings.add(&below.key(host).item(index), format!("`{mirror}` is not a mirror"), Some(hint));
            }
        }
    }
    let part_limit = written.part.as_deref().and_then(|text| match syntax::size(text) {
        Ok(bytes) => Some(bytes),
        Err(wrong) => {
            findings.add(&place.key("part"), wrong.message, wrong.hint);
            None
        }
    });
    if findings.is_empty() {
        Ok(Registries { insecure: written.insecure, mirrors: written.mirrors, part_limit })
    } else {
        Err(findings.into_diagnostics())
    }
}

/// `HOST[:PORT]`, an address in brackets when it is one of IPv6.
fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) if address.parse::<std::net::Ipv6Addr>().is_ok() => ("ipv6", port),
        Some(_) => return false,
        None => text.find(':').map_or((text, ""), |colon| text.split_at(colon)),
    };
    let good = |c: u8| c.is_ascii_alphanumeric() || b".-".contains(&c);
    !host.is_empty()
        && host.bytes().all(good)
        && (port.is_empty() || port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_and_its_errors_are_told_with_their_places() {
        let text = "insecure: [lab:5000, '[::1]:80']\nmirrors:\n  docker.io: [mirror.example/hub, '127.0.0.1:5001']\npart: 8M\n";
        assert_eq!(
            parse(Path::new("registries.yaml"), text).unwrap(),
            Registries {
                insecure: vec!["lab:5000".into(), "[::1]:80".into()],
                mirrors: BTreeMap::from([("docker.io".into(), vec!["mirror.example/hub".into(), "127.0.0.1:5001".into()])]),
                part_limit: Some(8 << 20),
            }
        );
        assert_eq!(parse(Path::new("registries.yaml"), "").unwrap(), Registries::default());
        for (text, expected) in [
            ("insecure: [http://lab]", "registries.yaml:1:12: `http://lab` is not a registry"),
            ("mirrors: { docker.io/x: [a] }", "registries.yaml:1:12: `docker.io/x` is not a registry"),
            ("mirrors: { docker.io: [a b] }", "registries.yaml:1:24: `a b` is not a mirror"),
            ("part: 0", "registries.yaml:1:7: `0` is not a size"),
            ("mirror: {}", "registries.yaml:1:1: unknown key `mirror`"),
        ] {
            let shown = diagnostic::render(&parse(Path::new("registries.yaml"), text).unwrap_err(), Path::new("/"));
            assert!(shown.starts_with(expected), "{text}: {shown}");
        }
    }
}
