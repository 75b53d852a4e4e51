//! Forwarding: bodies, trailers, interim answers, fields, HTTP/2, event streams.

use super::*;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};

#[test]
fn a_request_is_seen_by_the_instance_as_it_was_sent() {
    let origin = Origin::echo();
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    for (request, body) in [
        (
            "POST /x?a=b%20c HTTP/1.1\r\nhost: Shop.test:80\r\ncontent-length: 5\r\nx-own: 1\r\nconnection: x-gone\r\nx-gone: 1\r\n\r\nhello",
            "hello",
        ),
        (
            "POST /x?a=b%20c HTTP/1.1\r\nhost: Shop.test:80\r\ntransfer-encoding: chunked\r\nx-own: 1\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
            "hello",
        ),
        ("POST /x?a=b%20c HTTP/1.1\r\nhost: Shop.test:80\r\ncontent-length: 0\r\nx-own: 1\r\n\r\n", ""),
    ] {
        client.send(request);
        let (status, text) = client.response().unwrap();
        let (head, echoed) = text.split_once("\r\n\r\n").unwrap();
        assert_eq!((status, echoed), (200, body), "{head}");
        assert!(head.starts_with("POST /x?a=b%20c HTTP/1.1\r\nhost: Shop.test:80\r\n"), "{head}");
        let wanted = [
            ("x-own", Some("1")),
            ("x-gone", None),
            ("connection", None),
            ("x-forwarded-for", Some("127.0.0.1")),
            ("x-forwarded-proto", Some("http")),
        ];
        wanted.iter().for_each(|(name, value)| assert_eq!(field(head, name), *value, "{name} in {head}"));
    }
    assert_eq!(origin.accepted(), 1, "the connection to the instance is used again");
    let lines = fixture.log(3);
    assert_eq!(
        (&lines[0]["path"], &lines[0]["query"], &lines[0]["received"]),
        (&"/x".into(), &"a=b%20c".into(), &5.into()),
        "{lines:?}"
    );
}

/// Bodies of every framing and size arrive byte for byte, and are not held back.
#[test]
fn answers_are_streamed_whole() {
    let origin = Origin::start(|conn| {
        while let Some(head) = conn.request() {
            let path = head.split(' ').nth(1).unwrap().to_owned();
            let (kind, size) = path[1..].split_once('/').unwrap();
            let body: Vec<u8> = (0..size.parse::<usize>().unwrap()).map(|index| (index % 251) as u8).collect();
            match kind {
                "length" => {
                    conn.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()));
                    conn.send(&body);
                }
                "chunked" => {
                    conn.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
                    body.chunks(7001).for_each(|chunk| {
                        conn.send(format!("{:x}\r\n", chunk.len()));
                        conn.send(chunk);
                        conn.send("\r\n");
                    });
                    conn.send("0\r\n\r\n");
                }
                _ => {
                    conn.send("HTTP/1.0 200 OK\r\n\r\n");
                    conn.send(&body);
                    return;
                }
            }
        }
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    for kind in ["length", "chunked", "close"] {
        for size in [0, 1, 20_000, 3_000_000] {
            client.send(format!("GET /{kind}/{size} HTTP/1.1\r\nhost: a\r\n\r\n"));
            let head = client.request().unwrap();
            let body = client.body(&head);
            assert!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
            assert!(
                body.len() == size && body.iter().enumerate().all(|(index, byte)| *byte == (index % 251) as u8),
                "{kind} of {size}: {} bytes",
                body.len()
            );
        }
    }
}

#[test]
fn bodies_are_streamed_both_ways_at_once() {
    // The instance answers each line of the request's body while the body is still open.
    let origin = Origin::start(|conn| {
        let head = conn.request().unwrap();
        assert_eq!(field(&head, "transfer-encoding"), Some("chunked"));
        conn.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
        while let Some(line) = conn.until("\r\n") {
            let size = usize::from_str_radix(line.trim(), 16).unwrap();
            let data = conn.exactly(size);
            conn.until("\r\n");
            conn.send(format!("{size:x}\r\n{}\r\n", String::from_utf8(data).unwrap().to_uppercase()));
            if size == 0 {
                break;
            }
        }
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    client.send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n");
    client.request().unwrap();
    for word in ["ping", "pong", "last"] {
        client.send(format!("4\r\n{word}\r\n"));
        assert_eq!(client.until("\r\n").as_deref(), Some("4\r\n"));
        assert_eq!(client.until("\r\n"), Some(format!("{}\r\n", word.to_uppercase())));
    }
    client.send("0\r\n\r\n");
    assert_eq!(client.until("0\r\n\r\n").as_deref(), Some("0\r\n\r\n"));
}

#[test]
fn trailers_cross_both_ways() {
    let origin = Origin::start(|conn| {
        while let Some(head) = conn.request() {
            let body = String::from_utf8(conn.body(&head)).unwrap();
            let te = field(&head, "te").unwrap_or("none").to_owned();
            let text = format!("{te} {body}");
            conn.send(format!(
                "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{text}\r\n0\r\nx-sum: 7\r\n\r\n",
                text.len()
            ));
        }
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    client.send("POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: te\r\ntrailer: x-up\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nx-up: 3\r\ncontent-length: 9\r\n\r\n");
    let (status, body) = client.response().unwrap();
    assert_eq!((status, body.as_str()), (200, "trailers hix-up: 3\r\nx-sum: 7\r\n"));
}

#[test]
fn head_and_bodiless_answers_end_at_their_head() {
    let origin = Origin::start(|conn| {
        while let Some(head) = conn.request() {
            match head.split(' ').nth(1).unwrap() {
                "/304" => conn.send("HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n"),
                "/204" => conn.send("HTTP/1.1 204 No Content\r\n\r\n"),
                _ => conn.send("HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"),
            }
        }
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    for (request, status, length) in [("HEAD /", "200", Some("1234")), ("GET /304", "304", None), ("GET /204", "204", None)] {
        client.send(format!("{request} HTTP/1.1\r\nhost: a\r\n\r\n"));
        let head = client.request().unwrap();
        assert_eq!((head.split(' ').nth(1), field(&head, "content-length")), (Some(status), length), "{head}");
    }
    assert_eq!(origin.accepted(), 1);
}

#[test]
fn a_hundred_is_asked_of_the_instance() {
    let origin = Origin::start(|conn| {
        while let Some(head) = conn.request() {
            assert_eq!(field(&head, "expect"), Some("100-continue"));
            if head.contains("/refused") {
                conn.send("HTTP/1.1 417 Expectation Failed\r\ncontent-length: 0\r\n\r\n");
                return;
            }
            assert!(conn.buffer.is_empty(), "the body waits");
            conn.send("HTTP/1.1 100 Continue\r\n\r\n");
            let body = String::from_utf8(conn.body(&head)).unwrap();
            conn.answer(&body);
        }
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    client.send("PUT / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    assert!(client.request().unwrap().starts_with("HTTP/1.1 100 "));
    client.send("hello");
    assert_eq!(client.response(), Some((200, "hello".into())));
    client.send("PUT /refused HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n");
    assert_eq!(client.response().map(|answer| answer.0), Some(417), "the final answer comes without a 100 before it");
}

#[test]
fn interim_answers_are_passed_over() {
    let origin = Origin::start(|conn| {
        while conn.request().is_some() {
            conn.send("HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n");
            conn.answer("x");
        }
    });
    assert_eq!(Fixture::of(&[&origin]).client().get("/"), Some((200, "x".into())));
}

#[test]
fn events_are_flushed_at_once() {
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let origin = Origin::start(move |conn| {
        conn.request();
        conn.send("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n");
        while gate.lock().unwrap().recv().is_ok() {
            conn.send("9\r\ndata: 1\n\n\r\n");
        }
        conn.send("0\r\n\r\n");
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
    client.request().unwrap();
    for _ in 0..3 {
        go.send(()).unwrap();
        // Nothing else comes that could have pushed it out.
        assert_eq!(client.until("\n\n\r\n").as_deref(), Some("9\r\ndata: 1\n\n\r\n"));
    }
    assert_eq!(fixture.switch.draining("shop/prod", "a"), Some(Draining { requests: 0, websockets: 0, streams: 1 }));
    drop(go);
    assert_eq!(client.until("0\r\n\r\n").as_deref(), Some("0\r\n\r\n"));
    eventually("end of the stream", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
}

/// A client that speaks HTTP/2 with prior knowledge.
pub(super) async fn h2(address: SocketAddr) -> hyper::client::conn::http2::SendRequest<http_body_util::Full<Bytes>> {
    let stream = TcpStream_::connect(address).await.unwrap();
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

#[test]
fn http_2_becomes_http_1() {
    let origin = Origin::start(|conn| {
        while let Some(head) = conn.request() {
            let body = conn.body(&head);
            let text = [head.as_bytes(), &body].concat();
            conn.send(format!(
                "HTTP/1.1 200 OK\r\nconnection: x-hop\r\nx-hop: 1\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n",
                text.len()
            ));
            conn.send(&text);
            conn.send("\r\n0\r\nx-sum: 7\r\n\r\n");
        }
    });
    let fixture = Fixture::of(&[&origin]);
    block_on(async {
        let mut sender = h2(fixture.address).await;
        let body = Bytes::from(vec![b'x'; 200_000]);
        let request = http::Request::put(format!("http://{}/a?b", fixture.address))
            .header("cookie", "a=1")
            .header("cookie", "b=2")
            .header("te", "trailers");
        let answer = sender.send_request(request.body(http_body_util::Full::new(body.clone())).unwrap()).await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.headers().get("x-hop")), (200, None));
        let collected = answer.into_body().collect().await.unwrap();
        assert_eq!(collected.trailers().unwrap()["x-sum"], "7");
        let bytes = collected.to_bytes();
        let (head, echoed) = bytes.split_at(bytes.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap() + 4);
        let head = std::str::from_utf8(head).unwrap();
        assert_eq!(echoed, body);
        assert!(head.starts_with(&format!("PUT /a?b HTTP/1.1\r\nhost: {}\r\n", fixture.address)), "{head}");
        assert_eq!(
            (field(head, "cookie"), field(head, "content-length"), field(head, "te")),
            (Some("a=1; b=2"), Some("200000"), Some("trailers"))
        );
    });
    assert_eq!(fixture.log(1)[0]["protocol"], "HTTP/2");
}

#[test]
fn trusted_forwarders_are_continued_and_others_replaced() {
    let origin = Origin::echo();
    for (trusted, wanted) in
        [(vec!["127.0.0.0/8".parse().unwrap()], "192.0.2.1, 127.0.0.1"), (vec!["::/0".parse().unwrap()], "127.0.0.1")]
    {
        let fixture = Fixture::start(|settings| settings.trusted = trusted);
        fixture.live("a", &[&origin]);
        let mut client = fixture.client();
        client.send("GET / HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 192.0.2.1\r\n\r\n");
        assert_eq!(field(&client.response().unwrap().1, "x-forwarded-for"), Some(wanted));
    }
}
