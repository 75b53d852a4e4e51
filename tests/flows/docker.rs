//! The export in Docker's hands: loaded into an engine of the test's own, run, and asked for its page.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pipeline::cmd::Cmd;

use crate::common::{Project, Run, User, free_port, get, me, tests_are_root, tool};

/// A Docker engine with folders, process file and socket of its own, and no network of its own.
struct Engine {
    child: Child,
    dir: tempfile::TempDir,
}

impl Engine {
    fn start() -> Self {
        tool("dockerd", "docker.io");
        tool("docker", "docker.io");
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let log = fs_err::File::create(path("log")).unwrap().into_parts().0;
        let command = Cmd::new("dockerd")
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false", "--storage-driver=overlay2"])
            .arg(format!("--host=unix://{}", path("socket").display()))
            .arg(format!("--data-root={}", path("data").display()))
            .arg(format!("--exec-root={}", path("exec").display()))
            .arg(format!("--pidfile={}", path("pid").display()))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log));
        let engine = Self { child: command.spawn().unwrap(), dir };
        let patience = Instant::now() + Duration::from_secs(60);
        while engine.docker(&["version"]).output().is_err() || !engine.docker(&["version"]).output().unwrap().status.success() {
            assert!(
                Instant::now() < patience,
                "dockerd did not start:\n{}",
                fs_err::read_to_string(engine.dir.path().join("log")).unwrap()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        engine
    }

    fn docker(&self, args: &[&str]) -> Cmd {
        let socket: PathBuf = self.dir.path().join("socket");
        Cmd::new("docker")
            .arg("--host")
            .arg(format!("unix://{}", socket.display()))
            .args(args)
            .env("HOME", self.dir.path())
            .env_remove("DOCKER_CONFIG")
            .env_remove("DOCKER_CONTEXT")
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Asked, not killed: it ends its own containerd and unmounts what it mounted.
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

fn check(project: &Project, image: &str, path: &str, text: &str) {
    let file = project.path("export.tar");
    project.pipeline(&["artifact", "export", image, "--output", file.to_str().unwrap()]).ok();
    if !tests_are_root() {
        // An engine needs root; skopeo reads the same form of the file as `docker load`.
        let to = project.beside("loaded");
        Run::new(User::Ordinary, "skopeo", &project.home, &project.dir)
            .args(&[
                "--insecure-policy",
                "copy",
                "--quiet",
                &format!("docker-archive:{}", file.display()),
                &format!("oci:{}:{image}", to.display()),
            ])
            .ok();
        return;
    }
    let engine = Engine::start();
    let loaded = engine
        .docker(&["load", "--input", file.to_str().unwrap()])
        .text()
        .unwrap_or_else(|error| panic!("{error:#}\n{}", fs_err::read_to_string(engine.dir.path().join("log")).unwrap()));
    assert_eq!(loaded.trim(), format!("Loaded image: {image}:latest"));
    // The same configuration, so the same image id.
    let shown = project.json(&["artifact", "show", image]);
    let id = engine.docker(&["image", "inspect", "--format", "{{json .Config.Cmd}} {{.Config.User}}", image]).text().unwrap();
    assert_eq!(id.trim(), format!("{} {}", shown["config"]["Cmd"], shown["config"]["User"].as_str().unwrap()));
    let port = free_port();
    let container = engine
        .docker(&["run", "--detach", "--network=host", "--read-only", "--tmpfs=/tmp", &format!("--env=PORT={port}"), image])
        .text()
        .unwrap();
    let (status, body) = get(port, path);
    assert!(status == 200 && body.contains(text), "{status} {body}");
    // Asked to stop, it stops by itself.
    let started = Instant::now();
    engine.docker(&["stop", "--time=20", container.trim()]).run().unwrap();
    assert!(started.elapsed() < Duration::from_secs(15), "it had to be killed");
    engine.docker(&["rm", container.trim()]).run().unwrap();
}

#[test]
fn docker_loads_the_export_and_serves_the_same_page() {
    let project = Project::repository(me());
    project.build_shared("site");
    check(&project, "site", "/", "<title>");
}

#[test]
fn docker_loads_gzip_layers_too() {
    let project = Project::tiny(me());
    project.edit("pipeline.yaml", "image:\n", "image:\n  compression: gzip\n");
    project.build(&[]);
    check(&project, "tiny", "/", "<h1>tiny</h1>");
}
