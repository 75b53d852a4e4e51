//! A blob as it comes from the registry: a plain [`Read`] that goes on where a broken transfer
//! stopped, and gives the last bytes only after the digest of all of them was right.

use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::StreamExt as _;
use oci_client::client::{BlobResponse, SizedStream};

use super::Descriptor;
use super::connection::Connection;
use super::reference::Reference;
use super::trouble::{RETRY_PAUSES, Trouble};
use crate::oci::digest::Hasher;

/// A try that brought this much was no failure of the registry as a whole: the count starts anew.
const PROGRESS_BYTES: u64 = 4 * 1024 * 1024;

/// Gets a new right to pull when the old one has run out in the middle of a long transfer.
pub(super) type Renew<'a> = &'a (dyn Fn() -> anyhow::Result<Result<Connection, Trouble>> + Sync);

pub(super) struct BlobReader<'a> {
    connection: Connection,
    renew: Renew<'a>,
    reference: &'a Reference,
    blob: &'a Descriptor,
    /// Set when another transfer of the same pull has failed.
    stop: &'a AtomicBool,
    stream: Option<SizedStream>,
    /// Bytes of a full answer that were had already.
    skip: u64,
    chunk: Vec<u8>,
    position: usize,
    received: u64,
    hasher: Option<Hasher>,
    /// Tries in a row that failed, and where the first of them began.
    failures: usize,
    failed_at: u64,
    renewed: bool,
    /// Why reading ended, for the caller: an [`io::Error`] on its way through a sink loses it.
    trouble: Option<Trouble>,
}

impl<'a> BlobReader<'a> {
    pub(super) fn new(
        connection: Connection,
        renew: Renew<'a>,
        reference: &'a Reference,
        blob: &'a Descriptor,
        stop: &'a AtomicBool,
    ) -> Self {
        Self {
            connection,
            renew,
            reference,
            blob,
            stop,
            stream: None,
            skip: 0,
            chunk: Vec::new(),
            position: 0,
            received: 0,
            hasher: Some(Hasher::new()),
            failures: 0,
            failed_at: 0,
            renewed: false,
            trouble: None,
        }
    }

    /// Why reading failed, if it did; and the connection, for the next blob.
    pub(super) fn finish(self) -> (Option<Trouble>, Connection) {
        (self.trouble, self.connection)
    }

    /// The next bytes, from a new request when there is none under way.
    fn next(&mut self) -> Result<Vec<u8>, Trouble> {
        if self.stream.is_none() {
            let (stream, skip) = self.request()?;
            (self.stream, self.skip) = (Some(stream), skip);
        }
        let stream = self.stream.as_mut().expect("set above");
        loop {
            let mut bytes = match self.connection.block_on(stream.next()) {
                Some(bytes) => Vec::from(bytes.map_err(Trouble::from)?),
                None => return Err(Trouble::Broken(format!("it ended after {} of {} bytes", self.received, self.blob.size))),
            };
            let known = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= known as u64;
            bytes.drain(..known);
            if !bytes.is_empty() {
                return Ok(bytes);
            }
        }
    }

    /// Asks for the blob from where we are; a server without ranges sends all of it again.
    fn request(&self) -> Result<(SizedStream, u64), Trouble> {
        let (client, image) = (&self.connection.client, self.reference.inner());
        let digest = self.blob.digest.to_string();
        let layer = oci_client::client::LayerDescriptor { digest: &digest, urls: &None };
        self.connection.block_on(async {
            if self.received == 0 {
                return Ok((client.pull_blob_stream(image, &layer).await?, 0));
            }
            Ok(match client.pull_blob_stream_partial(image, &layer, self.received, None).await? {
                BlobResponse::Partial(stream) => (stream, 0),
                BlobResponse::Full(stream) => (stream, self.received),
            })
        })
    }

    /// Whether to go on after `trouble`; waits before it says so.
    fn goes_on(&mut self, trouble: &Trouble) -> bool {
        self.stream = None;
        if trouble.status() == Some(401) && !self.renewed {
            self.renewed = true;
            if let Ok(Ok(connection)) = (self.renew)() {
                self.connection = connection;
                return true;
            }
        }
        if self.received - self.failed_at >= PROGRESS_BYTES {
            (self.failures, self.renewed) = (0, false);
        }
        if self.failures == 0 {
            self.failed_at = self.received;
        }
        match RETRY_PAUSES.get(self.failures) {
            Some(pause) if trouble.may_pass() => {
                self.failures += 1;
                std::thread::sleep(*pause);
                true
            }
            _ => false,
        }
    }

    /// Counts and digests what came; with the last byte, the digest must be right.
    fn check(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        self.received += bytes.len() as u64;
        if self.received > self.blob.size {
            return Err(Trouble::Other(format!("it sent more than the {} bytes of the manifest", self.blob.size)));
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
        if self.received == self.blob.size
            && let Some(hasher) = self.hasher.take()
        {
            let actual = hasher.finish();
            if actual != self.blob.digest {
                return Err(Trouble::Digest { expected: self.blob.digest.to_string(), actual: actual.to_string() });
            }
        }
        Ok(())
    }

    fn fail(&mut self, trouble: Trouble) -> io::Error {
        let error = io::Error::other(trouble.to_string());
        self.trouble = Some(trouble);
        error
    }
}

impl Read for BlobReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.position == self.chunk.len() {
            if let Some(trouble) = &self.trouble {
                return Err(io::Error::other(trouble.to_string()));
            }
            if self.received == self.blob.size {
                return Ok(0);
            }
            if self.stop.load(Ordering::Relaxed) {
                return Err(io::Error::other("another layer could not be pulled"));
            }
            match self.next() {
                Ok(bytes) => {
                    self.check(&bytes).map_err(|trouble| self.fail(trouble))?;
                    (self.chunk, self.position) = (bytes, 0);
                }
                Err(trouble) if self.goes_on(&trouble) => {}
                Err(trouble) => return Err(self.fail(trouble)),
            }
        }
        let count = buffer.len().min(self.chunk.len() - self.position);
        buffer[..count].copy_from_slice(&self.chunk[self.position..][..count]);
        self.position += count;
        Ok(count)
    }
}
