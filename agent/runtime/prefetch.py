"""Certificates for this node's workloads before their pods ask for them."""

from __future__ import annotations

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.state import MeshDelta
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import TunnelProtocol
from meshbpf.agent.runtime.certs import CertificateStore


class Prefetch:
    """Follows the mesh delta by delta; only what changed is looked at."""

    def __init__(self, node: str, certificates: CertificateStore) -> None:
        self._node = node
        self._certificates = certificates

    def follow(self, old: Snapshot, new: Snapshot, delta: MeshDelta) -> None:
        """Expect the identities of workloads that came, forget those of workloads that went."""
        for uid in {one.uid for one in delta.workloads}.union(delta.removed_workloads):
            before, after = self._identity(old, uid), self._identity(new, uid)
            if after is not None:
                self._certificates.expect(after, uid)
            # After the other: what stays must not lose its certificate in between.
            if before is not None and before != after:
                self._certificates.forget(before, uid)

    def _identity(self, mesh: Snapshot, uid: str) -> SpiffeId | None:
        one = mesh.workload(uid)
        if one is None or one.node != self._node:
            return None
        return one.identity if one.tunnel_protocol is TunnelProtocol.HBONE else None
