//! The ledger on a server: away, closed, over SSH, rewritten, decided apart from, and with decisions that nobody could make.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::belief::forge;
use super::common::{Run, me, tool};
use super::shop::{ROW, Shop};

/// A bare repository beside the pipeline file, as `ledger: ./shared.git` names it.
fn bare(shop: &Shop) -> PathBuf {
    shop.project.git(&["init", "--quiet", "--bare", "--initial-branch=main", "shared.git"]);
    shop.project.path("shared.git")
}

/// A shop whose ledger is shared, with two releases in prod.
fn sharing() -> (Shop, PathBuf) {
    let shop = Shop::without(me(), &format!("{ROW}ledger: ./shared.git\n"));
    let shared = bare(&shop);
    shop.verb(&["environment", "apply"]).ok();
    for version in ["1.0", "1.1"] {
        shop.release(version);
        shop.verb(&["promote", "--to", "prod"]).ok();
    }
    (shop, shared)
}

fn tip(shop: &Shop, dir: &Path) -> String {
    shop.project.git_in(dir, &["rev-parse", "main"]).stdout.trim().to_owned()
}

/// Another machine of `who`, in the same folder.
fn other(shop: &Shop, who: &str, args: &[&str]) -> Run {
    let root = shop.project.beside("other");
    let run = shop.project.bare(&["--root"]).arg(&root).args(args);
    run.env("GIT_AUTHOR_NAME", who).env("GIT_AUTHOR_EMAIL", format!("{who}@example.org"))
}

#[test]
fn a_remote_that_is_away() {
    let shop = Shop::without(me(), &format!("{ROW}ledger: ./shared.git\n"));
    let shared = shop.project.path("shared.git");
    shop.project.git(&["init", "--quiet", "--bare", "--initial-branch=main", "shared.git"]);
    shop.verb(&["environment", "apply"]).ok();
    for version in ["1.0", "1.1"] {
        shop.release(version);
        shop.verb(&["promote", "--to", "prod"]).ok();
    }
    let theirs = |dir: &Path| shop.project.git_in(dir, &["rev-parse", "main"]).stdout.trim().to_owned();
    assert_eq!(theirs(&shared), shop.tip());
    let away = shop.project.path("away.git");
    fs_err::rename(&shared, &away).unwrap();
    // A promotion counts only when everybody has it; a rollback does not wait.
    let promote = shop.nothing_changes(|| shop.verb(&["promote", "--to", "prod", "--release", "1.0"]).run());
    assert!(!promote.status.success());
    promote.says("error: ");
    let rolled = shop.verb(&["rollback", "prod", "--reason", "it fails"]).ok();
    rolled.says("warning: ").says("going on with what is known here");
    rolled.prints("the remote ledger does not have it yet: the next command that reaches it publishes it");
    assert_eq!(shop.version("prod"), "1.0");
    assert_ne!(theirs(&away), shop.tip());
    shop.verb(&["status"]).ok().says("going on with what is known here");
    fs_err::rename(&away, &shared).unwrap();
    shop.verb(&["status"]).ok().says("published to ");
    assert_eq!(theirs(&shared), shop.tip());
    // Another machine sees the same.
    let other = shop.project.beside("other");
    let there = |args: &[&str]| shop.project.bare(&["--root"]).arg(&other).args(args).env("GIT_AUTHOR_NAME", "bob");
    there(&["status"]).ok().prints("tiny/prod").prints("1.0").prints("HOLD by alice");
    there(&["hold", "prod", "--lift"]).ok();
    shop.verb(&["status"]).ok();
    assert_eq!(shop.at("prod")["hold"], Value::Null);
    // Somebody cuts the history there: nothing is decided any more, and both ids are named.
    let cut = theirs(&shared);
    shop.project.git_in(&shared, &["update-ref", "refs/heads/main", "main~2"]);
    let answer = shop.nothing_changes(|| shop.verb(&["hold", "prod"]).run());
    answer.code(1).says("error: ").says("rewritten").says(&cut).says(&theirs(&shared));
    shop.is_sound();
}

/// Answers every request with `401 Unauthorized`; its port.
fn unauthorized() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let _ = client.read(&mut [0; 4096]);
            let head = "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\n";
            let _ = client.write_all(format!("{head}Content-Length: 0\r\nConnection: close\r\n\r\n").as_bytes());
        }
    });
    port
}

#[test]
fn a_remote_that_lets_nobody_in() {
    let shop = Shop::new(me(), ROW);
    for version in ["1.0", "1.1"] {
        shop.release(version);
        shop.verb(&["promote", "--to", "prod"]).ok();
    }
    let closed = format!("http://127.0.0.1:{}/ledger.git", unauthorized());
    let there = |args: &[&str]| shop.verb(args).env("PIPELINE_LEDGER", &closed);
    shop.fails(there(&["hold", "prod"]), 1, &format!("the ledger at `{closed}` does not let this in: "), "credential helpers");
    there(&["status"]).ok().says("going on with what is known here").prints("1.1");
    there(&["freeze", "prod", "--all", "--reason", "fire"]).ok().says("going on with what is known here");
    shop.verb(&["thaw", "prod", "--all"]).ok();
    there(&["rollback", "prod"]).ok().says("going on with what is known here").prints("the next command that reaches it");
    assert_eq!(shop.version("prod"), "1.0");
    shop.is_sound();
}

/// An OpenSSH server for the caller, on a port of 127.0.0.1; ends with the test.
struct Ssh {
    port: u16,
    daemon: std::process::Child,
}

impl Ssh {
    fn start(shop: &Shop) -> Self {
        assert!(Path::new("/usr/sbin/sshd").exists(), "`sshd` is missing: apt-get install openssh-server");
        let folder = shop.project.beside("ssh");
        fs_err::create_dir_all(&folder).unwrap();
        for name in ["host", "alice"] {
            shop.project.program("ssh-keygen").args(&["-q", "-t", "ed25519", "-N", "", "-f"]).arg(folder.join(name)).ok();
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let at = folder.display();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {at}/host\nPidFile none\nAuthorizedKeysFile {at}/alice.pub\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\n"
        );
        fs_err::write(folder.join("config"), config).unwrap();
        // Where the daemon's unprivileged part is shut in.
        let _ = fs_err::create_dir_all("/run/sshd");
        let log = fs_err::File::create(folder.join("log")).unwrap().into_parts().0;
        let daemon = pipeline::cmd::Cmd::new("/usr/sbin/sshd").args(["-D", "-e", "-f"]).arg(folder.join("config"));
        let daemon = daemon.stderr(log.into()).spawn().unwrap();
        let ssh = Self { port, daemon };
        let patience = std::time::Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = fs_err::read_to_string(folder.join("log")).unwrap();
            assert!(std::time::Instant::now() < patience, "sshd did not start:\n{log}");
            std::thread::sleep(Duration::from_millis(20));
        }
        ssh
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

#[test]
fn a_remote_over_ssh() {
    let shop = Shop::without(me(), ROW);
    let ssh = Ssh::start(&shop);
    let folder = shop.project.beside("ssh");
    shop.project.git(&["init", "--quiet", "--bare", "--initial-branch=main", "shared.git"]);
    let shared = shop.project.path("shared.git");
    let user = shop.project.program("id").args(&["-un"]).ok().stdout;
    let url = format!("ssh://{}@127.0.0.1:{}{}", user.trim(), ssh.port, shared.display());
    let home = shop.project.beside("home-of-ssh");
    fs_err::create_dir_all(home.join(".ssh")).unwrap();
    let there = |args: &[&str]| {
        let run = shop.verb(args).env("HOME", &home).env("PIPELINE_LEDGER", &url);
        run.env("GIT_AUTHOR_EMAIL", "alice@example.org").env("PIPELINE_SIGNING_KEY", folder.join("alice"))
    };
    // Nobody vouches for the server's key.
    let unknown = there(&["environment", "apply"]).run();
    unknown.code(1).says("does not let this in").says(&format!("ssh://127.0.0.1:{}", ssh.port));
    let host = fs_err::read_to_string(folder.join("host.pub")).unwrap();
    let known = format!("[127.0.0.1]:{} {host}", ssh.port);
    fs_err::write(home.join(".ssh/known_hosts"), known).unwrap();
    there(&["environment", "apply"]).ok();
    there(&["hold", "prod", "--reason", "over ssh"]).ok();
    let theirs = shop.project.git_in(&shared, &["rev-parse", "main"]).stdout.trim().to_owned();
    assert_eq!(theirs, shop.tip());
    shop.project.git_in(&shared, &["log", "-1", "--format=%B", "main"]).prints("over ssh");
    // A hook that refuses is heard over SSH, too, and nothing is decided.
    let hook = shared.join("hooks/update");
    fs_err::write(&hook, "#!/bin/sh\necho not on Fridays >&2\nexit 1\n").unwrap();
    fs_err::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    shop.fails(there(&["hold", "prod", "--lift"]), 1, "", "not on Fridays");
    // A key that it does not know.
    shop.project.program("ssh-keygen").args(&["-q", "-t", "ed25519", "-N", "", "-f"]).arg(folder.join("mallory")).ok();
    let stranger = there(&["hold", "prod", "--lift"]).env("PIPELINE_SIGNING_KEY", folder.join("mallory"));
    shop.fails(stranger, 1, "the ledger at `ssh://", "the agent's keys and the signing key");
}

#[test]
fn decisions_that_nobody_could_make_are_not_followed() {
    let shop = Shop::without(me(), "");
    let people: String = ["alice", "bob"]
        .iter()
        .map(|name| format!("  {name}: {{ key: \"{}\", roles: [admin, promote, approve] }}\n", shop.key(name)))
        .collect();
    let text = shop.project.read("pipeline.yaml");
    let gates = "    gates: [ { approve: 1 } ]\n";
    shop.project.write("pipeline.yaml", format!("{text}{ROW}{gates}people:\n{people}ledger: ./shared.git\n"));
    let shared = bare(&shop);
    shop.signed("alice", &["environment", "apply"]).ok();
    shop.project.write("src/index.html", "1.0");
    shop.signed("alice", &["build", "--release", "--release-version", "1.0"]).ok();
    let good = tip(&shop, &shared);
    // Who may push, and nothing else, writes an approval by hand.
    let approval = shop.project.git_in(&shared, &["show", "main:tiny/stage.json"]).json();
    let (release, config) = (&approval["current"]["release"], &approval["decision"]["config"]);
    let forged = format!(
        r#"[{{"release":{release},"config":{config},"by":"bob","signed":true,"time":{}}}]"#,
        approval["decision"]["time"]
    );
    let script = forge("tiny\\/prod.json", r#""approvals": \[\]"#, &format!(r#""approvals": {}"#, forged.replace('/', "\\/")));
    let script = script.replace("tiny\\/prod.json", "tiny/prod.json");
    let meddling = shop.project.program("sh").dir(&shared).args(&["-euc", &script]);
    meddling.env("GIT_INDEX_FILE", shop.project.path("meddling")).ok();
    let bad = tip(&shop, &shared);
    assert_ne!(good, bad);
    let promote = shop.nothing_changes(|| shop.signed("alice", &["promote", "--to", "prod"]).run());
    promote.code(1).says("error: the ledger at `").says("has a decision that is not sound").says(&bad);
    shop.verb(&["status"]).ok().says("not sound").says("going on with what is known here");
    // A machine that knows nothing yet follows nothing of it.
    other(&shop, "bob", &["hold", "prod"]).env("PIPELINE_SIGNING_KEY", shop.project.beside("keys").join("bob")).run().code(1);
    // Taken back there, everything goes on.
    shop.project.git_in(&shared, &["update-ref", "refs/heads/main", &good]);
    shop.signed("bob", &["approve", "--for", "prod"]).ok();
    shop.signed("alice", &["promote", "--to", "prod"]).ok();
    shop.is_sound();
}

#[test]
fn decided_apart() {
    let (shop, shared) = sharing();
    other(&shop, "bob", &["status"]).ok();
    let away = shop.project.path("away.git");
    fs_err::rename(&shared, &away).unwrap();
    shop.verb(&["rollback", "prod", "--reason", "it fails"]).ok();
    fs_err::rename(&away, &shared).unwrap();
    other(&shop, "bob", &["hold", "dev", "--reason", "meanwhile"]).ok();
    // Nothing new can be decided, and what must not wait still works.
    shop.fails(shop.verb(&["hold", "stage"]), 1, "the ledger here, at ", "pipeline ledger set-aside");
    shop.verb(&["status"]).ok().says("have decided apart from each other").prints("1.0");
    let aside = shop.verb(&["ledger", "set-aside"]).ok();
    aside.prints("tiny/prod: rollback 1.0").prints("decide again what is still right");
    assert_eq!((tip(&shop, &shared), shop.version("prod").as_str()), (shop.tip(), "1.1"));
    shop.verb(&["ledger", "set-aside"]).ok().prints("nothing was decided here that is not there");
    shop.verb(&["rollback", "prod", "--reason", "it fails"]).ok();
    assert_eq!((tip(&shop, &shared), shop.version("prod").as_str()), (shop.tip(), "1.0"));
    shop.is_sound();
}

#[test]
fn a_history_that_was_rewritten_is_accepted_by_somebody() {
    let (shop, shared) = sharing();
    shop.project.git_in(&shared, &["update-ref", "refs/heads/main", "main~2"]);
    shop.refused(shop.verb(&["hold", "prod"]), "the history of the ledger at `", "");
    shop.verb(&["ledger", "accept"]).ok();
    // What is here and no longer there is published again, or given up: here it is the newer one.
    shop.verb(&["status"]).ok().says("published to ");
    assert_eq!(tip(&shop, &shared), shop.tip());
    shop.is_sound();
}

#[test]
fn decisions_go_where_they_went_before() {
    let (shop, shared) = sharing();
    // From any folder, also from one whose pipeline file is broken.
    let elsewhere = shop.project.beside("elsewhere");
    fs_err::create_dir_all(&elsewhere).unwrap();
    shop.verb(&["freeze", "--all", "prod", "--reason", "fire"]).dir(&elsewhere).ok();
    assert_eq!(tip(&shop, &shared), shop.tip());
    shop.verb(&["thaw", "--all", "prod"]).dir(&elsewhere).ok();
    shop.verb(&["hold", "tiny/stage"]).dir(&elsewhere).ok();
    assert_eq!(tip(&shop, &shared), shop.tip());
    fs_err::write(elsewhere.join("pipeline.yaml"), "name: [\n").unwrap();
    shop.fails(shop.verb(&["hold", "dev"]).dir(&elsewhere), 2, "", "");
    shop.verb(&["status"]).dir(&elsewhere).ok().prints("tiny/prod");
    // One ledger is shared with one server.
    let run = shop.verb(&["hold", "dev"]).env("PIPELINE_LEDGER", "/srv/other.git");
    shop.fails(run, 2, "the ledger here is shared with `", "pipeline ledger accept");
}

#[test]
fn a_fresh_machine_builds_into_the_shared_ledger() {
    let (shop, shared) = sharing();
    shop.project.write("src/index.html", "from a runner");
    let built = other(&shop, "ci", &["build", "--release", "--release-version", "2.0"]).ok();
    built.prints("tiny/dev: 1.1 (").prints("tiny/stage: 1.1 (").prints("→ 2.0 (");
    shop.verb(&["status"]).ok();
    assert_eq!((shop.versions(), tip(&shop, &shared)), (["2.0", "2.0", "1.1"].map(String::from), shop.tip()));
    // Away, the release is made, and nobody believes that it is anywhere.
    fs_err::rename(&shared, shop.project.path("away.git")).unwrap();
    shop.project.write("src/index.html", "from another");
    let built = other(&shop, "ci", &["build", "--release", "--release-version", "2.1"]).run();
    built.code(75).says("the release is made, and entered no environment");
}

#[test]
fn an_emergency_stop_is_ended_by_those_it_stops() {
    let shop = Shop::without(me(), "");
    let line = |name: &str| format!("  {name}: {{ key: \"{}\", roles: [admin, promote, approve] }}\n", shop.key(name));
    let (alice, mallory) = (line("alice"), line("mallory"));
    let bob = line("bob").replace("admin, promote, ", "");
    let text = shop.project.read("pipeline.yaml");
    shop.project.write("pipeline.yaml", format!("{text}{ROW}people:\n{alice}{bob}"));
    shop.signed("alice", &["environment", "apply"]).ok();
    shop.signed("alice", &["build", "--release", "--release-version", "1.0"]).ok();
    shop.signed("alice", &["freeze", "--all", "prod", "--until", "720h", "--reason", "fire"]).ok();
    let thaw = ["thaw", "--all", "prod"];
    shop.refused(shop.signed("mallory", &thaw), "`mallory` is not one of the people of `tiny`", "");
    // A pipeline of one's own ends it for itself, and makes it no shorter for others.
    let evil = shop.project.beside("evil");
    fs_err::create_dir_all(&evil).unwrap();
    let own = "name: evil\nbase: { scratch: true }\nimage: { command: [/x] }\nenvironments: { prod: {} }\npeople:\n";
    fs_err::write(evil.join("pipeline.yaml"), format!("{own}{mallory}")).unwrap();
    shop.signed("mallory", &["environment", "apply"]).dir(&evil).ok();
    let shorter = ["freeze", "--all", "prod", "--until", "1m", "--reason", "shorter"];
    shop.refused(shop.signed("mallory", &shorter).dir(&evil), "`prod` is frozen already, and longer, by `alice`: fire", "");
    shop.signed("mallory", &thaw).dir(&evil).ok().says("`prod` of `tiny` stays frozen: their own people have to thaw it");
    shop.refused(shop.signed("mallory", &thaw).dir(&evil), "`prod` is thawed for those who let you decide already", "");
    let promote = ["promote", "--to", "prod"];
    shop.nothing_changes(|| shop.signed("alice", &promote).run()).code(1).prints("NO  freeze  by alice");
    // Nor does the clock of somebody who may only approve end a freeze that has an end.
    tool("faketime", "faketime");
    shop.signed("alice", &["freeze", "prod", "--until", "720h", "--reason", "own"]).ok();
    shop.signed("alice", &thaw).ok().says_not("stays frozen");
    let text = shop.project.read("pipeline.yaml");
    shop.project.write("pipeline.yaml", text.replace("    from: stage\n", "    from: stage\n    gates: [ { approve: 1 } ]\n"));
    shop.signed("alice", &["environment", "apply"]).ok();
    shop.signed("bob", &["approve", "--for", "prod"]).wrap(&["faketime", "-f", "+60d"]).ok();
    shop.nothing_changes(|| shop.signed("alice", &promote).run())
        .code(1)
        .prints("NO  freeze ")
        .prints(" by alice until ")
        .prints(": own");
    // Which is told for as long as that time is to come.
    shop.verb(&["ledger", "verify"]).run().code(1).prints("yet to come by this machine's clock");
    assert_ne!(shop.state("prod")["freezes"], Value::Array(Vec::new()));
}
