//! Names, counters, and what firmware and kernel say.

use crate::alias::{matches, parse_aliases, parse_list};
use crate::slots::{Slot, State, UkiName, grub_marks, grub_state, is_grub_damaged};
use crate::wording::{ForApp, app_owner, environment, filled, for_app, hosts_with, is_hostname, owner};
use crate::{cmdline, grubenv, kmsg, smbios};

/// As grub-editenv writes it.
pub fn grubenv_block() -> Vec<u8> {
    let mut block = b"# GRUB Environment Block\norder=b a\ngood_a=1\ntries_a=0\ngood_b=0\ntries_b=3\n".to_vec();
    block.resize(1024, b'#');
    block
}

#[test]
fn the_last_word_of_the_command_line_counts() {
    let hash = "ab".repeat(32);
    let line = format!("a=1 pipeline.roothash=x pipeline.debug quiet \"pipeline.roothash={hash}\" xpipeline.roothash=y");
    assert_eq!(cmdline::value(&line, "pipeline.debug"), Some(""));
    assert_eq!(cmdline::value(&line, "pipeline.debu"), None);
    assert_eq!(cmdline::root_hash(&line).unwrap().to_string(), hash);
    assert_eq!(cmdline::root_hash("quiet").unwrap_err(), "the kernel command line has no pipeline.roothash=");
    assert!(cmdline::root_hash("pipeline.roothash=12").unwrap_err().contains("`12`"));
}

#[test]
fn uki_names_tell_slot_and_state() {
    let cases = [
        ("pipeline_000001_a.efi", Some((1, Slot::A, State::Good))),
        ("pipeline_000002_b+3.efi", Some((2, Slot::B, State::Trying(3)))),
        ("pipeline_000002_b+2-1.efi", Some((2, Slot::B, State::Trying(2)))),
        ("pipeline_000010_b+0-3.efi", Some((10, Slot::B, State::Bad))),
        ("PIPELINE_000010_B+0.EFI", Some((10, Slot::B, State::Bad))),
        ("pipeline_000001_c.efi", None),
        ("pipeline_x_a.efi", None),
        ("pipeline_000001_a+.efi", None),
        ("pipeline_000001_a+1-x.efi", None),
        ("other.efi", None),
        ("pipeline_000001_a", None),
    ];
    for (name, wanted) in cases {
        let found = UkiName::parse(name).map(|uki| (uki.generation, uki.slot, uki.state));
        assert_eq!(found, wanted, "{name}");
    }
    let uki = UkiName::parse("pipeline_000002_b+2-1.efi").unwrap();
    assert_eq!((uki.good().as_str(), uki.bad().as_str()), ("pipeline_000002_b.efi", "pipeline_000002_b+0-90.efi"));
    let damaged =
        ["pipeline_000002_b+0-90.efi", "pipeline_000002_b+0-91.efi", "pipeline_000002_b+0-3.efi", "pipeline_000002_b+2-90.efi"];
    assert_eq!(damaged.map(|name| UkiName::parse(name).unwrap().damaged), [true, true, false, false]);
}

#[test]
fn all_names_of_a_slot_need_the_same_number_of_records() {
    for counter in ["", "+3", "+2-1", "+1-2", "+0-3", "+0-90"] {
        for generation in ["000001", "999999"] {
            let length = format!("pipeline_{generation}_a{counter}.efi").len();
            assert_eq!(length.div_ceil(13), 2, "{generation}{counter}");
        }
    }
}

#[test]
fn grub_variables_tell_the_state() {
    let variables = grubenv::parse(&grubenv_block()).unwrap();
    assert_eq!(Slot::ALL.map(|slot| grub_state(&variables, slot)), [State::Good, State::Trying(3)]);
    let cases = [
        ("order=a\ngood_a=1\ntries_a=0\ngood_b=0\ntries_b=0", [State::Good, State::Empty]),
        ("order=b a\ngood_a=1\ngood_b=0\ntries_b=0", [State::Good, State::Bad]),
        ("order=b a\ngood_a=0\ntries_a=0\ngood_b=1\ntries_b=2", [State::Bad, State::Good]),
        ("", [State::Empty, State::Empty]),
    ];
    for (text, wanted) in cases {
        let variables = grubenv::parse(format!("# GRUB Environment Block\n{text}\n###").as_bytes()).unwrap();
        assert_eq!(Slot::ALL.map(|slot| grub_state(&variables, slot)), wanted, "{text}");
    }
}

#[test]
fn grubenv_keeps_what_it_does_not_know() {
    let block = b"# GRUB Environment Block\nsaved_entry=x=y\norder=b a\ntries_b=2\n####".to_vec();
    let edited = grubenv::edited(&block, &grub_marks(Slot::B, true)).unwrap();
    let wanted = "# GRUB Environment Block\nsaved_entry=x=y\norder=b a\ntries_b=0\ngood_b=1\n";
    assert_eq!((edited.len(), &edited[..wanted.len()]), (1024, wanted.as_bytes()));
    assert!(edited[wanted.len()..].iter().all(|byte| *byte == b'#'));
    assert!(grubenv::edited(b"nothing", &[]).is_err());
    let damaged = grubenv::edited(&block, &grub_marks(Slot::B, false)).unwrap();
    let [before, after] = [&block, &damaged].map(|block| is_grub_damaged(&grubenv::parse(block).unwrap(), Slot::B));
    assert_eq!((before, after), (false, true));
    assert_eq!(grubenv::edited(&block, &[("long".into(), &"x".repeat(1000))]).unwrap_err(), "grubenv is full");
}

#[test]
fn only_the_kernel_says_that_a_block_is_corrupted() {
    let cases = [
        ("3,812,6012345,-;device-mapper: verity: 253:3: data block 37000 is corrupted\n SUBSYSTEM=x\n", true),
        ("3,812,6012345,-;device-mapper: verity: 253:4: metadata block 2 is corrupted\n", true),
        // Written by a process into /dev/kmsg: the facility is not the kernel's.
        ("11,812,6012345,-;device-mapper: verity: 253:3: data block 37000 is corrupted\n", false),
        ("3,812,6012345,-;x\n KEY=device-mapper: verity: 253:3: data block 1 is corrupted\n", false),
        ("6,812,6012345,-;device-mapper: verity: sha256 using shash\n", false),
        ("", false),
    ];
    for (record, wanted) in cases {
        assert_eq!(kmsg::is_corruption(record), wanted, "{record}");
    }
}

fn structure(kind: u8, formatted: &[u8], strings: &[&str]) -> Vec<u8> {
    let mut out = vec![kind, 4 + formatted.len() as u8, 0, 0];
    out.extend(formatted);
    strings.iter().for_each(|each| out.extend([each.as_bytes(), b"\0"].concat()));
    out.extend(if strings.is_empty() { &[0, 0][..] } else { &[0] });
    out
}

#[test]
fn firmware_tables_give_the_uuid_and_the_strings() {
    let uuid = [0x84, 0x73, 0xb0, 0xd3, 0xa0, 0xd9, 0x1b, 0x4c, 0x9f, 0x3a, 1, 2, 3, 4, 5, 6];
    let system = [&[1, 2, 3, 4][..], &uuid, &[6, 0, 0]].concat();
    let mut bytes = structure(0, &[1; 20], &["BIOS"]);
    bytes.extend(structure(1, &system, &["QEMU", "x"]));
    bytes.extend(structure(11, &[2], &["io.systemd.credential:a=b", "other"]));
    bytes.extend(structure(11, &[1], &["third"]));
    bytes.extend(structure(127, &[], &[]));
    let table = smbios::parse(&bytes);
    let strings = table.strings.iter().map(|each| String::from_utf8_lossy(each)).collect::<Vec<_>>();
    assert_eq!(strings, ["io.systemd.credential:a=b", "other", "third"]);
    assert_eq!(table.uuid.unwrap()[..6], [0xd3, 0xb0, 0x73, 0x84, 0xd9, 0xa0]);
    // Cut anywhere it is read up to there.
    for length in 0..bytes.len() {
        smbios::parse(&bytes[..length]);
    }
}

#[test]
fn only_a_real_uuid_names_a_machine() {
    let counted: [u8; 16] = std::array::from_fn(|index| index as u8);
    let vendor = [3, 0, 2, 0, 4, 0, 5, 0, 0, 6, 0, 7, 0, 8, 0, 9];
    for (uuid, wanted) in [([0; 16], false), ([0xff; 16], false), (counted, false), (vendor, false)] {
        assert_eq!(smbios::is_real(&uuid), wanted, "{uuid:?}");
    }
    assert!(smbios::is_real(&[0xd3, 0xb0, 0x73, 0x84, 0xd9, 0xa0, 0x4c, 0x1b, 0x9f, 0x3a, 1, 2, 3, 4, 5, 6]));
}

#[test]
fn credentials_of_the_firmware() {
    let ok = |name: &str, value: &str| Some((name.to_string(), Ok(value.as_bytes().to_vec())));
    let cases = [
        ("io.systemd.credential:a.b=c=d", ok("a.b", "c=d")),
        ("io.systemd.credential.binary:x=aGVsbG8=", ok("x", "hello")),
        ("io.systemd.credential.binary:x=aGVs bG8", ok("x", "hello")),
        ("io.systemd.credential.binary:x=a", Some(("x".into(), Err("is not base64".into())))),
        ("io.systemd.credential.binary:x=a*==", Some(("x".into(), Err("is not base64".into())))),
        ("io.systemd.credential:novalue", None),
        ("something else", None),
    ];
    for (string, wanted) in cases {
        assert_eq!(smbios::credential(string.as_bytes()), wanted, "{string}");
    }
}

#[test]
fn aliases_fit_as_with_fnmatch() {
    let cases = [
        ("pci:v00008086d00007010sv*sd*bc*sc*i*", "pci:v00008086d00007010sv00001AF4sd00001100bc01sc01i80", true),
        ("pci:v*d*sv*sd*bc01sc08i02*", "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02", true),
        ("pci:v*d*sv*sd*bc01sc08i02*", "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc06i01", false),
        ("virtio:d00000002v*", "virtio:d00000002v00001AF4", true),
        ("scsi:t-0x00*", "scsi:t-0x05", false),
        ("acpi*:QEMU0002:*", "acpi:QEMU0002:", true),
        ("a[0-3x]c", "a2c", true),
        ("a[0-3x]c", "axc", true),
        ("a[0-3x]c", "a4c", false),
        ("a?c", "abc", true),
        ("a?c", "ac", false),
        ("*", "", true),
        ("", "", true),
        ("", "a", false),
        ("a*b*c", "aXbXbXc", true),
        ("a*b*c", "aXbXbX", false),
        ("a[", "a[", false),
    ];
    for (pattern, text, wanted) in cases {
        assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), wanted, "{pattern} {text}");
    }
}

#[test]
fn the_files_of_the_initrd() {
    let list = parse_list("# comment\ndm-verity dm-verity.ko.xz dm_mod,dm-bufio\ndm_mod dm-mod.ko.xz -\n\nbroken\n");
    assert_eq!(list.len(), 2);
    assert_eq!(list["dm_verity"], ("dm-verity.ko.xz".to_string(), vec!["dm_mod".to_string(), "dm_bufio".to_string()]));
    assert_eq!(list["dm_mod"], ("dm-mod.ko.xz".to_string(), vec![]));
    let aliases = parse_aliases("# x\nalias virtio:d00000002v* virtio-blk\nalias broken\n");
    assert_eq!(aliases, [("virtio:d00000002v*".to_string(), "virtio_blk".to_string())]);
}

#[test]
fn names_of_credentials_for_apps() {
    let cases = [
        ("app.notes.env", Some(ForApp::Environment { app: "notes" })),
        ("app.notes.secret.TOKEN", Some(ForApp::Secret { app: "notes", key: "TOKEN" })),
        ("app.notes.secret.env", Some(ForApp::Secret { app: "notes", key: "env" })),
        ("app.a.b.env", Some(ForApp::Environment { app: "a.b" })),
        ("app..env", None),
        ("app.notes", None),
        ("app.notes.secret.", None),
        ("system.hostname", None),
    ];
    for (name, wanted) in cases {
        assert_eq!(for_app(name), wanted, "{name}");
    }
}

#[test]
fn values_arrive_as_they_were_written() {
    let text = "A=1\n# comment\n\nB=a b\nC=\"x y\"\nD='q'\nE=a\"b$c`d\\e\nF=\n1X=no\nnothing\r\nG=1\r\n";
    let (lines, wrong) = environment(text);
    let wanted = "A=\"1\"\nB=\"a b\"\nC=\"x y\"\nD=\"q\"\nE=\"a\\\"b\\$c\\`d\\\\e\"\nF=\"\"\nG=\"1\"\n";
    assert_eq!((lines.as_str(), wrong), (wanted, vec![9, 10]));
}

#[test]
fn users_and_owners() {
    let passwd = "root:x:0:0:root:/root:/bin/bash\nana:x:1000:1001::/home/ana:/bin/sh\nbroken\n";
    assert_eq!((owner(passwd, "ana"), owner(passwd, "bob"), owner(passwd, "root")), (Some((1000, 1001)), None, Some((0, 0))));
    let cases = [
        (r#"{"uid_base": 655360, "user": 1000, "health": null}"#, Some(656_360)),
        (r#"{"uid_base": 655360, "user": 0}"#, Some(655_360)),
        (r#"{"uid_base": 655360}"#, None),
        (r#"{"uid_base": "x", "user": 0}"#, None),
        ("{", None),
    ];
    for (text, wanted) in cases {
        assert_eq!(app_owner(text), wanted, "{text}");
    }
}

#[test]
fn hostnames() {
    let long = "a".repeat(64);
    let cases =
        [("web-1", true), ("web.example.org", true), ("", false), ("-a", false), ("a..b", false), ("a_b", false), (&long, false)];
    for (name, wanted) in cases {
        assert_eq!(is_hostname(name), wanted, "{name}");
    }
}

#[test]
fn a_machine_finds_its_own_name() {
    let own = |before: &str| Some(format!("{before}127.0.1.1\tweb\n"));
    let cases = [
        (None, own("127.0.0.1\tlocalhost\n::1\tlocalhost\n")),
        (Some(""), own("")),
        (Some("127.0.0.1 localhost # web"), own("127.0.0.1 localhost # web\n")),
        (Some("127.0.1.1 build\n::1 webs\n"), own("::1 webs\n")),
        (Some("127.0.0.1\tlocalhost web\n"), None),
        (Some("192.0.2.7 web.example.org\tweb # ours\n"), None),
    ];
    for (hosts, wanted) in cases {
        assert_eq!(hosts_with(hosts, "web"), wanted, "{hosts:?}");
    }
}

/// Pinned: a machine keeps its name over updates.
#[test]
fn hostnames_of_a_pattern() {
    let id = "0123456789abcdef0123456789abcdef";
    let name = filled("web-????-x?", id);
    assert!(is_hostname(&name) && name.starts_with("web-") && !name.contains('?'), "{name}");
    assert_eq!(name, filled("web-????-x?", id));
    assert_ne!(name, filled("web-????-x?", "1123456789abcdef0123456789abcdef"));
    assert_eq!(filled("web", id), "web");
}
