//! The OCI formats: digests, layouts, layers, registries.

pub mod digest;
