//! A generation: what one rollout starts, with everything that is needed to start it again.
//!
//! Its id is made of the release, the configuration and how the environment says that it runs, so that the same pair in the
//! same settings is the same generation: a rollback finds the blue that is still warm. What the image says (port, health,
//! volumes) is read from the store once and kept with it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::target::{InstanceSpec, Limits, Secret, VolumeMount};
use crate::artifact::image::{self, HEALTH_LABEL};
use crate::artifact::release::{self, Kind};
use crate::artifact::store::Store;
use crate::config::types::{Environment, Health, HealthCheck, Target, Volume, VolumeSpec};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::release::decision::Configuration;
use crate::release::state::Binding;

/// Deadline of a machine's health beyond its app's own, in seconds: the machine boots first, under emulation for minutes.
const BOOT_SECONDS: u64 = 240;
/// Where the apps of a host are described (DESIGN section 7, contract 8).
const APPS: &str = "usr/lib/pipeline/apps";

/// What one rollout starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    /// 12 hex digits.
    pub id: String,
    pub release: Digest,
    pub version: String,
    pub config: Configuration,
    pub targets: BTreeMap<String, Target>,
    pub volumes: BTreeMap<String, VolumeSpec>,
    /// By target; empty until they were read from the store.
    #[serde(default)]
    pub programs: BTreeMap<String, Program>,
}

/// What runs in the instances of one target, as the release has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Program {
    /// Manifest of the image or the disk.
    pub artifact: Digest,
    pub port: Option<u16>,
    pub health: Option<Health>,
    /// Volumes the image declares, absolute paths.
    #[serde(default)]
    pub volumes: Vec<String>,
}

/// One instance by name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// `shop-prod-1a2b3c4d5e6f-web-0`.
    pub id: String,
    pub target: String,
    pub number: u32,
}

impl Generation {
    /// The generation of `binding` in an environment with these settings.
    pub fn of(environment: &Environment, binding: &Binding) -> Self {
        let targets = environment.targets.clone();
        let volumes = environment.volumes.clone();
        let made_of: Value = json!([binding.release, binding.config.digest(), targets, volumes]);
        let text = serde_json::to_vec(&made_of).expect("plain values with text keys");
        Self {
            id: Digest::of(text).short(),
            release: binding.release,
            version: binding.version.clone(),
            config: binding.config.clone(),
            targets,
            volumes,
            programs: BTreeMap::new(),
        }
    }

    /// The names of its instances in `environment` (`shop/prod`), sorted.
    pub fn places(&self, environment: &str) -> Vec<Place> {
        let prefix = format!("{}-{}", plain(environment), self.id);
        let mut places = Vec::new();
        for (target, settings) in &self.targets {
            for number in 0..settings.instances() {
                let id = format!("{prefix}-{}-{number}", plain(target));
                places.push(Place { id, target: target.clone(), number });
            }
        }
        places.sort();
        places
    }

    /// Whether both must not run at once: they have an exclusive volume of one name.
    pub fn excludes(&self, other: &Self) -> bool {
        let exclusive = |name: &String| {
            [self, other].iter().any(|side| side.volumes.get(name).is_some_and(|volume| volume.mode == Volume::Exclusive))
        };
        self.id != other.id && self.volumes.keys().any(|name| other.volumes.contains_key(name) && exclusive(name))
    }

    /// Whether it has an exclusive volume.
    pub fn is_exclusive(&self) -> bool {
        self.volumes.values().any(|volume| volume.mode == Volume::Exclusive)
    }

    /// Whether it was read from the store what runs.
    pub fn is_prepared(&self) -> bool {
        self.targets.keys().all(|target| self.programs.contains_key(target))
    }

    /// Longest deadline of its programs, in milliseconds.
    pub fn deadline(&self) -> u64 {
        let longest = self.programs.values().filter_map(|program| program.health.as_ref()).map(|health| health.deadline);
        longest.max().map_or(0, |deadline| u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX))
    }

    /// Reads what runs from the store.
    ///
    /// # Errors
    /// The release has no artifact for a target, or something of it is not in the store.
    pub fn prepare(&self, store: &Store, pipeline: &str) -> Result<BTreeMap<String, Program>> {
        let release = release::read(store, &self.release)?;
        let mut programs = BTreeMap::new();
        for (name, target) in &self.targets {
            let program = match target {
                Target::Local(_) | Target::Docker(_) => of_image(store, &entry(&release, Kind::Image, pipeline)?.digest)?,
                Target::Vm(vm) => {
                    let disk = entry(&release, Kind::Disk, pipeline)?.digest;
                    of_machine(store, &release, pipeline, vm.app.as_deref(), disk)?
                }
                Target::Other(kind, _) => {
                    let problem = Problem::failed(format!("this pipeline cannot serve targets of the kind `{kind}`"));
                    return Err(problem.hint("a newer one may: install it").into());
                }
            };
            programs.insert(name.clone(), program);
        }
        Ok(programs)
    }

    /// Everything that the instance `place` needs. `volumes` is the folder below which those of the environment are.
    ///
    /// # Errors
    /// It was not prepared; a volume whose place in the program nobody says.
    pub fn spec(
        &self,
        environment: &str,
        place: &Place,
        volumes: &Path,
        secrets: BTreeMap<String, Secret>,
    ) -> Result<InstanceSpec> {
        let settings = self.targets.get(&place.target).with_context(|| format!("there is no target `{}`", place.target))?;
        let program = self.programs.get(&place.target).context("nobody has looked yet at what runs")?;
        let limits = match settings {
            Target::Local(local) => Limits { memory: local.memory, cpus: local.cpus, pids: local.pids },
            Target::Docker(docker) => Limits { memory: docker.memory, cpus: docker.cpus, pids: None },
            Target::Vm(vm) => Limits { memory: Some(vm.memory), cpus: Some(f64::from(vm.cpus)), pids: None },
            Target::Other(..) => Limits::default(),
        };
        let mut mounts = Vec::new();
        for (name, volume) in &self.volumes {
            let Some(path) = volume.place(name, &program.volumes) else {
                let problem =
                    Problem::failed(format!("nobody says where in the program the volume `{name}` of `{environment}` is"));
                return Err(problem.hint("write its `path`, or declare it in `image.volumes`").into());
            };
            mounts.push(VolumeMount { name: name.clone(), path: path.to_owned(), source: volumes.join(environment).join(name) });
        }
        Ok(InstanceSpec {
            id: place.id.clone(),
            environment: environment.to_owned(),
            generation: self.id.clone(),
            target: place.target.clone(),
            number: place.number,
            artifact: program.artifact,
            port: program.port,
            env: self.config.values.clone(),
            secrets,
            volumes: mounts,
            limits,
            settings: settings.clone(),
        })
    }
}

/// A name as a part of an instance's id: `[a-z0-9-]`.
fn plain(name: &str) -> String {
    let allowed = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
    name.to_ascii_lowercase().chars().map(allowed).collect()
}

fn entry<'r>(release: &'r release::Release, kind: Kind, pipeline: &str) -> Result<&'r release::Entry> {
    let own = release.entry(kind, pipeline);
    // A pipeline that was renamed, or a machine that has no image of its own.
    let mut all = release.entries.iter().filter(|entry| entry.kind == kind);
    let only = || all.next().filter(|_| all.next().is_none());
    own.or_else(only).ok_or_else(|| {
        let hint = match kind {
            Kind::Disk => "`pipeline build --release` bakes one when the pipeline has a `host`",
            _ => "only a pipeline with an application image runs there",
        };
        Problem::failed(format!("release {} has no {kind} of `{pipeline}`", release.version)).hint(hint).into()
    })
}

fn of_image(store: &Store, digest: &Digest) -> Result<Program> {
    let (_, config) = image::read(store, digest)?;
    let config = config.config;
    let ports = config.exposed_ports.iter().flat_map(BTreeMap::keys);
    let port = ports.filter_map(|port| port.split('/').next()?.parse::<u16>().ok()).next();
    let label = config.labels.as_ref().and_then(|labels| labels.get(HEALTH_LABEL));
    let health = label.map(|text| serde_json::from_str(text).context("the image's health label is broken")).transpose()?;
    let volumes = config.volumes.iter().flat_map(BTreeMap::keys).cloned().collect();
    Ok(Program { artifact: *digest, port, health, volumes })
}

/// An app as `app.json` on the host describes it, as far as it is asked here.
#[derive(Debug, Deserialize)]
struct AppFile {
    name: String,
    #[serde(default)]
    port: Option<u16>,
    #[serde(default)]
    health: Option<Health>,
    #[serde(default)]
    volumes: Vec<Value>,
}

/// A machine: port and health are those of the app that requests go to.
fn of_machine(store: &Store, release: &release::Release, pipeline: &str, wanted: Option<&str>, disk: Digest) -> Result<Program> {
    let host = entry(release, Kind::Host, pipeline)?.digest;
    let mut apps = apps(store, &host)?;
    let names = apps.iter().map(|app| app.name.clone()).collect::<Vec<_>>().join("`, `");
    let own = wanted.unwrap_or(pipeline);
    let index = apps.iter().position(|app| app.name == own);
    let with_port = apps.iter().filter(|app| app.port.is_some()).count();
    let only = || apps.iter().position(|app| app.port.is_some()).filter(|_| with_port == 1);
    let found = if wanted.is_some() { index } else { index.or_else(only) };
    let Some(index) = found else {
        if wanted.is_none() && apps.is_empty() {
            return Ok(Program { artifact: disk, port: None, health: None, volumes: Vec::new() });
        }
        let problem = Problem::failed(format!("nobody says which app of the machine `{pipeline}` requests go to"));
        return Err(problem.hint(format!("write `vm: {{ app: NAME }}`; there are `{names}`")).into());
    };
    let app = apps.swap_remove(index);
    let volumes = app.volumes.iter().filter_map(|volume| volume.as_str().or_else(|| volume["path"].as_str())).map(str::to_owned);
    let health = app.health.or(app.port.map(|_| Health { check: HealthCheck::Tcp, deadline: std::time::Duration::ZERO }));
    let longer = |health: Health| Health { deadline: health.deadline + std::time::Duration::from_secs(BOOT_SECONDS), ..health };
    Ok(Program { artifact: disk, port: app.port, health: health.map(longer), volumes: volumes.collect() })
}

/// The `app.json` of every app in the layers of a host image.
fn apps(store: &Store, host: &Digest) -> Result<Vec<AppFile>> {
    let mut found: BTreeMap<String, AppFile> = BTreeMap::new();
    for blob in image::blobs(store, host)? {
        let file = fs_err::File::open(&blob.path)?;
        let mut archive = tar::Archive::new(blob.compression.reader(std::io::BufReader::new(file))?);
        for entry in archive.entries().with_context(|| format!("cannot read layer {}", blob.digest))? {
            let mut entry = entry?;
            let path = entry.path()?.to_string_lossy().trim_start_matches("./").to_owned();
            let name = path.strip_prefix(APPS).and_then(|rest| rest.trim_start_matches('/').strip_suffix("/app.json"));
            let Some(name) = name.filter(|name| !name.contains('/')).map(str::to_owned) else { continue };
            let app: AppFile =
                serde_json::from_reader(&mut entry).with_context(|| format!("the description of the app `{name}` is broken"))?;
            found.insert(name, app);
        }
    }
    Ok(found.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::types::{Docker, Local};

    fn binding(value: &str) -> Binding {
        let values = BTreeMap::from([("A".to_owned(), value.to_owned())]);
        Binding {
            release: Digest::of("release"),
            version: "1.4".into(),
            config: Configuration { values, secrets: BTreeMap::new() },
            since: "2026-03-01T00:00:00Z".parse().unwrap(),
            doubtful: false,
            by: "Ann".into(),
            author: None,
        }
    }

    fn environment() -> Environment {
        let web = Target::Local(Local { instances: 2, ..Local::default() });
        let targets = BTreeMap::from([("web".to_owned(), web), ("my_jobs".to_owned(), Target::Docker(Docker::default()))]);
        Environment { targets, ..Environment::default() }
    }

    #[test]
    fn the_same_pair_in_the_same_settings_is_the_same_generation() {
        let first = Generation::of(&environment(), &binding("1"));
        // Who decided, and when, plays no part.
        let later = Binding { since: "2026-04-01T00:00:00Z".parse().unwrap(), by: "Bob".into(), ..binding("1") };
        assert_eq!(Generation::of(&environment(), &later).id, first.id);
        assert_ne!(Generation::of(&environment(), &binding("2")).id, first.id);
        let mut other = environment();
        other.targets.remove("my_jobs");
        assert_ne!(Generation::of(&other, &binding("1")).id, first.id);
        let ids: Vec<String> = first.places("shop/prod").into_iter().map(|place| place.id).collect();
        let id = &first.id;
        assert_eq!(ids, [format!("shop-prod-{id}-my-jobs-0"), format!("shop-prod-{id}-web-0"), format!("shop-prod-{id}-web-1")]);
    }

    #[test]
    fn who_excludes_whom() {
        let with = |name: &str, mode: Volume, value: &str| {
            let volumes = BTreeMap::from([(name.to_owned(), VolumeSpec { mode, path: None })]);
            Generation::of(&Environment { volumes, ..environment() }, &binding(value))
        };
        use Volume::{Exclusive, Shared};
        let cases = [
            (with("data", Exclusive, "1"), with("data", Exclusive, "2"), true),
            (with("data", Shared, "1"), with("data", Exclusive, "2"), true),
            (with("data", Exclusive, "1"), with("data", Shared, "2"), true),
            (with("data", Shared, "1"), with("data", Shared, "2"), false),
            (with("data", Exclusive, "1"), with("other", Exclusive, "2"), false),
            (with("data", Exclusive, "1"), with("data", Exclusive, "1"), false),
        ];
        for (one, other, expected) in cases {
            assert_eq!(
                (one.excludes(&other), other.excludes(&one)),
                (expected, expected),
                "{:?} {:?}",
                one.volumes,
                other.volumes
            );
        }
    }

    #[test]
    fn what_an_instance_needs() {
        let volumes = BTreeMap::from([("data".to_owned(), VolumeSpec { mode: Volume::Shared, path: None })]);
        let mut generation = Generation::of(&Environment { volumes, ..environment() }, &binding("1"));
        let place = generation.places("shop/prod").pop().unwrap();
        let spec = |generation: &Generation| generation.spec("shop/prod", &place, Path::new("/state/volumes"), BTreeMap::new());
        assert!(!generation.is_prepared() && spec(&generation).is_err());
        let program = |volumes: &[&str]| Program {
            artifact: Digest::of("image"),
            port: Some(8080),
            health: None,
            volumes: volumes.iter().map(|path| (*path).to_owned()).collect(),
        };
        generation.programs.insert("web".into(), program(&["/var/lib/data/", "/cache"]));
        let found = spec(&generation).unwrap();
        assert_eq!((found.number, found.port, found.env["A"].as_str()), (1, Some(8080), "1"));
        assert_eq!(
            (found.volumes[0].path.as_str(), found.volumes[0].source.to_str()),
            ("/var/lib/data", Some("/state/volumes/shop/prod/data"))
        );
        // Nobody says where it is.
        generation.programs.insert("web".into(), program(&["/a", "/b"]));
        let error = spec(&generation).unwrap_err().to_string();
        assert_eq!(error, "nobody says where in the program the volume `data` of `shop/prod` is");
    }
}
