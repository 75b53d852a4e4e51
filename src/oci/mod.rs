//! The OCI formats: digests, layouts, layers, registries.

pub mod compress;
pub mod digest;
pub mod layer;
pub mod credentials;
pub mod registry;
pub mod unpack;
