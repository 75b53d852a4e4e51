//! The ledger on a Git server: the same branch there, moved only from the tip it was expected to have.
//!
//! A decision is written here, pushed, and only then made the tip here: one that is lost to somebody else leaves no trace.
//! A push is believed when the server says that it took it for this branch, and the branch read again is ours. The last tip
//! seen on each remote is kept ([`super::seen`]); a remote whose history does not lead to it was rewritten, and is refused.
//!
//! libgit2 speaks HTTP and SSH. For a repository on this machine it would neither run hooks nor look at the branch's old
//! value, so there a push goes through Git's own receive-pack ([`receive`]).

mod network;
mod receive;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use fs_err as fs;
use git2::{Oid, Repository};

use super::commit::{Author, Commit};
use super::disk::{self, Writer};
use super::seen::Seen;
use super::{Appended, BRANCH, Change, Ledger, check_change, log, pack, snapshot};
use crate::error::{Kind, Problem};
use crate::fault;
use crate::release::sshsig::Signer;

/// Decisions of others that an error names at most.
const NAMED_MAX: usize = 20;

/// Where the ledger is shared.
#[derive(Debug, Clone)]
pub struct Remote {
    url: String,
    keys: Vec<PathBuf>,
}

/// What became of an exchange with a remote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Synced {
    /// Both have the same tip, or neither has a decision.
    Same,
    /// They had newer decisions; the tip here is theirs now.
    Forwarded { from: Option<Oid>, to: Oid },
    /// There are decisions here that they do not have; [`Ledger::publish`] sends them.
    Unpublished { theirs: Option<Oid>, ours: Oid },
}

/// What can go wrong with a remote.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// Somebody else was faster. The first of `won` (oldest first, at most 20) took the place; empty when it is not known.
    #[error("somebody else was faster: the ledger at `{url}` is at {tip} now{}", first_of(won))]
    Ahead { url: String, tip: Oid, won: Vec<Commit> },
    /// The server does not take it; its own words.
    #[error("`{url}` refuses the decision: {words}")]
    Refused { url: String, words: String },
    /// It does not let us in, or has no such repository.
    #[error("the ledger at `{url}` does not let this in: {words}")]
    Closed { url: String, words: String },
    /// It cannot be reached, or its answer was lost: the decision may be there or not.
    #[error("cannot reach the ledger at `{url}`: {words}")]
    Unreachable { url: String, words: String },
    /// The tip last seen there is not in the history of what is there now (`None`: nothing).
    #[error("the history of the ledger at `{url}` was rewritten: {seen} was seen there, and is not in the history of {}, where it is now", shown(*.tip))]
    Rewritten { url: String, seen: Oid, tip: Option<Oid> },
    /// There are decisions here and there that do not know of each other; `base` is the last one in common.
    #[error("the ledger here, at {ours}, and the one at `{url}`, at {theirs}, have decided apart from each other since {}", shown(*.base))]
    Diverged { url: String, base: Option<Oid>, ours: Oid, theirs: Oid },
    /// There are older decisions here that are not there yet: [`Ledger::publish`] comes first.
    #[error("there are decisions here, up to {ours}, that are not at `{url}` yet, which is at {theirs}")]
    Unpublished { url: String, theirs: Oid, ours: Oid },
    /// The server said that it took the decision, and shows another tip.
    #[error("`{url}` says that it took the decision {ours}, but its branch is at {}", shown(*.tip))]
    Unbelievable { url: String, ours: Oid, tip: Option<Oid> },
    /// A decision there does not follow from the rules.
    #[error("the ledger at `{url}` has a decision that is not sound: {commit}: {problem}")]
    Unsound { url: String, commit: Oid, problem: String },
    /// What is not about the remote: the disk here, for one.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

fn shown(id: Option<Oid>) -> String {
    id.map_or("nothing".into(), |id| id.to_string())
}

fn first_of(won: &[Commit]) -> String {
    won.first().map_or_else(String::new, |commit| format!(" by {} ({})", commit.author.name, commit.subject))
}

impl RemoteError {
    /// The error for a person: exit code and what to do.
    pub fn into_error(self) -> anyhow::Error {
        let (kind, hint) = match &self {
            Self::Other(_) => match self {
                Self::Other(error) => return error,
                error => return error.into(),
            },
            Self::Ahead { .. } => (Kind::Transient, "run it again: the gates are asked again for what is there now".to_owned()),
            Self::Refused { .. } => {
                (Kind::Failed, "the rules of that server decide; its hook or branch protection has to let you".into())
            }
            Self::Closed { .. } => (
                Kind::Failed,
                "check the address and what you log in with: over SSH the agent's keys and the signing key, over HTTP Git's credential helpers"
                    .into(),
            ),
            Self::Unreachable { .. } => {
                (Kind::Transient, "check the address and the network, then run it again: it finds out what is there".into())
            }
            Self::Rewritten { seen, .. } => (
                Kind::Failed,
                format!(
                    "ask who forced a push there; `git push URL +{seen}:{BRANCH}` brings back what was seen, if it is still here"
                ),
            ),
            Self::Diverged { .. } => (
                Kind::Failed,
                "`pipeline ledger set-aside` gives up what was decided here, shows it, and follows the decisions there".into(),
            ),
            Self::Unsound { commit, .. } => (
                Kind::Failed,
                format!(
                    "nothing of it counts here; who runs that server has to take the branch back to before it, `git log {commit}` in a clone shows whose it is"
                ),
            ),
            Self::Unpublished { .. } => (Kind::Transient, "publish them first; nothing was decided now".into()),
            Self::Unbelievable { .. } => (Kind::Failed, "ask who runs that server; nothing was decided here".into()),
        };
        Problem::new(kind, self.to_string()).hint(hint).into()
    }
}

impl Remote {
    /// A remote at `https://`, `ssh://`, `user@host:path`, `file://` or an absolute path. `keys` are private key files to
    /// offer over SSH after the agent's.
    pub fn new(url: &str, keys: &[PathBuf]) -> Self {
        Self { url: url.into(), keys: keys.to_vec() }
    }

    /// The URL without user name and password, as it is shown and remembered.
    pub fn shown(&self) -> String {
        let Some((scheme, rest)) = self.url.split_once("://") else { return self.url.clone() };
        let (host, path) = rest.split_once('/').map_or((rest, None), |(host, path)| (host, Some(path)));
        let host = host.rsplit_once('@').map_or(host, |(_, host)| host);
        path.map_or_else(|| format!("{scheme}://{host}"), |path| format!("{scheme}://{host}/{path}"))
    }

    /// The URL without the password, as it can be used again.
    pub fn without_password(&self) -> String {
        let Some((scheme, rest)) = self.url.split_once("://") else { return self.url.clone() };
        let (host, path) = rest.split_once('/').map_or((rest, None), |(host, path)| (host, Some(path)));
        let host = match host.rsplit_once('@') {
            Some((login, host)) => format!("{}@{host}", login.split(':').next().unwrap_or_default()),
            None => host.to_owned(),
        };
        path.map_or_else(|| format!("{scheme}://{host}"), |path| format!("{scheme}://{host}/{path}"))
    }

    /// The folder, when it is a repository of this machine.
    fn folder(&self) -> Option<&Path> {
        match self.url.strip_prefix("file://") {
            Some(path) => Some(Path::new(path)),
            None => Some(Path::new(&self.url)).filter(|path| path.is_absolute()),
        }
    }

    fn open_folder(&self, folder: &Path) -> Result<Repository, RemoteError> {
        Repository::open(folder).map_err(|error| network::explain(&self.shown(), &error))
    }

    /// The tip there; `None` when the branch does not exist.
    pub fn tip(&self) -> Result<Option<Oid>, RemoteError> {
        match self.folder() {
            Some(folder) => Ok(disk::read_tip(&self.open_folder(folder)?)?),
            None => network::tip(self),
        }
    }
}

impl Ledger {
    /// Gets what the remote has, and follows it when it is ahead.
    ///
    /// # Errors
    /// [`RemoteError::Unreachable`], [`RemoteError::Rewritten`], [`RemoteError::Diverged`] and [`RemoteError::Unsound`]; the
    /// tip here stays then.
    pub fn sync(&self, remote: &Remote) -> Result<Synced, RemoteError> {
        let writer = self.writer()?;
        let ours = disk::read_tip(&self.repository.get())?;
        let theirs = self.fetch(&writer, remote)?;
        let Some(theirs) = theirs else {
            self.tip()?;
            return Ok(ours.map_or(Synced::Same, |ours| Synced::Unpublished { theirs: None, ours }));
        };
        if self.is_before(ours, theirs)? {
            // Also when what was last seen here is gone here: it may be there.
            self.check_not_rewritten(&Seen::load(&self.seen)?, Some(theirs))?;
            if ours == Some(theirs) {
                self.note_remote(&writer, remote, theirs)?;
                self.catch_up_seen(&writer, ours)?;
                return Ok(Synced::Same);
            }
            self.at(theirs)?;
            self.sound(remote, ours, theirs)?;
            self.note_remote(&writer, remote, theirs)?;
            return match self.advance(&writer, ours, theirs, None)? {
                Appended::Done(to) => Ok(Synced::Forwarded { from: ours, to }),
                Appended::Lost(_) => Err(moved().into()),
            };
        }
        self.tip()?;
        let ours = ours.context("nothing is before everything")?;
        if self.descends(ours, theirs)? {
            self.note_remote(&writer, remote, theirs)?;
            return Ok(Synced::Unpublished { theirs: Some(theirs), ours });
        }
        let base = self.repository.get().merge_base(ours, theirs).ok();
        self.sound(remote, base, theirs)?;
        self.note_remote(&writer, remote, theirs)?;
        Err(RemoteError::Diverged { url: remote.shown(), base, ours, theirs })
    }

    /// Sends decisions made here to the remote, which must be where it was last seen, `theirs`.
    ///
    /// # Errors
    /// As [`Ledger::append_to`].
    pub fn publish(&self, remote: &Remote, theirs: Option<Oid>) -> Result<(), RemoteError> {
        let writer = self.writer()?;
        let Some(ours) = self.tip()? else { return Ok(()) };
        self.push(&writer, remote, theirs, ours)
    }

    /// Decides as [`Ledger::append`] does, and on the remote as well: both must be at `expected`.
    ///
    /// [`Appended::Lost`] when somebody was faster here or there; the tip here is theirs then, and the reasons have to be
    /// looked at again.
    ///
    /// # Errors
    /// All [`RemoteError`]s but [`RemoteError::Ahead`]. Nothing was decided then; only after [`RemoteError::Unreachable`]
    /// the remote may have it, and [`Ledger::sync`] finds out.
    pub fn append_to(
        &self,
        remote: &Remote,
        expected: Option<Oid>,
        change: &Change,
        author: &Author,
        signer: Option<&Signer>,
    ) -> Result<Appended, RemoteError> {
        check_change(change, expected.is_none())?;
        let writer = self.writer()?;
        let tip = self.tip()?;
        self.catch_up_seen(&writer, tip)?;
        if tip != expected {
            return Ok(self.lost(tip)?);
        }
        let id = self.write(&writer, expected, change, author, signer)?;
        match self.push(&writer, remote, expected, id) {
            Ok(()) => {}
            Err(RemoteError::Ahead { .. }) => {
                drop(writer);
                self.sync(remote)?;
                return Ok(self.lost(self.tip()?)?);
            }
            Err(error) => return Err(error),
        }
        fault::point("take a published decision");
        match self.advance(&writer, expected, id, Some(change))? {
            Appended::Done(id) => Ok(Appended::Done(id)),
            Appended::Lost(_) => Err(moved().into()),
        }
    }

    /// Gives up the decisions made here that the remote does not have, after [`RemoteError::Diverged`], and follows the
    /// remote. They stay in the repository below `refs/pipeline/aside/`, and are returned, oldest first, to be decided again.
    ///
    /// # Errors
    /// As [`Ledger::sync`].
    pub fn set_aside(&self, remote: &Remote) -> Result<Vec<Commit>, RemoteError> {
        let writer = self.writer()?;
        let Some(ours) = self.tip()? else { return Ok(Vec::new()) };
        let Some(theirs) = self.fetch(&writer, remote)? else { return Ok(Vec::new()) };
        if self.descends(ours, theirs)? {
            return Ok(Vec::new());
        }
        self.at(theirs)?;
        let base = self.repository.get().merge_base(ours, theirs).ok();
        self.sound(remote, base, theirs)?;
        self.note_remote(&writer, remote, theirs)?;
        let mut aside = self.between(base, ours, usize::MAX)?;
        if !aside.is_empty() {
            let name = format!("refs/pipeline/aside/{ours}");
            self.repository.get().reference(&name, ours, true, "set aside").context("cannot keep the decisions")?;
        }
        // The last one in common leads to both: a kill between the two writes is no rewriting.
        self.catch_up_seen(&writer, base)?;
        match self.advance(&writer, Some(ours), theirs, None)? {
            Appended::Done(_) => Ok(std::mem::take(&mut aside)),
            Appended::Lost(_) => Err(moved().into()),
        }
    }

    /// The decisions after `base` up to `tip`, oldest first; the oldest `most`.
    pub fn between(&self, base: Option<Oid>, tip: Oid, most: usize) -> Result<Vec<Commit>> {
        let mut commits = Vec::new();
        for commit in log::Log::new(self, Some(tip)) {
            let commit = commit?;
            if Some(commit.id) == base {
                break;
            }
            commits.push(commit);
        }
        commits.reverse();
        commits.truncate(most);
        Ok(commits)
    }

    /// Whether the decisions after `base` up to `theirs` follow from the rules.
    fn sound(&self, remote: &Remote, base: Option<Oid>, theirs: Oid) -> Result<(), RemoteError> {
        match self.check_new(base, theirs)? {
            None => Ok(()),
            Some(finding) => {
                let commit = finding.commit.unwrap_or(theirs);
                Err(RemoteError::Unsound { url: remote.shown(), commit, problem: finding.problem })
            }
        }
    }

    fn is_before(&self, ours: Option<Oid>, theirs: Oid) -> Result<bool> {
        ours.map_or(Ok(true), |ours| self.descends(theirs, ours))
    }

    /// Gets the remote's tip and everything it leads to, synced. No branch moves, and whether it is sound is not known yet.
    fn fetch(&self, writer: &Writer, remote: &Remote) -> Result<Option<Oid>, RemoteError> {
        let theirs = remote.tip()?;
        let url = remote.shown();
        let seen = Seen::load(&self.seen)?.remote(&url);
        let Some(tip) = theirs else {
            return match seen {
                Some(seen) => Err(RemoteError::Rewritten { url, seen, tip: None }),
                None => Ok(None),
            };
        };
        self.get_objects(writer, remote, tip)?;
        if let Some(seen) = seen
            && !self.descends(tip, seen)?
        {
            return Err(RemoteError::Rewritten { url, seen, tip: theirs });
        }
        Ok(theirs)
    }

    fn get_objects(&self, writer: &Writer, remote: &Remote, tip: Oid) -> Result<(), RemoteError> {
        let repository = self.repository.get();
        if snapshot::commit_exists(&repository, tip)? {
            return Ok(());
        }
        pack::sweep(&self.dir)?;
        fault::point("fetch");
        match remote.folder() {
            None => {
                let known = pack::names(&self.dir.join("objects/pack"))?;
                network::download(remote, &repository)?;
                pack::sync_new(writer, &self.dir, &known)?;
            }
            Some(folder) => {
                let making = disk::scratch(&self.dir).join("fetching");
                fs::create_dir(&making).map_err(anyhow::Error::from)?;
                let have = disk::read_tip(&repository)?;
                pack::build_from(&remote.open_folder(folder)?, tip, have, &making)?;
                pack::install(writer, &self.dir, &making)?;
            }
        }
        if snapshot::commit_exists(&repository, tip)? {
            return Ok(());
        }
        Err(RemoteError::Unreachable { url: remote.shown(), words: format!("it did not send {tip}") })
    }

    fn note_remote(&self, writer: &Writer, remote: &Remote, tip: Oid) -> Result<()> {
        let url = remote.shown();
        let mut seen = Seen::load(&self.seen)?;
        if seen.remote(&url) == Some(tip) && seen.shared.is_some() {
            return Ok(());
        }
        seen.set_remote(&url, tip);
        seen.shared.get_or_insert_with(|| remote.without_password());
        self.save_seen(writer, &seen)
    }

    /// Moves the remote's branch from `expected` to `id`.
    fn push(&self, writer: &Writer, remote: &Remote, expected: Option<Oid>, id: Oid) -> Result<(), RemoteError> {
        let url = remote.shown();
        if let Some(seen) = Seen::load(&self.seen)?.remote(&url)
            && !expected.map_or(Ok(false), |expected| self.descends(expected, seen))?
        {
            // They were further than this: unless they went back, somebody was faster.
            let tip = remote.tip()?;
            return Err(match tip == expected {
                true => RemoteError::Rewritten { url, seen, tip },
                false => self.ahead(writer, remote, expected, "")?,
            });
        }
        fault::point("push");
        let sent = match remote.folder() {
            Some(folder) => receive::push(folder, &url, &self.repository.get(), expected, id),
            None => network::push(remote, &self.repository.get(), expected, id),
        };
        match sent {
            Ok(()) => {}
            Err(Push::Moved { tip, .. }) if tip == Some(id) => {}
            Err(Push::Moved { words, .. }) => return Err(self.ahead(writer, remote, expected, &words)?),
            Err(Push::Failed(error)) => return Err(error),
        }
        fault::point("read the remote's branch again");
        let tip = remote.tip()?;
        if tip != Some(id) {
            // Somebody may have gone on from ours already.
            let on =
                tip.map_or(Ok(false), |tip| self.get_objects(writer, remote, tip).and_then(|()| Ok(self.descends(tip, id)?)))?;
            if !on {
                return Err(RemoteError::Unbelievable { url, ours: id, tip });
            }
        }
        Ok(self.note_remote(writer, remote, id)?)
    }

    /// Who was faster; or what is wrong there, which may have said `words`.
    fn ahead(&self, writer: &Writer, remote: &Remote, expected: Option<Oid>, words: &str) -> Result<RemoteError, RemoteError> {
        let url = remote.shown();
        let Some(tip) = self.fetch(writer, remote)? else {
            return Ok(match expected {
                Some(seen) => RemoteError::Rewritten { url, seen, tip: None },
                None => RemoteError::Refused { url, words: words.into() },
            });
        };
        match expected {
            Some(ours) if tip != ours && self.descends(ours, tip)? => Ok(RemoteError::Unpublished { url, theirs: tip, ours }),
            Some(expected) if !self.descends(tip, expected)? => {
                // Decisions that they never had are not theirs to rewrite.
                let base = self.repository.get().merge_base(expected, tip).ok();
                Ok(RemoteError::Diverged { url, base, ours: expected, theirs: tip })
            }
            Some(expected) if tip == expected => {
                // Words like those of a race, and nobody else was there.
                Ok(RemoteError::Refused { url, words: words.into() })
            }
            _ => Ok(RemoteError::Ahead { url, tip, won: self.between(expected, tip, NAMED_MAX)? }),
        }
    }
}

fn moved() -> anyhow::Error {
    Problem::transient("another program moved the ledger's branch meanwhile").hint("run it again").into()
}

/// Why a push did not happen.
#[derive(Debug)]
enum Push {
    /// The branch is not where it was expected, but at `tip` if that is known; the server's words, if it said any.
    Moved {
        tip: Option<Oid>,
        words: String,
    },
    Failed(RemoteError),
}

impl Push {
    /// A push that the server refuses with `why`; `words` are what its hooks said. Git refuses one that lost a race with
    /// the words of its locks.
    fn refused(url: &str, why: &str, words: &[u8]) -> Self {
        const RACE: [&str; 5] = ["failed to update ref", "cannot lock ref", "failed to lock", "fetch first", "non-fast-forward"];
        let words = network::with_words(why, words);
        match RACE.iter().any(|part| why.contains(part)) {
            true => Self::Moved { tip: None, words },
            false => Self::Failed(RemoteError::Refused { url: url.into(), words }),
        }
    }
}

impl From<anyhow::Error> for Push {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_shown_without_credentials() {
        for (url, shown, folder) in [
            ("https://alice:secret@git.example.org/a/b.git", "https://git.example.org/a/b.git", None),
            ("https://git.example.org", "https://git.example.org", None),
            ("ssh://git@host:22/x@y", "ssh://host:22/x@y", None),
            ("git@host:x.git", "git@host:x.git", None),
            ("file:///srv/ledger.git", "file:///srv/ledger.git", Some("/srv/ledger.git")),
            ("/srv/ledger.git", "/srv/ledger.git", Some("/srv/ledger.git")),
        ] {
            let remote = Remote::new(url, &[]);
            assert_eq!((remote.shown().as_str(), remote.folder()), (shown, folder.map(Path::new)));
        }
    }

    #[test]
    fn errors_say_who_has_to_act() {
        let (url, id) = ("u".to_owned(), Oid::from_str(&"a".repeat(40)).unwrap());
        let table = [
            (RemoteError::Ahead { url: url.clone(), tip: id, won: vec![] }, 75),
            (RemoteError::Refused { url: url.clone(), words: "no".into() }, 1),
            (RemoteError::Unreachable { url: url.clone(), words: "timed out".into() }, 75),
            (RemoteError::Rewritten { url: url.clone(), seen: id, tip: None }, 1),
            (RemoteError::Diverged { url: url.clone(), base: None, ours: id, theirs: id }, 1),
            (RemoteError::Unpublished { url: url.clone(), theirs: id, ours: id }, 75),
            (RemoteError::Unbelievable { url, ours: id, tip: None }, 1),
            (RemoteError::Other(Problem::usage("x").hint("y").into()), 2),
        ];
        for (error, code) in table {
            let error = error.into_error();
            assert_eq!((crate::error::exit_code(&error), crate::error::hints(&error).len()), (code, 1), "{error}");
        }
    }
}
