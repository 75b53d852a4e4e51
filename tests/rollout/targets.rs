//! The target `docker` for real: an engine of the test's own, a promotion and a rollback under load, and the engine away and
//! back. (Guests of an appliance are in tests/engines.rs.)

use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pipeline::cmd::Cmd;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::LOCAL;
use super::common::{User, tests_are_root, tool};
use super::place::Place;

const PATIENCE: Duration = Duration::from_secs(60);
/// With it containers outlive the engine.
const LIVE_RESTORE: &str = "--live-restore";
/// Everything that the client can ask for over a connection of its own.
const MIX: &str = "h1,h1,h2,upload,ws,sse";

/// A Docker daemon below a folder of its own; ends with the test, and its containers with it.
struct Engine {
    child: Child,
    dir: tempfile::TempDir,
}

impl Engine {
    fn start() -> Self {
        tool("dockerd", "docker.io");
        let dir = tempfile::Builder::new().prefix("pipeline-engine-").tempdir().unwrap();
        let child = run(dir.path(), &[]).unwrap();
        let engine = Self { child, dir };
        engine.wait();
        engine
    }

    fn asked(&self) -> pipeline::docker::Engine {
        pipeline::docker::Engine::at(self.dir.path().join("sock"))
    }

    /// Waits until it answers.
    fn wait(&self) {
        let (asked, patience) = (self.asked(), Instant::now() + PATIENCE);
        while asked.about().is_err() {
            let log = fs_err::read_to_string(self.dir.path().join("log")).unwrap();
            assert!(Instant::now() < patience, "dockerd does not answer:\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it, and waits until what it has started for its own use is gone: the next one would take that for its own.
    fn end(&mut self, signal: Signal) {
        let containerd = fs_err::read_to_string(self.dir.path().join("exec/containerd/containerd.pid")).unwrap();
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap();
        let patience = Instant::now() + PATIENCE;
        while Path::new("/proc").join(containerd.trim()).exists() {
            assert!(Instant::now() < patience, "containerd does not end");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Starts it in the folders of the one that has ended.
    fn again(&mut self, options: &[&str]) {
        self.child = run(self.dir.path(), options).unwrap();
        self.wait();
    }

    fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("sock").display())
    }

    /// Its containers, and since when each has been running: what its own client tells, sorted.
    fn containers(&self) -> Vec<(String, String)> {
        tool("docker", "docker.io");
        let client = |arguments: &[&str]| Cmd::new("docker").args(["-H", &self.host()]).args(arguments).text().unwrap();
        let ids = client(&["ps", "--all", "--quiet", "--no-trunc"]);
        let format = ["inspect", "--format", "{{.Id}} {{.State.StartedAt}}"];
        let told = client(&format.into_iter().chain(ids.split_whitespace()).collect::<Vec<_>>());
        let mut containers: Vec<(String, String)> =
            told.lines().filter_map(|line| line.split_once(' ')).map(|(id, since)| (id.into(), since.into())).collect();
        containers.sort();
        containers
    }
}

/// Starts a daemon.
fn run(dir: &Path, options: &[&str]) -> anyhow::Result<Child> {
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let log = fs_err::OpenOptions::new().append(true).create(true).open(dir.join("log"))?.into_parts().0;
    let mut command = Cmd::new("dockerd").args(["--data-root", &path("data"), "--exec-root", &path("exec")]);
    command = command.args(["--pidfile", &path("pid"), "-H", &format!("unix://{}", path("sock"))]);
    command = command.args(["--iptables=false", "--ip6tables=false"]).args(options);
    command.stdin(Stdio::null()).stdout(log.try_clone()?.into()).stderr(log.into()).spawn()
}

impl Drop for Engine {
    /// What a failed test leaves may outlive an engine: it is removed by the one that runs, or by another.
    fn drop(&mut self) {
        let is_running = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        let left: Vec<_> = fs_err::read_dir(self.dir.path().join("data/containers")).into_iter().flatten().flatten().collect();
        if !left.is_empty() {
            if !is_running(&mut self.child)
                && let Ok(child) = run(self.dir.path(), &[])
            {
                self.child = child;
            }
            let (asked, patience) = (self.asked(), Instant::now() + PATIENCE);
            while asked.about().is_err() && Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(50));
            }
            left.iter().for_each(|entry| drop(asked.remove(&entry.file_name().to_string_lossy())));
        }
        if is_running(&mut self.child) {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let _ = self.child.wait();
        }
        // One that was killed left its mounts.
        let mounts = fs_err::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
        for point in points.filter(|point| point.starts_with(self.dir.path())) {
            let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

#[test]
fn docker_loses_nothing() {
    if !tests_are_root() {
        // dockerd needs root; tools/test says that nothing ran as root.
        return;
    }
    let mut engine = Engine::start();
    let docker = format!("docker: {{ instances: 2, host: \"{}\" }}", engine.host());
    let place = Place::new(User::Root, &LOCAL.replace("local: { instances: 2 }", &docker));
    let daemon = place.serve(&[]);
    place.release("1.0");
    place.wait_for("dev", "1.0");
    place.verb(&["promote", "--to", "prod"]).ok().says("healthy 2/2");
    let client = place.client("prod.test", MIX);
    place.release("2.0");
    place.wait_for("dev", "2.0");
    place.verb(&["promote", "--to", "prod"]).ok();
    assert_eq!(place.get("prod.test", "/version"), "2.0");
    place.verb(&["rollback", "prod"]).ok().says("under a second");
    assert_eq!(place.get("prod.test", "/version"), "1.0");
    let report = client.end();
    report.loses_nothing();
    report.was_answered_by(&["1.0", "2.0"]);
    place.wait_for("prod", "1.0");
    containers_end_with_the_engine(&place, &mut engine);
    containers_outlive_the_engine(&place, &mut engine);
    place.verb(&["logs", "prod"]).ok().prints("listening at");
    assert_eq!(place.verb(&["exec", "prod", "--", "cat", "/opt/app/version"]).ok().stdout, "1.0");
    place.is_sound();
    daemon.stop();
    // The containers are the engine's, and go with it.
    let root = place.project.root.canonicalize().unwrap();
    let containers = engine.asked().containers("io.pipeline.root", root.to_str().unwrap()).unwrap();
    assert_eq!(containers.len(), 4);
    containers.iter().for_each(|container| engine.asked().remove(&container.name).unwrap());
    place.stop_all();
}

/// Nobody can ask the engine how things are.
fn is_away(status: &Value) -> bool {
    status["message"] == "the target `main` does not answer"
}

fn is_well(status: &Value) -> bool {
    status["message"].is_null() && status["health"] == "healthy"
}

/// An engine that is restarted ends its containers and starts them again: the same ones, and nobody makes others.
fn containers_end_with_the_engine(place: &Place, engine: &mut Engine) {
    let before = engine.containers();
    // Addresses may be given anew: nobody else must answer in its place.
    let client = place.client("prod.test", "h1");
    engine.end(Signal::TERM);
    place.wait("prod", |status| is_away(status) && status["live"]["healthy"] == 0);
    let (status, body) = place.ask("prod.test", "/version");
    assert!([502, 503].contains(&status), "{status} {body}");
    engine.again(&[LIVE_RESTORE]);
    let status = place.wait("prod", is_well);
    assert_eq!((&status["live"]["version"], &status["live"]["healthy"]), (&"1.0".into(), &2.into()));
    assert_eq!(place.get("prod.test", "/version"), "1.0");
    let report = client.end();
    assert!(report.lost() > 0, "{report:?}");
    report.was_answered_by(&["1.0"]);
    // What is warm came back, too.
    place.wait("prod", |status| status["other"]["healthy"] == 2);
    let after = engine.containers();
    let ids = |containers: &[(String, String)]| containers.iter().map(|(id, _)| id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&after), ids(&before));
    assert!(before.iter().zip(&after).all(|(before, after)| before.1 != after.1), "{before:#?}\n{after:#?}");
    place.wait_for("prod", "1.0");
}

/// With live-restore nobody notices but who looks: containers run on, and no second ones are started.
fn containers_outlive_the_engine(place: &Place, engine: &mut Engine) {
    let before = engine.containers();
    let client = place.client("prod.test", MIX);
    for signal in [Signal::TERM, Signal::KILL] {
        engine.end(signal);
        let status = place.wait("prod", is_away);
        assert_eq!((&status["health"], &status["live"]["healthy"]), (&"healthy".into(), &2.into()), "{status:#}");
        place.verb(&["status", "tiny/prod"]).ok().says("the container engine at").says("does not answer");
        place.verb(&["logs", "prod"]).run().code(75).says("does not answer");
        engine.again(&[LIVE_RESTORE]);
        place.wait("prod", is_well);
        assert_eq!(engine.containers(), before);
    }
    let report = client.end();
    report.loses_nothing();
    report.was_answered_by(&["1.0"]);
}
