#!/usr/bin/env python3
"""What a month of decisions must have come to, thought out a second time.

    model.py LEDGER.git ALLOWED_SIGNERS STORE

Reads the commits of a ledger with `git log` (names, times, signatures, messages with their trailers; no file of the ledger), decides
each one again by the team's rules as they are written down here, and follows what every environment has. Only then the files of
the tip are read and compared, and the blobs of the releases that are in use. Nothing of the program is used.

What a release is like says its version: `7.12` is as it should be, `7.13-dirty` has the one thing that its gate must refuse.
Prints what is wrong, a line each, then the number of decisions of each kind. Exits 1 when something is wrong.
"""

import collections
import datetime
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

HOUR = 3600
REMEMBERED = 50
# Releases of an environment that are not pruned.
KEPT = 10

# -- the team and its rules, as tests/month.rs writes them into pipeline files --------------------------------------------------

PEOPLE = {
    "ann": {"admin", "promote", "approve", "override"},
    "ben": {"promote", "approve"},
    "cho": {"promote", "approve"},
    "dan": {"approve"},
    "eve": {"promote"},
    "ci": {"promote"},
}
ROLES = {
    "apply": {"admin"},
    **dict.fromkeys(("enter", "promote", "rollback", "configure", "clear"), {"promote"}),
    **dict.fromkeys(("hold", "lift", "freeze", "thaw"), {"promote", "admin", "override"}),
    "approve": {"approve"},
}
FROM = {"dev": [], "stage": ["dev"], "prod": ["stage"], "lab": ["dev"], "canary": ["stage"], "edge": ["canary"]}
AUTOMATIC = {"dev", "stage"}
# Nothing serves its target in this month: nobody knows how it does.
UNSERVED = {"canary"}
GATES = {
    "stage": ["signed", "sbom", "report"],
    "prod": ["soak", "approve", "window", "provenance", "budget", "command", "http"],
    "lab": ["vm-test"],
    "edge": ["healthy"],
}
# Gates that are asked again when only the configuration changes.
OF_THE_PAIR = {"approve", "window", "command", "http"}
# By the number of the policy: soak, approvals, configuration of prod.
POLICIES = {1: (6 * HOUR, 2, {"REGION": "north"}), 2: (4 * HOUR, 1, {"REGION": "south"})}
# What is wrong with a release → the gate that must refuse it.
REFUSED = {
    "unsigned": "signed",
    "foreign": "signed",
    "leftpad": "sbom",
    "noreport": "report",
    "failed": "report",
    "dirty": "provenance",
    "heavy": "budget",
    "closed": "command",
    "crash": "command",
    "down": "http",
}


class Binding:
    """A release with its configuration in an environment."""

    def __init__(self, release, version, values, author, since=None, doubtful=False):
        self.release, self.version, self.values, self.author = release, version, values, author
        self.since, self.doubtful = since, doubtful
        self.healthy, self.soaked = None, 0

    @property
    def pair(self):
        return self.release, digest(self.values)


class Environment:
    def __init__(self, declared, time):
        self.current, self.before = None, []
        self.values, self.declared = dict(declared), dict(declared)
        self.hold, self.freezes, self.approvals, self.bad = None, [], [], {}
        self.health = ("unknown", time, False)
        self.time = time

    def bindings(self):
        return ([self.current] if self.current else []) + self.before

    def needed(self):
        """The releases that must not be pruned: the current one, the last KEPT others, where a rollback goes, what is approved."""
        needed = [binding.release for binding in self.before]
        needed = sorted(set(needed), key=needed.index)[:KEPT]
        needed += [self.current.release] if self.current else []
        good = (b for b in self.before if b.healthy and b.release not in self.bad and b.pair != self.current.pair)
        needed += [b.release for b in good][:1]
        return {*needed, *(release for _, release, _ in self.approvals)}

    def had(self, release):
        return bool(self.current and self.current.release == release) or any(b.healthy and b.release == release for b in self.before)

    def soaked(self, release, time):
        """Seconds without a break; None: the clock cannot tell."""
        past = max((b.soaked for b in self.before if b.healthy and b.release == release), default=0)
        if not self.current or self.current.release != release or self.health[0] != "healthy":
            return past
        if self.current.doubtful or self.health[2] or time < self.time:
            return None
        return max(time - max(self.current.since, self.health[1]), past)

    def next_values(self, declared):
        """What was said last counts: a value the policy changed since is the policy's."""
        merged = {}
        for key in {*self.declared, *declared, *self.values}:
            ours = declared.get(key) == self.declared.get(key)
            value = (self.values if ours else declared).get(key)
            if value is not None:
                merged[key] = value
        return merged


def digest(values):
    text = json.dumps({"values": dict(sorted(values.items())), "secrets": {}}, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class Model:
    def __init__(self):
        self.pipelines, self.policies, self.frozen, self.wrong, self.kinds = {}, {}, {}, [], collections.Counter()
        self.refused_at = collections.Counter()

    def run(self, commits):
        for commit in commits:
            self.commit = commit
            self.kinds[commit["kind"]] += 1
            try:
                self.decide(commit)
            except (KeyError, ValueError, AttributeError, TypeError) as error:
                self.find(f"cannot be understood: {error!r}")

    def find(self, what):
        self.wrong.append(f"{self.commit['id'][:12]} ({self.commit['subject']}): {what}")

    def expect(self, good, what):
        if not good:
            self.find(what)

    # -- one decision -------------------------------------------------------------------------------------------------------

    def decide(self, commit):
        actor, kind, pipeline = commit["actor"], commit["kind"], commit["pipeline"]
        self.expect(actor == commit["by"], f"is by {commit['by']}, and says {actor}")
        self.expect(commit["time"] == commit["written"], "says another time than its commit")
        first = kind == "apply" and pipeline not in self.pipelines
        self.expect(first or commit["signer"] == actor, f"is signed by {commit['signer'] or 'nobody'}")
        self.expect(first or PEOPLE.get(actor, set()) & ROLES[kind], f"{actor} may not {kind}")
        if commit["overridden"]:
            self.expect("override" in PEOPLE.get(actor, set()), f"{actor} may not go past gates")
            self.expect(commit["reason"], "goes past a gate without a reason")
        if pipeline == "*":
            return self.freeze_all(commit)
        if kind == "apply":
            return self.apply(commit)
        here = self.pipelines[pipeline][commit["environment"]]
        {
            "enter": self.promote,
            "promote": self.promote,
            "rollback": self.rollback,
            "configure": self.configure,
            "approve": self.approve,
        }.get(kind, self.plain)(commit, here)
        here.time = commit["time"]

    def apply(self, commit):
        self.policies[commit["pipeline"]] = int(re.fullmatch(r"policy (\d+)", commit["reason"])[1])
        if commit["pipeline"] not in self.pipelines:
            self.pipelines[commit["pipeline"]] = {name: Environment(self.declared(commit, name), commit["time"]) for name in FROM}

    def freeze_all(self, commit):
        name, time = commit["environment"], commit["time"]
        self.frozen = {key: freeze for key, freeze in self.frozen.items() if freeze[1] is None or time < freeze[1]}
        if commit["kind"] == "freeze":
            self.expect(commit["reason"], "freezes without a reason")
            self.frozen[name] = (commit["actor"], commit["until"])
        else:
            self.expect(self.frozen.pop(name, None), "thaws what is not frozen")

    def declared(self, commit, environment):
        return POLICIES[self.policies[commit["pipeline"]]][2] if environment == "prod" else {}

    def is_frozen(self, commit, here):
        freezes = [*here.freezes, *([self.frozen[commit["environment"]]] if commit["environment"] in self.frozen else [])]
        return any(until is None or commit["time"] < until for _, until in freezes)

    def not_frozen(self, commit, here):
        if self.is_frozen(commit, here):
            self.expect("freeze" in commit["overridden"], "changes what is frozen")

    def promote(self, commit, here):
        name, release = commit["environment"], commit["to"]
        values = here.next_values(self.declared(commit, name))
        upstream = [self.pipelines[commit["pipeline"]][up] for up in FROM[name]]
        self.expect((commit["kind"] == "enter") == (not upstream), "enters or is promoted where it cannot")
        if upstream:
            self.expect(any(up.had(release) and release not in up.bad for up in upstream), "was not upstream")
            known = [b for up in upstream for b in up.bindings() if b.release == release]
            self.expect(not known or known[0].author == commit["author"], f"has another author: {commit['author']}")
        self.expect(release not in here.bad, "is marked bad")
        self.expect(commit["from"] == (here.current.release if here.current else None), "comes from another release")
        self.expect(commit["config"] == digest(values), "has another configuration")
        self.expect(not here.current or here.current.pair != (release, digest(values)), "is there already")
        self.expect(not here.hold or (commit["lift"] and not commit["automatic"]), "does not respect the hold")
        if commit["automatic"]:
            self.expect(name in AUTOMATIC and not commit["overridden"], "is not to come by itself")
            self.expect(release not in [b.release for b in here.bindings()], "was brought back by itself")
        self.not_frozen(commit, here)
        self.gates(commit, here, commit["version"], (release, digest(values)), commit["author"], GATES.get(name, []))
        here.hold = None
        self.bind(commit, here, Binding(release, commit["version"], values, commit["author"]))

    def gates(self, commit, here, version, pair, author, names):
        for name in names:
            said = commit["gates"].get(name, "nothing")
            truth = self.gate(commit, here, name, version, pair, author)
            if said == "OVERRIDDEN":
                continue
            if said != "allow" or not truth:
                self.find(f"the gate {name} said {said}, and is {'open' if truth else 'shut'}")

    def gate(self, commit, here, name, version, pair, author):
        """Whether a gate is open, by the rules above."""
        soak, count, _ = POLICIES[self.policies[commit["pipeline"]]]
        trait = version.partition("-")[2]
        time = commit["time"]
        if name == "soak":
            seconds = [self.pipelines[commit["pipeline"]][up].soaked(pair[0], time) for up in FROM[commit["environment"]]]
            return any(one is not None and one >= soak for one in seconds)
        if name == "approve":
            counted = {by for by, *of in here.approvals if tuple(of) == pair}
            return len(counted) >= count and counted != {author}
        if name == "window":
            moment = datetime.datetime.fromtimestamp(time, datetime.timezone.utc)
            return moment.weekday() < 5 and 9 <= moment.hour < 17
        if name == "healthy":
            return FROM[commit["environment"]][0] not in UNSERVED
        if name == "vm-test":
            # These releases have no disk to boot.
            return False
        if name == "budget" and here.current is None:
            return True
        return REFUSED.get(trait) != name

    def bind(self, commit, here, binding):
        doubtful = commit["time"] < here.time
        if here.current:
            gone = here.current
            gone.healthy = here.health[0] == "healthy"
            gone.soaked = (here.soaked(gone.release, commit["time"]) or 0) if gone.healthy else 0
            here.before = [gone, *here.before][:REMEMBERED]
        here.approvals = [approval for approval in here.approvals if approval[1:] != binding.pair]
        here.values, here.declared = dict(binding.values), dict(self.declared(commit, commit["environment"]))
        here.health = ("unknown" if commit["environment"] in UNSERVED else "healthy", commit["time"], doubtful)
        binding.since, binding.doubtful = commit["time"], doubtful
        here.current = binding

    def rollback(self, commit, here):
        pair = commit["to"], commit["config"]
        found = next((b for b in here.before if b.pair == pair), None)
        if not found or not here.current:
            return self.find("goes back to what was not there")
        self.expect(commit["from"] == here.current.release, "comes from another release")
        self.expect(found.release not in here.bad, "is marked bad")
        self.expect(found.pair != here.current.pair, "is there already")
        self.not_frozen(commit, here)
        if here.current.release != found.release:
            here.bad[here.current.release] = commit["actor"]
        self.bind(commit, here, Binding(found.release, found.version, found.values, found.author))
        here.hold = (commit["actor"], "rollback")

    def configure(self, commit, here):
        values = here.next_values(self.declared(commit, commit["environment"]))
        for word in commit["reason"].split():
            key, _, value = word.partition("=")
            values[key] = value
        self.expect(commit["config"] == digest(values), "is another configuration than its reason says")
        if commit["to"] is None:
            self.not_frozen(commit, here)
            here.values, here.declared = values, dict(self.declared(commit, commit["environment"]))
            return
        current = here.current
        self.expect(current.release == commit["to"] and current.release not in here.bad, "configures another release")
        self.expect(current.pair != (current.release, digest(values)), "is there already")
        self.not_frozen(commit, here)
        names = [name for name in GATES.get(commit["environment"], []) if name in OF_THE_PAIR]
        self.gates(commit, here, current.version, (current.release, digest(values)), current.author, names)
        self.bind(commit, here, Binding(current.release, current.version, values, current.author))

    def approve(self, commit, here):
        values = here.next_values(self.declared(commit, commit["environment"]))
        approval = (commit["actor"], commit["to"], commit["config"])
        self.expect(commit["config"] == digest(values), "approves another configuration")
        self.expect("approve" in GATES.get(commit["environment"], []), "approves where nobody asks")
        self.expect(commit["to"] not in here.bad and approval not in here.approvals, "approves what cannot be approved")
        here.approvals.append(approval)

    def plain(self, commit, here):
        actor, kind = commit["actor"], commit["kind"]
        if kind == "hold":
            here.hold = (actor, "hold")
        elif kind == "lift":
            self.expect(here.hold, "lifts no hold")
            here.hold = None
        elif kind == "freeze":
            self.expect(commit["reason"], "freezes without a reason")
            # Who freezes forgets those that are over, and nobody else does.
            here.freezes = [freeze for freeze in here.freezes if freeze[1] is None or commit["time"] < freeze[1]]
            here.freezes.append((actor, commit["until"]))
        elif kind == "thaw":
            self.expect(any(until is None or commit["time"] < until for _, until in here.freezes), "thaws what is not frozen")
            here.freezes = []
        elif kind == "clear":
            self.expect(here.bad.pop(commit["to"], None), "clears what is not bad")
        else:
            self.find(f"is a {kind}, and nobody of the team does that")


# -- reading ----------------------------------------------------------------------------------------------------------------


def git(ledger, *arguments):
    done = subprocess.run(["git", "-C", ledger, *arguments], stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def read_commits(ledger, signers):
    """All decisions, the first one first."""
    form = "%H%x1f%an%x1f%at%x1f%G?%x1f%GS%x1f%B%x1e"
    text = git(ledger, "-c", f"gpg.ssh.allowedSignersFile={signers}", "log", "--reverse", f"--format={form}", "main")
    for record in filter(None, (part.strip("\n") for part in text.split("\x1e"))):
        commit_id, by, written, good, signer, message = record.split("\x1f")
        paragraphs = message.strip("\n").split("\n\n")
        pairs = [line.split(": ", 1) for line in paragraphs[-1].splitlines()]
        trailers, gates = {}, {}
        for key, value in pairs:
            if key == "Gate":
                gate, verdict, *_ = value.split(" ", 2)
                gates[gate] = verdict
            else:
                trailers[key] = value
        version = re.match(r"\S+: \S+ (\S+) \([0-9a-f]{12}\)", paragraphs[0])
        none = lambda key: None if trailers.get(key, "none") == "none" else trailers[key]
        seconds = lambda key: int(datetime.datetime.fromisoformat(trailers[key]).timestamp()) if key in trailers else None
        yield {
            "id": commit_id,
            "by": by,
            "written": int(written),
            "signer": signer if good == "G" else None,
            "subject": paragraphs[0],
            "reason": "\n\n".join(paragraphs[1:-1]),
            "kind": trailers["Decision"],
            "pipeline": trailers["Pipeline"],
            "environment": trailers["Environment"],
            "actor": trailers["Actor"],
            "from": none("From"),
            "to": none("To"),
            "config": none("Config"),
            "author": none("Author"),
            "version": version[1] if version else None,
            "gates": gates,
            "overridden": [gate for gate, verdict in gates.items() if verdict == "OVERRIDDEN"],
            "lift": trailers.get("Lift") == "yes",
            "automatic": trailers.get("Automatic") == "yes",
            "until": seconds("Until"),
            "time": seconds("Time"),
        }


# -- comparing with the files of the tip ------------------------------------------------------------------------------------


def compare(model, ledger):
    files = git(ledger, "ls-tree", "-r", "--name-only", "main").split()
    wanted = {"ledger.json", *(f"{name}.json" for name in model.pipelines)}
    wanted |= {f"{name}/{environment}.json" for name in model.pipelines for environment in FROM}
    wanted |= {"frozen.json"} if model.frozen else set()
    if set(files) != wanted:
        model.wrong.append(f"the ledger has the files {sorted(set(files) ^ wanted)} too many or too few")
    show = lambda path: json.loads(git(ledger, "show", f"main:{path}"))
    if "frozen.json" in files:
        found = {name: (freeze["by"], stamp(freeze.get("until"))) for name, freeze in show("frozen.json")["environments"].items()}
        if found != model.frozen:
            model.wrong.append(f"frozen.json has {found}, and should have {model.frozen}")
    releases = set()
    for pipeline, environments in model.pipelines.items():
        for name, here in environments.items():
            found, expected = from_file(show(f"{pipeline}/{name}.json")), from_model(here)
            for key in expected:
                if found[key] != expected[key]:
                    model.wrong.append(f"{pipeline}/{name}: {key} is {found[key]}, and should be {expected[key]}")
            releases |= here.needed()
    return releases


def stamp(text):
    return None if text is None else int(datetime.datetime.fromisoformat(text).timestamp())


def from_file(state):
    values = lambda config: digest(config["values"]) if not config["secrets"] else "secrets"
    binding = lambda b: (b["release"], b["version"], values(b["config"]), b.get("author"), stamp(b["since"]), b.get("doubtful", False))
    current, hold = state["current"], state["hold"]
    return {
        "current": binding(current) if current else None,
        "before": [(*binding(past), past["healthy"], past["soaked"]) for past in state["before"]],
        "configuration": values(state["config"]),
        "hold": (hold["by"], hold["set_by"]) if hold else None,
        "freezes": [(freeze["by"], stamp(freeze.get("until"))) for freeze in state["freezes"]],
        "approvals": [(approval["by"], approval["release"], approval["config"]) for approval in state["approvals"]],
        "bad": {release: bad["by"] for release, bad in state["bad"].items()},
        "health": (state["health"]["status"], stamp(state["health"]["since"]), state["health"].get("doubtful", False)),
    }


def from_model(here):
    binding = lambda b: (b.release, b.version, digest(b.values), b.author, b.since, b.doubtful)
    return {
        "current": binding(here.current) if here.current else None,
        "before": [(*binding(past), past.healthy, past.soaked) for past in here.before],
        "configuration": digest(here.values),
        "hold": here.hold,
        "freezes": here.freezes,
        "approvals": here.approvals,
        "bad": here.bad,
        "health": here.health,
    }


def check_blobs(model, releases, store):
    """Every blob of the releases is in the store, and is what its name says."""
    done, waiting = set(), list(releases)
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        path = Path(store) / "blobs" / name.replace(":", "/")
        data = path.read_bytes() if path.exists() else None
        if data is None or hashlib.sha256(data).hexdigest() != name.split(":")[1]:
            model.wrong.append(f"the store does not have {name}, which a release in use needs")
        elif data[:1] == b"{":
            manifest = json.loads(data)
            below = [*manifest.get("manifests", []), *manifest.get("layers", []), manifest.get("config")]
            waiting += [one["digest"] for one in below if isinstance(one, dict) and "digest" in one]
    return len(done)


def main():
    ledger, signers, store = sys.argv[1:]
    model = Model()
    model.run(read_commits(ledger, signers))
    releases = compare(model, ledger)
    blobs = check_blobs(model, releases, store)
    print("\n".join(model.wrong))
    print(f"{sum(model.kinds.values())} decisions:", ", ".join(f"{kind} {count}" for kind, count in sorted(model.kinds.items())))
    print(f"{len(releases)} releases in use, {blobs} blobs")
    sys.exit(bool(model.wrong))


if __name__ == "__main__":
    main()
