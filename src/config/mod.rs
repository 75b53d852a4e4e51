//! The pipeline file: file (serde) → check (all problems at once, with carets) → checked types.
//!
//! ```text
//! find → read → yaml (tree with places) → shape (against the JSON Schema) → file → check → types::Pipeline
//! ```
//! Everything that is wrong comes back as one usage problem whose message is all diagnostics, rendered.

pub mod check;
pub mod diagnostic;
pub mod embedded;
pub mod file;
mod find;
pub mod recurrence;
pub mod registries;
pub mod shape;
pub mod syntax;
pub mod types;
pub mod yaml;

use std::io::Read as _;
use std::path::Path;

use anyhow::Result;

pub use find::{find, names};

use crate::error::Problem;
use diagnostic::{Diagnostic, Findings};
use file::PipelineFile;
use types::Pipeline;
use yaml::{Source, Span};

/// Reads and checks the pipeline file `file`; relative names start at `cwd`, and messages show the file relative to it.
///
/// # Errors
/// A usage problem: the file cannot be read, or the rendered diagnostics, the first without `error: `.
pub fn load(file: &Path, cwd: &Path) -> Result<Pipeline> {
    load_with(file, cwd, &embedded::builder_names())
}

/// [`load`] with the names of the builders that exist.
pub fn load_with(file: &Path, cwd: &Path, builders: &[&str]) -> Result<Pipeline> {
    let file = check::join(cwd, file);
    let text = read(&file, cwd)?;
    parse(&file, &text, builders).map_err(|diagnostics| Problem::usage(diagnostic::render(&diagnostics, cwd)).into())
}

/// Checks the text of the pipeline file `file` (absolute).
///
/// # Errors
/// Everything that is wrong, in order of position.
pub fn parse(file: &Path, text: &str, builders: &[&str]) -> Result<Pipeline, Vec<Diagnostic>> {
    let tree = yaml::parse(file, text)?;
    let mut findings = Findings::new(tree.source.clone());
    let written = shape::read::<PipelineFile>(&tree, &mut findings);
    findings.seal();
    let pipeline = written.and_then(|written| check::check(written, &tree.place(), file, builders, &mut findings));
    match pipeline {
        Some(pipeline) if findings.is_empty() => Ok(pipeline),
        _ => Err(findings.into_diagnostics()),
    }
}

/// The text of a YAML file; `cwd` is for messages.
///
/// # Errors
/// A usage problem for what is missing, not a file, too large or not UTF-8.
pub fn read(file: &Path, cwd: &Path) -> Result<String> {
    let shown = file.strip_prefix(cwd).unwrap_or(file).display();
    let metadata = match fs_err::metadata(file) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(Problem::usage(format!("the file {shown} does not exist")).into());
        }
        Err(error) => return Err(Problem::usage(error.to_string()).into()),
    };
    if metadata.is_dir() {
        return Err(Problem::usage(format!("{shown} is a folder, not a file")).into());
    }
    if !metadata.is_file() {
        return Err(Problem::usage(format!("{shown} is not a regular file")).into());
    }
    let mut bytes = Vec::new();
    let cannot_read = |error: std::io::Error| Problem::usage(error.to_string());
    let open = fs_err::File::open(file).map_err(cannot_read)?;
    open.take(yaml::TEXT_MAX as u64 + 1).read_to_end(&mut bytes).map_err(cannot_read)?;
    if bytes.len() > yaml::TEXT_MAX {
        return Err(Problem::usage(format!("{shown} is larger than {} KiB", yaml::TEXT_MAX / 1024)).into());
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
        let before = String::from_utf8_lossy(&error.as_bytes()[..good]).into_owned();
        let (line, column) = (before.split('\n').count(), before.rsplit('\n').next().unwrap_or_default().chars().count() + 1);
        let hint = Some("save the file as UTF-8".to_owned());
        let source = Source { file: file.into(), text };
        let diagnostic = Diagnostic::new(&source, Span { line, column, length: 1 }, "the file is not UTF-8", hint);
        Problem::usage(diagnostic.render(cwd)).into()
    })
}

/// The JSON Schema of the pipeline file, for editors: `# yaml-language-server: $schema=…`.
pub fn schema() -> serde_json::Value {
    let mut schema = schemars::schema_for!(PipelineFile);
    schema.insert("title".into(), "pipeline".into());
    schema.to_value()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::error;
    use types::{Base, BuilderRef, Compression, Configure, Debian, Health, HealthCheck, Limits, Network, Repository, Suite};

    const BUILDERS: [&str; 3] = ["node", "python", "static"];

    /// A folder with what the files of these tests name.
    fn folder() -> (tempfile::TempDir, std::path::PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = fs_err::canonicalize(folder.path()).unwrap();
        for dir in ["pipelines", "apps/notes/web", "mine/s2i", "layout"] {
            fs_err::create_dir_all(root.join(dir)).unwrap();
        }
        for file in ["mine/builder.yaml", "layout/oci-layout", "keys.gpg", "tune.sh", "site.yml", "root.tar"] {
            fs_err::write(root.join(file), "").unwrap();
        }
        (folder, root)
    }

    const FULL: &str = r#"# yaml-language-server: $schema=pipeline.schema.json
name: notes
base:
  debian: trixie
  packages: [tzdata, ca-certificates, tzdata]
  mirror: http://mirror.example/debian
  repositories:
    - { uri: "https://packages.example/debian", suite: stable, signed_by: keys.gpg }
runtime:
  builder: python
  packages: [libpq5]
source:
  path: apps/notes
  dir: web
build:
  env: { MODE: production, VERSION: 1.10, DEBUG: off }
  secrets:
    - { id: pip-token, env: PIP_TOKEN }
    - { id: netrc, file: secret/netrc }
  packages: [gcc]
  trust: false
  network: host
  timeout: 90s
  limits: { memory: 2G, processes: 512, file_size: 10G }
configure:
  - shell: tune.sh
  - ansible: site.yml
image:
  command: [python3, app.py]
  env: { PORT: 8080 }
  labels: { team: web }
  port: 8080
  user: 1001:0
  workdir: /opt/app
  volumes: [/var/lib/notes]
  health: { http: /healthz, deadline: 30s }
  compression: gzip
"#;

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_full_file_is_read_whole() {
        let (_keep, root) = folder();
        fs_err::write(root.join("pipeline.yaml"), FULL).unwrap();
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        let expected = Pipeline {
            name: "notes".parse().unwrap(),
            file: root.join("pipeline.yaml"),
            dir: root.clone(),
            base: Base::Debian(Debian {
                suite: Suite::Trixie,
                packages: strings(&["ca-certificates", "tzdata"]),
                mirror: Some("http://mirror.example/debian".into()),
                security_mirror: None,
                repositories: vec![Repository {
                    uri: "https://packages.example/debian".into(),
                    suite: "stable".into(),
                    components: strings(&["main"]),
                    signed_by: root.join("keys.gpg"),
                }],
            }),
            runtime: types::Runtime { builder: BuilderRef::Embedded("python".into()), packages: strings(&["libpq5"]) },
            source: types::Source::Path(root.join("apps/notes/web")),
            build: types::Build {
                env: map(&[("MODE", "production"), ("VERSION", "1.10"), ("DEBUG", "off")]),
                secrets: vec![
                    types::Secret { id: "pip-token".into(), from: types::SecretSource::Env("PIP_TOKEN".into()) },
                    types::Secret { id: "netrc".into(), from: types::SecretSource::File(root.join("secret/netrc")) },
                ],
                packages: strings(&["gcc"]),
                trust: false,
                network: Network::Host,
                timeout: Duration::from_secs(90),
                limits: Limits { memory: Some(2 << 30), processes: Some(512), file_size: Some(10 << 30) },
            },
            configure: vec![Configure::Shell(root.join("tune.sh")), Configure::Ansible(root.join("site.yml"))],
            image: types::Image {
                command: strings(&["python3", "app.py"]),
                env: map(&[("PORT", "8080")]),
                labels: map(&[("team", "web")]),
                port: Some(8080),
                user: Some("1001:0".into()),
                workdir: Some("/opt/app".into()),
                volumes: strings(&["/var/lib/notes"]),
                health: Some(Health { check: HealthCheck::Http("/healthz".into()), deadline: Duration::from_secs(30) }),
                compression: Compression::Gzip,
            },
            host: None,
            releases: Default::default(),
        };
        // Relative to the current folder, from below, with `..`: one result.
        for (file, cwd) in [("pipeline.yaml", root.clone()), ("../pipeline.yaml", root.join("apps"))] {
            assert_eq!(load_with(Path::new(file), &cwd, &BUILDERS).unwrap(), expected);
        }
    }

    #[test]
    fn defaults() {
        let (_keep, root) = folder();
        let text = "name: a\nbase: { scratch: true }\nconfigure:\n  # - shell: later\nbuild:\nimage: {}\n";
        let pipeline = parse(&root.join("pipelines/a.yaml"), text, &BUILDERS).unwrap();
        let expected = Pipeline {
            name: "a".parse().unwrap(),
            file: root.join("pipelines/a.yaml"),
            dir: root.join("pipelines"),
            base: Base::Scratch,
            runtime: types::Runtime { builder: BuilderRef::None, packages: Vec::new() },
            source: types::Source::Path(root.join("pipelines")),
            build: types::Build {
                env: Default::default(),
                secrets: Vec::new(),
                packages: Vec::new(),
                trust: true,
                network: Network::None,
                timeout: Duration::from_secs(1800),
                limits: Limits::default(),
            },
            configure: Vec::new(),
            image: types::Image {
                command: Vec::new(),
                env: Default::default(),
                labels: Default::default(),
                port: None,
                user: None,
                workdir: None,
                volumes: Vec::new(),
                health: None,
                compression: Compression::Zstd,
            },
            host: None,
            releases: Default::default(),
        };
        assert_eq!(pipeline, expected);
    }

    #[test]
    fn all_problems_at_once_in_the_style_of_the_house() {
        let (_keep, root) = folder();
        let text = "nam: notes\nbase:\n  debian: triixe\n  packages: [Curl]\nimage:\n  port: 99999\n  helth: { http: x }\n";
        fs_err::write(root.join("pipelines/notes.yaml"), text).unwrap();
        let error = load_with(Path::new("pipelines/notes.yaml"), &root, &BUILDERS).unwrap_err();
        let expected = "\
pipelines/notes.yaml:1:1: unknown key `nam`
    1 | nam: notes
      | ^^^
hint: did you mean `name`?

error: pipelines/notes.yaml:1:1: the key `name` is missing
    1 | nam: notes
      | ^^^^^^^^^^
hint: name of the pipeline and of the image: lower case letters, digits, `.`, `_` and `-`

error: pipelines/notes.yaml:3:11: `triixe` is not a Debian suite that is known here
    3 |   debian: triixe
      |           ^^^^^^
hint: did you mean `trixie`?

error: pipelines/notes.yaml:4:14: `Curl` is not the name of a Debian package
    4 |   packages: [Curl]
      |              ^^^^
hint: lower case letters, digits, `+`, `-` and `.`, at least two characters

error: pipelines/notes.yaml:6:9: `port` must be from 1 to 65535, found 99999
    6 |   port: 99999
      |         ^^^^^

error: pipelines/notes.yaml:7:3: unknown key `helth`
    7 |   helth: { http: x }
      |   ^^^^^
hint: did you mean `health`?";
        assert_eq!(error.to_string(), expected);
        assert_eq!(error::exit_code(&error), 2);
    }

    #[test]
    fn files_that_cannot_be_read() {
        let (_keep, root) = folder();
        fs_err::write(root.join("empty.yaml"), "# nothing\n").unwrap();
        fs_err::write(root.join("latin.yaml"), b"name: notes\nbase: { debian: caf\xe9 }\n").unwrap();
        fs_err::write(root.join("broken.yaml"), "name: notes\nbase:\n  debian: trixie\n packages: [a\n").unwrap();
        fs_err::write(root.join("tab.yaml"), "name: notes\nbase:\n\tdebian: trixie\n").unwrap();
        fs_err::write(root.join("text.yaml"), "just words\n").unwrap();
        fs_err::write(root.join("huge.yaml"), vec![b'#'; yaml::TEXT_MAX + 1]).unwrap();
        let cases = [
            ("nowhere.yaml", "the file nowhere.yaml does not exist"),
            ("apps", "apps is a folder, not a file"),
            ("/dev/zero", "/dev/zero is not a regular file"),
            ("huge.yaml", "huge.yaml is larger than 1024 KiB"),
            (
                "empty.yaml",
                "empty.yaml:1:1: the file is empty\n    1 | # nothing\n      | ^\nhint: it needs at least `name` and `base`",
            ),
            (
                "latin.yaml",
                "latin.yaml:2:20: the file is not UTF-8\n    2 | base: { debian: caf\u{fffd} }\n      |                    ^\nhint: save the file as UTF-8",
            ),
            ("broken.yaml", "broken.yaml:4:2: not valid YAML: "),
            ("tab.yaml", "tab.yaml:3:"),
            (
                "text.yaml",
                "text.yaml:1:1: the file must be a mapping, found `just words`\n    1 | just words\n      | ^^^^^^^^^^",
            ),
        ];
        for (file, expected) in cases {
            let error = load(Path::new(file), &root).unwrap_err();
            let message = error.to_string();
            let matches = if expected.ends_with([' ', ':']) { message.starts_with(expected) } else { message == expected };
            assert!(matches, "{file}: {message}");
            assert_eq!(error::exit_code(&error), 2, "{file}");
        }
    }

    #[test]
    fn the_schema_is_a_schema() {
        let schema = schema();
        assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
        assert_eq!(schema["title"], "pipeline");
        assert_eq!(schema["required"], serde_json::json!(["name", "base"]));
        assert_eq!(schema["additionalProperties"], false);
        assert_eq!(schema["$defs"]["Base"]["properties"]["scratch"]["description"], "`true`: an empty tree.");
    }

    #[test]
    fn loading_is_fast() {
        let (_keep, root) = folder();
        fs_err::write(root.join("pipeline.yaml"), FULL).unwrap();
        let fastest = (0..20).map(|_| {
            let start = Instant::now();
            load_with(Path::new("pipeline.yaml"), &root, &BUILDERS).unwrap();
            start.elapsed()
        });
        let fastest = fastest.min().unwrap();
        assert!(fastest < Duration::from_millis(5), "{fastest:?}");
    }
}
