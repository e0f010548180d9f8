"""The state directory: one agent's home on disk, and its lock.

Holds `lock` (flock), `agent-id`, `attachments.json`, `control.sock`,
`cni.sock` and `cache/` (compiled programs). It is made 0700 and must belong to the agent's
user: whoever can write here can name pods to attach. flock and not a pid
file: the kernel drops the lock with the process, however it dies.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from meshbpf.agent.api import CNI_SOCKET, CONTROL_SOCKET
from meshbpf.agent.core.errors import ConfigError, MeshbpfError, PrivilegeError

_AGENT_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class StateDir:
    """A locked state directory; close it to let another agent in."""

    path: Path
    agent_id: str
    """16 hexadecimal digits, chosen once at random: names this agent's pins."""
    lock_fd: int

    @property
    def cache(self) -> Path:
        """Compiled programs; may be deleted at any time."""
        return self.path / "cache"

    @property
    def attachments(self) -> Path:
        """The pods that this agent steers."""
        return self.path / "attachments.json"

    @property
    def control_socket(self) -> Path:
        """Where the CLI finds this agent."""
        return self.path / CONTROL_SOCKET

    @property
    def cni_socket(self) -> Path:
        """Where the CNI plugin finds this agent."""
        return self.path / CNI_SOCKET

    @classmethod
    def open(cls, path: Path) -> StateDir:
        """Make the directory when it is missing, and lock it.

        Raises MeshbpfError (state-dir-in-use), PrivilegeError (of another
        user) or ConfigError (not a directory, a broken agent-id).
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = path.stat()
            if found.st_uid != os.geteuid():
                raise PrivilegeError(
                    "foreign-state-dir",
                    f"{path} belongs to uid {found.st_uid}, not to the agent's user",
                    "give --state-dir a directory of the agent's own",
                )
            if stat.S_IMODE(found.st_mode) != 0o700:
                path.chmod(0o700)
            lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                "bad-state-dir",
                f"state directory {path} cannot be used: {error.strerror}",
                "give --state-dir a directory on a local, writable file system",
            ) from error
        try:
            _lock(lock_fd, path)
            agent_id = _agent_id(path / "agent-id")
        except BaseException:
            os.close(lock_fd)
            raise
        return cls(path, agent_id, lock_fd)

    @classmethod
    def inherit(cls, path: Path, lock_fd: int) -> StateDir:
        """The directory of a predecessor, whose lock came with `lock_fd`.

        Both have it while both live: it is one open file. Raises ConfigError
        when the lock is another directory's.
        """
        try:
            ours, theirs = os.stat(path / "lock"), os.fstat(lock_fd)
        except OSError as error:
            raise _moved(path) from error
        if (ours.st_dev, ours.st_ino) != (theirs.st_dev, theirs.st_ino):
            raise _moved(path)
        return cls(path, _agent_id(path / "agent-id"), lock_fd)

    def sign(self) -> None:
        """Write our process id into the lock, for whoever finds it held."""
        _sign(self.lock_fd)

    def predecessor_socket(self, pid: int) -> Path:
        """Where a predecessor that still drains can be asked."""
        return self.path / f"predecessor-{pid}.sock"

    def close(self) -> None:
        """Drop the lock. The directory stays."""
        os.close(self.lock_fd)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` (0600) so that a reader, or a crash, sees the old or the new content."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself lives in the directory.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        raise MeshbpfError(
            "state-dir-in-use",
            f"another agent{f' (pid {holder})' if holder else ''} uses the state directory {path}",
            "stop it first, or give this one a --state-dir of its own",
        ) from error
    _sign(fd)


def _sign(fd: int) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def _moved(path: Path) -> ConfigError:
    return ConfigError(
        "other-state-dir",
        f"{path} is not the state directory of the agent that runs",
        "a reload keeps the state directory: restart the agent to move it",
    )


def _agent_id(path: Path) -> str:
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        text = secrets.token_hex(8)
        write_atomically(path, f"{text}\n".encode())
    if _AGENT_ID.fullmatch(text) is None:
        raise ConfigError(
            "bad-agent-id",
            f"{path} does not hold an agent id (16 hexadecimal digits)",
            "the pins of attached pods are named by it under /sys/fs/bpf/meshbpf: "
            "restore it from there, or delete it to start afresh",
        )
    return text
