//! A raw disk image in the formats that machines take.
//!
//! | format | for | what comes back when it is converted to raw |
//! |---|---|---|
//! | raw | everything | the same bytes |
//! | qcow2 | QEMU, Proxmox, OpenStack | the same bytes |
//! | vmdk (stream-optimized) | vSphere, ESXi, AWS, VirtualBox | the same bytes |
//! | vhd (fixed) | Azure, Hyper-V | the same bytes; a length that is no multiple of 1 MiB is rounded up with zeros |
//! | gce (`disk.raw` in a sparse tar.gz) | Google Compute Engine | the length rounded up to 1 GiB with zeros |
//!
//! qcow2 is `qemu-img convert`'s, without `-W`, which would put clusters in the order they happen
//! to come. The others are written here: they are small formats, `qemu-img` compresses with one
//! thread only, and the ids and times it makes up would have to be overwritten. Nothing in an
//! export is random or a time of day, so one image gives one file.
//!
//! An export is written to a temporary name beside its target and then renamed. It is not synced:
//! it can be made again from the artifact. A failure or an interruption leaves the target as it was.

mod chunks;
mod gce;
mod vhd;
mod vmdk;

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result};
use rustix::fs::{FlockOperation, flock};
use tempfile::NamedTempFile;

use crate::cmd::{self, Cmd};
use crate::error::{Problem, nearest};

/// Files that are not whole yet are named so.
const PREFIX: &str = ".pipeline-disk-";
/// The first `qemu-img` whose `convert` finds zeros in blocks of the target (2019).
const LEAST_QEMU: (u32, u32) = (4, 0);

/// A format of exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vhd,
    Gce,
}

impl Format {
    pub const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vhd, Self::Gce];

    /// As it is written in pipeline files and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vhd",
            Self::Gce => "gce",
        }
    }

    /// Of the file's name, without the dot.
    pub const fn extension(self) -> &'static str {
        match self {
            Self::Gce => "tar.gz",
            other => other.name(),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        let names = Self::ALL.map(Self::name);
        Self::ALL.into_iter().find(|format| format.name() == text).ok_or_else(|| {
            let problem = Problem::usage(format!("`{text}` is not a disk format"));
            let known = format!("formats are {}", names.join(", "));
            problem.hint(nearest(text, names).map_or(known, |near| format!("did you mean `{near}`?")))
        })
    }
}

/// What is exported.
#[derive(Debug, Clone, Copy)]
pub struct Export<'a> {
    /// Files that make up the raw disk, one behind the other; all sizes are multiples of sectors.
    pub pieces: &'a [&'a Path],
    /// Ids that a format wants are derived from it.
    pub digest: &'a [u8; 32],
    pub threads: usize,
    /// The value of `PATH`, for `qemu-img`.
    pub path: &'a OsStr,
}

/// Writes a disk to `target` in `format`; it appears under its name when it is whole. All formats
/// but qcow2 want the raw disk as one piece.
///
/// # Errors
/// A `qemu-img` that is missing or too old, for qcow2; what cannot be read or written.
pub fn export(export: &Export<'_>, format: Format, target: &Path) -> Result<()> {
    write(export, format, target).with_context(|| format!("cannot write `{}`", target.display()))
}

fn write(export: &Export<'_>, format: Format, target: &Path) -> Result<()> {
    let Export { pieces, digest, threads, path } = *export;
    let one = || -> Result<File> {
        let [raw] = pieces else { anyhow::bail!("the format {format} needs the raw disk as one file") };
        Ok(fs_err::File::open(raw)?.into_parts().0)
    };
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = temporary(folder)?;
    let out = temporary.as_file();
    match format {
        Format::Raw => copy(&one()?, out, threads)?,
        Format::Qcow2 => qcow2(&qemu(path)?, pieces, temporary.path())?,
        Format::Vmdk => vmdk::write(&one()?, out, digest, threads)?,
        Format::Vhd => {
            let source = one()?;
            copy(&source, out, threads)?;
            vhd::finish(out, source.metadata()?.len(), digest)?;
        }
        Format::Gce => gce::write(&one()?, out, threads)?,
    }
    crate::fault::point("rename an export");
    temporary.persist(target).map_err(|error| error.error)?;
    Ok(())
}

/// A file in `folder` that is gone again unless it is renamed; what a process that was killed has
/// left there goes now.
pub fn temporary(folder: &Path) -> Result<NamedTempFile> {
    for entry in fs_err::read_dir(folder)? {
        let path = entry?.path();
        let ours = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
        // Whoever is at work on it holds its lock.
        if ours
            && let Ok(file) = fs_err::File::open(&path)
            && flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = fs_err::remove_file(&path);
        }
    }
    crate::fault::point("create a temporary disk");
    let mut builder = tempfile::Builder::new();
    // Less what the user's umask takes away.
    builder.prefix(PREFIX).permissions(std::fs::Permissions::from_mode(0o666));
    loop {
        let temporary = builder.tempfile_in(folder).with_context(|| format!("cannot make a file in `{}`", folder.display()))?;
        flock(temporary.as_file(), FlockOperation::LockExclusive)?;
        // Another process may have taken it for a leftover before it was locked.
        if temporary.as_file().metadata()?.nlink() > 0 {
            return Ok(temporary);
        }
    }
}

/// A copy whose holes are where zeros are.
fn copy(source: &File, out: &File, threads: usize) -> io::Result<()> {
    out.set_len(source.metadata()?.len())?;
    let mut buffer = Vec::new();
    for run in chunks::runs(source, threads)? {
        let mut at = run.start;
        while at < run.end {
            let length = (run.end - at).min(1 << 20);
            buffer.resize(length as usize, 0);
            source.read_exact_at(&mut buffer, at)?;
            out.write_all_at(&buffer, at)?;
            at += length;
        }
    }
    Ok(())
}

/// The bytes are those of the disk and of the cuts between the pieces: the same pieces give the same file.
fn qcow2(qemu: &Path, pieces: &[&Path], out: &Path) -> Result<()> {
    // Measured on 460 MB in a sparse image of 4 GiB: -W, -m 16 and -t none are no faster.
    Cmd::new(qemu).args(["convert", "-f", "raw", "-O", "qcow2", "-o", "compat=1.1,cluster_size=64k"]).args(pieces).arg(out).run()
}

/// The `qemu-img` of `path`, the value of `PATH`.
fn qemu(path: &OsStr) -> Result<PathBuf> {
    const OTHERS: &str = "the formats raw, vmdk, vhd and gce do not need it";
    let qemu = cmd::find("qemu-img", path).ok_or_else(|| {
        Problem::failed("`qemu-img` is not installed").hint(format!("it is in the package qemu-utils; {OTHERS}"))
    })?;
    match version(&Cmd::new(&qemu).arg("--version").text()?) {
        Some(found) if found < LEAST_QEMU => {
            let (major, minor) = LEAST_QEMU;
            Err(Problem::failed(format!(
                "`{}` is version {}.{}, and {major}.{minor} is needed",
                qemu.display(),
                found.0,
                found.1
            ))
            .hint(format!("install a newer qemu-utils; {OTHERS}"))
            .into())
        }
        // A version line we cannot read is no reason to refuse: the conversion tells.
        _ => Ok(qemu),
    }
}

/// From `qemu-img version 7.2.22 (Debian …)`.
fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers =
        said.lines().next()?.strip_prefix("qemu-img version ")?.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_formats() {
        for format in Format::ALL {
            assert_eq!(format.name().parse::<Format>().unwrap(), format);
        }
        let problem = "qcow".parse::<Format>().unwrap_err();
        assert_eq!(
            (problem.message.as_str(), problem.hints),
            ("`qcow` is not a disk format", vec!["did you mean `qcow2`?".to_string()])
        );
        assert_eq!("iso-9660".parse::<Format>().unwrap_err().hints, ["formats are raw, qcow2, vmdk, vhd, gce"]);
    }

    #[test]
    fn versions() {
        let cases = [
            ("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright", Some((7, 2))),
            ("qemu-img version 3.1.0\n", Some((3, 1))),
            ("qemu-img version 10.0.3 (Debian 1:10.0.3)", Some((10, 0))),
            ("something else", None),
        ];
        for (said, expected) in cases {
            assert_eq!(version(said), expected);
        }
    }

    /// A folder with a `qemu-img` that is the script `body`.
    fn fake(body: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        // By another process: a file that this one holds open for writing when another test
        // starts a program cannot be run.
        let path = folder.path().join("qemu-img");
        Cmd::new("sh")
            .args(["-c", r#"echo "$1" >"$0" && chmod 755 "$0""#])
            .arg(path)
            .arg(format!("#!/bin/sh\n{body}"))
            .run()
            .unwrap();
        folder
    }

    #[test]
    fn a_qemu_that_will_not_do_is_named() {
        let missing = qemu(OsStr::new("/nowhere")).unwrap_err();
        assert_eq!(missing.to_string(), "`qemu-img` is not installed");
        assert_eq!(
            crate::error::hints(&missing),
            ["it is in the package qemu-utils; the formats raw, vmdk, vhd and gce do not need it"]
        );
        let old = fake("echo 'qemu-img version 3.1.0 (Debian)'");
        let error = qemu(old.path().as_os_str()).unwrap_err();
        assert_eq!(error.to_string(), format!("`{}/qemu-img` is version 3.1, and 4.0 is needed", old.path().display()));
        let full = fake("echo 'qemu-img: error while writing at byte 0: No space left on device' >&2; exit 1");
        let error = qcow2(&full.path().join("qemu-img"), &[Path::new("raw")], Path::new("out")).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 75);
        assert!(error.to_string().ends_with("convert -f raw -O qcow2 -o compat=1.1,cluster_size=64k raw out` ended with status 1:\n  qemu-img: error while writing at byte 0: No space left on device"), "{error}");
    }

    #[test]
    fn a_failed_export_leaves_the_target_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (raw, target) = (folder.path().join("raw"), folder.path().join("disk.vhd"));
        fs_err::write(&target, "before").unwrap();
        let pieces = [raw.as_path()];
        let disk = Export { pieces: &pieces, digest: &[0; 32], threads: 1, path: OsStr::new("") };
        let error = export(&disk, Format::Vhd, &target).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot write `{}`", target.display()));
        assert_eq!(fs_err::read_to_string(&target).unwrap(), "before");
        fs_err::write(&raw, vec![1; 1 << 20]).unwrap();
        // What a process that was killed has left goes; what one is at work on stays.
        let (left, held) = (folder.path().join(format!("{PREFIX}left")), temporary(folder.path()).unwrap());
        fs_err::write(&left, "cut off").unwrap();
        export(&disk, Format::Vhd, &target).unwrap();
        assert!(!left.exists() && held.path().exists());
        drop(held);
        let names: Vec<_> = fs_err::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!((fs_err::metadata(&target).unwrap().len(), names.len()), ((1 << 20) + 512, 2));
    }
}
