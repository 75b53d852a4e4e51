//! The body of a request on its way to an instance.

use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use http::HeaderMap;
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::io::AsyncWrite as _;
use tokio::net::TcpStream;

use crate::rollout::switch::headers;

/// Why a body could not be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UploadError {
    /// The client broke off, or what it sent is malformed.
    Client,
    /// It is larger than allowed.
    TooLarge,
    /// The instance does not take any more of it.
    Instance,
}

/// A body and how far it was sent.
#[derive(Debug)]
pub(crate) struct Upload {
    body: Option<Incoming>,
    chunked: bool,
    /// Bytes it may still have.
    allowed: u64,
    /// Bytes of it that were taken from the client.
    taken: u64,
    /// What is to be written next, in this order.
    before: Bytes,
    data: Bytes,
    after: Bytes,
    given_up: bool,
    client_waits: bool,
}

impl Upload {
    /// `chunked`: its length is not known. `most`: bytes it may have.
    pub fn new(body: Incoming, chunked: bool, most: Option<u64>) -> Self {
        let (before, data, after) = (Bytes::new(), Bytes::new(), Bytes::new());
        let allowed = most.unwrap_or(u64::MAX);
        Self { body: Some(body), chunked, allowed, taken: 0, before, data, after, given_up: false, client_waits: false }
    }

    /// Bytes that came from the client.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether all of it was sent.
    pub fn is_done(&self) -> bool {
        let written = self.before.is_empty() && self.data.is_empty() && self.after.is_empty();
        self.body.is_none() && written && !self.given_up
    }

    /// Whether it is the client's turn.
    pub fn waits_for_client(&self) -> bool {
        self.client_waits && !self.given_up
    }

    /// No more of it is sent, and the connection cannot be used again.
    pub fn give_up(&mut self) {
        self.given_up = true;
        self.body = None;
    }

    /// Sends what there is; ready when all is sent.
    pub fn poll_send(&mut self, context: &mut Context<'_>, stream: &mut TcpStream) -> Poll<Result<(), UploadError>> {
        if self.given_up {
            return Poll::Pending;
        }
        loop {
            while !(self.before.is_empty() && self.data.is_empty() && self.after.is_empty()) {
                let slices = [IoSlice::new(&self.before), IoSlice::new(&self.data), IoSlice::new(&self.after)];
                match ready!(Pin::new(&mut *stream).poll_write_vectored(context, &slices)) {
                    Ok(count) if count > 0 => self.advance(count),
                    _ => return Poll::Ready(Err(UploadError::Instance)),
                }
            }
            let Some(body) = &mut self.body else { return Poll::Ready(Ok(())) };
            let frame = Pin::new(body).poll_frame(context);
            self.client_waits = frame.is_pending();
            match ready!(frame) {
                None => self.end(None),
                Some(Err(_)) => return Poll::Ready(Err(UploadError::Client)),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.queue(data)?,
                    Err(frame) => self.end(frame.into_trailers().ok()),
                },
            }
        }
    }

    fn queue(&mut self, data: Bytes) -> Result<(), UploadError> {
        let length = data.len() as u64;
        self.taken += length;
        self.allowed = self.allowed.checked_sub(length).ok_or(UploadError::TooLarge)?;
        // A chunk of no bytes would end the body.
        if self.chunked && !data.is_empty() {
            self.before = Bytes::from(format!("{length:x}\r\n"));
            self.after = Bytes::from_static(b"\r\n");
        }
        self.data = data;
        Ok(())
    }

    fn end(&mut self, trailers: Option<HeaderMap>) {
        self.body = None;
        if self.chunked {
            let mut text = b"0\r\n".to_vec();
            for (name, value) in trailers.iter().flat_map(HeaderMap::iter).filter(|(name, _)| headers::may_be_trailer(name)) {
                headers::field(&mut text, name.as_str().as_bytes(), value.as_bytes());
            }
            text.extend_from_slice(b"\r\n");
            self.before = text.into();
        }
    }

    fn advance(&mut self, mut count: usize) {
        for part in [&mut self.before, &mut self.data, &mut self.after] {
            let here = count.min(part.len());
            part.advance(here);
            count -= here;
        }
    }
}
