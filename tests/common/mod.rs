//! What the integration tests share: people, projects, running the program, looking for leftovers.
//!
//! A test says for whom it runs ([`users`]: root and an ordinary user when the tests run as root,
//! else only the one they run as), makes a [`Project`] in a folder of its own with a store of its
//! own, and runs the built binary on it in an environment that holds nothing of the caller's but
//! `PATH` and what the network needs. A tool that is missing fails the test and names its package.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use pipeline::artifact::store::{Hold, Lock};
use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;
use serde_json::Value;

/// The ordinary user of tests that run as root, unless `PIPELINE_TEST_USER` names another.
const TEST_USER: &str = "pipeline-test";
/// What the network of this machine needs to be known to programs; the rest of the environment stays out.
const PASSED: [&str; 22] = [
    "http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT", "npm_config_registry", "NPM_CONFIG_REGISTRY",
    "UV_INDEX_URL", "SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO",
];

// ---------------------------------------------------------------------------------------- people

/// For whom the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    Root,
    Ordinary,
}

/// Everybody a test can run as. With `PIPELINE_TEST_USER`, the second round of `tools/test`, only that ordinary user.
pub fn users() -> Vec<User> {
    if tests_are_root() && std::env::var_os("PIPELINE_TEST_USER").is_none() { vec![User::Root, User::Ordinary] } else { vec![User::Ordinary] }
}

/// The one user of tests that are too slow to run for each.
pub fn me() -> User {
    users()[0]
}

pub fn tests_are_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl User {
    /// The words before a command that make it run as this user.
    fn prefix(self) -> Vec<OsString> {
        match self {
            User::Ordinary if tests_are_root() => {
                let (uid, gid, _) = test_user();
                ["setpriv".to_string(), format!("--reuid={uid}"), format!("--regid={gid}"), "--init-groups".into()].map(OsString::from).to_vec()
            }
            _ => Vec::new(),
        }
    }

    /// Gives a path (not what is below it) to this user.
    fn own(self, path: &Path) {
        if self == User::Ordinary && tests_are_root() {
            let (uid, gid, _) = test_user();
            std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
        }
    }
}

/// Id, group and home of the ordinary user; it is made when it is not there.
fn test_user() -> (u32, u32, PathBuf) {
    static MADE: OnceLock<(u32, u32, PathBuf)> = OnceLock::new();
    MADE.get_or_init(|| {
        let name = std::env::var("PIPELINE_TEST_USER").unwrap_or_else(|_| TEST_USER.into());
        let _lock = Lock::wait(&std::env::temp_dir().join(".pipeline-test-user.lock"), Hold::Exclusive).unwrap();
        let row = || fs_err::read_to_string("/etc/passwd").unwrap().lines().find(|line| line.starts_with(&format!("{name}:"))).map(String::from);
        if row().is_none() {
            tool("useradd", "passwd");
            // As an ordinary user, so that it gets ranges of subordinate ids.
            Cmd::new("useradd").args(["--create-home", "--shell", "/bin/sh", &name]).run().unwrap();
        }
        for (file, option) in [("/etc/subuid", "--add-subuids"), ("/etc/subgid", "--add-subgids")] {
            let ranges = fs_err::read_to_string(file).unwrap_or_default();
            if !ranges.lines().any(|line| line.starts_with(&format!("{name}:"))) {
                Cmd::new("usermod").args([option, "2000000-2065535", &name]).run().unwrap();
            }
        }
        let row = row().expect("the user was just made");
        let fields: Vec<&str> = row.split(':').collect();
        (fields[2].parse().unwrap(), fields[3].parse().unwrap(), fields[5].into())
    })
    .clone()
}

/// Fails with the Debian package when `program` is not there.
pub fn tool(program: &str, package: &str) {
    let path = std::env::var_os("PATH").unwrap_or_default();
    assert!(pipeline::cmd::find(program, &path).is_some(), "`{program}` is missing: apt-get install {package}");
}

/// The program under test, where every user can reach it.
pub fn binary() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let built = Path::new(env!("CARGO_BIN_EXE_pipeline"));
        let dir = std::env::temp_dir().join(format!("pipeline-tests-{}", rustix::process::geteuid().as_raw()));
        fs_err::create_dir_all(&dir).unwrap();
        assert_eq!(fs_err::metadata(&dir).unwrap().uid(), rustix::process::geteuid().as_raw(), "{} belongs to somebody else", dir.display());
        fs_err::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
        let place = dir.join(format!("pipeline-{}", &binary_digest()[..16]));
        if !place.exists() {
            let temp = tempfile::Builder::new().prefix(".new-").tempfile_in(&dir).unwrap();
            fs_err::copy(built, temp.path()).unwrap();
            fs_err::set_permissions(temp.path(), PermissionsExt::from_mode(0o755)).unwrap();
            // Closed before it is executed: a file that is open for writing is busy.
            temp.into_temp_path().persist(&place).unwrap();
            let old = |entry: &fs_err::DirEntry| entry.path() != place && entry.metadata().is_ok_and(|meta| meta.modified().is_ok_and(|time| time.elapsed().is_ok_and(|age| age > Duration::from_secs(3600))));
            for entry in fs_err::read_dir(&dir).unwrap().flatten().filter(old) {
                let _ = fs_err::remove_file(entry.path());
            }
        }
        place
    })
}

fn binary_digest() -> String {
    Digest::of_reader(fs_err::File::open(env!("CARGO_BIN_EXE_pipeline")).unwrap()).unwrap().0.hex()
}

/// The repository's folder.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

// ------------------------------------------------------------------------------- running programs

/// A command to be run for a user in the tests' environment.
#[derive(Debug, Clone)]
pub struct Run {
    user: User,
    argv: Vec<OsString>,
    wrap: Vec<OsString>,
    env: BTreeMap<OsString, OsString>,
    dir: PathBuf,
    input: Option<Vec<u8>>,
}

impl Run {
    /// `program` with the given home and folder.
    pub fn new(user: User, program: impl AsRef<OsStr>, home: &Path, dir: &Path) -> Self {
        let mut env: BTreeMap<OsString, OsString> = PASSED.iter().filter_map(|name| Some(((*name).into(), std::env::var_os(name)?))).collect();
        env.insert("PATH".into(), std::env::var_os("PATH").unwrap_or_default());
        env.insert("HOME".into(), home.into());
        Self { user, argv: vec![program.as_ref().into()], wrap: Vec::new(), env, dir: dir.into(), input: None }
    }

    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.argv.push(arg.as_ref().into());
        self
    }

    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: &[S]) -> Self {
        self.argv.extend(args.iter().map(|arg| arg.as_ref().into()));
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.insert(name.into(), value.as_ref().into());
        self
    }

    #[must_use]
    pub fn dir(mut self, dir: impl AsRef<Path>) -> Self {
        self.dir = dir.as_ref().into();
        self
    }

    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    /// Words before the command, like `taskset -c 0`; they run as the user too.
    #[must_use]
    pub fn wrap(mut self, words: &[&str]) -> Self {
        self.wrap.extend(words.iter().map(OsString::from));
        self
    }

    fn command(&self) -> Cmd {
        let words: Vec<OsString> = self.user.prefix().into_iter().chain(self.wrap.iter().cloned()).chain(self.argv.iter().cloned()).collect();
        let mut command = Cmd::new(&words[0]).args(&words[1..]).env_clear().dir(&self.dir);
        for (name, value) in &self.env {
            command = command.env(name, value);
        }
        command
    }

    fn line(&self) -> String {
        self.argv.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    /// Runs to the end.
    pub fn run(self) -> Answer {
        let mut running = self.start();
        running.wait(Duration::from_secs(600))
    }

    /// Runs to the end and fails the test unless the exit code is 0.
    pub fn ok(self) -> Answer {
        let answer = self.run();
        answer.code(0);
        answer
    }

    /// Starts it; what is returned ends it when it is dropped.
    pub fn start(self) -> Running {
        let line = self.line();
        let stdin = if self.input.is_some() { Stdio::piped() } else { Stdio::null() };
        let mut child = self.command().stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        if let (Some(bytes), Some(mut stdin)) = (self.input, child.stdin.take()) {
            std::thread::spawn(move || stdin.write_all(&bytes));
        }
        let (stdout, stderr) = (Stream::follow(child.stdout.take().unwrap()), Stream::follow(child.stderr.take().unwrap()));
        Running { line, child, status: None, stdout, stderr }
    }
}

/// What a program has printed so far.
#[derive(Debug, Clone)]
struct Stream {
    bytes: Arc<Mutex<Vec<u8>>>,
    ended: Arc<std::sync::atomic::AtomicBool>,
}

impl Stream {
    fn follow(mut pipe: impl std::io::Read + Send + 'static) -> Self {
        let stream = Self { bytes: Arc::default(), ended: Arc::default() };
        let (bytes, ended) = (stream.bytes.clone(), stream.ended.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 8192];
            while let Ok(read) = pipe.read(&mut buffer) {
                if read == 0 {
                    break;
                }
                bytes.lock().unwrap().extend_from_slice(&buffer[..read]);
            }
            ended.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        stream
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    fn wait_for_end(&self) {
        let patience = Instant::now() + Duration::from_secs(5);
        while !self.ended.load(std::sync::atomic::Ordering::SeqCst) && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A program that runs.
#[derive(Debug)]
pub struct Running {
    line: String,
    child: Child,
    status: Option<ExitStatus>,
    stdout: Stream,
    stderr: Stream,
}

impl Running {
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits until `text` is in what was printed to either stream.
    pub fn wait_for(&mut self, text: &str) {
        let patience = Instant::now() + Duration::from_secs(120);
        while !self.stderr().contains(text) && !self.stdout().contains(text) {
            let over = self.child.try_wait().unwrap();
            if over.is_some() {
                self.stdout.wait_for_end();
                self.stderr.wait_for_end();
                if self.stderr().contains(text) || self.stdout().contains(text) {
                    return;
                }
            }
            assert!(over.is_none() && Instant::now() < patience, "`{}` never said `{text}` ({over:?}):\n{}{}", self.line, self.stdout(), self.stderr());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The port of `listening on http://127.0.0.1:PORT`.
    pub fn port(&mut self) -> u16 {
        let before = "listening on http://127.0.0.1:";
        self.wait_for(before);
        let text = self.stderr();
        let digits: String = text.split(before).nth(1).unwrap().chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    }

    pub fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end; one that takes longer than `patience` is killed, and the test fails.
    pub fn wait(&mut self, patience: Duration) -> Answer {
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if started.elapsed() > patience {
                let _ = self.child.kill();
                panic!("`{}` did not end within {patience:?}:\n{}{}", self.line, self.stdout(), self.stderr());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        self.status = Some(status);
        self.stdout.wait_for_end();
        self.stderr.wait_for_end();
        Answer { line: self.line.clone(), status, bytes: self.stdout.bytes(), stdout: self.stdout(), stderr: self.stderr(), took: started.elapsed() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Answer {
    line: String,
    pub status: ExitStatus,
    /// Standard output.
    pub bytes: Vec<u8>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Answer {
    /// Fails the test unless the exit code is `code` (128 and the signal for one that was killed).
    #[track_caller]
    pub fn code(&self, code: i32) -> &Self {
        let found = self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0));
        assert_eq!(found, code, "exit code of `{}`\n--- stdout\n{}--- stderr\n{}", self.line, self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub fn says(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "`{}` does not say `{text}`\n--- stdout\n{}--- stderr\n{}", self.line, self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub fn says_not(&self, text: &str) -> &Self {
        assert!(!self.stderr.contains(text), "`{}` says `{text}`\n--- stderr\n{}", self.line, self.stderr);
        self
    }

    #[track_caller]
    pub fn prints(&self, text: &str) -> &Self {
        assert!(self.stdout.contains(text), "`{}` does not print `{text}`\n--- stdout\n{}--- stderr\n{}", self.line, self.stdout, self.stderr);
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("`{}` prints no JSON: {error}\n{}", self.line, self.stdout))
    }
}

// --------------------------------------------------------------------------------------- projects

/// A folder with a pipeline in it, a store, a home: all its own, gone with it.
#[derive(Debug)]
pub struct Project {
    pub user: User,
    /// The folder with the pipeline file.
    pub dir: PathBuf,
    pub home: PathBuf,
    /// What `--root` is given.
    pub root: PathBuf,
    temp: Option<tempfile::TempDir>,
}

/// The answer of `build --json`, as far as tests look at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    pub digest: String,
    /// Names of the steps that ran.
    pub ran: Vec<String>,
    pub steps: Vec<String>,
}

impl Project {
    /// An empty project folder.
    pub fn empty(user: User) -> Self {
        let temp = tempfile::Builder::new().prefix("pipeline-test-").tempdir().unwrap();
        fs_err::set_permissions(temp.path(), PermissionsExt::from_mode(0o755)).unwrap();
        user.own(temp.path());
        let path = temp.path().canonicalize().unwrap();
        let project = Self { user, dir: path.join("project"), home: path.join("home"), root: path.join("root"), temp: Some(temp) };
        for dir in [&project.dir, &project.home] {
            fs_err::create_dir(dir).unwrap();
            user.own(dir);
        }
        project
    }

    /// The pipeline `tiny` on a base of busybox: a builder with dependencies, a source with one page, a web server.
    /// A build from nothing takes about a tenth of a second.
    pub fn tiny(user: User) -> Self {
        let project = Self::empty(user);
        project.write_tiny("");
        project
    }

    /// Writes the files of [`Project::tiny`] below `prefix` (empty, or like `sub/folder/`).
    pub fn write_tiny(&self, prefix: &str) {
        self.write(&format!("{prefix}base.tar"), tiny_base());
        self.write(&format!("{prefix}pipeline.yaml"), TINY);
        self.write(&format!("{prefix}builder/builder.yaml"), TINY_BUILDER);
        for (name, text) in [("dependencies", TINY_DEPENDENCIES), ("assemble", TINY_ASSEMBLE), ("run", TINY_RUN)] {
            self.write(&format!("{prefix}builder/s2i/bin/{name}"), text);
        }
        self.write(&format!("{prefix}src/index.html"), "<h1>tiny</h1>\n");
        self.write(&format!("{prefix}src/lock.txt"), "one 1.0\n");
    }

    /// The repository's own pipelines and applications, on the test store that all tests of this
    /// user share: their Debian base is built once.
    pub fn repository(user: User) -> Self {
        let mut project = Self::empty(user);
        project.root = test_store(user);
        for folder in ["pipelines", "apps"] {
            project.copy(&repository().join(folder), folder);
        }
        project
    }

    /// Builds one of the repository's pipelines on the shared store, once per lock file: packages that the
    /// archives no longer have are resolved anew by the first who needs them.
    pub fn build_shared(&self, name: &str) -> Built {
        let place = self.root.with_extension("locks");
        let (lock, own) = (place.join(format!("{name}.lock")), self.dir.join("pipelines/pipeline.lock"));
        {
            let _first = Lock::wait(&place.join(format!(".{name}.guard")), Hold::Exclusive).unwrap();
            if !lock.exists() {
                self.build(&["--update-missing", name]);
                fs_err::copy(&own, &lock).unwrap();
            }
        }
        self.write("pipelines/pipeline.lock", fs_err::read(&lock).unwrap());
        self.build(&[name])
    }

    /// Another folder on the same file system, for the same user.
    pub fn beside(&self, name: &str) -> PathBuf {
        let dir = self.dir.parent().unwrap().join(name);
        fs_err::create_dir_all(&dir).unwrap();
        self.user.own(&dir);
        dir
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a file of the project, with the folders above it.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.dir.join(name);
        self.folders(path.parent().unwrap());
        fs_err::write(&path, content).unwrap();
        self.user.own(&path);
    }

    fn folders(&self, dir: &Path) {
        if !dir.exists() {
            self.folders(dir.parent().unwrap());
            fs_err::create_dir(dir).unwrap();
            self.user.own(dir);
        }
    }

    pub fn write_script(&self, name: &str, content: &str) {
        self.write(name, content);
        self.mode(name, 0o755);
    }

    pub fn read(&self, name: &str) -> String {
        fs_err::read_to_string(self.dir.join(name)).unwrap()
    }

    pub fn mode(&self, name: &str, mode: u32) {
        fs_err::set_permissions(self.dir.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }

    pub fn link(&self, name: &str, target: &str) {
        let path = self.dir.join(name);
        self.folders(path.parent().unwrap());
        let _ = fs_err::remove_file(&path);
        fs_err::os::unix::fs::symlink(target, &path).unwrap();
        self.user.own(&path);
    }

    /// Replaces text in a file of the project; the text must be there.
    #[track_caller]
    pub fn edit(&self, name: &str, old: &str, new: &str) {
        let text = self.read(name);
        assert!(text.contains(old), "{name} has no `{old}`:\n{text}");
        self.write(name, text.replacen(old, new, 1));
    }

    /// Changes a file's bytes (to others of the same number) and puts its times back.
    pub fn edit_stealthily(&self, name: &str, old: &str, new: &str) {
        assert_eq!(old.len(), new.len(), "the size must stay");
        let path = self.dir.join(name);
        let meta = fs_err::metadata(&path).unwrap();
        self.edit(name, old, new);
        let file = fs_err::OpenOptions::new().write(true).open(&path).unwrap();
        let times = std::fs::FileTimes::new().set_accessed(meta.accessed().unwrap()).set_modified(meta.modified().unwrap());
        file.into_parts().0.set_times(times).unwrap();
    }

    /// Copies a tree into the project: folders, files with their mode, links.
    pub fn copy(&self, from: &Path, to: &str) {
        self.folders(&self.dir.join(to));
        for entry in fs_err::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            let name = format!("{to}/{}", entry.file_name().to_str().unwrap());
            let meta = entry.metadata().unwrap();
            if meta.is_dir() {
                if entry.file_name() != "__pycache__" && entry.file_name() != "node_modules" {
                    self.copy(&entry.path(), &name);
                }
            } else if meta.is_symlink() {
                self.link(&name, fs_err::read_link(entry.path()).unwrap().to_str().unwrap());
            } else {
                self.write(&name, fs_err::read(entry.path()).unwrap());
                self.mode(&name, meta.mode() & 0o777);
            }
        }
    }

    /// A program of this machine, run as the project's user in its folder.
    pub fn program(&self, program: &str) -> Run {
        Run::new(self.user, program, &self.home, &self.dir)
    }

    /// Git in the project's folder, the same commits on every day.
    pub fn git(&self, args: &[&str]) -> Answer {
        self.git_in(&self.dir, args)
    }

    pub fn git_in(&self, dir: &Path, args: &[&str]) -> Answer {
        tool("git", "git");
        let mut run = self.program("git").dir(dir).args(&["-c", "protocol.file.allow=always", "-c", "init.defaultBranch=main"]);
        for role in ["AUTHOR", "COMMITTER"] {
            for (what, value) in [("NAME", "Test"), ("EMAIL", "test@example.org"), ("DATE", "2024-05-06T07:08:09Z")] {
                run = run.env(&format!("GIT_{role}_{what}"), value);
            }
        }
        run.args(args).ok()
    }

    /// The program under test, on the project's store.
    pub fn pipeline<S: AsRef<OsStr>>(&self, args: &[S]) -> Run {
        self.program(binary().to_str().unwrap()).arg("--root").arg(&self.root).args(args)
    }

    /// The program under test without `--root`.
    pub fn bare<S: AsRef<OsStr>>(&self, args: &[S]) -> Run {
        self.program(binary().to_str().unwrap()).args(args)
    }

    /// Builds, and fails the test when that fails.
    #[track_caller]
    pub fn build(&self, args: &[&str]) -> Built {
        built(&self.pipeline(&["build", "--json"]).args(args).ok())
    }

    /// The answer of a verb with `--json`.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        self.pipeline(&["--json"]).args(args).ok().json()
    }

    /// What `explain` gives as the reasons of each step that runs or ran: `step: reason`.
    #[track_caller]
    pub fn explained(&self, args: &[&str]) -> Vec<String> {
        let value = self.pipeline(&["explain", "--json"]).args(args).ok().json();
        let steps = value["steps"].as_array().unwrap().clone();
        let reasons = |step: &Value| -> Vec<String> {
            let name = step["step"].as_str().unwrap();
            step["changes"].as_array().unwrap().iter().map(|change| format!("{name}: {}", change.as_str().unwrap())).collect()
        };
        steps.iter().flat_map(reasons).collect()
    }

    /// The files of an image, as `tar` would list them: path → kind and mode (`-755`), target for links.
    pub fn layer_paths(&self, image: &str) -> Vec<Vec<String>> {
        let shown = self.json(&["artifact", "show", image]);
        shown["layers"].as_array().unwrap().iter().map(|layer| self.layer(layer["digest"].as_str().unwrap()).keys().cloned().collect()).collect()
    }

    /// A layer's files: path → content.
    pub fn layer(&self, digest: &str) -> BTreeMap<String, Vec<u8>> {
        let bytes = fs_err::read(self.root.join("store/blobs/sha256").join(digest.trim_start_matches("sha256:"))).unwrap();
        let plain: Vec<u8> = match bytes.get(..2) {
            Some([0x1f, 0x8b]) => {
                let mut plain = Vec::new();
                flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).unwrap();
                plain
            }
            _ => zstd::decode_all(bytes.as_slice()).unwrap(),
        };
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(plain.as_slice()).entries().unwrap() {
            let mut entry = entry.unwrap();
            let path = String::from_utf8_lossy(&entry.path_bytes()).trim_end_matches('/').to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            files.insert(path, content);
        }
        files
    }

    /// Fails the test when anything of a build is left: see [`leftovers`].
    #[track_caller]
    pub fn assert_clean(&self) {
        let mut found = leftovers(&self.root);
        let patience = Instant::now() + Duration::from_secs(3);
        while !found.is_empty() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(50));
            found = leftovers(&self.root);
        }
        assert!(found.is_empty(), "left over: {found:#?}");
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let Some(temp) = self.temp.take() else { return };
        if !tests_are_root() && self.root.starts_with(temp.path()) && self.root.exists() {
            remove_tree(&self.root);
        }
        if std::thread::panicking() && std::env::var_os("PIPELINE_TEST_KEEP").is_some() {
            let _ = temp.keep();
        }
    }
}

/// Removes a store of the tests' own user: its trees belong to subordinate ids.
pub fn remove_tree(path: &Path) {
    if tests_are_root() {
        let _ = fs_err::remove_dir_all(path);
    } else {
        let _ = Cmd::new("unshare").args(["--user", "--map-auto", "--map-root-user", "rm", "-rf"]).arg(path).run();
    }
}

/// The values of an answer of `build --json`.
#[track_caller]
pub fn built(answer: &Answer) -> Built {
    let value = answer.json();
    let steps = value["steps"].as_array().unwrap();
    let name = |step: &Value| step["step"].as_str().unwrap().to_string();
    Built {
        digest: value["digest"].as_str().unwrap().into(),
        ran: steps.iter().filter(|step| step["ran"] == true).map(name).collect(),
        steps: steps.iter().map(name).collect(),
    }
}

/// The store that all tests of a user share. What it has remembered is for one binary only:
/// another one runs every step again, with the downloaded packages.
fn test_store(user: User) -> PathBuf {
    static CHECKED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    let dir = match user {
        User::Ordinary if tests_are_root() => {
            let (_, _, home) = test_user();
            home.join(format!("test-store-{}", &Digest::of(repository().as_os_str().as_encoded_bytes()).hex()[..12]))
        }
        _ => Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("test-store"),
    };
    let root = dir.join("root");
    let mut checked = CHECKED.lock().unwrap();
    if !checked.contains(&root) {
        for dir in [dir.clone(), root.with_extension("locks")] {
            fs_err::create_dir_all(&dir).unwrap();
            user.own(&dir);
        }
        let _lock = Lock::wait(&dir.join(".guard"), Hold::Exclusive).unwrap();
        let stamp = dir.join("binary");
        if fs_err::read_to_string(&stamp).ok() != Some(binary_digest()) {
            for stale in [root.join("cache/steps"), root.join("state/builds"), root.with_extension("locks")] {
                for entry in fs_err::read_dir(&stale).into_iter().flatten().flatten() {
                    fs_err::remove_file(entry.path()).unwrap();
                }
            }
            fs_err::write(&stamp, binary_digest()).unwrap();
        }
        checked.push(root.clone());
    }
    root
}

/// The steps of [`Project::tiny`].
pub const TINY_STEPS: [&str; 3] = ["base", "dependencies", "application"];
const TINY: &str = "\
name: tiny
base:
  tar: base.tar
runtime:
  builder: ./builder
source:
  path: src
image:
  port: 8080
  health:
    http: /
    deadline: 20s
";
const TINY_BUILDER: &str = "\
name: tiny
summary: Pages served by busybox, for tests
dependencies: { inputs: [lock.txt] }
workdir: /opt/app
user: \"1001:0\"
port: 8080
";
const TINY_DEPENDENCIES: &str = "#!/bin/sh\nset -eu\nmkdir -p /opt/dependencies\ncp /tmp/src/lock.txt /opt/dependencies/installed\nchmod -R u+rwX,go+rX,go-w /opt\n";
const TINY_ASSEMBLE: &str = "#!/bin/sh\nset -eu\numask 022\nmkdir -p /opt/app\ncp -a /tmp/src/. /opt/app\ndate > /dev/null\necho assembled\n";
// PID 1 gets only the signals it asked for.
const TINY_RUN: &str = "#!/bin/sh\nhttpd -f -p ${PORT:-8080} -h /opt/app &\ntrap 'kill $!; exit 130' INT\ntrap 'kill $!; exit 143' TERM\nwait\n";

/// A root file system of Debian's busybox-static: a tar, the same bytes in every test.
pub fn tiny_base() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        tool("busybox", "busybox-static");
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(Path::new).find(|path| path.exists()).expect("`busybox` is missing: apt-get install busybox-static");
        let program = fs_err::read(busybox).unwrap();
        assert!(!program[..4096].windows(12).any(|window| window == b"ld-linux-x86"), "busybox needs libraries: apt-get install busybox-static");
        let mut tar = tar::Builder::new(Vec::new());
        let header = |kind: tar::EntryType, mode: u32, size: usize| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_size(size as u64);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            header
        };
        for (path, mode) in [("bin", 0o755), ("etc", 0o755), ("dev", 0o755), ("proc", 0o755), ("sys", 0o755), ("run", 0o755), ("usr", 0o755), ("usr/bin", 0o755), ("var", 0o755), ("root", 0o700), ("tmp", 0o1777)] {
            tar.append_data(&mut header(tar::EntryType::Directory, mode, 0), format!("{path}/"), std::io::empty()).unwrap();
        }
        tar.append_data(&mut header(tar::EntryType::Regular, 0o755, program.len()), "bin/busybox", program.as_slice()).unwrap();
        let applets = Cmd::new(busybox).arg("--list").text().unwrap();
        let mut applets: Vec<&str> = applets.lines().filter(|name| *name != "busybox").collect();
        applets.sort_unstable();
        for applet in applets {
            tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), format!("bin/{applet}"), "busybox").unwrap();
        }
        for (path, text) in [("etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndefault:x:1001:0:default:/opt/app:/bin/sh\n"), ("etc/group", "root:x:0:\n")] {
            tar.append_data(&mut header(tar::EntryType::Regular, 0o644, text.len()), path, text.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    })
}

// --------------------------------------------------------------------------------------- network

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// `GET path` on 127.0.0.1, asked again until it answers; status and body.
#[track_caller]
pub fn get(port: u16, path: &str) -> (u16, String) {
    let patience = Instant::now() + Duration::from_secs(60);
    loop {
        match try_get(port, path) {
            Ok(answer) => return answer,
            Err(error) if Instant::now() > patience => panic!("http://127.0.0.1:{port}{path}: {error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn try_get(port: u16, path: &str) -> Result<(u16, String), String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).map_err(|error| error.to_string())?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).map_err(|error| error.to_string())?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes()).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").ok_or("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or("no status")?;
    Ok((status, body.into()))
}

// -------------------------------------------------------------------------------------- leftovers

/// What a build has left behind below `root` and in the kernel; empty is good.
pub fn leftovers(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for dir in ["cache/work", "store/.tmp"] {
        for entry in fs_err::read_dir(root.join(dir)).into_iter().flatten().flatten() {
            found.push(format!("file {}", entry.path().display()));
        }
    }
    temporary(root, 4, &mut found);
    let text = root.to_str().unwrap();
    for process in fs_err::read_dir("/proc").unwrap().flatten() {
        let dir = process.path();
        if !process.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) || process.file_name() == *std::process::id().to_string() {
            continue;
        }
        let read = |name: &str| fs_err::read(dir.join(name)).unwrap_or_default();
        let cmdline = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let holds = |name: &str| fs_err::read_link(dir.join(name)).is_ok_and(|target| target.starts_with(root));
        let open = || fs_err::read_dir(dir.join("fd")).into_iter().flatten().flatten().any(|fd| fs_err::read_link(fd.path()).is_ok_and(|target| target.starts_with(root)));
        if cmdline.contains(text) || holds("cwd") || holds("root") || open() {
            found.push(format!("process {} {cmdline}", process.file_name().to_string_lossy()));
        } else if String::from_utf8_lossy(&read("mountinfo")).contains(text) {
            found.push(format!("mounts of process {} {cmdline}", process.file_name().to_string_lossy()));
        }
    }
    found
}

/// Temporary names anywhere in the store, `depth` folders deep, but not in trees.
fn temporary(dir: &Path, depth: u32, found: &mut Vec<String>) {
    for entry in fs_err::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if [".tmp-", ".new-", ".export-", ".tmp."].iter().any(|prefix| name.starts_with(prefix)) {
            found.push(format!("file {}", entry.path().display()));
        }
        if depth > 0 && name != "root" && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            temporary(&entry.path(), depth - 1, found);
        }
    }
}
