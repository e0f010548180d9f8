"""A service: virtual addresses and ports that stand for a set of workloads.

The fields are those of Istio's workload API (`istio.workload.Service`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from meshbpf.agent.core.address import IPAddress, IPNetwork
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.workload import (
    GatewayAddress,
    HealthStatus,
    NamespacedHostname,
    NetworkAddress,
    Workload,
)


class LoadBalancerMode(StrEnum):
    """How far locality decides which endpoint is taken."""

    UNSPECIFIED = "UNSPECIFIED"  # any endpoint; ztunnel's file says Standard
    STRICT = "STRICT"  # every scope must match
    FAILOVER = "FAILOVER"  # the endpoints that match most scopes
    PASSTHROUGH = "PASSTHROUGH"  # no endpoint: dial what the client dialed


class LoadBalancerScope(StrEnum):
    """One step of locality preference."""

    REGION = "REGION"
    ZONE = "ZONE"
    SUBZONE = "SUBZONE"
    NODE = "NODE"
    CLUSTER = "CLUSTER"
    NETWORK = "NETWORK"


class HealthPolicy(StrEnum):
    """Which endpoints may be taken at all."""

    ONLY_HEALTHY = "ONLY_HEALTHY"
    ALLOW_ALL = "ALLOW_ALL"


class IPFamilies(StrEnum):
    """Which addresses of an endpoint a service may use."""

    AUTOMATIC = "AUTOMATIC"
    IPV4_ONLY = "IPV4_ONLY"
    IPV6_ONLY = "IPV6_ONLY"
    DUAL = "DUAL"


class Visibility(StrEnum):
    """Which clients find the service by its virtual address or hostname."""

    PUBLIC = "PUBLIC"
    NAMESPACE = "NAMESPACE"


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """Preferences are in order, the first one weighing most."""

    routing_preference: tuple[LoadBalancerScope, ...] = ()
    mode: LoadBalancerMode = LoadBalancerMode.UNSPECIFIED
    health_policy: HealthPolicy = HealthPolicy.ONLY_HEALTHY


@dataclass(frozen=True, slots=True)
class WeightedWaypoint:
    """One of several waypoints; taken for weight/sum of all connections."""

    destination: GatewayAddress
    weight: int


@dataclass(frozen=True, slots=True)
class NetworkCidr:
    """A range of virtual addresses within a network."""

    network: str
    cidr: IPNetwork

    def __str__(self) -> str:
        return f"{self.network}/{self.cidr}"


@dataclass(frozen=True, slots=True)
class ServiceEndpoint:
    """An endpoint as state names it: by workload uid, with its own target ports."""

    workload_uid: str
    ports: Mapping[int, int] = field(default_factory=dict, hash=False)
    status: HealthStatus = HealthStatus.HEALTHY


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint that was found: the workload, and its target port per service port."""

    workload: Workload
    ports: Mapping[int, int] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Service:
    """One service; (namespace, hostname) is its key.

    `ports` maps service port to target port; target 0 means that each
    endpoint has its own (a named port). `subject_alt_names` are identities
    that any endpoint may prove instead of its own. `endpoints` are those that
    the service's own record names; workloads name the rest.
    """

    name: str
    namespace: str
    hostname: str
    addresses: tuple[NetworkAddress, ...] = ()
    cidr_addresses: tuple[NetworkCidr, ...] = ()
    ports: Mapping[int, int] = field(default_factory=dict, hash=False)
    subject_alt_names: tuple[SpiffeId, ...] = ()
    waypoint: GatewayAddress | None = None
    weighted_waypoints: tuple[WeightedWaypoint, ...] = ()
    load_balancing: LoadBalancing | None = None
    ip_families: IPFamilies = IPFamilies.AUTOMATIC
    canonical: bool = False
    visibility: Visibility = Visibility.PUBLIC
    endpoints: tuple[ServiceEndpoint, ...] = ()
    key: NamespacedHostname = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Build the key once: the store and the balancer look up by it."""
        object.__setattr__(self, "key", NamespacedHostname(self.namespace, self.hostname))

    def __str__(self) -> str:
        return f"{self.namespace}/{self.hostname}"

    @property
    def any_family(self) -> bool:
        """Whether every address of an endpoint may be used."""
        return self.ip_families in (IPFamilies.AUTOMATIC, IPFamilies.DUAL)

    def accepts(self, ip: IPAddress) -> bool:
        """Whether this address of an endpoint may be used."""
        return self.any_family or (ip.version == 4) == (self.ip_families is IPFamilies.IPV4_ONLY)

    def visible_to(self, namespace: str) -> bool:
        """Whether a client of `namespace` may find this service."""
        return self.visibility is Visibility.PUBLIC or self.namespace == namespace
