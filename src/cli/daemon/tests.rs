//! The client against a socket that answers what it is told to, in pieces.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use super::{Daemon, Next};
use crate::error;
use crate::rollout::view::{Do, View};

/// A view as the daemon writes it.
pub(in crate::cli) fn view(name: &str) -> View {
    serde_json::from_value(serde_json::json!({
        "environment": name, "live": null, "other": null, "rollout": null, "maintenance": null, "health": "unknown",
        "message": null, "rollback": {"warm": false, "seconds": null, "text": ""},
    }))
    .unwrap()
}

/// Answers one connection after another with the pieces of `answers`; gives back what was asked.
fn daemon(answers: Vec<Vec<String>>) -> (tempfile::TempDir, PathBuf, std::thread::JoinHandle<Vec<String>>) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let thread = std::thread::spawn(move || {
        let mut asked = Vec::new();
        for pieces in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            let mut buffer = [0; 4096];
            loop {
                let read = stream.read(&mut buffer).unwrap();
                bytes.extend_from_slice(&buffer[..read]);
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let length = head.split("Content-Length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
                if body.len() >= length.unwrap_or(0) {
                    asked.push(format!("{} {body}", head.lines().next().unwrap()));
                    break;
                }
            }
            for piece in pieces {
                // Who has heard enough does not wait for the rest.
                if stream.write_all(piece.as_bytes()).and_then(|()| stream.flush()).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        asked
    });
    (folder, socket, thread)
}

fn answer(status: &str, body: &str) -> Vec<String> {
    vec![format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())]
}

#[test]
fn questions_and_orders() {
    let shop = serde_json::to_string(&view("shop/prod")).unwrap();
    let (_keep, socket, thread) = daemon(vec![
        answer("200 OK", &shop),
        answer("404 Not Found", r#"{"error":"x"}"#),
        answer("200 OK", r#"{"tip":"abc"}"#),
        answer("200 OK", "{}"),
        answer("200 OK", &shop),
        answer("409 Conflict", r#"{"error":"nothing is rolled out in `shop/prod`","hints":["`pipeline promote` begins one"]}"#),
        answer("503 Service Unavailable", "busy"),
        answer("200 OK", r#"{"environment":"shop/prod"}"#),
        answer("404 Not Found", "{}"),
    ]);
    let daemon = Daemon::new(socket);
    assert_eq!(daemon.view("shop/prod").unwrap(), Some(view("shop/prod")));
    assert_eq!(daemon.view("shop/qa").unwrap(), None);
    assert_eq!(daemon.poke().unwrap().tip.as_deref(), Some("abc"));
    assert_eq!(daemon.order("shop/prod", Do::Pause, "lunch", "ada").unwrap(), view("shop/prod"));
    let told = daemon.order("shop/prod", Do::Abort, "", "ada").unwrap_err();
    assert_eq!((told.to_string().as_str(), error::exit_code(&told)), ("nothing is rolled out in `shop/prod`", 1));
    assert_eq!(error::hints(&told), ["`pipeline promote` begins one"]);
    assert_eq!(error::exit_code(&daemon.poke().unwrap_err()), 75);
    let told = daemon.view("shop/prod").unwrap_err();
    assert!(told.to_string().contains("does not understand"), "{told}");
    let told = daemon.served("shop/qa").unwrap_err();
    assert!(told.to_string().ends_with("does not serve `shop/qa`"), "{told}");
    let asked = thread.join().unwrap();
    assert_eq!(
        asked,
        [
            "GET /v1/environments/shop/prod HTTP/1.1 ",
            "GET /v1/environments/shop/qa HTTP/1.1 ",
            "POST /v1/poke HTTP/1.1 ",
            r#"POST /v1/environments/shop/prod/rollout HTTP/1.1 {"do":"pause","reason":"lunch","by":"ada"}"#,
            "GET /v1/environments/shop/prod HTTP/1.1 ",
            r#"POST /v1/environments/shop/prod/rollout HTTP/1.1 {"do":"abort","reason":"","by":"ada"}"#,
            "POST /v1/poke HTTP/1.1 ",
            "GET /v1/environments/shop/prod HTTP/1.1 ",
            "GET /v1/environments/shop/qa HTTP/1.1 ",
        ]
    );
}

#[test]
fn nobody_there() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    // A socket whose owner was killed.
    drop(UnixListener::bind(&socket).unwrap());
    for path in [socket, folder.path().join("nothing/sock")] {
        let daemon = Daemon::new(path.clone());
        assert_eq!(daemon.view("shop/prod").unwrap(), None);
        assert_eq!(daemon.overview().unwrap(), None);
        for told in [daemon.poke().unwrap_err(), daemon.watch("shop/prod").unwrap_err()] {
            assert_eq!(told.to_string(), format!("no daemon answers at {}", path.display()));
            assert_eq!(error::exit_code(&told), 75);
            assert!(error::hints(&told)[0].contains("`pipeline serve`"));
        }
    }
}

#[test]
fn streams_in_every_framing_and_in_pieces() {
    let line = |name: &str| serde_json::to_string(&view(name)).unwrap() + "\n";
    let (first, second) = (line("a/one"), line("a/two"));
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    let (head, tail) = second.split_at(10);
    let chunked = vec![
        "HTTP/1.1 200 OK\r\ntransfer-".to_owned(),
        "encoding: chunked\r\n\r\n".to_owned(),
        chunk(&first) + &chunk(head)[..5],
        chunk(head)[5..].to_owned(),
        chunk(tail).strip_suffix("\r\n").unwrap().to_owned(),
        "\r\n0\r\n\r\n".to_owned(),
    ];
    let plain = vec!["HTTP/1.1 200 OK\r\n\r\n".to_owned() + &first, head.to_owned(), format!("{tail}\n")];
    for pieces in [chunked, plain] {
        let (_keep, socket, thread) = daemon(vec![pieces]);
        let mut views = Daemon::new(socket).watch("a/one").unwrap();
        let mut seen = Vec::new();
        loop {
            match views.next(Duration::from_millis(1)).unwrap() {
                Next::View(view) => seen.push(view.environment),
                Next::Nothing => {}
                Next::End => break,
            }
        }
        assert_eq!(seen, ["a/one", "a/two"]);
        thread.join().unwrap();
    }
    let (_keep, socket, _) = daemon(vec![vec!["HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n".into()]]);
    let mut views = Daemon::new(socket).watch("a/one").unwrap();
    assert!((0..1000).any(|_| views.next(Duration::from_millis(1)).is_err()));
}
