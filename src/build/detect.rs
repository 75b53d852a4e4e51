//! What `pipeline init` finds in a folder: the builder, the port, the health check, and why; and the file it writes.
//!
//! The builder is the one whose `detect:` names a file that is there, the highest priority first. Everything else is
//! read from files that say it (a Procfile, a lock file, a route in the source), never invented: a folder that fits no builder is
//! an error that says what was seen and what to write. Opens files of the folder, runs nothing.

mod unknown;

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::Path;

use anyhow::Result;

use super::builder::{Builder, Meta, matches};
use crate::config::diagnostic::quoted;
use crate::config::syntax::to_name;
use crate::config::types::{BuilderRef, HealthCheck, Name, Suite};
use crate::error::Problem;

/// Most bytes that are read of one file.
const READ_MAX: u64 = 256 * 1024;
/// Most source files that are searched for a health route, and how deep.
const SEARCH_FILES: usize = 300;
const SEARCH_DEPTH: usize = 4;
/// Paths that programs answer when they are healthy, the most common first.
const HEALTH_PATHS: [&str; 5] = ["/healthz", "/health", "/livez", "/_health", "/readyz"];
/// Source files in which routes are written.
const SOURCE_EXTENSIONS: [&str; 7] = ["py", "js", "mjs", "cjs", "ts", "jsx", "tsx"];
/// Folders that hold other people's source.
const FOREIGN_FOLDERS: [&str; 6] = ["node_modules", "venv", "__pycache__", "dist", "build", "site-packages"];

/// What was found in a folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Detection {
    /// The folder's name, made a pipeline name.
    pub name: Name,
    /// An embedded builder.
    pub builder: String,
    pub suite: Suite,
    pub port: Option<u16>,
    pub health: Option<HealthCheck>,
    /// What a Procfile starts as `web`.
    pub process: Option<String>,
    /// What was found and what follows from it: one sentence each.
    pub reasons: Vec<String>,
}

/// Looks at the folder `dir`, with the builders inside the binary.
///
/// # Errors
/// A usage problem when `dir` is no folder; a failure that says what was seen and what to write when no builder fits.
pub fn detect(dir: &Path) -> Result<Detection> {
    let builders = Builder::names().into_iter().map(|name| Builder::load(&BuilderRef::Embedded(name.into())));
    let builders: Vec<Builder> = builders.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    let metas: Vec<&Meta> = builders.iter().map(|builder| &builder.meta).collect();
    detect_with(dir, &metas)
}

/// [`detect`] with the builders to choose from.
///
/// # Errors
/// As for [`detect`].
pub fn detect_with(dir: &Path, builders: &[&Meta]) -> Result<Detection> {
    let dir = fs_err::canonicalize(dir).map_err(|error| Problem::usage(error.to_string()))?;
    let folder = Folder::open(&dir)?;
    let mut fitting: Vec<Fit<'_>> = builders.iter().filter_map(|meta| folder.fit(meta)).collect();
    fitting.sort_by_key(|fit| (std::cmp::Reverse(fit.priority), fit.meta.name.clone()));
    let Some((chosen, others)) = fitting.split_first() else {
        return Err(unknown::problem(&folder, builders).into());
    };
    let meta = chosen.meta;
    let mut reasons = vec![format!("found {}: the builder is `{}` ({})", quoted(&chosen.files), meta.name, meta.summary)];
    reasons.extend(others.iter().map(|other| chosen.against(other)));
    match meta.name.as_str() {
        "python" => reasons.extend(python_locks(&folder)),
        "node" => reasons.extend(node_locks(&folder)),
        _ => {}
    }
    let process = folder.read("Procfile").and_then(|text| procfile_web(&text));
    let port = port(meta, process.as_deref(), &mut reasons);
    let health = health(&folder, meta, port, &mut reasons);
    reasons.extend(dockerfile(&folder));
    let suites = if meta.suites.is_empty() { &Suite::ALL[..] } else { &meta.suites };
    let suite = if suites.contains(&Suite::Trixie) { Suite::Trixie } else { suites[0] };
    let name = to_name(&dir.file_name().unwrap_or_default().to_string_lossy());
    let name = name.parse().map_err(|message: String| anyhow::anyhow!(message))?;
    Ok(Detection { name, builder: meta.name.to_string(), suite, port, health, process, reasons })
}

/// The text of the `pipeline.yaml` for `detection`.
pub fn pipeline_yaml(detection: &Detection) -> String {
    let Detection { name, builder, suite, .. } = detection;
    let mut text = String::from(
        "# yaml-language-server: $schema=pipeline.schema.json\n\
         # (`pipeline schema > pipeline.schema.json` writes that file; editors then complete and check this one.)\n#\n\
         # Written by `pipeline init`:\n",
    );
    for reason in &detection.reasons {
        text += &format!("# - {}\n", one_line(reason));
    }
    text += &format!(
        "name: {name}\n\n\
         base:\n  debian: {suite}\n  # packages: [ca-certificates]         # Debian packages of the base layer\n\n\
         runtime:\n  builder: {builder}\n  # packages: [libpq5]                  # Debian packages the application needs when it runs\n\n\
         # build:\n#   packages: [gcc]                     # needed while building only, not in the image\n\
         #   env: {{ MODE: production }}           # variables of the build, not in the image\n\n\
         image:\n"
    );
    if let Some(port) = detection.port {
        let _ = writeln!(text, "  port: {port}");
    }
    match &detection.health {
        Some(HealthCheck::Http(path)) => text += &format!("  health: {{ http: {path} }}\n"),
        Some(HealthCheck::Tcp) => {
            text += "  health: { tcp: true }                # better: { http: /healthz }, a path that answers 2xx when the program serves\n";
        }
        _ => text += "  # health: { http: /healthz }          # how to tell that the program serves; http and tcp need `port`\n",
    }
    match &detection.process {
        Some(process) => {
            let argument = serde_json::Value::from(format!("exec {}", one_line(process)));
            text += &format!(
                "  # command: [sh, -c, {argument}]       # as the Procfile has it, instead of the builder's run script\n"
            );
        }
        None => text += "  # command: [program, argument]        # instead of the builder's run script\n",
    }
    text += &format!("  # volumes: [/var/lib/{name}]          # folders that hold data\n");
    text
}

/// A builder that fits, and the files that say so.
struct Fit<'m> {
    meta: &'m Meta,
    priority: u32,
    files: Vec<String>,
}

impl Fit<'_> {
    /// Why this one goes before `other`.
    fn against(&self, other: &Fit<'_>) -> String {
        let why = if self.priority == other.priority {
            format!("has the same priority, and `{}` is only the first by name", self.meta.name)
        } else {
            format!("has a lower priority ({} against {})", other.priority, self.priority)
        };
        let name = &other.meta.name;
        format!("{} would fit the builder `{name}`, which {why}; if that is meant, write `builder: {name}`", quoted(&other.files))
    }
}

/// The files in the root of the source.
struct Folder<'d> {
    dir: &'d Path,
    files: Vec<String>,
}

impl<'d> Folder<'d> {
    fn open(dir: &'d Path) -> Result<Self> {
        let entries = fs_err::read_dir(dir).map_err(|error| Problem::usage(error.to_string()))?;
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            // Names that are not UTF-8 can match nothing; the build says what it thinks of them.
            if let Ok(name) = entry.file_name().into_string()
                && entry.path().is_file()
            {
                files.push(name);
            }
        }
        files.sort_unstable();
        Ok(Self { dir, files })
    }

    fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file == name)
    }

    /// The beginning of a file, as far as it is text.
    fn read(&self, name: &str) -> Option<String> {
        if self.has(name) { read(&self.dir.join(name)) } else { None }
    }

    /// The files a glob means: in the root, or in the one folder it names.
    fn matching(&self, glob: &str) -> Vec<String> {
        let Some((folder, name)) = glob.rsplit_once('/').filter(|(folder, _)| *folder != ".") else {
            return self.files.iter().filter(|file| matches(glob, file)).cloned().collect();
        };
        let inner = self.dir.join(folder);
        // A folder that is not there holds no match.
        let Ok(inner) = Folder::open(&inner) else { return Vec::new() };
        inner.files.iter().filter(|file| matches(name, file)).map(|file| format!("{folder}/{file}")).collect()
    }

    fn fit<'m>(&self, meta: &'m Meta) -> Option<Fit<'m>> {
        let detect = meta.detect.as_ref()?;
        let mut files: Vec<String> = detect.any.iter().flat_map(|glob| self.matching(glob)).collect();
        files.sort_unstable();
        files.dedup();
        files.truncate(5);
        (!files.is_empty()).then_some(Fit { meta, priority: detect.priority, files })
    }
}

fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    fs_err::File::open(path).ok()?.take(READ_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Control characters become spaces, so that foreign text stays in its comment.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') { ' ' } else { c }).collect()
}

/// Lock files that pip does not read, and what exports them.
const PYTHON_LOCKS: [(&str, &str); 4] = [
    ("uv.lock", "uv export --frozen --no-dev --no-emit-project -o requirements.txt"),
    ("poetry.lock", "poetry export -o requirements.txt"),
    ("pdm.lock", "pdm export --prod -o requirements.txt"),
    ("Pipfile.lock", "pipenv requirements --hash > requirements.txt"),
];

/// The file pip installs from, and whether it is a lock file.
fn python_locks(folder: &Folder<'_>) -> Vec<String> {
    let lock = ["requirements.lock", "requirements.txt"].into_iter().find_map(|name| Some((name, folder.read(name)?)));
    let Some((name, text)) = lock else {
        let others = PYTHON_LOCKS.iter().filter(|(name, _)| folder.has(name));
        let mut reasons: Vec<String> =
            others.map(|(name, export)| format!("`{name}` is not read by pip: `{export}` makes of it what is")).collect();
        if reasons.is_empty() {
            reasons.push("there is no `requirements.txt`: `pip-compile --generate-hashes` writes it, with hashes, when there are dependencies".into());
        }
        return reasons;
    };
    if text.contains("--hash=") {
        return vec![format!("`{name}` has `--hash=` lines: it is a lock file, and the same packages come every time")];
    }
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', '-']));
    let (all, pinned) = lines.fold((0, 0), |(all, pinned), line| (all + 1, pinned + usize::from(line.contains("=="))));
    let hint = "`pip-compile --generate-hashes` makes it a lock file";
    vec![format!("`{name}` has no `--hash=` lines ({pinned} of {all} versions are pinned): {hint}")]
}

fn node_locks(folder: &Folder<'_>) -> Vec<String> {
    let mut reasons = Vec::new();
    let others: Vec<&str> = ["yarn.lock", "pnpm-lock.yaml", "bun.lock"].into_iter().filter(|name| folder.has(name)).collect();
    if folder.has("package-lock.json") || folder.has("npm-shrinkwrap.json") {
        reasons.push("`package-lock.json` is there: the same packages come every time".into());
    } else if others.is_empty() {
        reasons.push("there is no `package-lock.json`: `npm install --package-lock-only` writes it".into());
    } else {
        let hint = "`npm install --package-lock-only` writes the one that npm reads";
        reasons.push(format!("{} is not npm's lock file and there is no `package-lock.json`: {hint}", quoted(&others)));
    }
    let package = folder.read("package.json").and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    match package {
        None => reasons.push("`package.json` cannot be read as JSON".into()),
        Some(package) => match package["scripts"]["start"].as_str() {
            Some(start) => reasons.push(format!("`npm start` runs `{}`", one_line(start))),
            None => reasons.push("`package.json` has no script `start`: write one, or `image.command`".into()),
        },
    }
    reasons
}

/// The command of the process `web` (<https://devcenter.heroku.com/articles/procfile> describes the format).
fn procfile_web(text: &str) -> Option<String> {
    let command = text.lines().find_map(|line| line.strip_prefix("web:"))?.trim();
    (!command.is_empty()).then(|| command.to_owned())
}

/// The port a command line says in so many words: `--port 80`, `-p 80`, `--bind HOST:80`, `PORT=80`.
fn port_in(command: &str) -> Option<u16> {
    let words: Vec<&str> = command.split([' ', '=']).map(|word| word.trim_matches(['"', '\''])).collect();
    words.windows(2).find_map(|pair| match pair {
        ["--port" | "-p" | "PORT" | "--bind" | "-b" | "--listen" | "-l", value] => {
            value.rsplit(':').next()?.parse().ok().filter(|port| *port > 0)
        }
        _ => None,
    })
}

fn port(meta: &Meta, process: Option<&str>, reasons: &mut Vec<String>) -> Option<u16> {
    let said = process.and_then(port_in);
    if let Some(process) = process {
        let shown = one_line(process);
        reasons.push(match said {
            Some(port) => format!("`Procfile` starts `{shown}` on port {port}"),
            None => format!("`Procfile` starts `{shown}`"),
        });
    }
    match (meta.port, said) {
        (Some(port), Some(other)) if port != other => {
            reasons.push(format!(
                "the port is {port}, where the builder's run script listens; with the Procfile's command as `command` write {other}"
            ));
            Some(port)
        }
        (Some(port), _) => {
            reasons.push(format!("the port is {port}, where the builder's run script listens"));
            Some(port)
        }
        (None, said) => said,
    }
}

fn health(folder: &Folder<'_>, meta: &Meta, port: Option<u16>, reasons: &mut Vec<String>) -> Option<HealthCheck> {
    port?;
    if meta.name.as_str() == "static" {
        reasons.push("the page `/` tells whether the site is served".into());
        return Some(HealthCheck::Http("/".into()));
    }
    let mut found: Vec<(usize, String)> = Vec::new();
    search(folder.dir, folder.dir, SEARCH_DEPTH, &mut SEARCH_FILES.clone(), &mut found);
    found.sort_unstable();
    Some(match found.into_iter().next() {
        Some((index, file)) => {
            let path = HEALTH_PATHS[index];
            reasons.push(format!("`{file}` has the path `{path}`: it is the health check"));
            HealthCheck::Http(path.into())
        }
        None => {
            reasons.push("no path like `/healthz` was found: a connection on the port is the health check".into());
            HealthCheck::Tcp
        }
    })
}

/// Looks for a quoted health path in source files: (its index, the file).
fn search(root: &Path, dir: &Path, depth: usize, budget: &mut usize, found: &mut Vec<(usize, String)>) {
    let mut entries: Vec<_> = fs_err::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort_unstable();
    for path in entries {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_link = fs_err::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink());
        if *budget == 0 || is_link || name.starts_with('.') || FOREIGN_FOLDERS.contains(&&*name) {
            continue;
        }
        if path.is_dir() && depth > 1 {
            search(root, &path, depth - 1, budget, found);
        } else if path.is_file() && path.extension().is_some_and(|is| SOURCE_EXTENSIONS.iter().any(|known| is == *known)) {
            *budget -= 1;
            let text = read(&path).unwrap_or_default();
            let has = |wanted: &str| ['"', '\'', '`'].iter().any(|quote| text.contains(&format!("{quote}{wanted}{quote}")));
            if let Some(index) = HEALTH_PATHS.iter().position(|wanted| has(wanted)) {
                found.push((index, path.strip_prefix(root).unwrap_or(&path).display().to_string()));
            }
        }
    }
}

/// What a Dockerfile beside says; it is only mentioned.
fn dockerfile(folder: &Folder<'_>) -> Option<String> {
    let text = folder.read("Dockerfile")?;
    let exposed = text.lines().find_map(|line| {
        let (word, rest) = line.trim().split_once(char::is_whitespace)?;
        word.eq_ignore_ascii_case("EXPOSE").then(|| one_line(rest.trim()))
    });
    let says = exposed.map_or_else(String::new, |port| format!("; it says `EXPOSE {port}`"));
    Some(format!("`Dockerfile` is not used{says}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::builder::tests::files;
    use crate::config;

    fn builders() -> Vec<Builder> {
        [
            ("node", "detect: { any: [package.json], priority: 40 }\nport: 8080\n"),
            (
                "python",
                "detect: { any: [requirements.txt, pyproject.toml], priority: 50 }\nsuites: [bookworm, trixie]\nport: 8080\n",
            ),
            ("static", "detect: { any: [index.html, 'public/*.html'], priority: 10 }\nport: 8080\n"),
            ("twin", "detect: { any: [package.json], priority: 40 }\nsuites: [bookworm]\n"),
        ]
        .map(|(name, extra)| Builder::from_files(Path::new(name), files(name, extra)).unwrap())
        .into()
    }

    /// The folder `name` with `files`, and what is detected in it.
    fn detected(name: &str, files: &[(&str, &str)]) -> (tempfile::TempDir, Result<Detection>) {
        let parent = tempfile::tempdir().unwrap();
        let dir = parent.path().join(name);
        fs_err::create_dir_all(&dir).unwrap();
        for (path, text) in files {
            fs_err::create_dir_all(dir.join(path).parent().unwrap()).unwrap();
            fs_err::write(dir.join(path), text).unwrap();
        }
        let builders = builders();
        let result = detect_with(&dir, &builders.iter().map(|builder| &builder.meta).collect::<Vec<_>>());
        (parent, result)
    }

    /// Paths and texts.
    type Files<'f> = &'f [(&'f str, &'f str)];

    fn sentences(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn python_with_everything() {
        let (_keep, found) = detected(
            "My Notes",
            &[
                ("requirements.txt", "flask==3.0 --hash=sha256:00\n"),
                ("Procfile", "release: x\nweb: gunicorn app:app --bind 0.0.0.0:8000\n"),
                ("src/app.py", "@app.route('/health')\n"),
                ("src/z.py", "@app.route(\"/healthz\")\n"),
                ("node_modules/x.js", "'/healthz'"),
                ("package.json", "{}"),
                ("Dockerfile", "FROM x\nexpose 5000\n"),
            ],
        );
        let expected = Detection {
            name: "my-notes".parse().unwrap(),
            builder: "python".into(),
            suite: Suite::Trixie,
            port: Some(8080),
            health: Some(HealthCheck::Http("/healthz".into())),
            process: Some("gunicorn app:app --bind 0.0.0.0:8000".into()),
            reasons: sentences(&[
                "found `requirements.txt`: the builder is `python` (A test)",
                "`package.json` would fit the builder `node`, which has a lower priority (40 against 50); if that is meant, write `builder: node`",
                "`package.json` would fit the builder `twin`, which has a lower priority (40 against 50); if that is meant, write `builder: twin`",
                "`requirements.txt` has `--hash=` lines: it is a lock file, and the same packages come every time",
                "`Procfile` starts `gunicorn app:app --bind 0.0.0.0:8000` on port 8000",
                "the port is 8080, where the builder's run script listens; with the Procfile's command as `command` write 8000",
                "`src/z.py` has the path `/healthz`: it is the health check",
                "`Dockerfile` is not used; it says `EXPOSE 5000`",
            ]),
        };
        assert_eq!(found.unwrap(), expected);
    }

    #[test]
    fn ties_and_lock_files_are_explained() {
        let (_keep, found) = detected("web", &[("package.json", "{\"scripts\": {\"start\": \"node a.js\"}}"), ("yarn.lock", "")]);
        let found = found.unwrap();
        assert_eq!((found.builder.as_str(), found.health), ("node", Some(HealthCheck::Tcp)));
        assert_eq!(
            found.reasons,
            sentences(&[
                "found `package.json`: the builder is `node` (A test)",
                "`package.json` would fit the builder `twin`, which has the same priority, and `node` is only the first by name; \
                 if that is meant, write `builder: twin`",
                "`yarn.lock` is not npm's lock file and there is no `package-lock.json`: \
                 `npm install --package-lock-only` writes the one that npm reads",
                "`npm start` runs `node a.js`",
                "the port is 8080, where the builder's run script listens",
                "no path like `/healthz` was found: a connection on the port is the health check",
            ])
        );
    }

    #[test]
    fn lock_files_of_python() {
        let cases: [(Files<'_>, &str); 3] = [
            (
                &[("requirements.txt", "# x\nflask==3\nrequests\n-r more.txt\n")],
                "`requirements.txt` has no `--hash=` lines (1 of 2 versions are pinned): ",
            ),
            (&[("pyproject.toml", "")], "there is no `requirements.txt`: "),
            (&[("pyproject.toml", ""), ("uv.lock", "")], "`uv.lock` is not read by pip: `uv export "),
        ];
        for (files, expected) in cases {
            let reasons = detected("x", files).1.unwrap().reasons;
            assert!(reasons.iter().any(|reason| reason.starts_with(expected)), "{reasons:?}");
        }
    }

    #[test]
    fn what_is_written_is_a_pipeline() {
        let cases: [(&str, Files<'_>); 4] = [
            ("notes", &[("requirements.txt", "a==1"), ("Procfile", "web: sh -c \"echo \\\"x\\\" # y\"\n")]),
            ("Site: #1", &[("public/index.html", "")]),
            (
                "日本",
                &[("package.json", "{\"scripts\":{\"start\":\"a\\nb: [\"}}"), ("Procfile", "web: a\u{2028}b --port 3000\r\n")],
            ),
            ("1.0", &[("pyproject.toml", ""), ("Dockerfile", "EXPOSE 80\u{85}name: x\n")]),
        ];
        for (name, files) in cases {
            let (keep, found) = detected(name, files);
            let found = found.unwrap();
            let file = keep.path().join(name).join("pipeline.yaml");
            let text = pipeline_yaml(&found);
            fs_err::write(&file, &text).unwrap();
            let pipeline = config::load_with(&file, keep.path(), &["node", "python", "static"])
                .unwrap_or_else(|error| panic!("{error}\n{text}"));
            assert_eq!(
                (pipeline.name, pipeline.runtime.builder, pipeline.image.port, pipeline.image.health.map(|health| health.check)),
                (found.name, BuilderRef::Embedded(found.builder), found.port, found.health),
                "{text}"
            );
            // The comments of keys are right too: uncommented, the file is still a pipeline.
            let keys = text.split("\nname:").nth(1).unwrap().lines().filter(|line| !line.contains("health: { http: /healthz }"));
            let keys = keys.map(|line| match line.strip_prefix("  # ").map(|key| format!("  {key}")) {
                Some(key) => key,
                None => line.strip_prefix("# ").or_else(|| line.strip_prefix('#')).unwrap_or(line).to_owned(),
            });
            let uncommented = format!("name:{}", keys.collect::<Vec<_>>().join("\n"));
            assert!(
                uncommented.contains("\nbuild:\n  packages: [gcc] ") && uncommented.contains("\n  volumes: ["),
                "{uncommented}"
            );
            config::parse(&file, &uncommented, &["node", "python", "static"])
                .unwrap_or_else(|found| panic!("{found:#?}\n{uncommented}"));
        }
    }

    #[test]
    fn anything_else_says_what_was_seen_and_what_to_write() {
        let cases: [(Files<'_>, &str, &str); 5] = [
            (&[("go.mod", ""), ("Dockerfile", "")], "saw `go.mod` (Go), `Dockerfile`", "go build"),
            (&[("Dockerfile", "")], "saw `Dockerfile`", "make install"),
            (&[("Gemfile", "")], "saw `Gemfile` (Ruby)", "rackup"),
            (&[("main.c", ""), ("a.h", "")], "saw `a.h`, `main.c`", "make install"),
            (&[], "it has no files", "call `pipeline init` there"),
        ];
        for (files, seen, write) in cases {
            let (keep, result) = detected("x", files);
            let error = result.unwrap_err();
            let dir = fs_err::canonicalize(keep.path().join("x")).unwrap();
            assert_eq!(error.to_string(), format!("no builder fits {}: {seen}", dir.display()));
            assert_eq!(crate::error::exit_code(&error), 1);
            let hints = crate::error::hints(&error);
            assert_eq!(
                hints[0],
                "`node` looks for `package.json`; `python` looks for `requirements.txt` and `pyproject.toml`; `static` looks for `index.html` and `public/*.html`; `twin` looks for `package.json`"
            );
            assert!(hints.last().unwrap().contains(write), "{hints:?}");
            assert_eq!(
                hints.iter().any(|hint| hint.starts_with("a Dockerfile is not read")),
                files.iter().any(|(name, _)| *name == "Dockerfile")
            );
        }
        assert_eq!(crate::error::exit_code(&detect(Path::new("/nowhere/at/all")).unwrap_err()), 2);
    }

    #[test]
    fn ports_in_commands() {
        let cases = [
            ("gunicorn -b :8000 app", Some(8000)),
            ("gunicorn --bind=0.0.0.0:8000 app", Some(8000)),
            ("uvicorn app --port 9000", Some(9000)),
            ("PORT=3000 node x", Some(3000)),
            ("gunicorn --bind 0.0.0.0:$PORT", None),
            ("node x --port 0", None),
            ("node -p 70000", None),
            ("", None),
        ];
        for (command, port) in cases {
            assert_eq!(port_in(command), port, "{command}");
        }
    }
}
