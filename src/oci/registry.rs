//! Pulls from, pushes to and copies between registries by the OCI distribution protocol 1.1.
//!
//! In: a [`Reference`], and the files and settings of [`RegistryOptions`] (nothing here reads the
//! environment). Out, for a base image: the digest a name stands for ([`Registry::resolve`]) and its
//! manifest, its layers streamed into a [`BlobSink`] ([`Registry::pull`]). For artifacts: everything
//! behind a name with what refers to it into a sink ([`Registry::fetch`]), out of a [`BlobSource`]
//! ([`Registry::push`]), or from one registry to another ([`Registry::copy`]). Documents are kept byte
//! for byte, so that a digest stays the one the registry knows, and every byte that comes is digested.
//!
//! Pulls ask the registry's mirrors first, in their order; pushes and tags never do. Sockets are
//! asynchronous, these functions are not: each thread that talks to a registry has a runtime of its own.

mod complete;
mod connection;
mod manifest;
mod push;
mod reference;
mod referrers;
mod session;
mod source;
mod token;
mod transfer;
mod tree;
mod trouble;
mod upload;
mod wire;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::Result;

use self::complete::Complete;
pub use self::complete::{Attached, Fetched, Reach};
use self::connection::{Peer, Rights, Settings};
pub use self::manifest::{Descriptor, Entry, Platform};
use self::manifest::{Document, Image};
use self::push::Shipment;
pub use self::push::{Blobs, Pushed, TagSet, WouldBeLost};
pub use self::reference::{NotAReference, Reference};
use self::session::{Act, Session};
pub use self::source::Content;
use self::source::Remote;
use self::tree::{Item, Tree};
use crate::error::{self, Problem};
use crate::oci::credentials::{Credentials, Given};
use crate::oci::digest::{Digest, Hasher};
use crate::progress::{Event, Progress};

/// Image configurations are held in memory; real ones have tens of kilobytes.
const CONFIG_LIMIT: u64 = 8 * 1024 * 1024;
/// Bytes between two lines about how far a transfer is: seconds on most links.
const TOLD_BYTES: u64 = 32 << 20;

/// What the caller knows of its surroundings.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// Docker's `config.json`.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json` candidates, in order; asked before Docker's.
    pub auth_files: Vec<PathBuf>,
    /// The value of `PATH`, for `docker-credential-*`.
    pub helper_path: OsString,
    /// A login that goes before the files'.
    pub given: Option<Given>,
    /// `HOST` or `HOST:PORT` that may speak plain HTTP or show any certificate. Addresses of this
    /// machine (`localhost`, `127.0.0.1`, `[::1]`) are spoken to with plain HTTP without being here.
    pub insecure: Vec<String>,
    /// For a registry, `HOST[:PORT][/PREFIX]` of those that hold the same, in the order they are asked.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Most bytes of a blob in one request; `None` for no limit.
    pub part_limit: Option<u64>,
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

/// Where blobs go. Called from several threads at once.
pub trait BlobSink: Sync {
    /// Whether the blob is there already, whole.
    fn has(&self, digest: &Digest, size: u64) -> bool;
    /// Takes the blob from `reader`: checks its digest, and keeps it only when it was right.
    fn write(&self, digest: &Digest, size: u64, reader: &mut dyn Read) -> Result<()>;

    /// A manifest or index that is there already, its digest checked.
    fn document(&self, _digest: &Digest) -> Option<Vec<u8>> {
        None
    }

    /// The place where a blob lies while it comes, with what an earlier transfer left there.
    /// `None`: nothing is kept of a transfer that breaks, and [`BlobSink::write`] takes the next.
    fn begun(&self, _digest: &Digest, _size: u64) -> Result<Option<Box<dyn Begun + '_>>> {
        Ok(None)
    }
}

/// A blob that is on its way.
pub trait Begun {
    /// Bytes that are there, and their digest so far.
    fn have(&self) -> (u64, Hasher);
    /// Takes the rest from `reader`. What came stays for the next time when reading fails, except
    /// after [`std::io::ErrorKind::InvalidData`]: then it was not the blob that was asked for.
    fn go_on(self: Box<Self>, reader: &mut dyn Read) -> Result<()>;
}

/// Where a push takes its content from. Called from several threads at once.
pub trait BlobSource: Sync {
    /// A manifest or index, byte for byte.
    fn document(&self, digest: &Digest) -> Result<Vec<u8>>;
    /// The bytes of a blob from `offset` on.
    fn open(&self, blob: &Descriptor, offset: u64) -> Result<Content>;
}

/// What a push is told beside what goes where.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PushOptions {
    /// A repository of the same registry that may hold some of the blobs: they are mounted, not sent.
    pub mount_from: Option<String>,
    /// Manifests that go along: those with a `subject` by digest, others under the tag given here (`sha256-HEX.sig`).
    pub attached: Vec<(Digest, Option<String>)>,
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
    settings: Arc<Settings>,
    credentials: Credentials,
    mirrors: Arc<BTreeMap<String, Vec<String>>>,
    part_limit: Option<u64>,
}

impl Registry {
    /// Reads the CA bundle; talks to nobody yet.
    pub fn new(options: &RegistryOptions) -> Result<Self> {
        let files = options.auth_files.iter().chain(&options.docker_config).cloned().collect();
        Ok(Self {
            settings: Arc::new(Settings::new(options)?),
            credentials: Credentials::new(files, &options.helper_path).with(options.given.clone()),
            mirrors: Arc::new(options.mirrors.clone()),
            part_limit: options.part_limit,
        })
    }

    /// The digest `reference` stands for. The document is fetched and digested, not just asked for,
    /// so that a digest that gets pinned is one that was seen.
    pub fn resolve(&self, reference: &Reference) -> Result<Pinned> {
        let (_, pinned) = self.any_mirror(reference, |session| {
            let (bytes, digest) = session.document(reference)?;
            let document = Document::parse(&bytes).map_err(|why| session.odd(reference, &why))?;
            Ok(Pinned { digest, media_type: document.media_type })
        })?;
        Ok(pinned)
    }

    /// Pulls the image for linux/amd64: `digest` (an index or a manifest of the same repository)
    /// where it is given, else what the name stands for. Layers the sink has are not fetched.
    ///
    /// Undone by nothing: what the sink took stays in it, and the next pull goes on from there.
    pub fn pull(&self, reference: &Reference, digest: Option<Digest>, sink: &dyn BlobSink) -> Result<PulledImage> {
        let wanted = digest.map_or_else(|| reference.clone(), |digest| reference.at(digest));
        let (_, pulled) = self.any_mirror(&wanted, |session| pull_image(session, &wanted, sink))?;
        Ok(pulled)
    }

    /// Pulls everything behind `reference`: the manifest, or an index with all it names (see
    /// [`Reach`]), and what refers to them. Blobs and documents the sink has are not fetched.
    ///
    /// Undone by nothing: what the sink took stays in it, and the next pull goes on from there.
    pub fn fetch(&self, reference: &Reference, reach: Reach, sink: &dyn BlobSink, progress: &dyn Progress) -> Result<Fetched> {
        let known = |digest: &Digest| sink.document(digest);
        let (_, fetched) = self.any_mirror(reference, |session| {
            let complete = Complete::read(session, reference, reach, &known, progress)?;
            let meter = Meter::new(progress, reference, "pulled", &complete.tree);
            complete.bring(session, sink, &|bytes| meter.add(bytes))
        })?;
        Ok(fetched)
    }

    /// Puts `root` with everything it names, and what is attached to it, into `to`'s repository,
    /// and points `to`'s tag at it, last.
    ///
    /// Undone by nothing: without the tag nobody sees what was put, and the next push does not send it again.
    ///
    /// # Errors
    /// A reference by another digest; a blob that is missing or corrupt in the source; the registry's refusal.
    pub fn push(
        &self,
        source: &dyn BlobSource,
        root: &Digest,
        to: &Reference,
        options: &PushOptions,
        progress: &dyn Progress,
    ) -> Result<Pushed> {
        let mut tree = Tree::default();
        let mut read = |digest: &Digest| source.document(digest);
        tree.add(Item::parse(*root, read(root)?)?, &mut read)?;
        let mut attached = Vec::new();
        for (digest, tag) in &options.attached {
            let item = Item::parse(*digest, read(digest)?)?;
            let named = tag.as_deref().and_then(|tag| tag.strip_prefix("sha256-")?.get(..64)?.parse().ok());
            let subject = item.document.subject.as_ref().map(|subject| subject.digest).or(named).unwrap_or(*root);
            attached.push(Attached::new(&referrers::Referring { item: item.clone(), subject, tag: tag.clone() }));
            tree.add(item, &mut read)?;
        }
        self.ship(source, *root, &tree, &attached, to, options.mount_from.clone(), progress)
    }

    /// Copies everything behind `from`, and what refers to it, to `to`. Within one registry blobs
    /// are mounted; between two they are streamed, digested on their way, and nothing is kept here.
    pub fn copy(&self, from: &Reference, to: &Reference, progress: &dyn Progress) -> Result<Pushed> {
        let (session, complete) =
            self.any_mirror(from, |session| Complete::read(session, from, Reach::All, &|_| None, progress))?;
        let mount_from = (from.registry() == to.registry() && session.peer.registry == to.registry())
            .then(|| from.repository().to_owned())
            .filter(|repository| repository != to.repository());
        let Complete { root, tree, attached, .. } = complete;
        let remote = Remote::new(session, &tree);
        self.ship(&remote, root, &tree, &attached, to, mount_from, progress)
    }

    #[expect(clippy::too_many_arguments, reason = "a push and a copy say the same seven things")]
    fn ship(
        &self,
        source: &dyn BlobSource,
        root: Digest,
        tree: &Tree,
        attached: &[Attached],
        to: &Reference,
        mount_from: Option<String>,
        progress: &dyn Progress,
    ) -> Result<Pushed> {
        if to.digest().is_some_and(|digest| digest != root) {
            return Err(Problem::usage(format!("`{to}` names another digest than what is pushed, which is `{root}`"))
                .hint("push to a tag, or leave the digest out")
                .into());
        }
        let session = self.writing(to, mount_from)?;
        let meter = Meter::new(progress, to, "sent", tree);
        let shipment = Shipment { source, root, tree, attached, part_limit: self.part_limit, arrived: &|bytes| meter.add(bytes) };
        shipment.put(&session, to, to.tag())
    }

    /// The digest a tag or digest has in the registry itself; nothing when it is not there.
    pub fn digest(&self, reference: &Reference) -> Result<Option<Digest>> {
        let session = self.reading(reference)?;
        let name = reference.within();
        let found = session.call(async |wire| wire.head(&name).await);
        found.map_err(|trouble| session.teller.problem(&reference.to_string(), &trouble).into())
    }

    /// All tags of `reference`'s repository, in the registry's order.
    pub fn tags(&self, reference: &Reference) -> Result<Vec<String>> {
        let session = self.reading(reference)?;
        let tags = session.call(async |wire| wire.tags().await);
        tags.map_err(|trouble| {
            session.teller.problem(&format!("{}/{}", reference.registry(), reference.repository()), &trouble).into()
        })
    }

    /// Points `tag` at what `target` stands for, in the same repository. Moves no blob.
    ///
    /// Undone by pointing it at [`TagSet::before`].
    pub fn tag(&self, target: &Reference, tag: &str) -> Result<TagSet> {
        let session = self.writing(target, None)?;
        let (bytes, digest) = session.document(target)?;
        let item = Item::parse(digest, bytes).map_err(|error| session.odd(target, &format!("{error:#}")))?;
        push::set_tag(&session, target, &item, tag)
    }

    /// What refers to `digest` in `reference`'s repository, of one artifact type where it is given:
    /// by the registry's list, or by the fallback tag where it has none.
    pub fn referrers(&self, reference: &Reference, digest: &Digest, artifact_type: Option<&str>) -> Result<Vec<Entry>> {
        let session = self.reading(reference)?;
        let api = AtomicBool::new(true);
        let mut found = session
            .call(async |wire| referrers::list(&wire, digest, &api).await)
            .map_err(|trouble| session.teller.problem(&format!("the referrers of {digest}"), &trouble))?;
        // Registries need not filter by themselves.
        found.retain(|entry| artifact_type.is_none_or(|wanted| entry.artifact_type.as_deref() == Some(wanted)));
        Ok(found)
    }

    fn peer(&self, registry: &str, repository: String, rights: Rights) -> Result<Peer> {
        let found = self.credentials.find(registry, &repository)?;
        Ok(Peer { registry: registry.into(), repository, found, rights })
    }

    fn reading(&self, reference: &Reference) -> Result<Session> {
        let peer = self.peer(reference.registry(), reference.repository().into(), Rights::default())?;
        Session::open(self, peer, Act::Pull, &reference.to_string())
    }

    fn writing(&self, reference: &Reference, mount_from: Option<String>) -> Result<Session> {
        let peer = self.peer(reference.registry(), reference.repository().into(), Rights { push: true, mount_from })?;
        Session::open(self, peer, Act::Push, &reference.to_string())
    }

    /// Does `work` with the first mirror that can, else with the registry itself. A full disk is
    /// nobody's fault but ours, and ends it.
    fn any_mirror<T>(&self, reference: &Reference, work: impl Fn(&Session) -> Result<T>) -> Result<(Session, T)> {
        let what = reference.to_string();
        let mut missed = Vec::new();
        for mirror in self.mirrors.get(reference.registry()).into_iter().flatten() {
            let (host, prefix) = mirror.split_once('/').unwrap_or((mirror, ""));
            let repository = format!("{}/{}", prefix.trim_end_matches('/'), reference.repository());
            let peer = self.peer(host, repository.trim_start_matches('/').into(), Rights::default())?;
            let done = Session::open(self, peer, Act::Pull, &what).and_then(|session| {
                let value = work(&session)?;
                Ok((session, value))
            });
            match done {
                Err(error) if error::is_disk_full(&error) => return Err(error),
                Err(error) => missed.push(format!("its mirror `{mirror}` was asked first: {error:#}")),
                done => return done,
            }
        }
        let done = self.reading(reference).and_then(|session| {
            let value = work(&session)?;
            Ok((session, value))
        });
        done.map_err(|error| match error.downcast::<Problem>() {
            Ok(problem) => missed.iter().fold(problem, |problem, missed| problem.hint(missed)).into(),
            Err(error) => error,
        })
    }
}

fn pull_image(session: &Session, wanted: &Reference, sink: &dyn BlobSink) -> Result<PulledImage> {
    let (bytes, digest) = session.document(wanted)?;
    let document = Document::parse(&bytes).map_err(|why| session.odd(wanted, &why))?;
    let (bytes, digest, document) = match document.for_platform(wanted)? {
        None => (bytes, digest, document),
        Some(entry) => {
            let wanted = wanted.at(entry.descriptor.digest);
            let (bytes, digest) = session.document(&wanted)?;
            let document = Document::parse(&bytes).map_err(|why| session.odd(&wanted, &why))?;
            (bytes, digest, document)
        }
    };
    let Image { manifest, config, layers } = document.image(wanted, digest, bytes.len() as u64)?;
    if config.size > CONFIG_LIMIT {
        let why = format!("its configuration has {} bytes, which no image needs", config.size);
        return Err(session.odd(wanted, &why).into());
    }
    let config_bytes = session.small(&config)?;
    manifest::check_platform(wanted, &config_bytes)?;
    session.blobs(&layers, sink, &|_| {})?;
    Ok(PulledImage { manifest, manifest_bytes: bytes, config, config_bytes, layers })
}

/// Tells how far a transfer is: now and then, as lines of the step that is named for the reference.
struct Meter<'a> {
    progress: &'a dyn Progress,
    step: String,
    verb: &'static str,
    total: u64,
    done: AtomicU64,
}

impl<'a> Meter<'a> {
    fn new(progress: &'a dyn Progress, reference: &Reference, verb: &'static str, tree: &Tree) -> Self {
        let total = tree.blobs.iter().map(|blob| blob.size).sum();
        Self { progress, step: reference.to_string(), verb, total, done: AtomicU64::new(0) }
    }

    fn add(&self, bytes: u64) {
        let before = self.done.fetch_add(bytes, Ordering::Relaxed);
        let now = before + bytes;
        if before / TOLD_BYTES != now / TOLD_BYTES {
            let line = format!("{} {} MiB of at most {} MiB", self.verb, now >> 20, self.total >> 20);
            self.progress.event(Event::StepOutput { step: self.step.clone(), line });
        }
    }
}
