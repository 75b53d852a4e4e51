//! Tests of [`super`], against repositories made with the `git` program, over `file://` and a `git daemon`.

use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::super::git::Commit;
use super::super::testing::{Repo, TIME, git};
use super::*;
use crate::cmd::Cmd;
use crate::error::{Kind, exit_code, hints};

struct Cache {
    dir: tempfile::TempDir,
}

impl Cache {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn request<'a>(&'a self, url: &'a str, reference: &'a str) -> Request<'a> {
        let reference = Some(reference).filter(|reference| !reference.is_empty());
        Request { url, reference, dir: None, submodules: true, ssh_keys: &[], cache: self.dir.path() }
    }

    fn fetch(&self, url: &str, reference: &str) -> Checkout {
        let taken = fetch(&self.request(url, reference)).unwrap();
        assert_eq!(
            fs::read_dir(self.dir.path().join("making")).map_or(0, Iterator::count),
            usize::from(self.dir.path().join("making").exists())
        );
        taken
    }
}

/// The files below a folder, with their text, sorted; links as `-> target`.
fn files(root: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            if path.is_symlink() {
                found.push((name, format!("-> {}", fs::read_link(&path).unwrap().display())));
            } else if path.is_dir() {
                folders.push(path);
            } else {
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn texts(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

fn commit(id: &str, message: &str) -> Option<Commit> {
    Some(Commit { id: id.into(), author: "Test Er <test@example.org>".into(), time: TIME, message: message.into() })
}

/// A `git daemon` for the repositories below a folder; it counts connections.
struct Daemon {
    port: u16,
    connections: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Daemon {
    fn start(base: &Path) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connections, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, end, base) = (connections.clone(), over.clone(), base.display().to_string());
        let thread = std::thread::spawn(move || {
            let mut children = Vec::new();
            for stream in listener.incoming() {
                if end.load(Ordering::SeqCst) {
                    break;
                }
                count.fetch_add(1, Ordering::SeqCst);
                let stream = std::os::fd::OwnedFd::from(stream.unwrap());
                let daemon = Cmd::new("git")
                    .args(["-c", "safe.directory=*", "daemon", "--inetd", "--export-all"])
                    .arg(format!("--base-path={base}"));
                let daemon =
                    daemon.stdin(Stdio::from(stream.try_clone().unwrap())).stdout(Stdio::from(stream)).stderr(Stdio::null());
                children.push(daemon.spawn().unwrap());
            }
            children.iter_mut().for_each(|child| drop(child.wait()));
        });
        Self { port, connections, over, thread: Some(thread) }
    }

    fn url(&self) -> String {
        format!("git://127.0.0.1:{}/.git", self.port)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
        self.thread.take().unwrap().join().unwrap();
    }
}

/// `main` with two commits and the tags `v1` and `v1-light`, `side` with a third.
fn history() -> (Repo, [String; 3]) {
    let repo = Repo::new();
    repo.write("app/a", "1");
    repo.write("run", "#!");
    symlink("run", repo.path().join("link")).unwrap();
    let first = repo.commit("one");
    repo.git(&["tag", "-a", "-m", "version 1", "v1"]);
    repo.git(&["tag", "v1-light"]);
    repo.write("run", "#!2");
    let second = repo.commit("two");
    repo.git(&["checkout", "-q", "-b", "side/branch"]);
    repo.write("app/a", "side");
    let third = repo.commit("three");
    repo.git(&["checkout", "-q", "main"]);
    (repo, [first, second, third])
}

#[test]
fn branches_tags_and_commits() {
    let (repo, [first, second, third]) = history();
    let daemon = Daemon::start(&repo.path());
    let cases = [
        ("", &second, Some("main")),
        ("main", &second, Some("main")),
        ("side/branch", &third, Some("side/branch")),
        ("refs/heads/side/branch", &third, Some("side/branch")),
        ("v1", &first, None),
        ("v1-light", &first, None),
        ("tags/v1", &first, None),
        (&first[..], &first, None),
        (&first[..7], &first, None),
        (&third[..4], &third, None),
    ];
    for url in [repo.url(), daemon.url(), repo.path().display().to_string()] {
        let shared = Cache::new();
        for (reference, expected, branch) in &cases {
            for cache in [&Cache::new(), &shared] {
                let taken = cache.fetch(&url, reference);
                assert_eq!((&taken.commit, taken.state.branch.as_deref()), (*expected, *branch), "{url} {reference}");
                let (text, run) =
                    if *expected == &third { ("side", "#!2") } else { ("1", if *expected == &first { "#!" } else { "#!2" }) };
                assert_eq!(files(&taken.path), texts(&[("app/a", text), ("link", "-> run"), ("run", run)]), "{url} {reference}");
                let wanted = resolve(&cache.request(&url, reference)).unwrap();
                let abbreviated = reference.len() < 40 && expected.starts_with(reference) && !reference.is_empty();
                assert_eq!(wanted, (!abbreviated).then(|| (*expected).clone()), "{url} {reference}");
            }
        }
    }
}

#[test]
fn the_state_is_that_of_the_folder() {
    let (repo, [first, second, _]) = history();
    let daemon = Daemon::start(&repo.path());
    for url in [repo.url(), daemon.url()] {
        for (dir, expected) in [("app", commit(&first, "one")), ("./app/", commit(&first, "one")), (".", commit(&second, "two"))]
        {
            let cache = Cache::new();
            let taken = fetch(&Request { dir: Some(Path::new(dir)), ..cache.request(&url, "main") }).unwrap();
            let state = GitState {
                head: second.clone(),
                branch: Some("main".into()),
                origin: Some(url.clone()),
                last_commit: expected,
                changed: 0,
                cut: false,
            };
            assert_eq!(taken.state, state, "{url} {dir}");
        }
        let cache = Cache::new();
        let error = fetch(&Request { dir: Some(Path::new("ap")), ..cache.request(&url, "main") }).unwrap_err();
        assert_eq!(error.root_cause().to_string(), format!("there is no folder `ap` in commit {}", &second[..12]));
    }
}

#[test]
fn history_is_fetched_as_far_as_it_is_needed() {
    let repo = Repo::new();
    repo.write("app/a", "1");
    let first = repo.commit("one");
    let mut last = String::new();
    for number in 0..100 {
        repo.write("b", &number.to_string());
        last = repo.commit("more");
    }
    let daemon = Daemon::start(&repo.path());
    let url = daemon.url();
    let cache = Cache::new();
    let commits = || {
        let mut mirrors = fs::read_dir(cache.dir.path().join("mirrors")).unwrap().map(|entry| entry.unwrap().path());
        let mirror = mirrors.find(|path| path.extension().is_some_and(|kind| kind == "git")).unwrap();
        git(&mirror, &["rev-list", "--all", "--count"])
    };
    let taken = cache.fetch(&url, "main");
    assert_eq!((taken.commit, taken.state.last_commit, commits().as_str()), (last.clone(), commit(&last, "more"), "2"));
    let taken = fetch(&Request { dir: Some(Path::new("app")), ..cache.request(&url, "main") }).unwrap();
    assert_eq!((taken.state.last_commit, taken.state.cut, commits().as_str()), (commit(&first, "one"), false, "101"));
    // More than the first attempts get; the branch moves on in a mirror that is complete.
    repo.write("app/a", "2");
    let moved = repo.commit("moved");
    let taken = cache.fetch(&url, "main");
    assert_eq!((taken.commit.as_str(), taken.state.last_commit), (moved.as_str(), commit(&moved, "moved")));
    assert_eq!(resolve(&cache.request(&url, "main")).unwrap(), Some(moved));
}

#[test]
fn a_full_commit_that_is_there_costs_no_network() {
    let (repo, [first, ..]) = history();
    let daemon = Daemon::start(&repo.path());
    let url = daemon.url();
    let cache = Cache::new();
    let taken = cache.fetch(&url, &first);
    let before = daemon.connections.load(Ordering::SeqCst);
    assert_eq!(cache.fetch(&url, &first), taken);
    assert_eq!(resolve(&cache.request(&url, &first)).unwrap(), Some(first));
    assert_eq!(daemon.connections.load(Ordering::SeqCst), before);
}

#[test]
fn submodules_come_with_their_own() {
    let inner = Repo::new();
    inner.write("deep", "inner 1");
    inner.commit("inner");
    let middle = Repo::new();
    middle.write("middle", "m");
    middle.git(&["submodule", "add", "-q", &inner.url(), "lib/inner"]);
    middle.commit("middle");
    // No reference names the commit that is used.
    inner.write("deep", "inner 2");
    inner.commit("inner 2");
    let outer = Repo::new();
    outer.write("outer", "o");
    let relative = format!("../{}", middle.path().file_name().unwrap().to_str().unwrap());
    outer.git(&["remote", "add", "origin", &outer.url()]);
    outer.git(&["submodule", "add", "-q", &relative, "sub module"]);
    outer.commit("outer");
    let cache = Cache::new();
    let all = cache.fetch(&outer.url(), "");
    let names: Vec<(String, String)> = files(&all.path).into_iter().filter(|(name, _)| !name.ends_with(".gitmodules")).collect();
    assert_eq!(names, texts(&[("outer", "o"), ("sub module/lib/inner/deep", "inner 1"), ("sub module/middle", "m")]));
    assert!(all.path.ends_with(format!("{}-sub", all.commit)));
    let url = outer.url();
    let bare = fetch(&Request { submodules: false, ..cache.request(&url, "") }).unwrap();
    assert_eq!(files(&bare.path).iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [".gitmodules", "outer"]);
    assert_eq!(bare.commit, all.commit);
}

#[test]
fn a_submodule_that_cannot_be_had_is_named() {
    let repo = Repo::new();
    let none = "file:///no/such/repository";
    repo.write(".gitmodules", &format!("[submodule \"x\"]\n\tpath = lib\n\turl = {none}\n"));
    let commit = repo.commit("modules");
    repo.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{commit},lib")]);
    repo.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{commit},other")]);
    repo.git(&["commit", "-q", "-m", "links"]);
    let url = repo.url();
    let cache = Cache::new();
    let error = fetch(&cache.request(&url, "")).unwrap_err();
    assert_eq!(error.root_cause().to_string(), "`.gitmodules` has no URL for the submodule `other`");
    repo.git(&["rm", "-q", "--cached", "other"]);
    repo.git(&["commit", "-q", "-m", "one link"]);
    let error = fetch(&cache.request(&url, "")).unwrap_err();
    assert!(
        format!("{error:#}").contains("cannot fetch the submodule `lib`: there is no repository `file:///no/such/repository`"),
        "{error:#}"
    );
    assert_eq!(fs::read_dir(cache.dir.path().join("making")).unwrap().count(), 1, "only the lock is left");
}

#[test]
fn what_cannot_be_fetched_is_explained() {
    let (repo, _) = history();
    let empty = Repo::new();
    let headless = Repo::new();
    headless.commit("one");
    headless.git(&["branch", "-m", "trunk"]);
    headless.git(&["symbolic-ref", "HEAD", "refs/heads/main"]);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let closed = format!("git://127.0.0.1:{port}/app.git");
    let daemon = Daemon::start(headless.path().join(".git").as_path());
    let (url, none) = (repo.url(), "0123456789012345678901234567890123456789");
    let cases: [(&str, &str, Kind, String, &str); 9] = [
        (&url, "v2", Kind::Failed, format!("`{url}` has no branch, tag or commit `v2`"), "did you mean `v1`?"),
        (
            &url,
            "side/brunch",
            Kind::Failed,
            format!("`{url}` has no branch, tag or commit `side/brunch`"),
            "did you mean `side/branch`?",
        ),
        (
            &url,
            "something-else",
            Kind::Failed,
            format!("`{url}` has no branch, tag or commit `something-else`"),
            "`git ls-remote` shows",
        ),
        (&url, "0123456", Kind::Failed, format!("`{url}` has no branch, tag or commit `0123456`"), "`git ls-remote` shows"),
        (&url, none, Kind::Failed, format!("`{url}` has no branch, tag or commit `{none}`"), "`git ls-remote` shows"),
        (&empty.url(), "", Kind::Failed, format!("the repository `{}` is empty", empty.url()), "push a commit"),
        (&headless.url(), "", Kind::Failed, format!("the HEAD of `{}` is a branch", headless.url()), "like `trunk`"),
        (&closed, "", Kind::Transient, format!("cannot reach `{closed}`"), "try again"),
        (&daemon.url(), "", Kind::Failed, format!("there is no repository `{}`", daemon.url()), "check `source.git`"),
    ];
    for (url, reference, kind, message, hint) in cases {
        let cache = Cache::new();
        let error = fetch(&cache.request(url, reference)).unwrap_err();
        assert!(error.root_cause().to_string().starts_with(&message), "{error:#}");
        assert_eq!(exit_code(&error), kind as u8, "{error:#}");
        assert!(hints(&error).join("\n").contains(hint), "{:?}", hints(&error));
        assert!(!cache.dir.path().join("checkouts").exists());
    }
}

#[test]
fn errors_of_libgit2_by_their_words() {
    let cases = [
        (
            ErrorCode::GenericError,
            ErrorClass::Net,
            "failed to resolve address for git.example.org: Name or service not known",
            Kind::Transient,
            "cannot reach",
        ),
        (ErrorCode::GenericError, ErrorClass::Http, "unexpected http status code: 503", Kind::Transient, "cannot reach"),
        (ErrorCode::GenericError, ErrorClass::Http, "unexpected http status code: 404", Kind::Failed, "there is no repository"),
        (ErrorCode::GenericError, ErrorClass::Http, "unexpected http status code: 403", Kind::Failed, "refuses access"),
        (ErrorCode::Auth, ErrorClass::Http, "remote authentication required but no callback set", Kind::Failed, "refuses access"),
        (
            ErrorCode::Auth,
            ErrorClass::Ssh,
            "failed to authenticate SSH session: connection closed",
            Kind::Failed,
            "refuses access",
        ),
        (ErrorCode::Certificate, ErrorClass::Ssl, "the SSL certificate is invalid", Kind::Failed, "cannot prove who it is"),
        (ErrorCode::GenericError, ErrorClass::Net, "ERROR: Repository not found.", Kind::Failed, "there is no repository"),
    ];
    for (code, class, message, kind, expected) in cases {
        let problem = explain("https://user:secret@git.example.org/a.git", &git2::Error::new(code, class, message));
        assert_eq!(problem.kind, kind, "{message}");
        assert!(
            problem.message.contains(expected) && problem.message.ends_with(message) && !problem.message.contains("secret"),
            "{problem}"
        );
        assert_eq!(problem.hints.len(), 1, "{message}");
    }
}

#[test]
fn a_broken_mirror_is_made_anew() {
    let (repo, [_, second, _]) = history();
    let url = repo.url();
    let breaks: [fn(&Path); 3] = [
        |mirror| fs::write(mirror.join("HEAD"), "nonsense").unwrap(),
        |mirror| fs::remove_dir_all(mirror.join("objects/pack")).unwrap(),
        |mirror| {
            for entry in fs::read_dir(mirror.join("objects")).unwrap() {
                let path = entry.unwrap().path();
                for file in fs::read_dir(&path).unwrap() {
                    let file = file.unwrap().path();
                    fs::remove_file(&file).unwrap();
                    fs::write(&file, "").unwrap();
                }
            }
        },
    ];
    for breaks in breaks {
        let cache = Cache::new();
        cache.fetch(&url, "main");
        for entry in fs::read_dir(cache.dir.path().join("mirrors")).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                breaks(&path);
            }
        }
        fs::remove_dir_all(cache.dir.path().join("checkouts")).unwrap();
        let taken = cache.fetch(&url, "main");
        assert_eq!((taken.commit.as_str(), files(&taken.path).len()), (second.as_str(), 3));
    }
}

#[test]
fn a_killed_checkout_is_removed_by_the_next() {
    let (repo, _) = history();
    let cache = Cache::new();
    let left = cache.dir.path().join("making/checkout-left");
    fs::create_dir_all(left.join("tree/half")).unwrap();
    let held = cache.dir.path().join("making/checkout-held");
    fs::create_dir_all(&held).unwrap();
    let _lock = lock(&held.join("lock"), FlockOperation::LockExclusive).unwrap();
    fetch(&cache.request(&repo.url(), "main")).unwrap();
    assert_eq!((left.exists(), held.exists()), (false, true));
}

#[test]
fn a_checkout_of_another_boot_is_written_again() {
    let (repo, [first, ..]) = history();
    let cache = Cache::new();
    let path = cache.fetch(&repo.url(), &first).path;
    for (name, breaks) in [
        ("another boot", (|path| fs::write(path.with_extension("boot"), "other").unwrap()) as fn(&Path)),
        ("killed before the mark", |path| fs::remove_file(path.with_extension("boot")).unwrap()),
        ("gone", |path| fs::remove_dir_all(path).unwrap()),
    ] {
        fs::write(path.join("run"), "").unwrap();
        breaks(&path);
        assert_eq!(cache.fetch(&repo.url(), &first).path, path);
        assert_eq!(files(&path), texts(&[("app/a", "1"), ("link", "-> run"), ("run", "#!")]), "{name}");
    }
}

#[test]
fn attributes_do_not_change_bytes() {
    let repo = Repo::new();
    repo.write(".gitattributes", "*.bat text eol=crlf\n*.id ident\nout export-ignore\n");
    for (path, text) in [("a.bat", "one\ntwo\n"), ("b.id", "$Id$\n"), ("out", "x")] {
        repo.write(path, text);
    }
    repo.commit("all");
    let found = files(&Cache::new().fetch(&repo.url(), "").path);
    assert_eq!(found[1..], texts(&[("a.bat", "one\ntwo\n"), ("b.id", "$Id$\n"), ("out", "x")]));
}

#[test]
fn urls_of_submodules() {
    for (parent, url, expected) in [
        ("https://h/a/b.git", "../c.git", Some("https://h/a/c.git")),
        ("https://h/a/b.git/", "../../c.git", Some("https://h/c.git")),
        ("https://h/a/b", "./c", Some("https://h/a/b/c")),
        ("git@h:a/b.git", "../c.git", Some("git@h:a/c.git")),
        ("git@h:b.git", "../c.git", Some("git@h:c.git")),
        ("https://h/b.git", "ssh://git@i/c.git", Some("ssh://git@i/c.git")),
        ("/srv/a", "../b", Some("/srv/b")),
        ("/srv/a", "/srv/c", Some("/srv/c")),
        ("https://h/b.git", "/etc", None),
        ("https://h/b.git", "file:///etc", None),
    ] {
        assert_eq!(join_url(parent, url).ok().as_deref(), expected, "{parent} {url}");
    }
}
