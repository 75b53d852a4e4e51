"""Runs commands and measures them: wall time, the scripts' own time, peak memory; keeps what was found. Knows nothing of the peers."""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field

# Lines of a failed command that are shown.
LAST_LINES = 25
# Seconds between two looks at /proc; VmHWM only rises, so that little is lost between them.
SAMPLE_SECONDS = 0.01
# A command that changes nothing is timed for about HYPERFINE_SECONDS, within these numbers of runs.
HYPERFINE_SECONDS, LEAST_RUNS, MOST_RUNS = 10, 5, 50
# Before a measurement, for what is still under way to end.
SETTLE_SECONDS = 1
# Percent of the processors' time from which on a machine counts as busy.
BUSY = 20
STARTED = time.monotonic()


class Failed(Exception):
    """A measurement could not be made."""


def call(argv, cwd=None, env=None, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE):
    """Runs a command and returns its output, standard error after standard output."""
    return timed(argv, cwd, env, stdin, stdout)[1]


def timed(argv, cwd=None, env=None, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE):
    """Wall seconds of a command, and its output."""
    started = time.perf_counter()
    try:
        done = subprocess.run(argv, cwd=cwd, env=env, stdin=stdin, stdout=stdout, stderr=subprocess.PIPE)
    except OSError as error:
        raise Failed(f"cannot run `{argv[0]}`: {error.strerror}") from error
    seconds = time.perf_counter() - started
    output = ((done.stdout or b"") + done.stderr).decode(errors="replace")
    check(argv, done.returncode, output)
    return seconds, output


def check(argv, status, output):
    if status != 0:
        last = "\n".join("  | " + line for line in output.splitlines()[-LAST_LINES:])
        raise Failed(f"`{shlex.join(map(str, argv))}` exited with status {status}\n{last}")


def answer(argv, cwd=None, env=None):
    """Wall seconds of a command, and the JSON on its standard output."""
    started = time.perf_counter()
    done = subprocess.run(argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seconds = time.perf_counter() - started
    check(argv, done.returncode, (done.stdout + done.stderr).decode(errors="replace"))
    try:
        return seconds, json.loads(done.stdout)
    except ValueError as error:
        raise Failed(f"`{shlex.join(map(str, argv))}` printed no JSON: {error}") from error


@dataclass
class Times:
    """Seconds of one command over several runs."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self):
        return statistics.median(self.seconds)

    def row(self):
        return [self.name, *(f"{value:.3f}" for value in (min(self.seconds), self.median, max(self.seconds))), str(len(self.seconds))]


def hyperfine(name, argv, work, cwd=None, env=None):
    """Times of a command that changes nothing, by hyperfine without a shell."""
    report = work / "hyperfine.json"
    seconds, _ = timed(argv, cwd, env)
    runs = min(max(int(HYPERFINE_SECONDS / seconds), LEAST_RUNS), MOST_RUNS)
    call(["hyperfine", "-N", "--style", "none", "--warmup", "2", "--runs", str(runs), "--export-json", report, shlex.join(map(str, argv))], cwd, env)
    return Times(name, json.loads(report.read_text())["results"][0]["times"])


def own_time(output):
    """Seconds between the last `bench: start NS` and `bench: end NS` that a script printed."""
    stamps = {word: int(ns) for word, ns in re.findall(r"bench: (start|end) (\d+)", output)}
    if len(stamps) != 2 or stamps["end"] < stamps["start"]:
        raise Failed(f"the script's time stamps are missing in what it printed: {output[-500:]}")
    return (stamps["end"] - stamps["start"]) / 1e9


class Memory:
    """Peak memory of the processes of one program below one process, while the block runs.

    `peak` is the largest sum of VmHWM (bytes) over the processes alive at one moment; `each` the
    VmHWM of every process by what it is; `name` is what the first one is.
    """

    def __init__(self, program, pid, name="build"):
        self.program, self.pid, self.name = program, pid, name
        self.peak, self.each = 0, {}
        self._identity = os.stat(program)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def _watch(self):
        while not self._ended.wait(SAMPLE_SECONDS):
            alive = {}
            for pid in self._family():
                try:
                    exe = os.stat(f"/proc/{pid}/exe")
                    if not os.path.samestat(exe, self._identity):
                        continue
                    with open(f"/proc/{pid}/status") as status:
                        kib = next((int(line.split()[1]) for line in status if line.startswith("VmHWM:")), 0)
                    with open(f"/proc/{pid}/cmdline") as cmdline:
                        words = cmdline.read().split("\0")
                except OSError:
                    continue
                name = words[1] if len(words) > 1 and words[1].startswith("__") else self.name
                alive[pid] = kib * 1024
                self.each[name] = max(self.each.get(name, 0), kib * 1024)
            self.peak = max(self.peak, sum(alive.values()))

    def _family(self):
        """The process and all its descendants."""
        children = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/stat") as stat:
                        parent = int(stat.read().rpartition(")")[2].split()[1])
                except (OSError, ValueError):
                    continue
                children.setdefault(parent, []).append(int(entry))
        family = [self.pid]
        for pid in family:
            family += children.get(pid, [])
        return family


class Report:
    """One section of the page: verdicts, notes, times, commands, versions."""

    def __init__(self, title, places):
        # `places`: folder → its name in commands.
        self.title, self.places = title, places
        self.verdicts, self.times, self.commands, self.notes, self.others, self.versions = [], [], [], [], [], {}
        # Markdown with a heading each, after the notes.
        self.tables = []

    def goal(self, what, measured, goal, met):
        self.verdicts.append([what, measured, goal, "PASS" if met else "FAIL"])
        say(f"{'PASS' if met else 'FAIL'}  {what}: {measured} (goal: {goal})")

    def timing(self, *times):
        self.times += times

    def command(self, what, argv):
        line = argv if isinstance(argv, str) else shlex.join(map(str, argv))
        for place, name in self.places.items():
            line = line.replace(str(place), name)
        self.commands.append([what, f"`{line}`"])

    def render(self):
        share = ", ".join(f"{percent:.0f} %" for percent in self.others)
        verdict = ": it was busy, and times are longer than they need be" if max(self.others) > BUSY else ""
        notes = [*self.notes, f"Other work on the machine before each measurement: {share} of its processors' time{verdict}."]
        page = f"## {self.title}\n\n" + table(["what", "measured", "goal", "verdict"], self.verdicts)
        page += "\n" + "".join(f"- {note}\n" for note in notes)
        page += "".join(f"\n{text}" for text in self.tables)
        page += "\n### Times in seconds\n\n" + table(["what", "least", "median", "most", "runs"], [times.row() for times in self.times])
        page += "\n### Commands\n\n" + table(["what", "command"], self.commands)
        page += "\n### Versions\n\n" + table(["what", "version"], [[name, text] for name, text in self.versions.items()])
        return page


def busy():
    """Percent of all processors' time that others use while this program waits."""

    def ticks():
        with open("/proc/stat") as stat:
            values = [int(word) for word in stat.readline().split()[1:9]]
        return sum(values), values[3] + values[4]

    # What was written so far goes to disk now, not during a measurement.
    os.sync()
    time.sleep(SETTLE_SECONDS)
    before = ticks()
    time.sleep(SETTLE_SECONDS)
    total, idle = (now - then for now, then in zip(ticks(), before))
    return 100 * (total - idle) / max(total, 1)


def say(text):
    print(f"{time.monotonic() - STARTED:4.0f} s  {text}", file=sys.stderr, flush=True)


def table(header, rows):
    """A Markdown table with columns of equal width."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["-"] * len(header), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines[1] = ["-" * width for width in widths]
    return "".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |\n" for line in lines)
