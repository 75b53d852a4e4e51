//! Loads kernel modules: those a step needs, by name, and those the hardware asks for, by alias.
//!
//! What there is stands in two files of the initrd, see [`super::alias`]. A name that is not in the list is built into
//! the kernel.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::alias::{matches, parse_aliases, parse_list};
use super::{log, sys};

/// Where devices that bring a module alias are.
const BUSES: [&str; 6] = ["pci", "virtio", "vmbus", "xen", "scsi", "acpi"];

/// The modules of the initrd.
#[derive(Debug, Default, Clone)]
pub struct Modules {
    folder: PathBuf,
    list: HashMap<String, (String, Vec<String>)>,
    aliases: Vec<(String, String)>,
    /// What was loaded, or tried.
    done: HashMap<String, bool>,
    /// Aliases that were looked at.
    seen: std::collections::HashSet<String>,
}

impl Modules {
    /// The modules of the initrd that runs; none when it has no list (dracut loads its own).
    pub fn of_initrd() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Self {
            folder: PathBuf::from("/modules"),
            list: parse_list(&read("/modules.list")),
            aliases: parse_aliases(&read("/modules.alias")),
            ..Self::default()
        }
    }

    /// Loads a module and before it what it needs. `true` when it is there: loaded, or not in the list.
    pub fn load(&mut self, name: &str) -> bool {
        if let Some(done) = self.done.get(name) {
            return *done;
        }
        let Some((file, dependencies)) = self.list.get(name).cloned() else { return true };
        self.done.insert(name.to_string(), false);
        let loaded = dependencies.iter().fold(true, |all, each| self.load(each) && all) && self.insert(name, &file);
        self.done.insert(name.to_string(), loaded);
        loaded
    }

    fn insert(&self, name: &str, file: &str) -> bool {
        let path = self.folder.join(file);
        let compressed = path.extension().is_none_or(|ending| ending != "ko");
        match File::open(&path).and_then(|file| sys::load_module(&file, compressed)) {
            Err(error) if error.raw_os_error() == Some(sys::EEXIST) => true,
            Err(error) => {
                // Drivers of processor features say "no such device" where the feature is missing.
                log::note(&format!("module {name} was not loaded: {error}"));
                false
            }
            Ok(()) => {
                log::note(&format!("module {name}"));
                true
            }
        }
    }

    /// Loads what the devices present ask for, until nothing new appears. Loading returns when the
    /// driver has looked for its devices, also those it looks for on the side: when this is done, all disks
    /// of ATA and SCSI are there.
    pub fn load_for_hardware(&mut self) {
        while self.one_round() {}
    }

    /// Loads `names` beside the drivers of the hardware: inflating a module takes as long as a disk does to answer.
    /// The kernel sorts out what both sides load.
    pub fn load_with_hardware(&mut self, names: &[&str]) {
        let mut beside = self.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for name in names {
                    beside.load(name);
                }
            });
            self.load_for_hardware();
        });
        self.done.extend(beside.done);
    }

    fn one_round(&mut self) -> bool {
        let mut wanted = Vec::new();
        for bus in BUSES {
            let Ok(devices) = fs::read_dir(format!("/sys/bus/{bus}/devices")) else { continue };
            let mut devices = devices.flatten().map(|entry| entry.path()).collect::<Vec<_>>();
            devices.sort();
            for device in devices {
                self.wanted_by(&device.join("modalias"), &mut wanted);
            }
        }
        let mut news = false;
        for name in wanted {
            if !self.done.contains_key(&name) && self.list.contains_key(&name) {
                news = true;
                self.load(&name);
            }
        }
        news
    }

    fn wanted_by(&mut self, file: &Path, wanted: &mut Vec<String>) {
        let Ok(alias) = fs::read_to_string(file) else { return };
        let alias = alias.trim_end();
        if !alias.is_empty() && self.seen.insert(alias.to_string()) {
            let fitting = self.aliases.iter().filter(|(pattern, _)| matches(pattern.as_bytes(), alias.as_bytes()));
            wanted.extend(fitting.map(|(_, name)| name.clone()));
        }
    }

    /// The module a processor feature asks for (`cpu:` aliases), among `names`.
    pub fn load_for_processor(&mut self, names: &[&str]) {
        let alias = fs::read_to_string("/sys/devices/system/cpu/modalias").unwrap_or_default();
        for name in names {
            let mut patterns = self.aliases.iter().filter(|(_, module)| module == name);
            if patterns.any(|(pattern, _)| matches(pattern.as_bytes(), alias.trim_end().as_bytes())) {
                self.load(name);
            }
        }
    }
}
