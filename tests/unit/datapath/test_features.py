"""A probe that says no on a kernel that is new enough is a broken probe, or a broken kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshbpf.agent.datapath.features import Feature, probe

RUNNING = tuple(int(number) for number in os.uname().release.split(".")[:2])


@pytest.fixture(scope="module")
def features() -> dict[str, Feature]:
    if os.geteuid() != 0:
        pytest.skip("probes need root")
    return {feature.name: feature for feature in probe()}


KERNEL = (
    "bpf", "connect hook", "sk_lookup hook", "tc classifier", "tcx", "socket storage",
    "shared arrays", "prefix maps", "lru maps", "ring buffer",
)  # fmt: skip
MACHINE = ("cgroup v2", "bpffs", "kernel headers", "bcc")


def test_every_feature_is_held_by_a_test(features: dict[str, Feature]) -> None:
    assert set(features) == {*KERNEL, *MACHINE}


@pytest.mark.root
@pytest.mark.parametrize("name", KERNEL)
def test_a_new_enough_kernel_has_the_feature(features: dict[str, Feature], name: str) -> None:
    feature = features[name]
    assert feature.least_kernel is not None
    assert feature.consequence
    if feature.supported:
        return
    assert feature.least_kernel > RUNNING, feature.detail
    pytest.skip(f"{name} needs {feature.needs}: {feature.detail}")


@pytest.mark.root
@pytest.mark.parametrize("name", MACHINE)
def test_what_is_missing_on_this_machine_says_what_helps(
    features: dict[str, Feature], name: str
) -> None:
    feature = features[name]
    assert feature.least_kernel is None
    if not feature.supported:
        assert "hint: " in feature.detail
        pytest.skip(f"{name}: {feature.detail}")


PROBE = """
import os
from meshbpf.agent.datapath.features import probe
os.setgid(65534)
os.setuid(65534)
for feature in probe():
    print(feature.name, feature.supported, "needs root" in feature.detail, sep="/")
"""


@pytest.mark.root
@pytest.mark.skipif(
    Path("/proc/sys/kernel/unprivileged_bpf_disabled").read_text().strip() == "0",
    reason="this machine lets everybody make some maps",
)
def test_who_may_not_use_bpf_is_told_so() -> None:
    said = subprocess.run(
        [sys.executable, "-c", PROBE], check=True, capture_output=True, text=True, timeout=30
    ).stdout.splitlines()
    assert [line for line in said if line.split("/")[0] in KERNEL] == [
        f"{name}/False/True" for name in KERNEL
    ]


@pytest.mark.root
def test_without_bpf_in_the_kernel_required_features_are_missing() -> None:
    program = "from meshbpf.agent.datapath.features import probe\n" + (
        "print(*(f.name for f in probe() if f.required and not f.supported), sep='/')"
    )
    said = subprocess.run(
        [sys.executable, "-m", "tests.progs.without_bpf", sys.executable, "-c", program],
        check=True, capture_output=True, text=True, timeout=30,
    ).stdout  # fmt: skip
    assert set(said.strip().split("/")) >= {"bpf", "sk_lookup hook", "tc classifier"}
