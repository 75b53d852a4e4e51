//! `pipeline run`. Its exit status is the program's own; 125 when it could not be run.

use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context as _, Result};

use super::{Global, artifact, ui};
use crate::build::run::{self, Options};
use crate::error::Problem;

/// Exit status when the program could not be run: what `env` and Docker use (DESIGN section 7, contract 14).
const NOT_RUN: u8 = 125;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME, NAME:TAG or a digest
    image: String,
    /// Port on 127.0.0.1, or OUTSIDE:INSIDE; 0: any free one. Default: the image's own, and with a command none
    #[arg(long, short, value_name = "PORT", value_parser = port)]
    port: Option<(u16, Option<u16>)>,
    /// Set a variable
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Put a folder of this machine at a path of the image
    #[arg(long, value_name = "DIR:PATH", value_parser = volume)]
    volume: Vec<(PathBuf, PathBuf)>,
    /// Give the program this terminal's input
    #[arg(long, short)]
    interactive: bool,
    /// Network: an own one with only the published port, or this machine's
    #[arg(long, value_enum, default_value = "own")]
    network: Network,
    /// A command in place of the image's
    #[arg(last = true, value_name = "CMD")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Network {
    Own,
    Host,
}

fn port(text: &str) -> Result<(u16, Option<u16>), String> {
    let number = |text: &str| text.parse::<u16>().map_err(|_| format!("`{text}` is not a port"));
    match text.split_once(':') {
        Some((outside, inside)) => Ok((number(outside)?, Some(number(inside)?))),
        None => Ok((number(text)?, None)),
    }
}

fn variable(text: &str) -> Result<(String, String), String> {
    text.split_once('=').map(|(name, value)| (name.into(), value.into())).ok_or_else(|| format!("`{text}` is not NAME=VALUE"))
}

fn volume(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let (source, target) = text.split_once(':').ok_or_else(|| format!("`{text}` is not DIR:PATH"))?;
    let source = fs_err::canonicalize(source).map_err(|error| error.to_string())?;
    if target.starts_with('/') {
        Ok((source, target.into()))
    } else {
        Err(format!("`{target}` is not an absolute path of the image"))
    }
}

pub fn run(global: &Global, args: Args) -> u8 {
    match try_run(global, args) {
        Ok(status) => status,
        Err(error) => {
            ui::fail(&error, matches!(global.progress, super::progress::How::Json));
            NOT_RUN
        }
    }
}

fn try_run(global: &Global, args: Args) -> Result<u8> {
    let around = ui::Surroundings::new(global)?;
    let (_, descriptor) =
        artifact::find(&around.store, &args.image).map_err(|error| match around.pipeline(Some(&args.image)) {
            Ok(pipeline) => Problem::usage(format!("`{}` is not built yet", pipeline.name))
                .hint(format!("pipeline build {}", pipeline.name))
                .into(),
            Err(_) => error,
        })?;
    let asked = catch_signals()?;
    let options = Options {
        port: args.port,
        command: args.command,
        env: args.env,
        volumes: args.volume,
        interactive: args.interactive,
        host_network: args.network == Network::Host,
    };
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let null = fs_err::File::open("/dev/null")?;
    let input = if args.interactive { stdin.as_fd() } else { null.as_fd() };
    let take = || match asked.swap(0, Ordering::SeqCst) {
        0 => None,
        signal => Some(signal),
    };
    let status = run::run(&around.build(), &descriptor.digest, &options, [input, stdout.as_fd(), stderr.as_fd()], &take)?;
    Ok(u8::try_from(status).unwrap_or(NOT_RUN))
}

/// The last signal this process was sent, for the program.
fn catch_signals() -> Result<Arc<AtomicI32>> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    let asked = Arc::new(AtomicI32::new(0));
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT]).context("cannot watch for signals")?;
    let caught = asked.clone();
    std::thread::spawn(move || {
        for signal in signals.forever() {
            caught.store(signal, Ordering::SeqCst);
        }
    });
    Ok(asked)
}
