//! The traffic switch: HTTP in front of the instances of every service, with a table that changes in one step.
//!
//! A [`Table`] says which requests belong to which service, and which of its pools (generations) is live.
//! [`Switch::set`] replaces all of it at one instant: a request is given a pool and counted as one of its requests under
//! the lock that `set` takes, so when `set` returned none begins on a pool that is not live any more, and what is still
//! in flight there is exactly what [`Switch::draining`] says.
//!
//! ```text
//! listener ─▶ connection (hyper: HTTP/1.1, HTTP/2, TLS) ─▶ forward (table → pool → instance) ─▶ upstream (HTTP/1.1)
//!             per worker: one thread, one runtime, its connections both ways; nothing is shared between requests
//! ```
//!
//! [`table`] finds the service, [`pool`] counts and drains, [`headers`] checks and rewrites, [`upstream`] is the client
//! towards instances, [`relay`] carries upgraded connections, [`listen`] gets the sockets. How it behaves in full:
//! docs/switch.md. Not there: HTTP/2 towards instances, HTTP/3, interim answers other than 100 and 101, WebSocket over
//! HTTP/2 (RFC 8441), `Via`.

pub mod access;
mod body;
mod connection;
mod figures;
mod forward;
mod frames;
mod headers;
pub mod listen;
mod metrics;
mod pool;
mod relay;
mod table;
#[cfg(test)]
mod tests;
pub mod tls;
mod upstream;
mod worker;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::pin::Pin;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

pub use figures::{Figures, Histogram};
pub use tls::CertificateFiles;

use crate::config::types::Route;
use crate::error::Problem;
use crate::rollout::target::Address;
use access::{AccessLog, AccessSink, Buffer};
use metrics::Counters;
use pool::{Clock, Pool};
use table::{PoolView, Snapshot};
use worker::{Accepting, Job, Worker, lock};

/// Makes a connection to an instance, to the port its program has.
pub type Dialer = Arc<dyn Fn(Address, u16) -> Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>> + Send + Sync>;

/// A socket that clients connect to.
#[derive(Debug)]
pub struct Listener {
    /// `http`, `https`, or what the user called it.
    pub name: String,
    pub socket: TcpListener,
    pub tls: bool,
}

/// What the switch is told once.
pub struct Settings {
    /// Threads; 0: as many as there are processors.
    pub workers: usize,
    pub limits: Limits,
    pub timeouts: Timeouts,
    /// Whose X-Forwarded-… and Forwarded fields are believed and continued; everybody else's are replaced.
    pub trusted: Vec<Network>,
    /// The first is for clients that name no host, or one that none is for.
    pub certificates: Vec<CertificateFiles>,
    pub access: Option<Box<dyn AccessSink>>,
    /// The wall clock, for the access log.
    pub now: Box<dyn Fn() -> SystemTime + Send + Sync>,
    /// Gets what somebody should know: a new certificate, or one that is broken.
    pub told: Box<dyn Fn(&str) + Send + Sync>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let settings = (&self.workers, &self.limits, &self.timeouts, &self.trusted, &self.certificates);
        f.debug_tuple("Settings").field(&settings).finish()
    }
}

impl Settings {
    /// Defaults, without certificates and access log.
    pub fn new(now: impl Fn() -> SystemTime + Send + Sync + 'static, told: impl Fn(&str) + Send + Sync + 'static) -> Self {
        let (limits, timeouts) = (Limits::default(), Timeouts::default());
        Self {
            workers: 0,
            limits,
            timeouts,
            trusted: Vec::new(),
            certificates: Vec::new(),
            access: None,
            now: Box::new(now),
            told: Box::new(told),
        }
    }
}

/// How much of everything there may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Client connections; at the limit the one idle for longest is closed, and new ones wait in the kernel.
    pub connections: usize,
    /// Bytes of a request's head; at least 8 KiB.
    pub head: usize,
    /// Fields of a request's head; at most 100.
    pub fields: usize,
    /// Bytes of a request's body.
    pub body: Option<u64>,
    /// Requests at once on one HTTP/2 connection.
    pub streams: u32,
    /// Requests that may wait for held services.
    pub held: usize,
    /// Connections to one instance that wait for a request, for each worker.
    pub idle_upstream: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 20_000, head: 64 << 10, fields: 100, body: None, streams: 128, held: 10_000, idle_upstream: 256 }
    }
}

/// How long things may take without anything happening; none of them bounds a transfer that moves. Exact to 0.2 s.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// From the first byte of a head to its last, and for a TLS handshake.
    pub head: Duration,
    /// A client connection that waits for a request.
    pub idle: Duration,
    /// A request of which nothing moves: no byte of its body, no answer, no byte of the answer.
    pub inactivity: Duration,
    /// An event stream without an event.
    pub stream_inactivity: Duration,
    /// A WebSocket or other tunnel without a byte.
    pub tunnel: Duration,
    /// Making a connection to an instance.
    pub connect: Duration,
    /// A connection to an instance that waits for a request; below the 5 s after which widespread servers close theirs.
    pub idle_upstream: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        let (inactivity, stream_inactivity, tunnel) = (seconds(60), seconds(3600), seconds(3600));
        Self {
            head: seconds(10),
            idle: seconds(75),
            inactivity,
            stream_inactivity,
            tunnel,
            connect: seconds(5),
            idle_upstream: seconds(4),
        }
    }
}

/// A network in CIDR form: `10.0.0.0/8`, `::1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl FromStr for Network {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let wrong = || Problem::usage(format!("`{text}` is not a network")).hint("write it like 10.0.0.0/8 or 2001:db8::/32");
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix =
            prefix.map_or(Some(most), |prefix| prefix.parse().ok().filter(|prefix| *prefix <= most)).ok_or_else(wrong)?;
        Ok(Self { address, prefix })
    }
}

impl Network {
    pub fn contains(&self, address: IpAddr) -> bool {
        let bits = |address: IpAddr| match address {
            IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, true),
            IpAddr::V6(address) => (u128::from(address), false),
        };
        let ((own, own_kind), (other, other_kind)) = (bits(self.address), bits(address.to_canonical()));
        own_kind == other_kind && (self.prefix == 0 || (own ^ other) >> (128 - u32::from(self.prefix)) == 0)
    }
}

/// Everything the switch serves.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table {
    /// By name, `shop/prod`.
    pub services: BTreeMap<String, Service>,
}

/// One environment.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    pub routes: Vec<Route>,
    /// By generation. A pool that is not here any more, or no longer live, drains.
    pub pools: BTreeMap<String, Vec<Instance>>,
    /// The pool that gets requests; `None`: 503.
    pub live: Option<String>,
    /// A route of its own to another pool, to be looked at before it is live.
    pub preview: Option<(Route, String)>,
    pub mode: Mode,
    pub drain: Drain,
}

/// One instance of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub id: String,
    pub address: Address,
    /// The program's own.
    pub port: u16,
}

/// What happens to a service's requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    Serve,
    /// They wait until a table serves them, no longer than this; then 503.
    Hold {
        longest: Duration,
    },
    /// 503 with this text and `Retry-After`.
    Maintenance {
        message: String,
    },
}

/// How long a pool that is no longer live may keep what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Requests; then 504, or their answers break off.
    pub requests: Duration,
    /// WebSockets and event streams; then they are cut.
    pub streams: Duration,
    /// Over this time, from the beginning, WebSockets are sent a close frame (1012) and event streams are ended at the
    /// end of an event, so that not all clients come back at once.
    pub spread: Duration,
}

impl Default for Drain {
    fn default() -> Self {
        Self { requests: Duration::from_secs(30), streams: Duration::from_secs(60), spread: Duration::from_secs(15) }
    }
}

/// What is in flight at a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Draining {
    pub requests: u64,
    pub websockets: u64,
    pub streams: u64,
}

/// The switch; clones are the same one. It stops when the last is dropped.
#[derive(Debug, Clone)]
pub struct Switch {
    inner: Arc<Handle>,
}

/// What all parts of a switch share.
struct Inner {
    settings: Settings,
    dial: Dialer,
    clock: Clock,
    workers: Vec<Arc<Worker>>,
    state: Mutex<State>,
    /// Every pool that is in the table or drains.
    pools: Mutex<Arc<Vec<PoolView>>>,
    /// Version of the table.
    changes: watch::Sender<u64>,
    closing: watch::Sender<Option<u64>>,
    closing_since: AtomicU64,
    /// Workers that accept, for each listener.
    accepting: AtomicUsize,
    stop: watch::Sender<bool>,
    tls: Option<tls::Tls>,
    log: Option<AccessLog>,
    counters: Counters,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch").field("settings", &self.settings).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    /// How a pool that vanishes from the table drains: as its service said last.
    drains: BTreeMap<String, Drain>,
}

/// Stops the threads when the last owner lets go.
#[derive(Debug)]
struct Handle(Arc<Inner>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.stop.send_replace(true);
    }
}

impl Inner {
    fn pools(&self) -> Arc<Vec<PoolView>> {
        lock(&self.pools).clone()
    }

    /// By the clock, when a shutdown began.
    fn closing_since(&self) -> Option<u64> {
        Some(self.closing_since.load(Ordering::Relaxed)).filter(|since| *since != 0)
    }
}

impl Switch {
    /// Starts the threads. Errors: certificates that cannot be read, no threads.
    pub fn new(mut settings: Settings, dial: Dialer) -> Result<Self> {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        let count = if settings.workers == 0 { processors() } else { settings.workers };
        settings.limits.head = settings.limits.head.max(8 << 10);
        settings.limits.fields = settings.limits.fields.min(100);
        let tls =
            if settings.certificates.is_empty() { None } else { Some(tls::Tls::load(&settings.certificates, tls::BOTH, None)?) };
        let log =
            settings.access.take().map(AccessLog::start).transpose().context("cannot start the thread of the access log")?;
        let (workers, jobs): (Vec<_>, Vec<_>) = (0..count)
            .map(|index| {
                let (sender, receiver) = mpsc::unbounded_channel();
                (Arc::new(Worker::new(index, log.clone().map(Buffer::new), sender)), receiver)
            })
            .unzip();
        let inner = Arc::new(Inner {
            settings,
            dial,
            clock: Clock::new(),
            workers,
            state: Mutex::default(),
            pools: Mutex::default(),
            changes: watch::Sender::new(0),
            closing: watch::Sender::new(None),
            closing_since: AtomicU64::new(0),
            accepting: AtomicUsize::new(0),
            stop: watch::Sender::new(false),
            tls,
            log,
            counters: Counters::default(),
        });
        let switch = Self { inner: Arc::new(Handle(inner.clone())) };
        for (worker, jobs) in inner.workers.clone().into_iter().zip(jobs) {
            let inner = inner.clone();
            let thread = std::thread::Builder::new().name(format!("switch-{}", worker.index));
            thread.spawn(move || worker::run(inner, worker, jobs)).context("cannot start a thread of the switch")?;
        }
        if inner.tls.is_some() {
            let inner = inner.clone();
            std::thread::Builder::new()
                .name("switch-tls".into())
                .spawn(move || keep_certificates(&inner))
                .context("cannot start a thread of the switch")?;
        }
        Ok(switch)
    }

    /// Accepts connections of `listeners` from now on, beside those it has.
    pub fn serve(&self, listeners: Vec<Listener>) -> Result<()> {
        let inner = &self.inner.0;
        for listener in listeners {
            if listener.tls && inner.tls.is_none() {
                let problem = Problem::usage(format!("the listener `{}` speaks TLS, and there is no certificate", listener.name));
                return Err(problem.hint("name a certificate and its key in the settings of `pipeline serve`").into());
            }
            for worker in &inner.workers {
                worker.tell(Job::Listen(listener.try_clone()?, Accepting::begin(inner)));
            }
        }
        Ok(())
    }

    /// Replaces the whole table in one step; several services change together. A request counts for the pool it was given
    /// before; when this returns, none begins on a pool that is not live. Pools that are no longer live drain.
    ///
    /// Errors: two services claim one route, or a service names a pool it does not have; the old table stays.
    pub fn set(&self, table: Table) -> Result<()> {
        let inner = &self.inner.0;
        let mut state = lock(&inner.state);
        let before = inner.pools();
        let views = views(&table, &before, inner.workers.len())?;
        let find =
            |service: &str, pool: &str| views.iter().find(|view| view.pool.service == service && view.pool.name == pool).cloned();
        let snapshot = Arc::new(Snapshot::compile(&table, find)?);
        let is_wanted = |pool: &Pool| {
            let service = table.services.get(&pool.service);
            service.is_some_and(|service| {
                [service.live.as_ref(), service.preview.as_ref().map(|(_, pool)| pool)].contains(&Some(&pool.name))
            })
        };
        state.version += 1;
        state.drains.extend(table.services.iter().map(|(name, service)| (name.clone(), service.drain)));
        // What comes back must not be cut by the drain of its last time: before it gets requests.
        views.iter().filter(|view| is_wanted(&view.pool)).for_each(|view| view.pool.keep());
        {
            // All at once: while every worker's table is locked no request is between its pool and its count.
            let mut tables: Vec<_> = inner.workers.iter().map(|worker| lock(&worker.table)).collect();
            tables.iter_mut().for_each(|table| **table = snapshot.clone());
        }
        for old in before.iter() {
            let Some(view) = views.iter().find(|view| Arc::ptr_eq(&view.pool, &old.pool)) else { continue };
            let stays = |instance: &Arc<pool::Instance>| view.instances.iter().any(|other| Arc::ptr_eq(other, instance));
            old.instances.iter().filter(|instance| !stays(instance)).for_each(|instance| instance.leave());
        }
        let gone = before
            .iter()
            .filter(|old| !views.iter().any(|view| Arc::ptr_eq(&view.pool, &old.pool)) && old.pool.left() != Draining::default());
        let all: Vec<PoolView> = views.iter().chain(gone).cloned().collect();
        for view in all.iter().filter(|view| !is_wanted(&view.pool)) {
            view.pool.drain(state.drains.get(&view.pool.service).copied().unwrap_or_default(), &inner.clock);
        }
        state.drains.retain(|service, _| all.iter().any(|view| view.pool.service == *service));
        *lock(&inner.pools) = Arc::new(all);
        inner.changes.send_replace(state.version);
        Ok(())
    }

    fn pool(&self, service: &str, pool: &str) -> Option<Arc<Pool>> {
        self.inner
            .0
            .pools()
            .iter()
            .find(|view| view.pool.service == service && view.pool.name == pool)
            .map(|view| view.pool.clone())
    }

    /// What is in flight at a pool, whether it is live or not; `None`: nothing is left.
    pub fn draining(&self, service: &str, pool: &str) -> Option<Draining> {
        self.pool(service, pool).map(|pool| pool.left()).filter(|left| *left != Draining::default())
    }

    /// What a pool did; all zero for one that is not known. A pool that left the table and has drained is forgotten.
    pub fn figures(&self, service: &str, pool: &str) -> Figures {
        self.pool(service, pool).map_or_else(Figures::default, |pool| pool.figures())
    }

    /// All metrics in Prometheus' text format: `pipeline_http_…` and `pipeline_drain_cut_connections_total`.
    pub fn metrics(&self) -> String {
        metrics::text(&self.inner.0)
    }

    /// Stops accepting, lets what is in flight end (`connection: close`, GOAWAY, 1012, end of an event), and returns when
    /// all is over or at the deadline; then everything that is left is cut. The listening sockets stay open for whoever
    /// else has them.
    pub async fn shutdown(&self, deadline: Duration) {
        let inner = &self.inner.0;
        let until = Instant::now() + deadline;
        let since = inner.clock.tick();
        inner.closing_since.store(since, Ordering::Relaxed);
        inner.closing.send_replace(Some(since));
        for view in inner.pools().iter() {
            // Gentle ends need a moment before the deadline.
            view.pool.drain(Drain { requests: deadline, streams: deadline, spread: deadline / 2 }, &inner.clock);
        }
        inner.workers.iter().flat_map(|worker| worker.connections()).for_each(|connection| connection.wake());
        while Instant::now() < until {
            let busy = inner.pools().iter().any(|view| view.pool.left() != Draining::default());
            // In this order: who accepts counts a connection before it says that it accepts no more.
            let accepting = inner.accepting.load(Ordering::SeqCst) > 0;
            if !busy && !accepting && inner.counters.connections.load(Ordering::SeqCst) == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        inner.stop.send_replace(true);
    }
}

/// Every pool of the table; known ones keep their figures, known instances their connections.
fn views(table: &Table, before: &[PoolView], workers: usize) -> Result<Vec<PoolView>> {
    let mut views = Vec::new();
    for (service, settings) in &table.services {
        let named = settings.live.iter().chain(settings.preview.as_ref().map(|(_, pool)| pool));
        if let Some(missing) = named.into_iter().find(|name| !settings.pools.contains_key(*name)) {
            return Err(
                Problem::bug(format!("`{service}` sends requests to the pool `{missing}`, which it does not have")).into()
            );
        }
        for (name, instances) in &settings.pools {
            let known = before.iter().find(|view| view.pool.service == *service && view.pool.name == *name);
            let instance = |wanted: &Instance| {
                let same = known.and_then(|view| view.instances.iter().find(|instance| instance.is(wanted)).cloned());
                same.unwrap_or_else(|| Arc::new(pool::Instance::new(wanted, workers)))
            };
            let pool = known.map_or_else(|| Arc::new(Pool::new(service, name, workers)), |view| view.pool.clone());
            views.push(PoolView { pool, instances: instances.iter().map(instance).collect() });
        }
    }
    Ok(views)
}

/// Reads certificates again when their files change, until the switch stops.
fn keep_certificates(inner: &Inner) {
    let Some(tls) = &inner.tls else { return };
    while !*inner.stop.borrow() {
        std::thread::sleep(Duration::from_secs(1));
        let (new, errors) = tls.reload();
        for path in new {
            inner.counters.tls_reloads.fetch_add(1, Ordering::Relaxed);
            (inner.settings.told)(&format!("the certificate `{}` was read again", path.display()));
        }
        for error in errors {
            inner.counters.tls_reload_failures.fetch_add(1, Ordering::Relaxed);
            (inner.settings.told)(&format!("a new certificate is broken, the one before stays in use: {error:#}"));
        }
    }
}
