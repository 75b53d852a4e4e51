//! The disk that is booted: which file, in which format, with which applications; overlays over it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::Tools;
use super::command::Drive;
use super::settings::{Content, Disk, Format};
use super::work::Folder;
use crate::artifact::disk::App;
use crate::cmd::Cmd;
use crate::error::Problem;

/// Endings of disk files, by which a name on the command line is told from an artifact's.
const ENDINGS: [&str; 7] = [".qcow2", ".raw", ".img", ".vmdk", ".vhd", ".vhdx", ".disk"];

/// Bytes `qemu-img dd` reads at once, at the least and at the most.
const BLOCK: u64 = 512;
const BLOCK_MAX: u64 = 1 << 20;
/// Bytes searched at a time.
const FIND: u64 = 4 << 20;

/// A disk somebody asked for by name.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskToBoot {
    /// As messages have it: `appliance:latest`, or the file.
    pub name: String,
    /// The file; it is opened for writing only when the machine keeps its disk.
    pub path: PathBuf,
    /// What the disk's artifact says runs on it; empty for a file.
    pub apps: Vec<App>,
}

/// Finds a disk by the name somebody wrote.
pub type Finder<'a> = &'a dyn Fn(&str) -> Result<DiskToBoot>;

/// Whether `text` is a file's name and not an artifact's.
pub fn is_file_name(text: &str) -> bool {
    text.contains('/') && !text.contains("sha256:") || ENDINGS.iter().any(|ending| text.ends_with(ending) && !text.contains(':'))
}

/// The disk in the file `path`.
///
/// # Errors
/// There is no such file.
pub fn file(path: &Path) -> Result<DiskToBoot> {
    let missing = || Problem::usage(format!("the disk `{}` does not exist", path.display()));
    let metadata = fs_err::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => missing().hint("`pipeline bake NAME` writes one"),
        _ => Problem::usage(error.to_string()),
    })?;
    if metadata.is_dir() {
        return Err(Problem::usage(format!("`{}` is a folder, not a disk", path.display())).into());
    }
    Ok(DiskToBoot { name: path.display().to_string(), path: fs_err::canonicalize(path)?, apps: Vec::new() })
}

/// The format of the file `path`, by its first bytes. What has no mark is raw.
pub fn format(path: &Path) -> Result<Format> {
    use std::io::Read as _;
    let mut head = Vec::new();
    fs_err::File::open(path)?.take(512).read_to_end(&mut head)?;
    Ok(match () {
        () if head.starts_with(b"QFI\xfb") => Format::Qcow2,
        () if head.starts_with(b"KDMV") || head.starts_with(b"# Disk DescriptorFile") => Format::Vmdk,
        () if head.starts_with(b"vhdxfile") => Format::Vhdx,
        () if head.starts_with(b"conectix") || path.extension().is_some_and(|ending| ending == "vhd") => Format::Vpc,
        () => Format::Raw,
    })
}

/// What `qemu-img info` tells.
#[derive(Debug, Deserialize)]
struct Info {
    #[serde(rename = "virtual-size")]
    virtual_size: u64,
}

fn size(tools: &Tools, path: &Path, format: Format) -> Result<u64> {
    let info: Info = Cmd::new(tools.utility("qemu-img")?)
        .args(["info", "--output=json", "--force-share", "-f", format.as_str()])
        .arg(path)
        .json()
        .with_context(|| format!("cannot read the disk `{}`", path.display()))?;
    Ok(info.virtual_size)
}

/// Makes what QEMU opens for `disk`: the file itself, an overlay over it, or an empty disk, in `folder`.
/// `throw_away`: nothing of it is read after the machine has ended, so that QEMU need not write anything out.
///
/// # Errors
/// `qemu-img` is missing or fails; the wanted size is smaller than the disk.
pub fn prepare(tools: &Tools, disk: &Disk, index: usize, folder: &Folder, throw_away: bool) -> Result<Drive> {
    let overlay = folder.path().join(format!("disk{index}.qcow2"));
    let drive = |path: &Path, format, unsafe_cache| Drive { path: path.into(), format, bus: disk.bus, unsafe_cache };
    match &disk.content {
        Content::File { path, format, keep: true } => {
            if let Some(wanted) = disk.size
                && grows(size(tools, path, *format)?, wanted, path)?
            {
                Cmd::new(tools.utility("qemu-img")?)
                    .args(["resize", "-q", "-f", format.as_str()])
                    .arg(path)
                    .arg(wanted.to_string())
                    .run()?;
            }
            Ok(drive(path, *format, false))
        }
        Content::File { path, format, keep: false } => {
            let mut command = Cmd::new(tools.utility("qemu-img")?)
                .args(["create", "-q", "-f", "qcow2", "-F", format.as_str(), "-b"])
                .arg(std::path::absolute(path)?)
                .arg(&overlay);
            if let Some(wanted) = disk.size
                && grows(size(tools, path, *format)?, wanted, path)?
            {
                command = command.arg(wanted.to_string());
            }
            command.run().with_context(|| format!("cannot use the disk `{}`", path.display()))?;
            Ok(drive(&overlay, Format::Qcow2, throw_away))
        }
        Content::Empty => {
            let size = disk.size.context("an empty disk has a size")?;
            let create = Cmd::new(tools.utility("qemu-img")?).args(["create", "-q", "-f", "qcow2"]).arg(&overlay);
            create.arg(size.to_string()).run()?;
            Ok(drive(&overlay, Format::Qcow2, throw_away))
        }
    }
}

/// Whether the disk must grow to the `wanted` size.
fn grows(size: u64, wanted: u64, path: &Path) -> Result<bool> {
    if wanted < size {
        let problem = Problem::usage(format!("the disk `{}` has {size} bytes and cannot shrink to {wanted}", path.display()));
        return Err(problem.hint("`--disk-size` can only make it larger").into());
    }
    Ok(wanted > size)
}

/// Reads `length` bytes at `offset` of a disk; of one that is in use, what is written out.
///
/// # Errors
/// The disk ends before.
pub fn read(tools: &Tools, drive: &Drive, offset: u64, length: u64, folder: &Folder) -> Result<Vec<u8>> {
    let (first, last) = (offset / BLOCK, (offset + length).div_ceil(BLOCK));
    let path = extract(tools, drive, first * BLOCK, Some((last - first) * BLOCK), folder)?;
    let bytes = fs_err::read(&path)?;
    fs_err::remove_file(&path)?;
    let start = usize::try_from(offset - first * BLOCK)?;
    let bytes = bytes.get(start..start + usize::try_from(length)?).map(<[u8]>::to_vec);
    bytes.ok_or_else(|| Problem::failed(format!("the disk ends before byte {}", offset + length)).into())
}

/// Where `text` is first in the `size` bytes (`None`: all) from `start` (a whole number of blocks), counted from there.
pub fn search(tools: &Tools, drive: &Drive, start: u64, size: Option<u64>, text: &[u8], folder: &Folder) -> Result<Option<u64>> {
    use std::io::Read as _;
    let path = extract(tools, drive, start, size, folder)?;
    let mut file = fs_err::File::open(&path)?;
    let (mut buffer, mut passed) = (Vec::new(), 0);
    let found = loop {
        let read = (&mut file).take(FIND).read_to_end(&mut buffer)?;
        if let Some(index) = buffer.windows(text.len()).position(|window| window == text) {
            break Some(passed + index as u64);
        }
        if read == 0 {
            break None;
        }
        // What may be the beginning of the text stays.
        let done = buffer.len().saturating_sub(text.len() - 1);
        buffer.drain(..done);
        passed += done as u64;
    };
    fs_err::remove_file(&path)?;
    Ok(found)
}

/// Copies `size` bytes (`None`: all) from `start` to a file in `folder`; both are a whole number of sectors.
fn extract(tools: &Tools, drive: &Drive, start: u64, size: Option<u64>, folder: &Folder) -> Result<PathBuf> {
    let to = folder.path().join("extract");
    let mut source = std::ffi::OsString::from("if=");
    source.push(&drive.path);
    let mut target = std::ffi::OsString::from("of=");
    target.push(&to);
    // The largest block of which both are a whole number.
    let common = start | size.unwrap_or(0) | BLOCK_MAX;
    let block = 1_u64 << common.trailing_zeros();
    let mut command = Cmd::new(tools.utility("qemu-img")?)
        .args(["dd", "--force-share", "-f", drive.format.as_str(), "-O", "raw"])
        .arg(format!("bs={block}"))
        .arg(format!("skip={}", start / block));
    if let Some(size) = size {
        // qemu-img counts blocks from the beginning of the input, the skipped ones too.
        command = command.arg(format!("count={}", (start + size) / block));
    }
    command.args([source, target]).run()?;
    Ok(to)
}

/// Words of a `qemu-io` command that writes `bytes` (all equal) at `offset`.
pub fn write_command(byte: u8, offset: u64, length: u64) -> String {
    format!("write -P {byte} {offset} {length}")
}

/// Writes to a disk no machine uses.
pub fn write(tools: &Tools, drive: &Drive, byte: u8, offset: u64, length: u64) -> Result<()> {
    let command = write_command(byte, offset, length);
    let io =
        Cmd::new(tools.utility("qemu-io")?).args(["-f", drive.format.as_str(), "-c", &command, "-c", "flush"]).arg(&drive.path);
    let (line, output) = (io.line(), io.output()?);
    // qemu-io ends with 0 also where the write failed.
    if !output.status.success() || !String::from_utf8_lossy(&output.stdout).contains("wrote ") {
        return Err(crate::cmd::failure(&line, output.status, &[output.stdout, output.stderr].concat()).into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::settings::Bus;

    #[test]
    fn files_and_names() {
        let cases = [
            ("appliance", false),
            ("appliance:1", false),
            ("a@sha256:00", false),
            ("out/appliance.qcow2", true),
            ("appliance.qcow2", true),
            ("appliance.vhd", true),
            ("./appliance", true),
            ("appliance:1.disk", false),
        ];
        for (text, expected) in cases {
            assert_eq!(is_file_name(text), expected, "{text}");
        }
    }

    #[test]
    fn formats_are_told_by_their_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let cases: [(&str, &[u8], Format); 5] = [
            ("a.raw", b"QFI\xfb", Format::Qcow2),
            ("b.qcow2", b"\xeb\x63", Format::Raw),
            ("c", b"KDMV", Format::Vmdk),
            ("d", b"vhdxfile", Format::Vhdx),
            ("e.vhd", b"", Format::Vpc),
        ];
        for (name, head, expected) in cases {
            let path = folder.path().join(name);
            fs_err::write(&path, head).unwrap();
            assert_eq!(format(&path).unwrap(), expected, "{name}");
        }
    }

    #[test]
    fn what_is_written_to_an_overlay_is_read_from_it_and_not_from_the_disk() {
        let base = tempfile::tempdir().unwrap();
        let tools = Tools::find(&std::env::var_os("PATH").unwrap()).unwrap();
        let folder = Folder::take(base.path()).unwrap();
        // A name with everything QEMU's options and protocols trip over.
        let path = base.path().join("nbd:a,b c.raw");
        let content: Vec<u8> = (0..4096_u32).map(|index| u8::try_from(index % 251).unwrap()).collect();
        fs_err::write(&path, &content).unwrap();
        let disk = |keep, size| Disk {
            content: Content::File { path: path.clone(), format: Format::Raw, keep },
            bus: Bus::Virtio,
            size,
        };
        let drive = prepare(&tools, &disk(false, Some(1 << 20)), 0, &folder, false).unwrap();
        assert_eq!(size(&tools, &drive.path, drive.format).unwrap(), 1 << 20);
        write(&tools, &drive, 0xee, 700, 2).unwrap();
        let mut expected = content.clone();
        expected[700..702].fill(0xee);
        assert_eq!(read(&tools, &drive, 690, 1000, &folder).unwrap(), expected[690..1690]);
        assert_eq!(fs_err::read(&path).unwrap(), content);
        assert_eq!(search(&tools, &drive, 512, None, &[0xee, 0xee], &folder).unwrap(), Some(188));
        assert_eq!(search(&tools, &drive, 1024, Some(1024), &[0xee, 0xee], &folder).unwrap(), None);
        assert!(write(&tools, &drive, 0, 1 << 20, 1).is_err(), "wrote behind the end");
        assert!(read(&tools, &drive, 1 << 20, 1, &folder).is_err(), "read behind the end");
        let error = prepare(&tools, &disk(false, Some(512)), 1, &folder, false).unwrap_err();
        assert!(error.to_string().ends_with("has 4096 bytes and cannot shrink to 512"), "{error}");
        let kept = prepare(&tools, &disk(true, Some(8192)), 2, &folder, false).unwrap();
        assert_eq!((kept.path.as_path(), path.metadata().unwrap().len()), (path.as_path(), 8192));
    }
}
