"""Two nodes whose pods reach services through a waypoint that runs in a pod of its own.

Namespace `apps` has the pods n1a (client), n2a and n2b (the services' echo-v1
and echo-v2), n2x (not in the mesh, echo-v3) and the waypoint; n1b is a client
of the namespace `consumer`. Objects that a test brings are added to the
manifests that agents and waypoint read alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Self

import yaml

from tests.progs.inside import inside
from tests.progs.kube_objects import AMBIENT, pod_object, service_object
from tests.progs.pod import NAMESPACE, Pod
from tests.progs.program import BedError, Program, eventually
from tests.testbed import MESHBPF, Testbed

CONSUMER = "consumer"
PORTS = [
    {"name": "http", "port": 80, "appProtocol": "http", "targetPort": 8080},
    {"name": "http-alt", "port": 8080, "appProtocol": "http"},
    {"name": "tcp", "port": 9090},
    {"name": "grpc", "port": 7070},
    {"name": "guess", "port": 8081, "targetPort": 8080},
    {"name": "quiet", "port": 9091, "targetPort": 9090},
]
_BASE = ("echo", "echo-v1", "echo-v2", "echo-v3", "away", "gone")
SERVICES = {name: number for number, name in enumerate(_BASE, 1)}
"""Name to the last number of its virtual address."""
BACKENDS = {"n2a": "echo-v1", "n2b": "echo-v2", "n2x": "echo-v3"}


def vip(service: str) -> str:
    return f"198.19.100.{SERVICES[service]}"


def a_service(name: str, number: int, **selector: str) -> dict[str, Any]:
    """One more service of the same pods, for a test that has routes of its own."""
    SERVICES[name] = number
    spec = {
        "selector": {"group": "echo", **selector},
        "clusterIP": f"198.19.100.{number}",
        "ports": PORTS,
    }
    return an_object("Service", name, labels={"istio.io/use-waypoint": "waypoint"}, spec=spec)


def an_object(
    kind: str,
    name: str,
    *,
    group: str = "",
    version: str = "v1",
    namespace: str = NAMESPACE,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    **body: Any,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if namespace:
        metadata["namespace"] = namespace
    if labels:
        metadata["labels"] = labels
    if annotations:
        metadata["annotations"] = annotations
    api = f"{group}/{version}" if group else version
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **body}


def route(
    name: str,
    *rules: dict[str, Any],
    parent: str = "echo",
    port: int | None = 80,
    kind: str = "HTTPRoute",
    namespace: str = NAMESPACE,
) -> dict[str, Any]:
    ref: dict[str, Any] = {"group": "", "kind": "Service", "name": parent, "namespace": NAMESPACE}
    if port is not None:
        ref["port"] = port
    spec = {"parentRefs": [ref], "rules": list(rules)}
    group = "gateway.networking.k8s.io"
    return an_object(kind, name, group=group, namespace=namespace, spec=spec)


def to(*backends: str, port: int = 8080, **more: Any) -> dict[str, Any]:
    """A rule to these backends, `name` or `name=weight`."""
    refs = []
    for each in backends:
        name, _, weight = each.partition("=")
        refs.append({"name": name, "namespace": NAMESPACE, "port": port})
        if weight:
            refs[-1]["weight"] = int(weight)
    return {"backendRefs": refs, **more}


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response: status, headers, and what the backend has said of the request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def name(self) -> str:
        return str(self.said["name"])


class WaypointBed(Testbed):
    """See the module."""

    def __init__(self, tag: str) -> None:
        super().__init__(tag, manifests=True)
        self.extra: list[dict[str, Any]] = []
        self.gone_pods: set[str] = set()
        """Pods that the objects do not name at the moment."""
        self.waypoint: Program | None = None

    def _build(self) -> None:
        super()._build()
        self.pods["n1b"] = dataclasses.replace(self.pods["n1b"], namespace=CONSUMER)
        self.make_pod("wp", 2, "waypoint", captured=False)
        self.write_mesh()

    # --- objects ----------------------------------------------------------------

    def write_mesh(self) -> None:
        self.mesh_file.parent.mkdir(exist_ok=True)
        # Read by the waypoint, which has no right of root.
        self.directory.chmod(0o755)
        text = yaml.safe_dump_all([*self._objects(), *self.extra], sort_keys=False)
        if self.mesh_file.exists() and self.mesh_file.read_text() == text:
            return
        fresh = self.mesh_file.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.mesh_file)

    def _objects(self) -> Iterator[dict[str, Any]]:
        for namespace in (NAMESPACE, CONSUMER):
            yield an_object("Namespace", namespace, namespace="", labels=dict(AMBIENT))
        for pod in self.pods.values():
            if pod.name in self.gone_pods:
                continue
            found = pod_object(pod)
            metadata = found["metadata"]
            metadata["namespace"] = pod.namespace
            if pod.name == "wp":
                metadata["labels"]["gateway.networking.k8s.io/gateway-name"] = "waypoint"
            elif pod.name in BACKENDS:
                metadata["labels"] |= {"group": "echo", "version": BACKENDS[pod.name]}
            yield found
            own = service_object(pod)
            own["metadata"]["namespace"] = pod.namespace
            yield own
        yield from self._services()
        listener = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
        spec = {"gatewayClassName": "meshbpf-waypoint", "listeners": [listener]}
        group = "gateway.networking.k8s.io"
        yield an_object("Gateway", "waypoint", group=group, spec=spec)

    def _services(self) -> Iterator[dict[str, Any]]:
        use = {"istio.io/use-waypoint": "waypoint"}
        for name in _BASE:
            selector = {"group": "echo"}
            if name != "echo":
                selector["version"] = name
            if name == "gone":
                selector = {"group": "nobody"}
            if name == "away":  # not bound to the waypoint
                selector["version"] = "echo-v1"
            spec = {"selector": selector, "clusterIP": vip(name), "ports": PORTS}
            labels = {} if name == "away" else use
            yield an_object("Service", name, labels=dict(labels), spec=spec)
        spec = {
            "selector": {"gateway.networking.k8s.io/gateway-name": "waypoint"},
            "clusterIP": "198.19.100.100",
            "ports": [{"name": "mesh", "port": 15008}],
        }
        yield an_object("Service", "waypoint", labels={"istio.io/use-waypoint": "none"}, spec=spec)

    @contextlib.contextmanager
    def objects(self, *extra: dict[str, Any]) -> Iterator[None]:
        """These objects too, in force for agents and waypoint while the block runs."""
        self.extra += extra
        self.apply()
        try:
            yield
        finally:
            for each in extra:
                self.extra.remove(each)
            self.apply()

    def apply(self) -> None:
        """Write the objects, and wait until the waypoint and the agents go by them."""
        # Its log is written a moment after it is ready.
        eventually("the waypoint's first plan", lambda: self.plans() > 0, 5.0)
        before = self.plans()
        text = self.mesh_file.read_text()
        self.write_mesh()
        if self.mesh_file.read_text() != text:
            eventually("the waypoint has a new plan", lambda: self.plans() > before, 10.0)
            self.wait_mesh()

    def plans(self) -> int:
        """How many plans the waypoint has made."""
        assert self.waypoint is not None
        found = re.findall(r"plan in force\tversion=(\d+)", self.waypoint.log.read_text())
        return int(found[-1]) if found else 0

    # --- processes --------------------------------------------------------------

    def start(self, *options: str, agents: Sequence[str] = ()) -> Self:
        """With `options` of the waypoint's, and those of the agents."""
        self.start_agents(*agents)
        self.start_webs()
        self.attach_all()
        self.start_waypoint(*options)
        return self

    def start_webs(self) -> None:
        for name, service in BACKENDS.items():
            self.start_web(name, service)

    def start_web(self, pod: str, service: str) -> None:
        argv = [sys.executable, "-m", "tests.progs.web", "--name", service]
        web = Program(self.directory, f"web-{pod}", self[pod].netns, argv)
        self.servers[f"web-{pod}"] = web
        web.wait_event("ready")

    def start_waypoint(self, *options: str) -> None:
        argv = [str(MESHBPF), "waypoint", "--name", f"{NAMESPACE}/waypoint"]
        argv += ["--ca-dir", str(self.ca_dir), "--manifests", str(self.mesh_file.parent)]
        argv += ["--state-dir", str(self.directory / "waypoint")]
        for address in (self["wp"].ipv4, self["wp"].ipv6):
            argv += ["--address", address]
        self.waypoint = Program(self.directory, "waypoint", self["wp"].netns, [*argv, *options])
        self.servers["waypoint"] = self.waypoint
        self.wait_waypoint()

    def wait_waypoint(self, limit_s: float = 30.0) -> None:
        def ready() -> bool:
            assert self.waypoint is not None
            if not self.waypoint.running:
                raise BedError(f"the waypoint ended:\n{self.waypoint.tail()}")
            try:
                return self.ask_waypoint(15021, "/healthz/ready")[0] == 200
            except OSError:
                return False

        eventually("the waypoint is ready", ready, limit_s)

    def ask_waypoint(self, port: int, path: str) -> tuple[int, str]:
        """GET from the waypoint's own ports, from within its namespace."""
        conn = Inside(self["wp"], "127.0.0.1", port)
        try:
            conn.request("GET", path)
            answer = conn.getresponse()
            return answer.status, answer.read().decode()
        finally:
            conn.close()

    def metric(self, name: str) -> float:
        for line in self.ask_waypoint(15020, "/metrics")[1].splitlines():
            if line.startswith((f"{name} ", f"{name}{{")):
                return float(line.rpartition(" ")[2])
        raise BedError(f"no metric {name}")

    # --- requests ---------------------------------------------------------------

    def get(
        self,
        host: str = "echo",
        path: str = "/",
        *,
        port: int = 80,
        method: str = "GET",
        client: str = "n1a",
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
        limit_s: float = 10.0,
    ) -> Answer:
        """One request on a connection of its own, by a client pod, to a service's address."""
        address = vip(host) if host in SERVICES else host
        conn = Inside(self[client], address, port, limit_s)
        try:
            asked = {"Host": host if port == 80 else f"{host}:{port}"} | (headers or {})
            conn.request(method, path, body=body, headers=asked)
            return read(conn)
        finally:
            conn.close()


def read(conn: http.client.HTTPConnection) -> Answer:
    answer = conn.getresponse()
    body = answer.read()
    return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, body)


class Inside(http.client.HTTPConnection):
    """An HTTP connection from within a pod."""

    def __init__(self, pod: Pod, host: str, port: int, limit_s: float = 10.0) -> None:
        super().__init__(host, port, timeout=limit_s)
        self._netns = pod.netns

    def connect(self) -> None:
        self.sock = inside_connect(self._netns, self.host, self.port, float(self.timeout or 10.0))


def inside_connect(netns: str, host: str, port: int, limit_s: float = 10.0) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = inside(netns, lambda: socket.socket(family, socket.SOCK_STREAM))
    sock.settimeout(limit_s)
    try:
        sock.connect((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
