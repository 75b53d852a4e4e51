//! The static program of a host: the init of the initrd, and what the running system needs of the same knowledge.
//!
//! Without arguments and as process 1 it finds the slot by the root hash, sets up the verified root and `/var`, brings
//! the machine's identity and configuration in and hands over to the init of the root. Its subcommands
//! watch the root, bless the slot, tell the slots, and answer the host outside (see [`agent`]).
//! It needs no other program and no shared library; all of it is in std and the calls of [`sys`].

#![deny(unsafe_code)]
#![warn(missing_debug_implementations)]

mod agent;
mod alias;
mod boot;
mod cloud;
mod cmdline;
mod copy;
mod credentials;
mod disks;
mod dm;
mod esp;
mod ext4;
mod fat;
mod gpt;
mod grubenv;
mod guid;
mod health;
mod kmsg;
mod label;
mod log;
mod machine_id;
mod modules;
mod provision;
mod running;
mod slots;
mod smbios;
#[expect(unsafe_code, reason = "system calls that std has no word for, each behind a safe function")]
mod sys;
mod var;
mod verity;
mod watch;
mod wording;
mod yaml;

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

const USAGE: &str = "usage: pipeline-init watch | bless | slots | agent | health CHECK | mount-root FOLDER | --version";

fn main() -> ExitCode {
    let arguments = std::env::args().skip(1).collect::<Vec<_>>();
    let words = arguments.iter().map(String::as_str).collect::<Vec<_>>();
    if std::process::id() == 1 {
        boot::initrd(&arguments);
    }
    let done = match words.as_slice() {
        ["watch"] => watch::watch(),
        ["bless"] => running::bless(),
        ["slots"] => running::slots(),
        ["agent"] => agent::serve(),
        ["health", check @ ..] => health::wait(check),
        ["mount-root", folder] => boot::mount_root(Path::new(folder)),
        ["chroot", folder, program, rest @ ..] => Err(chroot(folder, program, rest)),
        ["--version"] => running::version(),
        _ => Err(USAGE.to_string()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "pipeline-init: {message}");
            ExitCode::FAILURE
        }
    }
}

/// Becomes a program of another root; the message when it cannot.
fn chroot(folder: &str, program: &str, arguments: &[&str]) -> String {
    let entered = std::os::unix::fs::chroot(folder).and_then(|()| std::env::set_current_dir("/"));
    let error = entered.err().unwrap_or_else(|| Command::new(program).args(arguments).exec());
    format!("{program} cannot be started: {error}")
}
