//! WebSocket frames (RFC 6455, section 5) on a [`Wire`]; what the client and the upstream share.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Buf as _;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};

use super::wire::{Lost, Wire};

/// Longest message, in bytes.
const MESSAGE_BYTES: u64 = 1 << 20;
pub const TEXT: u8 = 1;
pub const CLOSE: u8 = 8;
pub const PING: u8 = 9;
pub const PONG: u8 = 10;
/// The connection did what it was for.
pub const NORMAL: u16 = 1000;
/// The endpoint is going away.
pub const AWAY: u16 = 1001;
/// Service restart (registered with IANA after RFC 6455).
pub const RESTART: u16 = 1012;

/// A whole frame; none is fragmented here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub data: Vec<u8>,
}

impl Frame {
    /// Code of a close frame; none in an empty one.
    pub fn code(&self) -> Option<u16> {
        (self.kind == CLOSE && self.data.len() >= 2).then(|| u16::from_be_bytes([self.data[0], self.data[1]]))
    }
}

/// The answer to a key of the opening handshake (RFC 6455, 4.2.2).
pub fn accept(key: &str) -> String {
    STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11").as_bytes()))
}

/// The bytes of a frame; with a mask as clients send it.
pub fn encode(kind: u8, data: &[u8], mask: Option<[u8; 4]>) -> Vec<u8> {
    let bit = if mask.is_some() { 0x80 } else { 0 };
    let mut frame = vec![0x80 | kind];
    match data.len() {
        length @ 0..=125 => frame.push(bit | length as u8),
        length @ 126..=0xffff => {
            frame.push(bit | 126);
            frame.extend((length as u16).to_be_bytes());
        }
        length => {
            frame.push(bit | 127);
            frame.extend((length as u64).to_be_bytes());
        }
    }
    frame.extend(mask.unwrap_or_default().iter().take(if mask.is_some() { 4 } else { 0 }));
    let start = frame.len();
    frame.extend(data);
    if let Some(mask) = mask {
        frame[start..].iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    }
    frame
}

/// The bytes of a close frame.
pub fn close(code: u16, mask: Option<[u8; 4]>) -> Vec<u8> {
    encode(CLOSE, &code.to_be_bytes(), mask)
}

/// Reads a frame; nothing when the connection ended. Stopping in the middle and calling again loses nothing.
pub async fn read(wire: &mut Wire, masked: bool) -> Result<Option<Frame>, Lost> {
    loop {
        if let Some(frame) = take(wire, masked)? {
            return Ok(Some(frame));
        }
        if !wire.more().await? {
            return if wire.buffer().is_empty() { Ok(None) } else { Err(Lost::new(Lost::TRUNCATED, "the frame is not whole")) };
        }
    }
}

/// Takes a frame from what was read, once it is whole.
fn take(wire: &mut Wire, masked: bool) -> Result<Option<Frame>, Lost> {
    let buffer = wire.buffer();
    if buffer.len() < 2 {
        return Ok(None);
    }
    let (first, second) = (buffer[0], buffer[1]);
    if first & 0xf0 != 0x80 || (second & 0x80 != 0) != masked {
        return Err(Lost::new(Lost::MALFORMED, format!("frame with the bytes {first:#x} {second:#x}")));
    }
    let (mut start, mut length) = (2, u64::from(second & 0x7f));
    if length >= 126 {
        let wide = if length == 126 { 2 } else { 8 };
        if buffer.len() < start + wide {
            return Ok(None);
        }
        length = buffer[start..start + wide].iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
        start += wide;
    }
    if length > MESSAGE_BYTES {
        return Err(Lost::new(Lost::MALFORMED, format!("frame of {length} bytes")));
    }
    let mask_bytes = if masked { 4 } else { 0 };
    let length = length as usize;
    if buffer.len() < start + mask_bytes + length {
        return Ok(None);
    }
    let mask = buffer[start..start + mask_bytes].to_vec();
    buffer.advance(start + mask_bytes);
    let mut data = buffer.split_to(length).to_vec();
    if masked {
        data.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
    }
    Ok(Some(Frame { kind: first & 0x0f, data }))
}
