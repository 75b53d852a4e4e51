//! The unshare process: enters its namespaces, then serves requests until its parent is gone.
//!
//! Two processes: the first makes the user namespace and waits; the second is the init of a
//! process namespace, does the work, and takes everything in it along when it ends. Nothing
//! here starts a thread before the namespaces are entered.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Pid, Signal};
use rustix::thread::UnshareFlags;
use serde_json::Value;

use super::protocol::{Channel, Event, Failure, Frame, Request, parse};
use super::{beside, launch};
use crate::error::Problem;

/// Functions that higher levels lend to the unshare process: name and arguments to answer. The
/// callback sends notes to the parent.
pub type Calls = dyn Fn(&str, Value, &dyn Fn(&str)) -> Result<Value>;

/// Runs the unshare process: standard input is the socket pair, `args` are the parent's process
/// id, the kind of network and the fault point.
pub fn main(args: &[String], calls: &Calls) -> ExitCode {
    let channel = match socket() {
        Ok(channel) => channel,
        Err(_) => return ExitCode::from(2),
    };
    match enter(args, &channel) {
        Ok(Stage::Waited(code)) => ExitCode::from(code),
        Ok(Stage::Inside) => {
            let _ = channel.send(&Event::Done(Value::Null), &[]);
            match serve(&channel, calls) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            let _ = channel.send(&Event::Failed(Failure::of(&error)), &[]);
            ExitCode::FAILURE
        }
    }
}

/// Takes standard input as the socket and puts /dev/null in its place.
pub fn socket() -> Result<Channel> {
    let socket = rustix::io::fcntl_dupfd_cloexec(std::io::stdin().as_fd(), 3)?;
    let null = rustix::fs::open("/dev/null", rustix::fs::OFlags::RDWR, rustix::fs::Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(Channel(UnixStream::from(socket)))
}

enum Stage {
    /// The outer process: the inner one ended with this status.
    Waited(u8),
    Inside,
}

fn enter(args: &[String], channel: &Channel) -> Result<Stage> {
    let [parent, network, fault] = args else {
        anyhow::bail!(Problem::usage("the unshare process is started by `pipeline` itself"))
    };
    let parent: i32 = parent.parse().context("the parent's process id")?;
    if let Ok(nth) = fault.parse::<i64>()
        && nth > 0
    {
        crate::fault::arm(nth);
    }
    let mut flags =
        UnshareFlags::NEWUSER | UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    let own_network = network == "own-network";
    if own_network {
        flags |= UnshareFlags::NEWNET;
    }
    unshare(flags).map_err(refused)?;
    channel.send(&Event::Done(Value::Null), &[])?;
    match channel.receive()? {
        Some(Frame::Json(..)) => {}
        _ => anyhow::bail!("the parent ended before the ids were mapped"),
    }
    become_root()?;
    // The credentials changed, which clears the death signal: set it again, then look whether
    // the parent is still there.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid().map(Pid::as_raw_pid) != Some(parent) {
        anyhow::bail!("the parent is gone");
    }
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .context("cannot make the mounts private")?;
    if own_network {
        loopback_up().context("cannot bring up the loopback device")?;
    }
    if let Some(child) = fork()? {
        return Ok(Stage::Waited(wait(child)));
    }
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // Nothing of the caller's in what is made here.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    rustix::system::sethostname(b"pipeline").context("cannot set the host name of the namespace")?;
    rustix::mount::mount("proc", "/proc", "proc", MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC, None).map_err(
        |error| {
            Problem::failed(format!("cannot mount /proc in a new process namespace: {error}"))
                .hint("in a container, give it `--security-opt systempaths=unconfined`; `pipeline doctor` tells more")
        },
    )?;
    Ok(Stage::Inside)
}

#[expect(unsafe_code, reason = "unshare(2) of a single-threaded process that shares no file descriptors")]
fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

fn refused(error: rustix::io::Errno) -> anyhow::Error {
    // The kernel's words would be those of a full disk.
    let words = if error == rustix::io::Errno::NOSPC { "no more of them are allowed (ENOSPC)".into() } else { error.to_string() };
    Problem::failed(format!("unshare: a new user namespace is refused: {words}"))
        .hint("`pipeline doctor` looks for the cause")
        .into()
}

fn become_root() -> Result<()> {
    use rustix::fs::{Gid, Uid};
    rustix::thread::set_thread_groups(&[]).context("cannot drop supplementary groups")?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).context("cannot become group root of the namespace")?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).context("cannot become root of the namespace")
}

#[expect(unsafe_code, reason = "fork(2) of a single-threaded process; both sides go on in safe code")]
fn fork() -> Result<Option<Pid>> {
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("cannot fork"),
        0 => Ok(None),
        pid => Ok(Pid::from_raw(pid)),
    }
}

fn wait(child: Pid) -> u8 {
    loop {
        match rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()) {
            Ok(Some((_, status))) => {
                return status
                    .exit_status()
                    .map_or(128 + u8::try_from(status.terminating_signal().unwrap_or(0)).unwrap_or(0), |code| {
                        u8::try_from(code).unwrap_or(1)
                    });
            }
            Err(rustix::io::Errno::INTR) | Ok(None) => {}
            Err(_) => return 1,
        }
    }
}

/// Sets the flag IFF_UP of `lo` (netdevice(7)).
#[expect(unsafe_code, reason = "the ioctl SIOCSIFFLAGS has no safe wrapper")]
fn loopback_up() -> Result<()> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None)?;
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::try_from(*from)?;
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING)?;
    use std::os::fd::AsRawFd as _;
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) } != 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

fn serve(channel: &Channel, calls: &Calls) -> Result<()> {
    loop {
        let (request, fds) = match channel.receive()? {
            Some(Frame::Json(payload, fds)) => (parse::<Request>(&payload)?, fds),
            Some(Frame::Output(_)) => continue,
            None => return Ok(()),
        };
        let answer = match request {
            Request::Call { name, args } => calls(&name, args, &|note| {
                let _ = channel.send(&Event::Note(note.into()), &[]);
            })
            .map(Event::Done),
            Request::Run(spec) => launch::run(&spec, channel, fds).map(Event::Exited),
            // Meant for a command that has ended meanwhile.
            Request::Signal(_) => continue,
            Request::Check { .. } => Ok(Event::Checked(false)),
            Request::Connect { .. } => Ok(Event::Refused("nothing runs".into())),
            Request::Sockets { count } => {
                beside::hand_over_sockets(channel, count)?;
                continue;
            }
            Request::Beside(asked) => Ok(Event::BesideEnded { id: asked.id, result: Err("the program does not run".into()) }),
            Request::SignalBeside { .. } => continue,
        };
        channel.send(&answer.unwrap_or_else(|error| Event::Failed(Failure::of(&error))), &[])?;
    }
}
