"""What a waypoint follows of a cluster beside the mesh: routes, policies, mesh configuration."""

from __future__ import annotations

from meshbpf.agent.l7 import mesh_config
from meshbpf.agent.l7.kinds import KINDS
from meshbpf.agent.runtime.kube_watch import Kind
from meshbpf.agent.runtime.kubernetes import followed

FOLLOWED = (
    *map(followed, KINDS),
    Kind("", "v1", "ConfigMap", "configmaps", f"metadata.name={mesh_config.NAME}"),
)
