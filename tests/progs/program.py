"""A process in a network namespace, and what it says.

Each process is written down in the `pids` folder of its testbed's directory
until it has ended, with its start time, so that a later run can end exactly
those that a killed run has left and no other one that got the same number.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.progs.inside import NETNS_DIR

ROOT = Path(__file__).resolve().parents[2]

T = TypeVar("T")


class BedError(Exception):
    """The testbed, or a program in it, did not do what it was told."""


def eventually(what: str, call: Callable[[], T], limit_s: float = 5.0) -> T:
    """The first true answer of `call`; BedError when there is none within `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not (answer := call()):
        if time.monotonic() > deadline:
            raise BedError(f"not within {limit_s:g} s: {what}")
        time.sleep(0.02)
    return answer


def run_inside(
    netns: str, argv: Sequence[str], *, check: bool = True, limit_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a command in a namespace to its end; BedError for a failure when `check`."""
    command = ["nsenter", f"--net={NETNS_DIR / netns}", *argv]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BedError(f"in {netns}, not within {limit_s} s: {' '.join(argv)}") from error
    if check and done.returncode:
        said = (done.stdout + done.stderr).strip()
        raise BedError(f"in {netns}, exit {done.returncode}: {' '.join(argv)}\n{said}")
    return done


class Program:
    """A process of the testbed, its standard output in a file of JSON lines."""

    def __init__(self, directory: Path, name: str, netns: str, argv: Sequence[str]) -> None:
        self.name, self.netns = name, netns
        self.log = directory / f"{name}.log"
        with self.log.open("ab") as log:
            # What an earlier process of this name has said is not ours.
            self._offset = log.tell()
            self.process = subprocess.Popen(
                ["nsenter", f"--net={NETNS_DIR / netns}", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                # Ctrl-C is for the testbed, which then ends its processes in order.
                start_new_session=True,
            )
        self._record = directory / "pids" / str(self.pid)
        self._record.parent.mkdir(exist_ok=True)
        self._record.write_text(_start_time(self.pid))

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def events(
        self, event: str | None = None, since: int = 0, **match: object
    ) -> list[dict[str, Any]]:
        """The JSON lines so far, with that event and those values, after the mark `since`."""
        found = []
        for line in self.log.read_bytes()[self._offset :].decode().splitlines():
            if line.startswith("{"):
                with contextlib.suppress(ValueError):  # a line still being written
                    found.append(json.loads(line))
        return [
            entry
            for entry in found[since:]
            if event in (None, entry.get("event"))
            and all(entry.get(key) == value for key, value in match.items())
        ]

    def mark(self) -> int:
        """How much it has said until now, for `wait_event(since=...)`."""
        return len(self.events())

    def wait_event(
        self, event: str, limit_s: float = 5.0, since: int = 0, **match: object
    ) -> dict[str, Any]:
        """The last such line after the mark `since`, as soon as there is one."""

        def look() -> list[dict[str, Any]]:
            found = self.events(event, since, **match)
            if not found and not self.running:
                raise BedError(f"{self.name} ended with {self.process.returncode}:\n{self.tail()}")
            return found

        return eventually(f"{self.name} says {event} {match}", look, limit_s)[-1]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM, limit_s: float = 10.0) -> int:
        """Send the signal, wait, and after `limit_s` kill; the exit status."""
        if self.running:
            self.process.send_signal(number)
            try:
                self.process.wait(limit_s)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._record.unlink(missing_ok=True)
        return self.process.returncode

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Adopted:
    """A process that another one has started in its own place, with its log."""

    def __init__(self, directory: Path, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self._began = _start_time(pid)
        self._record = directory / "pids" / str(pid)
        self._record.write_text(self._began)

    @property
    def running(self) -> bool:
        return bool(self._began) and _start_time(self.pid) == self._began

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self, number: signal.Signals = signal.SIGTERM, limit_s: float = 10.0) -> int:
        """As Program's; how it ended is known to its parent alone, so 0 stands for "in time"."""
        status = 0
        if self.running:
            self.send(number)
            try:
                eventually("it ends", lambda: not self.running, limit_s)
            except BedError:
                self.send(signal.SIGKILL)
                eventually("it is killed", lambda: not self.running, limit_s)
                status = -signal.SIGKILL
        self._record.unlink(missing_ok=True)
        return status

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _start_time(pid: int) -> str:
    """When the process began, in clock ticks: with its number, its name for good.

    Empty when it has ended, also while nobody has asked for its exit status.
    """
    try:
        # The second field is the command in brackets, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def end_recorded(directory: Path) -> None:
    """Kill every process that is still written down in this testbed's directory."""
    for record in directory.glob("pids/*"):
        pid = int(record.name)
        if _start_time(pid) == record.read_text():
            os.kill(pid, signal.SIGKILL)
            eventually(f"process {pid} ends", lambda pid=pid: not _start_time(pid), 10.0)  # type: ignore[misc]
        record.unlink()
