"""Policies, tokens, plugins and telemetry on real requests: pod to waypoint to pod, over HBONE."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.progs.program import Program, eventually
from tests.unit.l7.wasm import filters
from tests.waypoint.bed import WaypointBed, a_service, an_object, inside_connect, vip
from tests.waypoint.grpc import Grpc

pytestmark = [pytest.mark.root, pytest.mark.netns]

KEY = ec.generate_private_key(ec.SECP256R1())
ISSUER = "https://issuer.example"


def policy(name: str, service: str, *, kind: str = "AuthorizationPolicy", **spec: Any) -> Any:
    group = {"WasmPlugin": "extensions", "Telemetry": "telemetry"}.get(kind, "security")
    targets = [{"group": "", "kind": "Service", "name": service}]
    body = {"targetRefs": targets, **spec}
    return an_object(kind, name, group=f"{group}.istio.io", spec=body)


def mesh_config(text: str) -> Any:
    return an_object("ConfigMap", "istio", namespace="istio-system", data={"mesh": text})


def token(**claims: Any) -> str:
    payload = {"iss": ISSUER, "sub": "alice", "exp": int(time.time()) + 600, **claims}
    return jwt.encode(payload, KEY, "ES256", {"kid": "k"})


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def lines(bed: WaypointBed, mark: str) -> list[dict[str, Any]]:
    """The access log's JSON lines that have `mark` in them."""
    assert bed.waypoint is not None
    return [
        json.loads(line)
        for line in bed.waypoint.log.read_text().splitlines()
        if line.startswith("{") and mark in line
    ]


@pytest.fixture(scope="module")
def guarded(bed: WaypointBed) -> Iterator[WaypointBed]:
    """All policies of this file at once, each on a service of its own."""
    jwks = json.dumps(
        {
            "keys": [
                {**jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key(), as_dict=True), "kid": "k"}
            ]
        }
    )
    for name, code in (("add", filters.ADD_HEADER), ("spin", filters.SPIN)):
        (bed.directory / f"{name}.wasm").write_bytes(code)

    (bed.directory / "jwks.json").write_text(jwks)
    argv = [sys.executable, "-m", "tests.progs.outside", "--jwks", f"{bed.directory}/jwks.json"]
    outside = Program(bed.directory, "outside", bed["n2x"].netns, argv)
    bed.servers["outside"] = outside
    outside.wait_event("ready")
    apart = bed["n2x"].ipv4

    def module(name: str) -> str:
        return f"file://{bed.directory}/{name}.wasm"

    check = f"{vip('echo-v2')}"
    objects = [
        a_service("p-deny", 60),
        policy(
            "deny-admin",
            "p-deny",
            action="DENY",
            rules=[{"to": [{"operation": {"paths": ["/admin", "/admin/{**}"]}}]}],
        ),
        a_service("p-allow", 61),
        policy(
            "allow-own-get",
            "p-allow",
            rules=[
                {
                    "from": [{"source": {"namespaces": ["apps"]}}],
                    "to": [{"operation": {"methods": ["GET"]}}],
                },
                {
                    "from": [{"source": {"namespaces": ["apps"]}}],
                    "to": [{"operation": {"ports": ["9090"]}}],
                },
            ],
        ),
        a_service("p-jwt", 62),
        policy(
            "tokens",
            "p-jwt",
            kind="RequestAuthentication",
            jwtRules=[
                {
                    "issuer": ISSUER,
                    "jwks": jwks,
                    "outputClaimToHeaders": [{"header": "x-user", "claim": "sub"}],
                }
            ],
        ),
        policy(
            "alice-only",
            "p-jwt",
            rules=[{"from": [{"source": {"requestPrincipals": [f"{ISSUER}/alice"]}}]}],
        ),
        a_service("p-custom", 63),
        policy(
            "ask",
            "p-custom",
            action="CUSTOM",
            provider={"name": "authorizer"},
            rules=[{"to": [{"operation": {"notPaths": ["/open"]}}]}],
        ),
        a_service("p-wasm", 64),
        policy("add", "p-wasm", kind="WasmPlugin", url=module("add")),
        a_service("p-spin", 65),
        policy("spin", "p-spin", kind="WasmPlugin", url=module("spin")),
        a_service("p-spin-open", 66),
        policy(
            "spin-open",
            "p-spin-open",
            kind="WasmPlugin",
            url=module("spin"),
            failStrategy="FAIL_OPEN",
        ),
        a_service("p-bad", 67),
        policy("typo", "p-bad", action="DENY", rules=[{"to": [{"operation": {"pathz": ["/"]}}]}]),
        a_service("p-told", 68),
        policy(
            "told",
            "p-told",
            kind="Telemetry",
            accessLogging=[
                {
                    "providers": [{"name": "json"}],
                    "filter": {"expression": "response.code >= 400"},
                }
            ],
            metrics=[{"overrides": [{"tagOverrides": {"host": {"value": "request.host"}}}]}],
            tracing=[
                {"providers": [{"name": "collector"}], "randomSamplingPercentage": 100},
            ],
        ),
        a_service("p-told-plainly", 79),
        a_service("p-rpc", 69),
        policy("ask-rpc", "p-rpc", action="CUSTOM", provider={"name": "rpc"}, rules=[{}]),
        a_service("p-keys", 70),
        policy(
            "fetched",
            "p-keys",
            kind="RequestAuthentication",
            jwtRules=[{"issuer": ISSUER, "jwksUri": f"http://{apart}:8000/jwks"}],
        ),
        a_service("p-away", 71),
        policy(
            "redirected",
            "p-away",
            kind="RequestAuthentication",
            jwtRules=[{"issuer": ISSUER, "jwksUri": f"http://{apart}:8000/away"}],
        ),
        a_service("p-spans", 72),
        policy(
            "spans",
            "p-spans",
            kind="Telemetry",
            tracing=[{"providers": [{"name": "rpc-collector"}], "randomSamplingPercentage": 100}],
        ),
        mesh_config(
            f"""
            extensionProviders:
            - name: authorizer
              envoyExtAuthzHttp:
                service: {check}
                port: 8080
                pathPrefix: /status
                includeRequestHeadersInCheck: [x-ask]
            - name: json
              envoyFileAccessLog: {{logFormat: {{labels: {{
                path: "%REQ(:PATH)%", code: "%RESPONSE_CODE%", who: "%DOWNSTREAM_PEER_URI_SAN%",
                detail: "%RESPONSE_CODE_DETAILS%"}}}}}}
            - name: collector
              opentelemetry:
                service: {check}
                port: 8080
                http: {{path: /v1/traces}}
            - name: rpc
              envoyExtAuthzGrpc: {{service: {apart}, port: 9000}}
            - name: rpc-collector
              opentelemetry: {{service: {apart}, port: 9000}}
            """
        ),
    ]

    def plugins_run() -> bool:
        try:
            return bed.get("p-wasm").status == 200
        except OSError:
            return False

    with bed.objects(*objects):
        eventually("agents know the services, and the plugins are compiled", plugins_run, 20.0)
        yield bed


def test_a_denied_path_is_forbidden_however_it_is_written(guarded: WaypointBed) -> None:
    assert guarded.get("p-deny", "/").status == 200
    for path in ("/admin", "/admin/x/y", "/x/../admin", "/%61dmin", "/./admin?q=1"):
        answer = guarded.get("p-deny", path)
        assert (answer.status, answer.body) == (403, b"RBAC: access denied"), path


def test_a_denied_grpc_call_gets_its_status_as_grpc_has_it(guarded: WaypointBed) -> None:
    with Grpc(guarded["n1a"], vip("p-deny"), 7070) as client:
        assert client.call("/shop.Cart/Get").grpc == 0
        denied = client.call("/admin/Get")
        assert (denied.http, denied.grpc) == (200, 7)


def test_an_allow_holds_for_its_callers_and_methods_alone(guarded: WaypointBed) -> None:
    assert guarded.get("p-allow").status == 200
    assert guarded.get("p-allow", method="POST", body=b"x").status == 403
    assert guarded.get("p-allow", client="n1b").status == 403


def tcp_says(bed: WaypointBed, service: str, client: str) -> bytes:
    with inside_connect(bed[client].netns, vip(service), 9090) as sock:
        sock.sendall(b"ping\n")
        sock.settimeout(5)
        try:
            return sock.recv(64)
        except ConnectionResetError:
            return b""


def test_an_allow_holds_for_opaque_connections_too(guarded: WaypointBed) -> None:
    assert tcp_says(guarded, "p-allow", "n1a") != b""
    assert tcp_says(guarded, "p-allow", "n1b") == b""


def test_an_authorizer_that_speaks_grpc_decides_on_opaque_connections(
    guarded: WaypointBed,
) -> None:
    assert tcp_says(guarded, "p-rpc", "n1a") != b""
    assert tcp_says(guarded, "p-rpc", "n1b") == b""
    asked = {each["principal"] for each in guarded.servers["outside"].events("check", path="")}
    assert asked == {guarded[name].identity for name in ("n1a", "n1b")}
    # An HTTP service cannot be shown a connection.
    assert tcp_says(guarded, "p-custom", "n1a") == b""


def tcp_total(bed: WaypointBed, name: str, service: str) -> float:
    found = 0.0
    for line in bed.ask_waypoint(15020, "/metrics")[1].splitlines():
        if line.startswith(f"{name}{{") and f'destination_service_name="{service}"' in line:
            assert 'reporter="waypoint"' in line
            assert 'request_protocol="tcp"' in line
            found += float(line.rpartition(" ")[2])
    return found


def test_opaque_connections_are_counted_with_their_bytes(guarded: WaypointBed) -> None:
    names = ("connections_opened", "connections_closed", "received_bytes", "sent_bytes")

    def totals() -> list[float]:
        return [tcp_total(guarded, f"istio_tcp_{name}_total", "p-allow") for name in names]

    eventually("those of before are over", lambda: totals()[0] == totals()[1], 10.0)
    before = totals()
    with inside_connect(guarded["n1a"].netns, vip("p-allow"), 9090) as sock:
        sock.sendall(b"ping\n")
        answer = sock.recv(64)
        # While it lives, too.
        eventually("what it sent", lambda: growth(before, totals())[:3] == [1, 0, 5], 5.0)
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(64):
            answer += data
    eventually("its end", lambda: growth(before, totals()) == [1, 1, 5, len(answer)], 5.0)


def growth(before: list[float], after: list[float]) -> list[float]:
    return [new - old for old, new in zip(before, after, strict=True)]


def test_a_good_token_passes_and_its_claim_reaches_the_backend(guarded: WaypointBed) -> None:
    answer = guarded.get("p-jwt", headers={**bearer(token()), "x-user": "root"})
    assert answer.status == 200
    assert answer.said["headers"]["x-user"] == ["alice"]
    assert "authorization" not in answer.said["headers"]


def test_without_a_token_or_with_anothers_the_policy_refuses(guarded: WaypointBed) -> None:
    assert guarded.get("p-jwt").status == 403
    assert guarded.get("p-jwt", headers=bearer(token(sub="bob"))).status == 403


def test_an_expired_token_is_answered_401(guarded: WaypointBed) -> None:
    answer = guarded.get("p-jwt", headers=bearer(token(exp=int(time.time()) - 90)))
    assert (answer.status, answer.body) == (401, b"Jwt is expired")
    assert "invalid_token" in answer.headers["www-authenticate"]


def test_an_authorizer_in_the_mesh_decides(guarded: WaypointBed) -> None:
    assert guarded.get("p-custom", "/open").status == 200
    # The authorizer answers with the status that the path names.
    assert guarded.get("p-custom", "/200").status == 200
    assert guarded.get("p-custom", "/401").status == 401
    assert guarded.get("p-custom", "/503").status == 403


def test_an_authorizer_that_speaks_grpc_decides(guarded: WaypointBed) -> None:
    answer = guarded.get("p-rpc", "/yes", headers={"x-checked": "liar"})
    assert answer.said["headers"]["x-checked"] == ["GET"]
    assert answer.headers["x-by"] == "authorizer"
    refused = guarded.get("p-rpc", "/no")
    assert (refused.status, refused.body) == (402, b"pay first")
    (said,) = guarded.servers["outside"].events("check", path="/no")
    assert said["principal"] == guarded["n1a"].identity


def test_keys_are_fetched_once_and_not_by_way_of_a_redirect(guarded: WaypointBed) -> None:
    for _ in range(3):
        assert guarded.get("p-keys", headers=bearer(token())).status == 200
    assert guarded.get("p-keys", headers=bearer(token()[:-6] + "AAAAAA")).status == 401
    assert guarded.get("p-away", headers=bearer(token())).status == 401
    asked = [each["path"] for each in guarded.servers["outside"].events("get")]
    assert asked == ["/jwks", "/away"]


def test_a_plugin_edits_request_and_response(guarded: WaypointBed) -> None:
    answer = guarded.get("p-wasm", "/x")
    assert answer.said["path"] == "/rewritten"
    assert answer.said["headers"]["x-plugin"] == ["seen"]
    assert answer.headers["x-plugin"] == "seen"


def test_a_plugin_that_never_ends_costs_one_request_and_no_other_service(
    guarded: WaypointBed,
) -> None:
    assert guarded.get("p-spin", limit_s=20).status == 503
    assert guarded.get("p-spin-open", limit_s=20).status == 200
    begun = time.monotonic()
    assert guarded.get("p-deny").status == 200
    assert time.monotonic() - begun < 2


def test_a_policy_with_a_typing_error_closes_its_service_and_is_logged(
    guarded: WaypointBed,
) -> None:
    assert guarded.get("p-bad").status == 403
    assert guarded.waypoint is not None
    log = guarded.waypoint.log.read_text()
    assert "AuthorizationPolicy apps/typo" in log
    assert "spec.rules[0].to[0].operation.pathz" in log


def test_requests_are_logged_as_telemetry_says(guarded: WaypointBed) -> None:
    assert guarded.get("p-told", "/fine").status == 200
    assert guarded.get("p-told", "/status/418").status == 418
    eventually("the line is there", lambda: lines(guarded, "/status/418"), 5.0)
    (line,) = lines(guarded, "/status/418")
    assert line == {
        "path": "/status/418",
        "code": 418,
        "who": f"spiffe://cluster.local/ns/apps/sa/{guarded['n1a'].service_account}",
        "detail": "via_upstream",
    }
    assert lines(guarded, "/fine") == []


def test_requests_are_counted_with_the_waypoint_as_reporter(guarded: WaypointBed) -> None:
    guarded.get("p-deny", "/admin")
    _, page = guarded.ask_waypoint(15020, "/metrics")
    denied = [
        line
        for line in page.splitlines()
        if line.startswith("istio_requests_total{")
        and 'destination_service_name="p-deny"' in line
        and 'response_code="403"' in line
    ]
    assert len(denied) == 1
    assert 'reporter="waypoint"' in denied[0]
    assert 'source_workload_namespace="apps"' in denied[0]
    assert 'destination_workload="unknown"' in denied[0]
    assert "istio_request_duration_milliseconds_bucket{" in page
    guarded.get("p-told", "/counted")
    _, page = guarded.ask_waypoint(15020, "/metrics")
    assert 'host="p-told"' in page


def test_messages_of_grpc_are_counted(guarded: WaypointBed) -> None:
    def counted(direction: str) -> float:
        _, page = guarded.ask_waypoint(15020, "/metrics")
        return sum(
            float(line.rpartition(" ")[2])
            for line in page.splitlines()
            if line.startswith(f"istio_{direction}_messages_total{{")
            and 'destination_service_name="p-told-plainly"' in line
        )

    before = [counted(direction) for direction in ("request", "response")]
    with Grpc(guarded["n1a"], vip("p-told-plainly"), 7070) as one:
        for size in (0, 1, 9000):
            # Head, message and end come at once; nothing of it may be lost.
            called = one.call("/shop.Cart/Add", message=b"x" * size)
            assert (called.grpc, called.said["received_bytes"]) == (0, 5 + size)
    after = [counted(direction) for direction in ("request", "response")]
    assert [new - old for new, old in zip(after, before, strict=True)] == [3, 3]


def test_the_next_one_learns_of_the_trace_and_a_collector_of_the_span(
    guarded: WaypointBed,
) -> None:
    before = guarded.metric("meshbpf_waypoint_spans_exported_total")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = guarded.get("p-told", headers={"traceparent": parent})
    (sent,) = answer.said["headers"]["traceparent"]
    assert sent.split("-")[1] == parent.split("-")[1]
    assert sent.split("-")[2] != parent.split("-")[2]
    eventually(
        "the collector took the span",
        lambda: guarded.metric("meshbpf_waypoint_spans_exported_total") > before,
        10.0,
    )


def test_a_collector_gets_the_span_of_a_request(guarded: WaypointBed) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert guarded.get("p-spans", "/traced", headers={"traceparent": parent}).status == 200
    span = guarded.servers["outside"].wait_event("span", limit_s=10.0)
    assert (span["trace"], span["parent"]) == (parent[3:35], parent[36:52])
    assert span["name"] == "p-spans.apps.svc.cluster.local:80/*"
    assert span["tags"]["http.status_code"] == "200"
    assert span["tags"]["istio.source_namespace"] == "apps"
