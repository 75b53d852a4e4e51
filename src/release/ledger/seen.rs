//! The last tips seen, kept outside the repository: who rewrites the ledger, here or on a server, cannot rewrite these.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context as _, Result};
use git2::Oid;
use serde::{Deserialize, Serialize};

use super::FORMAT;
use super::disk::{self, Writer};
use crate::error::Problem;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Seen {
    format: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tip: Option<String>,
    /// URL, without credentials, to the tip that was there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    remotes: BTreeMap<String, String>,
    /// The remote it is shared with: the first one something was exchanged with, without a password.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<String>,
}

impl Default for Seen {
    fn default() -> Self {
        Self { format: FORMAT, tip: None, remotes: BTreeMap::new(), shared: None }
    }
}

impl Seen {
    /// What was seen; nothing when there is no file.
    ///
    /// # Errors
    /// A file that cannot be read is not taken for none: it may be what tells.
    pub fn load(path: &Path) -> Result<Self> {
        let text = match fs_err::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error.into()),
        };
        parse(&text).with_context(|| {
            Problem::failed(format!("cannot read the last seen tip in `{}`", path.display()))
                .hint("check the ledger with `pipeline ledger verify`, then remove that file")
        })
    }

    pub fn save(&self, writer: &Writer, path: &Path) -> Result<()> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        disk::replace(writer, path, &bytes)
    }

    /// Removes what a killed writer left beside the file.
    pub fn sweep(_writer: &Writer, path: &Path) -> Result<()> {
        match fs_err::remove_file(disk::temporary(path)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    pub fn tip(&self) -> Option<Oid> {
        self.tip.as_deref().and_then(|text| Oid::from_str(text).ok())
    }

    pub fn set_tip(&mut self, tip: Option<Oid>) {
        self.tip = tip.map(|tip| tip.to_string());
    }

    pub fn remote(&self, url: &str) -> Option<Oid> {
        self.remotes.get(url).and_then(|text| Oid::from_str(text).ok())
    }

    pub fn set_remote(&mut self, url: &str, tip: Oid) {
        self.remotes.insert(url.into(), tip.to_string());
    }

    /// Takes no remote for known any more.
    pub fn forget_remotes(&mut self) {
        self.remotes.clear();
        self.shared = None;
    }

    /// All remotes and the tips seen there.
    pub fn remotes(&self) -> impl Iterator<Item = (&str, Oid)> {
        self.remotes.iter().filter_map(|(url, tip)| Some((url.as_str(), Oid::from_str(tip).ok()?)))
    }
}

fn parse(text: &str) -> Result<Seen> {
    let seen: Seen = serde_json::from_str(text)?;
    anyhow::ensure!(seen.format <= FORMAT, "it was written by a newer pipeline");
    for id in seen.tip.iter().chain(seen.remotes.values()) {
        Oid::from_str(id).with_context(|| format!("`{id}` is no commit"))?;
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seen.json");
        assert_eq!(Seen::load(&path).unwrap(), Seen::default());
        let id = Oid::from_str(&"a".repeat(40)).unwrap();
        let mut seen = Seen::default();
        seen.set_tip(Some(id));
        seen.set_remote("https://git.example.org/ledger", id);
        seen.save(&Writer::wait(&folder.path().join("ledger.git")).unwrap(), &path).unwrap();
        let again = Seen::load(&path).unwrap();
        assert_eq!(
            (&again, again.tip(), again.remote("https://git.example.org/ledger"), again.remote("x")),
            (&seen, Some(id), Some(id), None)
        );
    }

    #[test]
    fn damage_is_not_taken_for_nothing_seen() {
        for text in ["", "{}", "{\"format\":2}", "{\"format\":1,\"tip\":\"x\"}", "{\"format\":1,\"remotes\":{\"u\":\"12\"}}x"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("{\"format\":1}").is_ok());
    }
}
