//! Where instances run: one trait, one file for each kind of target.
//!
//! An [`InstanceSpec`] is made from ledger and store and is the same in every target. A target
//! starts, lists, stops and looks into instances; whether one is healthy, and which of them get
//! requests, is decided above. Every call may be made again after the caller was killed: what an
//! instance is stands with the target, never in the caller's memory.

pub mod docker;
pub mod local;
pub mod vm;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::config::types as config;
use crate::oci::digest::Digest;

/// Everything one instance needs; the same in every target.
#[derive(Debug, Clone)]
pub struct InstanceSpec {
    /// `PIPELINE-ENV-GENERATION-TARGET-NUMBER` of `[a-z0-9-]`, as `shop-prod-1a2b3c4d5e6f-web-0`.
    pub id: String,
    /// `shop/prod`.
    pub environment: String,
    /// 12 hex digits: what is the same for all that one rollout starts.
    pub generation: String,
    /// The target's name in the environment.
    pub target: String,
    /// From 0.
    pub number: u32,
    /// Digest of the manifest: an image's (local, docker) or a disk's (vm).
    pub artifact: Digest,
    /// The program's own port.
    pub port: Option<u16>,
    /// Variables on top of the image's own.
    pub env: BTreeMap<String, String>,
    /// Each is a file `/run/secrets/NAME` (0400, the program's user), and `NAME_FILE` is its path.
    pub secrets: BTreeMap<String, Secret>,
    pub volumes: Vec<VolumeMount>,
    pub limits: Limits,
    /// What the kind of target has beside: `instances`, host of a Docker daemon, template of a VM.
    pub settings: config::Target,
}

/// A value that is shown to nobody and leaves no trace in memory.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(pub Zeroizing<Vec<u8>>);

impl Secret {
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(Zeroizing::new(bytes.into()))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Data that outlives releases (DESIGN section 7, contract 6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Its name in the environment.
    pub name: String,
    /// Absolute path in the program's tree.
    pub path: String,
    /// Folder of this machine, `STATE/volumes/PIPELINE/ENV/NAME`: made and filled from the image on first use.
    pub source: PathBuf,
}

/// Limits of an instance with everything in it; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Processors; 0.5 is half of one.
    pub cpus: Option<f64>,
    /// Processes and threads.
    pub pids: Option<u32>,
}

/// How long a program has to end before it is ended by force, where nobody says otherwise; and a machine, with all in it.
pub const GRACE: Duration = Duration::from_secs(10);
pub const GRACE_MACHINE: Duration = Duration::from_secs(60);

/// A kind of place where instances run. Calls block; they are made from threads.
pub trait Target: Send + Sync + fmt::Debug {
    /// Starts an instance; when one of this id is there (running or not) it is left as it is.
    /// Returns when it exists, not when it is healthy.
    ///
    /// # Errors
    /// An artifact that is not in the store, a machine that refuses; nothing of it is left then.
    fn start(&self, spec: &InstanceSpec) -> Result<()>;

    /// What there is of this root's, whatever its state, by id: found again after a restart of the
    /// daemon or the machine.
    fn list(&self) -> Result<Vec<Found>>;

    /// Asks it to end (SIGTERM or the image's stop signal; ACPI), after `grace` by force, and
    /// removes it. What is not there is no error. Its log stays until [`Target::forget`].
    fn stop(&self, id: &str, grace: Duration) -> Result<()>;

    /// How long a program of this kind usually has to end.
    fn grace(&self) -> Duration {
        GRACE
    }

    /// Removes what is left of a stopped instance: its log.
    fn forget(&self, id: &str) -> Result<()>;

    /// Runs a command beside the program (health `command`): exit 0 is good.
    fn check(&self, id: &str, argv: &[String], timeout: Duration) -> Result<Checked>;

    /// The last `lines` lines of what it printed; with `follow` then what comes. `sink` gets chunks, and an empty
    /// one at least every second; it answers whether there is to be more. Following ends with the instance.
    fn logs(&self, id: &str, lines: usize, follow: bool, sink: &mut dyn FnMut(&[u8]) -> bool) -> Result<()>;

    /// Runs a command in the instance with the caller's standard streams; the exit status is the
    /// command's, 128 and the signal when one ended it.
    fn exec(&self, id: &str, argv: &[String], interactive: bool) -> Result<i32>;
}

/// An instance as its target sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    pub id: String,
    pub environment: String,
    pub generation: String,
    pub target: String,
    pub number: u32,
    pub status: Running,
    /// How often its program was started again.
    pub restarts: u32,
    /// Where its ports are; `None` as long as it has none.
    pub address: Option<Address>,
    /// Bytes it uses now, where the target knows.
    pub memory: Option<u64>,
    /// What a person should know, as that there is no way out to the network.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// How far an instance is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Running {
    /// Its program is not started yet.
    Starting,
    Running,
    /// Its program ended and is started again after a while.
    Waiting,
    /// It does not come back by itself.
    Ended {
        /// Why, as a person reads it.
        status: String,
    },
}

/// Where an instance is reached.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Address {
    Tcp(SocketAddr),
    /// A shim's socket, which hands over connected sockets.
    Shim(PathBuf),
}

/// What a command beside the program said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    pub good: bool,
    /// The last line it printed, or why it has no answer.
    pub last: String,
}
