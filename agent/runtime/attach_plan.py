"""What an attach request means: whose pod it is, and with which options.

Pure but for one stat() of a netns path. The account decides which
certificate the pod gets, so it is never guessed: it comes from the mesh
state or from the caller, and where both speak they must agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from meshbpf.agent.api import AttachRequest
from meshbpf.agent.config import PodName, Settings, is_object_name, parse_cidrs, parse_ports
from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import Workload
from meshbpf.agent.runtime.attachments import Attachment

NETNS_DIR = Path("/run/netns")
"""Where `ip netns` and CNI runtimes pin network namespaces."""


class AttachError(MeshbpfError):
    """The request cannot be carried out as it stands."""


@dataclass(frozen=True, slots=True)
class NetnsPath:
    """A network namespace that was found: its path and which one it is."""

    path: Path
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class Located:
    """A pod's namespace; the rest is known only of a pod that the runtime was asked for."""

    netns: NetnsPath
    sandbox: str = ""
    """The runtime's id of the pod's sandbox."""
    uid: str = ""
    """The pod's uid in Kubernetes."""
    cgroup: str = ""
    """Its cgroup v2 path, below the mount."""
    addresses: frozenset[IPAddress] = frozenset()

    @property
    def by_name(self) -> bool:
        """Whether the runtime found it by its name."""
        return self.sandbox != ""


def plan(
    request: AttachRequest, where: Located, settings: Settings, mesh: Snapshot, now: datetime
) -> Attachment:
    """The attachment that `request` asks for; AttachError or ConfigError say why not."""
    name = PodName.parse(request.pod)
    _refuse_native(name, settings, mesh)
    exempt = settings.exempt
    ports = exempt.ports
    if request.exempt_ports is not None:
        ports = parse_ports(map(str, request.exempt_ports))
    cidrs = exempt.cidrs
    if request.exempt_cidrs is not None:
        cidrs = parse_cidrs(request.exempt_cidrs)
    interfaces = exempt.interfaces
    if request.exempt_interfaces is not None:
        interfaces = frozenset(request.exempt_interfaces)
    return Attachment(
        pod=str(name),
        netns=str(where.netns.path),
        netns_device=where.netns.device,
        netns_inode=where.netns.inode,
        service_account=service_account(name, request.service_account, where, settings, mesh),
        on_agent_down=request.on_agent_down or settings.on_agent_down,
        same_node=request.same_node or settings.same_node,
        exempt_ports=tuple(sorted(ports)),
        exempt_cidrs=tuple(map(str, cidrs)),
        exempt_interfaces=tuple(sorted(interfaces)),
        dns=settings.dns if request.dns is None else request.dns,
        attached_at=now,
        by_name=where.by_name,
        account_given=request.service_account is not None,
        sandbox=where.sandbox,
        uid=where.uid,
        cgroup=where.cgroup,
    )


def next_life(
    last: Attachment, where: Located, settings: Settings, mesh: Snapshot, now: datetime
) -> Attachment:
    """The attachment of a pod that was recreated under the name of `last`; AttachError if not."""
    _refuse_native(last.name, settings, mesh)
    asked = last.service_account if last.account_given else None
    return msgspec.structs.replace(
        last,
        netns=str(where.netns.path),
        netns_device=where.netns.device,
        netns_inode=where.netns.inode,
        service_account=service_account(last.name, asked, where, settings, mesh),
        attached_at=now,
        sandbox=where.sandbox,
        uid=where.uid,
        cgroup=where.cgroup,
    )


def awaits_mesh(request: AttachRequest, where: Located, settings: Settings, mesh: Snapshot) -> bool:
    """Whether only the mesh state can name the account of a pod, and does not yet."""
    if request.service_account is not None or not where.by_name:
        return False
    return not _of_addresses(PodName.parse(request.pod), where, settings, mesh)


def find_netns(text: str) -> NetnsPath:
    """A NAME under /run/netns or an absolute path; never the agent's own namespace."""
    path = Path(text) if "/" in text else NETNS_DIR / text
    if not text or not path.is_absolute():
        raise AttachError(
            "bad-netns",
            f"{text!r} does not name a network namespace",
            "give a name under /run/netns, or an absolute path such as /proc/PID/ns/net",
        )
    try:
        found = os.stat(path)
    except OSError as error:
        raise AttachError(
            "no-netns",
            f"network namespace {path}: {error.strerror}",
            "`ip netns list` and `lsns -t net` show what there is",
        ) from error
    own = os.stat("/proc/self/ns/net")
    if found.st_dev != own.st_dev:
        raise AttachError(
            "not-a-netns",
            f"{path} is not a network namespace",
            "give a name under /run/netns, or an absolute path such as /proc/PID/ns/net",
        )
    if found.st_ino == own.st_ino:
        raise AttachError(
            "own-netns",
            f"{path} is the agent's own network namespace",
            "a pod with a namespace of its own can be attached; one of the host network cannot",
        )
    return NetnsPath(path, found.st_dev, found.st_ino)


def service_account(
    name: PodName, asked: str | None, where: Located, settings: Settings, mesh: Snapshot
) -> str:
    """The pod's account: the mesh state's, or the caller's where the state is silent.

    Of a pod that the runtime found, the mesh state speaks only where it has
    its addresses too: a workload of that name elsewhere is another pod.
    """
    if asked is not None and not is_object_name(asked):
        raise AttachError("bad-service-account", f"{asked!r} is not a service account's name")
    known = candidates(name, settings, mesh)
    if where.by_name:
        matching = _of_addresses(name, where, settings, mesh)
        if known and not matching and asked is None:
            raise AttachError(
                "other-addresses",
                f"the mesh state has {name} with {_listed(a for w in known for a in w.addresses)}, "
                f"and the pod here has {_listed(where.addresses)}: they are not the same pod, so "
                "its service account is not known",
                "correct the mesh state, or say the account with --service-account",
            )
        known = matching or known
    accounts = sorted({workload.service_account for workload in known})
    if asked is None:
        if len(accounts) == 1:
            return accounts[0]
        if accounts:
            raise AttachError(
                "ambiguous-pod",
                f"the mesh state has {name} under the accounts {', '.join(accounts)}",
                "say which one with --service-account",
            )
        raise AttachError(
            "unknown-pod",
            f"the mesh state does not know pod {name}, so its service account is not known",
            "`meshbpf workloads` shows what it knows; "
            "for a pod that it will learn of later give --service-account",
        )
    if accounts and asked not in accounts:
        raise AttachError(
            "account-contradicted",
            f"--service-account {asked}, but the mesh state has {name} under {', '.join(accounts)}",
            "leave the option out, or correct the mesh state",
        )
    return asked


def _of_addresses(
    name: PodName, where: Located, settings: Settings, mesh: Snapshot
) -> tuple[Workload, ...]:
    return tuple(
        workload
        for workload in mesh.workload_named(name.namespace, name.name)
        if workload.network == settings.network
        and workload.addresses
        and where.addresses.issuperset(workload.addresses)
    )


def _listed(addresses: Iterable[IPAddress]) -> str:
    return ", ".join(sorted(map(str, addresses))) or "no address"


def _refuse_native(name: PodName, settings: Settings, mesh: Snapshot) -> None:
    """Two proxies in one pod would both want port 15008, and tunnel each other's tunnels."""
    if any(workload.native_tunnel for workload in candidates(name, settings, mesh)):
        raise AttachError(
            "native-tunnel",
            f"pod {name} has a sidecar that speaks HBONE itself (nativeTunnel)",
            "it is in the mesh as it is; remove the sidecar to have the node agent carry it",
        )


def candidates(name: PodName, settings: Settings, mesh: Snapshot) -> tuple[Workload, ...]:
    """The workloads of that name; where several share it, those of this node and network."""
    found = mesh.workload_named(name.namespace, name.name)
    for narrower in (
        tuple(w for w in found if w.network == settings.network),
        tuple(w for w in found if w.network == settings.network and w.node == settings.node),
    ):
        if narrower:
            found = narrower
    return found


def identity(attachment: Attachment, settings: Settings, mesh: Snapshot) -> SpiffeId:
    """Whom the pod is: in the mesh state's trust domain, or in ours while the state is silent."""
    name = attachment.name
    domains = {
        workload.trust_domain
        for workload in candidates(name, settings, mesh)
        if workload.service_account == attachment.service_account
    }
    domain = domains.pop() if len(domains) == 1 else settings.trust_domain
    return SpiffeId(domain, name.namespace, attachment.service_account)
