"""attachments.json: kept whole, refused when it is not understood."""

from __future__ import annotations

import stat
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from meshbpf.agent.core.errors import ConfigError, Exit
from meshbpf.agent.runtime.attachments import Attachment, load, save


def attachment(pod: str = "web/a", netns: str = "/run/netns/a") -> Attachment:
    return Attachment(
        pod=pod,
        netns=netns,
        netns_device=4,
        netns_inode=4026532000,
        service_account="shop",
        on_agent_down="open",
        exempt_ports=(22, 8080),
        exempt_cidrs=("10.0.0.0/8", "fd00::/8"),
        exempt_interfaces=("eth1",),
        attached_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )


def test_no_file_means_no_attachment(tmp_path: Path) -> None:
    assert load(tmp_path / "attachments.json") == {}


def test_what_was_saved_is_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "attachments.json"
    save(path, [attachment("web/b"), attachment("web/a")])
    assert load(path) == {"web/a": attachment("web/a"), "web/b": attachment("web/b")}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "truncated"),
        ('{"format": 1, "attachments": [{"pod": "web/a"', "truncated"),
        ("not json", "malformed"),
        ('{"format": 2, "attachments": []}', "format 2 is not 1"),
        ('{"format": 1, "attachments": [{"pod": "web/a"}]}', "missing required field"),
        ('{"format": 1, "attachments": [], "more": 1}', "unknown field `more`"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_and_stays(
    tmp_path: Path, content: str, why: str
) -> None:
    path = tmp_path / "attachments.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=why) as caught:
        load(path)
    assert caught.value.exit_status == Exit.CONFIG
    assert "attach the pods again" in caught.value.hint
    assert path.read_text() == content


def test_a_pod_name_that_would_leave_its_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "attachments.json"
    save(path, [msgspec.structs.replace(attachment(), pod="../../etc")])
    with pytest.raises(ConfigError, match="not a pod name"):
        load(path)


def test_one_pod_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "attachments.json"
    save(path, [attachment(), attachment()])
    with pytest.raises(ConfigError, match="one pod twice"):
        load(path)


def test_a_namespace_is_there_while_the_path_names_the_same_inode(tmp_path: Path) -> None:
    path = tmp_path / "ns"
    path.write_text("")
    found = path.stat()
    here = msgspec.structs.replace(
        attachment(netns=str(path)), netns_device=found.st_dev, netns_inode=found.st_ino
    )
    assert here.still_there()
    assert not msgspec.structs.replace(here, netns_inode=found.st_ino + 1).still_there()
    path.unlink()
    assert not here.still_there()
