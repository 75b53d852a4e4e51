//! What a machine is made of: its files, its credentials, QEMU's arguments.
//!
//! ```text
//! STATE/machines/ID/       0700
//!   machine.json           what the target has to find again
//!   base.raw               the release's disk: a hard link to the cache's, so that pruning does no harm; never written
//!   disk.qcow2             what this machine wrote over it; gone with the machine
//!   variables.fd           UEFI's variables
//!   journal                the app's last words, kept when the machine is stopped
//!   agent                  held (flock) by whoever talks to the guest's agent
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use base64::Engine as _;

use crate::artifact::disk::{self, App};
use crate::artifact::store::Store;
use crate::bake;
use crate::cmd::Cmd;
use crate::config::types as config;
use crate::error::Problem;
use crate::rollout::shim::Instance;
use crate::rollout::target::{InstanceSpec, Secret};
use crate::vm::accelerator::Choice;
use crate::vm::command::{self, Drive, Prepared, Sockets};
use crate::vm::settings::{Bus, Firmware, Format, Forward, Settings};
use crate::vm::{Tools, firmware};

/// Format of `machine.json`.
pub const FORMAT: u32 = 1;
/// Bytes of a volume's disk as the machine sees it; its file holds what was written.
const VOLUME: u64 = 16 << 30;
/// Serial number by which the guest finds it (`/dev/disk/by-id/virtio-SERIAL`).
const SERIAL: &str = "pipeline-data";
/// SMBIOS tables hold 64 KiB together; what is larger goes by firmware configuration.
const SMBIOS_MAX: usize = 32 << 10;

/// `machine.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub format: u32,
    pub instance: Instance,
    /// The app requests go to, and its port.
    pub app: String,
    pub port: Option<u16>,
    /// Programs in place of QEMU.
    pub command: Option<config::VmCommand>,
}

/// The files of a machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Files {
    pub base: PathBuf,
    pub disk: PathBuf,
    pub firmware: Option<firmware::Files>,
    /// The disk of its volume.
    pub volume: Option<PathBuf>,
}

/// The app of the disk that requests go to.
///
/// # Errors
/// There is none of that name, or it is not clear which.
pub fn app<'a>(apps: &'a [App], wanted: Option<&str>, pipeline: &str) -> Result<&'a App> {
    let named = |name: &str| apps.iter().find(|app| app.name == name);
    let names = || apps.iter().map(|app| app.name.as_str()).collect::<Vec<_>>().join(", ");
    if let Some(wanted) = wanted {
        return named(wanted).ok_or_else(|| {
            Problem::usage(format!("the disk has no app `{wanted}`")).hint(format!("it has: {}", names())).into()
        });
    }
    let mut listening = apps.iter().filter(|app| app.port.is_some());
    match (named(pipeline), listening.next(), listening.next()) {
        (Some(app), _, _) | (None, Some(app), None) => Ok(app),
        (None, None, _) => {
            Err(Problem::usage("no app of the disk has a port").hint("name one in `host.apps` of the pipeline").into())
        }
        (None, Some(_), Some(_)) => Err(Problem::usage("the disk has several apps, and none has the pipeline's name")
            .hint(format!("write `app:` into the target: {}", names()))
            .into()),
    }
}

/// The credentials by which configuration and secrets reach `app` (DESIGN section 7, contract 7), and the mount of its volume.
///
/// # Errors
/// A value that does not fit into a line.
pub fn credentials(spec: &InstanceSpec, app: &str) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut credentials = BTreeMap::new();
    let mut lines = String::new();
    for (name, value) in &spec.env {
        if value.contains(['\n', '\r', '\0']) {
            return Err(Problem::usage(format!(
                "the value of `{name}` has several lines, which a machine's environment cannot hold"
            ))
            .hint("make it a secret, which is a file")
            .into());
        }
        lines += &format!("{name}={value}\n");
    }
    if !lines.is_empty() {
        credentials.insert(format!("app.{app}.env"), lines.into_bytes());
    }
    for (name, secret) in &spec.secrets {
        credentials.insert(format!("app.{app}.secret.{name}"), secret.bytes().to_vec());
    }
    if !spec.volumes.is_empty() {
        // The first mount makes the file system (systemd-makefs@.service); the app's own unit fills it from the image.
        let line = format!("/dev/disk/by-id/virtio-{SERIAL} /var/lib/{app} ext4 x-systemd.makefs,nosuid,nodev,noatime 0 2\n");
        credentials.insert("fstab.extra".into(), line.into_bytes());
    }
    Ok(credentials)
}

/// How credentials reach QEMU: arguments that name a secret of the shim's each, and those secrets. Neither the values nor
/// files with them are on a disk or a command line.
pub fn carried(credentials: &BTreeMap<String, Vec<u8>>) -> (Vec<PathBuf>, Vec<(String, PathBuf)>, BTreeMap<String, Secret>) {
    let (mut smbios, mut fw_cfg, mut secrets) = (Vec::new(), Vec::new(), BTreeMap::new());
    let mut total = 0;
    for (index, (name, value)) in credentials.iter().enumerate() {
        let encoded = base64::engine::general_purpose::STANDARD.encode(value);
        let text = format!("io.systemd.credential.binary:{name}={encoded}");
        let key = format!("credential-{index}");
        let place = PathBuf::from(format!("{{secret:{key}}}"));
        if total + text.len() < SMBIOS_MAX {
            total += text.len();
            smbios.push(place);
            secrets.insert(key, Secret::new(text));
        } else {
            fw_cfg.push((format!("opt/io.systemd.credentials/{name}"), place));
            secrets.insert(key, Secret::new(value.clone()));
        }
    }
    (smbios, fw_cfg, secrets)
}

/// Makes the files of a machine in `folder`, which is empty.
///
/// # Errors
/// The store has no such disk; it has several volumes, or shares one.
pub fn prepare(store: &Store, tools: &Tools, folder: &Path, spec: &InstanceSpec, disk: &disk::Disk) -> Result<Files> {
    let raw = bake::disk::raw(store, disk)?;
    let base = folder.join("base.raw");
    let base = match fs_err::hard_link(&raw, &base) {
        Ok(()) => base,
        // The cache is on another file system.
        Err(_) => raw,
    };
    let overlay = folder.join("disk.qcow2");
    let create = Cmd::new(tools.utility("qemu-img")?).args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&base);
    create.arg(&overlay).run().context("cannot make the machine's disk")?;
    let has = |name: &str| disk.config.firmware.iter().any(|firmware| firmware == name);
    let firmware = if has("bios") || disk.config.firmware.is_empty() {
        None
    } else {
        Some(match firmware::find(&tools.qemu)? {
            firmware::Files::Split { code, variables } => {
                let own = folder.join("variables.fd");
                fs_err::copy(&variables, &own)?;
                firmware::Files::Split { code, variables: own }
            }
            whole @ firmware::Files::Whole(_) => whole,
        })
    };
    Ok(Files { base, disk: overlay, firmware, volume: volume(tools, spec)? })
}

/// The disk of the instance's volume, made when it is not there; undone by nobody: it is data.
fn volume(tools: &Tools, spec: &InstanceSpec) -> Result<Option<PathBuf>> {
    let volume = match &spec.volumes[..] {
        [] => return Ok(None),
        [volume] => volume,
        _ => {
            let problem = Problem::usage(format!(
                "`{}` has {} volumes, and a machine has one disk for its data",
                spec.environment,
                spec.volumes.len()
            ));
            return Err(problem.hint("all volumes of an app lie on that one disk: name one of them").into());
        }
    };
    if spec.number > 0 {
        let problem = Problem::usage(format!("the volume `{}` is the disk of one machine, and there are several", volume.name));
        return Err(problem.hint("write `instances: 1`, or leave the volume out").into());
    }
    let mut path = volume.source.clone().into_os_string();
    path.push(".qcow2");
    let path = PathBuf::from(path);
    if !path.exists() {
        let dir = path.parent().context("a folder")?;
        fs_err::create_dir_all(dir)?;
        // Renamed when it is whole: half a disk of a killed start would be somebody's data.
        let new = path.with_extension("qcow2.new");
        Cmd::new(tools.utility("qemu-img")?).args(["create", "-q", "-f", "qcow2"]).arg(&new).arg(VOLUME.to_string()).run()?;
        fs_err::File::open(&new)?.sync_all()?;
        fs_err::rename(&new, &path)?;
    }
    Ok(Some(path))
}

/// QEMU and its arguments. Its console is standard output; the sockets `qmp` and `agent` are in its folder.
///
/// # Errors
/// A path that is not UTF-8.
pub fn arguments(
    tools: &Tools,
    choice: &Choice,
    target: &config::Vm,
    files: &Files,
    port: Option<u16>,
    carried: (&[PathBuf], &[(String, PathBuf)]),
) -> Result<Vec<String>> {
    let firmware = if files.firmware.is_some() { Firmware::Uefi } else { Firmware::Bios };
    let mut settings = Settings::new(firmware, Vec::new());
    settings.memory = target.memory;
    settings.cpus = target.cpus;
    settings.forward = port.map(|guest| Forward { host: None, guest }).into_iter().collect();
    if let Some(path) = &files.volume {
        // A comma in a value is written twice (qemu(1), "Syntax").
        let path = path.to_str().context("the volume's path is not UTF-8")?.replace(',', ",,");
        settings.extra = [
            "-drive",
            &format!("if=none,id=data,format=qcow2,cache=writeback,discard=unmap,file={path}"),
            "-device",
            &format!("virtio-blk-pci,drive=data,serial={SERIAL}"),
        ]
        .map(String::from)
        .to_vec();
    }
    let drive = Drive { path: files.disk.clone(), format: Format::Qcow2, bus: Bus::Virtio, unsafe_cache: false };
    let prepared = Prepared {
        accelerator: choice.accelerator,
        firmware: files.firmware.as_ref(),
        drives: &[drive],
        smbios: carried.0,
        fw_cfg: carried.1,
        sockets: Sockets::Kept,
    };
    let program = tools.qemu.clone().into_os_string();
    let words = std::iter::once(program).chain(command::arguments(&settings, &prepared));
    words.map(|word| word.into_string().map_err(|word| anyhow::anyhow!("`{}` is not UTF-8", word.display()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn an_app(name: &str, port: Option<u16>) -> App {
        App { name: name.into(), image: String::new(), port, health: None, uid_base: 0 }
    }

    #[test]
    fn the_app_that_requests_go_to() {
        let several = [an_app("notes", Some(8080)), an_app("shop", Some(80)), an_app("worker", None)];
        let cases: [(&[App], Option<&str>, &str, Result<&str, &str>); 7] = [
            (&several, Some("shop"), "notes", Ok("shop")),
            (&several, None, "notes", Ok("notes")),
            (&several, None, "appliance", Err("the disk has several apps, and none has the pipeline's name")),
            (&several[1..], None, "appliance", Ok("shop")),
            (&several[2..], None, "appliance", Err("no app of the disk has a port")),
            (&several[2..], None, "worker", Ok("worker")),
            (&several, Some("nothing"), "notes", Err("the disk has no app `nothing`")),
        ];
        for (apps, wanted, pipeline, expected) in cases {
            let found = app(apps, wanted, pipeline).map(|app| app.name.clone()).map_err(|error| error.to_string());
            assert_eq!(found, expected.map(str::to_owned).map_err(str::to_owned), "{wanted:?} {pipeline}");
        }
    }

    #[test]
    fn values_are_on_no_command_line() {
        let many: BTreeMap<String, Vec<u8>> = [
            ("app.a.env", b"A=b\n".to_vec()),
            ("app.a.secret.BIG", vec![b'x'; 40 << 10]),
            ("app.a.secret.KEY", b"top secret".to_vec()),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .into();
        let (smbios, fw_cfg, secrets) = carried(&many);
        assert_eq!(smbios, [PathBuf::from("{secret:credential-0}"), PathBuf::from("{secret:credential-2}")]);
        assert_eq!(fw_cfg, [("opt/io.systemd.credentials/app.a.secret.BIG".to_string(), "{secret:credential-1}".into())]);
        assert_eq!(secrets["credential-0"].bytes(), b"io.systemd.credential.binary:app.a.env=QT1iCg==");
        assert_eq!(secrets["credential-1"].bytes().len(), 40 << 10);
        let files =
            Files { base: "/b".into(), disk: "/m/disk.qcow2".into(), firmware: None, volume: Some("/v/a,b.qcow2".into()) };
        let choice = Choice { accelerator: crate::vm::accelerator::Accelerator::Tcg, words: String::new() };
        let tools = Tools::find(&std::env::var_os("PATH").unwrap()).unwrap();
        let line = arguments(&tools, &choice, &config::Vm::default(), &files, Some(8080), (&smbios, &fw_cfg)).unwrap().join(" ");
        assert!(!line.contains("top secret") && !line.contains("QT1iCg"), "{line}");
        for part in [
            " -m 512M ",
            " -chardev stdio,id=console,signal=off ",
            " -chardev socket,id=qmp,path=qmp,server=on,wait=off ",
            " -smbios type=11,path={secret:credential-0} ",
            "hostfwd=tcp:127.0.0.1:0-:8080",
            "file=/v/a,,b.qcow2 -device virtio-blk-pci,drive=data,serial=pipeline-data",
        ] {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }
}
