"""Measures `pipeline bake` and the machines it makes: against hashing and converting the same bytes, against mkosi, after an
edit, its memory, and how long a machine takes until notes answers."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import machine
import mkosi
import peers
from measure import Failed, Memory, Report, Times, answer, call, check, say, timed

# The goals, from the issue.
COPYING, MKOSI, EDIT, BOOT, MEMORY_BYTES = 1.5, 5.0, 0.6, 2.0, 300_000_000
# Timed runs, after one that warms up.
RUNS, BOOT_RUNS = 5, 3
# What the machine has to run while its boot is measured.
PACKAGES = {"apparmor", "dbus", "libpam-systemd", "nftables", "openssh-server"}
# A template of notes, and what an edit changes in it.
TEMPLATE, MARK = "apps/notes/notes/templates/layout.html", "</body>"


@dataclass
class Baked:
    seconds: float
    answer: dict
    store: Path

    def manifest(self):
        return json.loads(self._blob(self.answer["digest"]).read_text())

    def config(self):
        return json.loads(self._blob(self.manifest()["config"]["digest"]).read_text())

    def part(self, name):
        """The blob of a part of the disk, by its file name."""
        for layer in self.manifest()["layers"]:
            if layer["annotations"]["org.opencontainers.image.title"] == name:
                return self._blob(layer["digest"])
        raise Failed(f"the disk has no part `{name}`")

    def disk(self):
        return Path(self.answer["files"][0]["path"])

    def _blob(self, digest):
        return self.store / "blobs" / digest.replace(":", "/")


class Bench(Report):
    """What the measurements share, and what they found."""

    def __init__(self, repository, program, work, env, places):
        super().__init__("Bake", places)
        self.repository, self.program, self.env = repository, program, env
        self.folder, self.project = work / "bake", work / "bake/project"
        # The root as `pipeline build appliance` left it; bakes are made in copies of it.
        self.built, self.root, self.out = self.folder / "built", self.folder / "root", self.folder / "out"

    def build(self, root, project, *arguments):
        call([self.program, "--root", root, "build", "appliance", *arguments], project, self.env)

    def copy(self, source, target):
        """A copy of a root: files are the same inodes, because pipeline replaces files and never writes into them."""
        remove(target)
        call(["cp", "--archive", "--link", source, target])
        return target

    def argv(self, root, *arguments):
        return [self.program, "--root", root, "bake", "appliance", "--format", "qcow2", "--output", self.out, "--json", *arguments]

    def bake(self, root, *arguments, cwd=None):
        """Bakes in `root`, which has not baked this host yet."""
        remove(self.out)
        os.sync()
        seconds, found = answer(self.argv(root, *arguments), cwd or self.project, self.env)
        if found["cached"]:
            raise Failed("`pipeline bake` found the disk in its cache: nothing to measure")
        return Baked(seconds, found, root / "store")

    def first(self):
        """The first bake after the build."""
        return self.bake(self.copy(self.built, self.root))


def remove(path):
    call(["rm", "-rf", "--one-file-system", path])


def prepare(bench):
    """Makes the project and builds the host tree that all bakes are made of."""
    say("bake: building the appliance")
    copy_project(bench.repository, bench.project)
    bench.build(bench.built, bench.project, "--update-missing")
    bench.versions |= {
        "pipeline": call([bench.program, "--version"]).strip(),
        "QEMU": call(["qemu-system-x86_64", "--version"]).splitlines()[0],
        "qemu-img": call(["qemu-img", "--version"]).splitlines()[0],
        "openssl": call(["openssl", "version"]).strip(),
    }


def copy_project(repository, project):
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("pipelines", "apps/notes"):
        shutil.copytree(repository / name, project / name, ignore=ignored)


# -- 5: against hashing and converting --------------------------------------------------------------


def copying(bench):
    say("5: bake against openssl and qemu-img")
    names = ("pipeline", "openssl + qemu-img", "openssl", "qemu-img")
    times = {name: Times(f"bake: {name}") for name in names}
    raw, converted, digests = bench.folder / "raw", bench.folder / "converted.qcow2", set()
    for run in range(RUNS + 1):
        baked = bench.first()
        digests.add(baked.answer["digest"])
        if run == 0:
            call([bench.program, "--root", bench.root, "bake", "appliance", "--format", "raw", "--output", raw], bench.project, bench.env)
            (disk,) = raw.iterdir()
            call(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, baked.disk()])
        hashing = ["openssl", "dgst", "-sha256", baked.part("root.erofs")]
        converting = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, converted]
        os.sync()
        hashed, _ = timed(hashing)
        os.sync()
        copied, _ = timed(converting)
        converted.unlink()
        if run > 0:
            for name, seconds in zip(names, (baked.seconds, hashed + copied, hashed, copied)):
                times[name].seconds.append(seconds)
    if len(digests) != 1:
        raise Failed(f"bakes of one host gave different disks: {', '.join(sorted(digests))}")
    root, size = baked.part("root.erofs").stat().st_size, baked.disk().stat().st_size
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in [*baked.answer["phases"], ("export", baked.answer["files"][0]["seconds"])])
    bench.timing(*times.values())
    bench.command("bake", bench.argv(bench.root))
    bench.command("the same bytes, hashed", hashing)
    bench.command("the same disk, converted", converting)
    bench.notes.append(
        f"Bake: pipeline reads the layers of the host image, makes a root image of {root / 1e6:.0f} MB with its hash tree and block digests, initrd, unified kernel image"
        f" and ESP, keeps the parts by digest and writes a qcow2 of {size / 1e6:.0f} MB (the last run: {phases}); openssl hashes the root image once, qemu-img writes the same disk from a raw file that is there."
    )
    ours, peer = (times[name].median for name in names[:2])
    bench.goal("bake, against openssl dgst -sha256 + qemu-img convert", f"{ours / peer:.2f}x the time ({ours:.2f} s, {peer:.2f} s)", f"≤ {COPYING}x the time", ours / peer <= COPYING)
    remove(raw)


# -- 6: against mkosi -------------------------------------------------------------------------------


def against_mkosi(bench):
    say("6: bake against mkosi; making its tree")
    baked = bench.first()
    peer = mkosi.Mkosi(bench.folder / "mkosi", baked.part("root.erofs"), baked.part("initrd"))
    bench.versions["mkosi"] = peer.versions()
    times = {name: Times(f"against mkosi: {name}") for name in ("pipeline", "mkosi, initrd given", "mkosi, with its initrd")}
    for run in range(RUNS + 1):
        baked = bench.first()
        given = peer.build()
        if run > 0:
            times["pipeline"].seconds.append(baked.seconds)
            times["mkosi, initrd given"].seconds.append(given)
    peer.fetch()
    times["mkosi, with its initrd"].seconds.append(peer.build(own_initrd=True))
    bench.timing(*times.values())
    bench.command("bake", bench.argv(bench.root))
    bench.command("the same tree, mkosi", peer.argv())
    bench.command("the same, with its initrd", peer.argv(own_initrd=True))
    bench.notes.append(
        "mkosi: Debian trixie's, run by root in a trixie tree of its own, `RepartOffline=` (its default), `BaseTrees=` with the files of pipeline's root image, erofs root with verity as data and hash"
        " partitions, ESP with systemd-boot and a unified kernel image, no package installed, initrd given: pipeline's. Beside that it copies the tree, runs sysusers, tmpfiles, presets, depmod and hwdb on it, and"
        f" writes a raw disk of {peer.bytes() / 1e6:.0f} MB without BIOS boot, second slot and block digests. pipeline starts from compressed layers and ends with a qcow2."
        " The time with mkosi's own initrd, from packages that are fetched already, is told beside and judged nowhere."
    )
    ours, other = times["pipeline"].median, times["mkosi, initrd given"].median
    bench.goal("bake, against mkosi with the initrd given", f"{other / ours:.3g}x faster ({ours:.2f} s, {other:.2f} s)", f"≥ {MKOSI:.0f}x faster", other / ours >= MKOSI)
    remove(peer.folder)


# -- 7: after an edit of the app --------------------------------------------------------------------


def edited(bench):
    say("7: bake after an edit of the app")
    names = ("first", "again", "again, with --previous")
    times = {name: Times(f"edit: {name}") for name in names}
    template, kept = bench.project / TEMPLATE, bench.folder / "kept"
    for run in range(RUNS + 1):
        baked = bench.first()
        found = {"first": baked}
        before, after, _ = template.read_text().rpartition(MARK)
        if not after:
            raise Failed(f"`{TEMPLATE}` has no `{MARK}`")
        template.write_text(f"{before}<!-- edit {run} -->\n{MARK}{_}")
        bench.build(bench.root, bench.project)
        bench.copy(bench.root, kept)
        found["again"] = bench.bake(bench.root)
        found["again, with --previous"] = bench.bake(kept, "--previous", "appliance")
        if found["again"].answer["host"] == baked.answer["host"]:
            raise Failed("`pipeline build` did not build the edited template")
        if run > 0:
            for name in names:
                times[name].seconds.append(found[name].seconds)
    bench.timing(*times.values())
    bench.command("bake after an edit", bench.argv(bench.root))
    bench.command("the same, files keep their places", bench.argv(kept, "--previous", "appliance"))
    bench.notes.append(f"Edit: a line added to a template of notes, `pipeline build appliance`, then the bake alone is timed, in the store of the first one. With `--previous`, which makes updates small, the median is {times[names[2]].median:.2f} s.")
    first, again = (times[name].median for name in names[:2])
    bench.goal("bake after an edit of the app, against the first", f"{again / first:.2f}x the time ({again:.2f} s, {first:.2f} s)", f"≤ {EDIT}x the time", again / first <= EDIT)
    remove(kept)


# -- 8: until notes answers -------------------------------------------------------------------------


def boots(bench):
    say("8: boots until notes answers; building the tree with dracut")
    disks = {"static": keep(bench, bench.first(), "static"), "dracut": keep(bench, dracut(bench), "dracut")}
    order = ("first boot", "second boot")
    times = {(boot, initrd): Times(f"{boot}: {initrd}") for boot in order for initrd in disks}
    for run in range(BOOT_RUNS):
        for initrd, disk in disks.items():
            overlay = bench.folder / "overlay.qcow2"
            overlay.unlink(missing_ok=True)
            call(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", disk, overlay])
            for boot in order:
                seconds, argv = machine.boot(overlay, bench.folder / f"console-{initrd}.log")
                say(f"   {boot} {run + 1}, {initrd}: {seconds:.1f} s")
                times[boot, initrd].seconds.append(seconds)
    bench.timing(*times.values())
    bench.command("boot", argv)
    bench.notes.append(
        f"Boot: from the start of QEMU (emulation, {machine.PROCESSORS} processors, SeaBIOS, GRUB) until `GET {machine.PAGE}` of notes answers 200, on a machine with AppArmor, dbus, logind, nftables and sshd;"
        " the second boot is of the same disk after a shutdown. Both trees are made of the same packages and removals, all of them listed in [hosts.md](hosts.md#what-is-removed) with what one loses; they"
        " differ in `initrd: dracut` only. On the first boot `/var` is made and the ssh host keys."
    )
    for boot in order:
        ours, peer = times[boot, "static"].median, times[boot, "dracut"].median
        bench.goal(f"{boot} until notes answers, against dracut's initrd", f"{ours / peer:.2f}x the time ({ours:.1f} s, {peer:.1f} s)", f"≤ {1 / BOOT}x the time", ours / peer <= 1 / BOOT)


def dracut(bench):
    """The bake of the same pipeline with `initrd: dracut`."""
    project, root = bench.folder / "project-dracut", bench.folder / "root-dracut"
    copy_project(bench.project, project)
    file = project / "pipelines/appliance.yaml"
    text = file.read_text()
    if "\nhost:\n" not in text or "initrd" in text:
        raise Failed(f"`{file}` is not as this measurement knows it")
    file.write_text(text.replace("\nhost:\n", "\nhost:\n  initrd: dracut\n"))
    bench.copy(bench.built, root)
    bench.build(root, project, "--update-missing")
    return bench.bake(root, cwd=project)


def keep(bench, baked, initrd):
    """Puts the disk where the next bake does not remove it."""
    config = baked.config()
    missing = PACKAGES - {package["name"] for package in config["packages"]}
    if missing or config["initrd"] != initrd:
        raise Failed(f"the disk has the initrd {config['initrd']}, wanted is {initrd}; it lacks the packages {sorted(missing)}")
    return baked.disk().rename(bench.folder / f"{initrd}.qcow2")


# -- 9: memory --------------------------------------------------------------------------------------


def memory(bench):
    say("9: memory of a bake")
    bench.copy(bench.built, bench.root)
    remove(bench.out)
    argv = bench.argv(bench.root)
    process = subprocess.Popen(argv, cwd=bench.project, env=bench.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=peers.die_with_parent)
    try:
        with Memory(bench.program, process.pid, "bake") as watch:
            output, _ = process.communicate()
    finally:
        process.kill()
        process.wait()
    check(argv, process.returncode, output)
    if "bake" not in watch.each:
        raise Failed(f"seen were {watch.each}: not the bake that was meant")
    each = ", ".join(f"`{name}` {peak / 1e6:.0f} MB" for name, peak in sorted(watch.each.items()))
    bench.command("memory", argv)
    bench.notes.append(f"Memory: VmHWM of each process of ours during a bake: {each}; counted is the largest sum at one moment, pages of mapped files included and those that a child shares until it is qemu-img counted twice; qemu-img's own are not.")
    bench.goal("peak memory of a bake", f"{watch.peak / 1e6:.0f} MB", f"< {MEMORY_BYTES // 1_000_000} MB", watch.peak < MEMORY_BYTES)


MEASUREMENTS = {5: copying, 6: against_mkosi, 7: edited, 8: boots, 9: memory}
