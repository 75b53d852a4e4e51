//! Gates: commands and servers that are asked, clocks, who may approve what, and what is written down of it.

use std::io::{Read as _, Write as _};

use super::common::{Answer, me, tool};
use super::shop::{ROW, Shop, answers};

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
