"""When the pods of an agent may be let go for good."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.runtime.removal import remove
from meshbpf.agent.runtime.state_dir import StateDir


def test_where_no_agent_ever_was_there_is_nothing_to_let_go(tmp_path: Path) -> None:
    assert remove(tmp_path / "none") == ()
    assert not (tmp_path / "none").exists()


def test_an_agent_that_runs_keeps_its_pods(tmp_path: Path) -> None:
    running = StateDir.open(tmp_path / "state")
    running.attachments.write_text("{}")
    with pytest.raises(MeshbpfError, match="another agent") as caught:
        remove(tmp_path / "state")
    assert caught.value.code == "state-dir-in-use"
    assert running.attachments.exists()
    running.close()


def test_the_list_of_pods_is_forgotten_and_the_agents_name_is_not(tmp_path: Path) -> None:
    state = StateDir.open(tmp_path / "state")
    state.attachments.write_text("{}")
    state.close()
    assert remove(tmp_path / "state") == ()
    assert not state.attachments.exists()
    assert (tmp_path / "state" / "agent-id").read_text().strip() == state.agent_id
