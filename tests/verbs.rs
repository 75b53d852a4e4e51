//! The verbs that talk to the daemon, with the program as people call it, against a socket that answers what the daemon does:
//! what they say, what they wait for, and how they end. What the daemon itself does is in `rollout.rs`.

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Project, Run, me, tool};
use serde_json::{Value, json};

const ENVIRONMENTS: &str = "environments:\n  dev: { automatic: true }\n  prod: { from: dev, target: { local: {} } }\n";

/// The pipeline `tiny` with a release in `dev`, and a daemon.
struct Shop {
    project: Project,
}

impl Shop {
    fn new() -> Self {
        let shop = Self { project: Project::tiny(me()) };
        let text = shop.project.read("pipeline.yaml");
        shop.project.write("pipeline.yaml", text + ENVIRONMENTS);
        shop.verb(&["environment", "apply"]).ok();
        shop.release("1.0");
        shop
    }

    fn verb(&self, args: &[&str]) -> Run {
        self.project.pipeline(args).env("GIT_AUTHOR_NAME", "alice").env("GIT_AUTHOR_EMAIL", "alice@example.org")
    }

    fn release(&self, version: &str) {
        self.project.write("src/index.html", format!("<h1>{version}</h1>\n"));
        self.verb(&["build", "--release", "--release-version", version]).ok();
    }

    fn ledger(&self) -> PathBuf {
        self.verb(&["--json", "ledger", "path"]).ok().json()["path"].as_str().unwrap().into()
    }

    /// A daemon that rolls out as `plan` says.
    fn daemon(&self, plan: Plan) -> Daemon {
        let folder = self.project.root.join("run");
        fs_err::create_dir_all(&folder).unwrap();
        Daemon::start(&folder.join("sock"), self.ledger(), plan)
    }
}

/// What a daemon makes of a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Succeeds,
    Fails,
    /// Never gets further than starting.
    Hangs,
    /// Ends the stream in the middle once, as when it is replaced.
    IsReplaced,
    /// Switches and watches for ever.
    Watches,
    /// Serves other environments.
    Elsewhere,
}

struct Daemon {
    socket: PathBuf,
    asked: Arc<Mutex<Vec<String>>>,
    over: Arc<AtomicBool>,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.socket);
        let _ = fs_err::remove_file(&self.socket);
    }
}

impl Daemon {
    fn start(socket: &Path, ledger: PathBuf, plan: Plan) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        // The ordinary user of the tests connects too.
        fs_err::set_permissions(socket, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
        let daemon = Self { socket: socket.into(), asked: Arc::default(), over: Arc::default() };
        let (asked, over, replaced) = (daemon.asked.clone(), daemon.over.clone(), Arc::new(AtomicBool::new(false)));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                let (asked, ledger, replaced) = (asked.clone(), ledger.clone(), replaced.clone());
                std::thread::spawn(move || answer(stream.unwrap(), &ledger, plan, &asked, &replaced));
            }
        });
        daemon
    }

    /// Requests without those that only look.
    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().iter().filter(|line| line.starts_with("POST")).cloned().collect()
    }
}

fn answer(mut stream: UnixStream, ledger: &Path, plan: Plan, asked: &Mutex<Vec<String>>, replaced: &AtomicBool) {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    let (line, body) = loop {
        let Ok(read @ 1..) = stream.read(&mut buffer) else { return };
        bytes.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.split("Content-Length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            break (head.lines().next().unwrap().replace(" HTTP/1.1", ""), body.to_owned());
        }
    };
    asked.lock().unwrap().push(format!("{line} {body}").trim().to_owned());
    let mut reply = |status: &str, value: &Value| {
        let text = value.to_string();
        let _ = stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{text}", text.len()).as_bytes());
    };
    let path = line.split(' ').nth(1).unwrap();
    let served = plan != Plan::Elsewhere;
    match (path, served) {
        ("/v1/poke", _) => reply("200 OK", &json!({"tip": null})),
        ("/v1/status", _) => {
            let views = if served { vec![views(ledger, plan).pop().unwrap()] } else { Vec::new() };
            reply(
                "200 OK",
                &json!({
                    "format": 1, "environments": views,
                    "daemon": {
                        "version": "x", "pid": 1, "started": "2026-01-01T00:00:00Z", "ledger_tip": null, "last_pass": null,
                        "poll": 5.0, "listeners": [], "messages": [],
                    },
                }),
            );
        }
        ("/v1/environments/tiny/prod/watch", true) => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
            let breaks = plan == Plan::IsReplaced && !replaced.swap(true, Ordering::SeqCst);
            for view in views(ledger, plan).into_iter().take(if breaks { 1 } else { 9 }) {
                let text = view.to_string() + "\n";
                let _ = stream.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
                std::thread::sleep(Duration::from_millis(30));
            }
            if matches!(plan, Plan::Hangs | Plan::Watches) {
                std::thread::sleep(Duration::from_secs(60));
            }
        }
        (path, true) if path.starts_with("/v1/environments/tiny/prod") => {
            reply("200 OK", views(ledger, plan).last().unwrap());
        }
        _ => reply("404 Not Found", &json!({"error": "nothing of this name is served"})),
    }
}

/// What the daemon shows one after another of the decision that the ledger has last about `tiny/prod`.
fn views(ledger: &Path, plan: Plan) -> Vec<Value> {
    let output = pipeline::cmd::Cmd::new("git")
        .args(["-c", "safe.directory=*", "show", "main:tiny/prod.json"])
        .dir(ledger)
        .output()
        .unwrap();
    let state: Value = serde_json::from_slice(&output.stdout).unwrap();
    let current = &state["current"];
    let decision = &state["decision"];
    let zero = format!("sha256:{}", "0".repeat(64));
    let side = |color: &str, generation: &str, release: &Value, config: &Value, version: &Value, healthy: u32| {
        json!({
            "color": color, "generation": generation, "release": release, "version": version, "config": config,
            "instances": [{
                "id": format!("tiny-prod-{generation}-main-0"), "target": "main", "kind": "local", "status": "running",
                "healthy": healthy == 1, "restarts": 0, "last_probe": null, "memory": null,
            }],
            "healthy": healthy, "wanted": 1, "since": "2026-01-01T00:00:00Z", "requests": 3, "errors": 0, "in_flight": 0,
            "websockets": 0, "streams": 0, "warm_until": null,
        })
    };
    let config = if decision["config"].is_null() { json!(zero) } else { decision["config"].clone() };
    let (release, version) = (current["release"].clone(), current["version"].clone());
    let release = if release.is_null() { json!(zero) } else { release };
    let green = |healthy| side("green", "222222222222", &release, &config, &json!(version.as_str().unwrap_or("none")), healthy);
    let blue = side("blue", "111111111111", &json!(zero), &json!(zero), &json!("0.9"), 1);
    let view = |live: &Value, other: &Value, phase: &str, outcome: Value| {
        json!({
            "environment": "tiny/prod", "live": live, "other": other, "maintenance": null, "health": "healthy", "message": null,
            "rollback": {"warm": true, "seconds": null, "text": "0.9 is warm"},
            "rollout": {
                "generation": "222222222222", "version": version.as_str().unwrap_or("none"), "release": release, "config": config,
                "phase": phase, "since": decision["time"], "deadline": null, "paused": false, "outcome": outcome,
                "steps": [{"phase": "starting", "at": decision["time"], "seconds": 0.0, "text": "starting 1 instance of green"}],
            },
        })
    };
    let done = |result: &str, reason: &str, log: &[&str]| json!({"result": result, "reason": reason, "log": log});
    let starting = view(&blue, &green(0), "starting", Value::Null);
    let watching = view(&green(1), &blue, "watching", Value::Null);
    match plan {
        Plan::Hangs => vec![starting],
        Plan::Watches => vec![starting, watching],
        Plan::Fails => vec![starting, view(&blue, &Value::Null, "failed", done("failed", "it ended with status 3", &["boom"]))],
        _ => vec![starting, watching, view(&green(1), &blue, "done", done("succeeded", "", &[]))],
    }
}

#[test]
fn promote_waits_and_shows() {
    let shop = Shop::new();
    let promote = ["promote", "tiny", "--to", "prod"];
    {
        let daemon = shop.daemon(Plan::Succeeds);
        let answer = shop.verb(&promote).ok();
        answer.prints("tiny/prod: nothing → 1.0 (").prints("tiny/prod: 1.0 serves (green, healthy 1/1)");
        answer.says("  starting: starting 1 instance of green").says("  healthy 0/1");
        assert!(!answer.stdout.contains("nothing serves this environment"), "{}", answer.stdout);
        assert_eq!(daemon.asked(), ["POST /v1/poke"]);
    }
    {
        let _daemon = shop.daemon(Plan::IsReplaced);
        shop.release("1.1");
        let answer = shop.verb(&promote).arg("--json").ok().json();
        assert_eq!((&answer["outcome"]["unserved"], &answer["rollout"]["good"]), (&json!(false), &json!(true)));
        assert_eq!(answer["rollout"]["rollout"]["phase"], "done");
    }
    {
        let _daemon = shop.daemon(Plan::Fails);
        shop.release("1.2");
        let answer = shop.verb(&promote).run();
        answer.code(1).prints("tiny/prod: the rollout of 1.2 failed: it ended with status 3; 0.9 serves\n  | boom\n");
    }
    {
        let daemon = shop.daemon(Plan::Hangs);
        shop.release("1.3");
        // The release that enters is told, too.
        assert_eq!(daemon.asked(), ["POST /v1/poke"]);
        shop.verb(&promote).arg("--no-wait").ok();
        assert_eq!(daemon.asked(), ["POST /v1/poke"; 2]);
        shop.release("1.4");
        let mut waiting = shop.verb(&promote).start();
        waiting.wait_for("healthy 0/1");
        waiting.signal(libc::SIGINT);
        let answer = waiting.wait(Duration::from_secs(30));
        answer.code(130).says("the rollout goes on without this command: `pipeline status tiny/prod --watch` shows it");
        // A configuration is rolled out like a release.
        let mut waiting = shop.verb(&["config", "set", "prod", "LEVEL=info"]).start();
        waiting.wait_for("healthy 0/1");
    }
    {
        let _daemon = shop.daemon(Plan::Elsewhere);
        shop.release("1.5");
        shop.verb(&promote).run().code(75).prints("nothing serves this environment yet");
    }
    shop.verb(&["ledger", "verify"]).ok().prints("sound: ");
}

#[test]
fn rollback_says_beforehand_and_waits_for_the_switch() {
    let shop = Shop::new();
    let _daemon = shop.daemon(Plan::Watches);
    shop.verb(&["promote", "tiny", "--to", "prod", "--no-wait"]).ok();
    shop.release("1.1");
    shop.verb(&["promote", "tiny", "--to", "prod", "--no-wait"]).ok();
    let answer = shop.verb(&["rollback", "prod", "--to", "1.0"]).ok();
    answer.says("going back: nothing is warm for it").prints(") → 1.0 (").prints("tiny/prod: 1.0 serves (green, healthy 1/1)");
}

#[test]
fn orders_and_looks() {
    let shop = Shop::new();
    // Nobody there: the socket and the next step are named.
    let socket = shop.project.root.join("run/sock");
    for verb in [vec!["rollout", "pause", "prod"], vec!["maintenance", "on", "prod"], vec!["status", "tiny/prod", "--watch"]] {
        let answer = shop.verb(&verb).run();
        answer
            .code(75)
            .says(&format!("error: no daemon answers at {}", socket.display()))
            .says("hint: `pipeline serve` starts one");
    }
    shop.verb(&["promote", "tiny", "--to", "prod"]).run().code(75);
    let daemon = shop.daemon(Plan::Watches);
    let shown = shop.verb(&["status", "tiny/prod"]).ok();
    shown
        .prints("tiny/prod: healthy\n")
        .prints("  green  live    1.0  healthy 1/1")
        .prints("  blue   before  0.9")
        .prints("  rollback: 0.9 is warm");
    assert_eq!(shop.verb(&["--json", "status"]).ok().json()["served"][0]["environment"], "tiny/prod");
    for (verb, body) in [
        (vec!["rollout", "pause", "tiny/prod", "--reason", "lunch"], r#"rollout {"do":"pause","reason":"lunch","by":"alice"}"#),
        (vec!["rollout", "resume", "prod"], r#"rollout {"do":"resume","reason":"","by":"alice"}"#),
        (vec!["rollout", "abort", "prod", "--json"], r#"rollout {"do":"abort","reason":"","by":"alice"}"#),
        (vec!["maintenance", "on", "prod", "--message", "back at nine"], r#"maintenance {"on":true,"message":"back at nine"}"#),
        (vec!["maintenance", "off", "prod"], r#"maintenance {"on":false,"message":""}"#),
    ] {
        shop.verb(&verb).ok();
        assert_eq!(daemon.asked().last().unwrap(), &format!("POST /v1/environments/tiny/prod/{body}"));
    }
    let answer = shop.verb(&["rollout", "pause", "dev"]).run();
    answer.code(1).says("does not serve `tiny/dev`").says("hint: it serves environments that the ledger has with a `target`");
    shop.verb(&["maintenance", "perhaps", "prod"]).run().code(2);
    let mut watching = shop.verb(&["--json", "status", "tiny/prod", "--watch"]).start();
    watching.wait_for(r#""phase":"watching""#);
    watching.signal(libc::SIGINT);
    let watched = watching.wait(Duration::from_secs(30));
    let phases: Vec<Value> =
        watched.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["rollout"]["phase"].clone()).collect();
    assert_eq!(phases, ["starting", "watching"]);
    shop.verb(&["status", "tiny", "--watch"]).run().code(2).says("error: `--watch` shows one environment");
}

#[test]
fn routes_and_groups_of_other_pipelines() {
    let shop = Shop::new();
    let other = |name: &str, keys: &str| {
        let text = format!(
            "name: {name}\nbase: {{ scratch: true }}\nenvironments:\n  prod: {{ target: {{ local: {{}} }}, {keys} }}\nimage: {{ volumes: [/data] }}\n"
        );
        shop.project.write(&format!("{name}/pipeline.yaml"), text);
        shop.verb(&["environment", "apply", &format!("./{name}/pipeline.yaml")])
    };
    let first = other("one", "routes: [ { host: One.test } ], together: both, volumes: { data: exclusive }").ok();
    first.says("warning: `one/prod` is the only environment of the group `both`");
    let refused = other("two", "routes: [ { host: two.test }, { host: one.test } ]").run();
    refused.code(1).says("error: the route `one.test/` of `two/prod` is one of `one/prod` already").says("hint: another `host`");
    let second = other("two", "routes: [ { host: two.test } ], together: both").ok();
    second.says("warning: what the image writes to `/data` in `prod` is gone with each instance");
    assert!(!second.stderr.contains("only environment of the group"), "{}", second.stderr);
    shop.verb(&["ledger", "verify"]).ok().prints("sound: ");
}

// -- the API over HTTPS -------------------------------------------------------------------------------

/// Runs openssl in the project's folder; `line` without spaces in its words.
fn openssl(project: &Project, line: &str) {
    tool("openssl", "openssl");
    project.program("openssl").args(&line.split(' ').collect::<Vec<_>>()).ok();
}

/// A token of 64 characters.
fn token(letter: char) -> String {
    letter.to_string().repeat(64)
}

/// One with a certificate of its own, an authority, a client of that, and a token.
fn with_keys() -> Project {
    let project = Project::tiny(me());
    let text = project.read("pipeline.yaml");
    project.write("pipeline.yaml", text + ENVIRONMENTS);
    let new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -days 2";
    let server = "-subj /CN=daemon -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE";
    openssl(&project, &format!("{new} {server} -keyout server.key -out server.pem"));
    openssl(&project, &format!("{new} -subj /CN=authority -keyout authority.key -out authority.pem"));
    let client = "-subj /CN=ci -addext extendedKeyUsage=clientAuth -keyout ci.key -out ci.csr";
    openssl(&project, &format!("req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc {client}"));
    openssl(&project, "x509 -req -copy_extensions copy -in ci.csr -CA authority.pem -CAkey authority.key -days 2 -out ci.pem");
    project.write("token", token('a'));
    project.mode("token", 0o600);
    project
}

/// Asks the API with curl; the status, `000` when no answer came, and the body.
fn curl(project: &Project, address: &str, path: &str, more: &[&str]) -> (String, String) {
    tool("curl", "curl");
    let url = format!("https://{address}{path}");
    let always =
        ["--silent", "--noproxy", "*", "--cacert", "server.pem", "--max-time", "30", "--write-out", "\n%{http_code}", &url];
    let answer = project.program("curl").args(&always).args(more).run();
    let (body, status) = answer.stdout.rsplit_once('\n').unwrap();
    (status.to_owned(), body.to_owned())
}

#[test]
fn the_api_over_tcp_is_refused_without_keys() {
    let project = with_keys();
    let serve = ["serve", "--listen", "127.0.0.1:0", "--api-listen", "127.0.0.1:0"];
    let refused = |more: &[&str], code: i32, says: &str| {
        project.pipeline(&serve).args(more).run().code(code).says(says);
    };
    let pair = ["--certificate", "server.pem", "--key", "server.key"];
    refused(&pair, 2, "open to everybody");
    refused(&["--api-token", "token"], 2, "has no certificate");
    let with_token = [&pair[..], &["--api-token", "token"]].concat();
    project.mode("token", 0o644);
    refused(&with_token, 1, "chmod o= token");
    project.mode("token", 0o600);
    project.write("token", "short\n");
    refused(&with_token, 2, "token 1 in `token` is no token");
    project.write("token", "# nobody yet\n");
    refused(&with_token, 2, "`token` holds no token");
    refused(&[&pair[..], &["--api-token", "nowhere"]].concat(), 1, "nowhere");
    refused(&[&pair[..], &["--api-authority", "server.key"]].concat(), 2, "`server.key` holds no certificate");
    project.assert_clean();
}

#[test]
fn the_api_over_https_is_for_who_has_the_keys() {
    let project = with_keys();
    let address = format!("127.0.0.1:{}", common::free_port());
    let options = ["--api-listen", &address, "--api-token", "token", "--api-authority", "authority.pem"];
    let pair = ["--certificate", "server.pem", "--key", "server.key"];
    let options = [&options[..], &pair[..]].concat();
    let mut daemon = project.pipeline(&["serve", "--listen", "127.0.0.1:0"]).args(&options).start();
    daemon.wait_for("serving");
    let bearer = |letter: char| format!("authorization: Bearer {}", token(letter));
    let ask = |path: &str, letter: char| {
        curl(&project, &address, path, &["--cert", "ci.pem", "--key", "ci.key", "--header", &bearer(letter)])
    };
    let pid = |answer: (String, String)| {
        assert_eq!(answer.0, "200", "{}", answer.1);
        serde_json::from_str::<Value>(&answer.1).unwrap()["daemon"]["pid"].as_i64().unwrap()
    };
    assert_eq!(pid(ask("/v1/status", 'a')), i64::from(daemon.pid()));
    assert!(ask("/metrics", 'a').1.contains("pipeline_passes_total "));
    assert_eq!(ask("/healthz", 'a').0, "200");
    // Without either of them nobody comes in.
    assert_eq!(ask("/v1/status", 'b').0, "401");
    assert_eq!(curl(&project, &address, "/v1/status", &["--cert", "ci.pem", "--key", "ci.key"]).0, "401");
    assert_eq!(curl(&project, &address, "/v1/status", &["--header", &bearer('a')]).0, "000");
    assert_eq!(curl(&project, &address, "/v1/poke", &["--cert", "ci.pem", "--key", "ci.key", "--data", ""]).0, "401");
    // Another token, while it serves.
    project.write("token", format!("{}\n{}\n", token('a'), token('b')));
    assert_eq!((ask("/v1/status", 'a').0, ask("/v1/status", 'b').0), ("200".into(), "200".into()));
    project.write("token", token('b'));
    assert_eq!((ask("/v1/status", 'a').0, ask("/v1/status", 'b').0), ("401".into(), "200".into()));
    // One that takes over has to know them, too.
    project.pipeline(&["serve", "--replace"]).run().code(2).says("open to everybody");
    assert_eq!(pid(ask("/v1/status", 'b')), i64::from(daemon.pid()));
    project.pipeline(&["serve", "--replace", "--detach"]).args(&options).ok();
    let next = pid(ask("/v1/status", 'b'));
    assert_ne!(next, i64::from(daemon.pid()));
    daemon.wait(Duration::from_secs(60)).code(0);
    let next = rustix::process::Pid::from_raw(i32::try_from(next).unwrap()).unwrap();
    rustix::process::kill_process(next, rustix::process::Signal::TERM).unwrap();
    let patience = std::time::Instant::now() + Duration::from_secs(60);
    while rustix::process::test_kill_process(next).is_ok() {
        assert!(std::time::Instant::now() < patience, "{next:?} does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    project.assert_clean();
}
