//! Which target serves which settings.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;

use super::ui;
use crate::build::host::Host;
use crate::config::types as config;
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::rollout::target::Target;
use crate::rollout::target::docker::{self, Docker};
use crate::rollout::target::local::Local;
use crate::rollout::target::vm::{self, Vm};

/// The target of `settings`.
pub fn target_for(around: &ui::Surroundings, settings: &config::Target) -> Result<Box<dyn Target>> {
    target(&around.host, around.store.root(), &around.store.state(""), settings)
}

/// The target of `settings`, where the store's root and the state are these.
pub fn target(host: &Host, root: &Path, state: &Path, settings: &config::Target) -> Result<Box<dyn Target>> {
    // As a path without an end: it is compared.
    let state: PathBuf = state.components().collect();
    let runtime = runtime(host, root, &state);
    let (root, program) = (root.to_path_buf(), host.program.clone());
    Ok(match settings {
        config::Target::Local(_) => Box::new(Local::new(program, root, state)),
        config::Target::Docker(docker) => Box::new(Docker::new(docker.host.as_deref(), docker::Around { root, state, runtime })?),
        config::Target::Vm(_) => Box::new(Vm::new(vm::Around { program, root, state, runtime, path: host.path.clone() })),
        config::Target::Other(kind, _) => {
            let problem = Problem::failed(format!("this pipeline cannot serve targets of the kind `{kind}`"));
            return Err(problem.hint("a newer one may: install it").into());
        }
    })
}

/// Where the sockets are, which with systemd and in a session is in memory; see [`super::daemon::socket`].
fn runtime(host: &Host, root: &Path, state: &Path) -> PathBuf {
    if root == Path::new(ui::SYSTEM) {
        return "/run/pipeline".into();
    }
    let of_user = host.variables.get("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute());
    match of_user.filter(|_| state != root.join("state")) {
        Some(dir) => Path::new(dir).join("pipeline"),
        None => in_memory(root).unwrap_or_else(|_| root.join("run")),
    }
}

/// A folder of this user's alone for what is kept at `root`, where everybody has one in memory: what holds secrets is
/// refused on a disk.
fn in_memory(root: &Path) -> std::io::Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    let name = Digest::of(root.as_os_str().as_bytes()).hex();
    let dir = Path::new("/dev/shm").join(format!("pipeline-{user}-{}", &name[..12]));
    match std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // Somebody else's is a trap.
    let found = fs_err::symlink_metadata(&dir)?;
    let is_ours = found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0;
    if is_ours { Ok(dir) } else { Err(std::io::ErrorKind::PermissionDenied.into()) }
}
