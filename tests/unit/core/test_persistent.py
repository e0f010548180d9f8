"""The persistent map: what an edit changes, what it leaves to the version before."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.agent.core import persistent
from meshbpf.agent.core.persistent import PersistentMap

KEYS = st.integers(0, 2000).map(str)
STEPS = st.lists(st.lists(st.tuples(KEYS, st.none() | st.integers())), max_size=6)


def content(of: PersistentMap[Any, Any]) -> dict[Any, Any]:
    return {key: of.get(key) for key in of}


def filled(count: int) -> PersistentMap[str, int]:
    edit = persistent.EMPTY.edit()
    for number in range(count):
        edit.set(str(number), number)
    return edit.commit()


@given(st.integers(0, 1500), STEPS)
@settings(max_examples=50, deadline=None)
def test_a_version_holds_what_a_dictionary_would(count: int, steps: Any) -> None:
    version, model = filled(count), {str(number): number for number in range(count)}
    for step in steps:
        edit = version.edit()
        for key, value in step:
            if value is None:
                edit.remove(key)
                model.pop(key, None)
            else:
                edit.set(key, value)
                model[key] = value
            assert edit.get(key) == model.get(key)
        before = content(version)
        following = edit.commit()
        assert content(version) == before
        version = following
        assert content(version) == model
        assert len(version) == len(model) == len(list(version.values()))


def test_an_edit_without_changes_is_the_very_same_version() -> None:
    version = filled(10)
    assert version.edit().commit() is version


def test_a_single_change_copies_one_shard_of_many() -> None:
    version = filled(100_000)
    edit = version.edit()
    edit.set("7", -7)
    following = edit.commit()
    shared = sum(a is b for a, b in zip(version._shards, following._shards, strict=True))
    assert shared == len(version._shards) - 1
    assert max(map(len, version._shards)) < 100


def test_a_map_that_shrinks_takes_fewer_shards() -> None:
    edit = filled(100_000).edit()
    for number in range(99_990):
        edit.remove(str(number))
    small = edit.commit()
    assert len(small._shards) == 1
    assert sorted(small.values()) == list(range(99_990, 100_000))
