//! stub
use std::path::Path;
use anyhow::Result;
use crate::oci::digest::Digest;
#[derive(Debug, Clone)]
pub struct Commit { pub id: String, pub author: String, pub time: i64, pub message: String }
#[derive(Debug, Clone)]
pub struct GitState { pub head: String, pub branch: Option<String>, pub origin: Option<String>, pub last_commit: Commit, pub changed: usize }
pub fn state(_root: &Path, _digest: &Digest, _cache: Option<&Path>) -> Result<Option<GitState>> { Ok(None) }
pub fn without_credentials(url: &str) -> String { url.into() }
