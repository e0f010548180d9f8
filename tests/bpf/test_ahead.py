"""What makes an attach short: programs loaded ahead, and short grace periods for its time."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.agent.datapath import grace_periods, links, programs
from meshbpf.agent.datapath.grace_periods import SWITCH, expedited
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import SPARES, PodSteering, Steering
from meshbpf.agent.datapath.uproot import uproot
from tests.bpf import lab
from tests.bpf.conftest import Open
from tests.bpf.lab import TinyAgent, dial
from tests.bpf.test_lifecycle import map_ids, programs_using, settles


@pytest.fixture(autouse=True)
def normal() -> Iterator[None]:
    """The host's setting as it is found on most machines, and as it was at the end."""
    if not SWITCH.exists():
        pytest.skip("this kernel has no rcu_expedited")
    before = SWITCH.read_text()
    SWITCH.write_text("0")
    yield
    SWITCH.write_text(before)


def setting() -> int:
    return int(SWITCH.read_text())


def spy(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[int]:
    """Notes the host's setting at each call of a function."""
    seen: list[int] = []
    real = getattr(module, name)

    def call(*args: object, **kwargs: object) -> object:
        seen.append(setting())
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, call)
    return seen


# --- grace periods ------------------------------------------------------------


def test_they_are_short_for_the_time_of_an_attach_and_a_detach(
    steering: Steering, pod: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = spy(monkeypatch, links, "hold_point")
    detached = spy(monkeypatch, links, "drop_point")
    listeners = lab.open_listeners(pod)
    steering.attach(PodSteering("ns/pod", pod), listeners)
    assert setting() == 0
    steering.detach("ns/pod")
    assert setting() == 0
    assert set(attached) == set(detached) == {1}
    for sock in listeners.values():
        sock.close()


def test_they_are_normal_again_after_an_attach_that_fails(
    steering: Steering, pod: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(links, "hold_point", fail)
    with pytest.raises(KeyboardInterrupt):
        steering.attach(PodSteering("ns/pod", pod), {})
    assert setting() == 0


def test_a_setting_of_somebody_else_stays(steering: Steering, pod: Netns) -> None:
    SWITCH.write_text("1")
    steering.attach(PodSteering("ns/pod", pod), {})
    steering.detach("ns/pod")
    assert setting() == 1


@pytest.mark.parametrize("switch", ["absent", "/sys/kernel/oops_count"])
def test_where_it_cannot_be_set_pods_are_attached_all_the_same(
    steering: Steering, pod: Netns, switch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(grace_periods, "SWITCH", tmp_path / switch)
    steering.attach(PodSteering("ns/pod", pod), {})
    assert [one.key for one in steering.attached()] == ["ns/pod"]
    steering.detach("ns/pod")


def killed_in_the_midst(agent: Steering) -> None:
    """What an agent leaves that is killed while it attaches: nothing runs afterwards."""
    block = expedited(agent._pins.directory)
    block.__enter__()
    left.append(block)
    assert setting() == 1
    agent.close()


left: list[object] = []
"""Blocks that were never left: kept, since a generator ends its block when collected."""


@pytest.mark.parametrize("by", ["the next agent", "another agent", "the removal"])
def test_what_a_killed_agent_has_left_is_taken_back(open_steering: Open, by: str) -> None:
    agent = open_steering()
    name = agent._pins.agent.name
    killed_in_the_midst(agent)
    if by == "the next agent":
        open_steering(name)
    elif by == "another agent":
        open_steering()
        assert not agent._pins.agent.exists()
    else:
        uproot(name)
    assert setting() == 0


def test_a_successor_in_a_reload_may_be_faster_than_the_block(open_steering: Open) -> None:
    agent = open_steering()
    with expedited(agent._pins.directory):
        grace_periods.take_back(agent._pins.directory)
        assert setting() == 0
    assert setting() == 0


# --- programs loaded ahead ------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The programs that were loaded, by name."""
    names: list[str] = []
    real = programs.load_program

    def load(compiled: object, name: str, *rest: object) -> object:
        names.append(name)
        return real(compiled, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(programs, "load_program", load)
    return names


def test_an_attach_takes_what_was_loaded_ahead(
    steering: Steering, pod: Netns, peer: Netns, loaded: list[str]
) -> None:
    steering.prepare()
    assert len(loaded) == SPARES * len(programs.PER_POD)
    loaded.clear()
    agent = TinyAgent(steering, pod)
    agent.start()
    try:
        steering.attach(PodSteering("ns/pod", pod), agent.listeners)
        assert loaded == []
        assert dial(pod, lab.MESH_V4) == f"OUTBOUND {lab.MESH_V4} 80 from {lab.POD_V4}"
        steering.prepare()
        assert len(loaded) == len(programs.PER_POD)
        steering.prepare()
        assert len(loaded) == len(programs.PER_POD)
    finally:
        agent.stop()
        steering.detach("ns/pod")


def test_each_pod_gets_the_programs_of_its_own_index(
    steering: Steering, pod: Netns, peer: Netns, loaded: list[str]
) -> None:
    steering.prepare()
    agents = [TinyAgent(steering, netns) for netns in (pod, peer)]
    try:
        for number, agent in enumerate(agents):
            agent.start()
            steering.attach(PodSteering(f"ns/{number}", agent.netns), agent.listeners)
        for agent, address in zip(agents, (lab.POD_V4, lab.PEER_V4), strict=True):
            assert dial(agent.netns, lab.MESH_V4) == f"OUTBOUND {lab.MESH_V4} 80 from {address}"
    finally:
        for number, agent in enumerate(agents):
            agent.stop()
            steering.detach(f"ns/{number}")


def test_they_end_with_the_agent(open_steering: Open) -> None:
    agent = open_steering()
    maps = map_ids(agent)
    idle = programs_using(maps)
    agent.prepare()
    assert len(programs_using(maps)) == len(idle) + SPARES * len(programs.PER_POD)
    agent.close()
    agent.prepare()  # too late: nothing
    assert settles(lambda: programs_using(maps), idle)


def test_pods_come_and_go_while_others_are_prepared_for(
    steering: Steering, pod: Netns, peer: Netns
) -> None:
    ended = threading.Event()
    failures: list[BaseException] = []

    def prepare() -> None:
        try:
            while not ended.is_set():
                steering.prepare()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=prepare)
    thread.start()
    try:
        for number in range(30):
            for netns in (pod, peer):
                steering.attach(PodSteering(f"ns/{netns.path.name}", netns), {})
            indexes = [one.index for one in steering.attached()]
            assert len(set(indexes)) == 2, number
            for netns in (pod, peer):
                steering.detach(f"ns/{netns.path.name}")
    finally:
        ended.set()
        thread.join()
    assert failures == []
    steering.prepare()
    ready = steering._attacher.spares.indexes()
    assert len(ready) == SPARES


def test_an_agent_that_closes_while_it_prepares_waits_for_that(open_steering: Open) -> None:
    for _ in itertools.repeat(None, 5):
        agent = open_steering()
        maps = map_ids(agent)
        idle = programs_using(maps)
        thread = threading.Thread(target=agent.prepare)
        thread.start()
        agent.close()
        thread.join()
        assert settles(lambda maps=maps: programs_using(maps), idle)
