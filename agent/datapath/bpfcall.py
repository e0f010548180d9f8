"""The bpf(2) system call itself, and the error it raises.

What the kernel guarantees, and what this file does with it:

* An attribute block may be shorter or longer than the kernel's own: missing
  bytes read as zero, and surplus bytes must be zero. So each caller passes
  just the fields that it uses, and the same code runs on 6.1 and later.
* Every descriptor that bpf(2) returns is close-on-exec.
* Loading a program returns EAGAIN when a signal is pending while the
  verifier runs; any command may return EINTR. Both mean "again".
* ctypes drops the interpreter lock for the call and keeps errno per thread:
  concurrent calls from several threads do not disturb each other.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from typing import Final

from meshbpf.agent.core.errors import Exit, MeshbpfError
from meshbpf.agent.datapath.abi import Cmd

# asm/unistd.h of each architecture.
_SYSCALL_NUMBERS: Final = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "s390x": 351,
    "ppc64le": 361,
}

# libbpf gives up after five; ours is larger since an agent with a busy
# SIGCHLD or timer is no reason to fail, and each round costs microseconds.
_RETRIES: Final = 32

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


class BpfError(MeshbpfError):
    """A bpf(2) command that the kernel refused; `errno` says how."""

    def __init__(self, code: str, what: str, hint: str = "", *, number: int = 0) -> None:
        super().__init__(code, what, hint)
        self.errno = number
        if number == errno.EPERM:
            self.exit_status = Exit.NOPERM


def bpf(cmd: Cmd, attr: bytearray, subject: str = "") -> int:
    """Run one command; `attr` is written back by commands that answer in it.

    `subject` names in an error what the command was about. Raises BpfError.
    """
    number = _SYSCALL_NUMBERS.get(platform.machine())
    if number is None:
        raise BpfError(
            "bpf-architecture",
            f"bpf(2): no system call number known for {platform.machine()}",
            "meshbpf runs on " + ", ".join(sorted(_SYSCALL_NUMBERS)),
            number=errno.ENOSYS,
        )
    buffer = (ctypes.c_char * len(attr)).from_buffer(attr)
    for _ in range(_RETRIES):
        result: int = _syscall(
            ctypes.c_long(number), ctypes.c_int(cmd), buffer, ctypes.c_uint(len(attr))
        )
        if result >= 0:
            return result
        failure = ctypes.get_errno()
        again = failure == errno.EINTR or (failure == errno.EAGAIN and cmd is Cmd.PROG_LOAD)
        if not again:
            break
    raise _refusal(cmd, failure, subject)


def address_of(buffer: ctypes.Array[ctypes.c_char]) -> int:
    """Pointer to put into an attribute; the caller keeps `buffer` alive over the call."""
    return ctypes.addressof(buffer)


def _refusal(cmd: Cmd, failure: int, subject: str) -> BpfError:
    name = cmd.name.lower().replace("_", "-")
    about = f" of {subject}" if subject else ""
    hint = ""
    if failure == errno.EPERM:
        hint = "bpf(2) needs root (CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN)"
    elif failure == errno.ENOSYS:
        hint = "this kernel was built without CONFIG_BPF_SYSCALL"
    return BpfError(
        f"bpf-{name}",
        f"bpf {name}{about}: {os.strerror(failure)} ({errno.errorcode.get(failure, failure)})",
        hint,
        number=failure,
    )
