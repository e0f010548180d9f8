"""Waypoints as the translation needs them: bindings to tell of, tunnels of their own pods.

Who is bound to which is decided in bindings.py; here malformed Gateways are
kept from it, and what it says of labels that lead nowhere becomes a problem
of the object that bears them.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshbpf.agent.core.bindings import CANARY, GATEWAY_API, USE_WAYPOINT, Binding, Bindings
from meshbpf.agent.core.kube_cluster import Cluster, Problems
from meshbpf.agent.core.kube_names import GATEWAY_NAME, INBOUND_BINDING
from meshbpf.agent.core.object_fields import ObjectError, Value
from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.core.workload import ApplicationTunnel, TunnelFraming

_UNBOUND = "traffic goes on without that waypoint"


class Waypoints:
    """All of a cluster's, and who uses which."""

    def __init__(self, objects: ObjectSet, cluster: Cluster, problems: Problems) -> None:
        self._tunnels: dict[tuple[str, str], ApplicationTunnel | None] = {}
        malformed = set()
        classes = {each.name: each for each in objects.of_kind(GATEWAY_API, "GatewayClass")}
        for gateway in objects.of_kind(GATEWAY_API, "Gateway"):
            above = classes.get(str(gateway.spec.get("gatewayClassName")))
            try:
                _check(gateway)
                self._tunnels[gateway.namespace, gateway.name] = _tunnel(gateway, above)
            except ObjectError as error:
                problems.reject(error, gateway.origin, "it is no waypoint")
                malformed.add(gateway.key)
        if malformed:
            objects = ObjectSet.of(
                each for each in objects.by_key.values() if each.key not in malformed
            )
        self._bindings = Bindings(objects, cluster_domain=cluster.domain, network=cluster.network)

    def same_as(self, other: Waypoints) -> bool:
        """Whether both are the same for all objects of a namespace that is the same."""
        return self._tunnels == other._tunnels and self._bindings.same_as(other._bindings)

    def may_bind(self, namespace_labels: Mapping[str, str]) -> bool:
        """Whether objects can be bound that do not say so themselves, by these or by account."""
        return self._bindings.by_account or asks_for_waypoint(namespace_labels)

    def of_service(self, service: KubeObject, problems: Problems) -> Binding:
        """What stands before a service."""
        return _told(service, self._bindings.of_service(service), problems, "metadata")

    def of_workload(
        self, workload: KubeObject, account: str, problems: Problems, labels_at: str = "metadata"
    ) -> Binding | None:
        """What stands before a workload; None for one that is a waypoint's own.

        `labels_at` is where its labels are written, for messages.
        """
        if self._instance_of(workload) in self._tunnels:
            return None
        return _told(workload, self._bindings.of_workload(workload, account), problems, labels_at)

    def tunnel_of(self, workload: KubeObject) -> ApplicationTunnel | None:
        """How a waypoint's own workload wants its connections."""
        return self._tunnels.get(self._instance_of(workload))

    @staticmethod
    def _instance_of(workload: KubeObject) -> tuple[str, str]:
        return workload.namespace, workload.labels.get(GATEWAY_NAME, "")


def asks_for_waypoint(labels: Mapping[str, str]) -> bool:
    """Whether the labels of an object or Namespace have to do with waypoints at all."""
    return any(each in labels for each in (USE_WAYPOINT, CANARY, GATEWAY_NAME))


def _told(about: KubeObject, binding: Binding, problems: Problems, labels_at: str) -> Binding:
    if binding.ignored:
        problems.note(about, f"{labels_at}.labels[{USE_WAYPOINT}]", binding.why, _UNBOUND)
    return binding


def _check(gateway: KubeObject) -> None:
    """Refuse a shape that the API server would not have let pass."""
    spec = Value.spec(gateway)
    spec.get("gatewayClassName").text()
    listeners = spec.get("listeners")
    for listener in listeners.items() if listeners.present else ():
        selector = listener.get("allowedRoutes", "namespaces", "selector")
        selector.get("matchLabels").labels()
        expressions = selector.get("matchExpressions")
        for item in expressions.items() if expressions.present else ():
            item.get("key").text()
            values = item.get("values")
            if values.present:
                values.texts()
    addresses = Value.of(gateway, "status").get("addresses")
    for address in addresses.items() if addresses.present else ():
        address.get("value").text()


def _tunnel(gateway: KubeObject, above: KubeObject | None) -> ApplicationTunnel | None:
    """As the annotation says: `PROTOCOL` or `PROTOCOL/PORT`."""
    text = gateway.annotations.get(INBOUND_BINDING)
    if text is None and above is not None:
        text = above.annotations.get(INBOUND_BINDING)
    if text is None:
        return None
    place = Value(gateway, text, f"metadata.annotations[{INBOUND_BINDING}]")
    protocol, slash, port = text.partition("/")
    if protocol not in ("NONE", "PROXY"):
        raise place.error(f"{protocol!r} is neither NONE nor PROXY")
    if slash and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise place.error(f"{port!r} is not a port")
    return ApplicationTunnel(TunnelFraming(protocol), int(port) if slash else None)
