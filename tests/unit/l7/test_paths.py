"""Paths are brought to one spelling before they are judged."""

import pytest

from meshbpf.agent.l7.filter import CONTINUE
from meshbpf.agent.l7.paths import NormalizePath, PathNormalization, normalize
from tests.unit.l7.samples import an_exchange

BASE = PathNormalization.BASE
MERGE = PathNormalization.MERGE_SLASHES
DECODE = PathNormalization.DECODE_AND_MERGE_SLASHES


@pytest.mark.parametrize(
    ("level", "given", "normal"),
    [
        (BASE, "/a/b?x=/../y", "/a/b?x=/../y"),
        (BASE, "/x/../admin", "/admin"),
        (BASE, "/x/%2e%2E/admin", "/admin"),
        (BASE, "/../../admin", "/admin"),
        (BASE, "/a/./b/.", "/a/b/"),
        (BASE, "/a/..", "/"),
        (BASE, "/%61dmin", "/admin"),
        (BASE, "/a%20b", "/a%20b"),
        (BASE, "/a%2Fb", "/a%2Fb"),
        (BASE, "/a%252e", "/a%252e"),
        (BASE, "/a\\..\\admin", "/admin"),
        (BASE, "/a#b?c", "/a?c"),
        (BASE, "/.hidden", "/.hidden"),
        (BASE, "//admin", "//admin"),
        (BASE, "*", "*"),
        (MERGE, "//admin///x", "/admin/x"),
        (MERGE, "/a%2Fb", "/a%2Fb"),
        (DECODE, "/a%2f%5Cb", "/a/b"),
        (DECODE, "/a%2f..%2fadmin?q=%2f", "/admin?q=%2f"),
        (PathNormalization.NONE, "/x/../admin", "/x/../admin"),
    ],
)
def test_level(level: PathNormalization, given: str, normal: str) -> None:
    assert normalize(given, level) == normal
    assert normalize(normal, level) == normal


def test_what_is_forwarded_is_what_was_judged() -> None:
    exchange = an_exchange(path="/a/../admin?x")
    assert NormalizePath().on_request(exchange) is CONTINUE
    assert exchange.request.path == "/admin?x"
