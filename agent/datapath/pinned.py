"""Links that live by their name in bpffs, not by a descriptor of ours."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from meshbpf.agent.datapath import bpfinfo, bpfsys
from meshbpf.agent.datapath.bpfcall import BpfError

# A target that is gone; a kind of link that ends with its last name; no link.
_NOTHING_TO_DETACH: Final = frozenset({errno.ENOLINK, errno.EOPNOTSUPP, errno.EINVAL})


@contextmanager
def opened(path: Path) -> Iterator[int | None]:
    """The pinned object's descriptor for the time of the block; None without a pin."""
    try:
        fd = bpfsys.obj_get(path)
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _target_is_alive(fd: int) -> bool:
    info = bpfinfo.link_info(fd)
    return bool(info.netns_inode or info.ifindex or info.cgroup_id)


def hold(
    path: Path, program: Callable[[], int], create: Callable[[int], int], inherited: Sequence[Path]
) -> None:
    """See to it that a live link is pinned at `path`.

    One that is there already is kept as it is. One that another schema pinned
    (`inherited`) gets our program in a single step, so that there is no moment
    in which none runs, and moves here. Else `create` makes one of the
    program's descriptor, which `program` loads only if it is needed.
    """
    with opened(path) as fd:
        if fd is not None and _target_is_alive(fd):
            return
    path.unlink(missing_ok=True)
    for old in inherited:
        with opened(old) as fd:
            if fd is not None and _target_is_alive(fd):
                bpfsys.link_update(fd, program())
                bpfsys.obj_pin(fd, path)
                old.unlink()
                return
    made = create(program())
    try:
        bpfsys.obj_pin(made, path)
    finally:
        os.close(made)


def drop(path: Path) -> None:
    """Detach and unpin. Repeatable; also when the target is gone."""
    with opened(path) as fd:
        if fd is None:
            return
        try:
            # Not left to the last descriptor: another process may hold one.
            bpfsys.link_detach(fd)
        except BpfError as error:
            if error.errno not in _NOTHING_TO_DETACH:
                raise
    path.unlink(missing_ok=True)
