//! Chunked bodies (RFC 9112, section 7.1), read strictly: CRLF only, no sign, at most 15 digits.

use bytes::{Buf as _, BytesMut};
use http::HeaderMap;
use http::header::{HeaderName, HeaderValue};

use super::Piece;

/// Bytes of a chunk's line, extensions included.
const MOST_LINE: usize = 4 << 10;
/// Bytes of all trailer fields.
const MOST_TRAILERS: usize = 32 << 10;

/// Where in a chunked body the buffer begins.
#[derive(Debug, Default)]
pub(super) enum Decoder {
    #[default]
    Size,
    Data(u64),
    /// The CRLF after a chunk's data.
    Border,
    Trailers,
    Done,
}

impl Decoder {
    pub fn is_done(&self) -> bool {
        matches!(self, Decoder::Done)
    }

    /// Takes the next piece from the front of `buffer`; `None` when more is needed.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Piece>, &'static str> {
        loop {
            match self {
                Decoder::Done => return Ok(Some(Piece::End)),
                Decoder::Size => match line(buffer, MOST_LINE)? {
                    None => return Ok(None),
                    Some(end) => {
                        let size = size(&buffer[..end])?;
                        buffer.advance(end + 2);
                        *self = if size == 0 { Decoder::Trailers } else { Decoder::Data(size) };
                    }
                },
                Decoder::Data(_) if buffer.is_empty() => return Ok(None),
                Decoder::Data(left) => {
                    let count = buffer.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= count as u64;
                    if *left == 0 {
                        *self = Decoder::Border;
                    }
                    return Ok(Some(Piece::Data(buffer.split_to(count).freeze())));
                }
                Decoder::Border => match &buffer[..buffer.len().min(2)] {
                    b"\r\n" => {
                        buffer.advance(2);
                        *self = Decoder::Size;
                    }
                    b"" | b"\r" => return Ok(None),
                    _ => return Err("a chunk is longer than its size"),
                },
                Decoder::Trailers => {
                    let Some(trailers) = trailers(buffer)? else { return Ok(None) };
                    *self = Decoder::Done;
                    return Ok(Some(if trailers.is_empty() { Piece::End } else { Piece::Trailers(trailers) }));
                }
            }
        }
    }
}

/// Length of the line at the front, without its CRLF.
fn line(buffer: &[u8], most: usize) -> Result<Option<usize>, &'static str> {
    match buffer.iter().take(most).position(|byte| *byte == b'\n') {
        None if buffer.len() >= most => Err("the line of a chunk is too long"),
        None => Ok(None),
        Some(end) if end > 0 && buffer[end - 1] == b'\r' => Ok(Some(end - 1)),
        Some(_) => Err("the line of a chunk does not end in CRLF"),
    }
}

fn size(line: &[u8]) -> Result<u64, &'static str> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let rest = line[digits..].trim_ascii_start();
    if digits == 0 || digits > 15 || !(rest.is_empty() || rest[0] == b';') || line[digits..].contains(&b'\r') {
        return Err("the size of a chunk is malformed");
    }
    let text = std::str::from_utf8(&line[..digits]).map_err(|_| "the size of a chunk is malformed")?;
    u64::from_str_radix(text, 16).map_err(|_| "the size of a chunk is malformed")
}

fn trailers(buffer: &mut BytesMut) -> Result<Option<HeaderMap>, &'static str> {
    if buffer.starts_with(b"\r\n") {
        buffer.advance(2);
        return Ok(Some(HeaderMap::new()));
    }
    let mut fields = [httparse::EMPTY_HEADER; 64];
    let (length, fields) = match httparse::parse_headers(buffer, &mut fields) {
        Ok(httparse::Status::Complete(parsed)) => parsed,
        Ok(httparse::Status::Partial) if buffer.len() > MOST_TRAILERS => return Err("the trailers are too large"),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err("the trailers are malformed"),
    };
    let mut trailers = HeaderMap::new();
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| "the trailers are malformed")?;
        trailers.append(name, HeaderValue::from_bytes(field.value).map_err(|_| "the trailers are malformed")?);
    }
    buffer.advance(length);
    Ok(Some(trailers))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Body and trailers of `text` when it comes in pieces of `step` bytes; `None` when it is not all there.
    fn decode(text: &[u8], step: usize) -> Result<Option<(Vec<u8>, usize)>, &'static str> {
        let (mut decoder, mut buffer, mut body, mut trailers) = (Decoder::default(), BytesMut::new(), Vec::new(), 0);
        for part in text.chunks(step) {
            buffer.extend_from_slice(part);
            while let Some(piece) = decoder.next(&mut buffer)? {
                match piece {
                    Piece::Data(data) => body.extend_from_slice(&data),
                    Piece::Trailers(fields) => trailers = fields.len(),
                    Piece::End => return Ok(Some((body, trailers))),
                }
            }
        }
        Ok(None)
    }

    #[test]
    fn chunks_are_read_strictly() {
        let wanted = |body: &str, trailers| Ok(Some((body.as_bytes().to_vec(), trailers)));
        for (text, result) in [
            ("5\r\nhello\r\n0\r\n\r\n", wanted("hello", 0)),
            ("5;a=b\r\nhello\r\nA\r\n0123456789\r\n000\r\nx: y\r\nz: \r\n\r\n", wanted("hello0123456789", 2)),
            ("5\r\nhello\r\n0\r\n", Ok(None)),
            ("5\r\nhell", Ok(None)),
            ("5\nhello\r\n0\r\n\r\n", Err("the line of a chunk does not end in CRLF")),
            ("5\r\nhello!\r\n0\r\n\r\n", Err("a chunk is longer than its size")),
            ("-5\r\nhello\r\n0\r\n\r\n", Err("the size of a chunk is malformed")),
            ("0x5\r\nhello\r\n0\r\n\r\n", Err("the size of a chunk is malformed")),
            ("\r\n0\r\n\r\n", Err("the size of a chunk is malformed")),
            ("ffffffffffffffff\r\nx", Err("the size of a chunk is malformed")),
            ("0\r\nx y: z\r\n\r\n", Err("the trailers are malformed")),
        ] {
            for step in [1, 3, 1000] {
                assert_eq!(decode(text.as_bytes(), step), result, "{text:?} in pieces of {step}");
            }
        }
    }
}
