//! The serial console: kept whole in a file, the last part in memory, and watched for texts.
//!
//! What is looked at is free of escape sequences and carriage returns; what is kept in the file and
//! shown to people is what came.

use std::collections::VecDeque;
use std::io::{Read as _, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};

use super::bell::Bell;

/// Bytes of cleaned text kept in memory; a boot with `debug` prints about 1 MB.
const KEPT: usize = 8 << 20;

/// Takes what comes, as it comes.
pub type Sink = Box<dyn Write + Send>;

/// A console; clones show the same one.
#[derive(Debug, Clone)]
pub struct Console {
    shared: Arc<Mutex<Shared>>,
    bell: Bell,
}

struct Shared {
    text: VecDeque<u8>,
    /// Bytes that were dropped from the beginning of `text`.
    dropped: u64,
    cleaner: Cleaner,
    log: fs_err::File,
    /// Why the log is incomplete.
    log_error: Option<String>,
    sink: Option<Sink>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({} bytes)", self.dropped + self.text.len() as u64)
    }
}

/// Where a text is looked for next: everything before was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position(u64);

impl Console {
    /// A console whose text goes to the new file `log`, and to `sink` as it comes.
    pub fn new(log: &Path, sink: Option<Sink>, bell: Bell) -> Result<Self> {
        let shared = Shared {
            text: VecDeque::new(),
            dropped: 0,
            cleaner: Cleaner::default(),
            log: fs_err::File::create(log)?,
            log_error: None,
            sink,
        };
        Ok(Self { shared: Arc::new(Mutex::new(shared)), bell })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads `stream` to its end in a thread of its own.
    pub fn attach(&self, mut stream: UnixStream) -> Result<std::thread::JoinHandle<()>> {
        let console = self.clone();
        let read = move || {
            let mut buffer = vec![0; 64 << 10];
            loop {
                match stream.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => console.take(&buffer[..length]),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    // QEMU is gone.
                    Err(_) => break,
                }
            }
        };
        std::thread::Builder::new().name("console".into()).spawn(read).context("cannot start a thread")
    }

    fn take(&self, bytes: &[u8]) {
        let mut shared = self.lock();
        if let Err(error) = shared.log.write_all(bytes) {
            shared.log_error.get_or_insert(error.to_string());
        }
        if let Some(sink) = &mut shared.sink
            && sink.write_all(bytes).and_then(|()| sink.flush()).is_err()
        {
            // The reader has gone; the log goes on.
            shared.sink = None;
        }
        let Shared { cleaner, text, .. } = &mut *shared;
        cleaner.clean(bytes, text);
        let too_many = shared.text.len().saturating_sub(KEPT);
        shared.text.drain(..too_many);
        shared.dropped += too_many as u64;
        drop(shared);
        self.bell.ring();
    }

    /// The end of what came so far.
    pub fn end(&self) -> Position {
        let shared = self.lock();
        Position(shared.dropped + shared.text.len() as u64)
    }

    /// Whether `wanted` was printed after `from`. `from` is moved behind what was found, or, when nothing
    /// was, to where the next look has to begin.
    pub fn find(&self, wanted: &str, from: &mut Position) -> bool {
        let wanted = wanted.as_bytes();
        let mut shared = self.lock();
        let dropped = shared.dropped;
        let text = &*shared.text.make_contiguous();
        let start = usize::try_from(from.0.saturating_sub(dropped)).unwrap_or(usize::MAX).min(text.len());
        let found = text[start..].windows(wanted.len().max(1)).position(|window| window == wanted);
        let next = match found {
            Some(index) => start + index + wanted.len(),
            None => start.max(text.len().saturating_sub(wanted.len().saturating_sub(1))),
        };
        from.0 = dropped + next as u64;
        found.is_some()
    }

    /// The last `count` lines that are not empty.
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let mut shared = self.lock();
        let text = String::from_utf8_lossy(shared.text.make_contiguous());
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].iter().map(|line| line.trim_end().to_owned()).collect()
    }

    /// The whole lines printed after `from`, which is moved behind them.
    pub fn lines_from(&self, from: &mut Position) -> Vec<String> {
        let mut shared = self.lock();
        let dropped = shared.dropped;
        let text = &*shared.text.make_contiguous();
        let start = usize::try_from(from.0.saturating_sub(dropped)).unwrap_or(usize::MAX).min(text.len());
        let end = text[start..].iter().rposition(|byte| *byte == b'\n').map_or(start, |index| start + index + 1);
        from.0 = dropped + end as u64;
        String::from_utf8_lossy(&text[start..end]).lines().map(|line| line.trim_end().to_owned()).collect()
    }

    /// Whether a line end came after `position`.
    pub fn is_line_ended(&self, position: Position) -> bool {
        self.find("\n", &mut position.clone())
    }

    /// The line around the last byte before `position`.
    pub fn line_before(&self, position: Position) -> String {
        let mut shared = self.lock();
        let dropped = shared.dropped;
        let text = &*shared.text.make_contiguous();
        let at = usize::try_from(position.0.saturating_sub(dropped)).unwrap_or(0).min(text.len());
        let start = text[..at].iter().rposition(|byte| *byte == b'\n').map_or(0, |index| index + 1);
        let end = text[at..].iter().position(|byte| *byte == b'\n').map_or(text.len(), |index| at + index);
        String::from_utf8_lossy(&text[start..end]).trim().to_owned()
    }

    /// Why the log file lacks something, such as a full disk.
    pub fn log_error(&self) -> Option<String> {
        self.lock().log_error.clone()
    }
}

/// Removes escape sequences (ECMA-48, 5.3 and 5.4; operating system commands of xterm), carriage returns and other
/// control characters; lines and tabs stay.
#[derive(Debug, Default)]
struct Cleaner {
    state: State,
}

#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum State {
    #[default]
    Text,
    Escape,
    /// `ESC [` until a final byte.
    Control,
    /// `ESC ]` until BEL or `ESC \`.
    Command,
    CommandEscape,
}

impl Cleaner {
    fn clean(&mut self, bytes: &[u8], to: &mut VecDeque<u8>) {
        for byte in bytes {
            self.state = match (self.state, byte) {
                (State::Text | State::Escape | State::Control, 0x1b) => State::Escape,
                (State::Text, b'\n' | b'\t' | 0x20..=0x7e | 0x80..) => {
                    to.push_back(*byte);
                    State::Text
                }
                (State::Text, _) => State::Text,
                (State::Escape, b'[') => State::Control,
                (State::Escape, b']' | b'P') => State::Command,
                // Intermediate bytes of a longer sequence, as in `ESC ( B`.
                (State::Escape, 0x20..=0x2f) => State::Escape,
                (State::Escape, _) => State::Text,
                (State::Control, 0x40..=0x7e) => State::Text,
                // A sequence that was cut, as by a reset.
                (State::Control, b'\n') => {
                    to.push_back(b'\n');
                    State::Text
                }
                (State::Control, _) => State::Control,
                (State::Command, 0x07) => State::Text,
                (State::Command, 0x1b) => State::CommandEscape,
                (State::Command, b'\n') => {
                    to.push_back(b'\n');
                    State::Text
                }
                (State::Command, _) => State::Command,
                (State::CommandEscape, _) => State::Text,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console() -> (tempfile::TempDir, Console) {
        let folder = tempfile::tempdir().unwrap();
        let console = Console::new(&folder.path().join("console.log"), None, Bell::default()).unwrap();
        (folder, console)
    }

    #[test]
    fn text_is_found_across_pieces_and_colours() {
        let (folder, console) = console();
        let mut from = console.end();
        for piece in ["[\x1b[0;32m  O", "K  \x1b[0m] Rea", "ched \x1b]0;title\x07target\x1b(B\r\nweb1 log", "in: "] {
            console.take(piece.as_bytes());
        }
        assert!(console.find("[  OK  ] Reached target\n", &mut from));
        assert!(!console.find("Reached", &mut from.clone()), "looked before its position");
        assert!(!console.find("login: x", &mut from));
        console.take(b"x\n");
        assert!(console.find("login: x", &mut from));
        assert_eq!(console.line_before(from), "web1 login: x");
        assert_eq!(console.last_lines(1), ["web1 login: x"]);
        let log = fs_err::read(folder.path().join("console.log")).unwrap();
        assert!(log.starts_with(b"[\x1b[0;32m  OK"), "the log is not what came");
    }

    #[test]
    fn a_cut_sequence_does_not_swallow_what_follows() {
        let (_keep, console) = console();
        let mut from = console.end();
        console.take(b"\x1b[31\nSeaBIOS\n\x1b]0;ti\nLinux\n");
        assert!(console.find("\nSeaBIOS\n", &mut from.clone()) && console.find("Linux", &mut from));
    }

    #[test]
    fn memory_is_bounded_and_positions_stay_right() {
        let (_keep, console) = console();
        let mut from = console.end();
        let line = [b'a'; 1 << 20];
        for _ in 0..10 {
            console.take(&line);
        }
        assert_eq!(console.lock().text.len(), KEPT);
        assert!(!console.find("end", &mut from));
        console.take(b"end");
        assert!(console.find("end", &mut from));
        assert_eq!(console.end(), from);
    }
}
