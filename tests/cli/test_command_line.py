"""The group itself: what it imports, how fast it starts, where options may stand."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
from click.testing import CliRunner

from meshbpf.cli.failure import CommandUsageError
from meshbpf.cli.main import COMMANDS, cli
from meshbpf.cli.options import Session, pod_key
from tests.cli import samples
from tests.cli.conftest import COMMAND

START_S = 0.25  # the promise for `--help` and `status`


def command(name: str) -> click.Command:
    found: click.Command = importlib.import_module(COMMANDS[name].module).command
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    assert command(name).name == name
    assert command(name).short_help == COMMANDS[name].summary


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_common_options(name: str) -> None:
    opts = {opt for param in command(name).params for opt in param.opts}
    assert {"--state-dir", "-o", "--output"} <= opts


def test_help_lists_every_command_with_its_summary(meshbpf: Any) -> None:
    shown = meshbpf("--help").stdout
    width = max(map(len, COMMANDS))
    for name, entry in COMMANDS.items():
        assert f"  {name:<{width}}  {entry.summary}\n" in shown


@pytest.mark.parametrize("name", [*COMMANDS, "ca init", "ca import", "ca show"])
def test_every_option_explains_itself(meshbpf: Any, name: str) -> None:
    found, _, verb = name.partition(" ")
    described = command(found)
    if verb:
        assert isinstance(described, click.Group)
        described = described.commands[verb]
    for param in described.params:
        assert not isinstance(param, click.Option) or param.help
    ran = meshbpf(*name.split(), "--help")
    assert ran.status == 0
    assert ran.stdout.startswith(f"Usage: meshbpf {name} ")


def imported_by(*arguments: str) -> set[str]:
    script = (
        "import sys\nfrom meshbpf.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


def test_help_imports_no_command() -> None:
    modules = imported_by("--help")
    assert not {name for name in modules if name.startswith("meshbpf.cli.commands")}
    assert not modules & {"msgspec", "yaml", "trio", "cryptography", "rich"}


def test_asking_the_agent_imports_neither_trio_nor_cryptography(tmp_path: Path) -> None:
    modules = imported_by("--state-dir", str(tmp_path), "status")
    assert "meshbpf.cli.commands.status" in modules
    assert not modules & {"yaml", "trio", "cryptography", "OpenSSL", "h2", "rich", "asyncio"}
    assert not {name for name in modules if name.startswith("meshbpf.agent.runtime")}


@pytest.mark.parametrize("verb", ["--help", "status"])
def test_the_command_starts_within_its_promise(agent: Any, tmp_path: Path, verb: str) -> None:
    """By CPU time, the best of five: a busy machine is not the command's doing."""
    agent(status=samples.STATUS)
    assert min(cpu_s("--state-dir", tmp_path, verb) for _ in range(5)) < START_S


def cpu_s(*arguments: str | Path) -> float:
    """CPU seconds, user and system, of one run of the command."""
    process = subprocess.Popen([COMMAND, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    "line",
    [
        "--state-dir {} -o json status",
        "status --state-dir {} -o json",
        "-o json status --state-dir {}",
        "--state-dir {} status -ojson",
        "--state-dir /nowhere -o yaml status --output=json --state-dir={}",
        "--output JSON --state-dir={} status",
    ],
)
def test_common_options_stand_before_the_verb_and_after_it(
    agent: Any, tmp_path: Path, line: str
) -> None:
    agent(status=samples.STATUS)
    done = CliRunner().invoke(cli, line.format(tmp_path).split())
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["node"] == "node1"


def test_the_state_directory_is_var_lib_meshbpf_unless_told() -> None:
    assert Session().state_dir == Path("/var/lib/meshbpf")


@pytest.mark.parametrize(
    ("text", "namespace", "key"),
    [
        ("default/web", None, "default/web"),
        ("web", "default", "default/web"),
        ("web.default", None, "default/web"),
        ("web.v1.default", None, "default/web.v1"),
        ("web.v1", "default", "default/web.v1"),
        ("default/web", "default", "default/web"),
        ("default/web.v1", None, "default/web.v1"),
        (f"a/{'b' * 253}", None, f"a/{'b' * 253}"),
    ],
)
def test_a_pod_can_be_named_in_three_ways(text: str, namespace: str | None, key: str) -> None:
    assert pod_key(text, namespace) == key


@pytest.mark.parametrize(
    ("text", "namespace"),
    [
        ("web", None),
        ("a/web", "b"),
        ("/web", None),
        ("a/", None),
        ("", "a"),
        ("", None),
        (".", None),
        ("a/b/c", None),
        ("A/web", None),
        ("a/web\n", None),
        ("a/we\x1bb", None),
        ("a/-web", None),
        ("web", "a.b"),
        ("web", ""),
        (f"a/{'b' * 254}", None),
        (f"{'a' * 64}/b", None),
    ],
)
def test_what_cannot_name_a_pod_is_wrong_usage(text: str, namespace: str | None) -> None:
    with pytest.raises(CommandUsageError):
        pod_key(text, namespace)


def completions(*words: str | Path) -> list[str]:
    """What the shell is offered for the last word."""
    env = {
        **os.environ,
        "_MESHBPF_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(map(str, words)),
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run([COMMAND], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line.removeprefix("plain,") for line in done.stdout.split()]


def test_completion_offers_verbs_options_and_values() -> None:
    assert completions("meshbpf", "sta") == ["status"]
    assert completions("meshbpf", "ca", "i") == ["import", "init"]
    assert completions("meshbpf", "attach", "--exempt-p") == ["--exempt-port"]
    assert completions("meshbpf", "-o", "j") == ["json"]


def test_completion_asks_the_agent_for_pods(agent: Any, tmp_path: Path) -> None:
    agent(pods=samples.PODS, workloads=samples.WORKLOADS)
    before = ("meshbpf", "--state-dir", tmp_path)
    assert completions(*before, "detach", "--pod", "d") == ["default/web"]
    assert completions(*before, "attach", "--pod", "") == ["default/web"]
    assert completions(*before, "connections", "--pod", "sh") == ["shop/db-0"]


def test_completion_offers_no_pod_while_no_agent_runs(tmp_path: Path) -> None:
    assert completions("meshbpf", "--state-dir", tmp_path, "detach", "--pod", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_what_the_shell_accepts(meshbpf: Any, shell: str) -> None:
    script = meshbpf("completion", shell).stdout
    assert "_MESHBPF_COMPLETE" in script
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("where", ["--help", "status"])
def test_a_reader_that_goes_away_shows_no_traceback(agent: Any, tmp_path: Path, where: str) -> None:
    agent(status=samples.STATUS)
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [COMMAND, "--state-dir", tmp_path, where], stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert done.returncode == 141
    assert done.stderr == b""


def test_a_full_disk_under_stdout_is_said_and_not_traced(agent: Any, tmp_path: Path) -> None:
    agent(status=samples.STATUS)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [COMMAND, "--state-dir", tmp_path, "status"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == "meshbpf: the output cannot be written: No space left on device\n"


def test_a_locale_that_lacks_a_letter_shows_an_escape(
    agent: Any, meshbpf: Any, tmp_path: Path
) -> None:
    agent(detach=msgspec.structs.replace(samples.DETACHED, pod="a/\u6f22"))
    latin = {"PYTHONIOENCODING": "latin-1"}
    ran = meshbpf("--state-dir", tmp_path, "detach", "--pod", "a/b", env=latin)
    assert (ran.status, ran.stdout) == (0, "pod a/\\u6f22 detached\n")
