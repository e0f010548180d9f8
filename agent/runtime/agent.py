"""One running agent: its parts, wired together, and the verbs of the control socket.

`app.py` says in which order it lives; this file owns what it is made of.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import trio

import meshbpf
from meshbpf.agent import api
from meshbpf.agent.api_cni import CniRequest
from meshbpf.agent.config import Settings
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.datapath.steering import Capture, Steering
from meshbpf.agent.runtime import reports, status_counters
from meshbpf.agent.runtime.bounds import Bounds
from meshbpf.agent.runtime.carrier import Carrier
from meshbpf.agent.runtime.carrying import Carrying
from meshbpf.agent.runtime.certs import CertificateStore, utc_now
from meshbpf.agent.runtime.cni import CniService
from meshbpf.agent.runtime.connections import ConnectionRegistry
from meshbpf.agent.runtime.control import ControlServer
from meshbpf.agent.runtime.cri import CriClient
from meshbpf.agent.runtime.dns_metrics import DnsMetrics
from meshbpf.agent.runtime.explaining import Explaining
from meshbpf.agent.runtime.fd_store import GRACE_S, FdStore
from meshbpf.agent.runtime.forwarder import Forwarder
from meshbpf.agent.runtime.gate import Gate
from meshbpf.agent.runtime.heartbeat import Heartbeat
from meshbpf.agent.runtime.issuing import AnyIssuer
from meshbpf.agent.runtime.kube_status import StatusReporter
from meshbpf.agent.runtime.locate import Locator
from meshbpf.agent.runtime.logs import Log, LogWriter
from meshbpf.agent.runtime.membership import Membership
from meshbpf.agent.runtime.mesh import LiveMesh
from meshbpf.agent.runtime.mesh_source import MeshSource
from meshbpf.agent.runtime.monitoring import Monitoring, Parts
from meshbpf.agent.runtime.named_pods import NamedPods
from meshbpf.agent.runtime.otlp_export import exporter_of
from meshbpf.agent.runtime.pod import Pod
from meshbpf.agent.runtime.pods import PodManager
from meshbpf.agent.runtime.prefetch import Prefetch
from meshbpf.agent.runtime.readiness import Readiness
from meshbpf.agent.runtime.reconcile import Reconciler
from meshbpf.agent.runtime.revocation import RevocationSource
from meshbpf.agent.runtime.state_dir import StateDir
from meshbpf.agent.runtime.stock_proxy import StockProxy
from meshbpf.agent.runtime.takeover import Predecessors
from meshbpf.agent.runtime.telemetry import Telemetry
from meshbpf.agent.runtime.traffic_metrics import check_allowed
from meshbpf.agent.runtime.xds_source import XdsSource
from meshbpf.agent.runtime.zds_pods import ZdsPods

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

START_WAIT_S = 30.0
"""How long attach and detach wait for an agent that is still starting."""

LAST_ACCEPTS_S = 0.05
STOP_PREDECESSORS_S = 3.0
"""How long a stop waits for predecessors that were told to end."""

log = Log("agent")


class Agent:
    """Made before the BPF side exists, so that it can say what it waits for."""

    def __init__(
        self,
        settings: Settings,
        state_dir: StateDir,
        issuer: AnyIssuer | None,
        source: MeshSource,
        control: ControlServer,
        cni: ControlServer,
        writer: LogWriter,
        nursery: trio.Nursery,
        store: FdStore,
    ) -> None:
        self._store = store
        self._settings = settings
        self._state_dir = state_dir
        self._source = source
        self._control = control
        self._writer = writer
        self._nursery = nursery
        self._started_at = utc_now()
        self._started_monotonic = time.monotonic()
        self._datapath_lock = trio.Lock()
        self._running = trio.Event()
        self._steering: Steering | None = None
        self._heartbeat: Heartbeat | None = None
        self._forwarder: Forwarder | None = None
        self._carrying: Carrying | None = None
        self._proxy: StockProxy | None = None
        self.pods: PodManager | None = None
        self.handed: ZdsPods | None = None
        """In the place of `pods`, where they come from a node agent."""
        self.gate = Gate()
        """Before all accept loops."""
        self.predecessors = Predecessors(state_dir.path)
        self._draining_until: datetime | None = None
        self.readiness = Readiness("bpf", "certificates", "heartbeat", "mesh-state", "pods")
        self._mesh = LiveMesh(self._datapath_lock, require_waypoint=settings.require_waypoint)
        self._exporter = exporter_of(settings)
        if self._exporter is not None:
            nursery.start_soon(self._exporter.run)
        self._connections = ConnectionRegistry(
            telemetry=Telemetry(
                exporter=self._exporter,
                allowed_labels=check_allowed(settings.metric_labels) or None,
                grace_s=settings.metrics_grace_s,
            )
        )
        self._dns_metrics = DnsMetrics()
        self._locator = Locator(CriClient(settings.cri_socket))
        self._crl = RevocationSource(settings.crl_dir) if settings.crl_dir else None
        self._certificates = CertificateStore(
            issuer,
            nursery,
            ttl=timedelta(seconds=settings.cert_ttl_s),
            revocations=self._crl.revocations if self._crl else None,
        )
        self._source_scope = trio.CancelScope()
        self._membership = Membership(source, self._mesh.current, settings.node)
        self._reporter = StatusReporter.of(source, settings.node, self._steered)
        self._cni = CniService(
            self._membership, self._pods_when_running, self.readiness.pending, self._reporter
        )
        cni.handle(CniRequest, self._cni.handle)
        if issuer is not None:
            nursery.start_soon(issuer.run, self._certificates.renew_all)
        if issuer is not None and issuer.remote:
            self._mesh.on_delta(Prefetch(settings.node, self._certificates).follow)
        self._register_verbs()
        self.monitoring = Monitoring(self._monitored(), nursery)
        Explaining(
            control,
            settings,
            self._mesh.current,
            self._all_pods,
            lambda: self._steering,
            lambda: self._source.objects,
        )

    # --- life ---------------------------------------------------------------

    async def start(self, state: MeshState | None) -> None:
        """Bring everything up. Raises MeshbpfError for what a person must see to.

        Without a state it waits for the source's first one: until that is in
        force, pods that an earlier agent left do what their `on_agent_down` says.
        """
        settings = self._settings
        if settings.node_agent is not None:
            await self._start_behind(settings.node_agent, state)
            return
        self._steering = steering = await trio.to_thread.run_sync(self._open_steering)
        log.info("steering", capture=steering.capture_in_force, reason=steering.capture_reason)
        self.readiness.done("bpf")
        self._mesh.steer_with(steering)
        await self._know_mesh(state)
        self._carrying = carrying = Carrying(
            steering, self._mesh.current, self._connections.telemetry.traffic
        )
        self._forwarder = forwarder = self._make_forwarder(carrying.carrier)
        if settings.proxy == "ztunnel":
            self._proxy = StockProxy(settings.zds_socket, steering)
        self.pods = pods = PodManager(
            settings,
            self._state_dir.attachments,
            steering=steering,
            certificates=self._certificates,
            server=forwarder,
            mesh=self._mesh.current,
            nursery=self._nursery,
            store=self._store,
            locator=self._locator,
            carrier=carrying.carrier,
            proxy=self._proxy,
        )
        await carrying.begin()
        for path in settings.probe_cgroups:
            if not path.is_dir():
                log.warning("probe cgroup is not there: its probes will be captured", path=path)
        await pods.restore()
        if self._proxy is not None:  # not before: what a snapshot leaves out is dropped
            await self._nursery.start(self._proxy.run)
        self.readiness.done("pods")
        self._mesh.on_change(self._mesh_changed)
        self._mesh.settle_with(carrying.carrier.settle)
        await carrying.adopt()
        self._heartbeat = heartbeat = Heartbeat(
            steering, lease_s=settings.lease_s, source_healthy=lambda: self._source.healthy
        )
        heartbeat.start()
        self._nursery.start_soon(heartbeat.tick)
        self.readiness.done("heartbeat")
        self.readiness.require("heartbeat", lambda: heartbeat.beating)
        self._running.set()
        await self._first_certificates(pods)
        self.readiness.done("certificates")

    async def _start_behind(self, node_agent: Path, state: MeshState | None) -> None:
        """The same where Istio's node agent captures: it names pods, and nothing is steered."""
        await self._know_mesh(state)
        self.handed = handed = ZdsPods(
            node_agent,
            self._settings,
            certificates=self._certificates,
            server=self._make_forwarder(None),
            mesh=self._mesh.current,
            nursery=self._nursery,
        )
        self._mesh.on_change(self._mesh_changed)
        self._nursery.start_soon(handed.run)
        for task in ("bpf", "certificates", "heartbeat", "pods"):
            self.readiness.done(task)
        self.readiness.require("node-agent", lambda: handed.complete)

    async def _know_mesh(self, state: MeshState | None) -> None:
        if self._crl is not None:
            await trio.to_thread.run_sync(self._crl.load)
            self._nursery.start_soon(self._crl.watch)
        if state is not None:
            await self._mesh.apply(state)
        await self._nursery.start(self._follow_source)
        self.readiness.done("mesh-state")

    def _make_forwarder(self, carrier: Carrier | None) -> Forwarder:
        settings = self._settings
        self._forwarder = forwarder = Forwarder(
            self._mesh.current,
            self._certificates,
            self._connections,
            dns_metrics=self._dns_metrics,
            cluster_domain=settings.cluster_domain,
            carrier=carrier,
            gate=self.gate,
            bounds=Bounds.of_process(settings.pod_connections, settings.pod_memory),
        )
        self.readiness.require("descriptors", lambda: not forwarder.exhausted)
        self._nursery.start_soon(forwarder.bound_memory)
        return forwarder

    async def watch(self) -> None:
        """Follow the pods' namespaces, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.monitoring.sweep)
            if self.pods is None:
                return
            nursery.start_soon(self.pods.watch)
            if self._carrying is not None:
                nursery.start_soon(self._carrying.run)
            nursery.start_soon(NamedPods(self.pods, self._locator).run)
            if self._reporter is not None:
                nursery.start_soon(self._reporter.run)
            if self._settings.enrol or self._settings.kubernetes:
                reconciler = Reconciler(self._membership, self.pods, self._locator, self._source)
                self._mesh.on_change(reconciler.stir)
                nursery.start_soon(reconciler.run)
            nursery.start_soon(self.predecessors.watch)

    async def _follow_source(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with self._source_scope:
            await self._source.watch(self._mesh, task_status=task_status)

    async def stop(self, hurry: trio.CancelScope) -> None:
        """End in the order that the kernel side needs; attachments remain.

        Call it shielded. Connections may go on for the termination deadline,
        or until `hurry` is cancelled; then it takes 3 s at most.
        """
        self.readiness.require("running", lambda: False)
        self._announce_end()
        if (served := self.pods or self.handed) is not None:
            # What the kernel has handed over by now is still taken in.
            await trio.sleep(LAST_ACCEPTS_S)
            self.gate.close()
            await self._drain(self._settings.termination_deadline_s, hurry)
            self._source_scope.cancel()
            await served.stop_serving()
        await self.predecessors.end(STOP_PREDECESSORS_S)
        if self._exporter is not None:
            await self._exporter.finish()
        if self._steering is not None:
            await trio.to_thread.run_sync(self._steering.close)

    def retire(self) -> None:
        """A successor serves: it has the kernel and the pods. What we carry is left to `drain`."""
        self.readiness.require("running", lambda: False)
        if self._heartbeat is not None:
            self._heartbeat.stop()
        self._mesh.stop_steering()
        if self._carrying is not None:
            self._carrying.carrier.retire()
        if self.pods is not None:
            self.pods.retire()

    async def drain(self, hurry: trio.CancelScope) -> None:
        """The end of one that has retired. Call it shielded, when `watch` has ended."""
        self.predecessors.hand_over()
        if self.pods is not None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.pods.watch_retired)
                await self._drain(self._settings.reload_deadline_s, hurry)
                nursery.cancel_scope.cancel()
            await self.pods.stop_serving()
        if self._exporter is not None:
            await self._exporter.finish()
        if self._steering is not None:
            await trio.to_thread.run_sync(self._steering.close)

    async def _drain(self, limit_s: float, hurry: trio.CancelScope) -> None:
        """Let connections end by themselves; each new state judges them meanwhile."""
        forwarder = self._forwarder
        if forwarder is None:
            return
        forwarder.drain()
        self._draining_until = utc_now() + timedelta(seconds=limit_s)
        log.info("draining", carried=forwarder.carried, deadline_s=limit_s)
        hurry.deadline = trio.current_time() + limit_s
        with hurry:
            await forwarder.idle()
        log.info("drained", cut=forwarder.carried)

    def _announce_end(self) -> None:
        """End the heartbeat: connections wait for a successor in kept listeners, or none come."""
        heartbeat, settings = self._heartbeat, self._settings
        if heartbeat is None:
            return
        try:
            if self.pods is not None and self.pods.any_kept():
                heartbeat.bequeath(GRACE_S + settings.termination_deadline_s)
            else:
                heartbeat.renounce(settings.heartbeat_limit_s)
        except MeshbpfError as error:
            log.error("the kernel learns of the end only by silence", cause=error)

    # --- handing over -----------------------------------------------------------

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """For the time of the block no pod comes, goes, or changes. Raises MeshbpfError."""
        pods = await self._pods_when_running()
        async with pods.frozen():
            yield

    def descriptors(self) -> Iterator[tuple[str, int]]:
        """What a successor needs of this agent's pods and of those before it."""
        if self.pods is not None:
            yield from self.pods.descriptors()
        yield from self.predecessors.descriptors()

    def carried(self) -> int:
        """Open connections."""
        totals = self._connections.statistics()
        return totals.open_inbound + totals.open_outbound

    # --- for the service manager ----------------------------------------------

    def status_line(self) -> str:
        """One line for people: what is pending, or what is carried."""
        pending = self.readiness.pending()
        line = f"{len(self._all_pods())} pods, {self.carried()} connections"
        if self._draining_until is not None:
            return f"draining, {line}"
        return f"not ready, waiting for {', '.join(pending)}; {line}" if pending else line

    def datapath_answers(self) -> bool:
        """Whether the beat that the kernel holds is a young one. Blocking; may raise BpfError."""
        if self.handed is not None:
            return True  # nothing is steered
        if self._steering is None or self._heartbeat is None or not self._heartbeat.beating:
            return False
        age_s = self._steering.statistics().heartbeat_age_s
        return age_s is not None and age_s < self._settings.heartbeat_limit_s

    # --- parts ----------------------------------------------------------------

    def _open_steering(self) -> Steering:
        return Steering.open(
            agent_id=self._state_dir.agent_id,
            cache_dir=self._state_dir.cache,
            capture=Capture(self._settings.capture),
            heartbeat_limit_s=self._settings.heartbeat_limit_s,
            probe_cgroups=self._settings.probe_cgroups,
        )

    async def _first_certificates(self, pods: PodManager) -> None:
        """Wait for one attempt per identity; a failure is shown by `certs` and tried again."""
        if self._proxy is not None:
            return
        for pod in pods.list():
            try:
                await self._certificates.tls(pod.identity)
            except MeshbpfError:
                continue  # logged where it failed

    def _mesh_changed(self, mesh: Snapshot) -> None:
        if self._carrying is not None:
            self._carrying.carrier.changed(mesh)
        if (served := self.pods or self.handed) is not None:
            served.refresh(mesh)
        cut = self._connections.recheck(mesh)
        if cut:
            log.info("connections cut by policy", count=cut)

    # --- verbs --------------------------------------------------------------

    def _register_verbs(self) -> None:
        control = self._control
        control.handle(api.StatusRequest, self._status)
        control.handle(api.PodsRequest, self._list_pods)
        control.handle(api.AttachRequest, self._attach)
        control.handle(api.DetachRequest, self._detach)
        control.handle(api.WorkloadsRequest, self._workloads)
        control.handle(api.ServicesRequest, self._services)
        control.handle(api.CertsRequest, self._certs)
        control.handle(api.ConnectionsRequest, self._list_connections)
        control.handle(api.VersionRequest, self._version)

    async def _attach(self, request: api.AttachRequest) -> api.AttachResult:
        pods = await self._pods_when_running()
        return await pods.attach(request, self._describe)

    async def _detach(self, request: api.DetachRequest) -> api.DetachResult:
        pods = await self._pods_when_running()
        return await pods.detach(request.pod)

    async def _pods_when_running(self) -> PodManager:
        if self.handed is not None:
            raise MeshbpfError(
                "pods-from-node-agent",
                f"pods come from {self.handed.path} here, by Istio's node agent",
                "label the pod, or its namespace, istio.io/dataplane-mode=ambient",
            )
        with trio.move_on_after(START_WAIT_S):
            await self._running.wait()
        if self.pods is None or not self._running.is_set():
            raise MeshbpfError(
                "starting",
                f"the agent is still starting: {', '.join(self.readiness.pending())}",
                "`meshbpf status` says when it is ready",
            )
        return self.pods

    async def _list_pods(self, _request: api.PodsRequest) -> api.PodsResult:
        counts = reports.connections_by_pod(self._connections.list())
        return api.PodsResult(
            pods=tuple(self._describe(pod, counts.get(pod.key, 0)) for pod in self._all_pods())
        )

    async def _workloads(self, _request: api.WorkloadsRequest) -> api.WorkloadsResult:
        attached = frozenset(pod.key for pod in self._all_pods())
        return reports.workloads(self._mesh.snapshot, attached)

    async def _services(self, _request: api.ServicesRequest) -> api.ServicesResult:
        return reports.services(self._mesh.snapshot)

    async def _certs(self, _request: api.CertsRequest) -> api.CertsResult:
        return self._certificates.describe()

    async def _list_connections(self, request: api.ConnectionsRequest) -> api.ConnectionsResult:
        kernel = [] if self._carrying is None else await self._carrying.connections()
        own = reports.connections(request, self._connections.list(), kernel)
        others, total = await self.predecessors.connections(request)
        if not total:
            return own
        merged = sorted((*own.connections, *others), key=lambda one: one.opened_at)
        return api.ConnectionsResult(
            connections=tuple(merged[: request.limit]), total=own.total + total
        )

    async def _version(self, _request: api.VersionRequest) -> api.VersionResult:
        return api.VersionResult(
            version=meshbpf.__version__,
            api_version=api.API_VERSION,
            agent_id=self._state_dir.agent_id,
            python=platform.python_version(),
            kernel=platform.release(),
        )

    async def _status(self, _request: api.StatusRequest) -> api.StatusResult:
        settings, steering = self._settings, self._steering
        pending = self.readiness.pending()
        pods = self._all_pods()
        failed = [pod for pod in pods if pod.state == "failed"]
        waiting = [pod for pod in pods if pod.state == "waiting"]
        return api.StatusResult(
            ready=not pending,
            pending=pending,
            agent_id=self._state_dir.agent_id,
            node=settings.node,
            version=meshbpf.__version__,
            pid=os.getpid(),
            started_at=self._started_at,
            uptime_s=round(time.monotonic() - self._started_monotonic, 3),
            trust_domain=settings.trust_domain,
            network=settings.network,
            state=reports.state_info(self._mesh.snapshot, self._source),
            capture=api.CaptureInfo(
                requested=settings.capture,
                in_force=steering.capture_in_force if steering else "istio" if self.handed else "",
                reason=steering.capture_reason if steering else settings.pods_from,
            ),
            pods=api.PodCounts(
                attached=len(pods) - len(failed) - len(waiting),
                failed=len(failed),
                waiting=len(waiting),
            ),
            heartbeat=reports.heartbeat_info(settings, self._heartbeat),
            connections=self.carried(),
            predecessors=tuple(one.describe() for one in self.predecessors),
            draining_until=self._draining_until,
            proxy=self._proxy.info() if self._proxy else None,
            warnings=tuple(self._warnings(failed)),
            statistics=self._counters(),
        )

    # --- parts of the answers -----------------------------------------------

    def _steered(self) -> set[str]:
        return {pod.key for pod in self._all_pods() if pod.state == "attached"}

    def _all_pods(self) -> list[Pod]:
        served = self.pods or self.handed
        return list(served.list()) if served is not None else []

    def _describe(self, pod: Pod, connections: int | None = None) -> api.PodInfo:
        if connections is None:
            connections = reports.connections_by_pod(self._connections.list()).get(pod.key, 0)
        return reports.pod_info(pod, self._mesh.snapshot, connections)

    def _warnings(self, failed: list[Pod]) -> list[str]:
        found = [f"pod {pod.key}: {pod.reason}" for pod in failed]
        for pod in self._all_pods():
            if pod.kernel is not None:
                found.extend(f"pod {pod.key}: {why}" for why in pod.kernel.host_skipped)
        if self._source.error is not None:
            found.append(f"mesh state: {self._source.error.what}")
        found.extend(f"mesh state: {text}" for text in self._source.warnings())
        found.extend(self._certificates.warnings())
        found.extend(self._crl.warnings() if self._crl else ())
        found.extend(self._proxy.warnings() if self._proxy else ())
        dropped = self._writer.statistics().dropped
        if dropped:
            found.append(f"{dropped} log records dropped: stderr is not read fast enough")
        return found

    def _monitored(self) -> Parts:
        return Parts(
            settings=self._settings,
            control=self._control,
            writer=self._writer,
            connections=self._connections,
            dns=self._dns_metrics,
            certificates=self._certificates,
            mesh=self._mesh.current,
            pods=self._all_pods,
            forwarder=lambda: self._forwarder,
            predecessors=lambda: [one.connections for one in self.predecessors],
            decisions=lambda: self._steering.statistics().decisions if self._steering else None,
            loop_lag_s=lambda: self._heartbeat.statistics().loop_lag_s if self._heartbeat else None,
            ready=lambda: not self.readiness.pending(),
            source_healthy=lambda: self._source.healthy,
            source_families=self._source.families if isinstance(self._source, XdsSource) else tuple,
            crl_families=self._crl.families if self._crl else tuple,
        )

    def _counters(self) -> status_counters.Counters:
        parts: dict[str, DataclassInstance] = {
            "certificates": self._certificates.statistics(),
            "cni": self._cni.statistics(),
            "connections": self._connections.statistics(),
            "control": self._control.statistics(),
            "logs": self._writer.statistics(),
            "state": self._source.statistics(),
        }
        return status_counters.collect(
            parts, self._heartbeat, self._steering, self._carrying, self._forwarder
        )
