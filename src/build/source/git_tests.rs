//! Tests of [`super`], against repositories made with the `git` program.

use super::super::testing::{Repo, TIME};
use super::*;

fn ask(repo: &Repo, folder: &str) -> Option<GitState> {
    state(&repo.path().join(folder), &Digest::of("any"), None).unwrap()
}

fn commit(id: &str, message: &str) -> Option<Commit> {
    Some(Commit { id: id.into(), author: "Test Er <test@example.org>".into(), time: TIME, message: message.into() })
}

#[test]
fn a_folder_without_git_or_without_commits_has_no_state() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(state(dir.path(), &Digest::of("any"), None).unwrap(), None);
    let repo = Repo::new();
    repo.write("a", "");
    assert_eq!(ask(&repo, ""), None);
}

#[test]
fn the_whole_state() {
    let repo = Repo::new();
    repo.write("app/a", "1");
    let id = repo.commit("first line\n\nand more");
    repo.git(&["remote", "add", "origin", "https://user:secret@git.example.org/team/app.git"]);
    let expected = GitState {
        head: id.clone(),
        branch: Some("main".into()),
        origin: Some("https://git.example.org/team/app.git".into()),
        last_commit: commit(&id, "first line"),
        changed: 0,
        cut: false,
    };
    assert_eq!(ask(&repo, "app"), Some(expected.clone()));
    repo.git(&["checkout", "-q", "--detach"]);
    assert_eq!(ask(&repo, ""), Some(GitState { branch: None, ..expected.clone() }));
    // A second work tree has its `.git` file and its own HEAD.
    let other = tempfile::tempdir().unwrap();
    repo.git(&["worktree", "add", "-q", "-b", "side", other.path().join("tree").to_str().unwrap()]);
    let found = state(&other.path().join("tree/app"), &Digest::of("any"), None).unwrap();
    assert_eq!(found, Some(GitState { branch: Some("side".into()), ..expected }));
}

#[test]
fn what_is_used_is_committed_or_not() {
    let none = tempfile::tempdir().unwrap();
    fs::write(none.path().join("file"), "").unwrap();
    assert!(!is_committed(&none.path().join("file"), true).unwrap() && is_dirty(none.path()).unwrap());
    let repo = Repo::new();
    repo.write("pipeline.yaml", "1");
    let at = |path: &str| repo.path().join(path);
    assert!(!is_committed(&at("pipeline.yaml"), true).unwrap() && is_dirty(&repo.path()).unwrap(), "no commit yet");
    repo.write("builder/bin/assemble", "1");
    repo.write(".gitignore", "*.tmp\n/secret\n");
    repo.commit("all");
    // What is written, and whether file, folder with and without what Git ignores, and all that Git knows are as committed.
    let look = || {
        [
            is_committed(&at("pipeline.yaml"), true).unwrap(),
            is_committed(&at("builder"), true).unwrap(),
            is_committed(&at("builder"), false).unwrap(),
            !is_dirty(&repo.path()).unwrap(),
        ]
    };
    assert_eq!(look(), [true; 4]);
    for (path, text, expected) in [
        ("other", "new", [true, true, true, true]),
        ("builder/bin/x.tmp", "ignored", [true, false, true, true]),
        ("builder/bin/run", "new", [true, false, false, true]),
        ("builder/bin/assemble", "2", [true, false, false, false]),
        ("pipeline.yaml", "2", [false, false, false, false]),
    ] {
        repo.write(path, text);
        assert_eq!(look(), expected, "{path}");
    }
    repo.write("secret/script", "in a folder that is ignored");
    assert!(!is_committed(&at("secret/script"), true).unwrap());
    assert!(is_committed(&at("nothing"), true).is_err());
}

#[test]
fn the_last_commit_is_the_one_git_log_shows() {
    let repo = Repo::new();
    repo.write("app/a", "1");
    repo.write("other", "1");
    let first = repo.commit("both");
    repo.write("other", "2");
    repo.commit("elsewhere");
    repo.commit("empty");
    repo.git(&["checkout", "-q", "-b", "side"]);
    repo.write("app/b", "side");
    let side = repo.commit("on the side");
    repo.git(&["checkout", "-q", "main"]);
    repo.write("other", "3");
    repo.commit("elsewhere again");
    let check = |expected: &str, message: &str| {
        for folder in ["app", "app/../app"] {
            assert_eq!(ask(&repo, folder).unwrap().last_commit, commit(expected, message), "{folder}");
        }
        assert_eq!(repo.git(&["log", "-1", "--format=%H", "--", "app"]), expected);
    };
    check(&first, "both");
    repo.git(&["merge", "-q", "--no-ff", "-m", "merge", "side"]);
    check(&side, "on the side");
    repo.write("app/a", "main");
    repo.commit("main");
    repo.git(&["checkout", "-q", "side"]);
    repo.write("app/b", "side 2");
    repo.commit("side 2");
    repo.git(&["checkout", "-q", "main"]);
    repo.git(&["merge", "-q", "--no-ff", "-m", "both sides", "side"]);
    check(&repo.git(&["rev-parse", "HEAD"]), "both sides");
    fs::create_dir(repo.path().join("never")).unwrap();
    assert_eq!(ask(&repo, "never").unwrap().last_commit, None);
}

#[test]
fn a_folder_that_came_back_is_of_the_commit_that_brought_it() {
    let repo = Repo::new();
    repo.write("app/a", "1");
    repo.write("b", "1");
    repo.commit("one");
    repo.git(&["rm", "-q", "-r", "app"]);
    repo.commit("gone");
    repo.write("app/a", "1");
    let back = repo.commit("back");
    assert_eq!(ask(&repo, "app").unwrap().last_commit, commit(&back, "back"));
}

#[test]
fn a_shallow_clone_says_that_its_history_is_cut() {
    let repo = Repo::new();
    repo.write("app/a", "1");
    let first = repo.commit("one");
    repo.write("b", "1");
    let second = repo.commit("two");
    let dir = tempfile::tempdir().unwrap();
    let clone = dir.path().join("clone");
    let cache = dir.path().join("cache");
    super::super::testing::git(dir.path(), &["clone", "-q", "--depth=1", &repo.url(), "clone"]);
    let ask = || state(&clone.join("app"), &Digest::of("any"), Some(&cache)).unwrap().unwrap();
    let found = ask();
    assert_eq!((found.last_commit, found.cut), (commit(&second, "two"), true));
    super::super::testing::git(&clone, &["fetch", "-q", "--unshallow"]);
    let found = ask();
    assert_eq!((found.last_commit, found.cut), (commit(&first, "one"), false));
}

#[test]
fn files_that_differ_are_counted_in_the_folder_only() {
    let repo = Repo::new();
    repo.write(".gitignore", "*.log\n");
    for path in ["app/modified", "app/deleted", "app/staged", "app/same", "other", "app [x]/y", "app/doc/listed"] {
        repo.write(path, "1");
    }
    repo.commit("all");
    let cases: [(&str, &dyn Fn(), usize); 9] = [
        ("clean", &|| {}, 0),
        ("elsewhere", &|| repo.write("other", "2"), 0),
        ("in a folder with a glob for a name", &|| repo.write("app [x]/y", "2"), 0),
        ("modified", &|| repo.write("app/modified", "2"), 1),
        ("deleted", &|| fs::remove_file(repo.path().join("app/deleted")).unwrap(), 2),
        (
            "new ones, in a new folder",
            &|| {
                repo.write("app/new/a", "");
                repo.write("app/new/b", "");
            },
            4,
        ),
        ("ignored", &|| repo.write("app/x.log", ""), 4),
        (
            "staged",
            &|| {
                repo.write("app/staged", "2");
                repo.git(&["add", "app/staged"]);
            },
            5,
        ),
        (
            "listed in .s2iignore, itself new",
            &|| {
                repo.write("app/.s2iignore", "doc\n");
                repo.write("app/doc/listed", "2");
                repo.write("app/doc/new", "2");
            },
            6,
        ),
    ];
    for (name, edit, expected) in cases {
        edit();
        assert_eq!(ask(&repo, "app").unwrap().changed, expected, "{name}");
    }
    assert_eq!(ask(&repo, "app [x]").unwrap().changed, 1);
    assert_eq!(ask(&repo, "").unwrap().changed, 10);
}

#[test]
fn the_cache_answers_for_the_same_commit_folder_and_listing() {
    let repo = Repo::new();
    repo.write("app/a", "1");
    let first = repo.commit("one");
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache/git");
    let ask = |listing: &str| state(&repo.path().join("app"), &Digest::of(listing), Some(&cache)).unwrap().unwrap();
    assert_eq!(ask("one").changed, 0);
    repo.write("app/a", "2");
    // The listing's digest is all that tells; a scan would have given another.
    assert_eq!(ask("one").changed, 0);
    assert_eq!(ask("two").changed, 1);
    repo.write("elsewhere", "1");
    repo.git(&["add", "elsewhere"]);
    repo.git(&["commit", "-q", "-m", "elsewhere"]);
    assert_eq!(ask("two").last_commit, commit(&first, "one"));
    let second = repo.commit("all");
    repo.git(&["checkout", "-q", "-b", "branch"]);
    let found = ask("two");
    assert_eq!((found.head, found.changed, found.branch.as_deref()), (second.clone(), 0, Some("branch")));
    for broken in ["", "{}", "{\"version\":99}"] {
        fs::write(&cache, broken).unwrap();
        assert_eq!(ask("two").last_commit, commit(&second, "all"));
    }
    assert_eq!(fs::read_dir(dir.path().join("cache")).unwrap().count(), 1);
}

#[test]
fn another_users_repository_can_be_read() {
    let repo = Repo::new();
    repo.write(".gitignore", "*.log\n");
    repo.write("app/a", "1");
    repo.commit("one");
    repo.git(&["remote", "add", "origin", "git@example.org:app.git"]);
    repo.write("app/a", "2");
    repo.write("app/new", "");
    repo.write("app/x.log", "");
    let expected = ask(&repo, "app").unwrap();
    assert_eq!((expected.changed, expected.origin.as_deref()), (2, Some("git@example.org:app.git")));
    let check = |name: &str| {
        let root = repo.path().join("app");
        let dir = tempfile::tempdir().unwrap();
        let opened = foreign(&root, Some(dir.path())).unwrap().unwrap();
        assert_eq!(read(&opened, &root, &Digest::of("any"), None).unwrap(), Some(expected.clone()), "{name}");
        drop(opened);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{name}: nothing is left");
    };
    check("loose references");
    repo.git(&["pack-refs", "--all"]);
    repo.git(&["gc", "-q"]);
    check("packed references and objects");
    if rustix::process::geteuid().is_root() {
        crate::cmd::Cmd::new("chown").args(["-R", "4711:4711"]).arg(repo.path()).run().unwrap();
    }
    assert_eq!(ask(&repo, "app"), Some(expected));
}

#[test]
fn urls_without_credentials() {
    for (url, expected) in [
        ("https://git.example.org/a.git", "https://git.example.org/a.git"),
        ("https://user:pass@git.example.org:8443/a@b.git", "https://git.example.org:8443/a@b.git"),
        ("https://token@git.example.org/a.git", "https://git.example.org/a.git"),
        ("https://us@er:p@ss@git.example.org", "https://git.example.org"),
        ("ssh://git:secret@git.example.org/a.git", "ssh://git@git.example.org/a.git"),
        ("git+ssh://git@git.example.org/a.git", "git+ssh://git@git.example.org/a.git"),
        ("git@git.example.org:team/a.git", "git@git.example.org:team/a.git"),
        ("/srv/git/a.git", "/srv/git/a.git"),
    ] {
        assert_eq!(without_credentials(url), expected);
    }
}
