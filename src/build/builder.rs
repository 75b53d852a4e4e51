//! A builder: a folder with `builder.yaml` and the source-to-image scripts that turn source into a runnable tree.
//!
//! ```text
//! NAME/builder.yaml           Meta
//! NAME/s2i/bin/assemble       required: builds and installs what lies in DESTINATION/src
//! NAME/s2i/bin/run            required: starts the application
//! NAME/s2i/bin/dependencies   with `dependencies:` in builder.yaml: installs from the lock files alone
//! NAME/s2i/bin/save-artifacts, usage, …   optional, and whatever the scripts call
//! ```
//! Comes from inside the binary or from a folder; both give the same value and the same digest. Hidden files and
//! editors' backups (`.x`, `x~`) are no part of it, nor are modes: scripts are executable in the image, all else is not.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use include_dir::{Dir, DirEntry};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::config::check::{note, packages, suite, variables};
use crate::config::diagnostic::{Diagnostic, Findings, quoted, render};
use crate::config::types::{BuilderRef, Name, Suite};
use crate::config::yaml::Place;
use crate::config::{embedded, shape, syntax, yaml};
use crate::error::Problem;
use crate::oci::digest::{Digest, Hasher};

/// The file that makes a folder a builder.
pub const META: &str = "builder.yaml";
/// The folder of the scripts in a builder.
const SCRIPTS: &str = "s2i/bin/";
/// Scripts no builder can do without.
const REQUIRED: [&str; 2] = ["assemble", "run"];
/// The optional script with a step and a layer of its own.
pub const DEPENDENCIES: &str = "dependencies";
/// Largest builder, in bytes: scripts, not programs; a larger folder is a mistake in the path.
const SIZE_MAX: u64 = 16 << 20;
/// Most files of a builder, for the same reason.
const FILES_MAX: usize = 1000;

/// `builder.yaml` as it is written.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MetaFile {
    /// Name of the builder: lower case letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// One line for people.
    pub summary: String,
    /// How `pipeline init` tells that a source folder is for this builder.
    #[serde(default)]
    pub detect: Option<Detect>,
    /// Debian suites it was made for. Default: all.
    #[serde(default)]
    pub suites: Vec<String>,
    /// Debian packages in the image.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Debian packages the steps need that do not go into the image.
    #[serde(default)]
    pub build_packages: Vec<String>,
    /// What the `dependencies` script sees.
    #[serde(default)]
    pub dependencies: Option<Dependencies>,
    /// Folder below which the source is put, as `src/`. Default: `/tmp`.
    #[serde(default)]
    pub destination: Option<String>,
    /// Folder of the scripts in the image. Default: `/usr/libexec/s2i`.
    #[serde(default)]
    pub scripts: Option<String>,
    /// Variables of steps and image.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Folder the program starts in. Default: `/opt/app`.
    #[serde(default)]
    pub workdir: Option<String>,
    /// `USER`, `UID` or `UID:GID` the image runs as; steps run as root. Default: `1001:0`.
    #[serde(default)]
    pub user: Option<String>,
    /// TCP port the program listens on when nothing else is said.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
}

/// Which source folders a builder is for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Detect {
    /// File names or globs (`*`, `?`) of which one is in the source's root, or in a folder of it as in `public/*.html`.
    pub any: Vec<String>,
    /// The builder with the highest wins. Default: 0.
    #[serde(default)]
    pub priority: u32,
}

/// The input of the `dependencies` script.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Dependencies {
    /// Globs (`*`, `?`, `**`) relative to the source's root: the only files the script sees.
    pub inputs: Vec<String>,
}

/// `builder.yaml`, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub name: Name,
    pub summary: String,
    pub detect: Option<Detect>,
    /// Empty: all.
    pub suites: Vec<Suite>,
    /// Sorted, without doubles.
    pub packages: Vec<String>,
    /// Sorted, without doubles.
    pub build_packages: Vec<String>,
    pub dependencies: Option<Dependencies>,
    /// The source is `DESTINATION/src`.
    pub destination: String,
    /// Folder of the scripts in the image.
    pub scripts: String,
    pub env: BTreeMap<String, String>,
    pub workdir: String,
    pub user: String,
    pub port: Option<u16>,
}

/// A builder with all its files in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Builder {
    pub meta: Meta,
    /// What lies below `s2i/bin/`, by its path there (`assemble`, `lib/pip.sh`): executable in the image.
    pub scripts: BTreeMap<String, Vec<u8>>,
    /// All files by their path in the builder, `builder.yaml` and scripts included.
    pub files: BTreeMap<String, Vec<u8>>,
}

impl Builder {
    /// The builder that `reference` names; none for an S2I builder image and for no builder.
    ///
    /// # Errors
    /// A usage problem: no such builder, a required script missing, or the diagnostics of its `builder.yaml`.
    pub fn load(reference: &BuilderRef) -> Result<Option<Self>> {
        match reference {
            BuilderRef::Embedded(name) => Self::embedded(name).map(Some),
            BuilderRef::Folder(folder) => Self::folder(folder).map(Some),
            BuilderRef::Image(_) | BuilderRef::None => Ok(None),
        }
    }

    /// The names of the builders inside the binary, sorted.
    pub fn names() -> Vec<&'static str> {
        embedded::builder_names()
    }

    /// The digest of all files: their paths and bytes, no modes.
    pub fn digest(&self) -> Digest {
        let mut hasher = Hasher::new();
        for (path, bytes) in &self.files {
            hasher.field(path).field(bytes);
        }
        hasher.finish()
    }

    /// Whether the file `path`, relative to the source's root, is for the `dependencies` script.
    pub fn is_dependency_input(&self, path: &str) -> bool {
        self.meta.dependencies.as_ref().is_some_and(|dependencies| dependencies.inputs.iter().any(|glob| matches(glob, path)))
    }

    fn embedded(name: &str) -> Result<Self> {
        let Some(dir) = embedded::builder(name) else {
            let problem = Problem::usage(format!("there is no builder `{name}`"));
            return Err(problem.hint(format!("known are {}", quoted(Self::names()))).into());
        };
        let mut files = BTreeMap::new();
        collect_embedded(dir, dir.path(), &mut files)?;
        Self::from_files(&Path::new("builders").join(name), files)
    }

    fn folder(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        collect_folder(folder, "", &mut files, &mut 0)?;
        Self::from_files(folder, files)
    }

    /// The builder made of `files`; `folder` is for messages.
    ///
    /// # Errors
    /// As for [`Builder::load`].
    pub fn from_files(folder: &Path, files: BTreeMap<String, Vec<u8>>) -> Result<Self> {
        let shown = folder.display();
        let Some(text) = files.get(META) else {
            return Err(Problem::usage(format!("the builder {shown} has no `{META}`")).into());
        };
        let text = std::str::from_utf8(text).map_err(|_| Problem::usage(format!("{shown}/{META} is not UTF-8")))?;
        let meta = parse(&folder.join(META), text).map_err(|diagnostics| Problem::usage(render(&diagnostics, Path::new(""))))?;
        let scripts: BTreeMap<String, Vec<u8>> =
            files.iter().filter_map(|(path, bytes)| Some((path.strip_prefix(SCRIPTS)?.to_owned(), bytes.clone()))).collect();
        let missing: Vec<&str> = REQUIRED.into_iter().filter(|name| !scripts.contains_key(*name)).collect();
        if !missing.is_empty() {
            let verb = if missing.len() == 1 { "is" } else { "are" };
            let problem =
                Problem::usage(format!("the builder `{}` is not whole: {} {verb} missing", meta.name, quoted(&missing)));
            return Err(problem.hint(format!("scripts lie in {shown}/{}", SCRIPTS.trim_end_matches('/'))).into());
        }
        match (&meta.dependencies, scripts.contains_key(DEPENDENCIES)) {
            (Some(_), false) => {
                let problem =
                    Problem::usage(format!("the builder `{}` has `dependencies:` in {META} but no such script", meta.name));
                Err(problem.hint(format!("write {shown}/{SCRIPTS}{DEPENDENCIES}, or remove the key")).into())
            }
            (None, true) => {
                let problem =
                    Problem::usage(format!("the builder `{}` has a script `{DEPENDENCIES}` but no inputs for it", meta.name));
                Err(problem.hint(format!("add `dependencies: {{ inputs: [LOCK-FILE] }}` to {shown}/{META}")).into())
            }
            _ => Ok(Self { meta, scripts, files }),
        }
    }
}

/// Reads and checks the text of a `builder.yaml`.
///
/// # Errors
/// Everything that is wrong, in order of position.
pub fn parse(file: &Path, text: &str) -> Result<Meta, Vec<Diagnostic>> {
    let tree = yaml::parse(file, text)?;
    let mut findings = Findings::new(tree.source.clone());
    let written = shape::read::<MetaFile>(&tree, &mut findings);
    findings.seal();
    let meta = written.and_then(|written| check(written, &tree.place(), &mut findings));
    match meta {
        Some(meta) if findings.is_empty() => Ok(meta),
        _ => Err(findings.into_diagnostics()),
    }
}

fn check(written: MetaFile, root: &Place<'_>, findings: &mut Findings) -> Option<Meta> {
    let name = written.name.parse();
    if let Err(message) = &name {
        findings.add(&root.key("name"), message, None);
    }
    if written.summary.contains('\n') || written.summary.is_empty() {
        findings.add(&root.key("summary"), "`summary` is one line", None);
    }
    let suites_place = root.key("suites");
    let suites = written.suites.iter().enumerate().filter_map(|(index, text)| suite(findings, text, &suites_place.item(index)));
    let mut suites: Vec<Suite> = suites.collect();
    suites.sort_unstable();
    suites.dedup();
    if let Some(detect) = &written.detect {
        let place = root.key("detect").key("any");
        globs(findings, &detect.any, &place);
        for (index, glob) in detect.any.iter().enumerate() {
            if glob.rsplit_once('/').is_some_and(|(folder, _)| folder.contains(['*', '?'])) {
                findings.add(&place.item(index), format!("`{glob}` has `*` or `?` in the name of a folder"), None);
            }
        }
    }
    if let Some(dependencies) = &written.dependencies {
        globs(findings, &dependencies.inputs, &root.key("dependencies").key("inputs"));
    }
    variables(findings, &written.env, &root.key("env"));
    let mut folder = |key: &str, text: Option<String>, default: &str| {
        let text = text.unwrap_or_else(|| default.into());
        note(findings, &root.key(key), syntax::image_path(&text));
        text
    };
    let destination = folder("destination", written.destination, "/tmp");
    let scripts = folder("scripts", written.scripts, "/usr/libexec/s2i");
    let workdir = folder("workdir", written.workdir, "/opt/app");
    let user = written.user.unwrap_or_else(|| "1001:0".into());
    note(findings, &root.key("user"), syntax::user(&user));
    Some(Meta {
        packages: packages(findings, written.packages, &root.key("packages")),
        build_packages: packages(findings, written.build_packages, &root.key("build_packages")),
        name: name.ok()?,
        summary: written.summary,
        detect: written.detect,
        suites,
        dependencies: written.dependencies,
        destination,
        scripts,
        env: written.env,
        workdir,
        user,
        port: written.port,
    })
}

fn globs(findings: &mut Findings, globs: &[String], place: &Place<'_>) {
    if globs.is_empty() {
        findings.add_missing(place, "at least one file is named here", None);
    }
    for (index, glob) in globs.iter().enumerate() {
        note(findings, &place.item(index), syntax::inner_path(glob));
        if glob.contains(['[', ']', '{', '}', '\\', '!']) {
            let hint = Some("`*` and `?` stand for parts of a name, `**` for any folders".into());
            findings.add(&place.item(index), format!("`{glob}` is not a glob that is understood here"), hint);
        }
    }
}

/// Whether `path` fits `glob`: `?` one and `*` any characters of a name, `**` any number of folders.
pub fn matches(glob: &str, path: &str) -> bool {
    let glob: Vec<&str> = glob.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    let path: Vec<&str> = path.split('/').collect();
    matches_parts(&glob, &path)
}

fn matches_parts(glob: &[&str], path: &[&str]) -> bool {
    match (glob, path) {
        ([], []) => true,
        (["**"], path) => !path.is_empty(),
        (["**", rest @ ..], _) => (0..=path.len()).any(|skipped| matches_parts(rest, &path[skipped..])),
        ([first, glob @ ..], [name, path @ ..]) => matches_name(first, name) && matches_parts(glob, path),
        _ => false,
    }
}

/// One part of a path. Goes back to the last `*` only, so the time is the product of the lengths at most.
fn matches_name(glob: &str, name: &str) -> bool {
    let (glob, name): (Vec<char>, Vec<char>) = (glob.chars().collect(), name.chars().collect());
    let (mut g, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if glob.get(g) == Some(&'*') {
            star = Some((g, n));
            g += 1;
        } else if glob.get(g).is_some_and(|c| *c == '?' || *c == name[n]) {
            (g, n) = (g + 1, n + 1);
        } else if let Some((at, from)) = star {
            star = Some((at, from + 1));
            (g, n) = (at + 1, from + 1);
        } else {
            return false;
        }
    }
    glob[g..].iter().all(|c| *c == '*')
}

/// Whether a file or folder of this name is part of a builder.
fn is_part(name: &str) -> bool {
    !name.starts_with('.') && !name.ends_with('~')
}

fn collect_embedded(dir: &Dir<'_>, root: &Path, files: &mut BTreeMap<String, Vec<u8>>) -> Result<()> {
    for entry in dir.entries() {
        let name = entry.path().file_name().and_then(|name| name.to_str()).context("a builder's file has no name")?;
        match entry {
            _ if !is_part(name) => {}
            DirEntry::Dir(dir) => collect_embedded(dir, root, files)?,
            DirEntry::File(file) => {
                let path = file.path().strip_prefix(root)?.to_str().context("a builder's file has a name that is not UTF-8")?;
                files.insert(path.into(), file.contents().into());
            }
        }
    }
    Ok(())
}

/// Reads the files below `folder`/`inside`; symbolic links to files are followed, to folders refused.
fn collect_folder(folder: &Path, inside: &str, files: &mut BTreeMap<String, Vec<u8>>, size: &mut u64) -> Result<()> {
    for entry in fs_err::read_dir(folder.join(inside)).map_err(|error| Problem::usage(error.to_string()))? {
        let entry = entry?;
        let refuse = |why: &str| Problem::usage(format!("{} cannot be part of a builder: {why}", entry.path().display()));
        let Ok(name) = entry.file_name().into_string() else { bail!(refuse("its name is not UTF-8")) };
        if !is_part(&name) {
            continue;
        }
        let path = if inside.is_empty() { name } else { format!("{inside}/{name}") };
        let metadata = fs_err::metadata(entry.path()).map_err(|error| refuse(&error.to_string()))?;
        if metadata.is_dir() && entry.file_type()?.is_symlink() {
            bail!(refuse("it is a symbolic link to a folder"));
        } else if metadata.is_dir() {
            collect_folder(folder, &path, files, size)?;
        } else if !metadata.is_file() {
            bail!(refuse("it is not a regular file"));
        } else {
            *size += metadata.len();
            if *size > SIZE_MAX || files.len() >= FILES_MAX {
                let most = format!("more than {} MiB or {FILES_MAX} files", SIZE_MAX >> 20);
                bail!(Problem::usage(format!("{} is too large for a builder: {most}", folder.display())));
            }
            files.insert(path, fs_err::read(entry.path())?);
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A small whole builder as files; `extra` goes at the end of its `builder.yaml`.
    pub(crate) fn files(name: &str, extra: &str) -> BTreeMap<String, Vec<u8>> {
        let yaml = format!("name: {name}\nsummary: A test\n{extra}");
        [(META, yaml.as_str()), ("s2i/bin/assemble", "#!/bin/sh\n"), ("s2i/bin/run", "#!/bin/sh\nexec true\n")]
            .map(|(path, text)| (path.to_owned(), text.as_bytes().to_vec()))
            .into()
    }

    fn write(folder: &Path, files: &BTreeMap<String, Vec<u8>>) {
        for (path, bytes) in files {
            fs_err::create_dir_all(folder.join(path).parent().unwrap()).unwrap();
            fs_err::write(folder.join(path), bytes).unwrap();
        }
    }

    const FULL: &str = r#"name: python
summary: Python applications, dependencies from a lock file
detect: { any: [requirements.txt, "*.toml"], priority: 50 }
suites: [trixie, bookworm]
packages: [python3]
build_packages: [python3-pip]
dependencies: { inputs: ["requirements.txt", "requirements/*.txt"] }
destination: /tmp
scripts: /usr/libexec/s2i
env: { A: 1.10 }
workdir: /opt/app
user: "1001:0"
port: 8080
"#;

    #[test]
    fn builder_yaml_is_read_whole_and_has_defaults() {
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
        let full = Meta {
            name: "python".parse().unwrap(),
            summary: "Python applications, dependencies from a lock file".into(),
            detect: Some(Detect { any: texts(&["requirements.txt", "*.toml"]), priority: 50 }),
            suites: vec![Suite::Bookworm, Suite::Trixie],
            packages: texts(&["python3"]),
            build_packages: texts(&["python3-pip"]),
            dependencies: Some(Dependencies { inputs: texts(&["requirements.txt", "requirements/*.txt"]) }),
            destination: "/tmp".into(),
            scripts: "/usr/libexec/s2i".into(),
            env: [("A".into(), "1.10".into())].into(),
            workdir: "/opt/app".into(),
            user: "1001:0".into(),
            port: Some(8080),
        };
        assert_eq!(parse(Path::new("builder.yaml"), FULL), Ok(full.clone()));
        let least = Meta {
            name: "x".parse().unwrap(),
            summary: "S".into(),
            detect: None,
            suites: Vec::new(),
            packages: Vec::new(),
            build_packages: Vec::new(),
            dependencies: None,
            env: BTreeMap::new(),
            port: None,
            ..full
        };
        assert_eq!(parse(Path::new("builder.yaml"), "name: x\nsummary: S\n"), Ok(least));
    }

    #[test]
    fn what_is_wrong_in_a_builder_yaml() {
        let text = "name: X\nsummary: S\nsuites: [jessie]\npackages: [A]\ndetect: { any: ['*/x'] }\n\
                    dependencies: { inputs: [../x, '[ab]'] }\nenv: { 1: a }\nworkdir: opt\nuser: ROOT\nport: 0\nscript: /x\n";
        let found: Vec<(usize, String)> =
            parse(Path::new("builder.yaml"), text).unwrap_err().into_iter().map(|found| (found.line, found.message)).collect();
        let expected = [
            (1, "`X` is not a name: lower case letters, digits and inner `.`, `_`, `-`"),
            (3, "`jessie` is not a Debian suite that is known here"),
            (4, "`A` is not the name of a Debian package"),
            (5, "`*/x` has `*` or `?` in the name of a folder"),
            (6, "`../x` is not a path below the source"),
            (6, "`[ab]` is not a glob that is understood here"),
            (7, "`1` is not the name of a variable"),
            (8, "`opt` is not an absolute path in the image"),
            (9, "`ROOT` is not a user"),
            (10, "`port` must be from 1 to 65535, found 0"),
            (11, "unknown key `script`"),
        ];
        assert_eq!(found, expected.map(|(line, message)| (line, message.to_owned())));
        let empty =
            parse(Path::new("x"), "name: x\nsummary: S\ndetect: { any: [] }\ndependencies: { inputs: [] }\n").unwrap_err();
        let found: Vec<(usize, &str)> = empty.iter().map(|found| (found.line, found.message.as_str())).collect();
        assert_eq!(found, [(3, "at least one file is named here"), (4, "at least one file is named here")]);
    }

    #[test]
    fn a_folder_is_read_with_its_helpers_and_without_what_editors_leave() {
        let folder = tempfile::tempdir().unwrap();
        let mut expected = files("x", "dependencies: { inputs: [lock] }\n");
        expected.insert("s2i/bin/dependencies".into(), b"d".to_vec());
        expected.insert("s2i/bin/lib/pip.sh".into(), b"l".to_vec());
        expected.insert("README.md".into(), b"r".to_vec());
        write(folder.path(), &expected);
        let mut left = BTreeMap::new();
        for name in [".git/HEAD", "s2i/bin/.run.swp", "s2i/bin/run~"] {
            left.insert(name.to_owned(), b"junk".to_vec());
        }
        write(folder.path(), &left);
        let builder = Builder::load(&BuilderRef::Folder(folder.path().into())).unwrap().unwrap();
        assert_eq!(builder.files, expected);
        assert_eq!(builder.scripts.keys().collect::<Vec<_>>(), ["assemble", "dependencies", "lib/pip.sh", "run"]);
        assert_eq!(builder.scripts["lib/pip.sh"], b"l");
        assert!(builder.is_dependency_input("lock") && !builder.is_dependency_input("src/lock"));
    }

    #[test]
    fn the_digest_follows_names_and_bytes_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let load = |files: &BTreeMap<String, Vec<u8>>, mode: u32| {
            let folder = tempfile::tempdir().unwrap();
            write(folder.path(), files);
            fs_err::set_permissions(folder.path().join("s2i/bin/run"), std::fs::Permissions::from_mode(mode)).unwrap();
            Builder::load(&BuilderRef::Folder(folder.path().into())).unwrap().unwrap().digest()
        };
        let one = files("x", "");
        assert_eq!(load(&one, 0o644), load(&one, 0o755));
        assert_eq!(load(&one, 0o644), Builder::from_files(Path::new("x"), one.clone()).unwrap().digest());
        let mut digests = vec![load(&one, 0o644)];
        for (path, bytes) in [("s2i/bin/run", "#!/bin/sh\nexec false\n"), ("s2i/bin/usage", ""), ("s2i/bin/usag", "e")] {
            let mut other = one.clone();
            other.insert(path.into(), bytes.into());
            digests.push(load(&other, 0o644));
        }
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), 4);
    }

    #[test]
    fn broken_builders_are_named() {
        let without = |extra: &str, missing: &[&str]| {
            let mut files = files("x", extra);
            missing.iter().for_each(|path| drop(files.remove(*path)));
            files
        };
        let mut with_dependencies = files("x", "");
        with_dependencies.insert("s2i/bin/dependencies".into(), Vec::new());
        let cases = [
            (without("", &[META]), "the builder b has no `builder.yaml`"),
            (without("", &["s2i/bin/run"]), "the builder `x` is not whole: `run` is missing"),
            (without("", &["s2i/bin/run", "s2i/bin/assemble"]), "the builder `x` is not whole: `assemble` and `run` are missing"),
            (
                without("dependencies: { inputs: [a] }", &[]),
                "the builder `x` has `dependencies:` in builder.yaml but no such script",
            ),
            (with_dependencies, "the builder `x` has a script `dependencies` but no inputs for it"),
            (
                files("x", "prot: 80\n"),
                "b/builder.yaml:3:1: unknown key `prot`\n    3 | prot: 80\n      | ^^^^\nhint: did you mean `port`?",
            ),
        ];
        for (files, expected) in cases {
            let error = Builder::from_files(Path::new("b"), files).unwrap_err();
            assert_eq!((error.to_string().as_str(), crate::error::exit_code(&error)), (expected, 2));
        }
        for reference in [BuilderRef::Embedded("nope".into()), BuilderRef::Folder("/nowhere/at/all".into())] {
            assert_eq!(crate::error::exit_code(&Builder::load(&reference).unwrap_err()), 2, "{reference:?}");
        }
        assert_eq!(Builder::load(&BuilderRef::None).unwrap(), None);
        assert_eq!(Builder::load(&BuilderRef::Image("a/b".into())).unwrap(), None);
    }

    #[test]
    fn folders_that_cannot_be_a_builder() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &files("x", ""));
        std::os::unix::fs::symlink(folder.path(), folder.path().join("loop")).unwrap();
        let error = Builder::load(&BuilderRef::Folder(folder.path().into())).unwrap_err();
        assert!(error.to_string().ends_with("loop cannot be part of a builder: it is a symbolic link to a folder"), "{error}");
    }

    #[test]
    fn every_embedded_builder_is_whole_and_named_like_its_folder() {
        for name in Builder::names() {
            let builder = Builder::load(&BuilderRef::Embedded(name.into())).unwrap().unwrap();
            assert_eq!(builder.meta.name.as_str(), name);
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("builders").join(name);
            assert_eq!(Builder::load(&BuilderRef::Folder(folder)).unwrap().unwrap(), builder, "{name}: recompile");
        }
    }

    #[test]
    fn globs() {
        let cases = [
            ("requirements.txt", "requirements.txt", true),
            ("requirements.txt", "a/requirements.txt", false),
            ("requirements/*.txt", "requirements/dev.txt", true),
            ("requirements/*.txt", "requirements/a/dev.txt", false),
            ("*.t?t", "a.txt", true),
            ("*", "a/b", false),
            ("**/go.mod", "go.mod", true),
            ("**/go.mod", "a/b/go.mod", true),
            ("a/**", "a/b/c", true),
            ("a/**", "a", false),
            ("a/**/b", "a/b", true),
            ("./a", "a", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "aXbY", false),
            ("", "a", false),
        ];
        for (glob, path, expected) in cases {
            assert_eq!(matches(glob, path), expected, "{glob} {path}");
        }
        let hostile = format!("{}b", "a*".repeat(200));
        assert!(!matches(&hostile, &"a".repeat(5000)));
    }
}
