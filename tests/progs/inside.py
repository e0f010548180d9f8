"""Work done by this process inside another network namespace.

A thread enters the namespace and ends there, so the caller never leaves its
own. A socket belongs for good to the namespace it was made in, whoever uses it
later: most tests need no process in the pod, only a socket.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

NETNS_DIR = Path("/run/netns")
_NETLINK_NETFILTER = 12  # linux/netlink.h
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


def nftables(netns: str) -> list[str]:
    """The names of the nftables tables there are (iptables-nft makes such ones too).

    Asked of the kernel itself, so that the answer does not hang on which tool
    is installed: NFT_MSG_GETTABLE for all families (linux/netfilter/nf_tables.h).
    """

    def ask() -> list[str]:
        names: list[str] = []
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as sock:
            dump = 0x0001 | 0x0300  # NLM_F_REQUEST | NLM_F_DUMP
            get_table = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
            sock.send(struct.pack("=IHHII4x", 20, get_table, dump, 1, 0))
            while True:
                data = sock.recv(65536)
                while data:
                    size, kind = struct.unpack_from("=IH", data)
                    if kind in (2, 3):  # NLMSG_ERROR (no nf_tables in this kernel), NLMSG_DONE
                        return names
                    # After the two headers, the first attribute is the name.
                    length = struct.unpack_from("=H", data, 20)[0]
                    names.append(data[24 : 20 + length].rstrip(b"\0").decode())
                    data = data[(size + 3) & ~3 :]

    return inside(netns, ask)


def xtables(netns: str) -> list[str]:
    """The tables of the older iptables that hold rules or chains there."""

    def read() -> list[str]:
        files = (Path("/proc/net/ip_tables_names"), Path("/proc/net/ip6_tables_names"))
        return [name for file in files if file.exists() for name in file.read_text().split()]

    return inside(netns, read)
