//! `pipeline`: from source to running, immutable machines, in one binary.
//!
//! Four levels; calls go down only (ARCHITECTURE.md tells more).

// 4 · talks to people
pub mod cli;
pub mod serve;
// 3 · flows
pub mod bake;
pub mod build;
pub mod release;
pub mod rollout;
pub mod vm;
// 2 · nouns of the field
pub mod artifact;
pub mod config;
pub mod disk;
pub mod oci;
// 1 · tools that know nothing of the field
pub mod cmd;
pub mod docker;
pub mod error;
pub mod fault;
pub mod git;
pub mod progress;
pub mod sandbox;
pub mod template;
