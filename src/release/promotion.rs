//! What a promotion, a new configuration or a rollback would do, before anybody does it.
//!
//! [`plan`] looks at the ledger, asks the gates and gives a [`Plan`]: what changes, every answer, whether it may happen and
//! when it could, and the [`Decision`] to commit. It changes nothing, and [`State::after`] is asked with the same decision,
//! so that a plan which is allowed is one the ledger takes.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::decision::{Answer, Configuration, Decision, Kind, Refused, Status, Verdict, Why};
use super::gate::{self, Evidence, FREEZE, HOLD, Question};
use super::state::{self, Inputs, State, View};
use crate::config::types::{Check, Environment, Gate, SecretRef, Upstream};
use crate::error::nearest;
use crate::oci::digest::Digest;

/// Rounds in which soak times, windows and freezes are asked again for the moment that all of them allow.
const OPENING_ROUNDS: usize = 16;

/// A release that could come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Candidate {
    pub release: Digest,
    pub version: String,
    /// Who made it, where that is known. What the ledger knows already wins.
    pub author: Option<String>,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Promote(Candidate),
    /// A new release comes in where releases enter.
    Enter(Candidate),
    /// Values and secret references that change; `None` takes one away.
    Configure {
        values: BTreeMap<String, Option<String>>,
        secrets: BTreeMap<String, Option<SecretRef>>,
    },
    Rollback(Back),
}

/// What a rollback goes back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Back {
    /// The newest that was healthy, see [`State::rollback`].
    Last,
    /// The newest pair with this release.
    To(Digest),
    /// Exactly this pair: release and digest of the configuration. It is what runs, and what the daemon goes back to.
    Pair(Digest, Digest),
}

/// Who wants it, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct Request<'r> {
    pub environment: &'r str,
    pub action: Action,
    pub actor: &'r str,
    /// Whether the commit will be signed by the key the policy has for the actor.
    pub signed: bool,
    pub reason: &'r str,
    /// Gates to go past, and [`FREEZE`].
    pub overrides: &'r [String],
    /// Lifts a hold.
    pub lift: bool,
    /// Nobody asked: a release upstream changed, or a build made one.
    pub automatic: bool,
    pub time: Timestamp,
}

/// What would happen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    pub pipeline: String,
    pub environment: String,
    pub from: Option<Pair>,
    /// `None`: there is no release here, and the configuration waits for one.
    pub to: Option<Pair>,
    /// `freeze` and `hold` where there are any, then the gates in the policy's order.
    pub answers: Vec<Answer>,
    pub allowed: bool,
    /// Why it is not allowed, when that is no gate's answer.
    pub refused: Option<String>,
    /// When everything that waiting can change lets it happen; `None`: now, or something else stands in the way.
    pub next: Option<Timestamp>,
    /// A new configuration that does not take effect before the gates let it.
    pub waits: bool,
    /// What to commit when it is allowed.
    pub decision: Decision,
}

/// A release with its configuration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Pair {
    pub release: Digest,
    pub version: String,
    pub config: Configuration,
}

impl From<&state::Binding> for Pair {
    fn from(binding: &state::Binding) -> Self {
        Self { release: binding.release, version: binding.version.clone(), config: binding.config.clone() }
    }
}

/// Plans `request` on the ledger `view`, asking `evidence` what the ledger does not say.
///
/// # Errors
/// It could not happen whatever the gates say: no such environment or gate, not upstream, marked bad, there already, no
/// right to, nothing to go back to.
pub fn plan(view: View<'_>, request: &Request<'_>, evidence: &dyn Evidence) -> Result<Plan, Refused> {
    let environment = view.policy.environment(request.environment)?;
    let state = view.state(request.environment)?;
    known_gates(environment, request.overrides)?;
    let wanted = Wanted::of(view, environment, state, request)?;
    let mut decision = wanted.decision(state, request);
    let inputs = Inputs { view, signed: request.signed, previous: None };
    let to = wanted.pair(state);
    let mut waits = decision.kind == Kind::Configure && (to.is_none() || !wanted.complete());
    if waits {
        decision.to = None;
    }
    // What no gate can change is said before any is asked.
    gates_apart(state.after(&decision, inputs))?;
    let mut answers = standing(view, state, request);
    let stopped = answers.iter().find(|answer| answer.stops()).map(|answer| answer.gate.clone());
    let gates: Vec<&Gate> = environment.gates.iter().filter(|gate| wanted.asks(&gate.check)).collect();
    let question = to.as_ref().map(|to| Question {
        view,
        environment: request.environment,
        release: to.release,
        version: &to.version,
        author: decision.author.as_deref(),
        config: to.config.digest(),
        actor: request.actor,
        reason: request.reason,
        time: decision.time,
    });
    if let Some(question) = &question {
        answers.extend(gate::ask_all(&gates, question, evidence, request.overrides, stopped.as_deref()));
    }
    let stops = answers.iter().any(Answer::stops);
    let next = question.filter(|_| stops).and_then(|question| opening(view, state, &gates, &answers, &question));
    decision.gates.clone_from(&answers);
    if decision.kind == Kind::Configure && stopped.is_none() && stops {
        // What the gates do not let through now is written down, and waits for `promote`.
        decision.to = None;
        waits = true;
    }
    let refused = gates_apart(state.after(&decision, inputs))?;
    Ok(Plan {
        pipeline: view.policy.pipeline.clone(),
        environment: request.environment.to_owned(),
        from: state.current.as_ref().map(Pair::from),
        allowed: refused.is_none(),
        refused: refused.filter(|_| !stops).map(|refused| refused.message),
        to,
        answers,
        next,
        waits,
        decision,
    })
}

/// What a gate, a freeze or a hold says is an answer of the plan; everything else ends it.
fn gates_apart(after: Result<State, Refused>) -> Result<Option<Refused>, Refused> {
    match after {
        Ok(_) => Ok(None),
        Err(refused) if matches!(refused.why, Why::Gate | Why::Frozen | Why::Held) => Ok(Some(refused)),
        Err(refused) => Err(refused),
    }
}

/// Every override is a gate of the environment, or the freeze.
fn known_gates(environment: &Environment, overrides: &[String]) -> Result<(), Refused> {
    let names: Vec<&str> = environment.gates.iter().map(|gate| gate.name.as_str()).chain([FREEZE]).collect();
    let Some(unknown) = overrides.iter().find(|name| !names.contains(&name.as_str())) else { return Ok(()) };
    let refused = Refused::new(Why::NoGate, format!("there is no gate `{unknown}` here"));
    Err(match nearest(unknown, names.iter().copied()) {
        _ if unknown == HOLD => refused.hint("a hold is lifted with `--lift`"),
        Some(near) => refused.hint(format!("did you mean `{near}`?")),
        None => refused.hint(format!("gates are `{}`", names.join("`, `"))),
    })
}

/// The freeze and the hold that are there, as answers.
fn standing(view: View<'_>, state: &State, request: &Request<'_>) -> Vec<Answer> {
    let mut answers = Vec::new();
    if let Some(freeze) = state.frozen(view.frozen, request.time) {
        let over = request.overrides.iter().any(|name| name == FREEZE);
        let verdict = if over { Verdict::Overridden } else { Verdict::Deny };
        let next = freeze.until.filter(|_| !over);
        answers.push(Answer { next, ..Answer::new(FREEZE, verdict, gate::freeze_reason(freeze)) });
    }
    let is_promotion = matches!(request.action, Action::Promote(_) | Action::Enter(_));
    if let Some(hold) = state.hold.as_ref().filter(|_| is_promotion) {
        let lifted = request.lift && !request.automatic;
        let reason = gate::hold_reason(hold);
        answers.push(match lifted {
            true => Answer::new(HOLD, Verdict::Allow, format!("lifted; it was {reason}")),
            false => Answer::new(HOLD, Verdict::Deny, reason),
        });
    }
    answers
}

/// The first moment at which everything that waiting can change says yes, when nothing else says no.
fn opening(view: View<'_>, state: &State, gates: &[&Gate], answers: &[Answer], question: &Question<'_>) -> Option<Timestamp> {
    let waits = |answer: &Answer| {
        answer.gate == FREEZE || gates.iter().any(|gate| gate.name == answer.gate && gate::is_about_time(&gate.check))
    };
    let not_asked = |answer: &Answer| answer.verdict == Verdict::Unknown && answer.reason.starts_with(gate::NOT_ASKED);
    if answers.iter().any(|answer| answer.stops() && !waits(answer) && !not_asked(answer)) {
        return None;
    }
    let over = |name: &str| answers.iter().any(|answer| answer.gate == name && answer.verdict == Verdict::Overridden);
    let mut time = question.time;
    for _ in 0..OPENING_ROUNDS {
        let at = Question { time, ..*question };
        let timed = gates.iter().filter(|gate| gate::is_about_time(&gate.check) && !over(&gate.name));
        let stops: Vec<Answer> = timed.filter_map(|gate| gate::known(gate, &at)).filter(Answer::stops).collect();
        let freeze = state.frozen(view.frozen, time).filter(|_| !over(FREEZE));
        if stops.is_empty() && freeze.is_none() {
            return Some(time).filter(|time| *time > question.time);
        }
        let mut latest = time;
        for next in stops.iter().map(|answer| answer.next).chain(freeze.map(|freeze| freeze.until)) {
            latest = latest.max(next?);
        }
        if latest <= time {
            return None;
        }
        time = latest;
    }
    None
}

/// A request, looked up in the ledger.
enum Wanted {
    /// With the configuration it would have.
    Promote(Kind, Candidate, Configuration),
    Configure(Configuration),
    Back(Box<state::Binding>),
}

impl Wanted {
    fn of(view: View<'_>, environment: &Environment, state: &State, request: &Request<'_>) -> Result<Self, Refused> {
        match &request.action {
            Action::Promote(candidate) | Action::Enter(candidate) => {
                let kind = if matches!(request.action, Action::Enter(_)) { Kind::Enter } else { Kind::Promote };
                let known = state::author(&view, environment, &candidate.release);
                let author = known.unwrap_or_else(|| candidate.author.clone());
                Ok(Self::Promote(kind, Candidate { author, ..candidate.clone() }, state.configuration(environment)))
            }
            Action::Configure { values, secrets } => {
                let mut config = state.configuration(environment);
                change(&mut config.values, values);
                change(&mut config.secrets, secrets);
                let running = state.current.as_ref().map(|binding| &binding.config);
                if config == state.configuration(environment) && running.is_none_or(|running| *running == config) {
                    return Err(Refused::new(Why::Nothing, format!("`{}` is configured like that already", state.name())));
                }
                Ok(Self::Configure(config))
            }
            Action::Rollback(back) => Ok(Self::Back(Box::new(self::back(state, *back)?))),
        }
    }

    fn decision(&self, state: &State, request: &Request<'_>) -> Decision {
        let kind = match self {
            Self::Promote(kind, ..) => *kind,
            Self::Configure(_) => Kind::Configure,
            Self::Back(_) => Kind::Rollback,
        };
        let current = state.current.as_ref();
        let mut decision = Decision {
            signed: request.signed,
            automatic: request.automatic,
            reason: request.reason.to_owned(),
            from: current.map(|binding| binding.release),
            overrides: request.overrides.to_vec(),
            lift: request.lift && state.hold.is_some() && matches!(kind, Kind::Promote | Kind::Enter),
            ..Decision::new(kind, request.actor, request.time)
        };
        let (to, version, author, config) = match self {
            Self::Promote(_, candidate, config) => {
                (Some(candidate.release), Some(candidate.version.clone()), candidate.author.clone(), config)
            }
            Self::Configure(config) => {
                decision.configuration = Some(config.clone());
                let author = current.and_then(|binding| binding.author.clone());
                (current.map(|binding| binding.release), current.map(|binding| binding.version.clone()), author, config)
            }
            Self::Back(binding) => {
                (Some(binding.release), Some(binding.version.clone()), binding.author.clone(), &binding.config)
            }
        };
        decision.config = Some(config.digest());
        Decision { to, version, author, ..decision }
    }

    fn pair(&self, state: &State) -> Option<Pair> {
        match self {
            Self::Promote(_, candidate, config) => {
                Some(Pair { release: candidate.release, version: candidate.version.clone(), config: config.clone() })
            }
            Self::Configure(config) => {
                state.current.as_ref().map(|current| Pair { config: config.clone(), ..Pair::from(current) })
            }
            Self::Back(binding) => Some(Pair::from(binding.as_ref())),
        }
    }

    /// Whether a gate with this check is asked.
    fn asks(&self, check: &Check) -> bool {
        match self {
            Self::Promote(..) => true,
            Self::Configure(_) => gate::is_about_the_pair(check),
            Self::Back(_) => false,
        }
    }

    /// Whether every secret has a value.
    fn complete(&self) -> bool {
        match self {
            Self::Promote(_, _, config) | Self::Configure(config) => config.unset().is_empty(),
            Self::Back(_) => true,
        }
    }
}

fn change<V: Clone>(values: &mut BTreeMap<String, V>, changes: &BTreeMap<String, Option<V>>) {
    for (name, value) in changes {
        match value {
            Some(value) => values.insert(name.clone(), value.clone()),
            None => values.remove(name),
        };
    }
}

/// The pair a rollback goes back to.
///
/// # Errors
/// There is none, it was never there, or it is marked bad.
pub fn back(state: &State, back: Back) -> Result<state::Binding, Refused> {
    let none = |message: String| Refused::new(Why::NoRollback, message);
    if state.current.is_none() {
        return Err(none(format!("`{}` has no release to go back from", state.name())));
    }
    match back {
        Back::Last => state.rollback().map(|past| past.binding.clone()).ok_or_else(|| {
            let refused = none(format!("no release before this one was healthy in `{}`", state.name()));
            match state.before.first() {
                Some(past) => refused.hint(format!("`--to {}` goes back to one that was not known to be", past.binding.version)),
                None => refused.hint("this is the first one"),
            }
        }),
        Back::Pair(release, config) => {
            let past = state.before.iter().find(|past| past.binding.pair() == (release, config));
            past.map(|past| past.binding.clone()).ok_or_else(|| {
                none(format!("release `{}` with that configuration was not in `{}`", release.short(), state.name()))
            })
        }
        Back::To(release) => {
            let current = state.current.as_ref().map(state::Binding::pair);
            let other = state.before.iter().find(|past| past.binding.release == release && Some(past.binding.pair()) != current);
            match other {
                Some(past) => Ok(past.binding.clone()),
                None if current.is_some_and(|(current, _)| current == release) => Err(Refused::new(
                    Why::AlreadyThere,
                    format!("release `{}` is in `{}` already", release.short(), state.name()),
                )),
                None => Err(none(format!("release `{}` was not in `{}`", release.short(), state.name()))
                    .hint("`pipeline history` shows what was there; others are promoted")),
            }
        }
    }
}

/// What `environment` could get next: the newest release that is current upstream, has not been here and is not marked bad
/// on the way. `None`: it has all there is, or releases enter there.
pub fn candidate(view: View<'_>, environment: &str) -> Result<Option<Candidate>, Refused> {
    let policy = view.policy.environment(environment)?;
    let state = view.state(environment)?;
    let upstream = policy.from.names().iter().filter_map(|name| view.states.get(name));
    let mut bindings: Vec<&state::Binding> = upstream.filter_map(|state| state.current.as_ref()).collect();
    bindings.sort_by_key(|binding| std::cmp::Reverse(binding.since));
    let new = |binding: &&&state::Binding| {
        !state.bindings().any(|known| known.release == binding.release)
            && !state.bad.contains_key(&binding.release)
            && state::came_through(&view, policy, environment, &binding.release).is_ok()
    };
    let found = bindings.iter().find(new);
    Ok(found.map(|binding| Candidate {
        release: binding.release,
        version: binding.version.clone(),
        author: binding.author.clone(),
    }))
}

/// The environments that take a release by themselves after something changed in `environment`, each with what it would
/// take; holds, freezes and gates are asked by [`plan`] with [`Request::automatic`].
pub fn automatic(view: View<'_>, environment: &str) -> Vec<(String, Candidate)> {
    let below = view.policy.downstream(environment).into_iter();
    let own = view.policy.environments.get(environment).filter(|policy| policy.from != Upstream::None).map(|_| environment);
    let names = below.chain(own).filter(|name| view.policy.environments.get(*name).is_some_and(|policy| policy.automatic));
    names.filter_map(|name| Some((name.to_owned(), candidate(view, name).ok()??))).collect()
}

/// How an environment does: that of its release, and `healthy` where nothing runs.
pub fn health(environment: &Environment, state: &State) -> Option<Status> {
    state.current.as_ref()?;
    Some(if environment.targets.is_empty() { Status::Healthy } else { state.health.status })
}

#[cfg(test)]
mod tests;
