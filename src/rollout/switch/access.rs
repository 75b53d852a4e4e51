//! The access log: one JSON object per line, written by a thread of its own so that no request waits for it.
//!
//! Workers format lines into a buffer each has for itself and hand it over when it is large or
//! old enough. When the sink is slower than the requests, whole buffers are dropped and counted.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where finished lines go. Called from one thread, which may block.
pub trait AccessSink: Send + Sync {
    /// `lines` are whole lines, each ended by a newline.
    fn write(&mut self, lines: &[u8]);
}

/// Lines are handed over when a worker has this much.
const BUFFER_BYTES: usize = 32 << 10;
/// Buffers that may wait for the sink; with [`BUFFER_BYTES`] this bounds the memory to 8 MiB.
const WAITING_BUFFERS: usize = 256;

/// One request, as it is logged.
#[derive(Debug)]
pub(super) struct Line<'a> {
    pub time: SystemTime,
    pub client: std::net::IpAddr,
    pub protocol: &'static str,
    pub tls: bool,
    pub method: &'a str,
    pub host: &'a str,
    pub path: &'a str,
    pub query: Option<&'a str>,
    pub user_agent: Option<&'a str>,
    pub referer: Option<&'a str>,
    /// 499 when the client went away before there was an answer.
    pub status: u16,
    pub service: &'a str,
    pub pool: &'a str,
    pub instance: &'a str,
    pub took: Duration,
    /// Bytes of bodies.
    pub received: u64,
    pub sent: u64,
    /// Why it ended early, empty when it did not.
    pub error: &'a str,
}

impl Line<'_> {
    fn format(&self, out: &mut String) {
        out.push_str("{\"time\":\"");
        rfc3339(self.time, out);
        let _ = write!(out, "\",\"client\":\"{}\",\"protocol\":\"{}\",\"tls\":{}", self.client, self.protocol, self.tls);
        for (key, value) in [("method", self.method), ("host", self.host), ("path", self.path)] {
            member(out, key, value);
        }
        let optional = [("query", self.query), ("user_agent", self.user_agent), ("referer", self.referer)];
        optional.iter().filter_map(|(key, value)| Some((key, (*value)?))).for_each(|(key, value)| member(out, key, value));
        let _ = write!(out, ",\"status\":{}", self.status);
        let optional = [("service", self.service), ("pool", self.pool), ("instance", self.instance), ("error", self.error)];
        optional.iter().filter(|(_, value)| !value.is_empty()).for_each(|(key, value)| member(out, key, value));
        let millis = self.took.as_secs_f64() * 1e3;
        let _ = writeln!(out, ",\"duration_ms\":{millis:.3},\"received\":{},\"sent\":{}}}", self.received, self.sent);
    }
}

/// `,"key":"value"` with what JSON needs escaped (RFC 8259, section 7).
fn member(out: &mut String, key: &str, value: &str) {
    let _ = write!(out, ",\"{key}\":\"");
    for character in value.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            control if (control as u32) < 0x20 || control as u32 == 0x7f => {
                let _ = write!(out, "\\u{:04x}", control as u32);
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

/// `2026-01-31T12:00:00.123Z`; days to date after Howard Hinnant's `civil_from_days`.
fn rfc3339(time: SystemTime, out: &mut String) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = ((since.as_secs() / 86_400) as i64, since.as_secs() % 86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let _ = write!(out, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis());
}

/// The way to the sink; one per switch.
#[derive(Debug, Clone)]
pub(super) struct AccessLog {
    queue: SyncSender<(String, u64)>,
    dropped: Arc<AtomicU64>,
}

impl AccessLog {
    /// Starts the thread that writes; it ends when the last clone is dropped.
    pub fn start(mut sink: Box<dyn AccessSink>) -> std::io::Result<Self> {
        let (queue, lines) = sync_channel::<(String, u64)>(WAITING_BUFFERS);
        std::thread::Builder::new().name("switch-log".into()).spawn(move || {
            while let Ok((text, _)) = lines.recv() {
                sink.write(text.as_bytes());
            }
        })?;
        Ok(Self { queue, dropped: Arc::default() })
    }

    /// Lines lost because the sink was too slow.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn send(&self, text: String, lines: u64) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.queue.try_send((text, lines)) {
            self.dropped.fetch_add(lines, Ordering::Relaxed);
        }
    }
}

/// The lines of one worker that are not handed over yet.
#[derive(Debug)]
pub(super) struct Buffer {
    log: AccessLog,
    text: Mutex<(String, u64)>,
}

impl Buffer {
    pub fn new(log: AccessLog) -> Self {
        Self { log, text: Mutex::default() }
    }

    pub fn add(&self, line: &Line<'_>) {
        let mut held = self.text.lock().expect("no thread panics with it");
        line.format(&mut held.0);
        held.1 += 1;
        if held.0.len() >= BUFFER_BYTES {
            let (text, lines) = std::mem::replace(&mut *held, (String::with_capacity(BUFFER_BYTES + 1024), 0));
            self.log.send(text, lines);
        }
    }

    /// Hands over what there is.
    pub fn flush(&self) {
        let (text, lines) = std::mem::take(&mut *self.text.lock().expect("no thread panics with it"));
        if lines > 0 {
            self.log.send(text, lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_json_whatever_the_client_sends() {
        let line = Line {
            time: UNIX_EPOCH + Duration::from_millis(1_709_210_096_007),
            client: "192.0.2.1".parse().unwrap(),
            protocol: "HTTP/1.1",
            tls: true,
            method: "GET",
            host: "shop.test",
            path: "/a\"b\\c\u{1}ü",
            query: Some("x=1"),
            user_agent: None,
            referer: Some("\n"),
            status: 200,
            service: "shop/prod",
            pool: "0123456789ab",
            instance: "",
            took: Duration::from_micros(1500),
            received: 1,
            sent: 2,
            error: "",
        };
        let mut text = String::new();
        line.format(&mut text);
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        let wanted = serde_json::json!({"time": "2024-02-29T12:34:56.007Z", "client": "192.0.2.1", "protocol": "HTTP/1.1", "tls": true,
            "method": "GET", "host": "shop.test", "path": "/a\"b\\c\u{1}ü", "query": "x=1", "referer": "\n", "status": 200,
            "service": "shop/prod", "pool": "0123456789ab", "duration_ms": 1.5, "received": 1, "sent": 2});
        assert_eq!(read, wanted);
    }

    #[test]
    fn a_slow_sink_loses_lines_and_blocks_nobody() {
        struct Stuck(Mutex<std::sync::mpsc::Receiver<()>>);
        impl AccessSink for Stuck {
            fn write(&mut self, _: &[u8]) {
                let _ = self.0.lock().unwrap().recv();
            }
        }
        let (let_go, stuck) = std::sync::mpsc::channel();
        let log = AccessLog::start(Box::new(Stuck(Mutex::new(stuck)))).unwrap();
        (0..WAITING_BUFFERS + 50).for_each(|_| log.send("x\n".into(), 3));
        let dropped = log.dropped();
        assert!((49 * 3..=50 * 3).contains(&dropped), "all but what waits and the one being written: {dropped}");
        drop(let_go);
    }
}
