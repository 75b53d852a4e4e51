//! The load client against servers that are bad on purpose, each in one way: every one of them must be counted as lost, and
//! what a server may do must not be. Without this the proof that a switch loses nothing would prove nothing.

#[allow(dead_code, reason = "the program has more than these tests need")]
#[path = "load/program.rs"]
mod load;

#[path = "load_client/app.rs"]
mod app;
#[path = "load_client/secure.rs"]
mod secure;
#[path = "load_client/streams.rs"]
mod streams;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use clap::Parser as _;
use load::bytes::Bytes;
use load::client::{self, ClientArgs};
use load::report::{Figures, Report};
use load::wire::Lost;

#[derive(Debug, clap::Parser)]
struct Client {
    #[command(flatten)]
    args: ClientArgs,
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

/// Writes, and ends the connection.
fn end(stream: &mut TcpStream, bytes: &[u8]) -> bool {
    put(stream, bytes);
    false
}

/// Waits until the client ends the connection.
fn silence(stream: &mut TcpStream) -> bool {
    // However it ends.
    let _ = stream.read_to_end(&mut Vec::new());
    false
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
                end(stream, &good[..good.len() - 1])
            }),
        ),
        (
            "chunked without the last chunk",
            Lost::TRUNCATED,
            second!(|stream, asked| {
                let body = [b"4e20\r\n", asked.bytes().as_slice(), b"\r\n"].concat();
                end(stream, &asked.answer("200 OK", "transfer-encoding: chunked\r\n", &body))
            }),
        ),
        (
            "a chunk that is not whole",
            Lost::TRUNCATED,
            second!(|stream, asked| {
                let body = [b"4e20\r\n", &asked.bytes()[..100]].concat();
                end(stream, &asked.answer("200 OK", "transfer-encoding: chunked\r\n", &body))
            }),
        ),
        (
            "without length, too short",
            Lost::TRUNCATED,
            second!(|stream, asked| end(stream, &asked.answer("200 OK", "", &asked.bytes()[..19_999]))),
        ),
        ("half a head", Lost::TRUNCATED, second!(|stream, _asked| end(stream, b"HTTP/1.1 200 OK\r\nx-load"))),
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
            second!(|stream, asked| end(stream, &asked.answer("200 OK", "content-length: 20001\r\n", &asked.bytes()))),
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
                end(stream, &asked.answer("503 Service Unavailable", "content-length: 0\r\nconnection: close\r\n", b""))
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
        ("no HTTP", Lost::MALFORMED, second!(|stream, _asked| end(stream, b"SSH-2.0-OpenSSH\r\n\r\n"))),
        (
            "two framings",
            Lost::MALFORMED,
            second!(|stream, asked| {
                end(stream, &asked.answer("200 OK", "content-length: 20000\r\ntransfer-encoding: chunked\r\n", &asked.bytes()))
            }),
        ),
        (
            "two lengths",
            Lost::MALFORMED,
            second!(|stream, asked| {
                end(stream, &asked.answer("200 OK", "content-length: 20000\r\ncontent-length: 20001\r\n", &asked.bytes()))
            }),
        ),
        ("silence", Lost::LATE, second!(|stream, _asked| silence(stream))),
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
    for kind in ["h1", "h2", "upload", "ws", "sse", "sse2", "large"] {
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
                end(stream, &asked.answer("200 OK", &format!("content-length: {}\r\nconnection: close\r\n", body.len()), &body))
            },
            [3, 3, 0],
        ),
        (
            "ends the body with the connection",
            |stream, asked| end(stream, &asked.answer("200 OK", "", &asked.bytes())),
            [3, 3, 0],
        ),
        // The client looks before it sends, a fifth of a second later.
        ("closes while nothing is asked", |stream, asked| end(stream, &asked.good()), [3, 0, 2]),
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
        _ => end(stream, &asked.answer("417 Expectation Failed", "content-length: 0\r\n", b"")),
    };
    let report = run(serve(refusing), "--mix upload --connections 1 --limit 3");
    assert_eq!(report.lost, 3, "{report}");
    assert!(report.losses[2].detail.contains("417"), "{report}");
}
