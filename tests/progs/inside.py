"""Work done by this process inside another network namespace.

A thread enters the namespace and ends there, so the caller never leaves its
own. A socket belongs for good to the namespace it was made in, whoever uses it
later: most tests need no process in the pod, only a socket.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

NETNS_DIR = Path("/run/netns")
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)

T = TypeVar("T")


def inside(netns: str, call: Callable[[], T]) -> T:
    """What `call` returns, or raises, when run in the namespace of that name."""
    answer: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            fd = os.open(NETNS_DIR / netns, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(fd, _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {netns}")
            finally:
                os.close(fd)
            answer.append(call())
        except BaseException as error:  # handed to the caller, whatever it is
            failure.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return answer[0]


def socket_inside(
    netns: str, family: int, kind: int = socket.SOCK_STREAM, proto: int = 0
) -> socket.socket:
    """A socket of that namespace, for use from anywhere in this process."""
    return inside(netns, lambda: socket.socket(family, kind, proto))


def sysctl_inside(netns: str, **values: object) -> None:
    """Set values below net/: `ipv4__ip_forward=1` is net.ipv4.ip_forward."""

    def write() -> None:
        for name, value in values.items():
            Path("/proc/sys/net", *name.split("__")).write_text(str(value))

    inside(netns, write)
