"""Kernel headers for the compiler: found, unpacked or put together.

BCC wants one tree that holds both `include/` with the UAPI and the generated
configuration. In this order:

1. The running kernel's: `/lib/modules/RELEASE/build`.
2. The running kernel's, from `/sys/kernel/kheaders.tar.xz` (CONFIG_IKHEADERS),
   unpacked into the cache.
3. Any that Debian's `linux-headers-*` packages installed, newest first. They
   may belong to another kernel: our programs read UAPI structures only, which
   every kernel keeps.

Debian splits each version into a `-common` tree and one for the architecture;
BCC takes a single one. `_merged` lays a tree of links over both, in the cache,
in a fifth of a second and without touching /lib/modules or /usr/src.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from meshbpf.agent.core.errors import MeshbpfError

# Debian's name of the machine, as `dpkg --print-architecture` says it, and the
# one of the kernel's `arch/`.
_ARCHITECTURES: Final = {
    "x86_64": ("amd64", "x86"),
    "aarch64": ("arm64", "arm64"),
    "riscv64": ("riscv64", "riscv"),
    "s390x": ("s390x", "s390"),
    "ppc64le": ("powerpc64le", "powerpc"),
    "loongarch64": ("loong64", "loongarch"),
}


class HeadersError(MeshbpfError):
    """No usable kernel headers; the hint names the package to install."""


@dataclass(frozen=True, slots=True)
class KernelHeaders:
    """A tree that BCC can use, and what tells it from another."""

    path: Path
    origin: str  # for people: where it came from
    identity: str  # part of the compile cache's key


def find_headers(cache_dir: Path, *, root: Path = Path("/"), release: str = "") -> KernelHeaders:
    """Headers for the running kernel, or the best substitute, ready for use.

    `cache_dir` exists and is ours alone. `root` stands in front of /lib/modules,
    /sys and /usr/src; `release` is the running kernel's unless given.
    Raises HeadersError.
    """
    found = locate_headers(root=root, release=release)
    if found.archive is not None:
        return _unpacked(found.archive, cache_dir, found.origin)
    return _usable(found.layers, cache_dir, found.origin)


@dataclass(frozen=True, slots=True)
class LocatedHeaders:
    """Where headers are: trees that together are complete, or an archive."""

    origin: str
    layers: tuple[Path, ...] = ()
    archive: Path | None = None


def locate_headers(*, root: Path = Path("/"), release: str = "") -> LocatedHeaders:
    """The search of `find_headers`; changes nothing. Raises HeadersError."""
    running = release or platform.release()
    build = root / "lib/modules" / running / "build"
    for layers in _trees_of(build, root):
        return LocatedHeaders(f"the running kernel's ({build})", layers)
    archive = root / "sys/kernel/kheaders.tar.xz"
    if archive.is_file():
        return LocatedHeaders(f"the running kernel's ({archive})", archive=archive)
    for installed in _installed(root):
        for layers in _trees_of(installed, root):
            return LocatedHeaders(f"{installed.name} (not the running kernel's)", layers)
    raise HeadersError(
        "no-kernel-headers",
        f"no kernel headers for {running}: no {build}, no {archive}, "
        f"and no linux-headers-* in {root / 'usr/src'}",
        f"apt-get install linux-headers-{_debian_architecture()}",
    )


def _debian_architecture() -> str:
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, (machine, machine))[0]


def _is_complete(layers: Sequence[Path]) -> bool:
    arch = _ARCHITECTURES.get(platform.machine(), ("", platform.machine()))[1]
    needed = (
        "include/uapi/linux/bpf.h",
        "include/linux/kconfig.h",
        "include/generated/autoconf.h",
        f"arch/{arch}/include",
    )
    return all(any((layer / name).exists() for layer in layers) for name in needed)


def _trees_of(build: Path, root: Path) -> Iterator[tuple[Path, ...]]:
    """Ways to complete `build`: alone, with its `source`, with its Debian -common tree."""
    if not build.is_dir():
        return
    real = build.resolve()
    candidates = [(real,), (real, build.with_name("source"))]
    # linux-headers-6.1.0-56-amd64 and -cloud-amd64 lie over -6.1.0-56-common.
    version = re.match(r"linux-headers-(.+?)-([a-z][a-z0-9-]*)$", real.name)
    if version:
        common = root / "usr/src" / f"linux-headers-{version[1]}-common"
        candidates.append((real, common))
    for layers in candidates:
        if all(layer.is_dir() for layer in layers) and _is_complete(layers):
            yield tuple(layer.resolve() for layer in layers)


def _installed(root: Path) -> list[Path]:
    """Architecture trees under /usr/src, the newest kernel first."""
    found = (root / "usr/src").glob("linux-headers-*")
    trees = [path for path in found if path.is_dir() and not path.name.endswith("-common")]
    return sorted(trees, key=lambda path: _version(path.name), reverse=True)


def _version(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def _usable(layers: tuple[Path, ...], cache_dir: Path, origin: str) -> KernelHeaders:
    identity = _identity(layers)
    if len(layers) == 1:
        return KernelHeaders(layers[0], origin, identity)
    target = cache_dir / f"headers-{identity}"
    if not target.is_dir():
        with _in_place_of(target) as staging:
            _merge(staging.path, layers)
    return KernelHeaders(target, f"{origin}, merged", identity)


def _identity(layers: Sequence[Path]) -> str:
    """Changes when the kernel package is another or is upgraded in place."""
    digest = hashlib.sha256()
    for layer in layers:
        digest.update(os.fsencode(layer) + b"\0")
    for name in ("include/generated/autoconf.h", "include/uapi/linux/bpf.h"):
        for layer in layers:
            if (layer / name).exists():
                digest.update((layer / name).read_bytes())
                break
    return digest.hexdigest()[:16]


def _merge(target: Path, layers: Sequence[Path]) -> None:
    """Links to everything in `layers`, the first winning; folders in two are merged."""
    target.mkdir(exist_ok=True)
    entries: dict[str, list[Path]] = {}
    for layer in layers:
        for entry in sorted(layer.iterdir()):
            entries.setdefault(entry.name, []).append(entry)
    for name, paths in entries.items():
        folders = [path for path in paths if path.is_dir()]
        if len(folders) > 1 and paths[0].is_dir():
            _merge(target / name, folders)
        else:
            (target / name).symlink_to(paths[0])


def _unpacked(archive: Path, cache_dir: Path, origin: str) -> KernelHeaders:
    # The archive is part of the kernel's image: its release, build and size tell it apart.
    text = f"{platform.release()} {platform.version()} {archive.stat().st_size}"
    identity = hashlib.sha256(text.encode())
    short = identity.hexdigest()[:16]
    target = cache_dir / f"headers-{short}"
    if not target.is_dir():
        with _in_place_of(target) as staging, tarfile.open(archive, "r:xz") as tar:
            # Debian 12's Python has no data filter; the archive is the kernel's own.
            tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
            tar.extractall(staging.path)  # noqa: S202
    if not _is_complete((target,)):
        raise HeadersError(
            "no-kernel-headers",
            f"{archive} lacks the headers that the compiler needs",
            f"apt-get install linux-headers-{_debian_architecture()}",
        )
    return KernelHeaders(target, origin, short)


class _in_place_of:  # noqa: N801  reads as the verb it is
    """A folder that takes its final name only when it is complete.

    Another agent may do the same at once: who comes second finds the name
    taken by an equal tree, and drops its own.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = Path(tempfile.mkdtemp(prefix=".headers-", dir=target.parent))

    def __enter__(self) -> _in_place_of:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.path.rename(self._target)
        except OSError:
            if not self._target.is_dir():
                raise
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
