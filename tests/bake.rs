//! Bakes disks as root and as an ordinary user, and asks other people's tools what they are.

mod common;
#[path = "bake/fixture.rs"]
mod fixture;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use common::{Project, me, tool, users};
use fixture::{KERNEL, host, layer, project};
use pipeline::cmd::Cmd;
use pipeline::oci::digest::Digest;
use serde_json::Value;

/// A folder that holds `qemu-img` and nothing else.
fn only_qemu_img(project: &Project) -> PathBuf {
    tool("qemu-img", "qemu-utils");
    let dir = project.beside("bin");
    let path = pipeline::cmd::find("qemu-img", &std::env::var_os("PATH").unwrap()).unwrap();
    std::os::unix::fs::symlink(path, dir.join("qemu-img")).unwrap();
    dir
}

fn bake(project: &Project, args: &[&str]) -> Value {
    let words: Vec<&str> = ["bake", "--json"].into_iter().chain(args.iter().copied()).collect();
    project.pipeline(&words).ok().json()
}

/// First byte and length of a partition, as `sfdisk` reads the table.
fn partition(disk: &Path, number: usize) -> (u64, u64) {
    tool("sfdisk", "fdisk");
    let dump: Value = Cmd::new("sfdisk").arg("--json").arg(disk).json().unwrap();
    let row = &dump["partitiontable"]["partitions"][number - 1];
    (row["start"].as_u64().unwrap() * 512, row["size"].as_u64().unwrap() * 512)
}

/// A partition as a file of its own.
fn cut(disk: &Path, number: usize, to: &Path) {
    let (start, length) = partition(disk, number);
    Cmd::new("dd")
        .args(["conv=sparse", "bs=1M", "iflag=skip_bytes,count_bytes", "status=none"])
        .args([&format!("skip={start}"), &format!("count={length}")])
        .arg(format!("if={}", disk.display()))
        .arg(format!("of={}", to.display()))
        .run()
        .unwrap();
}

fn digest(path: &Path) -> Digest {
    Digest::of_reader(fs_err::File::open(path).unwrap()).unwrap().0
}

#[test]
fn anybody_bakes_the_same_disk_with_nothing_but_qemu_img() {
    let mut answers = Vec::new();
    for user in users() {
        let project = project(user, "tiny", &[layer(&host())]);
        let path = only_qemu_img(&project);
        let answer = project
            .pipeline(&["bake", "tiny", "--json", "--format", "raw,qcow2,vmdk,vhd,gce"])
            .wrap(&["/usr/bin/env", &format!("PATH={}", path.display())])
            .ok()
            .json();
        let files: Vec<Digest> = ["raw", "qcow2", "vmdk", "vhd", "tar.gz"]
            .iter()
            .map(|ending| digest(&project.path(&format!("out/tiny.{ending}"))))
            .collect();
        answers.push((answer["digest"].clone(), answer["root_hash"].clone(), files));
        project.assert_clean();
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
}

#[test]
fn other_tools_agree_with_what_was_written() {
    for (program, package) in [
        ("sgdisk", "gdisk"),
        ("fsck.fat", "dosfstools"),
        ("mdir", "mtools"),
        ("fsck.erofs", "erofs-utils"),
        ("veritysetup", "cryptsetup-bin"),
        ("objdump", "binutils"),
    ] {
        tool(program, package);
    }
    let project = project(me(), "tiny", &[layer(&host())]);
    let answer = bake(&project, &["tiny", "--format", "raw,qcow2"]);
    let (raw, dir) = (project.path("out/tiny.raw"), project.beside("parts"));
    let said = Cmd::new("sgdisk").arg("-v").arg(&raw).text().unwrap();
    assert!(said.contains("No problems found"), "{said}");
    let part = |number: usize| {
        let path = dir.join(number.to_string());
        cut(&raw, number, &path);
        path
    };
    let (esp, root, verity) = (part(2), part(3), part(4));
    Cmd::new("fsck.fat").args(["-n", "-V"]).arg(&esp).run().unwrap();
    let listed = Cmd::new("mdir").args(["-b", "-/", "-i"]).arg(&esp).arg("::").text().unwrap();
    let mut listed: Vec<&str> = listed.lines().collect();
    listed.sort_unstable();
    let expected = [
        "::/EFI/",
        "::/EFI/BOOT/",
        "::/EFI/BOOT/BOOTX64.EFI",
        "::/EFI/Linux/",
        "::/EFI/Linux/pipeline_000001_a.efi",
        "::/EFI/systemd/",
        "::/EFI/systemd/systemd-bootx64.efi",
        "::/loader/",
        "::/loader/loader.conf",
    ];
    assert_eq!(listed, expected);
    let root_hash = answer["root_hash"].as_str().unwrap();
    Cmd::new("veritysetup").arg("verify").arg(&root).arg(&verity).arg(root_hash).run().unwrap();
    // The image, without the empty rest of its slot.
    let shown = project.json(&["artifact", "show", "tiny:latest.disk"]);
    let bytes = shown["disk"]["root_bytes"].as_u64().unwrap();
    fs_err::OpenOptions::new().write(true).open(&root).unwrap().set_len(bytes).unwrap();
    Cmd::new("fsck.erofs").arg(&root).run().unwrap();
    Cmd::new("qemu-img").arg("check").arg(project.path("out/tiny.qcow2")).run().unwrap();
    Cmd::new("qemu-img").arg("compare").arg(&raw).arg(project.path("out/tiny.qcow2")).run().unwrap();
    // What the table says is what the tool reads.
    let dump: Value = Cmd::new("sfdisk").arg("--json").arg(&raw).json().unwrap();
    let uuid = |number: usize| {
        dump["partitiontable"]["partitions"][number - 1]["uuid"].as_str().unwrap().replace('-', "").to_lowercase()
    };
    assert_eq!(format!("{}{}", uuid(3), uuid(4)), root_hash);
    // The unified kernel image, as binutils reads it.
    let uki = dir.join("uki.efi");
    Cmd::new("mcopy").arg("-i").arg(&esp).arg("::/EFI/Linux/pipeline_000001_a.efi").arg(&uki).run().unwrap();
    let sections = Cmd::new("objdump").arg("-h").arg(&uki).text().unwrap();
    for name in [".osrel", ".cmdline", ".uname", ".linux", ".initrd"] {
        assert!(sections.contains(name), "{sections}");
    }
    project.assert_clean();
}

#[test]
fn what_is_not_there_is_said() {
    let cases: [(&str, fn(&str) -> bool, Option<(&str, &str)>, &str, &str); 5] = [
        (
            "kernel",
            |path| !path.ends_with("vmlinuz"),
            None,
            "the tree has no kernel: neither `/usr/lib/modules/*/vmlinuz` nor `/boot/vmlinuz-*`",
            "a pipeline with `host:` brings one",
        ),
        (
            "kernels",
            |_| true,
            Some(("boot/vmlinuz-6.1", "x")),
            "the tree has two kernels, `6.1` and `6.12.1-test`",
            "remove one of them",
        ),
        (
            "init",
            |path| !path.ends_with("init") && !path.ends_with("systemd/systemd"),
            None,
            "the tree has no `/sbin/init`",
            "`systemd-sysv`",
        ),
        (
            "stub",
            |path| !path.ends_with(".stub"),
            None,
            "the tree has no `/usr/lib/systemd/boot/efi/linuxx64.efi.stub`",
            "systemd-boot-efi",
        ),
        (
            "dracut",
            |_| true,
            Some(("usr/lib/pipeline/host.json", r#"{"format":1,"initrd":"dracut"}"#)),
            "the tree has no `/usr/lib/modules/6.12.1-test/initramfs.img`, which `initrd: dracut` needs",
            "build the host again",
        ),
    ];
    let project = Project::empty(me());
    for (name, keep, more, message, hint) in cases {
        let mut entries = host();
        entries.retain(|(path, _)| keep(path));
        entries.extend(more.map(|(path, text)| (path.to_string(), text.as_bytes().to_vec())));
        fixture::load(&project, name, &[layer(&entries)]);
        let answer = project.pipeline(&["bake", name]).run();
        answer.code(1).says(&format!("error: cannot bake `{name}:latest`")).says(message).says(hint);
        assert!(!project.path("out").exists());
    }
    project.pipeline(&["bake", "nothing"]).run().code(2).says("the store has no host `nothing:latest.host`");
    project
        .pipeline(&["bake", "kernel", "--format", "iso"])
        .run()
        .code(2)
        .says("`iso` is not a disk format")
        .says("formats are raw, qcow2, vmdk, vhd, gce");
    project.assert_clean();
}

#[test]
fn sizes_that_do_not_fit() {
    let project = Project::empty(me());
    let with = |json: &str| {
        let mut entries = host();
        entries.push(("usr/lib/pipeline/host.json".into(), json.as_bytes().to_vec()));
        layer(&entries)
    };
    fixture::load(&project, "slot", &[with(r#"{"format":1,"disk":{"slot":1048576}}"#)]);
    project.pipeline(&["bake", "slot"]).run().code(1).says("the root image is").says("`host.disk.slot` is 1 MiB");
    fixture::load(&project, "disk", &[with(r#"{"format":1,"disk":{"size":1073741824}}"#)]);
    project.pipeline(&["bake", "disk"]).run().code(2).says("`host.disk.size` is 1 GiB, and this disk needs 3171 MiB at least");
    // More than half of the slot is a warning.
    fixture::load(&project, "half", &[with(r#"{"format":1,"disk":{"slot":3145728}}"#)]);
    project.pipeline(&["bake", "half"]).run().code(0).says("a later version may not fit, and slots cannot grow");
    project.assert_clean();
}

#[test]
fn a_plan_shows_what_the_bake_makes() {
    let project = project(me(), "tiny", &[layer(&host())]);
    let planned = project.json(&["bake", "--plan", "tiny"]);
    assert!(!project.path("out").exists());
    bake(&project, &["tiny"]);
    let shown = project.json(&["artifact", "show", "tiny:latest.disk"]);
    assert_eq!(planned["table"], shown["disk"]["table"]);
    assert_eq!((shown["disk"]["kernel"].as_str(), shown["disk"]["os"].as_str()), (Some(KERNEL), Some("Debian 13")));
    project.pipeline(&["bake", "--plan", "tiny"]).ok().prints("root-a-verity").prints("slot B: free, for the next version");
}

#[test]
fn a_second_bake_is_free_and_a_lost_part_is_made_again() {
    let project = project(me(), "tiny", &[layer(&host())]);
    let first = bake(&project, &["tiny"]);
    let second = bake(&project, &["tiny"]);
    assert_eq!((&first["cached"], &second["cached"]), (&Value::Bool(false), &Value::Bool(true)));
    assert_eq!(first["digest"], second["digest"]);
    let shown = project.json(&["artifact", "show", "tiny:latest.disk"]);
    let root = shown["parts"][0]["digest"].as_str().unwrap().replace("sha256:", "");
    fs_err::remove_file(project.root.join("store/blobs/sha256").join(root)).unwrap();
    let third = bake(&project, &["tiny"]);
    assert_eq!((third["cached"].clone(), third["digest"].clone()), (Value::Bool(false), first["digest"].clone()));
    project.pipeline(&["artifact", "verify", "tiny:latest.disk"]).ok();
}

#[test]
fn differences_are_told_as_people_know_them() {
    let project = project(me(), "one", &[layer(&host())]);
    let upper = vec![
        ("var/lib/dpkg/status".to_string(), b"Package: base-files\nStatus: install ok installed\nVersion: 13.9\nArchitecture: amd64\n\nPackage: curl\nStatus: install ok installed\nVersion: 8.1\nArchitecture: amd64\n".to_vec()),
        ("usr/share/.wh.data".to_string(), Vec::new()),
        ("usr/share/more".to_string(), b"more".to_vec()),
    ];
    fixture::load(&project, "two", &[layer(&host()), layer(&upper)]);
    for name in ["one", "two"] {
        bake(&project, &[name]);
    }
    for (from, to) in [("one:latest.host", "two:latest.host"), ("one:latest.disk", "two:latest.disk")] {
        let answer = project.pipeline(&["artifact", "diff", from, to]).ok();
        answer.prints("Upgraded:\n  base-files 13.8 -> 13.9\n").prints("Added:\n  curl-8.1\n");
        answer.prints("Files added (1):\n  /usr/share/more\n").prints("Files removed (1):\n  /usr/share/data\n");
    }
    project.pipeline(&["artifact", "diff", "one:latest.disk", "one:latest.disk"]).ok().prints("they are the same");
}

#[test]
fn kill_9_anywhere_leaves_nothing_that_stays() {
    let project = project(me(), "tiny", &[layer(&host())]);
    let blobs = project.root.join("store/blobs/sha256");
    let names = || -> BTreeSet<_> { fs_err::read_dir(&blobs).unwrap().map(|entry| entry.unwrap().file_name()).collect() };
    let of_the_host = names();
    // As if the disk had never been baked: each kill meets the same points.
    let forget = || {
        for entry in fs_err::read_dir(project.root.join("cache/bakes")).into_iter().flatten().flatten() {
            fs_err::remove_file(entry.path()).unwrap();
        }
        project.pipeline(&["artifact", "untag", "tiny:latest.disk"]).ok();
        for name in names().difference(&of_the_host) {
            fs_err::remove_file(blobs.join(name)).unwrap();
        }
    };
    let bake_with = |point: &str| project.pipeline(&["--fault", point, "bake", "tiny", "--format", "raw,qcow2"]).run();
    let counted = bake_with("0");
    let points: u32 =
        counted.stderr.lines().find_map(|line| line.strip_prefix("fault points passed: ")).unwrap().parse().unwrap();
    let expected = bake(&project, &["tiny"])["digest"].clone();
    assert!(points > 20, "{points}");
    for point in (1..=points).step_by(2) {
        forget();
        bake_with(&point.to_string()).code(137);
        let answer = bake(&project, &["tiny", "--format", "raw,qcow2"]);
        assert_eq!(answer["digest"], expected, "after a kill at point {point} of {points}");
        let mut files: Vec<String> = fs_err::read_dir(project.path("out"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        files.sort_unstable();
        assert_eq!(files, ["tiny.qcow2", "tiny.raw"], "after a kill at point {point} of {points}");
        project.assert_clean();
    }
    project.pipeline(&["artifact", "verify", "tiny:latest.disk"]).ok();
}

/// Bakes onto a tmpfs of `$2` KiB at `$1`, and again when it is large; nobody else sees the mount.
const FULL: &str = r#"
set -u
place=$1 size=$2; shift 2
mount -t tmpfs -o "size=$size,mode=0755" tmpfs "$place" || exit 99
"$@" -o "$place"; echo "first $?"
ls -A "$place" | sed 's/^/left /'
mount -o remount,size=200m "$place" || exit 98
"$@" -o "$place"; echo "second $?"
ls -A "$place" | sed 's/^/holds /'
"#;

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    tool("unshare", "util-linux");
    for user in users() {
        let project = project(user, "tiny", &[layer(&host())]);
        let place = project.beside("place");
        let namespace: &[&str] = if user == common::User::Root {
            &["unshare", "--mount"]
        } else {
            &["unshare", "--user", "--map-auto", "--map-root-user", "--mount"]
        };
        for format in ["raw", "qcow2", "vmdk"] {
            let command = project.program("sh").wrap(namespace).arg("-c").arg(FULL).arg("sh").arg(&place).arg("700k");
            let answer = command
                .arg(common::binary())
                .args(&["--root", project.root.to_str().unwrap(), "bake", "tiny", "--format", format])
                .run();
            answer.code(0).prints("first 75\n").prints("second 0\n").prints(&format!("holds tiny.{format}\n"));
            answer.says("No space left on device").says("hint: free some space");
            assert!(!answer.stdout.contains("left "), "{}", answer.stdout);
        }
        project.assert_clean();
    }
}

#[test]
fn a_missing_or_old_qemu_img_is_named_and_other_formats_do_without() {
    let project = project(me(), "tiny", &[layer(&host())]);
    let bin = project.beside("old");
    let with_path = |args: &[&str]| {
        let path = format!("PATH={}", bin.display());
        project.pipeline(args).wrap(&["/usr/bin/env", &path]).run()
    };
    with_path(&["bake", "tiny"]).code(1).says("`qemu-img` is not installed").says("it is in the package qemu-utils");
    assert_eq!(fs_err::read_dir(project.path("out")).unwrap().count(), 0);
    with_path(&["bake", "tiny", "--format", "raw,vhd"]).code(0);
    let fake = bin.join("qemu-img");
    fs_err::write(&fake, "#!/bin/sh\necho 'qemu-img version 3.1.0 (Debian)'\n").unwrap();
    fs_err::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    with_path(&["bake", "tiny"]).code(1).says("is version 3.1, and 4.0 is needed");
    project.assert_clean();
}
