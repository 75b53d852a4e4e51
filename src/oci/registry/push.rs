//! Puts a manifest or an index with everything it names into a repository.
//!
//! Blobs go first, several at a time, and only those that are not there ([`super::upload`]); then
//! documents by digest, children before parents, what refers to them after them; a tag is set last,
//! and read back. What was put stays when a later step fails: without the tag nobody sees it, and
//! the next push does not send it again.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use serde::Serialize;
use serde_json::Value;

use super::BlobSource;
use super::complete::Attached;
use super::manifest::Descriptor;
use super::reference::Reference;
use super::referrers;
use super::session::{Session, in_parallel};
use super::tree::{Item, Tree};
use super::trouble::Trouble;
use super::upload::{Arrived, Failure, Sending};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// Annotation of a payload in which cosign keeps its signature (cosign, "Signature Specification").
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pushed {
    /// `HOST/REPOSITORY@DIGEST`
    pub reference: String,
    pub root: Descriptor,
    pub tag: Option<TagSet>,
    pub blobs: Blobs,
    /// Manifests and indexes that were not there.
    pub documents: usize,
    /// Signatures, SBOMs and the like that went along.
    pub attached: usize,
}

/// What became of a tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TagSet {
    pub name: String,
    /// What it stood for before; nothing when it is new.
    pub before: Option<Digest>,
    pub now: Digest,
}

/// How the blobs got there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Blobs {
    pub there: usize,
    pub mounted: usize,
    pub sent: usize,
    /// Of those that were sent.
    pub sent_bytes: u64,
}

/// What goes where.
pub(super) struct Shipment<'a> {
    pub source: &'a dyn BlobSource,
    pub root: Digest,
    /// The root and all that goes along.
    pub tree: &'a Tree,
    pub attached: &'a [Attached],
    pub part_limit: Option<u64>,
    pub arrived: &'a (dyn Fn(u64) + Sync),
}

impl Shipment<'_> {
    /// Puts all of it, and points `tag` at the root.
    pub(super) fn put(&self, session: &Session, to: &Reference, tag: Option<&str>) -> Result<Pushed> {
        let blobs = self.blobs(session)?;
        let documents = self.documents(session)?;
        for (name, attached) in self.attached.iter().filter_map(|attached| Some((attached.tag.as_deref()?, attached))) {
            let item = self.item(&attached.manifest.digest)?;
            nothing_lost(session, to, item, name)?;
            set_tag(session, to, item, name)?;
        }
        let root = self.item(&self.root)?;
        let tag = tag.map(|tag| set_tag(session, to, root, tag)).transpose()?;
        Ok(Pushed {
            reference: to.at(self.root).to_string(),
            root: root.descriptor(),
            tag,
            blobs,
            documents,
            attached: self.attached.len(),
        })
    }

    fn item(&self, digest: &Digest) -> Result<&Item> {
        let found = self.tree.items.iter().find(|item| item.digest == *digest);
        found.ok_or_else(|| Problem::bug(format!("`{digest}` is not among what is pushed")).into())
    }

    fn blobs(&self, session: &Session) -> Result<Blobs> {
        let counted = Mutex::new(Blobs::default());
        let stop = Arc::new(AtomicBool::new(false));
        in_parallel(&self.tree.blobs, &|| session.another(), &stop, &|mut connection, blob| {
            let sending = Sending {
                connection: &mut connection,
                source: self.source,
                blob,
                part_limit: self.part_limit,
                stop: &stop,
                arrived: self.arrived,
            };
            let arrived = sending.run().map_err(|failure| self.failed(session, blob, failure))?;
            let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
            match arrived {
                Arrived::Already => counted.there += 1,
                Arrived::Mounted => counted.mounted += 1,
                Arrived::Sent => {
                    counted.sent += 1;
                    counted.sent_bytes += blob.size;
                }
            }
            Ok(connection)
        })?;
        Ok(counted.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn failed(&self, session: &Session, blob: &Descriptor, failure: Failure) -> anyhow::Error {
        match failure {
            Failure::Source(error) => error,
            Failure::Trouble(trouble) => session.teller.problem(&blob.digest.to_string(), &trouble).into(),
        }
    }

    /// Puts what is not there; answers how many those were.
    fn documents(&self, session: &Session) -> Result<usize> {
        let mut put = 0;
        let mut connection = session.another()?;
        for item in &self.tree.items {
            let name = item.digest.to_string();
            let tell = |trouble: Trouble| session.teller.problem(&name, &trouble);
            let subject = item.document.subject.as_ref().map(|subject| subject.digest);
            if connection.call(async |wire| wire.head(&name).await).map_err(tell)? == Some(item.digest) {
                if let Some(subject) = &subject {
                    referrers::note_unless_listed(&mut connection, item, subject).map_err(tell)?;
                }
                continue;
            }
            let answer = connection
                .call(async |wire| wire.put_document(&name, &item.document.media_type, &item.bytes).await)
                .map_err(|trouble| refused(tell(trouble.clone()), &trouble, &item.document.media_type))?;
            put += 1;
            match answer.digest {
                Some(other) if other != item.digest => {
                    let problem = Problem::failed(format!("registry `{}` keeps `{name}` as `{other}`", session.peer.registry));
                    return Err(problem
                        .hint("it changes manifests, so their digests are of no use there; use another registry")
                        .into());
                }
                _ => {}
            }
            if let (Some(subject), false) = (&subject, answer.subject) {
                referrers::note(&mut connection, item, subject).map_err(tell)?;
            }
        }
        Ok(put)
    }
}

/// Says more where a registry does not take a manifest for what it is.
fn refused(problem: Problem, trouble: &Trouble, media_type: &str) -> Problem {
    if trouble.has_code("MANIFEST_INVALID") || trouble.status() == Some(415) {
        problem.hint(format!("the registry may not know manifests of type `{media_type}`, or what is in them"))
    } else {
        problem
    }
}

/// Cosign keeps all signatures of a manifest under one tag: others may have put theirs there.
fn nothing_lost(session: &Session, to: &Reference, item: &Item, tag: &str) -> Result<()> {
    let there = match session.call(async |wire| wire.document(tag).await) {
        Ok((bytes, _)) => bytes,
        Err(trouble) if trouble.status() == Some(404) => return Ok(()),
        Err(trouble) => return Err(session.teller.problem(&to.with_tag(tag)?.to_string(), &trouble).into()),
    };
    let ours = signatures(&item.bytes);
    if signatures(&there).iter().all(|signature| ours.contains(signature)) {
        return Ok(());
    }
    let registry = &session.peer.registry;
    let problem = Problem::failed(format!(
        "`{tag}` in registry `{registry}` holds signatures that the one to be pushed does not, and they would be lost"
    ));
    let problem = problem.hint("pull the artifact: that adds them to those of the store; then push");
    Err(anyhow::Error::new(WouldBeLost { tag: tag.to_owned() }).context(problem))
}

/// What a push would take away from a tag that holds the signatures of several people.
#[derive(Debug, thiserror::Error)]
#[error("the tag `{tag}` holds more than is to be pushed")]
pub struct WouldBeLost {
    pub tag: String,
}

/// Payload and signature of each layer: two keys over one reference sign the same bytes.
fn signatures(manifest: &[u8]) -> Vec<(Value, Value)> {
    let manifest: Value = serde_json::from_slice(manifest).unwrap_or_default();
    let layers = manifest["layers"].as_array().into_iter().flatten();
    layers.map(|layer| (layer["digest"].clone(), layer["annotations"][SIGNATURE].clone())).collect()
}

/// Points `tag` at `item`, which is in the repository, and reads it back.
pub(super) fn set_tag(session: &Session, to: &Reference, item: &Item, tag: &str) -> Result<TagSet> {
    let registry = &session.peer.registry;
    let target = to.with_tag(tag)?;
    let tell = |trouble: Trouble| session.teller.problem(&target.to_string(), &trouble);
    let before = session.call(async |wire| wire.head(tag).await).map_err(tell)?;
    let set = TagSet { name: tag.into(), before, now: item.digest };
    if before == Some(item.digest) {
        return Ok(set);
    }
    let by_digest = to.at(item.digest);
    match session.call(async |wire| wire.put_document(tag, &item.document.media_type, &item.bytes).await) {
        Ok(_) => {}
        Err(trouble) if trouble.is_transient() => {
            return Err(tell(trouble).hint(format!("only the tag is missing: the content is there as `{by_digest}`")).into());
        }
        Err(trouble) => {
            let why = match before {
                Some(before) => format!("it stands for {before} now, and tags may be fixed there"),
                None => "the account may not set this one, or tags of this form are not taken there".into(),
            };
            return Err(Problem::failed(format!(
                "registry `{registry}` refused the tag `{tag}` of `{}`: {trouble}",
                to.repository()
            ))
            .hint(why)
            .hint(format!("the content is there as `{by_digest}`; choose another tag, or use the digest"))
            .into());
        }
    }
    match session.call(async |wire| wire.head(tag).await).map_err(tell)? {
        Some(now) if now == item.digest => Ok(set),
        now => {
            let now = now.map_or_else(|| "nothing".into(), |now| now.to_string());
            Err(Problem::failed(format!(
                "registry `{registry}` said that it set the tag `{tag}` of `{}`, which stands for {now}",
                to.repository()
            ))
            .hint("somebody else may have set it in the same moment; look, and push again")
            .into())
        }
    }
}
