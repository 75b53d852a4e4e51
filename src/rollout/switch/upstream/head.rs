//! The head of an instance's answer, and how long its body is (RFC 9112, section 6.3).
//!
//! Stricter than the specification asks: an answer whose length could be read in two ways is
//! refused, as the next one on the connection could be somebody else's.

use bytes::{Bytes, BytesMut};
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{HeaderMap, StatusCode};

/// Fields of an answer.
const MOST_FIELDS: usize = 128;
/// Bytes of an answer's head.
const MOST_BYTES: usize = 256 << 10;

/// How the length of a body is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(u64),
    Chunked,
    UntilClose,
}

/// The head of an answer.
#[derive(Debug)]
pub(crate) struct Head {
    pub status: StatusCode,
    /// As they came, hop-by-hop ones among them, `transfer-encoding` not.
    pub headers: HeaderMap,
    pub framing: Framing,
    /// Whether the connection may have another request afterwards.
    pub keep_alive: bool,
}

/// Where in the head a field is: beginning and length of its name and its value.
#[derive(Clone, Copy, Default)]
struct Place {
    name: (usize, usize),
    value: (usize, usize),
}

/// Takes a head from the front of `buffer`; `None` when it is not all there yet. `is_head`: answers HEAD.
pub(super) fn parse(buffer: &mut BytesMut, is_head: bool) -> Result<Option<Head>, &'static str> {
    if buffer.is_empty() {
        return Ok(None);
    }
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut answer = httparse::Response::new(&mut fields);
    let length = match answer.parse(buffer) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if buffer.len() > MOST_BYTES => return Err("its head is too large"),
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err("its head has too many fields"),
        Err(_) => return Err("its head is malformed"),
    };
    let status = answer.code.and_then(|code| StatusCode::from_u16(code).ok()).ok_or("its status is malformed")?;
    let http_11 = answer.version == Some(1);
    let count = answer.headers.len();
    let mut places = [Place::default(); MOST_FIELDS];
    let start = buffer.as_ptr() as usize;
    for (place, field) in places.iter_mut().zip(answer.headers.iter()) {
        *place = Place {
            name: (field.name.as_ptr() as usize - start, field.name.len()),
            value: (field.value.as_ptr() as usize - start, field.value.len()),
        };
    }
    let bytes = buffer.split_to(length).freeze();
    let fields = read_fields(&bytes, &places[..count])?;
    body(status, http_11, fields, is_head).map(Some)
}

#[derive(Default)]
struct Fields {
    headers: HeaderMap,
    length: Option<u64>,
    encoded: bool,
    close: bool,
    keep_alive: bool,
}

fn read_fields(bytes: &Bytes, places: &[Place]) -> Result<Fields, &'static str> {
    let mut fields = Fields { headers: HeaderMap::with_capacity(16), ..Fields::default() };
    for place in places {
        let range = |(start, length): (usize, usize)| start..start + length;
        let name = HeaderName::from_bytes(&bytes[range(place.name)]).map_err(|_| "the name of a field is malformed")?;
        let value =
            HeaderValue::from_maybe_shared(bytes.slice(range(place.value))).map_err(|_| "the value of a field is malformed")?;
        match name {
            CONTENT_LENGTH => {
                let length = length(value.as_bytes()).ok_or("its content-length is malformed")?;
                if fields.length.is_some_and(|other| other != length) {
                    return Err("its content-lengths differ");
                }
                if fields.length.replace(length).is_some() {
                    continue;
                }
            }
            TRANSFER_ENCODING => {
                if fields.encoded || !value.as_bytes().eq_ignore_ascii_case(b"chunked") {
                    return Err("its transfer-encoding is not `chunked`");
                }
                fields.encoded = true;
                continue;
            }
            CONNECTION => {
                let options = value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
                for option in options {
                    fields.close |= option.eq_ignore_ascii_case(b"close");
                    fields.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
                }
            }
            _ => {}
        }
        fields.headers.append(name, value);
    }
    Ok(fields)
}

fn body(status: StatusCode, http_11: bool, fields: Fields, is_head: bool) -> Result<Head, &'static str> {
    if fields.encoded && fields.length.is_some() {
        return Err("it has both transfer-encoding and content-length");
    }
    if fields.encoded && !http_11 {
        return Err("it is HTTP/1.0 and has a transfer-encoding");
    }
    let bodiless = is_head || status.is_informational() || matches!(status.as_u16(), 204 | 304);
    let framing = match (bodiless, fields.encoded, fields.length) {
        (true, ..) => Framing::Length(0),
        (false, true, _) => Framing::Chunked,
        (false, false, Some(length)) => Framing::Length(length),
        (false, false, None) => Framing::UntilClose,
    };
    let keep_alive = !fields.close && (http_11 || fields.keep_alive) && framing != Framing::UntilClose;
    Ok(Head { status, headers: fields.headers, framing, keep_alive })
}

/// Digits only, that fit (RFC 9110, section 8.6); `1, 1` is refused, too.
pub(crate) fn length(value: &[u8]) -> Option<u64> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    digits.then(|| std::str::from_utf8(value).ok()?.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str, is_head: bool) -> Result<Option<(u16, Framing, bool)>, &'static str> {
        let head = parse(&mut BytesMut::from(text), is_head)?;
        Ok(head.map(|head| (head.status.as_u16(), head.framing, head.keep_alive)))
    }

    #[test]
    fn how_long_a_body_is() {
        use Framing::{Chunked, Length, UntilClose};
        for (fields, wanted) in [
            ("content-length: 5", Ok((Length(5), true))),
            ("content-length: 5\r\ncontent-length: 5", Ok((Length(5), true))),
            ("content-length: 5\r\nconnection: x, Close", Ok((Length(5), false))),
            ("transfer-encoding: Chunked", Ok((Chunked, true))),
            ("x: y", Ok((UntilClose, false))),
            ("content-length: 5\r\ncontent-length: 6", Err("its content-lengths differ")),
            ("content-length: +5", Err("its content-length is malformed")),
            ("content-length: 5, 5", Err("its content-length is malformed")),
            ("content-length: 99999999999999999999", Err("its content-length is malformed")),
            ("content-length: 5\r\ntransfer-encoding: chunked", Err("it has both transfer-encoding and content-length")),
            ("transfer-encoding: gzip, chunked", Err("its transfer-encoding is not `chunked`")),
            ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", Err("its transfer-encoding is not `chunked`")),
            ("x : y", Err("its head is malformed")),
            (" folded", Err("its head is malformed")),
        ] {
            let read = read(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\n"), false);
            assert_eq!(read, wanted.map(|(framing, keep_alive)| Some((200, framing, keep_alive))), "{fields}");
        }
        let length_0 = |status, keep_alive| Ok(Some((status, Length(0), keep_alive)));
        assert_eq!(read("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", true), length_0(200, true), "the answer to HEAD");
        assert_eq!(read("HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n", false), length_0(304, true));
        assert_eq!(read("HTTP/1.1 204\r\n\r\n", false), length_0(204, true));
        assert_eq!(read("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n", false), length_0(200, false));
        assert_eq!(read("HTTP/1.0 200 OK\r\ncontent-length: 0\r\nconnection: keep-alive\r\n\r\n", false), length_0(200, true));
        assert_eq!(read("HTTP/1.1 200 OK\r\ncontent-le", false), Ok(None));
        assert!(read("SSH-2.0-OpenSSH\r\n", false).is_err());
    }

    #[test]
    fn fields_are_kept_in_order_and_the_rest_is_left() {
        let mut buffer = BytesMut::from("HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nx-empty:\r\nset-cookie: b \r\n\r\nbody");
        let head = parse(&mut buffer, false).unwrap().unwrap();
        let cookies: Vec<_> = head.headers.get_all("set-cookie").iter().map(HeaderValue::as_bytes).collect();
        assert_eq!(
            (cookies, &head.headers["x-empty"], &buffer[..]),
            (vec![&b"a"[..], b"b"], &HeaderValue::from_static(""), &b"body"[..])
        );
    }
}
