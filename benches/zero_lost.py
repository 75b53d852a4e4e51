"""Counts what is lost while versions and daemons change under load: nothing may be, and without draining something has to be.

Our client, which checks every byte and never asks twice, and Debian's wrk ask as fast as answers come, one block for each kind of
event. What may not be in an answer of ours is in its report as lost; of wrk's requests those without 2xx or 3xx and all socket
errors are.
"""

import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, field

import peers
from measure import Failed, call, check, say, table
from served import Client, served

# The goals, from the issue: 100 switches, 20 of them rollbacks.
FLIPS, NEW, BACK = 50, 10, 20
REPLACEMENTS, KILLS = 10, 5
LOAD_SHARE = 0.5
# Switches without draining, of which at least one has to lose something.
UNDRAINED = 5
INSTANCES = 2
# Everything the client can do; connections of each of the two, and how many times as many show what the machine can carry.
MIX, CONNECTIONS, MORE = "h1,h1,h2,upload,ws,sse,sse2,large", 16, 2
CAPACITY_SECONDS = 8
# Between two events: less than a large download takes, so that drains overlap.
PAUSE_SECONDS = 0.5
# Until a version that is no longer live has nothing in flight, or a dead one was noticed.
PATIENCE_SECONDS = 60
# Streams are closed soon, so that those of every switch are; requests have their time.
ROLLOUT = "{ warm: 1h, drain: 30s, streams: 2s, watch: { period: 0s } }"
UNDRAINED_ROLLOUT = "{ warm: 0s, drain: 0s, streams: 0s, watch: { period: 0s } }"
# Codes that say why: the client's own end, the application's, the switch's.
CODES = {"1000", "1001", "1012"}
WHOLE_SECONDS = 3600


@dataclass
class Counts:
    """What was asked and lost in one block, or in several."""

    events: int = 0
    # Until both were told to stop.
    seconds: float = 0.0
    wrk_seconds: float = 0.0
    requests: int = 0
    lost: int = 0
    resets: int = 0
    wrk_requests: int = 0
    wrk_lost: int = 0
    websockets: int = 0
    codes: dict = field(default_factory=dict)
    reasons: dict = field(default_factory=dict)

    def add(self, other):
        for name in ("events", "seconds", "wrk_seconds", "requests", "lost", "resets", "wrk_requests", "wrk_lost", "websockets"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.codes, other.codes), (self.reasons, other.reasons)):
            for key, count in theirs.items():
                mine[key] = mine.get(key, 0) + count

    def rate(self):
        return self.requests / self.seconds + self.wrk_requests / self.wrk_seconds

    def all_lost(self):
        return self.lost + self.wrk_lost

    def accounted(self):
        """WebSockets that ended with a code that says why."""
        return sum(count for code, count in self.codes.items() if code in CODES)

    def row(self, what):
        codes = ", ".join(f"{code}: {count:,}" for code, count in sorted(self.codes.items()))
        return [what, str(self.events), f"{self.requests:,}", str(self.lost), str(self.resets), f"{self.wrk_requests:,}", str(self.wrk_lost), f"{self.websockets:,}", codes]


HEADER = ["event", "times", "requests", "lost", "of them reset", "wrk: requests", "wrk: lost", "WebSockets", "closed with"]


class Load:
    """Both clients while the block runs, one as long as the other; then `counts` is what they found."""

    def __init__(self, bench, site, events=0, connections=CONNECTIONS):
        self.bench, self.site, self.events, self.connections = bench, site, events, connections
        self.client = Client(bench, site, ["--closed", "--connections", str(connections), "--mix", MIX], losses=True)

    def __enter__(self):
        self.argv = ["wrk", "--threads", "1", "--connections", str(self.connections), "--duration", f"{WHOLE_SECONDS}s", "--timeout", f"{PATIENCE_SECONDS}s"]
        self.argv += ["--header", f"Host: {self.site.host}", f"http://{self.site.address}/bytes/1000?seed=1"]
        self.started = time.monotonic()
        self.wrk = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=peers.die_with_parent)
        try:
            self.client.__enter__()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error):
        seconds = time.monotonic() - self.started
        # It tells what it found when it is interrupted.
        self.wrk.send_signal(signal.SIGINT)
        try:
            output, _ = self.wrk.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            output = "it does not end"
        finally:
            self._end()
            self.client.__exit__(*error)
        if error[0] is None:
            check(self.argv, self.wrk.returncode, output)
            self.counts = counted(self.client, output, self.events, seconds)

    def _end(self):
        self.wrk.kill()
        self.wrk.wait()


def counted(client, output, events, wrk_seconds):
    found = re.search(r"(\d+) requests in ", output)
    if not found:
        raise Failed(f"wrk says nothing of its requests:\n{output}")
    report = client.report
    lost = sum(int(count) for line in re.findall(r"Socket errors: (.*)", output) for count in re.findall(r"\d+", line))
    lost += sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", output)))
    reasons = dict(report["reasons"])
    if lost:
        reasons["wrk: " + "; ".join(line.strip() for line in output.splitlines() if "errors" in line or "Non-2xx" in line)] = lost
    resets = sum(count for reason, count in report["reasons"].items() if "reset" in reason)
    return Counts(
        events=events,
        seconds=(client.stopped - report["started"]) / 1e9,
        wrk_seconds=wrk_seconds,
        requests=report["requests"],
        lost=report["lost"],
        resets=resets,
        wrk_requests=int(found[1]),
        wrk_lost=lost,
        websockets=report["kinds"]["ws"]["requests"],
        codes=report["close_codes"],
        reasons=reasons,
    )


# -- what happens meanwhile -------------------------------------------------------------------------


def until(site, what, good):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not good(status := site.status()):
        if time.monotonic() > deadline:
            raise Failed(f"{what} does not come within {PATIENCE_SECONDS} s: {status}")
        time.sleep(0.1)
    return status


def switch(site, argv, version):
    """Makes `version` live."""
    call(argv, env=site.env)
    live = site.status()["live"]
    if not live or live["version"] != version:
        raise Failed(f"not a switch to {version}: {live}")
    time.sleep(PAUSE_SECONDS)


def flip(site):
    """To and fro between two versions, of which the other one is always warm."""
    for number in range(FLIPS):
        version = "1.100" if number % 2 == 0 else "1.101"
        switch(site, site.again(version), version)


def back(site):
    for _ in range(BACK):
        switch(site, site.rollback, "1.100")
        switch(site, site.forward, "1.101")


def replace(site):
    """Other daemons, while those before still drain; all end well."""
    for _ in range(REPLACEMENTS):
        before = set(site.daemon.all)
        site.daemon.replace()
        if len(set(site.daemon.all) - before) != 1:
            raise Failed("no daemon was started")
        time.sleep(2 * PAUSE_SECONDS)
    site.daemon.settle()


def kill(site):
    """All processes of the version before, once nothing of it is in flight; then a promotion brings it again."""
    for _ in range(KILLS):
        drained = until(site, "the end of a drain", lambda status: status["other"] and not any(status["other"][name] for name in ("in_flight", "websockets", "streams")))
        version = drained["other"]["version"]
        for instance in drained["other"]["instances"]:
            # What a shim owns ends with it.
            noted = (site.folder / "root/state/instances" / instance["id"] / "pid").read_text()
            os.kill(int(noted.split()[0]), signal.SIGKILL)
        until(site, "the end of what was killed", lambda status: not status["other"])
        time.sleep(PAUSE_SECONDS)
        switch(site, site.again(version), version)


def bring(site):
    for number in range(NEW):
        switch(site, site.promote(number), f"1.{number}")


# What happens, how often, and how that is called. The rollbacks need a way forward each.
EVENTS = [
    (flip, FLIPS, "promotion of a version that is warm"),
    (back, 2 * BACK, f"rollback, and forward again ({BACK} of each)"),
    (replace, REPLACEMENTS, "`pipeline serve --replace`"),
    (kill, KILLS, "`kill -9` of blue after the drain, and a promotion"),
    (bring, NEW, "promotion of a new version"),
]
SWITCHES = sum(times for what, times, _ in EVENTS if what in (flip, back, bring))


def zero_lost(bench):
    peers.install_all("wrk")
    bench.versions["wrk"] = peers.version("wrk")
    rows, total = [], Counts()
    with served(bench, local=f"{{ instances: {INSTANCES} }}", rollout=ROLLOUT) as site:
        say("24: what the machine can carry")
        with Load(bench, site, connections=MORE * CONNECTIONS) as load:
            time.sleep(CAPACITY_SECONDS)
        capacity = load.counts
        for happens, times, name in EVENTS:
            say(f"24: {times} times: {name}")
            with Load(bench, site, events=times) as load:
                happens(site)
            rows.append(load.counts.row(name))
            total.add(load.counts)
            tell(load)
        bench.command("zero lost: the client", load.client.argv)
        bench.command("zero lost: wrk", load.argv)
    rows.append(total.row("all"))
    undrained = without_draining(bench)
    rows.append(undrained.row("promotion with `drain`, `streams` and `warm` 0s"))
    bench.tables.append("### What is lost\n\n" + table(HEADER, rows))
    what = f"lost in {SWITCHES} switches, {BACK} of them rollbacks, {REPLACEMENTS} daemon replacements, {KILLS} `kill -9` of blue"
    bench.goal(what, f"{total.all_lost()} of {total.requests + total.wrk_requests:,}", "0", total.all_lost() == 0)
    bench.goal("WebSockets closed with a code that says why", f"{total.accounted():,} of {total.websockets:,}", "all", total.accounted() == total.websockets)
    share = total.rate() / capacity.rate()
    bench.goal("load meanwhile, of what the machine can carry", f"{share:.2f}x ({total.rate():,.0f}/s, {capacity.rate():,.0f}/s)", f"≥ {LOAD_SHARE}x", share >= LOAD_SHARE)
    bench.goal(f"lost in {UNDRAINED} switches without draining", f"{undrained.all_lost()} of {undrained.requests + undrained.wrk_requests:,}", "some", undrained.all_lost() > 0)
    bench.notes.append(
        f"Zero lost: {INSTANCES} local instances; our client ({MIX}) and wrk (1,000 B) with {CONNECTIONS} connections each, as fast as answers come, on the same processors as everything else. What the machine can carry is what both do with {MORE} times as many connections in {CAPACITY_SECONDS} s in which nothing happens. A request is anything that is asked once, as a WebSocket that is opened; codes: 1000, the client had enough; 1001, the application ended; 1012, the switch asked to come again."
    )


def without_draining(bench):
    """The same clients where nothing is waited for: they have to notice."""
    say(f"24: {UNDRAINED} switches without draining")
    with served(bench, local=f"{{ instances: {INSTANCES} }}", rollout=UNDRAINED_ROLLOUT) as site:
        with Load(bench, site, events=UNDRAINED) as load:
            for number in range(UNDRAINED):
                version = "1.100" if number % 2 == 0 else "1.101"
                switch(site, site.again(version), version)
    return load.counts


def tell(load):
    """Losses are worth more than their number."""
    for reason, count in sorted(load.counts.reasons.items()):
        say(f"24: lost {count}: {reason}")
    for loss in load.client.report["losses"][:10]:
        say(f"24:   {(loss['at'] - load.client.report['started']) / 1e9:.3f} s: {loss['kind']}: {loss['reason']}: {loss['detail']}")


MEASUREMENTS = {24: zero_lost}
