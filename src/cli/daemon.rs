//! What `pipeline serve` answers on its unix socket, for the verbs: a client of the API, HTTP/1.1 with JSON.
//!
//! One connection per question (`connection: close`), blocking, with limits on time and size. The values are those of
//! [`crate::rollout::view`].

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Global;
use crate::build::host::Host;
use crate::error::{Kind, Problem};
use crate::rollout::view::{Do, Maintenance, Order, Overview, Poked, Refusal, View};
use crate::vm::http;

/// How long an answer may take. A poke waits for a whole look at the ledger and what runs.
const ANSWER: Duration = Duration::from_secs(30);
/// Largest line of a stream: a view has a few kilobytes per instance.
const LINE_MAX: usize = 4 << 20;

/// The socket of the daemon that serves what is kept where `global` says: below `--root`, `/run/pipeline` of root and
/// the service, or in the user's `XDG_RUNTIME_DIR`.
///
/// # Errors
/// Nothing says where the user's is.
pub fn socket(global: &Global, host: &Host) -> Result<PathBuf> {
    if let Some(root) = &global.root {
        return Ok(std::path::absolute(root)?.join("run/sock"));
    }
    if super::ui::is_system(host) {
        return Ok("/run/pipeline/sock".into());
    }
    match host.variables.get("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => Ok(Path::new(dir).join("pipeline/sock")),
        None => Err(Problem::usage("neither `--root` nor `XDG_RUNTIME_DIR` says where the socket of the daemon is")
            .hint("a login session has XDG_RUNTIME_DIR; else use `--root`")
            .into()),
    }
}

/// A daemon, or where one would be.
#[derive(Debug)]
pub struct Daemon {
    socket: PathBuf,
}

/// Nobody listens on the socket.
struct Away;

impl Daemon {
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// The daemon of what `global` names.
    pub fn of(global: &Global, host: &Host) -> Result<Self> {
        Ok(Self::new(socket(global, host)?))
    }

    /// Everything it serves; `None`: no daemon runs.
    pub fn overview(&self) -> Result<Option<Overview>> {
        match self.connect()? {
            Ok(stream) => Ok(Some(json(&self.ask(stream, "GET", "/v1/status", Vec::new())?)?)),
            Err(Away) => Ok(None),
        }
    }

    /// The environment `name` (`shop/prod`); `None`: no daemon runs, or it does not serve this one.
    pub fn view(&self, name: &str) -> Result<Option<View>> {
        let Ok(stream) = self.connect()? else { return Ok(None) };
        let answer = self.ask(stream, "GET", &path(name, ""), Vec::new())?;
        if answer.status == 404 {
            return Ok(None);
        }
        json(&answer).map(Some)
    }

    /// The environment `name`.
    ///
    /// # Errors
    /// No daemon runs, or it does not serve this one.
    pub fn served(&self, name: &str) -> Result<View> {
        let answer = self.must("GET", &path(name, ""), Vec::new())?;
        if answer.status == 404 {
            return Err(self.unserved(name).into());
        }
        json(&answer)
    }

    /// Lets it look at the ledger now; it has looked when this returns.
    pub fn poke(&self) -> Result<Poked> {
        json(&self.must("POST", "/v1/poke", Vec::new())?)
    }

    /// Pauses, resumes or aborts the rollout of `name`.
    pub fn order(&self, name: &str, what: Do, reason: &str, by: &str) -> Result<View> {
        self.change(name, "/rollout", &Order { what, reason: reason.into(), by: by.into() })
    }

    /// Begins and ends maintenance of `name`.
    pub fn maintain(&self, name: &str, on: bool, message: &str) -> Result<View> {
        self.change(name, "/maintenance", &Maintenance { on, message: message.into() })
    }

    fn change<T: Serialize>(&self, name: &str, verb: &str, body: &T) -> Result<View> {
        let answer = self.must("POST", &path(name, verb), serde_json::to_vec(body)?)?;
        if answer.status == 404 {
            return Err(self.unserved(name).into());
        }
        refused(&answer)?;
        self.served(name)
    }

    /// Opens the stream of `name`'s views.
    ///
    /// # Errors
    /// No daemon runs, or it does not serve this one.
    pub fn watch(&self, name: &str) -> Result<Views> {
        let Ok(mut stream) = self.connect()? else { return Err(self.away().into()) };
        stream.write_all(&message("GET", &path(name, "/watch"), Vec::new())).context("the daemon does not take the request")?;
        let mut views = Views { stream, raw: Vec::new(), lines: Vec::new(), chunked: false, left: 0, over: false };
        let end = Instant::now() + ANSWER;
        let head = loop {
            if let Some(at) = views.raw.windows(4).position(|window| window == b"\r\n\r\n") {
                let rest = views.raw.split_off(at + 4);
                break std::mem::replace(&mut views.raw, rest);
            }
            if views.over || Instant::now() > end || views.raw.len() > 64 << 10 {
                bail!("the daemon at {} does not answer as it should", self.socket.display());
            }
            views.fill(Duration::from_millis(500))?;
        };
        let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
        let status: u16 = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        views.chunked = head.contains("\r\ntransfer-encoding: chunked");
        match status {
            200 => Ok(views),
            404 => Err(self.unserved(name).into()),
            status => bail!("the daemon answered with status {status}"),
        }
    }

    /// The problem that no daemon runs.
    pub fn away(&self) -> Problem {
        Problem::transient(format!("no daemon answers at {}", self.socket.display()))
            .hint("`pipeline serve` starts one; `systemctl start pipeline` where it is installed as a service")
    }

    fn unserved(&self, name: &str) -> Problem {
        Problem::failed(format!("the daemon at {} does not serve `{name}`", self.socket.display()))
            .hint("it serves environments that the ledger has with a `target`; `pipeline environment list` shows them")
    }

    fn must(&self, method: &str, path: &str, body: Vec<u8>) -> Result<http::Answer> {
        match self.connect()? {
            Ok(stream) => self.ask(stream, method, path, body),
            Err(Away) => Err(self.away().into()),
        }
    }

    fn ask(&self, mut stream: UnixStream, method: &str, path: &str, body: Vec<u8>) -> Result<http::Answer> {
        let answer = || -> Result<http::Answer> {
            stream.set_write_timeout(Some(ANSWER))?;
            stream.write_all(&message(method, path, body)).context("the request is not taken")?;
            let wait = |stream: &UnixStream, left| stream.set_read_timeout(Some(left));
            http::answer(&mut stream, wait, Instant::now() + ANSWER, method == "HEAD")
        };
        answer().with_context(|| format!("the daemon at {} does not answer", self.socket.display()))
    }

    fn connect(&self) -> Result<Result<UnixStream, Away>> {
        use std::io::ErrorKind;
        match UnixStream::connect(&self.socket) {
            Ok(stream) => Ok(Ok(stream)),
            Err(error)
                if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused | ErrorKind::NotADirectory) =>
            {
                Ok(Err(Away))
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                Err(Problem::failed(format!("the socket of the daemon, {}, is not for this user", self.socket.display()))
                    .hint("it is for root and the user that runs the daemon: `sudo -u pipeline pipeline …`, or as root")
                    .into())
            }
            Err(error) => Err(error).with_context(|| format!("cannot reach the daemon at {}", self.socket.display())),
        }
    }
}

fn path(name: &str, verb: &str) -> String {
    format!("/v1/environments/{name}{verb}")
}

fn message(method: &str, path: &str, body: Vec<u8>) -> Vec<u8> {
    let json = ("content-type".to_owned(), "application/json".to_owned());
    let headers = if body.is_empty() { Vec::new() } else { vec![json] };
    http::message(&http::Request { method: method.into(), path: path.into(), headers, body }, "pipeline")
}

fn json<T: DeserializeOwned>(answer: &http::Answer) -> Result<T> {
    refused(answer)?;
    serde_json::from_slice(&answer.body).map_err(|error| {
        Problem::failed("the daemon answers something that this program does not understand")
            .hint(format!("they may be of different versions (`pipeline serve --replace` starts this one): {error}"))
            .into()
    })
}

/// An answer that is no success, as the problem it tells.
fn refused(answer: &http::Answer) -> Result<()> {
    if (200..300).contains(&answer.status) {
        return Ok(());
    }
    let kind = match answer.status {
        503 => Kind::Transient,
        400 | 422 => Kind::Usage,
        _ => Kind::Failed,
    };
    let problem = match serde_json::from_slice::<Refusal>(&answer.body) {
        Ok(refusal) => refusal.hints.into_iter().fold(Problem::new(kind, refusal.error), Problem::hint),
        Err(_) => Problem::new(kind, format!("the daemon answered with status {}", answer.status)),
    };
    Err(problem.into())
}

/// A stream of views: one at once, one for every change, and one every few seconds.
#[derive(Debug)]
pub struct Views {
    stream: UnixStream,
    /// As it came.
    raw: Vec<u8>,
    /// Without chunks (RFC 9112, section 7.1).
    lines: Vec<u8>,
    chunked: bool,
    /// Bytes of the chunk that are still to come, its line end included; 0: a chunk begins.
    left: usize,
    over: bool,
}

/// What a stream has.
#[derive(Debug)]
pub enum Next {
    View(Box<View>),
    /// Nothing came in time.
    Nothing,
    /// The daemon ended the stream.
    End,
}

impl Views {
    /// What comes within `wait`.
    pub fn next(&mut self, wait: Duration) -> Result<Next> {
        let end = Instant::now() + wait;
        loop {
            if let Some(at) = self.lines.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.lines.drain(..=at).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                let view = serde_json::from_slice(&line).context("the daemon tells something that is not understood here")?;
                return Ok(Next::View(Box::new(view)));
            }
            if self.lines.len() > LINE_MAX {
                bail!("the daemon tells a line without an end");
            }
            if self.decode()? {
                continue;
            }
            if self.over {
                return Ok(Next::End);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Next::Nothing);
            }
            self.fill(left)?;
        }
    }

    /// Moves what is whole from `raw` to `lines`; whether anything was.
    fn decode(&mut self) -> Result<bool> {
        if !self.chunked {
            let moved = !self.raw.is_empty();
            self.lines.append(&mut self.raw);
            return Ok(moved);
        }
        if self.left == 0 {
            let Some(at) = self.raw.windows(2).position(|window| window == b"\r\n") else { return Ok(false) };
            let line = String::from_utf8_lossy(&self.raw[..at]).into_owned();
            let length = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16);
            let length =
                length.ok().filter(|length| *length <= LINE_MAX).context("the daemon's answer is not chunked as it says")?;
            self.raw.drain(..at + 2);
            if length == 0 {
                self.over = true;
                self.raw.clear();
                return Ok(false);
            }
            self.left = length + 2;
        }
        let take = self.left.min(self.raw.len());
        let data = take.min(self.left.saturating_sub(2));
        self.lines.extend_from_slice(&self.raw[..data]);
        self.raw.drain(..take);
        self.left -= take;
        Ok(take > 0)
    }

    /// Reads once, for `wait` at most.
    fn fill(&mut self, wait: Duration) -> Result<()> {
        use std::io::ErrorKind;
        self.stream.set_read_timeout(Some(wait.max(Duration::from_millis(1))))?;
        let mut buffer = [0; 16 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.over = true,
            Ok(read) => self.raw.extend_from_slice(&buffer[..read]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => self.over = true,
            Err(error) => return Err(error).context("the connection to the daemon broke"),
        }
        Ok(())
    }
}

#[cfg(test)]
pub(in crate::cli) mod tests;
