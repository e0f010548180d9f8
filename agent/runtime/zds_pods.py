"""Pods that Istio's node agent captures, and hands over by ZDS: we stand in ztunnel's place.

Nothing is steered here. A pod comes with its namespace and its name; listeners
are opened in it at the ports that the node agent's rules redirect to, and the
forwarder serves them. A pod goes when the node agent says so, or when the
snapshot of a new connection leaves it out.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshbpf.agent.config import Settings
from meshbpf.agent.core.address import SocketAddress, parse_ip
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.datapath import rtnetlink
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.runtime import zds_client
from meshbpf.agent.runtime.attach_plan import identity
from meshbpf.agent.runtime.attachments import Attachment
from meshbpf.agent.runtime.certs import CertificateStore, utc_now
from meshbpf.agent.runtime.inpod_sockets import InpodSockets, original_destination
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.pod import STOP_S, Pod, PodServer
from meshbpf.agent.runtime.pod_sockets import Listeners, close_all, open_listeners
from meshbpf.agent.wire import zds
from meshbpf.bpf import DNS_PORT

SERVE_RETRY_S = 1.0
RESOLV_CONF = Path("/etc/resolv.conf")

log = Log("pods")


@dataclass(slots=True, eq=False)
class _Handed:
    """One pod, with what is open in it."""

    uid: str
    pod: Pod
    netns: Netns
    listeners: Listeners
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)


class ZdsPods:
    """All pods of an agent that is handed them."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        *,
        certificates: CertificateStore,
        server: PodServer,
        mesh: Callable[[], Snapshot],
        nursery: trio.Nursery,
    ) -> None:
        self.path = path
        self._settings = settings
        self._certificates = certificates
        self._server = server
        self._mesh = mesh
        self._nursery = nursery
        self._handed: dict[str, _Handed] = {}
        self._named: set[str] | None = None
        """Uids of the snapshot that is under way."""
        self.complete = False
        """The node agent is connected, and has named all pods."""

    async def run(self) -> None:
        """Be handed pods until cancelled."""
        await zds_client.run(self.path, self)

    def list(self) -> Sequence[Pod]:
        """All pods, sorted by name."""
        return sorted((one.pod for one in self._handed.values()), key=lambda pod: pod.key)

    def refresh(self, mesh: Snapshot) -> None:
        """A new state may put a pod into another trust domain."""
        for one in self._handed.values():
            pod = one.pod
            fresh = identity(pod.attachment, self._settings, mesh)
            if fresh != pod.identity:
                old, pod.identity = pod.identity, fresh
                self._certificates.hold(fresh, pod.key)
                self._certificates.release(old, pod.key)

    async def stop_serving(self) -> None:
        """End the forwarders at the agent's end."""
        for one in self._handed.values():
            one.scope.cancel()  # all at once, then wait for each
        for uid in list(self._handed):
            await self.delete(uid)

    # --- the node agent's requests --------------------------------------------

    def begin(self) -> None:
        """A snapshot is under way."""
        self._named = set()

    def lost(self) -> None:
        """Pods are served on."""
        self._named = None
        self.complete = False

    async def add(self, pod: zds.Add, netns_fd: int) -> None:
        """Serve it; asked twice it changes nothing. Raises MeshbpfError."""
        netns = Netns.of_descriptor(netns_fd)
        if self._named is not None:
            self._named.add(pod.uid)
        known = self._handed.get(pod.uid)
        if known is not None:
            if _is_same(known, pod, netns):
                netns.close()
                return
            await self.delete(pod.uid)
        try:
            attachment = Attachment(
                pod=f"{pod.namespace}/{pod.name}",
                netns=str(netns.path),
                netns_device=netns.dev,
                netns_inode=netns.inode,
                service_account=pod.service_account,
                on_agent_down="closed",
                same_node="hbone",
                dns=True,
                attached_at=utc_now(),
                uid=pod.uid,
            )
            local, listeners = await trio.to_thread.run_sync(self._open, pod, netns)
        except BaseException:
            netns.close()
            raise
        whom = identity(attachment, self._settings, self._mesh())
        shown = Pod(attachment, whom, self._settings.tuning, captured_elsewhere=True, local=local)
        one = self._handed[pod.uid] = _Handed(pod.uid, shown, netns, listeners)
        self._certificates.hold(whom, shown.key)
        self._nursery.start_soon(self._serve, one, local, name=f"pod {shown.key}")
        log.info("pod received", pod=shown.key, identity=whom)

    async def keep(self, uid: str) -> None:
        """It is not gone."""
        if self._named is not None:
            self._named.add(uid)

    async def delete(self, uid: str) -> None:
        """End it at once. No error when it is unknown."""
        one = self._handed.pop(uid, None)
        if one is None:
            return
        self._certificates.release(one.pod.identity, one.pod.key)
        one.scope.cancel()
        with trio.move_on_after(STOP_S, shield=True) as overdue:
            await one.ended.wait()
        if overdue.cancelled_caught:
            log.error("forwarder of a pod does not end", pod=one.pod.key)
        close_all(one.listeners)
        one.netns.close()
        log.info("pod has gone", pod=one.pod.key)

    async def snapshot(self) -> None:
        """What was not named is gone."""
        named = self._named or set()
        for uid in self._handed.keys() - named:
            await self.delete(uid)
        self._named = None
        self.complete = True

    # --- one pod ----------------------------------------------------------------

    def _open(self, pod: zds.Add, netns: Netns) -> tuple[LocalPod, Listeners]:
        with rtnetlink.route(netns) as nl:
            own = frozenset(
                one.ip
                for one in rtnetlink.addresses(nl)
                if one.is_global and not one.ip.is_loopback
            )
        sockets = InpodSockets(netns, own, self._settings.tuning.keepalive)
        local = LocalPod(
            namespace=pod.namespace,
            name=pod.name,
            service_account=pod.service_account,
            addresses=own,
            sockets=sockets,
            cookie=netns.cookie,
            original=original_destination,
            resolver=_resolver(),
            tuning=self._settings.tuning,
        )
        return local, open_listeners(sockets)

    async def _serve(self, one: _Handed, local: LocalPod) -> None:
        try:
            with one.scope:
                while True:
                    try:
                        await self._server.serve(local, one.listeners)
                    except Exception as error:  # noqa: BLE001
                        # The boundary of one pod: whatever is wrong with it
                        # must not reach the others.
                        one.pod.reason = f"{type(error).__name__}: {error}"
                        log.error("forwarder of a pod failed", cause=error, pod=one.pod.key)
                    await trio.sleep(SERVE_RETRY_S)
                    one.pod.reason = ""
        finally:
            one.ended.set()


def _is_same(known: _Handed, pod: zds.Add, netns: Netns) -> bool:
    have = known.pod.attachment
    named = have.pod == f"{pod.namespace}/{pod.name}"
    return (
        named and have.service_account == pod.service_account and known.netns.cookie == netns.cookie
    )


def _resolver() -> SocketAddress | None:
    """The first of this agent's own: whom a pod has asked the rules do not leave to be seen."""
    try:
        lines = RESOLV_CONF.read_text(errors="replace").splitlines()
    except OSError as error:
        raise MeshbpfError(
            "no-resolver",
            f"{RESOLV_CONF}: {error.strerror or errno.errorcode.get(error.errno or 0, '')}",
            "the agent's own resolver answers for pods: let the file name one",
        ) from error
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            return SocketAddress(parse_ip(words[1].partition("%")[0]), DNS_PORT)
    return None
