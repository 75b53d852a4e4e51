//! What refers to a manifest: signatures, SBOMs, provenance, reports.
//!
//! Three ways, all of them asked: the referrers list (distribution specification 1.1, "Listing
//! Referrers"); for registries without it the index under the tag `sha256-HEX` ("Referrers Tag
//! Schema"), which every client that pushes keeps by itself; and cosign's tags `sha256-HEX.sig`.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use serde_json::{Value, json};

use super::connection::Connection;
use super::manifest::{Document, Entry, OCI_INDEX};
use super::session::Session;
use super::tree::{Budget, Item};
use super::trouble::Trouble;
use super::wire::Wire;
use crate::oci::digest::Digest;

/// What cosign writes beside a manifest: signatures, attestations, SBOMs.
const COSIGN_TAGS: [&str; 3] = ["sig", "att", "sbom"];
/// Others may change the same tag in the same moment: read, add, put, read again.
const FALLBACK_TRIES: usize = 5;

/// The tag of the fallback scheme.
pub(super) fn fallback_tag(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}

/// Cosign's tags for a manifest.
pub(super) fn cosign_tags(subject: &Digest) -> Vec<String> {
    COSIGN_TAGS.iter().map(|kind| format!("{}.{kind}", fallback_tag(subject))).collect()
}

/// The manifests that refer to `subject`. `api` is cleared when the registry has no list of them.
pub(super) async fn list(wire: &Wire<'_>, subject: &Digest, api: &AtomicBool) -> Result<Vec<Entry>, Trouble> {
    if api.load(Ordering::Relaxed) {
        if let Some(entries) = wire.referrers(subject).await? {
            return Ok(entries);
        }
        api.store(false, Ordering::Relaxed);
    }
    Ok(fallback(wire, subject).await?.map(|(entries, _)| entries).unwrap_or_default())
}

/// The index under the fallback tag; nothing when there is none.
async fn fallback(wire: &Wire<'_>, subject: &Digest) -> Result<Option<(Vec<Entry>, Value)>, Trouble> {
    let tag = fallback_tag(subject);
    let bytes = match wire.document(&tag).await {
        Ok((bytes, _)) => bytes,
        Err(trouble) if trouble.status() == Some(404) => return Ok(None),
        Err(trouble) => return Err(trouble),
    };
    match Document::parse(&bytes) {
        Ok(document) if document.is_index() => {
            Ok(Some((document.names.manifests, serde_json::from_slice(&bytes).unwrap_or_default())))
        }
        _ => Err(Trouble::Other(format!("its tag `{tag}` is not the list of referrers that it should be"))),
    }
}

/// The entry of `item` in a list of referrers ("Listing Referrers": type and annotations come along).
fn entry(item: &Item) -> Entry {
    Entry {
        descriptor: item.descriptor(),
        platform: None,
        artifact_type: item.document.artifact_type.clone(),
        annotations: item.document.annotations.clone(),
    }
}

/// Writes `item` into the list under its subject's fallback tag, unless it is there.
pub(super) fn note(connection: &mut Connection, item: &Item, subject: &Digest) -> Result<(), Trouble> {
    let tag = fallback_tag(subject);
    for _ in 0..FALLBACK_TRIES {
        let there = connection.call(async |wire| fallback(&wire, subject).await)?;
        let mut index = match there {
            Some((entries, _)) if entries.iter().any(|entry| entry.descriptor.digest == item.digest) => return Ok(()),
            Some((_, index)) => index,
            None => json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}),
        };
        let added = serde_json::to_value(entry(item)).unwrap_or_default();
        if let Some(entries) = index["manifests"].as_array_mut() {
            entries.push(added);
        }
        let bytes = index.to_string().into_bytes();
        connection.call(async |wire| wire.put_document(&tag, OCI_INDEX, &bytes).await)?;
    }
    Err(Trouble::Other(format!("others change its tag `{tag}` all the time")))
}

/// [`note`], for a manifest that was in the registry before: there a list may know it already.
pub(super) fn note_unless_listed(connection: &mut Connection, item: &Item, subject: &Digest) -> Result<(), Trouble> {
    match connection.call(async |wire| wire.referrers(subject).await)? {
        Some(_) => Ok(()),
        None => note(connection, item, subject),
    }
}

/// One thing that refers to a manifest.
#[derive(Debug, Clone)]
pub(super) struct Referring {
    pub item: Item,
    pub subject: Digest,
    /// Cosign's tag; nothing when it names its subject itself.
    pub tag: Option<String>,
}

/// Whose referrers are wanted.
pub(super) struct Asked<'a> {
    pub subject: &'a Digest,
    /// Cleared when the registry has no list of them.
    pub api: &'a AtomicBool,
    pub budget: &'a Budget,
    /// Whether cosign's tags are looked at too.
    pub with_tags: bool,
}

/// What refers to a manifest, each as it stands in the registry; and what was passed over, in words: anybody who may push may
/// attach, and what is gone, broken or about something else keeps nothing else from coming.
pub(super) fn find(session: &Session, connection: &mut Connection, asked: Asked<'_>) -> Result<(Vec<Referring>, Vec<String>)> {
    let Asked { subject, api, budget, with_tags } = asked;
    let (mut found, mut passed_over) = (Vec::new(), Vec::new());
    let repository = &session.peer.repository;
    let tell = |what: &str, trouble: &Trouble| -> anyhow::Error { session.teller.problem(what, trouble).into() };
    let entries = match connection.call(async |wire| list(&wire, subject, api).await) {
        Ok(entries) => entries,
        Err(trouble) if is_nonsense(&trouble) => {
            passed_over.push(format!("the referrers of {subject} in `{repository}` were passed over: {trouble}"));
            Vec::new()
        }
        Err(trouble) => return Err(tell(&format!("the referrers of {subject}"), &trouble)),
    };
    let names = entries.iter().map(|entry| (entry.descriptor.digest.to_string(), None));
    let tags = if with_tags { cosign_tags(subject) } else { Vec::new() };
    for (name, tag) in names.chain(tags.into_iter().map(|tag| (tag.clone(), Some(tag)))) {
        let (bytes, digest) = match connection.call(async |wire| wire.document(&name).await) {
            Ok(document) => document,
            Err(trouble) if trouble.status() == Some(404) => {
                if tag.is_none() {
                    passed_over.push(format!("`{name}` is listed as a referrer in `{repository}` and is not there"));
                }
                continue;
            }
            Err(trouble) if is_nonsense(&trouble) => {
                passed_over.push(format!("`{name}` in `{repository}` was passed over: {trouble}"));
                continue;
            }
            Err(trouble) => return Err(tell(&name, &trouble)),
        };
        if let Err(error) = budget.take(bytes.len()) {
            passed_over.push(format!("`{name}` and what comes after it in `{repository}` were passed over: {error:#}"));
            break;
        }
        match Item::parse(digest, bytes) {
            Ok(item) if tag.is_none() && item.document.subject.as_ref().is_none_or(|named| named.digest != *subject) => {
                passed_over.push(format!(
                    "`{name}` is listed as a referrer of {subject} in `{repository}`, and is about something else"
                ));
            }
            Ok(item) => found.push(Referring { item, subject: *subject, tag }),
            Err(error) => passed_over.push(format!("`{name}` in `{repository}` was passed over: {error:#}")),
        }
    }
    Ok((found, passed_over))
}

/// Whether a registry answered, and what it said is of no use: somebody may have put it there.
fn is_nonsense(trouble: &Trouble) -> bool {
    trouble.is_wrong() || matches!(trouble, Trouble::Other(_))
}
