//! The callers' side of a shim: start one, find them, ask them, clean up after one that was killed.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::supervisor::{Handed, Taken};
use super::{FORMAT, Instance, Owned, Request, Response, Seen, State, VERB, log};
use crate::artifact::tree::boot_id;
use crate::cmd::Cmd;
use crate::error::Problem;
use crate::rollout::target::{Running, Secret};
use crate::sandbox::protocol::{Channel, Frame, parse};
use crate::sandbox::{self, Exit, Session};

/// The socket in an instance's folder.
pub const SOCKET: &str = "sock";
/// How long it may take to say how it is; what it wrote last is as good.
const LISTED: Duration = Duration::from_secs(1);
/// How long it may take beyond the grace to kill the program and remove what it made.
const REMOVE: Duration = Duration::from_secs(30);
/// How long it may take to be gone after that.
const GONE: Duration = Duration::from_secs(5);
/// Pauses, in milliseconds, after which a terminal's size is told again.
const SIZES: [u64; 6] = [100, 200, 400, 800, 1600, 3200];
/// Shells' convention: 128 and the signal.
const SIGNALLED: i32 = 128;
/// What outlives an instance.
const KEPT: [&str; 3] = ["log", "log.1", "lock"];
/// What says that there is one.
const RECORD: &str = "instance.json";

/// Starts the shim of `dir` and with it the instance; answers whether there was none before. One that is there, and
/// whose shim lives, is left as it is. `program` is this program.
///
/// # Errors
/// What the shim says; nothing of the instance is left then.
pub fn start(program: &Path, dir: &Path, instance: &Instance, owned: &Owned, secrets: &BTreeMap<String, Secret>) -> Result<bool> {
    if is_held(dir)? {
        return Ok(false);
    }
    let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
    let mut relay = Cmd::new(program)
        .arg(VERB)
        .arg(dir)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let channel = Channel(ours);
    let secrets = secrets.iter().map(|(name, secret)| (name.clone(), secret.bytes().to_vec())).collect();
    let handed = Handed { instance: instance.clone(), owned: owned.clone(), secrets };
    let answer = channel.send(&handed, &[]).and_then(|()| channel.receive());
    relay.wait().context("cannot wait for the shim's start")?;
    let gone = || Problem::failed(format!("the shim of `{}` ended before the instance was there", instance.id));
    match answer.with_context(gone)? {
        Some(Frame::Json(payload, _)) => match parse(&payload)? {
            Taken::Started => Ok(true),
            Taken::There => Ok(false),
            Taken::Failed(failure) => Err(failure.into_error().context(format!("cannot start `{}`", instance.id))),
        },
        _ => Err(gone().into()),
    }
}

/// The instances below `instances` that are of one of `kinds`, by id.
///
/// # Errors
/// A folder that cannot be read; an instance of a newer format. One without `instance.json` is no more.
pub fn list(instances: &Path, kind: &str) -> Result<Vec<Seen>> {
    let mut found = Vec::new();
    let entries = match fs_err::read_dir(instances) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    for entry in entries {
        let dir = entry?.path();
        let instance: Instance = match fs_err::read(dir.join(RECORD)) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).with_context(|| format!("`{}` has a broken instance.json", dir.display()))?
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => continue,
            Err(error) => return Err(error.into()),
        };
        if instance.format > FORMAT {
            return Err(Problem::failed(format!("the instance in `{}` is of a newer pipeline", dir.display()))
                .hint("start that version, and let it stop the instance")
                .into());
        }
        if instance.kind == kind {
            found.push((instance, dir));
        }
    }
    found.sort_by(|(a, _), (b, _)| a.id.cmp(&b.id));
    // All at once: one that starts or ends just now keeps nobody waiting for the others.
    std::thread::scope(|scope| {
        let asked: Vec<_> = found.iter().map(|(_, dir)| scope.spawn(|| state(dir))).collect();
        let states = asked.into_iter().map(|asked| asked.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let states: Vec<(State, bool)> = states.collect::<Result<_>>()?;
        let both = found.iter().zip(states);
        Ok(both
            .map(|((instance, dir), (state, alive))| Seen { instance: instance.clone(), dir: dir.clone(), state, alive })
            .collect())
    })
}

/// How the instance in `dir` is, and whether its shim lives.
fn state(dir: &Path) -> Result<(State, bool)> {
    let last: Option<State> = fs_err::read(dir.join("status.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let last = last.unwrap_or(State { status: Running::Starting, restarts: 0, memory: None, last: None, notes: Vec::new() });
    if is_held(dir)? {
        return Ok(match ask(dir, &Request::Status, LISTED) {
            Ok((Response::State(state), _)) => (state, true),
            // Too busy to answer, or it ends just now.
            _ => (last, true),
        });
    }
    let boot = fs_err::read_to_string(dir.join("pid")).ok().and_then(|text| text.lines().nth(1).map(str::to_string));
    let status = match boot {
        Some(boot) if boot != boot_id()? => "gone with the last boot",
        _ => "its shim was killed",
    };
    Ok((State { status: Running::Ended { status: status.into() }, memory: None, ..last }, false))
}

/// Asks the shim of `dir` and waits at most `patience` for its answer and the descriptors with it.
///
/// # Errors
/// Nobody answers: the instance has ended.
pub fn ask(dir: &Path, request: &Request, patience: Duration) -> Result<(Response, Vec<OwnedFd>)> {
    let channel = connect_shim(dir)?;
    channel.0.set_read_timeout(Some(patience))?;
    ask_on(&channel, request)
}

/// [`ask`], on a connection one has.
pub(crate) fn ask_on(channel: &Channel, request: &Request) -> Result<(Response, Vec<OwnedFd>)> {
    channel.send(request, &[])?;
    answer(channel)
}

/// A connection to the shim of `dir`.
pub(crate) fn channel(dir: &Path) -> std::io::Result<Channel> {
    use OFlags as O;
    let folder = rustix::fs::open(dir, O::PATH | O::DIRECTORY | O::CLOEXEC, Mode::empty())?;
    UnixStream::connect(through(&folder, SOCKET)).map(Channel)
}

fn answer(channel: &Channel) -> Result<(Response, Vec<OwnedFd>)> {
    use std::io::ErrorKind::{TimedOut, WouldBlock};
    let late = |error: &anyhow::Error| {
        let errno = error.downcast_ref::<rustix::io::Errno>().map(|errno| std::io::Error::from(*errno).kind());
        let kind = errno.or(error.downcast_ref::<std::io::Error>().map(std::io::Error::kind));
        matches!(kind, Some(TimedOut | WouldBlock))
    };
    let received = channel.receive();
    if received.as_ref().is_err_and(late) {
        return Err(Problem::transient("the shim of the instance does not answer in time").into());
    }
    match received? {
        Some(Frame::Json(payload, fds)) => Ok((parse(&payload)?, fds)),
        _ => Err(Problem::transient("the instance ended meanwhile").into()),
    }
}

fn connect_shim(dir: &Path) -> Result<Channel> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    channel(dir).with_context(|| Problem::failed(format!("the instance `{name}` does not run")))
}

/// Ends the instance in `dir` and removes everything but its log; one that is not there is no error.
pub fn stop(program: &Path, dir: &Path, grace: Duration) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    if let Ok(channel) = connect_shim(dir) {
        channel.0.set_read_timeout(Some(grace + REMOVE))?;
        // Whatever happens to the shim meanwhile shows below.
        let _ = channel.send(&Request::Stop { grace }, &[]).and_then(|()| answer(&channel));
    }
    let patience = Instant::now() + GONE;
    loop {
        if let Some(_lock) = hold(dir, false)? {
            return clean(program, dir);
        }
        if !dir.exists() {
            return Ok(());
        }
        if Instant::now() >= patience {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    // It does not listen to reason. What it owns is bound to it.
    kill(dir)?;
    let patience = Instant::now() + GONE;
    while Instant::now() < patience {
        if let Some(_lock) = hold(dir, false)? {
            return clean(program, dir);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(Problem::transient(format!("the shim of `{}` cannot be ended", dir.display())).into())
}

/// Kills the shim of `dir`, if the process is still the one that was noted.
fn kill(dir: &Path) -> Result<()> {
    let text = fs_err::read_to_string(dir.join("pid")).unwrap_or_default();
    let Some(noted) = text.lines().next() else { return Ok(()) };
    let Some(pid) = noted.split(' ').next().and_then(|pid| pid.parse::<i32>().ok()).and_then(rustix::process::Pid::from_raw)
    else {
        return Ok(());
    };
    let Ok(pidfd) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else { return Ok(()) };
    if process(pid.as_raw_pid().unsigned_abs())? == noted {
        let _ = rustix::process::pidfd_send_signal(&pidfd, rustix::process::Signal::KILL);
    }
    Ok(())
}

/// Removes the log of an instance that was stopped.
pub fn forget(dir: &Path) -> Result<()> {
    let Some(_lock) = hold(dir, false)? else {
        return if dir.exists() { Err(Problem::failed(format!("`{}` still runs", dir.display())).into()) } else { Ok(()) };
    };
    match fs_err::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// The log of the instance in `dir`: see [`log::read`].
pub fn logs(dir: &Path, lines: usize, follow: bool, sink: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
    if !dir.exists() {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        return Err(Problem::failed(format!("there is no instance `{name}`")).into());
    }
    log::read(dir, lines, follow, &|| is_held(dir).unwrap_or(false), sink)
}

/// Runs a command in the instance of `dir` with this process's standard streams; its exit status.
pub fn exec(dir: &Path, argv: &[String], interactive: bool) -> Result<i32> {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let null = fs_err::File::open("/dev/null")?;
    let terminal = interactive && stdin.is_terminal() && stdout.is_terminal();
    let input = if interactive { stdin.as_fd() } else { null.as_fd() };
    let channel = connect_shim(dir)?;
    let request = Request::Exec { argv: argv.to_vec(), terminal };
    let kept = Terminal::keep(terminal, stdin.as_fd());
    channel.send(&request, &[input, stdout.as_fd(), stderr.as_fd()])?;
    let passing = pass_signals(&channel, terminal)?;
    let result = answer(&channel);
    drop(passing);
    drop(kept);
    match result?.0 {
        Response::Exited(Exit::Code(code)) => Ok(code),
        Response::Exited(Exit::Signal(signal)) => Ok(SIGNALLED + signal),
        Response::Exited(Exit::TimedOut) => Ok(SIGNALLED + libc::SIGKILL),
        Response::Failed(why) => Err(Problem::failed(why).into()),
        other => anyhow::bail!("unexpected answer: {other:?}"),
    }
}

/// The terminal's settings, put back on drop: runc makes it raw for the command's own.
struct Terminal<'a>(Option<(BorrowedFd<'a>, rustix::termios::Termios)>);

impl<'a> Terminal<'a> {
    fn keep(terminal: bool, fd: BorrowedFd<'a>) -> Self {
        Self(rustix::termios::tcgetattr(fd).ok().filter(|_| terminal).map(|settings| (fd, settings)))
    }
}

impl Drop for Terminal<'_> {
    fn drop(&mut self) {
        if let Some((fd, settings)) = &self.0 {
            let _ = rustix::termios::tcsetattr(fd, rustix::termios::OptionalActions::Now, settings);
        }
    }
}

/// Passes this process's signals on to the command until it is dropped.
struct Passing(signal_hook::iterator::Handle);

impl Drop for Passing {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn pass_signals(channel: &Channel, terminal: bool) -> Result<Passing> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGWINCH};
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGWINCH]).context("cannot watch for signals")?;
    let handle = signals.handle();
    let channel = Arc::new(Mutex::new(Channel(channel.0.try_clone()?)));
    let tell = |channel: &Mutex<Channel>, signal| {
        let channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel.send(&Request::Signal { signal }, &[]).is_ok()
    };
    if terminal {
        // The size it has from the start. Nobody tells when runc begins to listen; a size that is the same changes nothing.
        let channel = channel.clone();
        std::thread::spawn(move || {
            for pause in SIZES {
                std::thread::sleep(Duration::from_millis(pause));
                if !tell(&channel, SIGWINCH) {
                    return;
                }
            }
        });
    }
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if (terminal || signal != SIGWINCH) && !tell(&channel, signal) {
                return;
            }
        }
    });
    Ok(Passing(handle))
}

/// The lock of an instance's folder, unless its shim has it; `make` makes the folder.
pub(super) fn hold(dir: &Path, make: bool) -> Result<Option<OwnedFd>> {
    loop {
        if make {
            if let Some(parent) = dir.parent() {
                fs_err::create_dir_all(parent)?;
            }
            match std::fs::DirBuilder::new().mode(0o700).create(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| format!("cannot make `{}`", dir.display()));
                }
                _ => {}
            }
        }
        let path = dir.join("lock");
        let file = match rustix::fs::open(&path, OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC, Mode::from_raw_mode(0o600)) {
            Ok(file) => file,
            Err(rustix::io::Errno::NOENT) if make => continue,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot open `{}`", path.display())),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot lock `{}`", path.display())),
        }
        // The folder may have been removed between the two, and made anew by somebody else.
        let own = rustix::fs::fstat(&file).context("cannot look at the lock")?;
        if path.symlink_metadata().is_ok_and(|there| (there.dev(), there.ino()) == (own.st_dev, own.st_ino)) {
            return Ok(Some(file));
        }
    }
}

/// Whether a shim lives in `dir`. Looked at with a shared lock, so that two who look do not take each other for one.
fn is_held(dir: &Path) -> Result<bool> {
    let path = dir.join("lock");
    let file = match rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(false),
        Err(error) => return Err(error).with_context(|| format!("cannot open `{}`", path.display())),
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(error) => Err(error).with_context(|| format!("cannot lock `{}`", path.display())),
    }
}

/// Removes what a shim that was killed left, all but the log; the caller holds the lock.
pub(super) fn clean(program: &Path, dir: &Path) -> Result<()> {
    let work = dir.join("work");
    if work.symlink_metadata().is_ok() {
        // Owners of mapped ids, and overlayfs's folders of mode 000: only root of the namespace may.
        let options = sandbox::Options { program: program.into(), own_network: false, interactive: false, fault: None };
        Session::start(&options)?.call::<_, ()>("remove", &work)?;
    }
    sandbox::limits::sweep();
    remove_files(dir)
}

/// Removes the files of an instance, all but the log; what says that there is one goes last.
pub(super) fn remove_files(dir: &Path) -> Result<()> {
    for entry in fs_err::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if entry.file_type()?.is_dir() || name == RECORD || KEPT.iter().any(|kept| name == *kept) {
            continue;
        }
        fs_err::remove_file(entry.path())?;
    }
    match fs_err::remove_file(dir.join(RECORD)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// Removes a folder in which there is no log; the caller holds the lock.
pub(super) fn remove_empty(dir: &Path) {
    let has_log = ["log", "log.1"].iter().any(|name| dir.join(name).exists());
    if !has_log {
        let _ = fs_err::remove_dir_all(dir);
    }
}

/// A folder's descriptor, for [`through`].
pub(super) fn open_folder(dir: &Path) -> Result<OwnedFd> {
    rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open `{}`", dir.display()))
}

/// A short path to `name` in an open folder.
pub(super) fn through(folder: &OwnedFd, name: &str) -> PathBuf {
    format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()).into()
}

/// This process as `pid` notes it.
pub(super) fn myself() -> Result<String> {
    process(rustix::process::getpid().as_raw_pid().unsigned_abs())
}

/// A process and when it started (field 22 of proc(5), /proc/PID/stat), which nobody else has in one boot.
fn process(pid: u32) -> Result<String> {
    let stat = fs_err::read_to_string(format!("/proc/{pid}/stat"))?;
    let start = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19)).context("no start time")?;
    Ok(format!("{pid} {start}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_by_one_and_found_by_all() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("instances/shop-dev-1");
        assert!(!is_held(&dir).unwrap());
        assert!(hold(&dir, false).unwrap().is_none());
        let lock = hold(&dir, true).unwrap().unwrap();
        assert!(is_held(&dir).unwrap());
        assert!(hold(&dir, true).unwrap().is_none());
        drop(lock);
        assert!(!is_held(&dir).unwrap());
        assert!(hold(&dir, true).unwrap().is_some());
    }

    #[test]
    fn what_has_no_shim_has_ended() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("shop-dev-1");
        drop(hold(&dir, true).unwrap());
        let instance = Instance {
            format: FORMAT,
            kind: "local".into(),
            id: "shop-dev-1".into(),
            environment: "shop/dev".into(),
            generation: "1".into(),
            target: "main".into(),
            number: 0,
            data: serde_json::Value::Null,
        };
        fs_err::write(dir.join("instance.json"), serde_json::to_vec(&instance).unwrap()).unwrap();
        let ended = |boot: &str| {
            fs_err::write(dir.join("pid"), format!("1 1\n{boot}\n")).unwrap();
            let seen = list(temp.path(), "local").unwrap();
            (seen.len(), seen[0].alive, seen[0].state.status.clone())
        };
        let status = |status: &str| Running::Ended { status: status.into() };
        assert_eq!(ended("another"), (1, false, status("gone with the last boot")));
        assert_eq!(ended(&boot_id().unwrap()), (1, false, status("its shim was killed")));
        assert!(list(temp.path(), "vm").unwrap().is_empty());
        fs_err::write(dir.join("instance.json"), serde_json::to_vec(&Instance { format: 2, ..instance }).unwrap()).unwrap();
        assert!(list(temp.path(), "local").unwrap_err().to_string().contains("newer"));
    }
}
