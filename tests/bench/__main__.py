"""`python -m tests.bench`, or `make bench`: measure meshbpf, and ztunnel beside it.

Rounds are interleaved: each measures every path once, starting with another
one each time. Exit status 1 when a measurement failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from meshbpf import __version__
from tests.bench import chart, figures, load, rig
from tests.peers.ztunnel import build_at
from tests.progs.program import BedError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/performance/bench.md"


def main() -> int:
    options = _options()
    build = build_at(Path(options.ztunnel)) if options.ztunnel else None
    began = datetime.datetime.now(datetime.UTC)
    load_average = os.getloadavg()[0]
    samples: list[rig.Sample] = []
    failures = 0
    tasks = [task for task in load.TASKS if task.name in options.tasks]
    rows = [row for row in rig.ROWS if row.name in options.rows]
    with rig.standing(options.tag, build, options.family, rows, tasks) as lanes:
        for round_number in range(options.rounds):
            start = round_number % len(lanes)
            for task in tasks:
                for lane in lanes[start:] + lanes[:start]:
                    try:
                        sample = rig.take(lane, task, round_number, options.seconds, options.family)
                    except BedError as error:
                        failures += 1
                        print(f"{lane.name}, {task.title}: {error}", file=sys.stderr)
                        continue
                    samples.append(sample)
                    _progress(f"round {round_number + 1}: {lane.name}, {task.name}", sample, task)
    facts = [
        ("when", f"{began:%Y-%m-%d %H:%M} UTC"),
        ("machine", f"{_cpu()}, {os.cpu_count()} cores, Linux {platform.release()}"),
        ("load average before", f"{load_average:.2f}"),
        ("meshbpf", f"{__version__}, commit {_commit()}"),
        *([("ztunnel", _ztunnel_version(build.binary))] if build else []),
        ("rounds", f"{options.rounds}, interleaved, {options.seconds:g} s a measurement"),
        ("addresses", f"IPv{options.family}"),
        *([("failed measurements", str(failures))] if failures else []),
    ]
    command = "make bench" + (" ZTUNNEL=PATH" if build else "")
    text = figures.page(samples, facts, command)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text)
        if len(tasks) == len(load.TASKS):
            options.output.with_suffix(".svg").write_text(chart.draw(samples))
    if options.raw is not None:
        options.raw.write_text(json.dumps([dataclasses.asdict(sample) for sample in samples]))
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument(
        "--ztunnel",
        metavar="PATH",
        default=os.environ.get("ZTUNNEL", ""),
        help="measure this build beside meshbpf; default: $ZTUNNEL",
    )
    parser.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        default=[task.name for task in load.TASKS],
        metavar="NAME,...",
        help=f"of {', '.join(task.name for task in load.TASKS)}; all by default",
    )
    parser.add_argument(
        "--rows",
        type=lambda text: text.split(","),
        default=[row.name for row in rig.ROWS],
        metavar="NAME,...",
        help=f"of {', '.join(row.name for row in rig.ROWS)}; all by default",
    )
    parser.add_argument("--family", type=int, choices=(4, 6), default=4)
    parser.add_argument(
        "--output",
        type=Path,
        help=f"and a chart beside it; default: {PAGE.relative_to(ROOT)} when nothing is left out",
    )
    parser.add_argument("--raw", type=Path, metavar="FILE", help="write all samples as JSON")
    parser.add_argument("--tag", default="bn", help="of the testbeds")
    options = parser.parse_args()
    whole = len(options.rows) == len(rig.ROWS) and len(options.tasks) == len(load.TASKS)
    if options.output is None and whole:
        options.output = PAGE
    return options


def _progress(what: str, sample: rig.Sample, task: load.Task) -> None:
    text = f"{what}: {figures.number(sample.figure)} {task.unit}"
    print(f"{text}, {figures.number(sample.cpu_per_unit)} {task.cost}", file=sys.stderr)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    argv = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _ztunnel_version(binary: Path) -> str:
    done = subprocess.run([binary, "version"], capture_output=True, text=True, check=False)
    revision = re.search(r'GitRevision:"([^"]*)"', done.stdout)
    return revision.group(1) if revision else "unknown"


if __name__ == "__main__":
    sys.exit(main())
