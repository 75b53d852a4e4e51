//! What a user does, from `init` to `prune`, with the built program: on a small base of busybox for
//! root and for an ordinary user, and with the repository's own pipelines on Debian.

#[path = "flows/bases.rs"]
mod bases;
mod common;
#[path = "flows/debian.rs"]
mod debian;
#[path = "flows/docker.rs"]
mod docker;
#[path = "registry/servers.rs"]
#[allow(dead_code, reason = "made for the registry tests")]
mod servers;

use std::time::Duration;

use common::{Project, TINY_STEPS, binary, get, me, tool, users};
use serde_json::Value;

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;

#[test]
fn plan_build_again_and_explain() {
    for user in users() {
        let project = Project::tiny(user);
        let planned = |project: &Project| -> Vec<(String, bool)> {
            let plan = project.json(&["plan"]);
            plan["steps"]
                .as_array()
                .unwrap()
                .iter()
                .map(|step| (step["name"].as_str().unwrap().into(), step["cached"].as_bool().unwrap()))
                .collect()
        };
        let all = |cached: bool| TINY_STEPS.map(|step| (step.to_string(), cached)).to_vec();
        assert_eq!(planned(&project), all(false));
        assert_eq!(project.pipeline(&["build", "--dry-run", "--json"]).ok().json(), project.json(&["plan"]));
        let first = project.pipeline(&["build", "tiny"]).ok();
        first.says("tiny: 3 steps, 0 cached").says("application: running, because it was never built");
        let shown = project.json(&["artifact", "show", "tiny"]);
        assert_eq!(first.stdout, format!("tiny:latest {}\n", shown["digest"].as_str().unwrap()));
        project.assert_clean();
        assert_eq!(planned(&project), all(true));
        let again = project.pipeline(&["build", "tiny"]).ok();
        assert_eq!((&again.stdout, again.stderr.as_str()), (&first.stdout, ""));
        project.edit("src/index.html", "tiny", "other");
        let plan = project.pipeline(&["plan"]).ok();
        plan.prints("file `index.html` changed");
        project
            .pipeline(&["explain"])
            .ok()
            .prints("the next build of `tiny`:\n")
            .prints("  application: will run\n    because file `index.html` changed\n");
        project
            .pipeline(&["build"])
            .ok()
            .says("tiny: 3 steps, 2 cached")
            .says("application: running, because file `index.html` changed");
        project
            .pipeline(&["explain"])
            .ok()
            .prints("nothing would run; the last build of `tiny` that ran something:\n")
            .prints("  application: ran\n    because file `index.html` changed\n");
        project.assert_clean();
    }
}

/// Nothing changed: no process is started, of ours or of others. The program has deleted itself, so it could not start
/// its other half again, and finds no other program.
#[test]
fn an_unchanged_build_starts_no_process() {
    for user in users() {
        let project = Project::tiny(user);
        let first = project.build(&[]);
        let script = format!(
            "cp {} own && exec 3<own && rm own && PATH=/nonexistent exec /proc/self/fd/3 --root {} \"$@\"",
            binary().display(),
            project.root.display()
        );
        let alone = |args: &[&str]| project.program("sh").args(&["-c", &script, "sh"]).args(args).run();
        let again = alone(&["build", "--json"]);
        again.code(0);
        assert_eq!(common::built(&again), common::Built { ran: vec![], ..first });
        // The proof that it could not have: a build that has to run something fails.
        project.write("src/index.html", "changed");
        assert_ne!(alone(&["build"]).status.code(), Some(0));
        project.assert_clean();
    }
}

#[test]
fn run_serves_and_stops() {
    for user in users() {
        let project = Project::tiny(user);
        project.build(&[]);
        for (signal, status) in [(SIGINT, 130), (SIGTERM, 143)] {
            let mut running = project.pipeline(&["run", "tiny", "--port", "0"]).start();
            let port = running.port();
            assert_eq!(get(port, "/"), (200, "<h1>tiny</h1>\n".into()));
            assert_eq!(get(port, "/none").0, 404);
            running.wait_for("healthy after ");
            running.signal(signal);
            let answer = running.wait(Duration::from_secs(8));
            answer.code(status);
            project.assert_clean();
        }
        // One that does not care is killed when it is asked twice.
        let mut stubborn = project
            .pipeline(&[
                "run",
                "tiny",
                "--port",
                "0",
                "--",
                "sh",
                "-c",
                "trap '' INT; echo ready; sleep 60 & wait; wait; sleep 60",
            ])
            .start();
        stubborn.wait_for("ready");
        stubborn.signal(SIGINT);
        std::thread::sleep(Duration::from_millis(300));
        assert!(!stubborn.is_over());
        stubborn.signal(SIGINT);
        stubborn.wait(Duration::from_secs(5)).code(137);
        project.assert_clean();
        // A port that is taken is told before anything starts.
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port().to_string();
        project
            .pipeline(&["run", "tiny", "--port", &port])
            .run()
            .code(125)
            .says(&format!("port {port} on 127.0.0.1 cannot be had"));
        // When it is killed, so is the program.
        let mut running = project.pipeline(&["run", "tiny", "--port", "0"]).start();
        running.port();
        running.wait_for("healthy after ");
        running.signal(9);
        running.wait(Duration::from_secs(5)).code(137);
        let patience = std::time::Instant::now() + Duration::from_secs(5);
        let alive = || common::leftovers(&project.root).into_iter().filter(|line| !line.starts_with("file ")).collect::<Vec<_>>();
        while !alive().is_empty() {
            assert!(std::time::Instant::now() < patience, "outlives a killed `run`: {:#?}", alive());
            std::thread::sleep(Duration::from_millis(20));
        }
        // No control group is made for it, so none can be left when it is killed.
        let groups = project.pipeline(&["run", "tiny", "--port", "0", "--", "cat", "/proc/self/cgroup"]).ok().stdout;
        assert_eq!(groups, fs_err::read_to_string("/proc/self/cgroup").unwrap());
        assert_eq!(project.build(&[]).ran, [""; 0]);
        project.assert_clean();
    }
}

/// Two at once have nothing in common: one that ends takes nothing of the other along.
#[test]
fn two_runs_at_once() {
    for user in users() {
        let project = Project::tiny(user);
        project.build(&[]);
        let mut running = [0, 1].map(|_| project.pipeline(&["run", "tiny", "--port", "0"]).start());
        let ports = running.each_mut().map(|one| one.port());
        let answers = || ports.map(|port| get(port, "/").0);
        assert_eq!(answers(), [200, 200]);
        running[0].signal(SIGTERM);
        let ended = running[0].wait(Duration::from_secs(8));
        assert!(!ended.code(143).stderr.contains("cgroup"), "{}", ended.stderr);
        assert_eq!(get(ports[1], "/").0, 200);
        running[1].signal(SIGTERM);
        let ended = running[1].wait(Duration::from_secs(8));
        assert!(!ended.code(143).stderr.contains("cgroup"), "{}", ended.stderr);
        project.assert_clean();
    }
}

#[test]
fn run_gives_the_program_what_the_image_says() {
    for user in users() {
        let project = Project::tiny(user);
        project.edit(
            "pipeline.yaml",
            "image:\n",
            "image:\n  volumes: [/var/lib/data, /opt/app/cache]\n  env: { GREETING: \"hello world\" }\n  workdir: /opt/app\n",
        );
        project.build(&[]);
        let sh = |script: &str| {
            project.pipeline(&["run", "tiny", "--port", "0", "--quiet", "--env", "MORE=x=y", "--", "sh", "-c", script]).run()
        };
        let prints = |script: &str, expected: &str| {
            let answer = sh(script);
            answer.code(0);
            assert_eq!(answer.stdout, expected, "{script} ({user:?})\n{}", answer.stderr);
        };
        prints("id -u; id -g", "1001\n0\n");
        prints("pwd; echo $GREETING; echo $MORE", "/opt/app\nhello world\nx=y\n");
        prints("echo out; echo err >&2; cat", "out\n");
        prints("touch /tmp/x /var/lib/data/x /opt/app/cache/x && echo written", "written\n");
        prints(
            "grep -c ' / overlay ro\\| / [a-z]* ro' /proc/mounts > /dev/null; touch /opt/app/x 2>&1 || true",
            "touch: /opt/app/x: Read-only file system\n",
        );
        prints("awk '$2 == \"/tmp\" {print $3}' /proc/mounts", "tmpfs\n");
        // The image's own folder is the start of a volume; nothing of a run stays.
        prints("ls /var/lib/data; ls /tmp", "");
        // No network but the own loopback.
        prints("ls /sys/class/net 2>/dev/null || awk -F: 'NR > 2 {print $1}' /proc/net/dev | tr -d ' '", "lo\n");
        for (script, status) in
            [("exit 7", 7), ("sh -c 'kill -9 $$'; exit $?", 137), ("sh -c 'kill -15 $$'; exit $?", 143), ("true", 0)]
        {
            sh(script).code(status);
        }
        let folder = project.beside("volume");
        fs_err::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let volume = format!("{}:/var/lib/data", folder.display());
        project
            .pipeline(&["run", "tiny", "--port", "0", "--volume", &volume, "--", "sh", "-c", "echo kept > /var/lib/data/x"])
            .ok();
        assert_eq!(fs_err::read_to_string(folder.join("x")).unwrap(), "kept\n");
        let typed = project.pipeline(&["run", "tiny", "--port", "0", "--interactive", "--", "cat"]).input("typed\n").run();
        assert_eq!(typed.code(0).stdout, "typed\n");
        project
            .pipeline(&["run", "tiny", "--port", "0", "--", "no-such-program"])
            .run()
            .code(125)
            .says("error: the image has no program `no-such-program`");
        project
            .pipeline(&["run", "tiny", "--port", "0", "--", "/opt/app/index.html"])
            .run()
            .code(125)
            .says("error: the image has no program `/opt/app/index.html`");
        project.pipeline(&["run", "tinny"]).run().code(125).says("the store has no image `tinny`").says("did you mean `tiny`?");
        project.edit("pipeline.yaml", "name: tiny", "name: unbuilt");
        project
            .pipeline(&["run", "unbuilt"])
            .run()
            .code(125)
            .says("`unbuilt` is not built yet")
            .says("hint: pipeline build unbuilt");
        project.assert_clean();
    }
}

#[test]
fn artifacts_are_listed_moved_verified_and_pruned() {
    tool("skopeo", "skopeo");
    for user in users() {
        let project = Project::tiny(user);
        project.pipeline(&["artifact", "list"]).ok().prints("the store is empty\n");
        let digest = project.build(&[]).digest;
        project.pipeline(&["artifact", "list"]).ok().prints("NAME").prints("tiny:latest").prints("1980-01-02T00:00:00Z");
        let listed = project.json(&["artifact", "list"]);
        assert_eq!(
            (listed["images"].as_array().unwrap().len(), listed["images"][0]["digest"].as_str()),
            (1, Some(digest.as_str()))
        );
        let shown = project.json(&["artifact", "show", "tiny:latest"]);
        assert_eq!(shown["config"]["Cmd"], serde_json::json!(["/usr/libexec/s2i/run"]));
        assert_eq!(shown["config"]["User"], "1001:0");
        let made: Vec<&str> =
            shown["layers"].as_array().unwrap().iter().map(|layer| layer["made_by"].as_str().unwrap()).collect();
        assert_eq!(made, ["pipeline base", "pipeline dependencies", "pipeline application"]);
        // By digest, by its start, by a name that is nearly one.
        for name in [digest.as_str(), &digest[7..27]] {
            assert_eq!(project.json(&["artifact", "show", name])["digest"].as_str(), Some(digest.as_str()), "{name}");
        }
        project.pipeline(&["artifact", "show", "tinx"]).run().code(2).says("did you mean `tiny`?");
        project.pipeline(&["artifact", "show", "tiny"]).ok().prints(&digest);

        project.pipeline(&["artifact", "tag", "tiny", "shop/tiny:1.0"]).ok();
        project.pipeline(&["artifact", "tag", "tiny", "no tag"]).run().code(2).says("`no tag` is not a name for an image");
        let listed = project.json(&["artifact", "list"]);
        let names: Vec<&str> = listed["images"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["shop/tiny:1.0", "tiny:latest"]);
        project.pipeline(&["artifact", "untag", "shop/tiny:1.0"]).ok();
        project.pipeline(&["artifact", "untag", "shop/tiny:1.0"]).run().code(2);

        let file = project.path("tiny.oci.tar");
        project.pipeline(&["artifact", "export", "tiny", "--output", "tiny.oci.tar"]).ok().says("wrote `tiny.oci.tar`");
        let piped = project.pipeline(&["artifact", "export", "tiny", "-o", "-"]).ok();
        assert!(piped.bytes == fs_err::read(&file).unwrap(), "a file and a pipe get the same bytes");
        // What others read in it: the OCI layout, and Docker's own form.
        let inspect = project.program("skopeo").arg("inspect").arg(format!("oci-archive:{}", file.display())).ok().json();
        assert_eq!(inspect["Digest"].as_str(), Some(digest.as_str()));
        let docker = project
            .program("skopeo")
            .args(&["--insecure-policy", "--tmpdir", "/tmp", "copy"])
            .arg(format!("docker-archive:{}", file.display()))
            .arg(format!("dir:{}", project.beside("dir").display()));
        docker.ok();

        let other = project.beside("other");
        let elsewhere = |args: &[&str]| project.bare(&["--root", other.to_str().unwrap()]).args(args);
        assert_eq!(elsewhere(&["artifact", "load", "tiny.oci.tar"]).ok().stdout, format!("tiny:latest {digest}\n"));
        assert_eq!(
            elsewhere(&["artifact", "load", "-"]).input(piped.bytes.clone()).ok().stdout,
            format!("tiny:latest {digest}\n")
        );
        elsewhere(&["artifact", "verify", "tiny"]).ok().prints("5 blobs are as their digests say");
        assert_eq!(elsewhere(&["run", "tiny", "--port", "0", "--", "cat", "/opt/app/index.html"]).ok().stdout, "<h1>tiny</h1>\n");
        elsewhere(&["artifact", "load", "pipeline.yaml"]).run().code(1);
        elsewhere(&["artifact", "load", "nothing.tar"]).run().code(2);

        prune(&project);
        corrupt(&project);
    }
}

/// Old builds go, the last ones and what is tagged stay.
fn prune(project: &Project) {
    for text in ["one", "two", "three", "four", "five"] {
        project.write("src/index.html", format!("<h1>{text}</h1>\n"));
        project.build(&[]);
        if text == "one" {
            project.pipeline(&["artifact", "tag", "tiny", "tiny:kept"]).ok();
        }
    }
    let blobs = || fs_err::read_dir(project.root.join("store/blobs/sha256")).unwrap().count();
    let before = blobs();
    let would = project.json(&["artifact", "prune", "--dry-run", "--keep", "1"]);
    assert_eq!(blobs(), before, "a dry run");
    // Of the images tiny, two, three and four: a manifest, a configuration, the application layer.
    let of = |kind: &str| would["unneeded"].as_array().unwrap().iter().filter(|item| item["kind"] == kind).count();
    assert_eq!(of("blob"), 12, "{would:#}");
    assert!(would["bytes"].as_u64().unwrap() > 0);
    let done = project.json(&["artifact", "prune", "--keep", "1"]);
    assert_eq!((done["unneeded"].as_array().unwrap().len(), blobs()), (would["unneeded"].as_array().unwrap().len(), before - 12));
    assert_eq!(project.build(&[]).ran, [""; 0]);
    for (image, page) in [("tiny", "<h1>five</h1>\n"), ("tiny:kept", "<h1>one</h1>\n")] {
        project.pipeline(&["artifact", "verify", image]).ok();
        assert_eq!(project.pipeline(&["run", image, "--port", "0", "--", "cat", "/opt/app/index.html"]).ok().stdout, page);
    }
    project.pipeline(&["artifact", "prune", "--keep", "1"]).ok().prints("freed 0 B");
    project.assert_clean();
}

/// A blob whose bytes were changed is found by its digest, told, and built again.
fn corrupt(project: &Project) {
    let shown = project.json(&["artifact", "show", "tiny"]);
    let layer = shown["layers"].as_array().unwrap().last().unwrap()["digest"].as_str().unwrap();
    let path = project.root.join("store/blobs/sha256").join(&layer[7..]);
    let mut bytes = fs_err::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs_err::write(&path, bytes).unwrap();
    project.pipeline(&["artifact", "verify", "tiny"]).run().code(1).says(&format!("blob {layer} is corrupt"));
    let again = project.pipeline(&["build", "--json"]).ok();
    again.says(&format!("blob {layer} of step `application` is corrupt; it is built again"));
    assert_eq!(
        (common::built(&again).ran, again.json()["digest"].as_str()),
        (vec!["application".to_string()], shown["digest"].as_str())
    );
    project.pipeline(&["artifact", "verify", "tiny"]).ok();
}

#[test]
fn skopeo_reads_the_store_also_while_a_build_is_running() {
    tool("skopeo", "skopeo");
    for user in users() {
        let project = Project::tiny(user);
        let first = project.build(&[]).digest;
        let image = format!("oci:{}:tiny:latest", project.root.join("store").display());
        let inspected =
            || project.program("skopeo").args(&["inspect", &image]).ok().json()["Digest"].as_str().unwrap().to_string();
        assert_eq!(inspected(), first);
        project.edit("builder/s2i/bin/assemble", "date > /dev/null", "echo waiting; sleep 2");
        let mut running = project.pipeline(&["build", "--verbose"]).start();
        running.wait_for("waiting");
        let copy = project.beside("copy");
        project
            .program("skopeo")
            .args(&["--insecure-policy", "copy", "--quiet", &image, &format!("oci:{}:tiny:1", copy.display())])
            .ok();
        assert_eq!(inspected(), first);
        assert!(!running.is_over(), "the build was to be running");
        running.wait(Duration::from_secs(60)).code(0);
        let second = project.json(&["artifact", "show", "tiny"])["digest"].as_str().unwrap().to_string();
        assert_eq!(inspected(), second);
        assert_ne!(first, second);
        project.assert_clean();
    }
}

/// Two builds of one pipeline at once: a step is run by one of them, and both get the same image.
#[test]
fn two_builds_at_once() {
    for user in users() {
        let project = Project::tiny(user);
        let mut running: Vec<_> = (0..3).map(|_| project.pipeline(&["build", "--json"]).start()).collect();
        let answers: Vec<_> = running.iter_mut().map(|build| build.wait(Duration::from_secs(60))).collect();
        let built: Vec<_> = answers.iter().map(|answer| common::built(answer.code(0))).collect();
        assert!(built.iter().all(|one| one.digest == built[0].digest));
        let mut ran: Vec<String> = built.iter().flat_map(|one| one.ran.clone()).collect();
        ran.sort();
        assert_eq!(ran, ["application", "base", "dependencies"]);
        project.assert_clean();
    }
}

#[test]
fn two_pipelines_share_a_base_and_a_sub_folder_finds_them() {
    for user in users() {
        let project = Project::tiny(user);
        let file = project
            .read("pipeline.yaml")
            .replace("base.tar", "../base.tar")
            .replace("./builder", "../builder")
            .replace("path: src", "path: ../src");
        fs_err::remove_file(project.path("pipeline.yaml")).unwrap();
        project.write("pipelines/tiny.yaml", &file);
        project.write(
            "pipelines/second.yaml",
            file.replace("name: tiny", "name: second").replace("  path: ../src", "  path: ../other"),
        );
        project.write("other/lock.txt", "other 2.0\n");
        project.write("other/index.html", "other\n");
        let below = project.path("src");
        let build = |name: &str| common::built(&project.pipeline(&["build", "--json", name]).dir(&below).ok());
        assert_eq!(build("tiny").ran, TINY_STEPS);
        assert_eq!(build("second").ran, ["dependencies", "application"]);
        project
            .pipeline(&["build"])
            .dir(&below)
            .run()
            .code(2)
            .says("has several pipelines: `second` and `tiny`")
            .says("add the name of one to the command");
        project.pipeline(&["build", "secnd"]).dir(&below).run().code(2).says("did you mean `second`?");
        let layers =
            |name: &str| -> Vec<Value> { project.json(&["artifact", "show", name])["layers"].as_array().unwrap().clone() };
        assert_eq!(layers("tiny")[0], layers("second")[0]);
        assert_ne!(layers("tiny")[2], layers("second")[2]);
        project.assert_clean();
    }
}

#[test]
fn a_failing_script_tells_its_status_its_last_lines_and_its_log() {
    for user in users() {
        let project = Project::tiny(user);
        project.edit("builder/s2i/bin/assemble", "echo assembled", "seq 1 50; echo the end >&2; exit 3");
        let failed = project.pipeline(&["build", "--json"]).run();
        failed
            .code(1)
            .says("step `application` of `tiny` failed: `assemble` exited with status 3; its last lines:\n")
            .says("  | 22\n")
            .says("  | the end\n")
            .says_not("  | 21\n");
        assert_eq!(failed.stdout, "");
        let log = failed.stderr.lines().find_map(|line| line.strip_prefix("hint: the whole log is ")).unwrap();
        let log = fs_err::read_to_string(log).unwrap();
        assert!(log.starts_with("1\n2\n") && log.ends_with("the end\n"), "{log}");
        failed.says("hint: `pipeline build tiny --shell` gives a shell in the step as it was");
        // The shell is in the step as it was, and the build fails all the same.
        let shell = project.pipeline(&["build", "--shell"]).input("ls /opt/app/index.html; cat /tmp/src/lock.txt; exit\n").run();
        shell.code(1).says("/opt/app/index.html").says("one 1.0");
        project.assert_clean();
        // What ran before the failing step is kept.
        project.edit("builder/s2i/bin/assemble", "exit 3", "exit 0");
        assert_eq!(project.build(&[]).ran, ["application"]);
    }
}

#[test]
fn progress_and_answers_have_their_forms() {
    const DOCUMENTED: [&str; 8] = ["plan", "step-start", "step-output", "step-end", "note", "warning", "built", "error"];
    let project = Project::tiny(me());
    let events = |answer: &common::Answer| -> Vec<Value> {
        let events: Vec<Value> = answer
            .stderr
            .lines()
            .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
            .collect();
        for event in &events {
            assert!(DOCUMENTED.contains(&event["event"].as_str().unwrap()), "{event} is not in docs/progress.md");
        }
        events
    };
    let first = project.pipeline(&["build", "--progress", "json"]).ok();
    let told: Vec<String> = events(&first)
        .iter()
        .map(|event| format!("{} {}", event["event"].as_str().unwrap(), event["step"].as_str().unwrap_or_default()))
        .collect();
    let expected = [
        "plan ",
        "step-start base",
        "step-end base",
        "step-start dependencies",
        "step-end dependencies",
        "step-start application",
        "step-output application",
        "step-end application",
        "built ",
    ];
    assert_eq!(told, expected);
    let again = project.pipeline(&["build", "--progress", "json"]).ok();
    let told = events(&again);
    assert_eq!(told.iter().map(|event| event["event"].as_str().unwrap()).collect::<Vec<_>>(), ["plan", "built"]);
    assert_eq!((told[0]["cached"].as_u64(), told[1]["name"].as_str()), (Some(3), Some("tiny:latest")));
    project.write("src/index.html", "changed");
    assert_eq!(project.pipeline(&["build", "--quiet"]).ok().stderr, "");
    project.write("src/index.html", "changed again");
    project.pipeline(&["build", "--verbose"]).ok().says("application: assembled\n");
    project.edit("builder/s2i/bin/assemble", "set -eu", "exit 4");
    let failed = project.pipeline(&["build", "--progress", "json"]).run();
    let told = events(failed.code(1));
    assert_eq!((told.last().unwrap()["event"].as_str(), told.last().unwrap()["exit"].as_u64()), (Some("error"), Some(1)));
    let quiet = project.pipeline(&["build", "--quiet"]).run();
    assert!(quiet.code(1).stderr.starts_with("error: step `application` of `tiny` failed"), "{}", quiet.stderr);
    assert!(!first.stderr.contains('\x1b') && !quiet.stderr.contains('\x1b'), "colours without a terminal");
    project.pipeline(&["build", "--quiet", "--verbose"]).run().code(2);
    project.assert_clean();
}

#[test]
fn the_program_tells_about_itself() {
    let project = Project::empty(me());
    let commit = project.bare(&["--version", "--json"]).ok().json();
    assert_eq!((commit["version"].as_str(), commit["builders"].as_object().unwrap().len()), (Some(env!("CARGO_PKG_VERSION")), 3));
    let shown = project.bare(&["--version"]).ok().stdout;
    assert!(
        shown.starts_with(&format!("pipeline {}", env!("CARGO_PKG_VERSION")))
            && shown.contains(commit["commit"].as_str().unwrap()),
        "{shown}"
    );
    let schema = project.bare(&["schema"]).ok().json();
    assert_eq!(schema["properties"]["base"]["$ref"], "#/$defs/Base", "{schema:#}");
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        project.bare(&["completions", shell]).ok().prints("pipeline");
    }
    // bash itself takes the script, and completes a verb with it.
    let completions = project.bare(&["completions", "bash"]).ok().stdout;
    project.write("completions", completions);
    let script = ". ./completions; COMP_WORDS=(pipeline bui) COMP_CWORD=1; _pipeline pipeline bui pipeline; echo ${COMPREPLY[@]}";
    assert_eq!(project.program("bash").args(&["-c", script]).ok().stdout, "build\n");
    project.bare(&["man"]).ok().prints(".TH pipeline 1").prints("PIPELINE BUILD").prints("pipeline artifact export");
    project.bare::<&str>(&[]).run().code(2).says("Usage: pipeline");
    project.bare(&["bild"]).run().code(2).says("a similar subcommand exists: 'build'");
    project.bare(&["build"]).run().code(2).says("there is no pipeline here").says("`pipeline init` writes one");
    let doctor = project.pipeline(&["doctor", "--json"]).run();
    assert!(doctor.json().is_object(), "{}", doctor.stdout);
    for json in [vec!["artifact", "list"], vec!["artifact", "prune", "--dry-run"]] {
        assert_eq!(project.json(&json)["schema"], 1, "{json:?}");
    }
}

/// Without `--root`: the user's own folders, as XDG says.
#[test]
fn an_ordinary_users_store_is_where_xdg_says() {
    let project = Project::tiny(common::User::Ordinary);
    let (data, state) = (project.beside("data"), project.beside("state"));
    let run = |args: &[&str]| project.bare(args).env("XDG_DATA_HOME", &data).env("XDG_STATE_HOME", &state);
    let digest = common::built(&run(&["build", "--json"]).ok()).digest;
    assert!(data.join("pipeline/store/index.json").exists() && state.join("pipeline/builds/tiny.json").exists());
    project.bare(&["build", "--json"]).ok();
    assert!(project.home.join(".local/share/pipeline/store/index.json").exists());
    assert_eq!(run(&["artifact", "list", "--json"]).ok().json()["images"][0]["digest"].as_str(), Some(digest.as_str()));
    // A store belongs to one user.
    if common::tests_are_root() {
        let root = data.join("pipeline");
        let other = Project::empty(common::User::Root);
        other.bare(&["--root", root.to_str().unwrap(), "artifact", "list"]).run().code(2).says("belongs to uid ");
    }
    if !common::tests_are_root() {
        for root in [data.join("pipeline"), project.home.join(".local/share/pipeline")] {
            common::remove_tree(&root);
        }
    }
}
