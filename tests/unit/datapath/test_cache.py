"""The cache gives back what was written, or nothing; and only this user can write it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.datapath.cache import private_directory, read_entry, write_entry


def test_an_entry_comes_back_whole_and_is_private(tmp_path: Path) -> None:
    write_entry(tmp_path, "x.c", "key", b"payload")
    assert read_entry(tmp_path, "x.c", "key") == b"payload"
    assert read_entry(tmp_path, "x.c", "other") is None
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_any_damage_reads_as_absent(tmp_path: Path) -> None:
    write_entry(tmp_path, "x.c", "key", b"payload")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes((whole[position] ^ 1,)) + whole[position + 1 :])
        assert read_entry(tmp_path, "x.c", "key") is None
        path.write_bytes(whole[:position])
        assert read_entry(tmp_path, "x.c", "key") is None


def test_an_entry_moved_to_another_key_reads_as_absent(tmp_path: Path) -> None:
    write_entry(tmp_path, "x.c", "key", b"payload")
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "x.c.other.cached")
    assert read_entry(tmp_path, "x.c", "other") is None


def test_old_entries_of_a_kind_go(tmp_path: Path) -> None:
    write_entry(tmp_path, "y.c", "key", b"")
    for number in range(20):
        write_entry(tmp_path, "x.c", f"{number}", b"")
        os.utime(tmp_path / f"x.c.{number}.cached", (number, number))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"y.c.key.cached", *(f"x.c.{number}.cached" for number in range(12, 20))}


def test_a_missing_folder_is_made_private(tmp_path: Path) -> None:
    made = private_directory(tmp_path / "a/b")
    assert made.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o720, 0o702])
def test_a_folder_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(ConfigError, match="others could put code"):
        private_directory(tmp_path / "open")


@pytest.mark.root
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(ConfigError, match="uid 65534"):
        private_directory(tmp_path / "theirs")
