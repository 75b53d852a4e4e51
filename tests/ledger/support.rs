//! What the tests of the ledger share: ledgers in a folder of their own, decisions that count, Git as a witness, and
//! processes of the tests that may be killed.

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use pipeline::cmd::Cmd;
use pipeline::release::ledger::{Appended, Author, Change, Ledger, Oid};

/// Tells a process of the tests what to do: [`child`].
pub const CHILD: &str = "PIPELINE_LEDGER_CHILD";

/// A folder with ledgers in it.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The ledger of this name, made when it is not there.
    pub fn ledger(&self, name: &str) -> Ledger {
        open(&self.path(name))
    }
}

/// The ledger at `path`, with the last tips seen beside it.
pub fn open(path: &Path) -> Ledger {
    Ledger::open(&path.join("ledger.git"), &path.join("seen.json")).unwrap()
}

pub fn author(name: &str, second: i64) -> Author {
    let time = jiff::Timestamp::from_second(1_800_000_000 + second).unwrap();
    Author { name: name.into(), email: format!("{name}@example.org"), time }
}

/// A decision on one state: one more than what the state counts now, as read at `tip`.
pub fn count(ledger: &Ledger, tip: Option<Oid>, path: &str, who: &str) -> Change {
    let before = tip.and_then(|tip| ledger.at(tip).unwrap().read(path).unwrap());
    let before: Option<serde_json::Value> = before.map(|bytes| serde_json::from_slice(&bytes).unwrap());
    let number = before.map_or(0, |state| state["number"].as_i64().unwrap()) + 1;
    let previous = tip.and_then(|tip| ledger.made_at(tip, path).unwrap()).map(|id| id.to_string());
    let state = serde_json::json!({ "format": 1, "number": number, "previous": previous });
    let message = format!("{path}: {number} by {who}\n\nA reason.\n\nDecision: promote\nActor: {who}\nNumber: {number}\n");
    Change { writes: vec![(path.into(), Some(pretty(&state)))], message }
}

pub fn pretty(value: &serde_json::Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).unwrap();
    bytes.push(b'\n');
    bytes
}

/// Counts once more, whoever else does.
pub fn count_on(ledger: &Ledger, path: &str, who: &str) -> Oid {
    loop {
        let tip = ledger.tip().unwrap();
        match ledger.append(tip, &count(ledger, tip, path, who), &author(who, 0), None).unwrap() {
            Appended::Done(id) => return id,
            Appended::Lost(_) => {}
        }
    }
}

/// What the state counts at the tip.
pub fn counted(ledger: &Ledger, path: &str) -> i64 {
    let Some(bytes) = ledger.snapshot().unwrap().read(path).unwrap() else { return 0 };
    serde_json::from_slice::<serde_json::Value>(&bytes).unwrap()["number"].as_i64().unwrap()
}

/// A program with nothing of the caller's settings for Git.
pub fn plain(program: &str) -> Cmd {
    let mut cmd = Cmd::new(program).env("GIT_CONFIG_NOSYSTEM", "1").env("GIT_CONFIG_GLOBAL", "/dev/null");
    for name in ["GIT_DIR", "GIT_WORK_TREE", "SSH_AUTH_SOCK"] {
        cmd = cmd.env_remove(name);
    }
    cmd
}

pub fn run(cmd: Cmd) -> Output {
    cmd.output().unwrap()
}

/// What Git says of the repository `dir`; it must succeed.
pub fn git(dir: &Path, arguments: &[&str]) -> String {
    git_with(dir, arguments, "")
}

pub fn git_with(dir: &Path, arguments: &[&str], input: &str) -> String {
    let identity = [("NAME", "mallory"), ("EMAIL", "m@example.org"), ("DATE", "1800000000 +0000")];
    let mut cmd = plain("git").arg("-C").arg(dir).args(arguments).input(input);
    for (key, value) in identity {
        cmd = cmd.env(format!("GIT_AUTHOR_{key}"), value).env(format!("GIT_COMMITTER_{key}"), value);
    }
    let output = run(cmd);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "git {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// All problems the ledger's own check finds.
pub fn findings(ledger: &Ledger) -> Vec<String> {
    let verified = ledger.verify(&mut |_, _, _| Ok(Vec::new())).unwrap();
    verified.findings.into_iter().map(|finding| finding.problem).collect()
}

/// The ledger and Git find nothing wrong, and both see as many decisions. `dangling`: whether Git may know commits that
/// nothing leads to, which a kill leaves.
pub fn assert_sound(ledger: &Ledger, dangling: bool, after: &str) {
    assert_eq!(findings(ledger), [""; 0], "{after}");
    let fsck = git(ledger.dir(), &["fsck", "--strict", "--full", "--no-progress"]);
    let complaints: Vec<&str> = fsck.lines().filter(|line| !dangling || !line.starts_with("dangling ")).collect();
    assert!(complaints.is_empty() || complaints.iter().all(|line| line.starts_with("notice: ")), "{after}: {fsck}");
    if ledger.tip().unwrap().is_some() {
        let lines = git(ledger.dir(), &["log", "--format=%H %an %ae %at %s", "main"]);
        let ours: String = ledger
            .log()
            .unwrap()
            .map(|commit| {
                let commit = commit.unwrap();
                let author = &commit.author;
                format!("{} {} {} {} {}\n", commit.id, author.name, author.email, commit.time.as_second(), commit.subject)
            })
            .collect();
        assert_eq!(lines, ours, "{after}");
    }
}

/// What is left of unfinished writes in and beside a ledger.
pub fn leftovers(ledger: &Ledger) -> Vec<String> {
    let (dir, mut left) = (ledger.dir(), Vec::new());
    let mut look = |folder: PathBuf, fine: &dyn Fn(&str) -> bool| {
        for entry in fs_err::read_dir(&folder).unwrap() {
            let name = entry.unwrap().file_name().to_string_lossy().into_owned();
            if !fine(&name) {
                left.push(format!("{}/{name}", folder.display()));
            }
        }
    };
    look(dir.join("pipeline"), &|name| name == "made.json");
    look(dir.join("refs/heads"), &|name| name == "main");
    look(dir.join("objects/pack"), &|name| name.starts_with("pack-"));
    look(dir.parent().unwrap().into(), &|name| ["ledger.git", "ledger.git.lock", "seen.json"].contains(&name));
    left
}

/// Another process of this test binary, which does `job` with `arguments` and nothing else.
pub fn child(job: &str, arguments: &[&Path]) -> Cmd {
    let job = std::iter::once(job.to_owned()).chain(arguments.iter().map(|path| path.to_str().unwrap().to_owned()));
    let job: Vec<String> = job.collect();
    Cmd::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_other_process", "--nocapture", "--test-threads=1"])
        .env(CHILD, serde_json::to_string(&job).unwrap())
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
}

/// The job this process was started for.
pub fn job() -> Option<Vec<String>> {
    std::env::var(CHILD).ok().map(|text| serde_json::from_str(&text).unwrap())
}

/// Waits for a child; returns whether SIGKILL ended it, and what it said. Another failure fails the test.
pub fn killed(cmd: Cmd) -> (bool, String) {
    let output = run(cmd);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let killed = output.status.signal() == Some(9);
    assert!(killed || output.status.success(), "{}: {text}", output.status);
    (killed, text)
}

/// The number a child said it passed.
pub fn points_in(text: &str) -> i64 {
    text.split("points: ").nth(1).and_then(|rest| rest.lines().next()).unwrap().parse().unwrap()
}
