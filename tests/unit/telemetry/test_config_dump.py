"""GET /config_dump as istioctl reads it, compared with a file that a person has read."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec

from meshbpf.agent.api import PodInfo
from meshbpf.agent.config import Settings
from meshbpf.agent.core import ca
from meshbpf.agent.core.local_xds import parse_local_xds
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.runtime import config_dump
from meshbpf.agent.runtime.certs import HeldCertificate
from meshbpf.agent.runtime.connections import ConnectionRegistry
from tests.unit.telemetry import samples

pytestmark = pytest.mark.compat

GOLDEN = Path(__file__).parent / "golden" / "config_dump.json"
NOW = datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC)

EVERYTHING = """
workloads:
- uid: full
  name: full
  namespace: ns
  workloadIps: ["198.18.3.1"]
  protocol: HBONE
  networkMode: HostNetwork
  network: net1
  trustDomain: td.example
  hostname: full.example
  capacity: 3
  status: Unhealthy
  services: {ns/cidr.example: {80: 81}}
services:
- name: cidr
  namespace: ns
  hostname: cidr.example
  vips: []
  ports: {80: 0}
  visibility: Namespace
  canonical: true
  ipFamilies: Dual
  loadBalancer: {mode: Failover, routingPreferences: [Region, Zone], healthPolicy: AllowAll}
"""


def pod(state: Any = "attached") -> PodInfo:
    return PodInfo(
        pod="shop/web-0",
        namespace="shop",
        name="web-0",
        state=state,
        reason="" if state == "attached" else "its netns is gone",
        netns="/run/netns/web",
        service_account="web",
        identity=str(samples.WEB_ID),
        workload="cluster1//v1/Pod/shop/web-0",
        addresses=("198.18.1.1",),
        interfaces=("eth0",),
        on_agent_down="closed",
        exempt_ports=(),
        exempt_cidrs=(),
        exempt_interfaces=(),
        dns=True,
        attached_at=None,
        connections=0,
    )


def dumped(mesh: Snapshot = samples.SNAPSHOT, **changes: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "mesh": mesh,
        "settings": Settings(
            node="node1",
            state_dir=Path("/var/lib/meshbpf"),
            ca_dir=Path("/etc/meshbpf/ca"),
            local_xds=Path("/etc/meshbpf/mesh.yaml"),
        ),
        "version": {"version": "0.1.0"},
        "static": {},
        "certificates": [],
        "roots_pem": ca.create("cluster.local", NOW).roots_pem,
        "pods": [pod()],
        "connections": [],
    }
    found: dict[str, Any] = json.loads(msgspec.json.encode(config_dump.dump(**(parts | changes))))
    return found


def test_the_dump_is_as_it_was_read() -> None:
    document = dumped()
    for moving in ("config", "version"):
        assert document.pop(moving)
    text = json.dumps(document, indent=2) + "\n"
    if os.environ.get("MESHBPF_GOLDEN") == "write":
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_workloads_and_policies_of_a_dump_can_be_loaded_again() -> None:
    document = dumped()
    for one in document["workloads"]:
        # A mesh file names each workload's ports by service, the dump its services only.
        one["services"] = {}
    text = yaml.safe_dump({key: document[key] for key in ("workloads", "policies")})
    again = parse_local_xds(text, "dump")
    assert {one.uid for one in again.workloads} == {one.uid for one in samples.SNAPSHOT.workloads}
    assert again.policies == tuple(samples.SNAPSHOT.policies)


def test_rare_fields_have_ztunnels_spelling() -> None:
    state = parse_local_xds(EVERYTHING, "rare.yaml")
    document = dumped(Snapshot.of(state))
    (workload,) = document["workloads"]
    assert (workload["networkMode"], workload["status"], workload["capacity"]) == (
        "HostNetwork",
        "Unhealthy",
        3,
    )
    assert (workload["network"], workload["trustDomain"]) == ("net1", "td.example")
    (service,) = document["services"]
    assert service["loadBalancer"] == {
        "routingPreferences": ["Region", "Zone"],
        "mode": "Failover",
        "healthPolicy": "AllowAll",
    }
    assert (service["ipFamilies"], service["visibility"]) == ("Dual", "Namespace")
    assert document["stagedServices"] == {}
    # Named by a workload, not there yet: staged.
    staged = dumped(Snapshot.of(replace(state, services=())))["stagedServices"]
    assert staged["ns/cidr.example"]["full"]["port"] == {"80": 81}


def test_certificates_have_decimal_serials_and_pem_in_base64_and_no_key() -> None:
    authority = ca.create("cluster.local", NOW)
    key = ec.generate_private_key(ec.SECP256R1())
    chain = authority.issue(samples.WEB_ID, key.public_key(), NOW, NOW + timedelta(hours=1))
    document = dumped(
        certificates=[
            HeldCertificate(str(samples.WEB_ID), chain, ""),
            HeldCertificate("spiffe://a/ns/b/sa/pending", b"", ""),
            HeldCertificate("spiffe://a/ns/b/sa/refused", b"", "the CA said no"),
        ],
        roots_pem=authority.roots_pem,
    )
    pending, refused, available = document["certificates"]
    assert (pending["state"], pending["certChain"]) == ("Initializing", [])
    assert refused["state"] == "Unavailable: the CA said no"
    assert available["state"] == "Available"
    leaf = available["certChain"][0]
    assert base64.b64decode(leaf["pem"]).startswith(b"-----BEGIN CERTIFICATE-----")
    assert leaf["serialNumber"].isdecimal()
    assert (leaf["validFrom"], leaf["expirationTime"]) == (
        "2026-03-14T15:09:26Z",
        "2026-03-14T16:09:26Z",
    )
    assert available["rootCerts"]
    assert "PRIVATE" not in json.dumps(document)


def test_a_pod_that_is_not_attached_is_pending_and_without_connections() -> None:
    (state,) = dumped(pods=[pod("failed")])["workloadState"].values()
    assert state == {
        "state": "Pending",
        "info": {"name": "web-0", "namespace": "shop", "serviceAccount": "web"},
    }


def test_no_connections_are_two_empty_lists() -> None:
    (state,) = dumped(connections=ConnectionRegistry().list())["workloadState"].values()
    assert state["connections"] == {"inbound": [], "outbound": []}
