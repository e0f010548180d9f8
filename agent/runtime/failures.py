"""From what trio raises to what a person is told."""

from __future__ import annotations

from meshbpf.agent.core.errors import MeshbpfError


def told(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one MeshbpfError inside, where that is all there is; else the group."""
    known, other = group.split(MeshbpfError)
    if known is None or other is not None:
        return group
    first: BaseException = known
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first
