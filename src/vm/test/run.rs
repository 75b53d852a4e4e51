//! Does the steps of a vm-test, once for a firmware.
//!
//! A step ends when what it wants is there, when its time is over, or at once when it cannot come any more:
//! the guest panics, the machine ends, a unit fails. Whatever happened, the machine is gone afterwards.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::types::{Action, Condition, Expect, Place, Step, VmTest, Which};
use crate::artifact::store::{Hold, Lock};
use crate::disk::gpt::{self, Gpt};
use crate::disk::table::SECTOR;
use crate::error::Problem;
use crate::progress::{Event, Progress};
use crate::vm::accelerator::Choice;
use crate::vm::agent::Output;
use crate::vm::console::Position;
use crate::vm::disk::{self, DiskToBoot};
use crate::vm::http::{self, Request};
use crate::vm::machine::{Environment, Machine, Trouble};
use crate::vm::settings::{Content, Disk, Firmware, Forward, Settings};
use crate::vm::{Stop, Tools};

/// Time between two questions to the guest: each costs it work.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a failed unit may stay failed before waiting for it is given up.
const DEGRADED: Duration = Duration::from_secs(10);
/// Lines of the console in a report.
const LINES: usize = 30;
/// Longest part of an output in a report, in characters.
const SHOWN: usize = 2000;

/// What a run stands on.
#[expect(missing_debug_implementations, reason = "closures have none")]
pub struct Around<'a> {
    pub tools: &'a Tools,
    pub accelerator: &'a Choice,
    /// Folder for machines.
    pub work: &'a Path,
    /// Folder for console logs and pictures; each test and firmware has one of its own in it.
    pub output: &'a Path,
    pub stop: Stop<'a>,
    pub progress: &'a dyn Progress,
}

/// How a test went with one firmware.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Outcome {
    /// The file's name without `.yaml`.
    pub test: String,
    pub file: PathBuf,
    pub firmware: Firmware,
    pub steps: Vec<StepOutcome>,
    pub seconds: f64,
    /// Console log and pictures.
    pub folder: PathBuf,
    /// The last lines of the console, when it failed.
    pub console: Vec<String>,
}

impl Outcome {
    /// The outcome of a test whose machine could not be prepared.
    pub fn unprepared(test: &VmTest, firmware: Firmware, folder: PathBuf, error: &anyhow::Error) -> Self {
        let chain: Vec<String> = error.chain().map(ToString::to_string).collect();
        let hints: Vec<String> = crate::error::hints(error).into_iter().map(|hint| format!("hint: {hint}")).collect();
        let came = [vec![chain.join(": ")], hints].concat().join("\n");
        let result = StepResult::Failed { expected: "a machine".into(), came };
        let first = StepOutcome { title: "prepare the machine".into(), line: 1, seconds: 0.0, result };
        Self { steps: [vec![first], skipped(test)].concat(), ..Self::not_run(test, firmware, folder) }
    }

    /// The outcome of a test that was not run because one before it failed.
    pub fn not_run(test: &VmTest, firmware: Firmware, folder: PathBuf) -> Self {
        let (name, file) = (test.name.clone(), test.file.clone());
        Self { test: name, file, firmware, steps: skipped(test), seconds: 0.0, folder, console: Vec::new() }
    }

    pub fn failed(&self) -> Option<(usize, &StepOutcome)> {
        self.steps.iter().enumerate().find(|(_, step)| matches!(step.result, StepResult::Failed { .. }))
    }
}

fn skipped(test: &VmTest) -> Vec<StepOutcome> {
    let skip =
        |step: &Step| StepOutcome { title: step.title.clone(), line: step.line, seconds: 0.0, result: StepResult::Skipped };
    test.steps.iter().map(skip).collect()
}

#[derive(Debug, Clone, serde::Serialize)]
pub struct StepOutcome {
    pub title: String,
    /// In the file.
    pub line: usize,
    pub seconds: f64,
    #[serde(flatten)]
    pub result: StepResult,
}

#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(tag = "result", rename_all = "lowercase")]
pub enum StepResult {
    Passed,
    Failed {
        expected: String,
        came: String,
    },
    /// An earlier one failed.
    Skipped,
}

/// Why a step failed.
enum Fault {
    /// What was expected, and what came.
    Unmet(String, String),
    Trouble(Trouble),
}

impl From<Trouble> for Fault {
    fn from(trouble: Trouble) -> Self {
        Fault::Trouble(trouble)
    }
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        Fault::Trouble(Trouble::Failed(error))
    }
}

type Done<T = ()> = Result<T, Fault>;

/// Runs `test` on `disk` with `firmware`.
///
/// # Errors
/// The machine cannot be prepared, or the run was asked to stop. What the test finds is in the outcome.
pub fn run(test: &VmTest, disk: &DiskToBoot, firmware: Firmware, around: &Around<'_>) -> Result<Outcome> {
    let name = format!("{}-{}", test.name, firmware.as_str());
    let folder = around.output.join(&name);
    fs_err::create_dir_all(around.output)?;
    let lock = around.output.join(format!(".{name}.lock"));
    let Some(_alone) = Lock::try_now(&lock, Hold::Exclusive)? else {
        let problem = Problem::failed(format!("`{}` is being run by another process", test.name));
        return Err(problem.hint("with `--output DIR` each run has its own folder").into());
    };
    if folder.exists() {
        fs_err::remove_dir_all(&folder)?;
    }
    fs_err::create_dir(&folder)?;
    let environment = Environment {
        tools: around.tools,
        accelerator: around.accelerator,
        work: around.work,
        log: &folder.join("console.log"),
        sink: None,
        stop: around.stop,
        once: false,
    };
    let mut machine = Machine::prepare(settings(test, disk, firmware)?, environment)?;
    machine.panic_allowed = test.allow_panic;
    let since = machine.console().end();
    let mut runner = Runner { machine, since, saved: BTreeMap::new(), folder: &folder, told: since };
    let started = Instant::now();
    let mut steps: Vec<StepOutcome> = Vec::new();
    let label = format!("{} ({})", test.name, firmware.as_str());
    let mut failed = false;
    for (index, step) in test.steps.iter().enumerate() {
        let begun = Instant::now();
        let result = if failed { StepResult::Skipped } else { runner.step(step) };
        let seconds = begun.elapsed().as_secs_f64();
        if (around.stop)() {
            return Err(Problem::failed(format!("{label} was stopped")).into());
        }
        runner.tell_console(&label, around.progress);
        if !failed {
            let how = if result == StepResult::Passed { "ok" } else { "FAILED" };
            let count = test.steps.len();
            around.progress.note(format!("{label}: {}/{count} {}: {how}, {seconds:.1} s", index + 1, step.title));
        }
        failed = failed || result != StepResult::Passed;
        steps.push(StepOutcome { title: step.title.clone(), line: step.line, seconds, result });
    }
    let console = if failed { runner.machine.console().last_lines(LINES) } else { Vec::new() };
    if let Some(error) = runner.machine.console().log_error() {
        around.progress.warn(format!("the console log of {label} is not complete: {error}"));
    }
    let seconds = started.elapsed().as_secs_f64();
    drop(runner);
    Ok(Outcome { test: test.name.clone(), file: test.file.clone(), firmware, steps, seconds, folder, console })
}

/// The machine of a test.
fn settings(test: &VmTest, disk: &DiskToBoot, firmware: Firmware) -> Result<Settings> {
    let hardware = &test.machine;
    let first = Disk {
        content: Content::File { path: disk.path.clone(), format: disk::format(&disk.path)?, keep: false },
        bus: hardware.bus,
        size: hardware.size,
    };
    Ok(Settings {
        board: hardware.board,
        cpu: hardware.cpu.clone(),
        memory: hardware.memory,
        cpus: hardware.cpus,
        card: hardware.card,
        forward: hardware.forward.iter().map(|port| Forward { host: None, guest: *port }).collect(),
        credentials: hardware.credentials.clone(),
        extra: hardware.qemu.clone(),
        ..Settings::new(firmware, [vec![first], hardware.disks.clone()].concat())
    })
}

struct Runner<'r> {
    machine: Machine<'r>,
    /// Where the console was when the test last switched the machine on or rebooted it.
    since: Position,
    /// Where it was when it was last told as progress.
    told: Position,
    saved: BTreeMap<String, String>,
    folder: &'r Path,
}

impl Runner<'_> {
    fn step(&mut self, step: &Step) -> StepResult {
        let end = Instant::now() + step.timeout;
        match self.act(&step.action, end, step.timeout) {
            Ok(()) => StepResult::Passed,
            Err(Fault::Unmet(expected, came)) => StepResult::Failed { expected, came },
            Err(Fault::Trouble(trouble)) => {
                let came = match trouble {
                    Trouble::TimedOut => format!("nothing of it within {} s", step.timeout.as_secs()),
                    // The chain, as an error is shown.
                    Trouble::Failed(error) => error.chain().map(ToString::to_string).collect::<Vec<_>>().join(": "),
                    other => other.to_string(),
                };
                StepResult::Failed { expected: step.title.clone(), came }
            }
        }
    }

    fn tell_console(&mut self, label: &str, progress: &dyn Progress) {
        for line in self.machine.console().lines_from(&mut self.told) {
            progress.event(Event::StepOutput { step: label.to_owned(), line });
        }
    }

    fn act(&mut self, action: &Action, end: Instant, timeout: Duration) -> Done {
        match action {
            Action::Boot => self.boot(),
            Action::WaitFor(condition) => self.wait_for(condition, end, timeout),
            Action::Http { port, request, status, body } => self.http(*port, request, *status, body, end),
            Action::Run { argv, status, stdout, stderr, save } => {
                let output = self.command(argv, end)?;
                self.judge(&output, *status, stdout, stderr)?;
                if let Some(name) = save {
                    let text = String::from_utf8_lossy(&output.stdout).trim_end_matches(['\n', '\r']).to_owned();
                    self.saved.insert(name.clone(), text);
                }
                Ok(())
            }
            Action::File { path, exists, content, mode, owner } => {
                self.file(&self.fill(path), *exists, content, *mode, owner.as_deref(), end)
            }
            Action::Write { path, text, mode } => {
                let (path, text) = (self.fill(path), self.fill(text));
                let left = end.saturating_duration_since(Instant::now());
                let output = self.machine.write_file(&path, *mode, text.as_bytes(), left)?;
                self.judge(&output, 0, &Expect::default(), &Expect::default())
            }
            Action::Type(text) => Ok(self.machine.send(&self.fill(text))?),
            Action::Reboot { hard, wait } => self.reboot(*hard, *wait, end),
            Action::PowerCut { start } => {
                if !self.machine.is_running() {
                    return Err(Fault::Unmet("a machine that runs".into(), "it is off already".into()));
                }
                self.machine.cut();
                if *start { self.boot() } else { Ok(()) }
            }
            Action::PowerOff => self.power_off(end),
            Action::Screenshot(name) => {
                let file = std::path::absolute(self.folder.join(name)).context("the current folder is gone")?;
                Ok(self.machine.screenshot(&file)?)
            }
            Action::Flip { disk, partition, place } => self.flip(*disk, partition.as_ref(), place),
        }
    }

    /// Puts saved variables in; what is not saved stays, being the shell's.
    fn fill(&self, text: &str) -> String {
        self.saved.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("${{{name}}}"), value))
    }

    fn boot(&mut self) -> Done {
        if self.machine.is_running() {
            return Err(Fault::Unmet("a machine that is off".into(), "it runs already".into()));
        }
        self.since = self.machine.console().end();
        Ok(self.machine.start()?)
    }

    fn wait_for(&mut self, condition: &Condition, end: Instant, timeout: Duration) -> Done {
        match condition {
            Condition::Console { text, count } => {
                let (mut from, mut found) = (self.since, 0);
                let result = self.machine.wait(end, |machine| {
                    while found < *count && machine.console().find(text, &mut from) {
                        found += 1;
                    }
                    Ok((found >= *count).then_some(()))
                });
                match result {
                    Err(Trouble::TimedOut) if *count > 1 => {
                        let came = format!("it was there {found} times within {} s", timeout.as_secs());
                        Err(Fault::Unmet(format!("`{text}` on the console {count} times"), came))
                    }
                    result => Ok(result?),
                }
            }
            Condition::Agent => match self.machine.wait(end, |machine| Ok(machine.boot_id())) {
                Err(Trouble::TimedOut) => {
                    let came = format!("its agent did not answer within {} s", timeout.as_secs());
                    Err(Fault::Unmet("a guest that takes commands".into(), came))
                }
                result => Ok(result.map(drop)?),
            },
            Condition::Unit { name, state } => self.wait_for_unit(name, state, end),
            Condition::Port(port) => self.wait_for_port(*port, end),
            Condition::Running => self.wait_for_running(end),
            Condition::Command(argv) => self.poll(end, |runner, left| {
                let output = runner.command(argv, left)?;
                Ok(match output.status {
                    0 if output.signal == 0 && !output.timed_out => Ok(()),
                    _ => Err(("status 0".into(), told(&output))),
                })
            }),
            Condition::Panic => {
                let before = self.machine.panics();
                Ok(self
                    .machine
                    .wait(end, |machine| Ok((machine.new_panic().is_some() || machine.panics() > before).then_some(())))?)
            }
            Condition::Off => Ok(self.wait_for_off(end)?),
        }
    }

    /// Asks now and then until the answer is good; the last bad one is told when the time is over.
    fn poll(&mut self, end: Instant, mut ask: impl FnMut(&mut Self, Instant) -> Done<Result<(), (String, String)>>) -> Done {
        let mut last: Option<(String, String)> = None;
        loop {
            match (ask(self, end), last.take()) {
                (Ok(Ok(())), _) => return Ok(()),
                (Ok(Err(unmet)), _) => last = Some(unmet),
                // It comes up anew: not yet.
                (Err(Fault::Trouble(Trouble::Restarted)), before) => last = before,
                // Nothing came to the last question; what came before says more.
                (Err(Fault::Trouble(Trouble::TimedOut)), Some((expected, came))) => return Err(Fault::Unmet(expected, came)),
                (Err(fault), _) => return Err(fault),
            }
            let next = (Instant::now() + AGAIN).min(end);
            match self.machine.wait(next, |_| Ok(None::<()>)) {
                Err(Trouble::TimedOut) => {}
                Err(trouble) => return Err(trouble.into()),
                Ok(()) => {}
            }
            if Instant::now() >= end {
                let (expected, came) = last.unwrap_or_default();
                return Err(Fault::Unmet(expected, came));
            }
        }
    }

    fn wait_for_unit(&mut self, name: &str, state: &str, end: Instant) -> Done {
        let argv = ["systemctl", "is-active", "--", name].map(str::to_owned);
        let mut failed: Option<Instant> = None;
        self.poll(end, |runner, end| {
            let output = runner.command(&argv, end)?;
            let now = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            if now == state {
                return Ok(Ok(()));
            }
            let unmet = (format!("unit `{name}` {state}"), format!("it is {now}"));
            if now != "failed" {
                failed = None;
            } else if failed.get_or_insert_with(Instant::now).elapsed() > DEGRADED {
                let (expected, came) = unmet;
                return Err(Fault::Unmet(expected, format!("{came}\n{}", runner.status_of(name, end)?)));
            }
            Ok(Err(unmet))
        })
    }

    fn status_of(&mut self, unit: &str, end: Instant) -> Done<String> {
        let argv = ["systemctl", "status", "--no-pager", "--full", "--", unit].map(str::to_owned);
        Ok(short(&self.command(&argv, end)?.stdout))
    }

    /// Behind a forwarder every connection is accepted, so the guest is asked who listens.
    fn wait_for_port(&mut self, port: u16, end: Instant) -> Done {
        let argv = ["cat", "/proc/net/tcp", "/proc/net/tcp6"].map(str::to_owned);
        self.poll(end, |runner, end| {
            let output = runner.command(&argv, end)?;
            let ports = listening(&String::from_utf8_lossy(&output.stdout));
            let shown: Vec<String> = ports.iter().map(ToString::to_string).collect();
            let came =
                if shown.is_empty() { "nobody listens on any".into() } else { format!("listened on are {}", shown.join(", ")) };
            Ok(if ports.contains(&port) { Ok(()) } else { Err((format!("port {port} listened on"), came)) })
        })
    }

    fn wait_for_running(&mut self, end: Instant) -> Done {
        let argv = ["systemctl", "is-system-running"].map(str::to_owned);
        let mut degraded: Option<Instant> = None;
        self.poll(end, |runner, end| {
            let output = runner.command(&argv, end)?;
            let now = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            if now == "running" {
                return Ok(Ok(()));
            }
            let expected = "a system that is running, all units up".to_owned();
            if now != "degraded" {
                degraded = None;
                return Ok(Err((expected, format!("it is {now}"))));
            }
            let argv = ["systemctl", "--failed", "--no-legend", "--plain"].map(str::to_owned);
            let units = runner.command(&argv, end)?;
            let came = format!("it is degraded; failed are:\n{}", short(&units.stdout));
            if degraded.get_or_insert_with(Instant::now).elapsed() > DEGRADED {
                return Err(Fault::Unmet(expected, came));
            }
            Ok(Err((expected, came)))
        })
    }

    fn wait_for_off(&mut self, end: Instant) -> Result<(), Trouble> {
        use crate::vm::machine::End;
        self.machine.wait(end, |machine| Ok((machine.ended() == Some(End::PowerOff)).then_some(())))
    }

    fn command(&mut self, argv: &[String], end: Instant) -> Done<Output> {
        let argv: Vec<String> = argv.iter().map(|word| self.fill(word)).collect();
        let words: Vec<&str> = argv.iter().map(String::as_str).collect();
        let left = end.saturating_duration_since(Instant::now());
        let answers = self.machine.wait(end, |machine| Ok(machine.boot_id()));
        if let Err(Trouble::TimedOut) = answers {
            let came = format!("its agent did not answer within {} s", left.as_secs());
            return Err(Fault::Unmet("a guest that takes commands".into(), came));
        }
        answers?;
        let left = end.saturating_duration_since(Instant::now());
        Ok(self.machine.run(&words, left)?)
    }

    fn judge(&self, output: &Output, status: i32, stdout: &Expect, stderr: &Expect) -> Done {
        if output.timed_out {
            return Err(Fault::Unmet("a command that ends".into(), format!("its time was over: {}", told(output))));
        }
        if output.signal != 0 || output.status != status {
            return Err(Fault::Unmet(format!("status {status}"), told(output)));
        }
        for (name, expect, bytes) in [("stdout", stdout, &output.stdout), ("stderr", stderr, &output.stderr)] {
            if let Some(unmet) = expect.unmet(bytes, &|text| self.fill(text)) {
                return Err(Fault::Unmet(format!("on {name} {unmet}"), told(output)));
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &str, exists: bool, content: &Expect, mode: Option<u32>, owner: Option<&str>, end: Instant) -> Done {
        let argv = ["stat", "--format", "%a %U:%G %F", "--", path].map(str::to_owned);
        let output = self.command(&argv, end)?;
        let is_there = output.status == 0 && output.signal == 0;
        if is_there != exists {
            let expected = if exists { "the file there" } else { "no such file" };
            let came = if is_there { format!("it is there: {}", short(&output.stdout)) } else { short(&output.stderr) };
            return Err(Fault::Unmet(format!("{expected}: {path}"), came));
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut words = text.split_whitespace();
        let (found_mode, found_owner) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if let Some(mode) = mode
            && u32::from_str_radix(found_mode, 8) != Ok(mode)
        {
            return Err(Fault::Unmet(format!("mode {mode:04o} of {path}"), format!("mode {found_mode:0>4}")));
        }
        if let Some(owner) = owner
            && found_owner != owner
        {
            return Err(Fault::Unmet(format!("owner {owner} of {path}"), format!("owner {found_owner}")));
        }
        if !content.is_anything() {
            let output = self.command(&["cat", "--", path].map(str::to_owned), end)?;
            self.judge(&output, 0, content, &Expect::default())?;
        }
        Ok(())
    }

    fn http(&mut self, port: u16, request: &Request, status: u16, body: &Expect, end: Instant) -> Done {
        let ports = self.machine.ports();
        let forwarded = ports.iter().find(|(_, guest)| *guest == port).map(|(host, _)| *host);
        let forwarded =
            forwarded.with_context(|| format!("port {port} is not forwarded: is the machine on, with a network card?"))?;
        let request = Request { path: self.fill(&request.path), ..request.clone() };
        let request = Request { body: self.fill(&String::from_utf8_lossy(&request.body)).into_bytes(), ..request };
        self.poll(end, |runner, end| {
            // Not longer than a moment each time: the wait between is what notices a panic.
            let left = end.saturating_duration_since(Instant::now()).min(Duration::from_secs(10));
            let answer = match http::ask(forwarded, &request, left.max(Duration::from_millis(1))) {
                Ok(answer) => answer,
                Err(error) => return Ok(Err((format!("status {status}"), format!("{error:#}")))),
            };
            let came = format!("status {} with the body:\n{}", answer.status, short(&answer.body));
            if answer.status != status {
                return Ok(Err((format!("status {status}"), came)));
            }
            let unmet = body.unmet(&answer.body, &|text| runner.fill(text));
            Ok(unmet.map_or(Ok(()), |unmet| Err((format!("as body {unmet}"), came))))
        })
    }

    fn reboot(&mut self, hard: bool, wait: Option<bool>, end: Instant) -> Done {
        let before = self.machine.boot_id();
        let resets = self.machine.resets();
        let since = self.machine.console().end();
        if hard {
            self.machine.press_reset()?;
        } else {
            let Some(_) = &before else {
                let hint = "the guest has no agent that could be asked; `hard: true` presses the reset button";
                return Err(Fault::Unmet("a guest that takes commands".into(), hint.into()));
            };
            // The answer may not come any more.
            self.machine.begin(&["systemctl", "reboot"], Duration::from_secs(60))?;
        }
        self.machine.wait(end, |machine| Ok((machine.resets() > resets).then_some(())))?;
        self.since = since;
        if wait.unwrap_or(before.is_some()) {
            self.machine.wait(end, |machine| Ok(machine.boot_id().filter(|id| before.as_ref() != Some(id))))?;
        }
        Ok(())
    }

    fn power_off(&mut self, end: Instant) -> Done {
        if !self.machine.is_running() {
            return Err(Fault::Unmet("a machine that runs".into(), "it is off already".into()));
        }
        if self.machine.boot_id().is_some() {
            self.machine.begin(&["systemctl", "poweroff"], Duration::from_secs(60))?;
        } else {
            self.machine.press_power()?;
        }
        Ok(self.wait_for_off(end)?)
    }

    fn flip(&mut self, index: usize, partition: Option<&Which>, place: &Place) -> Done {
        if index >= self.machine.drives().len() {
            return Err(Fault::Unmet(format!("disk {index}"), format!("there are {}", self.machine.drives().len())));
        }
        let (start, size) = match partition {
            None => (0, None),
            Some(which) => {
                let start = self.machine.read_disk(index, 0, gpt::PRIMARY_SECTORS * SECTOR)?;
                let table = Gpt::of_start(&start).map_err(anyhow::Error::from)?.partitions;
                let found = table.iter().find(|partition| match which {
                    Which::Number(number) => partition.number == *number,
                    Which::Name(name) => partition.name == *name,
                });
                let names: Vec<String> =
                    table.iter().map(|partition| format!("{} `{}`", partition.number, partition.name)).collect();
                let found = found
                    .ok_or_else(|| Fault::Unmet(format!("partition {which:?}"), format!("there are {}", names.join(", "))))?;
                (found.first * SECTOR, Some((found.last + 1 - found.first) * SECTOR))
            }
        };
        let offset = match place {
            Place::Offset(offset) => *offset,
            Place::Text(text) => {
                let found = self.machine.find_on_disk(index, start, size, self.fill(text).as_bytes())?;
                found.ok_or_else(|| Fault::Unmet(format!("{text:?} on the disk"), "it is not there".into()))?
            }
        };
        if size.is_some_and(|size| offset >= size) {
            return Err(Fault::Unmet(format!("byte {offset}"), format!("the partition has {} bytes", size.unwrap_or_default())));
        }
        let old = self.machine.read_disk(index, start + offset, 1)?;
        Ok(self.machine.write_disk(index, old[0] ^ 0xff, start + offset, 1)?)
    }
}

/// TCP ports in state LISTEN (0A) of `/proc/net/tcp` and `tcp6` (proc(5)), sorted.
fn listening(text: &str) -> Vec<u16> {
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [_, local, _, "0A", ..] => u16::from_str_radix(local.rsplit(':').next()?, 16).ok(),
            _ => None,
        }
    };
    let mut ports: Vec<u16> = text.lines().filter_map(row).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// What a command left, for a report.
fn told(output: &Output) -> String {
    let how = if output.signal != 0 { format!("signal {}", output.signal) } else { format!("status {}", output.status) };
    let mut text = how;
    for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
        if bytes.is_empty() {
            text += &format!(", nothing on {name}");
        } else {
            text += &format!(", on {name}:\n{}\n", short(bytes));
        }
    }
    text.trim_end().to_owned()
}

/// The end of a long text, without control characters.
fn short(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let clean: Vec<char> = text.trim_end().chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect();
    let cut = clean.len().saturating_sub(SHOWN);
    let text: String = clean[cut..].iter().collect();
    if cut > 0 { format!("…{text}") } else { text }
}

/// Writes the whole report of `outcome` for people.
pub fn describe(outcome: &Outcome, cwd: &Path, to: &mut dyn Write) -> std::io::Result<()> {
    let Some((index, step)) = outcome.failed() else { return Ok(()) };
    let StepResult::Failed { expected, came } = &step.result else { return Ok(()) };
    let file = outcome.file.strip_prefix(cwd).unwrap_or(&outcome.file);
    let (test, firmware, count) = (&outcome.test, outcome.firmware.as_str(), outcome.steps.len());
    writeln!(to, "error: `{test}` ({firmware}) failed in step {} of {count}, {}", index + 1, step.title)?;
    writeln!(to, "  at: {}:{}", file.display(), step.line)?;
    writeln!(to, "  expected: {}", indented(expected))?;
    writeln!(to, "  came: {}", indented(came))?;
    if outcome.console.is_empty() {
        writeln!(to, "  the console is empty")?;
    } else {
        writeln!(to, "  the last lines of the console:")?;
        outcome.console.iter().try_for_each(|line| writeln!(to, "    | {line}"))?;
    }
    writeln!(to, "hint: the whole console is in {}", outcome.folder.join("console.log").display())
}

fn indented(text: &str) -> String {
    text.replace('\n', "\n    ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_listened_on() {
        let text = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                    0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n   \
                    1: 0100007F:1F91 0100007F:0016 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n  \
                    sl  local_address                         remote_address                        st\n   \
                    0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:0 0 0 0 1\n";
        assert_eq!(listening(text), [22, 8080]);
    }

    #[test]
    fn a_report_says_step_place_expected_came_and_console() {
        let step = |title: &str, line, result| StepOutcome { title: title.into(), line, seconds: 0.5, result };
        let failed = StepResult::Failed { expected: "status 0".into(), came: "status 1, on stdout:\nno".into() };
        let outcome = Outcome {
            test: "smoke".into(),
            file: "/w/vm-tests/smoke.yaml".into(),
            firmware: Firmware::Uefi,
            steps: vec![
                step("boot", 3, StepResult::Passed),
                step("run `false`", 4, failed),
                step("power-off", 5, StepResult::Skipped),
            ],
            seconds: 1.0,
            folder: "/s/smoke-uefi".into(),
            console: vec!["login:".into()],
        };
        let mut text = Vec::new();
        describe(&outcome, Path::new("/w"), &mut text).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "error: `smoke` (uefi) failed in step 2 of 3, run `false`\n  at: vm-tests/smoke.yaml:4\n  expected: status 0\n  \
             came: status 1, on stdout:\n    no\n  the last lines of the console:\n    | login:\n\
             hint: the whole console is in /s/smoke-uefi/console.log\n"
        );
    }
}
