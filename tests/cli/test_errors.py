"""What a person sees when something is wrong: the real command, its message, its exit status.

Each golden file holds the command line, stderr as it is (the temporary folder
is written STATE) and the exit status.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from meshbpf.agent.api import CONTROL_SOCKET, ErrorBody
from meshbpf.agent.core.errors import UnavailableError
from tests.cli import samples
from tests.cli.conftest import as_root
from tests.cli.fake_agent import FakeAgent
from tests.conftest import NOBODY

USAGE = {
    "no-such-command": ("stauts",),
    "no-such-command-far": ("frobnicate",),
    "no-such-option": ("status", "--sate-dir", "x"),
    "option-without-value": ("status", "-o"),
    "bad-output-form": ("status", "-o", "xml"),
    "surplus-argument": ("status", "now"),
    "attach-without-pod": ("attach", "--netns", "x"),
    "attach-with-two-places": ("attach", "--pod", "a/b", "--netns", "x", "--pid", "7"),
    "attach-bad-down": ("attach", "--pod", "a/b", "--netns", "x", "--on-agent-down", "ajar"),
    "attach-bad-port": ("attach", "--pod", "a/b", "--netns", "x", "--exempt-port", "70000"),
    "attach-bad-cidr": ("attach", "--pod", "a/b", "--netns", "x", "--exempt-cidr", "10.0.0.1/8"),
    "pod-without-namespace": ("detach", "--pod", "web"),
    "pod-with-two-namespaces": ("detach", "--pod", "a/web", "-n", "b"),
    "pod-with-a-bad-name": ("detach", "--pod", "a/We b"),
    "pod-with-a-bad-namespace": ("detach", "--pod", "web.../x"),
    "connections-bad-direction": ("connections", "--direction", "sideways"),
    "connections-bad-limit": ("connections", "--limit", "0"),
    "run-bad-lease": (
        *("run", "--node", "n", "--ca-dir", "x", "--local-xds", "y", "--lease", "soon"),
    ),
    "run-bad-heartbeat": (
        *("run", "--node", "n", "--ca-dir", "x", "--local-xds", "y"),
        *("--heartbeat-limit", "1ms"),
    ),
    "usage-as-json": ("-o", "json", "attach"),
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_ends_with_2_and_says_what_is_right(fails: Any, name: str) -> None:
    fails(name, *USAGE[name])


def test_the_command_alone_shows_its_help_and_ends_with_2(meshbpf: Any) -> None:
    ran = meshbpf()
    assert ran.status == 2
    assert "Commands:" in ran.stderr


ASKING = ("status", "pods", "workloads", "services", "certs", "connections")


@pytest.mark.parametrize("verb", ASKING)
def test_no_agent_ends_with_69(meshbpf: Any, tmp_path: Path, verb: str) -> None:
    ran = meshbpf(verb, "--state-dir", tmp_path)
    assert ran.status == 69
    assert ran.stderr.startswith(f"meshbpf: no agent answers at {tmp_path}/control.sock\n")


def test_no_agent(fails: Any) -> None:
    fails("agent-not-running", "status", "--state-dir", "STATE")


def test_no_agent_as_json(fails: Any) -> None:
    fails("agent-not-running-json", "--state-dir", "STATE", "status", "-o", "json")


def test_no_agent_as_yaml(fails: Any) -> None:
    fails("agent-not-running-yaml", "-o", "yaml", "--state-dir", "STATE", "status")


def test_no_agent_to_attach_to(fails: Any) -> None:
    fails("attach-no-agent", "--state-dir", "STATE", "attach", "--pod", "a/b", "--netns", "x")


def test_a_missing_state_directory(fails: Any) -> None:
    fails("no-state-dir", "--state-dir", "STATE/none", "status")


def test_a_socket_that_a_dead_agent_left(fails: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / CONTROL_SOCKET))
    fails("agent-dead", "--state-dir", "STATE", "status")


def test_a_file_in_the_socket_s_place(fails: Any, tmp_path: Path) -> None:
    (tmp_path / CONTROL_SOCKET).touch()
    fails("not-a-socket", "--state-dir", "STATE", "status")


def test_an_agent_that_hangs_up(fails: Any, agent: Any) -> None:
    agent(status=b"")
    fails("agent-hung-up", "--state-dir", "STATE", "status")


def test_an_agent_that_does_not_answer_in_time(
    invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshbpf.cli.client.ASK_TIMEOUT_S", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / CONTROL_SOCKET))
        silent.listen(1)
        done = invoke("status")
    assert isinstance(done.exception, UnavailableError)
    assert done.exception.exit_status == 69
    assert done.exception.code == "agent-silent"


def test_an_agent_that_answers_nonsense(fails: Any, agent: Any) -> None:
    agent(status=b'{"hello": 1}\n')
    fails("bad-reply", "--state-dir", "STATE", "status")


REFUSALS = {
    "unknown-pod": ErrorBody(
        code="unknown-pod", what="no pod a/b here", hint="meshbpf pods lists them", exit_status=1
    ),
    "foreign-caller": ErrorBody(
        code="forbidden", what="uid 12 may not ask", hint="ask as root", exit_status=77
    ),
    "hostile": ErrorBody(
        code="x", what=f"{samples.HOSTILE}\nmeshbpf: all is well", hint="one\ntwo", exit_status=1
    ),
    "unknown-status": ErrorBody(code="x", what="of a newer agent", exit_status=99),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_the_agent_refuses_keeps_its_words_and_status(
    fails: Any, agent: Any, name: str
) -> None:
    agent(detach=REFUSALS[name])
    fails(f"refused-{name}", "--state-dir", "STATE", "detach", "--pod", "a/b")


@as_root
def test_a_socket_of_another_user_ends_with_77(fails: Any, agent: Any, tmp_path: Path) -> None:
    agent(status=samples.STATUS)
    os.chown(tmp_path / CONTROL_SOCKET, NOBODY, NOBODY)
    fails("foreign-socket", "--state-dir", "STATE", "status")


RUN = ("run", "--node", "n", "--ca-dir", "STATE", "--local-xds", "STATE/x", "--state-dir", "STATE")


@as_root
def test_run_without_root_ends_with_77(fails: Any, as_nobody: Any) -> None:
    fails("run-not-root", *RUN, prefix=as_nobody)


@as_root
def test_check_without_root_ends_with_77(fails: Any, as_nobody: Any) -> None:
    fails("check-not-root", "check", prefix=as_nobody)


@as_root
def test_a_state_directory_of_root_is_closed_to_others(
    fails: Any, as_nobody: Any, agent: Any, tmp_path: Path
) -> None:
    agent(status=samples.STATUS)
    tmp_path.chmod(0o700)
    fails("status-not-root", "--state-dir", "STATE", "status", prefix=as_nobody)


@as_root
def test_the_socket_itself_is_closed_to_others_too(meshbpf: Any, as_nobody: Any) -> None:
    with TemporaryDirectory() as folder:
        state_dir = Path(folder)
        state_dir.chmod(0o755)
        with FakeAgent(state_dir, {"status": samples.STATUS}):
            ran = meshbpf("--state-dir", state_dir, "status", prefix=as_nobody)
    assert ran.status == 77
    assert "it may not be used by this user" in ran.stderr
