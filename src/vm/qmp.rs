//! QEMU's machine protocol: commands and their answers, events (QEMU's `docs/interop/qmp-spec.rst`).

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::bell::Bell;
use crate::error::Problem;

/// How long QEMU may take to answer; under emulation on a loaded machine its main loop is slow.
const ANSWER: Duration = Duration::from_secs(60);

/// Something QEMU told by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Like `SHUTDOWN`.
    pub name: String,
    pub data: Value,
}

/// A connection; it ends when QEMU does.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    shared: Arc<Mutex<Shared>>,
    bell: Bell,
    next: u64,
}

#[derive(Debug, Default)]
struct Shared {
    answers: HashMap<u64, Value>,
    events: Vec<Event>,
    greeted: bool,
    closed: bool,
}

impl Qmp {
    /// Reads `stream` in a thread of its own; nothing is sent yet.
    pub fn new(stream: UnixStream, bell: Bell) -> Result<Self> {
        let shared = Arc::new(Mutex::new(Shared::default()));
        let reader = BufReader::new(stream.try_clone().context("cannot share a socket")?);
        let (of_thread, ring) = (shared.clone(), bell.clone());
        let read = move || {
            for line in reader.lines() {
                let Ok(line) = line else { break };
                let Ok(message) = serde_json::from_str::<Value>(&line) else { continue };
                let mut shared = of_thread.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(name) = message.get("event").and_then(Value::as_str) {
                    let data = message.get("data").cloned().unwrap_or(Value::Null);
                    shared.events.push(Event { name: name.into(), data });
                } else if message.get("QMP").is_some() {
                    shared.greeted = true;
                } else if let Some(id) = message.get("id").and_then(Value::as_u64) {
                    shared.answers.insert(id, message);
                }
                drop(shared);
                ring.ring();
            }
            of_thread.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
            ring.ring();
        };
        std::thread::Builder::new().name("qmp".into()).spawn(read).context("cannot start a thread")?;
        Ok(Self { stream, shared, bell, next: 0 })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether QEMU has introduced itself: from here on commands are taken.
    pub fn is_greeted(&self) -> bool {
        self.lock().greeted
    }

    /// Whether QEMU is gone.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// All events so far, in order.
    pub fn events(&self) -> Vec<Event> {
        self.lock().events.clone()
    }

    /// Runs a command and returns what it answers.
    ///
    /// # Errors
    /// QEMU's own words; QEMU is gone or does not answer within a minute.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.next += 1;
        let id = self.next;
        let mut message = json!({"execute": command, "id": id});
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let gone = || Problem::failed(format!("QEMU ended before it answered `{command}`"));
        self.stream.write_all((message.to_string() + "\n").as_bytes()).map_err(|_| gone())?;
        let end = Instant::now() + ANSWER;
        loop {
            let seen = self.bell.rings();
            let mut shared = self.lock();
            if let Some(mut answer) = shared.answers.remove(&id) {
                if let Some(words) = answer.pointer("/error/desc").and_then(Value::as_str) {
                    bail!(Problem::failed(format!("QEMU refused `{command}`: {words}")));
                }
                return Ok(answer["return"].take());
            }
            if shared.closed {
                bail!(gone());
            }
            drop(shared);
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(Problem::failed(format!("QEMU did not answer `{command}` within {} s", ANSWER.as_secs())));
            }
            self.bell.wait(seen, left);
        }
    }

    /// Runs a command of QEMU's monitor for people and returns its text.
    pub fn monitor(&mut self, line: &str) -> Result<String> {
        let answer = self.call("human-monitor-command", json!({"command-line": line}))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }
}

/// Host and guest ports from the text of `info usernet` (QEMU 7.2: `TCP[HOST_FORWARD] fd address port address port …`).
pub fn forwards(text: &str) -> Vec<(u16, u16)> {
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["TCP[HOST_FORWARD]", _, _, host, _, guest, ..] => Some((host.parse().ok()?, guest.parse().ok()?)),
            _ => None,
        }
    };
    text.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_answers_events_and_the_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let peer = std::thread::spawn(move || {
            let mut reader = BufReader::new(theirs.try_clone().unwrap());
            let mut writer = theirs;
            writer.write_all(b"{\"QMP\": {}}\r\n").unwrap();
            let mut asked = Vec::new();
            for answer in [
                // An event comes in between.
                "{\"event\": \"RESET\", \"data\": {\"guest\": true}}\n{\"return\": {\"status\": \"running\"}, \"id\": 1}\n",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}, \"id\": 2}\n",
            ] {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                asked.push(serde_json::from_str::<Value>(&line).unwrap());
                writer.write_all(answer.as_bytes()).unwrap();
            }
            asked
        });
        let mut qmp = Qmp::new(ours, Bell::default()).unwrap();
        assert_eq!(qmp.call("query-status", Value::Null).unwrap(), json!({"status": "running"}));
        assert!(qmp.is_greeted());
        let error = qmp.call("eject", json!({"device": "x"})).unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused `eject`: no such thing");
        assert_eq!(qmp.events(), [Event { name: "RESET".into(), data: json!({"guest": true}) }]);
        let expected =
            [json!({"execute": "query-status", "id": 1}), json!({"execute": "eject", "arguments": {"device": "x"}, "id": 2})];
        assert_eq!(peer.join().unwrap(), expected);
        assert_eq!(qmp.call("quit", Value::Null).unwrap_err().to_string(), "QEMU ended before it answered `quit`");
    }

    #[test]
    fn forwarded_ports_as_qemu_7_2_prints_them() {
        let text = "Hub -1 (n):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                    TCP[HOST_FORWARD]   9       127.0.0.1 36165       10.0.2.15    80     0     0\r\n  \
                    TCP[ESTABLISHED]   10       127.0.0.1 36165       10.0.2.15    80     0     0\r\n  \
                    TCP[HOST_FORWARD]   8       127.0.0.1 38981       10.0.2.15    22     0     0\r\n";
        assert_eq!(forwards(text), [(36165, 80), (38981, 22)]);
    }
}
