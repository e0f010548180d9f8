"""A small mesh with routes from YAML, and what becomes of requests in it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from ipaddress import ip_address
from textwrap import dedent
from typing import Any

import yaml

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.authority import HostPort
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.l7.exchange import Caller, Connection, Destination, Exchange, Protocol
from meshbpf.agent.l7.filter import Reply
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.plan import WaypointPlan
from meshbpf.agent.l7.planner import Planner
from meshbpf.agent.l7.router import Forward, choose, decide

DOMAIN = "svc.cluster.local"
PORTS = {80: 8080, 8080: 8080, 7070: 7070, 9090: 9090}


def service(place: str) -> Service:
    namespace, _, name = place.partition("/")
    return Service(name, namespace, f"{name}.{namespace}.{DOMAIN}", ports=PORTS)


MESH = Snapshot.of(
    MeshState(services=tuple(map(service, ("shop/echo", "shop/v1", "shop/v2", "other/far"))))
)


def objects(text: str) -> ObjectSet:
    """From YAML documents."""
    found = []
    for body in yaml.safe_load_all(dedent(text)):
        group, _, version = body["apiVersion"].rpartition("/")
        metadata = body["metadata"]
        key = ObjectKey(group, body["kind"], metadata.get("namespace", ""), metadata["name"])
        found.append(KubeObject(key, version, body, "test.yaml"))
    return ObjectSet.of(found)


def route(
    rules: str,
    *,
    kind: str = "HTTPRoute",
    parent: str = "{kind: Service, group: '', name: echo}",
    place: str = "shop/r",
    created: str = "2026-01-01T00:00:00Z",
) -> str:
    namespace, _, name = place.partition("/")
    head = f"""
        apiVersion: gateway.networking.k8s.io/v1
        kind: {kind}
        metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: "{created}"}}
        spec:
          parentRefs: [{parent}]
          rules:
    """
    return (
        dedent(head).rstrip()
        + "\n"
        + "\n".join(f"  {line}" for line in dedent(rules).strip("\n").splitlines())
        + "\n"
    )


def plan(*texts: str, planner: Planner | None = None, mesh: Snapshot = MESH) -> WaypointPlan:
    found = objects("\n---\n".join(map(dedent, texts)))
    planner = planner or Planner("shop", "waypoint", sources=())
    return planner.plan(found, mesh, lambda each: each.namespace == "shop")


def exchange(
    target: str = "/",
    *,
    method: str = "GET",
    host: str = "echo",
    caller: str = "shop",
    port: int = 80,
    to: str = "shop/echo",
    **headers: str,
) -> Exchange:
    fields = Headers((k.replace("_", "-").encode(), v.encode()) for k, v in headers.items())
    wanted = service(to)
    connection = Connection(
        Caller(
            SpiffeId("cluster.local", caller, "client"),
            SocketAddress(ip_address("198.51.100.1"), 4000),
        ),
        Destination(HostPort(wanted.hostname, port), port, wanted),
        Protocol.HTTP1,
    )
    head = RequestHead(method, target, host, fields)
    return Exchange(connection, head, Protocol.HTTP1, started_s=100.0, started_wall_s=0.0)


@dataclass(frozen=True)
class Outcome:
    """Where the request goes, or what it is answered."""

    backend: str
    status: int
    exchange: Exchange
    answer: Any

    @property
    def location(self) -> str:
        return dict(self.answer.headers)["location"]


def ask(made: WaypointPlan, asked: Exchange, rng: random.Random | None = None) -> Outcome:
    wanted = asked.destination.service
    assert wanted is not None
    port = made.services[wanted.key].ports[asked.destination.port]
    chosen = choose(port.routes_for(asked.caller.namespace), asked)
    answer = decide(chosen, asked, rng or random.Random(1))
    if isinstance(answer, Reply):
        return Outcome("", answer.status, asked, answer)
    assert isinstance(answer, Forward)
    return Outcome(answer.backend.service.hostname.split(".")[0], 0, asked, answer)
