//! The program of an image that a shim owns: in the sandbox, read-only, with its own network.
//!
//! One unshare process serves all runs of the program, so that its network, its volumes and its sockets stay the same
//! when it is started again. Leases on the trees it stands on (shared locks) keep `prune` away from them; the store is
//! open only until they are taken.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};

use super::ProgramSpec;
use super::network::{self, Way};
use super::server::{Job, Reply, Sockets};
use super::supervisor::{Own, refuse};
use crate::artifact::image::{self, RunConfig};
use crate::artifact::store::{Hold, Lock, Store, sync_dir};
use crate::artifact::tree::{self, Tree, Volume};
use crate::rollout::target::{Secret, VolumeMount};
use crate::sandbox::protocol::{Event, MAX_FDS};
use crate::sandbox::{self, Exit, Mount, RunSpec, Session};

/// Where secrets are in the tree (DESIGN section 7, contract 7).
const SECRETS: &str = "/run/secrets";

/// hosts(5) of an instance: its own name is `pipeline`.
const HOSTS: &str = "127.0.0.1 localhost pipeline\n::1 localhost\n";

pub(super) struct Program {
    work: PathBuf,
    spec: ProgramSpec,
    secrets: Vec<(String, Secret)>,
    path: OsString,
    sockets: Arc<Sockets>,
    /// Set by [`Own::prepare`].
    image: RunConfig,
    trees: Vec<Tree>,
    mounts: Vec<Mount>,
    session: Option<Session>,
    way: Option<Way>,
    running: bool,
    beside: BTreeMap<u64, Reply>,
    /// What the unshare process told, before the program's output goes anywhere.
    told: Vec<String>,
}

impl Program {
    pub(super) fn new(
        dir: &Path,
        spec: ProgramSpec,
        secrets: Vec<(String, Secret)>,
        path: &OsStr,
        sockets: Arc<Sockets>,
    ) -> Self {
        Self {
            work: dir.join("work"),
            spec,
            secrets,
            path: path.into(),
            sockets,
            image: RunConfig::default(),
            trees: Vec::new(),
            mounts: Vec::new(),
            session: None,
            way: None,
            running: false,
            beside: BTreeMap::new(),
            told: Vec::new(),
        }
    }

    /// The unshare process with its network; a new one when there is none.
    fn open(&mut self) -> Result<Option<String>> {
        if self.session.is_none() {
            let options =
                sandbox::Options { program: "/proc/self/exe".into(), own_network: true, interactive: false, fault: None };
            let session = Session::start(&options).context("this machine does not let pipeline make its sandbox")?;
            self.way = None;
            self.session = Some(session);
        }
        if !self.spec.network || self.way.as_mut().is_some_and(Way::is_open) {
            return Ok(None);
        }
        let pid = self.session.as_ref().and_then(Session::process).context("the unshare process is gone")?;
        match network::open(pid, &self.path) {
            Ok(way) => {
                self.way = Some(way);
                Ok(None)
            }
            Err(why) => Ok(Some(why)),
        }
    }

    fn session(&self) -> Result<&Session> {
        self.session.as_ref().context("the sandbox is gone")
    }

    /// The folder of a volume: made and filled from the image by the first who wants it.
    fn volume(&self, lowers: &[PathBuf], volume: &VolumeMount) -> Result<Mount> {
        let (parent, name) = volume
            .source
            .parent()
            .zip(volume.source.file_name())
            .with_context(|| format!("`{}` is no place for a volume", volume.source.display()))?;
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent);
        made.with_context(|| format!("cannot make `{}`", parent.display()))?;
        let name = name.to_string_lossy();
        let _lock = Lock::wait(&parent.join(format!(".{name}.lock")), Hold::Exclusive)?;
        if volume.source.symlink_metadata().is_err() {
            let new = parent.join(format!(".new-{name}"));
            self.session()?.call::<_, ()>("remove", &new)?;
            self.fill(lowers, &new, &volume.path)?;
            fs_err::rename(&new, &volume.source)?;
            sync_dir(parent)?;
        }
        Ok(Mount::Bind { source: volume.source.clone(), target: volume.path.clone().into(), writable: true })
    }

    /// Makes a folder with what the image has at `path`.
    fn fill(&self, lowers: &[PathBuf], dir: &Path, path: &str) -> Result<()> {
        let args =
            Volume { dir: dir.into(), lowers: lowers.to_vec(), path: path.into(), user: self.image.user.clone(), give: true };
        self.session()?.call("volume", &args)
    }

    /// Puts a file of ours in the place of `/etc/NAME`.
    fn file(&mut self, name: &str, text: &str) -> Result<()> {
        let file = self.work.join(name);
        fs_err::write(&file, text)?;
        fs_err::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        self.mounts.push(Mount::Bind { source: file, target: Path::new("/etc").join(name), writable: false });
        Ok(())
    }

    fn lowers(&self) -> Vec<PathBuf> {
        self.trees.iter().map(|tree| tree.root.clone()).collect()
    }

    fn run_spec(&self) -> Result<RunSpec> {
        let mut more: Vec<(String, String)> = self.spec.env.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        more.extend(self.secrets.iter().map(|(name, _)| (format!("{name}_FILE"), format!("{SECRETS}/{name}"))));
        let program = self.image.program(&[], &more)?;
        let limits = &self.spec.limits;
        Ok(RunSpec {
            lowers: self.lowers(),
            upper: self.work.join("upper"),
            read_only: true,
            program: true,
            work: self.work.join("scratch"),
            mounts: self.mounts.clone(),
            secrets: self.secrets.iter().map(|(name, secret)| (name.clone(), secret.bytes().to_vec())).collect(),
            argv: program.argv,
            env: program.env,
            cwd: program.cwd,
            user: program.user,
            network: sandbox::Network::Shared,
            limits: sandbox::Limits {
                memory: limits.memory,
                processes: limits.pids.map(u64::from),
                file_size: None,
                millicpus: limits.cpus.and_then(millis),
                kept: true,
            },
            timeout: None,
            passed_stdio: true,
        })
    }

    /// The sandbox ended with everything in it.
    fn lost(&mut self) {
        self.session = None;
        self.way = None;
        self.running = false;
        self.sockets.forget();
        for (_, reply) in std::mem::take(&mut self.beside) {
            refuse(&reply, "the program ended");
        }
    }

    /// What happened since; the program's end, once.
    fn events(&mut self) -> Result<Option<Exit>> {
        while let Some(session) = &self.session {
            if !is_readable(session.as_fd())? {
                break;
            }
            match session.next_event()? {
                (Event::Exited(exit), _) => {
                    self.running = false;
                    return Ok(Some(exit));
                }
                (Event::Sockets, sockets) => self.sockets.add(sockets),
                (Event::BesideEnded { id, result }, _) => {
                    if let Some(reply) = self.beside.remove(&id) {
                        reply.send(result);
                    }
                }
                (Event::Note(text), _) => self.told.push(text),
                _ => {}
            }
        }
        Ok(None)
    }
}

/// Thousandths of a processor; what is no number of processors is no limit.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in the range")]
fn millis(cpus: f64) -> Option<u64> {
    (cpus > 0.0 && cpus < 1e6).then(|| (cpus * 1000.0).round().max(1.0) as u64)
}

fn is_readable(fd: BorrowedFd<'_>) -> Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error).context("cannot look at the sandbox"),
    }
}

impl Own for Program {
    fn prepare(&mut self) -> Result<Vec<String>> {
        let store = Store::open_with_state(&self.spec.root, &self.spec.state)?;
        let (_, config) = image::read(&store, &self.spec.image)?;
        let layers = image::layers(&store, &self.spec.image)?;
        self.image = config.config;
        let mut notes: Vec<String> = self.open()?.into_iter().collect();
        let session = self.session()?;
        session.call::<_, ()>("remove", &self.work)?;
        self.trees = layers.iter().map(|layer| tree::tree(&store, session, layer)).collect::<Result<_>>()?;
        // From here on the leases are enough.
        drop(store);
        for dir in ["", "upper", "scratch"] {
            fs_err::create_dir_all(self.work.join(dir))?;
        }
        // The root of the program's tree.
        fs_err::set_permissions(self.work.join("upper"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let lowers = self.lowers();
        for volume in &self.spec.volumes {
            self.mounts.push(self.volume(&lowers, volume)?);
        }
        for (index, path) in self.image.volume_paths().enumerate() {
            if self.spec.volumes.iter().any(|volume| volume.path == path) {
                continue;
            }
            let dir = self.work.join(format!("volume-{index}"));
            self.fill(&lowers, &dir, path)?;
            self.mounts.push(Mount::Bind { source: dir, target: path.into(), writable: true });
        }
        self.file("hosts", HOSTS)?;
        if let Some(way) = &self.way {
            let own = fs_err::read_to_string("/etc/resolv.conf").unwrap_or_default();
            let text = way.resolv_conf(&own);
            notes.push(format!("way out to the network: {}", way.name()));
            self.file("resolv.conf", &text)?;
        }
        // Refused before anybody waits for the instance to become healthy.
        self.run_spec()?;
        Ok(notes)
    }

    fn start(&mut self, output: &OwnedFd) -> Result<()> {
        // Asked for between two runs: the answers would be taken for others'.
        for (_, reply) in std::mem::take(&mut self.beside) {
            refuse(&reply, "the program does not run");
        }
        self.open()?;
        let spec = self.run_spec()?;
        let null = fs_err::File::open("/dev/null")?;
        let session = self.session()?;
        // A container of a runc that was killed.
        session.call::<_, ()>("remove", &spec.work.join("runc"))?;
        session.start_run(&spec, &[null.as_fd(), output.as_fd(), output.as_fd()])?;
        session.sockets(MAX_FDS)?;
        self.running = true;
        Ok(())
    }

    fn watched(&self) -> Vec<BorrowedFd<'_>> {
        self.session.iter().map(Session::as_fd).collect()
    }

    fn look(&mut self) -> Result<Option<Exit>> {
        if self.running && self.spec.network && self.way.as_mut().is_some_and(|way| !way.is_open()) {
            self.open()?;
        }
        match self.events() {
            Ok(exit) => Ok(exit),
            // A command that could not be started leaves the sandbox as it is.
            Err(error) if self.session.as_ref().is_some_and(is_there) => {
                self.running = false;
                Err(error)
            }
            Err(error) => {
                self.lost();
                Err(error)
            }
        }
    }

    fn ask_to_end(&mut self) -> Result<()> {
        let signal = self.image.stop_signal.as_deref().and_then(signal_number).unwrap_or(libc::SIGTERM);
        self.session()?.signal(signal)
    }

    fn kill(&mut self) -> Result<()> {
        self.session()?.signal(libc::SIGKILL)
    }

    fn work(&mut self, job: Job) {
        match job {
            Job::Sockets => {
                let _ = self.session().and_then(|session| session.sockets(MAX_FDS));
            }
            Job::Beside { beside, stdio, reply } => {
                let [input, output, error] = &stdio;
                let stdio = [input.as_fd(), output.as_fd(), error.as_fd()];
                match self.session().and_then(|session| session.beside(&beside, stdio)) {
                    Ok(()) => drop(self.beside.insert(beside.id, reply)),
                    Err(error) => refuse(&reply, &format!("{error:#}")),
                }
            }
            Job::SignalBeside { id, signal } => {
                if self.beside.contains_key(&id) {
                    let _ = self.session().and_then(|session| session.signal_beside(id, signal));
                }
            }
            Job::Stop { .. } | Job::Memory(_) => {}
        }
    }

    fn memory(&self) -> Option<u64> {
        memory_of(self.session.as_ref()?.process()?, UNSHARE)
    }

    fn notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.told)
    }

    fn remove(&mut self) -> Result<()> {
        if let Some(session) = &self.session
            && !self.running
        {
            session.call::<_, ()>("remove", &self.work)?;
        } else {
            // It did not end even when it was killed: end everything around it, and remove from outside.
            self.lost();
            let options =
                sandbox::Options { program: "/proc/self/exe".into(), own_network: false, interactive: false, fault: None };
            Session::start(&options)?.call::<_, ()>("remove", &self.work)?;
        }
        self.lost();
        Ok(())
    }
}

fn is_there(session: &Session) -> bool {
    let process = session.process().and_then(|pid| i32::try_from(pid).ok()).and_then(rustix::process::Pid::from_raw);
    // A zombie is nobody: only a process that has not ended has an executable.
    process.is_some_and(|pid| fs_err::read_link(format!("/proc/{}/exe", pid.as_raw_pid())).is_ok())
}

/// The number of a signal as an image names it (`SIGQUIT`, `QUIT`, `3`).
fn signal_number(name: &str) -> Option<i32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let name = name.strip_prefix("SIG").unwrap_or(name);
    let known = [
        ("HUP", libc::SIGHUP),
        ("INT", libc::SIGINT),
        ("QUIT", libc::SIGQUIT),
        ("KILL", libc::SIGKILL),
        ("USR1", libc::SIGUSR1),
        ("USR2", libc::SIGUSR2),
        ("TERM", libc::SIGTERM),
        ("WINCH", libc::SIGWINCH),
    ];
    known.iter().find(|(known, _)| *known == name).map(|(_, number)| *number)
}

/// Processes above the program: the unshare process, its inner one, runc.
const UNSHARE: u32 = 3;

/// Bytes of anonymous and shared memory of a process and all below it (proc(5): RssAnon and RssShmem of
/// /proc/PID/status), but for the upper `skip` generations. `None` where the kernel does not tell of children.
pub(super) fn memory_of(pid: u32, skip: u32) -> Option<u64> {
    let mut total = 0;
    let mut next = vec![(pid, 0)];
    let mut found = false;
    while let Some((pid, depth)) = next.pop() {
        if depth >= skip {
            let status = fs_err::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let of = |name: &str| -> u64 {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
            };
            total += (of("RssAnon:") + of("RssShmem:")) * 1024;
            found = true;
        }
        for task in fs_err::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs_err::read_to_string(task.path().join("children")).unwrap_or_default();
            next.extend(children.split_whitespace().filter_map(|child| child.parse().ok()).map(|child: u32| (child, depth + 1)));
        }
    }
    found.then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_names_or_numbers() {
        let cases = [("SIGQUIT", Some(3)), ("QUIT", Some(3)), ("15", Some(15)), ("SIGWINCH", Some(28)), ("nonsense", None)];
        for (name, number) in cases {
            assert_eq!(signal_number(name), number, "{name}");
        }
    }

    #[test]
    fn processors_become_thousandths() {
        let cases = [(1.0, Some(1000)), (0.5, Some(500)), (0.0001, Some(1)), (0.0, None), (-1.0, None), (f64::NAN, None)];
        for (cpus, expected) in cases {
            assert_eq!(millis(cpus), expected, "{cpus}");
        }
    }

    #[test]
    fn the_memory_of_a_process_is_told() {
        let filled = vec![1u8; 32 << 20];
        let own = memory_of(std::process::id(), 0).unwrap();
        assert!(own > 32 << 20, "{own} bytes with {} in use", filled.len());
        assert_eq!(memory_of(std::process::id(), 40), None);
    }
}
