"""A Gateway of our class under a real istiod: controller, binding, and requests through it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.bed import ADDRESS, ClusterBed
from tests.cluster.control_plane import NAME, missing
from tests.progs.chart import RBAC, controller_rules, rules
from tests.progs.chart import WAYPOINT_ROLE as ROLE
from tests.progs.program import Program, eventually
from tests.testbed import MESHBPF
from tests.waypoint.bed import Answer, Inside, an_object, read

pytestmark = [pytest.mark.peer, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

GATEWAY_API = "gateway.networking.k8s.io"
SYSTEM, CONTROLLER = "meshbpf-system", "waypoint-controller"
WAYPOINT = "waypoint"


def rights() -> list[dict[str, Any]]:
    """What the chart gives the controller and its waypoints."""
    account = {"kind": "ServiceAccount", "name": CONTROLLER, "namespace": SYSTEM}
    found = [
        an_object("Namespace", SYSTEM, namespace=""),
        an_object("ServiceAccount", CONTROLLER, namespace=SYSTEM),
        _of_cluster("ClusterRole", ROLE, rules=rules("waypoint")),
        _of_cluster("ClusterRole", CONTROLLER, rules=controller_rules()),
    ]
    for name, subjects in ((ROLE, []), (CONTROLLER, [account])):
        role = {"apiGroup": RBAC, "kind": "ClusterRole", "name": name}
        binding = _of_cluster("ClusterRoleBinding", name, roleRef=role)
        found.append(binding | ({"subjects": subjects} if subjects else {}))
    return found


def _of_cluster(kind: str, name: str, **body: Any) -> dict[str, Any]:
    return an_object(kind, name, group=RBAC, namespace="", **body)


class WaypointCluster:
    """The cluster with a controller; the test stands in for kubelet and Deployment controller."""

    def __init__(self, bed: ClusterBed) -> None:
        self.bed = bed
        self.namespace = bed["n1a"].namespace
        self.pod = bed.make_pod("wp", 2, WAYPOINT, captured=False)

    def start_controller(self) -> None:
        bed = self.bed
        bed.cluster.apply(*rights())
        config = bed.cluster.account_kubeconfig(SYSTEM, CONTROLLER)
        argv = [str(MESHBPF), "waypoint-controller", "--image", "registry.example/meshbpf:1"]
        argv += ["--ca", ADDRESS, "--ca-name", NAME, "--role", ROLE, "--kubeconfig", str(config)]
        argv += ["--readiness-port", "15121"]  # the agent of this node has the usual one
        bed.servers["controller"] = Program(bed.directory, "controller", bed.node_netns(1), argv)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        argv = ("get", kind, name, "-n", self.namespace, "-o", "json")
        done = self.bed.cluster.kubectl(*argv, check=False)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return found

    def run_pod(self) -> None:
        """Make the Pod of the Deployment, and run what its container says in its netns."""
        template = self.get("deployment", WAYPOINT)["spec"]["template"]
        (container,) = template["spec"]["containers"]
        named = {key: container[key] for key in ("name", "image", "args")}
        account = template["spec"]["serviceAccountName"]
        self.bed.cluster.apply(
            an_object(
                "Pod",
                "waypoint-0",
                namespace=self.namespace,
                labels=template["metadata"]["labels"],
                spec={
                    "nodeName": "node2",
                    "serviceAccountName": account,
                    "containers": [named],
                },
            )
        )
        cluster = self.bed.cluster
        token = cluster.pod_token(self.namespace, account, "waypoint-0")
        mounted = {
            "--address=$(POD_IP)": f"--address={self.pod.ipv4}",
            "--ca-root=/var/run/secrets/istio/root-cert.pem": f"--ca-root={cluster.root_file}",
            "--token-file=/var/run/secrets/tokens/istio-token": f"--token-file={token}",
            "--state-dir=/run/meshbpf": f"--state-dir={self.bed.directory / 'waypoint'}",
        }
        argv = [mounted.pop(arg, arg) for arg in container["args"]]
        assert not mounted
        config = cluster.account_kubeconfig(self.namespace, account)
        program = ["env", f"KUBECONFIG={config}", str(MESHBPF), *argv]
        self.bed.servers["waypoint"] = Program(
            self.bed.directory, "waypoint", self.pod.netns, program
        )

    def report_ready(self) -> None:
        """What a kubelet says of it, once its probe is answered."""

        def ready() -> bool:
            conn = Inside(self.pod, "127.0.0.1", 15021)
            try:
                conn.request("GET", "/healthz/ready")
                return conn.getresponse().status == 200
            except OSError:
                return False
            finally:
                conn.close()

        eventually("the waypoint is ready", ready, 30.0)
        addresses = [{"ip": self.pod.ipv4}]
        status = {
            "phase": "Running",
            "podIP": self.pod.ipv4,
            "podIPs": addresses,
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        self.bed.cluster.kubectl(
            *("patch", "pod", "waypoint-0", "-n", self.namespace, "--subresource=status"),
            *("--type=merge", "-p", json.dumps({"status": status})),
        )

    def request(self, address: str, path: str) -> Answer:
        conn = Inside(self.bed["n1a"], address, 80)
        try:
            conn.request("GET", path, headers={"Host": "echo"})
            return read(conn)
        finally:
            conn.close()

    def counted(self) -> float:
        """Requests that the waypoint says it has served."""
        conn = Inside(self.pod, "127.0.0.1", 15020)
        try:
            conn.request("GET", "/metrics")
            text = conn.getresponse().read().decode()
        finally:
            conn.close()
        lines = [line for line in text.splitlines() if line.startswith("istio_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.fixture(scope="module")
def cluster(bed: ClusterBed) -> Iterator[WaypointCluster]:
    made = WaypointCluster(bed)
    backend = bed["n2a"]
    argv = [sys.executable, "-m", "tests.progs.web", "--name", "echo"]
    bed.servers["web"] = Program(bed.directory, "web", backend.netns, argv)
    bed.servers["web"].wait_event("ready")
    made.start_controller()
    yield made
    bed.cluster.kubectl("delete", "gateway", WAYPOINT, "-n", made.namespace, check=False)


def conditions(status: dict[str, Any]) -> dict[str, str]:
    return {one["type"]: one["status"] for one in status.get("conditions", ())}


def test_a_gateway_of_our_class_stands_before_a_service_and_its_policy_decides(
    bed: ClusterBed, cluster: WaypointCluster
) -> None:
    space = cluster.namespace
    listener = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
    gateway = {"gatewayClassName": "meshbpf-waypoint", "listeners": [listener]}
    ports = [{"name": "http", "port": 80, "targetPort": 8080}]
    bed.cluster.apply(
        an_object(
            "Service",
            "echo",
            namespace=space,
            labels={"istio.io/use-waypoint": WAYPOINT},
            spec={"selector": {"app": "n2a"}, "ports": ports},
        ),
        an_object("Gateway", WAYPOINT, group=GATEWAY_API, namespace=space, spec=gateway),
    )
    eventually("the deployment", lambda: bool(cluster.get("deployment", WAYPOINT)), 40.0)
    assert not cluster.get("gateway", WAYPOINT).get("status", {}).get("addresses")
    cluster.run_pod()
    cluster.report_ready()

    def addresses() -> list[dict[str, str]]:
        found: list[dict[str, str]] = cluster.get("gateway", WAYPOINT)["status"].get(
            "addresses", []
        )
        return found

    eventually("the gateway has an address", lambda: bool(addresses()), 20.0)
    assert addresses()[0]["value"] == f"{WAYPOINT}.{space}.svc.cluster.local"

    vip = cluster.get("service", "echo")["spec"]["clusterIP"]

    def passes() -> bool:
        before = cluster.counted()
        answer = cluster.request(vip, "/hello")
        return (answer.status, answer.name) == (200, "echo") and cluster.counted() > before

    eventually("istiod has bound the service, and a request passes the waypoint", passes, 30.0)

    targets = [{"group": "", "kind": "Service", "name": "echo"}]
    denied = {"targetRefs": targets, "action": "DENY"}
    denied["rules"] = [{"to": [{"operation": {"paths": ["/secret"]}}]}]
    group = "security.istio.io"
    bed.cluster.apply(
        an_object("AuthorizationPolicy", "no-secret", group=group, namespace=space, spec=denied)
    )
    eventually("it is denied", lambda: cluster.request(vip, "/secret").status == 403, 15.0)
    assert cluster.request(vip, "/hello").status == 200
    status = cluster.get("authorizationpolicy", "no-secret").get("status", {})
    assert conditions(status)["meshbpf.io/WaypointAccepted"] == "True"

    bed.cluster.kubectl("delete", "authorizationpolicy", "no-secret", "-n", space)
    eventually("it is let in", lambda: cluster.request(vip, "/secret").status == 200, 15.0)
