"""Each field and condition of AuthorizationPolicy, on requests that have it and that do not.

A row is one test (a field of `from`, `to`, or a key of `when`) with a value,
a request for which it holds and one for which it does not. Each is tried as
ALLOW and as DENY, in its plain and in its negated form, on HTTP and, for what
only HTTP has, on TCP.
"""

from __future__ import annotations

from typing import Any

import pytest

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.l7.authz.filter import AuthorizationFilter
from meshbpf.agent.l7.authz.parse import parse_policy
from meshbpf.agent.l7.exchange import Exchange, Protocol
from meshbpf.agent.l7.filter import CONTINUE, Reply
from tests.unit.l7.samples import a_connection, an_exchange, an_object

OTHER = SpiffeId("other.example", "bank", "teller")
CLAIMS = {
    "iss": "https://issuer.example",
    "sub": "alice",
    "aud": ["shop", "bank"],
    "azp": "frontend",
    "groups": ["admin", "dev"],
    "level": 3,
    "nested": {"team": {"name": "red"}},
}


def request(method: str = "GET", path: str = "/", authority: str = "echo", **more: Any) -> Exchange:
    headers, claims = more.pop("headers", {}), more.pop("claims", None)
    attributes = {} if claims is None else {"jwt.claims": claims}
    return an_exchange(
        method, path, authority, headers, connection=a_connection(**more), attributes=attributes
    )


def source(field: str, value: str, yes: Exchange, no: Exchange) -> Any:
    plain = {"from": [{"source": {field: [value]}}]}
    negated = {"from": [{"source": {not_(field): [value]}}]}
    return pytest.param(plain, negated, yes, no, id=f"{field}={value}")


def operation(field: str, value: str, yes: Exchange, no: Exchange) -> Any:
    plain = {"to": [{"operation": {field: [value]}}]}
    negated = {"to": [{"operation": {not_(field): [value]}}]}
    return pytest.param(plain, negated, yes, no, id=f"{field}={value}")


def when(key: str, value: str, yes: Exchange, no: Exchange) -> Any:
    plain = {"when": [{"key": key, "values": [value]}]}
    negated = {"when": [{"key": key, "notValues": [value]}]}
    return pytest.param(plain, negated, yes, no, id=f"{key}={value}")


def not_(field: str) -> str:
    return f"not{field[0].upper()}{field[1:]}"


PLAIN = request()
BANK = request(identity=OTHER)
NOBODY = request(identity=None)
FAR = request(source="198.51.100.7:1")
V6 = request(source="[fd00:6d62::1]:1", destination="[fd00:6d62::9]:443")
PROXIED = request(headers={"X-Forwarded-For": "198.51.100.1, 198.51.100.7"})
BAD_XFF = request(headers={"X-Forwarded-For": "198.51.100.7, nonsense"})
PORT_8080 = request(destination="198.18.9.9:8080")
ALICE = request(claims=CLAIMS)
BOB = request(claims={"iss": "https://issuer.example", "sub": "bob", "aud": "bank"})

L4 = [
    source("principals", "cluster.local/ns/shop/sa/web", PLAIN, BANK),
    source("principals", "cluster.local/*", PLAIN, BANK),
    source("principals", "*/sa/web", PLAIN, BANK),
    source("principals", "*", PLAIN, NOBODY),
    source("namespaces", "shop", PLAIN, BANK),
    source("namespaces", "sh*", PLAIN, BANK),
    source("namespaces", "*p", PLAIN, BANK),
    source("namespaces", "s*p", PLAIN, BANK),
    source("namespaces", "*a", request(identity=SpiffeId("t", "alpha", "x")), PLAIN),
    source("namespaces", "*", PLAIN, NOBODY),
    source("serviceAccounts", "shop/web", PLAIN, BANK),
    source("serviceAccounts", "web", PLAIN, NOBODY),
    source("trustDomains", "cluster.local", PLAIN, BANK),
    source("trustDomains", "*.local", PLAIN, BANK),
    source("trustDomains", "*", PLAIN, NOBODY),
    source("ipBlocks", "198.18.1.1", PLAIN, FAR),
    source("ipBlocks", "198.18.0.0/15", PLAIN, FAR),
    source("ipBlocks", "fd00:6d62::/32", V6, PLAIN),
    source("ipBlocks", "0.0.0.0/0", PLAIN, V6),
    source("remoteIpBlocks", "198.51.100.0/24", PROXIED, PLAIN),
    source("remoteIpBlocks", "198.18.0.0/15", BAD_XFF, PROXIED),
    operation("ports", "80", PLAIN, PORT_8080),
    when("source.ip", "198.18.1.1", PLAIN, FAR),
    when("remote.ip", "198.51.100.7", PROXIED, PLAIN),
    when("source.namespace", "shop", PLAIN, BANK),
    when("source.serviceAccount", "shop/web", PLAIN, BANK),
    when("source.trustDomain", "cluster.local", PLAIN, BANK),
    when("source.principal", "cluster.local/ns/shop/sa/web", PLAIN, BANK),
    when("destination.ip", "198.18.9.0/24", PLAIN, V6),
    when("destination.port", "8080", PORT_8080, PLAIN),
]
HTTP = [
    operation("hosts", "echo", PLAIN, request(authority="other")),
    operation("hosts", "ECHO.example", request(authority="Echo.Example"), PLAIN),
    operation("hosts", "*.example", request(authority="a.EXAMPLE"), PLAIN),
    operation("hosts", "echo:*", request(authority="echo:80"), PLAIN),
    operation("methods", "GET", PLAIN, request("POST")),
    operation("methods", "P*", request("PUT"), PLAIN),
    operation("paths", "/admin", request(path="/admin?x=1"), request(path="/admin/x")),
    operation("paths", "/admin/*", request(path="/admin/x"), request(path="/admin")),
    operation("paths", "*.js", request(path="/x.js?v=2"), request(path="/x?y=.js")),
    operation("paths", "/a/{*}/c", request(path="/a/b/c"), request(path="/a/b/x/c")),
    operation("paths", "/a/{*}/c", request(path="/a/b/c?q"), request(path="/a//c")),
    operation("paths", "/a/{**}", request(path="/a/b/c"), request(path="/b/a/c")),
    operation("paths", "/a/{**}", request(path="/a/"), request(path="/a")),
    operation("paths", "/{*}/x/{**}", request(path="/v1/x/y/z"), request(path="/v1/y/x/z")),
    source("requestPrincipals", "https://issuer.example/alice", ALICE, BOB),
    source("requestPrincipals", "https://issuer.example/*", ALICE, PLAIN),
    source("requestPrincipals", "https://issuer.example/a*", ALICE, BOB),
    source("requestPrincipals", "*/alice", ALICE, BOB),
    source("requestPrincipals", "*issuer.example/alice", ALICE, BOB),
    source("requestPrincipals", "*ice", ALICE, BOB),
    source("requestPrincipals", "*", ALICE, PLAIN),
    when("request.auth.principal", "https://issuer.example/alice", ALICE, BOB),
    when("request.auth.audiences", "shop", ALICE, BOB),
    when("request.auth.audiences", "bank", BOB, PLAIN),
    when("request.auth.presenter", "frontend", ALICE, BOB),
    when("request.auth.claims[groups]", "dev", ALICE, BOB),
    when("request.auth.claims[groups]", "adm*", ALICE, BOB),
    when("request.auth.claims[nested][team][name]", "red", ALICE, BOB),
    when("request.auth.claims[sub]", "*", ALICE, PLAIN),
    when("request.headers[X-Tier]", "gold", request(headers={"x-tier": "gold"}), PLAIN),
    when("request.headers[x-tier]", "g*", request(headers={"x-tier": "gold"}), PLAIN),
    when("request.headers[x-tier]", "*d", request(headers={"x-tier": "gold"}), PLAIN),
    when("request.headers[x-tier]", "*", request(headers={"x-tier": ""}), PLAIN),
]


def policy(rule: dict[str, Any], action: str) -> AuthorizationFilter:
    spec = {"action": action, "rules": [rule]}
    return AuthorizationFilter(
        [parse_policy(an_object("security.istio.io", "AuthorizationPolicy", "p", spec))]
    )


def http(rule: dict[str, Any], action: str, exchange: Exchange) -> bool:
    return policy(rule, action).on_request(exchange) is CONTINUE


def tcp(rule: dict[str, Any], action: str, exchange: Exchange) -> bool:
    return policy(rule, action).on_connect(exchange.connection) is CONTINUE


@pytest.mark.parametrize(("plain", "negated", "yes", "no"), L4 + HTTP)
def test_on_http(plain: Any, negated: Any, yes: Exchange, no: Exchange) -> None:
    assert http(plain, "ALLOW", yes)
    assert not http(plain, "ALLOW", no)
    assert not http(plain, "DENY", yes)
    assert http(plain, "DENY", no)
    assert not http(negated, "ALLOW", yes)
    assert http(negated, "ALLOW", no)
    assert http(negated, "DENY", yes)
    assert not http(negated, "DENY", no)


def reads_forwarded(rule: dict[str, Any]) -> bool:
    return "remoteIp" in str(rule) or "remote.ip" in str(rule)


@pytest.mark.parametrize(
    ("plain", "negated", "yes", "no"), [row for row in L4 if not reads_forwarded(row.values[0])]
)
def test_on_tcp(plain: Any, negated: Any, yes: Exchange, no: Exchange) -> None:
    assert tcp(plain, "ALLOW", yes)
    assert not tcp(plain, "ALLOW", no)
    assert not tcp(plain, "DENY", yes)
    assert tcp(plain, "DENY", no)
    assert not tcp(negated, "ALLOW", yes)
    assert tcp(negated, "ALLOW", no)
    assert tcp(negated, "DENY", yes)
    assert not tcp(negated, "DENY", no)


@pytest.mark.parametrize("form", ["remoteIpBlocks", "remote.ip"])
def test_the_remote_address_of_tcp_is_the_peers_own(form: str) -> None:
    rule: dict[str, Any] = {"when": [{"key": form, "values": ["198.18.1.1"]}]}
    if form == "remoteIpBlocks":
        rule = {"from": [{"source": {form: ["198.18.1.1"]}}]}
    assert tcp(rule, "ALLOW", PROXIED)
    assert not tcp(rule, "DENY", PROXIED)
    assert not tcp(rule, "ALLOW", FAR)


@pytest.mark.parametrize(("plain", "negated", "yes", "no"), HTTP)
def test_what_only_http_has_closes_tcp(
    plain: Any, negated: Any, yes: Exchange, no: Exchange
) -> None:
    for rule in (plain, negated):
        for exchange in (yes, no):
            assert not tcp(rule, "ALLOW", exchange)  # the rule is left out
            assert not tcp(rule, "DENY", exchange)  # only its L4 part, which is empty, counts


def test_a_deny_on_tcp_keeps_its_layer_4_tests() -> None:
    rule = {"to": [{"operation": {"methods": ["GET"], "ports": ["8080"]}}]}
    assert tcp(rule, "DENY", PLAIN)
    assert not tcp(rule, "DENY", PORT_8080)


def test_no_sni_is_known_at_a_waypoint() -> None:
    rule = {"when": [{"key": "connection.sni", "values": ["*"]}]}
    assert not http(rule, "ALLOW", PLAIN)
    assert not tcp(rule, "ALLOW", PLAIN)
    rule = {"when": [{"key": "connection.sni", "notValues": ["*"]}]}
    assert http(rule, "ALLOW", PLAIN)
    assert tcp(rule, "ALLOW", PLAIN)


def test_a_claim_that_is_a_number_matches_no_text() -> None:
    rule = {"when": [{"key": "request.auth.claims[level]", "values": ["3", "*"]}]}
    assert not http(rule, "ALLOW", ALICE)


def test_the_answer_is_the_one_that_envoy_gives() -> None:
    denied = policy({"to": [{"operation": {"paths": ["/admin"]}}]}, "DENY").on_request(
        request(path="/admin")
    )
    assert denied == Reply(
        403,
        b"RBAC: access denied",
        (("content-type", "text/plain"),),
        "rbac_access_denied_matched_policy[ns[shop]-policy[p]-rule[0]]",
    )
    none = policy({"to": [{"operation": {"paths": ["/open"]}}]}, "ALLOW").on_request(request())
    assert isinstance(none, Reply)
    assert none.detail == "rbac_access_denied_matched_policy[none]"


def test_tcp_is_judged_as_such() -> None:
    connection = a_connection(protocol=Protocol.TCP)
    rule = {"from": [{"source": {"namespaces": ["bank"]}}]}
    assert isinstance(policy(rule, "ALLOW").on_connect(connection), Reply)
