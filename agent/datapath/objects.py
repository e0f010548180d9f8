"""Compiled programs, and their loaded instances.

Three nouns, three owners: a *spec* is inert (`meshbpf.bpf`), an *object* is
compiled or loaded (here), a *link* is attached (`links`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from meshbpf.agent.datapath import bpfinfo, bpfsys
from meshbpf.agent.datapath.build import Sources, build
from meshbpf.agent.datapath.bytecode import Bytecode, fill, scan
from meshbpf.agent.datapath.descriptor import Descriptor
from meshbpf.agent.datapath.maps import Map, create_maps
from meshbpf.bpf import ProgramSpec

__all__ = [
    "CompiledCatalogue",
    "CompiledProgram",
    "LoadedProgram",
    "Map",
    "Sources",
    "compile_catalogue",
    "create_maps",
    "load_program",
]


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """A program that wants its maps and placeholders."""

    spec: ProgramSpec
    code: Bytecode
    map_names: frozenset[str]


@dataclass(frozen=True, slots=True)
class CompiledCatalogue:
    """All programs of one schema; `schema` is the name of their pin folder."""

    schema: str
    programs: Mapping[str, CompiledProgram]
    map_numbers: Mapping[int, str]


def compile_catalogue(cache_dir: Path, sources: Sources | None = None) -> CompiledCatalogue:
    """Compile what is not in the cache. Blocks up to some seconds: see `build`.

    BytecodeError when the result refers to a map or placeholder that the
    catalogue does not have, or lacks one that it has.
    """
    wanted = sources or Sources.shipped()
    built = build(wanted, cache_dir)
    numbers = {spec.number: spec.name for spec in wanted.maps}
    programs = {}
    for spec in wanted.programs:
        code = scan(spec.name, built[spec.name], maps=numbers, placeholders=spec.placeholders)
        used = frozenset(numbers[number] for number in code.map_numbers)
        programs[spec.name] = CompiledProgram(spec, code, used)
    return CompiledCatalogue(wanted.schema(), MappingProxyType(programs), MappingProxyType(numbers))


class LoadedProgram(Descriptor):
    """One verified instance in the kernel; closing it ends it unless attached or pinned."""

    __slots__ = ("id", "name", "verified_instructions")

    def __init__(self, name: str, fd: int) -> None:
        super().__init__(fd, f"program {name}")
        info = bpfinfo.prog_info(fd)
        self.name = name
        self.id = info.id
        self.verified_instructions = info.verified_instructions


def load_program(
    compiled: CompiledCatalogue,
    name: str,
    map_fds: Mapping[str, int],
    constants: Mapping[int, int] = MappingProxyType({}),
) -> LoadedProgram:
    """Load one instance of program `name`: its maps by name, its constants by placeholder.

    Takes about a millisecond, and no compiler. VerifierError when the kernel
    refuses it; ValueError when a map or constant is not given, or one is given
    that the program does not have.
    """
    program = compiled.programs[name]
    absent = program.map_names - map_fds.keys()
    if absent:
        raise ValueError(f"program {name}: no map given for {', '.join(sorted(absent))}")
    if constants.keys() != set(program.spec.placeholders):
        raise ValueError(f"program {name}: constants do not match its placeholders")
    for value in constants.values():
        if not 0 <= value < 1 << 64:
            raise ValueError(f"program {name}: constant {value} does not fit in 64 bits")
    descriptors = {
        number: map_fds[compiled.map_numbers[number]] for number in program.code.map_numbers
    }
    fd = bpfsys.prog_load(
        program.spec.prog_type,
        fill(program.code, maps=descriptors, constants=constants),
        name=name,
        attach_type=program.spec.expected_attach_type,
    )
    try:
        return LoadedProgram(name, fd)
    except BaseException:
        os.close(fd)
        raise
