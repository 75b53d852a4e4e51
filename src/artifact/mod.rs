//! What was built: the store, and what is kept in it beside the images.

pub mod archive;
pub mod disk;
pub mod image;
pub mod store;
