"""Two nodes of a testbed whose mesh is a real cluster's."""

from __future__ import annotations

from typing import Any

from tests.cluster.control_plane import (
    AGENT_NAMESPACE,
    ISTIOD_PORT,
    NAME,
    ControlPlane,
    agent_objects,
    agent_pod,
)
from tests.progs.kube_objects import mesh_objects
from tests.progs.pod import node_address
from tests.testbed import Testbed

ADDRESS = f"https://{node_address(1, 4)}:{ISTIOD_PORT}"
REDIRECTED = {"ambient.istio.io/redirection": "enabled"}


class ClusterBed(Testbed):
    """A testbed whose mesh is a cluster's."""

    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self.cluster = ControlPlane(self)
        root = ("--xds-root", str(self.cluster.root_file), "--ca-root", str(self.cluster.root_file))
        self.state_options = ("--xds", ADDRESS, "--xds-name", NAME, *root)
        self.ca_options = ("--ca", ADDRESS, "--ca-name", NAME)

    def environment(self, node: int) -> tuple[str, ...]:
        names = (f"POD_NAME={agent_pod(node)}", f"POD_NAMESPACE={AGENT_NAMESPACE}")
        return ("env", *names, f"INSTANCE_IP={node_address(node, 4)}")

    def create_objects(self) -> None:
        """The testbed's pods and services, as kubectl, CNI and kubelet would have made them."""
        objects: list[dict[str, Any]] = []
        for one in mesh_objects(self.pods.values()):
            if one["kind"] == "Pod":
                if "istio.io/dataplane-mode" not in one["metadata"]["labels"]:
                    one["metadata"]["annotations"] = REDIRECTED
                one["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
            if one["kind"] == "Service":
                # The test cluster has one family; pods have two all the same.
                four = one["spec"]["clusterIPs"][0]
                one["spec"] |= {"clusterIP": four, "clusterIPs": [four]}
                one["spec"].pop("ipFamilies", None)
                one["spec"].pop("ipFamilyPolicy", None)
            objects.append(one)
        nodes_first = sorted(objects, key=lambda one: one["kind"] in ("Pod", "Service"))
        self.cluster.apply(*nodes_first)
        self.cluster.apply(*agent_objects())

    def launch_agents(self) -> None:
        for node, agent in self.agents.items():
            agent.launch("--token-file", str(self.cluster.token(node)))
        for agent in self.agents.values():
            agent.wait_ready(120.0)
