//! A vm-test as read → [`VmTest`]: everything its types cannot say, each problem at its place.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::file::{
    CommandFile, CredentialFile, DiskFile, ExpectFile, FileFile, FlipFile, HttpFile, MatcherFile, RunFile, StepFile, TestFile,
    WaitForFile, WhichFile, WriteFile,
};
use super::types::{Action, Condition, DiskName, Expect, Hardware, Place as Byte, Step, VmTest, Which};
use crate::config::diagnostic::{self, Diagnostic, Findings, quoted};
use crate::config::syntax::{self, Wrong};
use crate::config::yaml::{self, Content as Yaml, Place};
use crate::config::{self, shape};
use crate::error::Problem;
use crate::vm::disk::{format, is_file_name};
use crate::vm::http::Request;
use crate::vm::settings::{CPUS, Content, Credential, Disk, Firmware, MEMORY};

/// Time of steps that wait for a guest to start, when nothing is written. Emulation on two loaded cores takes minutes.
const WAIT: Duration = Duration::from_secs(300);
/// Time of `http`.
const HTTP: Duration = Duration::from_secs(120);
/// Time of steps that ask a running guest for something.
const ASK: Duration = Duration::from_secs(60);
/// Least memory a machine is given: what SeaBIOS and QEMU's devices need.
const MEMORY_MIN: u64 = 16 << 20;
/// The kinds of steps.
const KINDS: [&str; 12] =
    ["boot", "wait-for", "http", "run", "file", "write", "type", "reboot", "power-cut", "power-off", "screenshot", "flip"];

/// Reads and checks the vm-test `file`; messages show it relative to `cwd`.
///
/// # Errors
/// A usage problem: the file cannot be read, or the rendered diagnostics.
pub fn load(file: &Path, cwd: &Path) -> Result<VmTest> {
    let file = cwd.join(file);
    let text = config::read(&file, cwd)?;
    parse(&file, &text).map_err(|diagnostics| Problem::usage(diagnostic::render(&diagnostics, cwd)).into())
}

/// Checks the text of the vm-test `file` (absolute).
///
/// # Errors
/// Everything that is wrong, in order of position.
pub fn parse(file: &Path, text: &str) -> Result<VmTest, Vec<Diagnostic>> {
    let tree = yaml::parse(file, text)?;
    let mut findings = Findings::new(tree.source.clone());
    let written = shape::read::<TestFile>(&tree, &mut findings);
    findings.seal();
    let test = written.map(|written| {
        let dir = file.parent().unwrap_or(Path::new("/"));
        Checker { dir, findings: &mut findings, saved: Vec::new() }.test(written, file, &tree.place())
    });
    match test {
        Some(test) if findings.is_empty() => Ok(test),
        _ => Err(findings.into_diagnostics()),
    }
}

struct Checker<'c> {
    dir: &'c Path,
    findings: &'c mut Findings,
    /// Variables of the steps so far.
    saved: Vec<String>,
}

impl Checker<'_> {
    fn test(&mut self, written: TestFile, file: &Path, root: &Place<'_>) -> VmTest {
        let disk = written.disk.as_deref().map(|name| self.disk_name(name, &root.key("disk")));
        let disks = root.key("disks");
        let more = written.disks.iter().enumerate();
        let more = more.filter_map(|(index, disk)| self.disk(disk, &disks.item(index))).collect();
        let credentials = root.key("credentials");
        let credentials =
            written.credentials.iter().filter_map(|(name, value)| self.credential(name, value, &credentials.key(name))).collect();
        let mut steps = Vec::new();
        for (index, step) in written.steps.into_iter().enumerate() {
            steps.extend(self.step(step, &root.key("steps").item(index)));
        }
        self.begins_with_boot(&steps, root);
        let mut forward = written.forward;
        forward.extend(steps.iter().filter_map(|step| match step.action {
            Action::Http { port, .. } => Some(port),
            _ => None,
        }));
        forward.sort_unstable();
        forward.dedup();
        let mut firmware = written.firmware;
        if firmware.is_empty() {
            firmware.push(Firmware::Bios);
        }
        firmware.sort_unstable();
        firmware.dedup();
        let memory = self.size(written.memory.as_deref(), &root.key("memory")).unwrap_or(MEMORY);
        if memory < MEMORY_MIN {
            self.findings.add(&root.key("memory"), "`memory` is too small for a machine", Some("at least 16M".into()));
        }
        let machine = Hardware {
            bus: written.bus.unwrap_or_default(),
            size: self.size(written.disk_size.as_deref(), &root.key("disk-size")),
            disks: more,
            board: written.machine.unwrap_or_default(),
            cpu: written.cpu,
            memory,
            cpus: written.cpus.unwrap_or(CPUS),
            card: written.network_card.unwrap_or_default(),
            credentials,
            forward,
            qemu: written.qemu,
        };
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        VmTest { name, file: file.into(), disk, machine, firmware, allow_panic: written.allow_panic.unwrap_or(false), steps }
    }

    fn begins_with_boot(&mut self, steps: &[Step], root: &Place<'_>) {
        let steps_place = root.key("steps");
        if steps_place.is_there()
            && matches!(steps_place.node().map(|node| &node.content), Some(Yaml::Sequence(items)) if items.is_empty())
        {
            self.findings.add(&steps_place, "`steps` is empty", Some("a test does something: begin with `- boot: {}`".into()));
        }
        let Some(boot) = steps.iter().position(|step| step.action == Action::Boot).or((!steps.is_empty()).then_some(steps.len()))
        else {
            return;
        };
        let early = steps[..boot].iter().position(|step| !matches!(step.action, Action::Flip { .. }));
        if let Some(index) = early {
            let hint = Some("put `- boot: {}` before it".into());
            self.findings.add(&steps_place.item(index), "the machine is not switched on yet", hint);
        }
    }

    fn take<T>(&mut self, place: &Place<'_>, result: Result<T, Wrong>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(wrong) => {
                self.findings.add(place, wrong.message, wrong.hint);
                None
            }
        }
    }

    fn size(&mut self, text: Option<&str>, place: &Place<'_>) -> Option<u64> {
        self.take(place, syntax::size(text?))
    }

    fn timeout(&mut self, text: Option<&str>, default: Duration, body: &Place<'_>) -> Duration {
        text.and_then(|text| self.take(&body.key("timeout"), syntax::duration(text))).unwrap_or(default)
    }

    fn existing(&mut self, name: &str, place: &Place<'_>) -> Option<PathBuf> {
        let path = self.dir.join(name);
        if path.is_file() {
            return Some(path);
        }
        let hint = format!("names of files are relative to {}", self.dir.display());
        self.findings.add(place, format!("the file `{name}` does not exist"), Some(hint));
        None
    }

    /// Whether the file is there is for later: a build may make it.
    fn disk_name(&mut self, name: &str, place: &Place<'_>) -> DiskName {
        if is_file_name(name) {
            return DiskName::File(self.dir.join(name));
        }
        let base = name.split([':', '@']).next().unwrap_or_default();
        if let Err(message) = base.parse::<config::types::Name>() {
            self.findings.add(place, message, Some("`NAME`, `NAME:TAG`, or a file like `../out/NAME.qcow2`".into()));
        }
        DiskName::Artifact(name.to_owned())
    }

    fn disk(&mut self, written: &DiskFile, place: &Place<'_>) -> Option<Disk> {
        let size = self.size(written.size.as_deref(), &place.key("size"));
        let content = match &written.file {
            Some(name) => {
                let path = self.existing(name, &place.key("file"))?;
                match format(&path) {
                    Ok(format) => Content::File { path, format, keep: false },
                    Err(error) => {
                        self.findings.add(&place.key("file"), error.to_string(), None);
                        return None;
                    }
                }
            }
            None if written.size.is_some() => Content::Empty,
            None => {
                self.findings.add(place, "a disk needs `file` or `size`", None);
                return None;
            }
        };
        Some(Disk { content, bus: written.bus.unwrap_or_default(), size })
    }

    fn credential(&mut self, name: &str, written: &CredentialFile, place: &Place<'_>) -> Option<Credential> {
        if syntax::file_name(name).is_err() {
            self.findings.add(
                place,
                format!("`{name}` is not the name of a credential"),
                Some("letters, digits, `.`, `_` and `-`".into()),
            );
            return None;
        }
        let value = match written {
            CredentialFile::Value(text) => text.clone().into_bytes(),
            CredentialFile::From(from) => {
                let path = self.existing(&from.file, &place.key("file"))?;
                match fs_err::read(&path) {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        self.findings.add(&place.key("file"), error.to_string(), None);
                        return None;
                    }
                }
            }
        };
        Some(Credential { name: name.into(), value })
    }

    /// The step, when exactly one kind is written. Which one is read from the text: `- boot:` has no value.
    fn step(&mut self, written: StepFile, place: &Place<'_>) -> Option<Step> {
        let keys: Vec<&str> = match place.node().map(|node| &node.content) {
            Some(Yaml::Mapping(entries)) => entries.iter().filter_map(|(key, _)| key.text()).collect(),
            _ => return None,
        };
        let [kind] = keys.as_slice() else {
            let kinds = quoted(KINDS);
            let hint = if keys.is_empty() { format!("kinds of steps are {kinds}") } else { "begin each step with `- `".into() };
            self.findings.add(place, "a step has exactly one kind", Some(hint));
            return None;
        };
        let body = place.key(kind);
        let (title, timeout, default, action) = self.action(kind, written, &body)?;
        let timeout = self.timeout(timeout.as_deref(), default, &body);
        Some(Step { line: place.span().line, title, timeout, action })
    }

    fn action(&mut self, kind: &str, written: StepFile, body: &Place<'_>) -> Option<(String, Option<String>, Duration, Action)> {
        Some(match kind {
            "boot" => ("boot".into(), written.boot.unwrap_or_default().timeout, ASK, Action::Boot),
            "wait-for" => {
                let written = written.wait_for.unwrap_or_default();
                let timeout = written.timeout.clone();
                let (title, condition) = self.condition(written, body)?;
                (format!("wait-for {title}"), timeout, WAIT, Action::WaitFor(condition))
            }
            "http" => {
                let written = self.there(written.http, body)?;
                self.http(written, body)
            }
            "run" => {
                let written = self.there(written.run, body)?;
                self.run(written, body)?
            }
            "file" => {
                let written = self.there(written.file, body)?;
                self.file(written, body)?
            }
            "write" => {
                let written = self.there(written.write, body)?;
                self.write(written, body)?
            }
            "type" => {
                let text = self.there(written.typing, body)?.text;
                (format!("type {text:?}"), None, ASK, Action::Type(text))
            }
            "reboot" => {
                let written = written.reboot.unwrap_or_default();
                let hard = written.hard.unwrap_or(false);
                let title = if hard { "reboot by the reset button" } else { "reboot" };
                (title.into(), written.timeout, WAIT, Action::Reboot { hard, wait: written.wait })
            }
            "power-cut" => {
                let written = written.power_cut.unwrap_or_default();
                ("power-cut".into(), written.timeout, ASK, Action::PowerCut { start: written.start.unwrap_or(true) })
            }
            "power-off" => ("power-off".into(), written.power_off.unwrap_or_default().timeout, WAIT, Action::PowerOff),
            "screenshot" => {
                let file = self.there(written.screenshot, body)?.file;
                self.take(&body.key("file"), syntax::file_name(&file))?;
                if !file.ends_with(".png") && !file.ends_with(".ppm") {
                    let hint = Some("PNG needs QEMU 7.1".into());
                    self.findings.add(&body.key("file"), format!("`{file}` ends neither in `.png` nor in `.ppm`"), hint);
                }
                (format!("screenshot {file}"), None, ASK, Action::Screenshot(file))
            }
            "flip" => {
                let written = self.there(written.flip, body)?;
                self.flip(written, body)?
            }
            // The walk against the schema has told that there is no such kind.
            _ => return None,
        })
    }

    /// The body of a kind that needs one.
    fn there<T>(&mut self, written: Option<T>, body: &Place<'_>) -> Option<T> {
        if written.is_none() {
            let name = body.path().last().cloned().unwrap_or_default();
            self.findings.add(body, format!("`{name}` needs a mapping"), Some(format!("like `{name}: {{ … }}`")));
        }
        written
    }

    fn condition(&mut self, written: WaitForFile, body: &Place<'_>) -> Option<(String, Condition)> {
        let mut found: Vec<(String, Condition)> = Vec::new();
        if let Some(text) = written.console.clone() {
            if text.is_empty() || text.contains('\n') {
                self.findings.add(&body.key("console"), "`console` is a part of one line", None);
            }
            let count = written.count.unwrap_or(1);
            let times = if count > 1 { format!(" {count} times") } else { String::new() };
            found.push((format!("console `{text}`{times}"), Condition::Console { text, count }));
        } else if written.count.is_some() {
            self.findings.add(&body.key("count"), "`count` belongs to `console`", None);
        }
        if let Some(name) = written.unit.clone() {
            let state = written.state.clone().unwrap_or_else(|| "active".into());
            found.push((format!("unit `{name}` {state}"), Condition::Unit { name, state }));
        } else if written.state.is_some() {
            self.findings.add(&body.key("state"), "`state` belongs to `unit`", None);
        }
        if let Some(port) = written.port {
            found.push((format!("port {port}"), Condition::Port(port)));
        }
        if let Some(command) = &written.command {
            let argv = self.argv(command, &body.key("command"))?;
            found.push((format!("command {}", shown(&argv)), Condition::Command(argv)));
        }
        let flags = [
            (written.agent, "agent", Condition::Agent),
            (written.running, "running", Condition::Running),
            (written.panic, "panic", Condition::Panic),
            (written.off, "off", Condition::Off),
        ];
        for (value, key, condition) in flags {
            match value {
                Some(true) => found.push((key.into(), condition)),
                Some(false) => self.findings.add(&body.key(key), format!("`{key}` can only be `true`"), None),
                None => {}
            }
        }
        let one = (found.len() == 1).then(|| found.remove(0));
        if one.is_none() {
            let keys = quoted(["console", "agent", "unit", "port", "running", "command", "panic", "off"]);
            self.findings.add_missing(body, format!("`wait-for` needs exactly one of {keys}"), None);
        }
        one
    }

    fn http(&mut self, written: HttpFile, body: &Place<'_>) -> (String, Option<String>, Duration, Action) {
        let path = written.path.unwrap_or_else(|| "/".into());
        if !path.starts_with('/') || path.contains([' ', '\r', '\n']) {
            let hint = Some("it begins with `/`; a blank is written `%20`".into());
            self.findings.add(&body.key("path"), format!("`{path}` is not a path of a request"), hint);
        }
        let method = written.method.unwrap_or_else(|| "GET".into());
        if method.is_empty() || !method.bytes().all(|byte| byte.is_ascii_uppercase()) {
            self.findings.add(&body.key("method"), format!("`{method}` is not a method"), Some("like `GET` or `POST`".into()));
        }
        for (name, value) in &written.headers {
            let good = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
            if !good || value.contains(['\r', '\n']) {
                self.findings.add(&body.key("headers").key(name), format!("`{name}` is not a header"), None);
            }
        }
        let status = written.status.unwrap_or(200);
        let title = format!("http {method} {path} on port {}", written.port);
        let request = Request {
            method,
            path,
            headers: written.headers.into_iter().collect(),
            body: written.send.unwrap_or_default().into_bytes(),
        };
        let expected = self.expect(written.body, &body.key("body"));
        (title, written.timeout, HTTP, Action::Http { port: written.port, request, status, body: expected })
    }

    fn run(&mut self, written: RunFile, body: &Place<'_>) -> Option<(String, Option<String>, Duration, Action)> {
        let argv = self.argv(&written.command, &body.key("command"))?;
        let stdout = self.expect(written.stdout, &body.key("stdout"));
        let stderr = self.expect(written.stderr, &body.key("stderr"));
        if let Some(name) = &written.save {
            self.take(&body.key("save"), syntax::variable(name))?;
            self.saved.push(name.clone());
        }
        let title = format!("run {}", shown(&argv));
        let status = written.status.unwrap_or(0).into();
        Some((title, written.timeout, ASK, Action::Run { argv, status, stdout, stderr, save: written.save }))
    }

    fn argv(&mut self, written: &CommandFile, place: &Place<'_>) -> Option<Vec<String>> {
        let argv = match written {
            CommandFile::Shell(line) => ["/bin/sh", "-c", line].map(str::to_owned).to_vec(),
            CommandFile::Words(words) => words.clone(),
        };
        let empty = argv.last().is_none_or(|last| last.trim().is_empty()) && argv.len() != 2;
        if empty || argv.iter().any(|word| word.contains('\0')) {
            self.findings.add(place, "there is no command here", Some("a line for `/bin/sh`, or a list of words".into()));
            return None;
        }
        Some(argv)
    }

    fn file(&mut self, written: FileFile, body: &Place<'_>) -> Option<(String, Option<String>, Duration, Action)> {
        self.take(&body.key("path"), syntax::image_path(&written.path))?;
        let exists = written.exists.unwrap_or(true);
        let matcher = MatcherFile { equals: written.equals, contains: written.contains, contains_not: written.contains_not };
        let content = self.expect(Some(ExpectFile::Is(matcher)), body);
        let mode = written.mode.as_deref().and_then(|mode| self.mode(mode, &body.key("mode")));
        if !exists && (!content.is_anything() || mode.is_some() || written.owner.is_some()) {
            self.findings.add(body, "a file that must not exist has no content, mode or owner", None);
        }
        let title = format!("file {}{}", written.path, if exists { "" } else { " does not exist" });
        let action = Action::File { path: written.path, exists, content, mode, owner: written.owner };
        Some((title, written.timeout, ASK, action))
    }

    fn write(&mut self, written: WriteFile, body: &Place<'_>) -> Option<(String, Option<String>, Duration, Action)> {
        self.take(&body.key("path"), syntax::image_path(&written.path))?;
        let mode = self.mode(written.mode.as_deref().unwrap_or("0644"), &body.key("mode"))?;
        let title = format!("write {}", written.path);
        Some((title, written.timeout, ASK, Action::Write { path: written.path, text: written.text, mode }))
    }

    fn mode(&mut self, text: &str, place: &Place<'_>) -> Option<u32> {
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777 && text.len() >= 3);
        if mode.is_none() {
            self.findings.add(
                place,
                format!("`{text}` is not a file's permissions"),
                Some("three or four octal digits, like `\"0644\"`".into()),
            );
        }
        mode
    }

    fn flip(&mut self, written: FlipFile, body: &Place<'_>) -> Option<(String, Option<String>, Duration, Action)> {
        let (words, byte) = match (written.offset, written.text) {
            (Some(offset), None) => (format!("byte {offset}"), Byte::Offset(offset)),
            (None, Some(text)) if !text.is_empty() => (format!("the first byte of {text:?}"), Byte::Text(text)),
            _ => {
                self.findings.add(body, "`flip` needs either `offset` or `text`", None);
                return None;
            }
        };
        let partition = written.partition.map(|which| match which {
            WhichFile::Number(number) => Which::Number(number),
            WhichFile::Name(name) => Which::Name(name),
        });
        let of = match &partition {
            Some(Which::Number(number)) => format!(" of partition {number}"),
            Some(Which::Name(name)) => format!(" of partition `{name}`"),
            None => String::new(),
        };
        let disk = written.disk.unwrap_or(0) as usize;
        Some((format!("flip {words}{of}"), None, ASK, Action::Flip { disk, partition, place: byte }))
    }

    fn expect(&mut self, written: Option<ExpectFile>, place: &Place<'_>) -> Expect {
        let expect = match written {
            None => Expect::default(),
            Some(ExpectFile::Text(text)) => Expect { reads: Some(text), ..Expect::default() },
            Some(ExpectFile::Is(MatcherFile { equals, contains, contains_not })) => {
                Expect { equals, contains, contains_not, ..Expect::default() }
            }
        };
        for text in [&expect.equals, &expect.reads, &expect.contains, &expect.contains_not].into_iter().flatten() {
            for name in variables(text).filter(|name| !self.saved.iter().any(|saved| saved == name)) {
                let hint = if self.saved.is_empty() {
                    "a `run` step before this one keeps its output with `save: NAME`".to_owned()
                } else {
                    format!("saved before are {}", quoted(&self.saved))
                };
                self.findings.add(place, format!("the variable `{name}` is not saved by an earlier step"), Some(hint));
            }
        }
        expect
    }
}

/// Names in `${…}` that can be variables.
fn variables(text: &str) -> impl Iterator<Item = &str> {
    text.split("${")
        .skip(1)
        .filter_map(|rest| rest.split_once('}'))
        .map(|(name, _)| name)
        .filter(|name| syntax::variable(name).is_ok())
}

/// A command for a title: a shell's line, or its words; the first line only.
fn shown(argv: &[String]) -> String {
    let text = match argv {
        [sh, c, line] if sh == "/bin/sh" && c == "-c" => line.clone(),
        words => words.join(" "),
    };
    let first: String = text.lines().next().unwrap_or_default().chars().take(60).collect();
    if first.len() < text.trim_end().len() { format!("`{first}…`") } else { format!("`{first}`") }
}
