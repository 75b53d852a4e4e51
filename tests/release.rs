//! Releases on their way through environments, with the program as people call it: gates, approvals, holds, freezes,
//! configurations, rollbacks, people with keys, a remote that is away, and what makes a ledger unsound.

mod common;
#[path = "release/shared.rs"]
mod shared;

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use common::{Answer, Project, Run, User, me, tool, users};
use serde_json::Value;

/// Three environments in a row, the first two by themselves.
const ROW: &str = "\
environments:
  dev: { automatic: true }
  stage: { from: dev, automatic: true, config: { LEVEL: debug } }
  prod:
    from: stage
    config: { LEVEL: info, REGION: north }
    secrets: { TOKEN: { env: TOKEN } }
";

/// A pipeline `tiny` with environments, and people who decide about it.
struct Shop {
    project: Project,
    builds: std::cell::Cell<u32>,
}

impl Shop {
    /// With `environments` in the pipeline file, in the ledger.
    fn new(user: User, environments: &str) -> Self {
        let shop = Self::without(user, environments);
        shop.verb(&["environment", "apply"]).ok();
        shop
    }

    fn without(user: User, environments: &str) -> Self {
        let shop = Self { project: Project::tiny(user), builds: 0.into() };
        let text = shop.project.read("pipeline.yaml");
        shop.project.write("pipeline.yaml", text + environments);
        shop
    }

    /// The program, as alice calls it.
    fn verb<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Run {
        self.by("alice", args)
    }

    fn by<S: AsRef<std::ffi::OsStr>>(&self, who: &str, args: &[S]) -> Run {
        self.project.pipeline(args).env("GIT_AUTHOR_NAME", who).env("GIT_AUTHOR_EMAIL", format!("{who}@example.org"))
    }

    /// With the key of `who`, as [`Shop::key`] made it.
    fn signed<S: AsRef<std::ffi::OsStr>>(&self, who: &str, args: &[S]) -> Run {
        self.by(who, args).env("PIPELINE_SIGNING_KEY", self.project.beside("keys").join(who))
    }

    /// Makes an SSH key; its public line.
    fn key(&self, who: &str) -> String {
        tool("ssh-keygen", "openssh-client");
        let file = self.project.beside("keys").join(who);
        self.project.program("ssh-keygen").args(&["-q", "-t", "ed25519", "-N", "", "-C", who, "-f"]).arg(&file).ok();
        fs_err::read_to_string(file.with_extension("pub")).unwrap().trim().into()
    }

    fn build(&self, version: &str, args: &[&str]) -> Run {
        self.builds.set(self.builds.get() + 1);
        self.project.write("src/index.html", format!("<h1>{}</h1>\n", self.builds.get()));
        self.verb(&["build", "--release", "--release-version", version]).args(args)
    }

    /// A release; its digest.
    fn release(&self, version: &str) -> String {
        let answer = self.build(version, &["--json"]).ok();
        answer.json()["release"]["release"]["digest"].as_str().unwrap().into()
    }

    /// What `status --json` says of `tiny/ENVIRONMENT`.
    fn at(&self, environment: &str) -> Value {
        let name = format!("tiny/{environment}");
        self.verb(&["--json", "status", &name]).ok().json()["environments"][0].clone()
    }

    /// The version in an environment.
    fn version(&self, environment: &str) -> String {
        self.at(environment)["version"].as_str().unwrap_or("nothing").into()
    }

    fn versions(&self) -> [String; 3] {
        ["dev", "stage", "prod"].map(|environment| self.version(environment))
    }

    fn ledger(&self) -> PathBuf {
        let answer = self.verb(&["--json", "ledger", "path"]).ok();
        answer.json()["path"].as_str().unwrap().into()
    }

    fn tip(&self) -> String {
        self.project.git_in(&self.ledger(), &["rev-parse", "main"]).stdout.trim().into()
    }

    /// Does nothing, whatever it says.
    #[track_caller]
    fn nothing_changes(&self, work: impl FnOnce() -> Answer) -> Answer {
        let before = self.tip();
        let answer = work();
        assert_eq!(self.tip(), before, "{}{}", answer.stdout, answer.stderr);
        answer
    }

    /// Refused by what no gate can change: `error: …`, exit 1.
    #[track_caller]
    fn refused(&self, run: Run, message: &str, hint: &str) {
        self.fails(run, 1, message, hint);
    }

    #[track_caller]
    fn fails(&self, run: Run, code: i32, message: &str, hint: &str) {
        let answer = self.nothing_changes(|| run.run());
        answer.code(code).says(&format!("error: {message}")).says(hint);
        let errors = answer.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(errors == 1 && answer.stdout.is_empty(), "{}{}", answer.stdout, answer.stderr);
    }

    /// The state file of an environment, as Git has it.
    fn state(&self, environment: &str) -> Value {
        let path = format!("main:tiny/{environment}.json");
        self.project.git_in(&self.ledger(), &["show", &path]).json()
    }

    fn is_sound(&self) {
        self.verb(&["ledger", "verify"]).ok().prints("sound: ");
        self.project.git_in(&self.ledger(), &["fsck", "--strict", "--full", "--no-progress"]);
    }
}

/// The answers of the gates in an outcome: `gate verdict`.
fn answers(answer: &Answer) -> Vec<String> {
    let value = answer.json();
    let answers = value["outcome"]["plan"]["answers"].as_array().unwrap();
    answers.iter().map(|one| format!("{} {}", one["gate"].as_str().unwrap(), one["verdict"].as_str().unwrap())).collect()
}

// ------------------------------------------------------------------------------------------------- the way

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

// ----------------------------------------------------------------------------------------- what is refused

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

/// What is in the store and what was promised of it.
#[test]
fn releases_that_are_not_what_they_should_be() {
    let shop = Shop::without(
        me(),
        "environments:\n  dev: {}\n  prod:\n    from: dev\n    gates:\n    - signed: { keys: [keys/team.pub] }\n    - provenance: { clean: true, unsigned: true }\n    - name: late\n      provenance: { clean: true, keys: [keys/team.pub] }\n",
    );
    let keys = shop.project.path("keys");
    shop.project.write("keys/none", "");
    for name in ["team", "other"] {
        shop.verb(&["keys", "generate", name, "--output"]).arg(&keys).ok();
    }
    shop.project.write(".gitignore", "/base.tar\n/keys\n");
    shop.project.git(&["init", "--quiet"]);
    shop.project.git(&["add", "--all"]);
    shop.project.git(&["commit", "--quiet", "--message", "all"]);
    shop.verb(&["environment", "apply"]).ok();
    let make = |version: &str, key: Option<&str>| -> String {
        let key = key.map(|key| keys.join(format!("{key}.key")));
        let args: Vec<&str> = key.iter().flat_map(|key| ["--key", key.to_str().unwrap()]).collect();
        let run = shop.build(version, &["--json"]).args(&args);
        if !version.ends_with("dirty") {
            shop.project.git(&["commit", "--quiet", "--all", "--message", version]);
        }
        let answer = run.ok();
        shop.verb(&["promote", "--to", "dev", "--release", version]).ok();
        answer.json()["release"]["release"]["digest"].as_str().unwrap().into()
    };
    let promote = |version: &str| {
        let answer = shop.verb(&["--json", "promote", "--to", "prod", "--release", version]).run();
        let found = answers(&answer);
        let value = answer.json();
        let reason = value["outcome"]["plan"]["answers"][0]["reason"].as_str().unwrap().to_owned();
        (answer.status.code().unwrap(), found, reason)
    };
    let verdicts = |all: [&str; 3]| {
        ["signed", "provenance", "late"].iter().zip(all).map(|(gate, verdict)| format!("{gate} {verdict}")).collect::<Vec<_>>()
    };
    let refused = |version: &str, all: [&str; 3], why: &str| {
        let before = shop.tip();
        let (code, found, reason) = promote(version);
        assert_eq!((code, found), (1, verdicts(all)), "{version}: {reason}");
        assert!(reason.contains(why), "{version}: {reason}");
        assert_eq!(shop.tip(), before);
    };
    make("1.0-unsigned", None);
    refused("1.0-unsigned", ["deny", "allow", "deny"], "no signature by a key that counts");
    make("1.1-other", Some("other"));
    refused("1.1-other", ["deny", "allow", "deny"], "no signature by a key that counts");
    make("1.2-dirty", Some("team"));
    refused("1.2-dirty", ["allow", "deny", "deny"], "by one of 1 keys");
    // One byte of one blob; then the blob is gone.
    let digest = make("1.3", Some("team"));
    let blob = |digest: &str| shop.project.root.join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let read = |digest: &str| -> Value { serde_json::from_slice(&fs_err::read(blob(digest)).unwrap()).unwrap() };
    let image = read(&digest)["manifests"][0]["digest"].as_str().unwrap().to_owned();
    let layer = read(&image)["layers"].as_array().unwrap().last().unwrap()["digest"].as_str().unwrap().to_owned();
    let good = fs_err::read(blob(&layer)).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs_err::write(blob(&layer), &bad).unwrap();
    refused("1.3", ["unknown", "allow", "allow"], &layer[..19]);
    fs_err::remove_file(blob(&layer)).unwrap();
    refused("1.3", ["unknown", "allow", "allow"], &layer[..19]);
    shop.project.write("blob", &good);
    fs_err::rename(shop.project.path("blob"), blob(&layer)).unwrap();
    assert_eq!(promote("1.3").0, 0);
    assert_eq!(shop.version("prod"), "1.3");
    shop.is_sound();
}

/// Whatever the gates are: what is missing or was changed goes nowhere.
#[test]
fn a_release_that_is_not_whole_goes_nowhere() {
    let shop = Shop::new(me(), "environments:\n  dev: {}\n  prod: { from: dev, gates: [ { healthy: true } ] }\n");
    let digest = shop.release("1.0");
    shop.verb(&["promote", "--to", "dev"]).ok();
    let blob = |digest: &str| shop.project.root.join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let read = |digest: &str| -> Value { serde_json::from_slice(&fs_err::read(blob(digest)).unwrap()).unwrap() };
    let image = read(&digest)["manifests"][0]["digest"].as_str().unwrap().to_owned();
    let manifest = read(&image);
    let layer = manifest["layers"].as_array().unwrap().last().unwrap()["digest"].as_str().unwrap().to_owned();
    let config = manifest["config"]["digest"].as_str().unwrap().to_owned();
    for part in [&layer, &config, &image, &digest] {
        let good = fs_err::read(blob(part)).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        for (what, bytes) in [("one byte", Some(&bad)), ("gone", None)] {
            match bytes {
                Some(bytes) => fs_err::write(blob(part), bytes).unwrap(),
                None => fs_err::remove_file(blob(part)).unwrap(),
            }
            if part == &digest && bytes.is_none() {
                // A release that is not here at all is for its registry to be whole.
                shop.verb(&["promote", "--to", "prod", "--dry-run"]).ok();
                continue;
            }
            for args in [&["promote", "--to", "prod"][..], &["promote", "--to", "prod", "--dry-run"]] {
                let answer = shop.nothing_changes(|| shop.verb(args).run());
                answer.code(1).says(&format!("release {digest} is not whole in the store of this machine")).says(part);
                assert_eq!(shop.version("prod"), "nothing", "{what} of {part}");
            }
        }
        shop.project.write("blob", &good);
        fs_err::rename(shop.project.path("blob"), blob(part)).unwrap();
    }
    shop.verb(&["promote", "--to", "prod"]).ok();
    assert_eq!(shop.version("prod"), "1.0");
    shop.is_sound();
}

/// The gate as the documentation writes it, over what `build --release` makes.
#[test]
fn provenance_is_as_it_is_documented_and_knows_what_is_not_committed() {
    let gate = "provenance: { builders: [\"pipeline@*\"], clean: true, keys: [keys/team.pub] }";
    let shop = Shop::without(me(), &format!("environments:\n  dev: {{}}\n  prod: {{ from: dev, gates: [ {{ {gate} }} ] }}\n"));
    let keys = shop.project.path("keys");
    shop.project.write("keys/none", "");
    shop.verb(&["keys", "generate", "team", "--output"]).arg(&keys).ok();
    shop.project.write(".gitignore", "/base.tar\n/keys\n");
    shop.project.git(&["init", "--quiet"]);
    shop.verb(&["environment", "apply"]).ok();
    let key = keys.join("team.key");
    let dirty = "made from a source with changes that are not committed";
    let meddle: [(&str, &dyn Fn(), &str); 6] = [
        ("1.0", &|| {}, ""),
        ("1.1", &|| shop.project.write("pipeline.yaml", shop.project.read("pipeline.yaml") + "# changed\n"), dirty),
        (
            "1.2",
            &|| shop.project.write("builder/s2i/bin/assemble", shop.project.read("builder/s2i/bin/assemble") + "# x\n"),
            dirty,
        ),
        ("1.3", &|| shop.project.write("builder/s2i/bin/new", "#!/bin/sh\n"), dirty),
        ("1.4", &|| shop.project.write("src/new.html", "<p>\n"), dirty),
        ("1.5", &|| shop.project.write("beside", "of no use to the build\n"), ""),
    ];
    for (version, change, expected) in meddle {
        let run = shop.build(version, &["--key", key.to_str().unwrap()]);
        shop.project.git(&["add", "--all"]);
        shop.project.git(&["commit", "--quiet", "--message", version]);
        change();
        run.ok();
        shop.verb(&["promote", "--to", "dev", "--release", version]).ok();
        let answer = shop.verb(&["--json", "promote", "--to", "prod", "--release", version]).run();
        let found = answer.json()["outcome"]["plan"]["answers"][0].clone();
        if expected.is_empty() {
            assert_eq!(found["verdict"], "allow", "{version}: {found}");
            let reason = found["reason"].as_str().unwrap();
            assert!(reason.starts_with(&format!("built by `pipeline@{}` from ", env!("CARGO_PKG_VERSION"))), "{reason}");
        } else {
            assert_eq!((&found["verdict"], &found["reason"]), (&"deny".into(), &expected.into()), "{version}");
        }
    }
    shop.is_sound();
}

#[test]
fn commands_that_are_asked() {
    let cases = [
        ("hangs", "sleep 600", "unknown", "`sleep 600` did not end within 1s"),
        ("prints nothing and fails", "exit 1", "deny", "`exit 1` says no"),
        ("prints nothing", "exit 0", "allow", "`exit 0` says yes"),
        ("malformed", "printf '\\\\377\\\\033[31mno\\\\n'; exit 1", "deny", "\u{fffd} [31mno"),
        ("crashes", "kill -SEGV $$", "unknown", "ended with signal 11"),
        ("another status", "echo sure; exit 3", "unknown", "ended with status 3: sure"),
        (
            "is told",
            "echo $PIPELINE_NAME/$PIPELINE_ENVIRONMENT $PIPELINE_VERSION $PIPELINE_ACTOR; exit 1",
            "deny",
            "tiny/prod 1.0 alice",
        ),
    ];
    let shop = Shop::without(me(), "");
    let text = shop.project.read("pipeline.yaml");
    let mut first = true;
    for (what, script, verdict, reason) in cases {
        shop.project.write(
            "pipeline.yaml",
            format!("{text}environments:\n  dev: {{ automatic: true }}\n  prod:\n    from: dev\n    gates:\n    - command: {{ run: \"{script}\", timeout: 1s }}\n"),
        );
        shop.verb(&["environment", "apply"]).ok();
        if std::mem::take(&mut first) {
            shop.release("1.0");
        }
        let answer = shop.nothing_changes(|| shop.verb(&["--json", "promote", "--to", "prod", "--dry-run"]).run());
        answer.code(i32::from(verdict != "allow"));
        let one = answer.json()["outcome"]["plan"]["answers"][0].clone();
        assert_eq!(one["verdict"], verdict, "{what}: {one}");
        assert!(one["reason"].as_str().unwrap().contains(reason), "{what}: {one}");
    }
}

#[test]
fn a_clock_that_goes_back() {
    tool("faketime", "faketime");
    let shop =
        Shop::new(me(), "environments:\n  dev: { automatic: true }\n  prod:\n    from: dev\n    gates: [ { soak: 1h } ]\n");
    shop.release("1.0");
    let at =
        |offset: &str| shop.verb(&["--json", "promote", "--to", "prod", "--dry-run"]).wrap(&["faketime", "-f", offset]).run();
    let verdict = |answer: &Answer| answer.json()["outcome"]["plan"]["answers"][0].clone();
    assert_eq!(verdict(&at("+30m"))["verdict"], "deny");
    assert_eq!(verdict(at("+61m").code(0))["verdict"], "allow");
    let back = verdict(at("-1m").code(1));
    assert_eq!(
        (&back["verdict"], &back["reason"]),
        (&"unknown".into(), &"the clock went back since the release came to tiny/dev".into())
    );
    // A release that came while the clock was behind does not soak, whatever the clock says later.
    shop.build("1.1", &[]).wrap(&["faketime", "-f", "-2m"]).ok();
    assert_eq!(verdict(at("+5h").code(1))["verdict"], "unknown");
    shop.is_sound();
}

// ------------------------------------------------------------------------------------- holds and freezes

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

// ------------------------------------------------------------------------------- configurations and rollback

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

// ------------------------------------------------------------------------------------------------- people

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

/// Answers requests with 200 as a proxy would; how many came, and the first line of the last.
fn proxy() -> (u16, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = std::sync::Arc::clone(&asked);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.windows(4).any(|window| window == b"\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(read @ 1..) => request.extend_from_slice(&buffer[..read]),
                    _ => break,
                }
            }
            seen.lock().unwrap().push(String::from_utf8_lossy(&request).lines().next().unwrap_or_default().to_owned());
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        }
    });
    (port, asked)
}

/// Addresses are asked the way out that the machine's variables name.
#[test]
fn a_gate_asks_through_the_proxy() {
    let shop = Shop::new(
        me(),
        "environments:\n  dev: { automatic: true }\n  prod: { from: dev, gates: [ { http: { url: \"http://status.invalid/ready\" } } ] }\n",
    );
    shop.release("1.0");
    let (port, asked) = proxy();
    let address = format!("http://127.0.0.1:{port}");
    let dry = |variables: &[(&str, &str)]| {
        let run = shop.verb(&["--json", "promote", "--to", "prod", "--dry-run"]);
        let run = variables.iter().fold(run, |run, (name, value)| run.env(name, value));
        let answer = run.run();
        answers(&answer).remove(0)
    };
    // Nobody knows that name.
    assert_eq!(dry(&[("http_proxy", ""), ("HTTP_PROXY", "")]), "http unknown");
    for name in ["http_proxy", "HTTP_PROXY"] {
        let other = if name == "http_proxy" { "HTTP_PROXY" } else { "http_proxy" };
        assert_eq!(dry(&[(name, &address), (other, ""), ("no_proxy", ""), ("NO_PROXY", "")]), "http allow", "{name}");
        assert_eq!(asked.lock().unwrap().drain(..).collect::<Vec<_>>(), ["GET http://status.invalid/ready HTTP/1.1"], "{name}");
    }
    for (name, other) in [("no_proxy", "NO_PROXY"), ("NO_PROXY", "no_proxy")] {
        assert_eq!(dry(&[("http_proxy", &address), (other, ""), (name, "status.invalid")]), "http unknown", "{name}");
    }
    assert!(asked.lock().unwrap().is_empty());
}

/// A program beside the pipeline file is part of the policy: whoever asks cannot bring another, and it sees no secret of ours.
#[test]
fn programs_of_gates_are_in_the_ledger() {
    let gate =
        "environments:\n  dev: { automatic: true }\n  prod: { from: dev, gates: [ { command: { run: [./ready.sh, prod] } } ] }\n";
    let shop = Shop::without(me(), gate);
    let refused: [(&[u8], &str, &str); 4] = [
        (b"\x7fELF\xff\xfe", "is no text", "by its absolute path"),
        (b"#!/bin/sh\n\0", "is no text", "by its absolute path"),
        (b"echo yes\n", "does not say what runs it", "#!/bin/sh"),
        (&[b"#!/bin/sh\n".as_slice(), &[b'#'; 1 << 20]].concat(), "has more than 1 MiB", "by its absolute path"),
    ];
    for (bytes, why, hint) in refused {
        shop.project.write("ready.sh", bytes);
        shop.verb(&["environment", "apply"]).run().code(2).says(why).says(hint);
    }
    let secrets = ["COSIGN_PASSWORD", "PIPELINE_REGISTRY_PASSWORD", "PIPELINE_KEY"];
    let shown: String = secrets.iter().map(|name| format!(" ${{{name}-gone}}")).collect();
    shop.project.write("ready.sh", format!("#!/bin/sh\necho \"$1 $(ls -A | wc -l)$KEPT{shown}\"; exit 1\n"));
    shop.verb(&["environment", "apply"]).ok();
    shop.release("1.0");
    // Another one of that name, where the one who asks stands; and the one beside the pipeline file changes later.
    let elsewhere = shop.project.beside("elsewhere");
    for path in [elsewhere.join("ready.sh"), shop.project.path("ready.sh")] {
        let written = shop.project.program("sh").args(&["-c", "printf '#!/bin/sh\\nexit 0\\n' > $0 && chmod 755 $0"]).arg(&path);
        written.ok();
    }
    for dir in [&elsewhere, &shop.project.dir] {
        let run = shop.verb(&["--json", "promote", "tiny", "--to", "prod"]).dir(dir).env("KEPT", " kept");
        let run = secrets.iter().fold(run, |run, name| run.env(name, "s3cret"));
        let answer = shop.nothing_changes(|| run.run());
        let one = answer.json()["outcome"]["plan"]["answers"][0].clone();
        assert_eq!((&one["verdict"], &one["reason"]), (&"deny".into(), &"prod 0 kept gone gone gone".into()));
    }
}

/// A job that collects the gates' answers finds a file also when no gate was asked.
#[test]
fn what_the_rules_refuse_is_in_the_report() {
    let shop = Shop::new(me(), ROW);
    shop.release("1.0");
    let report = shop.project.beside("out").join("junit.xml");
    let cases: [(&[&str], i32, &str); 7] = [
        (&["promote", "--to", "stage", "--release", "1.0"], 1, "is in `tiny/stage` already"),
        (&["promote", "--to", "stage"], 1, "nothing new can come to `tiny/stage`"),
        (&["promote", "--to", "prod", "--release", "9.9"], 2, "`tiny` has no release `9.9`"),
        (&["promote", "--to", "prud"], 2, "has no environment `prud`"),
        (&["rollback", "dev"], 1, "no release before this one was healthy"),
        (&["config", "set", "stage", "LEVEL=debug"], 1, "is configured like that already"),
        (&["secret", "set", "nowhere", "TOKEN"], 2, "has no environment `nowhere`"),
    ];
    for (args, code, why) in cases {
        let _ = fs_err::remove_file(&report);
        shop.verb(args).arg("--junit").arg(&report).input("value").run().code(code);
        let text = fs_err::read_to_string(&report).unwrap();
        assert!(text.contains(" tests=\"1\" failures=\"0\" errors=\"1\">") && text.contains("<error message=\""), "{text}");
        assert!(text.contains(why), "{why}: {text}");
        pipeline::release::junit::parse(&text).unwrap();
    }
    shop.verb(&["--json", "ledger", "log", "--kind", "promote"]).ok().prints("\"subject\": \"tiny/stage: promote 1.0");
    assert_eq!(shop.verb(&["ledger", "log"]).ok().stdout, shop.verb(&["log"]).ok().stdout);
}

// ------------------------------------------------------------------------------------------------ dry runs

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

/// Where releases enter, an approval is for one that the store has.
#[test]
fn what_enters_can_be_approved() {
    let shop = Shop::new(me(), "environments:\n  prod: { gates: [ { approve: 1 } ] }\n");
    shop.release("1.0");
    let promote = ["promote", "tiny", "--to", "prod"];
    shop.nothing_changes(|| shop.verb(&promote).run()).code(1).prints("0 of 1 approvals");
    let approve = |who: &str, args: &[&str]| shop.by(who, &["approve", "tiny", "--for", "prod"]).args(args);
    shop.refused(approve("bob", &["--release", "9.9"]), "nobody knows a release `9.9` here", "");
    approve("bob", &["--release", "1.0"]).ok().prints("tiny/prod: approve 1.0 (");
    shop.verb(&promote).ok().prints("1 of 1 approvals by bob").prints("done: ");
    // The newest, when none is named.
    shop.release("1.1");
    approve("bob", &[]).ok().prints("tiny/prod: approve 1.1 (");
    shop.verb(&promote).args(&["--release", "1.1"]).ok();
    assert_eq!(shop.version("prod"), "1.1");
    shop.is_sound();
}

/// Where a job builds, the author is whose commit it built: nobody approves alone what is one's own.
#[test]
fn the_author_of_what_a_job_built() {
    let shop = Shop::without(me(), "");
    let people: String = [("alice", "admin, promote, approve"), ("bob", "approve"), ("ci", "promote")]
        .iter()
        .map(|(name, roles)| format!("  {name}: {{ key: \"{}\", roles: [{roles}] }}\n", shop.key(name)))
        .collect();
    let text = shop.project.read("pipeline.yaml");
    let environments = "environments:\n  dev: {}\n  prod: { from: dev, gates: [ { approve: 1 } ] }\n";
    shop.project.write("pipeline.yaml", format!("{text}{environments}people:\n{people}"));
    shop.project.write(".gitignore", "/base.tar\n");
    shop.project.git(&["init", "--quiet"]);
    shop.project.git(&["add", "--all"]);
    shop.project.git(&["commit", "--quiet", "--message", "all", "--author", "alice <alice@example.org>"]);
    shop.signed("alice", &["environment", "apply"]).ok();
    let author = || shop.state("dev")["current"]["author"].clone();
    shop.signed("ci", &["build", "--release", "--release-version", "1.0"]).ok();
    shop.signed("ci", &["promote", "--to", "dev"]).ok();
    assert_eq!(author(), "alice");
    shop.signed("alice", &["approve", "--for", "prod"]).ok();
    let alone = shop.nothing_changes(|| shop.signed("ci", &["promote", "--to", "prod"]).run());
    alone.code(1).prints("approvals by alice, who made the release: somebody else has to approve too");
    shop.signed("bob", &["approve", "--for", "prod"]).ok();
    shop.signed("ci", &["promote", "--to", "prod"]).ok();
    // Who could approve is the author of what they bring, whatever Git says of the commit.
    shop.project.git(&["commit", "--quiet", "--allow-empty", "--message", "more", "--author", "bob <bob@example.org>"]);
    shop.project.write("src/index.html", "<h1>more</h1>\n");
    shop.signed("alice", &["build", "--release", "--release-version", "1.1"]).ok();
    shop.signed("alice", &["promote", "--to", "dev", "--release", "1.1"]).ok();
    assert_eq!(author(), "alice");
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

// ------------------------------------------------------------------------------------------------ verifying

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
fn forge(file: &str, old: &str, new: &str) -> String {
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

// -------------------------------------------------------------------------------------------- at one time

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
