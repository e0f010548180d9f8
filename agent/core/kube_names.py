"""The labels and annotations that the mesh reads off Kubernetes objects.

As Istio's `api/label` and `api/annotation`, and Kubernetes' well-known labels
spell them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

DATAPLANE_MODE = "istio.io/dataplane-mode"
AMBIENT = "ambient"
NONE = "none"
REDIRECTION = "ambient.istio.io/redirection"
"""Annotation of a pod whose traffic the node agent has redirected."""
REDIRECTION_ENABLED = "enabled"
SIDECAR_STATUS = "sidecar.istio.io/status"
"""Annotation of a pod into which a sidecar was injected."""
TUNNEL = "networking.istio.io/tunnel"
"""Label of a pod that speaks HBONE itself: a list, `http` among it."""

GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
INBOUND_BINDING = "ambient.istio.io/waypoint-inbound-binding"

WORKLOAD_NAME = "service.istio.io/workload-name"
CANONICAL_NAMES = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
CANONICAL_REVISIONS = (
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
)
TRAFFIC_DISTRIBUTION = "networking.istio.io/traffic-distribution"
DRY_RUN = "istio.io/dry-run"

REGION = "topology.kubernetes.io/region"
ZONE = "topology.kubernetes.io/zone"
SUBZONE = "topology.istio.io/subzone"
SERVICE_NAME = "kubernetes.io/service-name"
"""Of an EndpointSlice: whose endpoints it holds."""

AUTO_REGISTRATION = "istio.io/autoRegistrationGroup"
"""Annotation of a WorkloadEntry that istiod made: the WorkloadGroup that it is one of."""
AUTO_ALLOCATE = "networking.istio.io/enable-autoallocate-ip"
"""Label of a ServiceEntry: `false` declines the addresses that istiod would give it."""

CORE = ""
DISCOVERY = "discovery.k8s.io"
NETWORKING = "networking.istio.io"
SECURITY = "security.istio.io"


def first_label(labels: Mapping[str, str], keys: Iterable[str], default: str) -> str:
    """The value of the first of `keys` that is there."""
    return next((labels[key] for key in keys if key in labels), default)
