//! Everything a manifest or index names, in the order it can be put somewhere: blobs first, then
//! documents, children before what names them.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;

use super::Descriptor;
use super::manifest::Document;
use crate::error::Problem;
use crate::oci::digest::Digest;

/// Indexes in indexes: a release that names multi-platform images has two.
const DEPTH: usize = 8;

/// Manifests and indexes of one transfer: a release has tens, an index of everything a team ever built some hundreds.
pub(super) const DOCUMENTS: usize = 10_000;
/// Bytes of them all together, since they are kept in memory.
const DOCUMENT_BYTES: usize = 128 << 20;

/// How many documents, and how long ones, a transfer may still read from a registry. Shared by threads.
#[derive(Debug)]
pub(super) struct Budget {
    documents: AtomicUsize,
    bytes: AtomicUsize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { documents: AtomicUsize::new(DOCUMENTS), bytes: AtomicUsize::new(DOCUMENT_BYTES) }
    }
}

impl Budget {
    /// # Errors
    /// Too many, or too long.
    pub(super) fn take(&self, bytes: usize) -> Result<()> {
        let take = |left: &AtomicUsize, many: usize| {
            left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(many)).is_ok()
        };
        if take(&self.documents, 1) && take(&self.bytes, bytes) {
            return Ok(());
        }
        let most = DOCUMENT_BYTES >> 20;
        Err(Problem::failed(format!(
            "the registry names more than {DOCUMENTS} manifests, or {most} MiB of them, for one artifact"
        ))
        .hint("nothing that this program makes is that large; look at what is attached to it there")
        .into())
    }
}

/// A manifest or index, byte for byte.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub digest: Digest,
    pub bytes: Vec<u8>,
    pub document: Document,
}

impl Item {
    pub(super) fn parse(digest: Digest, bytes: Vec<u8>) -> Result<Self> {
        let document = Document::parse(&bytes)
            .map_err(|why| Problem::failed(format!("`{digest}` cannot be used: {}", why.trim_start_matches("its manifest "))))?;
        Ok(Self { digest, bytes, document })
    }

    pub(super) fn descriptor(&self) -> Descriptor {
        Descriptor { media_type: self.document.media_type.clone(), digest: self.digest, size: self.bytes.len() as u64 }
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Tree {
    /// Each once, children before parents, the root last.
    pub items: Vec<Item>,
    /// Each once, without those that registries do not hold.
    pub blobs: Vec<Descriptor>,
}

impl Tree {
    /// Adds what `root` names, read by `read`.
    pub(super) fn add(&mut self, root: Item, read: &mut dyn FnMut(&Digest) -> Result<Vec<u8>>) -> Result<()> {
        let mut items = self.items.iter().map(|item| item.digest).collect();
        let mut blobs = self.blobs.iter().map(|blob| blob.digest).collect();
        self.visit(root, &mut items, &mut blobs, read, 0)
    }

    fn visit(
        &mut self,
        item: Item,
        items: &mut BTreeSet<Digest>,
        blobs: &mut BTreeSet<Digest>,
        read: &mut dyn FnMut(&Digest) -> Result<Vec<u8>>,
        depth: usize,
    ) -> Result<()> {
        if depth > DEPTH {
            return Err(Problem::failed(format!("`{}` lies in more than {DEPTH} indexes", item.digest)).into());
        }
        if !items.insert(item.digest) {
            return Ok(());
        }
        for entry in &item.document.names.manifests {
            let digest = entry.descriptor.digest;
            if !items.contains(&digest) {
                let child = Item::parse(digest, read(&digest)?)?;
                self.visit(child, items, blobs, read, depth + 1)?;
            }
        }
        let held = item.document.names.blobs.iter().filter(|blob| !blob.is_foreign());
        self.blobs.extend(held.filter(|blob| blobs.insert(blob.digest)).cloned());
        self.items.push(item);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn documents_are_counted_and_measured() {
        let budget = Budget::default();
        (0..DOCUMENTS).for_each(|_| budget.take(1).unwrap());
        let error = budget.take(1).unwrap_err().to_string();
        assert_eq!(error, "the registry names more than 10000 manifests, or 128 MiB of them, for one artifact");
        let budget = Budget::default();
        (0..8).for_each(|_| budget.take(16 << 20).unwrap());
        assert!(budget.take(1).is_err());
    }

    #[test]
    fn children_come_before_parents_and_everything_once() {
        let mut documents: BTreeMap<Digest, Vec<u8>> = BTreeMap::new();
        let mut put = |text: String| {
            let digest = Digest::of(&text);
            documents.insert(digest, text.into_bytes());
            digest
        };
        let blob = |name: &str, kind: &str| format!(r#"{{"mediaType":"{kind}","digest":"{}","size":1}}"#, Digest::of(name));
        let manifest = |layers: &[String]| {
            format!(r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#, blob("config", "c"), layers.join(","))
        };
        let index = |children: &[Digest]| {
            let entries: Vec<String> =
                children.iter().map(|digest| format!(r#"{{"mediaType":"m","digest":"{digest}","size":1}}"#)).collect();
            format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, entries.join(","))
        };
        let one = put(manifest(&[blob("a", "l"), blob("windows", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")]));
        let two = put(manifest(&[blob("a", "l"), blob("b", "l")]));
        let inner = put(index(&[one, two]));
        let outer = put(index(&[two, inner]));
        let mut tree = Tree::default();
        let mut read = |digest: &Digest| Ok(documents[digest].clone());
        let root = Item::parse(outer, read(&outer).unwrap()).unwrap();
        tree.add(root.clone(), &mut read).unwrap();
        tree.add(root, &mut read).unwrap();
        assert_eq!(tree.items.iter().map(|item| item.digest).collect::<Vec<_>>(), [two, one, inner, outer]);
        assert_eq!(tree.blobs.iter().map(|blob| blob.digest).collect::<Vec<_>>(), ["config", "a", "b"].map(Digest::of));

        let mut deep = index(&[]);
        let mut documents = BTreeMap::new();
        for _ in 0..=DEPTH + 1 {
            let digest = Digest::of(&deep);
            documents.insert(digest, deep.clone().into_bytes());
            deep = index(&[digest]);
        }
        let root = Item::parse(Digest::of(&deep), deep.into_bytes()).unwrap();
        let error = Tree::default().add(root, &mut |digest| Ok(documents[digest].clone())).unwrap_err();
        assert!(error.to_string().ends_with("lies in more than 8 indexes"), "{error}");
    }
}
