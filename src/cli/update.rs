//! `pipeline update`.

use anyhow::Result;

use super::{Global, report, signals, ui};
use crate::build::update::{self, Updated};
use crate::progress::Progress as _;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the pipeline, or its file; default: the one of this folder
    name: Option<String>,
    /// Write nothing; exit with 1 when there is something newer
    #[arg(long)]
    check: bool,
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    let around = ui::Surroundings::new(global)?;
    let pipeline = around.pipeline(args.name.as_deref())?;
    signals::watch()?;
    let updated = update::update(&around.build(), &pipeline, args.check);
    around.progress.finish();
    let updated = updated?;
    if updated.written {
        let others: Vec<_> = crate::config::names(&around.cwd)
            .iter()
            .filter_map(|name| around.pipeline(Some(name)).ok())
            .filter(|other| other.dir == pipeline.dir)
            .collect();
        if let Some(lock) = crate::build::lock::load(&pipeline.dir)? {
            for name in update::shared_with(&pipeline, &lock, &others) {
                around.progress.note(format!("`{name}` stands on the same base, which moved with it"));
            }
        }
    }
    ui::answer(global, &updated, || text(&updated, args.check))?;
    Ok(u8::from(args.check && !updated.is_current()))
}

fn text(updated: &Updated, check: bool) -> String {
    let mut text = String::new();
    for image in updated.images.iter().filter(|image| image.old != Some(image.new)) {
        text.push_str(&format!(
            "image {}: {} → {}\n",
            image.reference,
            image.old.map_or_else(|| "none".into(), |digest| digest.to_string()),
            image.new
        ));
    }
    for set in updated.sets.iter().filter(|set| !set.changes.is_empty()) {
        let since = set.before.as_ref().map_or_else(|| "new".to_string(), |date| format!("since {date}"));
        text.push_str(&format!("{} ({since}):\n", set.step));
        let rows: Vec<Vec<String>> = set
            .changes
            .iter()
            .map(|change| {
                vec![
                    format!("  {}", change.name),
                    change.old.clone().unwrap_or_else(|| "none".into()),
                    "→".into(),
                    change.new.clone().unwrap_or_else(|| "none".into()),
                ]
            })
            .collect();
        text.push_str(&report::table(&rows));
    }
    text.push_str(match (updated.is_current(), check, updated.written) {
        (true, _, false) => "everything is current\n",
        (_, true, _) => "pipeline.lock was left as it is\n",
        _ => "wrote pipeline.lock\n",
    });
    text
}
