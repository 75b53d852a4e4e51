"""Measures decisions: a promotion with six gates after 10,000 decisions, the status of 50 pipelines, a rollback without the remote;
and the push of an edit against `skopeo copy`."""

import copy
import datetime
import io
import json
import os
import random
import shutil
import socket
import subprocess
import tarfile
import time

import peers
from measure import Failed, Report, Times, answer, call, hyperfine, say, timed

# The goals, from the issue.
DECISIONS, PROMOTE_SECONDS = 10_000, 0.2
PIPELINES, ENVIRONMENTS, STATUS_SECONDS = 50, 5, 0.3
ROLLBACK_SECONDS = 0.1
PUSH_SKOPEO = 1.0
# What the image that is pushed stands on: bytes that compress as badly as programs do in part.
BASE_BYTES = 60_000_000
# Timed runs, after one that warms up.
RUNS = 9
# Nobody listens at this port.
AWAY = "http://127.0.0.1:9/ledger.git"
GATES = """\
    gates:
    - soak: 1s
    - approve: 1
    - window: { deny: "FREQ=YEARLY;BYMONTH=1;BYMONTHDAY=1", duration: 1s }
    - signed: { keys: [../team.pub] }
    - sbom: { deny: { packages: [telnetd] } }
    - budget: { size: 50M }
"""
BUILDER = """\
name: tiny
summary: Pages served by busybox
dependencies: { inputs: [lock.txt] }
workdir: /opt/app
user: "1001:0"
port: 8080
"""
SCRIPTS = {
    "dependencies": "mkdir -p /opt/dependencies\ncp /tmp/src/lock.txt /opt/dependencies/installed\nchmod -R u+rwX,go+rX,go-w /opt\n",
    "assemble": "umask 022\nmkdir -p /opt/app\ncp -a /tmp/src/. /opt/app\n",
    "run": "exec httpd -f -p 8080 -h /opt/app\n",
}


class Bench(Report):
    """What the measurements share, and what they found."""

    def __init__(self, program, work, env, places):
        super().__init__("Release", places)
        self.program, self.folder = program, work / "release"
        people = {"GIT_AUTHOR_NAME": "alice", "GIT_AUTHOR_EMAIL": "alice@example.org"}
        self.env = {**env, **people, "HOME": str(self.folder)}
        self.versions["pipeline"] = call([program, "--version"]).strip()
        self.versions["Git"] = call(["git", "--version"]).strip()
        self.number = 0

    def argv(self, *arguments):
        return [self.program, "--root", self.folder / "root", *arguments]

    def verb(self, *arguments, by="alice"):
        return answer(self.argv("--json", *arguments), self.folder, {**self.env, "GIT_AUTHOR_NAME": by})[1]

    def release(self, name):
        """A release of another page, through all environments that are automatic."""
        self.number += 1
        (self.folder / "src/index.html").write_text(f"<h1>{self.number}</h1>\n")
        self.verb("build", name, "--release", "--release-version", f"1.{self.number}", "--key", self.folder / "team.key")
        return f"1.{self.number}"

    def ledger(self):
        return self.verb("ledger", "path")["path"]


def prepare(bench):
    """Makes the pipelines: one with gates and a long history, one to go back in, and fifty others."""
    say("release: making the pipelines")
    folder = bench.folder
    (folder / "pipelines").mkdir(parents=True)
    (folder / "src").mkdir()
    (folder / "src/lock.txt").write_text("one 1.0\n")
    (folder / "builder/s2i/bin").mkdir(parents=True)
    (folder / "builder/builder.yaml").write_text(BUILDER)
    for name, text in SCRIPTS.items():
        script = folder / "builder/s2i/bin" / name
        script.write_text(f"#!/bin/sh\nset -eu\n{text}")
        script.chmod(0o755)
    base(folder / "base.tar", 0)
    base(folder / "large.tar", BASE_BYTES)
    image = "base: { tar: ../base.tar }\nruntime: { builder: ../builder }\nsource: { path: ../src }\nimage: { port: 8080 }\n"
    (folder / "pipelines" / "long.yaml").write_text(f"name: long\n{image}environments:\n  stage: {{ automatic: true }}\n  prod:\n    from: stage\n{GATES}")
    (folder / "pipelines" / "last.yaml").write_text(f"name: last\n{image}environments:\n  stage: {{ automatic: true }}\n  prod: {{ from: stage }}\n")
    (folder / "pipelines" / "push.yaml").write_text("name: push\n" + image.replace("base.tar", "large.tar"))
    for number in range(PIPELINES):
        chain = "".join(f"  e{index}: {{ {f'from: e{index - 1}, ' if index else ''}automatic: true }}\n" for index in range(ENVIRONMENTS))
        (folder / "pipelines" / f"p{number}.yaml").write_text(f"name: p{number}\n{image}environments:\n{chain}")
    call(bench.argv("keys", "generate", "team", "--output", folder), folder, bench.env)


def base(path, more, files=()):
    """A root file system of Debian's busybox-static, a file of `more` bytes that nothing compresses, and programs: pairs of name and file."""
    program = shutil.which("busybox")
    if not program:
        raise Failed("`busybox` is missing: apt-get install busybox-static")
    applets = call([program, "--list"]).split()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:

        def add(name, kind, mode, data=b"", link=""):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.size, member.linkname = kind, mode, len(data), link
            tar.addfile(member, io.BytesIO(data))

        for name in ("bin", "etc", "dev", "proc", "sys", "run", "usr", "var", "root"):
            add(name, tarfile.DIRTYPE, 0o755)
        add("tmp", tarfile.DIRTYPE, 0o1777)
        with open(program, "rb") as file:
            add("bin/busybox", tarfile.REGTYPE, 0o755, file.read())
        for name in sorted({*applets} - {"busybox"}):
            add(f"bin/{name}", tarfile.SYMTYPE, 0o777, link="busybox")
        add("etc/passwd", tarfile.REGTYPE, 0o644, b"root:x:0:0:root:/root:/bin/sh\ndefault:x:1001:0:default:/opt/app:/bin/sh\n")
        add("etc/group", tarfile.REGTYPE, 0o644, b"root:x:0:\n")
        for name, file in files:
            add(name, tarfile.REGTYPE, 0o755, file.read_bytes())
        if more:
            add("usr/data", tarfile.REGTYPE, 0o644, random.Random(3).randbytes(more))


# -- 10: a promotion --------------------------------------------------------------------------------


def lengthen(bench, wanted):
    """Adds holds that are set and lifted to the history of `long/prod`, as the program would have written them: it verifies them."""
    ledger = bench.ledger()
    git = ["git", "-C", ledger]
    there = int(call([*git, "rev-list", "--count", "main"]))
    tip = call([*git, "rev-parse", "main"]).strip()
    previous = call([*git, "log", "-1", "--format=%H", "main", "--", "long/prod.json"]).strip()
    state = json.loads(call([*git, "show", "main:long/prod.json"]))
    zone = datetime.timezone.utc
    time = int(datetime.datetime.fromisoformat(state["decision"]["time"]).timestamp())
    # Nothing is there yet.
    current = "none"
    with subprocess.Popen([*git, "fast-import", "--quiet"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for number in range(there, wanted):
            kind = "lift" if state["hold"] else "hold"
            stamp = datetime.datetime.fromtimestamp(time, zone).strftime("%Y-%m-%dT%H:%M:%SZ")
            state = copy.deepcopy(state)
            state["decision"] = {"kind": kind, "actor": "alice", "reason": f"number {number}", "time": stamp}
            state["hold"] = {"by": "alice", "reason": f"number {number}", "since": stamp, "set_by": "hold"} if kind == "hold" else None
            state["previous"] = previous
            data = (json.dumps(state, indent=2, ensure_ascii=False) + "\n").encode()
            lines = [f"Decision: {kind}", "Pipeline: long", "Environment: prod", "Actor: alice", "From: none", "To: none", f"Config: {current}", f"Time: {stamp}"]
            message = (f"long/prod: {kind}\n\nnumber {number}\n\n" + "\n".join(lines) + "\n").encode()
            who = f"alice <alice@example.org> {time} +0000"
            parent = f"from {tip}\n" if number == there else ""
            head = f"commit refs/heads/main\nmark :{number + 1}\nauthor {who}\ncommitter {who}\ndata {len(message)}\n"
            process.stdin.write(head.encode() + message + parent.encode() + f"M 100644 inline long/prod.json\ndata {len(data)}\n".encode() + data + f"\nget-mark :{number + 1}\n".encode())
            process.stdin.flush()
            previous = process.stdout.readline().decode().strip()
        process.stdin.close()
    if process.returncode != 0:
        raise Failed("`git fast-import` failed")
    found = bench.verb("ledger", "verify")
    if found["findings"] or found["decisions"] != wanted:
        raise Failed(f"the history that was made is not sound: {json.dumps(found)[:500]}")


def promotion(bench):
    say(f"10: a promotion with 6 gates after {DECISIONS} decisions")
    bench.verb("environment", "apply", "long")
    bench.release("long")
    lengthen(bench, DECISIONS)
    times = {name: Times(f"promote: {name}") for name in ("decided", "dry run")}
    for run in range(RUNS + 1):
        version = bench.release("long")
        for person in ("bob", "carol"):
            bench.verb("approve", "long", "--for", "prod", by=person)
        # The soak.
        subprocess.run(["sleep", "1.1"], check=True)
        # A hold may be left from the history that was made.
        argv = bench.argv("--json", "promote", "long", "--to", "prod", "--lift")
        os.sync()
        dry, _ = answer([*argv, "--dry-run"], bench.folder, bench.env)
        seconds, found = answer(argv, bench.folder, bench.env)
        gates = [one for one in found["outcome"]["plan"]["answers"] if one["gate"] != "hold"]
        if len(gates) != 6 or found["outcome"]["plan"]["to"]["version"] != version or not found["outcome"]["commit"]:
            raise Failed(f"not the promotion that was meant: {json.dumps(found)[:500]}")
        if run > 0:
            times["decided"].seconds.append(seconds)
            times["dry run"].seconds.append(dry)
    bench.timing(*times.values())
    bench.command("promotion", argv)
    bench.notes.append(f"Promotion: the ledger has {call(['git', '-C', bench.ledger(), 'rev-list', '--count', 'main']).strip()} decisions; the gates are soak, approve, window, signed, sbom and budget; the commit is synced to the disk.")
    ours = times["decided"].median
    bench.goal(f"promotion with 6 gates after {DECISIONS} decisions", f"{ours:.3f} s", f"≤ {PROMOTE_SECONDS} s", ours <= PROMOTE_SECONDS)


# -- 11: status -------------------------------------------------------------------------------------


def status(bench):
    say(f"11: status of {PIPELINES} pipelines with {ENVIRONMENTS} environments")
    for number in range(PIPELINES):
        bench.verb("environment", "apply", f"p{number}")
        bench.release(f"p{number}")
    rows = [row for row in bench.verb("status")["environments"] if row["pipeline"].startswith("p")]
    if len(rows) != PIPELINES * ENVIRONMENTS or not all(row["version"] for row in rows):
        raise Failed(f"`pipeline status` shows {len(rows)} environments")
    argv = bench.argv("status")
    times = hyperfine("status", argv, bench.folder, bench.folder, bench.env)
    bench.timing(times)
    bench.command("status", argv)
    bench.goal(f"status of {PIPELINES} x {ENVIRONMENTS} environments", f"{times.median:.3f} s", f"≤ {STATUS_SECONDS} s", times.median <= STATUS_SECONDS)


# -- 12: rollback -----------------------------------------------------------------------------------


def rollback(bench):
    say("12: a rollback while the remote is away")
    bench.verb("environment", "apply", "last")
    for _ in range(2):
        bench.release("last")
        bench.verb("promote", "last", "--to", "prod")
    times = Times("rollback, remote away")
    argv = bench.argv("--json", "rollback", "last/prod")
    for run in range(RUNS + 1):
        bench.release("last")
        bench.verb("promote", "last", "--to", "prod", "--lift")
        os.sync()
        seconds, found = answer(argv, bench.folder, {**bench.env, "PIPELINE_LEDGER": AWAY})
        if not found["outcome"]["unpublished"]:
            raise Failed(f"not a rollback without the remote: {json.dumps(found)[:500]}")
        if run > 0:
            times.seconds.append(seconds)
    bench.timing(times)
    bench.command("rollback", f"PIPELINE_LEDGER={AWAY} " + " ".join(map(str, argv)))
    bench.goal("rollback, remote away", f"{times.median:.3f} s", f"≤ {ROLLBACK_SECONDS} s", times.median <= ROLLBACK_SECONDS)


# -- 13: a push -------------------------------------------------------------------------------------


class Registry:
    """Debian's docker-registry on a port of 127.0.0.1, while the block runs."""

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder.mkdir()
        config = self.folder / "registry.yml"
        config.write_text(f"version: 0.1\nlog: {{ level: error }}\nstorage: {{ filesystem: {{ rootdirectory: {self.folder}/data }} }}\nhttp: {{ addr: 127.0.0.1:{self.port} }}\n")
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(["docker-registry", "serve", config], stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=peers.die_with_parent)
        for _ in range(200):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.05)
        self.__exit__()
        raise Failed(f"docker-registry did not start: {(self.folder / 'log').read_text(errors='replace')}")

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def push(bench):
    say("13: the push of an edit")
    peers.install_all("docker-registry", "skopeo")
    bench.versions["docker-registry, skopeo"] = ", ".join(peers.version(name) for name in ("docker-registry", "skopeo"))
    times = {name: Times(f"push of an edit: {name}") for name in ("pipeline", "skopeo copy")}
    store = bench.folder / "root/store"
    with Registry(bench.folder / "registry") as registry:
        place = f"127.0.0.1:{registry.port}"
        for run in range(RUNS + 1):
            (bench.folder / "src/index.html").write_text(f"<h1>push {run}</h1>\n")
            bench.verb("build", "push")
            ours = bench.argv("--json", "artifact", "push", "push", f"{place}/ours:{run}")
            theirs = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{store}:push:latest", f"docker://{place}/theirs:{run}"]
            found = {}

            def send(name):
                os.sync()
                if name == "pipeline":
                    seconds, found["ours"] = answer(ours, bench.folder, bench.env)
                else:
                    seconds, _ = timed(theirs, bench.folder, bench.env)
                # The first sends everything, and warms up.
                if run > 0:
                    times[name].seconds.append(seconds)

            # Each goes first as often as the other.
            for name in sorted(times, reverse=run % 2 == 1):
                send(name)
            blobs = found["ours"]["pushed"]["blobs"]
            if run > 0 and blobs["sent_bytes"] > 100_000:
                raise Failed(f"the push of an edit sent {json.dumps(blobs)}")
        same = [call(["skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{place}/{name}:{RUNS}"], env=bench.env) for name in ("ours", "theirs")]
        if same[0] != same[1]:
            raise Failed("skopeo and pipeline did not push the same manifest")
    bench.timing(*times.values())
    bench.command("push of an edit", ours)
    bench.command("the same, skopeo", theirs)
    bench.notes.append(f"Push: an image on a base of {BASE_BYTES / 1e6:.0f} MB, one page edited; sent were {blobs['sent_bytes']} bytes in {blobs['sent']} blobs. Each run pushes to repositories that have the image before.")
    ratio = times["pipeline"].median / times["skopeo copy"].median
    bench.goal("push of a one-line edit against skopeo copy", f"{ratio:.2f}x the time ({times['pipeline'].median:.3f} s, {times['skopeo copy'].median:.3f} s)", f"≤ {PUSH_SKOPEO:.0f}x the time", ratio <= PUSH_SKOPEO)


MEASUREMENTS = {10: promotion, 11: status, 12: rollback, 13: push}
