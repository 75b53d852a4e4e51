//! One way to a repository: which protocol its registry speaks, what it was shown for the right to
//! pull or push, and a client with a runtime of its own, so that each thread has one and everything
//! above is synchronous.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustls::pki_types::pem::PemObject as _;

use super::reference::{host_of, is_loopback};
use super::token::{self, Auth};
use super::trouble::Trouble;
use super::wire::Wire;
use super::{Proxy, RegistryOptions};
use crate::error::Problem;
use crate::oci::credentials::Found;

/// Long enough for a slow link's handshake, short enough to be noticed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Silence on an open connection: registries that fetch from cold storage take tens of seconds.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const USER_AGENT: &str = concat!("pipeline/", env!("CARGO_PKG_VERSION"));
/// Stands for "no proxy at all": without one set, the HTTP library reads the environment by itself.
const NO_PROXY_AT_ALL: (&str, &str) = ("http://127.0.0.1:9", "*,0.0.0.0/0,::/0");
/// Never through a proxy, as Docker does.
const LOOPBACK: &str = "localhost,127.0.0.0/8,::1";
/// Docker Hub's registry has another address than its name.
const DOCKER_HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// What every client is made from: read and checked once.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// DER; empty when the system's own certificates are to be used.
    roots: Vec<Vec<u8>>,
    proxy: Proxy,
    insecure: Vec<String>,
}

/// One repository in one registry, and what may be done there.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// `HOST[:PORT]` as people write it.
    pub registry: String,
    pub repository: String,
    pub found: Found,
    pub rights: Rights,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rights {
    pub push: bool,
    /// A repository of the same registry whose blobs may be mounted.
    pub mount_from: Option<String>,
}

impl Peer {
    /// The host that is spoken to.
    pub(super) fn address(&self) -> &str {
        if self.registry == DOCKER_HUB.0 { DOCKER_HUB.1 } else { &self.registry }
    }

    /// Scopes to ask a token service for (distribution specification, "Token Scope").
    fn scopes(&self) -> Vec<String> {
        let own = format!("repository:{}:{}", self.repository, if self.rights.push { "pull,push" } else { "pull" });
        let mount = self.rights.mount_from.iter().map(|from| format!("repository:{from}:pull"));
        std::iter::once(own).chain(mount).collect()
    }
}

/// How a registry is spoken to, found out by asking it.
#[derive(Debug, Clone)]
struct Access {
    way: Way,
    /// What it asked for when nothing was shown.
    challenges: Vec<String>,
    auth: Auth,
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
    fn ways(&self, registry: &str) -> Vec<Way> {
        let plain = Way { plain: true, verify: false };
        let checked = Way { plain: false, verify: true };
        if self.insecure.iter().any(|entry| entry == registry || entry == host_of(registry)) {
            vec![Way { plain: false, verify: false }, plain]
        } else if is_loopback(registry) {
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

    /// A client without a limit for silence: a long upload is one, [`in_time`] and the upload know better.
    fn http(&self, way: Way) -> Result<reqwest::Client, Trouble> {
        self.http_with(way, reqwest::redirect::Policy::default())
    }

    /// The same, following no redirect.
    fn direct(&self, way: Way) -> Result<reqwest::Client, Trouble> {
        self.http_with(way, reqwest::redirect::Policy::none())
    }

    fn http_with(&self, way: Way, redirects: reqwest::redirect::Policy) -> Result<reqwest::Client, Trouble> {
        let (https, http, around) = self.proxies();
        let mut builder = reqwest::Client::builder().user_agent(USER_AGENT).connect_timeout(CONNECT_TIMEOUT).redirect(redirects);
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

    /// Asks the registry how it wants to be spoken to, and gets a token for `peer` if it wants one.
    async fn negotiate(&self, peer: &Peer) -> Result<(reqwest::Client, Access), Trouble> {
        let mut told = None;
        for way in self.ways(&peer.registry) {
            match self.negotiate_way(way, peer).await {
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

    async fn negotiate_way(&self, way: Way, peer: &Peer) -> Result<(reqwest::Client, Access), Trouble> {
        let http = self.http(way)?;
        let url = format!("{}://{}/v2/", way.scheme(), peer.address());
        let (status, challenges) = retrying(async || answer(&http, &url).await).await?;
        if way.plain && status == 400 {
            // A TLS server's answer to plain HTTP.
            return Err(Trouble::Other("it does not speak plain HTTP".into()));
        }
        let direct = || self.direct(way);
        let ask = token::Ask { http: &http, direct: &direct, way, scopes: &peer.scopes(), credential: &peer.found.credential };
        let auth = ask.answer(&challenges).await?;
        Ok((http, Access { way, challenges, auth }))
    }
}

/// Status and challenges of the protocol's version check; an overloaded server is a trouble.
async fn answer(http: &reqwest::Client, url: &str) -> Result<(u16, Vec<String>), Trouble> {
    let response = in_time(http.get(url).send()).await?;
    let status = response.status().as_u16();
    if status == 429 || status >= 500 {
        return Err(Trouble::from_response(response).await);
    }
    let challenges = response.headers().get_all("www-authenticate").iter().filter_map(|value| value.to_str().ok());
    Ok((status, challenges.map(str::to_owned).collect()))
}

/// Waits for an answer, or for the next bytes of one, no longer than [`READ_TIMEOUT`].
pub(super) async fn in_time<T>(answer: impl Future<Output = reqwest::Result<T>>) -> Result<T, Trouble> {
    match tokio::time::timeout(READ_TIMEOUT, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Trouble::Timeout),
    }
}

/// Runs `attempt` until it succeeds, fails for good, or its pauses are used up.
pub(super) async fn retrying<T, F: Future<Output = Result<T, Trouble>>>(attempt: impl Fn() -> F) -> Result<T, Trouble> {
    let mut failures = 0;
    loop {
        match attempt().await {
            Err(trouble) => match trouble.pause(failures) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(trouble),
            },
            result => return result,
        }
        failures += 1;
    }
}

/// A client on a runtime of its own.
#[derive(Debug)]
pub(super) struct Connection {
    settings: Arc<Settings>,
    pub peer: Arc<Peer>,
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
    access: Access,
}

impl Connection {
    /// Negotiates, and connects.
    pub(super) fn negotiate(settings: Arc<Settings>, peer: Arc<Peer>) -> Result<Result<Self, Trouble>> {
        let runtime = runtime()?;
        Ok(runtime.block_on(settings.negotiate(&peer)).map(|(http, access)| Self { settings, peer, runtime, http, access }))
    }

    /// Another connection of the same kind, for another thread.
    pub(super) fn another(&self) -> Result<Result<Self, Trouble>> {
        let (settings, peer, access) = (self.settings.clone(), self.peer.clone(), self.access.clone());
        let runtime = runtime()?;
        Ok(settings.http(access.way).map(|http| Self { settings, peer, runtime, http, access }))
    }

    /// One try of `attempt`.
    pub(super) fn once<T>(&self, attempt: impl AsyncFnOnce(Wire<'_>) -> Result<T, Trouble>) -> Result<T, Trouble> {
        let Access { way, auth, .. } = &self.access;
        let wire = Wire { http: &self.http, way: *way, address: self.peer.address(), repository: &self.peer.repository, auth };
        self.runtime.block_on(attempt(wire))
    }

    /// Tries until it succeeds, fails for good, or its pauses are used up; a right that has run out is renewed once.
    pub(super) fn call<T>(&mut self, attempt: impl AsyncFn(Wire<'_>) -> Result<T, Trouble>) -> Result<T, Trouble> {
        let (mut failures, mut renewed) = (0, false);
        loop {
            let trouble = match self.once(&attempt) {
                Ok(value) => return Ok(value),
                Err(trouble) => trouble,
            };
            if !renewed && self.renew(&trouble) {
                renewed = true;
                continue;
            }
            match trouble.pause(failures) {
                Some(pause) => std::thread::sleep(pause),
                None => return Err(trouble),
            }
            failures += 1;
        }
    }

    /// Whether there is another right to show after `trouble`: registries that let everybody read
    /// ask for it at the first write only.
    pub(super) fn renew(&mut self, trouble: &Trouble) -> bool {
        let Trouble::Status { code: 401, said, .. } = trouble else { return false };
        let challenges = if said.challenges.is_empty() { &self.access.challenges } else { &said.challenges };
        let scopes = self.peer.scopes();
        let way = self.access.way;
        let direct = || self.settings.direct(way);
        let credential = &self.peer.found.credential;
        let ask = token::Ask { http: &self.http, direct: &direct, way, scopes: &scopes, credential };
        match self.runtime.block_on(ask.answer(challenges)) {
            Ok(auth) if auth != self.access.auth => {
                self.access.auth = auth;
                true
            }
            _ => false,
        }
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
            ("[::1]:5000/x", vec![plain, checked]),
            ("[2001:db8::1]:5000/x", vec![checked]),
            ("lab.example/x", vec![unchecked, plain]),
            ("lab.example:444/x", vec![unchecked, plain]),
            ("a.example:5000/x", vec![unchecked, plain]),
            ("a.example/x", vec![checked]),
            ("localhost.evil.example/x", vec![checked]),
        ] {
            let reference: super::super::Reference = reference.parse().unwrap();
            assert_eq!(settings.ways(reference.registry()), expected, "{reference}");
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
