//! The keys `target`, `targets`, `routes`, `volumes` and `rollout` of an environment, as they are written.

use schemars::JsonSchema;
use serde::Deserialize;

use super::OneOrMany;
use crate::config::types::{OnFailure, Volume};

/// What runs the release: exactly one of `local`, `docker` and `vm`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The image in the sandbox of this machine.
    #[serde(default)]
    pub local: Option<Local>,
    /// The image in Docker or podman.
    #[serde(default)]
    pub docker: Option<Docker>,
    /// The disk in QEMU.
    #[serde(default)]
    pub vm: Option<Vm>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Local {
    /// How many run at once. Default: 1.
    #[serde(default)]
    #[schemars(range(min = 1, max = 64))]
    pub instances: Option<u32>,
    /// Most memory of each, like `256M`.
    #[serde(default)]
    pub memory: Option<String>,
    /// Processors of each, like `0.5` or `2`.
    #[serde(default)]
    pub cpus: Option<f64>,
    /// Processes and threads of each.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub pids: Option<u32>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Docker {
    /// How many run at once. Default: 1.
    #[serde(default)]
    #[schemars(range(min = 1, max = 64))]
    pub instances: Option<u32>,
    /// The engine's socket, like `unix:///run/docker.sock`. Default: Docker's or podman's of this machine.
    #[serde(default)]
    pub host: Option<String>,
    /// Most memory of each, like `256M`.
    #[serde(default)]
    pub memory: Option<String>,
    /// Processors of each, like `0.5` or `2`.
    #[serde(default)]
    pub cpus: Option<f64>,
    /// A network of the engine. Default: the engine's own.
    #[serde(default)]
    pub network: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// How many run at once. Default: 1.
    #[serde(default)]
    #[schemars(range(min = 1, max = 64))]
    pub instances: Option<u32>,
    /// Memory of each, like `1G`. Default: 512M.
    #[serde(default)]
    pub memory: Option<String>,
    /// Processors of each. Default: 1.
    #[serde(default)]
    #[schemars(range(min = 1, max = 256))]
    pub cpus: Option<u32>,
    /// The app of the machine that requests go to. Default: the one of the pipeline's name, else the only one with a port.
    #[serde(default)]
    pub app: Option<String>,
    /// Programs that start, stop and find machines, in place of QEMU.
    #[serde(default)]
    pub command: Option<VmCommand>,
}

/// Each is a program and its arguments; `{id}`, `{disk}` and the like stand for the machine's own values.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmCommand {
    pub start: Vec<String>,
    pub stop: Vec<String>,
    /// Prints the machine's address.
    pub address: Vec<String>,
}

/// Requests that reach the release.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// A name like `shop.test`, or `*.shop.test` for all names below it. Default: any.
    #[serde(default)]
    pub host: Option<String>,
    /// What paths begin with, by whole segments: `/api` has `/api/x` and not `/apix`. Default: `/`.
    #[serde(default)]
    pub path: Option<String>,
    /// `true`: the program sees the path without `path`. Default: false.
    #[serde(default)]
    pub strip: Option<bool>,
    /// Answer with a redirect to this URL instead; what ends with `/` gets the rest of the path and the query.
    #[serde(default)]
    pub redirect: Option<Redirect>,
}

/// The URL, or the URL and the status.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Redirect {
    To(String),
    Rule(RedirectRule),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedirectRule {
    /// The URL.
    pub to: String,
    /// 301, 302, 303, 307 or 308. Default: 308.
    #[serde(default)]
    pub status: Option<u16>,
}

/// `shared`, `exclusive`, or one of them with a path.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum VolumeForm {
    Mode(Volume),
    Rule(VolumeRule),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRule {
    pub mode: Volume,
    /// Where it is in the image. Default: the image's volume whose last part is the name, else its only one.
    #[serde(default)]
    pub path: Option<String>,
}

/// How one release takes the place of another.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rollout {
    /// How long all new instances have to become healthy. Default: 60s.
    #[serde(default)]
    pub deadline: Option<String>,
    /// How long requests of the old release may take to end after the switch. Default: 30s.
    #[serde(default)]
    pub drain: Option<String>,
    /// How long its WebSockets and event streams stay open, at most. Default: 60s.
    #[serde(default)]
    pub streams: Option<String>,
    /// How long a program may take to end after it was asked to, then it is killed. Default: 10s, a machine 60s.
    #[serde(default)]
    pub grace: Option<String>,
    /// How long the old release stays ready for a rollback; `0s`: not at all. Default: 15m.
    #[serde(default)]
    pub warm: Option<String>,
    /// Most memory what is kept ready may use, like `1G`. Default: no limit.
    #[serde(default)]
    pub warm_memory: Option<String>,
    /// Longest time a request waits at the instant of a switch. Default: 10s.
    #[serde(default)]
    pub hold: Option<String>,
    /// Where the new release can be seen before the switch.
    #[serde(default)]
    pub preview: Option<Route>,
    /// Asked of the new release when it is healthy, before the switch.
    #[serde(default)]
    pub pre_switch: Vec<RolloutCheck>,
    /// Asked of the new release after the switch.
    #[serde(default)]
    pub post_switch: Vec<RolloutCheck>,
    /// Comparison of the new release with the old one after the switch.
    #[serde(default)]
    pub watch: Option<Watch>,
    /// What follows when the new release fails after the switch. Default: rollback.
    #[serde(default)]
    pub on_failure: Option<OnFailure>,
}

/// Exactly one of `http` and `command`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RolloutCheck {
    /// A path that each new instance must answer with 2xx or 3xx.
    #[serde(default)]
    pub http: Option<String>,
    /// A program and its arguments, or a text for `sh -c`, on the machine that serves; status 0 is good.
    #[serde(default)]
    pub command: Option<OneOrMany>,
    /// How long it may take, like `30s`. Default: 10s for `http`, 60s for `command`.
    #[serde(default)]
    pub timeout: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    /// How long; `0s`: not at all. Default: 30s.
    #[serde(default)]
    pub period: Option<String>,
    /// Share of failed requests allowed above the old release's. Default: 0.01.
    #[serde(default)]
    pub errors: Option<f64>,
    /// How many times the old release's 99th percentile of latency is allowed. Default: 3.
    #[serde(default)]
    pub latency: Option<f64>,
    /// Requests below which nothing is concluded. Default: 20.
    #[serde(default)]
    pub minimum: Option<u64>,
}
