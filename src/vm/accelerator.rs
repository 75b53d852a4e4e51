//! Which accelerator runs a machine: KVM only when a probe has shown that it works, else TCG.
//!
//! `/dev/kvm` may be missing, forbidden, or, under some hypervisors, open well and then hang every guest.
//! So a guest of a few instructions is run with KVM under a hard time limit; only its answer counts.
//! The result is kept for the process, and in a file for this boot, user and version of QEMU.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::artifact::store::write_cache;
use crate::cmd::Cmd;
use crate::error::Problem;

/// How long the guest of the probe has. With a working KVM, SeaBIOS and the boot sector take about 0.3 s.
const PROBE: Duration = Duration::from_secs(3);
/// How long a killed QEMU may take to be gone; one that hangs in the kernel is left behind.
const REAP: Duration = Duration::from_secs(1);
/// Characters of QEMU's last words that are told.
const WORDS: usize = 120;
/// Format of the file.
const FORMAT: u32 = 1;
/// What the guest writes, and the status QEMU's isa-debug-exit makes of it: twice the value, plus one.
const ANSWER: u8 = 0x31;
const STATUS: i32 = (ANSWER as i32) * 2 + 1;
/// I/O port of isa-debug-exit.
const EXIT_PORT: u8 = 0xf4;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU's translator, ten times slower.
    Tcg,
}

/// What the user wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wanted {
    /// KVM when it works.
    #[default]
    Auto,
    Kvm,
    Tcg,
}

/// What is used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    pub accelerator: Accelerator,
    /// For a message: `KVM`, or `TCG (emulation), because …`.
    pub words: String,
}

impl Choice {
    fn kvm() -> Self {
        Self { accelerator: Accelerator::Kvm, words: "KVM".into() }
    }

    fn tcg(because: impl std::fmt::Display) -> Self {
        Self { accelerator: Accelerator::Tcg, words: format!("TCG (emulation), because {because}") }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    format: u32,
    /// Boot id, user, program and version.
    key: String,
    choice: Choice,
}

static CHOSEN: Mutex<Option<(String, Choice)>> = Mutex::new(None);

/// Chooses for the QEMU program `qemu`; `state` is a folder in which the result is kept.
///
/// # Errors
/// QEMU cannot be started at all; KVM is wanted and does not work.
pub fn choose(qemu: &Path, wanted: Wanted, state: &Path) -> Result<Choice> {
    let choice = match wanted {
        Wanted::Tcg => return Ok(Choice { accelerator: Accelerator::Tcg, words: "TCG (emulation), as wanted".into() }),
        Wanted::Auto => kept(qemu, Path::new("/dev/kvm"), state)?,
        // Somebody thinks that it works: what was found before is no answer.
        Wanted::Kvm => usable(Path::new("/dev/kvm"))
            .map_or_else(|because| Ok(Choice::tcg(because)), |()| probe(qemu).map(|(choice, _)| choice))?,
    };
    if wanted == Wanted::Kvm && choice.accelerator != Accelerator::Kvm {
        let because = choice.words.split_once("because ").map_or(choice.words.as_str(), |(_, because)| because);
        return Err(Problem::failed(format!("KVM is wanted and cannot be used: {because}")).into());
    }
    Ok(choice)
}

/// The kept result, or a new one.
fn kept(qemu: &Path, device: &Path, state: &Path) -> Result<Choice> {
    let version = Cmd::new(qemu).arg("--version").text()?;
    let boot = fs_err::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let user = rustix::process::geteuid().as_raw();
    let first = version.lines().next().unwrap_or_default();
    let key = format!("{} {user} {} {first}", boot.trim(), qemu.display());
    let mut chosen = CHOSEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((of, choice)) = chosen.as_ref()
        && *of == key
    {
        return Ok(choice.clone());
    }
    let file = state.join("accelerator.json");
    // A damaged file is no result.
    let on_disk = fs_err::read(&file).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
    let choice = match on_disk.filter(|kept| kept.format == FORMAT && kept.key == key) {
        Some(kept) => kept.choice,
        None => {
            let (choice, is_sure) = match usable(device) {
                Ok(()) => probe(qemu)?,
                // Cheap to see again, and the user may mend it.
                Err(because) => return Ok(Choice::tcg(because)),
            };
            if !is_sure {
                *chosen = Some((key, choice.clone()));
                return Ok(choice);
            }
            let kept = Kept { format: FORMAT, key: key.clone(), choice };
            fs_err::create_dir_all(state)?;
            write_cache(&file, &serde_json::to_vec(&kept)?)?;
            kept.choice
        }
    };
    *chosen = Some((key, choice.clone()));
    Ok(choice)
}

/// Whether the device is there and may be used; opening it is left to the probe, since even that may hang.
fn usable(device: &Path) -> Result<(), String> {
    use rustix::fs::Access;
    match rustix::fs::access(device, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => {
            Err(format!("this user may not use {} (`adduser $USER kvm` allows it)", device.display()))
        }
        Err(_) => Err(format!("there is no {}", device.display())),
    }
}

/// Runs the guest with KVM; and whether the answer holds for later too: a machine that is busy can be late.
fn probe(qemu: &Path) -> Result<(Choice, bool)> {
    let mut disk = tempfile::NamedTempFile::new().context("cannot make the disk of the KVM probe")?;
    disk.write_all(&boot_sector())?;
    Ok(match run(qemu, "kvm", "host", disk.path(), PROBE)? {
        Answer::Ran => (Choice::kvm(), true),
        Answer::Silent => (Choice::tcg(format!("a guest given to /dev/kvm did not run within {} s", PROBE.as_secs())), false),
        Answer::Failed(words) => (Choice::tcg(format!("QEMU cannot use /dev/kvm: {words}")), true),
    })
}

#[derive(Debug, PartialEq)]
enum Answer {
    Ran,
    /// Nothing came in time.
    Silent,
    /// QEMU ended by itself, with these words.
    Failed(String),
}

fn run(qemu: &Path, accel: &str, cpu: &str, disk: &Path, limit: Duration) -> Result<Answer> {
    let errors = tempfile::tempfile().context("cannot make a file for the KVM probe")?;
    let drive: PathBuf = disk.into();
    let mut child = Cmd::new(qemu)
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-machine", "pc", "-m", "16M"])
        .args(["-accel", accel, "-cpu", cpu])
        .args(["-device", &format!("isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1")])
        .args(["-drive".into(), format!("file={},format=raw,if=ide,snapshot=off,read-only=off", drive.display())])
        .stdout(Stdio::null())
        .stderr(errors.try_clone().context("cannot share a file")?.into())
        .own_group()
        .spawn()?;
    match wait(&mut child, limit)? {
        Some(status) if status.code() == Some(STATUS) => Ok(Answer::Ran),
        Some(status) => {
            let mut text = String::new();
            use std::io::{Read as _, Seek as _};
            let mut errors = errors;
            errors.rewind()?;
            errors.read_to_string(&mut text)?;
            let last = text.lines().rfind(|line| !line.trim().is_empty());
            // QEMU's own failures can be long: `….c:3183: kvm_buf_set_msrs: Assertion …`.
            let last = last.map(|line| line.trim().chars().take(WORDS).collect::<String>());
            Ok(Answer::Failed(last.unwrap_or_else(|| format!("it ended with {}", crate::cmd::describe(status)))))
        }
        None => {
            // It may already have ended.
            let _ = child.kill();
            wait(&mut child, REAP)?;
            Ok(Answer::Silent)
        }
    }
}

/// The child's status when it ends in time.
pub(super) fn wait(child: &mut Child, limit: Duration) -> Result<Option<std::process::ExitStatus>> {
    let end = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for QEMU")? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A boot sector (real mode, loaded at 0x7c00) that writes [`ANSWER`] to [`EXIT_PORT`] and stops.
fn boot_sector() -> [u8; 512] {
    let code = [
        0xb0, ANSWER, //    mov al, ANSWER
        0xe6, EXIT_PORT, // out EXIT_PORT, al
        0xfa,      //            cli
        0xf4,      //            hlt
        0xeb, 0xfd, //      jmp to the hlt
    ];
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(&code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu() -> PathBuf {
        crate::cmd::find("qemu-system-x86_64", &std::env::var_os("PATH").unwrap()).expect("package qemu-system-x86")
    }

    #[test]
    fn the_probes_guest_answers_where_the_accelerator_works() {
        let mut disk = tempfile::NamedTempFile::new().unwrap();
        disk.write_all(&boot_sector()).unwrap();
        assert_eq!(run(&qemu(), "tcg", "max", disk.path(), Duration::from_secs(60)).unwrap(), Answer::Ran);
    }

    #[test]
    fn a_guest_that_hangs_is_given_up_and_one_that_cannot_start_is_told() {
        let mut disk = tempfile::NamedTempFile::new().unwrap();
        let mut hangs = boot_sector();
        hangs[..2].copy_from_slice(&[0xeb, 0xfe]);
        disk.write_all(&hangs).unwrap();
        assert_eq!(run(&qemu(), "tcg", "max", disk.path(), Duration::from_secs(2)).unwrap(), Answer::Silent);
        let Answer::Failed(words) = run(&qemu(), "nonsense", "max", disk.path(), Duration::from_secs(60)).unwrap() else {
            panic!("an accelerator that does not exist ran a guest");
        };
        assert!(words.contains("nonsense"), "{words}");
    }

    #[test]
    fn without_the_device_it_is_tcg_and_said() {
        let state = tempfile::tempdir().unwrap();
        let choice = kept(&qemu(), Path::new("/nonexistent/kvm"), state.path());
        // Another test of this process may have probed the real device; then its result is the process's.
        if let Ok(Choice { accelerator: Accelerator::Tcg, words }) = choice {
            assert!(words.contains("because "), "{words}");
        }
        assert_eq!(usable(Path::new("/nonexistent/kvm")), Err("there is no /nonexistent/kvm".into()));
        let chosen = choose(&qemu(), Wanted::Tcg, state.path()).unwrap();
        assert_eq!(chosen.accelerator, Accelerator::Tcg);
    }

    /// Whatever this machine's /dev/kvm is: the choice is KVM exactly when a guest runs with it, and it comes in time.
    #[test]
    fn the_choice_is_what_a_guest_shows() {
        let state = tempfile::tempdir().unwrap();
        let choice = choose(&qemu(), Wanted::Auto, state.path()).unwrap();
        let mut disk = tempfile::NamedTempFile::new().unwrap();
        disk.write_all(&boot_sector()).unwrap();
        let works = run(&qemu(), "kvm", "host", disk.path(), PROBE).unwrap() == Answer::Ran;
        assert_eq!(choice.accelerator == Accelerator::Kvm, works, "{choice:?}");
        assert_eq!(choose(&qemu(), Wanted::Kvm, state.path()).is_ok(), works);
        if !works {
            assert!(choice.words.starts_with("TCG (emulation), because "), "{}", choice.words);
        }
    }
}
