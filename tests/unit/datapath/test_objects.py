"""One compilation, many instances, and no compiler in the process that loads them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from meshbpf.agent.datapath import bpfinfo, bpfsys
from meshbpf.agent.datapath.bytecode import BytecodeError
from meshbpf.agent.datapath.objects import (
    CompiledCatalogue,
    compile_catalogue,
    create_maps,
    load_program,
)
from tests.unit.datapath.sources import PLACEHOLDER, SOURCE, TOTAL, tiny

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, compile_cache: Path) -> CompiledCatalogue:
    return compile_catalogue(compile_cache, tiny(tmp_path_factory.mktemp("tiny")))


def test_each_instance_has_its_own_constant_and_shares_the_map(compiled: CompiledCatalogue) -> None:
    values = (3, 0xFFFF_FFFF_0000_0001)
    with create_maps([TOTAL])["total"] as total:
        fds = {"total": total.fileno()}
        for value in values:
            with load_program(compiled, "tiny", fds, {PLACEHOLDER: value}) as program:
                bpfsys.prog_test_run(program.fileno(), data=bytes(64))
                info = bpfinfo.prog_info(program.fileno())
                assert (info.id, info.name) == (program.id, "tiny")
                assert info.map_ids == (bpfinfo.map_info(total.fileno()).id,)
                assert program.verified_instructions > 0
        found = total.lookup(struct.pack("=I", 0))
    assert found == struct.pack("=Q", sum(values) & (1 << 64) - 1)


def test_the_compiler_never_enters_this_process(compiled: CompiledCatalogue) -> None:
    assert compiled.programs
    loaded = Path("/proc/self/maps").read_text()
    assert "libbcc" not in loaded
    assert "libLLVM" not in loaded
    assert "libclang" not in loaded


def test_a_missing_map_or_constant_is_named_before_the_kernel_is_asked(
    compiled: CompiledCatalogue,
) -> None:
    with pytest.raises(ValueError, match="no map given for total"):
        load_program(compiled, "tiny", {}, {PLACEHOLDER: 1})
    with pytest.raises(ValueError, match="placeholders"):
        load_program(compiled, "tiny", {"total": 0}, {})
    with pytest.raises(ValueError, match="64 bits"):
        load_program(compiled, "tiny", {"total": 0}, {PLACEHOLDER: 1 << 64})


def test_a_program_that_lost_its_placeholder_is_not_loaded(
    tmp_path: Path, compile_cache: Path
) -> None:
    source = SOURCE.replace("constant()", "(u32)PLACEHOLDER")
    with pytest.raises(BytecodeError) as caught:
        compile_catalogue(compile_cache, tiny(tmp_path, source=source))
    assert caught.value.code == "bpf-no-placeholder"


def test_a_closed_program_cannot_be_used(compiled: CompiledCatalogue) -> None:
    with create_maps([TOTAL])["total"] as total:
        program = load_program(compiled, "tiny", {"total": total.fileno()}, {PLACEHOLDER: 1})
        program.close()
        program.close()
        with pytest.raises(ValueError, match="closed"):
            program.fileno()
