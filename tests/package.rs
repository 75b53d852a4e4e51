//! The Debian package of `make deb`: what is in it, that it is the same twice, and that it installs, upgrades and goes in a
//! throw-away root: this machine's files below an overlay in memory. Witnesses are dpkg, systemd and man.

#![allow(clippy::disallowed_methods, reason = "the tests start the tools that are their witnesses")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use common::repository;

/// Runs `command` and gives its standard output.
fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

/// The package of the program under test, built once, in a folder of its own.
fn package() -> &'static Path {
    static BUILT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let package = build(folder.path());
        (folder, package)
    });
    &built.1
}

/// Builds it, without compression, which takes longer than everything else.
fn build(folder: &Path) -> PathBuf {
    let tool = repository().join("tools/deb");
    let printed = run(Command::new(tool).arg(env!("CARGO_BIN_EXE_pipeline")).arg(folder).arg("none"));
    PathBuf::from(printed.lines().last().unwrap())
}

/// Runs `script` with root's rights in a root that is thrown away: `/package` has the package, and nothing reaches this machine.
fn thrown_away(folder: &Path, script: &str) -> String {
    assert!(rustix::process::geteuid().is_root(), "the package is installed as root: run the tests as root");
    let outer = r#"
        set -eu
        mount -t tmpfs -o size=1g tmpfs "$1"
        mkdir "$1/upper" "$1/work" "$1/root"
        mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
        mkdir -p "$1/root/package"
        mount --bind "$2" "$1/root/package"
        mount -t proc proc "$1/root/proc"
        mount --bind /dev "$1/root/dev"
        mount -t tmpfs tmpfs "$1/root/run"
        mount -t tmpfs tmpfs "$1/root/tmp"
        # What this machine may have of it already.
        rm -rf "$1/root/var/lib/pipeline" "$1/root/usr/bin/pipeline"
        sed -i '/^pipeline:/d' "$1/root/etc/passwd" "$1/root/etc/shadow" "$1/root/etc/group" "$1/root/etc/gshadow" "$1/root/etc/subuid" "$1/root/etc/subgid"
        # No chroot: a process in one may not make user namespaces.
        cd "$1/root"
        mkdir old
        pivot_root . old
        umount --lazy old
        exec sh -euc "$3"
    "#;
    let here = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--propagation", "private", "sh", "-c", outer, "thrown-away"]);
    command.arg(here.path()).arg(folder).arg(script).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
    run(&mut command)
}

#[test]
fn what_is_in_the_package() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (package(), build(folder.path()));
    assert!(fs_err::read(one).unwrap() == fs_err::read(&two).unwrap(), "two packages of one program differ");
    let listed = run(Command::new("dpkg-deb").arg("--contents").arg(one));
    // Mode, owner and name of what is no folder.
    let files: Vec<String> = listed
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| !words[0].starts_with('d'))
        .map(|words| format!("{} {} {}", words[0], words[1], words[5]))
        .collect();
    for (mode, path) in [
        ("-rwxr-xr-x", "usr/bin/pipeline"),
        ("-rw-r--r--", "usr/lib/systemd/system/pipeline.service"),
        ("-rw-r--r--", "usr/lib/systemd/system/pipeline.socket"),
        ("-rw-r--r--", "usr/lib/systemd/system/pipeline-https.socket"),
        ("-rw-r--r--", "usr/lib/sysusers.d/pipeline.conf"),
        ("-rw-r--r--", "usr/lib/tmpfiles.d/pipeline.conf"),
        ("-rw-r--r--", "usr/share/bash-completion/completions/pipeline"),
        ("-rw-r--r--", "usr/share/zsh/vendor-completions/_pipeline"),
        ("-rw-r--r--", "usr/share/fish/vendor_completions.d/pipeline.fish"),
        ("-rw-r--r--", "usr/share/man/man1/pipeline.1.gz"),
        ("-rw-r--r--", "usr/share/doc/pipeline/copyright"),
        ("-rw-r--r--", "usr/share/doc/pipeline/changelog.gz"),
        ("-rw-r--r--", "usr/share/doc/pipeline/README.Debian"),
        ("-rw-r--r--", "usr/share/doc/pipeline/rollout.md"),
    ] {
        let wanted = format!("{mode} root/root ./{path}");
        assert!(files.contains(&wanted), "{wanted} is not in\n{}", files.join("\n"));
    }
    let foreign: Vec<&String> = files.iter().filter(|file| !file.contains(" root/root ./usr/")).collect();
    assert!(foreign.is_empty(), "{foreign:?}");
    let needs = run(Command::new("dpkg-deb").args(["--field"]).arg(one).arg("Depends"));
    for package in ["libc6 (>= 2.", "uidmap", "passwd", "systemd | systemd-standalone-sysusers"] {
        assert!(needs.contains(package), "{needs}");
    }
}

#[test]
fn it_installs_upgrades_and_goes() {
    let package = package();
    let name = package.file_name().unwrap().to_str().unwrap();
    let script = format!(
        r#"
        # Whoever has the largest range is before us.
        echo 'somebody:700000:65536' >>/etc/subuid
        echo 'somebody:700000:65536' >>/etc/subgid
        dpkg --install --force-depends /package/{name} >&2
        echo "version $(pipeline --version)"
        echo "user $(getent passwd pipeline | cut -d: -f1,6,7)"
        echo "subuid $(grep ^pipeline: /etc/subuid)"
        echo "subgid $(grep ^pipeline: /etc/subgid)"
        echo "state $(stat --format '%a %U %G' /var/lib/pipeline)"
        # The pages that the units name, and the program that they start.
        # systemd before 254 does not know one key, and passes over it.
        echo "verified $(systemd-analyze verify --man=no pipeline.service pipeline.socket pipeline-https.socket 2>&1 | grep -v "Unknown key.*'DelegateSubgroup'")"
        # The user's range, under the unit's bounding set.
        capabilities=$(sed -n 's/^CapabilityBoundingSet=//p' /usr/lib/systemd/system/pipeline.service | tr 'A-Z ' 'a-z,' | sed 's/cap_/+/g')
        cd /
        setpriv --reuid=pipeline --regid=pipeline --clear-groups --inh-caps=-all --bounding-set="-all,$capabilities" \
            unshare --user --map-users=auto --map-groups=auto --map-root-user cat /proc/self/uid_map |
            awk -v own="$(id -u pipeline)" '{{ print "maps", $1, $2 == own ? "itself" : $2, $3 }}'
        echo "manual $(man --warnings --local-file /usr/share/man/man1/pipeline.1.gz 2>&1 >/dev/null | wc --lines)"
        bash -n /usr/share/bash-completion/completions/pipeline
        (cd / && md5sum --quiet --check /var/lib/dpkg/info/pipeline.md5sums)
        # Again, as an upgrade does it: nothing is given twice.
        dpkg --install --force-depends /package/{name} >&2
        echo "ranges $(grep -c ^pipeline: /etc/subuid) $(grep -c ^pipeline: /etc/subgid)"
        touch /var/lib/pipeline/kept
        dpkg --purge pipeline >&2
        test ! -e /usr/bin/pipeline
        test ! -e /usr/lib/systemd/system/pipeline.service
        echo "left $(ls /var/lib/pipeline)"
        "#
    );
    let told = thrown_away(package.parent().unwrap(), &script);
    let version = run(Command::new(env!("CARGO_BIN_EXE_pipeline")).arg("--version"));
    // The first range that is free on this machine.
    let start = told.lines().find_map(|line| line.strip_prefix("subuid pipeline:")?.strip_suffix(":65536"));
    let start: u32 = start.and_then(|start| start.parse().ok()).unwrap_or_else(|| panic!("no range: {told}"));
    let expected = [
        &format!("version {}", version.trim()),
        "user pipeline:/var/lib/pipeline:/usr/sbin/nologin",
        &format!("subuid pipeline:{start}:65536"),
        &format!("subgid pipeline:{start}:65536"),
        "state 750 pipeline pipeline",
        // Whatever it says is a complaint.
        "verified ",
        "maps 0 itself 1",
        &format!("maps 1 {start} 65535"),
        "manual 0",
        "ranges 1 1",
        "left kept",
    ];
    assert_eq!(told.lines().collect::<Vec<_>>(), expected);
}

/// Every option of systemd's hardening is either in the unit or in the table of docs/rollout.md with the target that needs it out.
#[test]
fn hardening_that_is_left_out_is_told() {
    let unit = fs_err::read_to_string(repository().join("templates/pipeline.service")).unwrap();
    let page = fs_err::read_to_string(repository().join("docs/rollout.md")).unwrap();
    let options = [
        "CapabilityBoundingSet",
        "DynamicUser",
        "IPAddressDeny",
        "KeyringMode",
        "LockPersonality",
        "MemoryDenyWriteExecute",
        "NoNewPrivileges",
        "PrivateDevices",
        "PrivateNetwork",
        "PrivateTmp",
        "PrivateUsers",
        "ProcSubset",
        "ProtectClock",
        "ProtectControlGroups",
        "ProtectHome",
        "ProtectHostname",
        "ProtectKernelLogs",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "ProtectProc",
        "ProtectSystem",
        "RemoveIPC",
        "RestrictAddressFamilies",
        "RestrictNamespaces",
        "RestrictRealtime",
        "RestrictSUIDSGID",
        "SystemCallArchitectures",
        "SystemCallFilter",
        "UMask",
    ];
    for option in options {
        let is_set = unit.lines().any(|line| line.starts_with(&format!("{option}=")));
        let is_told = page.lines().any(|line| line.starts_with('|') && line.contains(&format!("`{option}`")));
        assert!(is_set != is_told, "`{option}`: set {is_set}, in the table of what is left out {is_told}");
    }
}
