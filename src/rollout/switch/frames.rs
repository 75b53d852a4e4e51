//! Just enough of WebSocket frames (RFC 6455, section 5.2) to know where one ends and which close code passes.

/// Follows one direction of a WebSocket.
#[derive(Debug, Default)]
pub(super) struct Frames {
    /// The head of the frame so far.
    head: [u8; 14],
    have: usize,
    /// Bytes of payload that are still to come.
    left: u64,
    /// The first bytes of the payload of a close frame.
    close: Option<([u8; 2], usize)>,
    masked: bool,
}

/// What was in a stretch of bytes.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    /// How many of the bytes come before the last border between frames; `None`: there is no border among or at the end of them.
    pub border: Option<usize>,
    /// The code of a close frame, 1005 when it has none (section 7.1.5).
    pub close: Option<u16>,
}

impl Frames {
    /// Whether the next byte begins a frame.
    pub fn at_border(&self) -> bool {
        self.have == 0 && self.left == 0
    }

    /// Takes note of `bytes`.
    pub fn see(&mut self, bytes: &[u8]) -> Seen {
        let (mut seen, mut at) = (Seen::default(), 0);
        while at < bytes.len() {
            if self.left > 0 {
                let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len() - at);
                self.note_close(&bytes[at..at + count]);
                self.left -= count as u64;
                at += count;
            } else {
                self.head[self.have] = bytes[at];
                self.have += 1;
                at += 1;
                if self.have < self.head_length() {
                    continue;
                }
                self.begin();
            }
            if self.left == 0 && self.have == self.head_length() {
                seen.close = seen.close.or(self.end());
                seen.border = Some(at);
            }
        }
        seen
    }

    /// Bytes of the head, as far as they say so.
    fn head_length(&self) -> usize {
        if self.have < 2 {
            return 2;
        }
        let length = match self.head[1] & 0x7f {
            126 => 4,
            127 => 10,
            _ => 2,
        };
        length + if self.head[1] & 0x80 != 0 { 4 } else { 0 }
    }

    fn begin(&mut self) {
        self.left = match self.head[1] & 0x7f {
            126 => u64::from(u16::from_be_bytes([self.head[2], self.head[3]])),
            127 => u64::from_be_bytes(self.head[2..10].try_into().expect("eight bytes")),
            short => u64::from(short),
        };
        self.masked = self.head[1] & 0x80 != 0;
        self.close = (self.head[0] & 0x0f == 0x8).then_some(([0; 2], 0));
    }

    fn note_close(&mut self, payload: &[u8]) {
        if let Some((code, have)) = &mut self.close {
            for byte in payload.iter().take(2 - (*have).min(2)) {
                let mask = if self.masked { self.head[self.have - 4 + *have] } else { 0 };
                code[*have] = byte ^ mask;
                *have += 1;
            }
        }
    }

    fn end(&mut self) -> Option<u16> {
        self.have = 0;
        self.close.take().map(|(code, have)| if have == 2 { u16::from_be_bytes(code) } else { 1005 })
    }
}

/// A close frame (section 5.5.1); a client's is masked (section 5.3), with a key of zeros, as it hides nothing.
pub(super) fn close(code: u16, masked: bool) -> Vec<u8> {
    let [high, low] = code.to_be_bytes();
    if masked { vec![0x88, 0x82, 0, 0, 0, 0, high, low] } else { vec![0x88, 0x02, high, low] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borders_and_close_codes_whatever_the_pieces() {
        let mut text = vec![0x81, 0x05];
        text.extend_from_slice(b"hello");
        let mut long = vec![0x82, 126, 0x01, 0x00];
        long.extend_from_slice(&[0x88; 256]);
        let mut longer = vec![0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0];
        longer.resize(10 + 65536, 0x88);
        let masked = vec![0x88, 0x84, 1, 2, 3, 4, 0x03 ^ 1, 0xe9 ^ 2, b'o' ^ 3, b'k' ^ 4];
        for (bytes, close_code) in [
            (text, None),
            (long, None),
            (longer, None),
            (vec![0x89, 0x00], None),
            (masked, Some(1001)),
            (close(1012, false), Some(1012)),
            (close(1001, true), Some(1001)),
            (vec![0x88, 0x00], Some(1005)),
            (vec![0x88, 0x80, 9, 9, 9, 9], Some(1005)),
        ] {
            for step in [1, 2, 3, 7, 1 << 20] {
                let (mut frames, mut code) = (Frames::default(), None);
                let mut whole = bytes.clone();
                whole.push(0x81); // the first byte of the next frame
                for (index, piece) in bytes.chunks(step).enumerate() {
                    let last = (index + 1) * step >= bytes.len();
                    let seen = frames.see(piece);
                    code = code.or(seen.close);
                    assert_eq!(
                        (seen.border, frames.at_border()),
                        (last.then_some(piece.len()), last),
                        "{:?} in pieces of {step}",
                        &bytes[..2]
                    );
                }
                assert_eq!(code, close_code);
                assert_eq!(Frames::default().see(&whole).border, Some(bytes.len()));
            }
        }
    }
}
