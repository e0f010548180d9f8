"""What the agent and its service manager say to each other.

Source: sd_notify(3), sd_listen_fds(3), systemd.service(5). A datagram of
`KEY=value` lines to the socket that NOTIFY_SOCKET names; descriptors travel
beside it by SCM_RIGHTS and come back, by name, to the next process of the
unit. Without a service manager every message goes nowhere, and nothing else
changes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass

from meshbpf.agent.core.errors import MeshbpfError

FIRST_FD = 3  # SD_LISTEN_FDS_START
SEND_LIMIT_S = 2.0
# systemd takes at most this many descriptors in one message (the kernel's
# SCM_MAX_FD is 253).
FDS_PER_MESSAGE = 253
# systemd's own limit for a name (fdname_is_valid).
NAME_BYTES = 255


class NotifyError(MeshbpfError):
    """The service manager's socket does not take our messages."""


@dataclass(slots=True)
class Notifier:
    """The way to the service manager; `Notifier.of(os.environ)` finds it."""

    address: str | None
    watchdog_s: float | None
    """How often the manager wants to hear from us; None when it does not."""
    _held: list[tuple[str, list[int]]] | None = None
    """What is to be said once the manager listens to us."""

    @classmethod
    def of(cls, environ: Mapping[str, str], pid: int) -> Notifier:
        """Read NOTIFY_SOCKET and the watchdog's settings. `pid` is our own.

        Raises NotifyError when they cannot be what systemd sets.
        """
        address = environ.get("NOTIFY_SOCKET")
        if not address:
            return cls(None, None)
        if address[0] not in "/@":
            raise NotifyError(
                "notify-socket",
                f"NOTIFY_SOCKET={address!r} is neither a path nor an abstract socket",
                "start the agent from its unit, or unset NOTIFY_SOCKET",
            )
        if address[0] == "@":
            address = "\0" + address[1:]
        watchdog = environ.get("WATCHDOG_USEC", "")
        meant = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
        seconds = int(watchdog) / 1e6 if watchdog.isdigit() and meant else 0.0
        return cls(address, seconds or None)

    @property
    def listens(self) -> bool:
        """Whether there is a service manager at all."""
        return self.address is not None

    def ready(self, status: str) -> None:
        """The service is up: `systemctl start` returns."""
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def starting(self, status: str, within_s: float) -> None:
        """Not up yet, and not stuck: `systemctl start` is to wait `within_s` from now on."""
        self._send(f"STATUS={_line(status)}\nEXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={_line(text)}")

    def alive(self) -> None:
        """Feed the watchdog."""
        self._send("WATCHDOG=1")

    def stopping(self, status: str, within_s: float = 0.0) -> None:
        """An orderly end has begun; it may take `within_s`, whatever the unit says."""
        extended = f"\nEXTEND_TIMEOUT_USEC={int(within_s * 1e6)}" if within_s else ""
        self._send(f"STOPPING=1\nSTATUS={_line(status)}{extended}")

    def main_pid(self, pid: int) -> None:
        """The service is another process from now on; the manager hears no more of ours."""
        self._send(f"MAINPID={pid}")

    def hold(self) -> None:
        """We are not the service's main process yet: keep what is to be said for `release`."""
        if self._held is None:
            self._held = []

    def release(self) -> None:
        """Say what was held. Blocks as every message may; raises NotifyError."""
        held, self._held = self._held or [], None
        try:
            for message, fds in held:
                self._send(message, fds)
        finally:
            for _, fds in held:
                for fd in fds:
                    os.close(fd)

    def store(self, name: str, descriptors: Iterable[int]) -> None:
        """Have the manager keep these for our successor, under `name`.

        It closes its copies when the unit stops; a restart keeps them. It
        drops by itself what the kernel reports as hung up.
        """
        check_name(name)
        fds = list(descriptors)
        for start in range(0, len(fds), FDS_PER_MESSAGE):
            part = fds[start : start + FDS_PER_MESSAGE]
            self._send(f"FDSTORE=1\nFDNAME={name}", part)

    def forget(self, name: str) -> None:
        """Have the manager close what it keeps under `name`."""
        check_name(name)
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def _send(self, message: str, descriptors: list[int] | None = None) -> None:
        if self.address is None:
            return
        if self._held is not None:
            # Copies: the caller may close what it has named.
            self._held.append((message, [os.dup(fd) for fd in descriptors or []]))
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            # A manager that is busy (reloading its units) fills its queue up.
            sock.settimeout(SEND_LIMIT_S)
            try:
                sock.connect(self.address)
                socket.send_fds(sock, [message.encode()], descriptors or [])
            except OSError as error:
                raise NotifyError(
                    "notify-failed",
                    f"the service manager does not take our message: {error}",
                    "check NotifyAccess= of the unit",
                ) from error


def check_name(name: str) -> None:
    """Refuse what systemd would silently replace by "stored"."""
    if not name or len(name) > NAME_BYTES or not name.isascii() or not name.isprintable():
        raise NotifyError("fd-name", f"{name!r} cannot name a stored descriptor")
    if ":" in name:  # separates the names in LISTEN_FDNAMES
        raise NotifyError("fd-name", f"{name!r} cannot name a stored descriptor: it has a colon")


def take_stored(environ: MutableMapping[str, str], pid: int) -> dict[str, list[int]]:
    """The descriptors that a predecessor left with the manager, by name.

    Makes them close-on-exec and takes the variables out of `environ`, so that
    no child believes they are its own.
    """
    meant = environ.pop("LISTEN_PID", "") == str(pid)
    count = environ.pop("LISTEN_FDS", "0")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    stored: dict[str, list[int]] = {}
    if not meant or not count.isdigit():
        return stored
    for offset in range(int(count)):
        fd = FIRST_FD + offset
        os.set_inheritable(fd, False)
        name = names[offset] if offset < len(names) else "unknown"
        stored.setdefault(name, []).append(fd)
    return stored


def _line(text: str) -> str:
    """STATUS= is one line; a line break in it would begin another key."""
    return " ".join(text.split())
