"""Loaded instances of the catalogue's programs, made when first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from meshbpf.agent.datapath.maps import Map
from meshbpf.agent.datapath.objects import CompiledCatalogue, load_program
from meshbpf.bpf import POD_INDEX, PROGRAMS_BY_NAME


class Programs:
    """The instances of one pod, or of no pod in particular, for the time of a block.

    A program lives on through the link that it is attached by; the
    descriptors here end with the block.
    """

    def __init__(
        self, compiled: CompiledCatalogue, maps: Mapping[str, Map], pod: int | None = None
    ) -> None:
        self._compiled = compiled
        self._map_fds = {name: one.fileno() for name, one in maps.items()}
        self._pod = pod
        self._stack = ExitStack()
        self._fds: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def loader(self, name: str) -> Callable[[], int]:
        """A function that gives the program's descriptor, loading it once."""

        def load() -> int:
            if name not in self._fds:
                wants_pod = bool(PROGRAMS_BY_NAME[name].placeholders)
                constants = {POD_INDEX: self._pod} if wants_pod and self._pod is not None else {}
                loaded = load_program(self._compiled, name, self._map_fds, constants)
                self._stack.callback(loaded.close)
                self._fds[name] = loaded.fileno()
            return self._fds[name]

        return load
