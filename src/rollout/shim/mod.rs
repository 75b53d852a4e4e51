//! The shim: the small process that owns one long-lived instance, so that the daemon may come and go
//! (DESIGN section 7, contract 4).
//!
//! [`start`] runs this program again with the hidden verb [`VERB`]. That process starts itself once more in a session of
//! its own and ends, so that the second is nobody's child, and it tells the caller through the socket it was given when
//! the instance exists. It owns the program, its log and its exit status, starts it again when it ends, and answers on a
//! socket. What it starts is bound to it: killed, it takes everything along.
//!
//! ```text
//! STATE/instances/ID/        0700
//!   lock                     held (flock) by the shim as long as it lives
//!   instance.json            what the instance is, without values of secrets
//!   pid                      process id and start time (/proc/PID/stat) of the shim, id of the boot
//!   sock                     its socket, 0600
//!   status.json              how it is, for when nobody answers on the socket
//!   log, log.1               what the program printed, 10 MiB each
//!   work/                    mount points and scratch; a tmpfs in it holds the secrets, seen in the sandbox only
//! ```
//! Values of secrets come over the caller's socket and are never written to a disk. After a reboot the folder is there and
//! nobody holds the lock: [`list`] says so, and [`start`] starts the instance anew.

mod client;
mod command;
mod log;
mod network;
mod program;
mod server;
mod supervisor;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use client::{SOCKET, ask, exec, forget, list, logs, start, stop};
pub(crate) use client::{ask_on, channel};
pub use supervisor::main;

use super::target::{InstanceSpec, Limits, Running, VolumeMount};
use crate::oci::digest::Digest;
use crate::sandbox::Exit;

/// The hidden verb of the shim.
pub const VERB: &str = "__shim";
/// Format of `instance.json`; a newer one is told, and left alone.
pub const FORMAT: u32 = 1;

/// What an instance is, as it is kept beside it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// [`FORMAT`].
    pub format: u32,
    /// `local` or `vm`: whose it is.
    pub kind: String,
    pub id: String,
    /// `shop/prod`.
    pub environment: String,
    pub generation: String,
    pub target: String,
    pub number: u32,
    /// What the kind of target wants to find again, as forwarded ports.
    #[serde(default)]
    pub data: Value,
}

impl Instance {
    /// The record of `spec`, with what its `kind` of target wants to find again.
    pub fn of(spec: &InstanceSpec, kind: &str, data: Value) -> Self {
        Self {
            format: FORMAT,
            kind: kind.into(),
            id: spec.id.clone(),
            environment: spec.environment.clone(),
            generation: spec.generation.clone(),
            target: spec.target.clone(),
            number: spec.number,
            data,
        }
    }
}

/// What a shim owns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owned {
    /// The program of an image, in the sandbox.
    Program(ProgramSpec),
    /// A command of this machine, as QEMU. `{secret:NAME}` in an argument becomes the path of a file in memory
    /// (`/proc/self/fd/N`) with the value of that secret. `{work}` becomes an empty folder that goes with the instance.
    Command {
        argv: Vec<String>,
        /// All it gets, beside `PATH`.
        env: Vec<(String, String)>,
        stop: StopBy,
    },
}

/// How a command is asked to end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopBy {
    Signal(i32),
    /// A command that asks it, as one that sends `system_powerdown`; its output goes to the log.
    Run(Vec<String>),
}

/// The program of an image and what it gets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProgramSpec {
    /// The store's root and its state.
    pub root: PathBuf,
    pub state: PathBuf,
    /// Digest of the image's manifest.
    pub image: Digest,
    /// Variables on top of the image's own.
    pub env: BTreeMap<String, String>,
    pub volumes: Vec<VolumeMount>,
    pub limits: Limits,
    /// Whether it gets a way out to the network where this machine has one.
    pub network: bool,
}

/// An instance as [`list`] finds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    pub instance: Instance,
    /// Its folder.
    pub dir: PathBuf,
    pub state: State,
    /// Whether its shim lives.
    pub alive: bool,
}

/// How an instance is (`status.json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub status: Running,
    /// How often its program was started again.
    pub restarts: u32,
    /// Bytes it uses now.
    pub memory: Option<u64>,
    /// How its program ended the last time.
    pub last: Option<String>,
    /// What a person should know, as that it has no way out to the network.
    pub notes: Vec<String>,
}

/// What a shim is asked over its socket; one request a connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// Answered by [`Response::State`].
    Status,
    /// End it and remove everything but the log: [`Response::Done`] when that is done.
    Stop { grace: Duration },
    /// Sockets of the program's network, connected to nothing, at most 16: [`Response::Sockets`]. They are good
    /// until this connection ends.
    Sockets { count: usize },
    /// Run a command beside the program: [`Response::Checked`].
    Check { argv: Vec<String>, timeout: Duration },
    /// Run a command with the three descriptors that come along: [`Response::Exited`]. More requests may follow on
    /// the connection meanwhile: [`Request::Signal`]. It is ended when the connection does.
    Exec { argv: Vec<String>, terminal: bool },
    /// To the command of this connection's [`Request::Exec`]; SIGWINCH tells that the terminal changed its size.
    Signal { signal: i32 },
}

/// What a shim answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    State(State),
    Done,
    /// The sockets come along.
    Sockets,
    Refused(String),
    Checked {
        good: bool,
        last: String,
    },
    Exited(Exit),
    Failed(String),
}
