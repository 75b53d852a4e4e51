//! Requests over HTTP/1.1: small ones, uploads, large downloads.

use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use super::super::bytes::Bytes;
use super::super::report::Kind;
use super::super::wire::{Head, Idle, Lost, Wire};
use super::Session;
use super::request::{By, Check, Request, Upload};

/// One request after the other, on one connection as long as it lasts.
pub async fn run(session: &Session) {
    let mut kept = None;
    let mut pace = session.pace(0);
    while session.more() {
        pace.due().await;
        let Some(number) = session.begin() else { break };
        let seed = session.seed(number);
        let request = match session.kind {
            Kind::Upload => Request::upload(number, seed),
            Kind::Large => Request::large(seed),
            _ => Request::some(number, seed),
        };
        let mut wire = match ready(session, kept.take()).await {
            Ok(wire) => wire,
            Err(lost) => {
                session.lost(lost).await;
                continue;
            }
        };
        let sent = Instant::now();
        match exchange(session, &mut wire, &request).await {
            Ok(Done { by, bytes, closes }) => {
                session.good(sent, &by, bytes);
                if closes {
                    session.book.borrow_mut().figures(session.kind).closed_by_server += 1;
                } else {
                    kept = Some(wire);
                }
            }
            Err(lost) => session.lost(lost).await,
        }
    }
    if let Some(mut wire) = kept {
        wire.finish().await;
    }
}

/// The connection that was kept, or a new one.
async fn ready(session: &Session, kept: Option<Wire>) -> Result<Wire, Lost> {
    if let Some(mut wire) = kept {
        match wire.idle() {
            Idle::Open => return Ok(wire),
            Idle::Closed => session.book.borrow_mut().figures(session.kind).closed_idle += 1,
            Idle::Unasked(bytes) => return Err(Lost::new(Lost::UNASKED, format!("{bytes} bytes or more on an idle connection"))),
        }
    }
    session.wire().await
}

struct Done {
    by: By,
    bytes: u64,
    closes: bool,
}

async fn exchange(session: &Session, wire: &mut Wire, request: &Request) -> Result<Done, Lost> {
    session.timely("sending", wire.send(head(session, request).as_bytes())).await?;
    let mut early = None;
    if let Some(upload) = &request.upload {
        if upload.waits {
            early = wait(session, wire, &request.path).await?;
        }
        if early.is_none() {
            send_body(session, wire, upload, request.seed).await?;
        }
    }
    let head = match early {
        Some(head) => head,
        None => session.timely(&request.path, final_head(wire)).await?,
    };
    let mut body = head.body(request.method)?;
    let mut check = Check::new(request, head.status, |name| head.field(name).map(str::to_owned))?;
    let closes = head.closes() || body.until_close();
    let mut throttle = (session.kind == Kind::Large).then(|| Throttle::new(session.args.large_rate));
    while let Some(piece) = session.timely(&request.path, wire.piece(&mut body)).await? {
        check.piece(&piece)?;
        if let Some(throttle) = &mut throttle {
            throttle.read(piece.len()).await;
        }
    }
    let by = check.by.clone();
    let bytes = check.end(|name| body.trailers.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone()))?;
    Ok(Done { by, bytes, closes })
}

/// The head of a request, whole.
fn head(session: &Session, request: &Request) -> String {
    let path = session.path(&request.path);
    let mut head = format!("{} {path} HTTP/1.1\r\nhost: {}\r\nx-load-id: {}\r\n", request.method, session.host(), request.id());
    match request.upload {
        None => head.push_str("te: trailers\r\n"),
        Some(Upload { chunked: true, .. }) => head.push_str("transfer-encoding: chunked\r\n"),
        Some(Upload { length, .. }) => head.push_str(&format!("content-length: {length}\r\n")),
    }
    if request.upload.is_some_and(|upload| upload.waits) {
        head.push_str("expect: 100-continue\r\n");
    }
    head + "\r\n"
}

/// Waits for 100 (RFC 9110, 10.1.1); the head of a final answer that comes instead.
async fn wait(session: &Session, wire: &mut Wire, path: &str) -> Result<Option<Head>, Lost> {
    let head = session.timely(path, wire.response()).await?;
    Ok((head.status != 100).then_some(head))
}

/// The head after all interim ones.
async fn final_head(wire: &mut Wire) -> Result<Head, Lost> {
    loop {
        let head = wire.response().await?;
        if head.status >= 200 {
            return Ok(head);
        }
        if head.status == 101 {
            return Err(Lost::new(Lost::WRONG_STATUS, "101 to a request for no upgrade"));
        }
    }
}

async fn send_body(session: &Session, wire: &mut Wire, upload: &Upload, seed: u64) -> Result<(), Lost> {
    let (mut bytes, mut left) = (Bytes::new(seed), upload.length);
    while left > 0 {
        let piece = bytes.take(left.min(Upload::PIECE) as usize);
        left -= piece.len() as u64;
        let piece = match upload.chunked {
            true => [format!("{:x}\r\n", piece.len()).as_bytes(), &piece, b"\r\n"].concat(),
            false => piece,
        };
        session.timely("sending the body", wire.send(&piece)).await?;
    }
    if upload.chunked {
        session.timely("sending the body", wire.send(b"0\r\n\r\n")).await?;
    }
    Ok(())
}

/// Reads no faster than so many bytes per second.
pub struct Throttle {
    rate: f64,
    start: Instant,
    read: u64,
}

impl Throttle {
    pub fn new(rate: u64) -> Self {
        Self { rate: rate.max(1) as f64, start: Instant::now(), read: 0 }
    }

    async fn read(&mut self, bytes: usize) {
        self.read += bytes as u64;
        sleep_until((self.start + Duration::from_secs_f64(self.read as f64 / self.rate)).into()).await;
    }
}
