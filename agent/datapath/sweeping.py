"""Removing what agents left that will not come back.

Pins are meant to outlive an agent: they keep its pods captured until it is
back. But an agent whose state directory was deleted never is, and its connect
hooks would look at every connect() on the machine for ever. Its folder may go
when nothing depends on it: no process has claimed it, and none of its pods'
namespaces exists any more. A pod that lives keeps it, however old it is.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

import msgspec

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.bpffs import PIN_ROOT
from meshbpf.agent.datapath.grace_periods import take_back
from meshbpf.agent.datapath.maps import Map
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.pins import MAPS_DIRECTORY, exclusive, remove_tree
from meshbpf.agent.datapath.records import Records
from meshbpf.bpf import MAPS_BY_NAME


def sweep(keep: Path) -> tuple[str, ...]:
    """Remove the folders of agents that are gone with all their pods, but never `keep`.

    Gives their names. What cannot be read, or was made by a version whose
    records have another form, stays.
    """
    removed = []
    with exclusive(PIN_ROOT):
        for folder in sorted(PIN_ROOT.iterdir()):
            if folder == keep or not folder.is_dir():
                continue
            try:
                with exclusive(folder, fcntl.LOCK_NB):
                    if not _has_pods(folder):
                        for schema in folder.iterdir():
                            take_back(schema)
                        remove_tree(folder)
                        removed.append(folder.name)
            except (BlockingIOError, MeshbpfError, msgspec.MsgspecError):
                continue  # claimed, or not ours to judge
    return tuple(removed)


def _has_pods(folder: Path) -> bool:
    for schema in folder.iterdir():
        path = schema / MAPS_DIRECTORY / "records"
        if not path.exists():
            if any(path.parent.glob("*")):
                return True  # another version's layout
            continue
        with Map.open(MAPS_BY_NAME["records"], path) as stored:
            for record in Records(stored):
                netns = Netns.find(
                    record.netns_path(), record.netns_dev, record.netns_inode, record.cookie
                )
                if netns is not None:
                    netns.close()
                    return True
    return False
