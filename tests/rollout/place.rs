//! A pipeline with an application that is easy to check, its daemon, and the client that counts.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use clap::Parser as _;
use pipeline::oci::digest::Digest;
use serde_json::Value;

use super::common::tiny_base;
use super::common::{Project, Run, Running, User};
use super::load::client::{self, ClientArgs};

/// How long anything may take that takes a moment.
const PATIENCE: Duration = Duration::from_secs(60);
/// Requests per second of the client, so that what is watched gets the processor, too.
const RATE: u32 = 600;
/// Starts the application; `options` of the source are its own.
const RUN: &str =
    "#!/bin/sh\nexec /usr/bin/load upstream --port-from-env --version \"$(cat /opt/app/version)\" $(cat /opt/app/options)\n";

/// The pipeline `tiny`, whose application is the test upstream, and its environments.
pub struct Place {
    pub project: Project,
    /// Where the daemon takes requests.
    pub address: SocketAddr,
    /// The pipeline's name.
    name: String,
}

impl Place {
    pub fn new(user: User, environments: &str) -> Self {
        Self::with(user, environments, &|_| {})
    }

    /// The same; `change` has the project before anything is applied.
    pub fn with(user: User, environments: &str, change: &dyn Fn(&Project)) -> Self {
        let project = Project::tiny(user);
        project.write("base.tar", app_base());
        project.write_script("builder/s2i/bin/run", RUN);
        project.write("src/options", "");
        let text = project.read("pipeline.yaml").replace("http: /\n", "http: /healthz\n");
        project.write("pipeline.yaml", text + environments);
        change(&project);
        let name = project.read("pipeline.yaml").lines().find_map(|line| Some(line.strip_prefix("name: ")?.to_owned())).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let place = Self { project, address: free, name };
        place.verb(&["environment", "apply"]).ok();
        place
    }

    /// The program, as alice calls it.
    pub fn verb<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Run {
        self.project.pipeline(args).env("GIT_AUTHOR_NAME", "alice").env("GIT_AUTHOR_EMAIL", "alice@example.org")
    }

    /// Builds a release of the application, which calls itself `version`; it goes where it goes by itself.
    pub fn release(&self, version: &str) {
        self.release_that(version, "");
    }

    /// The same, run with `options` of `load upstream`.
    pub fn release_that(&self, version: &str, options: &str) {
        self.project.write("src/version", version);
        self.project.write("src/options", options);
        self.verb(&["build", "--release", "--release-version", version]).ok();
    }

    /// Starts the daemon, and waits until it answers.
    pub fn serve(&self, more: &[&str]) -> Daemon<'_> {
        self.serve_by(&[], more)
    }

    /// The same with `words` before the command.
    pub fn serve_by(&self, words: &[&str], more: &[&str]) -> Daemon<'_> {
        let listen = self.address.to_string();
        let running = self.verb(&["serve", "--poll", "1s", "--listen", &listen]).args(more).wrap(words).start();
        let mut daemon = Daemon { place: self, running };
        daemon.running.wait_for("serving");
        daemon
    }

    /// The environment, as the daemon tells it.
    pub fn status(&self, environment: &str) -> Value {
        let name = format!("{}/{environment}", self.name);
        let value = self.verb(&["--json", "status", &name]).ok().json();
        value["served"][0].clone()
    }

    /// Waits until `version` serves in `environment`, its rollout is over, and the ledger knows that it is healthy.
    #[track_caller]
    pub fn wait_for(&self, environment: &str, version: &str) {
        self.wait(environment, |status| status["live"]["version"] == version && status["rollout"]["outcome"] != Value::Null);
        let name = format!("{}/{environment}", self.name);
        let patience = Instant::now() + PATIENCE;
        loop {
            let row = self.verb(&["--json", "status", &name]).ok().json()["environments"][0].clone();
            if row["version"] == version && row["health"] == "healthy" {
                return;
            }
            assert!(Instant::now() < patience, "{row:#}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until the environment is as `good` says.
    #[track_caller]
    pub fn wait(&self, environment: &str, good: impl Fn(&Value) -> bool) -> Value {
        let patience = Instant::now() + PATIENCE;
        loop {
            let status = self.status(environment);
            if good(&status) {
                return status;
            }
            assert!(Instant::now() < patience, "{environment}: {status:#}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// One request, over a connection of its own; the body of an answer with status 200.
    #[track_caller]
    pub fn get(&self, host: &str, path: &str) -> String {
        let (status, body) = self.ask(host, path);
        assert_eq!(status, 200, "{body}");
        body
    }

    /// One request; its status and body.
    #[track_caller]
    pub fn ask(&self, host: &str, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.trim().to_owned())
    }

    /// Starts the client that counts; it goes on until [`Watched::end`].
    pub fn client(&self, host: &str, mix: &str) -> Watched {
        self.client_at(host, mix, RATE)
    }

    /// The same with so many requests per second.
    pub fn client_at(&self, host: &str, mix: &str, rate: u32) -> Watched {
        #[derive(Debug, clap::Parser)]
        struct Client {
            #[command(flatten)]
            args: ClientArgs,
        }
        let file = self.project.beside("client").join(format!("stop-{}", mix.len()));
        let _ = fs_err::remove_file(&file);
        let target = self.address;
        let line = format!(
            "client --target {target} --host {host} --mix {mix} --connections 12 --rate {rate} --until-file {}",
            file.display()
        );
        let args = Client::try_parse_from(line.split_whitespace()).unwrap().args;
        let thread = std::thread::spawn(move || serde_json::to_value(client::run(&args).unwrap()).unwrap());
        Watched { file, thread }
    }

    pub fn is_sound(&self) {
        self.verb(&["ledger", "verify"]).ok().prints("sound: ");
    }

    /// What runs is asked to end, as a machine that goes down would; nothing is left.
    pub fn stop_all(&self) {
        self.stop_instances();
        self.project.assert_clean();
    }

    /// What runs is asked to end.
    pub fn stop_instances(&self) {
        let instances = self.project.root.join("state/instances");
        for entry in fs_err::read_dir(&instances).into_iter().flatten() {
            let id = entry.unwrap().file_name().into_string().unwrap();
            self.verb(&["__instance", "stop", &id, "2"]).ok();
        }
    }
}

impl Drop for Place {
    /// A test that failed leaves nobody's program running, and nothing in memory.
    fn drop(&mut self) {
        let instances = self.project.root.join("state/instances");
        for entry in fs_err::read_dir(&instances).into_iter().flatten().flatten() {
            let id = entry.file_name().into_string().unwrap_or_default();
            let _ = self.verb(&["__instance", "stop", &id, "1"]).run();
        }
        // A daemon that was killed left who holds its sockets.
        pipeline::serve::sockets::quit(&self.project.root.join("run/hold"));
        // The daemon's folder in memory is named after the root.
        let root = Digest::of(self.project.root.as_os_str().as_encoded_bytes()).hex();
        for entry in fs_err::read_dir("/dev/shm").into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(&root[..12]) {
                let _ = fs_err::remove_dir_all(entry.path());
            }
        }
    }
}

/// `pipeline serve`.
pub struct Daemon<'p> {
    place: &'p Place,
    pub running: Running,
}

impl<'p> Daemon<'p> {
    /// A new one in its place, that takes over its sockets.
    pub fn replaced(mut self) -> Daemon<'p> {
        let new = self.place.serve(&["--replace"]);
        self.running.wait(PATIENCE).code(0);
        new
    }

    /// A new one after it was killed.
    pub fn killed(self) -> Daemon<'p> {
        let place = self.place;
        self.dies();
        place.serve(&[])
    }

    pub fn dies(mut self) {
        self.running.signal(9);
        self.running.wait(PATIENCE);
    }

    pub fn stop(mut self) {
        self.running.signal(15);
        self.running.wait(PATIENCE).code(0);
    }
}

/// The client, at work.
pub struct Watched {
    file: PathBuf,
    thread: std::thread::JoinHandle<Value>,
}

/// What it found.
#[derive(Debug)]
pub struct Counted(Value);

impl Watched {
    pub fn end(self) -> Counted {
        // What was begun last is part of it.
        std::thread::sleep(Duration::from_millis(500));
        fs_err::write(&self.file, "").unwrap();
        Counted(self.thread.join().unwrap())
    }
}

impl Counted {
    pub fn lost(&self) -> u64 {
        self.0["lost"].as_u64().unwrap()
    }

    /// Why something was lost: kind and reason, and how often.
    pub fn reasons(&self) -> &serde_json::Map<String, Value> {
        self.0["reasons"].as_object().unwrap()
    }

    pub fn close_codes(&self) -> Vec<String> {
        self.0["close_codes"].as_object().unwrap().keys().cloned().collect()
    }

    #[track_caller]
    pub fn loses_nothing(&self) {
        assert!(self.0["requests"].as_u64().unwrap() > 100, "{:#}", self.0);
        assert_eq!(self.lost(), 0, "{:#}", self.0);
    }

    /// At each of `times` instants each of the 12 connections may lose the one request that was on its way, and none is refused.
    #[track_caller]
    pub fn loses_only_what_was_in_flight(&self, times: u64) {
        assert!(self.lost() <= 12 * times, "{:#}", self.0);
        let refused = self.0["reasons"].as_object().unwrap().keys().any(|reason| reason.contains("refused"));
        assert!(!refused, "{:#}", self.0);
    }

    #[track_caller]
    pub fn was_answered_by(&self, versions: &[&str]) {
        let found: Vec<&String> = self.0["versions"].as_object().unwrap().keys().collect();
        assert_eq!(found, versions, "{:#}", self.0);
    }
}

/// The small base with the test upstream and the libraries it needs.
fn app_base() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let here = std::env::current_exe().unwrap();
        let program = here.parent().unwrap().parent().unwrap().join("examples/load");
        assert!(program.exists(), "`{}` is missing: cargo build --release --example load", program.display());
        let mut tar = tar::Builder::new(Vec::new());
        let mut base = tar::Archive::new(tiny_base());
        for entry in base.entries().unwrap() {
            let mut entry = entry.unwrap();
            let (mut header, path, link) = (
                entry.header().clone(),
                entry.path().unwrap().into_owned(),
                entry.link_name().unwrap().map(|link| link.into_owned()),
            );
            match link {
                Some(link) => tar.append_link(&mut header, path, link).unwrap(),
                None => tar.append_data(&mut header, path, &mut entry).unwrap(),
            }
        }
        let mut add = |path: &Path, file: &Path| {
            let bytes = fs_err::read(file).unwrap();
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(0o755);
            header.set_size(bytes.len() as u64);
            header.set_mtime(0);
            header.set_uid(0);
            header.set_gid(0);
            tar.append_data(&mut header, path.strip_prefix("/").unwrap(), bytes.as_slice()).unwrap();
        };
        let needs = pipeline::cmd::Cmd::new("ldd").arg(&program).text().unwrap();
        for path in needs.split_whitespace().filter(|word| word.starts_with('/')) {
            add(Path::new(path), &fs_err::canonicalize(path).unwrap());
        }
        add(Path::new("/usr/bin/load"), &program);
        tar.into_inner().unwrap()
    })
}
