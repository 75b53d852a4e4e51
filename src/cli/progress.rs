//! Progress on standard error: a live view on a terminal, plain lines elsewhere, or JSON.

use std::collections::VecDeque;
use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::Global;
use super::report::{bytes, plain};
use crate::progress::{Event, Outcome, Progress};

/// Lines of the running step that are shown below it.
const LAST_LINES: usize = 4;
/// How often the spinner turns.
const TICK: Duration = Duration::from_millis(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum How {
    /// A live view on a terminal, plain lines elsewhere.
    Auto,
    Plain,
    /// One event per line (docs/progress.md).
    Json,
}

/// What is shown.
#[derive(Debug)]
pub struct Shown {
    kind: Kind,
    quiet: bool,
    verbose: bool,
    color: bool,
}

#[derive(Debug)]
enum Kind {
    Live { bars: MultiProgress, step: Mutex<Option<Running>> },
    Plain,
    Json,
}

#[derive(Debug)]
struct Running {
    bar: ProgressBar,
    title: String,
    last: VecDeque<String>,
}

impl Shown {
    pub fn new(global: &Global) -> Self {
        let terminal = std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let kind = match global.progress {
            How::Json => Kind::Json,
            How::Auto if terminal && !global.quiet => Kind::Live { bars: MultiProgress::new(), step: Mutex::new(None) },
            _ => Kind::Plain,
        };
        let color = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { kind, quiet: global.quiet, verbose: global.verbose, color }
    }

    /// Ends the live view, so that answers and errors stand below it.
    pub fn finish(&self) {
        if let Kind::Live { bars, step } = &self.kind {
            if let Ok(mut step) = step.lock()
                && let Some(running) = step.take()
            {
                running.bar.finish_and_clear();
            }
            let _ = bars.clear();
        }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    fn line(&self, text: &str) {
        match &self.kind {
            Kind::Live { bars, .. } => {
                let _ = bars.println(text);
            }
            _ => eprintln!("{text}"),
        }
    }

    fn start(&self, name: &str, because: &str) {
        match &self.kind {
            Kind::Live { bars, step } => {
                let bar = bars.add(ProgressBar::new_spinner());
                let style = ProgressStyle::with_template("{spinner} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
                bar.set_style(style);
                bar.enable_steady_tick(TICK);
                let title = format!("{name} ({because})");
                bar.set_message(title.clone());
                if let Ok(mut step) = step.lock() {
                    *step = Some(Running { bar, title, last: VecDeque::new() });
                }
            }
            _ => eprintln!("{name}: running, because {because}"),
        }
    }

    fn output(&self, name: &str, line: &str) {
        if self.verbose {
            self.line(&format!("{}: {line}", self.paint("2", name)));
        }
        if let Kind::Live { step, .. } = &self.kind
            && let Ok(mut step) = step.lock()
            && let Some(running) = step.as_mut()
        {
            // Control characters of a step must not move the terminal's cursor.
            let plain: String = line.chars().filter(|c| !c.is_control()).take(100).collect();
            running.last.push_back(plain);
            if running.last.len() > LAST_LINES {
                running.last.pop_front();
            }
            let seconds = running.bar.elapsed().as_secs();
            let below: String = running.last.iter().map(|line| format!("\n    {line}")).collect();
            running.bar.set_message(format!("{} {seconds} s{below}", running.title));
        }
    }

    fn end(&self, name: &str, outcome: Outcome, seconds: f64, size: u64) {
        if let Kind::Live { step, .. } = &self.kind
            && let Ok(mut step) = step.lock()
            && let Some(running) = step.take()
        {
            running.bar.finish_and_clear();
        }
        let text = match outcome {
            Outcome::Ran => format!("{name}: {} in {seconds:.1} s, {}", self.paint("32", "done"), bytes(size)),
            Outcome::Cached => format!("{name}: {}, {}", self.paint("2", "cached"), bytes(size)),
            Outcome::Failed => format!("{name}: {} after {seconds:.1} s", self.paint("31", "failed")),
        };
        self.line(&text);
    }
}

impl Progress for Shown {
    fn event(&self, event: Event) {
        if matches!(self.kind, Kind::Json) {
            eprintln!("{}", serde_json::to_string(&event).unwrap_or_default());
            return;
        }
        if let Event::Warning { text } = &event {
            return self.line(&format!("{} {}", self.paint("33", "warning:"), plain(text)));
        }
        if self.quiet {
            return;
        }
        match event {
            Event::Plan { pipeline, steps, cached } => {
                if cached < steps.len() {
                    self.line(&format!("{pipeline}: {} steps, {cached} cached", steps.len()));
                }
            }
            Event::StepStart { step, because } => self.start(&step, &because),
            Event::StepOutput { step, line } => self.output(&step, &line),
            Event::StepEnd { step, outcome, seconds, bytes } => self.end(&step, outcome, seconds, bytes),
            Event::Note { text } => self.line(&plain(&text)),
            Event::Warning { .. } | Event::Built { .. } => {}
        }
    }
}
