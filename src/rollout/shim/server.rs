//! The shim's socket: one thread a connection, which asks the shim's own thread for what only that may do.
//!
//! Sockets of the program's network are kept ready, so that [`Request::Sockets`] asks nobody: a socket stays in the
//! network namespace it was made in, and anybody who has it may connect it.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::supervisor::{Asking, words};
use super::{Request, Response, State};
use crate::rollout::target::Running;
use crate::sandbox::protocol::{Channel, Frame, MAX_FDS, parse};
use crate::sandbox::{Beside, Exit};

/// Connections at once: a daemon, its predecessor, some people.
const CONNECTIONS: usize = 512;
/// How long to wait for sockets of the program's network.
const SOCKETS: Duration = Duration::from_secs(2);
/// Fewer than this, and more are asked for.
const FEW: usize = 16;
/// Of a check's output the end is kept.
const CHECK_OUTPUT: usize = 8 << 10;
/// How long after its time a check may take to be ended.
const CHECK_SLACK: Duration = Duration::from_secs(3);
/// How long the rest of a check's output may take after its end.
const CHECK_REST: Duration = Duration::from_millis(200);

/// What only the shim's own thread may do.
pub(super) enum Job {
    Stop {
        grace: Duration,
        channel: Channel,
    },
    Memory(Sender<Option<u64>>),
    /// More sockets for [`Sockets`].
    Sockets,
    Beside {
        beside: Beside,
        stdio: [OwnedFd; 3],
        reply: Reply,
    },
    SignalBeside {
        id: u64,
        signal: i32,
    },
}

/// Who gets to know how a command beside the program ended.
pub(super) enum Reply {
    Thread(Sender<Result<Exit, String>>),
    Client(Channel),
}

impl Reply {
    pub(super) fn send(&self, result: Result<Exit, String>) {
        match self {
            Reply::Thread(sender) => drop(sender.send(result)),
            Reply::Client(channel) => {
                let response = result.map_or_else(Response::Failed, Response::Exited);
                let _ = channel.send(&response, &[]);
                let _ = channel.0.shutdown(std::net::Shutdown::Both);
            }
        }
    }
}

/// Sockets of the program's network, and who has some.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    ready: Mutex<Vec<OwnedFd>>,
    more: Condvar,
    /// Connections of clients that were given sockets: ended when these are worth nothing any more.
    holders: Mutex<BTreeMap<u64, UnixStream>>,
}

impl Sockets {
    /// Takes in what the unshare process made.
    pub(super) fn add(&self, sockets: Vec<OwnedFd>) {
        if let Ok(mut ready) = self.ready.lock() {
            ready.extend(sockets);
            self.more.notify_all();
        }
    }

    /// The network is gone.
    pub(super) fn forget(&self) {
        if let Ok(mut ready) = self.ready.lock() {
            ready.clear();
        }
        if let Ok(mut holders) = self.holders.lock() {
            for holder in std::mem::take(&mut *holders).into_values() {
                let _ = holder.shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// At least one and at most `count` sockets; asks for more in time.
    fn take(&self, count: usize, asking: &Asking) -> Option<Vec<OwnedFd>> {
        let mut ready = self.ready.lock().ok()?;
        if ready.len() < FEW + count {
            asking.ask(Job::Sockets);
        }
        if ready.is_empty() {
            ready = self.more.wait_timeout_while(ready, SOCKETS, |ready| ready.is_empty()).ok()?.0;
        }
        let left = ready.len().saturating_sub(count.max(1));
        Some(ready.split_off(left))
    }

    fn hold(&self, id: u64, stream: UnixStream) {
        if let Ok(mut holders) = self.holders.lock() {
            holders.insert(id, stream);
        }
    }

    fn release(&self, id: u64) {
        if let Ok(mut holders) = self.holders.lock() {
            holders.remove(&id);
        }
    }
}

/// Serves clients in threads of its own.
pub(super) fn serve(listener: UnixListener, asking: Asking, state: Arc<Mutex<State>>, sockets: Arc<Sockets>) {
    let count = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Too many files: the next one may do.
                std::thread::sleep(Duration::from_millis(10));
                continue;
            };
            if count.load(Ordering::SeqCst) >= CONNECTIONS {
                continue;
            }
            count.fetch_add(1, Ordering::SeqCst);
            let (asking, state, sockets, counted) = (asking.clone(), state.clone(), sockets.clone(), count.clone());
            std::thread::spawn(move || {
                // What a client did wrong ends its connection.
                let (id, held) = (next_id(), sockets.clone());
                let _ = Client { id, channel: Channel(stream), asking, state, sockets }.serve();
                held.release(id);
                counted.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
}

struct Client {
    id: u64,
    channel: Channel,
    asking: Asking,
    state: Arc<Mutex<State>>,
    sockets: Arc<Sockets>,
}

impl Client {
    fn serve(self) -> Result<()> {
        while let Some(frame) = self.channel.receive()? {
            let Frame::Json(payload, fds) = frame else { continue };
            match parse::<Request>(&payload)? {
                Request::Status => self.channel.send(&Response::State(self.state()?), &[])?,
                Request::Stop { grace } => {
                    // The shim's own thread answers, when all is done.
                    self.asking.ask(Job::Stop { grace, channel: self.channel });
                    return Ok(());
                }
                Request::Sockets { count } => self.hand_over(count)?,
                Request::Check { argv, timeout } => {
                    let response = self.check(argv, timeout)?;
                    self.channel.send(&response, &[])?;
                }
                Request::Exec { argv, terminal } => return self.exec(argv, terminal, fds),
                Request::Signal { .. } => {}
            }
        }
        Ok(())
    }

    fn state(&self) -> Result<State> {
        let state = self.state.lock().ok().context("the state is broken")?.clone();
        if state.status != Running::Running {
            // The shim's own thread may be at work on its start.
            return Ok(state);
        }
        let (sender, answer) = mpsc::channel();
        self.asking.ask(Job::Memory(sender));
        Ok(State { memory: answer.recv_timeout(Duration::from_secs(1)).ok().flatten(), ..state })
    }

    fn hand_over(&self, count: usize) -> Result<()> {
        match self.sockets.take(count.clamp(1, MAX_FDS), &self.asking) {
            Some(sockets) if !sockets.is_empty() => {
                self.sockets.hold(self.id, self.channel.0.try_clone()?);
                let borrowed: Vec<BorrowedFd<'_>> = sockets.iter().map(|socket| socket.as_fd()).collect();
                self.channel.send(&Response::Sockets, &borrowed)
            }
            _ => self.channel.send(&Response::Refused("the program has no network".into()), &[]),
        }
    }

    fn check(&self, argv: Vec<String>, timeout: Duration) -> Result<Response> {
        let null = fs_err::OpenOptions::new().read(true).open("/dev/null")?;
        let (reader, writer) = std::io::pipe()?;
        let kept = Arc::new(Mutex::new(Vec::new()));
        let (finished, rest) = mpsc::channel();
        let output = kept.clone();
        std::thread::spawn(move || {
            keep_end(reader, &output);
            let _ = finished.send(());
        });
        let (sender, answer) = mpsc::channel();
        let beside = Beside { id: next_id(), argv, terminal: false, timeout: Some(timeout) };
        let stdio = [null.into_parts().0.into(), writer.try_clone()?.into(), writer.into()];
        self.asking.ask(Job::Beside { beside, stdio, reply: Reply::Thread(sender) });
        let result = answer.recv_timeout(timeout + CHECK_SLACK).unwrap_or(Ok(Exit::TimedOut));
        let _ = rest.recv_timeout(CHECK_REST);
        let output = kept.lock().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let last = output.lines().rev().find(|line| !line.trim().is_empty()).map(str::to_string);
        Ok(match result {
            Ok(Exit::Code(0)) => Response::Checked { good: true, last: last.unwrap_or_default() },
            Ok(Exit::TimedOut) => {
                Response::Checked { good: false, last: format!("no answer within {} s", timeout.as_secs_f64()) }
            }
            Ok(exit) => Response::Checked { good: false, last: last.unwrap_or_else(|| words(exit)) },
            Err(why) => Response::Checked { good: false, last: why },
        })
    }

    /// Runs a command for the client; the connection is its life.
    fn exec(self, argv: Vec<String>, terminal: bool, fds: Vec<OwnedFd>) -> Result<()> {
        let Ok(stdio) = <[OwnedFd; 3]>::try_from(fds) else {
            return self.channel.send(&Response::Failed("three file descriptors are needed".into()), &[]);
        };
        let id = next_id();
        let reply = Reply::Client(Channel(self.channel.0.try_clone()?));
        self.asking.ask(Job::Beside { beside: Beside { id, argv, terminal, timeout: None }, stdio, reply });
        while let Ok(Some(Frame::Json(payload, _))) = self.channel.receive() {
            if let Ok(Request::Signal { signal }) = parse(&payload) {
                self.asking.ask(Job::SignalBeside { id, signal });
            }
        }
        // The client is gone, or the command is: then nobody has this id any more.
        self.asking.ask(Job::SignalBeside { id, signal: libc::SIGKILL });
        Ok(())
    }
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::SeqCst)
}

/// Reads to the end and keeps the last [`CHECK_OUTPUT`] bytes.
fn keep_end(mut reader: std::io::PipeReader, kept: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(read) = reader.read(&mut buffer) {
        if read == 0 {
            return;
        }
        if let Ok(mut kept) = kept.lock() {
            kept.extend_from_slice(&buffer[..read]);
            let over = kept.len().saturating_sub(CHECK_OUTPUT);
            kept.drain(..over);
        }
    }
}
