"""Pods by name: what is held and recorded while one is here, is gone, and comes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from meshbpf.agent.api import AttachRequest
from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.runtime.attach_plan import Located, find_netns

from .test_pods import Kernel, Node, _swift, netns, node, workload  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.root, pytest.mark.netns]


def place(path: Path, sandbox: str, address: str = "198.18.1.1") -> Located:
    addresses = frozenset({ip_address(address)})
    return Located(find_netns(str(path)), sandbox=sandbox, uid="u", addresses=addresses)


class Runtime:
    """Stands for Locator: says where pods are."""

    def __init__(self, **pods: Located) -> None:
        self.pods = pods

    async def locate(self, request: AttachRequest) -> Located:
        return self.pods[request.pod.partition("/")[2]]


async def attach(it: Node, where: Located) -> None:
    it.pods._locator = Runtime(a=where)  # type: ignore[assignment]
    await it.pods.attach(AttachRequest(pod="web/a"), it.describe)


def only(it: Node) -> tuple[str, str]:
    (pod,) = it.pods.list()
    return pod.state, pod.reason


async def test_a_lost_pod_holds_nothing_and_is_still_awaited(
    tmp_path: Path,
    netns: Callable[[str], Path],  # noqa: F811
) -> None:
    async with node(tmp_path) as it:
        await attach(it, place(netns("a"), "1"))
        assert it.pods.named() == {"web/a": "1"}
        await it.pods.lost("web/a", "another life")
        assert only(it)[0] == "attached"
        await it.pods.lost("web/a", "1")
        assert only(it) == ("waiting", "no pod of that name runs on this node")
        assert it.pods.named() == {"web/a": ""}
        assert (it.identities(), it.server.serving, it.kernel.pods) == ([], [], {})
        assert it.recorded() == ["web/a"]
        assert (await it.pods.detach("web/a")).outcome == "detached"
        assert it.recorded() == []


async def test_the_next_life_is_attached_in_its_own_namespace(
    tmp_path: Path,
    netns: Callable[[str], Path],  # noqa: F811
) -> None:
    async with node(tmp_path) as it:
        await attach(it, place(netns("a"), "1"))
        await it.pods.found("web/a", place(netns("b"), "2"))
        (pod,) = it.pods.list()
        assert (pod.state, pod.attachment.sandbox) == ("attached", "2")
        assert pod.attachment.netns.endswith("-b")
        assert it.kernel.calls == ["attach web/a", "drain web/a", "detach web/a", "attach web/a"]
        assert it.identities() == ["shop"]


async def test_a_life_that_cannot_be_attached_is_tried_again(
    tmp_path: Path,
    netns: Callable[[str], Path],  # noqa: F811
) -> None:
    async with node(tmp_path) as it:
        await attach(it, place(netns("a"), "1"))
        it.kernel.attach_error = MeshbpfError("busy", "the kernel is busy")
        await it.pods.found("web/a", place(netns("b"), "2"))
        assert only(it) == ("failed", "the kernel is busy")
        assert it.recorded() == ["web/a"]
        it.kernel.attach_error = None
        await it.until(lambda: only(it) == ("attached", ""))
        assert it.pods.named() == {"web/a": "2"}


async def test_a_life_whose_account_nobody_knows_waits_with_that_reason(
    tmp_path: Path,
    netns: Callable[[str], Path],  # noqa: F811
) -> None:
    async with node(tmp_path) as it:
        await attach(it, place(netns("a"), "1"))
        there = place(netns("b"), "2", "198.18.1.2")
        await it.pods.found("web/a", there)
        state, reason = only(it)
        assert state == "waiting"
        assert "198.18.1.1" in reason
        assert "198.18.1.2" in reason
        assert (it.identities(), it.kernel.pods) == ([], {})
        moved = workload("a", "till")
        object.__setattr__(moved, "addresses", (ip_address("198.18.1.2"),))
        it.mesh = Snapshot.of(MeshState((moved,)), 2)
        it.pods.refresh(it.mesh)
        assert only(it)[0] == "waiting"
        await it.pods.found("web/a", there)
        assert only(it) == ("attached", "")
        assert it.identities() == ["till"]


async def test_who_was_awaited_is_awaited_by_the_next_agent_too(
    tmp_path: Path,
    netns: Callable[[str], Path],  # noqa: F811
) -> None:
    path = netns("a")
    async with node(tmp_path) as it:
        await attach(it, place(path, "1"))
        await it.pods.lost("web/a", "1")
    record = json.loads((tmp_path / "attachments.json").read_text())["attachments"][0]
    assert (record["by_name"], record["sandbox"]) == (True, "")
    # Its namespace is there all the same: a killed pod's is, until the runtime tidies up.
    async with node(tmp_path) as it:
        assert only(it) == ("waiting", "no pod of that name runs on this node")
        assert it.kernel.pods == {}
        await it.pods.found("web/a", place(path, "2"))
        assert only(it) == ("attached", "")


async def test_a_pod_attached_by_its_namespace_is_not_followed(
    tmp_path: Path,
    netns: Callable[[str], Path],  # noqa: F811
) -> None:
    async with node(tmp_path, Kernel()) as it:
        await attach(it, Located(find_netns(str(netns("a")))))
        assert it.pods.named() == {}
        await it.pods.lost("web/a", "")
        assert only(it)[0] == "attached"
