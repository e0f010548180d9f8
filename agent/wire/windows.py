"""HTTP/2 flow control, as numbers (RFC 9113, section 5.2 and 6.9).

A `SendWindow` is what the peer lets us send. It may go below zero, when the
peer lowers INITIAL_WINDOW_SIZE after we used the old one. A `ReceiveWindow`
is what we let the peer send; it is topped up only for bytes that have left
for good, and in bulk, since an update costs a TLS record and a system call.
"""

from __future__ import annotations

MAX_WINDOW_BYTES = 2**31 - 1
DEFAULT_WINDOW_BYTES = 65535
"""Both windows at the start of a connection, until SETTINGS or WINDOW_UPDATE say else."""


class WindowOverflowError(Exception):
    """A window would pass 2^31-1: FLOW_CONTROL_ERROR. For the connection code to answer."""


class SendWindow:
    """How many bytes of DATA we may send now."""

    __slots__ = ("available",)

    def __init__(self, available: int) -> None:
        self.available = available

    def use(self, size: int) -> None:
        """Account for `size` bytes being sent. The caller keeps to `available`."""
        self.available -= size

    def change(self, delta: int) -> None:
        """The peer adds (WINDOW_UPDATE) or shifts (SETTINGS) by `delta` bytes."""
        if self.available + delta > MAX_WINDOW_BYTES:
            raise WindowOverflowError
        self.available += delta


class ReceiveWindow:
    """How many bytes of DATA the peer may send now, out of `size`."""

    __slots__ = ("_batch", "_uncredited", "available")

    def __init__(self, size: int) -> None:
        self.available = size
        # A quarter: late enough to be rare, early enough that a fast peer
        # never waits for it on a path whose product fits half the window.
        self._batch = max(size // 4, 1)
        self._uncredited = 0

    def take(self, size: int) -> bool:
        """Account for `size` received bytes; False when the peer had no right to send them."""
        self.available -= size
        return self.available >= 0

    def credit(self, size: int) -> int:
        """`size` bytes are done with; the WINDOW_UPDATE to send now, or 0 to wait for more."""
        self._uncredited += size
        if self._uncredited < self._batch:
            return 0
        increment, self._uncredited = self._uncredited, 0
        self.available += increment
        return increment
