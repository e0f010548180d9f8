"""The catalogue of meshbpf's BPF programs and maps: inert specifications.

Nothing here touches the kernel. `agent/datapath` compiles the sources, makes
the maps, loads the programs and attaches them; this package says what there
is. It is the one place where a number shared by C and Python is written:
`cflags()` hands maps, roles, flags and counters to the compiler as `-D`.

How the C refers to a map. The sources declare no map. They name one by its
number, `bpf_pseudo_fd(1, MAP_PODS)`, which the compiler turns into a 64-bit
load whose source register says "map" and whose immediate is that number. The
loader therefore relocates `ld_imm64` with `src_reg == 1` by looking the
immediate up in `MAPS_BY_NUMBER` and writing the descriptor of the real map.
That keeps bcc's rewriter out of our headers (it edits the main file only,
and silently leaves its own table syntax in a header as a call to nowhere)
and lets the compile child run without making a single map.

How a program is told its pod. `ProgramSpec.placeholders` lists 64-bit
constants that stand in the bytecode as plain `ld_imm64`; each instance gets
them replaced by its own values.

A map keeps its contents across agents of different versions as long as its
definition is equal: whoever changes what a map's bytes mean renames it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Final

DIRECTORY: Final = Path(__file__).resolve().parent
INCLUDE_DIRECTORY: Final = DIRECTORY / "include"

MAX_PODS: Final = 1024
"""Pods of one agent; index 0 is never given out."""

MAX_POD_FLOWS: Final = 1 << 14
"""Kernel-carried connections of one pod at a time; more go through the agent."""
MAX_VERDICTS: Final = 1 << 16
MAX_CHOICES: Final = 16
"""Endpoints of this node among which the connect hook draws for one service."""
MAX_SERVICES: Final = 1 << 13
"""Services times pods that dial them, for which it draws."""
MAX_SLOTS: Final = 1 << 13
"""Sets of counters, in twos: the even one of a connection whose both ends the
kernel carries, the odd one when the destination's agent has the other end."""

STEER_MARK: Final = 0x111
"""Routes a packet to the pod's table 100. Istio's in-pod redirection uses it too."""
STEER_MASK: Final = 0xFFF
AGENT_MARK: Final = 0x539
"""On outbound listeners, so that what they accept does not inherit the steering
mark: its answers must find their way to a source that is not in the pod's own
netns, when the pod forwards for others. ztunnel marks its own sockets with the same
number. By itself it proves nothing to any program."""
HBONE_PORT: Final = 15008
DNS_PORT: Final = 53

POD_INDEX: Final = 0x6D65_7368_706F_6449
"""Placeholder ("meshpodI") for the pod's index in per-pod programs."""


class MapType(IntEnum):
    """enum bpf_map_type of the kernel's UAPI, as far as we use it."""

    HASH = 1
    ARRAY = 2
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    SOCKHASH = 18
    QUEUE = 22
    SK_STORAGE = 24


class ProgramType(IntEnum):
    """enum bpf_prog_type of the kernel's UAPI, as far as we use it."""

    SCHED_CLS = 3
    SOCK_OPS = 13
    CGROUP_SOCK_ADDR = 18
    SK_LOOKUP = 30


class AttachType(IntEnum):
    """enum bpf_attach_type of the kernel's UAPI, as far as we use it."""

    CGROUP_SOCK_OPS = 3
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    SK_LOOKUP = 36
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class MapFlag(IntFlag):
    """BPF_F_* of BPF_MAP_CREATE."""

    NONE = 0
    NO_PREALLOC = 1 << 0
    CLONE = 1 << 9
    MMAPABLE = 1 << 10


class Role(IntEnum):
    """What a listener of the agent in a pod's netns accepts."""

    OUTBOUND = 1
    INBOUND = 2
    HBONE = 3
    DNS = 4  # by TCP
    DNS_UDP = 5  # no listener: a bound socket


CONNECTION_ROLES: Final = (Role.OUTBOUND, Role.INBOUND, Role.HBONE)
"""The listeners of pods' connections; every pod has them, ours or a stock proxy's."""
DNS_ROLES: Final = (Role.DNS, Role.DNS_UDP)
"""Always the agent's own."""


class PodFlag(IntFlag):
    """Bits of a pod's entry in `pod_config`."""

    NONE = 0
    ATTACHED = 1 << 0
    FAIL_OPEN = 1 << 1
    LEAVING = 1 << 2  # a detach has begun: nothing new is captured
    EXEMPT_PORTS = 1 << 3  # `exempt_ports` has entries for this pod
    EXEMPT_CIDRS = 1 << 4
    EXEMPT_INTERFACES = 1 << 5
    DNS = 1 << 6  # its queries go to the agent, as long as that answers
    SAME_NODE = 1 << 7  # the kernel may carry connections to and from other pods of the node
    PLAINTEXT = 1 << 8  # and plaintext from elsewhere
    PROXIED = 1 << 9  # a stock proxy serves its connections, not the agent


class Report(IntEnum):
    """Why a hook tells the agent of a connection."""

    STALE = 1  # established without a verdict that holds
    UNTRACKED = 2  # and there was no room to remember it


class Decision(IntEnum):
    """Index into `decisions`: what a hook did with a connection or packet."""

    CAPTURED_BY_CONNECT = 0  # marked at connect()
    CAPTURED_BY_TC = 1  # SYN redirected on the pod's interface
    REDIRECTED = 2  # later packets of such flows
    OUTSIDE_MESH = 3  # left alone: not in the mesh map, lease fresh
    EXEMPT_OUT = 4  # left alone: port, CIDR, loopback, own address
    AGENT_SOCKET = 5  # packets and connects of the agent's own sockets
    REFUSED_NO_AGENT = 6  # outbound, closed mode
    REFUSED_LEASE = 7  # outside the mesh, but the state is too old to say so
    OPEN_OUT = 8  # outbound, open mode, no agent: left alone
    OUTBOUND = 9  # delivered to the outbound listener
    INBOUND = 10
    HBONE = 11
    EXEMPT_IN = 12
    PROBE = 13  # inbound connection of a probing host process
    PROBE_MARKED = 14
    REFUSED_INBOUND = 15  # closed mode, no agent
    OPEN_IN = 16
    REFUSED_OUTBOUND_SOCKET = 17  # foreign destination on lo, and no listener
    SPOOFED_SOURCE = 18  # dropped on the host veth
    OPAQUE = 19  # dropped: fragment or header chain that hides TCP to the mesh
    NO_MEMORY = 20  # dropped: socket storage could not be made
    FOREIGN_MARK = 21  # connect hook left a socket with its own mark to TC
    DNS_QUERY = 22  # a datagram handed to the agent's DNS proxy
    DNS_DIRECT = 23  # left alone: the pod's queries go to the agent, and none answers
    ATTESTED = 24  # outbound to a pod of this node, carried by the kernel
    KERNEL_IN = 25  # inbound, left to the app under a verdict
    DOUBTED = 26  # established without a verdict that holds: told to the agent
    SPOOFED_HANDSHAKE = 27  # SYN or SYN-ACK that is not from the pod it claims
    LED = 28  # a service's address became that of an endpoint of this node


@dataclass(frozen=True, slots=True)
class MapSpec:
    """One map. Sizes are in bytes; the C side asserts the same sizes."""

    name: str
    number: int
    type: MapType
    key_size: int
    value_size: int
    max_entries: int
    flags: MapFlag = MapFlag.NONE


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """One hook. `name` is the C function, `source` a file in this directory."""

    name: str
    source: str
    prog_type: ProgramType
    attach_type: AttachType
    placeholders: tuple[int, ...] = ()
    budget: int = 4096
    """Most instructions the verifier may walk (a test checks it)."""

    @property
    def expected_attach_type(self) -> int:
        """For BPF_PROG_LOAD: TC programs are loaded without one, as before tcx."""
        return 0 if self.prog_type is ProgramType.SCHED_CLS else int(self.attach_type)


_FREE = MapFlag.NO_PREALLOC

MAPS: Final[tuple[MapSpec, ...]] = (
    MapSpec("pods", 1, MapType.HASH, 8, 4, MAX_PODS),
    MapSpec("pod_config", 2, MapType.ARRAY, 4, 48, MAX_PODS),
    MapSpec("addresses", 3, MapType.HASH, 20, 4, 16 * MAX_PODS, _FREE),
    MapSpec("exempt_ports", 4, MapType.HASH, 8, 4, 64 * MAX_PODS, _FREE),
    MapSpec("exempt_cidrs", 5, MapType.LPM_TRIE, 24, 4, 64 * MAX_PODS, _FREE),
    MapSpec("exempt_ifaces", 6, MapType.HASH, 8, 4, 16 * MAX_PODS, _FREE),
    MapSpec("mesh", 7, MapType.LPM_TRIE, 24, 4, 1 << 20, _FREE),
    MapSpec("listeners", 8, MapType.SOCKHASH, 8, 8, 8 * MAX_PODS),
    MapSpec("probes", 9, MapType.LRU_HASH, 36, 8, 8192),
    MapSpec("probe_cgroups", 10, MapType.HASH, 8, 4, 64),
    MapSpec("heartbeat", 11, MapType.ARRAY, 4, 24, 1, MapFlag.MMAPABLE),
    MapSpec("decisions", 12, MapType.PERCPU_ARRAY, 4, 8, 32),
    MapSpec("pod_counters", 13, MapType.PERCPU_ARRAY, 4, 40, MAX_PODS),
    # What the agent's listeners accept is the agent's too.
    MapSpec("agent_sockets", 14, MapType.SK_STORAGE, 4, 4, 0, _FREE | MapFlag.CLONE),
    MapSpec("captured", 15, MapType.SK_STORAGE, 4, 4, 0, _FREE),
    # Never read by a program: what an agent must know to take a pod over or
    # to undo its attachment (agent/datapath/records.py).
    MapSpec("records", 16, MapType.HASH, 4, 8192, MAX_PODS, _FREE),
    MapSpec("local_pods", 17, MapType.HASH, 16, 4, 16 * MAX_PODS, _FREE),
    MapSpec("epochs", 18, MapType.ARRAY, 4, 8, MAX_PODS, MapFlag.MMAPABLE),
    MapSpec("verdicts", 19, MapType.LRU_HASH, 44, 24, MAX_VERDICTS),
    MapSpec("flows", 20, MapType.HASH, 36, 64, 1 << 17, _FREE),
    MapSpec("flow_counts", 21, MapType.ARRAY, 4, 8, MAX_PODS, MapFlag.MMAPABLE),
    MapSpec("flow_slots", 22, MapType.ARRAY, 4, 40, MAX_SLOTS, MapFlag.MMAPABLE),
    MapSpec("flow_quota", 23, MapType.ARRAY, 4, 24, 1, MapFlag.MMAPABLE),
    MapSpec("flow_records", 24, MapType.QUEUE, 0, 80, 4096),
    MapSpec("flow_reports", 25, MapType.QUEUE, 0, 56, 4096),
    # By cgroup v2 id: where the processes of a stock proxy run.
    MapSpec("proxy_cgroups", 26, MapType.HASH, 8, 4, 64),
    MapSpec("services", 27, MapType.HASH, 24, 16 + 32 * MAX_CHOICES, MAX_SERVICES, _FREE),
    MapSpec("dialed", 28, MapType.SK_STORAGE, 4, 24, 0, _FREE),
    # Connections on their way to the agent; it takes out what it reads.
    MapSpec("drawn", 29, MapType.LRU_HASH, 36, 4, 8192),
)

MAPS_BY_NUMBER: Final = {spec.number: spec for spec in MAPS}
MAPS_BY_NAME: Final = {spec.name: spec for spec in MAPS}

PROGRAMS: Final[tuple[ProgramSpec, ...]] = (
    ProgramSpec(
        "connect4",
        "connect4.c",
        ProgramType.CGROUP_SOCK_ADDR,
        AttachType.CGROUP_INET4_CONNECT,
        budget=16384,
    ),
    ProgramSpec(
        "connect6",
        "connect6.c",
        ProgramType.CGROUP_SOCK_ADDR,
        AttachType.CGROUP_INET6_CONNECT,
        budget=16384,
    ),
    ProgramSpec(
        "getpeername4",
        "getpeername4.c",
        ProgramType.CGROUP_SOCK_ADDR,
        AttachType.CGROUP_INET4_GETPEERNAME,
    ),
    ProgramSpec(
        "getpeername6",
        "getpeername6.c",
        ProgramType.CGROUP_SOCK_ADDR,
        AttachType.CGROUP_INET6_GETPEERNAME,
    ),
    ProgramSpec(
        "sock_ops", "sock_ops.c", ProgramType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS, budget=8192
    ),
    ProgramSpec(
        "pod_egress",
        "pod_egress.c",
        ProgramType.SCHED_CLS,
        AttachType.TCX_EGRESS,
        (POD_INDEX,),
        budget=8192,
    ),
    ProgramSpec(
        "sk_lookup", "sk_lookup.c", ProgramType.SK_LOOKUP, AttachType.SK_LOOKUP, (POD_INDEX,)
    ),
    ProgramSpec(
        "host_egress", "host_egress.c", ProgramType.SCHED_CLS, AttachType.TCX_EGRESS, (POD_INDEX,)
    ),
    ProgramSpec(
        "host_ingress",
        "host_ingress.c",
        ProgramType.SCHED_CLS,
        AttachType.TCX_INGRESS,
        (POD_INDEX,),
    ),
)

PROGRAMS_BY_NAME: Final = {spec.name: spec for spec in PROGRAMS}


def cflags() -> tuple[str, ...]:
    """Defines that every source needs, in a stable order.

    The include path (`-I` INCLUDE_DIRECTORY) is left to the compile step: it
    differs between checkouts and must not change a schema's hash.
    """
    defines = {
        "POD_INDEX": f"{POD_INDEX:#x}",
        "MAX_PODS": MAX_PODS,
        "MAX_POD_FLOWS": MAX_POD_FLOWS,
        "MAX_CHOICES": MAX_CHOICES,
        "SLOT_SOURCE_ONLY": 1,
        "STEER_MARK": f"{STEER_MARK:#x}",
        "STEER_MASK": f"{STEER_MASK:#x}",
        "AGENT_MARK": f"{AGENT_MARK:#x}",
        "HBONE_PORT": HBONE_PORT,
        "DNS_PORT": DNS_PORT,
        **{f"MAP_{spec.name.upper()}": spec.number for spec in MAPS},
        **{f"ROLE_{role.name}": int(role) for role in Role},
        **{f"POD_{flag.name}": int(flag) for flag in PodFlag},
        **{f"REPORT_{report.name}": int(report) for report in Report},
        **{f"DECISION_{decision.name}": int(decision) for decision in Decision},
    }
    return tuple(f"-D{name}={value}" for name, value in defines.items())
