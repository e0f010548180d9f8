"""Sources become bytecode in a child; the cache spares the child, never decides the result."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from meshbpf.agent.datapath import build as module
from meshbpf.agent.datapath.build import CompileError, Sources, build, first_error
from tests.unit.datapath.sources import SOURCE, tiny


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a compiler was started")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, compile_cache: Path) -> tuple[Sources, Path]:
    """The tiny catalogue, compiled once into the cache."""
    sources = tiny(tmp_path_factory.mktemp("tiny"))
    build(sources, compile_cache)
    return sources, compile_cache


def test_what_is_in_the_cache_is_not_compiled_again(
    built: tuple[Sources, Path], no_child: None
) -> None:
    code = build(*built)["tiny"]
    assert code
    assert len(code) % 8 == 0


def test_a_checkout_elsewhere_shares_schema_and_cache(
    built: tuple[Sources, Path], tmp_path: Path, no_child: None
) -> None:
    moved = tiny(tmp_path)
    assert moved.schema() == built[0].schema()
    assert build(moved, built[1]) == build(*built)


def test_a_damaged_entry_is_compiled_again_and_mended(
    built: tuple[Sources, Path], tmp_path: Path
) -> None:
    sources, shared = built
    cache = tmp_path / "cache"
    shutil.copytree(shared, cache, symlinks=True)
    before = build(sources, cache)
    for entry in cache.glob("tiny.c.*.cached"):
        entry.write_bytes(entry.read_bytes()[:-9] + b"\0" * 9)
    assert build(sources, cache) == before
    assert {path.read_bytes() for path in cache.glob("tiny.c.*.cached")} <= {
        path.read_bytes() for path in shared.glob("tiny.c.*.cached")
    }


@pytest.mark.parametrize("changed", ["source", "include", "cflags", "budget", "map"])
def test_the_schema_changes_with_everything_that_gives_programs_and_maps_their_meaning(
    tmp_path: Path, changed: str
) -> None:
    sources = tiny(tmp_path)
    before = sources.schema()
    match changed:
        case "source":
            sources = tiny(tmp_path, source=SOURCE + "\n")
        case "include":
            sources = tiny(tmp_path, include="#pragma once\n")
        case "cflags":
            sources = dataclasses.replace(sources, cflags=(*sources.cflags, "-DX"))
        case "budget":
            program = dataclasses.replace(sources.programs[0], placeholders=())
            sources = dataclasses.replace(sources, programs=(program,))
        case "map":
            one = dataclasses.replace(sources.maps[0], max_entries=2)
            sources = dataclasses.replace(sources, maps=(one,))
    assert sources.schema() != before


def _failure(directory: Path, cache: Path, source: str) -> CompileError:
    with pytest.raises(CompileError) as caught:
        build(tiny(directory, source=source), cache)
    return caught.value


BODY = "#include <uapi/linux/bpf.h>\nint tiny(struct __sk_buff *skb) { %s }\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (BODY % "return nothing;", "tiny.c:2:42: error: use of undeclared identifier 'nothing'"),
        (BODY % "return gone(1);", "implicit declaration of function 'gone'"),
        ("#include <no/such.h>\n", "'no/such.h' file not found"),
        ("int other(void *c) { return 0; }\n", "no global function 'tiny'"),
        ("BPF_HASH(mine, u64, u64, 4);\n" + BODY % "return 0;", "map 'mine' is declared"),
    ],
    ids=["identifier", "function", "include", "program", "map"],
)
def test_an_error_says_where_and_what(
    tmp_path: Path, compile_cache: Path, source: str, said: str
) -> None:
    error = _failure(tmp_path, compile_cache, source)
    assert said in error.what
    assert error.code == "bpf-compile"
    assert first_error(error.log) in error.what


def test_modules_of_the_working_folder_are_not_run(
    tmp_path: Path, compile_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "trap"
    (trap / "meshbpf").mkdir(parents=True)
    for name in ("bcc.py", "meshbpf/__init__.py"):
        (trap / name).write_text("raise SystemExit('taken from the working folder')")
    monkeypatch.chdir(trap)
    monkeypatch.setenv("PYTHONPATH", str(trap))
    assert build(tiny(tmp_path / "src", source=SOURCE + "// again\n"), compile_cache)


def test_a_machine_without_bcc_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # PyPI's unrelated package of that name: importable, and no compiler in it.
    (tmp_path / "bcc").mkdir()
    (tmp_path / "bcc/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CompileError) as caught:
        module.toolchain_identity()
    assert caught.value.code == "no-bcc"
    assert "python3-bpfcc" in caught.value.hint
