//! WebSockets and event streams: long, and opened again when the server closes them for a restart.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::time::{Interval, MissedTickBehavior, interval, sleep};

use super::super::bytes::{Bytes, mix};
use super::super::report::Kind;
use super::super::upstream::event;
use super::super::websocket::{AWAY, CLOSE, NORMAL, PING, PONG, RESTART, TEXT, accept, close, encode, read};
use super::super::wire::{Body, Head, Lost, Wire};
use super::Session;

/// Lengths of messages in bytes, in turns: every form of the length of a frame.
const MESSAGES: [usize; 8] = [20, 20, 300, 20, 20, 125, 126, 70_000];
/// Before a stream that was closed for a restart is opened again.
const REOPEN: Duration = Duration::from_millis(2);

/// How a stream ended well.
enum End {
    /// We had enough.
    Enough,
    /// The server closed it for a restart.
    Restart,
}

/// One WebSocket after the other.
pub async fn websockets(session: &Session) {
    while let Some(number) = session.begin() {
        ended(session, websocket(session, session.seed(number)).await).await;
    }
}

/// One event stream after the other; events go on where the last one stopped.
pub async fn events(session: &Session) {
    let mut next = 0;
    let seed = session.seed(0);
    while let Some(number) = session.begin() {
        let end = event_stream(session, seed, session.seed(number), &mut next).await;
        ended(session, end).await;
    }
}

async fn ended(session: &Session, end: Result<End, Lost>) {
    match end {
        Ok(end) => {
            let mut book = session.book.borrow_mut();
            book.ended(session.kind);
            book.figures(session.kind).restarts += u64::from(matches!(end, End::Restart));
        }
        Err(lost) => session.lost(lost).await,
    }
    sleep(REOPEN).await;
}

/// What the head of an answer says, whichever way it came.
struct Answer {
    status: u16,
    fields: Vec<(String, String)>,
}

impl Answer {
    fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The status, and whose answer it is.
    fn check(&self, path: &str, id: &str, status: u16) -> Result<(), Lost> {
        if self.status != status {
            return Err(Lost::new(Lost::WRONG_STATUS, format!("{path}: {} instead of {status}", self.status)));
        }
        if self.field("x-load-id") != Some(id) {
            return Err(Lost::new(
                Lost::WRONG_ANSWER,
                format!("{path}: the answer to {:?}, not to {id}", self.field("x-load-id")),
            ));
        }
        Ok(())
    }
}

/// Sends the head of a request over HTTP/1.1 and reads that of its answer.
async fn open(session: &Session, path: &str, id: &str, fields: &str) -> Result<(Wire, Head), Lost> {
    let mut wire = session.wire().await?;
    let head = format!("GET {} HTTP/1.1\r\nhost: {}\r\nx-load-id: {id}\r\n{fields}\r\n", session.path(path), session.host());
    session.timely(path, wire.send(head.as_bytes())).await?;
    let head = session.timely(path, wire.response()).await?;
    Ok((wire, head))
}

fn ticks(session: &Session) -> Interval {
    let mut ticks = interval(Duration::from_millis(session.args.interval.max(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// What is sent as message `number`.
fn message(seed: u64, number: u64) -> Vec<u8> {
    let length = MESSAGES[(number % MESSAGES.len() as u64) as usize];
    let mut text = format!("c {number} ");
    text.push_str(&hex::encode(Bytes::new(mix(seed, number)).take(length)));
    text.truncate(length);
    text.into_bytes()
}

fn mask(seed: u64, number: u64) -> [u8; 4] {
    (mix(seed, !number) as u32).to_be_bytes()
}

/// A WebSocket from its handshake to its close frame: every message echoed in order, every pushed one in order.
async fn websocket(session: &Session, seed: u64) -> Result<End, Lost> {
    let key = STANDARD.encode(Bytes::new(seed).take(16));
    let fields =
        format!("connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: {key}\r\n");
    let opened = Instant::now();
    let path = format!("/ws?push={}", session.args.interval);
    let id = format!("{seed:x}");
    let (mut wire, head) = open(session, &path, &id, &fields).await?;
    Answer { status: head.status, fields: head.fields.clone() }.check(&path, &id, 101)?;
    if head.field("sec-websocket-accept") != Some(&accept(&key))
        || !head.has("upgrade", "websocket")
        || !head.has("connection", "upgrade")
    {
        return Err(Lost::new(Lost::WRONG_ANSWER, format!("{path}: not the answer to the handshake: {:?}", head.fields)));
    }
    let version = head.field("x-load-version").unwrap_or_default().to_owned();
    session.book.borrow_mut().answered(session.kind, opened, &version, None);
    let mut socket = Open { session, seed, version, sent: Vec::new(), echoed: 0, pushed: 0, closing: false };
    let (mut ticks, mut heard) = (ticks(session), Instant::now());
    loop {
        tokio::select! {
            biased;
            () = session.until_stopped(), if !socket.closing => {
                socket.closing = true;
                session.timely("sending", wire.send(&close(NORMAL, Some(mask(seed, 0))))).await?;
            }
            frame = session.timely(&path, read(&mut wire, false)) => {
                let Some(frame) = frame? else {
                    return Err(Lost::new(Lost::NO_CLOSE, format!("{path}: the connection ended")));
                };
                heard = Instant::now();
                match frame.kind {
                    CLOSE => return socket.closed(&mut wire, frame.code()).await,
                    PING => session.timely("sending", wire.send(&encode(PONG, &frame.data, Some(mask(seed, 1))))).await?,
                    PONG => (),
                    _ => socket.received(&frame.data)?,
                }
            }
            _ = ticks.tick(), if !socket.closing => {
                if heard.elapsed() > session.timeout() {
                    return Err(Lost::new(Lost::LATE, format!("{path}: nothing for {} s", session.args.timeout)));
                }
                let number = socket.sent.len() as u64;
                socket.sent.push(Instant::now());
                let sent = session.timely("sending", wire.send(&encode(TEXT, &message(seed, number), Some(mask(seed, number))))).await;
                if let Err(lost) = sent {
                    return socket.rest(&mut wire, lost).await;
                }
            }
        }
    }
}

/// What went over an open WebSocket.
struct Open<'session> {
    session: &'session Session,
    seed: u64,
    version: String,
    sent: Vec<Instant>,
    echoed: u64,
    pushed: u64,
    closing: bool,
}

impl Open<'_> {
    fn received(&mut self, data: &[u8]) -> Result<(), Lost> {
        let wrong = |expected: &[u8]| {
            let (found, expected) = (String::from_utf8_lossy(data), String::from_utf8_lossy(expected));
            Lost::new(Lost::WRONG_MESSAGE, format!("{:.40?} instead of {:.40?}", found, expected))
        };
        let mut book = self.session.book.borrow_mut();
        if data.starts_with(b"p ") {
            let expected = format!("p {}", self.pushed);
            if data != expected.as_bytes() {
                return Err(wrong(expected.as_bytes()));
            }
            self.pushed += 1;
        } else {
            let expected = message(self.seed, self.echoed);
            let sent = self.sent.get(self.echoed as usize);
            let sent = sent.filter(|_| data == expected).ok_or_else(|| wrong(&expected))?;
            self.echoed += 1;
            book.latency(self.session.kind, *sent);
        }
        book.answered(self.session.kind, self.sent.last().copied().unwrap_or_else(Instant::now), &self.version, None);
        book.figures(self.session.kind).messages += 1;
        Ok(())
    }

    /// After a message that could not be sent: the server may have said before that it closes.
    async fn rest(&mut self, wire: &mut Wire, lost: Lost) -> Result<End, Lost> {
        while let Ok(Some(frame)) = self.session.timely("the rest", read(wire, false)).await {
            match frame.kind {
                CLOSE => return self.closed(wire, frame.code()).await,
                PING | PONG => (),
                _ => self.received(&frame.data)?,
            }
        }
        Err(lost)
    }

    /// Accounts for the code, and ends the closing handshake.
    async fn closed(&self, wire: &mut Wire, code: Option<u16>) -> Result<End, Lost> {
        self.session.book.borrow_mut().close_code(code);
        let end = match code {
            Some(NORMAL) if self.closing => Ok(End::Enough),
            Some(AWAY | RESTART) => Ok(End::Restart),
            code => Err(Lost::new(Lost::CLOSE_CODE, code.map_or("none".into(), |code| code.to_string()))),
        };
        if !self.closing {
            // Who has closed may be gone.
            let _ = wire.send(&close(code.unwrap_or(NORMAL), Some(mask(self.seed, 2)))).await;
        }
        let unanswered = self.sent.len() as u64 - self.echoed;
        if unanswered > 0 && matches!(end, Ok(End::Enough)) {
            return Err(Lost::new(Lost::WRONG_MESSAGE, format!("{unanswered} messages were not echoed before the close frame")));
        }
        self.session.book.borrow_mut().figures(self.session.kind).unanswered += unanswered;
        end
    }
}

/// Where events come from.
enum Source {
    One(Wire, Body),
    Two(h2::RecvStream),
}

impl Source {
    /// Asks for the events after `last`.
    async fn open(session: &Session, path: &str, id: &str, last: Option<u64>) -> Result<(Self, Answer), Lost> {
        let accept = "text/event-stream";
        if session.kind == Kind::Sse {
            let last = last.map_or(String::new(), |last| format!("last-event-id: {last}\r\n"));
            let (wire, head) = open(session, path, id, &format!("accept: {accept}\r\n{last}")).await?;
            let body = head.body("GET")?;
            return Ok((Self::One(wire, body), Answer { status: head.status, fields: head.fields }));
        }
        let mut sender = super::h2::open(session).await?;
        let mut head = super::h2::head(session, "GET", path, id).header("accept", accept);
        if let Some(last) = last {
            head = head.header("last-event-id", last);
        }
        let head = head.body(()).map_err(|error| Lost::new(Lost::MALFORMED, error.to_string()))?;
        let (answer, _) = sender.send_request(head, true).map_err(|error| super::h2::lost(&error))?;
        let answer = session.timely(path, async { answer.await.map_err(|error| super::h2::lost(&error)) }).await?;
        let (parts, body) = answer.into_parts();
        let names = parts.headers.keys().map(|name| name.as_str().to_owned());
        let fields = names.filter_map(|name| Some((name.clone(), super::h2::field(&parts.headers, &name)?))).collect();
        Ok((Self::Two(body), Answer { status: parts.status.as_u16(), fields }))
    }

    async fn piece(&mut self) -> Result<Option<bytes::Bytes>, Lost> {
        match self {
            Self::One(wire, body) => wire.piece(body).await,
            Self::Two(body) => super::h2::piece(body).await,
        }
    }
}

/// An event stream until its end: every event once, in order.
async fn event_stream(session: &Session, seed: u64, id: u64, next: &mut u64) -> Result<End, Lost> {
    let path = format!("/sse?seed={seed}&interval={}", session.args.interval);
    let (opened, id) = (Instant::now(), format!("{id:x}"));
    let (mut source, answer) = Source::open(session, &path, &id, next.checked_sub(1)).await?;
    answer.check(&path, &id, 200)?;
    if matches!(&source, Source::One(_, body) if body.until_close()) {
        return Err(Lost::new(Lost::WRONG_ANSWER, format!("{path}: a stream whose end cannot be told from a broken connection")));
    }
    if answer.field("content-type") != Some("text/event-stream") {
        return Err(Lost::new(Lost::WRONG_ANSWER, format!("{path}: {:?}", answer.field("content-type"))));
    }
    let version = answer.field("x-load-version").unwrap_or_default().to_owned();
    session.book.borrow_mut().answered(session.kind, opened, &version, None);
    let mut text = Vec::new();
    loop {
        let piece = tokio::select! {
            biased;
            () = session.until_stopped() => return Ok(End::Enough),
            piece = session.timely(&path, source.piece()) => piece?,
        };
        let Some(piece) = piece else {
            let rest = String::from_utf8_lossy(&text).into_owned();
            return if rest.is_empty() {
                Ok(End::Restart)
            } else {
                Err(Lost::new(Lost::TRUNCATED, format!("{path}: ends inside the event {rest:?}")))
            };
        };
        text.extend(&piece);
        while let Some(end) = text.windows(2).position(|two| two == b"\n\n") {
            let found: Vec<u8> = text.drain(..end + 2).collect();
            if found.starts_with(b":") {
                // A comment keeps the connection alive.
                continue;
            }
            let expected = event(seed, *next, &version);
            if found != expected.as_bytes() {
                let found = String::from_utf8_lossy(&found).into_owned();
                return Err(Lost::new(Lost::WRONG_EVENT, format!("{found:?} instead of {expected:?}")));
            }
            *next += 1;
            let mut book = session.book.borrow_mut();
            book.answered(session.kind, Instant::now(), &version, None);
            book.figures(session.kind).messages += 1;
        }
    }
}
