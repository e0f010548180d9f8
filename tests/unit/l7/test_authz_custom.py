"""CUSTOM: an authorizer is asked over HTTP or gRPC, and what it says is done."""

from __future__ import annotations

from typing import Any

import pytest

from meshbpf.agent.core.objects import KubeObject, ObjectKey
from meshbpf.agent.l7.authz.source import authorization
from meshbpf.agent.l7.exchange import Exchange, Flag
from meshbpf.agent.l7.filter import (
    CONTINUE,
    Body,
    Call,
    CallAnswer,
    CallFailed,
    Chain,
    Filter,
    ReadBody,
    Reply,
)
from meshbpf.agent.l7.message import Headers, ResponseHead
from meshbpf.agent.wire.grpc import Decoder, encode
from meshbpf.agent.wire.pb import ext_authz_pb2 as pb
from tests.unit.l7.samples import a_connection, a_scope, an_exchange, an_object, drive

MESH = """
extensionProviders:
- name: web
  envoyExtAuthzHttp:
    service: shop/authz.shop.svc.cluster.local
    port: 8000
    timeout: 0.5s
    pathPrefix: /check
    includeRequestHeadersInCheck: [x-tier, "x-b3-*"]
    includeAdditionalHeadersInCheck: {X-From: waypoint}
    headersToUpstreamOnAllow: [x-user]
    headersToDownstreamOnAllow: [set-cookie]
    headersToDownstreamOnDeny: [x-why]
- name: rpc
  envoyExtAuthzGrpc: {service: authz.shop.svc.cluster.local, port: 9000}
- name: lax
  envoyExtAuthzHttp:
    service: 198.51.100.9
    port: 80
    failOpen: true
- name: strict
  envoyExtAuthzHttp:
    service: 198.51.100.9
    port: 80
    statusOnError: "503"
    includeRequestBodyInCheck: {maxRequestBytes: 4}
- name: tracer
  opentelemetry: {service: otel.example, port: 4317}
- name: broken
  envoyExtAuthzHttp: {service: authz, port: 0}
"""


def mesh(text: str = MESH) -> KubeObject:
    key = ObjectKey("", "ConfigMap", "istio-system", "istio")
    return KubeObject(key, "v1", {"data": {"mesh": text}}, "mesh.yaml:1")


def policy(provider: str, *rules: Any, **more: Any) -> KubeObject:
    spec = {
        "action": "CUSTOM",
        "provider": {"name": provider},
        "targetRefs": [{"kind": "Service", "name": "echo"}],
        "rules": list(rules) or [{"to": [{"operation": {"paths": ["/admin*"]}}]}],
    }
    return an_object("security.istio.io", "AuthorizationPolicy", f"ask-{provider}", spec, **more)


def asking(provider: str, *rules: Any, **more: Any) -> Filter:
    filters, _ = authorization(a_scope(policy(provider, *rules, **more), mesh()))
    (one,) = filters
    return one


def admin(**headers: str) -> Exchange:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return an_exchange("POST", "/admin?x=1", headers=named)


def answer(status: int, body: bytes = b"", **headers: str) -> CallAnswer:
    raw = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return CallAnswer(ResponseHead(status, Headers(raw)), body)


def test_only_what_the_rules_match_is_asked_about() -> None:
    assert drive(asking("web").on_request(an_exchange())) == (CONTINUE, [])


def test_http_shows_the_request_and_the_headers_that_were_named() -> None:
    exchange = admin(x_tier="gold", x_b3_traceid="1", cookie="secret", authorization="Bearer t")
    outcome, commands = drive(asking("web").on_request(exchange), answer(200))
    assert outcome is CONTINUE
    (call,) = commands
    assert isinstance(call, Call)
    assert str(call.target) == "authz.shop.svc.cluster.local:8000"
    assert (call.head.method, call.head.path, call.head.authority) == (
        "POST",
        "/check/admin?x=1",
        "echo",
    )
    assert dict(call.head.headers.items()) == {
        "x-tier": "gold",
        "x-b3-traceid": "1",
        "authorization": "Bearer t",
        "x-from": "waypoint",
    }
    assert (call.timeout_s, call.body, call.http2) == (0.5, b"", False)


def test_an_allowing_answer_edits_request_and_response() -> None:
    one = asking("web")
    exchange = admin(x_user="liar")
    allowed = answer(200, x_user="alice", set_cookie="a=b", x_other="dropped")
    assert drive(one.on_request(exchange), allowed)[0] is CONTINUE
    assert exchange.request.headers.get("x-user") == "alice"
    assert "x-other" not in exchange.request.headers
    exchange.response = ResponseHead(200)
    assert one.on_response(exchange) is CONTINUE
    assert dict(exchange.response.headers.items()) == {"set-cookie": "a=b"}


def test_a_refusing_answer_is_the_clients() -> None:
    exchange = admin()
    refused = answer(401, b"who are you", x_why="no", www_authenticate="Basic", x_inner="secret")
    outcome, _ = drive(asking("web").on_request(exchange), refused)
    assert outcome == Reply(
        401,
        b"who are you",
        (("x-why", "no"), ("www-authenticate", "Basic")),
        "ext_authz_denied",
    )
    assert exchange.flags == [Flag.UNAUTHORIZED_EXTERNAL]


@pytest.mark.parametrize("failure", [CallFailed("refused"), answer(503)])
def test_an_authorizer_that_fails_closes_unless_told_otherwise(failure: Any) -> None:
    outcome, _ = drive(asking("web").on_request(admin()), failure)
    assert (outcome.status, outcome.detail) == (403, "ext_authz_error")  # type: ignore[union-attr]
    outcome, _ = drive(asking("lax").on_request(admin()), failure)
    assert outcome is CONTINUE
    outcome, _ = drive(asking("strict").on_request(admin()), Body(b"", True), failure)
    assert outcome.status == 503  # type: ignore[union-attr]


def test_a_body_is_shown_up_to_its_limit() -> None:
    one = asking("strict")
    outcome, commands = drive(one.on_request(admin()), Body(b"1234", True), answer(200))
    assert outcome is CONTINUE
    assert commands[0] == ReadBody(4)
    assert isinstance(commands[1], Call)
    assert commands[1].body == b"1234"
    outcome, _ = drive(one.on_request(admin()), Body(b"12345", False))
    assert outcome.status == 413  # type: ignore[union-attr]


def grpc_answer(message: pb.CheckResponse) -> CallAnswer:
    head = ResponseHead(200, Headers([(b"content-type", b"application/grpc")]))
    head.trailers = Headers([(b"grpc-status", b"0")])
    return CallAnswer(head, encode(message.SerializeToString()))


def test_grpc_shows_both_ends_and_the_whole_request() -> None:
    exchange = admin(x_tier="gold")
    allowed = pb.CheckResponse()
    allowed.status.code = 0
    outcome, commands = drive(asking("rpc").on_request(exchange), grpc_answer(allowed))
    assert outcome is CONTINUE
    (call,) = commands
    assert isinstance(call, Call)
    assert call.http2
    assert call.head.path == "/envoy.service.auth.v3.Authorization/Check"
    (message,) = Decoder("Check", 1 << 20).feed(call.body)
    attributes = pb.CheckRequest.FromString(message).attributes
    assert attributes.source.principal == "spiffe://cluster.local/ns/shop/sa/web"
    assert attributes.source.address.socket_address.address == "198.18.1.1"
    assert attributes.destination.address.socket_address.port_value == 80
    http = attributes.request.http
    assert (http.method, http.path, http.host) == ("POST", "/admin?x=1", "echo")
    assert http.headers["x-tier"] == "gold"
    assert http.headers[":path"] == "/admin?x=1"


def test_grpc_edits_and_refuses() -> None:
    one = asking("rpc")
    allowed = pb.CheckResponse()
    for name, value, append in (("x-user", "alice", False), ("x-role", "b", True)):
        option = allowed.ok_response.headers.add()
        option.header.key, option.header.value = name, value
        option.append.value = append
    allowed.ok_response.headers_to_remove.append("X-Secret")
    smuggled = allowed.ok_response.headers.add()
    smuggled.header.key, smuggled.header.value = ":path", "/elsewhere"
    exchange = admin(x_user="liar", x_role="a", x_secret="1")
    assert drive(one.on_request(exchange), grpc_answer(allowed))[0] is CONTINUE
    assert dict(exchange.request.headers.items()) | {"x-role": ""} == {
        "x-user": "alice",
        "x-role": "",
    }
    assert exchange.request.headers.get("x-role") == "a,b"
    assert exchange.request.path == "/admin?x=1"

    denied = pb.CheckResponse()
    denied.status.code = 7
    outcome, _ = drive(one.on_request(admin()), grpc_answer(denied))
    assert outcome == Reply(403, b"", (), "ext_authz_denied")
    denied.denied_response.status.code = 429
    denied.denied_response.body = "slow down"
    outcome, _ = drive(one.on_request(admin()), grpc_answer(denied))
    assert outcome == Reply(429, b"slow down", (), "ext_authz_denied")


def test_grpc_that_ends_badly_fails() -> None:
    one = asking("rpc")
    head = ResponseHead(200, Headers([(b"grpc-status", b"14"), (b"grpc-message", b"down")]))
    for bad in (
        CallAnswer(head, b""),
        answer(200, b"<html>"),
        CallAnswer(grpc_answer(pb.CheckResponse()).head, encode(b"\xff\xff")),
    ):
        outcome, _ = drive(one.on_request(admin()), bad)
        assert outcome.detail == "ext_authz_error"  # type: ignore[union-attr]


@pytest.mark.parametrize("provider", ["nobody", "tracer", "broken"])
def test_a_provider_that_is_not_one_closes_and_is_reported(provider: str) -> None:
    filters, problems = authorization(a_scope(policy(provider), mesh()))
    outcome, commands = drive(filters[0].on_request(admin()))
    assert (outcome.status, commands) == (403, [])  # type: ignore[union-attr]
    assert drive(filters[0].on_request(an_exchange()))[0] is CONTINUE
    told = {problem.field: problem for problem in problems}
    assert told["spec.provider.name"].reason == "ProviderNotFound"
    assert "data.mesh: extensionProviders[5].envoyExtAuthzHttp.port" in told


PORT_8080 = {"to": [{"operation": {"ports": ["8080"]}}]}


def test_a_grpc_authorizer_is_asked_about_opaque_connections() -> None:
    one = asking("rpc", PORT_8080)
    assert one.on_connect(a_connection()) is CONTINUE
    matching = a_connection(destination="198.18.9.9:8080")
    outcome, commands = drive(one.on_connect(matching), grpc_answer(pb.CheckResponse()))
    assert outcome is CONTINUE
    (call,) = commands
    assert isinstance(call, Call)
    (message,) = Decoder("Check", 1 << 20).feed(call.body)
    attributes = pb.CheckRequest.FromString(message).attributes
    assert attributes.source.principal == "spiffe://cluster.local/ns/shop/sa/web"
    assert attributes.destination.address.socket_address.port_value == 8080
    assert not attributes.HasField("request")
    denied = pb.CheckResponse()
    denied.status.code = 7
    for said in (grpc_answer(denied), CallFailed("it is down"), answer(200, b"<html>")):
        outcome, _ = drive(one.on_connect(matching), said)
        assert isinstance(outcome, Reply)
        assert outcome.detail.startswith("ext_authz_")
    # Rules that read HTTP only lose those parts, and then match every connection.
    assert drive(asking("rpc").on_connect(a_connection()), grpc_answer(denied))[0] != CONTINUE


@pytest.mark.parametrize("provider", ["web", "nobody"])
def test_an_opaque_connection_that_nobody_can_be_asked_about_is_refused(provider: str) -> None:
    filters, _ = authorization(a_scope(policy(provider, PORT_8080), mesh()))
    assert filters[0].on_connect(a_connection()) is CONTINUE
    refused = filters[0].on_connect(a_connection(destination="198.18.9.9:8080"))
    assert isinstance(refused, Reply)


def test_dry_run_asks_nobody() -> None:
    one = asking("web", annotations={"istio.io/dry-run": "true"})
    exchange = admin()
    assert drive(one.on_request(exchange)) == (CONTINUE, [])
    assert exchange.attributes["authz.dry_run"] == ("shop/ask-web would ask web",)


def test_a_bad_custom_policy_closes_its_target() -> None:
    filters, _ = authorization(a_scope(policy("web", {"too": []}), mesh()))
    (one,) = filters
    assert isinstance(drive(one.on_request(an_exchange()))[0], Reply)


def test_custom_comes_before_deny() -> None:
    deny = an_object(
        "security.istio.io",
        "AuthorizationPolicy",
        "deny",
        {
            "action": "DENY",
            "rules": [{}],
            "targetRefs": [{"kind": "Service", "name": "echo"}],
        },
    )
    filters, _ = authorization(a_scope(deny, policy("web"), mesh()))
    assert [f.name for f in Chain.of(filters).filters] == ["ext_authz web", "AuthorizationPolicy"]


def test_a_mesh_configuration_that_is_no_yaml_is_reported() -> None:
    _, problems = authorization(a_scope(policy("web"), mesh("a: [")))
    assert problems[0].field == "data.mesh"
