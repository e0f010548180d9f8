"""A revocation list that arrives: the peer's live connections end, new ones are refused."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.agent import ca_files
from meshbpf.agent.api import CertsRequest, StatusRequest
from tests.netns.talk import echo, ends, passes, refused
from tests.progs import server
from tests.progs.pod import Family, Pod
from tests.revoking import crl_pem
from tests.testbed import SUITE_TAG, Agent, Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]

IN_FORCE_WITHIN_S = 5.0
"""The poll's two seconds, and room for a busy machine."""


@pytest.fixture(scope="module")
def revoking() -> Iterator[Testbed]:
    with Testbed(f"{SUITE_TAG}crl") as bed:
        _folder(bed).mkdir()
        bed.start_agents("--crl-dir", str(_folder(bed)))
        bed.start_servers()
        bed.attach_all()
        yield bed


def test_a_list_that_arrives_cuts_the_tunnel_and_keeps_the_peer_out(
    revoking: Testbed, family: Family
) -> None:
    bed = revoking
    there = bed["n1a"].address(family)
    with (
        bed.connect(bed["n2a"], there, server.ECHO) as revoked,
        bed.connect(bed["n2b"], there, server.ECHO) as other,
    ):
        echo(revoked)
        echo(other)
        _publish(bed, int(_serial(bed.agents[2], bed["n2a"]), 16))
        assert ends(revoked, IN_FORCE_WITHIN_S) == "reset"
        echo(other)
        refused(bed, bed["n2a"], there)
        passes(bed, bed["n2b"], there)
    _publish(bed)
    _until_passes(bed, there)


def test_a_bad_file_is_a_warning_and_changes_nothing(revoking: Testbed, family: Family) -> None:
    bed = revoking
    (_folder(bed) / "bad.pem").write_text("nonsense")
    try:
        deadline = time.monotonic() + IN_FORCE_WITHIN_S
        while not (told := bed.agents[1].ask(StatusRequest()).warnings):
            assert time.monotonic() < deadline, "no warning"
            time.sleep(0.1)
        assert "bad.pem is no certificate revocation list" in told[0]
        passes(bed, bed["n1a"], bed["n2a"].address(family))
    finally:
        (_folder(bed) / "bad.pem").unlink()
    deadline = time.monotonic() + IN_FORCE_WITHIN_S
    while bed.agents[1].ask(StatusRequest()).warnings:
        assert time.monotonic() < deadline, "the warning stays"
        time.sleep(0.1)


def _folder(bed: Testbed) -> Path:
    return bed.directory / "crl"


def _serial(agent: Agent, pod: Pod) -> str:
    certs = agent.ask(CertsRequest()).certs
    (found,) = [one.serial for one in certs if one.identity == pod.identity]
    return found


def _publish(bed: Testbed, *serials: int) -> None:
    authority = ca_files.load(bed.ca_dir)
    fresh = _folder(bed) / ".new"
    fresh.write_bytes(crl_pem(authority.issuer, authority.key, *serials))
    os.replace(fresh, _folder(bed) / "mesh.pem")


def _until_passes(bed: Testbed, there: str) -> None:
    """The revocation was taken back: new connections work again."""
    deadline = time.monotonic() + IN_FORCE_WITHIN_S
    while True:
        try:
            passes(bed, bed["n2a"], there)
        except OSError:
            assert time.monotonic() < deadline, "refused for good"
            time.sleep(0.2)
        else:
            return
