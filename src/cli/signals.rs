//! ^C and friends: what runs is ended, the flow cleans up, the exit status says so.

use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use crate::error::Problem;
use anyhow::{Context as _, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// How long a flow may take to clean up after it was asked to stop.
const CLEAN_UP: Duration = Duration::from_secs(10);

static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// From here on a signal ends what runs in the sandbox; the flow then fails and cleans up.
pub fn watch() -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch for signals")?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            CAUGHT.store(signal, Ordering::SeqCst);
            crate::sandbox::interrupt();
            std::thread::sleep(CLEAN_UP);
            crate::sandbox::interrupt();
            // What is left belongs to no process any more, and the next build sweeps it.
            #[expect(clippy::disallowed_methods, clippy::exit, reason = "the flow had its time")]
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// The exit status after a signal: 128 and its number, as shells have it.
pub fn exit_code() -> Option<u8> {
    match CAUGHT.load(Ordering::SeqCst) {
        0 => None,
        signal => u8::try_from(128 + signal).ok(),
    }
}

/// The error of a flow that a signal ended; `keeps_steps`: the same command goes on where this one was.
pub fn stopped(keeps_steps: bool) -> anyhow::Error {
    let name = match CAUGHT.load(Ordering::SeqCst) {
        SIGINT => "SIGINT (^C)",
        SIGTERM => "SIGTERM",
        _ => "SIGHUP",
    };
    let problem = Problem::failed(format!("stopped by {name}"));
    if keeps_steps {
        return problem.hint("finished steps are kept: the same command goes on from there").into();
    }
    problem.into()
}
