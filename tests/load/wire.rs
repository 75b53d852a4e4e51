//! HTTP/1.1 on a socket, with nothing between: what the client and the upstream share. Nothing is sent twice, nothing
//! is guessed; a message that is not whole is an error that says which kind of loss it is (RFC 9112).

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

/// Longest head that is read, in bytes.
const HEAD_BYTES: usize = 64 << 10;
/// Read at once, in bytes.
const READ_BYTES: usize = 64 << 10;
/// Most header fields of a message.
const FIELDS: usize = 64;

/// Why something is lost: a reason from a short list, that is counted, and what exactly happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    pub reason: &'static str,
    pub detail: String,
}

impl Lost {
    pub const REFUSED: &'static str = "refused";
    pub const RESET: &'static str = "reset";
    pub const UNANSWERED: &'static str = "closed before the answer";
    pub const TRUNCATED: &'static str = "truncated";
    pub const WRONG_BYTE: &'static str = "wrong byte";
    pub const WRONG_STATUS: &'static str = "wrong status";
    pub const WRONG_ANSWER: &'static str = "wrong answer";
    pub const UNASKED: &'static str = "bytes nobody asked for";
    pub const MALFORMED: &'static str = "malformed";
    pub const LATE: &'static str = "no answer in time";
    pub const TLS: &'static str = "no TLS connection";
    pub const NO_CLOSE: &'static str = "no close frame";
    pub const CLOSE_CODE: &'static str = "close code";
    pub const WRONG_MESSAGE: &'static str = "wrong message";
    pub const WRONG_EVENT: &'static str = "wrong event";
    pub const STREAM: &'static str = "stream reset";
    pub const GOAWAY: &'static str = "went away";

    pub fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    /// A failed read or write.
    pub fn io(error: &io::Error) -> Self {
        let reason = match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::REFUSED,
            io::ErrorKind::UnexpectedEof => Self::TRUNCATED,
            _ => Self::RESET,
        };
        Self::new(reason, error.to_string())
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.reason, self.detail)
    }
}

/// Plain or TLS.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + fmt::Debug {}
impl<T: AsyncRead + AsyncWrite + Unpin + fmt::Debug> Socket for T {}

/// The head of a request or a response; names in lower case, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Of a request; empty in a response.
    pub method: String,
    /// Of a request: path and query.
    pub target: String,
    /// Of a response; 0 in a request.
    pub status: u16,
    /// HTTP/1.0 when false.
    pub one: bool,
    pub fields: Vec<(String, String)>,
}

impl Head {
    /// The first field of the name.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// Whether a comma-separated field has the word.
    pub fn has(&self, name: &str, word: &str) -> bool {
        let of = |(found, _): &&(String, String)| found == name;
        self.fields.iter().filter(of).flat_map(|(_, value)| value.split(',')).any(|found| found.trim().eq_ignore_ascii_case(word))
    }

    /// The other side closes after this message (RFC 9112, 9.3).
    pub fn closes(&self) -> bool {
        self.has("connection", "close") || (!self.one && !self.has("connection", "keep-alive"))
    }

    /// How the body of this response to a request of `method`, or of this request, ends (RFC 9112, 6.3).
    pub fn body(&self, method: &str) -> Result<Body, Lost> {
        let response = self.status != 0;
        if response && (method == "HEAD" || self.status < 200 || self.status == 204 || self.status == 304) {
            return Ok(Body::new(Framing::Length(0)));
        }
        let lengths: Vec<_> =
            self.fields.iter().filter(|(name, _)| name == "content-length").map(|(_, value)| value.as_str()).collect();
        if let Some(coding) = self.field("transfer-encoding") {
            if !coding.eq_ignore_ascii_case("chunked") || !lengths.is_empty() {
                return Err(Lost::new(Lost::MALFORMED, format!("transfer-encoding `{coding}`, content-length {lengths:?}")));
            }
            return Ok(Body::new(Framing::Size));
        }
        match lengths[..] {
            [] if response => Ok(Body::new(Framing::Close)),
            [] => Ok(Body::new(Framing::Length(0))),
            [length] => match length.parse() {
                Ok(length) => Ok(Body::new(Framing::Length(length))),
                Err(_) => Err(Lost::new(Lost::MALFORMED, format!("content-length `{length}`"))),
            },
            _ => Err(Lost::new(Lost::MALFORMED, format!("several content-lengths {lengths:?}"))),
        }
    }
}

/// What is still to come of a body.
#[derive(Debug)]
pub struct Body {
    framing: Framing,
    /// After the last piece; names in lower case.
    pub trailers: Vec<(String, String)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    /// So many bytes.
    Length(u64),
    /// Chunked (RFC 9112, 7.1): the line with the size comes next.
    Size,
    /// Chunked: so many bytes of the chunk are left.
    Chunk(u64),
    /// Chunked: the line end after the bytes.
    ChunkEnd,
    /// Chunked: the trailers.
    Trailers,
    /// Until the connection ends.
    Close,
    Done,
}

impl Body {
    fn new(framing: Framing) -> Self {
        Self { framing, trailers: Vec::new() }
    }

    /// The body lasts as long as the connection.
    pub fn until_close(&self) -> bool {
        self.framing == Framing::Close
    }
}

/// What came on a connection while nothing was asked.
#[derive(Debug, PartialEq, Eq)]
pub enum Idle {
    Open,
    Closed,
    Unasked(usize),
}

/// A connection and what was read from it too early.
#[derive(Debug)]
pub struct Wire {
    socket: Box<dyn Socket>,
    buffer: BytesMut,
}

impl Wire {
    pub fn new(socket: Box<dyn Socket>) -> Self {
        Self { socket, buffer: BytesMut::new() }
    }

    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), Lost> {
        let sent = async {
            self.socket.write_all(bytes).await?;
            self.socket.flush().await
        };
        sent.await.map_err(|error| Lost::io(&error))
    }

    /// Says that nothing follows.
    pub async fn finish(&mut self) {
        // The other side may be gone already.
        let _ = self.socket.shutdown().await;
    }

    /// Reads what is there, at least one byte; false: the other side has ended.
    pub async fn more(&mut self) -> Result<bool, Lost> {
        self.buffer.reserve(READ_BYTES);
        let read = self.socket.read_buf(&mut self.buffer).await;
        read.map(|read| read > 0).map_err(|error| Lost::io(&error))
    }

    /// What has been read and not been taken.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Looks without waiting.
    pub fn idle(&mut self) -> Idle {
        if !self.buffer.is_empty() {
            return Idle::Unasked(self.buffer.len());
        }
        let mut bytes = [0; 256];
        let mut read = ReadBuf::new(&mut bytes);
        match Pin::new(&mut self.socket).poll_read(&mut Context::from_waker(Waker::noop()), &mut read) {
            Poll::Pending => Idle::Open,
            Poll::Ready(Ok(())) if !read.filled().is_empty() => Idle::Unasked(read.filled().len()),
            Poll::Ready(_) => Idle::Closed,
        }
    }

    /// Reads a head; nothing when the connection ended before its first byte.
    async fn head(&mut self, parse: fn(&[u8]) -> Result<Option<(usize, Head)>, httparse::Error>) -> Result<Option<Head>, Lost> {
        loop {
            match parse(&self.buffer) {
                Ok(Some((length, head))) => {
                    let _ = self.buffer.split_to(length);
                    return Ok(Some(head));
                }
                Ok(None) if self.buffer.len() > HEAD_BYTES => return Err(Lost::new(Lost::MALFORMED, "a head without end")),
                Ok(None) => (),
                Err(error) => {
                    return Err(Lost::new(Lost::MALFORMED, format!("{error}: {:?}", String::from_utf8_lossy(&self.buffer))));
                }
            }
            if !self.more().await? {
                return if self.buffer.is_empty() { Ok(None) } else { Err(Lost::new(Lost::TRUNCATED, "the head is not whole")) };
            }
        }
    }

    pub async fn request(&mut self) -> Result<Option<Head>, Lost> {
        self.head(parse_request).await
    }

    /// Reads the head of a response, an interim one (1xx) too.
    pub async fn response(&mut self) -> Result<Head, Lost> {
        self.head(parse_response)
            .await?
            .ok_or_else(|| Lost::new(Lost::UNANSWERED, "the connection ended where the answer was due"))
    }

    /// The next piece of a body; nothing after the last, then its trailers are known.
    pub async fn piece(&mut self, body: &mut Body) -> Result<Option<Bytes>, Lost> {
        loop {
            match body.framing {
                Framing::Done => return Ok(None),
                Framing::Length(0) => body.framing = Framing::Done,
                Framing::Chunk(0) => body.framing = Framing::ChunkEnd,
                Framing::Length(left) | Framing::Chunk(left) => {
                    if self.buffer.is_empty() && !self.more().await? {
                        return Err(Lost::new(Lost::TRUNCATED, format!("{left} more bytes were announced")));
                    }
                    let some = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    let left = left - some as u64;
                    body.framing =
                        if matches!(body.framing, Framing::Length(_)) { Framing::Length(left) } else { Framing::Chunk(left) };
                    return Ok(Some(self.buffer.split_to(some).freeze()));
                }
                Framing::Size => {
                    let line = self.line().await?;
                    let size = line.split(';').next().unwrap_or_default().trim();
                    let size =
                        u64::from_str_radix(size, 16).map_err(|_| Lost::new(Lost::MALFORMED, format!("chunk size `{line}`")))?;
                    body.framing = if size == 0 { Framing::Trailers } else { Framing::Chunk(size) };
                }
                Framing::ChunkEnd => {
                    let line = self.line().await?;
                    if !line.is_empty() {
                        return Err(Lost::new(Lost::MALFORMED, format!("`{line}` after a chunk")));
                    }
                    body.framing = Framing::Size;
                }
                Framing::Trailers => {
                    let line = self.line().await?;
                    match line.split_once(':') {
                        Some((name, value)) => body.trailers.push((name.to_ascii_lowercase(), value.trim().to_owned())),
                        None if line.is_empty() => body.framing = Framing::Done,
                        None => return Err(Lost::new(Lost::MALFORMED, format!("trailer `{line}`"))),
                    }
                }
                Framing::Close => {
                    if self.buffer.is_empty() && !self.more().await? {
                        body.framing = Framing::Done;
                        continue;
                    }
                    return Ok(Some(self.buffer.split().freeze()));
                }
            }
        }
    }

    async fn line(&mut self) -> Result<String, Lost> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                let line = self.buffer.split_to(end + 2);
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            if self.buffer.len() > HEAD_BYTES {
                return Err(Lost::new(Lost::MALFORMED, "a line without end"));
            }
            if !self.more().await? {
                return Err(Lost::new(Lost::TRUNCATED, "the body ends without its last chunk"));
            }
        }
    }
}

/// Length and value of a response's head, once it is whole.
fn parse_response(bytes: &[u8]) -> Result<Option<(usize, Head)>, httparse::Error> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut response = httparse::Response::new(&mut fields);
    let httparse::Status::Complete(length) = response.parse(bytes)? else { return Ok(None) };
    let (status, one) = (response.code.unwrap_or_default(), response.version == Some(1));
    Ok(Some((length, Head { method: String::new(), target: String::new(), status, one, fields: owned(response.headers) })))
}

/// Length and value of a request's head, once it is whole.
fn parse_request(bytes: &[u8]) -> Result<Option<(usize, Head)>, httparse::Error> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let httparse::Status::Complete(length) = request.parse(bytes)? else { return Ok(None) };
    let (method, target) = (request.method.unwrap_or_default().to_owned(), request.path.unwrap_or_default().to_owned());
    Ok(Some((length, Head { method, target, status: 0, one: request.version == Some(1), fields: owned(request.headers) })))
}

fn owned(fields: &[httparse::Header<'_>]) -> Vec<(String, String)> {
    let own =
        |field: &httparse::Header<'_>| (field.name.to_ascii_lowercase(), String::from_utf8_lossy(field.value).trim().to_owned());
    fields.iter().map(own).collect()
}
