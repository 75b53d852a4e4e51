//! `pipeline doctor`.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use super::{Global, report, ui};
use crate::error::Problem;
use crate::sandbox::probe::{self, Check, ProbeEnv, State};
use crate::vm::accelerator::{self, Wanted};
use crate::vm::{Tools, firmware};

#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(global: &Global, _args: Args) -> Result<u8> {
    let host = ui::host(global)?;
    let (root, state) = ui::places(global, &host)?;
    let uid = rustix::process::geteuid().as_raw();
    let user = host.variables.get("USER").or_else(|| host.variables.get("LOGNAME")).cloned();
    let user = crate::sandbox::user_name_of(uid).or(user).unwrap_or_else(|| uid.to_string());
    let env = ProbeEnv::new(host.path.clone(), uid, user, root, host.program.clone());
    let mut checks = probe::probe(&env);
    checks.extend(probe::real_unshare_probe(&env));
    checks.extend(own_session(&host));
    checks.extend(machines(&host, &state));
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

/// What `bake`, `boot` and `test` need beside a build: nothing that keeps `build` from working.
fn machines(host: &crate::build::host::Host, state: &Path) -> Vec<Check> {
    let row = |name: &'static str, package: &'static str, found: Result<String>| match found {
        Ok(detail) => Check { name, state: State::Ok, detail, fix: None, package: None },
        Err(error) => Check {
            name,
            state: State::Warning,
            detail: format!("{error:#}"),
            fix: crate::error::hints(&error).into_iter().next(),
            package: Some(package),
        },
    };
    let tools = Tools::find(&host.path);
    let image = match crate::cmd::find("qemu-img", &host.path) {
        Some(path) => Ok(format!("{}, for `bake`", path.display())),
        None => Err(Problem::failed("`qemu-img` is not installed; `bake` writes no qcow2").hint("apt install qemu-utils").into()),
    };
    let mut checks = vec![row("qemu-img", "qemu-utils", image)];
    match tools {
        Err(error) => checks.push(row("qemu", "qemu-system-x86", Err(error))),
        Ok(tools) => {
            let firmware = firmware::find(&tools.qemu).map(|files| files.path().display().to_string());
            checks.push(row("uefi firmware", "ovmf", firmware));
            let choice = accelerator::choose(&tools.qemu, Wanted::Auto, &state.join("vm")).map(|choice| choice.words);
            checks.push(row("qemu", "qemu-system-x86", choice));
        }
    }
    checks
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
