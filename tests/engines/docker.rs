//! `docker` against a Docker daemon (as root) or podman (otherwise).

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pipeline::artifact::image::read;
use pipeline::artifact::store::Store;
use pipeline::config::types as config;
use pipeline::error::exit_code;
use pipeline::oci::digest::Digest;
use pipeline::rollout::target::docker::{Around, Docker};
use pipeline::rollout::target::{Address, Checked, Found, InstanceSpec, Limits, Running, Secret, Target as _, VolumeMount};
use serde_json::Value;

use crate::common::{tests_are_root, tool};
use crate::image::{image, page, until};

const PATIENCE: Duration = Duration::from_secs(60);
/// All of them make the bridge `docker0` when there is none: two at once may both try, and one ends.
static STARTING: Mutex<()> = Mutex::new(());

/// As root the tests are Docker's, unless `PIPELINE_TEST_ENGINE` says `podman`; Docker cannot be started by others.
fn is_docker() -> bool {
    tests_are_root() && std::env::var_os("PIPELINE_TEST_ENGINE").is_none_or(|engine| engine != "podman")
}

/// An engine below a folder of its own; it ends with this.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("pipeline-engine-").tempdir().unwrap();
        let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut daemon = Self { child: Self::run(dir.path()), dir };
        daemon.answers();
        daemon
    }

    /// Starts it again, after [`Daemon::end`].
    fn again(&mut self) {
        let _one = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
        self.child = Self::run(self.dir.path());
        self.answers();
    }

    fn answers(&mut self) {
        let engine = pipeline::docker::Engine::at(self.dir.path().join("sock"));
        until("the engine answers", PATIENCE, || {
            assert!(self.child.try_wait().unwrap().is_none(), "the engine ended");
            engine.about().ok()
        });
    }

    fn run(dir: &Path) -> Child {
        let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let log = fs_err::OpenOptions::new().append(true).create(true).open(dir.join("log")).unwrap().into_parts().0;
        let mut command = if is_docker() {
            tool("dockerd", "docker.io");
            let mut command = Command::new("dockerd");
            command.args(["--data-root", &path("data"), "--exec-root", &path("exec"), "--pidfile", &path("pid")]);
            command.args(["-H", &format!("unix://{}", path("sock")), "--iptables=false", "--ip6tables=false"]);
            command
        } else {
            tool("podman", "podman");
            let mut command = Command::new("podman");
            command.args([
                "--log-level=info",
                "--root",
                &path("data"),
                "--runroot",
                &path("exec"),
                "system",
                "service",
                "--time=0",
            ]);
            command.arg(format!("unix://{}", path("sock")));
            command
        };
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
    }

    fn end(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), rustix::process::Signal::TERM).unwrap();
        }
        self.child.wait().unwrap();
    }

    fn host(&self) -> String {
        format!("unix://{}", self.dir.path().join("sock").display())
    }

    /// What the engine's own client prints.
    fn client(&self, arguments: &[&str]) -> String {
        tool("docker", "docker.io");
        let output = Command::new("docker").args(["-H", &self.host()]).args(arguments).output().unwrap();
        assert!(output.status.success(), "docker {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = fs_err::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            let last: Vec<&str> = log.lines().rev().take(15).collect();
            eprintln!("the engine's last words, newest first:\n{}", last.join("\n"));
        }
        self.end();
    }
}

struct World {
    daemon: Daemon,
    around: Around,
    store: Store,
    dir: tempfile::TempDir,
    _memory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("pipeline-docker-").tempdir().unwrap();
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let around = Around { root: dir.path().join("root"), state: dir.path().join("state"), runtime: memory.path().into() };
        fs_err::create_dir_all(&around.root).unwrap();
        let store = Store::open_with_state(&around.root, &around.state).unwrap();
        Self { daemon: Daemon::start(), around, store, dir, _memory: memory }
    }

    fn target(&self) -> Docker {
        Docker::new(Some(&self.daemon.host()), self.around.clone()).unwrap()
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("volumes/shop/prod/data")
    }

    fn spec(&self, artifact: Digest, generation: &str) -> InstanceSpec {
        InstanceSpec {
            id: format!("shop-prod-{generation}-main-0"),
            environment: "shop/prod".into(),
            generation: generation.into(),
            target: "main".into(),
            number: 0,
            artifact,
            port: Some(8080),
            env: BTreeMap::from([("GREETING".into(), "a=b c".into())]),
            secrets: BTreeMap::from([("KEY".into(), Secret::new("top secret"))]),
            volumes: vec![VolumeMount { name: "data".into(), path: "/data".into(), source: self.data() }],
            limits: limits(),
            settings: config::Target::Docker(config::Docker::default()),
        }
    }

    fn one(&self, id: &str) -> Option<Found> {
        self.target().list().unwrap().into_iter().find(|found| found.id == id)
    }

    /// A page of an instance, as soon as it answers; its address is asked for anew each time.
    fn page(&self, id: &str, path: &str) -> String {
        until(&format!("{path} of {id}"), PATIENCE, || {
            let found = self.one(id)?;
            match found.address? {
                Address::Tcp(address) => page(address, path),
                Address::Shim(_) => None,
            }
        })
    }

    fn log(&self, id: &str, lines: usize) -> String {
        let mut text = Vec::new();
        self.target()
            .logs(id, lines, false, &mut |chunk| {
                text.extend_from_slice(chunk);
                true
            })
            .unwrap();
        String::from_utf8(text).unwrap()
    }
}

/// Without rights on the machine there are limits with control groups of version 2 only.
fn limits() -> Limits {
    match tests_are_root() || Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        true => Limits { memory: Some(64 << 20), cpus: Some(0.5), pids: Some(50) },
        false => Limits::default(),
    }
}

fn strings(argv: &[&str]) -> Vec<String> {
    argv.iter().map(|word| (*word).to_owned()).collect()
}

#[test]
fn an_instance_from_start_to_forget() {
    let world = World::new();
    let target = world.target();
    let first = image(&world.store, "1");
    let spec = world.spec(first, "111111111111");
    target.start(&spec).unwrap();
    // A second time changes nothing.
    target.start(&spec).unwrap();
    assert_eq!(world.page(&spec.id, "/"), "version 1");
    assert_eq!(world.page(&spec.id, "/uid"), "1001");
    assert_eq!(world.page(&spec.id, "/secret"), "top secret");
    assert_eq!(world.page(&spec.id, "/seed"), "seed", "a new volume is filled from the image");

    let found = world.one(&spec.id).unwrap();
    let expected = (spec.environment.clone(), spec.generation.clone(), spec.target.clone(), 0, Running::Running, 0);
    assert_eq!((found.environment, found.generation, found.target, found.number, found.status, found.restarts), expected);
    if let Some(most) = limits().memory {
        let memory = found.memory.expect("the kernel counts");
        assert!((1..most).contains(&memory), "{memory}");
    }

    // What the engine itself says of image and container.
    let name = format!("pipeline-{}", spec.id);
    let (manifest, recorded) = read(&world.store, &first).unwrap();
    let inspected: Value = serde_json::from_str(&world.daemon.client(&["inspect", &name])).unwrap();
    let id = inspected[0]["Image"].as_str().unwrap();
    assert!(manifest.config.digest.to_string().ends_with(id), "the image is another: {id}");
    let tag = format!("pipeline.local/shop:{}", &first.hex()[..12]);
    let in_engine: Value = serde_json::from_str(&world.daemon.client(&["image", "inspect", &tag])).unwrap();
    let layers: Vec<String> = recorded.rootfs.diff_ids.iter().map(Digest::to_string).collect();
    assert_eq!(in_engine[0]["RootFS"]["Layers"], serde_json::json!(layers));
    let host = &inspected[0]["HostConfig"];
    assert_eq!(host["RestartPolicy"]["Name"], "unless-stopped");
    assert_eq!(host["ReadonlyRootfs"], true);
    assert_eq!(host["SecurityOpt"], serde_json::json!(["no-new-privileges"]));
    // Podman shows what is left of it.
    if is_docker() {
        assert_eq!(host["CapDrop"], serde_json::json!(["ALL"]));
        assert_eq!(
            (&host["Memory"], &host["NanoCpus"], &host["PidsLimit"]),
            (&(64 << 20).into(), &500_000_000.into(), &50.into())
        );
    }

    // The value of the secret is in memory only.
    let below =
        Command::new("grep").args(["-rlF", "top secret"]).arg(world.daemon.dir.path()).arg(world.dir.path()).output().unwrap();
    let places = String::from_utf8_lossy(&below.stdout).into_owned();
    let places: Vec<&str> = places.lines().filter(|place| !place.contains("/merged/")).collect();
    assert_eq!(places, Vec::<&str>::new(), "a secret lies on the disk");
    let secret = world.around.runtime.join("secrets").join(&spec.id).join("KEY");
    let metadata = secret.metadata().unwrap();
    if tests_are_root() {
        assert_eq!((metadata.uid(), metadata.mode() & 0o777), (1001, 0o400));
    }

    let log = until("the log is there", PATIENCE, || Some(world.log(&spec.id, 100)).filter(|log| log.contains("to stderr")));
    assert!(log.contains("started 1\n") && log.contains("root is read-only\n"), "{log}");
    assert_eq!(world.log(&spec.id, 1).lines().count(), 1);

    target.stop(&spec.id, Duration::from_secs(10)).unwrap();
    target.stop(&spec.id, Duration::from_secs(10)).unwrap();
    assert_eq!(world.one(&spec.id), None);
    assert!(!secret.exists());
    assert_eq!(world.log(&spec.id, 1), "asked to end\n", "its log stays, and it was asked to end before it was ended");
    assert_eq!(fs_err::read_to_string(world.data().join("versions")).unwrap(), "1\n", "the volume stays");
    assert!(world.daemon.client(&["images", "-q", &tag]).trim() != "");
    target.forget(&spec.id).unwrap();
    target.forget(&spec.id).unwrap();
    assert_eq!(world.daemon.client(&["images", "-q", &tag]).trim(), "", "the image goes with the last of its instances");
    let mut sink = |_: &[u8]| true;
    assert!(target.logs(&spec.id, 1, false, &mut sink).is_err());
}

#[test]
fn a_second_version_brings_only_its_own_layers_and_shares_the_volume() {
    let world = World::new();
    let target = world.target();
    let (blue, green) =
        (world.spec(image(&world.store, "1"), "111111111111"), world.spec(image(&world.store, "2"), "222222222222"));
    target.start(&blue).unwrap();
    assert_eq!(world.page(&blue.id, "/"), "version 1");
    // What both have is not needed any more: were it sent, it could not be.
    let (manifest, _) = read(&world.store, &green.artifact).unwrap();
    let base = world.store.blob(&manifest.layers[0].digest);
    // Podman wants every layer of an archive; it throws away what it has.
    if is_docker() {
        fs_err::rename(&base, base.with_extension("away")).unwrap();
    }
    target.start(&green).unwrap();
    assert_eq!(world.page(&green.id, "/"), "version 2");
    assert_eq!(world.page(&blue.id, "/"), "version 1");
    assert_eq!(fs_err::read_to_string(world.data().join("versions")).unwrap(), "1\n2\n");
    let ids: Vec<String> = target.list().unwrap().into_iter().map(|found| found.id).collect();
    assert_eq!(ids, [blue.id.clone(), green.id.clone()]);
    // An image in use is not removed by the end of another's instance.
    target.stop(&green.id, Duration::from_secs(5)).unwrap();
    target.forget(&green.id).unwrap();
    assert_eq!(world.page(&blue.id, "/"), "version 1");
    // Another root on the same engine sees nothing of it.
    let other = World { around: Around { root: world.dir.path().join("other"), ..world.around.clone() }, ..world };
    assert_eq!(other.target().list().unwrap(), []);
}

#[test]
fn commands_beside_the_program() {
    let world = World::new();
    let target = world.target();
    let spec = world.spec(image(&world.store, "1"), "111111111111");
    target.start(&spec).unwrap();
    world.page(&spec.id, "/");
    let check = |argv: &[&str], seconds| target.check(&spec.id, &strings(argv), Duration::from_secs(seconds)).unwrap();
    let answer = |good, last: &str| Checked { good, last: last.into() };
    assert_eq!(check(&["sh", "-c", "echo a; echo fine"], 20), answer(true, "fine"));
    assert_eq!(check(&["sh", "-c", "echo bad >&2; exit 3"], 20), answer(false, "bad"));
    assert_eq!(check(&["false"], 20), answer(false, "it ended with status 1"));
    assert_eq!(check(&["sh", "-c", "echo \"$GREETING $(id -u)\""], 20), answer(true, "a=b c 1001"));
    assert_eq!(check(&["sleep", "4711"], 1), answer(false, "it did not end within 1 s"));
    let missing = check(&["no-such-program"], 20);
    assert!(!missing.good && missing.last.contains("no-such-program"), "{missing:?}");
    if tests_are_root() {
        let top = world.daemon.client(&["top", &format!("pipeline-{}", spec.id)]);
        assert!(!top.contains("4711"), "a check whose time was over runs on:\n{top}");
    }
    assert_eq!(target.exec(&spec.id, &strings(&["sh", "-c", "exit 7"]), false).unwrap(), 7);
    let gone = target.check("shop-prod-0-main-9", &strings(&["true"]), Duration::from_secs(5)).unwrap();
    assert!(!gone.good, "{gone:?}");

    // Following ends when the reader has enough, and when the instance ends.
    let mut chunks = 0;
    target
        .logs(&spec.id, 1, true, &mut |_| {
            chunks += 1;
            chunks < 4
        })
        .unwrap();
    assert_eq!(chunks, 4);
    let follower = std::thread::spawn({
        let (target, id) = (world.target(), spec.id.clone());
        move || {
            let mut text = Vec::new();
            let mut sink = |chunk: &[u8]| {
                text.extend_from_slice(chunk);
                true
            };
            target.logs(&id, 0, true, &mut sink).map(|()| String::from_utf8(text).unwrap())
        }
    });
    std::thread::sleep(Duration::from_millis(500));
    target.stop(&spec.id, Duration::from_secs(10)).unwrap();
    assert_eq!(follower.join().unwrap().unwrap(), "asked to end\n");
}

#[test]
fn bad_days() {
    let mut world = World::new();
    let spec = world.spec(image(&world.store, "1"), "111111111111");
    world.target().start(&spec).unwrap();
    world.page(&spec.id, "/");

    // The engine goes away, and is told by its socket; it comes back, and everything is found again.
    world.daemon.end();
    let error = world.target().list().unwrap_err();
    let socket = world.daemon.dir.path().join("sock").display().to_string();
    assert!(exit_code(&error) == 75 && error.to_string().contains(&socket), "{error}");
    world.daemon.again();
    assert_eq!(world.page(&spec.id, "/secret"), "top secret");

    // A program that ends is started again.
    let ended = world.target().check(&spec.id, &strings(&["touch", "/tmp/end"]), Duration::from_secs(20)).unwrap();
    assert!(ended.good, "{ended:?}");
    until("it was started again", PATIENCE, || {
        world.one(&spec.id).filter(|found| found.restarts > 0 && found.status == Running::Running)
    });
    assert_eq!(world.page(&spec.id, "/"), "version 1");

    // One that was made and never started is made anew.
    world.target().stop(&spec.id, Duration::from_secs(5)).unwrap();
    let tag = format!("pipeline.local/shop:{}", &spec.artifact.hex()[..12]);
    let root = fs_err::canonicalize(&world.around.root).unwrap();
    let labels = [format!("io.pipeline.root={}", root.display()), format!("io.pipeline.instance={}", spec.id)];
    world.daemon.client(&[
        "create",
        "--name",
        &format!("pipeline-{}", spec.id),
        "--label",
        &labels[0],
        "--label",
        &labels[1],
        &tag,
    ]);
    world.target().start(&spec).unwrap();
    assert_eq!(world.page(&spec.id, "/"), "version 1");
    world.target().stop(&spec.id, Duration::from_secs(5)).unwrap();

    // Nothing is left of one that cannot be started.
    let mut broken = world.spec(spec.artifact, "333333333333");
    broken.settings =
        config::Target::Docker(config::Docker { network: Some("no-such-network".into()), ..config::Docker::default() });
    let error = world.target().start(&broken).unwrap_err();
    assert!(error.to_string().contains("no-such-network"), "{error}");
    assert_eq!((world.one(&broken.id), world.around.runtime.join("secrets").join(&broken.id).exists()), (None, false));
    let missing = world.spec(Digest::of("missing"), "444444444444");
    assert!(world.target().start(&missing).is_err());

    // A damaged layer is not started.
    let damaged = image(&world.store, "3");
    let (manifest, _) = read(&world.store, &damaged).unwrap();
    let other = image(&world.store, "4");
    let (others, _) = read(&world.store, &other).unwrap();
    let place = world.store.blob(&manifest.layers[2].digest);
    fs_err::remove_file(&place).unwrap();
    fs_err::copy(world.store.blob(&others.layers[2].digest), &place).unwrap();
    let spec = world.spec(damaged, "555555555555");
    let error = world.target().start(&spec).unwrap_err();
    assert!(!is_docker() || format!("{error:#}").contains("diffID"), "{error:#}");
    assert_eq!(world.one(&spec.id), None);
}

#[test]
fn sockets_only() {
    let around = Around { root: "/r".into(), state: "/s".into(), runtime: "/t".into() };
    for host in ["tcp://127.0.0.1:2375", "/run/docker.sock", "unix://docker.sock", "ssh://host"] {
        let error = Docker::new(Some(host), around.clone()).unwrap_err();
        assert_eq!((exit_code(&error), error.to_string()), (2, format!("`{host}` is no socket of a container engine")));
    }
    let nowhere = Docker::new(Some("unix:///nonexistent/docker.sock"), around).unwrap().list().unwrap_err();
    assert_eq!(exit_code(&nowhere), 75);
    assert!(nowhere.to_string().contains("`/nonexistent/docker.sock`"), "{nowhere}");
}
