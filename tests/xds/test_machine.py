"""The delta machine and its pauses, without any I/O."""

from __future__ import annotations

import random

import pytest

from meshbpf.agent.core.xds import (
    ADDRESS,
    AUTHORIZATION,
    Backoff,
    DeltaMachine,
    Ending,
    Push,
    Resource,
)

pytestmark = [pytest.mark.xds, pytest.mark.compat]


class Middle(random.Random):
    """No jitter."""

    def uniform(self, _low: float, _high: float) -> float:
        return 0.0


def push(*names: str, url: str = ADDRESS, removed: tuple[str, ...] = ()) -> Push:
    return Push(url, "n", tuple(Resource(name, "v1", b"") for name in names), removed)


def test_it_is_ready_once_each_type_has_come() -> None:
    machine = DeltaMachine()
    machine.answer(push(), {})
    assert not machine.ready
    machine.answer(push(url=AUTHORIZATION), {})
    assert machine.ready


def test_bad_resources_do_not_keep_the_data_plane_from_starting() -> None:
    machine = DeltaMachine()
    machine.answer(push("a", "b"), {"b": "bad"})
    machine.answer(push(url=AUTHORIZATION), {"": "nothing of it could be applied"})
    assert not machine.ready
    machine.answer(push(url=AUTHORIZATION), {})
    assert machine.ready


def test_a_refused_resource_keeps_the_version_that_is_in_force() -> None:
    machine = DeltaMachine()
    machine.answer(push("a", "b"), {})
    newer = Push(ADDRESS, "m", (Resource("a", "v2", b""), Resource("b", "v2", b"")))
    answer = machine.answer(newer, {"a": "bad"})
    assert (answer.nonce, answer.error) == ("m", "a: bad")
    assert machine.opening()[0].initial_versions == {"a": "v1", "b": "v2"}
    assert machine.refused == {"a": "bad"}
    machine.answer(push(removed=("a",)), {})
    assert machine.opening()[0].initial_versions == {"b": "v2"}
    assert not machine.refused


def test_a_push_that_nothing_was_taken_of_changes_no_version() -> None:
    machine = DeltaMachine()
    machine.answer(push("a"), {})
    machine.answer(push("b", removed=("a",)), {"": "the kernel's map is full"})
    assert machine.opening()[0].initial_versions == {"a": "v1"}


def test_pauses_double_to_fifteen_seconds_and_start_anew_after_a_useful_stream() -> None:
    backoff = Backoff(Middle())
    pauses = [backoff.after(Ending.CONNECTION_ERROR, useful=False) for _ in range(12)]
    assert pauses[:4] == [0.02, 0.04, 0.08, 0.16]
    assert pauses[-1] == 15.0
    assert backoff.after(Ending.RECONNECT, useful=True) == 0.01
    assert backoff.after(Ending.COMPLETE, useful=True) == 0.0
    assert backoff.after(Ending.ERROR, useful=True) == 0.02


def test_a_server_that_ends_every_stream_at_once_is_given_pauses() -> None:
    backoff = Backoff(Middle())
    pauses = [backoff.after(Ending.COMPLETE, useful=False) for _ in range(3)]
    assert pauses == [0.02, 0.04, 0.08]


def test_a_refused_policy_that_is_kept_is_claimed_without_a_version() -> None:
    machine = DeltaMachine()
    machine.answer(push("a/b", url=AUTHORIZATION), {"a/b": "bad"}, kept={"a/b"})
    assert machine.holds(AUTHORIZATION, "a/b")
    assert machine.opening()[1].initial_versions == {"a/b": ""}
    machine.answer(push(url=AUTHORIZATION, removed=("a/b",)), {})
    assert not machine.refused
    assert not machine.holds(AUTHORIZATION, "a/b")
