"""Where a destination's filters come from: one function for each kind of object.

A source is asked once for every destination of the waypoint when the objects
change, and answers with the filters that hold there. A bad object is told as
a Problem; whether it then fails open or closed is its source's decision and
must be told in its docstring. State that must outlive a change of objects
(token buckets, key sets, compiled Wasm) is kept in `Scope.keep`, by a key
that begins with the source's own name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.l7.filter import Filter
from meshbpf.agent.l7.problem import Problem


@dataclass(frozen=True, slots=True)
class Scope:
    """One destination of one waypoint. `service` None: a pod that was addressed itself.

    For pods only what is attached to the Gateway holds (and to its class).
    """

    objects: ObjectSet
    gateway: KubeObject
    service: Service | None
    trust_domain: str
    root_namespace: str = "istio-system"
    keep: dict[tuple[str, ...], Any] = field(default_factory=dict)
    """Lives as long as the process."""

    def targets(self, ref: Any, namespace: str) -> bool:
        """Whether a policy's targetRef, of an object in `namespace`, means this destination.

        Gateway: by name, in the Gateway's namespace. GatewayClass: the
        Gateway's, for objects of the root namespace. Service and ServiceEntry:
        by name, in the service's namespace.
        """
        if not isinstance(ref, dict):
            return False
        kind, name = ref.get("kind", ""), ref.get("name", "")
        place = ref.get("namespace") or namespace
        if kind == "Gateway":
            own = self.gateway
            return place == namespace == own.namespace and name == own.name
        if kind == "GatewayClass":
            return namespace == self.root_namespace and name == self.gateway.spec.get(
                "gatewayClassName"
            )
        if kind in ("Service", "ServiceEntry") and self.service is not None:
            own_service = self.service
            if kind != kind_of(own_service):
                return False
            return place == namespace == own_service.namespace and name == own_service.name
        return False


def kind_of(service: Service) -> str:
    """What a service is of: Service or ServiceEntry.

    Mesh state does not say, but a Service has its name in a hostname of the cluster's.
    """
    own = service.hostname.startswith(f"{service.name}.{service.namespace}.svc.")
    return "Service" if own else "ServiceEntry"


FilterSource = Callable[[Scope], tuple[list[Filter], list[Problem]]]
"""All of them stand in registry.py."""
