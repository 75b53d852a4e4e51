//! From source to image: the parts of a build.

pub mod debian;
pub mod lock;
