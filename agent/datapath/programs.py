"""Loaded instances of the catalogue's programs, made when first asked for, or ahead."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from meshbpf.agent.datapath.maps import Map
from meshbpf.agent.datapath.objects import CompiledCatalogue, load_program
from meshbpf.bpf import POD_INDEX, PROGRAMS, PROGRAMS_BY_NAME

PER_POD: Final = tuple(spec.name for spec in PROGRAMS if POD_INDEX in spec.placeholders)
"""Programs of which each pod has its own instance."""


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
        self.close()

    def close(self) -> None:
        """End what is not attached. Repeatable."""
        self._stack.close()
        self._fds.clear()

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


class Spares:
    """Instances for pods that are still to come: what the verifier takes, taken ahead.

    An instance is made for one pod index, so the indexes of spares are the
    next ones to be given out. One thread may load while others take.
    """

    def __init__(self, compiled: CompiledCatalogue, maps: Mapping[str, Map]) -> None:
        self._compiled = compiled
        self._maps = maps
        self._ready: dict[int, Programs] = {}
        self._loading: set[int] = set()

    def ready(self) -> Collection[int]:
        """The pod indexes of those that can be taken."""
        return self._ready.keys()

    def indexes(self) -> Collection[int]:
        """Those, and of what is being loaded: not to be given to others."""
        return self._ready.keys() | self._loading

    def take(self, index: int) -> Programs:
        """The pod's instances, which are the caller's now; not loaded yet if there is no spare."""
        return self._ready.pop(index, None) or Programs(self._compiled, self._maps, index)

    def reserve(self, index: int) -> None:
        """Say that `load` will be called for it."""
        self._loading.add(index)

    def load(self, index: int) -> None:
        """Load all programs of a pod; takes the verifier some 15 ms. Raises VerifierError."""
        programs = Programs(self._compiled, self._maps, index)
        try:
            for name in PER_POD:
                programs.loader(name)()
        except BaseException:
            programs.close()
            raise
        else:
            self._ready[index] = programs
        finally:
            self._loading.discard(index)

    def close(self) -> None:
        """Unload all. Repeatable; nobody may be loading."""
        while self._ready:
            self._ready.popitem()[1].close()
