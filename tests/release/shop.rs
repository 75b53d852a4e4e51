//! A pipeline with environments, and people who decide about it.

use std::path::PathBuf;

use serde_json::Value;

use super::common::{Answer, Project, Run, User, tool};

/// Three environments in a row, the first two by themselves.
pub const ROW: &str = "\
environments:
  dev: { automatic: true }
  stage: { from: dev, automatic: true, config: { LEVEL: debug } }
  prod:
    from: stage
    config: { LEVEL: info, REGION: north }
    secrets: { TOKEN: { env: TOKEN } }
";

/// A pipeline `tiny` with environments, and people who decide about it.
pub struct Shop {
    pub project: Project,
    builds: std::cell::Cell<u32>,
}

impl Shop {
    /// With `environments` in the pipeline file, in the ledger.
    pub fn new(user: User, environments: &str) -> Self {
        let shop = Self::without(user, environments);
        shop.verb(&["environment", "apply"]).ok();
        shop
    }

    pub fn without(user: User, environments: &str) -> Self {
        let shop = Self { project: Project::tiny(user), builds: 0.into() };
        let text = shop.project.read("pipeline.yaml");
        shop.project.write("pipeline.yaml", text + environments);
        shop
    }

    /// The program, as alice calls it.
    pub fn verb<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Run {
        self.by("alice", args)
    }

    pub fn by<S: AsRef<std::ffi::OsStr>>(&self, who: &str, args: &[S]) -> Run {
        self.project.pipeline(args).env("GIT_AUTHOR_NAME", who).env("GIT_AUTHOR_EMAIL", format!("{who}@example.org"))
    }

    /// With the key of `who`, as [`Shop::key`] made it.
    pub fn signed<S: AsRef<std::ffi::OsStr>>(&self, who: &str, args: &[S]) -> Run {
        self.by(who, args).env("PIPELINE_SIGNING_KEY", self.project.beside("keys").join(who))
    }

    /// Makes an SSH key; its public line.
    pub fn key(&self, who: &str) -> String {
        tool("ssh-keygen", "openssh-client");
        let file = self.project.beside("keys").join(who);
        self.project.program("ssh-keygen").args(&["-q", "-t", "ed25519", "-N", "", "-C", who, "-f"]).arg(&file).ok();
        fs_err::read_to_string(file.with_extension("pub")).unwrap().trim().into()
    }

    pub fn build(&self, version: &str, args: &[&str]) -> Run {
        self.builds.set(self.builds.get() + 1);
        self.project.write("src/index.html", format!("<h1>{}</h1>\n", self.builds.get()));
        self.verb(&["build", "--release", "--release-version", version]).args(args)
    }

    /// A release; its digest.
    pub fn release(&self, version: &str) -> String {
        let answer = self.build(version, &["--json"]).ok();
        answer.json()["release"]["release"]["digest"].as_str().unwrap().into()
    }

    /// What `status --json` says of `tiny/ENVIRONMENT`.
    pub fn at(&self, environment: &str) -> Value {
        let name = format!("tiny/{environment}");
        self.verb(&["--json", "status", &name]).ok().json()["environments"][0].clone()
    }

    /// The version in an environment.
    pub fn version(&self, environment: &str) -> String {
        self.at(environment)["version"].as_str().unwrap_or("nothing").into()
    }

    pub fn versions(&self) -> [String; 3] {
        ["dev", "stage", "prod"].map(|environment| self.version(environment))
    }

    pub fn ledger(&self) -> PathBuf {
        let answer = self.verb(&["--json", "ledger", "path"]).ok();
        answer.json()["path"].as_str().unwrap().into()
    }

    pub fn tip(&self) -> String {
        self.project.git_in(&self.ledger(), &["rev-parse", "main"]).stdout.trim().into()
    }

    /// Does nothing, whatever it says.
    #[track_caller]
    pub fn nothing_changes(&self, work: impl FnOnce() -> Answer) -> Answer {
        let before = self.tip();
        let answer = work();
        assert_eq!(self.tip(), before, "{}{}", answer.stdout, answer.stderr);
        answer
    }

    /// Refused by what no gate can change: `error: …`, exit 1.
    #[track_caller]
    pub fn refused(&self, run: Run, message: &str, hint: &str) {
        self.fails(run, 1, message, hint);
    }

    #[track_caller]
    pub fn fails(&self, run: Run, code: i32, message: &str, hint: &str) {
        let answer = self.nothing_changes(|| run.run());
        answer.code(code).says(&format!("error: {message}")).says(hint);
        let errors = answer.stderr.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(errors == 1 && answer.stdout.is_empty(), "{}{}", answer.stdout, answer.stderr);
    }

    /// The state file of an environment, as Git has it.
    pub fn state(&self, environment: &str) -> Value {
        let path = format!("main:tiny/{environment}.json");
        self.project.git_in(&self.ledger(), &["show", &path]).json()
    }

    pub fn is_sound(&self) {
        self.verb(&["ledger", "verify"]).ok().prints("sound: ");
        self.project.git_in(&self.ledger(), &["fsck", "--strict", "--full", "--no-progress"]);
    }
}

/// The answers of the gates in an outcome: `gate verdict`.
pub fn answers(answer: &Answer) -> Vec<String> {
    let value = answer.json();
    let answers = value["outcome"]["plan"]["answers"].as_array().unwrap();
    answers.iter().map(|one| format!("{} {}", one["gate"].as_str().unwrap(), one["verdict"].as_str().unwrap())).collect()
}
