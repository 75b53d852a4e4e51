//! A vm-test as it is written: the shapes serde reads and `pipeline schema vm-test` publishes.
//!
//! Nothing here is checked beyond its type; [`super::check`] makes a [`super::types::VmTest`] of it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use crate::vm::settings::{Board, Bus, Card, Firmware};

/// A vm-test: a disk is booted in QEMU, and its steps are done one after the other (docs/vm-tests.md).
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TestFile {
    /// What is tested, in a line.
    #[serde(default)]
    pub description: Option<String>,
    /// The disk: `NAME`, `NAME:TAG`, or a file relative to this one. Default: the one named to `pipeline test`.
    #[serde(default)]
    pub disk: Option<String>,
    /// Size of the disk the guest sees, like `8G`; not smaller than it is. Default: as it is.
    #[serde(default)]
    pub disk_size: Option<String>,
    /// How the disk is attached. Default: virtio.
    #[serde(default)]
    pub bus: Option<Bus>,
    /// More disks, in order.
    #[serde(default)]
    pub disks: Vec<DiskFile>,
    /// The test runs once for each. Default: `[bios]`.
    #[serde(default)]
    pub firmware: Vec<Firmware>,
    /// QEMU's board. Default: q35.
    #[serde(default)]
    pub machine: Option<Board>,
    /// QEMU's CPU model, like `qemu64`. Default: everything the accelerator has.
    #[serde(default)]
    pub cpu: Option<String>,
    /// Like `512M` or `2G`. Default: 1G.
    #[serde(default)]
    pub memory: Option<String>,
    /// Default: 2.
    #[serde(default)]
    #[schemars(range(min = 1, max = 64))]
    pub cpus: Option<u32>,
    /// The network card. Default: virtio.
    #[serde(default)]
    pub network_card: Option<Card>,
    /// systemd credentials, like `system.hostname`: the value, or `{ file: … }` relative to this one.
    #[serde(default)]
    pub credentials: BTreeMap<String, CredentialFile>,
    /// TCP ports of the guest that are forwarded beside those the `http` steps name.
    #[serde(default)]
    #[schemars(inner(range(min = 1, max = 65535)))]
    pub forward: Vec<u16>,
    /// Whether the guest may panic; else a panic fails the step that runs. Default: false.
    #[serde(default)]
    pub allow_panic: Option<bool>,
    /// Arguments added to QEMU's.
    #[serde(default)]
    pub qemu: Vec<String>,
    /// What is done, in order.
    pub steps: Vec<StepFile>,
}

/// `file`, or `size` for an empty one.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DiskFile {
    /// A file relative to this one; what is written to it is thrown away.
    #[serde(default)]
    pub file: Option<String>,
    /// Like `1G`.
    #[serde(default)]
    pub size: Option<String>,
    /// Default: virtio.
    #[serde(default)]
    pub bus: Option<Bus>,
}

/// A credential's value.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum CredentialFile {
    /// In a file.
    From(FileName),
    Value(String),
}

/// A file relative to the test.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileName {
    pub file: String,
}

/// Exactly one of its keys.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct StepFile {
    /// Switches the machine on; does not wait for anything.
    #[serde(default)]
    pub boot: Option<Plain>,
    /// Waits for a state.
    #[serde(default)]
    pub wait_for: Option<WaitForFile>,
    /// Asks a port of the guest over HTTP, until the answer is as expected.
    #[serde(default)]
    pub http: Option<HttpFile>,
    /// Runs a command in the guest, as root, once.
    #[serde(default)]
    pub run: Option<RunFile>,
    /// Looks at a file in the guest.
    #[serde(default)]
    pub file: Option<FileFile>,
    /// Writes a file in the guest.
    #[serde(default)]
    pub write: Option<WriteFile>,
    /// Types on the serial console.
    #[serde(default, rename = "type")]
    pub typing: Option<TypeFile>,
    /// Restarts the guest and waits until it is up again.
    #[serde(default)]
    pub reboot: Option<RebootFile>,
    /// Ends the machine as a power failure does, and switches it on again on the same disks.
    #[serde(default)]
    pub power_cut: Option<PowerCutFile>,
    /// Asks the guest to switch itself off and waits until it has.
    #[serde(default)]
    pub power_off: Option<Plain>,
    /// Keeps a picture of the screen.
    #[serde(default)]
    pub screenshot: Option<ScreenshotFile>,
    /// Turns a byte of a disk over, past the guest.
    #[serde(default)]
    pub flip: Option<FlipFile>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Plain {
    /// How long it may take, like `90s`.
    #[serde(default)]
    pub timeout: Option<String>,
}

/// Exactly one of `console`, `agent`, `unit`, `port`, `running`, `command`, `panic` and `off`.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WaitForFile {
    /// A text on the serial console, printed since the test last switched the machine on or rebooted it.
    #[serde(default)]
    pub console: Option<String>,
    /// With `console`: how often it must be there. Default: 1.
    #[serde(default)]
    #[schemars(range(min = 1))]
    pub count: Option<u32>,
    /// `true`: the guest takes commands.
    #[serde(default)]
    pub agent: Option<bool>,
    /// A systemd unit.
    #[serde(default)]
    pub unit: Option<String>,
    /// With `unit`: its state. Default: active.
    #[serde(default)]
    pub state: Option<String>,
    /// A TCP port somebody listens on in the guest.
    #[serde(default)]
    #[schemars(range(min = 1, max = 65535))]
    pub port: Option<u16>,
    /// `true`: all units are up and none has failed.
    #[serde(default)]
    pub running: Option<bool>,
    /// A command that ends with status 0; it is run until it does.
    #[serde(default)]
    pub command: Option<CommandFile>,
    /// `true`: the guest panics.
    #[serde(default)]
    pub panic: Option<bool>,
    /// `true`: the machine switches itself off.
    #[serde(default)]
    pub off: Option<bool>,
    /// How long it may take, like `90s`. Default: 5m.
    #[serde(default)]
    pub timeout: Option<String>,
}

/// A list of words, or a line for the guest's `/bin/sh`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum CommandFile {
    Words(Vec<String>),
    Shell(String),
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpFile {
    /// TCP port in the guest.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// Default: `/`.
    #[serde(default)]
    pub path: Option<String>,
    /// Default: GET.
    #[serde(default)]
    pub method: Option<String>,
    /// Headers of the request.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Body of the request.
    #[serde(default)]
    pub send: Option<String>,
    /// Expected status. Default: 200.
    #[serde(default)]
    #[schemars(range(min = 100, max = 599))]
    pub status: Option<u16>,
    /// Expected body.
    #[serde(default)]
    pub body: Option<ExpectFile>,
    /// How long it may take until the answer is as expected, like `90s`. Default: 2m.
    #[serde(default)]
    pub timeout: Option<String>,
}

/// What a text must be like: all that is said; a text alone stands for itself, without its last line end.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum ExpectFile {
    Is(MatcherFile),
    Text(String),
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MatcherFile {
    /// Exactly this, with every line end.
    #[serde(default)]
    pub equals: Option<String>,
    #[serde(default)]
    pub contains: Option<String>,
    #[serde(default)]
    pub contains_not: Option<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RunFile {
    pub command: CommandFile,
    /// Expected exit status. Default: 0.
    #[serde(default)]
    #[schemars(range(min = 0, max = 255))]
    pub status: Option<u8>,
    /// Expected on standard output.
    #[serde(default)]
    pub stdout: Option<ExpectFile>,
    /// Expected on standard error.
    #[serde(default)]
    pub stderr: Option<ExpectFile>,
    /// Keeps standard output, without its last line end, as a variable: later steps write `${NAME}`.
    #[serde(default)]
    pub save: Option<String>,
    /// How long it may take, like `90s`. Default: 1m.
    #[serde(default)]
    pub timeout: Option<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct FileFile {
    pub path: String,
    /// `false`: it must not be there. Default: true.
    #[serde(default)]
    pub exists: Option<bool>,
    /// Its whole content.
    #[serde(default)]
    pub equals: Option<String>,
    #[serde(default)]
    pub contains: Option<String>,
    #[serde(default)]
    pub contains_not: Option<String>,
    /// Permissions, in quotes: `"0644"`.
    #[serde(default)]
    pub mode: Option<String>,
    /// `USER:GROUP` by name.
    #[serde(default)]
    pub owner: Option<String>,
    /// How long it may take, like `90s`. Default: 1m.
    #[serde(default)]
    pub timeout: Option<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WriteFile {
    pub path: String,
    pub text: String,
    /// Permissions, in quotes. Default: `"0644"`.
    #[serde(default)]
    pub mode: Option<String>,
    /// How long it may take, like `90s`. Default: 1m.
    #[serde(default)]
    pub timeout: Option<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TypeFile {
    /// Sent as it is; `\n` in double quotes is the Enter key.
    pub text: String,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RebootFile {
    /// `true`: by the reset button, so that the guest cannot prepare. Default: false.
    #[serde(default)]
    pub hard: Option<bool>,
    /// Whether to wait until the guest takes commands again. Default: true where it took some before.
    #[serde(default)]
    pub wait: Option<bool>,
    /// How long it may take, like `90s`. Default: 5m.
    #[serde(default)]
    pub timeout: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PowerCutFile {
    /// `false`: the machine stays off until `boot`. Default: true.
    #[serde(default)]
    pub start: Option<bool>,
    /// How long it may take, like `90s`. Default: 1m.
    #[serde(default)]
    pub timeout: Option<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ScreenshotFile {
    /// A name ending in `.png` or `.ppm`; it is kept beside the console log.
    pub file: String,
}

/// `offset` or `text`.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FlipFile {
    /// Number of the disk. Default: 0.
    #[serde(default)]
    pub disk: Option<u32>,
    /// Number or name of the partition. Default: the whole disk.
    #[serde(default)]
    pub partition: Option<WhichFile>,
    /// Byte from the start of the partition.
    #[serde(default)]
    pub offset: Option<u64>,
    /// The first byte of the first place that holds this text.
    #[serde(default)]
    pub text: Option<String>,
}

#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum WhichFile {
    Number(u32),
    Name(String),
}
