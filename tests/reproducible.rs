//! The same inputs give the same digest: from another folder, an empty store, another user, host
//! name, umask, time zone, language, number of cores, another year; with zstd and with gzip.
//!
//! The builder is a nosy one: it writes all it can see of its surroundings into the layer.

mod common;

use common::{Project, Run, User, tests_are_root, tool, users};

/// Host name, variables, user, umask, folder, time zone, limits, and what `ls` says of the source, in a file; and
/// enough lines for several blocks of compression.
const NOSY: &str = "#!/bin/sh
set -eu
mkdir -p /opt/app
{
    hostname; env | sort; id; umask; pwd; date +%Z; tty || true
    stat -c '%n %a %u:%g' /[a-oq-z]* /opt/* /tmp/src
    ls /dev
    stat -c '%n %a %u:%g %s %Y' /tmp/src/* /tmp/src/.s2i/*
    grep -E '^(Cap|Groups|Uid|Gid|NoNewPrivs|Umask)' /proc/self/status
} > /opt/app/seen
cp -a /tmp/src/. /opt/app
ln /opt/app/index.html /opt/app/hard
mkdir /opt/app/new && touch /opt/app/new/file
seq 1 1500000 > /opt/app/big
rm -f /etc/group
";

fn project(user: User, compression: &str) -> Project {
    let project = Project::tiny(user);
    project.edit("pipeline.yaml", "image:\n", &format!("image:\n  compression: {compression}\n"));
    project.write("builder/s2i/bin/assemble", NOSY);
    project.write("src/.s2i/environment", "COLOUR=red\n");
    project.write("src/b", "b");
    project.write_script("src/a", "a");
    project.link("src/link", "a");
    project
}

fn build(project: &Project) -> Run {
    project.pipeline(&["build", "--json"])
}

/// The digest, and what the nosy builder saw.
fn result(project: &Project, run: Run) -> (String, String) {
    let built = common::built(&run.ok());
    assert_eq!(built.ran, built.steps, "an empty store has nothing");
    let shown = project.json(&["artifact", "show", "tiny"]);
    let top = shown["layers"].as_array().unwrap().last().unwrap()["digest"].as_str().unwrap().to_string();
    (built.digest, String::from_utf8_lossy(&project.layer(&top)["opt/app/seen"]).into_owned())
}

#[test]
fn surroundings_do_not_matter() {
    tool("taskset", "util-linux");
    tool("faketime", "faketime");
    for compression in ["zstd", "gzip"] {
        let mut expected: Option<(String, String)> = None;
        for user in users() {
            type Way<'a> = Box<dyn Fn(Run) -> Run + 'a>;
            let ways: Vec<(&str, Way<'_>)> = vec![
                ("as it is", Box::new(|run| run)),
                (
                    "umask 077, one core, another time zone and language",
                    Box::new(|run| {
                        run.wrap(&["sh", "-c", "umask 077; exec \"$@\"", "sh", "taskset", "-c", "0"])
                            .env("TZ", "Pacific/Auckland")
                            .env("LANG", "tr_TR.UTF-8")
                            .env("LC_ALL", "C")
                    }),
                ),
                (
                    "umask 000, a year later, more variables",
                    Box::new(|run| {
                        run.wrap(&["sh", "-c", "umask 000; exec \"$@\"", "sh", "faketime", "-f", "+400d"])
                            .env("FOO", "bar")
                            .env("COLOUR", "blue")
                            .env("USER", "x")
                            .env("SHELL", "/x")
                    }),
                ),
                (
                    "another host name",
                    Box::new(|run| match user {
                        // Only root may name a host; in a namespace of its own it stays there.
                        User::Root => run.wrap(&["unshare", "--uts", "sh", "-c", "hostname elsewhere; exec \"$@\"", "sh"]),
                        User::Ordinary => run.env("HOSTNAME", "elsewhere").env("HOST", "elsewhere"),
                    }),
                ),
            ];
            for (name, way) in ways {
                let project = project(user, compression);
                if name == "as it is" {
                    // Files of another age and with the bits of another umask.
                    project.mode("src/b", 0o600);
                    let file = fs_err::OpenOptions::new().write(true).open(project.path("src/b")).unwrap();
                    file.into_parts().0.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
                }
                let found = result(&project, way(build(&project)));
                project.assert_clean();
                match &expected {
                    Some(expected) => {
                        assert_eq!(found.1, expected.1, "{name}, {compression}, {user:?}: what a script can see");
                        assert_eq!(found.0, expected.0, "{name}, {compression}, {user:?}");
                    }
                    None => expected = Some(found),
                }
            }
        }
    }
}

#[test]
fn a_commit_gives_the_same_image_in_every_clone() {
    let mut digests = Vec::new();
    let origin = Project::tiny(users()[0]);
    origin.write(".gitignore", "base.tar\n");
    origin.git(&["init", "--quiet"]);
    origin.git(&["add", "--all"]);
    origin.git(&["commit", "--quiet", "-m", "first"]);
    for user in users() {
        let mut project = Project::empty(user);
        let clone = project.beside("clone");
        fs_err::write(project.home.join(".gitconfig"), "[safe]\n\tdirectory = *\n").unwrap();
        let umask = if user == User::Root { "umask 002; exec \"$@\"" } else { "umask 077; exec \"$@\"" };
        project
            .program("git")
            .args(&["clone", "--quiet", origin.dir.to_str().unwrap(), clone.to_str().unwrap()])
            .wrap(&["sh", "-c", umask, "sh"])
            .ok();
        project.dir = clone;
        project.write("base.tar", common::tiny_base());
        digests.push(project.build(&[]).digest);
        // SOURCE_DATE_EPOCH wins over the commit's date.
        let dated = |epoch: &str| common::built(&build(&project).env("SOURCE_DATE_EPOCH", epoch).ok()).digest;
        assert_eq!(dated("1714979289"), digests[0], "the commit's own date");
        assert_ne!(dated("1714979290"), digests[0]);
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "{digests:?}");
}

#[test]
fn a_rebuild_is_compared_and_the_first_file_that_differs_is_named() {
    for user in users() {
        let project = project(user, "zstd");
        let digest = project.build(&[]).digest;
        let verified = project.json(&["artifact", "verify", "tiny", "--rebuild"]);
        assert_eq!((verified["rebuilt"].as_str(), &verified["difference"]), (Some(digest.as_str()), &serde_json::Value::Null));
        project.assert_clean();
        project.edit("builder/s2i/bin/assemble", "rm -f /etc/group\n", "cat /proc/sys/kernel/random/uuid > /opt/app/random\n");
        project.build(&[]);
        let failed = project.pipeline(&["artifact", "verify", "tiny", "--rebuild"]).run();
        failed.code(1).prints("first difference: layer 3: `/opt/app/random`: content ");
        project.assert_clean();
    }
}

/// A real application on a Debian base. The two users have stores of their own, so everything is built twice.
#[test]
fn notes_is_the_same_for_root_and_for_an_ordinary_user() {
    if !tests_are_root() {
        // One user has one store; the other half is the run as root.
        let project = Project::repository(User::Ordinary);
        let digest = project.build_shared("notes").digest;
        let verified = project.json(&["artifact", "verify", "notes", "--rebuild"]);
        assert_eq!(verified["rebuilt"].as_str(), Some(digest.as_str()), "{verified}");
        return;
    }
    let [root, ordinary] = [User::Root, User::Ordinary].map(|user| {
        std::thread::spawn(move || {
            let project = Project::repository(user);
            (project.build_shared("notes"), project)
        })
    });
    let ((one, first), (two, second)) = (root.join().unwrap(), ordinary.join().unwrap());
    if first.read("pipelines/pipeline.lock") == second.read("pipelines/pipeline.lock") {
        assert_eq!(one.digest, two.digest);
    } else {
        // An archive moved between the two: the same lock for both.
        second.write("pipelines/pipeline.lock", first.read("pipelines/pipeline.lock"));
        assert_eq!(one.digest, second.build(&["notes"]).digest);
    }
}
