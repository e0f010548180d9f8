"""h2spec, the conformance tests of RFC 7540 and 7541, against port 15008 of a real agent.

    make peers H2SPEC=PATH       (go install github.com/summerwind/h2spec/cmd/h2spec@latest)

It speaks to the agent through a shim of ours that holds a client certificate.
The cases that do not apply to a server that takes nothing but CONNECT are
listed in docs/compat.md with their reasons, and here; any other failure fails.
"""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from cryptography.x509 import UniformResourceIdentifier

from tests.peers.certs import Issuer
from tests.peers.tls_shim import tls_shim
from tests.progs.pod import TRUST_DOMAIN
from tests.testbed import MESHBPF, Testbed

pytestmark = [pytest.mark.peer, pytest.mark.root, pytest.mark.netns]

RUN_LIMIT_S = 300.0
CASE_LIMIT_S = 1
"""How long h2spec waits for an answer; some cases succeed by there being none."""
CASES = 145
"""So that a run that stops half-way is no success."""

_ANSWERED = "a malformed request is answered 400, which RFC 9113 (8.1.1) allows before the reset"
_NO_BODY = "only CONNECT is served: the answer to a GET has no DATA to wait for"
_HEADERS = "Sends a HEADERS frame "
NOT_APPLICABLE = {
    "generic/2: Sends a WINDOW_UPDATE frame on half-closed (remote) stream": _NO_BODY,
    "generic/2: Sends a PRIORITY frame on half-closed (remote) stream": _NO_BODY,
    "http2/4.2: Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE": (
        "it sends 20 KB, and our limit is 1 MiB"
    ),
    f"http2/8.1.2: {_HEADERS}that contains the header field name in uppercase letters": _ANSWERED,
    f"http2/8.1.2.1: {_HEADERS}that contains a unknown pseudo-header field": _ANSWERED,
    f"http2/8.1.2.1: {_HEADERS}that contains the pseudo-header field defined for response": (
        _ANSWERED
    ),
    f"http2/8.1.2.1: {_HEADERS}that contains a pseudo-header field that appears in a header "
    "block after a regular header field": _ANSWERED,
    f"http2/8.1.2.2: {_HEADERS}that contains the connection-specific header field": _ANSWERED,
    f"http2/8.1.2.2: {_HEADERS}that contains the TE header field with any value other than "
    '"trailers"': _ANSWERED,
    f'http2/8.1.2.3: {_HEADERS}with empty ":path" pseudo-header field': _ANSWERED,
    f'http2/8.1.2.3: {_HEADERS}that omits ":method" pseudo-header field': _ANSWERED,
    f'http2/8.1.2.3: {_HEADERS}that omits ":scheme" pseudo-header field': _ANSWERED,
    f'http2/8.1.2.3: {_HEADERS}that omits ":path" pseudo-header field': _ANSWERED,
    f'http2/8.1.2.3: {_HEADERS}with duplicated ":method" pseudo-header field': _ANSWERED,
    f'http2/8.1.2.3: {_HEADERS}with duplicated ":scheme" pseudo-header field': _ANSWERED,
    f'http2/8.1.2.3: {_HEADERS}with duplicated ":path" pseudo-header field': _ANSWERED,
    f'http2/8.1.2.6: {_HEADERS}with the "content-length" header field which does not equal '
    "the DATA frame payload length": _ANSWERED,
    f'http2/8.1.2.6: {_HEADERS}with the "content-length" header field which does not equal '
    "the sum of the multiple DATA frames payload length": _ANSWERED,
}

_AT_ONCE = "the answer to the GET before it is on its way, and h2spec takes that for the outcome"
RACES = {
    "http2/5.1: half closed (remote): Sends a DATA frame": _AT_ONCE,
    "http2/5.1: half closed (remote): Sends a HEADERS frame": _AT_ONCE,
    "http2/5.1: closed: Sends a DATA frame after sending RST_STREAM frame": _AT_ONCE,
    "http2/5.1: closed: Sends a HEADERS frame after sending RST_STREAM frame": _AT_ONCE,
    "http2/5.1: closed: Sends a CONTINUATION frame after sending RST_STREAM frame": _AT_ONCE,
    "http2/5.1: closed: Sends a DATA frame": _AT_ONCE,
    "http2/5.1: closed: Sends a HEADERS frame": _AT_ONCE,
    "http2/5.1.2: Sends HEADERS frames that causes their advertised concurrent stream limit to be "
    "exceeded": "each GET is answered and gone before there are 201 of them",
}
"""Cases that may fail, for the order in which two right answers are seen."""


def test_h2spec_finds_no_fault_beyond_the_listed_ones(tmp_path: Path) -> None:
    binary = os.environ.get("H2SPEC", "")
    if not binary:
        pytest.skip("needs H2SPEC=PATH, a build of github.com/summerwind/h2spec")
    report = tmp_path / "h2spec.xml"
    with Testbed("bns") as bed:
        pod, caller = bed["n2a"], bed["n1x"]
        bed.start_servers(pod)
        command = [str(MESHBPF), "ca", "init", str(bed.ca_dir), "--trust-domain", TRUST_DOMAIN]
        bed.run(bed.node_netns(2), command)
        bed.agents[2].start()
        bed.agents[2].attach(pod)
        issuer = Issuer.load(bed.ca_dir / "ca-cert.pem", bed.ca_dir / "ca-key.pem")
        own = issuer.issue(tmp_path, "h2spec", UniformResourceIdentifier(caller.identity))
        root = bed.ca_dir / "root-cert.pem"
        with tls_shim(caller.netns, (pod.ipv4, 15008), root, own) as port:
            words = [binary, "-h", "127.0.0.1", "-p", str(port), "-o", str(CASE_LIMIT_S)]
            subprocess.run(
                ["nsenter", f"--net=/run/netns/{caller.netns}", *words, "-j", str(report)],
                timeout=RUN_LIMIT_S,
                capture_output=True,
                check=False,
            )
        # Inside, so that a failure shows the agent's log.
        assert report.exists(), "h2spec did not finish"
        cases = list(ElementTree.parse(report).iter("testcase"))
        assert len(cases) == CASES
        failed = {name(case): told(case) for case in cases if case.find("failure") is not None}
        failed |= {name(case): told(case) for case in cases if case.find("error") is not None}
        unexpected = {
            each: why for each, why in failed.items() if each not in NOT_APPLICABLE | RACES
        }
        assert not unexpected, "\n".join(f"{each} => {why}" for each, why in unexpected.items())
        passed = NOT_APPLICABLE.keys() - failed.keys() - RACES.keys()
        assert not passed, "strike these off the list"


def name(case: ElementTree.Element) -> str:
    """PACKAGE: WHAT IT DOES, as h2spec writes them."""
    return f"{case.get('package')}: {case.get('classname')}"


def told(case: ElementTree.Element) -> str:
    return " ".join(" ".join(case.itertext()).split())
