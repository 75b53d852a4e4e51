//! Texts of answers that more than one verb shows.

use super::ui::{bytes, table};
use crate::build::Built;
use crate::build::plan::Step;
use crate::build::record::StepRecord;

/// The steps of a plan, one line each.
pub fn plan(steps: &[Step], found: &[Option<StepRecord>], because: &[String]) -> String {
    let rows: Vec<Vec<String>> = steps
        .iter()
        .zip(found)
        .zip(because)
        .map(|((step, found), because)| {
            let state = match found {
                Some(record) => format!("cached ({})", bytes(record.bytes())),
                None => format!("will run: {because}"),
            };
            let ships = if step.ships { "" } else { "not in the image; " };
            vec![step.name.clone(), step.key.short(), format!("{ships}{state}")]
        })
        .collect();
    table(&rows)
}

/// `notes:latest sha256:…`.
pub fn built(built: &Built) -> String {
    format!("{} {}\n", built.name, built.digest)
}
