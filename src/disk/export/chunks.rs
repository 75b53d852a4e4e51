//! Which parts of an image are not zeros, and work on them in parallel with answers in order.
//!
//! What is a hole in the file says little: file systems keep holes in different sizes. So holes
//! are only skipped quickly, and the bytes decide; the answer is the same for every copy of a file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::SeekFrom;

/// Bytes that are looked at together. The grain of VMDK and the cluster of qcow2 are as large.
pub(super) const CHUNK: u64 = 64 << 10;
/// Items a thread works on before their answers are taken.
const BATCH: usize = 32;

/// Ranges of bytes that are not zeros: multiples of [`CHUNK`], the end of the file aside, sorted,
/// none beside another.
pub(super) fn runs(file: &File, threads: usize) -> io::Result<Vec<Range<u64>>> {
    let length = file.metadata()?.len();
    let mut candidates = Vec::new();
    for data in data(file, length)? {
        candidates.extend((data.start / CHUNK..data.end.div_ceil(CHUNK)).map(|chunk| chunk * CHUNK));
    }
    // Two pieces of data may lie in one chunk.
    candidates.dedup();
    let groups: Vec<&[u64]> = candidates.chunks(16).collect();
    let mut runs: Vec<Range<u64>> = Vec::new();
    let look = |group: &&[u64]| -> io::Result<Vec<Range<u64>>> {
        let mut buffer = [0; CHUNK as usize];
        let mut found = Vec::new();
        for start in *group {
            let end = (start + CHUNK).min(length);
            let bytes = &mut buffer[..(end - start) as usize];
            file.read_exact_at(bytes, *start)?;
            if !is_zeros(bytes) {
                found.push(*start..end);
            }
        }
        Ok(found)
    };
    in_order(&groups, threads, look, |found| {
        for run in found {
            match runs.last_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => runs.push(run),
            }
        }
        Ok(())
    })?;
    Ok(runs)
}

fn is_zeros(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Ranges the file system says are no holes; everything where it cannot say.
fn data(file: &File, length: u64) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => {
                found.push(at..length);
                break;
            }
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, SeekFrom::Hole(start))?.min(length);
        found.push(start..end);
        at = end;
    }
    Ok(found)
}

/// Does `work` for every item with `threads` threads and gives the answers to `take` in order.
/// At most a batch of answers for each thread is in memory.
pub(super) fn in_order<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> io::Result<R> + Sync,
    mut take: impl FnMut(R) -> io::Result<()>,
) -> io::Result<()> {
    for batch in items.chunks(threads.max(1) * BATCH) {
        let next = AtomicUsize::new(0);
        let run = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(item) = batch.get(index) else { return done };
                done.push((index, work(item)));
            }
        };
        let mut answers = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
            let mut answers = run();
            for other in others {
                answers.extend(other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            answers
        });
        answers.sort_unstable_by_key(|(index, _)| *index);
        answers.into_iter().try_for_each(|(_, answer)| take(answer?))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_bytes_and_not_the_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(20 * CHUNK + 100).unwrap();
        for at in [0, CHUNK + 7, 5 * CHUNK - 1, 20 * CHUNK + 99] {
            file.write_all_at(b"x", at).unwrap();
        }
        let expected = [0..2 * CHUNK, 4 * CHUNK..5 * CHUNK, 20 * CHUNK..20 * CHUNK + 100];
        assert_eq!(runs(&file, 2).unwrap(), expected);
        // Zeros that are written are as good as a hole.
        file.write_all_at(&[0; 3 * CHUNK as usize], 8 * CHUNK + 5).unwrap();
        assert_eq!(runs(&file, 1).unwrap(), expected);
    }

    #[test]
    fn answers_come_in_order() {
        let items: Vec<u32> = (0..1000).collect();
        let mut found = Vec::new();
        in_order(
            &items,
            3,
            |item| Ok(item * 2),
            |answer| {
                found.push(answer);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(found, (0..1000).map(|item| item * 2).collect::<Vec<_>>());
        let failed =
            in_order(&items, 3, |item| if *item == 500 { Err(io::ErrorKind::Other.into()) } else { Ok(()) }, |()| Ok(()));
        assert!(failed.is_err());
    }
}
