//! `vm` through `pipeline serve`: each instance a guest of the disk of its release, promoted and taken back under load. (The
//! other targets are in tests/rollout.)

use std::path::Path;
use std::time::{Duration, Instant};

use pipeline::cmd::Cmd;
use serde_json::Value;

use crate::common::{Project, leftovers, me, tool};
use crate::place::Place;

/// Times are for guests that are emulated, on a machine that does much else.
const ENVIRONMENTS: &str = "
environments:
  dev: { automatic: true }
  prod:
    from: dev
    gates: [ { healthy: true } ]
    target: { vm: { memory: 512M, cpus: 1 } }
    routes: [ { host: prod.test } ]
    config: { GREETING: hello }
    rollout: { deadline: 9m, drain: 30s, streams: 5s, watch: { period: 2s, latency: 1000 } }
";
/// Requests per second of the client: an emulated guest takes milliseconds for each, and more for an upload.
const RATE: u32 = 20;

/// The pipeline `guest`: a machine like the appliance, whose app is the application that the rollouts of the other targets have.
fn place() -> Place {
    let shared = Project::repository(me());
    shared.build_shared("appliance");
    let machine = shared.read("pipelines/appliance.yaml");
    for word in ["name: appliance", "image: notes"] {
        assert!(machine.contains(word), "the appliance has no `{word}`:\n{machine}");
    }
    let machine = machine.replace("name: appliance", "name: guest").replace("image: notes", "image: load") + ENVIRONMENTS;
    Place::with(me(), "", &|project| {
        let app = project.read("pipeline.yaml").replace("name: tiny", "name: load").replace("path: src", "path: ../src");
        project.write("pipelines/load.yaml", app.replace("base.tar", "../base.tar").replace("./builder", "../builder"));
        project.write("pipeline.yaml", &machine);
        project.write("pipeline.lock", shared.read("pipelines/pipeline.lock"));
        use_store(project, &shared.root);
    })
}

/// Gives a project the store that all tests share, so that only what differs from the appliance is built. Its state, and the
/// disks that its machines stand on, are its own.
fn use_store(project: &Project, shared: &Path) {
    let root = project.beside("root");
    assert_eq!(root, project.root);
    let link = |name: &str| fs_err::os::unix::fs::symlink(shared.join(name), root.join(name)).unwrap();
    ["version", "store", "store.lock", "index.lock"].into_iter().for_each(link);
    for name in ["cache", "state", "state/builds", "state/logs"] {
        project.beside(&format!("root/{name}"));
    }
    let names = fs_err::read_dir(shared.join("cache")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "disks").for_each(|name| link(&format!("cache/{name}")));
}

/// Whether the instance is a machine, whose program is QEMU on a disk of its own.
fn is_machine(instance: &Value) -> bool {
    let id = instance["id"].as_str().unwrap();
    let lines = Cmd::new("pgrep").args(["--full", "--list-full", &format!("machines/{id}/disk.qcow2")]).text().unwrap();
    instance["kind"] == "vm" && lines.lines().any(|line| line.contains("qemu-system-x86_64"))
}

#[test]
fn machines_lose_nothing() {
    tool("qemu-system-x86_64", "qemu-system-x86");
    tool("qemu-img", "qemu-utils");
    let place = place();
    let daemon = place.serve(&[]);
    place.release("1.0");
    place.verb(&["promote", "--to", "prod"]).ok().says("healthy 1/1");
    assert_eq!(place.get("prod.test", "/env/GREETING"), "hello");
    let client = place.client_at("prod.test", "h1,h1,h2,upload,ws,sse", RATE);
    place.release("2.0");
    place.verb(&["promote", "--to", "prod"]).ok().says("healthy 1/1").says("switch");
    assert_eq!(place.get("prod.test", "/version"), "2.0");
    place.verb(&["rollback", "prod"]).ok().says("under a second");
    assert_eq!(place.get("prod.test", "/version"), "1.0");
    let report = client.end();
    report.loses_nothing();
    report.was_answered_by(&["1.0", "2.0"]);
    let status = place.status("prod");
    for (side, version) in [("live", "1.0"), ("other", "2.0")] {
        assert_eq!((&status[side]["version"], &status[side]["healthy"]), (&version.into(), &1.into()), "{status:#}");
        assert!(is_machine(&status[side]["instances"][0]), "{status:#}");
    }
    assert_eq!(place.verb(&["exec", "prod", "--", "cat", "/opt/app/version"]).ok().stdout, "1.0");
    place.is_sound();
    daemon.stop();
    place.stop_instances();
    // Files of others who use the store now are theirs.
    let left = || leftovers(&place.project.root).into_iter().filter(|line| !line.starts_with("file ")).collect::<Vec<_>>();
    let patience = Instant::now() + Duration::from_secs(10);
    while !left().is_empty() && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(left(), Vec::<String>::new());
}
