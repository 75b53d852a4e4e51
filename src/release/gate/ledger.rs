//! Gates whose answers follow from the ledger: healthy, soak, approve, window.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};

use super::{Question, allow, deny};
use crate::config::types::{Approve, Seconds, Upstream, Window};
use crate::release::decision::{Answer, Status, Verdict};
use crate::release::state::State;

/// The release is healthy in an environment it comes from, in all of them where the policy says `all`.
pub(super) fn healthy(question: &Question<'_>) -> Answer {
    upstream(question, |name, state| {
        let current = state.current.as_ref().filter(|binding| binding.release == question.release);
        if current.is_some() {
            return match state.health.status {
                Status::Healthy => allow(format!("in {name} since {}", state.health.since)),
                Status::Unhealthy => deny(format!("unhealthy in {name} since {}", state.health.since)),
                Status::Unknown => Answer::new("", Verdict::Unknown, format!("nobody knows how it does in {name}")),
            };
        }
        match state.before.iter().find(|past| past.binding.release == question.release) {
            Some(past) if past.healthy => allow(format!("in {name} until {}", past.until)),
            Some(past) => deny(format!("was not healthy in {name} when it left on {}", past.until)),
            None => deny(format!("was never in {name}")),
        }
    })
}

/// The release has been there, healthy, without a break, for `time`.
pub(super) fn soak(time: Seconds, question: &Question<'_>) -> Answer {
    upstream(question, |name, state| {
        let current = state.current.as_ref().filter(|binding| binding.release == question.release);
        match state.soaked(&question.release, question.time) {
            None => Answer::new("", Verdict::Unknown, format!("the clock went back since the release came to {name}")),
            Some(seconds) if seconds >= time.0 => allow(format!("in {name} for {}", Seconds(seconds))),
            Some(seconds) => {
                let is_there = current.is_some();
                let healthy = is_there && state.health.status == Status::Healthy;
                let left = SignedDuration::from_secs(i64::try_from(time.0 - seconds).unwrap_or(i64::MAX));
                let next = if healthy { question.time.checked_add(left).ok() } else { None };
                let reason = match (is_there, healthy) {
                    (true, true) => format!("{} of {time} in {name}", Seconds(seconds)),
                    (true, false) => format!("not known to be healthy in {name}"),
                    (false, _) => format!("{} of {time} in {name}, and it is there no more", Seconds(seconds)),
                };
                let verdict = if is_there && state.health.status == Status::Unknown { Verdict::Unknown } else { Verdict::Deny };
                Answer { next, ..Answer::new("", verdict, reason) }
            }
        }
    })
}

/// Joins what is said of each upstream environment: one yes is enough, or all must say it.
fn upstream(question: &Question<'_>, of: impl Fn(&str, &State) -> Answer) -> Answer {
    let policy = question.view.policy;
    let Some(environment) = policy.environments.get(question.environment) else {
        return Answer::new("", Verdict::Unknown, "there is no such environment");
    };
    let names = environment.from.names();
    let mut answers: Vec<Answer> = names
        .iter()
        .map(|name| {
            let shown = format!("{}/{name}", policy.pipeline);
            match question.view.states.get(name) {
                Some(state) => of(&shown, state),
                None => Answer::new("", Verdict::Unknown, format!("the ledger has no state of {shown}")),
            }
        })
        .collect();
    if answers.is_empty() {
        return Answer::new("", Verdict::Unknown, "releases enter here: there is nowhere to look");
    }
    if let Upstream::All(_) = environment.from {
        // The one that stands in the way longest is the answer.
        answers.sort_by_key(|answer| (weight(answer), answer.next.is_some(), std::cmp::Reverse(answer.next)));
    } else {
        answers.sort_by_key(|answer| (std::cmp::Reverse(weight(answer)), answer.next.is_none(), answer.next));
    }
    answers.swap_remove(0)
}

/// Unknown before deny before allow.
fn weight(answer: &Answer) -> u8 {
    match answer.verdict {
        Verdict::Unknown => 0,
        Verdict::Deny | Verdict::Overridden => 1,
        Verdict::Allow => 2,
    }
}

/// Enough different people with the role said yes to exactly this pair; where there are people, those that still have the
/// role, by signed decisions. The author of the release counts, but not alone.
pub(super) fn approve(wanted: &Approve, question: &Question<'_>) -> Answer {
    let Some(state) = question.state() else {
        return Answer::new("", Verdict::Unknown, "the ledger has no state of the environment");
    };
    let people = &question.view.policy.people;
    let may = |name: &str| people.get(name).is_some_and(|person| person.roles.contains(&wanted.role));
    let pair = (question.release, question.config);
    let counted: BTreeSet<&str> = state
        .approvals
        .iter()
        .filter(|approval| (approval.release, approval.config) == pair)
        .filter(|approval| people.is_empty() || (approval.signed && may(&approval.by)))
        .map(|approval| approval.by.as_str())
        .collect();
    let names = counted.iter().copied().collect::<Vec<_>>().join(", ");
    let by = if names.is_empty() { String::new() } else { format!(" by {names}") };
    let reason = format!("{} of {} approvals{by}", counted.len(), wanted.count);
    if counted.len() < wanted.count as usize {
        let other = state.approvals.iter().any(|approval| approval.release == pair.0 && approval.config != pair.1);
        let void = if other { "; others were for another configuration" } else { "" };
        return deny(reason + void);
    }
    match question.author {
        Some(author) if counted.iter().all(|name| *name == author) => {
            deny(format!("{reason}, who made the release: somebody else has to approve too"))
        }
        _ => allow(reason),
    }
}

/// `time` lies in an open window.
pub(super) fn window(window: &Window, time: Timestamp) -> Answer {
    let schedule = match window.schedule() {
        Ok(schedule) => schedule,
        Err(wrong) => return Answer::new("", Verdict::Unknown, wrong.message),
    };
    if schedule.is_open(time) {
        return allow("open");
    }
    let next = schedule.next_open(time);
    let reason = match next {
        Some(next) => {
            let local = next.to_zoned(schedule.zone.clone());
            format!("opens {} ({})", local.strftime("%A %F %H:%M"), window.timezone)
        }
        None => "no opening is in sight".into(),
    };
    Answer { next, ..deny(reason) }
}
