"""Steering: which pods are captured, by which hooks, and where their traffic goes.

The facade over everything in this package that touches the kernel. Blocking:
attach and detach take tens of milliseconds and belong in a thread; `beat` and
`protect` are a store and a system call. Calls from several threads are
serialised, but for those two.

What is in the kernel outlives the object: `close` lets go of descriptors and
nothing else, and an agent that opens the same agent id finds its pods in
`attached`. They stay captured all the while and have no listeners until
`attach` or `set_listeners` brings new ones; until then each does what its
`on_agent_down` says.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Final

from meshbpf.agent.core.address import PackedPrefix, packed_network
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import bpffs, codecs, links, pinned, sockdiag
from meshbpf.agent.datapath.attaching import Attacher
from meshbpf.agent.datapath.cgroups import cgroup_layout
from meshbpf.agent.datapath.codecs import IPAddress, IPNetwork
from meshbpf.agent.datapath.flowcodecs import Flow
from meshbpf.agent.datapath.flowmaps import FlowMaps
from meshbpf.agent.datapath.grace_periods import expedited, take_back
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.objects import compile_catalogue
from meshbpf.agent.datapath.pins import Pins
from meshbpf.agent.datapath.podmaps import PodMaps
from meshbpf.agent.datapath.programs import Programs, Spares
from meshbpf.agent.datapath.records import Phase, PodRecord, Records
from meshbpf.agent.datapath.sockdiag import SocketBytes
from meshbpf.agent.datapath.steering_types import (
    AttachedPod,
    Capture,
    Listeners,
    OnAgentDown,
    PodSteering,
    SteeringStatistics,
)
from meshbpf.agent.datapath.sweeping import sweep
from meshbpf.bpf import MAX_PODS, STEER_MARK, STEER_MASK, Decision, PodFlag, Role

__all__ = [
    "STEER_MARK",
    "STEER_MASK",
    "AttachedPod",
    "Capture",
    "Listeners",
    "OnAgentDown",
    "PodSteering",
    "Role",
    "Steering",
    "SteeringStatistics",
]

# In this order: the connect hooks lead no connection whose application would not be told
# of the address that it dialed; and what sock_ops attests they have let through.
_CGROUP_HOOKS: Final = ("getpeername4", "getpeername6", "connect4", "connect6", "sock_ops")
SPARES: Final = 4
"""Pods for which programs are loaded ahead."""

_PRESENT: Final = codecs.u32(1)
_GROUP: Final = 0
# Words of struct heartbeat (keys.h).
_BEAT, _LEASE, _LIMIT = range(3)


class Steering:
    """The kernel half of one agent. Make it with `open`."""

    def __init__(self, attacher: Attacher, capture_in_force: str, capture_reason: str) -> None:
        self._attacher = attacher
        self._maps = attacher.maps
        self._records = attacher.records
        self._pins = attacher.pins
        self._lock = threading.RLock()
        self._preparing = threading.RLock()
        """Taken before the other; while it is held, maps stay open."""
        self._closed = False
        self._descriptors = ExitStack()
        self._memory = self._maps["heartbeat"].mmap()
        self._heart = memoryview(self._memory).cast("Q")
        self._mesh = {
            packed_network(network)
            for group, network in map(codecs.read_prefix, self._maps["mesh"].keys())
            if group == _GROUP
        }
        self.flows = FlowMaps(self._maps)
        """What the kernel may carry, and what it does."""
        self.problems: tuple[str, ...] = ()
        """Pods found at `open` that could not be taken over fully, and why."""
        self.capture_in_force = capture_in_force
        """`connect+tc` or `tc`."""
        self.capture_reason = capture_reason
        """Why it is that."""

    @classmethod
    def open(
        cls,
        *,
        agent_id: str,
        cache_dir: Path,
        capture: Capture = Capture.AUTO,
        heartbeat_limit_s: float = 0.5,
        probe_cgroups: Sequence[Path] = (),
        use_tcx: bool | None = None,
    ) -> Steering:
        """Compile or read from `cache_dir`, load, take over what this agent id has left.

        Takes seconds when it must compile. Half-done attachments are undone,
        pods whose netns is gone are forgotten, and so are other agents that
        are gone with all their pods. `use_tcx` None means: where the
        kernel has it. Raises MeshbpfError and its kin (no headers, no bcc, no
        lasting bpffs, a program that the verifier refuses).
        """
        bpffs.ensure()
        compiled = compile_catalogue(cache_dir)
        pins = Pins.of(agent_id, compiled.schema)
        with ExitStack() as stack:
            claimed = pins.create()
            stack.callback(os.close, claimed)
            for folder in (pins.directory, *pins.foreign()):
                take_back(folder)
            opened = pins.open_maps()
            for one in opened.maps.values():
                stack.callback(one.close)
            attacher = Attacher(
                pins=pins,
                compiled=compiled,
                maps=opened.maps,
                records=Records(opened.maps["records"]),
                spares=Spares(compiled, opened.maps),
                use_tcx=links.kernel_has_tcx() if use_tcx is None else use_tcx,
            )
            in_force, reason, carries = _cgroup_hooks(attacher, capture)
            self = cls(replace(attacher, carries=carries), in_force, reason)
            stack.callback(self._release_memory)
            self._heart[_LIMIT] = int(heartbeat_limit_s * 1e9)
            if "mesh" in opened.fresh:
                # What an earlier map said to be outside, this one cannot confirm.
                self._heart[_LEASE] = 0
            self.set_probe_cgroups(probe_cgroups)
            with self._changing():
                self._take_over()
            sweep(pins.agent)
            self._descriptors = stack.pop_all()
        return self

    def _take_over(self) -> None:
        problems = []
        for record in list(self._records):
            netns = self._attacher.netns_of(record)
            try:
                if record.phase is Phase.ATTACHED and netns is not None:
                    self._attacher.restore(record, netns)
                else:
                    self._attacher.remove(record, netns)
            except MeshbpfError as error:
                # One pod that lost an interface must not keep the others from
                # an agent; attaching or detaching it will tell, or repair.
                problems.append(f"{record.key}: {error.what}")
            finally:
                if netns is not None:
                    netns.close()
        if not problems:
            self._pins.remove_foreign()
        self.problems = tuple(problems)

    # --- pods ---------------------------------------------------------------

    def attach(self, pod: PodSteering, listeners: Listeners) -> AttachedPod:
        """Capture a pod, or bring a captured one up to date.

        Atomic: after an error a new pod is untouched and a known one as it
        was. A pod of the same name in another netns takes the place of the
        one that is known.
        """
        with self._changing():
            _refuse_own(pod)
            known = self._records.named(pod.key)
            other = self._records.of_netns(pod.netns.cookie)
            if other is not None and other.key != pod.key:
                raise MeshbpfError(
                    "netns-attached",
                    f"{pod.netns.path} is attached already, as {other.key}",
                    f"meshbpf detach --pod {other.key}",
                )
            if known is not None and known.cookie != pod.netns.cookie:
                self._remove(known)
                known = None
            if known is None:
                return _attached(self._attacher.attach(pod, listeners))
            return _attached(self._attacher.attach_again(known, pod, listeners))

    def prepare(self) -> None:
        """Load programs ahead, for the next pods; attaching them takes less time.

        Blocks for some 15 ms for each pod that was attached since; others may
        attach meanwhile. VerifierError, BpfError when the kernel refuses.
        """
        spares = self._attacher.spares
        with self._preparing:
            while not self._closed:
                with self._lock:
                    taken = len(self._records) + len(spares.ready())
                    if len(spares.ready()) >= SPARES or taken >= MAX_PODS - 1:
                        return
                    index = self._records.free_index(spares.indexes())
                    spares.reserve(index)
                spares.load(index)

    def detach(self, key: str) -> None:
        """Lift the capture and leave no trace. No error when there is none.

        Connections that the agent carries end with a reset; direct ones go
        on. Works when the netns is gone.
        """
        with self._changing():
            record = self._records.named(key)
            if record is not None:
                self._remove(record)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock, expedited(self._pins.directory):
            yield

    def _remove(self, record: PodRecord) -> None:
        netns = self._attacher.netns_of(record)
        try:
            self._attacher.remove(record, netns)
        finally:
            if netns is not None:
                netns.close()

    def attached(self) -> tuple[AttachedPod, ...]:
        """The pods that are captured, by name."""
        with self._lock:
            return tuple(
                _attached(record) for record in self._records if record.phase is Phase.ATTACHED
            )

    def set_listeners(self, key: str, listeners: Listeners) -> None:
        """Replace a pod's listeners, each in one step. MeshbpfError for an unknown pod."""
        with self._lock:
            record = self._records.named(key)
            if record is None:
                raise MeshbpfError("not-attached", f"{key} is not attached")
            PodMaps(self._maps).set_listeners(record, listeners)

    def admit_proxy(self, cgroups: Iterable[int]) -> None:
        """Processes in these cgroups (v2 ids), and no others, may dial as the stock proxy."""
        wanted = {codecs.u64(one) for one in cgroups}
        with self._lock:
            admitted = self._maps["proxy_cgroups"]
            for key in wanted:
                admitted.update(key, _PRESENT)
            admitted.delete_many(key for key in list(admitted.keys()) if key not in wanted)

    # --- flows that the kernel carries ----------------------------------------

    def destroy_flows(self, flows: Iterable[tuple[Flow, int, int]]) -> int:
        """End connections, each with the pod and the cookie of its watched socket; how many did.

        Both ends see a reset. One that has ended by itself is no error.
        """
        by_pod: dict[int, list[tuple[Flow, int]]] = defaultdict(list)
        for flow, pod, cookie in flows:
            by_pod[pod].append((flow, cookie))
        with self._lock:
            records = [record for record in self._records if record.index in by_pod]
            return sum(
                self._attacher.destroy_flows(record, by_pod[record.index]) for record in records
            )

    def sample_flows(self, flows: Iterable[tuple[Flow, int, int]]) -> dict[int, SocketBytes]:
        """What the watched sockets have carried, by cookie; given as to `destroy_flows`.

        A socket that is not in the answer is gone.
        """
        by_pod: dict[int, list[tuple[Flow, int]]] = defaultdict(list)
        for flow, pod, cookie in flows:
            by_pod[pod].append((flow, cookie))
        found: dict[int, SocketBytes] = {}
        with self._lock:
            records = [record for record in self._records if record.index in by_pod]
        for record in records:
            netns = self._attacher.netns_of(record)
            if netns is not None:
                try:
                    found |= sockdiag.sample(netns, by_pod[record.index])
                finally:
                    netns.close()
        return found

    # --- what the hooks look up ---------------------------------------------

    def set_mesh(self, prefixes: Iterable[IPNetwork]) -> None:
        """`replace_mesh`, for those who have networks."""
        self.replace_mesh(map(packed_network, prefixes))

    def replace_mesh(self, prefixes: Iterable[PackedPrefix]) -> None:
        """Make these the destinations that go through the agent; only changes are written.

        What is new comes before what is old goes. MeshbpfError when the map is full.
        """
        with self._lock:
            wanted = set(prefixes)
            self.change_mesh(wanted - self._mesh, self._mesh - wanted)

    def change_mesh(
        self, added: Collection[PackedPrefix], removed: Collection[PackedPrefix]
    ) -> None:
        """Add and remove destinations; what is there already, or not there, is passed over.

        What is new comes before what is old goes. MeshbpfError when the map
        is full: nothing has changed then.
        """
        with self._lock:
            mesh = self._maps["mesh"]
            new = [one for one in added if one not in self._mesh]
            old = [one for one in removed if one in self._mesh]
            limit = mesh.spec.max_entries
            if (count := len(self._mesh) + len(new) - len(old)) > limit:
                raise MeshbpfError(
                    "mesh-too-large", f"{count} mesh prefixes, and the map takes {limit}"
                )
            keys = [codecs.packed_prefix(_GROUP, one) for one in old]
            if len(self._mesh) + len(new) > limit:
                mesh.delete_many(keys)
                keys = []
            if new:
                mesh.update_many({codecs.packed_prefix(_GROUP, one): _PRESENT for one in new})
            mesh.delete_many(keys)
            self._mesh.update(new)
            self._mesh.difference_update(old)

    def in_mesh(self, ip: IPAddress) -> bool:
        """Whether the hooks take this destination for one of the mesh."""
        key = codecs.prefix(_GROUP, ip_network(ip))
        return self._maps["mesh"].lookup(key) is not None

    def exempt_by(self, index: int, ip: IPAddress) -> bool:
        """Whether the hooks of the pod with this index leave connections to and from `ip` alone."""
        return self._maps["exempt_cidrs"].lookup(codecs.prefix(index, ip_network(ip))) is not None

    def beat(self, *, lease_s: float, ahead_s: float = 0.0) -> None:
        """Tell the hooks that the agent lives, and that its state holds for `lease_s` more.

        A beat dated `ahead_s` ahead says that listeners which outlive this
        agent will be served by another one until then.
        """
        now_ns = time.monotonic_ns()
        self._heart[_LEASE] = now_ns + int(lease_s * 1e9)
        self._heart[_BEAT] = now_ns + int(ahead_s * 1e9)

    def protect(self, sock: socket.socket) -> None:
        """Make it the agent's own socket, which is never captured. Before connect()."""
        self._maps["agent_sockets"].update(codecs.u32(sock.fileno()), _PRESENT)

    def own_sockets_map(self) -> int:
        """The descriptor of the map that `protect` writes to, for who does it in C."""
        return self._maps["agent_sockets"].fileno()

    def set_probe_cgroups(self, paths: Sequence[Path]) -> tuple[str, ...]:
        """Host processes in or below these cgroups are probes, left alone inbound.

        Gives the reasons for paths that cannot be used.
        """
        skipped = []
        wanted = set()
        for path in paths:
            try:
                # On cgroup v2 a folder's inode number is the cgroup's id.
                wanted.add(codecs.u64(path.stat().st_ino))
            except OSError as error:
                skipped.append(f"{path}: {error.strerror}")
        with self._lock:
            cgroups = self._maps["probe_cgroups"]
            for key in wanted:
                cgroups.update(key, _PRESENT)
            cgroups.delete_many(key for key in list(cgroups.keys()) if key not in wanted)
        return tuple(skipped)

    # --- the whole ----------------------------------------------------------

    def statistics(self) -> SteeringStatistics:
        """Counters of the hooks."""
        with self._lock:
            decisions, counters = self._maps["decisions"], self._maps["pod_counters"]
            beat_ns = self._heart[_BEAT]
            return SteeringStatistics(
                decisions={
                    decision.name.lower(): codecs.sum_u64(
                        b"".join(decisions.lookup_per_cpu(codecs.u32(decision)))
                    )
                    for decision in Decision
                },
                pods={
                    record.key: codecs.sum_pod_counters(
                        b"".join(counters.lookup_per_cpu(codecs.u32(record.index)))
                    )
                    for record in self._records
                },
                mesh_prefixes=len(self._mesh),
                heartbeat_age_s=(time.monotonic_ns() - beat_ns) / 1e9 if beat_ns else None,
            )

    def close(self) -> None:
        """Let go of descriptors. Capture goes on, as `on_agent_down` says. Repeatable."""
        self._closed = True
        with self._preparing, self._lock:
            self._attacher.spares.close()
            self._descriptors.close()

    def _release_memory(self) -> None:
        self.flows.close()
        self._heart.release()
        self._memory.close()

    def destroy(self) -> None:
        """Detach every pod and remove everything of this agent id, then close."""
        self._closed = True
        with self._preparing, self._lock:
            with self._changing():
                for record in list(self._records):
                    self._remove(record)
            self._pins.remove()
            self.close()


def _refuse_own(pod: PodSteering) -> None:
    own = Netns.own()
    own.close()
    if own.cookie == pod.netns.cookie:
        raise MeshbpfError(
            "own-netns",
            f"{pod.netns.path} is the agent's own network namespace",
            "pods on the host's network cannot be captured",
        )


def _attached(record: PodRecord) -> AttachedPod:
    fail_open = bool(record.flags & PodFlag.FAIL_OPEN)
    return AttachedPod(
        index=record.index,
        key=record.key,
        cookie=record.cookie,
        addresses=record.ips(),
        interfaces=tuple(one.interface for one in record.points if not one.on_host),
        host_ifindexes=tuple(dict.fromkeys(one.ifindex for one in record.points if one.on_host)),
        host_skipped=record.host_skipped,
        on_agent_down=OnAgentDown.OPEN if fail_open else OnAgentDown.CLOSED,
        same_node=bool(record.flags & PodFlag.SAME_NODE),
    )


def _cgroup_hooks(attacher: Attacher, capture: Capture) -> tuple[str, str, PodFlag]:
    """Attach or remove the cgroup hooks; what is in force, why, and what the kernel may carry.

    Without sock_ops nobody says whose a connection is, and nobody watches it.
    Where the hooks may not see every process (a part of the hierarchy), a
    plaintext connection could end at a server that they do not see.
    """
    pins = attacher.pins
    layout = cgroup_layout()
    if capture is Capture.AUTO and layout.point is not None:
        with Programs(attacher.compiled, attacher.maps) as programs:
            for name in _CGROUP_HOOKS:
                links.hold_cgroup_hook(pins, name, layout.point, programs.loader(name))
        carries = PodFlag.SAME_NODE
        if not layout.contained:
            carries |= PodFlag.PLAINTEXT
        return "connect+tc", layout.reason, carries
    for name in _CGROUP_HOOKS:
        path = pins.cgroup() / name
        for pin in (path, *pins.inherited(path)):
            pinned.drop(pin)
    if capture is Capture.TC:
        return "tc", "asked for", PodFlag.NONE
    return "tc", layout.reason, PodFlag.NONE
