//! A piece of work with one repository: its requests, from several threads where it pays, and what
//! a person reads when one fails.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;

use super::connection::{Connection, Peer};
use super::reference::Reference;
use super::transfer::BlobReader;
use super::trouble::Trouble;
use super::wire::Wire;
use super::{BlobSink, Descriptor, Registry};
use crate::error::{Problem, nearest};
use crate::oci::digest::Digest;

/// Blobs on their way at the same time: one rarely fills a link, and more make registries slow us down.
pub(super) const PARALLEL_BLOBS: usize = 3;
/// Tags shown when none is near to the one that is not there.
const TAGS_SHOWN: usize = 5;

/// What is being done, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Act {
    Pull,
    Push,
}

impl Act {
    fn words(self) -> (&'static str, &'static str) {
        match self {
            Act::Pull => ("pull", "from"),
            Act::Push => ("push", "to"),
        }
    }
}

/// Says what went wrong with one repository.
#[derive(Debug, Clone)]
pub(super) struct Teller {
    act: Act,
    peer: Arc<Peer>,
    files: Arc<[PathBuf]>,
}

impl Teller {
    /// What a person reads of a trouble with `what`.
    pub(super) fn problem(&self, what: &str, trouble: &Trouble) -> Problem {
        let (registry, (verb, towards)) = (&self.peer.registry, self.act.words());
        match trouble {
            Trouble::Status { code: 401 | 403, .. } => {
                let problem = Problem::failed(format!("registry `{registry}` did not allow to {verb} `{what}`: {trouble}"));
                self.about_login(problem)
            }
            Trouble::Status { code: 404, .. } if self.act == Act::Pull => {
                Problem::failed(format!("registry `{registry}` has no `{what}`"))
            }
            Trouble::Status { code: 404, .. } => {
                Problem::failed(format!("registry `{registry}` does not take `{what}`: {trouble}"))
                    .hint(format!("some registries want `{}` to be made there first", self.peer.repository))
            }
            Trouble::Status { code: 413, .. } => {
                Problem::failed(format!("registry `{registry}` does not take `{what}`: {trouble}"))
                    .hint("a proxy before the registry limits what one request may hold; raise its limit")
            }
            _ if trouble.is_wrong() => {
                Problem::failed(format!("registry `{registry}` sent something else than `{what}`: {trouble}"))
                    .hint("the registry's copy is damaged, or something between changes what it sends")
            }
            Trouble::Certificate(_) => Problem::failed(format!("registry `{registry}` cannot be trusted: {trouble}"))
                .hint("a registry with a certificate of your own authority needs that authority in the CA bundle"),
            _ if trouble.is_transient() => {
                let kept = match self.act {
                    Act::Pull => "layers that were pulled are kept",
                    Act::Push => "what arrived is not sent again",
                };
                Problem::transient(format!("cannot {verb} `{what}` {towards} registry `{registry}`: {trouble}"))
                    .hint(format!("check the network and the registry, then run the command again: {kept}"))
            }
            _ => Problem::failed(format!("cannot {verb} `{what}` {towards} registry `{registry}`: {trouble}")),
        }
    }

    fn about_login(&self, problem: Problem) -> Problem {
        let (registry, found) = (&self.peer.registry, &self.peer.found);
        let files: Vec<String> = self.files.iter().map(|file| format!("`{}`", file.display())).collect();
        let problem = problem.hint(match &found.origin {
            Some(origin) => format!("the credentials came from {origin}"),
            None if files.is_empty() => "no credentials were looked for".into(),
            None => format!("no credentials for it were found in {}", files.join(", ")),
        });
        let problem = found.notes.iter().fold(problem, Problem::hint);
        let why = match self.act {
            Act::Pull => "some registries answer the same for a repository that does not exist",
            Act::Push => "the account needs the right to write there",
        };
        problem.hint(format!("log in with `docker login {registry}` or `podman login {registry}`; {why}"))
    }
}

/// Work with one repository.
#[derive(Debug)]
pub(super) struct Session {
    pub teller: Teller,
    pub peer: Arc<Peer>,
    main: Mutex<Connection>,
}

impl Session {
    pub(super) fn open(registry: &Registry, peer: Peer, act: Act, what: &str) -> Result<Self> {
        let peer = Arc::new(peer);
        let teller = Teller { act, peer: peer.clone(), files: registry.credentials.files().into() };
        match Connection::negotiate(registry.settings.clone(), peer.clone())? {
            Ok(connection) => Ok(Self { teller, peer, main: Mutex::new(connection) }),
            Err(trouble) => Err(teller.problem(what, &trouble).into()),
        }
    }

    pub(super) fn call<T>(&self, attempt: impl AsyncFn(Wire<'_>) -> Result<T, Trouble>) -> Result<T, Trouble> {
        self.main.lock().unwrap_or_else(PoisonError::into_inner).call(attempt)
    }

    /// A connection for another thread.
    pub(super) fn another(&self) -> Result<Connection> {
        self.main
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .another()?
            .map_err(|trouble| self.teller.problem(&self.peer.repository, &trouble).into())
    }

    /// The manifest or index behind `reference`, byte for byte, and its digest.
    pub(super) fn document(&self, reference: &Reference) -> Result<(Vec<u8>, Digest)> {
        let name = reference.within();
        match self.call(async |wire| wire.document(&name).await) {
            Ok(document) => Ok(document),
            Err(trouble) if trouble.status() == Some(404) => Err(self.not_found(reference).into()),
            Err(trouble) => Err(self.teller.problem(&reference.to_string(), &trouble).into()),
        }
    }

    pub(super) fn odd(&self, reference: &Reference, why: &str) -> Problem {
        self.teller.problem(&reference.to_string(), &Trouble::Other(why.into()))
    }

    /// The error for a name that is not there, with what there is instead.
    fn not_found(&self, reference: &Reference) -> Problem {
        let problem = Problem::failed(format!("registry `{}` has no `{reference}`", self.peer.registry));
        if reference.digest().is_some() {
            return problem.hint("it was pinned and is gone there; `pipeline update` pins what the name stands for now");
        }
        let wanted = reference.tag().unwrap_or_default();
        let listing = self.main.lock().unwrap_or_else(PoisonError::into_inner).once(async |wire| wire.some_tags().await);
        let Ok(tags) = listing else {
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

    /// A small blob, with its digest checked.
    pub(super) fn small(&self, blob: &Descriptor) -> Result<Vec<u8>> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut reader = BlobReader::new(self.another()?, blob, (0, Some(Default::default())), &stop);
        let mut bytes = Vec::new();
        match std::io::Read::read_to_end(&mut reader, &mut bytes) {
            Ok(_) => Ok(bytes),
            Err(error) => {
                let trouble = reader.finish().0.unwrap_or_else(|| error.into());
                Err(self.teller.problem(&blob.digest.to_string(), &trouble).into())
            }
        }
    }

    /// Fetches what the sink does not have, a few at a time; the first failure stops the others.
    /// Answers the bytes of those blobs.
    pub(super) fn blobs(&self, blobs: &[Descriptor], sink: &dyn BlobSink, arrived: &(dyn Fn(u64) + Sync)) -> Result<u64> {
        let mut missing: Vec<&Descriptor> = Vec::new();
        for blob in blobs {
            if !missing.iter().any(|known| known.digest == blob.digest) && !sink.has(&blob.digest, blob.size) {
                missing.push(blob);
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        in_parallel(&missing, &|| self.another(), &stop, &|connection, blob| {
            let connection = self.blob(connection, blob, sink, &stop)?;
            arrived(blob.size);
            Ok(connection)
        })?;
        Ok(missing.iter().map(|blob| blob.size).sum())
    }

    fn blob(&self, connection: Connection, blob: &Descriptor, sink: &dyn BlobSink, stop: &Arc<AtomicBool>) -> Result<Connection> {
        let mut connection = connection;
        // What an earlier transfer left may be damaged: then once more, from nothing.
        for first in [true, false] {
            let begun = sink.begun(&blob.digest, blob.size)?;
            let (have, hasher) = begun.as_ref().map_or_else(Default::default, |begun| begun.have());
            let mut reader = BlobReader::new(connection, blob, (have, Some(hasher)), stop);
            let written = match begun {
                Some(begun) => begun.go_on(&mut reader),
                None => sink.write(&blob.digest, blob.size, &mut reader),
            };
            let (trouble, back) = reader.finish();
            connection = back;
            match (trouble, written) {
                (Some(trouble), _) if trouble.is_wrong() && first && have > 0 => {}
                (Some(trouble), _) => return Err(self.teller.problem(&blob.digest.to_string(), &trouble).into()),
                (None, Err(error)) => return Err(error.context(format!("cannot keep blob `{}`", blob.digest))),
                (None, Ok(())) => break,
            }
        }
        Ok(connection)
    }
}

/// Works on `items` in [`PARALLEL_BLOBS`] threads, each with a connection of its own. The first
/// failure sets `stop`, and is the answer.
pub(super) fn in_parallel<T: Sync>(
    items: &[T],
    open: &(dyn Fn() -> Result<Connection> + Sync),
    stop: &AtomicBool,
    work: &(dyn Fn(Connection, &T) -> Result<Connection> + Sync),
) -> Result<()> {
    let queue = Mutex::new(items.iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || -> Result<()> {
        let mut connection: Option<Connection> = None;
        while let (false, Some(item)) = (stop.load(Ordering::Relaxed), next()) {
            let open = match connection.take() {
                Some(connection) => connection,
                None => open()?,
            };
            connection = Some(work(open, item)?);
        }
        Ok(())
    };
    let first = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..items.len().min(PARALLEL_BLOBS) {
            scope.spawn(|| {
                if let Err(error) = run()
                    && !stop.swap(true, Ordering::Relaxed)
                {
                    first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                }
            });
        }
    });
    first.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
