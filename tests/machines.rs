//! Machines: the repository's appliance on real packages is booted by SeaBIOS and OVMF, and has to be what
//! docs/disks.md and docs/hosts.md say.
//!
//! What needs nothing but the disk is in `vm-tests/`, as a user of this program has it. Here is what needs something
//! prepared on this side: a second version in slot B, a NoCloud disk, other pipelines, other people's tools.
//! Every boot is emulated and takes half a minute, so each test asks for as much as one boot can show.
#![allow(clippy::print_stdout, reason = "what was measured is worth reading")]

mod common;
#[path = "machines/disk.rs"]
mod disk;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Project, repository, tool};
use disk::{Version, appliance, baked, qcow2, raw};
use pipeline::bake::esp::Slot;
use pipeline::bake::slot;
use pipeline::cmd::Cmd;

/// Runs a vm-test of the repository on the disk `disk`.
#[track_caller]
fn passes(project: &Project, test: &str, disk: &Path) {
    tool("qemu-system-x86_64", "qemu-system-x86");
    tool("qemu-img", "qemu-utils");
    let words = ["test".as_ref(), test.as_ref(), "--disk".as_ref(), disk.as_os_str(), "--keep-going".as_ref()];
    project.pipeline(&words).start().wait(Duration::from_secs(1800)).code(0);
}

/// A vm-test of `vm-tests/` on the appliance.
fn appliance_passes(test: &str) {
    let (project, _) = appliance();
    project.copy(&repository().join("vm-tests"), "vm-tests");
    passes(&project, &format!("vm-tests/{test}.yaml"), &qcow2(&project, "appliance"));
}

/// A vm-test of `tests/machines/`, with each `@NAME@` in it replaced.
fn write_test(project: &Project, test: &str, words: &[(&str, &str)]) -> String {
    let name = format!("vm-tests/{test}.yaml");
    let mut text = fs_err::read_to_string(repository().join(format!("tests/machines/{test}.yaml"))).unwrap();
    for (word, value) in words {
        let marked = format!("@{word}@");
        assert!(text.contains(&marked), "{test}.yaml has no {marked}");
        text = text.replace(&marked, value);
    }
    project.write(&name, text);
    name
}

#[test]
fn the_appliance_is_up_with_both_firmwares_and_keeps_its_own() {
    appliance_passes("appliance");
}

#[test]
fn bare_qemu_hardware() {
    appliance_passes("plain");
}

#[test]
fn var_grows_with_the_disk() {
    appliance_passes("growth");
}

#[test]
fn configuration_comes_from_outside() {
    appliance_passes("configuration");
}

#[test]
fn damage_without_another_slot_stops_the_machine() {
    appliance_passes("verity");
}

/// No vm-test is left out.
#[test]
fn every_vm_test_has_its_test_here() {
    let mut names: Vec<String> = fs_err::read_dir(repository().join("vm-tests"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["appliance.yaml", "configuration.yaml", "growth.yaml", "plain.yaml", "verity.yaml"]);
}

/// The command of the README on a disk that was made larger: the console says `login:`, and the table is whole.
#[test]
fn the_plain_command_boots_and_the_table_of_a_grown_disk_is_whole() {
    tool("sgdisk", "gdisk");
    let (project, _) = appliance();
    let disk = qcow2(&project, "appliance");
    project.program("qemu-img").args(&["resize", "-q"]).arg(&disk).arg("8G").ok();
    let console = project.path("console.txt");
    let machine = project
        .program("qemu-system-x86_64")
        .args(&["-m", "1G", "-drive", &format!("file={}", disk.display())])
        .args(&["-display", "none", "-serial", &format!("file:{}", console.display())])
        .start();
    let printed = || String::from_utf8_lossy(&fs_err::read(&console).unwrap_or_default()).into_owned();
    let end = Instant::now() + Duration::from_secs(300);
    while !printed().contains("login: ") {
        assert!(Instant::now() < end, "no `login:` on the console:\n{}{}", printed(), machine.stderr());
        std::thread::sleep(Duration::from_millis(200));
    }
    // As a power failure does.
    machine.signal(9);
    drop(machine);
    let raw = project.path("grown.raw");
    project.program("qemu-img").args(&["convert", "-O", "raw"]).arg(&disk).arg(&raw).ok();
    let said = Cmd::new("sgdisk").arg("-v").arg(&raw).text().unwrap();
    assert!(said.contains("No problems found"), "{said}");
    let var = Cmd::new("sgdisk").args(["-i", "7"]).arg(&raw).text().unwrap();
    let last = var.lines().find_map(|line| line.strip_prefix("Last sector: ")).unwrap();
    let last: u64 = last.split(' ').next().unwrap().parse().unwrap();
    // 33 sectors of the backup table, and less than 1 MiB so that it ends where a megabyte does.
    let behind = (8 << 30) / 512 - 1 - last;
    assert!((33..=33 + 2048).contains(&behind), "{behind} sectors behind /var\n{var}");
}

/// NoCloud: what a cloud or Proxmox puts on a second disk.
#[test]
fn a_nocloud_disk_gives_name_keys_and_network() {
    tool("mkfs.fat", "dosfstools");
    tool("mcopy", "mtools");
    tool("ssh-keygen", "openssh-client");
    let (project, _) = appliance();
    let key = project.path("key");
    project.program("ssh-keygen").args(&["-q", "-t", "ed25519", "-N", "", "-C", "somebody", "-f"]).arg(&key).ok();
    let public = project.read("key.pub");
    project.write("meta-data", "instance-id: one\nlocal-hostname: told-by-nocloud\n");
    project.write("user-data", format!("#cloud-config\nssh_authorized_keys:\n  - {public}"));
    project.write(
        "network-config",
        "network:\n  version: 2\n  ethernets:\n    all:\n      match: { name: \"en*\" }\n      addresses: [10.0.2.77/24]\n      \
         gateway4: 10.0.2.2\n      nameservers: { addresses: [10.0.2.3] }\n",
    );
    let seed = project.path("vm-tests/seed.img");
    project.write("vm-tests/seed.img", vec![0; 1 << 20]);
    project.program("mkfs.fat").args(&["-n", "CIDATA"]).arg(&seed).ok();
    for name in ["meta-data", "user-data", "network-config"] {
        project.program("mcopy").arg("-i").arg(&seed).args(&[name, "::"]).ok();
    }
    // Somebody the machine can reach: 10.0.2.2 is this one's loopback.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    std::thread::spawn(move || listener.incoming().flatten().for_each(|mut stream| stream.write_all(b"reached\n").unwrap()));
    let private = project.read("key").lines().map(|line| format!("        {line}\n")).collect::<String>();
    let test = write_test(&project, "nocloud", &[("PORT", &port), ("KEY", &private)]);
    passes(&project, &test, &qcow2(&project, "appliance"));
}

/// `initrd: dracut`.
#[test]
fn the_other_initrd_boots_too() {
    let (project, version) = baked(&[("  disk:", "  initrd: dracut\n  disk:")], None);
    assert_eq!(version.disk.config.initrd, "dracut");
    let test = write_test(&project, "dracut", &[]);
    passes(&project, &test, &qcow2(&project, "appliance"));
}

/// `apps/hostile` beside notes: what it tries and the error it got.
#[test]
fn a_hostile_app_is_refused_everything() {
    let project = disk::hostile();
    let test = write_test(&project, "hostile", &[]);
    passes(&project, &test, &qcow2(&project, "hostile-host"));
}

/// The raw disk of the appliance with `second` in slot B, as an upgrade leaves it.
fn with_slot_b(first: &Project, second: &Version) -> PathBuf {
    let raw = raw(first);
    let file = fs_err::OpenOptions::new().read(true).write(true).open(&raw).unwrap().into_parts().0;
    slot::install(&disk::store(first), &second.disk, &file, Slot::B, 3).unwrap();
    raw
}

/// One file more.
const SECOND: (&str, &str) = ("  disk:", "  files:\n    - { path: /usr/share/second-version, content: \"second\\n\" }\n  disk:");
/// One file more, and an init that cannot be executed.
const BROKEN: (&str, &str) = (
    "  disk:",
    "  files:\n    - { path: /usr/share/second-version, content: \"second\\n\" }\n    \
     - { path: /usr/lib/systemd/systemd, content: \"no program\\n\" }\n  disk:",
);

#[test]
fn a_second_version_becomes_good_and_gives_way_when_it_is_damaged() {
    let (project, first) = appliance();
    let (_, second) = baked(&[SECOND], Some(&first));
    assert_ne!(first.disk.config.root_hash, second.disk.config.root_hash);
    let disk = with_slot_b(&project, &second);
    let test = write_test(&project, "second", &[]);
    passes(&project, &test, &disk);
}

#[test]
fn a_broken_version_fails_three_times_and_the_first_runs_again() {
    let (project, first) = appliance();
    let (_, broken) = baked(&[BROKEN], Some(&first));
    let disk = with_slot_b(&project, &broken);
    let test = write_test(&project, "broken", &[]);
    passes(&project, &test, &disk);
}

/// Blocks that a machine has to fetch for an update of one package, with and without `--previous`.
#[test]
fn an_update_of_one_package_moves_few_blocks() {
    use pipeline::disk::index;
    let (_, first) = appliance();
    let edit = ("packages: [apparmor, openssh-server]", "packages: [apparmor, less, openssh-server]");
    let (_, with) = baked(&[edit], Some(&first));
    let (_, without) = baked(&[edit], None);
    assert_eq!(with.disk.config.host, without.disk.config.host);
    let [with, without] = [with, without].map(|second| index::changed(&first.index(), &second.index()));
    for (how, changed) in [("with", with), ("without", without)] {
        let percent = |blocks: u64| 100.0 * blocks as f64 / changed.blocks as f64;
        println!(
            "one package more, {how} --previous: of {} blocks {:.2} % are others than before ({:.2} % are nowhere in the old image)",
            changed.blocks,
            percent(changed.moved_or_new),
            percent(changed.new)
        );
    }
    assert!(with.moved_or_new < without.moved_or_new, "{with:?} {without:?}");
}
