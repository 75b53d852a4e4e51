//! Checks the whole ledger, from its first decision to the last: what can be known without knowing what the files mean.
//! The caller adds the rest, such as whether a state follows from the one before and who may sign what.

use std::collections::{BTreeMap, HashMap};

use anyhow::Result;
use git2::Oid;
use serde::Deserialize;

use super::commit::{Commit, Signed};
use super::log::{self, Made, Previous};
use super::place::{self, Place};
use super::seen::Seen;
use super::snapshot::{Changed, Snapshot};
use super::{FORMAT, Ledger, check_format, disk};

/// What a check of the ledger found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub tip: Option<Oid>,
    /// Decisions looked at.
    pub commits: usize,
    /// Decisions with a good signature, whoever's.
    pub signed: usize,
    /// All that is wrong, oldest decision first; nothing when the ledger is sound.
    pub findings: Vec<Finding>,
}

/// Something wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Where; `None` when it is about the ledger as a whole.
    pub commit: Option<Oid>,
    /// Lower case, no full stop.
    pub problem: String,
}

/// A decision's own checks: the commit, the files before (`None` before the first) and the files after; returns problems.
pub type Check<'a> = dyn FnMut(&Commit, Option<&Snapshot>, &Snapshot) -> Result<Vec<String>> + 'a;

impl Ledger {
    /// Walks all decisions, first to last: every object can be read and has the bytes its name says, each decision has one
    /// parent, changes only files that belong together, says which version it
    /// follows, and its signature, if it has one, is over it. The last tips seen, here and on remotes, must be among them.
    ///
    /// # Errors
    /// Only what `check` fails with, and a repository that cannot be read at all; what is wrong is in the findings.
    pub fn verify(&self, check: &mut Check<'_>) -> Result<Verified> {
        let seen = Seen::load(&self.seen);
        let tip = disk::read_tip(&self.repository.get())?;
        let mut walk = Walk { ledger: self, made: HashMap::new(), signed: 0, findings: Vec::new() };
        let chain = walk.chain(tip);
        walk.check_seen(&seen, tip, &chain);
        let mut before: Option<Snapshot> = None;
        for (number, id) in chain.iter().rev().enumerate() {
            // Was read before, so it can be read.
            let Ok(commit) = self.commit(*id) else { continue };
            let after = Snapshot::new(Some(*id), Some(commit.tree), &self.repository);
            walk.check_one(number == 0, &commit, before.as_ref(), &after);
            for problem in check(&commit, before.as_ref(), &after)? {
                walk.found(Some(*id), problem);
            }
            before = Some(after);
        }
        Ok(Verified { tip, commits: chain.len(), signed: walk.signed, findings: walk.findings })
    }

    /// What is wrong with the decisions after `base` (`None`: all) up to `tip`, as far as the rules of this ledger go; the
    /// first that is wrong, without any when it has no rules.
    pub(super) fn check_new(&self, base: Option<Oid>, tip: Oid) -> Result<Option<Finding>> {
        let Some(rules) = &self.rules else { return Ok(None) };
        let made = base.map_or_else(|| Ok(BTreeMap::new()), |base| Made::at(&self.repository, base))?;
        let mut walk = Walk { ledger: self, made: made.into_iter().collect(), signed: 0, findings: Vec::new() };
        let mut before = base.map(|base| self.at(base)).transpose()?;
        for commit in self.between(base, tip, usize::MAX)? {
            let after = Snapshot::new(Some(commit.id), Some(commit.tree), &self.repository);
            walk.check_one(before.is_none(), &commit, before.as_ref(), &after);
            if walk.findings.is_empty() {
                let wrong = rules(&commit, before.as_ref(), &after)?;
                wrong.into_iter().for_each(|problem| walk.found(Some(commit.id), problem));
            }
            if !walk.findings.is_empty() {
                return Ok(Some(walk.findings.swap_remove(0)));
            }
            before = Some(after);
        }
        Ok(None)
    }
}

struct Walk<'a> {
    ledger: &'a Ledger,
    /// The commit that made each file as it is now.
    made: HashMap<String, Oid>,
    signed: usize,
    findings: Vec<Finding>,
}

impl Walk<'_> {
    fn found(&mut self, commit: Option<Oid>, problem: impl Into<String>) {
        self.findings.push(Finding { commit, problem: problem.into() });
    }

    /// The commits from the tip to the first, as far as they can be read.
    fn chain(&mut self, tip: Option<Oid>) -> Vec<Oid> {
        let (mut chain, mut next) = (Vec::new(), tip);
        while let Some(id) = next {
            match self.ledger.commit(id) {
                Ok(commit) => {
                    next = commit.parent;
                    chain.push(id);
                }
                Err(error) => {
                    self.found(Some(id), format!("{error:#}; what was before it cannot be checked"));
                    break;
                }
            }
        }
        chain
    }

    fn check_seen(&mut self, seen: &Result<Seen>, tip: Option<Oid>, chain: &[Oid]) {
        let seen = match seen {
            Ok(seen) => seen,
            Err(error) => return self.found(None, format!("{error:#}")),
        };
        let now = tip.map_or("nothing".into(), |tip| tip.to_string());
        if let Some(last) = seen.tip().filter(|last| !chain.contains(last)) {
            self.found(None, format!("the history was rewritten: {last} was the tip, and is not in the history of {now}"));
        }
        for (url, last) in seen.remotes().filter(|(_, last)| !chain.contains(last)) {
            let problem = format!("{last} was seen on `{url}`, and is not in the history of {now}");
            self.findings.push(Finding { commit: None, problem });
        }
    }

    fn check_one(&mut self, first: bool, commit: &Commit, before: Option<&Snapshot>, after: &Snapshot) {
        let id = Some(commit.id);
        if !commit.merged.is_empty() {
            self.found(id, "it has more than one parent");
        }
        if commit.author != commit.committer {
            self.found(id, format!("it is by `{}`, but was committed by `{}`", commit.author.name, commit.committer.name));
        }
        match commit.signed::<&str>(&[]) {
            Signed::No => {}
            Signed::Bad { why } => self.found(id, why),
            Signed::By { .. } | Signed::Stranger { .. } => self.signed += 1,
        }
        let empty = Snapshot::new(None, None, &self.ledger.repository);
        match after.changed(before.unwrap_or(&empty)) {
            // What was before a cut of the history is unknown.
            Ok(_) if first && commit.parent.is_some() => {}
            Ok(changes) => self.check_changes(first, commit, after, &changes),
            Err(error) => self.found(id, format!("{error:#}")),
        }
    }

    fn check_changes(&mut self, first: bool, commit: &Commit, after: &Snapshot, changes: &[Changed]) {
        let id = Some(commit.id);
        let mut places: Vec<Place> = Vec::new();
        for changed in changes {
            match changed.path.parse() {
                Ok(place) => places.push(place),
                Err(problem) => self.found(id, problem.to_string()),
            }
        }
        if first || places.contains(&Place::Format) {
            let format = after.read(place::FORMAT_FILE).and_then(|bytes| check_format(&self.ledger.dir, bytes.as_deref()));
            if let Err(error) = format {
                self.found(id, format!("{error:#}"));
            }
        }
        if let Some(why) = place::together(&places, first) {
            self.found(id, why);
        }
        for changed in changes {
            if let Err(error) = self.check_file(commit, after, changed) {
                self.found(id, format!("`{}`: {error:#}", changed.path));
            }
            match changed.after {
                Some(_) => drop(self.made.insert(changed.path.clone(), commit.id)),
                None => drop(self.made.remove(&changed.path)),
            }
        }
    }

    fn check_file(&self, commit: &Commit, after: &Snapshot, changed: &Changed) -> Result<()> {
        #[derive(Deserialize)]
        struct File {
            format: u32,
        }
        if changed.after.is_none() {
            return Ok(());
        }
        let bytes = after.read(&changed.path)?.unwrap_or_default();
        let file: File = serde_json::from_slice(&bytes)?;
        anyhow::ensure!(file.format <= FORMAT, "it was written by a newer pipeline");
        let made = self.made.get(&changed.path).copied();
        let said = match log::previous(&bytes)? {
            Previous::Commit(id) => Some(id),
            Previous::None => None,
            Previous::Unsaid if matches!(changed.path.parse(), Ok(Place::State { .. })) => None,
            Previous::Unsaid => return Ok(()),
        };
        let shown = |id: Option<Oid>| id.map_or("no decision".into(), |id| id.to_string());
        anyhow::ensure!(
            said == made,
            "{} says that {} made the version before, and it was {}",
            commit.id,
            shown(said),
            shown(made)
        );
        Ok(())
    }
}
