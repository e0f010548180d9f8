"""Explanations: what they say is what routing and policy answer."""

from __future__ import annotations

import pytest

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.explain import Outcome, Step, explain, target_of, workload_of
from meshbpf.agent.core.policy import (
    Authorization,
    Match,
    MatchKind,
    PolicyAction,
    PolicyScope,
    StringMatch,
)
from tests.unit.core.builders import at, gateway, mesh, plain, pod, rng, service

WEB = pod("web", "198.18.1.1")
DB = pod("db", "198.18.2.1", services={"db.default.svc.cluster.local": {80: 7001}})
LEGACY = plain("legacy", "198.18.2.2")
SERVICE = service("db.default.svc.cluster.local", "198.51.100.1", ports={80: 7001})


def denies(name: str) -> Authorization:
    match = Match(principals=(StringMatch(MatchKind.EXACT, f"cluster.local/ns/default/sa/{name}"),))
    return Authorization(
        name="no",
        namespace="default",
        scope=PolicyScope.NAMESPACE,
        action=PolicyAction.DENY,
        rules=(((match,),),),
    )


def stages(steps: tuple[Step, ...]) -> list[str]:
    return [step.stage for step in steps]


def test_a_pod_of_the_mesh_is_reached_by_a_tunnel() -> None:
    outcome, steps = explain(mesh(WEB, DB), WEB, at("198.18.2.1:7001"), rng())
    assert outcome is Outcome.HBONE
    assert stages(steps) == ["route", "tunnel", "policy"]
    assert steps[0] == Step("route", "HBONE to 198.18.2.1:15008", f"{DB} speaks HBONE")
    assert "spiffe://cluster.local/ns/default/sa/db" in steps[1].why


def test_a_service_says_among_how_many_endpoints_it_drew() -> None:
    outcome, steps = explain(mesh(WEB, DB, SERVICE), WEB, at("198.51.100.1:80"), rng())
    assert outcome is Outcome.HBONE
    assert steps[0].stage == "service"
    assert "one of 1 usable endpoints" in steps[0].why
    assert steps[1].what == "HBONE to 198.18.2.1:15008"


def test_a_denial_names_its_policy() -> None:
    outcome, steps = explain(mesh(WEB, DB, denies("web")), WEB, at("198.18.2.1:7001"), rng())
    assert outcome is Outcome.DENIED
    assert steps[-1].what == "denied"
    assert "DENY policy default/no matches" in steps[-1].why
    outcome, _ = explain(mesh(WEB, DB, denies("other")), WEB, at("198.18.2.1:7001"), rng())
    assert outcome is Outcome.HBONE


@pytest.mark.parametrize(
    ("target", "why"),
    [("198.18.2.2:80", "does not speak HBONE"), ("198.51.100.99:80", "not in the mesh")],
)
def test_what_is_not_in_the_mesh_goes_in_the_clear(target: str, why: str) -> None:
    outcome, steps = explain(mesh(WEB, LEGACY), WEB, at(target), rng())
    assert outcome is Outcome.PLAINTEXT
    assert why in steps[-1].why


def test_a_port_that_no_endpoint_serves_is_refused_with_the_reason() -> None:
    outcome, steps = explain(mesh(WEB, DB, SERVICE), WEB, at("198.51.100.1:81"), rng())
    assert outcome is Outcome.REFUSED
    assert steps[-1].what == "refused: unknown-port"


def test_a_waypoint_is_told_apart_from_an_endpoint() -> None:
    waypoint = pod("waypoint", "198.18.2.9")
    bound = service("db.default.svc.cluster.local", "198.51.100.1", waypoint=gateway("/198.18.2.9"))
    outcome, steps = explain(mesh(WEB, DB, waypoint, bound), WEB, at("198.51.100.1:80"), rng())
    assert outcome is Outcome.HBONE
    assert steps[0].why == f"through its waypoint {waypoint}"
    assert steps[-1] == Step(
        "policy", "the waypoint's", "it judges the request; see its own explain"
    )


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("198.18.2.1:7001", "198.18.2.1:7001"),
        ("default/db:7001", "198.18.2.1:7001"),
        ("db", "198.51.100.1:80"),
        ("db.default:80", "198.51.100.1:80"),
        ("198.51.100.1", "198.51.100.1:80"),
        ("[fd00:6d62::1]:80", "[fd00:6d62::1]:80"),
    ],
)
def test_a_destination_is_named_in_many_ways(text: str, address: str) -> None:
    found = target_of(mesh(WEB, DB, SERVICE), WEB, text, "cluster.local")
    assert str(found.address) == address


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("198.18.2.1", "no-port"),
        ("db:http", "bad-port"),
        ("nobody.example.com:80", "unknown-host"),
        ("default/nobody:80", "unknown-workload"),
    ],
)
def test_what_names_no_destination_is_refused_with_a_way_out(text: str, code: str) -> None:
    with pytest.raises(MeshbpfError) as caught:
        target_of(mesh(WEB, DB, SERVICE), WEB, text, "cluster.local")
    assert caught.value.code == code
    assert caught.value.hint


def test_a_source_is_a_pod_or_an_address() -> None:
    state = mesh(WEB, DB)
    assert workload_of(state, "default/web", "") is WEB
    assert workload_of(state, "198.18.2.1", "") is DB
    for text in ("default/nobody", "198.51.100.9", "nonsense"):
        with pytest.raises(MeshbpfError, match="no workload"):
            workload_of(state, text, "")
