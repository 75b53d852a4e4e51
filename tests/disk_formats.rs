//! What the writers in `src/disk/` write, judged by the programs that everybody else uses for it.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use pipeline::disk::{cpio, export, fat, gpt, grub, index, table, uki, verity};
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
    for blocks in [1_u64, 2, 127, 128, 129, 16_383, 16_384, 16_385] {
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
    for mebibytes in [34_u64, 34, 200, 1024] {
        let format =
            fat::Format { bytes: mebibytes << 20, label: "ESP".into(), serial: 0x1234_ABCD, time: 1_700_000_000, hidden: 4096 };
        let image = folder.path().join(format!("{mebibytes}.img"));
        let plan = fat::plan(&format, &entries).unwrap();
        let before = fs_err::read(&image).ok();
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&image).unwrap();
        plan.write(&file, 0).unwrap();
        assert!(before.is_none_or(|before| before == fs_err::read(&image).unwrap()), "not the same twice");
        fsck(&image);
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

/// The headers of an EFI program such as systemd's stub: two sections and room for more.
fn stub() -> Vec<u8> {
    let mut bytes = vec![0; 0x600];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, b"MZ");
    put(0x3c, &0x80_u32.to_le_bytes());
    put(0x80, b"PE\0\0");
    // Machine, sections, time, symbols, number of symbols, size of the optional header, flags.
    put(0x84, &0x8664_u16.to_le_bytes());
    put(0x86, &2_u16.to_le_bytes());
    put(0x88, &0x1234_5678_u32.to_le_bytes());
    put(0x94, &240_u16.to_le_bytes());
    put(0x96, &0x22e_u16.to_le_bytes());
    let optional = 0x98;
    put(optional, &0x20b_u16.to_le_bytes());
    let numbers: [(usize, u32); 11] = [
        (4, 0x200),
        (8, 0x100),
        (16, 0x1000),
        (20, 0x1000),
        (32, 0x1000),
        (36, 0x200),
        (44, 255 << 16 | 257),
        (48, 1),
        (56, 0x3000),
        (60, 0x400),
        (108, 16),
    ];
    numbers.into_iter().for_each(|(at, number)| put(optional + at, &number.to_le_bytes()));
    put(optional + 24, &0x1_4000_0000_u64.to_le_bytes());
    put(optional + 68, &10_u16.to_le_bytes());
    put(optional + 70, &0x160_u16.to_le_bytes());
    for (index, (name, size, address, offset, flags)) in
        [(&b".text"[..], 0x200_u32, 0x1000_u32, 0x400_u32, 0x6000_0020_u32), (b".sbat", 0x100, 0x2000, 0x600, 0x4000_0040)]
            .into_iter()
            .enumerate()
    {
        let at = optional + 240 + index * 40;
        put(at, name);
        for (field, number) in [(8, size), (12, address), (16, 0x200), (20, offset), (36, flags)] {
            put(at + field, &number.to_le_bytes());
        }
    }
    bytes.resize(0x800, 0xcc);
    bytes
}

#[test]
fn unified_images_are_read_by_objdump() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("image.efi");
    let (stub, kernel, initrd) = (stub(), noise(300_001, 1), noise(70_000, 2));
    let parts = uki::Parts {
        stub: &stub,
        kernel: &kernel,
        initrd: &initrd,
        cmdline: "quiet panic=5",
        osrel: "ID=pipeline\n",
        uname: "6.12.0-amd64",
    };
    let image = uki::assemble(&parts).unwrap();
    assert!(image.len() as u64 <= uki::size_estimate(&parts));
    fs_err::write(&path, &image).unwrap();
    let contents: [(&str, &[u8]); 5] = [
        (".osrel", b"ID=pipeline\n"),
        (".cmdline", b"quiet panic=5"),
        (".uname", b"6.12.0-amd64"),
        (".linux", &kernel),
        (".initrd", &initrd),
    ];
    let out = folder.path().join("section");
    for (name, expected) in contents {
        agrees("binutils", "objcopy", &["-O", "binary", &format!("--only-section={name}"), text(&path), text(&out)]);
        assert!(fs_err::read(&out).unwrap() == expected, "{name}");
        assert!(uki::content(&image, name).unwrap() == Some(expected), "{name}");
    }
    let said = agrees("binutils", "objdump", &["-h", text(&path)]);
    let rows: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
    let theirs: Vec<(String, u32, u32, u32)> = rows
        .iter()
        .filter(|row| row.len() == 7 && row[0].parse::<u32>().is_ok())
        .map(|row| {
            let number = |at: usize| u64::from_str_radix(row[at], 16).unwrap();
            (row[1].into(), number(2) as u32, (number(3) - 0x1_4000_0000) as u32, number(5) as u32)
        })
        .collect();
    let ours: Vec<(String, u32, u32, u32)> = uki::sections(&image)
        .unwrap()
        .into_iter()
        .map(|section| (section.name, section.size, section.address, section.offset))
        .collect();
    assert_eq!((theirs.len(), &theirs), (7, &ours));
    let said = agrees("binutils", "objdump", &["-p", text(&path)]);
    let last = ours.last().unwrap();
    let size = (last.1 + last.2).next_multiple_of(4096);
    assert!(said.contains(&format!("SizeOfImage\t\t{size:08x}")) && said.contains("CheckSum\t\t00000000"), "{said}");
    // A second time is one section too many; a stub with full headers has no room.
    let message = |stub: &[u8]| uki::assemble(&uki::Parts { stub, ..parts }).unwrap_err().message;
    let mut full = stub.clone();
    full[0x1d8..0x400].fill(1);
    assert_eq!(message(&full), "the EFI stub has no room for more sections");
}

#[test]
fn initrd_archives_are_read_by_cpio() {
    let folder = TempDir::new().unwrap();
    let archive = |time| {
        let mut archive = cpio::Archive::new(Vec::new(), time);
        archive.folder(b"dev", 0o755).unwrap();
        archive.character_device(b"dev/console", 0o600, 5, 1).unwrap();
        archive.folder(b"modules", 0o755).unwrap();
        for size in 0..9 {
            archive.file(format!("modules/{size}.ko.xz").as_bytes(), 0o644, &noise(size, 1)).unwrap();
        }
        archive.file_from(b"init", 0o755, &noise(100_001, 2)[..], 100_001).unwrap();
        archive.link(b"sbin", b"modules/..").unwrap();
        archive.finish().unwrap()
    };
    assert_eq!(archive(5), archive(5));
    let path = folder.path().join("initrd");
    fs_err::write(&path, archive(1_700_000_000)).unwrap();
    let said = agrees("cpio", "cpio", &["--list", "--verbose", "--numeric-uid-gid", "--file", text(&path)]);
    let rows: Vec<String> = said.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    let date = "Nov 14 2023";
    let expected = [
        format!("drwxr-xr-x 2 0 0 0 {date} dev"),
        format!("crw------- 1 0 0 5, 1 {date} dev/console"),
        format!("drwxr-xr-x 2 0 0 0 {date} modules"),
    ];
    assert_eq!(rows[..3], expected);
    assert_eq!(
        rows[3..12],
        (0..9).map(|size| format!("-rw-r--r-- 1 0 0 {size} {date} modules/{size}.ko.xz")).collect::<Vec<_>>()
    );
    assert_eq!(
        rows[12..14],
        [format!("-rwxr-xr-x 1 0 0 100001 {date} init"), format!("lrwxrwxrwx 1 0 0 10 {date} sbin -> modules/..")]
    );
    let said = agrees("cpio", "cpio", &["--extract", "--to-stdout", "--quiet", "--file", text(&path), "modules/7.ko.xz"]);
    assert_eq!(said, String::from_utf8_lossy(&noise(7, 1)));
    let short = cpio::Archive::new(Vec::new(), 0).file_from(b"x", 0o644, &b"ab"[..], 3).unwrap_err();
    assert_eq!(short.kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn the_shipped_environment_is_grubs() {
    // GRUB's own parser has read it under SeaBIOS; here its script has to name what it names.
    for name in ["order", "good_a", "tries_a", "good_b", "tries_b"] {
        assert!(grub::Environment::shipped().get(name).is_some() && grub::CONFIGURATION.contains(name), "{name}");
    }
}

/// A raw image with data in odd places: at both ends, across tables, and zeros that are written.
fn raw_image(path: &Path, bytes: u64) {
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
    let noise = noise(3 << 20, 5);
    let text = "the same words again and again, as in files of text; ".repeat(40_000).into_bytes();
    file.write_all_at(&noise, 0).unwrap();
    file.write_all_at(&text, (32 << 20) - 1000).unwrap();
    file.write_all_at(&vec![0; 5 << 20], 40 << 20).unwrap();
    file.write_all_at(&noise[..700_000], (64 << 20) + 4096).unwrap();
    file.write_all_at(b"one", 70 << 20).unwrap();
    file.write_all_at(b"end", bytes - 3).unwrap();
}

#[test]
fn exports_come_back_and_are_the_same_twice() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (raw, solid) = (path("disk.raw"), path("solid.raw"));
    let program_path = std::env::var_os("PATH").unwrap();
    let length = 73 << 20;
    raw_image(&raw, length);
    // The same bytes without holes: how a file lies on its disk must not matter.
    agrees("coreutils", "cp", &["--sparse=never", text(&raw), text(&solid)]);
    let digest: [u8; 32] = noise(32, 4).try_into().unwrap();
    for format in export::Format::ALL {
        let (first, second, back) = (path("first"), path("second"), path("back"));
        export::export(&export::Export { pieces: &[&raw], digest: &digest, threads: 2, path: &program_path }, format, &first)
            .unwrap();
        export::export(&export::Export { pieces: &[&solid], digest: &digest, threads: 1, path: &program_path }, format, &second)
            .unwrap();
        assert!(fs_err::read(&first).unwrap() == fs_err::read(&second).unwrap(), "{format} is not the same twice");
        let convert =
            |from: &str| agrees("qemu-utils", "qemu-img", &["convert", "-f", from, "-O", "raw", text(&first), text(&back)]);
        let mut expected = length;
        match format {
            export::Format::Raw => drop(fs_err::copy(&first, &back).unwrap()),
            export::Format::Qcow2 | export::Format::Vmdk => {
                agrees("qemu-utils", "qemu-img", &["check", "-f", format.name(), text(&first)]);
                convert(format.name());
            }
            export::Format::Vhd => drop(convert("vpc")),
            export::Format::Gce => {
                expected = 1 << 30;
                let said = agrees("tar", "tar", &["--list", "--verbose", "--numeric-owner", "--gzip", "--file", text(&first)]);
                assert_eq!(said, "-rw-r--r-- 0/0      1073741824 1970-01-01 00:00 disk.raw\n");
                agrees("tar", "tar", &["--extract", "--gzip", "--file", text(&first), "--directory", text(folder.path())]);
            }
        }
        let back = if format == export::Format::Gce { raw.clone() } else { back };
        assert_eq!(fs_err::metadata(&back).unwrap().len(), expected, "{format}");
        agrees("diffutils", "cmp", &["--bytes", &length.to_string(), text(&solid), text(&back)]);
        if format != export::Format::Gce {
            assert!(fs_err::read(&back).unwrap() == fs_err::read(&solid).unwrap(), "{format} comes back as something else");
        }
    }
}

/// Bytes that somebody else wrote may be anything: errors, no panics, no endless loops.
#[test]
fn damaged_input_is_refused_or_read() {
    let folder = TempDir::new().unwrap();
    let open =
        |name: &str| File::options().read(true).write(true).create(true).truncate(true).open(folder.path().join(name)).unwrap();
    let (esp, disk) = (open("esp"), open("disk"));
    let format = fat::Format { bytes: 34 << 20, label: "ESP".into(), serial: 1, time: 0, hidden: 0 };
    let entries = [fat::Entry::bytes("a/long file name", noise(3000, 1)), fat::Entry::bytes("a/b/C", noise(300, 1))];
    fat::plan(&format, &entries).unwrap().write(&esp, 0).unwrap();
    let table = host_table();
    table.write(&disk).unwrap();
    let kernel = noise(999, 1);
    let image = uki::assemble(&uki::Parts { stub: &stub(), kernel: &kernel, initrd: &kernel, cmdline: "", osrel: "", uname: "" })
        .unwrap();
    // Boot sector, start of a table, the folders; header and entries of a partition table.
    let places: Vec<u64> = (0..90).chain(16_384..16_440).chain(fat_folders()).collect();
    let random = noise(1 << 13, 77);
    for (round, bytes) in random.chunks_exact(8).enumerate() {
        let place = places[round % places.len()];
        let mut old = [0; 1];
        esp.read_exact_at(&mut old, place).unwrap();
        esp.write_all_at(&bytes[..1], place).unwrap();
        if let Ok(mut volume) = fat::Volume::open(&esp, 0, 0) {
            let _ = (volume.list(), volume.read("a/long file name"), volume.read("a/b/C"));
            if round % 16 == 0 {
                let _ = (volume.write("a/new", b"x"), volume.rename("a/new", "newer"), volume.remove("a/newer"));
            }
        }
        esp.write_all_at(&old, place).unwrap();
        let place = 446 + u64::from(bytes[1]) + u64::from(bytes[2]) * 4;
        disk.read_exact_at(&mut old, place).unwrap();
        disk.write_all_at(&bytes[..1], place).unwrap();
        let _ = gpt::Gpt::read_any(&disk, table.sectors);
        disk.write_all_at(&old, place).unwrap();
        let mut broken = image.clone();
        broken[usize::from(bytes[3]) * 4] = bytes[0];
        broken[usize::from(bytes[4]) * 2] = bytes[5];
        let _ =
            uki::sections(&broken).map(|sections| sections.iter().map(|section| section.content(&broken).len()).sum::<usize>());
        let _ = uki::assemble(&uki::Parts { stub: &broken, kernel: &broken, initrd: b"", cmdline: "", osrel: "", uname: "" });
    }
    assert_eq!(gpt::Gpt::read(&disk, table.sectors).unwrap(), table);
}

/// Bytes of the three folders of the volume above: behind two tables of 536 sectors, clusters of one.
fn fat_folders() -> impl Iterator<Item = u64> {
    let first = (32 + 2 * 536) * 512;
    (0..3).flat_map(move |folder| (0..160).map(move |byte| first + folder * 512 + byte))
}
