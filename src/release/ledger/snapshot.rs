//! The files of the ledger at one commit.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, bail};
use git2::{ErrorCode, ObjectType, Oid, Repository, Tree};

use super::place::Place;

/// The repository, for one at a time: libgit2's handle may move between threads, not be shared.
#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<Repository>>);

impl Shared {
    pub fn new(repository: Repository) -> Self {
        Self(Arc::new(Mutex::new(repository)))
    }

    pub fn get(&self) -> MutexGuard<'_, Repository> {
        // The handle has no state that a panic could leave half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Repository")
    }
}

/// The ledger as it was after one commit, or before the first. Files are read when they are asked for.
#[derive(Debug, Clone)]
pub struct Snapshot {
    id: Option<Oid>,
    tree: Option<Oid>,
    repository: Shared,
}

/// A file that differs between two snapshots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    pub path: String,
    /// The blob before; `None` when there was no such file.
    pub before: Option<Oid>,
    /// The blob after; `None` when the file was removed.
    pub after: Option<Oid>,
}

/// An entry of a tree: its mode and what it names.
pub(super) type Entries = BTreeMap<Vec<u8>, (i32, Oid)>;

const TREE_MODE: i32 = 0o040_000;
const FILE_MODE: i32 = 0o100_644;

impl Snapshot {
    pub(super) fn new(id: Option<Oid>, tree: Option<Oid>, repository: &Shared) -> Self {
        Self { id, tree, repository: repository.clone() }
    }

    /// The commit; `None` for a ledger without decisions.
    pub fn id(&self) -> Option<Oid> {
        self.id
    }

    pub(super) fn tree(&self) -> Option<Oid> {
        self.tree
    }

    /// The blob of a file, which differs exactly when its bytes do; `None` when there is no such file.
    pub fn blob(&self, path: &str) -> Result<Option<Oid>> {
        let Some(root) = self.tree else { return Ok(None) };
        let repository = self.repository.get();
        let (folder, file) = path.split_once('/').map_or((None, path), |(folder, file)| (Some(folder), file));
        let tree = match folder {
            None => root,
            Some(folder) => match entry(&repository, root, folder)? {
                Some((ObjectType::Tree, tree)) => tree,
                _ => return Ok(None),
            },
        };
        Ok(match entry(&repository, tree, file)? {
            Some((ObjectType::Blob, blob)) => Some(blob),
            _ => None,
        })
    }

    /// The bytes of a file; `None` when there is no such file.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        let Some(blob) = self.blob(path)? else { return Ok(None) };
        let repository = self.repository.get();
        let blob = repository.find_blob(blob).with_context(|| format!("cannot read `{path}` of the ledger"))?;
        Ok(Some(blob.content().to_vec()))
    }

    /// The pipelines that have a policy, sorted.
    pub fn pipelines(&self) -> Result<Vec<String>> {
        let policy = |name: &[u8]| match std::str::from_utf8(name).ok()?.parse().ok()? {
            Place::Policy { pipeline } => Some(pipeline),
            _ => None,
        };
        let Some(root) = self.tree else { return Ok(Vec::new()) };
        let mut names: Vec<String> = entries(&self.repository.get(), root)?.keys().filter_map(|name| policy(name)).collect();
        names.sort();
        Ok(names)
    }

    /// The environments of a pipeline that have a state, sorted.
    pub fn environments(&self, pipeline: &str) -> Result<Vec<String>> {
        let Some(root) = self.tree else { return Ok(Vec::new()) };
        let repository = self.repository.get();
        let Some((ObjectType::Tree, tree)) = entry(&repository, root, pipeline)? else { return Ok(Vec::new()) };
        let stem = |name: &[u8]| std::str::from_utf8(name).ok().and_then(|name| name.strip_suffix(".json").map(str::to_owned));
        let mut names: Vec<String> = entries(&repository, tree)?.keys().filter_map(|name| stem(name)).collect();
        names.sort();
        Ok(names)
    }

    /// All files, sorted.
    pub fn paths(&self) -> Result<Vec<String>> {
        let empty = Self { id: None, tree: None, repository: self.repository.clone() };
        Ok(self.changed(&empty)?.into_iter().map(|changed| changed.path).collect())
    }

    /// What is different from `before`, sorted by path. Only folders that differ are read.
    ///
    /// # Errors
    /// Trees that cannot be read, and entries that are neither files nor folders of files.
    pub fn changed(&self, before: &Self) -> Result<Vec<Changed>> {
        let repository = self.repository.get();
        let mut changes = Vec::new();
        compare(&repository, before.tree, self.tree, "", &mut changes)?;
        changes.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(changes)
    }
}

/// Adds the files that differ between two trees at `prefix`.
fn compare(
    repository: &Repository,
    before: Option<Oid>,
    after: Option<Oid>,
    prefix: &str,
    changes: &mut Vec<Changed>,
) -> Result<()> {
    if before == after {
        return Ok(());
    }
    let read = |tree: Option<Oid>| tree.map(|tree| find_tree(repository, tree)).transpose();
    let (before, after) = (read(before)?, read(after)?);
    let known = |tree: &Option<Tree<'_>>, name: &[u8]| {
        tree.as_ref().and_then(|tree| tree.get_name_bytes(name).map(|entry| (entry.filemode_raw(), entry.id())))
    };
    for entry in after.iter().flat_map(Tree::iter) {
        let (name, new) = (entry.name_bytes(), (entry.filemode_raw(), entry.id()));
        let old = known(&before, name);
        if old != Some(new) {
            compare_entry(repository, old, Some(new), &format!("{prefix}{}", String::from_utf8_lossy(name)), changes)?;
        }
    }
    for entry in before.iter().flat_map(Tree::iter) {
        let (name, old) = (entry.name_bytes(), (entry.filemode_raw(), entry.id()));
        if known(&after, name).is_none() {
            compare_entry(repository, Some(old), None, &format!("{prefix}{}", String::from_utf8_lossy(name)), changes)?;
        }
    }
    Ok(())
}

/// Adds what differs at `path`, of which at least one side is there.
fn compare_entry(
    repository: &Repository,
    old: Option<(i32, Oid)>,
    new: Option<(i32, Oid)>,
    path: &str,
    changes: &mut Vec<Changed>,
) -> Result<()> {
    for (mode, _) in old.into_iter().chain(new) {
        if !(mode == FILE_MODE || mode == TREE_MODE && !path.contains('/')) {
            bail!("`{path}` has the mode {mode:o}, which nothing in a ledger has");
        }
    }
    let of = |entry: Option<(i32, Oid)>, wanted: i32| entry.filter(|(mode, _)| *mode == wanted).map(|(_, id)| id);
    compare(repository, of(old, TREE_MODE), of(new, TREE_MODE), &format!("{path}/"), changes)?;
    let (before, after) = (of(old, FILE_MODE), of(new, FILE_MODE));
    if before != after {
        changes.push(Changed { path: path.into(), before, after });
    }
    Ok(())
}

fn find_tree(repository: &Repository, tree: Oid) -> Result<Tree<'_>> {
    repository.find_tree(tree).with_context(|| format!("cannot read the tree {tree} of the ledger"))
}

/// What `name` is in a tree.
fn entry(repository: &Repository, tree: Oid, name: &str) -> Result<Option<(ObjectType, Oid)>> {
    let tree = find_tree(repository, tree)?;
    Ok(tree.get_name(name).and_then(|entry| Some((entry.kind()?, entry.id()))))
}

/// The entries of a tree by name.
pub(super) fn entries(repository: &Repository, tree: Oid) -> Result<Entries> {
    let tree = find_tree(repository, tree)?;
    Ok(tree.iter().map(|entry| (entry.name_bytes().to_vec(), (entry.filemode_raw(), entry.id()))).collect())
}

/// The bytes of a tree (gitformat-pack(5) leaves it to the code: `mode SP name NUL id`), folders sorted as if they ended in `/`.
pub(super) fn encode(entries: &Entries) -> Vec<u8> {
    let mut sorted: Vec<_> = entries.iter().collect();
    sorted.sort_by_cached_key(|(name, (mode, _))| {
        let mut key = (*name).clone();
        if *mode == TREE_MODE {
            key.push(b'/');
        }
        key
    });
    let mut bytes = Vec::new();
    for (name, (mode, id)) in sorted {
        bytes.extend_from_slice(format!("{mode:o} ").as_bytes());
        bytes.extend_from_slice(name);
        bytes.push(0);
        bytes.extend_from_slice(id.as_bytes());
    }
    bytes
}

/// Sets or removes an entry of the given kind.
pub(super) fn set(entries: &mut Entries, name: &str, folder: bool, id: Option<Oid>) {
    match id {
        Some(id) => drop(entries.insert(name.into(), (if folder { TREE_MODE } else { FILE_MODE }, id))),
        None => drop(entries.remove(name.as_bytes())),
    }
}

/// Whether the object can be read.
pub(super) fn commit_exists(repository: &Repository, id: Oid) -> Result<bool> {
    match repository.find_commit(id) {
        Ok(_) => Ok(true),
        Err(error) if error.code() == ErrorCode::NotFound => Ok(false),
        Err(error) => Err(error.into()),
    }
}
