//! The ledger as others see it: Git, other processes, a full disk, SIGKILL, rewriters, and 10,000 decisions.
#![allow(clippy::print_stdout, reason = "what was measured and met is worth reading")]

#[path = "ledger/remote.rs"]
mod remote;
#[path = "ledger/signed.rs"]
mod signed;
#[path = "ledger/support.rs"]
mod support;

use std::fmt::Write as _;
use std::path::Path;
use std::time::Instant;

use pipeline::error::{exit_code, hints, is_disk_full};
use pipeline::fault;
use pipeline::release::ledger::{Appended, Change, Ledger, Oid, Remote};
use support::*;

/// The jobs of other processes; without one this is no test.
#[test]
fn the_other_process() {
    let Some(job) = job() else { return };
    let words: Vec<&str> = job.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["count", folder, who, times] => {
            let ledger = open(Path::new(folder));
            for _ in 0..times.parse().unwrap() {
                count_on(&ledger, "shop/prod.json", who);
            }
        }
        ["write and pack", folder, point] => {
            fault::arm(point.parse().unwrap());
            let ledger = open(Path::new(folder));
            let goal = ["shop/dev.json", "shop/prod.json", "shop/dev.json"];
            for path in &goal[ledger.log().unwrap().count().min(3)..] {
                count_on(&ledger, path, "killed");
            }
            ledger.pack().unwrap();
            println!("points: {}", fault::passed());
        }
        ["publish", folder, url, point] => {
            let ledger = open(Path::new(folder));
            fault::arm(point.parse().unwrap());
            remote::count_there(&ledger, &Remote::new(url, &[]), "shop/prod.json", "killed");
            println!("points: {}", fault::passed());
        }
        ["fill", folder] => fill(Path::new(folder)),
        ["go on", folder] => {
            let ledger = open(Path::new(folder));
            let before = ledger.log().unwrap().count();
            count_on(&ledger, "shop/prod.json", "later");
            ledger.pack().unwrap();
            assert_eq!(ledger.log().unwrap().count(), before + 1);
            assert_sound(&ledger, true, "the disk is larger");
            assert_eq!(leftovers(&ledger), [""; 0]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_decision_is_a_commit() {
    let place = Place::new();
    let ledger = place.ledger("a");
    assert_eq!((ledger.tip().unwrap(), ledger.snapshot().unwrap().paths().unwrap()), (None, vec![]));
    let first = count_on(&ledger, "shop/dev.json", "alice");
    let second = count_on(&ledger, "shop/prod.json", "bob");
    let third = count_on(&ledger, "shop/dev.json", "alice");
    // As plain Git shows it.
    let dir = ledger.dir();
    assert_eq!(git(dir, &["log", "--format=%H"]), format!("{third}\n{second}\n{first}\n"));
    assert_eq!(
        git(dir, &["log", "-1", "--format=%(trailers:key=Actor,valueonly)%b", "main"]),
        "alice\nA reason.\n\nDecision: promote\nActor: alice\nNumber: 2\n\n"
    );
    assert_eq!(git(dir, &["ls-tree", "-r", "--name-only", "main"]), "ledger.json\nshop/dev.json\nshop/prod.json\n");
    assert_eq!(git(dir, &["show", "main:ledger.json"]), "{\n  \"format\": 1\n}\n");
    assert_sound(&ledger, false, "three decisions");
    // As we read it.
    let snapshot = ledger.snapshot().unwrap();
    assert_eq!(
        (snapshot.id(), snapshot.pipelines().unwrap(), snapshot.environments("shop").unwrap()),
        (Some(third), vec![], vec!["dev".into(), "prod".into()])
    );
    assert_eq!(snapshot.read("shop/none.json").unwrap(), None);
    let history: Vec<(Oid, Vec<u8>)> =
        ledger.history_of("shop/dev.json").unwrap().map(|version| version.map(|v| (v.commit.id, v.bytes)).unwrap()).collect();
    let read = |id: Oid| ledger.at(id).unwrap().read("shop/dev.json").unwrap().unwrap();
    assert_eq!(history, [(third, read(third)), (first, read(first))]);
    // One that was thought of before the others is lost, and leaves nothing.
    let stale = count(&ledger, Some(first), "shop/prod.json", "carol");
    assert_eq!(ledger.append(Some(first), &stale, &author("carol", 1), None).unwrap(), Appended::Lost(third));
    assert_eq!(ledger.append(None, &stale, &author("carol", 1), None).unwrap(), Appended::Lost(third));
    assert_sound(&ledger, false, "a lost one");
    // A policy goes with its environments; an environment may go, and its folder with the last.
    let policy = pretty(&serde_json::json!({ "format": 1 }));
    let apply = |writes: Vec<(&str, Option<Vec<u8>>)>| {
        let change =
            Change { writes: writes.into_iter().map(|(path, bytes)| (path.into(), bytes)).collect(), message: "apply".into() };
        ledger.append(ledger.tip().unwrap(), &change, &author("root", 0), None)
    };
    apply(vec![("shop.json", Some(policy.clone())), ("shop/prod.json", None), ("shop/dev.json", None)]).unwrap();
    apply(vec![("frozen.json", Some(policy.clone()))]).unwrap();
    let snapshot = ledger.snapshot().unwrap();
    assert_eq!(
        (snapshot.paths().unwrap(), snapshot.pipelines().unwrap()),
        (vec!["frozen.json".into(), "ledger.json".into(), "shop.json".into()], vec!["shop".to_string()])
    );
    assert_eq!(ledger.made("shop/prod.json").unwrap(), None);
    assert_sound(&ledger, false, "policies");
    for wrong in [
        vec![("shop/a.json", Some(policy.clone())), ("shop/b.json", Some(policy.clone()))],
        vec![("ledger.json", Some(policy.clone()))],
        vec![("../x.json", Some(policy.clone()))],
        vec![("frozen.json", Some(policy.clone()))],
        vec![],
    ] {
        assert!(apply(wrong.clone()).is_err(), "{wrong:?}");
    }
    assert_sound(&ledger, true, "wrong ones");
    // The cache of who made what is only a cache.
    for text in [None, Some("{}"), Some("{\"format\":1,\"tip\":\"x\",\"made\":{}}")] {
        let cache = ledger.dir().join("pipeline/made.json");
        text.map_or_else(|| fs_err::remove_file(&cache), |text| fs_err::write(&cache, text)).unwrap();
        assert_eq!(ledger.made_all().unwrap().into_keys().collect::<Vec<_>>(), ["frozen.json", "ledger.json", "shop.json"]);
    }
}

#[test]
fn what_is_no_ledger_is_refused() {
    let place = Place::new();
    let refused = |path: &Path, words: &str| {
        let error = Ledger::open(path, &place.path("seen.json")).unwrap_err();
        assert!(format!("{error:#}").contains(words), "{error:#}");
        assert_eq!((exit_code(&error), hints(&error).is_empty()), (2, words.contains("a file")), "{error:#}");
    };
    let file = place.path("file");
    fs_err::write(&file, "x").unwrap();
    refused(&file, "but a file");
    let folder = place.path("folder");
    fs_err::create_dir(&folder).unwrap();
    fs_err::write(folder.join("x"), "").unwrap();
    refused(&folder, "is no ledger");
    let work = place.path("work");
    git(place.0.path(), &["init", "-q", "work"]);
    refused(&work, "is no ledger");
    git(place.0.path(), &["init", "-q", "--bare", "-b", "main", "bare"]);
    let bare = place.path("bare");
    for (name, text, words) in [
        ("readme", "x", "has no `ledger.json`"),
        ("ledger.json", "x", "says no format"),
        ("ledger.json", "{\"format\":2}", "newer pipeline"),
    ] {
        let blob = git_with(&bare, &["hash-object", "-w", "--stdin"], text);
        let tree = git_with(&bare, &["mktree"], &format!("100644 blob {}\t{name}\n", blob.trim()));
        let commit = git_with(&bare, &["commit-tree", tree.trim(), "-m", "x"], "");
        git(&bare, &["update-ref", "refs/heads/main", commit.trim()]);
        refused(&bare, words);
    }
    git(&bare, &["branch", "-m", "main", "other"]);
    refused(&bare, "has no `refs/heads/main`");
    // An empty folder and an empty bare repository are as good as none.
    fs_err::create_dir(place.path("empty")).unwrap();
    git(place.0.path(), &["init", "-q", "--bare", "empty-bare"]);
    for name in ["empty", "empty-bare"] {
        let ledger = Ledger::open(&place.path(name), &place.path(&format!("{name}.json"))).unwrap();
        count_on(&ledger, "shop/dev.json", "alice");
        assert_sound(&ledger, false, name);
    }
}

#[test]
fn eight_processes_append_to_one_ledger() {
    const EACH: i64 = 12;
    let place = Place::new();
    let folder = place.path("a");
    let people: Vec<String> = (0..8).map(|number| format!("p{number}")).collect();
    let racing: Vec<_> = people
        .iter()
        .map(|who| {
            let cmd = child("count", &[&folder, Path::new(who), Path::new(&EACH.to_string())]);
            std::thread::spawn(move || killed(cmd))
        })
        .collect();
    // Readers meet whole ledgers only.
    let ledger = place.ledger("a");
    let mut last = 0;
    while last < 8 * EACH {
        let now = counted(&ledger, "shop/prod.json");
        assert!(now >= last);
        last = now;
        assert!(last == 8 * EACH || racing.iter().any(|thread| !thread.is_finished()), "they stopped at {last}");
    }
    for thread in racing {
        assert!(!thread.join().unwrap().0);
    }
    let actors: Vec<String> = ledger.log().unwrap().map(|commit| commit.unwrap().trailer("Actor").unwrap().to_owned()).collect();
    for who in people {
        assert_eq!(i64::try_from(actors.iter().filter(|actor| **actor == who).count()), Ok(EACH), "{who}");
    }
    let history = ledger.history_of("shop/prod.json").unwrap().count();
    assert_eq!((actors.len(), history, counted(&ledger, "shop/prod.json")), (96, 96, 96));
    assert_sound(&ledger, false, "the race");
    assert_eq!(leftovers(&ledger), [""; 0]);
}

#[test]
fn kill_9_at_each_write() {
    let run = |folder: &Path, point: i64| killed(child("write and pack", &[folder, Path::new(&point.to_string())]));
    let place = Place::new();
    let (_, text) = run(&place.path("all"), 0);
    let points: i64 = points_in(&text);
    assert!(points > 40, "{points}");
    for point in 1..=points {
        let folder = place.path(&format!("k{point}"));
        assert!(run(&folder, point).0, "point {point} of {points} was not met");
        let after = format!("killed at {point} of {points}");
        // What is there is whole before anybody cleans up, and the next ones go on from there.
        let ledger = open(&folder);
        let reached = ledger.log().unwrap().count();
        assert!(reached <= 3, "{after}");
        assert_sound(&ledger, true, &after);
        assert!(!run(&folder, 0).0);
        assert_eq!(ledger.log().unwrap().count(), 3, "{after}");
        assert_eq!((counted(&ledger, "shop/dev.json"), counted(&ledger, "shop/prod.json")), (2, 1), "{after}");
        assert_sound(&ledger, true, &after);
        assert_eq!(leftovers(&ledger), [""; 0], "{after}");
    }
    println!("killed at {points} points");
}

/// Decides with what does not compress until the disk is full.
fn fill(folder: &Path) {
    let mut seed = 1_u64;
    let mut noise = move |length: usize| -> String {
        let mut text = String::new();
        while text.len() < length {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            write!(text, "{seed:x}").unwrap();
        }
        text
    };
    let attempt = |ledger: &Ledger, text: String| {
        let tip = ledger.tip()?;
        let mut change = count(ledger, tip, "shop/prod.json", "filler");
        let mut state: serde_json::Value = serde_json::from_slice(change.writes[0].1.as_ref().unwrap()).unwrap();
        state["noise"] = text.into();
        change.writes[0].1 = Some(pretty(&state));
        ledger.append(tip, &change, &author("filler", 0), None)
    };
    let ledger = open(folder);
    let error = loop {
        let tip = ledger.tip().unwrap();
        match attempt(&ledger, noise(6000)) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(ledger.tip().unwrap(), tip, "{error:#}");
                break error;
            }
        }
    };
    assert!(is_disk_full(&error), "{error:?}");
    assert_eq!(exit_code(&error), 75);
    println!("full after {}: {error:#}", ledger.log().unwrap().count());
    assert_sound(&ledger, true, "the disk is full");
    if let Err(error) = ledger.pack() {
        println!("not packed: {error:#}");
        assert!(format!("{error:#}").contains("No space left"), "{error:#}");
    }
    assert_sound(&ledger, true, "not packed");
}

/// A tmpfs nobody else sees, first of the size `$2`, then large.
const FULL: &str = r#"
mount -t tmpfs -o "size=$2" tmpfs "$1" || exit 99
"$3" --exact the_other_process --nocapture || exit 98
mount -o remount,size=50m "$1" || exit 97
PIPELINE_LEDGER_CHILD="$4" exec "$3" --exact the_other_process --nocapture
"#;

#[test]
fn full_disks() {
    let place = Place::new();
    let root = rustix::process::geteuid().is_root();
    let namespace: &[&str] = if root { &["--mount"] } else { &["--user", "--map-root-user", "--mount"] };
    let mut said = String::new();
    for size in (0..12).map(|step| 300 + 4 * step) {
        let disk = place.path(&format!("disk{size}"));
        fs_err::create_dir(&disk).unwrap();
        let job = |name: &str| serde_json::to_string(&[name, disk.join("a").to_str().unwrap()]).unwrap();
        let cmd = plain("unshare").args(namespace).args(["sh", "-c", FULL, "sh"]).arg(&disk).arg(format!("{size}k"));
        let cmd = cmd.arg(std::env::current_exe().unwrap()).arg(job("go on")).env(CHILD, job("fill"));
        let (died, text) = killed(cmd);
        assert!(!died && text.matches("test result: ok. 1 passed").count() == 2, "{text}");
        said += &text;
    }
    for line in said.lines().filter(|line| line.starts_with("full after") || line.starts_with("not packed")) {
        println!("{line}");
    }
}

#[test]
fn packing() {
    let place = Place::new();
    let ledger = place.ledger("a");
    let files = |folder: &str, ending: &str| {
        let entries = fs_err::read_dir(ledger.dir().join(folder)).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(ending)).count()
    };
    let loose = || git(ledger.dir(), &["count-objects"]).split(' ').next().unwrap().parse::<usize>().unwrap();
    let mut most = 0;
    // Opened before; goes on reading what is packed under it.
    let reader = place.ledger("a");
    for number in 0..12 {
        for _ in 0..if number == 6 { 60 } else { 8 } {
            count_on(&ledger, "shop/dev.json", "alice");
            assert_eq!(counted(&reader, "shop/dev.json"), counted(&ledger, "shop/dev.json"));
        }
        ledger.pack().unwrap();
        assert_eq!(loose(), 0);
        most = most.max(files("objects/pack", ".pack"));
        assert_eq!(reader.log().unwrap().map(Result::unwrap).count(), ledger.log().unwrap().count());
        assert_sound(&ledger, false, "packed");
    }
    assert!((2..=4).contains(&most), "{most} packs");
    // Nothing to do, and nothing done.
    ledger.pack().unwrap();
    ledger.pack_if_needed().unwrap();
    count_on(&ledger, "shop/dev.json", "alice");
    ledger.pack_if_needed().unwrap();
    assert_eq!(loose(), 4);
    // Git's own housekeeping does no harm.
    git(ledger.dir(), &["gc", "-q", "--prune=now"]);
    git(ledger.dir(), &["pack-refs", "--all"]);
    count_on(&ledger, "shop/dev.json", "alice");
    count_on(&reader, "shop/dev.json", "alice");
    assert_sound(&ledger, false, "after git gc");
    assert_eq!(leftovers(&ledger), [""; 0]);
}

#[test]
fn a_lock_of_another_git_is_respected() {
    let place = Place::new();
    let ledger = place.ledger("a");
    let tip = count_on(&ledger, "shop/dev.json", "alice");
    let lock = ledger.dir().join("refs/heads/main.lock");
    fs_err::write(&lock, "").unwrap();
    let error =
        ledger.append(Some(tip), &count(&ledger, Some(tip), "shop/dev.json", "alice"), &author("alice", 0), None).unwrap_err();
    assert_eq!((exit_code(&error), error.to_string().contains("another program holds"), lock.exists()), (75, true, true));
    let remover = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        fs_err::remove_file(lock).unwrap();
    });
    count_on(&ledger, "shop/dev.json", "alice");
    remover.join().unwrap();
    assert_sound(&ledger, true, "a lock");
}

/// A commit by Git's plumbing: files over those of `parent`, further parents, options of `commit-tree`.
fn forge(dir: &Path, parents: &[Oid], files: &[(&str, &str)], options: &[&str]) -> Oid {
    let index = dir.join("forged-index");
    let at = |arguments: &[&str]| {
        let output = run(plain("git").arg("-C").arg(dir).args(arguments).env("GIT_INDEX_FILE", &index));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    at(&["read-tree", &parents[0].to_string()]);
    for (path, text) in files {
        let blob = git_with(dir, &["hash-object", "-w", "--stdin"], text);
        at(&["update-index", "--add", "--cacheinfo", &format!("100644,{},{path}", blob.trim())]);
    }
    let tree = at(&["write-tree"]);
    let mut arguments = vec!["commit-tree", &tree];
    let parents: Vec<String> = parents.iter().map(Oid::to_string).collect();
    arguments.extend(parents.iter().flat_map(|parent| ["-p", parent]));
    arguments.extend(options);
    let id = git_with(dir, &arguments, "forged\n");
    fs_err::remove_file(&index).unwrap();
    let id = Oid::from_str(id.trim()).unwrap();
    git(dir, &["update-ref", "refs/heads/main", &id.to_string()]);
    id
}

#[test]
fn what_verify_finds() {
    let place = Place::new();
    let ledger = place.ledger("a");
    let first = count_on(&ledger, "shop/dev.json", "alice");
    let tip = count_on(&ledger, "shop/prod.json", "alice");
    let state = |previous: Option<Oid>| {
        format!("{{\"format\":1,\"number\":2,\"previous\":{}}}", previous.map_or("null".into(), |id| format!("\"{id}\"")))
    };
    let good = [("shop/prod.json", state(Some(tip)))];
    let table: Vec<(&str, Vec<(&str, String)>, Vec<Oid>, &[&str], &[&str])> = vec![
        ("a sound one", good.to_vec(), vec![tip], &[], &[]),
        (
            "two states",
            [good.to_vec(), vec![("shop/dev.json", state(Some(first)))]].concat(),
            vec![tip],
            &[],
            &["it changes `shop/dev.json`, `shop/prod.json` together"],
        ),
        ("nothing", vec![], vec![tip], &[], &["it changes nothing"]),
        (
            "a strange file",
            vec![("README", "x".into())],
            vec![tip],
            &[],
            &["`README` is no file of a ledger", "it changes nothing", "`README`: "],
        ),
        ("a deep file", vec![("shop/a/b.json", "{\"format\":1}".into())], vec![tip], &[], &["`shop/a` has the mode 40000"]),
        ("the format", vec![("ledger.json", "{\"format\":1,\"x\":1}".into())], vec![tip], &[], &["it changes `ledger.json`"]),
        ("a newer state", vec![("shop/prod.json", "{\"format\":2}".into())], vec![tip], &[], &["newer pipeline"]),
        ("no JSON", vec![("shop/prod.json", "x".into())], vec![tip], &[], &["`shop/prod.json`: expected value"]),
        (
            "the wrong one before",
            vec![("shop/prod.json", state(Some(first)))],
            vec![tip],
            &[],
            &["made the version before, and it was"],
        ),
        ("none before", vec![("shop/prod.json", state(None))], vec![tip], &[], &["made the version before, and it was"]),
        (
            "one before where there is none",
            vec![("shop/qa.json", state(Some(first)))],
            vec![tip],
            &[],
            &["and it was no decision"],
        ),
        ("a merge", good.to_vec(), vec![tip, first], &[], &["it has more than one parent"]),
    ];
    for (name, files, parents, options, expected) in table {
        let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (*path, text.as_str())).collect();
        forge(ledger.dir(), &parents, &files, options);
        let found = findings(&ledger);
        assert_eq!(found.len(), expected.len(), "{name}: {found:?}");
        for (found, words) in found.iter().zip(expected) {
            assert!(found.contains(words), "{name}: {found}");
        }
        git(ledger.dir(), &["update-ref", "refs/heads/main", &tip.to_string()]);
    }
    // What the caller finds is there as well, with what it may look at.
    let mut seen = Vec::new();
    let verified = ledger.verify(&mut |commit, before, after| {
        seen.push((commit.id, before.and_then(|before| before.id()), after.id()));
        Ok(if commit.id == tip { vec!["not by alice".into()] } else { vec![] })
    });
    let verified = verified.unwrap();
    assert_eq!(seen, [(first, None, Some(first)), (tip, Some(first), Some(tip))]);
    assert_eq!((verified.tip, verified.commits, verified.signed, verified.findings.len()), (Some(tip), 2, 0, 1));
    assert_eq!((verified.findings[0].commit, verified.findings[0].problem.as_str()), (Some(tip), "not by alice"));
    // One changed byte, in each object in turn.
    let objects = git(ledger.dir(), &["rev-list", "--objects", "main"]);
    for id in objects.lines().map(|line| &line[..40]) {
        let path = ledger.dir().join(format!("objects/{}/{}", &id[..2], &id[2..]));
        let whole = fs_err::read(&path).unwrap();
        let mut bytes = whole.clone();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs_err::remove_file(&path).unwrap();
        for damage in [Some(&bytes), None] {
            if let Some(bytes) = damage {
                fs_err::write(&path, bytes).unwrap();
            }
            let fresh = Ledger::open(ledger.dir(), &place.path("a/seen.json"));
            let found = fresh.map_or_else(|error| vec![format!("{error:#}")], |ledger| findings(&ledger));
            assert!(!found.is_empty(), "{id}");
            let _ = fs_err::remove_file(&path);
        }
        fs_err::write(&path, whole).unwrap();
    }
    assert_sound(&ledger, true, "whole again");
}

#[test]
fn a_rewritten_history_is_refused() {
    let place = Place::new();
    let ledger = place.ledger("a");
    let first = count_on(&ledger, "shop/dev.json", "alice");
    let last = count_on(&ledger, "shop/dev.json", "alice");
    let state = format!("{{\"format\":1,\"number\":2,\"previous\":\"{first}\"}}");
    for rewrite in ["cut", "amended", "deleted", "replaced"] {
        let now = match rewrite {
            "cut" => Some(first),
            "amended" => Some(forge(ledger.dir(), &[first], &[("shop/dev.json", &state)], &[])),
            "deleted" => None,
            _ => {
                fs_err::rename(ledger.dir(), place.path("a/old.git")).unwrap();
                None
            }
        };
        match now {
            Some(now) => drop(git(ledger.dir(), &["update-ref", "refs/heads/main", &now.to_string()])),
            None if rewrite == "deleted" => drop(git(ledger.dir(), &["update-ref", "-d", "refs/heads/main"])),
            None => {}
        }
        let ledger = place.ledger("a");
        let error = ledger.snapshot().unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains(&last.to_string()) && now.is_none_or(|now| text.contains(&now.to_string())), "{rewrite}: {text}");
        assert_eq!((exit_code(&error), hints(&error).iter().any(|hint| hint.contains("seen.json"))), (1, true), "{error:?}");
        let change = Change { writes: vec![("shop/dev.json".into(), Some(state.clone().into_bytes()))], message: "x".into() };
        assert!(ledger.append(now, &change, &author("alice", 0), None).is_err(), "{rewrite}");
        assert!(ledger.log().is_err() && ledger.history_of("shop/dev.json").is_err(), "{rewrite}");
        assert!(findings(&ledger).iter().any(|problem| problem.contains("was rewritten")), "{rewrite}");
        if rewrite == "replaced" {
            fs_err::remove_dir_all(ledger.dir()).unwrap();
            fs_err::rename(place.path("a/old.git"), ledger.dir()).unwrap();
        }
        git(&place.path("a/ledger.git"), &["update-ref", "refs/heads/main", &last.to_string()]);
        assert_sound(&place.ledger("a"), true, rewrite);
    }
    // Somebody looked at it and wants it so.
    git(ledger.dir(), &["update-ref", "refs/heads/main", &first.to_string()]);
    ledger.accept().unwrap();
    count_on(&ledger, "shop/dev.json", "alice");
    assert_sound(&ledger, true, "accepted");
    // What is not written down as seen cannot be compared; that is no reason to go on.
    fs_err::write(place.path("a/seen.json"), "").unwrap();
    assert_eq!(exit_code(&ledger.tip().unwrap_err()), 1);
}

/// A history of 10,000 decisions over 50 pipelines with 5 environments, by `git fast-import`.
fn ten_thousand(dir: &Path) -> usize {
    const COUNT: usize = 10_000;
    let place = |number: usize| format!("p{}/e{}.json", number % 50, number / 50 % 5);
    let mut stream = String::new();
    let padding = "0123456789abcdef".repeat(120);
    for number in 0..COUNT {
        let message = format!("{}: promote 1.{number}\n\nDecision: promote\nActor: alice\n", place(number));
        let previous = "0".repeat(40);
        let state = format!("{{\"format\":1,\"number\":{number},\"previous\":\"{previous}\",\"padding\":\"{padding}\"}}\n");
        writeln!(
            stream,
            "commit refs/heads/main\ncommitter alice <alice@example.org> {} +0000\ndata {}\n{message}",
            1_700_000_000 + number,
            message.len()
        )
        .unwrap();
        if number == 0 {
            writeln!(stream, "M 100644 inline ledger.json\ndata 12\n{{\"format\":1}}").unwrap();
        }
        writeln!(stream, "M 100644 inline {}\ndata {}\n{state}", place(number), state.len()).unwrap();
    }
    git_with(dir, &["fast-import", "--quiet"], &stream);
    COUNT
}

#[test]
fn ten_thousand_decisions() {
    let place = Place::new();
    let dir = place.ledger("a").dir().to_owned();
    let count = ten_thousand(&dir);
    let timed = |what: &str, run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        println!("{what}: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    };
    timed("open, first look", &mut || drop(place.ledger("a").snapshot().unwrap()));
    timed("who made each file, from nothing", &mut || assert_eq!(place.ledger("a").made_all().unwrap().len(), 251));
    let mut ledger = place.ledger("a");
    for _ in 0..3 {
        timed("open", &mut || ledger = place.ledger("a"));
        timed("append", &mut || _ = count_on(&ledger, "p7/e3.json", "alice"));
        timed("snapshot and one state", &mut || assert!(counted(&ledger, "p7/e3.json") > 0));
        timed("all 250 states", &mut || {
            let snapshot = ledger.snapshot().unwrap();
            let paths = snapshot.paths().unwrap();
            assert_eq!(paths.iter().filter(|path| snapshot.read(path).unwrap().is_some()).count(), 251);
        });
        timed("who made it", &mut || assert!(ledger.made("p7/e3.json").unwrap().is_some()));
    }
    timed("history of the three", &mut || {
        assert_eq!(ledger.history_of("p7/e3.json").unwrap().take(3).map(Result::unwrap).count(), 3)
    });
    timed("log", &mut || assert_eq!(ledger.log().unwrap().map(Result::unwrap).count(), count + 3));
    // What was imported does not say who made the version before.
    timed("verify", &mut || {
        let found = findings(&ledger);
        assert_eq!(found.len(), count, "{:?}", found.iter().find(|problem| !problem.contains("made the version before")));
    });
    timed("pack_if_needed, nothing needed", &mut || ledger.pack_if_needed().unwrap());
    timed("pack the new ones", &mut || ledger.pack().unwrap());
    timed("append", &mut || _ = count_on(&ledger, "p7/e3.json", "alice"));
    git(&dir, &["fsck", "--no-progress"]);
}
