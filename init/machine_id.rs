//! The machine-id: made once, kept on `/var`, put into `/etc` at every boot.

use std::fs;
use std::io::Read as _;
use std::path::Path;

use super::{copy, smbios};

/// Where it is kept, below `/var`.
const KEPT: &str = "lib/pipeline/machine-id";

/// The machine-id kept on `var`, or a new one: the firmware's UUID when that is a real one, else random.
///
/// # Errors
/// When it cannot be kept.
pub fn stable(var: &Path, uuid: Option<&[u8; 16]>) -> Result<String, String> {
    let path = var.join(KEPT);
    if let Some(id) = fs::read_to_string(&path).ok().and_then(|text| valid(&text)) {
        return Ok(id);
    }
    let id = match uuid.filter(|uuid| smbios::is_real(uuid)) {
        Some(uuid) => hex(uuid),
        None => random()?,
    };
    let kept = copy::folder(&var.join("lib/pipeline")).and_then(|()| copy::replace(&path, format!("{id}\n").as_bytes(), 0o444));
    kept.map_err(|error| format!("{} cannot be written: {error}", path.display()))?;
    Ok(id)
}

/// A random UUID of version 4, as systemd makes them.
///
/// # Errors
/// When there is no `/dev/urandom`.
pub fn random() -> Result<String, String> {
    let mut bytes = [0_u8; 16];
    let read = fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| format!("/dev/urandom cannot be read: {error}"))?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// 32 lower-case hexadecimal digits, not all zero (machine-id(5)).
fn valid(text: &str) -> Option<String> {
    let text = text.trim_end();
    let digits = text.len() == 32 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    (digits && text.bytes().any(|byte| byte != b'0')).then(|| text.to_string())
}
