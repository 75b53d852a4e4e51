//! TLS: protocols, choice among certificates, and new ones while it runs.

use super::*;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};

/// Certificate and key for `NAME.test` and `*.NAME.test`, self-signed, made with
/// `openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500 -subj /CN=NAME
/// -addext subjectAltName=DNS:NAME.test,DNS:*.NAME.test -addext basicConstraints=critical,CA:FALSE`.
const ONE: [&str; 2] = [include_str!("certificates/one.pem"), include_str!("certificates/one.key")];
const TWO: [&str; 2] = [include_str!("certificates/two.pem"), include_str!("certificates/two.key")];

/// Writes a pair as a careful program would: a new file in the place of the old one.
fn write(folder: &std::path::Path, name: &str, [certificate, key]: [&str; 2]) -> CertificateFiles {
    let files = CertificateFiles { certificate: folder.join(format!("{name}.pem")), key: folder.join(format!("{name}.key")) };
    for (path, text) in [(&files.certificate, certificate), (&files.key, key)] {
        let temporary = path.with_extension("new");
        fs_err::write(&temporary, text).unwrap();
        fs_err::rename(temporary, path).unwrap();
    }
    files
}

/// The certificate shown to a client that asks for `name`, and the protocol agreed on.
async fn handshake(
    address: SocketAddr,
    name: &str,
    protocols: &[&str],
) -> io::Result<(tokio_rustls::client::TlsStream<TcpStream_>, Vec<u8>, Option<Vec<u8>>)> {
    let mut roots = rustls::RootCertStore::empty();
    [ONE, TWO].iter().for_each(|pair| roots.add(CertificateDer::from_pem_slice(pair[0].as_bytes()).unwrap()).unwrap());
    let builder = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let mut config = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    let stream = TcpStream_::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await?;
    let (_, session) = stream.get_ref();
    let shown = session.peer_certificates().unwrap()[0].to_vec();
    let protocol = session.alpn_protocol().map(<[u8]>::to_vec);
    Ok((stream, shown, protocol))
}

fn der(pair: [&str; 2]) -> Vec<u8> {
    CertificateDer::from_pem_slice(pair[0].as_bytes()).unwrap().to_vec()
}

struct Secure {
    fixture: Fixture,
    address: SocketAddr,
    told: Arc<Mutex<Vec<String>>>,
    folder: tempfile::TempDir,
}

fn secure(origin: &Origin) -> Secure {
    let folder = tempfile::tempdir().unwrap();
    let certificates = vec![write(folder.path(), "one", ONE), write(folder.path(), "two", TWO)];
    let told: Arc<Mutex<Vec<String>>> = Arc::default();
    let tell = told.clone();
    let fixture = Fixture::start(move |settings| {
        settings.certificates = certificates;
        settings.told = Box::new(move |text| tell.lock().unwrap().push(text.to_owned()));
    });
    fixture.live("a", &[origin]);
    let listener = Listener::bind("https", ([127, 0, 0, 1], 0).into(), true).unwrap();
    let address = listener.address().unwrap();
    fixture.switch.serve(vec![listener]).unwrap();
    Secure { fixture, address, told, folder }
}

#[test]
fn protocols_and_names() {
    let secure = secure(&Origin::echo());
    block_on(async {
        for (name, pair) in [("one.test", ONE), ("a.one.test", ONE), ("two.test", TWO), ("b.two.test", TWO)] {
            let (_, shown, protocol) = handshake(secure.address, name, &["h2", "http/1.1"]).await.unwrap();
            assert_eq!((shown == der(pair), protocol.as_deref()), (true, Some(&b"h2"[..])), "{name}");
        }
        assert!(handshake(secure.address, "three.test", &[]).await.is_err(), "the first certificate is shown, and is not for it");
        let (stream, ..) = handshake(secure.address, "one.test", &["http/1.1"]).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get("/").header("host", "one.test").body(Full::<Bytes>::default()).unwrap();
        let body = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert_eq!(
            (field(&text, "x-forwarded-proto"), field(&text, "forwarded")),
            (Some("https"), Some("for=127.0.0.1;proto=https;host=one.test"))
        );
        let (stream, ..) = handshake(secure.address, "one.test", &["h2"]).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get("https://one.test/").body(Full::<Bytes>::default()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
    });
    // What is not TLS gets no answer, and harms nobody.
    let mut plain = Conn::to(secure.address);
    plain.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n");
    assert!(!plain.rest().0.contains("HTTP/1.1 200"));
    eventually("a counted failure", || {
        secure.fixture.switch.metrics().lines().any(|line| line == "pipeline_http_tls_failures_total 2").then_some(())
    });
}

#[test]
fn new_certificates_are_taken_and_broken_ones_are_told() {
    let secure = secure(&Origin::saying("x"));
    let shown = |name: &'static str| block_on(async { handshake(secure.address, name, &[]).await.map(|(_, shown, _)| shown) });
    let told = |part: &str| {
        eventually(part, || secure.told.lock().unwrap().iter().find(|text| text.contains(part)).cloned());
    };
    assert_eq!(shown("one.test").unwrap(), der(ONE));
    for (broken, wanted) in [
        ([ONE[0], TWO[1]], "do not belong together"),
        (["", ONE[1]], "holds no certificate"),
        ([ONE[0], "nothing"], "holds no private key"),
    ] {
        write(secure.folder.path(), "one", broken);
        told(wanted);
        assert_eq!(shown("one.test").unwrap(), der(ONE), "{wanted}: the one before stays");
    }
    write(secure.folder.path(), "one", TWO);
    told("was read again");
    assert!(shown("one.test").is_err(), "there is none for it any more");
    assert_eq!(shown("two.test").unwrap(), der(TWO));
}

#[test]
fn tls_without_a_certificate_is_refused() {
    let fixture = Fixture::start(|_| {});
    let listener = Listener::bind("https", ([127, 0, 0, 1], 0).into(), true).unwrap();
    assert!(fixture.switch.serve(vec![listener]).unwrap_err().to_string().contains("there is no certificate"));
    let mut settings = Settings::new(SystemTime::now, |_| {});
    settings.certificates = vec![CertificateFiles { certificate: "/nothing/here.pem".into(), key: "/nothing/here.key".into() }];
    assert!(Switch::new(settings, dialer()).unwrap_err().to_string().contains("/nothing/here.pem"));
}
