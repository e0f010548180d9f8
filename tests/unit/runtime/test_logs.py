"""Log lines: their form, and that a reader who stands still holds up nobody."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator

import pytest

from meshbpf.agent.config import LogFormat, LogLevel
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime import logs
from meshbpf.agent.runtime.logs import Log, LogWriter, PlainFormatter


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def written(form: LogFormat, level: LogLevel = "info") -> str:
    stream = io.StringIO()
    writer = logs.set_up(level, form, stream)
    log = Log("pods")
    log.debug("only when asked")
    log.info("pod attached", pod="web/a", note="two words", empty="", nothing=None)
    log.error("it failed", cause=MeshbpfError("a-code", "what happened", "do this"), pod="web/b")
    writer.close()
    return stream.getvalue()


def test_a_plain_line_has_time_level_scope_message_and_fields() -> None:
    first, second = written("plain").splitlines()
    moment, *cells = first.split("\t")
    assert moment.endswith("Z")
    assert cells == ["info", "pods", "pod attached", 'pod=web/a note="two words"']
    assert second.split("\t")[1:] == [
        "error",
        "pods",
        "it failed",
        'pod=web/b code=a-code error="what happened" hint="do this"',
    ]


def test_a_json_line_has_the_same() -> None:
    first, second = map(json.loads, written("json").splitlines())
    assert (first["level"], first["scope"], first["message"]) == ("info", "pods", "pod attached")
    assert (first["pod"], first["note"], "empty" in first) == ("web/a", "two words", False)
    assert second["code"] == "a-code"


def test_the_level_decides_what_is_written() -> None:
    assert "only when asked" not in written("plain")
    assert "only when asked" in written("plain", "debug")


def test_a_value_can_neither_forge_a_line_nor_drive_a_terminal() -> None:
    stream = io.StringIO()
    writer = logs.set_up("info", "plain", stream)
    Log("x").info("m", name="a\n2026 error\tforged", title="\x1b[2J\x9b2J")
    writer.close()
    (line,) = stream.getvalue().splitlines()
    assert "\\x0a" in line
    assert not any((ord(c) < 0x20 and c != "\t") or 0x7F <= ord(c) < 0xA0 for c in line)


def test_an_unforeseen_error_comes_with_its_traceback() -> None:
    stream = io.StringIO()
    writer = logs.set_up("info", "plain", stream)
    try:
        raise ZeroDivisionError("by \x1b zero")
    except ZeroDivisionError as error:
        Log("x").error("oops", cause=error)
    writer.close()
    assert "Traceback" in stream.getvalue()
    assert "by \\x1b zero" in stream.getvalue()


def test_a_reader_that_stands_still_costs_records_but_no_time() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        writer = LogWriter(stream, PlainFormatter())
        logger = logging.getLogger("stuck")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(writer)
        count = logs.QUEUE_RECORDS + 3000
        started = time.monotonic()
        for number in range(count):
            logger.info("line %d %s", number, "x" * 100)
        assert time.monotonic() - started < 5.0
        assert writer.statistics().dropped > 0
        # Once somebody reads, the rest arrives, and the loss is told.
        received = io.BytesIO()

        def drain() -> None:
            while b"log records dropped" not in received.getvalue()[-65536:]:
                received.write(os.read(reading, 65536))

        reader = threading.Thread(target=drain)
        reader.start()
        reader.join(20.0)
        assert not reader.is_alive()
        writer.close()
        logger.removeHandler(writer)
    os.close(reading)
    assert writer.statistics().written + writer.statistics().dropped == count + 1


def test_a_broken_stream_is_counted_and_raises_nothing() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    stream = os.fdopen(writing, "w")
    writer = logs.set_up("info", "plain", stream)
    Log("x").info("nobody reads this")
    writer.close()
    assert writer.statistics().dropped == 1
    with pytest.raises(BrokenPipeError):
        stream.close()
