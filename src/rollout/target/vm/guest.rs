//! Talks to a kept machine: QEMU's monitor, and the agent in the guest.
//!
//! QEMU takes one client at a time on each socket, so connections are short; who talks to the agent holds a lock.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::fs::{Mode, OFlags};
use serde_json::Value;

use crate::artifact::store::{Hold, Lock};
use crate::error::Problem;
use crate::vm::agent::{Agent, Output, State};
use crate::vm::bell::Bell;
use crate::vm::qmp::{self, Qmp};

/// QEMU's sockets in its folder.
pub const QMP: &str = "qmp";
pub const AGENT: &str = "agent";
/// How long QEMU may take to greet; another client of it may have to end before.
const GREETING: Duration = Duration::from_secs(10);
/// Longest time between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// How long the guest's agent may take to end a command whose time is over, and to say so.
const OVERTIME: Duration = Duration::from_secs(10);

/// Ends a connection when it is dropped, and with it the thread that reads it.
#[derive(Debug)]
struct End(UnixStream);

impl Drop for End {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

/// A socket in a folder, however long the folder's path is.
fn connect(folder: &Path, name: &str) -> Result<(UnixStream, End)> {
    use std::os::fd::AsRawFd as _;
    let open = || -> std::io::Result<UnixStream> {
        let folder = rustix::fs::open(folder, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        UnixStream::connect(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
    };
    let stream = open().with_context(|| Problem::failed("the machine does not run"))?;
    let end = End(stream.try_clone().context("cannot share a socket")?);
    Ok((stream, end))
}

/// QEMU's monitor.
#[derive(Debug)]
pub struct Monitor {
    qmp: Qmp,
    _end: End,
}

impl Monitor {
    /// `folder` is that of QEMU's sockets.
    pub fn open(folder: &Path) -> Result<Self> {
        let (stream, end) = connect(folder, QMP)?;
        let bell = Bell::default();
        let mut qmp = Qmp::new(stream, bell.clone())?;
        let late = Instant::now() + GREETING;
        loop {
            let seen = bell.rings();
            if qmp.is_greeted() {
                break;
            }
            if qmp.is_closed() || Instant::now() >= late {
                return Err(Problem::failed("the machine's QEMU does not answer").into());
            }
            bell.wait(seen, LOOK);
        }
        qmp.call("qmp_capabilities", Value::Null)?;
        Ok(Self { qmp, _end: end })
    }

    /// The port of 127.0.0.1 that leads to `port` of the guest.
    pub fn forwarded(&mut self, port: u16) -> Result<Option<u16>> {
        let ports = qmp::forwards(&self.qmp.monitor("info usernet")?);
        Ok(ports.into_iter().find(|(_, guest)| *guest == port).map(|(host, _)| host))
    }

    /// Presses the power button.
    pub fn press_power(&mut self) -> Result<()> {
        self.qmp.call("system_powerdown", Value::Null).map(drop)
    }
}

/// The agent in the guest; nobody else talks to it meanwhile.
#[derive(Debug)]
pub struct Guest {
    agent: Agent,
    bell: Bell,
    _end: End,
    _lock: Lock,
}

impl Guest {
    /// `folder` is that of QEMU's sockets, `lock` the file that is held. `None`: nobody answers in time, or somebody else
    /// has the agent until then.
    pub fn open(folder: &Path, lock: &Path, patience: Duration) -> Result<Option<Self>> {
        let late = Instant::now() + patience;
        let lock = loop {
            if let Some(lock) = Lock::try_now(lock, Hold::Exclusive)? {
                break lock;
            }
            if Instant::now() >= late {
                return Ok(None);
            }
            std::thread::sleep(LOOK / 4);
        };
        let (stream, end) = connect(folder, AGENT)?;
        let bell = Bell::default();
        let mut agent = Agent::new(stream, bell.clone())?;
        loop {
            let seen = bell.rings();
            if agent.boot_id().is_some() {
                return Ok(Some(Self { agent, bell, _end: end, _lock: lock }));
            }
            let left = late.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            bell.wait(seen, left.min(LOOK));
        }
    }

    /// Runs a command; what it prints goes to `sink` as it comes, with whether it is an error's.
    ///
    /// # Errors
    /// The guest, or its agent, starts anew meanwhile.
    pub fn run(&mut self, argv: &[&str], limit: Option<Duration>, sink: &mut dyn FnMut(bool, &[u8])) -> Result<Output> {
        let id = self.agent.exec(argv, limit.unwrap_or(Duration::from_secs(u64::from(u32::MAX))))?;
        let late = limit.map(|limit| Instant::now() + limit + OVERTIME);
        loop {
            let seen = self.bell.rings();
            let (out, err) = self.agent.printed(id);
            [(false, out), (true, err)]
                .into_iter()
                .filter(|(_, bytes)| !bytes.is_empty())
                .for_each(|(is_error, bytes)| sink(is_error, &bytes));
            match self.agent.poll(id) {
                State::Done(output) => {
                    sink(false, &output.stdout);
                    sink(true, &output.stderr);
                    return Ok(output);
                }
                State::Lost => {
                    return Err(Problem::failed("the machine, or its agent, started anew while the command ran").into());
                }
                State::Running if late.is_some_and(|late| Instant::now() >= late) => {
                    let _ = self.agent.kill(id);
                    return Ok(Output { timed_out: true, ..Output::default() });
                }
                State::Running => self.bell.wait(seen, LOOK),
            }
        }
    }
}

/// The words that run `argv` beside the app's program: in its tree, as its user, with its variables.
pub fn inside(app: &str, argv: &[String]) -> Vec<String> {
    let script = format!(
        "pid=$(systemctl show --property=MainPID --value app-{app}.service)\n\
         if [ \"${{pid:-0}}\" -le 0 ]; then echo 'app-{app}.service does not run' >&2; exit 125; fi\n\
         uid=$(sed -n 's/^Uid:[[:space:]]*\\([0-9]*\\).*/\\1/p' /proc/$pid/status)\n\
         gid=$(sed -n 's/^Gid:[[:space:]]*\\([0-9]*\\).*/\\1/p' /proc/$pid/status)\n\
         exec nsenter --target \"$pid\" --mount --ipc --env --root --wd --setuid \"$uid\" --setgid \"$gid\" -- \"$@\""
    );
    ["sh", "-c", &script, "sh"].map(String::from).into_iter().chain(argv.iter().cloned()).collect()
}
