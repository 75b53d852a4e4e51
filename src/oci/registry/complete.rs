//! Everything behind a name: the manifest, or an index with all it names, and what refers to them.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;
use serde::Serialize;

use super::manifest::Descriptor;
use super::referrers::{self, Referring};
use super::session::{Session, in_parallel};
use super::tree::{Budget, Item, Tree};
use super::{BlobSink, Reference};
use crate::error::exit_code;
use crate::oci::digest::Digest;
use crate::progress::Progress;

/// A signature of an SBOM of an image is three deep.
const REFERRERS_DEPTH: usize = 4;

/// What may be otherwise the next time is no fault of what was attached.
const TRANSIENT: u8 = 75;

/// How much of an index is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// All it names.
    All,
    /// Of one image for several platforms, linux/amd64's; of everything else all.
    Machine,
}

/// What a complete pull brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fetched {
    /// The registry it came from: the one of the reference, or a mirror of it.
    pub registry: String,
    /// What the name stands for.
    pub pinned: Digest,
    /// What was taken: the same, or the manifest for linux/amd64 of the index that is pinned.
    pub root: Descriptor,
    /// Platforms of the index that were left out.
    pub left_out: usize,
    pub attached: Vec<Attached>,
    /// Of the blobs that had to be fetched.
    pub bytes: u64,
}

/// Something that refers to a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attached {
    pub manifest: Descriptor,
    pub artifact_type: Option<String>,
    pub subject: Digest,
    /// Cosign's tag (`sha256-HEX.sig`); nothing when it names its subject itself.
    pub tag: Option<String>,
}

impl Attached {
    pub(super) fn new(referring: &Referring) -> Self {
        Self {
            manifest: referring.item.descriptor(),
            artifact_type: referring.item.document.artifact_type.clone(),
            subject: referring.subject,
            tag: referring.tag.clone(),
        }
    }
}

/// Everything behind a name, its documents read and its blobs named.
#[derive(Debug)]
pub(super) struct Complete {
    pub pinned: Digest,
    pub root: Digest,
    pub left_out: usize,
    pub tree: Tree,
    pub attached: Vec<Attached>,
}

impl Complete {
    /// Reads all documents. `known` gives those that need not be asked for.
    pub(super) fn read(
        session: &Session,
        reference: &Reference,
        reach: Reach,
        known: &dyn Fn(&Digest) -> Option<Vec<u8>>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let budget = Budget::default();
        let (bytes, pinned) = session.document(reference)?;
        budget.take(bytes.len())?;
        let odd = |error: anyhow::Error| anyhow::Error::from(session.odd(reference, &format!("{error:#}")));
        let mut root = Item::parse(pinned, bytes).map_err(odd)?;
        let mut read = |digest: &Digest| {
            let bytes = match known(digest) {
                Some(bytes) => bytes,
                None => session.document(&reference.at(*digest))?.0,
            };
            budget.take(bytes.len())?;
            Ok(bytes)
        };
        let mut left_out = 0;
        if reach == Reach::Machine
            && root.document.is_multi_platform()
            && let Some(entry) = root.document.for_platform(reference)?
        {
            left_out = root.document.names.manifests.len() - 1;
            let digest = entry.descriptor.digest;
            root = Item::parse(digest, read(&digest)?).map_err(odd)?;
        }
        let mut complete = Self { pinned, root: root.digest, left_out, tree: Tree::default(), attached: Vec::new() };
        complete.tree.add(root, &mut read)?;
        complete.attached(session, &mut read, &budget, progress)?;
        Ok(complete)
    }

    /// Adds what refers to the manifests, and what refers to that.
    fn attached(
        &mut self,
        session: &Session,
        read: &mut dyn FnMut(&Digest) -> Result<Vec<u8>>,
        budget: &Budget,
        progress: &dyn Progress,
    ) -> Result<()> {
        let api = AtomicBool::new(true);
        let mut asked: BTreeSet<Digest> = BTreeSet::new();
        for depth in 0..REFERRERS_DEPTH {
            // Cosign signs what is released, not what is attached to it.
            let new = self.tree.items.iter().map(|item| item.digest).filter(|digest| asked.insert(*digest));
            let new: Vec<Digest> = new.collect();
            let found = Mutex::new((Vec::new(), Vec::new()));
            in_parallel(&new, &|| session.another(), &AtomicBool::new(false), &|mut connection, subject| {
                let asked = referrers::Asked { subject, api: &api, budget, with_tags: depth == 0 };
                let (referring, passed_over) = referrers::find(session, &mut connection, asked)?;
                let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                found.0.extend(referring);
                found.1.extend(passed_over);
                Ok(connection)
            })?;
            let (mut referring, passed_over) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
            passed_over.into_iter().for_each(|text| progress.warn(text));
            // Threads end in any order.
            referring.sort_by(|a, b| (a.subject, &a.tag, a.item.digest).cmp(&(b.subject, &b.tag, b.item.digest)));
            for referring in referring {
                let attached = Attached::new(&referring);
                match self.tree.add(referring.item, read) {
                    Ok(()) => self.attached.push(attached),
                    Err(error) if exit_code(&error) == TRANSIENT => return Err(error),
                    Err(error) => progress.warn(format!("`{}` was passed over: {error:#}", attached.manifest.digest)),
                }
            }
        }
        Ok(())
    }

    /// Brings blobs and documents into `sink`.
    pub(super) fn bring(&self, session: &Session, sink: &dyn BlobSink, arrived: &(dyn Fn(u64) + Sync)) -> Result<Fetched> {
        let bytes = session.blobs(&self.tree.blobs, sink, arrived)?;
        for item in &self.tree.items {
            if !sink.has(&item.digest, item.bytes.len() as u64) {
                sink.write(&item.digest, item.bytes.len() as u64, &mut item.bytes.as_slice())?;
            }
        }
        let root = self.tree.items.iter().find(|item| item.digest == self.root).map(Item::descriptor);
        Ok(Fetched {
            registry: session.peer.registry.clone(),
            pinned: self.pinned,
            root: root.ok_or_else(|| crate::error::Problem::bug("the root of a pull is not among its documents"))?,
            left_out: self.left_out,
            attached: self.attached.clone(),
            bytes,
        })
    }
}
