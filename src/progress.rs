//! What a running flow tells about itself: values, shown by `cli` and never printed here.

use serde::Serialize;

/// Something that happened in a flow. `--progress json` prints one per line (docs/progress.md).
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The steps of a build and how many are cached.
    Plan {
        pipeline: String,
        steps: Vec<String>,
        cached: usize,
    },
    StepStart {
        step: String,
        because: String,
    },
    /// A line a step printed, secrets masked.
    StepOutput {
        step: String,
        line: String,
    },
    /// `bytes`: size of the layer blob.
    StepEnd {
        step: String,
        outcome: Outcome,
        seconds: f64,
        bytes: u64,
    },
    /// Worth knowing, nothing wrong.
    Note {
        text: String,
    },
    /// Probably wrong, the flow goes on.
    Warning {
        text: String,
    },
    /// The answer of a build.
    Built {
        name: String,
        digest: String,
        seconds: f64,
    },
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Ran,
    Cached,
    Failed,
}

/// Takes events; shared by the threads of a flow.
pub trait Progress: Sync {
    fn event(&self, event: Event);

    fn note(&self, text: String) {
        self.event(Event::Note { text });
    }

    fn warn(&self, text: String) {
        self.event(Event::Warning { text });
    }
}

/// Throws events away.
#[derive(Debug, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _event: Event) {}
}
