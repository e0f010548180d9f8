"""What `meshbpf waypoint` is told: one waypoint, its sources and its ports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshbpf.agent.config import (
    READINESS_PORT,
    STATS_PORT,
    LogFormat,
    LogLevel,
    OptionError,
    is_object_name,
)
from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.workload import HBONE_PORT

WORKERS_LIMIT = 64
DEFAULT_WAYPOINT_STATE = Path("/run/meshbpf-waypoint")


@dataclass(frozen=True, slots=True)
class WaypointSettings:
    """Checked options."""

    namespace: str
    name: str
    ca_dir: Path
    state_dir: Path
    service_account: str
    addresses: tuple[IPAddress, ...]
    """Our own, by which the mesh state names us; none given means all of this host."""
    local_xds: Path | None = None
    manifests: Path | None = None
    kubernetes: bool = False
    kubeconfig: Path | None = None
    """By default KUBECONFIG's, else what Kubernetes gives the pod that this is."""
    workers: int = 1
    trust_domain: str = ""
    """Empty: the CA's."""
    network: str = ""
    cluster_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    cert_ttl_s: float = 24 * 3600.0
    hbone_port: int = HBONE_PORT
    stats_port: int = STATS_PORT
    """0 is off."""
    readiness_port: int = READINESS_PORT
    log_level: LogLevel = "info"
    log_format: LogFormat = "plain"
    worker: int | None = None
    """Which worker of several this process is; None: it is the only one, or their parent."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for option, value in (("trust-domain", self.trust_domain), ("name", self.name)):
            if value and not is_object_name(value):
                raise OptionError(option, value, "write it as a DNS name in lower case")
        if not 1 <= self.workers <= WORKERS_LIMIT:
            raise OptionError("workers", self.workers, f"from 1 to {WORKERS_LIMIT}")
        sources = (self.local_xds is not None, self.manifests is not None, self.kubernetes)
        if sum(sources) != 1:
            raise ConfigError(
                "missing-setting",
                "mesh state comes from exactly one of --kubernetes, --manifests and --local-xds",
                "on a cluster give --kubernetes, else --manifests with a directory of its objects",
            )
