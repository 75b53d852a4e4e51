"""Measures versions that change through `pipeline serve`, while a client asks all the time."""

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import peers
import release
from measure import Failed, Times, answer, call, check, say

# The goals, from the issue.
ROLLBACK_SECONDS, READY_SECONDS = 1.0, 0.15
ROLLBACKS, PROMOTIONS = 50, 10
# What is ready for a while, and what a drain may take at most.
START_SECONDS, END_SECONDS = 20, 60
# Requests per second of the client while versions are changed, and the seconds that it goes on after each.
CLIENT_RATE, SETTLE_SECONDS = 2000, 0.5
# The client where times are measured: what is asked, and how fast.
TIMED = ["--connections", "16", "--rate", str(CLIENT_RATE), "--mix", "h1,h2,upload,h1"]
# Its exit status when something was lost.
LOST = 1


@dataclass
class Site:
    """Something that serves the test upstream (`load upstream`) in versions, and the commands that change them.

    Each command returns when the change is made. `promote(number)` is the command that brings up a version that was not there
    before, `rollback` the one that goes back to the version before; `forward` goes on again to a version that is still warm,
    and `again(version)` brings one that was there before. `pipeline` begins every command, `daemon` is the one that serves.
    """

    address: str
    host: str
    promote: callable
    rollback: list
    forward: list
    again: callable
    pipeline: list
    daemon: object
    folder: Path
    env: dict

    def status(self):
        """What the daemon tells about prod."""
        return answer([*self.pipeline, "--json", "status", "site/prod"], self.folder, self.env)[1]["served"][0]


class Daemon:
    """`pipeline serve`; another one may take its place, and those before end by themselves."""

    def __init__(self, argv, folder, env):
        self.argv, self.folder, self.env, self.all = argv, folder, env, []

    def start(self, *more):
        log = self.folder / f"log{len(self.all)}"
        with open(log, "wb") as output:
            process = subprocess.Popen([*self.argv, *more], cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=peers.die_with_parent)
        self.all.append(process)
        deadline = time.monotonic() + START_SECONDS
        while b"serving" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"`pipeline serve` does not serve: {log.read_text()}")
            time.sleep(0.05)
        return self

    def replace(self):
        self.start("--replace")

    def settle(self):
        """Waits for the end of those whose place was taken."""
        for number, process in enumerate(self.all[:-1]):
            try:
                status = process.wait(END_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise Failed(f"a daemon whose place was taken did not end within {END_SECONDS} s") from error
            check([*self.argv], status, (self.folder / f"log{number}").read_text())

    def stop(self):
        for process in self.all:
            process.terminate()
        for process in self.all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()
            process.wait()


class Client:
    """The load client while the block runs; then `report` is what it found, `stopped` when it was told to stop, and `answers` what it saw:
    sent, answered, accepted, version. Times are nanoseconds of the monotonic clock.

    Something that was lost is no measurement, unless `losses` are what is looked for; then there is no list of answers, which may be long.
    """

    def __init__(self, bench, site, options=TIMED, losses=False):
        self.bench, self.site, self.options, self.losses = bench, site, options, losses
        self.folder = bench.folder / "client"

    def __enter__(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        files = {name: self.folder / name for name in ("until", "ready", "answers", "report")}
        argv = [self.bench.client, "client", "--target", self.site.address, "--host", self.site.host, *self.options]
        argv += ["--until-file", files["until"], "--ready-file", files["ready"], "--report", files["report"]]
        argv += [] if self.losses else ["--answers", files["answers"]]
        self.argv, self.files = argv, files
        self.log = open(self.folder / "log", "wb")
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, preexec_fn=peers.die_with_parent)
        deadline = time.monotonic() + START_SECONDS
        while not files["ready"].exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self._end()
                check(argv, self.process.returncode or 1, (self.folder / "log").read_text())
            time.sleep(0.02)
        return self

    def __exit__(self, kind, *_):
        self.stopped = time.monotonic_ns()
        self.files["until"].touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(90)
        self._end()
        if kind is None:
            status = self.process.returncode
            check(self.argv, 0 if self.losses and status == LOST else status, (self.folder / "log").read_text())
            self.report = json.loads(self.files["report"].read_text())
            text = "" if self.losses else self.files["answers"].read_text()
            lines = (line.split() for line in text.splitlines())
            self.answers = [(int(sent), int(answered), int(accepted), version) for sent, answered, version, _, accepted in lines]

    def _end(self):
        self.process.kill()
        self.process.wait()
        self.log.close()

    def seen(self, since, until):
        """The versions that answered requests sent between two moments: when they accepted the first and the last, and answered first."""
        found = {}
        for sent, answered, accepted, version in self.answers:
            if since <= sent < until:
                first, last, whole = found.get(version, (accepted, accepted, answered))
                found[version] = (min(first, accepted), max(last, accepted), min(whole, answered))
        return found


# -- 22: back, and 23: forward -----------------------------------------------------------------------


def change(site, argv):
    """Runs the command, and lets the client go on for a moment; when it began and when that moment ended, in nanoseconds."""
    began = time.monotonic_ns()
    call(argv, env=site.env)
    time.sleep(SETTLE_SECONDS)
    return began, time.monotonic_ns()


def rollbacks(bench, site):
    """From the command to the last request that the version left accepted."""
    say(f"22: {ROLLBACKS} rollbacks to a warm version")
    moments = []
    with Client(bench, site) as client:
        for number in range(ROLLBACKS):
            moments.append(change(site, site.rollback))
            if number + 1 < ROLLBACKS:
                change(site, site.forward)
    times = Times("rollback: command to the last request accepted by the version left")
    for began, ended in moments:
        window = client.seen(began, ended)
        left = [version for version in client.seen(began - int(SETTLE_SECONDS * 5e8), began)]
        now = max(window, key=lambda version: window[version][1])
        if len(left) != 1 or left[0] == now:
            raise Failed(f"not a rollback: {left} answered before the command, {now} after it")
        # Every request may have met the other one already.
        last = window[left[0]][1] if left[0] in window else began
        times.seconds.append((last - began) / 1e9)
    bench.timing(times)
    bench.command("rollback", site.rollback)
    p99 = sorted(times.seconds)[-(-len(times.seconds) * 99 // 100) - 1]
    bench.notes.append(f"Rollback: {CLIENT_RATE} requests/s meanwhile, {client.report['requests']:,} in all, {client.report['lost']} lost.")
    what = f"rollback, warm: p99 of {ROLLBACKS}"
    bench.goal(what, f"{p99:.3f} s (p50 {times.median:.3f} s)", f"< {ROLLBACK_SECONDS:.0f} s", p99 < ROLLBACK_SECONDS)


def first_requests(bench, site):
    """From the moment the new version is ready, as it says itself, to the first request that it answered."""
    say(f"23: {PROMOTIONS} promotions, from ready to the first request served")
    moments = []
    with Client(bench, site) as client:
        for number in range(PROMOTIONS):
            began, ended = change(site, site.promote(number))
            moments.append((began, ended, ready(site)))
    times = Times("from ready to the first request served")
    for began, ended, since in moments:
        window = client.seen(began, ended)
        new = max(window, key=lambda version: window[version][0])
        if not began < since < ended or len(window) < 2:
            raise Failed(f"not a promotion under load: {window}, ready at {since}")
        times.seconds.append((window[new][2] - since) / 1e9)
    bench.timing(times)
    bench.command("promotion", site.promote(0))
    bench.goal(f"instance ready to first request served, median of {PROMOTIONS}", f"{times.median:.3f} s (most {max(times.seconds):.3f} s)", f"< {READY_SECONDS} s", times.median < READY_SECONDS)


def ready(site):
    """Since when the upstream that answers now is ready: nanoseconds of the monotonic clock."""
    text = call(["curl", "-sSf", "--noproxy", "*", "-H", f"Host: {site.host}", f"http://{site.address}/ready"])
    return int(text)


PIPELINE = """\
name: site
base: { tar: ../base.tar }
runtime: { builder: ../builder }
source: { path: ../src }
image: { port: 8080, health: { http: /healthz } }
environments:
  prod:
    target: { local: LOCAL }
    routes: [ { host: site.test } ]
    rollout: ROLLOUT
"""
RUN = '#!/bin/sh\nexec /usr/bin/load upstream --port-from-env --version "$(cat /opt/app/version)"\n'


@contextlib.contextmanager
def served(bench, local="{}", rollout="{ warm: 1h, watch: { period: 0s } }"):
    """`pipeline serve` with the test upstream as its application, in two versions: 1.101 is live, 1.100 the one before."""
    folder = bench.folder / "served"
    (folder / "pipelines").mkdir(parents=True)
    (folder / "src").mkdir()
    (folder / "builder/s2i/bin").mkdir(parents=True)
    (folder / "src/lock.txt").write_text("one 1.0\n")
    (folder / "builder/builder.yaml").write_text(release.BUILDER)
    for name, text in {**release.SCRIPTS, "run": RUN}.items():
        script = folder / "builder/s2i/bin" / name
        script.write_text(text if text.startswith("#!") else f"#!/bin/sh\nset -eu\n{text}")
        script.chmod(0o755)
    libraries = {Path(word) for word in call(["ldd", bench.client]).split() if word.startswith("/")}
    files = [(str(path)[1:], path.resolve()) for path in sorted(libraries)] + [("usr/bin/load", Path(bench.client))]
    release.base(folder / "base.tar", 0, files)
    (folder / "pipelines/site.yaml").write_text(PIPELINE.replace("LOCAL", local).replace("ROLLOUT", rollout))
    env = {**bench.env, "GIT_AUTHOR_NAME": "alice", "GIT_AUTHOR_EMAIL": "alice@example.org", "HOME": str(folder)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pipeline = [bench.program, "--root", folder / "root"]

    def script(*lines):
        return ["env", "-C", folder, "sh", "-euc", "\n".join(lines)]

    def verb(*words):
        return shlex.join(map(str, [*pipeline, "--quiet", *words]))

    def again(version):
        return script(verb("promote", "site", "--to", "prod", "--release", version, "--lift") + " >/dev/null")

    def promote(number):
        version = f"1.{number}"
        build = verb("build", "site", "--release", "--release-version", version)
        return script(f"echo {version} >src/version", f"{build} >/dev/null", verb("promote", "site", "--to", "prod", "--release", version) + " >/dev/null")

    call([*pipeline, "environment", "apply", "site"], folder, env)
    daemon = Daemon([*pipeline, "serve", "--listen", address], folder, env)
    try:
        daemon.start()
        for number in (100, 101):
            call(promote(number), env=env)
        rollback = script(verb("rollback", "site/prod") + " >/dev/null")
        forward = script(verb("clear", "site/prod", "1.101"), verb("promote", "site", "--to", "prod", "--release", "1.101", "--lift") + " >/dev/null")
        yield Site(address, "site.test", promote, rollback, forward, again, pipeline, daemon, folder, env)
    finally:
        daemon.stop()
        for one in answer([*pipeline, "__instance", "list"], folder, env)[1]:
            call([*pipeline, "__instance", "stop", one["id"], "2"], folder, env)
        subprocess.run(["rm", "-rf", "--one-file-system", folder])


def rollback_served(bench):
    with served(bench) as site:
        rollbacks(bench, site)


def promotion_served(bench):
    with served(bench) as site:
        first_requests(bench, site)


MEASUREMENTS = {22: rollback_served, 23: promotion_served}
