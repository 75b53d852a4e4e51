//! What the program and its unshare process say to each other over a socket pair.
//!
//! A frame is one kind byte, four bytes of length (little endian) and the payload: JSON, or the
//! raw bytes a step printed. File descriptors travel with the first bytes of their frame.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Kind, Problem};

/// Most file descriptors one frame carries: standard input, output and error, or a handful of sockets.
pub const MAX_FDS: usize = 16;
/// Largest frame; a listing of a large source is a few MiB.
const MAX_FRAME: usize = 256 << 20;

const JSON: u8 = b'J';
const OUTPUT: u8 = b'O';

/// From the program to the unshare process.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Run a command; answered by [`Event::Exited`] or [`Event::Failed`].
    Run(Box<RunSpec>),
    /// Call a function by name; answered by [`Event::Done`] or [`Event::Failed`].
    Call { name: String, args: Value },
    /// Send a signal to the command that runs.
    Signal(i32),
    /// Run a command beside the program that runs; answered by [`Event::Checked`].
    Check { argv: Vec<String> },
    /// Connect to a loopback port of the namespace; answered by [`Event::Connected`] or [`Event::Refused`].
    Connect { port: u16 },
    /// Sockets of the command's network, connected to nothing, at most [`MAX_FDS`]; answered by [`Event::Sockets`].
    Sockets { count: usize },
    /// Run a command beside the program with the three descriptors of the frame; answered by [`Event::BesideEnded`],
    /// other requests meanwhile.
    Beside(Beside),
    /// Send a signal to a command beside the program; SIGKILL ends all it started.
    SignalBeside { id: u64, signal: i32 },
}

/// A command beside the program that runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Beside {
    /// Chosen by who asks; never twice.
    pub id: u64,
    pub argv: Vec<String>,
    /// It gets a terminal of its own, joined to the one its standard input is.
    pub terminal: bool,
    pub timeout: Option<Duration>,
}

/// From the unshare process to the program.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    Exited(Exit),
    Done(Value),
    Failed(Failure),
    /// Carries the connected socket.
    Connected,
    Refused(String),
    /// Whether the command of [`Request::Check`] exited with 0.
    Checked(bool),
    /// Carries the sockets.
    Sockets,
    /// How a command beside the program ended, or why it could not be run.
    BesideEnded {
        id: u64,
        result: Result<Exit, String>,
    },
    /// Something to tell the user while a request runs.
    Note(String),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    Code(i32),
    Signal(i32),
    /// Killed by us after its time was up.
    TimedOut,
}

/// An error chain on its way to the parent.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Messages, innermost first.
    messages: Vec<String>,
    /// The problem in it: index into `messages`, exit code, hints.
    problem: Option<(usize, u8, Vec<String>)>,
    disk_full: bool,
}

impl Failure {
    pub fn of(error: &anyhow::Error) -> Self {
        let chain: Vec<_> = error.chain().collect();
        let last = chain.len() - 1;
        let problem = crate::error::problem(error).and_then(|problem| {
            let at = chain.iter().position(|cause| cause.to_string() == problem.message)?;
            Some((last - at, problem.kind as u8, problem.hints.clone()))
        });
        Self {
            messages: chain.iter().rev().map(ToString::to_string).collect(),
            problem,
            disk_full: crate::error::is_disk_full(error),
        }
    }

    pub fn into_error(self) -> anyhow::Error {
        let mut error: Option<anyhow::Error> = None;
        for (index, message) in self.messages.into_iter().enumerate() {
            let problem = match &self.problem {
                Some((at, kind, hints)) if *at == index => {
                    let kind = match kind {
                        2 => Kind::Usage,
                        70 => Kind::Bug,
                        75 => Kind::Transient,
                        _ => Kind::Failed,
                    };
                    Some(Problem { kind, message: message.clone(), hints: hints.clone() })
                }
                _ => None,
            };
            error = Some(match (error, problem) {
                (None, Some(problem)) => problem.into(),
                (None, None) if self.disk_full => anyhow::Error::new(std::io::Error::from_raw_os_error(libc::ENOSPC)),
                (None, None) => anyhow::anyhow!(message),
                (Some(inner), Some(problem)) => inner.context(problem),
                (Some(inner), None) => inner.context(message),
            });
        }
        error.unwrap_or_else(|| anyhow::anyhow!("the unshare process failed without a reason"))
    }
}

/// A command on a stack of trees.
#[derive(Clone, Serialize, Deserialize)]
pub struct RunSpec {
    /// Layers, bottom first. Each is a folder of its own.
    pub lowers: Vec<PathBuf>,
    /// Where changes go, mount points that are missing among them.
    pub upper: PathBuf,
    /// Whether the command itself sees a read-only tree.
    pub read_only: bool,
    /// Run by runc whoever the user is: it forwards signals to the program and runs checks beside it.
    pub program: bool,
    /// An empty folder on the file system of `upper` for what overlayfs needs.
    pub work: PathBuf,
    pub mounts: Vec<Mount>,
    /// Files below `/run/secrets`, on tmpfs: name and content.
    pub secrets: Vec<(String, Vec<u8>)>,
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    pub cwd: String,
    /// `UID[:GID]` or names of the tree; empty: root.
    pub user: String,
    pub network: Network,
    pub limits: Limits,
    pub timeout: Option<Duration>,
    /// Standard input, output and error come as file descriptors with the frame; else output is
    /// sent as frames and there is no input.
    pub passed_stdio: bool,
}

/// What a command sees of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// A namespace of its own with nothing but loopback.
    None,
    /// The network the unshare process is in.
    Shared,
}

/// Limits of a command and everything it starts; `None` is what is inherited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    pub processes: Option<u64>,
    /// Bytes.
    pub file_size: Option<u64>,
    /// Thousandths of a processor.
    #[serde(default)]
    pub millicpus: Option<u64>,
    /// For a program that is kept: where no control group may be made, its own data is limited and not its address
    /// space, of which some programs reserve much more than they use; what is not limited is told.
    #[serde(default)]
    pub kept: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Mount {
    Bind {
        source: PathBuf,
        target: PathBuf,
        writable: bool,
    },
    /// A private writable view of `lower`; changes go to a folder below `scratch` and are lost.
    Overlay {
        lower: PathBuf,
        scratch: PathBuf,
        target: PathBuf,
    },
    Tmpfs {
        target: PathBuf,
    },
}

impl std::fmt::Debug for RunSpec {
    /// Names what runs, never the environment or a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunSpec").field("argv", &self.argv).field("lowers", &self.lowers).finish_non_exhaustive()
    }
}

/// One end of the socket pair.
#[derive(Debug)]
pub struct Channel(pub UnixStream);

/// A received frame.
#[derive(Debug)]
pub enum Frame {
    Json(Vec<u8>, Vec<OwnedFd>),
    Output(Vec<u8>),
}

impl Channel {
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.send_bytes(JSON, &serde_json::to_vec(message)?, fds)
    }

    pub fn send_output(&self, bytes: &[u8]) -> Result<()> {
        self.send_bytes(OUTPUT, bytes, &[])
    }

    fn send_bytes(&self, kind: u8, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut header = [kind, 0, 0, 0, 0];
        header[1..].copy_from_slice(&u32::try_from(payload.len()).context("a frame over 4 GiB")?.to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            anyhow::bail!("too many file descriptors for one frame");
        }
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL)
            .context("cannot write to the socket pair")?;
        (&self.0)
            .write_all(&header[sent..])
            .and_then(|()| (&self.0).write_all(payload))
            .context("cannot write to the socket pair")
    }

    /// The next frame; `None` when the other end is gone.
    pub fn receive(&self) -> Result<Option<Frame>> {
        let mut header = [0; 5];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut header)], &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(message) => break message.bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(error).context("cannot read from the socket pair"),
            }
        };
        if received == 0 {
            return Ok(None);
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        (&self.0).read_exact(&mut header[received..]).context("cannot read from the socket pair")?;
        let length = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        anyhow::ensure!(length <= MAX_FRAME, "a frame of {length} bytes");
        let mut payload = vec![0; length];
        (&self.0).read_exact(&mut payload).context("cannot read from the socket pair")?;
        Ok(Some(if header[0] == OUTPUT { Frame::Output(payload) } else { Frame::Json(payload, fds) }))
    }
}

/// The message of a JSON frame.
pub fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T> {
    serde_json::from_slice(payload).context("a frame that is not understood")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd as _;

    #[test]
    fn frames_and_descriptors_cross() {
        let (one, two) = UnixStream::pair().unwrap();
        let (one, two) = (Channel(one), Channel(two));
        let file = tempfile::tempfile().unwrap();
        one.send(&Request::Connect { port: 80 }, &[file.as_fd()]).unwrap();
        one.send_output(b"hello").unwrap();
        drop(one);
        let Some(Frame::Json(payload, fds)) = two.receive().unwrap() else { panic!() };
        assert!(matches!(parse::<Request>(&payload).unwrap(), Request::Connect { port: 80 }));
        assert_eq!(fds.len(), 1);
        assert!(matches!(two.receive().unwrap(), Some(Frame::Output(bytes)) if bytes == b"hello"));
        assert!(two.receive().unwrap().is_none());
    }

    #[test]
    fn an_error_chain_survives() {
        let error =
            anyhow::Error::new(Problem::transient("no mirror").hint("wait")).context("cannot fetch").context("cannot build");
        let back = Failure::of(&error).into_error();
        assert_eq!(format!("{back:#}"), "cannot build: cannot fetch: no mirror");
        assert_eq!((crate::error::exit_code(&back), crate::error::hints(&back)), (75, vec!["wait".to_string()]));
        let full = anyhow::Error::new(std::io::Error::from_raw_os_error(28)).context("cannot write");
        assert_eq!(crate::error::exit_code(&Failure::of(&full).into_error()), 75);
    }
}
