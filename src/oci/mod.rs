//! The OCI formats: digests, layouts, layers, registries.

pub mod compress;
pub mod credentials;
pub mod digest;
pub mod flatten;
pub mod layer;
pub mod registry;
pub mod tree_layer;
pub mod unpack;
