"""Programs attached to hooks: tcx and netns links with their pins, clsact filters.

A link that is pinned in bpffs outlives the agent, so capture does. tcx came
with 6.6; on older kernels the same programs sit in a clsact filter, which has
no link and needs no pin: the qdisc of the device holds it. Either way ours
come first and answer "go on" for what is not theirs, so a CNI's programs on
the same device still run.

Names in bpffs take no dot, hence interface indexes and not names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from meshbpf.agent.datapath import bpfsys, probes, rtnetlink
from meshbpf.agent.datapath.abi import AttachType, MultiAttach
from meshbpf.agent.datapath.bpfcall import BpfError
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.pinned import drop, hold
from meshbpf.agent.datapath.pins import Pins
from meshbpf.agent.datapath.records import TcPoint
from meshbpf.bpf import PROGRAMS_BY_NAME

_FILTER_PRIORITY: Final = 1

SK_LOOKUP_PIN: Final = "sk_lookup"


def kernel_has_tcx() -> bool:
    """Whether TC programs can be attached by link (6.6)."""
    try:
        probes.tcx()
    except BpfError:
        return False
    return True


def point_pin(point: TcPoint) -> str:
    """The pin's name of a tcx link."""
    return f"{point.program}-{point.ifindex}"


def hold_sk_lookup(pins: Pins, index: int, netns: Netns, program: Callable[[], int]) -> None:
    """sk_lookup on the pod's netns."""

    def create(prog_fd: int) -> int:
        return bpfsys.link_create(prog_fd, netns.fd, AttachType.SK_LOOKUP)

    path = pins.pod(index) / SK_LOOKUP_PIN
    hold(path, program, create, pins.inherited(path))


def hold_point(
    pins: Pins, index: int, point: TcPoint, netns: Netns, program: Callable[[], int]
) -> None:
    """A TC program on its interface."""
    if point.clsact:
        with rtnetlink.route(None if point.on_host else netns) as nl:
            rtnetlink.add_clsact(nl, point.ifindex)
            rtnetlink.set_filter(
                nl,
                point.ifindex,
                egress=point.egress,
                priority=_FILTER_PRIORITY,
                prog_fd=program(),
                name=f"meshbpf:{point.program}",
            )
        return

    def create(prog_fd: int) -> int:
        kind = AttachType.TCX_EGRESS if point.egress else AttachType.TCX_INGRESS
        with nullcontext() if point.on_host else netns.entered():
            return bpfsys.link_create(prog_fd, point.ifindex, kind, flags=MultiAttach.BEFORE)

    path = pins.pod(index) / point_pin(point)
    hold(path, program, create, pins.inherited(path))


def hold_cgroup_hook(pins: Pins, name: str, root: Path, program: Callable[[], int]) -> None:
    """The hook `name` on the cgroup v2 root."""
    spec = PROGRAMS_BY_NAME[name]

    def create(prog_fd: int) -> int:
        target = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return bpfsys.link_create(prog_fd, target, AttachType(spec.attach_type))
        finally:
            os.close(target)

    path = pins.cgroup() / name
    hold(path, program, create, pins.inherited(path))


def drop_point(pins: Pins, index: int, point: TcPoint, netns: Netns | None) -> None:
    """Undo `hold_point`. `netns` is None when the pod's is gone. Repeatable."""
    if not point.clsact:
        drop(pins.pod(index) / point_pin(point))
        return
    if netns is None and not point.on_host:
        return
    with rtnetlink.route(None if point.on_host else netns) as nl:
        if rtnetlink.interface(nl, point.ifindex) is None:
            return
        rtnetlink.delete_filter(nl, point.ifindex, egress=point.egress, priority=_FILTER_PRIORITY)
        if point.our_qdisc and not any(
            rtnetlink.filters(nl, point.ifindex, egress=way) for way in (True, False)
        ):
            rtnetlink.delete_clsact(nl, point.ifindex)


def drop_sk_lookup(pins: Pins, index: int) -> None:
    """Undo `hold_sk_lookup`. Repeatable."""
    drop(pins.pod(index) / SK_LOOKUP_PIN)
