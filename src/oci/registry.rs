//! Pulls images from registries by the OCI distribution protocol.
//!
//! In: a [`Reference`], and the files and settings of [`RegistryOptions`] (nothing here reads the
//! environment). Out: the digest a name stands for ([`Registry::resolve`]), or the image's manifest
//! and configuration as bytes, with its layers streamed into a [`BlobSink`] ([`Registry::pull`]).
//! Manifests are kept byte for byte, so that the digest stays the one the registry knows.
//!
//! The protocol is `oci-client`'s; it is asynchronous, these functions are not: each thread that
//! talks to a registry has a runtime of its own.

mod connection;
mod manifest;
mod reference;
mod token;
mod transfer;
mod trouble;

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use self::connection::{Access, Connection, Settings, retrying};
pub use self::manifest::Descriptor;
use self::manifest::{Document, Image};
pub use self::reference::Reference;
use self::transfer::BlobReader;
use self::trouble::Trouble;
use crate::error::{Problem, nearest};
use crate::oci::credentials::{Credentials, Found};
use crate::oci::digest::Digest;

/// Layers on their way at the same time: one rarely fills a link, and more make registries slow us down.
const PARALLEL_LAYERS: usize = 3;
/// Image configurations are held in memory; real ones have tens of kilobytes.
const CONFIG_LIMIT: u64 = 8 * 1024 * 1024;
/// Tags shown when none is near to the one that is not there.
const TAGS_SHOWN: usize = 5;

/// What the caller knows of its surroundings.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// Docker's `config.json`.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json` candidates, in order; asked before Docker's.
    pub auth_files: Vec<PathBuf>,
    /// The value of `PATH`, for `docker-credential-*`.
    pub helper_path: OsString,
    /// `HOST` or `HOST:PORT` that may speak plain HTTP or show any certificate.
    pub insecure: Vec<String>,
    /// PEM bundle to trust instead of the system's certificates.
    pub ca_bundle: Option<PathBuf>,
    pub proxy: Proxy,
}

/// Proxies, as in `https_proxy`, `http_proxy` and `no_proxy`.
#[derive(Clone, Default)]
pub struct Proxy {
    pub https: Option<String>,
    pub http: Option<String>,
    pub exceptions: Option<String>,
}

impl fmt::Debug for Proxy {
    /// A proxy's URL may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = |proxy: &Option<String>| if proxy.is_some() { "set" } else { "none" };
        write!(f, "Proxy(https: {}, http: {})", set(&self.https), set(&self.http))
    }
}

/// Where layers go. Called from several threads at once.
pub trait BlobSink: Sync {
    /// Whether the blob is there already, whole.
    fn has(&self, digest: &Digest, size: u64) -> bool;
    /// Takes the blob from `reader`: checks its digest, and keeps it only when it was right.
    fn write(&self, digest: &Digest, size: u64, reader: &mut dyn std::io::Read) -> Result<()>;
}

/// What a name stands for right now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// Of the index when the name is one of several platforms, else of the manifest.
    pub digest: Digest,
    pub media_type: String,
}

/// An image: small parts as bytes, layers in the sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledImage {
    /// Of the manifest for linux/amd64, not of an index.
    pub manifest: Descriptor,
    pub manifest_bytes: Vec<u8>,
    pub config: Descriptor,
    pub config_bytes: Vec<u8>,
    /// In the manifest's order, from the lowest up.
    pub layers: Vec<Descriptor>,
}

/// Pulls from registries, with one set of credentials and settings.
#[derive(Debug, Clone)]
pub struct Registry {
    settings: Settings,
    credentials: Credentials,
}

impl Registry {
    /// Reads the CA bundle; talks to nobody yet.
    pub fn new(options: &RegistryOptions) -> Result<Self> {
        let files = options.auth_files.iter().chain(&options.docker_config).cloned().collect();
        Ok(Self { settings: Settings::new(options)?, credentials: Credentials::new(files, &options.helper_path) })
    }

    /// The digest `reference` stands for. The document is fetched and digested, not just asked for,
    /// so that a digest that gets pinned is one that was seen.
    pub fn resolve(&self, reference: &Reference) -> Result<Pinned> {
        let session = self.session(reference)?;
        let (bytes, digest) = session.document(reference)?;
        let document = Document::parse(&bytes).map_err(|why| session.odd(reference, &why))?;
        Ok(Pinned { digest, media_type: document.media_type().into() })
    }

    /// Pulls the image for linux/amd64: `digest` (an index or a manifest of the same repository)
    /// where it is given, else what the name stands for. Layers the sink has are not fetched.
    ///
    /// Undone by nothing: what the sink took stays in it, and the next pull goes on from there.
    pub fn pull(&self, reference: &Reference, digest: Option<Digest>, sink: &dyn BlobSink) -> Result<PulledImage> {
        let wanted = digest.map_or_else(|| reference.clone(), |digest| reference.at(digest));
        let session = self.session(&wanted)?;
        let (bytes, digest) = session.document(&wanted)?;
        let document = Document::parse(&bytes).map_err(|why| session.odd(&wanted, &why))?;
        let (bytes, digest, document) = match document.for_platform(&wanted)? {
            None => (bytes, digest, document),
            Some(entry) => {
                let wanted = wanted.at(entry.digest);
                let (bytes, digest) = session.document(&wanted)?;
                let document = Document::parse(&bytes).map_err(|why| session.odd(&wanted, &why))?;
                (bytes, digest, document)
            }
        };
        let Image { manifest, config, layers } = document.image(&wanted, digest, bytes.len() as u64)?;
        let config_bytes = session.config(&config)?;
        manifest::check_platform(&wanted, &config_bytes)?;
        session.layers(&layers, sink)?;
        Ok(PulledImage { manifest, manifest_bytes: bytes, config, config_bytes, layers })
    }

    fn session<'a>(&'a self, reference: &'a Reference) -> Result<Session<'a>> {
        let found = self.credentials.find(reference.registry(), reference.repository())?;
        let connection = match Connection::negotiate(&self.settings, reference, &found.credential)? {
            Ok(connection) => connection,
            Err(trouble) => return Err(self.problem(reference, &found, &reference.to_string(), &trouble).into()),
        };
        Ok(Session { registry: self, reference, found, connection })
    }

    /// What a person reads of a trouble with `what`.
    fn problem(&self, reference: &Reference, found: &Found, what: &str, trouble: &Trouble) -> Problem {
        let registry = reference.registry();
        match trouble {
            Trouble::Status { code: 401 | 403, .. } => {
                let problem = Problem::failed(format!("registry `{registry}` did not allow to pull `{what}`: {trouble}"));
                let files: Vec<String> = self.credentials.files().iter().map(|file| format!("`{}`", file.display())).collect();
                let problem = problem.hint(match &found.origin {
                    Some(origin) => format!("the credentials came from {origin}"),
                    None if files.is_empty() => "no credentials were looked for".into(),
                    None => format!("no credentials for it were found in {}", files.join(", ")),
                });
                let problem = found.notes.iter().fold(problem, Problem::hint);
                problem.hint(format!(
                    "log in with `docker login {registry}` or `podman login {registry}`; some registries answer the same for a repository that does not exist"
                ))
            }
            Trouble::Status { code: 404, .. } => Problem::failed(format!("registry `{registry}` has no `{what}`")),
            Trouble::Digest { .. } => {
                Problem::failed(format!("registry `{registry}` sent something else than `{what}`: {trouble}"))
                    .hint("the registry's copy is damaged, or something between changes what it sends")
            }
            Trouble::Certificate(_) => Problem::failed(format!("registry `{registry}` cannot be trusted: {trouble}"))
                .hint("a registry with a certificate of your own authority needs that authority in the CA bundle"),
            _ if trouble.is_transient() => {
                Problem::transient(format!("cannot pull `{what}` from registry `{registry}`: {trouble}"))
                    .hint("check the network and the registry, then run the command again: layers that were pulled are kept")
            }
            _ => Problem::failed(format!("cannot pull `{what}` from registry `{registry}`: {trouble}")),
        }
    }
}

/// A pull under way.
struct Session<'a> {
    registry: &'a Registry,
    reference: &'a Reference,
    found: Found,
    connection: Connection,
}

impl Session<'_> {
    fn problem(&self, what: &str, trouble: &Trouble) -> Problem {
        self.registry.problem(self.reference, &self.found, what, trouble)
    }

    fn odd(&self, reference: &Reference, why: &str) -> Problem {
        self.problem(&reference.to_string(), &Trouble::Other(why.into()))
    }

    /// The manifest or index behind `reference`, byte for byte, and its digest.
    fn document(&self, reference: &Reference) -> Result<(Vec<u8>, Digest)> {
        let Connection { client, access, .. } = &self.connection;
        let attempt = async || Ok(client.pull_manifest_raw(reference.inner(), &access.auth, &manifest::ACCEPTED).await?);
        match self.connection.block_on(retrying(attempt)) {
            Ok((bytes, _)) => {
                let bytes = Vec::from(bytes);
                let digest = Digest::of(&bytes);
                Ok((bytes, digest))
            }
            Err(trouble) if trouble.status() == Some(404) => Err(self.not_found(reference).into()),
            Err(trouble) => Err(self.problem(&reference.to_string(), &trouble).into()),
        }
    }

    /// The error for a name that is not there, with what there is instead.
    fn not_found(&self, reference: &Reference) -> Problem {
        let problem = Problem::failed(format!("registry `{}` has no `{reference}`", reference.registry()));
        if reference.digest().is_some() {
            return problem.hint("it was pinned and is gone there; `pipeline update` pins what the name stands for now");
        }
        let wanted = reference.tag().unwrap_or_default();
        let listing = self.connection.client.list_tags(reference.inner(), &self.connection.access.auth, None, None);
        let Ok(tags) = self.connection.block_on(listing).map(|answer| answer.tags) else {
            return problem.hint(format!("`{}` may not exist there, or need a login", reference.repository()));
        };
        match nearest(wanted, tags.iter().map(String::as_str)) {
            Some(tag) => problem.hint(format!("the nearest tag there is `{tag}`")),
            None if tags.is_empty() => problem.hint(format!("`{}` has no tags there", reference.repository())),
            None => {
                let shown: Vec<String> = tags.iter().take(TAGS_SHOWN).map(|tag| format!("`{tag}`")).collect();
                let more = tags.len().saturating_sub(TAGS_SHOWN);
                let more = if more == 0 { String::new() } else { format!(" and {more} more") };
                problem.hint(format!("tags there: {}{more}", shown.join(", ")))
            }
        }
    }

    fn config(&self, config: &Descriptor) -> Result<Vec<u8>> {
        if config.size > CONFIG_LIMIT {
            let why = format!("its configuration has {} bytes, which no image needs", config.size);
            return Err(self.odd(self.reference, &why).into());
        }
        let stop = AtomicBool::new(false);
        let connection = self.reopen(self.connection.access.clone())?;
        let renew = || self.renew();
        let mut reader = BlobReader::new(connection, &renew, self.reference, config, &stop);
        let mut bytes = Vec::new();
        match std::io::Read::read_to_end(&mut reader, &mut bytes) {
            Ok(_) => Ok(bytes),
            Err(error) => {
                let trouble = reader.finish().0.unwrap_or_else(|| error.into());
                Err(self.problem(&config.digest.to_string(), &trouble).into())
            }
        }
    }

    /// Fetches what the sink does not have, a few at a time; the first failure stops the others.
    fn layers(&self, layers: &[Descriptor], sink: &dyn BlobSink) -> Result<()> {
        let mut missing: Vec<&Descriptor> = Vec::new();
        for layer in layers {
            if !missing.iter().any(|known| known.digest == layer.digest) && !sink.has(&layer.digest, layer.size) {
                missing.push(layer);
            }
        }
        let stop = AtomicBool::new(false);
        let queue = Mutex::new(missing.iter().copied());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || -> Result<()> {
            let mut connection: Option<Connection> = None;
            while let (false, Some(layer)) = (stop.load(Ordering::Relaxed), next()) {
                let open = match connection.take() {
                    Some(connection) => connection,
                    None => self.reopen(self.connection.access.clone())?,
                };
                connection = Some(self.layer(open, layer, sink, &stop)?);
            }
            Ok(())
        };
        let first = Mutex::new(None);
        std::thread::scope(|scope| {
            for _ in 0..missing.len().min(PARALLEL_LAYERS) {
                scope.spawn(|| {
                    if let Err(error) = work()
                        && !stop.swap(true, Ordering::Relaxed)
                    {
                        first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                    }
                });
            }
        });
        first.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    fn layer(&self, connection: Connection, layer: &Descriptor, sink: &dyn BlobSink, stop: &AtomicBool) -> Result<Connection> {
        let renew = || self.renew();
        let mut reader = BlobReader::new(connection, &renew, self.reference, layer, stop);
        let written = sink.write(&layer.digest, layer.size, &mut reader);
        let (trouble, connection) = reader.finish();
        match (trouble, written) {
            (Some(trouble), _) => Err(self.problem(&layer.digest.to_string(), &trouble).into()),
            (None, Err(error)) => Err(error.context(format!("cannot keep layer `{}` of `{}`", layer.digest, self.reference))),
            (None, Ok(())) => Ok(connection),
        }
    }

    fn reopen(&self, access: Access) -> Result<Connection> {
        Connection::open(&self.registry.settings, self.reference, access)?
            .map_err(|trouble| self.problem(&self.reference.to_string(), &trouble).into())
    }

    fn renew(&self) -> Result<Result<Connection, Trouble>> {
        Connection::negotiate(&self.registry.settings, self.reference, &self.found.credential)
    }
}
