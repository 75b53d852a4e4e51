//! Bad input: each gives one clear error with a next step, the right exit code, and leaves nothing behind.
#![allow(clippy::print_stdout, reason = "what was measured and met is worth reading")]

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Answer, Project, User, me, users};
use tar::EntryType;

/// Builds, expects `code` and each text on standard error, one `error:` line, a hint, and no leftovers.
#[track_caller]
fn refused(project: &Project, code: i32, texts: &[&str]) -> Answer {
    let answer = project.pipeline(&["build"]).run();
    answer.code(code);
    for text in texts {
        answer.says(text);
    }
    let errors = answer.stderr.lines().filter(|line| line.starts_with("error: ")).count();
    assert_eq!((errors, answer.stdout.as_str()), (1, ""), "{}", answer.stderr);
    // A caret shows what to change.
    assert!(
        answer.stderr.contains("\nhint: ") || answer.stderr.contains("| ^") || answer.stderr.contains(" ^"),
        "no next step:\n{}",
        answer.stderr
    );
    project.assert_clean();
    answer
}

/// Puts `script` into `assemble`, run with `-e`.
fn assemble(project: &Project, script: &str) {
    project.write("builder/s2i/bin/assemble", format!("#!/bin/sh\nset -e\nmkdir -p /opt/app\n{script}\n"));
}

/// The only log of the step `application`.
fn log(project: &Project) -> (String, String) {
    let mut logs: Vec<_> =
        fs_err::read_dir(project.root.join("state/logs/tiny")).unwrap().map(|entry| entry.unwrap().path()).collect();
    logs.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("application-"));
    assert_eq!(logs.len(), 1, "{logs:?}");
    (logs[0].display().to_string(), fs_err::read_to_string(&logs[0]).unwrap())
}

/// Fails the test while any process has `marker` in its command line, after a moment's patience.
#[track_caller]
fn no_process(marker: &str) {
    let patience = Instant::now() + Duration::from_secs(3);
    loop {
        let found: Vec<String> = fs_err::read_dir("/proc")
            .unwrap()
            .flatten()
            .filter_map(|entry| fs_err::read(entry.path().join("cmdline")).ok())
            .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
            .filter(|line| line.contains(marker))
            .collect();
        if found.is_empty() {
            return;
        }
        assert!(Instant::now() < patience, "still there: {found:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Paths of the layer of the last step.
fn last_layer(project: &Project) -> Vec<String> {
    project.layer_paths("tiny").pop().unwrap()
}

// ------------------------------------------------------------------------------------------ files

#[test]
fn pipeline_files() {
    let cases: [(&str, &str, &[&str]); 8] = [
        ("reference: {", "name: tiny", &["error: pipeline.yaml:2:", "not valid YAML"]),
        (
            "builder: pyhton",
            "builder: ./builder",
            &[
                "error: pipeline.yaml:5:12: there is no builder `pyhton`",
                "    5 |   builder: pyhton",
                "^^^^^^",
                "hint: did you mean `python`?",
            ],
        ),
        ("builder: ./nowhere", "builder: ./builder", &["`./nowhere`"]),
        (
            "debian: trixy",
            "tar: base.tar",
            &["error: pipeline.yaml:3:11: `trixy` is not a Debian suite", "hint: did you mean `trixie`?"],
        ),
        ("tar: nowhere.tar", "tar: base.tar", &["`nowhere.tar`"]),
        ("paht: src", "path: src", &["unknown key `paht`", "hint: did you mean `path`?"]),
        ("path: ../nowhere", "path: src", &["`../nowhere`"]),
        ("deadline: soon", "deadline: 20s", &["error: pipeline.yaml:12:15:"]),
    ];
    for user in users() {
        let project = Project::tiny(user);
        let good = project.read("pipeline.yaml");
        for (new, old, texts) in cases {
            project.write("pipeline.yaml", good.replacen(old, new, 1));
            refused(&project, 2, texts);
        }
        project.write("pipeline.yaml", &good);
        project
            .pipeline(&["build", "tyni"])
            .run()
            .code(2)
            .says("error: there is no pipeline `tyni`")
            .says("hint: did you mean `tiny`?");
        fs_err::remove_file(project.path("pipeline.yaml")).unwrap();
        refused(&project, 2, &["error: there is no pipeline here", "hint: `pipeline init` writes one"]);
    }
}

#[test]
fn lock_files() {
    let project = Project::tiny(me());
    project.write("pipeline.yaml", "name: tiny\nbase: {debian: trixie}\n");
    project.write("pipeline.lock", "{\"format\": 99}");
    refused(
        &project,
        2,
        &["pipeline.lock` has format 99; this program reads format 1", "hint: use the version of pipeline that wrote it"],
    );
    project.write("pipeline.lock", "{\"format\": 1, ");
    refused(
        &project,
        2,
        &["`pipeline.lock` cannot be read", "hint: take the committed `pipeline.lock` back (`git checkout pipeline.lock`)"],
    );
}

// ---------------------------------------------------------------------------------------- network

#[test]
fn unknown_package() {
    let project = Project::empty(me());
    project.write("pipeline.yaml", "name: tiny\nbase: {debian: trixie, packages: [ca-certificats]}\n");
    refused(
        &project,
        2,
        &["error: unknown package `ca-certificats`", "hint: the nearest name to `ca-certificats` is `ca-certificates`"],
    );
}

#[test]
fn unreachable() {
    for user in users() {
        let project = Project::tiny(user);
        // Nobody listens there: the port was free a moment ago.
        let place = format!("127.0.0.1:{}", common::free_port());
        project.edit("pipeline.yaml", "path: src", &format!("git: http://{place}/x.git"));
        refused(
            &project,
            75,
            &[
                &format!("error: cannot fetch the source from `http://{place}/x.git`"),
                "caused by: cannot reach",
                "hint: check the address and the network",
            ],
        );
        project.write(
            "pipeline.yaml",
            format!(
                "name: tiny\nbase: {{debian: trixie, mirror: \"http://{place}/debian\", security_mirror: \"http://{place}/s\"}}\n"
            ),
        );
        refused(
            &project,
            75,
            &["error: an archive cannot be reached", &format!("http://{place}/debian"), "hint: the mirror is `base.mirror`"],
        );
        project.write("pipeline.yaml", format!("name: tiny\nbase: {{image: \"{place}/x/y:1\"}}\n"));
        refused(&project, 75, &[&place]);
    }
}

#[test]
fn git_references() {
    for user in users() {
        let project = Project::tiny(user);
        let repository = project.beside("repository");
        project.git_in(&repository, &["init", "-q"]);
        project.git_in(&repository, &["commit", "-q", "--allow-empty", "-m", "first"]);
        let url = format!("file://{}", repository.display());
        project.edit("pipeline.yaml", "path: src", &format!("git: {url}\n  ref: mian"));
        refused(&project, 1, &[&format!("`{url}` has no branch, tag or commit `mian`"), "hint: did you mean `main`?"]);
        project.edit("pipeline.yaml", "ref: mian", "ref: main\n  dir: sub");
        refused(
            &project,
            1,
            &["there is no folder `sub` in commit", "hint: `source.dir` is relative to the top of the repository"],
        );
        project.edit("pipeline.yaml", &url, &format!("{url}-not"));
        refused(&project, 1, &[&format!("there is no repository `{url}-not`"), "hint: check `source.git`"]);
    }
}

// ----------------------------------------------------------------------------------------- source

#[test]
fn sources_that_hold_more_than_files() {
    for user in users() {
        let project = Project::tiny(user);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            project.path("src/pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o644),
            0,
        )
        .unwrap();
        refused(&project, 1, &["error: source holds a FIFO `pipe`", "hint: remove it or list `pipe` in .s2iignore"]);
        fs_err::remove_file(project.path("src/pipe")).unwrap();
        let socket = std::os::unix::net::UnixListener::bind(project.path("src/sock")).unwrap();
        refused(&project, 1, &["error: source holds a socket `sock`", "hint: remove it or list `sock` in .s2iignore"]);
        project.write("src/.s2iignore", "sock\n");
        project.build(&[]);
        drop(socket);
        fs_err::remove_file(project.path("src/sock")).unwrap();
        project.write("src/version.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n");
        refused(&project, 1, &["`version.bin` of the source is a Git LFS pointer", "hint: run `git lfs pull`"]);
    }
}

#[test]
fn strange_names_and_links_are_fine() {
    use std::os::unix::ffi::OsStrExt as _;
    for user in users() {
        let project = Project::tiny(user);
        project.link("src/a", "b");
        project.link("src/b", "a");
        project.link("src/self", "self");
        project.link("src/up", "../../../../../../etc/passwd");
        project.write("src/-rf *\n\u{1b}[31m", "x");
        let name = std::ffi::OsStr::from_bytes(b"n\xff\xfe");
        fs_err::write(project.path("src").join(name), "x").unwrap();
        let built = project.build(&[]);
        project.assert_clean();
        let paths = last_layer(&project);
        for name in ["a", "b", "self", "up", "-rf *\n\u{1b}[31m", "n\u{fffd}\u{fffd}"] {
            assert!(paths.contains(&format!("opt/app/{name}")), "{name:?}: {paths:?}");
        }
        let target = project.pipeline(&["run", "--port", "0", "tiny", "--", "/bin/readlink", "/opt/app/up"]).ok();
        assert_eq!(target.stdout, "../../../../../../etc/passwd\n");
        assert_eq!(project.build(&[]).digest, built.digest);
    }
}

/// Highest memory (bytes, VmHWM) of the processes of the program under test that a build has.
fn watch_memory(pid: i32, peak: &mut u64) {
    for entry in fs_err::read_dir("/proc").unwrap().flatten() {
        let Ok(status) = fs_err::read_to_string(entry.path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        let is_ours = field("Pid").and_then(|text| text.parse().ok()) == Some(pid)
            || (field("Name").is_some_and(|name| name.starts_with("pipeline")) && is_below(&entry.path(), pid));
        if let Some(size) = field("VmHWM").filter(|_| is_ours).and_then(|text| text.split(' ').next()?.parse::<u64>().ok()) {
            *peak = (*peak).max(size * 1024);
        }
    }
}

fn is_below(process: &Path, ancestor: i32) -> bool {
    let mut dir = process.to_path_buf();
    for _ in 0..10 {
        let Ok(status) = fs_err::read_to_string(dir.join("status")) else { return false };
        let Some(parent) =
            status.lines().find_map(|line| line.strip_prefix("PPid:")).and_then(|text| text.trim().parse::<i32>().ok())
        else {
            return false;
        };
        if parent == ancestor {
            return true;
        }
        dir = Path::new("/proc").join(parent.to_string());
    }
    false
}

#[test]
fn a_sparse_file_of_5_gb() {
    let project = Project::tiny(me());
    let file = fs_err::File::create(project.path("src/sparse")).unwrap();
    file.set_len(5_000_000_000).unwrap();
    assemble(&project, "test $(stat -c %s /tmp/src/sparse) = 5000000000\ntruncate -s 1000000000 /opt/app/sparse");
    let mut running = project.pipeline(&["build"]).start();
    let mut peak = 0;
    while !running.is_over() {
        watch_memory(running.pid(), &mut peak);
        std::thread::sleep(Duration::from_millis(20));
    }
    running.wait(Duration::from_secs(1)).code(0);
    println!("5 GB sparse file: at most {} MB in one process", peak / 1_000_000);
    assert!(peak > 1_000_000 && peak < 200_000_000, "{peak} bytes");
    project.assert_clean();
    let size: u64 = fs_err::read_dir(project.root.join("store/blobs/sha256"))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(size < 20_000_000, "the layers take {size} bytes");
    let stored = project.program("du").args(&["-s", "--block-size=1"]).arg(&project.root).ok().stdout;
    let stored: u64 = stored.split_whitespace().next().unwrap().parse().unwrap();
    assert!(stored < 100_000_000, "the store takes {stored} bytes: holes were filled");
}

#[test]
fn unreadable_files() {
    let project = Project::tiny(User::Ordinary);
    project.write("src/private", "x");
    project.mode("src/private", 0);
    refused(
        &project,
        1,
        &["cannot read `private` of the source", "Permission denied", "hint: make it readable, or list `private` in .s2iignore"],
    );
    project.write("src/.s2iignore", "private\n");
    project.build(&[]);
}

// --------------------------------------------------------------------------------------- tar base

/// Name, kind, content or target, uid.
type TarEntry<'a> = (&'a str, EntryType, &'a str, u64);

/// A tar with names as given, however bad.
fn archive(entries: &[TarEntry<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, kind, data, uid) in entries {
        let link = matches!(kind, EntryType::Symlink | EntryType::Link);
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_size(if link { 0 } else { data.len() as u64 });
        header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
        header.set_uid(*uid);
        header.set_gid(0);
        header.set_mtime(0);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        if link {
            header.as_old_mut().linkname[..data.len()].copy_from_slice(data.as_bytes());
        }
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        if !link {
            bytes.extend_from_slice(data.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

#[test]
fn tar_bases() {
    use EntryType::{Block, Char, Directory, Link, Regular, Symlink};
    for user in users() {
        let project = Project::empty(user);
        // What must not be touched; short, for the old header's 100 bytes.
        let outside = project.beside("o");
        fs_err::write(outside.join("victim"), "innocent").unwrap();
        let place = outside.to_str().unwrap();
        let (absolute, dotted, out_link) =
            (format!("{place}/new"), format!("a/../../../../../../..{place}/new"), format!("../../../../../../..{place}"));
        let victim = format!("{place}/victim");
        project.write("pipeline.yaml", "name: tiny\nbase: {tar: base.tar}\n");
        let good: [(Vec<TarEntry<'_>>, Vec<String>, &str); 3] = [
            (vec![(&absolute, Regular, "x", 0), ("/x", Regular, "x", 0)], vec!["x".into()], ""),
            (
                vec![("d/", Directory, "", 0), ("d/null", Char, "", 0), ("sda", Block, "", 0), ("ok", Regular, "x", 7)],
                vec!["d".into(), "ok".into()],
                "warning: step `base`: device nodes and sockets do not go into a layer and were left out: d/null, sda",
            ),
            (vec![("l", Symlink, place, 0), ("x", Regular, "x", 0)], vec!["l".into(), "x".into()], ""),
        ];
        for (entries, paths, says) in good {
            project.write("base.tar", archive(&entries));
            project.pipeline(&["build"]).ok().says(says);
            let mut found = last_layer(&project);
            // What lies in the tree's own /tmp is of the moment.
            found.retain(|path| path != "tmp");
            assert_eq!(found, paths);
            project.assert_clean();
        }
        let bad: [(Vec<TarEntry<'_>>, &str, &str); 7] = [
            (vec![(&dotted, Regular, "x", 0)], "leads out of its tree", "hint: make the archive of a whole root file system"),
            (vec![("../x", Regular, "x", 0)], "the archive names `../x`, which leads out of its tree", "hint: make"),
            (vec![("h", Link, &victim, 0)], "which is not in the archive", "hint: make"),
            (vec![("h", Link, &dotted, 0)], "leads out of its tree", "hint: make"),
            (
                vec![("l", Symlink, place, 0), ("l/new", Regular, "x", 0)],
                "`l` is a symbolic link to nothing in the archive",
                "hint: make",
            ),
            (vec![("l", Symlink, &out_link, 0), ("h", Link, "l/victim", 0)], "which is not in the archive", "hint: make"),
            (vec![("big", Regular, "x", 65_536)], "caused by: owner 65536 is over 65535", "hint: give it to a lower id"),
        ];
        for (entries, text, hint) in bad {
            project.write("base.tar", archive(&entries));
            refused(&project, 1, &["error: cannot unpack the base `", text, hint]);
        }
        let whole = common::tiny_base();
        let broken: [(Vec<u8>, &str); 6] = [
            (whole[..1_000_000].to_vec(), "the archive is broken: unexpected EOF"),
            (whole[..700].to_vec(), "the archive is broken: failed to read entire block"),
            (archive(&[("x", Regular, "x", 0)])[..1024].to_vec(), "the archive is broken: its end is missing"),
            (Vec::new(), "the archive is broken: it is empty"),
            (b"no tar at all \x1b[31m".repeat(100), "the archive is broken: "),
            (zstd::encode_all(whole, 1).unwrap()[..300_000].to_vec(), "the archive is broken: incomplete frame"),
        ];
        for (bytes, text) in broken {
            project.write("base.tar", bytes);
            let answer = refused(&project, 1, &[text, "hint: is it a whole tar file"]);
            assert!(!answer.stderr.contains('\x1b'), "{}", answer.stderr);
        }
        let left: Vec<_> = fs_err::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["victim"]);
        assert_eq!(fs_err::read_to_string(&victim).unwrap(), "innocent");
        assert_eq!(std::os::unix::fs::MetadataExt::nlink(&fs_err::metadata(&victim).unwrap()), 1);
    }
}

// ------------------------------------------------------------------------------------------ steps

#[test]
fn a_failing_script() {
    for user in users() {
        let project = Project::tiny(user);
        assemble(&project, "i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo line $i; done; echo last words >&2; exit 42");
        let answer = refused(
            &project,
            1,
            &[
                "error: step `application` of `tiny` failed: `assemble` exited with status 42; its last lines:\n  | line 72\n",
                "  | line 100\n  | last words\n",
                "hint: `pipeline build tiny --shell`",
            ],
        );
        answer.says_not("| line 71\n");
        let (path, text) = log(&project);
        answer.says(&format!("hint: the whole log is {path}"));
        let mut expected: Vec<String> = (1..=100).map(|i| format!("line {i}")).collect();
        expected.push("last words".into());
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
        // A line without an end and bytes that are no text are told too.
        assemble(&project, "printf 'no end \\377'; kill -9 $$");
        refused(&project, 1, &["`assemble` exited with status 137", "  | no end \u{fffd}"]);
        project.write("builder/s2i/bin/dependencies", "#!/bin/nothing\n");
        refused(&project, 1, &["step `dependencies` of `tiny` failed", "hint: the whole log is"]);
    }
}

#[test]
fn a_hanging_script() {
    for user in users() {
        let project = Project::tiny(user);
        project.edit("pipeline.yaml", "image:", "build: { timeout: 1s }\nimage:");
        // Seconds to sleep that nobody else has.
        let marker = format!("98{}{}", std::process::id(), i32::from(user == User::Root));
        assemble(
            &project,
            &format!(
                "(setsid sh -c 'trap \"\" TERM HUP INT; sleep {marker} & sleep {marker}' &)\ntrap '' TERM\necho started\nsleep {marker}"
            ),
        );
        let started = Instant::now();
        refused(
            &project,
            1,
            &[
                "failed: `assemble` did not end within 1 s; its last lines:\n  | started",
                "hint: `build.timeout` sets how long a step may take",
                "hint: the whole log is",
            ],
        );
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
        no_process(&format!("sleep {marker}"));
        // What a script that succeeds leaves running is ended with its step.
        assemble(&project, &format!("(setsid sh -c 'sleep {marker} & sleep {marker}' &)\ntouch /opt/app/done"));
        project.build(&[]);
        no_process(&format!("sleep {marker}"));
        project.assert_clean();
    }
}

#[test]
fn what_must_not_be_in_a_layer() {
    for user in users() {
        let project = Project::tiny(user);
        let key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW\n-----END OPENSSH PRIVATE KEY-----\n";
        project.write("src/key", key);
        assemble(&project, "mkdir -p /etc/ssh; cp /tmp/src/key /etc/ssh/ssh_host_ed25519_key");
        refused(
            &project,
            1,
            &[
                "error: cannot pack the layer of step `application`",
                "`/etc/ssh/ssh_host_ed25519_key` must not be in a layer: an OpenSSH private key",
                "hint: every machine made from the image would share it",
            ],
        );
        // Made by tools everywhere, and emptied by the written list of what moves.
        assemble(
            &project,
            "echo 0123456789abcdef0123456789abcdef > /etc/machine-id; mkdir -p /var/lib/systemd; head -c 512 /dev/urandom > /var/lib/systemd/random-seed",
        );
        let answer = project.pipeline(&["build"]).run();
        if answer.status.success() {
            let layers = project.json(&["artifact", "show", "tiny"]);
            for layer in layers["layers"].as_array().unwrap() {
                for (path, content) in project.layer(layer["digest"].as_str().unwrap()) {
                    assert!(
                        !(path == "etc/machine-id" || path.ends_with("random-seed")) || content.is_empty(),
                        "{path} is in the layer"
                    );
                }
            }
        } else {
            answer.code(1).says("must not be in a layer");
        }
        project.assert_clean();
    }
}

#[test]
fn devices_sockets_and_owners() {
    for user in users() {
        let project = Project::tiny(user);
        assemble(
            &project,
            "ln -s /opt/app/sock /dev/log; syslogd; i=0; while [ ! -S /opt/app/sock ] && [ $i -lt 50 ]; do sleep 0.1; i=$((i+1)); done; mkfifo /opt/app/fifo",
        );
        project
            .pipeline(&["build"])
            .ok()
            .says("warning: step `application`: device nodes and sockets do not go into a layer and were left out: opt/app/sock");
        let paths = last_layer(&project);
        assert!(paths.contains(&"opt/app/fifo".into()) && !paths.contains(&"opt/app/sock".into()), "{paths:?}");
        // The kernel makes no device nodes in a user namespace, whoever asks.
        assemble(&project, "mknod /opt/app/null c 1 3");
        refused(&project, 1, &["mknod: /opt/app/null: Operation not permitted"]);
        assemble(&project, "touch /opt/app/big; chown 65536 /opt/app/big");
        refused(&project, 1, &["chown: /opt/app/big: Invalid argument"]);
        assemble(&project, "touch /opt/app/big; chown 65535:65535 /opt/app/big");
        project.build(&[]);
        project.assert_clean();
    }
}

#[test]
fn limits() {
    let cases = [
        ("memory: 32M", "dd if=/dev/zero of=/dev/null bs=128M count=1", vec!["step `application` of `tiny` failed"]),
        ("processes: 10", "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do sleep 2 & done; wait", vec!["fork"]),
        (
            "file_size: 1M",
            "dd if=/dev/zero of=/opt/app/big bs=64k count=32",
            vec!["status 153", "hint: it may have hit `build.limits.file_size`"],
        ),
    ];
    for user in users() {
        let project = Project::tiny(user);
        let good = project.read("pipeline.yaml");
        for (limit, script, texts) in &cases {
            assemble(&project, script);
            project.write("pipeline.yaml", &good);
            project.build(&[]);
            project.edit("pipeline.yaml", "image:", &format!("build: {{ limits: {{ {limit} }} }}\nimage:"));
            refused(&project, 1, texts);
        }
    }
    for entry in fs_err::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        assert!(!entry.file_name().to_string_lossy().starts_with("pipeline-step-"), "{}", entry.path().display());
    }
}

// ---------------------------------------------------------------------------------------- secrets

const SECRET: &str = "s3cr3t-v4lue-of-T0KEN";

/// Every file of the store that holds the secret.
fn places_of_secret(project: &Project) -> Vec<String> {
    let mut found = Vec::new();
    for entry in ignore::WalkBuilder::new(&project.root)
        .standard_filters(false)
        .build()
        .flatten()
        .filter(|entry| entry.file_type().is_some_and(|kind| kind.is_file()))
    {
        let bytes = fs_err::read(entry.path()).unwrap_or_default();
        if bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes()) {
            found.push(entry.path().display().to_string());
        }
    }
    found
}

fn with_secret(user: User) -> Project {
    let project = Project::tiny(user);
    project.edit("pipeline.yaml", "image:", "build: { secrets: [ { id: token, env: TOKEN } ] }\nimage:");
    project
}

#[test]
fn secrets_that_are_printed_are_masked() {
    for user in users() {
        let project = with_secret(user);
        // All that a step can see of others' command lines, and the value in every guise.
        assemble(
            &project,
            "cat /run/secrets/token; echo; echo \"$(cat /run/secrets/token) and more\" >&2\nbase64 /run/secrets/token\nod -An -v -tx1 /run/secrets/token | tr -d ' \\n'; echo\necho \"TOKEN=$TOKEN.\" file $TOKEN_FILE\nfor f in /proc/[0-9]*/cmdline /proc/[0-9]*/environ; do tr '\\0' ' ' < $f; echo; done\nsleep 0.5",
        );
        let mut running = project.pipeline(&["build", "--verbose"]).env("TOKEN", SECRET).start();
        let mut seen = Vec::new();
        while !running.is_over() {
            for entry in fs_err::read_dir("/proc").unwrap().flatten() {
                let line = fs_err::read(entry.path().join("cmdline")).unwrap_or_default();
                if line.windows(SECRET.len()).any(|window| window == SECRET.as_bytes()) {
                    seen.push(String::from_utf8_lossy(&line).into_owned());
                }
            }
        }
        let answer = running.wait(Duration::from_secs(1));
        answer
            .code(0)
            .says("application: ***\n")
            .says("application: *** and more\n")
            .says("application: TOKEN=. file /run/secrets/token\n");
        assert_eq!(seen, Vec::<String>::new());
        let encoded = base64::Engine::encode(&base64::engine::general_purpose::STANDARD_NO_PAD, SECRET);
        let (_, log) = log(&project);
        for form in [SECRET, &encoded[..encoded.len() - 2], &hex::encode(SECRET)] {
            assert!(!log.contains(form) && !answer.stderr.contains(form), "`{form}` is printed:\n{log}");
        }
        assert!(log.contains("bwrap"), "the step saw no command lines:\n{log}");
        assert_eq!(places_of_secret(&project), Vec::<String>::new());
        project.assert_clean();
        // Nothing changed, nothing run; another value is another input.
        assert_eq!(common::built(&project.pipeline(&["build", "--json"]).env("TOKEN", SECRET).ok()).ran, [""; 0]);
        project
            .pipeline(&["build"])
            .env("TOKEN", "another value")
            .ok()
            .says("application: running, because secret `token` changed");
    }
}

#[test]
fn secrets_that_are_stored_fail_the_layer() {
    let cases = [
        (
            "cat /run/secrets/token > /opt/app/x",
            "error: cannot pack the layer of step `application`\n  caused by: the value of secret `token` is in `/opt/app/x` of the layer",
        ),
        ("base64 /run/secrets/token > /opt/app/x", "is in `/opt/app/x` of the layer"),
        ("(printf a; cat /run/secrets/token) | base64 > /opt/app/x", "is in `/opt/app/x` of the layer"),
        ("(printf ab; cat /run/secrets/token) | base64 > /opt/app/x", "is in `/opt/app/x` of the layer"),
        ("(head -c 262140 /dev/zero; cat /run/secrets/token) > /opt/app/x", "is in `/opt/app/x` of the layer"),
        ("cp -r /run/secrets /opt/app/s", "is in `/opt/app/s/token` of the layer"),
        ("touch /opt/app/$(cat /run/secrets/token)", "is in the name, the link target or an xattr of `/opt/app/***`"),
        ("mkdir /opt/app/x$(cat /run/secrets/token)", "is in the name, the link target or an xattr of `/opt/app/x***/`"),
        (
            "ln -s https://$(cat /run/secrets/token)@host /opt/app/l",
            "is in the name, the link target or an xattr of `/opt/app/l`",
        ),
    ];
    for user in users() {
        let project = with_secret(user);
        for (script, text) in cases {
            assemble(&project, script);
            let answer = project.pipeline(&["build"]).env("TOKEN", SECRET).run();
            answer.code(1).says(text).says("hint: a secret is there as the file `/run/secrets/ID`").says_not(SECRET);
            project.assert_clean();
            assert_eq!(places_of_secret(&project), Vec::<String>::new(), "{script}");
        }
        // Written into the pipeline file as well, it is kept out of the configuration.
        assemble(&project, "true");
        project.edit("pipeline.yaml", "image:", &format!("image:\n  labels: {{ a: \"x {SECRET}\" }}"));
        let answer = project.pipeline(&["build"]).env("TOKEN", SECRET).run();
        answer
            .code(1)
            .says("error: the value of secret `token` is in the image's configuration")
            .says("hint: take it out of")
            .says_not(SECRET);
        assert_eq!(places_of_secret(&project), Vec::<String>::new());
    }
}

#[test]
fn secrets_that_are_missing() {
    for user in users() {
        let project = with_secret(user);
        refused(&project, 2, &["error: secret `token`: the variable `TOKEN` is not set", "hint: export TOKEN=… before building"]);
        let answer = project.pipeline(&["build"]).env("TOKEN", "abc").run();
        answer.code(2).says("error: secret `token` is shorter than 4 bytes");
        project.edit("pipeline.yaml", "env: TOKEN", "file: token.txt");
        refused(&project, 2, &["error: secret `token` cannot be read", "token.txt"]);
        project.write("token.txt", format!("{SECRET}\n"));
        assemble(&project, &format!("test \"$(cat /run/secrets/token)\" = {}\"{}\"", &SECRET[..4], &SECRET[4..]));
        assemble(
            &project,
            "test -s /run/secrets/token; test ! -w /run/secrets/token || ! touch /run/secrets/token; wc -c < /run/secrets/token",
        );
        project.build(&[]);
        assert_eq!(places_of_secret(&project), Vec::<String>::new());
        let key = project.root.join("state/hmac.key");
        assert_eq!(fs_err::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
