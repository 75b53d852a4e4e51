//! A host image that is small and complete as far as a bake looks: Debian's own boot stub and
//! loader, a kernel and modules of a few bytes. It is baked in a tenth of a second and does not boot.

use std::path::Path;

use pipeline::artifact::archive;
use pipeline::artifact::image::{self, Layer, Recipe, RunConfig};
use pipeline::artifact::store::{Descriptor, Store};
use pipeline::oci::compress::{Compression, LayerWriter};

use crate::common::{Project, User};

/// Release of the fixture's kernel.
pub const KERNEL: &str = "6.12.1-test";
const BOOT: &str = "/usr/lib/systemd/boot/efi";

/// A file of a layer; a path that ends with `/` is a folder, `-> TARGET` as content a link.
pub type Entry = (String, Vec<u8>);

/// Debian's stub and loader.
fn boot_file(name: &str) -> Vec<u8> {
    let path = Path::new(BOOT).join(name);
    assert!(path.exists(), "`{}` is missing: apt-get install systemd-boot-efi", path.display());
    fs_err::read(path).unwrap()
}

/// The files of a whole host.
pub fn host() -> Vec<Entry> {
    let modules = format!("usr/lib/modules/{KERNEL}");
    let text = |path: &str, content: &str| (path.to_string(), content.as_bytes().to_vec());
    let status = "Package: base-files\nStatus: install ok installed\nVersion: 13.8\nArchitecture: amd64\nInstalled-Size: 10\n";
    vec![
        text(&format!("{modules}/vmlinuz"), &"kernel ".repeat(3000)),
        text(
            &format!("{modules}/modules.dep"),
            "kernel/fs/erofs/erofs.ko:\nkernel/drivers/md/dm-verity.ko: kernel/drivers/md/dm-bufio.ko\nkernel/drivers/md/dm-bufio.ko:\n",
        ),
        text(&format!("{modules}/modules.alias"), "alias fs-erofs erofs\n"),
        text(&format!("{modules}/kernel/fs/erofs/erofs.ko"), "erofs module"),
        text(&format!("{modules}/kernel/drivers/md/dm-verity.ko"), "verity module"),
        text(&format!("{modules}/kernel/drivers/md/dm-bufio.ko"), "bufio module"),
        text("usr/lib/systemd/systemd", "#!/bin/sh\n"),
        text("sbin/init", "-> ../usr/lib/systemd/systemd"),
        text("usr/lib/os-release", "ID=debian\nPRETTY_NAME=\"Debian 13\"\nVERSION_ID=13\n"),
        text("etc/os-release", "-> ../usr/lib/os-release"),
        text("var/lib/dpkg/status", status),
        text("usr/share/data", &"data ".repeat(200_000)),
        (format!("{}/linuxx64.efi.stub", &BOOT[1..]), boot_file("linuxx64.efi.stub")),
        (format!("{}/systemd-bootx64.efi", &BOOT[1..]), boot_file("systemd-bootx64.efi")),
    ]
}

/// The bytes of a layer.
pub fn layer(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mtime(1_700_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        header.set_mode(0o755);
        if let Some(target) = content.strip_prefix(b"-> ") {
            header.set_entry_type(tar::EntryType::Symlink);
            builder.append_link(&mut header, path, Path::new(std::str::from_utf8(target).unwrap())).unwrap();
        } else if path.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
            builder.append_data(&mut header, path, std::io::empty()).unwrap();
        } else {
            header.set_size(content.len() as u64);
            builder.append_data(&mut header, path, &content[..]).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

/// An OCI archive of an image with these layers, named `name`.
pub fn archive(name: &str, layers: &[Vec<u8>]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("store")).unwrap();
    let layers = layers
        .iter()
        .map(|bytes| {
            let temp = store.temp().unwrap();
            let mut writer = LayerWriter::new(temp.reopen().unwrap(), Compression::Zstd, 2);
            std::io::Write::write_all(&mut writer, bytes).unwrap();
            let written = writer.finish().unwrap();
            store.adopt(temp, &written.digest).unwrap();
            let descriptor = Descriptor::new(Compression::Zstd.media_type(), written.digest, written.size);
            Layer { descriptor, diff_id: written.diff_id, created_by: "test".into() }
        })
        .collect();
    let recipe = Recipe { config: RunConfig::default(), layers, annotations: Default::default(), created: 1_700_000_000 };
    let descriptor = image::write(&store, &recipe).unwrap();
    let mut bytes = Vec::new();
    archive::export(&store, name, &descriptor, &mut bytes).unwrap();
    bytes
}

/// A project of `user` whose store holds the host `NAME:latest.host` made of `layers`.
pub fn project(user: User, name: &str, layers: &[Vec<u8>]) -> Project {
    let project = Project::empty(user);
    load(&project, name, layers);
    project
}

/// Puts a host into the project's store.
pub fn load(project: &Project, name: &str, layers: &[Vec<u8>]) {
    project.write("host.tar", archive(&format!("{name}:latest.host"), layers));
    project.pipeline(&["artifact", "load", "host.tar"]).ok();
}
