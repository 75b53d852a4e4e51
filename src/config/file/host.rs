//! The key `host` of the pipeline file, as it is written.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A machine: what is added to the base so that it boots, and what runs on it.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// Debian packages beside those every host has.
    #[serde(default)]
    pub packages: Vec<String>,
    /// A Debian kernel package, or files. Default: `linux-image-amd64`.
    #[serde(default)]
    pub kernel: Option<Kernel>,
    /// Added to the kernel command line.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// Kernel modules loaded at boot, and kept in the tree with what they need; `all`: every module is kept.
    #[serde(default)]
    pub modules: Vec<String>,
    /// Users by name.
    #[serde(default)]
    pub users: BTreeMap<String, User>,
    /// Groups by name.
    #[serde(default)]
    pub groups: BTreeMap<String, Group>,
    /// Public keys that may log in as root by ssh.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
    /// Files put into the tree last.
    #[serde(default)]
    pub files: Vec<HostFile>,
    /// What systemd starts.
    #[serde(default)]
    pub units: Option<Units>,
    /// Kernel settings, like `net.ipv4.ip_forward: 1`.
    #[serde(default)]
    pub sysctl: BTreeMap<String, String>,
    /// Like `Europe/Berlin`. Default: UTC.
    #[serde(default)]
    pub timezone: Option<String>,
    /// Name of the machine; each `?` becomes a digit made of the machine-id.
    #[serde(default)]
    pub hostname: Option<String>,
    /// A packet filter that lets in only what is named, and the ports of the apps.
    #[serde(default)]
    pub firewall: Option<Firewall>,
    /// Applications: pipelines beside this one, images of the store, or either with settings.
    #[serde(default)]
    pub apps: Vec<App>,
    /// What the kernel starts first. Default: static.
    #[serde(default)]
    pub initrd: Option<Initrd>,
    /// The disk that is made of it.
    #[serde(default)]
    pub disk: Option<Disk>,
}

/// A package name, or files.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Kernel {
    /// A Debian kernel package, like `linux-image-cloud-amd64`.
    Package(String),
    Files(KernelFiles),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelFiles {
    /// A kernel image (bzImage), relative to the pipeline file.
    pub path: String,
    /// The folder of its modules, as in `/usr/lib/modules/VERSION`.
    #[serde(default)]
    pub modules: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Default: the next free one from 1000 on.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65533))]
    pub uid: Option<u32>,
    /// Groups beside the user's own.
    #[serde(default)]
    pub groups: Vec<String>,
    /// Default: /bin/bash.
    #[serde(default)]
    pub shell: Option<String>,
    /// Default: /home/NAME, which is on /var.
    #[serde(default)]
    pub home: Option<String>,
    /// Public keys that may log in by ssh.
    #[serde(default)]
    pub ssh_keys: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Default: the next free one.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65533))]
    pub gid: Option<u32>,
}

/// Exactly one of `content` and `source`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HostFile {
    /// Where it goes: absolute.
    pub path: String,
    /// Its text.
    #[serde(default)]
    pub content: Option<String>,
    /// A file, relative to the pipeline file.
    #[serde(default)]
    pub source: Option<String>,
    /// Octal, in quotes. Default: "0644".
    #[serde(default)]
    pub mode: Option<String>,
    /// `USER:GROUP`. Default: root:root.
    #[serde(default)]
    pub owner: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Units {
    /// Started at boot.
    #[serde(default)]
    pub enable: Vec<String>,
    /// Not started at boot.
    #[serde(default)]
    pub disable: Vec<String>,
    /// Never started.
    #[serde(default)]
    pub mask: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Firewall {
    /// Ports from everywhere: `22`, `53/udp`, `8000-8010`.
    #[serde(default)]
    pub allow: Vec<String>,
}

/// The name of an image, or settings.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum App {
    /// A pipeline beside this one (also this one), `NAME:TAG` or `NAME@sha256:…` of the store.
    Image(String),
    Settings(AppSettings),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AppSettings {
    /// A pipeline beside this one (also this one), `NAME:TAG` or `NAME@sha256:…` of the store.
    pub image: String,
    /// Name on the host. Default: the image's.
    #[serde(default)]
    pub name: Option<String>,
    /// TCP port it listens on, told to it as PORT. Default: the image's.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// Most memory it may use, like `256M`.
    #[serde(default)]
    pub memory: Option<String>,
    /// Processors it may use, like `0.5`.
    #[serde(default)]
    pub cpus: Option<f64>,
    /// Processes and threads it may have at once. Default: 512.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub processes: Option<u64>,
    /// Variables of the program.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// When it is started again. Default: always.
    #[serde(default)]
    pub restart: Option<Restart>,
    /// First of its 65,536 user ids: a multiple of 65536. Default: made of the name.
    #[serde(default)]
    pub uid: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// However it ended.
    #[default]
    Always,
    /// When it failed.
    OnFailure,
    /// Never.
    No,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Initrd {
    /// A small program and the modules of virtual and cloud machines.
    #[default]
    Static,
    /// dracut's, for hardware the other does not know.
    Dracut,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Size of the disk, like `8G`, or `auto`.
    #[serde(default)]
    pub size: Option<String>,
    /// Size of each of the two slots, like `1G`, or `auto`.
    #[serde(default)]
    pub slot: Option<String>,
    /// What `pipeline bake` writes. Default: qcow2.
    #[serde(default)]
    pub formats: Vec<Format>,
    /// What it boots with. Default: both.
    #[serde(default)]
    pub firmware: Vec<Firmware>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vhd,
    Gce,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    Uefi,
    Bios,
}
