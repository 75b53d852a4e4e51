"""Debian trixie's mkosi in a trixie tree of its own, making a disk from the files of one of our root images."""

import shutil

import peers
from measure import call, timed

# mkosi and the programs it runs.
PACKAGES = [
    "mkosi", "systemd", "systemd-repart", "systemd-ukify", "systemd-boot", "systemd-boot-efi", "udev", "erofs-utils", "cryptsetup-bin", "dosfstools",
    "mtools", "e2fsprogs", "kmod", "cpio", "zstd", "ca-certificates", "debian-archive-keyring",
]  # fmt: skip
# Files are uncompressed erofs as ours; minimized, so that no empty slot is written.
SETTINGS = {
    "mkosi.conf": """\
[Distribution]
Distribution=debian
Release={suite}

[Output]
Format=disk
ImageId=appliance
OutputDirectory=out

[Content]
BaseTrees=host
Bootable=yes
Bootloader=systemd-boot
UnifiedKernelImages=yes
CleanPackageMetadata=no
KernelCommandLine=console=tty0 console=ttyS0,115200

[Build]
BuildSources=
WorkspaceDirectory=tmp
PackageCacheDirectory=cache
RepartOffline=yes
""",
    # Only for an initrd of its own; a mirror need not have the archives that mkosi would name.
    "mkosi.sandbox/etc/apt/sources.list.d/mkosi.sources": """\
Types: deb
URIs: {mirror}
Suites: {suite}
Components: main
Signed-By: {keyring}
""",
    "mkosi.repart/00-esp.conf": """\
[Partition]
Type=esp
Format=vfat
CopyFiles=/boot:/
CopyFiles=/efi:/
SizeMinBytes=1G
SizeMaxBytes=1G
""",
    "mkosi.repart/10-root.conf": """\
[Partition]
Type=root
Format=erofs
CopyFiles=/
Verity=data
VerityMatchKey=root
Minimize=best
""",
    "mkosi.repart/11-root-verity.conf": """\
[Partition]
Type=root-verity
Verity=hash
VerityMatchKey=root
Minimize=best
""",
}
# Nothing is fetched, and the initrd that is given has its kernel modules already.
GIVEN = ["--cache-only=always", "--initrd=initrd", "--kernel-modules-initrd=no"]


class Mkosi:
    """The tree with mkosi, and a project whose base tree holds the files of `root`, an EROFS image."""

    def __init__(self, folder, root, initrd):
        self.folder, self.tools, self.project = folder, folder / "tools", folder / "project"
        folder.mkdir(parents=True)
        peers.debian(self.tools, PACKAGES)
        for name in ("host", "out", "tmp", "cache"):
            (self.project / name).mkdir(parents=True)
        for name, text in SETTINGS.items():
            (self.project / name).parent.mkdir(parents=True, exist_ok=True)
            (self.project / name).write_text(text.format(suite=peers.SUITE, mirror=peers.archive(), keyring=peers.KEYRING))
        shutil.copy(initrd, self.project / "initrd")
        # What `BaseTrees=` copies: taken out by another's program, with owners, modes and capabilities.
        call(self._inside(["fsck.erofs", "--extract=host", "--preserve", "--xattrs", "root"], ["--ro-bind", root, "/mkosi/root"]))

    def argv(self, own_initrd=False):
        proxy = peers.apt_proxy()
        fetch = ["--cache-only=metadata", *([f"--proxy-url={proxy}"] if proxy else [])]
        return self._inside(["mkosi", "--force", *(fetch if own_initrd else GIVEN), "build"])

    def build(self, own_initrd=False):
        """Seconds of one build; what the one before made is removed outside of them."""
        call(["rm", "-rf", *(self.project / "out").iterdir()])
        call(["sync"])
        return timed(self.argv(own_initrd))[0]

    def fetch(self):
        """Fills the cache with what an initrd of its own is made of."""
        argv = [word.replace("=metadata", "=never") for word in map(str, self.argv(own_initrd=True))]
        call(argv)

    def bytes(self):
        """What the disk takes; it is sparse."""
        return (self.project / "out/appliance.raw").stat().st_blocks * 512

    def versions(self):
        names = ("mkosi", "systemd-repart", "erofs-utils")
        return ", ".join(f"{name} {call(['dpkg-query', '--admindir', self.tools / 'var/lib/dpkg', '-W', '-f', '${Version}', name])}" for name in names) + f" (Debian {peers.SUITE})"

    def _inside(self, argv, binds=()):
        """A command in the tree. Not by chroot(2): mkosi makes namespaces of its own, which the kernel refuses there."""
        return [
            "bwrap", "--die-with-parent", "--unshare-pid", "--cap-add", "ALL", "--dev-bind", self.tools, "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc",
            "--ro-bind", "/sys", "/sys", "--tmpfs", "/run", "--ro-bind", "/etc/resolv.conf", "/etc/resolv.conf", "--bind", self.project, "/mkosi", *binds,
            "--chdir", "/mkosi", "--clearenv", "--setenv", "PATH", "/usr/sbin:/usr/bin:/sbin:/bin", "--setenv", "HOME", "/root", "--setenv", "LANG", "C.UTF-8", *argv,
        ]  # fmt: skip
