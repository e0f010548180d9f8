"""Agents in network namespaces under a control plane of ours."""

from __future__ import annotations

import sys

from tests.progs.pod import node_address
from tests.progs.program import Program
from tests.progs.server import ECHO
from tests.testbed import Testbed
from tests.xds import records, serve
from tests.xds.istiod import NAME

PORT = 15012
ADDRESS = f"https://{node_address(1, 4)}:{PORT}"


class ControlledBed(Testbed):
    """A testbed whose agents ask a control plane on node 1 for everything."""

    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self.control = self.directory / "istiod"
        who = ("--token-file", str(self.control / "token"))
        root = str(self.control / "root.pem")
        self.state_options = ("--xds", ADDRESS, "--xds-root", root, "--xds-name", NAME, *who)
        self.ca_options = ("--ca", ADDRESS, "--ca-root", root, "--ca-name", NAME)

    def tell(self) -> None:
        """Every pod and its service, as resources."""
        for pod in self.pods.values():
            key = f"{pod.namespace}/{pod.hostname}"
            packed = records.workload(
                pod.name,
                pod.ipv4,
                pod.ipv6,
                namespace=pod.namespace,
                service_account=pod.service_account,
                node=f"node{pod.node}",
                tunnel_protocol=int(pod.captured),
                services={key: {ECHO: ECHO}},
            )
            serve.write(self.control, "address", records.uid(pod.name, pod.namespace), packed)

    def serve_control(self) -> None:
        argv = [sys.executable, "-m", "tests.xds.serve", str(self.control), str(self.ca_dir)]
        program = Program(
            self.directory, "istiod", self.node_netns(1), [*argv, "0.0.0.0", str(PORT)]
        )
        self.servers["istiod"] = program
        program.wait_event("serving", limit_s=20.0)

    def prepare(self) -> None:
        """The CA, the resources and the control plane; agents can be started then."""
        self.make_ca()
        self.control.mkdir()
        self.tell()
        self.serve_control()
