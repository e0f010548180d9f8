"""Attaching one pod, step by step, and taking every step back.

The order is the safety argument.

In: the record (so that a crash can be undone), the maps and listeners (so
that the first program that runs finds answers), routes and sysctls (so that
what is marked is local), sk_lookup (so that what is local finds its
listener), TC (now SYNs are captured), the host's end, and last the connect
hook. Connections that are established all the while stay direct: no hook asks
about them, and TC captures a flow only with its SYN.

Out: the connect hook and, by the flag LEAVING, TC and sk_lookup take in
nothing new; captured connections are ended while everything that holds them
inside the pod is still in place; then programs, routes, sysctls and maps go,
and the record last.

Each step may be repeated and each can find its work already done or undone.
So attaching again, taking over after a crash and undoing a failure are these
same functions.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from meshbpf.agent.datapath import links, plumbing, rtnetlink, sockdiag
from meshbpf.agent.datapath.codecs import IPAddress
from meshbpf.agent.datapath.flowcodecs import Flow
from meshbpf.agent.datapath.flowmaps import FlowMaps
from meshbpf.agent.datapath.maps import Map
from meshbpf.agent.datapath.netlink import Netlink, NetlinkError
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.objects import CompiledCatalogue
from meshbpf.agent.datapath.pins import Pins
from meshbpf.agent.datapath.podmaps import PodMaps, flags_of
from meshbpf.agent.datapath.podview import PodView, look
from meshbpf.agent.datapath.programs import Spares
from meshbpf.agent.datapath.records import Phase, PodRecord, Records, TcPoint
from meshbpf.agent.datapath.steering_types import Listeners, OnAgentDown, PodSteering
from meshbpf.bpf import PROGRAMS_BY_NAME, AttachType, PodFlag


@dataclass(frozen=True, slots=True)
class Attacher:
    """What the steps work on; belongs to one Steering, which serialises its calls."""

    pins: Pins
    compiled: CompiledCatalogue
    maps: Mapping[str, Map]
    records: Records
    spares: Spares
    use_tcx: bool
    carries: PodFlag = PodFlag.NONE
    """What the kernel may carry for pods that want it: SAME_NODE, PLAINTEXT."""

    def attach(self, pod: PodSteering, listeners: Listeners) -> PodRecord:
        """Capture a pod that is not captured. After an error there is no trace of it."""
        plumbing.refuse_foreign(pod.netns)
        view = look(pod.netns, pod.exempt_interfaces)
        record = self._plan(pod, view, self._index())
        try:
            self.records.put(record)
            pod_maps = PodMaps(self.maps)
            pod_maps.fill(record)
            pod_maps.set_listeners(record, listeners)
            self._put_in_place(record, pod.netns)
            pod_maps.start_connect_hook(record)
            record = msgspec.structs.replace(record, phase=Phase.ATTACHED)
            self.records.put(record)
        except BaseException:
            self.remove(record, pod.netns)
            raise
        return record

    def attach_again(self, before: PodRecord, pod: PodSteering, listeners: Listeners) -> PodRecord:
        """Bring an attached pod up to date: settings, interfaces, listeners, lost hooks.

        There is no moment without capture. After an error the pod is attached
        still, with the settings it had.
        """
        view = look(pod.netns, pod.exempt_interfaces)
        after = self._plan(pod, view, before.index)
        kept = {one.name: one for one in (*after.sysctls, *before.sysctls)}
        known = {(point.program, point.ifindex): point for point in before.points}
        after = msgspec.structs.replace(
            after,
            phase=Phase.ATTACHED,
            sysctls=tuple(kept.values()),
            points=tuple(known.get((p.program, p.ifindex), p) for p in after.points),
        )
        gone = [point for point in before.points if point not in after.points]
        # While both may be there, the record names both.
        self.records.put(msgspec.structs.replace(after, points=(*after.points, *gone)))
        pod_maps = PodMaps(self.maps)
        try:
            pod_maps.change(before, after)
            pod_maps.set_listeners(after, listeners)
            self._put_in_place(after, pod.netns)
        except BaseException:
            pod_maps.change(after, before)
            added = [point for point in after.points if point not in before.points]
            self.records.put(msgspec.structs.replace(before, points=(*before.points, *added)))
            raise
        for point in gone:
            links.drop_point(self.pins, after.index, point, pod.netns)
        pod_maps.start_connect_hook(after)
        self.records.put(after)
        return after

    def restore(self, record: PodRecord, netns: Netns) -> None:
        """After a start: hooks of another schema get this one's programs. No listeners yet."""
        # What was possible for an earlier agent may not be for this one.
        lost = (PodFlag.SAME_NODE | PodFlag.PLAINTEXT) & ~self.carries
        record = msgspec.structs.replace(record, flags=record.flags & ~int(lost))
        self.records.put(record)
        PodMaps(self.maps).fill(record)
        self._put_in_place(record, netns)
        PodMaps(self.maps).start_connect_hook(record)

    def _index(self) -> int:
        if ready := self.spares.ready():
            return min(ready)
        return self.records.free_index(self.spares.indexes())

    def netns_of(self, record: PodRecord) -> Netns | None:
        """The pod's netns, None when it is gone. The caller closes it."""
        return Netns.find(record.netns_path(), record.netns_dev, record.netns_inode, record.cookie)

    def remove(self, record: PodRecord, netns: Netns | None) -> None:
        """Lift the capture and every trace of it; `netns` is None when it is gone."""
        pod_maps = PodMaps(self.maps)
        self.records.put(msgspec.structs.replace(record, phase=Phase.DETACHING))
        pod_maps.stop_connect_hook(record)
        pod_maps.set_flags(record, record.flags | PodFlag.LEAVING)
        if netns is not None:
            self._end_captured(netns)
        self._end_carried(record)
        for point in record.points:
            links.drop_point(self.pins, record.index, point, netns)
        links.drop_sk_lookup(self.pins, record.index)
        self.pins.remove_pod(record.index)
        if netns is not None:
            plumbing.remove(netns, record.sysctls)
        pod_maps.clear(record)
        self.records.remove(record.index)

    def _end_captured(self, netns: Netns) -> None:
        try:
            captured = self.maps["captured"].fileno()
            sockdiag.destroy_steered(netns, captured)
        except NetlinkError as error:
            # A kernel without CONFIG_INET_DIAG_DESTROY. Going on is better
            # than a pod that cannot be detached: such flows end by the RST
            # of the far side, which knows nothing of them.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise

    def _end_carried(self, record: PodRecord) -> None:
        """End the flows that the kernel carries from and to the pod, and forget them."""
        flows = FlowMaps(self.maps)
        try:
            known = {one.index: one for one in self.records}
            ends = [
                (flow, state)
                for flow, state in flows.live()
                if record.index in (state.source, state.destination)
            ]
            for flow, state in ends:
                owner = known.get(state.watched_in)
                if owner is not None:
                    self.destroy_flows(owner, [(flow, state.socket_cookie)])
                flows.drop(flow, state.watched_in)
            flows.recount({record.index: 0})
        finally:
            flows.close()

    def destroy_flows(self, record: PodRecord, flows: Sequence[tuple[Flow, int]]) -> int:
        """End connections whose watched socket, by its cookie, is in this pod; how many did."""
        netns = self.netns_of(record)
        if netns is None:
            return 0
        try:
            return sockdiag.destroy(netns, flows)
        except NetlinkError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            return 0
        finally:
            netns.close()

    def _plan(self, pod: PodSteering, view: PodView, index: int) -> PodRecord:
        record = PodRecord(
            index=index,
            key=pod.key,
            phase=Phase.ATTACHING,
            netns=str(pod.netns.path),
            netns_dev=pod.netns.dev,
            netns_inode=pod.netns.inode,
            cookie=pod.netns.cookie,
            flags=0,
            addresses=tuple(map(str, view.addresses)),
            own_addresses=tuple(map(str, view.own_addresses)),
            families=plumbing.families(pod.netns),
            points=tuple(self._points(pod.netns, view)),
            host_skipped=view.host_skipped,
            sysctls=plumbing.plan_sysctls(pod.netns),
            exempt_ports=tuple(sorted(pod.exempt_ports)),
            exempt_cidrs=tuple(map(str, pod.exempt_cidrs)),
            exempt_ifindexes=view.exempt_ifindexes,
        )
        fail_open = pod.on_agent_down is OnAgentDown.OPEN
        carries = self.carries if pod.same_node else self.carries & ~PodFlag.SAME_NODE
        if pod.proxied:
            carries = PodFlag.NONE  # what the proxy would say, nobody here knows
        flags = flags_of(
            record, fail_open=fail_open, dns=pod.dns, carries=carries, proxied=pod.proxied
        )
        return msgspec.structs.replace(record, flags=int(flags))

    def _points(self, netns: Netns, view: PodView) -> Iterator[TcPoint]:
        with rtnetlink.route(netns) as inside, rtnetlink.route(None) as host:
            for one, end in view.captured:
                yield self._point(inside, "pod_egress", one.ifindex, one.name)
                if end is not None:
                    yield self._point(host, "host_egress", end.ifindex, end.name)
                    yield self._point(host, "host_ingress", end.ifindex, end.name)

    def _point(self, nl: Netlink, program: str, ifindex: int, interface: str) -> TcPoint:
        clsact = not self.use_tcx
        return TcPoint(
            program=program,
            ifindex=ifindex,
            interface=interface,
            egress=PROGRAMS_BY_NAME[program].attach_type is AttachType.TCX_EGRESS,
            on_host=program.startswith("host_"),
            clsact=clsact,
            our_qdisc=clsact and not rtnetlink.has_clsact(nl, ifindex),
        )

    def _put_in_place(self, record: PodRecord, netns: Netns) -> None:
        """Routes, sysctls, sk_lookup, TC."""
        plumbing.install(netns, record.sysctls, _sources(record))
        self.pins.pod(record.index).mkdir(mode=0o700, exist_ok=True)
        with self.spares.take(record.index) as programs:
            links.hold_sk_lookup(self.pins, record.index, netns, programs.loader("sk_lookup"))
            for point in record.points:
                load = programs.loader(point.program)
                links.hold_point(self.pins, record.index, point, netns, load)


def _sources(record: PodRecord) -> dict[int, IPAddress | None]:
    """The source address of each family's route: the pod's first."""
    sources: dict[int, IPAddress | None] = {}
    for family in record.families:
        version = 4 if family == socket.AF_INET else 6
        sources[family] = next((ip for ip in record.ips() if ip.version == version), None)
    return sources
