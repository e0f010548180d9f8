"""Map references and placeholders are found, filled, and never guessed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.agent.datapath.bytecode import BytecodeError, fill, scan

PLACEHOLDER = 0x1122_3344_5566_7788
EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)
words = st.integers(0, (1 << 64) - 1)


def wide(value: int, *, source: int = 0, target: int = 1) -> bytes:
    """ld_imm64 on a little-endian machine."""
    registers = target | source << 4
    return struct.pack("=BBhIBBhI", 0x18, registers, 0, value & 0xFFFF_FFFF, 0, 0, 0, value >> 32)


@given(constant=words, fd=st.integers(3, 1 << 20), other=words.filter(lambda w: w != PLACEHOLDER))
def test_only_the_references_of_the_catalogue_change(constant: int, fd: int, other: int) -> None:
    code = scan(
        "p",
        wide(other) + wide(5, source=1) + wide(PLACEHOLDER) + EXIT,
        maps={5},
        placeholders=(PLACEHOLDER,),
    )
    filled = fill(code, maps={5: fd}, constants={PLACEHOLDER: constant})
    assert filled == wide(other) + wide(fd, source=1) + wide(constant) + EXIT


def test_a_placeholder_that_occurs_twice_is_filled_twice() -> None:
    code = scan("p", wide(PLACEHOLDER) * 2 + EXIT, maps={}, placeholders=(PLACEHOLDER,))
    assert fill(code, maps={}, constants={PLACEHOLDER: 9}) == wide(9) * 2 + EXIT


def test_the_second_half_of_a_wide_load_is_not_read_as_an_instruction() -> None:
    # Seen as an instruction of its own, the second slot would begin with 0x18.
    odd = bytearray(wide(1))
    odd[8] = 0x18
    assert scan("p", bytes(odd) + EXIT, maps={}, placeholders=()).maps == ()


def test_a_map_outside_the_catalogue_is_refused() -> None:
    with pytest.raises(BytecodeError, match="map number 6"):
        scan("p", wide(6, source=1) + EXIT, maps={5}, placeholders=())


def test_a_reference_of_another_kind_is_refused() -> None:
    with pytest.raises(BytecodeError, match="kind 2"):
        scan("p", wide(5, source=2) + EXIT, maps={5}, placeholders=())


def test_a_placeholder_that_the_compiler_narrowed_is_noticed() -> None:
    with pytest.raises(BytecodeError, match="0x1122334455667788"):
        scan("p", wide(PLACEHOLDER & 0xFFFF_FFFF) + EXIT, maps={}, placeholders=(PLACEHOLDER,))


def test_code_that_ends_inside_a_wide_load_is_refused() -> None:
    with pytest.raises(BytecodeError, match="ends inside"):
        scan("p", wide(1)[:8], maps={}, placeholders=())
