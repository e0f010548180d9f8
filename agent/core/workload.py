"""A workload: one pod (or VM, or host process) of the mesh.

The fields are those of Istio's workload API (`istio.workload.Workload`),
under their protobuf names; `addresses` are parsed, defaults filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache

from meshbpf.agent.core.address import IPAddress
from meshbpf.agent.core.identity import DEFAULT_TRUST_DOMAIN, SpiffeId

DEFAULT_SERVICE_ACCOUNT = "default"
DEFAULT_CLUSTER = "Kubernetes"
HBONE_PORT = 15008


class TunnelProtocol(StrEnum):
    """How a workload takes connections from the mesh."""

    NONE = "NONE"
    HBONE = "HBONE"


class NetworkMode(StrEnum):
    """Whether the workload has its address to itself."""

    STANDARD = "STANDARD"
    HOST_NETWORK = "HOST_NETWORK"  # shares its node's address: never found by address


class HealthStatus(StrEnum):
    """Readiness, as the control plane saw it last."""

    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"


class TunnelFraming(StrEnum):
    """What an application tunnel puts before the bytes of a connection."""

    NONE = "NONE"
    PROXY = "PROXY"


@dataclass(frozen=True, slots=True)
class NamespacedHostname:
    """The key of a service: one hostname may exist once in each namespace."""

    namespace: str
    hostname: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"


@dataclass(frozen=True, slots=True)
class NetworkAddress:
    """An address within a network; "" is the mesh's only or default network."""

    network: str
    ip: IPAddress

    def __str__(self) -> str:
        return f"{self.network}/{self.ip}"


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """Where a waypoint or gateway is found; the port speaks HBONE."""

    destination: NetworkAddress | NamespacedHostname
    hbone_mtls_port: int = HBONE_PORT


@dataclass(frozen=True, slots=True)
class ApplicationTunnel:
    """The workload wants its connections on `port`, framed as `protocol` says."""

    protocol: TunnelFraming
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Locality:
    """Where the workload runs, widest first."""

    region: str = ""
    zone: str = ""
    subzone: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """One workload; `uid` is its key in the whole mesh.

    `services` maps the services that it is an endpoint of to its own target
    port per service port; `authorization_policies` names the selector
    policies (NAMESPACE/NAME) that apply to it beside those of its namespace.
    """

    uid: str
    name: str
    namespace: str
    addresses: tuple[IPAddress, ...] = ()
    network: str = ""
    tunnel_protocol: TunnelProtocol = TunnelProtocol.NONE
    trust_domain: str = DEFAULT_TRUST_DOMAIN
    service_account: str = DEFAULT_SERVICE_ACCOUNT
    waypoint: GatewayAddress | None = None
    node: str = ""
    canonical_name: str = ""
    canonical_revision: str = ""
    workload_type: str = ""
    workload_name: str = ""
    native_tunnel: bool = False
    authorization_policies: tuple[str, ...] = ()
    status: HealthStatus = HealthStatus.HEALTHY
    cluster_id: str = DEFAULT_CLUSTER
    network_gateway: GatewayAddress | None = None
    hostname: str = ""
    services: Mapping[NamespacedHostname, Mapping[int, int]] = field(
        default_factory=dict, hash=False
    )
    application_tunnel: ApplicationTunnel | None = None
    locality: Locality = Locality()
    network_mode: NetworkMode = NetworkMode.STANDARD
    capacity: int = 1
    # Derived once: routing and authorization ask for them on every connection.
    identity: SpiffeId = field(init=False, repr=False, compare=False)
    identities: frozenset[SpiffeId] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive the identity; IdentityError if the parts cannot form one."""
        identity, alone = _identity(self.trust_domain, self.namespace, self.service_account)
        object.__setattr__(self, "identity", identity)
        object.__setattr__(self, "identities", alone)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@lru_cache(maxsize=16384)
def _identity(
    trust_domain: str, namespace: str, account: str
) -> tuple[SpiffeId, frozenset[SpiffeId]]:
    # Shared by all pods of an account: many times fewer than workloads.
    identity = SpiffeId(trust_domain, namespace, account)
    return identity, frozenset((identity,))
