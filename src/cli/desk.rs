//! What the verbs about environments share: where the ledger is, who decides, which environment is meant.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use jiff::Timestamp;

use super::{Global, ui};
use crate::build::base;
use crate::config::types::Pipeline;
use crate::error::Problem;
use crate::progress::Progress as _;
use crate::release::audit;
use crate::release::desk::{self, Desk};
use crate::release::evidence::FromStore;
use crate::release::gate::{self, Tested};
use crate::release::ledger::{Commit, Ledger, Remote, Snapshot};
use crate::release::mirror::{self, Mirror, What};
use crate::release::policy::Policy;
use crate::release::sshsig::Signer;

/// Key that signs decisions, instead of Git's `user.signingKey`.
const SIGNING_KEY: &str = "PIPELINE_SIGNING_KEY";
/// Address of the ledger's remote, instead of the pipeline file's.
const REMOTE: &str = "PIPELINE_LEDGER";

/// Everything a decision needs, opened.
pub struct Office {
    pub around: ui::Surroundings,
    pub ledger: Ledger,
    pub remote: Option<Remote>,
    name: String,
    email: String,
    signer: Option<Signer>,
    network: gate::http::Network,
    /// The pipeline file of this folder, when there is one.
    pub here: Option<Pipeline>,
}

/// `PIPELINE/ENVIRONMENT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub pipeline: String,
    pub environment: String,
}

impl Place {
    /// `shop/prod`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.pipeline, self.environment)
    }
}

impl Office {
    /// Opens the ledger for somebody who decides. `pipeline`: the one that is meant, where a verb names it.
    pub fn open(global: &Global, pipeline: Option<&str>) -> Result<Self> {
        Self::open_for(global, pipeline, Some(None))
    }

    /// As [`Office::open`]; decisions are made in the name `name`.
    pub fn open_as(global: &Global, pipeline: Option<&str>, name: &str) -> Result<Self> {
        Self::open_for(global, pipeline, Some(Some(name)))
    }

    /// Opens the ledger for somebody who looks at it, and need not be known to Git.
    pub fn open_to_read(global: &Global, pipeline: Option<&str>) -> Result<Self> {
        Self::open_for(global, pipeline, None)
    }

    /// `decides`: whether decisions are made, and in which name when not in Git's.
    fn open_for(global: &Global, pipeline: Option<&str>, decides: Option<Option<&str>>) -> Result<Self> {
        let (decides, given) = (decides.is_some(), decides.flatten());
        let around = ui::Surroundings::new(global)?;
        let here = match (crate::config::find(pipeline, &around.cwd), decides) {
            (Err(_), _) => None,
            // Where decisions go stands in it.
            (Ok(file), true) => Some(crate::config::load(&file, &around.cwd)?),
            (Ok(file), false) => crate::config::load(&file, &around.cwd).ok(),
        };
        let settings = here.as_ref().map(|here| here.releases.ledger.clone()).unwrap_or_default();
        let git = Git::read(&around, given)?;
        let name = match git.name {
            Some(name) => name,
            None if decides => {
                return Err(Problem::usage("Git does not know who you are, and the ledger keeps who decided")
                    .hint("`git config --global user.name NAME` and `user.email`, or GIT_AUTHOR_NAME and GIT_AUTHOR_EMAIL")
                    .into());
            }
            None => String::new(),
        };
        let keys: Vec<PathBuf> = git.signing_key.iter().cloned().chain(around.host.ssh_keys()).collect();
        let ledger = open_ledger(&around.store.state("ledger"))?;
        // Who only looks may be here because something is wrong with it.
        let shared = if decides { ledger.shared()? } else { ledger.shared().unwrap_or_default() };
        let wanted = around.host.variables.get(REMOTE).cloned().or(settings.remote);
        let same = |a: &str, b: &str| Remote::new(a, &[]).shown() == Remote::new(b, &[]).shown();
        let url = match (wanted, &shared) {
            (Some(wanted), Some(shared)) if !decides && !same(&wanted, shared) => Some(shared.clone()),
            (wanted, shared) => wanted.or_else(|| shared.clone()),
        };
        let remote = url.map(|url| Remote::new(&url, &keys));
        if let (Some(remote), Some(shared)) = (&remote, &shared)
            && Remote::new(shared, &[]).shown() != remote.shown()
        {
            return Err(Problem::usage(format!("the ledger here is shared with `{shared}`, and not with `{}`", remote.shown()))
                .hint("`--root DIR` keeps another ledger; when the server moved, `pipeline ledger accept` forgets where it was")
                .into());
        }
        let signs = settings.sign
            || here.as_ref().is_some_and(|here| !here.releases.people.is_empty())
            || (decides && git.signing_key.is_some() && has_people(&ledger)?);
        let asked = around.host.variables.contains_key(SIGNING_KEY);
        let signer = match git.signing_key.filter(|_| signs || asked || git.signs) {
            Some(file) if decides => {
                let agent = around.host.variables.get("SSH_AUTH_SOCK").map(PathBuf::from);
                Some(Signer::open(&file, agent.as_deref())?)
            }
            None if settings.sign && decides => {
                return Err(Problem::usage("decisions are to be signed (`ledger.sign`), and there is no key")
                    .hint(format!("`git config user.signingKey ~/.ssh/id_ed25519`, or {SIGNING_KEY}"))
                    .into());
            }
            _ => None,
        };
        // Lower case first, as curl and the registry client read them.
        let variable = |name: &str| {
            let given = |name: &str| around.host.variables.get(name).filter(|value| !value.is_empty()).cloned();
            given(name).or_else(|| given(&name.to_uppercase()))
        };
        let network = gate::http::Network {
            https_proxy: variable("https_proxy"),
            http_proxy: variable("http_proxy"),
            no_proxy: variable("no_proxy"),
            ca_bundle: around.host.ca_bundle.clone(),
        };
        Ok(Self { around, ledger, remote, name, email: git.email, signer, network, here })
    }

    /// Calls `work` with a desk.
    pub fn sit<T>(&self, work: impl FnOnce(&Desk<'_>) -> Result<T>) -> Result<T> {
        let boot = |digest: &_, test: &_| super::test::boot_for_gate(&self.around, digest, test) as Result<Tested>;
        let evidence = FromStore {
            store: &self.around.store,
            cwd: &self.around.cwd,
            network: &self.network,
            boot: &boot,
            threads: self.around.host.threads,
            progress: &self.around.progress,
            told: Default::default(),
        };
        let clock = || Timestamp::now();
        let desk = Desk {
            ledger: &self.ledger,
            remote: self.remote.as_ref(),
            name: self.name.clone(),
            email: self.email.clone(),
            signer: self.signer.as_ref(),
            evidence: &evidence,
            clock: &clock,
            progress: &self.around.progress,
        };
        let result = work(&desk);
        self.around.progress.finish();
        result
    }

    /// Calls `work` with what sets the registry's tags.
    pub fn mirror<T>(&self, work: impl FnOnce(&Mirror<'_>) -> Result<T>) -> Result<T> {
        let registry = || base::registry(&self.around.build());
        let mirror = Mirror {
            store: &self.around.store,
            ledger: &self.ledger,
            registry: &registry,
            now: Timestamp::now(),
            progress: &self.around.progress,
        };
        let result = work(&mirror);
        self.around.progress.finish();
        result
    }

    /// Sets the tags that follow the environments of `pipeline`. A decision stands, whatever becomes of them.
    pub fn tags(&self, pipeline: &str, what: What) -> Vec<mirror::Told> {
        self.mirror(|mirror| mirror.publish(pipeline, None, what)).unwrap_or_else(|error| {
            self.around.progress.warn(format!("the tags of the registry were not looked at: {error:#}"));
            Vec::new()
        })
    }

    /// What `text` means: `shop/prod`, or `prod` of the pipeline `-p` names or this folder has.
    pub fn place(&self, text: &str, pipeline: Option<&str>) -> Result<Place> {
        if let Some((pipeline, environment)) = text.split_once('/') {
            return Ok(Place { pipeline: pipeline.into(), environment: environment.into() });
        }
        Ok(Place { pipeline: self.pipeline(pipeline)?, environment: text.into() })
    }

    /// The pipeline's name: as given, or of this folder.
    pub fn pipeline(&self, given: Option<&str>) -> Result<String> {
        if let Some(name) = given.map(str::to_owned).or_else(|| self.here.as_ref().map(|here| here.name.to_string())) {
            return Ok(name);
        }
        // A file that is there and wrong is what has to be told.
        if crate::config::find(None, &self.around.cwd).is_ok() {
            return self.around.pipeline(None).map(|here| here.name.to_string());
        }
        Err(Problem::usage("which pipeline?").hint("write PIPELINE/ENVIRONMENT, or `-p PIPELINE`").into())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says when nobody checks who decides.
    pub fn say_unchecked(&self, has_people: bool) {
        if !has_people {
            let name = &self.name;
            self.around
                .progress
                .note(format!("deciding as `{name}`, as Git says; `people:` in the pipeline file makes keys count"));
        }
    }
}

/// The ledger in the folder `state`, which follows a remote only as far as its decisions are sound.
pub fn open_ledger(state: &Path) -> Result<Ledger> {
    let rules = |commit: &Commit, before: Option<&Snapshot>, after: &Snapshot| Ok(audit::check(commit, before, after));
    Ok(Ledger::open(&state.join("ledger.git"), &state.join("seen.json"))?.with_rules(Arc::new(rules)))
}

/// Whether a policy in the ledger makes keys count.
fn has_people(ledger: &Ledger) -> Result<bool> {
    let snapshot = ledger.snapshot()?;
    for pipeline in snapshot.pipelines()? {
        if let Some(bytes) = snapshot.read(&desk::policy_path(&pipeline))?
            && !Policy::parse(&bytes)?.people.is_empty()
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What Git knows of who works here.
struct Git {
    name: Option<String>,
    email: String,
    signing_key: Option<PathBuf>,
    /// `commit.gpgSign` with SSH keys.
    signs: bool,
}

impl Git {
    fn read(around: &ui::Surroundings, given: Option<&str>) -> Result<Self> {
        let config = match git2::Repository::discover(&around.cwd) {
            Ok(repository) => repository.config(),
            Err(_) => git2::Config::open_default(),
        };
        let config = config.and_then(|mut config| config.snapshot()).context("cannot read Git's settings")?;
        let variable = |name: &str| around.host.variables.get(name).filter(|value| !value.is_empty()).cloned();
        let get = |key: &str| config.get_string(key).ok().filter(|value| !value.is_empty());
        let name = given.map(str::to_owned).or_else(|| variable("GIT_AUTHOR_NAME")).or_else(|| get("user.name"));
        let email = variable("GIT_AUTHOR_EMAIL").or_else(|| get("user.email")).unwrap_or_else(|| "unknown".into());
        let is_ssh = get("gpg.format").is_some_and(|format| format == "ssh");
        let home = around.host.home.clone();
        let expand = |path: String| match (path.strip_prefix("~/"), &home) {
            (Some(rest), Some(home)) => home.join(rest),
            _ => PathBuf::from(path),
        };
        let signing_key = variable(SIGNING_KEY).or_else(|| get("user.signingkey").filter(|_| is_ssh)).map(expand);
        let signs = is_ssh && config.get_bool("commit.gpgsign").unwrap_or(false);
        Ok(Self { name, email, signing_key, signs })
    }
}
