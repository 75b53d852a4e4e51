//! From a request to its answer: route, register, choose an instance, send, and send again where that is safe.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, Version, header, request};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;

use super::body::{Body, Guard, own_answer};
use super::connection::Connection;
use super::headers::{self, Most, Outgoing};
use super::pool::{Cut, Instance, Ticket, choose};
use super::relay;
use super::table::Found;
use super::upstream::{Exchange, Failed, Framing, Head, Upload, UploadError, Upstream, Why};
use super::worker::lock;

/// Times a request is sent, or tried to be, before it is answered with 502.
const MOST_ATTEMPTS: usize = 6;
/// Pause before instances that all failed are tried again, times the number of the round.
const ROUND_PAUSE: Duration = Duration::from_millis(100);
/// A request that must not be sent twice gets a connection that was idle for no longer: servers close theirs after seconds.
const FRESH: Duration = Duration::from_millis(1000);
/// What `Retry-After` says, in seconds.
const RETRY_AFTER: &str = "5";

/// What a request is given at one instant.
enum Taken {
    Ticket(Ticket, Arc<[Arc<Instance>]>, usize),
    Hold(String, Duration),
    Answer { status: u16, text: String, fields: Vec<(&'static str, String)> },
}

/// Looks a request up and, in the same locked moment, counts it as one of the pool's. After a table was set no request
/// is given a pool of the one before, as setting takes this lock of every worker.
fn take(connection: &Arc<Connection>, host: &str, path: &str, query: Option<&str>) -> Taken {
    let table = lock(&connection.worker.table);
    let answer = |status, text: &str, fields: Vec<(&'static str, String)>| Taken::Answer { status, text: text.into(), fields };
    match table.find(host, path) {
        Found::Pool(view, strip) => {
            Taken::Ticket(view.pool.enter(connection.worker.index, Some(connection.clone())), view.instances.clone(), strip)
        }
        Found::Hold(service, longest) => Taken::Hold(service.name.clone(), longest),
        Found::Maintenance(message) => answer(503, message, vec![("retry-after", "60".into())]),
        Found::Down(service) => {
            answer(503, &format!("{} has nothing that runs", service.name), vec![("retry-after", RETRY_AFTER.into())])
        }
        Found::Nothing => answer(404, "there is nothing at this address", vec![]),
        Found::Redirect(redirect, rest) => {
            let mut to = redirect.to.clone();
            if to.ends_with('/') {
                to.push_str(rest.trim_start_matches('/'));
                query.iter().for_each(|query| to.extend(["?", query]));
            }
            answer(redirect.status, "", vec![("location", to)])
        }
    }
}

/// Like [`take`], but waits while the service is held, no longer than its bound.
async fn take_or_wait(connection: &Arc<Connection>, host: &str, uri: &http::Uri) -> Taken {
    let mut waiting: Option<(tokio::sync::watch::Receiver<u64>, Instant, Held<'_>)> = None;
    loop {
        if let Some((changes, ..)) = &mut waiting {
            changes.mark_unchanged();
        }
        let (service, longest) = match take(connection, host, uri.path(), uri.query()) {
            Taken::Hold(service, longest) => (service, longest),
            taken => return taken,
        };
        let Some((changes, since, _)) = &mut waiting else {
            let switch = &connection.switch;
            let Some(held) = Held::one_more(connection) else { return held_too_long(&service) };
            // Looked at once more after this, so that no change is missed.
            waiting = Some((switch.changes.subscribe(), Instant::now(), held));
            continue;
        };
        let left = longest.saturating_sub(since.elapsed());
        if left.is_zero() || tokio::time::timeout(left, changes.changed()).await.is_err() {
            return held_too_long(&service);
        }
    }
}

fn held_too_long(service: &str) -> Taken {
    let text = format!("{service} is being replaced and took too long");
    Taken::Answer { status: 503, text, fields: vec![("retry-after", RETRY_AFTER.into())] }
}

/// A request that waits, counted.
struct Held<'a>(&'a Connection);

impl<'a> Held<'a> {
    /// `None` when as many wait as may.
    fn one_more(connection: &'a Connection) -> Option<Self> {
        let counters = &connection.switch.counters;
        let before = counters.held.fetch_add(1, Ordering::Relaxed);
        let held = Self(connection);
        counters.held_total.fetch_add(1, Ordering::Relaxed);
        (before < connection.switch.settings.limits.held as u64).then_some(held)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.switch.counters.held.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A request on its way.
struct Forwarding {
    guard: Guard,
    instances: Arc<[Arc<Instance>]>,
    head: Vec<u8>,
    upload: Option<Upload>,
    is_head: bool,
    expect: bool,
    /// Whether it may be sent twice: idempotent and without a body (RFC 9110, section 9.2.2).
    replayable: bool,
    asked_upgrade: bool,
}

/// Answers a request.
pub(super) async fn answer(connection: Arc<Connection>, mut request: Request<Incoming>) -> Response<Body> {
    let upgraded = request.extensions_mut().remove::<OnUpgrade>();
    let (parts, body) = request.into_parts();
    let mut guard = Guard::new(connection.clone(), &parts);
    let limits = &connection.switch.settings.limits;
    let refused = match connection.ambiguous.load(Ordering::Relaxed) && parts.version < Version::HTTP_2 {
        true => Err((400, "both content-length and transfer-encoding")),
        false => headers::check(&parts, Most { bytes: limits.head, count: limits.fields }),
    };
    let (host, authority) = match refused {
        Ok(checked) => checked,
        Err((status, text)) => return own_answer(guard, status, text, parts.version < Version::HTTP_2, &[]),
    };
    guard.set_host(&host);
    let framing = framing(&body);
    if let (Some(most), Some(Framing::Length(length))) = (limits.body, framing)
        && length > most
    {
        return own_answer(guard, 413, "the body is larger than allowed", parts.version < Version::HTTP_2, &[]);
    }
    let (ticket, instances, strip) = match take_or_wait(&connection, &host, &parts.uri).await {
        Taken::Ticket(ticket, instances, strip) => (ticket, instances, strip),
        Taken::Hold(service, _) => return own_answer(guard, 503, &format!("{service} is held"), false, &[]),
        Taken::Answer { status, text, fields } => {
            let fields: Vec<_> = fields.iter().map(|(name, value)| (*name, value.as_str())).collect();
            // What is left of a body is not read: the connection cannot be used again.
            let close = parts.version < Version::HTTP_2 && (framing.is_some() || connection.switch.closing_since().is_some());
            return own_answer(guard, status, &text, close, &fields);
        }
    };
    guard.ticket = Some(ticket);
    let forwarding = prepare(guard, instances, &parts, &authority, strip, body);
    match forwarding.send(&connection, &host, &parts).await {
        Ok((forwarding, upstream, head)) => reply(&connection, forwarding, upstream, head, upgraded, parts.version),
        Err((guard, status, text, unread)) => {
            let close = unread || connection.switch.closing_since().is_some();
            own_answer(guard, status, text, close && parts.version < Version::HTTP_2, &[])
        }
    }
}

/// How the end of a request's body is known; `None` when it has none.
fn framing(body: &Incoming) -> Option<Framing> {
    match body.size_hint().exact() {
        _ if body.is_end_stream() => None,
        Some(0) => None,
        Some(length) => Some(Framing::Length(length)),
        None => Some(Framing::Chunked),
    }
}

fn prepare(
    guard: Guard,
    instances: Arc<[Arc<Instance>]>,
    parts: &request::Parts,
    authority: &Bytes,
    strip: usize,
    body: Incoming,
) -> Forwarding {
    let connection = &guard.connection;
    let framing = framing(&body);
    // A body of no bytes is told to be one where a method usually has one (RFC 9110, section 8.6).
    let told = framing.or((parts.headers.contains_key(header::CONTENT_LENGTH)
        || matches!(parts.method, Method::POST | Method::PUT | Method::PATCH))
    .then_some(Framing::Length(0)));
    let head = Outgoing { parts, authority, client: connection.client, strip, body: told }.write();
    let upload = framing.map(|framing| Upload::new(body, framing == Framing::Chunked, connection.switch.settings.limits.body));
    Forwarding {
        instances,
        head,
        is_head: parts.method == Method::HEAD,
        expect: parts.headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue")),
        replayable: upload.is_none() && parts.method.is_idempotent(),
        asked_upgrade: headers::upgrade(parts).is_some(),
        upload,
        guard,
    }
}

/// A request that failed: what is noted, status and text, and whether some of its body is still to be read.
type Failure = (Guard, u16, &'static str, bool);

impl Forwarding {
    /// Sends it until there is an answer, or sending again would not be safe or useful.
    async fn send(
        mut self,
        connection: &Arc<Connection>,
        host: &str,
        parts: &request::Parts,
    ) -> Result<(Self, Upstream, Head), Failure> {
        let (switch, worker) = (&connection.switch, connection.worker.index);
        let (mut tried, mut fresh, mut round) = (Vec::new(), false, 0);
        for attempt in 0..MOST_ATTEMPTS {
            let Some(ticket) = self.guard.ticket.as_mut() else { break };
            let now = switch.clock.now();
            let turn = connection.worker.turn.fetch_add(1, Ordering::Relaxed);
            let Some(instance) = choose(&self.instances, &tried, now, turn) else {
                round += 1;
                tokio::time::sleep(ROUND_PAUSE * round).await;
                tried.clear();
                self.move_to_live_pool(connection, host, parts);
                continue;
            };
            ticket.assign(Some(instance.clone()));
            let progress = |ticket: &Ticket| ticket.expect_progress(&switch.clock, Some(switch.settings.timeouts.inactivity));
            progress(ticket);
            let longest = if self.replayable {
                switch.settings.timeouts.idle_upstream
            } else {
                FRESH.min(switch.settings.timeouts.idle_upstream)
            };
            let idle = if fresh { None } else { instance.take_idle(worker, now, longest) };
            let mut upstream = match idle {
                Some(upstream) => upstream,
                None => match connect(connection, &instance).await {
                    Some(upstream) => upstream,
                    None => {
                        ticket.connect_failed();
                        instance.failed(switch.clock.now());
                        tried.push(instance);
                        continue;
                    }
                },
            };
            let failed = match upstream.send(&self.head, &mut self.upload, self.is_head, self.expect, ticket, progress).await {
                Ok(head) => return Ok((self, upstream, head)),
                Err(failed) => failed,
            };
            let untouched = self.upload.as_ref().is_none_or(|upload| upload.taken() == 0);
            let safe = matches!(failed.why, Why::Broken) && !failed.answered && (!failed.sent && untouched || self.replayable);
            // One that an instance dies of is not given to all of them.
            if !safe || !upstream.used && failed.sent && attempt > 0 || attempt + 1 == MOST_ATTEMPTS {
                return Err(self.fail(failed));
            }
            ticket.retried();
            match upstream.used {
                true => fresh = true,
                false => tried.push(instance),
            }
        }
        let unread = self.leaves_unread();
        Err((self.guard, 502, "no instance could be reached", unread))
    }

    /// Nothing of it was sent yet: when another pool is live by now, or this one has other instances, it goes there.
    fn move_to_live_pool(&mut self, connection: &Arc<Connection>, host: &str, parts: &request::Parts) {
        let Some(ticket) = &self.guard.ticket else { return };
        let is_current = !ticket.pool().is_draining() && self.instances.iter().any(|instance| !instance.is_gone());
        if is_current || self.upload.as_ref().is_some_and(|upload| upload.taken() > 0) {
            return;
        }
        if let Taken::Ticket(ticket, instances, _) = take(connection, host, parts.uri.path(), parts.uri.query()) {
            (self.guard.ticket, self.instances) = (Some(ticket), instances);
        }
    }

    fn leaves_unread(&self) -> bool {
        self.upload.as_ref().is_some_and(|upload| !upload.is_done())
    }

    fn fail(mut self, failed: Failed) -> Failure {
        let (status, text) = match failed.why {
            Why::Broken => (502, "the instance closed the connection without an answer"),
            Why::Malformed(why) => (502, why),
            Why::Upload(UploadError::TooLarge) => (413, "the body is larger than allowed"),
            Why::Upload(_) => (400, "the body of the request broke off or is malformed"),
            Why::Cut(Cut::Now, _) => (504, "the instance was replaced and did not answer in time"),
            Why::Cut(_, true) => (408, "the body of the request stalled"),
            Why::Cut(..) => (504, "the instance did not answer in time"),
        };
        self.guard.error = text;
        self.guard.received = self.upload.as_ref().map_or(0, Upload::taken);
        let unread = self.leaves_unread();
        (self.guard, status, text, unread)
    }
}

async fn connect(connection: &Connection, instance: &Instance) -> Option<Upstream> {
    if instance.is_gone() {
        return None;
    }
    let dialing = (connection.switch.dial)(instance.address.clone(), instance.port);
    let stream = tokio::time::timeout(connection.switch.settings.timeouts.connect, dialing).await.ok()?.ok()?;
    // Whoever took so long to answer may have the address since a moment ago.
    if instance.is_gone() {
        return None;
    }
    instance.connected();
    Some(Upstream::new(stream))
}

/// What the client gets of an instance's answer.
fn reply(
    connection: &Arc<Connection>,
    forwarding: Forwarding,
    upstream: Upstream,
    mut head: Head,
    upgraded: Option<OnUpgrade>,
    version: Version,
) -> Response<Body> {
    let Forwarding { mut guard, upload, asked_upgrade, .. } = forwarding;
    let switching = head.status == StatusCode::SWITCHING_PROTOCOLS;
    headers::clean_answer(&mut head.headers, switching);
    if switching {
        let Some(upgraded) = upgraded.filter(|_| asked_upgrade) else {
            return own_answer(
                guard,
                502,
                "the instance changed the protocol without being asked",
                version < Version::HTTP_2,
                &[],
            );
        };
        guard.answered(101);
        let is_websocket =
            head.headers.get(header::UPGRADE).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"websocket"));
        tokio::spawn(relay::relay(upgraded, upstream, guard, is_websocket));
        let mut answer = Response::new(Body::nothing());
        (*answer.status_mut(), *answer.headers_mut()) = (head.status, head.headers);
        return answer;
    }
    let events = head.headers.get(header::CONTENT_TYPE).is_some_and(|value| is_events(value.as_bytes()));
    guard.answered(head.status.as_u16());
    let body = Body::of(Exchange::new(upstream, upload, head.framing, head.keep_alive), guard, events);
    let mut answer = Response::new(body);
    (*answer.status_mut(), *answer.headers_mut()) = (head.status, head.headers);
    if connection.switch.closing_since().is_some() && version < Version::HTTP_2 {
        answer.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
    }
    answer
}

/// `text/event-stream`, with or without parameters.
fn is_events(value: &[u8]) -> bool {
    let kind = value.split(|byte| *byte == b';').next().unwrap_or_default();
    kind.trim_ascii().eq_ignore_ascii_case(b"text/event-stream")
}
