//! `pipeline promote`, `rollback`, `config set` and `secret set`: decisions that gates are asked about.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde_json::json;

use super::daemon::Daemon;
use super::desk::{Office, Place};
use super::follow::{self, End, Until, Wanted};
use super::{Global, report, ui};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::progress::Progress as _;
use crate::release::change::{self, Change};
use crate::release::decision::Verdict;
use crate::release::desk::{self, Ask, Desk, Loaded, Outcome};
use crate::release::mirror::What;
use crate::release::promotion::{self, Action, Back, Candidate, Plan};
use crate::rollout::view::Phase;
use crate::vm::test::report::escape;

/// Packages named in a dry run for people; a first release has hundreds.
const PACKAGES_SHOWN: usize = 40;
/// Test case of what is no gate.
const RULES: &str = "rules";
/// Exit status when something has to serve the release before it counts.
const UNSERVED: u8 = 75;

/// What all decisions with gates take.
#[derive(Debug, clap::Args)]
pub struct Reasons {
    /// Why; kept in the ledger
    #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
    reason: String,
    /// Go past this gate, or `freeze`; needs a reason, and the role `override` where there are people
    #[arg(long = "override", value_name = "GATE")]
    overrides: Vec<String>,
    /// Show what would happen, with every gate's answer, and stop
    #[arg(long)]
    dry_run: bool,
    /// Do not wait until it runs, and do not say by exit status 75 that nothing serves the environment
    #[arg(long)]
    no_wait: bool,
    /// Write the gates' answers as JUnit XML
    #[arg(long, value_name = "FILE")]
    junit: Option<std::path::PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct PromoteArgs {
    /// Name of the pipeline; default: the one of this folder
    pipeline: Option<String>,
    /// The environment it goes to, also as PIPELINE/ENVIRONMENT
    #[arg(long, value_name = "ENVIRONMENT", required_unless_present = "automatic")]
    to: Option<String>,
    /// The release: a version, or a digest or the start of one; default: the newest that may come
    #[arg(long, value_name = "RELEASE")]
    release: Option<String>,
    /// Lift the hold that is there
    #[arg(long)]
    lift: bool,
    /// Promote whatever may come by itself now, in the whole pipeline; with `--dry-run` show what would
    #[arg(long, conflicts_with_all = ["to", "release", "lift", "reason", "overrides", "no_wait"])]
    automatic: bool,
    #[command(flatten)]
    reasons: Reasons,
}

#[derive(Debug, clap::Args)]
pub struct RollbackArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    /// Go back to this release: a version, or a digest or the start of one; default: the last that was healthy
    #[arg(long, value_name = "RELEASE")]
    to: Option<String>,
    #[command(flatten)]
    reasons: Reasons,
}

pub fn promote(global: &Global, args: PromoteArgs) -> Result<u8> {
    let (pipeline, environment) = match (&args.to, &args.pipeline) {
        (Some(to), given) => match to.split_once('/') {
            Some((pipeline, environment)) => (Some(pipeline.to_owned()), environment.to_owned()),
            None => (given.clone(), to.clone()),
        },
        (None, given) => (given.clone(), String::new()),
    };
    let named = [pipeline.as_deref().unwrap_or_default(), &environment].join("/");
    let opened = Office::open(global, pipeline.as_deref()).and_then(|office| {
        let pipeline = office.pipeline(pipeline.as_deref())?;
        Ok((office, pipeline))
    });
    let (office, pipeline) = args.reasons.reported(named.trim_matches('/'), opened)?;
    if args.automatic {
        return automatic(global, &office, &pipeline, &args.reasons);
    }
    let place = Place { pipeline, environment };
    let decided = office.sit(|desk| {
        desk.sync(false)?;
        let loaded = desk.load(&place.pipeline)?;
        let action = coming(&office, &loaded, &place.environment, args.release.as_deref())?;
        let ask = args.reasons.ask(args.lift);
        Ok((desk.decide(&place.pipeline, &place.environment, &action, &ask)?, !loaded.policy.people.is_empty()))
    });
    let decided = args.reasons.reported(&place.name(), decided);
    if decided.is_err() && !args.reasons.dry_run {
        // A run that was killed after its decision may have left a tag, and this one finds that there is nothing to decide.
        office.tags(&place.pipeline, What::New);
    }
    let (outcome, people) = decided?;
    office.say_unchecked(people);
    finish(global, &office, &args.reasons, outcome, Until::Done)
}

/// What comes by itself, or would.
fn automatic(global: &Global, office: &Office, pipeline: &str, reasons: &Reasons) -> Result<u8> {
    let decided = office.sit(|desk| desk.automatic(pipeline, reasons.dry_run));
    let outcomes = reasons.reported(pipeline, decided)?;
    let changes: Vec<_> = outcomes.iter().map(|outcome| reasons.change(office, &outcome.plan)).collect();
    reasons.write_junit(&outcomes.iter().collect::<Vec<_>>())?;
    if outcomes.iter().any(|outcome| outcome.commit.is_some()) {
        look(global, office);
    }
    let tags = if reasons.dry_run { Vec::new() } else { office.tags(pipeline, What::Left) };
    let value = json!({"schema": 1, "outcomes": outcomes, "changes": changes, "tags": tags});
    ui::answer(global, &value, || {
        if outcomes.is_empty() {
            return format!("{pipeline}: nothing comes by itself now\n");
        }
        outcomes.iter().zip(&changes).map(|(outcome, change)| shown(outcome, change.as_ref())).collect()
    })?;
    Ok(0)
}

pub fn rollback(global: &Global, args: RollbackArgs) -> Result<u8> {
    let given = args.environment.split_once('/').map(|(name, _)| name).or(args.pipeline.as_deref());
    let opened = Office::open(global, given).and_then(|office| {
        let place = office.place(&args.environment, args.pipeline.as_deref())?;
        Ok((office, place))
    });
    let (office, place) = args.reasons.reported(&args.environment, opened)?;
    foretell(global, &office, &place, args.to.as_deref());
    let decided = office.sit(|desk| {
        desk.sync(true)?;
        let loaded = desk.load(&place.pipeline)?;
        let back = match &args.to {
            None => serving(global, &office, &place, &loaded).unwrap_or(Back::Last),
            Some(wanted) => Back::To(in_history(desk, &loaded, &place, wanted)?),
        };
        let outcome = desk.decide(&place.pipeline, &place.environment, &Action::Rollback(back), &args.reasons.ask(false))?;
        Ok((outcome, !loaded.policy.people.is_empty()))
    });
    let (outcome, people) = args.reasons.reported(&place.name(), decided)?;
    office.say_unchecked(people);
    finish(global, &office, &args.reasons, outcome, Until::Switch)
}

/// What serves, while the rollout of what is taken back has not switched yet: nobody has to have told the ledger how it does.
fn serving(global: &Global, office: &Office, place: &Place, loaded: &Loaded) -> Option<Back> {
    let view = Daemon::of(global, &office.around.host).and_then(|daemon| daemon.view(&place.name())).ok()??;
    let rollout = view.rollout.filter(|rollout| rollout.outcome.is_none())?;
    let before = matches!(rollout.phase, Phase::Waiting | Phase::Starting | Phase::PreSwitch | Phase::Switching);
    let current = loaded.states.get(&place.environment)?.current.as_ref()?.pair();
    let live = view.live.filter(|_| before && current == (rollout.release, rollout.config))?;
    ((live.release, live.config) != current).then_some(Back::Pair(live.release, live.config))
}

impl Reasons {
    pub fn ask(&self, lift: bool) -> Ask<'_> {
        Ask { reason: &self.reason, overrides: &self.overrides, lift, dry_run: self.dry_run }
    }

    pub fn is_dry_run(&self) -> bool {
        self.dry_run
    }

    /// What a dry run shows besides the gates' answers.
    fn change(&self, office: &Office, plan: &Plan) -> Option<Change> {
        let to = plan.to.as_ref().filter(|_| self.dry_run)?;
        Some(change::between(&office.around.store, plan.from.as_ref(), to, office.around.host.threads))
    }

    fn write_junit(&self, outcomes: &[&Outcome]) -> Result<()> {
        let Some(file) = &self.junit else { return Ok(()) };
        let suites: String = outcomes.iter().map(|outcome| suite(&outcome.plan)).collect();
        Ok(fs_err::write(file, junit(&suites))?)
    }

    /// Writes what was refused before any gate was asked as a case of its own, so that a job that collects the file finds
    /// one; the refusal goes on.
    pub fn reported<T>(&self, name: &str, decided: Result<T>) -> Result<T> {
        let (Err(error), Some(file)) = (&decided, &self.junit) else { return decided };
        let written = fs_err::write(file, junit(&refusal(name, &format!("{error:#}"))));
        match written {
            Ok(()) => decided,
            Err(wrong) => decided.with_context(|| format!("cannot write the gates' answers either: {wrong}")),
        }
    }
}

/// What a promotion to `environment` brings.
fn coming(office: &Office, loaded: &Loaded, environment: &str, wanted: Option<&str>) -> Result<Action> {
    let view = loaded.view();
    let policy = loaded.policy.environment(environment).map_err(Problem::from)?;
    let pipeline = &loaded.policy.pipeline;
    if let Some(wanted) = wanted
        && let Some(found) = desk::known_release(loaded, environment, wanted)
    {
        return Ok(enter_or_promote(policy.from.names().is_empty(), found));
    }
    if policy.from.names().is_empty() {
        let made = super::release::find(&office.around.store, pipeline, wanted)?;
        let author = super::release::author(office, &loaded.policy, &made);
        return Ok(Action::Enter(Candidate { release: made.digest, version: made.version, author }));
    }
    if let Some(wanted) = wanted {
        let upstream = policy.from.names().join("`, `");
        // The rules say why a release that is nowhere upstream may not come; a name that nobody knows is another thing.
        if let Ok(made) = super::release::find(&office.around.store, pipeline, Some(wanted)) {
            return Ok(Action::Promote(Candidate { release: made.digest, version: made.version, author: None }));
        }
        return Err(Problem::usage(format!("`{pipeline}` has no release `{wanted}` in `{upstream}`"))
            .hint(format!("`pipeline history {pipeline}/{}` shows what was there", policy.from.names()[0]))
            .into());
    }
    if let Some(found) = promotion::candidate(view, environment).map_err(Problem::from)? {
        return Ok(Action::Promote(found));
    }
    // Nothing new upstream: a configuration may wait for the release that is here.
    let state = view.state(environment).map_err(Problem::from)?;
    if let Some(current) = &state.current
        && state.configuration(policy) != current.config
    {
        let (release, version, author) = (current.release, current.version.clone(), current.author.clone());
        return Ok(Action::Promote(Candidate { release, version, author }));
    }
    let upstream: Vec<String> = policy.from.names().iter().map(|name| format!("`{pipeline}/{name}`")).collect();
    let problem = Problem::failed(format!("nothing new can come to `{pipeline}/{environment}` from {}", upstream.join(" or ")));
    Err(problem.hint("`pipeline status` shows what is where; `--release` names one that was there before").into())
}

fn enter_or_promote(enters: bool, candidate: Candidate) -> Action {
    if enters { Action::Enter(candidate) } else { Action::Promote(candidate) }
}

/// A release that was in the environment, by what somebody wrote.
fn in_history(desk: &Desk<'_>, loaded: &Loaded, place: &Place, wanted: &str) -> Result<Digest> {
    let state = loaded.view().state(&place.environment).map_err(Problem::from)?;
    if let Some(found) = state.bindings().find(|known| known.is_called(wanted)) {
        return Ok(found.release);
    }
    // Longer ago than the state remembers.
    for version in desk.ledger.history_of(&desk::state_path(&place.pipeline, &place.environment))? {
        let old = crate::release::state::State::parse(&version?.bytes)?;
        if let Some(found) = old.current.filter(|known| known.is_called(wanted)) {
            return Ok(found.release);
        }
    }
    Err(Problem::usage(format!("release `{wanted}` was never in `{}`", state.name()))
        .hint(format!("`pipeline history {}` shows what was there", state.name()))
        .into())
}

/// Says what a rollback is going to take, where a daemon serves the environment.
fn foretell(global: &Global, office: &Office, place: &Place, to: Option<&str>) {
    let view = Daemon::of(global, &office.around.host).and_then(|daemon| daemon.view(&place.name()));
    let Ok(Some(view)) = view else { return };
    let other = view.other.as_ref().filter(|other| to.is_none_or(|to| other.version == to || other.release.is_called(to)));
    // Something else than what is warm is asked for.
    let elsewhere = to.filter(|_| other.is_none()).and(view.live.as_ref()).map(|live| live.release);
    office.around.progress.note(format!("going back: {}", follow::promise(&view, elsewhere.as_ref())));
}

/// Shows the outcome, lets the registry's tags follow it, and waits until it runs where a daemon serves it; the exit status.
pub fn finish(global: &Global, office: &Office, reasons: &Reasons, mut outcome: Outcome, until: Until) -> Result<u8> {
    reasons.write_junit(&[&outcome])?;
    let change = reasons.change(office, &outcome.plan);
    let daemon = Daemon::of(global, &office.around.host).ok().filter(|_| outcome.commit.is_some());
    // The daemon begins while this shows what was decided.
    let wanted = wanted(&outcome, until).filter(|_| outcome.unserved);
    let served = daemon.as_ref().is_some_and(|daemon| hand_over(office, daemon, wanted.as_ref()));
    outcome.unserved &= !served;
    let tags = || outcome.commit.iter().flat_map(|_| office.tags(&outcome.plan.pipeline, What::Left)).collect::<Vec<_>>();
    if !global.json {
        ui::answer(global, &(), || shown(&outcome, change.as_ref()))?;
    }
    let waited = match (&daemon, &wanted) {
        (Some(daemon), Some(wanted)) if served && !reasons.no_wait => Some(follow::follow(&office.around, daemon, wanted)),
        _ => None,
    };
    // A registry that is slow or away keeps nobody from reading what was decided and what came of it.
    let told = tags();
    let waited = waited.transpose()?;
    let left = matches!(waited, Some(None));
    let end: Option<End> = waited.flatten();
    if global.json {
        let mut value = json!({"schema": 1, "outcome": outcome, "tags": told, "rollout": end});
        if reasons.dry_run {
            value["changes"] = json!(change);
        }
        ui::answer(global, &value, String::new)?;
    } else if let Some(end) = &end {
        ui::answer(global, &(), || rolled_out(end))?;
    }
    Ok(match (&outcome.commit, reasons.dry_run) {
        (None, false) => 1,
        (None, true) => u8::from(!outcome.plan.allowed),
        (Some(_), _) if outcome.unserved && !reasons.no_wait => UNSERVED,
        (Some(_), _) if left => UNSERVED,
        _ => u8::from(end.is_some_and(|end| !end.good)),
    })
}

/// Lets the daemon look at what was decided, here and below, without waiting for what it makes of it.
pub fn told(global: &Global, office: &Office, outcome: &mut Outcome) {
    if outcome.commit.is_some()
        && let Ok(daemon) = Daemon::of(global, &office.around.host)
    {
        let wanted = wanted(outcome, Until::Done).filter(|_| outcome.unserved);
        outcome.unserved &= !hand_over(office, &daemon, wanted.as_ref());
    }
    outcome.followed.iter_mut().for_each(|outcome| told(global, office, outcome));
}

/// Lets the daemon look at the ledger, when one runs.
pub fn look(global: &Global, office: &Office) {
    if let Ok(daemon) = Daemon::of(global, &office.around.host) {
        hand_over(office, &daemon, None);
    }
}

/// Lets the daemon look at the ledger; whether it serves the environment of `wanted`.
fn hand_over(office: &Office, daemon: &Daemon, wanted: Option<&Wanted>) -> bool {
    let serves = || -> Result<bool> {
        let Some(overview) = daemon.overview()? else { return Ok(false) };
        daemon.poke()?;
        let Some(wanted) = wanted else { return Ok(false) };
        let is_there = overview.environments.iter().any(|view| view.environment == wanted.name);
        Ok(is_there || daemon.view(&wanted.name)?.is_some())
    };
    serves().unwrap_or_else(|error| {
        office.around.progress.warn(format!("the decision stands, and the daemon was not told: {error:#}"));
        false
    })
}

/// What the daemon is to make of a decision.
fn wanted(outcome: &Outcome, until: Until) -> Option<Wanted> {
    let plan = &outcome.plan;
    let pair = plan.to.as_ref().filter(|_| !plan.waits)?;
    let name = format!("{}/{}", plan.pipeline, plan.environment);
    // Decisions have whole seconds, and so has the clock that the daemon's rollouts are compared with.
    let since = Timestamp::from_second(plan.decision.time.as_second()).ok()?;
    Some(Wanted { name, release: pair.release, config: pair.config.digest(), since, until })
}

/// How a rollout ended, for people.
fn rolled_out(end: &End) -> String {
    let mut text = format!("{}\n", end.text);
    for line in &end.log {
        let _ = writeln!(text, "  | {line}");
    }
    text
}

/// An outcome for people.
pub fn text(outcome: &Outcome) -> String {
    shown(outcome, None)
}

/// An outcome for people, with all that would change.
fn shown(outcome: &Outcome, change: Option<&Change>) -> String {
    let plan = &outcome.plan;
    let name = format!("{}/{}", plan.pipeline, plan.environment);
    let mut text = String::new();
    let pair = |pair: &Option<promotion::Pair>| match pair {
        Some(pair) => format!("{} ({})", pair.version, pair.release.short()),
        None => "nothing".into(),
    };
    let _ = writeln!(text, "{name}: {} → {}", pair(&plan.from), pair(&plan.to));
    let lines = match (change, &plan.from, &plan.to) {
        (Some(change), _, _) => super::release::changed(change, PACKAGES_SHOWN),
        (None, Some(from), Some(to)) => super::release::configured(&from.config, &to.config),
        _ => Vec::new(),
    };
    for line in lines {
        let _ = writeln!(text, "  {line}");
    }
    let mark = |verdict: Verdict| match verdict {
        Verdict::Allow => "ok",
        Verdict::Deny => "NO",
        Verdict::Unknown => "??",
        Verdict::Overridden => "OVERRIDDEN",
    };
    let rows = plan.answers.iter().map(|answer| {
        let next = answer.next.map(|next| format!("(possible from {next})")).unwrap_or_default();
        vec![format!("  {}", mark(answer.verdict)), answer.gate.clone(), format!("{} {next}", answer.reason).trim_end().into()]
    });
    text += &report::table(&rows.collect::<Vec<_>>());
    match (&outcome.commit, plan.allowed) {
        (Some(commit), _) if plan.waits => {
            let _ = writeln!(text, "written down ({}), and waits for `pipeline promote --to {name}`", &commit[..12]);
        }
        (Some(commit), _) => {
            let _ = writeln!(text, "done: {}", &commit[..12]);
        }
        (None, true) => text += "it would be done\n",
        (None, false) => {
            let _ = writeln!(text, "refused{}", plan.refused.as_ref().map(|why| format!(": {why}")).unwrap_or_default());
            if let Some(next) = plan.next {
                let _ = writeln!(text, "it can go from {next}, {} from now", from_now(next, plan.decision.time));
            }
        }
    }
    if outcome.unserved && outcome.commit.is_some() {
        text += "nothing serves this environment yet: its health is unknown until something does\n";
    }
    if outcome.unpublished {
        text += "the remote ledger does not have it yet: the next command that reaches it publishes it\n";
    }
    outcome.followed.iter().for_each(|followed| text += &self::text(followed));
    text
}

fn from_now(next: Timestamp, now: Timestamp) -> String {
    let seconds = (next.as_second() - now.as_second()).max(0);
    crate::config::types::Seconds(seconds.unsigned_abs()).to_string()
}

/// JUnit XML with these suites.
fn junit(suites: &str) -> String {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites>\n{suites}</testsuites>\n")
}

/// A suite with the gates' answers, and with what refused it when that was none of them.
fn suite(plan: &Plan) -> String {
    let name = escape(&format!("{}/{}", plan.pipeline, plan.environment));
    let refused = plan.refused.as_deref().filter(|_| !plan.allowed);
    let failures = plan.answers.iter().filter(|answer| answer.stops()).count() + usize::from(refused.is_some());
    let tests = plan.answers.len() + usize::from(refused.is_some());
    let mut text = format!("<testsuite name=\"{name}\" tests=\"{tests}\" failures=\"{failures}\">\n");
    for answer in &plan.answers {
        let gate = escape(&answer.gate);
        let reason = escape(&answer.reason);
        let inner = match answer.stops() {
            true => format!("<failure message=\"{}: {reason}\"/>", answer.verdict),
            false => format!("<system-out>{}: {reason}</system-out>", answer.verdict),
        };
        let _ = writeln!(text, "<testcase classname=\"{name}\" name=\"{gate}\">{inner}</testcase>");
    }
    if let Some(why) = refused {
        let why = escape(why);
        let _ = writeln!(text, "<testcase classname=\"{name}\" name=\"{RULES}\"><failure message=\"{why}\"/></testcase>");
    }
    text + "</testsuite>\n"
}

/// A suite of one case: the rules, or something on the way, stopped it before any gate was asked.
fn refusal(name: &str, why: &str) -> String {
    let (name, why) = (escape(name), escape(why));
    format!(
        "<testsuite name=\"{name}\" tests=\"1\" failures=\"0\" errors=\"1\">\n\
         <testcase classname=\"{name}\" name=\"{RULES}\"><error message=\"{why}\"/></testcase>\n</testsuite>\n"
    )
}
