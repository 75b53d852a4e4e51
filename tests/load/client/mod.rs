//! The client: connections that are kept, each with one request after the other, none repeated.
//!
//! | seen | counted as |
//! |---|---|
//! | the expected answer, whole, every byte right, with the request's own id | good |
//! | `connection: close` after it, or GOAWAY without an error: a new connection for the next request | `closed_by_server` |
//! | the connection ends while nothing is asked | `closed_idle` |
//! | WebSocket closed with 1001 or 1012, event stream ended after a whole event: opened again, events go on where they stopped | `restarts` |
//! | everything else: other statuses, refused, reset, truncated, wrong bytes, other close codes, no close frame, late | lost |
//!
//! When it is to stop, what was begun is still finished.

mod h1;
mod h2;
pub mod request;
mod stream;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until};

use self::request::By;
use super::report::{Book, Kind, Report};
use super::wire::{Lost, Socket, Wire};

/// How often the file that ends it is looked for.
const LOOK: Duration = Duration::from_millis(20);
/// Before a new connection after one that could not be opened or was lost: a dead server is not asked as fast as possible.
const AFTER_LOSS: Duration = Duration::from_millis(10);

/// What is sent where, how fast, how long.
#[derive(Debug, Clone, clap::Args)]
pub struct ClientArgs {
    /// Where to connect to
    #[arg(long, value_name = "ADDRESS")]
    pub target: SocketAddr,
    /// Host to ask for; default: the address
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,
    /// Put before each path
    #[arg(long, value_name = "PATH", default_value = "")]
    pub prefix: String,
    /// Use TLS
    #[arg(long, requires = "ca")]
    pub tls: bool,
    /// The certificates to trust (PEM)
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,
    /// Connections in all; at least one for each word of --mix
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub connections: usize,
    /// Requests per second of all connections together; without it as fast as answers come. WebSockets, event streams and slow downloads have their own pace
    #[arg(long, value_name = "R", conflicts_with = "closed")]
    pub rate: Option<f64>,
    /// As fast as answers come (the default, said aloud)
    #[arg(long)]
    pub closed: bool,
    /// What the connections are used for, in turns; a word several times gets more of them
    #[arg(long, value_enum, value_delimiter = ',', default_value = "h1,h2,upload,ws,sse,sse2,large")]
    pub mix: Vec<Kind>,
    /// Requests at a time on a connection of HTTP/2
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub streams: usize,
    /// Bytes per second at which a large download is read
    #[arg(long, value_name = "N", default_value_t = 4 << 20)]
    pub large_rate: u64,
    /// Milliseconds between two messages or events
    #[arg(long, value_name = "MS", default_value_t = 50)]
    pub interval: u64,
    /// Stop after so long
    #[arg(long, value_name = "S", required_unless_present_any = ["until_file", "limit"])]
    pub seconds: Option<f64>,
    /// Stop when the file is there
    #[arg(long, value_name = "FILE")]
    pub until_file: Option<PathBuf>,
    /// Stop each connection after so many requests, or opened WebSockets or event streams
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
    /// What is not answered by then is lost; time without a byte of a stream
    #[arg(long, value_name = "S", default_value_t = 60.0)]
    pub timeout: f64,
    /// Write the report there
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Write a line per answer there: when sent, when answered, version, kind, when the upstream read it (or 0)
    #[arg(long, value_name = "FILE")]
    pub answers: Option<PathBuf>,
    /// Make this file once every kind had an answer
    #[arg(long, value_name = "FILE")]
    pub ready_file: Option<PathBuf>,
}

/// Runs until it is to stop, and writes the report.
pub fn run(args: &ClientArgs) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = tokio::task::LocalSet::new().block_on(&runtime, load(args))?;
    if let Some(path) = &args.report {
        let temporary = path.with_extension("new");
        fs_err::write(&temporary, serde_json::to_vec_pretty(&report)?)?;
        fs_err::rename(temporary, path)?;
    }
    Ok(report)
}

/// The same inside a runtime: for tests.
pub async fn load(args: &ClientArgs) -> Result<Report> {
    if args.connections < args.mix.len() || args.streams == 0 {
        bail!("{} connections are too few for the mix of {}", args.connections, args.mix.len());
    }
    let book = Rc::new(RefCell::new(Book::new(args.answers.as_deref())?));
    let (sender, stop) = watch::channel(false);
    let (tls, tls2) = (tls(args, b"http/1.1")?, tls(args, b"h2")?);
    let kinds: Vec<_> = args.mix.iter().copied().cycle().take(args.connections).collect();
    // How many ask at the rate together.
    let askers: usize = kinds.iter().map(|kind| asks(*kind, args)).sum();
    let (mut sessions, mut first) = (Vec::new(), 0);
    for (number, kind) in kinds.into_iter().enumerate() {
        let session = Session {
            kind,
            number: number as u64,
            args: Rc::new(args.clone()),
            book: book.clone(),
            stop: stop.clone(),
            tls: if matches!(kind, Kind::H2 | Kind::Sse2) { tls2.clone() } else { tls.clone() },
            period: args.rate.filter(|_| asks(kind, args) > 0).map(|rate| Duration::from_secs_f64(askers as f64 / rate)),
            place: (first, askers),
            begun: Rc::default(),
        };
        first += asks(kind, args);
        sessions.push(tokio::task::spawn_local(session.run()));
    }
    let watcher = tokio::task::spawn_local(watch_over(args.clone(), book.clone(), sender));
    for session in sessions {
        session.await.context("a connection's task failed")?;
    }
    watcher.abort();
    // Done with, or just aborted.
    let _ = watcher.await;
    let book = Rc::into_inner(book).context("a connection is still open")?;
    book.into_inner().finish()
}

/// How many of a connection ask at the common rate.
fn asks(kind: Kind, args: &ClientArgs) -> usize {
    match kind {
        Kind::H1 | Kind::Upload => 1,
        Kind::H2 => args.streams,
        Kind::Ws | Kind::Sse | Kind::Sse2 | Kind::Large => 0,
    }
}

/// Says that it goes well, and when it is to stop.
async fn watch_over(args: ClientArgs, book: Rc<RefCell<Book>>, stop: watch::Sender<bool>) {
    let end = args.seconds.map(|seconds| Instant::now() + Duration::from_secs_f64(seconds));
    let mut ready = args.ready_file.clone();
    loop {
        sleep(LOOK).await;
        let all = args.mix.iter().all(|kind| book.borrow_mut().successes(*kind) > 0);
        if let Some(path) = ready.take_if(|_| all) {
            // Who waits for the file sees that it does not come.
            let _ = fs_err::write(path, "");
        }
        let file = args.until_file.as_ref().is_some_and(|path| path.exists());
        if file || end.is_some_and(|end| Instant::now() >= end) {
            stop.send_replace(true);
        }
    }
}

/// The settings of TLS with one protocol; none without TLS.
fn tls(args: &ClientArgs, protocol: &[u8]) -> Result<Option<Arc<rustls::ClientConfig>>> {
    let Some(path) = args.ca.as_ref().filter(|_| args.tls) else { return Ok(None) };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&fs_err::read(path)?) {
        roots.add(certificate.with_context(|| format!("`{}` is no certificate", path.display()))?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(Some(Arc::new(config)))
}

/// One connection that is kept, or opened again where that is no loss.
#[derive(Debug, Clone)]
struct Session {
    kind: Kind,
    number: u64,
    args: Rc<ClientArgs>,
    book: Rc<RefCell<Book>>,
    stop: watch::Receiver<bool>,
    tls: Option<Arc<rustls::ClientConfig>>,
    /// Between two requests.
    period: Option<Duration>,
    /// Place among those that ask at the common rate, and how many they are.
    place: (usize, usize),
    /// Requests begun.
    begun: Rc<Cell<u64>>,
}

impl Session {
    async fn run(self) {
        match self.kind {
            Kind::H1 | Kind::Upload | Kind::Large => h1::run(&self).await,
            Kind::H2 => h2::run(&self).await,
            Kind::Ws => stream::websockets(&self).await,
            Kind::Sse | Kind::Sse2 => stream::events(&self).await,
        }
    }

    fn stopped(&self) -> bool {
        *self.stop.borrow()
    }

    async fn until_stopped(&self) {
        let mut stop = self.stop.clone();
        // The sender lives as long as the client.
        let _ = stop.wait_for(|stop| *stop).await;
    }

    /// The number of the next request; none when it is to stop.
    fn begin(&self) -> Option<u64> {
        let number = self.begun.get();
        if self.stopped() || self.args.limit.is_some_and(|limit| number >= limit) {
            return None;
        }
        self.begun.set(number + 1);
        Some(number)
    }

    /// Whether more requests are to come.
    fn more(&self) -> bool {
        !self.stopped() && self.args.limit.is_none_or(|limit| self.begun.get() < limit)
    }

    fn pace(&self, stream: usize) -> Pace {
        let offset = self.period.unwrap_or_default().mul_f64((self.place.0 + stream) as f64 / self.place.1.max(1) as f64);
        Pace { period: self.period, next: Instant::now() + offset }
    }

    /// What makes a request of this session known to both ends.
    fn seed(&self, number: u64) -> u64 {
        self.number << 40 | number
    }

    fn host(&self) -> String {
        self.args.host.clone().unwrap_or_else(|| self.args.target.to_string())
    }

    fn path(&self, path: &str) -> String {
        format!("{}{path}", self.args.prefix)
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.args.timeout)
    }

    /// Gives a step its time.
    async fn timely<T>(&self, what: &str, step: impl Future<Output = Result<T, Lost>>) -> Result<T, Lost> {
        let late = |_| Lost::new(Lost::LATE, format!("{what}: nothing for {} s", self.args.timeout));
        tokio::time::timeout(self.timeout(), step).await.map_err(late).flatten()
    }

    fn good(&self, sent: Instant, by: &By, bytes: u64) {
        self.book.borrow_mut().good(self.kind, sent, by, bytes);
    }

    /// Counts a loss, and waits a moment.
    async fn lost(&self, lost: Lost) {
        self.book.borrow_mut().lost(self.kind, lost);
        sleep(AFTER_LOSS).await;
    }

    async fn connect(&self) -> Result<Box<dyn Socket>, Lost> {
        self.timely("connecting", async {
            let socket = TcpStream::connect(self.args.target).await.map_err(|error| Lost::io(&error))?;
            socket.set_nodelay(true).map_err(|error| Lost::io(&error))?;
            self.book.borrow_mut().figures(self.kind).connections += 1;
            let Some(config) = &self.tls else { return Ok(Box::new(socket) as Box<dyn Socket>) };
            let host = self.args.host.clone().unwrap_or_else(|| self.args.target.ip().to_string());
            let name = ServerName::try_from(host).map_err(|error| Lost::new(Lost::TLS, error.to_string()))?;
            let connected = tokio_rustls::TlsConnector::from(config.clone()).connect(name, socket).await;
            let socket = connected.map_err(|error| Lost::new(Lost::TLS, error.to_string()))?;
            let wanted = config.alpn_protocols.first().map(Vec::as_slice);
            // A server of HTTP/1.1 alone may know no protocol names (RFC 7301, 3.2).
            if wanted == Some(b"h2") && socket.get_ref().1.alpn_protocol() != wanted {
                return Err(Lost::new(Lost::TLS, "the server does not speak h2"));
            }
            Ok(Box::new(socket))
        })
        .await
    }

    async fn wire(&self) -> Result<Wire, Lost> {
        Ok(Wire::new(self.connect().await?))
    }
}

/// When the next request is due.
#[derive(Debug)]
struct Pace {
    period: Option<Duration>,
    next: Instant,
}

impl Pace {
    /// Waits until then. Requests that were held up are made up for, but for those of more than a second.
    async fn due(&mut self) {
        let Some(period) = self.period else { return };
        let now = Instant::now();
        if self.next > now {
            sleep_until(self.next.into()).await;
        } else if now - self.next > Duration::from_secs(1) {
            self.next = now;
        }
        self.next += period;
    }
}
