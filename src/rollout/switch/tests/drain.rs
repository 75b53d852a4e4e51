//! Switching under load, draining, shutting down, handing over.

use std::sync::atomic::AtomicBool;

use super::*;

fn drain(requests: u64, streams: u64, spread: u64) -> Drain {
    let millis = Duration::from_millis;
    Drain { requests: millis(requests), streams: millis(streams), spread: millis(spread) }
}

/// An instance that answers `/slow` when told to, and everything else at once.
fn slow() -> (Origin, std::sync::mpsc::Sender<()>) {
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let origin = Origin::start(move |conn| {
        while let Some(head) = conn.request() {
            if head.contains("/half") {
                conn.send("HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf");
            }
            if head.contains("/slow") || head.contains("/half") {
                let _ = gate.lock().unwrap().recv();
            }
            match head.contains("/half") {
                true => conn.send("half"),
                false => conn.answer("blue"),
            }
        }
    });
    (origin, go)
}

/// After `set` returned nothing begins on the old pool; what began there before ends there.
#[test]
fn what_began_on_blue_ends_on_blue() {
    let ((blue, go), green) = (slow(), Origin::saying("green"));
    let fixture = Fixture::of(&[&blue]);
    let mut client = fixture.client();
    client.send("GET /slow HTTP/1.1\r\nhost: a\r\n\r\n");
    let one = Some(Draining { requests: 1, websockets: 0, streams: 0 });
    eventually("request in flight", || (fixture.switch.draining("shop/prod", "a") == one).then_some(()));
    fixture.live("b", &[&green]);
    let requests = fixture.figures().requests;
    assert_eq!(fixture.client().get("/"), Some((200, "green".into())));
    assert_eq!(
        (fixture.switch.draining("shop/prod", "a"), fixture.figures().requests),
        (one, requests),
        "a pool that left the table drains on"
    );
    go.send(()).unwrap();
    assert_eq!(client.response(), Some((200, "blue".into())));
    assert_eq!(client.get("/"), Some((200, "green".into())), "the same connection");
    eventually("end of the drain", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
}

/// At the deadline: 504 without an answer yet, an aborted body with one.
#[test]
fn requests_are_cut_at_the_deadline() {
    let ((blue, _go), green) = (slow(), Origin::saying("green"));
    let fixture = Fixture::of(&[&blue]);
    let (mut waiting, mut reading) = (fixture.client(), fixture.client());
    waiting.send("GET /slow HTTP/1.1\r\nhost: a\r\n\r\n");
    reading.send("GET /half HTTP/1.1\r\nhost: a\r\n\r\n");
    assert!(reading.until("half").is_some());
    eventually("two in flight", || fixture.switch.draining("shop/prod", "a").filter(|left| left.requests == 2));
    let mut both = service(&[("a", &[&blue]), ("b", &[&green])], "b");
    both.drain = drain(300, 300, 0);
    fixture.switch.set(table(both)).unwrap();
    assert_eq!(waiting.response().map(|answer| answer.0), Some(504));
    assert_eq!(reading.rest().0, "", "no second half");
    eventually("end of the drain", || fixture.switch.draining("shop/prod", "a").is_none().then_some(()));
    assert!(fixture.switch.metrics().contains("pool=\"a\",kind=\"request\"} 2\n"));
}

/// A pool that is live again before its drain is over keeps what it has.
#[test]
fn a_rollback_ends_the_drain() {
    let ((blue, go), green) = (slow(), Origin::saying("green"));
    let fixture = Fixture::of(&[&blue]);
    let mut waiting = fixture.client();
    waiting.send("GET /slow HTTP/1.1\r\nhost: a\r\n\r\n");
    eventually("request in flight", || fixture.switch.draining("shop/prod", "a"));
    let mut both = service(&[("a", &[&blue]), ("b", &[&green])], "b");
    both.drain = drain(700, 700, 0);
    fixture.switch.set(table(both.clone())).unwrap();
    both.live = Some("a".into());
    fixture.switch.set(table(both)).unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    go.send(()).unwrap();
    assert_eq!(waiting.response(), Some((200, "blue".into())));
}

/// Event streams end cleanly, at the end of an event, spread over the time given.
#[test]
fn event_streams_end_between_events() {
    let origin = Origin::start(|conn| {
        conn.request();
        conn.send("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n");
        // Events are cut anywhere.
        while conn.stream.write_all(b"5\r\ndata:\r\n4\r\n 1\n\n\r\n").is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let (green, fixture) = (Origin::saying("green"), Fixture::of(&[&origin]));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let mut client = fixture.client();
            client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
            client.request().unwrap();
            std::thread::spawn(move || {
                let head = "transfer-encoding: chunked\r\n\r\n";
                let body = client.body(head);
                (String::from_utf8(body).unwrap(), Instant::now())
            })
        })
        .collect();
    eventually("eight streams", || fixture.switch.draining("shop/prod", "a").filter(|left| left.streams == 8));
    let mut both = service(&[("a", &[&origin]), ("b", &[&green])], "b");
    both.drain = drain(10, 20_000, 1600);
    let begin = Instant::now();
    fixture.switch.set(table(both)).unwrap();
    let ends: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    for (text, _) in &ends {
        assert!(
            text.ends_with("data: 1\n\n") && text.len() % 9 == 0,
            "the end of an event: {:?}",
            &text[text.len().saturating_sub(20)..]
        );
    }
    let mut after: Vec<_> = ends.iter().map(|(_, end)| end.duration_since(begin).as_millis()).collect();
    after.sort_unstable();
    assert!(after[7] - after[0] >= 600, "not all at once: {after:?}");
}

/// Clients in a closed loop while the table changes; what each got that was not as it should be.
fn load(fixture: &Fixture, clients: usize, work: impl FnOnce()) -> (usize, Vec<String>) {
    let stop = Arc::new(AtomicBool::new(false));
    let threads: Vec<_> = (0..clients)
        .map(|number| {
            let (stop, address) = (stop.clone(), fixture.address);
            std::thread::spawn(move || {
                let (mut done, mut lost, mut client) = (0, Vec::new(), Conn::to(address));
                while !stop.load(Ordering::Relaxed) {
                    let body = format!("{number} {done} {}", "x".repeat(done * 37 % 3000));
                    let request = match done % 3 {
                        0 => format!("GET /{done} HTTP/1.1\r\nhost: a\r\n\r\n"),
                        1 => format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}", body.len()),
                        _ => format!(
                            "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n",
                            body.len()
                        ),
                    };
                    client.send(&request);
                    let answer = client.whole_response();
                    let last = answer.as_ref().is_some_and(|(_, head, _)| field(head, "connection") == Some("close"));
                    let answer = answer.map(|(status, _, text)| (status, text));
                    let good = answer.as_ref().is_some_and(|(status, text)| {
                        *status == 200
                            && if done % 3 == 0 { text.contains(&format!("GET /{done} ")) } else { text.ends_with(&body) }
                    });
                    if last && good {
                        client = Conn::to(address);
                    }
                    if !good {
                        lost.push(format!("{number}/{done}: {:?}", answer.map(|(status, text)| (status, text.len()))));
                        client = Conn::to(address);
                    }
                    done += 1;
                }
                (done, lost)
            })
        })
        .collect();
    work();
    stop.store(true, Ordering::Relaxed);
    threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .fold((0, Vec::new()), |(done, lost), more| (done + more.0, [lost, more.1].concat()))
}

/// 200 switches; each time the old pool is "stopped" as soon as it has drained: it serves nobody after that.
#[test]
fn two_hundred_switches_lose_nothing() {
    let origins = [Origin::echo(), Origin::echo()];
    let fixture = Fixture::of(&[&origins[0], &origins[1]]);
    let mut wrong = Vec::new();
    let (done, lost) = load(&fixture, 6, || {
        for round in 0..200 {
            let (old, new) = (format!("p{}", round), format!("p{}", round + 1));
            fixture.live(&new, &[&origins[round % 2], &origins[(round + 1) % 2]]);
            let before = fixture.switch.figures("shop/prod", &old).requests;
            eventually("end of the drain", || fixture.switch.draining("shop/prod", &old).is_none().then_some(()));
            let after = fixture.switch.figures("shop/prod", &old).requests;
            if after > before {
                wrong.push(round);
            }
            std::thread::sleep(Duration::from_millis(3));
        }
    });
    assert!(done > 400, "{done} requests over 200 switches");
    assert_eq!(lost, Vec::<String>::new(), "of {done}");
    assert_eq!(wrong, Vec::<usize>::new(), "requests began on a pool that was not live");
}

/// The same clients against the same switch with draining off must lose, or the test above shows nothing.
#[test]
fn without_draining_requests_are_lost() {
    // Answers take a moment, as those of real programs do.
    let origin = Origin::start(|conn| {
        while let Some(head) = conn.request() {
            let body = conn.body(&head);
            std::thread::sleep(Duration::from_millis(2));
            let text = [head.as_bytes(), &body].concat();
            conn.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", text.len()));
            conn.send(&text);
        }
    });
    let fixture = Fixture::of(&[&origin]);
    let (done, lost) = load(&fixture, 6, || {
        for round in 0..40 {
            let mut service = service(&[(&format!("p{round}"), &[&origin])], &format!("p{round}"));
            service.drain = Drain { requests: Duration::ZERO, streams: Duration::ZERO, spread: Duration::ZERO };
            fixture.switch.set(table(service)).unwrap();
            std::thread::sleep(Duration::from_millis(50));
        }
    });
    assert!(!lost.is_empty(), "{done} requests and none lost");
}

/// Several services change together: no client ever sees one of them new and then the other old.
#[test]
fn services_switch_together() {
    let origins = [Origin::saying("0"), Origin::saying("1")];
    let fixture = Fixture::start(|_| {});
    let set = |version: usize| {
        let one = |host: &str| Service {
            routes: vec![route(Some(host), "/")],
            ..service(&[(&format!("v{version}"), &[&origins[version % 2]])], &format!("v{version}"))
        };
        fixture
            .switch
            .set(Table { services: BTreeMap::from([("a/prod".to_owned(), one("a")), ("b/prod".to_owned(), one("b"))]) })
            .unwrap();
    };
    set(0);
    let (version, stop, seen) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let watcher = std::thread::spawn({
        let (version, stop, seen, address) = (version.clone(), stop.clone(), seen.clone(), fixture.address);
        move || {
            let mut client = Conn::to(address);
            while !stop.load(Ordering::Relaxed) {
                let mut of = |host| {
                    client.send(format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n"));
                    client.response().unwrap().1
                };
                let before = version.load(Ordering::SeqCst);
                let (first, second) = (of("a"), of("b"));
                // Counted before and after every step: an even and unchanged count says that there was none meanwhile.
                if before % 2 == 0 && version.load(Ordering::SeqCst) == before {
                    assert_eq!((first.as_str(), second.as_str()), (["0", "1"][before / 2 % 2], ["0", "1"][before / 2 % 2]));
                    seen.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    });
    for step in 1..200 {
        version.fetch_add(1, Ordering::SeqCst);
        set(step);
        version.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(2));
        if step % 10 == 0 {
            let before = seen.load(Ordering::SeqCst);
            eventually("look between two steps", || {
                (watcher.is_finished() || seen.load(Ordering::SeqCst) > before).then_some(())
            });
        }
    }
    stop.store(true, Ordering::Relaxed);
    watcher.join().unwrap();
}

/// A switch takes the place of another under load: the socket is handed over, the old one drains. Nothing is lost.
#[test]
fn a_replacement_loses_nothing() {
    let origin = Origin::echo();
    let mut fixtures = vec![Fixture::start(|_| {})];
    let first = &fixtures[0];
    first.live("a", &[&origin]);
    // Listeners are remembered by who made them, as the daemon does.
    let mut listener = Listener::bind("http", ([127, 0, 0, 1], 0).into(), false).unwrap();
    let address = listener.address().unwrap();
    first.switch.serve(vec![listener.try_clone().unwrap()]).unwrap();
    let client = Fixture { address, switch: first.switch.clone(), log: first.log.clone() };
    let (done, lost) = load(&client, 6, || {
        for _ in 0..5 {
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            listen::send(&ours, &[listener.try_clone().unwrap()]).unwrap();
            let next = Fixture::start(|_| {});
            next.live("a", &[&origin]);
            listener = listen::receive(&theirs).unwrap().pop().unwrap();
            next.switch.serve(vec![listener.try_clone().unwrap()]).unwrap();
            block_on(fixtures.last().unwrap().switch.shutdown(PATIENCE));
            eventually("requests at the new one", || (next.figures().requests >= 30).then_some(()));
            fixtures.push(next);
        }
    });
    assert!(done >= 150, "{done} requests");
    assert_eq!(lost, Vec::<String>::new(), "of {done}");
}

/// A shutdown answers what is in flight, closes WebSockets with 1012 and HTTP/2 with GOAWAY, and then returns.
#[test]
fn a_shutdown_drains() {
    let (origin, go) = slow();
    let tunnels = upgrades::websockets();
    let fixture = Fixture::start(|_| {});
    let websockets = Service { routes: vec![route(None, "/ws")], ..service(&[("a", &[&tunnels])], "a") };
    let services =
        BTreeMap::from([("shop/prod".to_owned(), service(&[("a", &[&origin])], "a")), ("ws/prod".to_owned(), websockets)]);
    fixture.switch.set(Table { services }).unwrap();
    let mut websocket = upgrades::open(&fixture);
    let (mut waiting, mut idle) = (fixture.client(), fixture.client());
    idle.get("/").unwrap();
    waiting.send("GET /slow HTTP/1.1\r\nhost: a\r\n\r\n");
    eventually("request in flight", || fixture.switch.draining("shop/prod", "a"));
    let switch = fixture.switch.clone();
    let shutdown = std::thread::spawn(move || block_on(switch.shutdown(Duration::from_secs(20))));
    assert_eq!(websocket.exactly(4), super::super::frames::close(1012, false));
    websocket.send(super::super::frames::close(1012, true));
    let (status, head, _) = {
        // A request that is on its way when the shutdown begins is answered, and told that it is the last.
        idle.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
        idle.whole_response().unwrap()
    };
    assert_eq!((status, field(&head, "connection")), (200, Some("close")));
    assert!(!shutdown.is_finished(), "one is still in flight");
    go.send(()).unwrap();
    assert_eq!(waiting.response(), Some((200, "blue".into())));
    shutdown.join().unwrap();
    assert_eq!(waiting.rest(), (String::new(), true));
}

/// Figures of two pools can be compared, and tell when the last request was accepted.
#[test]
fn figures_tell_pools_apart() {
    let (blue, green) = (
        Origin::saying("blue"),
        Origin::start(|conn| {
            while conn.request().is_some() {
                conn.send("HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n");
            }
        }),
    );
    let fixture = Fixture::of(&[&blue]);
    let mut client = fixture.client();
    (0..5).for_each(|_| drop(client.get("/").unwrap()));
    fixture.switch.set(table(service(&[("a", &[&blue]), ("b", &[&green])], "b"))).unwrap();
    let (switched, before) = (Instant::now(), fixture.switch.figures("shop/prod", "b"));
    (0..3).for_each(|_| drop(client.get("/").unwrap()));
    let (old, new) = (fixture.figures(), fixture.switch.figures("shop/prod", "b").since(&before));
    assert_eq!((old.requests, old.errors, new.requests, new.errors), (5, 0, 3, 3));
    assert!(old.last_accepted.unwrap() < switched && new.first.unwrap() >= switched);
    assert_eq!((old.latency.count(), new.latency.count(), new.in_flight), (5, 3, 0));
    let metrics = fixture.switch.metrics();
    for line in [
        "pipeline_http_requests_total{service=\"shop/prod\",pool=\"a\",method=\"GET\",status=\"200\"} 5",
        "pipeline_http_requests_total{service=\"shop/prod\",pool=\"b\",method=\"GET\",status=\"500\"} 3",
        "pipeline_http_request_duration_seconds_count{service=\"shop/prod\",pool=\"b\"} 3",
        "pipeline_http_errors_total{service=\"shop/prod\",pool=\"b\"} 3",
    ] {
        assert!(metrics.lines().any(|other| other == line), "{line} in\n{metrics}");
    }
}

/// An HTTP/2 client that opened its window for nothing holds no drain: after the deadline its connection is ended.
#[test]
fn a_client_that_does_not_read_holds_no_drain() {
    let origin = Origin::start(|conn| {
        conn.request();
        conn.send("HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n");
        let megabyte = vec![b'x'; 1 << 20];
        while conn.stream.write_all(&megabyte).is_ok() {}
    });
    let (green, fixture) = (Origin::saying("green"), Fixture::of(&[&origin]));
    block_on(async {
        let mut sender = forwarding::h2(fixture.address).await;
        let request = http::Request::get(format!("http://{}/", fixture.address)).body(http_body_util::Full::default()).unwrap();
        let unread = sender.send_request(request).await.unwrap();
        let mut both = service(&[("a", &[&origin]), ("b", &[&green])], "b");
        both.drain = drain(200, 200, 0);
        fixture.switch.set(table(both)).unwrap();
        let start = Instant::now();
        while fixture.switch.draining("shop/prod", "a").is_some() {
            assert!(start.elapsed() < PATIENCE);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(unread);
    });
}

/// A request that could not be sent to any instance of its pool goes to the pool that became live meanwhile.
#[test]
fn what_was_never_sent_goes_to_the_new_pool() {
    let (gone, green) = (Origin::gone(), Origin::echo());
    let fixture = Fixture::of(&[&gone]);
    let mut client = fixture.client();
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello");
    eventually("a failure", || (fixture.figures().connect_failures > 0).then_some(()));
    fixture.live("b", &[&green]);
    let (status, text) = client.response().unwrap();
    assert!(status == 200 && text.ends_with("hello"), "{status} {text}");
}
