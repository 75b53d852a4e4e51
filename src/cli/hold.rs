//! `pipeline approve`, `hold`, `freeze`, `thaw` and `clear`: decisions that no gate is asked about.

use anyhow::Result;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::desk::{Office, Place};
use super::{Global, ui};
use crate::config::syntax;
use crate::error::Problem;
use crate::release::decision::{Decision, Kind, Refused, Why};
use crate::release::desk::{self, Desk, Loaded};
use crate::release::promotion::{self, Candidate};
use crate::release::state::State;

#[derive(Debug, clap::Args)]
pub struct ApproveArgs {
    /// Name of the pipeline; default: the one of this folder
    pipeline: Option<String>,
    /// The environment the release is to come to, also as PIPELINE/ENVIRONMENT
    #[arg(long = "for", value_name = "ENVIRONMENT")]
    environment: String,
    /// The release: a version, or a digest or the start of one; default: what would come next
    #[arg(long, value_name = "RELEASE")]
    release: Option<String>,
    /// Why; kept in the ledger
    #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
    reason: String,
}

#[derive(Debug, clap::Args)]
pub struct HoldArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    /// Take the hold away
    #[arg(long)]
    lift: bool,
    /// Why; kept in the ledger
    #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
    reason: String,
}

#[derive(Debug, clap::Args)]
pub struct FreezeArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME", conflicts_with = "all")]
    pipeline: Option<String>,
    /// Every environment of this name, in all pipelines
    #[arg(long)]
    all: bool,
    /// When it ends: a time (`2026-12-24T18:00:00Z`) or how long (`12h`); default: until it is thawed
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Why; kept in the ledger
    #[arg(long, short = 'm', value_name = "TEXT")]
    reason: String,
}

#[derive(Debug, clap::Args)]
pub struct ThawArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME", conflicts_with = "all")]
    pipeline: Option<String>,
    /// Every environment of this name, in all pipelines
    #[arg(long)]
    all: bool,
    /// Why; kept in the ledger
    #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
    reason: String,
}

#[derive(Debug, clap::Args)]
pub struct ClearArgs {
    /// PIPELINE/ENVIRONMENT, or ENVIRONMENT of this folder's pipeline
    environment: String,
    /// The release that is marked bad: a version, or a digest or the start of one
    release: String,
    /// Name of the pipeline
    #[arg(long, short, value_name = "NAME")]
    pipeline: Option<String>,
    /// Why; kept in the ledger
    #[arg(long, short = 'm', value_name = "TEXT", default_value = "")]
    reason: String,
}

pub fn approve(global: &Global, args: ApproveArgs) -> Result<u8> {
    let given = args.environment.split_once('/').map(|(name, _)| name).or(args.pipeline.as_deref());
    let office = Office::open(global, given)?;
    let place = office.place(&args.environment, args.pipeline.as_deref())?;
    let wanted = args.release.as_deref();
    // Where releases enter nobody upstream knows them: as with `promote` it is the store that does.
    let in_store = super::release::find(&office.around.store, &place.pipeline, wanted).ok();
    note(global, &office, &place, &|loaded, state, time| {
        let policy = loaded.policy.environment(&place.environment)?;
        let known = wanted.and_then(|wanted| desk::known_release(loaded, &place.environment, wanted));
        let enters = in_store.as_ref().filter(|_| policy.from.names().is_empty());
        let found = match (wanted, known, enters) {
            (_, Some(known), _) => known,
            (_, None, Some(made)) => Candidate { release: made.digest, version: made.version.clone(), author: None },
            (Some(wanted), None, None) => {
                return Err(Refused::new(Why::NotUpstream, format!("nobody knows a release `{wanted}` here")));
            }
            (None, None, None) => promotion::candidate(loaded.view(), &place.environment)?.ok_or_else(|| {
                Refused::new(Why::Nothing, format!("nothing new waits for `{}`", state.name()))
                    .hint("`--release` names one that is upstream")
            })?,
        };
        Ok(Decision {
            to: Some(found.release),
            version: Some(found.version),
            author: found.author,
            config: Some(state.configuration(policy).digest()),
            reason: args.reason.clone(),
            ..Decision::new(Kind::Approve, office.name(), time)
        })
    })
}

pub fn hold(global: &Global, args: HoldArgs) -> Result<u8> {
    let (office, place) = at(global, &args.environment, args.pipeline.as_deref())?;
    let kind = if args.lift { Kind::Lift } else { Kind::Hold };
    note(global, &office, &place, &|_, _, time| {
        Ok(Decision { reason: args.reason.clone(), ..Decision::new(kind, office.name(), time) })
    })
}

pub fn freeze(global: &Global, args: FreezeArgs) -> Result<u8> {
    let until = args.until.as_deref().map(|text| time(text, Timestamp::now())).transpose()?;
    if args.all {
        return all(global, &args.environment, Kind::Freeze, &args.reason, until);
    }
    let (office, place) = at(global, &args.environment, args.pipeline.as_deref())?;
    note(global, &office, &place, &|_, _, time| {
        Ok(Decision { reason: args.reason.clone(), until, ..Decision::new(Kind::Freeze, office.name(), time) })
    })
}

pub fn thaw(global: &Global, args: ThawArgs) -> Result<u8> {
    if args.all {
        return all(global, &args.environment, Kind::Thaw, &args.reason, None);
    }
    let (office, place) = at(global, &args.environment, args.pipeline.as_deref())?;
    note(global, &office, &place, &|_, _, time| {
        Ok(Decision { reason: args.reason.clone(), ..Decision::new(Kind::Thaw, office.name(), time) })
    })
}

pub fn clear(global: &Global, args: ClearArgs) -> Result<u8> {
    let (office, place) = at(global, &args.environment, args.pipeline.as_deref())?;
    note(global, &office, &place, &|_, state, time| {
        let wanted = args.release.as_str();
        let found = state.bad.iter().find(|(release, bad)| bad.version == wanted || release.is_called(wanted));
        let found = found.ok_or_else(|| {
            let known: Vec<&str> = state.bad.values().map(|bad| bad.version.as_str()).collect();
            let refused = Refused::new(Why::Nothing, format!("`{}` is not marked bad in `{}`", args.release, state.name()));
            if known.is_empty() { refused } else { refused.hint(format!("marked are `{}`", known.join("`, `"))) }
        })?;
        let (to, version) = (Some(*found.0), Some(found.1.version.clone()));
        Ok(Decision { to, version, reason: args.reason.clone(), ..Decision::new(Kind::Clear, office.name(), time) })
    })
}

fn at(global: &Global, environment: &str, pipeline: Option<&str>) -> Result<(Office, Place)> {
    let office = Office::open(global, environment.split_once('/').map(|(name, _)| name).or(pipeline))?;
    let place = office.place(environment, pipeline)?;
    Ok((office, place))
}

/// Makes a decision about one environment and shows it.
fn note(
    global: &Global,
    office: &Office,
    place: &Place,
    make: &dyn Fn(&Loaded, &State, Timestamp) -> Result<Decision, Refused>,
) -> Result<u8> {
    let work = |desk: &Desk<'_>| {
        let made = desk.note(&place.pipeline, &place.environment, make)?;
        Ok((made, !desk.load(&place.pipeline)?.policy.people.is_empty()))
    };
    let ((state, commit), people) = office.sit(work)?;
    office.say_unchecked(people);
    let decision = &state.decision;
    let value = json!({"schema": 1, "environment": state.name(), "decision": decision, "commit": commit});
    ui::answer(global, &value, || {
        let what = decision.version.as_ref().map(|version| format!(" {version}")).unwrap_or_default();
        let until = decision.until.map(|until| format!(" until {until}")).unwrap_or_default();
        format!("{}: {}{what}{until} ({})\n", state.name(), decision.kind, &commit[..12])
    })?;
    Ok(0)
}

fn all(global: &Global, environment: &str, kind: Kind, reason: &str, until: Option<Timestamp>) -> Result<u8> {
    if environment.contains('/') {
        return Err(Problem::usage("`--all` is about all pipelines: write the environment alone").into());
    }
    let office = Office::open(global, None)?;
    let commit = office.sit(|desk| desk.freeze_all(environment, kind, reason, until))?;
    let value = json!({"schema": 1, "environment": environment, "kind": kind, "until": until, "commit": commit});
    ui::answer(global, &value, || format!("{environment} of all pipelines: {kind} ({})\n", &commit[..12]))?;
    Ok(0)
}

/// `2026-12-24T18:00:00Z`, or how long from `now`; whole seconds, as everything in the ledger.
fn time(text: &str, now: Timestamp) -> Result<Timestamp> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(Timestamp::from_second(time.as_second())?);
    }
    let now = Timestamp::from_second(now.as_second())?;
    if let Ok(length) = syntax::duration(text) {
        let seconds = i64::try_from(length.as_secs()).unwrap_or(i64::MAX);
        return Ok(now.checked_add(SignedDuration::from_secs(seconds))?);
    }
    Err(Problem::usage(format!("`{text}` is neither a time nor a length of time"))
        .hint("like `2026-12-24T18:00:00Z`, `2026-12-24T18:00:00+01:00` or `12h`")
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_freezes() {
        let now: Timestamp = "2026-11-21T12:00:00.9Z".parse().unwrap();
        let cases = [
            ("2026-12-24T18:00:00.5+01:00", Some("2026-12-24T17:00:00Z")),
            ("90m", Some("2026-11-21T13:30:00Z")),
            ("tomorrow", None),
            ("2026-12-24", None),
        ];
        for (text, expected) in cases {
            assert_eq!(time(text, now).ok().map(|time| time.to_string()).as_deref(), expected, "{text}");
        }
    }
}
