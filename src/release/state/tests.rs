//! Decisions that are not planned: holds, freezes, approvals, reports; what is remembered and what is needed.

use super::*;
use crate::release::promotion::{Action, Back};
use crate::release::sample::{PEOPLE, World, at, release};

const LINE: &str =
    "environments: { dev: {}, prod: { from: dev, target: { local: {} }, gates: [ { approve: { count: 1, role: qa } } ] } }\n";

fn world() -> World {
    let mut world = World::new(&format!("{PEOPLE}{LINE}"));
    world.promote("dev", "1.0", "09:00");
    world
}

#[test]
fn decisions_that_change_nothing_or_something_else_are_refused() {
    type Set = fn(&mut Decision);
    let cases: [(&str, Kind, Set, Why); 18] = [
        ("prod", Kind::Lift, |_| {}, Why::Nothing),
        ("prod", Kind::Thaw, |_| {}, Why::Nothing),
        ("prod", Kind::Clear, |decision| decision.to = Some(release("1.0")), Why::Nothing),
        ("prod", Kind::Clear, |_| {}, Why::Stale),
        ("prod", Kind::Freeze, |_| {}, Why::NoReason),
        ("prod", Kind::Apply, |_| {}, Why::NoRole),
        ("prod", Kind::Promote, |_| {}, Why::Stale),
        ("prod", Kind::Promote, |decision| decision.to = Some(release("9")), Why::NotUpstream),
        ("prod", Kind::Enter, |decision| decision.to = Some(release("1.0")), Why::NotUpstream),
        ("prod", Kind::Rollback, |decision| decision.to = Some(release("1.0")), Why::NoRollback),
        ("dev", Kind::Rollback, |decision| decision.to = Some(release("1.0")), Why::NoRollback),
        ("prod", Kind::Configure, |_| {}, Why::Stale),
        ("prod", Kind::Configure, |decision| decision.configuration = Some(Configuration::default()), Why::Stale),
        (
            "dev",
            Kind::Approve,
            |decision| (decision.to, decision.config) = (Some(release("1.0")), Some(release("x"))),
            Why::Nothing,
        ),
        (
            "prod",
            Kind::Approve,
            |decision| (decision.to, decision.config) = (Some(release("1.0")), Some(release("x"))),
            Why::Stale,
        ),
        ("dev", Kind::Report, |decision| decision.health = Some(Status::Healthy), Why::Nothing),
        ("prod", Kind::Report, |_| {}, Why::Stale),
        (
            "prod",
            Kind::Report,
            |decision| {
                (decision.to, decision.config, decision.health) =
                    (Some(release("1.0")), Some(release("x")), Some(Status::Healthy))
            },
            Why::Stale,
        ),
    ];
    for (environment, kind, set, why) in cases {
        let mut world = world();
        let before = world.states.clone();
        assert_eq!(
            world.decide(environment, kind, "10:00", set).map_err(|refused| refused.why),
            Err(why),
            "{environment} {kind}"
        );
        assert_eq!(world.states, before);
    }
}

#[test]
fn approvals_need_the_role_once_and_the_signature() {
    let mut world = world();
    // ada has the role `approve`, and this gate asks for `qa`.
    assert_eq!(world.approve("ada", "prod", "1.0", "09:10").unwrap_err().why, Why::NoRole);
    assert_eq!(world.approve("mallory", "prod", "1.0", "09:10").unwrap_err().why, Why::NotAPerson);
    world.actor.1 = false;
    assert_eq!(world.approve("bob", "prod", "1.0", "09:10").unwrap_err().why, Why::NotSigned);
    world.actor.1 = true;
    world.approve("bob", "prod", "1.0", "09:10").unwrap();
    assert_eq!(world.approve("bob", "prod", "1.0", "09:11").unwrap_err().why, Why::Nothing);
    let config = world.state("prod").configuration(&world.policy.environments["prod"]).digest();
    let approval =
        Approval { release: release("1.0"), config, by: "bob".into(), signed: true, reason: String::new(), time: at("09:10") };
    assert_eq!(world.state("prod").approvals, [approval]);
}

#[test]
fn holds_and_freezes_come_and_go() {
    let mut world = world();
    world.decide("prod", Kind::Hold, "09:30", |decision| decision.reason = "look first".into()).unwrap();
    let hold = Hold { by: "eve".into(), reason: "look first".into(), since: at("09:30"), set_by: Kind::Hold };
    assert_eq!(world.state("prod").hold, Some(hold));
    world.decide("prod", Kind::Lift, "09:31", |_| {}).unwrap();
    assert_eq!(world.state("prod").hold, None);
    world
        .decide("prod", Kind::Freeze, "09:32", |decision| (decision.reason, decision.until) = ("fair".into(), Some(at("10:00"))))
        .unwrap();
    world.decide("prod", Kind::Freeze, "09:33", |decision| decision.reason = "incident".into()).unwrap();
    assert_eq!(world.state("prod").freezes.len(), 2);
    assert_eq!(world.state("prod").frozen(&world.frozen, at("11:00")).unwrap().reason, "incident");
    // One that is over is forgotten by who freezes again, and not by the clock of anybody else.
    world.decide("prod", Kind::Hold, "10:00", |_| {}).unwrap();
    assert_eq!(world.state("prod").freezes.len(), 2);
    world.decide("prod", Kind::Freeze, "10:00", |decision| decision.reason = "again".into()).unwrap();
    assert_eq!(world.state("prod").freezes.len(), 2);
    world.decide("prod", Kind::Thaw, "10:01", |_| {}).unwrap();
    assert_eq!(world.state("prod").freezes, []);
}

#[test]
fn a_target_is_unknown_until_something_reports() {
    let mut world = world();
    world.approve("bob", "prod", "1.0", "09:10").unwrap();
    world.promote("prod", "1.0", "09:20");
    assert_eq!(world.state("dev").health, Health { status: Status::Healthy, since: at("09:00"), doubtful: false });
    assert_eq!(world.state("prod").health, Health { status: Status::Unknown, since: at("09:20"), doubtful: false });
    let pair = world.state("prod").current.as_ref().unwrap().pair();
    for (status, time, since) in [
        (Status::Healthy, "09:21", "09:21"),
        (Status::Healthy, "09:25", "09:21"),
        (Status::Unknown, "09:30", "09:30"),
        (Status::Healthy, "09:40", "09:40"),
    ] {
        world
            .decide("prod", Kind::Report, time, |decision| {
                (decision.to, decision.config, decision.health) = (Some(pair.0), Some(pair.1), Some(status));
            })
            .unwrap();
        assert_eq!(world.state("prod").health, Health { status, since: at(since), doubtful: false });
    }
    assert_eq!(world.state("prod").soaked(&release("1.0"), at("10:00")), Some(1200));
    assert_eq!(world.state("prod").previous.as_deref(), Some("0123"));
}

#[test]
fn history_is_bounded_and_what_is_needed_is_kept() {
    let mut world = World::new("environments: { dev: {} }\n");
    for index in 0..60 {
        world.promote("dev", &index.to_string(), &format!("{:02}:{:02}", 9 + index / 60, index % 60));
    }
    assert_eq!((world.state("dev").before.len(), world.state("dev").before[49].binding.version.as_str()), (50, "9"));
    let needed = world.state("dev").needed(3);
    let expected: BTreeSet<Digest> = ["59", "58", "57", "56"].map(release).into();
    assert_eq!(needed, expected);
    // A rollback past what is kept still finds its release.
    let request = world.request("dev", Action::Rollback(Back::To(release("20"))), "12:00");
    world.run(&request).unwrap();
    for version in ["58", "57"] {
        let reason = Bad { version: version.into(), by: "eve".into(), reason: String::new(), since: at("12:00") };
        world.states.get_mut("dev").unwrap().bad.insert(release(version), reason);
    }
    let needed = world.state("dev").needed(1);
    assert_eq!(needed, BTreeSet::from(["20", "59", "56"].map(release)));
}

#[test]
fn a_state_is_json_that_reads_like_the_field() {
    let world = world();
    let value: serde_json::Value = serde_json::from_slice(&world.state("dev").bytes()).unwrap();
    assert_eq!(
        value,
        serde_json::json!({
            "format": 1, "pipeline": "shop", "environment": "dev",
            "current": {
                "release": release("1.0").to_string(), "version": "1.0", "config": { "values": {}, "secrets": {} },
                "since": "2026-11-20T09:00:00Z", "by": "eve", "author": "ada",
            },
            "before": [], "config": { "values": {}, "secrets": {} }, "declared": { "values": {}, "secrets": {} },
            "hold": null, "freezes": [], "approvals": [], "bad": {},
            "health": { "status": "healthy", "since": "2026-11-20T09:00:00Z" },
            "previous": "0123",
            "decision": {
                "kind": "promote", "actor": "eve", "signed": true, "to": release("1.0").to_string(), "version": "1.0",
                "author": "ada", "config": Configuration::default().digest().to_string(), "time": "2026-11-20T09:00:00Z",
            },
        })
    );
    let newer = String::from_utf8(world.state("dev").bytes()).unwrap().replacen("\"format\": 1", "\"format\": 2", 1);
    assert!(State::parse(newer.as_bytes()).unwrap_err().to_string().contains("written by a newer pipeline"));
}
