//! `pipeline init`.

use std::path::PathBuf;

use anyhow::Result;

use super::{Global, ui};
use crate::build::detect;
use crate::error::Problem;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The project's folder
    #[arg(default_value = ".")]
    dir: PathBuf,
    /// Replace a pipeline.yaml that is there
    #[arg(long)]
    force: bool,
    /// Print the file in place of writing it
    #[arg(long)]
    dry_run: bool,
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    let dir = std::path::absolute(&args.dir)?;
    let file = dir.join("pipeline.yaml");
    if file.exists() && !args.force && !args.dry_run {
        return Err(Problem::usage(format!("`{}` exists", file.display()))
            .hint("`--force` replaces it, `--dry-run` shows what would be written")
            .into());
    }
    let detection = detect::detect(&dir)?;
    let text = detect::pipeline_yaml(&detection);
    if args.dry_run {
        print!("{text}");
        return Ok(0);
    }
    crate::artifact::store::write_atomic(&file, text.as_bytes())?;
    if !global.quiet {
        for reason in &detection.reasons {
            eprintln!("{reason}");
        }
    }
    ui::answer(
        global,
        &serde_json::json!({"schema": 1, "file": file, "name": detection.name.as_str(), "builder": detection.builder, "reasons": detection.reasons}),
        || format!("wrote `{}`; next: pipeline build {}\n", file.display(), detection.name),
    )?;
    Ok(0)
}
