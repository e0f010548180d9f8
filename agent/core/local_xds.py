"""The mesh from one file: the LOCAL_XDS format of Istio's ztunnel.

The file is the whole mesh, taken whole or refused whole. Beyond what each
record must look like, records must fit together: no two with the same key or
address, no name that nothing bears.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from meshbpf.agent.core.fields import Field
from meshbpf.agent.core.local_checks import check_together
from meshbpf.agent.core.local_policies import read_policy
from meshbpf.agent.core.local_records import read_service, read_workload
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.yaml_tree import read_yaml

__all__ = ["MeshState", "parse_local_xds"]

CODE = "bad-local-xds"
R = TypeVar("R")


def parse_local_xds(text: str, origin: str) -> MeshState:
    """Read the file's text; `origin` is its name for messages.

    ConfigError `mesh.yaml:12: workloads[0].workloadIps[1]: ...` for the first
    thing that is wrong.
    """
    top = Field(read_yaml(text, origin), origin, code=CODE)
    fields = top.record(("workloads", "services", "policies"))

    def read(key: str, reader: Callable[[Field], R]) -> list[tuple[R, Field]]:
        items = fields[key].items() if key in fields else ()
        return [(reader(item), item) for item in items]

    workloads = read("workloads", read_workload)
    services = read("services", read_service)
    policies = read("policies", read_policy)
    check_together(workloads, services, policies)
    return MeshState(
        tuple(workload for workload, _ in workloads),
        tuple(service for service, _ in services),
        tuple(policy for policy, _ in policies),
    )
