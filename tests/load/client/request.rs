//! What is asked, and what is expected in answer; the same over HTTP/1.1 and HTTP/2.

use sha2::{Digest as _, Sha256};

use super::super::bytes::Bytes;
use super::super::wire::Lost;

/// Sizes of uploads in bytes, in turns.
const UPLOADS: [u64; 6] = [0, 1, 1000, 50_000, 300_000, 1_000_000];
/// Size of a large download in bytes.
const LARGE: u64 = 8 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub method: &'static str,
    pub path: String,
    /// Names what is sent and received.
    pub seed: u64,
    pub upload: Option<Upload>,
    pub status: u16,
    pub content: Content,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upload {
    pub length: u64,
    pub chunked: bool,
    /// Waits for 100 before it sends the body.
    pub waits: bool,
}

/// The body that is expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Empty,
    /// The bytes of the seed.
    Bytes(u64),
    /// The same, and their digest in a trailer.
    Trailer(u64),
    /// The text that names the version.
    Version,
    Text(String),
}

impl Request {
    fn get(path: String, seed: u64, content: Content) -> Self {
        Self { method: "GET", path, seed, upload: None, status: 200, content }
    }

    fn bytes(length: u64, seed: u64, more: &str) -> Self {
        Self::get(format!("/bytes/{length}?seed={seed}{more}"), seed, Content::Bytes(length))
    }

    /// A little of everything, in turns.
    pub fn some(number: u64, seed: u64) -> Self {
        match number % 12 {
            0 | 6 => Self::bytes(137, seed, ""),
            1 | 7 => Self::bytes(20_000, seed, ""),
            2 => Self::bytes(0, seed, ""),
            3 => Self::bytes(65_537, seed, "&chunked=1"),
            4 => Self::get(format!("/trailers?seed={seed}&length=3000"), seed, Content::Trailer(3000)),
            5 => Self { method: "HEAD", content: Content::Empty, ..Self::bytes(20_000, seed, "") },
            8 => Self::get("/version".into(), seed, Content::Version),
            9 => Self { status: 404, ..Self::get("/status/404".into(), seed, Content::Empty) },
            10 => Self { status: 204, ..Self::get("/status/204".into(), seed, Content::Empty) },
            _ => Self::get("/slow?ms=20".into(), seed, Content::Version),
        }
    }

    pub fn upload(number: u64, seed: u64) -> Self {
        let length = UPLOADS[(number % UPLOADS.len() as u64) as usize];
        let upload = Upload { length, chunked: number % 2 == 1, waits: number % 4 == 2 && length > 0 };
        let (mut bytes, mut digest, mut left) = (Bytes::new(seed), Sha256::new(), length);
        while left > 0 {
            let piece = bytes.take(left.min(Upload::PIECE) as usize);
            left -= piece.len() as u64;
            digest.update(&piece);
        }
        let text = format!("sha256:{} {length}", hex::encode(digest.finalize()));
        Self { method: "POST", path: "/echo".into(), seed, upload: Some(upload), status: 200, content: Content::Text(text) }
    }

    pub fn large(seed: u64) -> Self {
        Self::bytes(LARGE, seed, "")
    }

    pub fn id(&self) -> String {
        format!("{:x}", self.seed)
    }
}

impl Upload {
    /// Bytes that are sent at once.
    pub const PIECE: u64 = 64 << 10;
}

/// Checks an answer while it comes.
#[derive(Debug)]
pub struct Check<'request> {
    request: &'request Request,
    bytes: Bytes,
    digest: Sha256,
    text: Vec<u8>,
    length: u64,
    pub by: By,
}

/// Who answered.
#[derive(Debug, Clone)]
pub struct By {
    pub version: String,
    /// When the upstream read the request, if it says so: nanoseconds of the machine's monotonic clock.
    pub accepted: Option<u64>,
}

impl<'request> Check<'request> {
    /// Looks at the head of the answer: its status, whose it is, who made it, and the length it announces.
    pub fn new(request: &'request Request, status: u16, field: impl Fn(&str) -> Option<String>) -> Result<Self, Lost> {
        if status != request.status {
            return Err(Lost::new(
                Lost::WRONG_STATUS,
                format!("{} {}: {status} instead of {}", request.method, request.path, request.status),
            ));
        }
        let id = field("x-load-id");
        if id != Some(request.id()) {
            return Err(Lost::new(
                Lost::WRONG_ANSWER,
                format!("{}: the answer to {id:?}, not to {}", request.path, request.id()),
            ));
        }
        let Some(version) = field("x-load-version") else {
            return Err(Lost::new(Lost::WRONG_ANSWER, format!("{}: no version", request.path)));
        };
        let by = By { version, accepted: field("x-load-at").and_then(|at| at.parse().ok()) };
        let announced = field("content-length").and_then(|length| length.parse::<u64>().ok());
        let expected = match request.content {
            Content::Bytes(length) => Some(length),
            _ => None,
        };
        if announced.is_some() && expected.is_some() && announced != expected {
            return Err(Lost::new(Lost::WRONG_ANSWER, format!("{}: a content-length of {announced:?}", request.path)));
        }
        let (bytes, digest) = (Bytes::new(request.seed), Sha256::new());
        Ok(Self { request, bytes, digest, text: Vec::new(), length: 0, by })
    }

    pub fn piece(&mut self, piece: &[u8]) -> Result<(), Lost> {
        self.length += piece.len() as u64;
        match self.request.content {
            Content::Bytes(_) | Content::Trailer(_) => {
                let wrong = |at| Lost::new(Lost::WRONG_BYTE, format!("{}: byte {at}", self.request.path));
                self.bytes.check(piece).map_err(wrong)?;
                if let Content::Trailer(_) = self.request.content {
                    self.digest.update(piece);
                }
            }
            // No expected text is longer.
            _ if self.text.len() < 4096 => self.text.extend(piece),
            _ => (),
        }
        Ok(())
    }

    /// After the last byte; how many there were.
    pub fn end(self, trailer: impl Fn(&str) -> Option<String>) -> Result<u64, Lost> {
        let path = &self.request.path;
        let wrong = |what: String| Err(Lost::new(Lost::WRONG_ANSWER, format!("{path}: {what}")));
        match &self.request.content {
            Content::Bytes(length) | Content::Trailer(length) if self.length < *length => {
                return Err(Lost::new(Lost::TRUNCATED, format!("{path}: {} of {length} bytes", self.length)));
            }
            Content::Bytes(length) | Content::Trailer(length) if self.length > *length => {
                return wrong(format!("{} bytes too many", self.length - length));
            }
            Content::Trailer(_) => {
                let found = trailer("x-load-digest");
                if found != Some(hex::encode(self.digest.finalize())) {
                    return wrong(format!("the trailer x-load-digest is {found:?}"));
                }
            }
            Content::Empty if self.length > 0 => return wrong(format!("{} bytes where none belong", self.length)),
            Content::Version if self.text != self.by.version.as_bytes() => {
                return wrong(format!("{:?}", String::from_utf8_lossy(&self.text)));
            }
            Content::Text(text) if self.text != text.as_bytes() => {
                return wrong(format!("{:?}", String::from_utf8_lossy(&self.text)));
            }
            _ => (),
        }
        Ok(self.length)
    }
}
