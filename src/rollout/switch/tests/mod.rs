//! The switch between real sockets: raw clients, and instances written by hand where bytes matter.

mod bad;
mod drain;
mod forwarding;
mod routing;
mod secure;
mod upgrades;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use super::*;

/// No test waits longer for anything; only what hangs gets there.
const PATIENCE: Duration = Duration::from_secs(30);

/// An instance: a listener whose connections are each given to `serve` on a thread of their own.
#[derive(Clone)]
struct Origin {
    address: SocketAddr,
    /// Connections so far.
    accepted: Arc<AtomicUsize>,
}

impl Origin {
    fn start(serve: impl Fn(&mut Conn) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, accepted, serve) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)), Arc::new(serve));
        let count = accepted.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                count.fetch_add(1, Ordering::SeqCst);
                let (serve, stream) = (serve.clone(), stream.unwrap());
                stream.set_nodelay(true).unwrap();
                std::thread::spawn(move || serve(&mut Conn { stream, buffer: Vec::new() }));
            }
        });
        Self { address, accepted }
    }

    /// Answers every request with 200 and `text`.
    fn saying(text: &'static str) -> Self {
        Self::start(move |conn| {
            while conn.request().is_some() {
                conn.answer(text);
            }
        })
    }

    /// Answers every request with its own head and body.
    fn echo() -> Self {
        Self::start(|conn| {
            while let Some(head) = conn.request() {
                let body = conn.body(&head);
                let text = [head.as_bytes(), &body].concat();
                conn.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", text.len()).as_bytes());
                conn.send(&text);
            }
        })
    }

    /// Nothing listens there.
    fn gone() -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        Self { address, accepted: Arc::default() }
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }
}

/// One side of a raw connection.
struct Conn {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Conn {
    fn to(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream, buffer: Vec::new() }
    }

    /// Errors are for the other side to notice.
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref());
    }

    fn answer(&mut self, text: &str) {
        self.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len()));
    }

    /// Reads more; false at the end or when the connection broke.
    fn more(&mut self) -> bool {
        let mut bytes = [0; 16 << 10];
        let count = self.stream.read(&mut bytes).unwrap_or(0);
        self.buffer.extend_from_slice(&bytes[..count]);
        count > 0
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        self.buffer.drain(..count).collect()
    }

    /// Up to and with `end`; `None` when the connection ends before.
    fn until(&mut self, end: &str) -> Option<String> {
        loop {
            if let Some(at) = self.buffer.windows(end.len()).position(|bytes| bytes == end.as_bytes()) {
                return Some(String::from_utf8_lossy(&self.take(at + end.len())).into_owned());
            }
            if !self.more() {
                return None;
            }
        }
    }

    /// A head, in lower case but for the first line.
    fn request(&mut self) -> Option<String> {
        self.until("\r\n\r\n")
    }

    fn exactly(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count && self.more() {}
        self.take(count.min(self.buffer.len()))
    }

    /// The body that belongs to `head`, chunks put together.
    fn body(&mut self, head: &str) -> Vec<u8> {
        if let Some(length) = field(head, "content-length") {
            return self.exactly(length.parse().unwrap());
        }
        let mut body = Vec::new();
        while field(head, "transfer-encoding").is_some() {
            let Some(line) = self.until("\r\n") else { break };
            let size = usize::from_str_radix(line.trim().split(';').next().unwrap(), 16).unwrap();
            if size == 0 {
                // Trailers are part of what an echo shows.
                while let Some(line) = self.until("\r\n").filter(|line| line != "\r\n") {
                    body.extend_from_slice(line.as_bytes());
                }
                break;
            }
            body.extend_from_slice(&self.exactly(size));
            self.exactly(2);
        }
        body
    }

    /// Everything until the end; whether the end was clean, not a reset.
    fn rest(&mut self) -> (String, bool) {
        let mut bytes = std::mem::take(&mut self.buffer);
        let clean = self.stream.read_to_end(&mut bytes);
        (String::from_utf8_lossy(&bytes).into_owned(), clean.is_ok())
    }

    /// A whole answer: status and body.
    fn response(&mut self) -> Option<(u16, String)> {
        let (status, _, body) = self.whole_response()?;
        Some((status, body))
    }

    fn whole_response(&mut self) -> Option<(u16, String, String)> {
        let head = self.request()?;
        let body = String::from_utf8_lossy(&self.body(&head)).into_owned();
        Some((head.split(' ').nth(1)?.parse().ok()?, head, body))
    }

    fn get(&mut self, path: &str) -> Option<(u16, String)> {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: shop.test\r\n\r\n"));
        self.response()
    }
}

/// The value of a field of a head.
fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines()
        .find_map(|line| line.split_once(':').filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()))
}

/// A switch on a free port, and what it was told to log.
struct Fixture {
    switch: Switch,
    address: SocketAddr,
    log: Arc<Mutex<Vec<u8>>>,
}

struct Sink(Arc<Mutex<Vec<u8>>>);

impl AccessSink for Sink {
    fn write(&mut self, lines: &[u8]) {
        self.0.lock().unwrap().extend_from_slice(lines);
    }
}

fn dialer() -> Dialer {
    Arc::new(|address, _| {
        Box::pin(async move {
            match address {
                Address::Tcp(address) => TcpStream_::connect(address).await,
                Address::Shim(path) => panic!("no shim at {}", path.display()),
            }
        })
    })
}

use tokio::net::TcpStream as TcpStream_;

impl Fixture {
    fn start(change: impl FnOnce(&mut Settings)) -> Self {
        let log = Arc::new(Mutex::default());
        let mut settings = Settings::new(SystemTime::now, |_| {});
        settings.workers = 2;
        settings.access = Some(Box::new(Sink(log.clone())));
        change(&mut settings);
        let switch = Switch::new(settings, dialer()).unwrap();
        let listener = Listener::bind("http", ([127, 0, 0, 1], 0).into(), false).unwrap();
        let address = listener.address().unwrap();
        switch.serve(vec![listener]).unwrap();
        Self { switch, address, log }
    }

    /// In front of the instances, everything.
    fn of(origins: &[&Origin]) -> Self {
        let fixture = Self::start(|_| {});
        fixture.live("a", origins);
        fixture
    }

    /// Sets a table of one service whose one pool is live.
    fn live(&self, pool: &str, origins: &[&Origin]) {
        self.switch.set(table(service(&[(pool, origins)], pool))).unwrap();
    }

    fn client(&self) -> Conn {
        Conn::to(self.address)
    }

    /// What comes back for `bytes`, until the connection ends.
    fn raw(&self, bytes: &str) -> String {
        let mut client = self.client();
        client.send(bytes);
        client.rest().0
    }

    fn figures(&self) -> Figures {
        self.switch.figures("shop/prod", "a")
    }

    /// The log, parsed, once it has `count` lines.
    fn log(&self, count: usize) -> Vec<serde_json::Value> {
        eventually("lines in the log", || {
            let text = self.log.lock().unwrap().clone();
            let lines: Vec<serde_json::Value> = text
                .split(|byte| *byte == b'\n')
                .filter(|line| !line.is_empty())
                .map(|line| serde_json::from_slice(line).unwrap())
                .collect();
            (lines.len() >= count).then_some(lines)
        })
    }
}

fn service(pools: &[(&str, &[&Origin])], live: &str) -> Service {
    let instance = |(number, origin): (usize, &&Origin)| Instance {
        id: format!("i{number}"),
        address: Address::Tcp(origin.address),
        port: origin.address.port(),
    };
    let pools =
        pools.iter().map(|(name, origins)| ((*name).to_owned(), origins.iter().enumerate().map(instance).collect())).collect();
    Service {
        routes: vec![Route::default()],
        pools,
        live: Some(live.into()),
        preview: None,
        mode: Mode::Serve,
        drain: Drain::default(),
    }
}

fn table(service: Service) -> Table {
    Table { services: BTreeMap::from([("shop/prod".to_owned(), service)]) }
}

fn route(host: Option<&str>, path: &str) -> Route {
    Route { host: host.map(str::to_owned), path: path.into(), ..Route::default() }
}

/// Looks until there is something, as long as it takes within [`PATIENCE`].
fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "no {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A runtime for tests of asynchronous calls.
fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
