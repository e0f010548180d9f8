"""Identities have exactly one form."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.core.identity import IdentityError, SpiffeId

pytestmark = pytest.mark.compat

parts = st.text(alphabet=string.ascii_letters + string.digits + "._-", min_size=1, max_size=63)


@given(parts, parts, parts)
def test_identity_survives_its_text(trust_domain: str, namespace: str, account: str) -> None:
    identity = SpiffeId(trust_domain, namespace, account)
    assert SpiffeId.parse(str(identity)) == identity
    assert str(identity) == f"spiffe://{identity.principal}"


@given(st.text() | st.text(alphabet="spiffe:/ns/a%?#.", max_size=40).map("spiffe://".__add__))
def test_parse_raises_only_identity_error(text: str) -> None:
    try:
        identity = SpiffeId.parse(text)
    except IdentityError:
        return
    assert str(identity) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cluster.local/ns/a/sa/b",
        "https://cluster.local/ns/a/sa/b",
        "SPIFFE://cluster.local/ns/a/sa/b",
        "spiffe:///ns/a/sa/b",
        "spiffe://cluster.local",
        "spiffe://cluster.local/",
        "spiffe://cluster.local/ns/a",
        "spiffe://cluster.local/ns//sa/b",
        "spiffe://cluster.local/ns/a/sa/",
        "spiffe://cluster.local/ns/a/sa/b/",
        "spiffe://cluster.local/ns/a/sa/b/c",
        "spiffe://cluster.local/sa/b/ns/a",
        "spiffe://cluster.local/ns/a/sa/b?x",
        "spiffe://cluster.local/ns/a/sa/b#x",
        "spiffe://cluster.local/ns/a/sa/b%20",
        "spiffe://cluster.local/ns/a/sa/b\n",
        "spiffe://cluster.local/ns/a/sa/\u0431",
    ],
)
def test_other_forms_are_no_identity(text: str) -> None:
    with pytest.raises(IdentityError) as caught:
        SpiffeId.parse(text)
    assert caught.value.code == "bad-identity"


@pytest.mark.parametrize("part", ["", "a/b", "a b", "a?b", "\n"])
def test_parts_that_no_uri_carries_are_refused(part: str) -> None:
    for arguments in ((part, "n", "s"), ("t", part, "s"), ("t", "n", part)):
        with pytest.raises(IdentityError):
            SpiffeId(*arguments)
