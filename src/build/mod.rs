//! The flow from source to image.

pub mod builder;
pub mod detect;
