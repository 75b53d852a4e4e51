//! The ledger on a server: a bare repository over `file://`, and over HTTP through Git's own `http-backend`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use pipeline::error::exit_code;
use pipeline::release::ledger::{Appended, Ledger, Oid, Remote, RemoteError, Synced};

use crate::support::*;

/// What the server does to a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Serve,
    /// Answers every request with this status.
    Status(u16),
    /// Does what is asked, and closes the connection without an answer.
    Mute,
}

/// An HTTP server for the repositories in a folder; it ends with the test.
struct Server {
    url: String,
    mode: Arc<Mutex<Mode>>,
}

impl Server {
    fn start(root: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mode = Arc::new(Mutex::new(Mode::Serve));
        let (root, shared) = (root.to_owned(), mode.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (root, mode) = (root.clone(), shared.clone());
                std::thread::spawn(move || serve(&stream.unwrap(), &root, &mode));
            }
        });
        Self { url, mode }
    }

    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
}

/// One request, given to `git http-backend` as a CGI program.
fn serve(stream: &TcpStream, root: &Path, mode: &Mutex<Mode>) {
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut text = String::new();
        reader.read_line(&mut text).unwrap();
        text.trim_end().to_owned()
    };
    let request = line();
    let headers: Vec<(String, String)> = std::iter::from_fn(|| Some(line()).filter(|text| !text.is_empty()))
        .map(|text| text.split_once(": ").map(|(key, value)| (key.to_lowercase(), value.to_owned())).unwrap())
        .collect();
    let header = |name: &str| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()).unwrap_or_default();
    if header("expect") == "100-continue" {
        (&*stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
    }
    let mut body = vec![0; header("content-length").parse().unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    while header("transfer-encoding") == "chunked" {
        let mut size = String::new();
        reader.read_line(&mut size).unwrap();
        let size = usize::from_str_radix(size.trim(), 16).unwrap();
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk).unwrap();
        body.extend_from_slice(&chunk[..size]);
        if size == 0 {
            break;
        }
    }
    let Some((method, target)) = request.split_once(' ') else { return };
    let target = target.split(' ').next().unwrap();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let is_push = method == "POST" && path.ends_with("git-receive-pack");
    let now = *mode.lock().unwrap();
    if let Mode::Status(code) = now {
        let more = if code == 401 { "WWW-Authenticate: Basic realm=\"x\"\r\n" } else { "" };
        let _ = write!(&*stream, "HTTP/1.1 {code} No\r\n{more}Content-Length: 0\r\nConnection: close\r\n\r\n");
        return;
    }
    let cmd =
        plain("git").arg("http-backend").env("GIT_PROJECT_ROOT", root).env("GIT_HTTP_EXPORT_ALL", "1").env("REMOTE_USER", "x");
    let cmd = cmd.env("PATH_INFO", path).env("QUERY_STRING", query).env("REQUEST_METHOD", method).env("REMOTE_ADDR", "127.0.0.1");
    let cmd = cmd.env("CONTENT_TYPE", header("content-type")).env("CONTENT_LENGTH", body.len().to_string());
    let output = run(cmd.env("HTTP_CONTENT_ENCODING", header("content-encoding")).input(body));
    if now == Mode::Mute && is_push {
        return;
    }
    let end = output.stdout.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let answered = String::from_utf8_lossy(&output.stdout[..end]).into_owned();
    let status = answered.lines().find_map(|line| line.strip_prefix("Status: ")).unwrap_or("200 OK");
    let payload = &output.stdout[end + 4..];
    let _ = write!(&*stream, "HTTP/1.1 {status}\r\n{answered}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", payload.len());
    let _ = (&*stream).write_all(payload);
}

/// A bare repository and the two ways to it.
struct Shared {
    place: Place,
    dir: PathBuf,
    server: Server,
}

impl Shared {
    fn new() -> Self {
        let place = Place::new();
        fs_err::create_dir(place.path("srv")).unwrap();
        git(&place.path("srv"), &["init", "-q", "--bare", "-b", "main", "ledger.git"]);
        let server = Server::start(&place.path("srv"));
        Self { dir: place.path("srv/ledger.git"), place, server }
    }

    fn remotes(&self) -> [Remote; 2] {
        [self.file(), self.http()]
    }

    fn file(&self) -> Remote {
        Remote::new(&format!("file://{}", self.dir.display()), &[])
    }

    fn http(&self) -> Remote {
        Remote::new(&format!("{}/ledger.git", self.server.url), &[])
    }

    fn tip(&self) -> Option<Oid> {
        let output = run(plain("git").arg("-C").arg(&self.dir).args(["rev-parse", "-q", "--verify", "refs/heads/main"]));
        Oid::from_str(String::from_utf8(output.stdout).unwrap().trim()).ok().filter(|id| !id.is_zero())
    }

    fn hook(&self, name: &str, script: Option<&str>) {
        let path = self.dir.join("hooks").join(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        match script {
            None => fs_err::remove_file(path).unwrap(),
            Some(script) => {
                fs_err::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
                fs_err::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
    }
}

/// Counts once more on the remote, whoever else does.
pub fn count_there(ledger: &Ledger, remote: &Remote, path: &str, who: &str) -> Oid {
    ledger.sync(remote).unwrap();
    loop {
        let tip = ledger.tip().unwrap();
        match ledger.append_to(remote, tip, &count(ledger, tip, path, who), &author(who, 0), None).unwrap() {
            Appended::Done(id) => return id,
            Appended::Lost(_) => {}
        }
    }
}

/// Tries once, from the tip here.
fn try_there(ledger: &Ledger, remote: &Remote, who: &str) -> Result<Appended, RemoteError> {
    let tip = ledger.tip().unwrap();
    ledger.append_to(remote, tip, &count(ledger, tip, "shop/prod.json", who), &author(who, 0), None)
}

#[test]
fn two_ledgers_share_one() {
    for number in 0..2 {
        let shared = Shared::new();
        let remote = &shared.remotes()[number];
        let (a, b) = (shared.place.ledger("a"), shared.place.ledger("b"));
        assert_eq!((a.sync(remote).unwrap(), remote.tip().unwrap()), (Synced::Same, None));
        let first = count_there(&a, remote, "shop/dev.json", "alice");
        assert_eq!((shared.tip(), remote.tip().unwrap(), a.tip().unwrap()), (Some(first), Some(first), Some(first)));
        assert_eq!(b.sync(remote).unwrap(), Synced::Forwarded { from: None, to: first });
        let second = count_there(&b, remote, "shop/dev.json", "bob");
        // Alice has not seen it: she loses, and is where Bob is then, with nothing of hers left.
        assert_eq!(try_there(&a, remote, "alice").unwrap(), Appended::Lost(second));
        assert_eq!((a.tip().unwrap(), shared.tip()), (Some(second), Some(second)));
        let third = count_there(&a, remote, "shop/dev.json", "alice");
        assert_eq!(b.sync(remote).unwrap(), Synced::Forwarded { from: Some(second), to: third });
        assert_eq!(b.sync(remote).unwrap(), Synced::Same);
        assert_eq!(counted(&b, "shop/dev.json"), 3);
        // Decided while the remote was away, and sent later.
        let offline = count_on(&b, "shop/prod.json", "bob");
        let more = count_on(&b, "shop/prod.json", "bob");
        let unpublished = Synced::Unpublished { theirs: Some(third), ours: more };
        assert_eq!((b.sync(remote).unwrap(), shared.tip()), (unpublished, Some(third)));
        let error = try_there(&b, remote, "bob").unwrap_err();
        assert!(matches!(error, RemoteError::Unpublished { theirs, ours, .. } if (theirs, ours) == (third, more)), "{error:?}");
        assert_eq!(b.between(Some(third), more, 9).unwrap().iter().map(|commit| commit.id).collect::<Vec<_>>(), [offline, more]);
        b.publish(remote, Some(third)).unwrap();
        assert_eq!((shared.tip(), a.sync(remote).unwrap()), (Some(more), Synced::Forwarded { from: Some(third), to: more }));
        // Who won is said when the remote is not where it was.
        count_on(&b, "shop/prod.json", "bob");
        let Err(RemoteError::Ahead { tip, won, .. }) = b.publish(remote, Some(first)) else { panic!() };
        assert_eq!(
            (tip, won.iter().map(|commit| commit.author.name.as_str()).collect::<Vec<_>>()),
            (more, vec!["bob", "alice", "bob", "bob"])
        );
        assert_sound(&a, true, "shared");
        assert_sound(&b, true, "shared");
        git(&shared.dir, &["fsck", "--strict", "--no-progress"]);
        assert_eq!(leftovers(&a), [""; 0]);
    }
}

#[test]
fn a_refusing_hook_is_heard() {
    for hook in ["pre-receive", "update"] {
        for number in 0..2 {
            let shared = Shared::new();
            let remote = &shared.remotes()[number];
            let ledger = shared.place.ledger("a");
            let tip = count_there(&ledger, remote, "shop/prod.json", "alice");
            shared.hook(hook, Some("echo 'not on a Friday'; exit 1"));
            let error = try_there(&ledger, remote, "alice").unwrap_err();
            let RemoteError::Refused { words, .. } = &error else { panic!("{error:?}") };
            assert!(words.contains("not on a Friday") && words.contains("hook declined"), "{words}");
            assert_eq!((shared.tip(), ledger.tip().unwrap(), exit_code(&error.into_error())), (Some(tip), Some(tip), 1));
            // The trap this is about: libgit2 itself returns success.
            if number == 1 {
                let repository = git2::Repository::open(ledger.dir()).unwrap();
                let id = count_on(&ledger, "shop/prod.json", "alice");
                let mut raw = repository.remote_anonymous(&format!("{}/ledger.git", shared.server.url)).unwrap();
                raw.push(&[format!("{id}:refs/heads/main")], None).unwrap();
                assert_eq!(shared.tip(), Some(tip));
            }
            shared.hook(hook, None);
            ledger.sync(remote).unwrap();
            ledger.publish(remote, Some(tip)).unwrap();
            let id = count_there(&ledger, remote, "shop/prod.json", "alice");
            assert_eq!(shared.tip(), Some(id), "{hook} {number}");
            assert_sound(&ledger, true, hook);
        }
    }
}

#[test]
fn a_server_that_says_ok_is_not_believed() {
    for number in 0..2 {
        let shared = Shared::new();
        let remote = &shared.remotes()[number];
        let ledger = shared.place.ledger("a");
        let tip = count_there(&ledger, remote, "shop/prod.json", "alice");
        // Reports ok, then takes it back.
        shared.hook("post-receive", Some(&format!("git update-ref refs/heads/main {tip}")));
        let error = try_there(&ledger, remote, "alice").unwrap_err();
        assert!(matches!(error, RemoteError::Unbelievable { tip: Some(there), .. } if there == tip), "{error:?}");
        assert_eq!((ledger.tip().unwrap(), shared.tip()), (Some(tip), Some(tip)));
        shared.hook("post-receive", None);
        count_there(&ledger, remote, "shop/prod.json", "alice");
        assert_eq!(counted(&ledger, "shop/prod.json"), 2);
    }
}

#[test]
fn somebody_goes_on_before_we_look_again() {
    for number in 0..2 {
        let shared = Shared::new();
        let remote = &shared.remotes()[number];
        let ledger = shared.place.ledger("a");
        count_there(&ledger, remote, "shop/prod.json", "alice");
        let hook =
            "read old new name; next=$(git commit-tree -p $new -m 'shop/prod: on top' $new^{tree}) && git update-ref $name $next";
        let hook = format!("export GIT_AUTHOR_NAME=x GIT_AUTHOR_EMAIL=x GIT_COMMITTER_NAME=x GIT_COMMITTER_EMAIL=x; {hook}");
        shared.hook("post-receive", Some(&hook));
        let Appended::Done(id) = try_there(&ledger, remote, "alice").unwrap() else { panic!() };
        assert_eq!(ledger.tip().unwrap(), Some(id));
        assert_eq!(ledger.sync(remote).unwrap(), Synced::Forwarded { from: Some(id), to: shared.tip().unwrap() });
    }
}

#[test]
fn a_rewritten_remote_is_refused() {
    for number in 0..2 {
        let shared = Shared::new();
        let remote = &shared.remotes()[number];
        let ledger = shared.place.ledger("a");
        let first = count_there(&ledger, remote, "shop/dev.json", "alice");
        let last = count_there(&ledger, remote, "shop/dev.json", "alice");
        let forged = git(&shared.dir, &["commit-tree", "-p", &first.to_string(), "-m", "forged", "main^{tree}"]);
        for now in [Some(first.to_string()), Some(forged.trim().to_owned()), None] {
            match &now {
                Some(now) => git(&shared.dir, &["update-ref", "refs/heads/main", now]),
                None => git(&shared.dir, &["update-ref", "-d", "refs/heads/main"]),
            };
            for error in [ledger.sync(remote).unwrap_err(), try_there(&ledger, remote, "alice").unwrap_err()] {
                let RemoteError::Rewritten { seen, tip, .. } = &error else { panic!("{now:?}: {error:?}") };
                assert_eq!((*seen, tip.map(|tip| tip.to_string())), (last, now.clone()));
                let text = error.to_string();
                assert!(text.contains(&last.to_string()) && now.as_ref().is_none_or(|now| text.contains(now)), "{text}");
                assert_eq!(exit_code(&error.into_error()), 1);
            }
            assert_eq!((ledger.tip().unwrap(), shared.tip().map(|tip| tip.to_string())), (Some(last), now));
        }
        git(&shared.dir, &["update-ref", "refs/heads/main", &last.to_string()]);
        count_there(&ledger, remote, "shop/dev.json", "alice");
        assert_sound(&ledger, true, "back again");
        // A machine that lost its ledger, but not what it saw, takes back the same history only.
        fs_err::remove_dir_all(ledger.dir()).unwrap();
        let ledger = shared.place.ledger("a");
        assert!(ledger.tip().is_err());
        let tip = shared.tip().unwrap();
        assert_eq!(ledger.sync(remote).unwrap(), Synced::Forwarded { from: None, to: tip });
        assert_sound(&ledger, true, "got back");
    }
}

#[test]
fn decided_apart_from_each_other() {
    for number in 0..2 {
        let shared = Shared::new();
        let remote = &shared.remotes()[number];
        let (a, b) = (shared.place.ledger("a"), shared.place.ledger("b"));
        let base = count_there(&a, remote, "shop/prod.json", "alice");
        b.sync(remote).unwrap();
        // Bob rolls back while the remote is away; Alice promotes.
        let ours = [count_on(&b, "shop/prod.json", "bob"), count_on(&b, "shop/prod.json", "bob")];
        let theirs = count_there(&a, remote, "shop/dev.json", "alice");
        let Err(RemoteError::Diverged { base: found, ours: our_tip, theirs: their_tip, .. }) = b.sync(remote) else { panic!() };
        assert_eq!((found, our_tip, their_tip), (Some(base), ours[1], theirs));
        assert!(matches!(b.publish(remote, Some(base)), Err(RemoteError::Ahead { .. })));
        assert!(matches!(try_there(&b, remote, "bob"), Err(RemoteError::Diverged { .. })));
        assert_eq!(b.tip().unwrap(), Some(ours[1]));
        let aside: Vec<Oid> = b.set_aside(remote).unwrap().iter().map(|commit| commit.id).collect();
        assert_eq!((aside.as_slice(), b.tip().unwrap()), (&ours[..], Some(theirs)));
        assert_eq!(git(b.dir(), &["rev-parse", &format!("refs/pipeline/aside/{}", ours[1])]).trim(), ours[1].to_string());
        count_there(&b, remote, "shop/prod.json", "bob");
        assert_eq!((a.sync(remote).is_ok(), counted(&a, "shop/prod.json"), b.set_aside(remote).unwrap().len()), (true, 2, 0));
        assert_sound(&b, true, "set aside");
    }
}

#[test]
fn remotes_that_do_not_answer() {
    let shared = Shared::new();
    let ledger = shared.place.ledger("a");
    let http = shared.http();
    let tip = count_there(&ledger, &http, "shop/prod.json", "alice");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gone = Remote::new(&format!("http://{closed}/ledger.git"), &[]);
    let nowhere = Remote::new("file:///nowhere/ledger.git", &[]);
    let missing = Remote::new(&format!("{}/other.git", shared.server.url), &[]);
    let check = |remote: &Remote, code: u8, words: &str| {
        for error in [ledger.sync(remote).unwrap_err(), try_there(&ledger, remote, "alice").unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains(words), "{text}");
            assert_eq!((exit_code(&error.into_error()), ledger.tip().unwrap()), (code, Some(tip)), "{text}");
        }
    };
    check(&gone, 75, "cannot reach the ledger at");
    check(&nowhere, 75, "cannot reach the ledger at");
    check(&missing, 1, "does not let this in");
    for (status, code) in [(500, 75), (503, 75), (429, 75), (403, 1), (404, 1), (401, 1)] {
        shared.server.set(Mode::Status(status));
        check(&http, code, &status.to_string().replace("401", "credentials"));
    }
    // The answer is lost, the decision is not: whoever looks again finds it.
    shared.server.set(Mode::Mute);
    let error = try_there(&ledger, &http, "alice").unwrap_err();
    assert!(matches!(error, RemoteError::Unreachable { .. }), "{error:?}");
    assert_eq!(ledger.tip().unwrap(), Some(tip));
    shared.server.set(Mode::Serve);
    let there = shared.tip().unwrap();
    assert_eq!(ledger.sync(&http).unwrap(), Synced::Forwarded { from: Some(tip), to: there });
    assert_eq!((counted(&ledger, "shop/prod.json"), ledger.commit(there).unwrap().parent), (2, Some(tip)));
    assert_sound(&ledger, true, "found again");
}

#[test]
fn four_machines_race_for_a_remote() {
    const EACH: i64 = 6;
    for number in 0..2 {
        let shared = Shared::new();
        std::thread::scope(|scope| {
            for who in ["a", "b", "c", "d"] {
                let (ledger, remote) = (shared.place.ledger(who), shared.remotes()[number].clone());
                scope.spawn(move || (0..EACH).for_each(|_| _ = count_there(&ledger, &remote, "shop/prod.json", who)));
            }
        });
        for who in ["a", "b", "c", "d"] {
            let ledger = shared.place.ledger(who);
            ledger.sync(&shared.remotes()[number]).unwrap();
            assert_eq!((counted(&ledger, "shop/prod.json"), ledger.log().unwrap().count()), (4 * EACH, 24));
            let own = ledger.log().unwrap().filter(|commit| commit.as_ref().unwrap().author.name == who).count();
            assert_eq!(i64::try_from(own), Ok(EACH));
            assert_sound(&ledger, true, who);
        }
    }
}

#[test]
fn kill_9_between_the_ledger_and_its_remote() {
    let shared = Shared::new();
    let url = format!("file://{}", shared.dir.display());
    let run = |name: &str, point: i64| {
        let paths = [shared.place.path(name), PathBuf::from(&url), PathBuf::from(point.to_string())];
        killed(child("publish", &[&paths[0], &paths[1], &paths[2]]))
    };
    drop(shared.place.ledger("all"));
    let (_, text) = run("all", 0);
    let points: i64 = points_in(&text);
    assert!(points > 15, "{points}");
    let (mut decided, mut met) = (1, 0);
    for point in 1.. {
        let name = format!("k{point}");
        drop(shared.place.ledger(&name));
        let (died, _) = run(&name, point);
        let ledger = shared.place.ledger(&name);
        ledger.sync(&shared.file()).unwrap();
        let now = counted(&ledger, "shop/prod.json");
        assert!(now == decided || now == decided + 1, "{point}: {decided} then {now}");
        assert_eq!((ledger.tip().unwrap(), leftovers(&ledger)), (shared.tip(), vec![]), "{point}");
        assert_sound(&ledger, true, &name);
        decided = now;
        if !died {
            break;
        }
        met = point;
    }
    assert!(met >= points, "{met} of {points}");
    git(&shared.dir, &["fsck", "--strict", "--no-progress"]);
    println!("killed at {met} points");
}
