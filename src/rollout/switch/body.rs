//! Answers on their way to the client, and what is noted when one ends.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use http::{Method, Response, StatusCode, Version, request};
use http_body::{Frame, SizeHint};

use super::access::Line;
use super::connection::Connection;
use super::pool::{Cut, Kind, Ticket};
use super::upstream::{Exchange, Piece};

/// The methods that are counted by name; all others are one.
pub(super) const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "OTHER"];

fn method_index(method: &Method) -> u8 {
    METHODS.iter().position(|name| *name == method.as_str()).unwrap_or(METHODS.len() - 1) as u8
}

/// A request from its arrival to the end of its answer. Dropping it counts and logs.
#[derive(Debug)]
pub(super) struct Guard {
    pub connection: Arc<Connection>,
    pub ticket: Option<Ticket>,
    started: Instant,
    method: u8,
    /// 0 as long as there is none.
    status: u16,
    pub received: u64,
    pub sent: u64,
    /// Why it ended early.
    pub error: &'static str,
    logged: Option<Box<Logged>>,
    host: String,
    /// Its answer is handed on whole.
    done: bool,
}

#[derive(Debug)]
struct Logged {
    method: Method,
    uri: http::Uri,
    version: Version,
    user_agent: Option<http::HeaderValue>,
    referer: Option<http::HeaderValue>,
}

impl Guard {
    pub fn new(connection: Arc<Connection>, parts: &request::Parts) -> Self {
        connection.enter();
        let logged = connection.worker.log.is_some().then(|| {
            let text = |name| parts.headers.get(name).cloned();
            let (user_agent, referer) = (text(http::header::USER_AGENT), text(http::header::REFERER));
            Box::new(Logged { method: parts.method.clone(), uri: parts.uri.clone(), version: parts.version, user_agent, referer })
        });
        let (method, started) = (method_index(&parts.method), Instant::now());
        let (received, sent, host) = (0, 0, String::new());
        Self { connection, ticket: None, started, method, status: 0, received, sent, error: "", logged, host, done: false }
    }

    /// Under which host it is logged.
    pub fn set_host(&mut self, host: &str) {
        if self.logged.is_some() {
            host.clone_into(&mut self.host);
        }
    }

    /// There is an answer of this status.
    pub fn answered(&mut self, status: u16) {
        self.status = status;
        match &self.ticket {
            Some(ticket) => ticket.answered(self.method, status, self.started.elapsed()),
            None => self.connection.switch.counters.answered_without_pool(status),
        }
    }

    fn log(&self) {
        let (Some(log), Some(logged)) = (&self.connection.worker.log, &self.logged) else { return };
        let took = self.started.elapsed();
        let now = (self.connection.switch.settings.now)();
        let text = |value: &'_ Option<http::HeaderValue>| {
            value.as_ref().map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let (user_agent, referer) = (text(&logged.user_agent), text(&logged.referer));
        let ticket = self.ticket.as_ref();
        log.add(&Line {
            time: now.checked_sub(took).unwrap_or(now),
            client: self.connection.client.address,
            protocol: match logged.version {
                Version::HTTP_2 => "HTTP/2",
                Version::HTTP_10 => "HTTP/1.0",
                _ => "HTTP/1.1",
            },
            tls: self.connection.client.tls,
            method: logged.method.as_str(),
            host: &self.host,
            path: logged.uri.path(),
            query: logged.uri.query(),
            user_agent: user_agent.as_deref(),
            referer: referer.as_deref(),
            status: if self.status == 0 { 499 } else { self.status },
            service: ticket.map_or("", |ticket| &ticket.pool().service),
            pool: ticket.map_or("", |ticket| &ticket.pool().name),
            instance: ticket.and_then(Ticket::instance).map_or("", |instance| &instance.id),
            took,
            received: self.received,
            sent: self.sent,
            error: if self.error.is_empty() && !self.done { "the client went away" } else { self.error },
        });
    }

    /// Its answer, or all of its tunnel, was handed on.
    pub fn done(&mut self) {
        self.done = true;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.status == 0
            && let Some(ticket) = &self.ticket
        {
            ticket.left(self.method);
        }
        self.log();
        self.ticket = None;
        self.connection.leave(self.done);
    }
}

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Body {
    content: Content,
    guard: Option<Guard>,
    /// Why it will break off, once what is there is flushed.
    breaks: Option<(&'static str, bool)>,
}

#[derive(Debug)]
enum Content {
    /// What is left of it.
    Whole(Bytes),
    Exchange(Box<Exchange>),
    /// The event stream's last bytes, to know where an event ends.
    Events(Box<Exchange>, [u8; 3]),
}

/// An answer of the switch itself. It closes an HTTP/1 connection when `close`.
pub(super) fn own_answer(
    mut guard: Guard,
    status: u16,
    text: &str,
    close: bool,
    fields: &[(&'static str, &str)],
) -> Response<Body> {
    guard.answered(status);
    let connection = guard.connection.clone();
    let content = Content::Whole(if text.is_empty() { Bytes::new() } else { Bytes::from(format!("{text}\n")) });
    let mut answer = Response::new(Body { content, guard: Some(guard), breaks: None });
    *answer.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let plain = [("content-type", "text/plain; charset=utf-8"), ("cache-control", "no-store")];
    for (name, value) in plain.iter().filter(|_| !text.is_empty()).chain(fields) {
        if let Ok(value) = http::HeaderValue::from_str(value) {
            answer.headers_mut().insert(*name, value);
        }
    }
    if close {
        connection.leave_unread();
        answer.headers_mut().insert(http::header::CONNECTION, http::HeaderValue::from_static("close"));
    }
    answer
}

impl Body {
    /// Without content, as that of a 101; whoever has the guard notes the end.
    pub fn nothing() -> Self {
        Self { content: Content::Whole(Bytes::new()), guard: None, breaks: None }
    }

    /// Of an instance's answer. What is here whole already gives its connection back at once.
    pub fn of(mut exchange: Exchange, guard: Guard, events: bool) -> Self {
        let mut body = Self { content: Content::Whole(Bytes::new()), guard: Some(guard), breaks: None };
        body.content = match exchange.take_whole() {
            Some(whole) => {
                body.give_back(&mut exchange);
                Content::Whole(whole)
            }
            None if events => {
                body.ticket().inspect(|ticket| ticket.becomes(Kind::Stream));
                Content::Events(Box::new(exchange), *b"\n\n\n")
            }
            None => Content::Exchange(Box::new(exchange)),
        };
        body.expect_progress();
        body
    }

    fn ticket(&self) -> Option<&Ticket> {
        self.guard.as_ref().and_then(|guard| guard.ticket.as_ref())
    }

    fn expect_progress(&self) {
        if let Some((guard, ticket)) = self.guard.as_ref().and_then(|guard| Some((guard, guard.ticket.as_ref()?))) {
            let timeouts = &guard.connection.switch.settings.timeouts;
            let within = match self.content {
                Content::Whole(_) => None,
                Content::Exchange(_) => Some(timeouts.inactivity),
                Content::Events(..) => Some(timeouts.stream_inactivity),
            };
            ticket.expect_progress(&guard.connection.switch.clock, within);
        }
    }

    /// The exchange is over: its connection waits for the next one.
    fn give_back(&mut self, exchange: &mut Exchange) {
        let upstream = exchange.finish();
        let Some(guard) = &mut self.guard else { return };
        guard.received = exchange.received();
        if exchange.leaves_unread() {
            guard.connection.leave_unread();
        }
        if let (Some(mut upstream), Some(instance)) = (upstream, guard.ticket.as_ref().and_then(Ticket::instance)) {
            let (worker, switch) = (guard.connection.worker.index, &guard.connection.switch);
            (upstream.idle_since, upstream.used) = (switch.clock.now(), true);
            instance.put_idle(worker, upstream, switch.settings.limits.idle_upstream);
        }
    }

    /// Nothing more comes.
    fn end(&mut self) {
        match std::mem::replace(&mut self.content, Content::Whole(Bytes::new())) {
            Content::Exchange(mut exchange) | Content::Events(mut exchange, _) => self.give_back(&mut exchange),
            Content::Whole(_) => {}
        }
        if let Some(mut guard) = self.guard.take() {
            guard.done();
        }
    }

    /// It breaks off; the client must not take it for whole.
    fn abort(&mut self, why: &'static str, instance: bool) -> io::Error {
        if let Some(mut guard) = self.guard.take() {
            guard.error = why;
            guard.connection.abort();
            if instance {
                guard.ticket.iter().for_each(Ticket::broke);
            }
        }
        self.content = Content::Whole(Bytes::new());
        io::Error::other(why)
    }

    /// The next piece of an exchange, or why there will be none.
    fn poll_exchange(&mut self, context: &mut Context<'_>) -> Poll<Result<Piece, (&'static str, bool)>> {
        let (exchange, tail) = match &mut self.content {
            Content::Whole(_) => return Poll::Ready(Ok(Piece::End)),
            Content::Exchange(exchange) => (exchange, None),
            Content::Events(exchange, tail) => (exchange, Some(tail)),
        };
        let ticket = self.guard.as_ref().and_then(|guard| guard.ticket.as_ref());
        let received = exchange.received();
        let ends_here = tail.as_ref().is_some_and(|tail| ends_event(&tail[..]));
        match (ticket.map_or(Cut::No, Ticket::cut), tail) {
            (Cut::Now, _) => return Poll::Ready(Err(("the deadline of the drain is over", false))),
            (Cut::Gently, Some(_)) if ends_here => return Poll::Ready(Ok(Piece::End)),
            (cut, Some(tail)) => match exchange.poll_piece(context) {
                Poll::Ready(Ok(Piece::Data(mut data))) => {
                    let end = last_event_end(tail, &data).filter(|_| cut == Cut::Gently);
                    data.truncate(end.unwrap_or(data.len()));
                    for byte in &data[data.len().saturating_sub(3)..] {
                        *tail = [tail[1], tail[2], *byte];
                    }
                    return Poll::Ready(Ok(Piece::Data(data)));
                }
                Poll::Ready(other) => return Poll::Ready(other.map_err(|_| ("the instance broke off", true))),
                Poll::Pending => {}
            },
            (_, None) => match exchange.poll_piece(context) {
                Poll::Ready(piece) => return Poll::Ready(piece.map_err(|_| ("the instance broke off", true))),
                Poll::Pending => {}
            },
        }
        // The other direction may be what moves.
        if let Some(guard) = self.guard.as_ref().filter(|_| exchange.received() > received) {
            let (clock, within) = (&guard.connection.switch.clock, guard.connection.switch.settings.timeouts.inactivity);
            ticket.inspect(|ticket| ticket.expect_progress(clock, Some(within)));
        }
        match ticket.map_or(Cut::No, |ticket| ticket.poll_cut(context)) {
            Cut::Now => Poll::Ready(Err(("the deadline of the drain is over", false))),
            Cut::Stalled => Poll::Ready(Err(("the answer stalled", true))),
            Cut::Gently if ends_here => Poll::Ready(Ok(Piece::End)),
            Cut::Gently | Cut::No => Poll::Pending,
        }
    }
}

/// Whether an event ends with these bytes: an empty line, of whichever line ends (HTML, section 9.2.5).
fn ends_event(tail: &[u8]) -> bool {
    [&b"\n\n"[..], b"\n\r\n", b"\r\r"].iter().any(|end| tail.ends_with(end))
}

/// Where in `data`, which follows `tail`, the last event ends.
fn last_event_end(tail: &[u8; 3], data: &[u8]) -> Option<usize> {
    (1..=data.len()).rev().find(|end| {
        let mut last = *tail;
        data[end.saturating_sub(3)..*end].iter().for_each(|byte| last = [last[1], last[2], *byte]);
        matches!(data[end - 1], b'\n' | b'\r') && ends_event(&last)
    })
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let body = &mut *self;
        if let Some((why, instance)) = body.breaks.take() {
            return Poll::Ready(Some(Err(body.abort(why, instance))));
        }
        if let Content::Whole(whole) = &mut body.content {
            let whole = std::mem::take(whole);
            if let Some(guard) = &mut body.guard {
                guard.sent += whole.len() as u64;
            }
            body.end();
            return Poll::Ready((!whole.is_empty()).then_some(Ok(Frame::data(whole))));
        }
        match std::task::ready!(body.poll_exchange(context)) {
            Ok(Piece::End) => {
                body.end();
                Poll::Ready(None)
            }
            Ok(Piece::Data(data)) => {
                if let Some(guard) = &mut body.guard {
                    guard.sent += data.len() as u64;
                }
                body.expect_progress();
                let ended = matches!(&body.content, Content::Exchange(exchange) if exchange.length() == Some(0));
                if ended {
                    body.end();
                }
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Ok(Piece::Trailers(trailers)) => Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
            Err(why) => {
                // Hyper drops what it has not written when a body fails, and flushes when one waits.
                body.breaks = Some(why);
                context.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(&self.content, Content::Whole(whole) if whole.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        let length = match &self.content {
            Content::Whole(whole) => Some(whole.len() as u64),
            Content::Exchange(exchange) | Content::Events(exchange, _) => exchange.length(),
        };
        length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl Drop for Body {
    fn drop(&mut self) {
        // An empty body, and one that answers HEAD, is never polled.
        if matches!(&self.content, Content::Whole(_)) {
            self.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_events_end() {
        for (tail, data, wanted) in [
            (b"abc", "data: x\n\n", Some(9)),
            (b"abc", "data: x\n\ndata", Some(9)),
            (b"abc", "data: x\r\n\r\ndata: y\r\n", Some(11)),
            (b"c\r\n", "\r\nx", Some(2)),
            (b"ab\n", "\nx\n", Some(1)),
            (b"abc", "\r\rx", Some(2)),
            (b"abc", "data: x\n", None),
        ] {
            assert_eq!(last_event_end(tail, data.as_bytes()), wanted, "{data:?}");
        }
    }
}
