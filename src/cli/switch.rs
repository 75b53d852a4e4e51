//! The traffic switch alone (hidden; for benches/switch.py): no ledger, no targets, nothing supervised.
//!
//! One file says everything; pools are addresses of what runs already:
//! ```json
//! {"listeners": [{"address": "127.0.0.1:8080", "tls": false}], "certificates": [{"certificate": "c.pem", "key": "k.pem"}], "workers": 1,
//!  "pools": {"blue": ["127.0.0.1:9000"]}, "live": "blue", "drain": {"requests": 30, "streams": 60, "spread": 15}}
//! ```
//! SIGHUP reads pools, live and drain again and changes the table; what the file had at first of the rest stays. SIGTERM and SIGINT
//! drain everything and end it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use serde::Deserialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::config::types::Route;
use crate::error::Problem;
use crate::rollout::switch::{CertificateFiles, Dialer, Drain, Instance, Listener, Mode, Service, Settings, Switch, Table};
use crate::rollout::target::Address;

/// The only service.
const SERVICE: &str = "bench/switch";

#[derive(Debug, clap::Args)]
pub struct SwitchArgs {
    /// What to serve (JSON)
    file: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Configuration {
    listeners: Vec<Listening>,
    #[serde(default)]
    certificates: Vec<Pair>,
    /// 0: as many as there are processors.
    #[serde(default)]
    workers: usize,
    pools: BTreeMap<String, Vec<SocketAddr>>,
    live: Option<String>,
    drain: Option<Seconds>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listening {
    address: SocketAddr,
    #[serde(default)]
    tls: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pair {
    certificate: PathBuf,
    key: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Seconds {
    requests: f64,
    streams: f64,
    spread: f64,
}

impl Configuration {
    fn load(args: &SwitchArgs) -> Result<Self> {
        let text = fs_err::read(&args.file)?;
        serde_json::from_slice(&text).map_err(|error| Problem::usage(format!("`{}`: {error}", args.file.display())).into())
    }

    fn drain(&self) -> Result<Drain> {
        let Some(Seconds { requests, streams, spread }) = self.drain else { return Ok(Drain::default()) };
        let [requests, streams, spread] = [requests, streams, spread].map(Duration::try_from_secs_f64);
        Ok(Drain { requests: requests?, streams: streams?, spread: spread? })
    }

    fn table(&self) -> Result<Table> {
        let instance =
            |address: &SocketAddr| Instance { id: address.to_string(), address: Address::Tcp(*address), port: address.port() };
        let pools = self.pools.iter().map(|(name, addresses)| (name.clone(), addresses.iter().map(instance).collect())).collect();
        let routes = vec![Route { host: None, path: "/".into(), strip: false, redirect: None }];
        let service = Service { routes, pools, live: self.live.clone(), preview: None, mode: Mode::Serve, drain: self.drain()? };
        Ok(Table { services: [(SERVICE.to_owned(), service)].into() })
    }
}

/// Serves until a signal ends it.
pub fn run(args: &SwitchArgs) -> Result<u8> {
    let configuration = Configuration::load(args)?;
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM]).context("cannot watch for signals")?;
    let mut settings = Settings::new(SystemTime::now, |text| eprintln!("{text}"));
    settings.workers = configuration.workers;
    let files = |pair: &Pair| CertificateFiles { certificate: pair.certificate.clone(), key: pair.key.clone() };
    settings.certificates = configuration.certificates.iter().map(files).collect();
    let dial: Dialer = Arc::new(|address, _| {
        Box::pin(async move {
            match address {
                Address::Tcp(address) => tokio::net::TcpStream::connect(address).await,
                Address::Shim(_) => Err(std::io::ErrorKind::Unsupported.into()),
            }
        })
    });
    let switch = Switch::new(settings, dial)?;
    switch.set(configuration.table()?)?;
    let listener = |one: &Listening| Listener::bind(if one.tls { "https" } else { "http" }, one.address, one.tls);
    switch.serve(configuration.listeners.iter().map(listener).collect::<Result<_>>()?)?;
    for signal in signals.forever() {
        if signal != SIGHUP {
            break;
        }
        // What runs goes on when the new file is none.
        if let Err(error) = Configuration::load(args).and_then(|new| switch.set(new.table()?)) {
            eprintln!("error: {error:#}");
        }
    }
    let drain = configuration.drain()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(switch.shutdown(drain.requests.max(drain.streams)));
    Ok(0)
}
