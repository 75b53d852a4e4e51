"""Boots a disk in QEMU and says how long it takes until its application answers."""

import json
import selectors
import shlex
import socket
import subprocess
import time

import peers
from measure import LAST_LINES, Failed

PROCESSORS = 2
# What is asked of the guest's port.
PAGE, GUEST_PORT = "/healthz", 8080
# How long until it answers, until the console asks who logs in, and until the machine is off.
ANSWER_SECONDS, LOGIN_SECONDS, OFF_SECONDS = 600, 300, 180
# Between two requests, and for how long one is listened to. QEMU accepts connections before the guest has a network, and such a
# one may never be answered: a new one does not wait for it.
ASK_SECONDS, LISTEN_SECONDS = 0.2, 5
# Between two presses of the power button.
PRESS_SECONDS = 5
REQUEST = f"GET {PAGE} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()


def arguments(disk, console, port):
    return [
        "qemu-system-x86_64", "-no-user-config", "-nodefaults", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max",
        "-smp", str(PROCESSORS), "-m", "1G", "-display", "none", "-device", "VGA",
        "-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random",
        "-drive", f"if=none,id=disk,format=qcow2,cache=unsafe,file={disk}", "-device", "virtio-blk-pci,drive=disk",
        "-netdev", f"user,id=network,hostfwd=tcp:127.0.0.1:{port}-:{GUEST_PORT}", "-device", "virtio-net-pci,netdev=network,romfile=",
        "-serial", f"file:{console}", "-qmp", "stdio",
    ]  # fmt: skip


def boot(disk, console):
    """Boots `disk`, which is written to, and shuts it down; seconds until it answered, and the command line."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = arguments(disk, console, port)
    console.write_bytes(b"")
    log = console.with_suffix(".qemu")
    with open(log, "wb") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, preexec_fn=peers.die_with_parent)
    try:
        if not answers(port, process, started + ANSWER_SECONDS):
            raise failed(argv, f"notes did not answer within {ANSWER_SECONDS} s", console, log)
        seconds = time.perf_counter() - started
        # Not in the middle of the boot: the second one is to be one after a whole first.
        if not wait(LOGIN_SECONDS, process, lambda: b"login:" in console.read_bytes()):
            raise failed(argv, f"no login on the console within {LOGIN_SECONDS} s", console, log)
        shut_down(process, argv, console, log)
    finally:
        process.kill()
        process.wait()
    return seconds, argv


def answers(port, process, deadline):
    """Whether a request is answered with status 200 before the deadline and the end of the process."""
    with selectors.DefaultSelector() as selector:
        try:
            asked = 0.0
            while time.perf_counter() < deadline and process.poll() is None:
                now = time.perf_counter()
                if now - asked >= ASK_SECONDS:
                    asked = now
                    ask(port, selector, now)
                for key, _ in selector.select(ASK_SECONDS / 4):
                    if read(key, selector):
                        return True
                for key in [key for key in selector.get_map().values() if now - key.data["since"] > LISTEN_SECONDS]:
                    drop(key, selector)
        finally:
            for key in list(selector.get_map().values()):
                drop(key, selector)
    return False


def ask(port, selector, now):
    try:
        connection = socket.create_connection(("127.0.0.1", port), timeout=1)
        connection.sendall(REQUEST)
    except OSError:
        # QEMU does not listen yet.
        return
    connection.setblocking(False)
    selector.register(connection, selectors.EVENT_READ, {"since": now, "text": b""})


def read(key, selector):
    try:
        some = key.fileobj.recv(4096)
    except OSError:
        some = b""
    key.data["text"] += some
    status = key.data["text"].split(b"\r\n", 1)[0].split()
    if b"\r\n" in key.data["text"] and len(status) > 1 and status[1] == b"200":
        return True
    if not some:
        drop(key, selector)
    return False


def drop(key, selector):
    selector.unregister(key.fileobj)
    key.fileobj.close()


def shut_down(process, argv, console, log):
    """Presses the power button until the machine is off."""
    deadline = time.perf_counter() + OFF_SECONDS
    tell(process, "qmp_capabilities")
    while time.perf_counter() < deadline:
        tell(process, "system_powerdown")
        if wait(PRESS_SECONDS, process, lambda: process.poll() is not None):
            if process.returncode != 0:
                raise failed(argv, f"QEMU exited with status {process.returncode}", console, log)
            return
    raise failed(argv, f"the machine was not off within {OFF_SECONDS} s", console, log)


def tell(process, command):
    try:
        process.stdin.write(json.dumps({"execute": command}).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        # It has just ended.
        pass


def wait(seconds, process, happened):
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if happened():
            return True
        if process.poll() is not None:
            return happened()
        time.sleep(0.1)
    return False


def failed(argv, what, console, log):
    lines = (log.read_text(errors="replace") + console.read_text(errors="replace")).splitlines()
    last = "\n".join("  | " + line for line in lines[-LAST_LINES:])
    return Failed(f"`{shlex.join(argv)}`: {what}; the last lines of its console:\n{last}")
