"""Lifting every capture of an agent that will not come back.

For the removal of meshbpf from a machine. `Steering` could do it, but it
compiles programs first, and whoever removes a package may have removed the
kernel's headers before. Here nothing is compiled or loaded: what the pinned
records say was put in place is taken away again.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import MappingProxyType

from meshbpf.agent.datapath import bpffs
from meshbpf.agent.datapath.attaching import Attacher
from meshbpf.agent.datapath.grace_periods import expedited, take_back
from meshbpf.agent.datapath.maps import Map
from meshbpf.agent.datapath.objects import CompiledCatalogue
from meshbpf.agent.datapath.pins import MAPS_DIRECTORY, Pins
from meshbpf.agent.datapath.programs import Spares
from meshbpf.agent.datapath.records import Records
from meshbpf.bpf import MAPS


def uproot(agent_id: str) -> tuple[str, ...]:
    """Detach all pods of this agent id and remove its pins; the pods' names.

    Blocking; repeatable; the agent must not run. Raises MeshbpfError, with
    what was not undone still pinned, when the kernel refuses or the pins are
    of another version (MapMismatchError: that version must remove them).
    """
    nothing = Pins.of(agent_id, "")
    if not nothing.agent.is_dir():
        return ()
    lifted: list[str] = []
    for folder in sorted(path for path in nothing.agent.iterdir() if path.is_dir()):
        lifted += _lift(Pins.of(agent_id, folder.name))
    nothing.remove()
    if not any(bpffs.PIN_ROOT.iterdir()):
        bpffs.PIN_ROOT.rmdir()
    return tuple(lifted)


def _lift(pins: Pins) -> list[str]:
    """The pods of one schema."""
    folder = pins.directory / MAPS_DIRECTORY
    if not (folder / "records").exists():
        return []
    with ExitStack() as stack:
        maps = {}
        for spec in MAPS:
            path = folder / spec.name
            # One that a killed agent had not made yet holds nothing to undo.
            there = Map.open(spec, path) if path.exists() else Map.create(spec)
            maps[spec.name] = stack.enter_context(there)
        records = Records(maps["records"])
        no_programs = CompiledCatalogue(pins.schema, MappingProxyType({}), MappingProxyType({}))
        attacher = Attacher(
            pins=pins,
            compiled=no_programs,
            maps=maps,
            records=records,
            spares=Spares(no_programs, maps),
            use_tcx=False,
        )
        lifted = []
        take_back(pins.directory)
        with expedited(pins.directory):
            for record in list(records):
                netns = attacher.netns_of(record)
                try:
                    attacher.remove(record, netns)
                finally:
                    if netns is not None:
                        netns.close()
                lifted.append(record.key)
    return lifted
