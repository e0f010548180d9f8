"""The compiled evaluator agrees with a naive reading of the specs, on HTTP and on TCP."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.l7.authz.decision import Decider
from meshbpf.agent.l7.authz.facts import Facts
from meshbpf.agent.l7.authz.parse import parse_policy
from meshbpf.agent.l7.exchange import Exchange
from tests.unit.l7 import naive_authz
from tests.unit.l7.samples import a_connection, an_exchange, an_object

# Few values, so that policies and requests meet often.
WORDS = ["a", "b", "ab", "ba"]
TEXTS = [*WORDS, "a*", "*b", "*"]
PATHS = ["/", "/a", "/a/b", "/b/a/", "/a/b/ab"]
PATH_PATTERNS = [*PATHS, "/a*", "*b", "*", "/{*}", "/a/{**}", "/{*}/b/{**}", "/{*}/{*}"]
CIDRS = ["198.18.0.0/31", "198.18.0.1", "0.0.0.0/0", "fd00:6d62::/32", "198.18.9.9"]
ADDRESSES = ["198.18.0.1", "198.18.0.2", "fd00:6d62::1"]
PORTS = ["80", "443"]
ISSUERS = ["https://i/x", "j"]

identities = st.builds(
    SpiffeId, st.sampled_from(WORDS), st.sampled_from(WORDS), st.sampled_from(WORDS)
)
SOURCE = {
    "principals": [*(f"{a}/ns/{b}/sa/a" for a in WORDS for b in WORDS), "a/*", "*/a", "*"],
    "requestPrincipals": [*(f"{i}/{s}" for i in ISSUERS for s in WORDS), "*"],
    "namespaces": [*TEXTS, "a*b"],
    "trustDomains": TEXTS,
    "ipBlocks": CIDRS,
    "remoteIpBlocks": CIDRS,
}
ACCOUNTS = ["a", "b/a", "shop/a", "ab/b"]
OPERATION = {"hosts": TEXTS, "ports": PORTS, "methods": TEXTS, "paths": PATH_PATTERNS}
KEYS = {
    "source.ip": CIDRS,
    "remote.ip": CIDRS,
    "source.namespace": TEXTS,
    "source.serviceAccount": ACCOUNTS,
    "source.trustDomain": TEXTS,
    "source.principal": SOURCE["principals"],
    "destination.ip": CIDRS,
    "destination.port": PORTS,
    "connection.sni": TEXTS,
    "request.auth.principal": SOURCE["requestPrincipals"],
    "request.auth.audiences": TEXTS,
    "request.auth.presenter": TEXTS,
    "request.auth.claims[groups]": TEXTS,
    "request.auth.claims[nested][name]": TEXTS,
    "request.headers[X-A]": TEXTS,
}


def some(values: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3)


def both_forms(fields: dict[str, list[str]]) -> dict[str, st.SearchStrategy[list[str]]]:
    negated = {f"not{name[0].upper()}{name[1:]}": values for name, values in fields.items()}
    return {name: some(values) for name, values in {**fields, **negated}.items()}


def records(fields: dict[str, list[str]]) -> st.SearchStrategy[dict[str, list[str]]]:
    known = both_forms(fields)
    names = st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({n: known[n] for n in chosen}))


def conditions() -> st.SearchStrategy[dict[str, Any]]:
    def one(key: str) -> st.SearchStrategy[dict[str, Any]]:
        forms = st.sampled_from([("values",), ("notValues",), ("values", "notValues")])
        return forms.flatmap(
            lambda names: st.fixed_dictionaries(
                {"key": st.just(key), **{name: some(KEYS[key]) for name in names}}
            )
        )

    return st.sampled_from(sorted(KEYS)).flatmap(one)


sources = st.one_of(records(SOURCE), records({"serviceAccounts": ACCOUNTS}))
rules = st.fixed_dictionaries(
    {},
    optional={
        "from": st.lists(st.fixed_dictionaries({"source": sources}), min_size=1, max_size=2),
        "to": st.lists(
            st.fixed_dictionaries({"operation": records(OPERATION)}), min_size=1, max_size=2
        ),
        "when": st.lists(conditions(), max_size=2),
    },
)
specs = st.fixed_dictionaries(
    {
        "action": st.sampled_from(["ALLOW", "DENY"]),
        "rules": st.lists(rules, max_size=3),
    }
)
claims = st.fixed_dictionaries(
    {},
    optional={
        "iss": st.sampled_from(ISSUERS),
        "sub": st.sampled_from(WORDS),
        "aud": st.one_of(st.sampled_from(WORDS), st.lists(st.sampled_from(WORDS))),
        "azp": st.sampled_from([*WORDS, 7]),
        "groups": st.lists(st.sampled_from([*WORDS, 7]), max_size=2),
        "nested": st.one_of(st.just("a"), st.fixed_dictionaries({"name": st.sampled_from(WORDS)})),
    },
)


@st.composite
def exchanges(draw: st.DrawFn) -> Exchange:
    address = draw(st.sampled_from(ADDRESSES))
    shown = f"[{address}]" if ":" in address else address
    port = draw(st.sampled_from(PORTS))
    headers = {}
    if draw(st.booleans()):
        headers["x-forwarded-for"] = f"1.2.3.4, {draw(st.sampled_from(ADDRESSES))}"
    if draw(st.booleans()):
        headers["x-a"] = draw(st.sampled_from(WORDS))
    to = draw(st.sampled_from(["198.18.9.9", "[fd00:6d62::9]"]))
    return an_exchange(
        draw(st.sampled_from(WORDS)),
        draw(st.sampled_from(PATHS)) + draw(st.sampled_from(["", "?a=/b"])),
        draw(st.sampled_from([*WORDS, "AB"])),
        headers,
        connection=a_connection(
            identity=draw(st.none() | identities),
            source=f"{shown}:1",
            destination=f"{to}:{port}",
        ),
        attributes={"jwt.claims": draw(claims)} if draw(st.booleans()) else {},
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(specs, max_size=4), st.lists(exchanges(), min_size=1, max_size=4))
def test_compiled_and_naive_agree(given_specs: list[Any], asked: list[Exchange]) -> None:
    policies = [
        parse_policy(an_object("security.istio.io", "AuthorizationPolicy", f"p{i}", spec))
        for i, spec in enumerate(given_specs)
    ]
    http, tcp = Decider(policies, tcp=False), Decider(policies, tcp=True)
    for exchange in asked:
        found = http.decide(Facts.of(exchange)).allowed
        assert found == naive_authz.allowed(given_specs, exchange, tcp=False)
        bare = an_exchange(connection=exchange.connection)
        found = tcp.decide(Facts(exchange.connection)).allowed
        assert found == naive_authz.allowed(given_specs, bare, tcp=True)
