//! Which kernel modules go into the initrd, in the form the static program reads.
//!
//! In: the wanted names, `modules.dep` and `modules.alias` of the kernel. Out: the files to take and
//! the two lists `/modules.list` (`NAME FILE DEPENDENCIES`) and `/modules.alias`. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// The modules of an initrd.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Modules {
    /// Paths below the kernel's module folder, sorted by module name.
    pub files: Vec<String>,
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
    let mut taken = BTreeSet::new();
    let mut modules = Modules::default();
    let mut open: Vec<String> = wanted.into_iter().map(normal).collect();
    while let Some(name) = open.pop() {
        match files.get(&name) {
            Some((_, needs)) => {
                if taken.insert(name) {
                    open.extend(needs.iter().cloned());
                }
            }
            None if built_in.contains(&name) => {}
            None => modules.missing.push(name),
        }
    }
    modules.missing.sort();
    modules.missing.dedup();
    for name in &taken {
        let (file, needs) = &files[name];
        let base = file.rsplit('/').next().unwrap_or(file);
        let needs = if needs.is_empty() { "-".to_string() } else { needs.join(",") };
        modules.list.push_str(&format!("{name} {base} {needs}\n"));
        modules.files.push((*file).to_string());
    }
    for line in aliases.lines() {
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
        let aliases = "# Aliases\nalias fs-erofs erofs\nalias pci:v1* other\nalias net-pf net_fs\n";
        let found = modules(["erofs", "ext4", "no-such"], dependencies, aliases, "kernel/fs/ext4/ext4.ko\n");
        let expected = Modules {
            files: ["kernel/fs/erofs/erofs.ko.xz", "kernel/lib/lz4.ko.xz", "kernel/lib/net-fs.ko"].map(String::from).to_vec(),
            list: "erofs erofs.ko.xz lz4,net_fs\nlz4 lz4.ko.xz -\nnet_fs net-fs.ko lz4\n".into(),
            aliases: "alias fs-erofs erofs\nalias net-pf net_fs\n".into(),
            missing: vec!["no_such".into()],
        };
        assert_eq!(found, expected);
    }
}
