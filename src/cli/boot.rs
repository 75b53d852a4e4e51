//! `pipeline boot`: a disk in QEMU, its console on the terminal.

use std::io::IsTerminal as _;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::bake::disk_tag;
use super::{Global, signals, ui};
use crate::artifact::store::Store;
use crate::config::syntax;
use crate::error::Problem;
use crate::progress::Progress as _;
use crate::vm::accelerator::{self, Choice, Wanted};
use crate::vm::boot::{self, Left};
use crate::vm::disk::{self, DiskToBoot};
use crate::vm::machine::{Environment, Machine};
use crate::vm::settings::{Board, Bus, CPUS, Card, Content, Credential, Disk, Firmware, Forward, MEMORY, Settings};
use crate::vm::work::Folder;
use crate::vm::{Tools, firmware};
use crate::{artifact, bake};

/// The guest's ssh.
const SSH: u16 = 22;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME or NAME:TAG of a baked disk, or a disk file
    disk: String,
    #[command(flatten)]
    machine: MachineArgs,
    /// Start with UEFI firmware (OVMF)
    #[arg(long, conflicts_with = "bios")]
    uefi: bool,
    /// Start with SeaBIOS [default]
    #[arg(long)]
    bios: bool,
    /// Memory of the machine
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1G")]
    memory: u64,
    /// Processors of the machine
    #[arg(long, value_name = "N", default_value_t = CPUS, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Forward a port of 127.0.0.1 to one of the guest; HOST 0: any free one. Ports of the disk's applications are forwarded anyway
    #[arg(long, short, value_name = "HOST:GUEST", value_parser = port)]
    port: Vec<Forward>,
    /// Open a shell by ssh, with a key made for this once; leaving it ends the machine
    #[arg(long)]
    ssh: bool,
    /// Throw away what is written to the disk [default]
    #[arg(long, conflicts_with = "keep")]
    snapshot: bool,
    /// Write to the disk file itself
    #[arg(long)]
    keep: bool,
    /// Give the guest a systemd credential; @FILE reads the value from a file
    #[arg(long, value_name = "NAME=VALUE", value_parser = credential)]
    credential: Vec<Credential>,
    /// Size of the disk the guest sees, not smaller than it is
    #[arg(long, value_name = "SIZE", value_parser = size)]
    disk_size: Option<u64>,
    /// Another disk file, such as a NoCloud disk; what is written to it is thrown away
    #[arg(long, value_name = "FILE")]
    extra_disk: Vec<PathBuf>,
    /// Arguments added to QEMU's
    #[arg(last = true, value_name = "QEMU")]
    qemu: Vec<String>,
}

/// What `boot` and `test` let choose of the emulation.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct MachineArgs {
    /// What runs the guest: KVM when a probe shows that it works, else emulation
    #[arg(long, value_enum, default_value = "auto", value_name = "WHAT")]
    accelerator: AcceleratorArg,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum AcceleratorArg {
    Auto,
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl MachineArgs {
    /// Probes, unless the user has chosen.
    pub fn choose(self, tools: &Tools, store: &Store) -> Result<Choice> {
        let wanted = match self.accelerator {
            AcceleratorArg::Auto => Wanted::Auto,
            AcceleratorArg::Kvm => Wanted::Kvm,
            AcceleratorArg::Tcg => Wanted::Tcg,
        };
        accelerator::choose(&tools.qemu, wanted, &store.state("vm"))
    }
}

fn size(text: &str) -> Result<u64, String> {
    syntax::size(text).map_err(|wrong| wrong.hint.map_or(wrong.message.clone(), |hint| format!("{}; {hint}", wrong.message)))
}

fn port(text: &str) -> Result<Forward, String> {
    let number = |text: &str| text.parse::<u16>().map_err(|_| format!("`{text}` is not a port"));
    let (host, guest) = text.split_once(':').ok_or("write HOST:GUEST, like 8080:80, or 0:80 for any free port")?;
    let (host, guest) = (number(host)?, number(guest)?);
    if guest == 0 {
        return Err("the guest has no port 0".into());
    }
    Ok(Forward { host: (host != 0).then_some(host), guest })
}

fn credential(text: &str) -> Result<Credential, String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("`{text}` is not NAME=VALUE"))?;
    syntax::file_name(name).map_err(|_| format!("`{name}` is not the name of a credential"))?;
    let value = match value.strip_prefix('@') {
        Some(file) => fs_err::read(file).map_err(|error| error.to_string())?,
        None => value.as_bytes().to_vec(),
    };
    Ok(Credential { name: name.into(), value })
}

/// The disk somebody named: a file, or one of the store's, as a raw file in the cache.
pub fn find_disk(store: &Store, name: &str) -> Result<DiskToBoot> {
    if disk::is_file_name(name) {
        return disk::file(name.as_ref());
    }
    let found = artifact_of(store, name)?;
    Ok(DiskToBoot { name: name.into(), path: bake::disk::raw(store, &found)?, apps: found.config.apps })
}

/// A disk of the store by its pipeline's name, tag or digest.
fn artifact_of(store: &Store, name: &str) -> Result<artifact::disk::Disk> {
    let found = match store.tagged(&disk_tag(name))? {
        Some(descriptor) => artifact::disk::read(store, &descriptor.digest)?,
        None => match name.parse() {
            Ok(digest) => artifact::disk::read(store, &digest)?,
            Err(_) => None,
        },
    };
    let Some(found) = found else {
        let base = name.split([':', '@']).next().unwrap_or(name);
        return Err(Problem::usage(format!("the store has no disk `{name}`"))
            .hint(format!("bake it first: `pipeline bake {base}`; a file is named with its ending, or with a `/`"))
            .into());
    };
    Ok(found)
}

pub fn run(global: &Global, args: Args) -> Result<u8> {
    signals::watch()?;
    let around = ui::Surroundings::new(global)?;
    let tools = Tools::find(&around.host.path)?;
    let mut found = find_disk(&around.store, &args.disk)?;
    if args.keep && !disk::is_file_name(&args.disk) {
        found.path = keep(&around, &args.disk)?;
    }
    let (work, logs) = (around.store.cache("vm"), around.store.state("vm"));
    let mut settings = settings(&args, &found)?;
    if settings.firmware == Firmware::Uefi {
        // Missing firmware is told before the machine is probed for KVM.
        firmware::find(&tools.qemu)?;
    }
    let choice = args.machine.choose(&tools, &around.store)?;
    let keys = if args.ssh {
        let folder = Folder::take(&work)?;
        let pair = boot::key_pair(&tools, &folder)?;
        settings
            .credentials
            .push(Credential { name: "ssh.authorized_keys.root".into(), value: pair.public.clone().into_bytes() });
        Some((folder, pair))
    } else {
        None
    };
    fs_err::create_dir_all(&logs)?;
    let stop = || signals::exit_code().is_some();
    let log = logs.join("console.log");
    let environment = Environment {
        tools: &tools,
        accelerator: &choice,
        work: &work,
        log: &log,
        sink: (!args.ssh).then(|| Box::new(std::io::stdout()) as _),
        stop: &stop,
        once: !args.keep,
    };
    let mut machine = Machine::prepare(settings, environment)?;
    machine.start()?;
    let firmware = if args.uefi { "UEFI (OVMF)" } else { "BIOS (SeaBIOS)" };
    let disk = if args.keep { "changes are kept in the disk" } else { "changes are thrown away" };
    around.progress.note(format!("{}: {firmware}, {}; {disk}", found.name, choice.words));
    for line in port_lines(&machine, &found) {
        around.progress.note(line);
    }
    let result = match &keys {
        Some((_folder, pair)) => {
            around.progress.note(format!("waiting for ssh; the console goes to {}", log.display()));
            let forwarded = machine.ports().iter().find(|(_, guest)| *guest == SSH).map(|(host, _)| *host);
            boot::ssh(&mut machine, &tools, &pair.private, forwarded.context("ssh is forwarded")?)
        }
        None => {
            around.progress.note("^A x ends the machine, ^A h shows more keys".into());
            on_terminal(&mut machine)
        }
    };
    // Also when a signal ends it: with --keep what the guest wrote is written out.
    machine.quit()?;
    // The signal is the exit status; that it ended the machine is no failure.
    if stop() { Ok(0) } else { result }
}

/// The file in which the machine of an artifact keeps what it writes: in the state folder, by name and digest, so that the
/// artifact itself and the tests of it start from the same bytes each time.
fn keep(around: &ui::Surroundings, name: &str) -> Result<std::path::PathBuf> {
    let disk = artifact_of(&around.store, name)?;
    let plain: String = name.chars().map(|c| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '-' }).collect();
    let path = around.store.state("kept").join(format!("{plain}-{}.raw", disk.digest.short().trim_start_matches("sha256:")));
    bake::disk::kept(&around.store, &disk, &path)?;
    around.progress.note(format!("what it writes is kept in {}", path.display()));
    Ok(path)
}

fn settings(args: &Args, found: &DiskToBoot) -> Result<Settings> {
    let mut disks = vec![Disk {
        content: Content::File { path: found.path.clone(), format: disk::format(&found.path)?, keep: args.keep },
        bus: Bus::Virtio,
        size: args.disk_size,
    }];
    for file in &args.extra_disk {
        let path = disk::file(file)?.path;
        let content = Content::File { format: disk::format(&path)?, path, keep: false };
        disks.push(Disk { content, bus: Bus::Virtio, size: None });
    }
    if args.memory < MEMORY / 64 {
        return Err(Problem::usage("`--memory` is too small for a machine").hint("at least 16M").into());
    }
    let mut wanted = args.port.clone();
    if args.ssh && wanted.iter().all(|forward| forward.guest != SSH) {
        wanted.push(Forward { host: None, guest: SSH });
    }
    Ok(Settings {
        board: Board::Q35,
        memory: args.memory,
        cpus: args.cpus,
        card: Card::Virtio,
        forward: boot::forwards(&wanted, &found.apps),
        credentials: args.credential.clone(),
        extra: args.qemu.clone(),
        ..Settings::new(if args.uefi { Firmware::Uefi } else { Firmware::Bios }, disks)
    })
}

/// What can be reached where.
fn port_lines(machine: &Machine<'_>, found: &DiskToBoot) -> Vec<String> {
    let line = |(host, guest): &(u16, u16)| match found.apps.iter().find(|app| app.port == Some(*guest)) {
        Some(app) => format!("{}: http://127.0.0.1:{host} (port {guest} of the guest)", app.name),
        None => format!("127.0.0.1:{host} is port {guest} of the guest"),
    };
    machine.ports().iter().map(line).collect()
}

/// The console with the terminal, which gives every key to the guest meanwhile.
fn on_terminal(machine: &mut Machine<'_>) -> Result<u8> {
    let stdin = std::io::stdin();
    let raw = if stdin.is_terminal() { Some(Raw::set(&stdin)?) } else { None };
    let input = stdin.as_fd().try_clone_to_owned().context("cannot share standard input")?;
    // A raw terminal does not go back to the first column by itself.
    let end = if raw.is_some() { "\r\n" } else { "\n" };
    let left = boot::console(machine, Some(input.into()), &|line| eprint!("{end}{line}{end}"));
    drop(raw);
    match left? {
        Left::PowerOff => {}
        Left::Key => eprintln!(),
    }
    Ok(0)
}

/// A terminal in raw mode, set back when this is dropped.
#[derive(Debug)]
struct Raw {
    before: Termios,
}

impl Raw {
    fn set(stdin: &std::io::Stdin) -> Result<Self> {
        let before = tcgetattr(stdin).context("cannot read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        // What the guest and we print still goes through the terminal's line ends.
        raw.output_modes = before.output_modes;
        tcsetattr(stdin, OptionalActions::Drain, &raw).context("cannot set the terminal's mode")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before);
    }
}
