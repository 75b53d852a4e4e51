//! GPT, FAT, verity, ext4: what stands on the disk, with the tools that made it as witnesses.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fat::{Device, Fat};
use crate::gpt::{self, Table};
use crate::guid::{Guid, Hash};
use crate::verity::Superblock;
use crate::{ext4, label};

fn tool(program: &str, arguments: &[&str]) -> String {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).env("MTOOLS_SKIP_CHECK", "1").output();
    let output = output.unwrap_or_else(|error| panic!("{program} is needed for this test: {error}"));
    let words = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {words}");
    words
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn read_table(path: &Path) -> Result<Table, String> {
    let bytes = fs_err::read(path).unwrap();
    let mut read = |at: u64, length: usize| {
        let at = at as usize;
        bytes.get(at..at + length).map(<[u8]>::to_vec).ok_or("behind the end".to_string())
    };
    gpt::parse(&mut read, bytes.len() as u64 / 512)
}

fn apply(path: &Path, writes: &[gpt::Write]) {
    let mut bytes = fs_err::read(path).unwrap();
    for write in writes {
        bytes[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
    }
    fs_err::write(path, bytes).unwrap();
}

/// A disk of `mib` MiB with an ESP and a partition for `/var` up to its end, made by sgdisk.
fn disk(folder: &Path, mib: u64) -> PathBuf {
    let path = folder.join("disk.raw");
    fs_err::File::create(&path).unwrap().set_len(mib << 20).unwrap();
    let var = "4D21B016-B534-45C2-A9FB-5C16E091FD2D";
    let esp = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
    let unique = "01234567-89ab-cdef-0123-456789abcdef";
    let new =
        ["-n", "2:2048:+4M", "-t", &format!("2:{esp}"), "-u", &format!("2:{unique}"), "-n", "7:0:0", "-t", &format!("7:{var}")];
    tool("sgdisk", &[&["-o"][..], &new, &[text(&path)]].concat());
    path
}

fn resize(path: &Path, mib: u64) {
    fs_err::OpenOptions::new().write(true).open(path).unwrap().set_len(mib << 20).unwrap();
}

#[test]
fn a_table_of_sgdisk_is_read_and_needs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path(), 16);
    let table = read_table(&path).unwrap();
    let found = table.partitions.iter().map(|each| (each.number, each.kind, each.first, each.last)).collect::<Vec<_>>();
    // sgdisk ends its last partition at the last usable sector, which is no multiple of 1 MiB.
    assert_eq!(found, [(2, gpt::ESP, 2048, 10239), (7, gpt::VAR, 10240, 32734)]);
    assert_eq!(table.partitions[0].unique.to_string(), "01234567-89ab-cdef-0123-456789abcdef");
    assert_eq!(table.find(table.partitions[0].unique).unwrap().number, 2);
    assert_eq!(table.fitted(32768, gpt::VAR), []);
    assert_eq!(table.least_sectors(), 32768);
}

#[test]
fn a_grown_disk_gets_its_second_table_at_the_end_and_a_larger_last_partition() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path(), 16);
    resize(&path, 24);
    let before = read_table(&path).unwrap();
    apply(&path, &before.fitted(49_152, gpt::VAR));
    let after = read_table(&path).unwrap();
    assert_eq!((after.partitions[1].first, after.partitions[1].last), (10240, 47_103));
    assert_eq!(after.partitions[0], before.partitions[0]);
    assert_eq!(after.fitted(49_152, gpt::VAR), []);
    let words = tool("sgdisk", &["-v", text(&path)]);
    assert!(words.contains("No problems found"), "{words}");
}

#[test]
fn only_the_last_partition_grows() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path(), 16);
    resize(&path, 24);
    let before = read_table(&path).unwrap();
    // The ESP is not at the end: the second copy moves, nothing grows.
    apply(&path, &before.fitted(49_152, gpt::ESP));
    let after = read_table(&path).unwrap();
    assert_eq!(after.partitions, before.partitions);
    assert!(tool("sgdisk", &["-v", text(&path)]).contains("No problems found"));
}

#[test]
fn a_power_cut_at_any_write_leaves_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path(), 16);
    resize(&path, 24);
    let original = fs_err::read(&path).unwrap();
    let before = read_table(&path).unwrap();
    let writes = before.fitted(49_152, gpt::VAR);
    assert_eq!(writes.len(), 5);
    for done in 0..=writes.len() {
        fs_err::write(&path, &original).unwrap();
        apply(&path, &writes[..done]);
        let table = read_table(&path).unwrap_or_else(|error| panic!("after {done} writes: {error}"));
        assert_eq!(table.from_backup, done == 3, "after {done} writes");
        // The next boot finishes the job.
        apply(&path, &table.fitted(49_152, gpt::VAR));
        assert_eq!(read_table(&path).unwrap().partitions[1].last, 47_103, "after {done} writes");
        let words = tool("sgdisk", &["-v", text(&path)]);
        assert!(words.contains("No problems found"), "after {done} writes: {words}");
    }
}

#[test]
fn what_is_no_table_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = disk(folder.path(), 16);
    let good = fs_err::read(&path).unwrap();
    let last = good.len() - 512;
    let cases: [(&str, &[usize], &str); 4] = [
        ("both headers", &[512, last], "has no GPT"),
        ("a byte of both headers", &[512 + 40, last + 40], "has a damaged GPT header"),
        ("a byte of both arrays", &[1024 + 130, last - 16384 + 130], "has damaged GPT entries"),
        ("the size of both headers", &[512 + 13, last + 13], "has a GPT header of a wrong size"),
    ];
    for (name, flips, wanted) in cases {
        let mut bytes = good.clone();
        flips.iter().for_each(|at| bytes[*at] ^= 0x10);
        fs_err::write(&path, &bytes).unwrap();
        assert_eq!(read_table(&path), Err(wanted.to_string()), "{name}");
    }
    // A smaller disk than the table says: its last partition lies behind the end.
    fs_err::write(&path, &good).unwrap();
    let table = read_table(&path).unwrap();
    assert_eq!(table.fitted(20_000, gpt::VAR), []);
}

#[test]
fn guids_have_mixed_endianness() {
    let hash = Hash::parse("00112233445566778899aabbccddeeff0f1e2d3c4b5a69788796a5b4c3d2e1f0").unwrap();
    let [data, tree] = hash.partitions();
    assert_eq!(data.to_string(), "00112233-4455-6677-8899-aabbccddeeff");
    assert_eq!(tree.to_string(), "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0");
    assert_eq!(data.0, [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]);
    assert_eq!(gpt::VAR.to_string(), "4d21b016-b534-45c2-a9fb-5c16e091fd2d");
    assert_eq!(gpt::ESP.to_string(), "c12a7328-f81f-11d2-ba4b-00a0c93ec93b");
    assert!(Guid([0; 16]).is_zero());
    for bad in ["", "00", &"g".repeat(64), &"0".repeat(63), &"é".repeat(32)] {
        assert_eq!(Hash::parse(bad), None, "{bad}");
    }
}

#[test]
fn crc32_of_the_standard_check_string() {
    assert_eq!(gpt::crc32(b"123456789"), 0xcbf4_3926);
}

#[test]
fn a_superblock_of_veritysetup_becomes_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let (data, tree) = (folder.path().join("data"), folder.path().join("tree"));
    fs_err::write(&data, vec![7; 40960]).unwrap();
    let salt = format!("--salt={}", "cd".repeat(32));
    let uuid = "--uuid=12345678-9abc-def0-1234-56789abcdef0";
    let words = tool("veritysetup", &["format", &salt, uuid, text(&data), text(&tree)]);
    let root = words.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim();
    let superblock = Superblock::parse(&fs_err::read(&tree).unwrap()).unwrap();
    assert_eq!(superblock.sectors(), 80);
    assert_eq!(superblock.uuid[..4], [0x12, 0x34, 0x56, 0x78]);
    let table = superblock.table("253:3", "253:4", &Hash::parse(root).unwrap());
    assert_eq!(table, format!("1 253:3 253:4 4096 4096 10 1 sha256 {root} {}", "cd".repeat(32)));
}

#[test]
fn damaged_superblocks_are_refused() {
    let mut good = vec![0; 512];
    good[..8].copy_from_slice(b"verity\0\0");
    good[8] = 1;
    good[12] = 1;
    good[32..38].copy_from_slice(b"sha256");
    good[64..68].copy_from_slice(&4096_u32.to_le_bytes());
    good[68..72].copy_from_slice(&4096_u32.to_le_bytes());
    good[72] = 3;
    assert_eq!(Superblock::parse(&good).unwrap().table("1:2", "3:4", &Hash([0; 32])).rsplit(' ').next(), Some("-"));
    let cases: [(usize, u8, &str); 6] = [
        (0, 0, "has no verity superblock"),
        (8, 2, "has a verity superblock of version 2"),
        (65, 0x11, "has a damaged verity superblock"),
        (72, 0, "has a damaged verity superblock"),
        (32, 0, "has a damaged verity superblock"),
        (81, 2, "has a damaged verity superblock"),
    ];
    for (at, value, wanted) in cases {
        let mut bytes = good.clone();
        bytes[at] = value;
        assert_eq!(Superblock::parse(&bytes).unwrap_err(), wanted, "byte {at}");
    }
    assert!(Superblock::parse(&good[..100]).is_err());
}

/// A file as a device; counts how many writes were made.
struct Image {
    bytes: RefCell<Vec<u8>>,
    writes: Vec<(u64, usize)>,
}

impl Device for &mut Image {
    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, String> {
        let bytes = self.bytes.borrow();
        bytes.get(offset as usize..offset as usize + length).map(<[u8]>::to_vec).ok_or("behind the end".into())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        self.writes.push((offset, bytes.len()));
        self.bytes.borrow_mut()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

/// An ESP of mtools with our files.
fn esp(folder: &Path) -> PathBuf {
    let path = folder.join("esp.img");
    tool("mkfs.fat", &["-C", "-F", "32", "-s", "1", "-n", "ESP", text(&path), "40960"]);
    let small = folder.join("small");
    fs_err::write(&small, "uki").unwrap();
    let env = folder.join("grubenv");
    fs_err::write(&env, crate::boot_tests::grubenv_block()).unwrap();
    let image = text(&path);
    tool("mmd", &["-i", image, "::EFI", "::EFI/Linux", "::grub"]);
    for name in ["pipeline_000001_a.efi", "pipeline_000002_b+3.efi", "other.efi"] {
        tool("mcopy", &["-i", image, text(&small), &format!("::EFI/Linux/{name}")]);
    }
    tool("mcopy", &["-i", image, text(&env), "::grub/grubenv"]);
    path
}

fn load(path: &Path) -> Image {
    Image { bytes: RefCell::new(fs_err::read(path).unwrap()), writes: Vec::new() }
}

#[test]
fn a_uki_is_renamed_in_place_and_mtools_and_fsck_agree() {
    let folder = tempfile::tempdir().unwrap();
    let path = esp(folder.path());
    let steps = [
        ("pipeline_000001_a.efi", "pipeline_000001_a+0-90.efi"),
        ("pipeline_000002_b+3.efi", "pipeline_000002_b+2-1.efi"),
        ("pipeline_000002_b+2-1.efi", "pipeline_000002_b.efi"),
        ("pipeline_000001_a+0-90.efi", "pipeline_000001_a.efi"),
    ];
    let mut names = vec!["pipeline_000001_a.efi", "pipeline_000002_b+3.efi", "other.efi"];
    for (old, new) in steps {
        let mut image = load(&path);
        let mut fat = Fat::open(&mut image).unwrap();
        let file = fat.file(&format!("/EFI/Linux/{old}")).unwrap();
        fat.rename(&file, new).unwrap();
        names.iter_mut().filter(|name| **name == old).for_each(|name| *name = new);
        let listed = fat.list("/efi/linux").unwrap().into_iter().filter(|entry| !entry.folder).map(|entry| entry.name);
        assert_eq!(listed.collect::<Vec<_>>(), names);
        // One write of the two parts of the long name: nothing in between can be seen.
        assert_eq!(image.writes.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [64], "{old} → {new}");
        fs_err::write(&path, image.bytes.into_inner()).unwrap();
        let shown = tool("mdir", &["-b", "-i", text(&path), "::EFI/Linux"]);
        let shown = shown.lines().map(|line| line.trim_start_matches("::/EFI/Linux/")).collect::<Vec<_>>();
        assert_eq!(shown, names);
        assert_eq!(tool("mtype", &["-i", text(&path), &format!("::EFI/Linux/{new}")]), "uki");
        tool("fsck.fat", &["-n", text(&path)]);
    }
}

#[test]
fn a_name_of_another_length_or_a_missing_file_is_refused_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = esp(folder.path());
    let mut image = load(&path);
    let mut fat = Fat::open(&mut image).unwrap();
    let long = fat.file("/EFI/Linux/pipeline_000001_a.efi").unwrap();
    let short = fat.file("/EFI/Linux/other.efi").unwrap();
    assert!(fat.rename(&long, "a.efi").unwrap_err().contains("in place"));
    assert!(fat.rename(&long, &"a".repeat(27)).unwrap_err().contains("in place"));
    assert!(fat.rename(&short, "b.efi").is_err());
    assert_eq!(fat.file("/EFI/Linux/none").unwrap_err(), "has no /EFI/Linux/none");
    assert_eq!(fat.list("/EFI/None").unwrap_err(), "has no folder /EFI/None");
    assert!(fat.overwrite(&long, b"longer than before").is_err());
    assert_eq!(image.writes, []);
}

#[test]
fn grubenv_is_changed_where_it_stands() {
    let folder = tempfile::tempdir().unwrap();
    let path = esp(folder.path());
    let mut image = load(&path);
    let mut fat = Fat::open(&mut image).unwrap();
    let file = fat.file("/grub/grubenv").unwrap();
    let old = fat.read(&file).unwrap();
    let new = crate::grubenv::edited(&old, &[("good_b".into(), "1")]).unwrap();
    fat.overwrite(&file, &new).unwrap();
    // The variables are in the first of its two sectors; only that one is written.
    assert_eq!(image.writes.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [512]);
    fs_err::write(&path, image.bytes.into_inner()).unwrap();
    assert_eq!(tool("mtype", &["-i", text(&path), "::grub/grubenv"]).as_bytes(), new);
    tool("fsck.fat", &["-n", text(&path)]);
}

#[test]
fn what_is_not_fat32_is_refused() {
    for bytes in [vec![0; 4096], vec![0xff; 4096]] {
        let mut image = Image { bytes: RefCell::new(bytes), writes: Vec::new() };
        assert_eq!(Fat::open(&mut image).err().as_deref(), Some("is not FAT32"));
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.img");
    tool("mkfs.fat", &["-C", "-F", "12", text(&path), "1440"]);
    let mut image = load(&path);
    assert_eq!(Fat::open(&mut image).err().as_deref(), Some("is not FAT32"));
}

#[test]
fn a_loop_in_the_allocation_table_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = esp(folder.path());
    let mut image = load(&path);
    {
        // The root's cluster 2 is followed by itself, and it has no end mark.
        let mut bytes = image.bytes.borrow_mut();
        let reserved = usize::from(u16::from_le_bytes([bytes[14], bytes[15]])) * 512;
        bytes[reserved + 8..reserved + 12].copy_from_slice(&2_u32.to_le_bytes());
        let fat_size = u32::from_le_bytes(bytes[36..40].try_into().unwrap()) as usize;
        let data = reserved + 2 * fat_size * 512;
        for record in bytes[data..data + 512].chunks_exact_mut(32) {
            record[0] = 0xe5;
        }
    }
    assert!(Fat::open(&mut image).unwrap().list("/").unwrap_err().contains("longer than it says"));
}

#[test]
fn ext4_is_recognised_clean_dirty_and_foreign() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("var");
    for (option, block_size, blocks) in [("1024", 1024, 40960), ("4096", 4096, 10240)] {
        fs_err::File::create(&path).unwrap().set_len(40 << 20).unwrap();
        tool("mkfs.ext4", &["-q", "-F", "-b", option, text(&path)]);
        let bytes = fs_err::read(&path).unwrap();
        let found = ext4::parse(&bytes[1024..2048]).unwrap();
        assert_eq!(found, ext4::Superblock { block_size, blocks, clean: true });
        // What the kernel leaves behind: mounted, with a journal to replay; and with an error seen.
        let cases = [((58, 0), (96, 4), true), ((58, 0), (96, 0), false), ((58, 3), (96, 4), false)];
        for ((at, state), (flags_at, flag), clean) in cases {
            let mut superblock = bytes[1024..2048].to_vec();
            superblock[at] = state;
            superblock[flags_at] |= flag;
            assert_eq!(ext4::parse(&superblock).unwrap().clean, clean, "state {state} flag {flag}");
        }
    }
    assert_eq!(ext4::parse(&[0; 1024]), None);
    assert_eq!(ext4::parse(&[0; 10]), None);
    let mut start = vec![0; 68 << 10];
    assert_eq!(ext4::foreign(&start), None);
    start[..6].copy_from_slice(b"LUKS\xba\xbe");
    assert_eq!(ext4::foreign(&start), Some("LUKS"));
}

#[test]
fn labels_of_fat_and_iso() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fat");
    for kind in ["12", "16", "32"] {
        let _ = fs_err::remove_file(&path);
        tool("mkfs.fat", &["-C", "-F", kind, "-n", "CIDATA", text(&path), "40960"]);
        let start = fs_err::read(&path).unwrap();
        assert_eq!(label::read(&start[..36 << 10]), Some(("vfat", "CIDATA".to_string())), "FAT{kind}");
    }
    let mut iso = vec![0; 36 << 10];
    iso[32768..32774].copy_from_slice(b"\x01CD001");
    iso[32808..32840].copy_from_slice(b"cidata                          ");
    assert_eq!(label::read(&iso), Some(("iso9660", "cidata".to_string())));
    assert_eq!(label::read(&[]), None);
    assert_eq!(label::read(&vec![0; 36 << 10]), None);
}
