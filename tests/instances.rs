//! Instances of the local target: kept by a shim, supervised, looked into, ended, and what is left of them when
//! something is killed. A small image of busybox, as root and as an ordinary user.

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Answer, Project, User, leftovers, tests_are_root, tool, users};
use pipeline::oci::digest::Digest;
use serde_json::{Value, json};

/// How long anything may take that takes a moment.
const PATIENCE: Duration = Duration::from_secs(30);
const GIB: u64 = 1 << 30;

/// Serves its folder, and does what its variables say.
const RUN: &str = "#!/bin/sh
echo \"starting with $GREETING\"
if [ -n \"$CRASH\" ]; then echo crashing; exit 3; fi
while [ -n \"$TALK\" ]; do yes 'forty-one bytes with the end, many times' | head -n 20000; sleep 0.1; done
httpd -f -p 8080 -h /opt/app &
if [ -n \"$STUBBORN\" ]; then trap 'echo no' TERM; while :; do wait; done; fi
trap 'echo asked to end; kill $!; exit 0' TERM
wait
";

struct Case {
    project: Project,
    digest: String,
}

impl Case {
    fn new(user: User) -> Self {
        let project = Project::tiny(user);
        project.write_script("builder/s2i/bin/run", RUN);
        project.write("src/data/first", "from the image\n");
        project.edit("pipeline.yaml", "  port: 8080\n", "  port: 8080\n  volumes: [/opt/app/data]\n");
        let digest = project.build(&[]).digest;
        Self { project, digest }
    }

    fn verb(&self, words: &[&str]) -> common::Run {
        self.project.pipeline(&["__instance"]).args(words)
    }

    fn wanted(&self, id: &str, more: Value) -> Value {
        let mut wanted = json!({"id": id, "artifact": self.digest, "env": {"GREETING": "hello"}});
        for (key, value) in more.as_object().unwrap() {
            wanted[key] = value.clone();
        }
        wanted
    }

    #[track_caller]
    fn start(&self, id: &str, more: Value) {
        self.verb(&["start"]).input(self.wanted(id, more).to_string()).ok();
    }

    fn list(&self) -> Vec<Value> {
        self.verb(&["list"]).ok().json().as_array().unwrap().clone()
    }

    #[track_caller]
    fn found(&self, id: &str) -> Value {
        self.list().into_iter().find(|found| found["id"] == id).unwrap_or_else(|| panic!("no instance {id}"))
    }

    /// Waits until the instance is as `good` says.
    #[track_caller]
    fn wait(&self, id: &str, good: impl Fn(&Value) -> bool) -> Value {
        let patience = Instant::now() + PATIENCE;
        loop {
            let found = self.found(id);
            if good(&found) {
                return found;
            }
            assert!(Instant::now() < patience, "{found:#}\n{}", self.log(id));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The page, asked for until it is there.
    #[track_caller]
    fn page(&self, id: &str) -> String {
        let patience = Instant::now() + PATIENCE;
        loop {
            let answer = self.verb(&["get", id, "8080"]).run();
            if answer.status.success() {
                return answer.stdout;
            }
            assert!(Instant::now() < patience, "{}\n{}", answer.stderr, self.log(id));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn log(&self, id: &str) -> String {
        self.verb(&["logs", id, "1000"]).run().stdout
    }

    fn exec(&self, id: &str, script: &str) -> Answer {
        self.verb(&["exec", id, "--", "sh", "-c", script]).run()
    }

    fn dir(&self, id: &str) -> PathBuf {
        self.project.root.join("state/instances").join(id)
    }

    fn shim(&self, id: &str) -> i32 {
        let text = fs_err::read_to_string(self.dir(id).join("pid")).unwrap();
        text.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Processes of this root, and files that are no logs.
    fn left(&self) -> Vec<String> {
        let mut found = leftovers(&self.project.root);
        for entry in fs_err::read_dir(self.project.root.join("state/instances")).into_iter().flatten().flatten() {
            for file in fs_err::read_dir(entry.path()).unwrap().flatten() {
                if !["log", "log.1", "lock"].contains(&file.file_name().to_str().unwrap()) {
                    found.push(format!("file {}", file.path().display()));
                }
            }
            found.extend(groups(&entry.path()));
        }
        found
    }

    #[track_caller]
    fn assert_left_nothing(&self) {
        let patience = Instant::now() + PATIENCE;
        while !self.left().is_empty() {
            assert!(Instant::now() < patience, "left over: {:#?}", self.left());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        // A test that failed leaves no instance behind.
        for entry in fs_err::read_dir(self.project.root.join("state/instances")).into_iter().flatten().flatten() {
            let _ = self.verb(&["stop", entry.file_name().to_str().unwrap(), "0"]).run();
        }
    }
}

/// The control groups of an instance, below this process's own.
fn groups(instance: &Path) -> Vec<String> {
    use std::os::unix::ffi::OsStrExt as _;
    let name = format!("pipeline-step-{}", Digest::of(instance.join("work/scratch").as_os_str().as_bytes()).short());
    let own = fs_err::read_to_string("/proc/self/cgroup").unwrap();
    let place = |line: &str| {
        let fields: Vec<&str> = line.splitn(3, ':').collect();
        Path::new("/sys/fs/cgroup").join(fields[1]).join(fields[2].trim_start_matches('/')).join(&name)
    };
    own.lines().map(place).filter(|dir| dir.exists()).map(|dir| format!("control group {}", dir.display())).collect()
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn an_instance_outlives_its_caller_and_is_looked_into() {
    for user in users() {
        let case = Case::new(user);
        let wanted = json!({"secrets": {"TOKEN": "s3cret-value"}, "volumes": {"data": "/opt/app/data"}});
        case.start("a-0", wanted.clone());
        assert_eq!(case.page("a-0"), "<h1>tiny</h1>\n");
        let found = case.found("a-0");
        assert_eq!((&found["status"], &found["restarts"]), (&json!("running"), &json!(0)));
        assert_eq!(found["environment"], "test/dev");
        assert!(found["memory"].as_u64().is_some_and(|memory| memory > 0 && memory < GIB), "{found}");
        // Who asks again finds it as it is.
        let shim = case.shim("a-0");
        case.start("a-0", json!({"env": {"GREETING": "another"}}));
        assert_eq!(case.shim("a-0"), shim);
        // Nobody's child, in a session of its own.
        let stat = fs_err::read_to_string(format!("/proc/{shim}/stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        assert_eq!(fields[3], shim.to_string(), "session of {stat}");
        // The secret is a file of the program's user, and nowhere on the disk.
        let seen = case.exec("a-0", "id -u; cat $TOKEN_FILE; echo; ls -l /run/secrets/TOKEN | cut -c1-10; echo $TOKEN_FILE");
        assert_eq!(seen.stdout, "1001\ns3cret-value\n-r--------\n/run/secrets/TOKEN\n", "{}", seen.stderr);
        let search = case.project.program("grep").args(&["-rlF", "s3cret-value"]).arg(case.project.root.join("state")).run();
        assert_eq!(search.stdout, "");
        // The volume has what the image has, and the program's user writes to it.
        let volume = case.exec("a-0", "cat data/first && echo mine > data/second && cat data/second; touch data/../no");
        assert_eq!(volume.stdout, "from the image\nmine\n", "{}", volume.stderr);
        assert_ne!(volume.status.code(), Some(0), "the tree is read-only");
        // Exit status, input and both outputs are the command's.
        let said = case.exec("a-0", "echo out; echo err >&2; exit 42");
        said.code(42).prints("out\n").says("err\n");
        let piped = case.verb(&["exec", "a-0", "--interactive", "--", "wc", "-c"]).input("12345").ok();
        assert_eq!(piped.stdout.trim(), "5");
        assert_ne!(case.verb(&["exec", "a-0", "--", "no-such-program"]).run().status.code(), Some(0));
        // Checks are judged, and none can hang.
        let check = |argv: &[&str], timeout: &str| case.verb(&["check", "a-0", timeout, "--"]).args(argv).ok().json();
        assert_eq!(check(&["sh", "-c", "echo first; echo fine"], "10"), json!({"good": true, "last": "fine"}));
        assert_eq!(check(&["sh", "-c", "echo bad >&2; exit 1"], "10"), json!({"good": false, "last": "bad"}));
        assert_eq!(check(&["sh", "-c", "exit 7"], "10"), json!({"good": false, "last": "status 7"}));
        assert_eq!(
            check(&["sh", "-c", "sleep 987 & sleep 987"], "0.5"),
            json!({"good": false, "last": "no answer within 0.5 s"})
        );
        assert!(!case.exec("a-0", "ps").stdout.contains("987"), "what a check started is ended with it");
        // Its log goes on after it.
        case.verb(&["stop", "a-0", "10"]).ok();
        case.verb(&["stop", "a-0", "10"]).ok();
        assert!(case.list().is_empty());
        let log = case.log("a-0");
        assert_eq!(log, "starting with hello\nasked to end\npipeline: the program was asked to end, status 0\n");
        case.assert_left_nothing();
        // The data is there for the next one.
        case.start("a-1", wanted);
        case.page("a-1");
        assert_eq!(case.exec("a-1", "cat data/second").stdout, "mine\n");
        case.verb(&["stop", "a-1", "10"]).ok();
        case.verb(&["forget", "a-0"]).ok();
        case.verb(&["forget", "a-1"]).ok();
        case.verb(&["forget", "never-was"]).ok();
        case.verb(&["stop", "never-was", "1"]).ok();
        assert_eq!(fs_err::read_dir(case.project.root.join("state/instances")).unwrap().count(), 0);
    }
}

#[test]
fn a_program_that_ends_is_started_again_less_and_less_often() {
    for user in users() {
        let case = Case::new(user);
        case.start("crash-0", json!({"env": {"GREETING": "x", "CRASH": "1"}}));
        let found = case.wait("crash-0", |found| found["restarts"].as_u64() >= Some(2));
        assert!(["waiting", "running"].contains(&found["status"].as_str().unwrap()), "{found}");
        let log = case.log("crash-0");
        let again: Vec<&str> = log.lines().filter(|line| line.starts_with("pipeline: ")).take(2).collect();
        let told = ["0.5", "1.0"].map(|wait| format!("pipeline: the program ended: status 3; it is started again in {wait} s"));
        assert_eq!(again, told);
        case.verb(&["stop", "crash-0", "5"]).ok();
        case.assert_left_nothing();
        // One that was killed comes back at the same address with the same network.
        case.start("back-0", json!({}));
        case.page("back-0");
        let before = case.found("back-0")["address"].clone();
        // The end of the program may be the end of this command too.
        case.exec("back-0", "killall -9 httpd");
        let found = case.wait("back-0", |found| found["restarts"] == 1 && found["status"] == "running");
        assert_eq!(found["address"], before);
        assert_eq!(case.page("back-0"), "<h1>tiny</h1>\n");
        // So does one whose whole sandbox was killed.
        let shim = case.shim("back-0");
        let children = fs_err::read_to_string(format!("/proc/{shim}/task/{shim}/children")).unwrap();
        let is_sandbox =
            |pid: &i32| fs_err::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("__unshare"));
        kill(children.split_whitespace().map(|pid| pid.parse().unwrap()).find(is_sandbox).unwrap());
        case.wait("back-0", |found| found["restarts"] == 2 && found["status"] == "running");
        assert_eq!(case.page("back-0"), "<h1>tiny</h1>\n");
        assert_eq!(case.shim("back-0"), shim);
        case.verb(&["stop", "back-0", "5"]).ok();
        case.assert_left_nothing();
    }
}

#[test]
fn a_shim_that_is_killed_takes_all_along_and_is_started_anew() {
    for user in users() {
        let case = Case::new(user);
        case.start("k-0", json!({"secrets": {"A": "b"}, "limits": {"memory": 256 << 20, "pids": 64}}));
        case.page("k-0");
        // So that the test knows the groups when there are any.
        assert_eq!(
            !groups(&case.dir("k-0")).is_empty(),
            case.exec("k-0", "cat /proc/self/cgroup").stdout.contains("pipeline-step-")
        );
        kill(case.shim("k-0"));
        let found = case.wait("k-0", |found| found["status"].is_object());
        assert_eq!(found["status"], json!({"ended": {"status": "its shim was killed"}}));
        assert_eq!(found["address"], Value::Null);
        // Nothing of it runs, and nobody answers.
        let patience = Instant::now() + PATIENCE;
        let alive = || {
            case.left().into_iter().filter(|line| line.starts_with("process") || line.starts_with("mounts")).collect::<Vec<_>>()
        };
        while !alive().is_empty() {
            assert!(Instant::now() < patience, "outlives its shim: {:#?}", alive());
            std::thread::sleep(Duration::from_millis(20));
        }
        case.exec("k-0", "true").code(1).says("the instance `k-0` does not run");
        case.start("k-0", json!({}));
        case.page("k-0");
        // As after a reboot: the folder is there, the process is not.
        kill(case.shim("k-0"));
        let pid = case.dir("k-0").join("pid");
        let noted = fs_err::read_to_string(&pid).unwrap();
        fs_err::write(&pid, format!("{}\nanother-boot\n", noted.lines().next().unwrap())).unwrap();
        let found = case.wait("k-0", |found| found["status"].is_object());
        assert_eq!(found["status"], json!({"ended": {"status": "gone with the last boot"}}));
        case.start("k-0", json!({}));
        case.page("k-0");
        // Removed although nobody is there who could do it.
        kill(case.shim("k-0"));
        case.wait("k-0", |found| found["status"].is_object());
        case.verb(&["stop", "k-0", "1"]).ok();
        assert!(case.list().is_empty());
        case.assert_left_nothing();
        // One that does not listen is killed when its time is up.
        case.start("s-0", json!({"env": {"GREETING": "x", "STUBBORN": "1"}}));
        case.page("s-0");
        case.verb(&["stop", "s-0", "0.3"]).ok();
        assert!(case.log("s-0").contains("pipeline: the program did not end in time and is killed\n"), "{}", case.log("s-0"));
        case.assert_left_nothing();
    }
}

#[test]
fn of_many_starts_at_once_one_wins() {
    for user in users() {
        let case = Case::new(user);
        let wanted = case.wanted("one-0", json!({})).to_string();
        let starts: Vec<_> = (0..6).map(|_| case.verb(&["start"]).input(wanted.clone()).start()).collect();
        for mut start in starts {
            start.wait(PATIENCE).code(0);
        }
        case.page("one-0");
        assert_eq!(case.list().len(), 1);
        let shims = |case: &Case| leftovers(&case.project.root).into_iter().filter(|line| line.contains("__shim")).count();
        assert_eq!(shims(&case), 1);
        assert_eq!(case.log("one-0").matches("starting with").count(), 1);
        // Stopped by several at once too.
        let stops: Vec<_> = (0..3).map(|_| case.verb(&["stop", "one-0", "5"]).start()).collect();
        for mut stop in stops {
            stop.wait(PATIENCE).code(0);
        }
        case.assert_left_nothing();
        // What cannot be started leaves nothing at all.
        let none = json!({"artifact": format!("sha256:{}", "0".repeat(64))});
        case.verb(&["start"]).input(case.wanted("none-0", none).to_string()).run().code(1).says("cannot start `none-0`");
        assert!(!case.dir("none-0").exists());
        case.assert_left_nothing();
    }
}

#[test]
fn logs_rotate_and_a_full_disk_does_not_stop_the_program() {
    for user in users() {
        let case = Case::new(user);
        case.start("t-0", json!({"env": {"GREETING": "x", "TALK": "1"}}));
        let mut follow = case.verb(&["logs", "t-0", "3", "--follow"]).start();
        let patience = Instant::now() + PATIENCE * 2;
        while !case.dir("t-0").join("log.1").exists() {
            assert!(Instant::now() < patience, "never rotated");
            std::thread::sleep(Duration::from_millis(20));
        }
        case.verb(&["stop", "t-0", "0"]).ok();
        // Who follows is told all, over the rotation, and then it ends.
        let followed = follow.wait(PATIENCE);
        followed.code(0);
        let lines: Vec<&str> = followed.stdout.lines().collect();
        let odd: Vec<(usize, &&str)> =
            lines.iter().enumerate().filter(|(_, line)| **line != "forty-one bytes with the end, many times").collect();
        // The first may have been cut by an earlier rotation, the last by the end.
        let fine = |(index, line): &(usize, &&str)| *index == 0 || *index + 3 >= lines.len() || line.starts_with("pipeline: ");
        assert!(lines.len() > 100_000 && odd.iter().all(fine), "{} lines, odd ones {odd:?}", lines.len());
        for name in ["log", "log.1"] {
            assert!(case.dir("t-0").join(name).metadata().unwrap().len() < (10 << 20) + (128 << 10), "{name}");
        }
        case.verb(&["forget", "t-0"]).ok();
        case.assert_left_nothing();
        // Every write to the log fails as on a full disk.
        case.start("f-0", json!({}));
        case.verb(&["stop", "f-0", "5"]).ok();
        let log = case.dir("f-0").join("log");
        fs_err::remove_file(&log).unwrap();
        fs_err::os::unix::fs::symlink("/dev/full", &log).unwrap();
        case.start("f-0", json!({}));
        assert_eq!(case.page("f-0"), "<h1>tiny</h1>\n");
        fs_err::remove_file(&log).unwrap();
        case.verb(&["stop", "f-0", "5"]).ok();
        let text = fs_err::read_to_string(&log).unwrap();
        assert!(text.starts_with("\npipeline: 20 bytes of output are lost: No space left on device"), "{text}");
        assert!(text.contains("asked to end\n"), "{text}");
    }
}

#[test]
fn limits_hold_or_it_is_told_that_they_do_not() {
    for user in users() {
        let case = Case::new(user);
        case.start("l-0", json!({"limits": {"memory": 64 << 20, "pids": 40, "cpus": 0.5}}));
        case.page("l-0");
        let notes = case.found("l-0")["notes"].to_string();
        let grouped = case.exec("l-0", "cat /proc/self/cgroup").stdout;
        for (what, controller) in [("memory", "memory"), ("processes", "pids"), ("processors", "cpu")] {
            let in_group = grouped.lines().any(|line| {
                let fields: Vec<&str> = line.splitn(3, ':').collect();
                (fields[1].split(',').any(|name| name == controller) || fields[1].is_empty()) && line.contains("/pipeline-step-")
            });
            let told = notes.contains("no control group may be made") && notes.contains(what);
            assert!(in_group != told, "{what}: {grouped}{notes}");
        }
        // Too many processes, too much memory: refused or killed, and the program goes on.
        assert_ne!(case.exec("l-0", "for i in $(seq 1 90); do sleep 5 & done; wait").stderr, "");
        assert_ne!(case.exec("l-0", "head -c 200000000 /dev/zero | tail -c 199000000 > /dev/null").status.code(), Some(0));
        assert_eq!(case.page("l-0"), "<h1>tiny</h1>\n");
        case.verb(&["stop", "l-0", "5"]).ok();
        case.assert_left_nothing();
    }
}

#[test]
fn there_is_a_way_out_or_it_is_told_that_there_is_none() {
    for user in users() {
        let case = Case::new(user);
        case.start("n-0", json!({}));
        case.page("n-0");
        let notes = case.found("n-0")["notes"].to_string();
        let own = case.project.program("hostname").arg("-I").ok().stdout;
        let address = own.split_whitespace().find(|address| address.contains('.')).expect("an IPv4 address that is not loopback");
        let listener = std::net::TcpListener::bind((address, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || {
            use std::io::Write as _;
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"from outside\n").unwrap();
        });
        let answer = case.exec("n-0", &format!("nc -w 5 {address} {port} < /dev/null; cat /etc/resolv.conf"));
        if notes.contains("no way out to the network") {
            assert!(!answer.stdout.contains("from outside"), "{notes}: {}", answer.stdout);
            assert!(!tests_are_root() || user == User::Ordinary, "root has always a way out: {notes}");
            drop(std::net::TcpStream::connect((address, port)));
        } else {
            assert!(notes.contains("way out to the network: "), "{notes}");
            assert!(answer.stdout.starts_with("from outside\nnameserver "), "{}{}", answer.stdout, answer.stderr);
        }
        server.join().unwrap();
        // This machine's own loopback is not reached.
        let private = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = private.local_addr().unwrap().port();
        for gateway in ["127.0.0.1", "10.0.2.2"] {
            assert_ne!(case.exec("n-0", &format!("nc -w 2 {gateway} {port} < /dev/null")).status.code(), Some(0), "{gateway}");
        }
        case.verb(&["stop", "n-0", "5"]).ok();
        case.assert_left_nothing();
    }
}

#[test]
fn prune_leaves_what_an_instance_stands_on() {
    for user in users() {
        let case = Case::new(user);
        case.start("p-0", json!({}));
        case.page("p-0");
        // Nothing in the store needs the image any more.
        fs_err::write(case.project.root.join("store/index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).unwrap();
        for dir in ["state/builds", "cache/steps"] {
            for entry in fs_err::read_dir(case.project.root.join(dir)).unwrap() {
                fs_err::remove_file(entry.unwrap().path()).unwrap();
            }
        }
        let pruned = case.project.pipeline(&["artifact", "prune", "--keep", "0"]).run();
        pruned.code(0);
        let blobs = fs_err::read_dir(case.project.root.join("store/blobs/sha256")).unwrap().count();
        assert_eq!(blobs, 0, "{}", pruned.stdout);
        // The tree is in use: the program can be started again from it.
        case.exec("p-0", "killall -9 httpd");
        case.wait("p-0", |found| found["restarts"] == 1 && found["status"] == "running");
        assert_eq!(case.page("p-0"), "<h1>tiny</h1>\n");
        case.verb(&["stop", "p-0", "5"]).ok();
    }
}

#[test]
fn a_terminal_is_a_terminal_inside() {
    tool("script", "bsdutils");
    for user in users() {
        let case = Case::new(user);
        case.start("x-0", json!({}));
        case.page("x-0");
        let pipeline = common::binary().display().to_string();
        let root = case.project.root.display().to_string();
        // runc gives the terminal its size a moment after the start, and until then `stty size` prints nothing; and `script` hangs
        // up when nobody is at its own input.
        let size = "i=0; while [ -z \"$(stty size)\" ] && [ $((i += 1)) -le 50 ]; do sleep 0.1; done; stty size";
        let inner = format!("{pipeline} --root {root} __instance exec x-0 -i -- sh -c 'tty; {size}; exit 9'");
        let outer = format!("stty rows 33 cols 99; {inner}");
        let answer = case.project.program("sh").args(&["-c", "sleep 7 | script -qec \"$1\" /dev/null", "sh", &outer]).run();
        answer.code(9);
        assert!(answer.stdout.contains("/dev/pts/0\r\n"), "{}", answer.stdout);
        assert!(answer.stdout.contains("33 99\r\n"), "{}", answer.stdout);
        case.verb(&["stop", "x-0", "5"]).ok();
        case.assert_left_nothing();
    }
}

#[test]
fn a_shim_owns_commands_of_this_machine_too() {
    for user in users() {
        let case = Case::new(user);
        let script = "echo got $(cat $1); trap 'echo bye; exit 0' TERM; while :; do sleep 0.1; done";
        let owned = json!({
            "owned": {"command": {"argv": ["sh", "-c", script, "sh", "{secret:KEY}"], "env": [], "stop": {"signal": 15}}},
            "secrets": {"KEY": "in-memory"},
        });
        case.verb(&["command", "c-0"]).input(owned.to_string()).ok();
        let patience = Instant::now() + PATIENCE;
        while !case.log("c-0").contains("got in-memory") {
            assert!(Instant::now() < patience, "{}", case.log("c-0"));
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(case.found("c-0")["status"], "running");
        case.verb(&["stop", "c-0", "5"]).ok();
        assert_eq!(case.log("c-0"), "got in-memory\nbye\npipeline: the program was asked to end, status 0\n");
        case.assert_left_nothing();
    }
}
