//! One way to a registry: which protocol it speaks, what it was shown for the right to pull, and
//! a client with a runtime of its own, so that each thread has one and everything above is synchronous.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context as _, Result};
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use rustls::pki_types::pem::PemObject as _;

use super::reference::{Reference, host_of};
use super::token;
use super::trouble::{RETRY_PAUSES, Trouble};
use super::{Proxy, RegistryOptions};
use crate::error::Problem;
use crate::oci::credentials::Credential;

/// Long enough for a slow link's handshake, short enough to be noticed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Silence on an open connection: registries that fetch from cold storage take tens of seconds.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: &str = concat!("pipeline/", env!("CARGO_PKG_VERSION"));
/// Stands for "no proxy at all": without one set, the HTTP library reads the environment by itself.
const NO_PROXY_AT_ALL: (&str, &str) = ("http://127.0.0.1:9", "*,0.0.0.0/0,::/0");
/// Never through a proxy, as Docker does.
const LOOPBACK: &str = "localhost,127.0.0.0/8,::1";

/// What every client is made from: read and checked once.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// DER; empty when the system's own certificates are to be used.
    roots: Vec<Vec<u8>>,
    proxy: Proxy,
    insecure: Vec<String>,
}

/// How a registry is spoken to, found out by asking it.
#[derive(Debug, Clone)]
pub(super) struct Access {
    pub way: Way,
    pub auth: RegistryAuth,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Way {
    pub plain: bool,
    /// Whether certificates are checked.
    verify: bool,
}

impl Way {
    pub(super) fn scheme(self) -> &'static str {
        if self.plain { "http" } else { "https" }
    }
}

impl Settings {
    pub(super) fn new(options: &RegistryOptions) -> Result<Self> {
        // Err means that another part of the program was first: any provider will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let roots = match &options.ca_bundle {
            None => Vec::new(),
            Some(path) => read_roots(path)?,
        };
        Ok(Self { roots, proxy: options.proxy.clone(), insecure: options.insecure.clone() })
    }

    /// The ways to try, in order.
    fn ways(&self, reference: &Reference) -> Vec<Way> {
        let registry = reference.registry();
        let plain = Way { plain: true, verify: false };
        let checked = Way { plain: false, verify: true };
        if self.insecure.iter().any(|entry| entry == registry || entry == host_of(registry)) {
            vec![Way { plain: false, verify: false }, plain]
        } else if reference.is_loopback() {
            vec![plain, checked]
        } else {
            vec![checked]
        }
    }

    /// Proxies (for HTTPS, for HTTP) and what goes around them. One is always set; see [`NO_PROXY_AT_ALL`].
    fn proxies(&self) -> (Option<String>, Option<String>, String) {
        match (&self.proxy.https, &self.proxy.http) {
            (None, None) => (None, Some(NO_PROXY_AT_ALL.0.into()), NO_PROXY_AT_ALL.1.into()),
            (https, http) => {
                let around = self.proxy.exceptions.as_deref().unwrap_or("");
                (https.clone(), http.clone(), format!("{around},{LOOPBACK}"))
            }
        }
    }

    /// A plain HTTP client, for the first question and for tokens.
    fn http(&self, way: Way) -> Result<reqwest::Client, Trouble> {
        let (https, http, around) = self.proxies();
        let mut builder =
            reqwest::Client::builder().user_agent(USER_AGENT).connect_timeout(CONNECT_TIMEOUT).read_timeout(READ_TIMEOUT);
        for (proxy, make) in [(https, reqwest::Proxy::https as fn(String) -> _), (http, reqwest::Proxy::http)] {
            if let Some(proxy) = proxy {
                builder = builder.proxy(make(proxy)?.no_proxy(reqwest::NoProxy::from_string(&around)));
            }
        }
        if way.plain || !way.verify {
            builder = builder.danger_accept_invalid_certs(true);
        } else if !self.roots.is_empty() {
            let roots = self.roots.iter().map(|der| reqwest::Certificate::from_der(der)).collect::<Result<Vec<_>, _>>()?;
            builder = builder.tls_certs_only(roots);
        }
        Ok(builder.build()?)
    }

    /// The protocol crate's client.
    fn client(&self, way: Way, address: &str) -> Result<oci_client::Client, Trouble> {
        let (https_proxy, http_proxy, no_proxy) = self.proxies();
        let roots = self.roots.iter().map(|der| Certificate { encoding: CertificateEncoding::Der, data: der.clone() });
        let config = ClientConfig {
            protocol: if way.plain { ClientProtocol::HttpsExcept(vec![address.to_owned()]) } else { ClientProtocol::Https },
            // Over plain HTTP there is nothing to check, and the machine may have no certificates at all.
            accept_invalid_certificates: way.plain || !way.verify,
            tls_certs_only: if way.plain { Vec::new() } else { roots.collect() },
            read_timeout: Some(READ_TIMEOUT),
            connect_timeout: Some(CONNECT_TIMEOUT),
            user_agent: USER_AGENT,
            https_proxy,
            http_proxy,
            no_proxy: Some(no_proxy),
            ..ClientConfig::default()
        };
        Ok(oci_client::Client::try_from(config)?)
    }

    /// Asks the registry how it wants to be spoken to, and gets a token for `reference` if it wants one.
    async fn negotiate(&self, reference: &Reference, credential: &Credential) -> Result<Access, Trouble> {
        let mut told = None;
        for way in self.ways(reference) {
            match self.negotiate_way(way, reference, credential).await {
                Ok(access) => return Ok(access),
                // The registry was reached: another way would only hide what it said.
                Err(trouble) if trouble.status().is_some() => return Err(trouble),
                // The first trouble is told; a refused certificate says more than any other.
                Err(trouble) if told.is_none() || matches!(trouble, Trouble::Certificate(_)) => told = Some(trouble),
                Err(_) => {}
            }
        }
        Err(told.unwrap_or_else(|| Trouble::Other("there is no way to it".into())))
    }

    async fn negotiate_way(&self, way: Way, reference: &Reference, credential: &Credential) -> Result<Access, Trouble> {
        let http = self.http(way)?;
        let url = format!("{}://{}/v2/", way.scheme(), reference.address());
        let (status, challenges) = retrying(async || answer(&http, &url).await).await?;
        if way.plain && status == 400 {
            // A TLS server's answer to plain HTTP.
            return Err(Trouble::Other("it does not speak plain HTTP".into()));
        }
        let ask = token::Ask { http: &http, way, repository: reference.repository(), credential };
        Ok(Access { way, auth: ask.answer(&challenges).await? })
    }
}

/// Status and challenges of the protocol's version check; an overloaded server is a trouble.
async fn answer(http: &reqwest::Client, url: &str) -> Result<(u16, Vec<String>), Trouble> {
    let response = http.get(url).send().await?;
    let status = response.status().as_u16();
    if status == 429 || status >= 500 {
        return Err(Trouble::from_status(status, &response.text().await?));
    }
    let challenges = response.headers().get_all("www-authenticate").iter().filter_map(|value| value.to_str().ok());
    Ok((status, challenges.map(str::to_owned).collect()))
}

/// Runs `attempt` until it succeeds, fails for good, or [`RETRY_PAUSES`] are used up.
pub(super) async fn retrying<T, F: Future<Output = Result<T, Trouble>>>(attempt: impl Fn() -> F) -> Result<T, Trouble> {
    for pause in RETRY_PAUSES {
        match attempt().await {
            Err(trouble) if trouble.may_pass() => tokio::time::sleep(pause).await,
            result => return result,
        }
    }
    attempt().await
}

/// A client on a runtime of its own.
pub(super) struct Connection {
    runtime: tokio::runtime::Runtime,
    pub client: oci_client::Client,
    pub access: Access,
}

impl Connection {
    /// Negotiates, and connects.
    pub(super) fn negotiate(
        settings: &Settings,
        reference: &Reference,
        credential: &Credential,
    ) -> Result<Result<Self, Trouble>> {
        let runtime = runtime()?;
        let access = match runtime.block_on(settings.negotiate(reference, credential)) {
            Ok(access) => access,
            Err(trouble) => return Ok(Err(trouble)),
        };
        Ok(Self::on(runtime, settings, reference, access))
    }

    /// Another connection of the same kind, for another thread.
    pub(super) fn open(settings: &Settings, reference: &Reference, access: Access) -> Result<Result<Self, Trouble>> {
        Ok(Self::on(runtime()?, settings, reference, access))
    }

    fn on(runtime: tokio::runtime::Runtime, settings: &Settings, reference: &Reference, access: Access) -> Result<Self, Trouble> {
        let client = settings.client(access.way, reference.address())?;
        runtime.block_on(client.store_auth_if_needed(reference.address(), &access.auth));
        Ok(Self { runtime, client, access })
    }

    pub(super) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start a runtime for the network")
}

/// The certificates of a PEM bundle as DER. What rustls cannot use is left out, as other tools do.
fn read_roots(path: &std::path::Path) -> Result<Vec<Vec<u8>>> {
    let pem = fs_err::read(path).context("cannot read the CA bundle")?;
    let certificates = rustls::pki_types::CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok);
    let usable = certificates.filter(|der| rustls::RootCertStore::empty().add(der.clone()).is_ok());
    let roots: Vec<Vec<u8>> = usable.map(|der| der.to_vec()).collect();
    if roots.is_empty() {
        return Err(Problem::failed(format!("`{}` holds no certificate", path.display())).hint("it must be a PEM bundle").into());
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(options: RegistryOptions) -> Settings {
        Settings::new(&options).unwrap()
    }

    #[test]
    fn plain_http_is_for_loopback_and_insecure_registries_only() {
        let plain = Way { plain: true, verify: false };
        let checked = Way { plain: false, verify: true };
        let unchecked = Way { plain: false, verify: false };
        let settings = settings(RegistryOptions {
            insecure: vec!["lab.example".into(), "a.example:5000".into()],
            ..RegistryOptions::default()
        });
        for (reference, expected) in [
            ("debian", vec![checked]),
            ("quay.io/x/y", vec![checked]),
            ("127.0.0.1:5000/x", vec![plain, checked]),
            ("localhost:5000/x", vec![plain, checked]),
            ("lab.example/x", vec![unchecked, plain]),
            ("lab.example:444/x", vec![unchecked, plain]),
            ("a.example:5000/x", vec![unchecked, plain]),
            ("a.example/x", vec![checked]),
            ("localhost.evil.example/x", vec![checked]),
        ] {
            assert_eq!(settings.ways(&reference.parse().unwrap()), expected, "{reference}");
        }
    }

    #[test]
    fn the_environment_never_chooses_the_proxy() {
        let (https, http, around) = settings(RegistryOptions::default()).proxies();
        assert_eq!((https, http.as_deref(), around.as_str()), (None, Some("http://127.0.0.1:9"), "*,0.0.0.0/0,::/0"));
        let proxy = Proxy { https: Some("http://proxy:3128".into()), http: None, exceptions: Some("corp.example".into()) };
        let (https, http, around) = settings(RegistryOptions { proxy, ..RegistryOptions::default() }).proxies();
        assert_eq!((https.as_deref(), http), (Some("http://proxy:3128"), None));
        assert_eq!(around, "corp.example,localhost,127.0.0.0/8,::1");
    }

    #[test]
    fn a_bundle_without_certificates_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        fs_err::write(&path, "not a certificate").unwrap();
        let options = RegistryOptions { ca_bundle: Some(path.clone()), ..RegistryOptions::default() };
        assert_eq!(Settings::new(&options).unwrap_err().to_string(), format!("`{}` holds no certificate", path.display()));
    }
}
