//! The pipeline file as it is written: the shapes serde reads and `pipeline schema` publishes.
//!
//! Nothing here is checked beyond its type; [`super::check`] turns a [`PipelineFile`] into
//! [`super::types::Pipeline`], the form the flows use.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

mod host;
mod release;
mod rollout;

pub use host::{App, AppSettings, Disk, Firewall, Firmware, Format, Group, Host, HostFile, Initrd, Kernel, KernelFiles, Restart};
pub use host::{Units, User};
pub use release::{
    Approve, ApproveRule, Budget, Command, Environment, Gate, Http, Ledger, LedgerSettings, OneOrMany, Person, Provenance,
    Report, Sbom, SbomDeny, SecretPlace, SecretRef, Signed, SignedKeys, Upstream, UpstreamRule, Window,
};
pub use rollout::{
    Docker, Local, Redirect, RedirectRule, Rollout, RolloutCheck, Route, Target, Vm, VmCommand, VolumeForm, VolumeRule, Watch,
};

/// A pipeline: what is built, from what, and how.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PipelineFile {
    /// Name of the pipeline and of the image: lower case letters, digits, `.`, `_` and `-`.
    pub name: String,
    /// The tree everything stands on.
    pub base: Base,
    /// What turns the source into something that runs.
    #[serde(default)]
    pub runtime: Option<Runtime>,
    /// Where the source comes from. Default: the folder of the pipeline file.
    #[serde(default)]
    pub source: Option<Source>,
    /// How the build steps run.
    #[serde(default)]
    pub build: Option<Build>,
    /// Configuration management, run in the build after the application is assembled.
    #[serde(default)]
    pub configure: Vec<Configure>,
    /// What the image says about itself.
    #[serde(default)]
    pub image: Option<Image>,
    /// A machine: the pipeline makes a host image too, which `pipeline bake` makes a disk of.
    #[serde(default)]
    pub host: Option<Host>,
    /// Places a release is promoted to, by name. They take effect through `pipeline environment apply`.
    #[serde(default)]
    pub environments: BTreeMap<String, Environment>,
    /// Who may decide, by the name Git knows them by. Where anybody is named, only signed decisions count.
    #[serde(default)]
    pub people: BTreeMap<String, Person>,
    /// The Git repository decisions are written to. Default: one on this machine.
    #[serde(default)]
    pub ledger: Option<Ledger>,
    /// The repository releases are pushed to, like `registry.example/team/shop`.
    #[serde(default)]
    pub registry: Option<String>,
}

/// Exactly one of `debian`, `image`, `oci`, `tar` and `scratch`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// A Debian suite: `bookworm`, `trixie` or `sid`, with its security and updates suites.
    #[serde(default)]
    pub debian: Option<String>,
    /// An image in a registry, like `docker.io/library/debian:13`; the digest seen is pinned in the lock.
    #[serde(default)]
    pub image: Option<String>,
    /// An OCI image layout: a folder, or `FOLDER:TAG`.
    #[serde(default)]
    pub oci: Option<String>,
    /// A tar file with a root file system, plain or compressed with gzip or zstd.
    #[serde(default)]
    pub tar: Option<String>,
    /// `true`: an empty tree.
    #[serde(default)]
    pub scratch: Option<bool>,
    /// Debian packages of the base layer.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Mirror of the Debian archive. Default: the one this machine's apt uses.
    #[serde(default)]
    pub mirror: Option<String>,
    /// Mirror of the Debian security archive. Default: the one this machine's apt uses.
    #[serde(default)]
    pub security_mirror: Option<String>,
    /// More archives beside the suite's own.
    #[serde(default)]
    pub repositories: Vec<Repository>,
}

/// A Debian archive beside the suite's own.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Repository {
    /// Its address, like `https://packages.example/debian`.
    pub uri: String,
    pub suite: String,
    #[serde(default)]
    pub components: Vec<String>,
    /// The archive's public keys: a keyring file, relative to the pipeline file.
    pub signed_by: String,
}

/// Exactly one of `builder` and `image`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// A builder: `python`, `node`, `static`, or a folder with a `builder.yaml`, relative to the pipeline file.
    #[serde(default)]
    pub builder: Option<String>,
    /// An S2I builder image in a registry; it takes the place of the base.
    #[serde(default)]
    pub image: Option<String>,
    /// Debian packages the application needs when it runs, beside the builder's own.
    #[serde(default)]
    pub packages: Vec<String>,
}

/// `path`, or `git` with `ref`; `dir` goes with both.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// A folder, relative to the pipeline file.
    #[serde(default)]
    pub path: Option<String>,
    /// A Git repository.
    #[serde(default)]
    pub git: Option<String>,
    /// Branch, tag or commit. Default: the remote's HEAD.
    #[serde(default, rename = "ref")]
    pub reference: Option<String>,
    /// Sub-folder to take.
    #[serde(default)]
    pub dir: Option<String>,
    /// Whether submodules of a Git source are fetched. Default: true.
    #[serde(default)]
    pub submodules: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// Variables of the build steps; unlike `image.env` they stay out of the image.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Secrets of the build steps: files on tmpfs below `/run/secrets` while a step runs.
    #[serde(default)]
    pub secrets: Vec<Secret>,
    /// Debian packages the steps need that do not go into the image.
    #[serde(default)]
    pub packages: Vec<String>,
    /// Whether steps see this machine's CA bundle and proxy variables. Default: true.
    #[serde(default)]
    pub trust: Option<bool>,
    /// Network of the assemble and configure steps; dependency steps always have it. Default: none.
    #[serde(default)]
    pub network: Option<Network>,
    /// How long one step may take, like `90s`, `30m` or `2h`. Default: 30m.
    #[serde(default)]
    pub timeout: Option<String>,
    /// Resource limits of each step.
    #[serde(default)]
    pub limits: Option<Limits>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// No network but loopback.
    None,
    /// This machine's network.
    Host,
}

/// Exactly one of `env` and `file`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// File name below `/run/secrets`.
    pub id: String,
    /// The variable of the calling environment that holds the value.
    #[serde(default)]
    pub env: Option<String>,
    /// A file that holds the value, relative to the pipeline file.
    #[serde(default)]
    pub file: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Memory of a step, like `512M` or `2G`.
    #[serde(default)]
    pub memory: Option<String>,
    /// Processes and threads a step may have at once.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub processes: Option<u64>,
    /// Largest file a step may write, like `10G`.
    #[serde(default)]
    pub file_size: Option<String>,
}

/// Exactly one of `shell` and `ansible`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Configure {
    /// A script, relative to the pipeline file; run as root in the tree.
    #[serde(default)]
    pub shell: Option<String>,
    /// An Ansible playbook, relative to the pipeline file; its folder is there while it runs.
    #[serde(default)]
    pub ansible: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// The program and its arguments. Default: the builder's run script.
    #[serde(default)]
    pub command: Vec<String>,
    /// Variables of the program; they are in the image.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// TCP port the program listens on.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// `USER`, `UID` or `UID:GID`. Default: the builder's.
    #[serde(default)]
    pub user: Option<String>,
    /// Folder the program starts in.
    #[serde(default)]
    pub workdir: Option<String>,
    /// Folders that hold data; they are writable when the image runs.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// How to tell that the program serves.
    #[serde(default)]
    pub health: Option<Health>,
    /// Compression of the layers. Default: zstd.
    #[serde(default)]
    pub compression: Option<Compression>,
}

/// Exactly one of `http`, `tcp` and `command`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// A path that answers 2xx or 3xx, like `/healthz`.
    #[serde(default)]
    pub http: Option<String>,
    /// `true`: a connection is accepted.
    #[serde(default)]
    pub tcp: Option<bool>,
    /// A command that exits with 0.
    #[serde(default)]
    pub command: Option<Vec<String>>,
    /// How long the program has to become healthy, like `30s`. Default: 60s.
    #[serde(default)]
    pub deadline: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// zstd level 3: ten times faster than gzip, and smaller.
    Zstd,
    /// gzip level 6, for consumers that know nothing else.
    Gzip,
}
