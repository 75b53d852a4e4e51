//! Runs commands on layered trees in namespaces of their own.
//!
//! Only the *unshare process* enters a user namespace: this program started again, single
//! threaded, with the hidden verb [`VERB`]. It gets the full map of subordinate ids, mounts
//! overlays, runs commands and calls functions that need to see the mapped owners. [`Session`]
//! is the parent's side of it. The parent keeps its own identity and does everything else.
//!
//! Everything is *bound*: the unshare process gets SIGKILL when its parent ends, it is the
//! init of a process namespace whose end takes every command along, and its mounts exist in a
//! mount namespace that goes with it. Root goes the same way as anybody, with an identity map.

mod beside;
pub mod inside;
pub mod launch;
pub mod limits;
pub mod probe;
pub mod protocol;

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use protocol::{Beside, Exit, Limits, Mount, Network, RunSpec};
use protocol::{Channel, Event, Frame, Request};

use crate::cmd::Cmd;
use crate::error::Problem;

/// The hidden verb of the unshare process.
pub const VERB: &str = "__unshare";
/// Ids in a full map: what Debian images use, and what `useradd` hands out.
pub const IDS: u32 = 65_536;

/// Unshare processes that run, for [`interrupt`].
static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Kills every unshare process of this program with everything in it: what a step is doing ends
/// at once, and the flow gets an error. For a caller that was asked to stop.
pub fn interrupt() {
    if let Ok(running) = RUNNING.lock() {
        for pid in running.iter() {
            if let Some(pid) = i32::try_from(*pid).ok().and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// Who starts a session, and with what.
#[derive(Debug, Clone)]
pub struct Options {
    /// This program.
    pub program: PathBuf,
    /// A network namespace of its own, for programs whose ports are forwarded.
    pub own_network: bool,
    /// Stay in the caller's terminal session: for an interactive shell.
    pub interactive: bool,
    /// Test only: kill the unshare process at this [`crate::fault::point`].
    pub fault: Option<i64>,
}

/// A running unshare process.
#[derive(Debug)]
pub struct Session {
    channel: Channel,
    child: Mutex<Option<Child>>,
}

impl Session {
    /// Starts an unshare process and waits until its ids are mapped.
    ///
    /// # Errors
    /// A namespace that is refused, a missing range of subordinate ids, a missing `newuidmap`:
    /// each a [`Problem`] that names the cause and the setting.
    pub fn start(options: &Options) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let mut command = Cmd::new(&options.program).arg(VERB).arg(rustix::process::getpid().as_raw_pid().to_string());
        command = command.arg(if options.own_network { "own-network" } else { "shared-network" });
        command = command.arg(options.fault.unwrap_or(-1).to_string());
        command = command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        let mut command = command.into_command();
        if !options.interactive {
            detach_from_terminal(&mut command);
        }
        let child = command.spawn().context("cannot start the unshare process")?;
        drop(command);
        let pid = child.id();
        if let Ok(mut running) = RUNNING.lock() {
            running.push(pid);
        }
        let session = Self { channel: Channel(ours), child: Mutex::new(Some(child)) };
        session.wait_done()?;
        map_ids(pid)?;
        session.channel.send(&"mapped", &[])?;
        session.wait_done()?;
        Ok(session)
    }

    /// Calls a function that the unshare process knows by name.
    pub fn call<A: Serialize, R: DeserializeOwned>(&self, name: &str, args: &A) -> Result<R> {
        self.call_noting(name, args, &mut |_| {})
    }

    /// [`Session::call`], with the notes the function sends meanwhile.
    pub fn call_noting<A: Serialize, R: DeserializeOwned>(
        &self,
        name: &str,
        args: &A,
        note: &mut dyn FnMut(Vec<u8>),
    ) -> Result<R> {
        self.channel.send(&Request::Call { name: name.into(), args: serde_json::to_value(args)? }, &[])?;
        loop {
            match self.next()? {
                Answer::Output(bytes) => note(bytes),
                Answer::Event(Event::Done(value), _) => {
                    return serde_json::from_value(value).with_context(|| format!("cannot read the answer of `{name}`"));
                }
                Answer::Event(Event::Failed(failure), _) => return Err(failure.into_error()),
                Answer::Event(Event::Note(text), _) => note(text.into_bytes()),
                // Answers to what was asked of a command just before it ended.
                Answer::Event(
                    Event::Connected | Event::Refused(_) | Event::Checked(_) | Event::Sockets | Event::BesideEnded { .. },
                    _,
                ) => {}
                Answer::Event(event, _) => anyhow::bail!("unexpected answer to `{name}`: {event:?}"),
            }
        }
    }

    /// Runs a command to its end; `output` gets what it prints.
    pub fn run(&self, spec: &RunSpec, output: &mut dyn FnMut(&[u8])) -> Result<Exit> {
        self.start_run(spec, &[])?;
        loop {
            match self.next()? {
                Answer::Output(bytes) => output(&bytes),
                Answer::Event(Event::Exited(exit), _) => return Ok(exit),
                Answer::Event(Event::Failed(failure), _) => return Err(failure.into_error()),
                Answer::Event(Event::Note(text), _) => output(format!("{text}\n").as_bytes()),
                Answer::Event(event, _) => anyhow::bail!("unexpected answer to a command: {event:?}"),
            }
        }
    }

    /// Starts a command with the caller's own standard streams; follow it with [`Session::next_event`].
    pub fn start_run(&self, spec: &RunSpec, stdio: &[BorrowedFd<'_>]) -> Result<()> {
        self.channel.send(&Request::Run(Box::new(spec.clone())), stdio)
    }

    /// The next event and the descriptors that came with it.
    pub fn next_event(&self) -> Result<(Event, Vec<OwnedFd>)> {
        loop {
            match self.next()? {
                Answer::Event(Event::Failed(failure), _) => return Err(failure.into_error()),
                Answer::Event(event, fds) => return Ok((event, fds)),
                Answer::Output(_) => {}
            }
        }
    }

    /// Sends `signal` to the running command.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.channel.send(&Request::Signal(signal), &[])
    }

    /// Asks for a connection to a loopback port of the command's network.
    pub fn connect(&self, port: u16) -> Result<()> {
        self.channel.send(&Request::Connect { port }, &[])
    }

    /// Asks for a command to be run beside the program.
    pub fn check(&self, argv: &[String]) -> Result<()> {
        self.channel.send(&Request::Check { argv: argv.to_vec() }, &[])
    }

    /// Asks for sockets of the command's network that are connected to nothing.
    pub fn sockets(&self, count: usize) -> Result<()> {
        self.channel.send(&Request::Sockets { count: count.min(protocol::MAX_FDS) }, &[])
    }

    /// Runs a command beside the program with these standard streams; [`Event::BesideEnded`] tells its end.
    pub fn beside(&self, beside: &Beside, stdio: [BorrowedFd<'_>; 3]) -> Result<()> {
        self.channel.send(&Request::Beside(beside.clone()), &stdio)
    }

    /// Sends `signal` to a command beside the program.
    pub fn signal_beside(&self, id: u64, signal: i32) -> Result<()> {
        self.channel.send(&Request::SignalBeside { id, signal }, &[])
    }

    /// The unshare process: its namespaces are those of all it runs. `None` when it was ended.
    pub fn process(&self) -> Option<u32> {
        self.child.lock().ok().and_then(|child| child.as_ref().map(Child::id))
    }

    /// The socket, for polling.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.0.as_fd()
    }

    /// Ends the unshare process and everything in it.
    pub fn kill(&self) {
        if let Ok(mut child) = self.child.lock()
            && let Some(mut child) = child.take()
        {
            let _ = child.kill();
            let _ = child.wait();
            if let Ok(mut running) = RUNNING.lock() {
                running.retain(|pid| *pid != child.id());
            }
        }
    }

    fn wait_done(&self) -> Result<()> {
        match self.next()? {
            Answer::Event(Event::Done(_), _) => Ok(()),
            Answer::Event(Event::Failed(failure), _) => Err(failure.into_error()),
            other => anyhow::bail!("unexpected answer while starting: {other:?}"),
        }
    }

    fn next(&self) -> Result<Answer> {
        match self.channel.receive()? {
            Some(Frame::Output(bytes)) => Ok(Answer::Output(bytes)),
            Some(Frame::Json(payload, fds)) => Ok(Answer::Event(protocol::parse(&payload)?, fds)),
            None => {
                let status = self.child.lock().ok().and_then(|mut child| child.as_mut().and_then(|child| child.wait().ok()));
                let how = status.map_or_else(|| "an unknown status".into(), crate::cmd::describe);
                Err(Problem::failed(format!("the unshare process ended with {how}"))
                    .hint("it may have been killed, or have run out of memory")
                    .into())
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.kill();
    }
}

#[derive(Debug)]
enum Answer {
    Event(Event, Vec<OwnedFd>),
    Output(Vec<u8>),
}

/// Gives the unshare process `pid` its ids: root an identity map, others their own id as root
/// and their subordinate range above it (user_namespaces(7), newuidmap(1)).
fn map_ids(pid: u32) -> Result<()> {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let uid = rustix::process::geteuid().as_raw();
    if uid == 0 {
        for name in ["uid_map", "gid_map"] {
            let own = fs_err::read_to_string(Path::new("/proc/self").join(name))?;
            fs_err::write(proc.join(name), identity_map(&own)).context("cannot map the ids of the user namespace")?;
        }
        return Ok(());
    }
    let gid = rustix::process::getegid().as_raw();
    let user = user_name(uid, Path::new("/etc/passwd"));
    for (tool, file, own) in [("newuidmap", "/etc/subuid", uid), ("newgidmap", "/etc/subgid", gid)] {
        let text = fs_err::read_to_string(file).unwrap_or_default();
        let Some((start, _)) = subordinate_range(&text, &user, uid) else {
            return Err(no_range(&user, file).into());
        };
        Cmd::new(tool)
            .args([pid.to_string(), "0".into(), own.to_string(), "1".into(), "1".into(), start.to_string(), (IDS - 1).to_string()])
            .run()
            .map_err(|error| {
                Problem::failed(format!("cannot map the subordinate ids of `{user}`: {error:#}"))
                    .hint("the package `uidmap` has to be installed and its newuidmap setuid root; `pipeline doctor` shows what is missing")
            })?;
    }
    Ok(())
}

/// The first [`IDS`] ids of `own`, a map as in user_namespaces(7), each as itself. A range of the new
/// map must lie in one of the namespace's own, and a rootless container's has two.
fn identity_map(own: &str) -> String {
    let rows = own.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let start: u32 = fields.next()?.parse().ok()?;
        let count: u32 = fields.nth(1)?.parse().ok()?;
        let count = count.min(IDS.checked_sub(start)?);
        (count > 0).then(|| format!("{start} {start} {count}\n"))
    });
    rows.collect()
}

fn no_range(user: &str, file: &str) -> Problem {
    Problem::failed(format!("`{user}` has no range of {} subordinate ids in `{file}`", IDS - 1))
        .hint("`pipeline doctor` names a range that is free on this machine")
}

/// The first range of at least 65,535 ids that `text` (subuid(5)) gives to the user.
pub fn subordinate_range(text: &str, user: &str, uid: u32) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let start: u32 = fields.next()?.parse().ok()?;
        let count: u32 = fields.next()?.parse().ok()?;
        ((owner == user || owner == uid.to_string()) && count >= IDS - 1).then_some((start, count))
    })
}

/// The name of a user, when /etc/passwd has one.
pub fn user_name_of(uid: u32) -> Option<String> {
    Some(user_name(uid, Path::new("/etc/passwd"))).filter(|name| *name != uid.to_string())
}

fn user_name(uid: u32, passwd: &Path) -> String {
    let text = fs_err::read_to_string(passwd).unwrap_or_default();
    let name = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid.to_string()).then(|| name.to_string())
    });
    name.unwrap_or_else(|| uid.to_string())
}

#[expect(unsafe_code, reason = "pre_exec: setsid is async-signal-safe")]
fn detach_from_terminal(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt as _;
    unsafe {
        command.pre_exec(|| {
            // A ^C at the terminal is for the program, which ends the step in its own way.
            rustix::process::setsid()?;
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_keeps_its_ids() {
        let cases = [
            ("         0          0 4294967295\n", "0 0 65536\n"),
            ("         0       1000          1\n         1     100000      65536\n", "0 0 1\n1 1 65535\n"),
            ("0 1000 1\n70000 5 5\n", "0 0 1\n"),
        ];
        for (own, expected) in cases {
            assert_eq!(identity_map(own), expected);
        }
    }

    #[test]
    fn ranges_are_found_by_name_or_id() {
        let text = "a:100000:65536\n1001:300000:65536\nsmall:5:10\n";
        assert_eq!(subordinate_range(text, "a", 7), Some((100_000, 65_536)));
        assert_eq!(subordinate_range(text, "b", 1001), Some((300_000, 65_536)));
        assert_eq!(subordinate_range(text, "small", 9), None);
    }
}
