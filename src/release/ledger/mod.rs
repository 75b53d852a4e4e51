//! The ledger: a bare Git repository with one commit for each decision.
//!
//! It knows Git and files; what is in the files is for its callers. A decision is appended to the tip its reasons were read
//! from, or it is lost to another one and has to be thought over. Writers of one machine wait for each other; readers never
//! wait. Everything is synced before the branch moves, so that a kill, a full disk or a power cut leaves the tip before or
//! the tip after. The last tips seen are kept outside the repository: a history that does not lead to them was rewritten,
//! and is refused. `git log`, `git fsck` and `git push` work on it as on any repository.
//!
//! [`place`] says where files are, [`commit`] how a decision is written, [`Remote`] shares the ledger through a Git server.

mod commit;
mod disk;
mod log;
mod pack;
pub mod place;
mod remote;
mod seen;
mod snapshot;
mod verify;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use fs_err as fs;
use git2::{ErrorCode, ObjectType, Repository, RepositoryInitOptions, RepositoryOpenFlags};
use serde::Deserialize;

pub use commit::{Author, Commit, NAMESPACE, Signed};
pub use git2::Oid;
pub use log::{History, Log, Version};
pub use remote::{Remote, RemoteError, Synced};
pub use snapshot::{Changed, Snapshot};
pub use verify::{Finding, Verified};

use self::disk::{Objects, Writer};
use self::log::Made;
use self::place::Place;
use self::seen::Seen;
use self::snapshot::Shared;
use crate::error::Problem;
use crate::fault;
use crate::release::sshsig::Signer;

/// The branch that is the ledger.
pub const BRANCH: &str = "refs/heads/main";
/// Format of the ledger: a newer one is refused.
pub const FORMAT: u32 = 1;

/// Settings for Git's own programs: they sync too, never collect garbage, and take no push that cuts history.
const CONFIG: &str = "\
[core]
\trepositoryformatversion = 0
\tfilemode = true
\tbare = true
\tfsync = all
[gc]
\tauto = 0
[maintenance]
\tauto = false
[receive]
\tdenyNonFastForwards = true
\tdenyDeletes = true
\tfsckObjects = true
\tautogc = false
";

/// A ledger on this machine.
#[derive(Clone)]
pub struct Ledger {
    dir: PathBuf,
    /// File with the last tips seen.
    seen: PathBuf,
    repository: Shared,
    /// What decisions of others are checked by before the tip moves to them.
    rules: Option<Arc<Rules>>,
}

/// What is wrong with a decision: the commit, the files before (`None` before the first) and the files after.
pub type Rules = dyn Fn(&Commit, Option<&Snapshot>, &Snapshot) -> Result<Vec<String>> + Send + Sync;

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ledger").field("dir", &self.dir).field("seen", &self.seen).finish_non_exhaustive()
    }
}

/// A decision to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Paths and their new bytes; `None` removes. See [`place::together`] for what may change in one decision.
    pub writes: Vec<(String, Option<Vec<u8>>)>,
    /// Subject, reason and trailers.
    pub message: String,
}

/// How an append ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appended {
    /// The decision is this commit, and the tip.
    Done(Oid),
    /// Somebody else was faster: this is the tip now, and nothing was written.
    Lost(Oid),
}

impl Ledger {
    /// Opens the bare repository `dir`, made when there is none. `seen` is a file outside of it for the last tips seen.
    ///
    /// # Errors
    /// A [`Problem`] for a repository that is no ledger, is of another user or was written by a newer pipeline.
    pub fn open(dir: &Path, seen: &Path) -> Result<Self> {
        if is_absent(dir)? {
            make(dir).with_context(|| format!("cannot make the ledger `{}`", dir.display()))?;
        }
        let flags = RepositoryOpenFlags::NO_SEARCH | RepositoryOpenFlags::NO_DOTGIT;
        let repository = Repository::open_ext(dir, flags, [""; 0]).map_err(|error| not_opened(dir, &error))?;
        if !repository.is_bare() {
            let problem = Problem::usage(format!("`{}` is no ledger: it has a work tree", dir.display()));
            bail!(problem.hint("give the path of a bare repository, or of a folder that does not exist"));
        }
        fs::create_dir_all(disk::scratch(repository.path()))?;
        // libgit2 ends it with a slash, which would put the lock into it.
        let path = repository.path().components().collect();
        let ledger = Self { dir: path, seen: seen.to_path_buf(), repository: Shared::new(repository), rules: None };
        ledger.check_is_ledger()?;
        Ok(ledger)
    }

    /// The repository's folder.
    /// The same ledger, which follows a remote only as far as `rules` find nothing wrong.
    #[must_use]
    pub fn with_rules(self, rules: Arc<Rules>) -> Self {
        Self { rules: Some(rules), ..self }
    }

    /// The address of the remote it is shared with, without a password, once something was exchanged with one.
    pub fn shared(&self) -> Result<Option<String>> {
        Ok(Seen::load(&self.seen)?.shared)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The last decision; `None` when there is none.
    ///
    /// # Errors
    /// A [`Problem`] when the history does not lead to the last tip seen.
    pub fn tip(&self) -> Result<Option<Oid>> {
        // In this order: the tip only moves on.
        let seen = Seen::load(&self.seen)?;
        let tip = disk::read_tip(&self.repository.get())?;
        self.check_not_rewritten(&seen, tip)?;
        Ok(tip)
    }

    /// The files at the tip.
    ///
    /// # Errors
    /// As [`Ledger::tip`] and [`Ledger::at`].
    pub fn snapshot(&self) -> Result<Snapshot> {
        match self.tip()? {
            Some(tip) => self.at(tip),
            None => Ok(Snapshot::new(None, None, &self.repository)),
        }
    }

    /// The files after the decision `id`.
    ///
    /// # Errors
    /// A commit that is not there, is no ledger's, or was written by a newer pipeline.
    pub fn at(&self, id: Oid) -> Result<Snapshot> {
        let commit = self.commit(id)?;
        let snapshot = Snapshot::new(Some(id), Some(commit.tree), &self.repository);
        check_format(&self.dir, snapshot.read(place::FORMAT_FILE)?.as_deref())?;
        Ok(snapshot)
    }

    /// The decision `id`.
    pub fn commit(&self, id: Oid) -> Result<Commit> {
        log::read(&self.repository.get(), id)
    }

    /// Writes a decision after `expected`, the tip it was made from (`None` for the first).
    ///
    /// All writes are synced when this returns [`Appended::Done`]; nothing is left of a decision that is lost.
    ///
    /// # Errors
    /// Changes that do not belong together ([`place::together`]), names Git cannot hold, a signer that cannot sign, a full
    /// disk. The tip is where it was then.
    pub fn append(&self, expected: Option<Oid>, change: &Change, author: &Author, signer: Option<&Signer>) -> Result<Appended> {
        check_change(change, expected.is_none())?;
        let writer = self.writer()?;
        let tip = self.tip()?;
        self.catch_up_seen(&writer, tip)?;
        if tip != expected {
            return self.lost(tip);
        }
        let id = self.write(&writer, expected, change, author, signer)?;
        self.advance(&writer, expected, id, Some(change))
    }

    /// Waits until this is the only writer.
    fn writer(&self) -> Result<Writer> {
        let writer = Writer::wait(&self.dir)?;
        Seen::sweep(&writer, &self.seen)?;
        Ok(writer)
    }

    fn lost(&self, tip: Option<Oid>) -> Result<Appended> {
        let tip = tip.with_context(|| Problem::failed(format!("the ledger `{}` has lost its decisions", self.dir.display())))?;
        Ok(Appended::Lost(tip))
    }

    /// Writes the commit of a decision and everything in it, synced, without moving the tip to it.
    fn write(
        &self,
        _writer: &Writer,
        parent: Option<Oid>,
        change: &Change,
        author: &Author,
        signer: Option<&Signer>,
    ) -> Result<Oid> {
        let before = parent.map(|parent| self.at(parent)).transpose()?.and_then(|snapshot| snapshot.tree());
        let repository = self.repository.get();
        let mut objects = Objects::new(&repository);
        let tree = write_tree(&repository, &mut objects, before, &change.writes)?;
        if Some(tree) == before {
            bail!(Problem::bug("a decision that changes nothing"));
        }
        let commit = commit::write(tree, parent, author, &change.message, signer)?;
        let id = objects.put(ObjectType::Commit, &commit)?;
        objects.finish()?;
        Ok(id)
    }

    /// Moves the tip to `id`, and notes it as seen. `change` is what `id` did to `expected`, when known.
    fn advance(&self, writer: &Writer, expected: Option<Oid>, id: Oid, change: Option<&Change>) -> Result<Appended> {
        let repository = self.repository.get();
        if let Err(tip) = disk::move_tip(writer, &repository, expected, id)? {
            drop(repository);
            return self.lost(tip);
        }
        if let Some(change) = change {
            let changes: Vec<_> = change.writes.iter().map(|(path, bytes)| (path.clone(), bytes.is_some())).collect();
            Made::follow(&repository, expected, id, &[changes, format_change(expected)].concat());
        }
        drop(repository);
        fault::point("write the last tip seen");
        // The decision stands. A tip seen that is older is as true; the next writer says when it cannot be written.
        let _ = self.catch_up_seen(writer, Some(id));
        Ok(Appended::Done(id))
    }

    /// The decisions, newest first.
    pub fn log(&self) -> Result<Log<'_>> {
        Ok(Log::new(self, self.tip()?))
    }

    /// The versions of one file that is there now, newest first.
    ///
    /// Follows what the files say in `previous`, so that other decisions are not read; see [`Ledger::made`].
    pub fn history_of(&self, path: &str) -> Result<History<'_>> {
        Ok(History::new(self, path, self.made(path)?))
    }

    /// The decision that made the file as it is now: what the next version names as `previous`. `None` without such a file.
    pub fn made(&self, path: &str) -> Result<Option<Oid>> {
        let Some(tip) = self.tip()? else { return Ok(None) };
        self.made_at(tip, path)
    }

    /// [`Ledger::made`] as of the decision `id`. Fast at the tip only.
    pub fn made_at(&self, id: Oid, path: &str) -> Result<Option<Oid>> {
        Ok(Made::at(&self.repository, id)?.remove(path))
    }

    /// What [`Ledger::made`] says of every file.
    pub fn made_all(&self) -> Result<BTreeMap<String, Oid>> {
        self.tip()?.map_or_else(|| Ok(BTreeMap::new()), |tip| Made::at(&self.repository, tip))
    }

    /// Whether the decision `ancestor` is `commit` or in its history.
    pub fn descends(&self, commit: Oid, ancestor: Oid) -> Result<bool> {
        log::descends(&self.repository.get(), commit, ancestor)
    }

    /// Takes the tip as it is for the last one seen, here and wherever it is shared, after somebody has looked at why it was
    /// rewritten.
    pub fn accept(&self) -> Result<()> {
        let writer = self.writer()?;
        let tip = disk::read_tip(&self.repository.get())?;
        let mut seen = Seen::load(&self.seen).unwrap_or_default();
        seen.set_tip(tip);
        seen.forget_remotes();
        self.save_seen(&writer, &seen)
    }

    fn check_is_ledger(&self) -> Result<()> {
        let repository = self.repository.get();
        let no_ledger = |why: &str| {
            Problem::usage(format!("`{}` is no ledger: {why}", self.dir.display()))
                .hint("give the path of a ledger, or of a folder that does not exist")
        };
        if let Some(tip) = disk::read_tip(&repository)? {
            drop(repository);
            return self.at(tip).map(drop);
        }
        if repository.references()?.flatten().any(|reference| reference.kind().is_some()) {
            bail!(no_ledger(&format!("it has no `{BRANCH}`")));
        }
        Ok(())
    }

    fn check_not_rewritten(&self, seen: &Seen, tip: Option<Oid>) -> Result<()> {
        let Some(last) = seen.tip().filter(|last| Some(*last) != tip) else { return Ok(()) };
        let shown = self.dir.display();
        let hint = format!(
            "`pipeline ledger verify` looks at what is there; when the change is wanted, remove `{}`",
            self.seen.display()
        );
        let Some(tip) = tip else {
            let problem = Problem::failed(format!("the ledger `{shown}` is empty, but its last decision seen here was {last}"));
            bail!(problem.hint("get it back from its remote or a backup").hint(hint));
        };
        let repository = self.repository.get();
        if log::descends(&repository, tip, last)? {
            return Ok(());
        }
        let problem = Problem::failed(format!(
            "the history of the ledger `{shown}` was rewritten: its last decision seen here, {last}, is not in the history of {tip}, where it is now"
        ));
        let back = format!("`git -C {shown} update-ref {BRANCH} {last}` takes the rewriting back");
        bail!(if snapshot::commit_exists(&repository, last)? { problem.hint(back) } else { problem }.hint(hint));
    }

    /// Writes down the tip as seen, unless it is.
    fn catch_up_seen(&self, writer: &Writer, tip: Option<Oid>) -> Result<()> {
        let mut seen = Seen::load(&self.seen)?;
        if seen.tip() == tip {
            return Ok(());
        }
        seen.set_tip(tip);
        self.save_seen(writer, &seen)
    }

    fn save_seen(&self, writer: &Writer, seen: &Seen) -> Result<()> {
        if let Some(folder) = self.seen.parent() {
            fs::create_dir_all(folder)?;
        }
        seen.save(writer, &self.seen).context("cannot note the last tip seen")
    }
}

/// Whether there is nothing at `dir`, or an empty folder.
fn is_absent(dir: &Path) -> Result<bool> {
    match fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            bail!(Problem::usage(format!("`{}` is no ledger, but a file", dir.display())))
        }
        Err(error) => Err(error.into()),
    }
}

/// Makes an empty ledger beside `dir`, and puts it there when it is whole.
fn make(dir: &Path) -> Result<()> {
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    let _writer = Writer::wait(dir)?;
    if !is_absent(dir)? {
        return Ok(());
    }
    let mut making = dir.as_os_str().to_owned();
    making.push(".making");
    let making = PathBuf::from(making);
    if fs::symlink_metadata(&making).is_ok() {
        fs::remove_dir_all(&making)?;
    }
    fault::point("make the repository");
    let mut options = RepositoryInitOptions::new();
    options.bare(true).no_reinit(true).external_template(false).initial_head("main");
    Repository::init_opts(&making, &options).context("cannot make a repository")?;
    fs::create_dir_all(making.join("objects/pack"))?;
    fs::create_dir_all(making.join("refs/heads"))?;
    fs::create_dir_all(disk::scratch(&making))?;
    fs::write(making.join("config"), CONFIG)?;
    fs::write(making.join("description"), "the ledger of pipeline: one commit for each decision\n")?;
    sync_tree(&making)?;
    fault::point("rename the repository");
    fs::rename(&making, dir)?;
    disk::sync_folder(parent)
}

fn sync_tree(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            fs::File::open(entry.path())?.sync_all()?;
        }
    }
    disk::sync_folder(folder)
}

fn not_opened(dir: &Path, error: &git2::Error) -> Problem {
    let problem = Problem::usage(format!("`{}` is no ledger: {}", dir.display(), error.message()));
    match error.code() {
        ErrorCode::Owner => Problem::usage(format!("the ledger `{}` belongs to another user", dir.display()))
            .hint("work as its owner, or share it through a Git server"),
        _ => problem.hint("give the path of a ledger, or of a folder that does not exist"),
    }
}

/// Checks `ledger.json`.
fn check_format(dir: &Path, bytes: Option<&[u8]>) -> Result<()> {
    #[derive(Deserialize)]
    struct File {
        format: u32,
    }
    let no_ledger = |why: &str| {
        Problem::usage(format!("`{}` is no ledger: {why}", dir.display()))
            .hint("give the path of a ledger, or of a folder that does not exist")
    };
    let Some(bytes) = bytes else { bail!(no_ledger(&format!("it has no `{}`", place::FORMAT_FILE))) };
    let Ok(file) = serde_json::from_slice::<File>(bytes) else {
        bail!(no_ledger(&format!("its `{}` says no format", place::FORMAT_FILE)));
    };
    if file.format > FORMAT {
        let problem = Problem::usage(format!(
            "the ledger `{}` has format {}, and this pipeline knows {FORMAT}: it was written by a newer pipeline",
            dir.display(),
            file.format
        ));
        bail!(problem.hint("install the newest pipeline"));
    }
    Ok(())
}

/// The first commit also writes the format.
fn format_change(parent: Option<Oid>) -> Vec<(String, bool)> {
    if parent.is_none() { vec![(place::FORMAT_FILE.into(), true)] } else { Vec::new() }
}

fn check_change(change: &Change, first: bool) -> Result<()> {
    let places = change.writes.iter().map(|(path, _)| path.parse()).collect::<Result<Vec<Place>, Problem>>()?;
    match place::together(&places, first) {
        Some(why) => bail!(Problem::bug(format!("a decision that cannot be written: {why}"))),
        None => Ok(()),
    }
}

/// The tree that `writes` make of the one before.
fn write_tree(
    repository: &Repository,
    objects: &mut Objects<'_>,
    before: Option<Oid>,
    writes: &[(String, Option<Vec<u8>>)],
) -> Result<Oid> {
    let mut root = before.map_or_else(|| Ok(snapshot::Entries::new()), |tree| snapshot::entries(repository, tree))?;
    if before.is_none() {
        let bytes = format!("{{\n  \"format\": {FORMAT}\n}}\n");
        snapshot::set(&mut root, place::FORMAT_FILE, false, Some(objects.put(ObjectType::Blob, bytes.as_bytes())?));
    }
    let mut folders: BTreeMap<&str, snapshot::Entries> = BTreeMap::new();
    for (path, bytes) in writes {
        let blob = bytes.as_ref().map(|bytes| objects.put(ObjectType::Blob, bytes)).transpose()?;
        match path.split_once('/') {
            None => snapshot::set(&mut root, path, false, blob),
            Some((folder, file)) => {
                if !folders.contains_key(folder) {
                    let known = root.get(folder.as_bytes()).map(|(_, tree)| snapshot::entries(repository, *tree)).transpose()?;
                    folders.insert(folder, known.unwrap_or_default());
                }
                if let Some(entries) = folders.get_mut(folder) {
                    snapshot::set(entries, file, false, blob);
                }
            }
        }
    }
    for (folder, entries) in folders {
        let tree = if entries.is_empty() { None } else { Some(objects.put(ObjectType::Tree, &snapshot::encode(&entries))?) };
        snapshot::set(&mut root, folder, true, tree);
    }
    objects.put(ObjectType::Tree, &snapshot::encode(&root))
}
