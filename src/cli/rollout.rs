//! `pipeline rollout pause|resume|abort`, `maintenance on|off`, and what `status` shows of a daemon's environments.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde_json::json;

use super::daemon::{Daemon, Next};
use super::desk::{Office, Place};
use super::{Global, report, signals, ui};
use crate::release::decision::Status;
use crate::rollout::view::{Do, Progress, Side, View};

/// How often ^C is looked for.
const TICK: Duration = Duration::from_millis(200);
/// How long to wait before the stream of a daemon that ended it is opened again.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Let the rollout go no further than it is; what serves goes on
    Pause(OrderArgs),
    /// Let a paused rollout go on
    Resume(OrderArgs),
    /// End the rollout: what was there before serves, and the decision is taken back in the ledger
    Abort(OrderArgs),
}

#[derive(Debug, clap::Args)]
pub struct OrderArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    /// Why; kept with the rollout
    #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
    reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// Answer all requests with 503 and the message
    On,
    /// Let requests through again
    Off,
}

#[derive(Debug, clap::Args)]
pub struct MaintenanceArgs {
    /// `on` answers all requests with 503 and the message; `off` lets them through again
    #[arg(value_name = "on|off", hide_possible_values = true)]
    switch: Switch,
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    /// What visitors read
    #[arg(long, value_name = "TEXT", default_value = "")]
    message: String,
}

pub fn run(global: &Global, verb: Verb) -> Result<u8> {
    let (what, args) = match verb {
        Verb::Pause(args) => (Do::Pause, args),
        Verb::Resume(args) => (Do::Resume, args),
        Verb::Abort(args) => (Do::Abort, args),
    };
    let (office, place) = at(global, &args.environment, args.pipeline.as_deref())?;
    let daemon = Daemon::of(global, &office.around.host)?;
    let view = daemon.order(&place.name(), what, &args.reason, office.name())?;
    show(global, &view)
}

pub fn maintenance(global: &Global, args: MaintenanceArgs) -> Result<u8> {
    let (office, place) = at(global, &args.environment, args.pipeline.as_deref())?;
    let daemon = Daemon::of(global, &office.around.host)?;
    let view = daemon.maintain(&place.name(), args.switch == Switch::On, &args.message)?;
    show(global, &view)
}

fn at(global: &Global, environment: &str, pipeline: Option<&str>) -> Result<(Office, Place)> {
    let office = Office::open(global, environment.split_once('/').map(|(name, _)| name).or(pipeline))?;
    let place = office.place(environment, pipeline)?;
    Ok((office, place))
}

fn show(global: &Global, view: &View) -> Result<u8> {
    ui::answer(global, &json!({"schema": 1, "environment": view}), || text(view, Timestamp::now()))?;
    Ok(0)
}

/// Shows `name` again whenever it changes, until ^C: on a terminal in one place, elsewhere one after another, with `--json` one
/// line each.
pub fn watch(global: &Global, daemon: &Daemon, name: &str) -> Result<u8> {
    let mut views = daemon.watch(name)?;
    signals::watch()?;
    let redraws = !global.json && std::io::stdout().is_terminal();
    let mut before: Option<View> = None;
    while signals::exit_code().is_none() {
        match views.next(TICK)? {
            Next::Nothing => {}
            Next::View(view) => {
                let changed = before.as_ref() != Some(&view);
                if redraws || changed {
                    draw(global, &view, redraws)?;
                }
                before = Some(*view);
            }
            Next::End => {
                std::thread::sleep(PAUSE);
                views = daemon.watch(name)?;
            }
        }
    }
    // ^C is how it is ended.
    Ok(0)
}

fn draw(global: &Global, view: &View, redraws: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let block = match (global.json, redraws) {
        (true, _) => serde_json::to_string(view)? + "\n",
        // Home, and clear what is below.
        (false, true) => format!("\x1b[H\x1b[2J{}", text(view, Timestamp::now())),
        (false, false) => text(view, Timestamp::now()) + "\n",
    };
    match out.write_all(block.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write the answer"),
    }
}

/// One environment for people: blue and green, and the rollout.
pub fn text(view: &View, now: Timestamp) -> String {
    let health = match view.health {
        Status::Healthy => "healthy",
        Status::Unhealthy => "UNHEALTHY",
        Status::Unknown => "health unknown",
    };
    let mut text = format!("{}: {health}\n", view.environment);
    if let Some(message) = &view.maintenance {
        let _ = writeln!(text, "  MAINTENANCE{}", if message.is_empty() { String::new() } else { format!(": {message}") });
    }
    if let Some(message) = &view.message {
        let _ = writeln!(text, "  {message}");
    }
    let mut rows = Vec::new();
    rows.extend(view.live.as_ref().map(|side| row(side, "live", now)));
    rows.extend(view.other.as_ref().map(|side| {
        let is_new =
            view.rollout.as_ref().is_some_and(|rollout| rollout.outcome.is_none() && rollout.generation == side.generation);
        row(side, if is_new { "new" } else { "before" }, now)
    }));
    if rows.is_empty() {
        text += "  nothing runs\n";
    }
    text += &report::table(&rows);
    let sides = [("live", &view.live), ("other", &view.other)];
    let instances = sides.iter().filter_map(|(_, side)| side.as_ref()).flat_map(instances).collect::<Vec<_>>();
    text += &report::table(&instances);
    if let Some(rollout) = &view.rollout {
        text += &progress(rollout, now);
    }
    if !view.rollback.text.is_empty() {
        let _ = writeln!(text, "  rollback: {}", view.rollback.text);
    }
    text
}

fn row(side: &Side, what: &str, now: Timestamp) -> Vec<String> {
    let open = [(side.in_flight, "in flight"), (side.websockets, "WebSockets"), (side.streams, "streams")];
    let open = open.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect::<Vec<_>>();
    let warm = side.warm_until.map(|until| match until.as_second() - now.as_second() {
        left if left > 0 => format!("warm for {}", length(left)),
        _ => "warm time is over".into(),
    });
    vec![
        format!("  {}", side.color),
        what.to_owned(),
        side.version.clone(),
        format!("healthy {}/{}", side.healthy, side.wanted),
        format!("{} requests, {} errors", side.requests, side.errors),
        open.into_iter().chain(warm).collect::<Vec<_>>().join(", "),
    ]
}

fn instances(side: &Side) -> Vec<Vec<String>> {
    let row = |instance: &crate::rollout::view::InstanceView| {
        let mut notes = Vec::new();
        notes.extend((instance.restarts > 0).then(|| format!("restarted {} times", instance.restarts)));
        notes.extend(instance.memory.map(report::bytes));
        notes.extend(instance.last_probe.as_ref().filter(|_| !instance.healthy).cloned());
        notes.extend(instance.notes.iter().cloned());
        let health = if instance.healthy { "healthy" } else { "not healthy" };
        vec![format!("    {}", instance.id), instance.kind.clone(), instance.status.clone(), health.into(), notes.join(", ")]
    };
    side.instances.iter().map(row).collect()
}

fn progress(rollout: &Progress, now: Timestamp) -> String {
    let state = match &rollout.outcome {
        Some(outcome) => format!("{}{}", outcome.result, colon(&outcome.reason)),
        None => {
            let left = rollout.deadline.map(|deadline| deadline.as_second() - now.as_second()).filter(|left| *left > 0);
            let left = left.map(|left| format!(", {} left", length(left))).unwrap_or_default();
            format!("{}{left}{}", rollout.phase, if rollout.paused { ", PAUSED" } else { "" })
        }
    };
    let mut text = format!("  rollout of {}: {state}\n", rollout.version);
    for step in &rollout.steps {
        let took = if step.seconds >= 0.05 { format!(" ({:.1} s)", step.seconds) } else { String::new() };
        let _ = writeln!(text, "    {}: {}{took}", step.phase, step.text);
    }
    for line in rollout.outcome.iter().flat_map(|outcome| &outcome.log) {
        let _ = writeln!(text, "    | {line}");
    }
    text
}

fn colon(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// Like `45s`, `12m` or `3h`.
fn length(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        _ => format!("{}h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests;
