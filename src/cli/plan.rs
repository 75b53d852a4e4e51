//! `pipeline plan`.

use anyhow::Result;
use serde::Serialize;

use super::{Global, report, ui};
use crate::build::plan::Step;
use crate::build::{self, explain};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the pipeline, or its file; default: the one of this folder
    name: Option<String>,
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    show(global, args.name.as_deref())
}

/// One step of the answer.
#[derive(Serialize)]
struct Planned<'a> {
    #[serde(flatten)]
    step: &'a Step,
    cached: bool,
    /// Why it will run.
    because: Option<&'a str>,
}

#[derive(Serialize)]
struct Answer<'a> {
    schema: u32,
    pipeline: String,
    steps: Vec<Planned<'a>>,
}

/// Prints the plan; nothing is run.
pub fn show(global: &Global, name: Option<&str>) -> Result<u8> {
    let around = ui::Surroundings::new(global)?;
    let pipeline = around.pipeline(name)?;
    let context = around.build();
    let prepared = build::prepare(&context, &pipeline, false);
    around.progress.finish();
    let prepared = prepared?;
    let steps = prepared.plan()?;
    let found = build::look_up(&context, &steps)?;
    let because: Vec<String> =
        steps.iter().map(|step| explain::because(&around.store, &prepared, step)).collect::<Result<_>>()?;
    let planned = steps.iter().zip(&found).zip(&because).map(|((step, found), because)| Planned {
        step,
        cached: found.is_some(),
        because: found.is_none().then_some(because.as_str()),
    });
    let answer = Answer { schema: 1, pipeline: pipeline.name.to_string(), steps: planned.collect() };
    ui::answer(global, &answer, || report::plan(&steps, &found, &because))?;
    Ok(0)
}
