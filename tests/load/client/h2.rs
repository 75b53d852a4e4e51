//! Requests and uploads over HTTP/2, several at a time on each connection (RFC 9113).
//!
//! After a GOAWAY without an error the requests in flight still have to be answered; the next one goes to a new connection.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes as Piece;
use h2::client::SendRequest;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Version};

use super::super::bytes::Bytes;
use super::super::wire::Lost;
use super::Session;
use super::request::{By, Check, Request, Upload};

/// Bytes that may be on the way in a stream, and in a connection: as browsers have it, more than the default.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Why a stream's worker has ended.
enum End {
    /// Nothing more is to be asked.
    Enough,
    /// The connection takes no more requests; with an error that nobody may have met yet.
    Closed { goaway: bool, error: Option<Lost> },
}

/// One connection after the other, each as long as it lasts.
pub async fn run(session: &Session) {
    while session.more() {
        let sender = match open(session).await {
            Ok(sender) => sender,
            Err(lost) => {
                // An attempt.
                let _ = session.begin();
                session.lost(lost).await;
                continue;
            }
        };
        let whole = Rc::new(Cell::new(true));
        let worker = |stream| tokio::task::spawn_local(requests(session.clone(), sender.clone(), stream, whole.clone()));
        let workers: Vec<_> = (0..session.args.streams).map(worker).collect();
        drop(sender);
        let (mut closed, mut away, mut failure) = (false, false, None);
        for worker in workers {
            match worker.await {
                Ok(End::Enough) => (),
                Ok(End::Closed { goaway, error }) => (closed, away, failure) = (true, away || goaway, failure.or(error)),
                Err(error) => session.lost(Lost::new(Lost::STREAM, error.to_string())).await,
            }
        }
        if let Some(lost) = failure.filter(|_| whole.get()) {
            // Nothing was in flight, and it is no way to end a connection nevertheless.
            let _ = session.begin();
            session.lost(lost).await;
        }
        let mut book = session.book.borrow_mut();
        let figures = book.figures(session.kind);
        figures.closed_by_server += u64::from(closed && away);
        figures.closed_idle += u64::from(closed && !away);
    }
}

/// A new connection.
pub async fn open(session: &Session) -> Result<SendRequest<Piece>, Lost> {
    let socket = session.connect().await?;
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(STREAM_WINDOW).initial_connection_window_size(CONNECTION_WINDOW).enable_push(false);
    let opened = async { builder.handshake(socket).await.map_err(|error| lost(&error)) };
    let (sender, connection) = session.timely("the HTTP/2 preface", opened).await?;
    // How it ended is told to the streams.
    tokio::task::spawn_local(async move { connection.await.unwrap_or_default() });
    Ok(sender)
}

/// One request after the other, while the connection takes them.
/// `whole` becomes false with the first loss.
async fn requests(session: Session, mut sender: SendRequest<Piece>, stream: usize, whole: Rc<Cell<bool>>) -> End {
    let mut pace = session.pace(stream);
    while session.more() {
        pace.due().await;
        let ready =
            session.timely("a free stream", async { Ok(std::future::poll_fn(|context| sender.poll_ready(context)).await) }).await;
        match ready {
            Ok(Ok(())) => (),
            Ok(Err(error)) => {
                let goaway = error.is_go_away() && error.reason() == Some(Reason::NO_ERROR);
                let error = error.reason().filter(|reason| *reason != Reason::NO_ERROR).map(|_| lost(&error));
                return End::Closed { goaway, error };
            }
            Err(late) => return End::Closed { goaway: false, error: Some(late) },
        }
        let Some(number) = session.begin() else { break };
        let seed = session.seed(number);
        let request = if number % 5 == 4 { Request::upload(number / 5, seed) } else { Request::some(number, seed) };
        let sent = Instant::now();
        match exchange(&session, &mut sender, &request).await {
            Ok((by, bytes)) => session.good(sent, &by, bytes),
            Err(lost) => {
                whole.set(false);
                session.lost(lost).await;
            }
        }
    }
    End::Enough
}

async fn exchange(session: &Session, sender: &mut SendRequest<Piece>, request: &Request) -> Result<(By, u64), Lost> {
    let mut head = head(session, request.method, &request.path, &request.id());
    head = match request.upload {
        None => head.header("te", "trailers"),
        Some(Upload { chunked: false, length, .. }) => head.header("content-length", length),
        Some(_) => head,
    };
    let head = head.body(()).map_err(|error| Lost::new(Lost::MALFORMED, error.to_string()))?;
    let none = request.upload.is_none_or(|upload| upload.length == 0);
    let (answer, mut body) = sender.send_request(head, none).map_err(|error| lost(&error))?;
    if let Some(upload) = request.upload.filter(|_| !none) {
        send_body(session, &mut body, &upload, request.seed).await?;
    }
    let answer = session.timely(&request.path, async { answer.await.map_err(|error| lost(&error)) }).await?;
    let status = answer.status().as_u16();
    let (parts, mut body) = answer.into_parts();
    let mut check = Check::new(request, status, |name| field(&parts.headers, name))?;
    while let Some(piece) = session.timely(&request.path, piece(&mut body)).await? {
        check.piece(&piece)?;
    }
    let trailers = session.timely(&request.path, async { body.trailers().await.map_err(|error| lost(&error)) }).await?;
    let by = check.by.clone();
    let bytes = check.end(|name| trailers.as_ref().and_then(|trailers| field(trailers, name)))?;
    Ok((by, bytes))
}

pub fn field(fields: &HeaderMap, name: &str) -> Option<String> {
    Some(fields.get(name)?.to_str().ok()?.to_owned())
}

/// The head of a request, so far.
pub fn head(session: &Session, method: &str, path: &str, id: &str) -> http::request::Builder {
    let scheme = if session.tls.is_some() { "https" } else { "http" };
    let uri = format!("{scheme}://{}{}", session.host(), session.path(path));
    http::Request::builder().version(Version::HTTP_2).method(method).uri(uri).header("x-load-id", id)
}

/// The next piece of a body.
pub async fn piece(body: &mut RecvStream) -> Result<Option<Piece>, Lost> {
    let Some(piece) = body.data().await else { return Ok(None) };
    let piece = piece.map_err(|error| lost(&error))?;
    // It was read: as much may come again.
    body.flow_control().release_capacity(piece.len()).map_err(|error| lost(&error))?;
    Ok(Some(piece))
}

async fn send_body(session: &Session, body: &mut SendStream<Piece>, upload: &Upload, seed: u64) -> Result<(), Lost> {
    let (mut bytes, mut left) = (Bytes::new(seed), upload.length);
    while left > 0 {
        body.reserve_capacity(left.min(Upload::PIECE) as usize);
        let capacity =
            async { std::future::poll_fn(|context| body.poll_capacity(context)).await.transpose().map_err(|error| lost(&error)) };
        let capacity = session.timely("sending the body", capacity).await?;
        let Some(capacity) = capacity else { return Err(Lost::new(Lost::STREAM, "the body is not wanted")) };
        let piece = bytes.take(left.min(capacity as u64) as usize);
        left -= piece.len() as u64;
        body.send_data(piece.into(), left == 0).map_err(|error| lost(&error))?;
    }
    Ok(())
}

/// What an error of HTTP/2 is counted as.
pub fn lost(error: &h2::Error) -> Lost {
    let text = error.to_string();
    if let Some(error) = error.get_io() {
        return Lost::io(error);
    }
    Lost::new(if error.is_go_away() { Lost::GOAWAY } else { Lost::STREAM }, text)
}
