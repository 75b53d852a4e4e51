//! A rollout that somebody ends, in each of its phases: what was there before serves, and nobody who asks notices.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use super::bad_days::{alone, promoted};
use super::common::me;
use super::place::Place;

/// Files of the project for which the checks before and after the switch wait.
const CHECKS: [&str; 2] = ["before", "after"];

/// A check that goes on as long as the file is there.
fn while_there(file: &str) -> String {
    format!("[ {{ command: [/bin/sh, -c, \"while [ -e {file} ]; do sleep 0.05; done\"], timeout: 60s }} ]")
}

/// Ends a check that waits, and lets what is promoted come again.
fn go_on(place: &Place) {
    for file in CHECKS {
        let _ = fs_err::remove_file(place.project.path(file));
    }
    place.verb(&["hold", "prod", "--lift"]).ok();
}

fn is_in(status: &Value, version: &str, phase: &str) -> bool {
    status["rollout"]["version"] == version && status["rollout"]["phase"] == phase
}

/// Asks for something that takes so long, on a connection of its own; its answer comes from the thread.
fn slow(place: &Place, milliseconds: u64) -> std::thread::JoinHandle<String> {
    let mut stream = TcpStream::connect(place.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(milliseconds) + Duration::from_secs(60))).unwrap();
    write!(stream, "GET /slow?ms={milliseconds} HTTP/1.1\r\nHost: prod.test\r\nConnection: close\r\n\r\n").unwrap();
    std::thread::spawn(move || {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    })
}

#[test]
fn in_each_phase() {
    let checks = format!("pre_switch: {}, post_switch: {}", while_there(CHECKS[0]), while_there(CHECKS[1]));
    let text = alone()
        .replace("deadline: 3s", &format!("deadline: 60s, {checks}"))
        .replace("period: 2s", "period: 60s, minimum: 1000000");
    let place = Place::new(me(), &text);
    let daemon = place.serve(&[]);
    promoted(&place, "1.0", "").code(0);
    let client = place.client("prod.test", "h1,h2,upload,ws,large");
    // Longer than `drain`: what comes back is not cut by it.
    let drained = slow(&place, 12_000);
    for (number, phase) in ["draining", "waiting", "starting", "pre-switch", "post-switch", "watching"].into_iter().enumerate() {
        let version = format!("2.{number}");
        place.release_that(&version, if phase == "starting" { "--healthy-after 600" } else { "" });
        match phase {
            "waiting" => drop(place.verb(&["rollout", "pause", "prod"]).ok()),
            "pre-switch" => place.project.write(CHECKS[0], ""),
            "post-switch" => place.project.write(CHECKS[1], ""),
            _ => {}
        }
        place.verb(&["promote", "--to", "prod", "--release", &version, "--no-wait"]).ok();
        place.wait("prod", |status| match phase {
            "draining" => is_in(status, &version, "watching") && status["other"]["in_flight"].as_u64() > Some(0),
            _ => is_in(status, &version, phase),
        });
        let switched = ["draining", "post-switch", "watching"].contains(&phase);
        assert_eq!(place.get("prod.test", "/version"), if switched { &version } else { "1.0" }, "{phase}");
        place.verb(&["rollout", "abort", "prod", "--reason", &format!("no more {phase}")]).ok();
        let status = place.wait("prod", |status| status["rollout"]["outcome"] != Value::Null);
        assert_eq!(status["rollout"]["outcome"]["result"], "aborted", "{phase}: {status:#}");
        assert_eq!(status["live"]["version"], "1.0", "{phase}: {status:#}");
        assert_eq!(place.get("prod.test", "/version"), "1.0", "{phase}");
        // The ledger has it too, and with it a hold.
        let row = |place: &Place| place.verb(&["--json", "status", "tiny/prod"]).ok().json()["environments"][0].clone();
        place.wait("prod", |_| row(&place)["version"] == "1.0" && row(&place)["hold"] != Value::Null);
        place.verb(&["history", "prod"]).ok().prints(&format!("aborted by alice: no more {phase}"));
        if phase == "waiting" {
            place.verb(&["rollout", "resume", "prod"]).ok();
        }
        go_on(&place);
        // There is nothing more to abort.
        place.verb(&["rollout", "abort", "prod"]).run().code(1).says("no rollout goes on");
    }
    let report = client.end();
    report.loses_nothing();
    assert!(report.close_codes().iter().all(|code| ["1000", "1001", "1012"].contains(&code.as_str())), "{report:?}");
    let answer = drained.join().unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("1.0"), "{answer}");
    place.is_sound();
    daemon.stop();
    place.stop_all();
}

/// Two that switch together: one waits for the other, and when one is aborted neither switches.
#[test]
fn while_it_waits_for_what_switches_together_with_it() {
    let prod = alone().replace("deadline: 3s", "deadline: 60s").replace("rollout: {", "together: both\n    rollout: {");
    let twin = prod.split_once("  prod:\n").unwrap().1.replace("prod.test", "twin.test");
    let twin = twin.replace("deadline: 60s", &format!("deadline: 60s, pre_switch: {}", while_there(CHECKS[0])));
    let place = Place::new(me(), &format!("{prod}  twin:\n{twin}"));
    let daemon = place.serve(&[]);
    place.release("1.0");
    for environment in ["prod", "twin"] {
        place.verb(&["promote", "--to", environment, "--release", "1.0"]).ok();
    }
    place.project.write(CHECKS[0], "");
    place.release("2.0");
    place.verb(&["promote", "--to", "twin", "--release", "2.0", "--no-wait"]).ok();
    place.wait("twin", |status| is_in(status, "2.0", "pre-switch"));
    place.verb(&["promote", "--to", "prod", "--release", "2.0", "--no-wait"]).ok();
    place.wait("prod", |status| is_in(status, "2.0", "switching"));
    place.verb(&["rollout", "abort", "prod", "--reason", "not both"]).ok();
    for (environment, result, why) in [("prod", "aborted", "aborted by alice: not both"), ("twin", "failed", "`tiny/prod`")] {
        let status = place.wait(environment, |status| status["rollout"]["outcome"] != Value::Null);
        assert_eq!(
            (&status["rollout"]["outcome"]["result"], &status["live"]["version"]),
            (&result.into(), &"1.0".into()),
            "{status:#}"
        );
        assert!(status["rollout"]["outcome"]["reason"].as_str().unwrap().contains(why), "{status:#}");
        assert_eq!(place.get(&format!("{environment}.test"), "/version"), "1.0");
    }
    go_on(&place);
    place.is_sound();
    daemon.stop();
    place.stop_all();
}
