"""The few WASI functions (preview 1) that language runtimes call in a plugin; not WASI.

There is no file, no socket and no argument; output goes to the log, line by
line. Everything else answers ENOSYS.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

from meshbpf.agent.l7.wasm.fastcall import GuestMemoryError, HostFunction
from meshbpf.agent.l7.wasm.host import Guest

_SUCCESS = 0
_EBADF = 8
_EFAULT = 21
_EINVAL = 28
ENOSYS = 52
_MAX_IOVECS = 64
_MAX_OUTPUT_BYTES = 64 * 1024
_MAX_RANDOM_BYTES = 1024 * 1024


class GuestExitError(Exception):
    """The guest called `proc_exit`: it is over, whatever the code."""


class Wasi:
    """The functions, by the names that guests import them under; `guest` is set before any runs."""

    guest: Guest

    def __init__(
        self,
        *,
        environment: Mapping[str, str],
        now_ns: Callable[[], int],
        random_bytes: Callable[[int], bytes],
        log: Callable[[str, str], None],
    ) -> None:
        self._environment = [f"{name}={value}\0".encode() for name, value in environment.items()]
        self._now_ns = now_ns
        self._random_bytes = random_bytes
        self._log = log

    def functions(self) -> dict[str, HostFunction]:
        """By import name."""
        return {
            "fd_write": _guarded(self._fd_write),
            "environ_sizes_get": _guarded(self._environ_sizes_get),
            "environ_get": _guarded(self._environ_get),
            "args_sizes_get": _guarded(self._args_sizes_get),
            "args_get": lambda *_: _SUCCESS,
            "clock_time_get": _guarded(self._clock_time_get),
            "random_get": _guarded(self._random_get),
            "proc_exit": self._proc_exit,
        }

    def _fd_write(self, descriptor: int, vectors: int, count: int, written_at: int) -> int:
        if descriptor not in (1, 2):
            return _EBADF
        if count > _MAX_IOVECS:
            return _EINVAL
        total, parts = 0, []
        for index in range(count):
            address, size = struct.unpack("<II", self.guest.read(vectors + 8 * index, 8))
            parts.append(self.guest.read(address, min(size, _MAX_OUTPUT_BYTES)))
            total += size
        text = b"".join(parts)[:_MAX_OUTPUT_BYTES].decode("utf-8", "replace")
        for line in text.splitlines():
            self._log("info" if descriptor == 1 else "warning", line)
        self.guest.write(written_at, struct.pack("<I", total))
        return _SUCCESS

    def _environ_sizes_get(self, count_at: int, size_at: int) -> int:
        self.guest.write(count_at, struct.pack("<I", len(self._environment)))
        self.guest.write(size_at, struct.pack("<I", sum(map(len, self._environment))))
        return _SUCCESS

    def _environ_get(self, pointers: int, text: int) -> int:
        for entry in self._environment:
            self.guest.write(pointers, struct.pack("<I", text))
            self.guest.write(text, entry)
            pointers, text = pointers + 4, text + len(entry)
        return _SUCCESS

    def _args_sizes_get(self, count_at: int, size_at: int) -> int:
        self.guest.write(count_at, bytes(4))
        self.guest.write(size_at, bytes(4))
        return _SUCCESS

    def _clock_time_get(self, _clock: int, _precision: int, at: int) -> int:
        self.guest.write(at, struct.pack("<Q", self._now_ns()))
        return _SUCCESS

    def _random_get(self, at: int, size: int) -> int:
        if size > _MAX_RANDOM_BYTES:
            return _EINVAL
        self.guest.write(at, self._random_bytes(size))
        return _SUCCESS

    def _proc_exit(self, code: int) -> int:
        raise GuestExitError(f"the plugin ended itself with status {code}")


def _guarded(function: Callable[..., int]) -> HostFunction:
    def called(*values: int) -> int:
        try:
            return function(*values)
        except GuestMemoryError:
            return _EFAULT

    return called
