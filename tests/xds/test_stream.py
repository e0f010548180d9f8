"""The xDS client against a server that replays istiod: what reaches the mesh, what is answered."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
import trio

from meshbpf.agent.core.policy import PolicyAction
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.xds import ADDRESS, AUTHORIZATION, Ending
from meshbpf.agent.runtime.exposition import render
from meshbpf.agent.wire.pb import authorization_pb2
from tests.xds import records
from tests.xds.conftest import eventually, following
from tests.xds.istiod import NAME, Istiod, Stream, serving

pytestmark = pytest.mark.xds
WEB = "shop/web.shop.svc.cluster.local"
HOST = "web.shop.svc.cluster.local"


def furnish(istiod: Istiod) -> None:
    istiod.put(
        ADDRESS,
        records.uid("web-1"),
        records.workload("web-1", "10.0.0.1", "fd00::1", services={WEB: {80: 8080}}),
    )
    istiod.put(ADDRESS, WEB, records.service(HOST, "10.9.0.1"))
    istiod.put(AUTHORIZATION, "shop/only-a", records.policy("only-a", "cluster.local/ns/a/sa/a"))


async def test_a_good_push_is_in_force_and_acknowledged(istiod: Istiod) -> None:
    furnish(istiod)
    async with following(istiod) as client:
        await client.started.wait()
        mesh = client.snapshot
        web = mesh.workload_at("", ip_address("10.0.0.1"))
        assert web is not None
        assert mesh.workload_at("", ip_address("fd00::1")) is web
        assert (web.name, web.namespace, web.node) == ("web-1", "shop", "node1")
        service = mesh.service_at("", ip_address("10.9.0.1"), "shop")
        assert service is not None
        assert [one.ports for one in mesh.endpoints(service)] == [{80: 8080}]
        assert [one.key for one in mesh.policies_for(web)] == ["shop/only-a"]
        assert client.source.healthy
        await eventually(lambda: len(istiod.streams[0].requests) >= 4, 5)
    first, second, *answers = istiod.streams[0].requests
    assert (first.type_url, second.type_url) == (ADDRESS, AUTHORIZATION)
    assert {(one.type_url, bool(one.response_nonce)) for one in answers} == {
        (ADDRESS, True),
        (AUTHORIZATION, True),
    }
    assert not any(one.HasField("error_detail") for one in answers)


async def test_the_first_request_says_who_asks_and_carries_the_token(istiod: Istiod) -> None:
    async with following(istiod) as client:
        await client.started.wait()
    (stream,) = istiod.streams
    node = stream.requests[0].node
    assert node.id == "ztunnel~1.1.1.1~agent-1.istio-system~istio-system.svc.cluster.local"
    assert dict(node.metadata) == {
        "NAME": "agent-1",
        "NAMESPACE": "istio-system",
        "INSTANCE_IPS": "1.1.1.1",
        "NODE_NAME": "node1",
        "CLUSTER_ID": "Kubernetes",
    }
    assert stream.call.headers["authorization"] == "Bearer first-token"
    assert stream.call.headers["clusterid"] == "Kubernetes"
    assert stream.call.headers[":scheme"] == "https"


async def test_changes_and_removals_follow_one_by_one(istiod: Istiod) -> None:
    furnish(istiod)
    async with following(istiod) as client:
        await client.started.wait()
        istiod.put(ADDRESS, records.uid("web-2"), records.workload("web-2", "10.0.0.2"))
        await client.until(lambda mesh: mesh.workload(records.uid("web-2")))
        istiod.put(ADDRESS, records.uid("web-2"), records.workload("web-2", "10.0.0.3"))
        mesh = await client.until(lambda mesh: mesh.workload_at("", ip_address("10.0.0.3")))
        assert mesh.workload_at("", ip_address("10.0.0.2")) is None
        istiod.drop(ADDRESS, records.uid("web-1"))
        istiod.drop(ADDRESS, WEB)
        istiod.drop(AUTHORIZATION, "shop/only-a")
        mesh = await client.until(lambda mesh: not mesh.services and not mesh.policies)
        assert [one.name for one in mesh.workloads] == ["web-2"]


async def test_a_bad_resource_is_refused_by_name_and_the_good_ones_of_its_push_are_taken(
    istiod: Istiod,
) -> None:
    furnish(istiod)
    bad = records.uid("bad")
    istiod.put(ADDRESS, bad, records.workload("bad", tunnel_protocol=2))
    istiod.put(ADDRESS, records.uid("torn"), b"\xff\xff\xff")
    async with following(istiod) as client:
        await client.started.wait()
        assert client.snapshot.workload(records.uid("web-1")) is not None
        assert client.snapshot.workload(bad) is None
        await eventually(
            lambda: any(one.HasField("error_detail") for one in istiod.streams[0].requests), 5
        )
        (nack,) = [one for one in istiod.streams[0].requests if one.HasField("error_detail")]
        assert f"{bad}: tunnel protocol 2 is not known to this version" in nack.error_detail.message
        assert f"{records.uid('torn')}: not an istio.workload.Address" in nack.error_detail.message
        assert client.source.error is not None
        assert client.source.statistics().refused == 2
        # What was refused is not claimed on the next stream, so it is sent again.
        istiod.hang_up()
        await _streams(istiod, 2)
        claimed = istiod.streams[1].requests[0].initial_resource_versions
        assert set(claimed) == {records.uid("web-1"), WEB}


async def test_a_policy_that_cannot_be_evaluated_fails_closed_and_is_refused(
    istiod: Istiod,
) -> None:
    furnish(istiod)
    strange = records.policy("only-a", "cluster.local/ns/a/sa/a", action=7)
    async with following(istiod) as client:
        await client.started.wait()
        istiod.put(AUTHORIZATION, "shop/only-a", strange)
        mesh = await client.until(lambda mesh: mesh.policy("shop/only-a").inexpressible)
        policy = mesh.policy("shop/only-a")
        assert policy is not None
        assert policy.action is PolicyAction.DENY
        await eventually(
            lambda: any(one.HasField("error_detail") for one in istiod.streams[0].requests), 5
        )


async def test_a_match_field_of_a_later_version_makes_its_policy_fail_closed(
    istiod: Istiod,
) -> None:
    known = authorization_pb2.Match(destination_ports=[80]).SerializeToString()
    later = known + b"\x6a\x02\x0a\x00"  # field 13, extensions
    match = authorization_pb2.Match.FromString(later)
    rule = authorization_pb2.Rule(clauses=[authorization_pb2.Clause(matches=[match])])
    payload = authorization_pb2.Authorization(
        name="later", namespace="shop", scope=authorization_pb2.NAMESPACE, rules=[rule]
    ).SerializeToString()
    istiod.put(AUTHORIZATION, "shop/later", payload)
    async with following(istiod) as client:
        await client.started.wait()
        policy = client.snapshot.policy("shop/later")
        assert policy is not None
        assert "[13]" in policy.inexpressible


async def _streams(istiod: Istiod, count: int) -> None:
    await eventually(
        lambda: len(istiod.streams) >= count and len(istiod.streams[count - 1].requests) >= 2, 20
    )


async def test_a_reconnect_names_the_versions_held_and_brings_only_what_changed(
    istiod: Istiod,
) -> None:
    furnish(istiod)
    async with following(istiod) as client:
        await client.started.wait()
        before = client.snapshot.workload(records.uid("web-1"))
        istiod.hang_up()
        istiod.put(ADDRESS, records.uid("new"), records.workload("new", "10.0.0.9"))
        istiod.drop(ADDRESS, WEB)
        mesh = await client.until(lambda mesh: mesh.workload(records.uid("new")))
        await client.until(lambda mesh: not mesh.services)
        assert mesh.workload(records.uid("web-1")) is before
        again = istiod.streams[1].requests
        assert dict(again[0].initial_resource_versions) == {records.uid("web-1"): "1", WEB: "1"}
        assert dict(again[1].initial_resource_versions) == {"shop/only-a": "1"}
        assert client.source.terminations[Ending.RECONNECT] == 1


async def test_a_stream_that_is_cut_inside_a_message_loses_nothing_that_was_in_force(
    istiod: Istiod,
) -> None:
    furnish(istiod)

    async def truncated(stream: Stream) -> None:
        await stream.request()
        await stream.push(ADDRESS, {records.uid("x"): records.workload("x", "10.0.0.7")})
        await stream.push(AUTHORIZATION)
        for _ in range(3):
            await stream.request()
        await stream.call.send(b"\0\0\0\1\0" + b"half", raw=True)
        istiod.script = None
        istiod.hang_up()

    istiod.script = truncated
    async with following(istiod) as client:
        await client.started.wait()
        assert client.snapshot.workload(records.uid("x")) is not None
        mesh = await client.until(lambda mesh: mesh.workload(records.uid("web-1")))
        assert mesh.workload(records.uid("x")) is None, "the next stream said that it is gone"


async def test_events_that_come_twice_or_in_the_wrong_order_end_in_the_same_mesh(
    istiod: Istiod,
) -> None:
    one = records.workload("a", "10.0.0.1", services={WEB: {80: 8080}})

    async def muddled(stream: Stream) -> None:
        await stream.request()
        await stream.push(ADDRESS, {}, ("never-there", "shop/never.there"))
        await stream.push(ADDRESS, {records.uid("a"): one})
        await stream.push(ADDRESS, {records.uid("a"): one})
        await stream.push(ADDRESS, {WEB: records.service(HOST, "10.9.0.1")})
        await stream.push(ADDRESS, {}, (records.uid("b"),))
        await stream.push(ADDRESS, {records.uid("b"): records.workload("b", "10.0.0.2")})
        await stream.push(ADDRESS, {records.uid("c"): one}, (records.uid("c"),))
        await stream.push("type.googleapis.com/unasked.For", {"x": b""})
        await stream.push(AUTHORIZATION)
        await trio.sleep_forever()

    istiod.script = muddled
    async with following(istiod) as client:
        await client.started.wait()
        mesh = client.snapshot
        assert {each.name for each in mesh.workloads} == {"a", "b"}
        service = mesh.service("shop", HOST)
        assert service is not None
        assert [each.workload.name for each in mesh.endpoints(service)] == ["a"]


async def test_the_token_is_read_again_for_each_stream(istiod: Istiod) -> None:
    furnish(istiod)
    async with following(istiod) as client:
        await client.started.wait()
        istiod.tokens = {"second-token"}
        istiod.hang_up()
        await eventually(lambda: client.source.terminations[Ending.CONNECTION_ERROR] >= 2, 10)
        assert client.source.error is not None
        assert "UNAUTHENTICATED" in client.source.error.what
        assert client.source.healthy, "what was in force stays"
        istiod.token_file.write_text("second-token")
        await _streams(istiod, 2)
        assert istiod.streams[1].call.headers["authorization"] == "Bearer second-token"


async def test_without_a_token_file_the_reason_says_which(istiod: Istiod) -> None:
    istiod.token_file.unlink()
    async with following(istiod) as client:
        await eventually(lambda: client.source.error is not None, 10)
        assert str(istiod.token_file) in client.source.error.what
        assert not client.started.is_set()


async def test_roots_are_read_again_for_each_connection(istiod: Istiod, tmp_path: Path) -> None:
    right = istiod.root_file.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    async with serving(other) as stranger:
        istiod.root_file.write_bytes(stranger.root_file.read_bytes())
    async with following(istiod) as client:
        await eventually(lambda: client.source.error is not None, 10)
        assert "certificate verify failed" in client.source.error.what
        istiod.root_file.write_bytes(right)
        with trio.fail_after(20):
            await client.started.wait()


async def test_a_certificate_for_another_name_is_refused(istiod: Istiod) -> None:
    plane = istiod.plane(name="istiod.elsewhere.svc")
    with pytest.raises(Exception, match="elsewhere") as caught:
        async with plane.channel():
            pass
    assert NAME not in str(caught.value)


async def test_istiod_may_come_up_after_the_agent(tmp_path: Path) -> None:
    async with serving(tmp_path) as istiod:
        furnish(istiod)
    async with following(istiod) as client:
        await eventually(lambda: client.source.terminations[Ending.CONNECTION_ERROR] >= 3, 10)
        assert not client.started.is_set()
        assert not client.source.healthy
        async with serving(tmp_path, istiod=istiod):
            with trio.fail_after(20):
                await client.started.wait()
            assert len(client.snapshot.workloads) == 1


async def test_ten_thousand_workloads_arrive_in_one_push(istiod: Istiod) -> None:
    for number in range(10_000):
        name = f"web-{number}"
        ip = f"10.1.{number >> 8}.{number & 255}"
        istiod.resources[ADDRESS][records.uid(name)] = records.workload(name, ip)
    async with following(istiod) as client:
        with trio.fail_after(40):
            await client.started.wait()
        assert len(client.snapshot.workloads) == 10_000
        assert client.snapshot.workload_at("", ip_address("10.1.39.15")) is not None
        assert client.source.message_bytes[ADDRESS] > 500_000
        istiod.drop(ADDRESS, records.uid("web-7"))
        await client.until(lambda mesh: len(mesh.workloads) == 9_999)


async def test_ztunnels_metrics_tell_of_messages_and_endings(istiod: Istiod) -> None:
    furnish(istiod)
    async with following(istiod) as client:
        await client.started.wait()
        istiod.hang_up()
        await _streams(istiod, 2)
        await eventually(lambda: client.source.messages[ADDRESS] == 2)
        text = "".join(render(one, openmetrics=True) for one in client.source.families())
    assert 'istio_xds_connection_terminations_total{reason="Reconnect"} 1' in text
    assert f'istio_xds_message_total{{url="{ADDRESS}"}} 2' in text
    size = client.source.message_bytes[ADDRESS]
    assert f'istio_xds_message_bytes_total{{url="{ADDRESS}"}} {size}' in text


async def test_workloads_that_run_ahead_of_their_policy_wait_for_it(istiod: Istiod) -> None:
    furnish(istiod)
    async with following(istiod) as client:
        await client.started.wait()
        seen: list[bool] = []
        uid = records.uid("web-1")

        def note(mesh: Snapshot) -> None:
            workload = mesh.workload(uid)
            assert workload is not None
            seen.append(any(one.inexpressible for one in mesh.policies_for(workload)))

        client.mesh.on_change(note)
        key = "shop/selected"
        istiod.put(
            ADDRESS, uid, records.workload("web-1", "10.0.0.1", authorization_policies=[key])
        )
        await trio.sleep(0.1)
        policy = records.policy(
            "selected",
            "cluster.local/ns/a/sa/a",
            scope=authorization_pb2.WORKLOAD_SELECTOR,
        )
        istiod.put(AUTHORIZATION, key, policy)
        await client.until(lambda mesh: len(mesh.policies_for(mesh.workload(uid))) == 2)
        assert not any(seen), "it was never closed for want of the policy"
        # One that never comes: after a second nothing is let in.
        istiod.put(
            ADDRESS, uid, records.workload("web-1", "10.0.0.1", authorization_policies=["shop/x"])
        )
        await client.until(lambda mesh: seen[-1])
