//! The checked machine of a pipeline.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

pub use crate::config::file::{Firmware, Format, Initrd, Restart};
use crate::oci::digest::Digest;

/// A machine, checked. Paths of this machine are absolute.
#[derive(Debug, Clone, PartialEq)]
pub struct Host {
    /// Sorted, without doubles; those every host has are not in it.
    pub packages: Vec<String>,
    pub kernel: Kernel,
    pub arguments: Vec<String>,
    /// Sorted, without doubles and without `all`.
    pub modules: Vec<String>,
    /// Whether every module of the kernel stays.
    pub all_modules: bool,
    pub users: BTreeMap<String, User>,
    /// Name → id.
    pub groups: BTreeMap<String, Option<u32>>,
    pub ssh_keys: Vec<String>,
    pub files: Vec<HostFile>,
    pub units: Units,
    pub sysctl: BTreeMap<String, String>,
    pub timezone: Option<String>,
    pub hostname: Option<String>,
    pub firewall: Option<Firewall>,
    pub apps: Vec<App>,
    pub initrd: Initrd,
    pub disk: Disk,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Kernel {
    Package(String),
    Files { image: PathBuf, modules: Option<PathBuf> },
}

#[derive(Debug, Clone, PartialEq)]
pub struct User {
    pub uid: Option<u32>,
    pub groups: Vec<String>,
    pub shell: String,
    pub home: String,
    pub ssh_keys: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct HostFile {
    /// Absolute path in the tree.
    pub path: String,
    pub content: FileContent,
    pub mode: u32,
    /// Names or ids.
    pub owner: (String, String),
}

#[derive(Debug, Clone, PartialEq)]
pub enum FileContent {
    Text(String),
    File(PathBuf),
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Units {
    pub enable: Vec<String>,
    pub disable: Vec<String>,
    pub mask: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Firewall {
    pub allow: Vec<Open>,
}

/// Ports that are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Open {
    pub protocol: Protocol,
    pub first: u16,
    pub last: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

/// An application on the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct App {
    /// Unit, folder and user range are named by it.
    pub name: String,
    pub image: AppImage,
    pub port: Option<u16>,
    /// Bytes.
    pub memory: Option<u64>,
    /// Hundredths of a processor.
    pub cpu_percent: Option<u32>,
    pub processes: u64,
    pub env: BTreeMap<String, String>,
    pub restart: Restart,
    /// First of its range of user ids, when it is written.
    pub uid_base: Option<u32>,
}

/// Where an application comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum AppImage {
    /// This pipeline's own image.
    Own,
    /// The image of the pipeline in this file, built first.
    Pipeline(PathBuf),
    /// `NAME:TAG` of the store.
    Tag(String),
    /// A digest in the store, with the name it was written with.
    Digest(String, Digest),
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Disk {
    /// Bytes; `None`: by the content.
    pub size: Option<u64>,
    /// Bytes; `None`: by the content.
    pub slot: Option<u64>,
    /// Empty: the default.
    pub formats: Vec<Format>,
    /// Empty: all.
    pub firmware: Vec<Firmware>,
}
