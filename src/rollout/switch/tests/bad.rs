//! Bad clients and bad instances.

use super::*;

/// Requests that could be read in two ways, or not at all, never reach an instance and end the connection.
#[test]
fn what_is_malformed_is_refused() {
    let origin = Origin::saying("reached");
    let fixture = Fixture::start(|settings| settings.limits.body = Some(1000));
    fixture.live("a", &[&origin]);
    let long = "x".repeat(70_000);
    let many: String = (0..120).map(|number| format!("x-{number}: y\r\n")).collect();
    for (name, request, status) in [
        (
            "CL and TE",
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
            400,
        ),
        (
            "TE and CL",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n".to_owned(),
            400,
        ),
        ("two CL", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcde".to_owned(), 400),
        ("CL with a sign", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +4\r\n\r\nabcd".to_owned(), 400),
        (
            "CL too large a number",
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n".to_owned(),
            400,
        ),
        ("TE in HTTP/1.0", "POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(), 400),
        (
            "TE that is not chunked",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n".to_owned(),
            501,
        ),
        (
            "TE with chunked not last",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n".to_owned(),
            400,
        ),
        (
            "TE hidden by a tab",
            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding\t: chunked\r\ncontent-length: 4\r\n\r\nabcd".to_owned(),
            400,
        ),
        ("a space before the colon", "GET / HTTP/1.1\r\nhost : a\r\n\r\n".to_owned(), 400),
        ("a folded line", "GET / HTTP/1.1\r\nhost: a\r\nx: y\r\n z\r\n\r\n".to_owned(), 400),
        ("a folded first line", "GET / HTTP/1.1\r\n host: a\r\n\r\n".to_owned(), 400),
        ("a bare CR in a value", "GET / HTTP/1.1\r\nhost: a\r\nx: y\rz: w\r\n\r\n".to_owned(), 400),
        ("a NUL in a value", "GET / HTTP/1.1\r\nhost: a\r\nx: y\0z\r\n\r\n".to_owned(), 400),
        ("two hosts", "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n".to_owned(), 400),
        ("no host", "GET / HTTP/1.1\r\n\r\n".to_owned(), 400),
        ("a host that is none", "GET / HTTP/1.1\r\nhost: a/../b\r\n\r\n".to_owned(), 400),
        ("a version that is none", "GET / HTTP/3.7\r\nhost: a\r\n\r\n".to_owned(), 400),
        ("a method that is none", "GE(T / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(), 400),
        ("CONNECT", "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n".to_owned(), 405),
        ("TLS where there is none", "\x16\x03\x01\x02\0\x01\0\x01\u{7c}\x03\x03".to_owned(), 400),
        ("too many fields", format!("GET / HTTP/1.1\r\nhost: a\r\n{many}\r\n"), 431),
        ("too large a head", format!("GET / HTTP/1.1\r\nhost: a\r\nx: {long}\r\n\r\n"), 431),
        ("too large a body", "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1001\r\n\r\n".to_owned(), 413),
    ] {
        let answer = fixture.raw(&request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{name}: {answer:?}");
        assert_eq!(answer.matches("HTTP/1.").count(), 1, "{name}: nothing after it on the connection: {answer:?}");
    }
    assert_eq!(origin.accepted(), 0, "the instance saw nothing of it");
}

/// A second request hidden in a body stays a body, whichever way the body is framed.
#[test]
fn bodies_smuggle_nothing() {
    let origin = Origin::echo();
    let fixture = Fixture::of(&[&origin]);
    let hidden = "GET /hidden HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut client = fixture.client();
    client.send(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{hidden}", hidden.len()));
    let (_, text) = client.response().unwrap();
    assert!(text.ends_with(hidden) && text.starts_with("POST / "), "{text}");
    client.send(format!(
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{hidden}\r\n0\r\n\r\n",
        hidden.len()
    ));
    let (_, text) = client.response().unwrap();
    assert!(text.ends_with(hidden) && text.starts_with("POST / "), "{text}");
    // A malformed chunk ends request and connection; what follows is no request.
    let mut client = fixture.client();
    client.send(format!("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello{hidden}"));
    let (text, _) = client.rest();
    assert!(!text.contains("200 OK"), "{text}");
    assert!(fixture.log(3).iter().all(|line| line["path"] == "/"), "nothing asked for /hidden");
}

#[test]
fn an_oversized_chunked_body_is_cut() {
    let origin = Origin::echo();
    let fixture = Fixture::start(|settings| settings.limits.body = Some(10));
    fixture.live("a", &[&origin]);
    let mut client = fixture.client();
    client.send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n8\r\nabcdefgh\r\n8\r\nabcdefgh\r\n");
    assert_eq!(client.response().map(|answer| answer.0), Some(413));
}

/// Slow clients are ended by the time-out of what they are slow at, and nobody else waits for them.
#[test]
fn slow_clients_are_ended() {
    let origin = Origin::echo();
    let fixture = Fixture::start(|settings| {
        settings.timeouts = Timeouts {
            head: Duration::from_millis(400),
            idle: Duration::from_millis(800),
            inactivity: Duration::from_millis(500),
            ..settings.timeouts.clone()
        };
    });
    fixture.live("a", &[&origin]);
    // Byte after byte of a head that never ends: what moves does not count here.
    let drip = |first: &str| {
        let mut client = fixture.client();
        client.send(first);
        std::thread::spawn(move || {
            client.stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            for sent in 0..1500 {
                client.send("x");
                match client.stream.read(&mut [0; 1000]) {
                    Ok(0) => return sent,
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return sent,
                }
            }
            usize::MAX
        })
    };
    let drips = [drip("GET / HTTP/1.1\r\nhost: a\r\nx: "), drip("G"), drip("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9")];
    let nothing = fixture.client();
    let mut kept = fixture.client();
    kept.get("/").unwrap();
    let mut stalled = fixture.client();
    stalled.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nabc");
    let (answer, _) = stalled.rest();
    assert!(answer.starts_with("HTTP/1.1 408 "), "a body that stalls: {answer}");
    for (index, drip) in drips.into_iter().enumerate() {
        assert!(drip.join().unwrap() < 1500, "slow head {index}");
    }
    for (what, mut client) in [("one that says nothing", nothing), ("one that was kept alive", kept)] {
        assert_eq!(client.rest(), (String::new(), true), "{what}");
    }
    assert_eq!(fixture.client().get("/").map(|answer| answer.0), Some(200));
}

/// A client that does not read is ended, and holds the instance's connection no longer than that.
#[test]
fn a_client_that_does_not_read_is_ended() {
    let origin = Origin::start(|conn| {
        conn.request();
        conn.send("HTTP/1.1 200 OK\r\ncontent-length: 300000000\r\n\r\n");
        let megabyte = vec![b'x'; 1 << 20];
        while conn.stream.write_all(&megabyte).is_ok() {}
    });
    let fixture = Fixture::start(|settings| settings.timeouts.inactivity = Duration::from_millis(400));
    fixture.live("a", &[&origin]);
    let mut client = fixture.client();
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
    client.request().unwrap();
    eventually("end of the request", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
    let (text, _) = client.rest();
    assert!(text.len() < 300_000_000);
}

#[test]
fn an_instance_that_is_silent_is_given_up() {
    let origin = Origin::start(|conn| {
        conn.request();
        conn.rest();
    });
    let fixture = Fixture::start(|settings| settings.timeouts.inactivity = Duration::from_millis(300));
    fixture.live("a", &[&origin]);
    assert_eq!(fixture.client().get("/").map(|answer| answer.0), Some(504));
}

/// The instance ends in the middle of a body: the client must be able to tell.
#[test]
fn a_body_that_breaks_off_is_never_taken_for_whole() {
    let origin = Origin::start(|conn| {
        let head = conn.request().unwrap();
        match head.split(' ').nth(1).unwrap() {
            "/length" => conn.send("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf"),
            "/chunked" => conn.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"),
            "/chunk" => conn.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40\r\nhalf"),
            _ => conn.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\nxyz\r\n"),
        }
    });
    let fixture = Fixture::of(&[&origin]);
    for path in ["/length", "/chunked", "/chunk", "/garbage"] {
        let mut client = fixture.client();
        client.send(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n"));
        let (text, _) = client.rest();
        assert!(text.starts_with("HTTP/1.1 200 OK") && text.contains("half"), "{path}: {text}");
        assert!(!text.ends_with("0\r\n\r\n"), "{path}: {text}");
        // An HTTP/1.0 client of a chunked answer only has the end of the connection: it must be a reset.
        let mut client = fixture.client();
        client.send(format!("GET {path} HTTP/1.0\r\nhost: a\r\n\r\n"));
        let (text, clean) = client.rest();
        assert!(!clean || field(&text, "content-length").is_some(), "{path}: a clean end of {text:?}");
        block_on(async {
            use http_body_util::BodyExt as _;
            let mut sender = forwarding::h2(fixture.address).await;
            let request =
                http::Request::get(format!("http://{}{path}", fixture.address)).body(http_body_util::Full::default()).unwrap();
            assert!(sender.send_request(request).await.unwrap().into_body().collect().await.is_err(), "{path} over HTTP/2");
        });
    }
    let figures = fixture.figures();
    assert_eq!((figures.requests, figures.errors), (12, 12));
}

#[test]
fn malformed_answers_become_502() {
    for answer in [
        "SSH-2.0-OpenSSH_9.9\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        "HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        "HTTP/1.1 200 OK\r\n x: y\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\n\r\n",
        "HTTP/1.1 2",
    ] {
        let origin = Origin::start(move |conn| {
            conn.request();
            conn.send(answer);
        });
        assert_eq!(Fixture::of(&[&origin]).client().get("/").map(|answer| answer.0), Some(502), "{answer:?}");
    }
}

/// The instance closes a kept connection just when the next request comes: a GET is sent again, a POST that may have
/// been seen is not, and neither is ever sent on a connection that is known to be closed.
#[test]
fn kept_connections_that_close_at_the_wrong_moment() {
    // Every connection answers once, and closes when the second request is there, unanswered.
    let origin = Origin::start(|conn| {
        conn.request();
        conn.answer("x");
        conn.request();
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    for _ in 0..10 {
        assert_eq!(client.get("/"), Some((200, "x".into())));
    }
    assert_eq!(fixture.figures().retries, 9);
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx");
    assert_eq!(client.response().map(|answer| answer.0), Some(502), "it may have been acted on");

    // Every connection closes right after its answer, without saying so.
    let origin = Origin::start(|conn| {
        let head = conn.request().unwrap();
        conn.body(&head);
        conn.answer("x");
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    for round in 0..10 {
        client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx");
        assert_eq!(client.response(), Some((200, "x".into())), "round {round}");
        // The switch has seen the end.
        std::thread::sleep(Duration::from_millis(30));
    }
}

/// A request an instance dies of is tried on one other at most, and never when it has a body.
#[test]
fn deadly_requests_do_not_kill_all() {
    let deadly = || Origin::start(|conn| drop(conn.request()));
    let origins = [deadly(), deadly(), deadly(), deadly(), deadly()];
    let fixture = Fixture::of(&origins.each_ref());
    assert_eq!(fixture.client().get("/").map(|answer| answer.0), Some(502));
    assert_eq!(origins.iter().map(Origin::accepted).sum::<usize>(), 2);
    let mut client = fixture.client();
    client.send("PUT / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx");
    assert_eq!(client.response().map(|answer| answer.0), Some(502));
    assert_eq!(origins.iter().map(Origin::accepted).sum::<usize>(), 3);
}

/// A client that goes away takes its request with it, and the log says so.
#[test]
fn a_client_that_goes_away_cancels() {
    let (told, gone) = std::sync::mpsc::channel();
    let told = Mutex::new(told);
    let origin = Origin::start(move |conn| {
        conn.request();
        told.lock().unwrap().send(()).unwrap();
        conn.rest();
        told.lock().unwrap().send(()).unwrap();
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
    gone.recv_timeout(PATIENCE).unwrap();
    drop(client);
    gone.recv_timeout(PATIENCE).unwrap();
    assert_eq!(fixture.log(1)[0]["status"], 499);
    eventually("end of the request", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
    assert!(fixture.switch.metrics().contains("method=\"GET\",status=\"499\"} 1\n"));
}

/// HTTP/2 streams that are opened and reset at once (CVE-2023-44487) end the connection, and others are served.
#[test]
fn rapid_resets_end_the_connection() {
    let origin = Origin::start(|conn| {
        while conn.request().is_some() {
            std::thread::sleep(Duration::from_millis(20));
            conn.answer("x");
        }
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
    let frame = |kind: u8, flags: u8, stream: u32, payload: &[u8]| {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    };
    // HPACK: :method GET, :scheme http, :path /, :authority a.
    let head = [0x82, 0x86, 0x84, 0x41, 0x01, b'a'];
    let ended = std::thread::spawn({
        let mut reader = Conn { stream: client.stream.try_clone().unwrap(), buffer: Vec::new() };
        move || reader.rest()
    });
    let mut sent = 0;
    for number in 0..200_000u32 {
        let stream = number * 2 + 1;
        let both = [frame(1, 5, stream, &head), frame(3, 0, stream, &8u32.to_be_bytes())].concat();
        if client.stream.write_all(&both).is_err() {
            break;
        }
        sent = number;
    }
    assert!(sent < 199_999, "the connection ended after {sent} resets");
    ended.join().unwrap();
    assert_eq!(fixture.client().get("/"), Some((200, "x".into())));
    eventually("end of all requests", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
}

/// At the limit the connection that is idle longest makes room.
#[test]
fn idle_connections_make_room() {
    let origin = Origin::saying("x");
    let fixture = Fixture::start(|settings| settings.limits.connections = 50);
    fixture.live("a", &[&origin]);
    let mut clients: Vec<_> = (0..50)
        .map(|_| {
            let mut client = fixture.client();
            client.get("/").unwrap();
            client
        })
        .collect();
    for _ in 0..10 {
        assert_eq!(fixture.client().get("/"), Some((200, "x".into())));
    }
    assert!(fixture.switch.metrics().contains("pipeline_http_connections_full_total"));
    // The newest of those that wait are still there.
    assert_eq!(clients.last_mut().unwrap().get("/"), Some((200, "x".into())));
}

/// A body that is refused while it is still being sent: the client reads why.
#[test]
fn a_refusal_is_seen_by_a_client_that_goes_on_sending() {
    let origin = Origin::echo();
    let fixture = Fixture::start(|settings| settings.limits.body = Some(1000));
    fixture.live("a", &[&origin]);
    for framing in ["content-length: 5000000", "transfer-encoding: chunked"] {
        let mut client = fixture.client();
        client.send(format!("POST / HTTP/1.1\r\nhost: a\r\n{framing}\r\n\r\n"));
        for _ in 0..50 {
            client.send(format!("2710\r\n{}\r\n", "x".repeat(10_000)));
        }
        assert_eq!(client.response().map(|answer| answer.0), Some(413), "{framing}");
    }
}

/// What moves is not stalled, however long it takes in all.
#[test]
fn a_slow_body_that_moves_is_not_cut() {
    let origin = Origin::echo();
    let fixture = Fixture::start(|settings| settings.timeouts.inactivity = Duration::from_millis(1000));
    fixture.live("a", &[&origin]);
    let mut client = fixture.client();
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 12\r\n\r\n");
    for _ in 0..12 {
        std::thread::sleep(Duration::from_millis(200));
        client.send("x");
    }
    let (status, text) = client.response().unwrap();
    assert!(status == 200 && text.ends_with("xxxxxxxxxxxx"), "{status} {text}");
}
