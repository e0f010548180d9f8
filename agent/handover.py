"""What an agent and its successor say to each other while one takes the other's place.

The agent that is told to reload starts its successor with one end of a
SOCK_SEQPACKET pair among its descriptors; MESHBPF_HANDOVER_FD says which. One
packet is one message, descriptors travel beside it (SCM_RIGHTS):

    successor                      agent
    Hello                    →                  it has read its configuration
                             ←  Descriptors     several, with listeners, namespaces, lock
                             ←  Offer           that was all
    Ready                    →                  programs, pods, certificates: all is there
                             ←  Go              the agent accepts nothing any more
    Serving                  →                  the successor does
                             ←  Retired         the agent drains; MAINPID has moved
    End                      →                  perhaps, much later: be done now

`Failed` may take the place of everything that the successor says up to
Serving. The end of the pair, from either side, says that the other has gone.
Nobody but a child of the agent can have the other end, so nobody is asked who
they are.

No trio here: the command line reports through it what keeps `run` from
starting, before there is an event loop.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Self

import msgspec

from meshbpf.agent.api import ErrorBody
from meshbpf.agent.core.errors import MeshbpfError

ENVIRONMENT = "MESHBPF_HANDOVER_FD"
OFFER_LIMIT_S = 30.0
"""How long either side waits for what the other has at hand."""
PACKET_BYTES = 64 * 1024
FDS_PER_PACKET = 128  # the kernel takes 253 (SCM_MAX_FD)


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The successor lives."""

    pid: int
    version: str


class Descriptors(msgspec.Struct, frozen=True, tag="descriptors"):
    """The names of the descriptors that came with the packet, in their order."""

    names: tuple[str, ...]


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """All descriptors have been sent."""

    pid: int
    version: str
    state_dir: str
    agent_id: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The successor gives up."""

    error: ErrorBody


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The successor could serve."""


class Go(msgspec.Struct, frozen=True, tag="go"):
    """It shall."""


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """It does."""


class Retired(msgspec.Struct, frozen=True, tag="retired"):
    """The agent will never accept again. It can be asked at `predecessor-PID.sock`."""


class End(msgspec.Struct, frozen=True, tag="end"):
    """Drain no longer."""


Message = Hello | Descriptors | Offer | Failed | Ready | Go | Serving | Retired | End


class HandoverError(MeshbpfError):
    """The other side left, or says what it should not."""


@dataclass(slots=True, eq=False)
class Channel:
    """One end of the pair. Nothing here waits, but `receive_within`."""

    sock: socket.socket

    @classmethod
    def pair(cls) -> tuple[Self, Self]:
        """Both ends."""
        first, second = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls.of(first), cls.of(second)

    @classmethod
    def of(cls, sock: socket.socket) -> Self:
        """An end that was inherited."""
        sock.setblocking(False)
        return cls(sock)

    @classmethod
    def inherited(cls, environ: MutableMapping[str, str]) -> Self | None:
        """The successor's end; None when this process succeeds nobody.

        Taken out of `environ`, so that no child takes it for its own.
        """
        text = environ.pop(ENVIRONMENT, "")
        if not text.isdigit():
            return None
        try:
            sock = socket.socket(fileno=int(text))
        except OSError as error:
            raise HandoverError(
                "no-handover", f"{ENVIRONMENT}={text} is no socket: {error.strerror}"
            ) from error
        sock.set_inheritable(False)
        return cls.of(sock)

    def fileno(self) -> int:
        """For those who wait."""
        return self.sock.fileno()

    def close(self) -> None:
        """Leave; the other side sees it."""
        self.sock.close()

    def send(self, message: Message, descriptors: Iterable[int] = ()) -> None:
        """Say something. BlockingIOError when the other does not listen fast enough.

        Raises HandoverError when it has gone.
        """
        try:
            socket.send_fds(self.sock, [msgspec.json.encode(message)], list(descriptors))
        except BlockingIOError:
            raise
        except OSError as error:
            raise _gone() from error

    def receive(self) -> tuple[Message, list[int]]:
        """The next message and its descriptors, close-on-exec. BlockingIOError while there is none.

        Raises HandoverError at the end of the pair.
        """
        try:
            data, fds, flags, _ = socket.recv_fds(self.sock, PACKET_BYTES, FDS_PER_PACKET)
        except BlockingIOError:
            raise
        except OSError as error:
            raise _gone() from error
        for fd in fds:
            os.set_inheritable(fd, False)
        try:
            if not data:
                raise _gone()
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise HandoverError("handover-cut", "a message of the handover arrived in part")
            return msgspec.json.decode(data, type=Message), fds
        except (msgspec.DecodeError, HandoverError) as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, HandoverError):
                raise
            raise HandoverError(
                "handover-message",
                f"the other agent says what this version does not understand: {error}",
                "restart the agent instead of reloading it",
            ) from error

    def receive_within(self, limit_s: float) -> tuple[Message, list[int]]:
        """As `receive`, for those without an event loop. HandoverError when it lasts too long."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        if not poll.poll(limit_s * 1000):
            raise HandoverError("handover-silent", f"the other agent said nothing for {limit_s} s")
        return self.receive()

    def fail(self, error: MeshbpfError) -> None:
        """Tell why the successor gives up, as far as anybody listens."""
        body = ErrorBody(
            code=error.code, what=error.what, hint=error.hint, exit_status=int(error.exit_status)
        )
        try:
            self.send(Failed(body))
        except (BlockingIOError, HandoverError):
            return  # it sees our end, and our log has the reason
        finally:
            self.close()


@dataclass(slots=True)
class Inheritance:
    """What a predecessor handed over, by name; whoever takes a descriptor owns it."""

    pid: int
    version: str
    agent_id: str
    state_dir: str
    stored: dict[str, list[int]]

    @classmethod
    def receive(cls, channel: Channel, pid: int, version: str) -> Self:
        """Greet the predecessor and take all that it offers. Blocks; raises HandoverError."""
        channel.send(Hello(pid, version))
        stored: dict[str, list[int]] = {}
        while True:
            message, fds = channel.receive_within(OFFER_LIMIT_S)
            match message:
                case Descriptors(names) if len(names) == len(fds):
                    for name, fd in zip(names, fds, strict=True):
                        stored.setdefault(name, []).append(fd)
                case Offer():
                    return cls(
                        pid=message.pid,
                        version=message.version,
                        agent_id=message.agent_id,
                        state_dir=message.state_dir,
                        stored=stored,
                    )
                case _:
                    raise unexpected(message)

    def take(self, name: str) -> list[int]:
        """The descriptors of that name, which are the caller's from now on."""
        return self.stored.pop(name, [])

    def pods(self) -> dict[str, list[int]]:
        """Listeners and namespaces of pods, by the names of `fd_store.py`."""
        return {
            prefix + rest: fds
            for prefix in ("listener/", "netns/")
            for rest, fds in self.take_prefixed(prefix).items()
        }

    def take_prefixed(self, prefix: str) -> dict[str, list[int]]:
        """Those whose name begins so, by the rest of the name."""
        names = [name for name in self.stored if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.stored.pop(name) for name in names}


def unexpected(message: Message) -> HandoverError:
    """The other side said what has no place here."""
    kind = type(message).__name__
    return HandoverError("handover-order", f"the other agent says {kind} when it is not its turn")


def _gone() -> HandoverError:
    return HandoverError(
        "handover-gone", "the other agent ended without a word", "its log says why"
    )
