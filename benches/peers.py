"""What pipeline is measured against: Debian's packages, a Docker daemon of our own, a base made without a registry."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

from measure import Failed, call

# What the measurements run; docker.io brings the daemon and the classic builder.
PACKAGES = ["docker.io", "hyperfine", "zstd", "mmdebstrap", "git", "bubblewrap", "uidmap", "ca-certificates", "debian-archive-keyring"]
# Programs whose package may come from elsewhere than Debian, as QEMU's often does.
PROGRAMS = {"qemu-system-x86_64": "qemu-system-x86", "qemu-img": "qemu-utils", "openssl": "openssl"}
# The client has a package of its own from trixie on, which docker.io only recommends.
CLIENT = "docker-cli"
SUITE = "trixie"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
# Handed to the Dockerfiles when set; `pipeline` hands its steps the same.
VARIABLES = ["http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_DEFAULT_TIMEOUT"]
# Seconds the daemon may take until it answers.
START_SECONDS = 60


def install():
    """Installs the missing ones of PACKAGES and PROGRAMS."""
    install_all(*PACKAGES)


def install_all(*packages):
    """Installs the missing ones of these, and of what is always needed."""
    wanted = [*packages]
    if subprocess.run(["apt-cache", "show", CLIENT], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        wanted.append(CLIENT)
    missing = [name for name in wanted if not version(name)]
    missing += [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if missing:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        call(["apt-get", "-q", "update"], env=env)
        call(["apt-get", "-q", "install", "-y", "--no-install-recommends", *missing], env=env)


def version(package):
    """The installed version of a Debian package, or nothing."""
    done = subprocess.run(["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package], capture_output=True, text=True)
    status, _, found = done.stdout.partition(" ")
    return found if status == "installed" else ""


def archive():
    """The address of the Debian archive this machine's apt uses."""
    argv = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Label: Debian"]
    found = call(argv).split()
    if not found:
        call(["apt-get", "-q", "update"])
        found = call(argv).split()
    if not found:
        raise Failed("apt knows no Debian archive: `apt-get indextargets` names none")
    return found[0]


def source_line():
    return f"deb [signed-by={KEYRING}] {archive()} {SUITE} main"


def buildx(work):
    """Fetches SUITE's docker-buildx with a private apt; returns the plug-in and its version."""
    apt = work / "apt"
    (apt / "lists/partial").mkdir(parents=True)
    (apt / "archives/partial").mkdir(parents=True)
    (apt / "sources.list").write_text(source_line() + "\n")
    settings = {"Dir::Etc::sourcelist": apt / "sources.list", "Dir::Etc::sourceparts": "-", "Dir::State::lists": apt / "lists", "Dir::Cache": apt, "Acquire::Languages": "none", "APT::Sandbox::User": "root"}
    apt_get = ["apt-get", "-q", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    call([*apt_get, "update"])
    call([*apt_get, "download", "docker-buildx"], cwd=apt)
    (package,) = apt.glob("docker-buildx_*.deb")
    call(["dpkg-deb", "-x", package, apt / "buildx"])
    (plugin,) = (apt / "buildx").rglob("cli-plugins/docker-buildx")
    return plugin, call(["dpkg-deb", "-f", package, "Version"]).strip()


class Docker:
    """A daemon with everything of its own: data, sockets, configuration, mount and process namespace.

    No bridge and no firewall rule: builds use the host's network, which spares Docker the set-up of
    an interface per step. The process namespace ends with this program, however that ends.
    """

    def __init__(self, work):
        self.work = work
        self.program = first("/usr/bin/docker", "docker")
        self.socket = work / "docker.sock"
        self.cgroup = f"pipeline-bench-{os.getpid()}"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "BUILDX_", "BUILDKIT_"))}
        self.env |= {"DOCKER_HOST": f"unix://{self.socket}", "DOCKER_CONFIG": str(work / "docker-client")}
        self.log = work / "dockerd.log"
        self.process = None

    def __enter__(self):
        (self.work / "docker-client/cli-plugins").mkdir(parents=True)
        (self.work / "daemon.json").write_text("{}\n")
        # A containerd of the machine's own would be used when it is seen.
        script = 'for dir in /run/containerd /run/docker; do [ ! -d "$dir" ] || mount -t tmpfs tmpfs "$dir" || exit; done; exec "$@"'
        dockerd = [
            first("/usr/sbin/dockerd", "dockerd"), "--config-file", self.work / "daemon.json", "--data-root", self.work / "docker-data",
            "--exec-root", self.work / "docker-exec", "--pidfile", self.work / "docker.pid", "--host", f"unix://{self.socket}",
            "--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false",
            "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{self.cgroup}",
        ]
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--", "/bin/sh", "-c", script, "sh"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([*unshare, *dockerd], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, preexec_fn=die_with_parent)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self):
        deadline = time.monotonic() + START_SECONDS
        while subprocess.run([self.program, "version"], env=self.env, capture_output=True).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                last = "\n".join("  | " + line for line in self.log.read_text(errors="replace").splitlines()[-20:])
                raise Failed(f"dockerd does not start; its last words:\n{last}")
            time.sleep(0.1)

    def __exit__(self, *_):
        # The first process of the namespace dies with `unshare`, and all others with it.
        self.process.kill()
        self.process.wait()
        for _ in range(50):
            left = sorted(Path("/sys/fs/cgroup").glob(f"**/{self.cgroup}"), reverse=True)
            if not left:
                return
            for folder in left:
                # Children first; processes that are just ending keep a folder for a moment.
                for path, _, _ in os.walk(folder, topdown=False):
                    with contextlib.suppress(OSError):
                        os.rmdir(path)
            time.sleep(0.1)

    def call(self, *argv, **options):
        return call([self.program, *argv], env=self.env, **options)

    def plug_in(self, plugin):
        shutil.copy2(plugin, self.work / "docker-client/cli-plugins/docker-buildx")

    def versions(self):
        engine = self.call("version", "--format", "{{.Server.Version}}").strip()
        client = self.call("version", "--format", "{{.Client.Version}}").strip()
        driver = self.call("info", "--format", "{{.Driver}}").strip()
        return engine, client, driver


def build_arguments():
    return [word for name in VARIABLES if name in os.environ for word in ("--build-arg", name)]


def first(path, name):
    """`path` where it is there: Debian's own goes before others of the name in PATH."""
    found = path if os.access(path, os.X_OK) else shutil.which(name)
    if not found:
        raise Failed(f"`{name}` is missing")
    return found


def die_with_parent(number=signal.SIGKILL):
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def base_tree(work):
    """A Debian tree with Python, as tar and as folder; both as other tools make them, for the peers."""
    tar, tree = work / "base.tar", work / "base"
    # With the machine's CA bundle, as a company's own base image has it.
    debian(tar, ["ca-certificates", "python3", "python3-pip", "python3-setuptools"], f"--customize-hook=upload {CA_BUNDLE} {CA_BUNDLE}")
    tree.mkdir()
    call(["tar", "-C", tree, "--numeric-owner", "--exclude=./dev/*", "-xpf", tar])
    return tar, tree


def debian(target, packages, *options):
    """Makes a Debian tree with these packages: a tar file when `target` is named so, else a folder."""
    # Root's: nobody else can look into the work folder of every machine.
    apt = ["--aptopt=APT::Sandbox::User \"root\""]
    if proxy := apt_proxy():
        apt.append(f'--aptopt=Acquire::http::Proxy "{proxy}"')
    call(["mmdebstrap", "--mode=root", "--variant=minbase", *apt, f"--include={','.join(packages)}", *options, SUITE, target, source_line()])


def apt_proxy():
    """The proxy that this machine's apt uses, or nothing."""
    proxy = re.search(r'"(.+)"', call(["apt-config", "dump", "--no-empty", "Acquire::http::Proxy"]))
    return proxy[1] if proxy else ""


def extend(tree, size):
    """Copies of the tree's own /usr below /opt until its files have `size` bytes; returns their bytes and number."""
    rows = []
    for folder, _, names in os.walk(tree):
        files = [Path(folder, name) for name in names]
        rows += [(path, path.lstat().st_size) for path in files if path.is_file() and not path.is_symlink()]
    total, number, copy = sum(size for _, size in rows), len(rows), 0
    below = sorted(row for row in rows if row[0].is_relative_to(tree / "usr"))
    while total < size:
        copy += 1
        for path, bytes_ in below:
            if total >= size:
                break
            target = tree / f"opt/copy-{copy}" / path.relative_to(tree)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
            total, number = total + bytes_, number + 1
    return total, number
