"""GRPCRoute, TCPRoute, CORS, sessions of endpoints, rate limits, protocols of ports."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest

from meshbpf.agent.core.route import PlainRoute, Refused
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import NamespacedHostname, Workload
from meshbpf.agent.l7.balancer import EJECTION_S, FAILURES, Balancer, Choice, session_of
from meshbpf.agent.l7.cors import mark
from meshbpf.agent.l7.exchange import Protocol
from meshbpf.agent.l7.filter import Reply
from meshbpf.agent.l7.message import Headers
from meshbpf.agent.l7.plan import WaypointPlan
from meshbpf.agent.l7.planner import Planner
from meshbpf.agent.l7.protocols import declared, declared_by_entry, sniff
from meshbpf.agent.l7.rate_limit import rate_limits
from tests.unit.l7.routed import ask, exchange, objects, plan, route
from tests.unit.l7.test_http_routes import LIMIT

GRPC = route(
    """
    - matches: [{method: {service: shop.Cart, method: Add}}]
      backendRefs: [{name: v1, port: 7070}]
    - matches: [{method: {service: shop.Cart}}]
      backendRefs: [{name: v2, port: 7070}]
    - matches: [{method: {type: RegularExpression, service: "shop\\\\..*"}}]
      backendRefs: [{name: echo, port: 7070}]
    - matches: [{method: {method: Health}}]
      backendRefs: [{name: v2, port: 7070}]
    """,
    kind="GRPCRoute",
)


@pytest.mark.parametrize(
    ("path", "backend", "status"),
    [
        ("/shop.Cart/Add", "v1", 0),
        ("/shop.Cart/Remove", "v2", 0),
        ("/shop.Stock/Add", "echo", 0),
        ("/any.Thing/Health", "v2", 0),
        ("/any.Thing/Add", "", 404),
        ("/shop.CartX/Add", "echo", 0),
    ],
)
def test_grpc_routes_match_service_and_method(path: str, backend: str, status: int) -> None:
    made = plan(GRPC)
    assert made.problems == ()
    answer = ask(made, exchange(path, method="POST", port=7070))
    assert (answer.backend, answer.status) == (backend, status)


def test_the_oldest_tcp_route_wins() -> None:
    one = route(
        "- backendRefs: [{name: v1, port: 9090}]",
        kind="TCPRoute",
        place="shop/a",
        created="2026-03-01T00:00:00Z",
    )
    two = route("- backendRefs: [{name: v2, port: 9090}]", kind="TCPRoute", place="shop/b")
    made = plan(one, two)
    service = exchange().destination.service
    assert service is not None
    tcp = made.services[service.key].ports[9090].producer.tcp
    assert tcp is not None
    assert tcp.backends.every[0].service.hostname.startswith("v2.")


CORS = route(
    """
    - filters:
      - type: CORS
        cors:
          allowOrigins: ["https://*.example.org", "https://one.test"]
          allowMethods: [GET, PUT]
          allowHeaders: [x-a]
          exposeHeaders: [x-b]
          allowCredentials: true
          maxAge: 60
      backendRefs: [{name: v1, port: 80}]
    """
)


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://a.example.org", True),
        ("https://one.test", True),
        ("https://two.test", False),
        ("https://example.org", False),
        ("http://a.example.org", False),
    ],
)
def test_a_preflight_is_answered_without_the_backend(origin: str, allowed: bool) -> None:
    asked = exchange("/", method="OPTIONS", origin=origin, access_control_request_method="PUT")
    answer = ask(plan(CORS), asked)
    assert answer.status == 200
    assert dict(answer.answer.headers) == (
        {
            "access-control-allow-origin": origin,
            "vary": "Origin",
            "access-control-allow-credentials": "true",
            "access-control-allow-methods": "GET, PUT",
            "access-control-allow-headers": "x-a",
            "access-control-max-age": "60",
        }
        if allowed
        else {}
    )
    plain = exchange("/", method="OPTIONS", origin=origin)
    assert ask(plan(CORS), plain).backend == "v1"


def test_an_answer_is_marked_for_allowed_origins_only() -> None:
    cors = ask(plan(CORS), exchange()).answer.rule.filters.cors
    for origin, marked in (("https://one.test", True), ("https://two.test", False)):
        headers = Headers()
        mark(cors, origin, headers)
        assert (headers.get("access-control-allow-origin") == origin) is marked
        assert ("access-control-expose-headers" in headers) is marked


def test_a_rate_limit_counts_each_caller_and_says_when_to_come_again() -> None:
    text = LIMIT.replace("by: Caller", "by: Caller, targetRefs: [{kind: Service, name: echo}]")
    made = plan(text, planner=Planner("shop", "waypoint", sources=(rate_limits,)))
    service = exchange().destination.service
    assert service is not None
    chain = made.services[service.key].chain
    limit = chain.request[-1]
    outcomes = [limit(exchange(caller=each)) for each in ("a", "a", "b", "a")]
    assert [isinstance(each, Reply) for each in outcomes] == [False, False, False, True]
    refused = outcomes[-1]
    assert isinstance(refused, Reply)
    assert (refused.status, dict(refused.headers)["retry-after"]) == (429, "30")


def test_tokens_come_back_with_time() -> None:
    text = LIMIT.replace("by: Caller", "targetRefs: [{kind: Service, name: echo}]")
    made = plan(text, planner=Planner("shop", "waypoint", sources=(rate_limits,)))
    service = exchange().destination.service
    assert service is not None
    limit = made.services[service.key].chain.request[-1]
    asked = exchange()
    assert [isinstance(limit(asked), Reply) for _ in range(3)] == [False, False, True]
    asked.started_s += 31.0
    assert not isinstance(limit(asked), Reply)


@pytest.mark.parametrize(
    ("port", "protocol"),
    [
        ("{port: 1, appProtocol: http}", Protocol.HTTP1),
        ("{port: 1, appProtocol: kubernetes.io/h2c}", Protocol.HTTP2),
        ("{port: 1, appProtocol: mine.example/x, name: http}", Protocol.TCP),
        ("{port: 1, name: grpc-web}", Protocol.HTTP1),
        ("{port: 1, name: grpc-cart}", Protocol.HTTP2),
        ("{port: 1, name: http}", Protocol.HTTP1),
        ("{port: 1, name: tcp-x}", Protocol.TCP),
        ("{port: 1, name: httpx}", None),
        ("{port: 1}", None),
    ],
)
def test_ports_declare_their_protocol(port: str, protocol: Protocol | None) -> None:
    metadata = "{name: s, namespace: n}"
    text = f"{{apiVersion: v1, kind: Service, metadata: {metadata}, spec: {{ports: [{port}]}}}}"
    (about,) = objects(text).by_key.values()
    assert declared(about).get(1) == protocol


def test_the_first_bytes_tell_http_from_the_rest() -> None:
    assert sniff(b"GET / HTTP/1.1\r\n") is Protocol.HTTP1
    assert sniff(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0") is Protocol.HTTP2
    assert sniff(b"PRI * HT") is None
    assert sniff(b"GE") is None
    assert sniff(b"") is None
    assert sniff(b"\x16\x03\x01") is Protocol.TCP
    assert sniff(b"GETX") is Protocol.TCP


ENTRY = """
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: echo, namespace: shop}
spec:
  hosts: [api.example.com, "*.example.com"]
  ports: [{number: 80, name: tcp, protocol: HTTP}, {number: 443, name: http, protocol: TLS}]
"""


def test_a_route_and_the_protocols_of_a_service_entry_are_for_all_its_hosts_alone() -> None:
    hosts = [
        Service("echo", "shop", host, ports={80: 80, 443: 443})
        for host in ("api.example.com", "*.example.com", "echo.shop.svc.cluster.local")
    ]
    mesh = Snapshot.of(MeshState(services=tuple(hosts)))
    parent = "{kind: ServiceEntry, group: networking.istio.io, name: NAME}"
    rules = "- filters: [{type: RequestRedirect, requestRedirect: {hostname: b.example}}]"

    def made(name: str) -> WaypointPlan:
        return plan(ENTRY, route(rules, parent=parent.replace("NAME", name)), mesh=mesh)

    found = made("echo")
    ports = {str(key): each.ports[80] for key, each in found.services.items()}
    routed = [key for key, port in ports.items() if port.routes_for("shop").http is not None]
    assert sorted(routed) == ["shop/*.example.com", "shop/api.example.com"]
    assert found.protocol(hosts[0].key, 80) is Protocol.HTTP1
    assert found.protocol(hosts[1].key, 443) is Protocol.TCP
    assert found.protocol(hosts[2].key, 443) is None
    (problem,) = made("gone").problems
    assert "spec.parentRefs[0]: there is no ServiceEntry shop/gone" in str(problem)


def test_a_malformed_service_or_entry_declares_nothing() -> None:
    bad = ENTRY.replace("[{number", "7 # [{number").replace("[api", "7 # [api")
    ugly = ENTRY.replace("[{number", "[7, {number")
    service = "{apiVersion: v1, kind: Service, metadata: {name: s, namespace: n}, spec: {ports: 7}}"
    assert plan(bad, service).protocols.get(NamespacedHostname("n", "s.n.svc.cluster.local")) == {}
    entry = next(iter(objects(ugly).by_key.values()))
    assert declared_by_entry(entry) == {80: Protocol.HTTP1, 443: Protocol.TCP}


# --- endpoints -------------------------------------------------------------------

WEB = Service("web", "shop", "web.shop.svc.cluster.local", ports={80: 8080})


def pod(number: int, **more: object) -> Workload:
    ip = ip_address(f"198.51.100.{number}")
    return Workload(f"//Pod/p{number}", f"p{number}", "shop", (ip,), services={WEB.key: {}}, **more)  # type: ignore[arg-type]


OWN = pod(99)
THREE = Snapshot.of(MeshState(workloads=(pod(1), pod(2), pod(3)), services=(WEB,)))


def picked(balancer: Balancer, now_s: float = 0.0, **more: object) -> Choice:
    found = balancer.pick(THREE, OWN, WEB, 80, now_s, **more)  # type: ignore[arg-type]
    assert not isinstance(found, Refused)
    return found


def test_an_endpoint_that_has_a_name_alone_is_refused_by_that_name() -> None:
    named = Workload("se", "se", "shop", hostname="api.example.com", services={WEB.key: {}})
    mesh = Snapshot.of(MeshState(workloads=(named,), services=(WEB,)))
    for own in (OWN, Workload("//Pod/wp", "wp", "shop")):
        found = Balancer(random.Random(1)).pick(mesh, own, WEB, 80, 0.0)
        assert isinstance(found, Refused)
        assert "by its name 'api.example.com' alone" in found.reason


def test_requests_in_flight_even_out() -> None:
    balancer = Balancer(random.Random(1))
    for _ in range(300):
        balancer.began(picked(balancer))
    counts = [load.active for load in balancer._loads.values()]
    assert sum(counts) == 300
    assert max(counts) - min(counts) < 15


def test_an_endpoint_that_fails_in_a_row_is_left_out_for_a_while() -> None:
    balancer = Balancer(random.Random(1))
    bad = "//Pod/p1"
    now_s = 0.0
    for _ in range(200):
        choice = picked(balancer, now_s)
        balancer.began(choice)
        balancer.ended(choice, now_s, failed=choice.workload.uid == bad)
    assert balancer.ejected(now_s) == 1
    assert all(picked(balancer, now_s).workload.uid != bad for _ in range(50))
    later = EJECTION_S + 1
    assert any(picked(balancer, later).workload.uid == bad for _ in range(50))


def test_no_more_than_half_are_left_out() -> None:
    balancer = Balancer(random.Random(1))
    for _ in range(FAILURES * 20):
        choice = picked(balancer)
        balancer.began(choice)
        balancer.ended(choice, 0.0, failed=True)
    assert balancer.ejected(0.0) == 3
    assert len({picked(balancer).workload.uid for _ in range(60)}) == 3


def test_a_retry_takes_another_endpoint_where_there_is_one() -> None:
    balancer = Balancer(random.Random(1))
    for _ in range(50):
        tried = {"//Pod/p1", "//Pod/p2"}
        assert picked(balancer, tried=tried).workload.uid == "//Pod/p3"
    everyone = {"//Pod/p1", "//Pod/p2", "//Pod/p3"}
    assert picked(balancer, tried=everyone).workload.uid in everyone


def test_a_session_finds_its_endpoint_again() -> None:
    balancer = Balancer(random.Random(1))
    wanted = session_of(pod(2))
    assert {picked(balancer, session=wanted).workload.uid for _ in range(20)} == {"//Pod/p2"}
    assert picked(balancer, session="gone").workload.uid


def test_an_endpoint_outside_the_mesh_is_dialed_plainly_at_its_target_port() -> None:
    choice = picked(Balancer(random.Random(1)))
    assert isinstance(choice.route, PlainRoute)
    assert choice.route.target.port == 8080


def test_what_is_known_of_an_endpoint_goes_with_it() -> None:
    balancer = Balancer(random.Random(1))
    for _ in range(20):
        picked(balancer)
    balancer.keep_only(Snapshot.of(MeshState(workloads=(pod(1),), services=(WEB,))))
    assert [uid for uid, _ in balancer._loads] == ["//Pod/p1"]
