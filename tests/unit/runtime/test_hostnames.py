"""Looking up the hostnames of workloads that have no address."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio
import trio.testing

from meshbpf.agent.core.address import parse_ip
from meshbpf.agent.runtime import hostnames
from meshbpf.agent.runtime.hostnames import KEPT_S, LIMIT_S, Hostnames


class Resolver:
    """Stands for getaddrinfo: counts the questions, and may be slow or not know."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.pause_s = 0.0
        self.fails = False
        monkeypatch.setattr(trio.socket, "getaddrinfo", self)

    async def __call__(self, host: str, port: None, **_: object) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        await trio.sleep(self.pause_s)
        if self.fails:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", 0, 0, 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 17, "", ("192.0.2.1", 0)),
        ]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    return Resolver(monkeypatch)


async def test_each_address_is_told_once_in_the_resolvers_order(resolver: Resolver) -> None:
    found = await Hostnames().addresses("db.example.com")
    assert list(found) == [parse_ip("fd00::1"), parse_ip("192.0.2.1")]


async def test_an_answer_is_kept_for_a_few_seconds(
    resolver: Resolver, autojump_clock: trio.testing.MockClock
) -> None:
    names = Hostnames()
    for _ in range(3):
        await names.addresses("db.example.com")
    assert len(resolver.asked) == 1
    await trio.sleep(KEPT_S + 0.1)
    await names.addresses("db.example.com")
    assert len(resolver.asked) == 2


async def test_many_at_once_ask_once(
    resolver: Resolver, autojump_clock: trio.testing.MockClock
) -> None:
    resolver.pause_s = 1.0
    names = Hostnames()
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(names.addresses, "db.example.com")
    assert len(resolver.asked) == 1


async def test_a_name_that_is_not_there_has_no_address_and_is_not_asked_for_at_once(
    resolver: Resolver,
) -> None:
    resolver.fails = True
    names = Hostnames()
    assert not await names.addresses("gone.example.com")
    assert not await names.addresses("gone.example.com")
    assert len(resolver.asked) == 1


async def test_a_silent_resolver_is_given_up(
    resolver: Resolver, autojump_clock: trio.testing.MockClock
) -> None:
    resolver.pause_s = 1000.0
    begun = trio.current_time()
    assert not await Hostnames().addresses("db.example.com")
    assert trio.current_time() - begun == pytest.approx(LIMIT_S)


async def test_who_waited_for_a_cancelled_question_asks_again(
    resolver: Resolver, autojump_clock: trio.testing.MockClock
) -> None:
    resolver.pause_s = 1.0
    names = Hostnames()
    async with trio.open_nursery() as nursery:

        async def impatient() -> None:
            with trio.move_on_after(0.5):
                await names.addresses("db.example.com")

        nursery.start_soon(impatient)
        await trio.sleep(0.1)
        assert await names.addresses("db.example.com")
    assert len(resolver.asked) == 2


async def test_what_is_kept_is_bounded(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hostnames, "KEPT_NAMES", 10)
    names = Hostnames()
    for number in range(35):
        await names.addresses(f"n{number}.example.com")
    assert len(names._known) <= 10
