//! Instances in the sandbox of this machine, each owned by a shim.
//!
//! Nothing is kept here: what there is stands below `STATE/instances`, and the shims answer for it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use super::{Address, Checked, Found, InstanceSpec, Running, Target};
use crate::error::Problem;
use crate::rollout::shim::{self, Instance, Owned, ProgramSpec, Request, Response};

/// Whose instances these are.
const KIND: &str = "local";
/// How much longer than its own time a check may take to be answered.
const SLACK: Duration = Duration::from_secs(5);

/// The local target of one root.
#[derive(Debug, Clone)]
pub struct Local {
    /// This program, which is run again as shim.
    program: PathBuf,
    /// The store's root and its state.
    root: PathBuf,
    state: PathBuf,
}

impl Local {
    /// `program` is this program, `root` and `state` are where its store is.
    pub fn new(program: impl Into<PathBuf>, root: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), root: root.into(), state: state.into() }
    }

    fn instances(&self) -> PathBuf {
        self.state.join("instances")
    }

    /// # Errors
    /// An id that is not one: it becomes the name of a folder.
    fn dir(&self, id: &str) -> Result<PathBuf> {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if id.is_empty() || id.len() > 200 || !id.chars().all(good) {
            return Err(Problem::usage(format!("`{id}` is not an instance: lower case letters, digits and `-`")).into());
        }
        Ok(self.instances().join(id))
    }
}

impl Target for Local {
    fn start(&self, spec: &InstanceSpec) -> Result<()> {
        let instance = Instance::of(spec, KIND, json!({"image": spec.artifact, "port": spec.port}));
        let owned = Owned::Program(ProgramSpec {
            root: self.root.clone(),
            state: self.state.clone(),
            image: spec.artifact,
            env: spec.env.clone(),
            volumes: spec.volumes.clone(),
            limits: spec.limits,
            network: true,
        });
        shim::start(&self.program, &self.dir(&spec.id)?, &instance, &owned, &spec.secrets).map(drop)
    }

    fn list(&self) -> Result<Vec<Found>> {
        let seen = shim::list(&self.instances(), KIND)?;
        let found = seen.into_iter().map(|seen| Found {
            id: seen.instance.id,
            environment: seen.instance.environment,
            generation: seen.instance.generation,
            target: seen.instance.target,
            number: seen.instance.number,
            address: match seen.state.status {
                Running::Ended { .. } => None,
                _ => Some(Address::Shim(seen.dir.join(shim::SOCKET))),
            },
            status: seen.state.status,
            restarts: seen.state.restarts,
            memory: seen.state.memory,
            notes: seen.state.notes,
        });
        Ok(found.collect())
    }

    fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        shim::stop(&self.program, &self.dir(id)?, grace)
    }

    fn forget(&self, id: &str) -> Result<()> {
        shim::forget(&self.dir(id)?)
    }

    fn check(&self, id: &str, argv: &[String], timeout: Duration) -> Result<Checked> {
        let request = Request::Check { argv: argv.to_vec(), timeout };
        match shim::ask(&self.dir(id)?, &request, timeout + SLACK)? {
            (Response::Checked { good, last }, _) => Ok(Checked { good, last }),
            (Response::Failed(last), _) => Ok(Checked { good: false, last }),
            (other, _) => anyhow::bail!("unexpected answer to a check: {other:?}"),
        }
    }

    fn logs(&self, id: &str, lines: usize, follow: bool, sink: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        shim::logs(&self.dir(id)?, lines, follow, sink)
    }

    fn exec(&self, id: &str, argv: &[String], interactive: bool) -> Result<i32> {
        shim::exec(&self.dir(id)?, argv, interactive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_stays_in_its_folder() {
        let local = Local::new("/bin/pipeline", "/var/lib/pipeline", "/var/lib/pipeline/state");
        for bad in ["", "..", "a/b", "A", "a.b", "a b"] {
            assert!(local.dir(bad).is_err(), "{bad}");
            assert!(local.stop(bad, Duration::ZERO).is_err(), "{bad}");
        }
        assert_eq!(local.dir("shop-prod-0").unwrap(), PathBuf::from("/var/lib/pipeline/state/instances/shop-prod-0"));
    }
}
