//! Waits for a rollout and shows its steps: what `promote`, `rollback`, `config set` and `secret set` do after their decision.
//!
//! [`Follower`] is pure: views go in, lines and the end come out. [`follow`] reads them from the daemon, opens the stream again
//! when the daemon is replaced or restarted, and leaves the rollout going when somebody presses ^C.

use std::time::{Duration, Instant};

use anyhow::Result;
use jiff::Timestamp;
use serde::Serialize;

use super::daemon::{Daemon, Next};
use super::{signals, ui};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::progress::Progress as _;
use crate::rollout::view::{Color, Outcome, Phase, Progress, Result as Ended, Side, View};

/// How long a daemon may be away while it is replaced or restarted. systemd starts one again within seconds.
const AWAY: Duration = Duration::from_secs(30);
/// How often ^C is looked for.
const TICK: Duration = Duration::from_millis(200);
/// How long to wait before the stream is opened again.
const PAUSE: Duration = Duration::from_millis(300);

/// The pair of a decision, and when it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// `shop/prod`.
    pub name: String,
    pub release: Digest,
    /// Digest of the configuration.
    pub config: Digest,
    /// Rollouts that were over before are about earlier decisions.
    pub since: Timestamp,
    pub until: Until,
}

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Requests go to what is wanted.
    Switch,
    /// Blue was drained, and green was watched.
    Done,
}

/// How waiting ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct End {
    /// Whether what is wanted serves.
    pub good: bool,
    /// One line.
    pub text: String,
    /// The last lines of what failed.
    pub log: Vec<String>,
    /// The rollout as it was last seen.
    pub rollout: Option<Progress>,
}

/// What was shown of a rollout so far.
#[derive(Debug, Default)]
pub struct Follower {
    /// Generation and begin of the rollout that is shown.
    shown: Option<(String, Timestamp)>,
    /// Texts of its steps.
    steps: Vec<String>,
    /// The last line about what is not a step yet.
    last: String,
}

impl Follower {
    /// The lines that `view` has in addition, and the end when this is it.
    pub fn see(&mut self, view: &View, wanted: &Wanted) -> (Vec<String>, Option<End>) {
        let mut lines = Vec::new();
        let own = view.rollout.as_ref().filter(|rollout| self.is_of(rollout, wanted));
        if let Some(rollout) = own {
            self.steps(rollout, view, &mut lines);
        } else if let Some(rollout) = view.rollout.as_ref().filter(|rollout| rollout.outcome.is_none()) {
            self.say(format!("the rollout of {} goes first: {}", rollout.version, rollout.phase), &mut lines);
        }
        if let Some(message) = &view.message {
            self.say(message.clone(), &mut lines);
        }
        (lines, end(view, wanted, own))
    }

    /// Whether a rollout is that of the decision: of its pair, and none that was over before. One that was shown stays it,
    /// and one that goes on is it, whatever the clock says.
    fn is_of(&self, rollout: &Progress, wanted: &Wanted) -> bool {
        let was_shown = self.shown.as_ref().is_some_and(|(id, since)| *id == rollout.generation && *since == rollout.since);
        let is_of_pair = rollout.release == wanted.release && rollout.config == wanted.config;
        is_of_pair && (was_shown || rollout.outcome.is_none() || rollout.since >= wanted.since)
    }

    fn steps(&mut self, rollout: &Progress, view: &View, lines: &mut Vec<String>) {
        let this = (rollout.generation.clone(), rollout.since);
        if self.shown.as_ref() != Some(&this) {
            *self = Self { shown: Some(this), ..Self::default() };
        }
        for (index, step) in rollout.steps.iter().enumerate() {
            if self.steps.get(index) == Some(&step.text) {
                continue;
            }
            let took = if step.seconds >= 0.05 { format!(" ({:.1} s)", step.seconds) } else { String::new() };
            lines.push(format!("{}: {}{took}", step.phase, step.text));
            self.last.clone_from(&step.text);
            self.steps.resize(self.steps.len().max(index + 1), String::new());
            self.steps[index].clone_from(&step.text);
        }
        if rollout.outcome.is_some() {
            return;
        }
        if rollout.paused {
            self.say(format!("paused in {}: `pipeline rollout resume {}` goes on", rollout.phase, view.environment), lines);
        } else if rollout.phase == Phase::Starting
            && let Some(green) =
                [&view.other, &view.live].into_iter().flatten().find(|side| side.generation == rollout.generation)
        {
            self.say(starting(green), lines);
        }
    }

    /// A line, unless it was the last one.
    fn say(&mut self, line: String, lines: &mut Vec<String>) {
        if self.last != line {
            self.last.clone_from(&line);
            lines.push(line);
        }
    }
}

/// `healthy 1/3`, and why the next one is not.
fn starting(green: &Side) -> String {
    let waiting = green.instances.iter().find(|instance| !instance.healthy && instance.last_probe.is_some());
    let why = waiting.and_then(|instance| Some(format!(": {} says {}", instance.id, instance.last_probe.as_ref()?)));
    format!("healthy {}/{}{}", green.healthy, green.wanted, why.unwrap_or_default())
}

fn end(view: &View, wanted: &Wanted, own: Option<&Progress>) -> Option<End> {
    let live = view.live.as_ref().filter(|live| live.release == wanted.release && live.config == wanted.config);
    let name = &wanted.name;
    let serves =
        |live: &Side| format!("{name}: {} serves ({}, healthy {}/{})", live.version, live.color, live.healthy, live.wanted);
    let good = |text: String| Some(End { good: true, text, log: Vec::new(), rollout: view.rollout.clone() });
    let bad = |text: String, log: &[String]| {
        let log = log.to_vec();
        Some(End { good: false, text, log, rollout: view.rollout.clone() })
    };
    let Some(rollout) = own else {
        let goes_on = view.rollout.as_ref().is_some_and(|rollout| rollout.outcome.is_none());
        // The daemon has read the ledger since the decision was made.
        let newer = view.wanted.as_ref().filter(|pair| (pair.release, pair.config) != (wanted.release, wanted.config));
        return match (live, newer) {
            // There was nothing to do.
            (Some(live), _) if !goes_on => good(serves(live)),
            (_, Some(pair)) => bad(format!("{name}: a newer decision took this one's place: {} is wanted", pair.version), &[]),
            _ => None,
        };
    };
    let switched = rollout.phase.is_after_switch() || rollout.phase == Phase::Done;
    match &rollout.outcome {
        None if wanted.until == Until::Switch && switched && live.is_some() => live.and_then(|live| good(serves(live))),
        None => None,
        Some(Outcome { result: Ended::Succeeded, reason, .. }) => {
            let more = if reason.is_empty() { String::new() } else { format!(": {reason}") };
            good(live.map_or_else(|| format!("{name}: {} was rolled out", rollout.version), serves) + &more)
        }
        Some(Outcome { result, reason, log }) => {
            let now = match &view.live {
                Some(live) => format!("; {} serves", live.version),
                None => "; nothing serves".into(),
            };
            let because = if reason.is_empty() { String::new() } else { format!(": {reason}") };
            bad(format!("{name}: the rollout of {} {}{because}{now}", rollout.version, verdict(*result)), log)
        }
    }
}

fn verdict(result: Ended) -> &'static str {
    match result {
        Ended::Succeeded => "succeeded",
        Ended::Failed => "failed",
        Ended::Superseded => "was superseded by a newer decision",
        Ended::Aborted => "was aborted",
    }
}

/// Follows the rollout of `wanted` until its end; `None`: somebody pressed ^C, and the rollout goes on.
///
/// # Errors
/// The daemon does not serve the environment any more, or does not come back.
pub fn follow(around: &ui::Surroundings, daemon: &Daemon, wanted: &Wanted) -> Result<Option<End>> {
    signals::watch()?;
    let mut follower = Follower::default();
    let mut gone: Option<Instant> = None;
    loop {
        if signals::exit_code().is_some() {
            around.progress.note(format!(
                "the rollout goes on without this command: `pipeline status {0} --watch` shows it, `pipeline rollout abort {0}` ends it",
                wanted.name
            ));
            return Ok(None);
        }
        let mut views = match daemon.watch(&wanted.name) {
            Ok(views) => views,
            Err(error) => {
                let since = *gone.get_or_insert_with(Instant::now);
                if since.elapsed() > AWAY {
                    let problem = Problem::transient(format!("the daemon that rolls out `{}` is gone", wanted.name))
                        .hint("the decision is in the ledger: the rollout goes on when `pipeline serve` runs again");
                    return Err(error.context(problem));
                }
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        gone = None;
        while signals::exit_code().is_none() {
            match views.next(TICK)? {
                Next::Nothing => {}
                Next::End => break,
                Next::View(view) => {
                    let (lines, end) = follower.see(&view, wanted);
                    lines.into_iter().for_each(|line| around.progress.note(format!("  {line}")));
                    if let Some(end) = end {
                        return Ok(Some(end));
                    }
                }
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What a rollback to `to` (`None`: the last pair that was healthy) is going to take, before it is decided.
pub fn promise(view: &View, to: Option<&Digest>) -> String {
    let warm = view.other.as_ref().filter(|other| view.rollback.warm && to.is_none_or(|to| *to == other.release));
    if let Some(other) = warm {
        return format!("{} ({}) is warm: under a second", other.version, other.color);
    }
    match (to, view.rollback.text.as_str()) {
        (None, text) if !text.is_empty() => text.to_owned(),
        _ => match view.rollback.seconds {
            Some(seconds) => format!("nothing is warm for it: about {} s", seconds.ceil().max(1.0)),
            None => "nothing is warm for it, and how long it takes to start is not known yet".into(),
        },
    }
}

/// Which side a color is.
pub fn side(view: &View, color: Color) -> Option<&Side> {
    [&view.live, &view.other].into_iter().flatten().find(|side| side.color == color)
}

#[cfg(test)]
pub(in crate::cli) mod tests;
