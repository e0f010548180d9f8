"""The workloads that each object gives: a Pod, an entry, a slice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from meshbpf.agent.core.identity import IdentityError
from meshbpf.agent.core.kube_cluster import Cluster, Problems
from meshbpf.agent.core.kube_entries import Entry, entry_of
from meshbpf.agent.core.kube_entry_workloads import endpoint_workload, entry_workload
from meshbpf.agent.core.kube_hostnames import Hostnames
from meshbpf.agent.core.kube_places import Places
from meshbpf.agent.core.kube_pods import pod_workload
from meshbpf.agent.core.kube_selectors import has_all
from meshbpf.agent.core.kube_service_entries import ServiceEntry
from meshbpf.agent.core.kube_services import KubeService
from meshbpf.agent.core.kube_slices import PodName, slice_pods, slice_service, slice_workloads
from meshbpf.agent.core.object_fields import ObjectError
from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.core.workload import Workload

_NOT_IN_MESH = "it is not in the mesh"
_NO_ENDPOINTS = "its endpoints are not in the mesh"


class Workloads:
    """Makes them, and remembers by which labels they can be selected."""

    def __init__(self, cluster: Cluster, places: Places, hostnames: Hostnames) -> None:
        self._cluster = cluster
        self._places = places
        self._hostnames = hostnames
        self._labels: dict[str, dict[ObjectKey, Mapping[str, str]]] = defaultdict(dict)

    def selected(self, namespace: str | None, wanted: Mapping[str, str]) -> list[ObjectKey]:
        """Whom a selector means, in one namespace or in all (None); an empty one means nobody."""
        if not wanted:
            return []
        spaces = self._labels.values() if namespace is None else (self._labels.get(namespace, {}),)
        return [key for space in spaces for key, labels in space.items() if has_all(wanted, labels)]

    def forget(self, key: ObjectKey) -> None:
        """An object that is gone is selected no more."""
        self._labels[key.namespace].pop(key, None)

    def of_pod(self, pod: KubeObject, problems: Problems) -> tuple[Workload, ...]:
        """One, or none yet."""

        def make() -> Iterator[Workload]:
            self._labels[pod.namespace][pod.key] = pod.labels
            found = pod_workload(pod, self._cluster, lambda: self._places.of_pod(pod, problems))
            if found is not None:
                yield found

        return _tried(pod, make, problems, "spec.serviceAccountName")

    def of_entry(self, owner: KubeObject, problems: Problems) -> tuple[Workload, ...]:
        """One."""

        def make() -> Iterator[Workload]:
            self.forget(owner.key)
            entry, whole = entry_of(owner)
            self._labels[owner.namespace][owner.key] = whole.labels
            place = self._places.of_entry(whole, entry.account, problems)
            yield entry_workload(whole, entry, place, self._cluster)

        return _tried(owner, make, problems, "metadata.namespace")

    def of_service_entry(self, entry: ServiceEntry, problems: Problems) -> tuple[Workload, ...]:
        """Its endpoints, for the hosts that it has."""

        def make() -> Iterator[Workload]:
            self._labels[owner.namespace][owner.key] = owner.labels
            held = [each for each in entry.services if self._hostnames.holds(each)]
            if held:  # else others have its hosts, which is told
                yield from self._of_hosts(entry, held)
                yield from self._of_endpoints(entry, held, problems)

        owner = entry.owner
        return _tried(owner, make, problems, "metadata.namespace", _NO_ENDPOINTS)

    def of_slice(
        self, each: KubeObject, problems: Problems
    ) -> tuple[tuple[Workload, ...], Iterable[PodName]]:
        """Its endpoints that are no pods, and the pods that its service has by it alone."""
        service = slice_service(each, self._cluster, self._hostnames.by_key)
        pods: list[PodName] = []

        def make() -> Iterator[Workload]:
            if service is not None:
                yield from slice_workloads(each, service, self._cluster)
                if not service.selector:  # by which they are found anyway
                    pods.extend(slice_pods(each))

        made = _tried(each, make, problems, "metadata.namespace", _NO_ENDPOINTS)
        return made, () if problems.broken else pods

    def _of_hosts(self, entry: ServiceEntry, held: Iterable[KubeService]) -> Iterator[Workload]:
        for service in held if entry.by_name else ():
            named = Entry.at_host(service.service.hostname)
            place = self._places.of_host(entry.owner, service)
            yield endpoint_workload(entry.owner, named, place, self._cluster)

    def _of_endpoints(
        self, entry: ServiceEntry, held: list[KubeService], problems: Problems
    ) -> Iterator[Workload]:
        owner = entry.owner
        seen: set[str] = set()
        for index, endpoint in enumerate(entry.endpoints):
            at = f"spec.endpoints[{index}]"
            if endpoint.address in seen:
                what = f"{endpoint.address!r} is an endpoint before this one"
                problems.note(owner, f"{at}.address", what, "this endpoint is left out")
                continue
            seen.add(endpoint.address)
            place = self._places.of_endpoint(owner, endpoint, held, problems, at)
            yield endpoint_workload(owner, endpoint, place, self._cluster)


def _tried(
    owner: KubeObject,
    make: Callable[[], Iterable[Workload]],
    problems: Problems,
    identity_at: str,
    consequence: str = _NOT_IN_MESH,
) -> tuple[Workload, ...]:
    try:
        return tuple(make())
    except ObjectError as error:
        problems.reject(error, owner.origin, consequence)
    except IdentityError as error:
        told = ObjectError(owner.key, identity_at, error.what)
        problems.reject(told, owner.origin, consequence)
    return ()
