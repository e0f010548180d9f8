"""What a Gateway of our class is made of in a cluster: account, Service, Deployment.

As Istio's controller makes its waypoints (manifests/charts/istio-control/
istio-discovery/files/waypoint.yaml), so that tools which look for the labels
find ours too. Each object is owned by the Gateway: the cluster's garbage
collector removes it with it. No replica count is given, so that an autoscaler
may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from meshbpf.agent.core.bindings import GATEWAY_API, NONE, USE_WAYPOINT
from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.kube_names import DATAPLANE_MODE, GATEWAY_NAME
from meshbpf.agent.core.objects import KubeObject
from meshbpf.agent.core.workload import HBONE_PORT

CLASS = "meshbpf-waypoint"
CONTROLLER = "meshbpf.io/waypoint-controller"
GATEWAY_CLASS_NAME = "gateway.networking.k8s.io/gateway-class-name"
"""Label of all that belongs to a class of gateways."""

STATS_PORT, READINESS_PORT = 15020, 15021
_USER = 1337
"""As Istio's proxies."""
_TOKENS, _ROOTS, _STATE = "/var/run/secrets/tokens", "/var/run/secrets/istio", "/run/meshbpf"

_NOT_INHERITED = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(frozen=True, slots=True)
class Template:
    """What all waypoints of one controller have in common."""

    image: str
    ca: str
    """For `meshbpf waypoint --ca`."""
    ca_name: str = ""
    roots_config_map: str = "istio-ca-root-cert"
    """In each namespace, with root-cert.pem: what the CA is checked by."""
    cluster_id: str = "Kubernetes"
    trust_domain: str = "cluster.local"
    cluster_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    network: str = ""
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()
    resources: Mapping[str, Any] = field(default_factory=dict)
    log_level: str = "info"

    @property
    def cluster(self) -> Cluster:
        """What the translation of its objects must know."""
        return Cluster(
            network=self.network,
            trust_domain=self.trust_domain,
            domain=self.cluster_domain,
            root_namespace=self.root_namespace,
        )


def gateway_class() -> dict[str, Any]:
    """The class itself."""
    return {
        "apiVersion": f"{GATEWAY_API}/v1",
        "kind": "GatewayClass",
        "metadata": {"name": CLASS},
        "spec": {
            "controllerName": CONTROLLER,
            "description": "Waypoints of meshbpf: the L7 half of an ambient mesh",
        },
    }


def is_ours(gateway: KubeObject) -> bool:
    """Whether a Gateway asks for one of our waypoints."""
    return bool(gateway.spec.get("gatewayClassName") == CLASS)


def objects_of(gateway: KubeObject, template: Template) -> tuple[dict[str, Any], ...]:
    """All objects of one Gateway, in the order in which they are applied."""
    return (
        _object(gateway, "v1", "ServiceAccount"),
        _object(gateway, "v1", "Service", {USE_WAYPOINT: NONE}) | {"spec": _service(gateway)},
        _object(gateway, "apps/v1", "Deployment") | {"spec": _deployment(gateway, template)},
    )


def _object(
    gateway: KubeObject, version: str, kind: str, labels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": gateway.name,
        "namespace": gateway.namespace,
        "labels": _labels(gateway) | dict(labels or {}),
        "ownerReferences": [
            {
                "apiVersion": f"{GATEWAY_API}/v1",
                "kind": "Gateway",
                "name": gateway.name,
                "uid": str(gateway.metadata.get("uid") or ""),
            }
        ],
    }
    if annotations := _annotations(gateway):
        metadata["annotations"] = annotations
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def _infrastructure(gateway: KubeObject, name: str) -> dict[str, str]:
    given = (gateway.spec.get("infrastructure") or {}).get(name) or {}
    return {str(key): str(value) for key, value in given.items()}


def _labels(gateway: KubeObject) -> dict[str, str]:
    return _infrastructure(gateway, "labels") | {
        GATEWAY_NAME: gateway.name,
        GATEWAY_CLASS_NAME: CLASS,
    }


def _annotations(gateway: KubeObject) -> dict[str, str]:
    found = _infrastructure(gateway, "annotations")
    found.pop(_NOT_INHERITED, None)
    return found


def _service(gateway: KubeObject) -> dict[str, Any]:
    return {
        "type": "ClusterIP",
        "ipFamilyPolicy": "PreferDualStack",
        "selector": {GATEWAY_NAME: gateway.name},
        "ports": [
            {"name": "status-port", "port": READINESS_PORT, "protocol": "TCP"},
            {"name": "mesh", "port": HBONE_PORT, "protocol": "TCP", "appProtocol": "hbone"},
        ],
    }


def _deployment(gateway: KubeObject, template: Template) -> dict[str, Any]:
    labels = {
        "sidecar.istio.io/inject": "false",
        "service.istio.io/canonical-name": gateway.name,
        "service.istio.io/canonical-revision": "latest",
    } | _labels(gateway)
    # After what the Gateway may say: a waypoint that is captured itself would be a loop.
    labels[DATAPLANE_MODE] = NONE
    annotations = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(STATS_PORT),
        "prometheus.io/path": "/metrics",
    } | _annotations(gateway)
    pod: dict[str, Any] = {
        "serviceAccountName": gateway.name,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(gateway, template)],
        "volumes": _volumes(template),
    }
    if template.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in template.pull_secrets]
    return {
        "selector": {"matchLabels": {GATEWAY_NAME: gateway.name}},
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod},
    }


def _container(gateway: KubeObject, template: Template) -> dict[str, Any]:
    options = {
        "name": f"{gateway.namespace}/{gateway.name}",
        "address": "$(POD_IP)",
        "ca": template.ca,
        "ca-name": template.ca_name,
        "ca-root": f"{_ROOTS}/root-cert.pem",
        "token-file": f"{_TOKENS}/istio-token",
        "cluster-id": template.cluster_id,
        "trust-domain": template.trust_domain,
        "cluster-domain": template.cluster_domain,
        "root-namespace": template.root_namespace,
        "network": template.network,
        "state-dir": _STATE,
        "log-level": template.log_level,
        "log-format": "json",
    }
    given = [f"--{option}={value}" for option, value in options.items() if value]
    container: dict[str, Any] = {
        "name": "waypoint",
        "image": template.image,
        "imagePullPolicy": template.pull_policy,
        "args": ["waypoint", "--kubernetes", *given],
        "env": [{"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
        "ports": [
            {"name": "mesh", "containerPort": HBONE_PORT},
            {"name": "metrics", "containerPort": STATS_PORT},
            {"name": "status-port", "containerPort": READINESS_PORT},
        ],
        "startupProbe": _probe(period_s=1, failures=60),
        "readinessProbe": _probe(period_s=5, failures=3),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "istio-token", "mountPath": _TOKENS, "readOnly": True},
            {"name": "roots", "mountPath": _ROOTS, "readOnly": True},
            {"name": "state", "mountPath": _STATE},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 (the pod's own)
        ],
    }
    if template.resources:
        container["resources"] = dict(template.resources)
    return container


def _probe(*, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": "/healthz/ready", "port": READINESS_PORT},
        "periodSeconds": period_s,
        "failureThreshold": failures,
    }


def _volumes(template: Template) -> list[dict[str, Any]]:
    token = {"audience": "istio-ca", "expirationSeconds": 43_200, "path": "istio-token"}
    return [
        {"name": "istio-token", "projected": {"sources": [{"serviceAccountToken": token}]}},
        {"name": "roots", "configMap": {"name": template.roots_config_map}},
        {"name": "state", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
        {"name": "tmp", "emptyDir": {"sizeLimit": "64Mi"}},
    ]
