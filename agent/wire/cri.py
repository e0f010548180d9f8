"""What a container runtime says of a pod, read from CRI's messages.

Source: the Container Runtime Interface (runtime.v1). The network namespace is
not in the interface proper: containerd and CRI-O give it in the verbose
answer's `info["info"]`, JSON with the sandbox's pid and its OCI runtime spec.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from meshbpf.agent.core.address import AddressError, IPAddress, parse_ip
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.wire.pb import cri_pb2

# The labels that the kubelet puts on each sandbox (k8s.io/kubelet, pkg/types).
POD_NAME_LABEL = "io.kubernetes.pod.name"
POD_NAMESPACE_LABEL = "io.kubernetes.pod.namespace"


class CriError(MeshbpfError):
    """The runtime has no such pod, or not one that can be attached."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One pod sandbox that is READY."""

    id: str
    namespace: str
    name: str
    uid: str
    attempt: int
    netns: str
    """Path of the network namespace in the runtime's mount namespace; empty when it is not said."""
    pid: int
    """The sandbox's first process; 0 when the runtime does not say."""
    addresses: tuple[IPAddress, ...]


def list_request(namespace: str, name: str) -> cri_pb2.ListPodSandboxRequest:
    """Ask for the READY sandboxes of one pod.

    By state as well as by label: a dead sandbox of the same name (an earlier
    attempt) stays listed until the runtime removes it.
    """
    return cri_pb2.ListPodSandboxRequest(
        filter=cri_pb2.PodSandboxFilter(
            state=cri_pb2.PodSandboxStateValue(state=cri_pb2.SANDBOX_READY),
            label_selector={POD_NAMESPACE_LABEL: namespace, POD_NAME_LABEL: name},
        )
    )


def ready_request() -> cri_pb2.ListPodSandboxRequest:
    """Ask for every READY sandbox of the node."""
    return cri_pb2.ListPodSandboxRequest(
        filter=cri_pb2.PodSandboxFilter(
            state=cri_pb2.PodSandboxStateValue(state=cri_pb2.SANDBOX_READY)
        )
    )


def newest(items: Iterable[cri_pb2.PodSandbox]) -> cri_pb2.PodSandbox | None:
    """The sandbox that is the pod now: READY, the latest attempt; None when there is none."""
    ready = [item for item in items if item.state == cri_pb2.SANDBOX_READY]
    return max(ready, key=_age, default=None)


def current(answer: cri_pb2.ListPodSandboxResponse) -> dict[str, str]:
    """NS/NAME of each pod that has a READY sandbox, with the id of the newest."""
    found: dict[str, cri_pb2.PodSandbox] = {}
    for item in answer.items:
        namespace = item.labels.get(POD_NAMESPACE_LABEL)
        name = item.labels.get(POD_NAME_LABEL)
        if item.state != cri_pb2.SANDBOX_READY or not namespace or not name:
            continue
        key = f"{namespace}/{name}"
        other = found.get(key)
        if other is None or _age(item) > _age(other):
            found[key] = item
    return {key: item.id for key, item in found.items()}


def _age(item: cri_pb2.PodSandbox) -> tuple[int, int]:
    # A pod that was deleted and made anew starts again with attempt 0.
    return item.created_at, item.metadata.attempt


def sandbox(answer: cri_pb2.PodSandboxStatusResponse) -> Sandbox:
    """Read a verbose status.

    Raises CriError: `host-network` for a pod that shares the node's network
    namespace, `pod-not-ready` for one that died since it was listed,
    `bad-answer` for what makes no sense.
    """
    status = answer.status
    label = f"{status.metadata.namespace}/{status.metadata.name}"
    if status.linux.namespaces.options.network == cri_pb2.NODE:
        raise CriError(
            "host-network",
            f"pod {label} uses the node's own network namespace",
            "a host-network pod has no traffic of its own to capture: leave it out of the mesh",
        )
    if status.state != cri_pb2.SANDBOX_READY:
        raise CriError("pod-not-ready", f"pod {label} is not running any more")
    info = _info(answer, label)
    pid = info.get("pid", 0)
    texts = [status.network.ip, *(extra.ip for extra in status.network.additional_ips)]
    try:
        addresses = tuple(parse_ip(text) for text in texts if text)
    except AddressError as error:
        raise CriError("bad-answer", f"the runtime's answer on pod {label}: {error.what}") from None
    return Sandbox(
        id=status.id,
        namespace=status.metadata.namespace,
        name=status.metadata.name,
        uid=status.metadata.uid,
        attempt=status.metadata.attempt,
        netns=_netns(info),
        pid=pid if isinstance(pid, int) and pid > 0 else 0,
        addresses=addresses,
    )


def _info(answer: cri_pb2.PodSandboxStatusResponse, label: str) -> dict[str, Any]:
    text = answer.info.get("info", "")
    if not text:
        return {}
    try:
        info = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CriError(
            "bad-answer", f"the runtime's verbose answer on pod {label} is no JSON object: {error}"
        ) from error
    return info


def _netns(info: dict[str, Any]) -> str:
    """The path in the OCI runtime spec: linux.namespaces[type=network].path."""
    spec = info.get("runtimeSpec")
    linux = spec.get("linux") if isinstance(spec, dict) else None
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    for entry in namespaces if isinstance(namespaces, list) else ():
        if isinstance(entry, dict) and entry.get("type") == "network":
            path = entry.get("path", "")
            return path if isinstance(path, str) else ""
    return ""
