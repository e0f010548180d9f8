"""Pods that a real containerd makes with the plugin chained into its configuration."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshbpf.agent.wire.grpc import GrpcError
from tests.cni.test_verbs import pins
from tests.containerd import bed as containerd_bed
from tests.containerd.bed import CriBed
from tests.containerd.node import NAMESPACE, PORT, Made
from tests.progs.program import BedError, eventually
from tests.progs.sniffer import Sniffer
from tests.testbed import SUITE_TAG

pytestmark = [pytest.mark.root, pytest.mark.cni, pytest.mark.containerd]


class CniBed(CriBed):
    """As the other, but its mesh is written in objects, and knows pods before they are made."""

    def __init__(self, tag: str) -> None:
        super().__init__(tag, manifests=True)
        self.expected: dict[str, int] = {}

    def expect(self, **pods: int) -> None:
        """Pods that the API server has, by name and node, and the runtime not yet."""
        self.expected |= pods
        self.write_mesh()
        if self.running_agents():
            self.wait_mesh()

    def write_mesh(self) -> None:
        made = {pod.name: pod for pod in self.made}
        objects: list[dict[str, Any]] = [
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": NAMESPACE, "labels": {"istio.io/dataplane-mode": "ambient"}},
            }
        ]
        for name, node in self.expected.items():
            objects.append(
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {"name": name, "namespace": NAMESPACE},
                    "spec": {"nodeName": f"node{node}", "serviceAccountName": name},
                    "status": {"podIP": made[name].ip} if name in made else {},
                }
            )
        self.mesh_file.parent.mkdir(exist_ok=True)
        fresh = self.mesh_file.with_suffix(".new")
        fresh.write_text(yaml.safe_dump_all(objects))
        fresh.replace(self.mesh_file)

    def cni(self, node: int, *argv: str) -> None:
        runtime = self.runtimes[node]
        folders = ("--net-dir", str(runtime.directory / "net.d"))
        folders += ("--bin-dir", str(runtime.directory / "cni"))
        self.agents[node].cli("cni", *argv, *folders)

    def refusal(self, node: int, name: str) -> str:
        """What the runtime says when it cannot make the pod."""
        try:
            pod = self.run_pod(name, node)
        except GrpcError as error:
            return error.what
        self.runtimes[node].remove(pod.sandbox)
        return ""


@pytest.fixture(scope="module")
def nodes(binary: Path) -> Iterator[CniBed]:
    if reason := containerd_bed.missing():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        bed = CniBed(f"{SUITE_TAG}c")
        try:
            stack.enter_context(bed)
        except (BedError, subprocess.CalledProcessError) as error:
            if Path("/run/systemd/container").exists():
                pytest.skip(f"no container runtime starts inside this container: {error}")
            raise
        if reason := bed.cannot_run():
            pytest.skip(reason)
        bed.start_agents("--enrol")
        for node in (1, 2):
            bed.cni(node, "install", "--binary", str(binary))
        yield bed
        bed.close()
        for runtime in bed.runtimes.values():
            assert runtime.left() == []


def log_of(bed: CniBed, pod: Made) -> str:
    path = bed.runtimes[pod.node].directory / "logs" / f"{pod.name}.log"
    return path.read_text() if path.exists() else ""


def test_the_first_packet_of_a_pods_first_process_is_captured(nodes: CniBed) -> None:
    bed = nodes
    bed.expect(server=2, first=1)
    server = bed.run_pod("server", 2)
    bed.tell_mesh(server)
    bed.wait_mesh()
    with Sniffer(bed.node_netns(1), "trunk", ()) as sniffer:
        client = bed.run_pod("first", 1, args=("dial", server.ip, str(PORT)))
        info = bed.wait_state(bed.agents[1], client, "attached")
        assert info.addresses == (client.ip,)
        bed.tell_mesh(client)
        eventually("it was answered", lambda: "server" in log_of(bed, client), 20.0)
    assert f"server {client.ip}" in log_of(bed, client)
    # Not one SYN to the server's own port, from the very first on.
    assert sniffer.seen.tcp_service_ports() == {15008}


def test_removal_leaves_nothing(nodes: CniBed) -> None:
    bed, agent = nodes, nodes.agents[1]
    before = pins(agent.agent_id())
    bed.expect(brief=1)
    pod = bed.run_pod("brief", 1)
    assert pins(agent.agent_id()) != before
    bed.runtimes[1].remove(pod.sandbox)
    assert bed.pod_info(agent, pod) is None
    assert pins(agent.agent_id()) == before
    assert pod.key not in (agent.state_dir / "attachments.json").read_text()


def test_without_an_agent_creation_is_refused_with_the_reason_and_repaired_afterwards(
    nodes: CniBed,
) -> None:
    bed, agent = nodes, nodes.agents[2]
    bed.expect(late=2, early=2)
    agent.stop()
    said = bed.refusal(2, "late")
    assert "no agent answers at" in said
    assert f"pod {NAMESPACE}/late is not started, since it could talk past the mesh" in said
    # A pod that came up all the same, past the plugin, is attached when the agent is back.
    bed.cni(2, "uninstall")
    network = json.loads((bed.runtimes[2].directory / "net.d" / "10-pods.conflist").read_text())
    assert [each["type"] for each in network["plugins"]] == ["bridge"]
    early = eventually("containerd has read its configuration", lambda: made(bed, "early"), 10.0)
    assert early is not None
    bed.tell_mesh(early)
    agent.start(*agent.options)
    info = bed.wait_state(agent, early, "attached", 30.0)
    assert info.addresses == (early.ip,)


def made(bed: CniBed, name: str) -> Made | None:
    try:
        return bed.run_pod(name, 2)
    except GrpcError:
        return None
