//! The pipeline file: file (serde) → check (all problems at once, with carets) → checked types.

pub mod file;
pub mod types;
