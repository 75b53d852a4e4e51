//! What the daemon tells about an environment: blue and green, the rollout, and what a rollback would take.
//!
//! These are the values of the API (`GET /v1/environments/P/E`); the command line reads them back, so every type goes both
//! ways. Nothing here decides anything.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::oci::digest::Digest;
use crate::release::decision::Status;

/// Version of the answers of the API.
pub const FORMAT: u32 = 1;

/// `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Overview {
    /// [`FORMAT`].
    pub format: u32,
    pub daemon: Daemon,
    /// Sorted by name.
    pub environments: Vec<View>,
}

/// The daemon itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Daemon {
    pub version: String,
    pub pid: u32,
    pub started: Timestamp,
    /// The ledger's commit that was looked at last.
    pub ledger_tip: Option<String>,
    /// When every environment had been looked at last.
    pub last_pass: Option<Timestamp>,
    /// Longest time between a decision made elsewhere and the look at it, in seconds.
    pub poll: f64,
    /// `http 0.0.0.0:80`, one per listener of the switch.
    pub listeners: Vec<String>,
    /// What is wrong with the daemon as a whole, such as a state file that is corrupt.
    #[serde(default)]
    pub messages: Vec<String>,
}

/// One environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct View {
    /// `shop/prod`.
    pub environment: String,
    /// What serves; none before the first release and while an exclusive volume changes hands.
    pub live: Option<Side>,
    /// What starts, or what was live before and is kept warm.
    pub other: Option<Side>,
    /// The rollout that goes on, or the last one, with its outcome.
    pub rollout: Option<Progress>,
    /// What the ledger wants there, as it was read last.
    #[serde(default)]
    pub wanted: Option<Pair>,
    /// The message, while there is maintenance.
    pub maintenance: Option<String>,
    /// Of what is live.
    pub health: Status,
    /// What is wrong, for people.
    pub message: Option<String>,
    pub rollback: Promise,
}

/// A release and a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    pub release: Digest,
    pub version: String,
    /// Digest of the configuration.
    pub config: Digest,
}

/// Blue or green.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Color {
    Blue,
    Green,
}

impl Color {
    /// The other one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Color::Blue => Color::Green,
            Color::Green => Color::Blue,
        }
    }
}

impl fmt::Display for Color {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Color::Blue => "blue",
            Color::Green => "green",
        })
    }
}

/// A generation that runs or ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Side {
    pub color: Color,
    /// 12 hex digits.
    pub generation: String,
    pub release: Digest,
    pub version: String,
    /// Digest of the configuration.
    pub config: Digest,
    /// Sorted by target and number.
    pub instances: Vec<InstanceView>,
    pub healthy: u32,
    pub wanted: u32,
    /// Since when it is live, or was live last, or starts.
    pub since: Timestamp,
    /// Since the daemon started.
    pub requests: u64,
    /// Answers of 500 and above, and requests that failed.
    pub errors: u64,
    pub in_flight: u64,
    pub websockets: u64,
    /// Server-sent events and other answers without an end.
    pub streams: u64,
    /// When a warm one is stopped.
    pub warm_until: Option<Timestamp>,
}

/// One running instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceView {
    pub id: String,
    /// Name of the target in the environment.
    pub target: String,
    /// `local`, `docker` or `vm`.
    pub kind: String,
    /// `starting`, `running`, `waiting`, `ended: status 1`, `missing`.
    pub status: String,
    pub healthy: bool,
    /// How often its supervisor started it again.
    pub restarts: u32,
    /// What the last probe said, when that was not good.
    pub last_probe: Option<String>,
    /// Bytes now.
    pub memory: Option<u64>,
    /// What the target could not give it, like limits or a way to the network.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    pub generation: String,
    pub version: String,
    /// The pair of the ledger that it brings, so that who decided knows whether this is about the decision.
    pub release: Digest,
    pub config: Digest,
    pub phase: Phase,
    /// When it began.
    pub since: Timestamp,
    /// When the phase ends at the latest.
    pub deadline: Option<Timestamp>,
    pub paused: bool,
    /// Oldest first.
    pub steps: Vec<Step>,
    /// `None`: it goes on.
    pub outcome: Option<Outcome>,
}

/// Where a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Not begun: paused, or others that switch together are not there yet.
    Waiting,
    /// The instances start, until all are healthy.
    Starting,
    /// The checks before the switch.
    PreSwitch,
    Switching,
    /// The checks after it.
    PostSwitch,
    /// Green is compared with blue; blue drains meanwhile.
    Watching,
    /// Back to what was there before.
    RollingBack,
    Done,
    Failed,
}

impl Phase {
    /// Whether nothing follows.
    pub const fn is_last(self) -> bool {
        matches!(self, Phase::Done | Phase::Failed)
    }

    /// Whether green serves already.
    pub const fn is_after_switch(self) -> bool {
        matches!(self, Phase::PostSwitch | Phase::Watching)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Waiting => "waiting",
            Phase::Starting => "starting",
            Phase::PreSwitch => "pre-switch",
            Phase::Switching => "switching",
            Phase::PostSwitch => "post-switch",
            Phase::Watching => "watching",
            Phase::RollingBack => "rolling-back",
            Phase::Done => "done",
            Phase::Failed => "failed",
        })
    }
}

/// Something that happened in a rollout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    pub phase: Phase,
    pub at: Timestamp,
    /// How long it took; 0 for what just happens.
    pub seconds: f64,
    /// One line, such as `healthy 3/3`.
    pub text: String,
}

/// How a rollout ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub result: Result,
    /// One line; empty when there is nothing to say.
    pub reason: String,
    /// The last lines of the instance that failed.
    pub log: Vec<String>,
}

/// See [`Outcome`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Result {
    Succeeded,
    Failed,
    /// A newer decision took its place.
    Superseded,
    /// Somebody ended it.
    Aborted,
}

impl fmt::Display for Result {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Result::Succeeded => "succeeded",
            Result::Failed => "failed",
            Result::Superseded => "superseded",
            Result::Aborted => "aborted",
        })
    }
}

/// What a rollback would take now.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Promise {
    /// What it goes back to runs already.
    pub warm: bool,
    /// About how long, measured at the last start; `None`: not known.
    pub seconds: Option<f64>,
    /// One line.
    pub text: String,
}

/// Body of `POST /v1/environments/P/E/rollout`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    #[serde(rename = "do")]
    pub what: Do,
    #[serde(default)]
    pub reason: String,
    /// Who wants it.
    #[serde(default)]
    pub by: String,
}

/// What is wanted of a rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Do {
    Pause,
    Resume,
    Abort,
}

/// Body of `POST /v1/environments/P/E/maintenance`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Maintenance {
    pub on: bool,
    #[serde(default)]
    pub message: String,
}

/// Answer of `POST /v1/poke`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poked {
    /// The commit that was looked at.
    pub tip: Option<String>,
}

/// The body of an answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub error: String,
    #[serde(default)]
    pub hints: Vec<String>,
}
