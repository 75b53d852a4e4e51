//! What makes a host of a tree with its packages: files, users, units, boot files.
//!
//! Everything becomes files of one [`Folder`]: `configure.sh`, rendered from
//! `templates/host/configure.sh.tera`, and what it installs.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::apps::AppInput;
use super::{FOLDER, Folder, packages};
use crate::config::types::{FileContent, Host, Initrd, Open, Pipeline, Protocol};
use crate::disk::grub::CORE_ARGUMENTS;
use crate::disk::init::INIT;
use crate::error::Problem;
use crate::template;

/// Units every host starts, in the order they are enabled.
const ALWAYS: [&str; 3] = ["systemd-networkd.service", "systemd-resolved.service", "systemd-timesyncd.service"];
/// Where units of ours go.
const UNITS: &str = "/usr/lib/systemd/system";
/// Largest file of `host.files`: it is held in memory, and big things belong in packages or apps.
const FILE_MAX: u64 = 256 << 20;

/// A file that is installed.
#[derive(Debug, Serialize)]
struct Installed {
    source: String,
    path: String,
    mode: String,
    user: String,
    group: String,
}

/// Gathers the files that are installed, of every host or of the pipeline.
#[derive(Debug, Default)]
struct Gathered {
    folder: Folder,
    files: Vec<Installed>,
    own: Vec<Installed>,
}

impl Gathered {
    /// A file of root's.
    fn add(&mut self, path: impl Into<String>, mode: u32, bytes: impl Into<Vec<u8>>) {
        let path = path.into();
        let source = self.place(&path, bytes.into());
        self.files.push(Installed { source, path, mode: format!("{mode:04o}"), user: "root".into(), group: "root".into() });
    }

    fn add_own(&mut self, path: &str, mode: u32, owner: &(String, String), bytes: Vec<u8>) {
        let source = self.place(path, bytes);
        let (user, group) = owner.clone();
        self.own.push(Installed { source, path: path.into(), mode: format!("{mode:04o}"), user, group });
    }

    fn place(&mut self, path: &str, bytes: Vec<u8>) -> String {
        let name = format!("files/{}", self.folder.files.len());
        let source = format!("{FOLDER}/{name}");
        self.folder.add(name, format!("file {path}"), bytes);
        source
    }
}

/// What the step `host` is given. `apps` are those of the pipeline, ports filled in.
pub fn folder(pipeline: &Pipeline, host: &Host, apps: &[AppInput]) -> Result<Folder> {
    let mut gathered = Gathered::default();
    for (path, bytes) in template::files("host/tree") {
        gathered.add(format!("/{path}"), 0o644, bytes);
    }
    let mut enabled: Vec<String> = ALWAYS.map(String::from).into();
    for (path, bytes) in template::files("host") {
        if path.starts_with("pipeline-") && path.ends_with(".service") {
            gathered.add(format!("{UNITS}/{path}"), 0o644, bytes);
            enabled.push(path);
        }
    }
    gathered.add("/usr/lib/pipeline/init", 0o755, INIT);
    settings(&mut gathered, host);
    if let Some(firewall) = &host.firewall {
        let mut open: BTreeSet<Open> = firewall.allow.iter().copied().collect();
        open.extend(apps.iter().filter_map(|app| app.port).map(|port| Open { protocol: Protocol::Tcp, first: port, last: port }));
        let ports: Vec<Value> = open.iter().map(open_ports).collect();
        gathered.add("/etc/nftables.conf", 0o644, template::render("host/nftables.conf.tera", &json!({ "ports": ports }))?);
        enabled.push("nftables.service".into());
    }
    gathered.add("/usr/lib/pipeline/host.json", 0o644, host_json(pipeline, host, apps)?);
    for file in &host.files {
        let bytes = match &file.content {
            FileContent::Text(text) => text.clone().into_bytes(),
            FileContent::File(path) => {
                let size = fs_err::metadata(path)?.len();
                if size > FILE_MAX {
                    return Err(Problem::usage(format!("`{}` is larger than {} MiB", path.display(), FILE_MAX >> 20))
                        .hint("put large files into a package, or into the source of an app")
                        .into());
                }
                fs_err::read(path)?
            }
        };
        gathered.add_own(&file.path, file.mode, &file.owner, bytes);
    }
    let script = configure_script(host, apps, &gathered)?;
    let mut folder = gathered.folder;
    folder.add("configure.sh", "script configure.sh", script);
    folder.add("masked.txt", "list of masked units", template::text("host/masked.txt")?);
    let lists = [
        ("enable-always", &enabled),
        ("enable", &host.units.enable),
        ("disable", &host.units.disable),
        ("mask", &host.units.mask),
    ];
    for (name, units) in lists {
        folder.add(name, format!("units {name}"), units.iter().map(|unit| format!("{unit}\n")).collect::<String>());
    }
    if host.initrd == Initrd::Dracut {
        const ROOT: &str = "dracut/usr/lib/systemd/system";
        let unit = template::text("host/dracut/pipeline-root.service")?;
        folder.add(format!("{ROOT}/pipeline-root.service"), "unit of dracut's initrd", unit);
        // A link cannot be a file of this folder; a drop-in that requires it does the same.
        let wants = "[Unit]\nRequires=pipeline-root.service\nAfter=pipeline-root.service\n";
        folder.add(format!("{ROOT}/initrd-root-fs.target.d/pipeline.conf"), "drop-in of dracut's initrd", wants);
        folder.add("dracut/usr/lib/pipeline/init", "program of dracut's initrd", INIT);
    }
    Ok(folder)
}

/// Files for what the pipeline file says in a line each.
fn settings(gathered: &mut Gathered, host: &Host) {
    if !host.modules.is_empty() {
        let lines: String = host.modules.iter().map(|name| format!("{name}\n")).collect();
        gathered.add("/etc/modules-load.d/pipeline.conf", 0o644, lines);
    }
    if !host.sysctl.is_empty() {
        let lines: String = host.sysctl.iter().map(|(name, value)| format!("{name} = {value}\n")).collect();
        gathered.add("/etc/sysctl.d/90-pipeline.conf", 0o644, lines);
    }
    // With `?` in it the init fills it in, from host.json.
    if let Some(name) = host.hostname.as_ref().filter(|name| !name.contains('?')) {
        gathered.add("/etc/hostname", 0o644, format!("{name}\n"));
    }
    let keys = host.users.iter().map(|(name, user)| (name.as_str(), &user.ssh_keys)).chain([("root", &host.ssh_keys)]);
    for (name, keys) in keys.filter(|(_, keys)| !keys.is_empty()) {
        let lines: String = keys.iter().map(|key| format!("{}\n", key.trim())).collect();
        gathered.add(format!("/etc/ssh/authorized_keys.d/{name}"), 0o644, lines);
    }
    if !host.users.is_empty() {
        // Homes are on /var, which is made by the machine.
        let homes = host.users.iter().map(|(name, user)| {
            let home = user.home.strip_prefix("/home/").map_or_else(|| user.home.clone(), |home| format!("/var/home/{home}"));
            format!("d \"{home}\" 0700 {name} {name} -\n")
        });
        gathered.add("/etc/tmpfiles.d/pipeline-homes.conf", 0o644, homes.collect::<String>());
    }
}

fn open_ports(open: &Open) -> Value {
    let ports = if open.first == open.last { open.first.to_string() } else { format!("{}-{}", open.first, open.last) };
    json!({ "protocol": open.protocol, "ports": ports })
}

/// What the bake, the init and `vm` read about the host.
fn host_json(pipeline: &Pipeline, host: &Host, apps: &[AppInput]) -> Result<String> {
    let value = json!({
        "format": 1,
        "name": pipeline.name,
        "initrd": host.initrd,
        "arguments": host.arguments,
        "modules": host.modules,
        "hostname": host.hostname,
        "apps": apps.iter().map(|app| &app.app.name).collect::<Vec<_>>(),
        "disk": {
            "size": host.disk.size,
            "slot": host.disk.slot,
            "formats": host.disk.formats,
            "firmware": host.disk.firmware,
        },
        "packages_database": "/usr/lib/pipeline/dpkg",
    });
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

fn configure_script(host: &Host, apps: &[AppInput], gathered: &Gathered) -> Result<String> {
    let users: Vec<Value> = host
        .users
        .iter()
        .map(|(name, user)| {
            json!({
                "name": name,
                "uid": user.uid,
                "groups": user.groups,
                "group_list": user.groups.join(","),
                "shell": user.shell,
                "home": user.home,
            })
        })
        .collect();
    let app_users: Vec<Value> = apps
        .iter()
        .filter_map(|app| {
            let (uid, gid) = app.ids?;
            Some(json!({ "name": app.user_name(), "uid": app.uid_base + uid, "gid": app.uid_base + gid, "app": app.app.name }))
        })
        .collect();
    let groups: Vec<Value> = host.groups.iter().map(|(name, gid)| json!({ "name": name, "gid": gid })).collect();
    let values = json!({
        "files": gathered.files,
        "own_files": gathered.own,
        "timezone": host.timezone,
        "groups": groups,
        "users": users,
        "app_users": app_users,
        "bios": packages::is_for_bios(host),
        "grub_arguments": CORE_ARGUMENTS.map(|word| format!("'{word}'")).join(" "),
        "dracut": host.initrd == Initrd::Dracut,
    });
    template::render("host/configure.sh.tera", &values).context("the script that configures a host")
}
