//! What the daemon needs of everything around it: the ledger, the store, secrets, targets and the clock.
//!
//! A trait, so that the daemon is tested with targets of a few lines; the real one is made in `cli/serve.rs`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Result;
use jiff::Timestamp;

use crate::config::types::{self as config, Route};
use crate::oci::digest::Digest;
use crate::release::decision::Status;
use crate::rollout::generation::{Generation, Program};
use crate::rollout::plan::{Unprepared, Verdict, Wanted};
use crate::rollout::target::{Secret, Target};

/// Calls block, and are made from threads.
pub trait World: Send + Sync + std::fmt::Debug {
    /// What serves such settings.
    fn target(&self, settings: &config::Target) -> Result<Arc<dyn Target>>;
    fn now(&self) -> Timestamp;
    /// Brings the ledger up to date with its remote, and sends there what was decided here. Nothing without one.
    fn sync(&self) -> Result<()>;
    /// Reads the ledger as it is on this machine.
    fn read(&self) -> Result<Reading>;
    /// Writes a verdict into the ledger, unless it is about something that the ledger does not want any more. Answers what
    /// was written, for people.
    fn tell(&self, environment: &str, verdict: &Verdict) -> Result<String>;
    /// Writes down how the pair (release, configuration) does.
    fn report(&self, environment: &str, pair: (Digest, Digest), status: Status) -> Result<()>;
    /// Reads what a generation is made of; what the store does not have is fetched.
    fn prepare(&self, environment: &str, generation: &Generation) -> Result<BTreeMap<String, Program>, Unprepared>;
    /// The values of a generation's secrets, read now.
    fn secrets(&self, generation: &Generation) -> Result<BTreeMap<String, Secret>>;
    /// Below this are the volumes: `PIPELINE/ENVIRONMENT/NAME`.
    fn volumes(&self) -> PathBuf;
    /// Runs a command of a check on this machine, with these variables beside the daemon's.
    fn run(&self, words: &[String], variables: &BTreeMap<String, String>, timeout: std::time::Duration)
    -> Result<String, String>;
    /// It serves from now on, or takes over: told to whoever started it.
    fn ready(&self);
    /// Something that a person should know.
    fn warn(&self, text: &str);
    fn note(&self, text: &str);
}

/// The ledger, as far as it is about what runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reading {
    pub tip: Option<String>,
    /// By name, `shop/prod`; those with targets.
    pub environments: BTreeMap<String, Place>,
}

/// What the ledger says about one environment.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    pub wanted: Wanted,
    pub routes: Vec<Route>,
    /// The generations it had, newest first, in today's settings: by them is known what runs when the state is lost.
    pub past: Vec<Generation>,
}

/// Settings of one kind and engine have one target.
pub fn key(settings: &config::Target) -> String {
    match settings {
        config::Target::Docker(docker) => format!("docker {}", docker.host.as_deref().unwrap_or_default()),
        other => other.kind().to_owned(),
    }
}
