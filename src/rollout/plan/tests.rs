//! Tables of what follows from what, and a world in which everything happens at random.

use std::collections::BTreeMap;

use super::*;
use crate::config::types::{Ask, Local, RolloutCheck, Seconds, Target, Volume, VolumeSpec};
use crate::release::decision::Configuration;
use crate::rollout::view::Result as Ending;

mod clock;
mod random;

const NAME: &str = "shop/prod";

/// The generation of version `number`, with `instances`.
fn generation(number: u8, instances: u32, exclusive: bool) -> Generation {
    let release = Digest::of([number]);
    let mode = if exclusive { Volume::Exclusive } else { Volume::Shared };
    let programs =
        BTreeMap::from([("main".to_owned(), Program { artifact: release, port: Some(80), health: None, volumes: Vec::new() })]);
    Generation {
        id: release.short(),
        release,
        version: format!("1.{number}"),
        config: Configuration::default(),
        targets: BTreeMap::from([("main".to_owned(), Target::Local(Local { instances, ..Local::default() }))]),
        volumes: BTreeMap::from([("data".to_owned(), VolumeSpec { mode, path: Some("/data".into()) })]),
        programs,
    }
}

/// A small world: what the plan says is done at once, and time passes when the test says so.
struct World {
    environment: Environment,
    wanted: Option<Wanted>,
    seen: Seen,
    now: Now,
    /// Everything that was done, in words.
    done: Vec<String>,
    /// Whether what starts gets healthy.
    well: bool,
}

impl World {
    fn new() -> Self {
        let wall = "2026-03-01T00:00:00Z".parse().unwrap();
        let settings = RolloutSettings { warm: Seconds(900), ..RolloutSettings::default() };
        let wanted = Wanted { generation: None, is_rollback: false, health: Status::Unknown, settings, together: None };
        Self {
            environment: Environment::default(),
            wanted: Some(wanted),
            seen: Seen::default(),
            now: Now { wall, steady: 0 },
            done: Vec::new(),
            well: true,
        }
    }

    fn settings(&mut self) -> &mut RolloutSettings {
        &mut self.wanted.as_mut().unwrap().settings
    }

    fn want(&mut self, generation: Generation, is_rollback: bool) {
        let wanted = self.wanted.as_mut().unwrap();
        (wanted.generation, wanted.is_rollback, wanted.health) = (Some(generation), is_rollback, Status::Unknown);
    }

    fn look(&self) -> Look<'_> {
        Look { name: NAME, wanted: self.wanted.as_ref(), seen: &self.seen, now: self.now }
    }

    fn later(&mut self, seconds: u64) {
        self.now.steady += seconds * 1000;
        self.now.wall = self.now.wall.checked_add(jiff::SignedDuration::from_secs(seconds as i64)).unwrap();
    }

    /// One look, and everything done that follows; whether there was anything.
    fn pass(&mut self) -> bool {
        let after = next(&self.environment, self.look());
        let mut changed = after != self.environment;
        self.environment = after;
        let serving = serving(&self.environment, self.look());
        if self.seen.serving != serving.live {
            self.done.push(format!("serve {}", serving.live.as_deref().map_or("nothing", |id| self.version(id))));
            self.seen.serving.clone_from(&serving.live);
            changed = true;
        }
        for action in actions(&self.environment, self.look()) {
            changed |= self.act(action);
        }
        changed
    }

    fn version(&self, id: &str) -> &'static str {
        let known = (0..10u8).find(|number| Digest::of([*number]).short() == id).unwrap();
        ["1.0", "1.1", "1.2", "1.3", "1.4", "1.5", "1.6", "1.7", "1.8", "1.9"][known as usize]
    }

    fn act(&mut self, action: Action) -> bool {
        let text = match action {
            Action::Prepare { generation } => format!("prepare {}", self.version(&generation)),
            Action::Start { generation, id } => {
                let text = format!("start {}", self.version(&generation));
                let ill_since = (!self.well).then_some(self.now.steady);
                let last = (!self.well).then(|| "connection refused".to_owned());
                let instance = Instance {
                    generation,
                    target: "main".into(),
                    status: Running::Running,
                    restarts: 0,
                    healthy: self.well,
                    ill_since,
                    last,
                    memory: Some(100),
                };
                assert!(self.seen.instances.insert(id, instance).is_none(), "started twice");
                text
            }
            Action::Stop { id, forget, .. } => {
                let instance = self.seen.instances.remove(&id).expect("stopped what is not there");
                format!("stop {}{}", self.version(&instance.generation), if forget { "" } else { ", keep its log" })
            }
            Action::Forget { generation } => {
                let text = format!("forget {}", self.version(&generation));
                self.seen.forgotten.insert(generation);
                text
            }
            Action::Check { generation, after } => {
                let text = format!("check {} {}", self.version(&generation), if after { "after" } else { "before" });
                self.seen.checked.insert((generation, after), Ok("yes".into()));
                text
            }
            Action::Log { id, .. } => {
                self.seen.logs.insert(id.clone(), vec!["panic".into()]);
                "log".into()
            }
            Action::Tell(verdict) => {
                self.seen.told = Some(verdict.at);
                let text = format!("tell {}: {}", kind(&verdict.kind), verdict.reason);
                if let VerdictKind::Rollback(release, _) = verdict.kind {
                    let back = (0..10).map(|number| generation(number, 1, false)).find(|known| known.release == release);
                    let live = self.environment.live_generation().cloned().or(back).unwrap();
                    self.want(live, true);
                    self.seen.told = Some(verdict.at);
                }
                text
            }
            Action::Report(status) => {
                self.wanted.as_mut().unwrap().health = status;
                format!("report {status}")
            }
        };
        self.done.push(text);
        true
    }

    /// Until nothing follows any more.
    fn settle(&mut self) -> Vec<String> {
        for _ in 0..50 {
            if !self.pass() {
                return std::mem::take(&mut self.done);
            }
        }
        panic!("it does not come to rest: {:?}", self.done);
    }

    /// All instances of a version are ill from now on, or well.
    fn health(&mut self, number: u8, healthy: bool) {
        let id = generation(number, 1, false).id;
        for instance in self.seen.instances.values_mut().filter(|instance| instance.generation == id) {
            instance.healthy = healthy;
            instance.ill_since = (!healthy).then_some(self.now.steady);
            instance.last = (!healthy).then(|| "status 500".to_owned());
        }
    }

    fn figures(&mut self, number: u8, requests: u64, errors: u64, p99: f64) {
        self.seen.figures.insert(generation(number, 1, false).id, Figures { requests, errors, p99: Some(p99) });
    }

    fn phase(&self) -> Option<(Phase, Option<Ending>)> {
        let rollout = self.environment.rollout.as_ref()?;
        Some((rollout.phase, rollout.outcome.as_ref().map(|outcome| outcome.result)))
    }

    fn live(&self) -> Option<&'static str> {
        self.environment.live.as_deref().map(|id| self.version(id))
    }

    /// 1.1 is live and everything about it is over.
    fn with_blue(instances: u32, exclusive: bool) -> Self {
        let mut world = Self::new();
        world.want(generation(1, instances, exclusive), false);
        world.settle();
        assert_eq!((world.live(), world.phase()), (Some("1.1"), Some((Phase::Done, Some(Ending::Succeeded)))));
        world
    }
}

fn kind(kind: &VerdictKind) -> &'static str {
    match kind {
        VerdictKind::Rollback(..) => "rollback",
        VerdictKind::Hold => "hold",
        VerdictKind::Freeze => "freeze",
    }
}

#[test]
fn first_release() {
    let mut world = World::new();
    assert_eq!(world.settle(), [""; 0]);
    world.want(generation(1, 2, false), false);
    let done = world.settle();
    assert_eq!(done, ["start 1.1", "start 1.1", "serve 1.1", "report healthy"]);
    assert_eq!(world.phase(), Some((Phase::Done, Some(Ending::Succeeded))));
    assert_eq!(world.settle(), [""; 0]);
}

#[test]
fn green_takes_over_and_blue_stays_warm_and_goes() {
    let mut world = World::with_blue(1, false);
    world.want(generation(2, 1, false), false);
    assert_eq!(world.settle(), ["start 1.2", "serve 1.2"]);
    assert_eq!((world.live(), world.phase()), (Some("1.2"), Some((Phase::Watching, None))));
    world.later(30);
    assert_eq!(world.settle(), ["report healthy"]);
    assert_eq!(world.environment.warm.as_ref().map(|warm| world.version(&warm.generation)), Some("1.1"));
    // Back at once: nothing is started.
    world.want(generation(1, 1, false), true);
    assert_eq!(world.settle(), ["serve 1.1", "report healthy"]);
    assert_eq!(world.environment.warm.as_ref().map(|warm| world.version(&warm.generation)), Some("1.2"));
    // And what is warm goes when its time is over, but not while somebody is served by it.
    world.seen.draining.insert(generation(2, 1, false).id);
    world.later(901);
    assert_eq!(world.settle(), [""; 0]);
    world.seen.draining.clear();
    assert_eq!(world.settle(), ["stop 1.2", "forget 1.2"]);
    assert_eq!(world.environment.generations.len(), 1);
}

#[test]
fn memory_and_count_end_what_is_warm() {
    let mut world = World::with_blue(2, false);
    world.want(generation(2, 2, false), false);
    world.settle();
    world.later(30);
    world.settle();
    world.settings().warm_memory = Some(150);
    assert_eq!(world.settle(), ["stop 1.1", "stop 1.1", "forget 1.1"]);
    world.settings().warm_memory = None;
    world.want(generation(3, 2, false), false);
    assert_eq!(world.settle(), ["start 1.3", "start 1.3", "serve 1.3"]);
    world.later(30);
    world.settle();
    // 1.2 is warm; the next one takes its place.
    world.want(generation(4, 2, false), false);
    assert_eq!(world.settle(), ["stop 1.2", "stop 1.2", "start 1.4", "start 1.4", "serve 1.4", "forget 1.2"]);
}

/// Failures before the switch: what makes green fail, and the reason the ledger is told.
#[test]
fn failures_before_the_switch() {
    let cases: &[(&str, fn(&mut World), &str)] = &[
        ("never healthy", |world| world.later(60), "0/1 healthy after 60 s: connection refused"),
        (
            "ends at once",
            |world| world.seen.instances.values_mut().filter(|found| !found.healthy).for_each(|found| found.restarts = 3),
            "ended 3 times before it was healthy; the last probe: connection refused",
        ),
        (
            "aborted",
            |world| world.environment.abort = Some(Pause { by: "Ann".into(), reason: "wrong one".into() }),
            "aborted by Ann: wrong one",
        ),
        (
            "a peer failed",
            |world| world.seen.peers.failed = Some("`cart/prod`: status 500".into()),
            "it switches together with `cart/prod`: status 500",
        ),
    ];
    for (name, happens, reason) in cases {
        let mut world = World::with_blue(1, false);
        world.well = false;
        world.want(generation(2, 1, false), false);
        assert_eq!(world.settle(), ["start 1.2"], "{name}");
        happens(&mut world);
        let done = world.settle();
        world.seen.peers.failed = None;
        let told: Vec<&String> = done.iter().filter(|line| line.starts_with("tell rollback: ")).collect();
        assert_eq!(told.len(), 1, "{name}: {done:?}");
        assert!(told[0].contains(reason), "{name}: {}", told[0]);
        assert!(done.contains(&"stop 1.2, keep its log".to_owned()), "{name}: {done:?}");
        assert!(!done.iter().any(|line| line.starts_with("serve")), "{name}: {done:?}");
        let result = if *name == "aborted" { Ending::Aborted } else { Ending::Failed };
        assert_eq!((world.live(), world.phase()), (Some("1.1"), Some((Phase::Failed, Some(result)))), "{name}");
        assert_eq!(world.environment.verdict, None, "{name}");
        assert_eq!(world.settle(), [""; 0], "{name}");
    }
}

#[test]
fn what_cannot_be_had_fails_at_once_or_is_waited_for() {
    let missing = |is_final| Unprepared { reason: "image missing".into(), is_final };
    let unprepared = Generation { programs: BTreeMap::new(), ..generation(2, 1, false) };
    let mut world = World::with_blue(1, false);
    world.seen.prepared.insert(unprepared.id.clone(), Err(missing(false)));
    world.want(unprepared.clone(), false);
    assert!(world.pass() && world.done == ["prepare 1.2"], "{:?}", world.done);
    world.later(59);
    world.pass();
    assert_eq!(world.phase(), Some((Phase::Starting, None)));
    world.seen.prepared.insert(unprepared.id.clone(), Err(missing(true)));
    world.done.clear();
    let done = world.settle();
    assert_eq!(done.first().map(String::as_str), Some("tell rollback: image missing"), "{done:?}");
    // The store has it now, and somebody wants it again.
    world.seen.prepared.insert(unprepared.id.clone(), Ok(generation(2, 1, false).programs));
    world.want(unprepared, false);
    assert_eq!(world.settle(), ["start 1.2", "serve 1.2"]);
}

#[test]
fn an_instance_that_cannot_be_started() {
    let mut world = World::with_blue(1, false);
    let green = generation(2, 1, false);
    let id = green.places(NAME)[0].id.clone();
    world.seen.start_errors.insert(id.clone(), ("port taken".into(), 5));
    world.want(green, false);
    let done = world.settle();
    assert!(done.iter().any(|line| line == &format!("tell rollback: `{id}` cannot be started: port taken")), "{done:?}");
}

#[test]
fn a_first_release_that_fails_leaves_nothing_and_a_hold() {
    let mut world = World::new();
    world.well = false;
    world.want(generation(1, 1, false), false);
    world.settle();
    world.later(60);
    let done = world.settle();
    assert_eq!(done[0], "log");
    assert_eq!(done[1..3], ["stop 1.1, keep its log", "tell hold: 0/1 healthy after 60 s: connection refused"]);
    assert_eq!(done.last().map(String::as_str), Some("report unhealthy"), "{done:?}");
    assert_eq!(world.live(), None);
    assert_eq!(world.environment.rollout.as_ref().unwrap().outcome.as_ref().unwrap().log, ["panic"]);
    // It is not tried again before somebody says so.
    assert_eq!(world.settle(), [""; 0]);
    world.well = true;
    world.environment.given_up = None;
    assert_eq!(world.settle(), ["start 1.1", "serve 1.1"]);
    // The ledger knows that it was ill: that it is well has to last.
    world.later(5);
    assert_eq!(world.settle(), ["report healthy"]);
}

/// Failures after the switch: blue is back, the ledger told.
#[test]
fn failures_after_the_switch() {
    let cases: &[(&str, fn(&mut World), &str)] = &[
        ("ill", |world| world.health(2, false), "is not healthy any more after the switch: status 500"),
        (
            "errors",
            |world| world.figures(2, 1000, 50, 10.0),
            "50 of 1000 requests failed after the switch, 5.0 % where 2.0 % are allowed",
        ),
        (
            "slow",
            |world| world.figures(2, 1000, 5, 400.0),
            "the 99th percentile of latency is 400 ms after the switch and was 20 ms",
        ),
        ("aborted", |world| world.environment.abort = Some(Pause { by: "Ann".into(), reason: String::new() }), "aborted by Ann"),
        (
            "gone",
            |world| world.seen.instances.retain(|id, _| id.contains(&generation(1, 1, false).id)),
            "is not healthy any more",
        ),
    ];
    for (name, happens, reason) in cases {
        let mut world = World::with_blue(1, false);
        world.figures(1, 1000, 10, 20.0);
        world.want(generation(2, 1, false), false);
        world.settle();
        world.later(3);
        world.figures(2, 10, 0, 10.0);
        assert_eq!(world.settle(), [""; 0], "{name}");
        happens(&mut world);
        // What is gone comes again, and too late.
        let done = world.settle();
        let told: Vec<&String> = done.iter().filter(|line| line.starts_with("tell rollback: ")).collect();
        assert!(told.len() == 1 && told[0].contains(reason), "{name}: {done:?}");
        assert!(done.contains(&"serve 1.1".to_owned()), "{name}: {done:?}");
        assert_eq!(world.live(), Some("1.1"), "{name}");
        assert!(world.seen.instances.values().all(|found| found.generation == generation(1, 1, false).id), "{name}");
        assert_eq!(world.settle(), [""; 0], "{name}");
    }
}

#[test]
fn few_requests_and_small_differences_say_nothing() {
    let cases = [(10, 10, 900.0), (1000, 19, 20.0), (1000, 0, 44.0)];
    for (requests, errors, p99) in cases {
        let mut world = World::with_blue(1, false);
        world.figures(1, 1000, 10, 20.0);
        world.want(generation(2, 1, false), false);
        world.settle();
        world.figures(2, requests, errors, p99);
        world.later(30);
        world.settle();
        assert_eq!(world.phase(), Some((Phase::Done, Some(Ending::Succeeded))), "{requests} {errors} {p99}");
    }
}

#[test]
fn frozen_where_it_stands() {
    let mut world = World::with_blue(1, false);
    world.settings().on_failure = OnFailure::Freeze;
    world.want(generation(2, 1, false), false);
    world.settle();
    world.health(2, false);
    world.later(3);
    let done = world.settle();
    assert!(done.iter().any(|line| line.starts_with("tell freeze: ")), "{done:?}");
    assert_eq!((world.live(), world.phase()), (Some("1.2"), Some((Phase::Failed, Some(Ending::Failed)))));
    assert_eq!(world.environment.warm.as_ref().map(|warm| world.version(&warm.generation)), Some("1.1"));
    // An abort goes back whatever the settings say.
    let mut world = World::with_blue(1, false);
    world.settings().on_failure = OnFailure::Freeze;
    world.want(generation(2, 1, false), false);
    world.settle();
    world.environment.abort = Some(Pause { by: "Ann".into(), reason: String::new() });
    assert!(world.settle().contains(&"tell rollback: aborted by Ann".to_owned()));
    assert_eq!(world.live(), Some("1.1"));
}

#[test]
fn blue_that_died_comes_back_before_it_is_live() {
    let mut world = World::with_blue(1, false);
    world.want(generation(2, 1, false), false);
    world.settle();
    let blue = generation(1, 1, false).id;
    world.seen.instances.retain(|_, found| found.generation != blue);
    world.health(2, false);
    world.later(3);
    world.well = false;
    world.settle();
    // Blue is being started, and green stays.
    assert_eq!((world.live(), world.phase()), (Some("1.2"), Some((Phase::RollingBack, None))));
    world.health(1, true);
    let done = world.settle();
    assert_eq!(done[0], "serve 1.1", "{done:?}");
    // It never comes back: green stays, ill as it is, and the ledger is told to hold.
    let mut world = World::with_blue(1, false);
    world.want(generation(2, 1, false), false);
    world.settle();
    world.seen.instances.retain(|_, found| found.generation != blue);
    world.health(2, false);
    world.later(3);
    world.well = false;
    world.settle();
    world.later(60);
    let done = world.settle();
    assert!(done.iter().any(|line| line.starts_with("tell hold: ") && line.contains("blue did not come back")), "{done:?}");
    assert_eq!(world.live(), Some("1.2"));
}

#[test]
fn blue_half_alive_is_better_than_a_dead_green() {
    let mut world = World::with_blue(2, false);
    world.want(generation(2, 2, false), false);
    world.settle();
    world.later(3);
    world.health(2, false);
    world.seen.instances.values_mut().find(|found| found.generation == generation(1, 1, false).id).unwrap().healthy = false;
    let done = world.settle();
    assert!(done.contains(&"serve 1.1".to_owned()), "{done:?}");
    assert!(done.iter().any(|line| line.contains("(by force: 1 of 2 instances of blue are healthy)")), "{done:?}");
}

#[test]
fn checks_before_and_after() {
    let check = |path: &str| vec![RolloutCheck { ask: Ask::Http(path.into()), timeout: Seconds(5) }];
    for (before, after, live) in [(true, true, "1.2"), (false, true, "1.1"), (true, false, "1.1")] {
        let mut world = World::with_blue(1, false);
        (world.settings().pre_switch, world.settings().post_switch) = (check("/a"), check("/b"));
        let green = generation(2, 1, false);
        let answer = |good: bool| if good { Ok("200".to_owned()) } else { Err("status 500".to_owned()) };
        if !before {
            world.seen.checked.insert((green.id.clone(), false), answer(false));
        }
        if !after {
            world.seen.checked.insert((green.id.clone(), true), answer(false));
        }
        world.want(green, false);
        let done = world.settle();
        assert_eq!(world.live(), Some(live), "{before} {after}: {done:?}");
        assert_eq!(done.contains(&"check 1.2 before".to_owned()), before, "{done:?}");
        assert_eq!(done.contains(&"serve 1.2".to_owned()), before, "{done:?}");
        let told = done.iter().any(|line| line.starts_with("tell rollback: the check ") && line.ends_with("says no: status 500"));
        assert_eq!(told, live == "1.1", "{done:?}");
    }
}

#[test]
fn paused_and_resumed() {
    let pause = || Some(Pause { by: "Ann".into(), reason: String::new() });
    // What comes while it is paused waits; what had begun does not switch.
    let mut world = World::with_blue(1, false);
    world.environment.paused = pause();
    world.want(generation(2, 1, false), false);
    assert_eq!(world.settle(), [""; 0]);
    assert_eq!(world.phase(), Some((Phase::Waiting, None)));
    world.environment.paused = None;
    world.well = false;
    assert_eq!(world.settle(), ["start 1.2"]);
    world.environment.paused = pause();
    world.health(2, true);
    assert_eq!(world.settle(), [""; 0]);
    assert_eq!(world.phase(), Some((Phase::PreSwitch, None)));
    assert_eq!(serving(&world.environment, world.look()).preview, Some(generation(2, 1, false).id));
    world.later(1000);
    assert_eq!(world.settle(), [""; 0]);
    world.environment.paused = None;
    assert_eq!(world.settle(), ["serve 1.2"]);
}

#[test]
fn superseded_before_and_after_the_switch() {
    let mut world = World::with_blue(1, false);
    world.well = false;
    world.want(generation(2, 1, false), false);
    world.settle();
    world.well = true;
    world.want(generation(3, 1, false), false);
    assert_eq!(world.settle(), ["stop 1.2", "start 1.3", "serve 1.3", "forget 1.2"]);
    // Back to blue in the middle of the watch: it runs still.
    world.want(generation(1, 1, false), true);
    assert_eq!(world.settle(), ["serve 1.1", "report healthy"]);
    // A rollback to what is live before the switch only stops green.
    world.well = false;
    world.want(generation(4, 1, false), false);
    assert_eq!(world.settle(), ["stop 1.3", "start 1.4", "forget 1.3"]);
    world.want(generation(1, 1, false), true);
    assert_eq!(world.settle(), ["stop 1.4, keep its log", "report healthy"]);
    assert_eq!(world.phase(), Some((Phase::Failed, Some(Ending::Superseded))));
}

#[test]
fn exclusive_volumes_have_one_owner() {
    let mut world = World::with_blue(1, true);
    world.want(generation(2, 1, true), false);
    assert_eq!(world.settle(), ["serve nothing", "stop 1.1", "start 1.2", "serve 1.2"]);
    world.later(30);
    assert_eq!(world.settle(), ["forget 1.1", "report healthy"]);
    assert_eq!(world.environment.warm, None);
    // Green fails before: blue comes back.
    world.well = false;
    world.want(generation(3, 1, true), false);
    assert_eq!(world.settle(), ["serve nothing", "stop 1.2", "start 1.3"]);
    assert!(serving(&world.environment, world.look()).hold);
    // Blue's end is not green's time.
    world.later(60);
    assert_eq!(world.settle(), [""; 0]);
    world.later(10);
    world.well = true;
    let done = world.settle();
    let expected = [
        "log",
        "stop 1.3, keep its log",
        "start 1.2",
        "serve 1.2",
        "tell rollback: 0/1 healthy after 70 s: connection refused",
        "report healthy",
    ];
    assert_eq!(done, expected);
    // Green fails after: it gives the volume back.
    world.want(generation(4, 1, true), false);
    assert_eq!(world.settle(), ["serve nothing", "stop 1.2", "forget 1.3", "start 1.4", "serve 1.4"]);
    world.health(4, false);
    world.later(3);
    let done = world.settle();
    assert_eq!(done[..5], ["serve nothing", "log", "stop 1.4, keep its log", "start 1.2", "serve 1.2"], "{done:?}");
    // A newer decision while blue is away: blue comes back first.
    world.want(generation(5, 1, true), false);
    world.well = false;
    world.settle();
    world.well = true;
    world.want(generation(6, 1, true), false);
    let done = world.settle();
    assert_eq!((world.live(), done.iter().filter(|line| line.starts_with("tell")).count()), (Some("1.6"), 0), "{done:?}");
}

#[test]
fn an_unseen_target_is_left_alone() {
    let mut world = World::with_blue(1, false);
    world.seen.blind.insert("main".into());
    let instances = std::mem::take(&mut world.seen.instances);
    assert_eq!(world.settle(), [""; 0]);
    world.later(10);
    assert_eq!(world.settle(), ["report unhealthy"]);
    world.seen.blind.clear();
    world.seen.instances = instances;
    world.settle();
    // Gone for good, as after a reboot: started again.
    world.seen.instances.values_mut().for_each(|found| found.status = Running::Ended { status: "gone".into() });
    assert_eq!(world.settle(), ["stop 1.1, keep its log", "start 1.1"]);
}

/// The machine restarted while green was watched.
#[test]
fn what_ended_while_nobody_looked_is_no_failure() {
    let mut world = World::with_blue(2, false);
    world.want(generation(2, 2, false), false);
    world.settle();
    assert_eq!(world.phase(), Some((Phase::Watching, None)));
    for found in world.seen.instances.values_mut() {
        (found.status, found.healthy) = (Running::Ended { status: "gone with the last boot".into() }, false);
    }
    let mut environment = world.environment.clone();
    assert!(environment.missed(world.look()));
    world.environment = environment;
    let done = world.settle();
    assert_eq!((world.live(), world.phase()), (Some("1.2"), Some((Phase::Done, Some(Ending::Succeeded)))), "{done:?}");
    assert!(!done.iter().any(|line| line.starts_with("tell")), "{done:?}");
    assert_eq!(done.iter().filter(|line| *line == "start 1.2").count(), 2, "{done:?}");
}

#[test]
fn what_belongs_to_nothing_is_stopped() {
    let mut world = World::with_blue(1, false);
    let stray = generation(7, 1, false);
    let found = world.seen.instances.values().next().unwrap().clone();
    world.seen.instances.insert(stray.places(NAME)[0].id.clone(), Instance { generation: stray.id, ..found });
    assert_eq!(world.settle(), ["stop 1.7"]);
    // The environment is not in the ledger any more.
    world.wanted = None;
    assert_eq!(world.settle(), ["serve nothing", "stop 1.1, keep its log"]);
}

#[test]
fn nothing_begins_while_the_state_is_not_to_be_trusted() {
    let mut world = World::with_blue(1, false);
    world.seen.read_only = Some("the state file is corrupt".into());
    world.want(generation(2, 1, false), false);
    let stray = generation(7, 1, false);
    let found = world.seen.instances.values().next().unwrap().clone();
    world.seen.instances.insert(stray.places(NAME)[0].id.clone(), Instance { generation: stray.id, ..found });
    assert_eq!(world.settle(), [""; 0]);
    world.seen.read_only = None;
    assert_eq!(world.settle(), ["stop 1.7", "start 1.2", "serve 1.2"]);
}

#[test]
fn those_that_belong_together_wait_for_each_other() {
    let mut world = World::with_blue(1, false);
    world.seen.peers.ready = false;
    world.want(generation(2, 1, false), false);
    assert_eq!(world.settle(), ["start 1.2"]);
    assert_eq!(world.phase(), Some((Phase::Switching, None)));
    assert!(world.environment.is_ready(world.look()));
    world.seen.peers.ready = true;
    assert_eq!(world.settle(), ["serve 1.2"]);
    world.seen.peers.watched = false;
    world.later(30);
    assert_eq!(world.settle(), [""; 0]);
    world.seen.peers.failed = Some("`cart/prod`: status 500".into());
    assert!(world.settle().contains(&"serve 1.1".to_owned()));
}

#[test]
fn the_switch_refuses() {
    let mut world = World::with_blue(1, false);
    world.want(generation(2, 1, false), false);
    // Only the plan, not the switch.
    world.environment = next(&world.environment, world.look());
    for action in actions(&world.environment, world.look()) {
        world.act(action);
    }
    world.environment = next(&world.environment, world.look());
    assert_eq!(world.live(), Some("1.2"));
    world.seen.switch_error = Some("two claim one route".into());
    world.done.clear();
    world.environment = next(&world.environment, world.look());
    world.seen.switch_error = None;
    let done = world.settle();
    assert_eq!(done[1], "tell rollback: the switch does not take it: two claim one route");
}

#[test]
fn the_state_reads_back() {
    let mut world = World::with_blue(2, false);
    world.well = false;
    world.want(generation(2, 2, false), false);
    world.settle();
    world.later(60);
    world.pass();
    let text = serde_json::to_string(&world.environment).unwrap();
    assert_eq!(serde_json::from_str::<Environment>(&text).unwrap(), world.environment);
}
