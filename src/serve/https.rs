//! The API over HTTPS, for other machines: for who has a token, a certificate of the authority, or both where both are asked for.
//!
//! Tokens are bearer tokens (RFC 6750), one on each line of a file; the file is read for every request, so that a token can be
//! changed while the daemon serves, with the old and the new one in it for a while.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use super::api;
use super::model::Shared;
use crate::error::Problem;
use crate::rollout::switch::tls::Tls;
use crate::rollout::switch::{CertificateFiles, listen};

/// Name of the listeners of the API.
pub const NAME: &str = listen::API;
/// Connections at a time; more wait.
const CONNECTIONS_MAX: usize = 256;
/// For the handshake, and for the head of a request.
const PATIENCE: Duration = Duration::from_secs(10);
/// Fewer characters are guessed.
const TOKEN_MIN: usize = 20;
/// How often the certificates' files are looked at.
const LOOK: Duration = Duration::from_secs(10);

/// Whom the API over HTTPS lets in.
#[derive(Debug, Clone, Default)]
pub struct Door {
    pub certificates: Vec<CertificateFiles>,
    /// File of the tokens.
    pub tokens: Option<PathBuf>,
    /// Certificates, in PEM, of the authority that signs those of clients.
    pub authority: Option<PathBuf>,
}

/// A door whose files were read.
#[derive(Debug)]
pub struct Ready {
    tls: Tls,
    tokens: Option<PathBuf>,
}

impl Door {
    /// # Errors
    /// It would let everybody in; a file that cannot be read, or tokens that others can read or guess.
    pub fn ready(&self) -> Result<Ready> {
        if self.tokens.is_none() && self.authority.is_none() {
            return Err(Problem::usage("the API over TCP would be open to everybody")
                .hint("`--api-token FILE` lets in who has a token, `--api-authority FILE` who has a certificate of it")
                .into());
        }
        if self.certificates.is_empty() {
            return Err(Problem::usage("the API over TCP has no certificate, and would show its tokens to everybody")
                .hint("`--certificate FILE --key FILE` name one")
                .into());
        }
        if let Some(file) = &self.tokens {
            let mode = fs_err::metadata(file)?.permissions().mode();
            if mode & 0o007 != 0 {
                return Err(Problem::failed(format!("everybody on this machine may read the tokens in `{}`", file.display()))
                    .hint(format!("`chmod o= {}` keeps them from it", file.display()))
                    .into());
            }
            tokens(file)?;
        }
        let tls = Tls::load(&self.certificates, &["http/1.1"], self.authority.as_deref())?;
        Ok(Ready { tls, tokens: self.tokens.clone() })
    }
}

/// Digests of the tokens in `file`, so that comparing two takes as long whatever they have in common.
fn tokens(file: &Path) -> Result<Vec<[u8; 32]>> {
    let text = fs_err::read_to_string(file)?;
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
    let shown = file.display();
    if lines.is_empty() {
        return Err(Problem::usage(format!("`{shown}` holds no token"))
            .hint("one on each line, such as `openssl rand -hex 32` makes them")
            .into());
    }
    if let Some(at) = lines.iter().position(|line| line.len() < TOKEN_MIN || !line.bytes().all(|byte| byte.is_ascii_graphic())) {
        return Err(Problem::usage(format!("token {} in `{shown}` is no token", at + 1))
            .hint(format!("it has {TOKEN_MIN} or more visible ASCII characters, such as `openssl rand -hex 32` makes them"))
            .into());
    }
    Ok(lines.into_iter().map(|line| Sha256::digest(line).into()).collect())
}

/// Whether the request has one of the tokens, or the answer why not.
fn let_in(file: &Path, request: &Request) -> std::result::Result<(), Box<Response>> {
    // Where the file is, is nobody's business who has no token.
    let broken = |_| Box::new(api::refusal(StatusCode::SERVICE_UNAVAILABLE, "the daemon cannot read its tokens", &[]));
    let known = tokens(file).map_err(broken)?;
    let given = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = given.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let digest: Option<[u8; 32]> = token.map(|(_, token)| Sha256::digest(token.trim()).into());
    if digest.is_some_and(|digest| known.contains(&digest)) {
        return Ok(());
    }
    let hint = "the request needs the field `authorization: Bearer TOKEN`";
    let mut response = api::refusal(StatusCode::UNAUTHORIZED, "this token is not known", &[hint]);
    response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
    Err(Box::new(response))
}

/// Takes requests of `listener` until it is dropped; connections that are open go on.
pub async fn serve(listener: TcpListener, door: Arc<Ready>, router: Router, shared: Arc<Shared>) -> Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let guard = door.clone();
    let router = router.layer(middleware::from_fn(move |request: Request, next: Next| {
        let guard = guard.clone();
        async move {
            match guard.tokens.as_deref().map_or(Ok(()), |file| let_in(file, &request)) {
                Ok(()) => next.run(request).await,
                Err(response) => *response,
            }
        }
    }));
    let seats = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut look = tokio::time::interval(LOOK);
    loop {
        let stream = tokio::select! {
            _ = look.tick() => {
                let (new, errors) = door.tls.reload();
                new.iter().for_each(|path| shared.world.note(&format!("the API has the new certificate `{}`", path.display())));
                errors.iter().for_each(|error| shared.world.warn(&format!("the API keeps its certificate: {error:#}")));
                continue;
            }
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(_) => {
                    // As many files are open as may be: some are going to be closed.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let seat = seats.clone().acquire_owned().await?;
        let (acceptor, router) = (TlsAcceptor::from(door.tls.config()), router.clone());
        tokio::spawn(async move {
            let _seat = seat;
            if let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, acceptor.accept(stream)).await {
                let mut server = http1::Builder::new();
                server.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
                // Who goes away in the middle is nobody's business.
                let _ = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)).await;
            }
        });
    }
}
