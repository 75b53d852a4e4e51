//! A world in which everything happens at random: what must never be is looked for after every step.

use std::collections::{BTreeMap, BTreeSet};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::*;

/// Steps of one world, and worlds.
const STEPS: usize = 400;
const WORLDS: u64 = 300;

/// What is under way: it takes effect some steps later.
#[derive(Debug, Clone)]
struct UnderWay {
    action: Action,
    at: u64,
}

struct Chaos {
    rng: StdRng,
    exclusive: bool,
    instances: u32,
    /// What was saved last: all that survives a kill.
    saved: String,
    environment: Environment,
    wanted: Wanted,
    /// What is there, whoever looks.
    world: BTreeMap<String, Instance>,
    seen: Seen,
    now: Now,
    under_way: Vec<UnderWay>,
    /// Versions whose instances never get healthy.
    sick: BTreeSet<String>,
    /// Pairs of the ledger: the newest last.
    history: Vec<Generation>,
    verdicts: usize,
    failures: usize,
    log: Vec<String>,
}

impl Chaos {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let settings = RolloutSettings { warm: Seconds(rng.random_range(0..120)), ..RolloutSettings::default() };
        Self {
            exclusive: rng.random_bool(0.4),
            instances: rng.random_range(1..4),
            rng,
            saved: serde_json::to_string(&Environment::default()).unwrap(),
            environment: Environment::default(),
            wanted: Wanted { generation: None, is_rollback: false, health: Status::Unknown, settings, together: None },
            world: BTreeMap::new(),
            seen: Seen::default(),
            now: Now { wall: "2026-03-01T00:00:00Z".parse().unwrap(), steady: 0 },
            under_way: Vec::new(),
            sick: BTreeSet::new(),
            history: Vec::new(),
            verdicts: 0,
            failures: 0,
            log: Vec::new(),
        }
    }

    fn pass_time(&mut self, milliseconds: u64) {
        self.now.steady += milliseconds;
        self.now.wall = self.now.wall.checked_add(jiff::SignedDuration::from_millis(milliseconds as i64)).unwrap();
    }

    /// Something happens.
    fn event(&mut self) {
        let ids: Vec<String> = self.world.keys().cloned().collect();
        let one = |rng: &mut StdRng| (!ids.is_empty()).then(|| ids[rng.random_range(0..ids.len())].clone());
        match self.rng.random_range(0..100) {
            0..4 => {
                let number = self.rng.random_range(1..9);
                let new = generation(number, self.instances, self.exclusive);
                if self.rng.random_bool(0.4) {
                    self.sick.insert(new.id.clone());
                } else {
                    self.sick.remove(&new.id);
                }
                self.log.push(format!("promote {}", new.version));
                self.decide(new, false);
            }
            4..6 => {
                if let Some(back) = self.history.iter().rev().nth(1).cloned() {
                    self.log.push(format!("roll back to {}", back.version));
                    self.decide(back, true);
                }
            }
            6..8 => self.environment.abort = Some(Pause { by: "Ann".into(), reason: String::new() }),
            8..10 => {
                let pause = Pause { by: "Ann".into(), reason: String::new() };
                self.environment.paused = if self.environment.paused.is_some() { None } else { Some(pause) };
            }
            10..14 => {
                if let Some(id) = one(&mut self.rng) {
                    self.log.push(format!("{id} is gone"));
                    self.world.remove(&id);
                }
            }
            14..18 => {
                if let Some(found) = one(&mut self.rng).and_then(|id| self.world.get_mut(&id)) {
                    found.status = Running::Ended { status: "status 1".into() };
                    found.healthy = false;
                    found.ill_since = Some(self.now.steady);
                }
            }
            18..22 => {
                if let Some(found) = one(&mut self.rng).and_then(|id| self.world.get_mut(&id)) {
                    found.healthy = false;
                    found.ill_since = Some(self.now.steady);
                    found.restarts += 1;
                }
            }
            22..26 => self.kill(),
            26..28 => {
                self.seen.blind = if self.seen.blind.is_empty() { BTreeSet::from(["main".into()]) } else { BTreeSet::new() };
            }
            28..30 => {
                // The clock of the wall jumps, an hour to either side.
                let hour = jiff::SignedDuration::from_hours(if self.rng.random_bool(0.5) { 1 } else { -1 });
                self.now.wall = self.now.wall.checked_add(hour).unwrap();
            }
            30..32 => self.seen.peers.ready = !self.seen.peers.ready,
            _ => {}
        }
    }

    fn decide(&mut self, generation: Generation, is_rollback: bool) {
        self.history.push(generation.clone());
        (self.wanted.generation, self.wanted.is_rollback, self.wanted.health) = (Some(generation), is_rollback, Status::Unknown);
    }

    /// The daemon is killed and comes again: the saved state and what runs are all that is left.
    fn kill(&mut self) {
        self.log.push("kill".into());
        self.environment = serde_json::from_str(&self.saved).unwrap();
        // What was begun may have been done, or not.
        for under_way in std::mem::take(&mut self.under_way) {
            if self.rng.random_bool(0.5) && matches!(under_way.action, Action::Start { .. } | Action::Stop { .. }) {
                self.take_effect(under_way.action);
            }
        }
        let serving = None;
        self.seen = Seen { serving, peers: self.seen.peers.clone(), ..Seen::default() };
        for found in self.world.values_mut() {
            (found.healthy, found.ill_since) = (false, None);
        }
    }

    fn take_effect(&mut self, action: Action) {
        match action {
            Action::Start { generation, id } => {
                let target = "main".to_owned();
                let ill_since = Some(self.now.steady);
                let (status, last) = (Running::Running, None);
                let found =
                    Instance { generation, target, status, restarts: 0, healthy: false, ill_since, last, memory: Some(1) };
                self.world.entry(id).or_insert(found);
            }
            Action::Stop { id, .. } => {
                self.world.remove(&id);
            }
            Action::Forget { generation } => {
                self.seen.forgotten.insert(generation);
            }
            Action::Log { id, .. } => {
                self.seen.logs.insert(id, vec!["panic".into()]);
            }
            Action::Tell(verdict) => {
                // The ledger takes it when it is still about what it wants.
                if self.wanted.generation.as_ref().is_some_and(|wanted| wanted.id == verdict.failed) {
                    self.verdicts += 1;
                    if let VerdictKind::Rollback(release, _) = verdict.kind {
                        let back = self.history.iter().rev().find(|known| known.release == release).cloned().unwrap();
                        self.decide(back, true);
                    }
                }
                self.seen.told = Some(verdict.at);
            }
            Action::Report(status) => self.wanted.health = status,
            Action::Prepare { .. } | Action::Check { .. } => {}
        }
    }

    /// Probes: what runs gets healthy, unless it is sick.
    fn probe(&mut self) {
        for found in self.world.values_mut().filter(|found| matches!(found.status, Running::Running)) {
            let healthy = !self.sick.contains(&found.generation) && self.rng.random_bool(0.7);
            if healthy && !found.healthy {
                (found.healthy, found.ill_since) = (true, None);
            } else if !healthy && !found.healthy {
                found.ill_since.get_or_insert(self.now.steady);
            }
        }
    }

    /// What the daemon sees: what is there, with what it has under way.
    fn observe(&mut self) {
        let due: Vec<UnderWay> = self.under_way.extract_if(.., |under_way| under_way.at <= self.now.steady).collect();
        for under_way in due {
            self.take_effect(under_way.action);
        }
        self.probe();
        if self.seen.blind.is_empty() {
            self.seen.instances = self.world.clone();
        }
        for under_way in &self.under_way {
            match &under_way.action {
                Action::Start { generation, id } => {
                    let (status, ill_since, last) = (Running::Starting, Some(self.now.steady), None);
                    let (generation, target) = (generation.clone(), "main".to_owned());
                    let found =
                        Instance { generation, target, status, restarts: 0, healthy: false, ill_since, last, memory: None };
                    self.seen.instances.entry(id.clone()).or_insert(found);
                }
                Action::Stop { id, .. } => {
                    if let Some(found) = self.seen.instances.get_mut(id) {
                        found.healthy = false;
                        found.ill_since.get_or_insert(self.now.steady);
                        found.status = Running::Ended { status: "is being stopped".into() };
                    }
                }
                _ => {}
            }
        }
        self.seen.draining.retain(|_| self.rng.random_bool(0.8));
    }

    fn look(&self) -> Look<'_> {
        Look { name: NAME, wanted: Some(&self.wanted), seen: &self.seen, now: self.now }
    }

    /// One pass of the daemon, which may be killed in its middle; whether anything was done.
    fn pass(&mut self, may_die: bool) -> bool {
        let before = self.environment.clone();
        let after = next(&before, self.look());
        self.check_step(&before, &after);
        let mut changed = after != before;
        self.saved = serde_json::to_string(&after).unwrap();
        self.environment = after;
        if may_die && self.rng.random_bool(0.02) {
            self.kill();
            return true;
        }
        let serving = serving(&self.environment, self.look());
        if serving.live != self.seen.serving {
            if let Some(old) = self.seen.serving.take() {
                self.seen.draining.insert(old);
            }
            if let Some(live) = &serving.live {
                self.seen.draining.remove(live);
            }
            self.seen.serving.clone_from(&serving.live);
            changed = true;
        }
        for action in actions(&self.environment, self.look()) {
            self.check_action(&action);
            if self.under_way.iter().any(|under_way| under_way.action == action) {
                continue;
            }
            changed = true;
            let at = self.now.steady + self.rng.random_range(0..2000);
            self.log.push(format!("{action:?}"));
            self.under_way.push(UnderWay { action, at });
        }
        changed
    }

    /// What must hold of every step.
    fn check_step(&mut self, before: &Environment, after: &Environment) {
        let look = self.look();
        if let Some(live) = after.live.as_ref().filter(|live| before.live.as_ref() != Some(live)) {
            let generation = after.known(live).expect("what is live is known");
            let (healthy, wanted) = look.healthy(generation);
            assert!(
                healthy == wanted || after.forced.is_some(),
                "{live} got live with {healthy} of {wanted} healthy instances\n{}",
                self.log.join("\n")
            );
        }
        let over = |environment: &Environment| environment.rollout.as_ref().and_then(|rollout| rollout.outcome.clone());
        if let (None, Some(outcome)) = (over(before), over(after)) {
            let green = &after.rollout.as_ref().unwrap().generation;
            let is_wanted = self.wanted.generation.as_ref().is_some_and(|wanted| wanted.id == *green);
            if matches!(outcome.result, Ending::Failed | Ending::Aborted) && is_wanted {
                assert!(after.verdict.is_some(), "a rollout that failed without a verdict");
                self.failures += 1;
            }
        }
        assert!(after.generations.len() <= 5, "remembers {} generations", after.generations.len());
    }

    fn check_action(&self, action: &Action) {
        let trace = || self.log.join("\n");
        match action {
            Action::Start { generation, id } => {
                assert!(self.environment.runs(generation), "started what is not wanted\n{}", trace());
                let others = self.world.iter().filter(|(_, found)| found.generation != *generation);
                if self.exclusive && self.seen.blind.is_empty() {
                    assert_eq!(others.count(), 0, "{id} would hold a volume that somebody has\n{}", trace());
                }
            }
            Action::Stop { id, .. } => {
                let found = &self.seen.instances[id];
                let is_live = self.environment.live.as_ref() == Some(&found.generation);
                let ended = matches!(found.status, Running::Ended { .. });
                assert!(!is_live || ended, "stopped {id}, which is live\n{}", trace());
                assert!(!self.seen.draining.contains(&found.generation) || ended, "stopped {id}, which drains\n{}", trace());
            }
            _ => {}
        }
    }

    /// Everything gets quiet: then it comes to rest, and what is there is right.
    fn check_rest(&mut self, seed: u64) {
        self.seen.blind.clear();
        self.seen.peers.ready = true;
        (self.environment.paused, self.environment.abort) = (None, None);
        let mut quiet = 0;
        for round in 0.. {
            self.pass_time(1_000);
            self.observe();
            let changed = self.pass(false);
            quiet = if changed || !self.under_way.is_empty() { 0 } else { quiet + 1 };
            // Longer than every time that can be waited for.
            if quiet > 200 {
                break;
            }
            assert!(round < 3_000, "seed {seed} does not come to rest: {:#?}\n{}", self.environment, self.log.join("\n"));
        }
        let environment = &self.environment;
        assert!(environment.active().is_none(), "seed {seed}: {:#?}", environment.rollout);
        assert_eq!((&environment.verdict, &environment.warm), (&None, &None), "seed {seed}");
        let live: BTreeSet<&String> = environment.live.iter().collect();
        let there: BTreeSet<&String> = self.world.values().map(|found| &found.generation).collect();
        assert_eq!(there, live, "seed {seed}: what is left");
        assert!(environment.generations.len() <= 2, "seed {seed}: {:?}", environment.generations.keys());
        let wanted = self.wanted.generation.as_ref().map(|wanted| &wanted.id);
        assert!(
            environment.live.as_ref() == wanted || environment.given_up.as_ref() == wanted,
            "seed {seed}: {:?} runs where {wanted:?} is wanted",
            environment.live
        );
        assert_eq!(self.seen.serving, environment.live, "seed {seed}");
    }
}

#[test]
fn whatever_happens() {
    let (mut verdicts, mut switches) = (0, 0);
    for seed in 0..WORLDS {
        let mut chaos = Chaos::new(seed);
        let mut live = None;
        for _ in 0..STEPS {
            let time = chaos.rng.random_range(1..3_000);
            chaos.pass_time(time);
            chaos.event();
            chaos.observe();
            chaos.pass(true);
            if chaos.environment.live != live {
                live.clone_from(&chaos.environment.live);
                switches += 1;
            }
        }
        chaos.check_rest(seed);
        verdicts += chaos.verdicts;
    }
    // The worlds are about something.
    assert!(verdicts > 200 && switches > 1_000, "{verdicts} verdicts, {switches} switches");
}
