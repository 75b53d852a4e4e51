//! Names, salts and serial numbers of a disk, all derived from what is on it.
//!
//! Nothing random and nothing of the moment: two machines that bake the same tree give the same
//! disk. Two different disks differ in every id, as tools expect of ids.

use crate::oci::digest::{Digest, Hasher};

/// What every id of one disk comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity(Digest);

impl Identity {
    /// Of everything that decides the disk's bytes, in a fixed order.
    pub fn of(parts: &[&str]) -> Self {
        let mut hasher = Hasher::new();
        hasher.field("pipeline disk 1");
        for part in parts {
            hasher.field(part);
        }
        Self(hasher.finish())
    }

    /// 32 bytes for one purpose.
    pub fn bytes(&self, purpose: &str) -> [u8; 32] {
        let mut hasher = Hasher::new();
        hasher.field(self.0.bytes()).field(purpose);
        *hasher.finish().bytes()
    }

    /// A UUID in text order, of version 8 (RFC 9562, section 5.8: made by the application).
    pub fn uuid(&self, purpose: &str) -> [u8; 16] {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&self.bytes(purpose)[..16]);
        uuid[6] = (uuid[6] & 0x0f) | 0x80;
        uuid[8] = (uuid[8] & 0x3f) | 0x80;
        uuid
    }

    /// A serial number that is not zero, which FAT readers take for none.
    pub fn serial(&self, purpose: &str) -> u32 {
        let bytes = self.bytes(purpose);
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_by_content_and_purpose() {
        let (one, two) = (Identity::of(&["a", "b"]), Identity::of(&["ab"]));
        assert_ne!(one, two);
        assert_eq!(one.uuid("disk"), Identity::of(&["a", "b"]).uuid("disk"));
        assert_ne!(one.uuid("disk"), one.uuid("root"));
        let uuid = one.uuid("disk");
        assert_eq!((uuid[6] >> 4, uuid[8] >> 6), (8, 2));
        assert_ne!(one.serial("esp"), two.serial("esp"));
    }
}
