//! Secrets of a build: what they look like in bytes, where they must not be.
//!
//! A value is in a key as an HMAC only, reaches a step as a file on tmpfs, is masked in every line
//! a step prints, and a layer that holds it fails: as it is, in base64 (any alignment, both
//! alphabets), in hex, or percent-encoded.

use std::path::Path;

use aho_corasick::AhoCorasick;
use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::config::types::{Secret, SecretSource};
use crate::error::Problem;
use crate::oci::layer::Inspect;

/// Shorter values would be found everywhere.
const SHORTEST: usize = 4;

/// A secret with its value. Never printed: no `Debug` of the value.
#[derive(Clone)]
pub struct Value {
    pub id: String,
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Value {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Value({})", self.id)
    }
}

/// Reads the values: from the caller's environment (`variable`) or from files.
pub fn read(secrets: &[Secret], variable: &dyn Fn(&str) -> Option<String>) -> Result<Vec<Value>> {
    let mut values = Vec::new();
    for secret in secrets {
        let bytes = match &secret.from {
            SecretSource::Env(name) => variable(name)
                .ok_or_else(|| {
                    Problem::usage(format!("secret `{}`: the variable `{name}` is not set", secret.id))
                        .hint(format!("export {name}=… before building"))
                })?
                .into_bytes(),
            SecretSource::File(path) => fs_err::read(path).with_context(|| {
                Problem::usage(format!("secret `{}` cannot be read", secret.id))
                    .hint("`file` of `build.secrets` is relative to the pipeline file")
            })?,
        };
        if trimmed(&bytes).len() < SHORTEST {
            return Err(Problem::usage(format!("secret `{}` is shorter than {SHORTEST} bytes", secret.id))
                .hint("a value this short cannot be told from anything else in a layer")
                .into());
        }
        values.push(Value { id: secret.id.clone(), bytes });
    }
    Ok(values)
}

/// What stands for a value in a key: HMAC-SHA-256 under the store's own key.
pub fn fingerprint(key: &[u8], value: &Value) -> Result<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(|_| anyhow::anyhow!("an HMAC key of any length"))?;
    mac.update(&value.bytes);
    Ok(hex::encode(mac.finalize().into_bytes()))
}

fn trimmed(bytes: &[u8]) -> &[u8] {
    bytes.trim_ascii()
}

/// Every form of `value` that is looked for.
fn forms(value: &[u8]) -> Vec<Vec<u8>> {
    let value = trimmed(value);
    let mut forms = vec![value.to_vec(), hex::encode(value).into_bytes(), hex::encode_upper(value).into_bytes()];
    for engine in [&STANDARD_NO_PAD, &URL_SAFE_NO_PAD] {
        for shift in 0..3 {
            let mut shifted = vec![0; shift];
            shifted.extend_from_slice(value);
            let text = engine.encode(&shifted).into_bytes();
            // The characters that also hold bits of the neighbours are cut off.
            let start = (shift * 8).div_ceil(6);
            let end = (shifted.len() * 8) / 6;
            if end.saturating_sub(start) >= SHORTEST {
                forms.push(text[start..end].to_vec());
            }
        }
    }
    let percent: String = value
        .iter()
        .map(|byte| {
            if byte.is_ascii_alphanumeric() || b"-_.~".contains(byte) {
                char::from(*byte).to_string()
            } else {
                format!("%{byte:02X}")
            }
        })
        .collect();
    forms.push(percent.into_bytes());
    // A value of several lines is printed line by line.
    forms.extend(value.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| line.len() >= 8).map(<[u8]>::to_vec));
    forms.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
    forms.dedup();
    forms
}

/// Finds and masks the values of some secrets.
#[derive(Debug)]
pub struct Finder {
    automaton: Option<AhoCorasick>,
    /// Pattern → secret.
    ids: Vec<String>,
    longest: usize,
}

impl Finder {
    pub fn new(values: &[Value]) -> Result<Self> {
        let mut patterns = Vec::new();
        let mut ids = Vec::new();
        for value in values {
            for form in forms(&value.bytes) {
                patterns.push(form);
                ids.push(value.id.clone());
            }
        }
        let longest = patterns.iter().map(Vec::len).max().unwrap_or(0);
        let automaton = if patterns.is_empty() {
            None
        } else {
            Some(
                AhoCorasick::builder()
                    .match_kind(aho_corasick::MatchKind::LeftmostLongest)
                    .build(&patterns)
                    .context("cannot look for the secrets")?,
            )
        };
        Ok(Self { automaton, ids, longest })
    }

    /// The secret that is in `bytes`.
    pub fn find(&self, bytes: &[u8]) -> Option<&str> {
        let found = self.automaton.as_ref()?.find(bytes)?;
        self.ids.get(found.pattern().as_usize()).map(String::as_str)
    }

    /// `line` with every value replaced by `***`.
    pub fn mask(&self, line: &str) -> String {
        match &self.automaton {
            Some(automaton) => {
                let replacements: Vec<&str> = self.ids.iter().map(|_| "***").collect();
                automaton.replace_all(line, &replacements)
            }
            None => line.to_string(),
        }
    }
}

/// Fails a layer that holds a secret in a file, a name, a link or an xattr.
#[derive(Debug)]
pub struct Scan<'a> {
    finder: &'a Finder,
    tail: Vec<u8>,
}

impl<'a> Scan<'a> {
    pub fn new(finder: &'a Finder) -> Self {
        Self { finder, tail: Vec::new() }
    }
}

impl Inspect for Scan<'_> {
    fn text(&mut self, path: &Path, text: &[u8]) -> Option<Problem> {
        self.finder.find(text).map(|id| Problem {
            message: format!(
                "the value of secret `{id}` is in the name, the link target or an xattr of `/{}`",
                self.finder.mask(&path.to_string_lossy())
            ),
            ..leaked(id, path)
        })
    }

    fn chunk(&mut self, path: &Path, start: bool, bytes: &[u8]) -> Option<Problem> {
        self.finder.automaton.as_ref()?;
        if start {
            self.tail.clear();
        }
        self.tail.extend_from_slice(bytes);
        if let Some(id) = self.finder.find(&self.tail) {
            return Some(leaked(id, path));
        }
        let keep = self.tail.len().min(self.finder.longest.saturating_sub(1));
        self.tail.drain(..self.tail.len() - keep);
        None
    }
}

fn leaked(id: &str, path: &Path) -> Problem {
    Problem::failed(format!("the value of secret `{id}` is in `/{}` of the layer", path.display()))
        .hint("a secret is there as the file `/run/secrets/ID` while a step runs; the script has to keep it out of the tree")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        Value { id: "token".into(), bytes: text.into() }
    }

    #[test]
    fn every_form_is_found_and_masked() {
        let secret = "s3cr3t/To+ken value";
        let finder = Finder::new(&[value(&format!("{secret}\n"))]).unwrap();
        let standard = base64::engine::general_purpose::STANDARD;
        let cases = [
            secret.to_string(),
            hex::encode(secret),
            hex::encode(secret).to_uppercase(),
            standard.encode(secret),
            standard.encode(format!("x{secret}")),
            standard.encode(format!("xy:{secret}\n")),
            "s3cr3t%2FTo%2Bken%20value".to_string(),
        ];
        for case in cases {
            let line = format!("before {case} after");
            assert_eq!(finder.find(line.as_bytes()), Some("token"), "{case}");
            assert!(finder.mask(&line).contains("***"), "{case}");
            assert!(!finder.mask(&line).contains(secret));
        }
        assert_eq!(finder.find(b"nothing to see"), None);
    }

    #[test]
    fn a_value_across_two_chunks_is_found() {
        let finder = Finder::new(&[value("0123456789")]).unwrap();
        let mut scan = Scan::new(&finder);
        let path = Path::new("etc/x");
        assert!(scan.chunk(path, true, b"aaaa01234").is_none());
        assert_eq!(
            scan.chunk(path, false, b"56789bbb").unwrap().message,
            "the value of secret `token` is in `/etc/x` of the layer"
        );
        assert!(scan.chunk(path, true, b"56789").is_none());
        let named = scan.text(Path::new("etc/0123456789"), b"etc/0123456789").unwrap();
        assert_eq!(named.message, "the value of secret `token` is in the name, the link target or an xattr of `/etc/***`");
    }

    #[test]
    fn unset_and_short_values_are_usage_errors() {
        let secret = Secret { id: "t".into(), from: SecretSource::Env("T".into()) };
        assert_eq!(
            read(std::slice::from_ref(&secret), &|_| None).unwrap_err().to_string(),
            "secret `t`: the variable `T` is not set"
        );
        assert!(read(&[secret], &|_| Some("ab\n".into())).is_err());
    }

    #[test]
    fn fingerprints_depend_on_the_store() {
        assert_ne!(fingerprint(&[1; 32], &value("abcd")).unwrap(), fingerprint(&[2; 32], &value("abcd")).unwrap());
    }
}
