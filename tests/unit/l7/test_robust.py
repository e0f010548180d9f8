"""What strangers send is read or refused, and never makes a parser fail in another way."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.agent.l7.authn.keys import read_keys
from meshbpf.agent.l7.authn.places import find_tokens, remove_token
from meshbpf.agent.l7.authn.rules import HeaderPlace, JwtRule
from meshbpf.agent.l7.authn.uris import UriError, read_uri
from meshbpf.agent.l7.authn.verify import Token, check_claims, check_signature
from meshbpf.agent.l7.authz.check import read_answer
from meshbpf.agent.l7.authz.parse import closed_policy, parse_policy
from meshbpf.agent.l7.durations import parse_duration_s
from meshbpf.agent.l7.filter import CallAnswer
from meshbpf.agent.l7.message import Headers, RequestHead, ResponseHead
from meshbpf.agent.l7.paths import PathNormalization, normalize
from meshbpf.agent.l7.problem import ObjectError
from meshbpf.agent.l7.providers import Authorizer
from meshbpf.agent.l7.telemetry.log_format import compile_text
from meshbpf.agent.l7.telemetry.trace import read_parent
from meshbpf.agent.l7.wasm.abi import decode_pairs, encode_pairs
from meshbpf.agent.l7.wasm.plugin import parse_plugin
from tests.unit.l7.samples import an_exchange, an_object
from tests.unit.l7.test_authn import KEYS, NOW, encode

latin = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=200)
trees: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
# Trees that come close: the names that the readers know.
KNOWN = ["rules", "from", "source", "to", "operation", "when", "key", "values", "principals"]
KNOWN += [
    "paths",
    "targetRefs",
    "kind",
    "name",
    "action",
    "url",
    "match",
    "ports",
    "vmConfig",
    "env",
]
near: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.sampled_from(["*", "a*", "/{*}", "DENY", "Service", "file:///x", "source.ip"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KNOWN), inner, max_size=4)
    ),
    max_leaves=12,
)
RULE = JwtRule(
    "https://issuer.example",
    keys=read_keys(json.dumps(KEYS)),
    headers=(HeaderPlace("authorization", "Bearer "), HeaderPlace("x-token")),
    params=("tok",),
    cookies=("c",),
)


@settings(deadline=None)
@given(
    latin | st.tuples(st.binary(), st.binary(), st.binary()).map(lambda p: ".".join(map(encode, p)))
)
def test_tokens(text: str) -> None:
    token = Token.read(text)
    if isinstance(token, Token):
        check_claims(token, RULE, NOW)
        assert check_signature(token, RULE.keys) is not None


@settings(deadline=None)
@given(trees, trees)
def test_tokens_that_are_json(header: Any, payload: Any) -> None:
    with contextlib.suppress(ValueError):  # NaN may be asked for as a number too large
        parts = [{"alg": "ES256", "kid": "ec"} | (header if isinstance(header, dict) else {})]
        parts.append({"iss": RULE.issuer} | (payload if isinstance(payload, dict) else {}))
        text = ".".join(encode(json.dumps(part).encode()) for part in parts)
        token = Token.read(f"{text}.{encode(bytes(64))}")
        if isinstance(token, Token):
            check_claims(token, RULE, NOW)
            assert check_signature(token, RULE.keys) is not None


@settings(deadline=None)
@given(latin, latin, latin)
def test_places(query: str, cookie: str, header: str) -> None:
    raw = [(b"cookie", cookie.encode("latin-1")), (b"x-token", header.encode("latin-1"))]
    request = RequestHead("GET", f"/?tok={query}&b", "echo", Headers(raw))
    for token in list(find_tokens(request, RULE)):
        remove_token(request, RULE, token)
        assert token not in list(find_tokens(request, RULE))


@settings(deadline=None)
@given(st.binary(max_size=200) | trees.map(lambda tree: json.dumps(tree).encode()))
def test_key_sets(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        read_keys(data)


@settings(deadline=None)
@given(trees)
def test_keys_of_a_set(key: Any) -> None:
    fields = key if isinstance(key, dict) else {}
    for kind in ("RSA", "EC", "OKP", "oct"):
        with contextlib.suppress(ValueError):
            read_keys(json.dumps({"keys": [{"kty": kind, "n": "AQ", "e": "AQ", **fields}]}))


@settings(deadline=None)
@given(latin | latin.map(lambda rest: f"http://{rest}"))
def test_uris(text: str) -> None:
    with contextlib.suppress(UriError):
        read_uri(text)


@settings(deadline=None)
@given(latin)
def test_paths_are_normal_once_normalized(path: str) -> None:
    for level in PathNormalization:
        once = normalize("/" + path, level)
        assert normalize(once, level) == once
        if level is not PathNormalization.NONE:
            assert not {".", ".."} & set(once.partition("?")[0].split("/"))


@settings(deadline=None)
@given(latin)
def test_traces_and_lines(text: str) -> None:
    read_parent(Headers([(b"traceparent", text.encode("latin-1"))]))
    line = compile_text('"%REQ(A)%" %REQ(:PATH)%')(
        an_exchange(path=f"/{text}", headers={"a": text})
    )
    assert line.count("\n") == 1
    assert line.isprintable() or "\n" in line[-1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=9)), max_size=6), st.binary())
def test_header_maps_of_plugins(pairs: list[tuple[bytes, bytes]], noise: bytes) -> None:
    assert decode_pairs(encode_pairs(pairs)) == pairs
    with contextlib.suppress(ValueError):
        decode_pairs(noise)


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from([200, 403, 500]), latin)
def test_authorizers_answers(body: bytes, status: int, header: str) -> None:
    raw = [(b"content-type", b"application/grpc"), (b"grpc-status", header.encode("latin-1"))]
    for grpc in (True, False):
        answer = CallAnswer(ResponseHead(status, Headers(raw)), body)
        read_answer(Authorizer("a", read_uri("http://a.example")[0], grpc), answer)


@settings(max_examples=200, deadline=None)
@given(near | trees)
def test_objects_that_are_anything(spec: Any) -> None:
    source = an_object("security.istio.io", "AuthorizationPolicy", "p", spec)
    try:
        made = parse_policy(source)
    except ObjectError as error:
        made = closed_policy(source, error)
    assert made.key == source.key
    with contextlib.suppress(ObjectError):
        parse_plugin(an_object("extensions.istio.io", "WasmPlugin", "p", spec), {})


@settings(deadline=None)
@given(latin)
def test_durations(text: str) -> None:
    found = parse_duration_s(text)
    assert found is None or found >= 0
