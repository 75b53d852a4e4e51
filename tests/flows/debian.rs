//! The repository's own pipelines, on real packages: built and served, for every user. They share one store per user,
//! so that the base is built once.

use std::time::Duration;

use crate::bases::Registry;
use crate::common::{self, Project, Running, get, me, users};

/// Runs an image and answers its port; it is healthy.
fn serve(project: &Project, image: &str) -> (Running, u16) {
    let mut running = project.pipeline(&["run", image, "--port", "0"]).start();
    let port = running.port();
    running.wait_for("healthy after ");
    (running, port)
}

/// The pipelines with what their page says.
const PIPELINES: [(&str, &[(&str, &str)]); 3] = [
    ("site", &[("/", "<title>"), ("/style.css", "{"), ("/layers/", "ayer")]),
    ("notes", &[("/", "<title>"), ("/healthz", "")]),
    ("hello-node", &[("/", "<title>"), ("/healthz", "")]),
];

#[test]
fn the_repositorys_pipelines_are_built_and_served() {
    let threads: Vec<_> = users()
        .into_iter()
        .map(|user| {
            std::thread::spawn(move || {
                let project = Project::repository(user);
                for (name, pages) in PIPELINES {
                    let built = project.build_shared(name);
                    assert_eq!(built.steps.last().map(String::as_str), Some("application"), "{name}");
                    assert_eq!(project.build(&["--locked", name]).ran, [""; 0], "{name}");
                    let (mut running, port) = serve(&project, name);
                    for (path, text) in pages {
                        let (status, body) = get(port, path);
                        assert_eq!(status, 200, "{name}{path}: {body}");
                        assert!(body.contains(text), "{name}{path} ({user:?}): {body}");
                    }
                    running.signal(2);
                    let status = running.wait(Duration::from_secs(12)).status.code();
                    assert!([Some(0), Some(130)].contains(&status), "{name}: {status:?}\n{}", running.stderr());
                }
                // A code edit is the application's layer only.
                project.edit("apps/notes/notes/pages.py", "\n", "\n# edited\n");
                let edited = project.build(&["notes"]);
                assert_eq!(edited.ran, ["application"]);
                project.edit("apps/notes/notes/pages.py", "\n# edited\n", "\n");
                assert_eq!(project.build(&["notes"]).ran, [""; 0]);
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

/// From `init` to a served page, on the base that the store has.
#[test]
fn a_folder_with_a_page_becomes_a_site() {
    let shared = Project::repository(me());
    shared.build_shared("site");
    let mut project = Project::empty(me());
    project.root = shared.root.clone();
    project.write("index.html", "<title>mine</title>\n");
    let init = project.pipeline(&["init"]).ok();
    init.prints("pipeline.yaml");
    project.write("pipeline.lock", shared.read("pipelines/pipeline.lock"));
    // The base the others have: init writes no packages.
    project.edit("pipeline.yaml", "  # packages: [ca-certificates]", "  packages: [ca-certificates] #");
    let name = project.read("pipeline.yaml").lines().find_map(|line| line.strip_prefix("name: ").map(String::from)).unwrap();
    let plan = project.json(&["plan"]);
    let cached: Vec<bool> = plan["steps"].as_array().unwrap().iter().map(|step| step["cached"].as_bool().unwrap()).collect();
    assert_eq!(cached, [true, true, false], "{plan:#}");
    assert_eq!(project.build(&[]).ran, ["application"]);
    let (running, port) = serve(&project, &name);
    assert_eq!(get(port, "/"), (200, "<title>mine</title>\n".into()));
    drop(running);
    // A builder of one's own says no suites: it is for all.
    project.write_tiny("own/");
    project.edit("own/pipeline.yaml", "  tar: base.tar\n", "  debian: trixie\n  packages: [ca-certificates]\n");
    project.write("own/pipeline.lock", shared.read("pipelines/pipeline.lock"));
    project.edit("own/builder/s2i/bin/dependencies", "#!/bin/sh", "#!/bin/sh\n# on Debian");
    assert_eq!(
        common::built(&project.pipeline(&["build", "--json", "--locked"]).dir(project.path("own")).ok()).ran,
        ["dependencies", "application"]
    );
}

/// Packages on top of an image that others made of Debian, and a playbook.
#[test]
fn packages_and_a_playbook_on_an_image() {
    let registry = Registry::start();
    let project = Project::repository(me());
    project.build_shared("site");
    project.write("pipelines/plain.yaml", "name: plain\nbase:\n  debian: trixie\n  packages: [ca-certificates]\n");
    assert_eq!(project.build(&["plain"]).ran, [""; 0]);
    registry.push(&project, "plain", "plain:1");
    project.write(
        "image/pipeline.yaml",
        format!("name: on-image\nbase:\n  image: {}\n  packages: [netbase]\nconfigure:\n  - ansible: play/site.yml\nimage:\n  command: [/bin/cat, /etc/services]\n", registry.name("plain:1")),
    );
    project.write("image/play/site.yml", "- hosts: all\n  gather_facts: false\n  tasks:\n    - ansible.builtin.copy: { src: motd, dest: /etc/motd, mode: \"0644\" }\n    - ansible.builtin.lineinfile: { path: /etc/hosts.allow, line: \"ALL: 127.0.0.1\", create: true, mode: \"0644\" }\n");
    project.write("image/play/files/motd", "hello from ansible\n");
    let place = project.path("image");
    let built = project.pipeline(&["build", "--json"]).dir(&place).ok();
    assert_eq!(common::built(&built).ran, ["base", "packages", "build-packages", "configure-1"]);
    assert_eq!(common::built(&project.pipeline(&["build", "--json", "--locked"]).dir(&place).ok()).ran, [""; 0]);
    let run = |command: &[&str]| project.pipeline(&["run", "on-image", "--port", "0:1"]).args(command).ok().stdout;
    assert!(run(&[]).contains("https"), "netbase is installed");
    assert_eq!(run(&["--", "cat", "/etc/motd", "/etc/hosts.allow"]), "hello from ansible\nALL: 127.0.0.1\n");
    // Ansible itself is not in the image.
    assert_eq!(run(&["--", "sh", "-c", "command -v ansible-playbook python3 || echo none"]), "none\n");
    let layers = project.layer_paths("on-image");
    assert_eq!(layers.last().unwrap(), &["etc", "etc/hosts.allow", "etc/motd"].map(String::from));
    project.edit("image/play/files/motd", "hello", "bye");
    let told = project.pipeline(&["explain"]).dir(&place).ok();
    told.prints("configure-1: will run\n    because playbook `site.yml` changed\n");
}

#[test]
fn update_moves_the_lock_and_build_never_does() {
    let project = Project::repository(me());
    project.build_shared("site");
    project.pipeline(&["update", "site"]).ok();
    project.pipeline(&["update", "site", "--check"]).ok().prints("everything is current\n");
    // A lock of the past: one package of another version.
    let lock = project.read("pipelines/pipeline.lock");
    let row = lock.lines().find(|line| line.contains("\"name\":\"lighttpd\"")).unwrap();
    let version = row.split("\"version\":\"").nth(1).unwrap().split('"').next().unwrap();
    let digest = row.split("\"sha256\":\"").nth(1).unwrap().split('"').next().unwrap();
    let old = lock.replace(
        row,
        &row.replace(&format!("\"version\":\"{version}\""), "\"version\":\"1.0-1\"").replace(digest, &"0".repeat(64)),
    );
    project.write("pipelines/pipeline.lock", &old);
    let check = project.pipeline(&["update", "site", "--check"]).run();
    check.code(1).prints("lighttpd").prints("1.0-1").prints(version).prints("pipeline.lock was left as it is");
    assert_eq!(project.read("pipelines/pipeline.lock"), old);
    project.pipeline(&["update", "site"]).ok().prints("wrote pipeline.lock");
    assert_eq!(project.read("pipelines/pipeline.lock").lines().find(|line| line.contains("\"name\":\"lighttpd\"")), Some(row));
    // Nothing of a set that is not locked is resolved with --locked.
    project.edit("pipelines/site.yaml", "[python3-markdown]", "[python3-markdown, netbase]");
    project
        .pipeline(&["build", "site", "--locked"])
        .run()
        .code(2)
        .says("the package set of step `build-packages` is not in `pipeline.lock`, and `--locked` refuses to resolve");
}
