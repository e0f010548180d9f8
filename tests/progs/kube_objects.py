"""The testbed's mesh as the Kubernetes objects that a cluster would hold for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.progs import server
from tests.progs.pod import LOAD, NAMESPACE, Pod

AMBIENT = {"istio.io/dataplane-mode": "ambient"}


def mesh_objects(pods: Iterable[Pod]) -> list[dict[str, Any]]:
    """Nodes, the namespace, service accounts, and a Pod and a Service for each pod."""
    pods = list(pods)
    found = [
        _object("v1", "Namespace", NAMESPACE, labels=AMBIENT, namespace=None),
        *(
            _object("v1", "Node", f"node{node}", namespace=None)
            for node in sorted({pod.node for pod in pods})
        ),
        *(
            _object("v1", "ServiceAccount", account)
            for account in sorted({pod.service_account for pod in pods})
        ),
    ]
    for pod in pods:
        found += [pod_object(pod), service_object(pod)]
    return found


def pod_object(pod: Pod) -> dict[str, Any]:
    labels = {"app": pod.name}
    if not pod.captured:
        labels["istio.io/dataplane-mode"] = "none"
    spec = {
        "nodeName": f"node{pod.node}",
        "serviceAccountName": pod.service_account,
        "containers": [
            {
                "name": "server",
                "image": "registry.example/server:1",
                "ports": [{"name": "echo", "containerPort": server.ECHO}],
            }
        ],
    }
    status = {
        "phase": "Running",
        "podIP": pod.ipv4,
        "podIPs": [{"ip": pod.ipv4}, {"ip": pod.ipv6}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    return _object("v1", "Pod", pod.name, labels=labels) | {"spec": spec, "status": status}


def service_object(pod: Pod) -> dict[str, Any]:
    """Port 80 leads to the pod's port of the name `echo`, the others to themselves."""
    ports: list[dict[str, Any]] = [{"name": "http", "port": 80, "targetPort": "echo"}]
    ports += [{"name": "load", "port": LOAD}]
    ports += [{"name": name, "port": port} for name, (port, _) in server.SERVICES.items()]
    spec = {
        "selector": {"app": pod.name},
        "clusterIP": pod.vip(4),
        "clusterIPs": [pod.vip(4), pod.vip(6)],
        "ports": ports,
    }
    return _object("v1", "Service", pod.name) | {"spec": spec}


def _object(
    version: str,
    kind: str,
    name: str,
    *,
    labels: dict[str, str] | None = None,
    namespace: str | None = NAMESPACE,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if namespace is not None:
        metadata["namespace"] = namespace
    if labels:
        metadata["labels"] = labels
    return {"apiVersion": version, "kind": kind, "metadata": metadata}
