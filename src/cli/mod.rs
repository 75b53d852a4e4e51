//! The command line: one file per verb, each with its `Args` and a `run` that calls one flow and
//! shows its value.
//!
//! The only folder that prints, reads the environment and the clock, and sets the exit code.
//! Answers go to standard output, everything else to standard error.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "this is the level that talks to people")]

mod artifact;
mod bake;
mod boot;
mod build;
mod daemon;
mod desk;
mod diff;
mod disk;
mod doctor;
mod environment;
mod explain;
mod follow;
mod hold;
mod init;
mod instance;
mod ledger;
mod meta;
mod one_instance;
mod plan;
mod progress;
mod promote;
mod prune;
mod registry;
mod release;
mod report;
mod rollout;
mod run;
mod serve;
mod signals;
mod signed;
mod status;
mod switch;
mod targets;
mod test;
mod ui;
mod update;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::rollout::shim;
use crate::sandbox;

/// From source to running, immutable machines, in one binary (x86-64 Linux).
#[derive(Debug, Parser)]
#[command(name = "pipeline", version = env!("PIPELINE_VERSION"), disable_version_flag = true, propagate_version = false, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Option<Verb>,
}

/// Options every verb takes.
#[derive(Debug, Clone, clap::Args)]
pub struct Global {
    /// Keep everything (store, cache, state) below this folder
    #[arg(long, global = true, env = "PIPELINE_ROOT", value_name = "DIR", help_heading = "Global options")]
    root: Option<PathBuf>,
    /// Print the answer as JSON
    #[arg(long, global = true, help_heading = "Global options")]
    json: bool,
    /// How progress is shown on standard error
    #[arg(long, global = true, value_enum, default_value = "auto", value_name = "HOW", help_heading = "Global options")]
    progress: progress::How,
    /// Show errors and warnings only
    #[arg(long, short, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    quiet: bool,
    /// Show every line the steps print
    #[arg(long, short, global = true, help_heading = "Global options")]
    verbose: bool,
    /// Print the version; with --json also commit and embedded builders
    #[arg(long, short = 'V', global = true, help_heading = "Global options")]
    version: bool,
    /// Test only: end this process with SIGKILL at its Nth write, rename or mount; 0 counts them
    #[arg(long, global = true, hide = true, env = "PIPELINE_FAULT")]
    fault: Option<i64>,
    /// Test only: the same for the unshare process
    #[arg(long, global = true, hide = true, env = "PIPELINE_FAULT_INSIDE")]
    fault_inside: Option<i64>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Write a pipeline.yaml for the project in this folder
    Init(init::Args),
    /// Show the steps of a build, their keys, and which would run and why
    Plan(plan::Args),
    /// Build the image of a pipeline
    Build(build::Args),
    /// Bake a built host into a bootable disk
    Bake(bake::Args),
    /// Move pipeline.lock to today's packages
    Update(update::Args),
    /// Say which file, variable, package or base made which step run again
    Explain(explain::Args),
    /// Run an image in the sandbox, its port on 127.0.0.1
    Run(run::Args),
    /// Start a disk in QEMU, its console on the terminal
    Boot(boot::Args),
    /// Run vm-tests: boot disks in QEMU and look at what they do
    Test(test::Args),
    /// Look at, move, verify and prune what is in the store
    #[command(subcommand)]
    Artifact(artifact::Verb),
    /// Bring the environments of a pipeline file into the ledger, list and show them
    #[command(subcommand)]
    Environment(environment::Verb),
    /// Show what is where: release, health, holds, and which gate is waited for
    Status(status::StatusArgs),
    /// Move a release on to an environment, through its gates
    Promote(promote::PromoteArgs),
    /// Say yes to what is to come to an environment
    Approve(hold::ApproveArgs),
    /// Go back to the release that was healthy before, with its configuration; leaves a hold
    Rollback(promote::RollbackArgs),
    /// Bring what runs to what the ledger says, and take the requests for it
    Serve(serve::Args),
    /// Pause, resume or end the rollout of an environment that a daemon serves
    #[command(subcommand)]
    Rollout(rollout::Verb),
    /// Answer the requests of an environment with a message, or let them through again
    Maintenance(rollout::MaintenanceArgs),
    /// Show what the instances of an environment print
    Logs(instance::LogsArgs),
    /// Run a command in an instance of an environment
    Exec(instance::ExecArgs),
    /// Keep automation away from an environment, or let it again
    Hold(hold::HoldArgs),
    /// Let nothing change in an environment
    Freeze(hold::FreezeArgs),
    /// End a freeze
    Thaw(hold::ThawArgs),
    /// Take the bad mark off a release that was rolled back from
    Clear(hold::ClearArgs),
    /// Change the configuration of an environment
    #[command(subcommand)]
    Config(environment::ConfigVerb),
    /// Give a secret of an environment its value
    #[command(subcommand)]
    Secret(environment::SecretVerb),
    /// List the decisions about an environment
    History(status::HistoryArgs),
    /// Compare what two environments have
    Diff(status::DiffArgs),
    /// List decisions, of everybody about everything
    Log(status::LogArgs),
    /// Read every byte of an artifact or release; with keys, also who signed it
    Verify {
        /// NAME, NAME:TAG, NAME@DIGEST or a digest
        artifact: String,
        /// Public key that has to have signed; of several one is enough
        #[arg(long = "key", value_name = "FILE")]
        keys: Vec<PathBuf>,
    },
    /// Find and check the ledger
    #[command(subcommand)]
    Ledger(ledger::Verb),
    /// Make keys that sign releases
    #[command(subcommand)]
    Keys(ledger::KeysVerb),
    /// Tell what this machine can do, what is missing, and the command that fixes it
    Doctor(doctor::Args),
    /// Print the JSON Schema of the pipeline file, or of a vm-test
    Schema(meta::SchemaArgs),
    /// Print a completion script for a shell
    Completions(meta::CompletionsArgs),
    /// Print the manual page
    Man,
    /// Pack a folder as a layer (for the benchmarks)
    #[command(name = "__pack", hide = true)]
    Pack(meta::PackArgs),
    /// Drive one instance of the local target (for the tests)
    #[command(name = "__instance", hide = true, subcommand)]
    Instance(one_instance::Verb),
    /// The traffic switch alone (for the benchmarks)
    #[command(name = "__switch", hide = true)]
    Switch(switch::SwitchArgs),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os().map(|arg| arg.to_string_lossy().into_owned()).collect();
    if args.get(1).is_some_and(|verb| verb == sandbox::VERB) {
        return sandbox::inside::main(&args[2..], &crate::build::inside::call);
    }
    if args.get(1).is_some_and(|verb| verb == shim::VERB) {
        return shim::main(&args[2..], &std::env::var_os("PATH").unwrap_or_default());
    }
    if args.get(1).is_some_and(|verb| verb == crate::serve::sockets::VERB) {
        let held = args.get(2).map_or(Ok(()), |path| serve::hold(std::path::Path::new(path)));
        return held.map_or_else(|error| ExitCode::from(ui::fail(&error, false)), |()| ExitCode::SUCCESS);
    }
    let cli = Cli::parse();
    let counts_faults = cli.global.fault == Some(0);
    if let Some(nth) = cli.global.fault {
        crate::fault::arm(nth);
    }
    let json_errors = matches!(cli.global.progress, progress::How::Json);
    let keeps_steps = matches!(cli.verb, Some(Verb::Build(_) | Verb::Update(_) | Verb::Bake(_)));
    let code = match dispatch(cli) {
        Ok(code) => code,
        // What ended under us because we were told to stop is no failure of its own.
        Err(_) if signals::exit_code().is_some() => ui::fail(&signals::stopped(keeps_steps), json_errors),
        Err(error) => ui::fail(&error, json_errors),
    };
    if counts_faults {
        eprintln!("fault points passed: {}", crate::fault::passed());
    }
    ExitCode::from(signals::exit_code().unwrap_or(code))
}

fn dispatch(cli: Cli) -> Result<u8> {
    let global = cli.global;
    if global.version {
        return meta::version(&global);
    }
    let Some(verb) = cli.verb else {
        // Like a missing argument: usage on standard error, exit 2.
        eprint!("{}", <Cli as clap::CommandFactory>::command().render_help());
        return Ok(2);
    };
    match verb {
        Verb::Init(args) => init::run(&global, args),
        Verb::Plan(args) => plan::run(&global, args),
        Verb::Build(args) => build::run(&global, args),
        Verb::Bake(args) => bake::run(&global, args),
        Verb::Update(args) => update::run(&global, args),
        Verb::Explain(args) => explain::run(&global, args),
        Verb::Run(args) => Ok(run::run(&global, args)),
        Verb::Boot(args) => boot::run(&global, args),
        Verb::Test(args) => test::run(&global, args),
        Verb::Artifact(verb) => artifact::run(&global, verb),
        Verb::Environment(verb) => environment::run(&global, verb),
        Verb::Status(args) => status::status(&global, args),
        Verb::Promote(args) => promote::promote(&global, args),
        Verb::Serve(args) => serve::run(&global, args),
        Verb::Rollout(verb) => rollout::run(&global, verb),
        Verb::Maintenance(args) => rollout::maintenance(&global, args),
        Verb::Logs(args) => instance::logs(&global, args, &targets::target_for),
        Verb::Exec(args) => instance::exec(&global, args, &targets::target_for),
        Verb::Approve(args) => hold::approve(&global, args),
        Verb::Rollback(args) => promote::rollback(&global, args),
        Verb::Hold(args) => hold::hold(&global, args),
        Verb::Freeze(args) => hold::freeze(&global, args),
        Verb::Thaw(args) => hold::thaw(&global, args),
        Verb::Clear(args) => hold::clear(&global, args),
        Verb::Config(verb) => environment::config(&global, verb),
        Verb::Secret(verb) => environment::secret(&global, verb),
        Verb::History(args) => status::history(&global, args),
        Verb::Diff(args) => status::diff(&global, args),
        Verb::Log(args) => status::log(&global, args),
        Verb::Verify { artifact, keys } => {
            artifact::run(&global, artifact::Verb::Verify { image: artifact, keys, rebuild: false })
        }
        Verb::Ledger(verb) => ledger::run(&global, verb),
        Verb::Keys(verb) => ledger::keys(&global, verb),
        Verb::Doctor(args) => doctor::run(&global, args),
        Verb::Schema(args) => meta::schema(&args),
        Verb::Completions(args) => meta::completions(&args),
        Verb::Man => meta::man(),
        Verb::Pack(args) => meta::pack(&args),
        Verb::Instance(verb) => one_instance::run(&global, verb),
        Verb::Switch(args) => switch::run(&args),
    }
}
