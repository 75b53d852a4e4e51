//! How a disk is shown: `bake --plan` and `artifact show`.

use anyhow::Result;
use serde_json::json;

use super::{Global, report, ui};
use crate::artifact::disk::Disk;
use crate::disk::table::{Role, Table};

/// Packages that `artifact show` lists, largest first.
const LARGEST: usize = 10;

/// What a partition is for, in words.
const fn purpose(role: Role) -> &'static str {
    match role {
        Role::Bios => "GRUB's core image, for BIOS",
        Role::Esp => "FAT32: systemd-boot, unified kernel image, GRUB's kernel and initrd",
        Role::RootA => "slot A: EROFS root, read-only",
        Role::VerityA => "slot A: dm-verity hash tree",
        Role::RootB => "slot B: free, for the next version",
        Role::VerityB => "slot B: free, for the next version",
        Role::Var => "/var: ext4, made at first boot, grows with the disk",
    }
}

/// The partition table as text.
pub fn table(table: &Table) -> String {
    let mut rows = vec![["#", "NAME", "START", "SIZE", "USED", "FULL", "WHAT"].map(String::from).to_vec()];
    for partition in &table.partitions {
        let full = partition.used * 100 / partition.bytes().max(1);
        rows.push(vec![
            partition.number.to_string(),
            partition.name.clone(),
            report::bytes(partition.offset()),
            report::bytes(partition.bytes()),
            if partition.used == 0 { "-".into() } else { report::bytes(partition.used) },
            if partition.used == 0 { "-".into() } else { format!("{full} %") },
            purpose(partition.role).into(),
        ]);
    }
    format!("{}disk: {}\n", report::table(&rows), report::bytes(table.bytes()))
}

/// `artifact show` of a disk.
pub fn show(global: &Global, name: &str, disk: &Disk) -> Result<u8> {
    let value = json!({"schema": 1, "name": name, "kind": "disk", "digest": disk.digest, "disk": disk.config, "parts": disk.parts.iter().map(|(part, descriptor)| json!({"name": part.name(), "digest": descriptor.digest, "bytes": descriptor.size})).collect::<Vec<_>>()});
    ui::answer(global, &value, || text(name, disk))?;
    Ok(0)
}

fn text(name: &str, disk: &Disk) -> String {
    let config = &disk.config;
    let mut text = format!("{name} {}\n", disk.digest);
    let mut line = |key: &str, value: String| text.push_str(&format!("  {key}: {value}\n"));
    line("host", config.host.to_string());
    line("system", config.os.clone());
    line("kernel", config.kernel.clone());
    line("command line", config.cmdline.clone());
    line("initrd", config.initrd.clone());
    line("firmware", config.firmware.join(", "));
    line("root hash", config.root_hash.clone());
    for app in &config.apps {
        let port = app.port.map(|port| format!(", port {port}")).unwrap_or_default();
        line("app", format!("{}{port}, image {}", app.name, app.image));
    }
    let mut largest: Vec<_> = config.packages.iter().collect();
    largest.sort_by_key(|package| (std::cmp::Reverse(package.size), &package.name));
    let shown: Vec<String> = largest
        .iter()
        .take(LARGEST)
        .map(|package| format!("{} {} ({})", package.name, package.version, report::bytes(package.size << 10)))
        .collect();
    line("packages", format!("{}; the largest: {}", config.packages.len(), shown.join(", ")));
    text.push_str(&table(&config.table));
    let mut rows = vec![["PART", "SIZE", "DIGEST"].map(String::from).to_vec()];
    rows.extend(
        disk.parts
            .iter()
            .map(|(part, descriptor)| vec![part.name().into(), report::bytes(descriptor.size), descriptor.digest.to_string()]),
    );
    text + &report::table(&rows)
}
