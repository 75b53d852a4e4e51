//! `pipeline test`: vm-tests against a disk.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::boot::{MachineArgs, find_disk};
use super::{Global, signals, ui};
use crate::config::types::VmTestFile;
use crate::config::{self, diagnostic, yaml};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::progress::Progress as _;
use crate::release::gate::Tested;
use crate::vm::accelerator::Wanted;
use crate::vm::disk::DiskToBoot;
use crate::vm::settings::Firmware;
use crate::vm::test::run::{self, Around, Outcome};
use crate::vm::test::types::{DiskName, VmTest};
use crate::vm::test::{load, report};
use crate::vm::{Tools, disk, firmware};

/// Folder in which tests are looked for, here and above.
const FOLDER: &str = "vm-tests";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A baked disk (NAME, NAME:TAG, or a file): every test of vm-tests/ that is for it; a pipeline file: the same for its disk;
    /// a vm-test: that one. Default: all of vm-tests/
    #[arg(value_name = "DISK|TEST")]
    what: Vec<String>,
    /// The disk of tests that name none
    #[arg(long, value_name = "NAME|FILE")]
    disk: Option<String>,
    #[command(flatten)]
    machine: MachineArgs,
    /// With UEFI firmware only, whatever the tests say
    #[arg(long, conflicts_with = "bios")]
    uefi: bool,
    /// With SeaBIOS only, whatever the tests say
    #[arg(long)]
    bios: bool,
    /// Go on with the next test when one fails
    #[arg(long)]
    keep_going: bool,
    /// Write the results as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Folder for console logs and screenshots. Default: one in the state folder
    #[arg(long, short, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// A test on a disk.
struct Job {
    test: VmTest,
    disk: DiskToBoot,
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    signals::watch()?;
    let around = ui::Surroundings::new(global)?;
    let tools = Tools::find(&around.host.path)?;
    let find = |name: &str| find_disk(&around.store, name);
    let jobs = jobs(&args, &around.cwd, &find)?;
    let only = match (args.bios, args.uefi) {
        (true, _) => Some(Firmware::Bios),
        (_, true) => Some(Firmware::Uefi),
        _ => None,
    };
    let firmwares = |test: &VmTest| only.map_or_else(|| test.firmware.clone(), |only| vec![only]);
    if jobs.iter().any(|job| firmwares(&job.test).contains(&Firmware::Uefi)) {
        firmware::find(&tools.qemu)?;
    }
    let choice = args.machine.choose(&tools, &around.store)?;
    around.progress.note(format!("accelerator: {}", choice.words));
    let output = args.output.clone().unwrap_or_else(|| around.store.state("vm-tests"));
    let stop = || signals::exit_code().is_some();
    let work = around.store.cache("vm");
    let places =
        Around { tools: &tools, accelerator: &choice, work: &work, output: &output, stop: &stop, progress: &around.progress };
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut not_run: Vec<Outcome> = Vec::new();
    let mut stopped = false;
    for (job, firmware) in jobs.iter().flat_map(|job| firmwares(&job.test).into_iter().map(move |firmware| (job, firmware))) {
        if stopped {
            not_run.push(Outcome::not_run(&job.test, firmware, output.clone()));
            continue;
        }
        let outcome = match run::run(&job.test, &job.disk, firmware, &places) {
            // The signal is the exit status, and what was run is reported.
            Err(_) if stop() => {
                stopped = true;
                not_run.push(Outcome::not_run(&job.test, firmware, output.clone()));
                continue;
            }
            Ok(outcome) => outcome,
            Err(error) => Outcome::unprepared(&job.test, firmware, output.clone(), &error),
        };
        stopped = outcome.failed().is_some() && !args.keep_going;
        run::describe(&outcome, &around.cwd, &mut std::io::stderr().lock())?;
        outcomes.push(outcome);
    }
    around.progress.finish();
    if let Some(file) = &args.junit {
        fs_err::write(file, report::junit(&[outcomes.clone(), not_run].concat()))?;
    }
    let wanted: usize = jobs.iter().map(|job| firmwares(&job.test).len()).sum();
    let failed = outcomes.iter().filter(|outcome| outcome.failed().is_some()).count();
    let value = json!({"schema": 1, "passed": outcomes.len() - failed, "failed": failed, "not_run": wanted - outcomes.len(), "tests": outcomes});
    ui::answer(global, &value, || summary(&outcomes, wanted))?;
    Ok(u8::from(failed > 0))
}

/// Boots the disk with this manifest and runs the test of a gate in it, with each firmware it names.
pub fn boot_for_gate(around: &ui::Surroundings, digest: &Digest, gate: &VmTestFile) -> Result<Tested> {
    let file = PathBuf::from(&gate.file);
    let test =
        crate::vm::test::parse(&file, &gate.text).map_err(|found| Problem::failed(diagnostic::render(&found, &around.cwd)))?;
    let tools = Tools::find(&around.host.path)?;
    let disk = crate::artifact::disk::read(&around.store, digest)?.context("the release's disk is no disk")?;
    let apps = disk.config.apps.clone();
    let disk = DiskToBoot { name: digest.short(), path: crate::bake::disk::raw(&around.store, &disk)?, apps };
    let choice = crate::vm::accelerator::choose(&tools.qemu, Wanted::Auto, &around.store.state("vm"))?;
    let (work, output) = (around.store.cache("vm"), around.store.state("vm-tests"));
    let stop = || signals::exit_code().is_some();
    let places =
        Around { tools: &tools, accelerator: &choice, work: &work, output: &output, stop: &stop, progress: &around.progress };
    for firmware in &test.firmware {
        let outcome = run::run(&test, &disk, *firmware, &places)?;
        if let Some((index, step)) = outcome.failed() {
            let reason = format!("step {} ({}) failed with {}", index + 1, step.title, firmware.as_str());
            return Ok(Tested { passed: false, reason });
        }
    }
    Ok(Tested { passed: true, reason: format!("{} steps passed", test.steps.len()) })
}

fn summary(outcomes: &[Outcome], wanted: usize) -> String {
    let row = |outcome: &Outcome| {
        let how = if outcome.failed().is_some() { "FAILED" } else { "ok" };
        vec![outcome.test.clone(), outcome.firmware.as_str().into(), how.into(), format!("{:.1} s", outcome.seconds)]
    };
    let rows: Vec<Vec<String>> = outcomes.iter().map(row).collect();
    let not_run = wanted - outcomes.len();
    let more =
        if not_run > 0 { format!("{not_run} not run, since one failed; `--keep-going` runs them\n") } else { String::new() };
    super::report::table(&rows) + &more
}

/// What the command line asks for, in its order.
fn jobs(args: &Args, cwd: &Path, find: disk::Finder<'_>) -> Result<Vec<Job>> {
    let mut jobs = Vec::new();
    let given = args.disk.as_deref();
    if args.what.is_empty() {
        for file in tests_near(cwd)? {
            jobs.push(job(load(&file, cwd)?, given, find)?);
        }
    }
    for what in &args.what {
        let is_yaml = what.ends_with(".yaml") || what.ends_with(".yml");
        if is_yaml && !is_pipeline_file(&cwd.join(what), cwd)? {
            jobs.push(job(load(what.as_ref(), cwd)?, given, find)?);
            continue;
        }
        let name = if is_yaml { config::load(what.as_ref(), cwd)?.name.to_string() } else { what.clone() };
        let before = jobs.len();
        for file in tests_near(cwd)? {
            let test = load(&file, cwd)?;
            // A test that names another disk is none of this one's.
            if test.disk.as_ref().is_none_or(|disk| is_for(disk, &name)) {
                jobs.push(Job { disk: find(&name)?, test });
            }
        }
        if jobs.len() == before {
            let message = format!("no test in `{FOLDER}` is for the disk `{name}`");
            return Err(Problem::usage(message).hint("a test says `disk: NAME`, or nothing to be for every disk").into());
        }
    }
    Ok(jobs)
}

fn job(test: VmTest, given: Option<&str>, find: disk::Finder<'_>) -> Result<Job> {
    let disk = match (&test.disk, given) {
        (_, Some(given)) => find(given)?,
        (Some(DiskName::Artifact(name)), None) => find(name)?,
        (Some(DiskName::File(path)), None) => disk::file(path)?,
        (None, None) => {
            let problem = Problem::usage(format!("the test `{}` names no disk", test.name));
            return Err(problem.hint("`pipeline test --disk NAME` names one, or `disk: NAME` in the test").into());
        }
    };
    Ok(Job { test, disk })
}

/// Whether a test for `disk` is one for what was named: the same name, with any tag where the test has none.
fn is_for(disk: &DiskName, named: &str) -> bool {
    match disk {
        DiskName::Artifact(name) => name == named || !name.contains(':') && named.split(':').next() == Some(name),
        DiskName::File(path) => path == Path::new(named),
    }
}

/// The tests of the nearest folder `vm-tests`, by name.
fn tests_near(cwd: &Path) -> Result<Vec<PathBuf>> {
    let Some(folder) = cwd.ancestors().map(|dir| dir.join(FOLDER)).find(|dir| dir.is_dir()) else {
        let message = format!("there is no folder `{FOLDER}` in {} and the folders above it", cwd.display());
        return Err(Problem::usage(message).hint("name a test, or write one: docs/vm-tests.md tells how").into());
    };
    let mut files = Vec::new();
    for entry in fs_err::read_dir(&folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "yaml" || ending == "yml") {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(Problem::usage(format!("there is no test in {}", folder.display())).into());
    }
    Ok(files)
}

/// A pipeline file has a `base`, a vm-test has `steps`.
fn is_pipeline_file(file: &Path, cwd: &Path) -> Result<bool> {
    let text = config::read(file, cwd)?;
    let tree = yaml::parse(file, &text).map_err(|found| Problem::usage(diagnostic::render(&found, cwd)))?;
    Ok(tree.place().key("base").is_there() && !tree.place().key("steps").is_there())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_tests_are_for_a_disk() {
        let artifact = |name: &str| DiskName::Artifact(name.into());
        let cases = [
            (artifact("a"), "a", true),
            (artifact("a"), "a:2", true),
            (artifact("a:1"), "a:2", false),
            (artifact("a:1"), "a:1", true),
            (artifact("b"), "a", false),
            (DiskName::File("/x/a.raw".into()), "a", false),
        ];
        for (disk, named, expected) in cases {
            assert_eq!(is_for(&disk, named), expected, "{disk:?} {named}");
        }
    }
}
