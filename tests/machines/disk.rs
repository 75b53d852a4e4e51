//! Builds and bakes the appliance and its variants on the store that all tests share.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pipeline::artifact::disk::{self, Disk, Part};
use pipeline::artifact::store::Store;
use pipeline::disk::index::Index;

use crate::common::{Project, me, repository};

/// Variants have one name, and so one tag: between a build and its bake nobody else may build.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A baked disk of the shared store.
#[derive(Debug)]
pub struct Version {
    pub disk: Disk,
    root: PathBuf,
}

impl Version {
    /// Digests of the blocks of its root.
    pub fn index(&self) -> Index {
        let store = Store::open(&self.root).unwrap();
        Index::parse(&store.read(&self.disk.part(Part::Index).unwrap().digest).unwrap()).unwrap()
    }
}

pub fn store(project: &Project) -> Store {
    Store::open(&project.root).unwrap()
}

/// The repository's appliance, with its disk in `out/` of the project.
pub fn appliance() -> (Project, Version) {
    baked(&[], None)
}

/// The appliance with each first text of its pipeline file replaced by the second, baked as `out/appliance.{raw,qcow2}`.
pub fn baked(edits: &[(&str, &str)], previous: Option<&Version>) -> (Project, Version) {
    let project = Project::repository(me());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    project.build_shared("appliance");
    for (old, new) in edits {
        project.edit("pipelines/appliance.yaml", old, new);
    }
    if !edits.is_empty() {
        project.build(&["appliance"]);
    }
    let version = bake(&project, "appliance", previous);
    (project, version)
}

/// `tests/fixtures/hostile`, with its disk in `out/` of the project.
pub fn hostile() -> Project {
    let project = Project::repository(me());
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    // Its lock file holds what its own packages are; those of notes come from the repository's.
    project.build_shared("notes");
    project.copy(&repository().join("tests/fixtures/hostile"), "tests/fixtures/hostile");
    project.build(&["--update-missing", "tests/fixtures/hostile/hostile-host.yaml"]);
    bake(&project, "hostile-host", None);
    project
}

fn bake(project: &Project, name: &str, previous: Option<&Version>) -> Version {
    let mut words = vec!["bake", name, "--json", "--format", "raw,qcow2"];
    let digest = previous.map(|version| version.disk.digest.to_string());
    words.extend(digest.iter().flat_map(|digest| ["--previous", digest]));
    let answer = project.pipeline(&words).ok().json();
    let digest = answer["digest"].as_str().unwrap().parse().unwrap();
    let disk = disk::read(&store(project), &digest).unwrap().expect("what was baked is a disk");
    Version { disk, root: project.root.clone() }
}

/// The first version in the formats of a test: files of this project's own.
pub fn qcow2(project: &Project, name: &str) -> PathBuf {
    file(project, &format!("out/{name}.qcow2"))
}

pub fn raw(project: &Project) -> PathBuf {
    file(project, "out/appliance.raw")
}

fn file(project: &Project, name: &str) -> PathBuf {
    let path = project.path(name);
    assert!(Path::new(&path).is_file(), "{} was not written", path.display());
    path
}
