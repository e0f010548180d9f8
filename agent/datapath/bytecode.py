"""Finds and fills what compiled instructions leave open. Pure.

A 64-bit immediate load (`ld_imm64`) takes two instruction slots of 8 bytes:
opcode 0x18, registers, and the low and high halves of the value in the two
immediates. Its source register says what the value is: 0 a number, 1 a map's
descriptor. The compiler leaves a map's *number in the catalogue* there and,
as a plain number, each placeholder; both are replaced when an instance is
loaded. `struct bpf_insn` is in native byte order.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from meshbpf.agent.core.errors import MeshbpfError

INSTRUCTION_BYTES: Final = 8
_LD_IMM64: Final = 0x18  # BPF_LD | BPF_IMM | BPF_DW
_PSEUDO_MAP_FD: Final = 1
_NUMBER: Final = 0
_LOW, _HIGH = 4, 12  # where the two immediates are
_SOURCE_SHIFT: Final = 4 if sys.byteorder == "little" else 0


class BytecodeError(MeshbpfError):
    """Compiled code that does not keep to the catalogue."""


@dataclass(frozen=True, slots=True)
class Bytecode:
    """Instructions, and the byte offsets of the loads to fill."""

    instructions: bytes
    maps: tuple[tuple[int, int], ...]  # (offset, map number)
    placeholders: tuple[tuple[int, int], ...]  # (offset, placeholder value)

    @property
    def map_numbers(self) -> frozenset[int]:
        """The maps that the program uses."""
        return frozenset(number for _, number in self.maps)


def scan(
    name: str, instructions: bytes, *, maps: Collection[int], placeholders: Collection[int]
) -> Bytecode:
    """Find every map reference and placeholder of program `name`.

    BytecodeError for a map number that is not in `maps`, for another kind of
    reference, and for a placeholder that is not in the code at all: the
    compiler has then narrowed the constant, and patching would silently load
    the same program for every pod.
    """
    found_maps: list[tuple[int, int]] = []
    found_placeholders: list[tuple[int, int]] = []
    offset = 0
    while offset < len(instructions):
        opcode, registers = instructions[offset], instructions[offset + 1]
        if opcode != _LD_IMM64:
            offset += INSTRUCTION_BYTES
            continue
        if offset + 2 * INSTRUCTION_BYTES > len(instructions):
            raise BytecodeError("bpf-bytecode", f"program {name} ends inside an instruction")
        low: int = struct.unpack_from("=I", instructions, offset + _LOW)[0]
        high: int = struct.unpack_from("=I", instructions, offset + _HIGH)[0]
        value, source = low | high << 32, registers >> _SOURCE_SHIFT & 0xF
        if source == _PSEUDO_MAP_FD:
            if value not in maps:
                raise BytecodeError(
                    "bpf-unknown-map",
                    f"program {name} uses map number {value}, not in the catalogue",
                )
            found_maps.append((offset, value))
        elif source != _NUMBER:
            raise BytecodeError(
                "bpf-bytecode", f"program {name} has a reference of unknown kind {source}"
            )
        elif value in placeholders:
            found_placeholders.append((offset, value))
        offset += 2 * INSTRUCTION_BYTES
    for value in placeholders:
        if value not in {present for _, present in found_placeholders}:
            raise BytecodeError(
                "bpf-no-placeholder",
                f"program {name} lost its placeholder {value:#x}",
                "read it through an asm load, so that the compiler cannot narrow it",
            )
    return Bytecode(instructions, tuple(found_maps), tuple(found_placeholders))


def fill(code: Bytecode, *, maps: Mapping[int, int], constants: Mapping[int, int]) -> bytes:
    """The instructions of one instance.

    `maps` gives a descriptor for each map number, `constants` an unsigned
    64-bit value for each placeholder. KeyError when one is missing: the
    caller has checked.
    """
    filled = bytearray(code.instructions)
    for offset, number in code.maps:
        _put(filled, offset, maps[number])
    for offset, value in code.placeholders:
        _put(filled, offset, constants[value])
    return bytes(filled)


def _put(instructions: bytearray, offset: int, value: int) -> None:
    struct.pack_into("=I", instructions, offset + _LOW, value & 0xFFFF_FFFF)
    struct.pack_into("=I", instructions, offset + _HIGH, value >> 32)
