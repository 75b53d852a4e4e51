//! The boot loader's view of the slots on the ESP, and how it is changed.
//!
//! The partition is never mounted: [`super::fat`] changes it in place. Both boot loaders are
//! always marked; the state that counts is the one of the firmware the machine was started by.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::fat::{Device, Entry, Fat};
use super::grubenv;
use super::slots::{Slot, State, UkiName, grub_marks, grub_state, is_grub_damaged};

const UKI_FOLDER: &str = "/EFI/Linux";
const GRUBENV: &str = "/grub/grubenv";

struct Node(File);

impl Device for Node {
    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, String> {
        let mut bytes = vec![0; length];
        self.0.read_exact_at(&mut bytes, offset).map_err(|error| format!("cannot be read: {error}"))?;
        Ok(bytes)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        self.0.write_all_at(bytes, offset).map_err(|error| format!("cannot be written: {error}"))
    }
}

/// The ESP of the disk the machine was started from.
#[derive(Debug, Clone)]
pub struct Esp {
    node: PathBuf,
}

/// What a mark says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Good,
    /// Its bytes are not what they were: bad until it is written anew.
    Damaged,
}

impl Esp {
    pub fn new(node: PathBuf) -> Self {
        Self { node }
    }

    fn open(&self, write: bool) -> Result<Fat<Node>, String> {
        let file = OpenOptions::new().read(true).write(write).open(&self.node);
        let file = file.map_err(|error| format!("the ESP {} cannot be opened: {error}", self.node.display()))?;
        Fat::open(Node(file)).map_err(|error| self.say(error))
    }

    fn say(&self, error: String) -> String {
        format!("the ESP {} {error}", self.node.display())
    }

    /// The states of slots A and B as the boot loader of this firmware sees them.
    ///
    /// # Errors
    /// When the ESP cannot be read.
    pub fn states(&self) -> Result<[State; 2], String> {
        let fat = self.open(false)?;
        if Path::new("/sys/firmware/efi").is_dir() {
            let ukis = ukis(&fat).map_err(|error| self.say(error))?;
            Ok(Slot::ALL.map(|slot| best(ukis.iter().filter(|(_, name)| name.slot == slot).map(|(_, name)| name.state))))
        } else {
            let block = fat.file(GRUBENV).and_then(|file| fat.read(&file)).map_err(|error| self.say(error))?;
            let variables = grubenv::parse(&block)?;
            Ok(Slot::ALL.map(|slot| grub_state(&variables, slot)))
        }
    }

    /// Whether a slot has a mark in both boot loaders already.
    ///
    /// # Errors
    /// When the ESP cannot be read.
    pub fn is_marked(&self, slot: Slot, mark: Mark) -> Result<bool, String> {
        let fat = self.open(false)?;
        let ukis = ukis(&fat).map_err(|error| self.say(error))?;
        let grub = match fat.file(GRUBENV) {
            Err(_) => true,
            Ok(file) => {
                let block = fat.read(&file).map_err(|error| self.say(error))?;
                let same = |(name, value): &(String, &str)| {
                    grubenv::parse(&block).is_ok_and(|all| all.iter().any(|(key, old)| key == name && old == value))
                };
                grub_marks(slot, mark == Mark::Good).iter().all(same)
            }
        };
        Ok(grub && ukis.iter().all(|(_, name)| name.slot != slot || says(name, mark)))
    }

    /// Whether a slot is marked damaged in one of the boot loaders.
    ///
    /// # Errors
    /// When the ESP cannot be read.
    pub fn is_damaged(&self, slot: Slot) -> Result<bool, String> {
        let fat = self.open(false)?;
        let ukis = ukis(&fat).map_err(|error| self.say(error))?;
        let grub = match fat.file(GRUBENV) {
            Err(_) => false,
            Ok(file) => is_grub_damaged(&grubenv::parse(&fat.read(&file).map_err(|error| self.say(error))?)?, slot),
        };
        Ok(grub || ukis.iter().any(|(_, name)| name.slot == slot && name.damaged))
    }

    /// Marks a slot in both boot loaders, waits until it is on the disk, and reads it back.
    /// What is so already is not written again. The second is marked even if the first fails.
    ///
    /// # Errors
    /// What could not be marked.
    pub fn mark(&self, slot: Slot, mark: Mark) -> Result<(), String> {
        let mut fat = self.open(true)?;
        let uki = mark_uki(&mut fat, slot, mark);
        let grub = mark_grub(&mut fat, slot, mark);
        let flushed = fat.device().0.sync_all().map_err(|error| format!("cannot be written: {error}"));
        uki.and(grub).and(flushed).map_err(|error| self.say(error))?;
        if self.is_marked(slot, mark)? { Ok(()) } else { Err(self.say("does not keep what is written".into())) }
    }
}

fn says(name: &UkiName, mark: Mark) -> bool {
    match mark {
        Mark::Good => name.state == State::Good,
        Mark::Damaged => name.damaged,
    }
}

fn ukis(fat: &Fat<Node>) -> Result<Vec<(Entry, UkiName)>, String> {
    let entries = fat.list(UKI_FOLDER)?;
    Ok(entries.into_iter().filter_map(|entry| UkiName::parse(&entry.name).map(|name| (entry, name))).collect())
}

fn best(states: impl Iterator<Item = State>) -> State {
    let rank = |state: &State| match state {
        State::Empty => 0,
        State::Bad => 1,
        State::Trying(_) => 2,
        State::Good => 3,
    };
    states.max_by_key(rank).unwrap_or(State::Empty)
}

fn mark_uki(fat: &mut Fat<Node>, slot: Slot, mark: Mark) -> Result<(), String> {
    let mut found = false;
    for (entry, name) in ukis(fat)? {
        if name.slot == slot {
            found = true;
            if !says(&name, mark) {
                let new = if mark == Mark::Good { name.good() } else { name.bad() };
                fat.rename(&entry, &new)?;
            }
        }
    }
    if found { Ok(()) } else { Err(format!("has no UKI of slot {}", slot.letter())) }
}

fn mark_grub(fat: &mut Fat<Node>, slot: Slot, mark: Mark) -> Result<(), String> {
    let file = match fat.file(GRUBENV) {
        // A disk made for UEFI only.
        Err(_) => return Ok(()),
        Ok(file) => file,
    };
    let block = fat.read(&file)?;
    let edited = grubenv::edited(&block, &grub_marks(slot, mark == Mark::Good))?;
    fat.overwrite(&file, &edited)
}
