//! What the integration tests share: people, projects, running the program, looking for leftovers.
//!
//! A test says for whom it runs ([`users`]: root and an ordinary user when the tests run as root,
//! else only the one they run as), makes a [`Project`] in a folder of its own with a store of its
//! own, and runs the built binary on it in an environment that holds nothing of the caller's but
//! `PATH` and what the network needs. A tool that is missing fails the test and names its package.
#![allow(dead_code, unused_imports, reason = "each test binary uses a part")]

mod look;
mod project;
mod run;

use std::ffi::OsString;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use pipeline::artifact::store::{Hold, Lock};
use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;

pub use look::*;
pub use project::*;
pub use run::*;

/// The ordinary user of tests that run as root, unless `PIPELINE_TEST_USER` names another.
const TEST_USER: &str = "pipeline-test";
/// What the network of this machine needs to be known to programs; the rest of the environment stays out.
const PASSED: [&str; 22] = [
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "PIP_TRUSTED_HOST",
    "PIP_DEFAULT_TIMEOUT",
    "npm_config_registry",
    "NPM_CONFIG_REGISTRY",
    "UV_INDEX_URL",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
];

/// For whom the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    Root,
    Ordinary,
}

/// Everybody a test can run as. With `PIPELINE_TEST_USER`, the second round of `tools/test`, only that ordinary user.
pub fn users() -> Vec<User> {
    if tests_are_root() && std::env::var_os("PIPELINE_TEST_USER").is_none() {
        vec![User::Root, User::Ordinary]
    } else {
        vec![User::Ordinary]
    }
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
                ["setpriv".to_string(), format!("--reuid={uid}"), format!("--regid={gid}"), "--init-groups".into()]
                    .map(OsString::from)
                    .to_vec()
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
        let row = || {
            fs_err::read_to_string("/etc/passwd")
                .unwrap()
                .lines()
                .find(|line| line.starts_with(&format!("{name}:")))
                .map(String::from)
        };
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
        assert_eq!(
            fs_err::metadata(&dir).unwrap().uid(),
            rustix::process::geteuid().as_raw(),
            "{} belongs to somebody else",
            dir.display()
        );
        fs_err::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
        let place = dir.join(format!("pipeline-{}", &binary_digest()[..16]));
        if !place.exists() {
            let temp = tempfile::Builder::new().prefix(".new-").tempfile_in(&dir).unwrap();
            fs_err::copy(built, temp.path()).unwrap();
            fs_err::set_permissions(temp.path(), PermissionsExt::from_mode(0o755)).unwrap();
            // Closed before it is executed: a file that is open for writing is busy.
            temp.into_temp_path().persist(&place).unwrap();
            let old = |entry: &fs_err::DirEntry| {
                entry.path() != place
                    && entry.metadata().is_ok_and(|meta| {
                        meta.modified().is_ok_and(|time| time.elapsed().is_ok_and(|age| age > Duration::from_secs(3600)))
                    })
            };
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
