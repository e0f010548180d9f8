"""What a pod of the testbed is: its addresses, and its entries in the mesh file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from tests.progs import server

TRUST_DOMAIN = "cluster.local"
NAMESPACE = "apps"

LOAD = 7100
"""Where the benchmark's server listens (tests/bench/load.py)."""

Family = Literal[4, 6]


def node_address(node: int, family: Family) -> str:
    return f"198.18.0.{node}" if family == 4 else f"fd00:6d62::{node}"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod and its addresses, which are made of its node's number and its own."""

    name: str
    netns: str
    node: int
    index: int
    service_account: str
    captured: bool
    namespace: str = NAMESPACE

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def ipv4(self) -> str:
        return f"198.18.{self.node}.{self.index}"

    @property
    def ipv6(self) -> str:
        return f"fd00:6d62:{self.node}::{self.index:x}"

    @property
    def hostname(self) -> str:
        return f"{self.name}.{self.namespace}.svc.cluster.local"

    @property
    def identity(self) -> str:
        return f"spiffe://{TRUST_DOMAIN}/ns/{self.namespace}/sa/{self.service_account}"

    @property
    def veth(self) -> str:
        """The pod's interface as its node sees it."""
        return f"v{self.name}"

    def address(self, family: Family) -> str:
        return self.ipv4 if family == 4 else self.ipv6

    def vip(self, family: Family) -> str:
        """The address of the service whose only endpoint is this pod."""
        if family == 4:
            return f"198.19.{self.node}.{self.index}"
        return f"fd00:6d62:f0{self.node}::{self.index:x}"


def workload(pod: Pod) -> dict[str, Any]:
    """The pod in the format of ztunnel's LOCAL_XDS."""
    return {
        "uid": f"Kubernetes//Pod/{pod.key}",
        "name": pod.name,
        "namespace": NAMESPACE,
        "serviceAccount": pod.service_account,
        "workloadName": pod.name,
        "workloadType": "pod",
        "canonicalName": pod.name,
        "workloadIps": [pod.ipv4, pod.ipv6],
        "protocol": "HBONE" if pod.captured else "TCP",
        "node": f"node{pod.node}",
        "network": "",
        "services": {f"{NAMESPACE}/{pod.hostname}": _ports()},
    }


def mesh_of(pods: Iterable[Pod]) -> dict[str, Any]:
    """Pods and their services in the format of ztunnel's LOCAL_XDS."""
    pods = tuple(pods)
    return {
        "workloads": [workload(pod) for pod in pods],
        "services": [service(pod) for pod in pods],
    }


def service(pod: Pod) -> dict[str, Any]:
    """The service whose only endpoint is this pod."""
    return {
        "name": pod.name,
        "namespace": NAMESPACE,
        "hostname": pod.hostname,
        "vips": [f"/{pod.vip(4)}", f"/{pod.vip(6)}"],
        "ports": _ports(),
    }


def _ports() -> dict[int, int]:
    """Service ports: 80 is the echo server, the others are what they are in the pod."""
    return {80: server.ECHO, LOAD: LOAD} | {port: port for port, _ in server.SERVICES.values()}
