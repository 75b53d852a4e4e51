//! Checks of the kernel's settings and of what confines us: sysctls, AppArmor, containers.

use super::{Check, ProbeEnv, State, read};

/// Overlays with `userxattr` in user namespaces: Linux 5.11.
const KERNEL: (u32, u32) = (5, 11);

pub(super) fn version(env: &ProbeEnv) -> Check {
    const NAME: &str = "kernel";
    let release = read(&env.proc.join("sys/kernel/osrelease")).unwrap_or_default();
    let number = |text: Option<&str>| text.and_then(|text| text.split(|c: char| !c.is_ascii_digit()).next()?.parse::<u32>().ok());
    let mut parts = release.split('.');
    match (number(parts.next()), number(parts.next())) {
        (Some(major), Some(minor)) if (major, minor) >= KERNEL => Check::ok(NAME, format!("Linux {release}")),
        (Some(_), Some(_)) => Check::bad(
            NAME,
            State::Refused,
            format!("Linux {release} has no overlays in user namespaces"),
            format!("use Linux {}.{} or newer (Debian 12 has 6.1)", KERNEL.0, KERNEL.1),
        ),
        _ => Check::bad(NAME, State::Warning, "the kernel's version cannot be read", "make `/proc` visible"),
    }
}

pub(super) fn user_namespaces(env: &ProbeEnv) -> Check {
    const NAME: &str = "user namespaces";
    let file = env.proc.join("sys/user/max_user_namespaces");
    match read(&file).map(|text| text.parse::<u64>()) {
        Some(Ok(0)) => {
            Check::bad(NAME, State::Refused, "user.max_user_namespaces is 0", sysctl("user.max_user_namespaces=65536"))
        }
        Some(Ok(limit)) => Check::ok(NAME, format!("up to {limit}")),
        _ => Check::bad(
            NAME,
            State::Refused,
            "this kernel has no user namespaces",
            "use a kernel with CONFIG_USER_NS, as Debian's are",
        ),
    }
}

/// Debian's own switch, on by default since Debian 11.
pub(super) fn unprivileged(env: &ProbeEnv) -> Check {
    const NAME: &str = "unprivileged user namespaces";
    match read(&env.proc.join("sys/kernel/unprivileged_userns_clone")).as_deref() {
        Some("0") if !env.is_root() => Check::bad(
            NAME,
            State::Refused,
            "kernel.unprivileged_userns_clone is 0: only root may make user namespaces",
            sysctl("kernel.unprivileged_userns_clone=1"),
        ),
        Some("0") => Check::ok(NAME, "not allowed, and root does not need it"),
        _ => Check::ok(NAME, "allowed"),
    }
}

/// Ubuntu 23.10 and later: the namespace is made and everything inside is refused, unless a profile allows it.
pub(super) fn apparmor(env: &ProbeEnv) -> Check {
    const NAME: &str = "AppArmor";
    let restricted = read(&env.proc.join("sys/kernel/apparmor_restrict_unprivileged_userns")).as_deref() == Some("1");
    if !restricted {
        return Check::ok(NAME, "does not restrict user namespaces");
    }
    if env.is_root() {
        return Check::ok(NAME, "restricts user namespaces, not root's");
    }
    // `pipeline (unconfined)`: a profile of the kind below is attached to this program.
    let label = label(env);
    if label.ends_with("(unconfined)") {
        return Check::ok(NAME, format!("allows user namespaces to this program (profile `{label}`)"));
    }
    let program = env.program.display();
    Check::bad(
        NAME,
        State::Refused,
        "AppArmor refuses user namespaces to programs without a profile (kernel.apparmor_restrict_unprivileged_userns is 1)",
        format!(
            "give this program a profile: `printf 'abi <abi/4.0>,\\ninclude <tunables/global>\\nprofile pipeline {program} flags=(unconfined) {{\\n  userns,\\n}}\\n' | sudo tee /etc/apparmor.d/pipeline && sudo apparmor_parser --replace /etc/apparmor.d/pipeline`; or lift the restriction for all programs: `{}`",
            sysctl("kernel.apparmor_restrict_unprivileged_userns=0")
        ),
    )
}

/// Our AppArmor label, empty where there is no AppArmor.
fn label(env: &ProbeEnv) -> String {
    let files = ["self/attr/apparmor/current", "self/attr/current"];
    files.iter().find_map(|file| read(&env.proc.join(file))).unwrap_or_default().trim_end_matches('\0').to_owned()
}

/// Sets now and at each start.
fn sysctl(setting: &str) -> String {
    format!("sudo sysctl -w {setting} && echo '{setting}' | sudo tee /etc/sysctl.d/90-pipeline.conf")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Engine {
    Docker,
    Podman,
    Other,
}

/// Whose container this is, if it is one.
fn engine(env: &ProbeEnv) -> Option<Engine> {
    if env.top.join("run/.containerenv").exists() {
        return Some(Engine::Podman);
    }
    if env.top.join(".dockerenv").exists() {
        return Some(Engine::Docker);
    }
    let cgroup = read(&env.proc.join("self/cgroup")).unwrap_or_default();
    let environ = fs_err::read(env.proc.join("1/environ")).unwrap_or_default();
    let named = environ.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"container="));
    match named {
        Some(b"podman") => Some(Engine::Podman),
        Some(b"docker") => Some(Engine::Docker),
        Some(_) => Some(Engine::Other),
        None if cgroup.contains("/libpod-") => Some(Engine::Podman),
        None if cgroup.contains("/docker") => Some(Engine::Docker),
        None if ["/kubepods", "/lxc/", "/containerd", "/buildkit"].iter().any(|part| cgroup.contains(part)) => {
            Some(Engine::Other)
        }
        None => None,
    }
}

/// Mounts over parts of `/proc`: while there is one, the kernel refuses a new `/proc` in a user
/// namespace, since it would show what is covered (measured: EPERM).
fn proc_is_masked(env: &ProbeEnv) -> bool {
    let mounts = read(&env.proc.join("self/mountinfo")).unwrap_or_default();
    mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| {
        // Folders made for mounting on are empty for good: the kernel knows that they cover nothing.
        point.starts_with("/proc/") && !["/proc/sys/fs/binfmt_misc", "/proc/fs/nfsd"].contains(&point)
    })
}

/// What a container's confinement has in the way, and the flags of its engine that lift it. No
/// device and no capability is needed: a user namespace brings its own.
pub(super) fn container(env: &ProbeEnv) -> Check {
    const NAME: &str = "container";
    let engine = engine(env);
    let privileged = env.is_root() && env.has_sys_admin();
    let mut why = Vec::new();
    let mut flags = Vec::new();
    let label = label(env);
    let confined = label.ends_with("(enforce)");
    if confined {
        // Docker's profile refuses every mount, even to root with CAP_SYS_ADMIN.
        why.push(format!("the AppArmor profile `{}` refuses mounts", label.trim_end_matches(" (enforce)")));
        flags.push("--security-opt apparmor=unconfined");
    }
    // Docker's filter lets `unshare` and `mount` through for CAP_SYS_ADMIN only; podman's for all.
    let filtered = env.status("Seccomp").as_deref() == Some("2") && !privileged;
    if filtered {
        why.push("a seccomp filter may refuse `unshare` and `mount`".to_owned());
        flags.push("--security-opt seccomp=unconfined");
    }
    let masked = proc_is_masked(env) && !privileged;
    if masked {
        why.push("parts of `/proc` are covered, so a new one cannot be mounted".to_owned());
        flags.push(if engine == Some(Engine::Podman) {
            "--security-opt unmask=ALL"
        } else {
            "--security-opt systempaths=unconfined"
        });
    }
    let place = match engine {
        Some(Engine::Docker) => "in a Docker container",
        Some(Engine::Podman) => "in a podman container",
        Some(Engine::Other) => "in a container",
        None => "not in a container",
    };
    if why.is_empty() {
        return Check::ok(NAME, if engine.is_some() { format!("{place}, nothing in the way") } else { place.to_owned() });
    }
    let detail = format!("{place}: {}", why.join("; "));
    let sure = confined || masked || (filtered && engine == Some(Engine::Docker));
    let state = if sure { State::Refused } else { State::Warning };
    let flags = flags.join(" ");
    Check::bad(
        NAME,
        state,
        detail,
        match engine {
            Some(Engine::Docker) => format!("start the container with `docker run {flags} …`"),
            Some(Engine::Podman) => format!("start the container with `podman run {flags} …`"),
            Some(Engine::Other) => {
                format!("start the container with what Docker calls `{flags}` (in Kubernetes `seccompProfile`, `appArmorProfile` of type Unconfined, `procMount: Unmasked`)")
            }
            None => "start it outside of the service or sandbox that confines it (in a systemd unit: SystemCallFilter=, ProtectProc=, ProtectKernelTunables=)".to_owned(),
        },
    )
}

pub(super) fn overlay(env: &ProbeEnv) -> Check {
    const NAME: &str = "overlayfs";
    let known = read(&env.proc.join("filesystems")).unwrap_or_default();
    if known.lines().any(|line| line.split_whitespace().last() == Some("overlay")) || env.sys.join("module/overlay").exists() {
        return Check::ok(NAME, "known to the kernel");
    }
    Check::bad(
        NAME,
        State::Warning,
        "not loaded; the first mount loads it where the kernel may",
        "sudo modprobe overlay && echo overlay | sudo tee /etc/modules-load.d/pipeline.conf",
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::*;

    #[test]
    fn kernel_versions() {
        for (release, state) in [
            ("6.18.44-fc-v669", State::Ok),
            ("5.11.0", State::Ok),
            ("5.10.0-28-amd64", State::Refused),
            ("4.19.0", State::Refused),
            ("7.0", State::Ok),
            ("odd", State::Warning),
        ] {
            let machine = Machine::new();
            machine.write("proc/sys/kernel/osrelease", release);
            assert_eq!(version(&machine.env).state, state, "{release}");
        }
    }

    #[test]
    fn namespace_sysctls() {
        let machine = Machine::new();
        assert_eq!(user_namespaces(&machine.env), Check::ok("user namespaces", "up to 96365"));
        machine.write("proc/sys/user/max_user_namespaces", "0\n");
        let check = user_namespaces(&machine.env);
        assert_eq!(check.state, State::Refused);
        assert_eq!(
            check.fix.as_deref(),
            Some(
                "sudo sysctl -w user.max_user_namespaces=65536 && echo 'user.max_user_namespaces=65536' | sudo tee /etc/sysctl.d/90-pipeline.conf"
            )
        );
        fs_err::remove_file(machine.env.proc.join("sys/user/max_user_namespaces")).unwrap();
        assert_eq!(user_namespaces(&machine.env).detail, "this kernel has no user namespaces");

        let mut machine = Machine::new();
        for (content, uid, state) in
            [(None, 1000, State::Ok), (Some("1"), 1000, State::Ok), (Some("0"), 1000, State::Refused), (Some("0"), 0, State::Ok)]
        {
            machine.env.uid = uid;
            if let Some(content) = content {
                machine.write("proc/sys/kernel/unprivileged_userns_clone", content);
            }
            assert_eq!(unprivileged(&machine.env).state, state, "{content:?} {uid}");
        }
    }

    #[test]
    fn apparmor_of_ubuntu() {
        let mut machine = Machine::new();
        assert_eq!(apparmor(&machine.env).state, State::Ok);
        machine.write("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1\n");
        let fix = apparmor(&machine.env).fix.unwrap();
        assert!(fix.contains("profile pipeline /usr/local/bin/pipeline flags=(unconfined) {\\n  userns,\\n}"), "{fix}");
        assert!(fix.contains("sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0"), "{fix}");
        machine.write("proc/self/attr/current", "unconfined\n");
        assert_eq!(apparmor(&machine.env).state, State::Refused);
        machine.write("proc/self/attr/current", "pipeline (unconfined)\n");
        assert_eq!(apparmor(&machine.env).state, State::Ok);
        machine.write("proc/self/attr/current", "unconfined\n");
        machine.env.uid = 0;
        assert_eq!(apparmor(&machine.env).state, State::Ok);
    }

    #[test]
    fn the_printed_profile_is_what_printf_makes_of_it() {
        let machine = Machine::new();
        machine.write("proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1");
        let fix = apparmor(&machine.env).fix.unwrap();
        let command = fix.split('`').nth(1).unwrap().split(" | ").next().unwrap();
        let printed = crate::cmd::Cmd::new("sh").args(["-c", command]).text().unwrap();
        assert_eq!(
            printed,
            "abi <abi/4.0>,\ninclude <tunables/global>\nprofile pipeline /usr/local/bin/pipeline flags=(unconfined) {\n  userns,\n}\n"
        );
    }

    const DOCKER_STATUS: &str = "CapEff:\t00000000a80425fb\nNoNewPrivs:\t0\nSeccomp:\t2\n";
    const MASKED: &str = "1 0 0:1 / /proc rw - proc proc rw\n2 1 0:2 /null /proc/keys rw - tmpfs tmpfs rw\n";

    #[test]
    fn a_docker_container_gets_its_flags() {
        let mut machine = Machine::new();
        machine.env.uid = 0;
        machine.write(".dockerenv", "");
        assert_eq!(container(&machine.env), Check::ok("container", "in a Docker container, nothing in the way"));
        machine.write("proc/self/status", DOCKER_STATUS).write("proc/self/mountinfo", MASKED);
        machine.write("proc/self/attr/current", "docker-default (enforce)\n");
        assert_eq!(
            container(&machine.env),
            Check::bad(
                "container",
                State::Refused,
                "in a Docker container: the AppArmor profile `docker-default` refuses mounts; a seccomp filter may refuse `unshare` and `mount`; parts of `/proc` are covered, so a new one cannot be mounted",
                "start the container with `docker run --security-opt apparmor=unconfined --security-opt seccomp=unconfined --security-opt systempaths=unconfined …`",
            )
        );
        // --privileged: all capabilities, no filter.
        machine
            .write("proc/self/status", "CapEff:\t000001ffffffffff\nSeccomp:\t0\n")
            .write("proc/self/attr/current", "unconfined\n");
        assert_eq!(container(&machine.env).state, State::Ok);
    }

    #[test]
    fn other_containers_are_recognised() {
        for (file, text, place, flag) in [
            (
                "run/.containerenv",
                "",
                "in a podman container",
                "podman run --security-opt seccomp=unconfined --security-opt unmask=ALL",
            ),
            ("proc/1/environ", "PATH=/bin\0container=podman\0", "in a podman container", "podman run"),
            (
                "proc/1/environ",
                "container=docker\0",
                "in a Docker container",
                "docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined",
            ),
            ("proc/self/cgroup", "3:cpu:/docker/0123\n", "in a Docker container", "docker run"),
            ("proc/self/cgroup", "0::/kubepods/besteffort\n", "in a container", "procMount: Unmasked"),
            ("proc/1/environ", "container=lxc\0", "in a container", "Unconfined"),
            ("proc/self/cgroup", "0::/system.slice/x.service\n", "not in a container", "systemd unit"),
        ] {
            let machine = Machine::new();
            machine.write("proc/self/status", DOCKER_STATUS).write("proc/self/mountinfo", MASKED).write(file, text);
            let check = container(&machine.env);
            assert!(check.detail.starts_with(&format!("{place}: ")), "{file} {check:?}");
            assert!(check.fix.as_ref().unwrap().contains(flag), "{file} {check:?}");
        }
        // Podman's own filter lets user namespaces through: not certain, so a warning.
        let machine = Machine::new();
        machine.write("proc/self/status", DOCKER_STATUS).write("run/.containerenv", "");
        assert_eq!(container(&machine.env).state, State::Warning);
        assert_eq!(container(&Machine::new().env), Check::ok("container", "not in a container"));
    }

    #[test]
    fn overlay_is_known_or_loadable() {
        let machine = Machine::new();
        assert_eq!(overlay(&machine.env).state, State::Ok);
        machine.write("proc/filesystems", "nodev\tproc\n");
        assert_eq!(overlay(&machine.env).state, State::Warning);
        machine.write("sys/module/overlay/refcnt", "1");
        assert_eq!(overlay(&machine.env).state, State::Ok);
    }
}
