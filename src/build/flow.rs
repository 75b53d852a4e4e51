//! The flow of a build: runs the steps whose results are not in the store, makes the images of the
//! layers that ship, remembers what was done.
//!
//! The images of other pipelines that run on a host are built first; then the application image;
//! then the host, whose app layers need the images' digests.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::base::{self, SetRequest};
use super::plan::{Part, Step};
use super::record::{self, BuildRecord, BuiltStep, Found, StepRecord};
use super::{
    Build, Built, BuiltHost, BuiltStepSummary, Images, Options, Prepared, changed_files, explain, host_tree, image, lock,
    look_up, prepare_with, secret, steps, work,
};
use crate::artifact::store::{Descriptor, Hold, Lock};
use crate::config::types::{AppImage, Pipeline};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::progress::{Event, Outcome};
use crate::sandbox::Session;

/// Builds `pipeline`.
pub fn build(build: &Build<'_>, pipeline: &Pipeline, options: &Options) -> Result<Built> {
    let started = Instant::now();
    let images = build_apps(build, pipeline, options)?;
    let (mut prepared, mut steps, found) = ready(build, pipeline, options, &images)?;
    let cached = found.iter().filter(|found| found.is_some()).count();
    tell_age(build, &prepared);
    build.progress.event(Event::Plan {
        pipeline: pipeline.name.to_string(),
        steps: steps.iter().map(|step| step.name.clone()).collect(),
        cached,
    });
    let (results, image) = if cached == steps.len() {
        sweep_leftovers(build)?;
        let results: Vec<_> = found.into_iter().flatten().map(|record| (record, false)).collect();
        let image = write_image(build, &prepared, &steps, &results)?;
        (results, image)
    } else {
        if found.first().is_some_and(Option::is_none)
            && let Some(image) = &mut prepared.base_image
        {
            base::pull(build, image)?;
        }
        run_parts(build, &mut prepared, &mut steps, found, options)?
    };
    finish(build, &prepared, &steps, results, image, options, started)
}

/// Builds the images of the other pipelines that run on the host.
fn build_apps(build_context: &Build<'_>, pipeline: &Pipeline, options: &Options) -> Result<Images> {
    let mut images = Images::new();
    for app in pipeline.host.iter().flat_map(|host| &host.apps) {
        let AppImage::Pipeline(file) = &app.image else { continue };
        if !images.contains_key(file) {
            let other = host_tree::resolve::pipeline(file)?;
            let built = build(build_context, &other, options).with_context(|| format!("cannot build the app `{}`", app.name))?;
            images.insert(file.clone(), built.digest);
        }
    }
    Ok(images)
}

/// Reads everything and brings the packages of the steps that will run into the cache; what the
/// archives no longer have moves the lock, and with it the plan.
fn ready(
    build: &Build<'_>,
    pipeline: &Pipeline,
    options: &Options,
    images: &Images,
) -> Result<(Prepared, Vec<Step>, Vec<Option<StepRecord>>)> {
    let mut prepared = prepare_with(build, pipeline, options.locked, images)?;
    let (mut steps, mut found) = (prepared.plan()?, Vec::new());
    for _ in 0..prepared.requests.len() + 1 {
        found = look_up(build, &steps)?;
        let run: Vec<&str> =
            steps.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(step, _)| step.name.as_str()).collect();
        let requests: Vec<SetRequest> = prepared.requests.iter().filter(|wanted| run.contains(&wanted.step)).cloned().collect();
        let mut lock = prepared.lock.clone();
        if requests.is_empty() || !base::fetch_all(build, pipeline, &requests, &mut lock, options.update_missing, "")? {
            break;
        }
        lock::save(&pipeline.dir, &lock)?;
        prepared = prepare_with(build, pipeline, options.locked, images)?;
        steps = prepared.plan()?;
    }
    Ok((prepared, steps, found))
}

/// Runs the steps of the application image, writes it, and runs those of the host, which may have it as an app.
fn run_parts(
    build: &Build<'_>,
    prepared: &mut Prepared,
    steps: &mut Vec<Step>,
    mut found: Vec<Option<StepRecord>>,
    options: &Options,
) -> Result<(Vec<(StepRecord, bool)>, Option<Descriptor>)> {
    let of_image = steps.iter().take_while(|step| step.part != Part::Host).count();
    let of_host = found.split_off(of_image);
    let mut results = run_steps(build, prepared, &steps[..of_image], Vec::new(), found, options)?;
    let image = write_image(build, prepared, &steps[..of_image], &results)?;
    if steps.len() > of_image {
        let mut found = of_host;
        if let Some(image) = &image
            && host_tree::resolve::own_image(build, prepared, image.digest)?
        {
            *steps = prepared.plan()?;
            found = look_up(build, &steps[of_image..])?;
        }
        results = run_steps(build, prepared, steps, results, found, options)?;
    }
    Ok((results, image))
}

/// Says how old the locked packages are (DESIGN section 7, contract 11).
fn tell_age(build: &Build<'_>, prepared: &Prepared) {
    let oldest = prepared
        .requests
        .iter()
        .filter_map(|wanted| prepared.lock.sets.get(&wanted.request.key()))
        .map(|set| set.resolved.as_str())
        .min();
    let Some(resolved) = oldest.and_then(|date| date.parse::<jiff::Timestamp>().ok()) else { return };
    let days = (build.host.now - resolved.as_second()) / 86_400;
    if days >= 1 {
        let date = resolved.strftime("%Y-%m-%d");
        build.progress.note(format!(
            "packages as locked on {date}, {days} day{} ago; `pipeline update` moves them",
            if days == 1 { "" } else { "s" }
        ));
    }
}

/// Removes what killed builds left, when nobody else is building.
fn sweep_leftovers(build: &Build<'_>) -> Result<()> {
    if !work::leftovers(build.store)? || build.store.alone()?.is_none() {
        return Ok(());
    }
    let session = build.session(false)?;
    let work = work::Work::take(build.store, None, &|path| session.call("remove", &path))?;
    work.remove(Some(&session))
}

/// Runs the steps that have no record, in order; answers every step's record and whether it ran.
/// `done` are the results of the first steps, `found` the records of those behind them.
pub(super) fn run_steps(
    build: &Build<'_>,
    prepared: &Prepared,
    steps: &[Step],
    done: Vec<(StepRecord, bool)>,
    found: Vec<Option<StepRecord>>,
    options: &Options,
) -> Result<Vec<(StepRecord, bool)>> {
    let session = build.session(options.shell)?;
    let work = work::Work::take(build.store, options.work_dir.as_deref(), &|path| session.call("remove", &path))?;
    let finder = secret::Finder::new(&prepared.secrets)?;
    let runner = steps::Runner {
        store: build.store,
        session: &session,
        work: &work,
        host: build.host,
        prepared,
        debs: build.debs(),
        finder: &finder,
        shell: options.shell,
    };
    let mut results = done;
    let mut failed = None;
    for (step, found) in steps[results.len()..].iter().zip(found) {
        let under = steps.iter().zip(&results).filter(|(below, _)| step.part.stands_on(below.part));
        let below: Vec<StepRecord> = under.map(|(_, (record, _))| record.clone()).collect();
        match one_step(build, &runner, step, &below, found) {
            Ok(result) => results.push(result),
            Err(error) => {
                failed = Some(error);
                break;
            }
        }
    }
    // After ^C or a killed unshare process, another one cleans up.
    let cleaned = match work_is_alive(&session) {
        true => work.remove(Some(&session)),
        false => build.session(false).and_then(|session| work.remove(Some(&session))),
    };
    match failed {
        Some(error) => Err(error),
        None => cleaned.map(|()| results),
    }
}

fn work_is_alive(session: &Session) -> bool {
    session.call::<_, u64>("size", &Path::new("/proc/self/fdinfo")).is_ok()
}

fn one_step(
    build: &Build<'_>,
    runner: &steps::Runner<'_>,
    step: &Step,
    below: &[StepRecord],
    found: Option<StepRecord>,
) -> Result<(StepRecord, bool)> {
    let name = step.name.clone();
    if let Some(record) = found {
        build.progress.event(Event::StepEnd { step: name, outcome: Outcome::Cached, seconds: 0.0, bytes: record.bytes() });
        return Ok((record, false));
    }
    // Two builds of the same step: the second waits and takes the first one's result.
    let _lock = Lock::wait(&build.store.cache("steps").join(format!("{}.lock", step.key.hex())), Hold::Exclusive)?;
    if let Found::Record(record) = record::find(build.store, &step.key)? {
        build.progress.event(Event::StepEnd { step: name, outcome: Outcome::Cached, seconds: 0.0, bytes: record.bytes() });
        return Ok((*record, false));
    }
    let because = explain::because(build.store, runner.prepared, step)?;
    build.progress.event(Event::StepStart { step: name.clone(), because });
    let started = Instant::now();
    match runner.run(step, below, build.progress) {
        Ok(record) => {
            if !record.dropped.is_empty() {
                build.progress.warn(format!(
                    "step `{name}`: device nodes and sockets do not go into a layer and were left out: {}",
                    record.dropped.join(", ")
                ));
            }
            build.progress.event(Event::StepEnd {
                step: name,
                outcome: Outcome::Ran,
                seconds: record.seconds,
                bytes: record.bytes(),
            });
            Ok((record, true))
        }
        Err(error) => {
            build.progress.event(Event::StepEnd {
                step: name.clone(),
                outcome: Outcome::Failed,
                seconds: started.elapsed().as_secs_f64(),
                bytes: 0,
            });
            Err(error)
        }
    }
}

/// Writes the application image, when there is one.
fn write_image(
    build: &Build<'_>,
    prepared: &Prepared,
    steps: &[Step],
    results: &[(StepRecord, bool)],
) -> Result<Option<Descriptor>> {
    if !prepared.pipeline.has_image() {
        return Ok(None);
    }
    let records: Vec<StepRecord> = results.iter().map(|(record, _)| record.clone()).collect();
    let recipe = image::recipe(prepared, steps, &records)?;
    refuse_secrets_in_config(prepared, &recipe)?;
    crate::artifact::image::write(build.store, &recipe).map(Some)
}

/// Writes the host image, tags what was made, remembers the build.
fn finish(
    build: &Build<'_>,
    prepared: &Prepared,
    steps: &[Step],
    results: Vec<(StepRecord, bool)>,
    image: Option<Descriptor>,
    options: &Options,
    started: Instant,
) -> Result<Built> {
    let mut made: Vec<(String, Descriptor)> = Vec::new();
    made.extend(image.map(|descriptor| (format!("{}:latest", prepared.pipeline.name), descriptor)));
    if prepared.machine.is_some() {
        let records: Vec<StepRecord> = results.iter().map(|(record, _)| record.clone()).collect();
        let recipe = image::host_recipe(prepared, steps, &records)?;
        let descriptor = crate::artifact::image::write(build.store, &recipe)?;
        made.push((format!("{}:latest.host", prepared.pipeline.name), descriptor));
    }
    let changed_files = changed_files(build, prepared)?;
    let summary = results.iter().map(|(record, ran)| BuiltStepSummary {
        step: record.step.clone(),
        key: record.key,
        ran: *ran,
        seconds: if *ran { record.seconds } else { 0.0 },
        script_seconds: if *ran { record.script_seconds } else { 0.0 },
        bytes: record.bytes(),
    });
    let (name, descriptor) = made.first().context("an image")?;
    let built = Built {
        schema: 1,
        name: name.clone(),
        digest: descriptor.digest,
        host: made.get(1).map(|(name, descriptor)| BuiltHost { name: name.clone(), digest: descriptor.digest }),
        steps: summary.collect(),
        seconds: started.elapsed().as_secs_f64(),
        changed_files,
    };
    if !options.untagged {
        for (name, descriptor) in &made {
            build.store.tag(name, descriptor)?;
        }
        remember(build, prepared, steps, &results, built.digest, changed_files)?;
    }
    for (name, descriptor) in made {
        build.progress.event(Event::Built { name, digest: descriptor.digest.to_string(), seconds: built.seconds });
    }
    Ok(built)
}

/// A secret that was also written into the pipeline file must not reach the image that way.
fn refuse_secrets_in_config(prepared: &Prepared, recipe: &crate::artifact::image::Recipe) -> Result<()> {
    let finder = secret::Finder::new(&prepared.secrets)?;
    let (config, manifest) = crate::artifact::image::encode(recipe)?;
    match finder.find(&config).or_else(|| finder.find(&manifest)) {
        Some(id) => Err(Problem::failed(format!("the value of secret `{id}` is in the image's configuration"))
            .hint("take it out of `image.env`, `image.labels` and `image.command`")
            .into()),
        None => Ok(()),
    }
}

fn remember(
    build: &Build<'_>,
    prepared: &Prepared,
    steps: &[Step],
    results: &[(StepRecord, bool)],
    digest: Digest,
    changed: usize,
) -> Result<()> {
    for (digest, listing) in prepared.listings() {
        let path = build.store.cache("listings").join(digest.hex());
        if !path.exists() {
            crate::artifact::store::write_cache(&path, &listing.encode())?;
        }
    }
    let steps = steps.iter().zip(results).map(|(step, (record, ran))| BuiltStep {
        step: step.name.clone(),
        key: step.key,
        ingredients: step.ingredients.clone(),
        ran: *ran,
        seconds: if *ran { record.seconds } else { 0.0 },
    });
    record::remember(
        build.store,
        BuildRecord {
            version: 1,
            pipeline: prepared.pipeline.name.to_string(),
            number: 0,
            digest,
            time: build.host.now,
            head: prepared.git.as_ref().map(|git| git.head.clone()),
            changed,
            steps: steps.collect(),
        },
    )
}
