//! What this machine can do for builds, as data: the rows of `pipeline doctor`, and the cause and
//! the exact setting when a namespace or a mount is refused.
//!
//! In: a [`ProbeEnv`] (paths are given, so that tests have a machine of their own). Out: [`Check`]s.
//! [`probe`] only looks; [`real_unshare_probe`] does for a moment what a build does. Nothing is changed.

mod kernel;
mod place;
mod real;
mod tools;
mod user;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use self::real::real_unshare_probe;
use crate::error::Problem;

/// The machine as seen by the user who asks.
#[derive(Debug, Clone)]
pub struct ProbeEnv {
    /// The value of `PATH`.
    pub path: OsString,
    pub uid: u32,
    pub user_name: String,
    /// Where the store and the cache are, or will be.
    pub root_dir: PathBuf,
    /// This program's file, for an AppArmor profile.
    pub program: PathBuf,
    /// `/`, `/etc`, `/proc` and `/sys`, or a test's copies.
    pub top: PathBuf,
    pub etc: PathBuf,
    pub proc: PathBuf,
    pub sys: PathBuf,
}

impl ProbeEnv {
    pub fn new(path: OsString, uid: u32, user_name: String, root_dir: PathBuf, program: PathBuf) -> Self {
        let [top, etc, proc, sys] = ["/", "/etc", "/proc", "/sys"].map(PathBuf::from);
        Self { path, uid, user_name, root_dir, program, top, etc, proc, sys }
    }

    fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// A field of `/proc/self/status`, such as `Seccomp`.
    fn status(&self, field: &str) -> Option<String> {
        let status = read(&self.proc.join("self/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
        Some(line.trim().to_owned())
    }

    /// Whether we may mount without a user namespace.
    fn has_sys_admin(&self) -> bool {
        const CAP_SYS_ADMIN: u64 = 1 << 21;
        self.status("CapEff").and_then(|mask| u64::from_str_radix(&mask, 16).ok()).is_some_and(|mask| mask & CAP_SYS_ADMIN != 0)
    }
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Ok,
    /// Something has to be installed or set up.
    Missing,
    /// It is there and the machine does not allow it.
    Refused,
    /// Builds work, but not everything, or not surely.
    Warning,
}

/// One row of `pipeline doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub state: State,
    /// What was found, in a few words.
    pub detail: String,
    /// A command, or what else to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
    /// The Debian package that brings what is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub package: Option<&'static str>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, state: State::Ok, detail: detail.into(), fix: None, package: None }
    }

    fn bad(name: &'static str, state: State, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, state, detail: detail.into(), fix: Some(fix.into()), package: None }
    }

    /// Whether a build cannot work like this.
    pub fn blocks(&self) -> bool {
        matches!(self.state, State::Missing | State::Refused)
    }
}

/// All checks that only look, in the order in which they are shown.
pub fn probe(env: &ProbeEnv) -> Vec<Check> {
    let mut checks = vec![
        tools::distribution(env),
        kernel::version(env),
        kernel::user_namespaces(env),
        kernel::unprivileged(env),
        kernel::apparmor(env),
        kernel::container(env),
        kernel::overlay(env),
        user::no_new_privileges(env),
        user::id_ranges(env),
        user::id_mapper(env, "newuidmap"),
        user::id_mapper(env, "newgidmap"),
    ];
    checks.extend(tools::all(env));
    checks.extend([place::free_space(env), place::file_system(env), place::extended_attributes(env)]);
    checks
}

/// One command that installs everything that is [`State::Missing`] and has a package.
pub fn fix_command(checks: &[Check]) -> Option<String> {
    let mut packages: Vec<&str> =
        checks.iter().filter(|check| check.state == State::Missing).filter_map(|check| check.package).collect();
    packages.sort_unstable();
    packages.dedup();
    (!packages.is_empty()).then(|| install(&packages))
}

fn install(packages: &[&str]) -> String {
    format!("sudo apt-get install --no-install-recommends {}", packages.join(" "))
}

/// A step of setting up the sandbox that the kernel may refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// `unshare(CLONE_NEWUSER)`, or the clone of it.
    UserNamespace,
    /// `newuidmap`, `newgidmap`, or writing the maps.
    IdMap,
    /// Mounting or remounting anything, and the other namespaces.
    Mount,
    /// Mounting a new `/proc`.
    MountProc,
    /// Mounting an overlay.
    MountOverlay,
}

impl Step {
    fn words(self) -> &'static str {
        match self {
            Step::UserNamespace => "make a user namespace",
            Step::IdMap => "map user ids into its namespace",
            Step::Mount => "mount in its namespace",
            Step::MountProc => "mount `/proc` in its namespace",
            Step::MountOverlay => "mount an overlay in its namespace",
        }
    }

    /// What can be in the way, likeliest first. An Ubuntu kernel lets the namespace be made and
    /// refuses everything in it, so AppArmor is a suspect in every step.
    fn suspects(self, env: &ProbeEnv) -> Vec<Check> {
        let mut checks = vec![kernel::container(env), kernel::apparmor(env)];
        match self {
            Step::UserNamespace => checks.extend([kernel::user_namespaces(env), kernel::unprivileged(env), kernel::version(env)]),
            Step::IdMap => {
                let mappers = ["newuidmap", "newgidmap"].map(|program| user::id_mapper(env, program));
                checks.splice(0..0, mappers);
                checks.splice(0..0, [user::no_new_privileges(env), user::id_ranges(env)]);
            }
            Step::MountOverlay => {
                checks.splice(0..0, [place::file_system(env), kernel::version(env)]);
                checks.extend([place::extended_attributes(env), kernel::overlay(env)]);
            }
            Step::Mount | Step::MountProc => {}
        }
        checks
    }
}

/// The error for a refused step: the cause as far as it can be seen, and what to set.
pub fn explain_refusal(step: Step, errno: i32, env: &ProbeEnv) -> Problem {
    let words = std::io::Error::from_raw_os_error(errno);
    let failed = |cause: &str| Problem::failed(format!("the sandbox cannot {} ({words}): {cause}", step.words()));
    let suspects = step.suspects(env);
    let found =
        suspects.iter().find(|check| check.blocks()).or_else(|| suspects.iter().find(|check| check.state == State::Warning));
    if let Some(check) = found {
        let problem = failed(&check.detail);
        return match &check.fix {
            Some(fix) => problem.hint(fix),
            None => problem,
        };
    }
    match (step, errno) {
        (Step::UserNamespace, libc::ENOSPC | libc::EUSERS) => {
            failed("all user namespaces this machine allows are in use, or they are nested too deeply")
                .hint("raise the limit: `sudo sysctl -w user.max_user_namespaces=65536`")
        }
        (_, libc::EPERM | libc::EACCES) => {
            failed("no setting that is known to refuse it was found; a security module or a service manager may be in the way")
                .hint("`sudo journalctl --dmesg --grep=denied` may name it; `pipeline doctor` tries each step")
        }
        _ => failed("no known cause was found").hint("`pipeline doctor` tries each step"),
    }
}

/// A small file as text, without white space at its ends; nothing when it cannot be read.
fn read(path: &Path) -> Option<String> {
    fs_err::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine made of files, on which everything is well for an ordinary user.
    pub(super) struct Machine {
        pub dir: tempfile::TempDir,
        pub env: ProbeEnv,
    }

    impl Machine {
        pub fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let top = dir.path().to_owned();
            let env = ProbeEnv {
                path: top.join("bin").into(),
                uid: 1000,
                user_name: "ann".into(),
                root_dir: top.join("home/ann/store"),
                program: "/usr/local/bin/pipeline".into(),
                etc: top.join("etc"),
                proc: top.join("proc"),
                sys: top.join("sys"),
                top,
            };
            let machine = Self { dir, env };
            machine
                .write("proc/sys/kernel/osrelease", "6.12.5-amd64\n")
                .write("proc/sys/user/max_user_namespaces", "96365\n")
                .write("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t0\n")
                .write("proc/self/cgroup", "0::/user.slice\n")
                .write("proc/self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n")
                .write("proc/self/uid_map", "         0          0 4294967295\n")
                .write("proc/self/gid_map", "         0          0 4294967295\n")
                .write("proc/filesystems", "nodev\tproc\nnodev\toverlay\n\text4\n")
                .write("etc/subuid", "ann:100000:65536\n")
                .write("etc/subgid", "ann:100000:65536\n");
            machine
        }

        pub fn write(&self, path: &str, text: &str) -> &Self {
            let path = self.dir.path().join(path);
            fs_err::create_dir_all(path.parent().unwrap()).unwrap();
            fs_err::write(path, text).unwrap();
            self
        }

        pub fn program(&self, name: &str, mode: u32, script: &str) -> &Self {
            use std::os::unix::fs::PermissionsExt as _;
            self.write(&format!("bin/{name}"), &format!("#!/bin/sh\n{script}\n"));
            let path = self.dir.path().join("bin").join(name);
            fs_err::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
            self
        }
    }

    #[test]
    fn one_command_installs_what_is_missing() {
        let row = |state, package| Check { name: "x", state, detail: String::new(), fix: None, package };
        let checks = [
            row(State::Missing, Some("uidmap")),
            row(State::Missing, Some("bubblewrap")),
            row(State::Missing, Some("uidmap")),
            row(State::Warning, Some("git")),
            row(State::Ok, None),
            row(State::Missing, None),
        ];
        assert_eq!(fix_command(&checks).as_deref(), Some("sudo apt-get install --no-install-recommends bubblewrap uidmap"));
        assert_eq!(fix_command(&checks[3..]), None);
    }

    #[test]
    fn refusals_name_the_cause_and_the_setting() {
        let machine = Machine::new();
        machine.program("newuidmap", 0o4755, "").program("newgidmap", 0o4755, "");
        let explain = |step, errno| {
            let problem = explain_refusal(step, errno, &machine.env);
            (problem.message, problem.hints.join("\n"), problem.kind as u8)
        };
        let (message, hint, kind) = explain(Step::UserNamespace, libc::ENOSPC);
        assert_eq!(
            message,
            "the sandbox cannot make a user namespace (No space left on device (os error 28)): all user namespaces this machine allows are in use, or they are nested too deeply"
        );
        assert_eq!((hint.as_str(), kind), ("raise the limit: `sudo sysctl -w user.max_user_namespaces=65536`", 1));
        assert!(explain(Step::Mount, libc::EPERM).0.contains("no setting that is known to refuse it was found"));
        assert!(explain(Step::Mount, libc::EIO).0.ends_with("no known cause was found"));

        machine.write("etc/subuid", "");
        let (message, hint, _) = explain(Step::IdMap, libc::EPERM);
        assert!(message.ends_with("`ann` has no range of 65536 subordinate ids in `/etc/subuid`"), "{message}");
        assert_eq!(hint, "sudo usermod --add-subuids 165536-231071 ann");

        machine.write("proc/sys/user/max_user_namespaces", "0");
        let (message, hint, _) = explain(Step::UserNamespace, libc::ENOSPC);
        assert!(message.ends_with("user.max_user_namespaces is 0"), "{message}");
        assert!(hint.starts_with("sudo sysctl -w user.max_user_namespaces=65536"), "{hint}");

        machine.write("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1");
        for step in [Step::Mount, Step::MountProc, Step::MountOverlay, Step::UserNamespace] {
            let (message, hint, _) = explain(step, libc::EACCES);
            assert!(message.contains("AppArmor") && hint.contains("apparmor_parser"), "{message} {hint}");
        }
    }

    #[test]
    fn the_whole_probe_has_each_row_once_and_well_ones_have_no_fix() {
        let machine = Machine::new();
        let checks = probe(&machine.env);
        let names: std::collections::BTreeSet<_> = checks.iter().map(|check| check.name).collect();
        assert_eq!(names.len(), checks.len());
        for check in &checks {
            assert_eq!(check.fix.is_none(), check.state == State::Ok, "{check:?}");
        }
    }
}
