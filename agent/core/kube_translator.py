"""A cluster's objects as mesh state, kept up at a cost that follows what changes.

The translation goes in steps, each of which reads the objects and what the
steps before it made:

1. Gateways become waypoints; Namespaces say who is bound to them.
2. Services and ServiceEntries claim hostnames.
3. Each hostname is given to those of its claimants that have it.
4. Policies.
5. EndpointSlices: bare endpoints, and the pods of services without a selector.
6. Pods, WorkloadEntries and the endpoints of ServiceEntries.

A change marks what must be taken again in its own step and, where the outcome
of a step differs from what it was, in later ones. So a pod's change costs one
pod, a service's the workloads that it selects or selected (looking for them
takes a walk through the labels of its namespace), a waypoint's whatever could be
bound to any. What the whole comes to does not depend on the way there: a test
compares random ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from meshbpf.agent.core.bindings import GATEWAY_API
from meshbpf.agent.core.kube_catalogue import Catalogue
from meshbpf.agent.core.kube_cluster import Cluster, Problem, Problems
from meshbpf.agent.core.kube_hostnames import Hostnames, Turn
from meshbpf.agent.core.kube_names import CORE, DISCOVERY, NETWORKING, SECURITY
from meshbpf.agent.core.kube_outcome import Ledger, Outcome, Step
from meshbpf.agent.core.kube_peer_auth import PeerAuthentications
from meshbpf.agent.core.kube_places import Places, node_locality
from meshbpf.agent.core.kube_policies import KubePolicy, read_policy
from meshbpf.agent.core.kube_service_entries import ServiceEntry, read_service_entry
from meshbpf.agent.core.kube_services import KubeService, read_service
from meshbpf.agent.core.kube_slices import PodName, Slices
from meshbpf.agent.core.kube_waypoints import Waypoints, asks_for_waypoint
from meshbpf.agent.core.kube_workloads import Workloads
from meshbpf.agent.core.object_fields import ObjectError
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.workload import Workload

KINDS = (
    (CORE, "v1", "Namespace"),
    (CORE, "v1", "Node"),
    (CORE, "v1", "Pod"),
    (CORE, "v1", "Service"),
    (DISCOVERY, "v1", "EndpointSlice"),
    (GATEWAY_API, "v1", "Gateway"),
    (GATEWAY_API, "v1", "GatewayClass"),
    (NETWORKING, "v1", "ServiceEntry"),
    (NETWORKING, "v1", "WorkloadEntry"),
    (SECURITY, "v1", "AuthorizationPolicy"),
    (SECURITY, "v1", "PeerAuthentication"),
)
"""What the translation reads: (group, version, kind)."""
_PLACED = ("Pod", "WorkloadEntry", "ServiceEntry")
_BOUND = ("Service", *_PLACED)
"""What a waypoint can stand before."""


class _Marks:
    """What must be taken again, in the order in which that was found."""

    def __init__(self) -> None:
        self.gateways = False
        self.namespaces: dict[str, None] = {}
        self.claims: dict[ObjectKey, None] = {}
        self.hostnames: dict[str, None] = {}
        self.policies: dict[ObjectKey, None] = {}
        self.peers: set[str] = set()
        """Namespaces of the PeerAuthentications that changed."""
        self.slices: dict[ObjectKey, None] = {}
        self.workloads: dict[ObjectKey, None] = {}
        """Pods, WorkloadEntries, and ServiceEntries for their endpoints."""

    def add(self, key: ObjectKey) -> None:
        """Take an object again by itself."""
        match key.kind:
            case "Service":
                self.claims[key] = None
            case "ServiceEntry":
                self.claims[key] = self.workloads[key] = None
            case "Pod" | "WorkloadEntry":
                self.workloads[key] = None
            case "EndpointSlice":
                self.slices[key] = None
            case "AuthorizationPolicy":
                self.policies[key] = None
            case "PeerAuthentication":
                self.peers.add(key.namespace)

    def add_workloads(self, keys: Iterable[ObjectKey]) -> None:
        """Take these again in the last step."""
        self.workloads.update(dict.fromkeys(keys))


class Translator:
    """The objects of a cluster, and what they come to."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._catalogue = Catalogue(KINDS)
        self._hostnames = Hostnames()
        self._slices = Slices()
        self._places = Places(self._catalogue, self._hostnames, self._slices, cluster)
        self._workloads = Workloads(cluster, self._places, self._hostnames)
        self._entries: dict[ObjectKey, ServiceEntry] = {}
        self._policies: dict[ObjectKey, KubePolicy] = {}
        self._made: dict[ObjectKey, tuple[Workload, ...]] = {}
        self._outcome = Outcome()
        self._ledger = Ledger()

    @property
    def state(self) -> MeshState:
        """All that the objects come to."""
        return self._outcome.state

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is wrong with them, causes first."""
        return self._ledger.problems

    @property
    def broken(self) -> frozenset[ObjectKey]:
        """Those that could not be read at all."""
        return self._ledger.broken

    def delta(self) -> MeshDelta:
        """What changed in the state since this was last asked."""
        return self._outcome.delta()

    def change(self, changes: Mapping[ObjectKey, KubeObject | None]) -> None:
        """Take objects in; None for one that is gone. Kinds that are not read are passed over."""
        marks = _Marks()
        for key, new in changes.items():
            if self._catalogue.knows(key):
                self._mark(key, self._catalogue.put(key, new), new, marks)
        if marks.gateways or marks.namespaces:
            self._take_waypoints(marks)
        for key in marks.claims:
            marks.hostnames.update(dict.fromkeys(self._take_claims(key)))
        for hostname in marks.hostnames:
            self._take_hostname(hostname, marks)
        for key in marks.policies:
            self._take_policy(key, marks)
        if marks.peers:
            self._take_peers(marks)
        for key in marks.slices:
            self._take_slice(key, marks)
        for key in marks.workloads:
            self._take_workload(key)

    def _mark(
        self, key: ObjectKey, old: KubeObject | None, new: KubeObject | None, marks: _Marks
    ) -> None:
        """What an object's change concerns at once."""
        marks.add(key)
        match key.kind:
            case "Namespace":
                if not _alike(old, new):  # its status is nobody's business
                    marks.namespaces[key.name] = None
            case "Node":
                if node_locality(old) != node_locality(new):  # its heartbeats neither
                    marks.add_workloads(self._pods_on(key.name))
            case "Gateway" | "GatewayClass":
                marks.gateways = True
            case "Service" if (old is None) != (new is None):
                # A Gateway may have its address from a Service of its name.
                gateway = ObjectKey(GATEWAY_API, "Gateway", key.namespace, key.name)
                marks.gateways = marks.gateways or self._catalogue.get(gateway) is not None
            case "EndpointSlice":
                self._slices.put(key, old, new)

    def _pods_on(self, node: str) -> list[ObjectKey]:
        pods = self._catalogue.of_kind(CORE, "Pod")
        return [key for key, pod in pods.items() if pod.spec.get("nodeName") == node]

    # -- the steps

    def _take_waypoints(self, marks: _Marks) -> None:
        problems = Problems()
        kinds = ((CORE, "Namespace"), (GATEWAY_API, "Gateway"), (GATEWAY_API, "GatewayClass"))
        found = [each for kind in kinds for each in self._catalogue.of_kind(*kind).values()]
        for gateway in self._catalogue.of_kind(GATEWAY_API, "Gateway"):
            service = self._catalogue.get(ObjectKey(CORE, "Service", *gateway[2:]))
            found += [] if service is None else [service]
        before = self._places.waypoints
        now = self._places.waypoints = Waypoints(ObjectSet.of(found), self._cluster, problems)
        self._ledger.put(Step.WAYPOINTS, "", problems)
        others = () if now.same_as(before) else self._catalogue.spaces()
        for space in {**marks.namespaces, **dict.fromkeys(others)}:
            labels = self._catalogue.namespace_labels(space)
            may_bind = any(each.may_bind(labels) for each in (before, now))
            whole = space in marks.namespaces or may_bind
            for key in self._catalogue.within(space):
                if key.kind in _BOUND and (whole or self._may_be_bound(key)):
                    marks.add(key)

    def _may_be_bound(self, key: ObjectKey) -> bool:
        """By labels of its own; those of entries stand in several places."""
        each = self._catalogue.get(key)
        if each is None or key.kind in ("ServiceEntry", "WorkloadEntry"):
            return True
        return asks_for_waypoint(each.labels)

    def _take_claims(self, key: ObjectKey) -> Iterable[str]:
        owner = self._catalogue.get(key)
        problems = Problems()
        services: tuple[KubeService, ...] = ()
        self._entries.pop(key, None)
        try:
            if owner is not None:
                services = self._claims_of(owner, problems)
        except ObjectError as error:
            entry = key.kind == "ServiceEntry"
            what = "its hosts are not in the mesh" if entry else "the service is not in the mesh"
            problems.reject(error, "" if owner is None else owner.origin, what)
        self._ledger.put(Step.CLAIMS, key, problems)
        return self._hostnames.claim(key, services)

    def _claims_of(self, owner: KubeObject, problems: Problems) -> tuple[KubeService, ...]:
        namespace = self._catalogue.namespace(owner.namespace)
        waypoints = self._places.waypoints
        if owner.key.kind == "Service":
            service = read_service(owner, namespace, self._cluster, waypoints, problems)
            return () if service is None else (service,)
        entry = read_service_entry(owner, namespace, self._cluster.network, waypoints, problems)
        self._entries[owner.key] = entry
        return entry.services

    def _take_hostname(self, hostname: str, marks: _Marks) -> None:
        problems = Problems()
        for turn in self._hostnames.settle(hostname, problems):
            self._outcome.services.set(turn.key, None if turn.new is None else turn.new.service)
            if turn.concerns_workloads:
                self._mark_endpoints(turn, marks)
        self._ledger.put(Step.HOSTNAMES, hostname, problems)

    def _mark_endpoints(self, turn: Turn, marks: _Marks) -> None:
        for each in (turn.old, turn.new):
            if each is None:
                continue
            marks.add_workloads(self._workloads.selected(turn.key.namespace, each.selector))
            if each.of_entry:
                marks.add_workloads((each.owner.key,))
            else:
                of_it = self._slices.of_service(turn.key.namespace, each.owner.name)
                marks.slices.update(dict.fromkeys(sorted(of_it)))

    def _take_policy(self, key: ObjectKey, marks: _Marks) -> None:
        problems = Problems()
        owner = self._catalogue.get(key)
        new = None if owner is None else read_policy(owner, self._cluster, problems)
        self._ledger.put(Step.POLICIES, key, problems)
        old = self._policies.pop(key, None)
        before, now = {} if old is None else old.selects, {} if new is None else new.selects
        name = f"{key.namespace}/{key.name}"
        self._outcome.policies.set(name, None if new is None else new.policy)
        if new is not None:
            self._policies[key] = new
        self._places.policies.put(key, key.namespace, now, name)
        if before != now:
            root = key.namespace == self._cluster.root_namespace
            for wanted in (before, now):
                namespace = None if root else key.namespace
                marks.add_workloads(self._workloads.selected(namespace, wanted))

    def _take_peers(self, marks: _Marks) -> None:
        problems = Problems()
        objects = self._catalogue.of_kind(SECURITY, "PeerAuthentication").values()
        before = {each.key: each for each in self._places.peers.policies}
        now = self._places.peers = PeerAuthentications(objects, self._cluster, problems)
        self._ledger.put(Step.PEERS, "", problems)
        for each in now.policies:
            if before.pop(each.key, None) != each:
                self._outcome.policies.set(each.key, each)
        for name in before:
            self._outcome.policies.set(name, None)
        everywhere = self._cluster.root_namespace in marks.peers
        for space in self._catalogue.spaces() if everywhere else sorted(marks.peers):
            marks.add_workloads(key for key in self._catalogue.within(space) if key.kind in _PLACED)

    def _take_slice(self, key: ObjectKey, marks: _Marks) -> None:
        problems = Problems()
        each = self._catalogue.get(key)
        made: tuple[Workload, ...] = ()
        pods: Iterable[PodName] = ()
        if each is not None:
            made, pods = self._workloads.of_slice(each, problems)
        named = sorted(self._slices.name(key, pods))
        marks.add_workloads(ObjectKey(CORE, "Pod", *name) for name in named)
        self._ledger.put(Step.WORKLOADS, key, problems)
        self._put(key, made)

    def _take_workload(self, key: ObjectKey) -> None:
        problems = Problems()
        owner = self._catalogue.get(key)
        made: tuple[Workload, ...] = ()
        if owner is None or (key.kind == "ServiceEntry" and key not in self._entries):
            self._workloads.forget(key)
        elif key.kind == "Pod":
            made = self._workloads.of_pod(owner, problems)
        elif key.kind == "WorkloadEntry":
            made = self._workloads.of_entry(owner, problems)
        else:
            made = self._workloads.of_service_entry(self._entries[key], problems)
        self._ledger.put(Step.WORKLOADS, key, problems)
        self._put(key, made)

    def _put(self, key: ObjectKey, made: tuple[Workload, ...]) -> None:
        before = self._made.pop(key, ())
        if made:
            self._made[key] = made
        stays = {each.uid for each in made}
        for each in before:
            if each.uid not in stays:
                self._outcome.workloads.set(each.uid, None)
        for each in made:
            self._outcome.workloads.set(each.uid, each)


def _alike(old: KubeObject | None, new: KubeObject | None) -> bool:
    """Whether two forms of a Namespace say the same, by labels and annotations."""
    if old is None or new is None:
        return old is new
    return (old.labels, old.annotations) == (new.labels, new.annotations)
