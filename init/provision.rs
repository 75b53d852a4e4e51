//! Puts what was brought in from outside where the running system looks for it. Nothing of it goes to the disk.
//!
//! | what | where |
//! |---|---|
//! | credentials systemd does not find by itself | `/run/credentials/@initrd/NAME` |
//! | `system.hostname`, `hostname`, else the pattern of `host.json` | `/etc/hostname` in the overlay |
//! | the hostname, where `/etc/hosts` does not have it | `/etc/hosts` in the overlay |
//! | `ssh.authorized_keys.USER`, keys of NoCloud | `/run/pipeline/ssh/USER` |
//! | `network.{network,link,netdev}.NAME` | `/run/systemd/network/NAME.network` … |
//! | `network-config` | `/run/systemd/network/10-pipeline-CARD.network` |
//! | `app.NAME.env`, `app.NAME.secret.KEY` | `/run/pipeline/apps/NAME/{env,secrets/KEY}` |

use std::fs;
use std::path::Path;

use super::cloud::{self, Wishes};
use super::credentials::{Brought, Credential, is_name};
use super::wording::{ForApp, app_owner, environment, filled, for_app, hosts_with, is_hostname, is_variable, owner};
use super::{copy, log, yaml};

const ROOT_ONLY: u32 = 0o400;

/// Does all of it. What cannot be done is said on the console, and the boot goes on.
///
/// # Errors
/// When `/run` cannot be written.
pub fn apply(root: &Path, brought: &Brought) -> Result<(), String> {
    let nocloud = brought.nocloud.as_ref();
    let wishes = nocloud.map(|disk| cloud::wishes(&disk.meta_data, &disk.user_data, &disk.network_config)).unwrap_or_default();
    wishes.problems.iter().for_each(|problem| log::warn(problem));
    let done = hand_to_systemd(&brought.credentials)
        .and_then(|()| hostname(root, brought, &wishes))
        .and_then(|()| ssh_keys(root, brought, &wishes))
        .and_then(|()| networks(root, brought, &wishes))
        .and_then(|()| apps(root, brought));
    done.map_err(|error| format!("the configuration from outside cannot be written: {error}"))
}

fn hand_to_systemd(credentials: &[Credential]) -> std::io::Result<()> {
    let unknown = credentials.iter().filter(|credential| !credential.known).collect::<Vec<_>>();
    if unknown.is_empty() {
        return Ok(());
    }
    let folder = Path::new("/run/credentials/@initrd");
    copy::folder(Path::new("/run/credentials"))?;
    copy::folder_of(folder, 0o700, (0, 0))?;
    unknown.iter().try_for_each(|each| copy::file(&folder.join(&each.name), &each.value, ROOT_ONLY, (0, 0)))
}

fn hostname(root: &Path, brought: &Brought, wishes: &Wishes) -> std::io::Result<()> {
    let outside = brought.text("system.hostname").or(wishes.hostname.clone());
    let given = outside.or_else(|| hostname_of_pattern(root));
    if given.as_ref().is_some_and(|name| !is_hostname(name)) {
        log::warn("the hostname from outside is not one and is left out");
        return Ok(());
    }
    if let Some(name) = &given {
        copy::file(&root.join("etc/hostname"), format!("{name}\n").as_bytes(), 0o644, (0, 0))?;
    }
    // Programs that look up their own name find it without a name server.
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let name = given.or_else(|| read("etc/hostname").map(|name| name.trim().to_owned())).filter(|name| is_hostname(name));
    match name.and_then(|name| hosts_with(read("etc/hosts").as_deref(), &name)) {
        Some(hosts) => copy::file(&root.join("etc/hosts"), hosts.as_bytes(), 0o644, (0, 0)),
        None => Ok(()),
    }
}

/// The name `host.json` has a pattern for.
fn hostname_of_pattern(root: &Path) -> Option<String> {
    let host = yaml::parse(&fs::read_to_string(root.join("usr/lib/pipeline/host.json")).ok()?).ok()?;
    let pattern = host.get("hostname")?.text().filter(|pattern| pattern.contains('?'))?.to_string();
    let id = fs::read_to_string(root.join("etc/machine-id")).ok()?;
    Some(filled(&pattern, id.trim()))
}

fn ssh_keys(root: &Path, brought: &Brought, wishes: &Wishes) -> std::io::Result<()> {
    let mut users: Vec<(String, String)> = Vec::new();
    let mut add = |user: &str, key: &str| match users.iter_mut().find(|(name, _)| name == user) {
        Some((_, keys)) => *keys += &format!("{key}\n"),
        None => users.push((user.to_string(), format!("{key}\n"))),
    };
    for credential in &brought.credentials {
        if let Some(user) = credential.name.strip_prefix("ssh.authorized_keys.") {
            add(user, String::from_utf8_lossy(&credential.value).trim_end());
        }
    }
    wishes.keys.iter().for_each(|(user, key)| add(user, key));
    if users.is_empty() {
        return Ok(());
    }
    let folder = Path::new("/run/pipeline/ssh");
    copy::folder_of(folder, 0o755, (0, 0))?;
    let passwd = fs::read_to_string(root.join("etc/passwd")).unwrap_or_default();
    for (user, keys) in users {
        match owner(&passwd, &user) {
            Some(owner) if is_name(&user) => copy::file(&folder.join(&user), keys.as_bytes(), 0o600, owner)?,
            _ => log::warn(&format!("there is no user `{user}` for the ssh keys from outside")),
        }
    }
    Ok(())
}

fn networks(root: &Path, brought: &Brought, wishes: &Wishes) -> std::io::Result<()> {
    let mut files: Vec<(String, &[u8])> = Vec::new();
    for credential in &brought.credentials {
        for kind in ["network", "link", "netdev"] {
            if let Some(name) =
                credential.name.strip_prefix("network.").and_then(|rest| rest.strip_prefix(kind)?.strip_prefix('.'))
            {
                files.push((format!("{name}.{kind}"), &credential.value));
            }
        }
    }
    files.extend(wishes.networks.iter().map(|(name, text)| (name.clone(), text.as_bytes())));
    if files.is_empty() {
        return Ok(());
    }
    let folder = Path::new("/run/systemd/network");
    copy::folder(folder)?;
    // They may hold keys: for networkd alone, in the group of its user.
    let group = fs::read_to_string(root.join("etc/group")).unwrap_or_default();
    let group = group.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut group = group.filter(|fields| fields.len() >= 3 && fields[0] == "systemd-network");
    let (mode, group) = group.next().and_then(|fields| fields[2].parse().ok()).map_or((0o644, 0), |group| (0o640, group));
    files.iter().try_for_each(|(name, bytes)| copy::file(&folder.join(name), bytes, mode, (0, group)))
}

fn apps(root: &Path, brought: &Brought) -> std::io::Result<()> {
    let installed = root.join("usr/lib/pipeline/apps");
    let mut names: Vec<&str> = Vec::new();
    for credential in brought.credentials.iter().filter(|credential| credential.name.starts_with("app.")) {
        match for_app(&credential.name) {
            Some(ForApp::Environment { app } | ForApp::Secret { app, .. }) => {
                if !names.contains(&app) {
                    names.push(app);
                }
            }
            None => log::warn(&format!("the credential `{}` is neither app.NAME.env nor app.NAME.secret.KEY", credential.name)),
        }
    }
    for app in names {
        match fs::read_to_string(installed.join(app).join("app.json")).map(|text| app_owner(&text)) {
            Ok(Some(owner)) => one_app(app, owner, &brought.credentials)?,
            Ok(None) => log::warn(&format!("app.json of `{app}` is not understood: its credentials are left out")),
            Err(_) => log::warn(&format!("there is no app `{app}` for the credentials from outside")),
        }
    }
    Ok(())
}

fn one_app(app: &str, owner: u32, credentials: &[Credential]) -> std::io::Result<()> {
    let folder = Path::new("/run/pipeline/apps");
    copy::folder_of(folder, 0o711, (0, 0))?;
    let folder = folder.join(app);
    copy::folder_of(&folder, 0o711, (0, 0))?;
    copy::folder_of(&folder.join("secrets"), 0o500, (owner, owner))?;
    let mut lines = String::new();
    for credential in credentials {
        match for_app(&credential.name) {
            Some(ForApp::Environment { app: name }) if name == app => {
                let (more, wrong) = environment(&String::from_utf8_lossy(&credential.value));
                lines = more + &lines;
                for line in wrong {
                    log::warn(&format!("line {line} of app.{app}.env is not KEY=VALUE and is left out"));
                }
            }
            Some(ForApp::Secret { app: name, key }) if name == app => {
                copy::file(&folder.join("secrets").join(key), &credential.value, ROOT_ONLY, (owner, owner))?;
                if is_variable(key) {
                    lines += &format!("{key}_FILE=\"/run/secrets/{key}\"\n");
                } else {
                    log::warn(&format!("the secret `{key}` of app `{app}` cannot name a variable: it is a file only"));
                }
            }
            _ => {}
        }
    }
    copy::file(&folder.join("env"), lines.as_bytes(), ROOT_ONLY, (0, 0))
}
