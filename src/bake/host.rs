//! What a tree says about the machine it makes: kernel, boot files, applications, packages.
//!
//! In: the merged [`Tree`] of a host image, ours or a stranger's. Out: a [`Host`] with everything
//! the bake needs, or a problem that names what is missing. Reads the tree only.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::artifact::disk::{App, Package};
use crate::disk::init::INIT;
use crate::disk::tree::{Extent, File, Kind, Meta, Node, Source, Tree};
use crate::error::Problem;

/// The file by which the build tells the bake about the host.
const HOST_FILE: &str = "usr/lib/pipeline/host.json";
const APPS: &str = "usr/lib/pipeline/apps";
const MODULES: &str = "usr/lib/modules";
const STUB: &str = "usr/lib/systemd/boot/efi/linuxx64.efi.stub";
const LOADER: &str = "usr/lib/systemd/boot/efi/systemd-bootx64.efi";
const GRUB_BOOT: &str = "usr/lib/pipeline/boot/grub/boot.img";
const GRUB_CORE: &str = "usr/lib/pipeline/boot/grub/core.img";
/// Where Debian's package database may be.
const DATABASES: [&str; 2] = ["usr/lib/pipeline/dpkg", "var/lib/dpkg"];
/// What starts as process 1.
const INITS: [&str; 2] = ["sbin/init", "usr/lib/systemd/systemd"];

/// Which initrd the disk boots with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Initrd {
    /// Our static program and the modules of usual machines, made by the bake.
    #[default]
    Static,
    /// Made by dracut in the build.
    Dracut,
}

/// `host.json`, as the build writes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFile {
    pub format: u32,
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub initrd: Initrd,
    /// Added to the kernel command line.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// More modules of the initrd.
    #[serde(default)]
    pub modules: Vec<String>,
    #[serde(default)]
    pub disk: Wishes,
}

/// `host.disk` of the pipeline file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wishes {
    /// Bytes; `None`: as the content needs.
    #[serde(default)]
    pub size: Option<u64>,
    /// Bytes; `None`: as the content needs.
    #[serde(default)]
    pub slot: Option<u64>,
    /// Formats written when the command line names none.
    #[serde(default)]
    pub formats: Vec<String>,
    /// `uefi`, `bios`; empty: both.
    #[serde(default)]
    pub firmware: Vec<String>,
}

impl Wishes {
    /// Whether the disk is to start from this firmware.
    pub fn wants(&self, firmware: &str) -> bool {
        self.firmware.is_empty() || self.firmware.iter().any(|name| name == firmware)
    }
}

/// Everything a bake needs to know of the tree.
#[derive(Debug, Clone)]
pub struct Host {
    pub file: HostFile,
    /// Like `6.12.107+deb13-amd64`.
    pub kernel: String,
    pub vmlinuz: Vec<u8>,
    /// Only with `initrd: dracut`.
    pub initramfs: Option<Vec<u8>>,
    pub stub: Vec<u8>,
    pub loader: Vec<u8>,
    /// `boot.img` and `core.img`; `None`: the disk boots by UEFI only.
    pub grub: Option<(Vec<u8>, Vec<u8>)>,
    /// Text of `os-release`.
    pub os_release: String,
    /// Sorted by name.
    pub apps: Vec<App>,
    /// Sorted by name.
    pub packages: Vec<Package>,
}

/// Reads `tree`.
///
/// # Errors
/// No kernel or several, no init, no boot loader, a broken `host.json`; each with the next step.
pub fn host(tree: &Tree) -> Result<Host> {
    let file = host_file(tree)?;
    let (kernel, vmlinuz) = kernel(tree)?;
    if !INITS.iter().any(|path| tree.resolve(path.as_bytes()).is_some()) {
        return Err(Problem::failed("the tree has no `/sbin/init`")
            .hint("a host needs an init system: put `systemd-sysv` into the packages")
            .into());
    }
    let initramfs = match file.initrd {
        Initrd::Static => None,
        Initrd::Dracut => {
            let path = format!("{MODULES}/{kernel}/initramfs.img");
            Some(read(tree, &path)?.ok_or_else(|| {
                Problem::failed(format!("the tree has no `/{path}`, which `initrd: dracut` needs"))
                    .hint("build the host again; the build makes it with dracut")
            })?)
        }
    };
    let needs = |path: &str| -> Result<Vec<u8>> {
        read(tree, path)?.ok_or_else(|| {
            Problem::failed(format!("the tree has no `/{path}`"))
                .hint(
                    "put the package with systemd-boot into the image: Debian `systemd-boot-efi`, Fedora `systemd-boot-unsigned`",
                )
                .into()
        })
    };
    let grub = match (read(tree, GRUB_BOOT)?, read(tree, GRUB_CORE)?) {
        (Some(boot), Some(core)) => Some((boot, core)),
        _ => None,
    };
    let os_release = read(tree, "etc/os-release")?.or(read(tree, "usr/lib/os-release")?).unwrap_or_default();
    Ok(Host {
        vmlinuz,
        initramfs,
        stub: needs(STUB)?,
        loader: needs(LOADER)?,
        grub,
        os_release: String::from_utf8_lossy(&os_release).into_owned(),
        apps: apps(tree)?,
        packages: packages(tree)?,
        kernel,
        file,
    })
}

fn read(tree: &Tree, path: &str) -> Result<Option<Vec<u8>>> {
    tree.read(path.as_bytes()).with_context(|| format!("cannot read `/{path}` of the tree"))
}

fn host_file(tree: &Tree) -> Result<HostFile> {
    let Some(bytes) = read(tree, HOST_FILE)? else { return Ok(HostFile { format: 1, ..HostFile::default() }) };
    let file: HostFile = serde_json::from_slice(&bytes).with_context(|| format!("`/{HOST_FILE}` of the tree is broken"))?;
    if file.format != 1 {
        return Err(Problem::failed(format!("`/{HOST_FILE}` has format {}, and this program knows 1", file.format))
            .hint("use the version of pipeline that built the host, or a newer one")
            .into());
    }
    Ok(file)
}

/// Names in the folder `path`, links followed.
fn names(tree: &Tree, path: &str) -> Vec<String> {
    let Some(id) = tree.resolve(path.as_bytes()) else { return Vec::new() };
    tree.children(id).map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect()
}

/// Release and image of the one kernel (the bootc convention first, then Debian's).
fn kernel(tree: &Tree) -> Result<(String, Vec<u8>)> {
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for release in names(tree, MODULES) {
        let path = format!("{MODULES}/{release}/vmlinuz");
        if tree.resolve(path.as_bytes()).is_some() {
            found.insert(release, path);
        }
    }
    for name in names(tree, "boot") {
        if let Some(release) = name.strip_prefix("vmlinuz-") {
            found.entry(release.into()).or_insert_with(|| format!("boot/{name}"));
        }
    }
    let mut rows = found.into_iter();
    match (rows.next(), rows.next()) {
        (None, _) => Err(Problem::failed("the tree has no kernel: neither `/usr/lib/modules/*/vmlinuz` nor `/boot/vmlinuz-*`")
            .hint("a pipeline with `host:` brings one; another image needs one of its distribution's kernel packages")
            .into()),
        (Some((one, _)), Some((two, _))) => Err(Problem::failed(format!("the tree has two kernels, `{one}` and `{two}`"))
            .hint("remove one of them: a host boots exactly one")
            .into()),
        (Some((release, path)), None) => {
            if tree.resolve(format!("{MODULES}/{release}/modules.dep").as_bytes()).is_none() {
                return Err(Problem::failed(format!("the tree has no `/{MODULES}/{release}/modules.dep`"))
                    .hint("the modules of the kernel belong beside it; `depmod` makes the list")
                    .into());
            }
            let bytes = read(tree, &path)?.with_context(|| format!("`/{path}` is no file"))?;
            Ok((release, bytes))
        }
    }
}

fn apps(tree: &Tree) -> Result<Vec<App>> {
    let mut apps = Vec::new();
    for name in names(tree, APPS) {
        let path = format!("{APPS}/{name}/app.json");
        if let Some(bytes) = read(tree, &path)? {
            apps.push(serde_json::from_slice(&bytes).with_context(|| format!("`/{path}` of the tree is broken"))?);
        }
    }
    Ok(apps)
}

/// The packages of the tree's Debian database; none where there is no database.
pub fn packages(tree: &Tree) -> Result<Vec<Package>> {
    for database in DATABASES {
        if let Some(bytes) = read(tree, &format!("{database}/status"))? {
            return Ok(parse_status(&String::from_utf8_lossy(&bytes)));
        }
    }
    Ok(Vec::new())
}

/// Installed packages of a dpkg `status` file (deb822, dpkg(1)), sorted.
fn parse_status(text: &str) -> Vec<Package> {
    let mut packages = Vec::new();
    for paragraph in text.split("\n\n") {
        let field = |name: &str| {
            paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim).unwrap_or_default()
        };
        if field("Status").ends_with(" installed") {
            packages.push(Package {
                name: field("Package").into(),
                version: field("Version").into(),
                architecture: field("Architecture").into(),
                size: field("Installed-Size").parse().unwrap_or_default(),
            });
        }
    }
    packages.sort();
    packages
}

/// Folders a running system mounts something on, and their modes.
const MOUNT_POINTS: [(&str, u16); 8] = [
    ("dev", 0o755),
    ("efi", 0o755),
    ("etc", 0o755),
    ("proc", 0o755),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var", 0o755),
];
/// Units every host runs, and what wants them. Our own hosts bring them; an image of another tool
/// gets them here.
const UNITS: [(&str, &str, &str); 2] = [
    ("pipeline-watch.service", "sysinit.target", include_str!("../../templates/host/pipeline-watch.service")),
    ("pipeline-bless.service", "boot-complete.target", include_str!("../../templates/host/pipeline-bless.service")),
];
const PROGRAM: &str = "usr/lib/pipeline/init";
const UNIT_FOLDER: &str = "usr/lib/systemd/system";

/// Adds to the tree what it lacks to run: mount points, our program and its units.
pub fn complete(tree: &mut Tree, epoch: i64) {
    let meta = |mode: u16| Meta { mode, mtime: epoch, ..Meta::default() };
    let folder = meta(0o755);
    for (path, mode) in MOUNT_POINTS {
        if tree.find(path.as_bytes()).is_none() {
            tree.put(path.as_bytes(), Node { meta: meta(mode), kind: Kind::Directory(BTreeMap::new()) }, &folder);
        }
    }
    if tree.find(PROGRAM.as_bytes()).is_some() {
        return;
    }
    let mut file = |path: &str, bytes: &[u8], mode: u16| {
        let source = tree.add_source(Source::Memory(bytes.into()));
        let size = bytes.len() as u64;
        let extents = vec![Extent { offset: 0, length: size, source, source_offset: 0 }];
        tree.put(path.as_bytes(), Node { meta: meta(mode), kind: Kind::File(File { size, extents }) }, &folder);
    };
    file(PROGRAM, INIT, 0o755);
    for (name, _, text) in UNITS {
        file(&format!("{UNIT_FOLDER}/{name}"), text.as_bytes(), 0o644);
    }
    for (name, target, _) in UNITS {
        let link = Node { meta: meta(0o777), kind: Kind::Symlink(format!("../{name}").into_bytes()) };
        tree.put(format!("{UNIT_FOLDER}/{target}.wants/{name}").as_bytes(), link, &folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[&str]) -> Tree {
        let mut tree = Tree::default();
        for path in files {
            let bytes: &[u8] = if path.ends_with("host.json") { br#"{"format":2}"# } else { path.as_bytes() };
            let source = tree.add_source(Source::Memory(bytes.into()));
            let size = bytes.len() as u64;
            let extents = vec![Extent { offset: 0, length: size, source, source_offset: 0 }];
            tree.put(path.as_bytes(), Node { meta: Meta::default(), kind: Kind::File(File { size, extents }) }, &Meta::default());
        }
        tree
    }

    const GOOD: [&str; 5] = ["usr/lib/modules/6.1/vmlinuz", "usr/lib/modules/6.1/modules.dep", "sbin/init", STUB, LOADER];

    #[test]
    fn a_whole_tree_is_read() {
        let host = host(&tree(&GOOD)).unwrap();
        assert_eq!((host.kernel.as_str(), host.vmlinuz.as_slice()), ("6.1", &b"usr/lib/modules/6.1/vmlinuz"[..]));
        assert_eq!((host.grub, host.file.initrd), (None, Initrd::Static));
        let debian = ["boot/vmlinuz-6.1", "usr/lib/modules/6.1/modules.dep", "sbin/init", STUB, LOADER];
        assert_eq!(super::host(&tree(&debian)).unwrap().vmlinuz, b"boot/vmlinuz-6.1");
    }

    #[test]
    fn what_is_missing_is_named() {
        let without = |name: &str| tree(&GOOD.into_iter().filter(|path| *path != name).collect::<Vec<_>>());
        let with = |name: &'static str| tree(&GOOD.into_iter().chain([name]).collect::<Vec<_>>());
        let cases = [
            (without(GOOD[0]), "the tree has no kernel: neither `/usr/lib/modules/*/vmlinuz` nor `/boot/vmlinuz-*`"),
            (without(GOOD[1]), "the tree has no `/usr/lib/modules/6.1/modules.dep`"),
            (without(GOOD[2]), "the tree has no `/sbin/init`"),
            (without(GOOD[3]), "the tree has no `/usr/lib/systemd/boot/efi/linuxx64.efi.stub`"),
            (with("boot/vmlinuz-6.2"), "the tree has two kernels, `6.1` and `6.2`"),
            (with(HOST_FILE), "`/usr/lib/pipeline/host.json` has format 2, and this program knows 1"),
        ];
        for (tree, expected) in cases {
            assert_eq!(host(&tree).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn package_database() {
        let text = "Package: b\nStatus: install ok installed\nInstalled-Size: 12\nArchitecture: amd64\nVersion: 1:2-3\nDescription: x\n y\n\n\
                    Package: gone\nStatus: deinstall ok config-files\nVersion: 1\n\nPackage: a\nStatus: install ok installed\nArchitecture: all\nVersion: 0\n";
        let expected = [("a", "0", "all", 0), ("b", "1:2-3", "amd64", 12)].map(|(name, version, architecture, size)| Package {
            name: name.into(),
            version: version.into(),
            architecture: architecture.into(),
            size,
        });
        assert_eq!(parse_status(text), expected);
    }
}
