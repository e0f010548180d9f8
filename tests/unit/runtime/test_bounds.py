"""Who may have one more connection, and who may not."""

from __future__ import annotations

from meshbpf.agent.runtime.bounds import Bounds


def test_without_need_only_a_pods_own_bound_counts() -> None:
    bounds = Bounds(descriptors=1000, per_pod=10)
    assert bounds.admits(mine=9, total=9, pods=1)
    assert not bounds.admits(mine=10, total=10, pods=1)
    assert Bounds(descriptors=1000).admits(mine=399, total=399, pods=2)


def test_once_descriptors_are_scarce_those_with_more_than_their_share_wait() -> None:
    """400 connections fit: beyond that each of four pods may have a hundred."""
    bounds = Bounds(descriptors=1000)
    assert not bounds.admits(mine=390, total=400, pods=4), "the pod that took them all"
    assert bounds.admits(mine=10, total=400, pods=4), "one that has little"
    assert bounds.admits(mine=99, total=450, pods=4)
    assert not bounds.admits(mine=100, total=450, pods=4)


def test_one_pod_alone_may_have_all_but_the_reserve() -> None:
    bounds = Bounds(descriptors=1000)
    assert bounds.admits(mine=399, total=399, pods=1)
    assert not bounds.admits(mine=400, total=400, pods=1)


def test_who_holds_most_lets_go_first_and_no_more_than_must() -> None:
    bounds = Bounds(descriptors=1000, memory_bytes=100)
    assert bounds.excess([(60, "a"), (40, "b")]) == []
    assert bounds.excess([(50, "a"), (70, "b"), (10, "c")]) == ["b"]
    assert bounds.excess([(90, "a"), (95, "b"), (80, "c")]) == ["b", "a"]


def test_without_a_bound_nobody_lets_go() -> None:
    assert Bounds(descriptors=1000).excess([(1 << 40, "a")]) == []
