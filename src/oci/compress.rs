//! Compresses and digests a layer while it is written.
//!
//! The tar stream goes in; three things come out: the compressed bytes in a file, the digest of
//! the plain stream (`diffID`) and the digest of the compressed bytes. The output depends on the
//! input and the [`Compression`] only, never on the number of threads or the sizes of the writes:
//! zstd always runs with workers (without any it gives other bytes), gzip is a row of
//! independent members of [`GZIP_BLOCK`] bytes each (RFC 1952, section 2.2).

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::digest::{Digest, Hasher};

/// zstd level of layers: beyond 3 the time grows much faster than the gain.
pub const ZSTD_LEVEL: i32 = 3;
/// gzip level of layers: the one every other tool uses.
pub const GZIP_LEVEL: u32 = 6;
/// Bytes of input in one gzip member. Large enough that the lost window costs under 0.1 %.
const GZIP_BLOCK: usize = 4 << 20;
/// Bytes that travel between threads at once.
const CHUNK: usize = 256 << 10;
/// Chunks in flight: bounds memory at 4 MiB.
const CHUNKS: usize = 16;

/// How a layer blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    Zstd,
    Gzip,
    None,
}

impl Compression {
    /// OCI image specification, "Layer media types".
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::None => "application/vnd.oci.image.layer.v1.tar",
        }
    }

    /// From a layer's media type, OCI's or Docker's.
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        match media_type {
            "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
                Some(Self::Zstd)
            }
            "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
                Some(Self::Gzip)
            }
            "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => Some(Self::None),
            _ => None,
        }
    }

    /// From the first bytes of a file.
    pub fn of_magic(bytes: &[u8]) -> Self {
        match bytes {
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0x1f, 0x8b, ..] => Self::Gzip,
            _ => Self::None,
        }
    }

    /// The plain bytes of `reader`.
    pub fn reader<'a>(self, reader: impl io::BufRead + 'a) -> io::Result<Box<dyn io::Read + 'a>> {
        Ok(match self {
            Self::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(reader)?),
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            Self::None => Box::new(reader),
        })
    }
}

/// What a finished layer blob is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Digest of the plain tar.
    pub diff_id: Digest,
    /// Bytes of the plain tar.
    pub plain_size: u64,
    /// Digest of the compressed blob.
    pub digest: Digest,
    /// Bytes of the compressed blob.
    pub size: u64,
}

/// Takes the plain tar by [`Write`]; [`LayerWriter::finish`] gives the digests.
#[derive(Debug)]
pub struct LayerWriter {
    buffer: Vec<u8>,
    plain_size: u64,
    to_hasher: Option<SyncSender<Arc<Vec<u8>>>>,
    to_compressor: Option<SyncSender<Arc<Vec<u8>>>>,
    hasher: Option<JoinHandle<Digest>>,
    compressor: Option<JoinHandle<io::Result<(Digest, u64)>>>,
}

impl LayerWriter {
    /// Compresses into `out` with `threads` workers (at least one).
    pub fn new(out: impl Write + Send + 'static, compression: Compression, threads: usize) -> Self {
        let (to_hasher, hasher_input) = sync_channel::<Arc<Vec<u8>>>(CHUNKS);
        let (to_compressor, compressor_input) = sync_channel::<Arc<Vec<u8>>>(CHUNKS);
        let hasher = std::thread::spawn(move || {
            let mut hasher = Hasher::new();
            for chunk in hasher_input {
                hasher.update(&chunk);
            }
            hasher.finish()
        });
        let compressor = std::thread::spawn(move || {
            let out = Digesting { inner: out, hasher: Hasher::new(), size: 0 };
            let out = match compression {
                Compression::Zstd => compress_zstd(compressor_input, out, threads)?,
                Compression::Gzip => compress_gzip(compressor_input, out, threads)?,
                Compression::None => copy(compressor_input, out)?,
            };
            Ok((out.hasher.finish(), out.size))
        });
        Self {
            buffer: Vec::with_capacity(CHUNK),
            plain_size: 0,
            to_hasher: Some(to_hasher),
            to_compressor: Some(to_compressor),
            hasher: Some(hasher),
            compressor: Some(compressor),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let chunk = Arc::new(std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK)));
        self.plain_size += chunk.len() as u64;
        let (Some(hasher), Some(compressor)) = (&self.to_hasher, &self.to_compressor) else {
            return Err(io::Error::other("the layer is finished already"));
        };
        if compressor.send(chunk.clone()).is_err() || hasher.send(chunk).is_err() {
            // The thread has ended early: its own error is the one to tell.
            let error = self.compressor.take().and_then(|thread| thread.join().ok()).and_then(Result::err);
            return Err(error.unwrap_or_else(|| io::Error::other("the compressor has ended early")));
        }
        Ok(())
    }

    /// Waits until everything is compressed and written to `out` (not synced).
    pub fn finish(mut self) -> Result<Written> {
        if !self.buffer.is_empty() {
            self.send()?;
        }
        self.to_hasher = None;
        self.to_compressor = None;
        let (Some(hasher), Some(compressor)) = (self.hasher.take(), self.compressor.take()) else {
            anyhow::bail!("the compressor has ended early");
        };
        let diff_id = hasher.join().map_err(|_| anyhow::anyhow!("the hashing thread panicked"))?;
        let (digest, size) = compressor
            .join()
            .map_err(|_| anyhow::anyhow!("the compressing thread panicked"))?
            .context("cannot write the layer")?;
        Ok(Written { diff_id, plain_size: self.plain_size, digest, size })
    }
}

impl Write for LayerWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == CHUNK {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Counts and digests what passes on its way to `inner`.
struct Digesting<W> {
    inner: W,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Write for Digesting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn copy<W: Write>(input: Receiver<Arc<Vec<u8>>>, mut out: Digesting<W>) -> io::Result<Digesting<W>> {
    for chunk in input {
        out.write_all(&chunk)?;
    }
    out.flush()?;
    Ok(out)
}

fn compress_zstd<W: Write>(input: Receiver<Arc<Vec<u8>>>, out: Digesting<W>, threads: usize) -> io::Result<Digesting<W>> {
    let mut encoder = zstd::stream::write::Encoder::new(out, ZSTD_LEVEL)?;
    encoder.multithread(u32::try_from(threads.max(1)).unwrap_or(1))?;
    for chunk in input {
        encoder.write_all(&chunk)?;
    }
    encoder.finish()
}

/// Compresses `threads` blocks at a time and writes them in their order.
fn compress_gzip<W: Write>(input: Receiver<Arc<Vec<u8>>>, mut out: Digesting<W>, threads: usize) -> io::Result<Digesting<W>> {
    let mut blocks: Vec<Vec<u8>> = Vec::new();
    let mut block = Vec::with_capacity(GZIP_BLOCK);
    let mut any = false;
    for chunk in input {
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let taken = rest.len().min(GZIP_BLOCK - block.len());
            block.extend_from_slice(&rest[..taken]);
            rest = &rest[taken..];
            if block.len() == GZIP_BLOCK {
                blocks.push(std::mem::replace(&mut block, Vec::with_capacity(GZIP_BLOCK)));
                if blocks.len() == threads.max(1) {
                    write_gzip(&mut blocks, &mut out)?;
                    any = true;
                }
            }
        }
    }
    if !block.is_empty() || (!any && blocks.is_empty()) {
        blocks.push(block);
    }
    write_gzip(&mut blocks, &mut out)?;
    out.flush()?;
    Ok(out)
}

fn write_gzip<W: Write>(blocks: &mut Vec<Vec<u8>>, out: &mut Digesting<W>) -> io::Result<()> {
    let members: Vec<io::Result<Vec<u8>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = blocks
            .iter()
            .map(|block| {
                scope.spawn(move || {
                    // mtime 0 and operating system "unknown": nothing of this machine in the bytes.
                    let mut member = flate2::GzBuilder::new()
                        .mtime(0)
                        .operating_system(255)
                        .write(Vec::with_capacity(block.len() / 2), flate2::Compression::new(GZIP_LEVEL));
                    member.write_all(block)?;
                    member.finish()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(io::Error::other("gzip thread panicked"))))
            .collect()
    });
    for member in members {
        out.write_all(&member?)?;
    }
    blocks.clear();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1u64;
        (0..length)
            .map(|i| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                if i % 3 == 0 { (state >> 33) as u8 } else { (i / 1000) as u8 }
            })
            .collect()
    }

    fn compress(data: &[u8], compression: Compression, threads: usize, step: usize) -> (Vec<u8>, Written) {
        let out = Shared::default();
        let mut writer = LayerWriter::new(out.clone(), compression, threads);
        for piece in data.chunks(step) {
            writer.write_all(piece).unwrap();
        }
        let written = writer.finish().unwrap();
        let bytes = out.0.lock().unwrap().clone();
        (bytes, written)
    }

    #[test]
    fn bytes_do_not_depend_on_threads_or_write_sizes() {
        let data = noise(21 << 20);
        for compression in [Compression::Zstd, Compression::Gzip, Compression::None] {
            let (bytes, written) = compress(&data, compression, 1, 1 << 20);
            assert_eq!(written.digest, Digest::of(&bytes));
            assert_eq!(written.diff_id, Digest::of(&data));
            assert_eq!((written.size, written.plain_size), (bytes.len() as u64, data.len() as u64));
            for (threads, step) in [(2, 1000), (4, 77_777), (7, 1 << 23)] {
                assert!(compress(&data, compression, threads, step).0 == bytes, "{compression:?} with {threads} threads differs");
            }
            let mut back = Vec::new();
            compression.reader(&bytes[..]).unwrap().read_to_end(&mut back).unwrap();
            assert!(back == data, "{compression:?} does not give the input back");
        }
    }

    #[test]
    fn an_empty_layer_is_a_valid_stream() {
        for compression in [Compression::Zstd, Compression::Gzip, Compression::None] {
            let (bytes, _) = compress(&[], compression, 2, 1);
            let mut back = Vec::new();
            compression.reader(&bytes[..]).unwrap().read_to_end(&mut back).unwrap();
            assert_eq!(back, b"");
        }
    }

    #[test]
    fn a_full_disk_is_told() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::Error::from_raw_os_error(28))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut writer = LayerWriter::new(Full, Compression::None, 1);
        let result = writer.write_all(&noise(32 << 20)).map_err(anyhow::Error::from).and_then(|()| writer.finish().map(drop));
        assert!(crate::error::is_disk_full(&result.unwrap_err()));
    }
}
