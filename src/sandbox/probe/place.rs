//! Checks of the folder of the store: room, and a file system that overlays can write to.

use std::path::{Path, PathBuf};

use super::{Check, ProbeEnv, State};

/// A base, a runtime with its build tools, and the work of a few steps on top.
const ROOM: u64 = 4 * GIB;
const GIB: u64 = 1024 * 1024 * 1024;

/// The folder, or the nearest one above it that exists.
fn existing(dir: &Path) -> PathBuf {
    dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

pub(super) fn free_space(env: &ProbeEnv) -> Check {
    let dir = existing(&env.root_dir);
    match rustix::fs::statvfs(&dir) {
        Ok(found) => room(env, found.f_bavail.saturating_mul(found.f_frsize)),
        Err(error) => {
            Check::bad("disk space", State::Warning, format!("`{}` cannot be asked: {error}", dir.display()), other_place())
        }
    }
}

fn room(env: &ProbeEnv, free: u64) -> Check {
    const NAME: &str = "disk space";
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let detail = format!("{:.1} GiB free for `{}`", free as f64 / GIB as f64, env.root_dir.display());
    if free >= ROOM {
        return Check::ok(NAME, detail);
    }
    Check::bad(
        NAME,
        State::Warning,
        detail,
        format!("free some space (`pipeline artifact prune` lists what can go), or {}", other_place()),
    )
}

fn other_place() -> String {
    "choose another place with `--root DIR`".into()
}

/// What is known of a file system: its name, and why overlays cannot write to it.
/// The numbers are those of `statfs(2)`.
fn known(magic: u64) -> (Option<&'static str>, Option<&'static str>) {
    const NETWORK: Option<&str> = Some("a network file system cannot hold the upper folder of an overlay");
    match magic {
        0xef53 => (Some("ext4"), None),
        0x5846_5342 => (Some("xfs"), None),
        0x9123_683e => (Some("btrfs"), None),
        0x0102_1994 => (Some("tmpfs"), None),
        0x2fc1_2fc1 => (Some("zfs"), None),
        0xf2f5_2010 => (Some("f2fs"), None),
        0xca45_1a4e => (Some("bcachefs"), None),
        0x794c_7630 => (
            Some("overlayfs"),
            Some("the kernel refuses an overlay whose upper folder is on an overlay, as a container's own file system is"),
        ),
        0x6969 => (Some("nfs"), NETWORK),
        0xff53_4d42 | 0xfe53_4d42 | 0x517b => (Some("smb"), NETWORK),
        0x6573_5546 => (
            Some("fuse"),
            Some("a FUSE file system (sshfs, virtiofs, a shared folder) rarely can hold the upper folder of an overlay"),
        ),
        0x0102_1997 => (Some("9p"), Some("a folder shared from another system cannot hold the upper folder of an overlay")),
        0x786f_4256 => (Some("vboxsf"), Some("a folder shared from another system cannot hold the upper folder of an overlay")),
        0xf15f => (Some("ecryptfs"), Some("an encrypted folder of this kind cannot hold the upper folder of an overlay")),
        0x4d44 => (Some("vfat"), Some("it keeps neither owners nor modes")),
        0x2011_bab0 => (Some("exfat"), Some("it keeps neither owners nor modes")),
        _ => (None, None),
    }
}

/// Read-only and case-folding file systems show themselves when they are used; this is about the kind.
pub(super) fn file_system(env: &ProbeEnv) -> Check {
    const NAME: &str = "file system";
    let dir = existing(&env.root_dir);
    match rustix::fs::statfs(&dir) {
        #[expect(clippy::cast_sign_loss, reason = "a bit pattern")]
        Ok(found) => kind(&dir, found.f_type as u64 & 0xffff_ffff),
        Err(error) => Check::bad(NAME, State::Warning, format!("`{}` cannot be asked: {error}", dir.display()), other_place()),
    }
}

fn kind(dir: &Path, magic: u64) -> Check {
    const NAME: &str = "file system";
    match known(magic) {
        (Some(name), None) => Check::ok(NAME, format!("`{}` is on {name}", dir.display())),
        (Some(name), Some(why)) => {
            let fix = match name {
                "overlayfs" => {
                    "give the container a volume for it (`-v pipeline:DIR`, `--tmpfs DIR`) and name it with `--root DIR`".into()
                }
                _ => other_place(),
            };
            let state = if name == "fuse" { State::Warning } else { State::Refused };
            Check::bad(NAME, state, format!("`{}` is on {name}: {why}", dir.display()), fix)
        }
        (None, _) => Check::bad(
            NAME,
            State::Warning,
            format!("`{}` is on a file system that is not known here ({magic:#x})", dir.display()),
            format!("if overlays fail, {}", other_place()),
        ),
    }
}

/// Overlays in user namespaces keep their marks in `user.*` attributes.
pub(super) fn extended_attributes(env: &ProbeEnv) -> Check {
    const NAME: &str = "extended attributes";
    let dir = existing(&env.root_dir);
    let file = match tempfile::Builder::new().prefix(".pipeline-probe-").tempfile_in(&dir) {
        Ok(file) => file,
        Err(error) => {
            // The folder above a store that does not exist yet need not be ours to write.
            let fix = format!("make `{}` and give it to yourself, or {}", env.root_dir.display(), other_place());
            return Check::bad(
                NAME,
                State::Warning,
                format!("nothing can be written to `{}`: {}", dir.display(), error.kind()),
                fix,
            );
        }
    };
    match xattr::set(file.path(), "user.pipeline.probe", b"1") {
        Ok(()) => Check::ok(NAME, format!("`user.*` can be set on `{}`", dir.display())),
        Err(error) => Check::bad(
            NAME,
            State::Refused,
            format!("`user.*` cannot be set on `{}`: {error}", dir.display()),
            format!("use ext4, xfs or btrfs (tmpfs from Linux 6.6 on): {}", other_place()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::Machine;
    use super::*;

    #[test]
    fn room_for_a_build() {
        let machine = Machine::new();
        let shown = format!("for `{}`", machine.env.root_dir.display());
        assert_eq!(room(&machine.env, 5 * GIB + GIB / 2), Check::ok("disk space", format!("5.5 GiB free {shown}")));
        let check = room(&machine.env, GIB);
        assert_eq!((check.state, check.detail), (State::Warning, format!("1.0 GiB free {shown}")));
        assert!(free_space(&machine.env).detail.ends_with(&shown));
    }

    #[test]
    fn file_systems_by_their_number() {
        for (magic, state, name) in [
            (0xef53, State::Ok, "ext4"),
            (0x9123_683e, State::Ok, "btrfs"),
            (0x0102_1994, State::Ok, "tmpfs"),
            (0x794c_7630, State::Refused, "overlayfs"),
            (0x6969, State::Refused, "nfs"),
            (0x6573_5546, State::Warning, "fuse"),
            (0x1234, State::Warning, "not known here (0x1234)"),
        ] {
            let check = kind(Path::new("/x"), magic);
            assert_eq!(check.state, state, "{magic:#x}");
            assert!(check.detail.contains(name), "{check:?}");
        }
        assert!(kind(Path::new("/x"), 0x794c_7630).fix.unwrap().contains("-v pipeline:DIR"));
        // The kernel's own: `/proc` is nothing a store can be on, and is not known here.
        let mut machine = Machine::new();
        machine.env.root_dir = "/proc/self".into();
        assert!(file_system(&machine.env).detail.contains("0x9fa0"));
    }

    #[test]
    fn attributes_are_tried_and_nothing_is_left() {
        let mut machine = Machine::new();
        let check = extended_attributes(&machine.env);
        assert_eq!(check.state, State::Ok, "{check:?}: the tests' temporary folder needs `user.*` attributes");
        let left: Vec<_> = fs_err::read_dir(machine.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.iter().all(|name| !name.to_string_lossy().contains("probe")), "{left:?}");
        machine.env.root_dir = "/proc/self".into();
        assert_eq!(extended_attributes(&machine.env).state, State::Warning);
    }
}
