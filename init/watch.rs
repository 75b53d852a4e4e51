//! Watches the verified root: the kernel says when a block does not fit its hash; then the slot is marked bad and the
//! machine starts the other one, or stops when there is none.
//!
//! Everything this needs is in memory before it starts to wait: the root may not be readable when it is needed.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Seek as _, SeekFrom};
use std::time::Duration;

use super::esp::Mark;
use super::sys::{self, Reset};
use super::{dm, kmsg, log, running};

/// How long the message stands on the console before the power goes.
const READING_TIME: Duration = Duration::from_secs(2);

/// Runs until the root is damaged; then the machine ends.
///
/// # Errors
/// When the machine has no verified root of ours or the kernel's log cannot be read.
pub fn watch() -> Result<(), String> {
    sys::lock_memory().map_err(|error| format!("the memory cannot be locked: {error}"))?;
    let (found, esp) = running::current()?;
    let mut kmsg = File::open("/dev/kmsg").map_err(|error| format!("/dev/kmsg cannot be opened: {error}"))?;
    // From now on; what came before is in the state of the device.
    kmsg.seek(SeekFrom::End(0)).map_err(|error| format!("/dev/kmsg cannot be read: {error}"))?;
    let mut buffer = vec![0; 8192];
    let mut look = true;
    loop {
        if look && dm::is_corrupt().map_err(|error| format!("the verified root cannot be asked: {error}"))? {
            break;
        }
        look = match kmsg.read(&mut buffer) {
            Ok(0) => return Err("/dev/kmsg ended".into()),
            Ok(length) => kmsg::is_corruption(&String::from_utf8_lossy(&buffer[..length])),
            // Records were overwritten before they were read.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => true,
            Err(error) if error.kind() == ErrorKind::Interrupted => false,
            Err(error) => return Err(format!("/dev/kmsg cannot be read: {error}")),
        };
    }
    let states = esp.states();
    let marked = esp.mark(found.slot, Mark::Damaged);
    let title = format!("SLOT {} IS DAMAGED: a block of the root does not fit its hash", found.slot.letter().to_uppercase());
    let other = states.is_ok_and(|states| states[found.slot.other() as usize].bootable());
    let error = marked.err().unwrap_or_default();
    let (how, words) = if other {
        (Reset::Restart, "restarting into the other slot")
    } else {
        (Reset::PowerOff, "NO OTHER GOOD SLOT EXISTS. THE MACHINE STOPS. write the disk anew")
    };
    let lines = [title.as_str(), error.as_str(), words];
    log::alarm(&lines.into_iter().filter(|line| !line.is_empty()).collect::<Vec<_>>());
    sys::sync_all();
    if !other {
        std::thread::sleep(READING_TIME);
    }
    Err(format!("the kernel does not reset: {}", sys::reset(how)))
}
