//! `load`: a client that loses nothing unseen, and an application to be behind the switch.
//!
//! The client never repeats a request and keeps its connections; everything but the expected answer, whole and with
//! every byte right, is counted as lost. It knows nothing of `pipeline`: tests and measurements run it against
//! the switch and against other proxies alike. Tests include this file as a module, so that what they run is what they were compiled with.

pub mod bytes;
pub mod client;
pub mod report;
pub mod upstream;
pub mod websocket;
pub mod wire;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser;

/// A load client and a test upstream.
#[derive(Debug, Parser)]
#[command(name = "load")]
struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// An application that is easy to check
    Upstream(upstream::UpstreamArgs),
    /// Sends requests and counts what is lost; exit status 1 when something is
    Client(client::ClientArgs),
}

pub fn main() -> ExitCode {
    let done = match Args::parse().verb {
        Verb::Upstream(args) => upstream::run(&args),
        Verb::Client(args) => client::run(&args).map(|report| {
            say(&report.to_string());
            if report.lost == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }),
    };
    done.unwrap_or_else(|error| {
        // Nobody is left to tell when standard error is closed.
        let _ = writeln!(std::io::stderr(), "error: {error:#}");
        ExitCode::from(2)
    })
}

/// A line on standard output, where somebody may read it or not.
pub fn say(text: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Nanoseconds of the machine's monotonic clock: what every process of the machine reads, Python's `time.monotonic_ns()` too.
pub fn monotonic() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}
