//! WebSockets and other tunnels.

use super::super::frames::close;
use super::*;

/// An instance that takes WebSockets: it sends what it gets back, unmasked, and ends after a close frame.
pub(super) fn websockets() -> Origin {
    Origin::start(|conn| {
        let head = conn.request().unwrap();
        let Some(protocol) = field(&head, "upgrade").map(str::to_owned) else { return conn.answer("no upgrade") };
        assert_eq!(field(&head, "connection").map(str::to_lowercase).as_deref(), Some("upgrade"));
        // The first frame comes together with the head.
        conn.send(format!("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: {protocol}\r\nsec-websocket-accept: x\r\n\r\n\u{1}\u{2}hi"));
        loop {
            let head = conn.exactly(6);
            let Ok([first, length, key @ ..]) = <[u8; 6]>::try_from(head) else { return };
            let mut payload = conn.exactly(usize::from(length & 0x7f));
            payload.iter_mut().zip(key.iter().cycle()).for_each(|(byte, key)| *byte ^= key);
            conn.send([vec![first, payload.len() as u8], payload].concat());
            if first & 0x0f == 8 {
                return;
            }
        }
    })
}

pub(super) const UPGRADE: &str = "GET /ws HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n\r\n";

pub(super) fn open(fixture: &Fixture) -> Conn {
    let mut client = fixture.client();
    client.send(UPGRADE);
    let head = client.request().unwrap();
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert_eq!((field(&head, "upgrade"), field(&head, "sec-websocket-accept")), (Some("websocket"), Some("x")));
    assert_eq!(client.exactly(4), b"\x01\x02hi");
    client
}

fn masked(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let key = [7, 8, 9, 10];
    let hidden = payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key);
    [0x80 | opcode, 0x80 | payload.len() as u8].into_iter().chain(key).chain(hidden).collect()
}

#[test]
fn a_websocket_is_relayed_and_its_close_code_counted() {
    let origin = websockets();
    let fixture = Fixture::of(&[&origin]);
    let mut client = open(&fixture);
    assert_eq!(fixture.switch.draining("shop/prod", "a"), Some(Draining { requests: 0, websockets: 1, streams: 0 }));
    for text in ["one", "", "three"] {
        client.send(masked(1, text.as_bytes()));
        let frame = client.exactly(2 + text.len());
        assert_eq!(frame, [&[0x81, text.len() as u8], text.as_bytes()].concat());
    }
    client.send(masked(8, &1000u16.to_be_bytes()));
    assert_eq!(client.exactly(4), close(1000, false));
    assert_eq!(client.rest(), (String::new(), true));
    eventually("end of the tunnel", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
    assert!(fixture.switch.metrics().contains("code=\"1000\"} 1\n"), "{}", fixture.switch.metrics());
    let line = &fixture.log(1)[0];
    assert_eq!((&line["status"], &line["method"], line.get("error")), (&101.into(), &"GET".into(), None), "{line}");
}

#[test]
fn an_instance_that_does_not_upgrade_is_just_answered() {
    let origin = Origin::saying("no");
    let fixture = Fixture::of(&[&origin]);
    let mut client = fixture.client();
    client.send(UPGRADE);
    assert_eq!(client.response(), Some((200, "no".into())));
    assert_eq!(client.get("/"), Some((200, "no".into())), "the connection goes on");
}

#[test]
fn an_instance_that_dies_is_1006() {
    let origin = Origin::start(|conn| {
        conn.request();
        conn.send("HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n\u{1}\u{2}hi");
    });
    let fixture = Fixture::of(&[&origin]);
    let mut client = open(&fixture);
    assert_eq!(client.rest().0, "");
    drop(client);
    eventually("close code", || fixture.switch.metrics().contains("code=\"1006\"} 1\n").then_some(()));
}

/// A drain sends 1012 at a border between frames, never into one, and lets the instance see the client's answer.
#[test]
fn a_drain_closes_websockets_with_1012() {
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let (seen, at_instance) = std::sync::mpsc::channel();
    let seen = Mutex::new(seen);
    let half = Origin::start(move |conn| {
        conn.request();
        conn.send("HTTP/1.1 101 x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: x\r\n\r\n\u{1}\u{2}hi");
        conn.send(b"\x82\x06abc");
        gate.lock().unwrap().recv().unwrap();
        conn.send("def");
        seen.lock().unwrap().send(conn.rest().0.into_bytes()).unwrap();
    });
    let (green, fixture) = (Origin::saying("green"), Fixture::of(&[&half]));
    let mut client = open(&fixture);
    assert_eq!(client.exactly(5), b"\x82\x06abc");
    let mut both = service(&[("a", &[&half]), ("b", &[&green])], "b");
    both.drain = Drain { requests: PATIENCE, streams: PATIENCE, spread: Duration::ZERO };
    fixture.switch.set(table(both)).unwrap();
    // In the middle of a frame nothing may come in between.
    client.stream.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
    assert!(client.stream.read(&mut [0; 1]).is_err());
    client.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    go.send(()).unwrap();
    assert_eq!(client.exactly(3), b"def");
    assert_eq!(client.exactly(4), close(1012, false));
    let answer = masked(8, &1012u16.to_be_bytes());
    client.send(&answer);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let instance_saw = at_instance.recv_timeout(PATIENCE).unwrap();
    assert_eq!(instance_saw, String::from_utf8_lossy(&answer).into_owned().into_bytes(), "the client's close frame");
    eventually("end of the tunnel", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
    assert!(fixture.switch.metrics().contains("code=\"1012\"} 1\n"));
}

/// A client that ignores the close frame is cut, and the instance is told 1001.
#[test]
fn a_drain_ends_at_its_deadline() {
    let origin = websockets();
    let (green, fixture) = (Origin::saying("green"), Fixture::of(&[&origin]));
    let mut deaf = open(&fixture);
    let mut both = service(&[("a", &[&origin]), ("b", &[&green])], "b");
    both.drain = Drain { requests: Duration::from_millis(300), streams: Duration::from_millis(900), spread: Duration::ZERO };
    fixture.switch.set(table(both)).unwrap();
    assert_eq!(deaf.exactly(4), close(1012, false));
    eventually("end of the tunnel", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
    deaf.rest();
    assert!(fixture.switch.metrics().contains("code=\"1012\"} 1\n"));
}
