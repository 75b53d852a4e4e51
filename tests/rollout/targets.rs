//! The target `docker` for real: an engine of the test's own, a promotion and a rollback under load. (A guest of the appliance is
//! in tests/engines.rs.)

use std::process::Child;
use std::process::Stdio;
use std::time::{Duration, Instant};

use pipeline::cmd::Cmd;

use super::LOCAL;
use super::common::{User, tests_are_root, tool};
use super::place::Place;

/// A Docker daemon below a folder of its own; ends with the test.
struct Engine {
    child: Child,
    dir: tempfile::TempDir,
}

impl Engine {
    fn start() -> Self {
        tool("dockerd", "docker.io");
        let dir = tempfile::Builder::new().prefix("pipeline-engine-").tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let log = fs_err::File::create(dir.path().join("log")).unwrap().into_parts().0;
        let mut command = Cmd::new("dockerd").args(["--data-root", &path("data"), "--exec-root", &path("exec")]);
        command = command.args(["--pidfile", &path("pid"), "-H", &format!("unix://{}", path("sock"))]);
        command = command.args(["--iptables=false", "--ip6tables=false"]).stdout(log.try_clone().unwrap().into());
        let child = command.stdin(Stdio::null()).stderr(log.into()).spawn().unwrap();
        let engine = Self { child, dir };
        let asked = pipeline::docker::Engine::at(engine.dir.path().join("sock"));
        let patience = Instant::now() + Duration::from_secs(60);
        while asked.about().is_err() {
            let log = fs_err::read_to_string(engine.dir.path().join("log")).unwrap();
            assert!(Instant::now() < patience, "dockerd does not answer:\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
        engine
    }

    fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("sock").display())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

#[test]
fn docker_loses_nothing() {
    if !tests_are_root() {
        // dockerd needs root; tools/test says that nothing ran as root.
        return;
    }
    let engine = Engine::start();
    let docker = format!("docker: {{ instances: 2, host: \"{}\" }}", engine.host());
    let place = Place::new(User::Root, &LOCAL.replace("local: { instances: 2 }", &docker));
    let daemon = place.serve(&[]);
    place.release("1.0");
    place.wait_for("dev", "1.0");
    place.verb(&["promote", "--to", "prod"]).ok().says("healthy 2/2");
    let client = place.client("prod.test", "h1,h1,h2,upload,ws,sse");
    place.release("2.0");
    place.wait_for("dev", "2.0");
    place.verb(&["promote", "--to", "prod"]).ok();
    assert_eq!(place.get("prod.test", "/version"), "2.0");
    place.verb(&["rollback", "prod"]).ok().says("under a second");
    assert_eq!(place.get("prod.test", "/version"), "1.0");
    let report = client.end();
    report.loses_nothing();
    report.was_answered_by(&["1.0", "2.0"]);
    place.verb(&["logs", "prod"]).ok().prints("listening at");
    assert_eq!(place.verb(&["exec", "prod", "--", "cat", "/opt/app/version"]).ok().stdout, "1.0");
    place.is_sound();
    daemon.stop();
    // The containers are the engine's, and go with it.
    let asked = pipeline::docker::Engine::at(engine.dir.path().join("sock"));
    let root = place.project.root.canonicalize().unwrap();
    let containers = asked.containers("io.pipeline.root", root.to_str().unwrap()).unwrap();
    assert_eq!(containers.len(), 4);
    containers.iter().for_each(|container| asked.remove(&container.name).unwrap());
    place.stop_all();
}
