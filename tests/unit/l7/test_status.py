"""Statuses of Gateways, routes and policies, and the objects that a Gateway is made of."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any

import pytest

from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_mesh import translate
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.store_delta import delta_to
from meshbpf.agent.l7.deployment import CONTROLLER, Template, objects_of
from meshbpf.agent.l7.oversight import Overseer, statuses
from meshbpf.agent.l7.problem import Problem
from meshbpf.agent.l7.status import (
    Condition,
    Deployed,
    gateway_status,
    merged,
    policy_status,
    route_status,
)

NOW, EARLIER = "2026-05-01T10:00:00Z", "2026-05-01T09:00:00Z"
GATEWAY_API = "gateway.networking.k8s.io"
TEMPLATE = Template("registry.example/meshbpf:1", "https://istiod.istio-system.svc:15012")
ADDRESS = ip_address("198.19.0.7")
HBONE = {"name": "mesh", "port": 15008, "protocol": "HBONE"}


def an_object(group: str, kind: str, name: str, **body: Any) -> KubeObject:
    metadata = {"name": name, "namespace": "apps", "generation": 3, "uid": "u-1"}
    metadata |= body.pop("metadata", {})
    key = ObjectKey(group, kind, str(metadata["namespace"]), name)
    return KubeObject(key, "v1", {"metadata": metadata, **body})


def gateway(*listeners: dict[str, Any], **body: Any) -> KubeObject:
    spec = {"gatewayClassName": "meshbpf-waypoint", "listeners": list(listeners)}
    spec |= body.pop("spec", {})
    return an_object(GATEWAY_API, "Gateway", "w", spec=spec, **body)


def brief(conditions: Iterable[dict[str, Any]]) -> dict[str, str]:
    return {each["type"]: f"{each['status']} {each['reason']}" for each in conditions}


# --- conditions ----------------------------------------------------------------------


def test_a_time_changes_with_its_status_alone() -> None:
    first = merged((), [Condition("Accepted", True, "Accepted")], 1, EARLIER)
    again = merged(first, [Condition("Accepted", True, "Accepted", "still")], 2, NOW)
    assert again[0]["lastTransitionTime"] == EARLIER
    assert (again[0]["observedGeneration"], again[0]["message"]) == (2, "still")
    other = merged(again, [Condition("Accepted", False, "Invalid")], 2, NOW)
    assert other[0]["lastTransitionTime"] == NOW


def test_conditions_of_others_stay() -> None:
    theirs = {"type": "Theirs", "status": "True"}
    found = merged([theirs], [Condition("Accepted", True, "Accepted")], 1, NOW)
    assert found[0] == theirs
    assert len(found) == 2


# --- gateways ------------------------------------------------------------------------

READY = Deployed("w.apps.svc.cluster.local", (ADDRESS,), ready=2)
WAITING = Deployed("w.apps.svc.cluster.local", (ADDRESS,))
ADDRESSES = [
    {"type": "Hostname", "value": "w.apps.svc.cluster.local"},
    {"type": "IPAddress", "value": "198.19.0.7"},
]


@pytest.mark.parametrize(
    ("listeners", "deployed", "accepted", "programmed", "addresses"),
    [
        ((HBONE,), READY, "True Accepted", "True Programmed", ADDRESSES),
        ((HBONE,), WAITING, "True Accepted", "False AddressNotAssigned", []),
        (
            (HBONE,),
            Deployed("h", failure="quota exceeded"),
            "True Accepted",
            "False Invalid",
            [],
        ),
        ((), READY, "False ListenersNotValid", "False Invalid", []),
        ((HBONE | {"port": 80},), READY, "False ListenersNotValid", "False Invalid", []),
        ((HBONE | {"protocol": "HTTP"},), READY, "False ListenersNotValid", "False Invalid", []),
    ],
)
def test_a_gateway(
    listeners: tuple[dict[str, Any], ...],
    deployed: Deployed,
    accepted: str,
    programmed: str,
    addresses: list[dict[str, str]],
) -> None:
    status = gateway_status(gateway(*listeners), deployed, NOW)
    assert brief(status["conditions"]) == {"Accepted": accepted, "Programmed": programmed}
    assert status["addresses"] == addresses


def test_addresses_stay_when_its_pods_go() -> None:
    before = {"addresses": ADDRESSES}
    status = gateway_status(gateway(HBONE, status=before), WAITING, NOW)
    assert status["addresses"] == ADDRESSES
    assert brief(status["conditions"])["Programmed"] == "True Programmed"


def test_listeners_say_what_they_take() -> None:
    kinds = [{"kind": "HTTPRoute"}, {"kind": "UDPRoute"}]
    only = HBONE | {"name": "some", "allowedRoutes": {"kinds": kinds}}
    plain = {"name": "web", "port": 80, "protocol": "HTTP"}
    found = gateway_status(gateway(HBONE, only, plain), READY, NOW)["listeners"]
    mesh, some, web = found
    assert len(mesh["supportedKinds"]) == 4
    assert brief(mesh["conditions"])["ResolvedRefs"] == "True ResolvedRefs"
    assert some["supportedKinds"] == [{"group": GATEWAY_API, "kind": "HTTPRoute"}]
    assert brief(some["conditions"])["ResolvedRefs"] == "False InvalidRouteKinds"
    assert brief(web["conditions"])["Accepted"] == "False UnsupportedProtocol"


# --- routes and policies ---------------------------------------------------------------


def a_route(*parents: dict[str, Any], **body: Any) -> KubeObject:
    return an_object(GATEWAY_API, "HTTPRoute", "r", spec={"parentRefs": list(parents)}, **body)


ECHO = {"kind": "Service", "group": "", "name": "echo"}
OTHER = {"kind": "Service", "group": "", "name": "other"}
BOUND = {("Service", "apps", "echo"), ("Service", "apps", "other")}


def a_problem(field: str, condition: str = "Accepted", reason: str = "Invalid") -> Problem:
    return Problem(a_route().key, "cluster", field, "it is wrong", condition, reason)


def test_a_route_of_a_bound_service_is_judged() -> None:
    status = route_status(a_route(ECHO), BOUND, (), NOW)
    assert status is not None
    (parent,) = status["parents"]
    assert (parent["parentRef"], parent["controllerName"]) == (ECHO, CONTROLLER)
    assert brief(parent["conditions"]) == {
        "Accepted": "True Accepted",
        "ResolvedRefs": "True ResolvedRefs",
    }


def test_a_route_of_a_bound_service_entry_is_judged_and_not_for_a_service_of_its_name() -> None:
    entry = {"group": "networking.istio.io", "kind": "ServiceEntry", "name": "echo"}
    bound = {("ServiceEntry", "apps", "echo")}
    status = route_status(a_route(entry), bound, (), NOW)
    assert status is not None
    assert [each["parentRef"] for each in status["parents"]] == [entry]
    assert route_status(a_route(ECHO), bound, (), NOW) is None
    assert route_status(a_route(entry), BOUND, (), NOW) is None


def test_problems_of_one_parent_are_told_at_that_parent() -> None:
    problems = (
        a_problem("spec.parentRefs[1]", reason="NoMatchingParent"),
        a_problem("spec.rules[0].backendRefs[0]", "ResolvedRefs", "BackendNotFound"),
    )
    status = route_status(a_route(ECHO, OTHER), BOUND, problems, NOW)
    assert status is not None
    first, second = (brief(each["conditions"]) for each in status["parents"])
    assert first == {"Accepted": "True Accepted", "ResolvedRefs": "False BackendNotFound"}
    assert second["Accepted"] == "False NoMatchingParent"


def test_what_a_field_cannot_say_is_an_unsupported_value() -> None:
    status = route_status(a_route(ECHO), BOUND, (a_problem("spec.rules[0]"),), NOW)
    assert status is not None
    (accepted, _) = status["parents"][0]["conditions"]
    assert (accepted["reason"], accepted["message"]) == (
        "UnsupportedValue",
        "spec.rules[0]: it is wrong",
    )


@pytest.mark.parametrize(
    "parent",
    [{"kind": "Gateway", "name": "echo"}, ECHO | {"name": "free"}, ECHO | {"namespace": "x"}, {}],
)
def test_of_routes_of_others_nothing_is_said(parent: dict[str, Any]) -> None:
    assert route_status(a_route(parent), BOUND, (), NOW) is None


def test_what_we_said_goes_with_the_binding_and_what_others_said_stays() -> None:
    ours = {"parentRef": ECHO, "controllerName": CONTROLLER, "conditions": []}
    theirs = ours | {"controllerName": "istio.io/mesh-controller"}
    route = a_route(ECHO, status={"parents": [theirs, ours]})
    assert route_status(route, set(), (), NOW) == {"parents": [theirs]}


def test_a_policy() -> None:
    policy = an_object("security.istio.io", "AuthorizationPolicy", "p")
    problem = Problem(policy.key, "cluster", "spec.rules", "it is wrong")
    good, bad = policy_status(policy, (), NOW), policy_status(policy, (problem,), NOW)
    assert brief(good["conditions"]) == {"meshbpf.io/WaypointAccepted": "True Accepted"}
    assert brief(bad["conditions"]) == {"meshbpf.io/WaypointAccepted": "False UnsupportedValue"}


# --- the whole -------------------------------------------------------------------------


def cluster(*more: KubeObject) -> ObjectSet:
    ports = [{"name": "http", "port": 80}]
    use = {"labels": {"istio.io/use-waypoint": "w"}}
    return ObjectSet.of(
        [
            an_object("", "Namespace", "apps", metadata={"namespace": ""}),
            an_object(
                "",
                "Service",
                "echo",
                metadata=use,
                spec={"clusterIP": "198.19.0.9", "ports": ports},
            ),
            an_object(
                "", "Service", "w", spec={"clusterIP": str(ADDRESS), "ports": [{"port": 15008}]}
            ),
            gateway(HBONE),
            *more,
        ]
    )


def judged(objects: ObjectSet) -> dict[str, dict[str, Any]]:
    state = translate(objects, Cluster()).state
    mesh = Snapshot.EMPTY.after(delta_to(Snapshot.EMPTY, state), 1)
    oversight = Overseer(TEMPLATE).look(objects, mesh)
    found = statuses(objects, oversight, {("apps", "w"): READY}, "istio-system", NOW)
    return {str(about.key): status for about, status in found}


def rule(name: str) -> dict[str, Any]:
    return {"backendRefs": [{"name": name, "port": 80}]}


def test_plans_say_what_is_bound_and_what_is_wrong() -> None:
    parents = [ECHO]
    good = an_object(
        GATEWAY_API, "HTTPRoute", "good", spec={"parentRefs": parents, "rules": [rule("echo")]}
    )
    bad = an_object(
        GATEWAY_API, "HTTPRoute", "bad", spec={"parentRefs": parents, "rules": [rule("no")]}
    )
    targets = {"targetRefs": [{"group": "", "kind": "Service", "name": "echo"}]}
    at_echo = an_object("security.istio.io", "AuthorizationPolicy", "here", spec=targets)
    elsewhere = an_object("security.istio.io", "AuthorizationPolicy", "there", spec={})
    objects = cluster(good, bad, at_echo, elsewhere)
    found = judged(objects)
    assert set(found) == {
        "Gateway apps/w",
        "HTTPRoute apps/good",
        "HTTPRoute apps/bad",
        "AuthorizationPolicy apps/here",
    }
    resolved = {
        name: brief(found[f"HTTPRoute apps/{name}"]["parents"][0]["conditions"])["ResolvedRefs"]
        for name in ("good", "bad")
    }
    assert resolved == {"good": "True ResolvedRefs", "bad": "False BackendNotFound"}
    # Once written, there is nothing to write.
    written = [
        KubeObject(each.key, each.version, {**each.body, "status": found[str(each.key)]})
        if str(each.key) in found
        else each
        for each in objects.by_key.values()
    ]
    assert judged(ObjectSet.of(written)) == {}


# --- what a Gateway is made of ------------------------------------------------------------


def test_its_objects_belong_to_it_and_are_no_part_of_the_mesh() -> None:
    asked = {"infrastructure": {"labels": {"istio.io/dataplane-mode": "ambient", "team": "a"}}}
    account, service, deployment = objects_of(gateway(HBONE, spec=asked), TEMPLATE)
    for each in (account, service, deployment):
        (owner,) = each["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], owner["uid"]) == ("Gateway", "w", "u-1")
        assert each["metadata"]["labels"]["team"] == "a"
    assert service["metadata"]["labels"]["istio.io/use-waypoint"] == "none"
    template = deployment["spec"]["template"]
    # Whatever the Gateway says: a waypoint that is captured would be a loop.
    assert template["metadata"]["labels"]["istio.io/dataplane-mode"] == "none"
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= template["metadata"]["labels"].items()
    assert selector == service["spec"]["selector"]
    assert "replicas" not in deployment["spec"]
    (container,) = template["spec"]["containers"]
    mounts = {each["name"] for each in container["volumeMounts"]}
    assert mounts == {each["name"] for each in template["spec"]["volumes"]}


def test_its_container_takes_the_options_that_it_is_given() -> None:
    from meshbpf.cli.commands.waypoint import command

    deployment = objects_of(gateway(HBONE), Template("i", "https://h:1", network="east"))[2]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    verb, *options = container["args"]
    assert verb == "waypoint"
    options = [each.replace("$(POD_IP)", "198.18.1.1") for each in options]
    parsed = command.make_context("waypoint", options).params
    assert (parsed["name"], parsed["ca"], parsed["network"]) == ("apps/w", "https://h:1", "east")
