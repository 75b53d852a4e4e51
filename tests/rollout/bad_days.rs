//! Green that never gets there, green that fails, decisions in the middle of a rollout, and a state that is not sound.

use serde_json::Value;

use super::LOCAL;
use super::common::me;
use super::place::Place;

/// With 1.0 in both.
fn settled(environments: &str) -> Place {
    let place = Place::new(me(), environments);
    {
        let daemon = place.serve(&[]);
        place.release("1.0");
        place.wait_for("dev", "1.0");
        place.verb(&["promote", "--to", "prod"]).ok();
        daemon.stop();
    }
    place
}

/// Straight to prod, whatever dev makes of it.
pub fn alone() -> String {
    let prod = LOCAL.split_once("  prod:\n").unwrap().1;
    let prod = prod.replace("    from: dev\n    gates: [ { healthy: true } ]\n", "").replace("deadline: 30s", "deadline: 3s");
    format!("environments:\n  prod:\n{prod}")
}

/// Builds and promotes a release whose application runs with `options`.
pub fn promoted(place: &Place, version: &str, options: &str) -> super::common::Answer {
    place.release_that(version, options);
    place.verb(&["promote", "--to", "prod", "--release", version]).run()
}

#[test]
fn green_that_fails_leaves_blue_alone() {
    let place = Place::new(me(), &alone());
    let daemon = place.serve(&[]);
    promoted(&place, "1.0", "").code(0);
    for (version, options, why) in
        [("2.0", "--healthy-after 600", "healthy"), ("2.1", "--die-after 0", "end"), ("2.2", "--nonsense", "failed")]
    {
        let client = place.client("prod.test", "h1,h2,ws");
        let answer = promoted(&place, version, options);
        answer.code(1).says(why);
        assert_eq!(place.get("prod.test", "/version"), "1.0");
        client.end().loses_nothing();
        // The ledger says who took it back and why, and nothing brings it again.
        let history = place.verb(&["history", "prod"]).ok();
        history.prints("rollback").prints("pipeline");
        place.verb(&["status", "tiny/prod"]).ok().prints("HOLD");
        let again = place.verb(&["promote", "--to", "prod", "--release", version, "--lift"]).run();
        again.code(1).says("marked bad");
        place.verb(&["hold", "prod", "--lift"]).ok();
        place.is_sound();
    }
    daemon.stop();
    place.stop_all();
}

#[test]
fn green_that_fails_after_the_switch_goes_back_by_itself() {
    let place = Place::new(me(), &alone().replace("watch: { period: 2s }", "watch: { period: 10s, minimum: 5 }"));
    let daemon = place.serve(&[]);
    promoted(&place, "1.0", "").code(0);
    let client = place.client("prod.test", "h1");
    let answer = promoted(&place, "2.0", "--error-every 2");
    answer.code(1).prints("failed after the switch").prints("1.0 serves");
    place.wait("prod", |status| status["live"]["version"] == "1.0");
    let report = client.end();
    // Its own errors reached people, and nothing else did.
    report.was_answered_by(&["1.0", "2.0"]);
    place.verb(&["status", "tiny/prod"]).ok().prints("HOLD");
    place.is_sound();
    daemon.stop();
    place.stop_all();
}

#[test]
fn decisions_in_the_middle_of_a_rollout() {
    let place = Place::new(me(), &alone().replace("deadline: 3s", "deadline: 60s"));
    let daemon = place.serve(&[]);
    promoted(&place, "1.0", "").code(0);
    // Superseded before the switch.
    place.release_that("2.0", "--healthy-after 600");
    place.verb(&["promote", "--to", "prod", "--release", "2.0", "--no-wait"]).ok();
    place.wait("prod", |status| status["rollout"]["phase"] == "starting" && status["rollout"]["version"] == "2.0");
    promoted(&place, "3.0", "").code(0);
    assert_eq!(place.get("prod.test", "/version"), "3.0");
    // Taken back before the switch: to what serves, whether or not the ledger was told yet that it is healthy.
    place.release_that("4.0", "--healthy-after 600");
    place.verb(&["promote", "--to", "prod", "--release", "4.0", "--no-wait"]).ok();
    place.wait("prod", |status| status["rollout"]["phase"] == "starting" && status["rollout"]["version"] == "4.0");
    place.verb(&["rollback", "prod"]).ok();
    assert_eq!(place.get("prod.test", "/version"), "3.0");
    place.verb(&["hold", "prod", "--lift"]).ok();
    // Aborted before the switch.
    place.release_that("5.0", "--healthy-after 600");
    place.verb(&["promote", "--to", "prod", "--release", "5.0", "--no-wait"]).ok();
    place.wait("prod", |status| status["rollout"]["phase"] == "starting" && status["rollout"]["version"] == "5.0");
    place.verb(&["rollout", "abort", "prod", "--reason", "not now"]).ok();
    place.wait("prod", |status| status["rollout"]["outcome"] != Value::Null);
    assert_eq!(place.get("prod.test", "/version"), "3.0");
    // Maintenance answers for it.
    place.verb(&["maintenance", "on", "prod", "--message", "back at nine"]).ok();
    let (status, body) = place.ask("prod.test", "/version");
    assert!(status == 503 && body.contains("back at nine"), "{status} {body}");
    place.verb(&["maintenance", "off", "prod"]).ok();
    assert_eq!(place.get("prod.test", "/version"), "3.0");
    place.is_sound();
    daemon.stop();
    place.stop_all();
}

#[test]
fn a_state_that_is_not_sound_is_refused_and_kept() {
    let place = settled(LOCAL);
    let file = place.project.root.join("state/rollout/state.json");
    let mut bytes = fs_err::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs_err::write(&file, &bytes).unwrap();
    let daemon = place.serve(&[]);
    assert!(daemon.running.stderr().contains("state.json"), "{}", daemon.running.stderr());
    assert_eq!(place.get("prod.test", "/version"), "1.0");
    assert_eq!(fs_err::read(&file).unwrap(), bytes, "it was overwritten");
    daemon.stop();
    place.stop_all();
}

#[test]
fn two_daemons_of_one_root_are_refused() {
    let place = Place::new(me(), LOCAL);
    let daemon = place.serve(&[]);
    let second = place.verb(&["serve", "--listen", "127.0.0.1:0"]).run();
    assert!(!second.status.success());
    second.says("error: ").says(&daemon.running.pid().to_string());
    daemon.stop();
    place.verb(&["rollout", "pause", "prod"]).run().says("pipeline serve");
    place.stop_all();
}
