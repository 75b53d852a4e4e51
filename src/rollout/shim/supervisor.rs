//! The shim itself: takes the instance, starts its program again and again, ends it when asked.

use std::ffi::OsStr;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::client::{self, SOCKET};
use super::command::Command;
use super::log::Log;
use super::program::Program;
use super::server::{self, Job, Reply};
use super::{Instance, Owned, Response, Running, State, VERB};
use crate::artifact::store::{write_atomic, write_cache};
use crate::artifact::tree::boot_id;
use crate::cmd::Cmd;
use crate::rollout::target::Secret;
use crate::sandbox::Exit;
use crate::sandbox::protocol::{Channel, Failure, Frame, parse};

/// The word after the folder that tells the second process from the first.
const KEPT: &str = "kept";
/// First wait before a program that ended is started again.
const FIRST_WAIT: Duration = Duration::from_millis(500);
/// Each wait is twice the one before, up to this.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A program that ran this long is trusted again: the next wait is the first.
const LONG_ENOUGH: Duration = Duration::from_secs(60);
/// Without anything to do it looks around this often.
const LOOK: Duration = Duration::from_secs(5);
/// How long a killed program may take to be gone before its namespaces are ended.
const KILLED: Duration = Duration::from_secs(5);

/// What [`client::start`] hands over. The secrets are in memory and on a socket only.
#[derive(Serialize, Deserialize)]
pub(super) struct Handed {
    pub instance: Instance,
    pub owned: Owned,
    pub secrets: Vec<(String, Vec<u8>)>,
}

/// What it gets back.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Taken {
    Started,
    /// One of this id lives already.
    There,
    Failed(Failure),
}

/// What a shim can own. All calls are made by one thread, which lives as long as the shim.
pub(super) trait Own {
    /// Makes everything that outlives one run of the program; answers what a person should know.
    fn prepare(&mut self) -> Result<Vec<String>>;
    /// Starts the program, its output going to `output`.
    fn start(&mut self, output: &OwnedFd) -> Result<()>;
    /// What is readable when there is something for [`Own::look`].
    fn watched(&self) -> Vec<BorrowedFd<'_>>;
    /// Sees what happened, without waiting; how the program ended, once.
    ///
    /// # Errors
    /// What it ran in is gone, and the program with it.
    fn look(&mut self) -> Result<Option<Exit>>;
    fn ask_to_end(&mut self) -> Result<()>;
    fn kill(&mut self) -> Result<()>;
    /// Does what a client asked for.
    fn work(&mut self, job: Job);
    /// Bytes that the program uses.
    fn memory(&self) -> Option<u64>;
    /// What a person should know since it was last asked.
    fn notes(&mut self) -> Vec<String> {
        Vec::new()
    }
    /// Removes what [`Own::prepare`] made, the running program included.
    fn remove(&mut self) -> Result<()>;
}

/// Runs the shim: `args` are what follows [`VERB`], `path` the `PATH` in which it finds other programs.
pub fn main(args: &[String], path: &OsStr) -> ExitCode {
    let result = match args {
        [dir] => relay(dir, path),
        [dir, word] if word == KEPT => keep(Path::new(dir), path),
        _ => return ExitCode::from(2),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The first process: starts the second, which is nobody's child once this one has ended.
fn relay(dir: &str, path: &OsStr) -> Result<()> {
    let command = Cmd::new("/proc/self/exe").args([VERB, dir, KEPT]).env_clear().env("PATH", path).kept();
    command.stdin(Stdio::inherit()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map(drop)
}

/// The second process.
fn keep(dir: &Path, path: &OsStr) -> Result<()> {
    let channel = crate::sandbox::inside::socket()?;
    // What is made in the store is as a build makes it; the instance's folder is the user's alone.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    rustix::process::chdir("/").context("cannot enter `/`")?;
    let handed: Handed = match channel.receive()? {
        Some(Frame::Json(payload, _)) => parse(&payload)?,
        _ => anyhow::bail!("nothing was handed over"),
    };
    let shim = match Shim::take(dir, handed, path) {
        Ok(Some(shim)) => shim,
        Ok(None) => return channel.send(&Taken::There, &[]),
        Err(error) => return channel.send(&Taken::Failed(Failure::of(&error)), &[]),
    };
    // Who asked may be gone by now; the instance is there all the same.
    let _ = channel.send(&Taken::Started, &[]);
    drop(channel);
    shim.run()
}

struct Shim {
    dir: PathBuf,
    own: Box<dyn Own>,
    state: Arc<Mutex<State>>,
    jobs: Receiver<Job>,
    wake: OwnedFd,
    output: Arc<Output>,
    /// The writing end of the program's output.
    writer: OwnedFd,
    back_off: BackOff,
    phase: Phase,
    /// Who waits for the end.
    enders: Vec<Channel>,
    /// The last one to go.
    _lock: OwnedFd,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Up { since: Instant },
    Waiting { until: Instant },
    Ending { kill_at: Instant, killed: bool },
    Over,
}

impl Shim {
    /// Takes the folder, and makes everything the program needs; `None` when another shim has it.
    fn take(dir: &Path, handed: Handed, path: &OsStr) -> Result<Option<Self>> {
        let Some(lock) = client::hold(dir, true)? else { return Ok(None) };
        // What a shim that was killed left.
        client::clean(Path::new("/proc/self/exe"), dir)?;
        let result = Self::make(dir, handed, path, lock);
        if result.is_err() {
            // Nothing of it is left, but for a log of an earlier life.
            let _ = client::clean(Path::new("/proc/self/exe"), dir);
            client::remove_empty(dir);
        }
        result.map(Some)
    }

    fn make(dir: &Path, handed: Handed, path: &OsStr, lock: OwnedFd) -> Result<Self> {
        let state =
            Arc::new(Mutex::new(State { status: Running::Starting, restarts: 0, memory: None, last: None, notes: Vec::new() }));
        write_cache(&dir.join("pid"), format!("{}\n{}\n", client::myself()?, boot_id()?).as_bytes())?;
        write_atomic(&dir.join("instance.json"), &serde_json::to_vec_pretty(&handed.instance)?)?;
        let listener = bind(dir)?;
        let (asked, jobs) = mpsc::channel();
        let (wake, waker) = std::io::pipe().context("cannot make a pipe")?;
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        for end in [wake.as_fd(), waker.as_fd(), reader.as_fd()] {
            rustix::io::ioctl_fionbio(end, true)?;
        }
        let output = Arc::new(Output { reader, log: Mutex::new(Log::open(dir)) });
        let pumped = output.clone();
        std::thread::spawn(move || pumped.follow());
        let asking = Asking { jobs: asked, waker: Arc::new(waker.into()) };
        let secrets: Vec<(String, Secret)> = handed.secrets.into_iter().map(|(name, bytes)| (name, Secret::new(bytes))).collect();
        let sockets = Arc::new(server::Sockets::default());
        let mut own: Box<dyn Own> = match handed.owned {
            Owned::Program(spec) => Box::new(Program::new(dir, spec, secrets, path, sockets.clone())),
            Owned::Command { argv, env, stop } => {
                Box::new(Command::new(dir, argv, env, stop, secrets, path, writer.try_clone()?.into()))
            }
        };
        server::serve(listener, asking, state.clone(), sockets);
        let notes = own.prepare()?;
        if let Ok(mut state) = state.lock() {
            state.notes = notes;
        }
        Ok(Self {
            dir: dir.into(),
            own,
            state,
            jobs,
            wake: wake.into(),
            output,
            writer: writer.into(),
            back_off: BackOff::default(),
            phase: Phase::Over,
            enders: Vec::new(),
            _lock: lock,
        })
    }

    fn run(mut self) -> Result<()> {
        self.start_program();
        while self.phase != Phase::Over {
            self.wait()?;
            while let Ok(job) = self.jobs.try_recv() {
                match job {
                    Job::Stop { grace, channel } => self.end(grace, channel),
                    Job::Memory(answer) => drop(answer.send(self.own.memory())),
                    job => self.own.work(job),
                }
            }
            match self.own.look() {
                Ok(None) => {}
                Ok(Some(exit)) => self.ended(&words(exit)),
                Err(error) => self.ended(&format!("{error:#}")),
            }
            let notes = self.own.notes();
            if !notes.is_empty() {
                self.tell(|state| {
                    notes.iter().for_each(|note| {
                        if !state.notes.contains(note) {
                            state.notes.push(note.clone())
                        }
                    })
                });
            }
            self.timers();
        }
        self.own.remove()?;
        self.output.pump();
        client::remove_files(&self.dir)?;
        for channel in &self.enders {
            let _ = channel.send(&Response::Done, &[]);
        }
        Ok(())
    }

    /// Waits for an event, a client, or the time of what comes next.
    fn wait(&self) -> Result<()> {
        let next = match self.phase {
            Phase::Waiting { until } => until,
            Phase::Ending { kill_at, .. } => kill_at,
            Phase::Up { .. } | Phase::Over => Instant::now() + LOOK,
        };
        let left = next.saturating_duration_since(Instant::now()).min(LOOK);
        let timeout = Timespec { tv_sec: i64::try_from(left.as_secs())?, tv_nsec: left.subsec_nanos().into() };
        {
            let mut fds: Vec<PollFd<'_>> =
                self.own.watched().into_iter().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            fds.push(PollFd::new(&self.wake, PollFlags::IN));
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait"),
            }
        }
        let mut bytes = [0; 64];
        while rustix::io::read(&self.wake, &mut bytes).is_ok_and(|read| read > 0) {}
        Ok(())
    }

    fn start_program(&mut self) {
        match self.own.start(&self.writer) {
            Ok(()) => {
                self.phase = Phase::Up { since: Instant::now() };
                self.tell(|state| state.status = Running::Running);
            }
            Err(error) => {
                self.phase = Phase::Up { since: Instant::now() };
                self.ended(&format!("it could not be started: {error:#}"));
            }
        }
    }

    /// The program is no more; `how` in words.
    fn ended(&mut self, how: &str) {
        self.output.pump();
        match self.phase {
            Phase::Ending { .. } => {
                self.output.say(&format!("the program was asked to end, {how}"));
                self.phase = Phase::Over;
            }
            Phase::Up { since } => {
                let wait = self.back_off.next(since.elapsed());
                self.output.say(&format!("the program ended: {how}; it is started again in {:.1} s", wait.as_secs_f64()));
                self.phase = Phase::Waiting { until: Instant::now() + wait };
                self.tell(|state| {
                    state.status = Running::Waiting;
                    state.last = Some(how.to_string());
                });
            }
            Phase::Waiting { .. } | Phase::Over => {}
        }
    }

    fn end(&mut self, grace: Duration, channel: Channel) {
        self.enders.push(channel);
        let kill_at = Instant::now() + grace;
        match self.phase {
            Phase::Up { .. } => {
                self.phase = Phase::Ending { kill_at, killed: false };
                if self.own.ask_to_end().is_err() {
                    self.phase = Phase::Ending { kill_at: Instant::now(), killed: false };
                }
            }
            Phase::Waiting { .. } => self.phase = Phase::Over,
            // Asked twice: the shorter patience counts.
            Phase::Ending { kill_at: at, killed } => self.phase = Phase::Ending { kill_at: at.min(kill_at), killed },
            Phase::Over => {}
        }
    }

    fn timers(&mut self) {
        match self.phase {
            Phase::Waiting { until } if Instant::now() >= until => {
                self.tell(|state| state.restarts += 1);
                self.start_program();
            }
            Phase::Ending { kill_at, killed: false } if Instant::now() >= kill_at => {
                self.output.say("the program did not end in time and is killed");
                self.phase = Phase::Ending { kill_at: Instant::now() + KILLED, killed: true };
                if self.own.kill().is_err() {
                    self.phase = Phase::Over;
                }
            }
            // Its namespaces are ended with what is removed.
            Phase::Ending { kill_at, killed: true } if Instant::now() >= kill_at => self.phase = Phase::Over,
            _ => {}
        }
    }

    /// Changes the state, here and in `status.json`, which is worth having but nothing depends on.
    fn tell(&self, change: impl FnOnce(&mut State)) {
        let Ok(mut state) = self.state.lock() else { return };
        change(&mut state);
        if let Ok(bytes) = serde_json::to_vec(&*state) {
            let _ = write_cache(&self.dir.join("status.json"), &bytes);
        }
    }
}

/// How the threads of clients reach the shim's own.
#[derive(Debug, Clone)]
pub(super) struct Asking {
    jobs: Sender<Job>,
    waker: Arc<OwnedFd>,
}

impl Asking {
    pub(super) fn ask(&self, job: Job) {
        let _ = self.jobs.send(job);
        let _ = rustix::io::write(&*self.waker, b"w");
    }
}

/// The program's output on its way to the log.
struct Output {
    reader: std::io::PipeReader,
    log: Mutex<Log>,
}

impl Output {
    /// Moves what there is.
    fn pump(&self) {
        let Ok(mut log) = self.log.lock() else { return };
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read) = (&self.reader).read(&mut buffer) {
            if read == 0 {
                break;
            }
            log.write(&buffer[..read]);
        }
    }

    /// Moves what comes, for ever: the shim holds the other end.
    fn follow(&self) {
        loop {
            match poll(&mut [PollFd::new(&self.reader, PollFlags::IN)], None) {
                Ok(_) => self.pump(),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn say(&self, text: &str) {
        self.pump();
        if let Ok(mut log) = self.log.lock() {
            log.say(text);
        }
    }
}

/// Binds the socket, through the folder's descriptor: a path of a socket has 107 bytes at most (unix(7)).
fn bind(dir: &Path) -> Result<UnixListener> {
    let folder = client::open_folder(dir)?;
    let listener = UnixListener::bind(client::through(&folder, SOCKET)).context("cannot make the shim's socket")?;
    fs_err::set_permissions(dir.join(SOCKET), std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(listener)
}

/// How a program ended, for people.
pub(super) fn words(exit: Exit) -> String {
    match exit {
        Exit::Code(code) => format!("status {code}"),
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::TimedOut => "its time was up".into(),
    }
}

/// Answers whoever waits for a command that cannot be run.
pub(super) fn refuse(reply: &Reply, why: &str) {
    reply.send(Err(why.to_string()));
}

/// How long to wait before a program is started again.
#[derive(Debug, Default)]
struct BackOff {
    next: Option<Duration>,
}

impl BackOff {
    /// The wait after a run of `ran`.
    fn next(&mut self, ran: Duration) -> Duration {
        let wait = self.next.filter(|_| ran < LONG_ENOUGH).unwrap_or(FIRST_WAIT);
        self.next = Some((wait * 2).min(LONGEST_WAIT));
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound_and_begin_anew_after_a_long_run() {
        let mut back_off = BackOff::default();
        let short = Duration::from_secs(1);
        let waits: Vec<f64> = (0..8).map(|_| back_off.next(short).as_secs_f64()).collect();
        assert_eq!(waits, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        assert_eq!(back_off.next(Duration::from_secs(60)), FIRST_WAIT);
        assert_eq!(back_off.next(short), Duration::from_secs(1));
    }
}
