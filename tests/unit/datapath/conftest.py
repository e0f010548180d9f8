"""The data path's tests: what touches the kernel needs root and may leak nothing."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def _descriptors() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # the listing's own
    return found


@pytest.fixture(autouse=True)
def _root_and_no_descriptor_left(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("root") and os.geteuid() != 0:
        pytest.skip("bpf(2) needs root")
    before = _descriptors()
    yield
    gc.collect()
    left = {name: what for name, what in _descriptors().items() if name not in before}
    assert not left


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests: headers are merged once."""
    return tmp_path_factory.mktemp("cache")
