//! Gates: questions asked before a release may come, each answered with allow, deny or unknown, and a reason.
//!
//! A gate is data ([`crate::config::types::Gate`]). Some answers follow from the ledger alone ([`known`]: healthy, soak,
//! approve, window) and are worked out again whenever the ledger is verified; for the others somebody has to look at the
//! release or the world, which is [`Evidence`]: what decides is pure and tested with a table, what looks is elsewhere.
//! Whatever goes wrong on the way to an answer is `unknown`, and unknown counts as no.
//!
//! [`ask_all`] asks the cheap ones first, and the costly ones (a program, a request, a machine that boots) only when
//! nothing else stands in the way.

mod artifact;
pub mod command;
pub mod http;
mod ledger;

use std::collections::BTreeMap;

use anyhow::Result;
use jiff::Timestamp;

use super::decision::{Answer, Freeze, Verdict};
use super::state::{Hold, State, View};
use crate::config::types::{Check, Command, Gate, Http, VmTestFile};
use crate::oci::digest::Digest;

pub use artifact::compare_versions;

/// What a freeze is called among the answers, and for `--override`.
pub const FREEZE: &str = "freeze";
/// What a hold is called among the answers.
pub const HOLD: &str = "hold";
/// What the reason of a gate begins with that was not asked, because another one stands in the way or it is passed over.
pub(super) const NOT_ASKED: &str = "not asked";
/// Characters of a reason that are kept; the rest is `…`.
const REASON_MAX: usize = 200;

/// What gates are asked about.
#[derive(Debug, Clone, Copy)]
pub struct Question<'q> {
    pub view: View<'q>,
    /// The environment the release is to come to.
    pub environment: &'q str,
    pub release: Digest,
    pub version: &'q str,
    /// Who made the release, where that is known.
    pub author: Option<&'q str>,
    /// Digest of the configuration it would have.
    pub config: Digest,
    pub actor: &'q str,
    pub reason: &'q str,
    pub time: Timestamp,
}

impl<'q> Question<'q> {
    /// The state of the environment, when the ledger has one.
    fn state(&self) -> Option<&'q State> {
        self.view.states.get(self.environment)
    }

    /// The release that is in the environment now.
    fn current(&self) -> Option<Digest> {
        self.state()?.current.as_ref().map(|binding| binding.release)
    }
}

/// A signature that is good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignatureSeen {
    /// The one of the keys asked for that it was made with.
    pub key: String,
    /// The digest in the bytes that were signed.
    pub over: Digest,
}

/// What a provenance says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProvenanceSeen {
    pub builder: String,
    /// Repository of the source.
    pub source: String,
    pub dirty: bool,
    /// The one of the keys asked for that signed it.
    pub key: Option<String>,
    /// The release or artifact it is about; `None`: the statement names none.
    pub subject: Option<Digest>,
}

/// A package in a release.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Package {
    pub name: String,
    pub version: String,
    /// SPDX names; empty: none is known.
    pub licences: Vec<String>,
    /// Like `deb`, `pypi`, `npm`.
    pub kind: String,
}

/// A report attached to a release.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportSeen {
    pub name: String,
    /// `pass` or `fail`.
    pub result: String,
    /// Which of its name it is, counted where it was attached; `None`: it does not say.
    pub sequence: Option<u64>,
}

/// What separates two releases.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// Bytes of the new one that the old one does not have.
    pub bytes: u64,
    /// Packages added, removed or of another version.
    pub packages: u64,
    /// Places of packages that nobody could read: the count is not complete.
    pub unread: Vec<String>,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// With this status; what it wrote to standard output and error, as much as is kept.
    Status(i32, String, String),
    Signal(i32),
    /// It was killed when its time was over.
    Timeout,
}

/// What a machine's test found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tested {
    pub passed: bool,
    /// One line.
    pub reason: String,
}

/// What looks at releases and at the world for the gates. Everything that goes wrong is an error, and the answer `unknown`.
pub trait Evidence {
    /// Whether every byte of `release` is what its digest says, where it is at hand; asked before it may come, whatever the
    /// gates are. One that is not at hand at all is no error.
    fn whole(&self, release: &Digest) -> Result<()>;
    /// The good signatures over `release` by any of `keys` (PEM); those over other bytes too, with what they are over.
    fn signatures(&self, release: &Digest, keys: &[String]) -> Result<Vec<SignatureSeen>>;
    /// The provenances attached to `release` or to what is in it; `keys` (PEM) to check their signatures with.
    fn provenance(&self, release: &Digest, keys: &[String]) -> Result<Vec<ProvenanceSeen>>;
    /// The packages in `release`, by its bytes. A list that is not complete, or none at all, is an error.
    fn sbom(&self, release: &Digest) -> Result<Vec<Package>>;
    /// The reports attached to `release`.
    fn reports(&self, release: &Digest) -> Result<Vec<ReportSeen>>;
    fn difference(&self, from: &Digest, to: &Digest) -> Result<Difference>;
    /// Runs a program with more variables; see [`command::run`].
    fn run_command(&self, command: &Command, variables: &BTreeMap<String, String>) -> Result<Ended>;
    /// The status of the answer; see [`http::ask`].
    fn http(&self, request: &Http, headers: &BTreeMap<String, String>) -> Result<u16>;
    /// Boots the disk of `release` and runs the test in it.
    fn vm_test(&self, release: &Digest, test: &VmTestFile) -> Result<Tested>;
}

/// The answer of a gate that follows from the ledger, the time and the pair; `None`: somebody has to look.
pub fn known(gate: &Gate, question: &Question<'_>) -> Option<Answer> {
    let mut answer = match &gate.check {
        Check::Healthy(_) => ledger::healthy(question),
        Check::Soak(time) => ledger::soak(*time, question),
        Check::Approve(approve) => ledger::approve(approve, question),
        Check::Window(window) => ledger::window(window, question.time),
        _ => return None,
    };
    answer.gate = gate.name.clone();
    Some(answer)
}

/// Asks one gate.
pub fn ask(gate: &Gate, question: &Question<'_>, evidence: &dyn Evidence) -> Answer {
    let release = &question.release;
    let answer = match &gate.check {
        Check::Signed(signed) => artifact::signed(signed, release, evidence),
        Check::Provenance(wanted) => artifact::provenance(wanted, release, evidence),
        Check::Sbom(wanted) => artifact::sbom(wanted, release, evidence),
        Check::Budget(budget) => artifact::budget(budget, question.current(), release, evidence),
        Check::Report(report) => artifact::report(report, release, evidence),
        Check::Command(wanted) => command::judge(evidence.run_command(wanted, &variables(question, &gate.name)), wanted),
        Check::Http(wanted) => http::judge(evidence.http(wanted, &http::headers(question)), wanted),
        Check::VmTest(test) => artifact::vm_test(test, release, evidence),
        Check::Healthy(_) | Check::Soak(_) | Check::Approve(_) | Check::Window(_) => {
            return known(gate, question).unwrap_or_else(|| Answer::new(&gate.name, Verdict::Unknown, "there is no answer"));
        }
    };
    Answer { gate: gate.name.clone(), reason: one_line(&answer.reason), ..answer }
}

/// Asks `gates` and gives the answers in their order. Those in `overrides` count as passed over when they do not allow;
/// `stopped`: what stands in the way already, a freeze or a hold.
pub fn ask_all(
    gates: &[&Gate],
    question: &Question<'_>,
    evidence: &dyn Evidence,
    overrides: &[String],
    stopped: Option<&str>,
) -> Vec<Answer> {
    let passed_over = |gate: &Gate| overrides.contains(&gate.name);
    let mut answers: Vec<Option<Answer>> =
        gates.iter().map(|gate| (!is_costly(&gate.check)).then(|| ask(gate, question, evidence))).collect();
    let stops = |answers: &[Option<Answer>]| {
        let pairs = gates.iter().zip(answers).filter_map(|(gate, answer)| Some((gate, answer.as_ref()?)));
        pairs
            .into_iter()
            .find(|(gate, answer)| answer.stops() && !answer.reason.starts_with(NOT_ASKED) && !passed_over(gate))
            .map(|(gate, _)| gate.name.clone())
    };
    for index in 0..gates.len() {
        if answers[index].is_some() {
            continue;
        }
        let gate = gates[index];
        let other = stopped.map(str::to_owned).or_else(|| stops(&answers));
        answers[index] = Some(match other {
            _ if passed_over(gate) => Answer::new(&gate.name, Verdict::Unknown, NOT_ASKED),
            Some(other) => Answer::new(&gate.name, Verdict::Unknown, format!("{NOT_ASKED}: `{other}` stands in the way")),
            None => ask(gate, question, evidence),
        });
    }
    let over = |(gate, answer): (&&Gate, Answer)| match answer.stops() && passed_over(gate) {
        true => Answer { verdict: Verdict::Overridden, next: None, ..answer },
        false => answer,
    };
    gates.iter().zip(answers.into_iter().flatten()).map(over).collect()
}

/// Gates that take seconds or change something by being asked.
fn is_costly(check: &Check) -> bool {
    matches!(check, Check::Command(_) | Check::Http(_) | Check::VmTest(_))
}

/// Gates that are about the moment and the pair, and asked again when only the configuration changes. The others are about
/// the release, which passed them when it came.
pub fn is_about_the_pair(check: &Check) -> bool {
    matches!(check, Check::Approve(_) | Check::Window(_) | Check::Command(_) | Check::Http(_))
}

/// Whether an answer changes by waiting alone.
pub(super) fn is_about_time(check: &Check) -> bool {
    matches!(check, Check::Soak(_) | Check::Window(_))
}

/// `alice since 2026-11-21T13:00:00Z until …: reason`.
pub fn freeze_reason(freeze: &Freeze) -> String {
    let until = freeze.until.map_or_else(|| "until it is thawed".into(), |until| format!("until {until}"));
    one_line(&format!("by {} {until}: {}", freeze.by, freeze.reason))
}

/// `by alice since 2026-11-21T13:00:00Z, by a rollback: reason`.
pub fn hold_reason(hold: &Hold) -> String {
    let how = if hold.set_by == super::decision::Kind::Rollback { ", by a rollback" } else { "" };
    let why = if hold.reason.is_empty() { String::new() } else { format!(": {}", hold.reason) };
    one_line(&format!("by {} since {}{how}{why}", hold.by, hold.since))
}

/// What a program is told, as variables.
fn variables(question: &Question<'_>, gate: &str) -> BTreeMap<String, String> {
    let from = question.current().map_or_else(String::new, |digest| digest.to_string());
    let pairs = [
        ("PIPELINE_NAME", question.view.policy.pipeline.clone()),
        ("PIPELINE_ENVIRONMENT", question.environment.to_owned()),
        ("PIPELINE_GATE", gate.to_owned()),
        ("PIPELINE_RELEASE", question.release.to_string()),
        ("PIPELINE_VERSION", question.version.to_owned()),
        ("PIPELINE_FROM", from),
        ("PIPELINE_CONFIG", question.config.to_string()),
        ("PIPELINE_ACTOR", question.actor.to_owned()),
        ("PIPELINE_REASON", question.reason.to_owned()),
    ];
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value.replace('\0', ""))).collect()
}

/// One line without control characters, of a length that fits into a message.
pub(super) fn one_line(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words = plain.split_whitespace().collect::<Vec<_>>().join(" ");
    if words.chars().count() <= REASON_MAX {
        return words;
    }
    words.chars().take(REASON_MAX - 1).chain(['…']).collect()
}

/// The answer when looking failed.
fn unknown(error: &anyhow::Error) -> Answer {
    Answer::new("", Verdict::Unknown, format!("{error:#}"))
}

fn allow(reason: impl Into<String>) -> Answer {
    Answer::new("", Verdict::Allow, reason)
}

fn deny(reason: impl Into<String>) -> Answer {
    Answer::new("", Verdict::Deny, reason)
}

#[cfg(test)]
mod tests;
