//! `pipeline doctor`.

use anyhow::Result;
use serde_json::json;

use super::{Global, report, ui};
use crate::sandbox::probe::{self, Check, ProbeEnv, State};

#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(global: &Global, _args: Args) -> Result<u8> {
    let host = ui::host(global)?;
    let (root, _) = ui::places(global, &host)?;
    let uid = rustix::process::geteuid().as_raw();
    let user = host.variables.get("USER").or_else(|| host.variables.get("LOGNAME")).cloned();
    let user = crate::sandbox::user_name_of(uid).or(user).unwrap_or_else(|| uid.to_string());
    let env = ProbeEnv::new(host.path.clone(), uid, user, root, host.program.clone());
    let mut checks = probe::probe(&env);
    checks.extend(probe::real_unshare_probe(&env));
    checks.extend(own_session(&host));
    let fix = probe::fix_command(&checks);
    let works = !checks.iter().any(Check::blocks);
    ui::answer(global, &json!({"schema": 1, "works": works, "checks": checks, "fix": fix}), || {
        text(&checks, works, fix.as_deref())
    })?;
    Ok(u8::from(!works))
}

/// The last word: the unshare process itself.
fn own_session(host: &crate::build::host::Host) -> Vec<Check> {
    let options = crate::sandbox::Options { program: host.program.clone(), own_network: true, interactive: false, fault: None };
    let (state, detail, fix) = match crate::sandbox::Session::start(&options) {
        Ok(_) => (State::Ok, "a namespace with mapped ids was made".to_string(), None),
        Err(error) => (State::Refused, format!("{error:#}"), crate::error::hints(&error).into_iter().next()),
    };
    vec![Check { name: "sandbox", state, detail, fix, package: None }]
}

fn text(checks: &[Check], works: bool, fix: Option<&str>) -> String {
    let rows: Vec<Vec<String>> = checks
        .iter()
        .map(|check| {
            let state = match check.state {
                State::Ok => "ok",
                State::Missing => "missing",
                State::Refused => "refused",
                State::Warning => "warning",
            };
            vec![state.to_string(), check.name.to_string(), check.detail.clone()]
        })
        .collect();
    let mut text = report::table(&rows);
    for check in checks.iter().filter(|check| check.state != State::Ok) {
        if let Some(fix) = &check.fix {
            text.push_str(&format!("{}: {fix}\n", check.name));
        }
    }
    text.push_str("\nx86-64 Linux only; ");
    text.push_str(match (works, fix) {
        (true, _) => "this machine can build and run\n",
        (false, None) => "this machine cannot build yet, see above\n",
        (false, Some(_)) => "this machine cannot build yet; the command that fixes it:\n",
    });
    if let (false, Some(fix)) = (works, fix) {
        text.push_str(&format!("  {fix}\n"));
    }
    text
}
