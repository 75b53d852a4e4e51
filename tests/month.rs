//! A month of a team: 200 releases of two pipelines, and all that people do with them; every tenth process is killed, and
//! every other day eight decide at one time. Afterwards the ledger is sound, Git finds nothing wrong, and everything is as
//! `month/model.py` says, which knows the team's rules and reads only the commits. Then each gate is broken once: it says
//! yes to everything, a release comes through that must not, and the model has to notice.
//!
//! The clock of the processes is libfaketime's. The seed of what happens is printed; `PIPELINE_MONTH_SEED` gives it again.
#![allow(clippy::print_stdout, reason = "what was met is worth reading")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use common::{Answer, Project, Run, binary, me, repository, tool};

/// Tuesday, 2026-12-01, midnight.
const START: i64 = 1_796_083_200;
const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;
const DAYS: i64 = 30;
/// The hours in which something happens.
const HOURS: [i64; 6] = [1, 8, 10, 12, 15, 21];
/// Roles as `month/model.py` has them; `mallory` is nobody.
const PEOPLE: [(&str, &str); 6] = [
    ("ann", "admin, promote, approve, override"),
    ("ben", "promote, approve"),
    ("cho", "promote, approve"),
    ("dan", "approve"),
    ("eve", "promote"),
    ("ci", "promote"),
];
const NOBODY: &str = "mallory";
const ENVIRONMENTS: [&str; 6] = ["dev", "stage", "prod", "lab", "canary", "edge"];
/// Every kind of gate, each with what a release has that it must refuse; none: something else is wrong with the promotion.
const GATES: [(&str, &str); 12] = [
    ("signed", "unsigned"),
    ("sbom", "leftpad"),
    ("report", "failed"),
    ("soak", ""),
    ("approve", ""),
    ("window", ""),
    ("provenance", "dirty"),
    ("budget", "heavy"),
    ("command", "closed"),
    ("http", "down"),
    ("healthy", ""),
    ("vm-test", ""),
];
const TRAITS: [&str; 10] = ["unsigned", "foreign", "leftpad", "noreport", "failed", "dirty", "heavy", "closed", "crash", "down"];
/// A process in this many is killed, at one of its first points.
const KILLED: u64 = 10;
const POINTS: u64 = 60;
const RACERS: usize = 8;
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    fn of<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[usize::try_from(self.below(list.len() as u64)).unwrap()]
    }
}

/// People with keys, pipelines with one ledger, and what the gates look at.
struct Team {
    project: Project,
    keys: PathBuf,
    pipelines: Vec<&'static str>,
    /// Status line of the release's version.
    url: String,
    /// The gate that says yes to everything.
    broken: Option<&'static str>,
    /// Releases of each pipeline, oldest first.
    releases: Mutex<BTreeMap<&'static str, Vec<String>>>,
    counts: Mutex<BTreeMap<String, u32>>,
}

impl Team {
    fn new(pipelines: &[&'static str], broken: Option<&'static str>) -> Self {
        tool("ssh-keygen", "openssh-client");
        tool("python3", "python3");
        assert!(Path::new(FAKETIME).exists(), "`{FAKETIME}` is missing: apt-get install libfaketime");
        let project = Project::empty(me());
        let keys = project.beside("keys");
        for (name, _) in PEOPLE.iter().copied().chain([(NOBODY, "")]) {
            let file = keys.join(name);
            project.program("ssh-keygen").args(&["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"]).arg(&file).ok();
        }
        for name in ["team", "foreign"] {
            project.pipeline(&["keys", "generate", name, "--output"]).arg(&keys).ok();
        }
        let url = server();
        let team = Self {
            project,
            keys,
            pipelines: pipelines.to_vec(),
            url,
            broken,
            releases: Mutex::default(),
            counts: Mutex::default(),
        };
        for pipeline in pipelines {
            team.project.write_tiny(&format!("{pipeline}/"));
            team.project.edit(&format!("{pipeline}/pipeline.yaml"), "name: tiny", &format!("name: {pipeline}"));
            team.write_policy(pipeline, 1);
            let dir = team.project.path(pipeline);
            team.project.git_in(&dir, &["init", "--quiet"]);
            team.commit(pipeline, "the beginning");
        }
        let all: String = PEOPLE.iter().map(|(name, _)| format!("{name} {}\n", team.public(name))).collect();
        fs_err::write(team.keys.join("allowed"), all).unwrap();
        team
    }

    fn public(&self, name: &str) -> String {
        fs_err::read_to_string(self.keys.join(format!("{name}.pub"))).unwrap().trim().into()
    }

    fn commit(&self, pipeline: &str, message: &str) {
        let dir = self.project.path(pipeline);
        self.project.git_in(&dir, &["add", "--all"]);
        self.project.git_in(&dir, &["commit", "--quiet", "--allow-empty", "--message", message]);
    }

    /// A pipeline file with the team's rules; 2 is the easier one.
    fn write_policy(&self, pipeline: &str, number: u32) {
        let image = self.project.read(&format!("{pipeline}/pipeline.yaml"));
        let people: String = PEOPLE
            .iter()
            .map(|(name, roles)| format!("  {name}: {{ key: \"{}\", roles: [{roles}] }}\n", self.public(name)))
            .collect();
        let (soak, count, region) = if number == 1 { ("6h", 2, "north") } else { ("4h", 1, "south") };
        let command = "case $PIPELINE_VERSION in *-closed) echo closed; exit 1;; *-crash) kill -9 $$;; esac";
        let checks: BTreeMap<&str, String> = BTreeMap::from([
            ("signed", "signed: { keys: [../../keys/team.pub] }".into()),
            ("sbom", "sbom: { deny: { packages: [\"npm:left-pad\"] } }".into()),
            ("report", "report: { name: e2e }".into()),
            ("soak", format!("soak: {soak}")),
            ("approve", format!("approve: {count}")),
            ("window", "window: { allow: \"FREQ=WEEKLY;BYDAY=MO,TU,WE,TH,FR;BYHOUR=9\", duration: 8h }".into()),
            ("provenance", "provenance: { clean: true, unsigned: true }".into()),
            ("budget", "budget: { size: 200K }".into()),
            ("command", format!("command: {{ run: \"{command}\" }}")),
            ("http", format!("http: {{ url: \"{}\" }}", self.url)),
            ("healthy", "healthy: true".into()),
            ("vm-test", "vm-test: smoke.yaml".into()),
        ]);
        let gates = |names: &[&str]| -> String {
            names
                .iter()
                .map(|name| {
                    let check = match self.broken {
                        // Without such a gate nobody can approve.
                        Some("approve") if *name == "approve" => "approve: 1",
                        Some(broken) if broken == *name => "command: { run: [\"true\"] }",
                        _ => &checks[name],
                    };
                    format!("    - name: {name}\n      {check}\n")
                })
                .collect()
        };
        let environments = format!(
            "environments:\n  dev: {{ automatic: true }}\n  stage:\n    from: dev\n    automatic: true\n    gates:\n{}  prod:\n    from: stage\n    config: {{ REGION: {region} }}\n    gates:\n{}  lab:\n    from: dev\n    gates:\n{}  canary: {{ from: stage, target: {{ local: {{}} }} }}\n  edge:\n    from: canary\n    gates:\n{}",
            gates(&["signed", "sbom", "report"]),
            gates(&["soak", "approve", "window", "provenance", "budget", "command", "http"]),
            gates(&["vm-test"]),
            gates(&["healthy"]),
        );
        // What is built says nothing of them: only the ledger counts. A vm-test may be asked for where there is a host.
        self.project.write(&format!("{pipeline}/policy.yaml"), format!("{image}host: {{}}\npeople:\n{people}{environments}"));
        self.project.write(&format!("{pipeline}/smoke.yaml"), "steps:\n- boot\n");
    }

    /// The program in the folder of a pipeline, as `who` would call it at `time`.
    fn verb(&self, who: &str, time: i64, pipeline: &str, args: &[&str]) -> Run {
        let clock = jiff::Timestamp::from_second(time).unwrap().strftime("@%F %T").to_string();
        let run = self.project.program(binary().to_str().unwrap()).dir(self.project.path(pipeline));
        run.arg("--root")
            .arg(&self.project.root)
            .args(args)
            .env("GIT_AUTHOR_NAME", who)
            .env("GIT_AUTHOR_EMAIL", format!("{who}@example.org"))
            .env("PIPELINE_SIGNING_KEY", self.keys.join(who))
            .env("LD_PRELOAD", FAKETIME)
            .env("FAKETIME", clock)
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .env("TZ", "UTC")
    }

    /// Waits for a process that may do anything but fail without a reason.
    fn ended(&self, running: &mut common::Running, what: &str) -> i32 {
        let answer = running.wait(Duration::from_secs(120));
        let code = answer.status.code().unwrap_or(137);
        let told = matches!(code, 0 | 75 | 137)
            || (matches!(code, 1 | 2) && !answer.stdout.is_empty())
            || answer.stderr.contains("error: ");
        let panicked = answer.stderr.contains("panicked") || answer.stderr.contains("this is a bug");
        assert!(told && !panicked && matches!(code, 0 | 1 | 2 | 75 | 137), "{what}: {code}\n{}{}", answer.stdout, answer.stderr);
        *self.counts.lock().unwrap().entry(format!("exit {code}")).or_default() += 1;
        code
    }

    /// Does it; or is killed on the way, and does it again.
    fn does(&self, random: &mut Random, who: &str, time: i64, pipeline: &str, args: &[&str]) -> i32 {
        if random.below(KILLED) == 0 {
            let point = 1 + random.below(POINTS);
            let mut killed = self.verb(who, time, pipeline, args).env("PIPELINE_FAULT", point.to_string()).start();
            let code = self.ended(&mut killed, &format!("{args:?}, killed at {point}"));
            if code != 137 {
                return code;
            }
        }
        self.ended(&mut self.verb(who, time, pipeline, args).start(), &args.join(" "))
    }

    /// Builds a release and attaches the report of its tests; it enters `dev` by itself.
    fn release(&self, random: &mut Random, pipeline: &'static str, kind: &str, who: &str, time: i64) -> String {
        let number = self.releases.lock().unwrap().entry(pipeline).or_default().len() + 1;
        let version = if kind.is_empty() { format!("1.{number}") } else { format!("1.{number}-{kind}") };
        let place = |name: &str| format!("{pipeline}/src/{name}");
        for name in ["noise", "node_modules/left-pad/package.json"] {
            let _ = fs_err::remove_file(self.project.path(&place(name)));
        }
        match kind {
            "heavy" => {
                let noise: Vec<u8> = (0..50_000).flat_map(|_| random.next().to_le_bytes()).collect();
                self.project.write(&place("noise"), noise);
            }
            "leftpad" => {
                let text = "{\"name\": \"left-pad\", \"version\": \"1.3.0\", \"license\": \"WTFPL\"}\n";
                self.project.write(&place("node_modules/left-pad/package.json"), text);
            }
            _ => {}
        }
        self.project.write(&place("index.html"), format!("<h1>{version}</h1>\n"));
        if kind != "dirty" {
            self.commit(pipeline, &version);
        }
        let key = self.keys.join(if kind == "foreign" { "foreign.key" } else { "team.key" });
        let mut args = vec!["build", "--release", "--release-version", &version];
        if kind != "unsigned" {
            args.extend(["--key", key.to_str().unwrap()]);
        }
        self.does(random, who, time, pipeline, &args);
        if kind != "noreport" {
            let result = if kind == "failed" { "fail" } else { "pass" };
            let report = self.keys.join("allowed");
            let name = format!("{pipeline}:{version}");
            let args = ["artifact", "report", &name, report.to_str().unwrap(), "--name", "e2e", "--result", result];
            let mut attached = self.verb(who, time, pipeline, &args).start();
            assert_eq!(self.ended(&mut attached, "a report"), 0);
        }
        self.releases.lock().unwrap().get_mut(pipeline).unwrap().push(version.clone());
        version
    }

    /// Something that somebody of the team could do now.
    fn idea(&self, random: &mut Random, pipeline: &'static str, time: i64) -> Vec<String> {
        let known = self.releases.lock().unwrap().get(pipeline).cloned().unwrap_or_default();
        let newest: Vec<&str> = known.iter().rev().take(8).map(String::as_str).collect();
        let release = if newest.is_empty() { "1.1" } else { random.of(&newest) };
        let environment = random.of(&["dev", "stage", "stage", "prod", "prod", "prod", "canary"]);
        let until = jiff::Timestamp::from_second(time + 3 * HOUR).unwrap().to_string();
        let level = format!("LEVEL={}", random.below(4));
        let words: Vec<&str> = match random.below(22) {
            0 => vec!["hold", environment, "--reason", "not now"],
            1 => vec!["hold", environment, "--lift"],
            2 => vec!["freeze", environment, "--until", &until, "--reason", "a sale"],
            3 => vec!["thaw", environment],
            4 => vec!["freeze", "--all", "prod", "--until", &until, "--reason", "emergency"],
            5 => vec!["thaw", "--all", "prod"],
            6 => vec!["rollback", environment, "--reason", "it fails\n\nDecision: promote\nTo: none"],
            7 => vec!["rollback", environment, "--to", release],
            8 => vec!["rollback", environment, "--override", "freeze", "--reason", "it fails in the sale"],
            9 => vec!["clear", environment, release, "--reason", "it was the disk"],
            10 | 11 => vec!["config", "set", environment, &level, "--reason", &level],
            12 => vec!["config", "set", "prod", &level, "--reason", &level, "--override", "approve", "--override", "window"],
            13 => {
                let gate = random.of(&["soak", "approve", "window", "command", "http", "budget", "provenance", "freeze"]);
                vec!["promote", "--to", "prod", "--release", release, "--override", gate, "--reason", "a fix"]
            }
            14 => vec!["promote", "--to", "canary"],
            15 => vec!["promote", "--to", random.of(&["edge", "lab"])],
            16 => vec!["promote", "--to", "lab", "--release", release, "--override", "vm-test", "--reason", "by hand"],
            17 => vec!["promote", "--to", environment, "--release", release, "--lift"],
            18 => vec!["promote", "--automatic"],
            19 => vec!["approve", "--for", "prod", "--release", release],
            20 => vec!["promote", "--to", "prod", "--release", release],
            _ => vec!["promote", "--to", "dev", "--release", release],
        };
        words.into_iter().map(str::to_owned).collect()
    }

    /// One of the hours of a day.
    fn hour(&self, seed: u64, pipeline: &'static str, day: i64, hour: usize) {
        let salt = pipeline.bytes().fold(7, |sum: u64, byte| sum * 31 + u64::from(byte));
        let mut random = Random(seed ^ salt ^ (u64::try_from(day).unwrap() << 32) ^ ((hour as u64) << 24));
        let random = &mut random;
        let mut time = START + day * DAY + HOURS[hour] * HOUR;
        let everybody: Vec<&str> = PEOPLE.iter().map(|(name, _)| *name).chain([NOBODY]).collect();
        let decide = |random: &mut Random, time: &mut i64, who: &str, args: &[&str]| {
            // Now and then the clock of a machine is behind.
            let behind = if random.chance(3) { 200 } else { 0 };
            *time += i64::try_from(random.below(5)).unwrap();
            self.does(random, who, *time - behind, pipeline, args)
        };
        if hour == 1 {
            for environment in ["dev", "stage", "prod"] {
                decide(random, &mut time, "ann", &["hold", environment, "--lift"]);
                if random.chance(60) {
                    decide(random, &mut time, "ben", &["thaw", environment]);
                }
            }
        }
        if day % 4 == 3 && hour == 1 {
            let known = self.releases.lock().unwrap()[pipeline].clone();
            for version in known.iter().rev().take(6) {
                decide(random, &mut time, "cho", &["clear", "prod", version, "--reason", "it was the disk"]);
            }
        }
        if day == 15 && hour == 1 {
            self.write_policy(pipeline, 2);
            assert_ne!(
                decide(random, &mut time, "ben", &["environment", "apply", "./policy.yaml", "--reason", "policy 2"]),
                0,
                "ben is no admin"
            );
            assert_eq!(decide(random, &mut time, "ann", &["environment", "apply", "./policy.yaml", "--reason", "policy 2"]), 0);
        }
        let builds = matches!(hour, 1 | 3 | 5) || (hour == 0 && day % 3 == 0);
        if builds {
            let kind = if random.chance(30) { random.of(&TRAITS) } else { "" };
            let who = random.of(&["ci", "ci", "ann", "ben"]);
            time += 1;
            self.release(random, pipeline, kind, who, time);
            decide(random, &mut time, "ci", &["promote", "--automatic"]);
        }
        if hour == 2 || hour == 4 {
            let known = self.releases.lock().unwrap()[pipeline].clone();
            let mut good: Vec<&str> = known.iter().rev().map(String::as_str).take(6).collect();
            good.retain(|version| !version.contains('-') || random.chance(40));
            let release = if good.is_empty() { known[0].as_str() } else { random.of(&good) };
            for _ in 0..3 {
                let who = random.of(&everybody);
                decide(random, &mut time, who, &["approve", "--for", "prod", "--release", release]);
            }
            let who = random.of(&everybody);
            decide(random, &mut time, who, &["promote", "--to", "prod", "--release", release]);
        }
        for _ in 0..2 {
            let idea = self.idea(random, pipeline, time);
            let words: Vec<&str> = idea.iter().map(String::as_str).collect();
            let who = random.of(&["ann", "ann", "ann", "ben", "cho", "eve", "dan", NOBODY]);
            decide(random, &mut time, who, &words);
        }
        if hour == 3 && day % 2 == 0 {
            self.race(random, pipeline, time);
        }
        if day % 7 == 6 && hour == 5 {
            // 75: the other pipeline has the store open.
            assert!(matches!(decide(random, &mut time, "ann", &["artifact", "prune", "--keep", "1"]), 0 | 75));
        }
    }

    /// Several processes at one second.
    fn race(&self, random: &mut Random, pipeline: &'static str, time: i64) {
        let mut racers: Vec<_> = (0..RACERS)
            .map(|_| {
                let idea = self.idea(random, pipeline, time);
                let words: Vec<&str> = idea.iter().map(String::as_str).collect();
                let who = random.of(&["ann", "ben", "cho", "eve"]);
                let mut run = self.verb(who, time, pipeline, &words);
                if random.below(KILLED) == 0 {
                    run = run.env("PIPELINE_FAULT", (1 + random.below(POINTS)).to_string());
                }
                (run.start(), idea.join(" "))
            })
            .collect();
        for (running, what) in &mut racers {
            self.ended(running, what);
        }
    }

    /// Promotes a release through all gates but one, beginning at midnight of a working day; what that gate says to it.
    fn probe(&self, pipeline: &'static str, gate: &str, midnight: i64) -> Answer {
        let kind = GATES.iter().find(|(name, _)| *name == gate).unwrap().1;
        let must = |who: &str, time: i64, args: &[&str]| {
            self.verb(who, time, pipeline, args).run().code(0);
        };
        let good = self.quietly(pipeline, "", midnight + HOUR);
        must("ci", midnight + HOUR, &["promote", "--automatic"]);
        let approve = |release: &str, time: i64| {
            for who in ["ben", "cho"] {
                must(who, time, &["approve", "--for", "prod", "--release", release]);
            }
        };
        approve(&good, midnight + 10 * HOUR);
        must("ann", midnight + 10 * HOUR, &["promote", "--to", "prod", "--release", &good]);
        let (to, time) = match gate {
            "signed" | "sbom" | "report" => ("stage", midnight + 12 * HOUR),
            "healthy" => ("edge", midnight + 12 * HOUR),
            "vm-test" => ("lab", midnight + 12 * HOUR),
            "soak" => ("prod", midnight + 13 * HOUR),
            "window" => ("prod", midnight + 20 * HOUR),
            _ => ("prod", midnight + DAY + 10 * HOUR),
        };
        let release = match to {
            "edge" => {
                self.verb("ann", time, pipeline, &["promote", "--to", "canary", "--release", &good]).run().code(75);
                good
            }
            "lab" => good,
            _ => {
                let bad = self.quietly(pipeline, kind, midnight + 11 * HOUR);
                if to == "prod" {
                    must("ci", midnight + 11 * HOUR, &["promote", "--automatic"]);
                }
                bad
            }
        };
        match (to, gate) {
            // One is too few for the first policy, none for the second.
            ("prod", "approve") if self.broken.is_some() => {
                must("ben", time, &["approve", "--for", "prod", "--release", &release])
            }
            ("prod", "approve") => {}
            ("prod", _) => approve(&release, time),
            _ => {}
        }
        self.verb("ann", time, pipeline, &["--json", "promote", "--to", to, "--release", &release]).run()
    }

    /// A release, without accidents.
    fn quietly(&self, pipeline: &'static str, kind: &str, time: i64) -> String {
        // A seed that kills nobody.
        assert!(Random(1).below(KILLED) != 0);
        self.release(&mut Random(1), pipeline, kind, "ci", time)
    }

    fn ledger(&self) -> PathBuf {
        self.project.root.join("state/ledger/ledger.git")
    }

    /// The ledger is sound, for us and for Git; every commit that is left over is one that a kill or a lost race left.
    fn is_sound(&self) {
        let pipeline = self.pipelines[0];
        self.verb("ann", START + 400 * DAY, pipeline, &["ledger", "verify"]).ok().prints("sound: ");
        let fsck = self.project.git_in(&self.ledger(), &["fsck", "--strict", "--full", "--no-progress"]);
        let wrong: Vec<&str> = fsck.stdout.lines().filter(|line| !line.starts_with("dangling ")).collect();
        assert_eq!(wrong, [""; 0]);
    }

    /// What the model says; whether it found nothing wrong.
    fn model(&self) -> (bool, String) {
        let answer = self
            .project
            .program("python3")
            .arg(repository().join("tests/month/model.py"))
            .arg(self.ledger())
            .arg(self.keys.join("allowed"))
            .arg(self.project.root.join("store"))
            .run();
        assert_eq!(answer.stderr, "", "the model fails by itself");
        (answer.status.success(), answer.stdout)
    }
}

/// Answers requests: 503 to releases whose version ends with `-down`.
fn server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/ready", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let lines = BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
                let down = lines.filter(|line| line.starts_with("x-pipeline-version: ") && line.ends_with("-down")).count() > 0;
                let status = if down { "503 Down" } else { "200 OK" };
                let _ = (&stream)
                    .write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").as_bytes());
            });
        }
    });
    url
}

#[test]
fn a_month() {
    let seed = match std::env::var("PIPELINE_MONTH_SEED") {
        Ok(text) => text.parse().expect("PIPELINE_MONTH_SEED is a number"),
        Err(_) => u64::from(std::process::id()) << 20 ^ u64::from(jiff::Timestamp::now().subsec_nanosecond().unsigned_abs()),
    };
    println!("PIPELINE_MONTH_SEED={seed}");
    let team = Team::new(&["shop", "site"], None);
    for pipeline in &team.pipelines {
        team.verb("ann", START, pipeline, &["environment", "apply", "./policy.yaml", "--reason", "policy 1"]).ok();
    }
    for day in 0..DAYS {
        for hour in 0..HOURS.len() {
            let team = &team;
            std::thread::scope(|scope| {
                for pipeline in &team.pipelines {
                    scope.spawn(move || team.hour(seed, pipeline, day, hour));
                }
            });
        }
    }
    // Each gate once more, with nothing else in the way: it alone refuses. Thursdays and Fridays are working days.
    let mut midnight = START + 34 * DAY;
    for environment in ENVIRONMENTS {
        for args in [["hold", environment, "--lift"], ["thaw", environment, "--quiet"], ["thaw", "--all", environment]] {
            team.ended(&mut team.verb("ann", midnight, "shop", &args).start(), "cleaning up");
        }
    }
    for (gate, _) in GATES {
        let answer = team.probe("shop", gate, midnight);
        answer.code(1);
        let answers = answer.json()["outcome"]["plan"]["answers"].as_array().unwrap().clone();
        let shut: Vec<&str> = answers
            .iter()
            .filter(|one| one["verdict"] != "allow" && !one["reason"].as_str().unwrap().starts_with("not asked"))
            .map(|one| one["gate"].as_str().unwrap())
            .collect();
        assert_eq!(shut, [gate], "{answers:#?}");
        midnight += 7 * DAY;
    }
    team.is_sound();
    let (good, found) = team.model();
    println!("{found}{:?}", team.counts.lock().unwrap());
    assert!(good, "PIPELINE_MONTH_SEED={seed}\n{found}");
    // It was a month in which everything happened.
    let count = |kind: &str| -> u32 {
        let found = found.split([',', ':', '\n']).find_map(|part| part.trim().strip_prefix(kind)?.trim().parse().ok());
        found.unwrap_or(0)
    };
    for (kind, least) in [
        ("apply", 4),
        ("enter", 150),
        ("promote", 150),
        ("approve", 60),
        ("rollback", 10),
        ("configure", 10),
        ("hold", 5),
        ("lift", 10),
        ("freeze", 10),
        ("thaw", 1),
    ] {
        assert!(count(kind) >= least, "{kind} only {} times\n{found}", count(kind));
    }
    let killed = team.counts.lock().unwrap().get("exit 137").copied().unwrap_or(0);
    assert!(killed >= 10, "only {killed} were killed");
}

#[test]
fn every_gate_that_is_broken_is_noticed() {
    let work = Mutex::new(GATES.iter());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((gate, _)) = work.lock().unwrap().next() else { return };
                    broken(gate);
                }
            });
        }
    });
}

/// Plays a day with a gate that says yes to everything.
fn broken(gate: &'static str) {
    let team = Team::new(&["shop"], Some(gate));
    team.verb("ann", START, "shop", &["environment", "apply", "./policy.yaml", "--reason", "policy 1"]).ok();
    // The rules that count are those of the model, not those of the ledger: the ledger is sound.
    assert!(team.model().0, "before anything happened");
    let answer = team.probe("shop", gate, START + 6 * DAY);
    // What stands before stage may let it come there by itself.
    let came = answer.status.success() || answer.stderr.contains("is in `shop/stage` already");
    assert!(came, "{gate}: {}{}", answer.stdout, answer.stderr);
    team.is_sound();
    let (good, found) = team.model();
    let wrong: Vec<&str> = found.lines().filter(|line| line.contains(": the gate ")).collect();
    assert!(
        !good && wrong.len() == 1 && wrong[0].ends_with(&format!("the gate {gate} said allow, and is shut")),
        "{gate}: {found}"
    );
}
