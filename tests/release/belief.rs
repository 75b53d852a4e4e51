//! What is believed of a ledger: keys of people, forged and meddled histories, races, and kills in the middle of a decision.

use std::time::Duration;

use serde_json::Value;

use super::common::{Answer, me};
use super::shop::{ROW, Shop};

#[test]
fn keys_of_people_count() {
    let shop = Shop::without(me(), "");
    let people: String =
        [("alice", "admin, promote, approve"), ("bob", "approve, override, promote"), ("ci", "promote"), ("dora", "approve")]
            .iter()
            .map(|(name, roles)| format!("  {name}: {{ key: \"{}\", roles: [{roles}] }}\n", shop.key(name)))
            .collect();
    shop.key("mallory");
    let text = shop.project.read("pipeline.yaml");
    shop.project.write(
        "pipeline.yaml",
        format!(
            "{text}{ROW}    gates: [ {{ approve: 1 }}, {{ name: calm, command: {{ run: [\"false\"] }} }} ]\npeople:\n{people}"
        ),
    );
    shop.verb(&["environment", "apply"]).ok().says("the first policy of `tiny` is trusted as it is");
    // Later ones need an admin and his key.
    shop.project.edit("pipeline.yaml", "REGION: north", "REGION: south");
    let apply = ["environment", "apply"];
    shop.refused(shop.verb(&apply), "the decision is not signed by the key of `alice`", "sign with it");
    shop.refused(shop.signed("bob", &apply), "`bob` does not have the role `admin`", "hint: ask `alice`");
    shop.refused(
        shop.signed("mallory", &apply),
        "`mallory` is not one of the people of `tiny`",
        "people are `alice`, `bob`, `ci`, `dora`",
    );
    shop.signed("alice", &apply).ok().prints("REGION").says_not("deciding as");
    // Somebody else's key, or none.
    let keys = shop.project.beside("keys");
    let build = |who: &str, key: &str, version: &str| {
        shop.project.write("src/index.html", version);
        shop.by(who, &["build", "--release", "--release-version", version]).env("PIPELINE_SIGNING_KEY", keys.join(key))
    };
    build("ci", "ci", "1.0").ok();
    shop.refused(
        shop.by("alice", &["approve", "--for", "prod"]).env("PIPELINE_SIGNING_KEY", keys.join("mallory")),
        "the decision is not signed by the key of `alice`",
        "",
    );
    shop.refused(shop.verb(&["approve", "--for", "prod"]), "the decision is not signed by the key of `alice`", "");
    shop.refused(
        shop.signed("ci", &["approve", "--for", "prod"]),
        "`ci` does not have the role `approve`",
        "hint: ask `alice`, `bob`, `dora`",
    );
    shop.refused(shop.signed("dora", &["rollback", "stage"]), "", "");
    let over = ["promote", "--to", "prod", "--override", "calm", "--reason", "a fix"];
    shop.signed("dora", &["approve", "--for", "prod"]).ok();
    shop.refused(shop.signed("dora", &over), "`dora` does not have the role `promote`", "hint: ask `alice`, `bob`, `ci`");
    shop.refused(shop.signed("alice", &over), "`alice` does not have the role `override`", "hint: ask `bob`");
    shop.refused(shop.by("bob", &over), "the decision is not signed by the key of `bob`", "");
    shop.signed("bob", &over).ok().prints("OVERRIDDEN  calm").prints("approve  1 of 1 approvals by dora");
    shop.refused(shop.signed("dora", &["hold", "prod"]), "`dora` does not have the role `promote` or `admin` or `override`", "");
    // Git and OpenSSH agree about who it was.
    let allowed = keys.join("allowed");
    let lines: String = ["alice", "bob", "ci", "dora"]
        .iter()
        .map(|name| format!("{name} {}\n", fs_err::read_to_string(keys.join(format!("{name}.pub"))).unwrap().trim()))
        .collect();
    fs_err::write(&allowed, lines).unwrap();
    let option = format!("gpg.ssh.allowedSignersFile={}", allowed.display());
    let log = shop.project.git_in(&shop.ledger(), &["-c", &option, "log", "--format=%G? %GS %an", "main"]);
    assert_eq!(log.stdout, "G bob bob\nG dora dora\nG ci ci\nG ci ci\nG alice alice\nN  alice\n");
    shop.is_sound();
    // An approval of somebody who has lost the role does not count any more.
    build("ci", "ci", "1.1").ok();
    shop.signed("dora", &["approve", "--for", "prod"]).ok();
    let with = shop.project.read("pipeline.yaml");
    let line = with.lines().find(|line| line.starts_with("  dora:")).unwrap();
    shop.project.edit("pipeline.yaml", line, &line.replace("[approve]", "[report]"));
    shop.signed("alice", &apply).ok();
    shop.nothing_changes(|| shop.signed("bob", &over).run()).code(1).prints("approve  0 of 1 approvals");
    shop.is_sound();
}

/// A value that no decision names is not kept.
#[test]
fn secrets_that_were_not_set_are_not_kept() {
    let shop = Shop::new(me(), "environments:\n  dev: { secrets: { TOKEN: { stored: true } } }\n");
    let kept = || match fs_err::read_dir(shop.project.root.join("state/secrets")) {
        Ok(entries) => entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect(),
        Err(_) => Vec::new(),
    };
    let set = |args: &[&str]| shop.verb(&["secret", "set"]).args(args).input("s3cret-value");
    shop.nothing_changes(|| set(&["dev", "TOKEN", "--dry-run"]).ok());
    assert_eq!(kept(), Vec::<String>::new());
    shop.nothing_changes(|| set(&["nowhere", "TOKEN"]).run()).code(2);
    assert_eq!(kept(), Vec::<String>::new());
    set(&["dev", "TOKEN"]).ok();
    shop.release("1.0");
    shop.verb(&["promote", "--to", "dev"]).ok();
    let current = || shop.state("dev")["current"]["config"]["secrets"]["TOKEN"]["stored"].as_str().unwrap().to_owned();
    let first = current();
    assert_eq!(kept(), [first.as_str()]);
    shop.verb(&["freeze", "dev", "--reason", "calm"]).ok();
    shop.nothing_changes(|| set(&["dev", "TOKEN"]).run()).code(1).prints("freeze");
    shop.nothing_changes(|| set(&["dev", "TOKEN", "--override", "nothing"]).run()).code(2);
    assert_eq!(kept(), [first.as_str()]);
    shop.verb(&["thaw", "dev"]).ok();
    set(&["dev", "TOKEN"]).ok();
    assert_eq!(kept().len(), 2, "a rollback needs the first");
    assert!(kept().contains(&first) && kept().contains(&current()) && first != current());
}

/// Git in the ledger, as somebody who should not.
fn meddle(shop: &Shop, script: &str) {
    let answer = shop
        .project
        .program("sh")
        .dir(shop.ledger())
        .args(&["-euc", script])
        .env("GIT_INDEX_FILE", shop.project.path("meddling"))
        .env("GIT_AUTHOR_NAME", "alice")
        .env("GIT_AUTHOR_EMAIL", "alice@example.org")
        .env("GIT_COMMITTER_NAME", "alice")
        .env("GIT_COMMITTER_EMAIL", "alice@example.org")
        .run();
    answer.code(0);
}

/// Replaces text of a state file in a commit that looks like the last one.
pub fn forge(file: &str, old: &str, new: &str) -> String {
    format!(
        "git read-tree main; blob=$(git show main:{file} | sed 's/{old}/{new}/' | git hash-object -w --stdin);
         git update-index --cacheinfo 100644,$blob,{file}; tree=$(git write-tree);
         [ $tree != $(git rev-parse main^{{tree}}) ];
         export GIT_AUTHOR_NAME=$(git log -1 --format=%an main) GIT_AUTHOR_EMAIL=$(git log -1 --format=%ae main);
         export GIT_COMMITTER_NAME=$GIT_AUTHOR_NAME GIT_COMMITTER_EMAIL=$GIT_AUTHOR_EMAIL;
         export GIT_AUTHOR_DATE=\"$(git log -1 --format=%ad main)\"; export GIT_COMMITTER_DATE=\"$GIT_AUTHOR_DATE\";
         commit=$(git log -1 --format=%B main | git commit-tree $tree -p main);
         git update-ref refs/heads/main $commit"
    )
}

#[test]
fn what_makes_a_ledger_unsound() {
    let rewritten = "the history was rewritten";
    let cases: [(&str, String, &[&str]); 7] = [
        ("a commit by hand", forge("tiny/prod.json", "\"LEVEL\": \"info\"", "\"LEVEL\": \"none\""), &["it could not be decided: `bob` has approved"]),
        ("two files at once", {
            let one = forge("tiny/prod.json", "\"LEVEL\": \"info\"", "\"LEVEL\": \"none\"");
            one.replace("tree=$(git write-tree);", "git update-index --cacheinfo 100644,$blob,tiny/dev.json; tree=$(git write-tree);")
        }, &["state"]),
        ("an approval that nobody gave", forge("tiny/prod.json", "\"by\": \"bob\"", "\"by\": \"eve\""), &["it could not be decided: `bob` has approved"]),
        ("a stranger's file", "git read-tree main; blob=$(echo hello | git hash-object -w --stdin);
            git update-index --add --cacheinfo 100644,$blob,README; tree=$(git write-tree);
            git update-ref refs/heads/main $(git commit-tree $tree -p main -m hello)".into(), &["README"]),
        ("the last commit is another one", "git update-ref refs/heads/main $(git log -1 --format=%B main | sed 's/looks good/looks bad/' | git commit-tree main^{tree} -p main~1)".into(), &[rewritten]),
        ("cut back", "git update-ref refs/heads/main main~2".into(), &[rewritten]),
        ("a merge", "git update-ref refs/heads/main $(git log -1 --format=%B main | git commit-tree main^{tree} -p main -p main~1)".into(), &["it has more than one parent"]),
    ];
    let shop = Shop::new(me(), &format!("{ROW}    gates: [ {{ approve: 1 }} ]\n"));
    shop.release("1.0");
    shop.by("bob", &["approve", "--for", "prod"]).ok();
    shop.verb(&["promote", "--to", "prod"]).ok();
    shop.release("1.1");
    shop.by("bob", &["approve", "--for", "prod", "--reason", "looks good"]).ok();
    shop.is_sound();
    let good = shop.tip();
    for (what, script, findings) in cases {
        meddle(&shop, &script);
        let _ = fs_err::remove_file(shop.project.path("meddling"));
        let answer = shop.verb(&["ledger", "verify"]).run();
        answer.code(1).prints("NOT SOUND: ");
        for finding in findings {
            assert!(answer.stdout.contains(finding), "{what}: no `{finding}`\n{}", answer.stdout);
        }
        // What cuts the history is refused by every verb.
        if findings.contains(&rewritten) {
            shop.verb(&["promote", "--to", "prod"]).run().code(1).says("error: the history of the ledger `").says(&good);
            shop.verb(&["status"]).run().code(1).says("was rewritten");
        }
        let value = shop.verb(&["--json", "ledger", "verify"]).run().json();
        assert!(!value["findings"].as_array().unwrap().is_empty(), "{what}");
        // Back to what was, as the hint says.
        meddle(&shop, &format!("git update-ref refs/heads/main {good}"));
        shop.is_sound();
    }
    // A blob with other bytes.
    let ledger = shop.ledger();
    let blob = shop.project.git_in(&ledger, &["rev-parse", "main:tiny/prod.json"]).stdout.trim().to_owned();
    let path = ledger.join("objects").join(&blob[..2]).join(&blob[2..]);
    let other = shop.project.git_in(&ledger, &["rev-parse", "main:tiny/dev.json"]).stdout.trim().to_owned();
    fs_err::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    fs_err::copy(ledger.join("objects").join(&other[..2]).join(&other[2..]), &path).unwrap();
    shop.verb(&["ledger", "verify"]).run().code(1).prints("NOT SOUND: ");
}

#[test]
fn two_people_at_one_second() {
    let shop = Shop::new(me(), ROW);
    for round in 0..5 {
        let racers = [("alice", format!("{round}.0")), ("bob", format!("{round}.1"))];
        racers.iter().for_each(|(_, version)| drop(shop.release(version)));
        let mut running: Vec<_> = racers
            .iter()
            .map(|(who, version)| shop.by(who, &["promote", "--to", "prod", "--release", version]).start())
            .collect();
        let ended: Vec<Answer> = running.iter_mut().map(|running| running.wait(Duration::from_secs(60))).collect();
        // One wins, and the other one is told who and what; or it came when the first was through.
        let log = shop.verb(&["--json", "log", "-n", "2"]).ok().json();
        let made = |who: &str, version: &str| {
            let is = |one: &Value| {
                one["actor"] == who && one["subject"].as_str().unwrap().starts_with(&format!("tiny/prod: promote {version} "))
            };
            log["log"].as_array().unwrap().iter().any(is)
        };
        for (index, (who, version)) in racers.iter().enumerate() {
            let (other, theirs) = &racers[1 - index];
            let answer = &ended[index];
            assert_eq!(made(who, version), answer.status.success(), "{log}\n{answer:?}");
            if !answer.status.success() {
                let message = format!("error: somebody else was faster: `{other}` decided `promote {theirs}` about `tiny/prod`");
                answer.code(1).says(&message);
            }
        }
        assert!(ended.iter().any(|answer| answer.status.success()));
        let newest = log["log"][0]["subject"].as_str().unwrap().to_owned();
        assert!(newest.starts_with(&format!("tiny/prod: promote {} ", shop.version("prod"))), "{newest}");
    }
    // The same one: it is promoted once, and the other is told.
    shop.release("9.0");
    let mut running: Vec<_> = ["alice", "bob"].iter().map(|who| shop.by(who, &["promote", "--to", "prod"]).start()).collect();
    let ended: Vec<Answer> = running.iter_mut().map(|running| running.wait(Duration::from_secs(60))).collect();
    let mut codes: Vec<i32> = ended.iter().map(|answer| answer.status.code().unwrap()).collect();
    codes.sort_unstable();
    assert_eq!(codes, [0, 1], "{ended:#?}");
    let log = shop.verb(&["--json", "log", "--kind", "promote"]).ok().json();
    let brought = log["log"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| one["subject"].as_str().unwrap().starts_with("tiny/prod: promote 9.0 "));
    assert_eq!(brought.count(), 1);
    shop.is_sound();
}

#[test]
fn kill_9_at_every_write_of_a_decision() {
    let shop = Shop::new(me(), ROW);
    shop.release("1.0");
    let mut level = 0;
    let mut killed = 0;
    for point in 1.. {
        level += 1;
        let value = format!("LEVEL={level}");
        let set = ["config", "set", "stage", value.as_str()];
        let answer = shop.verb(&set).env("PIPELINE_FAULT", point.to_string()).run();
        let died = !answer.status.success();
        if died {
            answer.code(137);
            killed += 1;
        }
        let now = |shop: &Shop| shop.state("stage")["current"]["config"]["values"]["LEVEL"].clone();
        let stands = now(&shop).as_str() == Some(level.to_string().as_str());
        // The old state or the new one; the next command completes it.
        assert!(died || stands);
        let again = shop.verb(&set).run();
        again.code(i32::from(stands));
        assert_eq!(now(&shop), level.to_string(), "killed at {point}");
        shop.verb(&["ledger", "verify"]).ok();
        if !died {
            break;
        }
    }
    assert!(killed >= 5, "only {killed} points");
    shop.is_sound();
    // A build that dies between two environments: the next one goes on.
    for point in 1.. {
        let version = format!("2.{point}");
        shop.project.write("src/index.html", &version);
        let args = ["build", "--release", "--release-version", &version];
        let answer = shop.verb(&args).env("PIPELINE_FAULT", (point * 7).to_string()).run();
        shop.verb(&args).ok();
        assert_eq!(shop.versions()[..2], [version.clone(), version], "killed at {}", point * 7);
        if answer.status.success() {
            break;
        }
    }
    shop.is_sound();
}
