"""A plugin that a C compiler made runs like one of text."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from meshbpf.agent.l7.filter import CONTINUE, Reply
from tests.unit.l7.samples import an_exchange, drive
from tests.unit.l7.wasm.test_plugins import Bench, respond

SOURCE = Path(__file__).with_name("plugin.c")


def tool(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs {names[0]} (tools/setup installs Debian's)")
    return found


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    clang, linker = tool("clang", "clang-14"), tool("wasm-ld", "wasm-ld-14")
    folder = tmp_path_factory.mktemp("wasm")
    made = folder / "plugin.o"
    subprocess.run(
        [clang, "--target=wasm32", "-O2", "-nostdlib", "-Wall", "-c", SOURCE, "-o", made],
        check=True,
    )
    linked = folder / "plugin.wasm"
    subprocess.run([linker, "--no-entry", made, "-o", linked], check=True)
    return linked.read_bytes()


def test_it_refuses_signs_and_counts(code: bytes) -> None:
    bench = Bench()
    one = bench.filter(code)
    outcome, _ = drive(one.on_request(an_exchange()))
    assert outcome == Reply(401, b"token, please", (), "no_token")
    for expected in ("1", "2"):
        exchange = an_exchange(headers={"x-token": "abcde"})
        assert drive(one.on_request(exchange))[0] is CONTINUE
        assert exchange.request.headers.get("x-signed") == "edcba"
        assert drive(one.on_response(respond(exchange)))[0] is CONTINUE
        assert exchange.response is not None
        assert exchange.response.headers.get("x-seen") == expected
        one.on_end(exchange)
    assert bench.log == [("info", "configured")]
