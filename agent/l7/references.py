"""What a route may refer to: backends in the mesh state, and ReferenceGrants across namespaces."""

from __future__ import annotations

from collections.abc import Callable, Collection

from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.workload import NamespacedHostname
from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.filter import Filter, Outcome, Reply
from meshbpf.agent.l7.problem import Problem
from meshbpf.agent.l7.rules import NO_FILTERS, Backend, Filters
from meshbpf.agent.l7.spec import Value

GATEWAY_API = "gateway.networking.k8s.io"
FindService = Callable[[str, str], Service | None]
"""By namespace and hostname."""


class References:
    """Resolves the backendRefs of one set of objects; what it cannot is a Problem."""

    def __init__(
        self,
        objects: ObjectSet,
        find: FindService,
        extend: Callable[[KubeObject], Filter | None] = lambda _: None,
        cluster_domain: str = "cluster.local",
    ) -> None:
        self._objects = objects
        self._find = find
        self._extend = extend
        self._domain = cluster_domain
        self._grants = list(objects.of_kind(GATEWAY_API, "ReferenceGrant"))
        self.problems: list[Problem] = []

    def hostname(self, namespace: str, name: str) -> str:
        """A Service's name in DNS."""
        return f"{name}.{namespace}.svc.{self._domain}"

    def backend(
        self,
        ref: Value,
        parents: Collection[tuple[str, str]],
        filters: Callable[[Value | None], Filters] | None = None,
    ) -> Backend:
        """One backendRef of a route whose own parents are these Services (namespace, name).

        A route may send to the Service that it is attached to in another
        namespace without a grant: its producer lets it be addressed anyway.
        """
        known = ("group", "kind", "name", "namespace", "port", "weight", "filters")
        fields = ref.record(known)
        route = ref.object
        group, kind = fields.get("group"), fields.get("kind")
        what = (
            "" if group is None else group.text(empty=True),
            "Service" if kind is None else kind.text(),
        )
        name = ref.need(fields, "name").text()
        space = fields.get("namespace")
        namespace = route.namespace if space is None else space.text()
        weight, port = fields.get("weight"), fields.get("port")
        found = Backend(
            service=NamespacedHostname(namespace, self.hostname(namespace, name)),
            port=0 if port is None else port.integer(1, 65535),
            weight=1 if weight is None else weight.integer(0, 1_000_000),
            filters=NO_FILTERS if filters is None else filters(fields.get("filters")),
        )
        wrong = self._wrong(ref, what, found, namespace, name, parents)
        if wrong is None:
            return found
        reason, text = wrong
        self.problems.append(
            Problem(route.key, route.origin, ref.path, text, "ResolvedRefs", reason)
        )
        return Backend(found.service, found.port, found.weight, found.filters, text)

    def _wrong(
        self,
        ref: Value,
        what: tuple[str, str],
        found: Backend,
        namespace: str,
        name: str,
        parents: Collection[tuple[str, str]],
    ) -> tuple[str, str] | None:
        route = ref.object
        if what not in (("", "Service"), ("core", "Service")):
            return "InvalidKind", f"{'/'.join(filter(None, what))} is no kind of backend here"
        own = namespace == route.namespace or (namespace, name) in parents
        if not own and not self.granted(route.key, namespace, name):
            told = f"no ReferenceGrant in {namespace} lets {route.key} use Service {name}"
            return "RefNotPermitted", told
        service = self._find(namespace, found.service.hostname)
        if service is None:
            return "BackendNotFound", f"there is no Service {namespace}/{name}"
        if not found.port:
            return "BackendNotFound", "a Service needs a port"
        if found.port not in service.ports:
            return "BackendNotFound", f"Service {namespace}/{name} has no port {found.port}"
        return None

    def extension(self, ref: Value, group: str, kind: str, name: str) -> Filter:
        """The filter that an ExtensionRef names; one that refuses when there is none.

        Gateway API: a filter that cannot be resolved must not be skipped.
        """
        route = ref.object
        about = self._objects.get(group, kind, route.namespace, name)
        found = None if about is None else self._extend(about)
        if found is not None:
            return found
        text = f"there is no {kind} {route.namespace}/{name}"
        if about is not None:
            text = f"{kind} of {group} is no kind of filter here"
        reason = "BackendNotFound" if about is None else "InvalidKind"
        self.problems.append(
            Problem(route.key, route.origin, ref.path, text, "ResolvedRefs", reason)
        )
        return Unresolved(text)

    def granted(self, source: ObjectKey, namespace: str, name: str) -> bool:
        """Whether an object may refer to a Service of another namespace."""
        return any(
            grant.namespace == namespace and _grants(grant, source, name) for grant in self._grants
        )


class Unresolved(Filter):
    """Stands for a filter that is not there."""

    def __init__(self, why: str) -> None:
        self.name = why

    def on_request(self, exchange: Exchange) -> Outcome:
        """Refuse."""
        return Reply(500, detail="filter_not_resolved")


def _grants(grant: KubeObject, source: ObjectKey, name: str) -> bool:
    sender = any(
        each.get("group", "") == source.group
        and each.get("kind") == source.kind
        and each.get("namespace") == source.namespace
        for each in grant.spec.get("from") or ()
    )
    return sender and any(
        each.get("group", "") in ("", "core")
        and each.get("kind") == "Service"
        and each.get("name") in (None, "", name)
        for each in grant.spec.get("to") or ()
    )
