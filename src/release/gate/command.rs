//! The gate `command`: a program says yes with status 0, no with 1, and nothing that counts with anything else.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::{Ended, Verdict, allow, deny, one_line, unknown};
use crate::cmd::Cmd;
use crate::config::types::{Command, Script};
use crate::release::decision::Answer;

/// Bytes of each output that are kept, the last ones; what a program says beyond is read and thrown away.
const OUTPUT_MAX: usize = 64 * 1024;
/// Pauses between two looks at a program that runs.
const PAUSES: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(50)];
/// Variables a program is not shown: passwords and keys of ours, which are none of its business, and whose value would be in the
/// ledger when it prints one.
pub const OURS: [&str; 7] = [
    "COSIGN_PASSWORD",
    "PIPELINE_KEY",
    "PIPELINE_LEDGER",
    "PIPELINE_REGISTRY",
    "PIPELINE_REGISTRY_PASSWORD",
    "PIPELINE_REGISTRY_USER",
    "PIPELINE_SIGNING_KEY",
];
/// Times a program that is busy is tried again: the other thread needs a moment only.
const BUSY_ATTEMPTS: u32 = 20;
/// What is said of a program that is not in the policy, although it lies beside the pipeline file.
const NOT_KEPT: &str = "run from the folder of who asks: `pipeline environment apply` puts the program into the ledger";
/// How long the pipes of a program that ended may stay open: a child of its own that left its group holds them.
const PIPES_WAIT: Duration = Duration::from_millis(500);

/// The answer in how a program ended: the last line it wrote to standard output is the reason.
pub(super) fn judge(ended: Result<Ended>, command: &Command) -> Answer {
    let answer = judged(ended, command);
    if command.script.is_some() || !command.names_a_file() {
        return answer;
    }
    // Said first: a reason is cut where it gets long.
    Answer { reason: format!("({NOT_KEPT}) {}", answer.reason), ..answer }
}

fn judged(ended: Result<Ended>, command: &Command) -> Answer {
    let name = one_line(&shown(command));
    match ended {
        Err(error) => unknown(&error),
        Ok(Ended::Timeout) => Answer::new("", Verdict::Unknown, format!("`{name}` did not end within {}", command.timeout)),
        Ok(Ended::Signal(signal)) => Answer::new("", Verdict::Unknown, format!("`{name}` ended with signal {signal}")),
        Ok(Ended::Status(status, stdout, stderr)) => {
            let last = |text: &str| text.lines().map(one_line).rfind(|line| !line.is_empty());
            let said = last(&stdout);
            match status {
                0 => allow(said.unwrap_or_else(|| format!("`{name}` says yes"))),
                1 => deny(said.unwrap_or_else(|| format!("`{name}` says no"))),
                other => {
                    let words = last(&stderr).or(said).map(|words| format!(": {words}")).unwrap_or_default();
                    Answer::new("", Verdict::Unknown, format!("`{name}` ended with status {other}{words}"))
                }
            }
        }
    }
}

/// The command as a person wrote it.
fn shown(command: &Command) -> String {
    match command.run.as_slice() {
        [shell, flag, text] if shell == "sh" && flag == "-c" => text.clone(),
        words => words.join(" "),
    }
}

/// Runs `command` with `variables` beside this program's own, without [`OURS`]. A program of the policy and one found in
/// `PATH` start in an empty folder, so that no file of whoever asks counts; one with an absolute path, and one of a policy from before
/// programs were in it, in `dir`. It dies with us; when it ends or its time is over, it and its process group are killed. What left the
/// group by itself (setsid) lives on.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &Command, variables: &BTreeMap<String, String>, dir: &Path) -> Result<Ended> {
    let (program, arguments) = command.run.split_first().context("the command of the gate is empty")?;
    let folder = tempfile::Builder::new().prefix("pipeline-gate-").tempdir().context("cannot make a folder for the program")?;
    let empty = folder.path().join("empty");
    fs_err::create_dir(&empty)?;
    let (program, dir) = match &command.script {
        Some(script) => (place(script, folder.path())?.into_os_string(), empty.as_path()),
        None if program.contains('/') => (program.into(), dir),
        None => (program.into(), empty.as_path()),
    };
    let end = Instant::now() + command.timeout.duration();
    let mut attempts = 0;
    let mut child = loop {
        let mut cmd = Cmd::new(&program).args(arguments).dir(dir).own_group().stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in OURS {
            cmd = cmd.env_remove(name);
        }
        for (name, value) in variables {
            cmd = cmd.env(name, value);
        }
        match cmd.spawn() {
            Err(error) if attempts < BUSY_ATTEMPTS && is_busy(&error) => std::thread::sleep(PAUSES[1]),
            spawned => break spawned?,
        }
        attempts += 1;
    };
    let stdout = child.stdout.take().map(drain);
    let stderr = child.stderr.take().map(drain);
    let pid = Pid::from_child(&child);
    let in_time = wait_until(pid, end);
    // The group is still that of this program: it is not reaped before the next line.
    let _ = kill_process_group(pid, Signal::KILL);
    let status = child.wait().with_context(|| format!("cannot wait for `{}`", shown(command)))?;
    if !in_time {
        return Ok(Ended::Timeout);
    }
    let text = |pipe: Option<Receiver<Vec<u8>>>| {
        let bytes = pipe.and_then(|pipe| pipe.recv_timeout(PIPES_WAIT).ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => Ended::Status(code, stdout, stderr),
        (None, signal) => Ended::Signal(signal.unwrap_or_default()),
    })
}

/// Writes a program of the policy where only this user can change it.
fn place(script: &Script, folder: &Path) -> Result<PathBuf> {
    // Nothing of a name that came with the ledger leads elsewhere.
    let name = Path::new(&script.file).file_name().context("the program of the gate has no name")?;
    let path = folder.join("program").join(name);
    fs_err::create_dir(folder.join("program"))?;
    fs_err::write(&path, &script.text)?;
    fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o700))?;
    Ok(path)
}

/// A child that another thread is just starting still has the program open for writing.
fn is_busy(error: &anyhow::Error) -> bool {
    let is_busy = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ExecutableFileBusy;
    error.chain().any(|cause| cause.downcast_ref().is_some_and(is_busy))
}

/// Whether the process ended before `end`; it is left to be reaped.
fn wait_until(pid: Pid, end: Instant) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    let mut pause = PAUSES[0];
    loop {
        match waitid(WaitId::Pid(pid), options) {
            Ok(None) => {}
            Ok(Some(_)) | Err(_) => return true,
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        std::thread::sleep(pause.min(left));
        pause = (pause * 2).min(PAUSES[1]);
    }
}

/// Reads a pipe to its end in a thread of its own, and keeps the last bytes.
fn drain(mut pipe: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut kept: Vec<u8> = Vec::new();
        let mut buffer = [0; 8192];
        while let Ok(read @ 1..) = pipe.read(&mut buffer) {
            kept.extend_from_slice(&buffer[..read]);
            if kept.len() > 2 * OUTPUT_MAX {
                kept.drain(..kept.len() - OUTPUT_MAX);
            }
        }
        // Nobody listens any more when the time is over.
        let _ = sender.send(kept);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::types::Seconds;

    fn asked(script: &str, seconds: u64) -> (Result<Ended>, Command) {
        let run = ["sh", "-c", script].map(str::to_owned).to_vec();
        let command = Command { run, timeout: Seconds(seconds), script: None };
        let variables = BTreeMap::from([("PIPELINE_RELEASE".to_owned(), "sha256:0".to_owned())]);
        (run_in_tmp(&command, &variables), command)
    }

    fn run_in_tmp(command: &Command, variables: &BTreeMap<String, String>) -> Result<Ended> {
        run(command, variables, &std::env::temp_dir())
    }

    #[test]
    fn programs_answer() {
        let cases = [
            ("allow", "echo looking; echo \"fine: $PIPELINE_RELEASE\"", 30, "allow fine: sha256:0"),
            ("allow without a word", "true", 30, "allow `true` says yes"),
            ("deny", "echo no good; exit 1", 30, "deny no good"),
            (
                "unknown",
                "echo yes; echo usage >&2; exit 64",
                30,
                "unknown `echo yes; echo usage >&2; exit 64` ended with status 64: usage",
            ),
            ("hang", "sleep 600", 1, "unknown `sleep 600` did not end within 1s"),
            (
                "hang that ignores signals",
                "trap '' TERM INT HUP; while :; do sleep 600; done",
                1,
                "unknown `trap '' TERM INT HUP; while :; do sleep 600; done` did not end within 1s",
            ),
            ("crash", "kill -SEGV $$", 30, "unknown `kill -SEGV $$` ended with signal 11"),
            ("malformed", "printf '\\377\\033[1mbold\\007\\n\\n'", 30, "allow \u{fffd} [1mbold"),
            ("a lot to say", "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo enough", 30, "allow enough"),
            ("nothing to read", "cat; echo read", 30, "allow read"),
        ];
        for (what, script, seconds, expected) in cases {
            let (ended, command) = asked(script, seconds);
            let answer = judge(ended, &command);
            assert_eq!(format!("{} {}", answer.verdict, answer.reason), expected, "{what}");
        }
        let command = Command { run: vec!["no-such-program".into()], timeout: Seconds(5), script: None };
        let answer = judge(run_in_tmp(&command, &BTreeMap::new()), &command);
        assert_eq!(format!("{} {}", answer.verdict, answer.reason), "unknown `no-such-program` is not installed");
    }

    #[test]
    fn where_programs_are_and_what_they_see() {
        let mine = tempfile::tempdir().unwrap();
        fs_err::write(mine.path().join("ready.sh"), "#!/bin/sh\necho mine\n").unwrap();
        fs_err::set_permissions(mine.path().join("ready.sh"), std::fs::Permissions::from_mode(0o700)).unwrap();
        let text = "#!/bin/sh\nls -A; echo \"$2 ${0##*/} $(stat -c %a \"$0\")\"; exit 1\n".to_owned();
        let script = |file: &str| Some(Script { file: file.into(), text: text.clone() });
        let absolute = mine.path().join("ready.sh");
        let here = mine.path().file_name().unwrap().to_string_lossy().into_owned();
        let cases = [
            ("in the policy", vec!["./ready.sh", "a", "b"], script("ready.sh"), "deny b ready.sh 700".to_owned()),
            (
                "a name that leads elsewhere",
                vec!["./ready.sh", "a", "c"],
                script("../../x/ready.sh"),
                "deny c ready.sh 700".into(),
            ),
            ("of an old policy", vec!["./ready.sh"], None, format!("allow ({NOT_KEPT}) mine")),
            ("absolute", vec![absolute.to_str().unwrap()], None, "allow mine".into()),
            ("absolute, in the folder of who asks", vec!["/bin/sh", "-c", "echo ${PWD##*/}"], None, format!("allow {here}")),
            ("from PATH", vec!["sh", "-c", "./ready.sh || exit 1"], None, "deny `./ready.sh || exit 1` says no".into()),
        ];
        for (what, run, script, expected) in cases {
            let run = run.into_iter().map(str::to_owned).collect();
            let command = Command { run, timeout: Seconds(30), script };
            let answer = judge(super::run(&command, &BTreeMap::new(), mine.path()), &command);
            assert_eq!(format!("{} {}", answer.verdict, answer.reason), expected, "{what}");
        }
    }

    #[test]
    fn what_a_program_started_ends_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pid");
        // The child holds the pipes; the answer comes all the same, and the child is gone.
        for (script, expected) in [("exit 0", "allow done"), ("sleep 600", "unknown")] {
            let script = format!("sleep 600 & echo $! > {}; echo done; {script}", file.display());
            let (ended, command) = asked(&script, 2);
            let answer = judge(ended, &command);
            assert!(format!("{} {}", answer.verdict, answer.reason).starts_with(expected), "{answer:?}");
            let pid: i32 = fs_err::read_to_string(&file).unwrap().trim().parse().unwrap();
            let gone = || match fs_err::read_to_string(format!("/proc/{pid}/stat")) {
                Err(_) => true,
                Ok(stat) => stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')),
            };
            let end = Instant::now() + Duration::from_secs(20);
            while !gone() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(gone(), "{script}");
        }
    }
}
