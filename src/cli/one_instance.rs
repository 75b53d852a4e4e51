//! `pipeline __instance`: one instance of the local target, driven by the tests as the daemon drives it.

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Global, ui};
use crate::config::types as config;
use crate::oci::digest::Digest;
use crate::rollout::dial;
use crate::rollout::shim::{self, Instance, Owned};
use crate::rollout::target::local::Local;
use crate::rollout::target::{InstanceSpec, Limits, Secret, Target as _, VolumeMount};

#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Start the instance that standard input describes
    Start,
    /// Print what there is as JSON
    List,
    Stop {
        id: String,
        /// Seconds
        grace: f64,
    },
    Forget {
        id: String,
    },
    Logs {
        id: String,
        lines: usize,
        #[arg(long)]
        follow: bool,
    },
    Check {
        id: String,
        /// Seconds
        timeout: f64,
        #[arg(last = true)]
        argv: Vec<String>,
    },
    Exec {
        id: String,
        #[arg(long, short)]
        interactive: bool,
        #[arg(last = true)]
        argv: Vec<String>,
    },
    /// `GET /` through the dialer, and how long COUNT connections take
    Get {
        id: String,
        port: u16,
        #[arg(default_value_t = 1)]
        count: u32,
    },
    /// Own the command that standard input describes
    Command {
        id: String,
    },
}

/// An instance, as the tests write it.
#[derive(Debug, Deserialize)]
struct Wanted {
    id: String,
    artifact: Digest,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    secrets: BTreeMap<String, String>,
    /// Name and path in the program's tree.
    #[serde(default)]
    volumes: BTreeMap<String, String>,
    #[serde(default)]
    limits: Limits,
}

pub fn run(global: &Global, verb: Verb) -> Result<u8> {
    let host = ui::host(global)?;
    let (root, state) = ui::places(global, &host)?;
    let local = Local::new(&host.program, &root, &state);
    match verb {
        Verb::Start => start(&local, &state)?,
        Verb::List => println!("{}", serde_json::to_string(&local.list()?)?),
        Verb::Stop { id, grace } => local.stop(&id, Duration::from_secs_f64(grace))?,
        Verb::Forget { id } => local.forget(&id)?,
        Verb::Logs { id, lines, follow } => local.logs(&id, lines, follow, &mut |chunk| {
            let mut stdout = std::io::stdout();
            stdout.write_all(chunk).and_then(|()| stdout.flush()).is_ok()
        })?,
        Verb::Check { id, timeout, argv } => {
            let checked = local.check(&id, &argv, Duration::from_secs_f64(timeout))?;
            println!("{}", serde_json::to_string(&checked)?);
        }
        Verb::Exec { id, interactive, argv } => {
            return Ok(u8::try_from(local.exec(&id, &argv, interactive)?).unwrap_or(u8::MAX));
        }
        Verb::Get { id, port, count } => get(&local, &id, port, count)?,
        Verb::Command { id } => command(&host.program, &state.join("instances").join(&id), id)?,
    }
    Ok(0)
}

fn input() -> Result<String> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
    Ok(text)
}

fn start(local: &Local, state: &std::path::Path) -> Result<()> {
    let wanted: Wanted = serde_json::from_str(&input()?)?;
    let volume = |(name, path): (String, String)| VolumeMount { source: state.join("volumes/test").join(&name), name, path };
    let settings: config::Target = serde_json::from_value(serde_json::json!({"local": {}}))?;
    local.start(&InstanceSpec {
        id: wanted.id,
        environment: "test/dev".into(),
        generation: "000000000000".into(),
        target: "main".into(),
        number: 0,
        artifact: wanted.artifact,
        port: None,
        env: wanted.env,
        secrets: wanted.secrets.into_iter().map(|(name, value)| (name, Secret::new(value))).collect(),
        volumes: wanted.volumes.into_iter().map(volume).collect(),
        limits: wanted.limits,
        settings,
    })
}

fn command(program: &std::path::Path, dir: &std::path::Path, id: String) -> Result<()> {
    #[derive(Deserialize)]
    struct Wanted {
        owned: Owned,
        secrets: BTreeMap<String, String>,
    }
    let wanted: Wanted = serde_json::from_str(&input()?)?;
    let instance = Instance {
        format: shim::FORMAT,
        kind: "local".into(),
        id,
        environment: "test/dev".into(),
        generation: "000000000000".into(),
        target: "main".into(),
        number: 0,
        data: serde_json::Value::Null,
    };
    let secrets = wanted.secrets.into_iter().map(|(name, value)| (name, Secret::new(value))).collect();
    shim::start(program, dir, &instance, &wanted.owned, &secrets).map(drop)
}

fn get(local: &Local, id: &str, port: u16, count: u32) -> Result<()> {
    let found = local.list()?.into_iter().find(|found| found.id == id).context("no such instance")?;
    let address = found.address.context("it has no address")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut took = Vec::new();
        for _ in 0..count {
            let started = Instant::now();
            let stream = dial::dial(&address, port).await?;
            took.push(started.elapsed());
            drop(stream);
        }
        took.sort();
        let micros = |at: usize| took.get(at).map_or(0, Duration::as_micros);
        eprintln!("dial: median {} µs, p99 {} µs", micros(took.len() / 2), micros(took.len() * 99 / 100));
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let mut stream = dial::dial(&address, port).await?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        print!("{}", answer.split_once("\r\n\r\n").map_or("", |(_, body)| body));
        Ok(())
    })
}
