"""`meshbpf config`: what is shown of settings, and how a wrong one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshbpf.agent.config_keys import KEYS

FILE = """\
# The agent of this node.
node: node1
ca-dir: /etc/meshbpf/ca
local-xds: /etc/meshbpf/mesh.yaml

exempt-ports: [22, 8000-8010, 80, 443]
exempt-cidrs:
  - 198.51.100.0/24
lease: 90
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(FILE)
    return path


@pytest.fixture
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHBPF_CERT_TTL", "2h")
    monkeypatch.setenv("MESHBPF_LOG_FORMAT", "json")


@pytest.mark.usefixtures("_environment")
def test_view_shows_each_value_with_its_origin(invoke: Any, golden: Any, file: Path) -> None:
    flags = ("--lease", "5m", "--state-dir", "/srv/meshbpf")
    done = invoke("config", "view", "--origin", "--config", str(file), *flags)
    text = done.stdout.replace(str(file), "/etc/meshbpf/config.yaml")
    # The table is as wide as its longest cell, which was a path of this test.
    golden("config-view-origin", "\n".join(line.rstrip() for line in text.splitlines()) + "\n")


@pytest.mark.usefixtures("_environment")
def test_view_alone_shows_keys_and_values(invoke: Any, golden: Any, file: Path) -> None:
    golden("config-view", invoke("config", "view", "--config", str(file)).stdout)


@pytest.mark.usefixtures("_environment")
def test_machine_output_of_view_always_has_the_origin(invoke: Any, file: Path) -> None:
    done = invoke("config", "view", "--config", str(file), "-o", "json")
    body = json.loads(done.stdout)
    assert body["file"] == str(file)
    shown = {one["key"]: (one["value"], one["origin"]) for one in body["settings"]}
    assert shown["exempt-ports"] == ([22, 80, 443, "8000-8010"], f"{file}:6")
    assert shown["cert-ttl"] == ("2h", "env MESHBPF_CERT_TTL")
    assert shown["lease"] == ("90s", f"{file}:9")
    assert shown["cri-socket"] == (None, "default")


def test_what_view_shows_can_be_written_into_a_file(invoke: Any, file: Path) -> None:
    body = json.loads(invoke("config", "view", "--config", str(file), "-o", "json").stdout)
    given = {one["key"]: one["value"] for one in body["settings"] if one["value"] is not None}
    copy = file.with_name("copy.yaml")
    copy.write_text(json.dumps(given))  # JSON is YAML
    again = json.loads(invoke("config", "view", "--config", str(copy), "-o", "json").stdout)
    assert {one["key"]: one["value"] for one in again["settings"]} == {
        one["key"]: one["value"] for one in body["settings"]
    }


def test_check_says_that_the_agent_can_run_with_it(invoke: Any, file: Path) -> None:
    done = invoke("config", "check", "--config", str(file))
    assert done.stdout == (
        f"{file}: the agent can run with it (6 of {len(KEYS)} settings are not the default)\n"
    )


WRONG = {
    "config-unknown-key": "leese: 5m",
    "config-wrong-type": "readiness-port: many",
    "config-out-of-range": "heartbeat-limit: 1ms",
    "config-bad-port": "exempt-interfaces: [eth1]\nnode: [a]",
    "config-twice": "node: node2",
    "config-no-yaml": "network: [a",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_ends_with_78_and_the_line(fails: Any, file: Path, name: str) -> None:
    text = FILE.replace("node: node1\n", "") if name == "config-bad-port" else FILE
    file.write_text(f"{text}{WRONG[name]}\n")
    fails(name, "config", "check", "--config", "STATE/config.yaml")


def test_run_refuses_a_wrong_file_as_check_does(meshbpf: Any, file: Path) -> None:
    file.write_text(FILE + "leese: 5m\n")
    checked = meshbpf("config", "check", "--config", file)
    ran = meshbpf("run", "--config", file)
    assert (ran.status, ran.stderr) == (checked.status, checked.stderr)
    assert ran.status == 78


def test_what_is_set_nowhere_ends_with_78(fails: Any) -> None:
    fails("run-without-options", "run", "--config", "/dev/null")
    fails("run-without-state", "run", "--config", "/dev/null", "--ca-dir", "x")
    fails("config-missing-file", "config", "check", "--config", "STATE/nowhere.yaml")


def test_a_wrong_flag_is_wrong_usage_and_a_wrong_variable_is_not(meshbpf: Any, file: Path) -> None:
    flag = meshbpf("config", "check", "--config", file, "--heartbeat-limit", "1ms")
    assert (flag.status, "--heartbeat-limit: 0.001 cannot be used" in flag.stderr) == (2, True)
    variable = meshbpf("config", "check", "--config", file, env={"MESHBPF_HEARTBEAT_LIMIT": "1ms"})
    assert variable.status == 78
    assert "env MESHBPF_HEARTBEAT_LIMIT: heartbeat-limit: 0.001" in variable.stderr


def test_the_environment_says_where_the_agent_is(meshbpf: Any, tmp_path: Path) -> None:
    ran = meshbpf("status", env={"MESHBPF_STATE_DIR": str(tmp_path)})
    assert ran.status == 69
    assert f"no agent answers at {tmp_path}/control.sock" in ran.stderr
