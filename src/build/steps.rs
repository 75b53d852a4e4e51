//! Runs one step of a plan: stands on the trees below, changes an upper directory, packs it.
//!
//! In: a [`Step`] and the records of the steps below. Out: its [`StepRecord`], with the layer in
//! the store and its tree in the cache. What is left of a step that fails is its log.

use std::collections::VecDeque;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};

use super::debian::normalise::Origin;
use super::host::{Host, name_service};
use super::inside::{Copy, Exec, Pack, PackedLayer, Read, Seed};
use super::plan::{Action, Step};
use super::record::StepRecord;
use super::work::{self, Tree, Work};
use super::{Prepared, debian, host_tree, secret};
use crate::artifact::image::{Layer, RunConfig};
use crate::artifact::store::{Descriptor, Store};
use crate::artifact::tree::Unpack;
use crate::config::types::{Compression, Configure, Network};
use crate::error::Problem;
use crate::fault;
use crate::oci::compress;
use crate::oci::flatten::{Blob, flatten};
use crate::oci::layer::PackOptions;
use crate::oci::unpack::Unpacked;
use crate::progress::{Event, Progress};
use crate::sandbox::{self, Exit, Mount, RunSpec, Session};

/// Lines of a failed step shown with its error.
const LAST_LINES: usize = 30;
/// Folders of the kernel's and of the moment: never in a layer.
const MOMENTARY: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];
/// Where commands are looked for when nothing says otherwise.
pub const PATH: &str = crate::artifact::image::PATH;
/// Where a configure step's folder is while it runs.
const CONFIGURE: &str = "/run/pipeline/configure";
/// Where the locked packages are while they are installed.
const REPOSITORY: &str = "/run/pipeline/repository";
/// Where a host's scripts and lists are while its steps run.
const HOST_FOLDER: &str = host_tree::FOLDER;
/// How a line of a host's scripts begins that is worth more than a place in the log.
const WARNING: &str = "warning: ";
/// Status of a shell or sandbox whose program SIGKILL ended, as the kernel does when memory is out.
const KILLED: i32 = 128 + libc::SIGKILL;
/// The same for a file over its limit.
const FILE_TOO_LARGE: i32 = 128 + libc::SIGXFSZ;
/// Makes clients give up at once where there is no network, instead of after minutes.
const NO_RETRIES: [(&str, &str); 3] = [("PIP_RETRIES", "0"), ("npm_config_fetch_retries", "0"), ("CARGO_NET_OFFLINE", "true")];

/// What every step of a build shares.
#[derive(Debug)]
pub struct Runner<'a> {
    pub store: &'a Store,
    pub session: &'a Session,
    pub work: &'a Work,
    pub host: &'a Host,
    pub prepared: &'a Prepared,
    /// Where downloaded packages are kept.
    pub debs: PathBuf,
    pub finder: &'a secret::Finder,
    /// Whether a shell is started in a step that fails.
    pub shell: bool,
}

impl Runner<'_> {
    /// Runs `step` on the steps below, whatever the cache says.
    pub fn run(&self, step: &Step, below: &[StepRecord], progress: &dyn Progress) -> Result<StepRecord> {
        let started = Instant::now();
        let mut log = Log::open(self, step, progress)?;
        let mut record = match &step.action {
            Action::Image => self.image(step)?,
            Action::App(index) => self.app(step, *index)?,
            _ => {
                let dir = self.work.dir().join(&step.name);
                fs_err::create_dir_all(&dir)?;
                let place = Place { upper: dir.join("upper"), scratch: dir.join("scratch"), tmp: dir.join("tmp"), dir };
                let result = self.run_and_pack(step, below, &place, &mut log);
                // A failed step's folder goes too: its log is what stays.
                let removed: Result<()> = self.session.call("remove", &place.dir);
                let record = result?;
                removed?;
                record
            }
        };
        record.seconds = started.elapsed().as_secs_f64();
        record.script_seconds = log.script_seconds;
        record.log = Some(log.path.clone());
        record.save(self.store)?;
        Ok(record)
    }

    fn run_and_pack(&self, step: &Step, below: &[StepRecord], place: &Place, log: &mut Log<'_>) -> Result<StepRecord> {
        fs_err::create_dir_all(&place.upper)?;
        set_mode(&place.upper, 0o755)?;
        fs_err::create_dir_all(&place.scratch)?;
        let trees = self.trees(below)?;
        let lowers: Vec<PathBuf> = trees.iter().map(|tree| tree.root.clone()).collect();
        let mut dropped = Vec::new();
        match &step.action {
            Action::Debian => self.debian(step, place, log)?,
            Action::Tar => dropped = self.tar(place)?,
            Action::Packages => self.packages(step, &lowers, place, log)?,
            Action::HostPackages => self.host_packages(step, &lowers, place, log)?,
            Action::Host => self.host(step, &lowers, place, log)?,
            Action::Dependencies | Action::Assemble => self.scripts(step, below, &lowers, place, log)?,
            Action::Configure(index) => self.configure(step, *index, &lowers, place, log)?,
            Action::Image | Action::App(_) => {}
        }
        let (layer, packed) = self.pack(step, &lowers, place)?;
        dropped.extend(packed.packed.dropped);
        work::adopt(self.store, self.session, &layer.diff_id, &place.upper)?;
        let mut record = StepRecord::new(&step.name, step.key, step.ingredients.clone(), vec![layer]);
        record.dropped = dropped;
        Ok(record)
    }

    fn trees(&self, below: &[StepRecord]) -> Result<Vec<Tree>> {
        below.iter().flat_map(|record| &record.layers).map(|layer| work::tree(self.store, self.session, layer)).collect()
    }

    fn pack(&self, step: &Step, lowers: &[PathBuf], place: &Place) -> Result<(Layer, PackedLayer)> {
        let first = matches!(step.action, Action::Debian | Action::Tar);
        let momentary: Vec<PathBuf> = MOMENTARY.iter().map(PathBuf::from).collect();
        let options = PackOptions {
            dir: place.upper.clone(),
            lowers: lowers.to_vec(),
            epoch: step.epoch,
            skip: if first { vec![] } else { momentary.clone() },
            skip_content: if first { momentary } else { vec![] },
            skip_empty: vec!["etc/resolv.conf".into(), "etc/hosts".into()],
        };
        let compression = self.compression();
        let temp = self.store.temp()?;
        let args = Pack {
            options,
            out: temp.path().to_path_buf(),
            compression,
            threads: self.host.threads,
            secrets: self.prepared.secrets.iter().map(|value| (value.id.clone(), value.bytes.clone())).collect(),
            refuse_identities: true,
            normalise: match step.action {
                Action::Debian => Some(Origin::Bootstrap),
                Action::Packages | Action::HostPackages | Action::Host => Some(Origin::Packages),
                Action::Tar | Action::Image | Action::App(_) => None,
                Action::Dependencies | Action::Assemble | Action::Configure(_) => Some(Origin::Step),
            },
        };
        let packed: PackedLayer =
            self.session.call("pack", &args).with_context(|| format!("cannot pack the layer of step `{}`", step.name))?;
        let written = &packed.written;
        self.store.adopt(temp, &written.digest)?;
        let descriptor = Descriptor::new(compression.media_type(), written.digest, written.size);
        Ok((Layer { descriptor, diff_id: written.diff_id, created_by: format!("pipeline {}", step.name) }, packed))
    }

    fn compression(&self) -> compress::Compression {
        match self.prepared.pipeline.image.compression {
            Compression::Zstd => compress::Compression::Zstd,
            Compression::Gzip => compress::Compression::Gzip,
        }
    }

    /// Fetches the locked packages and makes the throw-away repository of them.
    fn repository(&self, set: &super::lock::Set, dir: &Path) -> Result<()> {
        let archives = || super::base::archives(&self.prepared.pipeline, &set.request.suite);
        debian::fetch::fetch(set, &self.debs, archives)?;
        debian::repository::repository(dir, set, &self.debs)
    }

    fn debian(&self, step: &Step, place: &Place, log: &mut Log<'_>) -> Result<()> {
        let set = self.prepared.set(&step.name)?;
        let repository = place.dir.join("repository");
        self.repository(set, &repository)?;
        let argv = debian::bootstrap::bootstrap(&repository, &place.upper, &place.scratch, set, step.epoch)?;
        let env = vec![("PATH".to_string(), PATH.to_string())];
        self.session
            .call_noting("exec", &Exec { argv, env }, &mut |bytes| log.write(&[&bytes[..], b"\n"].concat()))
            .with_context(|| Problem::failed(format!("cannot make the base tree; the log is {}", log.path.display())))
    }

    fn tar(&self, place: &Place) -> Result<Vec<String>> {
        let crate::config::types::Base::Tar { file, .. } = &self.prepared.pipeline.base else { anyhow::bail!("a tar base") };
        let args = Unpack { blob: file.clone(), digest: None, diff_id: None, compression: None, to: place.upper.clone() };
        let unpacked: Unpacked =
            self.session.call("unpack", &args).with_context(|| format!("cannot unpack the base `{}`", file.display()))?;
        Ok(unpacked.dropped)
    }

    fn image(&self, step: &Step) -> Result<StepRecord> {
        let image = self.prepared.base_image.as_ref().context("an image base")?;
        let manifest = image.manifest.context("a pulled image")?;
        let layers = crate::artifact::image::layers(self.store, &manifest)?;
        let (_, config) = crate::artifact::image::read(self.store, &manifest)?;
        let mut record = StepRecord::new(&step.name, step.key, step.ingredients.clone(), layers);
        record.config = Some(config.config);
        Ok(record)
    }

    fn packages(&self, step: &Step, lowers: &[PathBuf], place: &Place, log: &mut Log<'_>) -> Result<()> {
        let spec = self.installation(step, lowers, place)?;
        self.execute(step, "the package installation", &spec, log)
    }

    /// The command that installs the locked packages of a step.
    fn installation(&self, step: &Step, lowers: &[PathBuf], place: &Place) -> Result<RunSpec> {
        let set = self.prepared.set(&step.name)?;
        let repository = place.dir.join("repository");
        self.repository(set, &repository)?;
        let mut spec = self.spec(step, lowers, place)?;
        spec.argv = vec!["/bin/sh".into(), "-c".into(), debian::bootstrap::install_script(set, REPOSITORY)?];
        spec.mounts.push(Mount::Bind { source: repository, target: REPOSITORY.into(), writable: false });
        spec.secrets.clear();
        Ok(spec)
    }

    /// Packages with the kernel, between the two scripts of `templates/host`.
    fn host_packages(&self, step: &Step, lowers: &[PathBuf], place: &Place, log: &mut Log<'_>) -> Result<()> {
        let machine = self.prepared.machine.as_ref().context("a host")?;
        let mut spec = self.installation(step, lowers, place)?;
        self.give_folder(&machine.packages, place, &mut spec)?;
        let install = spec.argv.pop().context("the installation")?;
        fs_err::write(place.dir.join("host/install.sh"), install)?;
        let script = format!(
            "set -e; cd /; INITRD=No; export INITRD; for part in prepare install finish; do sh {HOST_FOLDER}/$part.sh; done"
        );
        spec.argv.push(script);
        self.execute(step, "the package installation", &spec, log)
    }

    /// The configuration of a host, as root of its tree.
    fn host(&self, step: &Step, lowers: &[PathBuf], place: &Place, log: &mut Log<'_>) -> Result<()> {
        let machine = self.prepared.machine.as_ref().context("a host")?;
        let mut spec = self.spec(step, lowers, place)?;
        spec.secrets.clear();
        self.give_folder(&machine.configuration, place, &mut spec)?;
        spec.argv = vec!["/bin/sh".into(), format!("{HOST_FOLDER}/configure.sh")];
        self.execute(step, "the configuration of the host", &spec, log)
    }

    fn give_folder(&self, folder: &host_tree::Folder, place: &Place, spec: &mut RunSpec) -> Result<()> {
        let dir = place.dir.join("host");
        folder.write(&dir)?;
        spec.mounts.push(Mount::Bind { source: dir, target: HOST_FOLDER.into(), writable: false });
        for (name, source, _) in &folder.mounts {
            let target = Path::new(HOST_FOLDER).join(name);
            spec.mounts.push(Mount::Bind { source: source.clone(), target, writable: false });
        }
        Ok(())
    }

    /// The layer of an app, from its image's; nothing is unpacked, so no id need be mapped.
    fn app(&self, step: &Step, index: usize) -> Result<StepRecord> {
        let machine = self.prepared.machine.as_ref().context("a host")?;
        let input = machine.apps.get(index).context("an app")?;
        let digest = input.image.context("a built image")?;
        let (_, config) = crate::artifact::image::read(self.store, &digest)?;
        let blobs: Vec<Blob> = crate::artifact::image::layers(self.store, &digest)?
            .iter()
            .map(|layer| {
                let compression = compress::Compression::of_media_type(&layer.descriptor.media_type)
                    .with_context(|| format!("the unknown media type `{}`", layer.descriptor.media_type))?;
                let path = self.store.blob(&layer.descriptor.digest);
                Ok(Blob { path, digest: layer.descriptor.digest, compression })
            })
            .collect::<Result<_>>()?;
        let tree = flatten(&blobs, self.work.dir(), self.host.threads)
            .with_context(|| format!("cannot read the image of app `{}`", input.app.name))?;
        let temp = self.store.temp()?;
        let out = fs_err::OpenOptions::new().write(true).truncate(true).open(temp.path())?;
        let compression = self.compression();
        let writer = compress::LayerWriter::new(out, compression, self.host.threads);
        let (writer, made) = host_tree::apps::layer(input, tree, &config.config, step.epoch, writer)?;
        let written = writer.finish()?;
        self.store.adopt(temp, &written.digest)?;
        let descriptor = Descriptor::new(compression.media_type(), written.digest, written.size);
        let layer = Layer { descriptor, diff_id: written.diff_id, created_by: format!("pipeline {}", step.name) };
        let mut record = StepRecord::new(&step.name, step.key, step.ingredients.clone(), vec![layer]);
        record.dropped = made.dropped;
        Ok(record)
    }

    /// `dependencies` and `assemble`: the source at `DESTINATION/src`, the builder's scripts.
    fn scripts(&self, step: &Step, below: &[StepRecord], lowers: &[PathBuf], place: &Place, log: &mut Log<'_>) -> Result<()> {
        let dependencies = step.action == Action::Dependencies;
        let mut spec = self.spec(step, lowers, place)?;
        let listing = if dependencies { self.prepared.lock_files.as_ref() } else { self.prepared.listing.as_ref() };
        let listing = listing.context("a source")?;
        let root = self.prepared.source_root.as_ref().context("a source")?;
        let snapshot = super::source::snapshot::snapshot(listing, root, &self.store.cache("snapshots"))?;
        let (destination, scripts);
        if let Some(builder) = &self.prepared.builder {
            destination = builder.meta.destination.clone();
            scripts = builder.meta.scripts.clone();
            let files = self.script_files(builder, &scripts, root, dependencies);
            if dependencies {
                let dir = place.dir.join("scripts");
                fs_err::create_dir(&dir)?;
                set_mode(&dir, 0o755)?;
                self.session.call::<_, ()>("seed", &Seed { dir: dir.clone(), files })?;
                spec.lowers.push(dir);
            } else {
                self.session.call::<_, ()>("seed", &Seed { dir: place.upper.clone(), files })?;
            }
            prefer(&mut spec.env, builder.meta.env.clone(), &self.prepared.pipeline.build.env);
        } else {
            let config = below.iter().find_map(|record| record.config.clone()).unwrap_or_default();
            let s2i = S2iImage::of(&config)?;
            prefer(&mut spec.env, config.variables(), &self.prepared.pipeline.build.env);
            spec.user = s2i.user;
            spec.cwd = if config.working_dir.is_empty() { "/".into() } else { config.working_dir };
            (destination, scripts) = (s2i.destination, s2i.scripts);
        }
        if !dependencies {
            prefer(&mut spec.env, self.prepared.s2i_environment.clone(), &self.prepared.pipeline.build.env);
        }
        self.place_source(&mut spec, &snapshot.path, &destination, place)?;
        if dependencies || self.prepared.pipeline.build.network == Network::Host {
            self.give_network(&mut spec);
        }
        let script = if dependencies { "dependencies" } else { "assemble" };
        spec.argv = vec![format!("{scripts}/{script}")];
        let result = self.execute(step, &format!("`{script}`"), &spec, log);
        drop(snapshot);
        result
    }

    /// The builder's scripts, with those of the source's `.s2i/bin` in their place.
    fn script_files(
        &self,
        builder: &super::builder::Builder,
        scripts: &str,
        root: &Path,
        dependencies: bool,
    ) -> Vec<(PathBuf, Vec<u8>)> {
        let folder = Path::new(scripts.trim_start_matches('/'));
        let mut files = Vec::new();
        for (name, bytes) in &builder.scripts {
            if dependencies != (name == "dependencies") {
                continue;
            }
            let own = fs_err::read(root.join(".s2i/bin").join(name)).ok().filter(|_| !dependencies);
            files.push((folder.join(name), own.unwrap_or_else(|| bytes.clone())));
        }
        files
    }

    /// Puts the source at `DESTINATION/src`: a private writable view for root, an own copy for
    /// any other user.
    fn place_source(&self, spec: &mut RunSpec, snapshot: &Path, destination: &str, place: &Place) -> Result<()> {
        let inside_tmp = destination == "/tmp";
        let host_side = if inside_tmp { place.tmp.join("src") } else { place.dir.join("src") };
        if spec.user.is_empty() || spec.user == "0" || spec.user == "root" {
            spec.mounts.insert(
                0,
                Mount::Overlay { lower: snapshot.to_path_buf(), scratch: place.dir.join("source"), target: host_side.clone() },
            );
        } else {
            let passwd: Option<Vec<u8>> =
                self.session.call("read", &Read { lowers: spec.lowers.clone(), path: "etc/passwd".into() })?;
            let owner = owner(&spec.user, &String::from_utf8_lossy(&passwd.unwrap_or_default()));
            self.session.call::<_, ()>("copy", &Copy { from: snapshot.to_path_buf(), to: host_side.clone(), owner })?;
        }
        if !inside_tmp {
            spec.mounts.push(Mount::Bind { source: host_side, target: Path::new(destination).join("src"), writable: true });
        }
        Ok(())
    }

    fn configure(&self, step: &Step, index: usize, lowers: &[PathBuf], place: &Place, log: &mut Log<'_>) -> Result<()> {
        let configure = &self.prepared.pipeline.configure[index];
        let (Configure::Shell(path) | Configure::Ansible(path)) = configure;
        let name = path.file_name().context("a file")?.to_string_lossy().into_owned();
        let mut spec = self.spec(step, lowers, place)?;
        if let Some(builder) = &self.prepared.builder {
            prefer(&mut spec.env, builder.meta.env.clone(), &self.prepared.pipeline.build.env);
        }
        let what = match configure {
            Configure::Shell(_) => {
                spec.mounts.push(Mount::Bind { source: path.clone(), target: Path::new(CONFIGURE).join(&name), writable: false });
                // Through its own `#!` line when it has one and may be executed, through sh otherwise.
                spec.argv = vec![
                    "/bin/sh".into(),
                    "-c".into(),
                    format!(
                        "if [ -x '{CONFIGURE}/{name}' ]; then exec '{CONFIGURE}/{name}'; else exec /bin/sh '{CONFIGURE}/{name}'; fi"
                    ),
                ];
                format!("`{name}`")
            }
            Configure::Ansible(_) => {
                let folder = path.parent().context("a folder")?;
                spec.mounts.push(Mount::Bind { source: folder.to_path_buf(), target: CONFIGURE.into(), writable: false });
                spec.env.extend(
                    [
                        ("ANSIBLE_HOME", "/tmp/.ansible"),
                        ("ANSIBLE_LOCAL_TEMP", "/tmp/.ansible"),
                        ("ANSIBLE_REMOTE_TEMP", "/tmp/.ansible"),
                        ("ANSIBLE_NOCOLOR", "1"),
                        ("PYTHONDONTWRITEBYTECODE", "1"),
                    ]
                    .map(|(key, value)| (key.into(), value.into())),
                );
                spec.argv = ["ansible-playbook", "--connection", "local", "--inventory", "localhost,"].map(String::from).to_vec();
                spec.argv.push(format!("{CONFIGURE}/{name}"));
                format!("playbook `{name}`")
            }
        };
        if self.prepared.pipeline.build.network == Network::Host {
            self.give_network(&mut spec);
        }
        self.execute(step, &what, &spec, log)
    }

    /// What all steps have in common: root of the tree, no network, an own `/tmp`.
    fn spec(&self, step: &Step, lowers: &[PathBuf], place: &Place) -> Result<RunSpec> {
        let build = &self.prepared.pipeline.build;
        fs_err::create_dir_all(&place.tmp)?;
        set_mode(&place.tmp, 0o1777)?;
        let mut env: Vec<(String, String)> =
            vec![("PATH".into(), PATH.into()), ("LANG".into(), "C.UTF-8".into()), ("TZ".into(), "UTC".into())];
        env.push(("SOURCE_DATE_EPOCH".into(), step.epoch.to_string()));
        env.extend(build.env.clone());
        env.extend(NO_RETRIES.map(|(key, value)| (key.into(), value.into())));
        let secrets: Vec<_> = self.prepared.secrets.iter().map(|value| (value.id.clone(), value.bytes.clone())).collect();
        for secret in &build.secrets {
            if let crate::config::types::SecretSource::Env(name) = &secret.from {
                env.push((format!("{name}_FILE"), format!("/run/secrets/{}", secret.id)));
            }
        }
        Ok(RunSpec {
            lowers: lowers.to_vec(),
            upper: place.upper.clone(),
            read_only: false,
            program: false,
            work: place.scratch.clone(),
            mounts: vec![Mount::Bind { source: place.tmp.clone(), target: "/tmp".into(), writable: true }],
            secrets,
            argv: Vec::new(),
            env,
            cwd: "/".into(),
            user: String::new(),
            network: sandbox::Network::None,
            limits: sandbox::Limits {
                memory: build.limits.memory,
                processes: build.limits.processes,
                file_size: build.limits.file_size,
                ..sandbox::Limits::default()
            },
            timeout: Some(build.timeout),
            passed_stdio: false,
        })
    }

    fn give_network(&self, spec: &mut RunSpec) {
        spec.network = sandbox::Network::Shared;
        spec.env.retain(|(key, _)| !NO_RETRIES.iter().any(|(name, _)| name == key));
        spec.mounts.extend(name_service());
        if self.prepared.pipeline.build.trust {
            let (variables, mounts) = self.host.trust();
            spec.env.extend(variables);
            spec.mounts.extend(mounts);
        }
    }

    /// Runs the command of a step; a failure tells its status, its last lines and the log.
    fn execute(&self, step: &Step, what: &str, spec: &RunSpec, log: &mut Log<'_>) -> Result<()> {
        let started = Instant::now();
        let exit = self.session.run(spec, &mut |bytes| log.write(bytes))?;
        log.script_seconds = started.elapsed().as_secs_f64();
        log.flush();
        let how = match exit {
            Exit::Code(0) => {
                if matches!(step.action, Action::HostPackages | Action::Host) {
                    log.tell_warnings();
                }
                return Ok(());
            }
            Exit::Code(code) => format!("exited with status {code}"),
            Exit::Signal(signal) => format!("was ended by signal {signal}"),
            Exit::TimedOut => format!("did not end within {} s", self.prepared.pipeline.build.timeout.as_secs()),
        };
        if self.shell {
            self.open_shell(step, what, &how, spec, log)?;
        }
        let mut problem = Problem::failed(format!(
            "step `{}` of `{}` failed: {what} {how}{}",
            step.name,
            self.prepared.pipeline.name,
            log.tail()
        ))
        .hint(format!("the whole log is {}", log.path.display()));
        problem = match exit {
            Exit::TimedOut => problem.hint("`build.timeout` sets how long a step may take"),
            // bubblewrap and shells make 128 and the signal of it.
            Exit::Signal(libc::SIGKILL) | Exit::Code(KILLED) if spec.limits.memory.is_some() => {
                problem.hint("it may have hit `build.limits.memory`")
            }
            Exit::Signal(libc::SIGXFSZ) | Exit::Code(FILE_TOO_LARGE) if spec.limits.file_size.is_some() => {
                problem.hint("it may have hit `build.limits.file_size`")
            }
            _ => problem,
        };
        if !self.shell {
            problem = problem
                .hint(format!("`pipeline build {} --shell` gives a shell in the step as it was", self.prepared.pipeline.name));
        }
        Err(problem.into())
    }

    fn open_shell(&self, step: &Step, what: &str, how: &str, spec: &RunSpec, log: &mut Log<'_>) -> Result<()> {
        log.progress.note(format!("step `{}`: {what} {how}; a shell in it follows, `exit` leaves it", step.name));
        let mut spec = spec.clone();
        spec.argv = vec!["/bin/sh".into(), "-i".into()];
        spec.timeout = None;
        spec.passed_stdio = true;
        let term = self.host.variables.get("TERM").cloned().unwrap_or_else(|| "dumb".into());
        spec.env.push(("TERM".into(), term));
        let (stdin, stderr) = (std::io::stdin(), std::io::stderr());
        // The shell talks on standard error: standard output is the answer of `build`.
        self.session.start_run(&spec, &[stdin.as_fd(), stderr.as_fd(), stderr.as_fd()])?;
        while !matches!(self.session.next_event()?.0, sandbox::protocol::Event::Exited(_)) {}
        Ok(())
    }
}

/// The folders of one step, below the work folder.
#[derive(Debug)]
struct Place {
    dir: PathBuf,
    upper: PathBuf,
    scratch: PathBuf,
    tmp: PathBuf,
}

/// What an S2I builder image says of itself (reference: labels `io.openshift.s2i.*`).
#[derive(Debug, PartialEq, Eq)]
pub struct S2iImage {
    pub scripts: String,
    pub destination: String,
    pub user: String,
}

impl S2iImage {
    pub fn of(config: &RunConfig) -> Result<Self> {
        let label = |names: &[&str]| names.iter().find_map(|name| config.labels.as_ref()?.get(*name).cloned());
        let url = label(&["io.openshift.s2i.scripts-url", "io.s2i.scripts-url"]).ok_or_else(|| {
            Problem::failed("the runtime image has no label `io.openshift.s2i.scripts-url`, so it is no S2I builder image")
                .hint("use it as `base: {image: …}` with a `runtime: {builder: …}`")
        })?;
        let scripts = url
            .strip_prefix("image://")
            .ok_or_else(|| Problem::failed(format!("the S2I scripts are at `{url}`; only `image://` is supported")))?;
        let destination = label(&["io.openshift.s2i.destination", "io.s2i.destination"]).unwrap_or_else(|| "/tmp".into());
        let user = label(&["io.openshift.s2i.assemble-user"]).unwrap_or_else(|| config.user.clone());
        Ok(Self { scripts: scripts.trim_end_matches('/').into(), destination, user })
    }
}

/// Sets `variables` over what is there, but for those the pipeline file sets itself.
fn prefer(
    env: &mut Vec<(String, String)>,
    variables: impl IntoIterator<Item = (String, String)>,
    own: &std::collections::BTreeMap<String, String>,
) {
    for (name, value) in variables {
        if !own.contains_key(&name) {
            env.retain(|(known, _)| *known != name);
            env.push((name, value));
        }
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    Ok(fs_err::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))?)
}

/// User and group id of `user`, by number or by the tree's passwd.
fn owner(user: &str, passwd: &str) -> (u32, u32) {
    let name = user.split(':').next().unwrap_or(user);
    let row = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|row| row.len() > 3 && (row[0] == name || row[2] == name));
    let uid = name.parse().ok().or_else(|| row.as_ref().and_then(|row| row[2].parse().ok())).unwrap_or(0);
    let gid = user
        .split(':')
        .nth(1)
        .and_then(|group| group.parse().ok())
        .or_else(|| row.as_ref().and_then(|row| row[3].parse().ok()))
        .unwrap_or(0);
    (uid, gid)
}

/// The log of one step: everything it printed, secrets masked, kept below the state folder.
struct Log<'a> {
    path: PathBuf,
    file: fs_err::File,
    step: String,
    progress: &'a dyn Progress,
    finder: &'a secret::Finder,
    partial: Vec<u8>,
    last: VecDeque<String>,
    /// What began with [`WARNING`].
    warnings: Vec<String>,
    script_seconds: f64,
}

impl<'a> Log<'a> {
    fn open(runner: &Runner<'a>, step: &Step, progress: &'a dyn Progress) -> Result<Self> {
        let dir = runner.store.state("logs").join(runner.prepared.pipeline.name.as_str());
        fs_err::create_dir_all(&dir)?;
        let path = dir.join(format!("{}-{}.log", step.name, step.key.short()));
        fault::point("create a log");
        let file = fs_err::File::create(&path)?;
        Ok(Self {
            path,
            file,
            step: step.name.clone(),
            progress,
            finder: runner.finder,
            partial: Vec::new(),
            last: VecDeque::new(),
            warnings: Vec::new(),
            script_seconds: 0.0,
        })
    }

    fn write(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.line(&line[..end]);
        }
        // A line without an end is cut rather than kept in memory; a secret across the cut would
        // be seen in the pieces only when it is longer than the line.
        if self.partial.len() > 1 << 20 {
            self.flush();
        }
    }

    fn line(&mut self, bytes: &[u8]) {
        let line = self.finder.mask(String::from_utf8_lossy(bytes).trim_end_matches('\r'));
        // A full disk must not hide why a step failed.
        let _ = writeln!(self.file, "{line}");
        self.progress.event(Event::StepOutput { step: self.step.clone(), line: line.clone() });
        if let Some(warning) = line.strip_prefix(WARNING) {
            self.warnings.push(warning.into());
        }
        self.last.push_back(line);
        if self.last.len() > LAST_LINES {
            self.last.pop_front();
        }
    }

    fn flush(&mut self) {
        if !self.partial.is_empty() {
            let line = std::mem::take(&mut self.partial);
            self.line(&line);
        }
    }

    fn tell_warnings(&mut self) {
        for warning in std::mem::take(&mut self.warnings) {
            self.progress.warn(warning);
        }
    }

    /// The last lines, for an error.
    fn tail(&self) -> String {
        if self.last.is_empty() {
            String::new()
        } else {
            format!("; its last lines:\n  | {}", self.last.iter().cloned().collect::<Vec<_>>().join("\n  | "))
        }
    }
}
