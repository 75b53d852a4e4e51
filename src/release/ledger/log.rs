//! Reading the history: all decisions, or those about one file.

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;

use anyhow::{Context as _, Result, bail, ensure};
use git2::{ObjectType, Oid, Repository};
use serde::{Deserialize, Serialize};

use super::commit::Commit;
use super::snapshot::{Shared, Snapshot};
use super::{FORMAT, Ledger, disk};

/// Reads a commit, whose hash libgit2 checks.
pub(super) fn read(repository: &Repository, id: Oid) -> Result<Commit> {
    let read = || -> Result<Commit> {
        let odb = repository.odb()?;
        let object = odb.read(id)?;
        if object.kind() != ObjectType::Commit {
            bail!("it is no commit");
        }
        Commit::parse(id, object.data())
    };
    read().with_context(|| format!("cannot read the decision {id}"))
}

/// The decisions, newest first. After an error there is no more.
#[derive(Debug)]
pub struct Log<'a> {
    ledger: &'a Ledger,
    next: Option<Oid>,
}

impl<'a> Log<'a> {
    pub(super) fn new(ledger: &'a Ledger, tip: Option<Oid>) -> Self {
        Self { ledger, next: tip }
    }
}

impl Iterator for Log<'_> {
    type Item = Result<Commit>;

    fn next(&mut self) -> Option<Self::Item> {
        let commit = read(&self.ledger.repository.get(), self.next.take()?);
        self.next = commit.as_ref().ok().and_then(|commit| commit.parent);
        Some(commit)
    }
}

/// A version of a file, and the decision that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    pub commit: Commit,
    pub bytes: Vec<u8>,
}

/// The versions of a file, newest first. After an error there is no more.
#[derive(Debug)]
pub struct History<'a> {
    ledger: &'a Ledger,
    path: String,
    next: Option<Oid>,
}

impl<'a> History<'a> {
    pub(super) fn new(ledger: &'a Ledger, path: &str, made: Option<Oid>) -> Self {
        Self { ledger, path: path.into(), next: made }
    }

    fn version(&self, id: Oid) -> Result<(Version, Option<Oid>)> {
        let commit = read(&self.ledger.repository.get(), id)?;
        let snapshot = Snapshot::new(Some(id), Some(commit.tree), &self.ledger.repository);
        let bytes = snapshot.read(&self.path)?.with_context(|| format!("the decision {id} has no `{}`", self.path))?;
        let previous = match previous(&bytes)? {
            Previous::Commit(previous) => Some(previous),
            Previous::None => None,
            Previous::Unsaid => made_before(&self.ledger.repository.get(), &commit, &self.path)?,
        };
        Ok((Version { commit, bytes }, previous))
    }
}

impl Iterator for History<'_> {
    type Item = Result<Version>;

    fn next(&mut self) -> Option<Self::Item> {
        let id = self.next.take()?;
        Some(self.version(id).map(|(version, previous)| {
            self.next = previous;
            version
        }))
    }
}

/// What a file says of the commit that made the version before.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Previous {
    Commit(Oid),
    /// It says that there is none.
    None,
    /// It does not say, as policies do not.
    Unsaid,
}

/// Reads `previous` of a file's JSON.
pub(super) fn previous(bytes: &[u8]) -> Result<Previous> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default, deserialize_with = "said")]
        previous: Option<Option<String>>,
    }
    fn said<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
        Deserialize::deserialize(deserializer).map(Some)
    }
    const NO_OBJECT: &str = "a file of the ledger that is no JSON object";
    // serde would take an array for the fields in order.
    ensure!(bytes.trim_ascii_start().starts_with(b"{"), NO_OBJECT);
    let file: File = serde_json::from_slice(bytes).context(NO_OBJECT)?;
    Ok(match file.previous {
        None => Previous::Unsaid,
        Some(None) => Previous::None,
        Some(Some(text)) => Previous::Commit(Oid::from_str(&text).with_context(|| format!("`previous` is `{text}`"))?),
    })
}

/// The commit before `commit` that made the version of `path` which `commit` replaced; by looking at one after the other.
fn made_before(repository: &Repository, commit: &Commit, path: &str) -> Result<Option<Oid>> {
    let shared = |tree| blob_of(repository, tree, path);
    let Some(mut next) = commit.parent else { return Ok(None) };
    let mut wanted = None;
    loop {
        let candidate = read(repository, next)?;
        let blob = shared(candidate.tree)?;
        match wanted {
            None if blob.is_none() => return Ok(None),
            None => wanted = Some(blob),
            Some(_) => {}
        }
        let before = candidate.parent.map(|parent| read(repository, parent)).transpose()?;
        let blob_before = before.as_ref().map_or(Ok(None), |before| shared(before.tree))?;
        if blob_before != blob {
            return Ok(Some(candidate.id));
        }
        next = before.context("a file that no commit made")?.id;
    }
}

fn blob_of(repository: &Repository, tree: Oid, path: &str) -> Result<Option<Oid>> {
    match repository.find_tree(tree)?.get_path(std::path::Path::new(path)) {
        Ok(entry) => Ok(Some(entry.id())),
        Err(error) if error.code() == git2::ErrorCode::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether `ancestor` is `commit` or in its history.
pub(super) fn descends(repository: &Repository, commit: Oid, ancestor: Oid) -> Result<bool> {
    let mut next = Some(commit);
    while let Some(id) = next {
        if id == ancestor {
            return Ok(true);
        }
        next = read(repository, id)?.parent;
    }
    Ok(false)
}

/// Which commit made each file of the tip: a cache beside the objects, which is made again when it does not fit.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Made {
    format: u32,
    tip: String,
    made: BTreeMap<String, String>,
}

impl Made {
    /// For the files at `tip`.
    pub fn at(shared: &Shared, tip: Oid) -> Result<BTreeMap<String, Oid>> {
        let cached = Self::load(&shared.get());
        if let Some(found) = cached.as_ref().filter(|made| made.tip == tip.to_string()).and_then(Self::ids) {
            return Ok(found);
        }
        let (end, base) = match cached.as_ref().and_then(|made| Some((Oid::from_str(&made.tip).ok()?, made.ids()?))) {
            Some((end, base)) => (Some(end), base),
            None => (None, BTreeMap::new()),
        };
        let (newer, reached) = walk(shared, tip, end)?;
        let mut made = if reached { base } else { BTreeMap::new() };
        for (path, id) in newer {
            match id {
                Some(id) => drop(made.insert(path, id)),
                None => drop(made.remove(&path)),
            }
        }
        // Only the next reader waits longer when it cannot be kept.
        let _ = Self::save(&shared.get(), tip, &made);
        Ok(made)
    }

    /// Follows an append, so that the next reader need not look for it.
    pub fn follow(repository: &Repository, parent: Option<Oid>, tip: Oid, changes: &[(String, bool)]) {
        let known = match parent {
            None => Some(BTreeMap::new()),
            Some(parent) => Self::load(repository).filter(|made| made.tip == parent.to_string()).and_then(|made| made.ids()),
        };
        let Some(mut made) = known else { return };
        for (path, there) in changes {
            match there {
                true => drop(made.insert(path.clone(), tip)),
                false => drop(made.remove(path)),
            }
        }
        // The same as above.
        let _ = Self::save(repository, tip, &made);
    }

    fn load(repository: &Repository) -> Option<Self> {
        let text = fs_err::read(disk::scratch(repository.path()).join(disk::MADE)).ok()?;
        serde_json::from_slice(&text).ok().filter(|made: &Self| made.format == FORMAT)
    }

    fn ids(&self) -> Option<BTreeMap<String, Oid>> {
        self.made.iter().map(|(path, id)| Some((path.clone(), Oid::from_str(id).ok()?))).collect()
    }

    fn save(repository: &Repository, tip: Oid, made: &BTreeMap<String, Oid>) -> Result<()> {
        let made = made.iter().map(|(path, id)| (path.clone(), id.to_string())).collect();
        let bytes = serde_json::to_vec(&Self { format: FORMAT, tip: tip.to_string(), made })?;
        let folder = disk::scratch(repository.path());
        let mut file = tempfile::Builder::new().prefix(".tmp-").tempfile_in(&folder)?;
        file.write_all(&bytes)?;
        file.persist(folder.join(disk::MADE))?;
        Ok(())
    }
}

/// The newest commit for each file that changed after `end`, `None` for a file that was removed; and whether `end` was met.
fn walk(shared: &Shared, tip: Oid, end: Option<Oid>) -> Result<(HashMap<String, Option<Oid>>, bool)> {
    let mut newest = HashMap::new();
    let mut next = Some(read(&shared.get(), tip)?);
    while let Some(commit) = next {
        if Some(commit.id) == end {
            return Ok((newest, true));
        }
        let parent = commit.parent.map(|parent| read(&shared.get(), parent)).transpose()?;
        let before = Snapshot::new(commit.parent, parent.as_ref().map(|parent| parent.tree), shared);
        for changed in Snapshot::new(Some(commit.id), Some(commit.tree), shared).changed(&before)? {
            newest.entry(changed.path).or_insert(changed.after.map(|_| commit.id));
        }
        next = parent;
    }
    Ok((newest, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_says_of_the_version_before() {
        let id = "a".repeat(40);
        for (text, expected) in [
            ("{}".to_string(), Some(Previous::Unsaid)),
            ("{\"a\":[1,2],\"previous\":null}".into(), Some(Previous::None)),
            (format!("{{\"previous\":\"{id}\",\"z\":{{}}}}"), Some(Previous::Commit(Oid::from_str(&id).unwrap()))),
            ("{\"previous\":\"x y\"}".into(), None),
            ("{\"previous\":7}".into(), None),
            ("[]".into(), None),
            (String::new(), None),
        ] {
            assert_eq!(previous(text.as_bytes()).ok(), expected, "{text}");
        }
    }
}
