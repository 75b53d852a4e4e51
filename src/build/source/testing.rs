//! For the tests: Git repositories made with the `git` program, untouched by the caller's configuration.

use std::path::{Path, PathBuf};

use crate::cmd::Cmd;

/// A repository in a temporary folder.
pub struct Repo {
    pub dir: tempfile::TempDir,
}

impl Repo {
    /// An empty repository on the branch `main`.
    pub fn new() -> Self {
        let repo = Self { dir: tempfile::tempdir().unwrap() };
        repo.git(&["init", "-q"]);
        repo
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().canonicalize().unwrap()
    }

    pub fn url(&self) -> String {
        format!("file://{}", self.path().display())
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path().join(path);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, text).unwrap();
    }

    /// Commits everything; the id.
    pub fn commit(&self, message: &str) -> String {
        self.git(&["add", "-A"]);
        self.git(&["commit", "-q", "--allow-empty", "-m", message]);
        self.git(&["rev-parse", "HEAD"])
    }

    pub fn git(&self, args: &[&str]) -> String {
        git(&self.path(), args)
    }
}

/// Runs `git` in `dir`; what it prints, trimmed. Commits are of 2024-05-06 07:08:09 UTC by `Test Er <test@example.org>`.
pub fn git(dir: &Path, args: &[&str]) -> String {
    let config = ["-c", "init.defaultBranch=main", "-c", "protocol.file.allow=always", "-c", "commit.gpgSign=false"];
    let env = [
        ("GIT_CONFIG_GLOBAL", "/dev/null"),
        ("GIT_CONFIG_NOSYSTEM", "1"),
        ("GIT_AUTHOR_NAME", "Test Er"),
        ("GIT_AUTHOR_EMAIL", "test@example.org"),
        ("GIT_AUTHOR_DATE", "2024-05-06T07:08:09Z"),
        ("GIT_COMMITTER_NAME", "Other"),
        ("GIT_COMMITTER_EMAIL", "other@example.org"),
        ("GIT_COMMITTER_DATE", "2024-05-06T07:08:09Z"),
    ];
    let cmd = Cmd::new("git").args(config).args(args).dir(dir);
    env.iter().fold(cmd, |cmd, (key, value)| cmd.env(key, value)).text().unwrap().trim().to_owned()
}

/// Seconds since 1970 of every commit made here.
pub const TIME: i64 = 1_714_979_289;
