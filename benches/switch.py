"""Measures the traffic switch against Debian's haproxy and nginx.

One core for the proxy, one thread each; the other for the load and the upstream, which is the same for all: nginx with files.
"""

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import time
from dataclasses import dataclass, field

import peers
from measure import Failed, Report, call, check, say, table

# The goals, from the issue: of haproxy's.
THROUGHPUT, P99 = 0.8, 1.3
IDLE = 10_000
PACKAGES = {"haproxy": "haproxy", "nginx": "nginx-light", "h2load": "nghttp2-client"}
RUNS = 5
# Seconds of one run, of one with large bodies, and before them until the connections are there and the caches warm.
SECONDS, LARGE_SECONDS, WARM_SECONDS = 2.5, 5, 0.5
# The fixed rate is this share of the slowest's throughput: far from the knee, as a proxy is run.
RATE = 0.5
# Below this share of its core a proxy was not what limited the throughput.
SATURATED = 0.9
BODIES = {"0 B": 0, "20 KB": 20_000, "10 MB": 10_000_000}
# Protocol → port's name, options of h2load, requests at a time on each connection.
PROTOCOLS = {"HTTP/1.1": ("plain", ["--h1"], 1), "h2": ("h2", [], 4), "HTTP/1.1, TLS": ("tls", ["--h1"], 1), "h2, TLS": ("tls", [], 4)}
# Bytes of a large body; requests at a time in all, and of those.
LARGE, FLIGHT, FLIGHT_LARGE = 1_000_000, 64, 8
# Files that a proxy or a client with IDLE connections may open, at least and at most.
LEAST_FILES, FILES = IDLE + 1000, 40_000
START_SECONDS, HANG_SECONDS = 20, 60


class Bench(Report):
    """What the measurements share, and what they found."""

    def __init__(self, program, client, work, env, places):
        super().__init__("Switch", places)
        self.program, self.client, self.folder, self.env = program, client, work / "switch", env
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise Failed("measuring a proxy needs two processors: one for it, one for the load")
        self.core, self.load_core = cores[0], cores[1]
        self.ports = {}
        self.cleanup = contextlib.ExitStack()


@dataclass
class Proxy:
    """A proxy: how it is started at which ports, and its processes while it runs."""

    name: str
    argv: list
    ports: dict
    process: subprocess.Popen = None

    def start(self, bench):
        log = bench.folder / f"{self.name}.log"
        with open(log, "ab") as output:
            # By SIGTERM: the workers of nginx outlive a master that is killed.
            self.process = subprocess.Popen(pinned(bench.core, self.argv), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=bench.env, preexec_fn=lambda: peers.die_with_parent(signal.SIGTERM))
        deadline = time.monotonic() + START_SECONDS
        while not all(listens(port) for port in self.ports.values()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                check(self.argv, self.process.poll() or 1, log.read_text(errors="replace"))
            time.sleep(0.05)
        return self

    def stop(self):
        if self.process:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            self.process.kill()
            self.process.wait()
            self.process = None

    def pids(self):
        """The process and its children: nginx has a master and a worker."""
        children = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as stat:
                    if int(stat.read().rpartition(")")[2].split()[1]) == self.process.pid:
                        children.append(int(entry))
        return [self.process.pid, *children]

    def processor_seconds(self):
        ticks = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self):
        """Bytes of its own in memory now."""
        total = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/smaps_rollup") as rollup:
                total += sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith(("Private_Clean:", "Private_Dirty:")))
        return total


def pinned(core, argv):
    return ["taskset", "-c", str(core), *argv]


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def free_ports(names):
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in names}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in sockets.items()}


# -- what is measured -------------------------------------------------------------------------------


def prepare(bench):
    """Installs the peers, makes bodies and a certificate, starts the upstream and the proxies."""
    say("switch: starting the upstream, haproxy, nginx and the switch")
    install()
    bench.files = raise_files()
    bench.folder.mkdir(parents=True)
    # The worker of nginx is another user.
    bench.folder.chmod(0o755)
    (bench.folder / "files").mkdir()
    for name, size in BODIES.items():
        (bench.folder / "files" / str(size)).write_bytes(os.urandom(size))
    certificate(bench.folder)
    bench.upstream = free_ports(["upstream"])["upstream"]
    configuration = bench.folder / "upstream.conf"
    configuration.write_text(UPSTREAM.format(folder=bench.folder, port=bench.upstream, files=bench.files))
    upstream = Proxy("upstream", ["nginx", "-c", configuration], {"plain": bench.upstream})
    core, bench.core = bench.core, bench.load_core
    upstream.start(bench)
    bench.core = core
    bench.cleanup.callback(upstream.stop)
    bench.proxies = {}
    for name, make in PROXIES.items():
        ports = free_ports(["plain", "h2", "tls"])
        proxy = Proxy(name, make(bench, ports), ports).start(bench)
        bench.cleanup.callback(proxy.stop)
        bench.proxies[name] = proxy
    bench.versions |= {
        "haproxy, nginx, h2load": ", ".join(peers.version(package) for package in PACKAGES.values()),
        "pipeline": call([bench.program, "--version"]).strip(),
    }
    for name, proxy in bench.proxies.items():
        expect(bench, proxy)
        bench.command(name, proxy.argv)


def install():
    missing = [package for program, package in PACKAGES.items() if not shutil.which(program)]
    if not missing:
        return
    # Neither of the two is to serve anything here.
    for service in ("haproxy", "nginx"):
        if os.path.isdir("/run/systemd/system"):
            call(["systemctl", "mask", "--runtime", service])
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    call(["apt-get", "-q", "update"], env=env)
    call(["apt-get", "-q", "install", "-y", "--no-install-recommends", *missing], env=env)


def raise_files():
    """Connections are files; what is started from here has the limit too, which is returned."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        # Root may, but not in every container.
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, max(most, FILES)))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = min(most, FILES) if most != resource.RLIM_INFINITY else FILES
    if files < LEAST_FILES:
        raise Failed(f"a process may open {files} files here, and {IDLE} connections are measured: raise `ulimit -Hn` to {FILES}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return files


def certificate(folder):
    extensions = [word for text in ("subjectAltName=DNS:localhost,IP:127.0.0.1", "basicConstraints=critical,CA:FALSE") for word in ("-addext", text)]
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2", "-subj", "/CN=localhost"]
    call([*new, *extensions, "-out", folder / "certificate.pem", "-keyout", folder / "key.pem"])
    # haproxy has both in one file.
    (folder / "both.pem").write_text((folder / "certificate.pem").read_text() + (folder / "key.pem").read_text())


UPSTREAM = """\
worker_processes 1;
pid {folder}/upstream.pid;
error_log {folder}/upstream.error error;
daemon off;
worker_rlimit_nofile {files};
events {{ worker_connections {files}; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 100000000;
  open_file_cache max=16;
  server {{ listen 127.0.0.1:{port} backlog=4096; root {folder}/files; }}
}}
"""
NGINX = """\
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx.error error;
daemon off;
worker_rlimit_nofile {files};
events {{ worker_connections {files}; }}
http {{
  access_log off;
  keepalive_requests 100000000;
  keepalive_timeout 600s;
  client_body_temp_path {folder}/nginx-body;
  proxy_temp_path {folder}/nginx-proxy;
  fastcgi_temp_path {folder}/nginx-fastcgi;
  uwsgi_temp_path {folder}/nginx-uwsgi;
  scgi_temp_path {folder}/nginx-scgi;
  # Large answers are passed on, not written to disk.
  proxy_max_temp_file_size 0;
  ssl_certificate {folder}/certificate.pem;
  ssl_certificate_key {folder}/key.pem;
  ssl_protocols TLSv1.2 TLSv1.3;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{plain} backlog=4096;
    listen 127.0.0.1:{h2} http2 backlog=4096;
    listen 127.0.0.1:{tls} ssl http2 backlog=4096;
    location / {{
      proxy_pass http://up;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
      proxy_set_header X-Forwarded-Proto $scheme;
    }}
  }}
}}
"""
HAPROXY = """\
global
  nbthread 1
  maxconn 12000
  # It wants files for as many connections to the upstream too.
  no strict-limits
  ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
  mode http
  option forwardfor
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout http-keep-alive 600s
frontend all
  bind 127.0.0.1:{plain} backlog 4096
  bind 127.0.0.1:{h2} proto h2 backlog 4096
  bind 127.0.0.1:{tls} ssl crt {folder}/both.pem alpn h2,http/1.1 backlog 4096
  http-request set-header X-Forwarded-Proto https if {{ ssl_fc }}
  http-request set-header X-Forwarded-Proto http if !{{ ssl_fc }}
  default_backend up
backend up
  server up 127.0.0.1:{upstream} pool-max-conn -1
"""


def configured(bench, ports, name, text):
    path = bench.folder / name
    path.write_text(text.format(folder=bench.folder, upstream=bench.upstream, files=bench.files, **ports))
    return path


def haproxy(bench, ports):
    return ["haproxy", "-db", "-f", configured(bench, ports, "haproxy.cfg", HAPROXY)]


def nginx(bench, ports):
    return ["nginx", "-c", configured(bench, ports, "nginx.conf", NGINX)]


def ours(bench, ports):
    """The switch alone; src/cli/switch.rs says what is in its file."""
    path = bench.folder / "switch.json"
    configuration = {
        "listeners": [{"address": f"127.0.0.1:{ports[name]}", "tls": name == "tls"} for name in ("plain", "h2", "tls")],
        "certificates": [{"certificate": str(bench.folder / "certificate.pem"), "key": str(bench.folder / "key.pem")}],
        "workers": 1,
        "pools": {"only": [f"127.0.0.1:{bench.upstream}"]},
        "live": "only",
    }
    path.write_text(json.dumps(configuration, indent=2))
    return [bench.program, "__switch", path]


# In the table's order.
PROXIES = {"pipeline": ours, "haproxy": haproxy, "nginx": nginx}


def expect(bench, proxy):
    """Every body comes whole, over every protocol."""
    for protocol, (port, options, _) in PROTOCOLS.items():
        for size in BODIES.values():
            out = bench.folder / "answer"
            version = "--http1.1" if "--h1" in options else "--http2" if port == "tls" else "--http2-prior-knowledge"
            call(["curl", "-sSf", version, "--noproxy", "*", "--cacert", bench.folder / "certificate.pem", "-o", out, address(proxy, port, size)])
            if out.read_bytes() != (bench.folder / "files" / str(size)).read_bytes():
                raise Failed(f"{proxy.name} gives other bytes over {protocol} than the upstream")


def address(proxy, port, size):
    return f"{'https' if port == 'tls' else 'http'}://127.0.0.1:{proxy.ports[port]}/{size}"


# -- 20: throughput and latency ---------------------------------------------------------------------


@dataclass
class Load:
    """What h2load found in several runs."""

    rates: list = field(default_factory=list)
    # Requests per second of the proxy's processor time, and the share of its core.
    per_second: list = field(default_factory=list)
    shares: list = field(default_factory=list)
    p99s: list = field(default_factory=list)

    def median(self, name):
        return statistics.median(getattr(self, name))


def throughput(bench):
    rows = []
    for protocol in PROTOCOLS:
        for body, size in BODIES.items():
            say(f"20: {protocol}, {body}")
            saturated = {name: Load() for name in bench.proxies}
            fixed = {name: Load() for name in bench.proxies}
            for run in range(RUNS):
                for proxy in turns(bench, run):
                    h2load(bench, proxy, protocol, size, saturated[proxy.name])
            if size == 0:
                bench.command(f"{protocol}, as fast as it goes", h2load(bench, bench.proxies["pipeline"], protocol, size, Load()))
            rate = RATE * min(load.median("rates") for load in saturated.values())
            for run in range(RUNS):
                for proxy in turns(bench, run):
                    h2load(bench, proxy, protocol, size, fixed[proxy.name], rate)
            rows += compare(bench, f"{protocol}, {body}", saturated, fixed, rate)
    header = ["", *(f"{name}: requests/s" for name in bench.proxies), *(f"{name}: per s of its core" for name in bench.proxies), "fixed rate", *(f"{name}: p99 ms" for name in bench.proxies)]
    bench.tables.append("### Throughput, and p99 at a fixed rate\n\n" + table(header, rows))
    bench.notes += [
        f"Switch: each proxy has core {bench.core} and one thread, h2load and the upstream (nginx with files) core {bench.load_core}; medians of {RUNS} runs of {SECONDS} s in turns ({LARGE_SECONDS} s with 10 MB); {FLIGHT} requests at a time, {FLIGHT_LARGE} of 10 MB, over h2 four on each connection.",
        f"Switch: connections to clients and to the upstream are kept; nobody writes an access log; all three set `X-Forwarded-For` and `X-Forwarded-Proto`; nginx passes large answers on instead of writing them to disk. The fixed rate is {RATE:.0%} of the slowest's throughput.",
        f"Switch: where a proxy did not use {SATURATED:.0%} of its core, it was not what limited the throughput, and requests per second of its processor time count.",
    ]


def turns(bench, run):
    """The proxies, another one first each time."""
    proxies = [*bench.proxies.values()]
    return proxies[run % len(proxies) :] + proxies[: run % len(proxies)]


def h2load(bench, proxy, protocol, size, load, rate=None):
    """One run, as fast as it goes without a rate; returns the command."""
    port, options, streams = PROTOCOLS[protocol]
    flight, seconds = (FLIGHT_LARGE, LARGE_SECONDS) if size > LARGE else (FLIGHT, SECONDS)
    clients = max(flight // streams, 1)
    log = bench.folder / "h2load.log"
    log.unlink(missing_ok=True)
    argv = ["h2load", *options, "-t", "1", "-c", str(clients), "-m", str(streams), "-D", f"{seconds * 1000:.0f}ms", "--warm-up-time", f"{WARM_SECONDS * 1000:.0f}ms"]
    argv += ["--log-file", log] if rate else []
    argv += ["--rps", f"{rate / clients:.4f}"] if rate else []
    argv = pinned(bench.load_core, [*argv, address(proxy, port, size)])
    process = subprocess.Popen(argv, env=bench.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=peers.die_with_parent)
    try:
        share = in_the_middle(proxy, seconds)
        output, _ = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"`{shlex.join(map(str, argv))}` does not end") from error
    finally:
        process.kill()
        process.wait()
    check(argv, process.returncode, output)
    found = re.search(r"finished in [^,]+, ([\d.]+) req/s", output)
    failed = re.search(r"(\d+) failed, (\d+) errored, (\d+) timeout", output)
    status = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", output)
    if not found or not failed or not status or any(map(int, failed.groups())) or any(map(int, status.groups()[1:])) or int(status[1]) == 0:
        raise Failed(f"not every request to {proxy.name} was answered:\n{output}")
    load.rates.append(float(found[1]))
    load.shares.append(share)
    load.per_second.append(float(found[1]) / max(share, 0.001))
    if rate:
        load.p99s.append(p99(log))
    return argv


def in_the_middle(proxy, seconds):
    """The share of its core that the proxy uses in the middle of a run that begins now, without the warming up and the end."""
    time.sleep(WARM_SECONDS + 0.2 * seconds)
    before, started = proxy.processor_seconds(), time.perf_counter()
    time.sleep(0.6 * seconds)
    return (proxy.processor_seconds() - before) / (time.perf_counter() - started)


def p99(log):
    """Milliseconds, of what h2load wrote: start, status and microseconds of each request."""
    times = sorted(int(line.split("\t")[2]) for line in log.read_text().splitlines())
    if not times:
        raise Failed("h2load wrote no request into its log")
    return times[max(-(-len(times) * 99 // 100), 1) - 1] / 1000


def compare(bench, what, saturated, fixed, rate):
    own, peer = saturated["pipeline"], saturated["haproxy"]
    busy = min(own.median("shares"), peer.median("shares")) >= SATURATED
    name = "rates" if busy else "per_second"
    ratio = own.median(name) / peer.median(name)
    how = "" if busy else " per second of its core"
    bench.goal(f"{what}: throughput{how}, of haproxy's", f"{ratio:.2f}x ({own.median(name):,.0f}, {peer.median(name):,.0f})", f"≥ {THROUGHPUT}x", ratio >= THROUGHPUT)
    own, peer = fixed["pipeline"].median("p99s"), fixed["haproxy"].median("p99s")
    bench.goal(f"{what}: p99 at {rate:,.0f}/s, of haproxy's", f"{own / peer:.2f}x ({own:.2f} ms, {peer:.2f} ms)", f"≤ {P99}x", own / peer <= P99)
    cells = [f"{load.median(name):,.0f}" for name in ("rates", "per_second") for load in saturated.values()]
    return [[what, *cells, f"{rate:,.0f}", *(f"{load.median('p99s'):.2f}" for load in fixed.values())]]


# -- 21: idle connections ---------------------------------------------------------------------------


def idle(bench):
    say(f"21: {IDLE} idle connections")
    rows = []
    for name, proxy in bench.proxies.items():
        row = [name]
        for port in ("plain", "tls"):
            # One that has not grown yet.
            proxy.stop()
            proxy.start(bench)
            expect(bench, proxy)
            before = proxy.memory()
            with contextlib.ExitStack() as stack:
                for _ in range(IDLE):
                    stack.enter_context(asked(bench, proxy.ports[port], port == "tls"))
                time.sleep(1)
                each = (proxy.memory() - before) / IDLE
                # It still answers.
                expect(bench, proxy)
            row += [f"{before / 1e6:.1f} MB", f"{each / 1000:.2f} KB"]
            if name == "pipeline":
                bench.notes.append(f"Switch: {IDLE:,} idle connections{' of TLS' if port == 'tls' else ''} take {each / 1000:.2f} KB each of the switch's own memory (the kernel's not counted).")
        rows.append(row)
    header = ["", "before", f"each of {IDLE:,}", "before, TLS", f"each of {IDLE:,}, TLS"]
    bench.tables.append("### Memory of idle connections\n\n" + table(header, rows))


def asked(bench, port, tls):
    """A connection that had one request answered."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    if tls:
        context = bench.__dict__.setdefault("context", ssl.create_default_context(cafile=bench.folder / "certificate.pem"))
        connection = context.wrap_socket(connection, server_hostname="127.0.0.1")
    connection.sendall(b"GET /0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while b"\r\n\r\n" not in answer:
        some = connection.recv(4096)
        if not some:
            raise Failed(f"a connection was closed: {answer!r}")
        answer += some
    if not answer.startswith(b"HTTP/1.1 200"):
        raise Failed(f"not answered: {answer[:200]!r}")
    return connection


MEASUREMENTS = {20: throughput, 21: idle}
