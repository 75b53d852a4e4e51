//! What Git says about a source folder: the commit checked out, the last one that touched the folder, how dirty it is.
//!
//! The last commit is the one `git log -1 -- FOLDER` shows: history is followed to the first parent with the same folder
//! until a commit changes it. That walk and the comparison with the work tree are kept in a small cache file, by the
//! commit, the folder and the digest of the [listing](super::listing), so that asking again costs reading `HEAD`.
//!
//! libgit2 refuses repositories of other users, since their configuration could make Git run programs. Nothing here runs
//! any, and root builds a user's work tree every day in CI; such a repository is read through a Git folder of our own
//! that borrows its objects (see [`foreign`]).

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use fs_err as fs;
use git2::{ErrorCode, Oid, Repository, RepositoryOpenFlags, StatusOptions};
use serde::{Deserialize, Serialize};

use super::ignored::{S2iIgnore, WorkTree};
use super::listing::as_path;
use crate::error::Problem;
use crate::oci::digest::Digest;

/// Version of the cache file.
const CACHE_VERSION: u32 = 2;

/// A source folder under version control.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GitState {
    /// The commit that is checked out.
    pub head: String,
    /// `None`: detached.
    pub branch: Option<String>,
    /// The remote `origin`, without user name and password where they could be secret.
    pub origin: Option<String>,
    /// The last commit that changed the folder; `None` when none did.
    pub last_commit: Option<Commit>,
    /// Files of the folder that are not as in `head`: modified, deleted, or new and not ignored.
    pub changed: usize,
    /// The clone is shallow and ends before the last commit was surely found; a full clone may say another.
    pub cut: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    pub id: String,
    /// `Name <mail>`
    pub author: String,
    /// When it was committed; seconds since 1970.
    pub time: i64,
    /// The first line.
    pub message: String,
}

/// What the cache file holds: the last answers and what they were answers to.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cached {
    version: u32,
    head: String,
    folder: Vec<u8>,
    last_commit: Option<Commit>,
    cut: bool,
    listing: Option<Digest>,
    changed: usize,
    branch: Option<String>,
    origin: Option<String>,
    /// What the repository's own files said: `HEAD`, and size and mtime of `config`.
    seen: Option<Seen>,
}

/// What tells without libgit2, whose start alone reads every trusted certificate, that a
/// repository is as it was.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seen {
    head: String,
    config: (u64, i64, i64),
}

/// The state of the folder `root`; `None` outside of a work tree and in one without commits.
///
/// `listing` is the digest of the folder's listing: the same `listing` at the same commit gives the same answer.
/// `cache` is a file that is made when missing.
pub fn state(root: &Path, listing: &Digest, cache: Option<&Path>) -> Result<Option<GitState>> {
    let root = fs::canonicalize(root)?;
    if let Some(state) = cache.and_then(|cache| unchanged(&root, listing, &load(cache))) {
        return Ok(Some(state));
    }
    let Some(opened) = open(&root, cache.and_then(Path::parent))? else { return Ok(None) };
    let read = read(&opened, &root, listing, cache);
    read.with_context(|| format!("cannot read the Git repository of `{}`", root.display()))
}

/// What is known at once of a repository whose commit has not moved since `cache` was written:
/// everything but [`GitState::changed`], which is 0 here; [`state`] tells it.
pub fn same_commit(root: &Path, cache: &Path) -> Option<GitState> {
    let root = fs::canonicalize(root).ok()?;
    let cached = load(cache);
    let listing = cached.listing?;
    unchanged(&root, &listing, &cached).map(|state| GitState { changed: 0, ..state })
}

/// The cached answer, when `HEAD` still names its commit and the listing is the same.
fn unchanged(root: &Path, listing: &Digest, cached: &Cached) -> Option<GitState> {
    let seen = cached.seen.as_ref().filter(|_| !cached.cut && cached.listing.as_ref() == Some(listing))?;
    let (now, id, folder) = look(root)?;
    if now != *seen || id != cached.head || folder.as_os_str().as_encoded_bytes() != cached.folder {
        return None;
    }
    Some(GitState {
        head: id,
        branch: cached.branch.clone(),
        origin: cached.origin.clone(),
        last_commit: cached.last_commit.clone(),
        changed: cached.changed,
        cut: false,
    })
}

/// `HEAD` and `config` of the repository around `root`, the commit, and the folder in the work
/// tree; `None` for anything but a plain `.git` folder with a loose or packed reference.
fn look(root: &Path) -> Option<(Seen, String, PathBuf)> {
    use std::os::unix::fs::MetadataExt as _;
    let top = root.ancestors().find(|folder| folder.join(".git").symlink_metadata().is_ok())?;
    let git = top.join(".git");
    let head = fs::read_to_string(git.join("HEAD")).ok()?;
    let config = fs::symlink_metadata(git.join("config")).ok()?;
    let is_id = |text: &str| text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let id = match head.trim_end().strip_prefix("ref: ") {
        None => head.trim_end().to_string(),
        Some(name) => match fs::read_to_string(git.join(name)) {
            Ok(id) => id.trim_end().to_string(),
            Err(_) => {
                let packed = fs::read_to_string(git.join("packed-refs")).ok()?;
                packed.lines().find_map(|line| line.strip_suffix(name)?.strip_suffix(' ').map(str::to_string))?
            }
        },
    };
    let seen = Seen { head, config: (config.len(), config.mtime(), config.mtime_nsec()) };
    is_id(&id).then(|| (seen, id, root.strip_prefix(top).unwrap_or(Path::new("")).to_path_buf()))
}

fn read(opened: &Opened, root: &Path, listing: &Digest, cache: Option<&Path>) -> Result<Option<GitState>> {
    let repository = &opened.repository;
    let (Some(top), Some(head)) = (repository.workdir(), head(repository)?) else { return Ok(None) };
    let folder = root.strip_prefix(fs::canonicalize(top)?).context("the folder is outside of the work tree")?;
    let id = head.target().context("HEAD names no commit")?;
    let old = cache.map(load).unwrap_or_default();
    // A cut history may have been deepened since.
    let same = !old.cut && old.head == id.to_string() && old.folder == folder.as_os_str().as_encoded_bytes();
    let last = if same { Last { commit: old.last_commit.clone(), cut: old.cut } } else { last_commit(repository, id, folder)? };
    let branch = head.is_branch().then(|| String::from_utf8_lossy(head.shorthand_bytes()).into_owned());
    let origin = opened.origin()?.map(|url| without_credentials(&url));
    let new = Cached {
        version: CACHE_VERSION,
        head: id.to_string(),
        folder: folder.as_os_str().as_encoded_bytes().to_vec(),
        last_commit: last.commit,
        cut: last.cut,
        listing: Some(*listing),
        changed: if same && old.listing.as_ref() == Some(listing) { old.changed } else { changed(repository, root, folder)? },
        branch,
        origin,
        seen: look(root).filter(|(_, seen, _)| *seen == id.to_string()).map(|(seen, ..)| seen),
    };
    if let Some(cache) = cache.filter(|_| new != old) {
        store(cache, &new)?;
    }
    Ok(Some(GitState {
        head: new.head,
        branch: new.branch,
        origin: new.origin,
        last_commit: new.last_commit,
        changed: new.changed,
        cut: new.cut,
    }))
}

/// Whether the cache answers for this listing without libgit2.
pub fn is_known(root: &Path, listing: &Digest, cache: &Path) -> bool {
    fs::canonicalize(root).is_ok_and(|root| unchanged(&root, listing, &load(cache)).is_some())
}

fn load(cache: &Path) -> Cached {
    let read = fs::read(cache).ok().and_then(|bytes| serde_json::from_slice::<Cached>(&bytes).ok());
    read.filter(|cached| cached.version == CACHE_VERSION).unwrap_or_default()
}

fn store(cache: &Path, cached: &Cached) -> Result<()> {
    let folder = cache.parent().context("the cache file has no folder")?;
    fs::create_dir_all(folder)?;
    let temporary = tempfile::Builder::new()
        .prefix(".tmp-")
        .tempfile_in(folder)
        .with_context(|| format!("cannot write in `{}`", folder.display()))?;
    fs::write(temporary.path(), serde_json::to_vec(cached)?)?;
    temporary.persist(cache).with_context(|| format!("cannot write `{}`", cache.display()))?;
    Ok(())
}

/// Where `HEAD` points; `None` before the first commit.
fn head(repository: &Repository) -> Result<Option<git2::Reference<'_>>> {
    match repository.head() {
        Ok(head) => Ok(Some(head)),
        Err(error) if matches!(error.code(), ErrorCode::UnbornBranch | ErrorCode::NotFound) => Ok(None),
        Err(error) => Err(error).context("cannot read `HEAD`"),
    }
}

/// The answer of [`last_commit`].
#[derive(Debug, PartialEq)]
pub(super) struct Last {
    pub commit: Option<Commit>,
    /// History ended because the clone is shallow; an older commit may be the right one.
    pub cut: bool,
}

/// The last commit up to `head` that changed `folder` (relative, empty for all).
pub(super) fn last_commit(repository: &Repository, head: Oid, folder: &Path) -> Result<Last> {
    let content = |commit: &git2::Commit<'_>| -> Result<Option<Oid>> {
        let tree = commit.tree().context("cannot read a commit's tree")?;
        if folder.as_os_str().is_empty() {
            return Ok(Some(tree.id()));
        }
        match tree.get_path(folder) {
            Ok(entry) => Ok(Some(entry.id())),
            Err(error) if error.code() == ErrorCode::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    };
    let boundary = boundary(repository);
    let mut commit = repository.find_commit(head)?;
    let mut here = content(&commit)?;
    'history: loop {
        for parent in commit.parents() {
            let there = content(&parent)?;
            if there == here {
                (commit, here) = (parent, there);
                continue 'history;
            }
        }
        let cut = boundary.contains(&commit.id().to_string());
        // A root commit without the folder: nothing ever touched it.
        let untouched = here.is_none() && commit.parent_count() == 0 && !cut;
        return Ok(Last { commit: (!untouched).then(|| describe(&commit)), cut });
    }
}

/// Where history was cut: commits whose parents a shallow clone does not have. libgit2 shows them without parents.
fn boundary(repository: &Repository) -> HashSet<String> {
    let text = fs::read_to_string(repository.commondir().join("shallow")).unwrap_or_default();
    text.lines().map(|line| line.trim().to_owned()).collect()
}

fn describe(commit: &git2::Commit<'_>) -> Commit {
    let author = commit.author();
    let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Commit {
        id: commit.id().to_string(),
        author: format!("{} <{}>", lossy(author.name_bytes()), lossy(author.email_bytes())),
        time: commit.time().seconds(),
        message: lossy(commit.message_bytes()).trim_start().lines().next().unwrap_or_default().trim_end().to_owned(),
    }
}

/// How many files of the folder are not as in `HEAD`. What `.s2iignore` lists is no part of the source and not counted.
fn changed(repository: &Repository, root: &Path, folder: &Path) -> Result<usize> {
    let (listed, _) = S2iIgnore::load(root)?;
    let mut options = StatusOptions::new();
    options.include_untracked(true).recurse_untracked_dirs(true).include_ignored(false).disable_pathspec_match(true);
    if !folder.as_os_str().is_empty() {
        options.pathspec(folder);
    }
    let statuses = repository.statuses(Some(&mut options)).context("cannot compare the work tree with `HEAD`")?;
    let inside = |path: &[u8]| as_path(path).strip_prefix(folder).ok().map(|path| path.as_os_str().as_encoded_bytes().to_vec());
    let counts = |entry: &git2::StatusEntry<'_>| inside(entry.path_bytes()).is_some_and(|path| !listed.removes(&path));
    Ok(statuses.iter().filter(counts).count())
}

/// Whether what is at `path`, a file or a folder, is as the commit that is checked out around it has it: nothing changed, gone or
/// new. `ignored`: what Git ignores counts as new too, since it is used all the same. In no repository nothing is.
///
/// # Errors
/// There is nothing at `path`, or Git cannot read its repository.
pub fn is_committed(path: &Path, ignored: bool) -> Result<bool> {
    let path = fs::canonicalize(path)?;
    let is_folder = path.is_dir();
    let folder = if is_folder { path.as_path() } else { path.parent().context("a file in a folder")? };
    let Some(opened) = open(folder, None)? else { return Ok(false) };
    let repository = &opened.repository;
    if head(repository)?.is_none() {
        return Ok(false);
    }
    let Some(top) = repository.workdir() else { return Ok(false) };
    let Ok(inside) = path.strip_prefix(fs::canonicalize(top)?).map(Path::to_path_buf) else { return Ok(false) };
    let mut options = StatusOptions::new();
    options.include_untracked(true).recurse_untracked_dirs(true).disable_pathspec_match(true);
    options.include_ignored(ignored).recurse_ignored_dirs(ignored);
    if !inside.as_os_str().is_empty() {
        options.pathspec(&inside);
    }
    let statuses = repository.statuses(Some(&mut options)).context("cannot compare the work tree with `HEAD`")?;
    // A folder that is ignored as a whole is told by its own name, with a slash.
    Ok(!statuses.iter().any(|entry| {
        let told = as_path(entry.path_bytes());
        told.starts_with(&inside) || inside.starts_with(told)
    }))
}

/// What `git describe --dirty` adds `-dirty` for: whether any file that Git knows in the repository around `folder` is not as
/// the commit has it; `true` in no repository and before the first commit.
pub fn is_dirty(folder: &Path) -> Result<bool> {
    let Some(opened) = open(&fs::canonicalize(folder)?, None)? else { return Ok(true) };
    if head(&opened.repository)?.is_none() {
        return Ok(true);
    }
    let mut options = StatusOptions::new();
    options.include_untracked(false).include_ignored(false);
    let statuses = opened.repository.statuses(Some(&mut options)).context("cannot compare the work tree with `HEAD`")?;
    Ok(!statuses.is_empty())
}

/// A URL that may be shown and kept: over HTTP a user name can be a token, over SSH it is part of the address.
pub fn without_credentials(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let Some((user, host)) = authority.rsplit_once('@') else { return url.to_owned() };
    let user = user.split(':').next().unwrap_or_default();
    if scheme.contains("ssh") && !user.is_empty() {
        format!("{scheme}://{user}@{host}{path}")
    } else {
        format!("{scheme}://{host}{path}")
    }
}

/// A repository, and what has to live as long.
struct Opened {
    repository: Repository,
    /// The configuration of the repository itself, without the user's.
    config: PathBuf,
    _borrowing: Option<tempfile::TempDir>,
}

impl Opened {
    fn origin(&self) -> Result<Option<String>> {
        let config = git2::Config::open(&self.config)?;
        match config.get_string("remote.origin.url") {
            Ok(url) => Ok(Some(url)),
            Err(error) if error.code() == ErrorCode::NotFound => Ok(None),
            Err(error) => Err(error).context("cannot read the remote `origin`"),
        }
    }
}

/// The repository around the folder `root`; `None` when there is none.
fn open(root: &Path, scratch: Option<&Path>) -> Result<Option<Opened>> {
    match Repository::open_ext(root, RepositoryOpenFlags::empty(), std::iter::empty::<&Path>()) {
        Ok(repository) => {
            let config = repository.commondir().join("config");
            Ok(Some(Opened { repository, config, _borrowing: None }))
        }
        Err(error) if error.code() == ErrorCode::NotFound => Ok(None),
        Err(error) if error.code() == ErrorCode::Owner => foreign(root, scratch),
        Err(error) => Err(error).with_context(|| format!("cannot open the Git repository of `{}`", root.display())),
    }
}

/// Opens another user's repository: a Git folder of ours with its `HEAD` and the reference that names, with its objects
/// as alternates (gitrepository-layout(5)), and then its index and its work tree. Its configuration is not used.
fn foreign(root: &Path, scratch: Option<&Path>) -> Result<Option<Opened>> {
    let Some((tree, top)) = WorkTree::around(root) else { return Ok(None) };
    let (git_dir, common) = (tree.git_dir(), tree.common_dir());
    let ours = match scratch {
        Some(scratch) => {
            fs::create_dir_all(scratch)?;
            tempfile::Builder::new().prefix(".tmp-").tempdir_in(scratch)
        }
        None => tempfile::tempdir(),
    }
    .context("cannot make a folder")?;
    let put = |name: &str, bytes: &[u8]| -> Result<()> {
        let path = ours.path().join(name);
        fs::create_dir_all(path.parent().context("a name in the folder")?)?;
        Ok(fs::write(path, bytes)?)
    };
    let objects = fs::canonicalize(common.join("objects"))?;
    put("objects/info/alternates", &[objects.as_os_str().as_encoded_bytes(), b"\n"].concat())?;
    put("config", b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n")?;
    let head = fs::read(git_dir.join("HEAD"))?;
    put("HEAD", &head)?;
    fs::create_dir_all(ours.path().join("refs/heads"))?;
    for name in ["packed-refs", "shallow", "info/exclude"] {
        if let Ok(bytes) = fs::read(common.join(name)) {
            put(name, &bytes)?;
        }
    }
    if let Some(name) = head.strip_prefix(b"ref:").map(<[u8]>::trim_ascii).and_then(|name| std::str::from_utf8(name).ok())
        && let Ok(target) = fs::read(common.join(name))
    {
        put(name, &target)?;
    }
    let open = || -> Result<Repository, git2::Error> {
        let repository = Repository::open(ours.path())?;
        repository.set_index(&mut git2::Index::open(&git_dir.join("index"))?)?;
        repository.set_workdir(&top, false)?;
        Ok(repository)
    };
    let repository = open().map_err(|error| {
        Problem::failed(format!(
            "the Git repository `{}` belongs to another user and cannot be read: {}",
            top.display(),
            error.message()
        ))
        .hint(format!("git config --global --add safe.directory {}", top.display()))
    })?;
    Ok(Some(Opened { repository, config: common.join("config"), _borrowing: Some(ours) }))
}

#[cfg(test)]
#[path = "git_tests.rs"]
mod tests;
