"""Following the API server through everything that happens to a watch."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from meshbpf.agent.core.objects import ObjectKey
from meshbpf.agent.runtime import kube_watch
from meshbpf.agent.runtime.kube_api import KubeApi
from meshbpf.agent.runtime.kube_watch import Kind, Watcher
from tests.unit.kube.api_server import ApiServer, running, serving

PODS = Kind("", "v1", "Pod", "pods")
PATH = "/api/v1/pods"


def pod(name: str, **status: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop"},
        "status": status,
    }


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_watch, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(kube_watch, "GONE_SPREAD_S", 0.05)
    monkeypatch.setattr(kube_watch, "ABSENT_S", 0.2)


@asynccontextmanager
async def following(server: ApiServer, **config: Any) -> AsyncIterator[Watcher]:
    async with trio.open_nursery() as nursery:
        watcher = Watcher(
            KubeApi(server.config(**config)), PODS, lambda _: None, rng=random.Random(1)
        )
        nursery.start_soon(watcher.run)
        yield watcher
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    with trio.fail_after(limit_s):
        while not condition():  # noqa: ASYNC110 (a watcher has no event for it)
            await trio.sleep(0.01)


def names(watcher: Watcher) -> list[str]:
    return sorted(key.name for key in watcher.objects)


async def test_what_is_there_is_listed_and_what_happens_is_watched(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        server.put(pod("a"))
        async with following(server) as watcher:
            await until(watcher.synced.is_set)
            assert names(watcher) == ["a"]
            server.put(pod("b"))
            server.put(pod("a", podIP="198.18.1.1"))
            await until(lambda: names(watcher) == ["a", "b"])
            await until(lambda: any(each.body["status"] for each in watcher.objects.values()))
            server.take("Pod", "shop", "a")
            await until(lambda: names(watcher) == ["b"])
            assert watcher.relists == 1


async def test_ten_thousand_pods_come_in_pages(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        for number in range(10_000):
            server.put(pod(f"p{number}"))
        server.history.clear()
        async with following(server) as watcher:
            await until(watcher.synced.is_set, 60.0)
            assert len(watcher.objects) == 10_000
            assert server.count(PATH, watch=False) == 20
            server.put(pod("one-more"))
            await until(lambda: len(watcher.objects) == 10_001)


async def test_gone_lists_anew_and_forgets_what_went_meanwhile(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        server.put(pod("stays"))
        server.put(pod("goes"))
        async with following(server) as watcher:
            await until(lambda: server.count(PATH, watch=True) == 1)
            server.objects.pop(("Pod", "shop", "goes"))
            server.version += 50
            server.compact()
            await until(lambda: server.watched)
            server.end_watches()
            await until(lambda: names(watcher) == ["stays"])
            assert watcher.relists == 2


async def test_a_cut_stream_is_taken_up_where_it_was_without_a_list(tmp_path: Path) -> None:
    async with running(tmp_path) as server, following(server) as watcher:
        await until(lambda: server.count(PATH, watch=True) == 1)
        server.put(pod("a"))
        await until(lambda: names(watcher) == ["a"])
        # Half an event, and then the connection dies.
        server.say("Pod", b'{"type": "ADDED", "object": {"metadata": {"name": "half"')
        await trio.sleep(0.1)
        await until(lambda: server.watched)
        server.end_watches()
        server.put(pod("b"))
        await until(lambda: names(watcher) == ["a", "b"])
        assert watcher.relists == 1
        last = [r for r in server.requests if "watch" in r.query][-1]
        assert last.query["resourceVersion"] == server.objects["Pod", "shop", "a"]["metadata"][
            "resourceVersion"
        ]  # fmt: skip


async def test_a_list_that_is_cut_short_is_asked_for_again(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        server.put(pod("a"))
        server.cut_list_after = 150
        async with following(server) as watcher:
            await until(lambda: watcher.error is not None)
            assert not watcher.synced.is_set()
            server.cut_list_after = None
            await until(watcher.synced.is_set)
            assert names(watcher) == ["a"]
            assert watcher.error is None


async def test_bookmarks_move_the_place_from_which_a_watch_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as server, following(server) as watcher:
        await until(lambda: server.count(PATH, watch=True) == 1)
        server.version += 1000
        server.bookmark("Pod")
        await until(lambda: watcher.events == 1)
        server.compact()  # all but the bookmark's version is too old now
        await until(lambda: server.watched)
        server.end_watches()
        await until(lambda: server.count(PATH, watch=True) == 2)
        server.put(pod("a"))
        await until(lambda: names(watcher) == ["a"])
        assert watcher.relists == 1


async def test_events_that_come_twice_or_late_change_nothing(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        changes: list[ObjectKey] = []
        async with trio.open_nursery() as nursery:
            api = KubeApi(server.config())
            watcher = Watcher(api, PODS, changes.extend, rng=random.Random(1))
            nursery.start_soon(watcher.run)
            await until(lambda: server.count(PATH, watch=True) == 1)
            old = server.put(pod("a", podIP="198.18.1.1"))
            new = server.put(pod("a", podIP="198.18.1.2"))
            await until(lambda: watcher.events == 2)
            seen = len(changes)
            server.say("Pod", {"type": "MODIFIED", "object": old})
            server.say("Pod", {"type": "DELETED", "object": old})
            server.say("Pod", {"type": "MODIFIED", "object": new})
            server.put(pod("z"))
            never = pod("never")
            never["metadata"]["resourceVersion"] = "999"
            server.say("Pod", {"type": "DELETED", "object": never})
            await until(lambda: watcher.events == 7)
            (held,) = [each for key, each in watcher.objects.items() if key.name == "a"]
            assert held.body["status"] == {"podIP": "198.18.1.2"}
            assert [key.name for key in changes[seen:]] == ["z"]
            nursery.cancel_scope.cancel()


async def test_a_kind_that_the_cluster_does_not_have_is_empty_and_asked_for_again(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as server:
        server.missing.add("Pod")
        async with following(server) as watcher:
            await until(watcher.synced.is_set)
            assert (watcher.objects, watcher.error) == ({}, None)
            server.missing.clear()
            server.put(pod("a"))
            await until(lambda: names(watcher) == ["a"])


async def test_a_server_that_is_down_at_the_start_is_waited_for(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        port = server.port
        server.put(pod("a"))
    async with following(server) as watcher:
        await until(lambda: watcher.error is not None)
        assert watcher.error is not None
        assert f"https://127.0.0.1:{port}" in watcher.error.what
        async with serving(server, port):
            await until(watcher.synced.is_set)
            assert names(watcher) == ["a"]
            assert watcher.error is None


async def test_objects_stay_while_the_server_is_away(tmp_path: Path) -> None:
    async with running(tmp_path) as server:
        port = server.port
        server.put(pod("a"))
        scope = trio.CancelScope()
    async with following(server) as watcher:
        async with serving(server, port):
            await until(watcher.synced.is_set)
        await until(lambda: watcher.error is not None)
        assert names(watcher) == ["a"]
        server.put(pod("b"))
        async with serving(server, port):
            await until(lambda: names(watcher) == ["a", "b"])
            assert watcher.relists == 1
    assert not scope.cancel_called


async def test_a_watch_that_says_nothing_is_dead_and_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_watch, "SILENCE_S", 0.2)
    async with running(tmp_path) as server, following(server) as watcher:
        await until(lambda: server.count(PATH, watch=True) >= 3)
        assert watcher.relists == 1


async def test_a_renewed_token_is_used_and_an_expired_one_is_waited_out(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("one\n")
    async with running(tmp_path) as server:
        server.tokens = {"one"}
        async with following(server, token_file=token) as watcher:
            await until(lambda: server.watched)
            # The server takes the old one no more, and the kubelet has not renewed it yet.
            server.tokens = {"two"}
            server.end_watches()
            await until(lambda: watcher.error is not None)
            token.write_text("two\n")
            server.put(pod("a"))
            await until(lambda: names(watcher) == ["a"])
            assert watcher.relists == 1
            assert server.requests[-1].token == "two"


async def test_a_server_under_another_ca_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async with running(tmp_path) as server, running(tmp_path / "other") as other:
        config = server.config()
        watcher = Watcher(KubeApi(config), PODS, lambda _: None)
        object.__setattr__(config, "port", other.port)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watcher.run)
            await until(lambda: watcher.error is not None)
            nursery.cancel_scope.cancel()
        assert watcher.error is not None
        assert "CERTIFICATE_VERIFY_FAILED" in watcher.error.what
        assert other.requests == []
