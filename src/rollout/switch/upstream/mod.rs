//! The HTTP/1.1 client towards an instance: one request at a time over a connection, without a task of its own.
//!
//! It is written by hand because the switch has to know exactly how far a request came: whether a
//! byte of it was taken by the kernel, and whether a byte of an answer was seen, decide what may be
//! sent again (RFC 9110, section 9.2.2). Bodies are streamed both ways; a request's body goes on
//! being sent while the answer is already read ([`Exchange`]).

mod chunked;
mod head;
mod upload;

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use tokio::io::{AsyncReadExt as _, AsyncWrite as _};
use tokio::net::TcpStream;

pub(super) use head::{Framing, Head};
pub(super) use upload::{Upload, UploadError};

use super::pool::{Cut, Ticket};

/// Room asked for before each read; large bodies come in pieces of this size.
const READ_BYTES: usize = 64 << 10;
/// Room for the first read of an answer: most fit, and it stays with the connection.
const FIRST_READ_BYTES: usize = 16 << 10;
/// A client that sent `expect: 100-continue` gets its body asked for after this, whatever the instance does (RFC 9110, section 10.1.1).
const CONTINUE_WAIT: Duration = Duration::from_secs(1);

/// A connection to an instance.
#[derive(Debug)]
pub(super) struct Upstream {
    stream: TcpStream,
    buffer: BytesMut,
    /// By the clock: since when it waits for a request.
    pub idle_since: u64,
    /// Whether it had a request before, so that it may be closed by now.
    pub used: bool,
}

/// How a request failed before the head of its answer was there.
#[derive(Debug)]
pub(super) struct Failed {
    pub why: Why,
    /// Whether any byte of it may have reached the instance.
    pub sent: bool,
    /// Whether any byte of an answer came.
    pub answered: bool,
}

#[derive(Debug)]
pub(super) enum Why {
    /// The connection broke or was closed.
    Broken,
    /// The answer is not HTTP/1.1 as RFC 9112 has it.
    Malformed(&'static str),
    /// The client's side of the body failed.
    Upload(UploadError),
    /// The request has to end; `true`: the client is the one that is waited for.
    Cut(Cut, bool),
}

impl Upstream {
    pub fn new(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true);
        Self { stream, buffer: BytesMut::new(), idle_since: 0, used: false }
    }

    /// Whether an idle connection may be used: neither closed nor talked on out of turn.
    pub fn is_open(&self) -> bool {
        let mut byte = [0];
        self.buffer.is_empty()
            && matches!(self.stream.try_read(&mut byte), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// The connection itself and what was read beyond the head, after an upgrade.
    pub fn into_parts(self) -> (TcpStream, Bytes) {
        (self.stream, self.buffer.freeze())
    }

    /// Reads more into the buffer; 0 at the end of the stream.
    fn poll_fill(&mut self, context: &mut Context<'_>, room: usize) -> Poll<io::Result<usize>> {
        if self.buffer.capacity() - self.buffer.len() < room / 4 {
            self.buffer.reserve(room);
        }
        pin!(self.stream.read_buf(&mut self.buffer)).poll(context)
    }

    /// Sends a request and waits for the head of the answer; interim answers but 101 are passed over.
    ///
    /// `head` is the request line and the fields. `upload` is left as far as it came; its rest is sent by the [`Exchange`].
    /// `progress` is called when something of it moved. With `expect` the body waits for the instance's 100, for the answer, or for a second.
    pub async fn send(
        &mut self,
        head: &[u8],
        upload: &mut Option<Upload>,
        is_head: bool,
        expect: bool,
        ticket: &Ticket,
        progress: impl Fn(&Ticket),
    ) -> Result<Head, Failed> {
        let mut state = Sending { written: 0, waits: expect && upload.is_some(), answered: false, is_head };
        let mut pause = state.waits.then(|| Box::pin(tokio::time::sleep(CONTINUE_WAIT)));
        std::future::poll_fn(|context| {
            if let Some(sleep) = &mut pause
                && (!state.waits || sleep.as_mut().poll(context).is_ready())
            {
                state.waits = false;
                pause = None;
            }
            let moved = |state: &Sending, upload: &Option<Upload>| (state.written, upload.as_ref().map(Upload::taken));
            let before = moved(&state, upload);
            let polled = self.poll_send(context, head, upload, &mut state);
            if moved(&state, upload) != before {
                progress(ticket);
            }
            if polled.is_pending() {
                let cut = ticket.poll_cut(context);
                if cut > Cut::Gently {
                    let client = !state.waits && upload.as_ref().is_some_and(|upload| upload.waits_for_client());
                    return Poll::Ready(Err(Why::Cut(cut, client)));
                }
            }
            polled
        })
        .await
        .map_err(|why| Failed { why, sent: state.written > 0, answered: state.answered })
    }

    fn poll_send(
        &mut self,
        context: &mut Context<'_>,
        head: &[u8],
        upload: &mut Option<Upload>,
        state: &mut Sending,
    ) -> Poll<Result<Head, Why>> {
        while state.written < head.len() {
            match Pin::new(&mut self.stream).poll_write(context, &head[state.written..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(Why::Broken)),
                Poll::Ready(Ok(count)) => state.written += count,
                // It may have answered and closed: what it said counts more than the broken pipe.
                Poll::Ready(Err(_)) if state.written == 0 => return Poll::Ready(Err(Why::Broken)),
                Poll::Ready(Err(_)) | Poll::Pending => break,
            }
        }
        if let Some(body) = upload
            && state.written == head.len()
            && !state.waits
        {
            match body.poll_send(context, &mut self.stream) {
                Poll::Ready(Ok(())) | Poll::Pending => {}
                Poll::Ready(Err(UploadError::Instance)) => body.give_up(),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Why::Upload(error))),
            }
        }
        loop {
            match head::parse(&mut self.buffer, state.is_head).map_err(Why::Malformed)? {
                Some(head) if head.status.is_informational() && head.status.as_u16() != 101 => {
                    if head.status.as_u16() == 100 && state.waits {
                        state.waits = false;
                        context.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    continue;
                }
                Some(head) => return Poll::Ready(Ok(head)),
                None => {}
            }
            match ready!(self.poll_fill(context, FIRST_READ_BYTES)) {
                Ok(0) => return Poll::Ready(Err(Why::Broken)),
                Ok(_) => state.answered = true,
                Err(_) => return Poll::Ready(Err(Why::Broken)),
            }
        }
    }
}

/// How far a request is.
struct Sending {
    /// Bytes of its head that the kernel took.
    written: usize,
    /// Its body waits for a 100.
    waits: bool,
    answered: bool,
    is_head: bool,
}

/// What a body yields.
#[derive(Debug)]
pub(super) enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

/// A request whose answer has begun: the rest of both bodies.
#[derive(Debug)]
pub(super) struct Exchange {
    upstream: Option<Upstream>,
    upload: Option<Upload>,
    framing: Framing,
    chunks: chunked::Decoder,
    keep_alive: bool,
}

impl Exchange {
    pub fn new(upstream: Upstream, upload: Option<Upload>, framing: Framing, keep_alive: bool) -> Self {
        Self { upstream: Some(upstream), upload, framing, chunks: chunked::Decoder::default(), keep_alive }
    }

    /// Bytes of the answer's body that are left, where that is known.
    pub fn length(&self) -> Option<u64> {
        match self.framing {
            Framing::Length(left) => Some(left),
            Framing::Chunked | Framing::UntilClose => None,
        }
    }

    /// Whether the request's body was not taken whole.
    pub fn leaves_unread(&self) -> bool {
        !self.upload.as_ref().is_none_or(Upload::is_done)
    }

    /// Bytes of the request's body that came from the client.
    pub fn received(&self) -> u64 {
        self.upload.as_ref().map_or(0, Upload::taken)
    }

    /// The whole body, when it is here already.
    pub fn take_whole(&mut self) -> Option<Bytes> {
        let (Framing::Length(left), Some(upstream)) = (&mut self.framing, &mut self.upstream) else { return None };
        let count = usize::try_from(*left).ok().filter(|count| *count <= upstream.buffer.len())?;
        *left = 0;
        Some(upstream.buffer.split_to(count).freeze())
    }

    /// The next piece of the answer's body; meanwhile the request's body goes on being sent.
    pub fn poll_piece(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Piece>> {
        let Some(upstream) = &mut self.upstream else { return Poll::Ready(Ok(Piece::End)) };
        if let Some(upload) = &mut self.upload {
            match upload.poll_send(context, &mut upstream.stream) {
                Poll::Ready(Ok(())) | Poll::Pending => {}
                // An answer that needs no more of the body is still an answer.
                Poll::Ready(Err(_)) => upload.give_up(),
            }
        }
        loop {
            let piece = match &mut self.framing {
                Framing::Length(0) => Some(Piece::End),
                Framing::Length(left) if !upstream.buffer.is_empty() => {
                    let count = upstream.buffer.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= count as u64;
                    Some(Piece::Data(upstream.buffer.split_to(count).freeze()))
                }
                Framing::Chunked => self.chunks.next(&mut upstream.buffer).map_err(io::Error::other)?,
                Framing::UntilClose if !upstream.buffer.is_empty() => Some(Piece::Data(upstream.buffer.split().freeze())),
                Framing::Length(_) | Framing::UntilClose => None,
            };
            if let Some(piece) = piece {
                return Poll::Ready(Ok(piece));
            }
            match ready!(upstream.poll_fill(context, READ_BYTES))? {
                0 if self.framing == Framing::UntilClose => return Poll::Ready(Ok(Piece::End)),
                0 => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                _ => {}
            }
        }
    }

    /// The connection, when it may have another request: the answer was read whole, the request was sent whole.
    pub fn finish(&mut self) -> Option<Upstream> {
        let upstream = self.upstream.take()?;
        let done = match self.framing {
            Framing::Length(left) => left == 0,
            Framing::Chunked => self.chunks.is_done(),
            Framing::UntilClose => false,
        };
        let sent = self.upload.as_ref().is_none_or(Upload::is_done);
        (done && sent && self.keep_alive && upstream.buffer.is_empty()).then_some(upstream)
    }
}
