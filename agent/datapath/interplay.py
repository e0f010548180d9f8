"""What else works on this node's packets, and how that goes together with us.

Facts for `meshbpf check`, read and never changed. Rules of netfilter are asked
of `nft` and `iptables-legacy-save` where these are installed: iptables of
today writes nftables too, and one answer shows both.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import bpfinfo
from meshbpf.agent.datapath.abi import AttachType
from meshbpf.agent.datapath.bpfsys import object_name
from meshbpf.agent.datapath.cgroups import cgroup_layout
from meshbpf.bpf import PROGRAMS

ASK_LIMIT_S = 5.0
MAX_PODS = 64
"""Network namespaces that are looked into: each costs a process or two."""

# The chains or tables that each mesh names after itself.
MESHES = {
    "ISTIO_": "Istio",
    "ISTIO-": "Istio",
    "istio-": "Istio",
    "PROXY_INIT_": "Linkerd",
    "KUMA_MESH_": "Kuma",
    "CONSUL_PROXY_": "Consul",
}
_RULES = (["nft", "list", "ruleset"], ["iptables-legacy-save"], ["ip6tables-legacy-save"])
_OURS = frozenset(object_name(spec.name).decode() for spec in PROGRAMS)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """One fact; a consequence makes it a warning."""

    name: str
    found: str
    consequence: str = ""
    remedy: str = ""


def look(pods: Sequence[tuple[str, str]]) -> tuple[Neighbour, ...]:
    """Of this node, and of the attached `pods` (NS/NAME and path of the netns). Blocking."""
    return (
        kube_proxy(),
        *connect_hooks(),
        *tc_programs(),
        *(found for name, netns in pods[:MAX_PODS] if (found := foreign_capture(name, netns))),
    )


def kube_proxy() -> Neighbour:
    """How service addresses are resolved here where we leave them alone."""
    name = "kube-proxy"
    # Not /sys/class/net: that is of the namespace in which /sys was mounted.
    if any(interface == "kube-ipvs0" for _, interface in socket.if_nameindex()):
        return Neighbour(
            name,
            "IPVS",
            "service addresses are the node's own: a host process that dials one goes round the "
            "mesh, and this mode has not been tested with meshbpf",
            "kube-proxy --proxy-mode=nftables",
        )
    rules = ruleset()
    if rules is None:
        return Neighbour(name, "not looked for: neither nft nor iptables-legacy-save is installed")
    if "table ip kube-proxy" in rules or "table ip6 kube-proxy" in rules:
        return Neighbour(name, "nftables")
    if "KUBE-SERVICES" in rules:
        return Neighbour(name, "iptables")
    return Neighbour(name, "no rules of it: captured pods resolve service addresses by the mesh")


def connect_hooks() -> tuple[Neighbour, ...]:
    """Programs of others that see connect() before, or after, ours."""
    root = cgroup_layout().point
    if root is None:
        return (Neighbour("connect hooks of others", "none: there is no cgroup v2"),)
    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            names = _names(bpfinfo.prog_query(fd, AttachType.CGROUP_INET4_CONNECT))
        finally:
            os.close(fd)
    except (OSError, MeshbpfError) as error:
        return (Neighbour("connect hooks of others", f"cannot be read: {error}"),)
    others = [name for name in names if name not in _OURS]
    if any(name.startswith("cil_sock") for name in others):
        return (
            Neighbour(
                "Cilium's socket load balancing",
                ", ".join(others),
                "it puts a pod's address in a service's place before meshbpf sees the connection: "
                "waypoints of services are gone round, and telemetry does not name the service",
                "socketLB.hostNamespaceOnly: true in Cilium's values",
            ),
        )
    if others:
        return (
            Neighbour(
                "connect hooks of others",
                ", ".join(names),
                "each may rewrite a destination that the next one reads, in this order",
                "see that none of them rewrites addresses of the mesh",
            ),
        )
    return (Neighbour("connect hooks of others", "none"),)


def tc_programs() -> tuple[Neighbour, ...]:
    """Where programs of others stand beside ours on an interface, and in which order."""
    found: list[Neighbour] = []
    for ifindex, interface in socket.if_nameindex():
        try:
            for kind in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS):
                names = _names(bpfinfo.prog_query(ifindex, kind))
                ours = [name for name in names if name in _OURS]
                if ours and len(ours) < len(names):
                    found.append(_beside(interface, kind, names))
        except (OSError, MeshbpfError):
            continue  # gone meanwhile, or a kernel without tcx, which another check tells
    return tuple(found) or (Neighbour("tcx programs of others", "none beside ours"),)


def _beside(interface: str, kind: AttachType, names: Sequence[str]) -> Neighbour:
    direction = "ingress" if kind is AttachType.TCX_INGRESS else "egress"
    return Neighbour(
        f"tcx programs at {interface} {direction}",
        ", ".join(names),
        "they run in this order: one that ends with a verdict of its own keeps packets from those "
        "behind it, and sources of this pod may go unchecked",
        "let the other one return TCX_NEXT, or attach meshbpf first: restart the agent",
    )


def foreign_capture(pod: str, netns: str) -> Neighbour | None:
    """Another mesh's redirection inside a pod that we steer; None when there is none."""
    rules = ruleset(netns)
    meshes = sorted({mesh for mark, mesh in MESHES.items() if rules and mark in rules})
    if not meshes:
        return None
    return Neighbour(
        f"capture in pod {pod}",
        f"rules of {' and '.join(meshes)}",
        "both redirect its connections: they pass two proxies, or fail where each takes the "
        "other's for the pod's own",
        "take the pod out of one mesh: remove its injection, or `meshbpf detach` it",
    )


def ruleset(netns: str = "") -> str | None:
    """Netfilter's rules, here or inside a namespace; None where nothing can be asked."""
    asked = [_ask(netns, argv) for argv in _RULES if shutil.which(argv[0])]
    return "\n".join(asked) if asked else None


def _ask(netns: str, argv: list[str]) -> str:
    enter = ["nsenter", f"--net={netns}", "--"] if netns else []
    try:
        done = subprocess.run(
            [*enter, *argv], capture_output=True, text=True, timeout=ASK_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _names(numbers: Iterable[int]) -> list[str]:
    names = []
    for number in numbers:
        try:
            fd = bpfinfo.prog_by_id(number)
        except MeshbpfError:
            continue  # detached between the two calls
        try:
            names.append(bpfinfo.prog_info(fd).name)
        finally:
            os.close(fd)
    return names
