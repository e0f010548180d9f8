"""A client and a server joined by bytes that are cut anywhere: nothing is lost or stuck."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.agent.wire.events import (
    DataReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)
from meshbpf.agent.wire.hbone import HboneConnection
from meshbpf.agent.wire.headers import response

REQUEST = ((b":method", b"CONNECT"), (b":authority", b"198.18.0.2:80"))


@dataclass
class End:
    """One end, with what it still wants to send and what it got."""

    wire: HboneConnection
    to_send: dict[int, bytes] = field(default_factory=dict)
    got: dict[int, bytearray] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    uncredited: dict[int, int] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    incoming: bytearray = field(default_factory=bytearray)

    def receive(self, size: int) -> None:
        piece = bytearray(self.incoming[:size])
        del self.incoming[:size]
        for event in self.wire.receive(memoryview(piece)):
            match event:
                case RequestReceived(stream_id):
                    self.wire.respond(stream_id, response(200), end_stream=False)
                    self.answered.add(stream_id)
                case ResponseReceived(stream_id):
                    self.answered.add(stream_id)
                case DataReceived(stream_id, views, count):
                    self.got.setdefault(stream_id, bytearray()).extend(b"".join(views))
                    self.uncredited[stream_id] = self.uncredited.get(stream_id, 0) + count
                case StreamEnded(stream_id):
                    self.ended.add(stream_id)
                case StreamReset():
                    raise AssertionError(f"nobody resets here: {event}")
                case _:
                    pass

    def send(self, stream_id: int, limit: int) -> None:
        """As much as the windows allow, at most `limit`; the end once all is sent."""
        left = self.to_send.get(stream_id)
        if left is None or stream_id not in self.answered:
            return
        size = min(limit, len(left), self.wire.send_budget(stream_id), self.wire.max_frame_bytes)
        if size > 0:
            self.wire.send_data(stream_id, left[:size])
            self.to_send[stream_id] = left[size:]
        if not self.to_send[stream_id]:
            del self.to_send[stream_id]
            self.wire.end(stream_id)

    def credit(self) -> None:
        for stream_id, count in self.uncredited.items():
            self.wire.credit(stream_id, count)
        self.uncredited.clear()


steps = st.lists(
    st.tuples(st.booleans(), st.integers(0, 3), st.integers(1, 70_000), st.booleans()),
    max_size=60,
)
sizes = st.lists(
    st.tuples(st.integers(0, 300_000), st.integers(0, 300_000)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(sizes, steps)
def test_every_byte_arrives_in_order_whatever_the_timing(
    streams: list[tuple[int, int]], script: list[tuple[bool, int, int, bool]]
) -> None:
    client, server = End(HboneConnection(server=False)), End(HboneConnection(server=True))
    expected: dict[int, tuple[bytes, bytes]] = {}
    for end in (client, server):
        end.wire.start()
    for up, down in streams:
        stream_id = client.wire.open(REQUEST)
        pattern = bytes((stream_id * 7 + n) % 256 for n in range(251))
        data = (pattern * 1200)[:up], (pattern[::-1] * 1200)[:down]
        client.to_send[stream_id], server.to_send[stream_id] = data
        expected[stream_id] = data

    def exchange(size: int) -> None:
        for end, other in ((client, server), (server, client)):
            other.incoming += end.wire.out
            end.wire.out.clear()
            other.receive(size)

    ids = list(expected)
    for from_client, index, size, credits_now in script:
        (client if from_client else server).send(ids[index % len(ids)], size)
        if credits_now:
            client.credit()
            server.credit()
        exchange(size)
    # Whatever state the script left: going on fairly ends it.
    for _ in range(400):
        for end in (client, server):
            for stream_id in ids:
                end.send(stream_id, 70_000)
            end.credit()
        exchange(1 << 20)
    for stream_id, (up_data, down_data) in expected.items():
        assert bytes(server.got.get(stream_id, b"")) == up_data
        assert bytes(client.got.get(stream_id, b"")) == down_data
        assert stream_id in client.ended
        assert stream_id in server.ended
    assert client.wire.stream_count == server.wire.stream_count == 0
