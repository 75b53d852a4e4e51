//! The verity superblock and the table line the kernel wants of it.
//!
//! Superblock: cryptsetup's on-disk format, version 1; table: kernel documentation, dm-verity.

use super::guid::Hash;

/// What stands in the first block of a hash partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub hash_type: u32,
    pub uuid: [u8; 16],
    pub algorithm: String,
    pub data_block_size: u32,
    pub hash_block_size: u32,
    pub data_blocks: u64,
    pub salt: Vec<u8>,
}

impl Superblock {
    /// # Errors
    /// When the 512 bytes are no superblock, or one with impossible values.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < 512 || &bytes[..8] != b"verity\0\0" {
            return Err("has no verity superblock".into());
        }
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if u32_at(8) != 1 {
            return Err(format!("has a verity superblock of version {}", u32_at(8)));
        }
        let name = bytes[32..64].split(|byte| *byte == 0).next().unwrap_or_default();
        let salt_size = usize::from(u16::from_le_bytes([bytes[80], bytes[81]]));
        let found = Self {
            hash_type: u32_at(12),
            uuid: bytes[16..32].try_into().expect("16 bytes"),
            algorithm: String::from_utf8_lossy(name).into_owned(),
            data_block_size: u32_at(64),
            hash_block_size: u32_at(68),
            data_blocks: u64::from_le_bytes(bytes[72..80].try_into().expect("eight bytes")),
            salt: bytes.get(88..88 + salt_size).filter(|_| salt_size <= 256).unwrap_or_default().to_vec(),
        };
        let block = |size: u32| size.is_power_of_two() && (512..=65536).contains(&size);
        let name = !found.algorithm.is_empty() && found.algorithm.bytes().all(|byte| byte.is_ascii_graphic());
        let sane = block(found.data_block_size) && block(found.hash_block_size) && found.data_blocks > 0;
        if !sane || !name || found.salt.len() != salt_size {
            return Err("has a damaged verity superblock".into());
        }
        Ok(found)
    }

    /// Length of the verified device in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.data_blocks.saturating_mul(u64::from(self.data_block_size / 512))
    }

    /// The parameters of the target `verity`; devices as `major:minor`. The tree starts in the
    /// block behind the superblock.
    pub fn table(&self, data: &str, hash: &str, root: &Hash) -> String {
        let salt = self.salt.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let salt = if salt.is_empty() { "-".to_string() } else { salt };
        format!(
            "{} {data} {hash} {} {} {} 1 {} {root} {salt}",
            self.hash_type, self.data_block_size, self.hash_block_size, self.data_blocks, self.algorithm
        )
    }
}
