//! Certificates: several, chosen by the name the client asks for, read again when their files change.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use anyhow::{Context as _, Result};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;

use crate::error::Problem;

/// A certificate and its key, PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateFiles {
    /// The certificate, then those that lead to its authority.
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// What tells one state of a file from another: modified (seconds, nanoseconds), inode, bytes.
type Stamp = [i64; 4];

/// A pair as it was read last.
#[derive(Debug)]
struct Loaded {
    files: CertificateFiles,
    stamps: [Option<Stamp>; 2],
    key: Arc<CertifiedKey>,
}

/// The certificates in use.
#[derive(Debug, Clone)]
struct Certificates(Arc<RwLock<Vec<Loaded>>>);

/// What protocols over TLS a server offers, most wanted first (RFC 7301).
pub const BOTH: &[&str] = &["h2", "http/1.1"];

/// The TLS side of a server.
#[derive(Debug)]
pub struct Tls {
    certificates: Certificates,
    config: Arc<rustls::ServerConfig>,
}

impl Tls {
    /// Reads all pairs; an error names the file. With an `authority` (certificates in PEM) a client has to have a certificate
    /// that it signed.
    pub fn load(files: &[CertificateFiles], protocols: &[&str], authority: Option<&Path>) -> Result<Self> {
        let loaded = files
            .iter()
            .map(|files| Ok(Loaded { files: files.clone(), stamps: stamps(files), key: read(files)? }))
            .collect::<Result<Vec<_>>>()?;
        let certificates = Certificates(Arc::new(RwLock::new(loaded)));
        let provider = Arc::new(ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_safe_default_protocol_versions().context("ring knows the default versions of TLS")?;
        let builder = match authority {
            None => builder.with_no_client_auth(),
            Some(file) => builder.with_client_cert_verifier(clients(file, provider)?),
        };
        let mut config = builder.with_cert_resolver(Arc::new(certificates.clone()));
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
        config.ticketer = ring::Ticketer::new().context("cannot make a key for session tickets")?;
        Ok(Self { certificates, config: Arc::new(config) })
    }

    pub fn config(&self) -> Arc<rustls::ServerConfig> {
        self.config.clone()
    }

    /// Reads the pairs whose files changed. A pair that is broken leaves the old one in use; what went wrong is
    /// returned, once per change. `new` says which were taken.
    pub fn reload(&self) -> (Vec<PathBuf>, Vec<anyhow::Error>) {
        let (mut new, mut errors) = (Vec::new(), Vec::new());
        let count = self.certificates.read().len();
        for index in 0..count {
            let (files, before) = {
                let certificates = self.certificates.read();
                (certificates[index].files.clone(), certificates[index].stamps)
            };
            let now = stamps(&files);
            if now == before {
                continue;
            }
            let key = read(&files);
            let mut certificates = self.certificates.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            // What is broken is looked at again when it changes again.
            certificates[index].stamps = now;
            match key {
                Ok(key) => {
                    certificates[index].key = key;
                    new.push(files.certificate);
                }
                Err(error) => errors.push(error),
            }
        }
        (new, errors)
    }
}

/// Who knows the clients of the authority in `file`.
fn clients(file: &Path, provider: Arc<rustls::crypto::CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(file)? {
        roots.add(certificate).with_context(|| format!("`{}` is not the certificate of an authority", file.display()))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
    verifier.with_context(|| format!("`{}` cannot be an authority of clients", file.display()))
}

/// All certificates of a PEM file, one at least.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let shown = path.display();
    let found = CertificateDer::pem_slice_iter(&fs_err::read(path)?).collect::<Result<Vec<_>, _>>();
    let found = found.with_context(|| format!("`{shown}` is not PEM"))?;
    if found.is_empty() {
        return Err(Problem::usage(format!("`{shown}` holds no certificate")).into());
    }
    Ok(found)
}

fn stamp(path: &Path) -> Option<Stamp> {
    let metadata = fs_err::metadata(path).ok()?;
    Some([metadata.mtime(), metadata.mtime_nsec(), metadata.ino() as i64, metadata.size() as i64])
}

fn stamps(files: &CertificateFiles) -> [Option<Stamp>; 2] {
    [stamp(&files.certificate), stamp(&files.key)]
}

/// Reads a pair and makes sure that its halves belong together.
fn read(files: &CertificateFiles) -> Result<Arc<CertifiedKey>> {
    let (certificate, key) = (files.certificate.display(), files.key.display());
    let chain = certificates(&files.certificate)?;
    let private =
        PrivateKeyDer::from_pem_slice(&fs_err::read(&files.key)?).with_context(|| format!("`{key}` holds no private key"))?;
    let pair = CertifiedKey::from_der(chain, private, &ring::default_provider());
    let pair = pair.with_context(|| format!("the certificate `{certificate}` and the key `{key}` do not belong together"))?;
    Ok(Arc::new(pair))
}

impl Certificates {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, Vec<Loaded>> {
        self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Whether the certificate is for `name`, wildcards as RFC 6125 has them.
fn is_for(pair: &CertifiedKey, name: &ServerName<'_>) -> bool {
    let parsed = pair.end_entity_cert().and_then(ParsedCertificate::try_from);
    parsed.is_ok_and(|parsed| rustls::client::verify_server_name(&parsed, name).is_ok())
}

impl ResolvesServerCert for Certificates {
    /// The first that is for the name, else the first of all.
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let certificates = self.read();
        let name = hello.server_name().and_then(|name| ServerName::try_from(name).ok());
        let named = name.and_then(|name| certificates.iter().find(|loaded| is_for(&loaded.key, &name)));
        named.or(certificates.first()).map(|loaded| loaded.key.clone())
    }
}
