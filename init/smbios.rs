//! The firmware's DMI table: the machine's UUID and the strings of type 11.
//!
//! Layout: DMTF DSP0134, sections 6.1 (structures), 7.2 (System Information), 7.12 (OEM Strings).

/// What the table says that we use.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Table {
    /// Type 1, in the order of the text.
    pub uuid: Option<[u8; 16]>,
    /// All strings of type 11, in their order.
    pub strings: Vec<Vec<u8>>,
}

/// Reads `/sys/firmware/dmi/tables/DMI`; what is cut off is left out.
pub fn parse(bytes: &[u8]) -> Table {
    let mut table = Table::default();
    let mut rest = bytes;
    while rest.len() >= 4 {
        let (kind, length) = (rest[0], usize::from(rest[1]));
        if length < 4 || length > rest.len() {
            break;
        }
        let (formatted, tail) = rest.split_at(length);
        let Some(end) = tail.windows(2).position(|pair| pair == [0, 0]) else { break };
        match kind {
            1 if length >= 0x18 => table.uuid = Some(uuid(&formatted[8..24])),
            11 => table.strings.extend(tail[..end].split(|byte| *byte == 0).filter(|s| !s.is_empty()).map(<[u8]>::to_vec)),
            127 => break,
            _ => {}
        }
        rest = &tail[end + 2..];
    }
    table
}

/// The first three fields are little-endian since SMBIOS 2.6.
fn uuid(bytes: &[u8]) -> [u8; 16] {
    super::guid::Guid::from_text_order(bytes.try_into().expect("16 bytes")).0
}

/// Whether a UUID names one machine: not all zeros or ones, as boards and emulators without one have it,
/// and not counted up, as some boards ship it.
pub fn is_real(uuid: &[u8; 16]) -> bool {
    let placeholder = [3, 0, 2, 0, 4, 0, 5, 0, 0, 6, 0, 7, 0, 8, 0, 9];
    let flat = uuid.iter().all(|byte| *byte == uuid[0]);
    let text_order = super::guid::Guid::from_text_order(*uuid).0;
    let counted = uuid.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1));
    !flat && !counted && *uuid != placeholder && text_order != placeholder
}

/// A credential in a string of type 11: `io.systemd.credential:NAME=VALUE` or `io.systemd.credential.binary:NAME=BASE64`
/// (systemd, "System and Service Credentials").
pub fn credential(string: &[u8]) -> Option<(String, Result<Vec<u8>, String>)> {
    let split = |rest: &[u8]| {
        let at = rest.iter().position(|byte| *byte == b'=')?;
        Some((String::from_utf8_lossy(&rest[..at]).into_owned(), rest[at + 1..].to_vec()))
    };
    if let Some(rest) = string.strip_prefix(b"io.systemd.credential:") {
        return split(rest).map(|(name, value)| (name, Ok(value)));
    }
    let (name, value) = split(string.strip_prefix(b"io.systemd.credential.binary:")?)?;
    Some((name, base64(&value).ok_or("is not base64".to_string())))
}

/// Decodes base64 (RFC 4648, section 4); white space is skipped.
pub fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let (mut bits, mut count, mut padding) = (0_u32, 0, 0);
    for byte in text.iter().filter(|byte| !byte.is_ascii_whitespace()) {
        let value = match byte {
            b'A'..=b'Z' => byte - b'A',
            b'a'..=b'z' => byte - b'a' + 26,
            b'0'..=b'9' => byte - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            b'=' => {
                padding += 1;
                continue;
            }
            _ => return None,
        };
        if padding > 0 {
            return None;
        }
        bits = (bits << 6) | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
            bits &= (1 << count) - 1;
        }
    }
    (count < 6 && bits == 0 && padding <= 2).then_some(out)
}
