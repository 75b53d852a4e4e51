//! `pipeline build --release`: everything a pipeline makes, as one release; and releases by name.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{Global, ui};
use crate::artifact::keys::PrivateKey;
use crate::artifact::provenance::{self, Builder, Material};
use crate::artifact::release::{self, Release};
use crate::artifact::store::{REF_NAME, Store};
use crate::build::Built;
use crate::build::lock;
use crate::config::types::{Check, Pipeline, role};
use crate::error::{Problem, nearest};
use crate::oci::digest::Digest;
use crate::progress::Progress as _;
use crate::release::change::{self, Artifact, Change, Package, Setting};
use crate::release::decision::Configuration;
use crate::release::make::{self, Made, Wish};
use crate::release::mirror::What;
use crate::release::policy::Policy;
use crate::release::promotion::{Action, Candidate};

use super::desk::Office;
use crate::release::desk::{Ask, Outcome};

/// Key that signs releases, instead of `--key`.
pub const KEY: &str = "PIPELINE_KEY";
/// Id of the builder in provenance, instead of this program's.
const BUILDER: &str = "PIPELINE_BUILDER_ID";

#[derive(Debug, clap::Args)]
pub struct ReleaseArgs {
    /// Make a release of what is built: bake the host, list packages, write provenance, sign; it enters the environments that are automatic
    #[arg(long, conflicts_with_all = ["dry_run", "shell"])]
    pub release: bool,
    /// The release's readable version. Default: `git describe --tags --always --dirty`
    #[arg(long, value_name = "VERSION", requires = "release")]
    pub release_version: Option<String>,
    /// Private key that signs the release, as `pipeline keys generate` or cosign wrote it [env: PIPELINE_KEY]
    #[arg(long, value_name = "FILE", requires = "release")]
    pub key: Option<PathBuf>,
    /// Write the release's digest to this file
    #[arg(long, value_name = "FILE", requires = "release")]
    pub digest_file: Option<PathBuf>,
}

/// The answer of `build --release`.
#[derive(Debug, Serialize)]
pub struct Answer {
    pub schema: u32,
    pub built: Built,
    pub release: Made,
    /// Where it came by itself.
    pub entered: Vec<Outcome>,
}

/// Makes the release of what was just built, and lets it enter.
pub fn make(global: &Global, around: &ui::Surroundings, pipeline: &Pipeline, built: Built, args: &ReleaseArgs) -> Result<Answer> {
    let name = pipeline.name.to_string();
    let version = match &args.release_version {
        Some(version) => version.clone(),
        None => describe(pipeline)?,
    };
    // Not by clap: a job that has the variable also builds without a release.
    let key = args.key.clone().or_else(|| around.host.variables.get(KEY).map(PathBuf::from));
    let key = key.map(|file| private_key(around, &file)).transpose()?;
    let file = Digest::of(fs_err::read(&pipeline.file)?);
    let version_text = env!("PIPELINE_VERSION");
    let id = around.host.variables.get(BUILDER).cloned().unwrap_or_else(|| provenance::builder_id(version_text));
    let program = Digest::of_reader(fs_err::File::open(&around.host.program)?)?.0;
    let other = crate::build::uncommitted(pipeline)?;
    if let (0, Some(path), Some(_)) = (built.changed_files, &other, make::source_of(&around.store, &built.digest, true)?) {
        let path = path.strip_prefix(&around.cwd).unwrap_or(path);
        around.progress.note(format!("the provenance says `dirty`: `{}` is not as a commit has it", path.display()));
    }
    let dirty = built.changed_files > 0 || other.is_some();
    let reference = pipeline.releases.registry.clone().unwrap_or_else(|| name.clone());
    let wish = Wish {
        name: &name,
        version: &version,
        source: make::source_of(&around.store, &built.digest, dirty)?,
        builder: Builder { id, version: version_text.into(), digest: program },
        materials: materials(around, pipeline, &built)?,
        parameters: make::parameters(&name, &file, &version),
        reference: &reference,
        key: key.as_ref(),
        threads: around.host.threads,
    };
    let made = make::make(&around.store, &wish).with_context(|| format!("cannot make a release of `{name}`"))?;
    if !made.signed {
        around.progress.note(format!("the release is not signed: `--key FILE` or {KEY} signs it"));
    }
    if let Some(file) = &args.digest_file {
        fs_err::write(file, format!("{}\n", made.release.digest))?;
    }
    let entered = enter(global, &name, &made.release, !pipeline.releases.environments.is_empty())?;
    Ok(Answer { schema: 1, built, release: made, entered })
}

/// The key that signs releases; its password is in the environment.
pub fn private_key(around: &ui::Surroundings, file: &std::path::Path) -> Result<PrivateKey> {
    let password = around.host.variables.get(super::ledger::PASSWORD).map(|it| it.as_bytes().to_vec());
    PrivateKey::load(file, || Ok(password.unwrap_or_default()))
}

/// The answer for people.
pub fn text(answer: &Answer) -> String {
    let mut text = super::report::built(&answer.built);
    let made = &answer.release;
    text += &format!("{} {}\n", made.name, made.release.digest);
    for entry in &made.release.entries {
        text += &format!("  {} {}\n", entry.kind, entry.digest);
    }
    let signed = if made.signed { "signed" } else { "not signed" };
    text += &format!("  {signed}; {} packages listed\n", made.packages);
    answer.entered.iter().for_each(|outcome| text += &super::promote::text(outcome));
    text
}

/// 1 when the release could not enter where it should by itself.
pub fn status(answer: &Answer) -> u8 {
    u8::from(answer.entered.iter().any(|outcome| outcome.commit.is_none()))
}

/// Lets a release come to the environments of the ledger where releases enter by themselves.
fn enter(global: &Global, name: &str, made: &Release, has_environments: bool) -> Result<Vec<Outcome>> {
    let office = match Office::open(global, Some(name)) {
        Ok(office) => office,
        // Nobody has to be known to Git only to build.
        Err(_) if !has_environments => return Ok(Vec::new()),
        Err(error) => return Err(error.context("the release is made, and entered no environment")),
    };
    let load = || crate::release::desk::load(&office.ledger.snapshot()?, name);
    match office.sit(|desk| desk.sync(false)) {
        Ok(_) => {}
        // Whoever only builds does not wait for a ledger that knows nothing of it.
        Err(_) if !has_environments && load()?.is_none() => return Ok(Vec::new()),
        Err(error) => return Err(error.context("the release is made, and entered no environment")),
    }
    let Some(loaded) = load()? else { return Ok(Vec::new()) };
    let automatic = loaded.policy.environments.iter().filter(|(_, policy)| policy.automatic && policy.from.names().is_empty());
    let mut outcomes = Vec::new();
    for (environment, _) in automatic {
        let current = loaded.states.get(environment).and_then(|state| state.current.as_ref());
        if current.is_some_and(|binding| binding.release == made.digest) {
            // What a run before this one did not get to do.
            outcomes.extend(office.sit(|desk| desk.follow(name, environment))?);
            continue;
        }
        let author = author(&office, &loaded.policy, made);
        let candidate = Candidate { release: made.digest, version: made.version.clone(), author };
        let ask = Ask::default();
        outcomes.push(office.sit(|desk| desk.decide(name, environment, &Action::Enter(candidate), &ask))?);
    }
    outcomes.iter_mut().for_each(|outcome| super::promote::told(global, &office, outcome));
    office.tags(name, What::Left);
    Ok(outcomes)
}

/// Who made a release: the one who builds and lets it enter. Where that is one of `people` who can approve nothing, a CI
/// job, it is the author of the commit that was built, as Git has it.
pub fn author(office: &Office, policy: &Policy, made: &Release) -> Option<String> {
    let actor = office.name();
    let is_job = policy.people.get(actor).is_some_and(|person| {
        let gates = policy.environments.values().flat_map(|environment| &environment.gates);
        let mut asked = gates.filter_map(|gate| match &gate.check {
            Check::Approve(approve) => Some(approve.role.as_str()),
            _ => None,
        });
        !person.roles.contains(role::APPROVE) && !asked.any(|role| person.roles.contains(role))
    });
    let of_commit = || -> Option<String> {
        let dir = office.here.as_ref().map_or(&office.around.cwd, |here| &here.dir);
        let repository = git2::Repository::discover(dir).ok()?;
        let commit = repository.find_commit(git2::Oid::from_str(made.revision.as_deref()?).ok()?).ok()?;
        commit.author().name().ok().filter(|name| !name.is_empty()).map(str::to_owned)
    };
    is_job.then(of_commit).flatten().or_else(|| Some(actor.to_owned()))
}

/// What went into the build: the base image and every locked package.
fn materials(around: &ui::Surroundings, pipeline: &Pipeline, built: &Built) -> Result<Vec<Material>> {
    let mut materials: Vec<Material> = make::base_of(&around.store, &built.digest)?.into_iter().collect();
    if let Some(lock) = lock::load(&pipeline.dir)? {
        for package in lock.sets.values().flat_map(|set| &set.packages) {
            let uri = format!("pkg:deb/debian/{}@{}?arch={}", package.name, package.version, package.arch);
            materials.push(Material { name: package.name.clone(), uri, digest: package.sha256 });
        }
    }
    materials.sort();
    materials.dedup();
    Ok(materials)
}

/// `git describe --tags --always --dirty` of the source's repository.
fn describe(pipeline: &Pipeline) -> Result<String> {
    let repository = git2::Repository::discover(&pipeline.dir).map_err(|_| {
        Problem::usage("a release needs a version, and the pipeline is in no Git repository")
            .hint("write it with `--release-version`")
    })?;
    let mut options = git2::DescribeOptions::new();
    options.describe_tags().show_commit_oid_as_fallback(true);
    let mut format = git2::DescribeFormatOptions::new();
    format.dirty_suffix("-dirty");
    let text = repository.describe(&options).and_then(|description| description.format(Some(&format)));
    let text = text.context("the repository has no commit to name a version after").map_err(|error| {
        anyhow::Error::from(Problem::usage(format!("{error:#}")).hint("write the version with `--release-version`"))
    })?;
    // As a tag has it: `v1.4` stays, and what a tag cannot hold gives way.
    Ok(text.chars().map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect())
}

/// A release of `name` in the store: by version, by digest or the start of one; the newest when nothing is wanted.
pub fn find(store: &Store, name: &str, wanted: Option<&str>) -> Result<Release> {
    let tag = release::tag(name, wanted.unwrap_or("latest"));
    if let Some(found) = store.tagged(&tag)? {
        return release::read(store, &found.digest);
    }
    let prefix = format!("{name}:");
    let all: Vec<(String, Digest)> = store
        .index()?
        .manifests
        .into_iter()
        .filter_map(|descriptor| {
            let tag = descriptor.annotations.get(REF_NAME)?.strip_prefix(&prefix)?.strip_suffix(".release")?.to_owned();
            Some((tag, descriptor.digest))
        })
        .collect();
    if let Some(wanted) = wanted {
        if let Some((_, digest)) = all.iter().find(|(_, digest)| digest.is_called(wanted)) {
            return release::read(store, digest);
        }
        let problem = Problem::usage(format!("the store has no release `{wanted}` of `{name}`"));
        return Err(match nearest(wanted, all.iter().map(|(tag, _)| tag.as_str())) {
            Some(near) => problem.hint(format!("the nearest is `{near}`")),
            None => problem.hint(format!("`pipeline build {name} --release` makes one")),
        }
        .into());
    }
    Err(Problem::usage(format!("the store has no release of `{name}`"))
        .hint(format!("`pipeline build {name} --release` makes one"))
        .into())
}

/// What is different between two pairs, a line each: artifacts, commit, packages, configuration, size. `most`: packages
/// that are named, the others are counted.
pub fn changed(change: &Change, most: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let short = |digest: &Option<Digest>| digest.as_ref().map_or_else(|| "nothing".to_owned(), Digest::short);
    for Artifact { kind, name, digest } in &change.artifacts {
        lines.push(match (&digest.from, &digest.to) {
            (Some(_), None) => format!("{kind} {name} {} is gone", short(&digest.from)),
            _ if digest.stays() => format!("{kind} {name} {} stays", short(&digest.to)),
            _ => format!("{kind} {name} {} → {}", short(&digest.from), short(&digest.to)),
        });
    }
    if !change.commit.stays() {
        let shown = |revision: &Option<String>| revision.as_ref().map_or("unknown".into(), |it| it.chars().take(12).collect());
        let from: String = if change.release.from.is_none() { "nothing".into() } else { shown(&change.commit.from) };
        lines.push(format!("commit {from} → {}", shown(&change.commit.to)));
    }
    let packages = change.packages.as_deref().unwrap_or_default();
    let list = |versions: &std::collections::BTreeSet<String>| versions.iter().cloned().collect::<Vec<_>>().join(", ");
    lines.extend(packages.iter().take(most).map(|Package { kind, name, from, to }| match (from.is_empty(), to.is_empty()) {
        (true, _) => format!("{kind} {name} {} is new", list(to)),
        (_, true) => format!("{kind} {name} is gone"),
        _ => format!("{kind} {name} {} → {}", list(from), list(to)),
    }));
    if packages.len() > most {
        lines.push(format!("… and {} more packages; `--json` has all", packages.len() - most));
    }
    lines.extend(settings(&change.values, &change.secrets));
    if let (Some(bytes), false) = (change.bytes, change.release.stays()) {
        let packages = change.packages.as_ref().map(|packages| format!(", {} packages", packages.len())).unwrap_or_default();
        lines.push(format!("{} to move{packages}", super::report::bytes(bytes)));
    }
    lines.extend(change.unknown.iter().map(|why| format!("not known: {why}")));
    lines
}

/// What is different between two configurations, a line each.
pub fn configured(from: &Configuration, to: &Configuration) -> Vec<String> {
    let (values, secrets) = change::configured(Some(from), to);
    settings(&values, &secrets)
}

fn settings(values: &[Setting], secrets: &[String]) -> Vec<String> {
    let line = |Setting { name, value }: &Setting| match (&value.from, &value.to) {
        (Some(from), Some(to)) => format!("{name}: {from} → {to}"),
        (None, Some(to)) => format!("{name}: new, {to}"),
        _ => format!("{name}: gone"),
    };
    let mut lines: Vec<String> = values.iter().map(line).collect();
    if !secrets.is_empty() {
        lines.push(format!("the secrets differ: {}", secrets.join(", ")));
    }
    lines
}
