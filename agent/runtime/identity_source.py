"""Where the forwarder gets certificates from.

One interface, whoever signs: the embedded CA, istiod or SPIRE. The forwarder
asks anew for every tunnel, so that a renewed certificate serves the next
tunnel while older ones go on with what they began with.
"""

from __future__ import annotations

from typing import Protocol

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.wire.tls import WorkloadTls


class Identities(Protocol):
    """The certificates of the workloads on this node."""

    async def tls(self, identity: SpiffeId) -> WorkloadTls:
        """The TLS contexts in force for `identity`.

        Waits for a first certificate when there is none yet; cancelling the
        wait has no effect on others who wait. Raises MeshbpfError when it
        cannot be had.
        """
        ...
