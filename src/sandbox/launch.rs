//! Runs one command on a stack of trees, inside the unshare process.
//!
//! Mounts the overlay and what goes on it, starts bubblewrap (root of the tree; 3.5 ms) or runc
//! (any other user of the tree, since bubblewrap cannot change to one; 22 ms), forwards output,
//! signals and connections, and unmounts. The mounts are seen in this mount namespace only.

use std::ffi::CString;
use std::io::Read as _;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::json;

use super::beside::{self, Beside};
use super::limits::Group;
use super::protocol::{Channel, Event, Exit, Frame, Mount, Network, Request, RunSpec, parse};
use crate::cmd::Cmd;
use crate::error::Problem;
use crate::fault;

/// How long a loopback connection may take; beyond it the program does not listen.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Output read at once.
const OUTPUT: usize = 64 << 10;
/// What a command may do as root of the tree: Docker's default set.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Runs `spec` to its end. `stdio` holds standard input, output and error when they are passed.
pub fn run(spec: &RunSpec, channel: &Channel, stdio: Vec<OwnedFd>) -> Result<Exit> {
    let mounted = Mounted::mount(spec)?;
    let group = Group::make(&spec.limits, &name_of(spec));
    let user = User::resolve(&spec.user, &mounted.root)?;
    if spec.program {
        check_program(spec, &mounted.root)?;
    }
    let command = if user.uid == 0 && user.gid == 0 && !spec.program {
        bubblewrap(spec, &mounted)
    } else {
        runc(spec, &mounted, &user, &group)?
    };
    for missing in group.missing(&spec.limits) {
        channel.send(&Event::Note(missing), &[])?;
    }
    let mut child = spawn(spec, command, stdio, group)?;
    follow(spec, channel, &mut child)
}

/// Refuses a program that is not in the tree: runc's own exit status would pass for the program's.
/// One below a mount is not looked for.
fn check_program(spec: &RunSpec, root: &Path) -> Result<()> {
    let name = spec.argv.first().context("a command")?;
    let path = spec.env.iter().find(|(key, _)| key == "PATH").map_or("", |(_, value)| value.as_str());
    let places: Vec<PathBuf> = match name.contains('/') {
        true => vec![Path::new(&spec.cwd).join(name)],
        false => path.split(':').map(|dir| Path::new(&spec.cwd).join(dir).join(name)).collect(),
    };
    let is_mounted = |place: &Path| {
        spec.mounts.iter().any(|mount| match mount {
            Mount::Bind { target, .. } | Mount::Tmpfs { target } => place.starts_with(target),
            Mount::Overlay { .. } => false,
        })
    };
    let top = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open `{}`", root.display()))?;
    let is_program = |place: &Path| {
        let file = rustix::fs::openat2(
            &top,
            place,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        );
        file.and_then(rustix::fs::fstat)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_mode & 0o111 != 0)
    };
    if places.iter().any(|place| is_mounted(place) || is_program(place)) {
        return Ok(());
    }
    Err(Problem::failed(format!("the image has no program `{name}`"))
        .hint("write its path, or look at `PATH` in `pipeline artifact show`")
        .into())
}

/// The mounts of one command, undone in reverse order.
struct Mounted {
    root: PathBuf,
    points: Vec<PathBuf>,
}

impl Mounted {
    fn mount(spec: &RunSpec) -> Result<Self> {
        let root = spec.work.join("root");
        fs_err::create_dir_all(&root)?;
        let mut mounted = Self { root: root.clone(), points: Vec::new() };
        let scratch = spec.work.join("overlay");
        mounted.overlay(&spec.lowers, Some(&spec.upper), &scratch, &root)?;
        let secrets = spec.work.join("secrets");
        if !spec.secrets.is_empty() {
            fs_err::create_dir_all(&secrets)?;
            let options = CString::new("mode=0700,size=16m")?;
            fault::point("mount secrets");
            rustix::mount::mount(
                "tmpfs",
                &secrets,
                "tmpfs",
                MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
                options.as_c_str(),
            )
            .context("cannot mount a tmpfs for the secrets")?;
            mounted.points.push(secrets.clone());
            for (name, value) in &spec.secrets {
                let path = secrets.join(name);
                fs_err::write(&path, value)?;
                if spec.program {
                    fs_err::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o400))?;
                }
            }
        }
        for mount in &spec.mounts {
            if let Mount::Overlay { lower, scratch, target } = mount {
                fs_err::create_dir_all(scratch.join("upper"))?;
                fs_err::create_dir_all(target)?;
                mounted.overlay(std::slice::from_ref(lower), Some(&scratch.join("upper")), &scratch.join("overlay"), target)?;
            }
        }
        Ok(mounted)
    }

    /// Mounts `lowers` (bottom first) under `upper` at `target`. `scratch` gets the work folder
    /// and short links to the layers: mount(2) takes one page of options.
    fn overlay(&mut self, lowers: &[PathBuf], upper: Option<&Path>, scratch: &Path, target: &Path) -> Result<()> {
        let empty = scratch.join("empty");
        fs_err::create_dir_all(&empty)?;
        fs_err::create_dir_all(scratch.join("work"))?;
        // The mark of an earlier volatile mount, as before the shell in a failed step: what it warns of
        // is a crash of the machine in between (kernel documentation, overlayfs, "Volatile mount").
        let mark = scratch.join("work/work/incompat");
        if mark.symlink_metadata().is_ok() {
            fs_err::remove_dir_all(&mark)?;
        }
        let mut names = Vec::new();
        let mut link = |name: String, to: &Path| -> Result<()> {
            let path = scratch.join(&name);
            remove_if_there(&path)?;
            fs_err::os::unix::fs::symlink(to, path)?;
            names.push(name);
            Ok(())
        };
        for (index, lower) in lowers.iter().enumerate().rev() {
            link(index.to_string(), lower)?;
        }
        if names.is_empty() || (upper.is_none() && names.len() < 2) {
            names.push("empty".into());
        }
        // volatile: a step that is not finished is thrown away, and a finished one is packed into a
        // blob that is synced; without it every unmount syncs the whole file system.
        let mut options = format!("userxattr,volatile,lowerdir={}", names.join(":"));
        if let Some(upper) = upper {
            let path = scratch.join("upper-link");
            remove_if_there(&path)?;
            fs_err::os::unix::fs::symlink(upper, path)?;
            options.push_str(",upperdir=upper-link,workdir=work");
        }
        let here = std::env::current_dir().context("the current folder")?;
        rustix::process::chdir(scratch).with_context(|| format!("cannot enter `{}`", scratch.display()))?;
        let options = CString::new(options)?;
        fault::point("mount overlay");
        let result = rustix::mount::mount("overlay", target, "overlay", MountFlags::empty(), options.as_c_str());
        rustix::process::chdir(&here).context("cannot go back to the current folder")?;
        result.map_err(|error| {
            Problem::failed(format!("the overlay at `{}` is refused: {error}", target.display()))
                .hint("overlayfs in a user namespace needs Linux 5.11, and a file system with user xattrs (ext4, xfs, btrfs, tmpfs since 6.6) that is not itself an overlay; `--root DIR` moves the store")
        })?;
        self.points.push(target.to_path_buf());
        Ok(())
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    match fs_err::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for point in self.points.iter().rev() {
            let _ = rustix::mount::unmount(point, UnmountFlags::DETACH);
        }
    }
}

/// Whom a command runs as, in the ids of the tree.
#[derive(Debug, PartialEq, Eq)]
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    home: String,
}

impl User {
    /// `USER`, `USER:GROUP`, names or numbers, as an image's configuration has them (OCI image
    /// specification, "config.User"): without a group the user's own from /etc/passwd, else 0.
    fn resolve(text: &str, root: &Path) -> Result<Self> {
        if text.is_empty() {
            return Ok(Self { uid: 0, gid: 0, groups: vec![], home: "/root".into() });
        }
        let (name, group) = text.split_once(':').map_or((text, None), |(name, group)| (name, Some(group)));
        let read = |file: &str| {
            fs_err::read(root.join("etc").join(file))
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
                .unwrap_or_default()
        };
        let passwd = read("passwd");
        let groups = read("group");
        let row = passwd
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .find(|row| row.len() >= 6 && (row[0] == name || row[2] == name));
        let uid = match name.parse() {
            Ok(uid) => uid,
            Err(_) => row.as_ref().and_then(|row| row[2].parse().ok()).ok_or_else(|| {
                Problem::failed(format!("the image has no user `{name}`"))
                    .hint("write `image.user` as UID or UID:GID, or add the user in a configure step")
            })?,
        };
        let gid = match group {
            Some(group) => match group.parse() {
                Ok(gid) => gid,
                Err(_) => groups
                    .lines()
                    .map(|line| line.split(':').collect::<Vec<_>>())
                    .find(|row| row.len() >= 3 && row[0] == group)
                    .and_then(|row| row[2].parse().ok())
                    .ok_or_else(|| {
                        Problem::failed(format!("the image has no group `{group}`")).hint("write `image.user` as UID:GID")
                    })?,
            },
            None => row.as_ref().and_then(|row| row[3].parse().ok()).unwrap_or(0),
        };
        let login = row.as_ref().map_or(name, |row| row[0]);
        let more = groups
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .filter(|row| row.len() >= 4 && row[3].split(',').any(|member| member == login))
            .filter_map(|row| row[2].parse().ok())
            .filter(|_| group.is_none())
            .collect();
        let home = row.as_ref().map_or("/", |row| row[5]).to_string();
        Ok(Self { uid, gid, groups: more, home })
    }
}

/// The program's path on this machine: the command's own `PATH` is the tree's.
pub(super) fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    crate::cmd::find(name, &path).unwrap_or_else(|| name.into())
}

/// User and group id of an image's user, by the topmost /etc/passwd of its layers (bottom first).
pub fn ids(user: &str, lowers: &[PathBuf]) -> Result<(u32, u32)> {
    let root = lowers.iter().rev().find(|lower| lower.join("etc/passwd").is_file()).cloned().unwrap_or_default();
    User::resolve(user, &root).map(|user| (user.uid, user.gid))
}

fn bubblewrap(spec: &RunSpec, mounted: &Mounted) -> Cmd {
    let mut cmd = Cmd::new(program("bwrap")).env_clear();
    cmd = cmd.arg("--bind").arg(&mounted.root).arg("/");
    cmd = cmd.args(["--dev", "/dev", "--proc", "/proc", "--perms", "0755", "--tmpfs", "/run"]);
    if spec.read_only {
        cmd = cmd.args(["--perms", "1777", "--tmpfs", "/tmp"]);
    }
    for mount in &spec.mounts {
        match mount {
            Mount::Bind { source, target, writable } => {
                cmd = cmd.arg(if *writable { "--bind" } else { "--ro-bind" }).arg(source).arg(target)
            }
            Mount::Tmpfs { target } => cmd = cmd.args(["--perms", "1777", "--tmpfs"]).arg(target),
            Mount::Overlay { .. } => {}
        }
    }
    if !spec.secrets.is_empty() {
        cmd = cmd.arg("--ro-bind").arg(spec.work.join("secrets")).arg("/run/secrets");
    }
    if spec.read_only {
        cmd = cmd.args(["--remount-ro", "/"]);
    }
    cmd = cmd.args([
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--hostname",
        "pipeline",
        "--die-with-parent",
        "--cap-drop",
        "ALL",
    ]);
    for capability in CAPABILITIES {
        cmd = cmd.args(["--cap-add", capability]);
    }
    if spec.network == Network::None {
        cmd = cmd.arg("--unshare-net");
    }
    if !spec.passed_stdio {
        cmd = cmd.arg("--new-session");
    }
    cmd = cmd.args(["--chdir", &spec.cwd, "--"]).args(&spec.argv);
    for (key, value) in &spec.env {
        cmd = cmd.env(key, value);
    }
    if !spec.env.iter().any(|(key, _)| key == "HOME") {
        cmd = cmd.env("HOME", "/root");
    }
    cmd
}

/// Names what a command has outside of its namespaces: runc and the control groups of all runs of
/// this machine share one room, and process ids are of a namespace.
pub(super) fn name_of(spec: &RunSpec) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    crate::oci::digest::Digest::of(spec.work.as_os_str().as_bytes()).short()
}

/// An OCI runtime bundle (runtime specification 1.0) and the command that runs it. runc is asked
/// for no control groups and no user namespace: it is in one already.
fn runc(spec: &RunSpec, mounted: &Mounted, user: &User, group: &Group) -> Result<Cmd> {
    let bundle = spec.work.join("bundle");
    let state = spec.work.join("runc");
    fs_err::create_dir_all(&bundle)?;
    fs_err::create_dir_all(&state)?;
    let mut mounts = vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc"}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]}),
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
        json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=0755", "size=65536k"]}),
    ];
    if spec.read_only {
        mounts.push(
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}),
        );
    }
    for mount in &spec.mounts {
        match mount {
            Mount::Bind { source, target, writable } => {
                let mut options = vec!["rbind", if *writable { "rw" } else { "ro" }];
                options.extend(locked(source));
                mounts.push(json!({"destination": target, "type": "bind", "source": source, "options": options}));
            }
            Mount::Tmpfs { target } => mounts.push(
                json!({"destination": target, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}),
            ),
            Mount::Overlay { .. } => {}
        }
    }
    if !spec.secrets.is_empty() {
        let secrets = spec.work.join("secrets");
        for path in std::iter::once(secrets.clone()).chain(spec.secrets.iter().map(|(name, _)| secrets.join(name))) {
            let owner = (Some(rustix::fs::Uid::from_raw(user.uid)), Some(rustix::fs::Gid::from_raw(user.gid)));
            rustix::fs::chown(&path, owner.0, owner.1).with_context(|| format!("cannot hand over `{}`", path.display()))?;
        }
        mounts.push(json!({"destination": "/run/secrets", "type": "bind", "source": secrets, "options": ["bind", "ro"]}));
    }
    let mut env: Vec<String> = spec.env.iter().map(|(key, value)| format!("{key}={value}")).collect();
    if !spec.env.iter().any(|(key, _)| key == "HOME") {
        env.push(format!("HOME={}", user.home));
    }
    let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "ipc"}), json!({"type": "uts"}), json!({"type": "mount"})];
    if spec.network == Network::None {
        namespaces.push(json!({"type": "network"}));
    }
    // runc itself has threads and memory of its own, more than some programs are given.
    let rlimits: Vec<_> = match spec.limits.kept {
        true => group.rlimits(&spec.limits),
        false => Vec::new(),
    };
    let rlimits: Vec<_> = rlimits.iter().map(|(_, name, value)| json!({"type": name, "soft": value, "hard": value})).collect();
    let held: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.groups},
            "args": spec.argv, "env": env, "cwd": spec.cwd, "noNewPrivileges": true, "rlimits": rlimits,
            "capabilities": {"bounding": CAPABILITIES, "effective": held, "inheritable": [], "permitted": held, "ambient": []},
        },
        "root": {"path": mounted.root, "readonly": spec.read_only},
        "hostname": "pipeline",
        "mounts": mounts,
        "linux": {
            "namespaces": namespaces,
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi"],
            "readonlyPaths": ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    fs_err::write(bundle.join("config.json"), serde_json::to_vec(&config)?)?;
    Ok(Cmd::new(program("runc"))
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .arg("--root")
        .arg(&state)
        .args(["run", "--bundle"])
        .arg(&bundle)
        .arg(format!("pipeline-{}", name_of(spec))))
}

/// What a bind mount of `source` has to say to be made read-only: flags of a mount from a user namespace above are locked, and
/// a remount that does not name them is refused (mount_namespaces(7)). bubblewrap does this by itself.
fn locked(source: &Path) -> Vec<&'static str> {
    rustix::fs::statvfs(source).map_or_else(|_| Vec::new(), |found| options(found.f_flag))
}

fn options(flags: StatVfsMountFlags) -> Vec<&'static str> {
    use StatVfsMountFlags as Flags;
    let names = [(Flags::NOSUID, "nosuid"), (Flags::NODEV, "nodev"), (Flags::NOEXEC, "noexec")];
    names.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| name).collect()
}

fn spawn(spec: &RunSpec, command: Cmd, stdio: Vec<OwnedFd>, group: Group) -> Result<Running> {
    let program = command.line();
    let mut command: Command = command.into_command();
    let mut output = None;
    if spec.passed_stdio {
        let mut stdio = stdio.into_iter();
        let mut next = || stdio.next().map(Stdio::from).context("three file descriptors");
        command.stdin(next()?).stdout(next()?).stderr(next()?);
    } else {
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        command.stdout(writer.try_clone()?).stderr(writer);
        output = Some(reader);
    }
    let group = std::sync::Arc::new(group);
    limit(&mut command, spec, &group);
    if !program_is_bubblewrap(&program) {
        freeze(&mut command);
    }
    let child = command.spawn().map_err(|error| {
        let name = program.split(' ').next().unwrap_or_default().to_string();
        if error.kind() == std::io::ErrorKind::NotFound {
            let package = if name == "bwrap" { "bubblewrap" } else { &name };
            anyhow::Error::from(Problem::failed(format!("`{name}` is not installed")).hint(format!("apt-get install {package}")))
        } else {
            anyhow::Error::new(error).context(format!("cannot start `{name}`"))
        }
    })?;
    drop(command);
    Ok(Running { child, output, group, beside: Vec::new() })
}

/// Puts a command into the control groups of `spec` and under its resource limits; those of a program that is kept
/// are runc's to set.
pub(super) fn limit(command: &mut Command, spec: &RunSpec, group: &std::sync::Arc<Group>) {
    let (limits, group) = (spec.limits.clone(), group.clone());
    before_exec(command, move || {
        group.enter()?;
        if limits.kept { Ok(()) } else { group.set_rlimits(&limits) }
    });
}

fn program_is_bubblewrap(line: &str) -> bool {
    line.split(' ').next().is_some_and(|program| program.ends_with("bwrap"))
}

/// [`freeze_control_groups`] for a command that is runc.
pub(super) fn freeze(command: &mut Command) {
    before_exec(command, freeze_control_groups);
}

/// Shows runc the control groups read-only, in a mount namespace of its own: as root it would make
/// groups, and leave them behind when it is killed. Then it goes on without any, as it does for an
/// ordinary user. Before Linux 5.12 nothing can do that, and it makes its groups.
#[expect(unsafe_code, reason = "unshare and mount_setattr(2), which rustix does not have")]
fn freeze_control_groups() -> std::io::Result<()> {
    /// fcntl.h
    const AT_RECURSIVE: libc::c_int = 0x8000;
    /// linux/mount.h, `struct mount_attr`: flags to set (read-only), flags to clear, propagation, user namespace.
    const READ_ONLY: [u64; 4] = [1, 0, 0, 0];
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) != 0 {
            return Err(std::io::Error::last_os_error());
        }
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/sys/fs/cgroup".as_ptr(),
            AT_RECURSIVE,
            READ_ONLY.as_ptr(),
            size_of_val(&READ_ONLY),
        );
    }
    Ok(())
}

#[expect(unsafe_code, reason = "pre_exec: system calls only, in a single-threaded process")]
fn before_exec(command: &mut Command, set: impl FnMut() -> std::io::Result<()> + Send + Sync + 'static) {
    unsafe {
        command.pre_exec(set);
    }
}

struct Running {
    child: Child,
    output: Option<std::io::PipeReader>,
    group: std::sync::Arc<Group>,
    /// Commands that run beside it.
    beside: Vec<Beside>,
}

/// Forwards output, signals and connections until the command has ended and its output is read.
fn follow(spec: &RunSpec, channel: &Channel, running: &mut Running) -> Result<Exit> {
    let pid = rustix::process::Pid::from_child(&running.child);
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).context("cannot watch the command")?;
    let deadline = spec.timeout.map(|timeout| Instant::now() + timeout);
    let mut buffer = vec![0; OUTPUT];
    let mut timed_out = false;
    let mut ended = false;
    while !(ended && running.output.is_none()) {
        let next = deadline.filter(|_| !timed_out).into_iter().chain(running.beside.iter().filter_map(Beside::deadline)).min();
        let left = next.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        // After the end only what is in the pipe still counts: a stray child may hold it open.
        let wait = if ended { Some(Duration::from_millis(20)) } else { left };
        let timeout = wait.map(|wait| Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        });
        let (ready_channel, ready_exit, ready_output) = {
            let watch = if ended { PollFlags::empty() } else { PollFlags::IN };
            let mut fds = vec![PollFd::new(&channel.0, watch), PollFd::new(&pidfd, watch)];
            if let Some(output) = &running.output {
                fds.push(PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN));
            }
            fds.extend(running.beside.iter().map(|beside| PollFd::from_borrowed_fd(beside.as_fd(), watch)));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error).context("cannot wait for the command"),
            }
            let is = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            (is(0) && !ended, is(1) && !ended, running.output.is_some() && is(2))
        };
        beside::look(&mut running.beside, channel)?;
        if ended && !ready_output {
            break;
        }
        if ready_output && let Some(output) = &mut running.output {
            match output.read(&mut buffer)? {
                0 => running.output = None,
                read => channel.send_output(&buffer[..read])?,
            }
        }
        if ready_channel {
            control(spec, channel, running)?;
        }
        if ready_exit {
            ended = true;
        }
        if !timed_out && deadline.is_some_and(|deadline| Instant::now() >= deadline) && !ended {
            timed_out = true;
            kill_tree(running);
        }
    }
    let status = running.child.wait().context("cannot wait for the command")?;
    // The end of the program is the end of its namespaces.
    beside::end_all(&mut running.beside, channel)?;
    reap();
    Ok(match (status.code(), status.signal()) {
        _ if timed_out => Exit::TimedOut,
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap_or(0)),
    })
}

/// Ends the command and everything it started: everything else in this process namespace.
fn kill_tree(running: &mut Running) {
    let _ = running.child.kill();
    // -1 from the init of a process namespace reaches every process in it but the init itself.
    #[expect(unsafe_code, reason = "kill(-1) has no safe wrapper; this process is the namespace's init")]
    unsafe {
        if libc::getpid() == 1 {
            libc::kill(-1, libc::SIGKILL);
        }
    }
}

/// Collects orphans, which are this init's children.
fn reap() {
    while let Ok(Some(_)) = rustix::process::waitpid(None, rustix::process::WaitOptions::NOHANG) {}
}

fn control(spec: &RunSpec, channel: &Channel, running: &mut Running) -> Result<()> {
    let Some(frame) = channel.receive()? else {
        kill_tree(running);
        anyhow::bail!("the parent is gone");
    };
    let Frame::Json(payload, fds) = frame else { return Ok(()) };
    match parse::<Request>(&payload)? {
        Request::Signal(libc::SIGKILL) => kill_tree(running),
        Request::Signal(signal) => {
            let pid = rustix::process::Pid::from_child(&running.child);
            if let Some(signal) = rustix::process::Signal::from_named_raw(signal) {
                let _ = rustix::process::kill_process(pid, signal);
            }
        }
        Request::Connect { port } => {
            let address = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => channel.send(&Event::Connected, &[stream.as_fd()])?,
                Err(error) => channel.send(&Event::Refused(error.to_string()), &[])?,
            }
        }
        Request::Check { argv } => {
            let state = spec.work.join("runc");
            let check = Cmd::new(program("runc"))
                .env_clear()
                .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
                .arg("--root")
                .arg(state)
                .arg("exec")
                .arg(format!("pipeline-{}", name_of(spec)))
                .args(argv);
            let good = check.output().is_ok_and(|output| output.status.success());
            channel.send(&Event::Checked(good), &[])?;
        }
        Request::Sockets { count } => beside::hand_over_sockets(channel, count)?,
        Request::Beside(asked) => match Beside::start(spec, &running.group, &asked, fds) {
            Ok(beside) => running.beside.push(beside),
            Err(error) => channel.send(&Event::BesideEnded { id: asked.id, result: Err(format!("{error:#}")) }, &[])?,
        },
        Request::SignalBeside { id, signal } => {
            if let Some(beside) = running.beside.iter_mut().find(|beside| beside.id == id) {
                beside.signal(signal);
            }
        }
        Request::Run(_) | Request::Call { .. } => channel.send(&Event::Note("busy".into()), &[])?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_names_or_numbers() {
        let root = tempfile::tempdir().unwrap();
        fs_err::create_dir(root.path().join("etc")).unwrap();
        fs_err::write(root.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh\napp:x:1001:7::/srv:/bin/sh\n").unwrap();
        fs_err::write(root.path().join("etc/group"), "root:x:0:\nstaff:x:50:app\n").unwrap();
        let user = |uid, gid, groups: &[u32], home: &str| User { uid, gid, groups: groups.to_vec(), home: home.into() };
        let cases = [
            ("", user(0, 0, &[], "/root")),
            ("app", user(1001, 7, &[50], "/srv")),
            ("app:staff", user(1001, 50, &[], "/srv")),
            ("1001:0", user(1001, 0, &[], "/srv")),
            ("4711", user(4711, 0, &[], "/")),
        ];
        for (text, expected) in cases {
            assert_eq!(User::resolve(text, root.path()).unwrap(), expected, "{text}");
        }
        assert_eq!(User::resolve("nobody", root.path()).unwrap_err().to_string(), "the image has no user `nobody`");
    }

    #[test]
    fn a_bind_mount_keeps_the_flags_of_where_it_comes_from() {
        let flags = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::RDONLY;
        assert_eq!(options(flags), ["nosuid", "nodev"]);
        assert!(locked(Path::new("/nonexistent")).is_empty());
    }
}
