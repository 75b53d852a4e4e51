//! Runs an image in the sandbox: read-only, with a tmpfs `/tmp`, its volumes, its user, its
//! port on 127.0.0.1.
//!
//! The program is in a network namespace of its own. For each connection to the published port
//! the unshare process hands over a socket that is connected inside; two threads move the bytes.
//! Everything is bound to the caller: it ends, the program ends.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Build;
use super::image::HEALTH_LABEL;
use super::work::{self, Tree, Work};
use crate::artifact::image::{self, RunConfig};
use crate::artifact::tree::Volume;
use crate::config::types::HealthCheck;
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::sandbox::protocol::Event;
use crate::sandbox::{self, Exit, Mount, RunSpec, Session};

/// A program that was asked to stop gets SIGKILL after this long, as Docker does it.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two health checks.
const HEALTH_INTERVAL: Duration = Duration::from_millis(100);
/// How long one health check may take.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);
/// Linux exec(3) conventions of shells: 128 and the signal.
const SIGNALLED: i32 = 128;

/// The wishes of a caller.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Port on 127.0.0.1 (0: the kernel's choice) and port of the program; `None`: the image's port on both.
    pub port: Option<(u16, Option<u16>)>,
    /// In place of the image's command.
    pub command: Vec<String>,
    /// More variables.
    pub env: Vec<(String, String)>,
    /// Folders of this machine that take the place of volumes: source and target.
    pub volumes: Vec<(PathBuf, PathBuf)>,
    /// The caller's standard input is the program's.
    pub interactive: bool,
    /// This machine's network in place of an own one.
    pub host_network: bool,
}

/// Health as it is told while a program runs.
#[derive(Debug, Clone, PartialEq)]
pub enum Health {
    Healthy { seconds: f64 },
    Unhealthy { seconds: f64, last: String },
}

/// Runs the image `digest` to its end and answers its exit status. `asked` gives the signals the
/// caller got meanwhile; `stdio` are the program's standard streams.
pub fn run(
    build: &Build<'_>,
    digest: &Digest,
    options: &Options,
    stdio: [BorrowedFd<'_>; 3],
    asked: &dyn Fn() -> Option<i32>,
) -> Result<i32> {
    let (_, config) = image::read(build.store, digest)?;
    let layers = image::layers(build.store, digest)?;
    let config = config.config;
    let (port, listener) = publish(build, &config, options)?;
    let session = build.start_session(!options.host_network, options.interactive)?;
    let work = Work::take(build.store, None, &|path| session.call("remove", &path))?;
    let result = (|| {
        let trees: Vec<Tree> = layers.iter().map(|layer| work::tree(build.store, &session, layer)).collect::<Result<_>>()?;
        let spec = spec(build, &session, &work, &trees, &config, options)?;
        session.start_run(&spec, &stdio)?;
        Follow {
            build,
            session: &session,
            listener,
            port,
            waiting: VecDeque::new(),
            health: health(&config)?,
            host_network: options.host_network,
        }
        .follow(asked)
    })();
    let removed = work.remove(Some(&session));
    let status = result?;
    removed?;
    Ok(status)
}

fn spec(
    build: &Build<'_>,
    session: &Session,
    work: &Work,
    trees: &[Tree],
    config: &RunConfig,
    options: &Options,
) -> Result<RunSpec> {
    let lowers: Vec<PathBuf> = trees.iter().map(|tree| tree.root.clone()).collect();
    let program = config.program(&options.command, &options.env)?;
    let mut mounts = Vec::new();
    for (index, path) in config.volume_paths().enumerate() {
        if options.volumes.iter().any(|(_, target)| target.as_os_str() == path) {
            continue;
        }
        let dir = work.dir().join(format!("volume-{index}"));
        session.call::<_, ()>(
            "volume",
            &Volume { dir: dir.clone(), lowers: lowers.clone(), path: path.into(), user: config.user.clone(), give: false },
        )?;
        mounts.push(Mount::Bind { source: dir, target: path.into(), writable: true });
    }
    for (source, target) in &options.volumes {
        mounts.push(Mount::Bind { source: source.clone(), target: target.clone(), writable: true });
    }
    if options.host_network {
        mounts.extend(super::host::name_service());
    }
    let mut env = program.env;
    if options.interactive {
        env.extend(build.host.variables.get("TERM").map(|term| ("TERM".to_string(), term.clone())));
    }
    let upper = work.dir().join("upper");
    let scratch = work.dir().join("scratch");
    for dir in [&upper, &scratch] {
        fs_err::create_dir_all(dir)?;
    }
    fs_err::set_permissions(&upper, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    Ok(RunSpec {
        lowers,
        upper,
        read_only: true,
        program: true,
        work: scratch,
        mounts,
        secrets: Vec::new(),
        argv: program.argv,
        env,
        cwd: program.cwd,
        user: program.user,
        network: sandbox::Network::Shared,
        limits: sandbox::Limits::default(),
        timeout: None,
        passed_stdio: true,
    })
}

/// Binds the published port before anything starts, so that a taken one is told at once.
fn publish(build: &Build<'_>, config: &RunConfig, options: &Options) -> Result<(Option<u16>, Option<TcpListener>)> {
    let exposed =
        config.exposed_ports.iter().flat_map(|ports| ports.keys()).find_map(|port| port.split('/').next()?.parse::<u16>().ok());
    let (outside, inside) = match options.port {
        Some((outside, inside)) => (
            outside,
            inside.or(exposed).ok_or_else(|| {
                Problem::usage("the image says no port").hint("write `--port OUTSIDE:INSIDE`, or set `image.port`")
            })?,
        ),
        None => match exposed {
            // A command of one's own is not what the port is for.
            Some(port) if !options.host_network && options.command.is_empty() => (port, port),
            port => return Ok((port, None)),
        },
    };
    if options.host_network {
        return Ok((Some(inside), None));
    }
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, outside));
    let listener = TcpListener::bind(address).map_err(|error| {
        Problem::failed(format!("port {outside} on 127.0.0.1 cannot be had: {error}"))
            .hint("choose another with `--port`; 0 lets the kernel choose")
    })?;
    listener.set_nonblocking(true)?;
    build.progress.note(format!("listening on http://{}", listener.local_addr()?));
    Ok((Some(inside), Some(listener)))
}

fn health(config: &RunConfig) -> Result<Option<Probe>> {
    let Some(text) = config.labels.as_ref().and_then(|labels| labels.get(HEALTH_LABEL)) else { return Ok(None) };
    let health: crate::config::types::Health = serde_json::from_str(text).context("the image's health label is broken")?;
    Ok(Some(Probe {
        check: health.check,
        deadline: health.deadline,
        started: Instant::now(),
        next: Instant::now(),
        pending: false,
        last: "no answer yet".into(),
    }))
}

/// A health check that is asked until it is good or its time is up.
struct Probe {
    check: HealthCheck,
    deadline: Duration,
    started: Instant,
    next: Instant,
    pending: bool,
    last: String,
}

/// Whose connection a request to the unshare process was for.
enum Waiting {
    Client(TcpStream),
    Health,
}

struct Follow<'a> {
    build: &'a Build<'a>,
    session: &'a Session,
    listener: Option<TcpListener>,
    port: Option<u16>,
    waiting: VecDeque<Waiting>,
    health: Option<Probe>,
    host_network: bool,
}

impl Follow<'_> {
    fn follow(&mut self, asked: &dyn Fn() -> Option<i32>) -> Result<i32> {
        let mut stop_at: Option<Instant> = None;
        loop {
            let (event, client) = self.wait()?;
            if client {
                self.accept()?;
            }
            if event {
                match self.session.next_event()? {
                    (Event::Exited(exit), _) => {
                        return Ok(match exit {
                            Exit::Code(code) => code,
                            Exit::Signal(signal) => SIGNALLED + signal,
                            Exit::TimedOut => SIGNALLED + libc::SIGKILL,
                        });
                    }
                    (event, fds) => self.answered(&event, fds),
                }
            }
            if let Some(signal) = asked() {
                // Asked twice: no more patience.
                let signal = if stop_at.is_some() { libc::SIGKILL } else { signal };
                self.session.signal(signal)?;
                stop_at.get_or_insert(Instant::now() + STOP_TIMEOUT);
                self.health = None;
            }
            if stop_at.is_some_and(|at| Instant::now() >= at) {
                self.build.progress.warn(format!("the program did not stop within {} s and is killed", STOP_TIMEOUT.as_secs()));
                self.session.signal(libc::SIGKILL)?;
                stop_at = Some(Instant::now() + STOP_TIMEOUT);
            }
            self.probe()?;
        }
    }

    /// Waits a moment for an event or a client.
    fn wait(&self) -> Result<(bool, bool)> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.session.as_fd(), PollFlags::IN)];
        if let Some(listener) = &self.listener {
            fds.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
        }
        let timeout = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the program"),
        }
        let is = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok((is(0), is(1)))
    }

    fn accept(&mut self) -> Result<()> {
        let (Some(listener), Some(port)) = (&self.listener, self.port) else { return Ok(()) };
        match listener.accept() {
            Ok((client, _)) => {
                self.session.connect(port)?;
                self.waiting.push_back(Waiting::Client(client));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // A client that is gone again, or too many files: the next one may do.
            Err(error) => self.build.progress.warn(format!("cannot accept a connection: {error}")),
        }
        Ok(())
    }

    fn answered(&mut self, event: &Event, fds: Vec<OwnedFd>) {
        match (event, self.waiting.pop_front()) {
            (Event::Connected, Some(Waiting::Client(client))) => {
                if let Some(inside) = fds.into_iter().next() {
                    forward(client, TcpStream::from(inside));
                }
            }
            (Event::Connected, Some(Waiting::Health)) => {
                let result = fds.into_iter().next().map_or_else(|| Err("no socket".into()), |fd| self.ask(TcpStream::from(fd)));
                self.judged(result);
            }
            (Event::Checked(good), Some(Waiting::Health)) => {
                self.judged(if *good { Ok(()) } else { Err("the command failed".into()) })
            }
            (Event::Refused(error), Some(Waiting::Health)) => self.judged(Err(error.clone())),
            // A client of a program that does not listen: its connection ends.
            _ => {}
        }
    }

    /// Sends the next health check when it is time.
    fn probe(&mut self) -> Result<()> {
        let Some(probe) = &mut self.health else { return Ok(()) };
        if probe.pending || Instant::now() < probe.next {
            return Ok(());
        }
        if probe.started.elapsed() > probe.deadline {
            let health = Health::Unhealthy { seconds: probe.started.elapsed().as_secs_f64(), last: probe.last.clone() };
            self.health = None;
            self.tell(&health);
            return Ok(());
        }
        probe.pending = true;
        match (&probe.check, self.port) {
            (HealthCheck::Command(command), _) => self.session.check(command)?,
            (_, Some(port)) if self.host_network => {
                let connected = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), HEALTH_TIMEOUT);
                let result = connected.map_err(|error| error.to_string()).and_then(|stream| self.ask(stream));
                self.judged(result);
                return Ok(());
            }
            (_, Some(port)) => self.session.connect(port)?,
            (_, None) => {
                self.health = None;
                return Ok(());
            }
        }
        self.waiting.push_back(Waiting::Health);
        Ok(())
    }

    fn ask(&self, stream: TcpStream) -> Result<(), String> {
        match self.health.as_ref().map(|probe| &probe.check) {
            Some(HealthCheck::Http(path)) => http(stream, path),
            _ => Ok(()),
        }
    }

    fn judged(&mut self, result: Result<(), String>) {
        let Some(probe) = &mut self.health else { return };
        match result {
            Ok(()) => {
                let health = Health::Healthy { seconds: probe.started.elapsed().as_secs_f64() };
                self.health = None;
                self.tell(&health);
            }
            Err(last) => {
                probe.pending = false;
                probe.last = last;
                probe.next = Instant::now() + HEALTH_INTERVAL;
            }
        }
    }

    fn tell(&self, health: &Health) {
        match health {
            Health::Healthy { seconds } => self.build.progress.note(format!("healthy after {seconds:.1} s")),
            Health::Unhealthy { seconds, last } => self.build.progress.warn(format!("not healthy after {seconds:.0} s: {last}")),
        }
    }
}

/// One `GET`; 2xx and 3xx are good.
fn http(mut stream: TcpStream, path: &str) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    stream.set_nonblocking(false).map_err(text)?;
    stream.set_read_timeout(Some(HEALTH_TIMEOUT)).map_err(text)?;
    stream.set_write_timeout(Some(HEALTH_TIMEOUT)).map_err(text)?;
    stream
        .write_all(
            format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: pipeline-health\r\nConnection: close\r\n\r\n")
                .as_bytes(),
        )
        .map_err(text)?;
    let mut head = Vec::new();
    let mut buffer = [0; 512];
    while !head.windows(2).any(|pair| pair == b"\r\n") && head.len() < 4096 {
        match stream.read(&mut buffer).map_err(text)? {
            0 => break,
            read => head.extend_from_slice(&buffer[..read]),
        }
    }
    let line = String::from_utf8_lossy(&head).lines().next().unwrap_or_default().to_string();
    match line.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok()) {
        Some(200..=399) => Ok(()),
        Some(status) => Err(format!("{path} answered {status}")),
        None => Err(format!("{path} gave no HTTP answer")),
    }
}

/// Moves bytes both ways until both sides have ended.
fn forward(client: TcpStream, inside: TcpStream) {
    let _ = client.set_nonblocking(false);
    let _ = inside.set_nonblocking(false);
    let (Ok(client_back), Ok(inside_back)) = (client.try_clone(), inside.try_clone()) else { return };
    let move_bytes = |mut from: TcpStream, mut to: TcpStream| {
        std::thread::spawn(move || {
            // Whatever ends a connection ends it: the other side sees it closed.
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Write);
        });
    };
    move_bytes(client, inside_back);
    move_bytes(inside, client_back);
}
