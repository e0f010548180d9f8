"""The chart, through a real helm."""

from __future__ import annotations

import subprocess

import pytest

from tests.testbed import ROOT

pytestmark = pytest.mark.peer


def test_the_chart_passes_helms_linter_and_the_apis_types() -> None:
    argv = [str(ROOT / "tools" / "helm-lint"), "--cached"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("DaemonSet", "ClusterRole", "PodMonitor", "PrometheusRule", "ConfigMap"):
        assert f"/{kind} mesh-meshbpf" in done.stdout
