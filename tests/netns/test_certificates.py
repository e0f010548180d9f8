"""Certificates are renewed at both ends under a connection that does not notice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from meshbpf.agent import ca_files
from meshbpf.agent.api import CertsRequest
from meshbpf.agent.core import ca
from tests.netns.talk import echo, passes
from tests.progs import server
from tests.progs.pod import Family
from tests.testbed import SUITE_TAG, Agent, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

TTL_S = 4


@pytest.fixture(scope="module")
def short_lived() -> Iterator[Testbed]:
    with Testbed(f"{SUITE_TAG}cert") as bed:
        bed.start_agents("--cert-ttl", f"{TTL_S}s")
        bed.start_servers()
        bed.attach_all()
        yield bed


def test_a_connection_survives_renewal_at_both_ends(short_lived: Testbed, family: Family) -> None:
    bed = short_lived
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO) as sock:
        echo(sock)
        before = [_serials(agent) for agent in bed.agents.values()]
        deadline = time.monotonic() + 1.5 * TTL_S
        while time.monotonic() < deadline:
            echo(sock)
            time.sleep(0.1)
        after = [_serials(agent) for agent in bed.agents.values()]
        for old, new in zip(before, after, strict=True):
            assert old.keys() == new.keys()
            # 1.5 lifetimes: the certificates that the tunnel began with have expired.
            assert not old.items() & new.items()
        echo(sock)
        # New tunnels take the new ones: no pod of this pair has spoken before.
        passes(bed, bed["n1b"], bed["n2b"].address(family))


def _serials(agent: Agent) -> dict[str, str]:
    certs = agent.ask(CertsRequest()).certs
    assert certs
    assert all(one.state in ("valid", "renewing") for one in certs)
    return {one.identity: one.serial for one in certs}


def test_a_ca_is_rotated_under_a_connection_without_a_restart(
    short_lived: Testbed, family: Family
) -> None:
    bed = short_lived
    old_roots = (bed.ca_dir / ca_files.ROOTS).read_bytes()
    new = ca.create("cluster.local", datetime.now(UTC))
    with bed.connect(bed["n1a"], bed["n2a"].address(family), server.ECHO) as sock:
        echo(sock)
        (old_root,) = _roots(old_roots)
        (new_root,) = _roots(new.roots_pem)
        for files, roots, root in (
            ({ca_files.ROOTS: old_roots + new.roots_pem}, {old_root, new_root}, old_root),
            (
                {ca_files.KEY: new.key_pem, ca_files.CHAIN: new.chain_pem},
                {old_root, new_root},
                new_root,
            ),
            ({ca_files.ROOTS: new.roots_pem}, {new_root}, new_root),
        ):
            for name, content in files.items():
                (bed.ca_dir / name).write_bytes(content)
            for agent in bed.agents.values():
                _wait_for_roots(agent, roots, root)
            echo(sock)
        # A pair that has not spoken: its tunnel is judged by the new root alone.
        passes(bed, bed["n1a"], bed["n2b"].address(family))
        echo(sock)


def _roots(pem: bytes) -> list[str]:
    return [
        root.fingerprint(hashes.SHA256()).hex() for root in x509.load_pem_x509_certificates(pem)
    ]


def _wait_for_roots(agent: Agent, roots: set[str], used: str) -> None:
    """Until `agent` trusts `roots` and all its certificates lead to `used`."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        found = agent.ask(CertsRequest())
        if set(found.roots) == roots and {cert.root for cert in found.certs} == {used}:
            return
        time.sleep(0.1)
    raise AssertionError(f"{agent.netns} did not follow the CA's folder: {found}")


def _serials(agent: Agent) -> dict[str, str]:
    certs = agent.ask(CertsRequest()).certs
    assert certs
    assert all(one.state in ("valid", "renewing") for one in certs)
    return {one.identity: one.serial for one in certs}
