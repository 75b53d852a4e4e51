//! Which kernel modules go into the initrd, in the form the static program reads.
//!
//! In: the wanted names, `modules.dep` and `modules.alias` of the kernel. Out: the files to take and
//! the two lists `/modules.list` (`NAME FILE DEPENDENCIES`) and `/modules.alias`. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// Modules the init loads on every machine, and what they need: these are in the initrd inflated,
/// because inflating them at each boot takes longer than reading them. The others stay as they are.
const ALWAYS: [&str; 7] = ["crc32c_generic", "crc32c_intel", "dm_verity", "erofs", "ext4", "overlay", "sha256_ssse3"];
/// Buses whose devices say by an alias which module they want; `init/modules.rs` asks no others.
const BUSES: [&str; 7] = ["acpi", "cpu", "pci", "scsi", "virtio", "vmbus", "xen"];

/// A module of an initrd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Below the kernel's module folder.
    pub path: String,
    /// File name in the initrd.
    pub name: String,
    /// Whether it is inflated on the way.
    pub inflated: bool,
}

/// The modules of an initrd.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Modules {
    /// Sorted by name.
    pub files: Vec<Module>,
    /// `/modules.list`.
    pub list: String,
    /// `/modules.alias`: the lines of the modules that were taken.
    pub aliases: String,
    /// Wanted, and neither a file nor built in.
    pub missing: Vec<String>,
}

/// The modules `wanted` and what they need (kmod, modules.dep(5)).
pub fn modules<'a>(wanted: impl IntoIterator<Item = &'a str>, dependencies: &str, aliases: &str, built_in: &str) -> Modules {
    let files: BTreeMap<String, (&str, Vec<String>)> = dependencies
        .lines()
        .filter_map(|line| {
            let (file, needs) = line.split_once(':')?;
            Some((name_of(file), (file, needs.split_ascii_whitespace().map(name_of).collect())))
        })
        .collect();
    let built_in: BTreeSet<String> = built_in.lines().map(name_of).collect();
    let closure = |wanted: Vec<String>| {
        let (mut taken, mut unknown, mut open) = (BTreeSet::new(), BTreeSet::new(), wanted);
        while let Some(name) = open.pop() {
            match files.get(&name) {
                Some((_, needs)) if taken.insert(name.clone()) => open.extend(needs.iter().cloned()),
                Some(_) => {}
                None => drop(unknown.insert(name)),
            }
        }
        (taken, unknown)
    };
    let (taken, unknown) = closure(wanted.into_iter().map(normal).collect());
    let (always, _) = closure(ALWAYS.map(String::from).to_vec());
    let missing = unknown.into_iter().filter(|name| !built_in.contains(name)).collect();
    let mut modules = Modules { missing, ..Modules::default() };
    for name in &taken {
        let (path, needs) = &files[name];
        let base = path.rsplit('/').next().unwrap_or(path);
        let inflated = always.contains(name);
        let base = if inflated { format!("{}.ko", base.split(".ko").next().unwrap_or(base)) } else { base.to_string() };
        let needs = if needs.is_empty() { "-".to_string() } else { needs.join(",") };
        modules.list.push_str(&format!("{name} {base} {needs}\n"));
        modules.files.push(Module { path: (*path).to_string(), name: base, inflated });
    }
    let asked = |line: &str| {
        let pattern = line.strip_prefix("alias ").and_then(|rest| rest.split(':').next()).unwrap_or_default();
        BUSES.contains(&pattern.trim_end_matches('*'))
    };
    for line in aliases.lines().filter(|line| asked(line)) {
        if line.rsplit(' ').next().is_some_and(|name| taken.contains(&normal(name))) {
            modules.aliases.push_str(line);
            modules.aliases.push('\n');
        }
    }
    modules
}

/// `kernel/fs/erofs/erofs.ko.xz` is `erofs`.
fn name_of(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    normal(base.split(".ko").next().unwrap_or(base))
}

/// The kernel takes `-` and `_` for the same in names.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_bring_what_they_need() {
        let dependencies = "kernel/fs/erofs/erofs.ko.xz: kernel/lib/lz4.ko.xz kernel/lib/net-fs.ko\nkernel/lib/lz4.ko.xz:\n\
                            kernel/lib/net-fs.ko: kernel/lib/lz4.ko.xz\nkernel/x/other.ko.xz:\n";
        let aliases = "# Aliases\nalias fs-erofs erofs\nalias pci:v1* other\nalias pci:v2* net_fs\nalias usb:x net_fs\n";
        let module = |path: &str, name: &str, inflated| Module { path: path.into(), name: name.into(), inflated };
        let found = modules(["erofs", "ext4", "no-such"], dependencies, aliases, "kernel/fs/ext4/ext4.ko\n");
        let expected = Modules {
            files: vec![
                module("kernel/fs/erofs/erofs.ko.xz", "erofs.ko", true),
                module("kernel/lib/lz4.ko.xz", "lz4.ko", true),
                module("kernel/lib/net-fs.ko", "net-fs.ko", true),
            ],
            list: "erofs erofs.ko lz4,net_fs\nlz4 lz4.ko -\nnet_fs net-fs.ko lz4\n".into(),
            aliases: "alias pci:v2* net_fs\n".into(),
            missing: vec!["no_such".into()],
        };
        assert_eq!(found, expected);
        let other = modules(["other"], dependencies, aliases, "");
        assert_eq!(other.files, [module("kernel/x/other.ko.xz", "other.ko.xz", false)]);
        assert_eq!((other.list.as_str(), other.aliases.as_str()), ("other other.ko.xz -\n", "alias pci:v1* other\n"));
    }
}
