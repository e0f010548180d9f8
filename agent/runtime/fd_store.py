"""Pods' listeners and namespaces, kept by the service manager for our successor.

    listener/NS/NAME/ROLE/FAMILY    six of them a pod
    netns/NS/NAME

A listener that somebody holds open keeps its slot in the kernel's map of
listeners, and connections that no one accepts yet wait in its queue. So a
restart refuses none: the old agent stops accepting and says, by a heartbeat
dated ahead, that a successor is on its way; the new one finds the listeners
among its inherited descriptors and accepts what has gathered. A stop ends
otherwise: the manager closes its copies, the slots vanish, and the pods' fail
mode applies. So it does after SIGKILL, when the last beat has grown old,
although the listeners are still there.

The namespace's descriptor keeps its inode number from being given to another
namespace while no agent watches.

Without a service manager nothing is kept and all of this does nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import Listeners, Role
from meshbpf.agent.runtime.logs import Log
from meshbpf.agent.runtime.notify import NAME_BYTES, Notifier, NotifyError
from meshbpf.bpf import CONNECTION_ROLES

GRACE_S = 10.0
"""How far ahead the last beat of an orderly end is dated: connections wait so
long at most for a successor that does not come."""

_SO_NETNS_COOKIE = 71  # asm-generic/socket.h
_FAMILIES = {int(socket.AF_INET): "ipv4", int(socket.AF_INET6): "ipv6"}

log = Log("fd-store")


class FdStore:
    """The descriptors of this agent's pods at the service manager.

    Its methods send a few datagrams each, and may block for NotifyError's
    limit when the manager hangs: call them in a thread.
    """

    def __init__(self, notifier: Notifier, stored: Mapping[str, list[int]]) -> None:
        self._notifier = notifier
        self._stored = {name: list(fds) for name, fds in stored.items()}
        self._kept: set[str] = set()

    @property
    def inherited(self) -> int:
        """How many descriptors of a predecessor are still unclaimed."""
        return sum(map(len, self._stored.values()))

    def keeps(self, pod: str) -> bool:
        """Whether a successor would find this pod's listeners."""
        return pod in self._kept

    def take(self, pod: str, netns: Netns) -> dict[tuple[Role, int], socket.socket]:
        """The listeners that a predecessor left for this pod; the caller owns them.

        Only those that still listen in that very namespace: the rest is closed.
        """
        same = True
        for fd in self._stored.pop(_netns_name(pod), []):
            status = os.fstat(fd)
            same = same and (status.st_dev, status.st_ino) == (netns.dev, netns.inode)
            os.close(fd)
        found: dict[tuple[Role, int], socket.socket] = {}
        for role in Role:  # those of DNS come from a reload alone
            for family in _FAMILIES:
                for fd in self._stored.pop(_listener_name(pod, role, family), []):
                    sock = _listener(fd, role, family, netns)
                    if sock is not None and same and (role, family) not in found:
                        found[role, family] = sock
                    elif sock is not None:
                        sock.close()
        return found

    def keep(self, pod: str, netns: Netns, listeners: Listeners) -> None:
        """Have these kept, and nothing else under the pod's name.

        A manager that does not take them is logged: then a restart refuses
        connections, as one without a manager does.
        """
        if not self._notifier.listens:
            return
        try:
            self._forget(pod)
            kept = {key: sock for key, sock in listeners.items() if key[0] in CONNECTION_ROLES}
            # Nobody waits for a successor with a DNS query.
            for name, fd in self.named(pod, netns, kept):
                self._notifier.store(name, [fd])
        except NotifyError as error:
            log.error("listeners are not kept for a successor", cause=error, pod=pod)
        else:
            self._kept.add(pod)

    @staticmethod
    def named(pod: str, netns: Netns, listeners: Listeners) -> Iterator[tuple[str, int]]:
        """A pod's descriptors under the names by which `take` finds them."""
        yield _netns_name(pod), netns.fd
        for (role, family), sock in listeners.items():
            yield _listener_name(pod, role, family), sock.fileno()

    def drop(self, pod: str) -> None:
        """Have the pod's descriptors closed: the kernel must find no listener of it."""
        for name in _names(pod, tuple(Role)):
            for fd in self._stored.pop(name, []):
                os.close(fd)
        if not self._notifier.listens:
            return
        try:
            self._forget(pod)
        except NotifyError as error:
            log.error("kept descriptors of a pod cannot be dropped", cause=error, pod=pod)

    def drop_unclaimed(self) -> None:
        """Close what a predecessor left and nobody took: its pods are not ours."""
        for name, fds in self._stored.items():
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(NotifyError):  # a name that is not ours to know
                self._notifier.forget(name)
        self._stored.clear()

    def _forget(self, pod: str) -> None:
        self._kept.discard(pod)
        for name in _names(pod):
            self._notifier.forget(name)


def _listener(fd: int, role: Role, family: int, netns: Netns) -> socket.socket | None:
    """The descriptor as a socket, closed and None if it is not a listener of that namespace."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:  # not a socket
        os.close(fd)
        return None
    cookie = struct.unpack("Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    wanted = (family, netns.cookie, int(role is not Role.DNS_UDP))
    if (int(sock.family), cookie, listens) != wanted:
        sock.close()
        return None
    return sock


def _names(pod: str, roles: Sequence[Role] = CONNECTION_ROLES) -> list[str]:
    listeners = [_listener_name(pod, role, family) for role in roles for family in _FAMILIES]
    return [_netns_name(pod), *listeners]


def _netns_name(pod: str) -> str:
    return _fitting("netns", pod, "")


def _listener_name(pod: str, role: Role, family: int) -> str:
    return _fitting("listener", pod, f"/{role.name.lower()}/{_FAMILIES[family]}")


def _fitting(kind: str, pod: str, end: str) -> str:
    """A name that the manager takes: the longest of pods' names do not fit."""
    name = f"{kind}/{pod}{end}"
    if len(name) <= NAME_BYTES:
        return name
    return f"{kind}/~{hashlib.sha256(pod.encode()).hexdigest()}{end}"
