//! Who may apply, what differs, what is frozen everywhere, and what is read back.

use super::*;
use crate::release::decision::{Freeze, Frozen};
use crate::release::sample::{KEY, PEOPLE, World, at};

const SHOP: &str =
    "environments: { dev: {}, prod: { from: dev, gates: [ { soak: 10m }, { signed: true }, { vm-test: smoke.yaml } ] } }\n";

fn decision(kind: Kind, actor: &str) -> Decision {
    Decision { reason: "because".into(), ..Decision::new(kind, actor, at("09:00")) }
}

#[test]
fn files_are_inside_and_bytes_are_stable() {
    let policy = World::new(&format!("{PEOPLE}{SHOP}")).policy;
    let gates = &policy.environments["prod"].gates;
    assert_eq!(serde_json::to_value(&gates[1]).unwrap(), serde_json::json!({ "name": "signed", "signed": { "keys": [KEY] } }));
    assert_eq!(
        serde_json::to_value(&gates[2]).unwrap(),
        serde_json::json!({ "name": "vm-test", "vm-test": { "file": "smoke.yaml", "text": "name: smoke\n" } })
    );
    let bytes = policy.bytes();
    let read = Policy::parse(&bytes).unwrap();
    assert_eq!((&read, read.bytes()), (&policy, bytes.clone()));
    let newer = String::from_utf8(bytes).unwrap().replacen("\"format\": 1", "\"format\": 2", 1);
    assert_eq!(
        Policy::parse(newer.as_bytes()).unwrap_err().to_string(),
        "the policy in the ledger was written by a newer pipeline"
    );
    assert!(Policy::parse(b"[]").unwrap_err().to_string().contains("not readable"));
}

#[test]
fn a_key_that_is_none_is_not_taken() {
    for text in ["", "-----BEGIN EC PRIVATE KEY-----\n", "-----BEGIN PRIVATE KEY-----\n-----BEGIN PUBLIC KEY-----\n"] {
        let mut check = Check::Signed(crate::config::types::Signed { keys: vec!["/keys/cosign.pub".into()] });
        assert_eq!(embed(&mut check, &|_| Ok(text.into())).unwrap_err().to_string(), "`/keys/cosign.pub` is not a public key");
    }
}

#[test]
fn programs_of_gates_are_inside() {
    let command = |run: &str, script: Option<(&str, &str)>| {
        let script = script.map(|(file, text)| crate::config::types::Script { file: file.into(), text: text.into() });
        Command { run: vec![run.into()], timeout: crate::config::types::Seconds(5), script }
    };
    let mut check = Check::Command(command("./ready.sh", Some(("/shop/ready.sh", ""))));
    embed(&mut check, &|path| Ok(format!("#!/bin/sh\necho {}\n", path.display()))).unwrap();
    assert_eq!(check, Check::Command(command("./ready.sh", Some(("ready.sh", "#!/bin/sh\necho /shop/ready.sh\n")))));
    // A policy from before programs were kept is read as it was, and its bytes are the same.
    let old = serde_json::json!({ "command": { "run": ["./ready.sh"], "timeout": "5s" } });
    let read: Check = serde_json::from_value(old.clone()).unwrap();
    assert_eq!(read, Check::Command(command("./ready.sh", None)));
    assert_eq!(serde_json::to_value(&read).unwrap(), old);
}

#[test]
fn the_first_policy_is_trusted_and_later_ones_need_an_admin_of_the_one_before() {
    let open = World::new(SHOP).policy;
    let guarded = World::new(&format!("{PEOPLE}{SHOP}")).policy;
    let other = {
        let mut policy = guarded.clone();
        policy.people.get_mut("bob").unwrap().roles.insert(role::ADMIN.into());
        policy
    };
    let cases = [
        ("the first", None, &guarded, "bob", false, Ok(false)),
        ("no people before", Some(&open), &guarded, "mallory", false, Ok(false)),
        ("an admin", Some(&guarded), &other, "ada", true, Ok(true)),
        ("an admin that does not sign", Some(&guarded), &other, "ada", false, Err(Why::NotSigned)),
        ("an admin of the new one only", Some(&guarded), &other, "bob", true, Err(Why::NoRole)),
        ("nobody", Some(&guarded), &other, "mallory", true, Err(Why::NotAPerson)),
        ("people taken away by somebody else", Some(&guarded), &open, "eve", true, Err(Why::NoRole)),
        ("the same again", Some(&guarded), &guarded, "ada", true, Err(Why::Nothing)),
    ];
    for (what, before, after, actor, signed, expected) in cases {
        let found = after.clone().after(before, &decision(Kind::Apply, actor), signed);
        assert_eq!(found.map(|policy| policy.decision.unwrap().signed).map_err(|refused| refused.why), expected, "{what}");
    }
    let promote = guarded.clone().after(None, &decision(Kind::Promote, "ada"), true);
    assert_eq!(promote.unwrap_err().why, Why::Stale);
    let elsewhere = Policy { pipeline: "other".into(), ..other };
    assert_eq!(elsewhere.after(Some(&guarded), &decision(Kind::Apply, "ada"), true).unwrap_err().why, Why::Stale);
}

#[test]
fn roles_by_decision() {
    let policy = World::new(&format!(
        "{PEOPLE}environments: {{ dev: {{}}, prod: {{ from: dev, gates: [ {{ approve: {{ count: 1, role: qa }} }} ] }} }}\n"
    ))
    .policy;
    // ada: admin, promote, approve; bob: approve, qa; eve: promote, override, approve, qa
    let cases = [
        (Kind::Apply, [true, false, false]),
        (Kind::Enter, [true, false, true]),
        (Kind::Promote, [true, false, true]),
        (Kind::Rollback, [true, false, true]),
        (Kind::Configure, [true, false, true]),
        (Kind::Clear, [true, false, true]),
        (Kind::Approve, [true, true, true]),
        (Kind::Hold, [true, false, true]),
        (Kind::Lift, [true, false, true]),
        (Kind::Freeze, [true, false, true]),
        (Kind::Thaw, [true, false, true]),
        (Kind::Report, [true, false, true]),
    ];
    for (kind, expected) in cases {
        let found = ["ada", "bob", "eve"].map(|actor| policy.authorize(&decision(kind, actor), true).is_ok());
        assert_eq!(found, expected, "{kind}");
        assert_eq!(policy.authorize(&decision(kind, "ada"), false).unwrap_err().why, Why::NotSigned, "{kind}");
    }
    let over = |actor: &str| {
        policy
            .authorize(&Decision { overrides: vec!["soak".into()], ..decision(Kind::Promote, actor) }, true)
            .map_err(|refused| (refused.message, refused.hints))
    };
    assert_eq!(over("eve"), Ok(()));
    assert_eq!(over("ada"), Err(("`ada` does not have the role `override`".into(), vec!["ask `eve`".into()])));
}

#[test]
fn differences_are_found_by_name() {
    let before = World::new(SHOP).policy;
    let after = World::new(&format!(
        "{}registry: registry.example/shop\n",
        SHOP.replace("{ soak: 10m }", "{ soak: 1h }, { approve: 1 }").replace("dev: {}", "dev: { config: { A: x } }")
    ))
    .policy;
    let shown: Vec<String> = difference(&before, &after)
        .into_iter()
        .map(|one| {
            format!(
                "{}: {} → {}",
                one.path,
                one.before.map_or("-".into(), |value| value.to_string()),
                one.after.map_or("-".into(), |value| value.to_string())
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            "environments.dev.config: {} → -",
            "environments.dev.config.A: - → \"x\"",
            "environments.prod.gates.approve.approve.count: - → 1",
            "environments.prod.gates.approve.approve.role: - → \"approve\"",
            "environments.prod.gates.approve.name: - → \"approve\"",
            "environments.prod.gates.order: [\"soak\",\"signed\",\"vm-test\"] → [\"soak\",\"approve\",\"signed\",\"vm-test\"]",
            "environments.prod.gates.soak.soak: \"10m\" → \"1h\"",
            "registry: - → \"registry.example/shop\"",
        ]
    );
    assert_eq!(difference(&before, &before), []);
}

#[test]
fn an_emergency_stop_over_all_pipelines() {
    let open = World::new(SHOP).policy;
    let guarded = Policy { pipeline: "guarded".into(), ..World::new(&format!("{PEOPLE}{SHOP}")).policy };
    let freeze = |actor: &str| decision(Kind::Freeze, actor);
    let none = Frozen::default();
    let why = |found: Result<Frozen, Refused>| {
        found.map(|frozen| frozen.environments.into_keys().collect::<Vec<_>>()).map_err(|refused| refused.why)
    };
    let prod = || Ok(vec!["prod".to_owned()]);
    assert_eq!(why(none.after("prod", &freeze("anybody"), &[(&open, false)])), prod());
    assert_eq!(why(none.after("prod", &freeze("anybody"), &[(&open, false), (&guarded, false)])), Err(Why::NotAPerson));
    assert_eq!(why(none.after("prod", &freeze("ada"), &[(&open, false), (&guarded, true)])), prod());
    assert_eq!(why(none.after("prod", &freeze("bob"), &[(&guarded, true)])), Err(Why::NoRole));
    assert_eq!(why(none.after("nowhere", &freeze("ada"), &[(&guarded, true)])), Err(Why::NoEnvironment));
    assert_eq!(
        why(none.after("prod", &Decision { reason: String::new(), ..freeze("ada") }, &[(&open, true)])),
        Err(Why::NoReason)
    );
    assert_eq!(
        why(none.after("prod", &Decision { until: Some(at("09:00")), ..freeze("ada") }, &[(&open, true)])),
        Err(Why::Nothing)
    );
    assert_eq!(why(none.after("prod", &decision(Kind::Promote, "ada"), &[(&open, true)])), Err(Why::Stale));
    assert_eq!(why(none.after("prod", &decision(Kind::Thaw, "ada"), &[(&open, true)])), Err(Why::Nothing));
    let frozen = none.after("prod", &Decision { until: Some(at("10:00")), ..freeze("ada") }, &[(&open, true)]).unwrap();
    assert_eq!(
        frozen.environments["prod"],
        Freeze {
            by: "ada".into(),
            reason: "because".into(),
            since: at("09:00"),
            until: Some(at("10:00")),
            thawed: BTreeSet::new()
        }
    );
    assert_eq!(Frozen::parse(&frozen.bytes().unwrap()).unwrap(), frozen);
    let thawed = frozen.after("prod", &decision(Kind::Thaw, "ada"), &[(&open, true)]).unwrap();
    assert_eq!((thawed.bytes(), thawed), (None, none));
}
