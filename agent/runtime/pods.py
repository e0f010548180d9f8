"""The pods of this node: attach, detach, take over, and what becomes of each.

Order is everything here. An attach opens the listeners, lets the kernel
capture (which registers the listeners first), starts the forwarder and then
writes the attachment down; killed in between, the next start finds pins
without a record and lifts them. A detach lifts the capture, ends the
forwarder and then forgets. All changes go one at a time under the datapath
lock: the kernel side is blocking and runs in a thread.

A pod that fails stays in the list with its reason and is tried again; it
never takes the agent or another pod down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from meshbpf.agent.api import AttachRequest, AttachResult, DetachResult, PodInfo
from meshbpf.agent.config import PodName, Settings
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import AttachedPod, Steering
from meshbpf.agent.runtime import attachments
from meshbpf.agent.runtime.attach_plan import AttachError, candidates, identity, plan
from meshbpf.agent.runtime.attachments import Attachment
from meshbpf.agent.runtime.certs import CertificateStore, utc_now
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.pod_sockets import (
    Listeners,
    PodSockets,
    close_all,
    open_listeners,
    pod_steering,
)

WATCH_S = 1.0
RETRY_S = 5.0
SERVE_RETRY_S = 1.0
STOP_S = 3.0
"""A cancelled forwarder says goodbye to its tunnels for 2 s at most."""

log = Log("pods")


class PodServer(Protocol):
    """The part of Forwarder that is used here."""

    async def serve(self, pod: LocalPod, listeners: Listeners) -> None:
        """Carry the pod's connections until cancelled."""


@dataclass(slots=True, eq=False)
class Pod:
    """One pod that is attached, or ought to be."""

    attachment: Attachment
    identity: SpiffeId
    reason: str = ""
    """Why it does not work; empty while it does."""
    netns: Netns | None = None
    kernel: AttachedPod | None = None
    local: LocalPod | None = None
    """The pod as the forwarder sees it, while it is served."""
    listeners: Listeners = field(default_factory=dict)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)
    """The forwarder's task is over; set only if there was one."""
    retry_at: float = 0.0

    @property
    def key(self) -> str:
        """NS/NAME."""
        return self.attachment.pod

    @property
    def attached(self) -> bool:
        """The kernel captures for it."""
        return self.kernel is not None


class PodManager:
    """All pods of this agent; its methods are called from the event loop."""

    def __init__(
        self,
        settings: Settings,
        path: Path,
        *,
        steering: Steering,
        datapath_lock: trio.Lock,
        certificates: CertificateStore,
        server: PodServer,
        mesh: Callable[[], Snapshot],
        nursery: trio.Nursery,
    ) -> None:
        self._settings = settings
        self._path = path
        self._steering = steering
        self._lock = datapath_lock
        self._certificates = certificates
        self._server = server
        self._mesh = mesh
        self._nursery = nursery
        self._pods: dict[str, Pod] = {}

    def __len__(self) -> int:
        return len(self._pods)

    def list(self) -> Sequence[Pod]:
        """All pods, sorted by name."""
        return [self._pods[key] for key in sorted(self._pods)]

    # --- the verbs ----------------------------------------------------------

    async def attach(
        self, request: AttachRequest, describe: Callable[[Pod], PodInfo]
    ) -> AttachResult:
        """Steer a pod. Asked twice it changes nothing, or what is different."""
        async with self._lock:
            wanted = plan(request, self._settings, self._mesh(), utc_now())
            self._refuse_taken(wanted)
            pod = self._pods.get(wanted.pod)
            if pod is None:
                pod = await self._start(wanted)
                await self._save()
                log.info("pod attached", pod=pod.key, netns=wanted.netns, identity=pod.identity)
                return AttachResult(outcome="attached", pod=describe(pod))
            if pod.attached and _same(pod.attachment, wanted):
                return AttachResult(outcome="unchanged", pod=describe(pod))
            pod = await self._replace(pod, wanted)
            await self._save()
            log.info("pod attached anew", pod=pod.key, netns=wanted.netns, identity=pod.identity)
            return AttachResult(outcome="updated", pod=describe(pod))

    async def detach(self, text: str) -> DetachResult:
        """Stop steering a pod. One that the mesh knows but we do not steer is no error."""
        name = PodName.parse(text)
        async with self._lock:
            pod = self._pods.get(str(name))
            if pod is not None:
                await self._stop(pod)
                await self._save()
                log.info("pod detached", pod=pod.key)
                return DetachResult(outcome="detached", pod=pod.key)
        if not self._mesh().workload_named(name.namespace, name.name):
            raise AttachError(
                "unknown-pod",
                f"pod {name} is not attached, and the mesh state does not know it",
                "`meshbpf pods` lists what is attached",
            )
        return DetachResult(outcome="not-attached", pod=str(name))

    # --- life with the agent ------------------------------------------------

    async def restore(self) -> None:
        """Take over what an earlier agent of this state directory left.

        Raises ConfigError when its record cannot be understood.
        """
        recorded = await trio.to_thread.run_sync(attachments.load, self._path)
        async with self._lock:
            for left in self._steering.attached():
                if left.key not in recorded:
                    log.warning("capture without a record lifted", pod=left.key)
                    await trio.to_thread.run_sync(self._steering.detach, left.key)
            for key, attachment in sorted(recorded.items()):
                if not attachment.still_there():
                    log.info("pod is gone, detached", pod=key, netns=attachment.netns)
                    await trio.to_thread.run_sync(self._steering.detach, key)
                    continue
                try:
                    await self._start(attachment)
                except MeshbpfError as error:
                    self._fail(Pod(attachment, self._identity(attachment)), error)
                else:
                    log.info("pod taken over", pod=key, netns=attachment.netns)
            if {pod.attachment for pod in self._pods.values()} != set(recorded.values()):
                await self._save()

    async def watch(self) -> None:
        """Detach pods whose namespace went away, retry failed ones, until cancelled."""
        while True:
            await trio.sleep(WATCH_S)
            now = trio.current_time()
            gone = [pod for pod in self._pods.values() if not pod.attachment.still_there()]
            failed = [
                pod for pod in self._pods.values() if not pod.attached and pod.retry_at <= now
            ]
            for pod in gone:
                await self._bury(pod)
            for pod in failed:
                await self._retry(pod)

    def refresh(self, mesh: Snapshot) -> None:
        """A new state may put a pod into another trust domain."""
        for pod in self._pods.values():
            fresh = identity(pod.attachment, self._settings, mesh)
            if fresh != pod.identity:
                old, pod.identity = pod.identity, fresh
                self._certificates.hold(fresh, pod.key)
                self._certificates.release(old, pod.key)

    def any_open(self) -> bool:
        """Whether some pod talks past the mesh while no agent runs."""
        return any(pod.attachment.on_agent_down == "open" for pod in self._pods.values())

    async def stop_serving(self) -> None:
        """End the forwarders at the agent's end: the attachments remain."""
        running = [pod for pod in self._pods.values() if pod.attached]
        for pod in running:
            pod.scope.cancel()
        for pod in running:
            await self._end_serving(pod)

    # --- one pod ------------------------------------------------------------

    async def _start(self, attachment: Attachment) -> Pod:
        """Attach and serve. Raises MeshbpfError; then nothing is left behind."""
        pod = Pod(attachment, self._identity(attachment))
        self._certificates.hold(pod.identity, pod.key)
        try:
            await trio.to_thread.run_sync(self._attach_blocking, pod)
        except BaseException:
            before = self._pods.get(pod.key)
            if before is None or before.identity != pod.identity:
                self._certificates.release(pod.identity, pod.key)
            raise
        self._warn_of_doubts(pod)
        self._pods[pod.key] = pod
        self._nursery.start_soon(self._serve, pod, name=f"pod {pod.key}")
        return pod

    def _attach_blocking(self, pod: Pod) -> None:
        netns = Netns.open(pod.attachment.netns)
        listeners: Listeners = {}
        try:
            listeners = open_listeners(PodSockets(netns, self._steering.protect))
            pod.kernel = self._steering.attach(pod_steering(pod.attachment, netns), listeners)
        except BaseException:
            close_all(listeners)
            netns.close()
            raise
        pod.netns, pod.listeners = netns, listeners

    async def _replace(self, old: Pod, wanted: Attachment) -> Pod:
        """Make a pod what `wanted` says, without a moment uncaptured.

        New options are the kernel's business alone: the forwarder and its
        connections stay. Another account needs another forwarder, whose
        listeners are registered before the old ones close. A pod that came
        back in another namespace has nothing to be kept.
        """
        have = old.attachment
        if old.attached and have.netns_inode != wanted.netns_inode:
            await self._stop(old)
            return await self._start(wanted)
        if old.attached and have.service_account == wanted.service_account:
            await trio.to_thread.run_sync(self._reattach_blocking, old, wanted)
            old.attachment = wanted
            return old
        pod = await self._start(wanted)
        await self._end_serving(old)
        if old.identity != pod.identity:
            self._certificates.release(old.identity, old.key)
        return pod

    def _reattach_blocking(self, pod: Pod, wanted: Attachment) -> None:
        assert pod.netns is not None  # noqa: S101 (it is attached)
        spec = pod_steering(wanted, pod.netns)
        pod.kernel = self._steering.attach(spec, pod.listeners)

    async def _stop(self, pod: Pod) -> None:
        """Lift the capture, end the forwarder, forget. Raises MeshbpfError before any of it."""
        await trio.to_thread.run_sync(self._steering.detach, pod.key)
        del self._pods[pod.key]
        self._certificates.release(pod.identity, pod.key)
        await self._end_serving(pod)

    async def _end_serving(self, pod: Pod) -> None:
        if pod.attached:
            pod.scope.cancel()
            with trio.move_on_after(STOP_S, shield=True) as overdue:
                await pod.ended.wait()
            if overdue.cancelled_caught:
                log.error("forwarder of a pod does not end", pod=pod.key)
        self._close(pod)

    def _close(self, pod: Pod) -> None:
        """Let go of the namespace: as long as one descriptor is open it cannot die."""
        close_all(pod.listeners)
        if pod.netns is not None:
            pod.netns.close()
            pod.netns = None

    async def _serve(self, pod: Pod) -> None:
        """Run the forwarder; should it fail, again with fresh listeners."""
        try:
            with pod.scope:
                while True:
                    try:
                        pod.local = self._local(pod)
                        await self._server.serve(pod.local, pod.listeners)
                        pod.reason = "the forwarder ended by itself"
                    except Exception as error:  # noqa: BLE001
                        # The boundary of one pod: whatever is wrong with it
                        # must not reach the others.
                        pod.reason = f"{type(error).__name__}: {error}"
                        log.error("forwarder of a pod failed", cause=error, pod=pod.key)
                    await self._reopen(pod)
        finally:
            pod.ended.set()

    async def _reopen(self, pod: Pod) -> None:
        while pod.reason:
            await trio.sleep(SERVE_RETRY_S)
            async with self._lock:
                try:
                    await trio.to_thread.run_sync(self._reopen_blocking, pod)
                except MeshbpfError as error:
                    log.error("listeners of a pod cannot be reopened", cause=error, pod=pod.key)
                else:
                    pod.reason = ""

    def _reopen_blocking(self, pod: Pod) -> None:
        assert pod.netns is not None  # noqa: S101 (a served pod has one)
        fresh = open_listeners(PodSockets(pod.netns, self._steering.protect))
        try:
            self._steering.set_listeners(pod.key, fresh)
        except BaseException:
            close_all(fresh)
            raise
        close_all(pod.listeners)
        pod.listeners = fresh

    def _local(self, pod: Pod) -> LocalPod:
        assert pod.netns is not None  # noqa: S101
        assert pod.kernel is not None  # noqa: S101 (both set by attach)
        addresses = frozenset(pod.kernel.addresses)
        return LocalPod(
            namespace=pod.attachment.name.namespace,
            name=pod.attachment.name.name,
            service_account=pod.attachment.service_account,
            addresses=addresses,
            sockets=PodSockets(pod.netns, self._steering.protect, addresses),
            index=pod.kernel.index,
        )

    async def _bury(self, pod: Pod) -> None:
        async with self._lock:
            if self._pods.get(pod.key) is not pod:
                return
            log.info("pod's network namespace is gone, detached", pod=pod.key)
            try:
                await self._stop(pod)
                await self._save()
            except MeshbpfError as error:
                log.error("capture of a vanished pod cannot be lifted", cause=error, pod=pod.key)

    async def _retry(self, pod: Pod) -> None:
        async with self._lock:
            if self._pods.get(pod.key) is not pod:
                return
            try:
                await self._start(pod.attachment)
            except MeshbpfError as error:
                self._fail(pod, error)
            else:
                log.info("pod attached at last", pod=pod.key)

    def _fail(self, pod: Pod, error: MeshbpfError) -> None:
        if pod.reason != error.what:
            log.error("pod cannot be attached", cause=error, pod=pod.key)
        pod.reason = error.what
        pod.retry_at = trio.current_time() + RETRY_S
        if pod.key not in self._pods:
            self._pods[pod.key] = pod
        self._certificates.hold(pod.identity, pod.key)

    # --- helpers ------------------------------------------------------------

    def _identity(self, attachment: Attachment) -> SpiffeId:
        return identity(attachment, self._settings, self._mesh())

    async def _save(self) -> None:
        current = [pod.attachment for pod in self._pods.values()]
        try:
            await trio.to_thread.run_sync(attachments.save, self._path, current)
        except OSError as error:
            raise MeshbpfError(
                "attachments-not-saved",
                f"{self._path}: {error.strerror}: done, but a restart would not know of it",
                "make room on the disk, then repeat the command",
            ) from error

    def _refuse_taken(self, wanted: Attachment) -> None:
        """Two pods in one namespace would be two identities for the same packets."""
        for pod in self._pods.values():
            same = pod.attachment.netns_inode == wanted.netns_inode
            if same and pod.key != wanted.pod and pod.attachment.still_there():
                raise AttachError(
                    "netns-taken",
                    f"network namespace {wanted.netns} is attached as pod {pod.key}",
                    f"`meshbpf detach --pod {pod.key}` first, if that is not so any more",
                )

    def _warn_of_doubts(self, pod: Pod) -> None:
        assert pod.kernel is not None  # noqa: S101 (called after attach)
        for reason in pod.kernel.host_skipped:
            log.warning("host side of a pod is not guarded", pod=pod.key, reason=reason)
        known = candidates(pod.attachment.name, self._settings, self._mesh())
        if not known:
            log.warning("pod is not in the mesh state yet: it can reach nobody", pod=pod.key)
            return
        claimed = {address for workload in known for address in workload.addresses}
        if claimed and claimed.isdisjoint(pod.kernel.addresses):
            log.warning(
                "pod has none of the addresses that the mesh state gives it",
                pod=pod.key,
                has=",".join(map(str, pod.kernel.addresses)),
                mesh=",".join(sorted(map(str, claimed))),
            )


def _same(have: Attachment, wanted: Attachment) -> bool:
    """Whether nothing but the time of the request differs."""
    return msgspec.structs.replace(wanted, attached_at=have.attached_at) == have
