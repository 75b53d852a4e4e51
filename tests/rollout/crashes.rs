//! What ends without a word, and a disk that is full: kills of the daemon at random moments, a machine that loses its power,
//! instances that are killed. What can be served is served, and in the end there is what the ledger wants.
//!
//! Random is a seed that is printed; `PIPELINE_ROLLOUT_SEED` gives it again.
#![allow(clippy::print_stdout, reason = "with the seed a failure can be had again")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::bad_days::{alone, promoted};
use super::common::{User, leftovers, me, tests_are_root, tool};
use super::place::{Daemon, Place};

/// Kills of the daemon, and the longest time in milliseconds from a decision to one: about as long as the rollout.
const KILLS: usize = 20;
const BETWEEN: u64 = 2000;
/// Releases that are promoted in turns; one of them is live and one warm, the others have to start.
const VERSIONS: [&str; 4] = ["1.0", "1.1", "1.2", "1.3"];
/// Losses of power, and the longest time in milliseconds from a decision to one: a little longer than the rollout.
const OUTAGES: usize = 5;
const ROLLOUT: u64 = 5000;
/// How long anything may take that takes a moment.
const PATIENCE: Duration = Duration::from_secs(60);

fn random() -> StdRng {
    let given = std::env::var("PIPELINE_ROLLOUT_SEED").ok().map(|text| text.parse().unwrap());
    let seed: u64 = given.unwrap_or_else(rand::random);
    println!("PIPELINE_ROLLOUT_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// Straight to prod, with time to start on a machine that does much else, and nothing concluded from latencies there.
fn patient() -> String {
    alone().replace("deadline: 3s", "deadline: 60s").replace("period: 2s", "period: 1s, minimum: 1000000")
}

/// Decides, and waits for nothing.
fn decide(place: &Place, version: &str) {
    place.verb(&["promote", "--to", "prod", "--release", version, "--no-wait"]).ok();
}

#[test]
fn a_daemon_killed_at_any_moment_loses_only_what_was_in_flight() {
    let mut random = random();
    let place = Place::new(me(), &patient());
    let mut daemon = place.serve(&[]);
    VERSIONS.iter().for_each(|version| place.release_that(version, "--healthy-after 0.5"));
    place.verb(&["promote", "--to", "prod", "--release", VERSIONS[0]]).ok();
    let client = place.client("prod.test", "h1");
    let mut wanted = VERSIONS[0];
    for _ in 0..KILLS {
        // Or the rollout that was killed goes on, and is killed again.
        if random.random_bool(0.85) {
            let others: Vec<&str> = VERSIONS.into_iter().filter(|version| *version != wanted).collect();
            wanted = others[random.random_range(0..others.len())];
            decide(&place, wanted);
        }
        let pause = random.random_range(0..BETWEEN);
        std::thread::sleep(Duration::from_millis(pause));
        daemon.dies();
        println!("{wanted} is wanted, after {pause} ms: {}", left_in(&place));
        daemon = place.serve(&[]);
    }
    place.wait_for("prod", wanted);
    assert_eq!(place.get("prod.test", "/version"), wanted);
    let report = client.end();
    println!("lost {}: {:?}", report.lost(), report.reasons());
    report.loses_only_what_was_in_flight(KILLS as u64);
    // A connection that broke, and nothing else: no answer was wrong.
    let broken = ["h1: reset", "h1: truncated", "h1: closed before the answer"];
    assert!(report.reasons().keys().all(|reason| broken.contains(&reason.as_str())), "{report:?}");
    place.is_sound();
    daemon.stop();
    place.stop_all();
}

/// What a daemon that was killed was about.
fn left_in(place: &Place) -> String {
    let text = fs_err::read_to_string(place.project.root.join("state/rollout/state.json")).unwrap();
    let state: Value = serde_json::from_str(text.split_once('\n').unwrap().1).unwrap();
    let rollout = &state["environments"]["tiny/prod"]["rollout"];
    format!("{} {}", rollout["version"], rollout["phase"])
}

/// The state as it is at one moment is all that a machine has when its power comes back.
fn lose_power<'p>(place: &'p Place, daemon: Daemon<'p>) -> Daemon<'p> {
    let root = &place.project.root;
    let (state, copy) = (root.join("state"), root.join("state.then"));
    // One moment: the daemon stands still meanwhile.
    daemon.running.signal(19);
    let patience = Instant::now() + PATIENCE;
    // A file of a shim may go while it is copied.
    while as_owner(place, &["cp", "-a", path(&state), path(&copy)]).status.code() != Some(0) {
        assert!(Instant::now() < patience, "the state cannot be copied");
        as_owner(place, &["rm", "-rf", path(&copy)]).code(0);
    }
    daemon.dies();
    end_everything(place);
    as_owner(place, &["rm", "-rf", path(&state), path(&root.join("run"))]).code(0);
    fs_err::rename(&copy, &state).unwrap();
    // What ran, ran in another boot.
    for entry in fs_err::read_dir(state.join("instances")).into_iter().flatten() {
        let file = entry.unwrap().path().join("pid");
        if let Some((process, _)) = fs_err::read_to_string(&file).ok().as_deref().and_then(|text| text.split_once('\n')) {
            fs_err::write(&file, format!("{process}\n00000000-0000-0000-0000-000000000000\n")).unwrap();
        }
    }
    place.serve(&[])
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs it as whom everything below the root belongs to, also what belongs to subordinate ids.
fn as_owner(place: &Place, argv: &[&str]) -> super::common::Answer {
    let namespace: &[&str] = &["unshare", "--user", "--map-auto", "--map-root-user"];
    let words = if place.project.user == User::Root { &[] } else { namespace };
    place.project.program(argv[0]).args(&argv[1..]).wrap(words).run()
}

/// Ends the holder of the sockets and all instances, also one that was just being started.
fn end_everything(place: &Place) {
    let root = &place.project.root;
    pipeline::serve::sockets::quit(&root.join("run/hold"));
    let patience = Instant::now() + PATIENCE;
    loop {
        place.stop_instances();
        let left: Vec<String> = leftovers(root).into_iter().filter(|left| !left.starts_with("file")).collect();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < patience, "{left:#?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_machine_that_loses_its_power_comes_to_what_the_ledger_wants() {
    let mut random = random();
    let place = Place::new(me(), &patient().replace("period: 1s", "period: 3s"));
    let mut daemon = place.serve(&[]);
    promoted(&place, "1.0", "").code(0);
    for number in 0..OUTAGES {
        let version = format!("2.{number}");
        place.release_that(&version, "--healthy-after 0.5");
        decide(&place, &version);
        if number == 0 {
            // Green serves and is watched: that it is gone afterwards says nothing of it.
            place.wait("prod", |status| status["live"]["version"] == version && status["rollout"]["phase"] == "watching");
        } else {
            let pause = random.random_range(0..ROLLOUT);
            println!("{version}: {pause} ms");
            std::thread::sleep(Duration::from_millis(pause));
        }
        daemon = lose_power(&place, daemon);
        place.wait_for("prod", &version);
        // What the ledger knew before the power was gone is true again.
        place.wait("prod", |status| status["live"]["healthy"] == 2);
        assert_eq!(place.get("prod.test", "/version"), version);
    }
    place.is_sound();
    daemon.stop();
    place.stop_all();
}

/// Mounts a small disk for what the daemon has to remember, in a namespace of its own that ends with it, and starts it.
const SMALL: &str = "mkdir -p \"$1\" && mount -t tmpfs -o size=128k,mode=0700 tmpfs \"$1\" && shift && exec \"$@\"";

/// A file that takes all the room there is.
fn fill(file: &Path) {
    let mut filler = fs_err::File::create(file).unwrap();
    let full = loop {
        if let Err(error) = filler.write_all(&[0; 4096]) {
            break error;
        }
    };
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
}

#[test]
fn a_full_disk_begins_nothing_and_ends_nothing() {
    if !tests_are_root() {
        // Mounting needs root; tools/test says that nothing ran as root.
        return;
    }
    const WHY: &str = "the state cannot be saved: cannot write `";
    let place = Place::new(User::Root, &patient());
    tool("unshare", "util-linux");
    let disk = place.project.root.join("state/rollout");
    let daemon = place.serve_by(&["unshare", "--mount", "sh", "-c", SMALL, "sh", path(&disk)], &[]);
    let filler = PathBuf::from(format!("/proc/{}/root{}/filler", daemon.running.pid(), path(&disk)));
    promoted(&place, "1.0", "").code(0);
    place.release("2.0");
    let client = place.client("prod.test", "h1,h2,upload,ws,sse");
    fill(&filler);
    // It is said wherever somebody may look, and nothing begins.
    let mut promotion = place.verb(&["promote", "--to", "prod", "--release", "2.0"]).start();
    promotion.wait_for(WHY);
    let status = place.wait("prod", |status| status["message"].as_str().is_some_and(|message| message.contains(WHY)));
    assert_eq!((&status["live"]["version"], &status["other"]), (&"1.0".into(), &Value::Null), "{status:#}");
    place.verb(&["status", "tiny/prod"]).ok().prints(WHY).says(WHY);
    assert!(daemon.running.stderr().contains(WHY), "{}", daemon.running.stderr());
    let paused = place.verb(&["rollout", "pause", "prod"]).run();
    assert!(!paused.status.success());
    paused.says(WHY);
    client.end().loses_nothing();
    // What serves is kept up all the same.
    comes_again(&place, &live(&place), || {});
    assert_eq!(place.get("prod.test", "/version"), "1.0");
    assert!(!promotion.is_over(), "{}", promotion.stdout());
    let client = place.client("prod.test", "h1,h2,upload,ws,sse");
    fs_err::remove_file(&filler).unwrap();
    promotion.wait(PATIENCE).code(0);
    assert_eq!(place.get("prod.test", "/version"), "2.0");
    let status = place.wait("prod", |status| status["rollout"]["outcome"] != Value::Null);
    assert_eq!(status["message"], Value::Null, "{status:#}");
    client.end().loses_nothing();
    place.is_sound();
    daemon.stop();
    place.stop_all();
}

/// What an instance's shim noted of itself: its process, and when that started.
fn shim(place: &Place, id: &str) -> Option<String> {
    let text = fs_err::read_to_string(place.project.root.join("state/instances").join(id).join("pid")).ok()?;
    text.lines().next().map(str::to_owned)
}

/// The processes of an instance's program: those of its name that have a file of the instance.
fn programs(id: &str) -> Vec<Pid> {
    let found = fs_err::read_dir("/proc").unwrap().flatten().filter_map(|process| {
        let read =
            |name: &str| String::from_utf8_lossy(&fs_err::read(process.path().join(name)).unwrap_or_default()).into_owned();
        let is_it = read("cmdline").starts_with("/usr/bin/load\0upstream\0") && read("mountinfo").contains(id);
        Pid::from_raw(process.file_name().to_str()?.parse().ok()?).filter(|_| is_it)
    });
    found.collect()
}

/// Kills all that there is of these instances: what a shim owns ends with it.
fn end_shims(place: &Place, ids: &[String]) {
    for id in ids {
        let noted = shim(place, id).unwrap();
        let process = Pid::from_raw(noted.split(' ').next().unwrap().parse().unwrap()).unwrap();
        kill_process(process, Signal::KILL).unwrap();
    }
}

/// The same with those of what is live; then `happens`, and all are started again.
fn comes_again(place: &Place, ids: &[String], happens: impl FnOnce()) {
    let before: Vec<Option<String>> = ids.iter().map(|id| shim(place, id)).collect();
    end_shims(place, ids);
    happens();
    place.wait("prod", |status| {
        let again = ids.iter().zip(&before).all(|(id, before)| shim(place, id).is_some_and(|now| Some(&now) != before.as_ref()));
        again && status["live"]["healthy"] == status["live"]["wanted"]
    });
}

/// The instances of what is live.
fn live(place: &Place) -> Vec<String> {
    let status = place.status("prod");
    let instances = status["live"]["instances"].as_array().unwrap().iter();
    instances.map(|instance| instance["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn blue_that_dies_during_a_rollout() {
    let place = Place::new(me(), &patient().replace("period: 1s", "period: 15s"));
    let daemon = place.serve(&[]);
    promoted(&place, "1.0", "").code(0);
    let starts = |version: &str, options: &str| {
        place.release_that(version, options);
        decide(&place, version);
        place.wait("prod", |status| status["rollout"]["version"] == version && status["rollout"]["phase"] == "starting");
    };
    // Its programs, while green starts: their shims start them again.
    starts("2.0", "--healthy-after 600");
    for process in live(&place).iter().flat_map(|id| programs(id)) {
        kill_process(process, Signal::KILL).unwrap();
    }
    let restarted = |instance: &Value| instance["restarts"].as_u64() > Some(0) && instance["healthy"] == true;
    place.wait("prod", |status| status["live"]["instances"].as_array().unwrap().iter().all(restarted));
    assert_eq!(place.get("prod.test", "/version"), "1.0");
    // All of it, while green starts, and green never comes: it is started again.
    comes_again(&place, &live(&place), || drop(place.verb(&["rollout", "abort", "prod"]).ok()));
    assert_eq!(place.get("prod.test", "/version"), "1.0");
    place.wait("prod", |_| place.verb(&["history", "prod"]).ok().stdout.contains("aborted by alice"));
    place.verb(&["hold", "prod", "--lift"]).ok();
    // All of it, while green starts: green comes.
    starts("3.0", "--healthy-after 4");
    end_shims(&place, &live(&place));
    place.wait("prod", |status| status["rollout"]["phase"] == "watching");
    assert_eq!(place.get("prod.test", "/version"), "3.0");
    // All of it, while the next one is watched, and that falls ill: blue starts first and serves then.
    let blue = live(&place);
    place.release_that("4.0", "--unhealthy-after 8");
    decide(&place, "4.0");
    place.wait("prod", |status| status["rollout"]["version"] == "4.0" && status["rollout"]["phase"] == "watching");
    end_shims(&place, &blue);
    let status = place.wait("prod", |status| status["rollout"]["outcome"] != Value::Null);
    assert_eq!(status["rollout"]["outcome"]["result"], "failed", "{status:#}");
    place.wait("prod", |status| status["live"]["version"] == "3.0" && status["live"]["healthy"] == 2);
    assert_eq!(place.get("prod.test", "/version"), "3.0");
    // Nothing is broken for ever.
    place.wait("prod", |_| place.verb(&["history", "prod"]).ok().stdout.contains("after the switch"));
    place.verb(&["hold", "prod", "--lift"]).ok();
    place.release("5.0");
    decide(&place, "5.0");
    place.wait("prod", |status| status["rollout"]["phase"] == "watching");
    assert_eq!(place.get("prod.test", "/version"), "5.0");
    place.is_sound();
    daemon.stop();
    place.stop_all();
}
