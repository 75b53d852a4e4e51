//! Which target serves which settings.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::ui;
use crate::build::host::Host;
use crate::config::types as config;
use crate::error::Problem;
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
    if root == Path::new("/var/lib/pipeline") {
        return "/run/pipeline".into();
    }
    let of_user = host.variables.get("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute());
    match of_user.filter(|_| state != root.join("state")) {
        Some(dir) => Path::new(dir).join("pipeline"),
        None => root.join("run"),
    }
}
