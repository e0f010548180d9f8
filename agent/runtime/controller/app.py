"""The controller's process: follow the cluster, take part in the election, work while leading.

It needs neither root nor BPF. Every replica follows the cluster, so that the
next leader begins at once; 15021 answers when it does.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

import trio

import meshbpf
from meshbpf.agent.controller_config import ControllerSettings
from meshbpf.agent.core.errors import Exit
from meshbpf.agent.core.objects import ObjectSet
from meshbpf.agent.l7.deployment import CLASS, GATEWAY_CLASS_NAME
from meshbpf.agent.runtime import kube_config, logs, readiness
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.controller.desired import Desired
from meshbpf.agent.runtime.controller.lease import Leadership
from meshbpf.agent.runtime.controller.reconcile import Reconciler
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.kube_watch import Kind
from meshbpf.agent.runtime.kubernetes import KubernetesSource
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.main_loop import SIGNALS, one_error, stop_on_signal
from meshbpf.agent.runtime.readiness import Readiness
from meshbpf.agent.runtime.waypoint.followed import FOLLOWED

LEASE = "meshbpf-waypoint-controller"
_OURS = f"{GATEWAY_CLASS_NAME}={CLASS}"

log = Log("controller")


def run(settings: ControllerSettings) -> int:
    """Run until told to stop; 0 after an orderly end. Raises MeshbpfError."""
    with ExitStack() as stack:
        writer = logs.set_up(settings.log_level, settings.log_format)
        stack.callback(writer.close)
        api = KubeApi(kube_config.load(settings.kubeconfig, os.environ))
        listener = readiness.open_listener(settings.readiness_port)
        with one_error(log, "controller"):
            trio.run(_main, settings, api, listener, strict_exception_groups=True)
    return int(Exit.OK)


async def _main(settings: ControllerSettings, api: KubeApi, listener: socket.socket) -> None:
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signal, log, signals, nursery.cancel_scope)
            ready = Readiness("mesh-state")
            nursery.start_soon(readiness.serve, listener, ready)
            source = _source(settings, api)
            reconciler = Reconciler(
                settings.template,
                Desired(api),
                lambda: source.objects or ObjectSet.EMPTY,
                utc_now,
                role=settings.role,
            )
            await nursery.start(source.watch, reconciler)
            ready.done("mesh-state")
            log.info("ready", version=meshbpf.__version__, source=source.origin)
            leadership = Leadership(api, settings.namespace, LEASE, settings.identity, utc_now)
            await leadership.run(reconciler.run)
    log.info("stopped")


def _source(settings: ControllerSettings, api: KubeApi) -> KubernetesSource:
    own = [
        Kind("", "v1", "ServiceAccount", "serviceaccounts", labels=_OURS),
        Kind("apps", "v1", "Deployment", "deployments", labels=_OURS),
    ]
    if settings.role:
        kind = "rbac.authorization.k8s.io", "v1", "ClusterRoleBinding", "clusterrolebindings"
        own.append(Kind(*kind, f"metadata.name={settings.role}"))
    return KubernetesSource(api, settings.template.cluster, more=(*FOLLOWED, *own))
