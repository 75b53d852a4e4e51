//! From source to image: read → plan (pure) → do → record.
//!
//! [`prepare`] reads the pipeline's inputs, [`plan::plan`] turns them into steps with keys,
//! [`build`] runs the steps whose results are not in the store and makes the image of the layers
//! that ship. Nothing changed means nothing run, and no process started.

pub mod base;
pub mod builder;
pub mod debian;
pub mod detect;
pub mod explain;
mod flow;
pub mod host;
pub mod host_tree;
pub mod image;
pub mod inside;
pub mod lock;
pub mod plan;
pub mod prune;
pub mod record;
pub mod run;
pub mod secret;
pub mod source;
pub mod steps;
pub mod update;
pub mod verify;
pub mod work;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

pub use flow::build;

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::artifact::store::Store;
use crate::config::types::{AppImage, Base, BuilderRef, Configure, FileContent, Pipeline, Source};
use crate::error::Problem;
use crate::oci::digest::{Digest, Hasher};
use crate::progress::Progress;
use crate::sandbox::{self, Session};
use base::{BaseImage, SetRequest};
use builder::Builder;
use flow::run_steps;
use host::Host;
use plan::{BaseInput, FileInput, HostApp, HostInput, Inputs, SetInput, Step};
use record::{Found, StepRecord};
use source::git::GitState;
use source::listing::Listing;

/// What every flow of a build is given.
#[derive(Clone, Copy)]
pub struct Build<'a> {
    pub store: &'a Store,
    pub host: &'a Host,
    pub progress: &'a dyn Progress,
    /// Where downloaded packages are; `None`: the store's own cache.
    pub debs: Option<&'a Path>,
}

impl std::fmt::Debug for Build<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Build").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Build<'_> {
    pub fn debs(&self) -> PathBuf {
        self.debs.map_or_else(|| self.store.cache("debs"), Path::to_path_buf)
    }

    /// Starts an unshare process.
    pub fn session(&self, interactive: bool) -> Result<Session> {
        self.start_session(false, interactive)
    }

    /// Starts an unshare process; where this machine refuses, the checks of `doctor` say why.
    pub fn start_session(&self, own_network: bool, interactive: bool) -> Result<Session> {
        let options =
            sandbox::Options { program: self.host.program.clone(), own_network, interactive, fault: self.host.fault_inside };
        Session::start(&options).map_err(|error| {
            let uid = rustix::process::geteuid().as_raw();
            let user = sandbox::user_name_of(uid).unwrap_or_else(|| uid.to_string());
            let env = sandbox::probe::ProbeEnv::new(
                self.host.path.clone(),
                uid,
                user,
                self.store.root().to_path_buf(),
                self.host.program.clone(),
            );
            let mut problem = Problem::failed("this machine does not let pipeline make its sandbox");
            for check in sandbox::probe::probe(&env).into_iter().filter(sandbox::probe::Check::blocks) {
                problem = problem.hint(format!(
                    "{}: {}{}",
                    check.name,
                    check.detail,
                    check.fix.map(|fix| format!("; {fix}")).unwrap_or_default()
                ));
            }
            error.context(problem)
        })
    }
}

/// The wishes of a caller of [`build`].
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Refuse to resolve what the lock does not hold.
    pub locked: bool,
    /// Resolve locked packages anew that the archives no longer have.
    pub update_missing: bool,
    /// A shell in the step that fails.
    pub shell: bool,
    /// Where work folders are made; `None`: in the store.
    pub work_dir: Option<PathBuf>,
    /// Whether the result is tagged `NAME:latest` and remembered.
    pub untagged: bool,
}

/// Everything that was read for a build.
#[derive(Debug)]
pub struct Prepared {
    pub pipeline: Pipeline,
    pub builder: Option<Builder>,
    /// The runtime is an S2I builder image.
    pub image_builder: bool,
    pub lock: lock::Lock,
    pub requests: Vec<SetRequest>,
    pub base_image: Option<BaseImage>,
    pub tar: Option<Digest>,
    pub source_root: Option<PathBuf>,
    pub listing: Option<Listing>,
    pub lock_files: Option<Listing>,
    /// Digests of the two listings.
    pub listing_digests: (Option<Digest>, Option<Digest>),
    pub git: Option<GitState>,
    /// How many files differ from HEAD, still being counted while the first steps run.
    counting: Mutex<Option<JoinHandle<Result<usize>>>>,
    pub s2i_environment: BTreeMap<String, String>,
    pub secrets: Vec<secret::Value>,
    pub fingerprints: Vec<(String, String)>,
    pub configure: Vec<Digest>,
    pub source_epoch: i64,
    /// What goes into the steps of the host, when there is one.
    pub machine: Option<host_tree::Machine>,
}

impl Prepared {
    /// The locked set a step installs.
    pub fn set(&self, step: &str) -> Result<&lock::Set> {
        let wanted = self.requests.iter().find(|wanted| wanted.step == step).context("a step with packages")?;
        self.lock.sets.get(&wanted.request.key()).context("a locked set")
    }

    /// The source's listings and their digests, as they are now.
    pub fn listings(&self) -> Vec<(Digest, &Listing)> {
        let pairs = [(self.listing_digests.0, &self.listing), (self.listing_digests.1, &self.lock_files)];
        pairs.into_iter().filter_map(|(digest, listing)| Some((digest?, listing.as_ref()?))).collect()
    }

    fn set_input(&self, step: &str) -> Option<SetInput> {
        let set = self.set(step).ok()?;
        let packages =
            set.packages.iter().map(|package| (package.name.clone(), package.version.clone(), package.sha256.hex())).collect();
        Some(SetInput { suite: set.request.suite.clone(), packages, epoch: set.epoch() })
    }

    /// The plan of these inputs.
    pub fn plan(&self) -> Result<Vec<Step>> {
        let base = match (&self.base_image, &self.pipeline.base, self.tar) {
            (Some(image), _, _) => BaseInput::Image { reference: image.name.clone(), digest: image.pinned },
            (None, Base::Debian(_), _) => BaseInput::Debian(self.set_input("base").context("a locked base")?),
            (None, _, Some(digest)) => BaseInput::Tar { digest },
            _ => BaseInput::Scratch,
        };
        Ok(plan::plan(&Inputs {
            pipeline: &self.pipeline,
            base,
            packages: self.set_input("packages"),
            build_packages: self.set_input("build-packages"),
            builder: self.builder.as_ref(),
            image_builder: self.image_builder,
            source: self.listing_digests.0,
            lock_files: self.listing_digests.1,
            s2i_environment: self.s2i_environment.clone(),
            secrets: self.fingerprints.clone(),
            configure: self.configure.clone(),
            source_epoch: self.source_epoch,
            host: self.machine.as_ref().map(|machine| self.host_input(machine)).transpose()?,
        }))
    }

    fn host_input(&self, machine: &host_tree::Machine) -> Result<HostInput> {
        let apps = machine.apps.iter().map(|app| {
            let image = match (app.image, app.stand_in) {
                (Some(digest), _) => digest.to_string(),
                (None, Some(key)) => format!("not built, {key}"),
                (None, None) => "not built".into(),
            };
            let mut files =
                vec![FileInput { name: "settings of the app".into(), digest: Digest::of(app.settings().to_string()) }];
            for name in host_tree::apps::TEMPLATES {
                let digest = Digest::of(crate::template::text(name)?);
                files.push(FileInput { name: format!("template {name}"), digest });
            }
            Ok(HostApp { name: app.app.name.clone(), image, files })
        });
        Ok(HostInput {
            packages: self.set_input("host-packages").context("locked packages of the host")?,
            tools: self.set_input("host-tools"),
            packages_files: machine.packages.inputs(),
            files: machine.configuration.inputs(),
            apps: apps.collect::<Result<_>>()?,
        })
    }
}

/// A finished build.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Built {
    pub schema: u32,
    /// `NAME:latest`; `NAME:latest.host` when there is only a host.
    pub name: String,
    /// Digest of the manifest of that image.
    pub digest: Digest,
    /// The host beside the application image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<BuiltHost>,
    pub steps: Vec<BuiltStepSummary>,
    pub seconds: f64,
    /// Files of the source that differ from HEAD.
    pub changed_files: usize,
}

/// The host image of a pipeline that makes both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BuiltHost {
    /// `NAME:latest.host`.
    pub name: String,
    /// Digest of its manifest.
    pub digest: Digest,
}

/// One line of [`Built`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BuiltStepSummary {
    pub step: String,
    pub key: Digest,
    pub ran: bool,
    pub seconds: f64,
    /// How much of `seconds` was the script's own.
    pub script_seconds: f64,
    /// Bytes of the layer's blob.
    pub bytes: u64,
}

/// Reads everything a build of `pipeline` depends on. Resolves what the lock does not hold, and
/// then writes the lock.
pub fn prepare(build: &Build<'_>, pipeline: &Pipeline, locked: bool) -> Result<Prepared> {
    prepare_with(build, pipeline, locked, &Images::new())
}

/// Images of other pipelines that were just built, by pipeline file.
type Images = BTreeMap<PathBuf, Digest>;

/// [`prepare`] with `images` known.
fn prepare_with(build: &Build<'_>, pipeline: &Pipeline, locked: bool, images: &Images) -> Result<Prepared> {
    // Before this pipeline's lock is read: theirs is the same file.
    let apps = match &pipeline.host {
        Some(host) => host_tree::resolve::apps(build, host, locked, images)?,
        None => Vec::new(),
    };
    let mut lock = lock::load(&pipeline.dir)?.unwrap_or_default();
    let before = lock.clone();
    let base_image = base::image_of(build, pipeline, &mut lock, locked, false)?;
    let mut prepared = prepare_unresolved(pipeline, lock, base_image)?;
    resolve_sets(build, &mut prepared, locked)?;
    if prepared.lock != before {
        lock::save(&pipeline.dir, &prepared.lock)?;
        build.progress.note(format!("wrote `{}`; commit it, so that every build is of the same packages", lock::FILE_NAME));
    }
    if prepared.builder.is_some() || prepared.image_builder {
        read_source(build, &mut prepared)?;
    }
    read_configure(&mut prepared)?;
    prepared.secrets = secret::read(&pipeline.build.secrets, &|name| build.host.variables.get(name).cloned())?;
    if !prepared.secrets.is_empty() {
        let key = build.store.hmac_key()?;
        prepared.fingerprints = prepared
            .secrets
            .iter()
            .map(|value| Ok((value.id.clone(), secret::fingerprint(&key, value)?)))
            .collect::<Result<_>>()?;
    }
    if let Some(host) = &pipeline.host {
        host_tree::resolve::machine(build, &mut prepared, host, apps)?;
    }
    Ok(prepared)
}

/// What is known of a build before its packages are: no sets, no source.
fn prepare_unresolved(pipeline: &Pipeline, lock: lock::Lock, base_image: Option<BaseImage>) -> Result<Prepared> {
    let builder = Builder::load(&pipeline.runtime.builder)?;
    check_suite(pipeline, builder.as_ref())?;
    let tar = match &pipeline.base {
        Base::Tar { file, .. } if base_image.is_none() => Some(Digest::of_reader(fs_err::File::open(file)?)?.0),
        _ => None,
    };
    Ok(Prepared {
        pipeline: pipeline.clone(),
        builder,
        image_builder: matches!(pipeline.runtime.builder, BuilderRef::Image(_)),
        lock,
        requests: Vec::new(),
        base_image,
        tar,
        source_root: None,
        listing: None,
        lock_files: None,
        listing_digests: (None, None),
        git: None,
        counting: Mutex::new(None),
        s2i_environment: BTreeMap::new(),
        secrets: Vec::new(),
        fingerprints: Vec::new(),
        configure: Vec::new(),
        source_epoch: plan::FIXED_EPOCH,
        machine: None,
    })
}

/// A builder says which Debian suites it was made for.
fn check_suite(pipeline: &Pipeline, builder: Option<&Builder>) -> Result<()> {
    if let (Some(builder), Base::Debian(debian)) = (builder, &pipeline.base)
        && !builder.meta.suites.is_empty()
        && !builder.meta.suites.contains(&debian.suite)
    {
        let suites: Vec<_> = builder.meta.suites.iter().map(ToString::to_string).collect();
        return Err(Problem::usage(format!("builder `{}` is not made for `{}`", builder.meta.name, debian.suite))
            .hint(format!("it is made for {}", suites.join(", ")))
            .into());
    }
    Ok(())
}

/// Works out what package sets are asked for. Answers the dpkg status of an image base where it
/// had to be read for that, else nothing.
fn read_requests(build: &Build<'_>, prepared: &mut Prepared) -> Result<String> {
    let meta = prepared.builder.as_ref().map(|builder| builder.meta.clone());
    let pipeline = prepared.pipeline.clone();
    let mut installed = String::new();
    let mut on_image = None;
    if base::packages_on_image(&pipeline, meta.as_ref()) {
        let digest = prepared.base_image.as_ref().map(|image| image.pinned).or(prepared.tar).context("the digest of the base")?;
        let known = prepared
            .lock
            .sets
            .values()
            .find(|set| set.request.on.as_deref() == Some(&digest.to_string()))
            .map(|set| set.request.suite.clone());
        let suite = match known {
            Some(suite) => suite,
            None => {
                let (status, suite) = read_base_image(build, prepared)?;
                installed = status;
                suite
            }
        };
        on_image = Some((digest, suite));
    }
    prepared.requests =
        base::requests(&pipeline, meta.as_ref(), on_image.as_ref().map(|(digest, suite)| (digest, suite.as_str())));
    Ok(installed)
}

/// The package sets: from the lock, or resolved now.
fn resolve_sets(build: &Build<'_>, prepared: &mut Prepared, locked: bool) -> Result<()> {
    let mut installed = read_requests(build, prepared)?;
    let on_image = base::replaced(&prepared.pipeline) || !matches!(prepared.pipeline.base, Base::Debian(_));
    for wanted in prepared.requests.clone() {
        let key = wanted.request.key();
        if prepared.lock.sets.contains_key(&key) {
            continue;
        }
        if locked {
            return Err(base::not_locked(&format!("the package set of step `{}`", wanted.step)).into());
        }
        if on_image && installed.is_empty() {
            installed = read_base_image(build, prepared)?.0;
        }
        let set =
            base::resolve(build, &prepared.pipeline, &wanted.request, &base::below(&prepared.lock, &wanted.request), &installed)?;
        prepared.lock.sets.insert(key, set);
    }
    Ok(())
}

/// dpkg status and suite of a base that is not `debian:`; pulls or unpacks it.
fn read_base_image(build: &Build<'_>, prepared: &mut Prepared) -> Result<(String, String)> {
    let session = build.session(false)?;
    if let Some(image) = &mut prepared.base_image {
        base::pull(build, image)?;
        let manifest = image.manifest.context("a pulled image")?;
        return base::installed(build, &session, &crate::artifact::image::layers(build.store, &manifest)?);
    }
    // A tar base: its own step makes the tree, without packages on top.
    let bare = plan::plan(&Inputs {
        pipeline: &Pipeline { configure: Vec::new(), host: None, ..prepared.pipeline.clone() },
        base: BaseInput::Tar { digest: prepared.tar.context("a tar base")? },
        packages: None,
        build_packages: None,
        builder: None,
        image_builder: false,
        source: None,
        lock_files: None,
        s2i_environment: BTreeMap::new(),
        secrets: Vec::new(),
        configure: Vec::new(),
        source_epoch: plan::FIXED_EPOCH,
        host: None,
    });
    let records = run_steps(build, prepared, &bare, Vec::new(), vec![None], &Options::default())?;
    let layers: Vec<_> = records.iter().flat_map(|(record, _)| record.layers.clone()).collect();
    base::installed(build, &session, &layers)
}

fn read_source(build: &Build<'_>, prepared: &mut Prepared) -> Result<()> {
    let (root, checkout) = match &prepared.pipeline.source {
        Source::Path(path) => (path.clone(), None),
        Source::Git { url, reference, dir, submodules } => {
            let ssh_keys = build.host.ssh_keys();
            let request = source::fetch::Request {
                url,
                reference: reference.as_deref(),
                dir: dir.as_deref(),
                submodules: *submodules,
                ssh_keys: &ssh_keys,
                cache: &build.store.cache("git"),
            };
            let checkout = source::fetch::fetch(&request)?;
            let root = dir.as_ref().map_or_else(|| checkout.path.clone(), |dir| checkout.path.join(dir));
            if !root.is_dir() {
                let dir = dir.as_ref().map(|dir| dir.display().to_string()).unwrap_or_default();
                return Err(Problem::failed(format!("`{url}` has no folder `{dir}` at {}", checkout.commit))
                    .hint("check `source.dir`")
                    .into());
            }
            (root, Some(checkout))
        }
    };
    let cache_name = Digest::of(root.as_os_str().as_encoded_bytes()).hex();
    let stat_cache = build.store.cache("stat").join(&cache_name);
    let options = source::scan::ScanOptions { gitignore: checkout.is_none(), cache: Some(&stat_cache) };
    let scan = source::scan::scan(&root, &options)?;
    let digest = scan.listing.digest();
    let git_cache = build.store.cache("stat").join(format!("{cache_name}.git"));
    prepared.git = match &checkout {
        Some(checkout) => Some(checkout.state.clone()),
        None => {
            match source::git::same_commit(&root, &git_cache).filter(|_| !source::git::is_known(&root, &digest, &git_cache)) {
                Some(state) => {
                    // Only the count of changed files is open, and no key needs it.
                    let (root, cache) = (root.clone(), git_cache.clone());
                    let count = move || Ok(source::git::state(&root, &digest, Some(&cache))?.map_or(0, |state| state.changed));
                    *prepared.counting.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::spawn(count));
                    Some(state)
                }
                None => source::git::state(&root, &digest, Some(&git_cache))?,
            }
        }
    };
    prepared.source_epoch = build
        .host
        .source_date_epoch
        .or_else(|| prepared.git.as_ref().and_then(|git| git.last_commit.as_ref()).map(|commit| commit.time))
        .unwrap_or(plan::FIXED_EPOCH);
    if let Some(dependencies) = prepared.builder.as_ref().and_then(|builder| builder.meta.dependencies.as_ref()) {
        prepared.lock_files = Some(scan.listing.filter(&dependencies.inputs)?);
    }
    prepared.listing_digests = (Some(digest), prepared.lock_files.as_ref().map(Listing::digest));
    prepared.s2i_environment = read_s2i_environment(&root)?;
    prepared.listing = Some(scan.listing);
    prepared.source_root = Some(root);
    Ok(())
}

/// Files of the source that differ from HEAD; waits for the count when it is not there yet, and
/// says so once.
fn changed_files(build: &Build<'_>, prepared: &Prepared) -> Result<usize> {
    let Some(git) = &prepared.git else { return Ok(0) };
    let counting = prepared.counting.lock().unwrap_or_else(PoisonError::into_inner).take();
    let changed = match counting {
        Some(thread) => thread.join().map_err(|_| anyhow::anyhow!("the thread that asks Git panicked"))??,
        None => git.changed,
    };
    if changed > 0 {
        let files = if changed == 1 { "1 file differs".to_string() } else { format!("{changed} files differ") };
        build
            .progress
            .warn(format!("the work tree is built as it lies: {files} from commit {}", &git.head[..git.head.len().min(12)]));
    }
    Ok(changed)
}

/// `.s2i/environment`: `NAME=VALUE` lines; one pair of quotes around a value is taken off, as the
/// test harness of the sclorg images does (reference: s2i, section 1.5).
fn read_s2i_environment(root: &Path) -> Result<BTreeMap<String, String>> {
    let path = root.join(".s2i/environment");
    let text = match fs_err::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(BTreeMap::new());
        }
        Err(error) => return Err(error.into()),
    };
    Ok(parse_s2i_environment(&text))
}

fn parse_s2i_environment(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| !name.trim().is_empty())
        .map(|(name, value)| {
            let value = value.trim();
            let unquoted = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
            (name.trim().to_string(), unquoted.unwrap_or(value).to_string())
        })
        .collect()
}

/// A script's bytes, a playbook's whole folder.
fn read_configure(prepared: &mut Prepared) -> Result<()> {
    for configure in &prepared.pipeline.configure {
        let digest = match configure {
            Configure::Shell(path) => {
                use std::os::unix::fs::PermissionsExt as _;
                let executable = fs_err::metadata(path)?.permissions().mode() & 0o100 != 0;
                let mut hasher = Hasher::new();
                hasher
                    .field([u8::from(executable)])
                    .field(path.file_name().unwrap_or_default().as_encoded_bytes())
                    .field(fs_err::read(path)?);
                hasher.finish()
            }
            Configure::Ansible(path) => {
                let folder = path.parent().context("a folder")?;
                source::scan::scan(folder, &source::scan::ScanOptions { gitignore: true, cache: None })?.listing.digest()
            }
        };
        prepared.configure.push(digest);
    }
    Ok(())
}

/// What a build of `pipeline` takes from its own files, its source apart, that is not as the commit has it; the first that was
/// found. Pipeline file, lock, builder, configure steps, and a machine's files and apps count; a package that its lock pins
/// and a base do not, since they are named by digest.
pub fn uncommitted(pipeline: &Pipeline) -> Result<Option<PathBuf>> {
    // Each with whether files count that Git ignores.
    let mut inputs = vec![(pipeline.file.clone(), true)];
    let lock = pipeline.dir.join(lock::FILE_NAME);
    inputs.extend(lock.exists().then_some((lock, true)));
    if let BuilderRef::Folder(folder) = &pipeline.runtime.builder {
        inputs.push((folder.clone(), true));
    }
    inputs.extend(pipeline.configure.iter().filter_map(|configure| match configure {
        Configure::Shell(path) => Some((path.clone(), true)),
        Configure::Ansible(path) => Some((path.parent()?.to_path_buf(), false)),
    }));
    if let Some(host) = &pipeline.host {
        inputs.extend(host.files.iter().filter_map(|file| match &file.content {
            FileContent::File(path) => Some((path.clone(), true)),
            FileContent::Text(_) => None,
        }));
        // Of another pipeline everything in its folder.
        inputs.extend(host.apps.iter().filter_map(|app| match &app.image {
            AppImage::Pipeline(file) => Some((file.parent()?.to_path_buf(), false)),
            _ => None,
        }));
    }
    for (path, ignored) in inputs {
        if !source::git::is_committed(&path, ignored)? {
            return Ok(Some(path));
        }
    }
    Ok(source::git::is_dirty(&pipeline.dir)?.then(|| pipeline.dir.clone()))
}

/// What the store knows of each step; a corrupt blob is told and counts as nothing.
pub fn look_up(build: &Build<'_>, steps: &[Step]) -> Result<Vec<Option<StepRecord>>> {
    let mut records = Vec::new();
    for step in steps {
        records.push(match record::find(build.store, &step.key)? {
            Found::Record(record) => Some(*record),
            Found::Nothing => None,
            Found::Corrupt(digest) => {
                build.progress.warn(format!("blob {digest} of step `{}` is corrupt; it is built again", step.name));
                None
            }
        });
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn s2i_environment_lines() {
        let text = "# c\nA=b\n  C = d e \nQ=\"x y\"\nS='z'\nH=\"a'\nbroken\n=x\nA=last\n";
        let expected = [("A", "last"), ("C", "d e"), ("H", "\"a'"), ("Q", "x y"), ("S", "z")];
        assert_eq!(parse_s2i_environment(text), expected.map(|(name, value)| (name.to_string(), value.to_string())).into());
    }
}
