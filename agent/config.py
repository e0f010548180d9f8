"""What `meshbpf run` works with: typed, checked when built, each value with its origin.

`config_sources.py` fills it from flags, the environment and a file.
Enumerations of the data plane are plain literals here: this module is read by
the CLI too and imports nothing of the agent's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.core.tuning import MIB, ZTUNNELS, Keepalive, Tuning

IPNetwork = IPv4Network | IPv6Network
CaptureName = Literal["auto", "tc"]
OnAgentDownName = Literal["closed", "open"]
SameNodeName = Literal["kernel", "hbone"]
ProxyName = Literal["meshbpf", "ztunnel"]
LogFormat = Literal["plain", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

ISTIO_ROOT = "/var/run/secrets/istio/root-cert.pem"
ISTIO_TOKEN = Path("/var/run/secrets/tokens/istio-token")
"""Where Istio's manifests mount them for its own node proxy."""
DEFAULT_ZDS_SOCKET = Path("/var/run/ztunnel/ztunnel.sock")
"""ztunnel's INPOD_UDS."""
DEFAULT_STATE_DIR = Path("/var/lib/meshbpf")
READINESS_PORT = 15021
ADMIN_PORT = 15000
STATS_PORT = 15020
"""These three as Istio's."""
METRICS_GRACE_S = 300.0
TERMINATION_DEADLINE_S = 5.0
"""As ztunnel's CONNECTION_TERMINATION_DEADLINE."""
RELOAD_DEADLINE_S = 900.0
"""As Envoy's --parent-shutdown-time-s."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}
# RFC 1123 labels, as Kubernetes names its objects; a service account or a pod
# may hold dots. The length is that of a DNS name.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_NAME_MAX = 253


@dataclass(frozen=True, slots=True, order=True)
class PodName:
    """Namespace and name; `str()` is NS/NAME."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> PodName:
        """From "NS/NAME"; ConfigError (bad-pod-name) for anything else."""
        namespace, slash, name = text.partition("/")
        if not slash or not is_object_name(namespace) or not is_object_name(name):
            raise ConfigError(
                "bad-pod-name",
                f"{text!r} is not a pod name",
                "write NAMESPACE/NAME in lower case, for instance default/web-0",
            )
        return cls(namespace, name)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Exemptions:
    """What of a pod's traffic steering leaves alone, in both directions."""

    ports: frozenset[int] = frozenset()
    cidrs: tuple[IPNetwork, ...] = ()
    interfaces: frozenset[str] = frozenset()


_URL_HINT = "write https://HOST:PORT, for instance https://istiod.istio-system.svc:15012"


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything `run` was told. Building one with a wrong value raises ConfigError."""

    node: str
    state_dir: Path
    ca_dir: Path | None = None
    """Certificates come from one of this and `ca`; from neither where ztunnel is the proxy."""
    local_xds: Path | None = None
    """Mesh state comes from one of this, `manifests`, `kubernetes` and `xds`."""
    manifests: Path | None = None
    kubernetes: bool = False
    kubeconfig: Path | None = None
    """By default KUBECONFIG's, else what Kubernetes gives the pod that this is."""
    xds: str = ""
    """istiod, as https://HOST:PORT."""
    xds_root: str = ISTIO_ROOT
    """By which istiod is checked: a PEM file, or SYSTEM."""
    xds_name: str = ""
    """What istiod's certificate is for; empty means the host in the URL."""
    ca: str = ""
    """Who else signs: https://HOST:PORT for istiod, kubernetes-csr:SIGNER for one of the
    cluster's signers, or spire:SOCKET for the SPIRE agent of this node."""
    ca_root: str = ISTIO_ROOT
    ca_name: str = ""
    token_file: Path = ISTIO_TOKEN
    """Says to istiod who this agent is; read for each request."""
    cluster_id: str = "Kubernetes"
    """istiod's name for the cluster that the token is from."""
    trust_domain: str = "cluster.local"
    """Of pods that the mesh state does not name; by default the CA's own."""
    network: str = ""
    capture: CaptureName = "auto"
    on_agent_down: OnAgentDownName = "closed"
    same_node: SameNodeName = "kernel"
    """Who carries connections between captured pods of this node that policy allows."""
    proxy: ProxyName = "meshbpf"
    """Who serves the connections of captured pods: this agent, or the ztunnel beside it."""
    zds_socket: Path = DEFAULT_ZDS_SOCKET
    """Where that ztunnel asks for them."""
    require_waypoint: bool = False
    """Pods that are bound to a waypoint are reached through it alone: core/admission.py."""
    pods_from: str = ""
    """zds:PATH: pods are captured and named by Istio's node agent; empty: by this agent."""
    exempt: Exemptions = Exemptions()
    dns: bool = True
    """The DNS queries of pods are answered here, unless their attach says otherwise."""
    cluster_domain: str = "cluster.local"
    """Below it are the names of Kubernetes' own services."""
    probe_cgroups: tuple[Path, ...] = ()
    """cgroup v2 folders whose processes' connections are probes, never captured."""
    cert_ttl_s: float = 24 * 3600.0
    crl_dir: Path | None = None
    """Revocation lists: a folder of them, or one file; None: nothing is ever revoked."""
    lease_s: float = 60.0
    """How long after the last good look at the mesh state "not in the mesh" may be believed."""
    heartbeat_limit_s: float = 0.5
    """Silence after which the kernel takes this agent for dead."""
    readiness_port: int = READINESS_PORT
    admin_port: int = ADMIN_PORT
    """On loopback; 0 is off."""
    admin_open: bool = False
    """Anyone who reaches the admin port may use it, as ztunnel's."""
    stats_port: int = STATS_PORT
    """0 is off."""
    metric_labels: tuple[str, ...] = ()
    """The labels that istio_tcp_* series keep; none given means all."""
    metrics_grace_s: float = METRICS_GRACE_S
    """How long a series outlives its workload."""
    otlp: str = ""
    """An OpenTelemetry collector, as http://HOST:PORT; empty is off."""
    cri_socket: Path | None = None
    """The container runtime's; by default the first known one that is there."""
    account_wait_s: float = 5.0
    """How long an attach by name waits for the mesh state to name the pod."""
    enrol: bool = False
    """Attach the pods of this node that the mesh state enrols, without being asked."""
    pod_connections: int = 0
    """How many connections a pod may have at a time; 0: its share of the descriptors alone."""
    pod_memory: int = 256 * MIB
    """How many bytes of a pod's connections may wait here to be read; 0: no bound."""
    keepalive: bool = ZTUNNELS.keepalive.enabled
    """This and the next eight: core/tuning.py."""
    keepalive_time_s: float = float(ZTUNNELS.keepalive.time_s)
    keepalive_interval_s: float = float(ZTUNNELS.keepalive.interval_s)
    keepalive_retries: int = ZTUNNELS.keepalive.retries
    user_timeout: bool = ZTUNNELS.keepalive.user_timeout
    stream_window: int = ZTUNNELS.stream_window_bytes
    tunnel_window: int = ZTUNNELS.tunnel_window_bytes
    tunnel_streams: int = ZTUNNELS.tunnel_streams
    tunnel_idle_s: float = ZTUNNELS.tunnel_idle_s
    termination_deadline_s: float = TERMINATION_DEADLINE_S
    """How long connections may go on after SIGTERM."""
    reload_deadline_s: float = RELOAD_DEADLINE_S
    """The same for a predecessor after a reload."""
    log_level: LogLevel = "info"
    log_format: LogFormat = "plain"
    origins: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.node or any(c.isspace() or c == "/" for c in self.node):
            raise _bad("node", self.node, "give the node's name without spaces or slashes")
        if not is_object_name(self.trust_domain):
            raise _bad("trust-domain", self.trust_domain, "write it as a DNS name in lower case")
        if not is_object_name(self.cluster_domain):
            raise _bad("cluster-domain", self.cluster_domain, "write it as a DNS name")
        if self.xds and control_plane_address(self.xds) is None:
            raise _bad("xds", self.xds, _URL_HINT)
        check_ca(self.ca, of_node=True)
        if self.otlp and otlp_endpoint(self.otlp) is None:
            hint = "write http://HOST:PORT or https://HOST:PORT, for instance http://otel:4318"
            raise _bad("otlp", self.otlp, hint)
        if self.proxy == "ztunnel" and self.require_waypoint:
            hint = "ztunnel, which serves the pods, does not enforce it: leave out one of the two"
            raise _bad("require-waypoint", "true", hint)
        _one_of("capture", self.capture, get_args(CaptureName))
        _one_of("on-agent-down", self.on_agent_down, get_args(OnAgentDownName))
        _one_of("same-node", self.same_node, get_args(SameNodeName))
        if self.pods_from and not self.pods_from.startswith("zds:/"):
            example = "for instance zds:/var/run/ztunnel/ztunnel.sock"
            raise _bad("pods-from", self.pods_from, f"write zds:PATH, {example}")
        if self.pods_from and self.proxy == "ztunnel":
            raise _bad("pods-from", self.pods_from, "ztunnel, the proxy here, gets pods from us")
        _one_of("proxy", self.proxy, get_args(ProxyName))
        _one_of("log-level", self.log_level, get_args(LogLevel))
        _one_of("log-format", self.log_format, get_args(LogFormat))
        _between("cert-ttl", self.cert_ttl_s, 2.0, 366 * _UNIT_S["d"], "2s to 366d")
        _between("lease", self.lease_s, 0.0, _UNIT_S["d"], "0s to 1d")
        # Three beats of 100 ms must fit, or a busy moment looks like a death.
        _between("heartbeat-limit", self.heartbeat_limit_s, 0.3, 60.0, "300ms to 60s")
        _between("account-wait", self.account_wait_s, 0.0, 45.0, "0s to 45s")
        _between("pod-connections", self.pod_connections, 0, 10_000_000, "0 to 10000000")
        _between("pod-memory", self.pod_memory, 0, 2**40, "0 to 1099511627776")
        # tcp(7): what the kernel takes, in whole seconds.
        _between("keepalive-time", self.keepalive_time_s, 1.0, 32767.0, "1s to 32767s")
        _between("keepalive-interval", self.keepalive_interval_s, 1.0, 32767.0, "1s to 32767s")
        _between("keepalive-retries", self.keepalive_retries, 1, 127, "1 to 127")
        # RFC 9113, section 6.9.2: a window below the default would need a peer that has none.
        _between("stream-window", self.stream_window, 65_535, 2**31 - 1, "65535 to 2147483647")
        _between("tunnel-window", self.tunnel_window, 65_535, 2**31 - 1, "65535 to 2147483647")
        _between("tunnel-streams", self.tunnel_streams, 1, 65_535, "1 to 65535")
        _between("tunnel-idle", self.tunnel_idle_s, 1.0, 7 * _UNIT_S["d"], "1s to 7d")
        _between("termination-deadline", self.termination_deadline_s, 0.0, 3600.0, "0s to 1h")
        _between("reload-deadline", self.reload_deadline_s, 0.0, 7 * _UNIT_S["d"], "0s to 7d")
        _between("readiness-port", self.readiness_port, 1, 65535, "1 to 65535")
        _between("admin-port", self.admin_port, 0, 65535, "0 to 65535")
        _between("stats-port", self.stats_port, 0, 65535, "0 to 65535")
        _between("metrics-grace", self.metrics_grace_s, 0.0, 7 * _UNIT_S["d"], "0s to 7d")

    @property
    def tuning(self) -> Tuning:
        """Of sockets and tunnels."""
        keepalive = Keepalive(
            self.keepalive,
            round(self.keepalive_time_s),
            round(self.keepalive_interval_s),
            self.keepalive_retries,
            self.user_timeout,
        )
        return Tuning(
            keepalive,
            self.stream_window,
            self.tunnel_window,
            self.tunnel_streams,
            self.tunnel_idle_s,
        )

    @property
    def node_agent(self) -> Path | None:
        """The socket at which pods are had from somebody else."""
        return Path(self.pods_from.removeprefix("zds:")) if self.pods_from else None

    @classmethod
    def from_flags(cls, given: Mapping[str, Any]) -> Settings:
        """From the flags that were really given (by field name); the rest are defaults."""
        origins = {
            item.name: "flag" if item.name in given else "default"
            for item in fields(cls)
            if item.name != "origins"
        }
        return cls(**given, origins=origins)


def control_plane_address(url: str) -> tuple[str, int] | None:
    """Host and port of https://HOST:PORT; None for anything else."""
    found = urlsplit(url)
    try:
        port = found.port
    except ValueError:
        return None
    if found.scheme != "https" or not found.hostname or port is None or found.path.strip("/"):
        return None
    return found.hostname, port


def check_ca(ca: str, *, of_node: bool = False) -> None:
    """Refuse what --ca cannot be. Empty passes. Raises ConfigError.

    `of_node`: for an agent, which may have it of the SPIRE agent beside it.
    """
    if not ca or control_plane_address(ca) is not None or kube_signer(ca):
        return
    if not of_node:
        raise _bad("ca", ca, f"{_URL_HINT}; or kubernetes-csr:SIGNER")
    if spire_socket(ca) is None:
        hint = f"{_URL_HINT}; or kubernetes-csr:SIGNER; or spire:SOCKET with an absolute path"
        raise _bad("ca", ca, hint)


def spire_socket(ca: str) -> Path | None:
    """The SPIRE agent's admin socket, of spire:PATH; None for anything else."""
    kind, _, path = ca.partition(":")
    return Path(path) if kind == "spire" and path.startswith("/") and path != "/" else None


def kube_signer(ca: str) -> str:
    """The signer's name of kubernetes-csr:DOMAIN/NAME; empty for anything else."""
    kind, _, signer = ca.partition(":")
    domain, slash, name = signer.partition("/")
    return signer if kind == "kubernetes-csr" and slash and name and is_object_name(domain) else ""


@dataclass(frozen=True, slots=True)
class OtlpEndpoint:
    """Where a collector takes OTLP over HTTP."""

    tls: bool
    host: str
    port: int
    authority: str
    """Host and port as in the URL."""
    path: str
    """Before /v1/logs and /v1/traces; empty most often."""


def otlp_endpoint(url: str) -> OtlpEndpoint | None:
    """Of http(s)://HOST:PORT[/PATH]; None for anything else.

    The port must be told: HTTP's is 80 and OTLP's 4318, and guesses differ.
    """
    if not url.isascii() or not url.isprintable() or " " in url:
        return None
    try:
        found = urlsplit(url)
        host, port = found.hostname, found.port
    except ValueError:
        return None
    if found.scheme not in ("http", "https") or not host or not port:
        return None
    if "@" in found.netloc or found.query or found.fragment:
        return None
    return OtlpEndpoint(found.scheme == "https", host, port, found.netloc, found.path.rstrip("/"))


def is_object_name(text: str) -> bool:
    """Whether Kubernetes would take `text` for the name of an object."""
    return len(text) <= _NAME_MAX and _NAME.fullmatch(text) is not None


def parse_duration_s(text: str) -> float:
    """Seconds of "500ms", "10s", "5m", "24h", "7d" or a bare number of seconds."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            "bad-duration",
            f"{text!r} is not a duration",
            "write for instance 30s, 5m or 24h",
        )
    return float(match[1]) * _UNIT_S[match[2]]


def duration_text(seconds: float) -> str:
    """What `parse_duration_s` reads as `seconds`: in the largest unit that leaves no rest."""
    for unit in ("d", "h", "m", "s"):
        count = seconds / _UNIT_S[unit]
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds * 1000:g}ms" if seconds else "0s"


def parse_ports(texts: Iterable[str]) -> frozenset[int]:
    """Ports of "22", "8000-8010", or several of them with commas between."""
    ports: set[int] = set()
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        first, dash, last = text.partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            low, high = 0, -1
        if not 1 <= low <= high <= 65535:
            raise ConfigError(
                "bad-port", f"{text!r} is not a port", "write 22, or a range as 8000-8010"
            )
        ports.update(range(low, high + 1))
    return frozenset(ports)


def parse_cidrs(texts: Iterable[str]) -> tuple[IPNetwork, ...]:
    """Networks of "10.0.0.0/8", "fd00::/8" or single addresses; commas allowed."""
    cidrs: set[IPNetwork] = set()
    for text in (part.strip() for whole in texts for part in whole.split(",")):
        try:
            cidrs.add(ip_network(text))
        except ValueError as error:
            raise ConfigError(
                "bad-cidr", f"{text!r} is not a network: {error}", "write for instance 10.0.0.0/8"
            ) from error
    return tuple(sorted(cidrs, key=lambda cidr: (cidr.version, int(cidr.network_address))))


class OptionError(ConfigError):
    """A setting's value that cannot be used; `option` is its key."""

    def __init__(self, option: str, value: object, hint: str) -> None:
        super().__init__("bad-option", f"--{option}: {value!r} cannot be used", hint)
        self.option = option


def _bad(option: str, value: object, hint: str) -> ConfigError:
    return OptionError(option, value, hint)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _bad(option, value, f"one of: {', '.join(allowed)}")


def _between(option: str, value: float, low: float, high: float, told: str) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise _bad(option, value, f"from {told}")
