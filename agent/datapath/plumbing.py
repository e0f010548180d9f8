"""Policy routes and sysctls inside a pod's netns: what makes a marked packet local.

Some facts about a marked packet. The rule sends everything with the steering
mark to a table whose one route says that every address is local, on lo; so
the packet is delivered in the pod, sk_lookup picks the listener, and both of
its addresses stay as they were. The route's source is the pod's, since a
socket that is marked before it has a source would otherwise take the
destination for it. What an accepted socket or an RST answers must take the
same way back, hence the first three of these:

tcp_fwmark_accept     accepted sockets inherit the SYN's mark
fwmark_reflect        so do RSTs, IPv4 and IPv6: a refused port of the app
                      reaches the agent, which dialed with a foreign source
conf.lo.accept_local  IPv4 takes a packet from lo whose source is the pod's
                      own address (TC sent it back up); IPv6 always does
conf.lo.rp_filter     and does not ask for its way back, where the pod's
                      strict check would find eth0
tcp_early_demux       off: of a connection that the pod forwards (a container
                      in it), the agent's socket would be found on the way in,
                      and the kernel drops a packet that it forwards while a
                      socket claims it; TC could not bring it back. Costs a
                      route lookup per packet received on the pod's interface.
                      IPv6 follows the same switch.

Values that were there before come back at the end, unless someone else has
changed them since.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import rtnetlink
from meshbpf.agent.datapath.netns import Netns
from meshbpf.bpf import STEER_MARK, STEER_MASK

TABLE: Final = 100
PREFERENCE: Final = 32764
LOOPBACK_IFINDEX: Final = 1

_SYS_NET: Final = Path("/proc/sys/net")
_STRICT: Final = "1"
_LOOSE: Final = "2"


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A setting of the pod's netns: its path under /proc/sys/net, before and since."""

    name: str
    before: str
    since: str


def rule(family: int) -> rtnetlink.Rule:
    """The policy rule of one family."""
    return rtnetlink.Rule(family, PREFERENCE, STEER_MARK, STEER_MASK, TABLE)


def _read(name: str) -> str | None:
    try:
        return (_SYS_NET / name).read_text().strip()
    except FileNotFoundError:
        return None


def _write(name: str, value: str) -> None:
    try:
        (_SYS_NET / name).write_text(value)
    except OSError as error:
        raise MeshbpfError(
            "sysctl",
            f"cannot set net/{name} to {value} in the pod: {error.strerror}",
            "is /proc/sys mounted read-only where the agent runs?",
        ) from None


def families(netns: Netns) -> tuple[int, ...]:
    """The address families that the pod's netns speaks. IPv6 may be absent or switched off."""
    with netns.entered():
        switches = [_read(f"ipv6/conf/{device}/disable_ipv6") for device in ("all", "lo")]
    if switches == ["0", "0"]:
        return (socket.AF_INET, socket.AF_INET6)
    return (socket.AF_INET,)


def plan_sysctls(netns: Netns) -> tuple[Sysctl, ...]:
    """What has to change, with the values found. Changes nothing."""
    wanted = {
        "ipv4/tcp_fwmark_accept": "1",
        "ipv4/fwmark_reflect": "1",
        "ipv6/fwmark_reflect": "1",
        "ipv4/conf/lo/accept_local": "1",
        "ipv4/tcp_early_demux": "0",
    }
    with netns.entered():
        # The kernel takes the stricter of `all` and the device, and calls 2
        # the stricter: so lo can be loosened, but not switched off.
        if _STRICT in (_read("ipv4/conf/all/rp_filter"), _read("ipv4/conf/lo/rp_filter")):
            wanted["ipv4/conf/lo/rp_filter"] = _LOOSE
        found = {name: _read(name) for name in wanted}
    return tuple(
        Sysctl(name, before, wanted[name])
        for name, before in found.items()
        if before is not None and before != wanted[name]
    )


def refuse_foreign(netns: Netns) -> None:
    """MeshbpfError when another mesh steers in this netns with the same mark.

    A rule of our own protocol number is a leftover of ours and no hindrance.
    """
    with rtnetlink.route(netns) as nl:
        found = [one for family in families(netns) for one in rtnetlink.rules(nl, family)]
    for one in found:
        if one.mark == STEER_MARK and one.protocol != rtnetlink.PROTOCOL:
            raise MeshbpfError(
                "steered-by-another",
                f"{netns.path} already has a policy rule for mark {STEER_MARK:#x}",
                "Istio's CNI or another mesh captures this pod: take the pod out of it first",
            )


def install(
    netns: Netns,
    sysctls: Sequence[Sysctl],
    sources: Mapping[int, IPv4Address | IPv6Address | None],
) -> None:
    """Set sysctls, rules and routes; `sources` has one entry a family that is wanted.

    Repeatable: what is there already stays. A failure leaves what was done so
    far, which `remove` undoes.
    """
    with netns.entered():
        for one in sysctls:
            _write(one.name, one.since)
    with rtnetlink.route(netns) as nl:
        for family, source in sources.items():
            rtnetlink.add_local_default(nl, family, TABLE, LOOPBACK_IFINDEX, source)
            if rule(family) not in rtnetlink.rules(nl, family):
                rtnetlink.add_rule(nl, rule(family))


def remove(netns: Netns, sysctls: Sequence[Sysctl]) -> None:
    """Undo `install`, or as much of it as was done."""
    with rtnetlink.route(netns) as nl:
        for family in (socket.AF_INET, socket.AF_INET6):
            rtnetlink.delete_rule(nl, rule(family))
            rtnetlink.delete_local_default(nl, family, TABLE, LOOPBACK_IFINDEX)
    with netns.entered():
        for one in sysctls:
            if _read(one.name) == one.since:
                _write(one.name, one.before)
