//! What the client found: requests, losses with their reasons, who answered when, latencies; written as JSON.
//!
//! Times of the report and of the list of answers are nanoseconds of the machine's monotonic clock ([`super::monotonic`]).

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use fs_err::File;
use serde::Serialize;

use super::client::request::By;
use super::wire::Lost;

/// Losses that are told one by one; all are counted.
const TOLD: usize = 200;

/// What a connection is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Requests over HTTP/1.1, one after the other
    H1,
    /// Requests and uploads over HTTP/2, several at a time
    H2,
    /// Uploads over HTTP/1.1, with length, chunked, and waiting for 100
    Upload,
    /// A WebSocket: messages echoed and pushed
    Ws,
    /// An event stream
    Sse,
    /// The same over HTTP/2
    Sse2,
    /// Downloads of 8 MiB, slowly read
    Large,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::H1 => "h1",
            Self::H2 => "h2",
            Self::Upload => "upload",
            Self::Ws => "ws",
            Self::Sse => "sse",
            Self::Sse2 => "sse2",
            Self::Large => "large",
        }
    }
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Report {
    pub format: u32,
    /// When it started and when it ended.
    pub started: u64,
    pub ended: u64,
    /// Sum over the kinds: requests, opened WebSockets and event streams.
    pub requests: u64,
    pub lost: u64,
    pub kinds: BTreeMap<&'static str, Figures>,
    /// `KIND: REASON` → how many.
    pub reasons: BTreeMap<String, u64>,
    /// The first ones.
    pub losses: Vec<Loss>,
    /// Who answered.
    pub versions: BTreeMap<String, Version>,
    /// Close code → how often the server closed a WebSocket with it.
    pub close_codes: BTreeMap<String, u64>,
}

/// Of one kind.
#[derive(Debug, Default, Serialize)]
pub struct Figures {
    /// Requests, or opened WebSockets or event streams; answered as expected or lost.
    pub requests: u64,
    pub good: u64,
    pub lost: u64,
    /// Connections opened; WebSockets and event streams open one each.
    pub connections: u64,
    /// Connections that the server closed after a whole answer that said so, or with GOAWAY.
    pub closed_by_server: u64,
    /// Connections that ended while nothing was asked on them.
    pub closed_idle: u64,
    /// WebSockets closed with 1001 or 1012, and event streams ended after a whole event: opened again.
    pub restarts: u64,
    /// Echoes, pushed messages, events.
    pub messages: u64,
    /// Messages sent on a WebSocket that the server closed for a restart before it echoed them.
    pub unanswered: u64,
    /// Bytes of the bodies received.
    pub bytes: u64,
    /// From sending the request to the last byte of its answer; of a WebSocket from message to echo.
    pub latency: Latency,
    #[serde(skip)]
    microseconds: Vec<u32>,
}

/// Milliseconds.
#[derive(Debug, Default, Serialize)]
pub struct Latency {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub most: f64,
}

/// Of one version.
#[derive(Debug, Serialize)]
pub struct Version {
    pub requests: u64,
    /// When the first and the last request that it answered were sent.
    pub first_sent: u64,
    pub last_sent: u64,
    /// When its first and its last answer were whole.
    pub first_answered: u64,
    pub last_answered: u64,
    /// When it read the last request, by its own word.
    pub last_accepted: Option<u64>,
}

#[derive(Debug, Serialize)]
pub struct Loss {
    pub kind: &'static str,
    pub reason: &'static str,
    pub detail: String,
    pub at: u64,
}

/// Where the connections write down what they find.
#[derive(Debug)]
pub struct Book {
    report: Report,
    start: Instant,
    answers: Option<std::io::BufWriter<File>>,
}

impl Book {
    /// An empty one; `answers` is a file for a line per answer: sent, answered, version, kind, and when the upstream read the request (or 0).
    pub fn new(answers: Option<&Path>) -> Result<Self> {
        let answers = answers.map(File::create).transpose()?.map(std::io::BufWriter::new);
        let (start, started) = both_clocks();
        let report = Report {
            format: 1,
            started,
            ended: 0,
            requests: 0,
            lost: 0,
            kinds: BTreeMap::new(),
            reasons: BTreeMap::new(),
            losses: Vec::new(),
            versions: BTreeMap::new(),
            close_codes: BTreeMap::new(),
        };
        Ok(Self { report, start, answers })
    }

    fn at(&self, instant: Instant) -> u64 {
        self.report.started + instant.saturating_duration_since(self.start).as_nanos() as u64
    }

    pub fn figures(&mut self, kind: Kind) -> &mut Figures {
        self.report.kinds.entry(kind.name()).or_default()
    }

    /// Answered as expected.
    pub fn good(&mut self, kind: Kind, sent: Instant, by: &By, bytes: u64) {
        self.answered(kind, sent, &by.version, by.accepted);
        let figures = self.figures(kind);
        figures.requests += 1;
        figures.good += 1;
        figures.bytes += bytes;
        self.latency(kind, sent);
    }

    /// A WebSocket or an event stream ended as it should.
    pub fn ended(&mut self, kind: Kind) {
        let figures = self.figures(kind);
        figures.requests += 1;
        figures.good += 1;
    }

    pub fn latency(&mut self, kind: Kind, sent: Instant) {
        let microseconds = u32::try_from(sent.elapsed().as_micros()).unwrap_or(u32::MAX);
        self.figures(kind).microseconds.push(microseconds);
    }

    /// Notes who answered what was sent then.
    pub fn answered(&mut self, kind: Kind, sent: Instant, version: &str, accepted: Option<u64>) {
        let (sent, now) = (self.at(sent), self.at(Instant::now()));
        if let Some(file) = &mut self.answers {
            // A full disk is told when the file is closed.
            let _ = writeln!(file, "{sent} {now} {version} {} {}", kind.name(), accepted.unwrap_or(0));
        }
        if !self.report.versions.contains_key(version) {
            let new = Version {
                requests: 0,
                first_sent: sent,
                last_sent: sent,
                first_answered: now,
                last_answered: now,
                last_accepted: accepted,
            };
            self.report.versions.insert(version.to_owned(), new);
        }
        let found = self.report.versions.get_mut(version).expect("it was inserted");
        found.requests += 1;
        found.first_sent = found.first_sent.min(sent);
        found.last_sent = found.last_sent.max(sent);
        found.last_answered = now;
        found.last_accepted = found.last_accepted.max(accepted);
    }

    pub fn close_code(&mut self, code: Option<u16>) {
        let code = code.map_or("none".into(), |code| code.to_string());
        *self.report.close_codes.entry(code).or_default() += 1;
    }

    pub fn lost(&mut self, kind: Kind, lost: Lost) {
        let figures = self.figures(kind);
        figures.requests += 1;
        figures.lost += 1;
        *self.report.reasons.entry(format!("{}: {}", kind.name(), lost.reason)).or_default() += 1;
        if self.report.losses.len() < TOLD {
            let at = self.at(Instant::now());
            self.report.losses.push(Loss { kind: kind.name(), reason: lost.reason, detail: lost.detail, at });
        }
    }

    /// How many requests of a kind were answered as expected, and messages came.
    pub fn successes(&mut self, kind: Kind) -> u64 {
        let figures = self.figures(kind);
        figures.good + figures.messages
    }

    pub fn finish(mut self) -> Result<Report> {
        if let Some(file) = &mut self.answers {
            file.flush()?;
        }
        self.report.ended = super::monotonic();
        for figures in self.report.kinds.values_mut() {
            self.report.requests += figures.requests;
            self.report.lost += figures.lost;
            figures.latency = latency(std::mem::take(&mut figures.microseconds));
        }
        Ok(self.report)
    }
}

/// The same moment in both clocks, which are one, as exactly as it can be had: nothing came between.
fn both_clocks() -> (Instant, u64) {
    let look = |_| {
        let (before, now) = (Instant::now(), super::monotonic());
        (before.elapsed(), before, now)
    };
    let (_, start, started) = (0..100).map(look).min_by_key(|(took, ..)| *took).expect("there are a hundred");
    (start, started)
}

fn latency(mut microseconds: Vec<u32>) -> Latency {
    microseconds.sort_unstable();
    let Some(&most) = microseconds.last() else { return Latency::default() };
    let of = |share: f64| f64::from(microseconds[((microseconds.len() as f64 * share).ceil() as usize).max(1) - 1]) / 1e3;
    let sum: u64 = microseconds.iter().map(|&one| u64::from(one)).sum();
    let mean = (sum / microseconds.len() as u64) as f64 / 1e3;
    Latency { mean, p50: of(0.5), p90: of(0.9), p99: of(0.99), p999: of(0.999), most: f64::from(most) / 1e3 }
}

impl fmt::Display for Report {
    /// A table of the kinds, then the losses.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header =
            ["kind", "requests", "lost", "messages", "connections", "closed", "idle", "restarts", "p50 ms", "p99 ms", "most"];
        let mut rows = vec![header.map(str::to_owned)];
        for (name, one) in &self.kinds {
            let counts =
                [one.requests, one.lost, one.messages, one.connections, one.closed_by_server, one.closed_idle, one.restarts];
            let times = [one.latency.p50, one.latency.p99, one.latency.most];
            let cells = counts.iter().map(u64::to_string).chain(times.iter().map(|time| format!("{time:.2}")));
            let row: Vec<_> = [(*name).to_owned()].into_iter().chain(cells).collect();
            rows.push(row.try_into().expect("as many cells as the header has"));
        }
        for row in rows {
            for (column, cell) in row.iter().enumerate() {
                write!(formatter, "{}{cell:>width$}", if column > 0 { "  " } else { "" }, width = header[column].len().max(8))?;
            }
            writeln!(formatter)?;
        }
        for (version, found) in &self.versions {
            writeln!(formatter, "version {version}: {} answers", found.requests)?;
        }
        for (code, times) in &self.close_codes {
            writeln!(formatter, "close code {code}: {times}")?;
        }
        for (reason, times) in &self.reasons {
            writeln!(formatter, "lost {times}: {reason}")?;
        }
        for loss in self.losses.iter().take(10) {
            writeln!(
                formatter,
                "  {:.3} s: {}: {}: {}",
                (loss.at - self.started) as f64 / 1e9,
                loss.kind,
                loss.reason,
                loss.detail
            )?;
        }
        write!(formatter, "{} requests, {} lost", self.requests, self.lost)
    }
}
