//! Commands beside a program that runs: health checks, a shell to look around. And sockets of its network.
//!
//! Runs in the unshare process. A command is started by `runc exec` in the program's namespaces, as its
//! user and with its variables, while the program and other commands go on; it is under the program's limits.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::launch::{freeze, limit, name_of, program};
use super::limits::Group;
use super::protocol::{self, Channel, Event, Exit, MAX_FDS, RunSpec};
use crate::cmd::Cmd;

/// How long `runc exec` may take to notice that its command was killed.
const NOTICE: Duration = Duration::from_secs(1);

/// A command that runs beside the program.
#[derive(Debug)]
pub struct Beside {
    pub id: u64,
    child: Child,
    pidfd: OwnedFd,
    deadline: Option<Instant>,
    timed_out: bool,
    /// runc writes here which process the command is.
    pid_file: PathBuf,
}

impl Beside {
    /// Starts a command with the standard streams `stdio`.
    pub fn start(spec: &RunSpec, group: &Arc<Group>, asked: &protocol::Beside, stdio: Vec<OwnedFd>) -> Result<Self> {
        let pid_file = spec.work.join(format!("beside-{}.pid", asked.id));
        let mut stdio = stdio.into_iter();
        let mut next = || stdio.next().map(Stdio::from).context("three file descriptors");
        let mut command = Cmd::new(program("runc"))
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(next()?)
            .stdout(next()?)
            .stderr(next()?)
            .arg("--root")
            .arg(spec.work.join("runc"))
            .args(["exec", "--pid-file"])
            .arg(&pid_file);
        if asked.terminal {
            command = command.arg("--tty");
        }
        let mut command = command.arg(format!("pipeline-{}", name_of(spec))).args(&asked.argv).into_command();
        limit(&mut command, spec, group);
        freeze(&mut command);
        let child = command.spawn().context("cannot start `runc exec`")?;
        let pidfd =
            rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).context("cannot watch `runc exec`")?;
        let deadline = asked.timeout.map(|timeout| Instant::now() + timeout);
        Ok(Self { id: asked.id, child, pidfd, deadline, timed_out: false, pid_file })
    }

    /// Readable when it has ended.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Sends a signal; SIGKILL goes to the command and all of its session, since runc cannot pass it on.
    pub fn signal(&mut self, signal: i32) {
        if signal == libc::SIGKILL {
            let text = fs_err::read_to_string(&self.pid_file).unwrap_or_default();
            match text.trim().parse().ok().and_then(Pid::from_raw) {
                // It is the leader of a session and process group of its own (runc's init calls setsid).
                Some(pid) => drop(rustix::process::kill_process_group(pid, Signal::KILL)),
                None => drop(self.child.kill()),
            }
        } else if let Some(signal) = Signal::from_named_raw(signal) {
            let _ = rustix::process::kill_process(Pid::from_child(&self.child), signal);
        }
    }

    /// How it ended, if it has.
    fn ended(&mut self) -> Option<Result<Exit, String>> {
        match self.child.try_wait() {
            Ok(None) => {
                let late = self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
                if late && self.timed_out {
                    let _ = self.child.kill();
                    self.deadline = None;
                } else if late {
                    self.timed_out = true;
                    self.deadline = Some(Instant::now() + NOTICE);
                    self.signal(libc::SIGKILL);
                }
                None
            }
            Ok(Some(status)) => Some(Ok(match (status.code(), status.signal()) {
                _ if self.timed_out => Exit::TimedOut,
                (Some(code), _) => Exit::Code(code),
                (None, signal) => Exit::Signal(signal.unwrap_or(0)),
            })),
            Err(error) => Some(Err(error.to_string())),
        }
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = rustix::fs::unlinkat(rustix::fs::CWD, &self.pid_file, rustix::fs::AtFlags::empty());
    }
}

/// Tells of those that have ended, and ends those whose time is up.
pub fn look(running: &mut Vec<Beside>, channel: &Channel) -> Result<()> {
    let mut index = 0;
    while index < running.len() {
        match running[index].ended() {
            Some(result) => {
                let beside = running.remove(index);
                channel.send(&Event::BesideEnded { id: beside.id, result }, &[])?;
            }
            None => index += 1,
        }
    }
    Ok(())
}

/// Ends all of them, since the program has ended.
pub fn end_all(running: &mut Vec<Beside>, channel: &Channel) -> Result<()> {
    for mut beside in running.drain(..) {
        // Their processes ended with the namespace; runc notices in a moment.
        let patience = Instant::now() + NOTICE;
        let result = loop {
            match beside.ended() {
                Some(result) => break result,
                None if Instant::now() >= patience => break Err("the program ended".into()),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        channel.send(&Event::BesideEnded { id: beside.id, result }, &[])?;
    }
    Ok(())
}

/// Sends sockets of this network namespace that are connected to nothing: who has one may connect it
/// without asking again, since a socket stays in the namespace it was made in.
pub fn hand_over_sockets(channel: &Channel, count: usize) -> Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let sockets: Vec<OwnedFd> = (0..count.min(MAX_FDS))
        .map_while(|_| {
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None).ok()
        })
        .collect();
    let borrowed: Vec<BorrowedFd<'_>> = sockets.iter().map(|socket| socket.as_fd()).collect();
    channel.send(&Event::Sockets, &borrowed)
}
