"""The controller of waypoints on a real kube-apiserver, with the chart's rights and no others."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meshbpf.agent.core.kube_mesh import KINDS
from meshbpf.agent.l7.kinds import KINDS as L7_KINDS
from meshbpf.agent.runtime.kubernetes import plural
from tests.peers.kube_apiserver import KubeApiServer, api_server, free_ports, missing
from tests.peers.test_waypoint_kubernetes import BUILT_IN, is_ready
from tests.progs.chart import RBAC, controller_rules, definitions, rules
from tests.progs.chart import WAYPOINT_ROLE as ROLE
from tests.progs.program import BedError, eventually
from tests.testbed import MESHBPF
from tests.waypoint.bed import an_object, route, to

pytestmark = pytest.mark.peer

GATEWAY_API = "gateway.networking.k8s.io"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApiServer]:
    if reason := missing():
        pytest.skip(reason)
    with api_server(tmp_path_factory.mktemp("kube")) as server:
        server.apply(*definitions())
        for group, version, kind in (*KINDS, *L7_KINDS):
            if group not in BUILT_IN and kind != "RateLimit":
                server.add_kind(group, kind, plural(kind), version, status=True)
        server.grant("controller", controller_rules())
        role = an_object("ClusterRole", ROLE, group=RBAC, namespace="", rules=rules("waypoint"))
        binding = an_object(
            "ClusterRoleBinding",
            ROLE,
            group=RBAC,
            namespace="",
            roleRef={"apiGroup": RBAC, "kind": "ClusterRole", "name": ROLE},
        )
        server.apply(
            role,
            binding,
            an_object("Namespace", "apps", namespace=""),
            an_object("Namespace", "meshbpf-system", namespace=""),
            an_object(
                "Service",
                "echo",
                labels={"istio.io/use-waypoint": "waypoint"},
                spec={"ports": [{"name": "http", "port": 80}], "selector": {"app": "echo"}},
            ),
        )
        yield server


class Replica:
    """One process of the controller."""

    def __init__(self, server: KubeApiServer, folder: Path, name: str) -> None:
        self.log = folder / f"{name}.log"
        (self.ready_port,) = free_ports(1)
        argv = [str(MESHBPF), "waypoint-controller", "--image", "registry.example/meshbpf:1"]
        argv += ["--ca", "https://istiod.istio-system.svc:15012", "--role", ROLE]
        argv += ["--kubeconfig", str(server.agent_kubeconfig), "--identity", name]
        argv += ["--readiness-port", str(self.ready_port)]
        with self.log.open("wb") as file:
            self._process = subprocess.Popen(argv, stderr=file, stdin=subprocess.DEVNULL)

    @property
    def leads(self) -> bool:
        return "\tleading\t" in self.log.read_text()

    def end(self) -> int:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(10)
        return self.kill()

    def kill(self) -> int:
        self._process.kill()
        return self._process.wait()


@pytest.fixture
def controller(server: KubeApiServer, tmp_path: Path) -> Iterator[Replica]:
    replica = Replica(server, tmp_path, "one")
    try:
        eventually("it leads", lambda: replica.leads, 40.0)
        yield replica
    finally:
        replica.end()


def get(server: KubeApiServer, kind: str, name: str, namespace: str = "apps") -> dict[str, Any]:
    done = server.kubectl("get", kind, name, "-n", namespace, "-o", "json", check=False)
    found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def conditions(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {one["type"]: (one["status"], one["reason"]) for one in status.get("conditions", ())}


def gateway(name: str, *, port: int = 15008) -> dict[str, Any]:
    listener = {"name": "mesh", "port": port, "protocol": "HBONE"}
    spec = {"gatewayClassName": "meshbpf-waypoint", "listeners": [listener]}
    return an_object("Gateway", name, group=GATEWAY_API, spec=spec)


def pod_of(server: KubeApiServer, name: str) -> dict[str, Any]:
    """The Pod that the cluster's own controllers would make of the Deployment."""
    template = get(server, "deployment", name)["spec"]["template"]
    spec = template["spec"] | {"serviceAccountName": None, "serviceAccount": None}
    spec = {key: value for key, value in spec.items() if value is not None}
    spec["containers"] = [
        {key: one[key] for key in ("name", "image", "args")} for one in spec["containers"]
    ]
    spec.pop("volumes")
    pod = an_object("Pod", f"{name}-0", spec=spec)
    pod["metadata"]["labels"] = template["metadata"]["labels"]
    ready = [{"type": "Ready", "status": "True"}]
    address = "198.18.7.7"
    pod["status"] = {"phase": "Running", "podIP": address, "conditions": ready}
    pod["status"]["podIPs"] = [{"ip": address}]
    return pod


def test_a_gateway_becomes_a_waypoint_and_routes_and_policies_are_judged(
    server: KubeApiServer, controller: Replica
) -> None:
    eventually("it is ready", lambda: is_ready(controller.ready_port), 20.0)
    eventually("the class", lambda: bool(get(server, "gatewayclass", "meshbpf-waypoint")), 10.0)
    server.apply(gateway("waypoint"))
    eventually("its deployment", lambda: bool(get(server, "deployment", "waypoint")), 10.0)
    service = get(server, "service", "waypoint")
    assert service["metadata"]["labels"]["istio.io/use-waypoint"] == "none"
    template = get(server, "deployment", "waypoint")["spec"]["template"]
    assert template["metadata"]["labels"]["istio.io/dataplane-mode"] == "none"
    owner = service["metadata"]["ownerReferences"][0]
    assert owner["uid"] == get(server, "gateway", "waypoint")["metadata"]["uid"]
    subjects = get(server, "clusterrolebinding", ROLE).get("subjects")
    assert subjects == [{"kind": "ServiceAccount", "name": "waypoint", "namespace": "apps"}]

    def status() -> dict[str, Any]:
        found: dict[str, Any] = get(server, "gateway", "waypoint").get("status", {})
        return found

    eventually("conditions", lambda: "Programmed" in conditions(status()), 10.0)
    assert conditions(status())["Programmed"] == ("False", "AddressNotAssigned")
    assert not status().get("addresses")

    server.apply(pod_of(server, "waypoint"))
    eventually("addresses", lambda: bool(status().get("addresses")), 10.0)
    assert status()["addresses"] == [
        {"type": "Hostname", "value": "waypoint.apps.svc.cluster.local"},
        *({"type": "IPAddress", "value": ip} for ip in service["spec"]["clusterIPs"]),
    ]
    assert conditions(status())["Programmed"] == ("True", "Programmed")
    (listener,) = status()["listeners"]
    assert conditions(listener)["ResolvedRefs"] == ("True", "ResolvedRefs")

    # A pod that goes takes no address away: traffic must not go round the waypoint.
    server.kubectl("delete", "pod", "waypoint-0", "-n", "apps", "--force")
    server.apply(route("good", to("echo", port=80)), route("bad", to("nobody", port=80)))

    def parents(name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (
            get(server, "httproute", name).get("status", {}).get("parents", [])
        )
        return found

    eventually("both are judged", lambda: bool(parents("good") and parents("bad")), 10.0)
    assert conditions(parents("good")[0]) == {
        "Accepted": ("True", "Accepted"),
        "ResolvedRefs": ("True", "ResolvedRefs"),
    }
    assert conditions(parents("bad")[0])["ResolvedRefs"] == ("False", "BackendNotFound")
    assert status()["addresses"]

    targets = [{"group": "", "kind": "Service", "name": "echo"}]
    policy = {"targetRefs": targets, "action": "DENY", "rules": [{"to": [{"operation": {}}]}]}
    group = "security.istio.io"
    server.apply(an_object("AuthorizationPolicy", "denied", group=group, spec=policy))

    def judged(kind: str, name: str) -> dict[str, tuple[str, str]]:
        return conditions(get(server, kind, name).get("status", {}))

    eventually("the policy is judged", lambda: bool(judged("authorizationpolicy", "denied")), 10.0)
    assert "meshbpf.io/WaypointAccepted" in judged("authorizationpolicy", "denied")

    def limit(per: str) -> dict[str, Any]:
        spec = {"requests": 5, "per": per, "targetRefs": targets}
        return an_object("RateLimit", "few", group="meshbpf.io", version="v1alpha1", spec=spec)

    with pytest.raises(BedError, match="Fortnight"):
        server.apply(limit("Fortnight"))
    server.apply(limit("Minute"))
    eventually("the limit is judged", lambda: bool(judged("ratelimit", "few")), 10.0)
    assert judged("ratelimit", "few")["meshbpf.io/WaypointAccepted"][0] == "True"


def test_what_somebody_changes_or_deletes_is_put_back(
    server: KubeApiServer, controller: Replica
) -> None:
    server.apply(gateway("kept"))
    eventually("its deployment", lambda: bool(get(server, "deployment", "kept")), 10.0)
    change = {
        "spec": {"template": {"spec": {"containers": [{"name": "waypoint", "image": "x:9"}]}}}
    }
    server.kubectl("patch", "deployment", "kept", "-n", "apps", "-p", json.dumps(change))
    server.kubectl("scale", "deployment", "kept", "-n", "apps", "--replicas=3")
    server.kubectl("delete", "service", "kept", "-n", "apps")
    eventually("the service is back", lambda: bool(get(server, "service", "kept")), 10.0)

    def image() -> str:
        spec = get(server, "deployment", "kept")["spec"]
        assert spec["replicas"] == 3  # the count is an autoscaler's to set
        return str(spec["template"]["spec"]["containers"][0]["image"])

    eventually("its image", lambda: image() == "registry.example/meshbpf:1", 10.0)
    # Nothing is applied again and again.
    time.sleep(1)
    version = get(server, "deployment", "kept")["metadata"]["resourceVersion"]
    lines = len(controller.log.read_text().splitlines())
    time.sleep(3)
    assert get(server, "deployment", "kept")["metadata"]["resourceVersion"] == version
    assert len(controller.log.read_text().splitlines()) == lines
    server.kubectl("delete", "gateway", "kept", "-n", "apps")


def test_a_gateway_that_cannot_be_a_waypoint_says_why(
    server: KubeApiServer, controller: Replica
) -> None:
    server.apply(gateway("odd", port=80))

    def status() -> dict[str, tuple[str, str]]:
        return conditions(get(server, "gateway", "odd").get("status", {}))

    eventually("it is refused", lambda: bool(status()), 10.0)
    assert status()["Accepted"] == ("False", "ListenersNotValid")
    server.kubectl("delete", "gateway", "odd", "-n", "apps")


def test_of_two_replicas_one_leads_and_the_other_takes_over(
    server: KubeApiServer, controller: Replica, tmp_path: Path
) -> None:
    second = Replica(server, tmp_path, "two")
    try:
        eventually("it is ready", lambda: is_ready(second.ready_port), 30.0)
        time.sleep(3)
        assert not second.leads
        assert controller.end() == 0
        # Given back at an orderly end: nobody waits for it to run out.
        eventually("the second leads", lambda: second.leads, 8.0)
        third = Replica(server, tmp_path, "three")
        try:
            eventually("it is ready", lambda: is_ready(third.ready_port), 30.0)
            second.kill()
            killed = time.monotonic()
            eventually("the third leads", lambda: third.leads, 40.0)
            # Not before the lease of the one that was killed has run out.
            assert time.monotonic() - killed > 8
        finally:
            third.end()
    finally:
        second.kill()
