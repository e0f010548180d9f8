"""Requests, connections and objects for tests of the waypoint's filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.authority import parse_authority
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.objects import KubeObject, ObjectKey, ObjectSet
from meshbpf.agent.core.service import Service
from meshbpf.agent.l7.exchange import Caller, Connection, Destination, Exchange, Protocol
from meshbpf.agent.l7.filter import CONTINUE, Command, Outcome, Steps
from meshbpf.agent.l7.message import Headers, RequestHead
from meshbpf.agent.l7.sources import Scope

WEB = SpiffeId("cluster.local", "shop", "web")
ECHO = Service(name="echo", namespace="shop", hostname="echo.shop.svc.cluster.local")


def an_object(
    group: str,
    kind: str,
    name: str,
    spec: Any,
    *,
    namespace: str = "shop",
    annotations: Mapping[str, str] | None = None,
    **body: Any,
) -> KubeObject:
    metadata = {"name": name, "namespace": namespace, "annotations": dict(annotations or {})}
    key = ObjectKey(group, kind, namespace, name)
    return KubeObject(key, "v1", {"metadata": metadata, "spec": spec, **body}, f"{name}.yaml:1")


GATEWAY = an_object(
    "gateway.networking.k8s.io", "Gateway", "waypoint", {"gatewayClassName": "meshbpf-waypoint"}
)


def a_scope(*objects: KubeObject, service: Service | None = ECHO) -> Scope:
    return Scope(ObjectSet.of((GATEWAY, *objects)), GATEWAY, service, "cluster.local")


def a_connection(
    *,
    identity: SpiffeId | None = WEB,
    source: str = "198.18.1.1:40000",
    destination: str = "198.18.9.9:80",
    protocol: Protocol = Protocol.HTTP1,
) -> Connection:
    address = SocketAddress.parse(destination)
    caller = Caller(identity, SocketAddress.parse(source))
    to = Destination(parse_authority(destination), address.port, ECHO, None, address)
    return Connection(caller, to, protocol)


def an_exchange(
    method: str = "GET",
    path: str = "/",
    authority: str = "echo",
    headers: Mapping[str, str] | None = None,
    *,
    connection: Connection | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Exchange:
    raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
    return Exchange(
        connection or a_connection(),
        RequestHead(method, path, authority, Headers(raw)),
        Protocol.HTTP1,
        started_s=10.0,
        started_wall_s=1_790_000_000.0,
        attributes=dict(attributes or {}),
    )


def drive(step: Outcome | Steps, *answers: Any) -> tuple[Outcome, list[Command]]:
    """Run a hook to its end, giving it `answers` in order; its outcome and its commands."""
    commands: list[Command] = []
    if not hasattr(step, "send"):
        assert not answers
        return step, commands
    left = list(answers)
    try:
        commands.append(next(step))
        while True:
            commands.append(step.send(left.pop(0)))
    except StopIteration as end:
        assert not left, f"answers that nobody asked for: {left}"
        return end.value or CONTINUE, commands
