//! The pipeline file as read → the checked [`Pipeline`]: everything its types cannot say.
//!
//! All problems are noted, each at its place; where a value is wrong the check goes on with a stand-in, so the
//! result is only given out when nothing was found. Looks at the files the pipeline names; opens none.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use super::diagnostic::{Findings, quoted, suggestion};
use super::file::{self, PipelineFile};
use super::syntax::{self, GitAddress, Wrong};
use super::types::{
    Base, Build, BuilderRef, Compression, Configure, Debian, Health, HealthCheck, Image, Limits, Name, Network, Pipeline,
    Repository, Runtime, Secret, SecretSource, Source, Suite,
};
use super::yaml::Place;

/// Time of one step when nothing is written.
const TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// Time until the program must be healthy when nothing is written.
const DEADLINE: Duration = Duration::from_secs(60);

/// Names people use for suites, and ours.
const SUITE_ALIASES: [(&str, Suite); 5] = [
    ("12", Suite::Bookworm),
    ("13", Suite::Trixie),
    ("oldstable", Suite::Bookworm),
    ("stable", Suite::Trixie),
    ("unstable", Suite::Sid),
];

/// Folders of the image that are not the application's.
const SYSTEM_FOLDERS: [&str; 5] = ["/", "/proc", "/sys", "/dev", "/run/secrets"];

/// Checks `written`, read from `file` (absolute); `root` is the place of its document, `builders` the embedded ones.
/// The result means something only when `findings` is empty afterwards.
pub fn check(
    written: PipelineFile,
    root: &Place<'_>,
    file: &Path,
    builders: &[&str],
    findings: &mut Findings,
) -> Option<Pipeline> {
    let dir = file.parent().unwrap_or(Path::new("/")).to_owned();
    let mut checker = Checker { dir: &dir, builders, findings };
    let name = checker.name(&written.name, &root.key("name"));
    let base = checker.base(written.base, &root.key("base"));
    let is_scratch = matches!(base, Some(Base::Scratch));
    let runtime = checker.runtime(written.runtime, &root.key("runtime"), is_scratch);
    let source = checker.source(written.source, root);
    let build = checker.build(written.build.unwrap_or_default(), &root.key("build"), is_scratch);
    let configure = checker.configure(&written.configure, &root.key("configure"));
    let image = checker.image(written.image.unwrap_or_default(), &root.key("image"));
    let image_made =
        runtime.builder != BuilderRef::None || !runtime.packages.is_empty() || !configure.is_empty() || !image.command.is_empty();
    let host = written.host.map(|written| {
        host::fits(checker.findings, root, is_scratch, matches!(runtime.builder, BuilderRef::Image(_)));
        checker.host(written, &root.key("host"), name.as_ref(), image_made)
    });
    let (environments, people) = (written.environments, written.people);
    let releases = release::Written { environments, people, ledger: written.ledger, registry: written.registry };
    let has_image = host.is_none() || image_made;
    let makes = rollout::Makes { image: has_image, disk: host.is_some() };
    let around = release::Around { name: name.as_ref(), makes, volumes: &image.volumes };
    let releases = checker.releases(releases, root, &around);
    if !checker.findings.is_empty() {
        return None;
    }
    let (name, base, file) = (name?, base?, file.into());
    Some(Pipeline { name, file, base, runtime, source, build, configure, image, host, releases, dir })
}

/// Notes what `result` says is wrong at `place`.
pub(crate) fn note<T>(findings: &mut Findings, place: &Place<'_>, result: Result<T, Wrong>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(wrong) => {
            findings.add(place, wrong.message, wrong.hint);
            None
        }
    }
}

/// A list of package names: checked, sorted, without doubles.
pub(crate) fn packages(findings: &mut Findings, mut names: Vec<String>, place: &Place<'_>) -> Vec<String> {
    for (index, name) in names.iter().enumerate() {
        note(findings, &place.item(index), syntax::package(name));
    }
    names.sort_unstable();
    names.dedup();
    names
}

/// Variables: names and values a process can be given.
pub(crate) fn variables(findings: &mut Findings, variables: &BTreeMap<String, String>, place: &Place<'_>) {
    for (name, value) in variables {
        note(findings, &place.label(name), syntax::variable(name));
        if value.contains('\0') {
            findings.add(&place.key(name), format!("the value of `{name}` has a NUL byte in it"), None);
        }
    }
}

/// The suite `text` names.
pub(crate) fn suite(findings: &mut Findings, text: &str, place: &Place<'_>) -> Option<Suite> {
    let found = Suite::ALL.into_iter().find(|suite| suite.as_str() == text);
    if found.is_none() {
        let names = Suite::ALL.map(Suite::as_str);
        let alias = SUITE_ALIASES.iter().find(|(alias, _)| *alias == text);
        let hint = match alias {
            Some((_, suite)) => Some(format!("did you mean `{suite}`?")),
            None => suggestion(text, &names, "known suites are"),
        };
        findings.add(place, format!("`{text}` is not a Debian suite that is known here"), hint);
    }
    found
}

pub mod host;
pub mod release;
pub mod rollout;

struct Checker<'c> {
    dir: &'c Path,
    builders: &'c [&'c str],
    findings: &'c mut Findings,
}

impl Checker<'_> {
    fn name(&mut self, text: &str, place: &Place<'_>) -> Option<Name> {
        let hint = || Some(format!("for example `{}`", syntax::to_name(text)));
        text.parse().map_err(|message: String| self.findings.add(place, message, hint())).ok()
    }

    fn note<T>(&mut self, place: &Place<'_>, result: Result<T, Wrong>) -> Option<T> {
        note(self.findings, place, result)
    }

    /// Which of the keys `names` is the one that is written; notes none and several.
    fn exactly_one<'n>(&mut self, place: &Place<'_>, what: &str, names: &[&'n str]) -> Option<&'n str> {
        let there: Vec<&str> = names.iter().copied().filter(|name| place.key(name).is_there()).collect();
        match there.as_slice() {
            [one] => Some(one),
            [] => {
                self.findings.add_missing(place, format!("{what} needs one of {}", quoted(names)), None);
                None
            }
            [first, second, ..] => {
                let hint = Some(format!("keep one of {}", quoted(&there)));
                self.findings.add(&place.label(second), format!("{what} has `{first}` and `{second}`"), hint);
                None
            }
        }
    }

    /// A key that means something only beside another.
    fn only_with(&mut self, place: &Place<'_>, keys: &[&str], other: &str) {
        for key in keys.iter().filter(|key| place.key(key).is_there()) {
            self.findings.add(&place.label(key), format!("`{key}` goes with `{other}` only"), None);
        }
    }

    fn must_be_true(&mut self, place: &Place<'_>, key: &str, value: Option<bool>) {
        if value == Some(false) {
            self.findings.add(&place.key(key), format!("`{key}` is `true` or not there"), None);
        }
    }

    /// The absolute path of what `text` names, which must be there and pass `is_kind`.
    fn existing(&mut self, text: &str, place: &Place<'_>, kind: &str, is_kind: fn(&Path) -> bool) -> PathBuf {
        let path = join(self.dir, text);
        if text.is_empty() {
            self.findings.add(place, format!("a {kind} must be named here"), None);
        } else if !path.exists() {
            let hint = Some(format!("paths start at the folder of the pipeline file: {}", path.display()));
            self.findings.add(place, format!("the {kind} `{text}` does not exist"), hint);
        } else if !is_kind(&path) {
            self.findings.add(place, format!("`{text}` is not a {kind}"), None);
        }
        path
    }

    fn base(&mut self, base: file::Base, place: &Place<'_>) -> Option<Base> {
        let packages = packages(self.findings, base.packages, &place.key("packages"));
        let kind = self.exactly_one(place, "`base`", &["debian", "image", "oci", "tar", "scratch"]);
        self.must_be_true(place, "scratch", base.scratch);
        if kind.is_some() && kind != Some("debian") {
            self.only_with(place, &["mirror", "security_mirror", "repositories"], "debian");
        }
        match kind? {
            "debian" => {
                let suite = suite(self.findings, &base.debian?, &place.key("debian"));
                let mirrors = [("mirror", &base.mirror), ("security_mirror", &base.security_mirror)];
                for (key, mirror) in mirrors {
                    mirror.iter().for_each(|uri| self.archive(uri, &place.key(key)));
                }
                let repositories = self.repositories(base.repositories, &place.key("repositories"));
                let (mirror, security_mirror) = (base.mirror, base.security_mirror);
                Some(Base::Debian(Debian { suite: suite?, packages, mirror, security_mirror, repositories }))
            }
            "image" => {
                let reference = base.image?;
                self.note(&place.key("image"), syntax::image_reference(&reference))?;
                Some(Base::Image { reference, packages })
            }
            "oci" => {
                let (layout, tag) = self.layout(&base.oci?, &place.key("oci"));
                Some(Base::Oci { layout, tag, packages })
            }
            "tar" => {
                let file = self.existing(&base.tar?, &place.key("tar"), "file", Path::is_file);
                Some(Base::Tar { file, packages })
            }
            _ => {
                self.no_packages(place, !packages.is_empty());
                Some(Base::Scratch)
            }
        }
    }

    fn no_packages(&mut self, place: &Place<'_>, written: bool) {
        if written {
            let hint = Some("take `debian: trixie` as the base, or remove the packages".into());
            self.findings.add(&place.label("packages"), "packages cannot be installed on the base `scratch`", hint);
        }
    }

    /// The address of a Debian archive.
    fn archive(&mut self, uri: &str, place: &Place<'_>) {
        let scheme = uri.split_once("://").filter(|(_, rest)| !rest.is_empty()).map(|(scheme, _)| scheme);
        let known = scheme.is_some_and(|scheme| ["http", "https", "file"].contains(&scheme)) || uri.starts_with("file:/");
        if !known || uri.contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '[' | ']')) {
            let hint = Some("it begins with `https://`, `http://` or `file:///`".into());
            self.findings.add(place, format!("`{uri}` is not the address of a Debian archive"), hint);
        }
    }

    fn repositories(&mut self, repositories: Vec<file::Repository>, place: &Place<'_>) -> Vec<Repository> {
        let mut checked = Vec::new();
        for (index, repository) in repositories.into_iter().enumerate() {
            let place = place.item(index);
            self.archive(&repository.uri, &place.key("uri"));
            let components = match repository.components {
                none if none.is_empty() => vec!["main".into()],
                some => some,
            };
            let words = [(&repository.suite, place.key("suite"))];
            let components_place = place.key("components");
            let items = components.iter().enumerate().map(|(index, component)| (component, components_place.item(index)));
            for (word, place) in words.into_iter().chain(items) {
                if word.is_empty() || !word.chars().all(|c| c.is_ascii_alphanumeric() || "-._~/+:".contains(c)) {
                    self.findings.add(&place, format!("`{word}` is not the name of a suite or component"), None);
                }
            }
            let signed_by = self.existing(&repository.signed_by, &place.key("signed_by"), "file", Path::is_file);
            checked.push(Repository { uri: repository.uri, suite: repository.suite, components, signed_by });
        }
        checked
    }

    /// `FOLDER` or `FOLDER:TAG`; a folder of the whole name wins.
    fn layout(&mut self, text: &str, place: &Place<'_>) -> (PathBuf, Option<String>) {
        let split = text.rsplit_once(':').filter(|(_, tag)| !tag.is_empty() && !tag.contains('/'));
        let (folder, tag) = match split {
            Some((folder, tag)) if !join(self.dir, text).exists() => (folder, Some(tag.to_owned())),
            _ => (text, None),
        };
        let layout = self.existing(folder, place, "folder", Path::is_dir);
        if layout.is_dir() && !layout.join("oci-layout").is_file() {
            self.findings.add(place, format!("`{folder}` is not an OCI image layout: it has no file `oci-layout`"), None);
        }
        (layout, tag)
    }

    fn runtime(&mut self, runtime: Option<file::Runtime>, place: &Place<'_>, is_scratch: bool) -> Runtime {
        let runtime = runtime.unwrap_or_default();
        let packages = packages(self.findings, runtime.packages, &place.key("packages"));
        self.no_packages(place, is_scratch && !packages.is_empty());
        let builder = match (runtime.builder, runtime.image) {
            (Some(_), Some(_)) => {
                self.exactly_one(place, "`runtime`", &["builder", "image"]);
                BuilderRef::None
            }
            (Some(builder), None) => self.builder(builder, &place.key("builder")),
            (None, Some(image)) => {
                self.note(&place.key("image"), syntax::image_reference(&image));
                BuilderRef::Image(image)
            }
            (None, None) => BuilderRef::None,
        };
        Runtime { builder, packages }
    }

    fn builder(&mut self, text: String, place: &Place<'_>) -> BuilderRef {
        if text.starts_with('.') || text.contains('/') {
            let folder = self.existing(&text, place, "folder", Path::is_dir);
            if folder.is_dir() && !folder.join("builder.yaml").is_file() {
                let hint = Some("a builder is a folder with `builder.yaml` and `s2i/bin/`".into());
                self.findings.add(place, format!("the folder `{text}` has no `builder.yaml`"), hint);
            }
            return BuilderRef::Folder(folder);
        }
        if !self.builders.contains(&text.as_str()) {
            let hint = suggestion(&text, self.builders, "one in a folder of your own is written `./FOLDER`; known are");
            self.findings.add(place, format!("there is no builder `{text}`"), hint);
        }
        BuilderRef::Embedded(text)
    }

    fn source(&mut self, source: Option<file::Source>, root: &Place<'_>) -> Source {
        let place = root.key("source");
        let Some(source) = source else { return Source::Path(self.dir.into()) };
        if !root.key("runtime").is_there() {
            let hint = Some("name a builder: `runtime: { builder: … }`".into());
            self.findings.add_missing(&root.label("source"), "nothing uses `source` when there is no `runtime`", hint);
        }
        let dir = source.dir.filter(|dir| self.note(&place.key("dir"), syntax::inner_path(dir)).is_some());
        if source.path.is_some() && source.git.is_some() {
            self.exactly_one(&place, "`source`", &["path", "git"]);
        }
        let Some(url) = source.git else {
            self.only_with(&place, &["ref", "submodules"], "git");
            let path = match &source.path {
                Some(path) => self.existing(path, &place.key("path"), "folder", Path::is_dir),
                None => self.dir.into(),
            };
            return match dir {
                Some(dir) if path.is_dir() => {
                    if !path.join(&dir).is_dir() {
                        let message = format!("the folder `{dir}` does not exist in {}", path.display());
                        self.findings.add(&place.key("dir"), message, None);
                    }
                    Source::Path(join(&path, &dir))
                }
                _ => Source::Path(path),
            };
        };
        let url = match self.note(&place.key("git"), syntax::git_address(&url)) {
            Some(GitAddress::Folder) => {
                self.existing(&url, &place.key("git"), "folder", Path::is_dir).to_string_lossy().into_owned()
            }
            _ => url,
        };
        if let Some(reference) = &source.reference {
            self.note(&place.key("ref"), syntax::git_reference(reference));
        }
        let (reference, dir) = (source.reference, dir.map(|dir| join(Path::new(""), &dir)));
        Source::Git { url, reference, dir, submodules: source.submodules.unwrap_or(true) }
    }

    fn build(&mut self, build: file::Build, place: &Place<'_>, is_scratch: bool) -> Build {
        variables(self.findings, &build.env, &place.key("env"));
        let packages = packages(self.findings, build.packages, &place.key("packages"));
        self.no_packages(place, is_scratch && !packages.is_empty());
        let secrets = self.secrets(build.secrets, &place.key("secrets"));
        let timeout = self.duration(build.timeout, &place.key("timeout"), TIMEOUT);
        let limits = self.limits(build.limits.unwrap_or_default(), &place.key("limits"));
        let (trust, network) = (build.trust.unwrap_or(true), build.network.unwrap_or(Network::None));
        Build { env: build.env, secrets, packages, trust, network, timeout, limits }
    }

    fn secrets(&mut self, secrets: Vec<file::Secret>, place: &Place<'_>) -> Vec<Secret> {
        let mut checked: Vec<Secret> = Vec::new();
        for (index, secret) in secrets.into_iter().enumerate() {
            let place = place.item(index);
            self.note(&place.key("id"), syntax::file_name(&secret.id));
            if checked.iter().any(|other| other.id == secret.id) {
                self.findings.add(&place.key("id"), format!("there is another secret `{}`", secret.id), None);
            }
            if let Some(name) = &secret.env {
                self.note(&place.key("env"), syntax::variable(name));
            }
            if secret.file.as_deref() == Some("") {
                self.findings.add(&place.key("file"), "a file must be named here", None);
            }
            self.exactly_one(&place, "a secret", &["env", "file"]);
            let from = match (secret.env, secret.file) {
                (Some(name), _) => SecretSource::Env(name),
                (None, file) => SecretSource::File(join(self.dir, file.unwrap_or_default())),
            };
            checked.push(Secret { id: secret.id, from });
        }
        checked
    }

    fn duration(&mut self, text: Option<String>, place: &Place<'_>, default: Duration) -> Duration {
        text.and_then(|text| self.note(place, syntax::duration(&text))).unwrap_or(default)
    }

    fn limits(&mut self, limits: file::Limits, place: &Place<'_>) -> Limits {
        let memory = limits.memory.and_then(|text| self.note(&place.key("memory"), syntax::size(&text)));
        let file_size = limits.file_size.and_then(|text| self.note(&place.key("file_size"), syntax::size(&text)));
        Limits { memory, processes: limits.processes, file_size }
    }

    fn configure(&mut self, steps: &[file::Configure], place: &Place<'_>) -> Vec<Configure> {
        let mut checked = Vec::new();
        for (index, step) in steps.iter().enumerate() {
            let place = place.item(index);
            self.exactly_one(&place, "a configure step", &["shell", "ansible"]);
            if let Some(script) = &step.shell {
                checked.push(Configure::Shell(self.existing(script, &place.key("shell"), "file", Path::is_file)));
            }
            if let Some(playbook) = &step.ansible {
                checked.push(Configure::Ansible(self.existing(playbook, &place.key("ansible"), "file", Path::is_file)));
            }
        }
        checked
    }

    fn image(&mut self, image: file::Image, place: &Place<'_>) -> Image {
        self.command(&image.command, &place.key("command"));
        variables(self.findings, &image.env, &place.key("env"));
        if image.labels.contains_key("") {
            self.findings.add(&place.key("labels").label(""), "a label needs a name", None);
        }
        if let Some(user) = &image.user {
            self.note(&place.key("user"), syntax::user(user));
        }
        if let Some(workdir) = &image.workdir {
            self.note(&place.key("workdir"), syntax::image_path(workdir));
        }
        self.volumes(&image.volumes, &place.key("volumes"));
        let health = image.health.and_then(|health| self.health(health, place));
        Image {
            command: image.command,
            env: image.env,
            labels: image.labels,
            port: image.port,
            user: image.user,
            workdir: image.workdir,
            volumes: image.volumes,
            health,
            compression: image.compression.unwrap_or(Compression::Zstd),
        }
    }

    fn command(&mut self, command: &[String], place: &Place<'_>) {
        if command.first().is_some_and(String::is_empty) {
            self.findings.add(&place.item(0), "the program to run has no name", None);
        }
        for index in (0..command.len()).filter(|index| command[*index].contains('\0')) {
            self.findings.add(&place.item(index), "an argument has a NUL byte in it", None);
        }
    }

    fn volumes(&mut self, volumes: &[String], place: &Place<'_>) {
        let plain = |path: &str| Path::new(path).components().collect::<PathBuf>();
        for (index, volume) in volumes.iter().enumerate() {
            let here = place.item(index);
            if self.note(&here, syntax::image_path(volume)).is_none() {
                continue;
            }
            if SYSTEM_FOLDERS.iter().any(|folder| plain(volume) == Path::new(folder)) {
                self.findings.add(&here, format!("`{volume}` cannot be a volume"), None);
            } else if volumes[..index].iter().any(|other| plain(other) == plain(volume)) {
                self.findings.add(&here, format!("the volume `{volume}` is here twice"), None);
            }
        }
    }

    fn url_path(&mut self, path: &str, place: &Place<'_>) {
        if !path.starts_with('/') || path.contains(|c: char| c.is_whitespace() || c.is_control()) {
            let hint = Some("it begins with `/`, like `/healthz`".into());
            self.findings.add(place, format!("`{path}` is not a path of a URL"), hint);
        }
    }

    /// `image` is the place of the image, for the port.
    fn health(&mut self, health: file::Health, image: &Place<'_>) -> Option<Health> {
        let place = image.key("health");
        let deadline = self.duration(health.deadline, &place.key("deadline"), DEADLINE);
        let kind = self.exactly_one(&place, "`health`", &["http", "tcp", "command"]);
        self.must_be_true(&place, "tcp", health.tcp);
        if let Some(path) = &health.http {
            self.url_path(path, &place.key("http"));
        }
        if let Some(kind @ ("http" | "tcp")) = kind
            && !image.key("port").is_there()
        {
            let hint = Some("write the port the program listens on, like `port: 8080`, below `image`".into());
            self.findings.add_missing(&place.label(kind), format!("health by `{kind}` needs `image.port`"), hint);
        }
        let check = match kind? {
            "http" => HealthCheck::Http(health.http?),
            "tcp" => HealthCheck::Tcp,
            _ => {
                let command = health.command?;
                if command.is_empty() {
                    self.findings.add(&place.label("command"), "the command is empty", None);
                }
                self.command(&command, &place.key("command"));
                HealthCheck::Command(command)
            }
        };
        Some(Health { check, deadline })
    }
}

/// `path` below `dir` without `.`; `..` is resolved by the file system, so that symbolic links count.
pub(crate) fn join(dir: &Path, path: impl AsRef<Path>) -> PathBuf {
    let path: PathBuf = dir.join(path).components().filter(|part| *part != Component::CurDir).collect();
    if !path.components().any(|part| part == Component::ParentDir) {
        return path;
    }
    fs_err::canonicalize(&path).unwrap_or(path)
}

#[cfg(test)]
mod tests;
