"""A refusal says in one line what the verifier minded."""

from __future__ import annotations

import struct

import pytest

from meshbpf.agent.datapath import bpfsys
from meshbpf.agent.datapath.abi import ProgType
from meshbpf.agent.datapath.verifier import VerifierError, last_useful_line


def _op(code: int, registers: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, registers, offset, value)


EXIT = _op(0xB7) + _op(0x95)


@pytest.mark.parametrize(
    ("log", "line"),
    [
        (
            "0: R1=ctx() R10=fp0\n0: (79) r1 = *(u64 *)(r2 +0)\nR2 !read_ok\n"
            "processed 1 insns (limit 1000000) max_states_per_insn 0 total_states 0\n",
            "R2 !read_ok",
        ),
        (
            "; if (!p)\n14: (55) if r0 != 0x0 goto pc+2   ; R0_w=0\n15: R0_w=0 R6=ctx()\n"
            "R0 invalid mem access 'map_value_or_null'\n\n"
            "processed 16 insns (limit 1000000) max_states_per_insn 0\n"
            "verification time 120 usec\nstack depth 8\n",
            "R0 invalid mem access 'map_value_or_null'",
        ),
        (
            "from 3 to 9: R0=scalar() R10=fp0\nBPF program is too large. Processed 1000001 insn\n"
            "processed 1000001 insns (limit 1000000)\n",
            "BPF program is too large. Processed 1000001 insn",
        ),
        ("", ""),
    ],
)
def test_the_reason_is_the_last_line_that_is_no_trace(log: str, line: str) -> None:
    assert last_useful_line(log) == line


@pytest.mark.root
@pytest.mark.parametrize(
    ("code", "line"),
    [
        (_op(0x79, 0x21) + EXIT, "R2 !read_ok"),
        (_op(0x85, value=9999) + EXIT, "invalid func unknown#9999"),
        (_op(0x79, 0x11, 4096) + EXIT, "invalid bpf_context access off=4096 size=8"),
        # Forty thousand rounds: the log is longer than the first buffer for it.
        (
            _op(0xB7, 1) + _op(0x07, 1, 0, 1) + _op(0xB5, 1, -2, 40000) + _op(0x79, 0x21) + EXIT,
            "R2 !read_ok",
        ),
    ],
    ids=["register", "helper", "context", "long log"],
)
def test_this_kernels_refusal_is_cut_to_its_reason(code: bytes, line: str) -> None:
    with pytest.raises(VerifierError) as caught:
        bpfsys.prog_load(ProgType.SCHED_CLS, code, name="refused")
    assert line in caught.value.line
    assert "processed" not in caught.value.line
    assert caught.value.line in caught.value.log
    assert str(caught.value).startswith("program refused was refused by the kernel: ")
