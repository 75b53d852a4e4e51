//! Runs other programs: the only user of `std::process`.
//!
//! Arguments are given one by one, standard input is null unless said otherwise, and a failure
//! names the command, its status and its own last words. Everything started here is *bound*:
//! it gets a death signal and ends with the thread that started it, so start it from one that
//! lives as long as the work. [`Cmd::kept`] is for the shim alone.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;

use crate::error::Problem;

/// Pauses between two looks at a program that has a limit.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];
/// How long the pipes of a program that ended may stay open: a child of its own holds them.
const PIPES_WAIT: Duration = Duration::from_millis(500);
/// Lines of a failed command's standard error kept in the message.
const STDERR_LINES: usize = 15;

/// A command to run, in the manner of [`std::process::Command`].
#[derive(Debug)]
pub struct Cmd {
    command: Command,
    program: String,
    arguments: Vec<String>,
    input: Option<Vec<u8>>,
}

impl Cmd {
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        #[expect(clippy::disallowed_methods, reason = "the one place that may")]
        let mut command = Command::new(program.as_ref());
        command.stdin(Stdio::null());
        die_with_parent(&mut command);
        Self { command, program: program.as_ref().to_string_lossy().into_owned(), arguments: Vec::new(), input: None }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.arguments.push(arg.as_ref().to_string_lossy().into_owned());
        self.command.arg(arg);
        self
    }

    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        for arg in args {
            self = self.arg(arg);
        }
        self
    }

    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    #[must_use]
    pub fn env_remove(mut self, key: impl AsRef<OsStr>) -> Self {
        self.command.env_remove(key);
        self
    }

    /// Starts from an empty environment; only what [`Cmd::env`] adds is seen.
    #[must_use]
    pub fn env_clear(mut self) -> Self {
        self.command.env_clear();
        self
    }

    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Bytes for standard input; small ones, they are written before the output is read.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self.command.stdin(Stdio::piped());
        self
    }

    #[must_use]
    pub fn stdin(mut self, stdin: Stdio) -> Self {
        self.command.stdin(stdin);
        self
    }

    #[must_use]
    pub fn stdout(mut self, stdout: Stdio) -> Self {
        self.command.stdout(stdout);
        self
    }

    #[must_use]
    pub fn stderr(mut self, stderr: Stdio) -> Self {
        self.command.stderr(stderr);
        self
    }

    /// Hands an open file to the program, under the number it has here.
    #[must_use]
    pub fn pass(mut self, file: OwnedFd) -> Self {
        pass_on(&mut self.command, file);
        self
    }

    /// *Kept* in place of bound (DESIGN section 7, contract 4): in a session of its own, and no death signal.
    #[must_use]
    pub fn kept(mut self) -> Self {
        keep(&mut self.command);
        self
    }

    /// A process group of its own, so that a terminal's ^C reaches only us.
    #[must_use]
    pub fn own_group(mut self) -> Self {
        self.command.process_group(0);
        self
    }

    /// The command line, for messages: words with spaces are quoted.
    pub fn line(&self) -> String {
        let words = std::iter::once(&self.program).chain(&self.arguments);
        words
            .map(|word| if word.contains([' ', '\n', '"']) { format!("{word:?}") } else { word.clone() })
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// The command itself, for what this type does not cover (file descriptors, `pre_exec`).
    pub fn into_command(self) -> Command {
        self.command
    }

    /// Starts the command; the caller waits for it.
    pub fn spawn(mut self) -> Result<Child> {
        let line = self.line();
        self.command.spawn().map_err(|error| not_started(&self.program, &line, error))
    }

    /// Runs to the end and returns status and output, whatever the status.
    pub fn output(mut self) -> Result<Output> {
        let line = self.line();
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().map_err(|error| not_started(&self.program, &line, error))?;
        if let (Some(bytes), Some(mut stdin)) = (self.input.take(), child.stdin.take()) {
            // A program that does not read its input is judged by its status, not by EPIPE.
            let _ = stdin.write_all(&bytes);
        }
        child.wait_with_output().with_context(|| format!("cannot wait for `{line}`"))
    }

    /// Runs to the end like [`Cmd::output`], but not longer than `limit`: then it is killed, and the answer is `None`.
    /// Nobody waits for a child of its own that outlives it and holds its output open.
    pub fn output_within(mut self, limit: Duration) -> Result<Option<Output>> {
        let line = self.line();
        let end = Instant::now() + limit;
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().map_err(|error| not_started(&self.program, &line, error))?;
        if let (Some(bytes), Some(mut stdin)) = (self.input.take(), child.stdin.take()) {
            // A program that does not read its input is judged by its status, not by EPIPE.
            let _ = stdin.write_all(&bytes);
        }
        let (stdout, stderr) = (child.stdout.take().map(drain), child.stderr.take().map(drain));
        let mut pause = PAUSES[0];
        let status = loop {
            if let Some(status) = child.try_wait().with_context(|| format!("cannot wait for `{line}`"))? {
                break status;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // It may have ended in between; reaped it is in any case.
                let _ = child.kill();
                child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
                return Ok(None);
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(PAUSES[1]);
        };
        let text = |pipe: Option<Receiver<Vec<u8>>>| pipe.and_then(|pipe| pipe.recv_timeout(PIPES_WAIT).ok()).unwrap_or_default();
        Ok(Some(Output { status, stdout: text(stdout), stderr: text(stderr) }))
    }

    /// Runs to the end; standard output as text. An unsuccessful status is an error with the
    /// command line, the status and the last lines of standard error.
    pub fn text(self) -> Result<String> {
        let line = self.line();
        let output = self.output()?;
        if !output.status.success() {
            return Err(failure(&line, output.status, &output.stderr).into());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs to the end and parses standard output as JSON.
    pub fn json<T: DeserializeOwned>(self) -> Result<T> {
        let line = self.line();
        let text = self.text()?;
        serde_json::from_str(&text).with_context(|| format!("`{line}` printed something else than the expected JSON"))
    }

    /// Runs to the end, output thrown away.
    pub fn run(self) -> Result<()> {
        self.text().map(drop)
    }
}

/// How a status reads in a message: `status 1` or `signal 9`.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        _ => "an unknown status".into(),
    }
}

/// The error for a command that ran and failed.
pub fn failure(line: &str, status: ExitStatus, stderr: &[u8]) -> Problem {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let tail = lines[lines.len().saturating_sub(STDERR_LINES)..].join("\n  ");
    let message = format!("`{line}` ended with {}", describe(status));
    Problem::failed(if tail.is_empty() { message } else { format!("{message}:\n  {tail}") })
}

/// Reads a pipe to its end in a thread of its own.
fn drain(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if pipe.read_to_end(&mut bytes).is_ok() {
            // Nobody listens any more when the time is over.
            let _ = sender.send(bytes);
        }
    });
    receiver
}

/// Where `program` is found on `path` (the value of `PATH`).
pub fn find(program: &str, path: &OsStr) -> Option<std::path::PathBuf> {
    std::env::split_paths(path)
        .chain(["/usr/sbin", "/sbin"].iter().map(std::path::PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|candidate| rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok() && candidate.is_file())
}

/// An own copy of an argument list, for messages.
pub fn owned(args: &[&str]) -> Vec<OsString> {
    args.iter().map(OsString::from).collect()
}

fn not_started(program: &str, line: &str, error: std::io::Error) -> anyhow::Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Problem::failed(format!("`{program}` is not installed"))
            .hint("`pipeline doctor` shows what is missing and how to get it")
            .into();
    }
    anyhow::Error::new(error).context(format!("cannot start `{line}`"))
}

#[expect(unsafe_code, reason = "pre_exec: prctl and getppid are async-signal-safe")]
fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        });
    }
}

#[expect(unsafe_code, reason = "pre_exec: prctl and setsid are async-signal-safe")]
fn keep(command: &mut Command) {
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(None)?;
            rustix::process::setsid()?;
            Ok(())
        });
    }
}

#[expect(unsafe_code, reason = "pre_exec: fcntl is async-signal-safe")]
fn pass_on(command: &mut Command, file: OwnedFd) {
    unsafe {
        command.pre_exec(move || Ok(rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())?));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_command_status_and_words() {
        let error = Cmd::new("sh").args(["-c", "echo no such thing >&2; exit 3"]).run().unwrap_err();
        assert_eq!(error.to_string(), "`sh -c \"echo no such thing >&2; exit 3\"` ended with status 3:\n  no such thing");
    }

    #[test]
    fn a_limit_ends_what_does_not_end() {
        let limit = Duration::from_secs(60);
        let output = Cmd::new("cat").input("in").output_within(limit).unwrap().unwrap();
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), b"in".as_slice()));
        let output = Cmd::new("sh").args(["-c", "echo no >&2; exit 3"]).output_within(limit).unwrap().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(3), b"no\n".as_slice()));
        // Its child holds the pipe for longer than anybody waits.
        let output = Cmd::new("sh").args(["-c", "sleep 5 &"]).output_within(limit).unwrap().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(Cmd::new("sleep").arg("300").output_within(Duration::from_millis(50)).unwrap().is_none());
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = Cmd::new("no-such-program").run().unwrap_err();
        assert_eq!(error.to_string(), "`no-such-program` is not installed");
    }
}
