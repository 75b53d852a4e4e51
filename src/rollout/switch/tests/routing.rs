//! Which service and instance a request comes to; holding and maintenance.

use super::*;

#[test]
fn the_most_specific_route_wins() {
    let names = ["exact", "exact-path", "wild", "wilder", "any", "any-path", "strip"];
    let origins: Vec<Origin> = names
        .into_iter()
        .map(|name| {
            Origin::start(move |conn| {
                while let Some(head) = conn.request() {
                    let text = format!("{name} {}", head.split(' ').nth(1).unwrap());
                    conn.answer(&text);
                }
            })
        })
        .collect();
    let routes = [
        route(Some("shop.test"), "/"),
        route(Some("shop.test"), "/api"),
        route(Some("*.shop.test"), "/"),
        route(Some("*.a.shop.test"), "/"),
        route(None, "/"),
        route(None, "/only"),
        Route { strip: true, ..route(Some("strip.test"), "/pre/fix") },
    ];
    let mut services = BTreeMap::new();
    for ((name, origin), route) in names.iter().zip(&origins).zip(routes) {
        services.insert((*name).to_owned(), Service { routes: vec![route], ..service(&[("a", &[origin])], "a") });
    }
    let fixture = Fixture::start(|_| {});
    fixture.switch.set(Table { services }).unwrap();
    let mut client = fixture.client();
    for (host, path, wanted) in [
        ("shop.test", "/", "exact /"),
        ("SHOP.test:8080", "/x?api", "exact /x?api"),
        ("shop.test.", "/", "exact /"),
        ("shop.test", "/api", "exact-path /api"),
        ("shop.test", "/api/x", "exact-path /api/x"),
        ("shop.test", "/api?x", "exact-path /api?x"),
        ("shop.test", "/apis", "exact /apis"),
        ("b.shop.test", "/api", "wild /api"),
        ("c.b.shop.test", "/", "wild /"),
        ("b.a.shop.test", "/", "wilder /"),
        ("a.shop.test", "/", "wild /"),
        ("noshop.test", "/", "any /"),
        ("127.0.0.1", "/only/x", "any-path /only/x"),
        ("strip.test", "/pre/fix/x?y", "strip /x?y"),
        ("strip.test", "/pre/fix", "strip /"),
        ("strip.test", "/pre/fix?y", "strip /?y"),
        ("strip.test", "/pre", "any /pre"),
    ] {
        client.send(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n"));
        assert_eq!(client.response(), Some((200, wanted.to_owned())), "{host} {path}");
    }
}

#[test]
fn redirects_conflicts_and_unknown_addresses() {
    let origin = Origin::saying("x");
    let fixture = Fixture::start(|_| {});
    let redirect = |path, to: &str, status| Route {
        redirect: Some(crate::config::types::Redirect { to: to.into(), status }),
        ..route(Some("old.test"), path)
    };
    let mut redirecting = service(&[("a", &[&origin])], "a");
    redirecting.routes =
        vec![redirect("/", "https://new.test/", 308), redirect("/one", "https://new.test/page", 302), route(Some("a.test"), "/")];
    fixture.switch.set(table(redirecting.clone())).unwrap();
    let mut client = fixture.client();
    for (host, path, status, location) in [
        ("old.test", "/x/y?z=1", 308, Some("https://new.test/x/y?z=1")),
        ("old.test", "/one/two", 302, Some("https://new.test/page")),
        ("other.test", "/", 404, None),
    ] {
        client.send(format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n"));
        let (answered, head, _) = client.whole_response().unwrap();
        assert_eq!((answered, field(&head, "location")), (status, location), "{host}{path}");
    }
    // Two claims of one route change nothing.
    let both = BTreeMap::from([
        ("shop/prod".to_owned(), redirecting.clone()),
        ("other/prod".to_owned(), Service { routes: vec![route(Some("A.test"), "/")], ..redirecting.clone() }),
    ]);
    let error = fixture.switch.set(Table { services: both }).unwrap_err();
    assert_eq!(error.to_string(), "`other/prod` and `shop/prod` both claim the route `a.test/`");
    let mut missing = redirecting;
    missing.live = Some("b".into());
    assert!(fixture.switch.set(table(missing)).unwrap_err().to_string().contains("`b`"));
    client.send("GET / HTTP/1.1\r\nhost: a.test\r\n\r\n");
    assert_eq!(client.response(), Some((200, "x".into())), "the old table stays");
}

#[test]
fn a_preview_reaches_the_other_pool() {
    let (blue, green) = (Origin::saying("blue"), Origin::saying("green"));
    let fixture = Fixture::start(|_| {});
    let mut both = service(&[("a", &[&blue]), ("b", &[&green])], "a");
    both.preview = Some((route(Some("preview.test"), "/"), "b".into()));
    both.mode = Mode::Maintenance { message: "back at noon".into() };
    fixture.switch.set(table(both.clone())).unwrap();
    let mut client = fixture.client();
    client.send("GET / HTTP/1.1\r\nhost: preview.test\r\n\r\n");
    assert_eq!(client.response(), Some((200, "green".into())), "even in maintenance");
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
    let (status, head, body) = client.whole_response().unwrap();
    assert_eq!((status, field(&head, "retry-after"), body.as_str()), (503, Some("60"), "back at noon\n"));
    both.mode = Mode::Serve;
    fixture.switch.set(table(both)).unwrap();
    assert_eq!(client.get("/"), Some((200, "blue".into())));
}

#[test]
fn held_requests_wait_and_go_to_the_new_pool() {
    let (blue, green) = (Origin::saying("blue"), Origin::saying("green"));
    let fixture = Fixture::of(&[&blue]);
    assert_eq!(fixture.client().get("/"), Some((200, "blue".into())));
    let mut held = service(&[("a", &[&blue])], "a");
    held.mode = Mode::Hold { longest: PATIENCE };
    fixture.switch.set(table(held.clone())).unwrap();
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let mut client = fixture.client();
            std::thread::spawn(move || client.get("/"))
        })
        .collect();
    eventually("five held requests", || fixture.switch.metrics().contains("pipeline_http_held_requests 5\n").then_some(()));
    assert!(fixture.switch.draining("shop/prod", "a").is_none(), "a held request is nobody's yet");
    // A table that still holds them keeps them waiting.
    fixture.switch.set(table(held.clone())).unwrap();
    fixture.live("b", &[&green]);
    for thread in waiting {
        assert_eq!(thread.join().unwrap(), Some((200, "green".into())));
    }
    held.mode = Mode::Hold { longest: Duration::from_millis(30) };
    fixture.switch.set(table(held)).unwrap();
    assert_eq!(fixture.client().get("/").map(|answer| answer.0), Some(503), "no longer than its bound");
    assert!(fixture.switch.metrics().contains("pipeline_http_held_requests 0\n"));
}

#[test]
fn a_service_without_instances_is_down() {
    let fixture = Fixture::start(|_| {});
    let mut down = service(&[("a", &[])], "a");
    for live in [Some("a".to_owned()), None] {
        down.live = live;
        fixture.switch.set(table(down.clone())).unwrap();
        assert_eq!(fixture.client().get("/").map(|answer| answer.0), Some(503));
    }
}

#[test]
fn requests_go_round_and_around_what_is_gone() {
    let (first, second, gone) = (Origin::saying("first"), Origin::saying("second"), Origin::gone());
    let fixture = Fixture::of(&[&first, &gone, &second]);
    let mut client = fixture.client();
    let answers: Vec<_> = (0..30).map(|_| client.get("/").unwrap()).collect();
    let of = |text: &str| answers.iter().filter(|answer| **answer == (200, text.to_owned())).count();
    assert_eq!(of("first") + of("second"), 30, "none is lost: {answers:?}");
    assert!(of("first") > 5 && of("second") > 5, "{answers:?}");
    let figures = fixture.figures();
    assert!(figures.connect_failures >= 1 && figures.errors == 0, "{figures:?}");
    assert!(figures.connect_failures < 10, "it is avoided: {figures:?}");
}

#[test]
fn when_nothing_can_be_reached_it_is_said() {
    let gone = Origin::gone();
    let fixture = Fixture::of(&[&gone]);
    let mut client = fixture.client();
    assert_eq!(client.get("/").map(|answer| answer.0), Some(502));
    let figures = fixture.figures();
    assert_eq!((figures.requests, figures.errors, figures.connect_failures > 1), (1, 1, true));
    fixture.live("b", &[&Origin::saying("x")]);
    assert_eq!(client.get("/"), Some((200, "x".into())), "the client's connection goes on");
}
