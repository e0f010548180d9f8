"""One pod of this node, from its first listener to its last descriptor.

What belongs to a pod: its namespace's descriptor, six listeners, its place in
the kernel's maps, and the forwarder's task. `pods.py` decides when it comes
and goes; here is how. Methods named `..._blocking` enter the namespace or
talk to the kernel, and run in a thread under the manager's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.identity import SpiffeId
from meshbpf.agent.core.tuning import Tuning
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import AttachedPod, Role, Steering
from meshbpf.agent.runtime.attachments import Attachment
from meshbpf.agent.runtime.fd_store import FdStore
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.pod_sockets import (
    Listeners,
    PodSockets,
    close_all,
    open_listeners,
    pod_steering,
)
from meshbpf.bpf import DNS_ROLES

SERVE_RETRY_S = 1.0
STOP_S = 3.0
"""A cancelled forwarder says goodbye to its tunnels for 2 s at most."""

log = Log("pods")


class PodServer(Protocol):
    """The part of Forwarder that is used here."""

    async def serve(self, pod: LocalPod, listeners: Listeners) -> None:
        """Carry the pod's connections until cancelled."""

    def drain(self, pods: Iterable[str] | None = None) -> None:
        """Have the tunnels of these pods say GOAWAY and end with their last streams."""


@dataclass(slots=True, eq=False)
class Pod:
    """A pod that is attached, or ought to be."""

    attachment: Attachment
    identity: SpiffeId
    tuning: Tuning
    reason: str = ""
    """Why it does not work; empty while it does."""
    waiting: bool = False
    """Attached by name, and no pod of that name runs here now."""
    retry_at: float = 0.0
    """trio's time before which a failed pod is left alone."""
    kernel: AttachedPod | None = None
    local: LocalPod | None = None
    """The pod as the forwarder sees it."""
    captured_elsewhere: bool = False
    """Istio's node agent captures for it, and the kernel knows nothing of ours."""
    proxied: bool = False
    """A stock proxy serves its connections; DNS alone is ours."""
    retired: bool = False
    """A successor has its listeners: none may be opened or registered any more."""
    _netns: Netns | None = None
    _listeners: Listeners = field(default_factory=dict)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _ended: trio.Event = field(default_factory=trio.Event)

    @property
    def key(self) -> str:
        """NS/NAME."""
        return self.attachment.pod

    @property
    def attached(self) -> bool:
        """The kernel captures for it, and it is or will be served."""
        return self.kernel is not None

    @property
    def state(self) -> Literal["attached", "failed", "waiting"]:
        """In one word, for people."""
        if self.waiting:
            return "waiting"
        steered = self.kernel is not None or self.captured_elsewhere
        return "failed" if self.reason or not steered else "attached"

    @property
    def netns(self) -> Netns | None:
        """Its namespace, as long as it is attached; the pod closes it."""
        return self._netns

    @property
    def _roles(self) -> tuple[Role, ...]:
        """Whose listeners are ours."""
        return DNS_ROLES if self.proxied else tuple(Role)

    def attach_blocking(self, steering: Steering, store: FdStore) -> None:
        """Open the listeners, or take an earlier agent's, then let the kernel capture.

        Raises MeshbpfError; then nothing of it is open, and the kernel is as
        it was.
        """
        netns = Netns.open(self.attachment.netns)
        listeners: Listeners = {}
        try:
            inherited = listeners = store.take(self.key, netns)
            for sock in inherited.values():
                steering.protect(sock)
            sockets = PodSockets(netns, steering.protect)
            listeners = open_listeners(sockets, inherited, self._roles)
            kernel = steering.attach(pod_steering(self.attachment, netns, self.proxied), listeners)
        except BaseException:
            close_all(listeners)
            netns.close()
            raise
        self.kernel, self._netns, self._listeners = kernel, netns, listeners
        store.keep(self.key, netns, listeners)
        addresses = frozenset(kernel.addresses)
        self.local = LocalPod(
            namespace=self.attachment.name.namespace,
            name=self.attachment.name.name,
            service_account=self.attachment.service_account,
            addresses=addresses,
            sockets=PodSockets(
                netns,
                steering.protect,
                addresses,
                steering.own_sockets_map,
                self.tuning.keepalive,
            ),
            index=kernel.index,
            cookie=kernel.cookie,
            carried=kernel.same_node,
            tuning=self.tuning,
        )

    def update_blocking(self, steering: Steering, wanted: Attachment) -> None:
        """Give the kernel new options for a pod whose account and namespace stay."""
        assert self._netns is not None  # noqa: S101 (it is attached)
        assert self.local is not None  # noqa: S101 (so it is)
        steered = pod_steering(wanted, self._netns, self.proxied)
        self.kernel = steering.attach(steered, self._listeners)
        self.local.carried = self.kernel.same_node
        self.attachment = wanted

    async def serve(
        self, server: PodServer, steering: Steering, lock: trio.Lock, store: FdStore
    ) -> None:
        """Run the forwarder until `end`; should it fail, again with fresh listeners."""
        assert self.local is not None  # noqa: S101 (it is attached)
        try:
            with self._scope:
                while True:
                    try:
                        await server.serve(self.local, self._listeners)
                        self.reason = "the forwarder ended by itself"
                    except Exception as error:  # noqa: BLE001
                        # The boundary of one pod: whatever is wrong with it
                        # must not reach the others.
                        self.reason = f"{type(error).__name__}: {error}"
                        log.error("forwarder of a pod failed", cause=error, pod=self.key)
                    await self._reopen(steering, lock, store)
                    if self.retired:
                        return
        finally:
            self._ended.set()

    def descriptors(self) -> Iterator[tuple[str, int]]:
        """Namespace and listeners, under the names by which a successor finds them."""
        if self._netns is not None:
            yield from FdStore.named(self.key, self._netns, self._listeners)

    def retire(self) -> None:
        """A successor accepts: let go of the listeners, and carry what there is to its end."""
        self.retired = True
        close_all(self._listeners)

    def cancel(self) -> None:
        """Begin the end: the forwarder takes leave."""
        self._scope.cancel()

    async def end(self) -> None:
        """End the forwarder and let go of everything: capture stays as it is.

        Not cancellable; takes STOP_S at most. As long as one descriptor of a
        namespace is open the namespace cannot die.
        """
        if self.attached:
            self.cancel()
            with trio.move_on_after(STOP_S, shield=True) as overdue:
                await self._ended.wait()
            if overdue.cancelled_caught:
                log.error("forwarder of a pod does not end", pod=self.key)
        close_all(self._listeners)
        if self._netns is not None:
            self._netns.close()
            self._netns = None

    async def _reopen(self, steering: Steering, lock: trio.Lock, store: FdStore) -> None:
        while self.reason:
            await trio.sleep(SERVE_RETRY_S)
            async with lock:
                if self.retired:
                    return
                try:
                    await trio.to_thread.run_sync(self._reopen_blocking, steering, store)
                except (MeshbpfError, OSError) as error:
                    log.error("listeners of a pod cannot be reopened", cause=error, pod=self.key)
                else:
                    self.reason = ""

    def _reopen_blocking(self, steering: Steering, store: FdStore) -> None:
        assert self._netns is not None  # noqa: S101 (it is attached)
        fresh = open_listeners(PodSockets(self._netns, steering.protect), roles=self._roles)
        try:
            steering.set_listeners(self.key, fresh)
        except BaseException:
            close_all(fresh)
            raise
        close_all(self._listeners)
        self._listeners = fresh
        store.keep(self.key, self._netns, fresh)
