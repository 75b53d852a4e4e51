//! `docker`: instances as containers of Docker or podman, over the engine's unix socket.
//!
//! ```text
//! store ─▶ image in the engine (`pipeline.local/NAME:DIGEST12`) ─▶ container `pipeline-ID`
//! STATE/docker/ID/image    name of the image it was made from
//! STATE/docker/ID/log      what containers of this id printed that are gone
//! ```
//! What an instance is stands in the labels of its container, so that a daemon that comes back finds it, also after the
//! engine was restarted. The engine supervises: it starts a program that ended again, with a back-off of its own (0.1 s
//! doubling to a minute). Undone by [`Target::stop`] and [`Target::forget`]: container, secrets, log, and the image when
//! no container needs it any more. A volume of the engine that stands for a folder of ours stays: it holds nothing.
//!
//! Known to be missing: engines over TCP, on purpose: a socket is guarded by its owner and mode.

mod image;
pub(super) mod secrets;

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::{Address, Checked, Found, InstanceSpec, Running, Target};
use crate::artifact::store::Store;
use crate::config::types as config;
use crate::docker::{Channel, Container, Engine, SOCKET, Seen, State, Terminal};
use crate::error::Problem;
use crate::oci::digest::Digest;

/// Prefix of the names of our containers.
const PREFIX: &str = "pipeline-";
/// Labels of our containers. The root of the store tells ours from those of another daemon on the same engine.
const ROOT: &str = "io.pipeline.root";
const ID: &str = "io.pipeline.instance";
const ENVIRONMENT: &str = "io.pipeline.environment";
const GENERATION: &str = "io.pipeline.generation";
const TARGET: &str = "io.pipeline.target";
const NUMBER: &str = "io.pipeline.number";
const PORT: &str = "io.pipeline.port";
/// What a program may do as root of its container: the sandbox's set, which is Docker's own.
const CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];
/// Bytes at the end of a kept log in which its last lines are looked for.
const TAIL: u64 = 10 << 20;
/// Characters of a command's last line.
const WORDS: usize = 300;

/// Where a target works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Around {
    /// Root of the store.
    pub root: PathBuf,
    /// The daemon's state.
    pub state: PathBuf,
    /// A folder in memory, as `/run/pipeline`; it has to outlive the daemon, as the containers do.
    pub runtime: PathBuf,
}

/// The instances in one engine.
#[derive(Debug)]
pub struct Docker {
    engine: Engine,
    around: Around,
    /// One image is loaded at a time, and none twice.
    loading: Mutex<()>,
}

impl Docker {
    /// The engine of a target's `host`; nothing is asked yet.
    ///
    /// # Errors
    /// `host` is no `unix://` and an absolute path.
    pub fn new(host: Option<&str>, around: Around) -> Result<Self> {
        Ok(Self { engine: Engine::at(socket(host)?), around, loading: Mutex::new(()) })
    }

    fn folder(&self, id: &str) -> PathBuf {
        self.around.state.join("docker").join(id)
    }

    fn root(&self) -> String {
        let root = fs_err::canonicalize(&self.around.root).unwrap_or_else(|_| self.around.root.clone());
        root.to_string_lossy().into_owned()
    }

    fn seen(&self, id: &str) -> Result<Option<Seen>> {
        let root = self.root();
        let seen = self.engine.containers(ID, id)?;
        Ok(seen.into_iter().find(|seen| seen.labels.get(ROOT) == Some(&root)))
    }

    fn image(&self, digest: &Digest, tag: &str) -> Result<(String, crate::artifact::image::Config)> {
        let _alone = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let store = Store::open_with_state(&self.around.root, &self.around.state)?;
        image::ensure(&self.engine, &store, digest, tag)
    }

    /// Everything between "there is none" and "it runs"; the caller cleans up after a failure.
    fn make(&self, spec: &InstanceSpec, settings: &config::Docker) -> Result<()> {
        let name = name(&spec.id);
        let tag = image::tag(&spec.environment, &spec.artifact);
        let about = self.engine.about()?;
        let (mut image, config) = self.image(&spec.artifact, &tag)?;
        let folder = self.folder(&spec.id);
        fs_err::create_dir_all(&folder)?;
        crate::artifact::store::write_atomic(&folder.join("image"), tag.as_bytes())?;
        let root = self.root();
        for volume in &spec.volumes {
            fs_err::create_dir_all(&volume.source)?;
            self.engine.volume(&volume_name(&volume.source), &volume.source, &BTreeMap::from([(ROOT.into(), root.clone())]))?;
        }
        let values = if spec.secrets.is_empty() { None } else { Some(secrets::make(&self.around.runtime, &spec.id)?) };
        let mut container = container(spec, settings, &root, values.as_deref());
        container.publish = spec.port.filter(|_| about.rootless);
        container.image.clone_from(&image);
        if self.engine.create(&container)?.is_none() {
            // Somebody removed the image in this moment.
            (image, _) = self.image(&spec.artifact, &tag)?;
            container.image = image;
            let made = self.engine.create(&container)?;
            made.ok_or_else(|| Problem::failed(format!("the container engine has lost the image `{tag}`")))?;
        }
        if let Some(folder) = values {
            let owner = if about.maps_ids || !rustix::process::geteuid().is_root() {
                None
            } else {
                let read = |path| -> Result<String> {
                    Ok(String::from_utf8_lossy(&self.engine.read_file(&name, path)?.unwrap_or_default()).into_owned())
                };
                Some(secrets::owner(&config.config.user, &read("/etc/passwd")?, &read("/etc/group")?)?)
            };
            secrets::write(&folder, &spec.secrets, owner)?;
        }
        crate::fault::point("start a container");
        self.engine.start(&name)
    }
}

/// The socket `host` names.
fn socket(host: Option<&str>) -> Result<PathBuf> {
    let Some(host) = host else { return Ok(SOCKET.into()) };
    match host.strip_prefix("unix://") {
        Some(path) if path.starts_with('/') => Ok(path.into()),
        _ => Err(Problem::usage(format!("`{host}` is no socket of a container engine"))
            .hint("write `unix:///run/docker.sock` or the like; an engine over TCP gives the whole machine to whom it answers, and is not used")
            .into()),
    }
}

fn name(id: &str) -> String {
    format!("{PREFIX}{id}")
}

/// A volume of the engine that is the folder `source`.
fn volume_name(source: &Path) -> String {
    format!("{PREFIX}{}", &Digest::of(source.as_os_str().as_encoded_bytes()).hex()[..24])
}

/// The container of an instance.
fn container(spec: &InstanceSpec, settings: &config::Docker, root: &str, secrets: Option<&Path>) -> Container {
    let mut env = spec.env.clone();
    for name in spec.secrets.keys() {
        env.entry(format!("{name}_FILE")).or_insert_with(|| format!("/run/secrets/{name}"));
    }
    let labels = [
        (ROOT, root.to_owned()),
        (ID, spec.id.clone()),
        (ENVIRONMENT, spec.environment.clone()),
        (GENERATION, spec.generation.clone()),
        (TARGET, spec.target.clone()),
        (NUMBER, spec.number.to_string()),
        (PORT, spec.port.map(|port| port.to_string()).unwrap_or_default()),
    ];
    Container {
        name: name(&spec.id),
        image: String::new(),
        env: env.into_iter().map(|(key, value)| format!("{key}={value}")).collect(),
        labels: labels.into_iter().map(|(key, value)| (key.to_owned(), value)).collect(),
        tmpfs: vec![
            ("/tmp".into(), "rw,nosuid,nodev,mode=1777".into()),
            ("/run".into(), "rw,nosuid,nodev,mode=0755,size=64m".into()),
        ],
        binds: secrets.map(|folder| (folder.to_owned(), "/run/secrets".to_owned())).into_iter().collect(),
        volumes: spec.volumes.iter().map(|volume| (volume_name(&volume.source), volume.path.clone())).collect(),
        capabilities: CAPABILITIES.map(String::from).to_vec(),
        memory: spec.limits.memory.or(settings.memory),
        cpus: spec.limits.cpus.or(settings.cpus),
        pids: spec.limits.pids,
        network: settings.network.clone(),
        publish: None,
    }
}

/// What a container's labels say; `None` where they are not ours.
fn found(seen: Seen) -> Option<Found> {
    let label = |name: &str| seen.labels.get(name).cloned();
    let port: Option<u16> = label(PORT).and_then(|port| port.parse().ok());
    let published = port.and_then(|port| seen.published.iter().find(|(inside, _)| *inside == port));
    let address = match (published, seen.addresses.first(), port) {
        (Some((_, outside)), _, _) => Some((IpAddr::from(Ipv4Addr::LOCALHOST), *outside)),
        (None, Some(address), Some(port)) => Some((*address, port)),
        _ => None,
    };
    let status = match seen.state {
        State::Created => Running::Starting,
        State::Running => Running::Running,
        State::Restarting => Running::Waiting,
        State::Ended => Running::Ended { status: seen.words.clone() },
    };
    Some(Found {
        id: label(ID)?,
        environment: label(ENVIRONMENT)?,
        generation: label(GENERATION)?,
        target: label(TARGET)?,
        number: label(NUMBER)?.parse().ok()?,
        status,
        restarts: seen.restarts,
        address: address.map(|(address, port)| Address::Tcp(SocketAddr::new(address, port))),
        memory: seen.memory,
        notes: if seen.state == State::Restarting { vec![seen.words] } else { Vec::new() },
    })
}

impl Target for Docker {
    fn start(&self, spec: &InstanceSpec) -> Result<()> {
        let config::Target::Docker(settings) = &spec.settings else {
            return Err(Problem::bug(format!("`{}` is not for a container engine", spec.id)).into());
        };
        match self.seen(&spec.id)? {
            // Whoever made it was killed before it was started.
            Some(seen) if seen.state == State::Created => self.engine.remove(&name(&spec.id))?,
            Some(_) => return Ok(()),
            None => {}
        }
        self.make(spec, settings).inspect_err(|_| {
            // The first error is the one to be told.
            if self.seen(&spec.id).is_ok_and(|seen| seen.is_some()) {
                let _ = self.engine.remove(&name(&spec.id));
            }
            let _ = secrets::remove(&self.around.runtime, &spec.id);
        })
    }

    fn list(&self) -> Result<Vec<Found>> {
        let mut list: Vec<Found> = self.engine.containers(ROOT, &self.root())?.into_iter().filter_map(found).collect();
        list.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(list)
    }

    fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        if self.seen(id)?.is_some() {
            let name = name(id);
            self.engine.stop(&name, grace)?;
            let folder = self.folder(id);
            fs_err::create_dir_all(&folder)?;
            let mut kept = fs_err::OpenOptions::new().append(true).create(true).open(folder.join("log"))?;
            let mut written = Ok(());
            self.engine.logs(&name, usize::MAX, false, &mut |chunk| {
                written = kept.write_all(chunk);
                written.is_ok()
            })?;
            written?;
            self.engine.remove(&name)?;
        }
        secrets::remove(&self.around.runtime, id)
    }

    fn forget(&self, id: &str) -> Result<()> {
        let folder = self.folder(id);
        if !folder.exists() {
            return Ok(());
        }
        match fs_err::read_to_string(folder.join("image")) {
            Ok(tag) if tag.starts_with(image::REGISTRY) && self.seen(id)?.is_none() => {
                self.engine.remove_image(&tag)?;
            }
            _ => {}
        }
        Ok(fs_err::remove_dir_all(&folder)?)
    }

    fn check(&self, id: &str, argv: &[String], timeout: Duration) -> Result<Checked> {
        let done = match self.engine.run(&name(id), argv, timeout) {
            Ok(done) => done,
            Err(error) if crate::error::exit_code(&error) == crate::error::Kind::Transient as u8 => return Err(error),
            // It does not run, or has no such program.
            Err(error) => {
                return Ok(Checked {
                    good: false,
                    last: crate::error::problem(&error).map_or(error.to_string(), |problem| problem.message.clone()),
                });
            }
        };
        let text = String::from_utf8_lossy(&done.output);
        let line: String =
            text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().chars().take(WORDS).collect();
        let last = match done.status {
            None => format!("it did not end within {} s", timeout.as_secs_f64()),
            Some(0) => line,
            Some(status) if line.is_empty() => format!("it ended with status {status}"),
            Some(_) => line,
        };
        Ok(Checked { good: done.status == Some(0), last })
    }

    fn logs(&self, id: &str, lines: usize, follow: bool, sink: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        if self.seen(id)?.is_some() && self.engine.logs(&name(id), lines, follow, sink)?.is_some() {
            return Ok(());
        }
        let path = self.folder(id).join("log");
        if !path.exists() {
            return Err(Problem::failed(format!("there is no log of `{id}`")).into());
        }
        sink(&last_lines(&path, lines)?);
        Ok(())
    }

    fn exec(&self, id: &str, argv: &[String], interactive: bool) -> Result<i32> {
        let input = std::io::stdin();
        let raw = (interactive && input.is_terminal() && std::io::stdout().is_terminal()).then(Raw::set).transpose()?;
        let size = || tcgetwinsize(std::io::stdout()).ok().map(|size| (size.ws_col, size.ws_row));
        let size: &dyn Fn() -> Option<(u16, u16)> = &size;
        let terminal = Terminal { input: interactive.then(|| Box::new(input) as _), size: raw.is_some().then_some(size) };
        let result = self.engine.exec(&name(id), argv, terminal, &mut |channel, bytes| {
            // A reader that has gone away is no reason to leave the command.
            let _ = match channel {
                Channel::Out => write_now(&mut std::io::stdout().lock(), bytes),
                Channel::Err => write_now(&mut std::io::stderr().lock(), bytes),
            };
        });
        drop(raw);
        result
    }
}

fn write_now(out: &mut dyn std::io::Write, bytes: &[u8]) -> std::io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

/// The last lines of a file.
fn last_lines(path: &Path, lines: usize) -> Result<Vec<u8>> {
    let mut file = fs_err::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(last(bytes, lines))
}

/// The last lines of `bytes`.
pub(super) fn last(mut bytes: Vec<u8>, lines: usize) -> Vec<u8> {
    let ends: Vec<usize> = bytes.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at + 1).collect();
    let whole = if bytes.ends_with(b"\n") || bytes.is_empty() { ends.len() } else { ends.len() + 1 };
    let first = whole.checked_sub(lines).filter(|skip| *skip > 0).map_or(0, |skip| ends[skip - 1]);
    bytes.split_off(first)
}

/// The terminal hands over every key as it is typed, for as long as this lives.
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Self> {
        let before = tcgetattr(std::io::stdin()).context("cannot look at the terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).context("cannot set up the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.0);
    }
}
