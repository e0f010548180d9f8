"""The pods of this node: attach, detach, take over, and what becomes of each.

Order is everything here. An attach opens the listeners, lets the kernel
capture (which registers the listeners first), starts the forwarder and then
writes the attachment down; killed in between, the next start finds pins
without a record and lifts them. A detach lifts the capture, ends the
forwarder and then forgets. All changes go one at a time under one
lock: the kernel side is blocking and runs in a thread.

A pod that fails stays in the list with its reason and is tried again; it
never takes the agent or another pod down. One that was attached by name and
is gone stays too, waiting for the next of its name (`named_pods.py`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import msgspec
import trio

from meshbpf.agent.api import AttachRequest, AttachResult, DetachResult, PodInfo
from meshbpf.agent.config import PodName, Settings
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.datapath.steering import Steering
from meshbpf.agent.runtime import attachments
from meshbpf.agent.runtime.attach_plan import (
    AttachError,
    Located,
    awaits_mesh,
    candidates,
    identity,
    next_life,
    plan,
)
from meshbpf.agent.runtime.attachments import Attachment
from meshbpf.agent.runtime.carrier import Carrier
from meshbpf.agent.runtime.certs import CertificateStore, utc_now
from meshbpf.agent.runtime.fd_store import FdStore
from meshbpf.agent.runtime.locate import Locator
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.pod import Pod, PodServer
from meshbpf.agent.runtime.stock_proxy import StockProxy

NOT_HERE = "no pod of that name runs on this node"
WATCH_S = 1.0
RETRY_S = 5.0

log = Log("pods")


class PodManager:
    """All pods of this agent; its methods are called from the event loop."""

    def __init__(
        self,
        settings: Settings,
        path: Path,
        *,
        steering: Steering,
        certificates: CertificateStore,
        server: PodServer,
        mesh: Callable[[], Snapshot],
        nursery: trio.Nursery,
        store: FdStore,
        locator: Locator,
        carrier: Carrier | None = None,
        proxy: StockProxy | None = None,
    ) -> None:
        self._proxy = proxy
        self._locator = locator
        self._carrier = carrier
        self._mesh_changed = trio.Event()
        self._attached = trio.Event()
        """Set with the next one, then replaced."""
        self._settings = settings
        self._store = store
        self._path = path
        self._steering = steering
        self._lock = trio.Lock()
        self._certificates = certificates
        self._server = server
        self._mesh = mesh
        self._nursery = nursery
        self._pods: dict[str, Pod] = {}
        self._stopping: MeshbpfError | None = None
        """What requests that come too late are told."""

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
        where = await self._locator.locate(request)
        await self._await_mesh(request, where)
        async with self._lock:
            wanted = plan(request, where, self._settings, self._mesh(), utc_now())
            outcome, pod = await self._make_so(wanted)
            return AttachResult(outcome=outcome, pod=describe(pod))

    async def enrol(self, request: AttachRequest, where: Located, container: str = "") -> Pod:
        """Steer a pod whose labels ask for it; `container` is CNI's id of it, if CNI asks."""
        async with self._lock:
            wanted = plan(request, where, self._settings, self._mesh(), utc_now())
            wanted = msgspec.structs.replace(wanted, enrolled=True, container=container)
            _outcome, pod = await self._make_so(wanted)
            return pod

    async def release(self, leave: Callable[[Attachment], bool]) -> Sequence[str]:
        """Stop steering every pod for which `leave` says so; their names."""
        async with self._lock:
            self._refuse_when_stopping()
            gone = [pod for pod in self._pods.values() if leave(pod.attachment)]
            for pod in gone:
                await self._stop(pod)
                log.info("pod released", pod=pod.key)
            if gone:
                await self._save()
        return [pod.key for pod in gone]

    async def _make_so(
        self, wanted: Attachment
    ) -> tuple[Literal["attached", "unchanged", "updated"], Pod]:
        """What `wanted` asks for, under the lock."""
        self._refuse_when_stopping()
        self._refuse_taken(wanted)
        pod = self._pods.get(wanted.pod)
        if pod is None:
            pod = await self._start(wanted)
            try:
                await self._save("not attached, since a restart would not know of it")
            except MeshbpfError:
                await self._stop(pod)
                raise
            log.info("pod attached", pod=pod.key, netns=wanted.netns, identity=pod.identity)
            return "attached", pod
        if pod.attached and _same(pod.attachment, wanted):
            return "unchanged", pod
        pod = await self._replace(pod, wanted)
        await self._save()
        log.info("pod attached anew", pod=pod.key, netns=wanted.netns, identity=pod.identity)
        return "updated", pod

    async def detach(self, text: str) -> DetachResult:
        """Stop steering a pod. One that the mesh knows but we do not steer is no error."""
        name = PodName.parse(text)
        async with self._lock:
            self._refuse_when_stopping()
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
                waits = attachment.by_name and not attachment.sandbox
                if attachment.still_there() and not waits:
                    pod = self._pod(attachment)
                    await self._try(pod, "pod taken over")
                elif attachment.by_name:
                    log.info("pod is not here now, waiting for one of its name", pod=key)
                    await trio.to_thread.run_sync(self._steering.detach, key)
                    self._wait_for(attachment, NOT_HERE)
                else:
                    log.info("pod's network namespace is gone, detached", pod=key)
                    await trio.to_thread.run_sync(self._steering.detach, key)
            await trio.to_thread.run_sync(self._store.drop_unclaimed)
            if self._pods.keys() != recorded.keys():
                await self._save()

    async def watch(self) -> None:
        """Detach pods whose namespace went away, retry failed ones, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_spares)
            await self._watch()

    async def _keep_spares(self) -> None:
        while True:
            taken = self._attached
            try:
                await trio.to_thread.run_sync(self._steering.prepare)
            except MeshbpfError as error:
                # The next attach will meet it too, and tell who asked for it.
                log.warning("no programs loaded ahead", cause=error)
            await taken.wait()

    async def _watch(self) -> None:
        while True:
            await trio.sleep(WATCH_S)
            for pod in self.list():
                if pod.waiting or pod.retry_at > trio.current_time():
                    continue
                if not pod.attachment.still_there():
                    await self._bury(pod, "pod's network namespace is gone")
                elif not pod.attached:
                    async with self._lock:
                        if self._pods.get(pod.key) is pod:
                            await self._try(pod, "pod attached at last")

    def refresh(self, mesh: Snapshot) -> None:
        """A new state may put a pod into another trust domain, or name one that is awaited."""
        self._mesh_changed.set()
        self._mesh_changed = trio.Event()
        for pod in self._pods.values():
            if pod.waiting:
                continue
            fresh = identity(pod.attachment, self._settings, mesh)
            if fresh != pod.identity:
                old, pod.identity = pod.identity, fresh
                self._certificates.hold(fresh, pod.key)
                self._certificates.release(old, pod.key)

    def any_kept(self) -> bool:
        """Whether a successor will find listeners of ours, with connections that wait."""
        return any(self._store.keeps(key) for key in self._pods)

    async def stop_serving(self) -> None:
        """End the forwarders at the agent's end: the attachments remain."""
        self._stopping = self._stopping or MeshbpfError(
            "stopping", "the agent is stopping", "ask the one that comes next"
        )
        async with self._lock:
            for pod in self._pods.values():
                pod.cancel()  # all at once, then wait for each
            for pod in self._pods.values():
                await pod.end()

    # --- handing over ---------------------------------------------------------

    @asynccontextmanager
    async def frozen(self) -> AsyncIterator[None]:
        """For the time of the block no pod comes, goes, or changes."""
        async with self._lock:
            self._refuse_when_stopping()
            yield

    def descriptors(self) -> Iterator[tuple[str, int]]:
        """Namespaces and listeners of all pods, under the names that a successor knows."""
        for pod in self._pods.values():
            yield from pod.descriptors()

    def retire(self) -> None:
        """A successor has taken the pods over: carry what there is, change nothing."""
        self._stopping = MeshbpfError(
            "replaced", "another agent has taken over meanwhile", "ask again: it will answer"
        )
        for pod in self._pods.values():
            pod.retire()
        if self._proxy is not None:
            self._proxy.close()

    async def watch_retired(self) -> None:
        """Let go of pods whose namespace went away, until cancelled: we hold it open."""
        while True:
            for pod in self.list():
                if not pod.waiting and not pod.attachment.still_there():
                    del self._pods[pod.key]
                    self._certificates.release(pod.identity, pod.key)
                    await pod.end()
            await trio.sleep(WATCH_S)

    # --- pods by name, for whoever watches the runtime -----------------------

    def named(self) -> dict[str, str]:
        """NS/NAME of each pod attached by name, with its sandbox's id; "" while it is awaited."""
        return {
            pod.key: "" if pod.waiting else pod.attachment.sandbox
            for pod in self._pods.values()
            if pod.attachment.by_name
        }

    async def lost(self, key: str, sandbox: str) -> None:
        """The runtime has no such sandbox any more: detach, and wait for the next of its name."""
        pod = self._pods.get(key)
        if pod is None or pod.waiting or not pod.attachment.by_name:
            return
        if pod.attachment.sandbox == sandbox:
            await self._bury(pod, "pod is not running any more")

    async def found(self, key: str, where: Located) -> None:
        """The runtime has a pod under a name that was attached, in another life: attach it."""
        async with self._lock:
            old = self._pods.get(key)
            if self._stopping is not None or old is None or not old.attachment.by_name:
                return
            if where.sandbox == old.attachment.sandbox and not old.waiting:
                return
            try:
                mesh = self._mesh()
                wanted = next_life(old.attachment, where, self._settings, mesh, utc_now())
                self._refuse_taken(wanted)
            except MeshbpfError as error:
                if not old.waiting:
                    await self._stop(old)
                self._wait_for(old.attachment, error.what)
                await self._save()
                return
            try:
                pod = await self._replace(old, wanted)
            except Exception as error:  # noqa: BLE001 (one pod's trouble stays its own)
                self._pods.pop(key, None)
                self._fail(self._pod(wanted), error)
            else:
                log.info("pod recreated, attached again", pod=key, identity=pod.identity)
            await self._save()

    def _wait_for(self, attachment: Attachment, reason: str) -> None:
        """Keep a pod that is not there in the list; it holds nothing, not even a certificate."""
        before = self._pods.get(attachment.pod)
        if before is None or not before.waiting or before.reason != reason:
            log.info("waiting for a pod", pod=attachment.pod, reason=reason)
        last = msgspec.structs.replace(attachment, sandbox="", uid="", cgroup="")
        self._pods[attachment.pod] = Pod(
            last, self._identity(last), self._settings.tuning, reason=reason, waiting=True
        )

    async def _await_mesh(self, request: AttachRequest, where: Located) -> None:
        """Give the mesh state time to name a pod that has just started."""
        with trio.move_on_after(self._settings.account_wait_s):
            while awaits_mesh(request, where, self._settings, self._mesh()):
                await self._mesh_changed.wait()

    # --- one pod ------------------------------------------------------------

    async def _start(self, attachment: Attachment) -> Pod:
        """Attach and serve. Raises MeshbpfError; then nothing is left behind."""
        pod = self._pod(attachment)
        self._certificates.hold(pod.identity, pod.key)
        try:
            await trio.to_thread.run_sync(pod.attach_blocking, self._steering, self._store)
        except BaseException:
            before = self._pods.get(pod.key)
            if before is None or before.waiting or before.identity != pod.identity:
                self._certificates.release(pod.identity, pod.key)
            raise
        self._attached.set()
        self._attached = trio.Event()
        self._warn_of_doubts(pod)
        if self._carrier is not None and pod.local is not None and not pod.proxied:
            self._carrier.add(pod.local)
        self._pods[pod.key] = pod
        self._nursery.start_soon(
            pod.serve,
            self._server,
            self._steering,
            self._lock,
            self._store,
            name=f"pod {pod.key}",
        )
        if self._proxy is not None and pod.netns is not None:
            self._proxy.add(attachment, pod.netns)
            await self._proxy.until_served(pod.key)
        return pod

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
            await trio.to_thread.run_sync(old.update_blocking, self._steering, wanted)
            if self._carrier is not None and old.local is not None and not old.proxied:
                self._carrier.add(old.local)
            return old
        pod = await self._start(wanted)
        await old.end()
        if old.identity != pod.identity and not old.waiting:
            self._certificates.release(old.identity, old.key)
        return pod

    async def _stop(self, pod: Pod) -> None:
        """Lift the capture, end the forwarder, forget. Raises MeshbpfError before any of it."""
        # Lifting the capture destroys sockets: peers are told before that.
        self._server.drain([pod.key])
        await trio.to_thread.run_sync(self._steering.detach, pod.key)
        if self._proxy is not None:
            self._proxy.remove(pod.key)
        if self._carrier is not None and pod.local is not None:
            self._carrier.remove(pod.local.index)
        await trio.to_thread.run_sync(self._store.drop, pod.key)
        del self._pods[pod.key]
        if not pod.waiting:
            self._certificates.release(pod.identity, pod.key)
        await pod.end()

    async def _bury(self, pod: Pod, why: str) -> None:
        """The pod went away: leave nothing of it but, by name, the wish."""
        async with self._lock:
            if self._pods.get(pod.key) is not pod:
                return
            log.info(f"{why}, detached", pod=pod.key)
            try:
                await self._stop(pod)
                if pod.attachment.by_name:
                    self._wait_for(pod.attachment, NOT_HERE)
                await self._save()
            except Exception as error:  # noqa: BLE001 (one pod's trouble stays its own)
                self._fail(pod, error)

    async def _try(self, pod: Pod, success: str) -> None:
        """Attach a pod that is recorded; a failure is noted and tried again later."""
        try:
            await self._start(pod.attachment)
        except Exception as error:  # noqa: BLE001 (one pod's trouble stays its own)
            # Nobody accepts for it now: connections must not wait in a queue.
            await trio.to_thread.run_sync(self._store.drop, pod.key)
            self._fail(pod, error)
        else:
            log.info(success, pod=pod.key, netns=pod.attachment.netns)

    def _fail(self, pod: Pod, error: Exception) -> None:
        reason = error.what if isinstance(error, MeshbpfError) else repr(error)
        if pod.reason != reason:
            log.error("pod failed", cause=error, pod=pod.key, retry_s=RETRY_S)
        pod.reason = reason
        pod.retry_at = trio.current_time() + RETRY_S
        if pod.key not in self._pods:
            self._pods[pod.key] = pod
            self._certificates.hold(pod.identity, pod.key)

    # --- helpers ------------------------------------------------------------

    def _pod(self, attachment: Attachment) -> Pod:
        proxied = self._proxy is not None
        tuning = self._settings.tuning
        return Pod(attachment, self._identity(attachment), tuning, proxied=proxied)

    def _identity(self, attachment: Attachment) -> SpiffeId:
        return identity(attachment, self._settings, self._mesh())

    async def _save(self, otherwise: str = "done, but a restart would not know of it") -> None:
        current = [pod.attachment for pod in self._pods.values()]
        try:
            await trio.to_thread.run_sync(attachments.save, self._path, current)
        except OSError as error:
            raise MeshbpfError(
                "attachments-not-saved",
                f"{self._path}: {error.strerror}: {otherwise}",
                "make room on the disk, then repeat the command",
            ) from error

    def _refuse_when_stopping(self) -> None:
        if self._stopping is not None:
            raise self._stopping

    def _refuse_taken(self, wanted: Attachment) -> None:
        """Two pods in one namespace would be two identities for the same packets."""
        for pod in self._pods.values():
            same = pod.attachment.netns_inode == wanted.netns_inode and not pod.waiting
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
        if not known and pod.attachment.enrolled:
            return  # by CNI, before it starts: the mesh learns its addresses when it has them
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
