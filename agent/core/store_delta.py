"""From one snapshot to the next, at a cost that follows the delta and not the mesh.

Every index is edited in the places that the changed records name, old and
new. What readers had collected (endpoints of services, policies of workloads)
stays where the delta cannot have changed it.

What is first of several that claim one name is who came first; a record that
replaces another of its key keeps that one's place.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from meshbpf.agent.core import persistent
from meshbpf.agent.core.address import address_bits, prefix_bits
from meshbpf.agent.core.persistent import Edit
from meshbpf.agent.core.policy import Authorization, PolicyScope
from meshbpf.agent.core.service import Endpoint, Service
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.store import PlaceKey, ServiceKey, Snapshot, address_rank
from meshbpf.agent.core.workload import NetworkMode, Workload

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")

# Distinct (namespace, list of policies) that were asked for; a node has few
# pods, so more than this are those of pods long gone.
_POLICY_SETS = 4096


def advance(old: Snapshot, delta: MeshDelta, version: int) -> Snapshot:
    """The snapshot after `delta`. The old one stays as it is."""
    new = Snapshot()
    new.version = version
    new.require_waypoint = old.require_waypoint
    touched: set[ServiceKey] = set()
    _workloads(old, new, delta, touched)
    _services(old, new, delta, touched)
    _policies(old, new, delta)
    if touched:
        kept = old._endpoints.copy()
        for key in touched:
            kept.pop(key, None)
        new._endpoints = kept
    else:
        # The very same: what a reader of either collects is true in both.
        new._endpoints = old._endpoints
    return new


def delta_to(old: Snapshot, state: MeshState) -> MeshDelta:
    """The delta that leads from `old` to the whole of `state`."""
    uids = {one.uid for one in state.workloads}
    services = {(one.namespace, one.hostname) for one in state.services}
    policies = {one.key for one in state.policies}
    return MeshDelta(
        workloads=tuple(one for one in state.workloads if old.workload(one.uid) != one),
        services=tuple(
            one for one in state.services if old.service(one.namespace, one.hostname) != one
        ),
        policies=tuple(one for one in state.policies if old.policy(one.key) != one),
        removed_workloads=tuple(one.uid for one in old.workloads if one.uid not in uids),
        removed_services=tuple(
            one.key for one in old.services if (one.namespace, one.hostname) not in services
        ),
        removed_policies=tuple(one.key for one in old.policies if one.key not in policies),
    )


def _changes(
    table: Edit[K, R], removed: Iterable[K], upserts: Iterable[R], key_of: Callable[[R], K]
) -> list[tuple[R | None, R | None]]:
    """Write records into their own table; gives (before, after) of each that truly changed."""
    before: dict[K, R | None] = {}
    for key in removed:
        before.setdefault(key, table.get(key))
        table.remove(key)
    for record in upserts:
        key = key_of(record)
        stands = table.get(key)
        before.setdefault(key, stands)
        if stands != record:
            table.set(key, record)
    found: list[tuple[R | None, R | None]] = []
    for key, was in before.items():
        now = table.get(key)
        if was is now:
            continue
        if was is not None and was == now:
            table.set(key, was)  # removed and sent again: the indexes hold this object
        else:
            found.append((was, now))
    return found


def _workloads(old: Snapshot, new: Snapshot, delta: MeshDelta, touched: set[ServiceKey]) -> None:
    table = old._workloads.edit()
    addresses, names, hostnames = old._addresses.edit(), old._names.edit(), old._hostnames.edit()
    members: dict[ServiceKey, Edit[str, Endpoint]] = {}

    def members_of(key: ServiceKey) -> Edit[str, Endpoint]:
        found = members.get(key)
        if found is None:
            found = members[key] = old._members.get(key, persistent.EMPTY).edit()
        return found

    for was, now in _changes(table, delta.removed_workloads, delta.workloads, lambda one: one.uid):
        _move(names, _own_name(was), _own_name(now), was, now)
        _move(hostnames, _own_hostname(was), _own_hostname(now), was, now)
        _move(addresses, _own_addresses(was), _own_addresses(now), was, now, address_rank)
        if was is not None:
            for named in was.services:
                key = (named.namespace, named.hostname)
                members_of(key).remove(was.uid)
                touched.add(key)
            touched.update(old._listed.get(was.uid, ()))
        if now is not None:
            for named, ports in now.services.items():
                key = (named.namespace, named.hostname)
                members_of(key).set(now.uid, Endpoint(now, ports))
                touched.add(key)
            touched.update(old._listed.get(now.uid, ()))
    new._workloads, new._addresses = table.commit(), addresses.commit()
    new._names, new._hostnames = names.commit(), hostnames.commit()
    index = old._members.edit()
    for key, edit in members.items():
        index_value = edit.commit()
        if index_value:
            index.set(key, index_value)
        else:
            index.remove(key)
    new._members = index.commit()


def _services(old: Snapshot, new: Snapshot, delta: MeshDelta, touched: set[ServiceKey]) -> None:
    table = old._services.edit()
    vips, hostnames = old._vips.edit(), old._services_by_hostname.edit()
    listed = old._listed.edit()
    ranges = {shift: of.edit() for shift, of in old._ranges}
    for was, now in _changes(
        table,
        [(one.namespace, one.hostname) for one in delta.removed_services],
        delta.services,
        lambda one: (one.namespace, one.hostname),
    ):
        _move(hostnames, _service_hostname(was), _service_hostname(now), was, now)
        _move(vips, _own_vips(was), _own_vips(now), was, now)
        before, after = _own_ranges(was), _own_ranges(now)
        for shift in before.keys() | after.keys():
            edit = ranges.setdefault(shift, persistent.EMPTY.edit())
            _move(edit, before.get(shift, ()), after.get(shift, ()), was, now)
        key = _key(now or was)
        touched.add(key)
        for uid in _uids(was) - _uids(now):
            listed.set(uid, tuple(other for other in listed.get(uid, ()) if other != key))
        for uid in _uids(now) - _uids(was):
            listed.set(uid, (*listed.get(uid, ()), key))
    new._services, new._vips = table.commit(), vips.commit()
    new._services_by_hostname, new._listed = hostnames.commit(), listed.commit()
    # The shifts of both families mix: bit 128 keeps their values apart.
    committed = ((shift, ranges[shift].commit()) for shift in sorted(ranges))
    new._ranges = tuple((shift, of) for shift, of in committed if of)


def _policies(old: Snapshot, new: Snapshot, delta: MeshDelta) -> None:
    new._groups = old._groups
    table = old._policies.edit()
    changed = _changes(table, delta.removed_policies, delta.policies, lambda one: one.key)
    if not changed:
        new._policies, new._namespace_policies = old._policies, old._namespace_policies
        new._global_policies, new._policy_sets = old._global_policies, old._policy_sets
        return
    by_namespace = old._namespace_policies.edit()
    global_ones = {one.key: one for one in old._global_policies}
    for was, now in changed:
        _move(by_namespace, _own_namespace(was), _own_namespace(now), was, now)
        if now is not None and now.scope is PolicyScope.GLOBAL:
            global_ones[now.key] = now
        elif was is not None:
            global_ones.pop(was.key, None)
    new._policies, new._namespace_policies = table.commit(), by_namespace.commit()
    new._global_policies = tuple(global_ones.values())
    records = [one for pair in changed for one in pair if one is not None]
    if any(one.scope is PolicyScope.GLOBAL for one in records):
        return  # every set that was collected holds them
    namespaces = {one.namespace for one in records if one.scope is PolicyScope.NAMESPACE}
    keys = {one.key for one in records}
    if len(old._policy_sets) < _POLICY_SETS:
        new._policy_sets = {
            key: found
            for key, found in old._policy_sets.copy().items()
            if key[0] not in namespaces and keys.isdisjoint(key[1])
        }


def _move(
    index: Edit[K, tuple[R, ...]],
    before: Iterable[K],
    after: Iterable[K],
    was: R | None,
    now: R | None,
    rank: Callable[[R], int] | None = None,
) -> None:
    """Take `was` from where it stood and put `now` where it stands, in place where both do."""
    wanted: dict[K, None] = dict.fromkeys(after)
    key: K
    for key in before:
        stands = index.get(key, ())
        if now is not None and key in wanted:
            del wanted[key]
            replaced = [now if one is was else one for one in stands]
            _put(index, key, tuple(replaced), rank)
        elif left := tuple(one for one in stands if one is not was):
            index.set(key, left)
        else:
            index.remove(key)
    if now is not None:
        for key in wanted:
            _put(index, key, (*index.get(key, ()), now), rank)


def _put(
    index: Edit[K, tuple[R, ...]], key: K, claimants: tuple[R, ...], rank: Callable[[R], int] | None
) -> None:
    if rank is not None and len(claimants) > 1:
        claimants = tuple(sorted(claimants, key=rank, reverse=True))
    index.set(key, claimants)


def _own_name(one: Workload | None) -> tuple[ServiceKey, ...]:
    return () if one is None else ((one.namespace, one.name),)


def _own_hostname(one: Workload | None) -> tuple[ServiceKey, ...]:
    return () if one is None or not one.hostname else ((one.namespace, one.hostname),)


def _own_addresses(one: Workload | None) -> tuple[PlaceKey, ...]:
    if one is None or one.network_mode is NetworkMode.HOST_NETWORK:
        return ()
    return tuple((one.network, address_bits(ip)) for ip in one.addresses)


def _key(one: Service | None) -> ServiceKey:
    assert one is not None  # noqa: S101 (a change has one side at least)
    return (one.namespace, one.hostname)


def _uids(one: Service | None) -> set[str]:
    return set() if one is None else {endpoint.workload_uid for endpoint in one.endpoints}


def _service_hostname(one: Service | None) -> tuple[str, ...]:
    return () if one is None else (one.hostname,)


def _own_vips(one: Service | None) -> tuple[PlaceKey, ...]:
    if one is None:
        return ()
    return tuple((address.network, address_bits(address.ip)) for address in one.addresses)


def _own_ranges(one: Service | None) -> dict[int, list[PlaceKey]]:
    found: dict[int, list[PlaceKey]] = defaultdict(list)
    for cidr in one.cidr_addresses if one is not None else ():
        shift, value = prefix_bits(cidr.cidr)
        found[shift].append((cidr.network, value))
    return found


def _own_namespace(one: Authorization | None) -> tuple[str, ...]:
    return () if one is None or one.scope is not PolicyScope.NAMESPACE else (one.namespace,)
