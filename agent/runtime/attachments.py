"""Which pods this agent steers, kept over restarts in `attachments.json`.

The kernel keeps the programs (pins), this file keeps the intent: whose pod
it is, where its netns was and which options it was given. A file that cannot
be understood stops the agent rather than being replaced: to lose it would
leave pods captured with nobody who serves them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import msgspec

from meshbpf.agent.api import OnAgentDownName, SameNodeName
from meshbpf.agent.config import PodName
from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.runtime.state_dir import write_atomically

FORMAT = 1


class Attachment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attached pod, as it was asked for and, by name, as it was found."""

    pod: str
    """NS/NAME."""
    netns: str
    """Path of the network namespace."""
    netns_device: int
    netns_inode: int
    """Which namespace that was: a path can come to name another one."""
    service_account: str
    on_agent_down: OnAgentDownName
    same_node: SameNodeName = "kernel"
    exempt_ports: tuple[int, ...] = ()
    exempt_cidrs: tuple[str, ...] = ()
    exempt_interfaces: tuple[str, ...] = ()
    dns: bool = False
    """Its DNS queries are answered by the agent."""
    attached_at: datetime
    by_name: bool = False
    """The runtime found it by its name, and will be asked again when it is gone."""
    account_given: bool = False
    """The caller named the service account: it holds for the pod's next life too."""
    sandbox: str = ""
    """The runtime's id of the pod's life that is attached; empty while none runs."""
    uid: str = ""
    cgroup: str = ""
    enrolled: bool = False
    """Attached because its labels say so, and detached when they do not any more."""
    container: str = ""
    """Enrolled by CNI: the id under which the runtime will ask for its removal."""

    @property
    def name(self) -> PodName:
        """The parsed `pod`."""
        return PodName.parse(self.pod)

    def still_there(self) -> bool:
        """Whether the path still names the namespace that was attached."""
        try:
            found = os.stat(self.netns)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (self.netns_device, self.netns_inode)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format: int
    attachments: tuple[Attachment, ...]


def load(path: Path) -> dict[str, Attachment]:
    """The attachments by NS/NAME; empty when there is no file yet.

    Raises ConfigError (bad-attachments) and leaves the file as it is.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise _bad(path, str(error.strerror)) from error
    try:
        file = msgspec.json.decode(content, type=_File)
        if file.format != FORMAT:
            raise _bad(path, f"format {file.format} is not {FORMAT}")
        found = {str(item.name): item for item in file.attachments}
    except msgspec.DecodeError as error:
        raise _bad(path, str(error)) from error
    except ConfigError as error:
        raise _bad(path, error.what) from error
    if len(found) != len(file.attachments):
        raise _bad(path, "it names one pod twice")
    return found


def save(path: Path, attachments: Iterable[Attachment]) -> None:
    """Replace the file, atomically and durably. Raises OSError when the disk refuses."""
    ordered = tuple(sorted(attachments, key=lambda item: item.pod))
    content = msgspec.json.encode(_File(format=FORMAT, attachments=ordered))
    write_atomically(path, msgspec.json.format(content, indent=2) + b"\n")


def _bad(path: Path, why: str) -> ConfigError:
    return ConfigError(
        "bad-attachments",
        f"{path} cannot be understood: {why}",
        "it says which pods are attached and was left as it is: restore it from a copy, or "
        "move it away and attach the pods again (their capture is lifted at the next start)",
    )
