//! What the writers in `src/disk/` write, judged by the programs that everybody else uses for it.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use pipeline::disk::{fat, gpt, index, table, verity};
use tempfile::TempDir;

/// Runs a program and gives what it printed on both streams; a program that is missing is named.
#[expect(clippy::disallowed_methods, reason = "witnesses are run by the test")]
fn witness(package: &str, program: &str, args: &[&str]) -> (bool, String) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new(program);
    command
        .args(args)
        .env("PATH", path)
        .env("LC_ALL", "C.UTF-8")
        .env("TZ", "UTC")
        .env("MTOOLS_SKIP_CHECK", "1")
        .stdin(Stdio::null());
    let output = command.output().unwrap_or_else(|error| panic!("`{program}` (package {package}) cannot be run: {error}"));
    (output.status.success(), format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

/// As [`witness`]; the program has to be content.
fn agrees(package: &str, program: &str, args: &[&str]) -> String {
    let (success, text) = witness(package, program, args);
    assert!(success, "`{program} {}`:\n{text}", args.join(" "));
    text
}

/// Bytes that do not repeat, the same ones in every run.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let words = (0..length.div_ceil(8)).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(length).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn verity_is_veritysetups() {
    let folder = TempDir::new().unwrap();
    let (data, ours, theirs) = (folder.path().join("data"), folder.path().join("ours"), folder.path().join("theirs"));
    let salt: [u8; 32] = noise(32, 7).try_into().unwrap();
    let uuid = gpt::Guid::version_4(noise(16, 8).try_into().unwrap());
    let pattern = noise(1 << 20, 9);
    for blocks in [1_u64, 2, 127, 128, 129, 16_383, 16_384, 16_385, 40_000] {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&data).unwrap();
        for at in (0..blocks * 4096).step_by(pattern.len()) {
            // Every third MiB stays a hole.
            if at >> 20 & 3 != 2 {
                let length = (blocks * 4096 - at).min(pattern.len() as u64) as usize;
                file.write_all_at(&pattern[..length], at).unwrap();
                file.write_all_at(&at.to_le_bytes(), at).unwrap();
            }
        }
        file.set_len(blocks * 4096).unwrap();
        let (leaves, found) = index::leaves_and_index(&file, 0, blocks, &salt, 2).unwrap();
        assert_eq!(leaves, verity::leaves(&file, 0, blocks, &salt, 1).unwrap());
        assert_eq!(found, index::Index::of_file(&file, 0, blocks, 2).unwrap());
        let (area, root) = verity::tree(&leaves, &salt, uuid.text_order());
        assert_eq!(area.len() as u64, verity::area_bytes(blocks));
        fs_err::write(&ours, &area).unwrap();
        let (salt, uuid, root) = (format!("--salt={}", hex::encode(salt)), format!("--uuid={uuid}"), hex::encode(root));
        let said = agrees("cryptsetup-bin", "veritysetup", &["format", &salt, &uuid, text(&data), text(&theirs)]);
        assert!(said.contains(&root), "{blocks} blocks: {root} is not in\n{said}");
        assert_eq!(fs_err::read(&theirs).unwrap(), area, "{blocks} blocks");
        agrees("cryptsetup-bin", "veritysetup", &["verify", text(&data), text(&ours), &root]);
    }
}

/// The disk of a host with a slot of 64 MiB, in 512-byte sectors.
fn host_table() -> gpt::Gpt {
    let (root, verity) = gpt::halves(&noise(32, 1).try_into().unwrap());
    let rows = [
        ("bios", table::Role::Bios, 1, None),
        ("esp", table::Role::Esp, 64, None),
        ("root-a", table::Role::RootA, 64, Some(root)),
        ("root-a-verity", table::Role::VerityA, 1, Some(verity)),
        ("_empty", table::Role::RootB, 64, None),
        ("_empty", table::Role::VerityB, 1, None),
        ("var", table::Role::Var, 64, None),
    ];
    let mut first = 2048;
    let partitions = rows.into_iter().zip(1..).map(|((name, role, mebibytes, id), number)| {
        let sectors = mebibytes * 2048;
        first += sectors;
        let id = id.unwrap_or_else(|| gpt::Guid::version_4(noise(16, 100 + u64::from(number)).try_into().unwrap()));
        let (first, last) = (first - sectors, first - 1);
        gpt::Partition { number, kind: gpt::kind(role), id, first, last, name: name.into(), attributes: 0 }
    });
    let partitions: Vec<gpt::Partition> = partitions.collect();
    gpt::Gpt { disk: gpt::Guid::version_4(noise(16, 2).try_into().unwrap()), sectors: first + 2048, partitions }
}

#[test]
fn partition_tables_are_read_by_sgdisk_and_sfdisk() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let table = host_table();
    table.write(file.as_file()).unwrap();
    assert_eq!(gpt::Gpt::read(file.as_file(), table.sectors).unwrap(), table);
    let said = agrees("gdisk", "sgdisk", &["-v", text(file.path())]);
    assert!(said.contains("No problems found."), "{said}");
    let (_, said) = witness("fdisk", "sfdisk", &["--verify", text(file.path())]);
    assert!(said.contains("No errors detected."), "{said}");
    #[derive(serde::Deserialize)]
    struct Dump {
        partitiontable: Table,
    }
    #[derive(serde::Deserialize)]
    struct Table {
        label: String,
        id: String,
        partitions: Vec<Row>,
    }
    #[derive(serde::Deserialize)]
    struct Row {
        start: u64,
        size: u64,
        #[serde(rename = "type")]
        kind: String,
        uuid: String,
        name: String,
    }
    let dump: Dump = serde_json::from_str(&agrees("fdisk", "sfdisk", &["--json", text(file.path())])).unwrap();
    let dump = dump.partitiontable;
    assert_eq!((dump.label.as_str(), dump.id.to_lowercase()), ("gpt", table.disk.to_string()));
    let theirs: Vec<_> = dump
        .partitions
        .into_iter()
        .map(|row| (row.start, row.size, row.kind.to_lowercase(), row.uuid.to_lowercase(), row.name))
        .collect();
    let ours = table.partitions.iter();
    let ours: Vec<_> = ours
        .map(|row| (row.first, row.last + 1 - row.first, row.kind.to_string(), row.id.to_string(), row.name.clone()))
        .collect();
    assert_eq!(theirs, ours);
    // The other way round: a table of theirs, grown as `sgdisk -e` does.
    let larger = table.sectors + 4096;
    file.as_file().set_len(larger * 512).unwrap();
    agrees("gdisk", "sgdisk", &["-e", text(file.path())]);
    let grown = gpt::Gpt { sectors: larger, ..table };
    assert_eq!(gpt::Gpt::read(file.as_file(), larger).unwrap(), grown);
}

fn fsck(image: &Path) {
    // fsck.fat does not know offsets, so the volume is a file of its own in these tests.
    let said = agrees("dosfstools", "fsck.fat", &["-n", "-V", text(image)]);
    let bad = ["Dirty", "differ", "Wrong", "wrong", "orphan", "Orphan", "Reclaim", "Bad", "bad ", "corrupt", "not match"];
    assert!(!bad.iter().any(|word| said.contains(word)), "{said}");
}

fn mtype(image: &Path, path: &str) -> String {
    agrees("mtools", "mtype", &["-i", text(image), &format!("::{path}")])
}

#[test]
fn fat_volumes_are_clean_and_read_by_mtools() {
    let folder = TempDir::new().unwrap();
    let mut big = File::options().read(true).write(true).create(true).truncate(true).open(folder.path().join("big")).unwrap();
    let big_bytes = noise(9_000_001, 3);
    big.write_all(b"skipped").unwrap();
    big.write_all(&big_bytes).unwrap();
    big.rewind().unwrap();
    let many: String = "x".repeat(40);
    let mut entries = vec![
        fat::Entry::bytes("/EFI/BOOT/BOOTX64.EFI", &b"boot"[..]),
        fat::Entry::bytes("loader/loader.conf", &b"timeout 0\neditor no\n"[..]),
        fat::Entry::bytes("EFI/Linux/pipeline_000001_a.efi", noise(5000, 1)),
        fat::Entry::bytes("EFI/Linux/pipeline_000002_b+3.efi", noise(4096, 2)),
        fat::Entry::bytes("grub/grub.cfg", &b"# grub\n"[..]),
        fat::Entry::bytes("grub/empty", &b""[..]),
        fat::Entry::folder("pipeline/a"),
        fat::Entry {
            path: "pipeline/a/initrd".into(),
            content: Some(fat::Content::Range { file: Arc::new(big), offset: 7, length: big_bytes.len() as u64 }),
        },
    ];
    // More entries than a cluster holds.
    entries.extend(
        (0..300).map(|number| fat::Entry::bytes(format!("many/{number} {many}.txt"), format!("{number}\n").into_bytes())),
    );
    for mebibytes in [34_u64, 200, 1024] {
        let format =
            fat::Format { bytes: mebibytes << 20, label: "ESP".into(), serial: 0x1234_ABCD, time: 1_700_000_000, hidden: 4096 };
        let image = folder.path().join(format!("{mebibytes}.img"));
        let plan = fat::plan(&format, &entries).unwrap();
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&image).unwrap();
        plan.write(&file, 0).unwrap();
        fsck(&image);
        let again = folder.path().join("again.img");
        let other = File::options().read(true).write(true).create(true).truncate(true).open(&again).unwrap();
        plan.write(&other, 0).unwrap();
        assert_eq!(agrees("diffutils", "cmp", &[text(&image), text(&again)]), "");
        let said = agrees("mtools", "mdir", &["-i", text(&image), "::EFI/Linux"]);
        assert!(said.contains("Volume in drive : is ESP") && said.contains("Volume Serial Number is 1234-ABCD"), "{said}");
        assert!(said.contains("2023-11-14  22:13  pipeline_000002_b+3.efi"), "{said}");
        let listed = agrees("mtools", "mdir", &["-i", text(&image), "-b", "-/", "::"]);
        let mut theirs: Vec<String> = listed.lines().map(|line| line.trim_start_matches("::/").into()).collect();
        theirs.sort_unstable();
        let volume = fat::Volume::open(&file, 0, 0).unwrap();
        let found = volume.list().unwrap();
        let mut ours: Vec<String> = found
            .iter()
            .map(|found| if found.size.is_none() { format!("{}/", found.path) } else { found.path.clone() })
            .collect();
        ours.sort_unstable();
        assert_eq!(ours, theirs);
        assert_eq!(mtype(&image, "loader/loader.conf"), "timeout 0\neditor no\n");
        assert_eq!(mtype(&image, &format!("many/299 {many}.txt")), "299\n");
        let out = folder.path().join("out");
        agrees("mtools", "mcopy", &["-n", "-o", "-i", text(&image), "::pipeline/a/initrd", text(&out)]);
        assert!(fs_err::read(&out).unwrap() == big_bytes && volume.read("PIPELINE/a/initrd").unwrap() == big_bytes);
        assert_eq!(volume.free_bytes(), plan.room_bytes() - plan.used_bytes());
    }
}

#[test]
fn fat_volumes_are_changed_in_place() {
    let folder = TempDir::new().unwrap();
    let image = folder.path().join("esp.img");
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&image).unwrap();
    // One of theirs, with other numbers than ours: their reserved sectors, their names.
    file.set_len(64 << 20).unwrap();
    agrees("dosfstools", "mkfs.fat", &["-F", "32", "-s", "1", "-n", "ESP", "-i", "12345678", text(&image)]);
    agrees("mtools", "mmd", &["-i", text(&image), "::EFI", "::EFI/Linux"]);
    let source = folder.path().join("pipeline_000001_a.efi");
    fs_err::write(&source, noise(10_000, 1)).unwrap();
    agrees("mtools", "mcopy", &["-i", text(&image), text(&source), "::EFI/Linux/"]);
    let mut volume = fat::Volume::open(&file, 0, 1_700_000_000).unwrap();
    let free = volume.free_bytes();
    volume.write("/EFI/Linux/pipeline_000002_b+3.efi", &noise(70_000, 2)).unwrap();
    volume.write("pipeline/b/cmdline.cfg", b"set cmdline=\"quiet\"\n").unwrap();
    volume.write("pipeline/b/cmdline.cfg", b"set cmdline=\"loud\"\n").unwrap();
    volume.write("grub/grubenv", &[b'#'; 1024]).unwrap();
    fsck(&image);
    for tries in ["b+2-1", "b+1-2", "b+0-3", "b"] {
        let old = volume.list().unwrap().into_iter().find(|found| found.path.contains("_000002_")).unwrap().path;
        volume.rename(&old, &format!("pipeline_000002_{tries}.efi")).unwrap();
        fsck(&image);
    }
    // A folder that grows beyond its cluster, and shrinks.
    for number in 0..40 {
        volume.write(&format!("pipeline/b/a file with a long name {number}"), b"x").unwrap();
    }
    fsck(&image);
    for number in 0..40 {
        volume.remove(&format!("pipeline/b/a file with a long name {number}")).unwrap();
    }
    fsck(&image);
    let listed: Vec<(String, Option<u64>)> = volume.list().unwrap().into_iter().map(|found| (found.path, found.size)).collect();
    let expected = [
        ("EFI", None),
        ("EFI/Linux", None),
        ("EFI/Linux/pipeline_000001_a.efi", Some(10_000)),
        ("EFI/Linux/pipeline_000002_b.efi", Some(70_000)),
        ("grub", None),
        ("grub/grubenv", Some(1024)),
        ("pipeline", None),
        ("pipeline/b", None),
        ("pipeline/b/cmdline.cfg", Some(19)),
    ];
    assert_eq!(listed, expected.map(|(path, size)| (path.to_string(), size)));
    assert_eq!(mtype(&image, "pipeline/b/cmdline.cfg"), "set cmdline=\"loud\"\n");
    assert_eq!(volume.read("EFI/linux/pipeline_000002_b.efi").unwrap(), noise(70_000, 2));
    assert_eq!(fat::Volume::open(&file, 0, 0).unwrap().read("EFI/Linux/pipeline_000001_a.efi").unwrap(), noise(10_000, 1));
    // What cannot be, changes nothing.
    let kind = |result: std::io::Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(volume.rename("EFI/Linux/pipeline_000002_b.efi", "a:b")), std::io::ErrorKind::InvalidInput);
    assert_eq!(
        kind(volume.rename("EFI/Linux/pipeline_000002_b.efi", "PIPELINE_000001_A.EFI")),
        std::io::ErrorKind::AlreadyExists
    );
    assert_eq!(kind(volume.rename("nothing", "x")), std::io::ErrorKind::NotFound);
    assert_eq!(kind(volume.remove("EFI")), std::io::ErrorKind::DirectoryNotEmpty);
    assert_eq!(kind(volume.write("EFI/Linux", b"")), std::io::ErrorKind::IsADirectory);
    let larger = vec![1; usize::try_from(volume.free_bytes()).unwrap() + 1];
    assert_eq!(kind(volume.write("too-large", &larger)), std::io::ErrorKind::StorageFull);
    fsck(&image);
    for path in ["EFI/Linux/pipeline_000002_b.efi", "pipeline/b/cmdline.cfg", "pipeline/b", "pipeline", "grub/grubenv", "grub"] {
        volume.remove(path).unwrap();
    }
    assert_eq!(volume.free_bytes(), free);
    fsck(&image);
}
