//! Plans and what becomes of them: the rules of promotions, configurations and rollbacks, as stories.

use super::*;
use crate::release::decision::{Freeze, Kind};
use crate::release::gate::Ended;
use crate::release::sample::{PEOPLE, World, at, candidate, release};

const LINE: &str = "environments:
  dev: { automatic: true }
  stage: { from: dev, automatic: true, config: { MODE: test } }
  prod: { from: stage, automatic: true, gates: [ { soak: 10m }, { approve: 1 } ], config: { MODE: live } }
";

fn promote(version: &str) -> Action {
    Action::Promote(candidate(version))
}

fn set(name: &str, value: Option<&str>) -> Action {
    let values = BTreeMap::from([(name.to_owned(), value.map(str::to_owned))]);
    Action::Configure { values, secrets: BTreeMap::new() }
}

/// Why a request is refused outright.
fn refused(world: &World, request: &Request<'_>) -> (Why, String) {
    let refused = world.plan(request).unwrap_err();
    (refused.why, refused.message)
}

fn answers(plan: &Plan) -> Vec<String> {
    plan.answers.iter().map(|answer| format!("{} {} {}", answer.gate, answer.verdict, answer.reason)).collect()
}

/// `1.0` in dev, stage and prod, `1.1` in dev and stage, at noon.
fn world() -> World {
    let mut world = World::new(LINE);
    for (version, hour) in [("1.0", "09"), ("1.1", "11")] {
        world.promote("dev", version, &format!("{hour}:00"));
        world.promote("stage", version, &format!("{hour}:10"));
        if version == "1.0" {
            world.approve("bob", "prod", version, "09:15").unwrap();
            world.promote("prod", version, "09:20");
        }
    }
    world
}

#[test]
fn what_no_gate_can_change() {
    let mut world = world();
    world.decide("stage", Kind::Hold, "11:30", |_| {}).unwrap();
    let cases = [
        ("prodd", promote("1.1"), Why::NoEnvironment, "`shop` has no environment `prodd`"),
        ("prod", promote("1.0"), Why::AlreadyThere, "release `92521fc3cbd9` is in `shop/prod` already"),
        ("prod", promote("2.0"), Why::NotUpstream, "release `47c1acb03ea9` is not and was not healthy in `shop/stage`"),
        ("stage", Action::Enter(candidate("1.2")), Why::NotUpstream, "`shop/stage` takes releases from `dev`"),
        ("prod", set("MODE", Some("live")), Why::Nothing, "`shop/prod` is configured like that already"),
        ("prod", Action::Rollback(Back::Last), Why::NoRollback, "no release before this one was healthy in `shop/prod`"),
        ("prod", Action::Rollback(Back::To(release("1.1"))), Why::NoRollback, "release `1f4d9dce3f46` was not in `shop/prod`"),
        (
            "prod",
            Action::Rollback(Back::To(release("1.0"))),
            Why::AlreadyThere,
            "release `92521fc3cbd9` is in `shop/prod` already",
        ),
    ];
    for (environment, action, why, message) in cases {
        let (found, text) = refused(&world, &world.request(environment, action.clone(), "12:00"));
        assert_eq!(found, why, "{action:?}: {text}");
        let cut = |text: &str| {
            text.split('`')
                .enumerate()
                .filter(|(index, word)| index % 2 == 0 || word.len() != 12)
                .map(|(_, word)| word.to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(cut(&text), cut(message), "{action:?}");
    }
    let overrides = ["soka".to_owned()];
    let request = Request { overrides: &overrides, reason: "x", ..world.request("prod", promote("1.1"), "12:00") };
    let error = world.plan(&request).unwrap_err();
    assert_eq!((error.why, error.hints), (Why::NoGate, vec!["did you mean `soak`?".to_owned()]));
}

#[test]
fn a_promotion_waits_for_soak_and_approval_and_says_until_when() {
    let mut world = world();
    let plan = world.plan(&world.request("prod", promote("1.1"), "11:15")).unwrap();
    assert_eq!(answers(&plan), ["soak deny 5m of 10m in shop/stage", "approve deny 0 of 1 approvals"]);
    assert_eq!((plan.allowed, plan.next), (false, None));
    world.approve("bob", "prod", "1.1", "11:16").unwrap();
    let plan = world.plan(&world.request("prod", promote("1.1"), "11:16")).unwrap();
    assert_eq!((plan.allowed, plan.next), (false, Some(at("11:20"))));
    let error = world.commit("prod", &plan.decision).unwrap_err();
    assert_eq!(error.message, "the gate `soak` of `shop/prod` says deny: 6m of 10m in shop/stage");
    let plan = world.run(&world.request("prod", promote("1.1"), "11:20")).unwrap();
    assert_eq!(answers(&plan), ["soak allow in shop/stage for 10m", "approve allow 1 of 1 approvals by bob"]);
    assert_eq!(
        (plan.allowed, plan.next, plan.decision.from, plan.decision.to),
        (true, None, Some(release("1.0")), Some(release("1.1")))
    );
    let state = world.state("prod");
    assert_eq!(state.current.as_ref().unwrap().version, "1.1");
    assert_eq!(
        state.before.iter().map(|past| (past.binding.version.as_str(), past.healthy, past.soaked)).collect::<Vec<_>>(),
        [("1.0", true, 7200)]
    );
    // Approvals are used up with the promotion.
    assert_eq!(state.approvals, []);
}

#[test]
fn the_opening_is_when_everything_that_waiting_changes_allows() {
    // Open on Fridays from 13:00 to 14:00; the soak is over at 13:30, the freeze at 14:30.
    let yaml = "environments:\n  stage: {}\n  prod:\n    from: stage\n    gates:\n    - { soak: 3h }\n    - window: { allow: 'FREQ=WEEKLY;BYDAY=FR;BYHOUR=13', duration: 1h }\n";
    let mut world = World::new(yaml);
    world.promote("stage", "1.0", "10:30");
    let next = |world: &World| world.plan(&world.request("prod", promote("1.0"), "12:00")).unwrap().next;
    assert_eq!(next(&world), Some(at("13:30")));
    world
        .decide("prod", Kind::Freeze, "11:00", |decision| {
            (decision.reason, decision.until) = ("fair".into(), Some(at("14:30")));
        })
        .unwrap();
    assert_eq!(next(&world), Some("2026-11-27T13:00:00Z".parse().unwrap()));
    world.decide("prod", Kind::Freeze, "11:00", |decision| decision.reason = "until further notice".into()).unwrap();
    assert_eq!(next(&world), None);
}

#[test]
fn a_release_has_to_come_through_the_graph() {
    let yaml = "environments: { a: {}, b: {}, any: { from: [a, b] }, all: { from: { all: [a, b] } } }\n";
    let mut world = World::new(yaml);
    world.promote("a", "1.0", "09:00");
    let why = |world: &World, environment: &str| {
        world
            .plan(&world.request(environment, promote("1.0"), "12:00"))
            .map(|plan| plan.allowed)
            .map_err(|refused| refused.message)
    };
    let short = release("1.0").short();
    assert_eq!(why(&world, "any"), Ok(true));
    assert_eq!(why(&world, "all"), Err(format!("release `{short}` is not and was not healthy in `shop/b`")));
    world.promote("b", "1.0", "09:30");
    // It was there and healthy, which is enough.
    world.promote("b", "1.1", "09:40");
    assert_eq!((why(&world, "any"), why(&world, "all")), (Ok(true), Ok(true)));
    // Marked bad in one of them.
    let back = world.request("b", Action::Rollback(Back::Last), "10:00");
    world.run(&back).unwrap();
    assert_eq!(world.state("b").bad.keys().collect::<Vec<_>>(), [&release("1.1")]);
    world.promote("a", "1.1", "10:05");
    let short = release("1.1").short();
    let message = |environment: &str| {
        world
            .plan(&world.request(environment, promote("1.1"), "12:00"))
            .map(|plan| plan.allowed)
            .map_err(|refused| refused.message)
    };
    assert_eq!(message("any"), Ok(true));
    assert_eq!(message("all"), Err(format!("release `{short}` is marked bad in `shop/b`")));
}

#[test]
fn a_rollback_restores_the_pair_marks_and_holds() {
    let mut world = world();
    world.approve("bob", "prod", "1.1", "11:16").unwrap();
    world.promote("prod", "1.1", "11:30");
    let plan = world.run(&Request { reason: "500s", ..world.request("prod", Action::Rollback(Back::Last), "12:00") }).unwrap();
    assert_eq!((plan.allowed, plan.answers.len(), plan.to.unwrap().version.as_str()), (true, 0, "1.0"));
    let state = world.state("prod").clone();
    let hold = state::Hold { by: "eve".into(), reason: "500s".into(), since: at("12:00"), set_by: Kind::Rollback };
    assert_eq!((state.current.as_ref().unwrap().version.as_str(), state.hold.as_ref()), ("1.0", Some(&hold)));
    assert_eq!(state.bad[&release("1.1")].reason, "500s");
    // It is not offered again, and cannot be promoted before it is cleared.
    assert_eq!(candidate_of(&world, "prod"), None);
    assert_eq!(refused(&world, &world.request("prod", promote("1.1"), "12:10")).0, Why::Bad);
    // The next one waits: automation respects the hold, a person has to lift it.
    world.promote("dev", "1.2", "12:20");
    world.promote("stage", "1.2", "12:21");
    world.approve("bob", "prod", "1.2", "12:22").unwrap();
    assert_eq!(candidate_of(&world, "prod").as_deref(), Some("1.2"));
    let automatic = Request { automatic: true, lift: true, ..world.request("prod", promote("1.2"), "13:00") };
    let plan = world.plan(&automatic).unwrap();
    assert_eq!(
        (plan.allowed, answers(&plan)[0].as_str()),
        (false, "hold deny by eve since 2026-11-20T12:00:00Z, by a rollback: 500s")
    );
    let plan = world.plan(&world.request("prod", promote("1.2"), "13:00")).unwrap();
    assert_eq!((plan.allowed, plan.next), (false, None));
    assert_eq!(world.commit("prod", &plan.decision).unwrap_err().why, Why::Held);
    let lifting = Request { lift: true, ..world.request("prod", promote("1.2"), "13:00") };
    let plan = world.run(&lifting).unwrap();
    assert_eq!(
        (plan.allowed, answers(&plan)[0].as_str()),
        (true, "hold allow lifted; it was by eve since 2026-11-20T12:00:00Z, by a rollback: 500s")
    );
    assert_eq!(world.state("prod").hold, None);
    // Cleared, the bad one may come again.
    world.decide("prod", Kind::Clear, "13:10", |decision| decision.to = Some(release("1.1"))).unwrap();
    let plan = world.plan(&world.request("prod", promote("1.1"), "13:20")).unwrap();
    assert_eq!(answers(&plan), ["soak allow in shop/stage for 1h11m", "approve deny 0 of 1 approvals"]);
}

fn candidate_of(world: &World, environment: &str) -> Option<String> {
    candidate_at(world, environment).map(|candidate| candidate.version)
}

fn candidate_at(world: &World, environment: &str) -> Option<Candidate> {
    super::candidate(world.view(), environment).unwrap()
}

#[test]
fn a_rollback_takes_the_newest_that_was_healthy() {
    let mut world = World::new("environments: { dev: { target: { local: {} } } }\n");
    let report = |world: &mut World, status: Status, time: &str| {
        let pair = world.state("dev").current.as_ref().unwrap().pair();
        world
            .decide("dev", Kind::Report, time, |decision| {
                (decision.to, decision.config, decision.health) = (Some(pair.0), Some(pair.1), Some(status))
            })
            .unwrap();
    };
    for (version, time, status) in [
        ("1", "09:00", Status::Healthy),
        ("2", "09:10", Status::Unhealthy),
        ("3", "09:20", Status::Unknown),
        ("4", "09:30", Status::Healthy),
    ] {
        world.promote("dev", version, time);
        report(&mut world, status, time);
    }
    let run = |world: &mut World, back: Back, time: &str| {
        world
            .run(&world.request("dev", Action::Rollback(back), time))
            .map(|plan| plan.to.unwrap().version)
            .map_err(|refused| refused.why)
    };
    assert_eq!(run(&mut world, Back::Last, "10:00"), Ok("1".into()));
    // A named one may be one that was not known to be healthy, but not one marked bad.
    assert_eq!(run(&mut world, Back::To(release("3")), "10:01"), Ok("3".into()));
    assert_eq!(run(&mut world, Back::To(release("4")), "10:02"), Err(Why::Bad));
    assert_eq!(world.state("dev").bad.keys().copied().collect::<Vec<_>>().len(), 2);
    assert_eq!(run(&mut world, Back::To(release("2")), "10:03"), Ok("2".into()));
    // 1, 3 and 4 are bad now: everything a rollback could take is.
    assert_eq!(run(&mut world, Back::Last, "10:04"), Err(Why::NoRollback));
}

#[test]
fn a_configuration_is_a_state_of_its_own() {
    let mut world = world();
    let pair = |world: &World| {
        let current = world.state("prod").current.clone().unwrap();
        (current.version, current.config.values.get("MODE").cloned(), current.config.values.get("A").cloned())
    };
    // Prod asks for approvals, so a new configuration waits for them and for a promotion of what is there.
    let plan = world.run(&world.request("prod", set("A", Some("1")), "12:00")).unwrap();
    assert_eq!(
        (plan.allowed, plan.waits, plan.decision.to, answers(&plan)),
        (true, true, None, vec!["approve deny 0 of 1 approvals".to_owned()])
    );
    assert_eq!(pair(&world), ("1.0".into(), Some("live".into()), None));
    world.approve("bob", "prod", "1.0", "12:01").unwrap();
    world.promote("prod", "1.0", "12:02");
    assert_eq!(pair(&world), ("1.0".into(), Some("live".into()), Some("1".into())));
    // Approved beforehand: another configuration makes another pair, and the approval is void.
    world.approve("bob", "prod", "1.1", "12:03").unwrap();
    world.run(&world.request("prod", set("A", Some("2")), "12:04")).unwrap();
    let plan = world.plan(&world.request("prod", promote("1.1"), "12:05")).unwrap();
    assert_eq!(answers(&plan)[1], "approve deny 0 of 1 approvals; others were for another configuration");
    // A rollback takes the configuration back, drops the one that waits, and marks no release bad.
    world.run(&world.request("prod", Action::Rollback(Back::Last), "12:06")).unwrap();
    assert_eq!(pair(&world), ("1.0".into(), Some("live".into()), None));
    let state = world.state("prod");
    assert_eq!((state.bad.len(), state.hold.is_some()), (0, true));
    let environment = &world.policy.environments["prod"];
    assert_eq!(state.configuration(environment).values.get("A"), None);
    // Stage has no gate that minds: it takes effect at once.
    let plan = world.run(&world.request("stage", set("MODE", None), "12:10")).unwrap();
    assert_eq!((plan.waits, world.state("stage").current.as_ref().unwrap().config.values.len()), (false, 0));
}

#[test]
fn what_was_said_last_about_a_value_counts() {
    let mut world = World::new("environments: { dev: { config: { A: file, B: file } } }\n");
    world.promote("dev", "1", "09:00");
    world.run(&world.request("dev", set("A", Some("set")), "09:01")).unwrap();
    let values = |world: &World| {
        let config = world.state("dev").configuration(&world.policy.environments["dev"]);
        config.values.into_iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(values(&world), "A=set B=file");
    let file = |world: &mut World, name: &str, value: Option<&str>| {
        let config = &mut world.policy.environments.get_mut("dev").unwrap().config;
        match value {
            Some(value) => config.insert(name.into(), value.into()),
            None => config.remove(name),
        };
    };
    file(&mut world, "B", Some("newer"));
    assert_eq!(values(&world), "A=set B=newer");
    file(&mut world, "A", Some("newest"));
    assert_eq!(values(&world), "A=newest B=newer");
    file(&mut world, "B", None);
    assert_eq!(values(&world), "A=newest");
    world.promote("dev", "2", "09:02");
    assert_eq!(values(&world), "A=newest");
}

#[test]
fn secrets_have_to_be_set() {
    let mut world = World::new("environments: { dev: { secrets: { TOKEN: { stored: true }, KEY: { file: /etc/key } } } }\n");
    let error = world.plan(&world.request("dev", promote("1"), "09:00")).unwrap_err();
    assert_eq!((error.why, error.message.as_str()), (Why::Secret, "the secret `TOKEN` of `shop/dev` is not set"));
    let secret = |id: &str| {
        let secrets = BTreeMap::from([("TOKEN".to_owned(), Some(SecretRef::Stored(id.into())))]);
        Action::Configure { values: BTreeMap::new(), secrets }
    };
    let plan = world.run(&world.request("dev", secret("v1"), "09:01")).unwrap();
    assert_eq!((plan.allowed, plan.waits, plan.to), (true, true, None));
    world.promote("dev", "1", "09:02");
    let plan = world.run(&world.request("dev", secret("v2"), "09:03")).unwrap();
    assert_eq!((plan.allowed, plan.waits), (true, false));
    world.run(&world.request("dev", Action::Rollback(Back::Last), "09:04")).unwrap();
    assert_eq!(world.state("dev").current.as_ref().unwrap().config.secrets["TOKEN"], SecretRef::Stored("v1".into()));
}

#[test]
fn freezes_stop_everything_that_changes_what_runs() {
    let mut world = World::new(&format!("{PEOPLE}environments: {{ dev: {{}}, prod: {{ from: dev }} }}\n"));
    for (version, time) in [("1", "09:00"), ("2", "09:10"), ("3", "09:20")] {
        world.promote("dev", version, time);
        if version != "3" {
            world.promote("prod", version, time);
        }
    }
    let freeze = Freeze {
        by: "ada".into(),
        reason: "incident".into(),
        since: at("10:00"),
        until: Some(at("11:00")),
        thawed: std::collections::BTreeSet::new(),
    };
    world.frozen.environments.insert("prod".into(), freeze);
    let actions = [promote("3"), Action::Rollback(Back::Last), set("A", Some("1"))];
    for action in &actions {
        let plan = world.plan(&world.request("prod", action.clone(), "10:30")).unwrap();
        assert_eq!(
            (plan.allowed, answers(&plan)),
            (false, vec!["freeze deny by ada until 2026-11-20T11:00:00Z: incident".to_owned()])
        );
        assert_eq!(world.commit("prod", &plan.decision).unwrap_err().why, Why::Frozen, "{action:?}");
        // Over at its end, and not by a clock that goes back.
        assert!(world.plan(&world.request("prod", action.clone(), "11:00")).unwrap().allowed, "{action:?}");
        assert!(!world.plan(&world.request("prod", action.clone(), "08:30")).unwrap().allowed, "{action:?}");
    }
    let overrides = ["freeze".to_owned()];
    let over = |world: &World, reason: &'static str, automatic: bool| {
        let request = Request { overrides: &overrides, reason, automatic, ..world.request("prod", promote("3"), "10:30") };
        world.plan(&request).map(|plan| (plan.allowed, answers(&plan)))
    };
    assert_eq!(over(&world, "", false).unwrap_err().why, Why::NoReason);
    assert!(!over(&world, "the fix", true).unwrap().0);
    let (allowed, said) = over(&world, "the fix", false).unwrap();
    assert_eq!((allowed, said), (true, vec!["freeze overridden by ada until 2026-11-20T11:00:00Z: incident".to_owned()]));
    world.actor = ("ada", true);
    assert_eq!(over(&world, "the fix", false).unwrap_err().message, "`ada` does not have the role `override`");
}

#[test]
fn overrides_are_written_down_and_need_the_role() {
    let yaml = format!(
        "{PEOPLE}environments:\n  dev: {{}}\n  prod: {{ from: dev, gates: [ {{ approve: 1 }}, {{ command: {{ run: 'false' }} }} ] }}\n"
    );
    let mut world = World::new(&yaml);
    world.promote("dev", "1", "09:00");
    world.evidence.command = Some(Ended::Status(0, "fine".into(), String::new()));
    let overrides = ["approve".to_owned()];
    let mut request = Request { overrides: &overrides, reason: "nobody is here", ..world.request("prod", promote("1"), "10:00") };
    let plan = world.plan(&request).unwrap();
    assert_eq!(
        (plan.allowed, answers(&plan)),
        (true, vec!["approve overridden 0 of 1 approvals".to_owned(), "command allow fine".to_owned()])
    );
    // Whoever writes the commit by hand has to fulfil the same rules.
    type Forge = fn(&mut Decision);
    let forged: [(&str, Forge, Why); 9] = [
        ("no reason", |decision| decision.reason.clear(), Why::NoReason),
        ("a gate less", |decision| decision.gates.truncate(1), Why::Gate),
        ("not among the overrides", |decision| decision.overrides.clear(), Why::Gate),
        ("allowed when the ledger says no", |decision| decision.gates[0].verdict = Verdict::Allow, Why::Gate),
        ("denied all the same", |decision| decision.gates[1].verdict = Verdict::Deny, Why::Gate),
        ("unknown all the same", |decision| decision.gates[1].verdict = Verdict::Unknown, Why::Gate),
        ("overridden by a program", |decision| decision.automatic = true, Why::Gate),
        ("another release", |decision| decision.to = Some(release("6.6")), Why::NotUpstream),
        ("another author", |decision| decision.author = Some("eve".into()), Why::Stale),
    ];
    for (what, forge, why) in forged {
        let mut decision = plan.decision.clone();
        forge(&mut decision);
        assert_eq!(world.commit("prod", &decision).unwrap_err().why, why, "{what}");
    }
    for (actor, why) in [("ada", Why::NoRole), ("bob", Why::NoRole), ("mallory", Why::NotAPerson)] {
        request.actor = actor;
        assert_eq!(refused(&world, &request).0, why, "{actor}");
    }
    (request.actor, request.signed) = ("eve", false);
    assert_eq!(refused(&world, &request).0, Why::NotSigned);
    world.commit("prod", &plan.decision).unwrap();
    let decision = &world.state("prod").decision;
    assert_eq!(
        (decision.gates[0].verdict, decision.overrides.as_slice(), decision.reason.as_str()),
        (Verdict::Overridden, overrides.as_slice(), "nobody is here")
    );
    // The same decision once more is for a state that is not there any more.
    let again = plan.decision.clone();
    assert_eq!(world.commit("prod", &again).unwrap_err().why, Why::Stale);
}

#[test]
fn what_goes_by_itself() {
    let mut world = World::new(LINE);
    let next = |world: &World, environment: &str| {
        let found = automatic(world.view(), environment);
        found.into_iter().map(|(name, candidate)| format!("{name} {}", candidate.version)).collect::<Vec<_>>()
    };
    assert_eq!(next(&world, "dev"), [""; 0]);
    let enter = Request { automatic: true, ..world.request("dev", Action::Enter(candidate("1.0")), "09:00") };
    assert!(world.run(&enter).unwrap().allowed);
    assert_eq!((next(&world, "dev"), next(&world, "stage")), (vec!["stage 1.0".to_owned()], vec!["stage 1.0".to_owned()]));
    world.promote("stage", "1.0", "09:10");
    assert_eq!((next(&world, "dev"), next(&world, "stage")), (vec![], vec!["prod 1.0".to_owned()]));
    // A manual environment never goes by itself.
    world.policy.environments.get_mut("prod").unwrap().automatic = false;
    assert_eq!(next(&world, "stage"), [""; 0]);
    // An older one does not come back by itself.
    world.promote("dev", "1.1", "10:00");
    world.promote("stage", "1.1", "10:01");
    world.promote("dev", "1.0", "10:02");
    assert_eq!(next(&world, "dev"), [""; 0]);
}

#[test]
fn a_plan_is_json() {
    let world = world();
    let plan = world.plan(&world.request("prod", promote("1.1"), "11:15")).unwrap();
    let value = serde_json::to_value(&plan).unwrap();
    assert_eq!(value["answers"][0]["verdict"], "deny");
    assert_eq!(value["to"]["config"]["values"]["MODE"], "live");
    assert_eq!(value["decision"]["time"], "2026-11-20T11:15:00Z");
}
