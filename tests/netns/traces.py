"""What an attachment, a connection or an agent could leave behind, as values to compare.

The state of a namespace is read whole (rules, routes, interfaces, TC, every
sysctl), not only where meshbpf is known to write: what is equal before and
after is equal also in the places that nobody thought of.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from meshbpf.agent.datapath import bpfinfo, bpfsys
from meshbpf.agent.datapath.bpfcall import BpfError
from tests.progs.inside import inside
from tests.progs.program import run_inside
from tests.testbed import PINS_DIR

_COMMANDS = {
    "rules of IPv4": "ip -4 rule show",
    "rules of IPv6": "ip -6 rule show",
    "routes of IPv4": "ip -4 route show table all",
    "routes of IPv6": "ip -6 route show table all",
    "addresses": "ip -o address show",
    "queueing disciplines": "tc qdisc show",
}
# tc(8) lists filters of one interface and direction at a time.
_FILTERS = "tc filter show dev {} {}"

Objects = frozenset[tuple[str, int]]


def network_state(netns: str) -> dict[str, str]:
    """Rules, routes, addresses, TC and sysctls of a namespace, by what they are."""
    state = {what: run_inside(netns, argv.split()).stdout for what, argv in _COMMANDS.items()}
    interfaces = inside(netns, lambda: sorted(os.listdir("/proc/sys/net/ipv4/neigh")))
    for interface in interfaces:
        if interface == "default":
            continue
        for direction in ("ingress", "egress"):
            argv = _FILTERS.format(interface, direction).split()
            text = run_inside(netns, argv, check=False).stdout
            state[f"TC filters, {interface} {direction}"] = text
    return state | inside(netns, _sysctls)


def differences(before: dict[str, str], after: dict[str, str]) -> dict[str, tuple[str, str]]:
    """What is not the same: both values by name."""
    return {
        name: (before.get(name, ""), after.get(name, ""))
        for name in before.keys() | after.keys()
        if before.get(name, "") != after.get(name, "")
    }


def _sysctls() -> dict[str, str]:
    found = {}
    for family in ("ipv4", "ipv6"):
        for folder, _, files in os.walk(f"/proc/sys/net/{family}"):
            for name in files:
                path = Path(folder, name)
                if path.stat().st_mode & 0o400:
                    try:
                        found[str(path)] = path.read_text()
                    except OSError as error:
                        # Some hold no value that can be read (a key that is not set).
                        found[str(path)] = f"errno {error.errno}"
    return found


def bpf_objects() -> Objects:
    """Every BPF program, map and link of this kernel."""
    return frozenset(
        [("prog", number) for number in bpfinfo.prog_ids()]
        + [("map", number) for number in bpfinfo.map_ids()]
        + [("link", number) for number in bpfinfo.link_ids()]
    )


def held_by(pid: int) -> Objects:
    """The BPF objects that a process has descriptors of."""
    found: set[tuple[str, int]] = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            found |= _objects_in(path.read_text())
        except OSError:  # closed since the listing
            continue
    return frozenset(found)


def left_over(before: Objects, own: tuple[int, ...], agent_ids: tuple[str, ...]) -> Objects:
    """The objects that are new since `before` and belong to nobody but us.

    The machine may run other agents meanwhile; what their processes hold, or
    have pinned, is not ours to judge. What only an attachment or a pin of
    `agent_ids` keeps alive counts as left over.
    """
    fresh = bpf_objects() - before - _pinned_by_others(agent_ids)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in own and fresh:
            try:
                fresh -= held_by(int(entry.name))
            except OSError:  # the process ended
                continue
    return fresh


def _pinned_by_others(agent_ids: tuple[str, ...]) -> Objects:
    found: set[tuple[str, int]] = set()
    for folder in PINS_DIR.iterdir():
        if folder.name in agent_ids:
            continue
        for path in folder.rglob("*"):
            try:
                fd = bpfsys.obj_get(path)
            except (BpfError, OSError):  # a folder, or removed since the listing
                continue
            try:
                # fdinfo says which kind of object it is, and its number.
                found |= _objects_in(Path(f"/proc/self/fdinfo/{fd}").read_text())
            finally:
                os.close(fd)
    return frozenset(found)


def _objects_in(fdinfo: str) -> set[tuple[str, int]]:
    pairs = (line.split(":", 1) for line in fdinfo.splitlines() if ":" in line)
    return {
        (name.removesuffix("_id"), int(value))
        for name, value in pairs
        if name in ("prog_id", "map_id", "link_id")
    }


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an agent's process uses."""

    descriptors: int
    threads: int
    resident_bytes: int
    objects: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return cls(
            descriptors=len(os.listdir(f"/proc/{pid}/fd")),
            threads=int(fields["Threads"]),
            resident_bytes=int(fields["VmRSS"].split()[0]) * 1024,
            objects=len(held_by(pid)),
        )
