//! Commands in the guest, over a virtio-serial port that the guest's `pipeline-init agent` answers.
//!
//! Frames, both ways: `u32 LE length of the rest, u8 type, payload`, at most 1 MiB.
//! ```text
//! host → guest  1 exec   u32 id, u32 seconds, arguments joined by NUL
//!               3 ping   u32 id
//!               4 kill   u32 id
//!               5 write  u32 id, u32 mode, path, NUL, bytes
//! guest → host  0x81 hello   u32 id of the ping (0: at start), "pipeline-agent 1 BOOT_ID"
//!               0x82 stdout  u32 id, bytes
//!               0x83 stderr  u32 id, bytes
//!               0x84 exit    u32 id, i32 status, i32 signal, u8 timed out
//! ```
//! A guest that was reset leaves half a frame in the channel. So before anything else, and after every reset,
//! pings with ids of their own are sent, and what comes before the answer to one of them is dropped.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::net::SendFlags;

use super::bell::Bell;
use crate::error::Problem;

/// Largest frame, without its length.
pub const FRAME_MAX: usize = 1 << 20;
/// Largest output of a command that is kept, each of stdout and stderr.
const OUTPUT_MAX: usize = 16 << 20;
/// Time between two pings while nobody answers.
const PING: Duration = Duration::from_millis(500);
/// How long the guest may take to read a frame.
const WRITE: Duration = Duration::from_secs(60);
/// What a hello says before the boot id.
const HELLO: &str = "pipeline-agent 1 ";

const EXEC: u8 = 1;
const PING_FRAME: u8 = 3;
const KILL: u8 = 4;
const WRITE_FILE: u8 = 5;
const HELLO_FRAME: u8 = 0x81;
const STDOUT: u8 = 0x82;
const STDERR: u8 = 0x83;
const EXIT: u8 = 0x84;

/// What a command in the guest left.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// 0 to 255; meaningless with a signal.
    pub status: i32,
    /// 0: none.
    pub signal: i32,
    pub timed_out: bool,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

/// How far a request is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Running,
    Done(Output),
    /// The guest or its agent started anew in the meantime.
    Lost,
}

/// The host's end of the channel.
#[derive(Debug)]
pub struct Agent {
    stream: UnixStream,
    shared: Arc<Mutex<Shared>>,
    next: u32,
    pinged: Option<Instant>,
}

#[derive(Debug, Default)]
struct Shared {
    buffer: Vec<u8>,
    /// Ids of pings that count: those sent since the last reset.
    pings: std::ops::Range<u32>,
    in_step: bool,
    boot_id: Option<String>,
    requests: HashMap<u32, (Output, State)>,
}

impl Agent {
    /// Reads `stream` in a thread of its own; nothing is sent yet.
    pub fn new(stream: UnixStream, bell: Bell) -> Result<Self> {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let mut reader = stream.try_clone().context("cannot share a socket")?;
        stream.set_write_timeout(Some(WRITE)).context("cannot set up a socket")?;
        let of_thread = shared.clone();
        let read = move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                match reader.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => {
                        of_thread.lock().unwrap_or_else(PoisonError::into_inner).take(&buffer[..length]);
                        bell.ring();
                    }
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
        };
        std::thread::Builder::new().name("agent".into()).spawn(read).context("cannot start a thread")?;
        // Ids start at random and far from their end, so that what is left in the channel is not taken for an answer.
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0);
        Ok(Self { stream, shared, next: random as u32 >> 1, pinged: None })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(&mut self) -> u32 {
        self.next = self.next.wrapping_add(1).max(1);
        self.next
    }

    /// Forgets what the channel holds: the guest was reset.
    pub fn reset(&mut self) {
        let next = self.next.wrapping_add(1);
        let mut shared = self.lock();
        shared.in_step = false;
        shared.buffer.clear();
        shared.pings = next..next;
        shared.lose();
        drop(shared);
        self.pinged = None;
    }

    /// The boot id of the guest, when its agent answers; asks for an answer now and then. Call it in a waiting loop.
    pub fn boot_id(&mut self) -> Option<String> {
        let shared = self.lock();
        if shared.in_step {
            return shared.boot_id.clone();
        }
        drop(shared);
        if self.pinged.is_none_or(|at| at.elapsed() >= PING) {
            self.ping();
        }
        None
    }

    fn ping(&mut self) {
        self.pinged = Some(Instant::now());
        let id = self.id();
        let mut shared = self.lock();
        if shared.pings.is_empty() {
            shared.pings.start = id;
        }
        shared.pings.end = id.wrapping_add(1);
        drop(shared);
        // While nobody reads, the channel fills; a ping that does not fit is as good as one that is not read.
        let _ =
            rustix::net::send(&self.stream, &frame(PING_FRAME, &[&id.to_le_bytes()]), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }

    /// Starts a command: as root, in `/`, with nothing on standard input. The guest ends it after `timeout`.
    ///
    /// # Errors
    /// It is larger than a frame; the guest does not read.
    pub fn exec(&mut self, argv: &[&str], timeout: Duration) -> Result<u32> {
        let id = self.id();
        let seconds = u32::try_from(timeout.as_secs().max(1)).unwrap_or(u32::MAX);
        self.request(id, EXEC, &[&id.to_le_bytes(), &seconds.to_le_bytes(), argv.join("\0").as_bytes()])
    }

    /// Starts to write a file; missing folders are an error of the guest's.
    pub fn write(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<u32> {
        let id = self.id();
        self.request(id, WRITE_FILE, &[&id.to_le_bytes(), &mode.to_le_bytes(), path.as_bytes(), &[0], bytes])
    }

    /// Ends a command that runs.
    pub fn kill(&mut self, id: u32) -> Result<()> {
        self.send(&frame(KILL, &[&id.to_le_bytes()]))
    }

    fn request(&mut self, id: u32, kind: u8, parts: &[&[u8]]) -> Result<u32> {
        let frame = frame(kind, parts);
        if frame.len() - 4 > FRAME_MAX {
            return Err(Problem::usage("a command or file for the guest is larger than 1 MiB").into());
        }
        self.lock().requests.insert(id, (Output::default(), State::Running));
        self.send(&frame)?;
        Ok(id)
    }

    fn send(&mut self, frame: &[u8]) -> Result<()> {
        self.stream.write_all(frame).context("the guest's agent does not read")
    }

    /// What a running command has written to its two streams since this was asked last; [`State::Done`] has the rest.
    pub fn printed(&mut self, id: u32) -> (Vec<u8>, Vec<u8>) {
        match self.lock().requests.get_mut(&id) {
            Some((output, State::Running)) => (std::mem::take(&mut output.stdout), std::mem::take(&mut output.stderr)),
            _ => (Vec::new(), Vec::new()),
        }
    }

    /// How far the request `id` is; a finished one is forgotten.
    pub fn poll(&mut self, id: u32) -> State {
        let mut shared = self.lock();
        match shared.requests.get(&id).map(|(_, state)| state) {
            Some(State::Running) => State::Running,
            Some(_) => shared.requests.remove(&id).map_or(State::Lost, |(_, state)| state),
            None => State::Lost,
        }
    }
}

impl Shared {
    fn take(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        if !self.in_step && !self.find_step() {
            return;
        }
        loop {
            let Some(length) = self.buffer.first_chunk::<4>().map(|length| u32::from_le_bytes(*length) as usize) else { return };
            if length == 0 || length > FRAME_MAX {
                self.in_step = false;
                self.pings = self.pings.end..self.pings.end;
                self.lose();
                return;
            }
            if self.buffer.len() < 4 + length {
                return;
            }
            let rest: Vec<u8> = self.buffer.drain(..4 + length).skip(4).collect();
            self.frame(rest[0], &rest[1..]);
        }
    }

    /// Drops everything before the answer to one of our pings.
    fn find_step(&mut self) -> bool {
        let text = HELLO.as_bytes();
        for at in 0..self.buffer.len().saturating_sub(9 + text.len() - 1) {
            let head = &self.buffer[at..];
            let id = u32::from_le_bytes([head[5], head[6], head[7], head[8]]);
            if head[4] == HELLO_FRAME && self.pings.contains(&id) && head[9..].starts_with(text) {
                self.buffer.drain(..at);
                self.in_step = true;
                return true;
            }
        }
        let keep = self.buffer.len().min(9 + text.len());
        self.buffer.drain(..self.buffer.len() - keep);
        false
    }

    fn frame(&mut self, kind: u8, payload: &[u8]) {
        let Some(id) = payload.first_chunk::<4>().map(|id| u32::from_le_bytes(*id)) else { return };
        let payload = &payload[4..];
        if kind == HELLO_FRAME {
            let text = String::from_utf8_lossy(payload);
            let boot_id = text.strip_prefix(HELLO).unwrap_or_default().trim_matches(['\0', '\n', ' ']).to_owned();
            if id == 0 || self.boot_id.as_ref().is_some_and(|known| *known != boot_id) {
                self.lose();
            }
            self.boot_id = Some(boot_id);
            return;
        }
        let Some((output, state)) = self.requests.get_mut(&id) else { return };
        let append = |to: &mut Vec<u8>| to.extend_from_slice(&payload[..payload.len().min(OUTPUT_MAX.saturating_sub(to.len()))]);
        match kind {
            STDOUT => append(&mut output.stdout),
            STDERR => append(&mut output.stderr),
            EXIT if payload.len() >= 9 => {
                let number = |at: usize| i32::from_le_bytes([payload[at], payload[at + 1], payload[at + 2], payload[at + 3]]);
                let output = std::mem::take(output);
                *state = State::Done(Output { status: number(0), signal: number(4), timed_out: payload[8] != 0, ..output });
            }
            _ => {}
        }
    }

    /// Requests of a guest that is no more.
    fn lose(&mut self) {
        for (_, state) in self.requests.values_mut().filter(|(_, state)| *state == State::Running) {
            *state = State::Lost;
        }
    }
}

/// A frame of `parts`.
pub fn frame(kind: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length = 1 + parts.iter().map(|part| part.len()).sum::<usize>();
    let mut frame = Vec::with_capacity(4 + length);
    frame.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    frame.push(kind);
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest's end.
    struct Peer(UnixStream);

    impl Peer {
        fn read(&mut self) -> (u8, Vec<u8>) {
            let mut length = [0; 4];
            self.0.read_exact(&mut length).unwrap();
            let mut rest = vec![0; u32::from_le_bytes(length) as usize];
            self.0.read_exact(&mut rest).unwrap();
            (rest[0], rest[1..].to_vec())
        }

        /// Reads until something else than a ping comes.
        fn request(&mut self) -> (u8, u32, Vec<u8>) {
            loop {
                let (kind, payload) = self.read();
                if kind != PING_FRAME {
                    return (kind, u32::from_le_bytes(payload[..4].try_into().unwrap()), payload[4..].to_vec());
                }
            }
        }

        fn hello(&mut self, boot: &str) {
            let (kind, id) = self.read();
            assert_eq!(kind, PING_FRAME);
            self.send(HELLO_FRAME, &[&id, format!("{HELLO}{boot}").as_bytes()]);
        }

        fn send(&mut self, kind: u8, parts: &[&[u8]]) {
            self.0.write_all(&frame(kind, parts)).unwrap();
        }

        fn exit(&mut self, id: u32, status: i32, signal: i32, timed_out: u8) {
            self.send(EXIT, &[&id.to_le_bytes(), &status.to_le_bytes(), &signal.to_le_bytes(), &[timed_out]]);
        }
    }

    fn pair() -> (Agent, Peer) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        (Agent::new(ours, Bell::default()).unwrap(), Peer(theirs))
    }

    fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            match look() {
                Some(value) => return value,
                None => assert!(Instant::now() < end, "nothing came"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn done(agent: &mut Agent, id: u32) -> State {
        until(|| match agent.poll(id) {
            State::Running => None,
            state => Some(state),
        })
    }

    #[test]
    fn a_command_from_ping_to_exit() {
        let (mut agent, mut peer) = pair();
        assert_eq!(agent.boot_id(), None);
        // Half a frame of an earlier life, and a hello nobody asked for.
        peer.0.write_all(&[0xff, 0, 0, 0, STDOUT, 1, 2]).unwrap();
        peer.send(HELLO_FRAME, &[&0_u32.to_le_bytes(), format!("{HELLO}old").as_bytes()]);
        peer.hello("boot-1");
        assert_eq!(until(|| agent.boot_id()), "boot-1");
        let id = agent.exec(&["systemctl", "is-active", "a b"], Duration::from_millis(2500)).unwrap();
        let (kind, of, payload) = peer.request();
        assert_eq!((kind, of, &payload[..]), (EXEC, id, &b"\x02\0\0\0systemctl\0is-active\0a b"[..]));
        for (kind, text) in [(STDOUT, "act"), (STDERR, "warning"), (STDOUT, "ive\n")] {
            peer.send(kind, &[&id.to_le_bytes(), text.as_bytes()]);
        }
        assert_eq!(agent.poll(id), State::Running);
        peer.exit(id, 3, 0, 0);
        let expected = Output { status: 3, stdout: b"active\n".into(), stderr: b"warning".into(), ..Output::default() };
        assert_eq!(done(&mut agent, id), State::Done(expected));
        assert_eq!(agent.poll(id), State::Lost, "a finished request is forgotten");
    }

    #[test]
    fn killed_timed_out_and_written() {
        let (mut agent, mut peer) = pair();
        agent.boot_id();
        peer.hello("b");
        until(|| agent.boot_id());
        let id = agent.exec(&["sleep"], Duration::from_secs(5)).unwrap();
        agent.kill(id).unwrap();
        assert_eq!(peer.request().0, EXEC);
        assert_eq!(peer.request(), (KILL, id, Vec::new()));
        peer.exit(id, 0, 9, 1);
        assert_eq!(done(&mut agent, id), State::Done(Output { signal: 9, timed_out: true, ..Output::default() }));
        let id = agent.write("/run/x", 0o640, b"a\0b").unwrap();
        assert_eq!(peer.request(), (WRITE_FILE, id, b"\xa0\x01\0\0/run/x\0a\0b".to_vec()));
        let error = agent.write("/x", 0, &vec![0; FRAME_MAX]).unwrap_err();
        assert_eq!(error.to_string(), "a command or file for the guest is larger than 1 MiB");
    }

    #[test]
    fn a_reset_in_the_middle_of_a_frame() {
        let (mut agent, mut peer) = pair();
        agent.boot_id();
        peer.hello("boot-1");
        until(|| agent.boot_id());
        let id = agent.exec(&["reboot"], Duration::from_secs(5)).unwrap();
        peer.request();
        // Announces 60,000 bytes and dies after 3.
        peer.0.write_all(&[0x60, 0xea, 0, 0, STDOUT, 1, 2]).unwrap();
        agent.reset();
        assert_eq!(agent.poll(id), State::Lost);
        assert_eq!(agent.boot_id(), None);
        peer.send(HELLO_FRAME, &[&0_u32.to_le_bytes(), format!("{HELLO}boot-2").as_bytes()]);
        peer.hello("boot-2");
        assert_eq!(until(|| agent.boot_id()), "boot-2");
    }

    #[test]
    fn an_agent_that_starts_anew_loses_what_ran() {
        let (mut agent, mut peer) = pair();
        agent.boot_id();
        peer.hello("b");
        until(|| agent.boot_id());
        let id = agent.exec(&["x"], Duration::from_secs(5)).unwrap();
        peer.request();
        peer.send(HELLO_FRAME, &[&0_u32.to_le_bytes(), format!("{HELLO}b").as_bytes()]);
        assert_eq!(done(&mut agent, id), State::Lost);
    }

    #[test]
    fn hostile_bytes_do_no_harm() {
        let (mut agent, mut peer) = pair();
        let mut state = 88_172_645_463_325_252_u64;
        for _ in 0..200 {
            agent.boot_id();
            let bytes: Vec<u8> = (0..1000)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state.to_le_bytes()[3]
                })
                .collect();
            peer.0.write_all(&bytes).unwrap();
        }
        agent.reset();
        assert_eq!(agent.boot_id(), None);
        let (_, first) = peer.read();
        // The pings of before the reset do not count any more.
        peer.send(HELLO_FRAME, &[&first, format!("{HELLO}b").as_bytes()]);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(agent.boot_id(), None);
        let mut last = first;
        peer.0.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut frame = [0; 9];
        while peer.0.read_exact(&mut frame).is_ok() {
            last = frame[5..].to_vec();
        }
        peer.send(HELLO_FRAME, &[&last, format!("{HELLO}b").as_bytes()]);
        assert_eq!(until(|| agent.boot_id()), "b");
    }
}
