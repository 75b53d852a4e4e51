//! What the subcommands of the running system share: the slot that runs, and `bless`, `slots`, `--version`.

use std::fs;
use std::io::Write as _;

use super::disks::{self, Found};
use super::esp::{Esp, Mark};
use super::slots::{Slot, State};
use super::{boot, cmdline};

/// The slot the machine runs from, and the ESP beside it.
///
/// # Errors
/// When the kernel command line names no root or its disk is not there.
pub fn current() -> Result<(Found, Esp), String> {
    let cmdline = fs::read_to_string("/proc/cmdline").map_err(|error| format!("/proc/cmdline cannot be read: {error}"))?;
    let found = disks::find(&cmdline::root_hash(&cmdline)?)?;
    let esp = boot::esp_of(&found)?;
    Ok((found, esp))
}

/// Marks the slot that runs as good, when it is not so already. One that is damaged stays bad although this boot did
/// not meet the damage.
///
/// # Errors
/// When the ESP cannot be changed.
pub fn bless() -> Result<(), String> {
    let (found, esp) = current()?;
    let letter = found.slot.letter();
    if esp.is_marked(found.slot, Mark::Good)? {
        return say(&format!("slot {letter} is good already\n"));
    }
    if esp.is_damaged(found.slot)? {
        return say(&format!("slot {letter} is damaged: it stays bad until it is written anew\n"));
    }
    esp.mark(found.slot, Mark::Good)?;
    say(&format!("slot {letter} is good\n"))
}

/// One line for each slot: its letter, its state, and `current` behind the one that runs.
///
/// # Errors
/// When the ESP cannot be read.
pub fn slots() -> Result<(), String> {
    let (found, esp) = current()?;
    let states: [State; 2] = esp.states()?;
    let line = |(slot, state): (Slot, State)| {
        let current = if slot == found.slot { " current" } else { "" };
        format!("{} {state}{current}\n", slot.letter())
    };
    say(&Slot::ALL.into_iter().zip(states).map(line).collect::<String>())
}

/// # Errors
/// When stdout is closed.
pub fn version() -> Result<(), String> {
    say(concat!("pipeline-init ", env!("PIPELINE_INIT_VERSION"), "\n"))
}

fn say(text: &str) -> Result<(), String> {
    std::io::stdout().write_all(text.as_bytes()).map_err(|error| format!("stdout cannot be written: {error}"))
}
