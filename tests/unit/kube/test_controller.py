"""The controller's election and what it applies, against an API server of the tests' own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.core.objects import KubeObject, ObjectSet
from meshbpf.agent.runtime.certs import utc_now
from meshbpf.agent.runtime.controller import lease
from meshbpf.agent.runtime.controller.desired import MANAGER, Desired, key_of
from meshbpf.agent.runtime.controller.lease import Leadership
from meshbpf.agent.runtime.kube_api import KubeApi
from tests.unit.kube.api_server import ApiServer, running

LEASE = ("Lease", "meshbpf-system", "election")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[ApiServer]:
    async with running(tmp_path) as server:
        server.manager = MANAGER
        yield server


def api_of(server: ApiServer) -> KubeApi:
    return KubeApi(server.config())


# --- who leads -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proportions of client-go's times, at a tenth of them."""
    monkeypatch.setattr(lease, "DURATION_S", 2)
    monkeypatch.setattr(lease, "RENEW_DEADLINE_S", 1.0)
    monkeypatch.setattr(lease, "RETRY_S", 0.1)


class Replica:
    """One part in the election; `work` notes that it works."""

    def __init__(self, server: ApiServer, identity: str) -> None:
        self.part = Leadership(api_of(server), "meshbpf-system", "election", identity, utc_now)
        self.works = False
        self.changed = trio.Event()
        self.scope = trio.CancelScope()
        self.ended = trio.Event()

    async def run(self) -> None:
        with self.scope:
            await self.part.run(self._work)
        self.ended.set()

    async def _work(self) -> None:
        self._now(works=True)
        try:
            await trio.sleep_forever()
        finally:
            self._now(works=False)

    def _now(self, *, works: bool) -> None:
        self.works = works
        self.changed.set()
        self.changed = trio.Event()


async def until(replica: Replica, works: bool, limit_s: float) -> float:
    """Seconds until it works, or does not."""
    began = trio.current_time()
    with trio.fail_after(limit_s):
        while replica.works != works:
            await replica.changed.wait()
    return trio.current_time() - began


async def test_one_leads_and_gives_the_lease_back_at_its_end(server: ApiServer) -> None:
    one, two = Replica(server, "one"), Replica(server, "two")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await until(one, True, 5)
        nursery.start_soon(two.run)
        await trio.sleep(1)
        assert not two.works
        assert server.objects[LEASE]["spec"]["holderIdentity"] == "one"
        one.scope.cancel()
        await one.ended.wait()
        # It need not run out.
        assert await until(two, True, 5) < 1.5
        assert server.objects[LEASE]["spec"]["leaseTransitions"] == 2
        two.scope.cancel()


async def test_a_lease_that_is_not_renewed_runs_out(server: ApiServer) -> None:
    server.put(
        {
            "kind": "Lease",
            "metadata": {"name": "election", "namespace": "meshbpf-system"},
            "spec": {"holderIdentity": "dead", "leaseDurationSeconds": 2},
        }
    )
    two = Replica(server, "two")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(two.run)
        assert await until(two, True, 10) >= 1.9
        two.scope.cancel()


async def test_who_cannot_renew_stops_before_another_may_begin(server: ApiServer) -> None:
    one = Replica(server, "one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await until(one, True, 5)
        server.tokens = {"nobody's"}
        assert await until(one, False, 5) < 2
        server.tokens = None
        await until(one, True, 5)
        one.scope.cancel()


async def test_who_finds_the_lease_taken_stops_at_once(server: ApiServer) -> None:
    one = Replica(server, "one")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        await until(one, True, 5)
        held = server.objects[LEASE]
        server.put(held | {"spec": held["spec"] | {"holderIdentity": "other"}})
        assert await until(one, False, 5) < 1
        assert server.objects[LEASE]["spec"]["holderIdentity"] == "other"
        one.scope.cancel()


# --- what is applied ---------------------------------------------------------------


def service(port: int = 80) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "w", "namespace": "apps"},
        "spec": {"ports": [{"port": port}]},
    }


def seen(server: ApiServer) -> ObjectSet:
    return ObjectSet.of(
        KubeObject(key_of({"apiVersion": "v1"} | body), "v1", body)
        for body in server.objects.values()
    )


async def test_what_is_so_is_not_applied_again(server: ApiServer) -> None:
    desired = Desired(api_of(server))
    for _ in range(3):
        await desired.apply(seen(server), [service()])
    assert len(server.patches) == 1
    await desired.apply(seen(server), [service(81)])
    assert server.objects["Service", "apps", "w"]["spec"]["ports"] == [{"port": 81}]
    assert len(server.patches) == 2


async def test_what_somebody_changed_or_deleted_is_put_back(server: ApiServer) -> None:
    desired = Desired(api_of(server))
    await desired.apply(seen(server), [service()])
    server.put(server.objects["Service", "apps", "w"] | {"spec": {"ports": []}})
    await desired.apply(seen(server), [service()])
    assert server.objects["Service", "apps", "w"]["spec"] == service()["spec"]
    server.take("Service", "apps", "w")
    await desired.apply(seen(server), [service()])
    assert ("Service", "apps", "w") in server.objects


async def test_what_the_cluster_refuses_is_told(server: ApiServer) -> None:
    server.refuses = "services"
    with pytest.raises(MeshbpfError, match="no services for you"):
        await Desired(api_of(server)).apply(ObjectSet.EMPTY, [service()])
