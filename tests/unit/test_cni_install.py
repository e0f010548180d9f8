"""The CNI plugin in a node's network configuration: chained last, and out without a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshbpf.agent.cni_install import Place, install, uninstall
from meshbpf.agent.core.errors import ConfigError

SOCKET = Path("/var/lib/meshbpf/cni.sock")
BRIDGE = {"type": "bridge", "ipam": {"type": "host-local"}}
LIST = {"cniVersion": "1.0.0", "name": "pods", "plugins": [BRIDGE]}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "net.d").mkdir()
    return Place(tmp_path / "net.d", tmp_path / "bin")


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    path = tmp_path / "built"
    path.write_bytes(b"\x7fELF plugin")
    return path


def write(place: Place, name: str, config: dict[str, Any]) -> Path:
    path = place.net_dir / name
    path.write_text(json.dumps(config))
    return path


def types(path: Path) -> list[str]:
    return [each["type"] for each in json.loads(path.read_text())["plugins"]]


def test_it_is_the_last_of_the_list_that_sorts_first(place: Place, binary: Path) -> None:
    first = write(place, "10-a.conflist", LIST)
    second = write(place, "20-b.conflist", LIST)
    assert install(place, binary, SOCKET, ["kube-system"]) == first
    assert types(first) == ["bridge", "meshbpf-cni"]
    assert types(second) == ["bridge"]
    assert json.loads(first.read_text())["plugins"][1] == {
        "type": "meshbpf-cni",
        "socket": str(SOCKET),
        "excludeNamespaces": ["kube-system"],
    }
    assert place.binary.read_bytes() == binary.read_bytes()
    assert place.binary.stat().st_mode & 0o777 == 0o755


def test_it_may_be_repeated_and_is_then_brought_up_to_date(place: Place, binary: Path) -> None:
    path = write(place, "10-a.conflist", LIST)
    install(place, binary, SOCKET)
    binary.write_bytes(b"newer")
    install(place, binary, Path("/run/other.sock"))
    assert types(path) == ["bridge", "meshbpf-cni"]
    assert "/run/other.sock" in path.read_text()
    assert place.binary.read_bytes() == b"newer"


def test_a_single_plugin_gets_a_list_before_it_and_stays_as_it_is(
    place: Place, binary: Path
) -> None:
    path = write(place, "10-a.conf", {"cniVersion": "0.4.0", "name": "pods"} | BRIDGE)
    before = path.read_bytes()
    made = install(place, binary, SOCKET)
    assert made.name < path.name
    assert types(made) == ["bridge", "meshbpf-cni"]
    assert path.read_bytes() == before
    uninstall(place)
    assert list(place.net_dir.iterdir()) == [path]


def test_uninstall_leaves_what_was_there(place: Place, binary: Path) -> None:
    path = write(place, "10-a.conflist", LIST)
    path.chmod(0o600)
    install(place, binary, SOCKET)
    assert path.stat().st_mode & 0o777 == 0o600
    assert uninstall(place) == [path, place.binary]
    assert json.loads(path.read_text()) == LIST
    assert sorted(place.net_dir.iterdir()) == [path]
    assert list(place.bin_dir.iterdir()) == []
    assert uninstall(place) == []


def test_nothing_to_be_chained_to_is_told(place: Place, binary: Path) -> None:
    with pytest.raises(ConfigError, match="has no network configuration to be chained to"):
        install(place, binary, SOCKET)
    assert not place.bin_dir.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"plugins": [1]}', '{"plugins": {}}'])
def test_a_configuration_that_is_none_is_told_and_left(
    place: Place, binary: Path, text: str
) -> None:
    path = place.net_dir / "10-a.conflist"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"10-a\.conflist"):
        install(place, binary, SOCKET)
    assert path.read_text() == text
