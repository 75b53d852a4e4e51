//! Bad days: full disks, kills, signals, damage, others at work, machines that refuse. Each build
//! after one gives the same digest, and nothing is left behind.
#![allow(clippy::print_stdout, reason = "what was measured and met is worth reading")]

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Answer, Project, Run, User, binary, built, leftovers, me, tests_are_root, tool, users};

/// Puts `script` into `assemble`, run with `-e`.
fn assemble(project: &Project, script: &str) {
    project.write("builder/s2i/bin/assemble", format!("#!/bin/sh\nset -e\nmkdir -p /opt/app\n{script}\n"));
}

/// Seconds to sleep that no other process of this machine has.
fn marker(number: u32) -> String {
    format!("9{number}{}", std::process::id())
}

/// Command lines of all processes that hold `marker`.
fn processes(marker: &str) -> Vec<String> {
    let lines = fs_err::read_dir("/proc").unwrap().flatten().filter_map(|entry| fs_err::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(marker)).collect()
}

#[track_caller]
fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < patience, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// One `error:` line, a next step, nothing on standard output.
#[track_caller]
fn one_error(answer: &Answer) {
    let errors = answer.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert!(errors == 1 && answer.stderr.contains("\nhint: ") && answer.stdout.is_empty(), "{}{}", answer.stdout, answer.stderr);
}

// ----------------------------------------------------------------------------------------- damage

#[test]
fn corrupt_blobs() {
    for user in users() {
        let project = Project::tiny(user);
        let first = project.build(&[]);
        let damage = |digest: &str| {
            let path = project.root.join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"));
            let mut bytes = fs_err::read(&path).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs_err::write(&path, bytes).unwrap();
        };
        let shown = project.json(&["artifact", "show", "tiny"]);
        let layers: Vec<String> =
            shown["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap().into()).collect();
        for (layer, step) in layers.iter().zip(["base", "dependencies", "application"]) {
            damage(layer);
            let answer = project.pipeline(&["build", "--json"]).ok();
            answer.says(&format!("warning: blob {layer} of step `{step}` is corrupt; it is built again"));
            let again = built(&answer);
            assert_eq!((again.digest.as_str(), again.ran), (first.digest.as_str(), vec![step.to_string()]));
            assert_eq!(project.build(&[]).ran, [""; 0]);
        }
        // Gone for good is the same; so are the manifest, the configuration and what was unpacked.
        fs_err::remove_file(project.root.join("store/blobs/sha256").join(layers[2].trim_start_matches("sha256:"))).unwrap();
        assert_eq!(project.build(&[]), common::Built { ran: vec!["application".into()], ..first.clone() });
        damage(&first.digest);
        assert_eq!(project.build(&[]).digest, first.digest);
        project.pipeline(&["artifact", "verify", "tiny"]).ok();
        project.pipeline(&["run", "--port", "0", "tiny", "--", "/bin/true"]).ok();
        project.assert_clean();
    }
}

#[test]
fn damaged_stores() {
    for user in users() {
        let project = Project::tiny(user);
        let first = project.build(&[]);
        let index = project.root.join("store/index.json");
        let good = fs_err::read(&index).unwrap();
        fs_err::write(&index, &good[..good.len() / 2]).unwrap();
        let answer = project.pipeline(&["build"]).run();
        answer.code(1).says("store/index.json` is broken").says("hint: the blobs are intact: move the file away and build again");
        one_error(&answer);
        assert_eq!(fs_err::read(&index).unwrap(), &good[..good.len() / 2], "a broken index is not overwritten");
        fs_err::remove_file(&index).unwrap();
        assert_eq!(project.build(&[]).digest, first.digest);
        // Records of any kind that cannot be read are as good as none.
        for dir in ["cache/steps", "cache/stat", "cache/listings", "state/builds"] {
            for entry in fs_err::read_dir(project.root.join(dir)).unwrap().flatten().filter(|entry| entry.path().is_file()) {
                fs_err::write(entry.path(), "{").unwrap();
            }
        }
        assert_eq!(project.build(&[]).digest, first.digest);
        let version = project.root.join("version");
        fs_err::write(&version, "99\n").unwrap();
        let answer = project.pipeline(&["build"]).run();
        answer
            .code(2)
            .says("` has format 99, newer than this program's 1")
            .says("hint: use the newer pipeline, or another store with `--root DIR`");
        one_error(&answer);
        project.assert_clean();
    }
}

#[test]
fn a_store_of_somebody_else() {
    if !tests_are_root() {
        // One user cannot make a store of another one; the machine of `.ci/run` is root.
        return;
    }
    let project = Project::tiny(User::Ordinary);
    project.build(&[]);
    let answer = Run::new(User::Root, binary(), &project.home, &project.dir)
        .args(&["--root", project.root.to_str().unwrap(), "build"])
        .run();
    answer.code(2).says("` belongs to uid ").says(", and this is uid 0").says("hint: a store belongs to one user");
    one_error(&answer);
    assert_eq!(project.build(&[]).ran, [""; 0]);
    project.assert_clean();
}

// ------------------------------------------------------------------------------------ full disks

/// Mounts a tmpfs of `size` at `place`, builds in it, then makes it large and builds again. What is
/// left after the first build is looked for inside, since nobody else sees this mount.
const FULL: &str = r#"
set -u
place=$1 size=$2; shift 2
mount -t tmpfs -o "size=$size,mode=0755" tmpfs "$place" || exit 99
"$@" --root "$place/root" build; echo "first $?"
find "$place" \( -name '.tmp-*' -o -name '.new-*' -o -name 'making-*' -o -name 'blob-*' \) | sed 's/^/left /'
find "$place/root/cache/work" -mindepth 1 -maxdepth 1 2>/dev/null | sed 's/^/left /'
mount -o remount,size=200m "$place" || exit 98
"$@" --root "$place/root" --quiet build; echo "second $?"
find "$place" \( -name '.tmp-*' -o -name '.new-*' -o -name 'making-*' -o -name 'blob-*' \) | sed 's/^/left /'
echo "used $(df --output=used -k "$place" | tail -1)"
"#;

/// Runs [`FULL`] in a mount namespace of its own: as root, or as root of a user namespace.
fn on_a_disk_of(project: &Project, place: &Path, size: &str) -> Answer {
    let namespace: &[&str] = if project.user == User::Root {
        &["unshare", "--mount"]
    } else {
        &["unshare", "--user", "--map-auto", "--map-root-user", "--mount"]
    };
    project.program("sh").wrap(namespace).arg("-c").arg(FULL).arg("sh").arg(place).arg(size).arg(binary()).run()
}

#[test]
fn full_disks() {
    tool("unshare", "util-linux");
    for user in users() {
        let project = Project::tiny(user);
        // Does not compress, so that packing needs its room too.
        let noise: Vec<u8> = (0..3_000_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 ^ (i.wrapping_mul(40_503) >> 7) as u8)
            .collect();
        project.write("src/noise", noise);
        let expected = project.build(&[]).digest;
        let place = project.beside("disk");
        let whole = on_a_disk_of(&project, &place, "200m");
        whole.code(0).prints("first 0\n").prints("second 0\n");
        let used: u32 = whole.stdout.lines().find_map(|line| line.strip_prefix("used ")).unwrap().trim().parse().unwrap();
        // The first too small for the base, some for a layer, the last ones for the last small files.
        let mut sizes: Vec<u32> = vec![600, 2048, 3 * 1024, used / 2, used * 3 / 4];
        sizes.extend((0..11).map(|pages| used - 4 * pages));
        let mut failures = BTreeSet::new();
        for size in sizes {
            let answer = on_a_disk_of(&project, &place, &format!("{size}k"));
            let text = format!("size {size} of {used}:\n{}{}", answer.stdout, answer.stderr);
            answer.code(0).prints("second 0\n").prints(&expected);
            assert!(!answer.stdout.contains("left "), "{text}");
            if answer.stdout.contains("first 0") {
                assert!(size + 8 > used, "{text}");
                continue;
            }
            answer
                .prints("first 75\n")
                .says("No space left on device")
                .says("hint: free some space, or put the store and the work folder on a larger disk");
            assert_eq!(answer.stderr.lines().filter(|line| line.starts_with("error: ")).count(), 1, "{text}");
            let where_it_failed = [
                ("cannot unpack", "unpacking"),
                ("cannot pack the layer", "packing"),
                ("store/index.json", "the index"),
                ("store/.tmp/blob-", "manifest or configuration"),
                ("cannot take a snapshot", "the snapshot"),
                ("failed: `assemble`", "the script"),
            ];
            failures.insert(
                where_it_failed.iter().find(|(mark, _)| answer.stderr.contains(mark)).map_or("a record", |(_, name)| name),
            );
        }
        println!("{user:?}: failed at {failures:?}");
        for wanted in ["unpacking", "packing", "manifest or configuration", "the index"] {
            assert!(failures.contains(wanted), "never failed at {wanted}: {failures:?}");
        }
        assert_eq!(leftovers(&place), [""; 0]);
    }
}

#[test]
fn a_work_folder_on_another_file_system() {
    for user in users() {
        let project = Project::tiny(user);
        let expected = project.build(&[]).digest;
        // A tmpfs everybody may write to; elsewhere than the store, or the test shows nothing.
        let work = tempfile::Builder::new().prefix("pipeline-test-work-").tempdir_in("/dev/shm").unwrap();
        fs_err::set_permissions(work.path(), PermissionsExt::from_mode(0o1777)).unwrap();
        let device = |path: &Path| std::os::unix::fs::MetadataExt::dev(&fs_err::metadata(path).unwrap());
        assert_ne!(device(work.path()), device(&project.root), "/dev/shm and the temporary folder are on one file system");
        let other = project.beside("other");
        for _ in 0..2 {
            let answer = project.bare(&["--root"]).arg(&other).args(&["build", "--json", "--work-dir"]).arg(work.path()).ok();
            assert_eq!(built(&answer).digest, expected);
            assert_eq!(fs_err::read_dir(work.path()).unwrap().count(), 0);
            assert_eq!(leftovers(&other), [""; 0]);
            project.edit("src/index.html", "tiny", "tiny");
        }
        // A failure leaves nothing there either.
        assemble(&project, "exit 3");
        project.bare(&["--root"]).arg(&other).args(&["build", "--work-dir"]).arg(work.path()).run().code(1);
        assert_eq!(fs_err::read_dir(work.path()).unwrap().count(), 0);
    }
}

// ------------------------------------------------------------------------------------------- kills

/// Points a build from nothing passes in the program itself, as it counts them.
fn points(project: &Project) -> i64 {
    let root = project.beside("count");
    let answer = project.bare(&["--root"]).arg(&root).args(&["--fault", "0", "build"]).ok();
    let count = answer.stderr.lines().find_map(|line| line.strip_prefix("fault points passed: ")).unwrap().parse().unwrap();
    let _ = fs_err::remove_dir_all(root);
    count
}

/// A build that is killed at a point; then what must be true of the moment after and of the next build.
fn killed_build(project: &Project, variable: &str, point: i64, root: &Path, expected: &str) -> bool {
    let mut running = project.bare(&["--root"]).arg(root).arg("build").env(variable, point.to_string()).start();
    let pid = running.pid();
    let answer = running.wait(Duration::from_secs(60));
    let died = !answer.status.success();
    if variable == "PIPELINE_FAULT" && died {
        answer.code(137);
    } else if died {
        answer.code(1).says("error: ");
    }
    // The children go with their parent, and their mounts with them.
    wait_until("the children are gone", || leftovers(root).iter().all(|left| left.starts_with("file ")));
    // No lock is held, no leftover is in the way: the next build is as any other.
    let next = project.bare(&["--root"]).arg(root).args(&["build", "--json"]).start().wait(Duration::from_secs(60));
    next.code(0);
    assert_eq!(built(&next).digest, expected, "after {variable}={point}, pid {pid}");
    assert_eq!(leftovers(root), [""; 0], "after {variable}={point}");
    assert_eq!(built(&project.bare(&["--root"]).arg(root).args(&["build", "--json"]).ok()).ran, [""; 0]);
    died
}

#[test]
fn kill_9_at_our_own_writes_renames_and_mounts() {
    for user in users() {
        let project = Project::tiny(user);
        let expected = project.build(&[]).digest;
        let points = points(&project);
        // Some of them, spread over all of the build; each user other ones.
        let stride: i64 = if user == me() { 3 } else { 5 };
        let mut killed = 0;
        for point in (1..=points).step_by(usize::try_from(stride).unwrap()) {
            let root = project.beside(&format!("outer-{point}"));
            assert!(killed_build(&project, "PIPELINE_FAULT", point, &root, &expected), "point {point} of {points} was not met");
            killed += 1;
        }
        let mut inside = 0;
        for point in 1.. {
            let root = project.beside(&format!("inner-{point}"));
            if !killed_build(&project, "PIPELINE_FAULT_INSIDE", point, &root, &expected) {
                break;
            }
            inside += 1;
        }
        println!("{user:?}: {killed} of {points} points of the program, all {inside} of the unshare process");
        assert!(killed >= 10 && inside >= 8 && killed + inside >= 20, "{killed} and {inside}");
    }
}

#[test]
fn kill_9_during_a_step() {
    for user in users() {
        let project = Project::tiny(user);
        let marker = marker(1);
        assemble(&project, &format!("echo started\n(setsid sleep {marker} &)\nsleep {marker}"));
        let mut running = project.pipeline(&["build", "--verbose"]).start();
        running.wait_for("application: started");
        wait_until("the step sleeps", || processes(&format!("sleep {marker}")).len() >= 2);
        running.signal(libc::SIGKILL);
        running.wait(Duration::from_secs(5)).code(137);
        wait_until("the step is gone", || processes(&format!("sleep {marker}")).is_empty());
        assemble(&project, "touch /opt/app/x");
        project.build(&[]);
        project.assert_clean();
    }
}

// ----------------------------------------------------------------------------------------- signals

#[test]
fn signals_during_a_step() {
    let cases = [
        (vec![libc::SIGINT], 130, "SIGINT (^C)"),
        (vec![libc::SIGTERM], 143, "SIGTERM"),
        (vec![libc::SIGHUP], 129, "SIGHUP"),
        (vec![libc::SIGINT, libc::SIGINT], 130, "SIGINT (^C)"),
    ];
    for user in users() {
        let project = Project::tiny(user);
        let marker = marker(2);
        assemble(
            &project,
            &format!("trap '' INT TERM HUP\necho started\n(setsid sleep {marker} &)\nwhile true; do sleep {marker}; done"),
        );
        for (signals, code, name) in &cases {
            let mut running = project.pipeline(&["build", "--verbose"]).start();
            running.wait_for("application: started");
            for signal in signals {
                running.signal(*signal);
            }
            let answer = running.wait(Duration::from_secs(10));
            answer.code(*code).says(&format!("error: stopped by {name}")).says("hint: finished steps are kept");
            one_error(&answer);
            assert!(answer.took < Duration::from_secs(5), "{:?}", answer.took);
            project.assert_clean();
            assert_eq!(processes(&format!("sleep {marker}")), [""; 0]);
        }
        assemble(&project, "touch /opt/app/x");
        assert_eq!(project.build(&[]).ran, ["application"]);
    }
}

// ------------------------------------------------------------------------------------- at one time

#[test]
fn builds_at_the_same_time() {
    for user in users() {
        let project = Project::tiny(user);
        // Seconds of the clock are in the layer: a step that ran twice would show.
        assemble(&project, "sleep 1; cat /proc/sys/kernel/random/uuid > /opt/app/once");
        let start = || project.pipeline(&["build", "--json"]).start();
        let mut running = [start(), start(), start()];
        let all = running.each_mut().map(|running| built(running.wait(Duration::from_secs(60)).code(0)));
        assert!(all.iter().all(|built| built.digest == all[0].digest), "{all:?}");
        let mut ran: Vec<&String> = all.iter().flat_map(|built| &built.ran).collect();
        ran.sort();
        assert_eq!(ran, ["application", "base", "dependencies"]);
        project.assert_clean();

        // Two pipelines of one store: each its own, what they share once.
        let text = project
            .read("pipeline.yaml")
            .replace("./builder", "../builder")
            .replace("base.tar", "../base.tar")
            .replace("path: src", "path: ../src");
        for name in ["one", "two"] {
            project.write(
                &format!("pipelines/{name}.yaml"),
                text.replace("name: tiny", &format!("name: {name}"))
                    .replace("image:", &format!("build: {{ env: {{ A: {name} }} }}\nimage:")),
            );
        }
        let start = |name: &str| project.pipeline(&["build", "--json", name]).start();
        let mut running = [start("one"), start("two")];
        let both = running.each_mut().map(|running| built(running.wait(Duration::from_secs(60)).code(0)));
        assert_ne!(both[0].digest, both[1].digest);
        let names: Vec<String> = project
            .json(&["artifact", "list"])
            .to_string()
            .split('"')
            .filter(|text| text.ends_with(":latest"))
            .map(String::from)
            .collect();
        for name in ["one:latest", "two:latest", "tiny:latest"] {
            assert!(names.iter().any(|known| known == name), "{names:?}");
        }
        project.assert_clean();
    }
}

// --------------------------------------------------------------------------- machines that refuse

/// A folder with links to the programs of this machine that `wanted` names.
fn path_with(project: &Project, wanted: &[&str]) -> PathBuf {
    let dir = project.beside("bin");
    let path = std::env::var_os("PATH").unwrap();
    for name in wanted {
        let program = pipeline::cmd::find(name, &path).unwrap_or_else(|| panic!("`{name}` is missing"));
        fs_err::os::unix::fs::symlink(program, dir.join(name)).unwrap();
    }
    dir
}

#[test]
fn no_newuidmap() {
    let project = Project::tiny(User::Ordinary);
    let path = path_with(&project, &["bwrap", "runc"]);
    // setpriv, which makes the tests' user, is found before.
    let answer = project
        .program("env")
        .arg(format!("PATH={}", path.display()))
        .arg(binary())
        .arg("--root")
        .arg(&project.root)
        .arg("build")
        .run();
    answer.code(1).says("newuidmap").says("hint: ").says("uidmap");
    one_error(&answer);
    project.assert_clean();
    project.build(&[]);
}

#[test]
fn no_subordinate_ids() {
    if !tests_are_root() {
        // Only root can be somebody without a range; the machine of `.ci/run` is root.
        return;
    }
    let project = Project::tiny(User::Root);
    // An id that no file of this machine knows.
    let dir = project.beside("theirs");
    std::os::unix::fs::chown(&dir, Some(61_234), Some(61_234)).unwrap();
    let answer = project
        .program(binary().to_str().unwrap())
        .wrap(&["setpriv", "--reuid=61234", "--regid=61234", "--clear-groups"])
        .arg("--root")
        .arg(dir.join("root"))
        .arg("build")
        .run();
    answer
        .code(1)
        .says("`61234` has no range of 6553")
        .says("`/etc/subuid`")
        .says("usermod ")
        .says("--add-subuids ")
        .says(" 61234");
    one_error(&answer);
    assert_eq!(leftovers(&dir), [""; 0]);
}

#[test]
fn no_bubblewrap() {
    for user in users() {
        let project = Project::tiny(user);
        project.build(&[]);
        assemble(&project, "touch /opt/app/x");
        // In a mount namespace, the folder of the program is empty.
        let bwrap = pipeline::cmd::find("bwrap", &std::env::var_os("PATH").unwrap())
            .expect("`bwrap` is missing: apt-get install bubblewrap")
            .canonicalize()
            .unwrap();
        let script = format!("mount --bind \"$1\" {} && shift && exec \"$@\"", bwrap.parent().unwrap().display());
        let empty = project.beside("empty");
        if user == User::Ordinary {
            // Without newuidmap there is no namespace, and both are in one folder: root shows it.
            continue;
        }
        let answer = project
            .program("unshare")
            .args(&["--mount", "sh", "-c", &script, "sh"])
            .arg(&empty)
            .arg(binary())
            .arg("--root")
            .arg(&project.root)
            .arg("build")
            .run();
        answer.code(1).says("error: `bwrap` is not installed").says("hint: apt-get install bubblewrap");
        one_error(&answer);
        project.assert_clean();
    }
}

#[test]
fn user_namespaces_refused() {
    tool("unshare", "util-linux");
    for user in users() {
        let project = Project::tiny(user);
        // The setting is per namespace: it is changed in one of ours, and no other sees it.
        let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
        let refusing = || {
            project
                .program("unshare")
                .args(&["--user", "--map-root-user", "sh", "-c", script, "sh"])
                .arg(binary())
                .arg("--root")
                .arg(&project.root)
        };
        let answer = refusing().arg("build").run();
        answer
            .code(1)
            .says("error: ")
            .says("user.max_user_namespaces is 0")
            .says("hint: ")
            .says("sysctl -w user.max_user_namespaces=");
        one_error(&answer);
        let doctor = refusing().arg("doctor").run();
        doctor.code(1).prints("user.max_user_namespaces is 0").prints("sysctl -w user.max_user_namespaces=");
        assert_eq!(leftovers(&project.root), [""; 0]);
    }
}

#[test]
fn overlays_refused() {
    for user in users() {
        let project = Project::tiny(user);
        // A store on an overlay, as in a container: the kernel refuses an upper folder there.
        let disk = project.beside("overlay");
        let script = "mkdir -p \"$1/m\" && mount -t tmpfs -o mode=0755 tmpfs \"$1\" && mkdir \"$1/l\" \"$1/u\" \"$1/w\" \"$1/m\" && mount -t overlay -o \"$3\"lowerdir=\"$1/l\",upperdir=\"$1/u\",workdir=\"$1/w\" overlay \"$1/m\" && \"$2\" --root \"$1/m/root\" build; code=$?; find \"$1/m/root/cache/work\" \"$1/m/root/store/.tmp\" -mindepth 1; exit $code";
        let namespace: (&[&str], &str) = if user == User::Root {
            (&["unshare", "--mount"], "")
        } else {
            (&["unshare", "--user", "--map-auto", "--map-root-user", "--mount"], "userxattr,")
        };
        let answer = project
            .program("sh")
            .wrap(namespace.0)
            .arg("-c")
            .arg(script)
            .arg("sh")
            .arg(&disk)
            .arg(binary())
            .arg(namespace.1)
            .run();
        answer.code(1).says("is refused: ").says("overlay").says("`--root DIR`");
        one_error(&answer);
    }
}

// --------------------------------------------------------------------------------------------- run

#[test]
fn programs_that_cannot_run() {
    for user in users() {
        let project = Project::tiny(user);
        let answer = project.pipeline(&["run", "tiny"]).run();
        answer.code(125).says("error: `tiny` is not built yet").says("hint: pipeline build tiny");
        one_error(&answer);
        project.pipeline(&["run", "nobody"]).run().code(125).says("error: ").says("`nobody`");
        project.build(&[]);
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port().to_string();
        let answer = project.pipeline(&["run", "--port", &port, "tiny"]).run();
        answer
            .code(125)
            .says(&format!("error: port {port} on 127.0.0.1 cannot be had: Address already in use"))
            .says("hint: choose another with `--port`; 0 lets the kernel choose");
        one_error(&answer);
        project.edit("pipeline.yaml", "image:", "image:\n  user: ghost");
        project.build(&[]);
        let answer = project.pipeline(&["run", "--port", "0", "tiny"]).run();
        answer.code(125).says("error: the image has no user `ghost`").says("hint: write `image.user` as UID or UID:GID");
        project.edit("pipeline.yaml", "user: ghost", "user: \"1001:0\"");
        project.build(&[]);
        let answer = project.pipeline(&["run", "--port", "0", "tiny", "--", "/no/such/program"]).run();
        answer.says("/no/such/program");
        assert!(!answer.status.success());
        project.pipeline(&["run", "--port", "0", "tiny", "--", "/bin/sh", "-c", "exit 7"]).run().code(7);
        let marker = marker(4);
        let mut running = project.pipeline(&["run", "--port", "0", "tiny", "--", "/bin/sleep", &marker]).start();
        let program = || {
            let is = |entry: &fs_err::DirEntry| {
                fs_err::read(entry.path().join("cmdline")).is_ok_and(|line| line == format!("/bin/sleep\0{marker}\0").as_bytes())
            };
            fs_err::read_dir("/proc").unwrap().flatten().find(is).and_then(|entry| entry.file_name().to_str()?.parse().ok())
        };
        wait_until("the program runs", || program().is_some());
        rustix::process::kill_process(rustix::process::Pid::from_raw(program().unwrap()).unwrap(), rustix::process::Signal::KILL)
            .unwrap();
        running.wait(Duration::from_secs(10)).code(137);
        project.assert_clean();
    }
}

#[test]
fn a_program_is_never_an_orphan() {
    for user in users() {
        let project = Project::tiny(user);
        project.build(&[]);
        let marker = marker(3);
        let script =
            format!("trap '' TERM INT HUP; (setsid sleep {marker} &); echo started; while true; do sleep {marker}; done");
        let start = || {
            let mut running = project.pipeline(&["run", "--port", "0", "tiny", "--", "/bin/sh", "-c", &script]).start();
            running.wait_for("started");
            wait_until("it sleeps", || processes(&format!("sleep {marker}")).len() >= 2);
            running
        };
        // The caller is killed: all of it goes along.
        let mut running = start();
        running.signal(libc::SIGKILL);
        running.wait(Duration::from_secs(5)).code(137);
        wait_until("the program is gone", || processes(&format!("sleep {marker}")).is_empty());
        // The next build removes what the dead one could not.
        project.build(&[]);
        project.assert_clean();
        // Asked twice, a program that does not listen is killed.
        let mut running = start();
        running.signal(libc::SIGTERM);
        std::thread::sleep(Duration::from_millis(300));
        running.signal(libc::SIGTERM);
        running.wait(Duration::from_secs(5)).code(137);
        assert_eq!(processes(&format!("sleep {marker}")), [""; 0]);
        project.assert_clean();
    }
}
