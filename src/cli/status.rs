//! `pipeline status`, `history`, `diff` and `log`: what the ledger says.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::Result;
use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;

use super::daemon::Daemon;
use super::desk::Office;
use super::{Global, environment, report, rollout, ui};
use crate::config::types::Upstream;
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::progress::Progress as _;
use crate::release::change;
use crate::release::decision::Status;
use crate::release::desk::{self, Loaded};
use crate::release::gate;
use crate::release::mirror::{self, What};
use crate::release::promotion;
use crate::release::state::State;
use crate::rollout::view::View;

#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// PIPELINE or PIPELINE/ENVIRONMENT; default: everything the ledger has
    name: Option<String>,
    /// Show blue and green of one environment again whenever they change, until ^C
    #[arg(long, requires = "name")]
    watch: bool,
    /// Do not ask registries whether somebody moved a tag
    #[arg(long)]
    offline: bool,
}

#[derive(Debug, clap::Args)]
pub struct HistoryArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    /// Show so many decisions at most, the newest
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 30)]
    most: usize,
}

#[derive(Debug, clap::Args)]
pub struct DiffArgs {
    /// An environment
    one: String,
    /// Another one, of the same pipeline
    other: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
}

#[derive(Debug, clap::Args)]
pub struct LogArgs {
    /// Decisions of this person only
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
    /// Decisions about this pipeline only
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    /// Decisions of this kind only, such as `promote` or `rollback`
    #[arg(long, value_name = "KIND")]
    kind: Option<String>,
    /// Show so many decisions at most, the newest
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 30)]
    most: usize,
}

/// One environment, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Row {
    pipeline: String,
    environment: String,
    release: Option<Digest>,
    version: Option<String>,
    since: Option<Timestamp>,
    by: Option<String>,
    health: Option<Status>,
    hold: Option<String>,
    frozen: Option<String>,
    /// Versions marked bad.
    bad: Vec<String>,
    /// The registry's tag that follows it, as far as is known without asking.
    tag: Option<Tag>,
    /// What could come next.
    waiting: Option<Waiting>,
    /// Whether a configuration waits for a promotion.
    configuration_waits: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Tag {
    name: String,
    state: mirror::Known,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Waiting {
    release: Digest,
    version: String,
    /// Gates that the ledger alone shows to be shut, with their reasons.
    gates: Vec<String>,
}

pub fn status(global: &Global, args: StatusArgs) -> Result<u8> {
    let (pipeline, only) = match args.name.as_deref().map(|name| name.split_once('/').unwrap_or((name, ""))) {
        Some((pipeline, environment)) => (Some(pipeline.to_owned()), Some(environment).filter(|name| !name.is_empty())),
        None => (None, None),
    };
    let office = Office::open_to_read(global, pipeline.as_deref())?;
    if args.watch {
        return watch(global, &office, args.name.as_deref().unwrap_or_default());
    }
    office.sit(|desk| desk.sync(true))?;
    let snapshot = office.ledger.snapshot()?;
    let now = Timestamp::now();
    let mut rows: Vec<Row> = Vec::new();
    let names = snapshot.pipelines()?;
    if let Some(wanted) = pipeline.as_ref().filter(|wanted| !names.contains(wanted)) {
        return Err(Problem::usage(format!("the ledger has no pipeline `{wanted}`"))
            .hint(if names.is_empty() {
                "`pipeline environment apply` brings one into it".into()
            } else {
                format!("there are `{}`", names.join("`, `"))
            })
            .into());
    }
    let mut all: Vec<Loaded> = Vec::new();
    for name in names.into_iter().filter(|name| pipeline.as_ref().is_none_or(|wanted| wanted == name)) {
        all.extend(desk::load(&snapshot, &name)?);
    }
    for loaded in &all {
        let name = &loaded.policy.pipeline;
        for path in environment::drift(&office, &loaded.policy)? {
            office.around.progress.note(format!(
                "the pipeline file of `{name}` differs from the ledger: {path}; `pipeline environment apply` makes it count"
            ));
        }
        if let Some(only) = only {
            loaded.policy.environment(only).map_err(Problem::from)?;
        }
    }
    let missed = if args.offline { Vec::new() } else { look(&office, &all, only) };
    for loaded in &all {
        let tags = tags(&office, loaded, !args.offline)?;
        for environment in in_order(loaded).into_iter().filter(|name| only.is_none_or(|only| only == name)) {
            let tag = tags.get(&environment).cloned();
            rows.extend(loaded.states.get(&environment).map(|state| Row { tag, ..row(loaded, state, now) }));
        }
    }
    office.around.progress.finish();
    let served = served(global, &office, &rows);
    ui::answer(global, &json!({"schema": 1, "environments": rows, "not_looked_at": missed, "served": served}), || {
        let mut text = table(&rows, now);
        // One environment is shown whole.
        if only.is_some() {
            served.iter().for_each(|view| text += &rollout::text(view, now));
        }
        text
    })?;
    Ok(0)
}

/// What the daemon serves of `rows`; a daemon that is away or does not answer keeps nobody from the ledger.
fn served(global: &Global, office: &Office, rows: &[Row]) -> Vec<View> {
    let overview = Daemon::of(global, &office.around.host).and_then(|daemon| daemon.overview());
    match overview {
        Ok(Some(overview)) => {
            overview.daemon.messages.into_iter().for_each(|message| office.around.progress.warn(message));
            let shown = |view: &View| rows.iter().any(|row| view.environment == format!("{}/{}", row.pipeline, row.environment));
            overview.environments.into_iter().filter(shown).collect()
        }
        // Nothing runs, or nothing says where the socket would be: then nothing is served for this user.
        Ok(None) => Vec::new(),
        Err(error) if crate::error::exit_code(&error) == 2 => Vec::new(),
        Err(error) => {
            office.around.progress.warn(format!("what runs is not known: {error:#}"));
            Vec::new()
        }
    }
}

fn watch(global: &Global, office: &Office, name: &str) -> Result<u8> {
    if !name.contains('/') {
        return Err(Problem::usage("`--watch` shows one environment")
            .hint(format!("like `pipeline status {name}/prod --watch`"))
            .into());
    }
    rollout::watch(global, &Daemon::of(global, &office.around.host)?, name)
}

/// Asks registries where the tags of what is shown stand. Those that could not be looked at; that changes nothing else.
fn look(office: &Office, all: &[Loaded], only: Option<&str>) -> Vec<String> {
    let mut wanted: Vec<mirror::Wanted> = all.iter().flat_map(mirror::wanted).collect();
    wanted.retain(|wanted| only.is_none_or(|only| only == wanted.environment));
    let missed = office.mirror(|mirror| mirror.look(&wanted)).unwrap_or_else(|error| {
        office.around.progress.warn(format!("the tags of the registry were not looked at: {error:#}"));
        Vec::new()
    });
    let tags: Vec<String> = missed.iter().map(|(tag, _)| tag.clone()).collect();
    if let Some((_, why)) = missed.first() {
        office.around.progress.note(format!("not looked at where these tags stand: `{}`: {why}", tags.join("`, `")));
    }
    tags
}

/// The registry's tags by environment. What a command that was killed, or met a registry that was away, left is done now.
fn tags(office: &Office, loaded: &Loaded, online: bool) -> Result<BTreeMap<String, Tag>> {
    let wanted = mirror::wanted(loaded);
    let store = &office.around.store;
    let mut known = mirror::known(store, &wanted)?;
    if online && known.contains(&mirror::Known::Later) {
        office.tags(&loaded.policy.pipeline, What::New);
        known = mirror::known(store, &wanted)?;
    }
    let tags = wanted.into_iter().zip(known);
    Ok(tags.map(|(wanted, state)| (wanted.environment, Tag { name: wanted.tag, state })).collect())
}

/// The environments of a pipeline from where releases enter to where they end.
fn in_order(loaded: &Loaded) -> Vec<String> {
    let mut order: Vec<String> = Vec::new();
    let environments = &loaded.policy.environments;
    while order.len() < environments.len() {
        let before = order.len();
        for (name, policy) in environments {
            let ready = match &policy.from {
                Upstream::None => true,
                from => from.names().iter().all(|upstream| order.contains(upstream) || !environments.contains_key(upstream)),
            };
            if ready && !order.contains(name) {
                order.push(name.clone());
            }
        }
        if order.len() == before {
            // A circle, which `environment apply` refuses.
            order.extend(environments.keys().filter(|name| !order.contains(*name)).cloned().collect::<Vec<_>>());
        }
    }
    order
}

fn row(loaded: &Loaded, state: &State, now: Timestamp) -> Row {
    let policy = &loaded.policy.environments[&state.environment];
    let current = state.current.as_ref();
    let candidate = promotion::candidate(loaded.view(), &state.environment).ok().flatten();
    let waiting = candidate.map(|candidate| {
        let question = gate::Question {
            view: loaded.view(),
            environment: &state.environment,
            release: candidate.release,
            version: &candidate.version,
            author: candidate.author.as_deref(),
            config: state.configuration(policy).digest(),
            actor: "",
            reason: "",
            time: now,
        };
        let known = policy.gates.iter().filter_map(|gate| gate::known(gate, &question)).filter(|answer| answer.stops());
        let gates = known.map(|answer| format!("{}: {}", answer.gate, answer.reason)).collect();
        Waiting { release: candidate.release, version: candidate.version.clone(), gates }
    });
    Row {
        pipeline: state.pipeline.clone(),
        environment: state.environment.clone(),
        release: current.map(|binding| binding.release),
        version: current.map(|binding| binding.version.clone()),
        since: current.map(|binding| binding.since),
        by: current.map(|binding| binding.by.clone()),
        health: desk::health(loaded, state),
        hold: state.hold.as_ref().map(gate::hold_reason),
        frozen: state.frozen(&loaded.frozen, now).map(gate::freeze_reason),
        bad: state.bad.values().map(|bad| bad.version.clone()).collect(),
        tag: None,
        waiting,
        configuration_waits: current.is_some_and(|binding| binding.config != state.configuration(policy)),
    }
}

fn table(rows: &[Row], now: Timestamp) -> String {
    if rows.is_empty() {
        return "no environments; `pipeline environment apply` brings those of a pipeline file into the ledger\n".into();
    }
    let lines = rows.iter().map(|row| {
        let health = match row.health {
            None => "-",
            Some(Status::Healthy) => "healthy",
            Some(Status::Unhealthy) => "UNHEALTHY",
            Some(Status::Unknown) => "unknown",
        };
        let since = row.since.map(|since| {
            let seconds = (now.as_second() - since.as_second()).max(0).unsigned_abs();
            format!("{} by {}", ago(seconds), row.by.as_deref().unwrap_or_default())
        });
        let mut notes = Vec::new();
        notes.extend(row.frozen.as_ref().map(|why| format!("FROZEN {why}")));
        notes.extend(row.hold.as_ref().map(|why| format!("HOLD {why}")));
        notes.extend(row.tag.as_ref().and_then(|tag| match tag.state {
            mirror::Known::Set => None,
            mirror::Known::Later => Some(format!("the tag `{}` is not set yet", tag.name)),
            mirror::Known::Moved => Some(format!("SOMEBODY MOVED the tag `{}`", tag.name)),
        }));
        notes.extend(row.waiting.as_ref().map(|next| match next.gates.first() {
            Some(gate) => format!("{} waits for {gate}", next.version),
            None => format!("{} may come", next.version),
        }));
        notes.extend(row.configuration_waits.then(|| "a configuration waits".to_owned()));
        notes.extend((!row.bad.is_empty()).then(|| format!("bad: {}", row.bad.join(", "))));
        let version = row.version.clone().unwrap_or_else(|| "nothing".into());
        vec![format!("{}/{}", row.pipeline, row.environment), version, health.into(), since.unwrap_or_default(), notes.join("; ")]
    });
    report::table(&lines.collect::<Vec<_>>())
}

/// Like `5m` or `3d`.
fn ago(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

pub fn history(global: &Global, args: HistoryArgs) -> Result<u8> {
    let office =
        Office::open_to_read(global, args.environment.split_once('/').map(|(name, _)| name).or(args.pipeline.as_deref()))?;
    let place = office.place(&args.environment, args.pipeline.as_deref())?;
    let loaded = office.sit(|desk| desk.load(&place.pipeline))?;
    loaded.policy.environment(&place.environment).map_err(Problem::from)?;
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for version in office.ledger.history_of(&desk::state_path(&place.pipeline, &place.environment))?.take(args.most) {
        let version = version?;
        let state = State::parse(&version.bytes)?;
        let decision = &state.decision;
        let what = decision.version.clone().or_else(|| decision.to.map(|release| release.short())).unwrap_or_default();
        let now = state.current.as_ref().map_or("nothing".to_owned(), |binding| binding.version.clone());
        let loud =
            if decision.overrides.is_empty() { String::new() } else { format!("OVERRIDING {} ", decision.overrides.join(", ")) };
        let row = [
            decision.time.to_string(),
            format!("{} {what}", decision.kind).trim_end().to_owned(),
            format!("→ {now}"),
            decision.actor.clone(),
            format!("{loud}{}", decision.reason),
            version.commit.id.to_string()[..12].to_owned(),
        ];
        rows.push(row.to_vec());
        values.push(json!({"commit": version.commit.id.to_string(), "decision": decision, "current": state.current}));
    }
    ui::answer(global, &json!({"schema": 1, "history": values}), || report::table(&rows))?;
    Ok(0)
}

pub fn diff(global: &Global, args: DiffArgs) -> Result<u8> {
    let office = Office::open_to_read(global, args.one.split_once('/').map(|(name, _)| name).or(args.pipeline.as_deref()))?;
    let one = office.place(&args.one, args.pipeline.as_deref())?;
    let other = office.place(&args.other, Some(&one.pipeline))?;
    if one.pipeline != other.pipeline {
        return Err(Problem::usage(format!("`{}` and `{}` are different pipelines", one.pipeline, other.pipeline)).into());
    }
    let loaded = office.sit(|desk| desk.load(&one.pipeline))?;
    let current = |name: &str| -> Result<promotion::Pair> {
        let state = loaded.view().state(name).map_err(Problem::from)?;
        let binding = state.current.as_ref();
        let binding = binding.ok_or_else(|| Problem::failed(format!("`{}` has no release", state.name())))?;
        Ok(promotion::Pair::from(binding))
    };
    let (from, to) = (current(&one.environment)?, current(&other.environment)?);
    let change = change::between(&office.around.store, Some(&from), &to, office.around.host.threads);
    let value = json!({"schema": 1, "from": from, "to": to, "changes": change});
    ui::answer(global, &value, || {
        let mut text = format!("{}: {} → {}: {}\n", one.environment, from.version, other.environment, to.version);
        if from == to {
            return text + "the same release with the same configuration\n";
        }
        for line in super::release::changed(&change, usize::MAX) {
            let _ = writeln!(text, "  {line}");
        }
        text
    })?;
    Ok(0)
}

pub fn log(global: &Global, args: LogArgs) -> Result<u8> {
    let office = Office::open_to_read(global, args.pipeline.as_deref())?;
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for commit in office.ledger.log()? {
        let commit = commit?;
        let is = |key: &str, wanted: &Option<String>| wanted.as_ref().is_none_or(|wanted| commit.trailer(key) == Some(wanted));
        if !is("Actor", &args.actor) || !is("Pipeline", &args.pipeline) || !is("Decision", &args.kind) {
            continue;
        }
        rows.push(vec![
            commit.time.to_string(),
            commit.author.name.clone(),
            commit.subject.clone(),
            commit.body.replace('\n', " "),
        ]);
        let trailers: Vec<_> = commit.trailers.iter().map(|(key, value)| json!({"key": key, "value": value})).collect();
        values.push(json!({
            "commit": commit.id.to_string(),
            "time": commit.time,
            "actor": commit.author.name,
            "subject": commit.subject,
            "reason": commit.body,
            "trailers": trailers,
            "signed": commit.signature.is_some(),
        }));
        if rows.len() == args.most {
            break;
        }
    }
    ui::answer(global, &json!({"schema": 1, "log": values}), || report::table(&rows))?;
    Ok(0)
}
