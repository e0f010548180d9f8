"""Network namespaces: opening one, working inside it, sockets made in it.

Some facts about setns(2) and threads. A network namespace belongs to a
thread, not to a process: setns() moves the calling thread alone, and a socket
stays in the namespace of the thread that made it. The agent therefore lives
in its own netns and owns sockets in every pod's: a thread goes in, makes the
socket, comes back. Files under /proc/sys/net are resolved for the calling
thread at open(), so sysctls of the pod are read and written in there too.

A thread that could not come back would go on serving in the wrong netns,
sending one pod's traffic from another's addresses. There is no repairing
that: the process aborts.

Any open descriptor of a netns, or of a socket in it, keeps the netns alive
after its name is gone. `still_there()` therefore asks whether the name still
leads to it, not whether it exists.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

from meshbpf.agent.core.errors import MeshbpfError, PrivilegeError

RUN_NETNS: Final = Path("/run/netns")

_CLONE_NEWNET: Final = 0x40000000  # sched.h
_SO_NETNS_COOKIE: Final = 71  # asm-generic/socket.h, since 5.14
_NSFS_MAGIC: Final = 0x6E736673  # linux/magic.h
_libc: Final = ctypes.CDLL(None, use_errno=True)


class NetnsError(MeshbpfError):
    """A network namespace that is not there or cannot be entered."""


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _is_namespace(fd: int) -> bool:
    # statfs.f_type is the first word of the structure on every 64-bit Linux.
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) != 0:
        return False
    magic: int = struct.unpack_from("l", buffer)[0]
    return magic == _NSFS_MAGIC


def _places() -> Iterator[Path]:
    """Every name of a namespace: those that `ip netns` gave, and those of processes."""
    if RUN_NETNS.is_dir():
        yield from RUN_NETNS.iterdir()
    yield from Path("/proc").glob("[0-9]*/ns/net")


@contextmanager
def _inside(fd: int) -> Iterator[None]:
    """The calling thread is in the namespace `fd` for the time of the block."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(fd)
        try:
            yield
        finally:
            try:
                _setns(home)
            except OSError as error:
                print(f"meshbpf: cannot leave a pod's netns: {error}", file=sys.stderr)  # noqa: T201
                os.abort()
    finally:
        os.close(home)


@dataclass(frozen=True, slots=True)
class Netns:
    """An open network namespace. `dev` and `inode` name it, `cookie` is what BPF sees.

    The owner closes it; a copy of the object shares the descriptor.
    """

    path: Path
    fd: int
    dev: int
    inode: int
    cookie: int

    @classmethod
    def open(cls, name_or_path: str | Path) -> Netns:
        """By name under /run/netns, or by path such as /proc/PID/ns/net.

        NetnsError `no-netns` when there is none, `not-a-netns` when the path
        is something else; PrivilegeError when we may not enter.
        """
        text = str(name_or_path)
        path = Path(text) if "/" in text else RUN_NETNS / text
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NetnsError(
                "no-netns",
                f"there is no network namespace at {path}",
                "`ip netns list` shows the named ones; a path like /proc/PID/ns/net works too",
            ) from None
        except PermissionError:
            raise PrivilegeError(
                "netns-permission", f"no permission to open {path}", "run as root"
            ) from None
        except OSError as error:
            raise NetnsError("no-netns", f"{path}: {error.strerror}") from None
        try:
            return cls._of(path, fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of_descriptor(cls, fd: int) -> Netns:
        """The one that `fd` stands for, which is the object's own from here on; NetnsError."""
        try:
            return cls._of(Path(f"/proc/{os.getpid()}/fd/{fd}"), fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _of(cls, path: Path, fd: int) -> Netns:
        if not _is_namespace(fd):
            raise NetnsError("not-a-netns", f"{path} is not a network namespace")
        try:
            with _inside(fd), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                raw = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except PermissionError:
            raise PrivilegeError(
                "netns-permission", f"no permission to enter {path}", "run as root"
            ) from None
        except OSError as error:  # EINVAL: a namespace of another kind
            raise NetnsError("not-a-netns", f"cannot enter {path}: {error.strerror}") from None
        status = os.fstat(fd)
        cookie: int = struct.unpack("Q", raw)[0]
        return cls(path, fd, status.st_dev, status.st_ino, cookie)

    @classmethod
    def own(cls) -> Netns:
        """The namespace of the calling thread."""
        return cls.open("/proc/thread-self/ns/net")

    @classmethod
    def find(cls, path: Path, dev: int, inode: int, cookie: int) -> Netns | None:
        """The namespace that was once seen at `path`, there or wherever else a name leads to it.

        None when nothing does: it is gone, or only sockets and descriptors of
        some process keep it. The kernel gives inode numbers out again, the
        cookie never.
        """
        for place in chain((path,), _places()):
            try:
                status = place.stat()
                if (status.st_dev, status.st_ino) != (dev, inode):
                    continue
                found = cls.open(place)
            except (OSError, MeshbpfError):
                continue  # a process that ended, or a name that was removed, meanwhile
            if found.cookie == cookie:
                return found
            found.close()
        return None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread in, and back at the end of the block. Never await in it."""
        with _inside(self.fd):
            yield

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket that lives in this namespace, whatever thread uses it."""
        with _inside(self.fd):
            return socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)

    def still_there(self) -> bool:
        """Whether `path` still leads to this namespace."""
        try:
            status = self.path.stat()
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == (self.dev, self.inode)

    def close(self) -> None:
        """Close the descriptor. The object must not be used again."""
        os.close(self.fd)
