"""A small catalogue of its own: one TC program with a map, an include and a placeholder."""

from __future__ import annotations

from pathlib import Path

from meshbpf.agent.datapath.build import Sources
from meshbpf.bpf import AttachType, MapSpec, MapType, ProgramSpec, ProgramType

PLACEHOLDER = 0x1122_3344_5566_7788

INCLUDE = """\
#pragma once
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
static __always_inline u64 constant(void)
{
    u64 value;
    asm volatile("%0 = " TEXT(PLACEHOLDER) " ll" : "=r"(value));
    return value;
}
"""

# Adds its placeholder to the map's element and returns what was there before.
SOURCE = """\
#include <uapi/linux/bpf.h>
#include <tiny/constant.h>

int tiny(struct __sk_buff *skb)
{
    u32 zero = 0;
    u64 *total = bpf_map_lookup_elem_((u64)bpf_pseudo_fd(1, MAP_TOTAL), &zero);
    u64 before;

    if (!total)
        return 255;
    before = *total;
    *total += constant();
    return before;
}
"""

TOTAL = MapSpec("total", 7, MapType.ARRAY, 4, 8, 1)


def tiny(directory: Path, *, source: str = SOURCE, include: str = INCLUDE) -> Sources:
    """Write the catalogue's files to `directory` and describe them."""
    (directory / "include/tiny").mkdir(parents=True, exist_ok=True)
    (directory / "include/tiny/constant.h").write_text(include)
    (directory / "tiny.c").write_text(source)
    program = ProgramSpec(
        "tiny", "tiny.c", ProgramType.SCHED_CLS, AttachType.TCX_EGRESS, (PLACEHOLDER,)
    )
    cflags = (f"-DPLACEHOLDER={PLACEHOLDER:#x}", f"-DMAP_TOTAL={TOTAL.number}")
    return Sources(directory, directory / "include", (program,), (TOTAL,), cflags)
