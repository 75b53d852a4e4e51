//! What the daemon tells: views of environments, of itself, and metrics.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::model::{Model, Shared};
use super::world::Reading;
use crate::config::types::RolloutSettings;
use crate::release::decision::Status;
use crate::rollout::plan::{self, Environment, Now, Peers, Seen};
use crate::rollout::target::Running;
use crate::rollout::view::{Daemon, FORMAT, InstanceView, Overview, Pair, Phase, Progress, Promise, Side, View};

/// Without a pass for this long the daemon is not well.
const STUCK: Duration = Duration::from_secs(30);

/// What the command line gave, for `GET /v1/status`.
#[derive(Debug, Clone)]
pub struct About {
    pub version: String,
    pub started: Timestamp,
    pub poll: Duration,
    pub listeners: Vec<String>,
}

/// Everything.
pub fn overview(shared: &Shared, about: &About) -> Overview {
    let mut model = shared.model();
    let names = model.names();
    let environments = names.iter().map(|name| of(shared, &mut model, name)).collect();
    let mut messages: Vec<String> = model.read_only.iter().chain(&model.unsaved).chain(&model.reading_error).cloned().collect();
    for (key, listing) in &model.lists {
        messages.extend(listing.error.as_ref().map(|error| format!("the target `{key}` does not answer: {error}")));
    }
    let daemon = Daemon {
        version: about.version.clone(),
        pid: std::process::id(),
        started: about.started,
        ledger_tip: model.reading.as_ref().and_then(|reading| reading.tip.clone()),
        last_pass: model.last_pass_wall,
        poll: about.poll.as_secs_f64(),
        listeners: about.listeners.clone(),
        messages,
    };
    Overview { format: FORMAT, daemon, environments }
}

/// One environment; `None`: nobody knows it.
pub fn view(shared: &Shared, name: &str) -> Option<View> {
    let mut model = shared.model();
    model.names().contains(name).then(|| of(shared, &mut model, name))
}

/// Whether passes are made.
pub fn is_well(shared: &Shared) -> bool {
    let model = shared.model();
    model.last_pass.elapsed() < STUCK
}

fn of(shared: &Shared, model: &mut Model, name: &str) -> View {
    let environment = model.environment(name);
    let seen = model.seen(name, &shared.switch, Peers::default());
    let now = model.now(shared.world.as_ref());
    let side = |id: &str| side(shared, model, &environment, &seen, now, name, id);
    let other = environment.active().map(|rollout| match &environment.live {
        Some(live) if *live == rollout.generation => rollout.from.clone(),
        _ => Some(rollout.generation.clone()),
    });
    let other = other.flatten().or_else(|| environment.warm.as_ref().map(|warm| warm.generation.clone()));
    let live = environment.live.as_deref().and_then(side);
    let other = other.as_deref().filter(|id| environment.live.as_deref() != Some(id)).and_then(side);
    let health = match environment.live_generation() {
        None => Status::Unknown,
        Some(generation) => {
            let (healthy, wanted) = model.look(name, &seen, now).healthy(generation);
            if healthy == wanted { Status::Healthy } else { Status::Unhealthy }
        }
    };
    let cache = model.cache(name).clone();
    let place = model.reading.as_ref().and_then(|reading| reading.environments.get(name));
    let blind = seen.blind.iter().next().map(|target| format!("the target `{target}` does not answer"));
    let waits = environment.paused.as_ref().map(|pause| {
        let why = if pause.reason.is_empty() { String::new() } else { format!(": {}", pause.reason) };
        format!("rollouts are paused by {}{why}", pause.by)
    });
    let forced = environment.forced.as_ref().map(|why| format!("live by force: {why}"));
    let gone = place.is_none().then(|| "the ledger does not have it".to_owned()).filter(|_| model.reading.is_some());
    let message = seen.read_only.clone().or(cache.untold).or(seen.switch_error.clone()).or(blind).or(waits).or(forced).or(gone);
    let wanted = place.and_then(|place| place.wanted.generation.as_ref()).map(|generation| Pair {
        release: generation.release,
        version: generation.version.clone(),
        config: generation.config.digest(),
    });
    View {
        wanted,
        environment: name.to_owned(),
        live,
        rollback: promise(&environment, model.reading.as_ref(), name, other.as_ref()),
        other,
        rollout: progress(&environment, now, place.map(|place| &place.wanted.settings)),
        maintenance: environment.maintenance.clone(),
        health,
        message,
    }
}

fn side(shared: &Shared, model: &Model, environment: &Environment, seen: &Seen, now: Now, name: &str, id: &str) -> Option<Side> {
    let known = environment.generations.get(id)?;
    let generation = &known.generation;
    let instances: Vec<InstanceView> = generation
        .places(name)
        .into_iter()
        .map(|place| {
            let found = seen.instances.get(&place.id);
            let kind = generation.targets.get(&place.target).map_or("", |target| target.kind()).to_owned();
            InstanceView {
                kind,
                status: found.map_or_else(|| "missing".into(), |found| status(&found.status)),
                healthy: found.is_some_and(|found| found.healthy),
                restarts: found.map_or(0, |found| found.restarts),
                last_probe: found.and_then(|found| found.last.clone()),
                memory: found.and_then(|found| found.memory),
                notes: model.find(&place.id).map(|(found, _)| found.notes).unwrap_or_default(),
                id: place.id,
                target: place.target,
            }
        })
        .collect();
    let (healthy, wanted) = model.look(name, seen, now).healthy(generation);
    let figures = shared.switch.figures(name, id);
    let warm = environment.warm.as_ref().filter(|warm| warm.generation == id);
    Some(Side {
        color: known.color,
        generation: id.to_owned(),
        release: generation.release,
        version: generation.version.clone(),
        config: generation.config.digest(),
        instances,
        healthy: u32::try_from(healthy).unwrap_or(u32::MAX),
        wanted: u32::try_from(wanted).unwrap_or(u32::MAX),
        since: known.since,
        requests: figures.requests,
        errors: figures.errors,
        in_flight: figures.in_flight,
        websockets: figures.websockets,
        streams: figures.streams,
        warm_until: warm.and_then(|warm| later(now, warm.until)),
    })
}

/// The time of the wall at `steady`.
fn later(now: Now, steady: u64) -> Option<Timestamp> {
    let left = i64::try_from(steady.saturating_sub(now.steady)).ok()?;
    now.wall.checked_add(SignedDuration::from_millis(left)).ok()
}

fn status(status: &Running) -> String {
    match status {
        Running::Starting => "starting".into(),
        Running::Running => "running".into(),
        Running::Waiting => "waiting".into(),
        Running::Ended { status } => format!("ended: {status}"),
    }
}

fn progress(environment: &Environment, now: Now, settings: Option<&RolloutSettings>) -> Option<Progress> {
    let rollout = environment.rollout.as_ref()?;
    let generation = environment.known(&rollout.generation);
    let gives_way = rollout.exclusive && rollout.from.is_some();
    let longest = settings.map_or(0, |settings| plan::start_limit(settings, generation, gives_way));
    let is_starting = rollout.outcome.is_none() && rollout.phase == Phase::Starting;
    Some(Progress {
        generation: rollout.generation.clone(),
        version: rollout.version.clone(),
        release: rollout.release,
        config: rollout.config,
        phase: rollout.phase,
        since: rollout.since,
        deadline: is_starting.then(|| later(now, rollout.entered.saturating_add(longest))).flatten(),
        paused: environment.paused.is_some(),
        steps: rollout.steps.clone(),
        outcome: rollout.outcome.clone(),
    })
}

/// What a rollback would take: warm, or as long as the last start.
fn promise(environment: &Environment, reading: Option<&Reading>, name: &str, other: Option<&Side>) -> Promise {
    let start = environment.last_start.map(|start| start as f64 / 1000.0);
    let exclusive = environment.live_generation().is_some_and(|live| live.is_exclusive());
    let warm = environment.live.is_some() && other.is_some_and(|other| other.wanted == other.healthy);
    let before_switch = environment.active().is_some_and(|rollout| rollout.switched.is_none());
    let about = start.map_or_else(String::new, |start| format!(", about {start:.1} s at the last start"));
    let known = reading.is_some_and(|reading| reading.environments.contains_key(name));
    let (warm, seconds, text) = match (known, exclusive, warm && !before_switch) {
        (false, ..) => (false, None, "nothing to go back to".to_owned()),
        (_, true, _) => {
            let text = format!("an exclusive volume changes hands: requests wait, and a rollback starts an instance{about}");
            (false, start, text)
        }
        (_, _, true) => (true, Some(0.1), "the one before is warm: below a second".to_owned()),
        _ => (false, start, format!("the one before is not warm: a rollback starts it{about}")),
    };
    Promise { warm, seconds, text }
}

/// Metrics in Prometheus' text format: the switch's, and those of the rollouts.
pub fn metrics(shared: &Shared) -> String {
    let mut text = shared.switch.metrics();
    let mut model = shared.model();
    let head = |text: &mut String, name: &str, kind: &str, help: &str| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    };
    head(&mut text, "pipeline_rollout_duration_seconds", "summary", "Rollouts that ended, and how long they took.");
    for ((environment, status), (count, sum)) in &model.ended {
        let labels = format!("environment=\"{environment}\",status=\"{status}\"");
        let _ = writeln!(text, "pipeline_rollout_duration_seconds_sum{{{labels}}} {sum}");
        let _ = writeln!(text, "pipeline_rollout_duration_seconds_count{{{labels}}} {count}");
    }
    head(&mut text, "pipeline_promotion_total", "counter", "Decisions that brought another release or configuration.");
    for ((stage, result), count) in &model.decided {
        let _ = writeln!(text, "pipeline_promotion_total{{stage=\"{stage}\",result=\"{result}\"}} {count}");
    }
    head(&mut text, "pipeline_stage_info", "gauge", "What is live in an environment.");
    let names = model.names();
    let views: Vec<View> = names.iter().map(|name| of(shared, &mut model, name)).collect();
    for view in &views {
        if let Some(live) = &view.live {
            let (stage, release, version) = (&view.environment, live.release.short(), &live.version);
            let version = version.replace(['\\', '"', '\n'], "_");
            let color = live.color;
            let labels = format!("stage=\"{stage}\",release=\"{release}\",version=\"{version}\",color=\"{color}\"");
            let _ = writeln!(text, "pipeline_stage_info{{{labels}}} 1");
        }
    }
    head(&mut text, "pipeline_rollout_active", "gauge", "Whether a rollout goes on.");
    for view in &views {
        let active = view.rollout.as_ref().is_some_and(|rollout| rollout.outcome.is_none());
        let _ = writeln!(text, "pipeline_rollout_active{{stage=\"{}\"}} {}", view.environment, u8::from(active));
    }
    head(&mut text, "pipeline_instances", "gauge", "Instances that should be there and that are healthy.");
    for view in &views {
        let stage = &view.environment;
        for side in view.live.iter().chain(&view.other) {
            let color = side.color;
            let _ = writeln!(text, "pipeline_instances{{stage=\"{stage}\",color=\"{color}\",state=\"wanted\"}} {}", side.wanted);
            let _ =
                writeln!(text, "pipeline_instances{{stage=\"{stage}\",color=\"{color}\",state=\"healthy\"}} {}", side.healthy);
        }
    }
    head(&mut text, "pipeline_passes_total", "counter", "Looks of the reconciler at everything.");
    let _ = writeln!(text, "pipeline_passes_total {}", model.passes);
    head(&mut text, "pipeline_last_pass_seconds", "gauge", "Seconds since the last one.");
    let _ = writeln!(text, "pipeline_last_pass_seconds {:.3}", model.last_pass.elapsed().as_secs_f64());
    text
}
