"""The kernel's verdicts are never wider than the decision functions, whatever changes when."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.agent.core.address import SocketAddress
from meshbpf.agent.core.authz import ConnectionFacts
from meshbpf.agent.core.balance import target_port, usable_endpoints
from meshbpf.agent.core.policy import Authorization, Match, PolicyAction, PolicyScope
from meshbpf.agent.core.route import HboneRoute, InboundRoute, PlainRoute, Refused
from meshbpf.agent.core.routing import inbound_hbone, inbound_plain, outbound
from meshbpf.agent.core.service import (
    IPFamilies,
    LoadBalancerMode,
    LoadBalancing,
    Service,
)
from meshbpf.agent.core.state import MeshState
from meshbpf.agent.core.store import Snapshot
from meshbpf.agent.core.workload import (
    ApplicationTunnel,
    GatewayAddress,
    NamespacedHostname,
    NetworkAddress,
    TunnelFraming,
    TunnelProtocol,
    Workload,
)
from meshbpf.agent.datapath.flowcodecs import (
    Flow,
    FlowReport,
    FlowState,
    ServiceChoice,
    ServiceKey,
    SlotCounters,
    VerdictKey,
)
from meshbpf.agent.runtime.carried_traffic import CarriedTraffic
from meshbpf.agent.runtime.carrier import Carrier
from meshbpf.agent.runtime.connections import decide
from meshbpf.agent.runtime.local_pod import LocalPod
from meshbpf.agent.runtime.traffic_metrics import TrafficMetrics
from meshbpf.bpf import Report
from tests.unit.core.builders import at, ip, mesh, pod, service
from tests.unit.core.test_authz_property import rules

PORTS = (80, 8080)
NAMES = ("a", "b", "c")
ADDRESSES = {name: ip(f"10.0.0.{number}") for number, name in enumerate(NAMES, 1)}
STRANGER = ip("10.9.9.9")


@dataclass
class Kernel:
    """The maps, and the rule by which bpf/include/meshbpf/carry.h reads them."""

    clock: int = 0
    epochs: dict[int, int] = field(default_factory=dict)
    verdicts: dict[VerdictKey, tuple[int, int, int]] = field(default_factory=dict)
    services: dict[ServiceKey, tuple[int, int, Sequence[ServiceChoice]]] = field(
        default_factory=dict
    )
    drawn: set[Flow] = field(default_factory=set)
    flows: dict[Flow, FlowState] = field(default_factory=dict)
    told: list[FlowReport] = field(default_factory=list)
    lost: int = 0

    def epoch(self, index: int) -> int:
        return self.epochs.get(index, 0)

    def carries(self, key: VerdictKey) -> bool:
        found = self.verdicts.get(key)
        if found is None or found[1] != self.epoch(key.destination):
            return False
        return not key.source or found[0] == self.epoch(key.source)

    def raise_epochs(self, pods: Iterable[int]) -> None:
        self.clock += 1
        self.epochs.update(dict.fromkeys(pods, self.clock))

    def allow(self, key: VerdictKey, slot: int) -> None:
        source = self.epoch(key.source) if key.source else 0
        self.verdicts[key] = (source, self.epoch(key.destination), slot)

    def choices(self, key: ServiceKey) -> tuple[int, Sequence[ServiceChoice]]:
        """What the connect hook may draw from now: the weight of all, and its own."""
        epoch, total, choices = self.services.get(key, (-1, 0, ()))
        return (total, choices) if epoch == self.epoch(key.pod) else (0, ())

    def offer(self, key: ServiceKey, total: int, choices: Sequence[ServiceChoice]) -> None:
        self.services[key] = (self.epoch(key.pod), total, choices)

    def withdraw(self, keys: Iterable[ServiceKey]) -> None:
        for key in keys:
            self.services.pop(key, None)

    def take_drawn(self, flow: Flow) -> bool:
        known = flow in self.drawn
        self.drawn.discard(flow)
        return known

    def forget(self, keys: Iterable[VerdictKey]) -> None:
        for key in keys:
            self.verdicts.pop(key, None)

    def state(self, flow: Flow) -> FlowState | None:
        return self.flows.get(flow)

    def live(self) -> Sequence[tuple[Flow, FlowState]]:
        return list(self.flows.items())

    def move_slot(self, flow: Flow, slot: int) -> None:
        self.flows[flow] = replace(self.flows[flow], slot=slot)

    def reports(self) -> Sequence[FlowReport]:
        told, self.told = self.told, []
        return told

    def take_lost_reports(self) -> int:
        lost, self.lost = self.lost, 0
        return lost

    def counters(self, slot: int) -> SlotCounters:
        return SlotCounters()

    def zero(self, slot: int) -> None:
        pass

    def records(self, most: int) -> Sequence[Any]:
        return ()

    def grant_records(self, count: int) -> int:
        return 0

    def destroy(self, ends: Sequence[tuple[Flow, int, int]]) -> int:
        return sum(self.flows.pop(flow, None) is not None for flow, _, _ in ends)


class World:
    """Three pods of one node, their carrier, and the mesh that changes under them."""

    def __init__(self, state: MeshState) -> None:
        self.mesh = Snapshot.of(state, 1)
        self.kernel = Kernel()
        traffic = CarriedTraffic(self.kernel, TrafficMetrics(lambda: 0.0))
        self.carrier = Carrier(self.kernel, self.kernel.destroy, lambda: self.mesh, traffic)
        self.pods: dict[str, LocalPod] = {}
        for index, name in enumerate(NAMES, 1):
            self.attach(name, index)
        self.ports = iter(range(20_000, 60_000))

    def attach(self, name: str, index: int) -> None:
        local = LocalPod(
            namespace="default",
            name=name,
            service_account="x",
            addresses=frozenset({ADDRESSES[name]}),
            sockets=SimpleNamespace(),  # type: ignore[arg-type]
            index=index,
            cookie=1000 + index,
        )
        self.kernel.raise_epochs((index,))
        self.pods[name] = local
        self.carrier.add(local)

    def force(self, state: MeshState) -> None:
        """As LiveMesh does: in one step."""
        self.mesh = Snapshot.of(state, self.mesh.version + 1)
        self.carrier.changed(self.mesh)

    # What the agent says, by the functions that it uses for connections of its own.

    def agent_allows(self, key: VerdictKey) -> bool:
        target = SocketAddress(key.destination_ip, key.port)
        server = self._of(key.destination)
        workload = server.workload(self.mesh)
        if workload is None:
            return False
        if not key.source:
            inbound = inbound_plain(self.mesh, workload, target)
            facts = ConnectionFacts(None, key.source_ip, target.ip, target.port)
            return isinstance(inbound, InboundRoute) and self._policy(server, facts)
        client = self._of(key.source).workload(self.mesh)
        if client is None:
            return False
        route = outbound(self.mesh, client, target, rng=random.Random(1))
        if not isinstance(route, HboneRoute) or route.gateway.ip != target.ip:
            return False
        if route.destination.uid != workload.uid or workload.identity not in route.expected:
            return False
        arrived = inbound_hbone(
            self.mesh, workload, server.addresses, route.authority, arrived_at=target.ip
        )
        if not isinstance(arrived, InboundRoute) or arrived.dialed != target:
            return False
        facts = ConnectionFacts(client.identity, key.source_ip, target.ip, target.port)
        return self._policy(server, facts)

    def _policy(self, server: LocalPod, facts: ConnectionFacts) -> bool:
        decision = decide(server, facts, self.mesh)
        return decision.allowed and not decision.dry_run

    def _of(self, index: int) -> LocalPod:
        return next(pod for pod in self.pods.values() if pod.index == index)

    def dial(self, key: VerdictKey) -> None:
        """A connection: the kernel's if there is a verdict, else the agent's, which offers."""
        flow = Flow(
            SocketAddress(key.source_ip, next(self.ports)),
            SocketAddress(key.destination_ip, key.port),
        )
        if self.kernel.carries(key):
            self.kernel.flows[flow] = FlowState(
                source_cookie=1000 + key.source if key.source else 0,
                socket_cookie=flow.source.port,
                opened_ns=0,
                source=key.source,
                destination=key.destination,
                slot=self.kernel.verdicts[key][2],
                attested=bool(key.source),
                carried=True,
                open=True,
            )
        elif key.source:
            self.carrier.offer_pair(self._of(key.source), key.source_ip, flow.destination)
        else:
            facts = ConnectionFacts(None, key.source_ip, key.destination_ip, key.port)
            if decide(self._of(key.destination), facts, self.mesh).allowed:
                self.carrier.offer_plaintext(self._of(key.destination), facts)

    def dial_service(self, key: ServiceKey, draw: float) -> str:
        """A connection to a service: "kernel", or by whom the agent then has it carried."""
        source = self._of(key.pod)
        (source_ip,) = source.addresses
        client = SocketAddress(source_ip, next(self.ports))
        target = SocketAddress(key.ip, key.port)
        total, choices = self.kernel.choices(key)
        at, below = draw * total, 0
        for choice in choices:
            below += choice.weight
            if at < below:
                if self.kernel.carries(self.verdict_of(key, choice)):
                    return "kernel"
                break  # as if nothing had been drawn
        else:
            if total:
                self.kernel.drawn.add(Flow(client, target))
        workload = source.workload(self.mesh)
        if workload is None:
            return "refused"
        spared = self.carrier.services.spared(source, client, target)
        route = outbound(self.mesh, workload, target, rng=random.Random(draw), spared=spared)
        if isinstance(route, Refused):
            return "refused"
        if route.service is not None:
            self.carrier.offer_service(source, source_ip, target)
        return "nobody" if route.destination is None else route.destination.uid

    def verdict_of(self, key: ServiceKey, choice: ServiceChoice) -> VerdictKey:
        (source_ip,) = self._of(key.pod).addresses
        to = next(i for i, name in enumerate(NAMES, 1) if ADDRESSES[name] == choice.target.ip)
        return VerdictKey(key.pod, to, source_ip, choice.target.ip, choice.target.port)

    def check(self) -> None:
        for key in KEYS:
            if self.kernel.carries(key):
                assert self.agent_allows(key), key
        for key in SERVICE_KEYS:
            self.check_draw(key)

    def check_draw(self, key: ServiceKey) -> None:
        """The hook draws what the balancer would, of the weights that it would."""
        total, choices = self.kernel.choices(key)
        if not total:
            return
        client = self._of(key.pod).workload(self.mesh)
        assert client is not None
        service = self.mesh.service_at(client.network, key.ip, client.namespace)
        assert service is not None
        endpoints = usable_endpoints(self.mesh, client, service, key.port)
        assert total == sum(one.workload.capacity for one in endpoints)
        weights = {
            SocketAddress(one.workload.addresses[0], target_port(one, service, key.port) or 0): (
                one.workload.capacity
            )
            for one in endpoints
        }
        assert choices
        for choice in choices:
            assert weights[choice.target] == choice.weight
        for seed in range(8):
            route = outbound(
                self.mesh, client, SocketAddress(key.ip, key.port), rng=random.Random(seed)
            )
            assert isinstance(route, HboneRoute | PlainRoute), route
            assert route.service is service
            assert route.target in weights, "it goes to an endpoint, and through nobody"

    def check_live(self) -> None:
        """What lives is what policy lets live; routes are for new connections."""
        for flow, state in self.kernel.flows.items():
            client = self._of(state.source).workload(self.mesh) if state.source else None
            facts = ConnectionFacts(
                None if client is None else client.identity,
                flow.source.ip,
                flow.destination.ip,
                flow.destination.port,
            )
            assert not state.source or client is not None
            assert decide(self._of(state.destination), facts, self.mesh).allowed, flow


VIP = ip("10.7.0.1")
SERVICE_KEYS = tuple(ServiceKey(index, VIP, 80) for index in range(1, len(NAMES) + 1))
KEYS = tuple(
    VerdictKey(source, NAMES.index(to) + 1, where, ADDRESSES[to], port)
    for (source, where), to, port in product(
        [(0, STRANGER), (0, ADDRESSES["a"])]
        + [(index, ADDRESSES[name]) for index, name in enumerate(NAMES, 1)],
        NAMES,
        PORTS,
    )
    if source != NAMES.index(to) + 1
)


MEMBER = {NamespacedHostname("default", "vip"): {80: 8080}}


def vip(**fields: Any) -> Service:
    """The service to which pods belong."""
    return service("vip", str(VIP), ports={80: 8080}, **fields)


vips = st.sampled_from([
    vip(), vip(), vip(),
    vip(waypoint=GatewayAddress(NetworkAddress("", ADDRESSES["c"]), 15008)),
    vip(load_balancing=LoadBalancing(mode=LoadBalancerMode.PASSTHROUGH)),
    vip(ip_families=IPFamilies.IPV6_ONLY),
    None,
])  # fmt: skip


def workloads_of(name: str) -> st.SearchStrategy[Workload]:
    """The pod as it mostly is, and in the ways in which it may be something else."""
    usual = pod(name, str(ADDRESSES[name]), service_account="x")
    gateway = GatewayAddress(NetworkAddress("", ADDRESSES["c"]), 15008)
    changes: list[dict[str, Any]] = [
        {}, {}, {}, {},
        {"waypoint": gateway},
        {"tunnel_protocol": TunnelProtocol.NONE},
        {"trust_domain": "td"},
        {"service_account": "y"},
        {"network": "far"},
        {"addresses": (ip("10.0.0.77"),)},
        {"addresses": (ADDRESSES[NAMES[0]],)},
        {"authorization_policies": ("default/named",)},
        {"application_tunnel": ApplicationTunnel(TunnelFraming.PROXY, 80)},
        {"capacity": 0},
        {"capacity": 5},
    ]  # fmt: skip
    return st.builds(
        lambda change, member: replace(usual, services=MEMBER if member else {}, **change),
        st.sampled_from(changes),
        st.sampled_from([True, True, False]),
    )


FAR = pod("far", "10.8.0.1", services={"vip": {80: 8080}}, node="other", capacity=3)

policies = st.lists(
    st.builds(
        Authorization,
        name=st.sampled_from(["named", "other"]),
        namespace=st.just("default"),
        scope=st.sampled_from(PolicyScope),
        action=st.sampled_from(PolicyAction),
        rules=rules
        | st.sampled_from(PORTS).map(lambda port: (((Match(destination_ports=(port,)),),),)),
        dry_run=st.sampled_from([False, False, False, True]),
    ),
    max_size=2,
    unique_by=lambda policy: policy.name,
)
states = st.builds(
    lambda workloads, policies, shadowed, vip, far: MeshState(
        (*(each for each in workloads if each is not None), *([FAR] if far else [])),
        (
            *([service("svc", str(ADDRESSES["b"]), ports={80: 8080})] if shadowed else []),
            *([] if vip is None else [vip]),
        ),
        tuple(policies),
    ),
    st.tuples(*(workloads_of(name) | st.just(None) if name == "c" else workloads_of(name)
                for name in NAMES)),
    policies,
    st.sampled_from([False] * 5 + [True]),
    vips,
    st.booleans(),
)  # fmt: skip
steps = st.lists(
    st.sampled_from(KEYS)
    | st.tuples(st.sampled_from(SERVICE_KEYS), st.floats(0, 1, exclude_max=True))
    | states
    | st.sampled_from(["settle", "doubt", "lost", "reattach"]),
    min_size=4,
    max_size=25,
)


@settings(max_examples=300, deadline=None)
@given(states, steps)
def test_a_verdict_is_never_wider_than_what_the_agent_would_answer(
    first: MeshState, steps: list[VerdictKey | tuple[ServiceKey, float] | MeshState | str]
) -> None:
    async def run() -> None:
        world = World(first)
        for step in steps:
            match step:
                case MeshState():
                    world.force(step)
                case VerdictKey():
                    world.dial(step)
                    world.dial(step)
                case (key, draw):
                    world.dial_service(key, draw)
                    world.check()
                    world.dial_service(key, draw)
                case "settle":
                    await world.carrier.settle()
                    world.check_live()
                case "doubt":
                    for flow, state in world.kernel.live():
                        world.kernel.told.append(
                            FlowReport(
                                flow, Report.STALE, state.socket_cookie, state.source,
                                state.destination,
                            )
                        )  # fmt: skip
                    await world.carrier.answer_reports()
                    world.check_live()
                case "lost":
                    world.kernel.lost = 3
                    await world.carrier.answer_reports()
                    world.check_live()
                case _:
                    index = world.pods["b"].index
                    world.carrier.remove(index)
                    world.attach("b", index)
            world.check()
        await world.carrier.settle()
        world.check()
        world.check_live()

    trio.run(run)


# --- by example ---------------------------------------------------------------------


def usual(*more: Authorization) -> MeshState:
    snapshot = mesh(*(pod(name, str(ADDRESSES[name]), service_account="x") for name in NAMES))
    return MeshState(tuple(snapshot.workloads), (), more)


def deny(port: int) -> Authorization:
    rule = ((Match(destination_ports=(port,)),),)
    return Authorization("deny", "default", PolicyScope.GLOBAL, PolicyAction.DENY, (rule,))


A_TO_B = VerdictKey(1, 2, ADDRESSES["a"], ADDRESSES["b"], 80)


def in_world(call: Callable[[World], Any], state: MeshState | None = None) -> World:
    world = World(state or usual())

    async def run() -> None:
        await call(world)

    trio.run(run)
    return world


def test_what_was_in_use_is_renewed_and_not_asked_for_again() -> None:
    async def call(world: World) -> None:
        world.dial(A_TO_B)
        assert world.kernel.carries(A_TO_B)
        world.force(usual(deny(9)))
        assert not world.kernel.carries(A_TO_B)
        await world.carrier.settle()
        assert world.kernel.carries(A_TO_B)

    in_world(call)


def test_a_state_that_concerns_no_pod_leaves_verdicts_alone() -> None:
    async def call(world: World) -> None:
        world.dial(A_TO_B)
        state = usual()
        other = pod("elsewhere", "10.1.1.1", node="other")
        world.force(replace(state, workloads=(*state.workloads, other)))
        assert world.kernel.carries(A_TO_B)

    in_world(call)


@pytest.mark.parametrize("reason", [Report.STALE, Report.UNTRACKED])
def test_a_connection_in_doubt_is_judged_and_one_that_nobody_watches_is_ended(
    reason: Report,
) -> None:
    async def call(world: World) -> None:
        world.dial(A_TO_B)
        world.dial(A_TO_B)
        ((flow, state),) = world.kernel.live()
        world.kernel.told.append(FlowReport(flow, reason, state.socket_cookie, 1, 2))
        assert await world.carrier.answer_reports() == (reason is Report.UNTRACKED)

    in_world(call)


def test_the_caller_is_the_attested_pod_and_not_another_of_its_index() -> None:
    async def call(world: World) -> None:
        world.dial(A_TO_B)
        world.dial(A_TO_B)
        ((flow, state),) = world.kernel.live()
        server = world.pods["b"]
        caller = world.carrier.caller(server, flow.source, flow.destination)
        assert caller is world.pods["a"]
        world.kernel.flows[flow] = replace(state, source_cookie=7)
        assert world.carrier.caller(server, flow.source, flow.destination) is None
        world.kernel.flows[flow] = replace(state, attested=False)
        assert world.carrier.caller(server, flow.source, flow.destination) is None
        assert world.carrier.caller(server, at("10.0.0.3:1"), flow.destination) is None

    in_world(call)


def test_dry_run_policies_keep_a_pair_with_the_agent() -> None:
    async def call(world: World) -> None:
        world.force(usual(replace(deny(80), dry_run=True)))
        world.dial(A_TO_B)
        assert not world.kernel.carries(A_TO_B)

    in_world(call)


# --- services -------------------------------------------------------------------------

A_TO_VIP = ServiceKey(1, VIP, 80)
AMONG_B_C_FAR = 5
"""Weights of b, c and far."""


def served(*more: Authorization, **fields: Any) -> MeshState:
    """a dials, b and c serve, and so does a pod of another node."""
    pods = [
        pod(
            name,
            str(ADDRESSES[name]),
            service_account="x",
            services=None if name == "a" else {"vip": {80: 8080}},
        )
        for name in NAMES
    ]
    return MeshState((*pods, FAR), (vip(**fields),), more)


def warm(world: World, draws: int = 40) -> None:
    for number in range(draws):
        world.dial_service(A_TO_VIP, number / draws)


def test_each_endpoint_gets_its_weight_whoever_draws() -> None:
    async def call(world: World) -> None:
        warm(world)
        total, choices = world.kernel.choices(A_TO_VIP)
        assert (total, [choice.weight for choice in choices]) == (AMONG_B_C_FAR, [1, 1])
        ended = [world.dial_service(A_TO_VIP, number / 1000) for number in range(1000)]
        assert ended.count("kernel") == 400
        assert ended.count(FAR.uid) == 600, "what the hook has drawn for far goes there"

    in_world(call, served())


def test_an_endpoint_that_policy_denies_is_the_agents_to_refuse() -> None:
    async def call(world: World) -> None:
        warm(world)
        assert world.kernel.choices(A_TO_VIP) == (0, ())
        world.force(served())
        await world.carrier.settle()
        warm(world)
        assert len(world.kernel.choices(A_TO_VIP)[1]) == 2

    in_world(call, served(deny(8080)))


def test_a_change_of_the_service_is_renewed_without_a_connection() -> None:
    async def call(world: World) -> None:
        warm(world)
        state = served()
        world.force(replace(state, workloads=state.workloads[:-1]))
        assert world.kernel.choices(A_TO_VIP) == (0, ()), "from this step on"
        await world.carrier.settle()
        assert world.kernel.choices(A_TO_VIP)[0] == 2

    in_world(call, served())


def test_a_detached_pod_draws_nothing_and_is_not_drawn() -> None:
    async def call(world: World) -> None:
        warm(world)
        world.carrier.remove(world.pods.pop("b").index)
        world.kernel.raise_epochs((2,))
        ended = {world.dial_service(A_TO_VIP, number / 40) for number in range(40)}
        assert "kernel" in ended
        (choice,) = world.kernel.choices(A_TO_VIP)[1]
        assert choice.target.ip == ADDRESSES["c"]
        world.carrier.remove(world.pods.pop("a").index)
        assert not world.kernel.services

    in_world(call, served())


def test_a_pod_that_keeps_to_hbone_is_drawn_by_the_agent_alone() -> None:
    async def call(world: World) -> None:
        world.pods["b"].carried = False
        world.carrier.add(world.pods["b"])
        warm(world)
        total, (choice,) = world.kernel.choices(A_TO_VIP)
        assert (total, choice.target.ip) == (AMONG_B_C_FAR, ADDRESSES["c"])

    in_world(call, served())
