"""Attach and detach: atomic, repeatable, without a trace; and agents that share a host."""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshbpf.agent.core.errors import MeshbpfError
from meshbpf.agent.datapath import attaching, bpfinfo, links, plumbing, podmaps, steering
from meshbpf.agent.datapath.bpfcall import BpfError
from meshbpf.agent.datapath.bpffs import PIN_ROOT
from meshbpf.agent.datapath.netns import Netns
from meshbpf.agent.datapath.steering import OnAgentDown, PodSteering, Steering
from tests.bpf import lab
from tests.bpf.conftest import Open
from tests.bpf.lab import TinyAgent, dial

SYSCTLS = (
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
    "net/ipv4/conf/lo/accept_local",
    "net/ipv4/conf/lo/rp_filter",
    "net/ipv4/tcp_early_demux",
)

HOOKS = ["connect4", "connect6", "getpeername4", "getpeername6", "sock_ops"]


def traces(netns: Netns) -> dict[str, str]:
    """All that steering could leave in the pod's namespace and on its host end."""
    found = {
        " ".join(argv): lab.ip(lab.POD, *argv)
        for argv in (
            ("rule",),
            ("-6", "rule"),
            ("route", "show", "table", "all"),
            ("-6", "route", "show", "table", "all"),
        )
    }
    with netns.entered():
        found |= {name: Path("/proc/sys", name).read_text() for name in SYSCTLS}
        found["pod qdisc"] = lab.run("tc", "qdisc", "show")
        found["pod tcx"] = str(bpfinfo.prog_query(_eth0(), 47))
        found["sk_lookup"] = str(bpfinfo.prog_query(netns.fd, 36))
    found["host qdisc"] = lab.run("tc", "qdisc", "show")
    host_end = socket.if_nametoindex(f"{lab.TAG}v1")
    found["host tcx"] = str([bpfinfo.prog_query(host_end, kind) for kind in (46, 47)])
    return found


def _eth0() -> int:
    return socket.if_nametoindex("eth0")


def map_ids(made: Steering) -> frozenset[int]:
    return frozenset(bpfinfo.map_info(one.fileno()).id for one in made._maps.values())


def programs_using(maps: frozenset[int]) -> set[int]:
    """Ids of loaded programs that use one of these maps: other agents' do not count."""
    found = set()
    for number in bpfinfo.prog_ids():
        try:
            fd = bpfinfo.prog_by_id(number)
        except BpfError:
            continue  # unloaded meanwhile
        try:
            if maps & set(bpfinfo.prog_info(fd).map_ids):
                found.add(number)
        finally:
            os.close(fd)
    return found


def settles(count: Callable[[], object], expected: object, limit_s: float = 3) -> bool:
    """The kernel frees programs and maps after a grace period."""
    end = time.monotonic() + limit_s
    while count() != expected and time.monotonic() < end:
        time.sleep(0.02)
    return count() == expected


def test_detach_leaves_no_trace(steering: Steering, pod: Netns, peer: Netns) -> None:
    before, maps = traces(pod), map_ids(steering)
    idle = programs_using(maps)
    tiny = TinyAgent(steering, pod)
    tiny.start()
    try:
        steering.attach(PodSteering("ns/pod", pod), tiny.listeners)
        assert traces(pod) != before
        assert dial(pod, lab.MESH_V4).startswith("OUTBOUND")
        assert dial(peer, lab.POD_V6, 15008).startswith("HBONE")
        steering.detach("ns/pod")
    finally:
        tiny.stop()
    assert traces(pod) == before
    assert steering.attached() == ()
    assert list(steering._pins.directory.glob("links/*")) == []
    assert settles(lambda: programs_using(maps), idle)
    steering.detach("ns/pod")


def test_destroy_leaves_no_trace(open_steering: Open, pod: Netns, capture: str) -> None:
    before = traces(pod)
    made = open_steering(mode=capture)
    maps, folder = map_ids(made), made._pins.agent
    tiny = TinyAgent(made, pod)
    tiny.start()
    made.attach(PodSteering("ns/pod", pod), tiny.listeners)
    tiny.stop()
    made.destroy()
    assert traces(pod) == before
    assert not folder.exists()
    assert settles(lambda: programs_using(maps), set())
    assert settles(lambda: maps & set(bpfinfo.map_ids()), frozenset())


FAILURES: dict[str, tuple[object, str]] = {
    "maps": (podmaps.PodMaps, "fill"),
    "listeners": (podmaps.PodMaps, "set_listeners"),
    "routes": (plumbing.rtnetlink, "add_rule"),
    "sk_lookup": (links, "hold_sk_lookup"),
    "tc": (links, "hold_point"),
    "connect": (podmaps.PodMaps, "start_connect_hook"),
}


@pytest.mark.parametrize("step", FAILURES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_failing_attach_leaves_no_trace(
    steering: Steering, pod: Netns, step: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, maps = traces(pod), map_ids(steering)
    idle = programs_using(maps)
    owner, name = FAILURES[step]
    real = getattr(owner, name)

    def fail(*args: object, **kwargs: object) -> object:
        if after:
            real(*args, **kwargs)
        raise MeshbpfError("made-up", "the step failed")

    listeners = lab.open_listeners(pod)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(MeshbpfError, match="the step failed"):
        steering.attach(PodSteering("ns/pod", pod), listeners)
    monkeypatch.undo()
    for sock in listeners.values():
        sock.close()
    assert traces(pod) == before
    assert steering.attached() == ()
    assert list(steering._records) == []
    assert settles(lambda: programs_using(maps), idle)


def test_a_second_attach_changes_nothing_and_cuts_nothing(
    own_agent: TinyAgent, peer: Netns
) -> None:
    first, before = own_agent.steering.attached(), traces(own_agent.netns)
    with own_agent.netns.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect((lab.MESH_V4, 80))
        own_agent.steering.attach(PodSteering("ns/pod", own_agent.netns), own_agent.listeners)
        sock.sendall(b"hello")
        assert sock.recv(100).startswith(b"OUTBOUND")
    assert own_agent.steering.attached() == first
    assert traces(own_agent.netns) == before
    assert dial(peer, lab.POD_V4).startswith("INBOUND")


def test_a_second_attach_may_change_the_fail_mode(own_agent: TinyAgent, peer: Netns) -> None:
    own_agent.steering.attach(
        PodSteering("ns/pod", own_agent.netns, on_agent_down=OnAgentDown.OPEN), own_agent.listeners
    )
    (found,) = own_agent.steering.attached()
    assert found.on_agent_down is OnAgentDown.OPEN
    own_agent.stop()
    assert dial(peer, lab.POD_V4) == f"app pod saw {lab.PEER_V4}"


def test_a_second_attach_that_fails_leaves_the_pod_as_it_was(
    own_agent: TinyAgent, peer: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MeshbpfError("made-up", "the step failed")

    before = own_agent.steering.attached()
    monkeypatch.setattr(attaching.links, "hold_point", fail)
    wanted = PodSteering("ns/pod", own_agent.netns, exempt_ports=frozenset({80}))
    with pytest.raises(MeshbpfError, match="the step failed"):
        own_agent.steering.attach(wanted, own_agent.listeners)
    monkeypatch.undo()
    assert own_agent.steering.attached() == before
    assert dial(peer, lab.POD_V4).startswith("INBOUND")


def test_a_namespace_is_attached_under_one_name_only(own_agent: TinyAgent) -> None:
    with pytest.raises(MeshbpfError) as caught:
        own_agent.steering.attach(PodSteering("ns/other", own_agent.netns), own_agent.listeners)
    assert caught.value.code == "netns-attached"


def test_the_agents_own_namespace_is_refused(steering: Steering, in_host: Netns) -> None:
    with pytest.raises(MeshbpfError) as caught:
        steering.attach(PodSteering("ns/host", in_host), {})
    assert caught.value.code == "own-netns"


def test_a_pod_of_another_mesh_is_refused(steering: Steering, pod: Netns) -> None:
    rule = ("rule", "add", "fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100")
    lab.ip(lab.POD, *rule)
    try:
        with pytest.raises(MeshbpfError) as caught:
            steering.attach(PodSteering("ns/pod", pod), {})
        assert caught.value.code == "steered-by-another"
    finally:
        lab.ip(lab.POD, "rule", "del", *rule[2:])


# --- connections over attach and detach ---------------------------------------------------


@pytest.mark.parametrize(
    ("own", "peer_address"),
    [(lab.POD_V4, lab.PEER_V4), (lab.POD_V6, lab.PEER_V6)],
    ids=["v4", "v6"],
)
def test_direct_connections_survive_attach_and_detach(
    steering: Steering, pod: Netns, peer: Netns, own: str, peer_address: str
) -> None:
    steering.set_mesh([*lab.MESH, *lab.PEER_IN_MESH])
    family = lab.family_of(own)
    listeners = {}
    for netns, address in ((peer, peer_address), (pod, own)):
        one = netns.socket(family, socket.SOCK_STREAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((address, 8082))
        one.listen()
        listeners[address] = one
    pairs = []
    for netns, address in ((pod, peer_address), (peer, own)):
        client = netns.socket(family, socket.SOCK_STREAM)
        client.settimeout(2)
        client.connect((address, 8082))
        pairs.append((client, listeners[address].accept()[0]))

    def talk(text: bytes) -> None:
        for client, server in pairs:
            server.settimeout(2)
            client.sendall(text)
            assert server.recv(20) == text
            server.sendall(text)
            assert client.recv(20) == text

    tiny = TinyAgent(steering, pod)
    tiny.start()
    try:
        talk(b"before")
        steering.attach(PodSteering("ns/pod", pod), tiny.listeners)
        talk(b"attached")
        steering.detach("ns/pod")
        talk(b"detached")
    finally:
        tiny.stop()
        for sock in (*listeners.values(), *(one for pair in pairs for one in pair)):
            sock.close()


@pytest.mark.parametrize("mesh", [lab.PEER_V4, lab.PEER_V6], ids=["v4", "v6"])
def test_captured_connections_end_at_a_detach_and_leak_nothing(
    own_agent: TinyAgent, mesh: str
) -> None:
    own_agent.steering.set_mesh(lab.PEER_IN_MESH)
    with (
        lab.wiretap(f"{lab.TAG}v1") as seen,
        own_agent.netns.socket(lab.family_of(mesh), socket.SOCK_STREAM) as sock,
    ):
        sock.settimeout(2)
        sock.connect((mesh, 80))
        own_agent.steering.detach("ns/pod")
        with pytest.raises(OSError, match=r"abort|reset|Broken pipe"):
            sock.sendall(b"secret")
    assert [data for *_, data in seen if data] == []


def test_connections_to_the_app_end_at_a_detach_and_leak_nothing(
    own_agent: TinyAgent, peer: Netns
) -> None:
    """The app would answer the client, whose address the agent had borrowed."""
    listener = own_agent.netns.socket(socket.AF_INET, socket.SOCK_STREAM)
    with listener, lab.wiretap(f"{lab.TAG}v1") as seen:
        listener.bind(("0.0.0.0", 8083))
        listener.listen()
        with peer.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.connect((lab.POD_V4, 8083))
            server, address = listener.accept()
            with server:
                assert address[0] == lab.PEER_V4
                own_agent.steering.detach("ns/pod")
                with pytest.raises(OSError, match=r"abort|reset|Broken pipe"):
                    server.sendall(b"secret")
    assert [data for *_, data in seen if b"secret" in data] == []


# --- namespaces that go, agents that come ------------------------------------------------------


@pytest.fixture
def short_lived(in_host: Netns) -> str:
    name = f"{lab.TAG}-p3"
    lab.remove_pod(name, 3)
    lab.add_pod(name, 3)
    yield name  # type: ignore[misc]
    lab.remove_pod(name, 3)


def test_a_namespace_that_is_gone_is_detached_without_error(
    steering: Steering, short_lived: str
) -> None:
    maps = map_ids(steering)
    idle = programs_using(maps)
    with lab.opened(short_lived) as netns:
        tiny = TinyAgent(steering, netns)
        tiny.start()
        steering.attach(PodSteering("ns/short", netns), tiny.listeners)
        tiny.stop()
    lab.remove_pod(short_lived, 3)
    time.sleep(0.1)
    steering.detach("ns/short")
    assert steering.attached() == ()
    assert list(steering._pins.directory.glob("links/*")) == []
    assert settles(lambda: programs_using(maps), idle)


def test_a_pod_that_came_back_in_another_namespace_takes_the_old_ones_place(
    steering: Steering, short_lived: str
) -> None:
    cookies = []
    for _ in range(2):
        with lab.opened(short_lived) as netns:
            tiny = TinyAgent(steering, netns)
            tiny.start()
            steering.attach(PodSteering("ns/short", netns), tiny.listeners)
            assert dial(netns, lab.MESH_V4).startswith("OUTBOUND")
            cookies.append(netns.cookie)
            tiny.stop()
        lab.remove_pod(short_lived, 3)
        lab.add_pod(short_lived, 3)
    (found,) = steering.attached()
    assert found.cookie == cookies[1] != cookies[0]


def test_a_pod_whose_namespace_went_while_no_agent_ran_is_forgotten(
    open_steering: Open, capture: str, short_lived: str
) -> None:
    first = open_steering(mode=capture)
    name = first._pins.agent.name
    with lab.opened(short_lived) as netns:
        tiny = TinyAgent(first, netns)
        tiny.start()
        first.attach(PodSteering("ns/short", netns), tiny.listeners)
        tiny.stop()
    first.close()
    lab.remove_pod(short_lived, 3)
    second = open_steering(name, mode=capture)
    assert second.attached() == ()
    assert second.problems == ()
    assert list(second._pins.directory.glob("links/*")) == []


def test_a_pod_that_lost_an_interface_does_not_keep_an_agent_from_starting(
    open_steering: Open, capture: str, short_lived: str
) -> None:
    first = open_steering(mode=capture)
    name = first._pins.agent.name
    with lab.opened(short_lived) as netns:
        tiny = TinyAgent(first, netns)
        tiny.start()
        first.attach(PodSteering("ns/short", netns), tiny.listeners)
        tiny.stop()
        first.close()
        lab.ip(lab.HOST, "link", "del", f"{lab.TAG}v3")
        second = open_steering(name, mode=capture)
        assert [one.key for one in second.attached()] == ["ns/short"]
        (problem,) = second.problems
        assert problem.startswith("ns/short: ")
        second.detach("ns/short")
        assert second.attached() == ()


def test_an_agent_may_come_back_in_the_other_capture_mode(open_steering: Open, pod: Netns) -> None:
    agent_id = f"st-modes-{os.getpid()}"
    listeners = lab.open_listeners(pod)
    for mode, hooks in (("auto", HOOKS), ("tc", []), ("auto", None)):
        made = open_steering(agent_id, mode=mode)
        made.set_mesh(lab.MESH)
        made.beat(lease_s=60)
        made.attach(PodSteering("ns/pod", pod), listeners)
        found = sorted(path.name for path in made._pins.cgroup().iterdir())
        assert found == (hooks if hooks is not None else HOOKS)
        assert made.capture_in_force == ("tc" if mode == "tc" else "connect+tc")
        with pod.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.settimeout(2)
            sock.connect((lab.MESH_V4, 80))
    for sock in listeners.values():
        sock.close()


def test_an_agent_that_is_gone_with_its_pods_is_swept_away_by_the_next(
    open_steering: Open, capture: str, short_lived: str
) -> None:
    lost = open_steering(mode=capture)
    folder, maps = lost._pins.agent, map_ids(lost)
    with lab.opened(short_lived) as netns:
        tiny = TinyAgent(lost, netns)
        tiny.start()
        lost.attach(PodSteering("ns/short", netns), tiny.listeners)
        tiny.stop()
    open_steering(mode=capture)
    assert folder.is_dir()  # it lives
    lost.close()
    open_steering(mode=capture)
    assert folder.is_dir()  # its pod lives
    lab.remove_pod(short_lived, 3)
    open_steering(mode=capture)
    assert not folder.exists()
    assert settles(lambda: programs_using(maps), set())


def test_two_agents_share_a_host_and_do_not_mix(
    own_agent: TinyAgent, open_steering: Open, capture: str, short_lived: str
) -> None:
    second = open_steering(mode=capture)
    second.set_mesh(lab.PEER_IN_MESH)
    with lab.opened(short_lived) as netns, lab.app(netns, "short"):
        tiny = TinyAgent(second, netns)
        tiny.start()
        second.attach(PodSteering("ns/short", netns), tiny.listeners)
        try:
            assert dial(netns, lab.PEER_V4).startswith("OUTBOUND")
            assert dial(own_agent.netns, lab.MESH_V4).startswith("OUTBOUND")
            tiny.stop()
            assert dial(netns, lab.PEER_V4) == "ECONNREFUSED"
            assert dial(own_agent.netns, lab.MESH_V4).startswith("OUTBOUND")
        finally:
            tiny.stop()
    second.destroy()
    assert dial(own_agent.netns, lab.MESH_V4).startswith("OUTBOUND")


def test_an_upgrade_replaces_programs_link_by_link_and_keeps_connections(
    own_agent: TinyAgent, capture: str, open_steering: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = own_agent.steering
    real = steering.compile_catalogue

    def other_schema(cache_dir: Path) -> object:
        return dataclasses.replace(real(cache_dir), schema="0123456789abcdef")

    monkeypatch.setattr(steering, "compile_catalogue", other_schema)
    with own_agent.netns.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
        sock.settimeout(2)
        sock.connect((lab.MESH_V6, 80))
        new = open_steering(old._pins.agent.name, mode=capture)
        assert [path.name for path in new._pins.agent.iterdir()] == ["0123456789abcdef"]
        # The old agent lives on until its own end, and so do its listeners.
        sock.sendall(b"hello")
        assert sock.recv(100).startswith(b"OUTBOUND")
    assert dial(own_agent.netns, lab.MESH_V4).startswith("OUTBOUND")
    assert [one.key for one in new.attached()] == ["ns/pod"]
    new.detach("ns/pod")
    assert dial(own_agent.netns, lab.POD_V4) == f"app pod saw {lab.POD_V4}"


def test_an_attach_that_a_crash_cut_short_is_undone_by_the_next_agent(
    open_steering: Open, capture: str, pod: Netns, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = traces(pod)
    first = open_steering(mode=capture)
    listeners = lab.open_listeners(pod)

    def crash(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(podmaps.PodMaps, "start_connect_hook", crash)
    monkeypatch.setattr(attaching.Attacher, "remove", crash)
    with pytest.raises(KeyboardInterrupt):
        first.attach(PodSteering("ns/pod", pod), listeners)
    monkeypatch.undo()
    assert traces(pod) != before
    for sock in listeners.values():
        sock.close()
    second = open_steering(first._pins.agent.name, mode=capture)
    assert second.attached() == ()
    assert traces(pod) == before


def test_an_agent_that_closes_leaves_everything_pinned(
    open_steering: Open, capture: str, pod: Netns
) -> None:
    first = open_steering(mode=capture)
    first.set_mesh(lab.MESH)
    tiny = TinyAgent(first, pod)
    tiny.start()
    first.attach(PodSteering("ns/pod", pod), tiny.listeners)
    tiny.stop()
    name = first._pins.agent.name
    first.close()
    first.close()
    assert (PIN_ROOT / name).is_dir()
    assert dial(pod, lab.MESH_V4) == "ECONNREFUSED"
    again = open_steering(name, mode=capture)
    assert again.statistics().mesh_prefixes == len(lab.MESH)


def _rounds(steering: Steering, pod: Netns, rounds: int) -> None:
    before, maps = traces(pod), map_ids(steering)
    idle = programs_using(maps)
    listeners = lab.open_listeners(pod)
    wanted = PodSteering("ns/pod", pod)
    for number in range(rounds + 2):
        if number == 2:  # the first rounds may fill caches
            gc.collect()
            descriptors = len(os.listdir("/proc/self/fd"))
        steering.attach(wanted, listeners)
        steering.detach("ns/pod")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    for sock in listeners.values():
        sock.close()
    assert traces(pod) == before
    assert settles(lambda: programs_using(maps), idle)
    for name in ("pods", "addresses", "exempt_ports", "records", "listeners"):
        assert list(steering._maps[name].keys()) == []


def test_rounds_of_attach_and_detach_leak_nothing(steering: Steering, pod: Netns) -> None:
    _rounds(steering, pod, 8)


@pytest.mark.slow
def test_200_rounds_of_attach_and_detach_leak_nothing(steering: Steering, pod: Netns) -> None:
    _rounds(steering, pod, 200)
