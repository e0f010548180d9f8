"""The status page in a real browser: it shows live data, and its policy stops everything else."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.netns.talk import echo, refused
from tests.progs.inside import NETNS_DIR
from tests.progs.server import ECHO
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns, pytest.mark.slow]

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def rendered(bed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The page's document after its script ran, and what the browser complained of."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    profile = tmp_path_factory.mktemp("profile")
    client, server = bed["n1a"], bed["n2a"]
    rules = [[[{"destinationPorts": [9]}]]]
    with bed.policy(action="Deny", rules=rules):
        refused(bed, bed["n2b"], bed["n1a"].ipv4, 9)
    with bed.connect(client, server.ipv4, ECHO) as sock:
        echo(sock)
        return browse(bed, profile, "http://127.0.0.1:15000/")


def browse(bed: Testbed, profile: Path, url: str) -> tuple[str, str]:
    argv = ["nsenter", f"--net={NETNS_DIR / bed.node_netns(1)}", str(CHROMIUM)]
    argv += ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    argv += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"]
    argv += ["--virtual-time-budget=4000", "--dump-dom", url]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def section(document: str, name: str) -> str:
    found = re.search(rf'<table id="{name}">(.*?)</table>', document, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_page_shows_health_pods_certificates_flows_and_denials(
    bed: Testbed, rendered: tuple[str, str]
) -> None:
    document, _complaints = rendered
    assert re.search(r'id="health"[^>]* class="ready"[^>]*>ready<', document)
    assert bed["n1a"].key in section(document, "pods")
    assert bed["n1a"].identity in section(document, "certs")
    assert "valid" in section(document, "certs")
    assert bed["n2a"].ipv4 in section(document, "connections")
    assert "<td" in section(document, "flows")
    assert "DENY policy" in section(document, "denials")


def test_the_browser_blocks_nothing_of_the_page(rendered: tuple[str, str]) -> None:
    _document, complaints = rendered
    console = [line for line in complaints.splitlines() if "CONSOLE" in line]
    # A browser asks for an icon by itself; there is none.
    assert not [line for line in console if "favicon" not in line]
