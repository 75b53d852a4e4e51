//! Checks an image in the store: every blob by its digest, and whether a build from nothing gives
//! the same image again.

use std::collections::BTreeMap;
use std::io::{BufReader, Read};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{Build, Options, build};
use crate::artifact::store::Store;
use crate::artifact::{image, remote};
use crate::config::types::Pipeline;
use crate::error::Problem;
use crate::oci::compress::Compression;
use crate::oci::digest::{Digest, Hasher};

/// The answer of `artifact verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub schema: u32,
    pub digest: Digest,
    /// Blobs whose bytes were read and match.
    pub blobs: usize,
    /// Digest of the rebuilt image, when it was rebuilt.
    pub rebuilt: Option<Digest>,
    /// The first thing that differs, in words.
    pub difference: Option<String>,
}

/// Reads every blob of an image and compares its digest.
pub fn blobs(store: &Store, digest: &Digest) -> Result<Verified> {
    let reached = remote::reach(store, digest)?;
    for blob in reached.blobs.keys() {
        store.verify(blob).with_context(|| format!("blob {} of {digest}", blob.short()))?;
    }
    let blobs = reached.documents.len() + reached.blobs.len();
    Ok(Verified { schema: 1, digest: *digest, blobs, rebuilt: None, difference: None })
}

/// Builds the pipeline in an empty store, with nothing but downloaded packages taken over, and
/// compares its image, or its host when `digest` is one. The store is made in `scratch` and is the caller's to remove.
pub fn rebuild(
    context: &Build<'_>,
    pipeline: &Pipeline,
    digest: &Digest,
    is_host: bool,
    scratch: &std::path::Path,
) -> Result<Verified> {
    let mut verified = blobs(context.store, digest)?;
    let empty = Store::open(scratch)?;
    let debs = context.debs();
    let again = Build { store: &empty, debs: Some(&debs), ..*context };
    let built = build(&again, pipeline, &Options { locked: true, untagged: true, ..Options::default() })?;
    let again = built.host.filter(|_| is_host).map_or(built.digest, |host| host.digest);
    verified.rebuilt = Some(again);
    if again != *digest {
        verified.difference = Some(difference(context.store, digest, &empty, &again)?);
    }
    // Trees belong to mapped ids: only the unshare process may remove them.
    let session = context.session(false)?;
    session.call::<_, ()>("remove", &scratch)?;
    Ok(verified)
}

/// The first thing in which two images differ: a file of a layer, else the configuration.
pub fn difference(one: &Store, one_digest: &Digest, two: &Store, two_digest: &Digest) -> Result<String> {
    let (first, second) = (image::layers(one, one_digest)?, image::layers(two, two_digest)?);
    for (index, (first, second)) in first.iter().zip(&second).enumerate() {
        if first.diff_id != second.diff_id {
            let read = |store: &Store, layer: &image::Layer| entries(store, layer);
            return Ok(format!("layer {}: {}", index + 1, file_difference(&read(one, first)?, &read(two, second)?)));
        }
        if first.descriptor.digest != second.descriptor.digest {
            return Ok(format!("layer {} has the same files in other bytes: it was compressed in another way", index + 1));
        }
    }
    if first.len() != second.len() {
        return Ok(format!("{} layers became {}", first.len(), second.len()));
    }
    let config = |store: &Store, digest: &Digest| -> Result<serde_json::Value> {
        let (manifest, _) = image::read(store, digest)?;
        Ok(serde_json::from_slice(&store.read(&manifest.config.digest)?)?)
    };
    let (a, b) = (config(one, one_digest)?, config(two, two_digest)?);
    Ok(if a == b { "the annotations".into() } else { format!("the configuration: {}", value_difference("", &a, &b)) })
}

fn value_difference(path: &str, a: &serde_json::Value, b: &serde_json::Value) -> String {
    if let (Some(a), Some(b)) = (a.as_object(), b.as_object()) {
        for key in a.keys().chain(b.keys()) {
            if a.get(key) != b.get(key) {
                let null = serde_json::Value::Null;
                return value_difference(&format!("{path}/{key}"), a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null));
            }
        }
    }
    format!("`{path}` was {a} and is {b}")
}

/// Path → what the tar entry says, with the digest of its content.
fn entries(store: &Store, layer: &image::Layer) -> Result<BTreeMap<String, String>> {
    let compression = Compression::of_media_type(&layer.descriptor.media_type)
        .ok_or_else(|| Problem::failed(format!("the unknown media type `{}`", layer.descriptor.media_type)))?;
    let plain = compression.reader(BufReader::new(fs_err::File::open(store.blob(&layer.descriptor.digest))?))?;
    let mut archive = tar::Archive::new(plain);
    let mut entries = BTreeMap::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let header = entry.header().clone();
        let link = entry.link_name_bytes().map(|name| String::from_utf8_lossy(&name).into_owned()).unwrap_or_default();
        let mut xattrs = Hasher::new();
        for record in entry.pax_extensions()?.into_iter().flatten() {
            let record = record?;
            xattrs.field(record.key_bytes()).field(record.value_bytes());
        }
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            match entry.read(&mut buffer)? {
                0 => break,
                read => hasher.update(&buffer[..read]),
            }
        }
        let row = format!(
            "kind {:?}, mode {:o}, owner {}:{}, size {}, time {}, link `{link}`, xattrs {}, content {}",
            header.entry_type(),
            header.mode()?,
            header.uid()?,
            header.gid()?,
            header.size()?,
            header.mtime()?,
            xattrs.finish().short(),
            hasher.finish().short(),
        );
        entries.insert(path, row);
    }
    Ok(entries)
}

fn file_difference(one: &BTreeMap<String, String>, two: &BTreeMap<String, String>) -> String {
    for (path, row) in one {
        match two.get(path) {
            None => return format!("`/{path}` is gone"),
            Some(other) if other != row => {
                let parts: Vec<String> = row
                    .split(", ")
                    .zip(other.split(", "))
                    .filter(|(a, b)| a != b)
                    .map(|(a, b)| format!("{a} became {b}"))
                    .collect();
                return format!("`/{path}`: {}", parts.join("; "));
            }
            Some(_) => {}
        }
    }
    match two.keys().find(|path| !one.contains_key(*path)) {
        Some(path) => format!("`/{path}` is new"),
        None => "the order of the entries".into(),
    }
}
