//! What the daemon knows: the state that is saved, what was read, and what was seen. One lock around it, held for moments.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::world::{self, Reading, World};
use crate::rollout::generation::{Generation, Program};
use crate::rollout::health::{Answer, Check, Pulse};
use crate::rollout::plan::{self, Environment, Figures, Instance, Look, Now, Peers, Seen, Unprepared};
use crate::rollout::state::{Folder, State};
use crate::rollout::switch::{Switch, Table};
use crate::rollout::target::{Found, Running, Target};

/// A list of instances older than this says nothing about what is missing.
const STALE: Duration = Duration::from_secs(10);
/// Longest pause between two tries to do something that failed.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Shared by everything in the daemon.
#[derive(Debug)]
pub struct Shared {
    pub world: Arc<dyn World>,
    pub switch: Switch,
    pub folder: Folder,
    model: Mutex<Model>,
    wake: Condvar,
    /// Counts passes, for those who wait for news.
    pub passed: tokio::sync::watch::Sender<u64>,
    /// Counts looks at the ledger that were followed by a pass.
    pub looked: tokio::sync::watch::Sender<u64>,
    pub dial: Dial,
}

/// Makes connections to instances.
#[derive(Clone)]
pub struct Dial(pub crate::rollout::switch::Dialer);

impl std::fmt::Debug for Dial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dial")
    }
}

/// See [`Shared`].
#[derive(Debug)]
pub struct Model {
    pub state: State,
    /// Why nothing new may begin.
    pub read_only: Option<String>,
    /// The state could not be saved the last time.
    pub unsaved: Option<String>,
    pub reading: Option<Reading>,
    pub reading_error: Option<String>,
    /// Looks at the ledger that were asked for, and done.
    pub asked: u64,
    pub done: u64,
    pub lists: BTreeMap<String, Listing>,
    pub pulses: BTreeMap<String, Pulse>,
    /// What is under way, by name.
    pub busy: BTreeSet<String>,
    /// What failed: how often, and when it may be tried again.
    pub failed: BTreeMap<String, (u32, Instant)>,
    pub caches: BTreeMap<String, Cache>,
    pub table: Table,
    /// What the switch has as live, by environment.
    pub serving: BTreeMap<String, Option<String>>,
    pub switch_error: Option<String>,
    /// Figures of a pool when it got live, by environment and generation.
    pub bases: BTreeMap<(String, String), crate::rollout::switch::Figures>,
    /// How rollouts ended, by environment and result: count and seconds, for the metrics.
    pub ended: BTreeMap<(String, String), (u64, f64)>,
    /// Decisions that brought another pair since the daemon started, by environment and what they were.
    pub decided: BTreeMap<(String, &'static str), u64>,
    pub last_pass: Instant,
    pub last_pass_wall: Option<Timestamp>,
    pub passes: u64,
    /// What ended before this daemon came is known.
    pub looked_back: bool,
    /// A pass was made of a ledger that was read, and of targets that have all told what runs, or that they cannot.
    pub knows: bool,
    /// Nothing is begun any more: another daemon takes over, or this one ends.
    pub resting: bool,
    base: u64,
    began: Instant,
}

/// The instances of one target, as it told last.
#[derive(Debug, Clone)]
pub struct Listing {
    /// Of the last answer; `None`: there was none yet.
    pub at: Option<Instant>,
    pub found: Vec<Found>,
    pub error: Option<String>,
    pub target: Arc<dyn Target>,
}

/// What was found out for the rollout of one environment; forgotten when the next one begins.
#[derive(Debug, Clone, Default)]
pub struct Cache {
    began: Option<u64>,
    pub prepared: BTreeMap<String, Result<BTreeMap<String, Program>, Unprepared>>,
    pub checked: BTreeMap<(String, bool), Result<String, String>>,
    pub start_errors: BTreeMap<String, (String, u32)>,
    pub logs: BTreeMap<String, Vec<String>>,
    pub told: Option<u64>,
    /// Why the ledger could not be told.
    pub untold: Option<String>,
    pub forgotten: BTreeSet<String>,
}

impl Shared {
    pub fn new(
        world: Arc<dyn World>,
        switch: Switch,
        folder: Folder,
        dial: Dial,
        state: State,
        read_only: Option<String>,
    ) -> Self {
        let model = Model {
            base: state.steady,
            state,
            read_only,
            unsaved: None,
            reading: None,
            reading_error: None,
            asked: 0,
            done: 0,
            lists: BTreeMap::new(),
            pulses: BTreeMap::new(),
            busy: BTreeSet::new(),
            failed: BTreeMap::new(),
            caches: BTreeMap::new(),
            table: Table::default(),
            serving: BTreeMap::new(),
            switch_error: None,
            bases: BTreeMap::new(),
            ended: BTreeMap::new(),
            decided: BTreeMap::new(),
            last_pass: Instant::now(),
            last_pass_wall: None,
            passes: 0,
            looked_back: false,
            knows: false,
            resting: false,
            began: Instant::now(),
        };
        let (model, wake) = (Mutex::new(model), Condvar::new());
        let (passed, looked) = (tokio::sync::watch::Sender::new(0), tokio::sync::watch::Sender::new(0));
        Self { world, switch, folder, model, wake, passed, looked, dial }
    }

    /// The model; a thread that panicked with it leaves it as usable as it was.
    pub fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Lets the reconciler look.
    pub fn wake(&self) {
        self.wake.notify_all();
    }

    /// Waits for news, no longer than `longest`.
    pub fn wait<'m>(&self, model: MutexGuard<'m, Model>, longest: Duration) -> MutexGuard<'m, Model> {
        self.wake.wait_timeout(model, longest).unwrap_or_else(std::sync::PoisonError::into_inner).0
    }
}

impl Model {
    /// The time.
    pub fn now(&self, world: &dyn World) -> Now {
        let lived = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Now { wall: world.now(), steady: self.base.saturating_add(lived) }
    }

    /// All environments there are, in the ledger, in the state or by what runs.
    pub fn names(&self) -> BTreeSet<String> {
        let read = self.reading.iter().flat_map(|reading| reading.environments.keys());
        let found = self.lists.values().flat_map(|listing| &listing.found).map(|found| &found.environment);
        read.chain(self.state.environments.keys()).chain(found).cloned().collect()
    }

    /// The settings of all targets that something runs on, or is to.
    pub fn targets(&self) -> BTreeMap<String, crate::config::types::Target> {
        let wanted = self.reading.iter().flat_map(|reading| reading.environments.values());
        let wanted = wanted.filter_map(|place| place.wanted.generation.as_ref());
        let known = self.state.environments.values().flat_map(|environment| environment.generations.values());
        let all = wanted.chain(known.map(|known| &known.generation)).flat_map(|generation| generation.targets.values());
        all.map(|settings| (world::key(settings), settings.clone())).collect()
    }

    /// Whether `name` may be tried (again), after what failed before.
    pub fn may(&self, name: &str) -> bool {
        !self.busy.contains(name) && self.failed.get(name).is_none_or(|(_, next)| Instant::now() >= *next)
    }

    /// Notes that `name` failed; how often it did in a row.
    pub fn failed(&mut self, name: &str) -> u32 {
        let (count, next) = self.failed.entry(name.to_owned()).or_insert((0, Instant::now()));
        *count += 1;
        let pause = Duration::from_millis(500).saturating_mul(1 << (*count - 1).min(7));
        *next = Instant::now() + pause.min(RETRY_MAX);
        *count
    }

    /// The cache of an environment's rollout.
    pub fn cache(&mut self, name: &str) -> &mut Cache {
        let began =
            self.state.environments.get(name).and_then(|environment| environment.rollout.as_ref()).map(|rollout| rollout.began);
        let cache = self.caches.entry(name.to_owned()).or_default();
        if cache.began != began {
            *cache = Cache { began, ..Cache::default() };
        }
        cache
    }

    /// What an instance is asked, when it is asked anything over its port.
    pub fn check(&self, found: &Found) -> Option<(Check, Option<u16>)> {
        let environment = self.state.environments.get(&found.environment)?;
        let generation = environment.known(&found.generation)?;
        let program = generation.programs.get(&found.target)?;
        Some((Check::of(program, generation.targets.get(&found.target)?), program.port))
    }

    /// Takes what the ledger says, and counts the decisions in it, for the metrics.
    pub fn read(&mut self, reading: Reading) {
        let pair =
            |reading: &Reading, name: &String| Some(reading.environments.get(name)?.wanted.generation.as_ref()?.id.clone());
        for (name, place) in reading.environments.iter().filter(|_| self.reading.is_some()) {
            let before = self.reading.as_ref().and_then(|reading| pair(reading, name));
            let after = pair(&reading, name);
            if after.is_some() && after != before {
                let kind = if place.wanted.is_rollback { "rolled-back" } else { "promoted" };
                *self.decided.entry((name.clone(), kind)).or_default() += 1;
            }
        }
        (self.reading, self.reading_error) = (Some(reading), None);
    }

    /// What there is of `name`.
    pub fn seen(&mut self, name: &str, switch: &Switch, peers: Peers) -> Seen {
        let environment = self.state.environments.get(name).cloned().unwrap_or_default();
        let wanted = self.reading.as_ref().and_then(|reading| reading.environments.get(name)).cloned();
        let read_only = self.read_only.clone().or_else(|| self.unsaved.clone());
        let unread = || self.reading.is_none().then(|| "the ledger was not read yet".to_owned());
        let read_only = read_only.or_else(unread);
        let steady = self.now_steady();
        let mut seen = Seen { peers, read_only, switch_error: self.switch_error.clone(), ..Seen::default() };
        for found in self.lists.values().flat_map(|listing| &listing.found).filter(|found| found.environment == name) {
            seen.instances.insert(found.id.clone(), self.instance(found, steady));
        }
        let known = environment.generations.values().map(|known| &known.generation);
        let green = wanted.as_ref().and_then(|place| place.wanted.generation.as_ref());
        for generation in known.chain(green) {
            for (target, settings) in &generation.targets {
                let listing = self.lists.get(&world::key(settings));
                let is_fresh = |listing: &Listing| listing.error.is_none() && listing.at.is_some_and(|at| at.elapsed() < STALE);
                if !listing.is_some_and(is_fresh) {
                    seen.blind.insert(target.clone());
                }
            }
            for place in generation.places(name) {
                self.under_way(&mut seen, generation, &place, steady);
            }
            if switch.draining(name, &generation.id).is_some() && environment.live.as_deref() != Some(&generation.id) {
                // A preview that somebody looks at is no reason to go on.
                if environment.active().is_none_or(|rollout| rollout.generation != generation.id || rollout.switched.is_some()) {
                    seen.draining.insert(generation.id.clone());
                }
            }
            let base = self.bases.get(&(name.to_owned(), generation.id.clone()));
            seen.figures.insert(generation.id.clone(), figures(switch, name, &generation.id, base));
        }
        seen.serving = self.serving.get(name).cloned().flatten();
        let cache = self.cache(name).clone();
        (seen.prepared, seen.checked, seen.start_errors) = (cache.prepared, cache.checked, cache.start_errors);
        (seen.logs, seen.told, seen.forgotten) = (cache.logs, cache.told, cache.forgotten);
        seen
    }

    /// What is just being started or stopped counts, too.
    fn under_way(&self, seen: &mut Seen, generation: &Generation, place: &crate::rollout::generation::Place, steady: u64) {
        if self.busy.contains(&format!("stop {}", place.id)) {
            if let Some(instance) = seen.instances.get_mut(&place.id) {
                instance.healthy = false;
                instance.ill_since.get_or_insert(steady);
                instance.status = Running::Ended { status: "is being stopped".into() };
            }
        } else if self.busy.contains(&format!("start {}", place.id)) {
            seen.instances.entry(place.id.clone()).or_insert_with(|| Instance {
                generation: generation.id.clone(),
                target: place.target.clone(),
                status: Running::Starting,
                restarts: 0,
                healthy: false,
                ill_since: None,
                last: None,
                memory: None,
            });
        }
    }

    fn now_steady(&self) -> u64 {
        self.base.saturating_add(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn instance(&self, found: &Found, steady: u64) -> Instance {
        let runs = found.status == Running::Running;
        let pulse = self.pulses.get(&found.id);
        let only_runs = matches!(self.check(found), Some((Check::Runs, _)));
        let healthy = runs && (only_runs || pulse.and_then(|pulse| pulse.healthy) == Some(true));
        let told = pulse.and_then(|pulse| pulse.last.clone());
        let status = match &found.status {
            Running::Waiting => Some("its program ended, and is started again".to_owned()),
            Running::Ended { status } => Some(status.clone()),
            Running::Starting | Running::Running => None,
        };
        let ill_since = pulse.and_then(|pulse| pulse.ill_since).or((status.is_some() && !healthy).then_some(steady));
        Instance {
            generation: found.generation.clone(),
            target: found.target.clone(),
            status: found.status.clone(),
            restarts: found.restarts,
            healthy,
            ill_since: ill_since.filter(|_| !healthy),
            last: told.or(status),
            memory: found.memory,
        }
    }

    /// Takes what a target told about its instances.
    pub fn listed(&mut self, key: &str, answer: anyhow::Result<Vec<Found>>) -> bool {
        let steady = self.now_steady();
        let Some(listing) = self.lists.get_mut(key) else { return false };
        match answer {
            Err(error) => {
                let text = format!("{error:#}");
                let changed = listing.error.as_ref() != Some(&text);
                listing.error = Some(text);
                changed
            }
            Ok(found) => {
                let changed = listing.found != found || listing.error.is_some() || listing.at.is_none();
                (listing.found, listing.error, listing.at) = (found, None, Some(Instant::now()));
                for found in listing.found.iter().filter(|found| found.status != Running::Running) {
                    if let Some(pulse) = self.pulses.get_mut(&found.id) {
                        pulse.heard(&Check::Runs, &Answer::Silent("its program does not run".into()), steady);
                    }
                }
                changed
            }
        }
    }

    /// Where an instance is, and the target that has it.
    pub fn find(&self, id: &str) -> Option<(Found, Arc<dyn Target>)> {
        let of = |listing: &Listing| Some((listing.found.iter().find(|found| found.id == id)?.clone(), listing.target.clone()));
        self.lists.values().find_map(of)
    }

    /// Whether the target that has an instance does not answer. An engine that comes back may have given the address to
    /// another container: whoever fell ill meanwhile is not believed, and gets no requests, before the target has told again.
    pub fn is_doubtful(&self, id: &str) -> bool {
        let has = |listing: &&Listing| listing.found.iter().any(|found| found.id == id);
        self.lists.values().find(has).is_some_and(|listing| listing.error.is_some())
    }

    /// Whether all that there is to know was asked for once, and answered.
    pub fn has_looked(&self) -> bool {
        let told = |listing: &Listing| listing.at.is_some() || listing.error.is_some();
        let read = self.reading.is_some() || self.reading_error.is_some();
        read && self.targets().keys().all(|key| self.lists.get(key).is_some_and(told))
    }

    /// Everything about `name` that a plan is made from; `seen` is [`Model::seen`].
    pub fn look<'a>(&'a self, name: &'a str, seen: &'a Seen, now: Now) -> Look<'a> {
        let wanted = self.reading.as_ref().and_then(|reading| reading.environments.get(name)).map(|place| &place.wanted);
        Look { name, wanted, seen, now }
    }

    /// The state of `name`.
    pub fn environment(&self, name: &str) -> Environment {
        self.state.environments.get(name).cloned().unwrap_or_default()
    }

    /// Notes how rollouts ended, for the metrics.
    pub fn count(&mut self, before: &Environment, after: &Environment, name: &str) {
        let over = |environment: &Environment| environment.rollout.clone().filter(|rollout| rollout.outcome.is_some());
        let Some(rollout) = over(after).filter(|rollout| over(before).is_none_or(|old| old.began != rollout.began)) else {
            return;
        };
        let Some(outcome) = &rollout.outcome else { return };
        let seconds = rollout.ended.unwrap_or(rollout.began).saturating_sub(rollout.began) as f64 / 1000.0;
        let (count, sum) = self.ended.entry((name.to_owned(), outcome.result.to_string())).or_default();
        *count += 1;
        *sum += seconds;
    }
}

/// What the switch counted for a pool since it got live.
fn figures(switch: &Switch, service: &str, pool: &str, base: Option<&crate::rollout::switch::Figures>) -> Figures {
    let all = switch.figures(service, pool);
    let since = base.map_or_else(|| all.clone(), |base| all.since(base));
    Figures { requests: since.requests, errors: since.errors, p99: since.latency.p99() }
}

/// Where a plan was made for what is not saved yet.
pub type Plans = BTreeMap<String, plan::Environment>;
