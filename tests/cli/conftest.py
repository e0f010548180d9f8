"""Running the command: inside this process for views, as the real program for errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from click.testing import Result as CliResult

from meshbpf.agent.api import ErrorBody, Result
from meshbpf.cli.main import cli
from meshbpf.cli.options import Session
from tests.cli.fake_agent import FakeAgent
from tests.cli.samples import NOW

GOLDEN = Path(__file__).parent / "golden"
LOG_LINE = re.compile(r"^\d{4}-\d\d-\d\dT.*\n", re.MULTILINE)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes users: needs root")
COMMAND = Path(sys.executable).with_name("meshbpf")


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare a text with `golden/NAME.txt`; MESHBPF_GOLDEN=write makes the files anew."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if os.environ.get("MESHBPF_GOLDEN") == "write":
            path.write_text(text)
        assert path.exists(), f"{path.name} is missing: run with MESHBPF_GOLDEN=write and read it"
        assert text == path.read_text()

    return compare


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[..., FakeAgent]]:
    """Start an agent's control socket in `tmp_path` with answers by verb."""
    with ExitStack() as stack:

        def start(**answers: Result | ErrorBody | bytes) -> FakeAgent:
            return stack.enter_context(FakeAgent(tmp_path, answers))

        yield start


@pytest.fixture
def invoke(tmp_path: Path) -> Callable[..., CliResult]:
    """Run a command in this process at a fixed time, on the agent in `tmp_path`."""

    def run(*arguments: str, color: bool = False) -> CliResult:
        session = Session(state_dir=tmp_path, now=lambda: NOW)
        return CliRunner().invoke(
            cli, list(arguments), obj=session, standalone_mode=False, color=color
        )

    return run


@dataclass(frozen=True, slots=True)
class Ran:
    """How a real run ended."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def meshbpf() -> Callable[..., Ran]:
    """Run the installed command as a person would."""

    def run(
        *arguments: str | Path,
        env: Mapping[str, str] | None = None,
        prefix: tuple[str, ...] = (),
        timeout_s: float = 30.0,
    ) -> Ran:
        done = subprocess.run(
            [*prefix, str(COMMAND), *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **(env or {})},
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def fails(meshbpf: Any, golden: Any, tmp_path: Path) -> Any:
    """Run a command line that fails, and compare its stderr and status with a file."""

    def check(name: str, *arguments: str, prefix: tuple[str, ...] = ()) -> None:
        ran = meshbpf(*(a.replace("STATE", str(tmp_path)) for a in arguments), prefix=prefix)
        text = LOG_LINE.sub("", ran.stderr).replace(str(tmp_path), "STATE")
        assert "Traceback" not in ran.stderr, ran.stderr
        assert ran.stdout == ""
        golden(f"errors/{name}", f"$ meshbpf {' '.join(arguments)}\n{text}[exit {ran.status}]\n")

    return check
