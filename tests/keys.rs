//! What makes which step run again, and what does not: one change after the other on a small
//! project, with what has to run and what `explain` has to say before and after the build.

mod common;

use common::{Project, Run, me, tiny_base, users};

const BASE: &str = "base: tar file changed";
const BASE_BELOW: &str = "dependencies: step `base` below it changed";
const DEPENDENCIES_BELOW: &str = "application: step `dependencies` below it changed";
const APPLICATION_BELOW: &str = "configure-1: step `application` below it changed";

/// `tiny` with a variable, a secret, a configure step, a link and a variable for the program.
fn project(user: common::User) -> Project {
    let project = Project::tiny(user);
    let file = project.read("pipeline.yaml");
    project.write("pipeline.yaml", format!("{file}  env: {{ GREETING: hello }}\nbuild:\n  env: {{ MODE: a }}\n  secrets: [{{ id: token, env: TOKEN }}]\nconfigure:\n  - shell: configure/tune.sh\n"));
    project.write("configure/tune.sh", "echo tuned > /etc/tuned\n");
    project.link("src/link", "index.html");
    project.write("src/.s2i/environment", "COLOUR=red\n");
    project
}

/// The program with the secret's value.
fn run(project: &Project, token: &str, args: &[&str]) -> Run {
    project.pipeline(args).env("TOKEN", token)
}

fn build(project: &Project, token: &str) -> common::Built {
    common::built(&run(project, token, &["build", "--json"]).ok())
}

fn explain(project: &Project, token: &str) -> Vec<String> {
    let value = run(project, token, &["explain", "--json"]).ok().json();
    let mut reasons = Vec::new();
    for step in value["steps"].as_array().unwrap() {
        for change in step["changes"].as_array().unwrap() {
            reasons.push(format!("{}: {}", step["step"].as_str().unwrap(), change.as_str().unwrap()));
        }
    }
    reasons
}

struct Case {
    name: &'static str,
    change: fn(&Project),
    /// The steps that run; all above the first one.
    from: Option<&'static str>,
    reasons: &'static [&'static str],
}

const STEPS: [&str; 4] = ["base", "dependencies", "application", "configure-1"];

const CASES: &[Case] = &[
    Case {
        name: "one byte, size and mtime as before",
        change: |project| project.edit_stealthily("src/index.html", "tiny", "TINY"),
        from: Some("application"),
        reasons: &["application: file `index.html` changed", APPLICATION_BELOW],
    },
    Case {
        name: "a mode",
        change: |project| project.mode("src/index.html", 0o755),
        from: Some("application"),
        reasons: &["application: file `index.html` changed its mode", APPLICATION_BELOW],
    },
    Case {
        name: "a link's target",
        change: |project| project.link("src/link", "lock.txt.html"),
        from: Some("application"),
        reasons: &["application: file `link` points elsewhere", APPLICATION_BELOW],
    },
    Case {
        name: "an xattr",
        change: |project| xattr::set(project.path("src/index.html"), "user.origin", b"here").unwrap(),
        from: Some("application"),
        reasons: &["application: file `index.html` changed its xattrs", APPLICATION_BELOW],
    },
    Case {
        name: "a new file, one that is gone",
        change: |project| {
            project.write("src/new.html", "new");
            fs_err::remove_file(project.path("src/link")).unwrap();
        },
        from: Some("application"),
        reasons: &["application: file `link` is gone", "application: file `new.html` is new", APPLICATION_BELOW],
    },
    Case {
        name: "a file becomes a folder",
        change: |project| {
            fs_err::remove_file(project.path("src/new.html")).unwrap();
            project.write("src/new.html/inner", "new");
        },
        from: Some("application"),
        reasons: &[
            "application: file `new.html` is of another kind",
            "application: file `new.html/inner` is new",
            APPLICATION_BELOW,
        ],
    },
    Case {
        name: "the builder's assemble",
        change: |project| project.edit_stealthily("builder/s2i/bin/assemble", "echo assembled", "echo ASSEMBLED"),
        from: Some("application"),
        reasons: &["application: builder script `assemble` changed", APPLICATION_BELOW],
    },
    Case {
        name: "the builder's run, which is in the application layer",
        change: |project| project.edit("builder/s2i/bin/run", "httpd -f", "/bin/httpd -f"),
        from: Some("application"),
        reasons: &["application: builder script `run` changed", APPLICATION_BELOW],
    },
    Case {
        name: "the builder's dependencies",
        change: |project| project.edit("builder/s2i/bin/dependencies", "mkdir -p", "mkdir  -p"),
        from: Some("dependencies"),
        reasons: &["dependencies: builder script `dependencies` changed", DEPENDENCIES_BELOW, APPLICATION_BELOW],
    },
    Case {
        name: "a script of the source's own",
        change: |project| {
            project.write_script("src/.s2i/bin/assemble", "#!/bin/sh\nmkdir -p /opt/app\ncp -r /tmp/src/. /opt/app\necho own\n")
        },
        from: Some("application"),
        reasons: &["application: file `.s2i/bin/assemble` is new", "application: file `.s2i/bin` is new", APPLICATION_BELOW],
    },
    Case {
        name: "a lock file",
        change: |project| project.edit_stealthily("src/lock.txt", "1.0", "1.1"),
        from: Some("dependencies"),
        reasons: &[
            "dependencies: file `lock.txt` changed",
            "application: file `lock.txt` changed",
            DEPENDENCIES_BELOW,
            APPLICATION_BELOW,
        ],
    },
    Case {
        name: "a variable of the build",
        change: |project| project.edit("pipeline.yaml", "MODE: a", "MODE: b"),
        from: Some("dependencies"),
        reasons: &[
            "dependencies: variable `MODE` changed from `a` to `b`",
            "application: variable `MODE` changed from `a` to `b`",
            DEPENDENCIES_BELOW,
            "configure-1: variable `MODE` changed from `a` to `b`",
            APPLICATION_BELOW,
        ],
    },
    Case {
        name: "a variable of the builder",
        change: |project| project.edit("builder/builder.yaml", "port: 8080", "port: 8080\nenv: { LEVEL: \"1\" }"),
        from: Some("dependencies"),
        reasons: &[
            "dependencies: builder variable `LEVEL` is new",
            "application: builder variable `LEVEL` is new",
            DEPENDENCIES_BELOW,
            APPLICATION_BELOW,
        ],
    },
    Case {
        name: "a variable of .s2i/environment",
        change: |project| project.edit("src/.s2i/environment", "red", "blue"),
        from: Some("application"),
        reasons: &[
            "application: file `.s2i/environment` changed",
            "application: s2i variable `COLOUR` changed from `red` to `blue`",
            APPLICATION_BELOW,
        ],
    },
    Case {
        name: "the configure script",
        change: |project| project.edit("configure/tune.sh", "tuned >", "TUNED >"),
        from: Some("configure-1"),
        reasons: &["configure-1: shell script changed"],
    },
    Case {
        name: "the configure script may be executed",
        change: |project| {
            project.write("configure/tune.sh", "#!/bin/sh\necho TUNED > /etc/tuned\n");
            project.mode("configure/tune.sh", 0o755);
        },
        from: Some("configure-1"),
        reasons: &["configure-1: shell script changed"],
    },
    Case {
        name: "the network of the build",
        change: |project| project.edit("pipeline.yaml", "build:\n", "build:\n  network: host\n"),
        from: Some("application"),
        reasons: &[
            "application: network changed from `none` to `host`",
            "configure-1: network changed from `none` to `host`",
            APPLICATION_BELOW,
        ],
    },
    Case {
        name: "limits",
        change: |project| project.edit("pipeline.yaml", "build:\n", "build:\n  limits: { processes: 500 }\n"),
        from: Some("dependencies"),
        reasons: &[
            "dependencies: limits is new",
            "application: limits is new",
            DEPENDENCIES_BELOW,
            "configure-1: limits is new",
            APPLICATION_BELOW,
        ],
    },
    Case {
        name: "the base",
        change: |project| {
            // Two blocks of zeros end a tar: more of them are other bytes and the same tree.
            let mut bytes = tiny_base().to_vec();
            bytes.extend([0; 1024]);
            project.write("base.tar", bytes);
        },
        from: Some("base"),
        reasons: &[BASE, BASE_BELOW, DEPENDENCIES_BELOW, APPLICATION_BELOW],
    },
    Case {
        name: "the compression of layers",
        change: |project| project.edit("pipeline.yaml", "image:\n", "image:\n  compression: gzip\n"),
        from: Some("base"),
        reasons: &[
            "base: compression changed from `zstd` to `gzip`",
            "dependencies: compression changed from `zstd` to `gzip`",
            BASE_BELOW,
            "application: compression changed from `zstd` to `gzip`",
            DEPENDENCIES_BELOW,
            "configure-1: compression changed from `zstd` to `gzip`",
            APPLICATION_BELOW,
        ],
    },
    Case { name: "an mtime", change: |project| set_old(project, "src/index.html"), from: None, reasons: &[] },
    Case { name: "an mtime of the base", change: |project| set_old(project, "base.tar"), from: None, reasons: &[] },
    Case {
        name: "bits of a mode that are the umask's",
        change: |project| {
            for (name, mode) in [
                ("src/index.html", 0o700),
                ("src/lock.txt", 0o664),
                ("src", 0o775),
                ("configure/tune.sh", 0o700),
                ("builder/s2i/bin/assemble", 0o600),
                ("pipeline.yaml", 0o600),
            ] {
                project.mode(name, mode);
            }
        },
        from: None,
        reasons: &[],
    },
    Case {
        name: "a file of the builder that is no script",
        change: |project| project.write("builder/README.md", "about"),
        from: None,
        reasons: &[],
    },
    Case {
        name: "a comment in the pipeline file",
        change: |project| project.edit("pipeline.yaml", "name: tiny", "# a comment\nname:   tiny"),
        from: None,
        reasons: &[],
    },
    Case { name: "a file beside the source", change: |project| project.write("notes.txt", "beside"), from: None, reasons: &[] },
    Case {
        name: "the timeout of a step",
        change: |project| project.edit("pipeline.yaml", "build:\n", "build:\n  timeout: 5m\n"),
        from: None,
        reasons: &[],
    },
];

fn set_old(project: &Project, name: &str) {
    let file = fs_err::OpenOptions::new().write(true).open(project.path(name)).unwrap();
    file.into_parts().0.set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(86_400)).unwrap();
}

#[test]
fn each_change_runs_the_right_steps_and_explain_names_it() {
    for user in users() {
        let project = project(user);
        assert_eq!(explain(&project, "s3cret-1"), STEPS.map(|step| format!("{step}: it was never built")), "{user:?}");
        let mut last = build(&project, "s3cret-1");
        assert_eq!(last.ran, STEPS, "{user:?}");
        assert_eq!(build(&project, "s3cret-1").ran, [""; 0], "{user:?}: nothing changed");
        for case in CASES {
            let told = explain(&project, "s3cret-1");
            (case.change)(&project);
            let what = format!("{} ({user:?})", case.name);
            let expected: Vec<&str> =
                case.from.map_or(vec![], |from| STEPS[STEPS.iter().position(|step| *step == from).unwrap()..].to_vec());
            if case.from.is_some() {
                assert_same(&explain(&project, "s3cret-1"), case.reasons, &format!("{what}, before the build"));
            }
            let now = build(&project, "s3cret-1");
            assert_eq!(now.ran, expected, "{what}");
            // What ran last stays what is explained.
            if case.from.is_some() {
                assert_same(&explain(&project, "s3cret-1"), case.reasons, &format!("{what}, after the build"));
            } else {
                assert_eq!(explain(&project, "s3cret-1"), told, "{what}");
                assert_eq!(now.digest, last.digest, "{what}");
            }
            last = now;
        }
        project.assert_clean();
    }
}

#[track_caller]
fn assert_same(found: &[String], expected: &[&str], what: &str) {
    let mut found: Vec<&str> = found.iter().map(String::as_str).collect();
    let mut expected = expected.to_vec();
    found.sort_unstable();
    expected.sort_unstable();
    assert_eq!(found, expected, "{what}");
}

#[test]
fn what_only_the_configuration_holds_runs_nothing_and_changes_the_digest() {
    let project = project(me());
    let mut seen = vec![build(&project, "s3cret-1").digest];
    let edits = [
        ("GREETING: hello", "GREETING: bye"),
        ("  port: 8080\n", "  port: 8080\n  labels: { a: b }\n"),
        ("  port: 8080\n", "  port: 8081\n"),
        ("image:\n", "image:\n  command: [/bin/true]\n"),
        ("image:\n", "image:\n  workdir: /opt\n"),
        ("image:\n", "image:\n  user: \"1002\"\n"),
        ("image:\n", "image:\n  volumes: [/data]\n"),
        ("http: /", "http: /x"),
    ];
    for (old, new) in edits {
        project.edit("pipeline.yaml", old, new);
        let now = build(&project, "s3cret-1");
        assert_eq!(now.ran, [""; 0], "{new}");
        assert!(!seen.contains(&now.digest), "{new}: the image is the same");
        seen.push(now.digest);
    }
}

#[test]
fn a_rotated_secret_runs_its_steps_again_and_is_told_by_its_name_only() {
    for user in users() {
        let project = project(user);
        let first = build(&project, "s3cret-1");
        assert_eq!(build(&project, "s3cret-1").ran, [""; 0]);
        let reasons = [
            "dependencies: secret `token` changed",
            "application: secret `token` changed",
            DEPENDENCIES_BELOW,
            "configure-1: secret `token` changed",
            APPLICATION_BELOW,
        ];
        assert_same(&explain(&project, "s3cret-2"), &reasons, "another value");
        let second = build(&project, "s3cret-2");
        assert_eq!(second.ran, &STEPS[1..]);
        // The value leaves no trace: the same image from other values.
        assert_eq!(first.digest, second.digest);
        run(&project, "", &["build"]).run().code(2).says("secret `token` is shorter than 4 bytes");
        project.pipeline(&["build"]).run().code(2).says("the variable `TOKEN` is not set");
        let hay = Run::new(user, "grep", &project.home, &project.root).args(&["-r", "-l", "-a", "s3cret-", "."]).run();
        hay.code(1);
        assert_eq!(hay.stdout, "", "a secret's value is in the store");
    }
}

#[test]
fn who_builds_where_and_when_runs_nothing() {
    for user in users() {
        let mut project = project(user);
        let first = build(&project, "s3cret-1");
        let again = |project: &Project, how: &str, run: Run| {
            let now = common::built(&run.ok());
            assert_eq!((now.ran.len(), &now.digest), (0, &first.digest), "{how} ({user:?})");
            project.assert_clean();
        };
        let args = ["build", "--json"];
        again(&project, "umask 077", run(&project, "s3cret-1", &args).wrap(&["sh", "-c", "umask 077; exec \"$@\"", "sh"]));
        again(&project, "from a sub-folder", run(&project, "s3cret-1", &args).dir(project.path("src")));
        again(
            &project,
            "by the file's name",
            run(&project, "s3cret-1", &["build", "--json", "../pipeline.yaml"]).dir(project.path("src")),
        );
        again(
            &project,
            "other variables",
            run(&project, "s3cret-1", &args)
                .env("LANG", "de_DE.UTF-8")
                .env("TZ", "Asia/Tokyo")
                .env("MODE", "z")
                .env("COLOUR", "z")
                .env("HOSTNAME", "z"),
        );
        common::tool("faketime", "faketime");
        again(&project, "two years later", run(&project, "s3cret-1", &args).wrap(&["faketime", "-f", "+730d"]));
        let moved = project.dir.with_file_name("moved");
        fs_err::rename(&project.dir, &moved).unwrap();
        project.dir = moved;
        again(&project, "the folder is moved", run(&project, "s3cret-1", &args));
        let copy = project.beside("copy");
        common::Run::new(user, "cp", &project.home, &project.dir).args(&["-r", ".", copy.to_str().unwrap()]).ok();
        project.dir = copy;
        project.link("src/unused", "x");
        fs_err::remove_file(project.path("src/unused")).unwrap();
        xattr::set(project.path("src/index.html"), "user.test", b"x").unwrap();
        xattr::remove(project.path("src/index.html"), "user.test").unwrap();
        again(&project, "the folder is copied", run(&project, "s3cret-1", &args));
    }
}

#[test]
fn commits_that_do_not_touch_the_source_change_nothing() {
    for user in users() {
        let project = Project::empty(user);
        project.write_tiny("apps/tiny/");
        project.write(".gitignore", "*.log\n");
        project.write("apps/tiny/src/debug.log", "1");
        project.git(&["init", "--quiet"]);
        project.git(&["add", "--all"]);
        project.git(&["commit", "--quiet", "-m", "first"]);
        let place = project.path("apps/tiny");
        let build = || common::built(&project.pipeline(&["build", "--json"]).dir(&place).ok());
        let first = build();
        let commit = |message: &str| {
            project.git(&["add", "--all"]);
            project.git(&["-c", "user.name=x", "commit", "--quiet", "--allow-empty", "-m", message]);
        };
        commit("empty");
        assert_eq!(build(), common::Built { ran: vec![], ..first.clone() }, "an empty commit");
        project.write("README.md", "elsewhere");
        commit("elsewhere");
        assert_eq!(build(), common::Built { ran: vec![], ..first.clone() }, "a commit elsewhere");
        project.write("apps/tiny/README.md", "beside the source");
        commit("beside");
        assert_eq!(build(), common::Built { ran: vec![], ..first.clone() }, "a commit beside the source");
        project.write("apps/tiny/src/debug.log", "2");
        assert_eq!(build(), common::Built { ran: vec![], ..first.clone() }, "an ignored file");
        let shown = project.json(&["artifact", "show", "tiny"]);
        let revision = project.git(&["log", "-1", "--format=%H", "--", "apps/tiny/src"]).stdout.trim().to_string();
        assert_eq!(shown["annotations"]["org.opencontainers.image.revision"], revision.as_str());
        assert_eq!(shown["annotations"]["org.opencontainers.image.created"], "2024-05-06T07:08:09Z");

        // A change that is not committed is built and said; committing it moves the date of the layer.
        project.write("apps/tiny/src/index.html", "changed");
        let dirty = project.pipeline(&["build", "--json"]).dir(&place).ok();
        dirty.says("the work tree is built as it lies: 1 file differs from commit");
        assert_eq!((common::built(&dirty).ran, dirty.json()["changed_files"].as_u64()), (vec!["application".into()], Some(1)));
        project.git(&["add", "--all"]);
        let date = "2025-01-02T03:04:05Z";
        let mut commit = project.program("git").args(&[
            "-c",
            "user.name=x",
            "-c",
            "user.email=x@example.org",
            "commit",
            "--quiet",
            "-m",
            "second",
        ]);
        commit = commit.env("GIT_AUTHOR_DATE", date).env("GIT_COMMITTER_DATE", date);
        commit.ok();
        let run = |args: &[&str]| project.pipeline(args).dir(&place).ok();
        let told: Vec<String> = run(&["explain", "--json"]).json()["steps"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|step| step["changes"].as_array().unwrap().clone())
            .map(|change| change.as_str().unwrap().into())
            .collect();
        assert_eq!(told, ["date changed from 2024-05-06T07:08:09Z to 2025-01-02T03:04:05Z"]);
        assert_eq!(build().ran, ["application"]);
        project.assert_clean();
    }
}

#[test]
fn a_package_runs_the_steps_from_its_own_up() {
    let project = Project::repository(me());
    project.build_shared("site");
    project.write("pipelines/packages.yaml", "name: packages\nbase:\n  debian: trixie\n  packages: [ca-certificates]\nruntime:\n  packages: [netbase]\nconfigure:\n  - shell: tune.sh\n");
    project.write("pipelines/tune.sh", "echo tuned > /etc/tuned\n");
    // The base is the one of the other pipelines.
    assert_eq!(project.build(&["packages"]).ran, ["packages", "configure-1"]);
    assert_eq!(project.build(&["packages"]).ran, [""; 0]);
    project.edit("pipelines/packages.yaml", "[netbase]", "[netbase, media-types]");
    let told = project.explained(&["packages"]);
    assert!(told.iter().any(|line| line == "packages: package `media-types` is new"), "{told:#?}");
    assert_eq!(project.build(&["packages"]).ran, ["packages", "configure-1"]);
    // A version that is only in the lock: what would run, without an archive that has it.
    let lock = project.read("pipelines/pipeline.lock");
    let (before, set) = lock.split_once("\"packages\":[\"media-types\",\"netbase\"]").expect("the set that was just resolved");
    let row = set.lines().find(|line| line.contains("\"name\":\"netbase\"")).unwrap();
    let version = row.split("\"version\":\"").nth(1).unwrap().split('"').next().unwrap();
    let set = set.replacen(row, &row.replace(&format!("\"version\":\"{version}\""), "\"version\":\"99\""), 1);
    project.write("pipelines/pipeline.lock", format!("{before}\"packages\":[\"media-types\",\"netbase\"]{set}"));
    let told = project.explained(&["packages"]);
    assert!(told.contains(&format!("packages: package `netbase` {version} → 99")), "{told:#?}");
    assert_eq!(told.iter().filter(|line| line.starts_with("base:")).count(), 0, "{told:#?}");
}
