//! How the command line talks: errors with their causes and hints, answers, what it brings to the flows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::Global;
use super::progress::Shown;
use super::report::plain;
use crate::artifact::store::Store;
use crate::build::Build;
use crate::build::host::{CA_BUNDLES, Host, TRUSTED_VARIABLES};
use crate::config::types::Pipeline;
use crate::error::{self, Problem};

/// Prints an error and answers its exit code.
pub fn fail(error: &anyhow::Error, json: bool) -> u8 {
    let code = error::exit_code(error);
    let mut causes: Vec<String> = Vec::new();
    for cause in error.chain().map(ToString::to_string) {
        // Wrappers that repeat what they wrap are told once.
        if !causes.iter().any(|told| told.ends_with(&cause)) {
            causes.push(cause);
        }
    }
    let hints = error::hints(error);
    if json {
        eprintln!(
            "{}",
            serde_json::json!({"event": "error", "message": causes.first(), "causes": causes.get(1..), "hints": hints, "exit": code})
        );
        return code;
    }
    let mut lines = causes.iter();
    if let Some(first) = lines.next() {
        eprintln!("error: {}", plain(first));
    }
    for cause in lines {
        eprintln!("  caused by: {}", plain(cause));
    }
    for hint in hints {
        eprintln!("hint: {}", plain(&hint));
    }
    code
}

/// Prints an answer: as JSON when asked, else as `text`.
pub fn answer<T: Serialize>(global: &Global, value: &T, text: impl FnOnce() -> String) -> Result<()> {
    use std::io::Write as _;
    let text = if global.json { serde_json::to_string_pretty(value)? + "\n" } else { plain(&text()).into_owned() };
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // The reader has seen enough, as with `| head`.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write the answer"),
    }
}

/// What the command line brings to every flow.
#[derive(Debug)]
pub struct Surroundings {
    pub store: Store,
    pub host: Host,
    pub progress: Shown,
    pub cwd: PathBuf,
}

impl Surroundings {
    pub fn new(global: &Global) -> Result<Self> {
        let host = host(global)?;
        let (root, state) = places(global, &host)?;
        let store = Store::open_with_state(&root, &state)?;
        Ok(Self { store, host, progress: Shown::new(global), cwd: cwd()? })
    }

    pub fn build(&self) -> Build<'_> {
        Build { store: &self.store, host: &self.host, progress: &self.progress, debs: None }
    }

    /// The pipeline named on the command line, or the one of this folder.
    pub fn pipeline(&self, name: Option<&str>) -> Result<Pipeline> {
        let file = crate::config::find(name, &self.cwd)?;
        crate::config::load(&file, &self.cwd)
    }
}

pub fn cwd() -> Result<PathBuf> {
    std::env::current_dir().context("the current folder is gone")
}

/// Where root and the service keep everything.
pub const SYSTEM: &str = "/var/lib/pipeline";

/// Whether this is root, or the user of the service, whose home that folder is.
pub fn is_system(host: &Host) -> bool {
    rustix::process::geteuid().is_root() || host.home.as_deref() == Some(Path::new(SYSTEM))
}

/// Where everything is kept: `--root`, `/var/lib/pipeline` of root and the service, or the user's XDG folders
/// (DESIGN section 7, contract 2). The second is the state's.
pub fn places(global: &Global, host: &Host) -> Result<(PathBuf, PathBuf)> {
    if let Some(root) = &global.root {
        let root = std::path::absolute(root)?;
        let state = root.join("state");
        return Ok((root, state));
    }
    if is_system(host) {
        return Ok((SYSTEM.into(), Path::new(SYSTEM).join("state")));
    }
    let home = || host.home.clone().ok_or_else(|| Problem::usage("neither `--root` nor `HOME` says where to keep things"));
    let xdg = |name: &str, default: &str| -> Result<PathBuf> {
        match host.variables.get(name).filter(|value| Path::new(value).is_absolute()) {
            Some(dir) => Ok(Path::new(dir).join("pipeline")),
            None => Ok(home()?.join(default).join("pipeline")),
        }
    };
    Ok((xdg("XDG_DATA_HOME", ".local/share")?, xdg("XDG_STATE_HOME", ".local/state")?))
}

/// This machine, as the flows see it.
pub fn host(global: &Global) -> Result<Host> {
    let variables: BTreeMap<String, String> =
        std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?))).collect();
    let trusted =
        TRUSTED_VARIABLES.iter().filter_map(|name| Some(((*name).to_string(), variables.get(*name)?.clone()))).collect();
    let configured = ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE"]
        .iter()
        .filter_map(|name| variables.get(*name).map(PathBuf::from));
    let ca_bundle = configured.chain(CA_BUNDLES.iter().map(PathBuf::from)).find(|path| path.is_file());
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |time| i64::try_from(time.as_secs()).unwrap_or(0));
    let source_date_epoch = match variables.get("SOURCE_DATE_EPOCH") {
        Some(text) => {
            Some(text.parse().map_err(|_| Problem::usage(format!("SOURCE_DATE_EPOCH is `{text}`, not a number of seconds")))?)
        }
        None => None,
    };
    Ok(Host {
        program: std::env::current_exe().context("cannot find this program")?,
        path: std::env::var_os("PATH").unwrap_or_default(),
        trusted,
        ca_bundle,
        threads: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        now,
        source_date_epoch,
        home: variables.get("HOME").map(PathBuf::from),
        fault_inside: global.fault_inside,
        variables,
    })
}
