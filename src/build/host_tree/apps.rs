//! The apps of a host: each is an image, merged into one layer with owners of its own.
//!
//! ```text
//! /usr/lib/pipeline/apps/NAME/           0700: nobody else looks in
//!   app.json                             what it is, for `vm`, the init and people
//!   prepare                              makes its volumes on /var before it starts
//!   root/                                the image's tree; every owner is uid_base + owner
//! /usr/lib/systemd/system/app-NAME.service          templates/app.service.tera
//! /usr/lib/systemd/system/app-NAME-prepare.service  runs `prepare`
//! /usr/lib/systemd/system/app-NAME-health.service   before boot-complete.target, when it has a check
//! ```
//! `/etc/passwd` and `/etc/group` of the tree name the moved ids, so that the program finds itself.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::artifact::image::RunConfig;
use crate::build::image::HEALTH_LABEL;
use crate::config::check::host::{UID_COUNT, UID_END, UID_FIRST};
use crate::config::types::{App, Health, HealthCheck, Restart};
use crate::disk::tree::{Extent, File, Kind, Meta, Node, NodeId, Source, Tree};
use crate::error::Problem;
use crate::oci::digest::Digest;
use crate::oci::tree_layer::{Place, Writer};
use crate::template;

/// Where apps are in the tree.
const APPS: &str = "usr/lib/pipeline/apps";
const UNITS: &str = "usr/lib/systemd/system";
/// Folders that are mounted on when the app runs.
const MOUNT_POINTS: [&str; 6] = ["proc", "sys", "dev", "run", "tmp", "var/tmp"];
/// Where name servers are, seen from an app: the folder is the host's.
const RESOLVER: &str = "/run/systemd/resolve/stub-resolv.conf";
/// First port that needs no privilege (`net.ipv4.ip_unprivileged_port_start`).
const FIRST_FREE_PORT: u16 = 1024;
/// What the health check has beyond the app's own deadline, in seconds: the whole machine boots at
/// the same time, and under emulation with a busy host that takes minutes.
const BOOT_SLACK: u64 = 180;
/// Seconds after which systemd ends a check that does not end itself.
const CHECK_SLACK: u64 = 30;
/// As in [`crate::build::steps::PATH`], for images that set none.
const PATH: &str = crate::build::steps::PATH;

/// An app with what was found out about its image.
#[derive(Debug, Clone)]
pub struct AppInput {
    pub app: App,
    /// The image's manifest; `None` while it is not built.
    pub image: Option<Digest>,
    /// What stands for the image in a key until it is known: the key of its last step.
    pub stand_in: Option<Digest>,
    /// The app's, or the image's.
    pub port: Option<u16>,
    /// The image's own, where `port` of the app says another.
    pub image_port: Option<u16>,
    /// First of its user ids.
    pub uid_base: u32,
    /// User and group of the image that it runs as, as far as they are known.
    pub ids: Option<(u32, u32)>,
}

impl AppInput {
    /// What its user is called on the host: systemd runs nothing as a number that has no name.
    pub fn user_name(&self) -> String {
        /// `UT_NAMESIZE` of utmp.h, without the zero.
        const LONGEST: usize = 31;
        let name = format!("app-{}", self.app.name);
        if name.len() <= LONGEST && !name.contains('.') { name } else { format!("app-{}", self.uid_base) }
    }

    /// What of the app's settings goes into the key of its step.
    pub fn settings(&self) -> Value {
        let app = &self.app;
        json!({
            "name": app.name,
            "port": app.port,
            "memory": app.memory,
            "cpu_percent": app.cpu_percent,
            "processes": app.processes,
            "env": app.env,
            "restart": restart(app.restart),
            "uid_base": self.uid_base,
        })
    }
}

/// The names of templates that go into an app's layer.
pub const TEMPLATES: [&str; 4] =
    ["app.service.tera", "app-health.service.tera", "app-prepare.service.tera", "app-prepare.sh.tera"];

/// Ranges of user ids for `apps`, in the order of their names: the one that is written, or one made of
/// the name. A range that is taken moves on to the next free one.
pub fn uid_bases(apps: &[App]) -> BTreeMap<String, u32> {
    let ranges = (UID_END - UID_FIRST) / UID_COUNT;
    let mut bases: BTreeMap<String, u32> = apps.iter().filter_map(|app| Some((app.name.clone(), app.uid_base?))).collect();
    let mut names: Vec<&str> = apps.iter().filter(|app| app.uid_base.is_none()).map(|app| app.name.as_str()).collect();
    names.sort_unstable();
    for name in names {
        let digest = Digest::of(format!("app {name}"));
        let bytes = digest.bytes();
        let mut at = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) % ranges;
        while bases.values().any(|base| *base == UID_FIRST + at * UID_COUNT) {
            at = (at + 1) % ranges;
        }
        bases.insert(name.into(), UID_FIRST + at * UID_COUNT);
    }
    bases
}

/// # Errors
/// Two apps with one port.
pub fn check_ports(apps: &[AppInput]) -> Result<()> {
    let mut seen: BTreeMap<u16, &str> = BTreeMap::new();
    for app in apps {
        let Some(port) = app.port else { continue };
        if let Some(other) = seen.insert(port, &app.app.name) {
            return Err(Problem::usage(format!("the apps `{other}` and `{}` both listen on port {port}", app.app.name))
                .hint(format!("give one of them another: `{{ image: …, port: {} }}`", port.saturating_add(1)))
                .into());
        }
    }
    Ok(())
}

/// The only TCP port an image exposes; `None` for none or several.
pub fn exposed_port(config: &RunConfig) -> Option<u16> {
    let mut ports = config.exposed_ports.iter().flatten().filter_map(|(name, _)| name.strip_suffix("/tcp")?.parse().ok());
    ports.next().filter(|_| ports.next().is_none())
}

/// What was put into an app's tree, and what was left out of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Made {
    /// Device nodes and sockets.
    pub dropped: Vec<String>,
}

/// Who runs the app: ids of its own tree.
#[derive(Debug, PartialEq, Eq)]
pub struct Runs {
    pub uid: u32,
    pub gid: u32,
    /// Home of the user, `/` for one without.
    pub home: String,
}

/// Writes the layer of an app: `tree` is its image's, `config` what the image says of itself.
///
/// # Errors
/// A command that is not in the image, an owner beyond 65,535, a volume no unit can name.
pub fn layer<W: Write>(input: &AppInput, mut tree: Tree, config: &RunConfig, epoch: i64, out: W) -> Result<(W, Made)> {
    let name = &input.app.name;
    let image = input.image.context("a built image")?;
    let runs = runs_as(&tree, &config.user).with_context(|| format!("the user of app `{name}`"))?;
    if input.ids.is_some_and(|ids| ids != (runs.uid, runs.gid)) {
        return Err(Problem::bug(format!(
            "app `{name}` runs as {}:{}, and the host was told {:?}",
            runs.uid, runs.gid, input.ids
        ))
        .into());
    }
    let declared: Vec<String> = config.volumes.iter().flatten().map(|(path, _)| path.trim_end_matches('/').to_string()).collect();
    check_volumes(name, &declared)?;
    let environment = environment(input, config, &runs);
    let workdir = if config.working_dir.is_empty() { "/".into() } else { config.working_dir.clone() };
    let command = command(&tree, name, config, &workdir, &environment)?;
    check_words(name, &workdir, &command, &environment)?;
    let added = prepare_tree(&mut tree, input.uid_base, &runs, &declared)?;
    let volumes = mounted(&tree, &declared)?;
    check_volumes(name, &volumes)?;
    let health = health(config)?;
    let (user, group) = (input.uid_base + runs.uid, input.uid_base + runs.gid);
    let volume_values: Vec<Value> = volumes.iter().map(|path| volume(name, path)).collect();

    let about = json!({
        "format": 1,
        "name": name,
        "image": image,
        "uid_base": input.uid_base,
        "uid_count": UID_COUNT,
        "user": user,
        "group": group,
        "port": input.port,
        "health": health,
        "volumes": volumes,
        "command": command,
        "env": environment,
        "workdir": workdir,
        "added": added,
    });
    let mut values = json!({
        "name": name,
        "image": image,
        "command": command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "),
        "workdir": escaped(&workdir),
        "environment": environment.iter().map(|(key, value)| quoted(&format!("{key}={value}"))).collect::<Vec<_>>(),
        "restart": restart(input.app.restart),
        "user": user,
        "group": group,
        "volumes": volume_values,
        "capabilities": if input.port.is_some_and(|port| port < FIRST_FREE_PORT) { "CAP_NET_BIND_SERVICE" } else { "" },
        "port": input.port,
        "processes": input.app.processes,
        "memory": input.app.memory,
        "cpu_percent": input.app.cpu_percent,
    });

    values["sandbox"] = template::render("app-sandbox.tera", &values)?.trim_end().into();
    let top = format!("{APPS}/{name}");
    let mut writer = Writer::new(out);
    writer.folder(&top, 0o700, epoch)?;
    writer.file(&format!("{top}/app.json"), 0o644, epoch, (serde_json::to_string_pretty(&about)? + "\n").as_bytes())?;
    writer.file(&format!("{top}/prepare"), 0o755, epoch, template::render("app-prepare.sh.tera", &values)?.as_bytes())?;
    let prefix = format!("{top}/root");
    let place = Place { prefix: &prefix, id_base: input.uid_base, id_count: UID_COUNT };
    let dropped = writer.tree(&tree, &place).with_context(|| format!("cannot write the tree of app `{name}`"))?;
    let prepare = template::render("app-prepare.service.tera", &values)?;
    writer.file(&format!("{UNITS}/app-{name}-prepare.service"), 0o644, epoch, prepare.as_bytes())?;
    let mut unit = |unit: String, folder: &str, text: String| -> Result<()> {
        writer.file(&format!("{UNITS}/{unit}"), 0o644, epoch, text.as_bytes())?;
        writer.symlink(&format!("{UNITS}/{folder}/{unit}"), &format!("../{unit}"), epoch)
    };
    unit(format!("app-{name}.service"), "multi-user.target.wants", template::render("app.service.tera", &values)?)?;
    if let Some(check) = health_values(&health, input.port, values)? {
        let text = template::render("app-health.service.tera", &check)?;
        unit(format!("app-{name}-health.service"), "boot-complete.target.requires", text)?;
    }
    Ok((writer.finish()?, Made { dropped }))
}

fn restart(restart: Restart) -> &'static str {
    match restart {
        Restart::Always => "always",
        Restart::OnFailure => "on-failure",
        Restart::No => "no",
    }
}

/// Where a volume of the image is on the host.
fn volume(name: &str, path: &str) -> Value {
    let source = format!("/var/lib/{name}{path}");
    let parent = source.rsplit_once('/').map_or("/", |(parent, _)| parent);
    json!({ "path": path, "source": source, "parent": parent })
}

/// A path in a unit and in a shell script: nothing that means something to either.
fn check_volumes(name: &str, volumes: &[String]) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@,=~".contains(c);
    match volumes
        .iter()
        .find(|path| !path.starts_with('/') || path.split('/').any(|part| part == "..") || !path.chars().all(plain))
    {
        Some(path) => Err(Problem::failed(format!("the volume `{path}` of app `{name}` cannot be mounted"))
            .hint("a volume on a host is an absolute path of letters, digits and `/._-+@,=~`")
            .into()),
        None => Ok(()),
    }
}

/// What the image says of itself becomes lines of a unit: nothing of it may end a line.
fn check_words(name: &str, workdir: &str, command: &[String], environment: &BTreeMap<String, String>) -> Result<()> {
    let refused = |what: &str, text: &str| {
        Problem::failed(format!("the {what} of app `{name}`, {text:?}, cannot be written into a unit"))
            .hint("the image says it; build it with another one")
    };
    if !workdir.starts_with('/') || workdir.chars().any(|c| c.is_control() || c == '\\') {
        return Err(refused("working folder", workdir).into());
    }
    // Line ends and tabs are quoted.
    let odd = |text: &&str| text.chars().any(|c| c.is_control() && !matches!(c, '\n' | '\t' | '\r'));
    if let Some(word) = command.iter().map(String::as_str).find(odd) {
        return Err(refused("command", word).into());
    }
    let mut variables = environment.iter().flat_map(|(key, value)| [key.as_str(), value.as_str()]);
    variables.find(odd).map_or(Ok(()), |text| Err(refused("environment", text).into()))
}

/// Where the volumes are in the tree, links followed, each once: what is below another comes with that one.
///
/// The folder is copied and mounted by this path. By the declared one a link of the image would be followed in the
/// host's tree.
fn mounted(tree: &Tree, declared: &[String]) -> Result<Vec<String>> {
    let real = |path: &String| {
        let found = tree.real_path(path.as_bytes()).filter(|real| !real.is_empty());
        let found = found.and_then(|real| String::from_utf8(real).ok()).map(|real| format!("/{real}"));
        found.with_context(|| Problem::failed(format!("the volume `{path}` of the image leads nowhere it could be mounted")))
    };
    let mut paths = declared.iter().map(real).collect::<Result<Vec<String>>>()?;
    paths.sort();
    paths.dedup();
    let outer = paths.clone();
    paths.retain(|path| !outer.iter().any(|other| path.strip_prefix(other.as_str()).is_some_and(|rest| rest.starts_with('/'))));
    Ok(paths)
}

/// The image's variables, with the app's own.
fn environment(input: &AppInput, config: &RunConfig, runs: &Runs) -> BTreeMap<String, String> {
    let mut environment: BTreeMap<String, String> = config.variables().into_iter().collect();
    environment.entry("PATH".into()).or_insert_with(|| PATH.into());
    environment.entry("HOME".into()).or_insert_with(|| runs.home.clone());
    if input.port.is_some() && input.port != input.image_port {
        environment.insert("PORT".into(), input.port.map(|port| port.to_string()).unwrap_or_default());
    }
    environment.extend(input.app.env.clone());
    environment
}

/// Who the image's user is, by the tree's own tables.
fn runs_as(tree: &Tree, user: &str) -> Result<Runs> {
    let text = |path: &str| -> Result<String> {
        Ok(String::from_utf8_lossy(&tree.read(path.as_bytes())?.unwrap_or_default()).into_owned())
    };
    identity(user, &text("etc/passwd")?, &text("etc/group")?)
}

/// `USER`, `UID`, `UID:GID` or names, as ids of `passwd` and `group`; nothing is root.
///
/// # Errors
/// A name that is in neither, an id beyond an app's range.
pub fn identity(user: &str, passwd: &str, group: &str) -> Result<Runs> {
    let find = |text: &str, wanted: &str| -> Option<Vec<String>> {
        let rows: Vec<Vec<String>> = text.lines().map(|line| line.split(':').map(String::from).collect()).collect();
        let by_name = rows.iter().find(|row| row.first().is_some_and(|name| name == wanted));
        by_name.or_else(|| rows.iter().find(|row| row.get(2).is_some_and(|id| id == wanted))).cloned()
    };
    let (user, own_group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let row = find(passwd, user);
    let id = |row: Option<&Vec<String>>, at: usize| row.and_then(|row| row.get(at)?.parse::<u32>().ok());
    let missing = |what: &str, name: &str| Problem::failed(format!("the image has no {what} `{name}`"));
    let uid = user.parse().ok().or_else(|| id(row.as_ref(), 2)).ok_or_else(|| missing("user", user))?;
    let gid = match own_group {
        Some(name) => match name.parse() {
            Ok(gid) => gid,
            Err(_) => id(find(group, name).as_ref(), 2).ok_or_else(|| missing("group", name))?,
        },
        None => id(row.as_ref(), 3).unwrap_or(0),
    };
    if uid >= UID_COUNT || gid >= UID_COUNT {
        return Err(Problem::failed(format!("it runs as {uid}:{gid}, and an app has the ids up to {}", UID_COUNT - 1)).into());
    }
    let home = row.and_then(|row| row.get(5).cloned()).filter(|home| home.starts_with('/')).unwrap_or_else(|| "/".into());
    Ok(Runs { uid, gid, home })
}

/// The program and its arguments, the program by its whole path.
fn command(
    tree: &Tree,
    name: &str,
    config: &RunConfig,
    workdir: &str,
    environment: &BTreeMap<String, String>,
) -> Result<Vec<String>> {
    let mut words: Vec<String> = config.entrypoint.iter().flatten().chain(config.cmd.iter().flatten()).cloned().collect();
    let Some(program) = words.first_mut() else {
        return Err(Problem::failed(format!("the image of app `{name}` says no command"))
            .hint("set `image.command` in its pipeline")
            .into());
    };
    let is_program = |path: &str| {
        tree.resolve(path.as_bytes())
            .is_some_and(|id| matches!(tree.node(id).kind, Kind::File(_)) && tree.node(id).meta.mode & 0o111 != 0)
    };
    let places: Vec<String> = if program.starts_with('/') {
        vec![program.clone()]
    } else if program.contains('/') {
        vec![format!("{}/{program}", workdir.trim_end_matches('/'))]
    } else {
        environment["PATH"].split(':').map(|folder| format!("{}/{program}", folder.trim_end_matches('/'))).collect()
    };
    match places.into_iter().find(|place| is_program(place)) {
        Some(place) => *program = place,
        None => {
            return Err(Problem::failed(format!("the command of app `{name}`, `{program}`, is no program in its image")).into());
        }
    }
    Ok(words)
}

/// Adds what the sandbox mounts on and moves the ids in passwd and group; answers the paths that were added or changed.
fn prepare_tree(tree: &mut Tree, uid_base: u32, runs: &Runs, volumes: &[String]) -> Result<Vec<String>> {
    let mut added = Vec::new();
    for path in MOUNT_POINTS {
        let mode = if path.ends_with("tmp") { 0o1777 } else { 0o755 };
        added.extend(ensure_folder(tree, path, &Meta { mode, ..Meta::default() })?);
    }
    for path in volumes {
        // The program's own, as everywhere else: what the image does not have is for its user.
        let meta = Meta { mode: 0o755, uid: runs.uid, gid: runs.gid, ..Meta::default() };
        added.extend(ensure_folder(tree, path.trim_start_matches('/'), &meta)?);
    }
    added.extend(ensure_folder(tree, "etc", &Meta { mode: 0o755, ..Meta::default() })?);
    let folder = Meta { mode: 0o755, ..Meta::default() };
    let link = Node { meta: Meta { mode: 0o777, ..Meta::default() }, kind: Kind::Symlink(RESOLVER.into()) };
    tree.put(b"etc/resolv.conf", link, &folder);
    added.push("/etc/resolv.conf".into());
    if tree.find(b"etc/hosts").is_none() {
        put_file(tree, "etc/hosts", b"127.0.0.1 localhost\n::1 localhost\n".to_vec());
        added.push("/etc/hosts".into());
    }
    let home = &runs.home;
    let person = |uid: u32, gid: u32| format!("app:x:{uid}:{gid}:app:{home}:/bin/sh");
    for (path, ids, own) in [
        ("etc/passwd", &[2, 3][..], person(uid_base + runs.uid, uid_base + runs.gid)),
        ("etc/group", &[2][..], format!("app:x:{}:", uid_base + runs.gid)),
    ] {
        let text = tree.read(path.as_bytes())?.unwrap_or_default();
        let id = if path == "etc/passwd" { runs.uid } else { runs.gid };
        put_file(tree, path, moved_ids(&text, ids, uid_base, id, &own).into_bytes());
        added.push(format!("/{path}"));
    }
    Ok(added)
}

/// A file of `/etc` with the numbers in the columns `columns` moved; `own` is added when nobody has the id `id`.
fn moved_ids(text: &[u8], columns: &[usize], base: u32, id: u32, own: &str) -> String {
    let mut lines = Vec::new();
    let mut is_there = false;
    for line in String::from_utf8_lossy(text).lines() {
        let mut parts: Vec<String> = line.split(':').map(String::from).collect();
        is_there |= parts.get(2).is_some_and(|text| *text == id.to_string());
        for column in columns {
            if let Some(part) = parts.get_mut(*column)
                && let Ok(id) = part.parse::<u32>()
                && id < UID_COUNT
            {
                *part = (base + id).to_string();
            }
        }
        lines.push(parts.join(":"));
    }
    if !is_there {
        lines.push(own.into());
    }
    lines.join("\n") + "\n"
}

fn put_file(tree: &mut Tree, path: &str, bytes: Vec<u8>) {
    let size = bytes.len() as u64;
    let source = tree.add_source(Source::Memory(bytes.into()));
    let extents = if size == 0 { vec![] } else { vec![Extent { offset: 0, length: size, source, source_offset: 0 }] };
    let meta = Meta { mode: 0o644, ..Meta::default() };
    tree.put(path.as_bytes(), Node { meta, kind: Kind::File(File { size, extents }) }, &Meta { mode: 0o755, ..Meta::default() });
}

/// Makes the folder `path` where links lead, with `meta` for its last part; the path when it was not there.
fn ensure_folder(tree: &mut Tree, path: &str, meta: &Meta) -> Result<Option<String>> {
    let mut at: NodeId = Tree::ROOT;
    let mut made = None;
    let mut so_far = String::new();
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    for (index, part) in parts.iter().enumerate() {
        so_far.push('/');
        so_far.push_str(part);
        if let Some(there) = tree.resolve(so_far.as_bytes()) {
            if !matches!(tree.node(there).kind, Kind::Directory(_)) {
                return Err(
                    Problem::failed(format!("`{so_far}` of the image is no folder, and has to be one to be mounted on")).into()
                );
            }
            at = there;
            continue;
        }
        let own = if index + 1 == parts.len() { meta.clone() } else { Meta { mode: 0o755, ..Meta::default() } };
        let node = tree.add(Node { meta: own, kind: Kind::Directory(BTreeMap::new()) });
        if let Kind::Directory(names) = &mut tree.node_mut(at).kind {
            // A link that leads nowhere gives way.
            names.insert(part.as_bytes().to_vec(), node);
        }
        at = node;
        made = Some(format!("/{path}"));
    }
    Ok(made)
}

fn health(config: &RunConfig) -> Result<Option<Health>> {
    let label = config.labels.as_ref().and_then(|labels| labels.get(HEALTH_LABEL));
    label.map(|text| serde_json::from_str(text).with_context(|| format!("the label `{HEALTH_LABEL}` is broken"))).transpose()
}

/// The values of the unit that waits for the app's health.
fn health_values(health: &Option<Health>, port: Option<u16>, mut values: Value) -> Result<Option<Value>> {
    let Some(health) = health else { return Ok(None) };
    let seconds = health.deadline.as_secs() + BOOT_SLACK;
    let port = port.map(|port| port.to_string());
    let (words, inside): (Vec<String>, bool) = match (&health.check, port) {
        (HealthCheck::Http(path), Some(port)) => (vec!["http".into(), port, path.clone(), seconds.to_string()], false),
        (HealthCheck::Tcp, Some(port)) => (vec!["tcp".into(), port, seconds.to_string()], false),
        (HealthCheck::Command(command), _) => ([vec!["command".into(), seconds.to_string()], command.clone()].concat(), true),
        (_, None) => return Ok(None),
    };
    values["arguments"] = words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ").into();
    values["inside"] = inside.into();
    values["timeout"] = (seconds + CHECK_SLACK).into();
    Ok(Some(values))
}

/// A text without the specifiers of systemd.unit(5).
fn escaped(text: &str) -> String {
    text.replace('%', "%%")
}

/// A word of a command line or an assignment in a unit (systemd.syntax(7), "Quoting").
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@,=:".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into();
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '%' => quoted.push_str("%%"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            '\r' => quoted.push_str("\\r"),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests;
