//! The channel on which the host outside runs commands in here: a virtio port named `io.pipeline.agent`.
//!
//! Frames in both directions: `u32` length of the rest, `u8` type, payload; all numbers little-endian,
//! a frame at most 1 MiB. Who holds the other end of the port owns the machine anyway.
//!
//! | from outside | payload |
//! |---|---|
//! | 1 exec | `u32` id, `u32` timeout in seconds (0: none), arguments joined by NUL |
//! | 3 ping | `u32` id |
//! | 4 kill | `u32` id |
//! | 5 write a file | `u32` id, `u32` mode, path, NUL, bytes |
//!
//! | to the outside | payload |
//! |---|---|
//! | 0x81 hello | `u32` id of the ping or 0, text `pipeline-agent 1 BOOT_ID` |
//! | 0x82 stdout, 0x83 stderr | `u32` id, bytes |
//! | 0x84 exit | `u32` id, `i32` status, `i32` signal (0: none), `u8` timed out |

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{copy, sys};

const PORT: &str = "io.pipeline.agent";
/// A longer frame is not from somebody who speaks this.
const MAX_FRAME: usize = 1 << 20;
/// Bytes of output in one frame.
const CHUNK: usize = 64 << 10;
/// How often an end that nobody holds is looked at.
const IDLE: Duration = Duration::from_millis(200);
/// How often a running command is looked at for its end.
const TICK: Duration = Duration::from_millis(20);
/// How long output is waited for after the end of a command that left a child with its pipes.
const DRAIN: Duration = Duration::from_secs(1);

const EXEC: u8 = 1;
const PING: u8 = 3;
const KILL: u8 = 4;
const WRITE: u8 = 5;
const HELLO: u8 = 0x81;
const STDOUT: u8 = 0x82;
const STDERR: u8 = 0x83;
const EXIT: u8 = 0x84;

/// What the threads share: the port to write to, and who runs.
#[derive(Clone)]
struct Shared {
    port: Arc<Mutex<File>>,
    running: Arc<Mutex<HashMap<u32, u32>>>,
}

impl Shared {
    fn send(&self, kind: u8, parts: &[&[u8]]) {
        let length = 1 + parts.iter().map(|part| part.len()).sum::<usize>();
        let mut frame = (length as u32).to_le_bytes().to_vec();
        frame.push(kind);
        parts.iter().for_each(|part| frame.extend_from_slice(part));
        let mut port = self.port.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // Blocks while nobody holds the other end, so that nothing is lost; other errors have no remedy here.
        let _ = port.write_all(&frame);
    }

    fn hello(&self, id: u32) {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        self.send(HELLO, &[&id.to_le_bytes(), format!("pipeline-agent 1 {}", boot_id.trim()).as_bytes()]);
    }

    fn exit(&self, id: u32, status: i32, signal: i32, timed_out: bool) {
        let ended = [&id.to_le_bytes()[..], &status.to_le_bytes(), &signal.to_le_bytes(), &[u8::from(timed_out)]];
        self.send(EXIT, &ended);
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<u32, u32>> {
        self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Serves the port for ever.
///
/// # Errors
/// When there is no such port, or it fails in a way that a new start may heal.
pub fn serve() -> Result<(), String> {
    let path = port().ok_or_else(|| format!("no virtio port is named {PORT}"))?;
    let say = |error: std::io::Error| format!("{} fails: {error}", path.display());
    let mut input = OpenOptions::new().read(true).write(true).open(&path).map_err(say)?;
    let port = Arc::new(Mutex::new(input.try_clone().map_err(say)?));
    let shared = Shared { port, running: Arc::default() };
    shared.hello(0);
    loop {
        let mut head = [0; 4];
        read_exact(&mut input, &mut head).map_err(say)?;
        let length = u32::from_le_bytes(head) as usize;
        if !(1..=MAX_FRAME).contains(&length) {
            // Out of step: what is queued is thrown away; the other side pings until it is answered.
            discard(&mut input).map_err(say)?;
            continue;
        }
        let mut frame = vec![0; length];
        read_exact(&mut input, &mut frame).map_err(say)?;
        handle(&shared, frame[0], &frame[1..]);
    }
}

fn port() -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let mut folders = entries.flatten().map(|entry| entry.path());
    let folder = folders.find(|folder| fs::read_to_string(folder.join("name")).is_ok_and(|name| name.trim() == PORT))?;
    Some(Path::new("/dev").join(folder.file_name()?))
}

/// Reads over the times when nobody holds the other end: then a read gives nothing.
fn read_exact(input: &mut File, mut buffer: &mut [u8]) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match input.read(buffer) {
            Ok(0) => std::thread::sleep(IDLE),
            Ok(count) => buffer = &mut buffer[count..],
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(sys::EPIPE) => std::thread::sleep(IDLE),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn discard(input: &mut File) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    while sys::wait_for(input.as_raw_fd(), sys::POLLIN, Some(Duration::from_millis(50)))? & sys::POLLIN != 0 {
        if input.read(&mut buffer)? == 0 {
            break;
        }
    }
    Ok(())
}

fn handle(shared: &Shared, kind: u8, payload: &[u8]) {
    let Some((id, rest)) = payload.split_first_chunk::<4>() else { return };
    let id = u32::from_le_bytes(*id);
    let numbered = rest.split_first_chunk::<4>().map(|(number, rest)| (u32::from_le_bytes(*number), rest));
    match (kind, numbered) {
        (PING, _) => shared.hello(id),
        (KILL, _) => {
            if let Some(leader) = shared.running().get(&id) {
                sys::kill_group(*leader, sys::SIGKILL);
            }
        }
        (EXEC, Some((seconds, arguments))) => {
            let (shared, arguments) = (shared.clone(), arguments.to_vec());
            std::thread::spawn(move || execute(&shared, id, seconds, &arguments));
        }
        (WRITE, Some((mode, rest))) => match write_file(mode, rest) {
            Ok(()) => shared.exit(id, 0, 0, false),
            Err(message) => {
                shared.send(STDERR, &[&id.to_le_bytes(), message.as_bytes()]);
                shared.exit(id, 1, 0, false);
            }
        },
        _ => {}
    }
}

fn write_file(mode: u32, rest: &[u8]) -> Result<(), String> {
    use std::os::unix::ffi::OsStrExt as _;
    let end = rest.iter().position(|byte| *byte == 0).ok_or("a path without an end\n")?;
    let path = Path::new(std::ffi::OsStr::from_bytes(&rest[..end]));
    let parent = path.parent().map_or(Ok(()), copy::folder);
    let written = parent.and_then(|()| copy::file(path, &rest[end + 1..], mode & 0o7777, (0, 0)));
    written.map_err(|error| format!("{}: {error}\n", path.display()))
}

/// Runs one command to its end and reports it; 127 when it cannot be started, as a shell says it.
fn execute(shared: &Shared, id: u32, seconds: u32, arguments: &[u8]) {
    use std::os::unix::ffi::OsStrExt as _;
    let words = arguments.split(|byte| *byte == 0).map(std::ffi::OsStr::from_bytes).collect::<Vec<_>>();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command.env("HOME", "/root").env("LANG", "C.UTF-8").env("USER", "root").env("LOGNAME", "root");
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let message = format!("{}: {error}\n", words[0].display());
            shared.send(STDERR, &[&id.to_le_bytes(), message.as_bytes()]);
            return shared.exit(id, 127, 0, false);
        }
    };
    shared.running().insert(id, child.id());
    let streams = [
        child.stdout.take().map(|pipe| stream(shared, id, STDOUT, pipe)),
        child.stderr.take().map(|pipe| stream(shared, id, STDERR, pipe)),
    ];
    let (status, timed_out) = wait(&mut child, (seconds > 0).then(|| Duration::from_secs(u64::from(seconds))));
    shared.running().remove(&id);
    // A daemon it started may hold the pipes for ever.
    let ended = Instant::now();
    for stream in streams.into_iter().flatten() {
        while !stream.is_finished() && ended.elapsed() < DRAIN {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    match status {
        Some(status) => shared.exit(id, status.code().unwrap_or(0), status.signal().unwrap_or(0), timed_out),
        None => shared.exit(id, 127, 0, timed_out),
    }
}

fn stream(shared: &Shared, id: u32, kind: u8, mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<()> {
    let shared = shared.clone();
    std::thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            shared.send(kind, &[&id.to_le_bytes(), &buffer[..count]]);
        }
    })
}

/// Waits for the end; when the time is over the whole process group is killed.
fn wait(child: &mut Child, timeout: Option<Duration>) -> (Option<std::process::ExitStatus>, bool) {
    let start = Instant::now();
    let mut timed_out = false;
    // Short commands end within milliseconds: the pause grows to the tick.
    let mut pause = Duration::from_millis(1);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return (Some(status), timed_out),
            Err(_) => return (None, timed_out),
            Ok(None) => {}
        }
        if !timed_out && timeout.is_some_and(|timeout| start.elapsed() >= timeout) {
            timed_out = true;
            sys::kill_group(child.id(), sys::SIGKILL);
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(TICK);
    }
}
