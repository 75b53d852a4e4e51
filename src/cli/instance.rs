//! `pipeline logs` and `exec`: into the instances of an environment, past the daemon, so that they work without one too.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context as _, Result};
use serde_json::json;

use super::daemon::Daemon;
use super::desk::{Office, Place};
use super::{Global, follow, ui};
use crate::config::types as config;
use crate::error::Problem;
use crate::rollout::target::{Found, Target};
use crate::rollout::view::{Color, View};

/// Makes the target of some settings.
pub type Targets = dyn Fn(&ui::Surroundings, &config::Target) -> Result<Box<dyn Target>>;

/// Lines of the log that are shown when nothing is said.
const LINES: usize = 100;

#[derive(Debug, clap::Args)]
pub struct LogsArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    #[command(flatten)]
    which: Which,
    /// So many lines of each instance, the last ones
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = LINES)]
    lines: usize,
    /// Show also what comes, until ^C
    #[arg(long, short)]
    follow: bool,
}

#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    #[command(flatten)]
    which: Which,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Which instances are meant.
#[derive(Debug, clap::Args)]
struct Which {
    /// Of this color; default: the one that serves
    #[arg(long, value_name = "blue|green", value_parser = color)]
    color: Option<Color>,
    /// The instance: its number, TARGET-NUMBER, or its whole name
    #[arg(long, value_name = "INSTANCE")]
    instance: Option<String>,
}

fn color(text: &str) -> Result<Color, String> {
    match text {
        "blue" => Ok(Color::Blue),
        "green" => Ok(Color::Green),
        _ => Err("it is `blue` or `green`".into()),
    }
}

/// An instance, and the settings of its target.
struct Chosen {
    one: One,
    target: Box<dyn Target>,
}

/// An instance as far as choosing needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct One {
    id: String,
    generation: String,
    target: String,
    kind: String,
}

impl One {
    /// Like `web-0`.
    fn label(&self) -> &str {
        let end = self.id.rfind(&self.generation).map(|at| at + self.generation.len() + 1);
        end.and_then(|at| self.id.get(at..)).unwrap_or(&self.id)
    }

    fn is_called(&self, text: &str) -> bool {
        self.id == text || self.label() == text || self.label().rsplit('-').next() == Some(text)
    }
}

pub fn logs(global: &Global, args: LogsArgs, targets: &Targets) -> Result<u8> {
    let chosen = choose(global, &args.environment, args.pipeline.as_deref(), &args.which, targets)?;
    let output = Mutex::new(Output { json: global.json, several: chosen.len() > 1 });
    let over = AtomicBool::new(false);
    let read = |chosen: &Chosen| -> Result<()> {
        let mut rest = Vec::new();
        let mut sink = |chunk: &[u8]| {
            rest.extend_from_slice(chunk);
            let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            let lines: Vec<u8> = rest.drain(..whole).collect();
            if !write(&output, chosen.one.label(), &lines) {
                over.store(true, Ordering::SeqCst);
            }
            !over.load(Ordering::SeqCst)
        };
        chosen.target.logs(&chosen.one.id, args.lines, args.follow, &mut sink)?;
        // A last line without its end.
        if !rest.is_empty() {
            rest.push(b'\n');
            write(&output, chosen.one.label(), &rest);
        }
        Ok(())
    };
    let read = |chosen: &Chosen| read(chosen).with_context(|| format!("cannot read the log of `{}`", chosen.one.id));
    if !args.follow {
        chosen.iter().try_for_each(read)?;
        return Ok(0);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = chosen.iter().map(|chosen| scope.spawn(|| read(chosen))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(0)
}

struct Output {
    json: bool,
    /// Lines say which instance they are of.
    several: bool,
}

/// Writes whole lines; `false`: nobody reads them any more.
fn write(output: &Mutex<Output>, label: &str, lines: &[u8]) -> bool {
    let Ok(output) = output.lock() else { return false };
    let mut text = Vec::new();
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        if output.json {
            let line = String::from_utf8_lossy(line);
            let value = json!({"instance": label, "line": line.trim_end_matches(['\n', '\r'])});
            text.extend_from_slice((value.to_string() + "\n").as_bytes());
        } else {
            if output.several {
                text.extend_from_slice(format!("{label} | ").as_bytes());
            }
            text.extend_from_slice(line);
        }
    }
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(&text).and_then(|()| stdout.flush()).is_ok()
}

/// The exit status is the command's.
pub fn exec(global: &Global, args: ExecArgs, targets: &Targets) -> Result<u8> {
    let chosen = choose(global, &args.environment, args.pipeline.as_deref(), &args.which, targets)?;
    let Some(first) = chosen.first() else { return Ok(1) };
    let interactive = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let status = first
        .target
        .exec(&first.one.id, &args.command, interactive)
        .with_context(|| format!("cannot run `{}` in `{}`", args.command.join(" "), first.one.id))?;
    Ok(u8::try_from(status).unwrap_or(1))
}

/// The instances that are meant, at least one.
fn choose(global: &Global, environment: &str, pipeline: Option<&str>, which: &Which, targets: &Targets) -> Result<Vec<Chosen>> {
    let office = Office::open(global, environment.split_once('/').map(|(name, _)| name).or(pipeline))?;
    let place = office.place(environment, pipeline)?;
    let loaded = office.sit(|desk| desk.load(&place.pipeline))?;
    let policy = loaded.policy.environment(&place.environment).map_err(Problem::from)?;
    if policy.targets.is_empty() {
        return Err(Problem::failed(format!("nothing of `{}` runs: it has no `target`", place.name())).into());
    }
    let daemon = Daemon::of(global, &office.around.host)?;
    let view = daemon.view(&place.name())?;
    let candidates = match &view {
        Some(view) => of_view(view, &place, which.color)?,
        None => {
            if which.color.is_some() {
                return Err(daemon
                    .away()
                    .hint("without it nobody knows which instances are blue; `--instance` names one")
                    .into());
            }
            let mut found = Vec::new();
            for (name, settings) in &policy.targets {
                let all = targets(&office.around, settings)?.list()?;
                let ours = |one: &Found| one.environment == place.name() && one.target == *name;
                found.extend(all.into_iter().filter(ours).map(|found| One {
                    id: found.id,
                    generation: found.generation,
                    target: found.target,
                    kind: settings.kind().to_owned(),
                }));
            }
            found
        }
    };
    let chosen = named(candidates, &place, which.instance.as_deref())?;
    chosen
        .into_iter()
        .map(|one| {
            let settings = policy.targets.get(&one.target).filter(|settings| settings.kind() == one.kind).cloned();
            let settings = settings.unwrap_or_else(|| plain(&one.kind));
            Ok(Chosen { target: targets(&office.around, &settings)?, one })
        })
        .collect()
}

/// Settings of a target that the policy does not have any more.
fn plain(kind: &str) -> config::Target {
    match kind {
        "docker" => config::Target::Docker(config::Docker::default()),
        "vm" => config::Target::Vm(config::Vm::default()),
        _ => config::Target::Local(config::Local::default()),
    }
}

/// The instances of a color, or of what serves, else of what is to serve.
fn of_view(view: &View, place: &Place, color: Option<Color>) -> Result<Vec<One>> {
    let side = match color {
        Some(color) => follow::side(view, color),
        None => view.live.as_ref().or(view.other.as_ref()),
    };
    let Some(side) = side else {
        let what = color.map_or("nothing".to_owned(), |color| format!("nothing {color}"));
        return Err(Problem::failed(format!("{what} runs in `{}`", place.name()))
            .hint(format!("`pipeline status {}` shows what does", place.name()))
            .into());
    };
    let one = |instance: &crate::rollout::view::InstanceView| One {
        id: instance.id.clone(),
        generation: side.generation.clone(),
        target: instance.target.clone(),
        kind: instance.kind.clone(),
    };
    Ok(side.instances.iter().map(one).collect())
}

/// Those that are called `wanted`, or all of one generation.
fn named(candidates: Vec<One>, place: &Place, wanted: Option<&str>) -> Result<Vec<One>> {
    let ids = candidates.iter().map(|one| format!("`{}`", one.id)).collect::<Vec<_>>().join(", ");
    if candidates.is_empty() {
        return Err(Problem::failed(format!("nothing runs in `{}`", place.name())).into());
    }
    let Some(wanted) = wanted else {
        if candidates.iter().any(|one| one.generation != candidates[0].generation) {
            return Err(Problem::usage(format!(
                "two generations run in `{}`, and no daemon says which one serves",
                place.name()
            ))
            .hint(format!("`--instance` with one of {ids}"))
            .into());
        }
        return Ok(candidates);
    };
    let found: Vec<One> = candidates.into_iter().filter(|one| one.is_called(wanted)).collect();
    match found.as_slice() {
        [_] => Ok(found),
        [] => {
            Err(Problem::usage(format!("`{}` has no instance `{wanted}`", place.name())).hint(format!("there are {ids}")).into())
        }
        _ => Err(Problem::usage(format!("`{wanted}` is several instances of `{}`", place.name()))
            .hint(format!("write TARGET-NUMBER or the whole name: {ids}"))
            .into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(id: &str, generation: &str) -> One {
        One { id: id.into(), generation: generation.into(), target: "web".into(), kind: "local".into() }
    }

    #[test]
    fn instances_by_what_they_are_called() {
        let place = Place { pipeline: "shop".into(), environment: "prod".into() };
        let all = vec![
            one("shop-prod-1a2b3c4d5e6f-web-0", "1a2b3c4d5e6f"),
            one("shop-prod-1a2b3c4d5e6f-web-1", "1a2b3c4d5e6f"),
            one("shop-prod-1a2b3c4d5e6f-job-1", "1a2b3c4d5e6f"),
        ];
        let ids = |wanted: Option<&str>| named(all.clone(), &place, wanted).map(|found| found.len()).map_err(|e| e.to_string());
        let cases = [
            (None, Ok(3)),
            (Some("0"), Ok(1)),
            (Some("web-1"), Ok(1)),
            (Some("shop-prod-1a2b3c4d5e6f-job-1"), Ok(1)),
            (Some("1"), Err("`1` is several instances of `shop/prod`".to_owned())),
            (Some("7"), Err("`shop/prod` has no instance `7`".to_owned())),
        ];
        for (wanted, expected) in cases {
            assert_eq!(ids(wanted), expected, "{wanted:?}");
        }
        let two = vec![one("shop-prod-1a2b3c4d5e6f-web-0", "1a2b3c4d5e6f"), one("shop-prod-000000000000-web-0", "000000000000")];
        assert!(named(two.clone(), &place, None).is_err());
        assert_eq!(named(two, &place, Some("shop-prod-000000000000-web-0")).unwrap().len(), 1);
        assert_eq!(all[0].label(), "web-0");
    }
}
