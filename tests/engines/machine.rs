//! `vm` with a real guest of the appliance, and with programs in place of QEMU.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pipeline::config::types as config;
use pipeline::error::exit_code;
use pipeline::oci::digest::Digest;
use pipeline::rollout::target::vm::{Around, Vm};
use pipeline::rollout::target::{Address, Found, InstanceSpec, Limits, Running, Secret, Target as _, VolumeMount};

use crate::common::{binary, free_port, tool};
use crate::disk::appliance;
use crate::image::{page, until};

/// A boot takes 20 to 40 s under emulation, and longer on a machine that does much else.
const BOOT: Duration = Duration::from_secs(600);
const SOON: Duration = Duration::from_secs(60);

struct World {
    around: Around,
    disk: Digest,
    dir: tempfile::TempDir,
    _memory: tempfile::TempDir,
    _project: Box<dyn std::any::Any>,
}

impl World {
    fn new() -> Self {
        tool("qemu-system-x86_64", "qemu-system-x86");
        tool("qemu-img", "qemu-utils");
        let (project, version) = appliance();
        let dir = tempfile::Builder::new().prefix("pipeline-vm-").tempdir().unwrap();
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let around = Around {
            program: binary().into(),
            root: project.root.clone(),
            // Long enough that a socket's path would not fit.
            state: dir.path().join("a-state-folder-with-a-name-that-is-too-long-for-the-path-of-a-unix-socket-below-it"),
            runtime: memory.path().into(),
            path: std::env::var_os("PATH").unwrap(),
        };
        fs_err::create_dir_all(&around.state).unwrap();
        Self { around, disk: version.disk.digest, dir, _memory: memory, _project: Box::new(project) }
    }

    fn target(&self) -> Vm {
        Vm::new(self.around.clone())
    }

    fn spec(&self, generation: &str, settings: config::Vm) -> InstanceSpec {
        InstanceSpec {
            id: format!("appliance-prod-{generation}-main-0"),
            environment: "appliance/prod".into(),
            generation: generation.into(),
            target: "main".into(),
            number: 0,
            artifact: self.disk,
            port: Some(8080),
            env: BTreeMap::from([("GREETING".into(), "a=b".into())]),
            secrets: BTreeMap::from([("KEY".into(), Secret::new("top secret"))]),
            volumes: vec![VolumeMount {
                name: "data".into(),
                path: "/var/lib/notes".into(),
                source: self.dir.path().join("volumes/appliance/prod/data"),
            }],
            limits: Limits::default(),
            settings: config::Target::Vm(settings),
        }
    }

    fn one(&self, id: &str) -> Option<Found> {
        self.target().list().unwrap().into_iter().find(|found| found.id == id)
    }

    fn address(&self, id: &str) -> Option<SocketAddr> {
        match self.one(id)?.address? {
            Address::Tcp(address) => Some(address),
            Address::Shim(_) => None,
        }
    }
}

/// Ends what a failed test leaves.
impl Drop for World {
    fn drop(&mut self) {
        for found in self.target().list().unwrap_or_default() {
            if std::thread::panicking() {
                let mut console = Vec::new();
                let _ = self.target().logs(&found.id, 30, false, &mut |chunk| {
                    console.extend_from_slice(chunk);
                    true
                });
                eprintln!("{found:?}\n{}", String::from_utf8_lossy(&console));
            }
            let _ = self.target().stop(&found.id, Duration::ZERO);
        }
    }
}

fn strings(argv: &[&str]) -> Vec<String> {
    argv.iter().map(|word| (*word).to_owned()).collect()
}

/// Processes whose command line holds `text`.
fn processes(text: &str) -> Vec<i32> {
    let holds =
        |pid: &i32| fs_err::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(text));
    let names = fs_err::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    names.filter(holds).collect()
}

fn post(address: SocketAddr, path: &str, body: &str) {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: notes\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
}

#[test]
fn a_machine_from_start_to_forget_and_its_data_in_the_next() {
    let world = World::new();
    let target = world.target();
    let settings = config::Vm { memory: 768 << 20, cpus: 2, ..config::Vm::default() };
    let blue = world.spec("111111111111", settings.clone());
    target.start(&blue).unwrap();
    // A second time changes nothing.
    target.start(&blue).unwrap();
    let address = until("the machine has an address", SOON, || world.address(&blue.id));
    assert!(address.ip().is_loopback());
    // QEMU is one process, and nothing secret is on its command line or on a disk.
    let overlay = format!("machines/{}/disk.qcow2", blue.id);
    assert_eq!(processes(&overlay).len(), 1);
    assert_eq!(processes("top secret"), Vec::<i32>::new());

    // QEMU dies: another life of the same instance, found again by somebody who knows nothing yet.
    let pid = rustix::process::Pid::from_raw(processes(&overlay)[0]).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    until("it was started again", SOON, || {
        world.one(&blue.id).filter(|found| found.restarts == 1 && found.status == Running::Running && found.address.is_some())
    });

    until("the app answers", BOOT, || page(world.address(&blue.id)?, "/healthz"));
    let check = |argv: &[&str]| target.check(&blue.id, &strings(argv), Duration::from_secs(60)).unwrap();
    let seen = check(&["sh", "-c", "echo \"$GREETING $(cat \"$KEY_FILE\")\""]);
    assert_eq!((seen.good, seen.last.as_str()), (true, "a=b top secret"));
    let user = check(&["sh", "-c", "id -u; test \"$(id -u)\" -ge 65536"]);
    assert!(user.good, "it is not the app's user: {user:?}");
    assert!(!check(&["false"]).good);
    let asleep = target.check(&blue.id, &strings(&["sleep", "99"]), Duration::from_secs(5)).unwrap();
    assert_eq!((asleep.good, asleep.last.as_str()), (false, "it did not end within 5 s"));
    assert_eq!(target.exec(&blue.id, &strings(&["sh", "-c", "exit 7"]), false).unwrap(), 7);
    assert_eq!(exit_code(&target.exec(&blue.id, &strings(&["sh"]), true).unwrap_err()), 2);
    let read = |target: &Vm, id: &str| {
        let mut text = Vec::new();
        target
            .logs(id, 200, false, &mut |chunk| {
                text.extend_from_slice(chunk);
                true
            })
            .unwrap();
        String::from_utf8_lossy(&text).into_owned()
    };
    let journal = read(&target, &blue.id);
    assert!(journal.contains("Listening at") && !journal.contains("-- cursor"), "{journal}");
    let mut chunks = 0;
    target
        .logs(&blue.id, 1, true, &mut |_| {
            chunks += 1;
            chunks < 3
        })
        .unwrap();
    post(world.address(&blue.id).unwrap(), "/api/notes", r#"{"title": "Kept in the volume", "body": "yes"}"#);

    // It is asked to end, and its data outlives it.
    target.stop(&blue.id, Duration::from_secs(300)).unwrap();
    target.stop(&blue.id, Duration::from_secs(300)).unwrap();
    assert_eq!((world.one(&blue.id), processes(&overlay)), (None, Vec::new()));
    let console = read(&target, &blue.id);
    assert!(console.contains("Listening at"), "the app's last words are gone: {console}");
    let found = Command::new("grep").args(["-rlF", "top secret"]).arg(world.dir.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&found.stdout), "", "a secret lies on the disk");
    target.forget(&blue.id).unwrap();
    target.forget(&blue.id).unwrap();
    assert!(target.logs(&blue.id, 1, false, &mut |_| true).is_err());

    let green = world.spec("222222222222", settings);
    target.start(&green).unwrap();
    let notes = until("the app answers again", BOOT, || page(world.address(&green.id)?, "/api/notes"));
    assert!(notes.contains("Kept in the volume"), "{notes}");
    // By force: a grace of nothing asks nobody.
    target.stop(&green.id, Duration::ZERO).unwrap();
    assert_eq!(world.one(&green.id), None);
}

#[test]
fn what_a_machine_cannot_do_is_told_before_it_starts() {
    let world = World::new();
    let target = world.target();
    let spec = |change: &dyn Fn(&mut InstanceSpec)| {
        let mut spec = world.spec("333333333333", config::Vm::default());
        change(&mut spec);
        let error = target.start(&spec).unwrap_err();
        assert_eq!(world.one(&spec.id), None);
        assert!(!world.around.state.join("machines").join(&spec.id).exists());
        format!("{error:#}")
    };
    let two = spec(&|spec| spec.volumes.push(spec.volumes[0].clone()));
    assert!(two.contains("has 2 volumes, and a machine has one disk for its data"), "{two}");
    let several = spec(&|spec| spec.number = 1);
    assert!(several.contains("is the disk of one machine"), "{several}");
    let lines = spec(&|spec| drop(spec.env.insert("A".into(), "b\nc".into())));
    assert!(lines.contains("has several lines"), "{lines}");
    let app = spec(&|spec| spec.settings = config::Target::Vm(config::Vm { app: Some("shop".into()), ..config::Vm::default() }));
    assert!(app.contains("the disk has no app `shop`"), "{app}");
}

/// A program that stands in for libvirt: it notes what it is asked for and serves a page where the machine would.
const STAND_IN: &str = "#!/bin/sh
set -eu
verb=$1; shift
echo \"$verb $*\" >> \"$HERE/asked\"
case $verb in
start)
  ls \"$3\" > \"$HERE/credentials\"
  qemu-img info --output=json \"$2\" > \"$HERE/disk\"
  mkdir \"$HERE/www\"; echo machine > \"$HERE/www/index.html\"
  busybox httpd -p \"127.0.0.1:$PORT\" -h \"$HERE/www\"
  pidof busybox | tr ' ' '\\n' | while read -r pid; do grep -qz \"127.0.0.1:$PORT\" /proc/$pid/cmdline && echo $pid; done > \"$HERE/pid\" ;;
stop) kill \"$(cat \"$HERE/pid\")\"; rm \"$HERE/pid\" ;;
address) kill -0 \"$(cat \"$HERE/pid\")\" && echo \"127.0.0.1:$PORT\" ;;
esac
";

#[test]
fn programs_in_place_of_qemu() {
    tool("busybox", "busybox-static");
    let world = World::new();
    let target = world.target();
    let here: PathBuf = world.dir.path().join("stand-in");
    fs_err::create_dir(&here).unwrap();
    let script = here.join("machines");
    let text = STAND_IN.replace("$HERE", here.to_str().unwrap()).replace("$PORT", &free_port().to_string());
    fs_err::write(&script, text).unwrap();
    fs_err::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let words = |rest: &[&str]| std::iter::once(script.to_str().unwrap()).chain(rest.iter().copied()).map(String::from).collect();
    let command = config::VmCommand {
        start: words(&["start", "{id}", "{disk}", "{credentials}", "{memory},{cpus},{port}"]),
        stop: words(&["stop", "{id}", "{grace}"]),
        address: words(&["address", "{id}"]),
    };
    let settings = config::Vm { command: Some(command), ..config::Vm::default() };
    let spec = world.spec("444444444444", settings);
    target.start(&spec).unwrap();
    target.start(&spec).unwrap();
    let found = world.one(&spec.id).unwrap();
    assert_eq!((found.status, found.environment.as_str()), (Running::Running, "appliance/prod"));
    assert_eq!(page(world.address(&spec.id).unwrap(), "/").as_deref(), Some("machine"));
    let read = |name: &str| fs_err::read_to_string(here.join(name)).unwrap();
    assert_eq!(read("credentials"), "app.notes.env\napp.notes.secret.KEY\nfstab.extra\n");
    let disk: serde_json::Value = serde_json::from_str(&read("disk")).unwrap();
    assert_eq!((&disk["format"], &disk["backing-filename-format"]), (&"qcow2".into(), &"raw".into()));
    assert_eq!(exit_code(&target.check(&spec.id, &strings(&["true"]), SOON).unwrap_err()), 2);
    target.stop(&spec.id, Duration::from_secs(30)).unwrap();
    target.stop(&spec.id, Duration::from_secs(30)).unwrap();
    assert_eq!(world.one(&spec.id), None);
    let asked = read("asked");
    let folder = |path: &Path| path.to_str().unwrap().to_owned();
    let machine = folder(&world.around.state.join("machines").join(&spec.id).join("disk.qcow2"));
    let credentials = folder(&world.around.runtime.join("secrets").join(&spec.id));
    let lines: Vec<&str> = asked.lines().filter(|line| !line.starts_with("address")).collect();
    let expected = [format!("start {} {machine} {credentials} 512,1,8080", spec.id), format!("stop {} 30", spec.id)];
    assert_eq!(lines, expected);
    assert!(!Path::new(&credentials).exists() && !Path::new(&machine).exists());
    target.forget(&spec.id).unwrap();

    // A machine that is gone by itself has ended, and one that cannot be started leaves nothing.
    let mut broken = spec.clone();
    broken.id = "appliance-prod-555555555555-main-0".into();
    let config::Target::Vm(vm) = &mut broken.settings else { unreachable!() };
    vm.command.as_mut().unwrap().start = strings(&["sh", "-c", "echo no such host >&2; exit 3"]);
    let error = format!("{:#}", target.start(&broken).unwrap_err());
    assert!(error.contains("no such host") && error.contains("status 3"), "{error}");
    assert_eq!(world.one(&broken.id), None);
    let config::Target::Vm(vm) = &mut broken.settings else { unreachable!() };
    vm.command.as_mut().unwrap().start = strings(&["sh", "-c", "{what}"]);
    assert!(target.start(&broken).unwrap_err().to_string().contains("placeholder"));
    vm_that_ends(&world, &spec);
}

/// Its record is there and its program says that it does not run.
fn vm_that_ends(world: &World, spec: &InstanceSpec) {
    let mut spec = spec.clone();
    spec.id = "appliance-prod-666666666666-main-0".into();
    let config::Target::Vm(vm) = &mut spec.settings else { unreachable!() };
    let command = vm.command.as_mut().unwrap();
    command.start = strings(&["true"]);
    command.stop = strings(&["true"]);
    command.address = strings(&["sh", "-c", "echo domain not found >&2; exit 1"]);
    world.target().start(&spec).unwrap();
    let Running::Ended { status } = world.one(&spec.id).unwrap().status else { panic!("it runs") };
    assert!(status.contains("domain not found"), "{status}");
    world.target().stop(&spec.id, Duration::ZERO).unwrap();
}
