"""The rights that the Helm chart gives, for tests that run under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "packaging" / "helm" / "meshbpf"
RBAC = "rbac.authorization.k8s.io"
WAYPOINT_ROLE = "meshbpf-waypoint"
"""The ClusterRole of waypoints, and its binding."""


def rules(name: str) -> list[dict[str, Any]]:
    """Of a file of the chart: `waypoint` or `controller`."""
    found: list[dict[str, Any]] = yaml.safe_load(
        (CHART / "files" / f"{name}-rules.yaml").read_text()
    )
    return found


def definitions() -> list[dict[str, Any]]:
    """The kinds that the chart brings."""
    files = sorted((CHART / "crds").glob("*.yaml"))
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


def controller_rules() -> list[dict[str, Any]]:
    """All that the controller may do, with what its own namespace's Role adds."""
    leases = {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "verbs": ["create", "get", "update"],
    }
    return [*rules("waypoint"), *rules("controller"), leases]
