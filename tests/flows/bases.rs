//! What a pipeline stands on and where its source comes from, on the small base: images of a registry, OCI layouts, tar
//! files, nothing; S2I builder images; configure steps; Git.

use serde_json::Value;

use crate::common::{self, Project, TINY_STEPS, User, get, me, tiny_base, tool, users};
use crate::servers::Server;

/// A registry on loopback and what is pushed to it.
pub struct Registry {
    server: Server,
    _temp: tempfile::TempDir,
}

impl Registry {
    pub fn start() -> Self {
        let temp = tempfile::tempdir().unwrap();
        Self { server: Server::start(temp.path(), ""), _temp: temp }
    }

    pub fn name(&self, image: &str) -> String {
        format!("127.0.0.1:{}/{image}", self.server.port)
    }

    /// Copies an image out of a project's store to the registry, with `skopeo`.
    pub fn push(&self, project: &Project, image: &str, name: &str) {
        let from = format!("oci:{}:{image}:latest", project.root.join("store").display());
        let to = format!("docker://{}", self.name(name));
        project.program("skopeo").args(&["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", &from, &to]).ok();
    }
}

/// An image with a file `/etc/mark`, made by a configure step on the small base.
fn marked(user: User, mark: &str) -> Project {
    let project = Project::empty(user);
    project.write("base.tar", tiny_base());
    project.write("pipeline.yaml", "name: marked\nbase:\n  tar: base.tar\nconfigure:\n  - shell: mark.sh\nimage:\n  env: { FROM_BASE: \"yes\" }\n  labels: { from.base: \"yes\" }\n  command: [/bin/sh]\n");
    project.write("mark.sh", format!("echo {mark} > /etc/mark\n"));
    assert_eq!(project.build(&[]).ran, ["base", "configure-1"]);
    project
}

fn cat(project: &Project, image: &str, path: &str) -> String {
    project.pipeline(&["run", image, "--port", "0:1", "--", "cat", path]).ok().stdout
}

#[test]
fn an_image_of_a_registry_is_pinned_and_updated() {
    let registry = Registry::start();
    for user in users() {
        let name = if user == User::Root { "base-root" } else { "base-user" };
        registry.push(&marked(user, "one"), "marked", &format!("{name}:1"));
        let reference = registry.name(&format!("{name}:1"));
        let project = Project::tiny(user);
        project.edit("pipeline.yaml", "  tar: base.tar\n", &format!("  image: {reference}\n"));
        project
            .pipeline(&["build", "--locked"])
            .run()
            .code(2)
            .says(&format!("image `{reference}` is not in `pipeline.lock`, and `--locked` refuses to resolve"));
        let first = project.pipeline(&["build", "--json"]).ok();
        first.says("wrote `pipeline.lock`; commit it").says(&format!("pulling {reference}"));
        assert_eq!(common::built(&first).ran, TINY_STEPS);
        project.assert_clean();
        assert_eq!(cat(&project, "tiny", "/etc/mark"), "one\n");
        let shown = project.json(&["artifact", "show", "tiny"]);
        assert_eq!(
            (shown["layers"].as_array().unwrap().len(), shown["config"]["Labels"]["from.base"].as_str()),
            (4, Some("yes"))
        );
        assert!(shown["config"]["Env"].as_array().unwrap().contains(&"FROM_BASE=yes".into()), "{shown:#}");
        assert_eq!(shown["annotations"]["org.opencontainers.image.base.name"], reference.as_str());
        // The tag moves; the lock does not, until it is told to.
        registry.push(&marked(user, "two"), "marked", &format!("{name}:1"));
        assert_eq!(project.build(&["--locked"]).ran, [""; 0]);
        project
            .pipeline(&["update", "--check"])
            .run()
            .code(1)
            .prints(&format!("image {reference}: sha256:"))
            .prints("pipeline.lock was left as it is");
        assert_eq!(project.build(&["--locked"]).ran, [""; 0]);
        project.pipeline(&["update"]).ok().prints("wrote pipeline.lock");
        project.pipeline(&["update", "--check"]).ok().prints("everything is current");
        let told = project.explained(&[]);
        assert!(told.contains(&"base: content changed".to_string()), "{told:?}");
        assert_eq!(project.build(&["--locked"]).ran, TINY_STEPS);
        assert_eq!(cat(&project, "tiny", "/etc/mark"), "two\n");
        // `artifact pull` puts an image itself into the store.
        project.pipeline(&["artifact", "pull", &reference]).ok().prints(&format!("{name}:1 sha256:"));
        assert_eq!(cat(&project, &format!("{name}:1"), "/etc/mark"), "two\n");
        project.pipeline(&["artifact", "pull", &registry.name("none:1")]).run().code(1);
        project.pipeline(&["artifact", "pull", &format!("127.0.0.1:{}/none:1", common::free_port())]).run().code(75);
        project.assert_clean();
    }
}

#[test]
fn an_oci_layout_a_tar_and_nothing() {
    tool("skopeo", "skopeo");
    for user in users() {
        // A layout with a tag, and one that holds a single image.
        let source = marked(user, "layout");
        let project = Project::tiny(user);
        for tag in ["", ":some"] {
            let from = format!("oci:{}:marked:latest", source.root.join("store").display());
            project.program("skopeo").args(&["--insecure-policy", "copy", "--quiet", &from, &format!("oci:layout{tag}")]).ok();
            project.write(
                "pipeline.yaml",
                format!("name: tiny\nbase:\n  oci: layout{tag}\nruntime: {{ builder: ./builder }}\nsource: {{ path: src }}\n"),
            );
            assert_eq!(project.build(&[]).ran.len(), if tag.is_empty() { 3 } else { 0 });
            assert_eq!(cat(&project, "tiny", "/etc/mark"), "layout\n");
        }
        project.write(
            "pipeline.yaml",
            "name: tiny\nbase:\n  oci: layout:none\nruntime: { builder: ./builder }\nsource: { path: src }\n",
        );
        project.pipeline(&["build"]).run().code(2).says("none");

        // Tars: plain, gzip, zstd give the same tree; the compressed file is other bytes, so another key.
        let mut layers: Vec<Value> = Vec::new();
        let gzip = {
            use std::io::Write as _;
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            writer.write_all(tiny_base()).unwrap();
            writer.finish().unwrap()
        };
        for (name, bytes) in [
            ("base.tar", tiny_base().to_vec()),
            ("base.tar.gz", gzip),
            ("base.tar.zst", zstd::encode_all(tiny_base(), 1).unwrap()),
        ] {
            project.write(name, bytes);
            project.write("pipeline.yaml", format!("name: tarred\nbase: {{ tar: {name} }}\n"));
            assert_eq!(project.build(&[]).ran, ["base"], "{name}");
            layers.push(project.json(&["artifact", "show", "tarred"])["layers"].clone());
        }
        assert!(layers[0] == layers[1] && layers[1] == layers[2], "{layers:#?}");

        // From scratch: only a static program of the source's own... which a builder image has to bring; so: no steps.
        project.write("pipeline.yaml", "name: empty\nbase: { scratch: true }\nimage: { labels: { a: b } }\n");
        assert_eq!(project.build(&[]).steps, [""; 0]);
        let shown = project.json(&["artifact", "show", "empty"]);
        assert_eq!((shown["layers"].as_array().unwrap().len(), shown["config"]["Labels"]["a"].as_str()), (0, Some("b")));
        project.pipeline(&["run", "empty"]).run().code(125).says("the image says no command");
        project.assert_clean();
    }
}

/// An S2I builder image as others make them: labels, scripts inside, a user of its own, an entrypoint.
#[test]
fn an_s2i_builder_image() {
    let registry = Registry::start();
    for user in users() {
        let name = if user == User::Root { "s2i-root:1" } else { "s2i-user:1" };
        let maker = Project::empty(user);
        maker.write("base.tar", tiny_base());
        maker.write(
            "pipeline.yaml",
            "name: s2i\nbase: { tar: base.tar }\nconfigure: [ { shell: make.sh } ]\nimage:\n  user: \"1001\"\n  workdir: /opt/app-root/src\n  port: 8080\n  env: { APP_ROOT: /opt/app-root, STI: \"1\" }\n  labels: { io.openshift.s2i.scripts-url: \"image:///usr/libexec/s2i\", io.k8s.display-name: Maker, io.openshift.s2i.destination: /tmp }\n",
        );
        maker.write(
            "make.sh",
            r#"mkdir -p /usr/libexec/s2i /opt/app-root/src /var/spool
chown -R 1001:0 /opt/app-root
cat > /usr/libexec/s2i/assemble <<'END'
#!/bin/sh
set -e
echo "---> as $(id -u):$(id -g) in $(pwd), mode $MODE, colour $COLOUR"
mv /tmp/src/* ./
cp -r /tmp/src/.s2i ./
id -u > ./assembled-by
END
cat > /usr/libexec/s2i/run <<'END'
#!/bin/sh
httpd -f -p 8080 -h /opt/app-root/src &
trap 'kill $!; exit 143' TERM
wait
END
chmod 755 /usr/libexec/s2i/*
"#,
        );
        maker.build(&[]);
        registry.push(&maker, "s2i", name);

        let project = Project::empty(user);
        let reference = registry.name(name);
        // It takes the place of the base: no package of that one is resolved.
        project.write("pipeline.yaml", format!("name: app\nbase: {{ debian: trixie, packages: [ca-certificates] }}\nruntime: {{ image: {reference} }}\nsource: {{ path: src }}\nbuild: {{ env: {{ MODE: fast }} }}\n"));
        project.write("src/index.html", "made by s2i\n");
        project.write("src/.s2i/environment", "COLOUR=\"red\"\n# a comment\n");
        let built = project.pipeline(&["build", "--json", "--verbose"]).ok();
        built.says("application: ---> as 1001:0 in /opt/app-root/src, mode fast, colour red\n");
        assert_eq!(common::built(&built).ran, ["base", "application"]);
        let lock: Value = serde_json::from_str(&project.read("pipeline.lock")).unwrap();
        assert_eq!((lock["images"].as_object().unwrap().len(), lock["sets"].as_object().unwrap().len()), (1, 0), "{lock:#}");
        project.assert_clean();
        let shown = project.json(&["artifact", "show", "app"]);
        let config = &shown["config"];
        assert_eq!(
            (config["User"].as_str(), config["WorkingDir"].as_str(), &config["Cmd"]),
            (Some("1001"), Some("/opt/app-root/src"), &serde_json::json!(["/usr/libexec/s2i/run"]))
        );
        let env: Vec<&str> = config["Env"].as_array().unwrap().iter().map(|one| one.as_str().unwrap()).collect();
        assert!(
            env.contains(&"COLOUR=red")
                && env.contains(&"APP_ROOT=/opt/app-root")
                && !env.iter().any(|one| one.starts_with("MODE=")),
            "{env:?}"
        );
        let labels = &config["Labels"];
        assert_eq!(
            (labels["io.openshift.s2i.build.image"].as_str(), labels["io.k8s.display-name"].as_str()),
            (Some(reference.as_str()), Some("app"))
        );
        assert_eq!(cat(&project, "app", "/opt/app-root/src/assembled-by"), "1001\n");
        let mut running = project.pipeline(&["run", "app", "--port", "0"]).start();
        let port = running.port();
        assert_eq!(get(port, "/"), (200, "made by s2i\n".into()));
        running.signal(15);
        running.wait(std::time::Duration::from_secs(10)).code(143);
        // Only the application's layer is new with another source.
        project.write("src/index.html", "again\n");
        assert_eq!(project.build(&[]).ran, ["application"]);
        // An image that is no builder is told.
        registry.push(&marked(user, "plain"), "marked", "plain:1");
        project.edit(
            "pipeline.yaml",
            &format!("runtime: {{ image: {reference}"),
            &format!("runtime: {{ image: {}", registry.name("plain:1")),
        );
        project
            .pipeline(&["build"])
            .run()
            .code(1)
            .says("the runtime image has no label `io.openshift.s2i.scripts-url`, so it is no S2I builder image");
        project.assert_clean();
    }
}

#[test]
fn configure_steps_run_in_order_on_the_application() {
    for user in users() {
        let project = Project::tiny(user);
        let file = project.read("pipeline.yaml");
        project.write("pipeline.yaml", format!("{file}configure:\n  - shell: configure/one.sh\n  - shell: configure/two\n"));
        // Without the executable bit sh reads it; with it, its first line says who does.
        project.write("configure/one.sh", "set -e\ntest -f /opt/app/index.html\ntest \"$(id -u)\" = 0\necho one > /etc/order\nmkdir /etc/gone && touch /etc/gone/x\nchown 1001:0 /etc/order\n");
        project.write_script("configure/two", "#!/bin/awk -f\nBEGIN { while ((getline line < \"/etc/order\") > 0) print line, \"two\" > \"/etc/result\"; system(\"rm -r /etc/gone /bin/yes\") }\n");
        assert_eq!(project.build(&[]).ran, ["base", "dependencies", "application", "configure-1", "configure-2"]);
        project.assert_clean();
        assert_eq!(cat(&project, "tiny", "/etc/result"), "one two\n");
        let layers = project.layer_paths("tiny");
        assert_eq!(layers[4], ["bin", "bin/.wh.yes", "etc", "etc/.wh.gone", "etc/result"]);
        let gone = project.pipeline(&["run", "tiny", "--port", "0", "--", "ls", "/etc/gone", "/bin/yes"]).run();
        gone.code(1);
        project.edit("configure/one.sh", "set -e", "echo no >&2; exit 9");
        project
            .pipeline(&["build"])
            .run()
            .code(1)
            .says("step `configure-1` of `tiny` failed: `one.sh` exited with status 9; its last lines:\n  | no\n");
        project.assert_clean();
    }
}

#[test]
fn a_git_repository_is_a_source() {
    for user in users() {
        let library = Project::empty(user);
        library.write("shared.txt", "shared\n");
        library.git(&["init", "--quiet"]);
        library.git(&["add", "--all"]);
        library.git(&["commit", "--quiet", "-m", "library"]);
        let origin = Project::empty(user);
        origin.write("web/index.html", "first\n");
        origin.write("web/lock.txt", "one 1.0\n");
        origin.write("elsewhere", "x");
        origin.git(&["init", "--quiet"]);
        origin.git(&["submodule", "--quiet", "add", &format!("file://{}", library.dir.display()), "web/library"]);
        origin.git(&["add", "--all"]);
        origin.git(&["commit", "--quiet", "-m", "first commit"]);
        origin.git(&["tag", "v1"]);
        origin.write("web/index.html", "second\n");
        origin.git(&["commit", "--quiet", "--all", "-m", "second commit"]);
        let commit = |reference: &str| origin.git(&["rev-parse", reference]).stdout.trim().to_string();

        let project = Project::tiny(user);
        let url = format!("file://{}", origin.dir.display());
        let file = project.read("pipeline.yaml");
        let source =
            |lines: &str| project.write("pipeline.yaml", file.replace("  path: src\n", &format!("  git: {url}\n{lines}")));
        let page = || cat(&project, "tiny", "/opt/app/index.html");

        source("  ref: v1\n  dir: web\n");
        assert_eq!(project.build(&[]).ran, TINY_STEPS);
        assert_eq!((page().as_str(), cat(&project, "tiny", "/opt/app/library/shared.txt").as_str()), ("first\n", "shared\n"));
        let shown = project.json(&["artifact", "show", "tiny"]);
        let annotation =
            |name: &str| shown["annotations"][format!("org.opencontainers.image.{name}")].as_str().unwrap().to_string();
        assert_eq!(
            (annotation("revision"), annotation("source"), annotation("created")),
            (commit("v1"), url.clone(), "2024-05-06T07:08:09Z".into())
        );
        assert_eq!(shown["config"]["Labels"]["io.openshift.s2i.build.commit.message"], "first commit");
        assert_eq!(shown["config"]["Labels"]["io.openshift.s2i.build.source-context-dir"], "web");
        assert_eq!(shown["built"]["changed_files"], 0);
        project.assert_clean();

        for (reference, text) in [("main", "second\n"), (&commit("v1")[..12], "first\n"), (&commit("main"), "second\n")] {
            source(&format!("  ref: \"{reference}\"\n  dir: web\n"));
            project.build(&[]);
            assert_eq!(page(), text, "{reference}");
        }
        // Without a reference: the remote's HEAD, as it is at every build.
        source("  dir: web\n");
        assert_eq!(project.build(&[]).ran, [""; 0]);
        origin.write("web/index.html", "third\n");
        origin.git(&["commit", "--quiet", "--all", "-m", "third"]);
        assert_eq!(project.build(&[]).ran, ["application"]);
        assert_eq!(page(), "third\n");
        source("  dir: web\n  submodules: false\n");
        project.build(&[]);
        let listed = project.pipeline(&["run", "tiny", "--port", "0", "--", "ls", "-A", "/opt/app/library"]).ok();
        assert_eq!(listed.stdout, "");

        source("  ref: nope\n  dir: web\n");
        project.pipeline(&["build"]).run().code(1).says("nope");
        source("  ref: mian\n  dir: web\n");
        project.pipeline(&["build"]).run().code(1).says("main");
        source("  dir: wbe\n");
        project.pipeline(&["build"]).run().code(1).says("wbe");
        origin.write("web/big.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n");
        origin.git(&["add", "--all"]);
        origin.git(&["commit", "--quiet", "-m", "lfs"]);
        source("  dir: web\n");
        project.pipeline(&["build"]).run().code(1).says("`big.bin`").says("LFS");
        project.write("pipeline.yaml", file.replace("  path: src\n", "  git: file:///nonexistent/repository\n"));
        let gone = project.pipeline(&["build"]).run();
        assert!([1, 75].contains(&gone.status.code().unwrap()), "{}", gone.stderr);
        project.assert_clean();
    }
}

/// A whole day: somebody's folder becomes an image.
#[test]
fn init_writes_what_it_finds() {
    let project = Project::empty(me());
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], &'a str);
    let cases: [Case<'_>; 3] = [
        ("python", &[("requirements.txt", "bottle==0.13.2 --hash=sha256:0\n"), ("app.py", "print('x')\n")], "builder: python"),
        (
            "node",
            &[("package.json", "{\"name\": \"shop\", \"scripts\": {\"start\": \"node .\"}}"), ("package-lock.json", "{}")],
            "builder: node",
        ),
        ("static", &[("index.html", "<p>x\n")], "builder: static"),
    ];
    for (folder, files, expected) in cases {
        for (name, text) in files {
            project.write(&format!("{folder}/{name}"), text);
        }
        let place = project.path(folder);
        let dry = project.bare(&["init", "--dry-run"]).dir(&place).ok();
        assert!(dry.stdout.contains(expected) && !place.join("pipeline.yaml").exists(), "{}", dry.stdout);
        let done = project.bare(&["init"]).dir(&place).ok();
        done.prints("wrote `").prints("next: pipeline build ").says(files[0].0);
        assert_eq!(fs_err::read_to_string(place.join("pipeline.yaml")).unwrap(), dry.stdout);
        project.bare(&["init"]).dir(&place).run().code(2).says("exists").says("`--force` replaces it");
        project.bare(&["init", "--force", "--json"]).dir(&place).ok().json();
    }
    project.write("docker/Dockerfile", "FROM debian\n");
    project.bare(&["init", "docker"]).run().code(1).says("Dockerfile");
    fs_err::create_dir(project.path("nothing")).unwrap();
    project.bare(&["init", "nothing"]).run().code(1);
}
