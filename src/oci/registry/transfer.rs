//! A blob as it comes from the registry: a plain [`Read`] that goes on where a broken transfer
//! stopped, and gives the last bytes only after the digest of all of them was right.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Descriptor;
use super::connection::{Connection, in_time};
use super::trouble::Trouble;
use crate::oci::digest::Hasher;

/// A try that brought this much was no failure of the registry as a whole: the count starts anew.
const PROGRESS_BYTES: u64 = 4 * 1024 * 1024;

#[derive(Debug)]
pub(super) struct BlobReader {
    connection: Connection,
    blob: Descriptor,
    /// Set when another transfer of the same pull has failed.
    stop: Arc<AtomicBool>,
    answer: Option<reqwest::Response>,
    /// Bytes of a full answer that were had already.
    skip: u64,
    chunk: Vec<u8>,
    position: usize,
    received: u64,
    /// `None` when the digest is not checked, or was.
    hasher: Option<Hasher>,
    /// Tries in a row that failed, and where the first of them began.
    failures: usize,
    failed_at: u64,
    renewed: bool,
    /// Why reading ended, for the caller: an [`io::Error`] on its way through a sink loses it.
    trouble: Option<Trouble>,
}

impl BlobReader {
    /// Reads after the first `have` bytes, which `hasher` has digested; without one nobody checks the digest.
    pub(super) fn new(
        connection: Connection,
        blob: &Descriptor,
        (have, hasher): (u64, Option<Hasher>),
        stop: &Arc<AtomicBool>,
    ) -> Self {
        Self {
            connection,
            blob: blob.clone(),
            stop: stop.clone(),
            answer: None,
            skip: 0,
            chunk: Vec::new(),
            position: 0,
            received: have,
            hasher,
            failures: 0,
            failed_at: have,
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
        let mut answer = match self.answer.take() {
            Some(answer) => answer,
            None => {
                let (digest, offset) = (self.blob.digest, self.received);
                let (answer, skip) = self.connection.once(async |wire| wire.blob(&digest, offset).await)?;
                self.skip = skip;
                answer
            }
        };
        loop {
            let chunk = self.connection.once(async |_| in_time(answer.chunk()).await)?;
            let Some(bytes) = chunk else {
                return Err(Trouble::Broken(format!("it ended after {} of {} bytes", self.received, self.blob.size)));
            };
            let known = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
            self.skip -= known as u64;
            if known < bytes.len() {
                self.answer = Some(answer);
                return Ok(bytes[known..].to_vec());
            }
        }
    }

    /// Whether to go on after `trouble`; waits before it says so.
    fn goes_on(&mut self, trouble: &Trouble) -> bool {
        self.answer = None;
        if !self.renewed && self.connection.renew(trouble) {
            self.renewed = true;
            return true;
        }
        if self.received - self.failed_at >= PROGRESS_BYTES {
            (self.failures, self.renewed) = (0, false);
        }
        if self.failures == 0 {
            self.failed_at = self.received;
        }
        match trouble.pause(self.failures) {
            Some(pause) => {
                self.failures += 1;
                std::thread::sleep(pause);
                true
            }
            None => false,
        }
    }

    /// Counts and digests what came; with the last byte, the digest must be right.
    fn check(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        self.received += bytes.len() as u64;
        if self.received > self.blob.size {
            return Err(Trouble::TooLong(self.blob.size));
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
        // The sink keeps what came of a transfer that broke, and nothing of one that was wrong.
        let kind = if trouble.is_wrong() { io::ErrorKind::InvalidData } else { io::ErrorKind::Other };
        let error = io::Error::new(kind, trouble.to_string());
        self.trouble = Some(trouble);
        error
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.position == self.chunk.len() {
            if let Some(trouble) = &self.trouble {
                return Err(io::Error::other(trouble.to_string()));
            }
            if self.received == self.blob.size {
                // An empty blob has a digest too.
                return if self.hasher.is_some() {
                    self.check(&[]).map_err(|trouble| self.fail(trouble)).map(|()| 0)
                } else {
                    Ok(0)
                };
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
