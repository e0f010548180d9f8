"""Two nodes, each with a containerd, a bridge for its pods, and an agent.

As the plain testbed (tests/testbed.py), whose agents and sweeping it uses,
but its pods are made by a container runtime and their addresses by CNI, so
the mesh file is written from what the runtimes say.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from meshbpf.agent.api import AttachRequest, AttachResult, DetachRequest, PodInfo, PodsRequest
from meshbpf.agent.wire.grpc import GrpcError
from tests.containerd import image
from tests.containerd.node import NAMESPACE, PORT, Containerd, Made
from tests.progs.inside import socket_inside, sysctl_inside
from tests.progs.program import eventually
from tests.testbed import Agent, Testbed, _ip


class CriBed(Testbed):
    """The namespaces, runtimes and agents of one tag."""

    def __init__(self, tag: str, *, manifests: bool = False) -> None:
        super().__init__(tag, manifests=manifests)
        self.runtimes = {node: Containerd(self.directory, tag, node) for node in (1, 2)}
        self.made: list[Made] = []
        """What the mesh file names."""

    # --- life ---------------------------------------------------------------

    def close(self) -> None:
        """The agents first, so that no pod is removed under their hands; then the pods."""
        for agent in self.running_agents():
            agent.stop()
        try:
            for runtime in self.runtimes.values():
                runtime.close()
        finally:
            super().close()

    def _sweep(self) -> None:
        for runtime in self.runtimes.values():
            runtime.sweep()
        super()._sweep()

    def _build(self) -> None:
        self.directory.mkdir(mode=0o700)
        first, second = self.node_netns(1), self.node_netns(2)
        for netns in (first, second):
            self._make_netns(netns)
            sysctl_inside(netns, ipv4__ip_forward=1)
        _ip(first, [f"link add trunk type veth peer name trunk netns {second}"])
        for node, other in ((1, 2), (2, 1)):
            _ip(
                self.node_netns(node),
                [
                    "link set trunk up",
                    f"address add 198.18.0.{node}/24 dev trunk",
                    f"route add {self.runtimes[other].subnet} via 198.18.0.{other} dev trunk",
                ],
            )
        archive = image.build(self.directory)
        for runtime in self.runtimes.values():
            runtime.start()
            runtime.load_image(archive)
        self.write_mesh()

    def start_agents(self, *options: str) -> None:
        if not self.ca_dir.exists():
            self.make_ca()
        for node, agent in self.agents.items():
            agent.launch("--cri-socket", str(self.runtimes[node].socket), *options)
        for agent in self.agents.values():
            agent.wait_ready()

    # --- pods and mesh ------------------------------------------------------

    def run_pods(self, *wanted: tuple[str, int], **given: Any) -> list[Made]:
        """Pods by name and node, made side by side, and named in the mesh file."""
        with ThreadPoolExecutor(len(wanted)) as pool:
            pods = list(pool.map(lambda one: self.run_pod(one[0], one[1], **given), wanted))
        self.tell_mesh(*pods)
        return pods

    def run_pod(self, name: str, node: int, **given: Any) -> Made:
        """One pod, of which the mesh file says nothing."""
        return self.runtimes[node].run_pod(name, **given)

    def tell_mesh(self, *pods: Made) -> None:
        """Name these in the mesh file, in place of others of their names.

        Agents read it within a second; an attach by name waits for that.
        """
        names = {pod.name for pod in pods}
        self.made = [other for other in self.made if other.name not in names] + [*pods]
        self.write_mesh()

    def tidy(self, keep: Sequence[Made]) -> None:
        """Detach every pod, and remove those that are not of `keep`."""
        kept = {pod.sandbox for pod in keep}
        extra = [
            (runtime, item.id)
            for runtime in self.runtimes.values()
            for item in runtime.list()
            if item.id not in kept
        ]
        for agent in self.running_agents():
            for pod in agent.ask(PodsRequest()).pods:
                agent.ask(DetachRequest(pod=pod.pod))
        if extra:
            with ThreadPoolExecutor(len(extra)) as pool:
                for _ in pool.map(lambda one: one[0].remove(one[1]), extra):
                    pass

    def write_mesh(self) -> None:
        workloads = [
            {
                "uid": f"Kubernetes//Pod/{pod.key}",
                "name": pod.name,
                "namespace": NAMESPACE,
                "serviceAccount": pod.name,
                "workloadIps": [pod.ip],
                "protocol": "HBONE",
                "node": f"node{pod.node}",
            }
            for pod in self.made
        ]
        text = yaml.safe_dump({"workloads": workloads, "services": [], "policies": []})
        fresh = self.mesh_file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.mesh_file)

    def cannot_run(self) -> str:
        """Why this machine lets no runtime make pods; empty when it does.

        Tried, not guessed: a container in a container may lack what runc needs.
        """
        try:
            pod = self.runtimes[1].run_pod("probe")
        except GrpcError as error:
            return f"runc makes no pods here: {error.what}"
        self.runtimes[1].remove(pod.sandbox)
        return ""

    # --- what is seen -------------------------------------------------------

    def attach(self, *pods: Made) -> list[AttachResult]:
        """Each by its name alone, on its own node."""
        return [self.agents[pod.node].ask(AttachRequest(pod=pod.key)) for pod in pods]

    def pod_info(self, agent: Agent, pod: Made) -> PodInfo | None:
        found = [one for one in agent.ask(PodsRequest()).pods if one.pod == pod.key]
        return found[0] if found else None

    def wait_state(self, agent: Agent, pod: Made, state: str, limit_s: float = 10.0) -> PodInfo:
        def look() -> PodInfo | None:
            info = self.pod_info(agent, pod)
            return info if info is not None and info.state == state else None

        info = eventually(f"{pod.key} is {state}", look, limit_s)
        assert info is not None
        return info

    def connect_pods(self, source: Made, target: Made) -> socket.socket:
        """A connection from within a pod to another's server, its greeting still to be read."""
        sock = socket_inside(source.netns, socket.AF_INET)
        sock.settimeout(5.0)
        try:
            sock.connect((target.ip, PORT))
        except BaseException:
            sock.close()
            raise
        return sock

    def greeting(self, source: Made, target: Made) -> str:
        """What the target's server says to the source: its name and whom it sees."""
        with self.connect_pods(source, target) as sock:
            return sock.makefile().readline().strip()

    @contextlib.contextmanager
    def runtime_down(self, node: int, kill: bool = False) -> Iterator[None]:
        """No containerd on a node for the time of the block; pods run on."""
        runtime = self.runtimes[node]
        runtime.end(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            yield
        finally:
            runtime.start()


def missing() -> str:
    """Why this machine cannot run the suite; empty when it can."""
    if os.geteuid() != 0:
        return "container runtimes need root"
    for program in ("containerd", "ctr", "runc"):
        if shutil.which(program) is None:
            return f"{program} is not installed: make setup"
    if not Path("/usr/lib/cni/bridge").exists():
        return "the CNI plugins are not installed: make setup"
    return ""
