//! A folder with a pipeline, a store and a home of its own; the small base; the shared store of Debian bases.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use pipeline::artifact::store::{Hold, Lock};
use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;
use serde_json::Value;

use super::{Answer, Run, User, binary, binary_digest, leftovers, repository, test_user, tests_are_root, tool};

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
        let project =
            Self { user, dir: path.join("project"), home: path.join("home"), root: path.join("root"), temp: Some(temp) };
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
        shown["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| self.layer(layer["digest"].as_str().unwrap()).keys().cloned().collect())
            .collect()
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
const TINY_ASSEMBLE: &str =
    "#!/bin/sh\nset -eu\numask 022\nmkdir -p /opt/app\ncp -a /tmp/src/. /opt/app\ndate > /dev/null\necho assembled\n";
// PID 1 gets only the signals it asked for.
const TINY_RUN: &str =
    "#!/bin/sh\nhttpd -f -p ${PORT:-8080} -h /opt/app &\ntrap 'kill $!; exit 130' INT\ntrap 'kill $!; exit 143' TERM\nwait\n";

/// A root file system of Debian's busybox-static: a tar, the same bytes in every test.
pub fn tiny_base() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        tool("busybox", "busybox-static");
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.exists())
            .expect("`busybox` is missing: apt-get install busybox-static");
        let program = fs_err::read(busybox).unwrap();
        assert!(
            !program[..4096].windows(12).any(|window| window == b"ld-linux-x86"),
            "busybox needs libraries: apt-get install busybox-static"
        );
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
        for (path, mode) in [
            ("bin", 0o755),
            ("etc", 0o755),
            ("dev", 0o755),
            ("proc", 0o755),
            ("sys", 0o755),
            ("run", 0o755),
            ("usr", 0o755),
            ("usr/bin", 0o755),
            ("var", 0o755),
            ("root", 0o700),
            ("tmp", 0o1777),
        ] {
            tar.append_data(&mut header(tar::EntryType::Directory, mode, 0), format!("{path}/"), std::io::empty()).unwrap();
        }
        tar.append_data(&mut header(tar::EntryType::Regular, 0o755, program.len()), "bin/busybox", program.as_slice()).unwrap();
        let applets = Cmd::new(busybox).arg("--list").text().unwrap();
        let mut applets: Vec<&str> = applets.lines().filter(|name| *name != "busybox").collect();
        applets.sort_unstable();
        for applet in applets {
            tar.append_link(&mut header(tar::EntryType::Symlink, 0o777, 0), format!("bin/{applet}"), "busybox").unwrap();
        }
        for (path, text) in [
            ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndefault:x:1001:0:default:/opt/app:/bin/sh\n"),
            ("etc/group", "root:x:0:\n"),
        ] {
            tar.append_data(&mut header(tar::EntryType::Regular, 0o644, text.len()), path, text.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    })
}
