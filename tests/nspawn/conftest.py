"""One node for most tests, with the package installed, two pods and the service running."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nspawn import fixture
from tests.nspawn.node import ROOT, Node

_node: list[Node] = []


@pytest.fixture(scope="session")
def tree() -> Path:
    if os.geteuid() != 0:
        pytest.skip("booting a node needs root")
    kind = subprocess.run(
        ["stat", "-f", "-c", "%T", ROOT], capture_output=True, text=True, check=True
    )
    if kind.stdout.strip() == "overlayfs":
        pytest.skip("the checkout is on an overlay, which the kernel takes no other overlay upon")
    return fixture.tree()


@pytest.fixture(scope="session")
def packages(tree: Path) -> Path:
    return fixture.packages()


@pytest.fixture(scope="session")
def machine(tree: Path, packages: Path) -> Iterator[Node]:
    """A booted node with pods that run servers; meshbpf is installed and not started."""
    with Node("a", tree, packages) as node:
        _node.append(node)
        fixture.install(node)
        fixture.configure(node)
        fixture.make_pods(node)
        with fixture.server(node, fixture.SHOP):
            yield node
        _node.remove(node)


@pytest.fixture
def node(machine: Node) -> Node:
    """The same with the service active and both pods attached, whatever a test before did."""
    drop_ins = machine.root / "etc/systemd/system/meshbpf.service.d"
    for extra in drop_ins.glob("*.conf"):
        extra.unlink()
    machine.write("/etc/meshbpf/config.yaml", fixture.CONFIG)
    fixture.write_mesh(machine)
    machine.systemctl("daemon-reload")
    machine.systemctl("reset-failed", "meshbpf.service")
    machine.systemctl("start", "meshbpf.service")
    for pod in fixture.PODS:
        fixture.attach(machine, pod)
    return machine


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Put the unit's journal under a failure."""
    report: pytest.TestReport = yield  # type: ignore[assignment]
    if report.failed:
        for node in _node:
            lines = [line for line in node.journal().splitlines() if "\taccess\t" not in line]
            lines = lines[-80:]
            report.sections.append(("journal of the unit", "\n".join(lines)))
    return report  # type: ignore[return-value]
