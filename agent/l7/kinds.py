"""The kinds of objects that a waypoint reads beyond the mesh's: (group, version, kind)."""

from __future__ import annotations

from meshbpf.agent.core.kube_names import SECURITY
from meshbpf.agent.l7 import rate_limit
from meshbpf.agent.l7.planner import ROUTE_KINDS
from meshbpf.agent.l7.references import GATEWAY_API
from meshbpf.agent.l7.telemetry import rules as telemetry
from meshbpf.agent.l7.wasm import plugin

KINDS = (
    *((GATEWAY_API, "v1", kind) for kind in ROUTE_KINDS),
    (GATEWAY_API, "v1", "ReferenceGrant"),
    (SECURITY, "v1", "RequestAuthentication"),
    *((plugin.GROUP, "v1alpha1", kind) for kind in plugin.KINDS),
    (telemetry.GROUP, "v1", telemetry.KIND),
    (rate_limit.GROUP, "v1alpha1", rate_limit.KIND),
)
"""As Gateway API v1.6 and Istio's CRDs serve them. One that a cluster lacks has no objects."""
