"""Tries what an app on a host must not be able to do, and answers with the error of each try."""

import ctypes
import errno
import json
import os
import signal
import socket
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIBC = ctypes.CDLL(None, use_errno=True)

# Numbers of system calls on x86-64 (syscall(2)); glibc has no function for some of them.
SYSCALLS = {
    "ptrace": 101,
    "iopl": 172,
    "settimeofday": 164,
    "init_module": 175,
    "keyctl": 250,
    "perf_event_open": 298,
    "setns": 308,
    "finit_module": 313,
    "kexec_file_load": 320,
    "bpf": 321,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "open_tree": 428,
}

MS_REMOUNT, MS_BIND = 32, 4096
PTRACE_ATTACH = 16


def check(result):
    """The result of a C function; an OSError when it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(name, *arguments):
    return check(LIBC.syscall(ctypes.c_long(SYSCALLS[name]), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]))


def read(path):
    with open(path, "rb") as file:
        return len(file.read(64))


def write(path, text=b"x"):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        return os.write(descriptor, text)
    finally:
        os.close(descriptor)


def make_socket(family, kind, protocol=0):
    socket.socket(family, kind, protocol).close()
    return "a socket"


def bind(kind, port):
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("0.0.0.0", port))
    return port


def kill_others():
    """Sends SIGKILL to every process but itself; the numbers of those it reached."""
    reached, reasons = [], set()
    # A thread's number reaches its process.
    own = {os.getpid(), os.getppid(), *(int(name) for name in os.listdir("/proc/self/task"))}
    for pid in [1, *range(2, 4096)]:
        if pid in own and pid != 1:
            continue
        try:
            os.kill(pid, signal.SIGKILL)
            reached.append(pid)
        except OSError as error:
            reasons.add(error.errno)
    if not reached:
        # What it was told where there was somebody: ESRCH is for numbers nobody has.
        raise OSError((reasons - {errno.ESRCH} or {errno.ESRCH}).pop(), "no process")
    return reached


def others_in_proc():
    """Processes of anybody else in /proc."""
    seen = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    others = [pid for pid in seen if os.stat(f"/proc/{pid}").st_uid != os.getuid()]
    if not others:
        raise OSError(errno.ENOENT, "nobody")
    return others


def acts(other):
    apps = "/usr/lib/pipeline/apps"
    return {
        # The other's files.
        "read the other's root": lambda: os.listdir(f"{apps}/{other}/root"),
        "read the other's data": lambda: os.listdir(f"/var/lib/{other}"),
        "read the other's environment": lambda: read(f"/run/pipeline/apps/{other}/env"),
        "read the other's secrets": lambda: os.listdir(f"/run/pipeline/apps/{other}/secrets"),
        # The host's.
        "read the host's root through process 1": lambda: os.listdir("/proc/1/root/"),
        "read the host's machine-id": lambda: read("/var/lib/pipeline/machine-id"),
        "read the host's journal": lambda: os.listdir("/var/log/journal"),
        "read the host's packages": lambda: read("/usr/lib/pipeline/dpkg/status"),
        "read the host's ssh keys": lambda: os.listdir("/var/lib/ssh"),
        "read credentials": lambda: os.listdir("/run/credentials"),
        "read firmware tables": lambda: os.listdir("/sys/firmware/dmi"),
        "read the command line": lambda: read("/proc/cmdline"),
        "read a disk": lambda: read("/dev/sda"),
        "read memory": lambda: read("/dev/mem"),
        "read the kernel's log": lambda: read("/dev/kmsg"),
        "talk to D-Bus": lambda: check_unix("/run/dbus/system_bus_socket"),
        "talk to systemd": lambda: check_unix("/run/systemd/private"),
        # Writing.
        "write to its root": lambda: write("/usr/hostile"),
        "write to /etc": lambda: write("/etc/hostile"),
        "write to the host's /var": lambda: write("/var/hostile"),
        "write a kernel setting": lambda: write("/proc/sys/kernel/hostname"),
        "write to sysrq": lambda: write("/proc/sysrq-trigger", b"h"),
        "write to a control group": lambda: write("/sys/fs/cgroup/cgroup.procs", b"0"),
        # Processes.
        "see processes": others_in_proc,
        "kill processes": kill_others,
        "trace process 1": lambda: syscall("ptrace", PTRACE_ATTACH, 1, 0, 0),
        # Privileges.
        "become root": lambda: os.setuid(0),
        "become another user": lambda: os.setresuid(65534, 65534, 65534),
        "make a file set-user-ID": set_user_id,
        "make a device": lambda: os.mknod("/tmp/device", 0o600 | 0o060000, os.makedev(8, 0)),
        "change the root": lambda: os.chroot("/tmp"),
        "make a user namespace": lambda: check(LIBC.unshare(0x10000000)),
        "make a mount namespace": lambda: check(LIBC.unshare(0x00020000)),
        "enter process 1's namespaces": lambda: syscall("setns", -1, 0),
        # The kernel.
        "load a module": lambda: syscall("finit_module", -1, ctypes.c_char_p(b""), 0),
        "load a module from memory": lambda: syscall("init_module", ctypes.c_char_p(b"x"), 1, ctypes.c_char_p(b"")),
        "load another kernel": lambda: syscall("kexec_file_load", -1, -1, 0, ctypes.c_char_p(b""), 0),
        "load a BPF program": lambda: syscall("bpf", 5, ctypes.create_string_buffer(128), 128),
        "watch the kernel": lambda: syscall("perf_event_open", ctypes.create_string_buffer(128), -1, 0, -1, 0),
        "handle page faults": lambda: syscall("userfaultfd", 0),
        "use a keyring": lambda: syscall("keyctl", 0, -3, 1, 0, 0),
        "set up an io_uring": lambda: syscall("io_uring_setup", 1, ctypes.create_string_buffer(256)),
        "set the clock": lambda: syscall("settimeofday", ctypes.create_string_buffer(16), 0),
        "use ports of the machine": lambda: syscall("iopl", 3),
        "set the hostname": lambda: check(LIBC.sethostname(b"hostile", 7)),
        "reboot": lambda: check(LIBC.reboot(0x89ABCDEF)),
        "swap": lambda: check(LIBC.swapon(b"/tmp/swap", 0)),
        # Mounts.
        "remount its root": lambda: check(LIBC.mount(None, b"/", None, MS_REMOUNT | MS_BIND, None)),
        "mount a file system": lambda: check(LIBC.mount(b"none", b"/tmp", b"tmpfs", 0, None)),
        "unmount": lambda: check(LIBC.umount2(b"/proc", 2)),
        "take a mount": lambda: syscall("open_tree", -100, ctypes.c_char_p(b"/"), 1),
        # The network.
        "open a raw socket": lambda: make_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        "open a packet socket": lambda: make_socket(socket.AF_PACKET, socket.SOCK_RAW),
        "open a netlink socket": lambda: make_socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "open a vsock": lambda: make_socket(40, socket.SOCK_STREAM),
        "listen on another port": lambda: bind(socket.SOCK_STREAM, 9999),
        "listen on a low port": lambda: bind(socket.SOCK_STREAM, 80),
        "listen on UDP": lambda: bind(socket.SOCK_DGRAM, 9999),
    }


def check_unix(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
    return "connected"


def set_user_id():
    path = "/tmp/set-user-id"
    with open(path, "wb"):
        pass
    try:
        os.chmod(path, 0o4755)
        return "set"
    finally:
        os.unlink(path)


def attempt(act):
    try:
        return {"errno": None, "got": repr(act())}
    except OSError as error:
        return {"errno": errno.errorcode.get(error.errno, str(error.errno))}
    except Exception as error:  # pylint: disable=broad-except
        return {"errno": "none", "error": repr(error)}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/healthz":
            body = b"ok\n"
        else:
            other = urllib.parse.parse_qs(url.query).get("other", ["notes"])[0]
            answers = {name: attempt(act) for name, act in acts(other).items()}
            answers["own ids"] = {"uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups()}
            body = json.dumps(answers, indent=1).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("", int(os.environ.get("PORT", "8081"))), Handler).serve_forever()
