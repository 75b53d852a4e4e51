//! `pipeline build`: base + runtime + source become an OCI image.

pub mod source;
