//! `vm`: instances as machines of the release's disk, in QEMU or by programs of the target's own.
//!
//! ```text
//! store ─▶ disk in the cache, never written ─▶ overlay in STATE/machines/ID ─▶ QEMU, owned by a shim (STATE/instances/ID)
//! switch ─▶ 127.0.0.1, a port the kernel chose ─▶ the app's port in the guest
//! ```
//! QEMU's console is the shim's log, its sockets are in the shim's `work` folder. A machine that switches itself off, or
//! whose QEMU ends, is started again by the shim on the same overlay, at another port: [`Target::list`] tells which.
//! Undone by [`Target::stop`] (machine, overlay, credentials) and [`Target::forget`] (console and journal); the disk of a
//! volume stays.
//!
//! Known to be missing: standard input of commands in the guest; a volume that several machines hold; limits on QEMU
//! itself beyond the machine's memory and processors. The guest's agent serves one at a time: while `exec` runs, a
//! `command` health check waits for it.

mod guest;
mod machine;
mod template;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use self::guest::{Guest, Monitor};
use self::machine::Record;
use super::docker::secrets;
use super::{Address, Checked, Found, GRACE_MACHINE, InstanceSpec, Running, Target};
use crate::artifact::disk;
use crate::artifact::store::{Store, write_atomic};
use crate::config::types as config;
use crate::error::Problem;
use crate::rollout::shim::{self, Instance, Owned, Seen, StopBy};
use crate::vm::Tools;
use crate::vm::accelerator::{self, Wanted};
use crate::vm::agent::Output;

/// Whose instances these are.
const KIND: &str = "vm";
/// How often a machine that is to end is reminded of its power button.
const REMIND: Duration = Duration::from_secs(3);
/// How long the guest may take to answer somebody who reads its log or stops it.
const LOG_PATIENCE: Duration = Duration::from_secs(3);
/// How long reading a journal may take.
const JOURNAL: Duration = Duration::from_secs(20);
/// Lines of the app's journal that are kept when its machine is stopped.
const KEPT_LINES: usize = 500;
/// Between two looks at a journal that is followed.
const FOLLOW: Duration = Duration::from_secs(1);
/// What journalctl prints before a cursor.
const CURSOR: &str = "-- cursor: ";
/// How long the guest may take to answer before a command of a person.
const EXEC_PATIENCE: Duration = Duration::from_secs(60);
/// Shells' convention: 128 and the signal.
const SIGNALLED: i32 = 128;
/// Characters of a command's last line.
const WORDS: usize = 300;

/// Where a target works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Around {
    /// This program, which is run again as shim.
    pub program: PathBuf,
    /// Root of the store.
    pub root: PathBuf,
    /// The daemon's state.
    pub state: PathBuf,
    /// A folder in memory, as `/run/pipeline`, that outlives the daemon.
    pub runtime: PathBuf,
    /// Where QEMU's programs are looked for: the value of `PATH`.
    pub path: OsString,
}

/// The machines of one root.
#[derive(Debug)]
pub struct Vm {
    around: Around,
    /// Forwarded port by instance, with the life of QEMU it belongs to.
    ports: Mutex<BTreeMap<String, (String, u16)>>,
}

impl Vm {
    pub fn new(around: Around) -> Self {
        Self { around, ports: Mutex::default() }
    }

    fn instances(&self) -> PathBuf {
        self.around.state.join("instances")
    }

    fn shim(&self, id: &str) -> PathBuf {
        self.instances().join(id)
    }

    /// The machine's own folder.
    fn folder(&self, id: &str) -> PathBuf {
        self.around.state.join("machines").join(id)
    }

    /// Where QEMU's sockets are.
    fn work(&self, id: &str) -> PathBuf {
        self.shim(id).join("work")
    }

    fn record(&self, id: &str) -> Result<Option<Record>> {
        let path = self.folder(id).join("machine.json");
        let bytes = match fs_err::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let record: Record = serde_json::from_slice(&bytes).with_context(|| format!("`{}` is broken", path.display()))?;
        if record.format > machine::FORMAT {
            let message = format!("`{}` is of a newer pipeline", path.display());
            return Err(Problem::failed(message).hint("start that version, and let it stop the machine").into());
        }
        Ok(Some(record))
    }

    fn known(&self, id: &str) -> Result<Record> {
        self.record(id)?.ok_or_else(|| Problem::failed(format!("there is no machine `{id}`")).into())
    }

    /// All machines that have a record.
    fn records(&self) -> Result<Vec<Record>> {
        let entries = match fs_err::read_dir(self.around.state.join("machines")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut records = Vec::new();
        for entry in entries {
            records.extend(self.record(&entry?.file_name().to_string_lossy())?);
        }
        Ok(records)
    }

    /// Makes the machine's files and starts it; the caller cleans up after a failure.
    fn make(&self, spec: &InstanceSpec, target: &config::Vm) -> Result<()> {
        let store = Store::open_with_state(&self.around.root, &self.around.state)?;
        let disk = disk::read(&store, &spec.artifact)?.ok_or_else(|| {
            Problem::failed(format!("the artifact {} is no disk", spec.artifact.short()))
                .hint("a release for `vm` has one: `pipeline build --release` bakes it where the pipeline has `host:`")
        })?;
        let pipeline = spec.environment.split('/').next().unwrap_or_default();
        let app = machine::app(&disk.config.apps, target.app.as_deref(), pipeline)?;
        let port = app.port.or(spec.port);
        let tools = Tools::find(&self.around.path)?;
        let folder = self.folder(&spec.id);
        let _ = fs_err::remove_dir_all(&folder);
        fs_err::create_dir_all(folder.parent().context("a folder")?)?;
        std::fs::DirBuilder::new().mode(0o700).create(&folder).with_context(|| format!("cannot make `{}`", folder.display()))?;
        let files = machine::prepare(&store, &tools, &folder, spec, &disk)?;
        let instance = Instance::of(spec, KIND, serde_json::json!({"disk": spec.artifact, "app": app.name, "port": port}));
        let record = Record { format: machine::FORMAT, instance, app: app.name.clone(), port, command: target.command.clone() };
        let credentials = machine::credentials(spec, &app.name)?;
        // Before it is started: what runs has a record.
        write_atomic(&folder.join("machine.json"), &serde_json::to_vec_pretty(&record)?)?;
        if let Some(command) = &target.command {
            let values = secrets::make(&self.around.runtime, &spec.id)?;
            let credentials = credentials.into_iter().map(|(name, value)| (name, super::Secret::new(value))).collect();
            secrets::write(&values, &credentials, None)?;
            let mut places = self.places(&record, target, &files);
            places.push(("credentials", values.to_string_lossy().into_owned()));
            return template::run(&template::fill(&command.start, &places)?, template::START).map(drop);
        }
        let choice = accelerator::choose(&tools.qemu, Wanted::Auto, &store.state("vm"))?;
        let (smbios, fw_cfg, secrets) = machine::carried(&credentials);
        let argv = machine::arguments(&tools, &choice, target, &files, port, (&smbios, &fw_cfg))?;
        // A signal that does nothing: whoever stops it presses the power button.
        let owned = Owned::Command { argv, env: Vec::new(), stop: StopBy::Signal(libc::SIGCONT) };
        shim::start(&self.around.program, &self.shim(&spec.id), &record.instance, &owned, &secrets).map(drop)
    }

    fn places(&self, record: &Record, target: &config::Vm, files: &machine::Files) -> Vec<(&'static str, String)> {
        let path = |path: &Path| path.to_string_lossy().into_owned();
        vec![
            ("id", record.instance.id.clone()),
            ("disk", path(&files.disk)),
            ("base", path(&files.base)),
            ("memory", (target.memory >> 20).to_string()),
            ("cpus", target.cpus.to_string()),
            ("port", record.port.map(|port| port.to_string()).unwrap_or_default()),
            ("volume", files.volume.as_deref().map(path).unwrap_or_default()),
        ]
    }

    /// The places that are known without a machine's settings.
    fn few_places(&self, record: &Record, grace: Duration) -> Vec<(&'static str, String)> {
        vec![
            ("id", record.instance.id.clone()),
            ("disk", self.folder(&record.instance.id).join("disk.qcow2").to_string_lossy().into_owned()),
            ("port", record.port.map(|port| port.to_string()).unwrap_or_default()),
            ("grace", grace.as_secs().to_string()),
        ]
    }

    /// A machine in QEMU.
    fn found(&self, seen: Seen) -> Found {
        let address = match seen.state.status {
            Running::Running => self.forwarded(&seen),
            _ => None,
        };
        Found {
            id: seen.instance.id,
            environment: seen.instance.environment,
            generation: seen.instance.generation,
            target: seen.instance.target,
            number: seen.instance.number,
            status: seen.state.status,
            restarts: seen.state.restarts,
            address: address.map(|port| Address::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))),
            memory: seen.state.memory,
            notes: seen.state.notes,
        }
    }

    /// The port of this machine that leads to the app. QEMU is asked once in each of its lives.
    fn forwarded(&self, seen: &Seen) -> Option<u16> {
        let port = u16::try_from(seen.instance.data.get("port")?.as_u64()?).ok()?;
        let shim = fs_err::read_to_string(seen.dir.join("pid")).ok()?;
        let life = format!("{shim} {}", seen.state.restarts);
        let mut ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, port)) = ports.get(&seen.instance.id)
            && *of == life
        {
            return Some(*port);
        }
        // One that has just been started, or ends now, has none yet.
        let found = Monitor::open(&seen.dir.join("work")).and_then(|mut monitor| monitor.forwarded(port)).ok()??;
        ports.insert(seen.instance.id.clone(), (life, found));
        Some(found)
    }

    /// A machine of other programs.
    fn asked(&self, record: Record, command: &config::VmCommand) -> Found {
        let printed = template::fill(&command.address, &self.few_places(&record, Duration::ZERO))
            .and_then(|argv| template::run(&argv, template::ADDRESS))
            .and_then(|text| template::address(&text, record.port));
        let (status, address) = match printed {
            Ok(address) => (Running::Running, Some(Address::Tcp(address))),
            Err(error) => (Running::Ended { status: error.to_string() }, None),
        };
        let Instance { id, environment, generation, target, number, .. } = record.instance;
        Found { id, environment, generation, target, number, status, restarts: 0, address, memory: None, notes: Vec::new() }
    }

    fn guest(&self, id: &str, patience: Duration) -> Result<Option<Guest>> {
        Guest::open(&self.work(id), &self.folder(id).join("agent"), patience)
    }

    /// The end of the app's journal and the place after it; `None` when the guest does not answer.
    fn journal(&self, record: &Record, lines: usize, after: Option<&str>) -> Result<Option<(Vec<u8>, Option<String>)>> {
        let Some(mut guest) = self.guest(&record.instance.id, LOG_PATIENCE)? else { return Ok(None) };
        let unit = format!("--unit=app-{}.service", record.app);
        let from = after.map_or(format!("--lines={lines}"), |cursor| format!("--after-cursor={cursor}"));
        let argv = ["journalctl", "--quiet", "--no-pager", "--output=short-iso", "--show-cursor", &unit, &from];
        let mut text = Vec::new();
        guest.run(&argv, Some(JOURNAL), &mut |is_error, bytes| {
            if !is_error {
                text.extend_from_slice(bytes);
            }
        })?;
        Ok(Some(split_cursor(text)))
    }

    fn show_output(output: &Output) -> i32 {
        if output.signal != 0 { SIGNALLED + output.signal } else { output.status }
    }
}

/// Lines, and the cursor journalctl prints after them.
fn split_cursor(mut text: Vec<u8>) -> (Vec<u8>, Option<String>) {
    let shown = String::from_utf8_lossy(&text).into_owned();
    let Some(at) = shown.rfind(CURSOR).filter(|at| *at == 0 || shown[..*at].ends_with('\n')) else { return (text, None) };
    let cursor = shown[at + CURSOR.len()..].trim().to_owned();
    // Invalid UTF-8 is longer when it is shown.
    let end = text.windows(CURSOR.len()).rposition(|window| window == CURSOR.as_bytes()).unwrap_or(text.len());
    text.truncate(end);
    (text, Some(cursor))
}

impl Target for Vm {
    fn start(&self, spec: &InstanceSpec) -> Result<()> {
        let config::Target::Vm(target) = &spec.settings else {
            return Err(Problem::bug(format!("`{}` is not for a machine", spec.id)).into());
        };
        match self.record(&spec.id)? {
            Some(record) if record.command.is_some() => return Ok(()),
            _ => {}
        }
        if shim::list(&self.instances(), KIND)?.iter().any(|seen| seen.instance.id == spec.id && seen.alive) {
            return Ok(());
        }
        self.make(spec, target).inspect_err(|_| {
            // The first error is the one to be told.
            let _ = secrets::remove(&self.around.runtime, &spec.id);
            let _ = fs_err::remove_dir_all(self.folder(&spec.id));
        })
    }

    fn list(&self) -> Result<Vec<Found>> {
        let mut list: Vec<Found> = shim::list(&self.instances(), KIND)?.into_iter().map(|seen| self.found(seen)).collect();
        for mut record in self.records()? {
            if let Some(command) = record.command.take() {
                list.push(self.asked(record, &command));
            }
        }
        list.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(list)
    }

    fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        let Some(record) = self.record(id)? else { return shim::stop(&self.around.program, &self.shim(id), grace) };
        let folder = self.folder(id);
        if let Some(command) = &record.command {
            let argv = template::fill(&command.stop, &self.few_places(&record, grace))?;
            template::run(&argv, grace + template::START)?;
        } else {
            // Its last words are worth a moment, and not more.
            if let Ok(Some((text, _))) = self.journal(&record, KEPT_LINES, None) {
                fs_err::write(folder.join("journal"), text)?;
            }
            let (program, dir) = (self.around.program.clone(), self.shim(id));
            // The shim knows that it ends before the guest does: else it would start it again.
            let stopping = std::thread::Builder::new().name("stop".into()).spawn(move || shim::stop(&program, &dir, grace));
            let stopping = stopping.context("cannot start a thread")?;
            let mut pressed: Option<Instant> = None;
            while !stopping.is_finished() {
                std::thread::sleep(Duration::from_millis(50));
                if pressed.is_none_or(|at| at.elapsed() >= REMIND) && !grace.is_zero() {
                    // One that is gone already needs no more.
                    let _ = Monitor::open(&self.work(id)).and_then(|mut monitor| monitor.press_power());
                    pressed = Some(Instant::now());
                }
            }
            stopping.join().map_err(|_| anyhow::anyhow!("the thread that stops `{id}` panicked"))??;
        }
        secrets::remove(&self.around.runtime, id)?;
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        // The record last: without it there is nothing to stop.
        for name in ["disk.qcow2", "base.raw", "variables.fd", "agent", "machine.json"] {
            match fs_err::remove_file(folder.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }

    fn grace(&self) -> Duration {
        GRACE_MACHINE
    }

    fn forget(&self, id: &str) -> Result<()> {
        shim::forget(&self.shim(id))?;
        match fs_err::remove_dir_all(self.folder(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn check(&self, id: &str, argv: &[String], timeout: Duration) -> Result<Checked> {
        let record = self.known(id)?;
        if record.command.is_some() {
            return Err(no_agent(id).into());
        }
        let late = Instant::now() + timeout;
        let bad = |last: String| Ok(Checked { good: false, last });
        let mut guest = match self.guest(id, timeout) {
            Ok(Some(guest)) => guest,
            Ok(None) => return bad("the guest does not answer yet".into()),
            Err(error) => return bad(format!("{error:#}")),
        };
        let argv = guest::inside(&record.app, argv);
        let words: Vec<&str> = argv.iter().map(String::as_str).collect();
        let mut text = Vec::new();
        let left = late.saturating_duration_since(Instant::now());
        let output = match guest.run(&words, Some(left), &mut |_, bytes| text.extend_from_slice(bytes)) {
            Ok(output) => output,
            Err(error) => return bad(format!("{error:#}")),
        };
        let text = String::from_utf8_lossy(&text);
        let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim();
        let status = Self::show_output(&output);
        let last = match (output.timed_out, status) {
            (true, _) => format!("it did not end within {} s", timeout.as_secs_f64()),
            (false, status) if line.is_empty() && status != 0 => format!("it ended with status {status}"),
            _ => line.chars().take(WORDS).collect(),
        };
        Ok(Checked { good: !output.timed_out && status == 0, last })
    }

    fn logs(&self, id: &str, lines: usize, follow: bool, sink: &mut dyn FnMut(&[u8]) -> bool) -> Result<()> {
        let Some(record) = self.record(id)? else {
            // Stopped: the console, and the app's last words.
            let console = if self.shim(id).exists() { shim::logs(&self.shim(id), lines, false, sink) } else { Ok(()) };
            return match fs_err::read(self.folder(id).join("journal")) {
                Ok(journal) => {
                    sink(super::docker::last(journal, lines).as_slice());
                    console
                }
                Err(_) if self.shim(id).exists() => console,
                Err(_) => Err(Problem::failed(format!("there is no log of `{id}`")).into()),
            };
        };
        if record.command.is_some() {
            return Err(no_agent(id).into());
        }
        let Some((text, mut cursor)) = self.journal(&record, lines, None).unwrap_or(None) else {
            return shim::logs(&self.shim(id), lines, follow, sink);
        };
        if !sink(&text) || !follow {
            return Ok(());
        }
        loop {
            std::thread::sleep(FOLLOW);
            let more = match self.journal(&record, 0, cursor.as_deref()) {
                Ok(Some((text, next))) => {
                    cursor = next.or(cursor);
                    sink(&text)
                }
                // It restarts, or somebody else has the agent.
                Ok(None) | Err(_) if self.record(id)?.is_some() => sink(&[]),
                Ok(None) | Err(_) => false,
            };
            if !more {
                return Ok(());
            }
        }
    }

    fn exec(&self, id: &str, argv: &[String], interactive: bool) -> Result<i32> {
        let record = self.known(id)?;
        if record.command.is_some() {
            return Err(no_agent(id).into());
        }
        if interactive {
            let problem = Problem::usage("a command in a machine gets no standard input");
            return Err(problem.hint("give it what it needs as arguments; ssh is the way to a shell in a machine").into());
        }
        let Some(mut guest) = self.guest(id, EXEC_PATIENCE)? else {
            return Err(
                Problem::transient(format!("the machine `{id}` does not answer, or somebody else runs a command in it")).into()
            );
        };
        let argv = guest::inside(&record.app, argv);
        let words: Vec<&str> = argv.iter().map(String::as_str).collect();
        let output = guest.run(&words, None, &mut |is_error, bytes| {
            // A reader that has gone away is no reason to leave the command.
            let _ = if is_error {
                write_now(&mut std::io::stderr().lock(), bytes)
            } else {
                write_now(&mut std::io::stdout().lock(), bytes)
            };
        })?;
        Ok(Self::show_output(&output))
    }
}

fn write_now(out: &mut dyn std::io::Write, bytes: &[u8]) -> std::io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

fn no_agent(id: &str) -> Problem {
    Problem::usage(format!("the machine `{id}` is run by the target's own `command:`, and nothing in it answers us"))
        .hint("health by `http` or `tcp` needs nothing in the machine")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journals_cursor_is_no_line_of_it() {
        let cases: [(&[u8], &[u8], Option<&str>); 4] = [
            (b"a\nb\n-- cursor: s=1;i=2\n", b"a\nb\n", Some("s=1;i=2")),
            (b"-- cursor: s=1\n", b"", Some("s=1")),
            (b"a says -- cursor: no\n", b"a says -- cursor: no\n", None),
            (b"\xff\n-- cursor: s=1\n", b"\xff\n", Some("s=1")),
        ];
        for (text, lines, cursor) in cases {
            assert_eq!(split_cursor(text.to_vec()), (lines.to_vec(), cursor.map(String::from)));
        }
    }
}
