//! Releases on their way through environments, with the program as people call it: gates, approvals, holds, freezes,
//! configurations, rollbacks, people with keys, a remote that is away, and what makes a ledger unsound.

#[path = "release/belief.rs"]
mod belief;
mod common;
#[path = "release/content.rs"]
mod content;
#[path = "release/gates.rs"]
mod gates;
#[path = "release/shared.rs"]
mod shared;
#[path = "release/shop.rs"]
mod shop;

use common::{me, users};
use serde_json::Value;
use shop::{ROW, Shop, answers};

#[test]
fn environments_count_when_they_are_applied() {
    for user in users() {
        let shop = Shop::without(user, ROW);
        shop.verb(&["status"]).ok().prints("no environments; `pipeline environment apply`");
        shop.verb(&["promote", "tiny", "--to", "dev"]).run().code(2).says("error: the ledger has no pipeline `tiny`");
        let dry = shop.verb(&["environment", "apply", "--dry-run"]).ok();
        dry.prints("+ environments.prod.config.REGION: \"north\"").prints("tiny: would be applied");
        shop.verb(&["status"]).ok().prints("no environments");
        let first = shop.verb(&["environment", "apply", "--reason", "the beginning"]).ok();
        first.prints("+ environments.stage.from.any: [\"dev\"]").prints("tiny: applied (");
        first.says("the first policy of `tiny` is trusted as it is");
        first.says("deciding as `alice`, as Git says; `people:` in the pipeline file makes keys count");
        shop.refused(shop.verb(&["environment", "apply"]), "the policy of `tiny` is that already", "");
        let listed = shop.verb(&["environment", "list"]).ok();
        assert_eq!(
            listed.stdout.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>(),
            ["tiny/dev releases enter here automatic", "tiny/prod from stage by hand", "tiny/stage from dev automatic"]
        );
        // A file that is not applied changes nothing, and everybody is told.
        shop.project.edit("pipeline.yaml", "REGION: north", "REGION: south");
        shop.verb(&["status"]).ok().says("the pipeline file of `tiny` differs from the ledger: environments.prod.config.REGION");
        let shown = shop.verb(&["environment", "show", "prod"]).ok();
        shown.prints("tiny/prod: from stage").prints("  REGION=north").prints("  secret TOKEN: the variable TOKEN");
        shown.prints("  the pipeline file differs: environments.prod.config.REGION");
        let second = shop.verb(&["environment", "apply"]).ok();
        assert_eq!(second.stdout.lines().next(), Some("~ environments.prod.config.REGION: \"north\" → \"south\""));
        second.says_not("trusted");
        shop.is_sound();
    }
}

#[test]
fn a_release_goes_through() {
    for user in users() {
        let shop = Shop::new(user, &format!("{ROW}    gates: [ {{ approve: 1 }}, {{ soak: 1h }} ]\n"));
        let file = shop.project.beside("out").join("digest");
        let built = shop.build("1.0", &["--digest-file", file.to_str().unwrap()]).ok();
        built.prints("tiny:1.0.release sha256:").prints("tiny/dev: nothing → 1.0 (").prints("tiny/stage: nothing → 1.0 (");
        let digest = fs_err::read_to_string(&file).unwrap().trim().to_owned();
        assert_eq!(shop.at("stage")["release"], digest);
        assert_eq!(shop.versions(), ["1.0", "1.0", "nothing"]);
        // Refused, with every gate's answer. Nothing but waiting for the soak: then it says until when.
        let report = shop.project.beside("out").join("junit.xml");
        let promote = ["promote", "tiny", "--to", "prod"];
        let refused = shop.nothing_changes(|| shop.verb(&promote).arg("--junit").arg(&report).run());
        refused.code(1).prints("tiny/prod: nothing → 1.0 (").prints("NO  approve  0 of 1 approvals").prints("refused\n");
        assert!(!refused.stdout.contains("it can go from"), "{}", refused.stdout);
        let junit = fs_err::read_to_string(&report).unwrap();
        assert!(junit.contains("<testsuite name=\"tiny/prod\" tests=\"2\" failures=\"2\">"), "{junit}");
        shop.refused(
            shop.verb(&["approve", "tiny", "--for", "stage", "--release", "1.0"]),
            "no gate of `tiny/stage` asks for approvals",
            "environment show",
        );
        // The author alone is not enough; a second time does not count.
        shop.verb(&["approve", "tiny", "--for", "prod"]).ok().prints("tiny/prod: approve 1.0 (");
        shop.refused(shop.verb(&["approve", "tiny", "--for", "tiny/prod"]), "`alice` has approved release `", "already");
        let alone = shop.nothing_changes(|| shop.verb(&promote).run());
        alone.code(1).prints("1 of 1 approvals by alice, who made the release: somebody else has to approve too");
        shop.by("bob", &["approve", "--for", "prod", "--reason", "looks good"]).ok();
        let waits = shop.nothing_changes(|| shop.verb(&promote).arg("--json").run());
        waits.code(1);
        assert_eq!(answers(&waits), ["approve allow", "soak deny"]);
        let next = waits.json()["outcome"]["plan"]["next"].as_str().unwrap().to_owned();
        let since = shop.at("stage")["since"].as_str().unwrap().to_owned();
        let apart = next.parse::<jiff::Timestamp>().unwrap().duration_since(since.parse().unwrap());
        assert_eq!(apart.as_secs(), 3600, "{since} {next}");
        shop.nothing_changes(|| shop.verb(&promote).run()).code(1).prints(&format!("it can go from {next}, "));
        assert_eq!(shop.at("prod")["waiting"]["version"], "1.0");
        // Past the gate, loudly; a dry run changes nothing.
        shop.refused(
            shop.verb(&promote).args(&["--override", "soak"]),
            "going past a gate needs a reason",
            "hint: write it with `--reason`",
        );
        let dry = ["--override", "soak", "--reason", "it burns", "--dry-run"];
        shop.nothing_changes(|| shop.verb(&promote).args(&dry).ok()).prints("OVERRIDDEN  soak").prints("it would be done\n");
        shop.verb(&promote).args(&dry[..4]).ok().prints("done: ");
        assert_eq!(shop.versions(), ["1.0", "1.0", "1.0"]);
        shop.verb(&["log", "-n", "1"]).ok().prints("tiny/prod: promote 1.0 (").prints("OVERRIDING soak").prints("it burns");
        shop.refused(shop.verb(&promote), "nothing new can come to `tiny/prod` from `tiny/stage`", "pipeline status");
        let message = shop.project.git_in(&shop.ledger(), &["log", "-1", "--format=%B", "main"]).stdout;
        for line in [
            "Decision: promote",
            "Environment: prod",
            "Actor: alice",
            "Author: alice",
            "Gate: approve allow 2 of 1 approvals by alice, bob",
            "From: none",
        ] {
            assert!(message.lines().any(|found| found == line), "{line}\n{message}");
        }
        assert!(message.contains("Gate: soak OVERRIDDEN ") && message.contains(&format!("To: {digest}\n")), "{message}");
        // What was and is.
        shop.release("1.1");
        let history = shop.verb(&["history", "prod"]).ok();
        let kinds: Vec<&str> = history.stdout.lines().map(|line| line.split_whitespace().nth(1).unwrap()).collect();
        assert_eq!(kinds, ["promote", "approve", "approve", "apply"]);
        let diff = shop.verb(&["diff", "prod", "stage"]).ok();
        diff.prints("prod: 1.0 → stage: 1.1")
            .prints("  LEVEL: info → debug")
            .prints("  REGION: gone")
            .prints("  the secrets differ");
        let by = |actor: &str| shop.verb(&["--json", "log", "--actor", actor]).ok().json()["log"].as_array().unwrap().len();
        assert_eq!((by("alice"), by("bob"), by("carol")), (7, 1, 0));
        assert_eq!(shop.verb(&["--json", "log", "--kind", "approve"]).ok().json()["log"][0]["actor"], "bob");
        shop.is_sound();
        shop.project.assert_clean();
    }
}

#[test]
fn a_target_has_to_serve() {
    let shop = Shop::new(
        me(),
        "environments:\n  dev: { automatic: true }\n  prod: { from: dev, target: { local: {} } }\n  eu:\n    from: prod\n    gates: [ { healthy: true } ]\n",
    );
    shop.release("1.0");
    shop.verb(&["promote", "--to", "prod", "--dry-run"]).ok();
    let answer = shop.verb(&["promote", "--to", "prod"]).run();
    answer.code(75).prints("done: ").prints("nothing serves this environment yet: its health is unknown");
    assert_eq!(shop.at("prod")["health"], "unknown");
    let answer = shop.nothing_changes(|| shop.verb(&["--json", "promote", "--to", "eu"]).run());
    answer.code(1);
    assert_eq!(answers(&answer), ["healthy unknown"]);
    shop.release("1.1");
    shop.verb(&["promote", "--to", "prod", "--no-wait"]).ok();
    assert_eq!(shop.version("prod"), "1.1");
}

#[test]
fn what_cannot_be_promoted() {
    let shop = Shop::new(me(), ROW);
    shop.release("1.0");
    let edit = |from: &str, to: &str| shop.project.edit("pipeline.yaml", from, to);
    // The graph.
    let apply = || shop.verb(&["environment", "apply"]);
    edit("prod:\n    from: stage", "prod:\n    from: prod");
    shop.fails(apply(), 2, "pipeline.yaml:17:11: environment `prod` promotes from itself", "defined environments are");
    edit("prod:\n    from: prod", "prod:\n    from: stage");
    edit("stage: { from: dev,", "stage: { from: prod,");
    shop.fails(apply(), 2, "pipeline.yaml:17:5: ", "promote from one another in a ring");
    edit("stage: { from: prod,", "stage: { from: dev,");
    edit("prod:\n    from: stage", "prod:\n    from: staging");
    shop.fails(apply(), 2, "pipeline.yaml:17:11: environment `prod` promotes from `staging`, which is not defined", "`stage`");
    shop.fails(shop.verb(&["hold", "prod"]), 2, "pipeline.yaml:17:11: environment `prod` promotes from `staging`", "`stage`");
    edit("prod:\n    from: staging", "prod:\n    from: stage");
    let promote = |args: &[&str]| shop.verb(&["promote", "tiny", "--to"]).args(args);
    shop.fails(promote(&["prud"]), 2, "`tiny` has no environment `prud`", "hint: did you mean `tiny/prod`?");
    shop.fails(
        promote(&["prod", "--release", "9.9"]),
        2,
        "`tiny` has no release `9.9` in `stage`",
        "hint: `pipeline history tiny/stage`",
    );
    shop.refused(promote(&["stage"]), "nothing new can come to `tiny/stage` from `tiny/dev`", "`--release` names one");
    shop.refused(promote(&["stage", "--release", "1.0"]), "release `", "` is in `tiny/stage` already");
    shop.fails(
        promote(&["prod", "--override", "soka", "--reason", "x"]),
        2,
        "there is no gate `soka` here",
        "hint: gates are `freeze`",
    );
    shop.fails(shop.verb(&["rollback", "prod", "--to", "9.9"]), 2, "release `9.9` was never in `tiny/prod`", "pipeline history");
    shop.refused(shop.verb(&["rollback", "prod"]), "", "");
    shop.refused(shop.verb(&["hold", "prod", "--lift"]), "there is no hold on `tiny/prod`", "");
    shop.refused(shop.verb(&["thaw", "prod"]), "`tiny/prod` is not frozen", "");
    shop.refused(shop.verb(&["thaw", "--all", "prod"]), "`prod` is not frozen in all pipelines", "");
    shop.refused(shop.verb(&["clear", "prod", "1.0"]), "`1.0` is not marked bad in `tiny/prod`", "");
    shop.fails(
        shop.verb(&["freeze", "prod", "--until", "soon", "--reason", "x"]),
        2,
        "`soon` is neither a time nor a length of time",
        "like `2026-12-24T18:00:00Z`",
    );
    shop.refused(
        shop.verb(&["freeze", "prod", "--until", "2020-01-01T00:00:00Z", "--reason", "x"]),
        "the end of the freeze is not after its beginning",
        "",
    );
    shop.fails(shop.verb(&["freeze", "--all", "tiny/prod", "--reason", "x"]), 2, "`--all` is about all pipelines", "");
    shop.fails(shop.verb(&["config", "set", "prod", "9LEVEL=x"]), 2, "", "hint: a value is written KEY=VALUE");
    // Skipping one: this release never was in stage.
    shop.verb(&["hold", "stage"]).ok();
    shop.build("1.1", &[]).run().code(0);
    assert_eq!(shop.versions(), ["1.1", "1.0", "nothing"]);
    shop.refused(promote(&["prod", "--release", "1.1"]), "release `", "` is not and was not healthy in `tiny/stage`");
    shop.refused(
        promote(&["prod", "--release", "1.1", "--override", "freeze", "--reason", "x"]),
        "release `",
        "promote it there first",
    );
    shop.is_sound();
}

#[test]
fn holds_and_freezes() {
    for user in users() {
        let shop = Shop::new(user, ROW);
        shop.release("1.0");
        shop.verb(&["hold", "stage", "--reason", "a demo"]).ok().prints("tiny/stage: hold (");
        let built = shop.build("1.1", &[]).run();
        built.code(0).prints("tiny/stage: 1.0 (").prints("NO  hold  by alice since ").prints(": a demo").prints("refused");
        assert_eq!(shop.versions(), ["1.1", "1.0", "nothing"]);
        shop.verb(&["status"]).ok().prints("HOLD by alice since ");
        shop.nothing_changes(|| shop.verb(&["promote", "--to", "stage"]).run()).code(1).prints("NO  hold");
        shop.verb(&["promote", "--to", "stage", "--lift"]).ok().prints("ok  hold  lifted; it was by alice");
        assert_eq!(shop.at("stage")["hold"], Value::Null);
        // A freeze stops everything that changes what runs, and ends.
        shop.fails(shop.verb(&["freeze", "prod", "--reason", " "]), 1, "a freeze needs a reason", "--reason");
        shop.verb(&["freeze", "prod", "--until", "2h", "--reason", "a sale"]).ok().prints("tiny/prod: freeze until ");
        let promote = ["promote", "--to", "prod"];
        let frozen = shop.nothing_changes(|| shop.verb(&promote).run());
        frozen.code(1).prints("NO  freeze  by alice until ").prints(": a sale").prints("it can go from ");
        shop.nothing_changes(|| shop.verb(&["config", "set", "prod", "LEVEL=warn"]).run()).code(1).prints("NO  freeze");
        shop.verb(&promote).args(&["--override", "freeze", "--reason", "the fix"]).ok().prints("OVERRIDDEN  freeze");
        shop.verb(&["thaw", "prod"]).ok().prints("tiny/prod: thaw (");
        shop.release("1.2");
        shop.verb(&promote).ok();
        // One word stops every pipeline.
        shop.verb(&["freeze", "--all", "prod", "--reason", "emergency"]).ok().prints("prod of all pipelines: freeze (");
        shop.release("1.3");
        shop.nothing_changes(|| shop.verb(&promote).run()).code(1).prints("NO  freeze  by alice until it is thawed: emergency");
        shop.nothing_changes(|| shop.verb(&["rollback", "prod"]).run()).code(1).prints("NO  freeze");
        shop.refused(shop.verb(&["thaw", "prod"]), "`tiny/prod` is not frozen", "pipeline thaw --all prod");
        shop.fails(shop.verb(&["freeze", "--all", "prud", "--reason", "x"]), 2, "no pipeline has an environment `prud`", "");
        shop.verb(&["thaw", "--all", "prod"]).ok();
        shop.verb(&promote).ok();
        assert_eq!(shop.versions(), ["1.3", "1.3", "1.3"]);
        shop.is_sound();
    }
}

#[test]
fn a_configuration_is_a_state() {
    let shop = Shop::new(
        me(),
        "environments:\n  dev: { automatic: true, config: { LEVEL: debug }, secrets: { TOKEN: { stored: true } } }\n  prod:\n    from: dev\n    config: { LEVEL: info }\n    gates: [ { approve: 1 } ]\n",
    );
    // Nothing comes before the secret has a value, and the value is nowhere in the ledger.
    let built = shop.build("1.0", &[]).run();
    built.code(1).says("error: the secret `TOKEN` of `tiny/dev` is not set").says("hint: `pipeline secret set tiny/dev TOKEN`");
    shop.fails(shop.verb(&["secret", "set", "dev", "TOKEN"]).input(""), 2, "the secret has 0 bytes", "standard input has it");
    shop.verb(&["secret", "set", "dev", "TOKEN"]).input("s3cret-value").ok();
    shop.verb(&["promote", "--to", "dev"]).ok();
    assert_eq!(shop.version("dev"), "1.0");
    let ledger = shop.project.git_in(&shop.ledger(), &["log", "--patch", "main"]);
    assert!(!ledger.stdout.contains("s3cret"), "{}", ledger.stdout);
    shop.verb(&["environment", "show", "dev"]).ok().prints("secret TOKEN: set");
    // At once, where nobody has to agree; it is in the history, and goes back.
    let level = |environment: &str| shop.state(environment)["current"]["config"]["values"]["LEVEL"].clone();
    shop.verb(&["config", "set", "dev", "LEVEL=trace", "EXTRA=1"])
        .ok()
        .prints("  LEVEL: debug → trace")
        .prints("  EXTRA: new, 1");
    assert_eq!(level("dev"), "trace");
    shop.refused(shop.verb(&["config", "set", "dev", "LEVEL=trace"]), "`tiny/dev` is configured like that already", "");
    shop.verb(&["rollback", "dev"]).ok().prints("  LEVEL: trace → debug").prints("  EXTRA: gone");
    assert_eq!(level("dev"), "debug");
    let state = shop.state("dev");
    assert_eq!(
        (&state["bad"], &state["hold"]["set_by"]),
        (&serde_json::json!({}), &"rollback".into()),
        "no release is bad for it"
    );
    // Where somebody has to, it waits, and comes with the promotion; an approval is for one pair.
    shop.by("bob", &["approve", "--for", "prod"]).ok();
    shop.verb(&["promote", "--to", "prod"]).ok();
    shop.verb(&["config", "set", "prod", "LEVEL=warn"])
        .ok()
        .prints("NO  approve")
        .prints("written down (")
        .prints("waits for `pipeline promote --to tiny/prod`");
    assert_eq!(level("prod"), "info");
    shop.verb(&["status"]).ok().prints("a configuration waits");
    shop.nothing_changes(|| shop.verb(&["promote", "--to", "prod"]).run()).code(1);
    shop.by("bob", &["approve", "--for", "prod", "--release", "1.0"]).ok();
    shop.verb(&["promote", "--to", "prod"]).ok();
    assert_eq!(level("prod"), "warn");
    shop.verb(&["rollback", "prod"]).ok();
    assert_eq!((level("prod"), shop.version("prod").as_str()), ("info".into(), "1.0"));
    shop.is_sound();
}

#[test]
fn back_to_what_was_good() {
    for user in users() {
        let shop = Shop::new(user, ROW);
        for version in ["1.0", "1.1", "1.2"] {
            shop.release(version);
            shop.verb(&["promote", "--to", "prod"]).ok();
        }
        shop.nothing_changes(|| shop.verb(&["rollback", "prod", "--dry-run"]).ok()).prints("it would be done");
        shop.verb(&["rollback", "tiny/prod", "--reason", "it fails"]).ok().prints("tiny/prod: 1.2 (").prints("→ 1.1 (");
        let state = shop.at("prod");
        assert_eq!((&state["version"], &state["bad"]), (&"1.1".into(), &serde_json::json!(["1.2"])));
        assert!(state["hold"].as_str().unwrap().ends_with(", by a rollback: it fails"), "{state}");
        assert_eq!(state["waiting"], Value::Null, "what is bad is not offered");
        // Nothing brings it back by itself, nor by hand before somebody clears it.
        shop.verb(&["promote", "--automatic"]).ok();
        let again = ["promote", "--to", "prod", "--release", "1.2", "--lift"];
        shop.refused(shop.verb(&again), "release `", "is marked bad in `tiny/prod` by alice since ");
        shop.verb(&["rollback", "prod", "--to", "1.0"]).ok();
        let bad = shop.at("prod")["bad"].as_array().unwrap().clone();
        assert!(bad.len() == 2 && bad.contains(&"1.1".into()) && bad.contains(&"1.2".into()), "{bad:?}");
        shop.refused(shop.verb(&["rollback", "prod"]), "", "");
        shop.refused(shop.verb(&["clear", "prod", "1.3"]), "`1.3` is not marked bad in `tiny/prod`", "hint: marked are `1.");
        shop.verb(&["clear", "prod", "1.2", "--reason", "it was the disk"]).ok().prints("tiny/prod: clear 1.2 (");
        shop.nothing_changes(|| shop.verb(&again[..5]).run()).code(1).prints("NO  hold");
        shop.verb(&again).ok();
        assert_eq!((shop.version("prod").as_str(), &shop.at("prod")["hold"]), ("1.2", &Value::Null));
        shop.is_sound();
    }
}

#[test]
fn an_automatic_environment_stays_where_it_was_put() {
    let shop = Shop::new(me(), ROW);
    for version in ["1.0", "1.1"] {
        shop.release(version);
    }
    shop.verb(&["rollback", "stage"]).ok();
    shop.build("1.2", &[]).ok().prints("NO  hold");
    assert_eq!(shop.versions(), ["1.2", "1.0", "nothing"]);
    shop.verb(&["hold", "stage", "--lift"]).ok();
    shop.verb(&["promote", "--automatic"]).ok().prints("tiny/stage: 1.0 (");
    assert_eq!(shop.versions(), ["1.2", "1.2", "nothing"]);
}

#[test]
fn a_dry_run_shows_what_would_change() {
    let shop = Shop::without(
        me(),
        "environments:\n  dev: { automatic: true }\n  prod: { from: dev, automatic: true, config: { LEVEL: info, OLD: x } }\n",
    );
    let lock = |version: &str| {
        let text = format!("version = 4\n\n[[package]]\nname = \"left\"\nversion = \"{version}\"\nsource = \"registry+x\"\n");
        shop.project.write("src/Cargo.lock", text);
    };
    lock("1.0.0");
    shop.project.write(".gitignore", "/base.tar\n");
    shop.project.git(&["init", "--quiet"]);
    let commit = |version: &str| -> String {
        shop.project.git(&["add", "--all"]);
        shop.project.git(&["commit", "--quiet", "--message", version]);
        shop.project.git(&["rev-parse", "HEAD"]).stdout.trim().to_owned()
    };
    let one = commit("1.0");
    shop.verb(&["environment", "apply"]).ok();
    shop.verb(&["hold", "prod"]).ok();
    let first = shop.release("1.0");
    shop.verb(&["hold", "prod", "--lift"]).ok();
    // What would come by itself: it is shown, and stays where it is.
    let promote = |args: &[&str]| shop.verb(&["promote", "tiny"]).args(args);
    let report = shop.project.beside("out").join("junit.xml");
    let dry = shop.nothing_changes(|| promote(&["--automatic", "--dry-run", "--junit"]).arg(&report).ok());
    dry.prints("tiny/prod: nothing → 1.0 (").prints("  image tiny nothing → ").prints("it would be done\n");
    assert!(fs_err::read_to_string(&report).unwrap().contains("<testsuite name=\"tiny/prod\""));
    let dry = shop.nothing_changes(|| promote(&["--automatic", "--dry-run", "--json"]).ok()).json();
    assert_eq!((dry["outcomes"].as_array().unwrap().len(), &dry["outcomes"][0]["commit"]), (1, &Value::Null));
    assert_eq!(
        (&dry["changes"][0]["release"]["from"], &dry["changes"][0]["release"]["to"]),
        (&Value::Null, &first.as_str().into())
    );
    assert_eq!(shop.version("prod"), "nothing");
    for also in [["--reason", "x"], ["--override", "freeze"], ["--no-wait", "--json"]] {
        shop.nothing_changes(|| promote(&["--automatic"]).args(&also).run()).code(2).says("cannot be used with");
    }
    promote(&["--automatic"]).ok().prints("tiny/prod: nothing → 1.0 (").prints("done: ");
    promote(&["--automatic"]).ok().prints("tiny: nothing comes by itself now");

    // Everything that differs, and how much has to move.
    shop.verb(&["hold", "prod"]).ok();
    shop.project.edit("pipeline.yaml", "{ LEVEL: info, OLD: x }", "{ LEVEL: debug, NEW: y }");
    shop.verb(&["environment", "apply"]).ok();
    lock("2.0.0");
    let two = commit("1.1");
    let second = shop.release("1.1");
    let read = |digest: &str| -> Value {
        let path = shop.project.root.join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"));
        serde_json::from_slice(&fs_err::read(path).unwrap()).unwrap()
    };
    let image = |release: &str| read(release)["manifests"][0]["digest"].as_str().unwrap().to_owned();
    let (from, to) = (image(&first), image(&second));
    let blobs = |image: &str, release: &str| -> std::collections::BTreeMap<String, u64> {
        let entry = read(release)["manifests"][0].clone();
        let manifest = read(image);
        let all = manifest["layers"].as_array().unwrap().iter().chain([&manifest["config"], &entry]);
        let pair = |it: &Value| (it["digest"].as_str().unwrap().to_owned(), it["size"].as_u64().unwrap());
        let size = fs_err::metadata(shop.project.root.join("store/blobs/sha256").join(&release[7..])).unwrap().len();
        all.map(pair).chain([(release.to_owned(), size)]).collect()
    };
    let old = blobs(&from, &first);
    let bytes: u64 = blobs(&to, &second).iter().filter(|(digest, _)| !old.contains_key(*digest)).map(|(_, size)| size).sum();
    assert!(bytes > 0 && bytes < 100_000, "{bytes}");
    let dry = shop.nothing_changes(|| promote(&["--to", "prod", "--lift", "--dry-run", "--json"]).ok()).json();
    let expected = serde_json::json!({
        "release": { "from": first, "to": second },
        "artifacts": [ { "kind": "image", "name": "tiny", "from": from, "to": to } ],
        "commit": { "from": one, "to": two },
        "packages": [ { "kind": "cargo", "name": "left", "from": ["1.0.0"], "to": ["2.0.0"] } ],
        "bytes": bytes,
        "values": [
            { "name": "LEVEL", "from": "info", "to": "debug" },
            { "name": "NEW", "from": null, "to": "y" },
            { "name": "OLD", "from": "x", "to": null },
        ],
        "secrets": [],
        "unknown": [],
    });
    assert_eq!(dry["changes"], expected);
    let dry = shop.nothing_changes(|| promote(&["--to", "prod", "--lift", "--dry-run"]).ok());
    dry.prints(&format!("  image tiny {} → {}\n", &from[7..19], &to[7..19]))
        .prints(&format!("  commit {} → {}\n", &one[..12], &two[..12]))
        .prints("  cargo left 1.0.0 → 2.0.0\n")
        .prints("  LEVEL: info → debug\n")
        .prints("  OLD: gone\n")
        .prints(" to move, 1 packages\n");
    // The budget and `diff` count the same.
    shop.verb(&["diff", "prod", "dev"]).ok().prints("  cargo left 1.0.0 → 2.0.0\n").prints(" to move, 1 packages\n");
    // What the store does not have is said, and the rest is shown.
    let blob = shop.project.root.join("store/blobs/sha256").join(&first[7..]);
    fs_err::rename(&blob, shop.project.beside("away").join("blob")).unwrap();
    let dry = shop.nothing_changes(|| promote(&["--to", "prod", "--lift", "--dry-run"]).ok());
    dry.prints("  not known: ").prints(&first[7..19]).prints("  LEVEL: info → debug\n");
    fs_err::rename(shop.project.beside("away").join("blob"), &blob).unwrap();
    promote(&["--to", "prod", "--lift"]).ok();
    shop.is_sound();
}
