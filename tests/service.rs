//! The service of the Debian package in a guest: systemd, the unit with its hardening, its sockets, and an application that is
//! rolled out under it.
//!
//! As a user would: the package of the program under test is in an archive, a host that has it among its packages is built and
//! baked, and `pipeline test` boots its disk. What happens in there is in `service/service.yaml` and `service/guest`; the
//! application and the client that counts its answers are those of tests/rollout.rs.

#[path = "service/archive.rs"]
mod archive;
mod common;
#[allow(dead_code, reason = "the client runs in the guest")]
#[path = "load/program.rs"]
mod load;
#[allow(dead_code, reason = "the application is rolled out in the guest")]
#[path = "rollout/place.rs"]
mod place;

use std::time::Duration;

use archive::Archive;
use common::{Project, me, repository, tool};
use place::Place;

/// Where the application runs. Limits, so that what keeps them is seen; times for a guest that is emulated.
const ENVIRONMENTS: &str = "\
environments:
  prod:
    target: { local: { instances: 2, memory: 128M, pids: 100 } }
    routes: [ { path: / } ]
    rollout: { deadline: 4m, drain: 20s, streams: 10s, watch: { period: 2s } }
";

/// A file of `tests/service/`, with each `@NAME@` in it replaced.
fn file(name: &str, words: &[(&str, &str)]) -> String {
    let mut text = fs_err::read_to_string(repository().join("tests/service").join(name)).unwrap();
    for (word, value) in words {
        let marked = format!("@{word}@");
        assert!(text.contains(&marked), "{name} has no {marked}");
        text = text.replace(&marked, value);
    }
    text
}

/// The application's project with what is done with it in the guest: a tar, which is a disk as it is.
fn application() -> Vec<u8> {
    let place = Place::new(me(), ENVIRONMENTS);
    place.project.write("src/version", "1.0");
    place.project.write_script("guest", &file("guest", &[]));
    let mut tar = tar::Builder::new(Vec::new());
    tar.append_dir_all(".", &place.project.dir).unwrap();
    tar.into_inner().unwrap()
}

#[test]
fn the_unit_serves_is_reloaded_killed_and_stopped_and_comes_back() {
    tool("qemu-system-x86_64", "qemu-system-x86");
    tool("qemu-img", "qemu-utils");
    let project = Project::repository(me());
    let archive = Archive::of_the_program(&project);
    project.write("archive.gpg", &archive.keyring);
    project.write("pipeline.yaml", file("host.yaml", &[("ARCHIVE", &archive.address)]));
    project.build(&[]);
    // What it was built of is in the store.
    drop(archive);
    project.pipeline(&["bake", "service", "--format", "qcow2"]).ok();
    project.write("vm-tests/application.tar", application());
    project.write("vm-tests/service.yaml", file("service.yaml", &[]));
    let words = ["test", "vm-tests/service.yaml", "--disk", "out/service.qcow2"];
    project.pipeline(&words).start().wait(Duration::from_secs(2400)).code(0);
}
