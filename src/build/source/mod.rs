//! The source of a build: what lies in the folder or the repository, as values.
//!
//! [`fetch`] brings a Git repository to a folder; [`scan`] reads a folder into a [`listing::Listing`] (fast, through a
//! stat cache); [`git`] says which commit it is and how dirty; [`snapshot`] makes the read-only tree a build step sees.

mod cache;
pub mod fetch;
mod file;
pub mod git;
mod ignored;
pub mod listing;
pub mod scan;
pub mod snapshot;
#[cfg(test)]
mod testing;
