"""Log lines that never hold up the event loop.

`Log("pods").info("pod attached", pod="web/a")` hands a record to a bounded
queue; one thread formats and writes to stderr. A reader of stderr that
stands still (a full pipe, a paused terminal) stops that thread alone: when
the queue is full, records are dropped and counted, and the count is logged
once there is room. ztunnel blocks its data plane there instead.

The thread is not woken for a record: it looks ten times a second and writes
all that there is at once. Waking it for each line of the access log cost a
connection a fifth of its time, since the thread takes the interpreter's lock
from the event loop. Only warnings and errors wake it.

Plain lines are `time<TAB>level<TAB>scope<TAB>message<TAB>k=v ...`, as ztunnel's;
JSON has one object a line. Values come from peers and files, so control
characters are escaped: a name cannot forge a line or drive a terminal.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import TextIO

import msgspec

from meshbpf.agent.config import LogFormat, LogLevel
from meshbpf.agent.core.errors import MeshbpfError

ROOT = "meshbpf"
ACCESS = "access"
"""The logger of the access log (access_log.py)."""
QUEUE_RECORDS = 10_000
BATCH_RECORDS = 500
"""Written with one call. Not more, so that a batch does not hold the lock for long."""
TURN_S = 0.1
"""How long a line that is no warning may wait."""
FLUSH_S = 1.0
"""How long `close` waits for a reader that does not read."""

_FIELDS = "fields"
"""Other modules may log with `extra={"fields": {...}}` on a logger of their own."""
_LIBRARIES = ("hpack", "pyroute2")
"""They log each header or netlink message at debug level."""
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


class Log:
    """The logger of one scope; every method takes fields as keywords."""

    def __init__(self, scope: str) -> None:
        self._logger = logging.getLogger(f"{ROOT}.{scope}")

    def tells_debug(self) -> bool:
        """Whether a debug line would be written: for fields that cost something to make."""
        return self._logger.isEnabledFor(logging.DEBUG)

    def debug(self, message: str, **values: object) -> None:
        """What only a developer wants."""
        self._write(logging.DEBUG, message, values)

    def info(self, message: str, **values: object) -> None:
        """What changed."""
        self._write(logging.INFO, message, values)

    def warning(self, message: str, **values: object) -> None:
        """What a person should look at; the agent goes on as before."""
        self._write(logging.WARNING, message, values)

    def error(self, message: str, *, cause: BaseException | None = None, **values: object) -> None:
        """What failed. An unforeseen `cause` (no MeshbpfError) comes with its traceback."""
        if isinstance(cause, MeshbpfError):
            values = {**values, "code": cause.code, "error": cause.what, "hint": cause.hint}
            cause = None
        self._write(logging.ERROR, message, values, cause)

    def _write(
        self,
        level: int,
        message: str,
        values: dict[str, object],
        cause: BaseException | None = None,
    ) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, "%s", message, extra={_FIELDS: values}, exc_info=cause)


class PlainFormatter(logging.Formatter):
    """Tab-separated time, level, scope, message and fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, but for the traceback of an unforeseen error."""
        cells = [
            _time(record).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            told_level(record),
            _scope(record),
            _escape(record.getMessage()),
        ]
        values = told_fields(record)
        if values:
            write = _quote_text if record.name == ACCESS else _quote
            cells.append(" ".join(f"{key}={write(value)}" for key, value in values.items()))
        line = "\t".join(cells)
        if record.exc_info:
            # An error's text may be a peer's, too.
            trace = self.formatException(record.exc_info).split("\n")
            line = "\n".join((line, *map(_escape, trace)))
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: level, time, scope, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """One line in every case; a traceback is the field `traceback`."""
        line: dict[str, object] = {
            "level": told_level(record),
            "time": _time(record),
            "scope": _scope(record),
            "message": record.getMessage(),
            **{key: _plain(value) for key, value in told_fields(record).items()},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


@dataclass(frozen=True, slots=True)
class LogStatistics:
    """What happened to log records so far."""

    written: int
    dropped: int
    queued: int


class LogWriter(logging.Handler):
    """Takes records from any thread without waiting; its own thread writes them."""

    def __init__(self, stream: TextIO, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._stream = stream
        self._queue: deque[logging.LogRecord] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._written = 0
        self._dropped = 0
        # A daemon: a reader that never reads must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="meshbpf-logs", daemon=True)
        self._thread.start()

    def handle(self, record: logging.LogRecord) -> bool:
        """Take a record. No lock, unlike logging.Handler's: appending to a deque is atomic."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record, or drop and count it."""
        if len(self._queue) >= QUEUE_RECORDS:
            self._dropped += 1
            return
        self._queue.append(record)
        if record.levelno >= logging.WARNING:
            self._wake.set()

    def close(self) -> None:
        """Write what is queued, for FLUSH_S at most, and end the thread."""
        if self._thread.is_alive():
            self._stopping = True
            self._wake.set()
            self._thread.join(FLUSH_S)
            if self._thread.is_alive():
                self._dropped += len(self._queue)
        super().close()

    def statistics(self) -> LogStatistics:
        """Counters since the start."""
        return LogStatistics(self._written, self._dropped, len(self._queue))

    def _run(self) -> None:
        reported = 0
        while True:
            stopping = self._stopping
            self._wake.clear()
            while batch := self._batch():
                if self._write(batch):
                    self._written += len(batch)
                else:
                    self._dropped += len(batch)
            lost = self._dropped - reported
            if lost and self._write([_lost(lost)]):
                self._written += 1
                reported += lost
            if stopping:
                return
            self._wake.wait(TURN_S)

    def _batch(self) -> list[logging.LogRecord]:
        waiting = self._queue
        return [waiting.popleft() for _ in range(min(len(waiting), BATCH_RECORDS))]

    def _write(self, batch: list[logging.LogRecord]) -> bool:
        """False when stderr is closed or broken: there is nobody to tell, so it is counted."""
        try:
            self._stream.write("".join([f"{self.format(record)}\n" for record in batch]))
            self._stream.flush()
        except (OSError, ValueError):
            return False
        return True


def _lost(count: int) -> logging.LogRecord:
    record = logging.LogRecord(
        f"{ROOT}.logs", logging.WARNING, "", 0, "log records dropped", None, None
    )
    setattr(record, _FIELDS, {"count": count})
    return record


def set_up(level: LogLevel, log_format: LogFormat, stream: TextIO = sys.stderr) -> LogWriter:
    """Send every record of the program to `stream`; `close()` the result at the end."""
    formatter = JsonFormatter() if log_format == "json" else PlainFormatter()
    writer = LogWriter(stream, formatter)
    root = logging.getLogger()
    root.handlers[:] = [writer]
    root.setLevel(level.upper())
    # Nothing that we write shows them, and each costs every record something
    # (the logging HOWTO, "Optimization").
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for library in _LIBRARIES:
        logging.getLogger(library).setLevel(logging.WARNING)
    return writer


def told_fields(record: logging.LogRecord) -> dict[str, object]:
    """Its fields, without those that say nothing."""
    values = getattr(record, _FIELDS, {})
    return {key: value for key, value in values.items() if value not in (None, "")}


def _plain(value: object) -> object:
    # msgspec would write a dataclass, which most of our values are, as an object.
    return value if isinstance(value, str | int | float) else str(value)


def told_level(record: logging.LogRecord) -> str:
    """The level as ztunnel spells it."""
    return "warn" if record.levelno == logging.WARNING else record.levelname.lower()


def _scope(record: logging.LogRecord) -> str:
    """`pods` for `meshbpf.pods`, `forwarder` for `meshbpf.agent.runtime.forwarder`."""
    return record.name.removeprefix(f"{ROOT}.").removeprefix("agent.runtime.")


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)


def _escape(text: str) -> str:
    return text if text.isascii() and text.isprintable() else text.translate(_ESCAPES)


def _quote(value: object) -> str:
    text = _escape(str(value))
    plain = text and not any(c in ' ="\\' for c in text)
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _quote_text(value: object) -> str:
    """As the access log has it since ztunnel: text is always quoted, addresses and numbers not."""
    if not isinstance(value, str):
        return _escape(str(value))
    return _quoted(value)


@lru_cache(maxsize=4096)
def _quoted(value: str) -> str:
    """Cached: the names of workloads come again with each of their connections."""
    return '"' + _escape(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
