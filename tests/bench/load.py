"""The load generator (load.c) from Python: built when needed, one call a measurement."""

from __future__ import annotations

import functools
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.progs.pod import LOAD, Pod
from tests.progs.program import BedError, Program
from tests.testbed import Testbed

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"
PORT = LOAD
SERVER_LIFETIME_S = 7200


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to measure: how the load generator is called and what its figure means."""

    name: str
    title: str
    mode: str
    options: tuple[str, ...]
    figure: str
    """The key of the generator's answer that is the result."""
    unit: str
    count: str
    """The key of its answer that counts what CPU time is divided by."""
    per: float
    """So many of those are one unit of CPU cost."""
    cost: str
    less_is_better: bool = False


GIB = float(1 << 30)
TASKS = (
    Task("up", "Throughput, one stream up", "stream", ("1", "up"),
         "gbit_s", "Gbit/s", "bytes", GIB, "CPU s/GiB"),
    Task("up4", "Throughput, four streams up", "stream", ("4", "up"),
         "gbit_s", "Gbit/s", "bytes", GIB, "CPU s/GiB"),
    Task("down", "Throughput, one stream down", "stream", ("1", "down"),
         "gbit_s", "Gbit/s", "bytes", GIB, "CPU s/GiB"),
    Task("down4", "Throughput, four streams down", "stream", ("4", "down"),
         "gbit_s", "Gbit/s", "bytes", GIB, "CPU s/GiB"),
    Task("rtt", "Round trip of 64 bytes, median", "rtt", (),
         "p50_us", "µs", "count", 1e6, "CPU µs each", less_is_better=True),
    Task("rate", "New connections, eight clients", "rate", ("8",),
         "per_s", "1/s", "connections", 1e6, "CPU µs each"),
)  # fmt: skip


@functools.cache
def build() -> Path:
    """The program, compiled anew when its source is newer."""
    source, program = HERE / "load.c", CACHE / "load"
    if not program.exists() or program.stat().st_mtime <= source.stat().st_mtime:
        CACHE.mkdir(exist_ok=True)
        fresh = program.with_suffix(".new")
        argv = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", str(fresh)]
        subprocess.run([*argv, str(source)], check=True)
        fresh.replace(program)
    return program


def serve(bed: Testbed, pod: Pod) -> None:
    """The generator's server in a pod; it ends with the testbed."""
    argv = [str(build()), "server", "::", str(PORT), str(SERVER_LIFETIME_S)]
    bed.servers[pod.name] = Program(bed.directory, f"load-{pod.name}", pod.netns, argv)
    bed.servers[pod.name].wait_event("ready")


def measure(bed: Testbed, client: Pod, address: str, task: Task, seconds: float) -> dict[str, Any]:
    """The generator's answer; BedError when anything went wrong, a lost connection included."""
    argv = [str(build()), task.mode, address, str(PORT), str(seconds), *task.options]
    answer: dict[str, Any] = json.loads(bed.run(client.netns, argv, limit_s=90.0).stdout)
    if answer.get("failed"):
        raise BedError(f"{answer['failed']} connections failed: {' '.join(argv)}")
    return answer
