"""Routing netlink: interfaces, addresses, rules, routes, and clsact filters.

Rules and routes that we add carry our own protocol number, so that they can
be told from those of others: Istio's in-pod redirection uses the same mark,
preference and table.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from meshbpf.agent.datapath.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    nested,
    text,
    u32,
)
from meshbpf.agent.datapath.netns import Netns

# The names below are the kernel's, from include/uapi/linux/{rtnetlink,if_link,
# if_addr,fib_rules,pkt_cls,pkt_sched}.h.
RTM_GETLINK: Final = 18
RTM_GETADDR: Final = 22
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_NEWRULE: Final = 32
RTM_DELRULE: Final = 33
RTM_GETRULE: Final = 34
RTM_NEWQDISC: Final = 36
RTM_DELQDISC: Final = 37
RTM_GETQDISC: Final = 38
RTM_NEWTFILTER: Final = 44
RTM_DELTFILTER: Final = 45
RTM_GETTFILTER: Final = 46
RTM_GETNSID: Final = 90

ARPHRD_ETHER: Final = 1
ARPHRD_LOOPBACK: Final = 772
IFF_UP: Final = 1

PROTOCOL: Final = 109
"""rtm_protocol and FRA_PROTOCOL of what meshbpf adds; free in iproute2's tables."""

_TC_H_CLSACT: Final = 0xFFFFFFF1
_TC_H_INGRESS: Final = 0xFFFFFFF2
_TC_H_EGRESS: Final = 0xFFFFFFF3
_CLSACT_HANDLE: Final = 0xFFFF0000
_ETH_P_ALL_NETWORK_ORDER: Final = socket.htons(3)
_TCA_BPF_FLAG_ACT_DIRECT: Final = 1
_FILTER_HANDLE: Final = 0x6D62  # others at the same priority number theirs from 1

GONE: Final = frozenset({errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL})
"""What deleting something that is not there answers, by kind of object."""


@dataclass(frozen=True, slots=True)
class Interface:
    """A network device. `peer_ifindex` and `peer_nsid` are set for a veth."""

    name: str
    ifindex: int
    hardware: int
    up: bool
    kind: str
    peer_ifindex: int | None
    peer_nsid: int | None


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """An address and the device that has it. `is_global`: not host or link scope."""

    ifindex: int
    ip: IPv4Address | IPv6Address
    is_global: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy rule that picks a table by firewall mark."""

    family: int
    preference: int
    mark: int
    mask: int
    table: int
    protocol: int = PROTOCOL

    def body(self) -> bytes:
        """The rule as a message."""
        header = struct.pack("BBBBBBBBI", self.family, 0, 0, 0, 0, 0, 0, 1, 0)
        return header + b"".join(
            (
                u32(6, self.preference),
                u32(10, self.mark),
                u32(16, self.mask),
                u32(15, self.table),
                attribute(21, struct.pack("B", self.protocol)),
            )
        )


def route(netns: Netns | None) -> Netlink:
    """A routing socket in `netns`, or in the caller's own."""
    return Netlink(netns, socket.NETLINK_ROUTE)


def interfaces(nl: Netlink) -> list[Interface]:
    """All devices of the netns."""
    bodies = nl.dump(RTM_GETLINK, struct.pack("BBHiII", 0, 0, 0, 0, 0, 0), "list interfaces")
    return [_interface(body) for body in bodies]


def interface(nl: Netlink, ifindex: int) -> Interface | None:
    """One device, None when there is none with that index."""
    try:
        body = struct.pack("BBHiII", 0, 0, 0, ifindex, 0, 0)
        return _interface(nl.get(RTM_GETLINK, body, f"interface {ifindex}"))
    except NetlinkError as error:
        if error.errno in GONE:
            return None
        raise


def _interface(body: bytes) -> Interface:
    _, _, hardware, ifindex, flags, _ = struct.unpack_from("BBHiII", body)
    found = attributes(body[16:])
    info = attributes(found.get(18, b""))
    kind = info.get(1, b"").rstrip(b"\0").decode()
    peer = found.get(5)
    nsid = found.get(37)
    return Interface(
        name=found.get(3, b"").rstrip(b"\0").decode(errors="replace"),
        ifindex=ifindex,
        hardware=hardware,
        up=bool(flags & IFF_UP),
        kind=kind,
        peer_ifindex=None if peer is None else struct.unpack("I", peer)[0],
        peer_nsid=None if nsid is None else struct.unpack("i", nsid)[0],
    )


def addresses(nl: Netlink) -> list[InterfaceAddress]:
    """All addresses of the netns, both families."""
    found = []
    for body in nl.dump(RTM_GETADDR, struct.pack("BBBBI", 0, 0, 0, 0, 0), "list addresses"):
        family, _, _, scope, ifindex = struct.unpack_from("BBBBI", body)
        if family not in (socket.AF_INET, socket.AF_INET6):
            continue
        parts = attributes(body[8:])
        # IFA_LOCAL is ours and IFA_ADDRESS the peer's, where both are given.
        raw = parts.get(2) or parts.get(1)
        if raw:
            found.append(InterfaceAddress(ifindex, ip_address(raw), scope == 0))
    return found


def nsid_of(nl: Netlink, netns: Netns) -> int | None:
    """The number by which the netns of `nl` knows `netns`; None when it never met it."""
    body = struct.pack("BBBB", 0, 0, 0, 0) + u32(3, netns.fd)
    reply = attributes(nl.get(RTM_GETNSID, body, "netns id")[4:]).get(1)
    number: int = -1 if reply is None else struct.unpack("i", reply)[0]
    return None if number < 0 else number


def rules(nl: Netlink, family: int) -> list[Rule]:
    """Policy rules that look at a mark."""
    body = struct.pack("BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0)
    bodies = nl.dump(RTM_GETRULE, body, "list rules")
    return [_rule(family, body) for body in bodies if 10 in attributes(body[12:])]


def _rule(family: int, body: bytes) -> Rule:
    parts = attributes(body[12:])

    def number(kind: int, default: int) -> int:
        return int(struct.unpack("I", parts[kind])[0]) if kind in parts else default

    return Rule(
        family=family,
        preference=number(6, 0),
        mark=number(10, 0),
        mask=number(16, 0xFFFFFFFF),
        table=number(15, body[4]),
        protocol=parts.get(21, b"\0")[0],
    )


def add_rule(nl: Netlink, rule: Rule) -> None:
    """Add; one that is there already is an error."""
    nl.do(RTM_NEWRULE, rule.body(), f"add {_words(rule)}", NLM_F_CREATE | NLM_F_EXCL)


def delete_rule(nl: Netlink, rule: Rule) -> bool:
    """Delete; False when there was none."""
    return _forgiving(nl, RTM_DELRULE, rule.body(), f"delete {_words(rule)}")


def _words(rule: Rule) -> str:
    version = 4 if rule.family == socket.AF_INET else 6
    return f"IPv{version} rule for mark {rule.mark:#x}/{rule.mask:#x}"


def _local_default(family: int, table: int, ifindex: int, source: bytes) -> bytes:
    # `local` routes have host scope in IPv4; IPv6 knows no scopes.
    scope = 254 if family == socket.AF_INET else 0
    header = struct.pack("BBBBBBBBI", family, 0, 0, 0, table, PROTOCOL, scope, 2, 0)
    return header + u32(4, ifindex) + (attribute(7, source) if source else b"")


def add_local_default(
    nl: Netlink, family: int, table: int, ifindex: int, source: IPv4Address | IPv6Address | None
) -> None:
    """`local default dev IFINDEX table TABLE src SOURCE`: all of it is this host's."""
    body = _local_default(family, table, ifindex, source.packed if source else b"")
    nl.do(RTM_NEWROUTE, body, f"local route in table {table}", NLM_F_CREATE | NLM_F_REPLACE)


def delete_local_default(nl: Netlink, family: int, table: int, ifindex: int) -> bool:
    """Delete what `add_local_default` added; False when there was none."""
    body = _local_default(family, table, ifindex, b"")
    return _forgiving(nl, RTM_DELROUTE, body, f"delete the local route in table {table}")


def _forgiving(nl: Netlink, kind: int, body: bytes, what: str) -> bool:
    try:
        nl.do(kind, body, what)
    except NetlinkError as error:
        if error.errno in GONE or error.errno == errno.EAFNOSUPPORT:
            return False
        raise
    return True


def has_clsact(nl: Netlink, ifindex: int) -> bool:
    """Whether the device has a clsact qdisc, whoever made it."""
    bodies = nl.dump(RTM_GETQDISC, struct.pack("BBHiIII", 0, 0, 0, 0, 0, 0, 0), "list qdiscs")
    return any(
        struct.unpack_from("BBHi", body)[3] == ifindex
        and attributes(body[20:]).get(1, b"").rstrip(b"\0") == b"clsact"
        for body in bodies
    )


def add_clsact(nl: Netlink, ifindex: int) -> bool:
    """Give the device its clsact qdisc; False when it had one."""
    body = struct.pack("BBHiIII", 0, 0, 0, ifindex, _CLSACT_HANDLE, _TC_H_CLSACT, 0)
    try:
        what = f"clsact on interface {ifindex}"
        nl.do(RTM_NEWQDISC, body + text(1, "clsact"), what, NLM_F_CREATE | NLM_F_EXCL)
    except NetlinkError as error:
        if error.errno == errno.EEXIST:
            return False
        raise
    return True


def delete_clsact(nl: Netlink, ifindex: int) -> bool:
    """Take the qdisc away, with all its filters."""
    body = struct.pack("BBHiIII", 0, 0, 0, ifindex, _CLSACT_HANDLE, _TC_H_CLSACT, 0)
    what = f"remove clsact of interface {ifindex}"
    try:
        nl.do(RTM_DELQDISC, body + text(1, "clsact"), what)
    except NetlinkError as error:
        if error.errno in GONE or error.errno == errno.EINVAL:
            return False
        raise
    return True


def _filter(ifindex: int, egress: bool, priority: int) -> bytes:
    info = priority << 16 | _ETH_P_ALL_NETWORK_ORDER
    parent = _TC_H_EGRESS if egress else _TC_H_INGRESS
    return struct.pack("BBHiIII", 0, 0, 0, ifindex, _FILTER_HANDLE, parent, info)


def set_filter(
    nl: Netlink, ifindex: int, *, egress: bool, priority: int, prog_fd: int, name: str
) -> None:
    """Attach a direct-action BPF program at the clsact hook, or replace the one there."""
    options = nested(2, u32(6, prog_fd), text(7, name), u32(8, _TCA_BPF_FLAG_ACT_DIRECT))
    body = _filter(ifindex, egress, priority) + text(1, "bpf") + options
    what = f"BPF filter on interface {ifindex}"
    nl.do(RTM_NEWTFILTER, body, what, NLM_F_CREATE | NLM_F_REPLACE)


def delete_filter(nl: Netlink, ifindex: int, *, egress: bool, priority: int) -> bool:
    """Delete what `set_filter` attached; False when there was none."""
    body = _filter(ifindex, egress, priority) + text(1, "bpf")
    try:
        nl.do(RTM_DELTFILTER, body, f"remove the BPF filter of interface {ifindex}")
    except NetlinkError as error:
        # EINVAL: no such parent, since the qdisc is gone.
        if error.errno in GONE or error.errno == errno.EINVAL:
            return False
        raise
    return True


def filters(nl: Netlink, ifindex: int, *, egress: bool) -> int:
    """How many filters there are at the hook, ours and others'."""
    parent = _TC_H_EGRESS if egress else _TC_H_INGRESS
    body = struct.pack("BBHiIII", 0, 0, 0, ifindex, 0, parent, 0)
    bodies = nl.dump(RTM_GETTFILTER, body, f"filters of interface {ifindex}")
    # Each chain is listed once without a handle, each of its filters with one.
    return sum(1 for reply in bodies if struct.unpack_from("BBHiI", reply)[4] != 0)
