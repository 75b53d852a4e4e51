//! WebSockets and event streams that end or go on as they should not.

use std::io::Read as _;
use std::net::TcpStream;

use super::load::upstream::event;
use super::load::websocket;
use super::load::wire::Lost;
use super::{Asked, Bad, end, head, only, put, reset, run, serve, silence};

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
            upgrade(stream, asked) && put(stream, &[0x88, 0]) && silence(stream)
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
        ("silence", Lost::LATE, |stream, asked| upgrade(stream, asked) && silence(stream)),
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
            end(stream, &asked.answer("200 OK", "content-type: text/event-stream\r\n", b""))
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
