//! Decisions: what somebody made of an environment, and why one is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::Result;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::policy::{self, FORMAT, Policy};
use crate::config::types::SecretRef;
use crate::error::Problem;
use crate::oci::digest::Digest;

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A policy took effect.
    Apply,
    /// A new release came in where releases enter.
    Enter,
    Promote,
    Approve,
    Rollback,
    Hold,
    Lift,
    Freeze,
    Thaw,
    /// Values or secret references changed.
    Configure,
    /// A bad mark was taken off.
    Clear,
    /// How the current release does, said by what serves it.
    Report,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Apply => "apply",
            Kind::Enter => "enter",
            Kind::Promote => "promote",
            Kind::Approve => "approve",
            Kind::Rollback => "rollback",
            Kind::Hold => "hold",
            Kind::Lift => "lift",
            Kind::Freeze => "freeze",
            Kind::Thaw => "thaw",
            Kind::Configure => "configure",
            Kind::Clear => "clear",
            Kind::Report => "report",
        })
    }
}

/// One decision, as it is kept in the state it made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    pub kind: Kind,
    pub actor: String,
    /// Whether the commit was signed by the key the policy has for the actor.
    #[serde(default, skip_serializing_if = "no")]
    pub signed: bool,
    /// Made by a program because a release upstream changed.
    #[serde(default, skip_serializing_if = "no")]
    pub automatic: bool,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// The release before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Digest>,
    /// The release it is about: the one that comes, is approved, gone back to or cleared. For [`Kind::Configure`]: the current
    /// one when the configuration takes effect at once, none when it waits for a promotion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Who made the release.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<String>,
    /// The configuration that goes with `to`: what the actor was shown, and what is approved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Digest>,
    /// [`Kind::Configure`]: everything that is configured from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub configuration: Option<Configuration>,
    /// What the gates answered, in the policy's order, after `freeze` and `hold` where there are any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<Answer>,
    /// Gates somebody wanted to go past.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<String>,
    /// Lifts the hold that is there.
    #[serde(default, skip_serializing_if = "no")]
    pub lift: bool,
    /// The end of a freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// [`Kind::Report`]: how the release does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Status>,
    /// Whole seconds.
    pub time: Timestamp,
}

fn no(value: &bool) -> bool {
    !value
}

impl Decision {
    /// A decision with nothing said but this.
    pub fn new(kind: Kind, actor: impl Into<String>, time: Timestamp) -> Self {
        Self {
            kind,
            actor: actor.into(),
            signed: false,
            automatic: false,
            reason: String::new(),
            from: None,
            to: None,
            version: None,
            author: None,
            config: None,
            configuration: None,
            gates: Vec::new(),
            overrides: Vec::new(),
            lift: false,
            until: None,
            health: None,
            time: Timestamp::from_second(time.as_second()).unwrap_or(time),
        }
    }
}

/// What a gate said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub gate: String,
    pub verdict: Verdict,
    /// One line.
    pub reason: String,
    /// When it could say yes, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Timestamp>,
}

impl Answer {
    pub fn new(gate: &str, verdict: Verdict, reason: impl Into<String>) -> Self {
        Self { gate: gate.to_owned(), verdict, reason: reason.into(), next: None }
    }

    /// Whether this stands in the way.
    pub fn stops(&self) -> bool {
        matches!(self.verdict, Verdict::Deny | Verdict::Unknown)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Allow,
    Deny,
    /// Nobody can tell; counts as no.
    Unknown,
    /// It said no, and somebody with the role went past it.
    Overridden,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Allow => "allow",
            Verdict::Deny => "deny",
            Verdict::Unknown => "unknown",
            Verdict::Overridden => "overridden",
        })
    }
}

/// How a release does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Healthy,
    Unhealthy,
    Unknown,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Healthy => "healthy",
            Status::Unhealthy => "unhealthy",
            Status::Unknown => "unknown",
        })
    }
}

/// Values and secret references: with a release, what an environment runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    pub values: BTreeMap<String, String>,
    pub secrets: BTreeMap<String, SecretRef>,
}

impl Configuration {
    /// The name of exactly this configuration.
    pub fn digest(&self) -> Digest {
        Digest::of(serde_json::to_vec(self).expect("maps with text keys and plain values"))
    }

    /// The names of secrets that `pipeline secret set` has not given a value.
    pub fn unset(&self) -> Vec<&str> {
        let empty = |reference: &SecretRef| matches!(reference, SecretRef::Stored(id) if id.is_empty());
        self.secrets.iter().filter(|(_, reference)| empty(reference)).map(|(name, _)| name.as_str()).collect()
    }
}

/// A time in which nothing changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    pub by: String,
    pub reason: String,
    pub since: Timestamp,
    /// `None`: until somebody thaws.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Of an emergency stop: the pipelines whose people ended it for themselves.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub thawed: BTreeSet<String>,
}

impl Freeze {
    /// Whether it holds at `time`; a clock that went back to before its beginning does not end it.
    pub fn is_active(&self, time: Timestamp) -> bool {
        self.until.is_none_or(|until| time < until)
    }

    /// The freeze `decision` makes.
    ///
    /// # Errors
    /// Without a reason, or over before it begins.
    pub(super) fn of(decision: &Decision) -> Result<Self, Refused> {
        if decision.reason.trim().is_empty() {
            return Err(Refused::new(Why::NoReason, "a freeze needs a reason".into()).hint("write it with `--reason`"));
        }
        if decision.until.is_some_and(|until| until <= decision.time) {
            let message = "the end of the freeze is not after its beginning".into();
            return Err(Refused::new(Why::Nothing, message).hint("write a later `--until`"));
        }
        Ok(Self {
            by: decision.actor.clone(),
            reason: decision.reason.clone(),
            since: decision.time,
            until: decision.until,
            thawed: BTreeSet::new(),
        })
    }
}

/// Emergency stops over all pipelines, by name of environment (`frozen.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Frozen {
    pub format: u32,
    pub environments: BTreeMap<String, Freeze>,
}

impl Default for Frozen {
    fn default() -> Self {
        Self { format: FORMAT, environments: BTreeMap::new() }
    }
}

impl Frozen {
    /// Reads `frozen.json`.
    ///
    /// # Errors
    /// Not JSON of this shape, or written by a newer pipeline.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        policy::parse(bytes, "list of freezes")
    }

    /// The bytes of `frozen.json`; `None`: the file is removed.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        (!self.environments.is_empty()).then(|| policy::bytes(self))
    }

    /// What is frozen after `decision` ([`Kind::Freeze`] or [`Kind::Thaw`]) about every `environment`. `policies`: those of all
    /// pipelines, each with whether the decision is signed by the key it has for the actor.
    ///
    /// One policy that authorizes is enough to stop all; the end counts for the pipelines whose policies authorize it, so that
    /// nobody ends it for others with a pipeline of their own, and none of them ends another stop or makes it shorter.
    ///
    /// # Errors
    /// No policy with people authorizes it; no pipeline has such an environment; a thaw where nothing is frozen.
    pub fn after(&self, environment: &str, decision: &Decision, policies: &[(&Policy, bool)]) -> Result<Self, Refused> {
        let with: Vec<&(&Policy, bool)> =
            policies.iter().filter(|(policy, _)| policy.environments.contains_key(environment)).collect();
        if with.is_empty() {
            return Err(Refused::new(Why::NoEnvironment, format!("no pipeline has an environment `{environment}`")));
        }
        let mut environments = self.environments.clone();
        match decision.kind {
            Kind::Freeze => {
                // Pipelines without people let everybody; as soon as one has some, somebody of those must have decided.
                let guarded = with.iter().any(|(policy, _)| !policy.people.is_empty());
                authorized(with.iter().filter(|(policy, _)| !guarded || !policy.people.is_empty()), decision)?;
                let freeze = Freeze::of(decision)?;
                let shorter = |there: &&Freeze| freeze.until.is_some_and(|until| there.is_active(until));
                if let Some(there) = environments.get(environment).filter(|there| there.is_active(decision.time)).filter(shorter)
                {
                    let message = format!("`{environment}` is frozen already, and longer, by `{}`: {}", there.by, there.reason);
                    return Err(Refused::new(Why::Nothing, message).hint("`pipeline thaw --all` ends it"));
                }
                environments.insert(environment.to_owned(), freeze);
            }
            Kind::Thaw => {
                let active = environments.get_mut(environment).filter(|freeze| freeze.is_active(decision.time));
                let Some(freeze) = active else {
                    return Err(Refused::new(Why::Nothing, format!("`{environment}` is not frozen in all pipelines")));
                };
                freeze.thawed.extend(authorized(with.iter(), decision)?);
                if with.iter().all(|(policy, _)| freeze.thawed.contains(&policy.pipeline)) {
                    environments.remove(environment);
                }
            }
            other => return Err(Refused::new(Why::Stale, format!("`{other}` is not about all pipelines"))),
        }
        // Twice within a second, or ended by the same people before.
        if environments == self.environments {
            let is = if decision.kind == Kind::Freeze { "frozen like that" } else { "thawed for those who let you decide" };
            return Err(Refused::new(Why::Nothing, format!("`{environment}` is {is} already")));
        }
        Ok(Self { format: FORMAT, environments })
    }
}

/// The pipelines of `policies` that authorize `decision`.
///
/// # Errors
/// None does: what the first says.
fn authorized<'p>(
    policies: impl Iterator<Item = &'p &'p (&'p Policy, bool)>,
    decision: &Decision,
) -> Result<Vec<String>, Refused> {
    let (mut names, mut refused) = (Vec::new(), None);
    for (policy, signed) in policies {
        match policy.authorize(decision, *signed) {
            Ok(()) => names.push(policy.pipeline.clone()),
            Err(error) => drop(refused.get_or_insert(error)),
        }
    }
    match refused {
        Some(refused) if names.is_empty() => Err(refused),
        _ => Ok(names),
    }
}

/// Why a decision is not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    pub why: Why,
    /// Lower case, no full stop, names in backticks.
    pub message: String,
    pub hints: Vec<String>,
}

/// The kind of reason, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    NoEnvironment,
    /// The pair is current already: a second run of the same command.
    AlreadyThere,
    /// The release was not where this environment promotes from.
    NotUpstream,
    /// The release is marked bad.
    Bad,
    Held,
    Frozen,
    /// A gate said no, or its answer is missing or wrong.
    Gate,
    /// There is no such gate.
    NoGate,
    /// A secret has no value.
    Secret,
    NotAPerson,
    NotSigned,
    NoRole,
    NoReason,
    /// There is nothing to go back to.
    NoRollback,
    /// Nothing would change.
    Nothing,
    /// Made for another state than the one that is there.
    Stale,
}

impl Refused {
    pub fn new(why: Why, message: String) -> Self {
        Self { why, message, hints: Vec::new() }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refused {}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        let problem = match refused.why {
            Why::NoEnvironment | Why::NoGate => Problem::usage(refused.message),
            _ => Problem::failed(refused.message),
        };
        refused.hints.into_iter().fold(problem, Problem::hint)
    }
}
