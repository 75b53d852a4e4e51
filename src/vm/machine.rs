//! A machine: prepared once, started as often as wanted on the same disks, gone when this is dropped.
//!
//! In: [`Settings`] and an [`Environment`]. QEMU gets one end of three socket pairs (console, QMP, guest
//! channel); our ends are read by threads that ring a [`Bell`], and [`Machine::wait`] looks at what came.

use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use serde_json::{Value, json};

use super::accelerator::{self, Choice};
use super::agent::{Agent, Output, State};
use super::bell::Bell;
use super::command::{self, Drive, Prepared, Sockets};
use super::console::{Console, Position, Sink};
use super::firmware::{self, Files};
use super::qmp::{self, Qmp};
use super::settings::{Card, Content, Credential, Firmware, Settings};
use super::work::Folder;
use super::{Stop, Tools, disk};
use crate::cmd::{self, Cmd};
use crate::error::Problem;

/// How long QEMU may take until it answers; it maps the memory and opens the disks before.
const START: Duration = Duration::from_secs(60);
/// How long QEMU may take to write out and end.
const QUIT: Duration = Duration::from_secs(30);
/// How long a killed QEMU may take to be gone.
const REAP: Duration = Duration::from_secs(5);
/// How long the guest's agent may take to end a command whose time is over, and to say so.
const OVERTIME: Duration = Duration::from_secs(20);
/// Longest time between two looks at what is waited for and whether to stop.
const LOOK: Duration = Duration::from_millis(100);
/// How long the rest of a line may take to be printed.
const LINE: Duration = Duration::from_secs(1);
/// What Linux prints when it gives up (kernel/panic.c).
pub const PANIC: &str = "Kernel panic - not syncing";
/// SMBIOS 2.1 tables hold 64 KiB together; what is larger goes by firmware configuration.
const SMBIOS_MAX: usize = 32 << 10;

/// What a machine stands on.
#[expect(missing_debug_implementations, reason = "a closure and a sink have none")]
pub struct Environment<'a> {
    pub tools: &'a Tools,
    pub accelerator: &'a Choice,
    /// Folder for the machine's own folder.
    pub work: &'a Path,
    /// The console goes to this new file.
    pub log: &'a Path,
    /// And here as it comes.
    pub sink: Option<Sink>,
    pub stop: Stop<'a>,
    /// Whether the machine is not started a second time, so that its overlays need not be consistent on disk.
    pub once: bool,
}

/// Why what is waited for will not come.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    #[error("it did not come in time")]
    TimedOut,
    #[error("it was stopped")]
    Stopped,
    /// The line on the console.
    #[error("the guest panicked: {0}")]
    Panicked(String),
    #[error("the guest, or its agent, started anew while the command ran")]
    Restarted,
    #[error("the machine {0}")]
    Ended(End),
    #[error(transparent)]
    Failed(#[from] anyhow::Error),
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest switched it off.
    PowerOff,
    /// We ended it.
    Cut,
    /// QEMU ended by itself; its last words.
    Died(String),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::PowerOff => write!(f, "has switched itself off"),
            End::Cut => write!(f, "is not running"),
            End::Died(words) => write!(f, "is gone: QEMU ended with {words}"),
        }
    }
}

/// A machine.
#[expect(missing_debug_implementations, reason = "a closure has none")]
pub struct Machine<'a> {
    settings: Settings,
    tools: &'a Tools,
    choice: &'a Choice,
    stop: Stop<'a>,
    firmware: Option<Files>,
    drives: Vec<Drive>,
    smbios: Vec<PathBuf>,
    fw_cfg: Vec<(String, PathBuf)>,
    bell: Bell,
    console: Console,
    running: Option<Running>,
    end: End,
    ports: Vec<(u16, u16)>,
    /// Panics up to here are known.
    panics_from: Position,
    /// When the beginning of the next one was seen.
    panic_begun: Option<Instant>,
    /// Whether a panic is no trouble.
    pub panic_allowed: bool,
    folder: Folder,
}

struct Running {
    child: Child,
    qmp: Qmp,
    agent: Agent,
    console: UnixStream,
    console_thread: std::thread::JoinHandle<()>,
    /// Events that were looked at.
    seen: usize,
    resets: usize,
    panics: usize,
    shut_down: Option<Value>,
}

impl<'a> Machine<'a> {
    /// Prepares a machine: overlays, firmware, credentials. Nothing runs yet.
    ///
    /// # Errors
    /// A disk, the firmware or a program is missing.
    pub fn prepare(settings: Settings, around: Environment<'a>) -> Result<Self> {
        let folder = Folder::take(around.work)?;
        let firmware = match settings.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(own_variables(firmware::find(&around.tools.qemu)?, &folder)?),
        };
        let drives = settings.disks.iter().enumerate();
        let drives = drives.map(|(index, disk)| disk::prepare(around.tools, disk, index, &folder, around.once));
        let drives = drives.collect::<Result<Vec<_>>>()?;
        let (smbios, fw_cfg) = write_credentials(&settings.credentials, &folder)?;
        let bell = Bell::default();
        let console = Console::new(around.log, around.sink, bell.clone())?;
        Ok(Self {
            settings,
            tools: around.tools,
            choice: around.accelerator,
            stop: around.stop,
            firmware,
            drives,
            smbios,
            fw_cfg,
            panics_from: console.end(),
            panic_begun: None,
            panic_allowed: false,
            bell,
            console,
            running: None,
            end: End::Cut,
            ports: Vec::new(),
            folder,
        })
    }

    /// Starts QEMU; the guest runs when this returns. It dies with the calling thread.
    ///
    /// # Errors
    /// QEMU's own words; a wanted port is in use.
    pub fn start(&mut self) -> Result<()> {
        let pair = || UnixStream::pair().context("cannot make a socket pair");
        let ((console, console_end), (qmp, qmp_end), (agent, agent_end)) = (pair()?, pair()?, pair()?);
        let [console_fd, qmp_fd, agent_fd] = [&console_end, &qmp_end, &agent_end].map(|end| end.as_raw_fd());
        let sockets = Sockets::Inherited { console: console_fd, qmp: qmp_fd, agent: agent_fd };
        let prepared = Prepared {
            accelerator: self.choice.accelerator,
            firmware: self.firmware.as_ref(),
            drives: &self.drives,
            smbios: &self.smbios,
            fw_cfg: &self.fw_cfg,
            sockets,
        };
        let words = self.folder.write("qemu.log", b"")?;
        let errors: std::fs::File = fs_err::OpenOptions::new().append(true).open(&words)?.into();
        let arguments = command::arguments(&self.settings, &prepared);
        let mut command = Cmd::new(&self.tools.qemu).args(&arguments).dir(self.folder.path()).own_group();
        for end in [console_end, qmp_end, agent_end] {
            command = command.pass(OwnedFd::from(end));
        }
        // QEMU puts large temporary files where this says.
        let command = command.env("TMPDIR", self.folder.path()).stdout(Stdio::null()).stderr(errors.into());
        self.panics_from = self.console.end();
        let child = command.spawn()?;
        let running = Running {
            child,
            qmp: Qmp::new(qmp, self.bell.clone())?,
            agent: Agent::new(agent, self.bell.clone())?,
            console_thread: self.console.attach(console.try_clone().context("cannot share a socket")?)?,
            console,
            seen: 0,
            resets: 0,
            panics: 0,
            shut_down: None,
        };
        self.running = Some(running);
        self.greet().inspect_err(|_| self.cut())
    }

    /// Waits until QEMU takes commands, and asks for the ports.
    fn greet(&mut self) -> Result<()> {
        let end = Instant::now() + START;
        loop {
            let seen = self.bell.rings();
            let Some(running) = &mut self.running else { break };
            if running.qmp.is_greeted() {
                break;
            }
            if running.qmp.is_closed() {
                self.reap();
                return Err(self.not_started());
            }
            if (self.stop)() || Instant::now() >= end {
                return Err(Problem::failed(format!("QEMU did not start within {} s", START.as_secs())).into());
            }
            self.bell.wait(seen, LOOK);
        }
        self.introduce().map_err(|error| match self.ended() {
            // It greets before it has opened everything; its own words say more.
            Some(End::Died(_)) => self.not_started(),
            _ => error,
        })
    }

    fn introduce(&mut self) -> Result<()> {
        let has_network = self.settings.card != Card::None;
        let qmp = self.qmp()?;
        qmp.call("qmp_capabilities", Value::Null)?;
        self.ports = if has_network { qmp::forwards(&qmp.monitor("info usernet")?) } else { Vec::new() };
        Ok(())
    }

    fn not_started(&self) -> anyhow::Error {
        let End::Died(words) = &self.end else { return Problem::failed(format!("the machine {}", self.end)).into() };
        let refused = words.split_once("Could not set up host forwarding rule 'tcp:127.0.0.1:");
        if let Some(port) = refused.and_then(|(_, rule)| rule.split('-').next()) {
            return Problem::failed(format!("port {port} of 127.0.0.1 is in use, or may not be used"))
                .hint("end what uses it (`ss -ltnp` shows it), or give another port; port 0 lets the kernel choose one")
                .into();
        }
        Problem::failed(format!("QEMU could not start the machine: {words}")).into()
    }

    fn qmp(&mut self) -> Result<&mut Qmp> {
        let end = self.end.clone();
        let running = self.running.as_mut();
        Ok(&mut running.ok_or_else(|| Problem::failed(format!("the machine {end}")))?.qmp)
    }

    /// Runs a QMP command.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.qmp()?.call(command, arguments)
    }

    /// Whether QEMU runs.
    pub fn is_running(&mut self) -> bool {
        self.tick();
        self.running.is_some()
    }

    /// How the machine ended, when it does not run.
    pub fn ended(&mut self) -> Option<End> {
        (!self.is_running()).then(|| self.end.clone())
    }

    /// How often the guest was reset since the start.
    pub fn resets(&mut self) -> usize {
        self.tick();
        self.running.as_ref().map_or(0, |running| running.resets)
    }

    /// How often the guest told of a panic since the start, by its panic device.
    pub fn panics(&mut self) -> usize {
        self.tick();
        self.running.as_ref().map_or(0, |running| running.panics)
    }

    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Ports of this machine and of the guest.
    pub fn ports(&self) -> &[(u16, u16)] {
        &self.ports
    }

    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    pub fn drives(&self) -> &[Drive] {
        &self.drives
    }

    /// Another end of the console, to type on.
    pub fn keyboard(&self) -> Result<UnixStream> {
        let running = self.running.as_ref().ok_or_else(|| Problem::failed("the machine is not running"))?;
        running.console.try_clone().context("cannot share a socket")
    }

    /// Types on the console.
    pub fn send(&mut self, text: &str) -> Result<()> {
        let mut keyboard = self.keyboard()?;
        keyboard.write_all(text.as_bytes()).context("the console takes nothing")
    }

    /// Looks at what QEMU told.
    fn tick(&mut self) {
        let Some(running) = &mut self.running else { return };
        let events = running.qmp.events();
        for event in &events[running.seen..] {
            match event.name.as_str() {
                "RESET" => {
                    running.resets += 1;
                    running.agent.reset();
                }
                "GUEST_PANICKED" => running.panics += 1,
                "SHUTDOWN" => running.shut_down = Some(event.data.clone()),
                _ => {}
            }
        }
        running.seen = events.len();
        if running.qmp.is_closed() {
            self.reap();
        }
    }

    /// QEMU has closed its sockets, or must: takes its status and what it still printed.
    fn reap(&mut self) {
        let Some(mut running) = self.running.take() else { return };
        let status = match accelerator::wait(&mut running.child, REAP) {
            Ok(Some(status)) => Some(status),
            _ => {
                let _ = running.child.kill();
                accelerator::wait(&mut running.child, REAP).ok().flatten()
            }
        };
        // The last events may have come with the end.
        if let Some(event) = running.qmp.events().iter().rfind(|event| event.name == "SHUTDOWN") {
            running.shut_down = Some(event.data.clone());
        }
        if status.is_some() {
            // It ends with QEMU's end of the socket; what came until then is in the log.
            let _ = running.console_thread.join();
        }
        let reason = running.shut_down.as_ref().and_then(|data| data.get("reason")).and_then(Value::as_str);
        let good = status.is_some_and(|status| status.success());
        self.end = match reason {
            Some("guest-shutdown") if good => End::PowerOff,
            Some("host-qmp-quit") if good => End::Cut,
            _ => End::Died(self.last_words(status, reason)),
        };
    }

    fn last_words(&self, status: Option<std::process::ExitStatus>, reason: Option<&str>) -> String {
        let status = status.map_or("no status: it cannot be killed".to_owned(), cmd::describe);
        let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
        let text = fs_err::read_to_string(self.folder.path().join("qemu.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let lines = &lines[lines.len().saturating_sub(5)..];
        if lines.is_empty() { status + &reason } else { format!("{status}{reason}: {}", lines.join("; ")) }
    }

    /// Ends QEMU at once, as when the power fails: what the guest has not flushed is lost.
    pub fn cut(&mut self) {
        if let Some(running) = &mut self.running {
            let _ = running.child.kill();
            self.reap();
        }
        self.end = End::Cut;
    }

    /// Ends QEMU after it has written out what the guest wrote; the guest is not asked.
    pub fn quit(&mut self) -> Result<()> {
        if !self.is_running() {
            return Ok(());
        }
        // It may end before it has answered.
        let _ = self.call("quit", Value::Null);
        let end = Instant::now() + QUIT;
        while self.is_running() && Instant::now() < end {
            self.bell.wait(self.bell.rings(), LOOK);
        }
        if self.running.is_some() {
            self.cut();
            return Err(Problem::failed(format!("QEMU did not end within {} s and was killed", QUIT.as_secs())).into());
        }
        Ok(())
    }

    /// Waits until `look` gives something, at most until `end`. A panic, the machine's end and a request to stop
    /// end it early; `look` is asked before those.
    pub fn wait<T>(&mut self, end: Instant, mut look: impl FnMut(&mut Self) -> Result<Option<T>>) -> Result<T, Trouble> {
        loop {
            let seen = self.bell.rings();
            self.tick();
            if let Some(found) = look(self)? {
                return Ok(found);
            }
            if (self.stop)() {
                return Err(Trouble::Stopped);
            }
            if !self.panic_allowed
                && let Some(line) = self.new_panic()
            {
                return Err(Trouble::Panicked(line));
            }
            if self.running.is_none() {
                return Err(Trouble::Ended(self.end.clone()));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Trouble::TimedOut);
            }
            self.bell.wait(seen, left.min(LOOK));
        }
    }

    /// The line of a panic that was not asked for yet.
    pub fn new_panic(&mut self) -> Option<String> {
        let mut from = self.panics_from;
        if !self.console.find(PANIC, &mut from) {
            self.panics_from = from;
            return None;
        }
        let begun = *self.panic_begun.get_or_insert_with(Instant::now);
        if !self.console.is_line_ended(from) && begun.elapsed() < LINE {
            // The rest of the line is on its way.
            return None;
        }
        self.panic_begun = None;
        self.panics_from = from;
        Some(self.console.line_before(from))
    }

    /// The boot id of the guest, when its agent answers.
    pub fn boot_id(&mut self) -> Option<String> {
        self.tick();
        self.running.as_mut()?.agent.boot_id()
    }

    /// Runs a command in the guest; the time until its agent answers counts.
    pub fn run(&mut self, argv: &[&str], timeout: Duration) -> Result<Output, Trouble> {
        let end = Instant::now() + timeout;
        self.wait(end, |machine| Ok(machine.boot_id()))?;
        let left = end.saturating_duration_since(Instant::now());
        let id = self.agent()?.exec(argv, left)?;
        self.finish(id, end)
    }

    /// Writes a file in the guest.
    pub fn write_file(&mut self, path: &str, mode: u32, bytes: &[u8], timeout: Duration) -> Result<Output, Trouble> {
        let end = Instant::now() + timeout;
        self.wait(end, |machine| Ok(machine.boot_id()))?;
        let id = self.agent()?.write(path, mode, bytes)?;
        self.finish(id, end)
    }

    /// Starts a command and does not wait for it.
    pub fn begin(&mut self, argv: &[&str], timeout: Duration) -> Result<u32> {
        self.agent()?.exec(argv, timeout)
    }

    fn agent(&mut self) -> Result<&mut Agent> {
        let end = self.end.clone();
        let running = self.running.as_mut();
        Ok(&mut running.ok_or_else(|| Problem::failed(format!("the machine {end}")))?.agent)
    }

    fn finish(&mut self, id: u32, end: Instant) -> Result<Output, Trouble> {
        let result = self.wait(end + OVERTIME, |machine| {
            Ok(match machine.agent()?.poll(id) {
                State::Running => None,
                state => Some(state),
            })
        });
        match result {
            Ok(State::Done(output)) => Ok(output),
            Ok(_) => Err(Trouble::Restarted),
            Err(Trouble::Failed(error)) if !self.is_running() => {
                Err(if self.end == End::Cut { Trouble::Failed(error) } else { Trouble::Ended(self.end.clone()) })
            }
            Err(trouble) => Err(trouble),
        }
    }

    /// Presses the power button: the guest is asked to switch off.
    pub fn press_power(&mut self) -> Result<()> {
        self.call("system_powerdown", Value::Null).map(drop)
    }

    /// Presses the reset button.
    pub fn press_reset(&mut self) -> Result<()> {
        self.call("system_reset", Value::Null).map(drop)
    }

    /// Writes what the screen shows to `file` (absolute): PPM when it ends so, else PNG (QEMU 7.1 and later).
    pub fn screenshot(&mut self, file: &Path) -> Result<()> {
        let name = file.to_str().ok_or_else(|| Problem::usage(format!("`{}` is not UTF-8", file.display())))?;
        let format = if name.ends_with(".ppm") { "ppm" } else { "png" };
        self.call("screendump", json!({"filename": name, "format": format})).map(drop)
    }

    /// Writes `length` bytes of value `byte` at `offset` of disk `index`, past the guest.
    pub fn write_disk(&mut self, index: usize, byte: u8, offset: u64, length: u64) -> Result<()> {
        if !self.is_running() {
            return disk::write(self.tools, &self.drives[index], byte, offset, length);
        }
        let answer = self.qmp()?.monitor(&format!("qemu-io disk{index} \"{}\"", disk::write_command(byte, offset, length)))?;
        // The words of a success are qemu-io's own output, which QEMU does not hand over; errors it does.
        if answer.trim().is_empty() || answer.contains("wrote ") {
            return Ok(());
        }
        Err(Problem::failed(format!("QEMU did not write to the disk: {}", answer.trim())).into())
    }

    /// Reads disk `index` past the guest: what QEMU has written out so far.
    pub fn read_disk(&mut self, index: usize, offset: u64, length: u64) -> Result<Vec<u8>> {
        disk::read(self.tools, &self.drives[index], offset, length, &self.folder)
    }

    /// Where `text` is first in the `size` bytes (`None`: all) from `start` of disk `index`, counted from there.
    pub fn find_on_disk(&mut self, index: usize, start: u64, size: Option<u64>, text: &[u8]) -> Result<Option<u64>> {
        disk::search(self.tools, &self.drives[index], start, size, text, &self.folder)
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        self.cut();
    }
}

/// A machine's own copy of the variables.
fn own_variables(files: Files, folder: &Folder) -> Result<Files> {
    match files {
        Files::Split { code, variables } => {
            let own = folder.write("variables.fd", &fs_err::read(&variables)?)?;
            Ok(Files::Split { code, variables: own })
        }
        whole @ Files::Whole(_) => Ok(whole),
    }
}

/// Writes credentials to files: as SMBIOS strings (systemd.system-credentials(7)), or, when they are too large
/// for that, as firmware configuration. Only the names of the files are on QEMU's command line.
fn write_credentials(credentials: &[Credential], folder: &Folder) -> Result<(Vec<PathBuf>, Vec<(String, PathBuf)>)> {
    let (mut smbios, mut fw_cfg) = (Vec::new(), Vec::new());
    let mut total = 0;
    for (index, Credential { name, value }) in credentials.iter().enumerate() {
        let plain = value.iter().all(|byte| (0x20..0x7f).contains(byte));
        let text = if plain {
            [format!("io.systemd.credential:{name}=").as_bytes(), value].concat()
        } else {
            let encoded = base64::engine::general_purpose::STANDARD.encode(value);
            format!("io.systemd.credential.binary:{name}={encoded}").into_bytes()
        };
        let file = format!("credential-{index}");
        if total + text.len() < SMBIOS_MAX {
            total += text.len();
            smbios.push(folder.write(&file, &text)?);
        } else {
            fw_cfg.push((format!("opt/io.systemd.credentials/{name}"), folder.write(&file, value)?));
        }
    }
    Ok((smbios, fw_cfg))
}

/// Whether a disk of the settings is written to in place.
pub fn keeps(settings: &Settings) -> bool {
    settings.disks.iter().any(|disk| matches!(disk.content, Content::File { keep: true, .. }))
}
