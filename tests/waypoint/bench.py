"""`python -m tests.waypoint.bench`, or `make bench-waypoint`: a waypoint beside nginx.

Both proxies stand in the same pod in front of the same nginx backend, with the same route.
To nginx the load goes in plain TCP, and on from it; to the waypoint it comes over HBONE from a
captured pod, and goes on over HBONE to a captured pod: what a waypoint is for. CPU time is the
proxy's own (the node agents' is in docs/performance/bench.md). Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.bench.__main__ import _commit, _cpu
from tests.bench.rig import cpu_time_s
from tests.progs.program import BedError, Program, eventually, run_inside
from tests.waypoint.bed import WaypointBed, inside_connect, route, to, vip

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/performance/waypoint.md"
CONNECTIONS = 16
CLIENTS = 6
"""Pods that load several workers, each with a tunnel of its own: a tunnel is one worker's."""
WORKERS = (1, 2)
NGINX_PORT, NGINX_H2_PORT = 8000, 8001
BACKEND = """
worker_processes 1; daemon off; error_log stderr crit; pid {dir}/backend.pid;
events {{ worker_connections 1024; }}
http {{ access_log off; keepalive_requests 1000000;
  server {{ listen 8080; location / {{ return 200 "hello from the backend\\n"; }} }} }}
"""
PROXY = """
worker_processes 1; daemon off; error_log stderr crit; pid {dir}/proxy.pid;
events {{ worker_connections 1024; }}
http {{ access_log off; keepalive_requests 1000000;
  upstream backend {{ server {backend}:8080; keepalive 64; keepalive_requests 1000000; }}
  server {{ listen {port}; listen {port2} http2;
    location / {{ proxy_pass http://backend; proxy_http_version 1.1;
                  proxy_set_header Connection ""; }} }} }}
"""


@dataclass(frozen=True)
class Sample:
    """One measurement of one lane."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_1000: float


@dataclass(frozen=True)
class Lane:
    """Who carries the requests, and by which HTTP."""

    proxy: str
    http: str
    pid: Callable[[], int]
    load: Callable[[float], tuple[float, float, float, float]]
    """Seconds to (requests, requests/s, p50 ms, p99 ms)."""


@dataclass(frozen=True)
class Shared:
    """One measurement of a waypoint with several workers."""

    requests_per_s: float
    cpu_ms_per_1000: float
    least_share: float
    """Of the busiest worker's requests, by CPU time, what the idlest had."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.waypoint.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--output", type=Path, default=None, help=f"write a page, such as {PAGE}")
    parser.add_argument("--tag", default=f"{os.environ.get('MESHBPF_TESTBED_TAG', 'tb')}wb")
    options = parser.parse_args()
    for tool, package in (("wrk", "wrk"), ("nginx", "nginx-light"), ("h2load", "nghttp2-client")):
        if shutil.which(tool) is None:
            print(f"{tool} is missing: apt-get install {package}", file=sys.stderr)
            return 77
    began = datetime.datetime.now(datetime.UTC)
    samples: dict[tuple[str, str], list[Sample]] = {}
    load_before = os.getloadavg()[0]
    with WaypointBed(options.tag) as bed:
        lanes = standing(bed)
        for lane in lanes:
            lane.load(0.5)
        for number in range(options.rounds):
            start = number % len(lanes)
            for lane in lanes[start:] + lanes[:start]:
                sample = measure(lane, options.seconds)
                samples.setdefault((lane.proxy, lane.http), []).append(sample)
                print(f"round {number + 1}: {lane.proxy} {lane.http}: {sample}", file=sys.stderr)
        shared = measure_workers(bed, options.rounds, options.seconds)
    facts = [
        ("when", f"{began:%Y-%m-%d %H:%M} UTC"),
        ("machine", f"{_cpu()}, {os.cpu_count()} cores, Linux {platform.release()}"),
        ("load average before", f"{load_before:.2f}"),
        ("meshbpf", f"commit {_commit()}, one worker"),
        ("nginx", subprocess.run(["nginx", "-v"], capture_output=True, text=True).stderr.strip()),
        ("rounds", f"{options.rounds}, interleaved, {options.seconds:g} s each"),
        ("load", f"{CONNECTIONS} keep-alive connections (wrk), 16 streams on one (h2load)"),
    ]
    text = page(samples, facts) + "\n" + workers_page(shared)
    print(text)
    if options.output is not None:
        options.output.write_text(text)
    return 0


def standing(bed: WaypointBed) -> list[Lane]:
    """All parts up: backend in n2a, both proxies in the waypoint's pod."""
    bed.start_agents()
    bed.attach_all()
    backend = _nginx(bed, "n2a", "backend", BACKEND)
    eventually("the backend listens", lambda: _listens(bed, "n2a", 8080), 10.0)
    target = bed["n2a"].ipv4
    # The plain lane's backend is the same nginx, reached from the same pod.
    plain = _nginx(bed, "wp", "proxy", PROXY, backend=target)
    eventually("nginx listens", lambda: _listens(bed, "wp", NGINX_PORT), 10.0)
    bed.extra.append(route("bench", to("echo-v1"), parent="echo-v1"))
    bed.write_mesh()
    bed.start_waypoint("--log-level", "warning")
    waypoint = bed.waypoint
    assert waypoint is not None
    assert backend.running
    wp = bed["wp"].ipv4
    service = f"{vip('echo-v1')}:80"
    return [
        Lane("meshbpf", "HTTP/1.1", lambda: waypoint.pid, _wrk(bed, "n1a", service)),
        Lane("nginx", "HTTP/1.1", lambda: plain.pid, _wrk(bed, "n1x", f"{wp}:{NGINX_PORT}")),
        Lane("meshbpf", "HTTP/2", lambda: waypoint.pid, _h2load(bed, "n1a", service)),
        Lane("nginx", "HTTP/2", lambda: plain.pid, _h2load(bed, "n1x", f"{wp}:{NGINX_H2_PORT}")),
    ]


def measure(lane: Lane, seconds: float) -> Sample:
    before = cpu_time_s(lane.pid())
    requests, rate, p50, p99 = lane.load(seconds)
    spent_s = cpu_time_s(lane.pid()) - before
    return Sample(rate, p50, p99, spent_s * 1e6 / max(requests, 1))


def page(samples: dict[tuple[str, str], list[Sample]], facts: list[tuple[str, str]]) -> str:
    lines = [
        "# Requests through a waypoint",
        "",
        "`make bench-waypoint`: the waypoint beside nginx as a plain reverse proxy, in the same",
        "pod, in front of the same backend. The waypoint's side is HBONE in and HBONE out, with",
        "one HTTPRoute; nginx's is plain TCP on both sides. CPU time is the process's own.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        "| proxy | HTTP | requests/s | p50 | p99 | CPU of 1000 requests |",
        "|---|---|--:|--:|--:|--:|",
    ]
    medians: dict[tuple[str, str], float] = {}
    for key, found in samples.items():
        cpu = statistics.median(each.cpu_ms_per_1000 for each in found)
        medians[key] = cpu
        lines.append(
            f"| {key[0]} | {key[1]} "
            f"| {statistics.median(each.requests_per_s for each in found):.0f} "
            f"| {statistics.median(each.p50_ms for each in found):.2f} ms "
            f"| {statistics.median(each.p99_ms for each in found):.2f} ms "
            f"| {cpu:.0f} ms |"
        )
    lines.append("")
    for http in ("HTTP/1.1", "HTTP/2"):
        ratio = medians["meshbpf", http] / medians["nginx", http]
        lines.append(f"{http}: {ratio:.1f} times nginx's CPU a request.")
    return "\n".join([*lines, ""])


def measure_workers(bed: WaypointBed, rounds: int, seconds: float) -> dict[int, list[Shared]]:
    """The same route under load from several pods, by one worker and by two, interleaved."""
    clients = [f"n1{letter}" for letter in "cdefgh"[:CLIENTS]]
    for name in clients:
        bed.add_pod(name, 1)
    bed.wait_mesh()
    for name in clients:
        bed.agents[1].attach(bed[name])
    loads = [_wrk(bed, name, f"{vip('echo-v1')}:80", connections=4) for name in clients]
    found: dict[int, list[Shared]] = {}
    for number in range(rounds):
        for workers in WORKERS[:: 1 if number % 2 else -1]:
            assert bed.waypoint is not None
            bed.waypoint.end()
            bed.start_waypoint("--log-level", "warning", "--workers", str(workers))
            with ThreadPoolExecutor(len(loads)) as pool:
                list(pool.map(lambda load: load(0.5), loads))
                before = _worker_times(bed.waypoint.pid, workers)
                results = list(pool.map(lambda load: load(seconds), loads))
                spent = [
                    after - had
                    for after, had in zip(
                        _worker_times(bed.waypoint.pid, workers), before, strict=True
                    )
                ]
            requests = sum(result[0] for result in results)
            rate = sum(result[1] for result in results)
            sample = Shared(rate, sum(spent) * 1e6 / requests, min(spent) / max(spent))
            found.setdefault(workers, []).append(sample)
            print(f"round {number + 1}: {workers} workers: {sample}", file=sys.stderr)
    return found


def _worker_times(pid: int, workers: int) -> list[float]:
    """CPU time of each worker; one works in the waypoint's own process."""
    if workers == 1:
        return [cpu_time_s(pid)]
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return [cpu_time_s(child) for child in sorted(children)]


def workers_page(shared: dict[int, list[Shared]]) -> str:
    lines = [
        "## Workers",
        "",
        f"HTTP/1.1 from {CLIENTS} pods, four connections each. All that takes part (load, two node",
        "agents, waypoint, backend) shares the machine's cores, so requests/s cannot double here;",
        "what workers would lose to one another is CPU a request, and the part of the idlest",
        "worker (of the busiest one's CPU) says how the tunnels were spread.",
        "",
        "| workers | requests/s | CPU of 1000 requests | idlest worker |",
        "|--:|--:|--:|--:|",
    ]
    medians = {}
    for workers, found in sorted(shared.items()):
        medians[workers] = statistics.median(each.cpu_ms_per_1000 for each in found)
        share = statistics.median(each.least_share for each in found)
        lines.append(
            f"| {workers} | {statistics.median(each.requests_per_s for each in found):.0f} "
            f"| {medians[workers]:.0f} ms | {share:.2f} |"
        )
    first, last = WORKERS[0], WORKERS[-1]
    ratio = medians[first] / medians[last]
    lines += [
        "",
        f"{last} workers answer {ratio * last:.2f} times as much as one a CPU second of each.",
        "",
    ]
    return "\n".join(lines)


def _nginx(bed: WaypointBed, pod: str, name: str, config: str, **values: str) -> Program:
    path = bed.directory / f"{name}.conf"
    ports = {"port": NGINX_PORT, "port2": NGINX_H2_PORT}
    path.write_text(config.format(dir=bed.directory, **ports, **values))
    program = Program(bed.directory, name, bed[pod].netns, ["nginx", "-c", str(path)])
    bed.servers[name] = program
    return program


def _listens(bed: WaypointBed, pod: str, port: int) -> bool:
    try:
        inside_connect(bed[pod].netns, "127.0.0.1", port, 1.0).close()
    except OSError:
        return False
    return True


def _wrk(
    bed: WaypointBed, pod: str, target: str, connections: int = CONNECTIONS
) -> Callable[[float], tuple[float, float, float, float]]:
    def load(seconds: float) -> tuple[float, float, float, float]:
        argv = ["wrk", "-t1", f"-c{connections}", f"-d{max(int(seconds), 1)}s", "--latency"]
        text = run_inside(bed[pod].netns, [*argv, f"http://{target}/"], limit_s=60.0).stdout
        if "Non-2xx" in text:
            raise BedError(text)
        requests = float(_found(r"(\d+) requests in", text))
        return (
            requests,
            float(_found(r"Requests/sec:\s+([\d.]+)", text)),
            _ms(_found(r"\n\s+50%\s+(\S+)", text)),
            _ms(_found(r"\n\s+99%\s+(\S+)", text)),
        )

    return load


def _h2load(
    bed: WaypointBed, pod: str, target: str
) -> Callable[[float], tuple[float, float, float, float]]:
    def load(seconds: float) -> tuple[float, float, float, float]:
        with tempfile.NamedTemporaryFile("r", suffix=".tsv") as log:
            argv = ["h2load", "-c1", "-m16", "-t1", f"-D{max(int(seconds), 1)}"]
            argv += [f"--log-file={log.name}", f"http://{target}/"]
            text = run_inside(bed[pod].netns, argv, limit_s=60.0).stdout
            took = sorted(
                int(line.split("\t")[2]) for line in log.read().splitlines() if "\t200\t" in line
            )
        if not took:
            raise BedError(text)
        rate = float(_found(r"([\d.]+) req/s", text))
        return (
            len(took),
            rate,
            took[len(took) // 2] / 1000,
            took[min(int(len(took) * 0.99), len(took) - 1)] / 1000,
        )

    return load


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise BedError(f"no {pattern!r} in:\n{text}")
    return found[1]


def _ms(text: str) -> float:
    for unit, factor in (("us", 0.001), ("ms", 1.0), ("s", 1000.0)):
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise BedError(f"no time: {text}")


if __name__ == "__main__":
    sys.exit(main())
