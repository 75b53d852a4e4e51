//! Does for a moment what a build does, step by step, and explains the first refusal.

use std::ffi::OsStr;

use super::{Check, ProbeEnv, State, Step, explain_refusal};
use crate::cmd::{self, Cmd};

/// One trial: `unshare` with these options, running this shell script with `$1` as a folder and
/// `$2` as the overlay's options.
struct Trial {
    name: &'static str,
    step: Step,
    options: &'static [&'static str],
    script: &'static str,
}

const NAMESPACE: Trial = Trial { name: "trial: user namespace", step: Step::UserNamespace, options: &[], script: "true" };

const MOUNTS: [Trial; 3] = [
    Trial { name: "trial: mount", step: Step::Mount, options: &["--mount"], script: "mount -t tmpfs probe \"$1\"" },
    Trial {
        name: "trial: proc",
        step: Step::MountProc,
        options: &["--mount", "--pid", "--fork"],
        script: "mount -t proc proc \"$1\"",
    },
    Trial {
        name: "trial: overlay",
        step: Step::MountOverlay,
        options: &["--mount"],
        // Deleting a folder that exists below and making it anew is what fails without `userxattr`.
        script: "cd \"$1\" && mkdir lower upper work merged lower/dir && mount -t overlay probe -o lowerdir=lower,upperdir=upper,workdir=work\"$2\" merged && rmdir merged/dir && mkdir merged/dir",
    },
];

/// The full map of ids, by `newuidmap`; `--map-auto` came with util-linux 2.38 (Debian 12).
const MAP: Trial = Trial { name: "trial: id map", step: Step::IdMap, options: &["--map-auto"], script: "true" };

/// How a user namespace is entered.
const ENTER: [&str; 2] = ["--user", "--map-root-user"];

/// Tries each step in processes of their own; their mounts end with them. Stops at the first
/// refusal, since what comes after stands on it. Root that may mount needs no user namespace.
pub fn real_unshare_probe(env: &ProbeEnv) -> Vec<Check> {
    let mut checks = Vec::new();
    let Some(unshare) = cmd::find("unshare", &env.path) else {
        let fix = super::install(&["util-linux"]);
        return vec![Check::bad(NAMESPACE.name, State::Warning, "`unshare` is not installed, so nothing was tried", fix)];
    };
    let privileged = env.is_root() && env.has_sys_admin();
    let namespace = (!privileged).then_some(&NAMESPACE);
    let map = (!env.is_root()).then_some(&MAP);
    for trial in namespace.into_iter().chain(&MOUNTS).chain(map) {
        let check = attempt(env, unshare.as_os_str(), trial, privileged);
        let blocks = check.blocks();
        checks.push(check);
        if blocks {
            break;
        }
    }
    checks
}

fn attempt(env: &ProbeEnv, unshare: &OsStr, trial: &Trial, privileged: bool) -> Check {
    let place = env.root_dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(&env.top);
    let folder = match tempfile::Builder::new().prefix(".pipeline-probe-").tempdir_in(place) {
        Ok(folder) => folder,
        Err(error) => {
            let detail = format!("nothing can be written to `{}`: {}", place.display(), error.kind());
            return Check::bad(trial.name, State::Warning, detail, "choose another place with `--root DIR`");
        }
    };
    let (enter, overlay): (&[&str], &str) = if privileged { (&[], "") } else { (&ENTER, ",userxattr") };
    // `LC_ALL`: the words of the failure are read below.
    let command = Cmd::new(unshare).env("LC_ALL", "C").args(enter).args(trial.options);
    let output = command.args(["--", "sh", "-c", trial.script, "probe"]).arg(folder.path()).arg(overlay).output();
    clean(unshare, folder, enter);
    match output {
        Ok(output) if output.status.success() => Check::ok(trial.name, "works"),
        Ok(output) => refusal(env, trial, &String::from_utf8_lossy(&output.stderr)),
        Err(error) => Check::bad(trial.name, State::Warning, error.to_string(), "check the installation of util-linux"),
    }
}

/// An overlay leaves a folder of mode 000 that only its maker's namespace may open.
fn clean(unshare: &OsStr, folder: tempfile::TempDir, enter: &[&str]) {
    let path = folder.keep();
    let removed = Cmd::new(unshare).args(enter).args(["--", "rm", "-rf", "--"]).arg(&path).run();
    if removed.is_err() {
        // Without a namespace there was no overlay either.
        let _ = fs_err::remove_dir_all(&path);
    }
}

fn refusal(env: &ProbeEnv, trial: &Trial, stderr: &str) -> Check {
    let last = stderr.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it failed without a word");
    if last.contains("unrecognized option") {
        return Check::bad(
            trial.name,
            State::Warning,
            "this `unshare` is too old to try it",
            "use util-linux 2.38 or newer (Debian 12)",
        );
    }
    let problem = explain_refusal(trial.step, errno(stderr), env);
    Check::bad(trial.name, State::Refused, format!("{} [{last}]", problem.message), problem.hints.join("; "))
}

/// The error number behind the words of util-linux.
fn errno(stderr: &str) -> i32 {
    let known = [
        ("Operation not permitted", libc::EPERM),
        ("Permission denied", libc::EACCES),
        ("No space left on device", libc::ENOSPC),
        ("Invalid argument", libc::EINVAL),
        // What mount(8) makes of EINVAL.
        ("wrong fs type", libc::EINVAL),
        ("Function not implemented", libc::ENOSYS),
        ("unknown filesystem type", libc::ENODEV),
        ("No such device", libc::ENODEV),
        ("Too many users", libc::EUSERS),
    ];
    // newuidmap and `no line matching user` say it in words of their own: all of them are refusals.
    known.iter().find(|(words, _)| stderr.contains(words)).map_or(libc::EPERM, |(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::*;

    /// An `unshare` that answers by its options.
    fn machine(script: &str) -> Machine {
        let machine = Machine::new();
        machine.program("unshare", 0o755, script).program("newuidmap", 0o4755, "").program("newgidmap", 0o4755, "");
        machine
    }

    fn names(checks: &[Check]) -> Vec<(&'static str, State)> {
        checks.iter().map(|check| (check.name, check.state)).collect()
    }

    #[test]
    fn what_works_is_said_for_each_step() {
        let all = ["trial: user namespace", "trial: mount", "trial: proc", "trial: overlay", "trial: id map"];
        let mut machine = machine("exit 0");
        assert_eq!(names(&real_unshare_probe(&machine.env)), all.map(|name| (name, State::Ok)));
        // Root in a container has a namespace of its own and needs no help with the ids.
        machine.env.uid = 0;
        assert_eq!(names(&real_unshare_probe(&machine.env)), all[..4].iter().map(|name| (*name, State::Ok)).collect::<Vec<_>>());
        machine.write("proc/self/status", "CapEff:\t000001ffffffffff\n");
        assert_eq!(names(&real_unshare_probe(&machine.env)), all[1..4].iter().map(|name| (*name, State::Ok)).collect::<Vec<_>>());
    }

    #[test]
    fn the_first_refusal_is_explained_and_ends_it() {
        let machine =
            machine("case \"$*\" in *proc*) echo \"mount: /x: permission denied: Operation not permitted.\" >&2; exit 32;; esac");
        machine.write("run/.containerenv", "").write("proc/self/mountinfo", "2 1 0:2 /null /proc/keys rw - tmpfs tmpfs rw\n");
        let checks = real_unshare_probe(&machine.env);
        let expected = [("trial: user namespace", State::Ok), ("trial: mount", State::Ok), ("trial: proc", State::Refused)];
        assert_eq!(names(&checks), expected);
        assert_eq!(
            checks[2].detail,
            "the sandbox cannot mount `/proc` in its namespace (Operation not permitted (os error 1)): in a podman container: parts of `/proc` are covered, so a new one cannot be mounted [mount: /x: permission denied: Operation not permitted.]"
        );
        assert_eq!(checks[2].fix.as_deref(), Some("start the container with `podman run --security-opt unmask=ALL …`"));
    }

    #[test]
    fn an_old_unshare_is_no_refusal() {
        let machine = machine("case \"$*\" in *map-auto*) echo \"unshare: unrecognized option '--map-auto'\" >&2; exit 1;; esac");
        assert_eq!(names(&real_unshare_probe(&machine.env)).last(), Some(&("trial: id map", State::Warning)));
    }

    #[test]
    fn words_and_numbers() {
        for (words, number) in [
            ("unshare: unshare failed: Operation not permitted", libc::EPERM),
            ("unshare: unshare failed: No space left on device", libc::ENOSPC),
            ("unshare: write failed /proc/self/uid_map: Permission denied", libc::EACCES),
            ("mount: /x: wrong fs type, bad option, bad superblock on probe", libc::EINVAL),
            ("unshare: no line matching user \"x\" in /etc/subuid: Success", libc::EPERM),
        ] {
            assert_eq!(errno(words), number, "{words}");
        }
    }

    /// On the real machine: no folder, mount or process is left, whatever the answer is.
    #[test]
    fn nothing_is_left_behind() {
        let mut machine = Machine::new();
        machine.env.path = "/usr/bin:/bin".into();
        machine.env.root_dir = machine.dir.path().join("store");
        fs_err::create_dir(&machine.env.root_dir).unwrap();
        assert!(!real_unshare_probe(&machine.env).is_empty());
        assert_eq!(fs_err::read_dir(&machine.env.root_dir).unwrap().count(), 0);
        let mounts = fs_err::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(&machine.dir.path().display().to_string()));
    }
}
