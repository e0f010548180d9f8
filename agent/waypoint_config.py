"""What `meshbpf waypoint` is told: one waypoint, its sources and its ports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from meshbpf.agent.config import (
    ISTIO_ROOT,
    ISTIO_TOKEN,
    READINESS_PORT,
    STATS_PORT,
    LogFormat,
    LogLevel,
    OptionError,
    check_ca,
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
    state_dir: Path
    service_account: str
    addresses: tuple[IPAddress, ...]
    """Our own, by which the mesh state names us; none given means all of this host."""
    ca_dir: Path | None = None
    """The certificate comes from one of this and `ca`."""
    ca: str = ""
    """As the agent's, but istiod is asked by our own account's token, for ourselves."""
    ca_root: str = ISTIO_ROOT
    ca_name: str = ""
    token_file: Path = ISTIO_TOKEN
    cluster_id: str = "Kubernetes"
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
        check_ca(self.ca)
        if (self.ca_dir is None) == (not self.ca):
            raise ConfigError(
                "missing-setting",
                "the certificate comes from exactly one of --ca-dir and --ca",
                "give --ca-dir with an embedded CA's folder, or --ca https://HOST:PORT for istiod",
            )
        sources = (self.local_xds is not None, self.manifests is not None, self.kubernetes)
        if sum(sources) != 1:
            raise ConfigError(
                "missing-setting",
                "mesh state comes from exactly one of --kubernetes, --manifests and --local-xds",
                "on a cluster give --kubernetes, else --manifests with a directory of its objects",
            )
