//! The checked pipeline: what the flows use. No string here needs checking twice.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

pub use super::file::{Compression, Network};
pub use host::{
    App, AppImage, Disk, FileContent, Firewall, Firmware, Format, Host, HostFile, Initrd, Kernel, Open, Protocol, Restart,
};
pub use host::{Units, User};
pub use release::{
    Approve, Budget, Check, Command, Environment, Gate, Http, Ledger, Person, Provenance, Releases, Report, Sbom, SbomDeny,
    Script, Seconds, SecretRef, Signed, Upstream, VmTestFile, Window, Yes, role,
};
pub use rollout::{
    Ask, Docker, Local, OnFailure, REDIRECT, Redirect, RolloutCheck, RolloutSettings, Route, Target, VM_MEMORY, Vm, VmCommand,
    Volume, VolumeSpec, Watch,
};

mod host;
mod release;
mod rollout;

/// Name of a pipeline and its image: `[a-z0-9]` and inner `.`, `_`, `-` (an OCI repository component).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Name(String);

impl Name {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        let inner = text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-'));
        if inner && edge(text.chars().next()) && edge(text.chars().last()) && text.len() <= 128 && !text.contains("..") {
            Ok(Self(text.into()))
        } else {
            Err(format!("`{text}` is not a name: lower case letters, digits and inner `.`, `_`, `-`"))
        }
    }
}

/// A Debian suite we know the archives of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Suite {
    Bookworm,
    Trixie,
    Sid,
}

impl Suite {
    pub const ALL: [Suite; 3] = [Suite::Bookworm, Suite::Trixie, Suite::Sid];

    pub const fn as_str(self) -> &'static str {
        match self {
            Suite::Bookworm => "bookworm",
            Suite::Trixie => "trixie",
            Suite::Sid => "sid",
        }
    }

    /// Whether the suite has `-security` and `-updates` beside it; sid has not.
    pub const fn has_updates(self) -> bool {
        !matches!(self, Suite::Sid)
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A pipeline, checked. Paths are absolute.
#[derive(Debug, Clone, PartialEq)]
pub struct Pipeline {
    pub name: Name,
    /// The pipeline file.
    pub file: PathBuf,
    /// The file's folder: relative paths start here, and `pipeline.lock` lies here.
    pub dir: PathBuf,
    pub base: Base,
    pub runtime: Runtime,
    pub source: Source,
    pub build: Build,
    pub configure: Vec<Configure>,
    pub image: Image,
    /// The machine, when the pipeline makes one.
    pub host: Option<Host>,
    /// Environments, people, ledger and registry.
    pub releases: Releases,
}

impl Pipeline {
    /// Whether there is an application image: not for a pipeline that only describes a machine.
    pub fn has_image(&self) -> bool {
        self.host.is_none()
            || self.runtime.builder != BuilderRef::None
            || !self.runtime.packages.is_empty()
            || !self.configure.is_empty()
            || !self.image.command.is_empty()
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Base {
    Debian(Debian),
    /// A reference as written; the lock pins its digest. `packages` need apt in the image.
    Image {
        reference: String,
        packages: Vec<String>,
    },
    /// A layout and, where it holds several images, the tag.
    Oci {
        layout: PathBuf,
        tag: Option<String>,
        packages: Vec<String>,
    },
    Tar {
        file: PathBuf,
        packages: Vec<String>,
    },
    Scratch,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Debian {
    pub suite: Suite,
    /// Sorted, without doubles.
    pub packages: Vec<String>,
    pub mirror: Option<String>,
    pub security_mirror: Option<String>,
    pub repositories: Vec<Repository>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Repository {
    pub uri: String,
    pub suite: String,
    /// `["main"]` when none are written.
    pub components: Vec<String>,
    /// Keyring file.
    pub signed_by: PathBuf,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Runtime {
    pub builder: BuilderRef,
    /// Sorted, without doubles.
    pub packages: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum BuilderRef {
    /// One of the builders inside the binary.
    Embedded(String),
    /// A folder with a `builder.yaml`.
    Folder(PathBuf),
    /// An S2I builder image.
    Image(String),
    /// No builder: the base with the configure steps is the result.
    None,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// A folder (`dir` already joined).
    Path(PathBuf),
    Git {
        url: String,
        reference: Option<String>,
        dir: Option<PathBuf>,
        submodules: bool,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Build {
    pub env: BTreeMap<String, String>,
    pub secrets: Vec<Secret>,
    /// Sorted, without doubles.
    pub packages: Vec<String>,
    pub trust: bool,
    pub network: Network,
    pub timeout: Duration,
    pub limits: Limits,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Secret {
    /// `[A-Za-z0-9._-]+`, a file name.
    pub id: String,
    pub from: SecretSource,
}

#[derive(Debug, Clone, PartialEq)]
pub enum SecretSource {
    Env(String),
    File(PathBuf),
}

/// Limits of each step; `None` is the inherited limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    pub processes: Option<u64>,
    /// Bytes.
    pub file_size: Option<u64>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Configure {
    Shell(PathBuf),
    Ansible(PathBuf),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Empty: the builder's run script.
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub labels: BTreeMap<String, String>,
    pub port: Option<u16>,
    pub user: Option<String>,
    pub workdir: Option<String>,
    /// Absolute paths.
    pub volumes: Vec<String>,
    pub health: Option<Health>,
    pub compression: Compression,
}

#[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
pub struct Health {
    pub check: HealthCheck,
    pub deadline: Duration,
}

#[derive(Debug, Clone, PartialEq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthCheck {
    Http(String),
    Tcp,
    Command(Vec<String>),
}
