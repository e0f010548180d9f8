"""`meshbpf explain` beside what really happens to the same connection."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.netns.talk import in_kernel, passes, refused
from tests.progs.pod import Family, Pod
from tests.progs.server import ECHO, EXEMPT
from tests.testbed import Testbed

pytestmark = [pytest.mark.root, pytest.mark.netns]


def explained(bed: Testbed, source: Pod, target: str) -> dict[str, Any]:
    done = bed.agents[source.node].cli("explain", source.key, target, "-o", "json")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def told(answer: dict[str, Any], stage: str) -> str:
    return " ".join(f"{s['what']} {s['why']}" for s in answer["steps"] if s["stage"] == stage)


def test_a_service_by_its_name_goes_through_a_tunnel(bed: Testbed, family: Family) -> None:
    pod, server = bed["n1a"], bed["n2a"]
    passes(bed, pod, server.vip(family), 80)
    answer = explained(bed, pod, f"{server.name}:80")
    assert answer["outcome"] == "hbone"
    assert server.identity in told(answer, "tunnel")
    assert "one of 1 usable endpoints" in told(answer, "service")


def test_what_the_kernel_carries_is_said(bed: Testbed, family: Family) -> None:
    pod, server = bed["n1a"], bed["n1b"]
    address = server.address(family)
    bracketed = f"[{address}]" if family == 6 else address
    for target, says in ((f"{bracketed}:{ECHO}", "carries it"), (f"{server.name}:80", "all of")):
        answer = explained(bed, pod, target)
        assert answer["outcome"] == ("kernel" if in_kernel(bed) else "hbone")
        assert (says in told(answer, "kernel")) == in_kernel(bed)
    with bed.policy(action="Deny", rules=[[[{"destinationPorts": [ECHO]}]]]):
        assert explained(bed, pod, f"{bracketed}:{ECHO}")["outcome"] == "denied"


def test_a_denial_is_explained_by_the_policy_that_makes_it(bed: Testbed, family: Family) -> None:
    pod, server = bed["n1a"], bed["n2a"]
    principal = pod.identity.removeprefix("spiffe://")
    rules = [[[{"principals": [{"Exact": principal}]}]]]
    target = server.address(family)
    with bed.policy(action="Deny", rules=rules):
        refused(bed, pod, target)
        bracketed = f"[{target}]" if family == 6 else target
        answer = explained(bed, pod, f"{bracketed}:{ECHO}")
        assert answer["outcome"] == "denied"
        assert "DENY policy apps/test matches" in told(answer, "policy")


def test_what_the_hooks_leave_alone_is_read_from_the_kernels_maps(bed: Testbed) -> None:
    pod, outside = bed["n1a"], bed["n2x"]
    answer = explained(bed, pod, f"{outside.ipv4}:{ECHO}")
    assert answer["outcome"] == "plaintext"
    answer = explained(bed, pod, f"{bed['n2a'].ipv4}:{EXEMPT}")
    assert answer["outcome"] == "plaintext"
    assert "exempt" in told(answer, "capture")
    answer = explained(bed, pod, "198.51.100.99:80")
    assert "not in the mesh, by the kernel's map" in told(answer, "capture")
