//! One client connection: which protocol it speaks, how long it may take, and when it has to go.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;

use super::body::Body;
use super::headers::{self, Client};
use super::worker::Worker;
use super::{Inner, forward};

/// What an HTTP/2 connection with prior knowledge begins with (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Requests of an HTTP/2 connection that its client reset before an answer, above those it let finish: beyond, it is an attack (CVE-2023-44487).
const MOST_RESETS: u32 = 200;
/// On shutdown an HTTP/1 connection waits this long for a request, which is answered with `connection: close`: closing at once would lose one that is on its way.
const LAST_REQUEST_MS: u64 = 1500;

/// How long a client may go on sending a body that is not wanted.
const LINGER: Duration = Duration::from_secs(2);

/// What a connection is doing.
const IDLE: u8 = 0;
/// Part of a request's head is here.
const HEAD: u8 = 1;
const BUSY: u8 = 2;

/// What the worker's tick, the requests and the driver share of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub switch: Arc<Inner>,
    pub worker: Arc<Worker>,
    pub client: Client,
    pub is_h2: bool,
    phase: AtomicU8,
    /// By the clock, since when it is in this phase.
    since: AtomicU64,
    /// Since when the client takes nothing; 0: it does.
    blocked: AtomicU64,
    in_flight: AtomicU32,
    finished: AtomicU32,
    reset: AtomicU32,
    /// It has to end, whatever is in flight.
    killed: AtomicBool,
    /// An answer broke off: end with a reset, so that no client takes it for whole.
    aborted: AtomicBool,
    /// Part of a body may still come that nobody reads.
    unread: AtomicBool,
    /// The head has both content-length and transfer-encoding; hyper would hide the first (RFC 9112, section 6.1).
    pub ambiguous: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl Connection {
    fn new(switch: Arc<Inner>, worker: Arc<Worker>, client: Client, is_h2: bool) -> Self {
        let since = AtomicU64::new(switch.clock.now());
        let (phase, blocked) = (AtomicU8::new(IDLE), AtomicU64::new(0));
        let (in_flight, finished, reset) = Default::default();
        let (killed, aborted, unread, ambiguous) = Default::default();
        let waker = Mutex::default();
        Self {
            switch,
            worker,
            client,
            is_h2,
            phase,
            since,
            blocked,
            in_flight,
            finished,
            reset,
            killed,
            aborted,
            unread,
            ambiguous,
            waker,
        }
    }

    /// A request begins.
    pub fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.phase.store(BUSY, Ordering::Relaxed);
    }

    /// A request ended; `done`: its answer was handed on whole.
    pub fn leave(&self, done: bool) {
        let counter = if done { &self.finished } else { &self.reset };
        counter.fetch_add(1, Ordering::Relaxed);
        if self.in_flight.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.phase.store(IDLE, Ordering::Relaxed);
            self.since.store(self.switch.clock.now(), Ordering::Relaxed);
        }
        if self.is_h2 && self.reset.load(Ordering::Relaxed) > MOST_RESETS + self.finished.load(Ordering::Relaxed) {
            self.kill();
        }
    }

    /// Its end has to be a reset.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
    }

    /// The last request's body is not read to its end.
    pub fn leave_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    pub fn kill(&self) {
        self.killed.store(true, Ordering::Release);
        self.wake();
    }

    pub fn wake(&self) {
        if let Some(waker) = self.waker.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
            waker.wake();
        }
    }

    /// Since when it waits for a request; `None` when it does not.
    pub fn idle_since(&self) -> Option<u64> {
        (self.phase.load(Ordering::Relaxed) == IDLE).then(|| self.since.load(Ordering::Relaxed))
    }

    /// Ends what takes too long.
    pub fn tick(&self, now: u64) {
        let timeouts = &self.switch.settings.timeouts;
        let over = |since: u64, limit: Duration| now.saturating_sub(since) > limit.as_millis() as u64;
        let since = self.since.load(Ordering::Relaxed);
        let blocked = self.blocked.load(Ordering::Relaxed);
        let closing = self.switch.closing_since();
        let late = match self.phase.load(Ordering::Relaxed) {
            IDLE => {
                over(since, timeouts.idle)
                    || closing.is_some_and(|closing| now.saturating_sub(since.max(closing)) > LAST_REQUEST_MS)
            }
            HEAD => over(since, timeouts.head),
            _ => false,
        };
        if late || blocked != 0 && over(blocked, timeouts.inactivity) {
            self.kill();
        }
    }
}

/// A connection's bytes, with or without TLS.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// The stream hyper gets: it notes what moves.
struct Io {
    stream: Stream,
    connection: Arc<Connection>,
    /// Which of the two fields that exclude each other the head has so far; only kept while a head comes in.
    scan: Scan,
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let io = &mut *self;
        let polled = match &mut io.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        };
        let connection = &io.connection;
        if !connection.is_h2 && buffer.filled().len() > before {
            let phase = connection.phase.load(Ordering::Relaxed);
            if phase == IDLE {
                connection.phase.store(HEAD, Ordering::Relaxed);
                connection.since.store(connection.switch.clock.now(), Ordering::Relaxed);
                io.scan = Scan::default();
            }
            if phase != BUSY && io.scan.see(&buffer.filled()[before..]) {
                connection.ambiguous.store(true, Ordering::Relaxed);
            }
        }
        polled
    }
}

impl Io {
    fn note_write<T>(&self, polled: Poll<T>) -> Poll<T> {
        let blocked = &self.connection.blocked;
        match polled.is_pending() {
            true if blocked.load(Ordering::Relaxed) == 0 => blocked.store(self.connection.switch.clock.now(), Ordering::Relaxed),
            false if blocked.load(Ordering::Relaxed) != 0 => blocked.store(0, Ordering::Relaxed),
            _ => {}
        }
        polled
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        };
        self.note_write(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, slices),
        };
        self.note_write(polled)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = match &mut self.stream {
            Stream::Plain(_) => Poll::Ready(Ok(())),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        };
        self.note_write(polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        let stream = match &self.stream {
            Stream::Plain(stream) => stream,
            Stream::Tls(stream) => stream.get_ref().0,
        };
        if self.connection.aborted.load(Ordering::Relaxed) {
            let _ = rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
        } else if self.connection.unread.load(Ordering::Relaxed) && !self.connection.is_h2 {
            let _ = stream.as_fd().try_clone_to_owned().map(|copy| tokio::spawn(linger(copy.into())));
        }
    }
}

/// Reads what a client still sends after its answer: closing at once would reset the connection, and the answer could be
/// lost with it (RFC 9112, section 9.6).
async fn linger(stream: std::net::TcpStream) {
    let Ok(mut stream) = TcpStream::from_std(stream) else { return };
    let _ = stream.shutdown().await;
    let mut bytes = vec![0; 16 << 10];
    let rest = async { while matches!(stream.read(&mut bytes).await, Ok(1..)) {} };
    let _ = tokio::time::timeout(LINGER, rest).await;
}

/// Looks for two fields that exclude each other in the head of a request.
#[derive(Debug, Default)]
struct Scan {
    /// The first bytes of the line that is being read, in lower case.
    line: [u8; 18],
    have: usize,
    length: bool,
    encoding: bool,
    ended: bool,
}

impl Scan {
    /// Whether both are there.
    fn see(&mut self, mut bytes: &[u8]) -> bool {
        while !self.ended && !bytes.is_empty() {
            let end = memchr::memchr(b'\n', bytes);
            let line = &bytes[..end.unwrap_or(bytes.len())];
            for byte in line.iter().take(self.line.len() - self.have) {
                self.line[self.have] = byte.to_ascii_lowercase();
                self.have += 1;
            }
            let Some(end) = end else { break };
            self.ended = matches!(&self.line[..self.have], b"" | b"\r") && (self.length || self.encoding);
            self.length |= self.line[..self.have].starts_with(b"content-length:");
            self.encoding |= self.line[..self.have].starts_with(b"transfer-encoding:");
            self.have = 0;
            bytes = &bytes[end + 1..];
        }
        self.length && self.encoding
    }
}

/// Answers the requests of a connection.
struct Handler(Arc<Connection>);

impl hyper::service::Service<Request<Incoming>> for Handler {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let connection = self.0.clone();
        Box::pin(async move { Ok(forward::answer(connection, request).await) })
    }
}

/// Serves an accepted connection to its end.
pub(super) async fn serve(switch: Arc<Inner>, worker: Arc<Worker>, stream: TcpStream, peer: SocketAddr, tls: bool) {
    let _ = stream.set_nodelay(true);
    let address = peer.ip().to_canonical();
    let client = Client { address, tls, trusted: headers::is_trusted(address, &switch.settings.trusted) };
    if tls {
        let Some(config) = switch.tls.as_ref().map(|tls| tls.config()) else { return };
        let handshake = tokio_rustls::TlsAcceptor::from(config).accept(stream);
        let Ok(Ok(stream)) = tokio::time::timeout(switch.settings.timeouts.head, handshake).await else {
            switch.counters.tls_failures.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        drive(Arc::new(Connection::new(switch, worker, client, is_h2)), Stream::Tls(Box::new(stream))).await;
    } else {
        let Some(is_h2) = speaks_h2(&switch, &stream).await else { return };
        drive(Arc::new(Connection::new(switch, worker, client, is_h2)), Stream::Plain(stream)).await;
    }
}

/// Waits for the first bytes and looks whether they are HTTP/2's; `None` when none come in time: that of an idle
/// connection, or that of a head when three quarters of all connections there may be are taken.
async fn speaks_h2(switch: &Inner, stream: &TcpStream) -> Option<bool> {
    let mut first = [0; PREFACE.len()];
    let mut peek = async || {
        loop {
            let count = stream.peek(&mut first).await.ok().filter(|count| *count > 0)?;
            if count == PREFACE.len() || !PREFACE.starts_with(&first[..count]) {
                return Some(first == PREFACE);
            }
            // It stays readable: look again when there may be more.
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let mut closing = switch.closing.subscribe();
    let peeked = async {
        tokio::select! {
            first = peek() => first,
            // Whoever has said nothing for a while after a shutdown began will not.
            _ = async {
                let _ = closing.wait_for(Option::is_some).await;
                tokio::time::sleep(Duration::from_millis(LAST_REQUEST_MS)).await;
            } => None,
        }
    };
    tokio::pin!(peeked);
    let (timeouts, start) = (&switch.settings.timeouts, tokio::time::Instant::now());
    loop {
        if let Ok(peeked) = tokio::time::timeout(timeouts.head.min(timeouts.idle), &mut peeked).await {
            return peeked;
        }
        // One that is silent costs little, and may stay as long as there is room.
        let crowded = switch.counters.connections.load(Ordering::Relaxed) * 4 > switch.settings.limits.connections as u64 * 3;
        if crowded || start.elapsed() >= timeouts.idle {
            return None;
        }
    }
}

/// Lets hyper serve until the client, a time-out or a shutdown ends the connection.
async fn drive(connection: Arc<Connection>, stream: Stream) {
    let number = connection.worker.add_connection(connection.clone());
    let io = TokioIo::new(Io { stream, connection: connection.clone(), scan: Scan::default() });
    let limits = &connection.switch.settings.limits;
    let handler = Handler(connection.clone());
    if connection.is_h2 {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder.timer(TokioTimer::new()).max_concurrent_streams(limits.streams).max_header_list_size(limits.head as u32);
        builder.initial_stream_window_size(256 << 10).initial_connection_window_size(1 << 20).max_send_buf_size(256 << 10);
        let mut served = Box::pin(builder.serve_connection(io, handler));
        until_over(&connection, |context, ending| {
            if ending {
                served.as_mut().graceful_shutdown();
            }
            served.as_mut().poll(context).map(drop)
        })
        .await;
    } else {
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(None)
            .half_close(false)
            .max_header_size(limits.head)
            .max_buf_size(limits.head.max(128 << 10));
        let mut served = Box::pin(builder.serve_connection(io, handler).with_upgrades());
        until_over(&connection, |context, _| served.as_mut().poll(context).map(drop)).await;
    }
    connection.worker.remove_connection(number);
}

/// Polls until it is ready or the connection is killed; the second argument is true once, when a shutdown begins.
async fn until_over(connection: &Connection, mut poll: impl FnMut(&mut Context<'_>, bool) -> Poll<()>) {
    let mut told = false;
    std::future::poll_fn(|context| {
        if connection.killed.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        {
            let mut waker = connection.waker.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *waker = Some(context.waker().clone());
            }
        }
        let ending = !told && connection.switch.closing_since().is_some();
        told |= ending;
        poll(context, ending)
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_fields_are_found_in_whatever_order_and_pieces() {
        for (head, wanted) in [
            ("POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", true),
            ("POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\nx: y\ncontent-length: 3\n\n", true),
            ("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nContent-Length: 3\r\n", false),
            ("POST / HTTP/1.1\r\nContent-Length: 30\r\n\r\nx\r\nTransfer-Encoding: chunked\r\n", false),
            ("GET /content-length:transfer-encoding: HTTP/1.1\r\nhost: content-length:\r\n\r\n", false),
        ] {
            for step in [1, 7, 1000] {
                let mut scan = Scan::default();
                let found = head.as_bytes().chunks(step).map(|piece| scan.see(piece)).last();
                assert_eq!(found, Some(wanted), "{head:?} in pieces of {step}");
            }
        }
    }
}
