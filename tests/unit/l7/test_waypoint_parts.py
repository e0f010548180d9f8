"""Retries and their budget, sessions, replies, admission of CONNECTs, regular expressions."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.route import Refused
from meshbpf.agent.core.service import Service
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import (
    GatewayAddress,
    NetworkAddress,
    Workload,
)
from meshbpf.agent.l7 import session
from meshbpf.agent.l7.admission import admit
from meshbpf.agent.l7.exchange import Destination, Protocol
from meshbpf.agent.l7.filter import Chain, Reply
from meshbpf.agent.l7.message import Headers
from meshbpf.agent.l7.plan import ServicePlan, WaypointPlan
from meshbpf.agent.l7.regex import Regex, RegexError
from meshbpf.agent.l7.replies import reply_head
from meshbpf.agent.l7.retry import Failure, RetryBudget, backoff_s, may_repeat
from meshbpf.agent.l7.rules import Session, SessionKind
from meshbpf.agent.runtime.waypoint.workers import add_up


@pytest.mark.parametrize(
    ("failure", "method", "repeated"),
    [
        (Failure.UNSENT, "POST", True),
        (Failure.BROKEN, "GET", True),
        (Failure.BROKEN, "PUT", True),
        (Failure.BROKEN, "POST", False),
        (Failure.BROKEN, "PATCH", False),
        (Failure.TIMEOUT, "DELETE", True),
        (Failure.TIMEOUT, "POST", False),
        (Failure.BAD_ANSWER, "GET", False),
    ],
)
def test_only_what_is_safe_is_sent_again(failure: Failure, method: str, repeated: bool) -> None:
    assert may_repeat(failure, method) is repeated


def test_retries_are_a_fifth_of_the_requests_and_ten_a_second() -> None:
    budget = RetryBudget(0.0)
    assert sum(budget.take(0.0) for _ in range(100)) == 10
    for _ in range(101):
        budget.earned()
    assert sum(budget.take(0.0) for _ in range(100)) == 20
    assert sum(budget.take(2.0) for _ in range(100)) == 20


def test_waits_between_retries_grow_up_to_ten_times_the_base() -> None:
    assert backoff_s(0.025, 1, 1.0) == pytest.approx(0.05)
    assert backoff_s(0.025, 20, 1.0) == pytest.approx(0.25)
    assert backoff_s(0.025, 3, 0.0) == 0.0


def test_a_session_by_cookie_ends_at_its_absolute_time() -> None:
    sticky = Session("where", absolute_s=60.0, permanent=True)
    answer = Headers()
    session.remember(sticky, Headers(), answer, "abc", 1000.0)
    cookie = answer.get("set-cookie") or ""
    assert cookie == "where=abc.1000; Path=/; HttpOnly; Max-Age=60"
    asked = Headers([(b"cookie", b"a=b; where=abc.1000")])
    assert session.wanted(sticky, asked, 1059.0) == "abc"
    assert session.wanted(sticky, asked, 1060.0) == ""
    again = Headers()
    session.remember(sticky, asked, again, "abc", 1030.0)
    assert len(again) == 0
    session.remember(sticky, asked, again, "other", 1030.0)
    assert "where=other.1030" in (again.get("set-cookie") or "")


def test_a_session_by_header_goes_both_ways() -> None:
    sticky = Session("x-session", SessionKind.HEADER)
    answer = Headers()
    session.remember(sticky, Headers(), answer, "abc", 5.0)
    assert session.wanted(sticky, Headers(answer.raw), 6.0) == "abc"


@pytest.mark.parametrize(
    ("status", "grpc"), [(400, "13"), (401, "16"), (403, "7"), (404, "12"), (503, "14"), (500, "2")]
)
def test_grpc_clients_find_the_status_where_they_look(status: int, grpc: str) -> None:
    head, body = reply_head(Reply(status, b"no: 100%\n"), Protocol.GRPC)
    assert (head.status, body) == (200, b"")
    assert head.headers.get("grpc-status") == grpc
    assert head.headers.get("grpc-message") == "no: 100%25"
    assert reply_head(Reply(status, b"no"), Protocol.HTTP2)[0].status == status


# --- admission -------------------------------------------------------------------

OWN = Workload("//Pod/wp", "wp", "shop", (ip_address("198.51.100.9"),), service_account="wp")
GATEWAY = GatewayAddress(NetworkAddress("", ip_address("198.51.100.9")))
CART = Service(
    "cart",
    "shop",
    "cart.shop.svc.cluster.local",
    (NetworkAddress("", ip_address("198.51.100.80")),),
    ports={80: 8080},
    waypoint=GATEWAY,
)
FREE = Service(
    "free",
    "shop",
    "free.shop.svc.cluster.local",
    (NetworkAddress("", ip_address("198.51.100.81")),),
    ports={80: 8080},
)
POD = Workload("//Pod/p", "p", "shop", (ip_address("198.51.100.1"),), waypoint=GATEWAY)
LOOSE = Workload("//Pod/q", "q", "shop", (ip_address("198.51.100.2"),))
MESH = Snapshot.of(MeshState(workloads=(OWN, POD, LOOSE), services=(CART, FREE)))
PLAN = WaypointPlan({CART.key: ServicePlan(CART, {}, Chain())})
PEER = SpiffeId("cluster.local", "shop", "web")


@pytest.mark.compat
@pytest.mark.parametrize(
    ("authority", "status"),
    [
        ("198.51.100.80:80", 0),
        ("cart.shop.svc.cluster.local:80", 0),
        ("198.51.100.1:8080", 0),  # a pod that uses this waypoint
        ("198.51.100.81:80", 400),  # bound to none
        ("198.51.100.2:8080", 400),
        ("198.51.100.77:80", 400),  # nobody's
        ("free.shop.svc.cluster.local:80", 400),
        ("gone.shop.svc.cluster.local:80", 503),
        ("198.51.100.80:81", 503),
        ("198.51.100.80:15008", 503),
        ("198.51.100.80", 400),
        ("nonsense", 400),
        ("198.51.100.80:0", 400),
    ],
)
def test_only_what_is_bound_to_the_waypoint_is_admitted(authority: str, status: int) -> None:
    found = admit(MESH, PLAN, OWN, PEER, authority)
    if status:
        assert isinstance(found, Refused)
        assert found.status == status
    else:
        assert isinstance(found, Destination)


def test_a_pattern_must_fit_the_whole_and_takes_linear_time() -> None:
    assert Regex("/a[0-9]+").fits("/a12")
    assert not Regex("/a[0-9]+").fits("/a12/")
    # Python's own engine would take years for this one.
    assert not Regex("(a+)+b").fits("a" * 5000)
    with pytest.raises(RegexError, match="missing"):
        Regex("(a")


def test_pages_of_workers_are_added_up() -> None:
    one = '# TYPE a counter\na_total 1\nb{x="1"} 2.5\n'
    two = '# TYPE a counter\na_total 2\nb{x="2"} 1\n'
    assert add_up([one, two]) == '# TYPE a counter\na_total 3\nb{x="1"} 2.5\nb{x="2"} 1\n'
