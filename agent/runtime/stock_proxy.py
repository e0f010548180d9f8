"""A stock ztunnel in our forwarder's place: pods go to it over ZDS, its listeners to the kernel.

It opens its listeners in the pod's namespace as it does behind Istio's node
agent. There is no redirect to them: when it has answered we look them up, write
them into the pod's slots, and sk_lookup hands connections over as it does to
listeners of our own. Original destination and source need no help then: both
are what the accepted socket says.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import trio

from meshbpf.agent.api_proxy import ProxyInfo
from meshbpf.agent.datapath.cgroups import cgroup_layout
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.proxy_sockets import proxy_sockets
from meshbpf.agent.datapath.steering import Steering
from meshbpf.agent.runtime.attachments import Attachment
from meshbpf.agent.runtime.pod_sockets import close_all
from meshbpf.agent.runtime.zds_server import Entry, ZdsServer
from meshbpf.agent.wire import zds

SERVED_WAIT_S = 3.0
"""How long an attach waits for a proxy that is connected."""


class StockProxy:
    """One per agent."""

    def __init__(self, path: Path, steering: Steering) -> None:
        self._steering = steering
        self._server = ZdsServer(path, self._register)
        self._cgroups: dict[int, int] = {}
        self.run = self._server.run
        self.close = self._server.close
        self.remove = self._server.remove

    def add(self, attachment: Attachment, netns: Netns) -> None:
        """Hand the pod over, now and to every proxy that comes."""
        name = attachment.name
        # Kubernetes gives a recreated pod another uid; without it the namespace tells.
        uid = attachment.uid or f"{attachment.pod}/{netns.cookie}"
        add = zds.Add(uid, name.name, name.namespace, attachment.service_account)
        self._server.put(attachment.pod, add, netns)

    async def until_served(self, key: str) -> bool:
        """Give a connected proxy a moment to begin; whether it has."""
        return await self._server.until_served(key, SERVED_WAIT_S)

    def info(self) -> ProxyInfo:
        """For `status`."""
        return ProxyInfo(
            kind="ztunnel",
            socket=str(self._server.path),
            pid=self._server.pid,
            unserved=tuple(self._server.unserved()),
        )

    def warnings(self) -> list[str]:
        """What a person should know."""
        waiting = self._server.unserved()
        found = []
        if _root_cgroup() in self._cgroups.values():
            found.append("ztunnel is in the root cgroup: a pod's process there could pass for it")
        if not self._server.pid:
            gone = f"no ztunnel is connected to {self._server.path}"
            lacks = f"; pods that none serves: {', '.join(waiting)}" if waiting else ""
            return [*found, gone + lacks]
        return [*found, *(f"pod {key}: ztunnel does not serve it yet" for key in waiting)]

    async def _register(self, entry: Entry, pid: int) -> None:
        self._cgroups = {
            known: group for known, group in self._cgroups.items() if known in self._server.pids()
        }
        # The entry may be closed, and its number another's, while the thread works.
        netns = replace(entry.netns, fd=os.dup(entry.netns.fd))
        try:
            await trio.to_thread.run_sync(self._register_blocking, entry.key, netns, pid)
        finally:
            netns.close()

    def _register_blocking(self, key: str, netns: Netns, pid: int) -> None:
        found = proxy_sockets(netns, pid)
        try:
            for sock in found.listeners.values():
                # What they accept inherits it: the hooks then know the proxy's ends.
                self._steering.protect(sock)
            self._cgroups[pid] = found.cgroup
            self._steering.admit_proxy(self._cgroups.values())
            self._steering.set_listeners(key, found.listeners)
        finally:
            close_all(found.listeners)


def _root_cgroup() -> int | None:
    """The id of cgroup v2's root, as it is mounted here."""
    point = cgroup_layout().point
    return point.stat().st_ino if point is not None else None
