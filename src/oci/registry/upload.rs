//! A blob on its way up: asked for first, mounted where another repository has it, else sent, and
//! after a broken connection sent on from where the registry says it is.
//!
//! ```text
//! HEAD blobs/DIGEST                      200: there
//! POST blobs/uploads/?mount=…&from=…     201: mounted   202: an upload
//! PATCH (all but the last part), PUT ?digest=… (the last)
//!   broken: GET the upload               204 and a range: on from there, else HEAD and POST anew
//! ```
//! What is sent is digested on its way. A blob that is wrong in the source is not finished in the registry.

use std::cell::Cell;
use std::io::Read;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::connection::Connection;
use super::trouble::Trouble;
use super::wire::{Part, Started, Upload, Wire, good};
use super::{BlobSource, Content, Descriptor};
use crate::error::Problem;
use crate::oci::digest::Hasher;

/// Blobs up to this size go in one request after the one that begins the upload; larger ones in two,
/// since registries keep what came of a `PATCH` that broke, and seldom what came of a `PUT`.
const ONE_REQUEST_BYTES: u64 = 4 << 20;
/// Parts for a registry, or a proxy before it, that answers 413 to larger ones (nginx takes 1 MiB unless it is told otherwise).
const SMALL_PART: u64 = 1 << 20;
/// Uploads of one blob that are begun when the registry forgets them one after the other.
const BEGINNINGS: usize = 3;
/// Bytes handed to the socket at a time.
const BUFFER: usize = 128 << 10;
/// Silence while bytes are left to send.
const STALLED: Duration = Duration::from_secs(60);
/// From the last byte to the answer: registries on object storage copy the blob in between.
const COMMITTING: Duration = Duration::from_secs(300);
/// How often it is looked whether bytes still go.
const WATCH: Duration = Duration::from_secs(1);

/// How a blob got there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrived {
    Already,
    Mounted,
    Sent,
}

/// Why a blob did not: the registry's trouble, or the source's.
#[derive(Debug)]
pub(super) enum Failure {
    Trouble(Trouble),
    Source(anyhow::Error),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        Failure::Trouble(trouble)
    }
}

/// What was digested of a blob so far, shared with the body that is being sent.
#[derive(Debug, Default)]
struct Digested {
    hasher: Hasher,
    bytes: u64,
    /// Set when the source fails, since the HTTP library tells only that the body did.
    error: Option<anyhow::Error>,
}

pub(super) struct Sending<'a> {
    pub connection: &'a mut Connection,
    pub source: &'a dyn BlobSource,
    pub blob: &'a Descriptor,
    /// Most bytes of one request; `None` for no limit.
    pub part_limit: Option<u64>,
    /// Set when another blob could not be sent.
    pub stop: &'a Arc<AtomicBool>,
    /// Told how many more bytes are on their way.
    pub arrived: &'a (dyn Fn(u64) + Sync),
}

impl Sending<'_> {
    pub(super) fn run(mut self) -> Result<Arrived, Failure> {
        let digest = self.blob.digest;
        let digested = Arc::new(Mutex::new(Digested::default()));
        if self.connection.call(async |wire| wire.has_blob(&digest).await)? {
            return Ok(Arrived::Already);
        }
        let (mut failures, mut begun, mut renewed, mut best) = (0, 1, false, 0);
        let mut upload: Option<Upload> = None;
        loop {
            let trouble = match self.attempt(&mut upload, &digested) {
                Ok(arrived) => return Ok(arrived),
                Err(Failure::Trouble(trouble)) => trouble,
                Err(source) => return Err(source),
            };
            if let Some(error) = lock(&digested).error.take() {
                return Err(Failure::Source(error));
            }
            let forgotten = upload.is_some() && matches!(trouble.status(), Some(404 | 410 | 416)) && begun < BEGINNINGS;
            if forgotten {
                // It ran out, or the registry sees another end of it than it said.
                (upload, begun) = (None, begun + 1);
                continue;
            }
            if !renewed && self.connection.renew(&trouble) {
                renewed = true;
            } else if trouble.status() == Some(413) && self.part_limit.is_none_or(|limit| limit > SMALL_PART) {
                self.part_limit = Some(SMALL_PART);
            } else {
                let pause = trouble.pause(failures).ok_or(trouble)?;
                std::thread::sleep(pause);
                failures += 1;
            }
            upload = match upload {
                Some(before) => self.whereabouts(&before)?,
                None => None,
            };
            match &upload {
                // A try that got further was no failure of the registry as a whole: the count starts anew.
                Some(upload) if upload.offset > best => (failures, renewed, best) = (0, false, upload.offset),
                Some(_) => {}
                // The last answer may be what was lost.
                None if self.connection.call(async |wire| wire.has_blob(&digest).await)? => return Ok(Arrived::Sent),
                None => {}
            }
        }
    }

    /// How far the upload has come; nothing when the registry has forgotten it.
    fn whereabouts(&mut self, before: &Upload) -> Result<Option<Upload>, Trouble> {
        let size = self.blob.size;
        match self.connection.call(async |wire| wire.progress(before).await) {
            Ok(upload) => Ok(Some(upload).filter(|upload| upload.offset <= size)),
            // 400 and 416: Docker's registry cancels an upload whose end it did not see.
            Err(Trouble::Status { code: 400 | 404 | 405 | 410 | 416, .. } | Trouble::Other(_)) => Ok(None),
            Err(trouble) => Err(trouble),
        }
    }

    /// Begins the upload when there is none, and sends what is left.
    fn attempt(&mut self, upload: &mut Option<Upload>, digested: &Arc<Mutex<Digested>>) -> Result<Arrived, Failure> {
        let digest = self.blob.digest;
        if upload.is_none() {
            let from = self.connection.peer.rights.mount_from.clone();
            let mount = from.as_deref().map(|from| (&digest, from));
            let started = match self.connection.once(async |wire| wire.start(mount).await) {
                // A repository that may not be read, or is not there, is no reason not to send the blob.
                Err(trouble) if mount.is_some() && trouble.status().is_some_and(|code| code < 500 && code != 429) => {
                    self.connection.once(async |wire| wire.start(None).await)?
                }
                other => other?,
            };
            match started {
                Started::Mounted => return Ok(Arrived::Mounted),
                Started::Upload(started) => *upload = Some(started),
            }
        }
        while let Some(at) = upload.clone() {
            let Some(left) = self.blob.size.checked_sub(at.offset) else {
                return Err(Trouble::Other(format!("it says that it has {} bytes of {}", at.offset, self.blob.size)).into());
            };
            let limit = self.part_limit.unwrap_or(u64::MAX).max(1);
            // The last request carries bytes when there are few; else it only ends the upload.
            let last = left == 0 || left <= limit.min(ONE_REQUEST_BYTES);
            let part = Part { offset: at.offset, length: left.min(limit), last: last.then_some(digest) };
            let body = self.body(part, digested).map_err(Failure::Source)?;
            match self.send(&at, part, body, digested)? {
                None => return Ok(Arrived::Sent),
                Some(next) if next.offset > at.offset => *upload = Some(next),
                Some(_) => return Err(Trouble::Other("it took nothing of the blob".into()).into()),
            }
        }
        Err(Trouble::Other("the upload was lost".into()).into())
    }

    /// The bytes of a part, and a count of those that were taken.
    fn body(&self, part: Part, digested: &Arc<Mutex<Digested>>) -> Result<Option<(reqwest::Body, Arc<AtomicU64>)>> {
        if part.length == 0 {
            self.check(digested)?;
            return Ok(None);
        }
        let content = self.source.open(self.blob, part.offset)?;
        let taken = Arc::new(AtomicU64::new(0));
        if part.last.is_some() {
            // Few bytes: all of them are looked at before the first is sent.
            let bytes = read_all(content, part.length)
                .map_err(of_source)
                .with_context(|| format!("cannot read blob `{}`", self.blob.digest))?;
            lock(digested).update(part.offset, &bytes);
            self.check(digested)?;
            taken.store(part.length, Ordering::Relaxed);
            return Ok(Some((bytes.into(), taken)));
        }
        let (digested, stop) = (digested.clone(), self.stop.clone());
        let state = Flow { content, offset: part.offset, left: part.length, taken: taken.clone(), digested, stop };
        let stream = futures_util::stream::unfold(Some(state), |state| async {
            let mut state = state?;
            match state.next().await {
                Ok(None) => None,
                Ok(Some(bytes)) => Some((Ok(bytes), Some(state))),
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(Some((reqwest::Body::wrap_stream(stream), taken)))
    }

    /// Whether all that was read of the blob has its digest.
    fn check(&self, digested: &Mutex<Digested>) -> Result<()> {
        let digested = lock(digested);
        let actual = digested.hasher.clone().finish();
        if digested.bytes == self.blob.size && actual != self.blob.digest {
            let problem =
                Problem::failed(format!("blob `{}` is corrupt: its bytes have the digest `{actual}`", self.blob.digest));
            return Err(problem.hint("nothing was tagged; build or pull it again, and push then").into());
        }
        Ok(())
    }

    fn send(
        &self,
        at: &Upload,
        part: Part,
        body: Option<(reqwest::Body, Arc<AtomicU64>)>,
        digested: &Mutex<Digested>,
    ) -> Result<Option<Upload>, Failure> {
        let (body, taken) = body.unzip();
        let told = Cell::new(0);
        let tell = |now: u64| (self.arrived)(now - told.replace(now));
        let sent = self.connection.once(async |wire: Wire<'_>| {
            let mut request = wire.part(at, part);
            if let Some(body) = body {
                request = request.body(body);
            }
            let response = tokio::select! {
                response = request.send() => response?,
                () = stalled(taken.as_deref(), part.length, &tell) => return Err(Trouble::Timeout),
            };
            if part.last.is_some() {
                return good(response).await.map(|_| None);
            }
            wire.accepted(response, at, part.length).await.map(Some)
        });
        match sent {
            Ok(next) => {
                tell(part.length);
                Ok(next)
            }
            Err(trouble) => match lock(digested).error.take() {
                Some(error) => Err(Failure::Source(error)),
                None => Err(trouble.into()),
            },
        }
    }
}

/// Ends when no bytes were taken for [`STALLED`], or no answer came for [`COMMITTING`] after the last.
async fn stalled(taken: Option<&AtomicU64>, length: u64, tell: &dyn Fn(u64)) {
    let count = || taken.map_or(length, |taken| taken.load(Ordering::Relaxed));
    let (mut seen, mut silent) = (count(), Duration::ZERO);
    loop {
        tokio::time::sleep(WATCH).await;
        let now = count();
        (silent, seen) = (if now == seen { silent + WATCH } else { Duration::ZERO }, now);
        tell(now);
        if silent >= if now >= length { COMMITTING } else { STALLED } {
            return;
        }
    }
}

impl Digested {
    /// Takes bytes from `offset` on; those that were digested before are sent again and not digested again.
    fn update(&mut self, offset: u64, bytes: &[u8]) {
        let known = usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        if offset <= self.bytes {
            self.hasher.update(&bytes[known..]);
            self.bytes += (bytes.len() - known) as u64;
        }
    }
}

/// A part on its way into a request.
struct Flow {
    content: Content,
    offset: u64,
    left: u64,
    taken: Arc<AtomicU64>,
    digested: Arc<Mutex<Digested>>,
    stop: Arc<AtomicBool>,
}

impl Flow {
    async fn next(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        if self.left == 0 {
            return Ok(None);
        }
        let read = match &mut self.content {
            _ if self.stop.load(Ordering::Relaxed) => Err(std::io::Error::other("another blob could not be sent")),
            Content::File(reader) => {
                let mut bytes = vec![0; BUFFER.min(usize::try_from(self.left).unwrap_or(BUFFER))];
                reader.read(&mut bytes).map(|read| {
                    bytes.truncate(read);
                    bytes
                })
            }
            Content::Channel(receiver) => receiver.recv().await.unwrap_or_else(|| Ok(Vec::new())),
        };
        let ended = || Err(std::io::Error::other(format!("the blob ends {} bytes too early", self.left)));
        match read.and_then(|bytes| if bytes.is_empty() { ended() } else { Ok(bytes) }) {
            Ok(mut bytes) => {
                bytes.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
                lock(&self.digested).update(self.offset, &bytes);
                self.offset += bytes.len() as u64;
                self.left -= bytes.len() as u64;
                self.taken.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                Ok(Some(bytes))
            }
            Err(error) => {
                let told = std::io::Error::other(error.to_string());
                lock(&self.digested).error = Some(of_source(error));
                Err(told)
            }
        }
    }
}

/// The source's own problem, which it can hand over inside an I/O error only.
fn of_source(error: std::io::Error) -> anyhow::Error {
    error.downcast::<Problem>().map_or_else(anyhow::Error::from, anyhow::Error::from)
}

fn read_all(content: Content, length: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match content {
        Content::File(reader) => {
            reader.take(length).read_to_end(&mut bytes)?;
        }
        Content::Channel(mut receiver) => {
            while let Some(more) = receiver.blocking_recv() {
                bytes.extend(more?);
            }
            bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        }
    }
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(std::io::Error::other("the blob is too short")) }
}

fn lock(digested: &Mutex<Digested>) -> std::sync::MutexGuard<'_, Digested> {
    digested.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::digest::Digest;

    #[test]
    fn bytes_that_are_sent_again_are_digested_once() {
        let mut digested = Digested::default();
        digested.update(0, b"abc");
        digested.update(1, b"bcd");
        digested.update(0, b"ab");
        digested.update(4, b"ef");
        assert_eq!((digested.bytes, digested.hasher.finish()), (6, Digest::of("abcdef")));
    }
}
