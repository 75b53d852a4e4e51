//! Every gate: allow, deny, unknown, hang, crash, malformed, clock back; wrong key, right key over other bytes.

use serde_json::json;

use super::*;
use crate::release::decision::{Kind, Status};
use crate::release::sample::{Fake, KEY, PEOPLE, World, at, release};

fn gate(check: serde_json::Value) -> Gate {
    let mut value = check;
    value["name"] = json!("g");
    let gate: Gate = serde_json::from_value(value.clone()).unwrap();
    let again: Gate = serde_json::from_value(serde_json::to_value(&gate).unwrap()).unwrap();
    assert_eq!(gate, again, "{value}");
    gate
}

/// `1.0` asked about for `prod` at `time`.
fn question<'q>(world: &'q World, time: &str) -> Question<'q> {
    let config = world.state("prod").configuration(&world.policy.environments["prod"]).digest();
    Question {
        view: world.view(),
        environment: "prod",
        release: release("1.0"),
        version: "1.0",
        author: Some("ada"),
        config,
        actor: "eve",
        reason: "because\0of",
        time: at(time),
    }
}

fn shown(answer: &Answer) -> String {
    format!("{} {}", answer.verdict, answer.reason)
}

const GRAPH: &str = "environments: { stage: { target: { local: {} } }, prod: { from: stage, gates: [ { approve: 2 } ] } }\n";

fn report(world: &mut World, status: Status, time: &str) {
    let pair = world.state("stage").current.as_ref().unwrap().pair();
    world
        .decide("stage", Kind::Report, time, |decision| {
            (decision.to, decision.config, decision.health) = (Some(pair.0), Some(pair.1), Some(status));
        })
        .unwrap();
}

#[test]
fn healthy_and_soak() {
    type Play = fn(&mut World);
    let cases: [(&str, Play, &str, &str, &str, Option<&str>); 12] = [
        (
            "never there",
            |_| {},
            "12:00",
            "deny was never in shop/stage",
            "deny 0s of 10m in shop/stage, and it is there no more",
            None,
        ),
        (
            "nobody knows",
            |world| world.promote("stage", "1.0", "10:00"),
            "12:00",
            "unknown nobody knows how it does in shop/stage",
            "unknown not known to be healthy in shop/stage",
            None,
        ),
        (
            "healthy, too short",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "10:05");
            },
            "10:10",
            "allow in shop/stage since 2026-11-20T10:05:00Z",
            "deny 5m of 10m in shop/stage",
            Some("10:15"),
        ),
        (
            "healthy, just long enough",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "10:05");
            },
            "10:15",
            "allow in shop/stage since 2026-11-20T10:05:00Z",
            "allow in shop/stage for 10m",
            None,
        ),
        (
            "a break starts it again",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "10:05");
                report(world, Status::Unhealthy, "11:00");
                report(world, Status::Healthy, "11:01");
            },
            "11:05",
            "allow in shop/stage since 2026-11-20T11:01:00Z",
            "deny 4m of 10m in shop/stage",
            Some("11:11"),
        ),
        (
            "unhealthy now",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "10:05");
                report(world, Status::Unhealthy, "11:00");
            },
            "12:00",
            "deny unhealthy in shop/stage since 2026-11-20T11:00:00Z",
            "deny not known to be healthy in shop/stage",
            None,
        ),
        (
            "replaced after it soaked",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "10:05");
                world.promote("stage", "1.1", "11:05");
            },
            "11:06",
            "allow in shop/stage until 2026-11-20T11:05:00Z",
            "allow in shop/stage for 1h",
            None,
        ),
        (
            "replaced while it was unhealthy",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "10:05");
                report(world, Status::Unhealthy, "11:00");
                world.promote("stage", "1.1", "11:05");
            },
            "11:06",
            "deny was not healthy in shop/stage when it left on 2026-11-20T11:05:00Z",
            "deny 0s of 10m in shop/stage, and it is there no more",
            None,
        ),
        (
            "the clock is before it came",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "10:05");
            },
            "10:04",
            "allow in shop/stage since 2026-11-20T10:05:00Z",
            "unknown the clock went back since the release came to shop/stage",
            None,
        ),
        (
            "the clock is before the last thing that happened there",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "10:05");
                report(world, Status::Healthy, "12:00");
            },
            "11:00",
            "allow in shop/stage since 2026-11-20T10:05:00Z",
            "unknown the clock went back since the release came to shop/stage",
            None,
        ),
        (
            "it came while the clock was behind",
            |world| {
                world.promote("stage", "0.9", "10:00");
                world.promote("stage", "1.0", "09:00");
                report(world, Status::Healthy, "10:01");
            },
            "12:00",
            "allow in shop/stage since 2026-11-20T10:01:00Z",
            "unknown the clock went back since the release came to shop/stage",
            None,
        ),
        (
            "it became healthy while the clock was behind",
            |world| {
                world.promote("stage", "1.0", "10:00");
                report(world, Status::Healthy, "09:00");
            },
            "12:00",
            "allow in shop/stage since 2026-11-20T09:00:00Z",
            "unknown the clock went back since the release came to shop/stage",
            None,
        ),
    ];
    for (what, play, time, healthy, soak, next) in cases {
        let mut world = World::new(GRAPH);
        play(&mut world);
        let question = question(&world, time);
        assert_eq!(shown(&known(&gate(json!({ "healthy": true })), &question).unwrap()), healthy, "{what}");
        let answer = known(&gate(json!({ "soak": "10m" })), &question).unwrap();
        assert_eq!((shown(&answer).as_str(), answer.next), (soak, next.map(at)), "{what}");
    }
}

#[test]
fn soak_upstream_any_and_all() {
    let graph = |rule: &str| format!("environments: {{ a: {{}}, b: {{}}, prod: {{ from: {{ {rule}: [a, b] }} }} }}\n");
    let cases = [
        ("any", "12:00", "allow in shop/a for 2h", None),
        ("any", "10:01", "deny 1m of 1h in shop/a", Some("11:00")),
        ("all", "12:00", "deny 30m of 1h in shop/b", Some("12:30")),
        ("all", "10:01", "deny 0s of 1h in shop/b, and it is there no more", None),
        ("all", "13:00", "allow in shop/a for 3h", None),
    ];
    for (rule, time, expected, next) in cases {
        let mut world = World::new(&graph(rule));
        world.promote("a", "1.0", "10:00");
        if at(time) > at("11:30") {
            world.promote("b", "1.0", "11:30");
        }
        let answer = known(&gate(json!({ "soak": "1h" })), &question(&world, time)).unwrap();
        assert_eq!((shown(&answer).as_str(), answer.next), (expected, next.map(at)), "{rule} {time}");
    }
}

#[test]
fn approvals() {
    type Play = fn(&mut World);
    let two = json!({ "approve": { "count": 2, "role": "qa" } });
    let one = json!({ "approve": { "count": 1, "role": "approve" } });
    let cases: [(&str, &str, Play, &serde_json::Value, &str); 10] = [
        ("none", PEOPLE, |_| {}, &two, "deny 0 of 2 approvals"),
        (
            "one of two",
            PEOPLE,
            |world| world.approve("bob", "prod", "1.0", "09:00").unwrap(),
            &two,
            "deny 1 of 2 approvals by bob",
        ),
        (
            "two of two",
            PEOPLE,
            |world| {
                world.approve("bob", "prod", "1.0", "09:00").unwrap();
                world.approve("eve", "prod", "1.0", "09:01").unwrap();
            },
            &two,
            "allow 2 of 2 approvals by bob, eve",
        ),
        (
            "of another release",
            PEOPLE,
            |world| world.approve("bob", "prod", "1.1", "09:00").unwrap(),
            &one,
            "deny 0 of 1 approvals",
        ),
        (
            "void: another configuration since",
            PEOPLE,
            |world| {
                world.approve("bob", "prod", "1.0", "09:00").unwrap();
                world.policy.environments.get_mut("prod").unwrap().config.insert("A".into(), "1".into());
            },
            &one,
            "deny 0 of 1 approvals; others were for another configuration",
        ),
        (
            "the role is gone since",
            PEOPLE,
            |world| {
                world.approve("bob", "prod", "1.0", "09:00").unwrap();
                world.policy.people.get_mut("bob").unwrap().roles.clear();
            },
            &one,
            "deny 0 of 1 approvals",
        ),
        (
            "the author alone",
            "",
            |world| world.approve("ada", "prod", "1.0", "09:00").unwrap(),
            &one,
            "deny 1 of 1 approvals by ada, who made the release: somebody else has to approve too",
        ),
        (
            "the author and somebody",
            "",
            |world| {
                world.approve("ada", "prod", "1.0", "09:00").unwrap();
                world.approve("bob", "prod", "1.0", "09:00").unwrap();
            },
            &one,
            "allow 2 of 1 approvals by ada, bob",
        ),
        (
            "nobody signs where nobody is known",
            "",
            |world| world.approve("bob", "prod", "1.0", "09:00").unwrap(),
            &one,
            "allow 1 of 1 approvals by bob",
        ),
        (
            "people came later: what was not signed does not count",
            "",
            |world| {
                world.approve("bob", "prod", "1.0", "09:00").unwrap();
                world.policy.people = World::new(&format!("{PEOPLE}{GRAPH}")).policy.people;
            },
            &one,
            "deny 0 of 1 approvals",
        ),
    ];
    for (what, people, play, check, expected) in cases {
        let graph = match people {
            "" => "environments: { stage: {}, prod: { from: stage, gates: [ { approve: 1 } ] } }\n".to_owned(),
            people => format!(
                "{people}{}",
                GRAPH.replace("approve: 2 }", "approve: { count: 2, role: qa } }, { name: other, approve: 1 }")
            ),
        };
        let mut world = World::new(&graph);
        play(&mut world);
        let answer = known(&gate(check.clone()), &question(&world, "12:00")).unwrap();
        assert_eq!(shown(&answer), expected, "{what}");
    }
}

#[test]
fn windows() {
    let world = World::new(GRAPH);
    // 20 November 2026 is a Friday.
    let office =
        json!({ "window": { "allow": ["FREQ=WEEKLY;BYDAY=MO,FR;BYHOUR=9"], "duration": "8h", "timezone": "Europe/Berlin" } });
    let over = json!({ "window": { "allow": ["FREQ=DAILY;UNTIL=20250101"], "duration": "8h", "timezone": "UTC" } });
    let broken = json!({ "window": { "allow": ["FREQ=SOMETIMES"], "duration": "8h", "timezone": "UTC" } });
    let nowhere = json!({ "window": { "allow": ["FREQ=DAILY"], "duration": "8h", "timezone": "Mars/Base" } });
    let cases = [
        ("allow", &office, "09:00", "allow open", None),
        ("deny", &office, "07:59", "deny opens Friday 2026-11-20 09:00 (Europe/Berlin)", Some("2026-11-20T08:00:00Z")),
        ("deny, next week", &office, "16:00", "deny opens Monday 2026-11-23 09:00 (Europe/Berlin)", Some("2026-11-23T08:00:00Z")),
        ("deny for ever", &over, "09:00", "deny no opening is in sight", None),
        ("malformed rule", &broken, "09:00", "unknown `FREQ=SOMETIMES` is not a frequency", None),
        ("malformed zone", &nowhere, "09:00", "unknown `Mars/Base` is not a time zone", None),
    ];
    for (what, check, time, expected, next) in cases {
        let answer = known(&gate(check.clone()), &question(&world, time)).unwrap();
        assert_eq!((shown(&answer).as_str(), answer.next), (expected, next.map(|next| next.parse().unwrap())), "{what}");
    }
}

#[test]
fn gates_about_the_artifact() {
    let mut world = World::new(GRAPH);
    world.promote("stage", "0.9", "08:30");
    let fake = |set: fn(&mut Fake)| {
        let mut fake = Fake { error: "no answer within 60s".into(), ..Fake::default() };
        set(&mut fake);
        fake
    };
    fn seen(key: &str, over: &str) -> Option<Vec<SignatureSeen>> {
        Some(vec![SignatureSeen { key: key.into(), over: release(over) }])
    }
    fn made(set: fn(&mut ProvenanceSeen)) -> Option<Vec<ProvenanceSeen>> {
        let (builder, source) = ("pipeline@0.1".to_owned(), "https://git.example/shop".to_owned());
        let mut seen = ProvenanceSeen { builder, source, key: Some(KEY.into()), ..ProvenanceSeen::default() };
        set(&mut seen);
        Some(vec![seen])
    }
    fn package(name: &str, version: &str, licences: &[&str], kind: &str) -> Package {
        let licences = licences.iter().map(ToString::to_string).collect();
        Package { name: name.into(), version: version.into(), licences, kind: kind.into() }
    }
    fn said(results: &[&str]) -> Option<Vec<ReportSeen>> {
        let one = |(index, result): (usize, &&str)| ReportSeen {
            name: "e2e".into(),
            result: result.to_string(),
            sequence: Some(index as u64),
        };
        Some(results.iter().enumerate().map(one).collect())
    }
    let signed = json!({ "signed": { "keys": [KEY] } });
    let provenance = json!({ "provenance": { "builders": ["pipeline@*"], "sources": ["https://git.example/shop"], "clean": true, "keys": [KEY] } });
    let unsigned = json!({ "provenance": { "builders": ["pipeline@*"], "unsigned": true } });
    let unsaid = json!({ "provenance": { "builders": ["pipeline@*"], "sources": [], "clean": false, "keys": [] } });
    let sbom = json!({ "sbom": { "deny": { "packages": ["telnetd", "npm:left-*"], "licences": ["AGPL-3.0*", "unknown"] }, "minimum": { "openssl": "3.0.17-1" } } });
    let report = json!({ "report": { "name": "e2e", "result": "pass" } });
    let command = json!({ "command": { "run": ["sh", "-c", "check it"], "timeout": "60s" } });
    let http = json!({ "http": { "url": "https://status.example/", "timeout": "60s" } });
    let teapot = json!({ "http": { "url": "https://status.example/", "status": 418, "timeout": "60s" } });
    let vm = json!({ "vm-test": { "file": "smoke.yaml", "text": "name: smoke" } });
    let cases: Vec<(&str, &serde_json::Value, fn(&mut Fake), &str)> = vec![
        ("allow", &signed, |fake| fake.signatures = seen(KEY, "1.0"), "allow by one of 1 keys"),
        ("deny", &signed, |fake| fake.signatures = Some(Vec::new()), "deny no signature by a key that counts"),
        ("wrong key", &signed, |fake| fake.signatures = seen("another", "1.0"), "deny signed by another key"),
        (
            "right key over other bytes",
            &signed,
            |fake| fake.signatures = seen(KEY, "6.6"),
            "deny the signature is over other bytes: `66bc4f39340e`",
        ),
        ("hang, crash, malformed", &signed, |_| {}, "unknown no answer within 60s"),
        (
            "allow",
            &provenance,
            |fake| fake.provenance = made(|_| {}),
            "allow built by `pipeline@0.1` from `https://git.example/shop`",
        ),
        ("none", &provenance, |fake| fake.provenance = Some(Vec::new()), "deny there is no provenance"),
        (
            "anybody's, where that is said",
            &unsigned,
            |fake| fake.provenance = made(|seen| seen.key = None),
            "allow built by `pipeline@0.1` from `https://git.example/shop`",
        ),
        (
            "anybody's, where nothing is said",
            &unsaid,
            |fake| fake.provenance = made(|_| {}),
            "unknown the gate names no `keys`, so anybody may have written a provenance; it needs them, or `unsigned: true`",
        ),
        (
            "builder",
            &provenance,
            |fake| fake.provenance = made(|seen| seen.builder = "mallory".into()),
            "deny built by `mallory`",
        ),
        (
            "source",
            &provenance,
            |fake| fake.provenance = made(|seen| seen.source = "https://git.example/shop2".into()),
            "deny made from `https://git.example/shop2`",
        ),
        (
            "dirty",
            &provenance,
            |fake| fake.provenance = made(|seen| seen.dirty = true),
            "deny made from a source with changes that are not committed",
        ),
        (
            "wrong key",
            &provenance,
            |fake| fake.provenance = made(|seen| seen.key = Some("another".into())),
            "deny it is not signed by a key that counts",
        ),
        (
            "not signed",
            &provenance,
            |fake| fake.provenance = made(|seen| seen.key = None),
            "deny it is not signed by a key that counts",
        ),
        (
            "over other bytes",
            &provenance,
            |fake| fake.provenance = made(|seen| seen.subject = Some(release("6.6"))),
            "deny it is about something else",
        ),
        ("hang, crash, malformed", &provenance, |_| {}, "unknown no answer within 60s"),
        (
            "allow",
            &sbom,
            |fake| {
                fake.sbom = Some(
                    vec![
                        package("openssl", "3.0.17-1~deb13u1+x", &["MIT"], "deb"),
                        package("openssl", "3.0.17-2", &["MIT"], "deb"),
                    ]
                    .split_off(1),
                )
            },
            "allow 1 packages",
        ),
        (
            "package",
            &sbom,
            |fake| fake.sbom = Some(vec![package("telnetd", "1", &["MIT"], "deb")]),
            "deny package `telnetd` is denied",
        ),
        (
            "package of a kind",
            &sbom,
            |fake| fake.sbom = Some(vec![package("left-pad", "1", &["MIT"], "npm")]),
            "deny package `left-pad` is denied",
        ),
        (
            "the same name of another kind",
            &sbom,
            |fake| fake.sbom = Some(vec![package("left-pad", "1", &["MIT"], "deb")]),
            "allow 1 packages",
        ),
        (
            "licence",
            &sbom,
            |fake| fake.sbom = Some(vec![package("x", "1", &["MIT", "AGPL-3.0-only"], "deb")]),
            "deny package `x` has the licence `AGPL-3.0-only`",
        ),
        (
            "no licence",
            &sbom,
            |fake| fake.sbom = Some(vec![package("x", "1", &[], "deb"), package("y", "1", &[], "deb")]),
            "deny package `x` has the licence `unknown`, and 1 more",
        ),
        (
            "too old",
            &sbom,
            |fake| fake.sbom = Some(vec![package("openssl", "3.0.17-1~bpo1", &["MIT"], "deb")]),
            "deny package `openssl` is 3.0.17-1~bpo1, and 3.0.17-1 is the least",
        ),
        ("hang, crash, malformed", &sbom, |_| {}, "unknown no answer within 60s"),
        ("allow", &report, |fake| fake.reports = said(&["pass"]), "allow `e2e` says pass"),
        ("the newest counts", &report, |fake| fake.reports = said(&["fail", "pass"]), "allow `e2e` says pass"),
        ("deny", &report, |fake| fake.reports = said(&["pass", "fail"]), "deny `e2e` says fail"),
        ("none", &report, |fake| fake.reports = Some(Vec::new()), "deny there is no report `e2e`"),
        ("malformed", &report, |fake| fake.reports = said(&["maybe\n"]), "unknown `e2e` says `maybe `, which is no result"),
        ("hang, crash", &report, |_| {}, "unknown no answer within 60s"),
        (
            "allow",
            &command,
            |fake| fake.command = Some(Ended::Status(0, "looking\nall is well\n\n".into(), String::new())),
            "allow all is well",
        ),
        (
            "allow without a word",
            &command,
            |fake| fake.command = Some(Ended::Status(0, String::new(), String::new())),
            "allow `check it` says yes",
        ),
        (
            "deny",
            &command,
            |fake| fake.command = Some(Ended::Status(1, "the database is behind".into(), "x".into())),
            "deny the database is behind",
        ),
        (
            "deny without a word",
            &command,
            |fake| fake.command = Some(Ended::Status(1, "\n".into(), String::new())),
            "deny `check it` says no",
        ),
        (
            "unknown",
            &command,
            |fake| fake.command = Some(Ended::Status(2, "yes".into(), "usage: …".into())),
            "unknown `check it` ended with status 2: usage: …",
        ),
        ("hang", &command, |fake| fake.command = Some(Ended::Timeout), "unknown `check it` did not end within 1m"),
        ("crash", &command, |fake| fake.command = Some(Ended::Signal(11)), "unknown `check it` ended with signal 11"),
        (
            "malformed",
            &command,
            |fake| fake.command = Some(Ended::Status(0, "\u{1b}[31mred\u{7}\u{fffd}".into(), String::new())),
            "allow [31mred \u{fffd}",
        ),
        ("not there", &command, |_| {}, "unknown no answer within 60s"),
        ("allow", &http, |fake| fake.http = Some(204), "allow `https://status.example/` answers 204"),
        ("deny", &http, |fake| fake.http = Some(503), "deny `https://status.example/` answers 503"),
        ("a redirect is no yes", &http, |fake| fake.http = Some(302), "deny `https://status.example/` answers 302"),
        ("the status that was asked for", &teapot, |fake| fake.http = Some(418), "allow `https://status.example/` answers 418"),
        ("another one", &teapot, |fake| fake.http = Some(200), "deny `https://status.example/` answers 200"),
        ("hang, crash, malformed", &http, |_| {}, "unknown `https://status.example/`: no answer within 60s"),
        ("allow", &vm, |fake| fake.vm_test = Some(Tested { passed: true, reason: "12 steps".into() }), "allow 12 steps"),
        (
            "deny",
            &vm,
            |fake| fake.vm_test = Some(Tested { passed: false, reason: "step 3:\nno ssh".into() }),
            "deny step 3: no ssh",
        ),
        ("hang, crash, malformed", &vm, |_| {}, "unknown no answer within 60s"),
    ];
    for (what, check, set, expected) in cases {
        let gate = gate(check.clone());
        // The clock going back changes none of these answers.
        for time in ["12:00", "07:00"] {
            assert_eq!(shown(&ask(&gate, &question(&world, time), &fake(set))), expected, "{} {what}", gate.check.kind());
        }
    }
}

#[test]
fn budgets_compare_with_what_is_there() {
    let both = json!({ "budget": { "size": 1000, "packages": 2 } });
    let cases = [
        (false, None, "allow the first release here"),
        (true, Some((1000, 2)), "allow 1000 bytes and 2 packages"),
        (true, Some((1001, 0)), "deny 1001 bytes are new, and 1000 may be"),
        (true, Some((0, 3)), "deny 3 packages changed, and 2 may"),
        (true, None, "unknown cannot look"),
    ];
    for (is_there, difference, expected) in cases {
        let mut world = World::new("environments: { stage: {}, prod: { from: stage } }\n");
        if is_there {
            world.promote("stage", "0.9", "09:00");
            world.promote("prod", "0.9", "09:01");
        }
        world.evidence.difference = difference.map(|(bytes, packages)| Difference { bytes, packages, unread: Vec::new() });
        assert_eq!(shown(&ask(&gate(both.clone()), &question(&world, "12:00"), &world.evidence)), expected);
    }
}

#[test]
fn a_count_that_is_not_complete_is_no_budget() {
    let mut world = World::new("environments: { stage: {}, prod: { from: stage } }\n");
    world.promote("stage", "0.9", "09:00");
    world.promote("prod", "0.9", "09:01");
    world.evidence.difference = Some(Difference { bytes: 1, packages: 1, unread: vec!["var/lib/rpm".into()] });
    for (budget, expected) in [
        (json!({ "packages": 2 }), "unknown nothing here reads the packages of `var/lib/rpm`"),
        (json!({ "size": 2 }), "allow 1 bytes and 1 packages"),
        (json!({ "size": 0, "packages": 2 }), "deny 1 bytes are new, and 0 may be"),
    ] {
        let gate = gate(json!({ "budget": budget }));
        assert_eq!(shown(&ask(&gate, &question(&world, "12:00"), &world.evidence)), expected);
    }
}

/// Tags in a store tell nothing about which report is the newest, and neither does what has no number.
#[test]
fn the_newest_report_has_the_highest_number() {
    let world = World::new(GRAPH);
    let gate = gate(json!({ "report": { "name": "e2e", "result": "pass" } }));
    let cases: [(&[(&str, Option<u64>)], &str); 9] = [
        (&[("pass", Some(3)), ("fail", Some(2)), ("fail", Some(1))], "allow `e2e` says pass"),
        (&[("fail", Some(3)), ("pass", Some(2)), ("pass", Some(2))], "deny `e2e` says fail"),
        (&[("pass", Some(2)), ("pass", Some(2)), ("fail", Some(1))], "allow `e2e` says pass"),
        (
            &[("pass", Some(2)), ("fail", Some(2)), ("fail", Some(1))],
            "unknown reports `e2e` say `pass` and `fail`, and nothing tells which is the newest",
        ),
        (
            &[("fail", Some(2)), ("pass", None)],
            "unknown reports `e2e` say `fail` and `pass`, and nothing tells which is the newest",
        ),
        (&[("fail", None), ("pass", None)], "unknown reports `e2e` say `fail` and `pass`, and nothing tells which is the newest"),
        (&[("pass", None), ("pass", None)], "allow `e2e` says pass"),
        (&[("fail", None)], "deny `e2e` says fail"),
        (&[("odd", Some(1))], "unknown `e2e` says `odd`, which is no result"),
    ];
    for (reports, expected) in cases {
        let one = |(result, sequence): &(&str, Option<u64>)| ReportSeen {
            name: "e2e".into(),
            result: (*result).into(),
            sequence: *sequence,
        };
        let fake = Fake { reports: Some(reports.iter().map(one).collect()), ..Fake::default() };
        assert_eq!(shown(&ask(&gate, &question(&world, "12:00"), &fake)), expected, "{reports:?}");
    }
}

#[test]
fn costly_gates_are_asked_last_and_only_when_nothing_else_stands_in_the_way() {
    let world = World::new(GRAPH);
    let gates = [
        gate(json!({ "command": { "run": ["x"], "timeout": "1s" } })),
        gate(json!({ "report": { "name": "e2e", "result": "pass" } })),
        gate(json!({ "http": { "url": "http://a/", "timeout": "1s" } })),
    ];
    let named: Vec<Gate> = ["c", "r", "h"].iter().zip(gates).map(|(name, gate)| Gate { name: (*name).into(), ..gate }).collect();
    let gates: Vec<&Gate> = named.iter().collect();
    let passed = || Some(vec![ReportSeen { name: "e2e".into(), result: "pass".into(), sequence: Some(1) }]);
    let no = Ended::Status(1, "no".into(), String::new());
    let cases: [(Fake, &[&str], Option<&str>, &[&str], &[&str]); 5] = [
        (
            Fake { reports: Some(Vec::new()), ..Fake::default() },
            &[],
            None,
            &["reports"],
            &[
                "unknown not asked: `r` stands in the way",
                "deny there is no report `e2e`",
                "unknown not asked: `r` stands in the way",
            ],
        ),
        (
            Fake { reports: passed(), command: Some(no.clone()), ..Fake::default() },
            &[],
            None,
            &["reports", "command"],
            &["deny no", "allow `e2e` says pass", "unknown not asked: `c` stands in the way"],
        ),
        (
            Fake { reports: Some(Vec::new()), command: Some(no), http: Some(200), ..Fake::default() },
            &["r", "c"],
            None,
            &["reports", "http"],
            &["overridden not asked", "overridden there is no report `e2e`", "allow `http://a/` answers 200"],
        ),
        (
            Fake {
                reports: passed(),
                command: Some(Ended::Status(0, String::new(), String::new())),
                http: Some(200),
                ..Fake::default()
            },
            &["r"],
            None,
            &["reports", "command", "http"],
            &["allow `x` says yes", "allow `e2e` says pass", "allow `http://a/` answers 200"],
        ),
        (
            Fake { reports: passed(), ..Fake::default() },
            &[],
            Some("freeze"),
            &["reports"],
            &[
                "unknown not asked: `freeze` stands in the way",
                "allow `e2e` says pass",
                "unknown not asked: `freeze` stands in the way",
            ],
        ),
    ];
    for (fake, overrides, stopped, asked, expected) in cases {
        let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
        let answers = ask_all(&gates, &question(&world, "12:00"), &fake, &overrides, stopped);
        assert_eq!(answers.iter().map(shown).collect::<Vec<_>>(), expected);
        assert_eq!(fake.asked.into_inner(), asked);
        assert_eq!(answers.iter().map(|answer| answer.gate.as_str()).collect::<Vec<_>>(), ["c", "r", "h"]);
    }
}

/// A ledger's bytes do not change by a newer program reading and writing them.
#[test]
fn a_policy_of_before_is_written_as_it_was() {
    let text = r#"{"name":"p","provenance":{"builders":["pipeline@*"],"sources":[],"clean":true,"keys":[]}}"#;
    let gate: Gate = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&gate).unwrap(), text);
}

#[test]
fn a_gate_that_is_not_known_is_refused() {
    for text in [
        r#"{"name":"g","astrology":true}"#,
        r#"{"name":"g","healthy":false}"#,
        r#"{"name":"g","soak":"soon"}"#,
        r#"{"name":"g"}"#,
        r#"{"name":"g","signed":{"keys":[],"also":1}}"#,
    ] {
        assert!(serde_json::from_str::<Gate>(text).is_err(), "{text}");
    }
}
