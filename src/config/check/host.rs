//! Checks of the key `host`: what its types cannot say.

use std::collections::BTreeMap;

use super::{Checker, Findings, join, note, packages, variables};
use crate::config::diagnostic::quoted;
use crate::config::file::{self, AppSettings};
use crate::config::syntax::{self, Wrong};
use crate::config::types::{
    App, AppImage, Disk, FileContent, Firewall, Host, HostFile, Kernel, Name, Open, Protocol, Units, User,
};
use crate::config::yaml::Place;
use crate::error::nearest;

/// The kernel of a host that names none: it knows the hardware of every hypervisor and cloud.
const KERNEL: &str = "linux-image-amd64";
/// Processes of an app when nothing is written: enough for a web server, too few for a fork bomb.
const PROCESSES: u64 = 512;
/// Kernel arguments that belong to the bake.
const OWN_ARGUMENTS: [&str; 6] = ["root", "roothash", "init", "rdinit", "initrd", "panic"];
/// Folders of `/var/lib` that are not an app's.
const STATE_FOLDERS: [&str; 12] =
    ["apt", "dbus", "dpkg", "machines", "misc", "nfs", "pam", "pipeline", "portables", "private", "ssh", "systemd"];
/// Places whose content is made when the machine runs.
const MADE_AT_BOOT: [&str; 6] = ["/dev", "/proc", "/run", "/sys", "/tmp", "/root"];
const UNIT_KINDS: [&str; 10] =
    [".service", ".socket", ".timer", ".target", ".mount", ".automount", ".path", ".swap", ".slice", ".scope"];
const KEY_KINDS: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];
/// Where the ranges of user ids of containers begin and end, and their length (systemd, "Users, Groups, UIDs and GIDs").
pub const UID_FIRST: u32 = 524_288;
pub const UID_END: u32 = 1_879_048_192;
pub const UID_COUNT: u32 = 65_536;

impl Checker<'_> {
    /// `name` is the pipeline's; `has_image` whether it makes an application image itself.
    pub(super) fn host(&mut self, written: file::Host, place: &Place<'_>, name: Option<&Name>, has_image: bool) -> Host {
        let kernel = self.kernel(written.kernel, &place.key("kernel"));
        let packages = self.host_packages(written.packages, &place.key("packages"), &kernel);
        self.arguments(&written.arguments, &place.key("arguments"));
        let (modules, all_modules) = self.modules(written.modules, &place.key("modules"));
        let groups = self.groups(&written.groups, &place.key("groups"));
        let users = self.users(written.users, &place.key("users"));
        self.ssh_keys(&written.ssh_keys, &place.key("ssh_keys"));
        let files = self.host_files(written.files, &place.key("files"));
        let units = self.units(written.units.unwrap_or_default(), &place.key("units"));
        self.sysctl(&written.sysctl, &place.key("sysctl"));
        if let Some(zone) = &written.timezone {
            self.check(&place.key("timezone"), timezone(zone));
        }
        if let Some(hostname) = &written.hostname {
            self.check(&place.key("hostname"), host_name(hostname));
        }
        let firewall = written.firewall.map(|firewall| self.firewall(&firewall, &place.key("firewall")));
        let apps = self.apps(written.apps, &place.key("apps"), name, has_image);
        let disk = self.disk(written.disk.unwrap_or_default(), &place.key("disk"));
        Host {
            packages,
            kernel,
            arguments: written.arguments,
            modules,
            all_modules,
            users,
            groups,
            ssh_keys: written.ssh_keys,
            files,
            units,
            sysctl: written.sysctl,
            timezone: written.timezone,
            hostname: written.hostname,
            firewall,
            apps,
            initrd: written.initrd.unwrap_or_default(),
            disk,
        }
    }

    fn check<T>(&mut self, place: &Place<'_>, result: Result<T, Wrong>) -> Option<T> {
        note(self.findings, place, result)
    }

    fn kernel(&mut self, kernel: Option<file::Kernel>, place: &Place<'_>) -> Kernel {
        match kernel {
            None => Kernel::Package(KERNEL.into()),
            Some(file::Kernel::Package(name)) => {
                if name.contains('/') {
                    let hint = Some(format!("for files write `kernel: {{ path: {name}, modules: … }}`"));
                    self.findings.add(place, format!("`{name}` is not the name of a Debian package"), hint);
                } else if self.check(place, syntax::package(&name)).is_some() && !is_kernel(&name) {
                    let hint = Some(format!("a kernel's name begins with `linux-image-`, like `{KERNEL}`"));
                    self.findings.add(place, format!("`{name}` is not a kernel"), hint);
                }
                Kernel::Package(name)
            }
            Some(file::Kernel::Files(files)) => {
                let image = self.existing(&files.path, &place.key("path"), "file", std::path::Path::is_file);
                let modules =
                    files.modules.map(|folder| self.existing(&folder, &place.key("modules"), "folder", std::path::Path::is_dir));
                Kernel::Files { image, modules }
            }
        }
    }

    fn host_packages(&mut self, names: Vec<String>, place: &Place<'_>, kernel: &Kernel) -> Vec<String> {
        for (index, name) in names.iter().enumerate().filter(|(_, name)| is_kernel(name)) {
            if *kernel != Kernel::Package(name.clone()) {
                let hint = Some(format!("name the one you want: `kernel: {name}` below `host`"));
                self.findings.add(&place.item(index), format!("`{name}` would be a second kernel, and a host has one"), hint);
            }
        }
        packages(self.findings, names, place)
    }

    fn arguments(&mut self, arguments: &[String], place: &Place<'_>) {
        for (index, argument) in arguments.iter().enumerate() {
            let place = place.item(index);
            let name = argument.split('=').next().unwrap_or_default();
            if argument.is_empty() || argument.contains(|c: char| c.is_whitespace() || c.is_control() || c == '"') {
                self.findings.add(&place, format!("`{argument}` is not a kernel argument"), Some("one argument per item".into()));
            } else if OWN_ARGUMENTS.contains(&name) || name.starts_with("pipeline.") {
                let hint = Some("the bake sets it".into());
                self.findings.add(&place, format!("the kernel argument `{name}` cannot be changed"), hint);
            }
        }
    }

    fn modules(&mut self, mut modules: Vec<String>, place: &Place<'_>) -> (Vec<String>, bool) {
        for (index, name) in modules.iter().enumerate() {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            if name.is_empty() || !name.chars().all(plain) {
                let hint = Some("like `nf_tables`; `all` keeps every module".into());
                self.findings.add(&place.item(index), format!("`{name}` is not the name of a kernel module"), hint);
            }
        }
        let all = modules.iter().any(|name| name == "all");
        modules.retain(|name| name != "all");
        modules.sort_unstable();
        modules.dedup();
        (modules, all)
    }

    fn groups(&mut self, groups: &BTreeMap<String, file::Group>, place: &Place<'_>) -> BTreeMap<String, Option<u32>> {
        let mut ids: BTreeMap<u32, &str> = BTreeMap::new();
        for (name, group) in groups {
            self.check(&place.label(name), user_name(name, "group"));
            if let Some(other) = group.gid.and_then(|gid| ids.insert(gid, name)) {
                self.findings.add(&place.key(name).key("gid"), format!("group `{other}` has the same id"), None);
            }
        }
        groups.iter().map(|(name, group)| (name.clone(), group.gid)).collect()
    }

    fn users(&mut self, users: BTreeMap<String, file::User>, place: &Place<'_>) -> BTreeMap<String, User> {
        let mut ids: BTreeMap<u32, String> = BTreeMap::new();
        let mut checked = BTreeMap::new();
        for (name, user) in users {
            let place_of = place.key(&name);
            if name == "root" {
                let hint = Some("its keys are `ssh_keys` of the host".into());
                self.findings.add(&place.label(&name), "`root` is there already", hint);
            } else {
                self.check(&place.label(&name), user_name(&name, "user"));
            }
            if let Some(other) = user.uid.and_then(|uid| ids.insert(uid, name.clone())) {
                self.findings.add(&place_of.key("uid"), format!("user `{other}` has the same id"), None);
            }
            for (index, group) in user.groups.iter().enumerate() {
                self.check(&place_of.key("groups").item(index), user_name(group, "group"));
            }
            for (key, path) in [("shell", &user.shell), ("home", &user.home)] {
                if let Some(path) = path {
                    self.check(&place_of.key(key), plain_path(path));
                }
            }
            self.ssh_keys(&user.ssh_keys, &place_of.key("ssh_keys"));
            let home = user.home.unwrap_or_else(|| format!("/home/{name}"));
            let shell = user.shell.unwrap_or_else(|| "/bin/bash".into());
            checked.insert(name, User { uid: user.uid, groups: user.groups, shell, home, ssh_keys: user.ssh_keys });
        }
        checked
    }

    fn ssh_keys(&mut self, keys: &[String], place: &Place<'_>) {
        for (index, key) in keys.iter().enumerate() {
            self.check(&place.item(index), ssh_key(key));
        }
    }

    fn host_files(&mut self, files: Vec<file::HostFile>, place: &Place<'_>) -> Vec<HostFile> {
        let mut checked: Vec<HostFile> = Vec::new();
        for (index, written) in files.into_iter().enumerate() {
            let place = place.item(index);
            if self.check(&place.key("path"), plain_path(&written.path)).is_some() {
                let inside = |folder: &&&str| written.path == ***folder || written.path.starts_with(&format!("{folder}/"));
                if let Some(folder) = MADE_AT_BOOT.iter().find(inside) {
                    let hint = Some("a rule in /etc/tmpfiles.d makes a file there when the machine starts".into());
                    self.findings.add(&place.key("path"), format!("`{folder}` is empty when the machine starts"), hint);
                }
                if checked.iter().any(|other| other.path == written.path) {
                    self.findings.add(&place.key("path"), format!("`{}` is here twice", written.path), None);
                }
            }
            self.exactly_one(&place, "a file", &["content", "source"]);
            let content = match (written.content, written.source) {
                (Some(text), _) => FileContent::Text(text),
                (None, source) => {
                    let source = source.unwrap_or_default();
                    FileContent::File(match place.key("source").is_there() {
                        true => self.existing(&source, &place.key("source"), "file", std::path::Path::is_file),
                        false => join(self.dir, source),
                    })
                }
            };
            let mode = written.mode.and_then(|text| self.check(&place.key("mode"), mode(&text))).unwrap_or(0o644);
            let owner = written.owner.and_then(|text| self.check(&place.key("owner"), owner(&text)));
            let owner = owner.unwrap_or_else(|| ("root".into(), "root".into()));
            checked.push(HostFile { path: written.path, content, mode, owner });
        }
        checked
    }

    fn units(&mut self, units: file::Units, place: &Place<'_>) -> Units {
        let lists = [("enable", &units.enable), ("disable", &units.disable), ("mask", &units.mask)];
        let mut seen: BTreeMap<&str, &str> = BTreeMap::new();
        for (key, list) in lists {
            for (index, unit) in list.iter().enumerate() {
                let place = place.key(key).item(index);
                self.check(&place, unit_name(unit));
                if let Some(other) = seen.insert(unit, key) {
                    self.findings.add(&place, format!("`{unit}` is in `{other}` already"), None);
                }
            }
        }
        Units { enable: units.enable, disable: units.disable, mask: units.mask }
    }

    fn sysctl(&mut self, settings: &BTreeMap<String, String>, place: &Place<'_>) {
        for (name, value) in settings {
            let plain = |c: char| c.is_ascii_alphanumeric() || "._-/*".contains(c);
            if !name.contains(['.', '/']) || !name.chars().all(plain) {
                let hint = Some("like `net.ipv4.ip_forward`".into());
                self.findings.add(&place.label(name), format!("`{name}` is not the name of a kernel setting"), hint);
            }
            if value.contains(char::is_control) {
                self.findings.add(&place.key(name), format!("the value of `{name}` is not one line"), None);
            }
        }
    }

    fn firewall(&mut self, firewall: &file::Firewall, place: &Place<'_>) -> Firewall {
        let place = place.key("allow");
        let mut allow: Vec<Open> = Vec::new();
        for (index, text) in firewall.allow.iter().enumerate() {
            allow.extend(self.check(&place.item(index), open(text)));
        }
        allow.sort_unstable();
        allow.dedup();
        Firewall { allow }
    }

    fn apps(&mut self, apps: Vec<file::App>, place: &Place<'_>, own: Option<&Name>, has_image: bool) -> Vec<App> {
        let mut checked: Vec<App> = Vec::new();
        for (index, app) in apps.into_iter().enumerate() {
            let place = place.item(index);
            let (settings, image_place) = match app {
                file::App::Image(image) => (
                    AppSettings {
                        image,
                        name: None,
                        port: None,
                        memory: None,
                        cpus: None,
                        processes: None,
                        env: BTreeMap::new(),
                        restart: None,
                        uid: None,
                    },
                    place.clone(),
                ),
                file::App::Settings(settings) => (settings, place.key("image")),
            };
            let image = self.app_image(&settings.image, &image_place, own, has_image);
            let name_place = if place.key("name").is_there() { place.key("name") } else { image_place };
            let name = settings.name.clone().unwrap_or_else(|| default_name(&settings.image));
            if let Some(message) = name.parse::<Name>().err().filter(|_| image.is_some()) {
                self.findings.add(&name_place, message, None);
            } else if STATE_FOLDERS.contains(&name.as_str()) {
                let hint = Some("give the app another name: `{ image: …, name: … }`".into());
                self.findings.add(
                    &name_place,
                    format!("`/var/lib/{name}` is the system's, so no app can be called `{name}`"),
                    hint,
                );
            }
            if checked.iter().any(|other| other.name == name) {
                let hint = Some("give one of them another name: `{ image: …, name: … }`".into());
                self.findings.add(&name_place, format!("there is another app `{name}`"), hint);
            }
            // `app-NAME-health.service` and `app-NAME-prepare.service` are ours.
            let clash =
                |one: &str, other: &str| other.strip_prefix(one).is_some_and(|rest| matches!(rest, "-health" | "-prepare"));
            if let Some(other) = checked.iter().find(|other| clash(&other.name, &name) || clash(&name, &other.name)) {
                let message = format!("the units of the apps `{}` and `{name}` would have the same names", other.name);
                let hint = Some("give one of them another name: `{ image: …, name: … }`".into());
                self.findings.add(&name_place, message, hint);
            }
            let same = settings.port.and_then(|port| checked.iter().find(|other| other.port == Some(port)));
            if let Some(other) = same {
                let message = format!("the apps `{}` and `{name}` have the same port", other.name);
                self.findings.add(&place.key("port"), message, None);
            }
            let memory = settings.memory.and_then(|text| self.check(&place.key("memory"), syntax::size(&text)));
            let cpu_percent = settings.cpus.and_then(|cpus| self.check(&place.key("cpus"), percent(cpus)));
            variables(self.findings, &settings.env, &place.key("env"));
            if let Some((key, _)) = settings.env.iter().find(|(_, value)| value.contains(char::is_control)) {
                self.findings.add(&place.key("env").key(key), format!("the value of `{key}` is not one line"), None);
            }
            if let Some(uid) = settings.uid
                && (uid % UID_COUNT != 0 || !(UID_FIRST..UID_END).contains(&uid))
            {
                let hint = Some(format!("a multiple of {UID_COUNT} from {UID_FIRST} to {}", UID_END - UID_COUNT));
                self.findings.add(&place.key("uid"), format!("{uid} does not begin a range of user ids"), hint);
            }
            if let Some(other) = settings.uid.and_then(|uid| checked.iter().find(|other| other.uid_base == Some(uid))) {
                self.findings.add(&place.key("uid"), format!("app `{}` has the same user ids", other.name), None);
            }
            checked.push(App {
                name,
                image: image.unwrap_or(AppImage::Own),
                port: settings.port,
                memory,
                cpu_percent,
                processes: settings.processes.unwrap_or(PROCESSES),
                env: settings.env,
                restart: settings.restart.unwrap_or_default(),
                uid_base: settings.uid,
            });
        }
        checked
    }

    fn app_image(&mut self, text: &str, place: &Place<'_>, own: Option<&Name>, has_image: bool) -> Option<AppImage> {
        if let Some((name, digest)) = text.split_once('@') {
            return match digest.parse() {
                Ok(digest) => Some(AppImage::Digest(name.into(), digest)),
                Err(_) => {
                    let hint = Some("`NAME@sha256:` and 64 digits".into());
                    self.findings.add(place, format!("`{digest}` is not a digest"), hint);
                    None
                }
            };
        }
        if text.contains(':') {
            return Some(AppImage::Tag(text.into()));
        }
        if own.is_some_and(|own| own.as_str() == text) {
            if !has_image {
                let hint = Some("it needs a `runtime` for that, or name another pipeline".into());
                self.findings.add(place, format!("`{text}` is this pipeline, which makes no application image"), hint);
                return None;
            }
            return Some(AppImage::Own);
        }
        let beside = self.dir.join(format!("{text}.yaml"));
        if !text.contains('/') && beside.is_file() {
            return Some(AppImage::Pipeline(beside));
        }
        if let Ok(file) = crate::config::find(Some(text), self.dir) {
            return Some(AppImage::Pipeline(file));
        }
        let mut names = crate::config::names(self.dir);
        names.extend(self.neighbours());
        let hint = match nearest(text, names.iter().map(String::as_str)) {
            Some(near) => format!("did you mean `{near}`?"),
            None if names.is_empty() => "an image of the store is written `NAME:TAG`".into(),
            None => format!("there are {}; an image of the store is written `NAME:TAG`", quoted(&names)),
        };
        self.findings.add(place, format!("there is no pipeline `{text}`"), Some(hint));
        None
    }

    /// Names of the YAML files beside the pipeline file.
    fn neighbours(&self) -> Vec<String> {
        let entries = fs_err::read_dir(self.dir).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".yaml").map(str::to_owned));
        let mut names: Vec<String> = names.collect();
        names.sort_unstable();
        names
    }

    fn disk(&mut self, disk: file::Disk, place: &Place<'_>) -> Disk {
        let mut size = |key: &str, text: Option<String>| {
            text.filter(|text| text != "auto").and_then(|text| {
                let sized = syntax::size(&text);
                note(self.findings, &place.key(key), sized)
            })
        };
        let (whole, slot) = (size("size", disk.size), size("slot", disk.slot));
        if let (Some(whole), Some(slot)) = (whole, slot)
            && slot.saturating_mul(2) >= whole
        {
            let hint = Some("the disk holds two slots, the boot partition and /var".into());
            self.findings.add(&place.key("slot"), "two slots of this size do not fit on the disk", hint);
        }
        Disk { size: whole, slot, formats: disk.formats, firmware: disk.firmware }
    }
}

/// What does not go with a machine: notes it at the keys of the document `root`.
pub(super) fn fits(findings: &mut Findings, root: &Place<'_>, is_scratch: bool, is_builder_image: bool) {
    let hint = |text: &str| Some(text.to_string());
    if is_scratch {
        let hint = hint("take `debian: trixie` as the base");
        findings.add(&root.key("base").label("scratch"), "a host needs a system to stand on, and `scratch` has none", hint);
    }
    if is_builder_image {
        let hint = hint("make the app a pipeline of its own, and name it in `host.apps`");
        findings.add(
            &root.key("runtime").label("image"),
            "a builder image takes the place of the base, so no host can stand on it",
            hint,
        );
    }
}

/// Whether a package name is a kernel's.
fn is_kernel(name: &str) -> bool {
    name.starts_with("linux-image-") && !name.ends_with("-dbg")
}

/// The image's name alone.
fn default_name(image: &str) -> String {
    let name = image.split(['@', ':']).next().unwrap_or_default();
    name.rsplit('/').next().unwrap_or_default().into()
}

fn wrong(message: String, hint: impl Into<String>) -> Wrong {
    Wrong { message, hint: Some(hint.into()) }
}

fn user_name(text: &str, what: &str) -> Result<(), Wrong> {
    let valid = text.len() <= 32
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-".contains(c));
    let wrong =
        || wrong(format!("`{text}` is not the name of a {what}"), "lower case letters, digits, `_` and `-`, no digit first");
    valid.then_some(()).ok_or_else(wrong)
}

/// An absolute path that a script can be given as it is.
fn plain_path(text: &str) -> Result<(), Wrong> {
    syntax::image_path(text)?;
    let plain = text.len() > 1 && !text.ends_with('/') && !text.contains(|c: char| c.is_control() || "'\"\\".contains(c));
    let wrong = || wrong(format!("`{text}` is not the path of a file"), "without quotes, backslashes and a `/` at its end");
    plain.then_some(()).ok_or_else(wrong)
}

fn ssh_key(text: &str) -> Result<(), Wrong> {
    if text.contains("PRIVATE KEY") {
        return Err(wrong("this is a private key".into(), "write the public one, from the file that ends with `.pub`"));
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    let at = words.iter().position(|word| KEY_KINDS.contains(word));
    let body = at.and_then(|at| words.get(at + 1));
    let is_base64 =
        |body: &&&str| body.starts_with("AAAA") && body.bytes().all(|c| c.is_ascii_alphanumeric() || b"+/=".contains(&c));
    if text.contains(['\n', '\r']) || body.filter(is_base64).is_none() {
        let shown: String = text.chars().take(24).collect();
        return Err(wrong(format!("`{shown}` is not a public ssh key"), "one line, like `ssh-ed25519 AAAA… name`"));
    }
    Ok(())
}

fn mode(text: &str) -> Result<u32, Wrong> {
    let valid = (3..=4).contains(&text.len()) && text.bytes().all(|c| (b'0'..=b'7').contains(&c));
    let mode = u32::from_str_radix(text, 8).ok().filter(|_| valid);
    mode.ok_or_else(|| wrong(format!("`{text}` is not a mode"), "three or four octal digits, like \"0644\""))
}

fn owner(text: &str) -> Result<(String, String), Wrong> {
    let id = |text: &str| text.parse::<u32>().is_ok_and(|id| id <= 65_535) && !text.starts_with('+');
    let part = |text: &str| id(text) || user_name(text, "user").is_ok();
    let (user, group) = text.split_once(':').unwrap_or((text, text));
    if part(user) && part(group) {
        return Ok((user.into(), group.into()));
    }
    Err(wrong(format!("`{text}` is not an owner"), "`USER:GROUP`, names or numbers"))
}

fn unit_name(text: &str) -> Result<(), Wrong> {
    let plain = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c);
    if !text.chars().all(plain) || text.starts_with('-') || text.is_empty() {
        return Err(wrong(format!("`{text}` is not the name of a unit"), "like `ssh.service`"));
    }
    if UNIT_KINDS.iter().any(|kind| text.strip_suffix(kind).is_some_and(|name| !name.is_empty())) {
        return Ok(());
    }
    Err(wrong(format!("`{text}` does not say what kind of unit it is"), format!("like `{text}.service`")))
}

fn timezone(text: &str) -> Result<(), Wrong> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "+-_/".contains(c);
    let valid = !text.is_empty() && text.chars().all(plain) && !text.starts_with('/') && !text.ends_with('/');
    valid.then_some(()).ok_or_else(|| wrong(format!("`{text}` is not a time zone"), "like `Europe/Berlin` or `UTC`"))
}

fn host_name(text: &str) -> Result<(), Wrong> {
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-?".contains(c))
    };
    let valid = text.len() <= 64 && text.split('.').all(label);
    let hint = "lower case letters, digits and `-`; each `?` becomes a digit made of the machine-id, like `web-????`";
    valid.then_some(()).ok_or_else(|| wrong(format!("`{text}` is not the name of a machine"), hint))
}

/// `22`, `53/udp`, `8000-8010/tcp`.
fn open(text: &str) -> Result<Open, Wrong> {
    let wrong = || wrong(format!("`{text}` is not a port"), "like `22`, `53/udp` or `8000-8010`");
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return Err(wrong()),
    };
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0 && !text.starts_with('+'));
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok(Open { protocol, first, last }),
        _ => Err(wrong()),
    }
}

pub(super) fn percent(cpus: f64) -> Result<u32, Wrong> {
    if (0.01..=1024.0).contains(&cpus) {
        return Ok((cpus * 100.0).round() as u32);
    }
    Err(wrong(format!("{cpus} is not a number of processors"), "like `0.5` or `2`"))
}
