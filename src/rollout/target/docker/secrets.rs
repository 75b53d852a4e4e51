//! Values of secrets for a container: files on a tmpfs of the machine, bound read-only to `/run/secrets`.
//!
//! ```text
//! RUNTIME/secrets/         0700
//!   ID/                    0500, the program's user
//!     NAME                 0400, the program's user
//! ```
//! An engine cannot write into a read-only container that does not run yet, and what is handed to it with the container's
//! description lies on its disk. Here the values never do, and the machine's next boot knows nothing of them: a container
//! the engine starts then by itself does not come up, and is made anew. Where ids are mapped (rootless engines), or this
//! is not root, the files are readable for all in the container; `RUNTIME/secrets` keeps everybody else out.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::error::Problem;
use crate::rollout::target::Secret;

/// Magic numbers of file systems in memory (statfs(2)).
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// The folder of an instance.
pub fn folder(runtime: &Path, id: &str) -> PathBuf {
    runtime.join("secrets").join(id)
}

/// Makes the folder, empty; what was there is gone.
///
/// # Errors
/// `runtime` is on a disk.
pub fn make(runtime: &Path, id: &str) -> Result<PathBuf> {
    let all = runtime.join("secrets");
    fs_err::create_dir_all(&all)?;
    fs_err::set_permissions(&all, PermissionsExt::from_mode(0o700))?;
    let about = rustix::fs::statfs(&all).with_context(|| format!("cannot look at `{}`", all.display()))?;
    if !IN_MEMORY.contains(&about.f_type) {
        let message = format!("secrets would lie on a disk: `{}` is not on a file system in memory", all.display());
        return Err(Problem::failed(message)
            .hint("`/run` is one on most machines; start the daemon with its sockets there")
            .into());
    }
    remove(runtime, id)?;
    let folder = folder(runtime, id);
    fs_err::create_dir(&folder)?;
    Ok(folder)
}

/// Writes the values for the user and group `owner` of this machine; `None`: for everybody in the container.
pub fn write(folder: &Path, secrets: &BTreeMap<String, Secret>, owner: Option<(u32, u32)>) -> Result<()> {
    for (name, secret) in secrets {
        let path = folder.join(name);
        let mut options = fs_err::OpenOptions::new();
        options.options_mut().mode(0o400);
        options.write(true).create_new(true).open(&path)?.write_all(secret.bytes())?;
        own(&path, owner, if owner.is_some() { 0o400 } else { 0o444 })?;
    }
    own(folder, owner, if owner.is_some() { 0o500 } else { 0o555 })
}

fn own(path: &Path, owner: Option<(u32, u32)>, mode: u32) -> Result<()> {
    fs_err::set_permissions(path, PermissionsExt::from_mode(mode))?;
    if let Some((user, group)) = owner {
        std::os::unix::fs::chown(path, Some(user), Some(group))
            .with_context(|| format!("cannot give `{}` to user {user}", path.display()))?;
    }
    Ok(())
}

/// Removes the folder and the values; one that is not there is no error.
pub fn remove(runtime: &Path, id: &str) -> Result<()> {
    let folder = folder(runtime, id);
    if !folder.exists() {
        return Ok(());
    }
    fs_err::set_permissions(&folder, PermissionsExt::from_mode(0o700))?;
    Ok(fs_err::remove_dir_all(&folder)?)
}

/// User and group of an image's `user` (OCI image specification, `config.User`), by the image's own passwd and group.
///
/// # Errors
/// There is no such user.
pub fn owner(user: &str, passwd: &str, groups: &str) -> Result<(u32, u32)> {
    let (name, group) = user.split_once(':').map_or((user, None), |(name, group)| (name, Some(group)));
    let row = |text: &str, name: &str| {
        let rows = text.lines().map(|line| line.split(':').map(str::to_owned).collect::<Vec<_>>());
        rows.into_iter().find(|row| row.len() > 2 && (row[0] == name || row[2] == name))
    };
    let number = |text: Option<&String>| text.and_then(|text| text.parse::<u32>().ok());
    let known = row(passwd, if name.is_empty() { "0" } else { name });
    let uid = if name.is_empty() { Some(0) } else { name.parse().ok().or_else(|| number(known.as_ref()?.get(2))) };
    let uid = uid.ok_or_else(|| Problem::failed(format!("the image's user `{name}` is not in its /etc/passwd")))?;
    let gid = match group {
        None => number(known.as_ref().and_then(|row| row.get(3))).unwrap_or(0),
        Some(group) => group
            .parse()
            .ok()
            .or_else(|| number(row(groups, group)?.get(2)))
            .ok_or_else(|| Problem::failed(format!("the image's group `{group}` is not in its /etc/group")))?,
    };
    Ok((uid, gid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_by_name_and_number() {
        let passwd = "root:x:0:0::/root:/bin/sh\napp:x:1001:7::/srv:/bin/sh\nbroken\n";
        let groups = "root:x:0:\nstaff:x:50:app\n";
        let cases = [
            ("", Some((0, 0))),
            ("app", Some((1001, 7))),
            ("1001", Some((1001, 7))),
            ("1234", Some((1234, 0))),
            ("app:staff", Some((1001, 50))),
            ("1234:99", Some((1234, 99))),
            ("nobody", None),
            ("app:nobody", None),
        ];
        for (user, expected) in cases {
            assert_eq!(owner(user, passwd, groups).ok(), expected, "{user}");
        }
    }

    #[test]
    fn values_are_never_written_to_a_disk() {
        let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let error = make(disk.path(), "shop-prod-0").unwrap_err();
        assert!(error.to_string().contains("secrets would lie on a disk"), "{error}");
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let folder = make(memory.path(), "shop-prod-0").unwrap();
        write(&folder, &BTreeMap::from([("KEY".to_string(), Secret::new("v"))]), None).unwrap();
        assert_eq!(fs_err::read(folder.join("KEY")).unwrap(), b"v");
        assert_eq!(memory.path().join("secrets").metadata().unwrap().permissions().mode() & 0o777, 0o700);
        // Made anew, nothing of before is left.
        assert_eq!(fs_err::read_dir(make(memory.path(), "shop-prod-0").unwrap()).unwrap().count(), 0);
        remove(memory.path(), "shop-prod-0").unwrap();
        remove(memory.path(), "shop-prod-0").unwrap();
    }
}
