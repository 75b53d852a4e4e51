//! What is run in the sandbox: the mmdebstrap command line for a new tree, and the script that
//! installs more packages into an existing one with its own apt.
//!
//! Both work in a user namespace as its root, with the ids 0..65535 and a mount namespace of
//! their own, without network, from a [`super::repository`]. Where `mknod` is refused mmdebstrap
//! binds the devices instead and takes them away again. What they leave behind is taken away by
//! [`super::normalise`]: mmdebstrap's option files, this machine's `resolv.conf`, logs and caches.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::build::lock::Set;
use crate::error::Problem;

/// Where a repository is in the sandbox.
pub const REPOSITORY: &str = "/run/pipeline/repo";

/// The file in a repository that holds its [`install_script`].
pub const SCRIPT: &str = "install.sh";

/// The search path of a Debian system's root.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// bookworm's packages expect the merged `/usr` to be there; from trixie on `base-files` makes it.
/// mmdebstrap's own hook does the same, but does something else where debootstrap is installed.
const MERGED_USR: &str = r#"umask 022 && for d in bin sbin lib lib64; do mkdir -p "$1/usr/$d" && ln -s "usr/$d" "$1/$d"; done"#;

/// The command line that makes a tree of `set` (a base set) at `root`, an empty folder, from the
/// repository `repo`: mmdebstrap unpacks the essential packages and apt, and that apt the rest. Starts from an empty environment; `temporary` is where mmdebstrap puts its
/// own files while it runs, and everything of the caller's. `epoch` is `SOURCE_DATE_EPOCH`.
pub fn bootstrap(repo: &Path, root: &Path, temporary: &Path, set: &Set, epoch: i64) -> Result<Vec<String>> {
    let text = |path: &Path| -> Result<String> {
        let text = path.to_str().with_context(|| format!("`{}` is not UTF-8", path.display()))?;
        anyhow::ensure!(path.is_absolute(), "`{text}` is not absolute");
        Ok(text.to_owned())
    };
    let mut line: Vec<String> =
        ["env", "-i", "LC_ALL=C.UTF-8", "TZ=UTC", "HOME=/", "DEBIAN_FRONTEND=noninteractive"].map(Into::into).into();
    line.push(format!("PATH={PATH}"));
    line.push(format!("TMPDIR={}", text(temporary)?));
    line.push(format!("SOURCE_DATE_EPOCH={epoch}"));
    // Byte code depends on the order its sources are compiled in, which is that of a set.
    line.push("PYTHONHASHSEED=0".into());
    line.extend(["mmdebstrap", "--mode=root", "--format=directory", "--variant=apt"].map(Into::into));
    line.push(format!("--architectures={}", super::ARCHITECTURE));
    // The folder is ours and empty, nothing is emulated, and there is no signature to check with:
    // the digests were. The lists are taken away with everything else by `normalise`.
    line.push("--skip=check/empty,check/qemu,check/signed-by,cleanup/apt/lists".into());
    // A tree that is not finished is thrown away, so dpkg need not wait for the disk.
    line.push("--dpkgopt=force-unsafe-io".into());
    line.push(r#"--aptopt=APT::Sandbox::User "root""#.into());
    line.push(r#"--aptopt=Acquire::Languages "none""#.into());
    if set.request.suite == "bookworm" {
        line.push(format!("--setup-hook={MERGED_USR}"));
    }
    if !set.request.packages.is_empty() {
        line.push(format!("--customize-hook={}", rest_hook(&text(repo)?)));
    }
    // No suite: there is one archive, and all of it is wanted.
    line.extend([String::new(), text(root)?, format!("deb [trusted=yes] copy:{} ./", uri_path(&text(repo)?))]);
    Ok(line)
}

/// The shell line that installs what is beyond the essential packages and apt: with the tree's own
/// apt, which is locked. This machine's apt may put the packages in another order, and with it the
/// numbers of the users they make.
fn rest_hook(repo: &str) -> String {
    let quoted = format!("'{}'", repo.replace('\'', r"'\''"));
    // Inside, the configuration file mmdebstrap names in APT_CONFIG is not there.
    format!(
        r#"mkdir -p "$1{REPOSITORY}" && mount -o bind {quoted} "$1{REPOSITORY}" && env -u APT_CONFIG -u TMPDIR chroot "$1" /bin/sh {REPOSITORY}/{SCRIPT} && umount "$1{REPOSITORY}""#
    )
}

/// A path as part of an apt source line, which ends at a space.
pub(super) fn uri_path(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'-' | b'_' | b'+');
    path.bytes().map(|byte| if plain(byte) { (byte as char).to_string() } else { format!("%{byte:02x}") }).collect()
}

/// The `/bin/sh` script that installs the packages of `set`, at exactly their versions, into the
/// tree it runs in, with that tree's apt. The repository is at `repo` in the sandbox; `/tmp` is
/// writable and goes away with the sandbox. Run it as uid 0 with `SOURCE_DATE_EPOCH` set.
///
/// # Errors
/// Usage, for a name or version that is not one.
pub fn install_script(set: &Set, repo: &str) -> Result<String> {
    let plain = |text: &str| text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'+' | b'-' | b'.' | b':' | b'~'));
    if let Some(package) = set.packages.iter().find(|package| !plain(&package.name) || !plain(&package.version)) {
        return Err(
            Problem::usage(format!("package `{}` of the lock has the version `{}`", package.name, package.version)).into()
        );
    }
    if set.packages.is_empty() {
        // Everything asked for is in the tree already.
        return Ok("exit 0\n".into());
    }
    let packages: Vec<String> = set.packages.iter().map(|package| format!("{}={}", package.name, package.version)).collect();
    Ok(INSTALL.replace("@REPO@", &uri_path(repo)).replace("@PATH@", PATH).replace("@PACKAGES@", &packages.join(" \\\n  ")))
}

/// Every setting is on the command line, so that nothing of it stays. Services are not started:
/// `invoke-rc.d` asks `policy-rc.d`, which is only put there when the tree has none.
const INSTALL: &str = r#"set -eu
export LC_ALL=C.UTF-8 TZ=UTC HOME=/root PATH=@PATH@
export DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true DEBCONF_NOWARNINGS=yes
# Byte code depends on the order its sources are compiled in, which is that of a set.
export PYTHONHASHSEED=0
umask 022
if ! command -v apt-get >/dev/null; then
  echo "there is no apt in this tree, so no packages can be installed" >&2
  exit 1
fi
work=/tmp/pipeline-apt
mkdir -p $work/lists/partial $work/archives/partial $work/log
echo 'deb [trusted=yes] file:@REPO@ ./' >$work/sources.list
made=
trap 'rm -rf $work $made' EXIT
policy=/usr/sbin/policy-rc.d
if ! [ -e $policy ] && ! [ -L $policy ]; then
  made=$policy
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod 755 $policy
fi
apt() {
  apt-get -q -y \
    -o Dir::Etc::sourcelist=$work/sources.list -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
    -o Dir::State::lists=$work/lists -o Dir::Cache::archives=$work/archives \
    -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o Dir::Log=$work/log \
    -o APT::Sandbox::User=root -o Acquire::Languages=none -o APT::Install-Recommends=false \
    -o Dpkg::Options::=--force-unsafe-io -o Dpkg::Options::=--force-confdef \
    -o Dpkg::Options::=--force-confold -o Dpkg::Options::=--log=/dev/null \
    -o Dpkg::Use-Pty=0 "$@" </dev/null
}
apt update
apt install --no-remove --allow-downgrades \
  @PACKAGES@
"#;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::lock::tests::{package, set};

    #[test]
    fn the_command_line_of_a_base() {
        let mut base = set(vec![package("apt", "3.0", 1), package("libc6", "2.41", 2)]);
        let line =
            |set: &Set| bootstrap(Path::new("/c/re po"), Path::new("/c/root"), Path::new("/c/tmp"), set, 1_700_000_000).unwrap();
        let hook = r#"--customize-hook=mkdir -p "$1/run/pipeline/repo" && mount -o bind '/c/re po' "$1/run/pipeline/repo" && env -u APT_CONFIG -u TMPDIR chroot "$1" /bin/sh /run/pipeline/repo/install.sh && umount "$1/run/pipeline/repo""#;
        let expected = [
            "env",
            "-i",
            "LC_ALL=C.UTF-8",
            "TZ=UTC",
            "HOME=/",
            "DEBIAN_FRONTEND=noninteractive",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "TMPDIR=/c/tmp",
            "SOURCE_DATE_EPOCH=1700000000",
            "PYTHONHASHSEED=0",
            "mmdebstrap",
            "--mode=root",
            "--format=directory",
            "--variant=apt",
            "--architectures=amd64",
            "--skip=check/empty,check/qemu,check/signed-by,cleanup/apt/lists",
            "--dpkgopt=force-unsafe-io",
            "--aptopt=APT::Sandbox::User \"root\"",
            "--aptopt=Acquire::Languages \"none\"",
            hook,
            "",
            "/c/root",
            "deb [trusted=yes] copy:/c/re%20po ./",
        ];
        assert_eq!(line(&base), expected);
        let hook = hook.strip_prefix("--customize-hook=").unwrap();
        crate::cmd::Cmd::new("sh").arg("-n").input(hook).run().unwrap();
        base.request.suite = "bookworm".into();
        base.request.packages.clear();
        let bare = line(&base);
        assert_eq!(bare.iter().filter(|word| word.starts_with("--setup-hook=umask 022")).count(), 1);
        assert!(!bare.iter().any(|word| word.starts_with("--customize-hook")), "{bare:?}");
    }

    #[test]
    fn the_script_names_exact_versions_and_is_shell() {
        let script = install_script(&set(vec![package("a", "1:2~rc1", 0), package("b", "3", 0)]), "/run/pipeline/repo").unwrap();
        assert!(script.contains("echo 'deb [trusted=yes] file:/run/pipeline/repo ./'"), "{script}");
        assert!(script.ends_with("apt install --no-remove --allow-downgrades \\\n  a=1:2~rc1 \\\n  b=3\n"), "{script}");
        crate::cmd::Cmd::new("sh").arg("-n").input(script).run().unwrap();
        assert_eq!(install_script(&set(vec![]), "/r").unwrap(), "exit 0\n");
        for bad in [package("a;reboot", "1", 0), package("a", "$(x)", 0)] {
            assert_eq!(crate::error::exit_code(&install_script(&set(vec![bad]), "/r").unwrap_err()), 2);
        }
    }
}
