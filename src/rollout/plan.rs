//! What follows in one environment: a state machine over values, without any I/O.
//!
//! Goes in: the [`Environment`] as it was saved last, what the ledger wants ([`Wanted`]), what there is ([`Seen`]) and the
//! time. Comes out: the environment as it is from now on, which is saved first, and then the [`Action`]s that follow from it
//! ([`actions`]). Actions are worked out from the state and from what is seen alone, so that whoever was killed between any
//! two lines finds the same ones again, and without news there are none.
//!
//! ```text
//! waiting → starting → pre-switch → switching → post-switch → watching → done
//!               └──────────┴─────────────┴───────────┴────────────┴→ rolling-back → failed, verdict
//! ```
//!
//! Rules: at most one generation is live, and it is not stopped while it is; it gets live when all of its instances are
//! healthy, or `forced` says why not; a generation with an exclusive volume starts when nothing of the other is left; what is
//! neither live, nor warm, nor part of the rollout is stopped once it has drained.
//!
//! Deadlines are measured by a clock of the daemon's own ([`Now::steady`]), which does not jump and stands while the daemon
//! is down; the times of the wall are only shown.

mod actions;
mod back;
mod phases;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use self::actions::{Action, Serving, actions, serving};
use super::generation::{Generation, Program};
use super::target::{GRACE, GRACE_MACHINE, Running};
use super::view::{Color, Outcome, Phase, Result as Ending, Step};
use crate::config::types::{OnFailure, RolloutSettings, Target};
use crate::oci::digest::Digest;
use crate::release::decision::Status;

/// Steps kept of a rollout, the newest.
const STEPS_MAX: usize = 60;
/// Transitions that follow from one look, at most; more would be a circle.
const TRANSITIONS_MAX: usize = 24;
/// How long a change of health has to last before it is told, in milliseconds: a probe that was lost is no illness.
pub const DEBOUNCE: u64 = 5_000;

/// The time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Shown and written down; may jump.
    pub wall: Timestamp,
    /// Milliseconds of the daemon's life, over all its restarts; never goes back.
    pub steady: u64,
}

/// An environment, as it is saved.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Environment {
    /// The generation that gets the requests.
    pub live: Option<String>,
    /// Why it is live although not all of its instances were healthy.
    pub forced: Option<String>,
    /// Everything that was started and is not gone yet, and what the last rollout was about.
    pub generations: BTreeMap<String, Known>,
    pub warm: Option<Warm>,
    /// The one that goes on, or the last one.
    pub rollout: Option<Rollout>,
    /// The generation that failed; it is not started again as long as the ledger wants it.
    pub given_up: Option<String>,
    /// What the ledger is still to be told.
    pub verdict: Option<Verdict>,
    pub paused: Option<Pause>,
    /// Somebody wants the rollout to end.
    pub abort: Option<Pause>,
    pub maintenance: Option<String>,
    /// Of the live generation, with the steady time of its last change.
    pub health: Option<(bool, u64)>,
    /// Milliseconds from the start of the last generation until it was healthy.
    pub last_start: Option<u64>,
}

/// A generation that was started here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Known {
    pub generation: Generation,
    pub color: Color,
    /// When its rollout began, or it got live.
    pub since: Timestamp,
}

/// What was live before, ready to be it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warm {
    pub generation: String,
    /// Steady.
    pub until: u64,
}

/// Who holds a rollout, or ends it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    pub by: String,
    pub reason: String,
}

/// One rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// Green.
    pub generation: String,
    pub version: String,
    pub release: Digest,
    /// Digest of the configuration.
    pub config: Digest,
    /// Blue: what was live when it began.
    pub from: Option<String>,
    /// Somebody went back: what is warm switches without checks.
    #[serde(default)]
    pub is_rollback: bool,
    /// Blue has to be gone before green starts.
    #[serde(default)]
    pub exclusive: bool,
    pub phase: Phase,
    pub since: Timestamp,
    /// Steady time of its beginning.
    pub began: u64,
    /// Steady time at which the phase began.
    pub entered: u64,
    /// Steady time of its end.
    #[serde(default)]
    pub ended: Option<u64>,
    /// How often green fell ill again before the switch.
    #[serde(default)]
    pub relapses: u32,
    /// Names the switch in which it, and what belongs together with it, got live: the steady time.
    #[serde(default)]
    pub switched: Option<u64>,
    /// Blue's figures at the switch.
    #[serde(default)]
    pub baseline: Option<Figures>,
    /// Nothing more to watch; others of the group may still be watched.
    #[serde(default)]
    pub watched: bool,
    #[serde(default)]
    pub failure: Option<Failure>,
    pub steps: Vec<Step>,
    #[serde(default)]
    pub outcome: Option<Outcome>,
}

/// Why a rollout goes back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    pub result: Ending,
    pub reason: String,
    /// Whose last lines are wanted.
    pub instance: Option<String>,
    pub log: Vec<String>,
    /// The lines are here, or nobody waits for them any more.
    pub logged: bool,
}

/// What the ledger is to be told about a rollout that failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// Names it: the steady time of the failure.
    pub at: u64,
    /// The generation that failed.
    pub failed: String,
    /// Its pair: when the ledger wants another one meanwhile, there is nothing to say any more.
    pub release: Digest,
    pub config: Digest,
    pub kind: VerdictKind,
    pub reason: String,
    pub log: Vec<String>,
}

/// See [`Verdict`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerdictKind {
    /// This pair runs: release and digest of the configuration.
    Rollback(Digest, Digest),
    /// There is nothing to go back to.
    Hold,
    Freeze,
}

/// What the ledger wants of an environment.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// `None`: no release yet, or nothing to run it on.
    pub generation: Option<Generation>,
    /// The decision was a rollback.
    pub is_rollback: bool,
    /// What the ledger knows of the health of the current pair.
    pub health: Status,
    pub settings: RolloutSettings,
    /// Others that switch together with it.
    pub together: Option<String>,
}

/// What there is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Seen {
    /// By id; also what is just being started.
    pub instances: BTreeMap<String, Instance>,
    /// Targets (names in the environment) that cannot be asked now: what is missing there may be there.
    pub blind: BTreeSet<String>,
    /// Generations whose requests are not all answered yet.
    pub draining: BTreeSet<String>,
    /// What the switch has as live.
    pub serving: Option<String>,
    /// Why the switch did not take the last table.
    pub switch_error: Option<String>,
    /// By generation, since it got live.
    pub figures: BTreeMap<String, Figures>,
    /// The checks that were run: generation, whether after the switch, and what came of them.
    pub checked: BTreeMap<(String, bool), Result<String, String>>,
    /// By generation: what it is made of, or why that is not known and whether trying again may help.
    pub prepared: BTreeMap<String, Result<BTreeMap<String, Program>, Unprepared>>,
    /// By instance: why it could not be started the last time, and how often that was tried.
    pub start_errors: BTreeMap<String, (String, u32)>,
    /// By instance: its last lines.
    pub logs: BTreeMap<String, Vec<String>>,
    /// The ledger has been told the verdict of this time ([`Verdict::at`]), or is not to be told any more.
    pub told: Option<u64>,
    /// Generations of which nothing is left.
    pub forgotten: BTreeSet<String>,
    pub peers: Peers,
    /// Nothing new may begin, because the state cannot be saved or is not to be trusted.
    pub read_only: Option<String>,
}

/// An instance, as the target and the probes see it.
#[derive(Debug, Clone, PartialEq)]
pub struct Instance {
    pub generation: String,
    pub target: String,
    pub status: Running,
    pub restarts: u32,
    pub healthy: bool,
    /// Steady time since when it is not healthy.
    pub ill_since: Option<u64>,
    /// What the last probe said.
    pub last: Option<String>,
    /// Bytes.
    pub memory: Option<u64>,
}

/// Why a generation is not known to be startable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unprepared {
    pub reason: String,
    pub is_final: bool,
}

/// What the switch counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    pub requests: u64,
    /// Answers of 500 and above, and requests that failed.
    pub errors: u64,
    /// Milliseconds.
    pub p99: Option<f64>,
}

impl Figures {
    /// Share of requests that failed, 0 to 1.
    pub fn share(&self) -> f64 {
        if self.requests == 0 { 0.0 } else { self.errors as f64 / self.requests as f64 }
    }
}

/// Those that switch together with an environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peers {
    /// All of them can switch now, or have nothing to.
    pub ready: bool,
    /// One of them failed: its name and why.
    pub failed: Option<String>,
    /// All that switched with it have been watched to the end.
    pub watched: bool,
}

impl Default for Peers {
    fn default() -> Self {
        Self { ready: true, failed: None, watched: true }
    }
}

/// One look at an environment.
#[derive(Debug, Clone, Copy)]
pub struct Look<'a> {
    /// `shop/prod`.
    pub name: &'a str,
    /// `None`: the ledger does not know it any more.
    pub wanted: Option<&'a Wanted>,
    pub seen: &'a Seen,
    pub now: Now,
}

/// Milliseconds that green may take to be healthy. A longer deadline of the image's own counts; where blue gives its volumes
/// to green, the time it may take to end comes on top.
pub fn start_limit(settings: &RolloutSettings, green: Option<&Generation>, exclusive: bool) -> u64 {
    let own = green.map_or(0, Generation::deadline);
    let is_machine = |green: &Generation| green.targets.values().any(|target| matches!(target, Target::Vm(_)));
    let usual = if green.is_some_and(is_machine) { GRACE_MACHINE } else { GRACE };
    let grace = settings.grace.map_or(usual, |grace| grace.duration());
    let before = if exclusive { u64::try_from(grace.as_millis()).unwrap_or(u64::MAX) } else { 0 };
    settings.deadline.0.saturating_mul(1000).max(own).saturating_add(before)
}

/// The environment as it is from now on; what it was when nothing changes.
pub fn next(before: &Environment, look: Look<'_>) -> Environment {
    let mut after = before.clone();
    for _ in 0..TRANSITIONS_MAX {
        if !after.step(look) {
            break;
        }
    }
    after
}

impl<'a> Look<'a> {
    fn target(&self) -> Option<&'a Generation> {
        self.wanted.and_then(|wanted| wanted.generation.as_ref())
    }

    fn settings(&self) -> RolloutSettings {
        self.wanted.map(|wanted| wanted.settings.clone()).unwrap_or_default()
    }

    /// Instances of `generation` that are healthy, and how many it should have.
    pub fn healthy(&self, generation: &Generation) -> (usize, usize) {
        let places = generation.places(self.name);
        let is_healthy = |id: &str| self.seen.instances.get(id).is_some_and(|instance| instance.healthy);
        (places.iter().filter(|place| is_healthy(&place.id)).count(), places.len())
    }

    fn all_healthy(&self, generation: &Generation) -> bool {
        let (healthy, wanted) = self.healthy(generation);
        healthy == wanted
    }

    /// Whether anything of `generation` is there.
    fn is_there(&self, generation: &str) -> bool {
        self.seen.instances.values().any(|instance| instance.generation == generation)
    }
}

impl Environment {
    /// One transition; `false`: there is none.
    fn step(&mut self, look: Look<'_>) -> bool {
        self.settle(look)
            || self.wind_down(look)
            || self.prepare(look)
            || self.rollout_step(look)
            || self.begin(look)
            || self.cool(look)
            || self.forget(look)
            || self.feel(look)
    }

    pub fn known(&self, id: &str) -> Option<&Generation> {
        self.generations.get(id).map(|known| &known.generation)
    }

    pub fn live_generation(&self) -> Option<&Generation> {
        self.live.as_deref().and_then(|live| self.known(live))
    }

    /// The rollout that goes on.
    pub fn active(&self) -> Option<&Rollout> {
        self.rollout.as_ref().filter(|rollout| rollout.outcome.is_none())
    }

    /// Whether instances of `id` are to be there.
    pub fn runs(&self, id: &str) -> bool {
        let warm = self.warm.as_ref().is_some_and(|warm| warm.generation == id);
        self.live.as_deref() == Some(id) || warm || self.active().is_some_and(|rollout| rollout.runs(id, self.live.as_deref()))
    }

    /// Whether `id` is to be known still.
    fn needs(&self, id: &str) -> bool {
        let named = self.rollout.as_ref().is_some_and(|rollout| rollout.generation == id);
        named || self.runs(id) || self.active().is_some_and(|rollout| rollout.from.as_deref() == Some(id))
    }

    /// What a decision made void is dropped: a verdict the ledger has, a failure nobody wants any more.
    fn settle(&mut self, look: Look<'_>) -> bool {
        let wanted = look.target().map(|generation| generation.id.as_str());
        if let Some(verdict) = &self.verdict
            && (look.seen.told == Some(verdict.at) || wanted != Some(&verdict.failed))
        {
            self.verdict = None;
            return true;
        }
        if self.given_up.is_some() && self.given_up.as_deref() != wanted {
            self.given_up = None;
            return true;
        }
        if self.abort.is_some() && self.active().is_none_or(|rollout| rollout.phase == Phase::RollingBack) {
            self.abort = None;
            return true;
        }
        false
    }

    /// Nothing is wanted: nothing stays.
    fn wind_down(&mut self, look: Look<'_>) -> bool {
        if look.target().is_some() || look.seen.read_only.is_some() {
            return false;
        }
        let before = self.clone();
        self.end(look, Ending::Superseded, "nothing is wanted here any more");
        (self.live, self.warm, self.forced, self.health) = (None, None, None, None);
        *self != before
    }

    /// Notes what a generation is made of.
    fn prepare(&mut self, look: Look<'_>) -> bool {
        for known in self.generations.values_mut().filter(|known| !known.generation.is_prepared()) {
            if let Some(Ok(programs)) = look.seen.prepared.get(&known.generation.id) {
                known.generation.programs.clone_from(programs);
                // What the store does not have of it was not asked for.
                if known.generation.is_prepared() {
                    return true;
                }
            }
        }
        false
    }

    /// Begins to bring what the ledger wants.
    fn begin(&mut self, look: Look<'_>) -> bool {
        let Some(wanted) = look.target() else { return false };
        let is = |id: &Option<String>| id.as_deref() == Some(&wanted.id);
        if self.active().is_some() || is(&self.live) || is(&self.given_up) || look.seen.read_only.is_some() {
            return false;
        }
        let is_warm = self.warm.as_ref().is_some_and(|warm| warm.generation == wanted.id);
        let from = self.live.clone();
        let blue = from.as_deref().and_then(|from| self.generations.get(from));
        let color = blue.map_or(Color::Blue, |blue| blue.color.other());
        let exclusive = blue.is_some_and(|blue| wanted.excludes(&blue.generation));
        self.warm = None;
        let known = self.generations.entry(wanted.id.clone()).or_insert_with(|| Known {
            generation: wanted.clone(),
            color,
            since: look.now.wall,
        });
        (known.color, known.since) = (color, look.now.wall);
        let is_rollback = look.wanted.is_some_and(|wanted| wanted.is_rollback);
        let phase = match self.paused {
            Some(_) => Phase::Waiting,
            None if is_warm && is_rollback && !exclusive && look.all_healthy(wanted) => Phase::Switching,
            None => Phase::Starting,
        };
        self.abort = None;
        self.rollout = Some(Rollout {
            generation: wanted.id.clone(),
            version: wanted.version.clone(),
            release: wanted.release,
            config: wanted.config.digest(),
            from,
            is_rollback,
            exclusive,
            phase,
            since: look.now.wall,
            began: look.now.steady,
            entered: look.now.steady,
            ended: None,
            relapses: 0,
            switched: None,
            baseline: None,
            watched: false,
            failure: None,
            steps: Vec::new(),
            outcome: None,
        });
        let text = match phase {
            Phase::Waiting => "waits: rollouts are paused".to_owned(),
            Phase::Switching => format!("{} is warm: nothing has to start", wanted.version),
            _ => format!("start {} as {color}", wanted.version),
        };
        self.note(look.now, text);
        true
    }

    /// Ends the time of what is kept warm.
    fn cool(&mut self, look: Look<'_>) -> bool {
        let Some(warm) = &self.warm else { return false };
        let own = look.seen.instances.values().filter(|instance| instance.generation == warm.generation);
        let memory: u64 = own.clone().filter_map(|instance| instance.memory).sum();
        let limit = look.settings().warm_memory;
        let places = self.known(&warm.generation).map_or(0, |generation| generation.places(look.name).len());
        let ended = |instance: &&Instance| matches!(instance.status, Running::Ended { .. });
        let is_gone =
            look.seen.blind.is_empty() && (own.clone().count() < places || own.clone().any(|instance| ended(&instance)));
        let over = look.now.steady >= warm.until || is_gone || limit.is_some_and(|limit| memory > limit);
        if over {
            self.warm = None;
        }
        over
    }

    /// What serves ended while no daemon looked, as with a machine that restarts: that says nothing of the release, so that nobody
    /// is sent back for it. It is started again, and no longer watched. Whether this is so.
    pub fn missed(&mut self, look: Look<'_>) -> bool {
        let Some(rollout) = self.active().filter(|rollout| rollout.phase.is_after_switch()) else { return false };
        let Some(green) = self.known(&rollout.generation) else { return false };
        let instances = &look.seen.instances;
        let runs = |id: &str| instances.get(id).is_some_and(|found| !matches!(found.status, Running::Ended { .. }));
        if !look.seen.blind.is_empty() || green.places(look.name).iter().any(|place| runs(&place.id)) {
            return false;
        }
        self.end(look, Ending::Succeeded, "it ended while nobody looked, and is started again");
        true
    }

    /// Drops what nothing is left of.
    fn forget(&mut self, look: Look<'_>) -> bool {
        let gone = |id: &str| look.seen.forgotten.contains(id) && !look.is_there(id);
        let unused = self.generations.keys().find(|id| !self.needs(id) && gone(id)).cloned();
        unused.is_some_and(|id| self.generations.remove(&id).is_some())
    }

    /// Notes how the live generation does.
    fn feel(&mut self, look: Look<'_>) -> bool {
        let healthy = self.live_generation().map(|generation| look.all_healthy(generation));
        if self.health.map(|(healthy, _)| healthy) == healthy {
            return false;
        }
        self.health = healthy.map(|healthy| (healthy, look.now.steady));
        true
    }

    /// What the ledger should know of the health of its current pair, when it does not: only outside of rollouts, and when
    /// it has lasted.
    pub fn report(&self, look: Look<'_>) -> Option<Status> {
        let wanted = look.wanted?;
        let generation = wanted.generation.as_ref()?;
        if self.active().is_some() || self.verdict.is_some() {
            return None;
        }
        let runs = self.live.as_deref() == Some(&generation.id);
        let (healthy, since) = self.health.unwrap_or((false, look.now.steady));
        let just_done = runs && healthy && wanted.health == Status::Unknown;
        if !runs && self.given_up.as_deref() != Some(&generation.id) {
            return None;
        }
        let lasted = just_done || !runs || look.now.steady.saturating_sub(since) >= DEBOUNCE;
        let status = if runs && healthy { Status::Healthy } else { Status::Unhealthy };
        (lasted && status != wanted.health).then_some(status)
    }

    /// Writes a line into the rollout.
    fn note(&mut self, now: Now, text: impl Into<String>) {
        if let Some(rollout) = &mut self.rollout {
            let before = rollout.steps.last().map_or(rollout.since, |step| step.at);
            let seconds = (now.wall.as_millisecond() - before.as_millisecond()).max(0) as f64 / 1000.0;
            rollout.steps.push(Step { phase: rollout.phase, at: now.wall, seconds, text: text.into() });
            let surplus = rollout.steps.len().saturating_sub(STEPS_MAX);
            rollout.steps.drain(..surplus);
        }
    }

    /// Ends the rollout that goes on.
    fn end(&mut self, look: Look<'_>, result: Ending, reason: &str) {
        let Some(rollout) = self.rollout.as_mut().filter(|rollout| rollout.outcome.is_none()) else { return };
        let log = rollout.failure.take().map(|failure| failure.log).unwrap_or_default();
        rollout.phase = if result == Ending::Succeeded { Phase::Done } else { Phase::Failed };
        rollout.ended = Some(look.now.steady);
        rollout.outcome = Some(Outcome { result, reason: reason.to_owned(), log });
        let text = if reason.is_empty() { result.to_string() } else { format!("{result}: {reason}") };
        self.note(look.now, text);
    }
}

impl Rollout {
    /// Whether instances of `id` are to be there as long as this goes on.
    fn runs(&self, id: &str, live: Option<&str>) -> bool {
        let back = self.phase == Phase::RollingBack;
        let logged = self.failure.as_ref().is_none_or(|failure| failure.logged);
        if self.generation == id {
            return live == Some(id) || self.phase != Phase::Waiting && (!back || !logged);
        }
        if self.from.as_deref() != Some(id) {
            return false;
        }
        // Blue gives way to a green that must not run beside it, and comes back when green is gone.
        !self.exclusive || back || live == Some(id)
    }
}

/// What a failed rollout leads to.
pub(super) fn goes_back(failure: &Failure, settings: &RolloutSettings) -> bool {
    failure.result == Ending::Aborted || settings.on_failure == OnFailure::Rollback
}
