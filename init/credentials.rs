//! Gathers what is brought in from outside at boot: credentials of the firmware, of QEMU, and of a NoCloud disk.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use super::modules::Modules;
use super::{copy, disks, label, log, smbios, sys};

/// QEMU's `-fw_cfg name=opt/io.systemd.credentials/NAME`.
const FW_CFG: &str = "/sys/firmware/qemu_fw_cfg/by_name/opt/io.systemd.credentials";
/// Where a NoCloud disk is mounted for the moment.
const NOCLOUD: &str = "/run/pipeline/nocloud";
/// A longer value is not read: systemd's own limit for one credential.
const MAX_VALUE: u64 = 1 << 20;

/// A named value.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    pub name: String,
    pub value: Vec<u8>,
    /// systemd finds it by itself.
    pub known: bool,
}

/// The files of a NoCloud disk; what is missing is empty.
#[derive(Default, PartialEq, Eq)]
pub struct NoCloud {
    pub meta_data: String,
    pub user_data: Vec<u8>,
    pub network_config: String,
}

/// Everything that was brought.
#[derive(Default)]
pub struct Brought {
    pub credentials: Vec<Credential>,
    pub nocloud: Option<NoCloud>,
}

impl Brought {
    /// The value of a credential; the first of that name counts.
    pub fn text(&self, name: &str) -> Option<String> {
        let credential = self.credentials.iter().find(|credential| credential.name == name)?;
        Some(String::from_utf8_lossy(&credential.value).trim_end_matches(['\n', '\r']).to_string())
    }

    fn add(&mut self, name: &str, value: Vec<u8>, known: bool) {
        if !is_name(name) {
            log::warn(&format!("a credential has the impossible name `{name}` and is left out"));
        } else if !self.credentials.iter().any(|credential| credential.name == name) {
            self.credentials.push(Credential { name: name.to_string(), value, known });
        }
    }
}

/// A name that is a file name of its own.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte);
    (1..=255).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(plain)
}

/// Reads all sources; nothing here stops the boot. `own_disk` is not looked at for a NoCloud disk.
pub fn collect(firmware: &smbios::Table, own_disk: &str, modules: &mut Modules) -> Brought {
    let mut brought = Brought::default();
    for (name, value) in firmware.strings.iter().filter_map(|string| smbios::credential(string)) {
        match value {
            Ok(value) => brought.add(&name, value, true),
            Err(error) => log::warn(&format!("the credential {name} of the firmware {error} and is left out")),
        }
    }
    for name in entries(Path::new(FW_CFG)) {
        match read(&Path::new(FW_CFG).join(&name).join("raw")) {
            Ok(value) => brought.add(&name, value, true),
            Err(error) => log::warn(&format!("the credential {name} of QEMU cannot be read: {error}")),
        }
    }
    modules.load_for_hardware();
    if let Some((device, kind)) = nocloud_device(own_disk) {
        if let Err(error) = read_nocloud(&device, kind, modules, &mut brought) {
            log::warn(&format!("the NoCloud disk {device} cannot be read: {error}"));
        }
    }
    brought
}

fn entries(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>();
    names.sort();
    names
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut value = Vec::new();
    File::open(path)?.take(MAX_VALUE + 1).read_to_end(&mut value)?;
    if value.len() as u64 > MAX_VALUE {
        return Err(std::io::Error::other("it is longer than 1 MiB"));
    }
    Ok(value)
}

/// The device labelled `cidata`, in any case, and its file system.
fn nocloud_device(own_disk: &str) -> Option<(String, &'static str)> {
    for disk in disks::names().iter().filter(|name| *name != own_disk) {
        let parts = entries(&Path::new("/sys/block").join(disk)).into_iter().filter(|name| name.starts_with(disk));
        for device in std::iter::once(disk.clone()).chain(parts) {
            let mut start = Vec::new();
            // A drive without a medium gives an error here, and is none.
            let _ = File::open(disks::node(&device)).and_then(|file| file.take(36 << 10).read_to_end(&mut start));
            if let Some((kind, label)) = label::read(&start)
                && label.eq_ignore_ascii_case("cidata")
            {
                return Some((device, kind));
            }
        }
    }
    None
}

fn read_nocloud(device: &str, kind: &str, modules: &mut Modules, brought: &mut Brought) -> Result<(), String> {
    let needed: &[&str] = if kind == "vfat" { &["nls_cp437", "nls_ascii", "vfat"] } else { &["isofs"] };
    needed.iter().for_each(|name| {
        modules.load(name);
    });
    log::note(&format!("configuration from the NoCloud disk {device}"));
    let folder = Path::new(NOCLOUD);
    let flags = sys::MS_RDONLY | sys::MS_NOSUID | sys::MS_NODEV | sys::MS_NOEXEC;
    let mounted = copy::folder(folder).and_then(|()| sys::mount_at(&disks::node(device), folder, kind, flags, ""));
    mounted.map_err(|error| error.to_string())?;
    let optional = |name: &str| match read(&folder.join(name)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            log::warn(&format!("{name} of the NoCloud disk cannot be read: {error}"));
            Vec::new()
        }
        other => other.unwrap_or_default(),
    };
    let text = |name: &str| String::from_utf8_lossy(&optional(name)).into_owned();
    brought.nocloud =
        Some(NoCloud { meta_data: text("meta-data"), user_data: optional("user-data"), network_config: text("network-config") });
    for name in entries(&folder.join("cred")) {
        brought.add(&name, optional(&format!("cred/{name}")), false);
    }
    let _ = sys::unmount(folder, 0);
    let _ = fs::remove_dir(folder);
    Ok(())
}
