//! Where the bytes of a push come from: a file, or another registry while they arrive from there.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use tokio::sync::mpsc;

use super::connection::Connection;
use super::session::Session;
use super::transfer::BlobReader;
use super::tree::Tree;
use super::{BlobSource, Descriptor};
use crate::oci::digest::{Digest, Hasher};

/// Bytes of a piece on its way from one registry to the other.
const PIECE: usize = 128 << 10;
/// Pieces that wait when the second registry is slower: enough that neither waits for the other all the time.
const PIECES: usize = 16;

/// The bytes of a blob.
pub enum Content {
    /// Reading it must not wait for the network.
    File(Box<dyn Read + Send>),
    /// Pieces as they come; the last is followed by the end of the channel.
    Channel(mpsc::Receiver<io::Result<Vec<u8>>>),
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Content::File(_) => "File",
            Content::Channel(_) => "Channel",
        })
    }
}

/// Another registry.
#[derive(Debug)]
pub(super) struct Remote {
    session: Session,
    documents: BTreeMap<Digest, Vec<u8>>,
    /// Connections that are not in use.
    idle: Arc<Mutex<Vec<Connection>>>,
}

impl Remote {
    pub(super) fn new(session: Session, tree: &Tree) -> Self {
        let documents = tree.items.iter().map(|item| (item.digest, item.bytes.clone())).collect();
        Self { session, documents, idle: Arc::default() }
    }
}

impl BlobSource for Remote {
    fn document(&self, digest: &Digest) -> Result<Vec<u8>> {
        self.documents.get(digest).cloned().with_context(|| format!("`{digest}` was not read"))
    }

    /// A thread of its own reads; it ends when the receiver is dropped.
    fn open(&self, blob: &Descriptor, offset: u64) -> Result<Content> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.session.another()?,
        };
        let (sender, receiver) = mpsc::channel(PIECES);
        let (blob, back, teller) = (blob.clone(), self.idle.clone(), self.session.teller.clone());
        std::thread::spawn(move || {
            let stop = Arc::new(AtomicBool::new(false));
            // What is read from the middle is digested at the other end.
            let hasher = (offset == 0).then(Hasher::new);
            let mut reader = BlobReader::new(connection, &blob, (offset, hasher), &stop);
            loop {
                let mut piece = vec![0; PIECE];
                match reader.read(&mut piece) {
                    Ok(0) => break,
                    Ok(read) => {
                        piece.truncate(read);
                        if sender.blocking_send(Ok(piece)).is_err() {
                            break;
                        }
                    }
                    Err(error) => {
                        let trouble = reader.finish().0.unwrap_or_else(|| error.into());
                        let problem = teller.problem(&blob.digest.to_string(), &trouble);
                        let _ = sender.blocking_send(Err(io::Error::other(problem)));
                        return;
                    }
                }
            }
            back.lock().unwrap_or_else(PoisonError::into_inner).push(reader.finish().1);
        });
        Ok(Content::Channel(receiver))
    }
}
