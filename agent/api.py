"""The control schema: what the agent and the CLI say to each other.

One JSON object a line over the unix socket `<state-dir>/control.sock`:

    {"verb": "attach", "args": {"pod": "web/a", "netns": "pod-a"}}
    {"ok": true, "result": {...}}
    {"ok": false, "error": {"code": "...", "what": "...", "hint": "...", "exit_status": 1}}

Every verb is one `Request` subclass, which names its verb and the type of its
result; `REQUESTS` finds the class by verb. The same result Structs are what
`-o json` and `-o yaml` print, so their field names are an interface. Times
are aware datetimes in UTC (RFC 3339 on the wire), durations are in seconds.

Requests refuse unknown fields (a typing error must not be ignored); results
accept them (a CLI may talk to a newer agent).
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Literal

import msgspec

from meshbpf.agent.api_envelope import ErrorBody as ErrorBody
from meshbpf.agent.api_envelope import ReplyEnvelope as ReplyEnvelope
from meshbpf.agent.api_envelope import Request as Request
from meshbpf.agent.api_envelope import RequestEnvelope as RequestEnvelope
from meshbpf.agent.api_envelope import Result as Result
from meshbpf.agent.api_proxy import ProxyInfo as ProxyInfo

API_VERSION = "meshbpf/v1"
CONTROL_SOCKET = "control.sock"
"""Name of the control socket inside the state directory."""
CNI_SOCKET = "cni.sock"
"""Where the CNI plugin finds the agent, in the same place and form."""
MAX_REQUEST_BYTES = 64 * 1024
"""A request line longer than this is refused: the largest real one (attach
with a long list of exempt CIDRs) has a few kilobytes."""

OnAgentDownName = Literal["closed", "open"]
SameNodeName = Literal["kernel", "hbone"]
CertState = Literal["pending", "valid", "renewing", "failed", "expired"]
"""`renewing`: valid, but the newest attempt to renew it failed."""


# --- status -----------------------------------------------------------------


StateKind = Literal["local-xds", "manifests", "kubernetes", "xds"]


class StateSourceInfo(Result, frozen=True):
    """Where the mesh state comes from and how the last read of it went."""

    kind: StateKind
    origin: str
    healthy: bool
    """The source can be read; the outside-the-mesh lease is extended only then."""
    loaded_at: datetime | None
    """When the state in force was read; None before the first."""
    version: int
    workloads: int
    services: int
    policies: int
    error: ErrorBody | None = None
    """Why the newest content was refused (the last good state is kept)."""


class CaptureInfo(Result, frozen=True):
    """How connections are caught."""

    requested: Literal["auto", "tc"]
    in_force: str
    """Either `connect+tc` or `tc`."""
    reason: str
    """Why it is that."""


class PodCounts(Result, frozen=True):
    """How many pods are in which state."""

    attached: int
    failed: int
    waiting: int = 0
    """Attached by name, and no pod of that name runs here now."""


class HeartbeatInfo(Result, frozen=True):
    """The kernel's view of the agent's life."""

    beating: bool
    limit_s: float
    lease_s: float
    loop_lag_s: float
    """Age of the event loop's last tick."""


class PredecessorInfo(Result, frozen=True):
    """An agent that a reload has replaced, and that still carries connections."""

    pid: int
    connections: int
    ends_at: datetime | None
    """When it ends what is left; None until it has told."""


class StatusResult(Result, frozen=True):
    """Health of the agent on one screen. The CLI exits 0 when `ready`, else 1."""

    ready: bool
    pending: tuple[str, ...]
    """Tasks that readiness still waits for, sorted."""
    agent_id: str
    node: str
    version: str
    pid: int
    started_at: datetime
    uptime_s: float
    trust_domain: str
    network: str
    state: StateSourceInfo
    capture: CaptureInfo
    pods: PodCounts
    heartbeat: HeartbeatInfo
    connections: int
    """Open connections that the agent carries."""
    predecessors: tuple[PredecessorInfo, ...] = ()
    """Agents that drain after a reload; their connections are not among ours."""
    proxy: ProxyInfo | None = None
    """None: the agent serves the pods itself."""
    draining_until: datetime | None = None
    """This agent takes no connections any more, and ends those it has at that time."""
    warnings: tuple[str, ...] = ()
    """Sentences a person should read: a refused file, a failed pod, dropped logs."""
    statistics: dict[str, dict[str, int | float]] = msgspec.field(default_factory=dict)
    """Counters of the long-lived parts, by part ("steering", "forwarder", "logs", ...)."""


class StatusRequest(Request[StatusResult], frozen=True):
    """How is the agent?"""

    VERB: ClassVar[str] = "status"
    RESULT: ClassVar[type[Result]] = StatusResult


# --- pods -------------------------------------------------------------------


class PodInfo(Result, frozen=True):
    """One pod that this agent steers, or tries to."""

    pod: str
    """NS/NAME."""
    namespace: str
    name: str
    state: Literal["attached", "failed", "waiting"]
    """`waiting`: attached by name, and no pod of that name runs here now."""
    reason: str
    """Why it failed, or what it waits for; empty when attached."""
    netns: str
    """Path of its network namespace as given at attach, or as the runtime has it."""
    service_account: str
    identity: str
    workload: str
    """uid in the mesh state; empty while the state does not name this pod."""
    addresses: tuple[str, ...]
    interfaces: tuple[str, ...]
    on_agent_down: OnAgentDownName
    exempt_ports: tuple[int, ...]
    exempt_cidrs: tuple[str, ...]
    exempt_interfaces: tuple[str, ...]
    dns: bool
    """Its DNS queries are answered by the agent."""
    attached_at: datetime | None
    connections: int
    by_name: bool = False
    """Found by its name: it will be found again when it is recreated."""
    sandbox: str = ""
    """The runtime's id of the pod that is attached by name."""
    uid: str = ""
    """Its uid in Kubernetes."""
    cgroup: str = ""
    """Its cgroup v2 path below the mount."""
    same_node: SameNodeName = "hbone"
    """What carries its connections with other captured pods of this node, as it is now."""


class PodsResult(Result, frozen=True):
    """All pods, sorted by NS/NAME."""

    pods: tuple[PodInfo, ...]


class PodsRequest(Request[PodsResult], frozen=True):
    """Which pods does the agent steer?"""

    VERB: ClassVar[str] = "pods"
    RESULT: ClassVar[type[Result]] = PodsResult


class AttachResult(Result, frozen=True):
    """What attach did."""

    outcome: Literal["attached", "updated", "unchanged"]
    pod: PodInfo


class AttachRequest(Request[AttachResult], frozen=True):
    """Steer this pod. None means the agent's default (its `run` options)."""

    VERB: ClassVar[str] = "attach"
    RESULT: ClassVar[type[Result]] = AttachResult

    pod: str
    """NS/NAME. The container runtime is asked for it unless one of the next three is given."""
    netns: str | None = None
    """A name under /run/netns, or a path."""
    pid: int | None = None
    """A process in the pod."""
    container: str | None = None
    """The id of a container in the pod, or at least 12 digits of it."""
    service_account: str | None = None
    """Default: what the mesh state says of the pod."""
    on_agent_down: OnAgentDownName | None = None
    same_node: SameNodeName | None = None
    exempt_ports: tuple[int, ...] | None = None
    exempt_cidrs: tuple[str, ...] | None = None
    exempt_interfaces: tuple[str, ...] | None = None
    dns: bool | None = None


class DetachResult(Result, frozen=True):
    """What detach did. "not-attached": a pod of the mesh that was not steered."""

    outcome: Literal["detached", "not-attached"]
    pod: str


class DetachRequest(Request[DetachResult], frozen=True):
    """Stop steering this pod. A name that nobody knows is an error (unknown-pod)."""

    VERB: ClassVar[str] = "detach"
    RESULT: ClassVar[type[Result]] = DetachResult

    pod: str


# --- mesh state -------------------------------------------------------------


class WorkloadInfo(Result, frozen=True):
    """One workload of the mesh."""

    uid: str
    namespace: str
    name: str
    addresses: tuple[str, ...]
    identity: str
    protocol: Literal["HBONE", "TCP"]
    node: str
    network: str
    status: str
    services: tuple[str, ...]
    """NS/HOSTNAME of each service it belongs to."""
    policies: tuple[str, ...]
    """NS/NAME of each policy attached by name."""
    attached: bool
    """It is a pod that this agent steers."""


class WorkloadsResult(Result, frozen=True):
    """All workloads, sorted by namespace, name, uid."""

    workloads: tuple[WorkloadInfo, ...]


class WorkloadsRequest(Request[WorkloadsResult], frozen=True):
    """What does the mesh state say of workloads?"""

    VERB: ClassVar[str] = "workloads"
    RESULT: ClassVar[type[Result]] = WorkloadsResult


class ServicePortInfo(Result, frozen=True):
    """One port; `target` 0 means that each endpoint names its own."""

    port: int
    target: int


class ServiceInfo(Result, frozen=True):
    """One service of the mesh."""

    namespace: str
    name: str
    hostname: str
    vips: tuple[str, ...]
    ports: tuple[ServicePortInfo, ...]
    endpoints: tuple[str, ...]
    """uids of its endpoints' workloads."""


class ServicesResult(Result, frozen=True):
    """All services, sorted by namespace, hostname."""

    services: tuple[ServiceInfo, ...]


class ServicesRequest(Request[ServicesResult], frozen=True):
    """What does the mesh state say of services?"""

    VERB: ClassVar[str] = "services"
    RESULT: ClassVar[type[Result]] = ServicesResult


class PolicyInfo(Result, frozen=True):
    """One authorization policy of the mesh."""

    namespace: str
    name: str
    action: Literal["ALLOW", "DENY"]
    scope: Literal["GLOBAL", "NAMESPACE", "WORKLOAD_SELECTOR"]
    dry_run: bool
    """It is only reported, never enforced."""
    inexpressible: str
    """Why it cannot be evaluated and so fails closed; empty when it can."""
    workloads: int
    """How many workloads name it (scope WORKLOAD_SELECTOR)."""
    rules: int
    spec: tuple[tuple[tuple[dict[str, Any], ...], ...], ...]
    """Rules, each of clauses, each of matches: the keys are those of the mesh file."""


class PoliciesResult(Result, frozen=True):
    """All policies, sorted by namespace, name."""

    policies: tuple[PolicyInfo, ...]


class PoliciesRequest(Request[PoliciesResult], frozen=True):
    """What does the mesh state say of policies?"""

    VERB: ClassVar[str] = "policies"
    RESULT: ClassVar[type[Result]] = PoliciesResult


# --- explanations -----------------------------------------------------------


class ExplainStep(Result, frozen=True):
    """One decision on a connection's way."""

    stage: str
    """`source`, `destination`, `capture`, `service`, `route`, `tunnel`, `inbound`, `policy`; at a
    waypoint `waypoint`, `filter`, `rule`, `backend`, `answer` or `problem`.
    """
    what: str
    why: str


class ExplainResult(Result, frozen=True):
    """What becomes of a connection, and why."""

    source: str
    """uid of the workload that dials."""
    destination: str
    """IP:PORT that it dials."""
    outcome: Literal["kernel", "hbone", "plaintext", "refused", "denied"]
    steps: tuple[ExplainStep, ...]


class ExplainRequest(Request[ExplainResult], frozen=True):
    """What would become of a connection? Asks the code and the maps that real ones meet."""

    VERB: ClassVar[str] = "explain"
    RESULT: ClassVar[type[Result]] = ExplainResult

    source: str
    """NS/NAME or an address."""
    destination: str
    """IP[:PORT], NS/NAME[:PORT] or HOST[:PORT]."""
    method: str = "GET"
    """Of the request that a waypoint would see on the connection; path and headers likewise."""
    path: str = "/"
    headers: dict[str, str] = msgspec.field(default_factory=dict)


# --- logs -------------------------------------------------------------------


class LogResult(Result, frozen=True):
    """The log levels in force."""

    level: str
    """Of every scope that has none of its own."""
    scopes: dict[str, str]
    known: tuple[str, ...]
    """Scopes that this agent logs under."""
    for_s: float | None = None
    """After this time what was changed now is taken back; None: it stays."""


class LogRequest(Request[LogResult], frozen=True):
    """Which log levels are in force? With `level` or `reset`: change them first."""

    VERB: ClassVar[str] = "log"
    RESULT: ClassVar[type[Result]] = LogResult

    level: str = ""
    """LEVEL or SCOPE=LEVEL, several with commas."""
    reset: bool = False
    """Return to the levels of the start, before `level` is applied."""
    for_s: float | None = None
    """Take the change back after this many seconds."""


# --- reload -------------------------------------------------------------------


class ReloadResult(Result, frozen=True):
    """A new agent has taken over; the old one drains."""

    pid: int
    version: str
    predecessor: int
    """The process that was asked, and that now drains."""
    connections: int
    """What it still carries."""
    took_s: float


class ReloadRequest(Request[ReloadResult], frozen=True):
    """Start a new agent in the place of this one, and break no connection."""

    VERB: ClassVar[str] = "reload"
    RESULT: ClassVar[type[Result]] = ReloadResult


# --- certificates, connections, version -------------------------------------


class CertInfo(Result, frozen=True):
    """The certificate of one identity on this node. Private keys are never shown."""

    identity: str
    state: CertState
    serial: str
    """Hexadecimal; empty while there is none."""
    root: str
    """Which of the trusted roots it leads to; empty: to none."""
    not_before: datetime | None
    not_after: datetime | None
    renew_at: datetime | None
    pods: tuple[str, ...]
    error: ErrorBody | None = None


class CertsResult(Result, frozen=True):
    """All identities in use on this node, sorted, and the roots they are judged by."""

    certs: tuple[CertInfo, ...]
    roots: tuple[str, ...]
    """SHA-256 fingerprints of the trusted roots."""


class CertsRequest(Request[CertsResult], frozen=True):
    """Which certificates does the agent hold?"""

    VERB: ClassVar[str] = "certs"
    RESULT: ClassVar[type[Result]] = CertsResult


class CertificateInfo(Result, frozen=True):
    """One certificate of a CA."""

    subject: str
    serial: str
    """Hexadecimal."""
    not_before: datetime
    not_after: datetime
    key: str
    """Kind and size of its public key, for instance `EC secp256r1`."""
    sha256: str
    """Fingerprint, hexadecimal."""


class CaInfo(Result, frozen=True):
    """The embedded CA in a folder; what `meshbpf ca` prints. No agent is asked for it."""

    directory: str
    trust_domain: str
    """What its certificate says; empty for an imported one that does not say."""
    issuer: CertificateInfo
    """The certificate that signs workloads' certificates."""
    intermediates: tuple[CertificateInfo, ...]
    roots: tuple[CertificateInfo, ...]


class ConnectionInfo(Result, frozen=True):
    """One connection that is carried now: by the agent, or by the kernel under its verdict."""

    id: int
    direction: Literal["outbound", "inbound"]
    protocol: Literal["HBONE", "TCP"]
    """How it looks between the nodes: through a tunnel, or as it came."""
    pod: str
    source: str
    """IP:port of the client."""
    destination: str
    """IP:port that the client dialed."""
    upstream: str
    """IP:port that the agent dialed for it: a tunnel's gateway, or an app."""
    peer_identity: str
    """SPIFFE id proven by the other end; empty for plaintext."""
    service: str
    """NS/HOSTNAME when a service address was dialed."""
    opened_at: datetime
    age_s: float
    bytes_sent: int
    """Towards the destination."""
    bytes_received: int
    path: Literal["agent", "kernel"] = "agent"
    """Who carries its bytes."""
    agent: int = 0
    """Process id of the predecessor that carries it; 0: the agent that was asked."""


class ConnectionsResult(Result, frozen=True):
    """Open connections: the agent's, oldest first, then the kernel's."""

    connections: tuple[ConnectionInfo, ...]
    total: int
    """How many there are: the list is cut at the request's limit."""


class ConnectionsRequest(Request[ConnectionsResult], frozen=True):
    """Which connections does the agent carry?"""

    VERB: ClassVar[str] = "connections"
    RESULT: ClassVar[type[Result]] = ConnectionsResult

    pod: str | None = None
    direction: Literal["outbound", "inbound"] | None = None
    limit: int = 10_000


class VersionResult(Result, frozen=True):
    """The running agent's version, for comparison with the CLI's own."""

    version: str
    api_version: str
    agent_id: str
    python: str
    kernel: str


class VersionRequest(Request[VersionResult], frozen=True):
    """Which version runs?"""

    VERB: ClassVar[str] = "version"
    RESULT: ClassVar[type[Result]] = VersionResult


AnyRequest = (
    StatusRequest
    | PodsRequest
    | AttachRequest
    | DetachRequest
    | WorkloadsRequest
    | ServicesRequest
    | PoliciesRequest
    | ExplainRequest
    | LogRequest
    | ReloadRequest
    | CertsRequest
    | ConnectionsRequest
    | VersionRequest
)

REQUESTS: dict[str, type[AnyRequest]] = {
    request.VERB: request
    for request in (
        StatusRequest,
        PodsRequest,
        AttachRequest,
        DetachRequest,
        WorkloadsRequest,
        ServicesRequest,
        PoliciesRequest,
        ExplainRequest,
        LogRequest,
        ReloadRequest,
        CertsRequest,
        ConnectionsRequest,
        VersionRequest,
    )
}
