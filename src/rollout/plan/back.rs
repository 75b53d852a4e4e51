//! The way back of a rollout: blue gets live again, the last lines of green are kept, and the ledger is told.

use super::{Environment, Failure, Look, Verdict, VerdictKind, goes_back};
use crate::config::types::OnFailure;
use crate::rollout::view::Result as Ending;

/// Longest wait for the last lines of the instance that failed, in milliseconds.
const LOG_WAIT: u64 = 3_000;

impl Environment {
    pub(super) fn back_step(&mut self, look: Look<'_>) -> bool {
        self.take_log(look) || self.restore(look)
    }

    /// The lines of the instance that failed, before it is stopped.
    fn take_log(&mut self, look: Look<'_>) -> bool {
        let Some(rollout) = &mut self.rollout else { return false };
        let waited = look.now.steady.saturating_sub(rollout.entered);
        let Some(failure) = rollout.failure.as_mut().filter(|failure| !failure.logged) else { return false };
        let lines = failure.instance.as_ref().and_then(|instance| look.seen.logs.get(instance));
        if lines.is_none() && waited < LOG_WAIT {
            return false;
        }
        failure.log = lines.cloned().unwrap_or_default();
        failure.logged = true;
        true
    }

    /// Brings back what was live before, and ends the rollout when that is done.
    fn restore(&mut self, look: Look<'_>) -> bool {
        let Some(rollout) = self.active() else { return false };
        let Some(failure) = rollout.failure.clone() else { return false };
        let green = rollout.generation.clone();
        let late = look.now.steady.saturating_sub(rollout.entered) >= look.settings().deadline.0.saturating_mul(1000);
        let green_is_live = self.live.as_deref() == Some(&green);
        // Frozen: green stays where it is. But nobody is left without anything.
        let stays = green_is_live && !goes_back(&failure, &look.settings());
        let blue = rollout.from.clone().filter(|blue| self.generations.contains_key(blue));
        let exclusive = rollout.exclusive;
        match blue {
            Some(blue) if !stays && self.live.as_deref() != Some(&blue) => {
                if exclusive && green_is_live {
                    (self.live, self.health) = (None, None);
                    self.note(look.now, "requests wait: green gives its volumes back to blue");
                    return true;
                }
                let Some(generation) = self.known(&blue) else { return false };
                let (healthy, wanted) = look.healthy(generation);
                let green_healthy = self.known(&green).map_or(0, |generation| look.healthy(generation).0);
                if healthy == wanted {
                    self.make_live(look, blue, None);
                    self.note(look.now, "switched back");
                    return true;
                }
                let better = healthy > 0 && green_healthy == 0;
                if better || late && (self.live.is_none() || healthy > green_healthy) {
                    let why = format!("{healthy} of {wanted} instances of blue are healthy");
                    self.note(look.now, format!("switched back by force: {why}"));
                    self.make_live(look, blue, Some(why));
                    return true;
                }
                if !late {
                    return false;
                }
                self.finish(look, failure, Some("blue did not come back, so that green stays"))
            }
            _ => self.finish(look, failure, None),
        }
    }

    /// Ends the rollout, with what the ledger is to be told.
    fn finish(&mut self, look: Look<'_>, failure: Failure, but: Option<&str>) -> bool {
        if !failure.logged {
            return false;
        }
        let Some(rollout) = self.active() else { return false };
        let (green, from, switched) = (rollout.generation.clone(), rollout.from.clone(), rollout.switched.is_some());
        let forced = self.forced.as_ref().filter(|_| self.live != Some(green.clone())).map(|why| format!(" (by force: {why})"));
        let reason = match but {
            Some(but) => format!("{}; {but}", failure.reason),
            None => failure.reason.clone() + &forced.unwrap_or_default(),
        };
        // Only what the ledger still wants is a verdict about; superseded rollouts have theirs already.
        if look.target().is_some_and(|wanted| wanted.id == green) {
            let back = self.live_generation().filter(|live| live.id != green);
            let back = back.map(|live| VerdictKind::Rollback(live.release, live.config.digest()));
            let kind = match back {
                _ if failure.result == Ending::Failed && look.settings().on_failure == OnFailure::Freeze => VerdictKind::Freeze,
                Some(back) => back,
                None => VerdictKind::Hold,
            };
            let (release, config) = (rollout.release, rollout.config);
            let log = failure.log.clone();
            let at = look.now.steady;
            self.verdict = Some(Verdict { at, failed: green.clone(), release, config, kind, reason: reason.clone(), log });
            self.given_up = Some(green.clone());
        }
        let stays = self.live.as_deref() == Some(&green);
        self.end(look, failure.result, &reason);
        if let Some(outcome) = self.rollout.as_mut().and_then(|rollout| rollout.outcome.as_mut()) {
            outcome.log = failure.log;
        }
        if let Some(blue) = from.filter(|_| stays && switched) {
            self.keep_warm(look, blue);
        }
        true
    }
}
