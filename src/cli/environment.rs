//! `pipeline environment apply|list|show`, `config set`, `secret set`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::desk::Office;
use super::follow::Until;
use super::promote::{self, Reasons};
use super::{Global, report, ui};
use crate::config::check::rollout;
use crate::config::types::{SecretRef, Upstream};
use crate::error::{self, Problem};
use crate::progress::Progress as _;
use crate::release::desk::{Applied, Outcome};
use crate::release::mirror::{Became, What};
use crate::release::policy::{self, Policy};
use crate::release::promotion::Action;

/// Exit status when tags are not set and trying again may help.
const UNSET: u8 = 75;
/// Bytes of a secret; a larger one is a file of the application.
const SECRET_MAX: usize = 1 << 20;

#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Make the environments, gates and people of the pipeline file count: commit them to the ledger
    Apply {
        /// Name of the pipeline, or its file; default: the one of this folder
        pipeline: Option<String>,
        /// Why; kept in the ledger
        #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
        reason: String,
        /// Show what would change and stop
        #[arg(long)]
        dry_run: bool,
    },
    /// List the environments that the ledger has
    List {
        /// Name of the pipeline; default: all
        pipeline: Option<String>,
    },
    /// Show one environment: where it takes releases from, its gates, its configuration
    Show {
        /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
        environment: String,
        /// Name of the pipeline
        #[arg(long, short, value_name = "NAME")]
        pipeline: Option<String>,
    },
    /// Compare the registry's tags with what the environments have, and set those that are behind
    Tags {
        /// PIPELINE or PIPELINE/ENVIRONMENT; default: this folder's pipeline
        name: Option<String>,
        /// Set also tags that somebody moved by hand
        #[arg(long)]
        retag: bool,
    },
}

#[derive(Debug, clap::Subcommand)]
pub enum ConfigVerb {
    /// Change values: a new state, which is promoted and rolled back like a release
    Set {
        /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
        environment: String,
        /// KEY=VALUE, or KEY to take it away
        #[arg(required = true, value_name = "KEY=VALUE")]
        values: Vec<String>,
        /// Name of the pipeline
        #[arg(long, short, value_name = "NAME")]
        pipeline: Option<String>,
        #[command(flatten)]
        reasons: Reasons,
    },
}

#[derive(Debug, clap::Subcommand)]
pub enum SecretVerb {
    /// Give a secret the value that standard input has; the ledger keeps a name for it only
    Set {
        /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
        environment: String,
        /// Name of the secret
        key: String,
        /// Name of the pipeline
        #[arg(long, short, value_name = "NAME")]
        pipeline: Option<String>,
        #[command(flatten)]
        reasons: Reasons,
    },
}

pub fn run(global: &Global, verb: Verb) -> Result<u8> {
    match verb {
        Verb::Apply { pipeline, reason, dry_run } => apply(global, pipeline.as_deref(), &reason, dry_run),
        Verb::List { pipeline } => list(global, pipeline.as_deref()),
        Verb::Show { environment, pipeline } => show(global, &environment, pipeline.as_deref()),
        Verb::Tags { name, retag } => tags(global, name.as_deref(), retag),
    }
}

/// Exit status 1 when somebody moved a tag or the registry refused one, 75 when trying again may help.
fn tags(global: &Global, name: Option<&str>, retag: bool) -> Result<u8> {
    let (pipeline, environment) = match name.map(|name| name.split_once('/').unwrap_or((name, ""))) {
        Some((pipeline, environment)) => (Some(pipeline), Some(environment).filter(|name| !name.is_empty())),
        None => (None, None),
    };
    let office = Office::open_to_read(global, pipeline)?;
    let pipeline = office.pipeline(pipeline)?;
    let loaded = office.sit(|desk| {
        desk.sync(true)?;
        desk.load(&pipeline)
    })?;
    if let Some(environment) = environment {
        loaded.policy.environment(environment).map_err(Problem::from)?;
    }
    if loaded.policy.registry.is_none() {
        return Err(Problem::usage(format!("`{pipeline}` has no `registry` whose tags could follow its environments"))
            .hint("like `registry: registry.example/team/shop` in the pipeline file, then `pipeline environment apply`")
            .into());
    }
    let what = if retag { What::Retag } else { What::All };
    let told = office.mirror(|mirror| mirror.publish(&pipeline, environment, what))?;
    ui::answer(global, &json!({"schema": 1, "tags": told}), || {
        let rows = told.iter().map(|told| {
            let became = match &told.became {
                Became::Set { .. } => "set".to_owned(),
                Became::Stands => "stands".into(),
                Became::Moved { to } => format!("MOVED by somebody to {to}"),
                Became::Later { .. } => "not set yet".into(),
            };
            vec![told.tag.clone(), told.version.clone(), told.release.short(), became]
        });
        report::table(&rows.collect::<Vec<_>>())
    })?;
    let bad = |became: &Became| matches!(became, Became::Moved { .. } | Became::Later { passes: false, .. });
    let passes = told.iter().any(|told| matches!(told.became, Became::Later { passes: true, .. }));
    Ok(if told.iter().any(|told| bad(&told.became)) { 1 } else { u8::from(passes) * UNSET })
}

fn apply(global: &Global, pipeline: Option<&str>, reason: &str, dry_run: bool) -> Result<u8> {
    let office = Office::open(global, pipeline)?;
    let file = office.around.pipeline(pipeline)?;
    if file.releases.environments.is_empty() {
        return Err(Problem::usage(format!("`{}` has no `environments`", file.name))
            .hint("docs/environments.md shows how they are written")
            .into());
    }
    let read = |path: &Path| -> Result<String> { Ok(fs_err::read_to_string(path)?) };
    let revision = git2::Repository::discover(&file.dir)
        .ok()
        .and_then(|repository| Some(repository.head().ok()?.peel_to_commit().ok()?.id().to_string()));
    let wanted = Policy::of(&file, revision, &read)?;
    let applied = office.sit(|desk| desk.apply(&wanted, reason, dry_run))?;
    if applied.first && !dry_run {
        office.around.progress.note(format!("the first policy of `{}` is trusted as it is", applied.pipeline));
    }
    for warning in applied.warnings.iter().cloned().chain(rollout::warnings(&file)) {
        office.around.progress.warn(warning);
    }
    office.say_unchecked(!wanted.people.is_empty());
    if applied.commit.is_some() {
        // Routes and targets are what it says.
        promote::look(global, &office);
    }
    ui::answer(global, &json!({"schema": 1, "applied": applied}), || applied_text(&applied))?;
    Ok(0)
}

fn applied_text(applied: &Applied) -> String {
    let mut text = String::new();
    for difference in &applied.differences {
        let line = match (&difference.before, &difference.after) {
            (None, Some(after)) => format!("+ {}: {after}", difference.path),
            (Some(before), None) => format!("- {}: {before}", difference.path),
            (Some(before), Some(after)) => format!("~ {}: {before} → {after}", difference.path),
            (None, None) => continue,
        };
        let _ = writeln!(text, "{line}");
    }
    match &applied.commit {
        Some(commit) => drop(writeln!(text, "{}: applied ({})", applied.pipeline, &commit[..12])),
        None => drop(writeln!(text, "{}: would be applied", applied.pipeline)),
    }
    text
}

fn upstream(from: &Upstream) -> String {
    match from {
        Upstream::None => "releases enter here".into(),
        Upstream::Any(names) => format!("from {}", names.join(" or ")),
        Upstream::All(names) => format!("from {}", names.join(" and ")),
    }
}

fn list(global: &Global, pipeline: Option<&str>) -> Result<u8> {
    let office = Office::open_to_read(global, pipeline)?;
    let snapshot = office.ledger.snapshot()?;
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for name in snapshot.pipelines()?.into_iter().filter(|name| pipeline.is_none_or(|wanted| wanted == name)) {
        let Some(loaded) = crate::release::desk::load(&snapshot, &name)? else { continue };
        for (environment, policy) in &loaded.policy.environments {
            let gates: Vec<&str> = policy.gates.iter().map(|gate| gate.name.as_str()).collect();
            let how = if policy.automatic { "automatic" } else { "by hand" };
            rows.push(vec![format!("{name}/{environment}"), upstream(&policy.from), how.into(), gates.join(", ")]);
            values.push(json!({"pipeline": name, "environment": environment, "policy": policy}));
        }
    }
    ui::answer(global, &json!({"schema": 1, "environments": values}), || {
        if rows.is_empty() {
            return "no environments; `pipeline environment apply` brings those of a pipeline file into the ledger\n".into();
        }
        report::table(&rows)
    })?;
    Ok(0)
}

fn show(global: &Global, environment: &str, pipeline: Option<&str>) -> Result<u8> {
    let office = Office::open_to_read(global, environment.split_once('/').map(|(name, _)| name).or(pipeline))?;
    let place = office.place(environment, pipeline)?;
    let loaded = office.sit(|desk| desk.load(&place.pipeline))?;
    let policy = loaded.policy.environment(&place.environment).map_err(Problem::from)?;
    let state = loaded.view().state(&place.environment).map_err(Problem::from)?;
    let configuration = state.configuration(policy);
    let drift = drift(&office, &loaded.policy)?;
    let value = json!({"schema": 1, "policy": policy, "state": state, "configuration": configuration, "differs": drift});
    ui::answer(global, &value, || {
        let mut text = format!("{}: {}\n", state.name(), upstream(&policy.from));
        for gate in &policy.gates {
            let description = gate.description.as_ref().map(|text| format!(" – {text}")).unwrap_or_default();
            let check = serde_json::to_value(&gate.check).unwrap_or_default();
            let _ = writeln!(text, "  gate {}: {check}{description}", gate.name);
        }
        for (key, value) in &configuration.values {
            let _ = writeln!(text, "  {key}={value}");
        }
        for (key, reference) in &configuration.secrets {
            let shown = match reference {
                SecretRef::File(path) => format!("the file {path}"),
                SecretRef::Env(name) => format!("the variable {name}"),
                SecretRef::Stored(id) if id.is_empty() => "not set".into(),
                SecretRef::Stored(_) => "set".into(),
            };
            let _ = writeln!(text, "  secret {key}: {shown}");
        }
        for path in &drift {
            let _ = writeln!(text, "  the pipeline file differs: {path}; `pipeline environment apply` makes it count");
        }
        text
    })?;
    Ok(0)
}

/// Where the pipeline file of this folder differs from the policy of its pipeline in the ledger: printed, never used.
pub fn drift(office: &Office, known: &Policy) -> Result<Vec<String>> {
    let Some(here) = office.here.as_ref().filter(|here| here.name.to_string() == known.pipeline) else { return Ok(Vec::new()) };
    if here.releases.environments.is_empty() {
        return Ok(Vec::new());
    }
    let read = |path: &Path| -> Result<String> { Ok(fs_err::read_to_string(path)?) };
    let Ok(wanted) = Policy::of(here, None, &read) else { return Ok(vec!["it names a file that cannot be read".into()]) };
    Ok(policy::difference(known, &wanted).into_iter().map(|difference| difference.path).collect())
}

pub fn config(global: &Global, verb: ConfigVerb) -> Result<u8> {
    let ConfigVerb::Set { environment, values, pipeline, reasons } = verb;
    let mut changes = BTreeMap::new();
    for text in &values {
        let (key, value) = text.split_once('=').map_or((text.as_str(), None), |(key, value)| (key, Some(value.to_owned())));
        if let Err(wrong) = crate::config::syntax::variable(key) {
            return Err(Problem::usage(wrong.message).hint("a value is written KEY=VALUE").into());
        }
        changes.insert(key.to_owned(), value);
    }
    configure(
        global,
        &environment,
        pipeline.as_deref(),
        &Action::Configure { values: changes, secrets: BTreeMap::new() },
        &reasons,
    )
}

pub fn secret(global: &Global, verb: SecretVerb) -> Result<u8> {
    let SecretVerb::Set { environment, key, pipeline, reasons } = verb;
    if let Err(wrong) = crate::config::syntax::variable(&key) {
        return Err(Problem::usage(wrong.message).into());
    }
    let mut value = Vec::new();
    std::io::stdin().take(SECRET_MAX as u64 + 1).read_to_end(&mut value).context("cannot read the secret from standard input")?;
    if value.is_empty() || value.len() > SECRET_MAX {
        return Err(Problem::usage(format!("the secret has {} bytes", value.len()))
            .hint(format!("standard input has it: `pipeline secret set {environment} {key} < FILE`, at most 1 MiB"))
            .into());
    }
    let dir = ui::Surroundings::new(global)?.store.state("secrets");
    // A dry run decides about a name nothing is kept under.
    let id = if reasons.is_dry_run() { fresh_id() } else { keep(&dir, &value)? };
    let secrets = BTreeMap::from([(key, Some(SecretRef::Stored(id.clone())))]);
    let action = Action::Configure { values: BTreeMap::new(), secrets };
    let decided = decide(global, &environment, pipeline.as_deref(), &action, &reasons);
    let is_refused = match &decided {
        Ok((_, outcome)) => outcome.commit.is_none(),
        // After any other failure, such as an answer of the remote that was lost, the decision may be there.
        Err(error) => error::problem(error).is_some_and(|it| matches!(it.kind, error::Kind::Failed | error::Kind::Usage)),
    };
    if is_refused && !reasons.is_dry_run() {
        fs_err::remove_file(dir.join(&id))?;
    }
    let (office, outcome) = decided?;
    promote::finish(global, &office, &reasons, outcome, Until::Done)
}

/// What the ledger knows a value by, which says nothing about it.
fn fresh_id() -> String {
    hex::encode(rand::random::<[u8; 16]>())
}

/// Writes a secret where only this user reads it; the name the ledger knows it by, which says nothing about the value.
fn keep(dir: &Path, value: &[u8]) -> Result<String> {
    use std::os::unix::fs::PermissionsExt as _;
    fs_err::create_dir_all(dir)?;
    fs_err::set_permissions(dir, std::fs::Permissions::from_mode(0o700))?;
    let id = fresh_id();
    // Mode 0600 from its first byte on.
    let mut temp = tempfile::Builder::new().prefix(".tmp-").tempfile_in(dir)?;
    std::io::Write::write_all(&mut temp, value).context("cannot write the secret")?;
    temp.as_file().sync_all()?;
    temp.persist(dir.join(&id)).map_err(|error| error.error).context("cannot keep the secret")?;
    crate::artifact::store::sync_dir(dir)?;
    Ok(id)
}

fn configure(global: &Global, environment: &str, pipeline: Option<&str>, action: &Action, reasons: &Reasons) -> Result<u8> {
    let (office, outcome) = decide(global, environment, pipeline, action, reasons)?;
    promote::finish(global, &office, reasons, outcome, Until::Done)
}

fn decide(
    global: &Global,
    environment: &str,
    pipeline: Option<&str>,
    action: &Action,
    reasons: &Reasons,
) -> Result<(Office, Outcome)> {
    let given = environment.split_once('/').map(|(name, _)| name).or(pipeline);
    let opened = Office::open(global, given).and_then(|office| {
        let place = office.place(environment, pipeline)?;
        Ok((office, place))
    });
    let (office, place) = reasons.reported(environment, opened)?;
    let decided = office.sit(|desk| {
        desk.sync(false)?;
        let outcome = desk.decide(&place.pipeline, &place.environment, action, &reasons.ask(false))?;
        Ok((outcome, !desk.load(&place.pipeline)?.policy.people.is_empty()))
    });
    let (outcome, people) = reasons.reported(&place.name(), decided)?;
    office.say_unchecked(people);
    Ok((office, outcome))
}
