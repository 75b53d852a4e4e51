//! `pipeline ledger path|log|verify|accept|set-aside` and `keys generate`.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use serde_json::json;

use super::desk::Office;
use super::{Global, status, ui};
use crate::artifact::keys::{self, PrivateKey};
use crate::error::Problem;
use crate::release::audit;
use crate::release::ledger::RemoteError;

#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Print where the ledger's Git repository is
    Path,
    /// List decisions, of everybody about everything; the same as `pipeline log`
    Log(status::LogArgs),
    /// Check the whole history: objects, chain, signatures, and that every state follows from its decisions
    Verify,
    /// Take the history as it is for the right one, after it was rewritten and somebody has looked at why
    Accept,
    /// Give up what was decided here apart from the remote, show it, and follow the remote
    SetAside,
}

#[derive(Debug, clap::Subcommand)]
pub enum KeysVerb {
    /// Make a key pair for signing releases, as cosign has them: NAME.key and NAME.pub
    Generate {
        /// Name of the files
        #[arg(default_value = "pipeline")]
        name: String,
        /// Folder they are written to
        #[arg(long, short, value_name = "DIR", default_value = ".")]
        output: PathBuf,
    },
}

/// Password of a private key; the same variable as cosign's.
pub const PASSWORD: &str = "COSIGN_PASSWORD";

pub fn run(global: &Global, verb: Verb) -> Result<u8> {
    let office = || Office::open_to_read(global, None);
    match verb {
        Verb::Log(args) => status::log(global, args),
        Verb::Path => {
            let office = office()?;
            let path = office.ledger.dir();
            ui::answer(global, &json!({"schema": 1, "path": path}), || format!("{}\n", path.display()))?;
            Ok(0)
        }
        Verb::Verify => {
            let verified = audit::verify(&office()?.ledger, Timestamp::now())?;
            let findings: Vec<_> = verified
                .findings
                .iter()
                .map(|finding| json!({"commit": finding.commit.map(|id| id.to_string()), "problem": finding.problem}))
                .collect();
            let value = json!({"schema": 1, "tip": verified.tip.map(|id| id.to_string()), "decisions": verified.commits, "signed": verified.signed, "findings": findings});
            ui::answer(global, &value, || {
                let mut text = String::new();
                for finding in &verified.findings {
                    let commit = finding.commit.map_or("the ledger".to_owned(), |id| id.to_string()[..12].to_owned());
                    let _ = writeln!(text, "{commit}: {}", finding.problem);
                }
                let good = if verified.findings.is_empty() { "sound" } else { "NOT SOUND" };
                text + &format!("{good}: {} decisions, {} of them signed\n", verified.commits, verified.signed)
            })?;
            Ok(u8::from(!verified.findings.is_empty()))
        }
        Verb::Accept => {
            office()?.ledger.accept()?;
            Ok(0)
        }
        Verb::SetAside => {
            let office = office()?;
            let Some(remote) = &office.remote else {
                return Err(Problem::usage("the ledger is on this machine only: nothing to set aside").into());
            };
            let aside = office.ledger.set_aside(remote).map_err(RemoteError::into_error)?;
            let rows: Vec<_> = aside
                .iter()
                .map(|commit| json!({"commit": commit.id.to_string(), "by": commit.author.name, "decision": commit.subject}))
                .collect();
            ui::answer(global, &json!({"schema": 1, "aside": rows}), || {
                if aside.is_empty() {
                    return "nothing was decided here that is not there\n".into();
                }
                let mut text = String::new();
                for commit in &aside {
                    let _ = writeln!(text, "{} {} ({})", &commit.id.to_string()[..12], commit.subject, commit.author.name);
                }
                text + "set aside, and kept below refs/pipeline/aside/; decide again what is still right\n"
            })?;
            Ok(0)
        }
    }
}

pub fn keys(global: &Global, verb: KeysVerb) -> Result<u8> {
    let KeysVerb::Generate { name, output } = verb;
    let host = ui::host(global)?;
    let key = PrivateKey::generate();
    let password = host.variables.get(PASSWORD).map(|password| password.as_bytes().to_vec());
    let (private, public) = keys::write_pair(&output, &name, &key, password.as_deref()).context("cannot write the keys")?;
    let value = json!({"schema": 1, "private": private, "public": public, "fingerprint": key.public().fingerprint().to_string(), "encrypted": password.is_some()});
    ui::answer(global, &value, || {
        let how = if password.is_some() {
            format!("encrypted with {PASSWORD}")
        } else {
            format!("not encrypted; {PASSWORD} would do that")
        };
        format!(
            "{}: keep it secret; {how}\n{}: for `signed: {{ keys: […] }}` and `cosign verify --key`\n",
            private.display(),
            public.display()
        )
    })?;
    Ok(0)
}
