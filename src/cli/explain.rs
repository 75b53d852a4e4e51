//! `pipeline explain`.

use anyhow::Result;

use super::{Global, ui};
use crate::build::explain::{Explanation, State};
use crate::build::{self, explain};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of the pipeline, or its file; default: the one of this folder
    name: Option<String>,
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    let around = ui::Surroundings::new(global)?;
    let pipeline = around.pipeline(args.name.as_deref())?;
    let context = around.build();
    let prepared = build::prepare(&context, &pipeline, false)?;
    let steps = prepared.plan()?;
    let found = build::look_up(&context, &steps)?;
    let explanation = explain::explain(&around.store, &prepared, &steps, &found)?;
    ui::answer(global, &explanation, || text(&explanation))?;
    Ok(0)
}

fn text(explanation: &Explanation) -> String {
    let head = match (explanation.next, explanation.steps.iter().any(|step| step.state == State::Ran)) {
        (true, _) => format!("the next build of `{}`:\n", explanation.pipeline),
        (false, true) => format!("nothing would run; the last build of `{}` that ran something:\n", explanation.pipeline),
        (false, false) => {
            format!("nothing would run, and no build of `{}` is remembered that ran something:\n", explanation.pipeline)
        }
    };
    let mut text = head;
    for step in &explanation.steps {
        let state = match step.state {
            State::Cached => "cached",
            State::WillRun => "will run",
            State::Ran => "ran",
        };
        text.push_str(&format!("  {}: {state}\n", step.step));
        for change in &step.changes {
            text.push_str(&format!("    because {change}\n"));
        }
    }
    text
}
