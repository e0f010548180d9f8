"""What a pod's netns looks like from here: its interfaces, addresses, and their host ends."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import rtnetlink
from meshbpf.agent.datapath.codecs import IPAddress
from meshbpf.agent.datapath.netlink import Netlink
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.rtnetlink import ARPHRD_ETHER, ARPHRD_LOOPBACK, Interface


@dataclass(frozen=True, slots=True)
class HostEnd:
    """The other end of a pod's interface, in our own netns."""

    ifindex: int
    name: str


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod's netns at one moment.

    `addresses` are the global ones, `own_addresses` all but loopback's;
    `captured` are the interfaces that get our programs, with their host ends
    where those are in reach; `host_skipped` says why others are not.
    """

    addresses: tuple[IPAddress, ...]
    own_addresses: tuple[IPAddress, ...]
    captured: tuple[tuple[Interface, HostEnd | None], ...]
    exempt_ifindexes: tuple[int, ...]
    host_skipped: tuple[str, ...]


def look(netns: Netns, exempt_interfaces: AbstractSet[str]) -> PodView:
    """Inspect. MeshbpfError when the pod could not be captured as it is."""
    with rtnetlink.route(netns) as nl:
        found = rtnetlink.interfaces(nl)
        addresses = rtnetlink.addresses(nl)
    others = [one for one in found if one.hardware != ARPHRD_LOOPBACK]
    wanted = [one for one in others if one.name not in exempt_interfaces]
    for one in wanted:
        # Devices that are down and not Ethernet are the kernel's fallback
        # tunnels (tunl0, sit0), which every netns has.
        if one.hardware != ARPHRD_ETHER and one.up:
            raise MeshbpfError(
                "interface-kind",
                f"{netns.path}: interface {one.name} is not an Ethernet device",
                f"its traffic cannot be captured; leave it out with --exempt-interface {one.name}",
            )
    wanted = [one for one in wanted if one.hardware == ARPHRD_ETHER]
    own = [one for one in addresses if not one.ip.is_loopback]
    reachable = {one.ifindex for one in wanted}
    if not any(one.is_global and one.ifindex in reachable for one in own):
        raise MeshbpfError(
            "no-address",
            f"{netns.path}: no interface with an address of its own",
            "attach a pod once its network is set up",
        )
    ends, skipped = _host_ends(netns, wanted)
    return PodView(
        addresses=tuple(one.ip for one in own if one.is_global),
        own_addresses=tuple(one.ip for one in own),
        captured=tuple((one, ends.get(one.ifindex)) for one in wanted),
        exempt_ifindexes=tuple(one.ifindex for one in others if one.name in exempt_interfaces),
        host_skipped=tuple(skipped),
    )


def _host_ends(netns: Netns, wanted: list[Interface]) -> tuple[dict[int, HostEnd], list[str]]:
    ends: dict[int, HostEnd] = {}
    skipped: list[str] = []
    with rtnetlink.route(None) as host:
        nsid = rtnetlink.nsid_of(host, netns)
        for one in wanted:
            end = _host_end(host, nsid, one)
            if isinstance(end, str):
                skipped.append(f"{one.name}: {end}")
            else:
                ends[one.ifindex] = end
    return ends, skipped


def _host_end(host: Netlink, nsid: int | None, one: Interface) -> HostEnd | str:
    """The host end, or why there is none: then sources go unchecked and probes unmarked."""
    if one.kind != "veth" or one.peer_ifindex is None:
        return f"not a veth but {one.kind or 'a physical device'}, which has no end on the host"
    peer = rtnetlink.interface(host, one.peer_ifindex)
    # The index alone may be that of any device here: the peer's must point back.
    if peer is None or peer.kind != "veth" or peer.peer_ifindex != one.ifindex:
        return "its other end is not in the agent's netns"
    if nsid is None or peer.peer_nsid != nsid:
        return "its other end is not in the agent's netns"
    return HostEnd(peer.ifindex, peer.name)
