"""The state directory: made, locked, and its id kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from meshbpf.agent.core.errors import ConfigError, Exit, MeshbpfError
from meshbpf.agent.runtime.state_dir import StateDir, write_atomically


def test_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    opened = StateDir.open(tmp_path / "a" / "b")
    assert stat.S_IMODE(opened.path.stat().st_mode) == 0o700
    opened.close()


def test_one_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o755)
    opened = StateDir.open(tmp_path / "s")
    assert stat.S_IMODE(opened.path.stat().st_mode) == 0o700
    opened.close()


def test_a_second_agent_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    first = StateDir.open(tmp_path)
    with pytest.raises(MeshbpfError, match=rf"another agent \(pid {os.getpid()}\)") as caught:
        StateDir.open(tmp_path)
    assert caught.value.code == "state-dir-in-use"
    assert caught.value.exit_status == Exit.FAILED
    first.close()
    StateDir.open(tmp_path).close()


def test_the_agent_id_survives_and_differs_between_directories(tmp_path: Path) -> None:
    ids = []
    for name in ("a", "a", "b"):
        opened = StateDir.open(tmp_path / name)
        ids.append(opened.agent_id)
        opened.close()
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("content", ["", "zz", "../../etc", "0123456789abcdef0"])
def test_a_broken_agent_id_is_refused_and_not_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "agent-id").write_text(content)
    with pytest.raises(ConfigError, match="16 hexadecimal digits"):
        StateDir.open(tmp_path)
    assert (tmp_path / "agent-id").read_text() == content
    # And the lock is free again.
    (tmp_path / "agent-id").unlink()
    StateDir.open(tmp_path).close()


def test_a_file_in_its_place_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        StateDir.open(tmp_path / "f")


def test_a_replaced_file_is_private_and_leaves_no_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.write_text("old")
    target.chmod(0o644)
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(target, b"new")
    assert list(tmp_path.iterdir()) == [target]


def test_a_successor_has_the_same_lock_and_signs_it(tmp_path: Path) -> None:
    first = StateDir.open(tmp_path)
    second = StateDir.inherit(tmp_path, os.dup(first.lock_fd))
    assert second.agent_id == first.agent_id
    first.close()
    with pytest.raises(MeshbpfError, match="another agent"):
        StateDir.open(tmp_path)
    second.sign()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    second.close()
    StateDir.open(tmp_path).close()


def test_a_reload_cannot_move_the_state_directory(tmp_path: Path) -> None:
    first = StateDir.open(tmp_path / "a")
    other = StateDir.open(tmp_path / "b")
    with pytest.raises(ConfigError, match="is not the state directory of the agent that runs"):
        StateDir.inherit(tmp_path / "b", first.lock_fd)
    with pytest.raises(ConfigError, match="is not the state directory"):
        StateDir.inherit(tmp_path / "c", first.lock_fd)
    first.close()
    other.close()
