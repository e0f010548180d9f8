"""The agent's process: what starts in which order, and how it ends.

    run()   root, logs, descriptors, state directory and its lock, CA, mesh
            state, readiness port, control socket: whatever a person can have
            got wrong is found before anything is touched
    trio    readiness and control answer from here on ("not ready, pending ...")
            BPF programs are compiled or found, loaded, adopted (a thread)
            destinations of the mesh are set; pods left by an earlier agent
            are taken over; only then does the heart beat
    ready   logged, status exits 0, 15021 answers 200
    stop    SIGTERM or SIGINT: the heart stops first, so that the kernel
            applies the pods' fail mode before the listeners close; tunnels say
            GOAWAY, connections have until the termination deadline, or the
            next signal; attachments remain

An agent that a running one has started in its own place (`reload.py`) gets
the sockets and the lock instead of opening them, accepts nothing and answers
nobody until the other has stopped to, and is the service only from then on.
The other drains, and ends with its last connection.

A fault of one pod stays with it (`pods.py`); any other task that fails ends
the agent, for a half-working one would be worse than a dead one, which the
kernel knows how to handle.
"""

from __future__ import annotations

import os
import resource
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace

import trio

import meshbpf
from meshbpf.agent.config import Settings
from meshbpf.agent.core.errors import Exit, PrivilegeError
from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.handover import Channel, Inheritance
from meshbpf.agent.runtime import attachments, cni, heap, kube_config, logs, sources, takeover
from meshbpf.agent.runtime.agent import Agent
from meshbpf.agent.runtime.control import ControlServer
from meshbpf.agent.runtime.fd_store import FdStore
from meshbpf.agent.runtime.fronts import Fronts
from meshbpf.agent.runtime.issuing import AnyIssuer
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.kubernetes import KubernetesSource
from meshbpf.agent.runtime.life import Life
from meshbpf.agent.runtime.logs import Log, LogWriter
from meshbpf.agent.runtime.main_loop import SIGNALS, one_error, stop_on_signal
from meshbpf.agent.runtime.manifests import ManifestSource
from meshbpf.agent.runtime.mesh_source import MeshSource
from meshbpf.agent.runtime.notify import Notifier, take_stored
from meshbpf.agent.runtime.state_dir import StateDir
from meshbpf.agent.runtime.state_source import LocalXdsSource

log = Log("app")


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was opened and read before the event loop starts."""

    settings: Settings
    state_dir: StateDir
    issuer: AnyIssuer | None
    source: MeshSource
    state: MeshState | None
    control: ControlServer
    cni: ControlServer
    fronts: Fronts
    notifier: Notifier
    store: FdStore
    logs: LogWriter
    predecessor: Channel | None
    inheritance: Inheritance | None
    """What the predecessor has handed over; None when there is none."""


def run(settings: Settings, predecessor: Channel | None = None) -> int:
    """Run the agent until it is told to stop; 0 after an orderly end.

    `predecessor` leads to the agent whose place this one takes.

    Raises MeshbpfError for whatever keeps it from running.
    """
    if os.geteuid() != 0:
        raise PrivilegeError(
            "not-root",
            "`meshbpf run` loads BPF programs and enters network namespaces: it needs root",
            "run it with sudo, or as a system service",
        )
    with ExitStack() as stack:
        writer = logs.set_up(settings.log_level, settings.log_format)
        stack.callback(writer.close)
        prepared = _prepare(settings, stack, writer, predecessor)
        with one_error(log, "agent"):
            trio.run(_main, prepared, strict_exception_groups=True)
    return int(Exit.OK)


def _source(settings: Settings) -> MeshSource:
    cluster = Cluster(
        cluster_id=settings.cluster_id,
        network=settings.network,
        trust_domain=settings.trust_domain,
        domain=settings.cluster_domain,
        by_hand=settings.manifests is not None,
    )
    if settings.kubernetes:
        config = kube_config.load(settings.kubeconfig, os.environ)
        return KubernetesSource(KubeApi(config), cluster)
    if settings.manifests is not None:
        return ManifestSource(settings.manifests, cluster)
    if settings.xds:
        return sources.xds_source(settings, os.environ)
    assert settings.local_xds is not None  # noqa: S101 (config_sources.py sees to it)
    return LocalXdsSource(settings.local_xds)


def _prepare(
    settings: Settings, stack: ExitStack, writer: LogWriter, predecessor: Channel | None
) -> Prepared:
    _raise_descriptor_limit()
    # First, and whatever becomes of the rest: no child may inherit these.
    notifier = Notifier.of(os.environ, os.getpid())
    stored = take_stored(os.environ, os.getpid())
    inheritance = None
    if predecessor is not None:
        notifier.hold()
        inheritance = Inheritance.receive(predecessor, os.getpid(), meshbpf.__version__)
    issuer, trust_domain = None, ""
    if settings.proxy != "ztunnel":  # which has certificates of its own
        issuer, trust_domain = sources.issuer(settings, os.environ, impersonates=True)
    if settings.origins.get("trust_domain", "default") == "default" and trust_domain:
        settings = replace(settings, trust_domain=trust_domain)
    source = _source(settings)
    state = source.load()
    if inheritance is None:
        state_dir = StateDir.open(settings.state_dir)
        takeover.sweep(settings.state_dir)
    else:
        state_dir = StateDir.inherit(settings.state_dir, *inheritance.take("lock"))
    stack.callback(state_dir.close)
    attachments.load(state_dir.attachments)  # a broken record, before anything is touched
    control = ControlServer(state_dir.control_socket)
    plugin = ControlServer(
        state_dir.cni_socket,
        max_clients=cni.MAX_CLIENTS,
        max_request_bytes=cni.MAX_REQUEST_BYTES,
    )
    fronts = Fronts(settings, {"control": control, "cni": plugin})
    fronts.open(stack, inheritance)
    log.info(
        "starting",
        version=meshbpf.__version__,
        node=settings.node,
        pid=os.getpid(),
        agent_id=state_dir.agent_id,
        state_dir=settings.state_dir,
        python=sys.version.split()[0],
        **({"predecessor": inheritance.pid} if inheritance else {}),
    )
    return Prepared(
        settings=settings,
        state_dir=state_dir,
        issuer=issuer,
        source=source,
        state=state,
        control=control,
        cni=plugin,
        fronts=fronts,
        notifier=notifier,
        store=FdStore(notifier, stored if inheritance is None else inheritance.pods()),
        logs=writer,
        predecessor=predecessor,
        inheritance=inheritance,
    )


async def _main(prepared: Prepared) -> None:
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as services:
            agent = Agent(
                prepared.settings,
                prepared.state_dir,
                prepared.issuer,
                prepared.source,
                prepared.control,
                prepared.cni,
                prepared.logs,
                services,
                prepared.store,
            )
            life = Life(prepared, agent, services)
            async with trio.open_nursery() as work:
                work.start_soon(stop_on_signal, log, signals, work.cancel_scope)
                work.start_soon(_stop_when_asked, agent, work.cancel_scope)
                await life.begin()
                heap.settle()
                work.start_soon(agent.watch)
                log.info("ready")
                work.start_soon(life.tell_manager)
                work.start_soon(life.until_replaced, work.cancel_scope)
            with trio.CancelScope(shield=True):
                await life.end(signals)
            services.cancel_scope.cancel()
    log.info("stopped")


async def _stop_when_asked(agent: Agent, scope: trio.CancelScope) -> None:
    await agent.monitoring.asked_to_quit()
    scope.cancel()


def _raise_descriptor_limit() -> None:
    """Each carried connection takes two descriptors; the usual 1024 is far too few."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
