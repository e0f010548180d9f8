"""Moves TLS records between OpenSSL and our buffers: the innermost loop of the relay.

Two ways with one meaning. `PublicRecords` is pyOpenSSL's documented interface;
it allocates, copies and frees a buffer for each call and raises an exception
for "no more", which at 256 KiB a chunk costs a quarter of the relay's time in
page faults. `DirectRecords` calls the same four OpenSSL functions through the
binding that pyOpenSSL itself uses, with buffers that live as long as the
process. The binding is no public interface, so `records_for` looks whether
everything is where it was and falls back; both are tested alike.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

from OpenSSL import SSL

try:
    from OpenSSL._util import ffi as _ffi_found
    from OpenSSL._util import lib as _lib_found
except ImportError:  # pyOpenSSL has moved its binding: the public way is left
    _ffi_found = _lib_found = None

_ffi: Any = _ffi_found
_lib: Any = _lib_found

RECORD_BYTES = 16384
"""The most plaintext that one TLS record holds."""

_WANT_READ = 2  # SSL_ERROR_WANT_READ, openssl/ssl.h
_ZERO_RETURN = 6  # SSL_ERROR_ZERO_RETURN

_FUNCTIONS = ("SSL_read", "SSL_write", "SSL_get_error", "BIO_read", "BIO_write")
_ATTRIBUTES = ("_ssl", "_into_ssl", "_from_ssl", "_raise_ssl_error")


class Records(Protocol):
    """What TlsChannel asks of OpenSSL. Errors are those of OpenSSL.SSL."""

    def feed(self, ciphertext: memoryview) -> None:
        """Take in received ciphertext."""
        ...

    def read_into(self, buffer: memoryview) -> int:
        """Decrypt whole records until no more is there or `buffer` is full; bytes filled."""
        ...

    def write(self, plaintext: bytes | bytearray | memoryview) -> int:
        """Encrypt; how many bytes were taken (all of them, without partial writes)."""
        ...

    def take_into(self, buffer: memoryview) -> int:
        """Move ciphertext that is to be sent into `buffer`; 0 when there is none."""
        ...


@functools.cache
def function_addresses() -> tuple[int, ...] | None:
    """Where _FUNCTIONS are in memory, in their order, for the relay in C; None when unknown.

    They are those of the library that pyOpenSSL uses: its binding tells.
    """
    try:
        from cryptography.hazmat.bindings._rust import _openssl
    except ImportError:
        return None
    binding: Any = _openssl
    try:
        pointers = [binding.ffi.addressof(binding.lib, name) for name in _FUNCTIONS]
        return tuple(int(binding.ffi.cast("uintptr_t", pointer)) for pointer in pointers)
    except (AttributeError, TypeError):
        return None


def records_for(connection: SSL.Connection) -> Records:
    """The fastest way that this pyOpenSSL offers."""
    if (
        _lib is not None
        and all(hasattr(_lib, name) for name in _FUNCTIONS)
        and all(getattr(connection, name, None) is not None for name in _ATTRIBUTES)
    ):
        return DirectRecords(connection)
    return PublicRecords(connection)


class PublicRecords:
    """By pyOpenSSL's documented calls."""

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection = connection

    def feed(self, ciphertext: memoryview) -> None:
        """See Records."""
        self._connection.bio_write(ciphertext)

    def read_into(self, buffer: memoryview) -> int:
        """See Records."""
        filled = 0
        while filled < len(buffer):
            try:
                filled += self._connection.recv_into(buffer[filled : filled + RECORD_BYTES])
            except SSL.WantReadError:
                break
            except SSL.ZeroReturnError:
                if filled:
                    break  # close_notify: the next call meets it again
                raise
        return filled

    def write(self, plaintext: bytes | bytearray | memoryview) -> int:
        """See Records."""
        return self._connection.send(plaintext)

    def take_into(self, buffer: memoryview) -> int:
        """See Records."""
        try:
            ciphertext = self._connection.bio_read(len(buffer))
        except SSL.WantReadError:
            return 0
        buffer[: len(ciphertext)] = ciphertext
        return len(ciphertext)


class DirectRecords:
    """By OpenSSL's functions themselves. `connection` is kept: it owns the pointers."""

    def __init__(self, connection: SSL.Connection) -> None:
        self._connection = connection
        private: Any = connection
        self._ssl = private._ssl
        self._into_ssl = private._into_ssl
        self._from_ssl = private._from_ssl
        self._raise_ssl_error = private._raise_ssl_error

    def addresses(self) -> tuple[int, int, int]:
        """Where the connection and its two BIOs, in and out, are in memory."""
        pointers = (self._ssl, self._into_ssl, self._from_ssl)
        ssl, into, out = (int(_ffi.cast("uintptr_t", pointer)) for pointer in pointers)
        return ssl, into, out

    def fail(self, result: int) -> None:
        """Raise what an SSL function meant that returned `result` to somebody else."""
        self._raise_ssl_error(self._ssl, result)

    def feed(self, ciphertext: memoryview) -> None:
        """See Records."""
        size = len(ciphertext)
        if _lib.BIO_write(self._into_ssl, _ffi.from_buffer(ciphertext), size) != size:
            raise MemoryError("OpenSSL's input buffer cannot grow")

    def read_into(self, buffer: memoryview) -> int:
        """See Records."""
        ssl, read = self._ssl, _lib.SSL_read
        start = _ffi.from_buffer(buffer)
        filled, size = 0, len(buffer)
        while filled < size:
            result = read(ssl, start + filled, size - filled)
            if result > 0:
                filled += result
                continue
            error = _lib.SSL_get_error(ssl, result)
            if error == _WANT_READ:
                break
            if error == _ZERO_RETURN and filled:
                break
            self._raise_ssl_error(ssl, result)
        return filled

    def write(self, plaintext: bytes | bytearray | memoryview) -> int:
        """See Records."""
        size = len(plaintext)
        written: int = _lib.SSL_write(self._ssl, _ffi.from_buffer(plaintext), size)
        if written <= 0:
            self._raise_ssl_error(self._ssl, written)
        return written

    def take_into(self, buffer: memoryview) -> int:
        """See Records."""
        taken: int = _lib.BIO_read(self._from_ssl, _ffi.from_buffer(buffer), len(buffer))
        return max(taken, 0)
