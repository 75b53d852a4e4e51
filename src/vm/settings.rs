//! What a machine is: the hardware a guest sees, its disks, ports and credentials.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Memory of a machine when nothing is said: 1 GiB.
pub const MEMORY: u64 = 1 << 30;
/// Processors of a machine when nothing is said.
pub const CPUS: u32 = 2;

/// What starts the boot loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS, which is part of QEMU.
    Bios,
    /// OVMF.
    Uefi,
}

impl Firmware {
    pub const fn as_str(self) -> &'static str {
        match self {
            Firmware::Bios => "bios",
            Firmware::Uefi => "uefi",
        }
    }
}

/// The chipset (QEMU's `-machine`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Board {
    /// PCI Express, as Proxmox, libvirt and clouds have it.
    #[default]
    Q35,
    /// The i440FX of bare `qemu-system-x86_64`.
    Pc,
}

/// How a disk is attached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    #[default]
    Virtio,
    /// What the board has by itself: PIIX IDE on `pc`, AHCI on `q35`.
    Ide,
    /// AHCI.
    Sata,
    /// virtio-scsi.
    Scsi,
    /// VMware's paravirtual SCSI.
    Pvscsi,
    Nvme,
}

/// The network card.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Card {
    #[default]
    Virtio,
    /// What bare `qemu-system-x86_64` gives.
    E1000,
    E1000e,
    Vmxnet3,
    /// No network.
    None,
}

/// A file's format, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vpc,
    Vhdx,
}

impl Format {
    pub const fn as_str(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vpc => "vpc",
            Format::Vhdx => "vhdx",
        }
    }
}

/// What is on a disk.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// A file. `keep`: it is written to; else what is written goes into an overlay that is thrown away.
    File { path: PathBuf, format: Format, keep: bool },
    /// Nothing; thrown away. The size is that of the [`Disk`].
    Empty,
}

/// A disk; the first of a machine boots.
#[derive(Debug, Clone, PartialEq)]
pub struct Disk {
    pub content: Content,
    pub bus: Bus,
    /// Bytes; `None`: as the file has it. Not smaller than that.
    pub size: Option<u64>,
}

/// A TCP port of the guest, reachable on 127.0.0.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Port of this machine; `None`: one the kernel chooses.
    pub host: Option<u16>,
    pub guest: u16,
}

/// A systemd credential (systemd.system-credentials(7)).
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    pub name: String,
    pub value: Vec<u8>,
}

impl std::fmt::Debug for Credential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Secrets are not for logs.
        write!(f, "Credential({}, {} bytes)", self.name, self.value.len())
    }
}

/// What is started.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Start {
    /// The firmware, and by it the first disk.
    #[default]
    Disk,
    /// A kernel given to QEMU (multiboot or Linux), past the disk's boot loader.
    Kernel { kernel: PathBuf, initrd: Option<PathBuf>, append: String },
}

/// A machine to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    pub firmware: Firmware,
    pub board: Board,
    /// QEMU's CPU model; `None`: the best the accelerator has.
    pub cpu: Option<String>,
    /// Bytes.
    pub memory: u64,
    pub cpus: u32,
    pub disks: Vec<Disk>,
    pub card: Card,
    pub forward: Vec<Forward>,
    pub credentials: Vec<Credential>,
    pub start: Start,
    /// Added to QEMU's arguments as they are.
    pub extra: Vec<String>,
}

impl Settings {
    /// A machine with the usual hardware and these disks.
    pub fn new(firmware: Firmware, disks: Vec<Disk>) -> Self {
        Self {
            firmware,
            board: Board::default(),
            cpu: None,
            memory: MEMORY,
            cpus: CPUS,
            disks,
            card: Card::default(),
            forward: Vec::new(),
            credentials: Vec::new(),
            start: Start::default(),
            extra: Vec::new(),
        }
    }
}
