"""The mesh written as Kubernetes and Istio objects: real agents do the same with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netns.talk import echo, ends, passes, refused
from tests.progs.pod import NAMESPACE, Family
from tests.progs.server import ECHO
from tests.progs.sniffer import Sniffer
from tests.testbed import SUITE_TAG, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


@pytest.fixture(scope="module")
def written() -> Iterator[Testbed]:
    with Testbed(f"{SUITE_TAG}man", manifests=True) as bed:
        bed.start_agents()
        bed.start_servers()
        bed.attach_all()
        yield bed


def istio(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def test_pods_talk_over_hbone_and_by_service(written: Testbed, family: Family) -> None:
    client, server = written["n1a"], written["n2a"]
    with Sniffer(written.node_netns(1), "trunk", ()) as sniffer:
        passes(written, client, server.address(family))
        passes(written, client, server.vip(family), 80)
    assert sniffer.seen.tcp_service_ports() == {15008}
    passes(written, written["n1x"], server.address(family))  # opted out, and plain


def test_an_authorization_policy_cuts_a_live_connection_and_goes_again(
    written: Testbed, family: Family
) -> None:
    client, target = written["n1a"], written["n2a"].address(family)
    ports = {"operation": {"ports": [str(ECHO)]}}
    policy = istio("AuthorizationPolicy", "no-echo", {"action": "DENY", "rules": [{"to": [ports]}]})
    with written.connect(client, target, ECHO) as sock:
        echo(sock)
        written.policies.append(policy)
        try:
            written.write_mesh()
            written.wait_mesh()
            assert ends(sock, 2.0)
            refused(written, client, target)
        finally:
            written.policies.remove(policy)
            written.write_mesh()
            written.wait_mesh()
    passes(written, client, target)


def test_strict_peer_authentication_refuses_plaintext(written: Testbed, family: Family) -> None:
    target = written["n2a"].address(family)
    strict = istio("PeerAuthentication", "default", {"mtls": {"mode": "STRICT"}})
    written.policies.append(strict)
    try:
        written.write_mesh()
        written.wait_mesh()
        refused(written, written["n2x"], target)
        passes(written, written["n1a"], target)
    finally:
        written.policies.remove(strict)
        written.write_mesh()
        written.wait_mesh()


def test_a_bad_object_is_told_by_status_and_the_good_ones_stay(written: Testbed) -> None:
    agent = written.agents[1]
    broken = written.mesh_file.with_name("broken.yaml")
    broken.write_text("apiVersion: v1\nkind: Pod\nmetadata: {name: x, labels: {a: 1}}\n")
    try:
        deadline = time.monotonic() + 10
        while "broken.yaml:3: metadata.labels.a: 1 is not a text" not in (
            text := json.loads(agent.cli("status", "-o", "json", check=False).stdout)["state"][
                "error"
            ]
            or {}
        ).get("what", ""):
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        passes(written, written["n1a"], written["n2a"].ipv4)
    finally:
        broken.unlink()
    written.wait_mesh()


def test_a_service_entry_is_reached_by_its_address_through_the_pods_and_names_it_lists(
    written: Testbed,
) -> None:
    client, server = written["n1a"], written["n2a"]
    port = {"number": 80, "name": "echo", "protocol": "TCP", "targetPort": ECHO}
    selecting = {"workloadSelector": {"labels": {"app": server.name}}}
    listing = {"endpoints": [{"address": written["n2x"].ipv4}]}
    entries = [
        istio("ServiceEntry", name, {"resolution": "STATIC", "ports": [port]} | spec)
        | {"apiVersion": "networking.istio.io/v1"}
        for name, spec in (
            ("selects", {"hosts": ["a.example"], "addresses": ["198.19.77.1"]} | selecting),
            ("lists", {"hosts": ["b.example"], "addresses": ["198.19.77.2"]} | listing),
        )
    ]
    written.policies.extend(entries)
    try:
        written.write_mesh()
        written.wait_mesh()
        with Sniffer(written.node_netns(1), "trunk", ()) as sniffer:
            passes(written, client, "198.19.77.1", 80)
        assert sniffer.seen.tcp_service_ports() == {15008}
        passes(written, client, "198.19.77.2", 80)
    finally:
        for each in entries:
            written.policies.remove(each)
        written.write_mesh()
        written.wait_mesh()
