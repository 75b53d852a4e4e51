//! Limits of a command: a control group where one may be made, resource limits otherwise.
//!
//! Runs in the unshare process, whose root is the caller outside: it may make groups exactly
//! where the caller may (root; a user with a delegated subtree). Undone by [`Group::drop`];
//! empty groups a killed run left behind are removed by the next one, which knows them by their
//! lock: a group is locked from the moment it is made, also while nobody is in it yet.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::protocol::Limits;

/// Prefix of our control groups.
const PREFIX: &str = "pipeline-step-";

/// The group of what is not limited, in a group that was given to us: `DelegateSubgroup=` of the unit (systemd 254).
const MAIN: &str = "pipeline-main";

/// Where systemd starts what it runs beside a service whose group is given to it, as `ExecReload=` (systemd.exec(5)).
const CONTROL: &str = ".control";

/// The control groups of one command, removed on drop.
#[derive(Debug, Default)]
pub struct Group {
    dirs: Vec<PathBuf>,
    /// One for each folder.
    locks: Vec<OwnedFd>,
    memory: bool,
    processes: bool,
    cpus: bool,
}

impl Group {
    /// Makes the groups `limits` ask for, where it may; what it may not is left to resource limits.
    pub fn make(limits: &Limits, id: &str) -> Self {
        let mut group = Self::default();
        if limits.memory.is_none() && limits.processes.is_none() && limits.millicpus.is_none() {
            return group;
        }
        let own = fs_err::read_to_string("/proc/self/cgroup").unwrap_or_default();
        for line in own.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let (root, files) = match controllers.is_empty() {
                true => (PathBuf::from("/sys/fs/cgroup"), unified(limits)),
                false => (Path::new("/sys/fs/cgroup").join(controllers), separate(limits)),
            };
            if !controllers.is_empty() && !controllers.split(',').any(|name| ["memory", "pids", "cpu"].contains(&name)) {
                continue;
            }
            let above = above(&root.join(path.trim_start_matches('/')));
            if controllers.is_empty() && limits.kept {
                make_room(&above);
            }
            remove_empty(&above);
            let dir = above.join(format!("{PREFIX}{id}"));
            if fs_err::create_dir(&dir).is_err() {
                continue;
            }
            // On a hybrid machine the unified hierarchy is elsewhere, and this an ordinary folder.
            if !dir.join("cgroup.procs").exists() {
                let _ = fs_err::remove_dir(&dir);
                continue;
            }
            let Ok(lock) = lock(&dir) else { continue };
            for (file, value) in files {
                if let Some(value) = value
                    && dir.join(file).exists()
                    && fs_err::OpenOptions::new()
                        .write(true)
                        .open(dir.join(file))
                        .and_then(|mut file| std::io::Write::write_all(&mut file, value.as_bytes()))
                        .is_ok()
                {
                    group.memory |= file.starts_with("memory");
                    group.processes |= file.starts_with("pids");
                    group.cpus |= file.starts_with("cpu");
                    let swap = dir.join(if controllers.is_empty() { "memory.swap.max" } else { "memory.memsw.limit_in_bytes" });
                    if file.starts_with("memory") && swap.exists() {
                        let _ = fs_err::write(&swap, if controllers.is_empty() { "0".into() } else { value });
                    }
                }
            }
            group.dirs.push(dir);
            group.locks.push(lock);
        }
        group
    }

    /// For a program that is kept: which limits are not kept as they are meant, one sentence each.
    pub fn missing(&self, limits: &Limits) -> Vec<String> {
        let words = [
            (
                limits.memory.is_some() && !self.memory,
                "no control group may be made: the limit of memory holds for each process's own data",
            ),
            (
                limits.processes.is_some() && !self.processes,
                "no control group may be made: the limit of processes holds for the user",
            ),
            (limits.millicpus.is_some() && !self.cpus, "no control group may be made: processors are not limited"),
        ];
        words.into_iter().filter(|(missing, _)| *missing && limits.kept).map(|(_, words)| words.to_string()).collect()
    }

    /// Puts the calling process in; between fork and exec.
    pub fn enter(&self) -> std::io::Result<()> {
        for dir in &self.dirs {
            let file = rustix::fs::open(
                dir.join("cgroup.procs"),
                rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )?;
            rustix::io::write(&file, b"0")?;
        }
        Ok(())
    }

    /// Sets what no control group covers as resource limits of the calling process.
    pub fn set_rlimits(&self, limits: &Limits) -> std::io::Result<()> {
        for (resource, _, value) in self.rlimits(limits) {
            rustix::process::setrlimit(resource, rustix::process::Rlimit { current: Some(value), maximum: Some(value) })?;
        }
        Ok(())
    }

    /// The resource limits for what no control group covers, with the names an OCI runtime has for them (getrlimit(2));
    /// never above the hard limit that is inherited, which would need a capability.
    pub fn rlimits(&self, limits: &Limits) -> Vec<(rustix::process::Resource, &'static str, u64)> {
        use rustix::process::{Resource, getrlimit};
        let (memory, name) = if limits.kept { (Resource::Data, "RLIMIT_DATA") } else { (Resource::As, "RLIMIT_AS") };
        let wanted = [
            (memory, name, limits.memory.filter(|_| !self.memory)),
            (Resource::Nproc, "RLIMIT_NPROC", limits.processes.filter(|_| !self.processes)),
            (Resource::Fsize, "RLIMIT_FSIZE", limits.file_size),
        ];
        let known = wanted.into_iter().filter_map(|(resource, name, value)| Some((resource, name, value?)));
        known
            .map(|(resource, name, value)| (resource, name, getrlimit(resource).maximum.map_or(value, |hard| hard.min(value))))
            .collect()
    }
}

/// Period of the processor limit in microseconds, the kernel's default.
const PERIOD: u64 = 100_000;

/// Files of the unified hierarchy (kernel documentation, cgroup-v2) and what is written to them.
fn unified(limits: &Limits) -> Vec<(&'static str, Option<String>)> {
    let text = |value: u64| value.to_string();
    vec![
        ("memory.max", limits.memory.map(text)),
        ("pids.max", limits.processes.map(text)),
        ("cpu.max", limits.millicpus.map(|millis| format!("{} {PERIOD}", quota(millis)))),
    ]
}

/// The same where each controller has a hierarchy of its own (cgroup-v1).
fn separate(limits: &Limits) -> Vec<(&'static str, Option<String>)> {
    let text = |value: u64| value.to_string();
    vec![
        ("memory.limit_in_bytes", limits.memory.map(text)),
        ("pids.max", limits.processes.map(text)),
        ("cpu.cfs_quota_us", limits.millicpus.map(|millis| text(quota(millis)))),
    ]
}

/// Microseconds of a period; the kernel takes no less than a millisecond.
fn quota(millis: u64) -> u64 {
    (millis * PERIOD / 1000).max(1000)
}

/// Where groups are made: this process's own, or the one above when systemd put it below.
fn above(own: &Path) -> PathBuf {
    let is_below = own.file_name().is_some_and(|name| name == MAIN || name == CONTROL);
    if is_below { own.parent().unwrap_or(own).into() } else { own.into() }
}

/// A group of the unified hierarchy gives its controllers to groups below only while no process is in it itself, and while it
/// does takes none (kernel documentation, cgroup-v2, "No Internal Process Constraint"). So a group that systemd gave us
/// (`Delegate=`, of which it leaves a mark) gives them only where systemd starts the service in a group below: else the service
/// could not be started again while an instance runs.
fn make_room(own: &Path) {
    let is_ours = ["user.delegate", "trusted.delegate"]
        .iter()
        .any(|name| xattr::get(own, name).is_ok_and(|value| value.as_deref() == Some(b"1".as_slice())));
    if is_ours {
        give_controllers(own);
    }
}

/// Gives the controllers of a group to those below, where there is one for what is not limited.
fn give_controllers(own: &Path) {
    if !own.join(MAIN).join("cgroup.procs").exists() {
        return;
    }
    for controller in ["+memory", "+pids", "+cpu"] {
        // Whether they are there is seen where a limit is set.
        let _ = fs_err::OpenOptions::new()
            .write(true)
            .open(own.join("cgroup.subtree_control"))
            .and_then(|mut file| std::io::Write::write_all(&mut file, controller.as_bytes()));
    }
}

/// Removes groups that killed programs left beside this process's own.
pub fn sweep() {
    for line in fs_err::read_to_string("/proc/self/cgroup").unwrap_or_default().lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        remove_empty(&above(&Path::new("/sys/fs/cgroup").join(controllers).join(path.trim_start_matches('/'))));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for dir in &self.dirs {
            // The group empties a moment after its last process is reaped.
            for _ in 0..50 {
                if rustix::fs::unlinkat(rustix::fs::CWD, dir, rustix::fs::AtFlags::REMOVEDIR).is_ok() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        }
    }
}

/// Removes our groups that hold nothing any more; one that is in use refuses.
fn remove_empty(above: &Path) {
    let Ok(entries) = fs_err::read_dir(above) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let Ok(_lock) = lock(&entry.path()) else { continue };
            let _ = rustix::fs::unlinkat(rustix::fs::CWD, entry.path(), rustix::fs::AtFlags::REMOVEDIR);
        }
    }
}

/// The lock of a group, unless somebody else has it.
fn lock(dir: &Path) -> std::io::Result<OwnedFd> {
    let fd = rustix::fs::open(
        dir,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    rustix::fs::flock(&fd, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_what_the_kernel_takes() {
        let limits = Limits { memory: Some(5), processes: Some(7), millicpus: Some(1500), ..Limits::default() };
        let text = |name, value: &str| (name, Some(value.to_string()));
        assert_eq!(unified(&limits), [text("memory.max", "5"), text("pids.max", "7"), text("cpu.max", "150000 100000")]);
        assert_eq!(
            separate(&limits),
            [text("memory.limit_in_bytes", "5"), text("pids.max", "7"), text("cpu.cfs_quota_us", "150000")]
        );
        assert_eq!(quota(1), 1000);
    }

    #[test]
    fn a_group_is_not_made_below_the_one_of_what_is_not_limited() {
        for (own, expected) in [("/a/b", "/a/b"), ("/a/b/pipeline-main", "/a/b"), ("/a/b/.control", "/a/b")] {
            assert_eq!(above(Path::new(own)), Path::new(expected));
        }
    }

    #[test]
    fn controllers_are_given_where_systemd_starts_the_service_in_a_group_below() {
        let own = tempfile::tempdir().unwrap();
        let control = own.path().join("cgroup.subtree_control");
        let read = || fs_err::read_to_string(&control).unwrap();
        fs_err::write(&control, "").unwrap();
        give_controllers(own.path());
        assert_eq!(read(), "");
        fs_err::create_dir(own.path().join(MAIN)).unwrap();
        fs_err::write(own.path().join(MAIN).join("cgroup.procs"), "").unwrap();
        // Without the mark nothing is touched.
        make_room(own.path());
        assert_eq!(read(), "");
        give_controllers(own.path());
        // The file of this test keeps what is written last; +cpu overwrites the start of +pids, and that of +memory.
        assert!(read().starts_with("+cpu"));
    }

    #[test]
    fn what_no_group_covers_is_told_for_what_is_kept() {
        let limits = Limits { memory: Some(1), millicpus: Some(1), kept: true, ..Limits::default() };
        let told = Group::default().missing(&limits);
        assert_eq!(told.len(), 2);
        assert!(told[0].contains("memory") && told[1].contains("processors"), "{told:?}");
        assert!(Group::default().missing(&Limits { kept: false, ..limits }).is_empty());
        let names: Vec<_> = Group::default().rlimits(&limits).into_iter().map(|(_, name, value)| (name, value)).collect();
        assert_eq!(names, [("RLIMIT_DATA", 1)]);
    }
}
