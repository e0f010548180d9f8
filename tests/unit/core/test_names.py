"""Which names a pod finds in the mesh, as ztunnel finds them (its src/dns/server.rs)."""

from __future__ import annotations

import pytest

from meshbpf.agent.core.names import Host, RecordType, host, service_port
from meshbpf.agent.core.service import IPFamilies, Visibility
from meshbpf.agent.core.store import Snapshot
from tests.unit.core.builders import ip, mesh, pod, service

pytestmark = pytest.mark.compat

KUBE = "productpage.default.svc.cluster.local"
HEADLESS = "db.default.svc.cluster.local"
CLIENT = pod("client", "198.18.1.1")
STATE = mesh(
    CLIENT,
    pod("db-0", "198.18.2.1", "fd00:6d62::1", services={HEADLESS: {80: 80}}),
    pod("db-1", "198.18.2.2", services={HEADLESS: {80: 80}}),
    service(KUBE, "198.51.100.1", "fd00:6d62:ff::1"),
    service("reviews.other.svc.cluster.local", "198.51.100.2", namespace="other"),
    service(HEADLESS),
    service("www.example.com", "198.51.100.3"),
    service("*.wild.example.com", "198.51.100.4"),
    service("details.ns2.svc.cluster.local", "remote/198.51.100.6", namespace="ns2"),
    service("nowhere.example.com"),
    service(
        "secret.example.com", "198.51.100.7", namespace="other", visibility=Visibility.NAMESPACE
    ),
)
WILD = mesh(
    *STATE.workloads,
    *STATE.services,
    service("*.svc.cluster.local", "198.51.100.5", namespace="wild"),
)


def a(name: str, state: Snapshot = STATE) -> Host | None:
    return host(state, CLIENT, name, RecordType.A)


def addresses(*texts: str) -> Host:
    return Host(tuple(map(ip, texts)))


@pytest.mark.parametrize(
    "name",
    [KUBE, "productpage", "productpage.default", "productpage.default.svc"],
)
def test_a_service_is_found_by_its_name_and_each_short_form(name: str) -> None:
    assert a(name) == addresses("198.51.100.1")


def test_short_forms_are_of_the_clients_own_namespace() -> None:
    assert a("reviews.other") == addresses("198.51.100.2")
    assert a("reviews") is None


@pytest.mark.parametrize("search", ["default.svc", "svc", ""])
def test_a_search_domain_is_taken_off_and_the_answer_is_an_alias(search: str) -> None:
    name = ".".join(filter(None, ("www.example.com", search, "cluster.local")))
    assert a(name) == Host((ip("198.51.100.3"),), canonical="www.example.com")


def test_a_wildcard_that_covers_a_name_as_it_stands_comes_before_search_domains() -> None:
    found = a("www.example.com.default.svc.cluster.local", WILD)
    assert found == addresses("198.51.100.5")
    assert a("reviews", WILD) == addresses("198.51.100.5")


def test_the_most_specific_wildcard_wins_and_gives_no_alias() -> None:
    assert a("a.b.wild.example.com") == addresses("198.51.100.4")
    assert a("other.example.com") is None


def test_a_headless_service_is_its_endpoints() -> None:
    assert a(HEADLESS) == addresses("198.18.2.1", "198.18.2.2")
    found = host(STATE, CLIENT, HEADLESS, RecordType.AAAA)
    assert found == addresses("fd00:6d62::1")


@pytest.mark.parametrize(
    "name", ["db-1.db.default.svc.cluster.local", "db-1.db.default", "db-1.db"]
)
def test_a_pod_of_a_headless_service_has_a_name(name: str) -> None:
    assert a(name) == addresses("198.18.2.2")


def test_the_other_family_is_an_answer_without_records() -> None:
    assert host(STATE, CLIENT, "www.example.com", RecordType.AAAA) == Host(())
    single = mesh(
        CLIENT,
        pod("db-0", "198.18.2.1", "fd00:6d62::1", services={HEADLESS: {80: 80}}),
        service(HEADLESS, ip_families=IPFamilies.IPV4_ONLY),
    )
    assert host(single, CLIENT, HEADLESS, RecordType.AAAA) == Host(())


def test_an_address_of_another_network_is_not_told() -> None:
    assert a("details.ns2") == Host(())


def test_what_the_resolver_must_be_asked_is_none() -> None:
    assert a("nowhere.example.com") is None, "no address, and no service of the cluster's own"
    assert a("unknown.example.org") is None
    assert a("secret.example.com") is None, "not visible to this namespace"


def test_of_one_hostname_in_two_namespaces_the_clients_own_wins_then_the_preferred() -> None:
    name = "shared.example.com"
    others = [
        service(name, f"198.51.100.{number}", namespace=namespace)
        for number, namespace in ((11, "one"), (12, "two"))
    ]
    state = mesh(CLIENT, *others)
    assert host(state, CLIENT, name, RecordType.A) == addresses("198.51.100.11")
    found = host(state, CLIENT, name, RecordType.A, preferred_namespace="two")
    assert found == addresses("198.51.100.12")
    state = mesh(CLIENT, *others, service(name, "198.51.100.13"))
    found = host(state, CLIENT, name, RecordType.A, preferred_namespace="two")
    assert found == addresses("198.51.100.13")


def test_srv_is_answered_for_what_only_the_mesh_knows() -> None:
    assert service_port(STATE, CLIENT, "_http._tcp.www.example.com") == ("www.example.com", 80)
    assert service_port(STATE, CLIENT, f"_http._tcp.{KUBE}") is None, "the cluster's DNS has names"
    assert service_port(STATE, CLIENT, "_http._udp.www.example.com") is None
    assert service_port(STATE, CLIENT, "www.example.com") is None
