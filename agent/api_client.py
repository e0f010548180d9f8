"""A small blocking client of the control socket, for the CLI and for tests.

    status = call(Path("/var/lib/meshbpf"), StatusRequest())

No trio here: a command that asks one question should start in the time that
Python needs. Before it says anything the client makes sure that the socket
belongs to root or to its own user: whoever could put a socket of their own in
that place would be told which pods to attach.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path
from typing import TypeVar, cast

import msgspec

from meshbpf.agent.api import CONTROL_SOCKET, ReplyEnvelope, Request
from meshbpf.agent.core.errors import Exit, MeshbpfError, PrivilegeError, UnavailableError

R = TypeVar("R")

_READ_BYTES = 256 * 1024
_MAX_REPLY_BYTES = 256 * 1024 * 1024  # 100,000 connections need about 40 MiB
_PEERCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid


class RemoteError(MeshbpfError):
    """The agent refused; carries the agent's code and exit status."""

    def __init__(self, code: str, what: str, hint: str, exit_status: int) -> None:
        super().__init__(code, what, hint)
        self.exit_status = Exit(exit_status) if exit_status in set(Exit) else Exit.FAILED


def call(state_dir: Path, request: Request[R], *, timeout_s: float = 60.0) -> R:
    """Ask the agent of `state_dir` and wait for its answer; raises as `call_at`."""
    return call_at(state_dir / CONTROL_SOCKET, request, timeout_s=timeout_s)


def call_at(path: Path, request: Request[R], *, timeout_s: float = 60.0) -> R:
    """Ask the agent that listens at this socket and wait for its answer.

    Raises UnavailableError (no agent, or no answer in time), PrivilegeError
    (the socket is another user's, or the agent does not let us in), and
    RemoteError for what the agent refuses.
    """
    line = msgspec.json.encode({"verb": request.VERB, "args": request}) + b"\n"
    with _connect(path, timeout_s) as sock:
        try:
            sock.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            # It may have said why before it hung up: read that first.
            answer = _read_line(sock, path)
        except TimeoutError as error:
            raise _silent(path) from error
        else:
            answer = _read_line(sock, path)
    try:
        reply = msgspec.json.decode(answer, type=ReplyEnvelope)
        if reply.ok:
            return cast("R", msgspec.json.decode(reply.result, type=request.RESULT))
    except msgspec.DecodeError as error:
        raise UnavailableError(
            "bad-reply",
            f"{path}: the answer is not one of meshbpf's: {error}",
            "the agent may be of another version: compare `meshbpf version`",
        ) from error
    refusal = reply.error
    if refusal is None:
        raise UnavailableError("bad-reply", f"{path}: refused without a reason")
    raise RemoteError(refusal.code, refusal.what, refusal.hint, refusal.exit_status)


def _connect(path: Path, timeout_s: float) -> socket.socket:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _not_running(path) from error
    except PermissionError as error:
        raise _not_ours(path, "it may not be read by this user") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise UnavailableError(
            "not-a-socket", f"{path} is not a socket", "give the agent's --state-dir"
        )
    if found.st_uid not in (0, os.geteuid()):
        raise _not_ours(path, f"it belongs to uid {found.st_uid}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(timeout_s)
        sock.connect(str(path))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        _pid, uid, _gid = _PEERCRED.unpack(credentials)
        if uid not in (0, os.geteuid()):
            raise _not_ours(path, f"uid {uid} listens there")
    except PermissionError as error:
        sock.close()
        raise _not_ours(path, "it may not be used by this user") from error
    except (FileNotFoundError, ConnectionRefusedError) as error:
        sock.close()
        raise _not_running(path) from error
    except (TimeoutError, BlockingIOError) as error:
        sock.close()
        raise _silent(path) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _read_line(sock: socket.socket, path: Path) -> bytes:
    parts: list[bytes] = []
    size = 0
    while size <= _MAX_REPLY_BYTES:
        try:
            part = sock.recv(_READ_BYTES)
        except TimeoutError as error:
            raise _silent(path) from error
        except ConnectionResetError:
            part = b""
        if not part:
            raise UnavailableError(
                "agent-hung-up",
                f"{path}: the agent closed the connection before it answered",
                "it may be stopping: look at its log",
            )
        parts.append(part)
        size += len(part)
        if part.endswith(b"\n"):
            return b"".join(parts)
    raise UnavailableError("reply-too-long", f"{path}: the answer passes {_MAX_REPLY_BYTES} bytes")


def _not_running(path: Path) -> UnavailableError:
    return UnavailableError(
        "agent-not-running",
        f"no agent answers at {path}",
        f"start one with `meshbpf run --state-dir {path.parent} ...`, "
        "or name its directory with --state-dir",
    )


def _not_ours(path: Path, why: str) -> PrivilegeError:
    return PrivilegeError(
        "foreign-control-socket",
        f"control socket {path} belongs to another user: {why}",
        "run the command as root, or as the user that the agent runs as",
    )


def _silent(path: Path) -> UnavailableError:
    return UnavailableError(
        "agent-silent",
        f"{path}: the agent does not answer in time",
        "it may hang: look at its log, and at `ps` for its state",
    )
