//! What was built: the store, and what is kept in it.

pub mod archive;
pub mod disk;
pub mod dsse;
pub mod image;
pub mod keys;
pub mod provenance;
pub mod referrer;
pub mod release;
pub mod remote;
pub mod sbom;
pub mod sign;
pub mod store;
pub mod tree;
pub mod version;
pub mod whole;

/// What an artifact is: `image`, `host`, `disk`, or the type its manifest names (DESIGN, section 7,
/// contract 1: the tag tells a host's image from an application's).
pub fn kind(manifest: &image::Manifest, name: &str) -> String {
    match manifest.artifact_type.as_deref() {
        Some(disk::DISK_TYPE) => "disk".into(),
        Some(other) => other.into(),
        None if name.ends_with(".host") => "host".into(),
        None => "image".into(),
    }
}
