//! QEMU's command line for a machine: a pure function of settings and what was prepared.
//!
//! Nothing secret is on it: other users can read it in `/proc`.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::accelerator::Accelerator;
use super::firmware::Files;
use super::settings::{Board, Bus, Card, Format, Settings, Start};

/// Name of the guest's end of the command channel.
pub const PORT: &str = "io.pipeline.agent";
/// PCI Express slots of AHCI, for `sata` on a board without.
const AHCI: &str = "ich9-ahci,id=sata";

/// A disk file as QEMU opens it.
#[derive(Debug, Clone, PartialEq)]
pub struct Drive {
    pub path: PathBuf,
    pub format: Format,
    pub bus: Bus,
    /// Whether what the guest asks to be written out may stay in memory: only where nothing outlives the machine.
    pub unsafe_cache: bool,
}

/// How QEMU is talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sockets {
    /// Numbers of sockets it inherits: nobody else can connect.
    Inherited { console: i32, qmp: i32, agent: i32 },
    /// For a machine that outlives who started it: the console is standard output, `qmp` and `agent` are sockets in the
    /// folder it runs in.
    Kept,
}

/// What was prepared for a start.
#[derive(Debug, Clone)]
pub struct Prepared<'a> {
    pub accelerator: Accelerator,
    /// `None`: SeaBIOS, QEMU's own.
    pub firmware: Option<&'a Files>,
    pub drives: &'a [Drive],
    /// A file each, holding the text of an SMBIOS string.
    pub smbios: &'a [PathBuf],
    /// Name and file of firmware configuration entries.
    pub fw_cfg: &'a [(String, PathBuf)],
    pub sockets: Sockets,
}

/// The arguments, without the program.
pub fn arguments(settings: &Settings, prepared: &Prepared<'_>) -> Vec<OsString> {
    let mut line = Line::default();
    line.hardware(settings, prepared.accelerator);
    line.channels(prepared.sockets);
    if let Some(files) = prepared.firmware {
        line.firmware(files);
    }
    for (index, drive) in prepared.drives.iter().enumerate() {
        line.drive(settings.board, index, drive);
    }
    line.network(settings);
    for path in prepared.smbios {
        line.option("-smbios", "type=11", &[("path", path.as_os_str())]);
    }
    for (name, path) in prepared.fw_cfg {
        line.option("-fw_cfg", &format!("name={name}"), &[("file", path.as_os_str())]);
    }
    if let Start::Kernel { kernel, initrd, append } = &settings.start {
        line.path("-kernel", kernel);
        if let Some(initrd) = initrd {
            line.path("-initrd", initrd);
        }
        line.pair("-append", append);
    }
    line.0.extend(settings.extra.iter().map(OsString::from));
    line.0
}

#[derive(Default)]
struct Line(Vec<OsString>);

impl Line {
    fn pair(&mut self, option: &str, value: impl AsRef<OsStr>) {
        self.0.push(option.into());
        self.0.push(value.as_ref().into());
    }

    fn path(&mut self, option: &str, path: &Path) {
        self.pair(option, path);
    }

    /// `first,key=value,…`; a comma in a value is written twice (qemu(1), "Syntax").
    fn option(&mut self, option: &str, first: &str, values: &[(&str, &OsStr)]) {
        use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
        let mut text = first.as_bytes().to_vec();
        for (key, value) in values {
            text.extend_from_slice(format!(",{key}=").as_bytes());
            for byte in value.as_bytes() {
                text.push(*byte);
                if *byte == b',' {
                    text.push(b',');
                }
            }
        }
        self.pair(option, OsString::from_vec(text));
    }

    fn hardware(&mut self, settings: &Settings, accelerator: Accelerator) {
        let board = match settings.board {
            Board::Q35 => "q35",
            Board::Pc => "pc",
        };
        let (accel, best) = match accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            Accelerator::Tcg => ("tcg,thread=multi", "max"),
        };
        self.0.extend(["-no-user-config", "-nodefaults"].map(OsString::from));
        self.pair("-machine", board);
        self.pair("-accel", accel);
        self.pair("-cpu", settings.cpu.as_deref().unwrap_or(best));
        self.pair("-smp", settings.cpus.to_string());
        self.pair("-m", format!("{}M", settings.memory >> 20));
        self.pair("-display", "none");
        // For screenshots.
        self.pair("-device", "VGA");
        self.pair("-object", "rng-random,id=random,filename=/dev/urandom");
        self.pair("-device", "virtio-rng-pci,rng=random");
        // The guest tells of a panic, and what follows is its own decision: it reboots, so that tries are counted.
        self.pair("-device", "pvpanic");
        self.pair("-action", "panic=none");
    }

    fn channels(&mut self, sockets: Sockets) {
        let [console, qmp, agent] = match sockets {
            Sockets::Inherited { console, qmp, agent } => {
                [("console", console), ("qmp", qmp), ("agent", agent)].map(|(id, number)| format!("socket,id={id},fd={number}"))
            }
            Sockets::Kept => {
                let socket = |id: &str| format!("socket,id={id},path={id},server=on,wait=off");
                ["stdio,id=console,signal=off".into(), socket("qmp"), socket("agent")]
            }
        };
        self.pair("-chardev", console);
        self.pair("-serial", "chardev:console");
        self.pair("-chardev", qmp);
        self.pair("-mon", "chardev=qmp,mode=control");
        self.pair("-chardev", agent);
        self.pair("-device", "virtio-serial-pci");
        self.pair("-device", format!("virtserialport,chardev=agent,name={PORT}"));
    }

    fn firmware(&mut self, files: &Files) {
        match files {
            Files::Split { code, variables } => {
                let code = [("file", code.as_os_str())];
                self.option("-drive", "if=pflash,unit=0,format=raw,readonly=on", &code);
                let variables = [("file", variables.as_os_str())];
                self.option("-drive", "if=pflash,unit=1,format=raw", &variables);
            }
            Files::Whole(path) => self.path("-bios", path),
        }
    }

    fn drive(&mut self, board: Board, index: usize, drive: &Drive) {
        let cache = if drive.unsafe_cache { "unsafe" } else { "writeback" };
        let format = drive.format.as_str();
        let first = format!("if=none,id=disk{index},format={format},cache={cache},discard=unmap");
        self.option("-drive", &first, &[("file", drive.path.as_os_str())]);
        let mut controller = |device: &str| {
            if !self.0.iter().any(|word| word == device) {
                self.pair("-device", device);
            }
        };
        let device = match (drive.bus, board) {
            (Bus::Virtio, _) => "virtio-blk-pci,".to_string(),
            // Two disks on each of the two PIIX channels; one on each AHCI port.
            (Bus::Ide, Board::Pc) => format!("ide-hd,bus=ide.{},unit={},", index / 2, index % 2),
            (Bus::Ide | Bus::Sata, Board::Q35) => format!("ide-hd,bus=ide.{index},"),
            (Bus::Sata, Board::Pc) => {
                controller(AHCI);
                format!("ide-hd,bus=sata.{index},")
            }
            (Bus::Scsi, _) => {
                controller("virtio-scsi-pci,id=scsi");
                "scsi-hd,bus=scsi.0,".to_string()
            }
            (Bus::Pvscsi, _) => {
                controller("pvscsi,id=pvscsi");
                "scsi-hd,bus=pvscsi.0,".to_string()
            }
            (Bus::Nvme, _) => format!("nvme,serial=disk{index},"),
        };
        // 0 is that of a kernel given to QEMU.
        self.pair("-device", format!("{device}drive=disk{index},bootindex={}", index + 1));
    }

    fn network(&mut self, settings: &Settings) {
        let card = match settings.card {
            Card::Virtio => "virtio-net-pci",
            Card::E1000 => "e1000",
            Card::E1000e => "e1000e",
            Card::Vmxnet3 => "vmxnet3",
            Card::None => return,
        };
        let mut text = "user,id=network".to_string();
        for forward in &settings.forward {
            // Port 0: the kernel chooses, and QEMU is asked which.
            text += &format!(",hostfwd=tcp:127.0.0.1:{}-:{}", forward.host.unwrap_or(0), forward.guest);
        }
        self.pair("-netdev", text);
        // No boot from the network: its ROM costs seconds under emulation.
        self.pair("-device", format!("{card},netdev=network,romfile="));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::settings::{Firmware, Forward};

    fn drive(bus: Bus) -> Drive {
        Drive { path: "/w/a,b.qcow2".into(), format: Format::Qcow2, bus, unsafe_cache: false }
    }

    fn line(settings: &Settings, prepared: &Prepared<'_>) -> String {
        let words: Vec<String> = arguments(settings, prepared).iter().map(|word| word.to_string_lossy().into_owned()).collect();
        words.join(" ")
    }

    fn prepared<'a>(drives: &'a [Drive], firmware: Option<&'a Files>) -> Prepared<'a> {
        Prepared {
            accelerator: Accelerator::Tcg,
            firmware,
            drives,
            smbios: &[],
            fw_cfg: &[],
            sockets: Sockets::Inherited { console: 7, qmp: 8, agent: 9 },
        }
    }

    #[test]
    fn a_whole_command_line() {
        let files = Files::Split { code: "/f/CODE.fd".into(), variables: "/w/vars.fd".into() };
        let drives = [drive(Bus::Virtio)];
        let mut settings = Settings::new(Firmware::Uefi, Vec::new());
        settings.forward = vec![Forward { host: None, guest: 8080 }, Forward { host: Some(2222), guest: 22 }];
        settings.extra = vec!["-uuid".into(), "x".into()];
        let smbios = ["/w/credential-0".into()];
        let fw_cfg = [("opt/io.systemd.credentials/x".to_string(), "/w/credential-1".into())];
        let prepared = Prepared { smbios: &smbios, fw_cfg: &fw_cfg, ..prepared(&drives, Some(&files)) };
        let expected = "-no-user-config -nodefaults -machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m 1024M -display none \
            -device VGA -object rng-random,id=random,filename=/dev/urandom -device virtio-rng-pci,rng=random -device pvpanic \
            -action panic=none -chardev socket,id=console,fd=7 -serial chardev:console -chardev socket,id=qmp,fd=8 \
            -mon chardev=qmp,mode=control -chardev socket,id=agent,fd=9 -device virtio-serial-pci \
            -device virtserialport,chardev=agent,name=io.pipeline.agent \
            -drive if=pflash,unit=0,format=raw,readonly=on,file=/f/CODE.fd -drive if=pflash,unit=1,format=raw,file=/w/vars.fd \
            -drive if=none,id=disk0,format=qcow2,cache=writeback,discard=unmap,file=/w/a,,b.qcow2 \
            -device virtio-blk-pci,drive=disk0,bootindex=1 \
            -netdev user,id=network,hostfwd=tcp:127.0.0.1:0-:8080,hostfwd=tcp:127.0.0.1:2222-:22 \
            -device virtio-net-pci,netdev=network,romfile= -smbios type=11,path=/w/credential-0 \
            -fw_cfg name=opt/io.systemd.credentials/x,file=/w/credential-1 -uuid x";
        assert_eq!(line(&settings, &prepared), expected);
    }

    #[test]
    fn disks_on_every_bus() {
        let cases = [
            (Bus::Virtio, Board::Pc, "virtio-blk-pci,drive=disk0,bootindex=1 virtio-blk-pci,drive=disk1,bootindex=2"),
            (
                Bus::Ide,
                Board::Pc,
                "ide-hd,bus=ide.0,unit=0,drive=disk0,bootindex=1 ide-hd,bus=ide.0,unit=1,drive=disk1,bootindex=2",
            ),
            (Bus::Ide, Board::Q35, "ide-hd,bus=ide.0,drive=disk0,bootindex=1 ide-hd,bus=ide.1,drive=disk1,bootindex=2"),
            (
                Bus::Sata,
                Board::Pc,
                "ich9-ahci,id=sata ide-hd,bus=sata.0,drive=disk0,bootindex=1 ide-hd,bus=sata.1,drive=disk1,bootindex=2",
            ),
            (
                Bus::Scsi,
                Board::Q35,
                "virtio-scsi-pci,id=scsi scsi-hd,bus=scsi.0,drive=disk0,bootindex=1 scsi-hd,bus=scsi.0,drive=disk1,bootindex=2",
            ),
            (Bus::Nvme, Board::Q35, "nvme,serial=disk0,drive=disk0,bootindex=1 nvme,serial=disk1,drive=disk1,bootindex=2"),
        ];
        for (bus, board, expected) in cases {
            let drives = [drive(bus), drive(bus)];
            let settings = Settings { board, card: Card::None, ..Settings::new(Firmware::Bios, Vec::new()) };
            let line = line(&settings, &prepared(&drives, None));
            let devices: Vec<&str> = line.split(" -").filter_map(|word| word.strip_prefix("device ")).collect();
            let disks: Vec<&str> =
                devices.into_iter().skip_while(|device| !device.starts_with("virtserialport")).skip(1).collect();
            assert_eq!(disks.join(" "), expected, "{bus:?} on {board:?}");
        }
    }
}
