"""From the catalogue's sources to bytecode: compiler children and their cache.

One child per source (see `compile`), a few at a time, and none for a source
whose bytecode is in the cache. Two hashes are at work:

* the *schema* says what programs and maps mean: sources, includes, defines
  and specifications. It names the pins, so it must be the same for the same
  checkout on any machine, whatever compiled it;
* the cache *key* of a source adds the compiler and the kernel headers.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshbpf import bpf as catalogue
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath.cache import private_directory, read_entry, write_entry
from meshbpf.agent.datapath.headers import KernelHeaders, find_headers
from meshbpf.bpf import MapSpec, ProgramSpec

_CHILD: Final = "meshbpf.agent.datapath.compile"
_CHILD_LIMIT_S: Final = 600.0  # 0.8 s on an idle core, a minute on an emulated one
_CHILDREN: Final = 4  # 140 MB each
_FORMAT: Final = "1"  # of a cached entry: change it when its meaning changes
_ALWAYS: Final = (
    # A call to an undeclared function would otherwise compile to a call to nowhere.
    "-Werror=implicit-function-declaration",
    # uapi/linux/in.h and tcp.h want one structure of linux/socket.h, which draws
    # in half of the kernel's own headers: two thirds of the compile time, thrice
    # over, as bcc runs three passes. The UAPI header has the structure as well.
    "-D_LINUX_SOCKET_H",
    "-include",
    "uapi/linux/socket.h",
)


class CompileError(MeshbpfError):
    """A source that does not compile, or no compiler; `log` is all that clang said."""

    def __init__(self, code: str, what: str, hint: str = "", *, log: str = "") -> None:
        super().__init__(code, what, hint)
        self.log = log


@dataclass(frozen=True, slots=True)
class Sources:
    """What is to be compiled: the shipped catalogue, or a test's own."""

    directory: Path
    include: Path
    programs: tuple[ProgramSpec, ...]
    maps: tuple[MapSpec, ...]
    cflags: tuple[str, ...]

    @classmethod
    def shipped(cls) -> Sources:
        """The catalogue of `meshbpf.bpf`."""
        return cls(
            catalogue.DIRECTORY,
            catalogue.INCLUDE_DIRECTORY,
            catalogue.PROGRAMS,
            catalogue.MAPS,
            catalogue.cflags(),
        )

    def files(self) -> tuple[str, ...]:
        """The sources, each once."""
        return tuple(dict.fromkeys(program.source for program in self.programs))

    def schema(self) -> str:
        """16 hex digits that change when the meaning of a program or map may have."""
        specifications = (repr(spec) for spec in (*self.programs, *self.maps))
        return _digest(
            *self._shared(), *(self._text(name) for name in self.files()), *specifications
        )[:16]

    def key(self, source: str, headers: KernelHeaders, toolchain: str) -> str:
        """The cache key of one source's bytecode."""
        names = sorted(p.name for p in self.programs if p.source == source)
        return _digest(
            _FORMAT, headers.identity, toolchain, *_ALWAYS, *names,
            *self._shared(), self._text(source),
        )[:32]  # fmt: skip

    def _text(self, source: str) -> bytes:
        return (self.directory / source).read_bytes()

    def _shared(self) -> Iterator[str | bytes]:
        """What every source depends on."""
        yield from self.cflags
        for path in sorted(self.include.rglob("*.h")):
            yield str(path.relative_to(self.include))
            yield path.read_bytes()


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def toolchain_identity() -> str:
    """What tells this machine's bcc and LLVM from others, without loading them.

    CompileError when bcc is missing or is the unrelated project of PyPI.
    """
    spec = importlib.util.find_spec("bcc")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places or not (Path(places[0]) / "libbcc.py").exists():
        raise CompileError(
            "no-bcc",
            f"the BPF compiler collection's Python module is not in {sys.prefix}",
            "apt-get install python3-bpfcc, then `make setup` links it into the venv "
            "(PyPI's `bcc` is another project)",
        )
    parts = [platform.machine(), _facts_of(Path(places[0]) / "version.py")]
    for folder in (Path("/usr/lib"), Path("/usr/lib64"), Path("/lib")):
        # Debian: /usr/lib/x86_64-linux-gnu; others have no such level.
        for pattern in ("libbcc.so.0", "*/libbcc.so.0", "libLLVM-*.so*", "*/libLLVM-*.so*"):
            found = sorted(path for path in folder.glob(pattern) if path.exists())
            parts += [_facts_of(path) for path in found]
    return _digest(*parts)[:16]


def _facts_of(path: Path) -> str:
    real = path.resolve()
    info = real.stat()
    return f"{real} {info.st_size} {info.st_mtime_ns}"


def build(sources: Sources, cache_dir: Path) -> dict[str, bytes]:
    """The instructions of every program by name, from the cache where it has them.

    Blocks: half a second of one core per source that must be compiled. Raises
    CompileError, HeadersError, ConfigError (a cache others can write).
    """
    private_directory(cache_dir)
    headers, toolchain = find_headers(cache_dir), toolchain_identity()
    built: dict[str, bytes] = {}
    missing: list[tuple[str, str]] = []
    for source in sources.files():
        key = sources.key(source, headers, toolchain)
        cached = read_entry(cache_dir, source, key)
        code = _decode(cached, _functions(sources, source)) if cached else None
        if code is None:
            missing.append((source, key))
        else:
            built |= code
    workers = max(1, min(_CHILDREN, len(os.sched_getaffinity(0)), len(missing)))
    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
        replies = pool.map(lambda job: _run_child(sources, job[0], headers), missing)
        for (source, key), reply in zip(missing, replies, strict=True):
            code = _decode(reply, _functions(sources, source))
            if code is None:
                raise CompileError("bpf-compile", f"{source}: the compiler's answer makes no sense")
            built |= code
            write_entry(cache_dir, source, key, reply)
    return built


def _functions(sources: Sources, source: str) -> list[str]:
    return [program.name for program in sources.programs if program.source == source]


def _decode(reply: bytes, names: Iterable[str]) -> dict[str, bytes] | None:
    try:
        programs = json.loads(reply)["programs"]
        return {name: base64.b64decode(programs[name], validate=True) for name in names}
    except (ValueError, KeyError, TypeError, binascii.Error):
        return None


def _run_child(sources: Sources, source: str, headers: KernelHeaders) -> bytes:
    request = {
        "source": str(sources.directory / source),
        "cflags": [*_ALWAYS, f"-I{sources.include}", *sources.cflags],
        "programs": _functions(sources, source),
    }
    environment = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "LC_ALL": "C.UTF-8",
        "BCC_KERNEL_SOURCE": str(headers.path),
    }
    try:
        # -I: neither the working folder nor PYTHON* may add modules to a root process.
        child = subprocess.run(
            [sys.executable, "-I", "-m", _CHILD],
            input=json.dumps(request).encode(),
            capture_output=True,
            env=environment,
            timeout=_CHILD_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CompileError(
            "bpf-compile", f"{source}: the compiler did not end within {_CHILD_LIMIT_S:.0f} s"
        ) from None
    log = child.stderr.decode(errors="replace").replace("/virtual/main.c", source)
    if child.returncode != 0:
        raise CompileError(
            "bpf-compile",
            f"{source} does not compile: {first_error(log) or f'exit {child.returncode}'}",
            f"kernel headers used: {headers.path}",
            log=log,
        )
    return child.stdout


def first_error(log: str) -> str:
    """The first error in clang's output, with file and line; else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\b(fatal )?error: ", line):
            return line
    return lines[-1] if lines else ""
