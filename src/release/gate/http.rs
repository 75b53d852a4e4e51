//! The gate `http`: an address answers a GET with the right status, or not.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

use super::{Question, Verdict, allow, deny};
use crate::config::types::Http;
use crate::release::decision::Answer;

/// Never asked through a proxy.
const LOOPBACK: &str = "localhost,127.0.0.0/8,::1";

/// What the caller knows of the way out; nothing here reads the environment.
#[derive(Clone, Default)]
pub struct Network {
    pub https_proxy: Option<String>,
    pub http_proxy: Option<String>,
    pub no_proxy: Option<String>,
    /// PEM bundle to trust instead of the system's certificates.
    pub ca_bundle: Option<PathBuf>,
}

impl fmt::Debug for Network {
    /// A proxy's URL may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = |proxy: &Option<String>| if proxy.is_some() { "set" } else { "none" };
        write!(f, "Network(https: {}, http: {})", set(&self.https_proxy), set(&self.http_proxy))
    }
}

/// The answer in a status.
pub(super) fn judge(status: Result<u16>, request: &Http) -> Answer {
    let status = match status {
        Ok(status) => status,
        Err(error) => return Answer::new("", Verdict::Unknown, format!("`{}`: {error:#}", request.url)),
    };
    let reason = format!("`{}` answers {status}", request.url);
    let wanted = request.status.map_or_else(|| (200..300).contains(&status), |wanted| status == wanted);
    if wanted { allow(reason) } else { deny(reason) }
}

/// What the one asked is told, as headers.
pub(super) fn headers(question: &Question<'_>) -> BTreeMap<String, String> {
    let pairs = [
        ("x-pipeline-name", question.view.policy.pipeline.clone()),
        ("x-pipeline-environment", question.environment.to_owned()),
        ("x-pipeline-release", question.release.to_string()),
        ("x-pipeline-version", question.version.to_owned()),
        ("x-pipeline-actor", question.actor.to_owned()),
    ];
    let plain = |value: String| value.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').collect();
    pairs.into_iter().map(|(name, value)| (name.to_owned(), plain(value))).collect()
}

/// The status of the answer to one GET, without following redirects and without reading the body.
///
/// # Errors
/// No answer in time, none at all, or something else than HTTP; a certificate that is not trusted.
pub fn ask(request: &Http, headers: &BTreeMap<String, String>, network: &Network) -> Result<u16> {
    // Err means that another part of the program was first: any provider will do.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
    runtime.block_on(async {
        let client = client(request, network)?;
        let mut get = client.get(&request.url);
        for (name, value) in headers {
            get = get.header(name, value);
        }
        let answer = get.send().await.map_err(|error| {
            if error.is_timeout() {
                return anyhow::anyhow!("no answer within {}", request.timeout);
            }
            anyhow::Error::new(error.without_url()).context("no answer")
        })?;
        Ok(answer.status().as_u16())
    })
}

fn client(request: &Http, network: &Network) -> Result<reqwest::Client> {
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("pipeline/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .timeout(request.timeout.duration())
        .no_proxy();
    let around = format!("{},{LOOPBACK}", network.no_proxy.as_deref().unwrap_or_default());
    let proxies = [(&network.https_proxy, reqwest::Proxy::https as fn(String) -> _), (&network.http_proxy, reqwest::Proxy::http)];
    for (proxy, make) in proxies {
        if let Some(proxy) = proxy {
            builder = builder.proxy(make(proxy.clone())?.no_proxy(reqwest::NoProxy::from_string(&around)));
        }
    }
    if let Some(bundle) = &network.ca_bundle {
        let pem = fs_err::read(bundle)?;
        let roots = reqwest::Certificate::from_pem_bundle(&pem).context("the CA bundle is not readable")?;
        builder = builder.tls_certs_only(roots);
    }
    builder.build().context("cannot make an HTTP client")
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener};
    use std::time::Duration;

    use super::*;
    use crate::config::types::Seconds;

    /// A server for one request that answers with `bytes`, or holds the line; gives its address and what it was asked.
    fn server(bytes: Option<&'static [u8]>) -> (String, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}/ready?x=1", listener.local_addr().unwrap());
        let served = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut buffer = [0; 4096];
            while !asked.windows(4).any(|window| window == b"\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(read @ 1..) => asked.extend_from_slice(&buffer[..read]),
                    _ => break,
                }
            }
            match bytes {
                Some(bytes) => stream.write_all(bytes).unwrap(),
                None => while matches!(stream.read(&mut buffer), Ok(1..)) {},
            }
            let _ = stream.shutdown(Shutdown::Both);
            String::from_utf8(asked).unwrap()
        });
        (address, served)
    }

    #[test]
    fn addresses_answer() {
        let cases: [(&str, Option<&'static [u8]>, &str); 7] = [
            ("allow", Some(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), "allow `URL` answers 200"),
            ("deny", Some(b"HTTP/1.1 503 Away\r\ncontent-length: 0\r\n\r\n"), "deny `URL` answers 503"),
            (
                "redirect",
                Some(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n"),
                "deny `URL` answers 302",
            ),
            ("cut in the body", Some(b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\nx"), "allow `URL` answers 200"),
            ("crash", Some(b""), "unknown `URL`: no answer"),
            ("malformed", Some(b"SSH-2.0-OpenSSH_10.0\r\n\r\n"), "unknown `URL`: no answer"),
            ("hang", None, "unknown `URL`: no answer within 1s"),
        ];
        for (what, bytes, expected) in cases {
            let (url, served) = server(bytes);
            let request = Http { url: url.clone(), status: None, timeout: Seconds(if bytes.is_some() { 30 } else { 1 }) };
            // A proxy that is not there: loopback goes around it.
            let network = Network { http_proxy: Some("http://127.0.0.1:9".into()), ..Network::default() };
            let headers = BTreeMap::from([("x-pipeline-version".to_owned(), "1.4".to_owned())]);
            let answer = judge(ask(&request, &headers, &network), &request);
            let shown = format!("{} {}", answer.verdict, answer.reason).replace(&url, "URL");
            assert!(shown.starts_with(expected), "{what}: {shown}");
            let asked = served.join().unwrap();
            assert!(asked.starts_with("GET /ready?x=1 HTTP/1.1\r\n") && asked.contains("x-pipeline-version: 1.4\r\n"), "{asked}");
        }
        let nobody = Http { url: "http://127.0.0.1:9/".into(), status: None, timeout: Seconds(30) };
        let answer = judge(ask(&nobody, &BTreeMap::new(), &Network::default()), &nobody);
        assert_eq!(answer.verdict, Verdict::Unknown, "{answer:?}");
        assert!(nobody.timeout.duration() > Duration::from_secs(1));
    }
}
