//! Servers of HTTP/2 and of TLS that are bad in their own ways.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use bytes::Bytes as Piece;

use super::load::upstream::event;
use super::load::wire::Lost;
use super::{Asked, only, run};

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

/// How an event stream over HTTP/2 ends, after its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ends {
    Well,
    Inside,
    Reset,
    Dropped,
}

fn serve_events(numbers: &'static [u64], ends: Ends) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let mut connection = h2::server::handshake(socket).await.unwrap();
                while let Some(Ok((request, mut answer))) = connection.accept().await {
                    let asked = Asked { number: 0, head: format!("GET {} HTTP/2", request.uri().path_and_query().unwrap()) };
                    let first = request
                        .headers()
                        .get("last-event-id")
                        .map_or(0, |last| last.to_str().unwrap().parse::<u64>().unwrap() + 1);
                    let head =
                        http::Response::builder().header("x-load-version", "bad").header("content-type", "text/event-stream");
                    let head = head.header("x-load-id", request.headers()["x-load-id"].to_str().unwrap());
                    let mut stream = answer.send_response(head.body(()).unwrap(), false).unwrap();
                    let mut text: String =
                        numbers.iter().map(|number| event(asked.query("seed"), first + number, "bad")).collect();
                    if ends == Ends::Inside {
                        text.push_str("id: ");
                    }
                    stream.send_data(text.into(), matches!(ends, Ends::Well | Ends::Inside)).unwrap();
                    match ends {
                        Ends::Reset => stream.send_reset(h2::Reason::CANCEL),
                        Ends::Dropped => break,
                        _ => (),
                    }
                }
            }
        });
    });
    address
}

#[test]
fn event_streams_of_http_2_end_whole_and_lose_no_event() {
    // (events after the last one seen, end, reason; empty: restarts)
    let cases: &[(&[u64], Ends, &str)] = &[
        (&[0, 1, 2], Ends::Well, ""),
        (&[], Ends::Well, ""),
        (&[0], Ends::Inside, Lost::TRUNCATED),
        (&[0], Ends::Reset, Lost::STREAM),
        (&[0], Ends::Dropped, Lost::RESET),
        (&[0, 0], Ends::Well, Lost::WRONG_EVENT),
        (&[1], Ends::Well, Lost::WRONG_EVENT),
    ];
    for (numbers, ends, reason) in cases {
        let report = run(serve_events(numbers, *ends), "--mix sse2 --connections 1 --limit 2 --timeout 5");
        let figures = only(&report, "sse2");
        let restarts = if reason.is_empty() { 2 } else { 0 };
        assert_eq!((figures.requests, figures.lost, figures.restarts), (2, 2 - restarts, restarts), "{ends:?}: {report}");
        let expected = if restarts > 0 { [].into() } else { [(format!("sse2: {reason}"), 2)].into() };
        assert_eq!(report.reasons, expected, "{ends:?}: {report}");
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
