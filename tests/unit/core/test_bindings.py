"""Which waypoint an object is bound to: its own label before its namespace's."""

from typing import Any

import pytest

from meshbpf.agent.core.bindings import Bindings
from meshbpf.agent.core.labels import selects
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet

pytestmark = pytest.mark.compat

GATEWAY = "gateway.networking.k8s.io"


def thing(kind: str, place: str, *, group: str = "", **body: Any) -> KubeObject:
    namespace, _, name = place.rpartition("/")
    labels, annotations = body.pop("labels", {}), body.pop("annotations", {})
    metadata = {"name": name, "labels": labels, "annotations": annotations}
    return KubeObject(ObjectKey(group, kind, namespace, name), "v1", {"metadata": metadata} | body)


def gateway(
    place: str, *, address: bool = True, allow: dict[str, Any] | None = None, **more: Any
) -> KubeObject:
    listener: dict[str, Any] = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
    if allow is not None:
        listener["allowedRoutes"] = {"namespaces": allow}
    status = {"addresses": [{"type": "IPAddress", "value": "198.51.100.9"}]} if address else {}
    spec = {"gatewayClassName": "meshbpf-waypoint", "listeners": [listener]}
    return thing("Gateway", place, group=GATEWAY, spec=spec, status=status, **more)


def use(name: str, **more: str) -> dict[str, str]:
    found = {"istio.io/use-waypoint": name}
    return found | {f"istio.io/use-waypoint-{key}": value for key, value in more.items()}


def bound(*objects: KubeObject) -> str:
    """The waypoint of the Service (or Pod) among the objects, "-" for none."""
    bindings = Bindings(ObjectSet.of(objects))
    for each in objects:
        if each.key.kind == "Service":
            return str(bindings.of_service(each).gateway or "-")
        if each.key.kind == "Pod":
            return str(bindings.of_workload(each, "cart").gateway or "-")
    raise AssertionError


def test_a_services_own_label_comes_before_its_namespaces() -> None:
    both = gateway("shop/one"), gateway("shop/two")
    space = thing("Namespace", "shop", labels=use("one"))
    assert bound(*both, space, thing("Service", "shop/cart", labels=use("two"))) == "shop/two"
    assert bound(*both, space, thing("Service", "shop/cart")) == "shop/one"


def test_none_opts_out_of_the_namespaces_waypoint() -> None:
    space = thing("Namespace", "shop", labels=use("one"))
    service = thing("Service", "shop/cart", labels=use("none"))
    assert bound(gateway("shop/one"), space, service) == "-"


@pytest.mark.parametrize(
    ("allow", "expected"),
    [
        (None, "-"),
        ({"from": "Same"}, "-"),
        ({"from": "All"}, "infra/shared"),
        ({"from": "Selector", "selector": {"matchLabels": {"team": "a"}}}, "infra/shared"),
        ({"from": "Selector", "selector": {"matchLabels": {"team": "b"}}}, "-"),
    ],
)
def test_another_namespaces_waypoint_must_allow_it(
    allow: dict[str, Any] | None, expected: str
) -> None:
    space = thing("Namespace", "shop", labels={"team": "a"})
    service = thing("Service", "shop/cart", labels=use("shared", namespace="infra"))
    assert bound(gateway("infra/shared", allow=allow), space, service) == expected


@pytest.mark.parametrize(
    ("traffic", "service", "pod"),
    [
        (None, "shop/w", "-"),
        ("service", "shop/w", "-"),
        ("workload", "-", "shop/w"),
        ("all", "shop/w", "shop/w"),
        ("none", "-", "-"),
        ("nonsense", "-", "-"),
    ],
)
def test_waypoint_for_says_what_is_bound(traffic: str | None, service: str, pod: str) -> None:
    one = gateway("shop/w", labels={"istio.io/waypoint-for": traffic} if traffic else {})
    assert bound(one, thing("Service", "shop/cart", labels=use("w"))) == service
    assert bound(one, thing("Pod", "shop/cart-0", labels=use("w"))) == pod


def test_waypoint_for_may_stand_on_the_class() -> None:
    kind = thing(
        "GatewayClass", "meshbpf-waypoint", group=GATEWAY, labels={"istio.io/waypoint-for": "all"}
    )
    assert bound(gateway("shop/w"), kind, thing("Pod", "shop/p", labels=use("w"))) == "shop/w"


def test_a_service_accounts_waypoint_comes_before_the_namespaces() -> None:
    space = thing("Namespace", "shop", labels=use("one"))
    account = gateway("shop/carts", annotations={"istio.io/for-service-account": "cart"})
    everything = gateway("shop/one", labels={"istio.io/waypoint-for": "all"})
    assert bound(everything, account, space, thing("Pod", "shop/cart-0")) == "shop/carts"
    assert bound(everything, space, thing("Pod", "shop/cart-0")) == "shop/one"


def test_a_gateway_without_an_address_binds_nothing_unless_a_service_has_its_name() -> None:
    service = thing("Service", "shop/cart", labels=use("w"))
    assert bound(service, gateway("shop/w", address=False)) == "-"
    own = thing("Service", "shop/w", labels=use("none"))
    binding = Bindings(ObjectSet.of((service, own, gateway("shop/w", address=False)))).of_service(
        service
    )
    assert binding.address is not None
    assert str(binding.address.destination) == "shop/w.shop.svc.cluster.local"


def test_a_label_that_is_not_followed_says_why() -> None:
    service = thing("Service", "shop/cart", labels=use("missing"))
    binding = Bindings(ObjectSet.of([service])).of_service(service)
    assert binding.ignored
    assert binding.why == (
        "Service shop/cart asks for waypoint shop/missing, and there is no such Gateway"
    )


@pytest.mark.parametrize(("weight", "expected"), [("10", (90, 10)), ("101", ()), ("x", ())])
def test_a_canary_takes_its_weight_of_connections(weight: str, expected: tuple[int, ...]) -> None:
    service = thing(
        "Service",
        "shop/cart",
        labels=use("w", canary="next"),
        annotations={"istio.io/use-waypoint-canary-weight": weight},
    )
    objects = ObjectSet.of((service, gateway("shop/w"), gateway("shop/next")))
    binding = Bindings(objects).of_service(service)
    assert tuple(each.weight for each in binding.weighted) == expected
    assert binding.ignored == (not expected)


def test_selectors_know_all_four_operators() -> None:
    labels = {"a": "1"}
    for operator, key, values, expected in (
        ("In", "a", ["1", "2"], True),
        ("In", "a", ["2"], False),
        ("NotIn", "a", ["2"], True),
        ("NotIn", "a", ["1"], False),
        ("NotIn", "b", ["1"], True),
        ("Exists", "a", [], True),
        ("Exists", "b", [], False),
        ("DoesNotExist", "b", [], True),
        ("DoesNotExist", "a", [], False),
        ("Like", "a", ["1"], False),
    ):
        expression = {"key": key, "operator": operator, "values": values}
        assert selects({"matchExpressions": [expression]}, labels) is expected, expression
