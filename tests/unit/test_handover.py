"""The pair between an agent and its successor: what arrives, and what the end of it means."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from meshbpf.agent.core.errors import ConfigError
from meshbpf.agent.handover import (
    ENVIRONMENT,
    Channel,
    Descriptors,
    Failed,
    Go,
    HandoverError,
    Hello,
    Inheritance,
    Offer,
    Ready,
)


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = Channel.pair()
    yield ours, theirs
    ours.close()
    theirs.close()


def offer(channel: Channel) -> None:
    channel.send(Offer(pid=7, version="1", state_dir="/s", agent_id="a" * 16))


def test_descriptors_arrive_under_their_names_and_close_on_exec(
    pair: tuple[Channel, Channel],
) -> None:
    agent, successor = pair
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as two:
        names = ("stats", "listener/web/a/outbound/ipv4")
        agent.send(Descriptors(names), [one.fileno(), two.fileno()])
        agent.send(Descriptors(("lock",)), [one.fileno()])
        offer(agent)
        got = Inheritance.receive(successor, 8, "2")
        assert agent.receive()[0] == Hello(8, "2")
        (stats,) = got.take("stats")
        with socket.socket(fileno=stats) as taken:
            assert taken.getsockname() == one.getsockname()
            assert not taken.get_inheritable()
        pods = got.pods()
        assert list(pods) == [names[1]]
        for fd in (*pods[names[1]], *got.take("lock")):
            os.close(fd)
        assert got.stored == {}


def test_a_message_out_of_turn_ends_the_handover(pair: tuple[Channel, Channel]) -> None:
    agent, successor = pair
    agent.send(Go())
    with pytest.raises(HandoverError, match="says Go when it is not its turn"):
        Inheritance.receive(successor, 8, "2")


def test_the_end_of_the_pair_is_an_error_with_a_reason(pair: tuple[Channel, Channel]) -> None:
    agent, successor = pair
    successor.close()
    with pytest.raises(HandoverError, match="ended without a word"):
        agent.receive()
    with pytest.raises(HandoverError, match="ended without a word"):
        agent.send(Go())


def test_what_another_version_says_is_refused_with_advice(pair: tuple[Channel, Channel]) -> None:
    agent, successor = pair
    agent.sock.send(b'{"type":"dance"}')
    with pytest.raises(HandoverError, match="does not understand") as caught:
        successor.receive()
    assert "restart" in caught.value.hint


def test_a_failure_is_told_with_its_exit_status(pair: tuple[Channel, Channel]) -> None:
    agent, successor = pair
    successor.fail(ConfigError("bad-option", "lease: wrong", "mend it"))
    message, _ = agent.receive()
    assert isinstance(message, Failed)
    assert (message.error.what, message.error.exit_status) == ("lease: wrong", 78)


def test_a_failure_that_nobody_hears_is_no_second_failure() -> None:
    agent, successor = Channel.pair()
    agent.close()
    successor.fail(ConfigError("bad-option", "lease: wrong"))


def test_the_variable_is_taken_out_of_the_environment() -> None:
    ours, theirs = Channel.pair()
    environ = {ENVIRONMENT: str(os.dup(theirs.fileno()))}
    found = Channel.inherited(environ)
    assert found is not None
    assert environ == {}
    assert Channel.inherited(environ) is None
    found.send(Ready())
    assert ours.receive()[0] == Ready()
    for channel in (ours, theirs, found):
        channel.close()
    with pytest.raises(HandoverError, match="no socket"):
        Channel.inherited({ENVIRONMENT: "9999"})
