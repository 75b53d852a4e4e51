//! Device mapper: makes the verified device of the root, and asks the kernel how it is.
//!
//! Structures: `linux/dm-ioctl.h`, version 4.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use super::sys;

const HEADER: usize = 312;
const BUFFER: usize = 4096;
/// Where a target's own words start: the header and one target structure.
const PARAMETERS: usize = HEADER + 40;
const READONLY: u32 = 1;
/// The name below `/dev/mapper`.
const NAME: &str = "root";

const CREATE: u64 = 3;
const REMOVE: u64 = 4;
const SUSPEND: u64 = 6;
const TABLE_LOAD: u64 = 9;
const TABLE_STATUS: u64 = 12;

fn call(command: u64, flags: u32, uuid: &str, target: Option<(u64, &str)>) -> io::Result<Vec<u8>> {
    let control = File::options().read(true).write(true).open("/dev/mapper/control")?;
    let mut buffer = vec![0_u8; BUFFER];
    let mut put = |at: usize, bytes: &[u8]| buffer[at..at + bytes.len()].copy_from_slice(bytes);
    for (index, part) in [4_u32, 0, 0, BUFFER as u32, HEADER as u32].iter().enumerate() {
        put(index * 4, &part.to_le_bytes());
    }
    put(28, &flags.to_le_bytes());
    put(48, NAME.as_bytes());
    put(176, uuid.as_bytes());
    if let Some((sectors, parameters)) = target {
        if PARAMETERS + parameters.len() >= BUFFER {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        put(20, &1_u32.to_le_bytes());
        put(HEADER + 8, &sectors.to_le_bytes());
        put(HEADER + 24, b"verity");
        put(PARAMETERS, parameters.as_bytes());
    }
    let request = (3 << 30) | ((HEADER as u64) << 16) | (0xfd << 8) | command;
    sys::ioctl_buffer(&control, request, &mut buffer)?;
    Ok(buffer)
}

/// Makes `/dev/dm-N` of a verity table, read-only, and returns its node. The table's default holds: a block that
/// does not fit is an I/O error for who reads it.
///
/// # Errors
/// The kernel's number.
pub fn create(uuid: &[u8; 16], sectors: u64, table: &str) -> io::Result<PathBuf> {
    let uuid = uuid.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    // The form of libcryptsetup, so that `veritysetup status root` knows the device.
    let made = call(CREATE, 0, &format!("CRYPT-VERITY-{uuid}-{NAME}"), None)?;
    let started = call(TABLE_LOAD, READONLY, "", Some((sectors, table))).and_then(|_| call(SUSPEND, 0, "", None));
    if let Err(error) = started {
        // Another attempt makes it anew.
        let _ = call(REMOVE, 0, "", None);
        return Err(error);
    }
    let device = u64::from_le_bytes(made[40..48].try_into().expect("eight bytes"));
    let minor = (device & 0xff) | ((device >> 12) & 0xf_ff00);
    Ok(PathBuf::from(format!("/dev/dm-{minor}")))
}

/// Whether the kernel has met a block of the root that does not fit its hash, at any time since it was set up.
///
/// # Errors
/// When there is no verified root.
pub fn is_corrupt() -> io::Result<bool> {
    let buffer = call(TABLE_STATUS, 0, "", None)?;
    Ok(buffer.get(PARAMETERS) == Some(&b'C'))
}
