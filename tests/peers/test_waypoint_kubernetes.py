"""A waypoint that follows a real kube-apiserver, with rights to read and no others."""

from __future__ import annotations

import contextlib
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshbpf.agent.core.kube_mesh import KINDS
from meshbpf.agent.l7.kinds import KINDS as L7_KINDS
from meshbpf.agent.runtime.kubernetes import plural
from tests.peers.kube_apiserver import KubeApiServer, api_server, free_ports, missing
from tests.progs.kube_objects import pod_object
from tests.progs.pod import Pod
from tests.progs.program import eventually
from tests.testbed import MESHBPF
from tests.waypoint.bed import an_object, route, to

pytestmark = pytest.mark.peer

BUILT_IN = ("", "discovery.k8s.io")
VIP = "198.19.1.1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApiServer]:
    if reason := missing():
        pytest.skip(reason)
    with api_server(tmp_path_factory.mktemp("kube")) as server:
        kinds = [*KINDS, *L7_KINDS]
        for group, version, kind in kinds:
            # The cluster of this test does without the rate limit.
            if group not in BUILT_IN and kind != "RateLimit":
                server.add_kind(group, kind, plural(kind), version)
        rules = [
            {"apiGroups": [group], "resources": [plural(kind)], "verbs": ["get", "list", "watch"]}
            for group, _version, kind in (*kinds, ("", "v1", "ConfigMap"))
        ]
        server.grant("waypoint", rules)
        server.apply(*objects())
        yield server


OWN = Pod("wp", "", 1, 9, "waypoint", captured=False)


def objects() -> list[dict[str, Any]]:
    """A bound service, and its waypoint: with the address that a controller writes, and a pod."""
    listener = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
    spec = {"gatewayClassName": "meshbpf-waypoint", "listeners": [listener]}
    status = {"addresses": [{"type": "IPAddress", "value": VIP}]}
    group = "gateway.networking.k8s.io"
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    own = {"gateway.networking.k8s.io/gateway-name": "waypoint"}
    hbone = [{"name": "mesh", "port": 15008}]
    pod = pod_object(OWN)
    pod["metadata"]["labels"] = own
    return [
        an_object("Namespace", "apps", namespace=""),
        an_object("Gateway", "waypoint", group=group, spec=spec, status=status),
        an_object(
            "Service",
            "echo",
            labels={"istio.io/use-waypoint": "waypoint"},
            spec={"ports": ports, "selector": {"app": "echo"}},
        ),
        an_object("Service", "waypoint", spec={"clusterIP": VIP, "ports": hbone, "selector": own}),
        pod,
    ]


@pytest.fixture
def waypoint(server: KubeApiServer, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Its log, and the port of readiness."""
    ca_dir, log = tmp_path / "ca", tmp_path / "waypoint.log"
    subprocess.run([str(MESHBPF), "ca", "init", str(ca_dir)], check=True, capture_output=True)
    hbone, ready = free_ports(2)
    argv = [str(MESHBPF), "waypoint", "--name", "apps/waypoint", "--kubernetes"]
    argv += ["--kubeconfig", str(server.agent_kubeconfig), "--ca-dir", str(ca_dir)]
    argv += ["--state-dir", str(tmp_path / "state"), "--stats-port", "0"]
    argv += ["--address", OWN.ipv4, "--hbone-port", str(hbone), "--readiness-port", str(ready)]
    with log.open("wb") as file:
        process = subprocess.Popen(argv, stderr=file, stdin=subprocess.DEVNULL)
        try:
            yield log, ready
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def plans(log: Path) -> list[tuple[int, int]]:
    """(version, services) of each plan."""
    found = re.findall(r"plan in force\tversion=(\d+) services=(\d+)", log.read_text())
    return [(int(version), int(services)) for version, services in found]


def test_what_kubectl_applies_is_in_the_plan_and_what_is_bad_is_told(
    server: KubeApiServer, waypoint: tuple[Path, int]
) -> None:
    log, port = waypoint
    eventually("the waypoint is ready", lambda: is_ready(port), 30.0)
    eventually("the service that is bound to it", lambda: plans(log)[-1:] == [(1, 1)], 10.0)
    assert "the cluster does not have this kind\tkind=ratelimits" in log.read_text()

    before = plans(log)[-1][0]
    server.apply(route("good", to("echo", port=80)))
    eventually("the route is in force", lambda: plans(log)[-1][0] > before, 10.0)
    assert "not in force as written" not in log.read_text()

    server.apply(route("bad", to("nobody", port=80)))
    eventually("the bad one is told", lambda: "apps/bad" in log.read_text(), 10.0)

    server.kubectl("delete", "service", "echo", "-n", "apps")
    eventually("nothing is served any more", lambda: plans(log)[-1][1] == 0, 10.0)
