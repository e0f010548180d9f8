"""The waypoint's process: what starts in which order, and how it ends.

    run()   logs, state directory and its lock, CA, mesh state, listeners:
            whatever a person can have got wrong is found before anything starts
    trio    the first plan, the certificate, then 15008 is listened on
    ready   logged, 15021 answers 200
    stop    SIGTERM or SIGINT: new connections are refused, tunnels say GOAWAY,
            and what is in flight has DRAIN_S to end

With several workers the same happens in each of them (workers.py); the parent
answers on 15020 and 15021 for all. No root and no BPF are needed.
"""

from __future__ import annotations

import gc
import os
import random
import resource
import socket
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from datetime import timedelta

import trio

import meshbpf
from meshbpf.agent.core.errors import Exit, MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.kube_cluster import Cluster
from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.l7.balancer import Balancer
from meshbpf.agent.l7.planner import Planner
from meshbpf.agent.runtime import httpd, kube_config, logs, readiness, sources
from meshbpf.agent.runtime.certs import CertificateStore
from meshbpf.agent.runtime.issuing import AnyIssuer
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.kubernetes import KubernetesSource
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.main_loop import SIGNALS, one_error, stop_on_signal
from meshbpf.agent.runtime.manifests import ManifestSource
from meshbpf.agent.runtime.mesh_source import MeshSource
from meshbpf.agent.runtime.readiness import Readiness
from meshbpf.agent.runtime.state_dir import StateDir
from meshbpf.agent.runtime.state_source import LocalXdsSource
from meshbpf.agent.runtime.waypoint import workers
from meshbpf.agent.runtime.waypoint.accept import accept, open_hbone
from meshbpf.agent.runtime.waypoint.calls import Calls
from meshbpf.agent.runtime.waypoint.dial import Dialer
from meshbpf.agent.runtime.waypoint.extensions import Extensions
from meshbpf.agent.runtime.waypoint.followed import FOLLOWED
from meshbpf.agent.runtime.waypoint.limits import LIMITS
from meshbpf.agent.runtime.waypoint.pages import Pages
from meshbpf.agent.runtime.waypoint.pools import Pools
from meshbpf.agent.runtime.waypoint.proxy import Proxy
from meshbpf.agent.runtime.waypoint.serve import Inbound
from meshbpf.agent.runtime.waypoint.state import LiveState
from meshbpf.agent.waypoint_config import WaypointSettings

DRAIN_S = 5.0
CERTIFICATE_LOOK_S = 0.2

log = Log("waypoint")


def run(settings: WaypointSettings) -> int:
    """Run the waypoint until it is told to stop; 0 after an orderly end.

    Raises MeshbpfError for whatever keeps it from running.
    """
    with ExitStack() as stack:
        writer = logs.set_up(settings.log_level, settings.log_format)
        stack.callback(writer.close)
        _raise_descriptor_limit()
        issuer, trust_domain = sources.issuer(settings, os.environ, impersonates=False)
        if not settings.trust_domain:
            settings = replace(settings, trust_domain=trust_domain or "cluster.local")
        if settings.worker is None:
            stack.callback(StateDir.open(settings.state_dir).close)
        source = _source(settings)
        state = source.load()
        with one_error(log, "waypoint"):
            if settings.workers > 1 and settings.worker is None:
                trio.run(workers.supervise, settings, strict_exception_groups=True)
            else:
                hbone = open_hbone(settings.hbone_port)
                for listener in hbone:
                    stack.callback(listener.close)
                pages = workers.inherited_pages() or _open_pages(settings)
                trio.run(
                    _main,
                    settings,
                    issuer,
                    source,
                    state,
                    hbone,
                    pages,
                    strict_exception_groups=True,
                )
    return int(Exit.OK)


def _source(settings: WaypointSettings) -> MeshSource:
    cluster = Cluster(
        network=settings.network,
        trust_domain=settings.trust_domain,
        domain=settings.cluster_domain,
        root_namespace=settings.root_namespace,
        by_hand=settings.manifests is not None,
    )
    if settings.kubernetes:
        api = KubeApi(kube_config.load(settings.kubeconfig, os.environ))
        return KubernetesSource(api, cluster, more=FOLLOWED)
    if settings.manifests is not None:
        return ManifestSource(settings.manifests, cluster)
    assert settings.local_xds is not None  # noqa: S101 (WaypointSettings sees to it)
    return LocalXdsSource(settings.local_xds)


def _open_pages(settings: WaypointSettings) -> workers.PageListeners:
    stats = httpd.open_listener(settings.stats_port, "stats") if settings.stats_port else None
    return workers.PageListeners(stats, readiness.open_listener(settings.readiness_port))


async def _main(
    settings: WaypointSettings,
    issuer: AnyIssuer,
    source: MeshSource,
    state: MeshState | None,
    hbone: list[socket.socket],
    pages: workers.PageListeners,
) -> None:
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as services:
            ready = Readiness("certificate", "mesh-state")
            services.start_soon(readiness.serve, pages.readiness, ready)
            certificates = CertificateStore(
                issuer, services, ttl=timedelta(seconds=settings.cert_ttl_s)
            )
            services.start_soon(issuer.run, certificates.renew_all)
            async with AsyncExitStack() as stack, trio.open_nursery() as work:
                work.start_soon(stop_on_signal, log, signals, work.cancel_scope)
                extensions = Extensions(settings.namespace, settings.name)
                stack.callback(extensions.close)
                live = _state(settings, source, extensions)
                rng = random.Random()  # noqa: S311 (it draws backends, no secrets)
                balancer = Balancer(rng)
                dialer = Dialer(certificates, work)
                pools = Pools(dialer, work, LIMITS)
                calls = Calls(live, pools, dialer, balancer, work, LIMITS, time.monotonic)
                proxy = Proxy(live, pools, balancer, calls, work, LIMITS, rng, extensions.sinks.tcp)
                inbound = Inbound(proxy, certificates, work)
                live.on_change(pools.evict)
                live.on_change(balancer.keep_only)
                live.on_change(lambda _: extensions.retain(live.plan))
                if state is not None:
                    await live.apply(state)
                    work.start_soon(source.watch, live)
                else:
                    await work.start(source.watch, live)
                ready.done("mesh-state")
                identity = live.identity.identity
                certificates.hold(identity, f"{settings.namespace}/{settings.name}")
                await _first_certificate(certificates, identity, wait=issuer.remote)
                ready.done("certificate")
                if pages.stats is not None:
                    page = Pages(proxy, inbound, certificates, source, extensions)
                    services.start_soon(httpd.serve, [pages.stats], page.handle)
                work.start_soon(pools.sweep)
                work.start_soon(extensions.run, calls, lambda: source.objects or ObjectSet.EMPTY)
                for listener in hbone:
                    work.start_soon(accept, work, listener, inbound.serve_tunnel)
                gc.collect()
                gc.freeze()
                log.info(
                    "ready",
                    version=meshbpf.__version__,
                    waypoint=f"{settings.namespace}/{settings.name}",
                    identity=identity,
                    pid=os.getpid(),
                    source=source.origin,
                )
            services.cancel_scope.cancel()
    log.info("stopped")


async def _first_certificate(
    certificates: CertificateStore, identity: SpiffeId, *, wait: bool
) -> None:
    """Where the CA is elsewhere it may be down for a while; our own says what is wrong for good."""
    while True:
        try:
            await certificates.tls(identity)
        except MeshbpfError:
            if not wait:
                raise
            # The store logs each attempt, and makes the next by itself.
            await trio.sleep(CERTIFICATE_LOOK_S)
        else:
            return


def _state(settings: WaypointSettings, source: MeshSource, extensions: Extensions) -> LiveState:
    planner = Planner(
        settings.namespace,
        settings.name,
        trust_domain=settings.trust_domain,
        root_namespace=settings.root_namespace,
        cluster_domain=settings.cluster_domain,
        keep=extensions.keep,
    )
    return LiveState(
        planner,
        lambda: source.objects or ObjectSet.EMPTY,
        namespace=settings.namespace,
        name=settings.name,
        service_account=settings.service_account,
        trust_domain=settings.trust_domain,
        network=settings.network,
        addresses=settings.addresses,
    )


def _raise_descriptor_limit() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
