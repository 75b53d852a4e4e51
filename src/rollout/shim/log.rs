//! The log of an instance: what its program printed, as it printed it, between two files.
//!
//! `log` grows to [`MAX`] bytes, then becomes `log.1` in place of the one before. A disk that is full must not stop the
//! program: what cannot be written is counted and the count is written when there is room again.

use std::collections::VecDeque;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

/// Bytes of one file.
pub const MAX: u64 = 10 << 20;
/// Read at once.
const CHUNK: usize = 64 << 10;
/// Between two looks for more.
const LOOK: Duration = Duration::from_millis(100);
/// Looks after which the reader's `sink` is asked whether it still listens.
const ASK: u32 = 5;

/// The writing end.
#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    max: u64,
    file: Option<fs_err::File>,
    written: u64,
    /// Bytes that could not be written, and why.
    lost: Option<(u64, String)>,
    /// Whether the last byte ended a line.
    at_line: bool,
}

impl Log {
    /// Appends to the log in `dir`.
    pub fn open(dir: &Path) -> Self {
        Self::with_max(dir, MAX)
    }

    fn with_max(dir: &Path, max: u64) -> Self {
        Self { dir: dir.into(), max, file: None, written: 0, lost: None, at_line: true }
    }

    /// Writes what the program printed. Never fails: see the module.
    pub fn write(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if let Some((count, why)) = self.lost.take() {
            let line = format!("\npipeline: {count} bytes of output are lost: {why}\n");
            if self.try_write(line.as_bytes()).is_err() {
                self.lost = Some((count, why));
            }
        }
        let result = if self.lost.is_none() { self.try_write(bytes) } else { Err((0, String::new())) };
        if let Err((done, why)) = result {
            // Opened anew for the next: what stands at its place may be another file by then.
            self.file = None;
            let missing = bytes.len() as u64 - done;
            let lost = self.lost.get_or_insert((0, why));
            lost.0 += missing;
        }
        self.at_line = bytes.ends_with(b"\n");
    }

    /// Writes a line of ours, told from the program's by its start.
    pub fn say(&mut self, text: &str) {
        let start = if self.at_line { "" } else { "\n" };
        self.write(format!("{start}pipeline: {text}\n").as_bytes());
    }

    /// How many bytes were written when it fails, and why. A file ends with a line, unless lines are as long as files.
    fn try_write(&mut self, bytes: &[u8]) -> Result<(), (u64, String)> {
        let rest_of_line = match bytes.iter().position(|byte| *byte == b'\n') {
            _ if self.at_line => 0,
            Some(end) => end + 1,
            None if self.written < self.max * 2 => bytes.len(),
            None => 0,
        };
        let head = if self.written >= self.max { rest_of_line } else { bytes.len() };
        self.append(&bytes[..head])?;
        if head == bytes.len() {
            return Ok(());
        }
        let done = head as u64;
        self.file = None;
        fs_err::rename(self.dir.join("log"), self.dir.join("log.1")).map_err(|error| (done, words(&error)))?;
        self.append(&bytes[head..]).map_err(|(more, why)| (done + more, why))
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), (u64, String)> {
        if self.file.is_none() {
            let file = fs_err::OpenOptions::new().create(true).append(true).open(self.dir.join("log"));
            let file = file.map_err(|error| (0, words(&error)))?;
            self.written = file.metadata().map_or(0, |meta| meta.len());
            self.file = Some(file);
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut done = 0;
        while done < bytes.len() {
            match file.write(&bytes[done..]) {
                Ok(0) => return Err((done as u64, "nothing can be written".into())),
                Ok(count) => {
                    done += count;
                    self.written += count as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err((done as u64, words(&error))),
            }
        }
        Ok(())
    }
}

/// The system's own words of an error that names its file.
fn words(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.rsplit(": ").next().unwrap_or(&text).to_string()
}

/// Gives the last `lines` lines in `dir` to `sink`, then with `follow` what comes, until `sink` answers false or
/// `alive` does and everything was read. `sink` gets an empty chunk at least every second.
pub fn read(dir: &Path, lines: usize, follow: bool, alive: &dyn Fn() -> bool, sink: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
    let mut file = open(dir)?;
    let mut last: VecDeque<Vec<u8>> = VecDeque::new();
    let before = tail(&dir.join("log.1"), lines)?;
    last.extend(before);
    if let Some(file) = &mut file {
        let own = tail(file.path(), lines)?;
        let end: u64 = own.iter().map(|line| line.len() as u64).sum();
        let start = own_start(file, end)?;
        file.seek(SeekFrom::Start(start))?;
        last.truncate(last.len().min(lines));
        while last.len() + own.len() > lines && !last.is_empty() {
            last.pop_front();
        }
    } else {
        while last.len() > lines {
            last.pop_front();
        }
    }
    for line in &last {
        if !sink(line) {
            return Ok(());
        }
    }
    let mut quiet = 0;
    loop {
        // Asked before reading, so that what was printed before the end is read.
        let living = alive();
        let mut moved = false;
        if let Some(open_file) = &mut file {
            let mut buffer = vec![0; CHUNK];
            loop {
                let read = open_file.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                moved = true;
                if !sink(&buffer[..read]) {
                    return Ok(());
                }
            }
        }
        match next(dir, file.as_ref())? {
            Next::Same => {}
            Next::Newer(newer) => {
                // What came into the old one between the last read and the rotation.
                if let Some(old) = &mut file {
                    let mut rest = Vec::new();
                    old.read_to_end(&mut rest)?;
                    if !rest.is_empty() && !sink(&rest) {
                        return Ok(());
                    }
                }
                file = Some(newer);
                continue;
            }
        }
        if !follow || (!living && !moved) {
            return Ok(());
        }
        quiet = if moved { 0 } else { quiet + 1 };
        if quiet >= ASK {
            quiet = 0;
            if !sink(&[]) {
                return Ok(());
            }
        }
        std::thread::sleep(LOOK);
    }
}

/// Where the last `bytes` bytes of a file as it was a moment ago start.
fn own_start(file: &mut fs_err::File, bytes: u64) -> Result<u64> {
    Ok(file.metadata()?.len().saturating_sub(bytes))
}

enum Next {
    Same,
    /// The log was rotated; this is the new one.
    Newer(fs_err::File),
}

fn next(dir: &Path, current: Option<&fs_err::File>) -> Result<Next> {
    let Some(newest) = open(dir)? else { return Ok(Next::Same) };
    let Some(current) = current else { return Ok(Next::Newer(newest)) };
    let (old, new) = (current.metadata()?, newest.metadata()?);
    Ok(if (old.dev(), old.ino()) == (new.dev(), new.ino()) { Next::Same } else { Next::Newer(newest) })
}

fn open(dir: &Path) -> Result<Option<fs_err::File>> {
    match fs_err::File::open(dir.join("log")) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The last `lines` lines of a file; one without its end counts. None when it is not there.
fn tail(path: &Path, lines: usize) -> Result<Vec<Vec<u8>>> {
    let mut file = match fs_err::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut start = file.metadata()?.len();
    let mut bytes: Vec<u8> = Vec::new();
    // From the end, until there are enough ends of lines.
    while start > 0 && bytes.iter().filter(|byte| **byte == b'\n').count() <= lines {
        let step = start.min(CHUNK as u64);
        start -= step;
        file.seek(SeekFrom::Start(start))?;
        let mut chunk = vec![0; usize::try_from(step)?];
        file.read_exact(&mut chunk)?;
        chunk.append(&mut bytes);
        bytes = chunk;
    }
    let all: Vec<Vec<u8>> = bytes.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    Ok(all[all.len().saturating_sub(lines)..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(dir: &Path, lines: usize) -> String {
        let mut text = Vec::new();
        read(dir, lines, false, &|| false, &mut |chunk| {
            text.extend_from_slice(chunk);
            true
        })
        .unwrap();
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn it_rotates_and_the_last_lines_are_found_in_both() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::with_max(dir.path(), 100);
        for number in 0..40 {
            log.write(format!("line {number}\n").as_bytes());
        }
        assert_eq!(lines(dir.path(), 3), "line 37\nline 38\nline 39\n");
        let all = lines(dir.path(), 1000);
        assert!(all.ends_with("line 38\nline 39\n") && all.starts_with("line "), "{all}");
        assert!(dir.path().join("log.1").metadata().unwrap().len() >= 100);
        assert!(dir.path().join("log").metadata().unwrap().len() <= 108);
        // Another writer goes on where the first one stopped.
        let mut log = Log::with_max(dir.path(), 100);
        log.write(b"half");
        log.say("it ended");
        assert_eq!(lines(dir.path(), 2), "half\npipeline: it ended\n");
        assert_eq!(lines(dir.path(), 0), "");
    }

    #[test]
    fn following_crosses_a_rotation_and_ends_with_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_path_buf();
        let alive = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
        let writing = alive.clone();
        let writer = std::thread::spawn(move || {
            let mut log = Log::with_max(&path, 1000);
            for number in 0..300 {
                log.write(format!("{number}\n").as_bytes());
                // Slow enough that the reader sees each file.
                std::thread::sleep(Duration::from_millis(2));
            }
            writing.store(false, std::sync::atomic::Ordering::SeqCst);
        });
        let mut text = Vec::new();
        let more = || alive.load(std::sync::atomic::Ordering::SeqCst);
        read(dir.path(), 10, true, &more, &mut |chunk| {
            text.extend_from_slice(chunk);
            true
        })
        .unwrap();
        writer.join().unwrap();
        let seen: Vec<u32> = String::from_utf8(text).unwrap().lines().map(|line| line.parse().unwrap()).collect();
        let first = seen[0];
        assert_eq!(seen, (first..300).collect::<Vec<_>>());
    }

    #[test]
    fn a_full_disk_is_survived_and_told() {
        let dir = tempfile::tempdir().unwrap();
        fs_err::os::unix::fs::symlink("/dev/full", dir.path().join("log")).unwrap();
        let mut log = Log::open(dir.path());
        log.write(b"lost\n");
        log.write(b"lost too\n");
        fs_err::remove_file(dir.path().join("log")).unwrap();
        log.write(b"kept\n");
        assert_eq!(
            lines(dir.path(), 9),
            "\npipeline: 14 bytes of output are lost: No space left on device (os error 28)\nkept\n"
        );
    }
}
