"""The mesh state as one pod's connections see it."""

from __future__ import annotations

from collections.abc import Callable

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.local_pod import LocalPod

MeshView = Callable[[], Snapshot]
"""The state in force now. Asked anew for each decision."""

WORKLOAD_WAIT_S = 5.0
_WORKLOAD_POLL_S = 0.05


async def local_workload(pod: LocalPod, mesh: MeshView) -> Workload:
    """The pod's own workload; a pod may well start before the state tells of it.

    Raises MeshbpfError after WORKLOAD_WAIT_S.
    """
    workload = pod.workload(mesh())
    if workload is not None:
        return workload
    with trio.move_on_after(WORKLOAD_WAIT_S):
        while workload is None:
            # The state is replaced as a whole and rarely; a poll in this rare
            # wait is simpler than a subscription in every holder of a state.
            await trio.sleep(_WORKLOAD_POLL_S)
            workload = pod.workload(mesh())
        return workload
    raise MeshbpfError(
        "unknown-local-workload",
        f"the mesh state has no workload {pod.key} with service account {pod.service_account}",
        "see `meshbpf workloads`",
    )
