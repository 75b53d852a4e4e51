//! Bytes that both ends know, so that every one of them can be checked: the little-endian word `i` of seed `s` is a mix
//! of `s` and `i`. No piece of it repeats, so that bytes left out, sent twice or exchanged are seen as well as wrong ones.

/// How many bytes are compared at once.
const BLOCK: usize = 4096;

/// A position in the endless bytes of a seed.
#[derive(Debug, Clone)]
pub struct Bytes {
    seed: u64,
    position: u64,
}

impl Bytes {
    /// The bytes of `seed` from the first on.
    pub fn new(seed: u64) -> Self {
        Self { seed, position: 0 }
    }

    /// How many bytes were filled or checked.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Writes the next bytes into the whole buffer.
    pub fn fill(&mut self, mut buffer: &mut [u8]) {
        let offset = (self.position % 8) as usize;
        if offset > 0 {
            let word = mix(self.seed, self.position / 8).to_le_bytes();
            let some = (8 - offset).min(buffer.len());
            buffer[..some].copy_from_slice(&word[offset..offset + some]);
            buffer = &mut buffer[some..];
            self.position += some as u64;
        }
        let first = self.position / 8;
        self.position += buffer.len() as u64;
        let (words, rest) = buffer.as_chunks_mut::<8>();
        let whole = words.len() as u64;
        for (number, word) in words.iter_mut().enumerate() {
            *word = mix(self.seed, first + number as u64).to_le_bytes();
        }
        let last = mix(self.seed, first + whole).to_le_bytes();
        rest.copy_from_slice(&last[..rest.len()]);
    }

    /// The next `length` bytes.
    pub fn take(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes);
        bytes
    }

    /// Compares the next bytes; the position of the first one that differs.
    pub fn check(&mut self, bytes: &[u8]) -> Result<(), u64> {
        let mut expected = [0; BLOCK];
        for block in bytes.chunks(BLOCK) {
            let start = self.position;
            let expected = &mut expected[..block.len()];
            self.fill(expected);
            if expected != block {
                let same = expected.iter().zip(block).take_while(|(one, other)| one == other).count();
                return Err(start + same as u64);
            }
        }
        Ok(())
    }
}

/// splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): every word depends on every bit of both.
pub fn mix(seed: u64, number: u64) -> u64 {
    let mut word =
        seed.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}
