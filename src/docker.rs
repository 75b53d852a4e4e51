//! Docker and podman over their unix socket: the only user of bollard.
//!
//! A blocking face: every call runs on a small runtime of its own and opens its own connection, so that calls come
//! from any thread, nothing is shared between them, and an engine that was restarted is simply there again. An engine
//! that does not answer is a transient [`Problem`] that names its socket. Nothing here knows what a release is.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use bollard::container::LogOutput;
use bollard::errors::Error;
use bollard::exec::{StartExecOptions, StartExecResults};
use bollard::models::{
    ContainerCreateBody, ContainerSummary, ContainerSummaryStateEnum, ExecConfig, HealthConfig, HostConfig, HostConfigLogConfig,
    Mount, MountType, PortBinding, RestartPolicy, RestartPolicyNameEnum, VolumeCreateRequest,
};
use bollard::query_parameters::{
    CreateContainerOptions, DownloadFromContainerOptions, ImportImageOptions, ListContainersOptions, ListImagesOptions,
    LogsOptions, RemoveContainerOptions, RemoveImageOptions, ResizeExecOptions, StatsOptions, StopContainerOptions,
};
use bollard::{API_DEFAULT_VERSION, ClientVersion};
use futures_util::StreamExt as _;
use tokio::io::AsyncWriteExt as _;

use crate::error::Problem;

/// Where Docker listens when nothing is said.
pub const SOCKET: &str = "/run/docker.sock";
/// How long the engine may take to begin its answer to a simple question.
const ANSWER: Duration = Duration::from_secs(60);
/// How long it may take to take in an image: it answers only when it has unpacked it.
const LOAD: Duration = Duration::from_secs(3600);
/// Bytes of an image on their way to the engine, in one piece; at most [`PIECES`] wait.
const PIECE: usize = 256 << 10;
const PIECES: usize = 8;
/// A file of a container that is larger is not read.
const FILE_MAX: usize = 4 << 20;
/// Output of a command that is kept.
const OUTPUT_MAX: usize = 1 << 20;
/// The log of one container: files of this size (bytes), this many.
const LOG: (&str, &str) = ("10485760", "2");
/// How often somebody who follows a log is asked whether there is to be more, and the size of a terminal is looked at.
const TICK: Duration = Duration::from_millis(500);

/// An engine.
#[derive(Debug)]
pub struct Engine {
    socket: PathBuf,
    /// What client and engine agreed on.
    version: Mutex<Option<ClientVersion>>,
}

/// What an engine says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    pub version: String,
    /// Whether it has no rights on the machine: then nobody reaches the addresses of its containers.
    pub rootless: bool,
    /// Whether user ids of containers are others on the machine.
    pub maps_ids: bool,
}

/// An image the engine has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image {
    /// `sha256:…`; of its configuration, except in Docker's containerd store.
    pub id: String,
    /// Digests of its plain layers, bottom first.
    pub diff_ids: Vec<String>,
    pub user: String,
    pub env: Vec<String>,
    pub command: Vec<String>,
    pub entrypoint: Vec<String>,
    pub working_dir: String,
}

/// A container to be made. It keeps running, its root is read-only, it gains no privileges, and its health is nobody's
/// business but the caller's.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Container {
    pub name: String,
    pub image: String,
    /// `NAME=VALUE`, on top of the image's.
    pub env: Vec<String>,
    pub labels: BTreeMap<String, String>,
    /// Path and options.
    pub tmpfs: Vec<(String, String)>,
    /// Folder of the machine and path in the container; read-only. The folder has to be there.
    pub binds: Vec<(PathBuf, String)>,
    /// Name of a volume and path in the container.
    pub volumes: Vec<(String, String)>,
    /// The only ones it may ever have.
    pub capabilities: Vec<String>,
    /// Bytes, swap included.
    pub memory: Option<u64>,
    pub cpus: Option<f64>,
    pub pids: Option<u32>,
    /// `None`: the engine's own choice.
    pub network: Option<String>,
    /// A port that is to be reached on 127.0.0.1, at a number the engine chooses.
    pub publish: Option<u16>,
}

/// A container that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Without the slash before it.
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub state: State,
    /// Why it ended, or what it says of itself: for a person.
    pub words: String,
    pub restarts: u32,
    /// Sorted by the name of the network.
    pub addresses: Vec<IpAddr>,
    /// Ports of the container and of 127.0.0.1.
    pub published: Vec<(u16, u16)>,
    /// Bytes.
    pub memory: Option<u64>,
}

/// How far a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Created,
    Running,
    Restarting,
    Ended,
}

/// How a command in a container ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Done {
    /// `None`: its time was over.
    pub status: Option<i32>,
    /// Both streams as they came, the last of them.
    pub output: Vec<u8>,
}

/// Which of its streams a command wrote to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    Out,
    Err,
}

/// What a command gets besides its arguments.
#[expect(missing_debug_implementations, reason = "a reader and a closure have none")]
pub struct Terminal<'a> {
    pub input: Option<Box<dyn Read + Send>>,
    /// Whether it gets a terminal; then this tells columns and rows, whenever asked.
    pub size: Option<&'a dyn Fn() -> Option<(u16, u16)>>,
}

type Client = bollard::Docker;

impl Engine {
    /// The engine that listens on `socket`; it is not asked for anything yet.
    pub fn at(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), version: Mutex::new(None) }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Runs `work` with a client, on a runtime of its own.
    fn call<T, F: Future<Output = Result<T, Error>>>(
        &self,
        what: &str,
        limit: Duration,
        work: impl FnOnce(Client) -> F,
    ) -> Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.context("cannot start a runtime for the container engine")?;
        let result = runtime.block_on(async {
            let client = self.client(limit).await?;
            work(client).await
        });
        result.map_err(|error| self.explain(what, error))
    }

    async fn client(&self, limit: Duration) -> Result<Client, Error> {
        let known = *self.version.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.socket.to_string_lossy();
        let client = Client::connect_with_unix(&path, limit.as_secs(), &known.unwrap_or(*API_DEFAULT_VERSION))?;
        if known.is_some() {
            return Ok(client);
        }
        let client = client.with_timeout(ANSWER).negotiate_version().await?;
        *self.version.lock().unwrap_or_else(PoisonError::into_inner) = Some(client.client_version());
        Ok(client.with_timeout(limit))
    }

    fn explain(&self, what: &str, error: Error) -> anyhow::Error {
        let socket = self.socket.display();
        let away = |words: String| {
            // It may come back as another version.
            *self.version.lock().unwrap_or_else(PoisonError::into_inner) = None;
            Problem::transient(format!("cannot {what}: the container engine at `{socket}` does not answer: {words}"))
                .hint("is it running? `host:` of the target names another socket, like `unix:///run/podman/podman.sock`")
        };
        match error {
            Error::SocketNotFoundError(_) => away("there is no such socket".into()).into(),
            Error::DockerResponseServerError { status_code: 503, message } => away(message).into(),
            Error::DockerResponseServerError { message, .. } | Error::DockerStreamError { error: message } => {
                Problem::failed(format!("cannot {what}: {}", message.trim())).into()
            }
            error if is_denied(&error) => Problem::failed(format!(
                "cannot {what}: this user may not use the container engine at `{socket}`"
            ))
            .hint("`adduser USER docker` allows it, and makes that user as mighty as root; rootless podman needs no such right")
            .into(),
            Error::RequestTimeoutError => away("its time was over".into()).into(),
            error @ (Error::HyperLegacyError { .. } | Error::HyperResponseError { .. } | Error::IOError { .. }) => {
                away(root(&error)).into()
            }
            other => anyhow::Error::new(other).context(format!("cannot {what} with the container engine at `{socket}`")),
        }
    }

    /// What the engine says about itself.
    ///
    /// # Errors
    /// Transient when it does not answer; so has every call here.
    pub fn about(&self) -> Result<About> {
        let info = self.call("ask the container engine", ANSWER, |client| async move { client.info().await })?;
        let options = info.security_options.unwrap_or_default();
        let rootless = options.iter().any(|option| option.contains("rootless"));
        let maps_ids = rootless || options.iter().any(|option| option.contains("userns"));
        Ok(About { version: info.server_version.unwrap_or_default(), rootless, maps_ids })
    }

    /// The image of that name or id.
    pub fn image(&self, name: &str) -> Result<Option<Image>> {
        let found = self.call("look for an image", ANSWER, |client| async move { none(client.inspect_image(name).await) })?;
        Ok(found.map(|found| {
            let config = found.config.unwrap_or_default();
            Image {
                id: with_algorithm(found.id.unwrap_or_default()),
                diff_ids: found.root_fs.and_then(|root| root.layers).unwrap_or_default(),
                user: config.user.unwrap_or_default(),
                env: config.env.unwrap_or_default(),
                command: config.cmd.unwrap_or_default(),
                entrypoint: config.entrypoint.unwrap_or_default(),
                working_dir: config.working_dir.unwrap_or_default(),
            }
        }))
    }

    /// Names of the images whose name fits the pattern, as `example.test/*`.
    pub fn images(&self, pattern: &str) -> Result<Vec<String>> {
        let filters = HashMap::from([("reference".to_string(), vec![pattern.to_string()])]);
        let options = ListImagesOptions { filters: Some(filters), ..ListImagesOptions::default() };
        let found = self.call("list images", ANSWER, |client| async move { client.list_images(Some(options)).await })?;
        Ok(found.into_iter().flat_map(|image| image.repo_tags).filter(|tag| tag != "<none>:<none>").collect())
    }

    /// Gives the engine the archive that `write` writes, as it is written: nothing of it is kept on the way.
    ///
    /// # Errors
    /// `write`'s own first; the engine's words on an archive it does not take.
    pub fn load(&self, write: impl FnOnce(&mut dyn Write) -> Result<()> + Send) -> Result<()> {
        let (sender, receiver) = tokio::sync::mpsc::channel::<io::Result<Vec<u8>>>(PIECES);
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let mut out = Pieces { sender: sender.clone(), piece: Vec::with_capacity(PIECE) };
                let result = write(&mut out).and_then(|()| out.flush().context("the engine has stopped reading"));
                if result.is_err() {
                    // The engine must not take half an archive for a whole one.
                    let _ = sender.blocking_send(Err(io::Error::other("the archive could not be written")));
                }
                result
            });
            let pieces = futures_util::stream::unfold(receiver, |mut receiver| async move {
                receiver.recv().await.map(|piece| (piece.map(Into::into), receiver))
            });
            let loaded = self.call("load the image", LOAD, |client| async move {
                let options = ImportImageOptions { quiet: true, ..ImportImageOptions::default() };
                let mut answers = std::pin::pin!(client.import_image_stream(options, pieces, None));
                while let Some(answer) = answers.next().await {
                    answer?;
                }
                Ok(())
            });
            let written = writer.join().map_err(|_| anyhow::anyhow!("the thread that writes the archive panicked"))?;
            // An engine that refuses stops reading; then its words say more than ours.
            match (loaded, written) {
                (Err(engine), Err(ours)) if ours.chain().any(is_broken_pipe) => Err(engine),
                (_, Err(ours)) => Err(ours),
                (loaded, Ok(())) => loaded,
            }
        })
    }

    /// Takes the name from an image, and removes the image when it was its last one. Whether it could: one in use stays.
    pub fn remove_image(&self, name: &str) -> Result<bool> {
        let options = RemoveImageOptions::default();
        let removed = self.call("remove an image", ANSWER, |client| async move {
            client_conflict(client.remove_image(name, Some(options), None).await)
        })?;
        Ok(removed.is_some())
    }

    /// Makes a volume that is the folder `device` of the machine; an empty one is filled from the image by the engine.
    /// One of that name stays as it is.
    pub fn volume(&self, name: &str, device: &Path, labels: &BTreeMap<String, String>) -> Result<()> {
        let device = device.to_string_lossy().into_owned();
        let request = VolumeCreateRequest {
            name: Some(name.into()),
            driver: Some("local".into()),
            driver_opts: Some(
                [("type", "none"), ("o", "bind"), ("device", &device)].map(|(key, value)| (key.into(), value.into())).into(),
            ),
            labels: Some(labels.clone().into_iter().collect()),
            ..VolumeCreateRequest::default()
        };
        self.call("make a volume", ANSWER, |client| async move { client.create_volume(request).await.map(drop) })
    }

    /// Makes a container; it does not run yet. `None`: there is no such image.
    ///
    /// # Errors
    /// One of this name is there; the engine's words.
    pub fn create(&self, container: &Container) -> Result<Option<()>> {
        let options = CreateContainerOptions { name: Some(container.name.clone()), ..CreateContainerOptions::default() };
        let body = body(container);
        let what = format!("make the container `{}`", container.name);
        let made = self.call(&what, ANSWER, |client| async move { none(client.create_container(Some(options), body).await) })?;
        Ok(made.map(drop))
    }

    /// Starts a container that was made.
    pub fn start(&self, name: &str) -> Result<()> {
        let what = format!("start the container `{name}`");
        self.call(&what, ANSWER, |client| async move { client.start_container(name, None).await })
    }

    /// Asks it to end, by force after `grace`; it stays, stopped. One that is not there is no error.
    pub fn stop(&self, name: &str, grace: Duration) -> Result<()> {
        let seconds = grace.as_secs() + u64::from(grace.subsec_nanos() > 0);
        let options = StopContainerOptions { t: Some(i32::try_from(seconds).unwrap_or(i32::MAX)), signal: None };
        let what = format!("stop the container `{name}`");
        self.call(&what, ANSWER + grace, |client| async move { none(client.stop_container(name, Some(options)).await) }).map(drop)
    }

    /// Removes it, running or not, with its anonymous volumes. One that is not there is no error.
    pub fn remove(&self, name: &str) -> Result<()> {
        let options = RemoveContainerOptions { force: true, v: true, link: false };
        let what = format!("remove the container `{name}`");
        self.call(&what, ANSWER, |client| async move { none(client.remove_container(name, Some(options)).await) }).map(drop)
    }

    /// All containers that have the label with this value, by name.
    pub fn containers(&self, label: &str, value: &str) -> Result<Vec<Seen>> {
        let filters = HashMap::from([("label".to_string(), vec![format!("{label}={value}")])]);
        let options = ListContainersOptions { all: true, filters: Some(filters), ..ListContainersOptions::default() };
        let mut seen = self.call("list containers", ANSWER, |client| async move {
            let mut seen = Vec::new();
            for summary in client.list_containers(Some(options)).await? {
                // One that was removed in the meantime is not there.
                seen.extend(look(&client, summary).await?);
            }
            Ok(seen)
        })?;
        seen.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(seen)
    }

    /// A file of a container, running or not; `None` when there is none. Links are not followed.
    pub fn read_file(&self, name: &str, path: &str) -> Result<Option<Vec<u8>>> {
        let options = DownloadFromContainerOptions { path: path.into() };
        let archive = self.call("read a file of a container", ANSWER, |client| async move {
            let mut archive = Vec::new();
            let mut pieces = std::pin::pin!(client.download_from_container(name, Some(options)));
            while let Some(piece) = pieces.next().await {
                match none(piece)? {
                    Some(piece) if archive.len() < FILE_MAX => archive.extend_from_slice(&piece),
                    _ => return Ok(None),
                }
            }
            Ok(Some(archive))
        })?;
        let Some(archive) = archive else { return Ok(None) };
        for entry in tar::Archive::new(&archive[..]).entries()? {
            let mut entry = entry?;
            if entry.header().entry_type().is_file() {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes)?;
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }

    /// The last `lines` lines a container printed; with `follow` then what comes, until it ends. `sink` gets an empty
    /// chunk now and then, and answers whether there is to be more. `None`: there is no such container.
    pub fn logs(&self, name: &str, lines: usize, follow: bool, sink: &mut dyn FnMut(&[u8]) -> bool) -> Result<Option<()>> {
        let tail = if lines == usize::MAX { "all".into() } else { lines.to_string() };
        let options = LogsOptions { follow, stdout: true, stderr: true, tail, ..LogsOptions::default() };
        let what = format!("read the log of `{name}`");
        self.call(&what, ANSWER, |client| async move {
            let mut chunks = std::pin::pin!(client.logs(name, Some(options)));
            loop {
                let more = match tokio::time::timeout(TICK, chunks.next()).await {
                    Err(_) => sink(&[]),
                    Ok(None) => return Ok(Some(())),
                    Ok(Some(chunk)) => match none(chunk)? {
                        Some(chunk) => sink(&chunk.into_bytes()),
                        None => return Ok(None),
                    },
                };
                if !more {
                    return Ok(Some(()));
                }
            }
        })
    }

    /// Runs a command in a running container; its output is collected. One whose time is over is killed where this user may.
    ///
    /// # Errors
    /// The container is not running; the engine's words.
    pub fn run(&self, name: &str, argv: &[String], limit: Duration) -> Result<Done> {
        let config = exec(argv, false, false);
        let what = format!("run `{}` in `{name}`", argv.join(" "));
        self.call(&what, ANSWER, |client| async move {
            let id = client.create_exec(name, config).await?.id;
            let mut kept = Vec::new();
            let collect = async {
                if let StartExecResults::Attached { mut output, .. } = client.start_exec(&id, None).await? {
                    while let Some(chunk) = output.next().await {
                        kept.extend_from_slice(&chunk?.into_bytes());
                        let over = kept.len().saturating_sub(OUTPUT_MAX);
                        kept.drain(..over);
                    }
                }
                Ok::<_, Error>(())
            };
            let ended = match tokio::time::timeout(limit, collect).await {
                Ok(result) => result.map(|()| true)?,
                Err(_) => false,
            };
            let state = client.inspect_exec(&id).await?;
            if !ended {
                kill(state.pid.filter(|_| state.running == Some(true)));
                return Ok(Done { status: None, output: kept });
            }
            Ok(Done { status: Some(status(state.exit_code)), output: kept })
        })
    }

    /// Runs a command in a running container with somebody's streams; its exit status.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn exec(&self, name: &str, argv: &[String], terminal: Terminal<'_>, sink: &mut dyn FnMut(Channel, &[u8])) -> Result<i32> {
        let config = exec(argv, terminal.input.is_some(), terminal.size.is_some());
        let what = format!("run `{}` in `{name}`", argv.join(" "));
        self.call(&what, ANSWER, |client| async move {
            let id = client.create_exec(name, config).await?.id;
            let options = StartExecOptions { tty: terminal.size.is_some(), ..StartExecOptions::default() };
            let StartExecResults::Attached { mut output, input } = client.start_exec(&id, Some(options)).await? else {
                return Ok(0);
            };
            let feeding = terminal.input.map(|from| tokio::spawn(feed(from, input)));
            let mut shown = None;
            loop {
                if let Some(now) = terminal.size.and_then(|size| size())
                    && shown != Some(now)
                {
                    shown = Some(now);
                    // One that has just ended needs none.
                    let _ = client.resize_exec(&id, ResizeExecOptions { w: now.0.into(), h: now.1.into() }).await;
                }
                match tokio::time::timeout(TICK, output.next()).await {
                    Err(_) => {}
                    Ok(None) => break,
                    Ok(Some(chunk)) => match chunk? {
                        LogOutput::StdErr { message } => sink(Channel::Err, &message),
                        other => sink(Channel::Out, &other.into_bytes()),
                    },
                }
            }
            if let Some(feeding) = feeding {
                feeding.abort();
            }
            Ok(status(client.inspect_exec(&id).await?.exit_code))
        })
    }
}

/// Copies what somebody types or pipes to a command, until its end.
async fn feed(mut from: Box<dyn Read + Send>, mut to: std::pin::Pin<Box<dyn tokio::io::AsyncWrite + Send>>) {
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Vec<u8>>(4);
    // It ends with the process: a read from a terminal cannot be taken back.
    std::thread::spawn(move || {
        let mut buffer = vec![0; 32 << 10];
        loop {
            match from.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return,
                Ok(read) if sender.blocking_send(buffer[..read].to_vec()).is_err() => return,
                Ok(_) => {}
            }
        }
    });
    while let Some(bytes) = receiver.recv().await {
        if to.write_all(&bytes).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
    let _ = to.shutdown().await;
}

fn exec(argv: &[String], stdin: bool, tty: bool) -> ExecConfig {
    ExecConfig {
        attach_stdin: Some(stdin),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        tty: Some(tty),
        cmd: Some(argv.to_vec()),
        ..ExecConfig::default()
    }
}

/// The status as a shell tells it; an engine that does not know it any more means no good.
fn status(code: Option<i64>) -> i32 {
    code.and_then(|code| i32::try_from(code).ok()).unwrap_or(255)
}

/// Ends a process the engine says is running; only where the engine's processes are ours to see and end.
fn kill(pid: Option<i64>) {
    let pid = pid.and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 1);
    if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// What a list of containers does not say is asked for.
async fn look(client: &Client, summary: ContainerSummary) -> Result<Option<Seen>, Error> {
    let id = summary.id.unwrap_or_default();
    let Some(found) = none(client.inspect_container(&id, None).await)? else { return Ok(None) };
    let of_state = found.state.unwrap_or_default();
    let state = match summary.state {
        Some(ContainerSummaryStateEnum::CREATED) => State::Created,
        Some(ContainerSummaryStateEnum::RUNNING | ContainerSummaryStateEnum::PAUSED | ContainerSummaryStateEnum::STOPPING) => {
            State::Running
        }
        Some(ContainerSummaryStateEnum::RESTARTING) => State::Restarting,
        _ => State::Ended,
    };
    let words = match (state, of_state.error.filter(|error| !error.is_empty())) {
        (_, Some(error)) => error,
        (State::Ended | State::Restarting, None) => {
            let memory = if of_state.oom_killed == Some(true) { ", out of memory" } else { "" };
            format!("ended with status {}{memory}", of_state.exit_code.unwrap_or(-1))
        }
        _ => summary.status.unwrap_or_default(),
    };
    let memory = if state == State::Running { memory(client, &id).await } else { None };
    let networks: BTreeMap<_, _> =
        summary.network_settings.and_then(|settings| settings.networks).unwrap_or_default().into_iter().collect();
    let ports = found.network_settings.and_then(|settings| settings.ports).unwrap_or_default();
    let mut published: Vec<(u16, u16)> = ports
        .iter()
        .flat_map(|(inside, outside)| outside.iter().flatten().map(move |binding| (inside, binding)))
        .filter_map(|(inside, outside)| {
            Some((inside.strip_suffix("/tcp")?.parse().ok()?, outside.host_port.as_ref()?.parse().ok()?))
        })
        .collect();
    published.sort_unstable();
    published.dedup();
    Ok(Some(Seen {
        name: found.name.unwrap_or_default().trim_start_matches('/').to_string(),
        labels: summary.labels.unwrap_or_default().into_iter().collect(),
        state,
        words,
        restarts: found.restart_count.and_then(|count| u32::try_from(count).ok()).unwrap_or(0),
        addresses: networks.into_values().filter_map(|network| network.ip_address?.parse().ok()).collect(),
        published,
        memory,
    }))
}

/// What a container uses, without what the kernel would give back at once; `None` where nobody counts.
async fn memory(client: &Client, id: &str) -> Option<u64> {
    let options = StatsOptions { stream: false, one_shot: true };
    let stats = std::pin::pin!(client.stats(id, Some(options))).next().await?.ok()?.memory_stats?;
    let cache =
        stats.stats.as_ref().and_then(|stats| stats.get("inactive_file").or_else(|| stats.get("total_inactive_file"))).copied();
    let usage = stats.usage?;
    Some(usage.saturating_sub(cache.unwrap_or(0)))
}

fn body(container: &Container) -> ContainerCreateBody {
    let bind = |(source, target): &(PathBuf, String)| Mount {
        typ: Some(MountType::BIND),
        source: Some(source.to_string_lossy().into_owned()),
        target: Some(target.clone()),
        read_only: Some(true),
        ..Mount::default()
    };
    let volume = |(name, target): &(String, String)| Mount {
        typ: Some(MountType::VOLUME),
        source: Some(name.clone()),
        target: Some(target.clone()),
        ..Mount::default()
    };
    let publish = container.publish.map(|port| format!("{port}/tcp"));
    // Port 0 would be Docker's own range; an empty one is chosen by the kernel in podman and by Docker in its own.
    let binding = || Some(vec![PortBinding { host_ip: Some("127.0.0.1".into()), host_port: Some(String::new()) }]);
    let memory = container.memory.and_then(|bytes| i64::try_from(bytes).ok());
    let host = HostConfig {
        readonly_rootfs: Some(true),
        tmpfs: Some(container.tmpfs.iter().cloned().collect()),
        mounts: Some(container.binds.iter().map(bind).chain(container.volumes.iter().map(volume)).collect()),
        security_opt: Some(vec!["no-new-privileges".into()]),
        cap_drop: Some(vec!["ALL".into()]),
        cap_add: Some(container.capabilities.clone()),
        memory,
        // Memory and swap together: none of it is swap.
        memory_swap: memory,
        #[expect(clippy::cast_possible_truncation, reason = "a number of processors times 10^9")]
        nano_cpus: container.cpus.map(|cpus| (cpus * 1e9) as i64),
        pids_limit: container.pids.map(i64::from),
        network_mode: container.network.clone(),
        port_bindings: publish.clone().map(|port| HashMap::from([(port, binding())])),
        restart_policy: Some(RestartPolicy { name: Some(RestartPolicyNameEnum::UNLESS_STOPPED), maximum_retry_count: None }),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".into()),
            config: Some([("max-size", LOG.0), ("max-file", LOG.1)].map(|(key, value)| (key.into(), value.into())).into()),
        }),
        ..HostConfig::default()
    };
    ContainerCreateBody {
        image: Some(container.image.clone()),
        env: Some(container.env.clone()),
        labels: Some(container.labels.clone().into_iter().collect()),
        exposed_ports: publish.map(|port| vec![port]),
        healthcheck: Some(HealthConfig { test: Some(vec!["NONE".into()]), ..HealthConfig::default() }),
        host_config: Some(host),
        ..ContainerCreateBody::default()
    }
}

/// Cuts what is written into pieces and hands them over; waits while too many of them wait.
struct Pieces {
    sender: tokio::sync::mpsc::Sender<io::Result<Vec<u8>>>,
    piece: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..length]);
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE));
        self.sender.blocking_send(Ok(piece)).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

fn is_broken_pipe(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Nothing where the engine says that there is no such thing.
fn none<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Nothing also where something else needs it.
fn client_conflict<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match none(result) {
        Err(Error::DockerResponseServerError { status_code: 409, .. }) => Ok(None),
        other => other,
    }
}

/// Podman leaves the algorithm out.
fn with_algorithm(id: String) -> String {
    if id.contains(':') || id.is_empty() { id } else { format!("sha256:{id}") }
}

fn is_denied(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The words of the first cause.
fn root(error: &Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
