//! `pipeline boot` and `pipeline test` with real QEMU and a guest of 512 bytes.
//!
//! The guest counts its boots on its disk, prints them on the serial console, echoes what is typed there, and does
//! what a letter says: `r` resets, `o` switches off, `k` says that the kernel panics. No kernel is needed, and a boot
//! takes a fraction of a second, also under emulation.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{Project, Run, free_port, me, tool, users};

/// Assembled by hand; real mode, loaded at 0x7c00. `01` to `0b` set up segments and stack.
#[rustfmt::skip]
const CODE: [u8; 0x8d] = [
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, // 00 xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax
    0xbc, 0x00, 0x7c, 0xfc,                         // 08 mov sp,0x7c00; cld
    0xb8, 0x01, 0x02, 0xe8, 0x54, 0x00,             // 0c mov ax,0x0201 (read a sector); call disk
    0xb8, 0x01, 0x03, 0xfe, 0x06, 0x00, 0x7e,       // 12 mov ax,0x0301 (write it); inc byte [0x7e00]
    0xe8, 0x4a, 0x00,                               // 19 call disk
    0xbe, 0x8d, 0x7c, 0xe8, 0x51, 0x00,             // 1c mov si,BOOT; call print
    0xa0, 0x00, 0x7e, 0xe8, 0x56, 0x00,             // 22 mov al,[0x7e00]; call put
    0xbe, 0x93, 0x7c, 0xe8, 0x45, 0x00,             // 28 mov si,READY; call print
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, // 2e loop: mov dx,0x3fd; in al,dx; test al,1; jz loop
    0xba, 0xf8, 0x03, 0xec,                         // 36 mov dx,0x3f8; in al,dx
    0x3c, b'r', 0x74, 0x0d,                         // 3a cmp al,'r'; je reset
    0x3c, b'o', 0x74, 0x11,                         // 3e cmp al,'o'; je off
    0x3c, b'k', 0x74, 0x16,                         // 42 cmp al,'k'; je panic
    0xe8, 0x35, 0x00, 0xeb, 0xe3,                   // 46 call put; jmp loop
    0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xeb, 0x0f, // 4b reset: mov dx,0xcf9; mov al,6; out dx,al; jmp halt
    0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef,       // 53 off: mov dx,0x604; mov ax,0x2000 (ACPI S5); out dx,ax
    0xeb, 0x06,                                     // 5a jmp halt
    0xbe, 0xa3, 0x7c, 0xe8, 0x11, 0x00,             // 5c panic: mov si,PANIC; call print
    0xfa, 0xf4, 0xeb, 0xfc,                         // 62 halt: cli; hlt; jmp halt
    0xb9, 0x02, 0x00, 0xb6, 0x00,                   // 66 disk: mov cx,2 (second sector); mov dh,0
    0xbb, 0x00, 0x7e, 0x52, 0xcd, 0x13, 0x5a, 0xc3, // 6b mov bx,0x7e00; push dx; int 0x13; pop dx; ret
    0xac, 0x84, 0xc0, 0x74, 0x05,                   // 73 print: lodsb; test al,al; jz 7d
    0xe8, 0x03, 0x00, 0xeb, 0xf6, 0xc3,             // 78 call put; jmp print; 7d: ret
    0x50, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x20,       // 7e put: push ax; mov dx,0x3fd; 82: in al,dx; test al,0x20
    0x74, 0xfb, 0x58, 0xba, 0xf8, 0x03, 0xee, 0xc3, // 85 jz 82; pop ax; mov dx,0x3f8; out dx,al; ret
];
/// At 0x8d, 0x93 and 0xa3.
const TEXTS: &[u8] = b"boot \0 ready\r\nlogin: \0\r\nKernel panic - not syncing: as asked\r\n\0";

/// The guest's disk: its code, and the number of boots as a digit in the second sector.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; 1 << 20];
    disk[..CODE.len()].copy_from_slice(&CODE);
    disk[CODE.len()..CODE.len() + TEXTS.len()].copy_from_slice(TEXTS);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512] = b'0';
    disk
}

/// A project with the guest's disk.
fn project(user: common::User) -> Project {
    tool("qemu-system-x86_64", "qemu-system-x86");
    tool("qemu-img", "qemu-utils");
    let project = Project::empty(user);
    project.write("disk.raw", disk());
    project
}

/// What is typed after `text` was printed, and then the next.
fn boot(project: &Project, args: &[&str]) -> Run {
    project.pipeline(&["boot", "disk.raw"]).args(args)
}

/// Machines of this project that run: their processes hold its folder in their arguments.
fn machines(project: &Project) -> Vec<String> {
    let root = project.root.to_str().unwrap();
    let processes = fs_err::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| fs_err::read_to_string(process.path().join("cmdline")).ok());
    lines.filter(|line| line.contains("qemu-system") && line.contains(root)).collect()
}

/// Folders of machines that are left.
fn folders(project: &Project) -> usize {
    let entries = fs_err::read_dir(project.root.join("cache/vm")).unwrap().flatten();
    entries.filter(|entry| entry.path().is_dir()).count()
}

fn until(what: &str, mut met: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !met() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_test_of_every_step_that_needs_no_agent() {
    for user in users() {
        let project = project(user);
        let text = "disk: ../disk.raw\nfirmware: [bios]\nallow-panic: false\nsteps:\n\
            - boot:\n- wait-for: { console: boot 1 ready }\n- type: { text: hi }\n- wait-for: { console: 'login: hi' }\n\
            - screenshot: { file: screen.png }\n- screenshot: { file: screen.ppm }\n\
            - reboot: { hard: true }\n- wait-for: { console: boot 2 ready }\n\
            - type: { text: r }\n- wait-for: { console: ready, count: 2 }\n\
            - power-cut:\n- wait-for: { console: boot 4 ready }\n\
            - power-cut: { start: false }\n- flip: { text: login }\n- flip: { offset: 512 }\n- flip: { offset: 512 }\n\
            - boot: {}\n- wait-for: { console: boot 5 ready }\n- wait-for: { console: 'ogin: ' }\n\
            - type: { text: k }\n- wait-for: { panic: true }\n- wait-for: { console: as asked }\n\
            - power-cut:\n- wait-for: { console: boot 6 }\n- type: { text: o }\n- wait-for: { off: true }\n";
        project.write("vm-tests/all.yaml", text);
        let answer = project.pipeline(&["test", "--output", "results", "--junit", "junit.xml"]).ok();
        answer.says("accelerator: ").says("all (bios): 26/26 wait-for off: ok");
        assert!(project.read("junit.xml").contains("<testsuites name=\"vm-tests\" tests=\"26\" failures=\"0\""));
        let results = project.dir.join("results/all-bios");
        assert!(fs_err::read(results.join("screen.png")).unwrap().starts_with(b"\x89PNG"));
        assert!(fs_err::read(results.join("screen.ppm")).unwrap().starts_with(b"P6"));
        let console = fs_err::read(results.join("console.log")).unwrap();
        assert!(String::from_utf8_lossy(&console).ends_with("boot 6 ready\r\n\u{fffd}ogin: "), "{console:?}");
        // The disk itself is as it was, and nothing runs or lies about.
        assert_eq!(fs_err::read(project.dir.join("disk.raw")).unwrap(), disk());
        assert_eq!((machines(&project), folders(&project)), (Vec::new(), 0));
    }
}

#[test]
fn both_firmwares_and_a_guest_that_never_gets_there() {
    tool("qemu-system-x86_64", "qemu-system-x86");
    assert!(Path::new("/usr/share/ovmf").exists() || Path::new("/usr/share/OVMF").exists(), "package ovmf");
    let project = project(me());
    // UEFI does not start boot sectors, so this guest is silent there.
    let text =
        "disk: ../disk.raw\nfirmware: [uefi, bios]\nsteps:\n- boot:\n- wait-for: { console: boot 1 ready, timeout: 20s }\n";
    project.write("vm-tests/two.yaml", text);
    let answer = project.pipeline(&["test", "--keep-going", "--json"]).run();
    answer.code(1).says("error: `two` (uefi) failed in step 2 of 2, wait-for console `boot 1 ready`");
    answer.says("at: vm-tests/two.yaml:5").says("came: nothing of it within 20 s").says("the whole console is in ");
    answer.says("two (bios): 2/2 wait-for console `boot 1 ready`: ok");
    let json = answer.json();
    assert_eq!((&json["passed"], &json["failed"], &json["not_run"]), (&1.into(), &1.into(), &0.into()));
    let only = project.pipeline(&["test", "--bios"]).ok();
    only.prints("two  bios  ok");
}

#[test]
fn a_panic_and_a_powered_off_guest_fail_at_once_with_the_console() {
    let project = project(me());
    let cases = [
        ("k", "came: the guest panicked: Kernel panic - not syncing: as asked"),
        ("o", "came: the machine has switched itself off"),
    ];
    for (letter, came) in cases {
        let text = format!(
            "disk: ../disk.raw\nsteps:\n- boot:\n- wait-for: {{ console: ready }}\n- type: {{ text: {letter} }}\n\
             - wait-for: {{ console: never, timeout: 10m }}\n- power-off:\n"
        );
        project.write("vm-tests/bad.yaml", text);
        let started = Instant::now();
        let answer = project.pipeline(&["test", "vm-tests/bad.yaml"]).run();
        answer.code(1).says(came).says("    | boot 1 ready").says("failed in step 4 of 5");
        assert!(started.elapsed() < Duration::from_secs(300), "waited for what cannot come");
    }
}

#[test]
fn what_is_wrong_in_a_test_is_shown_with_a_caret() {
    let project = project(me());
    let cases = [
        (
            "steps:\n- boot:\n- wiat-for: { console: x }\n",
            "vm-tests/x.yaml:3:3: unknown key `wiat-for`\n    3 | - wiat-for: { console: x }\n      |   ^^^^^^^^\nhint: did you mean `wait-for`?",
        ),
        (
            "steps:\n- boot:\n- wait-for: { consol: x }\n",
            "vm-tests/x.yaml:3:15: unknown key `consol`\n    3 | - wait-for: { consol: x }\n      |               ^^^^^^\nhint: did you mean `console`?",
        ),
        (
            "steps:\n- boot:\n- wait-for: { console: x, timeout: 90 }\n",
            "vm-tests/x.yaml:3:36: `90` is not a duration\n    3 | - wait-for: { console: x, timeout: 90 }\n      |                                    ^^\nhint: for seconds write `90s`",
        ),
        ("firmware: [efi]\nsteps: [boot: {}]\n", "item 1 of `firmware` cannot be `efi`"),
        ("steps:\n- wait-for: { console: x }\n", "the machine is not switched on yet"),
        ("steps: []\n", "`steps` is empty"),
        ("disk: x\n", "the key `steps` is missing"),
        ("steps:\n- boot:\n- wait-for: { console: x, unit: y }\n", "`wait-for` needs exactly one of `console`, `agent`"),
        ("steps:\n- boot:\n  http: { port: 80 }\n", "a step has exactly one kind"),
        ("steps:\n- boot:\n- http:\n", "`http` needs a mapping"),
        ("steps:\n- boot:\n- run: { command: x, stdout: '${ID}' }\n", "the variable `ID` is not saved by an earlier step"),
        ("steps:\n- boot:\n- file: { path: etc/x }\n", "`etc/x` is not an absolute path"),
        ("steps:\n- boot:\n- file: { path: /x, mode: 99 }\n", "`99` is not a file's permissions"),
        ("steps:\n- boot:\n- screenshot: { file: x.jpg }\n", "`x.jpg` ends neither in `.png` nor in `.ppm`"),
        ("disks: [{ bus: ide }]\nsteps:\n- boot:\n", "a disk needs `file` or `size`"),
        ("credentials: { a: { file: none } }\nsteps:\n- boot:\n", "the file `none` does not exist"),
        ("memory: 1M\nsteps:\n- boot:\n", "`memory` is too small"),
        ("disk: Big_Name\nsteps:\n- boot:\n", "`Big_Name` is not a name"),
    ];
    for (text, expected) in cases {
        project.write("vm-tests/x.yaml", text);
        let answer = project.pipeline(&["test", "vm-tests/x.yaml", "--disk", "disk.raw"]).run();
        answer.code(2).says(expected);
    }
}

#[test]
fn disks_and_tests_that_are_not_there() {
    let project = project(me());
    let cases: [(&[&str], &str, &str); 6] = [
        (&["boot", "nothing.qcow2"], "the disk `nothing.qcow2` does not exist", "pipeline bake"),
        (&["boot", "appliance"], "`appliance`", "pipeline bake appliance"),
        (&["test"], "there is no folder `vm-tests`", "docs/vm-tests.md"),
        (&["test", "vm-tests/none.yaml"], "vm-tests/none.yaml does not exist", ""),
        (&["boot", "disk.raw", "--memory", "1M"], "`--memory` is too small", "16M"),
        (&["boot", "disk.raw", "--disk-size", "1K"], "cannot shrink to 1024", "larger"),
    ];
    for (args, message, hint) in cases {
        let answer = project.pipeline(args).run();
        assert_ne!(answer.status.code(), Some(0), "{args:?}");
        answer.says(message).says(hint);
    }
    project.write("vm-tests/x.yaml", "steps:\n- boot:\n");
    project.pipeline(&["test"]).run().code(2).says("the test `x` names no disk").says("--disk NAME");
}

#[test]
fn the_console_on_the_terminal() {
    for user in users() {
        let project = project(user);
        // Typed ahead: the guest takes it when it has booted. ^A ^A is ^A; the guest echoes, and `o` switches off.
        let answer = boot(&project, &["--port", "0:80"]).input("ab\u{1}\u{1}co").ok();
        answer.prints("boot 1 ready").prints("login: ab\u{1}c");
        answer.says("disk.raw: BIOS (SeaBIOS), ").says("changes are thrown away").says(" is port 80 of the guest");
        assert_eq!(fs_err::read(project.dir.join("disk.raw")).unwrap()[512], b'0');
        boot(&project, &[]).input("a\u{1}x").ok().says("^A x ends the machine");
        boot(&project, &["--keep"]).input("o").ok().says("changes are kept in the disk");
        assert_eq!(fs_err::read(project.dir.join("disk.raw")).unwrap()[512], b'1');
        boot(&project, &["--keep", "--disk-size", "2M"]).input("o").ok().prints("boot 2 ready");
        assert_eq!(fs_err::metadata(project.dir.join("disk.raw")).unwrap().len(), 2 << 20);
        assert_eq!((machines(&project), folders(&project)), (Vec::new(), 0));
    }
}

#[test]
fn ports_in_use_are_told() {
    let project = project(me());
    let port = free_port();
    let _taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    let answer = boot(&project, &["--port", &format!("{port}:80")]).run();
    answer.code(1).says(&format!("port {port} of 127.0.0.1 is in use")).says("port 0 lets the kernel choose one");
    assert_eq!(folders(&project), 0);
}

#[test]
fn qemu_that_cannot_start_or_is_killed_is_told() {
    let project = project(me());
    boot(&project, &["--", "-device", "no-such-device"])
        .run()
        .code(1)
        .says("QEMU could not start the machine")
        .says("no-such-device");
    let mut running = boot(&project, &[]).start();
    running.wait_for("login: ");
    let pid = fs_err::read_dir("/proc").unwrap().flatten().find_map(|process| {
        let line = fs_err::read_to_string(process.path().join("cmdline")).ok()?;
        let is_ours = line.contains("qemu-system") && line.contains(project.root.to_str()?);
        is_ours.then(|| process.file_name().to_string_lossy().parse::<i32>().ok())?
    });
    let pid = rustix::process::Pid::from_raw(pid.unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let answer = running.wait(Duration::from_secs(60));
    answer.code(1).says("the machine is gone: QEMU ended with signal 9").says("boot 1 ready");
}

#[test]
fn a_killed_run_leaves_no_machine_and_the_next_sweeps_its_folder() {
    let project = project(me());
    project.write("vm-tests/x.yaml", "disk: ../disk.raw\nsteps:\n- boot:\n- wait-for: { console: never }\n");
    for args in [&["test"][..], &["boot", "disk.raw"]] {
        let mut running = project.pipeline(args).start();
        let console = if args[0] == "test" { "boot: ok" } else { "login: " };
        running.wait_for(console);
        assert_eq!(machines(&project).len(), 1);
        running.signal(9);
        running.wait(Duration::from_secs(60));
        until("the end of QEMU", || machines(&project).is_empty());
        assert_eq!(folders(&project), 1, "nothing was left that could be swept");
        boot(&project, &[]).input("o").ok();
        assert_eq!(folders(&project), 0);
    }
    // Asked to stop, it cleans up by itself.
    for (signal, code) in [(15, 143), (2, 130)] {
        let mut running = project.pipeline(&["test"]).start();
        running.wait_for("boot: ok");
        running.signal(signal);
        running.wait(Duration::from_secs(60)).code(code);
        assert_eq!((machines(&project), folders(&project)), (Vec::new(), 0));
    }
}

#[test]
fn credentials_are_on_no_command_line_and_in_no_readable_file() {
    use std::os::unix::fs::PermissionsExt as _;
    let project = project(me());
    project.write("secret.txt", "hunter2-file\n");
    let args = ["--credential", "a.b=@secret.txt", "--credential", "c=plain value"];
    let mut running = boot(&project, &args).start();
    running.wait_for("login: ");
    let lines = machines(&project);
    assert_eq!(lines.len(), 1);
    assert!(lines[0].contains("type=11,path=") && !lines[0].contains("hunter2"), "{}", lines[0]);
    let folder =
        fs_err::read_dir(project.root.join("cache/vm")).unwrap().flatten().find(|entry| entry.path().is_dir()).unwrap().path();
    let mode = |path: &Path| fs_err::metadata(path).unwrap().permissions().mode() & 0o777;
    let file = folder.join("credential-0");
    assert_eq!((mode(&folder), mode(&file)), (0o700, 0o600));
    assert_eq!(fs_err::read_to_string(&file).unwrap(), "io.systemd.credential.binary:a.b=aHVudGVyMi1maWxlCg==");
    assert_eq!(fs_err::read_to_string(folder.join("credential-1")).unwrap(), "io.systemd.credential:c=plain value");
    running.signal(15);
    running.wait(Duration::from_secs(60)).code(143);
}

#[test]
fn the_schema_is_of_the_format_that_is_read() {
    let project = project(me());
    let schema = project.pipeline(&["schema", "vm-test"]).ok().json();
    assert_eq!((&schema["title"], &schema["required"]), (&"vm-test".into(), &serde_json::json!(["steps"])));
    assert!(schema.pointer("/$defs/StepFile/properties/wait-for").is_some());
    assert_eq!(project.pipeline(&["schema"]).ok().json()["title"], "pipeline");
}
