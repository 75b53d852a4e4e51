//! `pipeline build`.

use std::path::PathBuf;

use anyhow::Result;

use super::{Global, report, signals, ui};
use super::{bake, release};
use crate::build::{self, Options};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the pipeline, or its file; default: the one of this folder
    name: Option<String>,
    /// Refuse to resolve anything that pipeline.lock does not hold
    #[arg(long, conflicts_with = "update_missing")]
    locked: bool,
    /// Resolve locked packages anew that the archives no longer have, and say so
    #[arg(long)]
    update_missing: bool,
    /// Start a shell in the step that fails, as it was
    #[arg(long)]
    shell: bool,
    /// Show the plan and stop
    #[arg(long)]
    dry_run: bool,
    /// Where work folders are made; default: beside the store
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    #[command(flatten)]
    release: release::ReleaseArgs,
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    if args.dry_run {
        return super::plan::show(global, args.name.as_deref());
    }
    let around = ui::Surroundings::new(global)?;
    let pipeline = around.pipeline(args.name.as_deref())?;
    signals::watch()?;
    let work_dir = args.work_dir.map(std::path::absolute).transpose()?;
    let options =
        Options { locked: args.locked, update_missing: args.update_missing, shell: args.shell, work_dir, untagged: false };
    let built = build::build(&around.build(), &pipeline, &options);
    around.progress.finish();
    let built = built?;
    if !args.release.release {
        ui::answer(global, &built, || report::built(&built))?;
        return Ok(0);
    }
    if pipeline.host.is_some() {
        bake::only(&around, &pipeline.name.to_string())?;
    }
    let made = release::make(global, &around, &pipeline, built, &args.release)?;
    ui::answer(global, &made, || release::text(&made))?;
    Ok(release::status(&made))
}
