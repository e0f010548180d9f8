"""Agents that require the waypoint: whoever goes past it is refused, whichever way they go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.talk import refused
from tests.testbed import SUITE_TAG
from tests.waypoint.bed import WaypointBed, vip

pytestmark = [pytest.mark.root, pytest.mark.netns]

PORT = 8080


@pytest.fixture(scope="module")
def strict() -> Iterator[WaypointBed]:
    with WaypointBed(f"{SUITE_TAG}wpr") as bed:
        yield bed.start(agents=("--require-waypoint",))


def test_a_request_through_the_waypoint_is_answered(strict: WaypointBed) -> None:
    for _ in range(3):
        assert strict.get("echo-v1").status == 200


@pytest.mark.parametrize(
    ("client", "how"),
    [("n1a", "over HBONE"), ("n2b", "inside the node"), ("n1x", "in plaintext")],
)
def test_a_pods_own_address_does_not_lead_past_it(
    strict: WaypointBed, client: str, how: str
) -> None:
    for _ in range(3):  # the second time the kernel might have been left it
        refused(strict, strict[client], strict["n2a"].ipv4, PORT)


def test_nor_does_another_service_of_the_same_pods(strict: WaypointBed) -> None:
    refused(strict, strict["n1a"], vip("away"), PORT)


def test_the_refusal_is_explained(strict: WaypointBed) -> None:
    argv = ("explain", "apps/n2b", f"{strict['n2a'].ipv4}:{PORT}")
    told = strict.agents[2].cli(*argv, check=False).stdout
    assert "is not the waypoint that is required" in told
