"""From a push to a change of the mesh, resource by resource."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from meshbpf.agent.core.policy import Authorization
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.state import MeshDelta
from meshbpf.agent.core.workload import NamespacedHostname, Workload
from meshbpf.agent.core.xds import ADDRESS, AUTHORIZATION, Push
from meshbpf.agent.wire.xds_policies import read_authorization
from meshbpf.agent.wire.xds_records import RecordError, RecordReader


@dataclass(frozen=True, slots=True)
class ReadPush:
    """What can be taken of a push, and why the rest cannot, by name."""

    delta: MeshDelta
    refused: dict[str, str]
    kept: frozenset[str] = frozenset()
    """Of the refused, policies that are in the delta so that they fail closed."""


def read_push(
    push: Push, reader: RecordReader, made: Callable[[int], None] = lambda _count: None
) -> ReadPush:
    """Read every resource; `made` is told of each record, as they come.

    A name that is both sent and removed is removed, as with ztunnel.
    """
    if push.type_url == ADDRESS:
        return _addresses(push, reader, made)
    if push.type_url == AUTHORIZATION:
        return _policies(push, made)
    return ReadPush(MeshDelta(), {"": f"{push.type_url} was not asked for"})


def _addresses(push: Push, reader: RecordReader, made: Callable[[int], None]) -> ReadPush:
    workloads: dict[str, Workload] = {}
    services: dict[str, Service] = {}
    refused: dict[str, str] = {}
    gone = frozenset(push.removed)
    for one in push.resources:
        if one.name in gone:
            continue
        try:
            record = reader.address(one.name, one.payload)
        except RecordError as error:
            refused[one.name] = error.what
            continue
        if isinstance(record, Workload):
            workloads[one.name] = record
        else:
            services[one.name] = record
        made(1)
    # A name does not say what it was the name of; what is not there is passed over.
    split = (name.partition("/") for name in push.removed)
    delta = MeshDelta(
        workloads=tuple(workloads.values()),
        services=tuple(services.values()),
        removed_workloads=push.removed,
        removed_services=[NamespacedHostname(before, after) for before, _, after in split],
    )
    return ReadPush(delta, refused)


def _policies(push: Push, made: Callable[[int], None]) -> ReadPush:
    policies: dict[str, Authorization] = {}
    refused: dict[str, str] = {}
    kept: set[str] = set()
    gone = frozenset(push.removed)
    for one in push.resources:
        if one.name in gone:
            continue
        try:
            read = read_authorization(one.name, one.payload)
        except RecordError as error:
            refused[one.name] = error.what
            continue
        policies[one.name] = read.policy
        if read.refusal:
            refused[one.name] = read.refusal
            kept.add(one.name)
        made(1)
    delta = MeshDelta(policies=tuple(policies.values()), removed_policies=push.removed)
    return ReadPush(delta, refused, frozenset(kept))
