"""Metrics on 15020, the admin port, and log levels: the parts that watch the agent.

Each answer is put together when it is asked for, from what the other parts
say of themselves; nothing here is on the path of a connection.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import chain
from typing import Any

import msgspec
import trio
import yaml

import meshbpf
from meshbpf.agent import api
from meshbpf.agent.config import Settings
from meshbpf.agent.runtime import agent_metrics, config_dump, exposition
from meshbpf.agent.runtime.admin import AdminSources
from meshbpf.agent.runtime.agent_metrics import Numbers
from meshbpf.agent.runtime.certs import CertificateStore
from meshbpf.agent.runtime.connections import ConnectionRegistry
from meshbpf.agent.runtime.control import ControlServer
from meshbpf.agent.runtime.dns_metrics import DnsMetrics
from meshbpf.agent.runtime.exposition import Family
from meshbpf.agent.runtime.forwarder import Forwarder
from meshbpf.agent.runtime.httpd import Request, Response
from meshbpf.agent.runtime.log_levels import Levels, LogLevels, known_scopes
from meshbpf.agent.runtime.logs import Log, LogWriter
from meshbpf.agent.runtime.mesh_view import MeshView
from meshbpf.agent.runtime.overview import MAX_CONNECTIONS, Overview, denials, flows
from meshbpf.agent.runtime.pod import Pod

SWEEP_S = 30.0
"""How often series of workloads that are gone are looked for."""
_LINES_A_TURN = 2000

log = Log("monitoring")


@dataclass(frozen=True, slots=True)
class Parts:
    """The agent's parts as monitoring sees them."""

    settings: Settings
    control: ControlServer
    writer: LogWriter
    connections: ConnectionRegistry
    dns: DnsMetrics
    certificates: CertificateStore
    mesh: MeshView
    pods: Callable[[], Iterable[Pod]]
    forwarder: Callable[[], Forwarder | None]
    """None before there is one."""
    predecessors: Callable[[], Sequence[int]]
    decisions: Callable[[], Mapping[str, int] | None]
    loop_lag_s: Callable[[], float | None]
    ready: Callable[[], bool]
    source_healthy: Callable[[], bool]
    source_families: Callable[[], Iterable[Family]]
    crl_families: Callable[[], Iterable[Family]]


class Monitoring:
    """Made with the agent; answers from the first moment on."""

    def __init__(self, parts: Parts, nursery: trio.Nursery) -> None:
        self._parts = parts
        self._nursery = nursery
        self._quit = trio.Event()
        self.levels = LogLevels(parts.settings.log_level)
        parts.control.handle(api.PoliciesRequest, self._policies)
        parts.control.handle(api.LogRequest, self._log)

    # --- ports --------------------------------------------------------------

    async def serve_metrics(self, request: Request) -> Response:
        """The handler of port 15020."""
        if request.path not in ("/metrics", "/stats/prometheus"):
            return Response(HTTPStatus.NOT_FOUND, "try /metrics\n")
        if request.method not in ("GET", "HEAD"):
            return Response(HTTPStatus.METHOD_NOT_ALLOWED, "GET only\n")
        openmetrics = exposition.wants_openmetrics(request.headers.get("accept", ""))
        parts: list[str] = []
        exporter = self._parts.connections.telemetry.exporter
        families = chain(
            self._parts.connections.telemetry.traffic.families(),
            (agent_metrics.build(),),
            agent_metrics.process(),
            agent_metrics.own(self._numbers()),
            self._parts.dns.families(),
            self._parts.source_families(),
            exporter.families() if exporter is not None else (),
            self._parts.crl_families(),
        )
        size = 0
        for family in families:
            part = exposition.render(family, openmetrics=openmetrics)
            parts.append(part)
            size += part.count("\n")
            if size > _LINES_A_TURN:
                size = 0
                await trio.lowlevel.checkpoint()
        if openmetrics:
            parts.append(exposition.END)
        kind = exposition.OPENMETRICS if openmetrics else exposition.TEXT
        return Response(HTTPStatus.OK, "".join(parts), kind)

    def admin_sources(self) -> AdminSources:
        """What the admin port works with."""
        return AdminSources(
            levels=self.levels,
            overview=self.overview,
            config_dump=self.config_dump,
            quit=self._quit.set,
        )

    async def asked_to_quit(self) -> None:
        """Return once /quitquitquit was asked for."""
        await self._quit.wait()

    async def sweep(self) -> None:
        """Forget metrics of workloads that are gone, until cancelled."""
        telemetry = self._parts.connections.telemetry
        while True:
            await trio.sleep(SWEEP_S)
            mesh = self._parts.mesh()
            local = [
                workload
                for pod in self._parts.pods()
                if pod.local is not None and (workload := pod.local.workload(mesh)) is not None
            ]
            gone = await telemetry.expire(mesh, local) + self._parts.dns.expire(local)
            if gone:
                log.debug("metrics of workloads that are gone", series=gone)

    # --- documents ----------------------------------------------------------

    async def overview(self) -> Overview:
        """The status page's data."""
        ask = self._parts.control.ask
        connections = await ask(api.ConnectionsRequest(limit=MAX_CONNECTIONS))
        telemetry = self._parts.connections.telemetry
        return Overview(
            status=await ask(api.StatusRequest()),
            pods=(await ask(api.PodsRequest())).pods,
            certs=(await ask(api.CertsRequest())).certs,
            connections=connections.connections,
            connections_total=connections.total,
            flows=flows(telemetry),
            denials=denials(telemetry),
        )

    async def config_dump(self) -> bytes:
        """The JSON of /config_dump."""
        parts = self._parts
        pods = (await parts.control.ask(api.PodsRequest())).pods
        mesh, records = parts.mesh(), parts.connections.list()
        held, roots_pem = parts.certificates.held(), parts.certificates.roots_pem

        def make() -> bytes:
            document = config_dump.dump(
                mesh=mesh,
                settings=parts.settings,
                version={
                    "version": meshbpf.__version__,
                    "gitRevision": "unknown",
                    "pythonVersion": platform.python_version(),
                    "istioVersion": "unknown",
                },
                static=_mesh_file(parts.settings),
                certificates=held,
                roots_pem=roots_pem,
                pods=pods,
                connections=records,
            )
            return msgspec.json.format(msgspec.json.encode(document), indent=2)

        return await trio.to_thread.run_sync(make)

    def _numbers(self) -> Numbers:
        parts = self._parts
        mesh = parts.mesh()
        forwarder = parts.forwarder()
        states = Counter({"attached": 0, "failed": 0})
        states.update("failed" if pod.reason else "attached" for pod in parts.pods())
        return Numbers(
            ready=parts.ready(),
            connections=parts.connections.statistics(),
            denied_early=parts.connections.telemetry.denied_early_counts(),
            certs=parts.certificates.describe().certs,
            logs=parts.writer.statistics(),
            pods=states,
            pools=forwarder.statistics().pools if forwarder else {},
            turned_away=forwarder.turned_away() if forwarder else {},
            buffered=forwarder.buffered() if forwarder else {},
            cut_for_memory=forwarder.cut_for_memory() if forwarder else {},
            predecessors=parts.predecessors(),
            mesh={
                "workload": len(mesh.workloads),
                "service": len(mesh.services),
                "policy": len(mesh.policies),
            },
            mesh_version=mesh.version,
            source_healthy=parts.source_healthy(),
            loop_lag_s=parts.loop_lag_s(),
            decisions=parts.decisions(),
        )

    # --- verbs --------------------------------------------------------------

    async def _policies(self, _request: api.PoliciesRequest) -> api.PoliciesResult:
        mesh = self._parts.mesh()
        attached: Counter[str] = Counter()
        for workload in mesh.workloads:
            attached.update(workload.authorization_policies)
        ordered = sorted(mesh.policies, key=lambda one: (one.namespace, one.name))
        return api.PoliciesResult(
            policies=tuple(
                api.PolicyInfo(
                    namespace=one.namespace,
                    name=one.name,
                    action=one.action.value,
                    scope=one.scope.value,
                    rules=len(one.rules),
                    dry_run=one.dry_run,
                    inexpressible=one.inexpressible,
                    workloads=attached[one.key],
                    spec=config_dump.policy(one)["rules"],
                )
                for one in ordered
            )
        )

    async def _log(self, request: api.LogRequest) -> api.LogResult:
        changes = bool(request.level or request.reset)
        before = self.levels.current()
        if changes:
            after = self.levels.change(request.level, reset=request.reset, only_known=True)
            log.info("log levels changed", levels=after, for_s=request.for_s)
            if request.for_s is not None:
                self._nursery.start_soon(self._undo_later, before, after, request.for_s)
        now = self.levels.current()
        return api.LogResult(
            level=now.default,
            scopes=dict(sorted(now.scopes.items())),
            known=known_scopes(),
            for_s=request.for_s if changes else None,
        )

    async def _undo_later(self, before: Levels, after: Levels, after_s: float) -> None:
        await trio.sleep(after_s)
        self.levels.undo(before, after)
        log.info("log levels are back", levels=self.levels.current())


def _mesh_file(settings: Settings) -> dict[str, Any]:
    """The mesh file as it is now; empty when it cannot be read, which `status` tells."""
    if settings.local_xds is None:
        return {}
    try:
        found = yaml.load(settings.local_xds.read_bytes(), Loader=_Loader)  # noqa: S506 (a safe one)
    except (OSError, yaml.YAMLError) as error:
        log.warning("mesh file not dumped", path=settings.local_xds, error=str(error))
        return {}
    return found if isinstance(found, dict) else {}


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
