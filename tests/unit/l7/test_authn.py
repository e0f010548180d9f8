"""Tokens: which are believed, what of them is passed on, and what the others are answered."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from meshbpf.agent.l7.authn.filter import AuthenticationFilter, KeyRing
from meshbpf.agent.l7.authn.keys import FRESH_S, RETRY_S, STALE_S
from meshbpf.agent.l7.authn.rules import parse_authentication
from meshbpf.agent.l7.authn.source import authentication
from meshbpf.agent.l7.exchange import Exchange
from meshbpf.agent.l7.filter import CONTINUE, Call, CallAnswer, CallFailed, Reply
from meshbpf.agent.l7.message import ResponseHead
from meshbpf.agent.l7.problem import ObjectError
from tests.unit.l7.samples import a_scope, an_exchange, an_object, drive

NOW = 1_790_000_000
ISSUER = "https://issuer.example"
EC = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(65537, 2048)
ED = Ed25519PrivateKey.generate()
OTHER = ec.generate_private_key(ec.SECP256R1())
SECRET = b"0123456789abcdef0123456789abcdef"


def jwk(key: Any, kid: str | None, algorithm: str) -> dict[str, Any]:
    kind = jwt.get_algorithm_by_name(algorithm)
    public = key if isinstance(key, bytes) else key.public_key()
    found: dict[str, Any] = kind.to_jwk(public, as_dict=True)
    return found if kid is None else {**found, "kid": kid}


KEYS = {
    "keys": [
        jwk(EC, "ec", "ES256"),
        jwk(RSA, "rsa", "RS256"),
        jwk(ED, "ed", "EdDSA"),
        jwk(SECRET, "secret", "HS256"),
    ]
}
INLINE = {"issuer": ISSUER, "jwks": json.dumps(KEYS)}


def token(key: Any = EC, algorithm: str = "ES256", kid: str | None = "ec", **claims: Any) -> str:
    payload = {"iss": ISSUER, "sub": "alice", "exp": NOW + 600, **claims}
    payload = {name: value for name, value in payload.items() if value is not None}
    headers = {} if kid is None else {"kid": kid}
    return jwt.encode(payload, key, algorithm, headers)


def rules(*given: dict[str, Any], ring: KeyRing | None = None) -> AuthenticationFilter:
    source = an_object("security.istio.io", "RequestAuthentication", "r", {"jwtRules": list(given)})
    return AuthenticationFilter(parse_authentication(source).rules, ring or KeyRing())


def bearer(text: str, **more: Any) -> Exchange:
    return an_exchange(headers={"authorization": f"Bearer {text}"}, **more)


def answer(one: AuthenticationFilter, exchange: Exchange) -> Any:
    outcome, commands = drive(one.on_request(exchange))
    assert commands == []
    return outcome


def reason(one: AuthenticationFilter, exchange: Exchange) -> str:
    outcome = answer(one, exchange)
    assert isinstance(outcome, Reply)
    return f"{outcome.status} {outcome.body.decode()}"


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"),
    [
        (EC, "ES256", "ec"),
        (EC, "ES256", None),
        (RSA, "RS256", "rsa"),
        (RSA, "PS512", "rsa"),
        (ED, "EdDSA", "ed"),
        (SECRET, "HS256", "secret"),
    ],
)
def test_a_good_token_becomes_claims(key: Any, algorithm: str, kid: str | None) -> None:
    exchange = bearer(token(key, algorithm, kid, scope="read write"))
    assert answer(rules(INLINE), exchange) is CONTINUE
    claims = exchange.attributes["jwt.claims"]
    assert (claims["iss"], claims["sub"]) == (ISSUER, "alice")
    assert claims["scope"] == ["read", "write"]


def forged() -> str:
    """A token signed with the public RSA key as if it were an HMAC secret."""
    head = {"alg": "HS256", "kid": "rsa"}
    public = RSA.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    parts = [head, {"iss": ISSUER, "sub": "alice"}]
    text = ".".join(encode(json.dumps(part).encode()) for part in parts)
    return f"{text}.{encode(hmac.new(public, text.encode(), hashlib.sha256).digest())}"


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


NONE = ".".join(
    [encode(b'{"alg":"none"}'), encode(json.dumps({"iss": ISSUER, "sub": "a"}).encode()), ""]
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (token(exp=NOW - 61), "401 Jwt is expired"),
        (token(nbf=NOW + 61), "401 Jwt not yet valid"),
        (token(exp=float("nan")), "401 Jwt is expired"),
        (token(iss="https://evil.example"), "401 Jwt issuer is not configured"),
        (token(OTHER), "401 Jwt verification fails"),
        (token(kid="new"), "401 Jwks doesn't have key to match kid or alg from Jwt"),
        (token(RSA, "RS256", "ec"), "401 Jwks doesn't have key to match kid or alg from Jwt"),
        (forged(), "401 Jwks doesn't have key to match kid or alg from Jwt"),
        (NONE, "401 Jwt header [alg] field is not supported"),
        (token()[:-8] + "AAAAAAAA", "401 Jwt verification fails"),
        (
            "nonsense",
            "401 Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
        ),
        ("a.b.c", "401 Jwt header is an invalid JSON"),
    ],
)
def test_a_bad_token_is_answered_as_envoy_answers(text: str, said: str) -> None:
    exchange = bearer(text)
    assert reason(rules(INLINE), exchange) == said
    assert "jwt.claims" not in exchange.attributes


def test_the_clock_may_be_a_minute_off() -> None:
    assert answer(rules(INLINE), bearer(token(exp=NOW - 59))) is CONTINUE
    assert answer(rules(INLINE), bearer(token(nbf=NOW + 59))) is CONTINUE
    assert answer(rules(INLINE), bearer(token(exp=None))) is CONTINUE


def test_the_challenge_names_the_request() -> None:
    outcome = answer(rules(INLINE), bearer("x", path="/a?b=c", authority="echo:80"))
    assert outcome.headers == (
        ("www-authenticate", 'Bearer realm="http://echo:80/a", error="invalid_token"'),
        ("content-type", "text/plain"),
    )
    assert outcome.detail.startswith("jwt_authn_access_denied{Jwt_is_not_in_the_form")


def test_without_a_token_the_request_passes() -> None:
    exchange = an_exchange()
    assert answer(rules(INLINE), exchange) is CONTINUE
    assert "jwt.claims" not in exchange.attributes


def test_audiences_compare_without_scheme_and_are_forbidden_otherwise() -> None:
    one = rules({**INLINE, "audiences": ["https://shop/", "bank"]})
    assert answer(one, bearer(token(aud="shop"))) is CONTINUE
    assert answer(one, bearer(token(aud=["x", "http://bank"]))) is CONTINUE
    assert reason(one, bearer(token(aud="x"))) == "403 Audiences in Jwt are not allowed"
    assert reason(one, bearer(token())) == "403 Audiences in Jwt are not allowed"


def test_a_preflight_is_not_asked() -> None:
    preflight = {"origin": "https://a", "access-control-request-method": "GET"}
    exchange = an_exchange("OPTIONS", headers={**preflight, "authorization": "Bearer x"})
    assert answer(rules(INLINE), exchange) is CONTINUE


PLACES = {
    "fromHeaders": [{"name": "X-Token"}, {"name": "x-jwt", "prefix": "JWT "}],
    "fromParams": ["tok"],
    "fromCookies": ["session"],
}


@pytest.mark.parametrize(
    ("path", "headers", "path_left", "headers_left"),
    [
        ("/a", {"x-token": "T"}, "/a", {}),
        ("/a", {"x-jwt": "JWT T"}, "/a", {}),
        ("/a?x=1&tok=T&y=2", {}, "/a?x=1&y=2", {}),
        ("/a?tok=T", {}, "/a", {}),
        ("/a", {"cookie": "a=b; session=T; c=d"}, "/a", {"cookie": "a=b; c=d"}),
        ("/a", {"cookie": "session=T"}, "/a", {}),
    ],
)
def test_a_token_is_found_in_its_place_and_taken_out(
    path: str, headers: dict[str, str], path_left: str, headers_left: dict[str, str]
) -> None:
    text = token()
    filled = {name: value.replace("T", text, 1) for name, value in headers.items()}
    filled = {k: (f"JWT {text}" if k == "x-jwt" else v) for k, v in filled.items()}
    for forward in (False, True):
        exchange = an_exchange(path=path.replace("T", text), headers=filled)
        one = rules({**INLINE, **PLACES, "forwardOriginalToken": forward})
        assert answer(one, exchange) is CONTINUE
        assert exchange.attributes["jwt.claims"]["sub"] == "alice"
        if not forward:
            assert exchange.request.path == path_left
            assert dict(exchange.request.headers.items()) == headers_left
        else:
            assert dict(exchange.request.headers.items()) == filled
    # And no longer where it is by default.
    assert answer(rules({**INLINE, **PLACES}), bearer("x")) is CONTINUE


def test_by_default_a_query_parameter_will_do() -> None:
    exchange = an_exchange(path=f"/?access_token={token()}")
    assert answer(rules(INLINE), exchange) is CONTINUE
    assert exchange.request.path == "/"


def test_payload_and_claims_become_headers_that_no_client_can_write() -> None:
    claims = [
        {"header": "X-Sub", "claim": "sub"},
        {"header": "x-level", "claim": "level"},
        {"header": "x-team", "claim": "nested.team"},
        {"header": "x-list", "claim": "list"},
        {"header": "x-none", "claim": "none"},
    ]
    one = rules({**INLINE, "outputPayloadToHeader": "X-Payload", "outputClaimToHeaders": claims})
    text = token(level=3, nested={"team": True}, list=["a"])
    exchange = bearer(text)
    assert answer(one, exchange) is CONTINUE
    assert dict(exchange.request.headers.items()) == {
        "x-payload": text.split(".")[1],
        "x-sub": "alice",
        "x-level": "3",
        "x-team": "true",
        "x-list": encode(b'["a"]'),
    }
    liar = an_exchange(headers={"x-sub": "root", "x-payload": "e30", "x-other": "kept"})
    assert answer(one, liar) is CONTINUE
    assert dict(liar.request.headers.items()) == {"x-other": "kept"}


def test_with_two_rules_either_issuers_token_will_do() -> None:
    second = {
        "issuer": "https://two.example",
        "jwks": json.dumps({"keys": [jwk(OTHER, None, "ES256")]}),
    }
    one = rules(INLINE, second)
    assert answer(one, bearer(token())) is CONTINUE
    assert answer(one, bearer(token(OTHER, kid=None, iss="https://two.example"))) is CONTINUE
    assert reason(one, bearer(token(iss="https://3"))) == "401 Jwt issuer is not configured"
    expired = bearer(token(OTHER, kid=None, iss="https://two.example", exp=1))
    assert reason(one, expired) == "401 Jwt is expired"


# --- keys that are fetched

REMOTE = {"issuer": ISSUER, "jwksUri": "https://keys.example/jwks?v=1", "timeout": "2s"}
GOOD = CallAnswer(ResponseHead(200), json.dumps(KEYS).encode())


def at(seconds: float, text: str) -> Exchange:
    exchange = bearer(text)
    exchange.started_s = seconds
    return exchange


def test_keys_are_fetched_once_and_kept() -> None:
    one = rules(REMOTE)
    outcome, commands = drive(one.on_request(at(0, token())), GOOD)
    assert outcome is CONTINUE
    (call,) = commands
    assert isinstance(call, Call)
    assert (str(call.target), call.head.path, call.head.authority) == (
        "keys.example:443",
        "/jwks?v=1",
        "keys.example",
    )
    assert call.tls
    assert call.guarded
    assert call.timeout_s == 2.0
    for seconds in (1, FRESH_S - 1):
        assert drive(one.on_request(at(seconds, token()))) == (CONTINUE, [])


def test_an_issuer_that_does_not_answer_is_asked_again_after_a_while() -> None:
    one = rules(REMOTE)
    outcome, _ = drive(one.on_request(at(0, token())), CallFailed("refused"))
    assert isinstance(outcome, Reply)
    assert outcome.body == b"Jwks remote fetch is failed"
    outcome, commands = drive(one.on_request(at(RETRY_S - 1, token())))
    assert (outcome.status, commands) == (401, [])  # type: ignore[union-attr]
    assert drive(one.on_request(at(RETRY_S, token())), GOOD)[0] is CONTINUE


@pytest.mark.parametrize(
    "bad",
    [
        CallFailed("refused"),
        CallAnswer(ResponseHead(302), b""),
        CallAnswer(ResponseHead(200), b'{"keys": []}'),
        CallAnswer(ResponseHead(200), b"\xff"),
    ],
)
def test_old_keys_serve_while_the_issuer_is_away_but_not_for_ever(bad: Any) -> None:
    one = rules(REMOTE)
    assert drive(one.on_request(at(0, token())), GOOD)[0] is CONTINUE
    assert drive(one.on_request(at(FRESH_S, token())), bad)[0] is CONTINUE
    outcome, _ = drive(one.on_request(at(STALE_S, token())), bad)
    assert isinstance(outcome, Reply)


def test_an_unknown_key_makes_for_one_early_fetch() -> None:
    old = CallAnswer(ResponseHead(200), json.dumps({"keys": [jwk(OTHER, "old", "ES256")]}).encode())
    one = rules(REMOTE)
    outcome, _ = drive(one.on_request(at(0, token())), old)
    assert isinstance(outcome, Reply)  # it was fetched only now: no second time
    outcome, commands = drive(one.on_request(at(RETRY_S, token())), GOOD)
    assert (outcome, len(commands)) == (CONTINUE, 1)


def test_without_keys_the_issuers_discovery_document_is_asked() -> None:
    one = rules({"issuer": ISSUER})
    document = CallAnswer(ResponseHead(200), b'{"jwks_uri": "https://keys.example/k"}')
    outcome, commands = drive(one.on_request(at(0, token())), document, GOOD)
    assert outcome is CONTINUE
    assert [call.head.path for call in commands if isinstance(call, Call)] == [
        "/.well-known/openid-configuration",
        "/k",
    ]


def test_a_discovery_document_cannot_point_to_the_metadata_service() -> None:
    one = rules({"issuer": ISSUER})
    document = CallAnswer(ResponseHead(200), b'{"jwks_uri": "http://169.254.169.254/k"}')
    outcome, commands = drive(one.on_request(at(0, token())), document)
    assert isinstance(outcome, Reply)
    assert len(commands) == 1


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "[::1]",
        "localhost",
        "a.localhost",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00:ec2::254]",
        "[::ffff:169.254.169.254]",
        "[64:ff9b::a9fe:a9fe]",
        "[2002:7f00:1::]",
        "100.100.100.200",
        "metadata.google.internal",
        "0.0.0.0",
        "user:pw@keys.example",
    ],
)
def test_keys_are_not_fetched_from_this_host_or_a_metadata_service(host: str) -> None:
    with pytest.raises(ObjectError) as caught:
        rules({"issuer": ISSUER, "jwksUri": f"http://{host}/jwks"})
    assert caught.value.field == "spec.jwtRules[0].jwksUri"


BAD = [
    ({"jwks": "{}"}, "spec.jwtRules[0].jwks"),
    ({"jwks": '{"keys": [{"kty": "RSA"}]}'}, "spec.jwtRules[0].jwks"),
    ({"jwksUri": "ftp://x/y"}, "spec.jwtRules[0].jwksUri"),
    ({}, "spec.jwtRules[0].issuer"),
    ({"issuer": "not a uri"}, "spec.jwtRules[0].issuer"),
    ({**INLINE, "outputPayloadToHeader": "a b"}, "spec.jwtRules[0].outputPayloadToHeader"),
    ({**INLINE, "fromHeaders": [{}]}, "spec.jwtRules[0].fromHeaders[0].name"),
    ({**INLINE, "timeout": "5 s"}, "spec.jwtRules[0].timeout"),
    ({**INLINE, "audience": ["x"]}, "spec.jwtRules[0].audience"),
]


@pytest.mark.parametrize(("rule", "field"), BAD)
def test_a_bad_field_is_named(rule: dict[str, Any], field: str) -> None:
    with pytest.raises(ObjectError) as caught:
        rules(rule)
    assert caught.value.field == field


def test_a_bad_object_is_reported_and_the_others_hold() -> None:
    echo = [{"kind": "Service", "name": "echo"}]
    group, kind = "security.istio.io", "RequestAuthentication"
    bad = an_object(group, kind, "bad", {"targetRefs": echo, "jwtRules": [{}]})
    good = an_object(group, kind, "good", {"targetRefs": echo, "jwtRules": [INLINE]})
    filters, problems = authentication(a_scope(bad, good))
    assert [problem.key.name for problem in problems] == ["bad"]
    assert isinstance(filters[0], AuthenticationFilter)
    assert answer(filters[0], bearer(token())) is CONTINUE
