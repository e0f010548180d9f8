"""The one root of every error that a user may see.

An error says what failed and on what (`what`), the likely cause and the next
command (`hint`), and carries a short stable `code` for machines and the exit
status that the CLI ends with. Statuses follow sysexits(3) where it has one.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses of the `meshbpf` command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 69  # EX_UNAVAILABLE: the agent cannot be reached
    NOPERM = 77  # EX_NOPERM: not root, or a control socket that is not ours
    CONFIG = 78  # EX_CONFIG: bad YAML, key permissions, no CA
    FINDINGS = 79  # istioctl's status for "ran well, found problems"


class MeshbpfError(Exception):
    """What failed, why it probably did, and what to run next."""

    exit_status: Exit = Exit.FAILED

    def __init__(self, code: str, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  hint: {self.hint}" if self.hint else self.what


class ConfigError(MeshbpfError):
    """A file or option that cannot be used as it stands."""

    exit_status = Exit.CONFIG


class PrivilegeError(MeshbpfError):
    """The caller lacks root, or speaks to a socket that another user owns."""

    exit_status = Exit.NOPERM


class UnavailableError(MeshbpfError):
    """No agent answers."""

    exit_status = Exit.UNAVAILABLE


def only_known(error: BaseException) -> MeshbpfError | None:
    """The first MeshbpfError of a group, where there is nothing else in it; None otherwise."""
    if isinstance(error, MeshbpfError):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = [only_known(one) for one in error.exceptions]
        return found[0] if all(one is not None for one in found) else None
    return None
