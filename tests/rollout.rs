//! Rollouts with the program as people call it: a daemon, an application that is easy to check, a client that counts every
//! request, and promotions, rollbacks, upgrades and kills of the daemon meanwhile.

#[path = "rollout/aborts.rs"]
mod aborts;
#[path = "rollout/bad_days.rs"]
mod bad_days;
mod common;
#[path = "rollout/crashes.rs"]
mod crashes;
#[allow(dead_code, reason = "the program has more than these tests need")]
#[path = "load/program.rs"]
mod load;
#[path = "rollout/place.rs"]
mod place;
#[path = "rollout/targets.rs"]
mod targets;

use common::{me, users};
use place::Place;

/// Two environments whose instances are on this machine.
pub const LOCAL: &str = "\
environments:
  dev:
    automatic: true
    target: { local: {} }
    routes: [ { host: dev.test } ]
    rollout: { drain: 5s, streams: 2s, watch: { period: 1s } }
  prod:
    from: dev
    gates: [ { healthy: true } ]
    target: { local: { instances: 2 } }
    routes: [ { host: prod.test } ]
    config: { GREETING: hello }
    rollout: { deadline: 30s, drain: 10s, streams: 3s, watch: { period: 2s } }
";

#[test]
fn a_promotion_and_a_rollback_lose_nothing() {
    for user in users() {
        let place = Place::new(user, LOCAL);
        let daemon = place.serve(&[]);
        place.release("1.0");
        place.wait_for("dev", "1.0");
        place.verb(&["promote", "--to", "prod"]).ok().says("healthy 2/2");
        let client = place.client("prod.test", "h1,h1,h2,upload,ws,sse");
        place.release("2.0");
        place.wait_for("dev", "2.0");
        let promoted = place.verb(&["promote", "--to", "prod"]).ok();
        promoted.says("healthy 2/2").says("switch");
        assert_eq!(place.get("prod.test", "/version"), "2.0");
        let back = place.verb(&["rollback", "prod", "--reason", "a test"]).ok();
        back.says("under a second");
        assert_eq!(place.get("prod.test", "/version"), "1.0");
        let report = client.end();
        report.loses_nothing();
        report.was_answered_by(&["1.0", "2.0"]);
        // 1000 answers the client, when it ends.
        assert!(report.close_codes().iter().all(|code| ["1000", "1001", "1012"].contains(&code.as_str())), "{report:?}");
        // What it says is what is.
        let status = place.status("prod");
        assert_eq!(status["live"]["version"], "1.0", "{status:#}");
        assert_eq!(status["live"]["healthy"], 2, "{status:#}");
        assert_eq!(place.verb(&["exec", "prod", "--", "cat", "/opt/app/version"]).ok().stdout, "1.0");
        place.verb(&["logs", "prod"]).ok().prints("listening at");
        place.is_sound();
        daemon.stop();
        // The applications run on without the daemon, and are found again.
        let again = place.serve(&[]);
        assert_eq!(place.get("prod.test", "/version"), "1.0");
        again.stop();
        place.stop_all();
    }
}

#[test]
fn the_daemon_is_replaced_and_killed() {
    let place = Place::new(me(), LOCAL);
    let mut daemon = place.serve(&[]);
    place.release("1.0");
    place.wait_for("dev", "1.0");
    place.verb(&["promote", "--to", "prod"]).ok();
    // Replaced: nothing is refused, nothing is cut.
    let client = place.client("prod.test", "h1,h1,h2,upload,ws,sse");
    for _ in 0..3 {
        daemon = daemon.replaced();
    }
    let report = client.end();
    report.loses_nothing();
    // Killed: only what was in flight may be lost, and no connection is refused.
    let client = place.client("prod.test", "h1");
    for _ in 0..3 {
        daemon = daemon.killed();
        place.get("prod.test", "/version");
    }
    let report = client.end();
    report.loses_only_what_was_in_flight(3);
    daemon.stop();
    place.stop_all();
}

#[test]
fn without_draining_the_same_client_reports_losses() {
    let text = LOCAL.replace("drain: 10s, streams: 3s", "drain: 0s, streams: 0s, warm: 0s");
    let place = Place::new(me(), &text);
    let daemon = place.serve(&[]);
    place.release("1.0");
    place.wait_for("dev", "1.0");
    place.verb(&["promote", "--to", "prod"]).ok();
    let client = place.client("prod.test", "large,large,upload,h1");
    for version in ["2.0", "3.0"] {
        place.release(version);
        place.wait_for("dev", version);
        place.verb(&["promote", "--to", "prod"]).ok();
    }
    let report = client.end();
    assert!(report.lost() > 0, "{report:?}");
    daemon.stop();
    place.stop_all();
}
