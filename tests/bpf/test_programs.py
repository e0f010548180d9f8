"""The programs as the verifier sees them, and the catalogue against the C."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from meshbpf import bpf
from meshbpf.agent.datapath.objects import compile_catalogue, create_maps, load_program
from meshbpf.bpf import PROGRAMS, ProgramSpec

SOURCES = sorted(bpf.DIRECTORY.glob("*.c"))


@pytest.mark.parametrize("spec", PROGRAMS, ids=lambda spec: spec.name)
def test_a_program_keeps_within_its_budget(spec: ProgramSpec, cache_dir: Path) -> None:
    compiled = compile_catalogue(cache_dir)
    maps = create_maps(bpf.MAPS)
    try:
        fds = {name: one.fileno() for name, one in maps.items()}
        constants = dict.fromkeys(spec.placeholders, 1)
        with load_program(compiled, spec.name, fds, constants) as loaded:
            assert 0 < loaded.verified_instructions <= spec.budget
    finally:
        for one in maps.values():
            one.close()


@pytest.mark.parametrize("spec", PROGRAMS, ids=lambda spec: spec.name)
def test_the_header_of_a_source_states_the_budget(spec: ProgramSpec) -> None:
    text = (bpf.DIRECTORY / spec.source).read_text()
    assert f"// Budget: {spec.budget} verified instructions." in text


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_source_opens_with_its_licence_and_what_the_hook_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause"
    header = "\n".join(line for line in lines[:30] if line.startswith("//"))
    for word in ("Hook:", "Does", "eads", "aps", "eturns"):
        assert word in header
    assert path.name in {spec.source for spec in PROGRAMS}


def test_no_program_looks_into_kernel_structures() -> None:
    """The headers may be another kernel's: only the UAPI holds."""
    for path in (*SOURCES, *bpf.INCLUDE_DIRECTORY.rglob("*.h")):
        for name in re.findall(r"#include <([^>]+)>", path.read_text()):
            assert name.startswith(("uapi/", "meshbpf/")) or name == "linux/in.h"


def test_every_counter_of_the_catalogue_is_used_by_a_program() -> None:
    text = "".join(path.read_text() for path in (*SOURCES, *bpf.INCLUDE_DIRECTORY.rglob("*.h")))
    unused = [one.name for one in bpf.Decision if f"DECISION_{one.name}" not in text]
    assert unused == []
    assert len(bpf.Decision) <= bpf.MAPS_BY_NAME["decisions"].max_entries


def test_the_sources_are_formatted() -> None:
    paths = map(str, (*SOURCES, *bpf.INCLUDE_DIRECTORY.rglob("*.h")))
    try:
        ran = subprocess.run(
            ["clang-format", "--dry-run", "-Werror", *paths],
            capture_output=True, text=True, check=False, cwd=bpf.DIRECTORY,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("clang-format is not installed")
    assert ran.returncode == 0, ran.stderr[:2000]
