//! vm-tests: YAML files that boot a disk and look at what it does (docs/vm-tests.md).
//!
//! ```text
//! file (serde) → check (carets and hints) → VmTest ─▶ run: for each firmware a machine, step by step ─▶ report
//! ```

pub mod check;
pub mod file;
pub mod report;
pub mod run;
pub mod types;

pub use check::{load, parse};

/// The JSON Schema of a vm-test, for editors.
pub fn schema() -> serde_json::Value {
    let mut schema = schemars::schema_for!(file::TestFile);
    schema.insert("title".into(), "vm-test".into());
    schema.to_value()
}
