//! `pipeline serve`: the daemon, with everything it needs of this machine.
//!
//! Its decisions (how a release does, and that a rollout failed) are made in its own name, `pipeline` unless `--as` says
//! another. Where a pipeline has `people`, that name is one of them, with the roles `report` and `promote`, and the key that
//! signs comes as for every verb: `PIPELINE_SIGNING_KEY`, or Git's `user.signingKey`.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use jiff::Timestamp;

use super::daemon::{self, Daemon};
use super::desk::{Office, open_ledger};
use super::progress::Shown;
use super::{Global, targets, ui};
use crate::artifact::remote;
use crate::artifact::store::Store;
use crate::build::base;
use crate::build::host::Host;
use crate::cmd::Cmd;
use crate::config::types::{self as config, Command, Seconds, SecretRef};
use crate::error::{self, Kind as Fault, Problem};
use crate::oci::digest::Digest;
use crate::oci::registry::{Reach, Reference};
use crate::progress::{Progress as _, Silent};
use crate::release::decision::{Decision, Kind, Status};
use crate::release::desk::{self, Ask, Desk};
use crate::release::gate::Ended;
use crate::release::ledger::{Ledger, Remote, RemoteError, Synced};
use crate::release::promotion::{Action, Back};
use crate::release::state::{Binding, State};
use crate::rollout::dial;
use crate::rollout::generation::{Generation, Program};
use crate::rollout::plan::{Unprepared, Verdict, VerdictKind, Wanted as Goal};
use crate::rollout::switch::{self, CertificateFiles, Listener, access::AccessSink, listen};
use crate::rollout::target::{Address, Secret, Target};
use crate::serve::https::{self, Door};
use crate::serve::sockets::{self, Wanted};
use crate::serve::world::{self, Place, Reading, World};

/// Where requests are taken when nothing says so.
const LISTEN: &str = "127.0.0.1:8080";
/// Lines of the log of what failed that the ledger gets, and characters of each.
const LOG_LINES: usize = 5;
const LOG_LINE_MAX: usize = 200;
/// Generations of the past that a daemon without a state looks for.
const PAST_MAX: usize = 5;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Take HTTP requests at this address; may be repeated. Default: 127.0.0.1:8080, or the sockets systemd passes
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Vec<SocketAddr>,
    /// Take HTTPS requests at this address; may be repeated
    #[arg(long, value_name = "ADDRESS:PORT", requires = "certificate")]
    listen_tls: Vec<SocketAddr>,
    /// Certificate for HTTPS, and those that lead to its authority, in PEM; the nth goes with the nth key
    #[arg(long, value_name = "FILE", requires = "key")]
    certificate: Vec<PathBuf>,
    /// Private key of the certificate, in PEM
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Vec<PathBuf>,
    /// Answer the API with HTTPS at this address, too; may be repeated. Needs --certificate, and --api-token or --api-authority
    #[arg(long, value_name = "ADDRESS:PORT")]
    api_listen: Vec<SocketAddr>,
    /// The API over HTTPS is for who has one of the tokens in this file, one on each line
    #[arg(long, value_name = "FILE")]
    api_token: Option<PathBuf>,
    /// The API over HTTPS is for who has a certificate of the authority in this file, in PEM
    #[arg(long, value_name = "FILE")]
    api_authority: Option<PathBuf>,
    /// Take the place of the daemon that serves now; no request is lost
    #[arg(long)]
    replace: bool,
    /// Return as soon as the daemon serves, which goes on by itself
    #[arg(long)]
    detach: bool,
    /// Longest time between a decision made elsewhere and the look at it
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = seconds)]
    poll: Duration,
    /// Write one JSON line for each request to this file
    #[arg(long, value_name = "FILE")]
    access_log: Option<PathBuf>,
    /// Name in which the daemon decides
    #[arg(long = "as", value_name = "NAME", default_value = "pipeline")]
    name: String,
    /// Believe the X-Forwarded fields that come from this network; may be repeated
    #[arg(long, value_name = "NETWORK")]
    trust: Vec<String>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = Seconds::try_from(text.to_owned())?.duration();
    if seconds.is_zero() { Err("it has to look now and then".into()) } else { Ok(seconds) }
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    let host = ui::host(global)?;
    let (root, state) = ui::places(global, &host)?;
    let given = from_systemd(&host)?;
    if args.certificate.len() != args.key.len() {
        return Err(Problem::usage("there are not as many certificates as keys")
            .hint("`--certificate` and `--key` go in pairs")
            .into());
    }
    let pairs = args.certificate.iter().zip(&args.key);
    let certificates: Vec<_> =
        pairs.map(|(certificate, key)| CertificateFiles { certificate: certificate.clone(), key: key.clone() }).collect();
    let door = Door { certificates: certificates.clone(), tokens: args.api_token.clone(), authority: args.api_authority.clone() };
    if !args.api_listen.is_empty() {
        // Before anything else is touched.
        door.ready()?;
    }
    let socket = daemon::socket(global, &host)?;
    if args.detach {
        return detach(&host, &Daemon::new(socket));
    }
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        signal_hook::flag::register(signal, ended.clone()).context("cannot watch for signals")?;
    }
    let world = Arc::new(Here::open(global, &args.name, host, root, state.clone())?);
    let told = world.clone();
    let mut settings = switch::Settings::new(SystemTime::now, move |text: &str| told.note(text));
    settings.trusted = args.trust.iter().map(|network| Ok(network.parse()?)).collect::<Result<_>>()?;
    settings.certificates = certificates;
    if let Some(file) = &args.access_log {
        let opened = fs_err::OpenOptions::new().create(true).append(true).open(file)?;
        settings.access = Some(Box::new(LogFile(opened)));
    }
    let serve = crate::serve::Settings {
        version: env!("PIPELINE_VERSION").into(),
        state: state.join("rollout"),
        socket,
        listeners: listeners(&args, given.is_empty()),
        replace: args.replace,
        poll: args.poll,
        program: world.host.program.clone(),
        door,
    };
    let dialer: switch::Dialer = Arc::new(|address: Address, port| Box::pin(async move { dial::dial(&address, port).await }));
    crate::serve::run(&serve, world, given, settings, dialer, &ended)?;
    Ok(0)
}

/// Starts the daemon in a session of its own, with the same arguments, and waits until it is that one which answers.
fn detach(host: &Host, daemon: &Daemon) -> Result<u8> {
    let words = std::env::args_os().skip(1).filter(|word| word != "--detach");
    let mut child = Cmd::new(&host.program).args(words).kept().spawn()?;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for the daemon")? {
            // It said why.
            return Ok(status.code().and_then(|code| u8::try_from(code).ok()).filter(|code| *code != 0).unwrap_or(1));
        }
        // One that is just being replaced may answer anything.
        if let Ok(Some(overview)) = daemon.overview()
            && overview.daemon.pid == child.id()
        {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// `pipeline __hold PATH`.
pub fn hold(path: &Path) -> Result<()> {
    sockets::hold(path)
}

/// `alone`: systemd passed none.
fn listeners(args: &Args, alone: bool) -> Vec<Wanted> {
    let plain = args.listen.iter().map(|address| Wanted { name: "http".into(), address: *address, tls: false });
    let tls = args.listen_tls.iter().map(|address| Wanted { name: "https".into(), address: *address, tls: true });
    let api = args.api_listen.iter().map(|address| Wanted { name: https::NAME.into(), address: *address, tls: true });
    let mut wanted: Vec<Wanted> = plain.chain(tls).collect();
    if wanted.is_empty() && alone && !args.replace {
        wanted.extend(LISTEN.parse().map(|address| Wanted { name: "http".into(), address, tls: false }));
    }
    wanted.extend(api);
    wanted
}

/// The sockets that systemd passes to this process (sd_listen_fds(3)).
fn from_systemd(host: &Host) -> Result<Vec<Listener>> {
    let get = |name: &str| host.variables.get(name).map(String::as_str).unwrap_or_default();
    if get("LISTEN_PID") != std::process::id().to_string() {
        return Ok(Vec::new());
    }
    listen::from_systemd(get("LISTEN_FDS"), get("LISTEN_FDNAMES"))
}

/// The access log in a file.
struct LogFile(fs_err::File);

impl AccessSink for LogFile {
    fn write(&mut self, lines: &[u8]) {
        // A disk that is full stops no request.
        let _ = self.0.write_all(lines);
    }
}

/// This machine.
struct Here {
    global: Global,
    name: String,
    host: Host,
    root: PathBuf,
    state: PathBuf,
    ledger: Ledger,
    /// The same ledger, for the thread that waits for the network.
    syncing: Ledger,
    remote: Option<Remote>,
    shown: Shown,
    targets: Mutex<BTreeMap<String, Arc<dyn Target>>>,
}

impl std::fmt::Debug for Here {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Here").field("root", &self.root).finish_non_exhaustive()
    }
}

impl Here {
    fn open(global: &Global, name: &str, host: Host, root: PathBuf, state: PathBuf) -> Result<Self> {
        // The store is opened when it is needed only: as long as it is open, nobody prunes it.
        let office = Office::open_as(global, None, name)?;
        let syncing = open_ledger(&state.join("ledger"))?;
        let (ledger, remote) = (office.ledger.clone(), office.remote.clone());
        drop(office);
        let (global, name, shown) = (global.clone(), name.to_owned(), Shown::new(global));
        Ok(Self { global, name, host, root, state, ledger, syncing, remote, shown, targets: Mutex::default() })
    }

    fn office(&self) -> Result<Office> {
        Office::open_as(&self.global, None, &self.name)
    }

    /// Everything the store has of `generation`; pulled from `registry` when the release is not there.
    fn programs(&self, pipeline: &str, generation: &Generation) -> Result<BTreeMap<String, Program>> {
        let store = Store::open_with_state(&self.root, &self.state)?;
        let there = generation.prepare(&store, pipeline);
        let Err(missing) = there else { return there };
        let loaded = desk::load(&self.ledger.snapshot()?, pipeline)?;
        let Some(registry) = loaded.and_then(|loaded| loaded.policy.registry) else { return Err(missing) };
        drop(store);
        let around = ui::Surroundings::new(&self.global)?;
        let reference: Reference = format!("{registry}@{}", generation.release).parse()?;
        self.note(&format!("release {} is not in the store, and is pulled from {registry}", generation.version));
        let client = base::registry(&around.build())?;
        let name = format!("{pipeline}:{}", generation.release.short());
        remote::pull(&around.store, &client, &reference, Some(&name), Reach::Machine, &Silent)?;
        generation.prepare(&around.store, pipeline)
    }
}

impl World for Here {
    fn target(&self, settings: &config::Target) -> Result<Arc<dyn Target>> {
        let mut known = self.targets.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let key = world::key(settings);
        if let Some(target) = known.get(&key) {
            return Ok(target.clone());
        }
        let target: Arc<dyn Target> = Arc::from(targets::target(&self.host, &self.root, &self.state, settings)?);
        known.insert(key, target.clone());
        Ok(target)
    }

    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    fn sync(&self) -> Result<()> {
        let Some(remote) = &self.remote else { return Ok(()) };
        match self.syncing.sync(remote).map_err(RemoteError::into_error)? {
            Synced::Unpublished { theirs, .. } => {
                self.syncing.publish(remote, theirs).map_err(RemoteError::into_error)?;
            }
            Synced::Same | Synced::Forwarded { .. } => {}
        }
        Ok(())
    }

    fn read(&self) -> Result<Reading> {
        let snapshot = self.ledger.snapshot()?;
        let mut reading = Reading { tip: snapshot.id().map(|id| id.to_string()), ..Reading::default() };
        for pipeline in snapshot.pipelines()? {
            let Some(loaded) = desk::load(&snapshot, &pipeline)? else { continue };
            for (name, environment) in
                loaded.policy.environments.iter().filter(|(_, environment)| !environment.targets.is_empty())
            {
                let Some(state) = loaded.states.get(name) else { continue };
                let current = state.current.as_ref();
                let wanted = Goal {
                    generation: current.map(|binding| Generation::of(environment, binding)),
                    is_rollback: current.is_some_and(|binding| came_back(state, binding)),
                    health: state.health.status,
                    settings: environment.rollout.clone(),
                    together: environment.together.clone(),
                };
                let past = state.bindings().take(PAST_MAX).map(|binding| Generation::of(environment, binding)).collect();
                let place = Place { wanted, routes: environment.routes.clone(), past };
                reading.environments.insert(format!("{pipeline}/{name}"), place);
            }
        }
        Ok(reading)
    }

    fn tell(&self, environment: &str, verdict: &Verdict) -> Result<String> {
        let (pipeline, name) = environment.split_once('/').context("the name of an environment")?;
        self.office()?.sit(|desk| {
            desk.sync(true)?;
            let loaded = desk.load(pipeline)?;
            let state = loaded.view().state(name).map_err(Problem::from)?;
            let current = state.current.as_ref().map(Binding::pair);
            if current != Some((verdict.release, verdict.config)) {
                return Ok("the ledger wants something else by now".into());
            }
            let reason = reason(verdict);
            match verdict.kind {
                VerdictKind::Rollback(release, config) => roll_back(desk, state, (release, config), &reason),
                VerdictKind::Hold => hold_back(desk, state, &reason),
                VerdictKind::Freeze => {
                    let freeze = |_: &desk::Loaded, _: &State, time| {
                        Ok(Decision { reason: reason.clone(), ..Decision::new(Kind::Freeze, &desk.name, time) })
                    };
                    desk.note(pipeline, name, &freeze)?;
                    Ok("frozen, as `on_failure` says".into())
                }
            }
        })
    }

    fn report(&self, environment: &str, pair: (Digest, Digest), status: Status) -> Result<()> {
        let (pipeline, name) = environment.split_once('/').context("the name of an environment")?;
        self.office()?.sit(|desk| {
            let report = |_: &desk::Loaded, state: &State, time| {
                let version = state.current.as_ref().map(|binding| binding.version.clone());
                let (to, config) = (Some(pair.0), Some(pair.1));
                Ok(Decision { to, config, version, health: Some(status), ..Decision::new(Kind::Report, &desk.name, time) })
            };
            desk.note(pipeline, name, &report).map(drop)
        })
    }

    fn prepare(&self, environment: &str, generation: &Generation) -> Result<BTreeMap<String, Program>, Unprepared> {
        let pipeline = environment.split_once('/').map_or(environment, |(pipeline, _)| pipeline);
        self.programs(pipeline, generation).map_err(|error| {
            let is_final = error::problem(&error).is_none_or(|problem| problem.kind != Fault::Transient);
            Unprepared { reason: format!("release {} cannot be had: {error:#}", generation.version), is_final }
        })
    }

    fn secrets(&self, generation: &Generation) -> Result<BTreeMap<String, Secret>> {
        let mut secrets = BTreeMap::new();
        for (name, reference) in &generation.config.secrets {
            let bytes = match reference {
                SecretRef::File(path) => fs_err::read(path).with_context(|| format!("cannot read the secret `{name}`"))?,
                SecretRef::Stored(id) => {
                    if id.is_empty() || !id.chars().all(|c| c.is_ascii_hexdigit()) {
                        return Err(Problem::failed(format!("the secret `{name}` is not set"))
                            .hint("`pipeline secret set` sets it")
                            .into());
                    }
                    let stored = fs_err::read(self.state.join("secrets").join(id));
                    stored.with_context(|| format!("the secret `{name}` is not kept on this machine"))?
                }
                SecretRef::Env(variable) => {
                    let value = self.host.variables.get(variable).with_context(|| {
                        Problem::failed(format!("the daemon has no variable `{variable}` for the secret `{name}`"))
                    })?;
                    value.clone().into_bytes()
                }
            };
            secrets.insert(name.clone(), Secret::new(bytes));
        }
        Ok(secrets)
    }

    fn volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    fn run(&self, words: &[String], variables: &BTreeMap<String, String>, timeout: Duration) -> Result<String, String> {
        let command = Command { run: words.to_vec(), timeout: Seconds(timeout.as_secs().max(1)), script: None };
        let office = self.office().map_err(|error| format!("{error:#}"))?;
        let ended = office.sit(|desk| desk.evidence.run_command(&command, variables)).map_err(|error| format!("{error:#}"))?;
        let shown = words.join(" ");
        let last = |text: &str| text.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned);
        match ended {
            Ended::Status(0, stdout, _) => Ok(last(&stdout).unwrap_or_default()),
            Ended::Status(status, stdout, stderr) => {
                let said = last(&stderr).or_else(|| last(&stdout)).map(|line| format!(": {line}")).unwrap_or_default();
                Err(format!("`{shown}` ended with status {status}{said}"))
            }
            Ended::Signal(signal) => Err(format!("`{shown}` ended with signal {signal}")),
            Ended::Timeout => Err(format!("`{shown}` did not end within {} s", timeout.as_secs())),
        }
    }

    fn ready(&self) {
        // sd_notify(3): with the process that is the service's from now on, for `--replace`.
        let Some(path) = self.host.variables.get("NOTIFY_SOCKET") else { return };
        let told = || -> std::io::Result<()> {
            use std::os::linux::net::SocketAddrExt as _;
            use std::os::unix::net::{SocketAddr, UnixDatagram};
            let address = match path.strip_prefix('@') {
                Some(name) => SocketAddr::from_abstract_name(name)?,
                None => SocketAddr::from_pathname(path)?,
            };
            let message = format!("READY=1\nMAINPID={}\n", std::process::id());
            UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(drop)
        };
        if let Err(error) = told() {
            self.warn(&format!("systemd cannot be told that the daemon serves: {error}"));
        }
    }

    fn warn(&self, text: &str) {
        self.shown.warn(text.to_owned());
    }

    fn note(&self, text: &str) {
        self.shown.note(text.to_owned());
    }
}

/// Whether the current pair came by a rollback: that leaves a hold of the same moment.
fn came_back(state: &State, binding: &Binding) -> bool {
    state.hold.as_ref().is_some_and(|hold| hold.set_by == Kind::Rollback && hold.since == binding.since)
}

/// What the ledger keeps of a failure: why, and the last lines of what failed, in one line.
fn reason(verdict: &Verdict) -> String {
    let lines = &verdict.log[verdict.log.len().saturating_sub(LOG_LINES)..];
    let clean = |line: &String| -> String { line.chars().filter(|c| !c.is_control()).take(LOG_LINE_MAX).collect() };
    let lines: Vec<String> = lines.iter().map(clean).filter(|line| !line.trim().is_empty()).collect();
    let log = if lines.is_empty() { String::new() } else { format!("; its last lines: {}", lines.join(" | ")) };
    let did = match verdict.kind {
        VerdictKind::Rollback(..) => "rolled back",
        VerdictKind::Hold => "held",
        VerdictKind::Freeze => "frozen",
    };
    format!("{did} by pipeline because {}{log}", verdict.reason)
}

/// Writes that the pair runs again; where the rules do not let that, a hold says that nothing more is tried.
fn roll_back(desk: &Desk<'_>, state: &State, pair: (Digest, Digest), reason: &str) -> Result<String> {
    let (pipeline, name) = (&state.pipeline, &state.environment);
    let ask = Ask { reason, ..Ask::default() };
    let why = match desk.decide(pipeline, name, &Action::Rollback(Back::Pair(pair.0, pair.1)), &ask) {
        Ok(outcome) if outcome.commit.is_some() => return Ok("rolled back".into()),
        Ok(outcome) => {
            let stops = outcome.plan.answers.iter().find(|answer| answer.stops());
            let answer = stops.map(|answer| format!("{}: {}", answer.gate, answer.reason));
            answer.or(outcome.plan.refused).unwrap_or_default()
        }
        // What waiting can change is tried again.
        Err(error) if error::exit_code(&error) == Fault::Transient as u8 => return Err(error),
        Err(error) => format!("{error:#}"),
    };
    hold_back(desk, state, &format!("{reason} (the ledger cannot go back itself: {why})"))
}

fn hold_back(desk: &Desk<'_>, state: &State, reason: &str) -> Result<String> {
    if state.hold.as_ref().is_some_and(|hold| hold.reason == reason) {
        return Ok("there is a hold already".into());
    }
    let hold = |_: &desk::Loaded, _: &State, time| {
        Ok(Decision { reason: reason.to_owned(), ..Decision::new(Kind::Hold, &desk.name, time) })
    };
    desk.note(&state.pipeline, &state.environment, &hold)?;
    Ok("held".into())
}
