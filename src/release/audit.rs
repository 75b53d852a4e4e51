//! Checks a ledger's history against the rules: that every state follows from the one before and the decision that made it.
//!
//! [`Ledger::verify`] looks at the chain, the objects and the signatures; [`check`] replays each commit with the functions
//! that decide, so that a commit written by hand has to fulfil the same rules as one of ours.

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};

use super::decision::{Decision, Frozen, Kind};
use super::desk::{self, Loaded};
use super::ledger::place::{FORMAT_FILE, Place};
use super::ledger::{Changed, Commit, Ledger, Signed, Snapshot, Verified};
use super::message;
use super::policy::Policy;
use super::state::{Inputs, State};

/// Clocks of several machines differ by this much at most.
pub const SKEW: SignedDuration = SignedDuration::from_mins(5);

/// Verifies the whole history at the time `now`.
///
/// # Errors
/// A repository that cannot be read at all; everything else is a finding.
pub fn verify(ledger: &Ledger, now: Timestamp) -> Result<Verified> {
    ledger.verify(&mut |commit, before, after| {
        let mut wrong = check(commit, before, after);
        if commit.time.duration_since(now) > SKEW {
            wrong.push(format!("it is of {}, which is yet to come by this machine's clock", commit.time));
        }
        Ok(wrong)
    })
}

/// What is wrong with one commit; nothing when it follows from what was before.
pub fn check(commit: &Commit, before: Option<&Snapshot>, after: &Snapshot) -> Vec<String> {
    let changed = match before.map_or_else(|| Ok(all(after)), |before| after.changed(before)) {
        Ok(changed) => changed,
        Err(error) => return vec![format!("what it changes cannot be read: {error:#}")],
    };
    let places: Vec<Place> =
        changed.iter().filter(|change| change.path != FORMAT_FILE).filter_map(|change| change.path.parse().ok()).collect();
    let wrong = match places.iter().find(|place| !matches!(place, Place::State { .. })) {
        Some(Place::Policy { pipeline }) => policy(commit, before, after, pipeline, &places),
        Some(_) => frozen(commit, before, after),
        None => match places.as_slice() {
            [Place::State { pipeline, environment }] => state(commit, before, after, pipeline, environment),
            _ => Ok(Some("it is no decision: it changes no policy and not one state".to_owned())),
        },
    };
    match wrong {
        Ok(wrong) => wrong.into_iter().collect(),
        Err(error) => vec![format!("{error:#}")],
    }
}

fn all(after: &Snapshot) -> Vec<Changed> {
    let paths = after.paths().unwrap_or_default();
    paths.into_iter().map(|path| Changed { after: after.blob(&path).ok().flatten(), before: None, path }).collect()
}

/// Whether the commit is signed by the key that `policy` has for its actor.
fn signed(commit: &Commit, policy: &Policy, actor: &str) -> bool {
    let key = policy.people.get(actor).and_then(|person| person.key.clone());
    key.is_some_and(|key| matches!(commit.signed(&[key]), Signed::By { .. }))
}

/// What is true of every commit: it says what the file says.
fn says(commit: &Commit, decision: &Decision, expected: &str) -> Option<String> {
    if commit.author.name != decision.actor {
        return Some(format!("it is by `{}`, and its decision by `{}`", commit.author.name, decision.actor));
    }
    if commit.time != decision.time {
        return Some(format!("it is of {}, and its decision of {}", commit.time, decision.time));
    }
    (commit.message.trim_end() != expected.trim_end()).then(|| "its message is not that of its decision".to_owned())
}

fn policy(
    commit: &Commit,
    before: Option<&Snapshot>,
    after: &Snapshot,
    pipeline: &str,
    places: &[Place],
) -> Result<Option<String>> {
    let Some(now) = desk::load(after, pipeline)? else { return Ok(Some(format!("it takes the policy of `{pipeline}` away"))) };
    let then = before.map(|before| desk::load(before, pipeline)).transpose()?.flatten();
    let Some(decision) = now.policy.decision.clone() else { return Ok(Some("the policy names no decision".to_owned())) };
    if let Some(wrong) = says(commit, &decision, &message::of_policy(&decision, pipeline)) {
        return Ok(Some(wrong));
    }
    let old = then.as_ref().map(|then| &then.policy);
    let by_key = old.is_some_and(|old| signed(commit, old, &decision.actor));
    let made = now.policy.clone().after(old, &Decision { signed: false, ..decision.clone() }, by_key);
    match made {
        Err(refused) => return Ok(Some(format!("it could not be decided: {refused}"))),
        Ok(made) if made != now.policy => return Ok(Some("the policy is not what its decision gives".to_owned())),
        Ok(_) => {}
    }
    let states = then.map(|then| then.states).unwrap_or_default();
    for name in now.policy.environments.keys() {
        let found = now.states.get(name);
        match states.get(name) {
            Some(kept) if found == Some(kept) => {}
            None if found == Some(&State::created(&now.policy, name, &decision)) => {}
            _ => return Ok(Some(format!("the state of `{pipeline}/{name}` does not follow from applying a policy"))),
        }
    }
    let gone = |place: &&Place| matches!(place, Place::State { environment, .. } if now.policy.environments.contains_key(environment) && states.contains_key(environment));
    Ok(places.iter().find(gone).map(|place| format!("`{place}` changes with a policy that has it already")))
}

fn state(
    commit: &Commit,
    before: Option<&Snapshot>,
    after: &Snapshot,
    pipeline: &str,
    environment: &str,
) -> Result<Option<String>> {
    let Some(before) = before else { return Ok(Some("it is the first, and applies no policy".to_owned())) };
    let Some(then) = desk::load(before, pipeline)? else { return Ok(Some(format!("`{pipeline}` has no policy"))) };
    let Some(bytes) = after.read(&desk::state_path(pipeline, environment))? else {
        return Ok(Some(format!("it takes the state of `{pipeline}/{environment}` away")));
    };
    let now = State::parse(&bytes)?;
    if let Some(wrong) = says(commit, &now.decision, &message::of_state(&now)) {
        return Ok(Some(wrong));
    }
    Ok(replay(commit, &then, &now))
}

/// Makes the decision again.
fn replay(commit: &Commit, then: &Loaded, now: &State) -> Option<String> {
    let Some(old) = then.states.get(&now.environment) else {
        return Some(format!("`{}` was not there before", now.name()));
    };
    let signed = signed(commit, &then.policy, &now.decision.actor);
    let inputs = Inputs { view: then.view(), signed, previous: now.previous.as_deref() };
    match old.after(&now.decision, inputs) {
        Err(refused) => Some(format!("it could not be decided: {refused}")),
        Ok(made) if made != *now => Some(format!("the state of `{}` is not what its decision gives", now.name())),
        Ok(_) => None,
    }
}

/// An emergency stop keeps no decision in its file: what it did is read from the difference, and who may from the commit.
fn frozen(commit: &Commit, before: Option<&Snapshot>, after: &Snapshot) -> Result<Option<String>> {
    let Some(before) = before else { return Ok(Some("it is the first, and applies no policy".to_owned())) };
    let (then, now) = (desk::frozen(before)?, desk::frozen(after)?);
    let mut policies = Vec::new();
    for pipeline in before.pipelines()? {
        policies.extend(desk::load(before, &pipeline)?.map(|loaded| loaded.policy));
    }
    let with: Vec<(&Policy, bool)> =
        policies.iter().map(|policy| (policy, signed(commit, policy, &commit.author.name))).collect();
    let Some(environment) = commit.trailer("Environment") else { return Ok(Some("it names no environment".to_owned())) };
    let kind = if commit.trailer("Decision") == Some("thaw") { Kind::Thaw } else { Kind::Freeze };
    let (reason, until) = match now.environments.get(environment).filter(|_| kind == Kind::Freeze) {
        Some(freeze) => (freeze.reason.clone(), freeze.until),
        None => (commit.body.clone(), None),
    };
    let decision = Decision { reason, until, ..Decision::new(kind, &commit.author.name, commit.time) };
    if let Some(wrong) = says(commit, &decision, &message::of_frozen(&decision, environment)) {
        return Ok(Some(wrong));
    }
    Ok(match then.after(environment, &decision, &with) {
        Err(refused) => Some(format!("it could not be decided: {refused}")),
        Ok(Frozen { environments, .. }) if environments != now.environments => {
            Some("the freezes are not what the decision gives".to_owned())
        }
        Ok(_) => None,
    })
}
