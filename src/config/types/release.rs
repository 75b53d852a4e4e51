//! Environments, gates, people, ledger and registry, checked. The same values, as JSON, are the policy in the ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use jiff::SignedDuration;
use jiff::civil::DateTime;
use serde::{Deserialize, Serialize};

use super::rollout::{RolloutSettings, Route, Target, VolumeSpec};
use crate::config::recurrence::{EPOCH, Schedule, timezone};
use crate::config::syntax::{self, Wrong};

/// What a pipeline file says about releases.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Releases {
    pub environments: BTreeMap<String, Environment>,
    pub people: BTreeMap<String, Person>,
    pub ledger: Ledger,
    /// Repository for pushes, without a tag, like `registry.example/team/shop`.
    pub registry: Option<String>,
}

/// A place a release is promoted to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Environment {
    pub from: Upstream,
    pub automatic: bool,
    /// In the order they are asked; names differ.
    pub gates: Vec<Gate>,
    pub config: BTreeMap<String, String>,
    pub secrets: BTreeMap<String, SecretRef>,
    /// By name; a single one is `main`. Empty: a pointer only.
    pub targets: BTreeMap<String, Target>,
    pub routes: Vec<Route>,
    pub volumes: BTreeMap<String, VolumeSpec>,
    #[serde(skip_serializing_if = "RolloutSettings::is_default")]
    pub rollout: RolloutSettings,
    /// The group of environments, of any pipeline, that switch as one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub together: Option<String>,
    /// Releases that `prune` keeps.
    pub keep: u32,
}

/// The environments a release comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upstream {
    /// Releases enter the graph here.
    #[default]
    None,
    /// One of these is enough. Sorted.
    Any(Vec<String>),
    /// All of these. Sorted.
    All(Vec<String>),
}

impl Upstream {
    /// The names, sorted.
    pub fn names(&self) -> &[String] {
        match self {
            Upstream::None => &[],
            Upstream::Any(names) | Upstream::All(names) => names,
        }
    }
}

/// Where a secret is; the value is never here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SecretRef {
    /// An absolute path on the machine that runs the release.
    File(String),
    /// A variable of the program that serves the environment.
    Env(String),
    /// Kept by `pipeline secret set`; the text names the value that was set, empty: none was.
    Stored(String),
}

/// A question with its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gate {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    #[serde(flatten)]
    pub check: Check,
}

/// What a gate asks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Check {
    Healthy(Yes),
    Soak(Seconds),
    Approve(Approve),
    Window(Window),
    Signed(Signed),
    Provenance(Provenance),
    Sbom(Sbom),
    Command(Command),
    Http(Http),
    VmTest(VmTestFile),
    Budget(Budget),
    Report(Report),
}

impl Check {
    /// The keys of the checks in a gate.
    pub const NAMES: [&'static str; 12] = [
        "healthy",
        "soak",
        "approve",
        "window",
        "signed",
        "provenance",
        "sbom",
        "command",
        "http",
        "vm-test",
        "budget",
        "report",
    ];

    /// The key in the pipeline file.
    pub fn kind(&self) -> &'static str {
        let index = match self {
            Check::Healthy(_) => 0,
            Check::Soak(_) => 1,
            Check::Approve(_) => 2,
            Check::Window(_) => 3,
            Check::Signed(_) => 4,
            Check::Provenance(_) => 5,
            Check::Sbom(_) => 6,
            Check::Command(_) => 7,
            Check::Http(_) => 8,
            Check::VmTest(_) => 9,
            Check::Budget(_) => 10,
            Check::Report(_) => 11,
        };
        Self::NAMES[index]
    }
}

/// Written `true`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "bool", into = "bool")]
pub struct Yes;

impl TryFrom<bool> for Yes {
    type Error = String;

    fn try_from(value: bool) -> Result<Self, String> {
        if value { Ok(Self) } else { Err("this is `true` or not there".into()) }
    }
}

impl From<Yes> for bool {
    fn from(_: Yes) -> Self {
        true
    }
}

/// A duration in seconds, written like `90s`, `30m` or `1h30m`; `0s` is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Seconds(pub u64);

impl Seconds {
    pub fn duration(self) -> Duration {
        Duration::from_secs(self.0)
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [(self.0 / 3600, "h"), (self.0 / 60 % 60, "m"), (self.0 % 60, "s")];
        if self.0 == 0 {
            return f.write_str("0s");
        }
        parts.iter().filter(|(count, _)| *count > 0).try_for_each(|(count, unit)| write!(f, "{count}{unit}"))
    }
}

impl From<Seconds> for String {
    fn from(seconds: Seconds) -> Self {
        seconds.to_string()
    }
}

impl TryFrom<String> for Seconds {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text == "0s" {
            return Ok(Self(0));
        }
        syntax::duration(&text).map(|duration| Self(duration.as_secs())).map_err(|wrong| wrong.message)
    }
}

/// `count` different people of the role `role`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Approve {
    pub count: u32,
    pub role: String,
}

/// Windows of time; see [`crate::config::recurrence`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    #[serde(default)]
    pub allow: Vec<String>,
    #[serde(default)]
    pub deny: Vec<String>,
    /// `2026-01-05T09:00:00`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    pub duration: Seconds,
    pub timezone: String,
    #[serde(default)]
    pub except: Vec<String>,
}

impl Window {
    /// The window as something that can be asked.
    ///
    /// # Errors
    /// What is no rule, time zone, date or time.
    pub fn schedule(&self) -> Result<Schedule, Wrong> {
        let start = match &self.start {
            None => EPOCH,
            Some(text) => text.parse::<DateTime>().map_err(|_| Wrong {
                message: format!("`{text}` is not a day and time"),
                hint: Some("local time, like `2026-01-05T09:00`".into()),
            })?,
        };
        Ok(Schedule {
            allow: self.allow.iter().map(|rule| rule.parse()).collect::<Result<_, _>>()?,
            deny: self.deny.iter().map(|rule| rule.parse()).collect::<Result<_, _>>()?,
            start,
            duration: SignedDuration::from_secs(i64::try_from(self.duration.0).unwrap_or(i64::MAX)),
            zone: timezone(&self.timezone)?,
            except: self.except.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
        })
    }
}

/// Keys, one of which must have signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed {
    /// PEM texts; in the pipeline file also absolute paths of PEM files, which `environment apply` replaces.
    pub keys: Vec<String>,
}

/// Who built it, from what; empty lists ask nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Provenance {
    pub builders: Vec<String>,
    pub sources: Vec<String>,
    pub clean: bool,
    /// As in [`Signed::keys`]. One of them must have signed.
    pub keys: Vec<String>,
    /// Anybody may have written it. A policy that has neither this nor keys is older than the question.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub unsigned: bool,
}

/// What may be in a release.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sbom {
    pub deny: SbomDeny,
    /// Lowest version by package.
    pub minimum: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SbomDeny {
    pub packages: Vec<String>,
    pub licences: Vec<String>,
}

/// A program to ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// The program and its arguments, not empty.
    pub run: Vec<String>,
    pub timeout: Seconds,
    /// The program itself, where `run` names it by a relative path with a slash; `None` in policies of before that was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub script: Option<Script>,
}

impl Command {
    /// Whether the program is a file beside the pipeline file, and not one of the machine that asks.
    pub fn names_a_file(&self) -> bool {
        self.run.first().is_some_and(|program| program.contains('/') && !program.starts_with('/'))
    }
}

/// A program that is part of the policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// In the pipeline file an absolute path; in the policy the file's name.
    pub file: String,
    /// The text of the file; empty until `environment apply` reads it.
    #[serde(default)]
    pub text: String,
}

/// An address to ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Http {
    pub url: String,
    /// `None`: 200 to 299.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    pub timeout: Seconds,
}

/// A vm-test.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmTestFile {
    /// In the pipeline file an absolute path; in the policy the file's name.
    pub file: String,
    /// The text of the file; empty until `environment apply` reads it.
    #[serde(default)]
    pub text: String,
}

/// How much may change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Budget {
    /// Bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packages: Option<u64>,
}

/// A report that must be there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub name: String,
    pub result: String,
}

/// Somebody who may decide.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Person {
    /// OpenSSH public key line.
    pub key: Option<String>,
    pub roles: BTreeSet<String>,
}

/// Where decisions are written, beside this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Address of a Git repository; one of this machine is an absolute path.
    pub remote: Option<String>,
    pub sign: bool,
}

/// The roles that mean something by themselves.
pub mod role {
    /// May change environments, gates and people.
    pub const ADMIN: &str = "admin";
    /// May promote, roll back, hold, freeze and configure.
    pub const PROMOTE: &str = "promote";
    /// May approve, where a gate names no other role.
    pub const APPROVE: &str = "approve";
    /// May go past a gate.
    pub const OVERRIDE: &str = "override";
    /// May say how a release does: the daemon's.
    pub const REPORT: &str = "report";
    pub const ALL: [&str; 5] = [ADMIN, PROMOTE, APPROVE, OVERRIDE, REPORT];
}
