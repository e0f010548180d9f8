"""istioctl reads our /config_dump, and ztunnel's own example of a mesh file is read by us.

ISTIOCTL=PATH make peers        ZTUNNEL=PATH make interop, for the example in its source tree
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.local_xds import parse_local_xds
from tests.netns.talk import echo
from tests.peers.ztunnel import find_build
from tests.progs.pod import NAMESPACE
from tests.progs.server import ECHO
from tests.telemetry.web import Web
from tests.testbed import Testbed

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.netns]


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The dump of node 2's agent, with a live connection of n1a's to n2a in it."""
    if not os.environ.get("ISTIOCTL"):
        pytest.skip("needs ISTIOCTL=PATH")
    path = tmp_path_factory.mktemp("istioctl") / "dump.json"
    with Testbed("bno") as bed:
        rules = [[[{"destinationPorts": [9]}]]]
        bed.policies.append(
            {
                "name": "nine",
                "namespace": NAMESPACE,
                "scope": "Namespace",
                "action": "Deny",
                "dryRun": False,
                "rules": rules,
            }
        )
        bed.write_mesh()
        bed.start_agents()
        bed.start_servers(bed["n2a"])
        bed.attach_all()
        with bed.connect(bed["n1a"], bed["n2a"].ipv4, ECHO) as sock:
            echo(sock)
            status, _headers, body = Web(bed)(2, 15000, "/config_dump")
            assert status == 200
            path.write_text(body)
        yield path


TABLES = [
    # verb, columns, what a row must have
    ("workload", ("NAMESPACE", "POD NAME", "ADDRESS", "NODE", "PROTOCOL"), ("n2a", "HBONE")),
    ("service", ("NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT"), ("n2a", "1/1")),
    ("policy", ("NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"), ("nine", "Deny", "Namespace")),
    ("certificate", ("CERTIFICATE NAME", "TYPE", "STATUS", "VALID CERT"), ("stock", "Leaf")),
    ("connections", ("WORKLOAD", "DIRECTION", "LOCAL", "REMOTE"), ("n2a", "Inbound")),
]


@pytest.mark.parametrize(("verb", "columns", "row"), TABLES, ids=[each[0] for each in TABLES])
def test_istioctl_reads_our_dump(
    dump: Path, verb: str, columns: tuple[str, ...], row: tuple[str, ...]
) -> None:
    done = subprocess.run(
        [os.environ["ISTIOCTL"], "ztunnel-config", verb, "--file", str(dump)],
        capture_output=True,
        text=True,
        check=True,
    )
    print(done.stdout)
    head, *lines = done.stdout.splitlines()
    assert all(column in head for column in columns)
    assert any(all(text in line for text in row) for line in lines)


def test_ztunnels_example_of_a_mesh_file_is_read_unmodified() -> None:
    build = find_build()
    example = build and build.root_cert and build.root_cert.parents[2] / "examples/localhost.yaml"
    if not example or not example.is_file():
        pytest.skip("needs ZTUNNEL=PATH with its source tree, or ZTUNNEL_CA=DIR in it")
    state = parse_local_xds(example.read_text(), example.name)
    assert [one.name for one in state.workloads] == ["local", "local-tcp"]
    assert [one.hostname for one in state.services] == ["example.com", "example2.com"]
    (policy,) = state.policies
    assert policy.rules[0][0][0].not_destination_ports == (9999,)
    assert SocketAddress.parse("127.10.0.1:80").ip == state.services[0].addresses[0].ip
