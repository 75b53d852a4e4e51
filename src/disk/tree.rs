//! A file tree before it is a file system: what the layers of an image say, merged.
//!
//! Nodes live in one vector and directories name them by index, so that a hard link is two names
//! of one node. File contents are not held in memory: an [`Extent`] points into a [`Source`], a
//! decoded layer on disk, and what no extent covers is a hole. Nothing here reads or writes.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Index of a node in [`Tree::nodes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u32);

/// Owner, mode, time and extended attributes of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// The low twelve bits: permissions, set-user-ID, set-group-ID, sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    /// Seconds since 1970, negative before.
    pub mtime: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub mtime_nsec: u32,
    /// Full names such as `security.capability` or `system.posix_acl_access`, and values in the
    /// kernel's binary form.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A run of bytes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// First byte in the file.
    pub offset: u64,
    pub length: u64,
    /// Index in [`Tree::sources`].
    pub source: u32,
    /// First byte in the source.
    pub source_offset: u64,
}

/// The content of a regular file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct File {
    /// Bytes.
    pub size: u64,
    /// Sorted by offset, without overlap, all below `size`; what they leave out reads as zeros.
    pub extents: Vec<Extent>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Names sorted as bytes; without `.` and `..`.
    Directory(BTreeMap<Vec<u8>, NodeId>),
    File(File),
    /// The target as it is written.
    Symlink(Vec<u8>),
    CharDevice {
        major: u32,
        minor: u32,
    },
    BlockDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub meta: Meta,
    pub kind: Kind,
}

/// Where file contents are.
#[derive(Debug, Clone)]
pub enum Source {
    Disk(Arc<std::fs::File>),
    Memory(Arc<[u8]>),
}

impl Source {
    /// Fills `buffer` from `offset` on; an error of kind `UnexpectedEof` when the source ends before.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        match self {
            Self::Disk(file) => std::os::unix::fs::FileExt::read_exact_at(&**file, buffer, offset),
            Self::Memory(bytes) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = bytes.get(start..start.saturating_add(buffer.len())).ok_or(std::io::ErrorKind::UnexpectedEof)?;
                buffer.copy_from_slice(part);
                Ok(())
            }
        }
    }
}

/// A whole tree. Node 0 is the root directory.
#[derive(Debug, Clone)]
pub struct Tree {
    pub nodes: Vec<Node>,
    pub sources: Vec<Source>,
}

impl Default for Tree {
    /// A root directory of mode 0755, and nothing in it.
    fn default() -> Self {
        let meta = Meta { mode: 0o755, ..Meta::default() };
        Self { nodes: vec![Node { meta, kind: Kind::Directory(BTreeMap::new()) }], sources: Vec::new() }
    }
}

impl Tree {
    pub const ROOT: NodeId = NodeId(0);

    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    /// The names in a directory; none for anything else.
    pub fn children(&self, id: NodeId) -> impl Iterator<Item = (&[u8], NodeId)> {
        let names = match &self.node(id).kind {
            Kind::Directory(names) => Some(names),
            _ => None,
        };
        names.into_iter().flatten().map(|(name, id)| (name.as_slice(), *id))
    }

    /// Adds a node without a name.
    pub fn add(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        NodeId(u32::try_from(self.nodes.len() - 1).expect("fewer than four billion nodes"))
    }

    /// Adds a source and returns its index.
    pub fn add_source(&mut self, source: Source) -> u32 {
        self.sources.push(source);
        u32::try_from(self.sources.len() - 1).expect("fewer than four billion sources")
    }

    /// The node at `path`, such as `usr/lib/os-release`, without following symbolic links.
    pub fn find(&self, path: &[u8]) -> Option<NodeId> {
        let mut at = Self::ROOT;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            let Kind::Directory(names) = &self.node(at).kind else { return None };
            at = *names.get(name)?;
        }
        Some(at)
    }

    /// Like [`Tree::find`], following symbolic links inside the tree; at most 40 of them, as the kernel.
    pub fn resolve(&self, path: &[u8]) -> Option<NodeId> {
        self.follow(path)?.last().map(|(_, node)| *node)
    }

    /// The path, without a leading slash, of what `path` leads to when links are followed; empty for the root.
    pub fn real_path(&self, path: &[u8]) -> Option<Vec<u8>> {
        let steps = self.follow(path)?;
        Some(steps[1..].iter().map(|(name, _)| name.as_slice()).collect::<Vec<_>>().join(&b'/'))
    }

    /// The nodes from the root to what `path` leads to, links followed, each with its name.
    fn follow(&self, path: &[u8]) -> Option<Vec<(Vec<u8>, NodeId)>> {
        let mut rest: Vec<Vec<u8>> = components(path);
        rest.reverse();
        let mut stack = vec![(Vec::new(), Self::ROOT)];
        let mut links = 0;
        while let Some(name) = rest.pop() {
            if name == b".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let Kind::Directory(names) = &self.node(stack.last()?.1).kind else { return None };
            let next = *names.get(&name)?;
            if let Kind::Symlink(target) = &self.node(next).kind {
                links += 1;
                if links > 40 {
                    return None;
                }
                if target.starts_with(b"/") {
                    stack.truncate(1);
                }
                rest.extend(components(target).into_iter().rev());
            } else {
                stack.push((name, next));
            }
        }
        Some(stack)
    }

    /// The bytes of the regular file at `path`, links followed; `None` when there is no such file.
    pub fn read(&self, path: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
        let Some(id) = self.resolve(path) else { return Ok(None) };
        let Kind::File(file) = &self.node(id).kind else { return Ok(None) };
        self.read_file(file).map(Some)
    }

    /// The bytes of `file`, holes as zeros.
    pub fn read_file(&self, file: &File) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(file.size).map_err(std::io::Error::other)?];
        for extent in &file.extents {
            // In range: extents lie below the file's size, which fits.
            let (start, end) = (extent.offset as usize, (extent.offset + extent.length) as usize);
            self.sources[extent.source as usize].read_exact_at(&mut bytes[start..end], extent.source_offset)?;
        }
        Ok(bytes)
    }

    /// Puts `node` at `path`, in place of what is there; missing folders are made like `folder`.
    pub fn put(&mut self, path: &[u8], node: Node, folder: &Meta) -> NodeId {
        let id = self.add(node);
        self.link(path, id, folder);
        id
    }

    /// Gives the node `id` the name `path`, in place of what is there.
    pub fn link(&mut self, path: &[u8], id: NodeId, folder: &Meta) {
        let mut names = components(path);
        let Some(last) = names.pop() else { return };
        let mut at = Self::ROOT;
        for name in names {
            let next = match &self.node(at).kind {
                Kind::Directory(entries) => entries.get(&name).copied(),
                _ => None,
            };
            at = match next.filter(|id| matches!(self.node(*id).kind, Kind::Directory(_))) {
                Some(next) => next,
                None => {
                    let made = self.add(Node { meta: folder.clone(), kind: Kind::Directory(BTreeMap::new()) });
                    if let Kind::Directory(entries) = &mut self.node_mut(at).kind {
                        entries.insert(name, made);
                    }
                    made
                }
            };
        }
        if let Kind::Directory(entries) = &mut self.node_mut(at).kind {
            entries.insert(last, id);
        }
    }

    /// Takes the name `path` away; whether it was there.
    pub fn remove(&mut self, path: &[u8]) -> bool {
        let mut names = components(path);
        let Some(last) = names.pop() else { return false };
        let parent = self.find(&names.join(&b'/'));
        let Some(Kind::Directory(entries)) = parent.map(|id| &mut self.node_mut(id).kind) else { return false };
        entries.remove(&last).is_some()
    }

    /// Every name with its node, folders before what is in them, names of one folder sorted as
    /// bytes. Paths without a leading slash; the root is the empty path.
    pub fn walk(&self) -> Vec<(Vec<u8>, NodeId)> {
        let mut found = Vec::with_capacity(self.nodes.len());
        let mut open = vec![(Vec::new(), Self::ROOT)];
        while let Some((path, id)) = open.pop() {
            if let Kind::Directory(entries) = &self.node(id).kind {
                for (name, child) in entries.iter().rev() {
                    let mut below = path.clone();
                    if !below.is_empty() {
                        below.push(b'/');
                    }
                    below.extend_from_slice(name);
                    open.push((below, *child));
                }
            }
            found.push((path, id));
        }
        found
    }
}

/// The parts of a path between slashes, without empty ones and `.`.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".").map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(tree: &mut Tree, path: &[u8], bytes: &[u8]) {
        let source = tree.add_source(Source::Memory(bytes.into()));
        let size = bytes.len() as u64;
        let extents = vec![Extent { offset: 0, length: size, source, source_offset: 0 }];
        tree.put(path, Node { meta: Meta::default(), kind: Kind::File(File { size, extents }) }, &Meta::default());
    }

    #[test]
    fn links_are_followed_inside_the_tree() {
        let mut tree = Tree::default();
        file(&mut tree, b"usr/lib/os-release", b"ID=x\n");
        tree.put(
            b"etc/os-release",
            Node { meta: Meta::default(), kind: Kind::Symlink(b"../usr/lib/os-release".to_vec()) },
            &Meta::default(),
        );
        tree.put(b"lib", Node { meta: Meta::default(), kind: Kind::Symlink(b"/../usr/lib".to_vec()) }, &Meta::default());
        tree.put(b"loop", Node { meta: Meta::default(), kind: Kind::Symlink(b"loop".to_vec()) }, &Meta::default());
        for path in [&b"/etc/os-release"[..], b"lib/os-release", b"usr/lib/os-release"] {
            assert_eq!(tree.read(path).unwrap().as_deref(), Some(&b"ID=x\n"[..]));
        }
        assert_eq!((tree.resolve(b"loop"), tree.find(b"lib/os-release")), (None, None));
        let paths: Vec<Vec<u8>> = tree.walk().into_iter().map(|(path, _)| path).collect();
        let expected = ["", "etc", "etc/os-release", "lib", "loop", "usr", "usr/lib", "usr/lib/os-release"];
        assert_eq!(paths, expected.map(|path| path.as_bytes().to_vec()));
        assert!(tree.remove(b"usr/lib/os-release") && !tree.remove(b"usr/lib/os-release"));
    }
}
