"""Short RCU grace periods while hooks are attached and taken away.

A tcx link waits for a grace period when it comes and another when it goes, of
10 to 20 ms each, under rtnl, so that pods wait for one another. Expedited ones
take well under one, for an interrupt on each CPU that is in the kernel just
then. That is the whole host's setting (/sys/kernel/rcu_expedited, see
Documentation/admin-guide/kernel-parameters.txt on rcupdate.rcu_expedited), so
it is made for the time of one attach and taken back: what boot and suspend do
inside the kernel. A host that must not be interrupted says rcu_normal=1, which
outweighs it.

A folder among the pins says that the setting is ours, so that the next agent
takes it back where this one was killed in the midst of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

SWITCH: Final = Path("/sys/kernel/rcu_expedited")

_MARKER: Final = "rcu_expedited"


@contextmanager
def expedited(directory: Path) -> Iterator[None]:
    """Grace periods are short for the time of the block, where that can be had.

    `directory` is a schema's, among the pins. Where the file cannot be
    written (a container's read-only /sys) or somebody has made the setting
    already, nothing is changed: the block takes longer, or does not.
    """
    ours = _begin(directory / _MARKER)
    try:
        yield
    finally:
        if ours:
            take_back(directory)


def take_back(directory: Path) -> None:
    """End the setting that an agent with this directory has left. Repeatable."""
    marker = directory / _MARKER
    if marker.is_dir():
        SWITCH.write_text("0")
        with suppress(FileNotFoundError):  # the successor in a reload was faster
            marker.rmdir()


def _begin(marker: Path) -> bool:
    try:
        if int(SWITCH.read_text()) != 0:
            return False
        # The marker first: whoever finds it without the setting loses nothing.
        marker.mkdir(mode=0o700)
    except OSError:
        return False
    try:
        SWITCH.write_text("1")
    except OSError:
        marker.rmdir()
        return False
    return True
