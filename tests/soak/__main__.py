"""Two agents under churn of everything, for minutes: what they hold must not grow.

    python -m tests.soak [--seconds N]      (make soak SECONDS=N; at most 600)

Traffic runs through both agents all the while: new connections with a few
bytes, and some that stay open for seconds. Meanwhile pods come and go,
policies are written and taken back, certificates live for seconds. Memory,
descriptors and tasks of both agents are read after a warm-up and again at the
end, each time at rest. Prints what was done and what was held; exits 1 when
something grew.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.netns.talk import echo, receive_all
from tests.progs import server
from tests.progs.pod import Pod
from tests.progs.program import BedError
from tests.testbed import SUITE_TAG, Agent, Testbed

MOST_S = 600
WARM_UP = 0.3
"""Of the time: by then caches, pools and the allocator have what they want."""
REST_S = 6.0
"""Tunnels linger and threads end within this."""
MEMORY_GROWTH = 1.15
MEMORY_SLACK_KIB = 8 * 1024
FEW = 8
"""Descriptors and tasks by which two moments of rest may differ."""
CERT_TTL_S = 6


@dataclass(frozen=True)
class Held:
    """What an agent has at one moment."""

    memory_kib: int
    descriptors: int
    tasks: int

    @classmethod
    def by(cls, agent: Agent) -> Held:
        status = Path(f"/proc/{agent.pid}/status").read_text()
        memory = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return cls(
            memory_kib=int(memory.split()[1]),
            descriptors=len(os.listdir(f"/proc/{agent.pid}/fd")),
            tasks=_tasks(agent),
        )

    def grown(self, before: Held) -> list[str]:
        """What is more than it may be."""
        found = []
        if self.memory_kib > before.memory_kib * MEMORY_GROWTH + MEMORY_SLACK_KIB:
            found.append("memory")
        if self.descriptors > before.descriptors + FEW:
            found.append("descriptors")
        if self.tasks > before.tasks + FEW:
            found.append("tasks")
        return found


def _tasks(agent: Agent) -> int:
    """How many tasks its event loop has, as its own dump says."""
    with agent.bed.connect(agent.node, "127.0.0.1", 15000) as sock:
        sock.sendall(b"GET /debug/tasks HTTP/1.1\r\nHost: localhost:15000\r\n\r\n")
        answer = receive_all(sock)
    body = answer.partition(b"\r\n\r\n")[2]
    count, _, rest = body.partition(b" tasks\n")
    if not rest:
        raise BedError(f"no task dump: {answer[:200]!r}")
    return int(count)


class Churn:
    """Loops that run until told to stop; each counts what it did and what failed."""

    def __init__(self, bed: Testbed) -> None:
        self.bed = bed
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._stop = threading.Event()
        self._mesh = threading.Lock()
        self._threads: list[threading.Thread] = []

    def run(self, seconds: float) -> None:
        """All loops, for so long."""
        self._stop.clear()
        pairs = [("n1a", "n2a"), ("n2a", "n1a"), ("n1b", "n2b"), ("n2b", "n1b")]
        loops: list[Callable[[], None]] = [self._policies, self._pods]
        loops += [lambda pair=pair: self._short(*pair) for pair in pairs]  # type: ignore[misc]
        loops += [lambda pair=pair: self._long(*pair) for pair in pairs]  # type: ignore[misc]
        self._threads = [threading.Thread(target=loop) for loop in loops]
        for thread in self._threads:
            thread.start()
        time.sleep(seconds)
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _short(self, source: str, target: str) -> None:
        while not self._stop.wait(0.02):
            self._talk("connections", source, target, 0.0)

    def _long(self, source: str, target: str) -> None:
        while not self._stop.wait(0.02):
            self._talk("long connections", source, target, random.uniform(0.5, 3.0))

    def _talk(self, what: str, source: str, target: str, hold_s: float) -> None:
        family = random.choice((4, 6))
        address = self.bed[target].address(family)  # type: ignore[arg-type]
        try:
            with self.bed.connect(self.bed[source], address, server.ECHO, 20.0) as sock:
                echo(sock)
                self._stop.wait(hold_s)
                echo(sock)
        except (OSError, BedError):
            self.failed[what] += 1  # a policy may have said no
        else:
            self.done[what] += 1

    def _policies(self) -> None:
        """Of another namespace mostly; at times one that denies all of it for a moment."""
        number = 0
        while not self._stop.wait(0.5):
            number += 1
            fields = {"name": f"p{number}", "namespace": "elsewhere", "scope": "Namespace"}
            rules = [[[{"destinationPorts": [number % 60_000 + 1]}]]]
            with self._mesh:
                self.bed.policies[:] = [fields | {"action": "Deny", "rules": rules}]
                if number % 20 == 0:
                    deny = fields | {"namespace": "apps", "action": "Deny"}
                    self.bed.policies.append(deny | {"rules": [[[{"destinationPorts": [7001]}]]]})
                self.bed.write_mesh()
            self.done["policies"] += 1

    def _pods(self) -> None:
        number = 0
        while not self._stop.wait(0.5):
            number += 1
            agent = self.bed.agents[1 + number % 2]
            pod: Pod | None = None
            try:
                with self._mesh:
                    pod = self.bed.add_pod(f"s{number}", agent.node, f"spare{number % 5}")
                agent.attach(pod, "--service-account", pod.service_account)
                agent.detach(pod)
                self.done["pods"] += 1
            except BedError as error:
                self.failed["pods"] += 1
                print(error)
            finally:
                if pod is not None:
                    with self._mesh:
                        self.bed.remove_pod(pod)


def soak(seconds: float) -> int:
    """Run it; 1 when something grew or nothing worked."""
    with Testbed(f"{SUITE_TAG}soak") as bed:
        bed.start_agents("--cert-ttl", f"{CERT_TTL_S}s", "--heartbeat-limit", "5s")
        bed.start_servers()
        bed.attach_all()
        churn = Churn(bed)
        churn.run(seconds * WARM_UP)
        time.sleep(REST_S)
        before = {node: Held.by(agent) for node, agent in bed.agents.items()}
        churn.run(seconds * (1 - WARM_UP))
        time.sleep(REST_S)
        after = {node: Held.by(agent) for node, agent in bed.agents.items()}
    print(f"{seconds:.0f} s: " + ", ".join(f"{n} {what}" for what, n in churn.done.items()))
    print("not let through: " + (", ".join(f"{n} {w}" for w, n in churn.failed.items()) or "none"))
    grown = False
    for node in before:
        print(f"node{node} before: {before[node]}")
        print(f"node{node} after:  {after[node]}")
        if found := after[node].grown(before[node]):
            grown = True
            print(f"node{node} has grown: {', '.join(found)}")
    worked = all(churn.done[what] for what in ("connections", "pods", "policies"))
    return int(grown or not worked)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    return soak(min(options.seconds, MOST_S))


if __name__ == "__main__":
    sys.exit(main())
