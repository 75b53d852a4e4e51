//! Runs programs for a user: to the end ([`Answer`]) or for a while ([`Running`]).

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pipeline::cmd::Cmd;
use serde_json::Value;

use super::{PASSED, User};

/// A command to be run for a user in the tests' environment.
#[derive(Debug, Clone)]
pub struct Run {
    user: User,
    argv: Vec<OsString>,
    wrap: Vec<OsString>,
    env: BTreeMap<OsString, OsString>,
    dir: PathBuf,
    input: Option<Vec<u8>>,
}

impl Run {
    /// `program` with the given home and folder.
    pub fn new(user: User, program: impl AsRef<OsStr>, home: &Path, dir: &Path) -> Self {
        let mut env: BTreeMap<OsString, OsString> =
            PASSED.iter().filter_map(|name| Some(((*name).into(), std::env::var_os(name)?))).collect();
        env.insert("PATH".into(), std::env::var_os("PATH").unwrap_or_default());
        env.insert("HOME".into(), home.into());
        Self { user, argv: vec![program.as_ref().into()], wrap: Vec::new(), env, dir: dir.into(), input: None }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.argv.push(arg.as_ref().into());
        self
    }

    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: &[S]) -> Self {
        self.argv.extend(args.iter().map(|arg| arg.as_ref().into()));
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.insert(name.into(), value.as_ref().into());
        self
    }

    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = dir.as_ref().into();
        self
    }

    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Words before the command, like `taskset -c 0`; they run as the user too.
    #[must_use]
    pub fn wrap(mut self, words: &[&str]) -> Self {
        self.wrap.extend(words.iter().map(OsString::from));
        self
    }

    fn command(&self) -> Cmd {
        let words: Vec<OsString> =
            self.user.prefix().into_iter().chain(self.wrap.iter().cloned()).chain(self.argv.iter().cloned()).collect();
        let mut command = Cmd::new(&words[0]).args(&words[1..]).env_clear().dir(&self.dir);
        for (name, value) in &self.env {
            command = command.env(name, value);
        }
        command
    }

    fn line(&self) -> String {
        self.argv.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    /// Runs to the end.
    pub fn run(self) -> Answer {
        let mut running = self.start();
        running.wait(Duration::from_secs(600))
    }

    /// Runs to the end and fails the test unless the exit code is 0.
    pub fn ok(self) -> Answer {
        let answer = self.run();
        answer.code(0);
        answer
    }

    /// Starts it; what is returned ends it when it is dropped.
    pub fn start(self) -> Running {
        let line = self.line();
        let stdin = if self.input.is_some() { Stdio::piped() } else { Stdio::null() };
        let mut child = self.command().stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        if let (Some(bytes), Some(mut stdin)) = (self.input, child.stdin.take()) {
            std::thread::spawn(move || stdin.write_all(&bytes));
        }
        let (stdout, stderr) = (Stream::follow(child.stdout.take().unwrap()), Stream::follow(child.stderr.take().unwrap()));
        Running { line, child, status: None, stdout, stderr }
    }
}

/// What a program has printed so far.
#[derive(Debug, Clone)]
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    ended: Arc<std::sync::atomic::AtomicBool>,
}

impl Stream {
    fn follow(mut pipe: impl std::io::Read + Send + 'static) -> Self {
        let stream = Self { bytes: Arc::default(), ended: Arc::default() };
        let (bytes, ended) = (stream.bytes.clone(), stream.ended.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 8192];
            while let Ok(read) = pipe.read(&mut buffer) {
                if read == 0 {
                    break;
                }
                bytes.lock().unwrap().extend_from_slice(&buffer[..read]);
            }
            ended.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        stream
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    fn wait_for_end(&self) {
        let patience = Instant::now() + Duration::from_secs(5);
        while !self.ended.load(std::sync::atomic::Ordering::SeqCst) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A program that runs.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    status: Option<ExitStatus>,
    stdout: Stream,
    stderr: Stream,
}

impl Running {
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until `text` is in what was printed to either stream.
    pub fn wait_for(&mut self, text: &str) {
        let patience = Instant::now() + Duration::from_secs(120);
        while !self.stderr().contains(text) && !self.stdout().contains(text) {
            let over = self.child.try_wait().unwrap();
            if over.is_some() {
                self.stdout.wait_for_end();
                self.stderr.wait_for_end();
                if self.stderr().contains(text) || self.stdout().contains(text) {
                    return;
                }
            }
            assert!(
                over.is_none() && Instant::now() < patience,
                "`{}` never said `{text}` ({over:?}):\n{}{}",
                self.line,
                self.stdout(),
                self.stderr()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The port of `listening on http://127.0.0.1:PORT`.
    pub fn port(&mut self) -> u16 {
        let before = "listening on http://127.0.0.1:";
        self.wait_for(before);
        let text = self.stderr();
        let digits: String = text.split(before).nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }

    pub fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end; one that takes longer than `patience` is killed, and the test fails.
    pub fn wait(&mut self, patience: Duration) -> Answer {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() > patience {
                let _ = self.child.kill();
                panic!("`{}` did not end within {patience:?}:\n{}{}", self.line, self.stdout(), self.stderr());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.status = Some(status);
        self.stdout.wait_for_end();
        self.stderr.wait_for_end();
        Answer {
            line: self.line.clone(),
            status,
            bytes: self.stdout.bytes(),
            stdout: self.stdout(),
            stderr: self.stderr(),
            took: started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Answer {
    line: String,
    pub status: ExitStatus,
    /// Standard output.
    pub bytes: Vec<u8>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Answer {
    /// Fails the test unless the exit code is `code` (128 and the signal for one that was killed).
    #[track_caller]
    pub fn code(&self, code: i32) -> &Self {
        let found = self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0));
        assert_eq!(found, code, "exit code of `{}`\n--- stdout\n{}--- stderr\n{}", self.line, self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub fn says(&self, text: &str) -> &Self {
        assert!(
            self.stderr.contains(text),
            "`{}` does not say `{text}`\n--- stdout\n{}--- stderr\n{}",
            self.line,
            self.stdout,
            self.stderr
        );
        self
    }

    #[track_caller]
    pub fn says_not(&self, text: &str) -> &Self {
        assert!(!self.stderr.contains(text), "`{}` says `{text}`\n--- stderr\n{}", self.line, self.stderr);
        self
    }

    #[track_caller]
    pub fn prints(&self, text: &str) -> &Self {
        assert!(
            self.stdout.contains(text),
            "`{}` does not print `{text}`\n--- stdout\n{}--- stderr\n{}",
            self.line,
            self.stdout,
            self.stderr
        );
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("`{}` prints no JSON: {error}\n{}{}", self.line, self.stdout, self.stderr))
    }
}
