//! Where and how an environment runs, checked: targets, routes, volumes, and how one release takes the place of another.
//!
//! As JSON these are part of the policy in the ledger. Policies from before they had types hold what was written in the
//! pipeline file: keys that are not known are passed over there, sizes may be texts, and what is missing has its default.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::Seconds;
use crate::config::syntax;

/// What runs a release, and with which settings. As JSON a mapping of one key: `{"local": {"instances": 2}}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, Value>", into = "BTreeMap<String, Value>")]
pub enum Target {
    /// The image, in the sandbox of this machine.
    Local(Local),
    /// The image, in Docker or podman.
    Docker(Docker),
    /// The disk, in QEMU.
    Vm(Vm),
    /// A kind that an older or newer pipeline wrote and this one cannot serve.
    Other(String, Value),
}

impl Target {
    /// The kinds of target that are served.
    pub const KINDS: [&'static str; 3] = ["local", "docker", "vm"];

    /// The key in the pipeline file.
    pub fn kind(&self) -> &str {
        match self {
            Target::Local(_) => "local",
            Target::Docker(_) => "docker",
            Target::Vm(_) => "vm",
            Target::Other(kind, _) => kind,
        }
    }

    /// How many of it run at once; 0 of a kind that is not served.
    pub fn instances(&self) -> u32 {
        match self {
            Target::Local(local) => local.instances,
            Target::Docker(docker) => docker.instances,
            Target::Vm(vm) => vm.instances,
            Target::Other(..) => 0,
        }
    }
}

impl TryFrom<BTreeMap<String, Value>> for Target {
    type Error = String;

    fn try_from(mut kinds: BTreeMap<String, Value>) -> Result<Self, String> {
        let (Some((kind, settings)), true) = (kinds.pop_first(), kinds.is_empty()) else {
            return Err("a target is of one kind".into());
        };
        let settings = if settings.is_null() { Value::Object(Default::default()) } else { settings };
        let wrong = |error: serde_json::Error| format!("the settings of the target `{kind}`: {error}");
        Ok(match kind.as_str() {
            "local" => Target::Local(serde_json::from_value(settings).map_err(wrong)?),
            "docker" => Target::Docker(serde_json::from_value(settings).map_err(wrong)?),
            "vm" => Target::Vm(serde_json::from_value(settings).map_err(wrong)?),
            _ => Target::Other(kind, settings),
        })
    }
}

impl From<Target> for BTreeMap<String, Value> {
    fn from(target: Target) -> Self {
        let kind = target.kind().to_owned();
        let settings = match target {
            Target::Local(local) => serde_json::to_value(local),
            Target::Docker(docker) => serde_json::to_value(docker),
            Target::Vm(vm) => serde_json::to_value(vm),
            Target::Other(_, settings) => Ok(settings),
        };
        BTreeMap::from([(kind, settings.expect("plain values with text keys"))])
    }
}

/// Settings of `local`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Local {
    pub instances: u32,
    /// Bytes each instance may use.
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Processors each instance may use, like 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    /// Processes and threads of each instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
}

impl Default for Local {
    fn default() -> Self {
        Self { instances: 1, memory: None, cpus: None, pids: None }
    }
}

/// Settings of `docker`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Docker {
    pub instances: u32,
    /// `unix:///PATH` of the engine's socket. `None`: what the program that serves finds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Bytes each instance may use.
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Processors each instance may use, like 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<f64>,
    /// Name of a network of the engine. `None`: its default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
}

impl Default for Docker {
    fn default() -> Self {
        Self { instances: 1, host: None, memory: None, cpus: None, network: None }
    }
}

/// Settings of `vm`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vm {
    pub instances: u32,
    /// Bytes of each machine.
    #[serde(deserialize_with = "some_bytes")]
    pub memory: u64,
    /// Processors of each machine.
    pub cpus: u32,
    /// The app of the machine that requests go to. `None`: the one of the pipeline's name, else the only one with a port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub app: Option<String>,
    /// Programs in place of QEMU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<VmCommand>,
}

/// Memory of a machine when nothing is written: 512 MiB.
pub const VM_MEMORY: u64 = 512 << 20;

impl Default for Vm {
    fn default() -> Self {
        Self { instances: 1, memory: VM_MEMORY, cpus: 1, app: None, command: None }
    }
}

/// Programs that start, stop and find a machine; each is a program and its arguments, in which placeholders like `{id}`
/// and `{disk}` stand for the machine's own values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmCommand {
    pub start: Vec<String>,
    pub stop: Vec<String>,
    /// Prints `ADDRESS` or `ADDRESS:PORT` of the machine.
    pub address: Vec<String>,
}

/// Requests that reach an environment, or are sent elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Route {
    /// Lower case, without a port; `*.shop.test` stands for one or more labels before `.shop.test`. `None`: any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Begins with `/` and ends with none, but for `/` itself; what it begins counts by whole segments.
    pub path: String,
    /// Whether `path` is taken away before the program sees the request.
    #[serde(skip_serializing_if = "is_false")]
    pub strip: bool,
    /// The answer, in place of the program's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redirect: Option<Redirect>,
}

impl Default for Route {
    fn default() -> Self {
        Self { host: None, path: "/".into(), strip: false, redirect: None }
    }
}

impl Route {
    /// What it claims, as messages show it: `shop.test/api`, `*.shop.test/`, `*/` for any host.
    pub fn claim(&self) -> String {
        format!("{}{}", self.host.as_deref().unwrap_or("*"), self.path)
    }
}

/// An answer that sends a client elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WrittenRedirect")]
pub struct Redirect {
    /// The URL; where it ends with `/`, the rest of the path and the query are appended.
    pub to: String,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// Status of a redirect when nothing is written: for good, with the method kept (RFC 9110, section 15.4.9).
pub const REDIRECT: u16 = 308;

#[derive(Deserialize)]
#[serde(untagged)]
enum WrittenRedirect {
    To(String),
    Rule {
        to: String,
        #[serde(default)]
        status: Option<u16>,
    },
}

impl From<WrittenRedirect> for Redirect {
    fn from(written: WrittenRedirect) -> Self {
        match written {
            WrittenRedirect::To(to) => Redirect { to, status: REDIRECT },
            WrittenRedirect::Rule { to, status } => Redirect { to, status: status.unwrap_or(REDIRECT) },
        }
    }
}

/// Whether blue and green may hold a volume together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Volume {
    /// Both may have it at once.
    Shared,
    /// One at a time: the old one stops before the new one starts.
    Exclusive,
}

/// Data that outlives releases. As JSON the mode alone (`"exclusive"`) where no path is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "WrittenVolume", into = "WrittenVolume")]
pub struct VolumeSpec {
    pub mode: Volume,
    /// Absolute path in the image. `None`: the image's volume whose last part is the name, else its only one.
    pub path: Option<String>,
}

impl VolumeSpec {
    /// Which of the paths `declared` (the image's volumes) the volume `name` is; its own path even when the image has none.
    pub fn place<'v>(&'v self, name: &str, declared: &'v [String]) -> Option<&'v str> {
        let plain = |path: &'v str| path.trim_end_matches('/');
        if let Some(path) = &self.path {
            return Some(plain(path));
        }
        let named = declared.iter().map(|path| plain(path)).find(|path| path.rsplit('/').next() == Some(name));
        named.or_else(|| declared.first().filter(|_| declared.len() == 1).map(|path| plain(path)))
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum WrittenVolume {
    Mode(Volume),
    Spec {
        mode: Volume,
        #[serde(default)]
        path: Option<String>,
    },
}

impl From<WrittenVolume> for VolumeSpec {
    fn from(written: WrittenVolume) -> Self {
        match written {
            WrittenVolume::Mode(mode) => VolumeSpec { mode, path: None },
            WrittenVolume::Spec { mode, path } => VolumeSpec { mode, path },
        }
    }
}

impl From<VolumeSpec> for WrittenVolume {
    fn from(spec: VolumeSpec) -> Self {
        match spec {
            VolumeSpec { mode, path: None } => WrittenVolume::Mode(mode),
            VolumeSpec { mode, path } => WrittenVolume::Spec { mode, path },
        }
    }
}

/// How one release takes the place of another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RolloutSettings {
    /// Until all instances of green are healthy; an image's own deadline counts where it is longer.
    pub deadline: Seconds,
    /// How long requests of blue may take to end after the switch; 0: none.
    pub drain: Seconds,
    /// How long WebSockets and event streams of blue stay open, at most.
    pub streams: Seconds,
    /// How long a program may take to end after it was asked to; then it is killed. `None`: what is usual for its target.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grace: Option<Seconds>,
    /// How long blue stays warm after the switch; 0: it is stopped after the drain.
    pub warm: Seconds,
    /// Bytes all warm instances of the environment may use together. `None`: no limit.
    #[serde(deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    pub warm_memory: Option<u64>,
    /// Longest time a request waits at the instant of a switch.
    pub hold: Seconds,
    /// Where green can be seen before the switch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub preview: Option<Route>,
    /// Asked of green when it is healthy, before the switch, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pre_switch: Vec<RolloutCheck>,
    /// Asked of green after the switch, in this order.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub post_switch: Vec<RolloutCheck>,
    pub watch: Watch,
    pub on_failure: OnFailure,
}

impl Default for RolloutSettings {
    fn default() -> Self {
        Self {
            deadline: Seconds(60),
            drain: Seconds(30),
            streams: Seconds(60),
            grace: None,
            warm: Seconds(15 * 60),
            warm_memory: None,
            hold: Seconds(10),
            preview: None,
            pre_switch: Vec::new(),
            post_switch: Vec::new(),
            watch: Watch::default(),
            on_failure: OnFailure::default(),
        }
    }
}

impl RolloutSettings {
    /// Whether nothing was written.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// A question about green that somebody wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutCheck {
    #[serde(flatten)]
    pub ask: Ask,
    pub timeout: Seconds,
}

/// What a check of a rollout asks. As JSON `{"http": "/ready"}` or `{"command": ["./smoke.sh"]}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ask {
    /// A path of each instance of green that must answer 2xx or 3xx.
    Http(String),
    /// A program of the machine that serves, and its arguments, not empty; status 0 is good. It is told of green in
    /// variables named `PIPELINE_…`.
    Command(Vec<String>),
}

/// Comparison of green with blue after the switch, from the switch's own figures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Watch {
    /// How long; 0: not at all.
    pub period: Seconds,
    /// Share of failed requests that green may have above blue's, 0 to 1.
    pub errors: f64,
    /// Green's 99th percentile of latency may be this many times blue's, at least 1.
    pub latency: f64,
    /// Requests below which nothing is concluded.
    pub minimum: u64,
}

impl Default for Watch {
    fn default() -> Self {
        Self { period: Seconds(30), errors: 0.01, latency: 3.0, minimum: 20 }
    }
}

/// What follows when green fails after the switch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// Blue takes the requests again.
    #[default]
    Rollback,
    /// Everything stays as it is, until somebody decides.
    Freeze,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// Bytes as a number, or a text like `512M`.
fn bytes<'de, D: Deserializer<'de>>(input: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Bytes(u64),
        Text(String),
    }
    match Option::<Written>::deserialize(input)? {
        None => Ok(None),
        Some(Written::Bytes(bytes)) => Ok(Some(bytes)),
        Some(Written::Text(text)) => syntax::size(&text).map(Some).map_err(|wrong| serde::de::Error::custom(wrong.message)),
    }
}

fn some_bytes<'de, D: Deserializer<'de>>(input: D) -> Result<u64, D::Error> {
    Ok(bytes(input)?.unwrap_or(VM_MEMORY))
}
