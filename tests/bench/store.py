"""`make bench-store`: memory of a large mesh, the cost of a delta, lookups and decisions.

Each figure comes from a process of its own. Records are made as a control
plane's are (fresh strings and addresses for each), so that sharing is the
store's doing. While a delta is applied by `LiveMesh`, a task on the same event
loop notes its longest wait: that is what a connection would have felt.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import trio

from meshbpf.agent.core.admission import admission
from meshbpf.agent.core.authz import ConnectionFacts
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.policy import Authorization, PolicyAction
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.state import MeshDelta, MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import (
    Locality,
    NamespacedHostname,
    NetworkAddress,
    TunnelProtocol,
    Workload,
)
from meshbpf.agent.runtime import heap
from meshbpf.agent.runtime.mesh import LiveMesh
from tests.unit.core import test_authz_scale as authz

MEMORY_LIMIT_MIB = 1536
DELTA_LIMIT_MS = 200.0
STALL_LIMIT_MS = 20.0
LARGE = (200_000, 20_000)
DELTA_WORKLOADS = 1_000
TICK_S = 0.001


def workload(number: int, services: int, capacity: int = 1) -> Workload:
    team = number % services
    namespace = f"ns-{team % 200}"
    return Workload(
        uid=f"Kubernetes//Pod/{namespace}/app-{team}-5d4f8c-{number:x}",
        name=f"app-{team}-5d4f8c-{number:x}",
        namespace=namespace,
        addresses=(IPv4Address(0x0A000000 + number),),
        network="",
        tunnel_protocol=TunnelProtocol.HBONE,
        service_account=f"app-{team}",
        node=f"node-{number % 2000}",
        canonical_name=f"app-{team}",
        canonical_revision="v1",
        workload_type="deployment",
        workload_name=f"app-{team}",
        services={NamespacedHostname(namespace, host(team)): {80: 8080, 443: 8443}},
        locality=Locality("region", f"zone-{number % 3}"),
        capacity=capacity,
    )


def host(team: int) -> str:
    return f"app-{team}.ns-{team % 200}.svc.cluster.local"


def service(team: int) -> Service:
    return Service(
        name=f"app-{team}",
        namespace=f"ns-{team % 200}",
        hostname=host(team),
        addresses=(NetworkAddress("", IPv4Address(0x64000000 + team)),),
        ports={80: 8080, 443: 8443},
    )


async def filled(workloads: int, services: int) -> LiveMesh:
    """As a control plane fills it: in portions, then in force at once."""

    def records() -> MeshDelta:
        found = []
        for number in range(workloads):
            found.append(workload(number, services))
            heap.grown(1)
        return MeshDelta(found, [service(team) for team in range(services)])

    mesh = LiveMesh(trio.Lock())
    await mesh.apply_delta(await trio.to_thread.run_sync(records))
    return mesh


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def measure_memory() -> bool:
    empty_mib = resident_mib()
    workloads, services = LARGE
    start = time.perf_counter()
    mesh = trio.run(filled, workloads, services)
    seconds = time.perf_counter() - start
    used_mib = resident_mib() - empty_mib
    assert len(mesh.snapshot.workloads) == workloads
    print(
        f"| memory above an empty process, {workloads:,} workloads and {services:,} services "
        f"| {used_mib:.0f} MiB | {MEMORY_LIMIT_MIB} MiB |"
    )
    print(f"| the same: records made and indexed | {seconds:.1f} s | |")
    return used_mib < MEMORY_LIMIT_MIB


def measure_delta() -> bool:
    workloads, services = LARGE
    took_ms, cpu_ms, waits_ms, idle_ms = trio.run(_deltas, workloads, services)
    print(
        f"| delta of {DELTA_WORKLOADS:,} workloads in that mesh, median (worst of "
        f"{len(took_ms)}) | {sorted(took_ms)[len(took_ms) // 2]:.0f} ms ({max(took_ms):.0f} ms) "
        f"| {DELTA_LIMIT_MS:.0f} ms |"
    )
    print(f"| the same, CPU time of the process | {sorted(cpu_ms)[len(cpu_ms) // 2]:.0f} ms | |")
    print(
        f"| longest wait of the event loop meanwhile (idle: {idle_ms:.1f} ms) "
        f"| {max(waits_ms):.1f} ms | {STALL_LIMIT_MS:.0f} ms |"
    )
    return max(took_ms) < DELTA_LIMIT_MS and max(waits_ms) < STALL_LIMIT_MS


async def _deltas(
    workloads: int, services: int
) -> tuple[list[float], list[float], list[float], float]:
    mesh = await filled(workloads, services)
    heap.settle()
    took_ms: list[float] = []
    cpu_ms: list[float] = []
    waits_ms: list[float] = []

    async def tick(into: list[float]) -> None:
        while True:
            before = time.perf_counter()
            await trio.sleep(TICK_S)
            into.append((time.perf_counter() - before - TICK_S) * 1000)

    idle: list[float] = []
    with trio.move_on_after(1):
        await tick(idle)
    for turn in range(20):
        first = turn * 7919 % (workloads - DELTA_WORKLOADS)
        changed = [
            replace(workload(number, services), capacity=turn + 2)
            for number in range(first, first + DELTA_WORKLOADS)
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick, waits_ms)
            await trio.sleep(0.02)
            start, used = time.perf_counter(), time.process_time()
            await mesh.apply_delta(MeshDelta(workloads=changed))
            cpu_ms.append((time.process_time() - used) * 1000)
            took_ms.append((time.perf_counter() - start) * 1000)
            await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
    return took_ms, cpu_ms, waits_ms, max(idle)


def measure_lookups() -> bool:
    for count in (1_000, 10_000, 100_000):
        teams = count // 10
        mesh = trio.run(filled, count, teams).snapshot
        print(f"| lookups among {count:,} workloads | {_lookups(mesh, count, teams)} | |")
    return True


def _lookups(mesh: Snapshot, count: int, teams: int) -> str:
    addresses = [IPv4Address(0x0A000000 + i * 7919 % count) for i in range(5_000)]
    vips = [IPv4Address(0x64000000 + i * 7919 % teams) for i in range(5_000)]
    uids = [one.uid for _, one in zip(range(5_000), mesh.workloads, strict=False)]
    found = [mesh.service_at("", vip, "ns-1") for vip in vips]
    figures = {
        "workload by address": _ns(lambda ip: mesh.workload_at("", ip), addresses),
        "by uid": _ns(mesh.workload, uids),
        "service by VIP": _ns(lambda ip: mesh.service_at("", ip, "ns-1"), vips),
        "endpoints": _ns(lambda one: mesh.endpoints(one), found),
    }
    return ", ".join(f"{name} {ns:.0f} ns" for name, ns in figures.items())


def _ns(function: Callable[[Any], object], items: Sequence[object]) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter_ns()
        for item in items:
            function(item)
        best = min(best, (time.perf_counter_ns() - start) / len(items))
    return best


def measure_policies() -> bool:
    """In one namespace, all of them asked for each of its connections; half of them deny."""
    for count in (10, 100, 1_000, 10_000):
        known = [
            authz.policy(n, PolicyAction.DENY if n % 2 else PolicyAction.ALLOW)
            for n in range(count)
        ]
        pod = Workload(uid="p", name="p", namespace="shop", addresses=(IPv4Address(1),))
        mesh = Snapshot.of(MeshState((pod,), (), tuple(known)))
        mesh.policies_for(pod).compile()
        heap.settle()
        facts = ConnectionFacts(
            SpiffeId("cluster.local", "n0", "a3"), IPv4Address(2), IPv4Address(1), 8080
        )
        assert admission(mesh, pod).decide(facts).allowed
        decision_s = authz.best_s(partial(_decide, mesh, pod, facts), times=100)
        change_s = authz.best_s(partial(_change, mesh, known[0]))
        print(
            f"| {count:,} policies of ten rules in a namespace | decision "
            f"{decision_s * 1e6:.1f} us, change of one {change_s * 1e3:.1f} ms | |"
        )
    return True


def _decide(mesh: Snapshot, pod: Workload, facts: ConnectionFacts) -> None:
    admission(mesh, pod).decide(facts)


def _change(mesh: Snapshot, one: Authorization) -> None:
    other = replace(one, rules=one.rules[:-1])
    mesh.after(MeshDelta(policies=(other,)), mesh.version + 1).prepare_policies(mesh)


PARTS = {
    "memory": measure_memory,
    "delta": measure_delta,
    "lookups": measure_lookups,
    "policies": measure_policies,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=PARTS)
    part = parser.parse_args().part
    if part is not None:
        return 0 if PARTS[part]() else 1
    print("| what | measured | at most |\n|---|---|---|", flush=True)
    codes = [
        subprocess.run([sys.executable, "-m", "tests.bench.store", name], check=False).returncode
        for name in PARTS
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
