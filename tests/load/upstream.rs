//! The test upstream: an application that is easy to check and behaves as one should, or badly when asked to.
//!
//! HTTP/1.1 with keep-alive. Every answer names the version (`x-load-version`), when its request was read (`x-load-at`, nanoseconds
//! of the machine's monotonic clock) and the request's own `x-load-id`, so that a client sees who answered, and an answer that
//! belongs to another request. What there is:
//!
//! | path | answer |
//! |---|---|
//! | `/healthz` | 200, or 503 while unhealthy |
//! | `/ready` | since when it is healthy, in nanoseconds of the machine's monotonic clock |
//! | `/version` | the version |
//! | `/bytes/N?seed=S[&chunked=1]` | N bytes of the seed ([`super::bytes`]) |
//! | `/echo` | `sha256:HEX LENGTH` of the request's body |
//! | `/trailers?seed=S&length=N` | chunked, with the trailer `x-load-digest` |
//! | `/slow?ms=N` | the version, after so long |
//! | `/status/N` | that status |
//! | `/sse?seed=S&interval=MS` | events, numbered from 0 or from after `last-event-id` |
//! | `/ws?push=MS` | a WebSocket: echoes messages, pushes `p 0`, `p 1` … |
//! | `/env/NAME`, `/secret/NAME` | the variable; the file that `NAME_FILE` names |
//!
//! SIGTERM: no new connections; requests are answered with `connection: close`, WebSockets closed with 1001, event streams
//! ended after a whole event, idle connections closed; then it exits with status 0.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Interval, MissedTickBehavior, interval, sleep, timeout};

use super::bytes::{Bytes, mix};
use super::websocket;
use super::wire::{Head, Lost, Wire};

/// Bytes of a body that are sent at once.
const PIECE_BYTES: usize = 64 << 10;
/// The port when `PORT` is not set.
const PORT: u16 = 8080;
/// How long the other side of a WebSocket may take to answer a close frame.
const CLOSE_ANSWER: Duration = Duration::from_secs(2);

/// How the upstream runs and misbehaves.
#[derive(Debug, clap::Args)]
pub struct UpstreamArgs {
    /// Listen at this address
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0", conflicts_with = "port_from_env")]
    pub listen: SocketAddr,
    /// Listen at all addresses, at the port in the variable PORT (default 8080)
    #[arg(long)]
    pub port_from_env: bool,
    /// What it calls itself; default: the variable LOAD_VERSION
    #[arg(long, value_name = "TEXT")]
    pub version: Option<String>,
    /// Wait so long before listening
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub delay: f64,
    /// Be unhealthy for so long after that
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub healthy_after: f64,
    /// Be unhealthy from then on
    #[arg(long, value_name = "SECONDS")]
    pub unhealthy_after: Option<f64>,
    /// End with status 3 after so long, without a word
    #[arg(long, value_name = "SECONDS")]
    pub die_after: Option<f64>,
    /// Answer each Nth request with 500, but for the health
    #[arg(long, value_name = "N")]
    pub error_every: Option<u64>,
    /// Wait so long before each answer, but for the health
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 0)]
    pub latency: u64,
    /// How long what is open may take to end after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub grace: f64,
}

/// What the connections share.
#[derive(Debug)]
struct App {
    version: String,
    healthy: Instant,
    ready: u64,
    unhealthy: Option<Instant>,
    error_every: Option<u64>,
    latency: Duration,
    requests: std::cell::Cell<u64>,
    stop: watch::Receiver<bool>,
}

/// Serves until SIGTERM, or until it is to die.
pub fn run(args: &UpstreamArgs) -> Result<ExitCode> {
    let address = if args.port_from_env {
        let port = std::env::var("PORT").ok().map_or(Ok(PORT), |port| port.parse()).context("the variable PORT is no port")?;
        SocketAddr::from(([0, 0, 0, 0], port))
    } else {
        args.listen
    };
    let version = args.version.clone().or_else(|| std::env::var("LOAD_VERSION").ok()).unwrap_or_else(|| "none".into());
    let stop = stop_on_signal()?;
    std::thread::sleep(Duration::from_secs_f64(args.delay));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen at {address}"))?;
        super::say(&format!("listening at {}", listener.local_addr()?));
        serve(listener, args, version, stop).await
    })
}

/// Becomes true with SIGTERM or SIGINT.
fn stop_on_signal() -> Result<watch::Receiver<bool>> {
    let (sender, stop) = watch::channel(false);
    let mut signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT])?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            sender.send_replace(true);
        }
    });
    Ok(stop)
}

/// Serves on the listener until `stop`; for tests in one process too.
pub async fn serve(
    listener: TcpListener,
    args: &UpstreamArgs,
    version: String,
    mut stop: watch::Receiver<bool>,
) -> Result<ExitCode> {
    let started = Instant::now();
    let after = |seconds: f64| started + Duration::from_secs_f64(seconds);
    let app = Rc::new(App {
        version,
        healthy: after(args.healthy_after),
        ready: super::monotonic() + (args.healthy_after * 1e9) as u64,
        unhealthy: args.unhealthy_after.map(after),
        error_every: args.error_every,
        latency: Duration::from_millis(args.latency),
        requests: Default::default(),
        stop: stop.clone(),
    });
    // The last sender goes with the last connection.
    let (open, mut ended) = mpsc::channel::<()>(1);
    let mut death = Box::pin(async {
        match args.die_after {
            Some(seconds) => sleep(Duration::from_secs_f64(seconds)).await,
            None => std::future::pending().await,
        }
    });
    loop {
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => break,
            () = &mut death => return Ok(ExitCode::from(3)),
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    let (app, open) = (app.clone(), open.clone());
                    tokio::task::spawn_local(async move {
                        // What the other side did is its own to tell.
                        let _ = connection(&app, socket).await;
                        drop(open);
                    });
                }
                // A connection that was gone before it was accepted; or no more files: those that end make room.
                Err(_) => sleep(Duration::from_millis(10)).await,
            },
        }
    }
    drop((listener, open));
    let all = timeout(Duration::from_secs_f64(args.grace), ended.recv());
    tokio::select! {
        () = &mut death => Ok(ExitCode::from(3)),
        all = all => Ok(if all.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }),
    }
}

async fn connection(app: &App, socket: TcpStream) -> Result<(), Lost> {
    socket.set_nodelay(true).map_err(|error| Lost::io(&error))?;
    let mut wire = Wire::new(Box::new(socket));
    let mut stop = app.stop.clone();
    loop {
        let head = tokio::select! {
            biased;
            head = wire.request() => head?,
            _ = stop.wait_for(|stop| *stop) => None,
        };
        let Some(head) = head else { break };
        let request = Request::new(head);
        match request.path.as_str() {
            "/ws" => return websocket(app, &mut wire, &request).await,
            "/sse" => events(app, &mut wire, &request).await?,
            _ => exchange(app, &mut wire, &request).await?,
        }
        if request.head.closes() || *app.stop.borrow() {
            break;
        }
    }
    wire.finish().await;
    Ok(())
}

/// A request's head with its target taken apart.
#[derive(Debug)]
struct Request {
    head: Head,
    /// When it was read.
    at: u64,
    path: String,
    query: BTreeMap<String, String>,
}

impl Request {
    fn new(head: Head) -> Self {
        let (path, query) = head.target.split_once('?').unwrap_or((&head.target, ""));
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let query = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Self { path: path.to_owned(), query, at: super::monotonic(), head }
    }

    fn number(&self, name: &str) -> u64 {
        self.query.get(name).and_then(|value| value.parse().ok()).unwrap_or_default()
    }
}

/// Status, fields and content of an answer.
struct Answer {
    status: u16,
    fields: Vec<(&'static str, String)>,
    content: Content,
}

enum Content {
    Text(String),
    Bytes { length: u64, seed: u64, chunked: bool, trailer: bool },
}

impl Answer {
    fn text(status: u16, text: impl Into<String>) -> Self {
        Self { status, fields: vec![("content-type", "text/plain".into())], content: Content::Text(text.into()) }
    }

    fn bytes(length: u64, seed: u64, chunked: bool, trailer: bool) -> Self {
        let fields = vec![("content-type", "application/octet-stream".into())];
        Self { status: 200, fields, content: Content::Bytes { length, seed, chunked, trailer } }
    }
}

/// Reads the request's body and answers it.
async fn exchange(app: &App, wire: &mut Wire, request: &Request) -> Result<(), Lost> {
    let mut body = request.head.body("")?;
    if request.head.has("expect", "100-continue") {
        wire.send(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    }
    let (mut digest, mut length) = (Sha256::new(), 0);
    let echo = request.path == "/echo";
    while let Some(piece) = wire.piece(&mut body).await? {
        length += piece.len() as u64;
        if echo {
            digest.update(&piece);
        }
    }
    let answer = match answer(app, request).await {
        Some(answer) => answer,
        None if echo => Answer::text(200, format!("sha256:{} {length}", hex::encode(digest.finalize()))),
        None => Answer::text(404, "no such page"),
    };
    send(app, wire, request, &answer).await
}

/// What is answered, but to an upload.
async fn answer(app: &App, request: &Request) -> Option<Answer> {
    let now = Instant::now();
    match request.path.as_str() {
        "/healthz" if now < app.healthy || app.unhealthy.is_some_and(|from| now >= from) => {
            return Some(Answer::text(503, "unhealthy"));
        }
        "/healthz" => return Some(Answer::text(200, "healthy")),
        "/ready" => return Some(Answer::text(200, app.ready.to_string())),
        _ => app.requests.set(app.requests.get() + 1),
    }
    if !app.latency.is_zero() {
        sleep(app.latency).await;
    }
    if app.error_every.is_some_and(|every| app.requests.get().is_multiple_of(every.max(1))) {
        return Some(Answer::text(500, "asked to fail"));
    }
    let (_, rest) = request.path.rsplit_once('/')?;
    let seed = request.number("seed");
    match request.path.strip_suffix(rest)? {
        "/" if rest == "version" => Some(Answer::text(200, &app.version)),
        "/" if rest == "trailers" => Some(Answer::bytes(request.number("length"), seed, true, true)),
        "/" if rest == "slow" => {
            sleep(Duration::from_millis(request.number("ms"))).await;
            Some(Answer::text(200, &app.version))
        }
        "/bytes/" => Some(Answer::bytes(rest.parse().ok()?, seed, request.query.contains_key("chunked"), false)),
        "/status/" => Some(Answer::text(rest.parse().ok().filter(|status| (200..600).contains(status))?, "")),
        "/env/" => Some(Answer::text(200, std::env::var(rest).ok()?)),
        "/secret/" => Some(Answer::text(200, fs_err::read_to_string(std::env::var(format!("{rest}_FILE")).ok()?).ok()?)),
        _ => None,
    }
}

/// The head of an answer, without the empty line.
fn head(app: &App, request: &Request, status: u16, fields: &[(&'static str, String)]) -> String {
    let reason = if status == 101 { "Switching Protocols" } else { "As Asked" };
    let mut head = format!("HTTP/1.1 {status} {reason}\r\nx-load-version: {}\r\nx-load-at: {}\r\n", app.version, request.at);
    if let Some(id) = request.head.field("x-load-id") {
        let _ = write!(head, "x-load-id: {id}\r\n");
    }
    for (name, value) in fields {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if status != 101 && (*app.stop.borrow() || request.head.closes()) {
        head.push_str("connection: close\r\n");
    }
    head
}

async fn send(app: &App, wire: &mut Wire, request: &Request, answer: &Answer) -> Result<(), Lost> {
    let mut head = head(app, request, answer.status, &answer.fields);
    let silent = request.head.method == "HEAD" || answer.status == 204 || answer.status == 304;
    match answer.content {
        Content::Text(ref text) => {
            if !matches!(answer.status, 204 | 304) {
                let _ = write!(head, "content-length: {}\r\n", text.len());
            }
            head.push_str("\r\n");
            head.push_str(if silent { "" } else { text });
            wire.send(head.as_bytes()).await
        }
        Content::Bytes { length, seed, chunked, trailer } => {
            let framing = if chunked { "transfer-encoding: chunked".into() } else { format!("content-length: {length}") };
            let _ = write!(head, "{framing}\r\n{}\r\n", if trailer { "trailer: x-load-digest\r\n" } else { "" });
            let mut pending = head.into_bytes();
            let (mut bytes, mut left, mut digest) = (Bytes::new(seed), if silent { 0 } else { length }, Sha256::new());
            while left > 0 {
                let piece = bytes.take(left.min(PIECE_BYTES as u64) as usize);
                left -= piece.len() as u64;
                if trailer {
                    digest.update(&piece);
                }
                if chunked {
                    pending.extend(format!("{:x}\r\n", piece.len()).as_bytes());
                }
                pending.extend(&piece);
                if chunked {
                    pending.extend(b"\r\n");
                }
                wire.send(&pending).await?;
                pending.clear();
            }
            if chunked && !silent {
                pending.extend(b"0\r\n");
                if trailer {
                    pending.extend(format!("x-load-digest: {}\r\n", hex::encode(digest.finalize())).as_bytes());
                }
                pending.extend(b"\r\n");
            }
            if pending.is_empty() { Ok(()) } else { wire.send(&pending).await }
        }
    }
}

/// The text of an event; its data is known to who knows seed and number.
pub fn event(seed: u64, number: u64, version: &str) -> String {
    format!("id: {number}\ndata: {:016x} {version}\n\n", mix(seed, number))
}

/// Ticks at once and then every so many milliseconds.
fn every(milliseconds: u64) -> Interval {
    let mut ticks = interval(Duration::from_millis(milliseconds.max(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// An event stream, until the client goes or the upstream stops.
async fn events(app: &App, wire: &mut Wire, request: &Request) -> Result<(), Lost> {
    let fields = [
        ("content-type", "text/event-stream".into()),
        ("cache-control", "no-store".into()),
        ("transfer-encoding", "chunked".into()),
    ];
    wire.send((head(app, request, 200, &fields) + "\r\n").as_bytes()).await?;
    let last = request.head.field("last-event-id").and_then(|last| last.parse::<u64>().ok());
    let mut number = last.map_or(0, |last| last + 1);
    let mut ticks = every(request.number("interval"));
    let mut stop = app.stop.clone();
    loop {
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => return wire.send(b"0\r\n\r\n").await,
            more = wire.more() => {
                more?;
                return Err(Lost::new(Lost::RESET, "the client has gone"));
            }
            _ = ticks.tick() => {
                let event = event(request.number("seed"), number, &app.version);
                wire.send(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).await?;
                number += 1;
            }
        }
    }
}

async fn websocket(app: &App, wire: &mut Wire, request: &Request) -> Result<(), Lost> {
    let Some(key) = request.head.field("sec-websocket-key").filter(|_| request.head.has("upgrade", "websocket")) else {
        return send(app, wire, request, &Answer::text(426, "this is a WebSocket")).await;
    };
    let fields =
        [("connection", "upgrade".into()), ("upgrade", "websocket".into()), ("sec-websocket-accept", websocket::accept(key))];
    wire.send((head(app, request, 101, &fields) + "\r\n").as_bytes()).await?;
    let mut ticks = every(request.number("push"));
    let mut stop = app.stop.clone();
    let mut number = 0;
    loop {
        tokio::select! {
            biased;
            _ = stop.wait_for(|stop| *stop) => {
                wire.send(&websocket::close(websocket::AWAY, None)).await?;
                let answered = async {
                    while let Some(frame) = websocket::read(wire, true).await? {
                        if frame.kind == websocket::CLOSE {
                            break;
                        }
                    }
                    Ok::<_, Lost>(())
                };
                let _ = timeout(CLOSE_ANSWER, answered).await;
                wire.finish().await;
                return Ok(());
            }
            frame = websocket::read(wire, true) => match frame? {
                None => return Ok(()),
                Some(frame) if frame.kind == websocket::CLOSE => {
                    wire.send(&websocket::encode(websocket::CLOSE, &frame.data, None)).await?;
                    wire.finish().await;
                    return Ok(());
                }
                Some(frame) if frame.kind == websocket::PING => wire.send(&websocket::encode(websocket::PONG, &frame.data, None)).await?,
                Some(frame) if frame.kind == websocket::PONG => (),
                Some(frame) => wire.send(&websocket::encode(frame.kind, &frame.data, None)).await?,
            },
            _ = ticks.tick() => {
                wire.send(&websocket::encode(websocket::TEXT, format!("p {number}").as_bytes(), None)).await?;
                number += 1;
            }
        }
    }
}

/// A listener on a port of 127.0.0.1 that was free.
pub async fn local() -> io::Result<TcpListener> {
    TcpListener::bind("127.0.0.1:0").await
}
