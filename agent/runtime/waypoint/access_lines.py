"""Writes access log lines to where providers say: standard output, or a file.

As the program's own log does it (logs.py): a bounded queue for each file and
a thread that writes, so that a reader that does not read costs lines, not
requests.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TextIO

from meshbpf.agent.runtime.logs import Log, LogStatistics, LogWriter

_STANDARD = {"/dev/stdout": lambda: sys.stdout, "/dev/stderr": lambda: sys.stderr}
_MAX_FILES = 16

log = Log("waypoint")


class AccessLines:
    """All files that lines go to."""

    def __init__(self) -> None:
        self._writers: dict[str, LogWriter | None] = {}
        self._files: list[TextIO] = []

    def write(self, path: str, line: str) -> None:
        """Queue a line, its end included; never waits."""
        try:
            writer = self._writers[path]
        except KeyError:
            writer = self._writers[path] = self._open(path)
        if writer is not None:
            record = logging.LogRecord("access", logging.INFO, "", 0, line.rstrip("\n"), None, None)
            writer.emit(record)

    def statistics(self) -> dict[str, LogStatistics]:
        """By path."""
        return {path: each.statistics() for path, each in self._writers.items() if each}

    def close(self) -> None:
        """Write what is queued, for a second at most each."""
        for writer in self._writers.values():
            if writer is not None:
                writer.close()
        for file in self._files:
            file.close()
        self._writers.clear()

    def _open(self, path: str) -> LogWriter | None:
        if len(self._writers) >= _MAX_FILES:
            log.warning("access log has no file", path=path, reason="too many files")
            return None
        standard: Callable[[], TextIO] | None = _STANDARD.get(path)
        if standard is not None:
            return LogWriter(standard(), _Verbatim())
        try:
            file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115 (close())
        except OSError as error:
            # Told once; the requests go on, as Envoy's would not start at all.
            log.warning("access log has no file", path=path, reason=error.strerror)
            return None
        self._files.append(file)
        return LogWriter(file, _Verbatim())


class _Verbatim(logging.Formatter):
    """The line as it is: log_format.py has made and escaped it."""

    def format(self, record: logging.LogRecord) -> str:
        """The message."""
        return str(record.msg)
