//! One HTTP request and its answer (RFC 9112), with a limit on time and size: to a forwarded port, or over any stream.

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Largest answer that is read.
const ANSWER_MAX: usize = 16 << 20;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Like `GET`.
    pub method: String,
    /// With its query.
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

/// Sends `request` to `port` of 127.0.0.1 and reads the whole answer.
///
/// # Errors
/// Nobody answers within `timeout`, or something else than HTTP. A forwarder accepts also for a guest that does not listen;
/// then the connection ends without an answer.
pub fn ask(port: u16, request: &Request, timeout: Duration) -> Result<Answer> {
    let end = Instant::now() + timeout;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, timeout).context("nobody takes the connection")?;
    stream.set_write_timeout(Some(timeout))?;
    stream.write_all(&message(request, &format!("127.0.0.1:{port}"))).context("the request is not taken")?;
    answer(&mut stream, |stream, left| stream.set_read_timeout(Some(left)), end, request.method == "HEAD")
}

/// The bytes of `request` to `host`, unless it names another itself; the connection is to end.
pub fn message(request: &Request, host: &str) -> Vec<u8> {
    let Request { method, path, headers, body } = request;
    let named = headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host"));
    let host = if named { String::new() } else { format!("Host: {host}\r\n") };
    let mut text = format!("{method} {path} HTTP/1.1\r\n{host}Connection: close\r\n");
    headers.iter().for_each(|(name, value)| text += &format!("{name}: {value}\r\n"));
    if !body.is_empty() || method == "POST" {
        text += &format!("Content-Length: {}\r\n", body.len());
    }
    let mut message = (text + "\r\n").into_bytes();
    message.extend_from_slice(body);
    message
}

/// Reads the whole answer from `stream` until `end`; `wait` limits how long one read may take.
///
/// # Errors
/// None comes in time, or it is something else than HTTP.
pub fn answer<S: std::io::Read>(
    stream: &mut S,
    wait: impl Fn(&S, Duration) -> std::io::Result<()>,
    end: Instant,
    is_head: bool,
) -> Result<Answer> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("no whole answer came in time");
        }
        wait(stream, left)?;
        let read = match stream.read(&mut buffer) {
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                bail!("no whole answer came in time")
            }
            Err(error) => return Err(error).context("the connection broke"),
        };
        bytes.extend_from_slice(&buffer[..read]);
        if bytes.len() > ANSWER_MAX {
            bail!("the answer is larger than {} MiB", ANSWER_MAX >> 20);
        }
        let ended = read == 0;
        if let Some(answer) = parse(&bytes, ended, is_head)? {
            return Ok(answer);
        }
        if ended {
            bail!(if bytes.is_empty() {
                "the connection ended without an answer"
            } else {
                "the connection ended within the answer"
            });
        }
    }
}

/// The answer in `bytes`, when it is whole. `ended`: nothing more will come.
fn parse(bytes: &[u8], ended: bool, is_head: bool) -> Result<Option<Answer>> {
    let Some(head_end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        if !b"HTTP/".starts_with(&bytes[..bytes.len().min(5)]) {
            bail!("the answer is not HTTP");
        }
        return Ok(None);
    };
    let head = String::from_utf8_lossy(&bytes[..head_end]);
    let mut lines = head.split("\r\n");
    let status = lines.next().filter(|line| line.starts_with("HTTP/")).and_then(|line| line.split(' ').nth(1)?.parse().ok());
    let Some(status) = status else { bail!("the answer is not HTTP") };
    let row = |line: &str| line.split_once(':').map(|(name, value)| (name.trim().to_ascii_lowercase(), value.trim().to_owned()));
    let headers: Vec<(String, String)> = lines.filter_map(row).collect();
    let rest = &bytes[head_end + 4..];
    if (100..200).contains(&status) && status != 101 {
        return parse(rest, ended, is_head);
    }
    let header = |wanted: &str| headers.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
    let body = if is_head || matches!(status, 204 | 304) {
        Some(Vec::new())
    } else if header("transfer-encoding").is_some_and(|value| value.to_ascii_lowercase().ends_with("chunked")) {
        chunks(rest)?
    } else if let Some(length) = header("content-length") {
        let length: usize = length.parse().context("the answer's length is not a number")?;
        rest.get(..length).map(<[u8]>::to_vec)
    } else {
        ended.then(|| rest.to_vec())
    };
    Ok(body.map(|body| Answer { status, headers, body }))
}

/// The chunked body in `rest`, when it is whole (RFC 9112, 7.1).
fn chunks(mut rest: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        let Some(end) = rest.windows(2).position(|window| window == b"\r\n") else { return Ok(None) };
        let line = String::from_utf8_lossy(&rest[..end]);
        let digits = line.split(';').next().unwrap_or_default().trim();
        let length = usize::from_str_radix(digits, 16).ok().filter(|length| *length <= ANSWER_MAX);
        let length = length.context("the answer is not chunked as it says")?;
        rest = &rest[end + 2..];
        if length == 0 {
            return Ok(Some(body));
        }
        let Some(chunk) = rest.get(..length + 2) else { return Ok(None) };
        body.extend_from_slice(&chunk[..length]);
        rest = &rest[length + 2..];
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn answers_in_every_framing_and_in_pieces() {
        let cases: [(&str, Option<(u16, &str)>); 6] = [
            ("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Some((200, "hello"))),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\n\r\n", Some((200, "hello"))),
            ("HTTP/1.0 503 Busy\r\nX: y\r\n\r\nhello", Some((503, "hello"))),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", Some((204, ""))),
            ("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", None),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello", None),
        ];
        for (text, expected) in cases {
            let answer = parse(text.as_bytes(), true, false).unwrap();
            let found = answer.map(|answer| (answer.status, String::from_utf8(answer.body).unwrap()));
            assert_eq!(found, expected.map(|(status, body)| (status, body.to_owned())), "{text:?}");
            // No beginning of an answer is taken for another answer, nor for an error.
            for length in 1..text.len() {
                let part = parse(&text.as_bytes()[..length], false, false).unwrap();
                assert!(part.is_none() || expected.is_some(), "{:?}", &text[..length]);
            }
        }
        assert!(parse(b"SSH-2.0-x\r\n", false, false).is_err());
    }

    #[test]
    fn a_connection_without_an_answer_is_said_so() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let request = Request { method: "GET".into(), path: "/".into(), headers: Vec::new(), body: Vec::new() };
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 1024];
            let read = stream.read(&mut buffer).unwrap();
            drop(stream);
            let _silent = listener.accept().unwrap();
            std::thread::sleep(Duration::from_millis(500));
            String::from_utf8_lossy(&buffer[..read]).into_owned()
        });
        let error = ask(port, &request, Duration::from_secs(20)).unwrap_err();
        assert_eq!(error.to_string(), "the connection ended without an answer");
        let error = ask(port, &request, Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.to_string(), "no whole answer came in time");
        assert_eq!(peer.join().unwrap(), format!("GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"));
    }
}
