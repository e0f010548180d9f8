"""A pod's entries in the shared maps: written before capture begins, removed after it ended."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshbpf.agent.datapath import bpfsys, codecs
from meshbpf.agent.datapath.bpfcall import BpfError
from meshbpf.agent.datapath.flowmaps import raise_epoch
from meshbpf.agent.datapath.maps import Map
from meshbpf.agent.datapath.records import PodRecord
from meshbpf.bpf import AGENT_MARK, PodFlag, Role

ListenerMap = Mapping[tuple[Role, int], socket.socket]

_PRESENT = codecs.u32(1)
_SO_MARK = 36  # asm-generic/socket.h; the socket module has no name for it


def flags_of(
    record: PodRecord,
    *,
    fail_open: bool,
    dns: bool,
    carries: PodFlag = PodFlag.NONE,
    proxied: bool = False,
) -> PodFlag:
    """The `pod_config` flags that a record stands for.

    `carries` is what the kernel may carry. Between pods only where it can see
    both ends of every interface; plaintext not where some interfaces are exempt,
    which a socket does not show.
    """
    flags = PodFlag.ATTACHED | carries
    if record.host_skipped:
        flags &= ~PodFlag.SAME_NODE
    if record.exempt_ifindexes:
        flags &= ~PodFlag.PLAINTEXT
    if fail_open:
        flags |= PodFlag.FAIL_OPEN
    if proxied:
        flags |= PodFlag.PROXIED
    if dns:
        flags |= PodFlag.DNS
    if record.exempt_ports:
        flags |= PodFlag.EXEMPT_PORTS
    if record.exempt_cidrs:
        flags |= PodFlag.EXEMPT_CIDRS
    if record.exempt_ifindexes:
        flags |= PodFlag.EXEMPT_INTERFACES
    return flags


@dataclass(frozen=True, slots=True)
class PodMaps:
    """The shared maps by name."""

    maps: Mapping[str, Map]

    def _keyed(self, record: PodRecord) -> Iterable[tuple[str, bytes, bytes]]:
        """Map, key and value of everything that is the pod's."""
        pod = record.index
        for name, key in self._sets(record):
            yield name, key, _PRESENT
        if record.flags & PodFlag.SAME_NODE:
            for ip in record.ips():
                yield "local_pods", codecs.address(ip), codecs.u32(pod)

    def _sets(self, record: PodRecord) -> Iterable[tuple[str, bytes]]:
        pod = record.index
        for ip in record.own_ips():
            yield "addresses", codecs.pod_address(pod, ip)
        for port in record.exempt_ports:
            yield "exempt_ports", codecs.pod_number(pod, port)
        for cidr in record.cidrs():
            yield "exempt_cidrs", codecs.prefix(pod, cidr)
        for ifindex in record.exempt_ifindexes:
            yield "exempt_ifaces", codecs.pod_number(pod, ifindex)

    def fill(self, record: PodRecord) -> None:
        """Everything but what starts the capture: flags come last.

        The epoch is raised first: a verdict about an earlier pod of the same
        index is none about this one.
        """
        raise_epoch(self.maps, record.index)
        for name, key, value in self._keyed(record):
            self.maps[name].update(key, value)
        self.set_flags(record, record.flags)

    def change(self, before: PodRecord, after: PodRecord) -> None:
        """From one description of a pod to another, without a moment in between.

        What is new is added first, so that nothing that is in both is ever
        missing.
        """
        old, new = set(self._keyed(before)), set(self._keyed(after))
        for name, key, value in new - old:
            self.maps[name].update(key, value)
        self.set_flags(after, after.flags)
        for name, key, value in old - new:
            self._delete(name, key, value)

    def clear(self, record: PodRecord) -> None:
        """Take everything out. Repeatable."""
        self.set_flags(record, 0)
        for name, key, value in self._keyed(record):
            self._delete(name, key, value)
        raise_epoch(self.maps, record.index)
        for role in Role:
            for family in codecs.FAMILIES:
                self._drop_listener(record.index, role, family)
        self._zero_counters(record.index)

    def _delete(self, name: str, key: bytes, value: bytes) -> None:
        # An address may be another pod's by now.
        if self.maps[name].lookup(key) == value:
            self.maps[name].delete(key)

    def _zero_counters(self, pod: int) -> None:
        # The index will be another pod's.
        counters = self.maps["pod_counters"]
        size = counters.spec.value_size * bpfsys.possible_cpus()
        bpfsys.map_update(counters.fileno(), codecs.u32(pod), bytes(size))

    def set_flags(self, record: PodRecord, flags: int) -> None:
        """The one word that the programs look at first."""
        first = {ip.version: ip for ip in reversed(record.ips())}
        value = codecs.pod_config(flags, record.cookie, first.get(4), first.get(6))
        self.maps["pod_config"].update(codecs.u32(record.index), value)

    def start_connect_hook(self, record: PodRecord) -> None:
        """From here on connect() in the pod's netns is looked at."""
        self.maps["pods"].update(codecs.u64(record.cookie), codecs.u32(record.index))

    def stop_connect_hook(self, record: PodRecord) -> None:
        """The reverse."""
        self.maps["pods"].delete(codecs.u64(record.cookie))

    def set_listeners(self, record: PodRecord, listeners: ListenerMap) -> None:
        """Put these listeners into their slots; a slot that is not named is emptied.

        Those of a stock proxy's pod are not: ours come and go without its own.

        They get SO_REUSEADDR, and what they accept inherits it: accepted
        sockets are bound to the ports of the original destinations, and an
        application that opens its own :80 must not find it taken by them.
        Outbound ones get a mark (see AGENT_MARK).
        """
        pod, proxied = record.index, bool(record.flags & PodFlag.PROXIED)
        for role in Role:
            for family in codecs.FAMILIES:
                sock = listeners.get((role, family))
                if sock is None:
                    if not proxied:
                        self._drop_listener(pod, role, family)
                else:
                    if role is not Role.DNS_UDP:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if role is Role.OUTBOUND:
                        sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, AGENT_MARK)
                    key = codecs.listener(pod, role, family)
                    self.maps["listeners"].update(key, codecs.u64(sock.fileno()))

    def _drop_listener(self, pod: int, role: Role, family: int) -> None:
        try:
            self.maps["listeners"].delete(codecs.listener(pod, role, family))
        except BpfError as error:
            # sockhash answers EINVAL, not ENOENT, for some absent keys.
            if error.errno != errno.EINVAL:
                raise
