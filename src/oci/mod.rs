//! The OCI formats: digests, layouts, layers, registries.

pub mod credentials;
pub mod digest;
pub mod registry;
