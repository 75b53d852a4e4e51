//! What the program says: one line each into the kernel's log, which reaches every console.
//!
//! Notes are seen on the console only with `pipeline.debug`; problems always.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

static DEBUG: AtomicBool = AtomicBool::new(false);

/// Notes go to the console too (`pipeline.debug`).
pub fn set_debug(on: bool) {
    DEBUG.store(on, Ordering::Relaxed);
}

pub fn debugging() -> bool {
    DEBUG.load(Ordering::Relaxed)
}

fn write(level: u8, message: &str) {
    if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // One write is one record; the kernel cuts records at about 1000 bytes.
        let mut line = format!("<{level}>pipeline-init: {message}\n").replace('\0', " ").into_bytes();
        line.truncate(960);
        let _ = kmsg.write_all(&line);
    } else {
        let _ = writeln!(std::io::stderr(), "pipeline-init: {message}");
    }
}

/// A phase or a fact; on the console only when debugging.
pub fn note(message: &str) {
    write(if debugging() { 2 } else { 6 }, message);
}

/// Something went wrong and the boot goes on.
pub fn warn(message: &str) {
    write(3, message);
}

/// Something the person at the console must see.
pub fn alarm(lines: &[&str]) {
    let edge = "*".repeat(70);
    if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let inner = lines.iter().map(|line| line.to_string());
        for line in std::iter::once(edge.clone()).chain(inner).chain(std::iter::once(edge)) {
            let _ = kmsg.write_all(format!("<1>pipeline-init: {line}\n").as_bytes());
        }
    }
}
