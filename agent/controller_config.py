"""What `meshbpf waypoint-controller` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshbpf.agent.config import (
    READINESS_PORT,
    LogFormat,
    LogLevel,
    OptionError,
    check_ca,
    is_object_name,
)
from meshbpf.agent.l7.deployment import Template

__all__ = ["ControllerSettings", "Template"]


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """Checked options."""

    namespace: str
    """Of the Lease."""
    identity: str
    """Of this replica in it; a Pod's name is."""
    template: Template
    role: str = ""
    """The ClusterRole of waypoints, and the ClusterRoleBinding that is kept; empty: neither."""
    kubeconfig: Path | None = None
    readiness_port: int = READINESS_PORT
    log_level: LogLevel = "info"
    log_format: LogFormat = "plain"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        template = self.template
        check_ca(template.ca)
        names = {
            "namespace": self.namespace,
            "trust-domain": template.trust_domain,
            "cluster-domain": template.cluster_domain,
            "root-namespace": template.root_namespace,
            "roots-config-map": template.roots_config_map,
        }
        for option, value in names.items():
            if not is_object_name(value):
                raise OptionError(option, value, "write it as a DNS name in lower case")
        if not template.image:
            raise OptionError("image", "", "name the image of meshbpf, for instance meshbpf:1")
        if not self.identity:
            raise OptionError("identity", "", "give each replica its own, as its Pod's name")
