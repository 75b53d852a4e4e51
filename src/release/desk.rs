//! Where decisions are made: reads the ledger, lets the pure rules decide, and commits what they say.
//!
//! Every flow is the same four steps: read → plan ([`promotion::plan`], [`State::after`]) → append → and, when somebody else
//! was faster, again from the start, with all gates asked again. With a remote a decision counts once the remote has it; a
//! rollback or an emergency stop alone is made here when the remote cannot be reached, and published by the next command that reaches it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};
use jiff::Timestamp;
use serde::Serialize;

use super::audit;
use super::claims;
use super::decision::{Decision, Frozen, Kind, Refused, Status};
use super::gate::Evidence;
use super::ledger::place::{FROZEN_FILE, Place};
use super::ledger::{Appended, Author, Change, Commit, Ledger, Oid, Remote, RemoteError, Snapshot, Synced};
use super::message;
use super::policy::{self, Difference, Policy};
use super::promotion::{self, Action, Candidate, Plan, Request};
use super::sshsig::{self, Signer};
use super::state::{Binding, Inputs, State, View};
use crate::error::Problem;
use crate::progress::Progress;

/// How often a decision is made again when somebody else was faster. Each time at least one decision of the others got
/// through, so this many in a row is a queue of people, not an accident.
const ROUNDS: usize = 16;

/// Who decides, with what.
#[expect(missing_debug_implementations, reason = "the evidence has none")]
pub struct Desk<'a> {
    pub ledger: &'a Ledger,
    /// Where the ledger is shared.
    pub remote: Option<&'a Remote>,
    /// As Git has it.
    pub name: String,
    pub email: String,
    /// Signs the commits.
    pub signer: Option<&'a Signer>,
    pub evidence: &'a dyn Evidence,
    pub clock: &'a dyn Fn() -> Timestamp,
    pub progress: &'a dyn Progress,
}

/// What the ledger says about one pipeline.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub tip: Option<Oid>,
    pub policy: Policy,
    pub states: BTreeMap<String, State>,
    pub frozen: Frozen,
}

impl Loaded {
    pub fn view(&self) -> View<'_> {
        View { policy: &self.policy, states: &self.states, frozen: &self.frozen }
    }
}

/// What a decision came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    pub plan: Plan,
    /// The commit; `None`: refused, or a dry run.
    pub commit: Option<String>,
    /// Whether something has to serve the release before it counts.
    pub unserved: bool,
    /// Whether the remote does not have it yet.
    pub unpublished: bool,
    /// What happened by itself after it, in order.
    pub followed: Vec<Outcome>,
}

/// How a promotion, a configuration or a rollback is wanted.
#[derive(Debug, Clone, Default)]
pub struct Ask<'r> {
    pub reason: &'r str,
    pub overrides: &'r [String],
    pub lift: bool,
    pub dry_run: bool,
}

/// What `environment apply` did or would do.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Applied {
    pub pipeline: String,
    /// Whether there was no policy before: it is trusted as it is.
    pub first: bool,
    pub differences: Vec<Difference>,
    /// What is worth knowing, one text each.
    pub warnings: Vec<String>,
    pub commit: Option<String>,
}

/// The files of one decision, before they are committed.
struct Draft {
    writes: Vec<(String, Option<Vec<u8>>)>,
    message: String,
    time: Timestamp,
    /// Whether it may be made although the remote cannot be reached.
    offline: bool,
}

impl Desk<'_> {
    /// Brings the ledger up to date with its remote, and publishes what was decided while that could not be reached.
    /// `false`: it cannot be reached now, and `offline` allows that.
    pub fn sync(&self, offline: bool) -> Result<bool> {
        let Some(remote) = self.remote else { return Ok(true) };
        match self.ledger.sync(remote) {
            Ok(Synced::Unpublished { theirs, ours }) => match self.ledger.publish(remote, theirs) {
                Ok(()) => {
                    let url = remote.shown();
                    self.progress.note(format!("published to {url}: decisions up to {ours} that were made without it"));
                    Ok(true)
                }
                Err(error) if offline && !matches!(error, RemoteError::Other(_)) => {
                    self.progress.warn(format!("{error}; decisions up to {ours} are not there yet"));
                    Ok(false)
                }
                Err(error) => Err(error.into_error()),
            },
            Ok(synced) => {
                if let Synced::Forwarded { to, .. } = synced {
                    self.say_to_come(to)?;
                }
                Ok(true)
            }
            Err(error) if offline && away(&error) => {
                self.progress.warn(format!("{error}; going on with what is known here"));
                Ok(false)
            }
            Err(error) => Err(error.into_error()),
        }
    }

    /// Says when the clock of whoever decided last is ahead of this one: soak times and freezes with an end are as right as the
    /// clocks of those who decide.
    fn say_to_come(&self, tip: Oid) -> Result<()> {
        let commit = self.ledger.commit(tip)?;
        let ahead = commit.time.duration_since((self.clock)());
        if ahead > audit::SKEW {
            let (who, what, minutes) = (&commit.author.name, &commit.subject, ahead.as_mins());
            self.progress
                .warn(format!("the decision `{what}` of `{who}` is dated {minutes} minutes from now: compare the clocks"));
        }
        Ok(())
    }

    /// What the ledger here says about `pipeline`.
    ///
    /// # Errors
    /// It has no such pipeline; a file of it cannot be read.
    pub fn load(&self, pipeline: &str) -> Result<Loaded> {
        load(&self.ledger.snapshot()?, pipeline)?.ok_or_else(|| {
            Problem::usage(format!("the ledger has no pipeline `{pipeline}`"))
                .hint("`pipeline environment apply` brings the environments of a pipeline file into it")
                .into()
        })
    }

    /// Whether what this desk commits is signed by the key that `policy` has for its name.
    pub fn signs_as(&self, policy: &Policy) -> bool {
        let known = policy.people.get(&self.name).and_then(|person| person.key.as_deref());
        match (known, self.signer) {
            (Some(line), Some(signer)) => sshsig::public_key(&signer.public_key()).is_ok_and(|key| key.is(line)),
            _ => false,
        }
    }

    /// Makes the environments of a pipeline file the ledger's; `wanted` is what the file says.
    pub fn apply(&self, wanted: &Policy, reason: &str, dry_run: bool) -> Result<Applied> {
        self.sync(false)?;
        let pipeline = wanted.pipeline.clone();
        let mut applied = Applied { pipeline, first: false, differences: Vec::new(), warnings: Vec::new(), commit: None };
        self.again(|| {
            let snapshot = self.ledger.snapshot()?;
            let before = load(&snapshot, &wanted.pipeline)?;
            let time = (self.clock)();
            let decision = Decision { reason: reason.to_owned(), ..Decision::new(Kind::Apply, &self.name, time) };
            let signed = before.as_ref().is_some_and(|before| self.signs_as(&before.policy));
            let empty = Policy { environments: BTreeMap::new(), people: BTreeMap::new(), registry: None, ..wanted.clone() };
            applied.first = before.is_none();
            applied.differences = policy::difference(before.as_ref().map_or(&empty, |before| &before.policy), wanted);
            let after =
                wanted.clone().after(before.as_ref().map(|before| &before.policy), &decision, signed).map_err(Problem::from)?;
            applied.warnings = claims::check(wanted, &others(&snapshot, &wanted.pipeline)?)?;
            if dry_run {
                return Ok(None);
            }
            let mut writes = vec![(policy_path(&wanted.pipeline), Some(after.bytes()))];
            let there = before.map(|before| before.states).unwrap_or_default();
            for name in after.environments.keys().filter(|name| !there.contains_key(*name)) {
                let made = after.decision.clone().unwrap_or_else(|| decision.clone());
                writes.push((state_path(&wanted.pipeline, name), Some(State::created(&after, name, &made).bytes())));
            }
            for name in there.keys().filter(|name| !after.environments.contains_key(*name)) {
                writes.push((state_path(&wanted.pipeline, name), None));
            }
            let message = message::of_policy(&decision, &wanted.pipeline);
            Ok(Some((snapshot.id(), Draft { writes, message, time, offline: false })))
        })
        .map(|done| {
            applied.commit = done.map(|(id, _)| id.to_string());
            applied
        })
    }

    /// Promotes, configures or rolls back one environment, and lets follow what is automatic. [`Desk::sync`] went before.
    ///
    /// # Errors
    /// What no gate can change (see [`promotion::plan`]); a gate that says no is in the outcome.
    pub fn decide(&self, pipeline: &str, environment: &str, action: &Action, ask: &Ask<'_>) -> Result<Outcome> {
        let outcome = self.one(pipeline, environment, action, ask, false)?;
        let Some(mut outcome) = outcome else { bail!("a decision that nobody made") };
        if outcome.commit.is_some() {
            // The decision stands, whatever becomes of what follows.
            outcome.followed = self.follow(pipeline, environment).unwrap_or_else(|error| {
                self.progress.warn(format!("what comes by itself after it was not decided: {error:#}"));
                Vec::new()
            });
        }
        Ok(outcome)
    }

    /// Everything that comes by itself to the environments below `environment` now.
    pub fn follow(&self, pipeline: &str, environment: &str) -> Result<Vec<Outcome>> {
        self.follow_as(pipeline, environment, &Ask::default())
    }

    fn follow_as(&self, pipeline: &str, environment: &str, ask: &Ask<'_>) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        let loaded = self.load(pipeline)?;
        for (name, candidate) in promotion::automatic(loaded.view(), environment) {
            if let Some(mut outcome) = self.one(pipeline, &name, &Action::Promote(candidate), ask, true)? {
                if outcome.commit.is_some() {
                    outcome.followed = self.follow(pipeline, &name)?;
                }
                outcomes.push(outcome);
            }
        }
        Ok(outcomes)
    }

    /// Everything that can come by itself in `pipeline` now: what waited for time to pass, above all. With `dry_run` each
    /// environment once, and not what would follow from it.
    pub fn automatic(&self, pipeline: &str, dry_run: bool) -> Result<Vec<Outcome>> {
        self.sync(false)?;
        let ask = Ask { dry_run, ..Ask::default() };
        let mut outcomes: Vec<Outcome> = Vec::new();
        for environment in self.load(pipeline)?.policy.environments.keys() {
            let found = self.follow_as(pipeline, environment, &ask)?.into_iter();
            // Nothing moved: it is found from above and from itself.
            let is_known = |outcomes: &[Outcome], new: &Outcome| {
                dry_run && outcomes.iter().any(|known| known.plan.environment == new.plan.environment)
            };
            for outcome in found {
                if !is_known(&outcomes, &outcome) {
                    outcomes.push(outcome);
                }
            }
        }
        Ok(outcomes)
    }

    /// `None`: it is automatic, and there is nothing to do.
    fn one(&self, pipeline: &str, environment: &str, action: &Action, ask: &Ask<'_>, automatic: bool) -> Result<Option<Outcome>> {
        let mut outcome = None;
        // What was there when this was decided first: somebody else's decision about it is not replaced unseen.
        let mut seen = None;
        let done = self.again(|| {
            outcome = None;
            let loaded = self.load(pipeline)?;
            if let Some(state) = loaded.states.get(environment) {
                let current = state.current.as_ref().map(Binding::pair);
                if *seen.get_or_insert(current) != current {
                    return if automatic { Ok(None) } else { Err(overtaken(state).into()) };
                }
            }
            let signed = self.signs_as(&loaded.policy);
            let request = Request {
                environment,
                action: action.clone(),
                actor: &self.name,
                signed,
                reason: ask.reason,
                overrides: ask.overrides,
                lift: ask.lift,
                automatic,
                time: (self.clock)(),
            };
            let plan = match promotion::plan(loaded.view(), &request, self.evidence) {
                Ok(plan) => plan,
                Err(_) if automatic => return Ok(None),
                Err(refused) => return Err(Problem::from(refused).into()),
            };
            let has_target = loaded.policy.environments.get(environment).is_some_and(|policy| !policy.targets.is_empty());
            let changes = plan.decision.to.is_some();
            let allowed = plan.allowed;
            if allowed && matches!(action, Action::Promote(_) | Action::Enter(_)) {
                let release = plan.to.as_ref().map(|to| to.release);
                match release.map_or(Ok(()), |release| self.evidence.whole(&release)) {
                    Ok(()) => {}
                    Err(error) if automatic => {
                        self.progress.warn(format!("nothing comes to `{pipeline}/{environment}` by itself: {error:#}"));
                        return Ok(None);
                    }
                    Err(error) => return Err(error),
                }
            }
            let decision = plan.decision.clone();
            outcome =
                Some(Outcome { plan, commit: None, unserved: has_target && changes, unpublished: false, followed: Vec::new() });
            if ask.dry_run || !allowed {
                return Ok(None);
            }
            self.draft(&loaded, environment, &decision, signed).map(Some)
        })?;
        if let (Some((id, published)), Some(outcome)) = (done, &mut outcome) {
            outcome.commit = Some(id.to_string());
            outcome.unpublished = !published;
        }
        Ok(outcome)
    }

    /// A decision without gates about one environment: approve, hold, lift, freeze, thaw, clear, report. `make` fills it in
    /// for the state that is there.
    pub fn note(
        &self,
        pipeline: &str,
        environment: &str,
        make: &dyn Fn(&Loaded, &State, Timestamp) -> Result<Decision, Refused>,
    ) -> Result<(State, String)> {
        self.sync(false)?;
        let mut made = None;
        let done = self.again(|| {
            let loaded = self.load(pipeline)?;
            let state = loaded.view().state(environment).map_err(Problem::from)?;
            let decision = make(&loaded, state, (self.clock)()).map_err(Problem::from)?;
            let signed = self.signs_as(&loaded.policy);
            let (tip, draft) = self.draft(&loaded, environment, &decision, signed)?;
            made = draft.writes.first().and_then(|(_, bytes)| bytes.clone());
            Ok(Some((tip, draft)))
        })?;
        let (id, _) = done.context("a decision that nobody made")?;
        Ok((State::parse(&made.unwrap_or_default())?, id.to_string()))
    }

    /// Freezes every environment of this name, or ends that.
    pub fn freeze_all(&self, environment: &str, kind: Kind, reason: &str, until: Option<Timestamp>) -> Result<String> {
        // An emergency stop is made here at once, too, when the remote is away.
        let offline = kind == Kind::Freeze;
        self.sync(offline)?;
        let mut still = Vec::new();
        let done = self.again(|| {
            let snapshot = self.ledger.snapshot()?;
            let mut policies = Vec::new();
            for pipeline in snapshot.pipelines()? {
                if let Some(loaded) = load(&snapshot, &pipeline)? {
                    policies.push(loaded.policy);
                }
            }
            let with: Vec<(&Policy, bool)> = policies.iter().map(|policy| (policy, self.signs_as(policy))).collect();
            let time = (self.clock)();
            let decision = Decision { reason: reason.to_owned(), until, ..Decision::new(kind, &self.name, time) };
            let after = frozen(&snapshot)?.after(environment, &decision, &with).map_err(Problem::from)?;
            let left = after.environments.get(environment).filter(|_| kind == Kind::Thaw);
            let has = |policy: &&Policy| policy.environments.contains_key(environment);
            still = left.map_or_else(Vec::new, |freeze| {
                let names = policies.iter().filter(has).map(|policy| &policy.pipeline);
                names.filter(|name| !freeze.thawed.contains(*name)).cloned().collect()
            });
            let draft = Draft {
                writes: vec![(FROZEN_FILE.to_owned(), after.bytes())],
                message: message::of_frozen(&decision, environment),
                time: decision.time,
                offline,
            };
            Ok(Some((snapshot.id(), draft)))
        })?;
        let (id, _) = done.context("a decision that nobody made")?;
        if !still.is_empty() {
            let names = still.join("`, `");
            self.progress.warn(format!("`{environment}` of `{names}` stays frozen: their own people have to thaw it"));
        }
        Ok(id.to_string())
    }

    fn draft(&self, loaded: &Loaded, environment: &str, decision: &Decision, signed: bool) -> Result<(Option<Oid>, Draft)> {
        let state = loaded.view().state(environment).map_err(Problem::from)?;
        let path = state_path(&state.pipeline, environment);
        let tip = loaded.tip.context("a ledger with a state has a tip")?;
        let previous = self.ledger.made_at(tip, &path)?.map(|id| id.to_string());
        let inputs = Inputs { view: loaded.view(), signed, previous: previous.as_deref() };
        let after = state.after(decision, inputs).map_err(Problem::from)?;
        let draft = Draft {
            writes: vec![(path, Some(after.bytes()))],
            message: message::of_state(&after),
            time: decision.time,
            offline: decision.kind == Kind::Rollback,
        };
        Ok((loaded.tip, draft))
    }

    /// Drafts a decision and commits it, again as long as somebody else is faster. `None`: there was nothing to commit. The
    /// answer is the commit, and whether the remote, if there is one, has it.
    fn again(&self, mut draft: impl FnMut() -> Result<Option<(Option<Oid>, Draft)>>) -> Result<Option<(Oid, bool)>> {
        let mut winner: Option<Commit> = None;
        for _ in 0..ROUNDS {
            let drafted = draft().map_err(|error| match &winner {
                Some(winner) => after(winner, error),
                None => error,
            });
            let Some((tip, draft)) = drafted? else { return Ok(None) };
            match self.append(tip, draft)? {
                (Appended::Done(id), published) => {
                    // The history stays readable when it cannot be packed; the next decision tries again.
                    if let Err(error) = self.ledger.pack_if_needed() {
                        self.progress.warn(format!("the ledger could not be packed: {error:#}"));
                    }
                    return Ok(Some((id, published)));
                }
                (Appended::Lost(tip), _) => winner = Some(self.ledger.commit(tip)?),
            }
        }
        let by =
            winner.map_or_else(String::new, |commit| format!(", the last time by {} ({})", commit.author.name, commit.subject));
        Err(Problem::transient(format!("somebody else was faster {ROUNDS} times{by}")).hint("run it again").into())
    }

    fn append(&self, tip: Option<Oid>, draft: Draft) -> Result<(Appended, bool)> {
        let author = Author { name: self.name.clone(), email: self.email.clone(), time: draft.time };
        let change = Change { writes: draft.writes, message: draft.message };
        let Some(remote) = self.remote else { return Ok((self.ledger.append(tip, &change, &author, self.signer)?, true)) };
        match self.ledger.append_to(remote, tip, &change, &author, self.signer) {
            Ok(appended) => Ok((appended, true)),
            Err(error) if draft.offline && away(&error) => {
                self.progress.warn(format!("{error}; decided here, and published by the next command that reaches it"));
                Ok((self.ledger.append(tip, &change, &author, self.signer)?, false))
            }
            Err(error) => Err(error.into_error()),
        }
    }
}

/// Whether a remote cannot be used for now, so that what must not wait is decided without it.
fn away(error: &RemoteError) -> bool {
    matches!(
        error,
        RemoteError::Unreachable { .. } | RemoteError::Closed { .. } | RemoteError::Diverged { .. } | RemoteError::Unsound { .. }
    )
}

/// Somebody else changed what runs between a decision and its commit.
fn overtaken(state: &State) -> Problem {
    let Decision { kind, actor, version, .. } = &state.decision;
    let what = version.as_ref().map_or_else(|| kind.to_string(), |version| format!("{kind} {version}"));
    Problem::failed(format!("somebody else was faster: `{actor}` decided `{what}` about `{}`", state.name()))
        .hint("`pipeline status` shows what is there now; run it again when it is still right")
}

/// Says who was faster when a decision that was made again is refused because of it.
fn after(winner: &Commit, error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<Problem>() {
        Ok(problem) => problem.hint(format!("somebody else was faster: {} ({})", winner.author.name, winner.subject)).into(),
        Err(error) => error,
    }
}

/// Path of a pipeline's policy.
pub fn policy_path(pipeline: &str) -> String {
    Place::Policy { pipeline: pipeline.into() }.to_string()
}

/// Path of an environment's state.
pub fn state_path(pipeline: &str, environment: &str) -> String {
    Place::State { pipeline: pipeline.into(), environment: environment.into() }.to_string()
}

/// What a snapshot says about `pipeline`; `None`: it has no such pipeline.
///
/// # Errors
/// A file that cannot be read.
pub fn load(snapshot: &Snapshot, pipeline: &str) -> Result<Option<Loaded>> {
    let path = policy_path(pipeline);
    path.parse::<Place>()?;
    let Some(bytes) = snapshot.read(&path)? else { return Ok(None) };
    let policy = Policy::parse(&bytes)?;
    let mut states = BTreeMap::new();
    for name in policy.environments.keys() {
        if let Some(bytes) = snapshot.read(&state_path(pipeline, name))? {
            let state = State::parse(&bytes).with_context(|| format!("cannot read `{pipeline}/{name}`"))?;
            states.insert(name.clone(), state);
        }
    }
    Ok(Some(Loaded { tip: snapshot.id(), policy, states, frozen: frozen(snapshot)? }))
}

/// The policies of all pipelines but `pipeline`.
fn others(snapshot: &Snapshot, pipeline: &str) -> Result<Vec<Policy>> {
    let mut others = Vec::new();
    for name in snapshot.pipelines()?.into_iter().filter(|name| name != pipeline) {
        if let Some(bytes) = snapshot.read(&policy_path(&name))? {
            others.push(Policy::parse(&bytes)?);
        }
    }
    Ok(others)
}

/// The emergency stops of a snapshot.
pub fn frozen(snapshot: &Snapshot) -> Result<Frozen> {
    snapshot.read(FROZEN_FILE)?.map_or_else(|| Ok(Frozen::default()), |bytes| Frozen::parse(&bytes))
}

/// A release by what somebody wrote: its digest or the start of it, or its version, among those an environment and those
/// above it have or had.
pub fn known_release(loaded: &Loaded, environment: &str, wanted: &str) -> Option<Candidate> {
    let names = loaded.policy.environments.get(environment).map(|policy| policy.from.names().to_vec()).unwrap_or_default();
    let states = names.iter().chain([&environment.to_owned()]).filter_map(|name| loaded.states.get(name)).collect::<Vec<_>>();
    let found = states.iter().flat_map(|state| state.bindings()).find(|known| known.is_called(wanted));
    found.map(|known| Candidate { release: known.release, version: known.version.clone(), author: known.author.clone() })
}

/// How the current release of `state` does.
pub fn health(loaded: &Loaded, state: &State) -> Option<Status> {
    loaded.policy.environments.get(&state.environment).and_then(|policy| promotion::health(policy, state))
}
