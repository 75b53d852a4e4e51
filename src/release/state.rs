//! The state of one environment (`PIPELINE/ENVIRONMENT.json`) and the one function that changes it.
//!
//! [`State::after`] takes a state and a decision and gives the next state, or says why not. What plans a decision and what
//! verifies the ledger both use it, so nothing gets in that could not have been decided: whoever writes a commit by hand has
//! to fulfil the same rules. What can be worked out again from the ledger alone (who may, where the release was, soak,
//! approvals, windows, freezes, holds, bad marks) is; of the other gates the recorded answers are asked for.
//!
//! Rules: a hold stops what is automatic, and a person has to lift it; a freeze stops everything that changes what runs, a
//! rollback too; a rollback sets a hold and marks the release it leaves as bad; an approval counts for exactly one
//! release with one configuration.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::decision::{Answer, Configuration, Decision, Freeze, Frozen, Kind, Refused, Status, Verdict, Why};
use super::gate::{self, Question};
use super::policy::{self, FORMAT, Policy};
use crate::config::types::{Check, Environment, SecretRef, Upstream};
use crate::oci::digest::Digest;

/// Pairs an environment remembers that it had.
pub const BEFORE_MAX: usize = 50;
/// Approvals an environment remembers; those beyond are the oldest, and void.
const APPROVALS_MAX: usize = 200;

/// One environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub format: u32,
    pub pipeline: String,
    pub environment: String,
    /// What it is to run; none before the first release.
    pub current: Option<Binding>,
    /// What it ran before, newest first, at most [`BEFORE_MAX`].
    pub before: Vec<Past>,
    /// What the next pair is configured with, as far as the policy has not changed since; see [`State::configuration`].
    pub config: Configuration,
    /// The configuration of the policy when `config` was made.
    pub declared: Configuration,
    pub hold: Option<Hold>,
    pub freezes: Vec<Freeze>,
    /// Oldest first.
    pub approvals: Vec<Approval>,
    /// Releases that must not come again.
    pub bad: BTreeMap<Digest, Bad>,
    /// Of `current`.
    pub health: Health,
    /// A commit in which the version before this one is found.
    pub previous: Option<String>,
    /// What made this version.
    pub decision: Decision,
}

/// A release with its configuration, as it came into an environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Binding {
    pub release: Digest,
    pub version: String,
    pub config: Configuration,
    pub since: Timestamp,
    /// Whether the clock of that decision was behind that of the one before, so that `since` measures nothing.
    #[serde(default, skip_serializing_if = "no")]
    pub doubtful: bool,
    pub by: String,
    /// Of the release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
}

impl Binding {
    /// Whether somebody means it by `text`: its version, or its release's digest or the start of that.
    pub fn is_called(&self, text: &str) -> bool {
        self.version == text || self.release.is_called(text)
    }

    /// The pair, for comparisons.
    pub fn pair(&self) -> (Digest, Digest) {
        (self.release, self.config.digest())
    }
}

/// A binding that was current.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Past {
    #[serde(flatten)]
    pub binding: Binding,
    /// Whether it was healthy when it was replaced.
    pub healthy: bool,
    pub until: Timestamp,
    /// Seconds it had been healthy without a break when it was replaced.
    pub soaked: u64,
}

/// Automation leaves the environment alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub by: String,
    pub reason: String,
    pub since: Timestamp,
    /// [`Kind::Hold`] or [`Kind::Rollback`].
    pub set_by: Kind,
}

/// Somebody's yes to one pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    pub release: Digest,
    /// Digest of the configuration.
    pub config: Digest,
    pub by: String,
    #[serde(default, skip_serializing_if = "no")]
    pub signed: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    pub time: Timestamp,
}

/// Why a release must not come again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bad {
    pub version: String,
    pub by: String,
    pub reason: String,
    pub since: Timestamp,
}

/// How the current release does, and since when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    pub status: Status,
    pub since: Timestamp,
    /// As [`Binding::doubtful`].
    #[serde(default, skip_serializing_if = "no")]
    pub doubtful: bool,
}

fn no(value: &bool) -> bool {
    !value
}

/// What the ledger says about a pipeline.
#[derive(Debug, Clone, Copy)]
pub struct View<'l> {
    pub policy: &'l Policy,
    /// By environment; at least the one in question and those it promotes from.
    pub states: &'l BTreeMap<String, State>,
    pub frozen: &'l Frozen,
}

impl<'l> View<'l> {
    /// The state of `environment`.
    ///
    /// # Errors
    /// There is no such environment.
    pub fn state(&self, environment: &str) -> Result<&'l State, Refused> {
        self.policy.environment(environment)?;
        self.states.get(environment).ok_or_else(|| {
            Refused::new(Why::NoEnvironment, format!("the ledger has no state of `{}/{environment}`", self.policy.pipeline))
        })
    }
}

/// What a decision is made upon, beside the state itself.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'l> {
    /// The ledger as it is before the decision.
    pub view: View<'l>,
    /// Whether the commit is (or will be) signed by the key the policy has for the actor.
    pub signed: bool,
    /// A commit in which this state is found: the parent of the new one.
    pub previous: Option<&'l str>,
}

impl State {
    /// The state of an environment that `decision` ([`Kind::Apply`]) adds.
    pub fn created(policy: &Policy, name: &str, decision: &Decision) -> Self {
        let declared = policy.environments.get(name).map(declared).unwrap_or_default();
        Self {
            format: FORMAT,
            pipeline: policy.pipeline.clone(),
            environment: name.to_owned(),
            current: None,
            before: Vec::new(),
            config: declared.clone(),
            declared,
            hold: None,
            freezes: Vec::new(),
            approvals: Vec::new(),
            bad: BTreeMap::new(),
            health: Health { status: Status::Unknown, since: decision.time, doubtful: false },
            previous: None,
            decision: decision.clone(),
        }
    }

    /// Reads `PIPELINE/ENVIRONMENT.json`.
    ///
    /// # Errors
    /// Not JSON of this shape, or written by a newer pipeline.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        policy::parse(bytes, "state")
    }

    /// The bytes of `PIPELINE/ENVIRONMENT.json`: the same value gives the same bytes.
    pub fn bytes(&self) -> Vec<u8> {
        policy::bytes(self)
    }

    /// `shop/prod`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.pipeline, self.environment)
    }

    /// The configuration the next pair gets. What was said last counts: a value that the policy changed since the last
    /// decision here is the policy's, all others are as `config set`, `secret set` or a rollback left them.
    pub fn configuration(&self, environment: &Environment) -> Configuration {
        let now = declared(environment);
        let mut secrets = newer(&self.declared.secrets, &now.secrets, &self.config.secrets);
        for (name, reference) in &mut secrets {
            // A stored secret keeps its value when the policy says again that it is stored.
            if let (SecretRef::Stored(id), Some(ours @ SecretRef::Stored(_))) = (&*reference, self.config.secrets.get(name))
                && id.is_empty()
            {
                *reference = ours.clone();
            }
        }
        Configuration { values: newer(&self.declared.values, &now.values, &self.config.values), secrets }
    }

    /// The freeze that holds at `time`: the environment's own, or an emergency stop over all pipelines.
    pub fn frozen<'s>(&'s self, frozen: &'s Frozen, time: Timestamp) -> Option<&'s Freeze> {
        let all = frozen.environments.get(&self.environment).filter(|freeze| !freeze.thawed.contains(&self.pipeline));
        let active = self.freezes.iter().chain(all).filter(|freeze| freeze.is_active(time));
        active.max_by_key(|freeze| freeze.until.unwrap_or(Timestamp::MAX))
    }

    /// Seconds `release` has been here, current and healthy, without a break: the longest time of those remembered.
    /// `None`: the clock cannot tell.
    pub fn soaked(&self, release: &Digest, time: Timestamp) -> Option<u64> {
        let past =
            self.before.iter().filter(|past| past.binding.release == *release && past.healthy).map(|past| past.soaked).max();
        let current = self.current.as_ref().filter(|binding| binding.release == *release);
        let Some(binding) = current.filter(|_| self.health.status == Status::Healthy) else { return Some(past.unwrap_or(0)) };
        // A clock that is behind anything this environment has seen measures nothing.
        if binding.doubtful || self.health.doubtful || time < self.decision.time {
            return None;
        }
        let since = binding.since.max(self.health.since);
        let seconds = u64::try_from(time.as_second() - since.as_second()).ok()?;
        Some(seconds.max(past.unwrap_or(0)))
    }

    /// Whether `release` is here, or was here and healthy.
    pub fn had(&self, release: &Digest) -> bool {
        self.current.as_ref().is_some_and(|binding| binding.release == *release)
            || self.before.iter().any(|past| past.healthy && past.binding.release == *release)
    }

    /// What is and was here, newest first.
    pub fn bindings(&self) -> impl Iterator<Item = &Binding> {
        self.current.iter().chain(self.before.iter().map(|past| &past.binding))
    }

    /// The releases `prune` must leave: the current one, the last `keep` different ones, what a rollback would take, and those
    /// with approvals.
    pub fn needed(&self, keep: u32) -> BTreeSet<Digest> {
        let mut needed: BTreeSet<Digest> = self.current.iter().map(|binding| binding.release).collect();
        let mut newest: Vec<Digest> = Vec::new();
        for past in &self.before {
            if newest.len() < keep as usize && !newest.contains(&past.binding.release) {
                newest.push(past.binding.release);
            }
        }
        needed.extend(newest);
        needed.extend(self.rollback().map(|past| past.binding.release));
        needed.extend(self.approvals.iter().map(|approval| approval.release));
        needed
    }

    /// What a rollback goes back to: the newest pair that was healthy here, is not marked bad and is another one.
    pub fn rollback(&self) -> Option<&Past> {
        let current = self.current.as_ref().map(Binding::pair);
        self.before
            .iter()
            .find(|past| past.healthy && !self.bad.contains_key(&past.binding.release) && Some(past.binding.pair()) != current)
    }

    /// The state after `decision`.
    ///
    /// # Errors
    /// Why it cannot be made here and now, by this actor.
    pub fn after(&self, decision: &Decision, inputs: Inputs<'_>) -> Result<State, Refused> {
        let policy = inputs.view.policy;
        let environment = policy.environment(&self.environment)?;
        policy.authorize(decision, inputs.signed)?;
        let change = Change { before: self, environment, decision, view: inputs.view };
        let mut after = self.clone();
        match decision.kind {
            Kind::Enter | Kind::Promote => change.promote(&mut after)?,
            Kind::Rollback => change.rollback(&mut after)?,
            Kind::Configure => change.configure(&mut after)?,
            Kind::Approve => change.approve(&mut after, inputs.signed)?,
            Kind::Hold => after.hold = Some(change.hold(decision.reason.clone())),
            Kind::Lift => change.lift(&mut after)?,
            Kind::Freeze => {
                // Only those who may freeze may forget one, whatever the clocks of others say.
                after.freezes.retain(|freeze| freeze.is_active(decision.time));
                after.freezes.push(Freeze::of(decision)?);
            }
            Kind::Thaw => change.thaw(&mut after)?,
            Kind::Clear => change.clear(&mut after)?,
            Kind::Report => change.report(&mut after)?,
            Kind::Apply => return Err(Refused::new(Why::Stale, "a policy is not applied to one environment".into())),
        }
        after.format = FORMAT;
        after.previous = inputs.previous.map(str::to_owned);
        after.decision = Decision { signed: inputs.signed && !policy.people.is_empty(), ..decision.clone() };
        Ok(after)
    }
}

/// The configuration the policy says.
pub(super) fn declared(environment: &Environment) -> Configuration {
    Configuration { values: environment.config.clone(), secrets: environment.secrets.clone() }
}

/// Three-way: where `theirs` differs from `base` it is the newer word, else `ours` is.
fn newer<V: Clone + PartialEq>(
    base: &BTreeMap<String, V>,
    theirs: &BTreeMap<String, V>,
    ours: &BTreeMap<String, V>,
) -> BTreeMap<String, V> {
    let keys: BTreeSet<&String> = base.keys().chain(theirs.keys()).chain(ours.keys()).collect();
    let last = |key: &String| if theirs.get(key) == base.get(key) { ours.get(key) } else { theirs.get(key) };
    keys.into_iter().filter_map(|key| Some((key.clone(), last(key)?.clone()))).collect()
}

/// Whether `release` may come to an environment: it is, or was and healthy, in what that promotes from, and not bad there.
pub(super) fn came_through(view: &View<'_>, environment: &Environment, name: &str, release: &Digest) -> Result<(), Refused> {
    let pipeline = &view.policy.pipeline;
    let has = |upstream: &&String| view.states.get(*upstream).is_some_and(|state| state.had(release));
    let bad = |upstream: &&String| view.states.get(*upstream).is_some_and(|state| state.bad.contains_key(release));
    let names = environment.from.names();
    let good: Vec<&String> = names.iter().filter(has).filter(|upstream| !bad(upstream)).collect();
    let missing: Vec<&String> = names.iter().filter(|upstream| !good.contains(upstream)).collect();
    let through = match environment.from {
        Upstream::None => true,
        Upstream::Any(_) => !good.is_empty(),
        Upstream::All(_) => missing.is_empty(),
    };
    if through {
        return Ok(());
    }
    if let Some(upstream) = missing.iter().copied().find(bad) {
        let message = format!("release `{}` is marked bad in `{pipeline}/{upstream}`", release.short());
        return Err(Refused::new(Why::NotUpstream, message).hint("promote another one, or clear the mark there first"));
    }
    let shown: Vec<String> = missing.iter().map(|upstream| format!("`{pipeline}/{upstream}`")).collect();
    let joint = if matches!(environment.from, Upstream::All(_)) { " and " } else { " or " };
    let message = format!("release `{}` is not and was not healthy in {}", release.short(), shown.join(joint));
    Err(Refused::new(Why::NotUpstream, message)
        .hint(format!("`{pipeline}/{name}` takes releases from there: promote it there first")))
}

/// Who made `release`, as the environments it came through have it; `None`: none of them knows the release.
pub(super) fn author(view: &View<'_>, environment: &Environment, release: &Digest) -> Option<Option<String>> {
    let states = environment.from.names().iter().filter_map(|name| view.states.get(name));
    states.flat_map(State::bindings).find(|binding| binding.release == *release).map(|binding| binding.author.clone())
}

/// One decision on its way into a state.
struct Change<'d> {
    before: &'d State,
    environment: &'d Environment,
    decision: &'d Decision,
    view: View<'d>,
}

impl Change<'_> {
    fn stale<T>(&self, message: impl Into<String>) -> Result<T, Refused> {
        Err(Refused::new(Why::Stale, message.into()).hint("somebody decided in between: look at `pipeline status` and try again"))
    }

    /// Whether the clock is behind the decision before.
    fn doubtful(&self) -> bool {
        self.decision.time < self.before.decision.time
    }

    fn to(&self) -> Result<Digest, Refused> {
        self.decision.to.map_or_else(|| self.stale(format!("`{}` names no release", self.decision.kind)), Ok)
    }

    fn promote(&self, after: &mut State) -> Result<(), Refused> {
        let (before, decision) = (self.before, self.decision);
        let release = self.to()?;
        let config = before.configuration(self.environment);
        if decision.kind == Kind::Enter && self.environment.from != Upstream::None {
            let message = format!("`{}` takes releases from `{}`", before.name(), self.environment.from.names().join("`, `"));
            return Err(Refused::new(Why::NotUpstream, message));
        }
        came_through(&self.view, self.environment, &before.environment, &release)?;
        if let Some(author) = author(&self.view, self.environment, &release).filter(|author| *author != decision.author) {
            let author = author.unwrap_or_else(|| "nobody".into());
            return self.stale(format!("the ledger says that `{author}` made release `{}`", release.short()));
        }
        self.fits(&release, &config)?;
        if let Some(hold) = before.hold.as_ref().filter(|_| !decision.lift || decision.automatic) {
            return Err(held(before, hold, decision.automatic));
        }
        self.passes(&release, &config, decision.author.as_deref(), |_| true)?;
        after.hold = None;
        self.bind(after, release, decision.version.clone().unwrap_or_else(|| release.short()), config, decision.author.clone());
        Ok(())
    }

    /// The pair is another one, not marked bad, as the actor was shown it, and complete.
    fn fits(&self, release: &Digest, config: &Configuration) -> Result<(), Refused> {
        let (before, decision) = (self.before, self.decision);
        if let Some(bad) = before.bad.get(release) {
            return Err(is_bad(before, release, bad));
        }
        if decision.from != before.current.as_ref().map(|binding| binding.release) {
            return self.stale(format!("`{}` has another release than the decision was made for", before.name()));
        }
        if decision.config != Some(config.digest()) {
            return self.stale(format!("`{}` has another configuration than the decision was made for", before.name()));
        }
        if before.current.as_ref().is_some_and(|binding| binding.pair() == (*release, config.digest())) {
            let message = format!("release `{}` is in `{}` already", release.short(), before.name());
            return Err(Refused::new(Why::AlreadyThere, message));
        }
        match config.unset().as_slice() {
            [] => Ok(()),
            [name, ..] => Err(Refused::new(Why::Secret, format!("the secret `{name}` of `{}` is not set", before.name()))
                .hint(format!("`pipeline secret set {} {name}` takes it from its input", before.name()))),
        }
    }

    /// No freeze, and every gate that `asked` says yes or was passed over: the recorded answers, and, where the ledger alone
    /// gives the answer, that one too.
    fn passes(
        &self,
        release: &Digest,
        config: &Configuration,
        author: Option<&str>,
        asked: impl Fn(&Check) -> bool,
    ) -> Result<(), Refused> {
        let (before, decision) = (self.before, self.decision);
        self.not_frozen()?;
        let question = Question {
            view: self.view,
            environment: &before.environment,
            release: *release,
            version: decision.version.as_deref().unwrap_or_default(),
            author,
            config: config.digest(),
            actor: &decision.actor,
            reason: &decision.reason,
            time: decision.time,
        };
        for gate in self.environment.gates.iter().filter(|gate| asked(&gate.check)) {
            let Some(answer) = decision.gates.iter().find(|answer| answer.gate == gate.name) else {
                let message = format!("the gate `{}` of `{}` was not asked", gate.name, before.name());
                return Err(Refused::new(Why::Gate, message));
            };
            if self.passed_over(answer) {
                continue;
            }
            let known = gate::known(gate, &question);
            let counts = known.as_ref().unwrap_or(answer);
            if counts.verdict != Verdict::Allow || answer.verdict != Verdict::Allow {
                let message =
                    format!("the gate `{}` of `{}` says {}: {}", gate.name, before.name(), counts.verdict, counts.reason);
                return Err(Refused::new(Why::Gate, message));
            }
        }
        Ok(())
    }

    fn not_frozen(&self) -> Result<(), Refused> {
        let (before, decision) = (self.before, self.decision);
        let Some(freeze) = before.frozen(self.view.frozen, decision.time) else { return Ok(()) };
        if decision.gates.iter().any(|answer| answer.gate == gate::FREEZE && self.passed_over(answer)) {
            return Ok(());
        }
        let hint = "wait, `pipeline thaw` it, or go past it with `--override freeze --reason …`";
        Err(Refused::new(Why::Frozen, format!("`{}` is frozen: {}", before.name(), gate::freeze_reason(freeze))).hint(hint))
    }

    /// [`Policy::authorize`] has seen to the role and the reason.
    fn passed_over(&self, answer: &Answer) -> bool {
        answer.verdict == Verdict::Overridden && !self.decision.automatic && self.decision.overrides.contains(&answer.gate)
    }

    /// Makes the pair the current one.
    fn bind(&self, after: &mut State, release: Digest, version: String, config: Configuration, author: Option<String>) {
        let (before, decision) = (self.before, self.decision);
        if let Some(binding) = after.current.take() {
            let healthy = before.health.status == Status::Healthy;
            let soaked = if healthy { before.soaked(&binding.release, decision.time).unwrap_or(0) } else { 0 };
            after.before.insert(0, Past { binding, healthy, until: decision.time, soaked });
            after.before.truncate(BEFORE_MAX);
        }
        after.approvals.retain(|approval| (approval.release, approval.config) != (release, config.digest()));
        after.config = config.clone();
        after.declared = declared(self.environment);
        let status = if self.environment.targets.is_empty() { Status::Healthy } else { Status::Unknown };
        after.health = Health { status, since: decision.time, doubtful: self.doubtful() };
        let (since, doubtful, by) = (decision.time, self.doubtful(), decision.actor.clone());
        after.current = Some(Binding { release, version, config, since, doubtful, by, author });
    }

    fn rollback(&self, after: &mut State) -> Result<(), Refused> {
        let (before, decision) = (self.before, self.decision);
        let release = self.to()?;
        let Some(current) = &before.current else {
            return Err(Refused::new(Why::NoRollback, format!("`{}` has no release to go back from", before.name())));
        };
        let wanted = |past: &&Past| past.binding.release == release && Some(past.binding.config.digest()) == decision.config;
        let Some(past) = before.before.iter().find(wanted) else {
            let message = format!("release `{}` with that configuration was not in `{}`", release.short(), before.name());
            return Err(Refused::new(Why::NoRollback, message).hint("`pipeline history` shows what was there"));
        };
        if let Some(bad) = before.bad.get(&release) {
            return Err(is_bad(before, &release, bad));
        }
        if current.pair() == past.binding.pair() {
            return Err(Refused::new(
                Why::AlreadyThere,
                format!("release `{}` is in `{}` already", release.short(), before.name()),
            ));
        }
        if decision.from != Some(current.release) {
            return self.stale(format!("`{}` has another release than the decision was made for", before.name()));
        }
        self.not_frozen()?;
        if current.release != release {
            let reason = decision.reason.clone();
            let (version, by, since) = (current.version.clone(), decision.actor.clone(), decision.time);
            after.bad.insert(current.release, Bad { version, by, reason, since });
        }
        let Binding { version, config, author, .. } = past.binding.clone();
        self.bind(after, release, version, config, author);
        let reason =
            if decision.reason.is_empty() { format!("rolled back from {}", current.version) } else { decision.reason.clone() };
        after.hold = Some(self.hold(reason));
        Ok(())
    }

    fn hold(&self, reason: String) -> Hold {
        Hold { by: self.decision.actor.clone(), reason, since: self.decision.time, set_by: self.decision.kind }
    }

    /// A new configuration: it takes effect at once where the gates that are about the moment and the pair let it, and waits for
    /// a promotion of the current release where they do not.
    fn configure(&self, after: &mut State) -> Result<(), Refused> {
        let (before, decision) = (self.before, self.decision);
        let Some(config) = decision.configuration.clone() else { return self.stale("`configure` names no configuration") };
        if decision.config != Some(config.digest()) {
            return self.stale("`configure` names another configuration than it holds");
        }
        if config == before.configuration(self.environment) && decision.to.is_none() {
            return Err(Refused::new(Why::Nothing, format!("`{}` is configured like that already", before.name())));
        }
        match (&before.current, decision.to) {
            (_, None) => {
                self.not_frozen()?;
                after.config = config;
                after.declared = declared(self.environment);
            }
            (Some(current), Some(release)) if current.release == release => {
                self.fits(&release, &config)?;
                self.passes(&release, &config, current.author.as_deref(), gate::is_about_the_pair)?;
                self.bind(after, release, current.version.clone(), config, current.author.clone());
            }
            _ => return self.stale(format!("`{}` has another release than the decision was made for", before.name())),
        }
        Ok(())
    }

    fn approve(&self, after: &mut State, signed: bool) -> Result<(), Refused> {
        let (before, decision) = (self.before, self.decision);
        let release = self.to()?;
        let Some(config) = decision.config else { return self.stale("`approve` names no configuration") };
        let roles: Vec<&str> = self.environment.gates.iter().filter_map(|gate| policy::approver(&gate.check)).collect();
        if roles.is_empty() {
            let message = format!("no gate of `{}` asks for approvals", before.name());
            return Err(Refused::new(Why::Nothing, message).hint("`pipeline environment show` lists the gates"));
        }
        let person = self.view.policy.people.get(&decision.actor);
        if person.is_some_and(|person| !roles.iter().any(|role| person.roles.contains(*role))) {
            let message = format!(
                "`{}` does not have the role `{}`, so the approval would not count",
                decision.actor,
                roles.join("` or `")
            );
            return Err(Refused::new(Why::NoRole, message));
        }
        if let Some(bad) = before.bad.get(&release) {
            return Err(is_bad(before, &release, bad));
        }
        if config != before.configuration(self.environment).digest() {
            return self.stale(format!("`{}` would be configured otherwise than in what is approved", before.name()));
        }
        let same =
            |approval: &&Approval| (approval.release, approval.config) == (release, config) && approval.by == decision.actor;
        if before.approvals.iter().any(|approval| same(&approval)) {
            let message =
                format!("`{}` has approved release `{}` for `{}` already", decision.actor, release.short(), before.name());
            return Err(Refused::new(Why::Nothing, message));
        }
        let (by, reason, time) = (decision.actor.clone(), decision.reason.clone(), decision.time);
        let signed = signed && !self.view.policy.people.is_empty();
        after.approvals.push(Approval { release, config, by, signed, reason, time });
        let surplus = after.approvals.len().saturating_sub(APPROVALS_MAX);
        after.approvals.drain(..surplus);
        Ok(())
    }

    fn lift(&self, after: &mut State) -> Result<(), Refused> {
        match after.hold.take() {
            Some(_) => Ok(()),
            None => Err(Refused::new(Why::Nothing, format!("there is no hold on `{}`", self.before.name()))),
        }
    }

    fn thaw(&self, after: &mut State) -> Result<(), Refused> {
        after.freezes.retain(|freeze| freeze.is_active(self.decision.time));
        if after.freezes.is_empty() {
            let refused = Refused::new(Why::Nothing, format!("`{}` is not frozen", self.before.name()));
            return Err(match self.before.frozen(self.view.frozen, self.decision.time) {
                Some(_) => refused.hint(format!("all pipelines are: `pipeline thaw --all {}`", self.before.environment)),
                None => refused,
            });
        }
        after.freezes.clear();
        Ok(())
    }

    fn clear(&self, after: &mut State) -> Result<(), Refused> {
        let release = self.to()?;
        match after.bad.remove(&release) {
            Some(_) => Ok(()),
            None => {
                let message = format!("release `{}` is not marked bad in `{}`", release.short(), self.before.name());
                Err(Refused::new(Why::Nothing, message))
            }
        }
    }

    fn report(&self, after: &mut State) -> Result<(), Refused> {
        let (before, decision) = (self.before, self.decision);
        let Some(status) = decision.health else { return self.stale("`report` says nothing about health") };
        if self.environment.targets.is_empty() {
            return Err(Refused::new(
                Why::Nothing,
                format!("nothing runs in `{}`, so its health does not change", before.name()),
            ));
        }
        let current = before.current.as_ref().map(Binding::pair);
        if current != decision.to.zip(decision.config) {
            return self.stale(format!("the report is about another release than the one in `{}`", before.name()));
        }
        if status != before.health.status {
            after.health = Health { status, since: decision.time, doubtful: self.doubtful() };
        }
        Ok(())
    }
}

/// What stands in the way of a release that was rolled back from.
pub(super) fn is_bad(state: &State, release: &Digest, bad: &Bad) -> Refused {
    let why = if bad.reason.is_empty() { String::new() } else { format!(": {}", bad.reason) };
    let message = format!(
        "release `{}` ({}) is marked bad in `{}` by {} since {}{why}",
        release.short(),
        bad.version,
        state.name(),
        bad.by,
        bad.since
    );
    Refused::new(Why::Bad, message).hint("clear the mark when it is good after all: it is not offered before that")
}

/// What stands in the way where there is a hold.
pub(super) fn held(state: &State, hold: &Hold, automatic: bool) -> Refused {
    let message = format!("there is a hold on `{}`: {}", state.name(), gate::hold_reason(hold));
    let hint = if automatic {
        "a person can promote with `--lift`"
    } else {
        "`--lift` promotes and lifts it; `pipeline hold --lift` only lifts it"
    };
    Refused::new(Why::Held, message).hint(hint)
}

#[cfg(test)]
mod tests;
