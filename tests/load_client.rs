//! The load client against servers that are bad on purpose, each in one way: every one of them must be counted as lost, and
//! what a server may do must not be. Without this the proof that a switch loses nothing would prove nothing.

#[allow(dead_code, reason = "the program has more than these tests need")]
#[path = "load/program.rs"]
mod load;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use bytes::Bytes as Piece;
use clap::Parser as _;
use load::bytes::Bytes;
use load::client::{self, ClientArgs};
use load::report::{Figures, Report};
use load::upstream::{self, UpstreamArgs, event};
use load::websocket;
use load::wire::Lost;

#[derive(Debug, clap::Parser)]
struct Client {
    #[command(flatten)]
    args: ClientArgs,
}

#[derive(Debug, clap::Parser)]
struct Upstream {
    #[command(flatten)]
    args: UpstreamArgs,
}

/// Runs the client as its command line would.
fn run(target: SocketAddr, words: &str) -> Report {
    let line = format!("client --target {target} {words}");
    client::run(&Client::try_parse_from(line.split_whitespace()).unwrap().args).unwrap()
}

/// The only kind in a report.
fn only<'report>(report: &'report Report, name: &str) -> &'report Figures {
    report.kinds.get(name).unwrap_or_else(|| panic!("no `{name}` in {report}"))
}

// -- servers of HTTP/1.1 -----------------------------------------------------------------------------

/// A request as the bad servers see it.
struct Asked {
    /// How many came before it, on all connections.
    number: usize,
    head: String,
}

impl Asked {
    fn field(&self, name: &str) -> &str {
        let of = |line: &'_ str| line.split_once(": ").is_some_and(|(found, _)| found == name);
        self.head.lines().find(|line| of(line)).map_or("", |line| line.split_once(": ").unwrap().1)
    }

    fn path(&self) -> &str {
        self.head.split(' ').nth(1).unwrap()
    }

    fn query(&self, name: &str) -> u64 {
        let value = self.path().split(['?', '&']).find_map(|pair| pair.strip_prefix(&format!("{name}=")));
        value.map_or(0, |value| value.parse().unwrap())
    }

    /// The bytes of `/bytes/N`.
    fn bytes(&self) -> Vec<u8> {
        let length = self.path().strip_prefix("/bytes/").unwrap().split('?').next().unwrap().parse().unwrap();
        Bytes::new(self.query("seed")).take(length)
    }

    fn answer(&self, status: &str, fields: &str, body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 {status}\r\nx-load-id: {}\r\nx-load-version: bad\r\n{fields}\r\n", self.field("x-load-id"));
        [head.as_bytes(), body].concat()
    }

    fn good(&self) -> Vec<u8> {
        let body = self.bytes();
        self.answer("200 OK", &format!("content-length: {}\r\n", body.len()), &body)
    }
}

/// Answers a request; whether the connection stays.
type Bad = fn(&mut TcpStream, &Asked) -> bool;

fn serve(bad: Bad) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let number = Arc::new(AtomicUsize::new(0));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, number) = (stream.unwrap(), number.clone());
            thread::spawn(move || {
                while let Some(head) = head(&mut stream) {
                    let asked = Asked { number: number.fetch_add(1, Ordering::SeqCst), head };
                    if !bad(&mut stream, &asked) {
                        break;
                    }
                }
            });
        }
    });
    address
}

/// Reads a head, byte by byte; nothing at the end.
fn head(stream: &mut TcpStream) -> Option<String> {
    let (mut bytes, mut byte) = (Vec::new(), [0]);
    while !bytes.ends_with(b"\r\n\r\n") {
        match stream.read(&mut byte) {
            Ok(1) => bytes.push(byte[0]),
            _ => return None,
        }
    }
    Some(String::from_utf8(bytes).unwrap())
}

/// Writes; whoever is gone does not get it.
fn put(stream: &mut TcpStream, bytes: &[u8]) -> bool {
    stream.write_all(bytes).is_ok()
}

/// Ends the connection by a reset.
fn reset(stream: &mut TcpStream) -> bool {
    rustix::net::sockopt::set_socket_linger(&*stream, Some(Duration::ZERO)).unwrap();
    false
}

/// The second of three requests meets the bad server, the others a good one.
macro_rules! second {
    (|$stream:ident, $asked:ident| $bad:expr) => {
        |$stream: &mut TcpStream, $asked: &Asked| if $asked.number == 1 { $bad } else { put($stream, &$asked.good()) }
    };
}

#[test]
fn every_bad_answer_is_lost() {
    let cases: &[(&str, &str, Bad)] = &[
        (
            "short of the length",
            Lost::TRUNCATED,
            second!(|stream, asked| {
                let good = asked.good();
                put(stream, &good[..good.len() - 1]) && false
            }),
        ),
        (
            "chunked without the last chunk",
            Lost::TRUNCATED,
            second!(|stream, asked| {
                let body = [b"4e20\r\n", asked.bytes().as_slice(), b"\r\n"].concat();
                put(stream, &asked.answer("200 OK", "transfer-encoding: chunked\r\n", &body)) && false
            }),
        ),
        (
            "a chunk that is not whole",
            Lost::TRUNCATED,
            second!(|stream, asked| {
                let body = [b"4e20\r\n", &asked.bytes()[..100]].concat();
                put(stream, &asked.answer("200 OK", "transfer-encoding: chunked\r\n", &body)) && false
            }),
        ),
        (
            "without length, too short",
            Lost::TRUNCATED,
            second!(|stream, asked| put(stream, &asked.answer("200 OK", "", &asked.bytes()[..19_999])) && false),
        ),
        ("half a head", Lost::TRUNCATED, second!(|stream, _asked| put(stream, b"HTTP/1.1 200 OK\r\nx-load") && false)),
        (
            "a wrong byte at the end",
            Lost::WRONG_BYTE,
            second!(|stream, asked| {
                let mut answer = asked.good();
                *answer.last_mut().unwrap() ^= 1;
                put(stream, &answer)
            }),
        ),
        (
            "two pieces exchanged",
            Lost::WRONG_BYTE,
            second!(|stream, asked| {
                let mut body = asked.bytes();
                body.rotate_left(8192);
                put(stream, &asked.answer("200 OK", "content-length: 20000\r\n", &body))
            }),
        ),
        (
            "another length",
            Lost::WRONG_ANSWER,
            second!(|stream, asked| put(stream, &asked.answer("200 OK", "content-length: 20001\r\n", &asked.bytes())) && false),
        ),
        (
            "the answer to another request",
            Lost::WRONG_ANSWER,
            second!(|stream, asked| {
                let answer = String::from_utf8_lossy(&asked.answer("200 OK", "content-length: 0\r\n", b""))
                    .replace("x-load-id: ", "x-load-id: f");
                put(stream, answer.as_bytes())
            }),
        ),
        (
            "nobody's answer",
            Lost::WRONG_ANSWER,
            second!(|stream, asked| {
                let answer = String::from_utf8_lossy(&asked.answer("200 OK", "content-length: 0\r\n", b""))
                    .replace("x-load-version", "x-other");
                put(stream, answer.as_bytes())
            }),
        ),
        ("reset before the answer", Lost::RESET, second!(|stream, _asked| reset(stream))),
        (
            "reset within the answer",
            Lost::RESET,
            second!(|stream, asked| {
                put(stream, &asked.good()[..5000]);
                // What was sent before a reset may be thrown away.
                reset(stream)
            }),
        ),
        ("closed before the answer", Lost::UNANSWERED, second!(|_stream, _asked| false)),
        (
            "502",
            Lost::WRONG_STATUS,
            second!(|stream, asked| put(stream, &asked.answer("502 Bad Gateway", "content-length: 0\r\n", b""))),
        ),
        (
            "503 and closed",
            Lost::WRONG_STATUS,
            second!(|stream, asked| {
                put(stream, &asked.answer("503 Service Unavailable", "content-length: 0\r\nconnection: close\r\n", b"")) && false
            }),
        ),
        (
            "500",
            Lost::WRONG_STATUS,
            second!(|stream, asked| put(stream, &asked.answer("500 Internal Server Error", "content-length: 0\r\n", b""))),
        ),
        (
            "301",
            Lost::WRONG_STATUS,
            second!(|stream, asked| put(stream, &asked.answer("301 Moved", "location: /\r\ncontent-length: 0\r\n", b""))),
        ),
        ("no HTTP", Lost::MALFORMED, second!(|stream, _asked| put(stream, b"SSH-2.0-OpenSSH\r\n\r\n") && false)),
        (
            "two framings",
            Lost::MALFORMED,
            second!(|stream, asked| {
                put(stream, &asked.answer("200 OK", "content-length: 20000\r\ntransfer-encoding: chunked\r\n", &asked.bytes()))
                    && false
            }),
        ),
        (
            "two lengths",
            Lost::MALFORMED,
            second!(|stream, asked| {
                put(stream, &asked.answer("200 OK", "content-length: 20000\r\ncontent-length: 20001\r\n", &asked.bytes()))
                    && false
            }),
        ),
        (
            "silence",
            Lost::LATE,
            second!(|stream, _asked| {
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest).is_ok() && false
            }),
        ),
    ];
    for (name, reason, bad) in cases {
        let report = run(serve(*bad), "--mix h1 --connections 1 --limit 3 --timeout 2");
        let figures = only(&report, "h1");
        assert_eq!((figures.requests, figures.good, figures.lost), (3, 2, 1), "{name}: {report}");
        assert_eq!(report.reasons, [(format!("h1: {reason}"), 1)].into(), "{name}: {report}");
        assert_eq!((report.lost, report.losses.len()), (1, 1), "{name}: {report}");
    }
}

#[test]
fn more_than_was_asked_for_is_lost() {
    // It is seen when the connection is wanted for the next request.
    let bad: Bad = |stream, asked| {
        put(stream, &[asked.good(), if asked.number == 0 { b"HTTP/1.1 408".to_vec() } else { Vec::new() }].concat())
    };
    let report = run(serve(bad), "--mix h1 --connections 1 --limit 3 --rate 10");
    assert_eq!(report.reasons, [(format!("h1: {}", Lost::UNASKED), 1)].into(), "{report}");
    assert_eq!(only(&report, "h1").good, 2, "{report}");
}

#[test]
fn a_server_that_is_not_there_is_lost_every_time() {
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for kind in ["h1", "h2", "upload", "ws", "sse", "large"] {
        let report = run(address, &format!("--mix {kind} --connections 1 --limit 3"));
        assert_eq!(report.reasons, [(format!("{kind}: {}", Lost::REFUSED), 3)].into(), "{report}");
        assert_eq!((report.requests, only(&report, kind).connections), (3, 0), "{report}");
    }
}

#[test]
fn what_a_server_may_do_is_not_lost() {
    // (what, answer, connections, closed by the server, closed while idle)
    let cases: &[(&str, Bad, [u64; 3])] = &[
        ("keeps the connection", |stream, asked| put(stream, &asked.good()), [1, 0, 0]),
        (
            "says that it closes",
            |stream, asked| {
                let body = asked.bytes();
                put(stream, &asked.answer("200 OK", &format!("content-length: {}\r\nconnection: close\r\n", body.len()), &body))
                    && false
            },
            [3, 3, 0],
        ),
        (
            "ends the body with the connection",
            |stream, asked| put(stream, &asked.answer("200 OK", "", &asked.bytes())) && false,
            [3, 3, 0],
        ),
        // The client looks before it sends, a fifth of a second later.
        ("closes while nothing is asked", |stream, asked| put(stream, &asked.good()) && false, [3, 0, 2]),
        ("answers in little pieces", |stream, asked| asked.good().chunks(1000).all(|piece| put(stream, piece)), [1, 0, 0]),
    ];
    for (name, answer, expected) in cases {
        let report = run(serve(*answer), "--mix h1 --connections 1 --limit 3 --rate 5");
        let figures = only(&report, "h1");
        assert_eq!((figures.good, report.lost), (3, 0), "{name}: {report}");
        assert_eq!([figures.connections, figures.closed_by_server, figures.closed_idle], *expected, "{name}: {report}");
    }
}

#[test]
fn trailers_belong_to_the_answer() {
    let trailers: &[(&str, &str)] = &[("none", ""), ("another digest", "x-load-digest: 00\r\n")];
    for (name, trailer) in trailers {
        // A function has no room for the trailer.
        let bad: Bad = match *trailer {
            "" => |stream, asked| trailer_answer(stream, asked, ""),
            _ => |stream, asked| trailer_answer(stream, asked, "x-load-digest: 00\r\n"),
        };
        // The fifth request asks for trailers.
        let report = run(serve(bad), "--mix h1 --connections 1 --limit 5");
        assert_eq!(report.reasons, [(format!("h1: {}", Lost::WRONG_ANSWER), 1)].into(), "{name}: {report}");
    }
}

fn trailer_answer(stream: &mut TcpStream, asked: &Asked, trailer: &str) -> bool {
    if !asked.path().starts_with("/trailers") {
        return put(stream, &asked.good());
    }
    let body =
        [b"bb8\r\n", Bytes::new(asked.query("seed")).take(3000).as_slice(), b"\r\n0\r\n", trailer.as_bytes(), b"\r\n"].concat();
    put(stream, &asked.answer("200 OK", "transfer-encoding: chunked\r\n", &body))
}

#[test]
fn bad_answers_to_uploads_are_lost() {
    /// Reads the body, whatever it is.
    fn body(stream: &mut TcpStream, asked: &Asked) {
        let mut bytes = vec![0; asked.field("content-length").parse().unwrap_or(0)];
        stream.read_exact(&mut bytes).unwrap();
        if asked.field("transfer-encoding") == "chunked" {
            bytes.clear();
            let mut piece = [0; 4096];
            while !bytes.ends_with(b"\r\n0\r\n\r\n") && !bytes.starts_with(b"0\r\n\r\n") {
                let read = stream.read(&mut piece).unwrap();
                bytes.extend(&piece[..read]);
            }
        }
    }
    let cases: &[(&str, &str, Bad)] = &[
        ("another digest", Lost::WRONG_ANSWER, |stream, asked| {
            body(stream, asked);
            let text = format!("sha256:{} 0", "00".repeat(32));
            put(stream, &asked.answer("200 OK", &format!("content-length: {}\r\n", text.len()), text.as_bytes()))
        }),
        ("too large, it says", Lost::WRONG_STATUS, |stream, asked| {
            body(stream, asked);
            put(stream, &asked.answer("413 Content Too Large", "content-length: 0\r\n", b""))
        }),
        ("reset while the body comes", Lost::RESET, |stream, _asked| reset(stream)),
    ];
    for (name, reason, bad) in cases {
        // The third one would wait for 100.
        let report = run(serve(*bad), "--mix upload --connections 1 --limit 2");
        assert_eq!(report.reasons, [(format!("upload: {reason}"), 2)].into(), "{name}: {report}");
    }
    let refusing: Bad = |stream, asked| match asked.field("expect") {
        "" => {
            body(stream, asked);
            put(stream, &asked.answer("500 Not Meant", "content-length: 0\r\n", b""))
        }
        _ => put(stream, &asked.answer("417 Expectation Failed", "content-length: 0\r\n", b"")) && false,
    };
    let report = run(serve(refusing), "--mix upload --connections 1 --limit 3");
    assert_eq!(report.lost, 3, "{report}");
    assert!(report.losses[2].detail.contains("417"), "{report}");
}

// -- WebSockets ---------------------------------------------------------------------------------------

/// Opens the WebSocket well.
fn upgrade(stream: &mut TcpStream, asked: &Asked) -> bool {
    let accept = websocket::accept(asked.field("sec-websocket-key"));
    put(
        stream,
        &asked.answer(
            "101 Switching Protocols",
            &format!("connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: {accept}\r\n"),
            b"",
        ),
    )
}

/// Reads a frame of the client as RFC 6455, 5.2 has it: kind and unmasked data.
fn frame(stream: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 2];
    stream.read_exact(&mut head).ok()?;
    assert_eq!((head[0] & 0xf0, head[1] & 0x80), (0x80, 0x80), "a whole, masked frame");
    let mut length = u64::from(head[1] & 0x7f);
    if length >= 126 {
        let mut wide = vec![0; if length == 126 { 2 } else { 8 }];
        stream.read_exact(&mut wide).ok()?;
        length = wide.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    }
    let (mut mask, mut data) = ([0; 4], vec![0; length as usize]);
    stream.read_exact(&mut mask).ok()?;
    stream.read_exact(&mut data).ok()?;
    data.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    Some((head[0] & 0x0f, data))
}

fn text(text: &str) -> Vec<u8> {
    [&[0x81, text.len() as u8], text.as_bytes()].concat()
}

/// Closes with a code, and lets the client answer.
fn close(stream: &mut TcpStream, code: u16) -> bool {
    put(stream, &[&[0x88, 2][..], &code.to_be_bytes()].concat());
    while let Some((kind, data)) = frame(stream) {
        if kind == 8 {
            assert_eq!(data, code.to_be_bytes(), "the code is repeated");
            break;
        }
    }
    false
}

#[test]
fn websockets_end_with_a_close_frame_and_lose_no_message() {
    // RFC 6455, 1.3.
    assert_eq!(websocket::accept("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    // (what, reason; empty: a restart, server)
    let cases: &[(&str, &str, Bad)] = &[
        ("closed without a close frame", Lost::NO_CLOSE, |stream, asked| {
            upgrade(stream, asked) && put(stream, &text("p 0")) && frame(stream).is_none()
        }),
        ("reset", Lost::RESET, |stream, asked| upgrade(stream, asked) && reset(stream)),
        ("half a frame", Lost::TRUNCATED, |stream, asked| {
            let _ = upgrade(stream, asked) && frame(stream).is_some() && put(stream, &text("p 0")[..3]);
            false
        }),
        ("1011", Lost::CLOSE_CODE, |stream, asked| upgrade(stream, asked) && close(stream, 1011)),
        ("1000, for no reason", Lost::CLOSE_CODE, |stream, asked| upgrade(stream, asked) && close(stream, 1000)),
        ("a close frame without a code", Lost::CLOSE_CODE, |stream, asked| {
            upgrade(stream, asked)
                && put(stream, &[0x88, 0])
                && {
                    while frame(stream).is_some() {}
                    true
                }
                && false
        }),
        ("1012", "", |stream, asked| upgrade(stream, asked) && close(stream, 1012)),
        ("1001", "", |stream, asked| upgrade(stream, asked) && put(stream, &text("p 0")) && close(stream, 1001)),
        ("another message", Lost::WRONG_MESSAGE, |stream, asked| {
            upgrade(stream, asked) && put(stream, &text("p0")) && frame(stream).is_some()
        }),
        ("a pushed message left out", Lost::WRONG_MESSAGE, |stream, asked| {
            upgrade(stream, asked) && put(stream, &text("p 1")) && frame(stream).is_some()
        }),
        ("a pushed message twice", Lost::WRONG_MESSAGE, |stream, asked| {
            upgrade(stream, asked) && put(stream, &text("p 0")) && put(stream, &text("p 0")) && frame(stream).is_some()
        }),
        ("an echo left out", Lost::WRONG_MESSAGE, |stream, asked| {
            let _ = upgrade(stream, asked) && frame(stream).is_some();
            let second = String::from_utf8(frame(stream).unwrap().1).unwrap();
            put(stream, &text(&second)) && frame(stream).is_some()
        }),
        ("an echo twice", Lost::WRONG_MESSAGE, |stream, asked| {
            upgrade(stream, asked);
            let first = String::from_utf8(frame(stream).unwrap().1).unwrap();
            put(stream, &text(&first)) && put(stream, &text(&first)) && frame(stream).is_some()
        }),
        ("a wrong byte in an echo", Lost::WRONG_MESSAGE, |stream, asked| {
            upgrade(stream, asked);
            let mut first = frame(stream).unwrap().1;
            *first.last_mut().unwrap() ^= 1;
            put(stream, &[&[0x81, first.len() as u8][..], &first].concat()) && frame(stream).is_some()
        }),
        ("silence", Lost::LATE, |stream, asked| {
            upgrade(stream, asked)
                && {
                    while frame(stream).is_some() {}
                    true
                }
                && false
        }),
        ("a masked frame", Lost::MALFORMED, |stream, asked| {
            upgrade(stream, asked) && put(stream, &[0x81, 0x81, 0, 0, 0, 0, b'p']) && frame(stream).is_some()
        }),
        ("the answer to another handshake", Lost::WRONG_ANSWER, |stream, asked| {
            put(
                stream,
                &asked.answer(
                    "101 Switching",
                    "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: AAAA\r\n",
                    b"",
                ),
            )
        }),
        ("502", Lost::WRONG_STATUS, |stream, asked| put(stream, &asked.answer("502 Bad Gateway", "content-length: 0\r\n", b""))),
        ("200", Lost::WRONG_STATUS, |stream, asked| put(stream, &asked.answer("200 OK", "content-length: 0\r\n", b""))),
    ];
    for (name, reason, bad) in cases {
        let report = run(serve(*bad), "--mix ws --connections 1 --limit 2 --timeout 1 --interval 10");
        let figures = only(&report, "ws");
        let restarts = if reason.is_empty() { 2 } else { 0 };
        assert_eq!((figures.requests, figures.lost, figures.restarts), (2, 2 - restarts, restarts), "{name}: {report}");
        let expected = if restarts > 0 { [].into() } else { [(format!("ws: {reason}"), 2)].into() };
        assert_eq!(report.reasons, expected, "{name}: {report}");
        let codes = [("1000", "1000, for no"), ("1001", "1001"), ("1011", "1011"), ("1012", "1012"), ("none", "a close frame")];
        let codes: Vec<_> =
            codes.into_iter().filter(|(_, case)| name.starts_with(case)).map(|(code, _)| (code.to_owned(), 2)).collect();
        assert_eq!(report.close_codes, codes.into_iter().collect(), "{name}: {report}");
    }
}

// -- event streams ------------------------------------------------------------------------------------

/// Opens a stream well; the number of its first event.
fn stream_of(stream: &mut TcpStream, asked: &Asked) -> u64 {
    put(stream, &asked.answer("200 OK", "content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n", b""));
    asked.field("last-event-id").parse().map_or(0, |last: u64| last + 1)
}

fn chunk(stream: &mut TcpStream, text: &str) -> bool {
    put(stream, format!("{:x}\r\n{text}\r\n", text.len()).as_bytes())
}

/// Sends the events of these numbers, after the first one's, and what ends the stream.
fn events(stream: &mut TcpStream, asked: &Asked, numbers: &[u64], end: &str) {
    let first = stream_of(stream, asked);
    for number in numbers {
        chunk(stream, &event(asked.query("seed"), first + number, "bad"));
    }
    put(stream, end.as_bytes());
}

#[test]
fn event_streams_end_whole_and_lose_no_event() {
    const END: &str = "0\r\n\r\n";
    // (what, reason; empty: restarts, server)
    let cases: &[(&str, &str, Bad)] = &[
        ("ended after whole events", "", |stream, asked| {
            events(stream, asked, &[0, 1, 2], END);
            true
        }),
        ("a comment between", "", |stream, asked| {
            events(stream, asked, &[0], "3\r\n:\n\n\r\n0\r\n\r\n");
            true
        }),
        ("closed without the last chunk", Lost::TRUNCATED, |stream, asked| {
            events(stream, asked, &[0, 1], "");
            false
        }),
        ("ended inside an event", Lost::TRUNCATED, |stream, asked| {
            events(stream, asked, &[0], "5\r\nid: 1\r\n0\r\n\r\n");
            true
        }),
        ("reset", Lost::RESET, |stream, asked| {
            events(stream, asked, &[], "");
            reset(stream)
        }),
        ("an event twice", Lost::WRONG_EVENT, |stream, asked| {
            events(stream, asked, &[0, 0], END);
            true
        }),
        ("an event left out", Lost::WRONG_EVENT, |stream, asked| {
            events(stream, asked, &[0, 2], END);
            true
        }),
        ("does not go on where it stopped", Lost::WRONG_EVENT, |stream, asked| {
            stream_of(stream, asked);
            chunk(stream, &event(asked.query("seed"), 7, "bad")) && put(stream, END.as_bytes())
        }),
        ("another version's event", Lost::WRONG_EVENT, |stream, asked| {
            stream_of(stream, asked);
            chunk(stream, &event(asked.query("seed"), 0, "other")) && put(stream, END.as_bytes())
        }),
        ("no event stream", Lost::WRONG_ANSWER, |stream, asked| {
            put(stream, &asked.answer("200 OK", "content-type: text/html\r\ncontent-length: 0\r\n", b""))
        }),
        ("no end that can be told from a failure", Lost::WRONG_ANSWER, |stream, asked| {
            put(stream, &asked.answer("200 OK", "content-type: text/event-stream\r\n", b"")) && false
        }),
        ("503", Lost::WRONG_STATUS, |stream, asked| {
            put(stream, &asked.answer("503 Service Unavailable", "content-length: 0\r\n", b""))
        }),
        ("silence", Lost::LATE, |stream, asked| {
            stream_of(stream, asked);
            head(stream).is_some()
        }),
    ];
    for (name, reason, bad) in cases {
        let report = run(serve(*bad), "--mix sse --connections 1 --limit 2 --timeout 1");
        let figures = only(&report, "sse");
        let restarts = if reason.is_empty() { 2 } else { 0 };
        assert_eq!((figures.requests, figures.lost, figures.restarts), (2, 2 - restarts, restarts), "{name}: {report}");
        let expected = if restarts > 0 { [].into() } else { [(format!("sse: {reason}"), 2)].into() };
        assert_eq!(report.reasons, expected, "{name}: {report}");
    }
}

// -- HTTP/2 -------------------------------------------------------------------------------------------

/// What the HTTP/2 server does with the second request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Second {
    Good,
    /// Says beforehand that it takes no more requests on this connection.
    Graceful,
    Reset(h2::Reason),
    Away(h2::Reason),
    Drop,
    Status(u16),
    WrongByte,
    WrongId,
    Short,
    ShortOfLength,
}

fn serve_h2(second: Second) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let mut number = 0;
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let mut connection = h2::server::handshake(socket).await.unwrap();
                while let Some(Ok((request, mut answer))) = connection.accept().await {
                    number += 1;
                    let act = if number == 2 { second } else { Second::Good };
                    match act {
                        Second::Reset(reason) => {
                            answer.send_reset(reason);
                            continue;
                        }
                        Second::Away(reason) => {
                            connection.abrupt_shutdown(reason);
                            continue;
                        }
                        Second::Drop => break,
                        _ => (),
                    }
                    respond(&request, answer, act);
                    if number == 1 && second == Second::Graceful {
                        connection.graceful_shutdown();
                    }
                }
            }
        });
    });
    address
}

fn respond(request: &http::Request<h2::RecvStream>, mut answer: h2::server::SendResponse<Piece>, act: Second) {
    let id = request.headers()["x-load-id"].to_str().unwrap().to_owned();
    let asked = Asked { number: 0, head: format!("GET {} HTTP/2", request.uri().path_and_query().unwrap()) };
    let mut body = asked.bytes();
    let mut head = http::Response::builder().header("x-load-version", "bad");
    head = match act {
        Second::WrongId => head.header("x-load-id", "f"),
        _ => head.header("x-load-id", id),
    };
    match act {
        Second::Status(status) => head = head.status(status),
        Second::WrongByte => body[10_000] ^= 1,
        Second::Short => body.truncate(19_999),
        Second::ShortOfLength => {
            body.truncate(19_999);
            head = head.header("content-length", 20_000);
        }
        _ => (),
    }
    let mut stream = answer.send_response(head.body(()).unwrap(), false).unwrap();
    stream.send_data(body.into(), true).unwrap();
}

#[test]
fn bad_streams_of_http_2_are_lost() {
    // (what, reason; empty: nothing is lost, connections)
    let cases: &[(Second, &str, u64)] = &[
        (Second::Good, "", 1),
        (Second::Graceful, "", 2),
        (Second::Reset(h2::Reason::INTERNAL_ERROR), Lost::STREAM, 1),
        // Whoever is refused may ask again (RFC 9113, 8.7): a client that never does has lost it.
        (Second::Reset(h2::Reason::REFUSED_STREAM), Lost::STREAM, 1),
        (Second::Away(h2::Reason::INTERNAL_ERROR), Lost::GOAWAY, 2),
        (Second::Drop, Lost::RESET, 2),
        (Second::Status(502), Lost::WRONG_STATUS, 1),
        (Second::WrongByte, Lost::WRONG_BYTE, 1),
        (Second::WrongId, Lost::WRONG_ANSWER, 1),
        (Second::Short, Lost::TRUNCATED, 1),
        (Second::ShortOfLength, Lost::STREAM, 1),
    ];
    for (second, reason, connections) in cases {
        let report = run(serve_h2(*second), "--mix h2 --streams 1 --connections 1 --limit 3 --timeout 5");
        let figures = only(&report, "h2");
        let lost = u64::from(!reason.is_empty());
        assert_eq!((figures.good, figures.lost), (3 - lost, lost), "{second:?}: {report}");
        let mut reasons = report.reasons.clone();
        if let Second::Away(_) = second {
            // The connection is closed after the GOAWAY, and a stream may see that first.
            let other = reasons.remove(&format!("h2: {}", Lost::RESET));
            reasons.extend(other.map(|lost| (format!("h2: {reason}"), lost)));
        }
        let expected = if lost == 0 { [].into() } else { [(format!("h2: {reason}"), 1)].into() };
        assert_eq!(reasons, expected, "{second:?}: {report}");
        assert_eq!(figures.connections, *connections, "{second:?}: {report}");
        assert_eq!(figures.closed_by_server, u64::from(*second == Second::Graceful), "{second:?}: {report}");
    }
}

// -- TLS ----------------------------------------------------------------------------------------------

/// Makes a certificate for 127.0.0.1 and its key.
fn certificate(dir: &Path, name: &str) -> (String, String) {
    let [certificate, key] = ["pem", "key"].map(|kind| dir.join(format!("{name}.{kind}")).to_str().unwrap().to_owned());
    let line = format!(
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 2 -subj /CN=load -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE -out {certificate} -keyout {key}"
    );
    #[expect(clippy::disallowed_methods, reason = "this test knows nothing of the crate")]
    let made = Command::new("openssl").args(line.split(' ')).output().expect("`openssl` runs: apt-get install openssl");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    (certificate, key)
}

/// A server of TLS; `cut`: the connection ends within the answer, with or without saying so.
fn serve_tls(certificate: &str, key: &str, cut: Option<bool>) -> SocketAddr {
    use rustls::pki_types::pem::PemObject as _;
    let chain = vec![rustls::pki_types::CertificateDer::from_pem_file(certificate).unwrap()];
    let key = rustls::pki_types::PrivateKeyDer::from_pem_file(key).unwrap();
    let builder = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let config =
        builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth().with_single_cert(chain, key).unwrap();
    let (listener, config) = (TcpListener::bind("127.0.0.1:0").unwrap(), Arc::new(config));
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let mut stream = rustls::StreamOwned::new(rustls::ServerConnection::new(config.clone()).unwrap(), socket.unwrap());
            let (mut bytes, mut byte) = (Vec::new(), [0]);
            while stream.read(&mut byte).is_ok_and(|read| read > 0) {
                bytes.push(byte[0]);
                if !bytes.ends_with(b"\r\n\r\n") {
                    continue;
                }
                let asked = Asked { number: 0, head: String::from_utf8(std::mem::take(&mut bytes)).unwrap() };
                if let Some(told) = cut {
                    // The length is right, the end is not.
                    stream.write_all(&asked.answer("200 OK", "", &asked.bytes())).unwrap();
                    if told {
                        stream.conn.send_close_notify();
                    }
                    stream.flush().unwrap();
                    break;
                }
                stream.write_all(&asked.good()).unwrap();
                stream.flush().unwrap();
            }
        }
    });
    address
}

#[test]
fn tls_is_trusted_and_ends_as_it_should() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, key) = certificate(dir.path(), "ours");
    let (other, _) = certificate(dir.path(), "other");
    // (trusted, connection cut, losses)
    let cases = [
        (&ours, None, None),
        (&other, None, Some(Lost::TLS)),
        // The end of a body that only the end of the connection tells, unsaid: anybody could have cut it (RFC 9112, 9.8).
        (&ours, Some(false), Some(Lost::TRUNCATED)),
        (&ours, Some(true), None),
    ];
    for (ca, cut, reason) in cases {
        let report = run(serve_tls(&ours, &key, cut), &format!("--tls --ca {ca} --mix h1 --connections 1 --limit 3"));
        let expected = reason.map(|reason| (format!("h1: {reason}"), 3)).into_iter().collect();
        assert_eq!(report.reasons, expected, "{cut:?}: {report}");
        assert_eq!(report.requests, 3, "{report}");
    }
    // HTTP/2 is not what this server speaks.
    let report = run(serve_tls(&ours, &key, None), &format!("--tls --ca {ours} --mix h2 --connections 1 --limit 1"));
    assert_eq!(report.reasons, [(format!("h2: {}", Lost::TLS), 1)].into(), "{report}");
}

// -- the upstream -------------------------------------------------------------------------------------

/// The test upstream in a thread; sending true is its SIGTERM, and its status is awaited by joining.
fn upstream(words: &str) -> (SocketAddr, tokio::sync::watch::Sender<bool>, thread::JoinHandle<String>) {
    let args = Upstream::try_parse_from(format!("upstream {words}").split_whitespace()).unwrap().args;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, stop) = tokio::sync::watch::channel(false);
    let thread = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let served = tokio::task::LocalSet::new().block_on(&runtime, async {
            upstream::serve(tokio::net::TcpListener::from_std(listener).unwrap(), &args, args.version.clone().unwrap(), stop)
                .await
        });
        format!("{:?}", served.unwrap())
    });
    (address, sender, thread)
}

#[test]
fn a_good_upstream_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (answers, report) = (dir.path().join("answers"), dir.path().join("report.json"));
    let (address, stop, thread) = upstream("--version v1");
    let words = format!(
        "--mix h1,upload,ws,sse,large --connections 10 --seconds 2 --large-rate 16777216 --answers {} --report {}",
        answers.display(),
        report.display()
    );
    let found = run(address, &words);
    assert_eq!(found.lost, 0, "{found}");
    for kind in ["h1", "upload", "ws", "sse", "large"] {
        let figures = only(&found, kind);
        assert!(figures.good > 0 && figures.connections == 2 && figures.restarts == 0, "{kind}: {found}");
    }
    assert!(only(&found, "ws").messages > 0 && only(&found, "sse").messages > 0, "{found}");
    assert_eq!(found.close_codes, [("1000".into(), 2)].into(), "{found}");
    assert!(found.versions.keys().eq(["v1"]), "{found}");
    // What is written is what was found, an answer a line, within the time of the run.
    let written: serde_json::Value = serde_json::from_slice(&fs_err::read(report).unwrap()).unwrap();
    assert_eq!(written, serde_json::to_value(&found).unwrap());
    let lines = fs_err::read_to_string(answers).unwrap();
    assert_eq!(lines.lines().count() as u64, found.versions["v1"].requests, "{found}");
    for line in lines.lines() {
        let words: Vec<_> = line.split(' ').collect();
        let [sent, answered, accepted] = [words[0], words[1], words[4]].map(|word| word.parse::<u64>().unwrap());
        assert!(found.started <= sent && sent <= answered && answered <= found.ended, "{line}");
        assert!(accepted == 0 && ["ws", "sse"].contains(&words[3]) || sent <= accepted && accepted <= answered, "{line}");
        assert!(words.len() == 5 && words[2] == "v1" && found.kinds.contains_key(words[3]), "{line}");
    }
    stop.send_replace(true);
    assert_eq!(thread.join().unwrap(), "ExitCode(unix_exit_status(0))");
}

#[test]
fn an_upstream_that_is_told_to_end_ends_everything_well() {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let (address, stop, thread) = upstream("--version v1");
    let download = thread::spawn(move || run(address, "--mix large --connections 1 --limit 1"));
    let streams = {
        let words = format!("--mix ws,sse --connections 4 --limit 1 --interval 5 --ready-file {}", ready.display());
        thread::spawn(move || run(address, &words))
    };
    while !ready.exists() {
        thread::sleep(Duration::from_millis(5));
    }
    stop.send_replace(true);
    let (streams, download) = (streams.join().unwrap(), download.join().unwrap());
    assert_eq!(thread.join().unwrap(), "ExitCode(unix_exit_status(0))");
    assert_eq!((streams.lost, download.lost), (0, 0), "{streams}\n{download}");
    assert_eq!((only(&streams, "ws").restarts, only(&streams, "sse").restarts), (2, 2), "{streams}");
    assert_eq!(streams.close_codes, [("1001".into(), 2)].into(), "{streams}");
}

#[test]
fn an_upstream_misbehaves_as_asked() {
    // (arguments, lost of 12 requests)
    let cases = [("--error-every 3", 4), ("--error-every 1", 12), ("--latency 1", 0)];
    for (words, lost) in cases {
        let (address, stop, thread) = upstream(&format!("--version v1 {words}"));
        let report = run(address, "--mix h1 --connections 1 --limit 12");
        assert_eq!((report.requests, report.lost), (12, lost), "{words}: {report}");
        stop.send_replace(true);
        assert_eq!(thread.join().unwrap(), "ExitCode(unix_exit_status(0))");
    }
    let (address, _stop, thread) = upstream("--version v1 --die-after 0.2");
    let report = run(address, "--mix ws --connections 1 --limit 2");
    assert_eq!(thread.join().unwrap(), "ExitCode(unix_exit_status(3))");
    assert_eq!(report.lost, 2, "{report}");
    for (words, expected) in
        [("", "HTTP/1.1 200"), ("--healthy-after 60", "HTTP/1.1 503"), ("--unhealthy-after 0", "HTTP/1.1 503")]
    {
        let (address, _stop, _thread) = upstream(&format!("--version v1 {words}"));
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: load\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with(expected), "{words}: {answer}");
    }
}
